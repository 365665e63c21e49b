//! A mio TCP stream, plain, under rustls, or under rustls within rustls (an encrypted proxy), as the nonblocking
//! `Read + Write` that the protocols want.

use std::{
    io::{self, ErrorKind, Read, Write},
    sync::Arc,
};

use mio::net::TcpStream;
use rustls::{ClientConfig, ClientConnection, pki_types::ServerName};

/// What rustls may hold for a peer that does not read, per direction of its pipeline. A record is at most 16 KiB.
const TLS_BUFFER: usize = 32 * 1024;
/// Bytes taken off the socket between two [`Transport::refill`]s: a peer that floods us with fragments that never make
/// a message must not keep the loop.
const ALLOWANCE: usize = 64 * 1024;

#[derive(Debug)]
pub(super) struct Transport {
    stream: Stream,
}

impl Transport {
    pub(super) const fn plain(socket: TcpStream) -> Self {
        Self { stream: Stream::Wire(Wire { socket, allowance: ALLOWANCE, throttled: false }) }
    }

    /// The same with TLS on top of what there is.
    pub(super) fn secure(self, config: Arc<ClientConfig>, name: ServerName<'static>) -> Result<Self, rustls::Error> {
        let mut tls = ClientConnection::new(config, name)?;
        tls.set_buffer_limit(Some(TLS_BUFFER));
        Ok(Self { stream: Stream::Tls(Box::new(Layer { tls, below: self.stream })) })
    }

    pub(super) const fn socket(&mut self) -> &mut TcpStream {
        &mut self.wire().socket
    }

    /// Goes on with the TLS handshake, if there is one: whether it is over.
    pub(super) fn handshake(&mut self) -> io::Result<bool> {
        match &mut self.stream {
            Stream::Wire(_) => Ok(true),
            Stream::Tls(layer) => layer.handshake(),
        }
    }

    pub(super) fn handshaking(&self) -> bool {
        self.layers().any(|layer| layer.tls.is_handshaking())
    }

    /// Whether rustls has something for the wire that did not go out yet.
    pub(super) fn wants_write(&self) -> bool {
        self.layers().any(|layer| layer.tls.wants_write())
    }

    /// A new turn of the loop begins.
    pub(super) const fn refill(&mut self) {
        let wire = self.wire();
        wire.allowance = ALLOWANCE;
        wire.throttled = false;
    }

    /// Whether the last `WouldBlock` was ours, not the socket's: then there is more to read without a new readiness.
    pub(super) fn throttled(&mut self) -> bool {
        self.wire().throttled
    }

    /// Says goodbye as far as that goes without waiting.
    pub(super) fn shutdown(&mut self) {
        if let Stream::Tls(layer) = &mut self.stream {
            layer.tls.send_close_notify();
        }
        // Best effort: nobody waits for it.
        let _ = self.flush();
        let _ = self.socket().shutdown(std::net::Shutdown::Write);
    }

    const fn wire(&mut self) -> &mut Wire {
        let mut stream = &mut self.stream;
        loop {
            match stream {
                Stream::Wire(wire) => return wire,
                Stream::Tls(layer) => stream = &mut layer.below,
            }
        }
    }

    fn layers(&self) -> impl Iterator<Item = &Layer> {
        let below = |stream| match stream {
            &Stream::Wire(_) => None,
            Stream::Tls(layer) => Some(&**layer),
        };
        std::iter::successors(below(&self.stream), move |layer| below(&layer.below))
    }
}

impl Read for Transport {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.read(buffer)
    }
}

impl Write for Transport {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.stream.write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

#[derive(Debug)]
enum Stream {
    Wire(Wire),
    Tls(Box<Layer>),
}

#[derive(Debug)]
struct Wire {
    socket: TcpStream,
    allowance: usize,
    throttled: bool,
}

#[derive(Debug)]
struct Layer {
    tls: ClientConnection,
    below: Stream,
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Wire(wire) => wire.read(buffer),
            Self::Tls(layer) => layer.read(buffer),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        match self {
            Self::Wire(wire) => retry(|| wire.socket.write(buffer)),
            Self::Tls(layer) => layer.write(buffer),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Wire(_) => Ok(()),
            Self::Tls(layer) => layer.push(),
        }
    }
}

impl Wire {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.allowance == 0 {
            self.throttled = true;
            return Err(ErrorKind::WouldBlock.into());
        }
        let length = buffer.len().min(self.allowance);
        let read = retry(|| self.socket.read(&mut buffer[..length]))?;
        self.allowance -= read;
        Ok(read)
    }
}

impl Layer {
    fn handshake(&mut self) -> io::Result<bool> {
        while self.tls.is_handshaking() {
            match self.push() {
                Err(error) if error.kind() != ErrorKind::WouldBlock => return Err(error),
                _ => {}
            }
            match self.pull() {
                Ok(0) => {
                    let text = "the server closed it during the TLS handshake";
                    return Err(io::Error::new(ErrorKind::UnexpectedEof, text));
                }
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        match self.push() {
            Err(error) if error.kind() != ErrorKind::WouldBlock => Err(error),
            _ => Ok(true),
        }
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.tls.reader().read(buffer) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                // An end without close_notify: the protocol above tells whole from cut off by itself.
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(0),
                done => return done,
            }
            self.pull()?;
        }
    }

    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let mut written = self.tls.writer().write(buffer)?;
        if written == 0 && !buffer.is_empty() {
            self.push()?;
            written = self.tls.writer().write(buffer)?;
            if written == 0 {
                return Err(ErrorKind::WouldBlock.into());
            }
        }
        Ok(written)
    }

    /// Takes in what is there.
    fn pull(&mut self) -> io::Result<usize> {
        let read = self.tls.read_tls(&mut self.below)?;
        let processed = self.tls.process_new_packets();
        // Handshake messages, key updates, alerts. What does not go out now goes with the next flush, and a dead socket
        // shows when it is read.
        let _ = self.push();
        processed.map_err(|error| io::Error::new(ErrorKind::InvalidData, error))?;
        Ok(read)
    }

    /// Hands down what there is.
    fn push(&mut self) -> io::Result<()> {
        while self.tls.wants_write() {
            if self.tls.write_tls(&mut self.below)? == 0 {
                return Err(ErrorKind::WriteZero.into());
            }
        }
        self.below.flush()
    }
}

fn retry(mut operation: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match operation() {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            done => return done,
        }
    }
}
