//! A session bus: players that play (MPRIS), tray items, names that stand for a role, and what GNOME's session manager is
//! told to hold off.
//!
//! Nothing here waits for an answer: a player that is held still gives its one when it runs again.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    num::NonZeroU32,
    sync::Arc,
    task::{Context, Poll},
};

use zbus::{ObjectPath, Variant};

use super::{
    line::Listener,
    roles::{self, ROLES},
    teller::{Teller, clean, sentence},
    watch::{Signal, Watch, covers, owner_rule},
};
use crate::{
    model::{Veto, VetoKind},
    sys::asking::{BUS_NAME, Calls, PROPERTIES, Response},
    time::Instant,
};

/// Players, tray items, names with a role, and inhibitors looked at, of each; what comes beyond is not seen.
const MOST: usize = 64;
/// Longest name the bus lets anybody have (D-Bus specification, "Valid Names").
const LONGEST_NAME: usize = 255;

const PLAYERS: &str = "org.mpris.MediaPlayer2.*";
const PLAYER_PREFIX: &str = "org.mpris.MediaPlayer2.";
const PLAYER_PATH: &str = "/org/mpris/MediaPlayer2";
const PLAYER: &str = "org.mpris.MediaPlayer2.Player";
const STATUS: &str = "PlaybackStatus";

const TRAY: &str = "org.kde.StatusNotifierWatcher";
const TRAY_PATH: &str = "/StatusNotifierWatcher";
const TRAY_ITEMS: &str = "RegisteredStatusNotifierItems";

const GNOME: &str = "org.gnome.SessionManager";
const GNOME_PATH: &str = "/org/gnome/SessionManager";
const GNOME_INHIBITOR: &str = "org.gnome.SessionManager.Inhibitor";
/// gsm-inhibitor-flag.h
const GNOME_SUSPEND: u32 = 4;
const GNOME_IDLE: u32 = 8;

/// What is seen on one session bus.
pub(super) struct SessionBus {
    uid: u32,
    line: Listener,
    /// The processes of bus names in use below; `None` while it is not known.
    pids: BTreeMap<Arc<str>, Option<u32>>,
    /// Names with a role, and their owners.
    roles: BTreeMap<String, Arc<str>>,
    players: BTreeMap<String, Player>,
    tray: Tray,
    gnome: Gnome,
}

struct Player {
    owner: Arc<str>,
    playing: bool,
    asked: Option<NonZeroU32>,
}

#[derive(Default)]
struct Tray {
    watcher: Option<Arc<str>>,
    asked: Option<NonZeroU32>,
    /// Whether they have changed since they were asked for.
    again: bool,
    items: BTreeSet<Arc<str>>,
}

#[derive(Default)]
struct Gnome {
    manager: Option<Arc<str>>,
    inhibitors: BTreeMap<String, Inhibitor>,
}

#[derive(Default)]
struct Inhibitor {
    app: Option<Arc<str>>,
    flags: u32,
}

/// What a reply is for.
pub(super) enum Asked {
    Match,
    Names,
    Owner(String),
    Pid(Arc<str>),
    Status(String),
    TrayItems,
    Inhibitors,
    InhibitorApp(String),
    InhibitorFlags(String),
}

impl SessionBus {
    pub(super) fn new(uid: u32, line: Listener) -> Self {
        Self {
            uid,
            line,
            pids: BTreeMap::new(),
            roles: BTreeMap::new(),
            players: BTreeMap::new(),
            tray: Tray::default(),
            gnome: Gnome::default(),
        }
    }

    /// A name of interest has this owner now.
    fn owner(&mut self, calls: &mut Calls<Asked>, name: &str, owner: Option<Arc<str>>) {
        if roles::of(name).is_some() {
            match &owner {
                Some(owner) if self.roles.len() < MOST || self.roles.contains_key(name) => {
                    self.roles.insert(name.to_owned(), Arc::clone(owner));
                    self.want_pid(calls, owner);
                }
                _ => {
                    self.roles.remove(name);
                }
            }
        }
        match name {
            TRAY => {
                self.tray = Tray { watcher: owner, ..Tray::default() };
                self.ask_tray(calls);
            }
            GNOME => {
                self.gnome = Gnome { manager: owner, ..Gnome::default() };
                if let Some(manager) = &self.gnome.manager {
                    calls.call(manager, GNOME_PATH, GNOME, "GetInhibitors", &(), Asked::Inhibitors);
                }
            }
            _ if covers(PLAYERS, name) => self.player(calls, name, owner),
            _ => {}
        }
    }

    fn player(&mut self, calls: &mut Calls<Asked>, name: &str, owner: Option<Arc<str>>) {
        if let Some(earlier) = self.players.remove(name)
            && let Some(serial) = earlier.asked
        {
            calls.forget(serial);
        }
        if let Some(owner) = owner
            && self.players.len() < MOST
        {
            self.want_pid(calls, &owner);
            let asked = ask_status(calls, name, &owner);
            self.players.insert(name.to_owned(), Player { owner, playing: false, asked });
        }
    }

    fn want_pid(&mut self, calls: &mut Calls<Asked>, name: &Arc<str>) {
        if !self.pids.contains_key(name) {
            self.pids.insert(Arc::clone(name), None);
            calls.ask_bus("GetConnectionUnixProcessID", name, Asked::Pid(Arc::clone(name)));
        }
    }

    fn ask_tray(&mut self, calls: &mut Calls<Asked>) {
        let Some(watcher) = &self.tray.watcher else { return };
        // No faster than it answers.
        if self.tray.asked.is_some() {
            self.tray.again = true;
            return;
        }
        self.tray.again = false;
        self.tray.asked = calls.call(watcher, TRAY_PATH, PROPERTIES, "Get", &(TRAY, TRAY_ITEMS), Asked::TrayItems);
    }

    fn tray_answered(&mut self, calls: &mut Calls<Asked>, serial: NonZeroU32, response: Response) {
        if self.tray.asked != Some(serial) {
            return;
        }
        self.tray.asked = None;
        match response {
            Ok(message) => {
                let body = message.body();
                if let Ok(Variant::Array(items)) = body.deserialize::<Variant<'_>>() {
                    let items = items.iter().filter_map(|item| match item {
                        Variant::Str(item) => Some(item.as_str()),
                        _ => None,
                    });
                    self.tray_items(calls, items.collect());
                }
            }
            Err(text) => log::debug!("bus of user {}: {text}", self.uid),
        }
        if self.tray.again {
            self.ask_tray(calls);
        }
    }

    fn tray_items(&mut self, calls: &mut Calls<Asked>, items: Vec<&str>) {
        // ":1.7/StatusNotifierItem", ":1.7", or a name.
        let names = items.into_iter().filter_map(|item| item.split('/').next());
        let names = names.filter(|name| !name.is_empty() && name.len() <= LONGEST_NAME).take(MOST);
        self.tray.items = names.map(Arc::from).collect();
        for name in self.tray.items.clone() {
            self.want_pid(calls, &name);
        }
    }

    fn inhibitor(&mut self, calls: &mut Calls<Asked>, path: &str) {
        let Some(manager) = &self.gnome.manager else { return };
        if self.gnome.inhibitors.len() >= MOST || self.gnome.inhibitors.contains_key(path) {
            return;
        }
        self.gnome.inhibitors.insert(path.to_owned(), Inhibitor::default());
        calls.call(manager, path, GNOME_INHIBITOR, "GetAppId", &(), Asked::InhibitorApp(path.to_owned()));
        calls.call(manager, path, GNOME_INHIBITOR, "GetFlags", &(), Asked::InhibitorFlags(path.to_owned()));
    }

    /// Who inhibits says a name of its own choice. An app's id is its bus name as well, mostly; what is none is not seen.
    fn inhibitor_app(&mut self, calls: &mut Calls<Asked>, path: &str, app: &str) {
        let app = app.strip_suffix(".desktop").unwrap_or(app);
        let name = zbus::names::WellKnownName::try_from(app).ok().map(|name| Arc::<str>::from(name.as_str()));
        if let Some(inhibitor) = self.gnome.inhibitors.get_mut(path)
            && let Some(name) = name
        {
            inhibitor.app = Some(Arc::clone(&name));
            self.want_pid(calls, &name);
        }
    }

    fn vetoes(&self) -> Vec<(Arc<str>, Veto)> {
        let mut vetoes = Vec::new();
        let mut veto = |owner: &Arc<str>, kind, reason: String| {
            vetoes.push((Arc::clone(owner), Veto { kind, reason: sentence(reason) }));
        };
        let busy = self.line.is_busy();
        for (name, owner) in &self.roles {
            let Some(role) = roles::of(name) else { continue };
            veto(owner, role.kind, format!("it {} ({})", role.is, clean(name)));
            if role.calls && busy {
                veto(owner, VetoKind::Call, "it answers the phone, and a call is ringing or under way".into());
            }
        }
        for (name, player) in self.players.iter().filter(|(_, player)| player.playing) {
            let short = name.strip_prefix(PLAYER_PREFIX).unwrap_or(name);
            veto(&player.owner, VetoKind::MediaPlayer, format!("it says that it plays (MPRIS \"{}\")", clean(short)));
        }
        for item in &self.tray.items {
            veto(item, VetoKind::Tray, "it has an icon in the tray, which the shell calls".into());
        }
        for inhibitor in self.gnome.inhibitors.values() {
            let Some(app) = &inhibitor.app else { continue };
            if inhibitor.flags & GNOME_SUSPEND != 0 {
                veto(app, VetoKind::SleepInhibitor, "it holds off sleep (GNOME's session manager)".into());
            }
            if inhibitor.flags & GNOME_IDLE != 0 {
                veto(app, VetoKind::IdleInhibitor, "it keeps the screen lit (GNOME's session manager)".into());
            }
        }
        vetoes
    }
}

impl Watch for SessionBus {
    type Asked = Asked;

    fn begin(&mut self, calls: &mut Calls<Asked>) {
        for name in ROLES.iter().map(|role| role.name).chain([PLAYERS]) {
            calls.ask_bus("AddMatch", &owner_rule(name), Asked::Match);
        }
        let rules = [
            format!(
                "type='signal',path='{PLAYER_PATH}',interface='{PROPERTIES}',member='PropertiesChanged',arg0='{PLAYER}'"
            ),
            format!("type='signal',sender='{TRAY}',path='{TRAY_PATH}',interface='{TRAY}'"),
            format!("type='signal',sender='{GNOME}',path='{GNOME_PATH}',interface='{GNOME}',member='InhibitorAdded'"),
            format!("type='signal',sender='{GNOME}',path='{GNOME_PATH}',interface='{GNOME}',member='InhibitorRemoved'"),
        ];
        for rule in rules {
            calls.ask_bus("AddMatch", &rule, Asked::Match);
        }
        // After the rules: what changes from its answer on is told.
        let _ = calls.call(&BUS_NAME.into(), "/org/freedesktop/DBus", BUS_NAME, "ListNames", &(), Asked::Names);
    }

    fn reply(&mut self, calls: &mut Calls<Asked>, serial: NonZeroU32, asked: Asked, response: Response) {
        if let Asked::TrayItems = asked {
            return self.tray_answered(calls, serial, response);
        }
        let message = match response {
            Ok(message) => message,
            Err(text) => {
                match asked {
                    Asked::Match | Asked::Names => log::info!("bus of user {}: {text}", self.uid),
                    Asked::Pid(name) => drop(self.pids.remove(&name)),
                    Asked::Owner(name) => self.owner(calls, &name, None),
                    // A player that ended, a watcher without items.
                    _ => log::debug!("bus of user {}: {text}", self.uid),
                }
                return;
            }
        };
        let body = message.body();
        match asked {
            Asked::Match => {}
            Asked::Names => {
                let names: Vec<&str> = body.deserialize().unwrap_or_default();
                let wanted = names.into_iter().filter(|name| roles::of(name).is_some() || covers(PLAYERS, name));
                for name in wanted.take(4 * MOST) {
                    calls.ask_bus("GetNameOwner", name, Asked::Owner(name.to_owned()));
                }
            }
            Asked::Owner(name) => {
                if let Ok(owner) = body.deserialize::<&str>() {
                    self.owner(calls, &name, Some(owner.into()));
                }
            }
            Asked::Pid(name) => {
                if let (Some(pid), Ok(answer)) = (self.pids.get_mut(&name), body.deserialize::<u32>()) {
                    *pid = Some(answer);
                }
            }
            Asked::Status(name) => {
                if let Some(player) = self.players.get_mut(&name).filter(|player| player.asked == Some(serial)) {
                    player.asked = None;
                    player.playing = body.deserialize::<Variant<'_>>().is_ok_and(|status| is_playing(&status));
                }
            }
            Asked::TrayItems => {}
            Asked::Inhibitors => {
                for path in body.deserialize::<Vec<ObjectPath<'_>>>().unwrap_or_default() {
                    self.inhibitor(calls, path.as_str());
                }
            }
            Asked::InhibitorApp(path) => {
                if let Ok(app) = body.deserialize::<&str>() {
                    self.inhibitor_app(calls, &path, app);
                }
            }
            Asked::InhibitorFlags(path) => {
                if let (Some(inhibitor), Ok(flags)) = (self.gnome.inhibitors.get_mut(&path), body.deserialize::<u32>())
                {
                    inhibitor.flags = flags;
                }
            }
        }
    }

    fn signal(&mut self, calls: &mut Calls<Asked>, signal: &Signal<'_>) {
        if let Some((name, owner)) = signal.owner_changed() {
            return self.owner(calls, &name, owner.map(Arc::from));
        }
        let from = |owner: &Option<Arc<str>>| owner.as_deref() == Some(signal.sender);
        let body = signal.message.body();
        match (signal.interface, signal.member) {
            (PROPERTIES, "PropertiesChanged") if signal.path == PLAYER_PATH => {
                let Ok((PLAYER, changed, gone)) = body.deserialize::<(&str, HashMap<&str, Variant<'_>>, Vec<&str>)>()
                else {
                    return;
                };
                for (name, player) in self.players.iter_mut().filter(|(_, player)| *player.owner == *signal.sender) {
                    let status = changed.get(STATUS);
                    if status.is_some() || gone.contains(&STATUS) {
                        // What was asked before is older than this.
                        if let Some(earlier) = player.asked.take() {
                            calls.forget(earlier);
                        }
                    }
                    if let Some(status) = status {
                        player.playing = is_playing(status);
                    } else if gone.contains(&STATUS) {
                        player.asked = ask_status(calls, name, &player.owner);
                    }
                }
            }
            (TRAY, "StatusNotifierItemRegistered" | "StatusNotifierItemUnregistered") if from(&self.tray.watcher) => {
                self.ask_tray(calls);
            }
            (GNOME, "InhibitorAdded") if from(&self.gnome.manager) => {
                if let Ok(path) = body.deserialize::<ObjectPath<'_>>() {
                    self.inhibitor(calls, path.as_str());
                }
            }
            (GNOME, "InhibitorRemoved") if from(&self.gnome.manager) => {
                if let Ok(path) = body.deserialize::<ObjectPath<'_>>() {
                    self.gnome.inhibitors.remove(path.as_str());
                }
            }
            _ => {}
        }
    }

    fn look(&mut self, teller: &mut Teller, now: Instant) {
        let used: BTreeSet<&Arc<str>> = self
            .roles
            .values()
            .chain(self.players.values().map(|player| &player.owner))
            .chain(&self.tray.items)
            .chain(self.gnome.inhibitors.values().filter_map(|inhibitor| inhibitor.app.as_ref()))
            .collect();
        self.pids.retain(|name, _| used.contains(name));
        let seen = self.vetoes().into_iter();
        let seen = seen.filter_map(|(owner, veto)| Some(((*self.pids.get(&owner)?)?, veto)));
        teller.see(self.uid, seen.collect(), now);
    }

    fn poll_elsewhere(&mut self, context: &mut Context<'_>) -> Poll<()> {
        self.line.poll_changed(context)
    }
}

fn ask_status(calls: &mut Calls<Asked>, name: &str, owner: &Arc<str>) -> Option<NonZeroU32> {
    calls.call(owner, PLAYER_PATH, PROPERTIES, "Get", &(PLAYER, STATUS), Asked::Status(name.to_owned()))
}

fn is_playing(status: &Variant<'_>) -> bool {
    match status {
        Variant::Str(status) => status.as_str() == "Playing",
        Variant::Variant(inner) => is_playing(inner),
        _ => false,
    }
}
