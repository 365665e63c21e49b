//! Who may do what (design.md, invariant 6): an app for itself alone, the user's own tools for the user's apps.

use crate::{
    event::Caller,
    model::{AppKey, Bus, Owner},
};

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

#[cfg(test)]
mod tests {
    use super::*;

    fn caller() -> Caller {
        Caller {
            bus: Bus::Session(1000),
            owner: Owner(":1.7".into()),
            uid: 1000,
            pid: 42,
            app_id: None,
            sandboxed: false,
            owns_service: false,
        }
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
