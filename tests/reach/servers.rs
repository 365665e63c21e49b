//! The real servers behind one face, and publishers that know when a message is the server's.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    time::Duration,
};

use super::{
    broker::Broker,
    relay::Relay,
    server::{self, Ntfy, path_of},
};

/// A real server.
pub(crate) trait Server {
    /// Of its upstream, in the configuration.
    fn kind(&self) -> &'static str;
    /// Where the daemon finds it.
    fn url(&self) -> String;
    /// It dies. Gives nothing up that it had accepted.
    fn kill(&mut self);
    fn start_again(&mut self);
    /// How a sender reaches it, also after it was started again.
    fn sender(&self) -> Connector;
    /// Whether it promises the messages of one registration in the order they were sent.
    fn keeps_order(&self) -> bool;
}

/// Makes a connection of a sender.
pub(crate) type Connector = Box<dyn Fn() -> io::Result<Box<dyn Publish>> + Send>;

/// A connection of a sender.
pub(crate) trait Publish {
    /// Returns when the server has accepted the message.
    fn publish(&mut self, endpoint: &str, body: &[u8]) -> io::Result<()>;
}

impl Server for Ntfy {
    fn kind(&self) -> &'static str {
        "ntfy"
    }

    fn url(&self) -> String {
        Self::url(self)
    }

    fn kill(&mut self) {
        Self::kill(self);
    }

    fn start_again(&mut self) {
        Self::start_again(self);
    }

    fn sender(&self) -> Connector {
        let address = self.address();
        Box::new(move || Ok(Box::new(server::Publisher::to(address)?)))
    }

    /// A replay is sorted by the second, in no order within it.
    fn keeps_order(&self) -> bool {
        false
    }
}

impl Publish for server::Publisher {
    fn publish(&mut self, endpoint: &str, body: &[u8]) -> io::Result<()> {
        Self::publish(self, endpoint, body).map(drop)
    }
}

impl Server for Broker {
    fn kind(&self) -> &'static str {
        "mqtt"
    }

    fn url(&self) -> String {
        format!("mqtt://{}/", self.address())
    }

    /// It is asked to end: mosquitto writes its sessions then and at intervals, so what it accepted since would be lost by
    /// itself if it were killed.
    fn kill(&mut self) {
        self.stop();
    }

    fn start_again(&mut self) {
        Self::start_again(self);
    }

    fn sender(&self) -> Connector {
        let address = self.address();
        Box::new(move || Ok(Box::new(MqttPublisher::to(address)?)))
    }

    /// MQTT 5.0 §4.6.
    fn keeps_order(&self) -> bool {
        true
    }
}

/// The relay with its state on disk.
pub(crate) struct Household {
    relay: Option<Relay>,
    address: String,
    dir: tempfile::TempDir,
}

impl Household {
    pub(crate) fn start_on(host: Ipv4Addr) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let relay = Relay::start_on(&format!("{host}:0"), &["--state-dir", dir.path().to_str().unwrap()]);
        Self { address: relay.address.clone(), relay: Some(relay), dir }
    }
}

impl Server for Household {
    fn kind(&self) -> &'static str {
        "autopush"
    }

    fn url(&self) -> String {
        format!("ws://{}/", self.address)
    }

    fn kill(&mut self) {
        if let Some(relay) = self.relay.take() {
            relay.kill();
        }
    }

    fn start_again(&mut self) {
        self.relay = Some(Relay::start_on(&self.address, &["--state-dir", self.dir.path().to_str().unwrap()]));
    }

    fn sender(&self) -> Connector {
        let address = self.address.parse().unwrap();
        Box::new(move || Ok(Box::new(WebPushSender(connect(address)?))))
    }

    /// A channel's messages are numbered and sent by their number.
    fn keeps_order(&self) -> bool {
        true
    }
}

/// RFC 8030, over one connection.
struct WebPushSender(BufReader<TcpStream>);

impl Publish for WebPushSender {
    fn publish(&mut self, endpoint: &str, body: &[u8]) -> io::Result<()> {
        let (path, length) = (path_of(endpoint), body.len());
        let head = format!("POST /{path} HTTP/1.1\r\nHost: relay\r\nTTL: 600\r\nContent-Length: {length}\r\n\r\n");
        self.0.get_mut().write_all(&[head.as_bytes(), body].concat())?;
        let mut lines = Vec::new();
        loop {
            let mut line = String::new();
            if self.0.read_line(&mut line)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let line = line.trim_end().to_ascii_lowercase();
            if line.is_empty() {
                break;
            }
            lines.push(line);
        }
        let length =
            lines.iter().find_map(|line| line.strip_prefix("content-length:")?.trim().parse().ok()).unwrap_or(0);
        self.0.read_exact(&mut vec![0; length])?;
        match lines.first().and_then(|line| line.split(' ').nth(1)) {
            Some("201") => Ok(()),
            other => Err(io::Error::other(format!("answered {other:?}"))),
        }
    }
}

/// MQTT 3.1.1, as far as publishing with QoS 1 needs it: nothing here is the daemon's own codec.
struct MqttPublisher {
    stream: TcpStream,
    packet: u16,
}

impl MqttPublisher {
    fn to(address: SocketAddr) -> io::Result<Self> {
        let mut stream = connect(address)?.into_inner();
        // A clean session, no keep alive, no client identifier.
        stream.write_all(&[0x10, 12, 0, 4, b'M', b'Q', b'T', b'T', 4, 2, 0, 0, 0, 0])?;
        let mut answer = [0; 4];
        stream.read_exact(&mut answer)?;
        match answer {
            [0x20, 2, 0, 0] => Ok(Self { stream, packet: 0 }),
            _ => Err(io::Error::other(format!("CONNACK {answer:?}"))),
        }
    }
}

impl Publish for MqttPublisher {
    fn publish(&mut self, endpoint: &str, body: &[u8]) -> io::Result<()> {
        let topic = path_of(endpoint);
        self.packet = self.packet % u16::MAX + 1;
        let length = 2 + topic.len() + 2 + body.len();
        assert!(length < 1 << 14, "two bytes of length");
        let mut packet = vec![0x32, (length % 128) as u8 | 0x80, (length / 128) as u8];
        packet.extend((topic.len() as u16).to_be_bytes());
        packet.extend(topic.as_bytes());
        packet.extend(self.packet.to_be_bytes());
        packet.extend(body);
        self.stream.write_all(&packet)?;
        let mut answer = [0; 4];
        self.stream.read_exact(&mut answer)?;
        let [high, low] = self.packet.to_be_bytes();
        match answer == [0x40, 2, high, low] {
            true => Ok(()),
            false => Err(io::Error::other(format!("PUBACK {answer:?}"))),
        }
    }
}

fn connect(address: SocketAddr) -> io::Result<BufReader<TcpStream>> {
    let stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    Ok(BufReader::new(stream))
}
