//! What the daemon itself costs: its memory, what the kernel keeps for its sockets, its connections, its time.

use std::{fs, io, os::fd::RawFd, time::Duration};

use nix::time::{ClockId, clock_gettime};

use super::measure::parse_rollup;
use crate::model::SelfSample;

/// `SK_MEMINFO_VARS` of the kernel's `include/uapi/linux/sock_diag.h`.
const MEMINFO_VARS: usize = 9;
/// `TCP_ESTABLISHED` of the kernel's `include/net/tcp_states.h`.
const ESTABLISHED: u8 = 1;

/// This process now. What cannot be read is zero.
pub(super) fn sample() -> SelfSample {
    let rollup = fs::read_to_string("/proc/self/smaps_rollup").ok().and_then(|text| parse_rollup(&text));
    if rollup.is_none() {
        log::warn!("cannot read the daemon's own memory: /proc/self/smaps_rollup");
    }
    let (mut sockets, mut connections) = (0u64, 0u32);
    for fd in open_files().unwrap_or_default() {
        if let Some(bytes) = memory_of(fd) {
            sockets = sockets.saturating_add(bytes);
            connections += u32::from(is_established(fd));
        }
    }
    SelfSample {
        memory: rollup.unwrap_or_default().memory,
        sockets: sockets.div_ceil(1024),
        connections,
        cpu: clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).map_or(Duration::ZERO, Duration::from),
    }
}

fn open_files() -> io::Result<Vec<RawFd>> {
    let names = fs::read_dir("/proc/self/fd")?.filter_map(|entry| Some(entry.ok()?.file_name()));
    Ok(names.filter_map(|name| name.to_str()?.parse().ok()).collect())
}

/// What the kernel keeps for a socket, in bytes; `None` for what is none.
fn memory_of(fd: RawFd) -> Option<u64> {
    let mut bytes = [0; MEMINFO_VARS * 4];
    let length = option(fd, libc::SOL_SOCKET, libc::SO_MEMINFO, &mut bytes)?;
    Some(sum_meminfo(bytes.get(..length)?))
}

fn is_established(fd: RawFd) -> bool {
    // The first byte of `struct tcp_info`.
    let mut state = [0];
    option(fd, libc::IPPROTO_TCP, libc::TCP_INFO, &mut state) == Some(1) && state == [ESTABLISHED]
}

/// Received and not read, sent and not acknowledged, kept in reserve, options, backlog; not the limits between them. What
/// is sent is in the queue of a TCP socket or in flight of any other, and for the most part in both of the former.
fn sum_meminfo(bytes: &[u8]) -> u64 {
    let words = bytes.chunks_exact(4).filter_map(|word| Some(u64::from(u32::from_ne_bytes(word.try_into().ok()?))));
    let words: Vec<u64> = words.collect();
    let word = |index: usize| words.get(index).copied().unwrap_or(0);
    let (received, in_flight, reserve, queued, options, backlog) =
        (word(0), word(2), word(4), word(5), word(6), word(7));
    received + in_flight.max(queued) + reserve + options + backlog
}

#[expect(unsafe_code, reason = "neither nix nor rustix knows these two options")]
fn option(fd: RawFd, level: i32, name: i32, value: &mut [u8]) -> Option<usize> {
    let mut length = libc::socklen_t::try_from(value.len()).ok()?;
    // SAFETY: the kernel writes at most `length` bytes to `value`, which has as many. `fd` is but a number: should another
    // thread have closed it meanwhile, it is refused, or another's of our own is looked at, and nothing is changed.
    let result = unsafe { libc::getsockopt(fd, level, name, value.as_mut_ptr().cast(), &raw mut length) };
    if result == 0 { usize::try_from(length).ok() } else { None }
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write,
        net::{TcpListener, TcpStream},
        os::fd::AsRawFd,
    };

    use super::*;

    #[test]
    fn limits_are_not_memory() {
        let words = [1u32, 1_000_000, 20, 2_000_000, 300, 50, 4000, 50_000, 9_000_000];
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        assert_eq!(sum_meminfo(&bytes), 1 + 50 + 300 + 4000 + 50_000);
        // An older kernel gives fewer.
        assert_eq!(sum_meminfo(&bytes[..24]), 1 + 50 + 300);
        assert_eq!(sum_meminfo(&[]), 0);
    }

    #[test]
    fn what_a_socket_holds_is_seen() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        assert!(!is_established(listener.as_raw_fd()));
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (server, _) = listener.accept().unwrap();
        assert!(is_established(client.as_raw_fd()) && is_established(server.as_raw_fd()));
        client.write_all(&[7; 50_000]).unwrap();
        let both = || memory_of(client.as_raw_fd()).unwrap() + memory_of(server.as_raw_fd()).unwrap();
        // Nobody reads it, so it is in one of the two.
        assert!(both() >= 50_000, "{}", both());

        let (one, mut other) = std::os::unix::net::UnixStream::pair().unwrap();
        other.write_all(&[7; 10_000]).unwrap();
        assert!(memory_of(other.as_raw_fd()).unwrap() >= 10_000);
        assert!(!is_established(one.as_raw_fd()));
        let file = fs::File::open("/proc/self/stat").unwrap();
        assert_eq!(memory_of(file.as_raw_fd()), None);
        assert_eq!(memory_of(-1), None);

        let all = sample();
        assert!(all.sockets >= 58 && all.connections >= 2, "{all:?}");
        assert!(all.memory.pss > 0 && all.cpu > Duration::ZERO, "{all:?}");
    }
}
