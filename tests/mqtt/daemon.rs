//! The whole daemon on mosquitto: encrypted, with a certificate of its own, over a WebSocket, with a password.

use std::{fs, net::TcpListener, path::Path};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair};

use crate::{
    broker::Broker,
    world::{Apps, Bus, Porter, Setup},
};

const APP: &str = "org.example.App";

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// An authority, a server's and a client's certificate.
fn certificates(dir: &Path) {
    let mut authority = CertificateParams::default();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    authority.distinguished_name.push(DnType::CommonName, "test");
    let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate().unwrap()).unwrap();
    fs::write(dir.join("ca.pem"), authority.pem()).unwrap();
    for (name, purpose) in
        [("server", ExtendedKeyUsagePurpose::ServerAuth), ("client", ExtendedKeyUsagePurpose::ClientAuth)]
    {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["127.0.0.1".into()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, "phone");
        params.extended_key_usages = vec![purpose];
        let certificate = params.signed_by(&key, &authority).unwrap();
        fs::write(dir.join(format!("{name}.pem")), certificate.pem()).unwrap();
        fs::write(dir.join(format!("{name}.key")), key.serialize_pem()).unwrap();
    }
}

/// Registers an app, sends it a message, restarts the daemon and sends another.
fn carries_messages(broker: &Broker, url: &str, upstream: &str) {
    let bus = Bus::start();
    let apps = Apps::start(&bus);
    let porter = Porter::with(&bus, Setup { kind: "mqtt", url, upstream, more: "", beside: None });
    let endpoint = apps.register_one(APP);
    let topic = endpoint.splitn(4, '/').nth(3).unwrap().to_owned();
    broker.publish(&topic, "hello", &[]);
    assert_eq!(apps.wait_messages(APP, 1)[0].body, b"hello");
    let heartbeat = porter.upstream();
    assert_eq!(heartbeat.heartbeat_by.as_deref(), Some("client"), "{heartbeat:?}");
    assert!(heartbeat.heartbeat_secs.is_some_and(|secs| (60..=1740).contains(&secs)), "{heartbeat:?}");
    let porter = porter.restart();
    porter.wait_online();
    broker.publish(&topic, "again", &[]);
    assert_eq!(apps.wait_messages(APP, 2)[1].body, b"again");
}

#[test]
fn the_daemon_speaks_mqtt_over_tls_with_a_certificate_of_its_own() {
    let port = free_port();
    let files = tempfile::tempdir().unwrap();
    certificates(files.path());
    let at = files.path().display();
    let settings = format!(
        "listener {port} 127.0.0.1\nallow_anonymous true\ncafile {at}/ca.pem\ncertfile {at}/server.pem\n\
         keyfile {at}/server.key\nrequire_certificate true"
    );
    let broker = Broker::start(&settings);
    let url = format!("mqtts://127.0.0.1:{port}/");
    let upstream =
        format!("ca-file = \"{at}/ca.pem\"\ncertificate-file = \"{at}/client.pem\"\nkey-file = \"{at}/client.key\"");
    carries_messages(&broker, &url, &upstream);

    // Without one the broker ends the handshake, and the user is told.
    let bus = Bus::start();
    let apps = Apps::start(&bus);
    let upstream = format!("ca-file = \"{at}/ca.pem\"");
    let porter = Porter::with(&bus, Setup { kind: "mqtt", url: &url, upstream: &upstream, more: "", beside: None });
    assert_eq!(apps.register(&[APP.to_owned()]), [Err("NETWORK".to_owned())]);
    let seen = porter.upstream();
    assert!(seen.last_error.as_deref().is_some_and(|error| error.contains("certificate")), "{seen:?}");
}

#[test]
fn the_daemon_speaks_mqtt_over_a_websocket() {
    let port = free_port();
    let broker = Broker::start(&format!("listener {port} 127.0.0.1\nprotocol websockets\nallow_anonymous true"));
    carries_messages(&broker, &format!("ws://127.0.0.1:{port}/"), "endpoint = \"http://127.0.0.1/{channel}\"");
}
