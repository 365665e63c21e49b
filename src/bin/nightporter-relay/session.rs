//! One device's connection as a state machine: frames, stored messages and time go in, outputs come out. No socket,
//! no clock.

use std::{
    collections::{HashSet, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    args::{Limits, Times},
    autopush::{self, ChannelId, ClientFrame, Message},
    store::{Batch, ClientEvent, Kick},
    token::Uaid,
};

/// Messages a device may hold without acknowledging them. What is stored is bounded already; messages with TTL 0 and
/// replaced topics are not.
const OUTSTANDING_MAX: usize = 8192;
/// A longer text frame ends the connection; a hello of Firefox with 1000 channels fits.
pub(crate) const FRAME_MAX: usize = 64 * 1024;

/// WebSocket close codes (RFC 6455 §7.4.1), as autopush uses them.
pub(crate) mod code {
    pub(crate) const NORMAL: u16 = 1000;
    pub(crate) const AWAY: u16 = 1001;
    pub(crate) const PROTOCOL: u16 = 1002;
    pub(crate) const UNSUPPORTED: u16 = 1003;
    pub(crate) const TOO_BIG: u16 = 1009;
    pub(crate) const ERROR: u16 = 1011;
}

/// The state machine.
#[derive(Debug)]
pub(crate) struct Session {
    times: Times,
    message_limit: u32,
    phase: Phase,
    /// When `handle_timeout` is due, in every phase.
    deadline: Instant,
    awaits_pong: bool,
    client_ping: Option<Instant>,
    /// Handed out and not acknowledged.
    outstanding: HashSet<Arc<str>>,
    /// The last stored message handed out.
    after: i64,
    /// Stored messages read since the device was last up to date.
    read: u32,
    catching_up: CatchingUp,
    outputs: VecDeque<Output>,
}

/// What the socket is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Output {
    /// Send a text frame.
    Send(String),
    /// Send a ping frame.
    Ping,
    /// Ask the store to let the device in; ends with `ClientEvent::Welcome`.
    Hello(Option<Uaid>),
    /// Ask the store for the messages behind a place; ends with `ClientEvent::Batch`.
    Fetch(Uaid, i64),
    /// Make a channel and answer.
    Register(Uaid, ChannelId, Option<String>),
    /// Remove a channel and answer.
    Unregister(Uaid, ChannelId),
    /// Delete messages.
    Acknowledge(Uaid, Vec<Arc<str>>),
    /// Drop the device.
    Forget(Uaid),
    /// Send a close frame and end.
    Close(u16, &'static str),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Phase {
    AwaitsHello,
    AwaitsWelcome,
    Open(Uaid),
    Closed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum CatchingUp {
    /// Messages come live.
    Done,
    /// The next batch is asked for when everything handed out is acknowledged.
    Behind,
    /// A batch has been asked for.
    Fetching,
}

impl Session {
    /// A connection that has just been opened.
    pub(crate) fn new(times: Times, limits: Limits, now: Instant) -> Self {
        Self {
            times,
            message_limit: limits.message_limit,
            phase: Phase::AwaitsHello,
            deadline: now + times.handshake_timeout,
            awaits_pong: false,
            client_ping: None,
            outstanding: HashSet::new(),
            after: 0,
            read: 0,
            catching_up: CatchingUp::Fetching,
            outputs: VecDeque::new(),
        }
    }

    /// A text frame came.
    pub(crate) fn handle_text(&mut self, text: &str, now: Instant) {
        if text.len() > FRAME_MAX {
            return self.close(code::TOO_BIG, "message too big");
        }
        match (ClientFrame::parse(text), self.phase.clone()) {
            (Err(_), _) => self.close(code::ERROR, "invalid message"),
            (_, Phase::Closed) => {}
            (Ok(ClientFrame::Hello(uaid)), Phase::AwaitsHello) => {
                self.phase = Phase::AwaitsWelcome;
                self.outputs.push_back(Output::Hello(uaid));
            }
            (Ok(ClientFrame::Hello(_)), _) => self.close(code::ERROR, "hello came twice"),
            (Ok(_), Phase::AwaitsHello | Phase::AwaitsWelcome) => self.close(code::ERROR, "hello must come first"),
            (Ok(frame), Phase::Open(uaid)) => self.handle_frame(frame, uaid, now),
        }
    }

    /// A binary frame came.
    pub(crate) fn handle_binary(&mut self) {
        self.close(code::UNSUPPORTED, "text frames only");
    }

    /// A pong frame came. One that was not asked for does not move the rhythm.
    pub(crate) fn handle_pong(&mut self, now: Instant) {
        if self.awaits_pong {
            self.awaits_pong = false;
            self.deadline = now + self.times.ping_interval;
        }
    }

    /// The store has something for the device; `unix` in seconds.
    pub(crate) fn handle_event(&mut self, event: ClientEvent, now: Instant, unix: i64) {
        match event {
            ClientEvent::Welcome(uaid, batch) => {
                if self.phase != Phase::AwaitsWelcome {
                    return;
                }
                self.outputs.push_back(Output::Send(autopush::hello(&uaid)));
                self.phase = Phase::Open(uaid);
                self.deadline = now + self.times.ping_interval;
                self.handle_batch(batch, unix);
            }
            ClientEvent::Batch(batch) => self.handle_batch(batch, unix),
            ClientEvent::Live(message) => self.hand_out(&message, unix),
        }
    }

    /// The store has stopped sending live messages because the device reads too slowly.
    pub(crate) fn handle_lagging(&mut self) {
        if self.catching_up == CatchingUp::Done {
            self.catching_up = CatchingUp::Behind;
        }
        self.fetch_if_due();
    }

    /// Somebody else wants the connection to end.
    pub(crate) fn handle_kick(&mut self, kick: Kick) {
        match kick {
            Kick::Ghost => self.close(code::ERROR, "connected again elsewhere"),
            Kick::Storage => self.close(code::ERROR, "storage failed, try again"),
        }
    }

    /// The server ends.
    pub(crate) fn handle_shutdown(&mut self) {
        self.close(code::AWAY, "server is going away");
    }

    /// The peer broke the WebSocket protocol.
    pub(crate) fn handle_violation(&mut self) {
        self.close(code::PROTOCOL, "protocol error");
    }

    /// `deadline` has passed.
    pub(crate) fn handle_timeout(&mut self, now: Instant) {
        if now < self.deadline {
            return;
        }
        match self.phase {
            Phase::AwaitsHello => self.close(code::ERROR, "hello came too late"),
            // The database is slow; that is not the device's fault.
            Phase::AwaitsWelcome => self.deadline = now + Duration::from_secs(1),
            Phase::Open(_) if self.awaits_pong => self.close(code::ERROR, "pong came too late"),
            Phase::Open(_) => {
                self.awaits_pong = true;
                self.deadline = now + self.times.pong_timeout;
                self.outputs.push_back(Output::Ping);
            }
            Phase::Closed => {}
        }
    }

    /// When `handle_timeout` wants to be called.
    pub(crate) fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Whether frames are to be read: not while hello is being answered, because later frames need the uaid.
    pub(crate) fn reads(&self) -> bool {
        self.phase != Phase::AwaitsWelcome
    }

    /// The device, once it is known.
    pub(crate) fn uaid(&self) -> Option<&Uaid> {
        match &self.phase {
            Phase::Open(uaid) => Some(uaid),
            _ => None,
        }
    }

    /// The next thing to do.
    pub(crate) fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    fn handle_frame(&mut self, frame: ClientFrame, uaid: Uaid, now: Instant) {
        match frame {
            ClientFrame::Hello(_) | ClientFrame::Nack | ClientFrame::BroadcastSubscribe => {}
            ClientFrame::Register { channel, key } => self.outputs.push_back(Output::Register(uaid, channel, key)),
            ClientFrame::Unregister(channel) => self.outputs.push_back(Output::Unregister(uaid, channel)),
            ClientFrame::Ack(versions) => {
                for version in &versions {
                    self.outstanding.remove(version);
                }
                self.outputs.push_back(Output::Acknowledge(uaid, versions));
                self.fetch_if_due();
            }
            ClientFrame::Ping => {
                let too_soon = self.client_ping.is_some_and(|last| now < last + self.times.min_client_ping);
                if too_soon {
                    return self.close(code::ERROR, "pings are too frequent");
                }
                self.client_ping = Some(now);
                self.outputs.push_back(Output::Send(autopush::pong()));
            }
        }
    }

    fn handle_batch(&mut self, batch: Batch, unix: i64) {
        let Phase::Open(uaid) = &self.phase else { return };
        self.read = self.read.saturating_add(u32::try_from(batch.messages.len()).unwrap_or(u32::MAX));
        if self.read > self.message_limit {
            self.outputs.push_back(Output::Forget(uaid.clone()));
            return self.close(code::NORMAL, "SM");
        }
        for message in &batch.messages {
            self.hand_out(message, unix);
        }
        if batch.is_last {
            self.catching_up = CatchingUp::Done;
            self.read = 0;
        } else {
            self.catching_up = CatchingUp::Behind;
            self.fetch_if_due();
        }
    }

    fn hand_out(&mut self, message: &Message, unix: i64) {
        if self.phase == Phase::Closed {
            return;
        }
        if self.outstanding.len() >= OUTSTANDING_MAX {
            return self.close(code::ERROR, "too many messages are not acknowledged");
        }
        self.after = message.seq.map_or(self.after, |seq| self.after.max(seq));
        self.outstanding.insert(message.version.clone());
        self.outputs.push_back(Output::Send(autopush::notification(message, unix)));
    }

    fn fetch_if_due(&mut self) {
        if self.catching_up == CatchingUp::Behind
            && self.outstanding.is_empty()
            && let Phase::Open(uaid) = &self.phase
        {
            self.catching_up = CatchingUp::Fetching;
            self.outputs.push_back(Output::Fetch(uaid.clone(), self.after));
        }
    }

    fn close(&mut self, code: u16, reason: &'static str) {
        if self.phase != Phase::Closed {
            self.phase = Phase::Closed;
            self.outputs.push_back(Output::Close(code, reason));
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use nightporter::model::Urgency;

    use super::*;
    use crate::args::Settings;

    fn settings(extra: &[&str]) -> Settings {
        Settings::parse_from(["relay"].iter().chain(extra))
    }

    fn uaid() -> Uaid {
        Uaid::parse("0123456789abcdef0123456789abcdef").unwrap()
    }

    fn message(seq: i64) -> Arc<Message> {
        Arc::new(Message {
            seq: (seq > 0).then_some(seq),
            version: format!("v{seq}").into(),
            channel: "c".into(),
            data: Arc::from([]),
            encoding: None,
            encryption: None,
            crypto_key: None,
            expires: 100,
            topic: None,
            urgency: Urgency::Normal,
        })
    }

    fn batch(seqs: std::ops::RangeInclusive<i64>, is_last: bool) -> Batch {
        Batch { messages: seqs.map(message).collect(), is_last }
    }

    fn nothing() -> Batch {
        Batch { messages: Vec::new(), is_last: true }
    }

    fn open(extra: &[&str], first: Batch) -> (Session, Instant) {
        let (settings, now) = (settings(extra), Instant::now());
        let mut session = Session::new(settings.times, settings.limits, now);
        session.handle_text(r#"{"messageType":"hello"}"#, now);
        assert_eq!(drain(&mut session), [Output::Hello(None)]);
        session.handle_event(ClientEvent::Welcome(uaid(), first), now, 0);
        (session, now)
    }

    fn drain(session: &mut Session) -> Vec<Output> {
        std::iter::from_fn(|| session.poll_output()).collect()
    }

    fn ack(session: &mut Session, seqs: std::ops::RangeInclusive<i64>, now: Instant) -> Vec<Output> {
        let updates: Vec<String> = seqs.map(|seq| format!(r#"{{"version":"v{seq}"}}"#)).collect();
        session.handle_text(&format!(r#"{{"messageType":"ack","updates":[{}]}}"#, updates.join(",")), now);
        drain(session)
    }

    fn closes_with(session: &mut Session, code: u16) {
        let last = drain(session).pop();
        assert!(matches!(last, Some(Output::Close(got, _)) if got == code), "{last:?}");
    }

    #[test]
    fn hello_must_come_first_once_and_in_time() {
        let (settings, now) = (settings(&[]), Instant::now());
        let fresh = || Session::new(settings.times, settings.limits, now);
        let mut session = fresh();
        session.handle_text("{}", now);
        closes_with(&mut session, 1011);
        let mut session = fresh();
        session.handle_timeout(now + Duration::from_millis(4999));
        assert_eq!(drain(&mut session), []);
        session.handle_timeout(now + Duration::from_secs(5));
        closes_with(&mut session, 1011);
        let (mut session, now) = open(&[], nothing());
        drain(&mut session);
        session.handle_text(r#"{"messageType":"hello"}"#, now);
        closes_with(&mut session, 1011);
        session.handle_text("rubbish", now);
        assert_eq!(drain(&mut session), [], "it closes once");
    }

    #[test]
    fn the_next_batch_waits_for_every_acknowledgement() {
        let (mut session, now) = open(&[], batch(1..=10, false));
        assert_eq!(drain(&mut session).len(), 11);
        session.handle_event(ClientEvent::Live(message(0)), now, 0);
        assert_eq!(drain(&mut session).len(), 1, "TTL 0 is never held back");
        assert_eq!(ack(&mut session, 1..=10, now).len(), 1, "the live one is outstanding");
        assert_eq!(ack(&mut session, 0..=0, now)[1..], [Output::Fetch(uaid(), 10)]);
        assert_eq!(ack(&mut session, 1..=10, now).len(), 1, "one question at a time");
        session.handle_event(ClientEvent::Batch(batch(11..=12, true)), now, 0);
        assert_eq!(drain(&mut session).len(), 2);
        assert_eq!(ack(&mut session, 11..=12, now).len(), 1, "nothing more to ask for");
    }

    #[test]
    fn a_lagging_device_goes_back_to_the_store() {
        let (mut session, now) = open(&[], nothing());
        session.handle_event(ClientEvent::Live(message(7)), now, 0);
        session.handle_lagging();
        assert_eq!(drain(&mut session).len(), 2);
        assert_eq!(ack(&mut session, 7..=7, now)[1..], [Output::Fetch(uaid(), 7)]);
    }

    #[test]
    fn reading_more_than_the_limit_resets_the_device() {
        let (mut session, now) = open(&["--message-limit", "10"], batch(1..=10, false));
        ack(&mut session, 1..=10, now);
        session.handle_event(ClientEvent::Batch(batch(11..=11, true)), now, 0);
        assert_eq!(drain(&mut session), [Output::Forget(uaid()), Output::Close(1000, "SM")]);

        let (mut session, now) = open(&["--message-limit", "10"], batch(1..=9, true));
        ack(&mut session, 1..=9, now);
        session.handle_lagging();
        session.handle_event(ClientEvent::Batch(batch(10..=18, true)), now, 0);
        assert!(!drain(&mut session).contains(&Output::Close(1000, "SM")), "catching up resets the count");
    }

    #[test]
    fn client_pings_have_a_pace() {
        let (mut session, now) = open(&[], nothing());
        drain(&mut session);
        session.handle_text("{}", now);
        assert_eq!(drain(&mut session), [Output::Send("{}".into())], "the first is free");
        session.handle_text(r#"{"messageType":"ping"}"#, now + Duration::from_secs(45));
        assert_eq!(drain(&mut session).len(), 1);
        session.handle_text("{}", now + Duration::from_secs(89));
        closes_with(&mut session, 1011);
    }

    #[test]
    fn the_server_pings_from_connect_or_the_last_pong() {
        let (mut session, now) = open(&[], nothing());
        drain(&mut session);
        let after = |seconds| now + Duration::from_secs(seconds);
        session.handle_pong(after(299));
        assert_eq!(session.deadline(), after(300), "unsolicited");
        session.handle_timeout(after(300));
        assert_eq!(drain(&mut session), [Output::Ping]);
        session.handle_pong(after(303));
        assert_eq!(session.deadline(), after(603));
        session.handle_timeout(after(603));
        session.handle_timeout(after(606));
        assert_eq!(drain(&mut session), [Output::Ping]);
        session.handle_timeout(after(607));
        closes_with(&mut session, 1011);
    }

    #[test]
    fn a_device_that_never_acknowledges_is_cut_off() {
        let (mut session, now) = open(&[], nothing());
        for seq in 1..=8192 {
            session.handle_event(ClientEvent::Live(message(seq)), now, 0);
        }
        assert_eq!(drain(&mut session).len(), 8193);
        session.handle_event(ClientEvent::Live(message(8193)), now, 0);
        closes_with(&mut session, 1011);
    }

    #[test]
    fn frames_that_are_too_long_or_binary_close() {
        let (mut session, now) = open(&[], nothing());
        session.handle_text(&" ".repeat(FRAME_MAX + 1), now);
        closes_with(&mut session, 1009);
        let (mut session, _) = open(&[], nothing());
        session.handle_binary();
        closes_with(&mut session, 1003);
    }
}
