//! Several upstreams, from the core's two doors: who may use which, what wins, what a restart brings back. What faults do to
//! moves is the simulation's subject (tests/sim).

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking, in its helpers too")]

use std::{collections::BTreeMap, sync::Arc};

use nightporter::{
    action::{Action, ErrorKind, PanelState, Reply, StoreOp},
    config::{Credentials, SecretSource, Settings, UpstreamKind, UpstreamSettings},
    core::Core,
    event::{
        Authorization, BusEvent, CallId, Caller, Event, LinkEvent, LinkId, PanelRequest, Privilege, Query, Request,
    },
    model::{
        AppKey, Bus, ConnectorVersion, FailureReason, FormerRoute, Owner, Preference, Registration, RegistrationId,
        Secret, Snapshot,
    },
    time::{Instant, Now, UnixTime},
    view,
};
use serde_json::{Value, json};

const CHAT: &str = "org.example.Chat";
const MAIL: &str = "org.example.Mail";
const HOME: &str = r#"
    [[upstream]]
    name = "first"
    kind = "autopush"
    url = "wss://first.example/"
    [[upstream]]
    name = "second"
    kind = "autopush"
    url = "wss://second.example/"
"#;

#[test]
fn the_first_is_the_default_and_an_app_may_ask_for_another() {
    let mut world = World::new(HOME);
    assert_eq!(world.register(CHAT, None), Reply::Registered);
    assert_eq!(world.register(MAIL, Some("second")), Reply::Registered);
    assert_eq!(world.upstream_of(CHAT), "first");
    assert_eq!(world.upstream_of(MAIL), "second");
    // It changes its mind at its next start, and back.
    assert_eq!(world.register(CHAT, Some("second")), Reply::Registered);
    assert_eq!(world.upstream_of(CHAT), "second");
    assert_eq!(world.register(CHAT, Some("first")), Reply::Registered);
    assert_eq!(world.upstream_of(CHAT), "first");
    let Reply::RegisterFailed(FailureReason::ActionRequired, text) = world.register("org.example.Lost", Some("third"))
    else {
        panic!()
    };
    assert!(text.contains("third"), "{text}");
}

#[test]
fn the_configuration_comes_before_the_app_and_the_user_before_both() {
    let mut world = World::new(&format!("{HOME}\n[[app]]\nname = \"{CHAT}\"\nupstream = \"second\""));
    assert_eq!(world.register(CHAT, Some("first")), Reply::Registered);
    assert_eq!(world.upstream_of(CHAT), "second");
    assert_eq!(world.move_to(Some(CHAT), "first"), Reply::Done);
    assert_eq!(world.upstream_of(CHAT), "first");
    world.restart();
    assert_eq!(world.upstream_of(CHAT), "first");
    // All of them, those with a choice of their own included.
    assert_eq!(world.register(MAIL, None), Reply::Registered);
    assert_eq!(world.move_to(None, "second"), Reply::Done);
    assert_eq!((world.upstream_of(CHAT), world.upstream_of(MAIL)), ("second".into(), "second".into()));
    assert_eq!(world.register("org.example.New", None), Reply::Registered);
    assert_eq!(world.upstream_of("org.example.New"), "second");
}

#[test]
fn a_moved_app_is_told_and_the_old_way_is_kept_for_a_day() {
    let mut world = World::new(HOME);
    world.register(CHAT, None);
    let before = world.registration(CHAT);
    world.move_to(Some(CHAT), "second");
    let after = world.registration(CHAT);
    assert_eq!(before.id, after.id, "what was accepted for it stays its own");
    assert_ne!(before.endpoint, after.endpoint);
    assert!(after.told, "{:?}", world.told);
    assert_eq!(world.told.last().map(|(_, endpoint)| endpoint), Some(&after.endpoint));
    // A sender that does not know yet.
    assert_eq!(world.push("first", &before.channel, "v1"), ["v1"]);
    assert_eq!(world.push("second", &after.channel, "v2"), ["v2"]);
    world.restart();
    assert_eq!(world.push("first", &before.channel, "v3"), ["v3"]);
    world.pass(23 * 3600);
    assert_eq!(world.push("first", &before.channel, "v4"), ["v4"]);
    world.pass(2 * 3600);
    assert!(world.push("first", &before.channel, "v5").is_empty());
    assert_eq!(world.unregistered("first"), [before.channel]);
    assert_eq!(world.push("second", &after.channel, "v6"), ["v6"]);
}

#[test]
fn a_message_that_waits_is_not_lost_by_moving() {
    let mut world = World::new(HOME);
    world.register(CHAT, None);
    let before = world.registration(CHAT);
    world.quits(CHAT);
    assert!(world.push("first", &before.channel, "v1").is_empty(), "nobody is there to take it");
    world.move_to(Some(CHAT), "second");
    world.restart();
    world.taken.clear();
    world.appears(CHAT);
    assert_eq!(world.taken, ["v1"]);
    assert_eq!(world.acked, [("first".to_owned(), "v1".to_owned())]);
}

#[test]
fn what_cannot_move_stays_and_says_why() {
    let mut world = World::new(&format!("{HOME}require-vapid = true"));
    world.register(CHAT, None);
    assert_eq!(world.move_to(Some(CHAT), "second"), Reply::Done);
    assert_eq!(world.upstream_of(CHAT), "first");
    assert!(world.why(CHAT).contains("VAPID"), "{}", world.why(CHAT));
    // Nor is it tried over and over.
    let before = world.why(CHAT);
    world.pass(4 * 3600);
    assert_eq!(world.why(CHAT).matches("VAPID").count(), before.matches("VAPID").count());
}

#[test]
fn a_server_that_is_away_is_moved_to_when_it_is_back() {
    let mut world = World::new(HOME);
    world.register(CHAT, None);
    world.down = Some("second");
    world.move_to(Some(CHAT), "second");
    world.pass(60);
    assert_eq!(world.upstream_of(CHAT), "first");
    world.down = None;
    world.pass(1200);
    assert_eq!(world.upstream_of(CHAT), "second");
}

#[test]
fn only_whom_the_apps_belong_to_may_move_them() {
    let mut world = World::new(HOME);
    world.register(CHAT, None);
    let request = || Request::Move { service: Some(CHAT.into()), upstream: "second".into() };
    let stranger = Caller { uid: 1001, ..user() };
    assert!(matches!(world.ask(stranger, request()), Reply::Error(..)));
    let app = Caller { owner: owner(CHAT), ..user() };
    assert!(matches!(world.ask(app, request()), Reply::Error(..)));
    assert!(matches!(world.move_to(Some("org.example.Nobody"), "second"), Reply::Error(..)));
    let Reply::Error(_, text) = world.move_to(Some(CHAT), "third") else { panic!() };
    assert!(text.contains("first, second"), "{text}");
    assert_eq!(world.upstream_of(CHAT), "first");
}

#[test]
fn a_server_from_the_panel_is_its_users_alone_and_outlives_a_restart() {
    let mut world = World::new(HOME);
    world.register(CHAT, None);
    let own = |password: &str| {
        let mut settings = UpstreamSettings::new("kde", UpstreamKind::Autopush, "wss://own.example/");
        settings.credentials =
            Credentials::Password { username: "u".into(), password: SecretSource::Given(Secret::new(password)) };
        Request::Panel(PanelRequest::SetProvider(Box::new(settings)))
    };
    assert_eq!(world.ask(user(), own("old")), Reply::Done);
    let name = world.upstream_of(CHAT);
    assert_eq!(name, "panel-1000-1");
    let stranger = Caller { bus: Bus::Session(1001), uid: 1001, ..user() };
    let register = |upstream: &str| Request::Register {
        service: CHAT.into(),
        token: "t".into(),
        description: "".into(),
        vapid: None,
        version: ConnectorVersion::V2,
        upstream: Some(upstream.into()),
        notify: None,
    };
    assert!(matches!(world.ask(stranger.clone(), register(&name)), Reply::RegisterFailed(..)));
    assert_eq!(world.status(&stranger).upstreams.len(), 2);
    assert_eq!(world.status(&user()).upstreams.len(), 3);
    // A new password is no new server.
    assert_eq!(world.ask(user(), own("new")), Reply::Done);
    assert_eq!(world.upstream_of(CHAT), name);
    world.restart();
    assert_eq!(world.upstream_of(CHAT), name);
    let state = world.panel();
    assert_eq!((state.status, state.clients.len()), (2, 1));
    let Credentials::Password { password: SecretSource::Given(secret), .. } = &state.upstream.credentials else {
        panic!()
    };
    assert_eq!(secret.reveal(), "new");
    assert!(!format!("{state:?}").contains("new\""), "a secret must not be seen in a log");
    assert_eq!(world.configured.last().map(|upstream| &*upstream.name), Some(&*name), "the shell is told where it is");
    // Back to the administrator's: one's own is forgotten when nothing leads over it any more.
    let first = UpstreamSettings::new("kde", UpstreamKind::Autopush, "wss://first.example/");
    assert_eq!(world.ask(user(), Request::Panel(PanelRequest::SetProvider(Box::new(first)))), Reply::Done);
    assert_eq!(world.upstream_of(CHAT), "first");
    world.pass(26 * 3600);
    world.restart();
    assert_eq!(world.status(&user()).upstreams.len(), 2);
    assert!(world.values.keys().all(|(upstream, _)| !upstream.starts_with("panel")), "{:?}", world.values);
}

#[test]
fn the_panel_unregisters_an_app_and_the_app_is_told() {
    let mut world = World::new(HOME);
    world.register(CHAT, None);
    let request = Request::Panel(PanelRequest::ForceUnregister("token".into()));
    assert_eq!(world.ask(user(), request), Reply::Done);
    assert!(world.registrations.is_empty());
    assert_eq!(world.told.last(), Some(&(CHAT.to_owned(), "".into())));
    assert!(world.panel().clients.is_empty());
}

/// Two users, each with an app of the same name and token, and a third one's program that asks for everything.
#[test]
fn users_are_invisible_to_one_another() {
    let mut world = World::new(HOME);
    let buses = [1000, 1001].map(Bus::Session);
    world.handle(Event::Bus(BusEvent::Up(buses[1])));
    world.running.insert(CHAT.to_owned(), true);
    let app_on = |bus| Caller { bus, owner: owner(CHAT), owns_service: true, ..user() };
    for bus in buses {
        let uid = if bus == buses[0] { 1000 } else { 1001 };
        let register = Request::Register {
            service: CHAT.into(),
            token: "token".into(),
            description: "".into(),
            vapid: None,
            version: ConnectorVersion::V2,
            upstream: None,
            notify: None,
        };
        assert_eq!(world.ask(Caller { uid, ..app_on(bus) }, register), Reply::Registered);
    }
    world.register(MAIL, None);
    let of = |world: &World, bus: Bus| {
        let found = world.registrations.values().find(|r| r.app == AppKey::new(bus, CHAT));
        found.expect("it is registered").clone()
    };
    let [first, second] = buses.map(|bus| of(&world, bus));
    assert_ne!((first.id, &first.endpoint), (second.id, &second.endpoint));
    // A message for the first.
    assert_eq!(world.push("first", &first.channel, "v1"), ["v1"]);

    let other = Caller { bus: buses[1], uid: 1001, ..user() };
    let third = Caller { bus: Bus::Session(1002), uid: 1002, ..user() };
    let system = Caller { bus: Bus::System, uid: 1002, ..user() };
    let root = Caller { bus: Bus::System, uid: 0, ..user() };
    let seen = [user(), other.clone(), third.clone(), system.clone(), root].map(|caller| {
        let status = world.status(&caller);
        let upstream = status.upstreams[0].registrations;
        (status.apps, status.registrations, upstream, status.messages.received, status.buses.len())
    });
    assert_eq!(seen, [(2, 2, 2, 1, 1), (1, 1, 1, 0, 1), (0, 0, 0, 0, 0), (0, 0, 0, 0, 0), (3, 3, 3, 1, 2)]);
    for query in [
        Query::Show(MAIL.into()),
        Query::Why(MAIL.into()),
        Query::Endpoints(MAIL.into()),
        Query::Show(CHAT.into()),
        Query::Endpoints(CHAT.into()),
    ] {
        let reply = world.ask(third.clone(), Request::Query(query.clone()));
        assert!(matches!(reply, Reply::Error(..)), "{query:?}: {reply:?}");
    }
    let Reply::Json(apps) = world.ask(other.clone(), Request::Query(Query::Apps)) else { panic!() };
    assert!(apps.contains(CHAT) && !apps.contains(MAIL), "{apps}");
    let (call, request) = (CallId(9000), Request::Query(Query::Report));
    world.handle(Event::Bus(BusEvent::Call { call, caller: other.clone(), request }));
    world.pass(25);
    let Some(Reply::Json(report)) = world.replies.remove(&call.0) else { panic!() };
    assert!(!report.contains(MAIL), "{report}");
    let Reply::Json(endpoints) = world.ask(other.clone(), Request::Query(Query::Endpoints(CHAT.into()))) else {
        panic!()
    };
    assert!(endpoints.contains(&*second.endpoint) && !endpoints.contains(&*first.endpoint), "{endpoints}");

    // Nor can one be acted on by another: by its own calls, by hand, or by the panel.
    let unregister = || Request::Unregister { token: "token".into(), version: ConnectorVersion::V2 };
    for caller in [app_on(Bus::Session(1002)), app_on(Bus::System), third.clone(), system] {
        world.ask(caller, unregister());
    }
    let freeze = Request::Command { service: MAIL.into(), command: nightporter::event::Command::Freeze };
    assert!(matches!(world.ask(other.clone(), freeze), Reply::Error(..)));
    let claim = nightporter::event::Claim::Background;
    assert!(matches!(
        world.ask(other.clone(), Request::Declare { service: Some(MAIL.into()), claim }),
        Reply::Error(..)
    ));
    assert_eq!(world.ask(other.clone(), Request::Move { service: None, upstream: "second".into() }), Reply::Done);
    assert_eq!((&*of(&world, buses[0]).upstream, &*of(&world, buses[1]).upstream), ("first", "second"));
    world.ask(third, Request::Panel(PanelRequest::ForceUnregister("token".into())));
    assert_eq!(world.registrations.len(), 3);
    world.ask(other, Request::Panel(PanelRequest::ForceUnregister("token".into())));
    assert_eq!(of(&world, buses[0]), first);
    assert_eq!(world.registrations.len(), 2);
}

#[test]
fn a_user_whose_account_is_gone_is_forgotten_by_root_alone() {
    let mut world = World::new(HOME);
    world.register(CHAT, None);
    world.move_to(None, "second");
    let channel = world.registration(CHAT).channel;
    let root = Caller { bus: Bus::System, uid: 0, ..user() };
    let forget = || Request::ForgetUser(1000);
    assert!(matches!(world.ask(root.clone(), forget()), Reply::Error(ErrorKind::Refused, _)), "logged in");
    world.handle(Event::Bus(BusEvent::Down(Bus::Session(1000), "logged out".into())));
    for caller in [
        user(),
        Caller { uid: 0, ..user() },
        Caller { bus: Bus::System, ..user() },
        Caller { sandboxed: true, ..root.clone() },
    ] {
        let reply = world.ask(caller, forget());
        assert!(matches!(reply, Reply::Error(ErrorKind::NotAuthorized, _)), "{reply:?}");
    }
    world.push("second", &channel, "v1");
    assert_eq!((world.registrations.len(), world.messages.len(), world.preferences.len()), (1, 1, 1));
    assert_eq!(world.ask(root.clone(), Request::ForgetUser(1001)), Reply::Done);
    assert_eq!(world.registrations.len(), 1);
    // Whom polkit lets: with this privilege, and on the system bus.
    let allowed = |privilege| Caller { bus: Bus::System, authorization: Authorization::Granted(privilege), ..user() };
    for caller in [
        allowed(Privilege::Read),
        allowed(Privilege::ManageApps),
        Caller { bus: Bus::Session(1000), ..allowed(Privilege::ManageUsers) },
        Caller { uid: 0, sandboxed: true, ..allowed(Privilege::ManageUsers) },
    ] {
        let reply = world.ask(caller, forget());
        assert!(matches!(reply, Reply::Error(ErrorKind::NotAuthorized, _)), "{reply:?}");
    }
    assert_eq!(world.registrations.len(), 1);
    assert_eq!(world.ask(allowed(Privilege::ManageUsers), forget()), Reply::Done);
    assert_eq!(world.ask(root, forget()), Reply::Done);
    assert_eq!((world.registrations.len(), world.preferences.len(), world.former.len()), (0, 0, 0));
    assert_eq!(world.unregistered("second"), [channel]);
}

/// Everything that can be asked of the manager, by those who may not: nobody is let through without polkit, and each is
/// told what for it is to be asked.
#[test]
fn polkit_is_asked_about_what_is_not_ones_own() {
    let mut world = World::new(HOME);
    world.register(CHAT, None);
    world.register(MAIL, None);
    let app = |name: &str| Arc::<str>::from(name);
    let requests = || {
        use nightporter::event::Command;
        let command = |command| Request::Command { service: app(CHAT), command };
        let mut all: Vec<(Request, Privilege)> = [
            Query::Apps,
            Query::Report,
            Query::Show(app(CHAT)),
            Query::Why(app(CHAT)),
            Query::Show(app("org.example.Nobody")),
        ]
        .map(|query| (Request::Query(query), Privilege::Read))
        .into();
        all.push((Request::Query(Query::Endpoints(app(CHAT))), Privilege::ManageApps));
        let commands = [Command::Freeze, Command::Thaw, Command::Kill].map(command);
        all.extend(commands.map(|request| (request, Privilege::ManageApps)));
        for service in [None, Some(app(CHAT)), Some(app("org.example.Nobody"))] {
            all.push((Request::Move { service, upstream: "second".into() }, Privilege::ManageApps));
        }
        all
    };
    let other_app = Caller { app_id: Some(MAIL.into()), ..user() };
    for (caller, expected) in [
        (Caller { bus: Bus::System, ..user() }, true),
        (Caller { uid: 1001, ..user() }, true),
        (Caller { sandboxed: true, ..user() }, false),
        (other_app, false),
    ] {
        for (request, needed) in requests() {
            world.calls += 1;
            let call = CallId(world.calls);
            let asked = BusEvent::Call { call, caller: caller.clone(), request: request.clone() };
            world.handle(Event::Bus(asked));
            world.pass(12);
            let reply = world.replies.remove(&call.0).unwrap();
            let authorize = Reply::Authorize { privilege: needed, interactive: expected };
            assert_eq!(reply, authorize, "{request:?} by {caller:?}");
            // A no is a no.
            let authorization = Authorization::Refused("because".into());
            let reply = world.ask(Caller { authorization, ..caller.clone() }, request.clone());
            let Reply::Error(ErrorKind::NotAuthorized, text) = reply else { panic!("{reply:?}") };
            assert!(text.ends_with(": because"), "{text}");
        }
    }
    // A yes is one for what was asked, and only within what there is on the caller's bus.
    let yes = |privilege| Caller { authorization: Authorization::Granted(privilege), ..user() };
    let sandboxed = |privilege| Caller { sandboxed: true, ..yes(privilege) };
    assert!(matches!(world.ask(sandboxed(Privilege::Read), Request::Query(Query::Show(app(CHAT)))), Reply::Json(_)));
    let endpoints = || Request::Query(Query::Endpoints(app(CHAT)));
    assert!(matches!(world.ask(sandboxed(Privilege::ManageApps), endpoints()), Reply::Json(_)));
    assert!(matches!(world.ask(sandboxed(Privilege::Read), endpoints()), Reply::Error(ErrorKind::NotAuthorized, _)));
    let on_system = Caller { bus: Bus::System, ..yes(Privilege::Read) };
    let Reply::Json(apps) = world.ask(on_system, Request::Query(Query::Apps)) else { panic!("no document") };
    assert!(apps.contains(CHAT) && apps.contains(MAIL), "{apps}");
    let on_system = Caller { bus: Bus::System, ..yes(Privilege::ManageApps) };
    let reply = world.ask(on_system, endpoints());
    assert!(matches!(reply, Reply::Error(ErrorKind::NoSuchApp, _)), "an app of another bus: {reply:?}");
}

/// A user who logs out: what comes meanwhile waits, and nobody is started for it.
#[test]
fn messages_wait_for_a_user_to_log_in_again() {
    let mut world = World::new(HOME);
    world.register(CHAT, None);
    let bus = Bus::Session(1000);
    world.handle(Event::Bus(BusEvent::Down(bus, "logged out".into())));
    // A watch that was on its way is answered like this.
    world.handle(Event::Bus(BusEvent::OwnerChanged(AppKey::new(bus, CHAT), None)));
    let channel = world.registration(CHAT).channel;
    assert!(world.push("first", &channel, "v1").is_empty());
    world.pass(24 * 3600);
    assert_eq!(world.messages.len(), 1, "it is kept, and no try is counted");
    assert!(!world.why(CHAT).contains("start"), "{}", world.why(CHAT));
    world.taken.clear();
    world.handle(Event::Bus(BusEvent::Up(bus)));
    world.pass(2);
    assert_eq!(world.taken, ["v1"]);
    assert!(world.messages.is_empty());
}

/// The servers ping at least as often, in seconds.
const PING: u64 = 300;

/// The user's own program.
fn user() -> Caller {
    Caller {
        bus: Bus::Session(1000),
        owner: Owner(":1.900".into()),
        uid: 1000,
        pid: 9,
        app_id: None,
        sandboxed: false,
        networked: true,
        owns_service: false,
        authorization: Authorization::NotAsked,
    }
}

fn owner(app: &str) -> Owner {
    Owner(format!(":1.{}", app.len()).into())
}

/// A core, a store that keeps everything, apps that take everything, and autopush servers that make every registration.
struct World {
    settings: Settings,
    core: Core,
    secs: u64,
    calls: u64,
    replies: BTreeMap<u64, Reply>,
    registrations: BTreeMap<RegistrationId, Registration>,
    former: BTreeMap<(RegistrationId, Arc<str>), FormerRoute>,
    preferences: BTreeMap<(Bus, Option<Arc<str>>), Preference>,
    values: BTreeMap<(Arc<str>, Arc<str>), Arc<str>>,
    messages: BTreeMap<u64, nightporter::model::Message>,
    links: BTreeMap<LinkId, String>,
    down: Option<&'static str>,
    running: BTreeMap<String, bool>,
    /// Endpoints apps were told; empty: that there is none any more.
    told: Vec<(String, Arc<str>)>,
    taken: Vec<String>,
    acked: Vec<(String, String)>,
    gone: Vec<(String, Arc<str>)>,
    configured: Vec<UpstreamSettings>,
}

impl World {
    fn new(config: &str) -> Self {
        let settings = Settings::parse(config).unwrap();
        let mut world = Self {
            core: Core::new(settings.clone(), [1; 32], Snapshot::default(), at(1)),
            settings,
            secs: 1,
            calls: 0,
            replies: BTreeMap::new(),
            registrations: BTreeMap::new(),
            former: BTreeMap::new(),
            preferences: BTreeMap::new(),
            values: BTreeMap::new(),
            messages: BTreeMap::new(),
            links: BTreeMap::new(),
            down: None,
            running: BTreeMap::new(),
            told: Vec::new(),
            taken: Vec::new(),
            acked: Vec::new(),
            gone: Vec::new(),
            configured: Vec::new(),
        };
        world.handle(Event::Bus(BusEvent::Up(Bus::Session(1000))));
        world
    }

    fn restart(&mut self) {
        let next_registration = self.registrations.keys().map(|id| id.0 + 1).max().unwrap_or(1);
        let snapshot = Snapshot {
            registrations: self.registrations.values().cloned().collect(),
            former: self.former.values().cloned().collect(),
            preferences: self.preferences.values().cloned().collect(),
            upstreams: self.values.iter().map(|((u, k), v)| (u.clone(), k.clone(), v.clone())).collect(),
            messages: self
                .messages
                .values()
                .map(|m| nightporter::model::StoredMessage {
                    seq: m.seq,
                    registration: m.registration,
                    id: m.id.clone(),
                    size: m.body.len() as u32,
                    received: m.received,
                    expires: m.expires,
                    topic: None,
                    urgency: m.urgency,
                })
                .collect(),
            next_registration,
            next_message: 1000,
            ..Snapshot::default()
        };
        self.links.clear();
        self.core = Core::new(self.settings.clone(), [2; 32], snapshot, at(self.secs));
        self.perform();
        self.handle(Event::Bus(BusEvent::Up(Bus::Session(1000))));
        self.pass(5);
    }

    fn handle(&mut self, event: Event) {
        self.core.handle(event, at(self.secs));
        self.perform();
    }

    fn pass(&mut self, secs: u64) {
        let end = self.secs + secs;
        while self.secs < end {
            // Whole seconds suffice, and long pauses are stepped through quickly.
            let due = self.core.poll_timeout().map_or(end, |at| at.as_nanos().div_ceil(1_000_000_000));
            self.secs = due.min(self.secs + PING).clamp(self.secs + 1, end);
            self.handle(Event::Tick);
            let links: Vec<LinkId> = self.links.keys().copied().collect();
            for link in links {
                self.handle(Event::Link(link, LinkEvent::Ping));
            }
        }
    }

    fn ask(&mut self, caller: Caller, request: Request) -> Reply {
        self.calls += 1;
        let call = self.calls;
        let asked = BusEvent::Call { call: CallId(call), caller: caller.clone(), request: request.clone() };
        self.handle(Event::Bus(asked));
        self.pass(12);
        match self.replies.remove(&call).expect("every call is answered") {
            // There is no polkit here.
            Reply::Authorize { .. } => {
                let authorization = Authorization::Refused("nobody to ask".into());
                self.ask(Caller { authorization, ..caller }, request)
            }
            reply => reply,
        }
    }

    fn register(&mut self, app: &str, upstream: Option<&str>) -> Reply {
        self.running.insert(app.to_owned(), true);
        let caller = Caller { owner: owner(app), owns_service: true, ..user() };
        self.ask(
            caller,
            Request::Register {
                service: app.into(),
                token: "token".into(),
                description: "".into(),
                vapid: None,
                version: ConnectorVersion::V2,
                upstream: upstream.map(Into::into),
                notify: None,
            },
        )
    }

    fn move_to(&mut self, service: Option<&str>, upstream: &str) -> Reply {
        self.ask(user(), Request::Move { service: service.map(Into::into), upstream: upstream.into() })
    }

    fn status(&mut self, caller: &Caller) -> view::Status {
        let Reply::Json(text) = self.ask(caller.clone(), Request::Query(Query::Status)) else { panic!() };
        serde_json::from_str(&text).unwrap()
    }

    fn why(&mut self, app: &str) -> String {
        let Reply::Json(text) = self.ask(user(), Request::Query(Query::Why(app.into()))) else { panic!() };
        text
    }

    fn panel(&mut self) -> PanelState {
        let Reply::Panel(state) = self.ask(user(), Request::Panel(PanelRequest::State)) else { panic!() };
        *state
    }

    fn registration(&self, app: &str) -> Registration {
        self.registrations.values().find(|r| &*r.app.service == app).unwrap().clone()
    }

    fn upstream_of(&self, app: &str) -> String {
        self.registration(app).upstream.to_string()
    }

    fn unregistered(&self, upstream: &str) -> Vec<Arc<str>> {
        self.gone.iter().filter(|(name, _)| name == upstream).map(|(_, channel)| channel.clone()).collect()
    }

    /// What apps take when the server sends this.
    fn push(&mut self, upstream: &str, channel: &str, version: &str) -> Vec<String> {
        self.taken.clear();
        if let Some(link) = self.links.iter().find(|(_, name)| *name == upstream).map(|(link, _)| *link) {
            let frame = json!({"messageType": "notification", "channelID": channel, "version": version, "data": "eA"});
            self.handle(Event::Link(link, LinkEvent::Text(frame.to_string())));
            self.pass(2);
        }
        std::mem::take(&mut self.taken)
    }

    fn quits(&mut self, app: &str) {
        self.running.insert(app.to_owned(), false);
        self.handle(Event::Bus(BusEvent::OwnerChanged(AppKey::new(Bus::Session(1000), app), None)));
    }

    fn appears(&mut self, app: &str) {
        self.running.insert(app.to_owned(), true);
        let key = AppKey::new(Bus::Session(1000), app);
        self.handle(Event::Bus(BusEvent::OwnerChanged(key, Some(owner(app)))));
        self.pass(2);
    }

    fn perform(&mut self) {
        while let Some(action) = self.core.poll_action() {
            match action {
                Action::Connect { link, upstream, .. } => {
                    if self.down == Some(&*upstream) {
                        let error = nightporter::event::LinkError::Connect("refused".into());
                        self.core.handle(Event::Link(link, LinkEvent::Failed(error)), at(self.secs));
                    } else {
                        self.links.insert(link, upstream.to_string());
                        self.core.handle(Event::Link(link, LinkEvent::Open), at(self.secs));
                    }
                }
                Action::Close(link) => {
                    self.links.remove(&link);
                }
                Action::Send(link, text) => self.serve(link, &text),
                Action::Ping(link) => self.core.handle(Event::Link(link, LinkEvent::Pong), at(self.secs)),
                Action::Store(op, ticket) => {
                    self.store(op);
                    if let Some(ticket) = ticket {
                        self.core.handle(Event::Stored(ticket, Ok(())), at(self.secs));
                    }
                }
                Action::Reply(call, reply) => {
                    self.replies.insert(call.0, reply);
                }
                Action::Watch(app) => {
                    let running = self.running.get(&*app.service).copied().unwrap_or(false);
                    let owner = running.then(|| owner(&app.service));
                    self.core.handle(Event::Bus(BusEvent::OwnerChanged(app, owner)), at(self.secs));
                }
                Action::Start(app) => {
                    let outcome = nightporter::event::StartOutcome::NotActivatable;
                    self.core.handle(Event::Bus(BusEvent::Started(app, outcome)), at(self.secs));
                }
                Action::Call { ticket, app, call, .. } => {
                    match call {
                        nightporter::action::ConnectorCall::NewEndpoint { endpoint, .. } => {
                            self.told.push((app.service.to_string(), endpoint));
                        }
                        nightporter::action::ConnectorCall::Message { id, .. } => self.taken.push(id.to_string()),
                        nightporter::action::ConnectorCall::Unregistered { .. } => {
                            self.told.push((app.service.to_string(), "".into()));
                        }
                    }
                    let done = BusEvent::CallDone(ticket, nightporter::event::CallOutcome::Accepted);
                    self.core.handle(Event::Bus(done), at(self.secs));
                }
                Action::Configure(settings) => self.configured.push(*settings),
                _ => {}
            }
        }
    }

    /// An autopush server's side.
    fn serve(&mut self, link: LinkId, text: &str) {
        let frame: Value = serde_json::from_str(text).unwrap();
        let upstream = self.links[&link].clone();
        let channel = frame["channelID"].as_str().unwrap_or_default();
        let answer = match frame["messageType"].as_str().unwrap_or_default() {
            "hello" => json!({"messageType": "hello", "status": 200, "uaid": format!("{:032x}", upstream.len())}),
            "register" => json!({
                "messageType": "register", "status": 200, "channelID": channel,
                "pushEndpoint": format!("https://{upstream}.example/{channel}"),
            }),
            "unregister" => {
                self.gone.push((upstream, channel.into()));
                return;
            }
            "ack" => {
                let updates = frame["updates"].as_array().unwrap();
                let versions = updates.iter().map(|update| update["version"].as_str().unwrap().to_owned());
                self.acked.extend(versions.map(|version| (upstream.clone(), version)));
                return;
            }
            _ => return,
        };
        self.core.handle(Event::Link(link, LinkEvent::Text(answer.to_string())), at(self.secs));
    }

    fn store(&mut self, op: StoreOp) {
        match op {
            StoreOp::PutRegistration(registration) => {
                self.registrations.insert(registration.id, registration);
            }
            StoreOp::DeleteRegistration(id) => {
                self.registrations.remove(&id);
                self.former.retain(|(registration, _), _| *registration != id);
            }
            StoreOp::PutFormer(route) => {
                self.former.insert((route.registration, route.upstream.clone()), route);
            }
            StoreOp::DeleteFormer(id, upstream) => {
                self.former.remove(&(id, upstream));
            }
            StoreOp::PutPreference(preference) => {
                self.preferences.insert((preference.bus, preference.service.clone()), preference);
            }
            StoreOp::DeletePreference(bus, service) => {
                self.preferences.remove(&(bus, service));
            }
            StoreOp::PutUpstream { upstream, key, value } if value.is_empty() => {
                self.values.remove(&(upstream, key));
            }
            StoreOp::PutUpstream { upstream, key, value } => {
                self.values.insert((upstream, key), value);
            }
            StoreOp::PutMessage(message) => {
                self.messages.insert(message.seq.0, message);
            }
            StoreOp::EndMessage(seq, _) => {
                self.messages.remove(&seq.0);
            }
            StoreOp::LoadBody(seq) => {
                let body = self.messages.get(&seq.0).map(|message| message.body.clone());
                self.core.handle(Event::Body(seq, body), at(self.secs));
            }
            StoreOp::PutApp(_) | StoreOp::DeleteApp(_) | StoreOp::PutState(..) | StoreOp::LoadState(_) => {}
            StoreOp::PutHistory(_) | StoreOp::LoadHistory(_) => {}
            StoreOp::PutTransfer(_) | StoreOp::NoteTransfer(_) | StoreOp::DeleteTransfer(_) => {}
        }
    }
}

fn at(secs: u64) -> Now {
    Now {
        boot: Instant::from_nanos(secs * 1_000_000_000),
        wall: UnixTime::from_millis(1_795_000_000_000 + secs * 1000),
    }
}
