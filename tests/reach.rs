//! What the link must bear, against the real servers: ntfy, mosquitto and the relay, each killed and cut off in network
//! namespaces of the test's own, and the daemon killed at random. NextPush and Gotify against their stand-ins.
//! `cargo test --test reach -- --nocapture` prints what was measured.
#![cfg(all(feature = "relay", feature = "daemon"))]
#![expect(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout, reason = "a test; it shows what it measures")]

#[path = "mqtt/broker.rs"]
#[expect(dead_code, reason = "made for the tests of MQTT; shared")]
mod broker;
#[path = "relay/harness.rs"]
#[expect(dead_code, reason = "made for the tests of the relay; shared")]
mod relay;
#[path = "ntfy/server.rs"]
#[expect(dead_code, reason = "made for the tests of ntfy; shared")]
mod server;
#[path = "ntfy/world.rs"]
#[expect(dead_code, reason = "made for the tests of ntfy; shared")]
mod world;

#[path = "standins"]
#[expect(dead_code, reason = "made for the tests of the sessions; shared")]
mod stand_in {
    pub(crate) mod faults;
    pub(crate) mod gotify;
    pub(crate) mod http;
    pub(crate) mod nextpush;
}

#[path = "reach/net.rs"]
mod net;
#[path = "reach/scenario.rs"]
mod scenario;
#[path = "reach/servers.rs"]
mod servers;
#[path = "reach/standins.rs"]
mod standins;

use std::net::Ipv4Addr;

use self::{
    broker::Broker,
    net::{SERVER, isolated},
    scenario::{kills, outages},
    server::Ntfy,
    servers::Household,
};

/// All of these run at the same time.
const TESTS: [&str; 6] = [
    "ntfy_through_outages",
    "ntfy_while_the_daemon_is_killed",
    "mqtt_through_outages",
    "mqtt_while_the_daemon_is_killed",
    "the_relay_through_outages",
    "the_relay_while_the_daemon_is_killed",
];

fn inside(name: &'static str) -> bool {
    // Installed before there is no way to the internet any more.
    isolated(name, &TESTS, || {
        let path = |program: std::path::PathBuf| program.to_str().unwrap().to_owned();
        vec![
            ("NIGHTPORTER_TEST_NTFY", path(server::program())),
            ("NIGHTPORTER_TEST_MOSQUITTO", path(broker::program())),
        ]
    })
}

#[test]
fn ntfy_through_outages() {
    if inside("ntfy_through_outages") {
        outages(|| Box::new(Ntfy::start_on(SERVER, "")));
    }
}

#[test]
fn ntfy_while_the_daemon_is_killed() {
    if inside("ntfy_while_the_daemon_is_killed") {
        kills(&Ntfy::start(""));
    }
}

#[test]
fn mqtt_through_outages() {
    if inside("mqtt_through_outages") {
        // The whole session with each message is more than a busy disk can take: only at the end.
        outages(|| Box::new(Broker::start_on(SERVER, "autosave_on_changes false\nautosave_interval 1800", |_| {})));
    }
}

#[test]
fn mqtt_while_the_daemon_is_killed() {
    if inside("mqtt_while_the_daemon_is_killed") {
        kills(&Broker::start(""));
    }
}

#[test]
fn the_relay_through_outages() {
    if inside("the_relay_through_outages") {
        outages(|| Box::new(Household::start_on(SERVER)));
    }
}

#[test]
fn the_relay_while_the_daemon_is_killed() {
    if inside("the_relay_while_the_daemon_is_killed") {
        kills(&Household::start_on(Ipv4Addr::LOCALHOST));
    }
}

#[test]
fn nextpush_through_broken_streams_and_a_killed_daemon() {
    standins::nextpush();
}

#[test]
fn gotify_through_broken_streams_and_a_killed_daemon() {
    standins::gotify();
}
