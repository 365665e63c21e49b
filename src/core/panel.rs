//! Upstreams by hand: moving apps, and KDE's settings panel (push.md §1.8), on which a user sets up a server of one's own.
//!
//! What a user sets up serves the apps on that user's bus alone and is kept in the store, not in the configuration, which
//! belongs to the administrator.

use std::{collections::BTreeMap, sync::Arc};

use rand_chacha::rand_core::Rng;
use serde::{Deserialize, Serialize};

use super::{
    Core, Upstream, access,
    queries::not_authorized,
    surroundings::Told,
    upstream::{Beginning, LinkIds, Session},
};
use crate::{
    action::{Action, ErrorKind, PanelState, Reply, StoreOp},
    config::{Credentials, SecretSource, UpstreamKind, UpstreamSettings},
    event::{CallId, Caller, PanelRequest, Privilege},
    model::{AppKey, Bus, Registration, Secret},
    time::Now,
    view::LinkState,
};

/// Where an upstream's settings are among what it remembers.
const SETTINGS: &str = "settings";
/// What the names of such upstreams begin with; the configuration may not use it.
pub(super) const PREFIX: &str = "panel-";
/// Upstreams in all, those of the configuration included.
const UPSTREAMS: usize = 64;

impl Core {
    /// `Manager.Move`.
    pub(super) fn move_apps(&mut self, call: CallId, caller: &Caller, service: Option<Arc<str>>, upstream: &str) {
        if let Err(reply) = self.privileged(caller, Privilege::ManageApps) {
            self.reply(call, reply);
            return;
        }
        let Some(index) = self.upstream_named(upstream, caller.bus) else {
            let names: Vec<&str> = self.upstreams_for(caller.bus).map(|upstream| &*upstream.settings.name).collect();
            let text =
                format!("no upstream is called \"{}\"; there are: {}", upstream.escape_debug(), names.join(", "));
            self.reply(call, Reply::Error(ErrorKind::InvalidArgs, text));
            return;
        };
        if let Some(service) = &service
            && let Err(reply) = self.known(&AppKey::new(caller.bus, Arc::clone(service)))
        {
            self.reply(call, reply);
            return;
        }
        let Some(name) = self.upstreams.get(index).map(|upstream| Arc::clone(&upstream.settings.name)) else { return };
        let reply = if self.prefer(caller.bus, service, name) {
            Reply::Done
        } else {
            Reply::Error(ErrorKind::LimitsExceeded, "too many apps have an upstream of their own already".into())
        };
        self.reply(call, reply);
    }

    /// A request of KDE's panel.
    pub(super) fn panel(&mut self, call: CallId, caller: &Caller, request: PanelRequest, now: Now) {
        // The panel's own self test registers the panel's unique name; it is no app by that.
        let is_app = self.app_of_caller(caller).is_some_and(|app| !app.is_unique_name());
        if !access::may_control(caller, is_app) {
            self.reply(call, not_authorized());
            return;
        }
        match request {
            PanelRequest::State => {
                let state = self.panel_state(caller.bus);
                self.reply(call, state.map_or_else(no_upstream, |state| Reply::Panel(Box::new(state))));
            }
            PanelRequest::SetProvider(settings) => match self.set_provider(caller.bus, *settings, now) {
                Ok(()) => self.reply(call, Reply::Done),
                Err(text) => self.reply(call, Reply::Error(ErrorKind::Refused, text)),
            },
            PanelRequest::ForceUnregister(token) => {
                let on_bus = |r: &&Registration| r.app.bus == caller.bus;
                let found: Vec<Registration> = self.registry.with_token(&token).filter(on_bus).cloned().collect();
                for registration in found {
                    log::info!("{}: unregistered by the user", registration.app);
                    self.tell_unregistered(&registration, Arc::clone(&registration.token), now);
                    self.drop_registration(registration.id, now);
                    self.panel_changed(caller.bus);
                }
                self.reply(call, Reply::Done);
            }
        }
    }

    /// An upstream's state changed: whoever shows it is told.
    pub(super) fn panels_changed(&mut self, index: usize) {
        let buses: Vec<Bus> =
            self.buses.iter().copied().filter(|bus| self.default_upstream(*bus) == Some(index)).collect();
        for bus in buses {
            self.panel_changed(bus);
        }
    }

    /// What a panel on this bus shows has changed.
    pub(super) fn panel_changed(&mut self, bus: Bus) {
        if matches!(bus, Bus::Session(_)) && !self.actions.contains(&Action::PanelChanged(bus)) {
            self.actions.push_back(Action::PanelChanged(bus));
        }
    }

    /// Upstreams apps on the bus may use.
    pub(super) fn upstreams_for(&self, bus: Bus) -> impl Iterator<Item = &Upstream> {
        self.upstreams.iter().filter(move |upstream| upstream.owner.is_none_or(|owner| owner == bus))
    }

    fn default_upstream(&self, bus: Bus) -> Option<usize> {
        let preferred = self.routes.preference_of_bus(bus).and_then(|name| self.upstream_named(name, bus));
        preferred.or_else(|| (!self.upstreams.is_empty()).then_some(0))
    }

    fn panel_state(&self, bus: Bus) -> Option<PanelState> {
        let upstream = self.upstreams.get(self.default_upstream(bus)?)?;
        let standing = upstream.session.standing();
        let status = match standing.state {
            _ if standing.trouble.is_some() => 4,
            LinkState::Idle => 1,
            LinkState::Online => 2,
            LinkState::Connecting | LinkState::Waiting | LinkState::Off => 3,
        };
        let error = standing.trouble.or(standing.last_error.filter(|_| standing.state == LinkState::Waiting));
        let on_bus = self.registry.iter().filter(|r| r.app.bus == bus);
        Some(PanelState {
            status,
            error: error.as_deref().unwrap_or_default().to_owned(),
            upstream: upstream.settings.clone(),
            clients: on_bus
                .map(|r| (Arc::clone(&r.token), Arc::clone(&r.app.service), Arc::clone(&r.description)))
                .collect(),
        })
    }

    /// The user's own server, from the panel: all apps on the bus move there.
    fn set_provider(&mut self, bus: Bus, settings: UpstreamSettings, now: Now) -> Result<(), String> {
        let Bus::Session(uid) = bus else {
            return Err("on the system bus upstreams are set up in the configuration".into());
        };
        let same = |upstream: &Upstream| {
            upstream.owner.is_none_or(|owner| owner == bus)
                && upstream.settings.kind == settings.kind
                && upstream.settings.http_url() == settings.http_url()
        };
        // One's own comes before the administrator's.
        let own = |upstream: &Upstream| upstream.owner.is_some() && same(upstream);
        let found = self.upstreams.iter().position(own).or_else(|| self.upstreams.iter().position(same));
        let in_force = |index: usize| {
            let upstream = self.upstreams.get(index).filter(|_| self.default_upstream(bus) == Some(index));
            upstream.is_some_and(|upstream| upstream.settings.credentials == settings.credentials)
        };
        if found.is_some_and(in_force) {
            // Saved without a change; apps the user has moved elsewhere stay there.
            return Ok(());
        }
        let name = match found.and_then(|index| self.upstreams.get_mut(index).map(|upstream| (index, upstream))) {
            // The administrator's server, and nothing of one's own to log in with.
            Some((_, upstream)) if upstream.owner.is_none() && settings.credentials == Credentials::None => {
                Arc::clone(&upstream.settings.name)
            }
            // One's own server, perhaps with a new password.
            Some((_, upstream)) if upstream.owner.is_some() => {
                let name = Arc::clone(&upstream.settings.name);
                upstream.settings = UpstreamSettings { name: Arc::clone(&name), ..settings };
                let settings = upstream.settings.clone();
                self.actions.push_back(Action::Configure(Box::new(settings.clone())));
                upstream.session.handle_network(now);
                self.keep_settings(&settings);
                name
            }
            _ => {
                if self.upstreams.len() >= UPSTREAMS {
                    return Err(format!("{UPSTREAMS} upstreams are set up already"));
                }
                let name = self.free_name(uid);
                let settings = UpstreamSettings { name: Arc::clone(&name), ..settings };
                self.keep_settings(&settings);
                self.add_upstream(settings, bus, now);
                name
            }
        };
        if !self.prefer(bus, None, name) {
            return Err("too many preferences are kept already".into());
        }
        self.panel_changed(bus);
        Ok(())
    }

    fn keep_settings(&mut self, settings: &UpstreamSettings) {
        if let Some(value) = Kept::of(settings).and_then(|stored| serde_json::to_string(&stored).ok()) {
            let upstream = Arc::clone(&settings.name);
            self.store(StoreOp::PutUpstream { upstream, key: SETTINGS.into(), value: value.into() }, None);
        }
    }

    fn add_upstream(&mut self, settings: UpstreamSettings, owner: Bus, now: Now) {
        let Ok(index) = u32::try_from(self.upstreams.len()) else { return };
        self.actions.push_back(Action::Configure(Box::new(settings.clone())));
        let mut seed = [0; 32];
        self.seeds.fill_bytes(&mut seed);
        let beginning = Beginning {
            settings: &settings,
            network: &self.settings.network,
            remembered: BTreeMap::new(),
            channels: Vec::new(),
            seed,
            links: LinkIds::new(index),
        };
        let session = Session::new(beginning, now);
        self.upstreams.push(Upstream { settings, owner: Some(owner), session, told: Told::default() });
    }

    fn free_name(&self, uid: u32) -> Arc<str> {
        let taken = |name: &str| {
            self.upstreams.iter().any(|upstream| *upstream.settings.name == *name) || self.routes.leads_over(name)
        };
        let numbered = (1_u32..).map(|n| format!("{PREFIX}{uid}-{n}"));
        numbered.filter(|name| !taken(name)).map(Arc::from).next().unwrap_or_else(|| PREFIX.into())
    }
}

/// The upstreams users have set up, out of what upstreams remember; those nobody uses any more are left out.
pub(super) fn stored_upstreams(remembered: &[(Arc<str>, Arc<str>, Arc<str>)]) -> Vec<(UpstreamSettings, Bus)> {
    let settings = remembered.iter().filter(|(name, key, _)| name.starts_with(PREFIX) && &**key == SETTINGS);
    settings
        .filter_map(|(name, _, value)| {
            let uid = name.strip_prefix(PREFIX)?.split('-').next()?.parse().ok()?;
            match serde_json::from_str::<Kept>(value) {
                Ok(stored) => Some((stored.settings(Arc::clone(name)), Bus::Session(uid))),
                Err(error) => {
                    log::error!("the stored settings of \"{name}\" make no sense and are ignored: {error}");
                    None
                }
            }
        })
        .take(UPSTREAMS)
        .collect()
}

/// What a panel can set up, as stored.
#[derive(Serialize, Deserialize)]
struct Kept {
    kind: String,
    url: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    username: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    secret: Option<String>,
}

impl Kept {
    fn of(settings: &UpstreamSettings) -> Option<Self> {
        let given = |source: &SecretSource| match source {
            SecretSource::Given(secret) => Some(secret.reveal().to_owned()),
            SecretSource::File(_) | SecretSource::Credential(_) => None,
        };
        let (username, secret) = match &settings.credentials {
            Credentials::None => (None, None),
            Credentials::TokenFile(source) => (None, Some(given(source)?)),
            Credentials::Password { username, password } => (Some(username.to_string()), Some(given(password)?)),
        };
        Some(Self { kind: settings.kind.as_str().to_owned(), url: settings.url.to_string(), username, secret })
    }

    fn settings(self, name: Arc<str>) -> UpstreamSettings {
        let kinds = [
            UpstreamKind::Autopush,
            UpstreamKind::Ntfy,
            UpstreamKind::Mqtt,
            UpstreamKind::NextPush,
            UpstreamKind::Gotify,
        ];
        let kind = kinds.into_iter().find(|kind| kind.as_str() == self.kind).unwrap_or(UpstreamKind::Autopush);
        let mut settings = UpstreamSettings::new(name, kind, self.url);
        let secret = self.secret.map(|secret| SecretSource::Given(Secret::new(secret)));
        settings.credentials = match (self.username, secret) {
            (Some(username), Some(password)) => Credentials::Password { username: username.into(), password },
            (None, Some(token)) => Credentials::TokenFile(token),
            (_, None) => Credentials::None,
        };
        settings
    }
}

fn no_upstream() -> Reply {
    Reply::Error(ErrorKind::Failed, "no upstream is configured".into())
}
