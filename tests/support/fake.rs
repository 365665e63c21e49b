//! A push server played by the test, for what a real one does not do on demand.

use std::{
    io::{self, BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
};

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use serde_json::{Value, json};
use tungstenite::{
    Message, WebSocket,
    handshake::server::{Request, Response},
    protocol::CloseFrame,
};

use super::{PATIENCE, wait};

/// Listens for the daemon.
pub(crate) struct Fake(TcpListener);

impl Fake {
    pub(crate) fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        Self(listener)
    }

    pub(crate) fn url(&self) -> String {
        format!("ws://{}/", self.0.local_addr().unwrap())
    }

    /// The daemon's next connection.
    pub(crate) fn accept(&self) -> Peer {
        wait("the daemon to connect", || self.try_accept())
    }

    fn try_accept(&self) -> Option<Peer> {
        let stream = match self.0.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
            Err(error) => panic!("{error}"),
        };
        stream.set_nonblocking(false).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut authorization = None;
        #[expect(clippy::result_large_err, reason = "tungstenite's type")]
        let look = |request: &Request, response: Response| {
            authorization = request.headers().get("authorization").map(|value| value.to_str().unwrap().to_owned());
            Ok(response)
        };
        let socket = tungstenite::accept_hdr(stream, look).ok()?;
        Some(Peer { socket, authorization })
    }

    /// Answers the daemon's next connection with this status.
    pub(crate) fn refuse(&self, status: &str) {
        let mut stream = wait("the daemon to connect", || self.0.accept().ok()).0;
        stream.set_nonblocking(false).unwrap();
        let mut head = BufReader::new(stream.try_clone().unwrap()).lines();
        while head.next().unwrap().unwrap() != "" {}
        write!(stream, "HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").unwrap();
    }
}

/// One connection of the daemon.
pub(crate) struct Peer {
    socket: WebSocket<TcpStream>,
    /// The header of this name.
    pub(crate) authorization: Option<String>,
}

impl Peer {
    /// Takes the daemon's hello and answers it; gives back the uaid the daemon had.
    pub(crate) fn hello(&mut self, uaid: &str) -> Option<String> {
        let hello = self.receive();
        assert_eq!((&hello["messageType"], &hello["use_webpush"]), (&json!("hello"), &json!(true)), "{hello}");
        self.send(&json!({
            "messageType": "hello", "uaid": uaid, "status": 200, "use_webpush": true, "broadcasts": {}
        }));
        hello["uaid"].as_str().map(str::to_owned)
    }

    /// Takes a registration and answers it; gives back the channel.
    pub(crate) fn register(&mut self, endpoint: &str) -> String {
        let register = self.receive();
        assert_eq!(register["messageType"], "register", "{register}");
        let channel = register["channelID"].as_str().unwrap().to_owned();
        self.send(&json!({
            "messageType": "register", "channelID": channel, "status": 200, "pushEndpoint": endpoint
        }));
        channel
    }

    pub(crate) fn notify(&mut self, channel: &str, version: &str, body: &str) {
        let data = BASE64_URL_SAFE_NO_PAD.encode(body);
        self.send(&json!({ "messageType": "notification", "channelID": channel, "version": version, "data": data }));
    }

    /// The versions of the next acknowledgement.
    pub(crate) fn ack(&mut self) -> Vec<String> {
        let ack = self.receive();
        assert_eq!(ack["messageType"], "ack", "{ack}");
        let updates = ack["updates"].as_array().unwrap();
        updates.iter().map(|update| update["version"].as_str().unwrap().to_owned()).collect()
    }

    pub(crate) fn send(&mut self, frame: &Value) {
        self.send_text(&frame.to_string());
    }

    pub(crate) fn send_text(&mut self, text: &str) {
        // A daemon that has hung up is looked at by whoever expects it to.
        let _ = self.socket.send(Message::text(text));
    }

    pub(crate) fn receive(&mut self) -> Value {
        loop {
            match self.socket.read().unwrap() {
                Message::Text(text) => return serde_json::from_str(&text).unwrap(),
                Message::Ping(_) | Message::Pong(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    /// Closes the connection in order.
    pub(crate) fn close(mut self, code: u16, reason: &'static str) {
        let _ = self.socket.close(Some(CloseFrame { code: code.into(), reason: reason.into() }));
        assert!(self.leaves());
    }

    /// Reads until the daemon has gone; whether it goes.
    pub(crate) fn leaves(mut self) -> bool {
        loop {
            match self.socket.read() {
                Ok(_) => {}
                Err(tungstenite::Error::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => return false,
                Err(_) => return true,
            }
        }
    }
}
