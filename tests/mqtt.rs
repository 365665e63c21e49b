//! The MQTT session against the real mosquitto: registering, redelivery, outages, crashes, limits.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking, in its helpers too")]

#[path = "mqtt/broker.rs"]
mod broker;
#[path = "mqtt/daemon.rs"]
mod daemon;
#[path = "mqtt/device.rs"]
mod device;

#[path = "ntfy/world.rs"]
#[expect(dead_code, reason = "made for the tests of ntfy; shared")]
mod world;

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, TcpStream},
    process::Command,
    sync::atomic::Ordering,
    thread,
    time::{Duration, Instant},
};

use nightporter::{
    config::MqttVersion,
    model::{FailureReason, RegistrationId, Urgency},
    view::LinkState,
};

use self::{
    broker::{Broker, OldFront, Refusal},
    device::Device,
};

/// A CONNECT of version 5 with this client identifier that would go on with its session; gives the stream and whether
/// there was one.
fn intrude(port: u16, client: &str) -> (TcpStream, bool) {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
    let mut connect = vec![0x10, 13 + client.len() as u8, 0, 4, b'M', b'Q', b'T', b'T', 5, 0, 0, 60, 0];
    connect.extend([0, client.len() as u8]);
    connect.extend(client.bytes());
    stream.write_all(&connect).unwrap();
    let mut answer = [0; 4];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!((answer[0], answer[3]), (0x20, 0), "{answer:?}");
    (stream, answer[2] == 1)
}

/// The messages that come before this one.
fn marked(device: &mut Device, broker: &Broker, topic: &str) -> usize {
    let before = device.got.len();
    broker.publish(topic, "marker", &[]);
    device.until("marked", |device| device.bodies()[before..].iter().any(|body| body == "marker"));
    device.got.len() - before - 1
}

#[test]
fn a_message_comes_and_once_it_is_safe_does_not_come_again() {
    let broker = Broker::start("");
    for version in [MqttVersion::V5, MqttVersion::V3] {
        let mut device = Device::with(broker.port(), |settings| settings.mqtt.version = Some(version));
        let topic = device.register(1);
        let endpoint = &device.channels[&RegistrationId(1)].1;
        assert_eq!(**endpoint, *format!("mqtt://127.0.0.1:{}/{topic}", broker.port()));
        broker.publish(&topic, "hello", &[]);
        device.until("received", |device| device.got.len() == 1);
        assert_eq!(device.bodies(), ["hello"]);
        // Which the broker has surely heard by the time it has sent another one on behalf of it.
        assert_eq!(marked(&mut device, &broker, &topic), 0);
        device.idle(Duration::from_millis(200));
        device.cut();
        assert_eq!(marked(&mut device, &broker, &topic), 0);
        assert_eq!(device.again, Vec::<std::sync::Arc<str>>::new());
    }
}

#[test]
fn an_unacknowledged_message_comes_again_with_the_same_id() {
    let broker = Broker::start("");
    for version in [MqttVersion::V5, MqttVersion::V3] {
        for crash in [false, true] {
            let mut device = Device::with(broker.port(), |settings| settings.mqtt.version = Some(version));
            let topic = device.register(1);
            device.safe = false;
            broker.publish(&topic, "same", &[]);
            broker.publish(&topic, "same", &[]);
            device.until("received", |device| device.got.len() == 2);
            for round in 1..=3 {
                match crash {
                    true => device.crash(),
                    false => device.cut(),
                }
                device.until("received again", |device| device.again.len() == 2 * round);
            }
            let ids: Vec<_> = device.got.iter().map(|message| message.id.clone()).collect();
            assert_ne!(ids[0], ids[1]);
            assert_eq!(device.again, [&ids[..], &ids[..], &ids[..]].concat());
            device.safe = true;
            device.crash();
            assert_eq!(marked(&mut device, &broker, &topic), 0);
        }
    }
}

#[test]
fn what_is_sent_while_the_device_is_away_is_kept() {
    let broker = Broker::start("");
    let mut device = Device::new(broker.port());
    let topic = device.register(1);
    device.cut();
    for n in 0..5 {
        broker.publish(&topic, &n.to_string(), &[]);
    }
    device.until("received", |device| device.got.len() == 5);
    assert_eq!(device.bodies(), ["0", "1", "2", "3", "4"]);
    device.set_allowed(false);
    device.step();
    assert_eq!(device.standing().state, LinkState::Off);
    broker.publish(&topic, "roaming", &[]);
    device.set_allowed(true);
    device.until("received", |device| device.got.len() == 6);
}

#[test]
fn a_broker_without_version_5_is_spoken_to_in_311() {
    let broker = Broker::start("");
    for refusal in [Refusal::Answer, Refusal::HangUp] {
        let front = OldFront::start(broker.port(), refusal);
        let mut device = Device::new(front.port);
        let topic = device.register(1);
        assert_eq!(front.refused.load(Ordering::Relaxed), 1);
        broker.publish(&topic, "old", &[]);
        device.until("received", |device| device.got.len() == 1);
        // It is remembered, and 5 is not asked for with each link.
        device.crash();
        assert_eq!(marked(&mut device, &broker, &topic), 0);
        assert_eq!(front.refused.load(Ordering::Relaxed), 1);
    }
}

#[test]
fn credentials_are_needed_and_their_lack_is_told() {
    let broker = Broker::start_with("allow_anonymous false\npassword_file {dir}/passwords", |dir| {
        let mut command = Command::new("mosquitto_passwd");
        command.arg("-b").arg("-c").arg(dir.join("passwords")).args(["phone", "sesame"]);
        assert!(command.status().unwrap().success());
    });
    for version in [MqttVersion::V5, MqttVersion::V3] {
        let mut device = Device::with(broker.port(), |settings| settings.mqtt.version = Some(version));
        device.login = Some(("phone", "open"));
        device.try_register(1);
        device.until("refused", |device| !device.failures.is_empty());
        assert_eq!(device.failures[0].0, FailureReason::ActionRequired);
        assert!(device.standing().trouble.unwrap().contains("credentials"));
        device.login = Some(("phone", "sesame"));
        let mut device = Device::with(broker.port(), |settings| settings.mqtt.version = Some(version));
        device.login = Some(("phone", "sesame"));
        let topic = device.register(2);
        broker.publish(&topic, "in", &["-u", "phone", "-P", "sesame"]);
        device.until("received", |device| device.got.len() == 1);
        assert_eq!(device.standing().trouble, None);
    }
}

#[test]
fn a_session_taken_over_is_not_fought_for() {
    let broker = Broker::start("");
    let mut device = Device::new(broker.port());
    device.register(1);
    // The other device comes back each time it is thrown out. mosquitto 2.0.11 says nothing to the one it throws out.
    for _ in 0..20 {
        let links = device.links;
        let (other, present) = intrude(broker.port(), &device.remembered["client"]);
        assert!(present, "the broker has kept no session");
        device.until("thrown out", |device| !device.is_online());
        if device.standing().trouble.is_some() {
            break;
        }
        device.until("back", |device| device.links > links && device.is_online());
        drop(other);
    }
    let standing = device.standing();
    assert!(standing.trouble.unwrap().contains("two devices"), "it goes on fighting");
    assert_eq!(standing.state, LinkState::Waiting);
    let pause = standing.retry_at.unwrap().since(device.now().boot);
    assert!(pause > Duration::from_secs(250), "{pause:?}");
}

#[test]
fn a_broker_that_restarts_loses_nothing() {
    let mut broker = Broker::start("");
    let mut device = Device::new(broker.port());
    let topics: Vec<String> = (1..=20).map(|n| device.register(n)).collect();
    device.cut();
    for topic in &topics {
        broker.publish(topic, "before", &[]);
    }
    broker.stop();
    device.idle(Duration::from_millis(100));
    broker.start_again();
    device.until("received", |device| device.got.len() == topics.len());
    assert!(device.again.is_empty());
    for topic in &topics {
        broker.publish(topic, "after", &[]);
    }
    device.until("received", |device| device.got.len() == 2 * topics.len());
    assert_eq!(device.channels.len(), 20);
}

#[test]
fn a_broker_that_forgets_everything_gets_every_topic_again() {
    let mut broker = Broker::start("persistence false");
    let mut device = Device::new(broker.port());
    let topics: Vec<String> = (1..=20).map(|n| device.register(n)).collect();
    broker.stop();
    device.idle(Duration::from_millis(100));
    broker.start_again();
    device.until("back", Device::is_online);
    for topic in &topics {
        let before = device.got.len();
        device.idle(Duration::from_millis(5));
        broker.publish(topic, "after", &[]);
        device.until("received", |device| device.got.len() > before);
    }
}

#[test]
fn what_a_sender_says_of_its_message_comes_with_it() {
    let broker = Broker::start("");
    let mut device = Device::new(broker.port());
    let topic = device.register(1);
    device.cut();
    broker.publish(&topic, "short", &["-D", "publish", "message-expiry-interval", "1"]);
    let mut more = vec!["-D", "publish", "message-expiry-interval", "1000"];
    more.extend(["-D", "publish", "user-property", "urgency", "high"]);
    more.extend(["-D", "publish", "user-property", "topic", "weather"]);
    more.extend(["-D", "publish", "user-property", "id", "m-1"]);
    broker.publish(&topic, "long", &more);
    thread::sleep(Duration::from_millis(2500));
    device.until("received", |device| !device.got.is_empty());
    assert_eq!(marked(&mut device, &broker, &topic), 0);
    let message = &device.got[0];
    assert_eq!(device::body(message), "long");
    assert_eq!(
        (&*message.id, message.urgency, message.topic.as_deref()),
        ("m-1", Some(Urgency::High), Some("weather"))
    );
    assert!(message.expires.is_some());
    assert_eq!(device.got[1].expires, None);
}

#[test]
fn no_more_comes_than_is_allowed_to_be_on_the_way() {
    let broker = Broker::start("");
    let mut device = Device::with(broker.port(), |settings| settings.mqtt.receive_maximum = 3);
    let topic = device.register(1);
    device.safe = false;
    broker.publish_lines(&topic, (0..100).map(|n| n.to_string()));
    device.until("received", |device| device.got.len() == 3);
    device.idle(Duration::from_millis(300));
    assert_eq!(device.got.len(), 3);
    for made_safe in 1..=100 {
        device.make_one_safe();
        // No more than allowed is the broker's part: mosquitto 2.0.11 sends three more with each acknowledgement.
        device.until("received", |device| device.got.len() >= (made_safe + 3).min(100));
    }
    assert_eq!(device.bodies(), (0..100).map(|n| n.to_string()).collect::<Vec<_>>());
    assert_eq!(device.links, 1);
}

#[test]
fn a_thousand_messages_come_in_order_over_cuts() {
    let broker = Broker::start("");
    let mut device = Device::new(broker.port());
    let topic = device.register(1);
    thread::scope(|scope| {
        scope.spawn(|| broker.publish_lines(&topic, (0..1000).map(|n| n.to_string())));
        for at in [100, 250, 251, 700] {
            device.until("received", |device| device.got.len() >= at);
            device.cut();
        }
        device.until("received", |device| device.got.len() >= 1000);
    });
    assert_eq!(marked(&mut device, &broker, &topic), 0);
    assert_eq!(device.bodies()[..1000], (0..1000).map(|n| n.to_string()).collect::<Vec<_>>());
}

#[test]
fn crashes_lose_nothing_and_bring_nothing_twice() {
    let broker = Broker::start("");
    let mut device = Device::new(broker.port());
    let topic = device.register(1);
    thread::scope(|scope| {
        // Equal contents too: half of the lines are the same.
        scope.spawn(|| {
            broker.publish_lines(&topic, (0..400).map(|n| if n % 2 == 0 { n.to_string() } else { "same".into() }));
        });
        for round in 0..20 {
            // Some messages are handed to the app and not acknowledged when it dies.
            device.safe = false;
            let enough = (device.got.len() + 1).min(400);
            device.until("received", |device| device.got.len() >= enough);
            device.safe = true;
            for _ in 0..round {
                device.make_one_safe();
                device.step();
            }
            device.crash();
        }
        device.until("received", |device| device.got.len() >= 400);
    });
    assert_eq!(marked(&mut device, &broker, &topic), 0);
    assert!(!device.again.is_empty(), "no crash met a message on its way");
    let expected: Vec<String> = (0..400).map(|n| if n % 2 == 0 { n.to_string() } else { "same".into() }).collect();
    assert_eq!(device.bodies()[..400], expected);
}

#[test]
fn the_last_registration_takes_the_session_with_it() {
    let broker = Broker::start("");
    let mut device = Device::new(broker.port());
    device.register(1);
    device.register(2);
    device.unregister(1);
    device.idle(Duration::from_millis(50));
    assert!(device.is_online());
    device.unregister(2);
    device.until("idle", |device| device.standing().state == LinkState::Idle);
    device.idle(Duration::from_millis(50));
    let left = format!("Client {} disconnected", device.remembered["client"]);
    let until = Instant::now() + device::PATIENCE;
    while !broker.log().contains(&left) {
        assert!(Instant::now() < until, "the broker does not see it leave");
        thread::sleep(Duration::from_millis(20));
    }
    let (_, present) = intrude(broker.port(), &device.remembered["client"]);
    assert!(!present, "the broker keeps the session of a device that has left");
    device.register(3);
}

#[test]
fn a_message_no_app_could_take_does_not_stop_the_others() {
    let broker = Broker::start("");
    for version in [MqttVersion::V5, MqttVersion::V3] {
        let mut device = Device::with(broker.port(), |settings| settings.mqtt.version = Some(version));
        let topic = device.register(1);
        broker.publish(&topic, &"x".repeat(100_000), &[]);
        broker.publish(&topic, "after", &[]);
        device.until("received", |device| device.bodies().last().is_some_and(|body| body == "after"));
        device.cut();
        assert_eq!(marked(&mut device, &broker, &topic), 0);
        assert_eq!(device.links, 2);
    }
}

#[test]
fn a_retained_message_comes_once() {
    let broker = Broker::start("");
    let mut device = Device::new(broker.port());
    let topic = device.register(1);
    broker.publish(&topic, "state", &["-r"]);
    device.until("received", |device| device.got.len() == 1);
    for _ in 0..2 {
        device.crash();
        assert_eq!(marked(&mut device, &broker, &topic), 0);
    }
}
