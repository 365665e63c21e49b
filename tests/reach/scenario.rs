//! What is done to the link, and what must have arrived.

use std::{
    collections::{BTreeMap, BTreeSet},
    env, thread,
    time::{Duration, Instant, SystemTime},
};

use super::{
    net::{Cut, Net},
    servers::{Connector, Server},
    world::{Apps, Bus, PATIENCE, Porter, Setup},
};

/// What issue 3 asks for.
const OUTAGE: Duration = Duration::from_secs(30);
const BACKLOG: usize = 1000;
const BACK_WITHIN: Duration = Duration::from_secs(2);
const KILLS: usize = 20;
const WHILE_KILLED: usize = 400;

/// Long enough that a server's TCP, left alone, would repeat itself only after several seconds more.
const SHORT_OUTAGE: Duration = Duration::from_secs(10);
/// The link's return is judged by the quickest of so many: a busy machine is not the daemon's fault.
const TRIES: usize = 3;
/// After a new link ntfy is looked at once more: a cut in between would meet an attempt under way, as few cuts do.
const SETTLING: Duration = Duration::from_secs(8);
const APPS: usize = 4;
/// A second time would come by then.
const AFTERMATH: Duration = Duration::from_millis(700);

/// The server is killed and comes back; the network is cut, noticed and unnoticed, while messages are sent.
pub(crate) fn outages(start: fn() -> Box<dyn Server>) {
    let mut net = Net::new();
    let mut server = start();
    let bus = Bus::start();
    let url = server.url();
    let setup = Setup { kind: server.kind(), url: &url, upstream: "", more: "", beside: Some(net.phone()) };
    let porter = Porter::with(&bus, setup);
    let mut post = Post::open(&bus, server.sender(), server.keeps_order());
    post.send("hello", 4 * APPS, Duration::ZERO);
    post.arrives(&porter);

    let connector = server.sender();
    let endpoints = post.endpoints.clone();
    let (sent, restarted) = thread::scope(|scope| {
        let sending = scope.spawn(move || send(&connector, &endpoints, "restart", 200, Duration::from_millis(4)));
        thread::sleep(Duration::from_millis(250));
        server.kill();
        thread::sleep(Duration::from_millis(250));
        server.start_again();
        let restarted = Instant::now();
        (sending.join().unwrap(), restarted)
    });
    post.sent.extend(sent);
    post.arrives(&porter);
    let restart = restarted.elapsed();
    porter.wait_online();

    let cut = |post: &mut Post, net: &mut Net, how, time: Duration, label: &str, count| {
        thread::sleep(SETTLING);
        let began = Instant::now();
        let before = post.apps.messages(&post.names[0]).len();
        net.cut(how);
        post.send(label, count, Duration::ZERO);
        thread::sleep(time.saturating_sub(began.elapsed()));
        assert!(began.elapsed() < time + Duration::from_secs(5), "sending took longer than the cut");
        assert_eq!(post.apps.messages(&post.names[0]).len(), before, "it was no cut");
        let back = net.restore(how);
        post.apps.wait_messages(&post.names[0], before + 1);
        let first = back.elapsed();
        post.arrives(&porter);
        (first, back.elapsed())
    };
    let (first, all) = cut(&mut post, &mut net, Cut::Carrier, OUTAGE, "thousand", BACKLOG);
    let mut noticed = vec![first];
    while noticed.iter().min() > Some(&BACK_WITHIN) && noticed.len() < TRIES {
        let label = format!("cut {}", noticed.len());
        noticed.push(cut(&mut post, &mut net, Cut::Carrier, SHORT_OUTAGE, &label, 20).0);
    }
    let mut silent: Vec<Duration> = Vec::new();
    while silent.iter().min().is_none_or(|best| *best > BACK_WITHIN) && silent.len() < TRIES {
        let label = format!("silent {}", silent.len());
        silent.push(cut(&mut post, &mut net, Cut::Silent, SHORT_OUTAGE, &label, 20).0);
    }
    thread::sleep(AFTERMATH);
    let repeated = post.check(Repeats::None);
    println!(
        "| upstream | all after the server's return | first after 30 s cut | all 1,000 | other cuts | silent cuts |"
    );
    println!(
        "| {} | {restart:.1?} | {first:.2?} | {all:.2?} | {:.2?} | {silent:.2?} |",
        server.kind(),
        noticed.get(1..).unwrap_or_default()
    );
    assert_eq!(repeated, 0);
    assert!(noticed.iter().any(|time| *time <= BACK_WITHIN), "{noticed:?} after a cut\n{}", porter.log());
    assert!(silent.iter().any(|time| *time <= BACK_WITHIN), "{silent:?} after a silent cut\n{}", porter.log());
}

/// The daemon is killed at random, again and again, while messages are sent.
pub(crate) fn kills(server: &dyn Server) {
    let bus = Bus::start();
    let url = server.url();
    let setup = Setup { kind: server.kind(), url: &url, upstream: "", more: "", beside: None };
    let mut porter = Porter::with(&bus, setup);
    let mut post = Post::open(&bus, server.sender(), server.keeps_order());
    let mut random = Random::new();
    let began = Instant::now();
    for round in 0..KILLS {
        let (connector, endpoints) = (server.sender(), post.endpoints.clone());
        let gap = Duration::from_millis(10);
        let sent = thread::scope(|scope| {
            let label = format!("round {round}");
            let sending = scope.spawn(move || send(&connector, &endpoints, &label, WHILE_KILLED / KILLS, gap));
            thread::sleep(Duration::from_millis(random.below(350)));
            porter.kill();
            porter.start_again();
            sending.join().unwrap()
        });
        post.sent.extend(sent);
    }
    let killing = began.elapsed();
    let over = Instant::now();
    post.arrives(&porter);
    let caught_up = over.elapsed();
    thread::sleep(AFTERMATH);
    let repeated = post.check(Repeats::SameId);
    println!("| upstream | kill -9 | messages | lost | repeated, same id | rounds took | then caught up in |");
    let kind = server.kind();
    println!("| {kind} | {KILLS} | {WHILE_KILLED} | 0 | {repeated} | {killing:.1?} | {caught_up:.1?} |");
}

/// Whether messages may come more than once.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Repeats {
    None,
    SameId,
}

/// A message as it was sent. What was tried more than once because the server died meanwhile may be there as often.
struct Sent {
    app: usize,
    body: String,
    tries: usize,
}

/// Apps, and everything sent to them.
struct Post {
    apps: Apps,
    names: Vec<String>,
    endpoints: Vec<String>,
    connector: Connector,
    in_order: bool,
    sent: Vec<Sent>,
}

impl Post {
    fn open(bus: &Bus, connector: Connector, in_order: bool) -> Self {
        let apps = Apps::start(bus);
        let names: Vec<String> = (0..APPS).map(|n| format!("org.example.App{n}")).collect();
        assert_eq!(apps.register(&names), vec![Ok(()); APPS]);
        let endpoints = names.iter().map(|name| apps.endpoint(name)).collect();
        Self { apps, names, endpoints, connector, in_order, sent: Vec::new() }
    }

    fn send(&mut self, label: &str, count: usize, gap: Duration) {
        self.sent.extend(send(&self.connector, &self.endpoints, label, count, gap));
    }

    /// Waits until every app has everything.
    fn arrives(&self, porter: &Porter) {
        for (app, name) in self.names.iter().enumerate() {
            let wanted: BTreeSet<&str> = self.sent_to(app).map(|sent| sent.body.as_str()).collect();
            let missing = || {
                let got = self.bodies(name);
                let got: BTreeSet<&str> = got.iter().map(|(body, _)| body.as_str()).collect();
                wanted.difference(&got).map(|body| body.trim_end_matches('.').to_owned()).collect::<Vec<_>>()
            };
            self.apps.wait_messages(name, wanted.len());
            let until = Instant::now() + PATIENCE;
            while !missing().is_empty() {
                assert!(Instant::now() < until, "{name} lacks {:?}\n{}", missing(), porter.log());
                thread::sleep(Duration::from_millis(20));
            }
        }
    }

    /// Nothing came that was not sent, twice, under two ids or, where the server promises it, out of order. Gives how many
    /// came again.
    fn check(&self, repeats: Repeats) -> usize {
        let mut again = 0;
        for (app, name) in self.names.iter().enumerate() {
            let got = self.bodies(name);
            let mut ids: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
            for (body, id) in &got {
                ids.entry(body).or_default().insert(id);
            }
            let distinct: BTreeSet<&str> = got.iter().map(|(_, id)| id.as_str()).collect();
            assert_eq!(
                distinct.len(),
                ids.values().map(BTreeSet::len).sum::<usize>(),
                "{name}: one id for two messages"
            );
            let repeated = got.len() - distinct.len();
            assert!(repeats == Repeats::SameId || repeated == 0, "{name}: {repeated} messages came twice");
            again += repeated;
            for sent in self.sent_to(app) {
                let under = ids.remove(sent.body.as_str()).map_or(0, |ids| ids.len());
                let what = sent.body.trim_end_matches('.');
                assert!(
                    (1..=sent.tries).contains(&under),
                    "{name}: {what} came under {under} ids, sent {}",
                    sent.tries
                );
            }
            assert!(ids.is_empty(), "{name}: {ids:?} was never sent");
            if self.in_order {
                let mut seen = BTreeSet::new();
                let firsts: Vec<&str> =
                    got.iter().map(|(body, _)| body.as_str()).filter(|body| seen.insert(*body)).collect();
                let wanted: Vec<&str> = self.sent_to(app).map(|sent| sent.body.as_str()).collect();
                let place = firsts.iter().zip(&wanted).position(|(got, wanted)| got != wanted);
                let around = |list: &[&str], at: usize| {
                    let near = &list[at.saturating_sub(2)..(at + 5).min(list.len())];
                    near.iter().map(|body| body.trim_end_matches('.').to_owned()).collect::<Vec<_>>()
                };
                let shown = place.map(|at| (around(&firsts, at), around(&wanted, at)));
                assert_eq!(shown, None, "{name}: out of order; came and sent");
            }
        }
        again
    }

    fn sent_to(&self, app: usize) -> impl Iterator<Item = &Sent> {
        self.sent.iter().filter(move |sent| sent.app == app)
    }

    /// What an app got: bodies and ids.
    fn bodies(&self, name: &str) -> Vec<(String, String)> {
        let messages = self.apps.messages(name).into_iter();
        messages.map(|message| (String::from_utf8(message.body).unwrap(), message.id)).collect()
    }
}

/// Sends `count` numbered messages to the apps in turn, each again and again until the server has accepted it.
fn send(connector: &Connector, endpoints: &[String], label: &str, count: usize, gap: Duration) -> Vec<Sent> {
    let until = Instant::now() + PATIENCE;
    let mut connection = None;
    let mut sent = Vec::new();
    for n in 0..count {
        // Of several sizes; a thousand are more than the daemon keeps in memory.
        let (app, body) = (n % endpoints.len(), format!("{label}: {n} {}", ".".repeat(n * 37 % 900)));
        let mut tries = 0;
        loop {
            assert!(Instant::now() < until, "the server does not come back");
            if connection.is_none() {
                connection = connector().ok();
            }
            if let Some(sender) = &mut connection {
                tries += 1;
                match sender.publish(&endpoints[app], body.as_bytes()) {
                    Ok(()) => break,
                    // What it says itself will not change.
                    Err(error) if error.kind() == std::io::ErrorKind::Other => panic!("{label} {n}: {error}"),
                    Err(_) => {}
                }
            }
            connection = None;
            thread::sleep(Duration::from_millis(20));
        }
        sent.push(Sent { app, body, tries });
        thread::sleep(gap);
    }
    sent
}

/// Where chance decides: the seed is printed, and `NIGHTPORTER_TEST_SEED` takes its place.
struct Random(u64);

impl Random {
    fn new() -> Self {
        let given = env::var("NIGHTPORTER_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
        let clock = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos() as u64;
        let seed = given.unwrap_or_else(clock);
        println!("NIGHTPORTER_TEST_SEED={seed}");
        Self(seed)
    }

    /// splitmix64.
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % bound
    }
}
