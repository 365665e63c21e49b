//! Desktop files (Desktop Entry Specification): an app's name and icon as users know them, and how it is started with a
//! window.

use std::path::PathBuf;

use super::{
    activation::{own_shares, read, shares_of_user, split_words},
    session::Way,
};
use crate::model::{AppKey, Bus};

/// What an app's desktop file says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct DesktopFile {
    /// `Name=`, in the user's language where that is known.
    pub(super) name: String,
    /// `Icon=`; possibly empty.
    pub(super) icon: String,
    /// `Exec=`, split into words, without field codes; empty when there is none, it cannot be split or wants a terminal.
    pub(super) exec: Vec<String>,
}

/// Characters of a name at most.
const NAME: usize = 100;

/// The desktop file of the app, read with its user's rights. `locale` is `LANG`'s value: `de_AT.UTF-8`.
pub(super) async fn find(way: &Way, app: &AppKey, locale: &str) -> Option<DesktopFile> {
    if app.bus == Bus::System || app.service.contains('/') {
        return None;
    }
    let (name, locale) = (format!("{}.desktop", app.service), locale.to_owned());
    let look = move |shares: Vec<PathBuf>| {
        let files =
            shares.iter().filter(|share| share.is_absolute()).map(|share| share.join("applications").join(&name));
        files.filter_map(|path| parse(&read(&path)?, &locale)).next()
    };
    match way {
        Way::Address(_) => look(own_shares(|name| std::env::var(name).ok().filter(|value| !value.is_empty()))),
        Way::User(user, errands) => {
            let searched = user.clone();
            let found = errands.run(user, move || look(shares_of_user(&searched))).await;
            found.inspect_err(|error| log::warn!("{app}: no desktop file is looked for: {error}")).ok().flatten()
        }
    }
}

/// `None` when there is nothing a user would know the app by.
fn parse(text: &str, locale: &str) -> Option<DesktopFile> {
    let locales = names_of(locale);
    let (mut inside, mut terminal) = (false, false);
    let (mut names, mut icon, mut exec) = (vec![None; locales.len() + 1], "", "");
    for line in text.lines().map(str::trim) {
        if let Some(group) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            inside = group == "Desktop Entry";
            continue;
        }
        let Some((key, value)) = line.split_once('=').filter(|_| inside) else { continue };
        let (key, value) = (key.trim_end(), value.trim_start());
        match key {
            "Name" => names[locales.len()] = Some(value),
            "Icon" => icon = value,
            "Exec" => exec = value,
            "Terminal" => terminal = value == "true",
            _ => {
                let of = key.strip_prefix("Name[").and_then(|rest| rest.strip_suffix(']'));
                if let Some(index) = of.and_then(|of| locales.iter().position(|locale| locale == of)) {
                    names[index] = Some(value);
                }
            }
        }
    }
    let name: String = names.into_iter().flatten().next()?.chars().filter(|c| !c.is_control()).take(NAME).collect();
    if name.trim().is_empty() {
        return None;
    }
    let exec = if terminal { Vec::new() } else { command(exec) };
    Some(DesktopFile { name, icon: icon.chars().filter(|c| !c.is_control()).collect(), exec })
}

/// How `Name[…]` may be written for a locale, the best first.
fn names_of(locale: &str) -> Vec<String> {
    let (rest, modifier) = locale.split_once('@').map_or((locale, None), |(rest, modifier)| (rest, Some(modifier)));
    let rest = rest.split('.').next().unwrap_or_default();
    let (language, country) =
        rest.split_once('_').map_or((rest, None), |(language, country)| (language, Some(country)));
    if language.is_empty() || matches!(language, "C" | "POSIX") {
        return Vec::new();
    }
    let mut names = Vec::new();
    if let (Some(country), Some(modifier)) = (country, modifier) {
        names.push(format!("{language}_{country}@{modifier}"));
    }
    names.extend(country.map(|country| format!("{language}_{country}")));
    names.extend(modifier.map(|modifier| format!("{language}@{modifier}")));
    names.push(language.to_owned());
    names
}

/// Without the field codes: no files are opened.
fn command(exec: &str) -> Vec<String> {
    let words = split_words(&exec.replace("\\\\", "\\")).unwrap_or_default();
    let code = |word: &String| word.len() == 2 && word.starts_with('%') && *word != "%%";
    let words: Vec<String> = words.into_iter().filter(|word| !code(word)).map(|word| word.replace("%%", "%")).collect();
    // Flatpak's marks around a file that is not given.
    words.into_iter().filter(|word| word != "@@" && word != "@@u").collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHAT: &str = "# comment\n[Desktop Entry]\nType=Application\nName=Chat\nName[de]=Plauderei\nName[de_AT]=Tratsch\n\
                        Icon=org.example.Chat\nExec=chat --new \"a b\" %U @@u %u @@ 100%%\n[Desktop Action x]\nName=Other\nExec=rm\n";

    #[test]
    fn names_are_the_users_language() {
        for (locale, name) in [
            ("", "Chat"),
            ("C.UTF-8", "Chat"),
            ("fr_FR.UTF-8", "Chat"),
            ("de_DE.UTF-8", "Plauderei"),
            ("de_AT@euro", "Tratsch"),
            ("de", "Plauderei"),
        ] {
            assert_eq!(parse(CHAT, locale).unwrap().name, name, "{locale}");
        }
        let found = parse(CHAT, "").unwrap();
        assert_eq!(
            (found.icon.as_str(), found.exec),
            ("org.example.Chat", ["chat", "--new", "a b", "100%"].map(String::from).into())
        );
    }

    #[test]
    fn what_is_no_use_is_not_used() {
        assert_eq!(parse("", ""), None);
        assert_eq!(parse("Name=Outside\n[Desktop Entry]\nName=\u{7} \n", ""), None);
        let terminal = parse("[Desktop Entry]\nName=T\nExec=t\nTerminal=true\n", "").unwrap();
        assert!(terminal.exec.is_empty());
        let long = format!("[Desktop Entry]\nName={}\n", "x".repeat(10_000));
        assert_eq!(parse(&long, "").unwrap().name.len(), NAME);
    }
}
