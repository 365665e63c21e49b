//! A phone's network that can be cut. Three namespaces: the servers' (the test's own), the phone's, and between them the
//! air, which passes packets on or does not. Nothing here touches the machine's own network.

use std::{
    collections::BTreeMap,
    env,
    fs::{self, File},
    io::{Read, Seek},
    net::Ipv4Addr,
    process::{Child, Command, Stdio},
    sync::Mutex,
    thread,
    time::{Duration, Instant},
};

/// Where the servers are.
pub(crate) const SERVER: Ipv4Addr = Ipv4Addr::new(10, 78, 0, 2);
/// In the environment of a test that has a namespace of its own.
const INSIDE: &str = "NIGHTPORTER_REACH_INSIDE";

/// Runs the body of the test `name` in a network namespace of its own, by running this program again. All of `names`
/// begin with the first of them, however many tests run at a time: they spend most of their time waiting.
pub(crate) fn isolated(
    name: &'static str,
    names: &[&'static str],
    prepare: fn() -> Vec<(&'static str, String)>,
) -> bool {
    static RUNS: Mutex<BTreeMap<&'static str, (Child, File)>> = Mutex::new(BTreeMap::new());
    if env::var_os(INSIDE).is_some() {
        ip("link set lo up");
        return true;
    }
    let mut runs = RUNS.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if !runs.contains_key(name) {
        let given = prepare();
        let chosen = env::args().skip(1).any(|argument| !argument.starts_with('-'));
        for &each in names.iter().filter(|each| !chosen || **each == name) {
            runs.insert(each, begin(each, &given));
        }
    }
    let (mut child, mut output) = runs.remove(name).unwrap();
    drop(runs);
    let status = child.wait().unwrap();
    let mut text = String::new();
    output.rewind().unwrap();
    output.read_to_string(&mut text).unwrap();
    assert!(status.success() && text.contains("1 passed"), "{text}");
    let noise = |line: &&str| !line.is_empty() && !line.starts_with("running ") && !line.starts_with("test ");
    text.lines().filter(noise).for_each(|line| println!("{line}"));
    false
}

fn begin(name: &str, given: &[(&'static str, String)]) -> (Child, File) {
    // A file: a pipe that nobody reads yet would hold the test up.
    let output = tempfile::tempfile().unwrap();
    let unshare = if nix::unistd::geteuid().is_root() { "-n" } else { "-Urn" };
    let child = Command::new("unshare")
        .args([unshare, "--"])
        .arg(env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(INSIDE, "1")
        .envs(given.iter().cloned())
        .stdin(Stdio::null())
        .stdout(output.try_clone().unwrap())
        .stderr(output.try_clone().unwrap())
        .spawn()
        .expect("unshare (util-linux)");
    (child, output)
}

/// How the phone notices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cut {
    /// Its interface loses the carrier, as when it leaves the mobile cell.
    Carrier,
    /// Not at all: packets vanish further away. When they no longer do it gets another address.
    Silent,
}

/// The phone's network.
pub(crate) struct Net {
    phone: Namespace,
    air: Namespace,
    addresses: u8,
}

impl Net {
    /// Makes it, up and running.
    pub(crate) fn new() -> Self {
        let (phone, air) = (Namespace::new(), Namespace::new());
        ip(&format!("link add server type veth peer name wide netns {}", air.0.id()));
        ip("address add 10.78.0.2/24 dev server");
        ip("link set server up");
        air.run(&format!("ip link add cell type veth peer name modem netns {}", phone.0.id()));
        air.run("ip address add 10.78.0.1/24 dev wide");
        air.run("ip address add 10.77.0.1/24 dev cell");
        air.run("ip link set wide up");
        air.run("ip link set cell up");
        air.run("echo 1 >/proc/sys/net/ipv4/ip_forward");
        phone.run("ip link set lo up");
        phone.run("ip address add 10.77.0.2/24 dev modem");
        phone.run("ip link set modem up");
        phone.run("ip route add default via 10.77.0.1");
        ip("route add default via 10.78.0.1");
        Self { phone, air, addresses: 2 }
    }

    /// A process in the phone's namespace.
    pub(crate) fn phone(&self) -> u32 {
        self.phone.0.id()
    }

    /// From now on nothing passes, in either direction, and nobody is told so by ICMP.
    pub(crate) fn cut(&self, how: Cut) {
        self.air.run("echo 0 >/proc/sys/net/ipv4/ip_forward");
        if how == Cut::Carrier {
            self.air.run("ip link set cell down");
        }
    }

    /// It is back; the time from which on the phone can know.
    pub(crate) fn restore(&mut self, how: Cut) -> Instant {
        self.air.run("echo 1 >/proc/sys/net/ipv4/ip_forward");
        let back = Instant::now();
        match how {
            Cut::Carrier => self.air.run("ip link set cell up"),
            Cut::Silent => {
                self.addresses += 1;
                self.phone.run(&format!("ip address add 10.77.0.{}/24 dev modem", self.addresses));
            }
        }
        back
    }
}

/// A network namespace, held by a process that ends with this one.
struct Namespace(Child);

impl Namespace {
    fn new() -> Self {
        let child =
            Command::new("unshare").args(["-n", "--", "cat"]).stdin(Stdio::piped()).stdout(Stdio::null()).spawn();
        let namespace = Self(child.expect("unshare (util-linux)"));
        let of = |who: &str| fs::read_link(format!("/proc/{who}/ns/net")).ok();
        let until = Instant::now() + Duration::from_secs(20);
        while of(&namespace.0.id().to_string()).is_none_or(|theirs| Some(theirs) == of("self")) {
            assert!(Instant::now() < until, "no namespace");
            thread::sleep(Duration::from_millis(2));
        }
        namespace
    }

    fn run(&self, command: &str) {
        let net = format!("--net=/proc/{}/ns/net", self.0.id());
        let status =
            Command::new("nsenter").args([&net, "--", "sh", "-ec", command]).status().expect("nsenter (util-linux)");
        assert!(status.success(), "{command}");
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status().expect("ip (iproute2)");
    assert!(status.success(), "ip {arguments}");
}
