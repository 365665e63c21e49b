//! What replies on the system bus are for.

use super::{
    facts::{Object, Service},
    logind::Mode,
};
pub(super) use crate::sys::asking::{BUS_NAME, OWNERS_RULE, PROPERTIES, Response};

/// What a reply is for.
#[derive(Debug)]
pub(super) enum Pending {
    /// AddMatch.
    Match,
    /// GetNameOwner.
    Owner(Service),
    /// GetAll.
    Properties(Object),
    /// Inhibit.
    Inhibitor(Mode),
    /// ListUsers.
    Users,
    /// GetAll of the user with this uid.
    User(u32),
}

/// The outgoing side of the connection. Bounded: one per service, rule, object followed, inhibitor and user.
pub(super) type Calls = crate::sys::asking::Calls<Pending>;
