//! Name resolution for ureq, which tries one address after the other and gives the first half of its time.

use std::{io, net::SocketAddr, time::Duration};

use http::Uri;
use mio::{Events, Poll, Token};
use ureq::{
    Error,
    config::Config,
    unversioned::{
        resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver},
        transport::NextTimeout,
    },
};

use crate::{
    sys::{
        clock,
        link::race::{Context, Race},
    },
    time::Instant,
};

/// For the name to be resolved and one of the addresses to answer.
const LIMIT: Duration = Duration::from_secs(5);

/// Puts the address first that connects first (Happy Eyeballs), where there are two families to choose from.
#[derive(Debug, Default)]
pub(in crate::sys) struct Eyeballs {
    plain: DefaultResolver,
}

impl Resolver for Eyeballs {
    fn resolve(&self, uri: &Uri, config: &Config, timeout: NextTimeout) -> Result<ResolvedSocketAddrs, Error> {
        let limit = clock::boot() + LIMIT.min(*timeout.after);
        let mut found = self.plain.resolve(uri, config, timeout)?;
        let addresses: Vec<SocketAddr> = found.iter().copied().collect();
        let mixed = addresses.iter().any(SocketAddr::is_ipv4) && addresses.iter().any(SocketAddr::is_ipv6);
        let first = if mixed { quickest(addresses, limit) } else { None };
        if let Some(place) = first.and_then(|first| found.iter().position(|address| *address == first)) {
            found.swap(0, place);
        }
        Ok(found)
    }
}

/// The address that connects first, if any does in time.
fn quickest(addresses: Vec<SocketAddr>, deadline: Instant) -> Option<SocketAddr> {
    let mut poll = Poll::new().ok()?;
    let mut events = Events::with_capacity(8);
    let mut race = Race::new(addresses);
    loop {
        let now = clock::boot();
        if now >= deadline {
            return None;
        }
        match race.drive(Context { registry: poll.registry(), token: Token(0), now }) {
            Ok(Some(socket)) => return socket.peer_addr().ok(),
            Ok(None) => {}
            Err(_) => return None,
        }
        let next = race.deadline().map_or(deadline, |next| next.min(deadline));
        // Rounded up: a wait that ends too early would spin.
        let wait = next.since(now) + Duration::from_millis(1);
        match poll.poll(&mut events, Some(wait)) {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => return None,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener};

    use super::*;

    /// An address that answers no SYN: a listener whose backlog is full.
    fn silent() -> (SocketAddr, (TcpListener, Vec<mio::net::TcpStream>)) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(1).unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        let held = (0..8).map(|_| mio::net::TcpStream::connect(address).unwrap()).collect();
        (address, (listener, held))
    }

    #[test]
    fn the_first_to_answer_is_found_and_silence_ends() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let good = listener.local_addr().unwrap();
        let refusing = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
        let (black, _held) = silent();
        let later = || clock::boot() + Duration::from_secs(20);
        assert_eq!(quickest(vec![black, refusing, good], later()), Some(good));
        assert_eq!(quickest(vec![refusing], later()), None);
        let brief = clock::boot() + Duration::from_millis(50);
        assert_eq!(quickest(vec![black], brief), None);
        assert!(clock::boot() >= brief);
    }
}
