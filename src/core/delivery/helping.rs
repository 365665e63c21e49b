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
