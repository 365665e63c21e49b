//! A mio TCP stream, plain or under rustls, as the nonblocking `Read + Write` that tungstenite wants.

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
    socket: TcpStream,
    tls: Option<Box<ClientConnection>>,
    allowance: usize,
    throttled: bool,
}

impl Transport {
    pub(super) const fn plain(socket: TcpStream) -> Self {
        Self { socket, tls: None, allowance: ALLOWANCE, throttled: false }
    }

    pub(super) fn tls(
        socket: TcpStream,
        config: Arc<ClientConfig>,
        name: ServerName<'static>,
    ) -> Result<Self, rustls::Error> {
        let mut tls = ClientConnection::new(config, name)?;
        tls.set_buffer_limit(Some(TLS_BUFFER));
        Ok(Self { socket, tls: Some(Box::new(tls)), allowance: ALLOWANCE, throttled: false })
    }

    pub(super) const fn socket(&mut self) -> &mut TcpStream {
        &mut self.socket
    }

    pub(super) fn handshaking(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.is_handshaking())
    }

    /// Whether rustls has something for the wire that did not go out yet.
    pub(super) fn wants_write(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.wants_write())
    }

    /// A new turn of the loop begins.
    pub(super) const fn refill(&mut self) {
        self.allowance = ALLOWANCE;
        self.throttled = false;
    }

    /// Whether the last `WouldBlock` was ours, not the socket's: then there is more to read without a new readiness.
    pub(super) const fn throttled(&self) -> bool {
        self.throttled
    }

    /// Says goodbye as far as that goes without waiting.
    pub(super) fn shutdown(&mut self) {
        if let Some(tls) = &mut self.tls {
            tls.send_close_notify();
        }
        // Best effort: nobody waits for it.
        let _ = self.flush();
        let _ = self.socket.shutdown(std::net::Shutdown::Write);
    }
}

impl Read for Transport {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if let Some(tls) = &mut self.tls {
                match tls.reader().read(buffer) {
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    // An end without close_notify: the WebSocket layer tells whole from cut off by itself.
                    Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(0),
                    done => return done,
                }
            }
            if self.allowance == 0 {
                self.throttled = true;
                return Err(ErrorKind::WouldBlock.into());
            }
            let Some(tls) = &mut self.tls else {
                let length = buffer.len().min(self.allowance);
                let read = retry(|| self.socket.read(&mut buffer[..length]))?;
                self.allowance -= read;
                return Ok(read);
            };
            let read = retry(|| tls.read_tls(&mut self.socket))?;
            self.allowance = self.allowance.saturating_sub(read);
            let processed = tls.process_new_packets();
            // Handshake messages, key updates, alerts. What does not go out now goes with the next flush, and a dead
            // socket shows when it is read.
            let _ = push(tls, &mut self.socket);
            processed.map_err(|error| io::Error::new(ErrorKind::InvalidData, error))?;
        }
    }
}

impl Write for Transport {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let Some(tls) = &mut self.tls else { return retry(|| self.socket.write(buffer)) };
        let mut written = tls.writer().write(buffer)?;
        if written == 0 && !buffer.is_empty() {
            push(tls, &mut self.socket)?;
            written = tls.writer().write(buffer)?;
            if written == 0 {
                return Err(ErrorKind::WouldBlock.into());
            }
        }
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        match &mut self.tls {
            Some(tls) => push(tls, &mut self.socket),
            None => Ok(()),
        }
    }
}

fn push(tls: &mut ClientConnection, socket: &mut TcpStream) -> io::Result<()> {
    while tls.wants_write() {
        if retry(|| tls.write_tls(socket))? == 0 {
            return Err(ErrorKind::WriteZero.into());
        }
    }
    Ok(())
}

fn retry(mut operation: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match operation() {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            done => return done,
        }
    }
}
