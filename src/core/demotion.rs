//! Whose urgent messages show nothing to the user: theirs count as normal, until that is better (design.md; FCM does the same
//! with "high priority" messages over 7 days).
//!
//! A message is judged when the app has taken it: within [`WINDOW`] from when it was handed over the app must have notified
//! the user or come to the front. Nothing is held against an app that could not be watched all that time.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use crate::{
    model::{AppKey, Bus},
    time::{Instant, Now, UnixTime},
};

/// How long an app has to show something: its awake window after an urgent message, by default.
const WINDOW: Duration = Duration::from_secs(30);
/// Days looked back, with today.
const DAYS: u64 = 7;
/// Fewer urgent messages than this in that time say nothing.
const LEAST: u32 = 5;
/// Messages of one app judged at a time; more in one window are not counted.
const MOST_JUDGED: usize = 64;
/// A message that showed nothing, and whose app was not watched in time, keeps the watch on for the app's next one, this
/// long.
const OWED: Duration = Duration::from_secs(24 * 3600);
const DAY: u64 = 24 * 3600;

/// What is known of all apps that get urgent messages.
#[derive(Debug, Default)]
pub(super) struct Demotion {
    apps: BTreeMap<AppKey, App>,
    /// Buses on which notifications are seen now.
    seeing: Vec<Bus>,
    news: VecDeque<News>,
}

/// What has changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum News {
    /// The app's counts, to be kept: by day since 1970, urgent messages and those that showed something.
    Counted(AppKey, Arc<str>),
    /// Its urgent messages count as normal from now on, or no more. The text is a sentence.
    Demoted(AppKey, bool, String),
}

#[derive(Debug, Default)]
struct App {
    /// By day since 1970, the oldest first, at most [`DAYS`].
    days: BTreeMap<u64, Tally>,
    demoted: bool,
    /// Messages handed over and not judged yet.
    open: Vec<Open>,
    /// To be watched until then.
    owed_until: Option<Instant>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Tally {
    high: u32,
    shown: u32,
}

#[derive(Clone, Copy, Debug)]
struct Open {
    until: Instant,
    taken: bool,
    shown: bool,
    /// Whether notifications were seen from the hand-over on.
    seen: bool,
}

impl Demotion {
    /// What an earlier life has counted; what makes no sense counts for nothing.
    pub(super) fn restore(&mut self, app: AppKey, counts: &str, now: UnixTime) {
        let tally = |text: &str| {
            let mut numbers = text.split(':');
            let mut next = || numbers.next()?.parse::<u32>().ok();
            let (day, high, shown) = (next()?, next()?, next()?);
            Some((u64::from(day), Tally { high, shown: shown.min(high) }))
        };
        let mut state = App { days: counts.split(' ').filter_map(tally).collect(), ..App::default() };
        state.forget_old(now);
        state.demoted = state.is_bad();
        self.apps.insert(app, state);
    }

    /// The app is made ready for an urgent message: worth watching for, to see from the hand-over on.
    pub(super) fn expected(&mut self, app: &AppKey, now: Now) {
        let state = self.apps.entry(app.clone()).or_default();
        state.owed_until = state.owed_until.max(Some(now.boot + WINDOW));
    }

    /// An urgent message is handed to the app, which is in front or not. Until it is judged its bus is wanted watched.
    pub(super) fn handed(&mut self, app: &AppKey, in_front: bool, now: Now) {
        let seen = self.seeing.contains(&app.bus);
        let state = self.apps.entry(app.clone()).or_default();
        if state.open.len() < MOST_JUDGED {
            state.open.push(Open { until: now.boot + WINDOW, taken: false, shown: in_front, seen });
        }
    }

    /// The app has taken an urgent message: the first that was handed to it and not taken.
    pub(super) fn taken(&mut self, app: &AppKey, now: Now) {
        let Some(state) = self.apps.get_mut(app) else { return };
        if let Some(open) = state.open.iter_mut().find(|open| !open.taken) {
            open.taken = true;
        }
        self.judge(app, now);
    }

    /// The app shows the user something.
    pub(super) fn shown(&mut self, app: &AppKey, now: Now) {
        let Some(state) = self.apps.get_mut(app) else { return };
        state.open.iter_mut().for_each(|open| open.shown = true);
        self.judge(app, now);
    }

    /// Notifications on the bus are seen from now on, or no more, or some were missed.
    pub(super) fn seeing(&mut self, bus: Bus, seeing: bool) {
        self.seeing.retain(|other| *other != bus);
        if seeing {
            self.seeing.push(bus);
            return;
        }
        for (_, state) in self.apps.iter_mut().filter(|(app, _)| app.bus == bus) {
            state.open.iter_mut().for_each(|open| open.seen = false);
        }
    }

    /// The app is not ours any more. True when something was kept of it.
    pub(super) fn remove(&mut self, app: &AppKey) -> bool {
        self.apps.remove(app).is_some_and(|state| !state.days.is_empty())
    }

    /// Whether the app's urgent messages count as normal.
    pub(super) fn is_demoted(&self, app: &AppKey) -> bool {
        self.apps.get(app).is_some_and(|state| state.demoted)
    }

    /// Whether notifications on the bus are worth watching for.
    pub(super) fn wants(&self, bus: Bus) -> bool {
        let mut of = self.apps.iter().filter(|(app, _)| app.bus == bus);
        of.any(|(_, state)| !state.open.is_empty() || state.owed_until.is_some())
    }

    /// Time passed.
    pub(super) fn handle_timeout(&mut self, now: Now) {
        let due: Vec<AppKey> = self
            .apps
            .iter()
            .filter(|(_, state)| state.next().is_some_and(|at| at <= now.boot))
            .map(|(app, _)| app.clone())
            .collect();
        for app in due {
            self.judge(&app, now);
        }
    }

    /// When [`Demotion::handle_timeout`] wants to be called next.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.apps.values().filter_map(App::next).min()
    }

    /// The next thing to know, if any.
    pub(super) fn poll_news(&mut self) -> Option<News> {
        self.news.pop_front()
    }

    /// Counts what is decided.
    fn judge(&mut self, app: &AppKey, now: Now) {
        let Some(state) = self.apps.get_mut(app) else { return };
        state.owed_until.take_if(|until| *until <= now.boot);
        let over: Vec<Open> =
            state.open.extract_if(.., |open| open.taken && open.shown || open.until <= now.boot).collect();
        let mut counted = false;
        for open in over.into_iter().filter(|open| open.taken) {
            if open.shown || open.seen {
                let today = state.days.entry(now.wall.as_millis() / 1000 / DAY).or_default();
                today.high = today.high.saturating_add(1);
                today.shown = today.shown.saturating_add(u32::from(open.shown));
                state.owed_until = None;
                counted = true;
            } else {
                state.owed_until = Some(now.boot + OWED);
            }
        }
        if !counted {
            return;
        }
        state.forget_old(now.wall);
        self.news.push_back(News::Counted(app.clone(), state.text()));
        let bad = state.is_bad();
        if std::mem::replace(&mut state.demoted, bad) != bad {
            self.news.push_back(News::Demoted(app.clone(), bad, state.sentence()));
        }
    }
}

impl App {
    fn next(&self) -> Option<Instant> {
        self.open.iter().map(|open| open.until).chain(self.owed_until).min()
    }

    fn forget_old(&mut self, now: UnixTime) {
        let today = now.as_millis() / 1000 / DAY;
        // Days of a clock that was ahead as well.
        self.days.retain(|day, _| *day <= today && today - *day < DAYS);
    }

    fn sum(&self) -> Tally {
        let add = |sum: Tally, tally: &Tally| Tally {
            high: sum.high.saturating_add(tally.high),
            shown: sum.shown.saturating_add(tally.shown),
        };
        self.days.values().fold(Tally::default(), add)
    }

    /// Most of its urgent messages show nothing. Who is demoted is no more when half of them show something.
    fn is_bad(&self) -> bool {
        let Tally { high, shown } = self.sum();
        let half = u64::from(high);
        high >= LEAST && 2 * u64::from(shown) < half
    }

    fn sentence(&self) -> String {
        let Tally { high, shown } = self.sum();
        match self.demoted {
            true => format!(
                "of its {high} messages of high urgency in {DAYS} days {shown} showed the user something: they count as \
                 normal until half of them do"
            ),
            false => format!("{shown} of its {high} messages of high urgency in {DAYS} days showed the user something"),
        }
    }

    fn text(&self) -> Arc<str> {
        let day = |(day, tally): (&u64, &Tally)| format!("{day}:{}:{}", tally.high, tally.shown);
        self.days.iter().map(day).collect::<Vec<_>>().join(" ").into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUS: Bus = Bus::Session(1000);

    fn app() -> AppKey {
        AppKey::new(BUS, "org.example.Chat")
    }

    fn at(secs: u64) -> Now {
        Now { boot: Instant::from_nanos(secs * 1_000_000_000), wall: UnixTime::from_secs(20_000 * DAY + secs) }
    }

    struct World {
        demotion: Demotion,
        secs: u64,
    }

    impl World {
        fn new() -> Self {
            let mut demotion = Demotion::default();
            demotion.seeing(BUS, true);
            Self { demotion, secs: 0 }
        }

        /// An urgent message that is taken after a second, and what it showed within its window.
        fn push(&mut self, shows_after: Option<u64>) -> Vec<News> {
            let start = self.secs;
            self.demotion.handed(&app(), false, at(start));
            for step in 0..=40 {
                self.secs = start + step;
                self.demotion.handle_timeout(at(self.secs));
                if step == 1 {
                    self.demotion.taken(&app(), at(self.secs));
                }
                if shows_after == Some(step) {
                    self.demotion.shown(&app(), at(self.secs));
                }
            }
            self.news()
        }

        fn news(&mut self) -> Vec<News> {
            std::iter::from_fn(|| self.demotion.poll_news()).collect()
        }

        fn sum(&self) -> (u32, u32) {
            let Tally { high, shown } = self.demotion.apps[&app()].sum();
            (high, shown)
        }
    }

    #[test]
    fn what_shows_something_in_its_window_is_as_it_should_be() {
        for (after, sum) in
            [(Some(0), (1, 1)), (Some(2), (1, 1)), (Some(29), (1, 1)), (Some(31), (1, 0)), (None, (1, 0))]
        {
            let mut world = World::new();
            world.push(after);
            assert_eq!(world.sum(), sum, "{after:?}");
            assert_eq!((world.demotion.wants(BUS), world.demotion.poll_timeout()), (false, None));
        }
    }

    #[test]
    fn five_for_nothing_demote_and_half_that_show_something_restore() {
        let mut world = World::new();
        for _ in 0..4 {
            assert!(world.push(None).iter().all(|news| matches!(news, News::Counted(..))), "too few to say");
        }
        let reason = "of its 5 messages of high urgency in 7 days 0 showed the user something: they count as normal until \
                      half of them do";
        assert_eq!(world.push(None).last(), Some(&News::Demoted(app(), true, reason.into())));
        assert!(world.demotion.is_demoted(&app()));
        for _ in 0..4 {
            world.push(Some(2));
        }
        assert!(world.demotion.is_demoted(&app()));
        assert!(matches!(world.push(Some(2)).last(), Some(News::Demoted(_, false, _))), "5 of 10");
    }

    #[test]
    fn after_seven_days_it_is_forgotten() {
        let mut world = World::new();
        (0..5).for_each(|_| drop(world.push(None)));
        world.secs += 7 * DAY;
        let news = world.push(Some(2));
        assert!(matches!(news.last(), Some(News::Demoted(_, false, _))), "{news:?}");
        assert_eq!(world.sum(), (1, 1));
    }

    #[test]
    fn nothing_is_held_against_an_app_that_was_not_watched() {
        let mut world = World::new();
        world.demotion.seeing(BUS, false);
        assert_eq!(world.push(None), []);
        assert!(world.demotion.wants(BUS), "its next one is to be seen");
        world.demotion.seeing(BUS, true);
        assert!(!world.push(None).is_empty());
        assert!(!world.demotion.wants(BUS));
        // Seen at first, and then no more.
        world.demotion.handed(&app(), false, at(world.secs));
        world.demotion.taken(&app(), at(world.secs));
        world.demotion.seeing(BUS, false);
        world.demotion.seeing(BUS, true);
        world.demotion.handle_timeout(at(world.secs + 30));
        assert_eq!((world.news(), world.sum()), (vec![], (1, 0)));
    }

    #[test]
    fn nobody_is_watched_for_ever_for_a_message_that_does_not_come() {
        let mut world = World::new();
        world.demotion.seeing(BUS, false);
        world.push(None);
        assert_eq!(world.demotion.poll_timeout(), Some(at(30 + DAY).boot));
        world.demotion.handle_timeout(at(30 + DAY));
        assert_eq!((world.demotion.wants(BUS), world.demotion.poll_timeout()), (false, None));
    }

    #[test]
    fn what_is_seen_without_being_watched_for_counts() {
        let mut world = World::new();
        world.demotion.seeing(BUS, false);
        world.push(Some(3));
        assert_eq!(world.sum(), (1, 1), "its window came to the front");
    }

    #[test]
    fn one_in_front_and_one_that_did_not_take_it_are_not_blamed() {
        let mut world = World::new();
        world.demotion.handed(&app(), true, at(0));
        world.demotion.taken(&app(), at(1));
        assert_eq!(world.sum(), (1, 1));
        world.demotion.handed(&app(), false, at(2));
        world.demotion.handle_timeout(at(40));
        assert_eq!((world.sum(), world.demotion.poll_timeout()), ((1, 1), None));
    }

    #[test]
    fn a_flood_is_bounded() {
        let mut world = World::new();
        (0..1000).for_each(|_| world.demotion.handed(&app(), false, at(0)));
        (0..1000).for_each(|_| world.demotion.taken(&app(), at(0)));
        world.demotion.handle_timeout(at(30));
        assert_eq!(world.sum(), (MOST_JUDGED as u32, 0));
    }

    #[test]
    fn counts_survive_and_nonsense_does_not() {
        let mut world = World::new();
        (0..5).for_each(|_| drop(world.push(None)));
        let News::Counted(_, text) = world.push(Some(1)).remove(0) else { panic!() };
        assert_eq!(&*text, "20000:6:1");
        let mut after = Demotion::default();
        after.restore(app(), &text, at(0).wall);
        assert!(after.is_demoted(&app()));
        for nonsense in ["", "x", "20000", "20000:5", "99999:9:0", "19000:9:0", "-1:9:0", "20000:5:0:1 1:1:"] {
            let mut after = Demotion::default();
            after.restore(app(), nonsense, at(0).wall);
            assert_eq!(after.is_demoted(&app()), nonsense.starts_with("20000:5:0"), "{nonsense:?}");
        }
    }
}
