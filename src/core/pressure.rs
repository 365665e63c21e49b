//! Memory pressure: when it is short, and which frozen app goes deeper next, one at a time. Pure, and knows no sibling.
//!
//! The kernel says when tasks begin to wait for memory (PSI), and nothing is asked while they do not. One word of it is
//! never enough (lifecycle.md §4.7): a second look must say the same. Then every 1.5 s one app goes deeper, until two
//! looks in a row say that it suffices: first page-outs, a few, then tombstones, the least valuable app first. It is all
//! done well before systemd-oomd, earlyoom and the kernel kill whatever they find.

use std::{collections::BTreeMap, time::Duration};

use crate::{
    config::PressureSettings,
    model::{AppKey, Pressure as Reading, Stall, Stalled},
    time::Instant,
};

/// Between the first word and the second look.
const SECOND_LOOK: Duration = Duration::from_secs(1);
/// Between two apps, and two looks while memory is short.
const STEP: Duration = Duration::from_millis(1500);
/// Between two looks when nothing can be done, or it has got better.
const EASY: Duration = Duration::from_secs(4);
/// Memory that is not short for this long is not short any more.
const RELIEF: Duration = Duration::from_secs(12);
/// After that, moderate shortness does not count for this long.
const COOL_DOWN: Duration = Duration::from_secs(30);
/// How long what was asked of an app is waited for: it may take 5 s to end by itself.
const PATIENCE: (Duration, Duration) = (Duration::from_secs(7), Duration::from_secs(4));
/// Page-outs in a row before tombstones follow, while it is moderate and severe: paging out itself takes time and memory.
const PAGE_OUTS: (u32, u32) = (5, 2);
/// A look that is not answered is given up.
const ANSWER: Duration = Duration::from_secs(10);
/// Two looks closer together than this are one.
const APART: Duration = Duration::from_millis(500);
/// What waited between two looks further apart says nothing of now.
const RECENT: Duration = Duration::from_secs(6);
/// Something froze or thawed: a look at most this often.
const GLANCE: Duration = Duration::from_secs(10);
/// An app started again within this of its end came back soon.
const SOON: Duration = Duration::from_secs(600);
/// What was counted of an app counts half after this.
const HALF_LIFE: Duration = Duration::from_secs(12 * 3600);
/// Woken more often than this a day its pages would be read back at once (lifecycle.md §6, 21).
const HOT: u32 = 144;
/// What an app is taken to give back that was never measured. KiB.
const UNMEASURED: u64 = 1024;

/// Memory is available again in plenty, whatever waits: a single app that thrashes within its own limit. Percent.
const PLENTY: u64 = 50;
/// By what is available alone, percent of the memory: page out.
const LOW_MEMORY: u64 = 15;
/// Percent of memory and of swap that are available: end. Above what earlyoom (10 % and 10 %) and systemd-oomd (10 % and
/// 10 %) act upon.
const LITTLE: (u64, u64) = (12, 20);
/// Percent of swap, or of what zram may take, in use from which on nothing more is paged out.
const SWAP_FULL: u64 = 80;

/// A frozen app.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Which.
    pub app: AppKey,
    /// Frozen since then.
    pub frozen: Instant,
    /// Nobody looks at it since then.
    pub unseen: Instant,
    /// What ending it would give back at most, KiB, where it was measured.
    pub uss: Option<u64>,
    /// Whether its memory is in swap.
    pub paged_out: bool,
    /// Whether it can be paged out now.
    pub can_page_out: bool,
    /// Whether it can be ended now, and started again.
    pub can_end: bool,
}

/// Which app goes how deep, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub struct Order {
    /// Which.
    pub app: AppKey,
    /// How deep.
    pub deep: Deep,
    /// A sentence.
    pub reason: String,
}

/// How deep an app goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deep {
    /// Its memory goes to swap.
    PageOut,
    /// It is ended.
    End,
}

/// How short memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// It is not.
    Enough,
    /// Little is available; nothing waits for it, as far as is known. Apps are paged out.
    Low,
    /// Tasks wait for it. Apps are paged out, and a few later ended.
    Moderate,
    /// Tasks wait for it most of the time, or all of them do, or memory and swap are nearly used up.
    Severe,
}

impl Level {
    /// The word in `view::Pressure::level`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Enough => "enough",
            Self::Low => "low",
            Self::Moderate => "moderate",
            Self::Severe => "severe",
        }
    }
}

/// What is remembered of pressure.
#[derive(Debug)]
pub struct Pressure {
    settings: PressureSettings,
    state: State,
    since: Instant,
    /// The reading that counts as the one before, for what was waited in between; and what that was, the last time.
    base: Option<(Instant, Stalled)>,
    share: Share,
    latest: Option<Reading>,
    /// A look that has been asked for, until when it may be answered.
    asked: Option<Instant>,
    glanced: Option<Instant>,
    /// Until when only severe shortness counts.
    cool_until: Instant,
    histories: BTreeMap<AppKey, History>,
    /// Orders given, by depth.
    paged_out: u64,
    ended: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Calm,
    /// It was said once.
    Suspected {
        since: Instant,
    },
    Pressed(Pressed),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Pressed {
    level: Level,
    /// When the next look is due.
    look: Instant,
    /// When the last order was given.
    ordered: Option<Instant>,
    /// Whether what was ordered was still going on at the last look: what waited since says little.
    tainted: bool,
    page_outs: u32,
    /// Since when it is not short.
    relieved: Option<Instant>,
    /// Since when nothing can be done.
    helpless: Option<Instant>,
}

/// Of a second, how long some and all tasks waited.
#[derive(Clone, Copy, Debug)]
struct Share {
    some: Duration,
    full: Duration,
    /// Since the look before, and not an average of 10 s that lags behind.
    exact: bool,
}

/// What an app has done.
#[derive(Clone, Copy, Debug, Default)]
struct History {
    /// Wake-ups for messages, and starts soon after it was ended, both halved every [`HALF_LIFE`].
    wakes: u32,
    comebacks: u32,
    halved: Instant,
    ended: Option<Instant>,
}

impl Pressure {
    /// Nothing is known yet.
    pub const fn new(settings: PressureSettings, now: Instant) -> Self {
        Self {
            settings,
            state: State::Calm,
            since: now,
            base: None,
            share: Share { some: Duration::ZERO, full: Duration::ZERO, exact: false },
            latest: None,
            asked: None,
            glanced: None,
            cool_until: Instant::from_nanos(0),
            histories: BTreeMap::new(),
            paged_out: 0,
            ended: 0,
        }
    }

    /// Memory was read. `held` are all frozen apps, `busy` says whether one is being paged out or ended. What comes back
    /// is to be done at once.
    pub fn read(&mut self, reading: &Reading, held: &[Candidate], busy: bool, now: Instant) -> Option<Order> {
        if !self.settings.enabled {
            return None;
        }
        if reading.trigger.is_none() {
            self.asked = None;
        }
        let level = self.judge(reading, now);
        self.latest = Some(*reading);
        match self.state {
            State::Calm if level == Level::Enough || (level < Level::Severe && now < self.cool_until) => None,
            State::Calm => {
                self.turn(State::Suspected { since: now }, now);
                None
            }
            State::Suspected { since } if now.since(since) < APART => None,
            State::Suspected { .. } if level == Level::Enough => {
                self.turn(State::Calm, now);
                None
            }
            State::Suspected { .. } => {
                let pressed = Pressed {
                    level,
                    look: now,
                    ordered: None,
                    tainted: false,
                    page_outs: 0,
                    relieved: None,
                    helpless: None,
                };
                self.turn(State::Pressed(pressed), now);
                self.press(pressed, level, reading, held, busy, now)
            }
            State::Pressed(pressed) => self.press(pressed, level, reading, held, busy, now),
        }
    }

    /// An app was frozen or thawed. True when it is worth a look at memory.
    pub fn is_worth_a_look(&mut self, now: Instant) -> bool {
        let due = self.settings.enabled
            && self.state == State::Calm
            && self.asked.is_none()
            && self.glanced.is_none_or(|glanced| now.since(glanced) >= GLANCE);
        if due {
            (self.glanced, self.asked) = (Some(now), Some(now + ANSWER));
        }
        due
    }

    /// Time passed. True when memory is to be read.
    pub fn handle_timeout(&mut self, now: Instant) -> bool {
        if let Some(until) = self.asked {
            if now < until {
                return false;
            }
            self.asked = None;
            self.turn(State::Calm, now);
        }
        let due = self.poll_timeout().is_some_and(|due| due <= now);
        if due {
            self.asked = Some(now + ANSWER);
        }
        due
    }

    /// When [`Pressure::handle_timeout`] wants to be called next; never while memory is not short.
    pub const fn poll_timeout(&self) -> Option<Instant> {
        if self.asked.is_some() {
            return self.asked;
        }
        match self.state {
            State::Calm => None,
            State::Suspected { since } => Some(Instant::from_nanos(since.as_nanos() + SECOND_LOOK.as_nanos() as u64)),
            State::Pressed(pressed) => Some(pressed.look),
        }
    }

    /// Whether apps are being made to go deeper.
    pub const fn is_pressed(&self) -> bool {
        matches!(self.state, State::Pressed(_))
    }

    /// A message woke the app.
    pub fn woken(&mut self, app: &AppKey, now: Instant) {
        let history = self.histories.entry(app.clone()).or_default();
        history.fade(now);
        history.wakes = history.wakes.saturating_add(1);
    }

    /// The app runs, started by whomever.
    pub fn appeared(&mut self, app: &AppKey, now: Instant) {
        if let Some(history) = self.histories.get_mut(app)
            && history.ended.take().is_some_and(|ended| now.since(ended) < SOON)
        {
            history.fade(now);
            history.comebacks = history.comebacks.saturating_add(1).min(16);
        }
    }

    /// The app is no business of ours any more.
    pub fn forget(&mut self, app: &AppKey) {
        self.histories.remove(app);
    }

    /// How short memory is, and since when it is (or is not).
    pub const fn level(&self) -> (Level, Instant) {
        match self.state {
            State::Calm | State::Suspected { .. } => (Level::Enough, self.since),
            State::Pressed(Pressed { relieved: Some(_), .. }) => (Level::Enough, self.since),
            State::Pressed(pressed) => (pressed.level, self.since),
        }
    }

    /// The same as a sentence.
    pub fn sentence(&self) -> String {
        match (self.state, &self.latest) {
            _ if !self.settings.enabled => "memory pressure is not looked at: the configuration says so".into(),
            (State::Pressed(Pressed { relieved: Some(_), .. }), _) => "memory was short until a moment ago".into(),
            (State::Pressed(pressed), Some(reading)) => why(pressed.level, reading),
            _ => "memory is not short".into(),
        }
    }

    /// Apps paged out and ended for want of memory since the daemon started.
    pub const fn counts(&self) -> (u64, u64) {
        (self.paged_out, self.ended)
    }

    fn turn(&mut self, state: State, now: Instant) {
        let was = self.is_pressed();
        self.state = state;
        if was != self.is_pressed() {
            self.since = now;
        }
    }

    /// Memory is short, or was a moment ago.
    fn press(
        &mut self,
        mut pressed: Pressed,
        level: Level,
        reading: &Reading,
        held: &[Candidate],
        busy: bool,
        now: Instant,
    ) -> Option<Order> {
        if level == Level::Enough {
            let since = *pressed.relieved.get_or_insert(now);
            pressed.tainted = busy;
            if now.since(since) >= RELIEF {
                self.cool_until = now + COOL_DOWN;
                self.turn(State::Calm, now);
            } else {
                pressed.look = now + EASY;
                self.turn(State::Pressed(pressed), now);
            }
            return None;
        }
        let again = pressed.relieved.take().is_some();
        pressed.level = level;
        let order = match self.may_order(&pressed, again, busy, now) {
            true => {
                let order = self.choose(&pressed, reading, held, now);
                match (&order, pressed.helpless) {
                    (Some(_), _) => pressed.helpless = None,
                    (None, None) => pressed.helpless = Some(now),
                    (None, Some(_)) => {}
                }
                order
            }
            false => None,
        };
        pressed.tainted = busy || order.is_some();
        if let Some(order) = &order {
            pressed.ordered = Some(now);
            match order.deep {
                Deep::PageOut => (pressed.page_outs, self.paged_out) = (pressed.page_outs + 1, self.paged_out + 1),
                Deep::End => {
                    self.ended += 1;
                    self.histories.entry(order.app.clone()).or_default().ended = Some(now);
                }
            }
        }
        match pressed.helpless {
            // The kernel will say it again, and so will the next app that is frozen.
            Some(since) if now.since(since) >= RELIEF => {
                self.cool_until = now + COOL_DOWN;
                self.turn(State::Calm, now);
            }
            helpless => {
                pressed.look = now + if helpless.is_some() { EASY } else { STEP };
                self.turn(State::Pressed(pressed), now);
            }
        }
        order
    }

    /// One app at a time, and what the last one gave must be seen first. `again`: it was enough a moment ago.
    fn may_order(&self, pressed: &Pressed, again: bool, busy: bool, now: Instant) -> bool {
        let severe = pressed.level == Level::Severe;
        let patience = if severe { PATIENCE.1 } else { PATIENCE.0 };
        match pressed.ordered {
            None => true,
            Some(ordered) if now.since(ordered) < STEP => false,
            Some(ordered) if busy => now.since(ordered) >= patience,
            Some(_) => severe || !(pressed.tainted || again),
        }
    }

    fn choose(&mut self, pressed: &Pressed, reading: &Reading, held: &[Candidate], now: Instant) -> Option<Order> {
        for history in self.histories.values_mut() {
            history.fade(now);
        }
        let history = |app: &AppKey| self.histories.get(app).copied().unwrap_or_default();
        let severe = pressed.level == Level::Severe;
        let most = match pressed.level {
            Level::Enough | Level::Low => u32::MAX,
            Level::Moderate => PAGE_OUTS.0,
            Level::Severe => PAGE_OUTS.1,
        };
        let hot = |app: &Candidate| !severe && history(&app.app).wakes >= HOT;
        if has_room(reading) && pressed.page_outs < most {
            let open = held.iter().filter(|app| app.can_page_out && !hot(app));
            if let Some(app) = open.max_by_key(|app| (pages(app, now), std::cmp::Reverse(&app.app))) {
                return Some(order(app, Deep::PageOut, pressed.level, reading));
            }
        }
        // Where nothing waits there is no need to end anything.
        if pressed.level == Level::Low {
            return None;
        }
        let open = held.iter().filter(|app| app.can_end);
        let app = open.max_by_key(|app| (worthless(app, &history(&app.app), now), std::cmp::Reverse(&app.app)))?;
        Some(order(app, Deep::End, pressed.level, reading))
    }

    /// How short memory is now.
    fn judge(&mut self, reading: &Reading, now: Instant) -> Level {
        let share = reading.stalled.map(|stalled| self.share(stalled, now));
        if reading.total == 0 || percent(reading.available, reading.total) >= PLENTY {
            return Level::Enough;
        }
        // What the kernel says is of the second or two before, in which an app may have been ended.
        let said = match reading.trigger {
            Some(_) if share.is_some_and(|share| share.exact) => Level::Enough,
            Some(Stall::Severe) => Level::Severe,
            Some(Stall::Moderate) => Level::Moderate,
            None => Level::Enough,
        };
        let measured = match share {
            Some(Share { some, full, .. }) if some >= self.settings.severe || full >= self.settings.moderate => {
                Level::Severe
            }
            Some(Share { some, .. }) if some >= self.settings.moderate => Level::Moderate,
            _ => Level::Enough,
        };
        said.max(measured).max(by_size(reading))
    }

    /// How long tasks waited since the look before; where that was too long ago, on average.
    fn share(&mut self, stalled: Stalled, now: Instant) -> Share {
        match self.base {
            Some((at, _)) if now.since(at) < APART => return self.share,
            Some((at, base)) if now.since(at) <= RECENT => {
                let micros = now.since(at).as_micros().max(1);
                let rate = |now: u64, then: u64| {
                    let part = u128::from(now.saturating_sub(then)) * 1_000_000 / micros;
                    Duration::from_micros(u64::try_from(part).unwrap_or(u64::MAX))
                };
                let some = rate(stalled.some_total, base.some_total);
                self.share = Share { some, full: rate(stalled.full_total, base.full_total), exact: true };
            }
            _ => {
                let average = |hundredths: u32| Duration::from_micros(u64::from(hundredths) * 100);
                let (some, full) = (average(stalled.some_avg10), average(stalled.full_avg10));
                self.share = Share { some, full, exact: false };
            }
        }
        self.base = Some((now, stalled));
        self.share
    }
}

impl History {
    fn fade(&mut self, now: Instant) {
        while now.since(self.halved) >= HALF_LIFE {
            if (self.wakes, self.comebacks) == (0, 0) {
                self.halved = now;
                return;
            }
            (self.wakes, self.comebacks) = (self.wakes / 2, self.comebacks / 2);
            self.halved = self.halved + HALF_LIFE;
        }
    }
}

/// How short memory is by what is available alone.
fn by_size(reading: &Reading) -> Level {
    let available = percent(reading.available, reading.total);
    let no_swap = reading.swap_total == 0 || percent(reading.swap_free, reading.swap_total) < LITTLE.1;
    match available {
        0..LOW_MEMORY if available < LITTLE.0 && no_swap => Level::Severe,
        0..LOW_MEMORY => Level::Low,
        _ => Level::Enough,
    }
}

/// Whether more can be paged out.
fn has_room(reading: &Reading) -> bool {
    let used = reading.swap_total.saturating_sub(reading.swap_free);
    reading.swap_total > 0
        && percent(used, reading.swap_total) < SWAP_FULL
        && (reading.zram_limit == 0 || percent(reading.zram_used, reading.zram_limit) < SWAP_FULL)
}

/// The largest first, and the one that is frozen longest.
fn pages(app: &Candidate, now: Instant) -> u128 {
    let minutes = now.since(app.frozen).as_secs() / 60;
    u128::from(app.uss.unwrap_or(UNMEASURED)) * u128::from(10 + minutes.min(1440))
}

/// How little is lost with the app for what it gives back: what nobody has looked at for long, and gives back much, goes
/// before what is woken often and has come back soon.
fn worthless(app: &Candidate, history: &History, now: Instant) -> u128 {
    let minutes = now.since(app.unseen).as_secs() / 60;
    let size = app.uss.unwrap_or(UNMEASURED);
    // In zram it takes about a third.
    let size = if app.paged_out { size / 3 } else { size };
    let worth = u128::from(1 + history.wakes) * u128::from(1 + 2 * history.comebacks);
    u128::from(size.max(1)) * u128::from(10 + minutes.min(1440)) * 1000 / worth
}

fn order(app: &Candidate, deep: Deep, level: Level, reading: &Reading) -> Order {
    Order { app: app.app.clone(), deep, reason: why(level, reading) }
}

/// The state of memory as a sentence.
fn why(level: Level, reading: &Reading) -> String {
    let available = percent(reading.available, reading.total);
    let stalled = reading.stalled.filter(|stalled| stalled.some_avg10 >= 100);
    match (level, stalled) {
        (Level::Moderate | Level::Severe, Some(stalled)) if stalled.full_avg10 >= 100 => format!(
            "memory is short: tasks waited for it {} % of the last 10 s, all of them {} %",
            stalled.some_avg10 / 100,
            stalled.full_avg10 / 100
        ),
        (Level::Moderate | Level::Severe, Some(stalled)) => {
            format!("memory is short: tasks waited for it {} % of the last 10 s", stalled.some_avg10 / 100)
        }
        (Level::Severe, None) if by_size(reading) == Level::Severe => {
            let swap = match reading.swap_total {
                0 => "there is no swap".to_owned(),
                total => format!("{} % of swap is free", percent(reading.swap_free, total)),
            };
            format!("memory is short: {available} % of it is available, and {swap}")
        }
        (Level::Moderate | Level::Severe, None) => {
            format!("memory is short: tasks begin to wait for it, and {available} % is available")
        }
        (Level::Enough | Level::Low, _) => format!("memory is short: {available} % of it is available"),
    }
}

const fn percent(part: u64, whole: u64) -> u64 {
    match part.saturating_mul(100).checked_div(whole) {
        Some(percent) => percent,
        None => 0,
    }
}

#[cfg(test)]
mod tests;
