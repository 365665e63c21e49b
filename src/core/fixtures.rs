//! What the tests of the core's parts begin with: a registration, what is kept of it, a caller and a time.

use std::sync::Arc;

use super::Core;
use crate::{
    action::Action,
    event::{Authorization, Caller, Event, LinkId},
    model::{AppKey, Bus, ConnectorVersion, Owner, Registration, RegistrationId, Snapshot},
    time::{Instant, Now, UnixTime},
};

/// Some time after boot.
pub(super) const NOW: Now = Now { boot: Instant::from_nanos(1_000_000_000_000), wall: UnixTime::from_secs(1_000_000) };
/// The configuration of one upstream, of a kind that needs no greeting to serve.
pub(super) const BROKER: &str = "[[upstream]]\nname = \"b\"\nkind = \"mqtt\"\nurl = \"mqtt://b.example/\"\n";

/// One the app has been told of, with a channel and an endpoint after its id.
pub(super) fn registration(id: u64, app: AppKey, upstream: impl Into<Arc<str>>) -> Registration {
    Registration {
        id: RegistrationId(id),
        app,
        token: "token".into(),
        description: "".into(),
        vapid: None,
        version: ConnectorVersion::V2,
        upstream: upstream.into(),
        channel: format!("channel{id}").into(),
        endpoint: format!("https://push.example/{id}").into(),
        told: true,
    }
}

/// The same at [`BROKER`], where the channel is a topic.
pub(super) fn at_the_broker(id: u64, app: AppKey) -> Registration {
    let (channel, endpoint) = (format!("up/{id}").into(), format!("mqtt://b.example/up/{id}").into());
    Registration { channel, endpoint, ..registration(id, app, "b") }
}

/// What is kept of registrations with the ids from 1 on, and of nothing else.
pub(super) fn kept(registrations: impl IntoIterator<Item = Registration>) -> Snapshot {
    let registrations: Vec<_> = registrations.into_iter().collect();
    let next_registration = registrations.len() as u64 + 1;
    Snapshot { registrations, next_registration, next_message: 1, ..Snapshot::default() }
}

/// A program of the user's that is nobody's app.
pub(super) fn caller(bus: Bus, owner: &str) -> Caller {
    Caller {
        bus,
        owner: Owner(owner.into()),
        uid: 1000,
        pid: 42,
        app_id: None,
        sandboxed: false,
        networked: true,
        owns_service: false,
        authorization: Authorization::NotAsked,
    }
}

/// Tells the core of something; what it does about it, and in `link` the newest link it has asked for.
pub(super) fn tell(core: &mut Core, link: &mut LinkId, event: Event, now: Now) -> Vec<Action> {
    core.handle(event, now);
    let actions: Vec<Action> = std::iter::from_fn(|| core.poll_action()).collect();
    for action in &actions {
        if let Action::Connect { link: newest, .. } = action {
            *link = *newest;
        }
    }
    actions
}
