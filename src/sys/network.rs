//! Network return, by rtnetlink.
//!
//! Told apart from what is only refreshed: router advertisements and DHCP renewals announce addresses anew every few
//! minutes, and each would otherwise count as a return. So what is there is remembered, read once at the start.

use std::{
    collections::BTreeSet,
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use mio::{Interest, Registry, Token, event::Source, unix::SourceFd};
use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recvfrom, send, setsockopt,
        socket, sockopt,
    },
};

/// Watches for addresses and default routes. Becomes readable when the kernel has something to say.
#[derive(Debug)]
pub struct Monitor {
    socket: OwnedFd,
    known: Known,
    /// What is still to be asked for, last first.
    questions: Vec<u16>,
}

/// Datagrams read per [`Monitor::drain`]; more than the kernel's buffer holds.
const TURNS: usize = 4096;
/// The kernel's receive buffer: enough for what arrives while an interface comes up. Charged only while in use.
const RECEIVE_BUFFER: usize = 128 * 1024;

impl Monitor {
    /// Watches from now on; `None`, said in the log, where the system does not let us: the daemon then has its timers
    /// only, which is no reason to end.
    pub fn new() -> Option<Self> {
        Self::open()
            .inspect_err(|error| {
                log::warn!("cannot watch the network ({error}); its return is noticed at the next attempt only");
            })
            .ok()
    }

    fn open() -> io::Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            SockProtocol::NetlinkRoute,
        )?;
        setsockopt(&socket, sockopt::RcvBuf, &RECEIVE_BUFFER)?;
        let groups = libc::RTMGRP_LINK
            | libc::RTMGRP_IPV4_IFADDR
            | libc::RTMGRP_IPV6_IFADDR
            | libc::RTMGRP_IPV4_ROUTE
            | libc::RTMGRP_IPV6_ROUTE;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, groups.cast_unsigned()))?;
        let mut monitor = Self {
            socket,
            known: Known::default(),
            questions: vec![libc::RTM_GETROUTE, libc::RTM_GETADDR, libc::RTM_GETLINK],
        };
        monitor.ask();
        Ok(monitor)
    }

    /// Whether an address or a default route came, or an interface with an address is connected again. To be called
    /// when it is readable; the core joins several in a row into one.
    pub fn drain(&mut self) -> bool {
        let mut came = false;
        let mut buffer = [0; 16 * 1024];
        for _ in 0..TURNS {
            match recvfrom::<NetlinkAddr>(self.socket.as_raw_fd(), &mut buffer) {
                // Port 0 is the kernel.
                Ok((length, Some(sender))) if sender.pid() == 0 => {
                    let seen = self.known.take(buffer.get(..length).unwrap_or_default());
                    came |= seen.came;
                    if seen.done {
                        self.ask();
                    }
                }
                Ok(_) | Err(Errno::EINTR) => {}
                // Messages were lost: something happened, and nobody knows what.
                Err(Errno::ENOBUFS) => came = true,
                Err(_) => break,
            }
        }
        came
    }

    /// Asks the kernel for the next thing; it answers one dump at a time.
    fn ask(&mut self) {
        let Some(question) = self.questions.pop() else { return };
        // With another length the kernel complains of leftover bytes in its log.
        let length = HEADER
            + match question {
                libc::RTM_GETADDR => ADDRESS_BODY,
                libc::RTM_GETROUTE => ROUTE_BODY,
                _ => LINK_BODY,
            };
        let mut message = Vec::with_capacity(length);
        message.extend_from_slice(&(length as u32).to_ne_bytes());
        message.extend_from_slice(&question.to_ne_bytes());
        message.extend_from_slice(&((libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16).to_ne_bytes());
        message.resize(length, 0);
        if let Err(error) = send(self.socket.as_raw_fd(), &message, MsgFlags::empty()) {
            // Then the first refresh of an address counts as a return: one attempt too many.
            log::debug!("cannot read the network's present state: {error}");
        }
    }
}

impl Source for Monitor {
    fn register(&mut self, registry: &Registry, token: Token, interests: Interest) -> io::Result<()> {
        SourceFd(&self.socket.as_raw_fd()).register(registry, token, interests)
    }

    fn reregister(&mut self, registry: &Registry, token: Token, interests: Interest) -> io::Result<()> {
        SourceFd(&self.socket.as_raw_fd()).reregister(registry, token, interests)
    }

    fn deregister(&mut self, registry: &Registry) -> io::Result<()> {
        SourceFd(&self.socket.as_raw_fd()).deregister(registry)
    }
}

/// `struct nlmsghdr`.
const HEADER: usize = 16;
/// `struct ifaddrmsg`.
const ADDRESS_BODY: usize = 8;
/// `struct rtmsg`.
const ROUTE_BODY: usize = 12;
/// `struct ifinfomsg`.
const LINK_BODY: usize = 16;
/// Things remembered at most; a machine with more has other worries, and a refresh then counts as a return.
const BOUND: usize = 1024;

// linux/rtnetlink.h and linux/if_addr.h.
const SCOPE_UNIVERSE: u8 = 0;
const SCOPE_SITE: u8 = 200;
const FLAG_TEMPORARY: u8 = 0x01;
const FLAG_UNUSABLE: u8 = 0x40 | 0x08;
const ATTRIBUTE_ADDRESS: u16 = 1;
const ATTRIBUTE_LOCAL: u16 = 2;
const ATTRIBUTE_OUT_INTERFACE: u16 = 4;
const ATTRIBUTE_GATEWAY: u16 = 5;
const TABLE_LOCAL: u8 = 255;
const TYPE_UNICAST: u8 = 1;
const ROUTE_CLONED: u32 = 0x200;

/// What the network has.
#[derive(Debug, Default)]
struct Known {
    /// Interface and address.
    addresses: BTreeSet<(u32, Vec<u8>)>,
    /// Family, table, gateway, interface: default routes only.
    routes: BTreeSet<(u8, u8, Vec<u8>, Vec<u8>)>,
    /// Interfaces with a carrier.
    connected: BTreeSet<u32>,
}

/// What a datagram said.
#[derive(Debug, Default, PartialEq, Eq)]
struct Seen {
    came: bool,
    done: bool,
}

impl Known {
    fn take(&mut self, mut bytes: &[u8]) -> Seen {
        let mut seen = Seen::default();
        while let Some(length) = word(bytes, 0).map(|n| n as usize).filter(|n| (HEADER..=bytes.len()).contains(n)) {
            let (kind, flags) = (half(bytes, 4).unwrap_or(0), half(bytes, 6).unwrap_or(0));
            let body = bytes.get(HEADER..length).unwrap_or_default();
            // A part of a dump says what is there, not what came.
            let news = i32::from(flags) & libc::NLM_F_MULTI == 0;
            seen.done |= i32::from(kind) == libc::NLMSG_DONE || i32::from(kind) == libc::NLMSG_ERROR;
            seen.came |= self.message(kind, body) && news;
            bytes = bytes.get(align(length)..).unwrap_or_default();
        }
        seen
    }

    /// Whether something new came.
    fn message(&mut self, kind: u16, body: &[u8]) -> bool {
        match kind {
            libc::RTM_NEWADDR => address(body).is_some_and(|address| insert(&mut self.addresses, address)),
            libc::RTM_DELADDR => {
                forget(&mut self.addresses, address(body));
                false
            }
            libc::RTM_NEWROUTE => default_route(body).is_some_and(|route| insert(&mut self.routes, route)),
            libc::RTM_DELROUTE => {
                forget(&mut self.routes, default_route(body));
                false
            }
            libc::RTM_NEWLINK => self.link(body).unwrap_or(false),
            libc::RTM_DELLINK => {
                forget(&mut self.connected, word(body, 4));
                false
            }
            _ => false,
        }
    }

    /// A cable plugged in again brings no address where the old one was kept.
    fn link(&mut self, body: &[u8]) -> Option<bool> {
        let (index, flags) = (word(body, 4)?, word(body, 8)?);
        if body.len() < LINK_BODY {
            return None;
        }
        if flags & libc::IFF_LOWER_UP.cast_unsigned() == 0 {
            self.connected.remove(&index);
            return Some(false);
        }
        let addressed = self.addresses.range((index, Vec::new())..).next().is_some_and(|(i, _)| *i == index);
        Some(insert(&mut self.connected, index) && addressed)
    }
}

fn insert<T: Ord>(set: &mut BTreeSet<T>, item: T) -> bool {
    if set.len() >= BOUND {
        return !set.contains(&item);
    }
    set.insert(item)
}

fn forget<T: Ord>(set: &mut BTreeSet<T>, item: Option<T>) {
    if let Some(item) = item {
        set.remove(&item);
    }
}

/// An address that can reach a server: not a loopback or link-local one, not one still being checked for duplicates,
/// nor a privacy address, which comes daily beside a permanent one.
fn address(body: &[u8]) -> Option<(u32, Vec<u8>)> {
    let (flags, scope) = (*body.get(2)?, *body.get(3)?);
    let family = i32::from(*body.first()?);
    if !matches!(scope, SCOPE_UNIVERSE | SCOPE_SITE)
        || (family == libc::AF_INET6 && flags & (FLAG_TEMPORARY | FLAG_UNUSABLE) != 0)
    {
        return None;
    }
    let attributes = body.get(ADDRESS_BODY..)?;
    // On a point-to-point link IFA_ADDRESS is the peer's.
    let own = attribute(attributes, ATTRIBUTE_LOCAL).or_else(|| attribute(attributes, ATTRIBUTE_ADDRESS))?;
    Some((word(body, 4)?, own.to_vec()))
}

fn default_route(body: &[u8]) -> Option<(u8, u8, Vec<u8>, Vec<u8>)> {
    let (family, prefix, table, kind) = (*body.first()?, *body.get(1)?, *body.get(4)?, *body.get(7)?);
    if prefix != 0 || table == TABLE_LOCAL || kind != TYPE_UNICAST || word(body, 8)? & ROUTE_CLONED != 0 {
        return None;
    }
    let attributes = body.get(ROUTE_BODY..)?;
    let part = |kind| attribute(attributes, kind).unwrap_or_default().to_vec();
    Some((family, table, part(ATTRIBUTE_GATEWAY), part(ATTRIBUTE_OUT_INTERFACE)))
}

fn attribute(mut bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let (length, kind) = (usize::from(half(bytes, 0)?), half(bytes, 2)?);
        let value = bytes.get(4..length)?;
        if kind == wanted {
            return Some(value);
        }
        bytes = bytes.get(align(length)..)?;
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

const fn align(length: usize) -> usize {
    length.next_multiple_of(4)
}

#[cfg(test)]
mod tests {
    use std::{process::Command, time::Duration};

    use mio::{Events, Poll};

    use super::*;

    /// Set in the process that a test starts of itself.
    const CHILD: &str = "NIGHTPORTER_NETWORK_TEST_CHILD";

    fn message(kind: u16, flags: u16, body: &[u8]) -> Vec<u8> {
        let mut bytes = ((HEADER + body.len()) as u32).to_ne_bytes().to_vec();
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&flags.to_ne_bytes());
        bytes.extend_from_slice(&[0; 8]);
        bytes.extend_from_slice(body);
        bytes
    }

    fn address_body(scope: u8, flags: u8, last: u8) -> Vec<u8> {
        let mut body = vec![libc::AF_INET6 as u8, 64, flags, scope];
        body.extend_from_slice(&2_u32.to_ne_bytes());
        body.extend_from_slice(&8_u16.to_ne_bytes());
        body.extend_from_slice(&ATTRIBUTE_ADDRESS.to_ne_bytes());
        body.extend_from_slice(&[0xfd, 0, 0, last]);
        body
    }

    const NEW: Seen = Seen { came: true, done: false };
    const OLD: Seen = Seen { came: false, done: false };

    #[test]
    fn an_address_counts_when_it_is_new_and_again_after_it_was_gone() {
        let mut known = Known::default();
        let new = message(libc::RTM_NEWADDR, 0, &address_body(0, 0, 1));
        assert_eq!(known.take(&new), NEW);
        assert_eq!(known.take(&new), OLD, "a refresh is no return");
        assert_eq!(known.take(&message(libc::RTM_DELADDR, 0, &address_body(0, 0, 1))), OLD);
        assert_eq!(known.take(&new), NEW);
        // Two messages in one datagram: an old one and a new one.
        let both = [new, message(libc::RTM_NEWADDR, 0, &address_body(0, 0, 2))].concat();
        assert_eq!(known.take(&both), NEW);
    }

    #[test]
    fn what_reaches_no_server_or_was_there_before_does_not_count() {
        let mut known = Known::default();
        for (scope, flags) in [(253, 0), (254, 0), (0, FLAG_TEMPORARY), (0, 0x40)] {
            assert_eq!(known.take(&message(libc::RTM_NEWADDR, 0, &address_body(scope, flags, 1))), OLD);
        }
        let dump = libc::NLM_F_MULTI as u16;
        assert_eq!(known.take(&message(libc::RTM_NEWADDR, dump, &address_body(0, 0, 1))), OLD);
        assert_eq!(known.take(&message(libc::RTM_NEWADDR, 0, &address_body(0, 0, 1))), OLD);
    }

    #[test]
    fn broken_messages_are_passed_over() {
        let mut known = Known::default();
        let good = message(libc::RTM_NEWADDR, 0, &address_body(0, 0, 1));
        for cut in 0..good.len() {
            assert_eq!(known.take(&good[..cut]), OLD);
        }
        // Lengths of zero, in the header and in an attribute, must not turn in circles.
        assert_eq!(known.take(&[0; 64]), OLD);
        let mut zero = address_body(0, 0, 1);
        zero[8..10].copy_from_slice(&[0, 0]);
        assert_eq!(known.take(&message(libc::RTM_NEWADDR, 0, &zero)), OLD);
        assert_eq!(known.take(&message(libc::RTM_NEWROUTE, 0, &[2])), OLD);
        assert_eq!(known.take(&message(libc::RTM_NEWLINK, 0, &[0; 5])), OLD);
    }

    /// The kernel's own messages, in a network namespace of the test's own.
    #[test]
    fn the_kernel_tells_of_addresses_and_default_routes() {
        if std::env::var_os(CHILD).is_some() {
            return inside_a_namespace();
        }
        let test = std::env::current_exe().unwrap();
        let unshare = if nix::unistd::geteuid().is_root() { "-n" } else { "-Urn" };
        let output = Command::new("unshare")
            .args([unshare, "--"])
            .arg(test)
            .env(CHILD, "1")
            .args(["--exact", "sys::network::tests::the_kernel_tells_of_addresses_and_default_routes", "--nocapture"])
            .output()
            .expect("unshare (util-linux)");
        let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && text.contains("1 passed"), "{text}");
    }

    fn inside_a_namespace() {
        ip("link set lo up");
        ip("link add first type veth peer name second");
        ip("link set second up");
        ip("link set first up");
        ip("address add 10.9.0.1/24 dev first");
        let mut poll = Poll::new().unwrap();
        let mut monitor = Monitor::new().unwrap();
        poll.registry().register(&mut monitor, Token(0), Interest::READABLE).unwrap();
        let mut after = |arguments: &str| {
            if !arguments.is_empty() {
                ip(arguments);
            }
            // Until the kernel has been silent for a while.
            let mut came = false;
            let mut events = Events::with_capacity(8);
            loop {
                poll.poll(&mut events, Some(Duration::from_millis(150))).unwrap();
                if events.is_empty() {
                    return came;
                }
                came |= monitor.drain();
            }
        };
        for (arguments, expected) in [
            ("", false),
            ("address change 10.9.0.1/24 dev first valid_lft 600 preferred_lft 600", false),
            ("address add 10.9.0.2/24 dev first", true),
            ("address del 10.9.0.2/24 dev first", false),
            ("address add 127.9.9.9/8 dev lo", false),
            ("route add 10.77.0.0/16 via 10.9.0.9", false),
            ("route add default via 10.9.0.9", true),
            ("route del default", false),
            ("-6 address add fd00::9/64 dev first nodad", true),
            ("-6 route add default via fd00::1", true),
            // Pulling the cable keeps the address; plugging it in is a return.
            ("link set second down", false),
            ("link set second up", true),
        ] {
            assert_eq!(after(arguments), expected, "ip {arguments}");
        }
    }

    fn ip(arguments: &str) {
        let status = Command::new("ip").args(arguments.split(' ')).status().expect("ip (iproute2)");
        assert!(status.success(), "ip {arguments}");
    }
}
