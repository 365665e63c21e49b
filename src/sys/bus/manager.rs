//! The systemd manager of a bus: the user's own on a session bus, the system's on the system bus. It is asked about the
//! units of the apps that run on the bus, and to stop them.
//!
//! While an app is held still its unit must not be left waiting: SIGTERM is not heard in a frozen cgroup, so that a
//! `systemctl stop` would hang until `TimeoutStopSec=` (lifecycle.md §4.2), and a watchdog would fire. So the unit of
//! every app that runs is looked at once and its jobs and states are followed from then on, with two match rules for
//! each; what speaks against holding the app still goes to the loop as [`Incoming::Sightings`].
//!
//! Everything is said in the order the bus says it, like all else of a session: no call of ours to the manager is
//! repeated, and one that is never answered costs what is not known.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    sync::Arc,
};

use serde::Serialize;
use zbus::{DynamicType, Message, OwnedObjectPath, Variant, message::Flags};

use super::{
    unit, watch,
    wire::{Failure, Pending, Response, Wire},
};
use crate::{
    model::{AppKey, Bus, TargetId, Veto, VetoKind},
    sys::inbox::Incoming,
};

/// systemd's name on either bus.
pub(super) const SYSTEMD: &str = "org.freedesktop.systemd1";
pub(super) const PATH: &str = "/org/freedesktop/systemd1";
pub(super) const MANAGER: &str = "org.freedesktop.systemd1.Manager";
const UNIT: &str = "org.freedesktop.systemd1.Unit";
const SERVICE: &str = "org.freedesktop.systemd1.Service";
const SCOPE: &str = "org.freedesktop.systemd1.Scope";
const PROPERTIES: &str = "org.freedesktop.DBus.Properties";

/// Apps whose units are followed at most, as many as there can be targets; of more nothing is known.
const APPS: usize = 4096;
/// Jobs of one unit that are remembered; systemd has two at most.
const JOBS: usize = 8;
/// Vetoes told at most.
const VETOES: usize = 256;
/// Bytes of a reason.
const REASON: usize = 200;

/// What the loop asks of the manager.
#[derive(Debug)]
pub(super) enum UnitOrder {
    /// Stop the unit with this cgroup, whose app is the target. Ends with [`Incoming::UnitStopped`].
    Stop { app: AppKey, target: TargetId, group: String },
    /// Look where the app with this process is now: shells move apps to a unit of their own after the start.
    Look { app: AppKey, pid: u32 },
}

impl UnitOrder {
    pub(super) fn bus(&self) -> Bus {
        let (Self::Stop { app, .. } | Self::Look { app, .. }) = self;
        app.bus
    }

    /// What is to be told when there is no bus to ask.
    pub(super) fn refusal(self) -> Option<Incoming> {
        match self {
            Self::Stop { target, .. } => Some(Incoming::UnitStopped(target, Err("the bus is not there".into()))),
            Self::Look { .. } => None,
        }
    }
}

/// What a reply of the manager, or of the bus about it, is for.
#[derive(Debug)]
pub(super) enum Asked {
    /// GetNameOwner of its name.
    Owner,
    /// One step of a look at the unit, which was the one with this number.
    Look(Arc<str>, u64, Step),
    /// StopUnit.
    Stop(Arc<str>, TargetId),
    /// AddMatch for the unit.
    Rule(Arc<str>),
}

/// What is asked of a unit, one after the other: never two questions about one unit at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Path,
    Group,
    Watchdog,
    Job,
    State,
}

/// The nothing that is told of a bus that is gone.
pub(super) fn nothing(bus: Bus) -> Incoming {
    sightings(bus, Vec::new())
}

/// The units of the apps on one connection.
#[derive(Default)]
pub(super) struct Manager {
    whereabouts: Whereabouts,
    /// By name.
    units: BTreeMap<Arc<str>, Unit>,
    /// The unit of each app, by the app's name, and its process.
    apps: BTreeMap<Arc<str>, (Arc<str>, u32)>,
    subscribed: bool,
    count: u64,
    told: Vec<(u32, Veto)>,
    told_absent: bool,
}

/// Where the manager is.
#[derive(Default, PartialEq, Eq)]
enum Whereabouts {
    /// Nobody needed it yet.
    #[default]
    Unknown,
    Asked,
    Absent,
    /// It has this unique name.
    Here(Arc<str>),
}

/// One unit.
struct Unit {
    /// Its cgroup, as the kernel tells it.
    group: String,
    /// Which look this is: answers to earlier ones are not for it.
    number: u64,
    path: Option<OwnedObjectPath>,
    /// Whether the manager says that this very cgroup is the unit's.
    confirmed: bool,
    watchdog: u64,
    /// `ActiveState`.
    state: Option<String>,
    jobs: BTreeSet<u32>,
    stop: Option<Stop>,
}

/// A stop that we asked for.
struct Stop {
    target: TargetId,
    /// Its job, once the manager has said which.
    job: Option<OwnedObjectPath>,
}

impl Manager {
    /// The process of an app's instance is known.
    pub(super) fn seen(&mut self, wire: &mut Wire, service: &Arc<str>, pid: u32) {
        // A process that ended has none, and its name will be gone in a moment.
        let cgroup = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        let found = unit::of_process(&cgroup, wire.bus);
        let same = self.apps.get(service).is_some_and(|(unit, known)| {
            *known == pid
                && found.as_ref().is_some_and(|found| {
                    *found.name == **unit && self.units.get(unit).is_some_and(|u| u.group == found.group)
                })
        });
        if same {
            return;
        }
        self.drop_app(wire, service);
        if let Some(found) = found {
            self.add(wire, Arc::clone(service), pid, found);
        }
        self.tell(wire);
    }

    /// The instance with this name is gone, or nobody cares for it any more.
    pub(super) fn gone(&mut self, wire: &mut Wire, service: &str) {
        self.drop_app(wire, service);
        self.tell(wire);
    }

    /// The loop wants something.
    pub(super) fn order(&mut self, wire: &mut Wire, order: UnitOrder) {
        match order {
            UnitOrder::Look { app, pid } => self.seen(wire, &app.service, pid),
            UnitOrder::Stop { app, target, group } => {
                if let Err(reason) = self.stop(wire, &app, target, &group) {
                    wire.tell(Incoming::UnitStopped(target, Err(reason)));
                }
            }
        }
    }

    /// The bus or the manager answered.
    pub(super) fn answered(&mut self, wire: &mut Wire, asked: Asked, response: Response) {
        match asked {
            // No manager is no error, and whether it comes is heard.
            Asked::Owner => {
                let owner = response.ok().and_then(|message| message.body().deserialize::<&str>().ok().map(Arc::from));
                self.is_at(wire, owner);
            }
            Asked::Rule(unit) => {
                if let Err(failure) = response {
                    log::warn!("{}: the bus does not tell of the jobs of {unit}: {failure}", wire.bus);
                }
            }
            Asked::Look(unit, number, step) => {
                self.looked(wire, &unit, number, step, response);
                self.tell(wire);
            }
            Asked::Stop(unit, target) => {
                let stop = self.units.get_mut(&unit).map(|unit| &mut unit.stop);
                // Else it was told already how that ended, or the app has.
                let Some(stop) = stop.filter(|stop| stop.as_ref().is_some_and(|stop| stop.target == target)) else {
                    return;
                };
                let accepted = response.and_then(|message| {
                    message.body().deserialize::<OwnedObjectPath>().map_err(|_| Failure {
                        name: "an answer in a form we do not know".into(),
                        text: String::new(),
                        by_bus: false,
                    })
                });
                let answer = match accepted {
                    Ok(job) => {
                        *stop = Some(Stop { target, job: Some(job) });
                        Ok(())
                    }
                    Err(failure) => {
                        *stop = None;
                        Err(format!("systemd does not stop {unit}: {failure}").into())
                    }
                };
                wire.tell(Incoming::UnitStopped(target, answer));
                self.tell(wire);
            }
        }
    }

    /// Whether this is the manager's unique name.
    pub(super) fn is(&self, sender: &str) -> bool {
        matches!(&self.whereabouts, Whereabouts::Here(owner) if **owner == *sender)
    }

    /// A bus name has a new owner.
    pub(super) fn changed(&mut self, wire: &mut Wire, name: &str, new: &str) {
        if name != SYSTEMD {
            return self.gone(wire, name);
        }
        // Before the answer to GetNameOwner: that one will be newer.
        if !matches!(self.whereabouts, Whereabouts::Unknown | Whereabouts::Asked) {
            self.is_at(wire, (!new.is_empty()).then(|| new.into()));
        }
    }

    /// The manager signalled.
    pub(super) fn signal(&mut self, wire: &mut Wire, message: &Message) {
        let header = message.header();
        let (interface, member) = (header.interface(), header.member());
        let body = message.body();
        match (interface.map(|name| name.as_str()), member.map(|name| name.as_str())) {
            (Some(MANAGER), Some("JobNew")) => {
                let Ok((job, _, unit)) = body.deserialize::<(u32, OwnedObjectPath, &str)>() else { return };
                if let Some(unit) = self.units.get_mut(unit)
                    && unit.jobs.len() < JOBS
                {
                    unit.jobs.insert(job);
                }
            }
            (Some(MANAGER), Some("JobRemoved")) => {
                let Ok((job, path, unit, result)) = body.deserialize::<(u32, OwnedObjectPath, &str, &str)>() else {
                    return;
                };
                let Some((name, unit)) = self
                    .units
                    .get_key_value(unit)
                    .map(|(name, _)| Arc::clone(name))
                    .and_then(|name| self.units.get_mut(&name).map(|unit| (name, unit)))
                else {
                    return;
                };
                unit.jobs.remove(&job);
                if let Some(stop) = unit.stop.take_if(|stop| stop.job.as_ref() == Some(&path))
                    && result != "done"
                {
                    let reason = format!("systemd did not stop {name}: {result}").into();
                    wire.tell(Incoming::UnitStopped(stop.target, Err(reason)));
                }
            }
            (Some(PROPERTIES), Some("PropertiesChanged")) => {
                let Ok((about, changed, _)) = body.deserialize::<(&str, HashMap<&str, Variant<'_>>, Vec<&str>)>()
                else {
                    return;
                };
                let path = header.path().map(|path| path.as_str());
                let unit = self.units.values_mut().find(|unit| unit.path.as_ref().map(|path| path.as_str()) == path);
                if let (UNIT, Some(unit), Some(Variant::Str(state))) = (about, unit, changed.get("ActiveState")) {
                    unit.state = Some(state.as_str().to_owned());
                }
            }
            _ => return,
        }
        self.tell(wire);
    }

    /// The connection ends.
    pub(super) fn end(&mut self, wire: &Wire) {
        for stop in self.units.values_mut().filter_map(|unit| unit.stop.take()) {
            // Whether it was heard is not known; SIGTERM twice does no harm.
            wire.tell(Incoming::UnitStopped(stop.target, Err("the bus went away".into())));
        }
        if !self.told.is_empty() {
            wire.tell(nothing(wire.bus));
        }
    }

    fn add(&mut self, wire: &mut Wire, service: Arc<str>, pid: u32, found: unit::Unit) {
        if self.apps.len() >= APPS {
            return log::warn!("{}: {APPS} apps are followed already; of {service}'s unit nothing is known", wire.bus);
        }
        let name: Arc<str> = found.name.into();
        self.apps.insert(service, (Arc::clone(&name), pid));
        match self.units.get_mut(&name) {
            Some(unit) if unit.group == found.group => return,
            Some(unit) => {
                // Made anew under the same name, elsewhere.
                unit.group = found.group;
                unit.confirmed = false;
            }
            None => {
                let unit = Unit {
                    group: found.group,
                    number: 0,
                    path: None,
                    confirmed: false,
                    watchdog: 0,
                    state: None,
                    jobs: BTreeSet::new(),
                    stop: None,
                };
                self.units.insert(Arc::clone(&name), unit);
                if matches!(self.whereabouts, Whereabouts::Here(_)) {
                    self.follow(wire, &name);
                }
            }
        }
        match self.whereabouts {
            Whereabouts::Unknown => {
                // The watch first: then it cannot come or go between the answer and it.
                wire.tell_bus("AddMatch", &watch::rule(SYSTEMD).as_str());
                wire.ask_bus("GetNameOwner", &SYSTEMD, Pending::Manager(Asked::Owner));
                self.whereabouts = Whereabouts::Asked;
            }
            Whereabouts::Here(_) => self.look(wire, &name),
            Whereabouts::Asked | Whereabouts::Absent => {}
        }
    }

    fn drop_app(&mut self, wire: &mut Wire, service: &str) {
        let Some((name, _)) = self.apps.remove(service) else { return };
        if self.apps.values().any(|(other, _)| *other == name) {
            return;
        }
        let Some(unit) = self.units.remove(&name) else { return };
        if !matches!(self.whereabouts, Whereabouts::Here(_)) {
            return;
        }
        wire.tell_bus("RemoveMatch", &job_rule(&name).as_str());
        if let Some(path) = &unit.path {
            wire.tell_bus("RemoveMatch", &state_rule(path).as_str());
        }
        if self.units.is_empty() && std::mem::take(&mut self.subscribed) {
            self.say(wire, "Unsubscribe");
        }
    }

    /// The manager is there, or nowhere.
    fn is_at(&mut self, wire: &mut Wire, owner: Option<Arc<str>>) {
        let names: Vec<Arc<str>> = self.units.keys().cloned().collect();
        if matches!(self.whereabouts, Whereabouts::Here(_)) {
            for (name, unit) in &self.units {
                wire.tell_bus("RemoveMatch", &job_rule(name).as_str());
                if let Some(path) = &unit.path {
                    wire.tell_bus("RemoveMatch", &state_rule(path).as_str());
                }
            }
        }
        for unit in self.units.values_mut() {
            unit.forget();
            if let Some(stop) = unit.stop.take() {
                let reason = "systemd went away".into();
                wire.tell(Incoming::UnitStopped(stop.target, Err(reason)));
            }
        }
        self.subscribed = false;
        match owner {
            Some(owner) => {
                self.whereabouts = Whereabouts::Here(owner);
                for name in names {
                    self.follow(wire, &name);
                    self.look(wire, &name);
                }
            }
            None => {
                self.whereabouts = Whereabouts::Absent;
                if !std::mem::replace(&mut self.told_absent, true) {
                    log::info!(
                        "{} bus: no systemd manager is on it; apps are ended by signals, and jobs and watchdogs of their \
                         units are not known",
                        wire.bus
                    );
                }
            }
        }
        self.tell(wire);
    }

    /// Has the unit's jobs told from now on.
    fn follow(&mut self, wire: &mut Wire, name: &Arc<str>) {
        if !std::mem::replace(&mut self.subscribed, true) {
            // Without a subscriber it signals nothing at all.
            self.say(wire, "Subscribe");
        }
        wire.ask_bus("AddMatch", &job_rule(name).as_str(), Pending::Manager(Asked::Rule(Arc::clone(name))));
    }

    fn look(&mut self, wire: &mut Wire, name: &Arc<str>) {
        self.count += 1;
        let number = self.count;
        let Some(unit) = self.units.get_mut(name) else { return };
        unit.number = number;
        self.call(wire, PATH, MANAGER, "GetUnit", &&**name, Asked::Look(Arc::clone(name), number, Step::Path));
    }

    /// One answer about a unit; asks for the next.
    fn looked(&mut self, wire: &mut Wire, name: &Arc<str>, number: u64, step: Step, response: Response) {
        let Some(unit) = self.units.get_mut(name).filter(|unit| unit.number == number) else { return };
        let message = match response {
            Ok(message) => message,
            Err(failure) => return log::debug!("{}: systemd does not tell of {name}: {failure}", wire.bus),
        };
        let body = message.body();
        let kind = if name.ends_with(".scope") { SCOPE } else { SERVICE };
        let next = match step {
            Step::Path => {
                let Ok(path) = body.deserialize::<OwnedObjectPath>() else { return };
                let old = unit.path.replace(path.clone());
                if old.as_ref() != Some(&path) {
                    old.into_iter().for_each(|old| wire.tell_bus("RemoveMatch", &state_rule(&old).as_str()));
                    let pending = Pending::Manager(Asked::Rule(Arc::clone(name)));
                    wire.ask_bus("AddMatch", &state_rule(&path).as_str(), pending);
                }
                Some((kind, "ControlGroup", Step::Group))
            }
            Step::Group => {
                let group = body.deserialize::<Variant<'_>>();
                unit.confirmed = matches!(&group, Ok(Variant::Str(group)) if group.as_str() == unit.group);
                match (unit.confirmed, kind) {
                    (false, _) => {
                        log::debug!("{}: {name} has another cgroup than {}: {group:?}", wire.bus, unit.group);
                        None
                    }
                    (true, SCOPE) => Some((UNIT, "Job", Step::Job)),
                    (true, _) => Some((SERVICE, "WatchdogUSec", Step::Watchdog)),
                }
            }
            Step::Watchdog => {
                unit.watchdog = match body.deserialize::<Variant<'_>>() {
                    // Infinity: there is none.
                    Ok(Variant::U64(micros)) if micros != u64::MAX => micros,
                    _ => 0,
                };
                Some((UNIT, "Job", Step::Job))
            }
            Step::Job => {
                if let Ok(Variant::Structure(job)) = body.deserialize::<Variant<'_>>()
                    && let Some(Variant::U32(job)) = job.fields().first()
                    && *job != 0
                {
                    unit.jobs.insert(*job);
                }
                Some((UNIT, "ActiveState", Step::State))
            }
            Step::State => {
                if let Ok(Variant::Str(state)) = body.deserialize::<Variant<'_>>() {
                    unit.state = Some(state.as_str().to_owned());
                }
                None
            }
        };
        if let (Some((interface, property, step)), Some(path)) = (next, unit.path.clone()) {
            let asked = Asked::Look(Arc::clone(name), number, step);
            self.call(wire, path.as_str(), PROPERTIES, "Get", &(interface, property), asked);
        }
    }

    /// `Err` when the manager has nothing to do with this cgroup.
    fn stop(&mut self, wire: &mut Wire, app: &AppKey, target: TargetId, group: &str) -> Result<(), Arc<str>> {
        let (name, _) = self.apps.get(&app.service).ok_or("it is in no unit of this bus's systemd")?.clone();
        let unit = self.units.get_mut(&name).filter(|unit| unit.confirmed && unit.group == group);
        let unit = unit.ok_or_else(|| format!("its cgroup is not known to be that of {name}"))?;
        if let Some(other) = unit.stop.as_ref().filter(|stop| stop.target != target) {
            return Err(format!("{name} is being stopped for another instance already ({:?})", other.target).into());
        }
        unit.stop = Some(Stop { target, job: None });
        self.call(wire, PATH, MANAGER, "StopUnit", &(&*name, "replace"), Asked::Stop(Arc::clone(&name), target));
        Ok(())
    }

    /// Tells what speaks against holding apps still, if that has changed.
    fn tell(&mut self, wire: &Wire) {
        let vetoes = self.apps.values().filter_map(|(name, pid)| Some((name, pid, self.units.get(name)?)));
        let vetoes = vetoes.flat_map(|(name, pid, unit)| unit.vetoes(name).into_iter().map(|veto| (*pid, veto)));
        let vetoes: Vec<(u32, Veto)> = vetoes.take(VETOES).collect();
        if vetoes != self.told {
            self.told.clone_from(&vetoes);
            wire.tell(sightings(wire.bus, vetoes));
        }
    }

    fn say(&self, wire: &mut Wire, member: &'static str) {
        let Whereabouts::Here(manager) = &self.whereabouts else { return };
        if let Some(message) = call(manager, PATH, MANAGER, member, &(), Flags::NO_REPLY_EXPECTED) {
            wire.send(message);
        }
    }

    fn call<B: Serialize + DynamicType>(
        &self,
        wire: &mut Wire,
        path: &str,
        interface: &'static str,
        member: &'static str,
        body: &B,
        asked: Asked,
    ) {
        let Whereabouts::Here(manager) = &self.whereabouts else { return };
        if let Some(message) = call(manager, path, interface, member, body, Flags::NO_AUTO_START) {
            wire.call(Arc::clone(manager), message, Pending::Manager(asked));
        }
    }
}

impl Unit {
    /// Nothing that a manager has said holds any more.
    fn forget(&mut self) {
        // Answers to what was asked before are not for it.
        self.number = 0;
        self.path = None;
        self.confirmed = false;
        self.watchdog = 0;
        self.state = None;
        self.jobs.clear();
    }

    fn vetoes(&self, name: &str) -> Vec<Veto> {
        let mut vetoes = Vec::new();
        if !self.confirmed {
            return vetoes;
        }
        if self.watchdog > 0 {
            // As systemd writes it: what is below a second is not zero.
            let seconds = self.watchdog.div_ceil(1_000_000);
            let reason = format!("it has a watchdog of {seconds} s, which would end it (unit {name})");
            vetoes.push(veto(VetoKind::Watchdog, reason));
        }
        // Our own stop is no reason not to stop it.
        if self.stop.is_some() {
            return vetoes;
        }
        if !self.jobs.is_empty() {
            let reason = format!("it has a pending systemd job, a stop or restart perhaps (unit {name})");
            vetoes.push(veto(VetoKind::UnitJob, reason));
        } else if let Some(state) = self.state.as_ref().filter(|state| *state != "active") {
            // Also a stop that is nobody's job: RuntimeMaxSec= is over, or the unit's main process has ended.
            vetoes.push(veto(VetoKind::UnitJob, format!("it is {state} to systemd, not active (unit {name})")));
        }
        vetoes
    }
}

fn veto(kind: VetoKind, mut reason: String) -> Veto {
    reason.truncate((0..=REASON).rev().find(|at| reason.is_char_boundary(*at)).unwrap_or(0));
    Veto { kind, reason: reason.into() }
}

fn sightings(bus: Bus, vetoes: Vec<(u32, Veto)>) -> Incoming {
    let (source, uid) = match bus {
        Bus::Session(uid) => ("systemd", uid),
        // root may have a session as well.
        Bus::System => ("systemd-system", 0),
    };
    Incoming::Sightings { source, uid, vetoes }
}

/// Jobs of the unit. Names of units have neither quotes nor commas (`unit::of_group`).
fn job_rule(unit: &str) -> String {
    format!("type='signal',sender='{SYSTEMD}',path='{PATH}',interface='{MANAGER}',arg2='{unit}'")
}

/// States of the unit.
fn state_rule(path: &OwnedObjectPath) -> String {
    let path = path.as_str();
    format!(
        "type='signal',sender='{SYSTEMD}',path='{path}',interface='{PROPERTIES}',member='PropertiesChanged',arg0='{UNIT}'"
    )
}

fn call<B: Serialize + DynamicType>(
    to: &str,
    path: &str,
    interface: &'static str,
    member: &'static str,
    body: &B,
    flags: Flags,
) -> Option<Message> {
    let message = Message::method_call(path, member).destination(to).interface(interface).with_flags(flags).build(body);
    message.inspect_err(|error| log::error!("cannot make a call of {member}: {error}")).ok()
}
