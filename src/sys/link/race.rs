//! Happy Eyeballs (RFC 8305 §5): one attempt after the other begins, each while the earlier ones go on, and the first to
//! connect wins. A network where one address family leads nowhere then costs a quarter of a second.

use std::{collections::VecDeque, io, net::SocketAddr, time::Duration};

use mio::{Interest, Registry, Token, net::TcpStream};

use crate::time::Instant;

/// From one attempt to the next (RFC 8305 §8, "Connection Attempt Delay").
const DELAY: Duration = Duration::from_millis(250);
/// Attempts under way at most; beyond it the oldest is given up.
const RUNNING: usize = 8;

/// What the loop knows and a link does not.
#[derive(Clone, Copy)]
pub(in crate::sys) struct Context<'a> {
    pub(in crate::sys) registry: &'a Registry,
    pub(in crate::sys) token: Token,
    pub(in crate::sys) now: Instant,
}

#[derive(Debug)]
pub(in crate::sys) struct Race {
    waiting: VecDeque<SocketAddr>,
    /// The oldest first. All have the link's one token.
    running: VecDeque<(SocketAddr, TcpStream)>,
    next_at: Option<Instant>,
    /// What the addresses tried so far said, for the case that none answers.
    last_error: Option<(SocketAddr, io::Error)>,
}

/// Why nobody won.
#[derive(Debug)]
pub(in crate::sys) enum Lost {
    NoAddress,
    Failed(SocketAddr, io::Error),
}

impl Race {
    pub(in crate::sys) fn new(addresses: Vec<SocketAddr>) -> Self {
        Self { waiting: interleave(addresses), running: VecDeque::new(), next_at: None, last_error: None }
    }

    /// When the next attempt is due.
    pub(in crate::sys) const fn deadline(&self) -> Option<Instant> {
        self.next_at
    }

    /// Looks who is there and begins what is due: the winner, registered with the link's token, or `None` for now.
    pub(in crate::sys) fn drive(&mut self, context: Context<'_>) -> Result<Option<TcpStream>, Lost> {
        for _ in 0..self.running.len() {
            let Some((address, mut socket)) = self.running.pop_front() else { break };
            match connected(&socket) {
                Ok(true) => {
                    self.close(context.registry);
                    return Ok(Some(socket));
                }
                Ok(false) => self.running.push_back((address, socket)),
                Err(error) => {
                    // Closing it would do as well; the event queue is told for certain.
                    let _ = context.registry.deregister(&mut socket);
                    self.last_error = Some((address, error));
                    self.next_at = Some(context.now);
                }
            }
        }
        self.begin(context)
    }

    pub(in crate::sys) fn close(&mut self, registry: &Registry) {
        for (_, mut socket) in self.running.drain(..) {
            let _ = registry.deregister(&mut socket);
        }
        self.waiting.clear();
        self.next_at = None;
    }

    fn begin(&mut self, context: Context<'_>) -> Result<Option<TcpStream>, Lost> {
        while self.running.is_empty() || self.next_at.is_some_and(|at| at <= context.now) {
            let Some(address) = self.waiting.pop_front() else { break };
            match start(context, address) {
                Ok(socket) => {
                    self.running.push_back((address, socket));
                    self.next_at = Some(context.now + DELAY);
                }
                Err(error) => self.last_error = Some((address, error)),
            }
            if self.running.len() > RUNNING
                && let Some((address, mut socket)) = self.running.pop_front()
            {
                let _ = context.registry.deregister(&mut socket);
                self.last_error = Some((address, io::ErrorKind::TimedOut.into()));
            }
        }
        if self.waiting.is_empty() {
            self.next_at = None;
            if self.running.is_empty() {
                return Err(self.last_error.take().map_or(Lost::NoAddress, |(at, error)| Lost::Failed(at, error)));
            }
        }
        Ok(None)
    }
}

fn start(context: Context<'_>, address: SocketAddr) -> io::Result<TcpStream> {
    let mut socket = TcpStream::connect(address)?;
    socket.set_nodelay(true)?;
    context.registry.register(&mut socket, context.token, Interest::READABLE | Interest::WRITABLE)?;
    Ok(socket)
}

/// As mio's `TcpStream::connect` says to find out.
fn connected(socket: &TcpStream) -> io::Result<bool> {
    if let Some(error) = socket.take_error()? {
        return Err(error);
    }
    match socket.peer_addr() {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(false),
        Err(error) => Err(error),
    }
}

/// Alternates the address families, beginning with the resolver's first choice.
fn interleave(addresses: Vec<SocketAddr>) -> VecDeque<SocketAddr> {
    let first_is_v6 = addresses.first().is_some_and(SocketAddr::is_ipv6);
    let (mut one, mut other): (VecDeque<_>, VecDeque<_>) =
        addresses.into_iter().partition(|address| address.is_ipv6() == first_is_v6);
    let mut mixed = VecDeque::with_capacity(one.len() + other.len());
    while let Some(address) = one.pop_front().or_else(|| other.pop_front()) {
        mixed.push_back(address);
        mixed.extend(other.pop_front());
    }
    mixed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_alternate() {
        let parse = |text: &str| text.parse::<SocketAddr>().unwrap();
        let (a, b, c, d) = (parse("[::1]:1"), parse("[::2]:1"), parse("1.1.1.1:1"), parse("2.2.2.2:1"));
        assert_eq!(interleave(vec![a, b, c, d]), [a, c, b, d]);
        assert_eq!(interleave(vec![c, d, a]), [c, a, d]);
        assert_eq!(interleave(vec![c, a, b]), [c, a, b]);
        assert!(interleave(Vec::new()).is_empty());
    }
}
