//! What speaks against holding an app still, seen in real sound servers, a real player and real buses; only what needs a
//! phone is played. Must run as root.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking, in its helpers too")]
#![expect(clippy::print_stdout, reason = "what a failing test wants to be known")]

#[path = "surroundings/support.rs"]
#[expect(dead_code, reason = "made for the tests of the surroundings; shared")]
mod services;
#[path = "signs/support.rs"]
mod support;

use std::{
    collections::HashMap,
    fs,
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use nightporter::model::VetoKind;
use nix::sys::signal::Signal;
use support::{Home, PATIENCE, StandIn, World, reply, wait};
use zbus::{Message, ObjectPath, Variant};

/// dbus-daemon starts for users the system knows; these are on every Debian (base-passwd).
const ALICE: u32 = 5;
const BOB: u32 = 6;
const ROOT: u32 = 0;

const PLAYER_PATH: &str = "/org/mpris/MediaPlayer2";
const PLAYER: &str = "org.mpris.MediaPlayer2.Player";
const PROPERTIES: &str = "org.freedesktop.DBus.Properties";

#[test]
fn who_plays_and_who_records_is_seen_while_it_does() {
    let home = Home::new(ALICE);
    let noise = home.noise();
    let _sound = home.start_sound();
    let mut world = World::new(&[&home]);
    let native = home.run("pw-cat", &["--playback", &noise]);
    world.wait_kinds(native.pid(), &[VetoKind::Playback]);
    assert_eq!(&*world.of(native.pid())[0].reason, "it plays sound (PipeWire node \"pw-cat\")");
    // A client of PulseAudio: not the server that speaks for it.
    let pulse = home.run("paplay", &[&noise]);
    world.wait_kinds(pulse.pid(), &[VetoKind::Playback]);
    let recording = home.path("run/recorded.wav").display().to_string();
    let recorder = home.run("pw-record", &[&recording]);
    world.wait_kinds(recorder.pid(), &[VetoKind::Capture]);
    let voice = home.run("parecord", &[&recording]);
    world.wait_kinds(voice.pid(), &[VetoKind::Capture]);
    // Nobody else: neither the servers nor the session manager.
    assert_eq!(world.pids(), [&native, &pulse, &recorder, &voice].map(support::Running::pid).into());
    for running in [native, pulse, recorder, voice] {
        let pid = running.pid();
        drop(running);
        world.wait_kinds(pid, &[]);
    }
    assert!(world.pids().is_empty());
}

#[test]
fn a_client_of_pulseaudio_that_counts_from_one_is_found() {
    let home = Home::new(ALICE);
    let noise = home.noise();
    let _sound = home.start_sound();
    let mut world = World::new(&[&home]);
    let apart = home.run_apart("paplay", &[&noise]);
    let children = format!("/proc/{0}/task/{0}/children", apart.pid());
    let inner: u32 = wait("the child", || fs::read_to_string(&children).unwrap().trim().parse().ok());
    world.wait_kinds(inner, &[VetoKind::Playback]);
    assert_eq!(world.pids(), [inner].into(), "it says that it is process 1, which it is not here");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(inner.cast_signed()), Signal::SIGKILL).unwrap();
    world.wait_kinds(inner, &[]);
}

#[test]
fn a_sound_server_may_come_later_and_come_again() {
    let home = Home::new(ALICE);
    let noise = home.noise();
    let mut world = World::new(&[&home]);
    for _ in 0..2 {
        assert!(world.pids().is_empty());
        let sound = home.start_sound();
        let player = home.run("pw-cat", &["--playback", &noise]);
        world.wait_kinds(player.pid(), &[VetoKind::Playback]);
        drop(sound);
        world.wait("silence", |world| world.pids().is_empty());
        for stale in ["pipewire-0", "pipewire-0.lock", "pipewire-0-manager", "pulse/native", "pulse/pid"] {
            let _ = fs::remove_file(home.runtime_dir().join(stale));
        }
    }
}

#[test]
fn two_users_are_kept_apart_and_one_who_logs_out_is_not_listened_to() {
    let (alice, bob) = (Home::new(ALICE), Home::new(BOB));
    let noises = [alice.noise(), bob.noise()];
    let _sound = (alice.start_sound(), bob.start_sound());
    let mut world = World::new(&[&alice, &bob]);
    let players = [alice.run("pw-cat", &["--playback", &noises[0]]), bob.run("pw-cat", &["--playback", &noises[1]])];
    for player in &players {
        world.wait_kinds(player.pid(), &[VetoKind::Playback]);
    }
    world.log_in(&[&bob]);
    world.wait_kinds(players[0].pid(), &[]);
    assert!(!world.kinds(players[1].pid()).is_empty());
    world.log_in(&[&alice, &bob]);
    world.wait_kinds(players[0].pid(), &[VetoKind::Playback]);
}

#[test]
fn a_real_player_is_seen_while_it_plays() {
    let mut home = Home::new(ALICE);
    let noise = home.noise();
    let _sound = home.start_sound();
    let mut world = World::new(&[&home]);
    let cmus = home.start_cmus();
    home.cmus(&["-f", &noise]);
    world.wait_kinds(cmus, &[VetoKind::MediaPlayer, VetoKind::Playback]);
    let reasons: Vec<_> = world.of(cmus).iter().map(|veto| veto.reason.to_string()).collect();
    assert!(reasons.contains(&"it says that it plays (MPRIS \"cmus\")".to_owned()), "{reasons:?}");
    home.cmus(&["--pause"]);
    world.wait_kinds(cmus, &[]);
    home.cmus(&["--play"]);
    world.wait_kinds(cmus, &[VetoKind::MediaPlayer, VetoKind::Playback]);
    // Who comes when it plays already asks.
    drop(world);
    let mut world = World::new(&[&home]);
    world.wait_kinds(cmus, &[VetoKind::MediaPlayer, VetoKind::Playback]);
    // One that goes without a word.
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(cmus.cast_signed()), Signal::SIGKILL).unwrap();
    world.wait_kinds(cmus, &[]);
}

#[test]
fn a_player_that_is_held_still_holds_nobody_up() {
    // Root's, as the stand-in is.
    let mut home = Home::new(ROOT);
    let noise = home.noise();
    let _sound = home.start_sound();
    let cmus = home.start_cmus();
    home.cmus(&["-f", &noise]);
    let signal = |signal| nix::sys::signal::kill(nix::unistd::Pid::from_raw(cmus.cast_signed()), signal).unwrap();
    signal(Signal::SIGSTOP);
    let mut world = World::new(&[&home]);
    let keyboard = StandIn::named(&home.address(), &["org.fcitx.Fcitx5"]);
    world.wait_kinds(std::process::id(), &[VetoKind::InputMethod]);
    assert!(!world.kinds(cmus).contains(&VetoKind::MediaPlayer));
    drop(keyboard);
    world.wait_kinds(std::process::id(), &[]);
    signal(Signal::SIGCONT);
    world.wait("its answer", |world| world.kinds(cmus).contains(&VetoKind::MediaPlayer));
}

#[test]
fn a_player_is_heard_when_it_says_something_else() {
    let home = Home::new(ROOT);
    let mut world = World::new(&[&home]);
    let playing = Arc::new(AtomicBool::new(false));
    let status = Arc::clone(&playing);
    let player = StandIn::start(&home.address(), &["org.mpris.MediaPlayer2.Test"], move |call| {
        let status = if status.load(Ordering::Relaxed) { "Playing" } else { "Paused" };
        reply(call, &Variant::from(status))
    });
    let own = std::process::id();
    let changed = |interface: &str, status: &'static str| {
        let changed: HashMap<&str, Variant<'_>> = [("PlaybackStatus", status.into())].into();
        player.signal(PLAYER_PATH, PROPERTIES, "PropertiesChanged", &(interface, changed, Vec::<&str>::new()));
    };
    let sign = StandIn::named(&home.address(), &["org.maliit.server"]);
    world.wait_kinds(own, &[VetoKind::InputMethod]);
    changed(PLAYER, "Playing");
    world.wait_kinds(own, &[VetoKind::InputMethod, VetoKind::MediaPlayer]);
    changed("org.mpris.MediaPlayer2.TrackList", "Stopped");
    changed(PLAYER, "Stopped");
    world.wait_kinds(own, &[VetoKind::InputMethod]);
    // Only that it has changed: asked for.
    playing.store(true, Ordering::Relaxed);
    let nothing = HashMap::<&str, Variant<'_>>::new();
    player.signal(PLAYER_PATH, PROPERTIES, "PropertiesChanged", &(PLAYER, nothing, vec!["PlaybackStatus"]));
    world.wait_kinds(own, &[VetoKind::InputMethod, VetoKind::MediaPlayer]);
    // Two names of one process.
    let twin = StandIn::start(&home.address(), &["org.mpris.MediaPlayer2.Twin"], |call| {
        reply(call, &Variant::from("Playing"))
    });
    world.wait("both", |world| world.of(own).len() == 3);
    drop(player);
    world.wait("one of them", |world| world.of(own).len() == 2);
    drop((twin, sign));
    world.wait_kinds(own, &[]);
}

#[test]
fn names_that_others_call_and_tray_items_are_seen() {
    let home = Home::new(ROOT);
    let own = std::process::id();
    // There before us.
    let early = StandIn::named(&home.address(), &["org.gnome.Orca", "org.example.Nothing"]);
    let mut world = World::new(&[&home]);
    world.wait_kinds(own, &[VetoKind::Accessibility]);
    assert_eq!(&*world.of(own)[0].reason, "it is a screen reader (org.gnome.Orca)");
    let late = StandIn::named(&home.address(), &["org.freedesktop.Notifications", "org.freedesktop.ScreenSaver"]);
    world.wait_kinds(own, &[VetoKind::Accessibility, VetoKind::Service, VetoKind::LockScreen]);
    drop((early, late));
    world.wait_kinds(own, &[]);

    // The tray's keeper is no app here, so that only what it keeps is of this process.
    let items = Arc::new(Mutex::new(Vec::<String>::new()));
    let kept = Arc::clone(&items);
    let watcher = StandIn::start(&home.address(), &["org.kde.StatusNotifierWatcher"], move |call| {
        let kept = kept.lock().unwrap();
        reply(call, &Variant::from(kept.iter().map(String::as_str).collect::<Vec<_>>()))
    });
    world.wait_kinds(own, &[VetoKind::Service]);
    let app = StandIn::named(&home.address(), &["org.kde.StatusNotifierItem-7-1"]);
    let changes = |member: &str, item: &str| {
        watcher.signal("/StatusNotifierWatcher", "org.kde.StatusNotifierWatcher", member, &item);
    };
    let item = "org.kde.StatusNotifierItem-7-1/StatusNotifierItem";
    items.lock().unwrap().push(item.to_owned());
    items.lock().unwrap().extend([":99.99/StatusNotifierItem".to_owned(), String::new(), "/".to_owned()]);
    changes("StatusNotifierItemRegistered", item);
    world.wait_kinds(own, &[VetoKind::Service, VetoKind::Tray]);
    items.lock().unwrap().clear();
    changes("StatusNotifierItemUnregistered", item);
    world.wait_kinds(own, &[VetoKind::Service]);
    items.lock().unwrap().push(item.to_owned());
    changes("StatusNotifierItemRegistered", item);
    world.wait_kinds(own, &[VetoKind::Service, VetoKind::Tray]);
    drop(watcher);
    world.wait_kinds(own, &[]);
    drop(app);
}

#[test]
fn what_gnome_is_told_to_hold_off_is_seen_by_the_apps_name() {
    let home = Home::new(ROOT);
    let own = std::process::id();
    let app = StandIn::named(&home.address(), &["org.gnome.Music"]);
    let path = "/org/gnome/SessionManager/Inhibitor1";
    let object = ObjectPath::try_from(path).unwrap();
    let listed = object.clone();
    let manager = StandIn::start(&home.address(), &["org.gnome.SessionManager"], move |call| {
        match call.header().member().unwrap().as_str() {
            "GetInhibitors" => reply(call, &vec![listed.clone()]),
            "GetAppId" => reply(call, &"org.gnome.Music.desktop"),
            // Suspend and idle.
            "GetFlags" => reply(call, &12_u32),
            other => panic!("nobody calls {other}"),
        }
    });
    let mut world = World::new(&[&home]);
    let all = [VetoKind::Service, VetoKind::SleepInhibitor, VetoKind::IdleInhibitor];
    world.wait_kinds(own, &all);
    let signal =
        |member: &str| manager.signal("/org/gnome/SessionManager", "org.gnome.SessionManager", member, &object);
    signal("InhibitorRemoved");
    world.wait_kinds(own, &[VetoKind::Service]);
    signal("InhibitorAdded");
    world.wait_kinds(own, &all);
    drop(manager);
    world.wait_kinds(own, &[]);
    drop(app);
}

/// What, mode, uid, pid.
type Lock = (&'static str, &'static str, u32, u32);

/// logind, and the locks it knows.
struct System {
    bus: services::Daemon,
    locks: Arc<Mutex<Vec<Lock>>>,
    asked: Arc<AtomicUsize>,
    logind: Option<StandIn>,
}

impl System {
    fn new() -> Self {
        let mut system =
            Self { bus: services::Daemon::new(), locks: Arc::default(), asked: Arc::default(), logind: None };
        system.start_logind();
        system
    }

    fn start_logind(&mut self) {
        let (locks, asked) = (Arc::clone(&self.locks), Arc::clone(&self.asked));
        let logind = StandIn::start(&self.bus.address(), &[services::LOGIND], move |call| {
            match call.header().member().unwrap().as_str() {
                "ListInhibitors" => {
                    asked.fetch_add(1, Ordering::Relaxed);
                    let locks = locks.lock().unwrap();
                    let list: Vec<_> =
                        locks.iter().map(|(what, mode, uid, pid)| (*what, "Who", "why", *mode, *uid, *pid)).collect();
                    reply(call, &list)
                }
                // For the surroundings.
                "Inhibit" => {
                    let (_, writer) = std::io::pipe().unwrap();
                    reply(call, &zbus::OwnedFd::from(std::os::fd::OwnedFd::from(writer)))
                }
                other => panic!("nobody calls {other}"),
            }
        });
        self.logind = Some(logind);
    }

    fn put(&self, locks: &[Lock]) {
        *self.locks.lock().unwrap() = locks.to_vec();
        // logind says so at each lock, whether that changes the sum of them or not.
        self.say("BlockInhibited");
    }

    fn say(&self, property: &'static str) {
        let changed: HashMap<&str, Variant<'_>> = [(property, "sleep".into())].into();
        let logind = self.logind.as_ref().unwrap();
        let body = (services::MANAGER, changed, Vec::<&str>::new());
        logind.signal(services::LOGIND_PATH, PROPERTIES, "PropertiesChanged", &body);
    }
}

#[test]
fn who_holds_off_sleep_is_seen() {
    let mut system = System::new();
    let app = Home::bare(ALICE).run("sleep", &["600"]);
    let pid = app.pid();
    // The process is that user's once setpriv has done its part.
    wait("sleep", || fs::read_to_string(format!("/proc/{pid}/comm")).unwrap().starts_with("sleep").then_some(()));
    system.put(&[("sleep:idle", "block", ALICE, pid)]);
    let mut world = World::with_system_bus(&[], Some(system.bus.address()));
    world.wait_kinds(pid, &[VetoKind::SleepInhibitor, VetoKind::IdleInhibitor]);
    system.put(&[("idle", "block", ALICE, pid), ("sleep", "delay", ALICE, pid), ("sleep", "block", ROOT, 1)]);
    world.wait_kinds(pid, &[VetoKind::IdleInhibitor]);
    // Nobody asks while there is nothing to ask about.
    let asked = system.asked.load(Ordering::Relaxed);
    system.say("DelayInhibited");
    assert!(!world.within(Duration::from_millis(500), |world| world.kinds(pid).is_empty()));
    assert_eq!(system.asked.load(Ordering::Relaxed), asked);
    // While logind restarts its last word holds.
    system.logind = None;
    assert!(!world.within(Duration::from_millis(500), |world| world.kinds(pid).is_empty()));
    system.locks.lock().unwrap().clear();
    system.start_logind();
    world.wait_kinds(pid, &[]);
}

#[test]
fn who_answers_the_phone_is_seen_to_be_in_a_call() {
    const MODEM: &str = "/org/freedesktop/ModemManager1/Modem/0";
    const VOICE: &str = "org.freedesktop.ModemManager1.Modem.Voice";
    const CALL: &str = "org.freedesktop.ModemManager1.Call";
    let path = |number: u32| ObjectPath::try_from(format!("/org/freedesktop/ModemManager1/Call/{number}")).unwrap();
    let system = System::new();
    let home = Home::new(ROOT);
    let own = std::process::id();
    let _dialler = StandIn::named(&home.address(), &["org.gnome.Calls"]);
    let state = Arc::new(AtomicUsize::new(4));
    let active = Arc::clone(&state);
    let modems = StandIn::start(&system.bus.address(), &[services::MM], move |call: &Message| {
        match call.header().member().unwrap().as_str() {
            "GetManagedObjects" => {
                let voice: HashMap<&str, Variant<'_>> = [("Calls", vec![path(1)].into())].into();
                let objects: HashMap<ObjectPath<'_>, HashMap<&str, HashMap<&str, Variant<'_>>>> =
                    [(ObjectPath::try_from(MODEM).unwrap(), [(VOICE, voice)].into())].into();
                reply(call, &objects)
            }
            "Get" => reply(call, &Variant::from(i32::try_from(active.load(Ordering::Relaxed)).unwrap())),
            other => panic!("nobody calls {other}"),
        }
    });
    let mut world = World::with_system_bus(&[&home], Some(system.bus.address()));
    // One is under way when we come.
    world.wait_kinds(own, &[VetoKind::Service, VetoKind::Call]);
    let changes = |number: u32, new: i32| {
        modems.signal(path(number).as_str(), CALL, "StateChanged", &(4_i32, new, 0_u32));
    };
    changes(1, 7);
    world.wait_kinds(own, &[VetoKind::Service]);
    // It rings, is taken, and ends.
    modems.signal(MODEM, VOICE, "CallAdded", &path(2));
    world.wait_kinds(own, &[VetoKind::Service, VetoKind::Call]);
    changes(2, 4);
    modems.signal(MODEM, VOICE, "CallDeleted", &path(1));
    assert!(!world.within(Duration::from_millis(500), |world| !world.kinds(own).contains(&VetoKind::Call)));
    modems.signal(MODEM, VOICE, "CallDeleted", &path(2));
    world.wait_kinds(own, &[VetoKind::Service]);
    modems.signal(MODEM, VOICE, "CallAdded", &path(3));
    world.wait_kinds(own, &[VetoKind::Service, VetoKind::Call]);
    drop(modems);
    world.wait_kinds(own, &[VetoKind::Service]);
}

/// Somebody who listens where PipeWire should.
fn pretend_sound(home: &Home) -> UnixListener {
    let path = home.runtime_dir().join("pipewire-0");
    let listener = UnixListener::bind(&path).unwrap();
    home.give(&path);
    listener
}

/// A message of PipeWire's.
fn message(to: u32, opcode: u32, members: &[u8]) -> Vec<u8> {
    let words = |words: &[u32]| words.iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<u8>>();
    let length = u32::try_from(members.len()).unwrap();
    [words(&[to, opcode << 24 | (length + 8), 0, 0, length, 14]), members.to_vec()].concat()
}

fn int(number: u32) -> Vec<u8> {
    [4, 4, number, 0].map(u32::to_ne_bytes).concat()
}

fn long(number: u64) -> Vec<u8> {
    [&[8, 5].map(u32::to_ne_bytes).concat()[..], &number.to_ne_bytes()].concat()
}

fn text(text: &str) -> Vec<u8> {
    let mut bytes = [u32::try_from(text.len() + 1).unwrap(), 8].map(u32::to_ne_bytes).concat();
    bytes.extend(text.bytes().chain([0]));
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes
}

fn dictionary(pairs: &[(&str, &str)]) -> Vec<u8> {
    let mut inner = int(u32::try_from(pairs.len()).unwrap());
    pairs.iter().for_each(|(key, value)| inner.extend([text(key), text(value)].concat()));
    [&[u32::try_from(inner.len()).unwrap(), 14].map(u32::to_ne_bytes).concat()[..], &inner].concat()
}

fn hello() -> Vec<u8> {
    message(0, 0, &[int(0), int(1), text("x")].concat())
}

/// A client with this process and a node of it, which will be our object `ours`.
fn node_of(pid: u32, id: u32) -> Vec<u8> {
    let global = |id: u32, kind: &str, about: &[(&str, &str)]| {
        message(2, 0, &[int(id), int(7), text(kind), int(3), dictionary(about)].concat())
    };
    let client = global(id, "PipeWire:Interface:Client", &[("pipewire.sec.pid", &pid.to_string())]);
    let node = global(id + 1, "PipeWire:Interface:Node", &[("client.id", &id.to_string()), ("node.name", "x")]);
    [client, node].concat()
}

fn runs(ours: u32, state: u32) -> Vec<u8> {
    message(ours, 0, &[int(0), int(0), int(0), long(4), int(0), int(0), int(state), text("")].concat())
}

#[test]
fn a_user_cannot_speak_of_other_users_processes() {
    let (home, other) = (Home::bare(ALICE), Home::bare(BOB));
    let listener = pretend_sound(&home);
    let (own, others) = (home.run("sleep", &["600"]), other.run("sleep", &["600"]));
    for app in [&own, &others] {
        let comm = format!("/proc/{}/comm", app.pid());
        wait("sleep", || fs::read_to_string(&comm).unwrap().starts_with("sleep").then_some(()));
    }
    let mut world = World::new(&[&home]);
    let (mut server, _) = listener.accept().unwrap();
    let nodes = [node_of(1, 10), node_of(others.pid(), 20), node_of(own.pid(), 30)].concat();
    server.write_all(&[hello(), nodes, runs(3, 3), runs(4, 3), runs(5, 3)].concat()).unwrap();
    world.wait("its own", |world| world.kinds(own.pid()) == [VetoKind::Playback].into());
    assert_eq!(world.pids(), [own.pid()].into());
}

#[test]
fn a_sound_server_that_says_nothing_or_nonsense_holds_nobody_up() {
    let (silent, mad, good) = (Home::bare(ROOT), Home::bare(ALICE), Home::new(BOB));
    let (listening, raving) = (pretend_sound(&silent), pretend_sound(&mad));
    let mut world = World::new(&[&silent, &mad, &good]);
    let (mut quiet, _) = listening.accept().unwrap();
    // It is tried again, but not at once.
    for _ in 0..3 {
        let (mut stream, _) = raving.accept().unwrap();
        let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n");
        stream.read_to_end(&mut Vec::new()).expect("it is hung up on");
    }
    let noise = good.noise();
    let _sound = good.start_sound();
    let player = good.run("pw-cat", &["--playback", &noise]);
    world.wait_kinds(player.pid(), &[VetoKind::Playback]);
    // Still there, and has been told who we are.
    let mut said = [0; 16];
    quiet.read_exact(&mut said).unwrap();
    assert_eq!(world.pids(), [player.pid()].into());
}

#[test]
fn a_sound_server_that_floods_holds_nobody_up_and_is_told_of_slowly() {
    let (wild, good) = (Home::bare(ALICE), Home::new(BOB));
    let listener = pretend_sound(&wild);
    let app = wild.run("sleep", &["600"]);
    let comm = format!("/proc/{}/comm", app.pid());
    wait("sleep", || fs::read_to_string(&comm).unwrap().starts_with("sleep").then_some(()));
    let mut world = World::new(&[&wild, &good]);
    let (mut stream, _) = listener.accept().unwrap();
    let (stop, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let (stopped, counted, pid) = (Arc::clone(&stop), Arc::clone(&sent), app.pid());
    stream.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
    let flood = thread::spawn(move || {
        stream.write_all(&[hello(), node_of(pid, 10)].concat()).unwrap();
        let burst: Vec<u8> = (0..500).flat_map(|turn| runs(3, 2 + turn % 2)).collect();
        while !stopped.load(Ordering::Relaxed) {
            write_all(&mut stream, &burst);
            counted.fetch_add(1, Ordering::Relaxed);
        }
        // The last word counts.
        write_all(&mut stream, &runs(3, 3));
        stream
    });
    wait("a flood", || (sent.load(Ordering::Relaxed) >= 4).then_some(()));
    let noise = good.noise();
    let _sound = good.start_sound();
    let player = good.run("pw-cat", &["--playback", &noise]);
    world.wait_kinds(player.pid(), &[VetoKind::Playback]);
    let begun = std::time::Instant::now();
    let words = world.words;
    assert!(!world.within(Duration::from_secs(3), |_| false));
    let most = begun.elapsed().as_millis() / 100 + 2;
    assert!(((world.words - words) as u128) <= most, "{} words", world.words - words);
    stop.store(true, Ordering::Relaxed);
    world.wait_kinds(app.pid(), &[VetoKind::Playback]);
    drop(flood.join().unwrap());
    world.wait_kinds(app.pid(), &[]);
}

/// Writes it all, at whatever speed it is taken.
fn write_all(stream: &mut UnixStream, mut bytes: &[u8]) {
    let until = std::time::Instant::now() + PATIENCE;
    while !bytes.is_empty() {
        match stream.write(bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(error) => {
                assert!(error.kind() == std::io::ErrorKind::WouldBlock && std::time::Instant::now() < until, "{error}")
            }
        }
    }
}
