//! The link of a session: what comes over it, when it is made and how it ends.

use std::time::Duration;

use super::{
    BUSY, Challenger, KEEP_ALIVE_MARGIN, LEAST_PACKET, Link, Online, PROVEN, Proof, REQUEST_TIMEOUT, SHORT_LIVES,
    Session,
    wire::{self, Broken, ConnAck, Connect, Decoder, Incoming, Leave, Refusal},
};
use crate::{
    config::MqttVersion,
    core::upstream::{Output, PROOF_TIMEOUT},
    event::{LinkError, LinkEvent, LinkId},
    model::FailureReason,
    time::{Instant, Now},
    view::LinkState,
};

impl Session {
    pub(super) const fn link_id(&self) -> Option<LinkId> {
        match &self.link {
            Link::Down => None,
            Link::Opening { id, .. } | Link::Online(Online { id, .. }) => Some(*id),
        }
    }

    /// The stream is there: says who we are.
    pub(super) fn greet(&mut self, now: Instant) {
        let keep_alive = u16::try_from(self.keep_alive().as_secs()).unwrap_or(u16::MAX);
        let Link::Opening { id, version, login, greeted, .. } = &mut self.link else { return };
        if std::mem::replace(greeted, true) {
            return;
        }
        let login = login.take();
        let connect = Connect {
            client: &self.client,
            username: login.as_ref().and_then(|login| login.username.as_deref()),
            password: login.as_ref().and_then(|login| login.password.as_ref()).map(|password| password.reveal()),
            keep_alive,
            session_expiry: u32::try_from(self.settings.session_expiry.as_secs()).unwrap_or(u32::MAX),
            receive_maximum: self.settings.receive_maximum,
        };
        match connect.to_bytes(*version) {
            Some(bytes) => self.outputs.push_back(Output::SendBytes(*id, bytes)),
            None => self.give_up("the user name or the password is too long for MQTT: mend them", now),
        }
    }

    pub(super) fn bytes(&mut self, bytes: &[u8], now: Now) {
        let version = match &mut self.link {
            Link::Down => return,
            Link::Opening { heard, version, greeted: true, .. } => {
                *heard = true;
                *version
            }
            Link::Opening { .. } => {
                self.broke(Broken("a packet came before any was asked for"), now);
                return;
            }
            Link::Online(online) => {
                online.heard = now.boot;
                self.doubt_at = None;
                if let Some(proof) = online.proof.take()
                    && !std::mem::take(&mut online.moved)
                {
                    self.intervals.answered(proof.silence, now.wall);
                }
                online.version
            }
        };
        if matches!(self.link, Link::Online(_)) {
            self.dismiss_challenger();
        }
        let link = self.link_id();
        self.decoder.feed(bytes);
        loop {
            let packet = match self.decoder.next(version) {
                Ok(Some(packet)) => packet,
                Ok(None) => break,
                Err(broken) => {
                    self.broke(broken, now);
                    return;
                }
            };
            if let Err(broken) = self.packet(packet, now) {
                self.broke(broken, now);
                return;
            }
            if self.link_id() != link {
                return;
            }
        }
    }

    fn packet(&mut self, packet: Incoming, now: Now) -> Result<(), Broken> {
        let opening = match &self.link {
            Link::Opening { id, version, .. } => Some((*id, *version)),
            Link::Online(_) => None,
            Link::Down => return Ok(()),
        };
        match (packet, opening) {
            (Incoming::ConnAck(ack), Some((id, version))) => self.answered(ack, id, version, now),
            (_, Some(_)) => return Err(Broken("a packet came ahead of the answer to CONNECT")),
            (Incoming::ConnAck(_), None) => return Err(Broken("CONNECT was answered twice")),
            (Incoming::Publish(publish), None) => self.published(publish, now),
            (Incoming::TooLarge { topic, packet, size }, None) => self.too_large(&topic, packet, size, now),
            (Incoming::SubAck { packet, codes }, None) => self.subscribed(packet, &codes, now.boot)?,
            (Incoming::UnsubAck { packet }, None) => self.unsubscribed(packet),
            (Incoming::PingResp, None) => {
                let old = matches!(&self.link, Link::Online(online) if now.boot.since(online.since) >= PROVEN);
                self.ledger.answered(old);
            }
            (Incoming::Disconnect { code, text, server }, None) => {
                self.dismissed(code, text.as_deref(), server.as_deref(), now.boot);
            }
        }
        Ok(())
    }

    /// CONNACK.
    fn answered(&mut self, ack: ConnAck, id: LinkId, version: MqttVersion, now: Now) {
        if let Some(refusal) = ack.refusal {
            self.refused(refusal, &ack, version, now);
            return;
        }
        if ack.packet_limit.is_some_and(|limit| limit < LEAST_PACKET) {
            self.give_up("the broker takes packets of a few bytes only: mend its maximum packet size", now.boot);
            return;
        }
        if let Some(value) = self.versions.works(version) {
            self.outputs.push_back(Output::Remember { key: "version", value });
        }
        if let Some(client) = ack.assigned_client.filter(|client| !client.is_empty()) {
            self.outputs.push_back(Output::Remember { key: "client", value: client.clone() });
            self.client = client.into();
        }
        if ack.session_expiry.is_some_and(|secs| Duration::from_secs(secs.into()) < self.settings.session_expiry) {
            let secs = ack.session_expiry.unwrap_or_default();
            log::info!("the broker keeps messages for {secs} s only while this device is away");
        }
        if ack.at_most_once {
            log::warn!("the broker has QoS 0 only: messages sent while this device is away are lost");
        }
        if !ack.session_present && self.entries.values().any(|entry| entry.answer_by.is_none() && entry.told) {
            log::warn!("the broker has no session of this device: what was sent while it was away is lost");
        }
        let keep_alive = match ack.keep_alive {
            // Zero: it does not mind (MQTT 5.0 §3.1.2.10).
            Some(0) => Duration::MAX,
            Some(secs) => Duration::from_secs(secs.into()),
            None => self.keep_alive(),
        };
        self.trouble = None;
        self.intervals.connected(now);
        self.ledger.connected(ack.session_present);
        self.subscribe_all(now.boot);
        self.doubt_at = None;
        self.link = Link::Online(Online {
            id,
            version,
            since: now.boot,
            heard: now.boot,
            sent: now.boot,
            keep_alive,
            proof: None,
            moved: false,
            leave_by: None,
        });
    }

    fn refused(&mut self, refusal: Refusal, ack: &ConnAck, version: MqttVersion, now: Now) {
        let word = ack.text.as_deref().map(|text| format!(": {text}")).unwrap_or_default();
        match refusal {
            Refusal::Version => {
                let other = self.versions.refused(version, now.wall);
                if other {
                    self.drop_link("the broker does not speak MQTT 5; 3.1.1 is tried", now.boot);
                    self.backoff.hurry(now.boot);
                } else {
                    self.give_up("the broker does not speak this version of MQTT: mend mqtt-version", now.boot);
                }
            }
            Refusal::Credentials(code) => {
                let text = format!("the broker refuses the credentials ({code}{word}): mend them in the configuration");
                self.give_up(&text, now.boot);
            }
            Refusal::Client(code) => {
                let client = &self.client;
                let text = format!(
                    "the broker refuses the client identifier \"{client}\" ({code}{word}): allow it in the broker's rules"
                );
                self.give_up(&text, now.boot);
            }
            Refusal::Moved(code) => self.moved(code, ack.server.as_deref(), now.boot),
            Refusal::Busy(code) => {
                self.drop_link(&format!("the broker has no room now ({code}{word})"), now.boot);
                self.backoff.failed(Some(BUSY), now.boot, &mut self.rng);
            }
            Refusal::Other(code) => {
                self.drop_link(&format!("the broker refuses the connection ({code}{word})"), now.boot);
                self.backoff.failed(None, now.boot, &mut self.rng);
            }
        }
    }

    /// DISCONNECT from the broker.
    fn dismissed(&mut self, code: u8, text: Option<&str>, server: Option<&str>, now: Instant) {
        let word = text.map(|text| format!(": {text}")).unwrap_or_default();
        match code {
            0x8e => self.give_up(&self.taken_over(), now),
            0x87 => {
                self.give_up(
                    &format!("the broker no longer accepts this user (0x87{word}): mend its access rules"),
                    now,
                );
            }
            0x9c | 0x9d => self.moved(code, server, now),
            0x89 | 0x96 | 0x97 | 0x98 | 0x9f | 0xa0 => {
                self.drop_link(&format!("the broker sent this device away for now (0x{code:02x}{word})"), now);
                self.backoff.failed(Some(BUSY), now, &mut self.rng);
            }
            code => {
                self.drop_link(&format!("the broker ended the connection (0x{code:02x}{word})"), now);
                self.backoff.failed(None, now, &mut self.rng);
            }
        }
    }

    /// Not every broker says that a session was taken over: mosquitto up to 2.0.11 closes the link without a word. Two
    /// devices that both come back at once would do nothing else any more.
    pub(super) fn give_way(&mut self, now: Instant) {
        if self.short_lives >= SHORT_LIVES {
            let text = self.taken_over();
            self.last_error = Some(text.as_str().into());
            self.trouble = Some(text.into());
            self.backoff.refused(now, &mut self.rng);
        }
    }

    fn taken_over(&self) -> String {
        format!(
            "another client seems to use the session of \"{}\": two devices were set up from one copy; stop nightporterd on \
             one of them and delete its state there",
            self.client
        )
    }

    fn moved(&mut self, code: u8, server: Option<&str>, now: Instant) {
        let place = server.unwrap_or("a place it does not name");
        let text = format!("the broker has moved to {place} (0x{code:02x}): mend the upstream's url");
        log::warn!("{text}");
        self.give_up(&text, now);
    }

    /// Only the user can mend it: the link ends, and is tried slowly.
    fn give_up(&mut self, text: &str, now: Instant) {
        self.drop_link(text, now);
        self.trouble = Some(text.into());
        self.fail_waiting(FailureReason::ActionRequired, text);
        self.backoff.refused(now, &mut self.rng);
    }

    /// The broker broke the protocol.
    fn broke(&mut self, broken: Broken, now: Now) {
        self.leave(Leave::Malformed, now.boot);
        self.last_error = Some(format!("the broker broke the protocol: {}", broken.0).into());
        self.backoff.failed(None, now.boot, &mut self.rng);
    }

    /// The link ended without a word: what that says of the network and the version.
    pub(super) fn hung_up(&mut self, now: Now) {
        self.short_lives += u32::from(matches!(self.link, Link::Online(_)));
        match &self.link {
            Link::Opening { greeted: true, heard: false, version, .. } => {
                if self.versions.mute(*version, now.wall) {
                    self.backoff.hurry(now.boot);
                }
            }
            Link::Online(online) if !online.moved => match online.proof {
                Some(proof) => self.intervals.unanswered(proof.silence, now.boot),
                None => self.intervals.closed(now.boot.since(online.heard.max(online.sent)), now.boot),
            },
            Link::Down | Link::Opening { .. } | Link::Online(_) => {}
        }
    }

    pub(super) fn failed(&mut self, error: &LinkError, now: Now) {
        match error {
            LinkError::Http { status: status @ (401 | 403), .. } => {
                let text = format!("the server refuses the credentials ({status}): mend them in the configuration");
                self.ended(&text, now.boot);
                self.trouble = Some(text.as_str().into());
                self.fail_waiting(FailureReason::ActionRequired, &text);
                self.backoff.refused(now.boot, &mut self.rng);
            }
            LinkError::Http { status, retry_after, .. } => {
                self.link_ended(&error.to_string(), now.boot);
                let wish = retry_after.or_else(|| (*status == 429).then_some(BUSY));
                self.backoff.failed(wish, now.boot, &mut self.rng);
            }
            LinkError::Io(_) => {
                self.hung_up(now);
                self.ended(&error.to_string(), now.boot);
            }
            LinkError::Resolve(_)
            | LinkError::Connect(_)
            | LinkError::Tls(_)
            | LinkError::Clock(_)
            | LinkError::Portal(_)
            | LinkError::Proxy(_)
            | LinkError::Timeout
            | LinkError::Protocol(_) => self.ended(&error.to_string(), now.boot),
        }
    }

    /// The link is gone, and the next attempt is due when the backoff says so.
    pub(super) fn ended(&mut self, why: &str, now: Instant) {
        let hurried = matches!(self.link, Link::Opening { greeted: true, .. }) && self.backoff.retry_at().is_some();
        self.link_ended(why, now);
        if !hurried {
            self.backoff.failed(None, now, &mut self.rng);
        }
    }

    /// Closes the link from this side.
    pub(super) fn drop_link(&mut self, why: &str, now: Instant) {
        if let Some(id) = self.link_id() {
            self.outputs.push_back(Output::Close(id));
        }
        self.link_ended(why, now);
    }

    /// Closes the link from this side, with a word to the broker.
    pub(super) fn leave(&mut self, how: Leave, now: Instant) {
        let Some(id) = self.link_id() else { return };
        if let Link::Online(Online { version, .. }) = self.link
            && let Some(bytes) = wire::disconnect(version, how)
        {
            self.send(&bytes, now);
        }
        self.outputs.push_back(Output::Close(id));
        self.proven(now);
        self.link_gone();
    }

    fn link_ended(&mut self, why: &str, now: Instant) {
        self.proven(now);
        self.last_error = Some(why.into());
        self.link_gone();
    }

    fn proven(&mut self, now: Instant) {
        if let Link::Online(online) = &self.link
            && now.since(online.since) >= PROVEN
        {
            self.backoff.succeeded();
            self.short_lives = 0;
        }
    }

    fn link_gone(&mut self) {
        self.link = Link::Down;
        self.doubt_at = None;
        self.dismiss_challenger();
        self.decoder = Decoder::default();
        self.arrivals.clear();
        self.arrivals.shrink_to(16);
        for request in std::mem::take(&mut self.requests).into_values() {
            for (registration, topic) in request.topics {
                if registration.is_none() {
                    self.bury(topic);
                }
            }
        }
        // What exists is subscribed with the next link; until then nothing of it is due.
        let now = Instant::default();
        for entry in self.entries.values_mut().filter(|entry| entry.step == super::Step::Sent) {
            entry.step = super::Step::Queued { not_before: now };
        }
    }

    /// Bytes for the broker, together with those already waiting to go.
    pub(super) fn send(&mut self, bytes: &[u8], now: Instant) {
        let Link::Online(online) = &mut self.link else { return };
        online.sent = now;
        let id = online.id;
        match self.outputs.back_mut() {
            Some(Output::SendBytes(link, waiting)) if *link == id => waiting.extend_from_slice(bytes),
            _ => self.outputs.push_back(Output::SendBytes(id, bytes.to_vec())),
        }
    }

    /// When the next ping is due; none while one is on its way.
    pub(super) fn ping_at(&self, online: &Online) -> Option<Instant> {
        let silence = online.heard.max(online.sent) + self.intervals.interval();
        online.proof.is_none().then(|| silence.min(online.sent + online.patience()))
    }

    pub(super) fn ping(&mut self, now: Instant) {
        let Link::Online(online) = &mut self.link else { return };
        online.proof = Some(Proof { by: now + PROOF_TIMEOUT, silence: now.since(online.heard.max(online.sent)) });
        self.send(&wire::PINGREQ, now);
        self.ledger.pinged();
    }

    /// Asks an open link for a sign of life.
    pub(super) fn prove(&mut self, now: Instant) {
        if matches!(&self.link, Link::Online(online) if online.proof.is_none()) {
            self.ping(now);
        }
    }

    /// The link has not answered yet: another is begun.
    pub(super) fn doubt(&mut self, now: Now) {
        self.doubt_at = None;
        if self.challenger.is_none() && self.backoff.allows(now.boot) {
            let id = self.links.take();
            self.challenger = Some(Challenger { id, asked: now.boot, login: None });
            self.outputs.push_back(Output::Connect { link: id, path: String::new(), headers: Vec::new() });
        }
    }

    pub(super) fn handle_challenger(&mut self, event: LinkEvent, now: Now) {
        match event {
            LinkEvent::Login(login) => {
                if let Some(challenger) = &mut self.challenger {
                    challenger.login = Some(login);
                }
            }
            LinkEvent::Open => {
                let challenger = self.challenger.take();
                self.drop_link("replaced: it did not answer after the network changed", now.boot);
                self.adopt(challenger, now);
                self.greet(now.boot);
            }
            LinkEvent::Closed { .. } | LinkEvent::Failed(_) => self.challenger = None,
            LinkEvent::Text(_) | LinkEvent::Bytes(_) | LinkEvent::Ping | LinkEvent::Pong => {}
        }
    }

    /// The challenger takes the place of a link that is gone, unless there is to be none.
    pub(super) fn adopt(&mut self, challenger: Option<Challenger>, now: Now) {
        let Some(Challenger { id, asked, login }) = challenger else { return };
        if matches!(self.link, Link::Down) && self.trouble.is_none() && self.allowed {
            self.backoff.clear();
            let version = self.versions.pick(now.wall);
            self.link = Link::Opening { id, asked, version, login, greeted: false, heard: false };
        } else {
            self.outputs.push_back(Output::Close(id));
        }
    }

    pub(super) fn dismiss_challenger(&mut self) {
        if let Some(Challenger { id, .. }) = self.challenger.take() {
            self.outputs.push_back(Output::Close(id));
        }
    }

    /// What the broker is told to wait.
    fn keep_alive(&self) -> Duration {
        (self.intervals.longest() + KEEP_ALIVE_MARGIN).min(Duration::from_secs(u16::MAX.into()))
    }

    /// Does whatever has become due; every door ends here.
    pub(super) fn settle(&mut self, now: Now) {
        self.expire(now);
        if self.entries.is_empty() {
            self.retire(now.boot);
        } else {
            if let Link::Online(online) = &mut self.link {
                online.leave_by = None;
            }
            self.connect_if_due(now);
            self.send_requests(now.boot);
        }
        self.remember_era();
        if let Some(value) = self.intervals.take_changed() {
            self.outputs.push_back(Output::Remember { key: "heartbeat", value });
        }
        self.show(
            match &self.link {
                _ if !self.allowed => LinkState::Off,
                Link::Online(_) => LinkState::Online,
                Link::Opening { .. } => LinkState::Connecting,
                Link::Down if self.entries.is_empty() => LinkState::Idle,
                Link::Down => LinkState::Waiting,
            },
            now.boot,
        );
    }

    fn show(&mut self, state: LinkState, now: Instant) {
        if state != self.state {
            self.state = state;
            self.since = now;
            self.outputs.push_back(Output::StateChanged(state));
        }
    }

    /// Nobody needs the link any more: what was subscribed is unsubscribed, and the broker may forget the session.
    fn retire(&mut self, now: Instant) {
        self.backoff.clear();
        self.send_requests(now);
        match &mut self.link {
            Link::Down => {}
            // Topics to unsubscribe are worth the rest of the way.
            Link::Opening { .. } if !self.dead.is_empty() => {}
            Link::Opening { .. } => self.leave(Leave::Keeping, now),
            Link::Online(_) if self.dead.is_empty() && self.requests.is_empty() => self.leave(Leave::Ending, now),
            Link::Online(online) => {
                let by = *online.leave_by.get_or_insert(now + REQUEST_TIMEOUT);
                if by <= now {
                    self.leave(Leave::Keeping, now);
                }
            }
        }
    }

    fn connect_if_due(&mut self, now: Now) {
        if !matches!(self.link, Link::Down) || !self.allowed {
            return;
        }
        match self.backoff.retry_at() {
            Some(at) if at > now.boot => {}
            Some(_) => {
                self.backoff.clear();
                let id = self.links.take();
                let version = self.versions.pick(now.wall);
                self.link = Link::Opening { id, asked: now.boot, version, login: None, greeted: false, heard: false };
                self.outputs.push_back(Output::Connect { link: id, path: String::new(), headers: Vec::new() });
                self.show(LinkState::Connecting, now.boot);
            }
            None => self.backoff.failed(None, now.boot, &mut self.rng),
        }
    }
}
