//! The D-Bus service files of the apps that have registered.

use nix::unistd::{Uid, User as Account};
use zbus::block_on;

use crate::{
    doctor::facts::{App, Seen, ServiceFile},
    model::Bus,
    sys::{
        bus::activation,
        users::{User, errand::Errands},
    },
    view,
};

/// What is known to whoever looks.
pub(super) struct Known {
    pub(super) uid: u32,
    /// What the system bus says it can start, where it was asked.
    pub(super) system: Option<Vec<String>>,
    /// Likewise for the session's.
    pub(super) session: Option<Vec<String>>,
}

pub(super) fn look(apps: &[view::App], known: &Known) -> Vec<App> {
    let errands = Errands::default();
    // One with a unique name ends with its connection: there is nothing to start.
    let apps = apps.iter().filter(|app| !app.name.starts_with(':'));
    apps.map(|app| {
        let bus = parse(&app.bus);
        let activatable = match bus {
            Some(Bus::System) => known.system.as_ref(),
            Some(Bus::Session(uid)) if uid == known.uid => known.session.as_ref(),
            _ => None,
        };
        App {
            name: app.name.clone(),
            bus: app.bus.clone(),
            file: find(bus, &app.name, known.uid, &errands),
            known_to_bus: activatable.map(|names| names.contains(&app.name)),
        }
    })
    .collect()
}

/// As [`Bus`] prints itself.
fn parse(text: &str) -> Option<Bus> {
    match text {
        "system" => Some(Bus::System),
        _ => text.strip_prefix("user ")?.parse().ok().map(Bus::Session),
    }
}

fn find(bus: Option<Bus>, name: &str, asker: u32, errands: &Errands) -> Seen<Option<ServiceFile>> {
    let found = match bus {
        None => return Err("its bus has an unknown name".to_owned()),
        Some(Bus::Session(uid)) if uid != asker && asker != 0 => return Err("it is another user's".to_owned()),
        Some(Bus::Session(uid)) if uid != asker => {
            let account = Account::from_uid(Uid::from_raw(uid)).ok().flatten();
            let account = account.ok_or_else(|| format!("there is no user {uid}"))?;
            let user = User { uid, gid: account.gid.as_raw(), runtime_dir: format!("/run/user/{uid}").into() };
            let (searched, name) = (user.clone(), name.to_owned());
            // What is in a user's directories is read with that user's rights.
            block_on(errands.run(&user, move || activation::find_of(&searched, &name)))
                .map_err(|error| format!("cannot look as user {uid}: {error}"))?
        }
        Some(bus) => activation::find(bus, name),
    };
    Ok(found.map(|file| ServiceFile {
        exec: !file.exec.is_empty(),
        user: file.user.is_some(),
        systemd_service: file.systemd_service,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buses_are_read_as_they_print_themselves() {
        for bus in [Bus::System, Bus::Session(1000)] {
            assert_eq!(parse(&bus.to_string()), Some(bus));
        }
        assert_eq!(parse("user x"), None);
    }
}
