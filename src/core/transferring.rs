//! Transfers among the other parts: who may ask for what, what power and network say, and how an app hears of the end.

use std::sync::Arc;

use super::{
    Core, Stored, access,
    transfers::{self, Conditions, Output, Wait},
    urgency,
};
use crate::{
    action::{Action, ClientCall, ErrorKind, Reply, StoreOp},
    config::Roaming,
    event::{CallId, Caller, Privilege},
    model::{AppKey, Network, Priority, Reach, Urgency},
    time::Now,
    transfer::{TransferId, TransferOrder, TransferRequest, Wish},
    view,
};

/// Why an app is thawed.
const CAUSE: &str = "a transfer of it has ended";

impl Core {
    pub(super) fn transfer(&mut self, call: CallId, caller: &Caller, request: TransferRequest, now: Now) {
        let own = self.app_of_caller(caller).filter(|app| self.registry.of_app(app).next().is_some());
        match (request, own) {
            (TransferRequest::Begin(wish), Some(app)) => self.begin_transfer(call, caller, &app, *wish, now),
            (TransferRequest::Collect(id), Some(app)) => match self.transfers.collectable(&app, id) {
                Ok(direction) => {
                    self.actions.push_back(Action::Transfer(TransferOrder::Collect { call, id, direction }));
                }
                Err(text) => self.reply(call, Reply::Error(ErrorKind::Refused, text)),
            },
            (TransferRequest::List, Some(app)) => {
                let list = self.transfer_list(now, |other| *other == app);
                self.reply(call, super::queries::json(&list));
            }
            (TransferRequest::Cancel(id), own) => self.cancel_transfer(call, caller, own.as_ref(), id, now),
            (_, None) => {
                let text = "only an app that is registered for push has transfers here; register first";
                self.reply(call, Reply::Error(ErrorKind::NoSuchApp, text.into()));
            }
        }
    }

    fn begin_transfer(&mut self, call: CallId, caller: &Caller, app: &AppKey, wish: Wish, now: Now) {
        let refusal = if !self.settings.transfers.enabled {
            Some("transfers are switched off here ([transfers] enabled = false)")
        } else if !caller.networked {
            // What is kept from it the daemon must not fetch for it.
            Some(
                "a program without this machine's network has none through this daemon either (in a Flatpak: --share=network)",
            )
        } else if self.ending.is_some() {
            Some("the daemon is about to end")
        } else {
            None
        };
        if let Some(text) = refusal {
            return self.reply(call, Reply::Error(ErrorKind::Refused, text.into()));
        }
        if let Err(refusal) = self.transfers.begin(app, call, wish, now) {
            self.reply(call, Reply::Error(ErrorKind::LimitsExceeded, refusal.to_string()));
        }
    }

    fn cancel_transfer(&mut self, call: CallId, caller: &Caller, own: Option<&AppKey>, id: TransferId, now: Now) {
        let app = self.transfers.app_of(id).filter(|app| access::sees(caller, app.bus)).cloned();
        let is_own = own.is_some() && own == app.as_ref();
        if !is_own && let Err(reply) = self.privileged(caller, Privilege::ManageApps) {
            return self.reply(call, reply);
        }
        if app.is_none() {
            let text = format!("there is no transfer {}", id.0);
            return self.reply(call, Reply::Error(ErrorKind::Refused, text));
        }
        let by = format!("the user (process {})", caller.pid);
        self.transfers.cancel(id, is_own, &by, now);
        self.reply(call, Reply::Done);
    }

    pub(super) fn on_transfers(&mut self, output: Output, now: Now) {
        match output {
            Output::Save(transfer) => {
                let id = transfer.id;
                self.store(StoreOp::PutTransfer(transfer), Some(Stored::Transfer(id)));
            }
            Output::Note(transfer) => self.store(StoreOp::NoteTransfer(transfer), None),
            Output::Delete(id) => self.store(StoreOp::DeleteTransfer(id), None),
            Output::Order(order) => self.actions.push_back(Action::Transfer(order)),
            Output::Began(call, id) => self.reply(call, Reply::Transfer(id)),
            Output::Refused(call) => {
                let text = "it could not be written down; nothing was taken over".into();
                self.reply(call, Reply::Error(ErrorKind::Failed, text));
            }
            Output::Decided(app, verdict, reason) => self.lifecycle.note(&app, verdict, reason, now),
            Output::Wake(app) => self.want(&app, Urgency::Normal, now),
            Output::Pending(app, _) => {
                let pending = self.delivery.is_pending(&app);
                self.pending_because(&app, pending, now);
            }
            Output::Tell { ticket, app, owner, id, status, text } => {
                let listener = self.apps.get(&app).and_then(|presence| presence.listener.clone());
                let call = ClientCall::TransferDone { ticket, id, status, text };
                self.actions.push_back(Action::CallClient { app, owner: listener.unwrap_or(owner), call });
            }
            Output::Heard(app) => self.lifecycle.delivered(&app, Priority::Normal, now),
        }
    }

    /// Delivery, or a transfer, has something for the app or nothing any more. While the app waits for its turn it is left as
    /// it is.
    pub(super) fn pending_because(&mut self, app: &AppKey, message: bool, now: Now) {
        let transfer = self.transfers.is_pending(app);
        if !message && !transfer {
            self.wakes.done(app);
        }
        if !self.wakes.is_waiting(app) {
            let cause = (transfer && !message).then_some(CAUSE);
            self.lifecycle.set_pending_because(app, message || transfer, cause, now);
        }
    }

    /// Why the app is to be thawed, where it is not for a message.
    pub(super) fn cause_of_wake(&self, app: &AppKey) -> Option<&'static str> {
        (self.transfers.is_asked(app) && !self.delivery.is_pending(app)).then_some(CAUSE)
    }

    /// Power or network are not what they were.
    pub(super) fn brief_transfers(&mut self, returned: bool, now: Now) {
        let Some(around) = &self.surroundings else { return };
        let Network { reach, roaming, metered, .. } = around.network;
        let off = roaming && self.settings.network.roaming == Roaming::Off;
        let conditions = Conditions {
            network: !matches!(reach, Reach::None | Reach::Portal) && !off,
            metered: metered || roaming,
            low: urgency::is_low(around, &self.settings.urgency),
        };
        let may_wake = self.minimum().urgency <= Urgency::Normal;
        self.transfers.set_conditions(conditions, may_wake, returned, now);
    }

    /// What is shown of the transfers of these apps.
    pub(super) fn transfer_list(&self, now: Now, of: impl Fn(&AppKey) -> bool) -> Vec<view::Transfer> {
        let shown = self.transfers.shown().filter(|shown| of(&shown.transfer.app));
        shown
            .map(|shown| {
                let transfer = shown.transfer;
                let wait = self.transfers.waits_for(transfer.id);
                let (state, told) = match (&transfer.end, &wait) {
                    (Some(end), _) => (end.how.as_str(), Some(end.told)),
                    (None, None) => ("running", None),
                    (None, Some(Wait::Content)) => ("taking-over", None),
                    (None, Some(_)) => ("waiting", None),
                };
                let reason = match (&transfer.end, &wait) {
                    (Some(end), _) => Some(end.text.to_string()),
                    (None, Some(wait @ Wait::Retry(_))) => {
                        Some(format!("waits {}: {}", transfers::words(wait), shown.trouble.unwrap_or_default()))
                    }
                    (None, Some(wait)) => Some(format!("waits {}", transfers::words(wait))),
                    (None, None) => None,
                };
                view::Transfer {
                    id: transfer.id.0,
                    app: transfer.app.to_string(),
                    direction: transfer.wish.direction,
                    title: transfer.wish.title.to_string(),
                    place: transfers::place(&transfer.wish.url).to_owned(),
                    state: state.to_owned(),
                    reason,
                    bytes: shown.bytes,
                    total: transfer.progress.total,
                    retry_in_secs: match wait {
                        Some(Wait::Retry(at)) => Some(at.since(now.boot).as_secs()),
                        _ => None,
                    },
                    begun: transfer.progress.begun.to_string(),
                    told,
                }
            })
            .collect()
    }

    /// The app's, by its name, for `show`.
    pub(super) fn transfers_of(&self, app: &AppKey, now: Now) -> Vec<view::Transfer> {
        self.transfer_list(now, |other| other == app)
    }

    /// The store answered.
    pub(super) fn transfer_saved(&mut self, id: TransferId, ok: bool, now: Now) {
        self.transfers.saved(id, ok, now);
    }

    /// A call that needs one of the transfers' own words.
    pub(super) fn transfers_query(&self, caller: &Caller, service: Option<Arc<str>>, now: Now) -> Reply {
        match service {
            Some(service) => self.for_app(caller, service, Privilege::Read, |core, app| {
                super::queries::json(&core.transfers_of(app, now))
            }),
            None => match self.privileged(caller, Privilege::Read) {
                Ok(()) => super::queries::json(&self.transfer_list(now, |app| access::sees(caller, app.bus))),
                Err(reply) => reply,
            },
        }
    }
}
