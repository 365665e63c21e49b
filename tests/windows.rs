//! Windows as real compositors tell of them, and what other things behind such a socket cannot do. Run as root this is the
//! system's daemon and another user's session: sway does not run as root anyway.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

#[path = "windows/support.rs"]
mod support;

use std::{
    fs,
    process::Command,
    sync::atomic::Ordering,
    thread,
    time::{Duration, Instant},
};

use nightporter::sys::{
    users::{self, User},
    windows::Whose,
};
use support::*;

const A: &str = "org.example.A";
const B: &str = "org.example.B";

#[test]
fn windows_come_are_focused_and_go() {
    let home = Home::new();
    let sway = home.compositor(Kind::Sway);
    let mut told = Told::of(&home);
    told.windows(&[]);
    let a = home.open(&sway, A);
    told.windows(&[(A, true, false)]);
    let _b = home.open(&sway, B);
    told.windows(&[(A, false, false), (B, true, false)]);
    let mut quickest = Duration::MAX;
    for _ in 0..10 {
        for (app, a_is, b_is) in [(A, true, false), (B, false, true)] {
            let begun = Instant::now();
            home.sway(&sway, &format!("[app_id={app}] focus"));
            told.windows(&[(A, a_is, false), (B, b_is, false)]);
            quickest = quickest.min(begun.elapsed());
        }
    }
    println!("told of an activation at best {quickest:?} after it was asked for, by a new process each time");
    // Lying beside one another, or covered in a way that sway does not tell: nothing is concluded.
    home.sway(&sway, "fullscreen enable");
    home.sway(&sway, "[app_id=org.example.A] focus");
    told.windows(&[(A, true, false), (B, false, false)]);
    drop(a);
    told.windows(&[(B, true, false)]);
}

#[test]
fn a_switch_of_workspaces_is_a_change_of_what_is_active() {
    let home = Home::new();
    let sway = home.compositor(Kind::Sway);
    let mut told = Told::of(&home);
    let _a = home.open(&sway, A);
    told.windows(&[(A, true, false)]);
    home.sway(&sway, "workspace other");
    told.until("nothing active", |windows| windows.is_some_and(|windows| windows.iter().all(|window| !window.active)));
    let _b = home.open(&sway, B);
    // Since 1.10 sway says that the other one has left its output.
    let version = Command::new("sway").arg("--version").output().unwrap().stdout;
    let version = String::from_utf8(version).unwrap();
    let minor: u32 = version.trim().rsplit('.').next().unwrap().parse().unwrap();
    let left = minor >= 10;
    told.windows(&[(A, false, left), (B, true, false)]);
    home.sway(&sway, "workspace 1");
    told.windows(&[(A, true, false), (B, false, left)]);
}

#[test]
fn in_phoc_what_is_in_front_covers_the_others() {
    // foot 1.13 divides by the size of the screen, which phoc says is nothing here.
    const FLOWER: &str = "org.freedesktop.weston.flower";
    const TERMINAL: &str = "org.freedesktop.weston.wayland-terminal";
    const DOT: &str = "org.freedesktop.weston.wayland-clickdot";
    let home = Home::new();
    let phoc = home.compositor(Kind::Phoc);
    let _pointer = home.pointer(&phoc);
    let mut told = Told::of(&home);
    let _flower = home.run(&phoc, &["weston-flower"]);
    told.windows(&[(FLOWER, true, false)]);
    let terminal = home.run(&phoc, &["weston-terminal", "--maximized", "--shell=/bin/cat"]);
    told.windows(&[(FLOWER, false, true), (TERMINAL, true, false)]);
    let dot = home.run(&phoc, &["weston-clickdot"]);
    // phoc maximizes what comes without a parent.
    told.windows(&[(FLOWER, false, true), (DOT, true, false), (TERMINAL, false, true)]);
    drop(dot);
    told.windows(&[(FLOWER, false, true), (TERMINAL, true, false)]);
    drop(terminal);
    told.windows(&[(FLOWER, true, false)]);
}

#[test]
fn a_compositor_that_ends_leaves_nothing_known_until_the_next_one() {
    let home = Home::new();
    let mut told = Told::of(&home);
    for _ in 0..2 {
        let sway = home.compositor(Kind::Sway);
        let _a = home.open(&sway, A);
        told.windows(&[(A, true, false)]);
        sway.kill();
        told.nothing_known();
    }
}

#[test]
fn two_compositors_of_a_user_count_together() {
    let home = Home::new();
    let (sway, other) = (home.compositor(Kind::Sway), home.compositor(Kind::Sway));
    assert_ne!(sway.display, other.display);
    let mut told = Told::of(&home);
    let _a = home.open(&sway, A);
    let _b = home.open(&other, B);
    told.windows(&[(A, true, false), (B, true, false)]);
    other.kill();
    told.windows(&[(A, true, false)]);
}

#[test]
fn users_come_and_go() {
    let (mut usher, _first) = users::roster();
    let home = Home::new();
    let sway = home.compositor(Kind::Sway);
    let _a = home.open(&sway, A);
    let mut told = Told::with(Whose::Users(usher.roster()), home.user.uid);
    for _ in 0..2 {
        usher.present(vec![home.user.clone()]);
        told.windows(&[(A, true, false)]);
        usher.present(Vec::new());
        told.nothing_known();
    }
    // A directory that is another's is not looked into.
    let other = User { uid: home.user.uid + 1, ..home.user };
    usher.present(vec![other]);
    assert_eq!(told.next(Instant::now() + Duration::from_secs(3)), None);
}

#[test]
fn what_is_no_compositor_harms_nobody() {
    let home = Home::new();
    let mut told = Told::of(&home);
    // It answers in another language; it never answers; it says that we made a mistake and does not say which.
    behind(home.socket("wayland-5"), |mut stream, _| {
        let _ = std::io::Write::write_all(&mut stream, b"HTTP/1.1 400 Bad Request\r\n\r\n");
    });
    behind(home.socket("wayland-6"), |stream, _| drain(stream));
    let asked = behind(home.socket("wayland-7"), |mut stream, asked| {
        asked.fetch_add(1, Ordering::Relaxed);
        let _ = std::io::Write::write_all(&mut stream, &event(1, 0, &[1, 1, 0], None, &[]));
    });
    assert_eq!(told.next(Instant::now() + Duration::from_secs(8)), None, "nothing is known");
    // After 1, 2 and 4 s.
    let asked = asked.load(Ordering::Relaxed);
    assert!((2..=6).contains(&asked), "{asked}");
    let sway = home.compositor(Kind::Sway);
    let _a = home.open(&sway, A);
    // Of the silent one it is not known what it shows.
    told.windows(&[("", false, false), (A, true, false)]);
}

#[test]
fn a_flood_is_read_at_our_pace() {
    let home = Home::new();
    // As many windows as it can announce, and titles for ever.
    let window = 0xff00_0000;
    let begin = [compositor_says(), event(4, 0, &[window], None, &[]), event(5, 0, &[0], None, &[])].concat();
    let state = |states: &[u32]| {
        let length = u32::try_from(states.len() * 4).unwrap();
        [event(window, 4, &[length], None, states), event(window, 5, &[], None, &[])].concat()
    };
    let again = [event(window, 0, &[], Some("title of a window"), &[]), state(&[2]), state(&[])].concat();
    let written = behind(home.socket("wayland-0"), move |stream, written| flood(stream, &begin, &again, written));
    let mut told = Told::of(&home);
    wait("the flood", || (written.load(Ordering::Relaxed) > 0).then_some(()));
    let begun = Instant::now();
    let (mut reports, until) = (0, begun + Duration::from_secs(4));
    while told.next(until).is_some() {
        reports += 1;
    }
    let (took, written) = (begun.elapsed().as_secs_f64(), written.load(Ordering::Relaxed));
    println!("{written} bytes were taken and {reports} reports made in {took:.1} s");
    // 256 KiB and 64 reports a second at most, and what the sockets hold.
    assert!((written as f64) < (took + 1.0) * 280_000.0 + 1_000_000.0, "{written} bytes in {took} s");
    assert!(f64::from(reports) < (took + 1.0) * 70.0, "{reports} reports in {took} s");
    // Somebody else's compositor is as quick as ever.
    let other = Home::new();
    let sway = other.compositor(Kind::Sway);
    let mut told = Told::of(&other);
    let _a = other.open(&sway, A);
    told.windows(&[(A, true, false)]);
}

#[test]
fn more_windows_than_are_taken_in_are_as_good_as_none_known() {
    let home = Home::new();
    let announce = |count: u32| {
        let window = |n: u32| {
            let window = 0xff00_0000 + n;
            [event(4, 0, &[window], None, &[]), event(window, 5, &[], None, &[])].concat()
        };
        let windows: Vec<u8> = (0..count).flat_map(window).collect();
        [compositor_says(), windows, event(5, 0, &[0], None, &[])].concat()
    };
    let (enough, one_more) = (announce(256), event(4, 0, &[0xff00_0000 + 256], None, &[]));
    behind(home.socket("wayland-0"), move |mut stream, _| {
        let _ = std::io::Write::write_all(&mut stream, &enough);
        thread::sleep(Duration::from_millis(200));
        let _ = std::io::Write::write_all(&mut stream, &one_more);
        drain(stream);
    });
    let mut told = Told::of(&home);
    told.until("all of them", |windows| windows.is_some_and(|windows| windows.len() == 256));
    told.nothing_known();
}

#[test]
fn file_descriptors_are_not_taken() {
    let home = Home::new();
    let sent = behind(home.socket("wayland-0"), |stream, sent| {
        let begin = [compositor_says(), event(5, 0, &[0], None, &[])].concat();
        let _ = std::io::Write::write_all(&mut &stream, &begin);
        for _ in 0..8 {
            // A message to an object that is not there.
            send_with_fds(&stream, &event(0xff00_0009, 0, &[], None, &[]), 8);
        }
        sent.fetch_add(1, Ordering::Relaxed);
        drain(stream);
    });
    let before = fds_open();
    let mut told = Told::of(&home);
    told.windows(&[]);
    wait("all to be sent", || (sent.load(Ordering::Relaxed) == 1).then_some(()));
    // 1024 were sent; other tests of this process open some meanwhile.
    wait("them to be dropped", || (fds_open() < before + 500).then_some(()));
}

#[test]
fn the_script_for_kwin_says_what_is_looked_at() {
    let test = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/windows/kwin.mjs");
    let done = Command::new("node").arg(test).output().expect("node is needed");
    assert!(
        done.status.success(),
        "{}{}",
        String::from_utf8_lossy(&done.stdout),
        String::from_utf8_lossy(&done.stderr)
    );
    let metadata = concat!(env!("CARGO_MANIFEST_DIR"), "/config/kwin/nightporter/metadata.json");
    let metadata: serde_json::Value = serde_json::from_str(&fs::read_to_string(metadata).unwrap()).unwrap();
    assert_eq!(metadata["KPlugin"]["Id"], "nightporter");
}
