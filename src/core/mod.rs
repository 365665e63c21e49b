//! The pure core: a deterministic state machine without clock, file, socket, thread or random source.
//!
//! One door in, one door out: [`Core::handle`] with an event and the time, then [`Core::poll_action`] until `None`, then
//! [`Core::poll_timeout`]. Nothing else changes it. The same events at the same times with the same seed give the same
//! actions, so the whole daemon can be simulated (tests/sim).
//!
//! This file takes events in and passes them to the parts (`upstream`, `delivery`, `lifecycle`, `ledger`), which do not know
//! one another; `wiring` passes on what they want.

mod access;
mod beginning;
mod control;
pub mod delivery;
mod demotion;
#[cfg(test)]
mod fixtures;
pub mod foreground;
mod helping;
pub mod leases;
mod leasing;
pub mod ledger;
pub mod lifecycle;
mod looking;
mod notice;
mod notifying;
mod panel;
pub mod pressure;
mod queries;
mod recent;
mod registering;
mod registry;
mod reporting;
mod routes;
mod shortage;
mod sleep;
mod stand_in;
mod states;
mod surroundings;
mod transferring;
pub mod transfers;
mod unsaved;
pub mod upstream;
mod urgency;
mod wakes;
mod waking;
mod wiring;

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use rand_chacha::ChaCha12Rng;

use self::{
    control::Commands,
    delivery::Delivery,
    demotion::Demotion,
    foreground::Windows,
    leases::{Leases, Wish},
    ledger::{Account, Journal, Ledger, Shadows},
    lifecycle::Lifecycle,
    pressure::Pressure,
    recent::Recent,
    registering::Farewell,
    registry::Registry,
    reporting::{Reader, ReportRun},
    routes::Routes,
    sleep::Sleep,
    stand_in::StandIn,
    states::States,
    surroundings::Told,
    transfers::Transfers,
    unsaved::Unsaved,
    upstream::{LinkIds, Session},
    wakes::Wakes,
    waking::Watched,
};
use crate::{
    action::{Action, Reply, StoreOp},
    config::{Settings, UpstreamSettings},
    event::{BusEvent, CallId, Event, NoticeTicket, Outcome, Request, StartOutcome, StoreError, StoreTicket},
    model::{AppKey, Bus, MessageSeq, Owner, RegistrationId, Surroundings, TargetId},
    time::{Instant, Now, earliest},
    transfer::TransferId,
    view::Messages,
};

/// An app asked to start that has not taken its name by then has failed to.
const START_TIME: Duration = Duration::from_secs(60);
/// Expired messages are cleared away when something happens anyway, at most this often.
const SWEEP_EVERY: Duration = Duration::from_secs(3600);
/// What is still frozen then is left to the executor's last sweep.
const SHUTDOWN_TIME: Duration = Duration::from_secs(3);
/// For apps that were called when the daemon was asked to end: what they have taken must not come again.
const LAST_ANSWERS: Duration = Duration::from_secs(1);

/// The whole daemon but for the world.
#[derive(Debug)]
pub struct Core {
    settings: Settings,
    upstreams: Vec<Upstream>,
    registry: Registry,
    delivery: Delivery,
    lifecycle: Lifecycle,
    pressure: Pressure,
    leases: Leases,
    transfers: Transfers,
    ledger: Ledger,
    account: Account,
    journal: Journal,
    shadows: Shadows,
    readers: BTreeMap<StoreTicket, Reader>,
    /// The daemon measures itself for the history's totals.
    totals_asked: bool,
    apps: BTreeMap<AppKey, Presence>,
    buses: Vec<Bus>,
    commands: Commands,
    farewells: Vec<Farewell>,
    report: Option<ReportRun>,
    samples: BTreeMap<TargetId, VecDeque<Purpose>>,
    stores: BTreeMap<StoreTicket, Stored>,
    next_store: u64,
    unsaved: Unsaved,
    states: States,
    next_notice: u64,
    routes: Routes,
    /// Feeds the sessions made from now on.
    seeds: ChaCha12Rng,
    /// By bus: what one user gets is none of another's business.
    messages: BTreeMap<Bus, Messages>,
    damaged: Option<Arc<str>>,
    store_trouble: Option<StoreError>,
    /// None until something has said what they are.
    surroundings: Option<Surroundings>,
    sleep: Sleep,
    recent: Recent,
    windows: BTreeMap<Bus, Windows>,
    wakes: Wakes,
    demotion: Demotion,
    stand_in: StandIn,
    /// Buses on which notifications are watched for.
    watched: BTreeMap<Bus, Watched>,
    swept: Instant,
    ending: Option<Instant>,
    /// Until when answers are waited for, once it is ending.
    answers_until: Option<Instant>,
    exited: bool,
    actions: VecDeque<Action>,
}

#[derive(Debug)]
struct Upstream {
    settings: UpstreamSettings,
    /// Whose it is, where a user has set it up on a panel: for apps on that bus alone.
    owner: Option<Bus>,
    session: Session,
    told: Told,
}

/// What a bus says of an app, and what we asked of it.
#[derive(Debug, Default)]
struct Presence {
    /// Whether the bus has spoken: without it no owner means nothing.
    known: bool,
    owner: Option<Owner>,
    /// Set while it is being started: when that has failed.
    starting: Option<Instant>,
    /// It is started because the user wants to see it.
    touched: bool,
    declares: bool,
    /// Whether this instance was ever seen with a window.
    had_window: bool,
    /// The connection of it that listens, and the notice it has not answered yet.
    listener: Option<Owner>,
    notice: Option<NoticeTicket>,
}

/// What a sample is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    Lifecycle,
    Report,
}

/// What waits for the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stored {
    Message(MessageSeq),
    Registration(RegistrationId),
    Deletion(RegistrationId),
    /// A former route or a preference, by number.
    Row(u64),
    /// Of an upstream, by key.
    Value(usize, &'static str),
    /// An app's state, on its way in or out.
    State,
    Transfer(TransferId),
    /// The history, on its way out.
    History,
}

impl Core {
    /// Takes in one event.
    pub fn handle(&mut self, event: Event, now: Now) {
        if event == Event::Resumed {
            self.sleep.slept();
        }
        // What was due before the event comes before it, or a decision of time would mix with those of the event.
        self.handle_timeouts(now);
        self.pump(now);
        match event {
            Event::Tick => {}
            Event::Link(link, event) => {
                if let Some(upstream) = self.upstreams.get_mut(LinkIds::session_of(link)) {
                    upstream.session.handle_link(link, event, now);
                }
            }
            Event::Transfer(id, event) => self.transfers.happened(id, event, now),
            Event::Http(ticket, result) => {
                if let Some(upstream) = self.upstreams.get_mut(LinkIds::session_of_request(ticket)) {
                    upstream.session.handle_http(ticket, result, now);
                }
            }
            Event::Surroundings(surroundings) => self.surrounded(surroundings, now),
            Event::FallingAsleep => {
                self.leases.sleep(true, now.boot);
                self.transfers.sleep(true, now);
                self.sleep.falling_asleep(now.boot);
            }
            Event::Bus(event) => self.handle_bus(event, now),
            Event::Stored(ticket, result) => self.handle_stored(ticket, result, now),
            Event::Body(seq, body) => self.delivery.body(seq, body, now),
            Event::History(ticket, rows) => self.history_loaded(ticket, rows, now),
            Event::State(ticket, state) => self.state_loaded(ticket, state),
            Event::Fetched(ticket, result) => self.delivery.fetched(ticket, result, now),
            Event::Identified { app, owner, process } => {
                self.lifecycle.identified(&app, &owner, process, now);
                self.look_at(&app, now);
            }
            Event::Outcome(target, outcome) => self.handle_outcome(target, &outcome, now),
            Event::TargetGone(target) => self.handle_target_gone(target, now),
            Event::Vetoes(target, vetoes) => self.lifecycle.vetoed(target, vetoes, now),
            Event::Inspected(target, found) => self.lifecycle.inspected(target, &found, now),
            Event::Windows(bus, windows) => self.windows_told(bus, windows, now),
            Event::Helped(seq, answer) => self.helped(seq, answer, now),
            Event::NotificationsSeen(bus, seen) => self.notifications_seen(bus, seen, now),
            Event::Notified { bus, owner, target } => self.notified(bus, &owner, target, now),
            Event::Sampled(target, sample) => self.handle_sampled(target, sample, now),
            Event::SampledSelf { daemon, zram } => self.daemon_sampled(daemon, zram, now),
            Event::NetworkReturned | Event::Resumed => {
                self.routes.try_again(now);
                self.transfers.network_returned(now);
                if event == Event::Resumed {
                    self.leases.sleep(false, now.boot);
                    self.transfers.sleep(false, now);
                    self.sleep.resumed(self.settings.lifecycle.awake_window, now.boot);
                }
                for upstream in &mut self.upstreams {
                    upstream.session.handle_network(now);
                }
            }
            Event::Pressure(reading) => {
                self.ledger.machine(&reading, now.boot);
                self.pressed(&reading, now);
            }
            Event::Shutdown => {
                if self.ending.is_none() {
                    self.ending = Some(now.boot + SHUTDOWN_TIME);
                    self.answers_until = Some(now.boot + LAST_ANSWERS);
                    self.delivery.shutdown();
                    self.sleep.shutdown();
                    self.transfers.shutdown(now);
                    self.lifecycle.shutdown(now);
                    self.close_books(now);
                }
            }
        }
        self.pump(now);
    }

    /// The next thing to do, if any.
    pub fn poll_action(&mut self) -> Option<Action> {
        let action = self.actions.pop_front();
        if action.is_none() {
            self.actions.shrink_to(32);
        }
        action
    }

    /// When [`Core::handle`] wants an [`Event::Tick`] at the latest.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let sessions = self.upstreams.iter().filter_map(|upstream| upstream.session.poll_timeout());
        let starting = self.apps.values().filter_map(|presence| presence.starting);
        let own = sessions
            .chain(starting)
            .chain(self.ending)
            .chain(self.answers_until)
            .chain(self.report.as_ref().map(ReportRun::deadline))
            .min();
        let own = earliest(own, earliest(self.unsaved.deadline(), self.routes.deadline()));
        let own = earliest(own, earliest(self.sleep.poll_timeout(), self.pressure.poll_timeout()));
        let own = earliest(own, earliest(self.leases.poll_timeout(), self.waking_timeout()));
        let own = earliest(own, self.transfers.poll_timeout());
        let own = earliest(own, self.stand_in.poll_timeout());
        earliest(own, earliest(self.delivery.poll_timeout(), self.lifecycle.poll_timeout()))
    }

    /// When a sleeping machine is to be woken: for the heartbeat of a link, if the user wants that.
    pub fn poll_wake(&self) -> Option<Instant> {
        if !self.settings.network.wake_for_heartbeat {
            return None;
        }
        self.upstreams.iter().filter_map(|upstream| upstream.session.poll_wake()).min()
    }

    fn handle_timeouts(&mut self, now: Now) {
        let due = |at: Option<Instant>| at.is_some_and(|at| at <= now.boot);
        for upstream in &mut self.upstreams {
            if due(upstream.session.poll_timeout()) {
                upstream.session.handle_timeout(now);
            }
        }
        // What is delivered now must veto a freeze that is due now as well, so each part hears of the one before.
        self.pump(now);
        if due(self.delivery.poll_timeout()) {
            self.delivery.handle_timeout(now);
            self.pump(now);
        }
        if due(self.transfers.poll_timeout()) {
            self.transfers.handle_timeout(now);
            self.pump(now);
        }
        if due(self.leases.poll_timeout()) {
            self.leases.handle_timeout(now.boot);
            self.pump(now);
        }
        if due(self.demotion.poll_timeout()) {
            self.handle_waking_timeout(now);
        }
        self.handle_helpers_timeout(now);
        if due(self.lifecycle.poll_timeout()) {
            self.lifecycle.handle_timeout(now);
        }
        if due(self.pressure.poll_timeout()) && self.pressure.handle_timeout(now.boot) {
            self.actions.push_back(Action::ReadPressure);
        }
        let late: Vec<AppKey> =
            self.apps.iter().filter(|(_, presence)| due(presence.starting)).map(|(app, _)| app.clone()).collect();
        for app in late {
            let text = format!("it did not take its name in {} s", START_TIME.as_secs());
            self.handle_started(&app, &StartOutcome::Failed(text), now);
        }
        if due(self.report.as_ref().map(ReportRun::deadline)) {
            self.finish_report(now);
        }
        if due(self.unsaved.deadline()) {
            self.save_again();
        }
        if now.boot.since(self.swept) >= SWEEP_EVERY {
            self.swept = now.boot;
            self.delivery.sweep(now);
            self.transfers.sweep(now);
            self.sweep_routes(now);
        }
        if due(self.answers_until) {
            self.answers_until = None;
        }
        if due(self.ending) {
            self.exit(now);
        }
    }

    fn handle_bus(&mut self, event: BusEvent, now: Now) {
        match event {
            BusEvent::Up(bus) => {
                if !self.buses.contains(&bus) {
                    self.buses.push(bus);
                }
                let watched = self.apps.keys().filter(|app| app.bus == bus).cloned().map(Action::Watch);
                self.actions.extend(watched);
                self.rate_all_on(bus, now);
            }
            BusEvent::Down(bus, reason) => self.handle_bus_down(bus, &reason, now),
            BusEvent::Call { call, caller, request } => match request {
                Request::Register { service, token, description, vapid, version, upstream, notify } => {
                    let wish = registering::Wish { service, token, description, vapid, version, upstream, notify };
                    self.register(call, &caller, wish, now);
                }
                Request::Unregister { token, version } => self.unregister(call, &caller, &token, version, now),
                Request::Declare { service, claim } => self.declare(call, &caller, service, claim, now),
                Request::Listen(listens) => self.listen(call, &caller, listens, now),
                Request::SaveState(state) => self.save_state(call, &caller, state),
                Request::RestoreState => self.restore_state(call, &caller),
                Request::Query(query) => self.query(call, &caller, query, now),
                Request::Move { service, upstream } => self.move_apps(call, &caller, service, &upstream),
                Request::ForgetUser(uid) => self.forget_user(call, &caller, uid, now),
                Request::Panel(request) => self.panel(call, &caller, request, now),
                Request::Command { service, command } => self.command(call, &caller, service, command, now),
                Request::Lease { kind, reason, seconds, service } => {
                    let time = seconds.map(|seconds| Duration::from_secs(seconds.into()));
                    let wish = Wish { holder: caller.owner.clone(), kind, reason, time };
                    self.lease(call, &caller, service, wish, now);
                }
                Request::Transfer(request) => self.transfer(call, &caller, request, now),
                Request::EndLease(lease) => self.end_lease(call, &caller, lease, now),
            },
            BusEvent::OwnerChanged(app, owner) => self.handle_owner(&app, owner, now),
            BusEvent::CallDone(ticket, outcome) => self.delivery.call_done(ticket, &outcome, now),
            BusEvent::Startable(app, startable) => self.lifecycle.startable(&app, startable, now),
            BusEvent::Prepared(app, ticket) => self.prepared(&app, ticket, now),
            BusEvent::Started(app, outcome) => self.handle_started(&app, &outcome, now),
            BusEvent::TransferTold(ticket, outcome) => self.transfers.told(ticket, &outcome, now),
            BusEvent::Notified { app, tag, number, news } => {
                self.notification_news(&app, &tag, number, news, now);
            }
            BusEvent::LeaseClosed(lease) => self.leases.closed(lease, now.boot),
        }
    }

    fn handle_bus_down(&mut self, bus: Bus, reason: &str, now: Now) {
        if self.buses.contains(&bus) {
            log::warn!("the {bus} bus is gone: {reason}");
        }
        self.buses.retain(|other| *other != bus);
        for (_, presence) in self.apps.iter_mut().filter(|(app, _)| app.bus == bus) {
            (presence.known, presence.owner, presence.starting) = (false, None, None);
            (presence.listener, presence.notice) = (None, None);
        }
        self.leases.bus_down(bus, now.boot);
        self.unwatched(bus);
        self.stand_in.bus_down(bus);
        self.lifecycle.bus_down(bus, now);
        self.delivery.bus_down(bus, now);
        self.transfers.bus_down(bus, now);
        self.rate_all_on(bus, now);
    }

    fn handle_owner(&mut self, app: &AppKey, owner: Option<Owner>, now: Now) {
        if owner.is_none() && !self.buses.contains(&app.bus) {
            // That there is no bus does not mean that the app has ended, and is no reason to start it.
            return;
        }
        let Some(presence) = self.apps.get_mut(app) else { return };
        presence.known = true;
        match owner {
            Some(owner) => {
                if presence.owner.as_ref() == Some(&owner) {
                    return;
                }
                presence.owner = Some(owner.clone());
                presence.had_window = false;
                let touched = std::mem::take(&mut presence.touched);
                let started_by_us = presence.starting.take().is_some() && !touched;
                self.stand_in.appeared(app);
                self.pressure.appeared(app, now.boot);
                self.leases.vanished(app, now.boot);
                self.lifecycle.appeared(app, &owner, started_by_us, now);
                self.look_at(app, now);
                self.listener_appeared(app, &owner, now);
                self.pump(now);
                self.delivery.appeared(app, now);
                self.transfers.moved(app, true, now);
            }
            None => {
                presence.owner = None;
                self.stand_in.vanished(app);
                self.leases.vanished(app, now.boot);
                (presence.listener, presence.notice) = (None, None);
                self.lifecycle.vanished(app, now);
                self.pump(now);
                self.delivery.vanished(app, now);
                self.transfers.moved(app, false, now);
                if app.is_unique_name() {
                    self.forget_app(app, now);
                }
            }
        }
    }

    fn handle_started(&mut self, app: &AppKey, outcome: &StartOutcome, now: Now) {
        let Some(presence) = self.apps.get_mut(app) else { return };
        if presence.starting.is_none() || *outcome == StartOutcome::Started {
            return;
        }
        presence.starting = None;
        let touched = std::mem::take(&mut presence.touched);
        if presence.owner.is_none() {
            if touched && let StartOutcome::Failed(text) = outcome {
                self.lifecycle.note(app, "start", format!("it could not be started for the user: {text}"), now);
            }
            if matches!(outcome, StartOutcome::Failed(_)) && self.buses.contains(&app.bus) {
                self.stand_in.start_failed(app);
            }
            self.delivery.start_failed(app, outcome, now);
            self.transfers.start_failed(app, outcome, now);
        }
    }

    fn handle_stored(&mut self, ticket: StoreTicket, result: Result<(), StoreError>, now: Now) {
        self.note_store(result.as_ref().err());
        if result.is_ok() && self.unsaved.deadline().is_some() {
            // The disk takes something again: what it refused was said first.
            self.save_again();
        }
        match self.stores.remove(&ticket) {
            Some(Stored::Message(seq)) => {
                let was_failing = self.delivery.store_is_failing();
                self.delivery.stored(seq, result.is_ok(), now);
                if was_failing && !self.delivery.store_is_failing() {
                    // What was turned away for want of room is still at the servers.
                    for upstream in &mut self.upstreams {
                        upstream.session.restart(now);
                    }
                }
            }
            Some(Stored::Registration(id)) => self.registration_stored(id, ticket, result, now),
            Some(Stored::Deletion(id)) => self.deletion_stored(id, result.is_ok(), now),
            Some(Stored::Row(number)) => self.row_stored(number, result.is_ok(), now),
            Some(Stored::Transfer(id)) => self.transfer_saved(id, result.is_ok(), now),
            Some(Stored::State) => self.state_saved(ticket, result),
            Some(Stored::History) => self.history_loaded(ticket, result.map(|()| Vec::new()), now),
            Some(Stored::Value(index, key)) => self.value_stored(ticket, index, key, result.is_ok(), now),
            None => {}
        }
    }

    fn note_store(&mut self, error: Option<&StoreError>) {
        if self.store_trouble.as_ref() != error {
            match error {
                Some(error) => log::error!("cannot write to the state directory: {error}"),
                None => log::info!("the state directory can be written again"),
            }
            self.store_trouble = error.cloned();
        }
    }

    fn handle_outcome(&mut self, target: TargetId, outcome: &Outcome, now: Now) {
        if let Some(app) = self.lifecycle.app_of(target).cloned() {
            self.account_for(&app, outcome, now);
        }
        self.lifecycle.outcome(target, outcome, now);
        if matches!(outcome, Outcome::Frozen { .. } | Outcome::Thawed { .. }) && self.pressure.is_worth_a_look(now.boot)
        {
            self.actions.push_back(Action::ReadPressure);
        }
    }

    fn handle_target_gone(&mut self, target: TargetId, now: Now) {
        let app = self.lifecycle.app_of(target).cloned();
        self.samples.remove(&target);
        self.lifecycle.target_gone(target, now);
        self.report_target_done(target, now);
        if let Some(app) = app {
            self.account_for_end(&app, now);
            // A wake that waited for the old instance to end can go on now.
            if self.apps.get(&app).is_some_and(|presence| presence.owner.is_none()) {
                self.delivery.vanished(&app, now);
                self.transfers.moved(&app, false, now);
            }
        }
    }

    fn store(&mut self, op: StoreOp, waiting: Option<Stored>) {
        match waiting {
            Some(waiting) => {
                self.store_with(op, waiting);
            }
            None => self.actions.push_back(Action::Store(op, None)),
        }
    }

    fn store_with(&mut self, op: StoreOp, waiting: Stored) -> StoreTicket {
        let ticket = StoreTicket(self.next_store);
        self.next_store += 1;
        self.stores.insert(ticket, waiting);
        self.actions.push_back(Action::Store(op, Some(ticket)));
        ticket
    }

    fn upstream_of(&self, registration: RegistrationId) -> Option<usize> {
        let name = match self.registry.get(registration) {
            Some(registration) => &registration.upstream,
            None => &self.registry.pending(registration)?.upstream,
        };
        self.upstreams.iter().position(|upstream| upstream.settings.name == *name)
    }

    fn reply(&mut self, call: CallId, reply: Reply) {
        self.actions.push_back(Action::Reply(call, reply));
    }

    fn exit(&mut self, now: Now) {
        if !std::mem::replace(&mut self.exited, true) {
            self.close_books(now);
            (self.ending, self.answers_until) = (None, None);
            self.actions.push_back(Action::Exit);
        }
    }
}
