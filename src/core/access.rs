//! Who may do what (design.md, invariant 6): an app for itself alone, the user's own tools for the user's apps, and
//! beyond that root, or whom polkit lets.

use std::sync::Arc;

use crate::{
    event::{Authorization, Caller, Privilege},
    model::{AppKey, Bus, Owner},
};

/// Whether a caller may do something to apps that are not its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// Yes.
    Granted,
    /// If polkit says so.
    Ask {
        /// Whether somebody may be asked for a password.
        interactive: bool,
    },
    /// No, and why.
    Refused(Arc<str>),
}

/// Whether the caller may register this service: it owns the name, or the system vouches that it is that application.
#[must_use]
pub(super) fn may_register(caller: &Caller, service: &str) -> bool {
    caller.owns_service || caller.app_id.as_deref() == Some(service)
}

/// Whether the caller is this app.
#[must_use]
pub(super) fn is_app(caller: &Caller, app: &AppKey, owner: Option<&Owner>) -> bool {
    caller.bus == app.bus
        && (owner == Some(&caller.owner)
            || caller.owner.0 == app.service
            || caller.app_id.as_deref() == Some(&*app.service))
}

/// Whether the caller may act on other apps of its bus, and read about them: root; or on a session bus a program of the
/// bus's user that runs unconfined and is not itself an app we serve (the command line, the shell).
#[must_use]
pub(super) fn may_control(caller: &Caller, is_registered_app: bool) -> bool {
    if caller.sandboxed || is_registered_app {
        return false;
    }
    match caller.bus {
        Bus::System => caller.uid == 0,
        Bus::Session(uid) => caller.uid == 0 || caller.uid == uid,
    }
}

/// Whether the caller has the privilege: by its own right ([`may_control`]), or because polkit says so.
#[must_use]
pub(super) fn privileged(caller: &Caller, is_registered_app: bool, privilege: Privilege) -> Access {
    let confined = caller.sandboxed || is_registered_app;
    let own = privilege != Privilege::ManageUsers || caller.bus == Bus::System;
    if own && may_control(caller, is_registered_app) {
        return Access::Granted;
    }
    if confined && caller.uid == 0 {
        // polkit grants root everything unseen.
        return Access::Refused("an app and a sandboxed program may not, even as root".into());
    }
    match &caller.authorization {
        Authorization::Granted(granted) if *granted == privilege => Access::Granted,
        Authorization::Granted(_) => Access::Refused("polkit was asked about something else".into()),
        Authorization::Refused(reason) => Access::Refused(Arc::clone(reason)),
        // What an app pleases to do must not bring a dialog for a password before the user.
        Authorization::NotAsked => Access::Ask { interactive: !confined },
    }
}

/// Whether the caller sees what is on this bus: its own, and where polkit lets it or it is root, all from the system's.
#[must_use]
pub(super) fn sees(caller: &Caller, bus: Bus) -> bool {
    let reads_all = caller.uid == 0 || caller.authorization == Authorization::Granted(Privilege::Read);
    bus == caller.bus || (caller.bus == Bus::System && reads_all)
}

#[cfg(test)]
mod tests {
    use super::{super::fixtures, *};

    fn caller() -> Caller {
        fixtures::caller(Bus::Session(1000), ":1.7")
    }

    #[test]
    fn what_is_not_ones_own_takes_root_or_polkit() {
        use Authorization::{Granted, NotAsked, Refused};
        use Privilege::{ManageApps, ManageUsers, Read};
        let (ask, silently) = (Access::Ask { interactive: true }, Access::Ask { interactive: false });
        let user = caller();
        let other = Caller { uid: 1001, ..caller() };
        let on_system = Caller { bus: Bus::System, ..caller() };
        let root = Caller { bus: Bus::System, uid: 0, ..caller() };
        let sandboxed = Caller { sandboxed: true, ..caller() };
        // The caller, whether it is an app, what polkit said, and what comes of it for reading, apps and users.
        let no = || Access::Refused("".into());
        for (caller, is_app, authorization, expected) in [
            // One's own needs nobody's leave, and users are nobody's own but root's.
            (&user, false, NotAsked, [Access::Granted, Access::Granted, ask.clone()]),
            (&user, false, Refused("no".into()), [Access::Granted, Access::Granted, no()]),
            (&root, false, NotAsked, [Access::Granted, Access::Granted, Access::Granted]),
            (&root, false, Refused("no".into()), [Access::Granted, Access::Granted, Access::Granted]),
            (&on_system, false, NotAsked, [ask.clone(), ask.clone(), ask.clone()]),
            (&other, false, NotAsked, [ask.clone(), ask.clone(), ask]),
            (&on_system, false, Refused("no".into()), [no(), no(), no()]),
            // A privilege is that one and no other.
            (&on_system, false, Granted(Read), [Access::Granted, no(), no()]),
            (&on_system, false, Granted(ManageApps), [no(), Access::Granted, no()]),
            (&on_system, false, Granted(ManageUsers), [no(), no(), Access::Granted]),
            // Apps and what is sandboxed: polkit may say so, but nobody is asked for a password for them.
            (&sandboxed, false, NotAsked, [silently.clone(), silently.clone(), silently.clone()]),
            (&user, true, NotAsked, [silently.clone(), silently.clone(), silently.clone()]),
            (&on_system, true, NotAsked, [silently.clone(), silently.clone(), silently]),
            (&user, true, Granted(ManageApps), [no(), Access::Granted, no()]),
            (&sandboxed, false, Refused("no".into()), [no(), no(), no()]),
            // For root polkit is no judge.
            (&root, true, NotAsked, [no(), no(), no()]),
            (&root, true, Granted(ManageApps), [no(), no(), no()]),
            (&Caller { sandboxed: true, ..root.clone() }, false, Granted(Read), [no(), no(), no()]),
        ] {
            let caller = Caller { authorization, ..caller.clone() };
            for (privilege, expected) in Privilege::ALL.into_iter().zip(expected) {
                let access = match privileged(&caller, is_app, privilege) {
                    Access::Refused(_) => no(),
                    access => access,
                };
                assert_eq!(access, expected, "{privilege:?} by {caller:?}, an app: {is_app}");
            }
        }
    }

    #[test]
    fn users_do_not_see_each_other() {
        let buses = [Bus::Session(1000), Bus::Session(1001), Bus::System];
        let seen = |caller: &Caller| buses.map(|bus| sees(caller, bus));
        let read = Authorization::Granted(Privilege::Read);
        assert_eq!(seen(&caller()), [true, false, false]);
        // A user's bus can say what it likes of who calls: it shows that user's alone.
        assert_eq!(seen(&Caller { uid: 0, ..caller() }), [true, false, false]);
        assert_eq!(seen(&Caller { authorization: read.clone(), ..caller() }), [true, false, false]);
        let on_system = Caller { bus: Bus::System, ..caller() };
        assert_eq!(seen(&on_system), [false, false, true]);
        assert_eq!(seen(&Caller { uid: 0, ..on_system.clone() }), [true, true, true]);
        assert_eq!(seen(&Caller { authorization: read, ..on_system.clone() }), [true, true, true]);
        let manages = Authorization::Granted(Privilege::ManageApps);
        assert_eq!(seen(&Caller { authorization: manages, ..on_system }), [false, false, true]);
    }

    #[test]
    fn only_the_owner_or_the_application_itself_registers_a_name() {
        assert!(!may_register(&caller(), "im.dino.Dino"));
        assert!(may_register(&Caller { owns_service: true, ..caller() }, "im.dino.Dino"));
        assert!(may_register(&Caller { app_id: Some("im.dino.Dino".into()), ..caller() }, "im.dino.Dino"));
        assert!(!may_register(&Caller { app_id: Some("im.dino".into()), ..caller() }, "im.dino.Dino"));
    }

    #[test]
    fn an_app_never_controls_others() {
        assert!(may_control(&caller(), false));
        assert!(!may_control(&caller(), true));
        assert!(!may_control(&Caller { sandboxed: true, ..caller() }, false));
        assert!(!may_control(&Caller { uid: 1001, ..caller() }, false));
        assert!(may_control(&Caller { uid: 0, ..caller() }, false));
        assert!(!may_control(&Caller { bus: Bus::System, ..caller() }, false));
        assert!(may_control(&Caller { bus: Bus::System, uid: 0, ..caller() }, false));
    }

    #[test]
    fn an_app_is_known_by_its_connection_or_its_application_id() {
        let app = AppKey::new(Bus::Session(1000), "im.dino.Dino");
        assert!(is_app(&caller(), &app, Some(&Owner(":1.7".into()))));
        assert!(!is_app(&caller(), &app, Some(&Owner(":1.8".into()))));
        assert!(!is_app(&caller(), &app, None));
        assert!(is_app(&Caller { app_id: Some("im.dino.Dino".into()), ..caller() }, &app, None));
        assert!(!is_app(&Caller { bus: Bus::System, ..caller() }, &app, Some(&Owner(":1.7".into()))));
        assert!(is_app(&caller(), &AppKey::new(Bus::Session(1000), ":1.7"), None));
    }
}
