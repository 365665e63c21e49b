//! Which TCP connections a process has that leave the machine: its sockets' inodes against the tables of its network.

use std::{
    collections::{HashMap, HashSet},
    ffi::CString,
    fs::File,
    io::{self, BufRead, BufReader},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use rustix::fs::{Dir, Mode, OFlags, openat, readlinkat};

use super::procfs::ProcDir;

/// Open files of one process that are looked at.
const MAX_FILES: usize = 4096;
/// Lines of one table that are read. The kernel walks all its buckets for it: 2 ms where there are 262 144.
const MAX_LINES: usize = 65_536;
/// `TCP_ESTABLISHED` of the kernel's `include/net/tcp_states.h`.
const ESTABLISHED: &[u8] = b"01";

/// Established connections, each network's read once. For measurements taken at the same time.
#[derive(Debug, Default)]
pub(super) struct Connections {
    /// Inodes by network, which is known by what `ns/net` says.
    networks: HashMap<CString, HashSet<u64>>,
}

impl Connections {
    /// Adds the inodes of the process's sockets that are such connections. Nothing of a process we may not look into.
    pub(super) fn collect(&mut self, process: &ProcDir, found: &mut Vec<u64>) {
        let Ok(network) = process.link("ns/net") else { return };
        let open = self.networks.entry(network).or_insert_with(|| {
            let mut open = HashSet::new();
            for table in ["net/tcp", "net/tcp6"] {
                // Not there without IPv6.
                let _ = read(process, table, &mut open);
            }
            open
        });
        // Looking through its files costs more than the table, and where there is no connection at all it is in vain.
        if open.is_empty() {
            return;
        }
        let Ok(sockets) = sockets(process) else { return };
        found.extend(sockets.into_iter().filter(|socket| open.contains(socket)));
    }
}

fn sockets(process: &ProcDir) -> io::Result<Vec<u64>> {
    let dir = process.open_dir("fd")?;
    let mut sockets = Vec::new();
    let mut buffer = Vec::with_capacity(64);
    for entry in Dir::read_from(&dir)?.take(MAX_FILES) {
        buffer.clear();
        // One that was closed meanwhile, or a dot.
        let Ok(link) = readlinkat(&dir, entry?.file_name(), buffer) else {
            buffer = Vec::with_capacity(64);
            continue;
        };
        sockets.extend(parse_link(link.as_bytes()));
        buffer = link.into_bytes();
    }
    Ok(sockets)
}

/// The inode in `socket:[123]`.
fn parse_link(link: &[u8]) -> Option<u64> {
    std::str::from_utf8(link).ok()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

fn read(process: &ProcDir, table: &str, open: &mut HashSet<u64>) -> io::Result<()> {
    let file = openat(process, table, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let mut reader = BufReader::with_capacity(16 * 1024, File::from(file));
    let mut line = Vec::with_capacity(256);
    for _ in 0..MAX_LINES {
        line.clear();
        if reader.read_until(b'\n', &mut line)? == 0 {
            break;
        }
        open.extend(parse_line(&line));
    }
    Ok(())
}

/// The inode of a line of `net/tcp` or `net/tcp6` (proc_pid_net(5)), if it is established and leaves the machine.
fn parse_line(line: &[u8]) -> Option<u64> {
    let mut fields = line.split(u8::is_ascii_whitespace).filter(|field| !field.is_empty()).skip(1);
    let (local, remote, state) = (fields.next()?, fields.next()?, fields.next()?);
    if state != ESTABLISHED {
        return None;
    }
    let (local, remote) = (parse_address(local)?, parse_address(remote)?);
    // To one of the machine's own addresses: never further than its loopback device.
    if remote.is_loopback() || remote == local {
        return None;
    }
    std::str::from_utf8(fields.nth(5)?).ok()?.parse().ok().filter(|inode| *inode != 0)
}

/// `0100007F:1F90`: words in the machine's byte order.
fn parse_address(field: &[u8]) -> Option<IpAddr> {
    let (address, _) = std::str::from_utf8(field).ok()?.split_once(':')?;
    let word = |index: usize| {
        let digits = address.get(8 * index..8 * index + 8)?;
        Some(u32::from_str_radix(digits, 16).ok()?.to_ne_bytes())
    };
    match address.len() {
        8 => Some(Ipv4Addr::from(word(0)?).into()),
        32 => {
            let bytes: Vec<u8> = [word(0)?, word(1)?, word(2)?, word(3)?].concat();
            Some(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?).to_canonical())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(ip: IpAddr) -> String {
        let words = |bytes: &[u8]| {
            let words = bytes.chunks(4).map(|word| u32::from_ne_bytes(word.try_into().unwrap()));
            words.map(|word| format!("{word:08X}")).collect::<String>()
        };
        match ip {
            IpAddr::V4(ip) => words(&ip.octets()),
            IpAddr::V6(ip) => words(&ip.octets()),
        }
    }

    fn line(local: &str, remote: &str, state: &str, inode: u64) -> String {
        let [local, remote] = [local, remote].map(|ip| address(ip.parse().unwrap()));
        format!(
            "   7: {local}:1F90 {remote}:01BB {state} 00000000:00000000 02:000000DC 00000000  1000        0 {inode} 2 \
             0000000000000000 20 4 30 10 -1\n"
        )
    }

    #[test]
    fn only_what_is_established_and_leaves_the_machine_counts() {
        let inode = |local, remote, state| parse_line(line(local, remote, state, 4711).as_bytes());
        assert_eq!(inode("10.0.0.2", "192.0.2.7", "01"), Some(4711));
        assert_eq!(inode("2001:db8::1", "2001:db8::2", "01"), Some(4711));
        assert_eq!(inode("::ffff:10.0.0.2", "::ffff:192.0.2.7", "01"), Some(4711));
        for state in ["06", "0A", "02"] {
            assert_eq!(inode("10.0.0.2", "192.0.2.7", state), None);
        }
        for local in ["127.0.0.1", "127.3.2.1", "::1", "::ffff:127.0.0.1"] {
            assert_eq!(inode(local, local, "01"), None, "{local}");
        }
        assert_eq!(inode("10.0.0.2", "10.0.0.2", "01"), None, "the machine's own address");
        assert_eq!(parse_line(line("10.0.0.2", "192.0.2.7", "01", 0).as_bytes()), None, "nobody's any more");
    }

    #[test]
    fn a_line_that_is_none_is_nothing() {
        let whole = line("10.0.0.2", "192.0.2.7", "01", 4711);
        let inode = whole.find("4711").unwrap();
        for end in 0..=inode {
            assert_eq!(parse_line(&whole.as_bytes()[..end]), None, "{end}");
        }
        let head = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode";
        for text in [head, "", "\n", "\u{ff} \u{ff} \u{ff} 01", "0: 0100007F:1 010000\u{fc}0:1 01 a b c d e 7"] {
            assert_eq!(parse_line(text.as_bytes()), None, "{text:?}");
        }
        assert_eq!(parse_line(b"\xff: \xff\xfe:1 \xff:1 01 0 0 0 0 0 7"), None);
        assert_eq!(parse_link(b"socket:[12]"), Some(12));
        for link in ["socket:[]", "pipe:[12]", "/socket:[12]", "socket:[12", "socket:[-1]"] {
            assert_eq!(parse_link(link.as_bytes()), None, "{link}");
        }
    }

    #[test]
    fn a_connection_of_this_process_that_stays_here_is_none() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let _client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let process = ProcDir::open(std::process::id()).unwrap();
        assert!(sockets(&process).unwrap().len() >= 2);
        let (mut connections, mut found) = (Connections::default(), Vec::new());
        connections.collect(&process, &mut found);
        assert!(found.is_empty());
        assert_eq!(connections.networks.len(), 1);
    }
}
