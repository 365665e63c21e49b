//! Who owns the apps' names. One match rule per name: a rule for all names would wake the daemon at every program start.
//! Only beyond as many rules as a bus surely lets us have there is that one for all the rest.

use std::{collections::HashMap, sync::Arc};

use super::{
    process::{self, Purpose},
    wire::{Pending, Response, Wire},
};
use crate::{
    event::BusEvent,
    model::{AppKey, Owner},
    sys::{
        asking::OWNERS_RULE,
        inbox::{Incoming, Process},
    },
};

/// Names with a rule of their own. dbus-daemon lets a connection have 512 rules (`max_match_rules_per_connection`), and has
/// the others of this connection beside.
const OWN_RULES: usize = 256;

/// The watched names of one connection.
#[derive(Default)]
pub(super) struct Watches {
    // As many as the core has apps.
    names: HashMap<Arc<str>, Watch>,
    count: u64,
    /// Names without a rule of their own: while there are any, there is the rule for all names.
    without_rule: usize,
}

struct Watch {
    /// Which Watch this is: answers to earlier ones are not for it.
    number: u64,
    own_rule: bool,
    /// What the loop was told; `None` before the first answer.
    told: Option<Option<Owner>>,
}

impl Watches {
    /// Watches a name and tells its owner soon, again if it is watched already.
    pub(super) fn add(&mut self, wire: &mut Wire, app: &AppKey) {
        self.count += 1;
        let number = self.count;
        if let Some(watch) = self.names.get_mut(&app.service) {
            (watch.number, watch.told) = (number, None);
        } else {
            let own_rule = self.names.len() - self.without_rule < OWN_RULES;
            if own_rule {
                wire.ask_bus("AddMatch", &rule(&app.service).as_str(), Pending::Match(app.clone()));
            } else {
                if self.without_rule == 0 {
                    log::info!(
                        "more than {OWN_RULES} apps on one bus: every program's start and end there is looked at"
                    );
                    wire.ask_bus("AddMatch", &OWNERS_RULE, Pending::Match(app.clone()));
                }
                self.without_rule += 1;
            }
            self.names.insert(Arc::clone(&app.service), Watch { number, own_rule, told: None });
        }
        // The bus handles these in order: a change after its answer is one that the rule lets through.
        wire.ask_bus("GetNameOwner", &&*app.service, Pending::Owner(app.clone(), number));
    }

    /// Stops watching a name.
    pub(super) fn remove(&mut self, wire: &mut Wire, app: &AppKey) {
        match self.names.remove(&app.service) {
            Some(Watch { own_rule: true, .. }) => wire.tell_bus("RemoveMatch", &rule(&app.service).as_str()),
            Some(_) => {
                self.without_rule -= 1;
                if self.without_rule == 0 {
                    wire.tell_bus("RemoveMatch", &OWNERS_RULE);
                }
            }
            None => {}
        }
    }

    /// The bus answered AddMatch.
    pub(super) fn matched(app: &AppKey, response: Response) {
        if let Err(failure) = response {
            log::error!("{app}: the bus refuses to tell of its comings and goings: {failure}");
        }
    }

    /// The bus answered GetNameOwner.
    pub(super) fn owner(&mut self, wire: &mut Wire, app: &AppKey, number: u64, response: Response) {
        if self.names.get(&app.service).is_none_or(|watch| watch.number != number) {
            return;
        }
        // An error here is NameHasNoOwner.
        let owner = response.ok().and_then(|message| message.body().deserialize::<&str>().ok().map(Arc::<str>::from));
        self.tell(wire, app, owner);
    }

    /// The bus signalled NameOwnerChanged.
    pub(super) fn changed(&mut self, wire: &mut Wire, name: &str, new: &str) {
        // Before the first answer: that one will be newer.
        let Some((name, Watch { told: Some(_), .. })) = self.names.get_key_value(name) else { return };
        let app = AppKey::new(wire.bus, Arc::clone(name));
        self.tell(wire, &app, (!new.is_empty()).then(|| new.into()));
    }

    /// The process of a watched name's owner was found, or not. False when the name has another owner by now.
    pub(super) fn identified(
        &self,
        wire: &Wire,
        app: AppKey,
        owner: Arc<str>,
        process: Result<Process, Arc<str>>,
    ) -> bool {
        let owner = Owner(owner);
        // By now it may be somebody else's name; then the news is of no use to anyone.
        let current = self.names.get(&app.service).and_then(|watch| watch.told.as_ref()) == Some(&Some(owner.clone()));
        if current {
            wire.tell(Incoming::Process { app, owner, process });
        }
        current
    }

    fn tell(&mut self, wire: &mut Wire, app: &AppKey, owner: Option<Arc<str>>) {
        let Some(watch) = self.names.get_mut(&app.service) else { return };
        let owner = owner.map(Owner);
        if watch.told.as_ref() == Some(&owner) {
            return;
        }
        watch.told = Some(owner.clone());
        wire.event(BusEvent::OwnerChanged(app.clone(), owner.clone()));
        if let Some(Owner(owner)) = owner {
            process::ask(wire, &owner, Purpose::Watch(app.clone()));
        }
    }
}

/// The match rule for the owner of `name`.
pub(super) fn rule(name: &str) -> String {
    // Bus names contain neither quotes nor commas: they were checked when the app registered, and the bus checks again.
    format!("{OWNERS_RULE},arg0='{name}'")
}
