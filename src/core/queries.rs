//! What the daemon shows of itself (`view`).

use std::sync::Arc;

use serde::Serialize;

use super::{Core, Upstream, access, urgency};
use crate::{
    action::{ErrorKind, Reply},
    event::{CallId, Caller, Privilege, Query},
    model::{AppKey, Bus, ConnectorVersion},
    time::Now,
    view,
};

impl Core {
    pub(super) fn query(&mut self, call: CallId, caller: &Caller, query: Query, now: Now) {
        let reply = match query {
            Query::Status => json(&self.status(caller, now)),
            Query::Apps => self.for_readers(caller, |core| json(&core.app_list(caller, now))),
            Query::Log { after } => self.for_readers(caller, |core| core.recent(caller, after)),
            Query::Show(service) => self.for_app(caller, service, Privilege::Read, |core, app| core.show(app, now)),
            Query::Why(service) => self.for_app(caller, service, Privilege::Read, |core, app| core.why(app, now)),
            Query::Endpoints(service) => self.for_app(caller, service, Privilege::ManageApps, Self::endpoints),
            Query::Leases(Some(service)) => self.for_app(caller, service, Privilege::Read, |core, app| {
                json(&core.lease_list(now, |other| other == app))
            }),
            Query::Leases(None) => {
                self.for_readers(caller, |core| json(&core.lease_list(now, |app| sees(caller, app))))
            }
            Query::Report | Query::History { .. } | Query::WhatIf { .. } => {
                match (self.privileged(caller, Privilege::Read), query) {
                    (Ok(()), Query::History { hours }) => return self.begin_history(call, caller, hours, false, now),
                    (Ok(()), Query::WhatIf { hours }) => return self.begin_history(call, caller, hours, true, now),
                    (Ok(()), _) => return self.begin_report(call, caller, now),
                    (Err(reply), _) => reply,
                }
            }
            Query::Transfers(service) => self.transfers_query(caller, service, now),
        };
        self.reply(call, reply);
    }

    fn for_readers(&self, caller: &Caller, show: impl FnOnce(&Self) -> Reply) -> Reply {
        match self.privileged(caller, Privilege::Read) {
            Ok(()) => show(self),
            Err(reply) => reply,
        }
    }

    /// An app may read about itself, whoever has the privilege about any.
    pub(super) fn for_app(
        &self,
        caller: &Caller,
        service: Arc<str>,
        privilege: Privilege,
        show: impl FnOnce(&Self, &AppKey) -> Reply,
    ) -> Reply {
        let app = AppKey::new(caller.bus, service);
        if self.app_of_caller(caller).as_ref() == Some(&app) {
            return show(self, &app);
        }
        match self.controlled(caller, &app, privilege) {
            Ok(()) => show(self, &app),
            Err(reply) => reply,
        }
    }

    fn status(&self, caller: &Caller, now: Now) -> view::Status {
        let visible = |app: &&AppKey| sees(caller, app);
        let registrations = self.registry.iter().filter(|r| sees(caller, &r.app)).count();
        let all = self.registry.len() == registrations;
        let mut troubles = Vec::new();
        if let Some(path) = &self.damaged {
            troubles.push(format!("the database was damaged; it was kept as {path} and a new one was begun"));
        }
        if let Some(error) = &self.store_trouble {
            troubles.push(format!("the state directory cannot be written: {error}"));
        }
        let portal = self.surroundings.as_ref().and_then(urgency::trouble);
        troubles.extend(portal.map(str::to_owned));
        let minimum = self.minimum();
        let all_upstreams = caller.bus == Bus::System && caller.uid == 0;
        let shown = |upstream: &&Upstream| all_upstreams || upstream.owner.is_none_or(|owner| owner == caller.bus);
        let upstreams = self.upstreams.iter().filter(shown).map(|upstream| {
            let standing = upstream.session.standing();
            troubles.extend(standing.trouble.as_deref().map(str::to_owned));
            view::Upstream {
                name: upstream.settings.name.to_string(),
                kind: upstream.settings.kind.as_str().to_owned(),
                state: standing.state,
                since_secs: now.boot.since(standing.since).as_secs(),
                retry_in_secs: standing.retry_at.map(|at| at.since(now.boot).as_secs()),
                last_error: standing.last_error.as_deref().map(str::to_owned),
                registrations: match all {
                    true => standing.registrations,
                    false => self.seen_on(caller, &upstream.settings.name),
                },
                heartbeat_secs: standing.heartbeat.map(|beat| beat.interval.as_secs()),
                heartbeat_by: standing
                    .heartbeat
                    .map(|beat| if beat.by_server { "server" } else { "client" }.to_owned()),
            }
        });
        let upstreams = upstreams.collect();
        let mut messages = view::Messages::default();
        for (_, counted) in self.messages.iter().filter(|(bus, _)| access::sees(caller, **bus)) {
            messages.add(counted);
        }
        view::Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            profile: self.settings.profile,
            upstreams,
            buses: self.buses.iter().filter(|bus| access::sees(caller, **bus)).map(Bus::to_string).collect(),
            apps: self.apps.keys().filter(visible).count(),
            registrations,
            messages_waiting: if all {
                self.delivery.waiting()
            } else {
                self.apps.keys().filter(visible).map(|app| self.delivery.waiting_for(app)).sum()
            },
            messages,
            surroundings: self.surroundings_view(self.may_control(caller)),
            min_urgency: Some(minimum.urgency),
            min_urgency_reason: Some(minimum.sentence()),
            pressure: Some(self.pressure_view(now)),
            troubles,
        }
    }

    fn pressure_view(&self, now: Now) -> view::Pressure {
        let (level, since) = self.pressure.level();
        let (paged_out, ended) = self.pressure.counts();
        view::Pressure {
            level: level.as_str().to_owned(),
            since_secs: now.boot.since(since).as_secs(),
            reason: self.pressure.sentence(),
            paged_out,
            ended,
        }
    }

    fn seen_on(&self, caller: &Caller, upstream: &str) -> usize {
        self.registry.iter().filter(|r| *r.upstream == *upstream && sees(caller, &r.app)).count()
    }

    fn app_list(&self, caller: &Caller, now: Now) -> Vec<view::App> {
        self.apps.keys().filter(|app| sees(caller, app)).filter_map(|app| self.app_view(app, now)).collect()
    }

    fn app_view(&self, app: &AppKey, now: Now) -> Option<view::App> {
        let shown = self.lifecycle.show(app, now)?;
        Some(view::App {
            name: app.service.to_string(),
            bus: app.bus.to_string(),
            state: shown.state.as_str().to_owned(),
            since_secs: shown.since.as_secs(),
            pid: shown.pid,
            registrations: self.registry.of_app(app).count(),
            waiting: self.delivery.waiting_for(app),
            held: self.delivery.held_for(app),
            reason: shown.reason.as_deref().unwrap_or_default().to_owned(),
        })
    }

    fn show(&self, app: &AppKey, now: Now) -> Reply {
        let (Some(line), Some(shown)) = (self.app_view(app, now), self.lifecycle.show(app, now)) else {
            return no_such_app(app);
        };
        let registered = self.registry.of_app(app).map(|r| view::Registered {
            token: r.token.to_string(),
            description: r.description.to_string(),
            upstream: r.upstream.to_string(),
            version: match r.version {
                ConnectorVersion::V1 => 1,
                ConnectorVersion::V2 => 2,
            },
            vapid: r.vapid.is_some(),
            waiting: self.delivery.waiting_in(r.id),
        });
        let mut memory = self.ledger.row(app, shown.state.as_str());
        self.account.fill(app, &mut memory, now.boot);
        json(&view::Show {
            freezer: shown.freezer,
            protected: shown.protected.as_deref().map(str::to_owned),
            registered: registered.collect(),
            memory,
            leases: self.lease_list(now, |other| other == app),
            app: line,
        })
    }

    fn lease_list(&self, now: Now, wanted: impl Fn(&AppKey) -> bool) -> Vec<view::Lease> {
        let shown = self.leases.shown(now.boot).filter(|lease| wanted(lease.app)).map(|lease| view::Lease {
            id: lease.id.0,
            app: lease.app.service.to_string(),
            bus: lease.app.bus.to_string(),
            holder: lease.holder.0.to_string(),
            kind: lease.kind,
            counts_as: lease.counts_as,
            reason: lease.reason.to_string(),
            since_secs: lease.held.as_secs(),
            left_secs: lease.left.map(|left| left.as_secs()),
            counting: lease.counting,
        });
        let mut leases: Vec<view::Lease> = shown.collect();
        leases.sort_unstable_by_key(|lease| lease.id);
        leases
    }

    fn why(&self, app: &AppKey, now: Now) -> Reply {
        let Some(shown) = self.lifecycle.show(app, now) else { return no_such_app(app) };
        let decisions = self.lifecycle.decisions(app).map(|decision| view::Decision {
            at: decision.at.to_string(),
            verdict: decision.verdict.to_owned(),
            reason: decision.reason.to_string(),
        });
        json(&view::Why {
            name: app.service.to_string(),
            state: shown.state.as_str().to_owned(),
            decisions: decisions.collect(),
        })
    }

    fn endpoints(&self, app: &AppKey) -> Reply {
        let endpoints: Vec<view::Endpoint> = self
            .registry
            .of_app(app)
            .map(|r| view::Endpoint {
                token: r.token.to_string(),
                endpoint: r.endpoint.to_string(),
                vapid: r.vapid.is_some(),
                kind: self
                    .upstreams
                    .iter()
                    .find(|upstream| upstream.settings.name == r.upstream)
                    .map_or("", |upstream| upstream.settings.kind.as_str())
                    .to_owned(),
            })
            .collect();
        json(&endpoints)
    }
}

/// One user's apps are invisible to another.
fn sees(caller: &Caller, app: &AppKey) -> bool {
    access::sees(caller, app.bus)
}

pub(super) fn json(document: &impl Serialize) -> Reply {
    match serde_json::to_string(document) {
        Ok(text) => Reply::Json(text),
        Err(error) => Reply::Error(ErrorKind::Failed, format!("cannot write the answer as JSON: {error}")),
    }
}

pub(super) fn not_authorized() -> Reply {
    Reply::Error(ErrorKind::NotAuthorized, "only root or the user's own unconfined programs may read this".into())
}

fn no_such_app(app: &AppKey) -> Reply {
    Reply::Error(ErrorKind::NoSuchApp, format!("no app named \"{app}\" is registered"))
}
