//! Payload helpers of a user's app: with that user's rights, from a daemon that is root's.

use std::{fs, path::PathBuf, thread, time::Duration};

use super::{
    ALICE, CHAT,
    desk::Desk,
    lease::Puppet,
    support::{Machine, wait},
};

/// Played by another test, as a process of a user's own; by itself it does nothing.
#[test]
fn play_a_desk() {
    let (Ok(bus), Ok(file)) = (std::env::var("PUPPET_BUS"), std::env::var("PUPPET_DESK")) else { return };
    let desk = Desk::start(&bus);
    loop {
        let shown = desk.shown().into_iter().map(|shown| {
            let category = shown.category.unwrap_or_default();
            format!("{}/{} {}: {} [{}] {category}", shown.id, shown.replaces, shown.summary, shown.body, shown.app)
        });
        let closed = desk.closed().into_iter().map(|id| format!("closed {id}"));
        let lines: Vec<String> = shown.chain(closed).collect();
        fs::write(format!("{file}.new"), lines.join("\n")).unwrap();
        fs::rename(format!("{file}.new"), &file).unwrap();
        thread::sleep(Duration::from_millis(20));
    }
}

struct Seen(PathBuf);

impl Seen {
    fn lines(&self) -> Vec<String> {
        fs::read_to_string(&self.0).unwrap_or_default().lines().map(str::to_owned).collect()
    }

    fn wait(&self, line: &str) {
        wait(line, || self.lines().iter().any(|other| other == line).then_some(()));
    }
}

#[test]
fn a_helper_speaks_for_its_app_which_stays_as_it_is() {
    let mut machine = Machine::new();
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/lifecycle/python/helper.py");
    let helper = machine.place("helper.py", &fs::read(source).unwrap());
    machine.configure(&format!(
        "[[app]]\nname = \"{CHAT}\"\npayload-helper = [\"/usr/bin/python3\", \"{}\"]\n",
        helper.display()
    ));
    let alice = machine.user(ALICE);
    machine.at(alice).install(CHAT, "");
    machine.at_mut(alice).start_bus();
    machine.log_in(alice);
    let file = machine.at(alice).runtime_dir.join("desk");
    let shares = machine.at(alice).runtime_dir.join("applications");
    fs::create_dir(&shares).unwrap();
    let entry = "[Desktop Entry]\nType=Application\nName=Chatter\nIcon=chat\n";
    fs::write(shares.join(format!("{CHAT}.desktop")), entry).unwrap();
    machine.start_daemon();
    machine.wait_up(ALICE, 1);
    let mut desk = Puppet::start(
        machine.at(alice).run_this(&["stand_in::play_a_desk"], &[("PUPPET_DESK", file.to_str().unwrap())]),
    );
    let seen = Seen(file);
    wait("the notification server", || seen.0.exists().then_some(()));
    let endpoint = machine.at(alice).launch(CHAT);
    // To the app that runs, whatever there is beside it.
    let text = |from: &str, text: &str| {
        format!("{{\"type\":\"text\",\"from\":\"{from}\",\"room\":\"7\",\"text\":\"{text}\"}}")
    };
    machine.post(&endpoint, &text("Ann", "Hi"));
    let bodies = || machine.at(alice).bodies(CHAT);
    wait("the first message", || (bodies().len() == 1).then_some(()));
    assert_eq!(seen.lines().len(), 0);

    machine.at(alice).manager("Kill", &[&format!("string:{CHAT}")]).unwrap();
    wait("the tombstone", || machine.at(alice).manager("Apps", &[]).unwrap().contains("tombstone").then_some(()));
    machine.post(&endpoint, &text("Ann", "1 < 2"));
    seen.wait("1/0 Ann: 1 &lt; 2 [Chatter] im.received");
    thread::sleep(Duration::from_secs(2));
    machine.post(&endpoint, &text("Bob", "3"));
    seen.wait("1/1 Bob: 3 [Chatter] im.received");
    machine.post(&endpoint, "{\"type\":\"read\"}");
    let why = || machine.at(alice).manager("Why", &[&format!("string:{CHAT}")]).unwrap();
    wait("the one that is of no use", || why().contains("dropped a message").then_some(()));
    assert!(why().contains("a notification was shown in its stead"), "{}", why());
    assert!(machine.at(alice).manager("Apps", &[]).unwrap().contains("tombstone"), "it was woken");
    assert_eq!(bodies().len(), 1);
    // What is for the app itself wakes it; all that waited goes to it in order, and it is spoken for no more.
    machine.post(&endpoint, "{\"type\":\"call\"}");
    wait("all of them", || (bodies().len() == 4).then_some(()));
    assert_eq!(bodies()[1..], [text("Ann", "1 < 2"), text("Bob", "3"), "{\"type\":\"call\"}".into()]);
    seen.wait("closed 1");

    // A helper that fails loses nothing.
    machine.at(alice).manager("Kill", &[&format!("string:{CHAT}")]).unwrap();
    wait("the tombstone", || machine.at(alice).manager("Apps", &[]).unwrap().contains("tombstone").then_some(()));
    machine.post(&endpoint, "rubbish");
    wait("the message", || (bodies().last()? == "rubbish").then_some(()));
    assert!(why().contains("of no use (it failed: exit status: 1)"), "{}", why());
    // Without anybody who shows anything the app itself is woken.
    desk.kill();
    machine.at(alice).manager("Kill", &[&format!("string:{CHAT}")]).unwrap();
    wait("the tombstone", || machine.at(alice).manager("Apps", &[]).unwrap().contains("tombstone").then_some(()));
    machine.post(&endpoint, &text("Ann", "again"));
    wait("the message", || (*bodies().last()? == text("Ann", "again")).then_some(()));
}
