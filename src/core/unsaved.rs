//! What the store would not take, and what must not be built on before it has.
//!
//! An app that knows an endpoint counts on it for good. So it is told of one only when a crash would find the way back
//! to it: when the registration is durable, and with it the name the server knows this device by. What a full disk
//! refuses is written again until it is there.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use super::{Core, Stored, upstream::IncomingMessage};
use crate::{
    action::{NAMING, StoreOp},
    event::StoreTicket,
    model::{Bus, RegistrationId},
    time::{Instant, Now},
};

/// Full disks get emptied by people, not by haste.
const AGAIN: Duration = Duration::from_secs(30);
/// What a session cannot be found again without: autopush's name for this device, and MQTT's.
const IDENTITIES: [&str; 3] = ["uaid", "client", "device"];

/// What is on its way to the store or was refused by it. At most one value a key and one entry a registration.
#[derive(Debug, Default)]
pub(super) struct Unsaved {
    /// By upstream and key.
    values: BTreeMap<(usize, &'static str), Value>,
    registrations: BTreeSet<RegistrationId>,
    /// Registrations that are gone but for their row. Each was durable, so they are as bounded.
    deletions: BTreeMap<RegistrationId, Deletion>,
    /// Other rows on their way, by number: the latest for each.
    rows: BTreeMap<u64, Row>,
    next_row: u64,
    /// Messages that wait until what their ids rest on is durable, by upstream. A session has a bound on messages that are
    /// not safe.
    nameless: BTreeMap<usize, VecDeque<IncomingMessage>>,
    /// Values that wait for registrations to be durable.
    held: BTreeMap<(usize, &'static str), Arc<str>>,
    again_at: Option<Instant>,
}

#[derive(Debug)]
struct Value {
    value: Arc<str>,
    /// The first attempt since the key was last as it should be in the store.
    since: StoreTicket,
    latest: StoreTicket,
    refused: bool,
}

/// A row that must be written some time.
#[derive(Debug)]
struct Row {
    op: StoreOp,
    refused: bool,
}

/// A row on its way out.
#[derive(Debug)]
struct Deletion {
    /// Which upstreams know the registration.
    upstreams: Vec<usize>,
    refused: bool,
}

impl Unsaved {
    pub(super) const fn deadline(&self) -> Option<Instant> {
        self.again_at
    }

    /// Whether any message waits here.
    pub(super) fn holds_messages(&self) -> bool {
        !self.nameless.is_empty()
    }

    fn identities(&self, index: usize) -> impl Iterator<Item = &Value> {
        IDENTITIES.iter().filter_map(move |key| self.values.get(&(index, *key)))
    }
}

impl Core {
    /// Remembers a value for an upstream.
    pub(super) fn remember(&mut self, index: usize, key: &'static str, value: Arc<str>) {
        let Some(upstream) = self.upstreams.get(index) else { return };
        let op = StoreOp::PutUpstream {
            upstream: Arc::clone(&upstream.settings.name),
            key: key.into(),
            value: Arc::clone(&value),
        };
        self.unsaved.held.remove(&(index, key));
        let latest = self.store_with(op, Stored::Value(index, key));
        let since = self.unsaved.values.get(&(index, key)).map_or(latest, |value| value.since);
        self.unsaved.values.insert((index, key), Value { value, since, latest, refused: false });
    }

    /// Remembers a value that says of the upstream's registrations that they are as they should be.
    pub(super) fn remember_behind(&mut self, index: usize, key: &'static str, value: Arc<str>) {
        self.unsaved.held.insert((index, key), value);
        self.release_held();
    }

    /// Lets go of what no registration holds up any more.
    pub(super) fn release_held(&mut self) {
        let free = |((index, _), _): &(&(usize, &'static str), &Arc<str>)| !self.writes_registrations_of(*index);
        let free: Vec<_> = self.unsaved.held.iter().filter(free).map(|(at, value)| (*at, Arc::clone(value))).collect();
        for ((index, key), value) in free {
            self.remember(index, key, value);
        }
    }

    fn writes_registrations_of(&self, index: usize) -> bool {
        let under_way = self.stores.values().filter_map(|waiting| match waiting {
            Stored::Registration(id) => Some(id),
            Stored::Message(_)
            | Stored::Deletion(_)
            | Stored::Value(..)
            | Stored::Row(_)
            | Stored::State
            | Stored::Transfer(_)
            | Stored::History => None,
        });
        under_way.chain(&self.unsaved.registrations).any(|id| self.upstream_of(*id) == Some(index))
    }

    /// Whether a crash could still take the registration, or its latest endpoint, back.
    pub(super) fn is_unsaved(&self, id: RegistrationId) -> bool {
        self.unsaved.registrations.contains(&id)
            || self.stores.values().any(|waiting| *waiting == Stored::Registration(id))
    }

    /// Keeps a message back whose id a crash could still change: its app would take it twice for two. Gives it back when
    /// nothing holds it up. A full disk does not: then it is better had twice than not at all.
    pub(super) fn hold_nameless(&mut self, index: usize, message: IncomingMessage) -> Option<IncomingMessage> {
        if self.unsaved.values.get(&(index, NAMING)).is_none_or(|value| value.refused) {
            return Some(message);
        }
        self.unsaved.nameless.entry(index).or_default().push_back(message);
        None
    }

    pub(super) fn value_stored(&mut self, ticket: StoreTicket, index: usize, key: &'static str, ok: bool, now: Now) {
        let Some(value) = self.unsaved.values.get_mut(&(index, key)).filter(|value| value.latest == ticket) else {
            return;
        };
        if ok {
            self.unsaved.values.remove(&(index, key));
        } else {
            value.refused = true;
            self.unsaved.again_at = Some(now.boot + AGAIN);
        }
        if key == NAMING {
            for message in self.unsaved.nameless.remove(&index).unwrap_or_default() {
                self.on_message(index, message, now);
            }
        }
    }

    /// Writes a former route or a preference, and again until it is there.
    pub(super) fn store_surely(&mut self, op: StoreOp) {
        self.unsaved.rows.retain(|_, row| !is_same_row(&row.op, &op));
        let number = self.unsaved.next_row;
        self.unsaved.next_row += 1;
        self.unsaved.rows.insert(number, Row { op: op.clone(), refused: false });
        self.store_with(op, Stored::Row(number));
    }

    pub(super) fn row_stored(&mut self, number: u64, ok: bool, now: Now) {
        if ok {
            self.unsaved.rows.remove(&number);
        } else if let Some(row) = self.unsaved.rows.get_mut(&number) {
            row.refused = true;
            self.unsaved.again_at = Some(now.boot + AGAIN);
        }
    }

    /// A registration that exists could not be written.
    pub(super) fn registration_refused(&mut self, id: RegistrationId, now: Now) {
        self.unsaved.registrations.insert(id);
        self.unsaved.again_at = Some(now.boot + AGAIN);
    }

    /// Before a registration is written: what it needs and was refused goes first, into the same transaction, so that no
    /// row outlives a crash with an endpoint this device cannot be found at.
    pub(super) fn identity_first(&mut self, index: usize) {
        if self.unsaved.identities(index).any(|value| value.refused) {
            self.save_again();
        }
    }

    /// Whether the registration, durable since `ticket`, would lead nowhere after a crash because what it needs was
    /// refused. If so it is written again behind that.
    pub(super) fn waits_for_identity(&mut self, id: RegistrationId, ticket: StoreTicket) -> bool {
        let Some(index) = self.upstream_of(id) else { return false };
        let waits = self.unsaved.identities(index).any(|value| value.since < ticket);
        if waits {
            self.unsaved.registrations.insert(id);
            self.save_again();
        }
        waits
    }

    /// Deletes a registration's row; the servers that know it hear of it when that is done.
    pub(super) fn delete_registration(&mut self, id: RegistrationId, upstreams: Vec<usize>) {
        self.unsaved.rows.retain(|_, row| !matches!(&row.op, StoreOp::PutFormer(route) if route.registration == id));
        self.unsaved.deletions.insert(id, Deletion { upstreams, refused: false });
        self.store_with(StoreOp::DeleteRegistration(id), Stored::Deletion(id));
    }

    pub(super) fn deletion_stored(&mut self, id: RegistrationId, ok: bool, now: Now) {
        if !ok {
            if let Some(deletion) = self.unsaved.deletions.get_mut(&id) {
                deletion.refused = true;
                self.unsaved.again_at = Some(now.boot + AGAIN);
            }
            return;
        }
        for index in self.unsaved.deletions.remove(&id).map(|deletion| deletion.upstreams).unwrap_or_default() {
            self.unregister_at_server(index, id, now);
        }
    }

    /// Writes again what was refused, in the order it is needed.
    pub(super) fn save_again(&mut self) {
        self.unsaved.again_at = None;
        let refused = self.unsaved.values.iter().filter(|(_, value)| value.refused);
        let refused: Vec<_> = refused.map(|((index, key), value)| (*index, *key, Arc::clone(&value.value))).collect();
        for (index, key, value) in refused {
            self.remember(index, key, value);
        }
        let refused = self.unsaved.deletions.iter_mut();
        let refused = refused.filter_map(|(id, deletion)| std::mem::take(&mut deletion.refused).then_some(*id));
        let refused: Vec<RegistrationId> = refused.collect();
        for id in refused {
            self.store_with(StoreOp::DeleteRegistration(id), Stored::Deletion(id));
        }
        let refused = self.unsaved.rows.iter_mut();
        let refused = refused.filter_map(|(n, row)| std::mem::take(&mut row.refused).then(|| (*n, row.op.clone())));
        let refused: Vec<(u64, StoreOp)> = refused.collect();
        for (number, op) in refused {
            self.store_with(op, Stored::Row(number));
        }
        for id in std::mem::take(&mut self.unsaved.registrations) {
            if let Some(registration) = self.registry.get(id) {
                let op = StoreOp::PutRegistration(registration.clone());
                self.store_with(op, Stored::Registration(id));
            }
        }
    }
}

/// Whether two operations are about the same former route or the same preference.
fn is_same_row(one: &StoreOp, other: &StoreOp) -> bool {
    fn former(op: &StoreOp) -> Option<(RegistrationId, &str)> {
        match op {
            StoreOp::PutFormer(route) => Some((route.registration, &route.upstream)),
            StoreOp::DeleteFormer(registration, upstream) => Some((*registration, upstream)),
            _ => None,
        }
    }
    fn preference(op: &StoreOp) -> Option<(Bus, Option<&str>)> {
        match op {
            StoreOp::PutPreference(preference) => Some((preference.bus, preference.service.as_deref())),
            StoreOp::DeletePreference(bus, service) => Some((*bus, service.as_deref())),
            _ => None,
        }
    }
    (former(one).is_some() && former(one) == former(other))
        || (preference(one).is_some() && preference(one) == preference(other))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        action::Action,
        config::Settings,
        core::{
            fixtures::{BROKER, NOW, at_the_broker, kept},
            upstream::IncomingBody,
        },
        event::{Event, StoreError},
        model::AppKey,
    };

    fn core() -> (Core, Now) {
        let app = AppKey::new(Bus::Session(1000), "org.example.App");
        let snapshot = kept([at_the_broker(1, app)]);
        (Core::new(Settings::parse(BROKER).unwrap(), [7; 32], snapshot, NOW), NOW)
    }

    fn message(id: &str) -> IncomingMessage {
        IncomingMessage {
            registration: RegistrationId(1),
            id: id.into(),
            body: IncomingBody::Bytes([1].into()),
            expires: None,
            topic: None,
            urgency: None,
        }
    }

    /// The tickets under which the era was written, and the ids of the messages taken on.
    fn drain(core: &mut Core) -> (Vec<StoreTicket>, Vec<String>) {
        let (mut eras, mut messages) = (Vec::new(), Vec::new());
        while let Some(action) = core.poll_action() {
            match action {
                Action::Store(StoreOp::PutUpstream { key, .. }, ticket) if *key == *NAMING => eras.extend(ticket),
                Action::Store(StoreOp::PutMessage(message), _) => messages.push(message.id.to_string()),
                _ => {}
            }
        }
        (eras, messages)
    }

    #[test]
    fn a_message_waits_until_what_its_id_rests_on_is_durable() {
        for result in [Ok(()), Err(StoreError::Full)] {
            let (mut core, now) = core();
            drain(&mut core);
            core.remember(0, NAMING, "1;".into());
            for id in ["one", "two"] {
                assert_eq!(core.hold_nameless(0, message(id)), None);
            }
            let (tickets, messages) = drain(&mut core);
            assert_eq!((tickets.len(), messages), (1, Vec::new()));
            core.handle(Event::Stored(tickets[0], result), now);
            assert_eq!(drain(&mut core).1, ["one", "two"], "in order, on a full disk too");
            assert_eq!(core.hold_nameless(0, message("three")), Some(message("three")));
        }
    }
}
