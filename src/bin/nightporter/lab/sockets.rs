//! TCP connections, counted from the kernel.

use std::{collections::HashSet, fs};

use super::processes;

/// Established connections to `port` that are held by others than this process.
pub(crate) fn connections_to(port: u16) -> usize {
    let own = processes::sockets(std::process::id());
    sockets_where(|socket| socket.established && socket.remote_port == port).difference(&own).count()
}

/// The port a process listens on, if it listens.
pub(crate) fn port_of(pid: u32) -> Option<u16> {
    let held = processes::sockets(pid);
    table().into_iter().find(|socket| socket.listening && held.contains(&socket.inode)).map(|socket| socket.local_port)
}

#[derive(Debug, PartialEq, Eq)]
struct Socket {
    local_port: u16,
    remote_port: u16,
    established: bool,
    listening: bool,
    inode: u64,
}

fn sockets_where(wanted: impl Fn(&Socket) -> bool) -> HashSet<u64> {
    table().into_iter().filter(wanted).map(|socket| socket.inode).collect()
}

fn table() -> Vec<Socket> {
    ["/proc/net/tcp", "/proc/net/tcp6"]
        .into_iter()
        .filter_map(|path| fs::read_to_string(path).ok())
        .flat_map(|text| text.lines().filter_map(parse_socket).collect::<Vec<_>>())
        .collect()
}

/// A line of proc_net_tcp(5).
fn parse_socket(line: &str) -> Option<Socket> {
    let fields: Vec<&str> = line.split_ascii_whitespace().collect();
    let port = |field: usize| u16::from_str_radix(fields.get(field)?.rsplit_once(':')?.1, 16).ok();
    let state = *fields.get(3)?;
    Some(Socket {
        local_port: port(1)?,
        remote_port: port(2)?,
        established: state == "01",
        listening: state == "0A",
        inode: fields.get(9)?.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn a_socket_line_is_read() {
        let line =
            " 0: 0100007F:1F90 0100007F:C350 01 00000000:00000000 00:00000000 00000000 0 0 777 1 0 20 4 30 10 -1";
        let socket = Socket { local_port: 8080, remote_port: 50000, established: true, listening: false, inode: 777 };
        assert_eq!(parse_socket(line), Some(socket));
        assert_eq!(parse_socket("  sl  local_address rem_address   st"), None);
    }

    #[test]
    fn own_connections_are_not_counted_and_own_port_is_found() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        assert_eq!(connections_to(port), 0);
        assert_eq!(sockets_where(|socket| socket.established && socket.remote_port == port).len(), 1);
        assert!(port_of(std::process::id()).is_some());
        drop(stream);
    }
}
