//! The user is notified in an app's stead, by the daemon as it is.

use std::{fs, thread, time::Duration};

use zbus::Variant;

use crate::{
    desk::{Desk, Shown},
    support::{Behaviour, Setup, World, dict, wait},
};

const APP: &str = "org.example.A";

fn nth(desk: &Desk, n: usize) -> Shown {
    wait("a notification", || desk.shown().get(n).cloned())
}

/// An app that was registered, and that nothing can start.
fn register(world: &World, name: &str, notify: Option<&str>) -> String {
    let app = world.client(name, Behaviour::Accept);
    let mut wish = dict(&[("service", name), ("token", "t")]);
    wish.extend(notify.map(|when| ("org.nightporter.notify", Variant::from(when.to_owned()))));
    assert_eq!(app.register_with(wish).0, "REGISTRATION_SUCCEEDED");
    app.call().endpoint.unwrap()
}

fn post(world: &World, endpoint: &str, body: &str) {
    world.post_to(endpoint, &[("TTL", "600")], body);
}

#[test]
fn an_app_that_nothing_can_start_is_spoken_for_until_it_comes() {
    let mut world = World::new(Setup::default());
    let shares = world.dir.path().join("share/applications");
    fs::create_dir_all(&shares).unwrap();
    fs::write(shares.join(format!("{APP}.desktop")), "[Desktop Entry]\nName=Chatter\nIcon=chat\nExec=chat\n").unwrap();
    let desk = Desk::start(&world.bus_address());
    let endpoint = register(&world, APP, None);
    let quiet = register(&world, "org.example.Quiet", Some("never"));
    post(&world, &quiet, "nobody is to know");
    post(&world, &endpoint, "the secret");
    let shown = nth(&desk, 0);
    assert_eq!((&*shown.summary, &*shown.body, &*shown.icon), ("Chatter", "New message", "chat"));
    assert_eq!((&*shown.desktop_entry, shown.urgency, shown.replaces), (APP, 1, 0));
    assert!(world.decided(APP, "notify", "nothing says how to start it"));
    world.post_to(&endpoint, &[("TTL", "600"), ("Urgency", "high")], "another");
    let shown = nth(&desk, 1);
    assert_eq!((&*shown.body, shown.urgency, shown.replaces), ("2 new messages", 2, 1));
    // The user touches it; without a systemd there is nothing that could start it.
    desk.click(1, Some("token"));
    wait("why", || world.decided(APP, "start", "the user touched").then_some(()));
    wait("it to be closed", || (desk.closed() == [1]).then_some(()));
    post(&world, &endpoint, "a third");
    let shown = nth(&desk, 2);
    assert_eq!((&*shown.body, shown.replaces), ("3 new messages", 0));
    // Another daemon says what this one did.
    assert!(world.stop_daemon().success());
    wait("it to be closed", || (desk.closed() == [1, 2]).then_some(()));
    world.start_daemon();
    assert_eq!(nth(&desk, 3).body, "3 new messages");
    let app = world.client(APP, Behaviour::Accept);
    for body in ["the secret", "another", "a third"] {
        assert_eq!(app.call().message.unwrap(), body.as_bytes());
    }
    wait("it to be closed", || (desk.closed() == [1, 2, 3]).then_some(()));
    let said = desk.shown();
    assert!(said.iter().all(|shown| shown.desktop_entry == APP), "{said:?}");
    assert!(!format!("{said:?}").contains("secret"));
}

#[test]
fn what_waits_is_spoken_of_where_that_was_asked_for() {
    const OTHER: &str = "org.example.Other";
    let held = |app: &str| format!("[[app]]\nname = \"{app}\"\nmin-urgency = \"high\"\n");
    let top = format!("{}{}notify = \"always\"\n{}", held(OTHER), held(APP), held("org.example.Silent"));
    let world = World::new(Setup { limits: &top_section(&top), ..Setup::default() });
    let desk = Desk::start(&world.bus_address());
    world.samples(&[(APP, "")]);
    let silent = register(&world, "org.example.Silent", None);
    let other = register(&world, OTHER, Some("always"));
    world.ask::<serde_json::Value>("Show", Some(APP));
    world.cli(&["kill", APP]);
    wait("its end", || (!world.is_owned(APP)).then_some(()));
    post(&world, &silent, "held, and nothing is said");
    post(&world, &other, "held");
    assert_eq!(nth(&desk, 0).desktop_entry, OTHER);
    world.post(APP, "held as well");
    assert_eq!(nth(&desk, 1).desktop_entry, APP);
    assert!(world.decided(APP, "notify", "the configuration wants it"));
    assert_eq!(world.bodies(APP), [""; 0], "it is not woken for it");
    // Touched, it starts and has its message.
    desk.click(nth(&desk, 1).id, None);
    world.expect(APP, &["held as well"]);
    assert!(world.decided(APP, "start", "the user touched"));
    // One that notifies by itself needs nobody to speak for it: it is seen to.
    let app = world.client(OTHER, Behaviour::Silent);
    let speaks = || {
        let arguments = ("", 0_u32, "", "mine", "", Vec::<&str>::new(), dict(&[]), -1_i32);
        let name = "org.freedesktop.Notifications";
        let call =
            app.connection.call_method(Some(name), "/org/freedesktop/Notifications", Some(name), "Notify", &arguments);
        drop(zbus::block_on(call));
    };
    let id = desk.shown().iter().find(|shown| shown.desktop_entry == OTHER).unwrap().id;
    wait("it to be closed", || {
        if !desk.closed().contains(&id) {
            speaks();
            thread::sleep(Duration::from_millis(100));
        }
        desk.closed().contains(&id).then_some(())
    });
    assert!(desk.shown().iter().all(|shown| shown.desktop_entry != "org.example.Silent"));
}

/// `[[app]]` sections behind `[limits]`, which is the last of a world's configuration.
fn top_section(apps: &str) -> String {
    format!("\n{apps}")
}
