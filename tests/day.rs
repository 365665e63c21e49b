//! A day with a phone, in a minute: real windows in a real compositor, real sound, real messages, real locks, and the real
//! daemon, which freezes whoever it may. What must run is known to the test itself; the kernel says what is frozen.
//! `NIGHTPORTER_DAY=seed` makes it another day. Must run as root, to make the user's processes.
#![cfg(all(feature = "cli", feature = "relay"))]
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking, in its helpers too")]
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "what was measured, and what a failing test wants to be known"
)]

#[path = "day/phone.rs"]
mod phone;
#[path = "support/processes.rs"]
#[expect(dead_code, reason = "made for the tests of the daemon; shared")]
mod processes;
#[path = "relay/harness.rs"]
#[expect(dead_code, reason = "made for the tests of the relay; shared")]
mod relay;
#[path = "support/reports.rs"]
#[expect(dead_code, reason = "made for the tests of the daemon; shared")]
mod reports;
#[path = "usermode/support.rs"]
#[expect(dead_code, reason = "made for the tests of the daemon in a session; shared")]
mod session;
#[path = "day/shell.rs"]
mod shell;
#[path = "day/watch.rs"]
mod watch;

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::MutexGuard,
    thread,
    time::{Duration, Instant},
};

use self::{
    phone::{Phone, Running},
    session::wait,
    watch::{Book, Watch},
};

const EVENTS: u32 = 200;
const SEED: u64 = 20_261_122;
/// Each goes by the name of its window, as apps should.
const APPS: [(&str, &str); 5] = [
    ("org.freedesktop.weston.flower", "weston-flower"),
    ("org.freedesktop.weston.wayland-clickdot", "weston-clickdot"),
    ("org.freedesktop.weston.eventdemo", "weston-eventdemo"),
    ("org.freedesktop.weston.wayland-resizor", "weston-resizor"),
    ("org.freedesktop.weston.cliptest", "weston-cliptest"),
];
/// It holds a lock that somebody waits for, once.
const KEEPER: usize = 3;
/// It never says whether it is looked at.
const SILENT: usize = 4;
/// The daemon is back at a socket that is new within a second (`users/door.rs`); until then the grace, which is far longer
/// outside of tests, covers for it.
const BACK_AT_SOCKETS: Duration = Duration::from_millis(2500);
/// What is looked at right before a freeze and speaks against it is looked at again after 30 s.
const LOOKED_AT_AGAIN: Duration = Duration::from_secs(40);

#[test]
fn nobody_who_must_run_is_frozen_in_a_day_of_200_events() {
    let seed = std::env::var("NIGHTPORTER_DAY").map_or(SEED, |seed| seed.parse().expect("a number"));
    println!("the day of seed {seed}");
    let begun = Instant::now();
    let mut day = Day::begin(seed);
    println!("it begins after {:?}", begun.elapsed());
    while day.events < EVENTS {
        day.event();
        assert!(day.book().false_freezes.is_empty(), "{}", day.complaint());
        let pause = day.random(0, 350);
        thread::sleep(Duration::from_millis(pause));
    }
    println!("it ends after {:?}", begun.elapsed());
    day.end();
    println!("all is over after {:?}", begun.elapsed());
}

struct Day {
    random: u64,
    events: u32,
    endpoints: Vec<String>,
    /// Messages sent to each app.
    sent: Vec<Vec<String>>,
    front: Option<usize>,
    windows: [bool; APPS.len()],
    /// What plays or records, by app: the stream's name.
    streams: BTreeMap<usize, &'static str>,
    /// Held by the keeper, awaited by somebody.
    lock: Option<Running>,
    claimed: Option<usize>,
    did: BTreeMap<&'static str, u32>,
    watch: Watch,
    phone: Phone,
}

impl Day {
    fn begin(seed: u64) -> Self {
        let phone = Phone::new();
        let launched: Vec<(String, PathBuf)> = APPS.iter().map(|(app, _)| phone.launch(app)).collect();
        let (endpoints, cgroups): (Vec<_>, Vec<_>) = launched.into_iter().unzip();
        let watch = Watch::start(APPS.iter().map(|(app, _)| *app).zip(cgroups).collect());
        let mut day = Self {
            random: seed,
            events: 0,
            endpoints,
            sent: vec![Vec::new(); APPS.len()],
            front: None,
            windows: [false; APPS.len()],
            streams: BTreeMap::new(),
            lock: None,
            claimed: None,
            did: BTreeMap::new(),
            watch,
            phone,
        };
        for app in 0..APPS.len() {
            day.open(app);
        }
        day
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.watch.book.lock().unwrap()
    }

    /// splitmix64.
    fn random(&mut self, from: u64, to: u64) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        from + (z ^ (z >> 31)) % (to - from)
    }

    fn any(&mut self, of: &[usize]) -> Option<usize> {
        if of.is_empty() {
            return None;
        }
        let at = self.random(0, of.len() as u64);
        Some(of[usize::try_from(at).unwrap()])
    }

    fn happens(&mut self, what: &'static str, app: Option<usize>) {
        self.events += 1;
        *self.did.entry(what).or_default() += 1;
        let text = format!("#{} {what} {}", self.events, app.map_or("", |app| APPS[app].0));
        self.book().events.push(text);
    }

    /// The next thing that happens. What cannot happen now does not.
    fn event(&mut self) {
        let all: Vec<usize> = (0..APPS.len()).collect();
        let with: Vec<usize> = all.iter().copied().filter(|app| self.windows[*app]).collect();
        let without: Vec<usize> = all.iter().copied().filter(|app| !self.windows[*app]).collect();
        match self.events {
            15..30 if self.lock.is_none() => return self.lock(),
            50..60 if self.lock.is_some() => return self.unlock(),
            90 => return self.restart_compositor(),
            140 => return self.restart_sound(),
            _ => {}
        }
        match self.random(0, 100) {
            0..45 => {
                let behind: Vec<usize> = with.into_iter().filter(|app| Some(*app) != self.front).collect();
                let Some(app) = self.any(&behind) else { return };
                self.activate(app);
            }
            45..52 if with.len() > 2 => {
                let Some(app) = self.any(&with) else { return };
                self.close(app);
            }
            52..64 => {
                let Some(app) = self.any(&without) else { return };
                self.happens("opens", Some(app));
                self.open(app);
            }
            64..72 => {
                let Some(app) = self.front.filter(|app| !self.streams.contains_key(app)) else { return };
                self.play(app);
            }
            72..78 => {
                let streams: Vec<usize> = self.streams.keys().copied().collect();
                let Some(app) = self.any(&streams) else { return };
                self.silence(app);
            }
            78..93 => {
                let Some(app) = self.any(&all) else { return };
                self.message(app);
            }
            93..100 => match self.claimed {
                Some(app) => self.unclaim(app),
                None => {
                    // The silent one stays silent.
                    let behind: Vec<usize> =
                        all.into_iter().filter(|app| Some(*app) != self.front && *app != SILENT).collect();
                    let Some(app) = self.any(&behind) else { return };
                    self.claim(app);
                }
            },
            _ => {}
        }
    }

    fn activate(&mut self, app: usize) {
        self.happens("comes to the front", Some(app));
        self.leaves_front();
        self.book().asked_to_front(app);
        self.phone.shell().activate(APPS[app].0);
        self.is_in_front(app);
    }

    fn leaves_front(&mut self) {
        if let Some(front) = self.front.take() {
            self.book().may(front, "in front");
        }
    }

    fn is_in_front(&mut self, app: usize) {
        let shell = self.phone.shell();
        wait("it to be in front", || (shell.active().as_deref() == Some(APPS[app].0)).then_some(()));
        self.book().must(app, "in front");
        self.front = Some(app);
    }

    /// What the user starts, and what speaks for it at once, is told by the shell; the silent one gets a message.
    fn open(&mut self, app: usize) {
        let (name, program) = APPS[app];
        self.leaves_front();
        let order = |day: &Self| day.phone.order(name, "window", &format!("WAYLAND_DISPLAY=wayland-0 {program}"));
        if app == SILENT {
            order(self);
            let mut tries = 0;
            loop {
                self.post(app);
                let shell = self.phone.shell();
                if Phone::within(Duration::from_secs(2), || shell.has(name)) {
                    break;
                }
                tries += 1;
                assert!(tries < 10, "{name} does not open a window; {}", self.complaint());
            }
            self.is_in_front(app);
        } else {
            self.say(app, "foreground");
            self.book().must(app, "the shell says so");
            order(self);
            let shell = self.phone.shell();
            wait("the window", || shell.has(name).then_some(()));
            self.is_in_front(app);
            self.book().may(app, "the shell says so");
            self.say(app, "background");
            self.claimed.take_if(|claimed| *claimed == app);
        }
        self.windows[app] = true;
    }

    fn say(&self, app: usize, state: &str) {
        self.phone.session.say(APPS[app].0, state);
    }

    fn close(&mut self, app: usize) {
        self.happens("closes its window", Some(app));
        self.close_quietly(app);
    }

    fn close_quietly(&mut self, app: usize) {
        let was_front = self.front == Some(app);
        if was_front {
            self.leaves_front();
        }
        self.phone.end(APPS[app].0, "window");
        self.windows[app] = false;
        let shell = self.phone.shell();
        wait("the window to be gone", || (!shell.has(APPS[app].0)).then_some(()));
        if was_front && !shell.is_empty() {
            let next = wait("the next window", || shell.active());
            let next = APPS.iter().position(|(app, _)| *app == next).unwrap();
            self.is_in_front(next);
        }
    }

    /// Plays or records, and goes on in the background.
    fn play(&mut self, app: usize) {
        let (name, records) = (APPS[app].0, self.random(0, 3) == 0);
        let session = &self.phone.session;
        let number = self.events;
        let node = format!("stream-{number}");
        let (what, command) = if records {
            (
                "records",
                format!(
                    "pw-record -P '{{ node.name = {node} }}' {}",
                    session.path(&format!("run/{node}.wav")).display()
                ),
            )
        } else {
            (
                "plays",
                format!("pw-cat --playback -P '{{ node.name = {node} }}' {}", session.path("noise.wav").display()),
            )
        };
        self.happens(what, Some(app));
        self.phone.order(name, "stream", &command);
        self.phone.wait_stream(&node);
        self.book().must(app, what);
        self.streams.insert(app, what);
    }

    fn silence(&mut self, app: usize) {
        self.happens("is silent", Some(app));
        let what = self.streams.remove(&app).unwrap();
        self.book().may(app, what);
        self.phone.end(APPS[app].0, "stream");
    }

    fn message(&mut self, app: usize) {
        self.happens("gets a message", Some(app));
        self.post(app);
    }

    fn post(&mut self, app: usize) {
        let body = format!("message {}", self.sent[app].len());
        self.phone.session.post(&self.endpoints[app], &body);
        self.sent[app].push(body);
    }

    fn claim(&mut self, app: usize) {
        self.happens("is said to be in front", Some(app));
        self.say(app, "foreground");
        self.book().must(app, "the shell says so");
        self.claimed = Some(app);
    }

    fn unclaim(&mut self, app: usize) {
        self.happens("is said to be in the background", Some(app));
        self.claimed = None;
        self.book().may(app, "the shell says so");
        self.say(app, "background");
    }

    /// The keeper takes a lock that somebody else then wants.
    fn lock(&mut self) {
        if self.front != Some(KEEPER) {
            return match self.windows[KEEPER] {
                true => self.activate(KEEPER),
                false => self.open(KEEPER),
            };
        }
        self.happens("holds a lock that is wanted", Some(KEEPER));
        let path = self.phone.session.path("run/lock");
        self.phone.order(APPS[KEEPER].0, "lock", &format!("flock -F -x {} sleep 1000", path.display()));
        self.phone.wait_lock(&path);
        self.lock = Some(self.phone.want_lock(&path));
        self.book().must(KEEPER, "a lock");
    }

    fn unlock(&mut self) {
        self.happens("gives the lock back", Some(KEEPER));
        self.book().may(KEEPER, "a lock");
        self.phone.end(APPS[KEEPER].0, "lock");
        let mut waiter = self.lock.take().unwrap();
        wait("who wanted it", || waiter.0.try_wait().unwrap());
    }

    /// It takes all windows along. As long as there is none nobody knows who is looked at.
    fn restart_compositor(&mut self) {
        self.happens("the compositor is killed", None);
        self.leaves_front();
        self.phone.kill_compositor();
        self.windows = [false; APPS.len()];
        self.book().must(SILENT, "nothing is known");
        thread::sleep(BACK_AT_SOCKETS);
        self.book().may(SILENT, "nothing is known");
        self.phone.start_compositor();
        for app in 0..APPS.len() {
            self.open(app);
        }
    }

    /// It takes all streams along.
    fn restart_sound(&mut self) {
        self.happens("the sound server is killed", None);
        for (app, what) in std::mem::take(&mut self.streams) {
            self.book().may(app, what);
            self.phone.end(APPS[app].0, "stream");
        }
        self.phone.kill_sound();
        thread::sleep(Duration::from_millis(300));
        self.phone.start_sound();
        thread::sleep(BACK_AT_SOCKETS);
        let Some(app) = self.front else { return };
        self.play(app);
    }

    /// Whoever may be held is, in the end; each comes back when it is wanted; and no message was lost.
    fn end(&mut self) {
        for app in self.streams.keys().copied().collect::<Vec<_>>() {
            self.silence(app);
        }
        if let Some(app) = self.claimed {
            self.unclaim(app);
        }
        for app in 0..APPS.len() {
            if !self.windows[app] {
                self.open(app);
            }
        }
        for (app, (name, _)) in APPS.iter().enumerate() {
            let begun = Instant::now();
            if self.front != Some(app) {
                self.activate(app);
            }
            let others = || (0..APPS.len()).filter(|other| *other != app);
            let held = Phone::within(LOOKED_AT_AGAIN, || others().all(|other| self.book().apps[other].frozen));
            assert!(held, "not all are held while {name} is in front; {}", self.complaint());
            assert!(!self.book().apps[app].frozen, "{}", self.complaint());
            println!("all others are held {:?} after {name} is in front", begun.elapsed());
        }
        for (app, sent) in self.sent.iter().enumerate() {
            let bodies: Vec<&str> = sent.iter().map(String::as_str).collect();
            self.phone.session.expect(APPS[app].0, &bodies);
        }
        println!("{:?}", self.did);
        let book = self.book();
        assert!(book.false_freezes.is_empty(), "{:#?}", book.false_freezes);
        for app in &book.apps {
            println!("{}: frozen {} times, thawed for the front {}", app.name, app.freezes, app.thaws_to_front);
            assert!(app.freezes >= 5 && app.thaws_to_front >= 1, "{book:?}");
        }
        let mut times = book.to_thawed.clone();
        times.sort();
        println!(
            "from asking for the window to thawed, {} times: min {:?}, median {:?}, max {:?}",
            times.len(),
            times[0],
            times[times.len() / 2],
            times[times.len() - 1]
        );
        assert!(times.len() >= 20);
        assert_eq!((self.did["the compositor is killed"], self.did["the sound server is killed"]), (1, 1));
        assert_eq!((self.did["holds a lock that is wanted"], self.did["gives the lock back"]), (1, 1));
    }

    fn complaint(&self) -> String {
        let book = self.book();
        let lately = &book.events[book.events.len().saturating_sub(15)..];
        format!("{:#?}\n{lately:#?}\n{}", book.false_freezes, self.phone.why(&book))
    }
}
