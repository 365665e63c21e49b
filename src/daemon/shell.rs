//! The loop and the one `match` over actions. Nothing here blocks but the poll.

use std::{
    collections::VecDeque,
    fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    time::Duration,
};

use mio::{Events, Interest, Poll, Token};

use super::{DaemonError, Options, sightings::Sightings, watchdog::Watchdog};
use crate::{
    action::Action,
    config::{Proxy, Settings, UpstreamSettings},
    core::Core,
    event::{BusEvent, Event, FetchError, HttpError, LinkEvent, LinkId},
    model::{Bus, Profile, Snapshot, Stall, TargetId},
    sys::{
        bus::{BusAddress, BusThread, Handed},
        clock, fetch, helper, http,
        inbox::{self, Inbox, Incoming},
        jobs::Jobs,
        link::Links,
        memory,
        network::Monitor,
        pressure::{self, Triggers},
        process::{self, Targets, UnitOf},
        signals::Signals,
        signs::Signs,
        store::{Holdback, Store},
        surroundings::Surroundings,
        timer::{Alarm, OneResume, ResumeWatch},
        transfers::Transfers,
        users,
        windows::{self, Whose},
    },
    time::{Instant, earliest},
    transfer::{TransferEvent, TransferOrder},
};

const INBOX: Token = Token(0);
const SIGNALS: Token = Token(1);
const ALARM: Token = Token(2);
const RESUME: Token = Token(3);
const NETWORK: Token = Token(4);
const WAKING: Token = Token(5);
/// The first of three.
const PRESSURE: usize = 16;
/// Links and targets take tokens from here on, half of the space each.
const LINKS: usize = 1 << 16;
const TARGETS: usize = 1 << 20;

/// Events taken in per turn: busy input must not starve the timers.
const BUDGET: usize = 256;
/// After this many events it is worth taking a rest (`memory::rest`) once it is quiet: more than the few of a heartbeat,
/// which must not cost a second wake-up each time.
const BURST: usize = 64;
/// How long it must be quiet before.
const QUIET: Duration = Duration::from_secs(2);

/// Everything the loop owns.
pub(super) struct Shell {
    poll: Poll,
    events: Events,
    inbox: Inbox,
    sender: inbox::Sender,
    downloads: Jobs,
    transfers: Transfers,
    /// Of their own: an answer must not wait for an attachment.
    requests: Jobs,
    /// Payload helpers, as many as the core has run at a time.
    helpers: Jobs,
    links: Links,
    targets: Targets,
    bus: BusThread,
    surroundings: Surroundings,
    store: Holdback,
    alarm: Alarm,
    /// Wakes a sleeping machine, where that is wanted and allowed.
    waking: Option<Alarm>,
    resume: ResumeWatch,
    network: Option<Monitor>,
    pressure: Triggers,
    signals: Signals,
    upstreams: Vec<UpstreamSettings>,
    proxy: Proxy,
    pending: VecDeque<Event>,
    link_events: Vec<(LinkId, LinkEvent)>,
    more_on_links: bool,
    /// Events since the last rest, and when the latest came.
    since_rest: usize,
    latest: Instant,
    resumes: OneResume,
    told_ready: bool,
    sightings: Sightings,
    watchdog: Watchdog,
}

impl Shell {
    /// Opens everything; blocking, before the loop.
    pub(super) fn new(
        options: &Options,
        settings: &Settings,
        state_dir: &Path,
        runtime_dir: PathBuf,
    ) -> Result<(Self, Snapshot), DaemonError> {
        let system = |what| move |error| DaemonError::System(what, error);
        let poll = Poll::new().map_err(system("cannot make an epoll instance"))?;
        let registry = || poll.registry().try_clone().map_err(system("cannot use the epoll instance"));
        let mut signals = Signals::new().map_err(system("cannot handle signals"))?;
        let mut alarm = Alarm::new().map_err(system("cannot make a timer"))?;
        let mut waking = settings.network.wake_for_heartbeat.then(Alarm::waking).flatten();
        let mut resume = ResumeWatch::new().map_err(system("cannot watch the clock"))?;
        let mut network = Monitor::new();
        let watch = system("cannot use the epoll instance");
        let mut register = || -> io::Result<()> {
            let registry = poll.registry();
            registry.register(&mut signals, SIGNALS, Interest::READABLE)?;
            registry.register(&mut alarm, ALARM, Interest::READABLE)?;
            if let Some(waking) = &mut waking {
                registry.register(waking, WAKING, Interest::READABLE)?;
            }
            registry.register(&mut resume, RESUME, Interest::READABLE)?;
            match &mut network {
                Some(network) => registry.register(network, NETWORK, Interest::READABLE),
                None => Ok(()),
            }
        };
        register().map_err(watch)?;
        let pressure = match settings.pressure.enabled && may_hold(settings) {
            true => Triggers::new(&settings.pressure, poll.registry(), PRESSURE),
            false => Triggers::default(),
        };
        let (sender, inbox) = inbox::channel(poll.registry(), INBOX).map_err(system("cannot make a channel"))?;
        // First of all: its lock keeps a second daemon from thawing what the first has frozen.
        let (store, snapshot) = Store::open(state_dir, sender.clone())?;
        let transfers = Transfers::open(
            &state_dir.join("transfers"),
            &snapshot.transfers,
            settings.transfers.at_a_time,
            settings.network.proxy.clone(),
            sender.clone(),
        )
        .map_err(system("cannot use the spool of transfers in the state directory"))?;
        make_private_dir(&runtime_dir).map_err(system("cannot make the runtime directory"))?;
        let targets = Targets::new(
            registry()?,
            TARGETS,
            sender.clone(),
            Jobs::default(),
            runtime_dir,
            process::Options::default(),
        )
        .map_err(|error| DaemonError::System("cannot keep the record of frozen apps", io::Error::other(error)))?;
        let links = Links::new(
            registry()?,
            LINKS,
            settings.upstreams.clone(),
            settings.network.proxy.clone(),
            sender.clone(),
            Jobs::default(),
        );
        // The system's daemon serves the users who are logged in.
        let (mut usher, roster) = (!options.user).then(users::roster).unzip();
        let whose = match &mut usher {
            Some(usher) => Some(Whose::Users(usher.roster())),
            None => Whose::own(),
        };
        let signs = Signs::new(sender.clone());
        let (surroundings, watching) =
            Surroundings::watching(None, settings.urgency.low_battery, usher, Some(signs.clone()), sender.clone());
        let following = sender.clone();
        let beside = async move {
            let _windows = whose.map(|whose| zruntime::spawn(windows::serve(whose, following)));
            watching.await;
        };
        let (buses, panel) = (addresses(options)?, settings.kde_panel);
        let bus = BusThread::spawn_watching(buses, roster, panel, Some(signs), sender.clone(), beside)
            .map_err(system("cannot start a thread"))?;
        let shell = Self {
            poll,
            events: Events::with_capacity(64),
            inbox,
            sender,
            downloads: Jobs::new(1),
            transfers,
            requests: Jobs::default(),
            helpers: Jobs::default(),
            links,
            targets,
            bus,
            surroundings,
            store: Holdback::new(store),
            alarm,
            waking,
            resume,
            network,
            pressure,
            signals,
            upstreams: settings.upstreams.clone(),
            proxy: settings.network.proxy.clone(),
            pending: VecDeque::new(),
            link_events: Vec::new(),
            more_on_links: false,
            since_rest: BURST,
            latest: clock::boot(),
            resumes: OneResume::default(),
            told_ready: false,
            sightings: Sightings::default(),
            watchdog: Watchdog::from_env(clock::boot()),
        };
        Ok((shell, snapshot))
    }

    /// Serves until the core says `Exit`.
    pub(super) fn run(&mut self, core: &mut Core) -> Result<(), DaemonError> {
        loop {
            while let Some(action) = core.poll_action() {
                if action == Action::Exit {
                    return Ok(());
                }
                self.perform(action);
            }
            self.collect();
            if self.pending.is_empty() {
                self.wait(core.poll_timeout(), core.poll_wake())?;
                self.collect();
                if self.pending.is_empty() {
                    // Every other event tells the core the time as well.
                    core.handle(Event::Tick, clock::now());
                }
            }
            for _ in 0..BUDGET {
                let Some(event) = self.pending.pop_front() else { break };
                let now = clock::now();
                self.since_rest += 1;
                self.latest = now.boot;
                core.handle(event, now);
            }
            if self.store.poll_timeout().is_some() {
                self.store.handle_timeout(clock::boot());
            }
            self.watchdog.turn(clock::boot());
        }
    }

    /// Ends in order: nothing stays frozen, everything written.
    pub(super) fn end(mut self) {
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
        self.targets.thaw_all();
        self.bus.stop();
        self.store.close();
    }

    fn perform(&mut self, action: Action) {
        match action {
            Action::Connect { link, upstream, path, headers } => self.links.connect(link, &upstream, &path, headers),
            Action::Send(link, text) => self.links.send(link, text),
            Action::SendBytes(link, bytes) => self.links.send_bytes(link, bytes),
            Action::Ping(link) => self.links.ping(link),
            Action::Close(link) => self.links.close(link),
            Action::Fetch { ticket, upstream, url, limit } => {
                let failed = match self.upstreams.iter().find(|settings| settings.name == upstream) {
                    Some(upstream) => {
                        let (jobs, proxy) = (&self.downloads, &self.proxy);
                        fetch::fetch(jobs, &self.sender, ticket, upstream, proxy, url, limit)
                    }
                    None => Some(Event::Fetched(ticket, Err(FetchError::Failed(no_upstream(&upstream))))),
                };
                self.pending.extend(failed);
            }
            Action::Http { ticket, upstream, request } => {
                let failed = match self.upstreams.iter().find(|settings| settings.name == upstream) {
                    Some(upstream) => {
                        http::request(&self.requests, &self.sender, ticket, upstream, &self.proxy, request)
                    }
                    None => Some(Event::Http(ticket, Err(HttpError::Failed(no_upstream(&upstream))))),
                };
                self.pending.extend(failed);
            }
            Action::Transfer(order) => self.transfer(order),
            Action::Configure(settings) => self.configure(*settings),
            Action::Store(op, ticket) => self.store.apply(op, ticket, clock::boot()),
            Action::Freeze(target) => {
                self.look_at_unit(target);
                self.targets.freeze(target);
            }
            Action::Thaw(target) => self.targets.thaw(target),
            Action::PageOut(target) => self.targets.page_out(target),
            Action::Kill { target, grace } => {
                if let Some(UnitOf { app, group }) = self.targets.kill(target, grace) {
                    self.bus.stop_unit(app, target, group);
                }
            }
            Action::Forget(target) => {
                self.targets.forget(target);
                self.sightings.forget(target);
            }
            Action::Inspect(target) => {
                self.look_at_unit(target);
                self.targets.inspect(target);
            }
            Action::Sample(target) => self.targets.sample(target),
            Action::SampleSelf => self.targets.sample_self(),
            Action::ReadPressure => self.pending.push_back(Event::Pressure(pressure::read(None))),
            Action::Reply(..)
            | Action::Watch(_)
            | Action::Unwatch(_)
            | Action::Call { .. }
            | Action::CallClient { .. }
            | Action::Start(_)
            | Action::PanelChanged(_)
            | Action::EndLease(..)
            | Action::LeaseEnding { .. }
            | Action::WatchNotifications(..)
            | Action::Activate { .. }
            | Action::Notify(..) => {
                self.bus.perform(action);
            }
            Action::Help(job) => self.pending.extend(helper::help(&self.helpers, &self.sender, *job)),
            Action::StayAwake(stay_awake) => self.surroundings.stay_awake(stay_awake),
            Action::AllowSleep => self.surroundings.allow_sleep(),
            Action::Exit => {}
        }
    }

    fn transfer(&mut self, order: TransferOrder) {
        match order {
            TransferOrder::Start(attempt) => self.pending.extend(self.transfers.start(*attempt)),
            TransferOrder::Stop(id) => self.transfers.stop(id),
            TransferOrder::Remove(id) => self.transfers.remove(id),
            TransferOrder::Take { call, id, size } => {
                let file = self.transfers.take(id, size).map(|file| (file, id.0)).map_err(|error| error.to_string());
                if let Err(error) = &file {
                    let event = TransferEvent::Spooled(Err(error.as_str().into()));
                    self.pending.push_back(Event::Transfer(id, event));
                }
                self.bus.hand(Handed { call, id, file, collected: false });
            }
            TransferOrder::Collect { call, id, direction } => {
                let file = self.transfers.file(id, direction).map_err(|error| error.to_string());
                self.bus.hand(Handed { call, id, file, collected: true });
            }
        }
    }

    /// It may have moved since it came.
    fn look_at_unit(&self, target: TargetId) {
        if let Some((app, pid)) = self.targets.app(target) {
            self.bus.look_at_unit(app, pid);
        }
    }

    fn configure(&mut self, settings: UpstreamSettings) {
        self.links.configure(settings.clone());
        match self.upstreams.iter_mut().find(|one| one.name == settings.name) {
            Some(place) => *place = settings,
            None => self.upstreams.push(settings),
        }
    }

    /// Takes in what is there without waiting.
    fn collect(&mut self) {
        self.more_on_links = self.links.poll(&mut self.link_events, BUDGET);
        self.pending.extend(self.link_events.drain(..).map(|(link, event)| Event::Link(link, event)));
        let mut outcomes = Vec::new();
        self.targets.drain(&mut outcomes);
        self.pending.extend(outcomes);
        for _ in 0..BUDGET {
            let Some(incoming) = self.inbox.take() else { break };
            match incoming {
                Incoming::Event(Event::Resumed) => self.wake_up(),
                Incoming::Event(event) => {
                    self.tell_ready(&event);
                    if event == Event::FallingAsleep {
                        self.resumes.falling_asleep();
                    }
                    self.pending.push_back(event);
                }
                Incoming::Process { app, owner, process } => {
                    let process = process.and_then(|process| self.targets.adopt(&app, process));
                    self.pending.push_back(Event::Identified { app, owner, process });
                    self.sightings.adopted(&self.targets, &mut self.pending);
                }
                Incoming::Sightings { source, uid, vetoes } => {
                    self.sightings.seen(source, uid, vetoes, &self.targets, &mut self.pending);
                }
                Incoming::Windows { uid, windows } => {
                    self.sightings.windows(uid, windows, &self.targets, &mut self.pending);
                }
                Incoming::Notified { bus, owner, pid } => {
                    // A user's bus daemon is the user's own: its word counts for that user's processes alone.
                    let uid = if let Bus::Session(uid) = bus { uid } else { 0 };
                    let target = pid.and_then(|pid| self.targets.of_pid_told_by(pid, uid));
                    self.pending.push_back(Event::Notified { bus, owner, target });
                }
                Incoming::UnitStopped(target, answer) => self.targets.unit_stopped(target, answer),
                Incoming::Resolved(link, addresses) => self.links.resolved(link, addresses),
            }
        }
    }

    /// Blocks until something happens or `deadline`; a sleeping machine is woken for `wake`.
    fn wait(&mut self, deadline: Option<Instant>, wake: Option<Instant>) -> Result<(), DaemonError> {
        let deadline = earliest(deadline, earliest(self.links.poll_timeout(), self.targets.poll_timeout()));
        let deadline = earliest(deadline, earliest(self.store.poll_timeout(), self.watchdog.poll_timeout()));
        let waking = self.waking.as_mut().map_or(Ok(()), |waking| waking.set(wake));
        if let Err(error) = self.alarm.set(deadline).and(waking) {
            return Err(DaemonError::System("cannot set the timer", error));
        }
        let now = clock::boot();
        let timeout = if self.more_on_links || deadline.is_some_and(|at| at <= now) {
            Some(Duration::ZERO)
        } else if self.since_rest >= BURST {
            Some((self.latest + QUIET).since(now))
        } else {
            None
        };
        match self.poll.poll(&mut self.events, timeout) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(()),
            Err(error) => return Err(DaemonError::System("cannot wait for events", error)),
        }
        if self.since_rest >= BURST && self.events.is_empty() && clock::boot() >= self.latest + QUIET {
            self.since_rest = 0;
            self.pending.shrink_to(16);
            self.link_events.shrink_to(16);
            memory::rest();
        }
        let mut woke_up = false;
        let mut stalled: Option<Stall> = None;
        for event in &self.events {
            match event.token() {
                INBOX => {}
                SIGNALS => {
                    if self.signals.drain() {
                        self.pending.push_back(Event::Shutdown);
                    }
                }
                ALARM => {
                    self.alarm.drain();
                }
                WAKING => {
                    self.waking.as_mut().map(Alarm::drain);
                }
                RESUME => woke_up |= self.resume.drain(),
                NETWORK => {
                    if self.network.as_mut().is_some_and(Monitor::drain) {
                        self.surroundings.look_again();
                        self.pending.push_back(Event::NetworkReturned);
                    }
                }
                token if self.pressure.stall(token).is_some() => stalled = stalled.max(self.pressure.stall(token)),
                token if self.targets.owns(token) => self.targets.ready(token),
                token => self.links.ready(token, event),
            }
        }
        if stalled.is_some() {
            self.pending.push_back(Event::Pressure(pressure::read(stalled)));
        }
        if woke_up {
            self.wake_up();
        }
        let now = clock::boot();
        self.links.handle_timeout(now);
        self.targets.handle_timeout(now);
        Ok(())
    }

    /// The machine slept and is awake again: told once, whoever says it.
    fn wake_up(&mut self) {
        if self.resumes.is_news(clock::boot()) {
            self.surroundings.look_again();
            self.pending.push_back(Event::Resumed);
        }
    }

    /// systemd is told that the daemon is up when the first bus is: from then on apps find it.
    fn tell_ready(&mut self, event: &Event) {
        if let Event::Bus(BusEvent::Up(bus)) = event
            && !std::mem::replace(&mut self.told_ready, true)
        {
            log::info!("serving the {bus} bus");
            let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
        }
    }
}

/// Whether any app may be held still: without one, nothing can be done about pressure.
fn may_hold(settings: &Settings) -> bool {
    let mut own = settings.apps.iter().filter_map(|app| app.rules.as_ref());
    settings.profile != Profile::Observe || own.any(|rules| rules.profile != Profile::Observe)
}

fn no_upstream(name: &str) -> String {
    format!("no upstream is called \"{name}\"")
}

fn make_private_dir(dir: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

fn addresses(options: &Options) -> Result<Vec<BusAddress>, DaemonError> {
    if !options.user {
        return Ok(vec![BusAddress { bus: Bus::System, address: None }]);
    }
    let address = std::env::var("DBUS_SESSION_BUS_ADDRESS").ok().filter(|address| !address.is_empty());
    let address = address.or_else(|| {
        let dir = PathBuf::from(std::env::var_os("XDG_RUNTIME_DIR")?);
        let socket = dir.join("bus");
        socket.exists().then(|| format!("unix:path={}", socket.display()))
    });
    let uid = nix::unistd::geteuid().as_raw();
    match address {
        Some(address) => Ok(vec![BusAddress { bus: Bus::Session(uid), address: Some(address) }]),
        None => Err(DaemonError::NoSessionBus),
    }
}
