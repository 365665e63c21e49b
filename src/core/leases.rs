//! What keeps an app awake in the background although nobody looks at it: leases (design.md, "Leases").
//!
//! Pure: leases, facts and time in, [`Leases::poll_output`] until `None`, then [`Leases::poll_timeout`]. Siblings are not
//! known here; who may take a lease, and for whom, is decided before (`core/control.rs`).
//!
//! - A lease's time, and its kind's budget, run only while its app is in the background: in the foreground it costs
//!   nothing, and neither while the machine sleeps.
//! - Leases of one kind and app use up one budget together, by the clock, not each for itself. It is for 24 hours from the
//!   first use on.
//! - What a kind is for must be to be seen, where it can be (`audio`: sound or a player; `call`: a call). Where it is not,
//!   within [`PROOF`], the lease counts as `task` until it is, and is over after [`UNPROVED`] of that in one go.
//! - Before a lease is taken its holder is told, [`NOTICE`] ahead.

#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use crate::{
    model::{AppKey, Bus, LeaseId, LeaseKind, Owner},
    time::Instant,
};

/// How long before its end a lease's holder is told (Android gives a few seconds, iOS up to 15).
pub const NOTICE: Duration = Duration::from_secs(5);
/// How long what a lease is for may be not to be seen, while it is needed.
pub const PROOF: Duration = Duration::from_secs(5);
/// After this the lease is over.
pub const UNPROVED: Duration = Duration::from_secs(30);
/// Leases of one app at most, and of all; beyond it the newest is refused.
pub const PER_APP: usize = 8;
/// See [`PER_APP`].
pub const IN_ALL: usize = 256;
/// What the budgets are for: Android's "per 24 h".
const DAY: Duration = Duration::from_secs(24 * 3600);
/// Apps whose budgets are remembered: those of which none is used go first, then those used longest ago.
const REMEMBERED: usize = 512;
const KINDS: usize = LeaseKind::ALL.len();

const MINUTE: u64 = 60;
const HOUR: u64 = 3600;

/// How long a lease of a kind lasts at most, in the background.
pub const fn time_of(kind: LeaseKind) -> Option<Duration> {
    match kind {
        // iOS's beginBackgroundTask.
        LeaseKind::Task => Some(Duration::from_secs(30)),
        // iOS gives a background refresh 30 s, and a phone on a mobile network needs a while to connect.
        LeaseKind::Sync => Some(Duration::from_secs(MINUTE)),
        LeaseKind::Transfer | LeaseKind::Navigation | LeaseKind::Audio | LeaseKind::Call => None,
    }
}

/// How much of a kind an app may use in 24 hours, in the background.
pub const fn budget_of(kind: LeaseKind) -> Option<Duration> {
    match kind {
        LeaseKind::Task => Some(Duration::from_secs(10 * MINUTE)),
        // Android's expedited jobs of an app in use.
        LeaseKind::Sync => Some(Duration::from_secs(30 * MINUTE)),
        // Android's dataSync.
        LeaseKind::Transfer => Some(Duration::from_secs(6 * HOUR)),
        // A day on the road with the screen off; on, it is not counted.
        LeaseKind::Navigation => Some(Duration::from_secs(12 * HOUR)),
        // Verified all the time.
        LeaseKind::Audio | LeaseKind::Call => None,
    }
}

/// The leases of all apps.
#[derive(Debug, Default)]
pub struct Leases {
    apps: BTreeMap<AppKey, Holder>,
    spent: BTreeMap<AppKey, [Budget; KINDS]>,
    last: u32,
    asleep: bool,
    out: VecDeque<Output>,
}

/// What is to be done, or known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// What keeps the app awake from now on, as a sentence; `None`: no lease does.
    Keeps(AppKey, Option<Arc<str>>),
    /// The holder is to be told that its lease is taken, and how soon.
    Ending {
        /// The bus it is on.
        bus: Bus,
        /// Its unique name.
        holder: Owner,
        /// Which.
        lease: LeaseId,
        /// How soon.
        within: Duration,
    },
    /// The lease is over, by us.
    Ended(Bus, LeaseId),
    /// A decision about the app: its verdict and why.
    Note(AppKey, &'static str, String),
}

/// What somebody wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wish {
    /// Who is to hold it.
    pub holder: Owner,
    /// What for.
    pub kind: LeaseKind,
    /// In the holder's words.
    pub reason: Arc<str>,
    /// How long at most.
    pub time: Option<Duration>,
}

/// What is to be seen of an app.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// It runs, and nobody looks at it.
    pub background: bool,
    /// It plays or records, or a player of its says so.
    pub audio: bool,
    /// It has a call.
    pub call: bool,
}

/// A lease, as it is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shown<'a> {
    /// Which.
    pub id: LeaseId,
    /// Whom it keeps awake.
    pub app: &'a AppKey,
    /// Who holds it.
    pub holder: &'a Owner,
    /// What it was taken as.
    pub kind: LeaseKind,
    /// What it counts as.
    pub counts_as: LeaseKind,
    /// In the holder's words.
    pub reason: &'a Arc<str>,
    /// How long it has been held.
    pub held: Duration,
    /// What is left of it in the background, where that is limited.
    pub left: Option<Duration>,
    /// Whether that is running out.
    pub counting: bool,
}

/// Why a lease is not given, as a sentence.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// There are enough.
    #[error("{0} leases are held for this app already")]
    TooManyOfApp(usize),
    /// There are enough.
    #[error("{0} leases are held already")]
    TooMany(usize),
    /// Its app has used up what it may.
    #[error(
        "the app has used up the {} of \"{}\" leases in the background that it has a day; there is more in {}",
        span(*.budget), .kind.as_str(), span(*.again)
    )]
    UsedUp {
        /// Of which kind.
        kind: LeaseKind,
        /// What it has.
        budget: Duration,
        /// When there is more.
        again: Duration,
    },
}

/// An app with leases.
#[derive(Debug, Default)]
struct Holder {
    leases: BTreeMap<LeaseId, Lease>,
    facts: Facts,
    /// Up to when its time in the background is counted; none while it is not there.
    counted: Option<Instant>,
    /// What was last said of it.
    keeps: Option<Arc<str>>,
}

#[derive(Debug)]
struct Lease {
    holder: Owner,
    kind: LeaseKind,
    reason: Arc<str>,
    since: Instant,
    /// What is left of its own time.
    left: Option<Duration>,
    /// How long it was needed, in one go, with nothing to be seen of what it is for.
    unproved: Duration,
    /// Whether its app was told that it counts as a task.
    demoted: bool,
    /// Whether its holder was told of its end.
    announced: bool,
}

/// What an app has used of a kind.
#[derive(Clone, Copy, Debug, Default)]
struct Budget {
    /// When the 24 hours began.
    since: Option<Instant>,
    spent: Duration,
}

impl Leases {
    /// Gives a lease that keeps `app` awake, an app that runs. What is to be seen of it is told next ([`Leases::observe`]).
    ///
    /// # Errors
    /// When there are too many, or the app has used up its budget.
    pub fn take(&mut self, app: &AppKey, wish: Wish, now: Instant) -> Result<LeaseId, Refusal> {
        let of_app = self.apps.get(app).map_or(0, |holder| holder.leases.len());
        if of_app >= PER_APP {
            return Err(Refusal::TooManyOfApp(of_app));
        }
        if self.all().count() >= IN_ALL {
            return Err(Refusal::TooMany(IN_ALL));
        }
        // What runs at this moment is counted first.
        self.step(app, now);
        if let (Some(budget), Some(spent)) =
            (budget_of(wish.kind), self.spent.get(app).map(|all| all[index(wish.kind)]))
            && spent.left(budget, now).is_zero()
        {
            let again = spent.since.map_or(Duration::ZERO, |since| (since + DAY).since(now));
            return Err(Refusal::UsedUp { kind: wish.kind, budget, again });
        }
        let id = self.next_id();
        let lease = Lease {
            holder: wish.holder,
            kind: wish.kind,
            reason: wish.reason,
            since: now,
            left: shorter(wish.time, time_of(wish.kind)),
            unproved: Duration::ZERO,
            demoted: false,
            announced: false,
        };
        self.apps.entry(app.clone()).or_default().leases.insert(id, lease);
        self.step(app, now);
        Ok(id)
    }

    /// Its holder gave it back, or died. Of what is over already nothing more comes.
    pub fn closed(&mut self, id: LeaseId, now: Instant) {
        if let Some(app) = self.app_of(id).cloned() {
            self.step(&app, now);
            if let Some(holder) = self.apps.get_mut(&app) {
                holder.leases.remove(&id);
            }
            self.step(&app, now);
        }
    }

    /// Takes it away; `by` is the subject of a sentence.
    pub fn revoke(&mut self, id: LeaseId, by: &str, now: Instant) {
        if let Some(app) = self.app_of(id).cloned() {
            self.step(&app, now);
            self.end(&app, id, |what| format!("{by} took it away: {what}"));
            self.step(&app, now);
        }
    }

    /// The instance that was kept awake is no more.
    pub fn vanished(&mut self, app: &AppKey, now: Instant) {
        self.step(app, now);
        let Some(holder) = self.apps.remove(app) else { return };
        self.out.extend(holder.leases.into_keys().map(|id| Output::Ended(app.bus, id)));
        self.out.extend(holder.keeps.map(|_| Output::Keeps(app.clone(), None)));
    }

    /// There is no connection to this bus any more, nor to any holder on it.
    pub fn bus_down(&mut self, bus: Bus, now: Instant) {
        let apps: Vec<AppKey> = self.apps.keys().filter(|app| app.bus == bus).cloned().collect();
        for app in apps {
            self.vanished(&app, now);
        }
    }

    /// What is to be seen of an app now. Of apps without leases it need not be told.
    pub fn observe(&mut self, app: &AppKey, facts: Facts, now: Instant) {
        let Some(holder) = self.apps.get(app) else { return };
        if holder.facts != facts || holder.counted.is_some() != (facts.background && !self.asleep) {
            self.count(app, now);
            if let Some(holder) = self.apps.get_mut(app) {
                holder.facts = facts;
                holder.counted = (facts.background && !self.asleep).then_some(now);
                if !facts.background {
                    holder.leases.values_mut().for_each(|lease| lease.unproved = Duration::ZERO);
                }
            }
            self.step(app, now);
        }
    }

    /// The machine sleeps from now on: no time passes for anybody; or it is awake again.
    pub fn sleep(&mut self, asleep: bool, now: Instant) {
        self.asleep = asleep;
        let apps: Vec<(AppKey, Facts)> = self.apps.iter().map(|(app, holder)| (app.clone(), holder.facts)).collect();
        for (app, facts) in apps {
            self.observe(&app, facts, now);
        }
    }

    /// Apps that are kept awake.
    pub fn apps(&self) -> impl Iterator<Item = &AppKey> {
        self.apps.keys()
    }

    /// The app a lease keeps awake.
    pub fn app_of(&self, id: LeaseId) -> Option<&AppKey> {
        self.all().find(|(_, found, _)| *found == id).map(|(app, ..)| app)
    }

    /// All leases, those of one app together.
    pub fn shown(&self, now: Instant) -> impl Iterator<Item = Shown<'_>> {
        self.apps.iter().flat_map(move |(app, holder)| {
            holder.leases.iter().map(move |(id, lease)| {
                let passed = holder.counted.map_or(Duration::ZERO, |counted| now.since(counted));
                Shown {
                    id: *id,
                    app,
                    holder: &lease.holder,
                    kind: lease.kind,
                    counts_as: lease.counts_as(holder.facts),
                    reason: &lease.reason,
                    held: now.since(lease.since),
                    left: self.left(app, lease, holder.facts, now).map(|left| left.saturating_sub(passed)),
                    counting: holder.counted.is_some(),
                }
            })
        })
    }

    /// Time passed.
    pub fn handle_timeout(&mut self, now: Instant) {
        let due: Vec<AppKey> = self
            .apps
            .iter()
            .filter(|(app, holder)| self.due(app, holder).is_some_and(|due| due <= now))
            .map(|(app, _)| app.clone())
            .collect();
        for app in due {
            self.step(&app, now);
        }
    }

    /// When [`Leases::handle_timeout`] wants to be called next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.apps.iter().filter_map(|(app, holder)| self.due(app, holder)).min()
    }

    /// The next thing to do, if any.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.out.pop_front()
    }

    /// Whether [`Leases::poll_output`] has something.
    pub fn has_output(&self) -> bool {
        !self.out.is_empty()
    }

    /// Counts the time that has passed and does what it is time for.
    fn step(&mut self, app: &AppKey, now: Instant) {
        self.count(app, now);
        let Some(holder) = self.apps.get_mut(app) else { return };
        let facts = holder.facts;
        for (id, lease) in &mut holder.leases {
            let demoted = lease.counts_as(facts) != lease.kind;
            if demoted && !lease.demoted {
                let reason = format!("lease {}, {}: {}", id.0, lease.as_taken(), missing(lease.kind));
                self.out.push_back(Output::Note(app.clone(), "lease-demoted", reason));
            }
            lease.demoted = demoted;
        }
        if holder.counted.is_some() {
            self.take_what_is_over(app, now);
        } else {
            holder.leases.values_mut().for_each(|lease| lease.announced = false);
        }
        let Some(holder) = self.apps.get_mut(app) else { return };
        let keeps = holder.sentence();
        if holder.keeps != keeps {
            holder.keeps.clone_from(&keeps);
            self.out.push_back(Output::Keeps(app.clone(), keeps));
        }
        if holder.leases.is_empty() {
            self.apps.remove(app);
        }
    }

    /// Counts what its leases have used since the last time.
    fn count(&mut self, app: &AppKey, now: Instant) {
        let Some(holder) = self.apps.get_mut(app) else { return };
        let Some(passed) = holder.counted.map(|counted| now.since(counted)) else { return };
        if passed.is_zero() {
            return;
        }
        holder.counted = Some(now);
        let mut used = [false; KINDS];
        for lease in holder.leases.values_mut() {
            used[index(lease.counts_as(holder.facts))] = true;
            lease.left = lease.left.map(|left| left.saturating_sub(passed));
            lease.unproved = match is_proved(lease.kind, holder.facts) {
                true => Duration::ZERO,
                false => lease.unproved + passed,
            };
        }
        let known = self.spent.contains_key(app);
        if !known {
            self.make_room(now);
        }
        let budgets = self.spent.entry(app.clone()).or_default();
        for (budget, used) in budgets.iter_mut().zip(used) {
            if used {
                budget.spend(passed, now);
            }
        }
    }

    fn take_what_is_over(&mut self, app: &AppKey, now: Instant) {
        let Some(holder) = self.apps.get(app) else { return };
        let facts = holder.facts;
        let left: Vec<(LeaseId, Duration)> =
            holder.leases.iter().filter_map(|(id, lease)| Some((*id, self.left(app, lease, facts, now)?))).collect();
        for (id, left) in left {
            if left.is_zero() {
                self.end(app, id, |what| format!("its time in the background is over: {what}"));
                continue;
            }
            let Some(lease) = self.apps.get_mut(app).and_then(|holder| holder.leases.get_mut(&id)) else { continue };
            let near = left <= NOTICE;
            if near && !lease.announced {
                let holder = lease.holder.clone();
                self.out.push_back(Output::Ending { bus: app.bus, holder, lease: id, within: left });
            }
            lease.announced = near;
        }
    }

    fn end(&mut self, app: &AppKey, id: LeaseId, reason: impl FnOnce(String) -> String) {
        let Some(lease) = self.apps.get_mut(app).and_then(|holder| holder.leases.remove(&id)) else { return };
        let reason = reason(format!("lease {}, {}", id.0, lease.as_taken()));
        self.out.push_back(Output::Note(app.clone(), "lease-ended", reason));
        self.out.push_back(Output::Ended(app.bus, id));
    }

    /// What is left of a lease in the background, by what was last counted.
    fn left(&self, app: &AppKey, lease: &Lease, facts: Facts, now: Instant) -> Option<Duration> {
        let counts_as = lease.counts_as(facts);
        let budget = budget_of(counts_as).map(|budget| match self.spent.get(app) {
            Some(spent) => spent[index(counts_as)].left(budget, now),
            None => budget,
        });
        let unproved = (!is_proved(lease.kind, facts)).then(|| UNPROVED.saturating_sub(lease.unproved));
        shorter(shorter(lease.left, unproved), budget)
    }

    fn due(&self, app: &AppKey, holder: &Holder) -> Option<Instant> {
        let counted = holder.counted?;
        let of = |lease: &Lease| {
            let left = self.left(app, lease, holder.facts, counted);
            let end = left.map(|left| if lease.announced { left } else { left.saturating_sub(NOTICE) });
            let proof = !is_proved(lease.kind, holder.facts) && lease.unproved < PROOF;
            shorter(end, proof.then(|| PROOF.saturating_sub(lease.unproved)))
        };
        holder.leases.values().filter_map(of).min().map(|wait| counted + wait)
    }

    fn all(&self) -> impl Iterator<Item = (&AppKey, LeaseId, &Lease)> {
        self.apps.iter().flat_map(|(app, holder)| holder.leases.iter().map(move |(id, lease)| (app, *id, lease)))
    }

    fn next_id(&mut self) -> LeaseId {
        // There are far fewer leases than numbers.
        loop {
            self.last = self.last.wrapping_add(1).max(1);
            if self.app_of(LeaseId(self.last)).is_none() {
                return LeaseId(self.last);
            }
        }
    }

    /// Keeps the memory of budgets within its bound.
    fn make_room(&mut self, now: Instant) {
        if self.spent.len() < REMEMBERED {
            return;
        }
        self.spent.retain(|_, budgets| budgets.iter().any(|budget| !budget.is_new(now)));
        let began = |budgets: &[Budget; KINDS]| budgets.iter().filter_map(|budget| budget.since).max();
        if self.spent.len() >= REMEMBERED
            && let Some(oldest) =
                self.spent.iter().min_by_key(|(_, budgets)| began(budgets)).map(|(app, _)| app.clone())
        {
            self.spent.remove(&oldest);
        }
    }
}

impl Holder {
    /// Of what is worth most. Without how long it lasts: it stays the same while nothing changes.
    fn sentence(&self) -> Option<Arc<str>> {
        let worth = |(id, lease): &(&LeaseId, &Lease)| (lease.counts_as(self.facts), std::cmp::Reverse(**id));
        let (_, lease) = self.leases.iter().max_by_key(worth)?;
        let counts_as = lease.counts_as(self.facts);
        Some(match counts_as == lease.kind {
            true => format!("it holds a lease: {}", lease.as_taken()).into(),
            false => format!("it holds a lease that counts as a {}: {}", counts_as.as_str(), lease.as_taken()).into(),
        })
    }
}

impl Lease {
    fn counts_as(&self, facts: Facts) -> LeaseKind {
        match is_proved(self.kind, facts) || self.unproved < PROOF {
            true => self.kind,
            false => LeaseKind::Task,
        }
    }

    fn as_taken(&self) -> String {
        format!("{} \"{}\"", self.kind.as_str(), self.reason)
    }
}

impl Budget {
    fn is_new(&self, now: Instant) -> bool {
        self.since.is_none_or(|since| now.since(since) >= DAY)
    }

    fn left(&self, budget: Duration, now: Instant) -> Duration {
        if self.is_new(now) { budget } else { budget.saturating_sub(self.spent) }
    }

    fn spend(&mut self, passed: Duration, now: Instant) {
        if self.is_new(now) {
            *self = Self { since: Some(now - passed), spent: Duration::ZERO };
        }
        self.spent = self.spent.saturating_add(passed);
    }
}

const fn is_proved(kind: LeaseKind, facts: Facts) -> bool {
    match kind {
        LeaseKind::Audio => facts.audio,
        LeaseKind::Call => facts.call,
        LeaseKind::Task | LeaseKind::Sync | LeaseKind::Transfer | LeaseKind::Navigation => true,
    }
}

const fn missing(kind: LeaseKind) -> &'static str {
    match kind {
        LeaseKind::Call => "there is no call to be seen, so it counts as a task",
        _ => "it neither plays nor records, so it counts as a task",
    }
}

const fn index(kind: LeaseKind) -> usize {
    kind as usize
}

fn shorter(a: Option<Duration>, b: Option<Duration>) -> Option<Duration> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (one, other) => one.or(other),
    }
}

/// Hours, minutes or seconds, rounded up.
fn span(time: Duration) -> String {
    let secs = time.as_secs() + u64::from(time.subsec_nanos() > 0);
    match secs {
        0..60 => format!("{secs} s"),
        60..3600 => format!("{} min", secs.div_ceil(MINUTE)),
        _ => format!("{} h", secs.div_ceil(HOUR)),
    }
}
