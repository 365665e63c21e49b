//! New messages are kept back for a moment before they are written: one that its app takes meanwhile leaves only its id
//! to write, and ids can wait for company. A running app answers within a millisecond or two, so that most messages cost
//! neither a commit nor their bytes on the flash.
//!
//! Nothing depends on it but the time of the answer: a message is answered for when it is durable, as ever, and one kept
//! back is in the same place as one that waits in the store's queue. This is the loop's side; nothing here blocks.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use super::{Store, Work};
use crate::{
    action::StoreOp,
    event::StoreTicket,
    model::{Ending, Message},
    time::{Instant, earliest},
};

/// How long a message waits for its app. The upstream's acknowledgement waits with it.
const HOLD: Duration = Duration::from_millis(10);
/// How long the ids of messages taken meanwhile wait for company. If the daemon crashes within it, ntfy, whose cursor lags,
/// sends those messages again and the app sees them twice; this long, and not longer, is the price of a commit saved.
const COMPANY: Duration = Duration::from_millis(250);
/// Messages kept back at most; with one more all are written. Bounds the bodies held here to 512 KiB.
const HELD: usize = 128;

/// The store, behind a place where messages wait a moment.
pub struct Holdback {
    store: Store,
    held: VecDeque<Held>,
    /// The earliest of all held.
    due: Option<Instant>,
}

struct Held {
    message: Message,
    ticket: Option<StoreTicket>,
    since: Instant,
    /// Set once its life is over; the body is gone then.
    ending: Option<Ending>,
}

impl Holdback {
    /// In front of `store`.
    pub const fn new(store: Store) -> Self {
        Self { store, held: VecDeque::new(), due: None }
    }

    /// [`Store::apply`], after a moment where that may save a write. Operations on the same message or registration keep
    /// their order.
    pub fn apply(&mut self, op: StoreOp, ticket: Option<StoreTicket>, now: Instant) {
        match op {
            StoreOp::PutMessage(message) => {
                if self.held.len() >= HELD {
                    self.flush();
                }
                self.held.push_back(Held { message, ticket, since: now, ending: None });
                let due = now + HOLD;
                self.due = Some(self.due.map_or(due, |earlier| earlier.min(due)));
            }
            StoreOp::EndMessage(seq, ending) => {
                let held = self.held.iter_mut().find(|held| held.message.seq == seq && held.ending.is_none());
                let Some(held) = held else { return self.store.apply(op, ticket) };
                held.ending = Some(ending);
                held.message.body = Arc::default();
                // From the first on, so that a steady stream does not put them off for ever.
                let lazy = self.held.front().map(|first| first.since + COMPANY);
                let waiting = self.held.iter().find(|held| held.ending.is_none()).map(|held| held.since + HOLD);
                self.due = earliest(lazy, waiting);
            }
            // They have nothing to do with messages.
            StoreOp::PutUpstream { .. }
            | StoreOp::PutPreference(_)
            | StoreOp::DeletePreference(..)
            | StoreOp::PutApp(_)
            | StoreOp::DeleteApp(_)
            | StoreOp::PutState(..)
            | StoreOp::PutTransfer(_)
            | StoreOp::NoteTransfer(_)
            | StoreOp::DeleteTransfer(_)
            | StoreOp::LoadState(_)
            | StoreOp::PutHistory(_)
            | StoreOp::LoadHistory(_) => self.store.apply(op, ticket),
            StoreOp::PutRegistration(_)
            | StoreOp::DeleteRegistration(_)
            | StoreOp::PutFormer(_)
            | StoreOp::DeleteFormer(..)
            | StoreOp::LoadBody(_) => {
                self.flush();
                self.store.apply(op, ticket);
            }
        }
    }

    /// When [`Holdback::handle_timeout`] wants to be called next.
    pub const fn poll_timeout(&self) -> Option<Instant> {
        self.due
    }

    /// Time passed.
    pub fn handle_timeout(&mut self, now: Instant) {
        if self.due.is_some_and(|due| due <= now) {
            self.flush();
        }
    }

    /// [`Store::close`], with what is held.
    pub fn close(mut self) {
        self.flush();
        self.store.close();
    }

    /// Everything in the order it came.
    fn flush(&mut self) {
        self.due = None;
        for Held { message, ticket, ending, .. } in self.held.drain(..) {
            self.store.send(
                match ending {
                    None => Work::Op(StoreOp::PutMessage(message)),
                    Some(ending) => Work::Ended(message, ending),
                },
                ticket,
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use mio::{Events, Poll, Token};

    use super::*;
    use crate::{
        event::Event,
        model::{AppKey, Bus, ConnectorVersion, MessageSeq, Registration, RegistrationId, Snapshot, Urgency},
        sys::inbox::{self, Inbox, Incoming},
        time::UnixTime,
    };

    const START: Instant = Instant::from_nanos(1_000_000_000);

    struct World {
        poll: Poll,
        inbox: Inbox,
        store: Holdback,
    }

    impl World {
        fn open(dir: &Path) -> (Self, Snapshot) {
            let poll = Poll::new().unwrap();
            let (sender, inbox) = inbox::channel(poll.registry(), Token(0)).unwrap();
            let (store, snapshot) = Store::open(dir, sender).unwrap();
            (Self { poll, inbox, store: Holdback::new(store) }, snapshot)
        }

        fn with_registration(dir: &Path) -> Self {
            let (mut this, _) = Self::open(dir);
            let registration = Registration {
                id: RegistrationId(1),
                app: AppKey::new(Bus::Session(0), "org.example.App"),
                token: "t".into(),
                description: "".into(),
                vapid: None,
                version: ConnectorVersion::V2,
                upstream: "u".into(),
                channel: "c".into(),
                endpoint: "https://example.org/e".into(),
                told: true,
            };
            this.store.apply(StoreOp::PutRegistration(registration), Some(StoreTicket(100)), START);
            assert_eq!(this.next(), Some(Event::Stored(StoreTicket(100), Ok(()))));
            this
        }

        fn put(&mut self, seq: u64, now: Instant) {
            let message = Message {
                seq: MessageSeq(seq),
                registration: RegistrationId(1),
                id: format!("m{seq}").into(),
                body: b"body"[..].into(),
                received: UnixTime::from_millis(1),
                expires: UnixTime::from_millis(u64::MAX >> 2),
                topic: None,
                urgency: Urgency::Normal,
            };
            self.store.apply(StoreOp::PutMessage(message), Some(StoreTicket(seq)), now);
        }

        fn end(&mut self, seq: u64, now: Instant) {
            self.store.apply(StoreOp::EndMessage(MessageSeq(seq), Ending::Accepted), None, now);
        }

        fn next(&mut self) -> Option<Event> {
            let mut events = Events::with_capacity(4);
            loop {
                if let Some(incoming) = self.inbox.take() {
                    let Incoming::Event(event) = incoming else { panic!("{incoming:?}") };
                    return Some(event);
                }
                self.poll.poll(&mut events, Some(Duration::from_millis(300))).unwrap();
                if events.is_empty() {
                    return None;
                }
            }
        }
    }

    #[test]
    fn a_message_nobody_takes_is_written_when_its_moment_is_over() {
        let dir = tempfile::tempdir().unwrap();
        let mut world = World::with_registration(dir.path());
        world.put(1, START);
        assert_eq!(world.store.poll_timeout(), Some(START + HOLD));
        world.store.handle_timeout(START + HOLD / 2);
        assert_eq!(world.next(), None);
        world.store.handle_timeout(START + HOLD);
        assert_eq!(world.next(), Some(Event::Stored(StoreTicket(1), Ok(()))));
        assert_eq!(world.store.poll_timeout(), None);
        // What ends later is ended in the store.
        world.end(1, START + COMPANY);
        world.store.close();
        let (world, snapshot) = World::open(dir.path());
        assert_eq!((snapshot.messages.len(), snapshot.seen.len()), (0, 1));
        world.store.close();
    }

    #[test]
    fn of_a_message_taken_at_once_only_the_id_is_written_and_late() {
        let dir = tempfile::tempdir().unwrap();
        let mut world = World::with_registration(dir.path());
        for seq in 1..=3 {
            let now = START + Duration::from_millis(20) * seq as u32;
            world.put(seq, now);
            assert_eq!(world.store.poll_timeout(), Some(now + HOLD));
            world.end(seq, now + Duration::from_millis(1));
            // A steady stream does not put the first one off.
            assert_eq!(world.store.poll_timeout(), Some(START + Duration::from_millis(20) + COMPANY));
        }
        world.store.handle_timeout(START + COMPANY);
        assert_eq!(world.next(), None);
        world.store.handle_timeout(START + COMPANY + Duration::from_millis(20));
        for seq in 1..=3 {
            assert_eq!(world.next(), Some(Event::Stored(StoreTicket(seq), Ok(()))));
        }
        world.put(4, START + COMPANY * 2);
        world.end(4, START + COMPANY * 2);
        world.store.close();
        let (world, snapshot) = World::open(dir.path());
        assert_eq!(snapshot.messages, []);
        let ids: Vec<&str> = snapshot.seen.iter().map(|(_, id)| &**id).collect();
        assert_eq!(ids, ["m1", "m2", "m3", "m4"]);
        assert_eq!(snapshot.next_message, 5);
        world.store.close();
    }

    #[test]
    fn what_depends_on_a_message_finds_it_written() {
        let dir = tempfile::tempdir().unwrap();
        let mut world = World::with_registration(dir.path());
        world.put(1, START);
        world.put(2, START);
        world.end(2, START);
        world.store.apply(StoreOp::LoadBody(MessageSeq(1)), None, START);
        let mut told = [world.next(), world.next(), world.next()].map(Option::unwrap);
        told.sort_by_key(|event| matches!(event, Event::Body(..)));
        assert_eq!(
            told,
            [
                Event::Stored(StoreTicket(1), Ok(())),
                Event::Stored(StoreTicket(2), Ok(())),
                Event::Body(MessageSeq(1), Some(b"body"[..].into())),
            ]
        );
        world.put(3, START);
        world.end(3, START);
        world.store.apply(StoreOp::DeleteRegistration(RegistrationId(1)), None, START);
        world.store.close();
        let (world, snapshot) = World::open(dir.path());
        assert_eq!((snapshot.messages.len(), snapshot.seen.len()), (0, 0));
        world.store.close();
    }

    #[test]
    fn no_more_is_held_than_the_bound() {
        let dir = tempfile::tempdir().unwrap();
        let mut world = World::with_registration(dir.path());
        for seq in 1..=HELD as u64 + 1 {
            world.put(seq, START);
        }
        for seq in 1..=HELD as u64 {
            assert_eq!(world.next(), Some(Event::Stored(StoreTicket(seq), Ok(()))));
        }
        assert_eq!(world.next(), None);
        world.store.close();
    }
}
