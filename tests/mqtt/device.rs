//! A device with nothing but the session: its link is a plain stream, its delivery a list, its store a map.

use std::{
    collections::{BTreeMap, HashSet},
    io::{ErrorKind, Read, Write},
    net::{Ipv4Addr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    thread,
    time::{Duration, Instant as Real, SystemTime},
};

use nightporter::{
    config::{NetworkSettings, UpstreamKind, UpstreamSettings},
    core::upstream::{Beginning, Channel, IncomingBody, IncomingMessage, LinkIds, Output, Session, Standing},
    event::{LinkError, LinkEvent, LinkId, Login},
    model::{FailureReason, RegistrationId, Secret},
    time::{Instant, Now, UnixTime},
    view::LinkState,
};

/// The longest anything may take on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct Device {
    settings: UpstreamSettings,
    pub(crate) port: u16,
    pub(crate) login: Option<(&'static str, &'static str)>,
    session: Session,
    stream: Option<(LinkId, TcpStream)>,
    started: Real,
    /// Time passed over while waiting to connect.
    skipped: Duration,
    /// What is durable.
    pub(crate) remembered: BTreeMap<Arc<str>, Arc<str>>,
    pub(crate) channels: BTreeMap<RegistrationId, (Arc<str>, Arc<str>)>,
    seen: HashSet<Arc<str>>,
    /// Handed to the app.
    pub(crate) got: Vec<IncomingMessage>,
    /// Known already, by its id.
    pub(crate) again: Vec<Arc<str>>,
    pub(crate) failures: Vec<(FailureReason, String)>,
    /// Whether messages become safe at once.
    pub(crate) safe: bool,
    pub(crate) unsafe_messages: Vec<(RegistrationId, Arc<str>)>,
    pub(crate) links: u32,
}

impl Device {
    pub(crate) fn new(port: u16) -> Self {
        Self::with(port, |_| {})
    }

    pub(crate) fn with(port: u16, change: impl Fn(&mut UpstreamSettings)) -> Self {
        let mut settings = UpstreamSettings::new("broker", UpstreamKind::Mqtt, format!("mqtt://127.0.0.1:{port}/"));
        change(&mut settings);
        let (started, remembered) = (Real::now(), BTreeMap::new());
        let session = begin(&settings, &remembered, &BTreeMap::new(), now(started, Duration::ZERO));
        Self {
            settings,
            port,
            login: None,
            session,
            stream: None,
            started,
            skipped: Duration::ZERO,
            remembered,
            channels: BTreeMap::new(),
            seen: HashSet::new(),
            got: Vec::new(),
            again: Vec::new(),
            failures: Vec::new(),
            safe: true,
            unsafe_messages: Vec::new(),
            links: 0,
        }
    }

    pub(crate) fn now(&self) -> Now {
        now(self.started, self.skipped)
    }

    /// Dies and comes back with what is durable.
    pub(crate) fn crash(&mut self) {
        self.stream = None;
        self.unsafe_messages.clear();
        self.session = begin(&self.settings, &self.remembered, &self.channels, self.now());
    }

    /// The link breaks without a word.
    pub(crate) fn cut(&mut self) {
        if let Some((link, stream)) = self.stream.take() {
            drop(stream);
            self.unsafe_messages.clear();
            self.session.handle_link(link, LinkEvent::Failed(LinkError::Io("cut".into())), self.now());
        }
    }

    pub(crate) fn register(&mut self, n: u64) -> String {
        let id = RegistrationId(n);
        self.session.register(id, None, self.now());
        self.until("registered", |device| device.channels.contains_key(&id));
        self.topic(n)
    }

    pub(crate) fn try_register(&mut self, n: u64) {
        self.session.register(RegistrationId(n), None, self.now());
    }

    pub(crate) fn unregister(&mut self, n: u64) {
        self.channels.remove(&RegistrationId(n));
        self.session.unregister(RegistrationId(n), self.now());
    }

    pub(crate) fn set_allowed(&mut self, allowed: bool) {
        self.session.set_allowed(allowed, self.now());
    }

    pub(crate) fn topic(&self, n: u64) -> String {
        self.channels[&RegistrationId(n)].0.to_string()
    }

    pub(crate) fn standing(&self) -> Standing {
        self.session.standing()
    }

    pub(crate) fn is_online(&self) -> bool {
        self.standing().state == LinkState::Online
    }

    pub(crate) fn bodies(&self) -> Vec<String> {
        self.got.iter().map(body).collect()
    }

    /// Calls the oldest of the messages held back safe.
    pub(crate) fn make_one_safe(&mut self) {
        if !self.unsafe_messages.is_empty() {
            let (registration, id) = self.unsafe_messages.remove(0);
            self.session.safe(registration, &id, self.now());
        }
    }

    /// Runs until it is so.
    pub(crate) fn until(&mut self, what: &str, done: impl Fn(&Self) -> bool) {
        let until = Real::now() + PATIENCE;
        while !done(self) {
            assert!(
                Real::now() < until,
                "not {what} in time: {:?}, {} messages, failures {:?}",
                self.standing(),
                self.got.len(),
                self.failures
            );
            self.step();
        }
    }

    /// Runs for a while.
    pub(crate) fn idle(&mut self, time: Duration) {
        let until = Real::now() + time;
        while Real::now() < until {
            self.step();
        }
    }

    pub(crate) fn step(&mut self) {
        while let Some(output) = self.session.poll_output() {
            self.perform(output);
        }
        match &mut self.stream {
            Some((link, stream)) => {
                let (link, mut bytes) = (*link, [0; 1500]);
                let event = match stream.read(&mut bytes) {
                    Ok(0) => Some(LinkEvent::Closed { code: None, reason: String::new() }),
                    Ok(length) => Some(LinkEvent::Bytes(bytes[..length].to_vec())),
                    Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => None,
                    Err(error) => Some(LinkEvent::Failed(LinkError::Io(error.to_string()))),
                };
                if let Some(event) = event {
                    if !matches!(event, LinkEvent::Bytes(_)) {
                        self.stream = None;
                    }
                    self.session.handle_link(link, event, self.now());
                }
            }
            None => {
                // Nobody has to wait for a backoff; a little, for the broker to come up.
                thread::sleep(Duration::from_millis(5));
                if let Some(at) = self.session.poll_timeout() {
                    self.skipped += at.since(self.now().boot);
                }
            }
        }
        let now = self.now();
        if self.session.poll_timeout().is_some_and(|at| at <= now.boot) {
            self.session.handle_timeout(now);
        }
    }

    fn perform(&mut self, output: Output) {
        let now = self.now();
        match output {
            Output::Connect { link, .. } => match TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)) {
                Ok(stream) => {
                    self.links += 1;
                    stream.set_nodelay(true).unwrap();
                    stream.set_read_timeout(Some(Duration::from_millis(5))).unwrap();
                    self.stream = Some((link, stream));
                    let login = Login {
                        username: self.login.map(|(name, _)| name.into()),
                        password: self.login.map(|(_, password)| Secret::new(password)),
                    };
                    self.session.handle_link(link, LinkEvent::Login(login), now);
                    self.session.handle_link(link, LinkEvent::Open, now);
                }
                Err(error) => {
                    let error = LinkError::Connect(error.to_string());
                    self.session.handle_link(link, LinkEvent::Failed(error), now);
                }
            },
            Output::SendBytes(link, bytes) => {
                if let Some((_, stream)) = self.stream.as_mut().filter(|(current, _)| *current == link) {
                    // What cannot be written shows when it is read from.
                    let _ = stream.write_all(&bytes);
                }
            }
            Output::Close(link) => drop(self.stream.take_if(|(current, _)| *current == link)),
            Output::Message(message) => {
                let (registration, id) = (message.registration, Arc::clone(&message.id));
                match self.seen.insert(Arc::clone(&id)) {
                    true => self.got.push(message),
                    false => self.again.push(Arc::clone(&id)),
                }
                match self.safe {
                    true => self.session.safe(registration, &id, now),
                    false => self.unsafe_messages.push((registration, id)),
                }
            }
            Output::Registered { registration, channel, endpoint } => {
                self.channels.insert(registration, (channel, endpoint));
            }
            Output::RegisterFailed { reason, text, .. } => self.failures.push((reason, text)),
            Output::Remember { key, value } | Output::RememberBehind { key, value } => {
                self.remembered.insert(key.into(), value.into());
            }
            Output::StateChanged(_) => {}
            other => panic!("{other:?}"),
        }
    }
}

pub(crate) fn body(message: &IncomingMessage) -> String {
    match &message.body {
        IncomingBody::Bytes(bytes) => String::from_utf8_lossy(bytes).into_owned(),
        other => format!("{other:?}"),
    }
}

fn now(started: Real, skipped: Duration) -> Now {
    let wall = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap() + skipped;
    Now {
        boot: Instant::from_nanos((started.elapsed() + skipped).as_nanos().try_into().unwrap())
            + Duration::from_secs(1000),
        wall: UnixTime::from_millis(wall.as_millis().try_into().unwrap()),
    }
}

fn begin(
    settings: &UpstreamSettings,
    remembered: &BTreeMap<Arc<str>, Arc<str>>,
    channels: &BTreeMap<RegistrationId, (Arc<str>, Arc<str>)>,
    now: Now,
) -> Session {
    let channels = channels.iter().map(|(registration, (channel, endpoint))| Channel {
        registration: *registration,
        channel: Arc::clone(channel),
        vapid: None,
        endpoint: Arc::clone(endpoint),
    });
    let (network, channels) = (NetworkSettings::default(), channels.collect());
    // Another one for each life, as the daemon has.
    static LIVES: AtomicU8 = AtomicU8::new(1);
    let seed = [LIVES.fetch_add(1, Ordering::Relaxed); 32];
    let remembered = remembered.clone();
    Session::new(Beginning { settings, network: &network, remembered, channels, seed, links: LinkIds::new(0) }, now)
}
