//! PipeWire: whose nodes run. A client that is held still while its node runs silences everybody (lifecycle.md §0.2).
//!
//! - `pod`: values. `client`: the protocol, sans-IO.
//! - here: one user's server: connecting as that user, and from what it says to processes.

mod client;
mod pod;

use std::{
    collections::BTreeMap,
    fs, io,
    io::{Read, Write},
    os::unix::net::UnixStream,
    time::Duration,
};

use zruntime::{AsyncIo, Shared, SharedRuntime};

use self::client::{Class, Client, Running};
use super::teller::{Teller, clean, real_uid, sentence};
use crate::{
    model::{Veto, VetoKind},
    sys::{
        clock,
        inbox::Sender,
        users::{User, door::Door, errand::Errands},
    },
    time::{Instant, earliest},
};

/// The socket's file name (PipeWire's pipewire.socket).
const SOCKET: &str = "pipewire-0";
/// A server that stays for this long was of use; one that does not is tried less and less.
const OF_USE: Duration = Duration::from_secs(10);
/// Who says more than this in a `BREATH` is read no faster: it belongs to a user, and others' buses wait meanwhile.
const GULP: usize = 64 * 1024;
const BREATH: Duration = Duration::from_millis(200);
/// Processes a sandboxed client's own number may stand for.
const CANDIDATES: usize = 16;

/// Watches a user's PipeWire until it is dropped; where there is none, until there is.
pub(super) async fn serve(user: User, errands: Errands, inbox: Sender) {
    let Ok(runtime) = SharedRuntime::current() else { return };
    let uid = user.uid;
    let mut door = Door::to(SOCKET, user, errands);
    let mut teller = Teller::new("pipewire", inbox);
    loop {
        match door.open().await {
            Ok(stream) => {
                let begun = clock::boot();
                let mut session = Session { uid, teller: &mut teller, known: BTreeMap::new() };
                let ended = session.run(&runtime, stream).await;
                log::info!("PipeWire of user {uid}: {ended}");
                // With the server went all streams.
                teller.see(uid, Vec::new(), clock::boot());
                teller.finish(&runtime).await;
                if clock::boot().since(begun) >= OF_USE {
                    door.succeeded();
                }
            }
            Err(error) => log::debug!("PipeWire of user {uid}: {error}"),
        }
        door.wait().await;
    }
}

/// One connection.
struct Session<'a> {
    uid: u32,
    teller: &'a mut Teller,
    /// The processes behind clients that speak for another: by the one that speaks and what it says.
    known: BTreeMap<(u32, u32), Vec<u32>>,
}

enum Input {
    Read(io::Result<usize>),
    Deadline,
}

impl Session<'_> {
    /// Until it breaks: why.
    async fn run(&mut self, runtime: &SharedRuntime, stream: UnixStream) -> String {
        let stream = match AsyncIo::new(runtime, stream) {
            Ok(stream) => stream,
            Err(error) => return error.to_string(),
        };
        let mut client = Client::new();
        let (mut since, mut taken) = (clock::boot(), 0);
        loop {
            while !client.output().is_empty() {
                match stream.write_with(|mut stream| stream.write(client.output())).await {
                    Ok(count) => client.written(count),
                    Err(error) => return error.to_string(),
                }
            }
            let mut refused = None;
            let look = client.is_changed().then(|| self.teller.open_at());
            let deadline = earliest(look, self.teller.poll_timeout());
            let input = read(runtime, &stream, deadline, |bytes| refused = client.receive(bytes).err()).await;
            match (input, refused) {
                (_, Some(error)) => return error.to_string(),
                (Input::Read(Ok(0)), _) => return "the server closed the connection".into(),
                (Input::Read(Ok(count)), _) => taken += count,
                (Input::Read(Err(error)), _) => return error.to_string(),
                (Input::Deadline, _) => {}
            }
            let now = clock::boot();
            if self.teller.open_at() <= now
                && let Some(running) = client.poll_running()
            {
                let seen = self.vetoes(&running);
                self.teller.see(self.uid, seen, now);
            }
            self.teller.poll(now);
            if now.since(since) >= BREATH {
                (since, taken) = (now, 0);
            } else if taken >= GULP {
                runtime.sleep(BREATH).await;
            }
        }
    }

    fn vetoes(&mut self, running: &[Running]) -> Vec<(u32, Veto)> {
        let mut known = BTreeMap::new();
        let mut vetoes = Vec::new();
        let mut insiders = None;
        for node in running {
            let pids = match node.claimed {
                Some(claimed) if claimed != node.pid && is_pulse(node.pid) => {
                    let key = (node.pid, claimed);
                    let pids = self.known.remove(&key).or_else(|| known.get(&key).cloned());
                    let pids = pids.unwrap_or_else(|| spoken_for(claimed, self.uid, node.sandboxed, &mut insiders));
                    known.insert(key, pids.clone());
                    pids
                }
                _ => vec![node.pid],
            };
            let veto = veto(node);
            vetoes.extend(pids.into_iter().map(|pid| (pid, veto.clone())));
        }
        self.known = known;
        vetoes
    }
}

async fn read(
    runtime: &SharedRuntime,
    stream: &AsyncIo<UnixStream, Shared>,
    deadline: Option<Instant>,
    mut take: impl FnMut(&[u8]),
) -> Input {
    // A plain read: file descriptors that come with it the kernel drops. The buffer is there only while it is in use.
    let reading = stream.read_with(|mut stream| {
        let mut buffer = [0; 8192];
        let count = stream.read(&mut buffer)?;
        take(buffer.get(..count).unwrap_or_default());
        Ok(count)
    });
    match deadline {
        None => Input::Read(reading.await),
        Some(at) => match runtime.timeout(at.since(clock::boot()), reading).await {
            Ok(read) => Input::Read(read),
            Err(_) => Input::Deadline,
        },
    }
}

fn veto(node: &Running) -> Veto {
    let (kind, does) = match node.class {
        Class::Plays => (VetoKind::Playback, "plays sound"),
        Class::Records => (VetoKind::Capture, "records sound"),
        Class::Sees => (VetoKind::Capture, "takes in video"),
        Class::Shows => (VetoKind::Capture, "gives out video"),
        Class::Passes => (VetoKind::Playback, "has sound or video pass through it"),
    };
    Veto { kind, reason: sentence(format!("it {does} (PipeWire node \"{}\")", clean(&node.name))) }
}

/// Whether a process is pipewire-pulse, which speaks for PulseAudio's clients. Its name is what it says itself; but one
/// that lies can only name processes of the same user, which it could keep awake by other means.
fn is_pulse(pid: u32) -> bool {
    fs::read(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim_ascii_end() == b"pipewire-pulse")
}

/// The processes that a client of PulseAudio may be, which says that it is `claimed`: in a sandbox it counts from 1.
/// `insiders` are looked for once, and only if they are needed.
fn spoken_for(claimed: u32, uid: u32, sandboxed: bool, insiders: &mut Option<Vec<(u32, u32)>>) -> Vec<u32> {
    if !sandboxed && real_uid(&status(claimed)) == Some(uid) {
        return vec![claimed];
    }
    let insiders = insiders.get_or_insert_with(|| insiders_of(uid));
    insiders.iter().filter(|(_, inside)| *inside == claimed).map(|(pid, _)| *pid).take(CANDIDATES).collect()
}

/// A user's processes in pid namespaces within ours, each with what it counts as there.
fn insiders_of(uid: u32) -> Vec<(u32, u32)> {
    let Ok(processes) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = processes.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    let mut insiders = Vec::new();
    for pid in pids {
        let status = status(pid);
        if real_uid(&status) == Some(uid) {
            insiders.extend(inside(&status).map(|inside| (pid, inside)));
        }
    }
    insiders
}

/// What a process counts as in the pid namespaces within ours, by its `/proc/PID/status`.
fn inside(status: &str) -> impl Iterator<Item = u32> {
    let line = status.lines().find_map(|line| line.strip_prefix("NSpid:")).unwrap_or_default();
    line.split_ascii_whitespace().skip(1).filter_map(|number| number.parse().ok())
}

fn status(pid: u32) -> String {
    fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_counts_from_one_is_found_by_that() {
        let inside = |status: &str| inside(status).collect::<Vec<_>>();
        assert_eq!(inside("Pid:\t77\nNSpid:\t77\t2\n"), [2]);
        assert_eq!(inside("NSpid:\t77\t5\t2\n"), [5, 2]);
        assert_eq!(inside("NSpid:\t77\n"), Vec::<u32>::new());
        assert_eq!(inside(""), Vec::<u32>::new());
        let (own, uid) = (std::process::id(), nix::unistd::getuid().as_raw());
        let (mut insiders, mut looked) = (Some(vec![(70, own), (71, 2), (72, own)]), None);
        assert_eq!(spoken_for(own, uid, false, &mut looked), [own]);
        assert_eq!(looked, None, "nobody else was looked at");
        assert_eq!(spoken_for(own, uid, true, &mut insiders), [70, 72]);
        assert_eq!(spoken_for(own, uid + 1, false, &mut insiders), [70, 72]);
        assert_eq!(spoken_for(own, uid + 1, true, &mut Some(vec![(9, own); 99])).len(), CANDIDATES);
    }

    #[test]
    fn only_pipewire_pulse_speaks_for_others() {
        assert!(!is_pulse(std::process::id()));
        assert!(!is_pulse(u32::MAX));
    }

    #[test]
    fn each_kind_of_node_has_its_sentence() {
        let node = |class| Running { pid: 1, claimed: None, sandboxed: false, class, name: "n\n\"1".into() };
        let veto = |class| veto(&node(class));
        assert_eq!(&*veto(Class::Plays).reason, "it plays sound (PipeWire node \"n\"1\")");
        let kinds =
            [Class::Plays, Class::Records, Class::Sees, Class::Shows, Class::Passes].map(|class| veto(class).kind);
        use VetoKind::{Capture, Playback};
        assert_eq!(kinds, [Playback, Capture, Capture, Capture, Playback]);
    }
}
