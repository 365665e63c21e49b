//! What apps that listen are told (`org.nightporter1.Client`): that they are about to be frozen, and that they run again.
//!
//! Who listens is a connection; it is over when that connection, or the app's name, is gone.

use std::time::Duration;

use super::Core;
use crate::{
    action::{Action, ClientCall, ErrorKind, Reply},
    event::{CallId, Caller, NoticeTicket},
    model::{AppKey, Owner},
    time::Now,
};

impl Core {
    pub(super) fn listen(&mut self, call: CallId, caller: &Caller, listens: bool, now: Now) {
        let Some(app) = self.app_of_caller(caller) else {
            let text = "only an app that is registered for push is told here; register first";
            return self.reply(call, Reply::Error(ErrorKind::NoSuchApp, text.into()));
        };
        if let Some(presence) = self.apps.get_mut(&app) {
            // What another connection was asked is none of this one's: it ends by its time.
            if presence.listener.as_ref() != Some(&caller.owner) || !listens {
                presence.notice = None;
            }
            presence.listener = listens.then(|| caller.owner.clone());
        }
        self.lifecycle.listens(&app, listens, now);
        self.reply(call, Reply::Done);
    }

    /// A call may overtake the news that the app has its name.
    pub(super) fn listener_appeared(&mut self, app: &AppKey, owner: &Owner, now: Now) {
        let Some(presence) = self.apps.get_mut(app) else { return };
        presence.notice = None;
        if presence.listener.as_ref() == Some(owner) {
            self.lifecycle.listens(app, true, now);
        } else {
            presence.listener = None;
        }
    }

    pub(super) fn will_suspend(&mut self, app: AppKey, within: Duration, now: Now) {
        let presence = self.apps.get_mut(&app);
        let Some((presence, owner)) = presence.and_then(|p| p.listener.clone().map(|owner| (p, owner))) else {
            return self.lifecycle.prepared(&app, now);
        };
        let ticket = NoticeTicket(self.next_notice);
        self.next_notice += 1;
        presence.notice = Some(ticket);
        self.actions.push_back(Action::CallClient { app, owner, call: ClientCall::WillSuspend { ticket, within } });
    }

    pub(super) fn resumed(&mut self, app: AppKey, frozen: Duration) {
        let Some(presence) = self.apps.get_mut(&app) else { return };
        presence.notice = None;
        if let Some(owner) = presence.listener.clone() {
            self.actions.push_back(Action::CallClient { app, owner, call: ClientCall::Resumed { frozen } });
        }
    }

    /// The notice with this ticket is over; an answer to an earlier one says nothing about this.
    pub(super) fn prepared(&mut self, app: &AppKey, ticket: NoticeTicket, now: Now) {
        if self.apps.get_mut(app).is_some_and(|presence| presence.notice.take_if(|open| *open == ticket).is_some()) {
            self.lifecycle.prepared(app, now);
        }
    }
}
