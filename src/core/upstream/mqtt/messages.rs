//! Messages: how one comes in, and how it is acknowledged.

use std::{sync::Arc, time::Duration};

use rand_chacha::rand_core::Rng;

use super::{
    Arrival, Session, UNSAFE_LIMIT, identity,
    wire::{self, Leave, Publish},
};
use crate::{
    core::upstream::{IncomingBody, IncomingMessage, Output, quiet::hint},
    model::{RegistrationId, Urgency},
    time::{Instant, Now},
};

impl Session {
    pub(super) fn published(&mut self, publish: Publish, now: Now) {
        if publish.packet.is_some() && !self.has_room(now) {
            return;
        }
        let Some(registration) = self.names.get(publish.topic.as_str()).copied() else {
            self.unknown(&publish.topic, publish.packet, now.boot);
            return;
        };
        let id = match (publish.id, publish.packet) {
            (Some(id), packet) => {
                self.forget_packet(packet);
                id.into()
            }
            (None, packet) if publish.retained => {
                self.forget_packet(packet);
                identity::retained_id(&publish.topic, &publish.payload)
            }
            (None, Some(packet)) => {
                match self.ledger.id(packet, publish.duplicate, &publish.topic, &publish.payload) {
                    Some(id) => id,
                    // Sent again over the same link, while it is being made safe.
                    None => return,
                }
            }
            (None, None) => identity::passing_id(self.rng.next_u64()),
        };
        self.hand_on(
            publish.packet,
            IncomingMessage {
                registration,
                id,
                body: IncomingBody::Bytes(publish.payload),
                expires: publish.expiry.map(|secs| now.wall + Duration::from_secs(secs.into())),
                topic: publish.collapse.map(Arc::from),
                urgency: publish.urgency.as_deref().and_then(Urgency::parse),
            },
        );
    }

    pub(super) fn too_large(&mut self, topic: &str, packet: Option<u16>, size: usize, now: Now) {
        if packet.is_some() && !self.has_room(now) {
            return;
        }
        let Some(registration) = self.names.get(topic).copied() else {
            self.unknown(topic, packet, now.boot);
            return;
        };
        self.forget_packet(packet);
        let id = identity::passing_id(self.rng.next_u64());
        let body = IncomingBody::Undecodable(format!("it came in a packet of {size} bytes"));
        self.hand_on(packet, IncomingMessage { registration, id, body, expires: None, topic: None, urgency: None });
    }

    /// Sends the acknowledgements whose turn it is.
    pub(super) fn acknowledge(&mut self, now: Instant) {
        while let Some(arrival) = self.arrivals.pop_front_if(|arrival| arrival.safe) {
            self.send(&wire::puback(arrival.packet), now);
            self.ledger.acknowledged(arrival.packet);
        }
        if self.ledger.wants_ping() {
            self.send(&wire::PINGREQ, now);
            self.ledger.pinged();
        }
    }

    /// What the ledger wants remembered goes ahead of the messages it is about.
    pub(super) fn remember_era(&mut self) {
        if let Some(value) = self.ledger.take_changed() {
            self.outputs.push_back(Output::Remember { key: "era", value });
        }
    }

    fn hand_on(&mut self, packet: Option<u16>, message: IncomingMessage) {
        self.remember_era();
        if let Some(packet) = packet {
            let (registration, id) = (Some(message.registration), Arc::clone(&message.id));
            self.arrivals.push_back(Arrival { packet, registration, id, safe: false });
        }
        self.outputs.push_back(Output::Message(message));
    }

    /// Whether one more may be on the way; if not, the link is given up.
    ///
    /// Not strictly what the broker was asked for: Debian's mosquitto (2.0.11) sends a whole window more with each
    /// acknowledgement, and would be left for good.
    fn has_room(&mut self, now: Now) -> bool {
        if self.arrivals.len() < UNSAFE_LIMIT {
            return true;
        }
        self.leave(Leave::ReceiveMaximum, now.boot);
        self.last_error = Some("the broker sent more messages than may be on the way".into());
        self.backoff.failed(None, now.boot, &mut self.rng);
        false
    }

    fn forget_packet(&mut self, packet: Option<u16>) {
        if let Some(packet) = packet {
            self.ledger.forget(packet);
        }
    }

    /// A subscription that nobody wants any more.
    fn unknown(&mut self, topic: &str, packet: Option<u16>, now: Instant) {
        let own = topic.strip_prefix(&*self.settings.topic_prefix).unwrap_or(topic);
        let what = format_args!("a message for the unknown topic {}…: dropped", hint(own));
        self.quiet_unknown.warn(what, now);
        if super::is_topic(topic) {
            self.bury(topic.into());
        }
        if let Some(packet) = packet {
            self.ledger.forget(packet);
            self.arrivals.push_back(Arrival {
                packet,
                registration: None::<RegistrationId>,
                id: "".into(),
                safe: true,
            });
            self.acknowledge(now);
        }
    }
}
