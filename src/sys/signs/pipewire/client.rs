//! A client of PipeWire that only looks: bytes in, bytes out (docs.pipewire.org, "Native Protocol"). It knows which clients
//! there are and which of their nodes run; every other kind of object is passed over.

use std::collections::BTreeMap;

use super::pod::{Members, Writer};

/// Nodes looked at; what comes beyond them is not seen.
const NODES: usize = 256;
/// Clients remembered.
const CLIENTS: usize = 512;
/// Larger messages are read past: a node's description takes some 4 KiB.
const LARGEST: usize = 64 * 1024;
/// Answers that wait to be written, in bytes; a server that asks more than that and reads nothing is given up.
const UNREAD: usize = 64 * 1024;
/// Of a name that is shown to people, in characters.
const LONGEST_NAME: usize = 60;

const HEADER: usize = 16;

// Our ids of what we talk to: the first two are given, the others are handed out without gaps.
const CORE: u32 = 0;
const CLIENT: u32 = 1;
const REGISTRY: u32 = 2;
const FIRST: u32 = 3;

/// `PW_VERSION_CORE`, of the registry and of a node: those of PipeWire 0.3, which all since then understand.
const VERSION: u32 = 3;

const NODE_TYPE: &str = "PipeWire:Interface:Node";
const CLIENT_TYPE: &str = "PipeWire:Interface:Client";

const RUNNING: i32 = 3;
const CHANGED_STATE: i64 = 1 << 2;
const CHANGED_PROPERTIES: i64 = 1 << 3;

/// A node that runs.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Running {
    /// The process at the other end of the client's socket, as the server knows it from the kernel.
    pub(super) pid: u32,
    /// The process the client says it is or speaks for.
    pub(super) claimed: Option<u32>,
    /// Whether the server takes it for sandboxed.
    pub(super) sandboxed: bool,
    /// What kind of node it is.
    pub(super) class: Class,
    /// The node's name, cleaned, possibly empty.
    pub(super) name: String,
}

/// What a node does (`media.class`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Class {
    /// Plays sound.
    Plays,
    /// Records sound.
    Records,
    /// Takes pictures in: of a camera or a screen.
    Sees,
    /// Gives pictures out.
    Shows,
    /// Is in the midst of others' sound or pictures: a filter, a virtual device.
    Passes,
}

/// The server says what no server says.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum ProtocolError {
    #[error("it does not speak PipeWire's protocol")]
    Alien,
    #[error("it asks and reads no answers")]
    Deaf,
}

/// One connection.
#[derive(Debug)]
pub(super) struct Client {
    received: Vec<u8>,
    /// Bytes of a message that is too large still to come.
    skip: usize,
    out: Vec<u8>,
    sequence: u32,
    greeted: bool,
    changed: bool,
    /// By the server's ids.
    clients: BTreeMap<u32, Owner>,
    nodes: BTreeMap<u32, Node>,
    /// The server's ids of what ours stand for. `None`: it is gone there, and the id not ours to use again yet.
    bound: BTreeMap<u32, Option<u32>>,
    free: Vec<u32>,
}

#[derive(Debug)]
struct Owner {
    pid: u32,
    sandboxed: bool,
}

#[derive(Debug, Default)]
struct Node {
    owner: Option<u32>,
    claimed: Option<u32>,
    class: Option<Class>,
    name: String,
    running: bool,
}

impl Client {
    /// Says hello.
    pub(super) fn new() -> Self {
        let mut client = Self {
            received: Vec::new(),
            skip: 0,
            out: Vec::new(),
            sequence: 0,
            greeted: false,
            changed: false,
            clients: BTreeMap::new(),
            nodes: BTreeMap::new(),
            bound: BTreeMap::new(),
            free: Vec::new(),
        };
        client.say(CORE, 1, Writer::default().int(VERSION));
        let about = [("application.name", "Night Porter"), ("application.id", "org.nightporter1")];
        client.say(CLIENT, 2, Writer::default().dictionary(&about));
        client.say(CORE, 5, Writer::default().int(VERSION).int(REGISTRY));
        client
    }

    /// What the server sent.
    ///
    /// # Errors
    /// When the connection is of no use any more.
    pub(super) fn receive(&mut self, mut bytes: &[u8]) -> Result<(), ProtocolError> {
        while !bytes.is_empty() {
            if self.skip > 0 {
                let past = self.skip.min(bytes.len());
                self.skip -= past;
                bytes = bytes.get(past..).unwrap_or_default();
                continue;
            }
            let wanted = match header(&self.received) {
                None => HEADER,
                Some(header) if header.size > LARGEST => {
                    log::debug!("PipeWire: a message of {} bytes is not read", header.size);
                    self.skip = header.size;
                    self.received.clear();
                    continue;
                }
                Some(header) => HEADER + header.size,
            };
            let more = wanted.saturating_sub(self.received.len()).min(bytes.len());
            self.received.extend_from_slice(bytes.get(..more).unwrap_or_default());
            bytes = bytes.get(more..).unwrap_or_default();
            self.handle_received()?;
        }
        if self.received.is_empty() {
            self.received.shrink_to(4096);
        }
        Ok(())
    }

    fn handle_received(&mut self) -> Result<(), ProtocolError> {
        let Some(header) = header(&self.received) else { return Ok(()) };
        if !self.greeted && (header.to, header.opcode) != (CORE, 0) {
            // The first thing a server says is who it is.
            return Err(ProtocolError::Alien);
        }
        if self.received.len() < HEADER + header.size {
            return Ok(());
        }
        let message = std::mem::take(&mut self.received);
        if self.message(header, message.get(HEADER..).unwrap_or_default()).is_none() {
            log::debug!("PipeWire: message {} to {} is not understood", header.opcode, header.to);
        }
        self.received = message;
        self.received.clear();
        if self.out.len() > UNREAD { Err(ProtocolError::Deaf) } else { Ok(()) }
    }

    /// What waits to be written; the first `count` bytes of it were.
    pub(super) fn written(&mut self, count: usize) {
        self.out.drain(..count.min(self.out.len()));
        if self.out.is_empty() {
            self.out.shrink_to(256);
        }
    }

    /// What waits to be written.
    pub(super) fn output(&self) -> &[u8] {
        &self.out
    }

    /// Whether [`Client::poll_running`] has something to say.
    pub(super) fn is_changed(&self) -> bool {
        self.changed
    }

    /// All nodes that run and whose process is known, if anything of that may have changed.
    pub(super) fn poll_running(&mut self) -> Option<Vec<Running>> {
        std::mem::take(&mut self.changed).then(|| self.nodes.values().filter_map(|node| self.running(node)).collect())
    }

    fn running(&self, node: &Node) -> Option<Running> {
        let owner = self.clients.get(&node.owner?).filter(|_| node.running)?;
        Some(Running {
            pid: owner.pid,
            claimed: node.claimed,
            sandboxed: owner.sandboxed,
            class: node.class.unwrap_or(Class::Passes),
            name: node.name.clone(),
        })
    }

    fn message(&mut self, header: Header, body: &[u8]) -> Option<()> {
        let mut members = Members::of(body)?;
        match (header.to, header.opcode) {
            // Info.
            (CORE, 0) => self.greeted = true,
            // Ping.
            (CORE, 2) => {
                let (id, sequence) = (members.int()?, members.int()?);
                self.say(CORE, 3, Writer::default().int(id.cast_unsigned()).int(sequence.cast_unsigned()));
            }
            // Error: of an object that went before we asked for it, mostly.
            (CORE, 3) => {
                let (id, _, result) = (members.int()?, members.int()?, members.int()?);
                log::debug!("PipeWire: error {result} of object {id}");
            }
            // RemoveId: ours to use again.
            (CORE, 4) => {
                let id = members.id()?;
                if let Some(node) = self.bound.remove(&id) {
                    self.free.push(id);
                    // It may have failed without ever having been.
                    if let Some(node) = node.and_then(|global| self.nodes.get_mut(&global)) {
                        self.changed |= std::mem::take(&mut node.running);
                    }
                }
            }
            (REGISTRY, 0) => {
                let (id, _, kind) = (members.id()?, members.int()?, members.text()??);
                members.int()?;
                match kind {
                    CLIENT_TYPE => self.client_came(id, members.dictionary()?),
                    NODE_TYPE => self.node_came(id, members.dictionary()?),
                    _ => {}
                }
            }
            (REGISTRY, 1) => self.gone(members.id()?),
            (to, 0) => {
                let global = *self.bound.get(&to)?;
                self.node_says(global?, members)?;
            }
            _ => {}
        }
        Some(())
    }

    fn client_came<'a>(&mut self, id: u32, about: impl Iterator<Item = (&'a str, &'a str)>) {
        let (mut pid, mut sandboxed) = (None, false);
        for (key, value) in about {
            match key {
                "pipewire.sec.pid" => pid = value.parse::<u32>().ok(),
                "pipewire.access" => sandboxed = value == "flatpak" || value == "restricted",
                _ => {}
            }
        }
        if let Some(pid) = pid
            && (self.clients.len() < CLIENTS || self.clients.contains_key(&id))
        {
            self.clients.insert(id, Owner { pid, sandboxed });
            self.changed = true;
        }
    }

    fn node_came<'a>(&mut self, id: u32, about: impl Iterator<Item = (&'a str, &'a str)>) {
        let (mut node, mut hardware) = (Node::default(), false);
        for (key, value) in about {
            // The session manager's, for a device; no app has those.
            hardware |= key == "device.id";
            node.take(key, value);
        }
        // An id that is used again belongs to another node.
        self.gone(id);
        if hardware || self.nodes.len() >= NODES {
            return;
        }
        // Without gaps: each one there is has been used.
        let next = FIRST + u32::try_from(self.bound.len() + self.free.len()).unwrap_or(u32::MAX - FIRST);
        // Those the server has not given back count as well.
        if self.free.is_empty() && self.bound.len() >= 2 * NODES {
            return;
        }
        let ours = self.free.pop().unwrap_or(next);
        self.bound.insert(ours, Some(id));
        self.nodes.insert(id, node);
        self.say(REGISTRY, 1, Writer::default().int(id).text(NODE_TYPE).int(VERSION).int(ours));
    }

    fn node_says(&mut self, global: u32, mut members: Members<'_>) -> Option<()> {
        let node = self.nodes.get_mut(&global)?;
        members.int()?;
        members.int()?;
        members.int()?;
        let changes = members.long()?;
        members.int()?;
        members.int()?;
        let state = members.int()?;
        members.text()?;
        let before = (node.running, node.owner, node.claimed, node.class);
        if changes & CHANGED_STATE != 0 {
            node.running = state == RUNNING;
        }
        if changes & CHANGED_PROPERTIES != 0 {
            for (key, value) in members.dictionary()? {
                node.take(key, value);
            }
        }
        self.changed |= before != (node.running, node.owner, node.claimed, node.class);
        Some(())
    }

    fn gone(&mut self, id: u32) {
        self.changed |= self.clients.remove(&id).is_some();
        if self.nodes.remove(&id).is_some() {
            self.changed = true;
            self.bound.values_mut().filter(|global| **global == Some(id)).for_each(|global| *global = None);
        }
    }

    fn say(&mut self, to: u32, opcode: u32, body: Writer) {
        let body = body.finish();
        // Bodies are short: some numbers and names of ours.
        let size = u32::try_from(body.len()).unwrap_or(u32::MAX) & 0x00ff_ffff;
        for number in [to, opcode << 24 | size, self.sequence, 0] {
            self.out.extend(number.to_ne_bytes());
        }
        self.sequence = self.sequence.wrapping_add(1);
        self.out.extend(body);
    }
}

impl Node {
    fn take(&mut self, key: &str, value: &str) {
        match key {
            "client.id" => self.owner = value.parse().ok(),
            "application.process.id" => self.claimed = value.parse().ok().filter(|pid| *pid > 0),
            "media.class" => self.class = Some(class(value)),
            "node.name" => {
                self.name = value.chars().filter(|letter| !letter.is_control()).take(LONGEST_NAME).collect();
            }
            _ => {}
        }
    }
}

fn class(name: &str) -> Class {
    match name {
        "Stream/Output/Audio" => Class::Plays,
        "Stream/Input/Audio" => Class::Records,
        "Stream/Input/Video" => Class::Sees,
        "Stream/Output/Video" | "Video/Source" => Class::Shows,
        _ => Class::Passes,
    }
}

#[derive(Clone, Copy, Debug)]
struct Header {
    to: u32,
    opcode: u32,
    size: usize,
}

fn header(bytes: &[u8]) -> Option<Header> {
    let number = |at: usize| Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    let (to, word) = (number(0)?, number(4)?);
    number(12)?;
    Some(Header { to, opcode: word >> 24, size: usize::try_from(word & 0x00ff_ffff).ok()? })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(to: u32, opcode: u32, body: Writer) -> Vec<u8> {
        let body = body.finish();
        let size = u32::try_from(body.len()).unwrap();
        let header = [to, opcode << 24 | size, 0, 0].map(u32::to_ne_bytes).concat();
        [header, body].concat()
    }

    fn info() -> Vec<u8> {
        message(CORE, 0, Writer::default().int(0).int(1).text("somebody").text("host").text("0.3"))
    }

    fn global(id: u32, kind: &str, about: &[(&str, &str)]) -> Vec<u8> {
        message(REGISTRY, 0, Writer::default().int(id).int(0o777).text(kind).int(3).dictionary(about))
    }

    fn client(id: u32, pid: &str) -> Vec<u8> {
        global(id, CLIENT_TYPE, &[("pipewire.sec.pid", pid)])
    }

    fn node(id: u32, of: &str) -> Vec<u8> {
        global(id, NODE_TYPE, &[("client.id", of), ("node.name", "music"), ("media.class", "Stream/Output/Audio")])
    }

    fn says(ours: u32, changes: i64, state: u32, about: &[(&str, &str)]) -> Vec<u8> {
        let start = Writer::default().int(9).int(1).int(1).long(changes).int(0).int(1).int(state);
        message(ours, 0, start.text("").dictionary(about).structure(Writer::default().int(0)))
    }

    fn removed(id: u32) -> Vec<u8> {
        message(REGISTRY, 1, Writer::default().int(id))
    }

    fn given_back(ours: u32) -> Vec<u8> {
        message(CORE, 4, Writer::default().int(ours))
    }

    fn greeted() -> Client {
        let mut client = Client::new();
        client.receive(&info()).unwrap();
        client
    }

    /// What was said since: to whom, which method, and its arguments.
    fn said(client: &mut Client) -> Vec<(u32, u32, Vec<u8>)> {
        let mut rest = client.output().to_vec();
        client.written(rest.len());
        let mut said = Vec::new();
        while let Some(header) = header(&rest) {
            let body = rest[HEADER..HEADER + header.size].to_vec();
            rest.drain(..HEADER + header.size);
            said.push((header.to, header.opcode, body));
        }
        assert!(rest.is_empty());
        said
    }

    /// The ids we chose for the nodes bound since, with theirs.
    fn bound(client: &mut Client) -> Vec<(u32, u32)> {
        let binds = said(client).into_iter().filter(|(to, opcode, _)| (*to, *opcode) == (REGISTRY, 1));
        binds
            .map(|(_, _, body)| {
                let mut members = Members::of(&body).unwrap();
                let theirs = members.id().unwrap();
                assert_eq!((members.text(), members.id()), (Some(Some(NODE_TYPE)), Some(VERSION)));
                (members.id().unwrap(), theirs)
            })
            .collect()
    }

    fn pids(client: &mut Client) -> Option<Vec<u32>> {
        client.poll_running().map(|running| running.iter().map(|node| node.pid).collect())
    }

    const BOTH: i64 = CHANGED_STATE | CHANGED_PROPERTIES;

    #[test]
    fn a_node_is_seen_while_it_runs() {
        let mut peer = greeted();
        assert_eq!(
            said(&mut peer).iter().map(|(to, opcode, _)| (*to, *opcode)).collect::<Vec<_>>(),
            [(0, 1), (1, 2), (0, 5)]
        );
        peer.receive(&[client(30, "77"), node(31, "30")].concat()).unwrap();
        assert_eq!(bound(&mut peer), [(3, 31)]);
        assert_eq!(pids(&mut peer), Some(vec![]));
        peer.receive(&says(3, BOTH, 2, &[("client.id", "30")])).unwrap();
        assert_eq!(pids(&mut peer), None, "idle");
        peer.receive(&says(3, CHANGED_STATE, 3, &[])).unwrap();
        let running = peer.poll_running().unwrap();
        let expected = Running { pid: 77, claimed: None, sandboxed: false, class: Class::Plays, name: "music".into() };
        assert_eq!(running, [expected]);
        // Something else of it changes: its state is not said again, whatever is in its place.
        peer.receive(&says(3, CHANGED_PROPERTIES, 0, &[("media.name", "another song")])).unwrap();
        assert_eq!(pids(&mut peer), None);
        peer.receive(&says(3, CHANGED_STATE, 2, &[])).unwrap();
        assert_eq!(pids(&mut peer), Some(vec![]));
    }

    #[test]
    fn a_node_ends_with_itself_or_its_client() {
        for end in [removed(31), removed(30), given_back(3)] {
            let mut peer = greeted();
            peer.receive(&[client(30, "77"), node(31, "30"), says(3, CHANGED_STATE, 3, &[])].concat()).unwrap();
            assert_eq!(pids(&mut peer), Some(vec![77]));
            peer.receive(&end).unwrap();
            assert_eq!(pids(&mut peer), Some(vec![]));
        }
    }

    #[test]
    fn ids_are_used_again_once_they_are_given_back_and_without_gaps() {
        let mut peer = greeted();
        peer.receive(&[client(30, "77"), node(31, "30"), node(32, "30")].concat()).unwrap();
        assert_eq!(bound(&mut peer), [(3, 31), (4, 32)]);
        // Another node under the same id: what is still said of the first is not of the second.
        peer.receive(&[removed(31), node(31, "30"), says(3, CHANGED_STATE, 3, &[])].concat()).unwrap();
        assert_eq!(bound(&mut peer), [(5, 31)]);
        assert_eq!(pids(&mut peer), Some(vec![]));
        peer.receive(&[given_back(3), node(33, "30"), node(34, "30")].concat()).unwrap();
        assert_eq!(bound(&mut peer), [(3, 33), (6, 34)]);
        peer.receive(&says(5, CHANGED_STATE, 3, &[])).unwrap();
        assert_eq!(pids(&mut peer), Some(vec![77]));
    }

    #[test]
    fn hardware_is_passed_over_and_so_is_what_is_too_much() {
        let mut peer = greeted();
        said(&mut peer);
        peer.receive(&global(8, NODE_TYPE, &[("device.id", "4"), ("client.id", "30")])).unwrap();
        peer.receive(&global(9, "PipeWire:Interface:Port", &[("node.id", "8")])).unwrap();
        assert!(bound(&mut peer).is_empty());
        for id in 0..10_000 {
            peer.receive(&[client(20_000 + id, "1"), node(id, "20000")].concat()).unwrap();
            said(&mut peer);
        }
        assert_eq!((peer.nodes.len(), peer.clients.len(), peer.bound.len()), (NODES, CLIENTS, NODES));
        // A server that gives no ids back gets no new ones.
        for _ in 0..10_000 {
            peer.receive(&[removed(0), node(0, "20000")].concat()).unwrap();
            said(&mut peer);
        }
        assert_eq!(peer.bound.len(), 2 * NODES);
    }

    #[test]
    fn a_ping_is_answered_but_not_for_ever() {
        let mut peer = greeted();
        said(&mut peer);
        let ping = message(CORE, 2, Writer::default().int(0).int(5));
        peer.receive(&ping).unwrap();
        let pong = Writer::default().int(0).int(5).finish();
        assert_eq!(said(&mut peer), [(CORE, 3, pong)]);
        let deaf = (0..10_000).find_map(|_| peer.receive(&ping).err());
        assert_eq!(deaf, Some(ProtocolError::Deaf));
        assert!(peer.output().len() <= UNREAD + 100);
    }

    #[test]
    fn what_is_too_large_is_read_past() {
        let mut peer = greeted();
        let mut large = vec![0; HEADER + LARGEST + 8];
        large[4..8].copy_from_slice(&u32::try_from(LARGEST + 8).unwrap().to_ne_bytes());
        for piece in large.chunks(5000) {
            peer.receive(piece).unwrap();
            assert!(peer.received.capacity() <= LARGEST);
        }
        peer.receive(&[client(30, "77"), node(31, "30"), says(3, CHANGED_STATE, 3, &[])].concat()).unwrap();
        assert_eq!(pids(&mut peer), Some(vec![77]));
    }

    #[test]
    fn who_does_not_begin_as_a_server_does_is_none() {
        for garbage in [&b"HTTP/1.1 400 Bad Request\r\n\r\n"[..], &[0xff; 64], &client(3, "4")] {
            assert_eq!(Client::new().receive(garbage), Err(ProtocolError::Alien));
        }
    }

    proptest! {
        #[test]
        fn pieces_are_as_good_as_the_whole(cuts in prop::collection::vec(1_usize..40, 1..60)) {
            let whole = [info(), client(30, "77"), node(31, "30"), says(3, BOTH, 3, &[("client.id", "30")])].concat();
            let mut peer = Client::new();
            let mut rest = &whole[..];
            for cut in cuts.iter().cycle() {
                let (piece, later) = rest.split_at((*cut).min(rest.len()));
                peer.receive(piece).unwrap();
                rest = later;
                if rest.is_empty() {
                    break;
                }
            }
            prop_assert_eq!(pids(&mut peer), Some(vec![77]));
        }

        #[test]
        fn no_server_makes_it_panic_or_grow(
            messages in prop::collection::vec(
                (0_u32..8, 0_u32..6, prop::collection::vec(any::<u8>(), 0..200), any::<bool>()), 0..40),
        ) {
            let mut peer = greeted();
            for (to, opcode, mut body, framed) in messages {
                if framed {
                    // A struct to begin with, so that what is inside is looked at.
                    let size = u32::try_from(body.len()).unwrap();
                    body = [&size.to_ne_bytes()[..], &14_u32.to_ne_bytes(), &body].concat();
                }
                let size = u32::try_from(body.len()).unwrap();
                let header = [to, opcode << 24 | size, 0, 0].map(u32::to_ne_bytes).concat();
                prop_assert_eq!(peer.receive(&[header, body].concat()), Ok(()));
            }
            peer.poll_running();
        }

        #[test]
        fn a_true_message_gone_bad_does_no_harm(
            at in 0_usize..400, to in any::<u8>(), which in 0_usize..4,
        ) {
            let mut peer = greeted();
            let mut bad = [client(30, "77"), node(31, "30"), says(3, BOTH, 3, &[("client.id", "30")]), removed(31)];
            let length = bad[which].len();
            // Behind the header, or the rest would be taken for a longer message's.
            let at = HEADER + at % (length - HEADER);
            bad[which][at] = to;
            for message in &bad {
                prop_assert_eq!(peer.receive(message), Ok(()));
            }
            peer.poll_running();
        }
    }
}
