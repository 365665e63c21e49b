//! Messages of apps that have a payload helper: it sees them while the app is held still or does not run, and what it has
//! made a notification of wakes nobody.

use std::sync::Arc;

use super::{
    App, Delivery, Output, Reach,
    queue::{Body, Entry, Help},
};
use crate::{
    model::{AppKey, Ending, MessageSeq, Urgency},
    time::Now,
};

/// Messages of one app that are read back for its helper, or wait for it, at a time.
const AHEAD: usize = 4;

/// What came of a message that a helper was to see.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Helped {
    /// The user has been told; the message waits until the app runs for another reason.
    Spoken,
    /// The app is to be woken for it, and gets everything that waits.
    Declined,
    /// It is of no use.
    Dropped,
}

impl Delivery {
    /// Whose message it is and how urgent, if its helper's answer is still asked for: it waits, and the app neither runs nor
    /// is woken.
    pub fn awaits_help(&self, seq: MessageSeq) -> Option<(AppKey, Urgency)> {
        let lane = self.lanes.get(self.waiting.get(&seq)?)?;
        let away = self.apps.get(&lane.app).is_some_and(App::may_be_helped) && lane.flight.is_none();
        let entry = lane.queue.iter().find(|entry| entry.seq == seq && entry.help == Help::Asked)?;
        away.then(|| (lane.app.clone(), entry.urgency))
    }

    /// What the user was told of the app's messages was not seen after all: they are to wake it.
    pub fn untold(&mut self, key: &AppKey, now: Now) {
        let lanes = self.apps.get(key).map(|app| app.lanes.clone()).unwrap_or_default();
        for id in lanes {
            let entries = self.lanes.get_mut(&id).into_iter().flat_map(|lane| lane.queue.iter_mut());
            entries.for_each(|entry| entry.help = Help::Declined);
        }
        self.settle(key, now);
    }

    /// Whether nothing says how to start the app.
    pub fn is_unstartable(&self, key: &AppKey) -> bool {
        self.apps.get(key).is_some_and(|app| app.reach == Reach::Unstartable)
    }

    /// The helper has had the message ([`Output::Help`]).
    pub fn helped(&mut self, seq: MessageSeq, helped: Helped, now: Now) {
        let Some(key) = self.waiting.get(&seq).and_then(|of| self.lanes.get(of)).map(|lane| lane.app.clone()) else {
            return;
        };
        match helped {
            Helped::Dropped if self.awaits_help(seq).is_some() => self.end(seq, Ending::Accepted),
            Helped::Dropped => {}
            Helped::Spoken => {
                let Some((_, entry)) = self.entry_mut(seq) else { return };
                entry.help = Help::Spoken;
                let len = entry.body.inline_len();
                // It may be long until it is wanted.
                if entry.persisted && matches!(entry.body, Body::Inline(_)) {
                    entry.body = Body::Stored;
                    self.inline_bytes -= len;
                }
            }
            Helped::Declined => {
                let lanes = self.apps.get(&key).map(|app| app.lanes.clone()).unwrap_or_default();
                for id in lanes {
                    let entries = self.lanes.get_mut(&id).into_iter().flat_map(|lane| lane.queue.iter_mut());
                    for entry in entries.filter(|entry| entry.help != Help::Spoken) {
                        entry.help = Help::Declined;
                    }
                }
            }
        }
        self.settle(&key, now);
    }

    /// Messages that wait for the app, without those its helper has, is to have or has told the user of.
    pub fn untold_for(&self, key: &AppKey) -> usize {
        let (gate, Some(app)) = (self.gate(key), self.apps.get(key)) else { return 0 };
        let untold = |entry: &&Entry| !gate.helped || gate.full || entry.help == Help::Declined;
        self.lanes_of(app).flat_map(|lane| lane.queue.iter()).filter(untold).count()
    }

    /// Has the app's helper see what would wake the app now.
    pub(super) fn ask_helper(&mut self, key: &AppKey, now: Now) {
        let gate = self.gate(key);
        let Some(app) = self.apps.get(key).filter(|app| app.may_be_helped()) else { return };
        if !gate.helped || gate.full {
            return;
        }
        let asked = |entry: &Entry| entry.help == Help::Asked || entry.body == Body::Loading;
        let mut room =
            AHEAD.saturating_sub(self.lanes_of(app).flat_map(|lane| lane.queue.iter()).filter(|e| asked(e)).count());
        for id in app.lanes.clone() {
            let Some(lane) = self.lanes.get_mut(&id).filter(|lane| lane.flight.is_none()) else { continue };
            let token = Arc::clone(&lane.token);
            let reachable = lane.queue.iter_mut().take_while(|entry| !matches!(entry.body, Body::Fetching { .. }));
            let new =
                |entry: &&mut Entry| entry.help == Help::Untried && entry.expires > now.wall && gate.passes(entry);
            for entry in reachable.filter(new) {
                if room == 0 {
                    return;
                }
                match &entry.body {
                    Body::Inline(body) => {
                        self.outputs.push_back(Output::Help {
                            seq: entry.seq,
                            app: key.clone(),
                            token: Arc::clone(&token),
                            id: Arc::clone(&entry.id),
                            urgency: entry.urgency,
                            body: Arc::clone(body),
                        });
                        entry.help = Help::Asked;
                    }
                    Body::Stored => {
                        entry.body = Body::Loading;
                        self.outputs.push_back(Output::LoadBody(entry.seq));
                    }
                    Body::Loading | Body::Fetching { .. } => continue,
                }
                room -= 1;
            }
        }
    }
}

impl App {
    /// Whether it is held still, or does not run, and nobody wakes it.
    const fn may_be_helped(&self) -> bool {
        matches!(self.reach, Reach::Away | Reach::Unstartable)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{
        super::tests::{LANE, World},
        *,
    };
    use crate::{
        config::{AppSettings, PayloadHelper, Settings},
        event::{CallOutcome, StartOutcome},
        model::Urgency,
    };

    /// An app with a helper that does not run.
    fn world(more: impl FnOnce(&mut Settings)) -> World {
        let app = World::with_settings(&Settings::default()).app.service;
        let payload_helper = Some(PayloadHelper { command: ["/bin/true".into()].into(), network: false });
        let apps = vec![AppSettings { payload_helper, ..AppSettings::new(app) }];
        let mut settings = Settings { apps, ..Settings::default() };
        more(&mut settings);
        let mut world = World::with_settings(&settings);
        world.delivery.vanished(&world.app, world.now);
        world.drain();
        world
    }

    #[derive(Debug, PartialEq, Eq)]
    enum Did {
        Helps(u64),
        Wakes,
        Ends(Ending),
        Loads(u64),
    }

    fn did(world: &mut World) -> Vec<Did> {
        let of = |output| match output {
            Output::Help { seq, .. } => Some(Did::Helps(seq.0)),
            Output::Wake(..) => Some(Did::Wakes),
            Output::End(_, _, ending) => Some(Did::Ends(ending)),
            Output::LoadBody(seq) => Some(Did::Loads(seq.0)),
            _ => None,
        };
        world.drain().into_iter().filter_map(of).collect()
    }

    fn send(world: &mut World, id: &str, urgency: Urgency) -> Vec<Did> {
        world.push_with(LANE, id, None, urgency);
        did(world)
    }

    fn answer(world: &mut World, seq: u64, helped: Helped) -> Vec<Did> {
        world.delivery.helped(MessageSeq(seq), helped, world.now);
        did(world)
    }

    #[test]
    fn what_the_helper_has_told_wakes_nobody_until_something_else_does() {
        let mut world = world(|_| {});
        assert_eq!(send(&mut world, "a", Urgency::High), [Did::Helps(1)]);
        world.delivery.stored(MessageSeq(1), true, world.now);
        assert_eq!(answer(&mut world, 1, Helped::Spoken), []);
        assert_eq!((world.delivery.held_for(&world.app), world.delivery.untold_for(&world.app)), (1, 0));
        assert_eq!(send(&mut world, "b", Urgency::Normal), [Did::Helps(2)]);
        assert_eq!(answer(&mut world, 2, Helped::Declined), [Did::Wakes]);
        world.delivery.ready(&world.app, world.owner.clone(), world.now);
        // It was not kept in memory.
        assert_eq!(did(&mut world), [Did::Loads(1)]);
        world.delivery.body(MessageSeq(1), Some(b"a"[..].into()), world.now);
        let mut order = Vec::new();
        while let Some((ticket, id)) = world.calls().pop() {
            order.push(id);
            world.done(ticket, CallOutcome::Accepted);
        }
        assert_eq!(order, ["a", "b"]);
    }

    #[test]
    fn it_is_held_no_longer_than_other_messages() {
        let mut world = world(|settings| settings.urgency.hold_at_most = Duration::from_secs(3600));
        send(&mut world, "a", Urgency::High);
        answer(&mut world, 1, Helped::Spoken);
        world.pass(Duration::from_secs(3599));
        assert_eq!(did(&mut world), []);
        world.pass(Duration::from_secs(2));
        assert_eq!(did(&mut world), [Did::Wakes]);
    }

    #[test]
    fn what_may_not_wake_the_app_now_does_not_go_to_its_helper_either() {
        let mut world = world(|_| {});
        world.delivery.set_minimum(Urgency::High, world.now);
        assert_eq!(send(&mut world, "a", Urgency::Normal), []);
        assert_eq!(send(&mut world, "b", Urgency::High), [Did::Helps(2)]);
        world.delivery.set_minimum(Urgency::VeryLow, world.now);
        assert_eq!(did(&mut world), [Did::Helps(1)]);
    }

    #[test]
    fn dropped_is_done_with_and_an_answer_that_comes_too_late_is_none() {
        let mut world = world(|_| {});
        send(&mut world, "a", Urgency::Normal);
        send(&mut world, "b", Urgency::Normal);
        assert_eq!(answer(&mut world, 1, Helped::Dropped), [Did::Ends(Ending::Accepted)]);
        world.delivery.appeared(&world.app, world.now);
        world.delivery.ready(&world.app, world.owner.clone(), world.now);
        assert_eq!(world.delivery.awaits_help(MessageSeq(2)), None);
        assert_eq!(answer(&mut world, 2, Helped::Dropped), [], "the app has it");
        assert_eq!(world.delivery.waiting(), 1);
    }

    #[test]
    fn a_queue_half_full_wakes_the_app_and_a_few_go_to_the_helper_at_a_time() {
        let mut world = world(|settings| settings.limits.messages_per_app = 20);
        for n in 1..10 {
            let did = send(&mut world, &n.to_string(), Urgency::Normal);
            assert_eq!(did, if n <= AHEAD as u64 { vec![Did::Helps(n)] } else { vec![] });
        }
        assert_eq!(answer(&mut world, 1, Helped::Spoken), [Did::Helps(5)]);
        assert_eq!(send(&mut world, "10", Urgency::Normal), [Did::Wakes]);
    }

    #[test]
    fn one_that_nothing_can_start_has_its_helper() {
        let mut world = world(|_| {});
        send(&mut world, "a", Urgency::Normal);
        assert_eq!(answer(&mut world, 1, Helped::Declined), [Did::Wakes]);
        world.delivery.start_failed(&world.app, &StartOutcome::NotActivatable, world.now);
        assert!(world.delivery.is_unstartable(&world.app));
        assert_eq!(send(&mut world, "b", Urgency::Normal), [Did::Helps(2)]);
        answer(&mut world, 2, Helped::Spoken);
        assert_eq!(world.delivery.untold_for(&world.app), 1);
        // Nobody saw it.
        world.delivery.untold(&world.app, world.now);
        assert_eq!(world.delivery.untold_for(&world.app), 2);
    }
}
