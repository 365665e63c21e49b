//! When the user is notified in an app's stead, and when no more: pure, by app.
//!
//! The generic notification says the app's name and how many messages wait, never what they say. It stands
//!
//! - while messages wait for an app that cannot be started: nothing says how, or it has failed [`FAILURES`] times in a row,
//!   or a message had to be given up (unless the user, or the app itself, wants [`NotifyWhen::Never`]);
//! - with [`NotifyWhen::Always`], which the configuration or the registration of a message asks for: as soon as a message has
//!   waited for [`PATIENCE`], whatever it waits for. An app that is quick is so never spoken for.
//!
//! It does not while the app is in front, and it is over when the app speaks for itself: it takes a message, it notifies the
//! user itself, it comes to the front. What its payload helper makes of messages stands beside it and is over with it.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use crate::{
    model::{AppKey, Bus, Priority},
    notification::{GENERIC, Notification, NotifyOrder, NotifyWhen, Text},
    time::{Instant, earliest},
};

/// How long a message waits before an app that asked for it is spoken for: a start takes a second or two.
const PATIENCE: Duration = Duration::from_secs(2);
/// Starts that failed in a row before the user hears of it; there are more tries all the same.
const FAILURES: u32 = 3;
/// Between two orders for one notification. Messages that come meanwhile are counted in the next.
const GAP: Duration = Duration::from_secs(2);
/// Apps spoken for at a time. Nobody is shown more; who comes beyond it is not spoken for.
const APPS: usize = 64;
/// Notifications of one app made by its helper; the oldest goes for a new one.
const TAGS: usize = 8;

/// Why an app is spoken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Why {
    /// Nothing says how to start it.
    NotActivatable,
    /// It has failed to start so often.
    Failing,
    /// A message was given up.
    GivenUp,
    /// It is wanted ([`NotifyWhen::Always`]).
    Wanted,
}

/// What is known of an app from elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Facts {
    /// Its bus can be spoken on, and is a session's.
    pub(super) reachable: bool,
    /// Somebody looks at it, or may.
    pub(super) in_front: bool,
    /// Nothing says how to start it.
    pub(super) unstartable: bool,
    /// Messages that wait for it, of which its helper has not told the user.
    pub(super) waiting: usize,
    /// The configuration's word, or else that of its registrations.
    pub(super) when: NotifyWhen,
}

/// What has changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Output {
    /// For the bus.
    Order(AppKey, NotifyOrder),
    /// The app is spoken for from now on: for its `why`.
    Spoken(AppKey, Why),
}

/// All apps that are, or may be, spoken for.
#[derive(Debug, Default)]
pub(super) struct Notifying {
    apps: BTreeMap<AppKey, App>,
    /// Of the latest order to show something.
    number: u64,
    outputs: VecDeque<Output>,
}

#[derive(Debug, Default)]
struct App {
    failures: u32,
    given_up: usize,
    /// The most that a message since it last spoke counts as.
    priority: Option<Priority>,
    /// When one has waited for long enough.
    due: Option<Instant>,
    /// Something has happened that the user does not know of.
    news: bool,
    /// The generic one, while it stands: how it was shown last, and its number then.
    generic: Option<(usize, Priority)>,
    number: u64,
    /// When an order for the generic one was given last.
    ordered: Option<Instant>,
    tags: Vec<Tag>,
    /// When something may be to be done without anything happening.
    next: Option<Instant>,
}

/// One that the helper made.
#[derive(Debug)]
struct Tag {
    shown: Notification,
    ordered: Option<Instant>,
    /// What it says now was not ordered yet.
    news: bool,
}

impl Notifying {
    /// A message came for the app and waits. `wanted`: it is one that [`NotifyWhen::Always`] is asked for.
    pub(super) fn arrived(&mut self, app: &AppKey, priority: Priority, wanted: bool, now: Instant) {
        // Most messages are taken at once: nothing is kept for what nobody may be spoken for.
        let Some(state) = self.entry(app) else { return };
        state.priority = state.priority.max(Some(priority));
        state.news = true;
        if wanted && state.due.is_none() {
            state.due = Some(now + PATIENCE);
        }
    }

    /// A start of the app failed.
    pub(super) fn start_failed(&mut self, app: &AppKey) {
        if let Some(state) = self.entry(app) {
            state.failures = state.failures.saturating_add(1);
        }
    }

    /// The app runs.
    pub(super) fn appeared(&mut self, app: &AppKey) {
        if let Some(state) = self.apps.get_mut(app) {
            state.failures = 0;
        }
    }

    /// A message for the app was given up.
    pub(super) fn given_up(&mut self, app: &AppKey) {
        if let Some(state) = self.entry(app) {
            state.given_up = state.given_up.saturating_add(1);
            state.news |= state.generic.is_none();
        }
    }

    /// The app's helper has made this of a message. False when too many apps are spoken for.
    pub(super) fn helped(&mut self, app: &AppKey, notification: Notification) -> bool {
        let mut old = None;
        let Some(state) = self.entry(app) else { return false };
        let mut tag = Tag { shown: notification, ordered: None, news: true };
        if let Some(index) = state.tags.iter().position(|other| other.shown.tag == tag.shown.tag) {
            tag.ordered = state.tags.remove(index).ordered;
        } else if state.tags.len() >= TAGS {
            old = Some(state.tags.remove(0));
        }
        state.tags.push(tag);
        if let Some(old) = old.filter(|old| old.ordered.is_some()) {
            self.outputs.push_back(Output::Order(app.clone(), NotifyOrder::Close(old.shown.tag)));
        }
        true
    }

    /// The app speaks for itself, or is not ours any more.
    pub(super) fn spoke(&mut self, app: &AppKey) {
        if let Some(state) = self.apps.remove(app)
            && state.stands()
        {
            self.outputs.push_back(Output::Order(app.clone(), NotifyOrder::CloseAll));
        }
    }

    /// One is gone, for the user or the server has closed it. It comes again with the next message.
    pub(super) fn gone(&mut self, app: &AppKey, tag: &str) {
        let Some(state) = self.apps.get_mut(app) else { return };
        match tag {
            // What it said the user knows.
            GENERIC => (state.generic, state.news, state.given_up) = (None, false, 0),
            tag => state.tags.retain(|other| *other.shown.tag != *tag),
        }
    }

    /// Whether this is how the notification was shown last.
    pub(super) fn is_current(&self, app: &AppKey, tag: &str, number: u64) -> bool {
        self.apps.get(app).is_some_and(|state| match tag {
            GENERIC => state.generic.is_some() && state.number == number,
            tag => state.tags.iter().any(|other| *other.shown.tag == *tag && other.shown.number == number),
        })
    }

    /// The bus is gone, and with it what stood there: all of it comes again.
    pub(super) fn bus_down(&mut self, bus: Bus) {
        for (_, state) in self.apps.iter_mut().filter(|(app, _)| app.bus == bus) {
            state.news |= state.generic.take().is_some();
            state.ordered = None;
            for tag in &mut state.tags {
                (tag.news, tag.ordered) = (true, None);
            }
        }
    }

    /// Apps that may be spoken for now or later.
    pub(super) fn apps(&self) -> impl Iterator<Item = &AppKey> {
        self.apps.keys()
    }

    /// Whether a notification in this app's stead stands.
    pub(super) fn stands_for(&self, app: &AppKey) -> bool {
        self.apps.get(app).is_some_and(App::stands)
    }

    /// Decides for one app.
    pub(super) fn settle(&mut self, app: &AppKey, facts: Facts, now: Instant) {
        let Some(state) = self.apps.get_mut(app) else { return };
        state.next = None;
        if !facts.reachable {
            return;
        }
        for tag in state.tags.iter_mut().filter(|tag| tag.news) {
            if let Some(at) = wait(tag.ordered, now) {
                state.next = earliest(state.next, Some(at));
                continue;
            }
            (tag.news, tag.ordered) = (false, Some(now));
            self.number += 1;
            tag.shown.number = self.number;
            self.outputs.push_back(Output::Order(app.clone(), NotifyOrder::Show(tag.shown.clone())));
        }
        let count = facts.waiting.saturating_add(state.given_up);
        let priority = state.priority.unwrap_or_default();
        match state.why(facts, now).filter(|_| count > 0 && !facts.in_front) {
            Some(why) if state.news => {
                let first = state.generic.is_none();
                if state.generic == Some((count, priority)) {
                    state.news = false;
                } else if let Some(at) = wait(state.ordered, now) {
                    state.next = earliest(state.next, Some(at));
                } else {
                    (state.news, state.ordered, state.generic) = (false, Some(now), Some((count, priority)));
                    let category = (priority == Priority::Call).then(|| "call.incoming".into());
                    let (tag, text) = (GENERIC.into(), Text::Messages(count));
                    self.number += 1;
                    state.number = self.number;
                    let notification = Notification { tag, number: state.number, text, priority, category };
                    self.outputs.push_back(Output::Order(app.clone(), NotifyOrder::Show(notification)));
                    self.outputs.extend(first.then(|| Output::Spoken(app.clone(), why)));
                }
            }
            Some(_) => {}
            None => {
                if state.generic.take().is_some() {
                    self.outputs.push_back(Output::Order(app.clone(), NotifyOrder::Close(GENERIC.into())));
                }
                let due = state.due.filter(|due| facts.when == NotifyWhen::Always && *due > now);
                state.next = earliest(state.next, due);
            }
        }
        if count == 0 && state.generic.is_none() && state.tags.is_empty() {
            self.apps.remove(app);
        }
    }

    /// When [`Notifying::settle`] is worth calling again.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.apps.values().filter_map(|state| state.next).min()
    }

    /// The next thing to do, if any.
    pub(super) fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    fn entry(&mut self, app: &AppKey) -> Option<&mut App> {
        // The system bus has nobody to notify.
        if app.bus == Bus::System || app.is_unique_name() || (self.apps.len() >= APPS && !self.apps.contains_key(app)) {
            return None;
        }
        Some(self.apps.entry(app.clone()).or_default())
    }
}

impl App {
    fn stands(&self) -> bool {
        self.generic.is_some() || self.tags.iter().any(|tag| tag.ordered.is_some())
    }

    fn why(&self, facts: Facts, now: Instant) -> Option<Why> {
        if facts.when == NotifyWhen::Never {
            return None;
        }
        let waited = self.due.is_some_and(|due| due <= now) && facts.waiting > 0;
        if facts.unstartable {
            Some(Why::NotActivatable)
        } else if self.failures >= FAILURES {
            Some(Why::Failing)
        } else if self.given_up > 0 {
            Some(Why::GivenUp)
        } else if waited && facts.when == NotifyWhen::Always {
            Some(Why::Wanted)
        } else {
            None
        }
    }
}

/// Until when an order must wait for the one before it.
fn wait(ordered: Option<Instant>, now: Instant) -> Option<Instant> {
    ordered.map(|at| at + GAP).filter(|at| *at > now)
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn at(millis: u64) -> Instant {
        Instant::from_nanos(1_000_000_000_000 + millis * 1_000_000)
    }

    fn app() -> AppKey {
        AppKey::new(Bus::Session(1000), "org.example.Chat")
    }

    const AWAY: Facts =
        Facts { reachable: true, in_front: false, unstartable: false, waiting: 1, when: NotifyWhen::Unstartable };
    const DEAD: Facts = Facts { unstartable: true, ..AWAY };
    const ALWAYS: Facts = Facts { when: NotifyWhen::Always, ..AWAY };

    /// What is ordered: the count shown, or what is closed.
    #[derive(Debug, PartialEq, Eq)]
    enum Did {
        Shows(usize, Priority),
        Says(String),
        Closes(String),
        ClosesAll,
        Why(Why),
    }

    fn did(notifying: &mut Notifying) -> Vec<Did> {
        std::iter::from_fn(|| notifying.poll_output())
            .map(|output| match output {
                Output::Spoken(_, why) => Did::Why(why),
                Output::Order(_, NotifyOrder::CloseAll) => Did::ClosesAll,
                Output::Order(_, NotifyOrder::Close(tag)) => Did::Closes(tag.to_string()),
                Output::Order(_, NotifyOrder::Show(Notification { text: Text::Messages(count), priority, .. })) => {
                    Did::Shows(count, priority)
                }
                Output::Order(_, NotifyOrder::Show(Notification { tag, text: Text::Own { summary, .. }, .. })) => {
                    Did::Says(format!("{tag}: {summary}"))
                }
            })
            .collect()
    }

    fn settled(notifying: &mut Notifying, facts: Facts, millis: u64) -> Vec<Did> {
        notifying.settle(&app(), facts, at(millis));
        did(notifying)
    }

    fn arrived(priority: Priority, wanted: bool) -> Notifying {
        let mut notifying = Notifying::default();
        notifying.arrived(&app(), priority, wanted, at(0));
        notifying
    }

    fn made(tag: &str, summary: &str) -> Notification {
        let text = Text::Own { summary: summary.into(), body: "".into(), icon: None };
        Notification { tag: tag.into(), number: 0, text, priority: Priority::Normal, category: None }
    }

    #[test]
    fn the_table() {
        let failing = |times| move |notifying: &mut Notifying| (0..times).for_each(|_| notifying.start_failed(&app()));
        let nothing = |_: &mut Notifying| {};
        let gives_up = |notifying: &mut Notifying| notifying.given_up(&app());
        let never = |facts: Facts| Facts { when: NotifyWhen::Never, ..facts };
        // What happened, the facts, milliseconds since, why it is shown then.
        type Case<'a> = (&'a str, &'a dyn Fn(&mut Notifying), Facts, u64, Option<Why>);
        let cases: [Case<'_>; 16] = [
            ("it can be started", &nothing, AWAY, 60_000, None),
            ("it cannot be", &nothing, DEAD, 0, Some(Why::NotActivatable)),
            ("nobody wants it", &nothing, never(DEAD), 0, None),
            ("in front", &nothing, Facts { in_front: true, ..DEAD }, 0, None),
            ("nothing waits", &nothing, Facts { waiting: 0, ..DEAD }, 0, None),
            ("no bus", &nothing, Facts { reachable: false, ..DEAD }, 0, None),
            ("failed twice", &failing(2), AWAY, 0, None),
            ("failed for the third time", &failing(3), AWAY, 0, Some(Why::Failing)),
            ("failed, unwanted", &failing(3), never(AWAY), 0, None),
            ("given up", &gives_up, Facts { waiting: 0, ..AWAY }, 0, Some(Why::GivenUp)),
            ("given up, in front", &gives_up, Facts { in_front: true, ..AWAY }, 0, None),
            ("asked for, at once", &nothing, ALWAYS, 0, None),
            ("asked for, soon", &nothing, ALWAYS, 1_999, None),
            ("asked for", &nothing, ALWAYS, 2_000, Some(Why::Wanted)),
            ("asked for, and taken", &nothing, Facts { waiting: 0, ..ALWAYS }, 2_000, None),
            ("asked for, and in front", &nothing, Facts { in_front: true, ..ALWAYS }, 2_000, None),
        ];
        for (name, happen, facts, millis, why) in cases {
            let mut notifying = arrived(Priority::Normal, true);
            happen(&mut notifying);
            let done = settled(&mut notifying, facts, millis);
            assert_eq!(done.last(), why.map(Did::Why).as_ref(), "{name}: {done:?}");
            assert_eq!(done.len(), if why.is_some() { 2 } else { 0 }, "{name}: {done:?}");
        }
    }

    #[test]
    fn what_was_not_asked_for_by_the_registration_of_the_message_has_no_time_to_wait_for() {
        let mut notifying = arrived(Priority::Normal, false);
        assert_eq!(settled(&mut notifying, ALWAYS, 5_000), []);
        assert_eq!(notifying.poll_timeout(), None);
    }

    #[test]
    fn it_is_replaced_with_the_count_not_more_often_than_every_two_seconds() {
        let mut notifying = arrived(Priority::Low, false);
        let shown = settled(&mut notifying, DEAD, 0);
        assert_eq!(shown, [Did::Shows(1, Priority::Low), Did::Why(Why::NotActivatable)]);
        assert_eq!(notifying.poll_timeout(), None, "no timer while nothing is due");
        for waiting in 2..50 {
            notifying.arrived(&app(), Priority::High, false, at(100));
            assert_eq!(settled(&mut notifying, Facts { waiting, ..DEAD }, 100), []);
        }
        assert_eq!(notifying.poll_timeout(), Some(at(2_000)));
        let shown = settled(&mut notifying, Facts { waiting: 49, ..DEAD }, 2_000);
        assert_eq!(shown, [Did::Shows(49, Priority::High)]);
        assert_eq!(notifying.poll_timeout(), None);
        // A message that replaced another of the same topic.
        notifying.arrived(&app(), Priority::Low, false, at(9_000));
        assert_eq!(settled(&mut notifying, Facts { waiting: 49, ..DEAD }, 9_000), []);
        assert_eq!(notifying.poll_timeout(), None);
    }

    #[test]
    fn it_is_closed_when_the_app_speaks_for_itself() {
        let mut notifying = arrived(Priority::Normal, false);
        settled(&mut notifying, DEAD, 0);
        notifying.helped(&app(), made("a", "Ann"));
        assert_eq!(settled(&mut notifying, DEAD, 10), [Did::Says("a: Ann".into())]);
        notifying.spoke(&app());
        assert_eq!(did(&mut notifying), [Did::ClosesAll]);
        notifying.spoke(&app());
        assert_eq!(did(&mut notifying), []);
        assert!(notifying.apps().next().is_none());
        // In front, without having spoken: only the generic one, for nothing is known of the messages.
        let mut notifying = arrived(Priority::Normal, false);
        settled(&mut notifying, DEAD, 0);
        let closed = settled(&mut notifying, Facts { in_front: true, ..DEAD }, 10);
        assert_eq!(closed, [Did::Closes(GENERIC.into())]);
    }

    #[test]
    fn what_the_user_has_put_away_comes_again_with_the_next_message_only() {
        let mut notifying = arrived(Priority::Normal, false);
        notifying.given_up(&app());
        assert_eq!(settled(&mut notifying, DEAD, 0).first(), Some(&Did::Shows(2, Priority::Normal)));
        notifying.gone(&app(), GENERIC);
        assert_eq!(settled(&mut notifying, DEAD, 60_000), []);
        notifying.arrived(&app(), Priority::Normal, false, at(70_000));
        let again = settled(&mut notifying, Facts { waiting: 2, ..DEAD }, 70_000);
        assert_eq!(again.first(), Some(&Did::Shows(2, Priority::Normal)));
    }

    #[test]
    fn a_bus_that_comes_back_is_told_anew() {
        let mut notifying = arrived(Priority::Normal, false);
        notifying.helped(&app(), made("", "Ann"));
        settled(&mut notifying, DEAD, 0);
        notifying.bus_down(Bus::Session(1000));
        assert!(!notifying.stands_for(&app()));
        assert_eq!(settled(&mut notifying, Facts { reachable: false, ..DEAD }, 1), []);
        assert_eq!(notifying.poll_timeout(), None);
        let again = settled(&mut notifying, DEAD, 2);
        assert_eq!(again[..2], [Did::Says(": Ann".into()), Did::Shows(1, Priority::Normal)]);
    }

    #[test]
    fn helpers_have_a_few_notifications_by_tag_and_each_its_pace() {
        let mut notifying = Notifying::default();
        for n in 0..=TAGS {
            notifying.helped(&app(), made(&n.to_string(), "x"));
            settled(&mut notifying, AWAY, 0);
        }
        notifying.helped(&app(), made("8", "y"));
        assert_eq!(settled(&mut notifying, AWAY, 1), []);
        notifying.helped(&app(), made("8", "z"));
        assert_eq!(notifying.poll_timeout(), Some(at(2_000)));
        assert_eq!(settled(&mut notifying, AWAY, 2_000), [Did::Says("8: z".into())]);
        notifying.helped(&app(), made("new", "n"));
        assert_eq!(did(&mut notifying), [Did::Closes("1".into())], "0 went for 8");
        notifying.gone(&app(), "5");
        assert_eq!(notifying.apps[&app()].tags.len(), TAGS - 1);
    }

    #[test]
    fn calls_ring() {
        let mut notifying = arrived(Priority::Call, false);
        notifying.settle(&app(), DEAD, at(0));
        let Some(Output::Order(_, NotifyOrder::Show(shown))) = notifying.poll_output() else { panic!("it is shown") };
        assert_eq!(shown.category.as_deref(), Some("call.incoming"));
    }

    #[test]
    fn nobody_is_spoken_for_on_the_system_bus_and_the_number_of_apps_is_bounded() {
        let mut notifying = Notifying::default();
        notifying.arrived(&AppKey::new(Bus::System, "org.example.Camera"), Priority::High, true, at(0));
        notifying.arrived(&AppKey::new(Bus::Session(1), ":1.7"), Priority::High, true, at(0));
        assert_eq!(notifying.apps().count(), 0);
        for n in 0..1000 {
            notifying.arrived(&AppKey::new(Bus::Session(1), format!("org.a.B{n}")), Priority::High, true, at(0));
        }
        assert_eq!(notifying.apps().count(), APPS);
    }
}
