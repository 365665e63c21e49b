//! Leases as apps ask for them, and what is to be seen of the apps that hold some (`leases`).

use std::sync::Arc;

use super::{
    Core, access,
    leases::{Facts, Output, Wish},
    lifecycle::State,
};
use crate::{
    action::{Action, ErrorKind, Reply},
    event::{CallId, Caller, Privilege},
    model::{AppKey, LeaseId, VetoKind},
    time::Now,
};

impl Core {
    /// A lease for the caller itself, or from who may act on apps for one of them.
    pub(super) fn lease(&mut self, call: CallId, caller: &Caller, service: Option<Arc<str>>, wish: Wish, now: Now) {
        let app = match self.leasable(caller, service) {
            Ok(app) => app,
            Err(reply) => return self.reply(call, reply),
        };
        match self.leases.take(&app, wish, now.boot) {
            Ok(lease) => self.reply(call, Reply::Lease(lease)),
            Err(refusal) => self.reply(call, Reply::Error(ErrorKind::LimitsExceeded, refusal.to_string())),
        }
    }

    fn leasable(&self, caller: &Caller, service: Option<Arc<str>>) -> Result<AppKey, Reply> {
        let own = self.app_of_caller(caller);
        let app = match (service, own) {
            (None, None) => {
                let text = "only an app that is registered for push can hold a lease for itself; register first";
                return Err(Reply::Error(ErrorKind::NoSuchApp, text.into()));
            }
            (None, Some(own)) => own,
            (Some(service), Some(own)) if own.service == service => own,
            (Some(service), _) => {
                if !self.may_control(caller) {
                    let text = "an app holds leases for itself alone; for others only root or the user's own unconfined \
                                programs may";
                    return Err(Reply::Error(ErrorKind::NotAuthorized, text.into()));
                }
                let app = AppKey::new(caller.bus, service);
                self.known(&app)?;
                app
            }
        };
        if !self.lifecycle.rules_of(&app.service).background {
            let text = format!(
                "{app} may not be kept awake: background = false holds for it in nightporter.toml (in its [[app]], or in \
                 the [role] it has there)"
            );
            return Err(Reply::Error(ErrorKind::Refused, text));
        }
        if self.apps.get(&app).is_none_or(|presence| presence.owner.is_none()) {
            return Err(Reply::Error(ErrorKind::NotRunning, format!("{app} is not running")));
        }
        Ok(app)
    }

    /// The user takes a lease away, or the app gives it back by number.
    pub(super) fn end_lease(&mut self, call: CallId, caller: &Caller, lease: LeaseId, now: Now) {
        let app = self.leases.app_of(lease).filter(|app| access::sees(caller, app.bus)).cloned();
        let own = self.app_of_caller(caller);
        let is_own = own.is_some() && own == app;
        if !is_own && let Err(reply) = self.privileged(caller, Privilege::ManageApps) {
            return self.reply(call, reply);
        }
        if app.is_none() {
            let text = format!("there is no lease {}", lease.0);
            return self.reply(call, Reply::Error(ErrorKind::Refused, text));
        }
        let by = if is_own { "the app itself".to_owned() } else { format!("the user (process {})", caller.pid) };
        self.leases.revoke(lease, &by, now.boot);
        self.reply(call, Reply::Done);
    }

    pub(super) fn on_leases(&mut self, output: Output, now: Now) {
        match output {
            Output::Keeps(app, sentence) => self.lifecycle.leased(&app, sentence, now),
            Output::Ending { bus, holder, lease, within } => {
                self.actions.push_back(Action::LeaseEnding { bus, holder, lease, within });
            }
            Output::Ended(bus, lease) => self.actions.push_back(Action::EndLease(bus, lease)),
            Output::Note(app, verdict, reason) => self.lifecycle.note(&app, verdict, reason, now),
        }
    }

    /// What is to be seen of the apps that hold leases: their time runs by it.
    pub(super) fn observe_leased(&mut self, now: Now) {
        let leased: Vec<AppKey> = self.leases.apps().cloned().collect();
        for app in leased {
            let state = self.lifecycle.show(&app, now).map(|shown| shown.state);
            let vetoed = |kinds: &[VetoKind]| self.lifecycle.vetoes(&app).iter().any(|veto| kinds.contains(&veto.kind));
            let facts = Facts {
                background: matches!(state, Some(State::Background | State::Awake)),
                audio: vetoed(&[VetoKind::Playback, VetoKind::Capture, VetoKind::MediaPlayer]),
                call: vetoed(&[VetoKind::Call]),
            };
            self.leases.observe(&app, facts, now.boot);
        }
    }
}
