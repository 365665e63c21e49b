//! Who notifies the user is seen while that is wanted: what holds on every bus.

use std::time::Duration;

use nightporter::{
    action::Action,
    event::Event,
    model::{Bus, Owner},
    sys::inbox::Incoming,
};
use zbus::{Connection, Message, message::Flags};

const KINDS: [(&str, &str); 3] = [
    ("org.freedesktop.Notifications", "Notify"),
    ("org.freedesktop.portal.Notification", "AddNotification"),
    ("org.gtk.Notifications", "AddNotification"),
];

/// The loop's side, however it is made.
pub(crate) trait Side {
    fn perform(&self, action: Action);
    /// The next thing said of notifications, if any is in time.
    fn told(&mut self, limit: Duration) -> Option<Told>;
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Told {
    Seen(Bus, bool),
    Notified(Bus, Owner, Option<u32>),
}

pub(crate) fn told(incoming: &Incoming) -> Option<Told> {
    match incoming {
        Incoming::Event(Event::NotificationsSeen(bus, seen)) => Some(Told::Seen(*bus, *seen)),
        Incoming::Notified { bus, owner, pid } => Some(Told::Notified(*bus, owner.clone(), *pid)),
        _ => None,
    }
}

/// An app, and who shows what it says; both in this process.
pub(crate) struct Notifier {
    app: Connection,
    server: Connection,
}

impl Notifier {
    pub(crate) fn new(address: &str) -> Self {
        zbus::block_on(async {
            Self { app: super::support::connect(address).await, server: super::support::connect(address).await }
        })
    }

    pub(crate) fn owner(&self) -> Owner {
        Owner(self.app.unique_name().unwrap().as_str().into())
    }

    pub(crate) fn say(&self, interface: &str, member: &str, text: &str) {
        let to = self.server.unique_name().unwrap().as_str();
        let message = Message::method_call("/org/example", member)
            .destination(to)
            .interface(interface)
            .with_flags(Flags::NO_REPLY_EXPECTED)
            .build(&text)
            .unwrap();
        zbus::block_on(self.app.send(&message)).unwrap();
    }
}

const PATIENCE: Duration = Duration::from_secs(30);

/// On a bus where it can be seen: what notifies is told with its process and nothing else is, until it is not wanted any more.
pub(crate) fn is_seen_while_it_is_wanted(side: &mut impl Side, bus: Bus, address: &str) {
    let notifier = Notifier::new(address);
    let pid = Some(std::process::id());
    let (interface, member) = KINDS[0];
    notifier.say(interface, member, "before anybody wants to know");
    for round in 0..2 {
        side.perform(Action::WatchNotifications(bus, true));
        assert_eq!(side.told(PATIENCE), Some(Told::Seen(bus, true)), "round {round}");
        notifier.say("org.example.Other", "Notify", "something else");
        for (interface, member) in KINDS {
            notifier.say(interface, member, "hello");
            assert_eq!(side.told(PATIENCE), Some(Told::Notified(bus, notifier.owner(), pid)), "{interface}");
        }
        let other = Notifier::new(address);
        other.say(interface, member, "from another");
        assert_eq!(side.told(PATIENCE), Some(Told::Notified(bus, other.owner(), pid)));
        side.perform(Action::WatchNotifications(bus, false));
        // It is over when what comes after it is done: asked for again it begins anew.
        while side.told(Duration::from_millis(300)).is_some() {}
        notifier.say(interface, member, "nobody wants to know");
        assert_eq!(side.told(Duration::from_millis(300)), None);
    }
}
