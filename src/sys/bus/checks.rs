//! Calls for which polkit is asked: whom it is asked about, and what becomes of it when the caller leaves.

use std::{collections::BTreeMap, sync::Arc};

use super::{
    polkit::{self, Authority, Place, Question},
    process::{self, Purpose},
    watch,
    wire::Wire,
};
use crate::{
    event::{Authorization, Privilege, Query, Request},
    model::Bus,
    sys::inbox::Process,
    transfer::TransferRequest,
};

/// Questions about one caller at most.
const PER_SENDER: usize = 2;

/// What came of the question about this call.
pub(super) type Verdict = (u64, Authorization);

/// The questions of one connection, by the call they are about, with what is kept of it.
pub(super) struct Checks<C> {
    authority: Authority,
    // Bounded by the questions.
    verdicts: async_channel::Sender<Verdict>,
    open: BTreeMap<u64, Check<C>>,
}

struct Check<C> {
    call: C,
    sender: Arc<str>,
    stage: Stage,
}

enum Stage {
    /// The bus is asked for the caller's process.
    Finding { place: Place, privilege: Privilege, request: Request, interactive: bool },
    /// polkit is asked; it is told when this is dropped.
    Asking { _withdraw: async_channel::Sender<()> },
}

impl<C> Checks<C> {
    pub(super) fn new(authority: Authority, verdicts: async_channel::Sender<Verdict>) -> Self {
        Self { authority, verdicts, open: BTreeMap::new() }
    }

    /// Begins to ask about `call`, which comes back with [`Checks::take`].
    ///
    /// # Errors
    /// The call, and why nothing can be asked now.
    pub(super) fn begin(
        &mut self,
        wire: &mut Wire,
        (number, call): (u64, C),
        sender: &Arc<str>,
        (privilege, request): (Privilege, Request),
        interactive: bool,
    ) -> Result<(), (C, Arc<str>)> {
        let own = self.open.values().filter(|check| check.sender == *sender).count();
        if own >= PER_SENDER {
            return Err((call, format!("polkit is being asked about {own} of your calls already").into()));
        }
        let Some(place) = self.authority.place() else {
            return Err((call, "polkit is being asked about too many calls already; try again later".into()));
        };
        if own == 0 {
            // First the rule: who is found after it and leaves is heard of.
            wire.tell_bus("AddMatch", &watch::rule(sender).as_str());
        }
        process::ask(wire, sender, Purpose::Check(number));
        let stage = Stage::Finding { place, privilege, request, interactive };
        self.open.insert(number, Check { call, sender: Arc::clone(sender), stage });
        Ok(())
    }

    /// The caller's process was found; polkit is asked, and answers with a verdict. What is left of a question that
    /// cannot be asked is a verdict as well.
    pub(super) fn found(&mut self, wire: &Wire, number: u64, process: Result<Process, Arc<str>>) {
        let Some(check) = self.open.get_mut(&number) else { return };
        let (withdraw, withdrawn) = async_channel::bounded(1);
        let stage = std::mem::replace(&mut check.stage, Stage::Asking { _withdraw: withdraw });
        let Stage::Finding { place, privilege, request, interactive } = stage else { return };
        let verdicts = self.verdicts.clone();
        let subject = process.and_then(|process| match wire.bus {
            Bus::System => Ok(polkit::Subject::OnSystemBus(Arc::clone(&check.sender))),
            Bus::Session(uid) => process::subject(process, uid),
        });
        match subject {
            Ok(subject) => {
                let question = Question { subject, privilege, details: details(&request), interactive };
                let asking = async move {
                    let authorization = polkit::ask(place, question, withdrawn).await;
                    // Nobody may wait for it any more.
                    let _ = verdicts.try_send((number, authorization));
                };
                // It ends by itself, soon after `withdraw` is gone.
                zruntime::spawn(asking).detach();
            }
            Err(reason) => {
                let _ = verdicts.try_send((number, Authorization::Refused(reason)));
            }
        }
    }

    /// The call that a verdict is about, unless its caller has left.
    pub(super) fn take(&mut self, wire: &mut Wire, number: u64) -> Option<C> {
        let check = self.open.remove(&number)?;
        if !self.open.values().any(|other| other.sender == check.sender) {
            wire.tell_bus("RemoveMatch", &watch::rule(&check.sender).as_str());
        }
        Some(check.call)
    }

    /// A name has no owner any more. The calls that were its owner's: there is nobody to ask about.
    pub(super) fn left(&mut self, wire: &mut Wire, name: &str) -> Vec<C> {
        let gone: Vec<u64> =
            self.open.iter().filter(|(_, check)| &*check.sender == name).map(|(number, _)| *number).collect();
        gone.into_iter().filter_map(|number| self.take(wire, number)).collect()
    }
}

/// What a rule of polkit's can look at.
fn details(request: &Request) -> std::collections::HashMap<&'static str, String> {
    let detail = match request {
        Request::Query(
            Query::Show(service)
            | Query::Why(service)
            | Query::Endpoints(service)
            | Query::Leases(Some(service))
            | Query::Transfers(Some(service)),
        )
        | Request::Move { service: Some(service), .. }
        | Request::Command { service, .. } => Some(("service", service.to_string())),
        Request::ForgetUser(uid) => Some(("uid", uid.to_string())),
        Request::Transfer(TransferRequest::Cancel(id)) => Some(("transfer", id.0.to_string())),
        Request::EndLease(lease) => Some(("lease", lease.0.to_string())),
        _ => None,
    };
    detail.into_iter().collect()
}
