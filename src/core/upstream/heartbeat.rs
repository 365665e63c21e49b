//! The longest silence each network bears, learnt (push.md §5, §6.7): for links whose client sets the rhythm.
//!
//! A NAT on the way forgets a silent connection after a time that nobody tells. So the interval between two signs of life
//! begins where most networks are good, grows after some answered in a row, and halves the gap to the shortest silence
//! that killed a link until little is left of it. A link that dies of a silence that was good before halves the interval
//! at once; a second one forgets what was good. What was learnt is kept per network, and what was too long is tried again
//! weekly.
//!
//! A ping without an answer need not be the NAT's doing: the phone may have lost the network. It counts only when the
//! server is reached again on the same network shortly after.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::time::{Instant, Now, UnixTime};

/// Where an unknown network begins: what WeChat and WhatsApp found good nearly everywhere (push.md §5.1).
pub const START: Duration = Duration::from_secs(270);
/// Answered pings in a row before a longer interval is tried.
pub const GOOD_TO_GROW: u32 = 3;
/// Networks remembered; of more the one used longest ago is forgotten.
pub const NETWORKS: usize = 20;
/// What is known to be too long is tried again after this.
pub const LOOK_AGAIN: Duration = Duration::from_secs(7 * 24 * 3600);
/// A silence that killed a link counts when the server is reached again within this.
const CONFIRMED_WITHIN: Duration = Duration::from_secs(60);
/// The gap between good and bad is small enough when it is below this or a 16th of what is good.
const GAP: Duration = Duration::from_secs(30);
/// Names of networks longer than this are cut.
const NAME_LIMIT: usize = 200;
/// The name of a network that has none.
const UNKNOWN: &str = "unknown";

/// What is known of the networks, and the one in use.
#[derive(Debug)]
pub struct Intervals {
    least: Duration,
    most: Duration,
    /// The one used last is the last.
    networks: Vec<Network>,
    /// A silence after which a link was dead, on which network, and when it was found so.
    suspect: Option<(Duration, Instant)>,
    /// The silence after which the last link was closed by somebody.
    closed: Option<Duration>,
    changed: bool,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Network {
    #[serde(rename = "n")]
    name: Box<str>,
    /// Seconds between two signs of life.
    #[serde(rename = "i")]
    interval: u32,
    /// The longest silence in seconds after which a link lived; 0: none yet.
    #[serde(rename = "g", default)]
    good: u32,
    /// The shortest silence in seconds after which one was dead; 0: none yet.
    #[serde(rename = "b", default)]
    bad: u32,
    /// When that was found, in seconds since 1970.
    #[serde(rename = "t", default)]
    found: u64,
    /// Answered in a row at this interval.
    #[serde(skip)]
    streak: u32,
    /// Since a link was lost to a silence that was good before: the longest after which one lived.
    #[serde(skip)]
    doubt: Option<u32>,
}

impl Network {
    const fn has_learnt(&self) -> bool {
        self.good != 0 || self.bad != 0
    }
}

impl Intervals {
    /// What an earlier life remembered, within `bounds`: the shortest and the longest interval.
    pub fn new(bounds: (Duration, Duration), remembered: Option<&str>) -> Self {
        let least = bounds.0.max(Duration::from_secs(1));
        let most = bounds.1.max(least);
        let mut networks: Vec<Network> =
            remembered.and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
        networks.drain(..networks.len().saturating_sub(NETWORKS));
        let mut intervals = Self { least, most, networks, suspect: None, closed: None, changed: false };
        for index in 0..intervals.networks.len() {
            let interval = intervals.within(intervals.networks[index].interval);
            intervals.networks[index].interval = interval;
        }
        intervals.use_network(None);
        intervals
    }

    /// Which network it is now.
    pub fn use_network(&mut self, name: Option<&str>) {
        let name = name.unwrap_or(UNKNOWN);
        let name = &name[..name.floor_char_boundary(NAME_LIMIT)];
        if self.networks.last().is_some_and(|network| &*network.name == name) {
            return;
        }
        self.suspect = None;
        self.closed = None;
        let network = match self.networks.iter().position(|network| &*network.name == name) {
            Some(index) => self.networks.remove(index),
            None => {
                let interval = self.within(secs(START));
                Network { name: name.into(), interval, good: 0, bad: 0, found: 0, streak: 0, doubt: None }
            }
        };
        // One more than is remembered: the one in use may never have anything to remember.
        if self.networks.len() > NETWORKS {
            let least = self.networks.iter().position(|network| !network.has_learnt()).unwrap_or_default();
            self.networks.remove(least);
        }
        self.networks.push(network);
    }

    /// Between two signs of life on the network in use.
    pub fn interval(&self) -> Duration {
        self.networks.last().map_or(self.least, |network| Duration::from_secs(network.interval.into()))
    }

    /// The longest there may ever be.
    pub const fn longest(&self) -> Duration {
        self.most
    }

    /// The link was silent for so long and lives.
    pub fn answered(&mut self, silence: Duration, wall: UnixTime) {
        let (least, most) = (secs(self.least), secs(self.most));
        let Some(network) = self.networks.last_mut() else { return };
        let silence = secs(silence).min(most);
        if u64::from(silence) * 10 < u64::from(network.interval) * 9 {
            return;
        }
        network.doubt = network.doubt.map(|lived| lived.max(silence)).filter(|lived| *lived < network.good);
        network.good = network.good.max(silence);
        if network.good >= network.bad {
            network.bad = 0;
        }
        network.streak += 1;
        if network.streak < GOOD_TO_GROW {
            return;
        }
        network.streak = 0;
        let longer = match network.bad {
            // Shrunk below what is still held to be good: back to it.
            _ if network.good > network.interval => network.good,
            0 => network.interval.saturating_add(network.interval / 2),
            bad if wall.since(UnixTime::from_secs(network.found)) >= LOOK_AGAIN => bad,
            bad if bad - network.good <= secs(GAP).max(network.good / 16) => network.good,
            bad => network.good + (bad - network.good) / 2,
        };
        let longer = longer.clamp(least, most);
        if longer > network.interval {
            network.interval = longer;
            self.changed = true;
        }
    }

    /// The link was dead after so long a silence: a ping was not answered, or answered with an error.
    pub fn unanswered(&mut self, silence: Duration, now: Instant) {
        let interval = self.interval();
        // A ping much too late, after the machine slept, says nothing of the interval.
        if silence <= interval + interval / 4 && silence >= interval / 2 {
            self.suspect = Some((silence, now));
        }
    }

    /// Somebody closed the link after so long a silence, with no ping under way. Load balancers do so, always after the
    /// same time; twice in a row is taken for one.
    pub fn closed(&mut self, silence: Duration, now: Instant) {
        let before = self.closed.replace(silence);
        if silence >= self.least / 2 && before.is_some_and(|before| before.abs_diff(silence) <= silence / 10) {
            self.closed = None;
            self.suspect = Some((silence, now));
        }
    }

    /// The server is reached again.
    pub fn connected(&mut self, now: Now) {
        let Some((silence, at)) = self.suspect.take() else { return };
        if now.boot.since(at) <= CONFIRMED_WITHIN {
            self.died_of(secs(silence), now.wall);
        }
    }

    /// What to remember, if it is not what was remembered last.
    pub fn take_changed(&mut self) -> Option<String> {
        if !std::mem::take(&mut self.changed) {
            return None;
        }
        let learnt: Vec<&Network> = self.networks.iter().filter(|network| network.has_learnt()).collect();
        serde_json::to_string(&learnt[learnt.len().saturating_sub(NETWORKS)..]).ok()
    }

    fn died_of(&mut self, silence: u32, wall: UnixTime) {
        let (least, most) = (secs(self.least), secs(self.most));
        let Some(network) = self.networks.last_mut() else { return };
        network.streak = 0;
        network.found = wall.as_millis() / 1000;
        if silence <= network.good {
            match network.doubt {
                None => {
                    network.doubt = Some(0);
                    network.interval = silence.min(network.interval) / 2;
                    network.interval = network.interval.clamp(least, most);
                    self.changed = true;
                    return;
                }
                Some(lived) => {
                    network.doubt = None;
                    network.good = if lived < silence { lived } else { 0 };
                    network.bad = 0;
                }
            }
        }
        // Further than what is good: a try that failed.
        network.bad = if network.bad == 0 { silence } else { network.bad.min(silence) };
        network.interval = if network.good == 0 { silence / 2 } else { network.good.min(network.interval) };
        network.interval = network.interval.clamp(least, most);
        self.changed = true;
    }

    fn within(&self, interval: u32) -> u32 {
        interval.clamp(secs(self.least), secs(self.most))
    }
}

fn secs(time: Duration) -> u32 {
    u32::try_from(time.as_secs()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BOUNDS: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(29 * 60));
    const DAY: u64 = 24 * 3600;

    /// A phone behind a NAT that forgets a connection after `limit` of silence.
    struct Phone {
        intervals: Intervals,
        limit: u64,
        clock: u64,
        lost: u32,
    }

    impl Phone {
        fn new(limit: u64) -> Self {
            Self { intervals: Intervals::new(BOUNDS, None), limit, clock: 1_800_000_000, lost: 0 }
        }

        fn now(&self) -> Now {
            Now { boot: Instant::from_nanos(self.clock * 1_000_000_000), wall: UnixTime::from_secs(self.clock) }
        }

        /// One silence and the ping at its end; gives whether the link lived.
        fn beat(&mut self) -> bool {
            let silence = self.intervals.interval();
            assert!(silence >= BOUNDS.0 && silence <= BOUNDS.1, "{silence:?} is out of bounds");
            self.clock += silence.as_secs();
            let lives = silence.as_secs() <= self.limit;
            if lives {
                self.intervals.answered(silence, self.now().wall);
            } else {
                self.lost += 1;
                self.clock += 10;
                self.intervals.unanswered(silence, self.now().boot);
                self.clock += 2;
                self.intervals.connected(self.now());
            }
            lives
        }

        fn run(&mut self, days: u64) -> u32 {
            let (end, before) = (self.clock + days * DAY, self.lost);
            while self.clock < end {
                self.beat();
            }
            self.lost - before
        }

        fn interval(&self) -> u64 {
            self.intervals.interval().as_secs()
        }
    }

    fn margin(limit: u64) -> u64 {
        GAP.as_secs().max(limit / 16) + 2
    }

    proptest! {
        #[test]
        fn the_interval_comes_close_to_what_the_nat_bears(limit in 60_u64..4000) {
            let mut phone = Phone::new(limit);
            let lost = phone.run(5);
            let best = limit.min(BOUNDS.1.as_secs());
            prop_assert!(phone.interval() <= best);
            prop_assert!(phone.interval() + margin(best) >= best, "{} of {best}", phone.interval());
            prop_assert!(lost <= 7, "{lost} links were lost to learn {limit}");
            // And it stays there.
            prop_assert_eq!(phone.run(1), 0);
        }

        #[test]
        fn a_nat_that_bears_less_is_followed_within_two_links(limit in 120_u64..1740, then in 60_u64..1740) {
            let mut phone = Phone::new(limit);
            phone.run(5);
            let before = phone.interval();
            phone.limit = then.min(before - 1).max(60);
            // Beats until the link is lost to a silence that was good: at once.
            let lost_at = phone.interval();
            while phone.beat() {}
            prop_assert!(phone.interval() <= lost_at.div_ceil(2).max(60));
            if phone.interval() > phone.limit {
                while phone.beat() {}
                prop_assert!(phone.interval() <= lost_at.div_ceil(4).max(60));
            }
            let lost = phone.run(6);
            prop_assert!(phone.interval() <= phone.limit);
            prop_assert!(phone.interval() + margin(phone.limit) >= phone.limit, "{} of {}", phone.interval(), phone.limit);
            prop_assert!(lost <= 9, "{lost}");
        }

        #[test]
        fn nothing_leads_out_of_bounds(
            low in 1_u64..400,
            wide in 0_u64..4000,
            beats in prop::collection::vec((0_u8..5, 0_u64..5000), 0..200),
        ) {
            let bounds = (Duration::from_secs(low), Duration::from_secs(low + wide));
            let mut intervals = Intervals::new(bounds, None);
            let mut clock = 1_000_000_000;
            for (what, secs) in beats {
                clock += secs;
                let now = Now { boot: Instant::from_nanos(clock * 1_000_000_000), wall: UnixTime::from_secs(clock) };
                let silence = Duration::from_secs(secs);
                match what {
                    0 => intervals.answered(silence, now.wall),
                    1 => intervals.unanswered(silence, now.boot),
                    2 => intervals.closed(silence, now.boot),
                    3 => intervals.connected(now),
                    _ => intervals.use_network(Some(&format!("n{}", secs % 30))),
                }
                prop_assert!(intervals.interval() >= bounds.0 && intervals.interval() <= bounds.1);
                prop_assert!(intervals.networks.len() <= NETWORKS + 1);
                if let Some(text) = intervals.take_changed() {
                    let again = Intervals::new(bounds, Some(&text));
                    for network in intervals.networks.iter().filter(|network| network.has_learnt()) {
                        let same = again.networks.iter().find(|other| other.name == network.name);
                        prop_assert_eq!(same.map(|same| same.interval), Some(network.interval));
                    }
                    prop_assert!(text.len() < 6000);
                }
            }
        }

        #[test]
        fn any_remembered_text_is_survived(text in ".{0,200}") {
            Intervals::new(BOUNDS, Some(&text));
        }
    }

    #[test]
    fn a_lost_network_is_not_taken_for_a_short_nat() {
        let mut phone = Phone::new(3600);
        phone.run(1);
        let before = phone.interval();
        for _ in 0..10 {
            phone.intervals.unanswered(Duration::from_secs(before), phone.now().boot);
            phone.clock += 600;
            phone.intervals.connected(phone.now());
        }
        assert_eq!(phone.interval(), before);
        // Nor is one link lost on another network.
        phone.intervals.unanswered(Duration::from_secs(before), phone.now().boot);
        phone.intervals.use_network(Some("wifi/cafe"));
        phone.intervals.connected(phone.now());
        phone.intervals.use_network(None);
        assert_eq!(phone.interval(), before);
    }

    #[test]
    fn a_ping_after_the_machine_slept_shrinks_nothing() {
        let mut phone = Phone::new(3600);
        phone.intervals.unanswered(Duration::from_secs(7200), phone.now().boot);
        phone.intervals.connected(phone.now());
        assert_eq!(phone.interval(), START.as_secs());
    }

    #[test]
    fn a_load_balancer_that_closes_silent_links_is_found() {
        let mut phone = Phone::new(3600);
        for _ in 0..2 {
            phone.clock += 200;
            phone.intervals.closed(Duration::from_secs(200), phone.now().boot);
            phone.intervals.connected(phone.now());
        }
        assert!(phone.interval() < 200, "{}", phone.interval());
        // Restarts of a server are no pattern.
        let mut phone = Phone::new(3600);
        for silence in [200, 100, 30, 150] {
            phone.intervals.closed(Duration::from_secs(silence), phone.now().boot);
            phone.intervals.connected(phone.now());
        }
        assert_eq!(phone.interval(), START.as_secs());
    }

    #[test]
    fn each_network_has_its_own_and_the_oldest_is_forgotten() {
        let mut phone = Phone::new(100);
        phone.intervals.use_network(Some("mobile/strict"));
        phone.run(2);
        let strict = phone.interval();
        assert!(strict <= 100);
        for n in 0..3 * NETWORKS {
            phone.intervals.use_network(Some(&format!("wifi/{n}")));
            assert_eq!(phone.interval(), START.as_secs());
        }
        phone.intervals.use_network(Some("mobile/strict"));
        assert_eq!(phone.interval(), strict);
        let text = phone.intervals.take_changed().unwrap();
        let mut again = Intervals::new(BOUNDS, Some(&text));
        again.use_network(Some("mobile/strict"));
        assert_eq!(again.interval().as_secs(), strict);
        for n in 0..NETWORKS + 1 {
            again.use_network(Some(&format!("other/{n}")));
            again.answered(START, UnixTime::from_secs(1));
        }
        again.use_network(Some("mobile/strict"));
        assert_eq!(again.interval(), START);
    }

    #[test]
    fn a_nat_that_became_better_is_found_within_a_week_or_so() {
        let mut phone = Phone::new(300);
        phone.run(3);
        assert!(phone.interval() <= 300);
        phone.limit = 1200;
        let lost = phone.run(10);
        assert!(phone.interval() > 1100, "{}", phone.interval());
        assert!(lost <= 4, "{lost}");
        // Where nothing changes a look costs one link a week.
        let mut phone = Phone::new(300);
        phone.run(3);
        let lost = phone.run(28);
        assert!((3..=5).contains(&lost), "{lost}");
    }

    #[test]
    fn what_is_settled_is_not_written_again() {
        let mut phone = Phone::new(900);
        phone.run(5);
        phone.intervals.take_changed();
        let mut writes = 0;
        for _ in 0..100 {
            phone.beat();
            writes += u32::from(phone.intervals.take_changed().is_some());
        }
        assert_eq!(writes, 0);
    }
}
