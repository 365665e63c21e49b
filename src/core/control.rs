//! What apps, shells and the user say about lifecycle: declared states, and freeze, thaw, kill by hand.

use std::sync::Arc;

use super::{
    Core,
    access::{self, Access},
    lifecycle::RefusalKind,
};
use crate::{
    action::{ErrorKind, Reply},
    event::{CallId, Caller, Claim, Command, Privilege},
    model::{AppKey, Bus},
    time::Now,
};

/// Calls that may wait for commands; beyond it the newest is refused.
const WAITING: usize = 64;

/// Calls that wait for a command to end.
#[derive(Debug, Default)]
pub(super) struct Commands {
    waiting: Vec<(AppKey, Command, CallId)>,
}

impl Core {
    pub(super) fn declare(&mut self, call: CallId, caller: &Caller, service: Option<Arc<str>>, claim: Claim, now: Now) {
        let own = self.app_of_caller(caller);
        let (app, by) = match service {
            None => match own {
                Some(app) => (app, "the app itself".to_owned()),
                None => {
                    let text = "only an app that is registered for push has a state here; register first";
                    self.reply(call, Reply::Error(ErrorKind::NoSuchApp, text.into()));
                    return;
                }
            },
            Some(service) => {
                let app = AppKey::new(caller.bus, service);
                if own.as_ref() == Some(&app) {
                    (app, "the app itself".to_owned())
                } else if !self.may_control(caller) {
                    let text = "only root or the user's own unconfined programs may do this to an app";
                    self.reply(call, Reply::Error(ErrorKind::NotAuthorized, text.into()));
                    return;
                } else if let Err(reply) = self.known(&app) {
                    self.reply(call, reply);
                    return;
                } else {
                    (app, format!("the shell (process {})", caller.pid))
                }
            }
        };
        self.lifecycle.declare(&app, claim, &by, now);
        // Its own word would be an easy way out for an app whose messages show nothing.
        if claim == Claim::Foreground && self.app_of_caller(caller).as_ref() != Some(&app) {
            self.seen_in_front(&app, now);
        }
        self.reply(call, Reply::Done);
    }

    pub(super) fn command(&mut self, call: CallId, caller: &Caller, service: Arc<str>, command: Command, now: Now) {
        let app = AppKey::new(caller.bus, service);
        if let Err(reply) = self.controlled(caller, &app, Privilege::ManageApps) {
            self.reply(call, reply);
            return;
        }
        if self.commands.waiting.len() >= WAITING {
            let text = format!("{WAITING} commands are being carried out already");
            self.reply(call, Reply::Error(ErrorKind::LimitsExceeded, text));
            return;
        }
        let by = format!("the user (process {})", caller.pid);
        match self.lifecycle.command(&app, command, &by, now) {
            Ok(()) => self.commands.waiting.push((app, command, call)),
            Err(refusal) => {
                let kind = match refusal.kind {
                    RefusalKind::NotRunning => ErrorKind::NotRunning,
                    RefusalKind::Refused => ErrorKind::Refused,
                };
                self.reply(call, Reply::Error(kind, refusal.text));
            }
        }
    }

    /// Of a user who is gone for good nothing is kept. The administrator's business, and only while that user is not
    /// logged in.
    pub(super) fn forget_user(&mut self, call: CallId, caller: &Caller, uid: u32, now: Now) {
        let bus = Bus::Session(uid);
        // What a user's own bus says of its callers is that user's to fake.
        if caller.bus != Bus::System {
            let text = "this can be asked on the system bus only".into();
            return self.reply(call, Reply::Error(ErrorKind::NotAuthorized, text));
        }
        if let Err(reply) = self.privileged(caller, Privilege::ManageUsers) {
            return self.reply(call, reply);
        }
        if self.buses.contains(&bus) {
            let text = format!("user {uid} is logged in");
            return self.reply(call, Reply::Error(ErrorKind::Refused, text));
        }
        let apps: Vec<AppKey> = self.apps.keys().filter(|app| app.bus == bus).cloned().collect();
        log::info!("user {uid}: forgotten, with {} apps", apps.len());
        for app in apps {
            self.forget_app(&app, now);
        }
        self.forget_preferences(bus);
        self.messages.remove(&bus);
        self.forget_books_of(bus);
        self.reply(call, Reply::Done);
    }

    pub(super) fn command_done(&mut self, app: &AppKey, command: Command, result: Result<(), String>) {
        let done = |(a, c, _): &mut (AppKey, Command, CallId)| a == app && *c == command;
        let calls: Vec<CallId> = self.commands.waiting.extract_if(.., done).map(|(_, _, call)| call).collect();
        for call in calls {
            let reply = match &result {
                Ok(()) => Reply::Done,
                Err(text) => Reply::Error(ErrorKind::Failed, text.clone()),
            };
            self.reply(call, reply);
        }
    }

    /// Whether the caller has this privilege over `app`, and there is such an app. Who has it not is not told which apps
    /// there are.
    pub(super) fn controlled(&self, caller: &Caller, app: &AppKey, privilege: Privilege) -> Result<(), Reply> {
        self.privileged(caller, privilege)?;
        self.known(app)
    }

    /// Whether there is such an app.
    pub(super) fn known(&self, app: &AppKey) -> Result<(), Reply> {
        if self.apps.contains_key(app) {
            Ok(())
        } else {
            Err(Reply::Error(ErrorKind::NoSuchApp, format!("no app named \"{app}\" is registered")))
        }
    }

    /// Whether the caller has this privilege; else the answer, which may be that polkit is to be asked first.
    pub(super) fn privileged(&self, caller: &Caller, privilege: Privilege) -> Result<(), Reply> {
        let what = match privilege {
            Privilege::Read => "reading about apps that are not your own",
            Privilege::ManageApps => "acting on apps that are not your own",
            Privilege::ManageUsers => "forgetting a user",
        };
        match access::privileged(caller, self.app_of_caller(caller).is_some(), privilege) {
            Access::Granted => Ok(()),
            Access::Ask { interactive } => Err(Reply::Authorize { privilege, interactive }),
            Access::Refused(reason) => {
                Err(Reply::Error(ErrorKind::NotAuthorized, format!("{what} is for administrators: {reason}")))
            }
        }
    }

    /// Whether the caller may do so without polkit.
    pub(super) fn may_control(&self, caller: &Caller) -> bool {
        access::may_control(caller, self.app_of_caller(caller).is_some())
    }

    /// The app the caller is, if it is one.
    pub(super) fn app_of_caller(&self, caller: &Caller) -> Option<AppKey> {
        let is_caller =
            |(app, presence): &(&AppKey, &super::Presence)| access::is_app(caller, app, presence.owner.as_ref());
        self.apps.iter().find(is_caller).map(|(app, _)| app.clone())
    }
}
