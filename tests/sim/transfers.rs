//! Transfers: apps hand them over, the network comes and goes under them, the daemon crashes in the middle; each that was
//! taken over ends once, and its app hears of it.

use std::collections::BTreeMap;

use nightporter::{
    action::ClientCall,
    event::{BusEvent, CallOutcome, Event, Request, TransferTicket},
    model::{AppKey, Owner},
    transfer::{
        Attempt, Attempted, Direction, Metered, Transfer, TransferEvent, TransferId, TransferOrder, TransferRequest,
        Wish,
    },
};

use crate::{
    clock::{MS, SEC},
    world::{Due, What, World},
};

/// As in `config::TransferSettings`.
const AT_A_TIME: usize = 2;

/// What is known of the transfers by who hands them over.
#[derive(Default)]
pub(crate) struct Transfers {
    accepted: BTreeMap<TransferId, Accepted>,
    /// Attempts of the running life, with a number that is used once.
    running: BTreeMap<TransferId, u64>,
    attempts: u64,
    /// Bytes; outlive the daemon.
    spool: BTreeMap<TransferId, u64>,
    /// Calls to apps without an answer: in which life, to whom, about what.
    flights: BTreeMap<TransferTicket, (u64, TransferId)>,
}

struct Accepted {
    app: usize,
    /// How it ended, once its app was told.
    ended: Option<&'static str>,
    heard: bool,
    /// Its app has given up its registrations.
    gone: bool,
}

/// The answer of an app, on its way.
pub(crate) struct Told {
    life: u32,
    bus: u32,
    ticket: TransferTicket,
    outcome: CallOutcome,
}

impl World {
    /// Some app hands something over, asks, or changes its mind.
    pub(crate) fn app_transfers(&mut self, n: u64) {
        let Some(caller) = self.caller(n) else { return };
        let Some(app) = self.instances.get(&n).filter(|i| !i.frozen && !i.stopped).map(|instance| instance.app) else {
            return;
        };
        let own: Vec<TransferId> = self
            .transfers
            .accepted
            .iter()
            .filter(|(_, known)| known.app == app && !known.gone)
            .map(|(id, _)| *id)
            .collect();
        if self.rng.chance(1000)
            && let Some(id) = self.rng.pick(&own).copied()
        {
            self.call(caller, Request::Transfer(TransferRequest::Collect(id)), What::Other);
            return;
        }
        let upload = self.rng.chance(4000);
        let wish = Wish {
            direction: if upload { Direction::Upload } else { Direction::Download },
            url: "https://files.sim/x".into(),
            method: if upload { "PUT" } else { "GET" }.into(),
            headers: Vec::new(),
            size: upload.then(|| self.rng.between(1, 5_000_000)),
            title: "".into(),
            metered: *self.rng.pick(&[None, Some(Metered::Never), Some(Metered::Allow)]).expect("three"),
            sha256: None,
            most: None,
        };
        self.count("transfers asked for");
        self.call(caller, Request::Transfer(TransferRequest::Begin(Box::new(wish))), What::Transfer { app });
    }

    /// The app has been told that it is taken over.
    pub(crate) fn transfer_accepted(&mut self, app: usize, id: TransferId) {
        assert!(self.store.transfers.contains_key(&id), "transfer {} is taken over and not durable", id.0);
        let known = Accepted { app, ended: None, heard: false, gone: false };
        assert!(self.transfers.accepted.insert(id, known).is_none(), "number {} is used twice", id.0);
        self.count("transfers taken over");
    }

    pub(crate) fn transfers_may_go(&mut self, key: &AppKey) {
        let app = self.app_index(key);
        self.transfers.accepted.values_mut().filter(|known| known.app == app).for_each(|known| known.gone = true);
    }

    pub(crate) fn transfer_order(&mut self, order: TransferOrder) {
        match order {
            TransferOrder::Start(attempt) => self.attempt_starts(&attempt),
            TransferOrder::Stop(id) => {
                assert!(self.transfers.running.contains_key(&id), "transfer {} is stopped and does not run", id.0);
                let at = self.soon(MS, SEC);
                let number = self.transfers.running[&id];
                self.agenda.add(at, Due::Attempt(self.life, id, number, true));
            }
            TransferOrder::Take { call, id, .. } => {
                if let Some(What::Transfer { app }) = self.answered_otherwise(call) {
                    self.transfer_accepted(app, id);
                }
                let whole = self.calm || self.rng.chance(8500);
                let result = if whole { Ok(()) } else { Err("its content ended early".into()) };
                let at = self.soon(MS, 5 * SEC);
                self.agenda.add(at, Due::Core(self.life, Event::Transfer(id, TransferEvent::Spooled(result))));
            }
            TransferOrder::Collect { call, id, .. } => {
                self.answered_otherwise(call);
                assert!(self.transfers.spool.contains_key(&id), "transfer {} is done and its file is not there", id.0);
                self.count("transfers collected");
                let went = self.calm || self.rng.chance(9000);
                let at = self.soon(MS, 50 * MS);
                self.agenda.add(at, Due::Core(self.life, Event::Transfer(id, TransferEvent::Collected(went))));
            }
            TransferOrder::Remove(id) => {
                self.transfers.running.remove(&id);
                self.transfers.spool.remove(&id);
            }
        }
    }

    fn attempt_starts(&mut self, attempt: &Attempt) {
        let id = attempt.id;
        let kept = self.store.transfers.get(&id);
        assert!(kept.is_some_and(|kept| kept.end.is_none()), "transfer {} runs and is not kept, or is over", id.0);
        assert!(attempt.progress.content, "upload {} runs without its content", id.0);
        let network = self.phone.told.as_ref().map(|around| around.network.clone()).unwrap_or_default();
        let paid = attempt.wish.metered == Some(Metered::Allow) || attempt.metered.is_some();
        assert!(!network.metered || paid, "transfer {} runs over a metered network: {:?}", id.0, attempt.wish);
        self.transfers.attempts += 1;
        let number = self.transfers.attempts;
        let before = self.transfers.running.insert(id, number);
        assert!(before.is_none(), "transfer {} runs twice at a time", id.0);
        assert!(self.transfers.running.len() <= AT_A_TIME, "{} transfers run", self.transfers.running.len());
        self.count("attempts at transfers");
        let at = self.soon(10 * MS, 20 * SEC);
        self.agenda.add(at, Due::Attempt(self.life, id, number, false));
    }

    /// An attempt comes to its end.
    pub(crate) fn attempt_ends(&mut self, life: u32, id: TransferId, number: u64, stopped: bool) {
        if life != self.life || self.transfers.running.get(&id) != Some(&number) {
            return;
        }
        let bytes = *self.transfers.spool.entry(id).or_default();
        let more = bytes + self.rng.between(1, 3_000_000);
        let later = |bytes, after| Attempted::Later { bytes, after, text: "the connection broke".into() };
        let dice = if self.calm { 9999 } else { self.rng.below(10_000) };
        let attempted = match dice {
            _ if stopped => Attempted::Stopped { bytes },
            _ if self.network_down => later(bytes, None),
            0..2000 => {
                self.transfers.spool.insert(id, more);
                later(more, None)
            }
            2000..2500 => later(bytes, Some(std::time::Duration::from_secs(self.rng.between(1, 60)))),
            2500..3000 => Attempted::NoRoom { bytes },
            3000..3500 => Attempted::Failed("404 Not Found".into()),
            3500..4500 => {
                // It is only under way.
                self.transfers.spool.insert(id, more);
                let validator = self.rng.chance(7000).then(|| "\"v\"".into());
                self.tell(Event::Transfer(id, TransferEvent::Begun { total: Some(more * 2), validator }));
                let at = self.soon(MS, 10 * SEC);
                self.agenda.add(at, Due::Attempt(life, id, number, false));
                return self.tell(Event::Transfer(id, TransferEvent::Progress { bytes: more, good: more }));
            }
            _ => Attempted::Done { bytes: more, text: "200 OK".into() },
        };
        self.transfers.running.remove(&id);
        self.tell(Event::Transfer(id, TransferEvent::Ended(attempted)));
    }

    /// An app is told of an end.
    pub(crate) fn tell_of_transfer(&mut self, owner: &Owner, call: &ClientCall) {
        let ClientCall::TransferDone { ticket, id, status, .. } = *call else { return };
        let kept = self.store.transfers.get(&id).and_then(|kept: &Transfer| kept.end.as_ref());
        let durable = kept.map(|end| end.how.as_str());
        assert_eq!(durable, Some(status), "what is told of transfer {} is not what is durable", id.0);
        if let Some(known) = self.transfers.accepted.get_mut(&id) {
            let before = known.ended.replace(status);
            assert!(before.is_none_or(|before| before == status), "transfer {} ended as {before:?} and {status}", id.0);
        }
        self.count("apps told of a transfer");
        let (life, bus) = (self.life, self.bus_age);
        let vanished = Told { life, bus, ticket, outcome: CallOutcome::Vanished };
        let Some(n) = self.instance_of_owner(owner) else { return self.transfer_told(0, vanished) };
        self.check_not_held(n, call);
        self.transfers.flights.insert(ticket, (n, id));
        let hung = self.instances.get(&n).is_some_and(|instance| instance.hung);
        let outcome = match if self.calm { 9999 } else { self.rng.below(10_000) } {
            _ if hung => return,
            0..800 => CallOutcome::Refused("not now".into()),
            800..1200 => return self.die(n, "crashes at the end of a transfer"),
            1200..1400 if self.plan.slow_apps => return,
            _ => CallOutcome::Accepted,
        };
        let at = self.soon(MS, 100 * MS);
        self.agenda.add(at, Due::Told(n, Told { life, bus, ticket, outcome }));
    }

    pub(crate) fn transfer_told(&mut self, n: u64, told: Told) {
        if (told.life, told.bus) != (self.life, self.bus_age) {
            return;
        }
        let held = self.instances.get(&n).is_some_and(|instance| instance.frozen || instance.stopped);
        if held {
            self.agenda.add(self.at + SEC, Due::Told(n, told));
            return;
        }
        let flight = self.transfers.flights.remove(&told.ticket);
        if let (Some((_, id)), CallOutcome::Accepted) = (flight, &told.outcome) {
            if let Some(known) = self.transfers.accepted.get_mut(&id) {
                known.heard = true;
            }
            if self.rng.chance(7000)
                && let Some(caller) = self.caller(n)
            {
                self.call(caller, Request::Transfer(TransferRequest::Collect(id)), What::Other);
            }
        }
        self.bus_event(BusEvent::TransferTold(told.ticket, told.outcome));
    }

    /// An instance died: who waits for its answers hears so.
    pub(crate) fn transfers_of_dead(&mut self, n: u64) {
        let open: Vec<TransferTicket> =
            self.transfers.flights.iter().filter(|(_, (to, _))| *to == n).map(|(ticket, _)| *ticket).collect();
        for ticket in open {
            self.transfers.flights.remove(&ticket);
            self.bus_event(BusEvent::TransferTold(ticket, CallOutcome::Vanished));
        }
    }

    /// The daemon is gone, or the bus: nobody waits for an answer any more.
    pub(crate) fn transfer_flights_end(&mut self) {
        self.transfers.flights.clear();
    }

    pub(crate) fn attempts_end(&mut self) {
        if !self.transfers.running.is_empty() {
            self.count("crashes mid-transfer");
        }
        self.transfers.running.clear();
        self.transfer_flights_end();
    }

    /// Whether the app has something to hear of.
    pub(crate) fn has_ended_transfer(&self, key: &AppKey) -> bool {
        self.store.transfers.values().any(|kept| kept.app == *key && kept.end.as_ref().is_some_and(|end| !end.told))
    }

    /// A transfer that was taken over, and whose app has not heard how it ended.
    pub(crate) fn unheard_transfer(&self) -> Option<String> {
        let unheard = self.transfers.accepted.iter().find(|(_, known)| !known.heard && !known.gone);
        unheard.map(|(id, known)| {
            let kept = self.store.transfers.get(id).map(|kept| (&kept.end, kept.progress.content));
            format!("app {} has not heard of transfer {}: {kept:?}, told {:?}", known.app, id.0, known.ended)
        })
    }
}
