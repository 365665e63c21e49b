//! Which app the user means: the whole bus name, or as much of its end as fits one app only.

use std::collections::BTreeSet;

use nightporter::view;

use crate::{
    client::{self, Daemon},
    exit::{Exit, Failure},
};

/// Suggestions at most.
const SUGGESTIONS: usize = 3;

/// The bus name meant by `given`.
pub(crate) fn app(daemon: &Daemon, given: &str) -> Result<String, Failure> {
    let apps = match daemon.ask_silently("Apps") {
        // Who may not read of them all may still act on one, or be asked for a password to do so, once.
        Err(failure) if failure.exit == Exit::NotAllowed => return Ok(given.to_owned()),
        apps => client::decode::<Vec<view::App>>(&apps?)?,
    };
    // The system daemon may know an app of the same name for several users.
    let names: BTreeSet<&str> = apps.iter().map(|app| app.name.as_str()).collect();
    let names: Vec<&str> = names.into_iter().collect();
    choose(&names, given).map(str::to_owned)
}

fn choose<'a>(names: &[&'a str], given: &str) -> Result<&'a str, Failure> {
    if let Some(name) = names.iter().find(|name| **name == given) {
        return Ok(name);
    }
    let ends: Vec<&str> = names.iter().copied().filter(|name| ends_with_labels(name, given)).collect();
    match ends[..] {
        [only] => Ok(only),
        [] => Err(Failure::new(Exit::NoSuchApp, not_found(names, given))),
        _ => Err(Failure::new(
            Exit::Usage,
            format!("\"{given}\" fits several apps; say more of the name:\n  {}", ends.join("\n  ")),
        )),
    }
}

/// Whether `name` ends with `end` as whole labels, in any case: "dino" and "Dino" fit "im.dino.Dino", "ino" does not.
fn ends_with_labels(name: &str, end: &str) -> bool {
    let Some(start) = name.len().checked_sub(end.len()).filter(|_| !end.is_empty()) else { return false };
    name.is_char_boundary(start)
        && name[start..].eq_ignore_ascii_case(end)
        && (start == 0 || name[..start].ends_with('.'))
}

fn not_found(names: &[&str], given: &str) -> String {
    if names.is_empty() {
        return format!("no app \"{given}\": no app has registered yet");
    }
    let lower = given.to_ascii_lowercase();
    let mut near: Vec<(usize, &str)> = names.iter().map(|name| (nearness(name, &lower), *name)).collect();
    near.sort();
    // Beyond half the letters being wrong a suggestion only confuses.
    let near: Vec<&str> = near
        .into_iter()
        .filter(|(distance, _)| *distance <= given.chars().count().div_ceil(2))
        .map(|(_, name)| name)
        .take(SUGGESTIONS)
        .collect();
    match near[..] {
        [] => format!("no app \"{given}\"; `nightporter apps` lists them all"),
        _ => format!("no app \"{given}\"; did you mean:\n  {}", near.join("\n  ")),
    }
}

/// How far `given` (in lower case) is from the name or from its last label, whichever is nearer.
fn nearness(name: &str, given: &str) -> usize {
    let name = name.to_ascii_lowercase();
    let last = name.rsplit('.').next().unwrap_or(&name);
    if name.contains(given) {
        return 0;
    }
    edits(&name, given).min(edits(last, given))
}

/// Levenshtein distance.
fn edits(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut diagonal = i;
        row[0] = i + 1;
        for (j, to) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(from != *to);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: [&str; 4] = ["im.dino.Dino", "org.gnome.Fractal", "org.kde.neochat", "com.example.Fractal"];

    #[test]
    fn the_end_of_a_name_is_enough_when_it_fits_one() {
        assert_eq!(choose(&NAMES, "org.kde.neochat").unwrap(), "org.kde.neochat");
        assert_eq!(choose(&NAMES, "dino").unwrap(), "im.dino.Dino");
        assert_eq!(choose(&NAMES, "gnome.fractal").unwrap(), "org.gnome.Fractal");
        assert_eq!(choose(&NAMES, "chat").unwrap_err().exit, Exit::NoSuchApp);
        assert_eq!(choose(&NAMES, "").unwrap_err().exit, Exit::NoSuchApp);
    }

    #[test]
    fn several_fits_are_listed() {
        let failure = choose(&NAMES, "Fractal").unwrap_err();
        assert_eq!(failure.exit, Exit::Usage);
        assert!(failure.text.contains("org.gnome.Fractal") && failure.text.contains("com.example.Fractal"));
    }

    #[test]
    fn the_nearest_names_are_suggested() {
        assert!(choose(&NAMES, "dimo").unwrap_err().text.contains("im.dino.Dino"));
        assert!(choose(&NAMES, "org.kde.neochatt").unwrap_err().text.contains("org.kde.neochat"));
        assert!(!choose(&NAMES, "zzzzzzzz").unwrap_err().text.contains("did you mean"));
        assert_eq!(edits("kitten", "sitting"), 3);
    }
}
