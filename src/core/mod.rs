//! The pure core: a deterministic state machine without clock, file, socket, thread or random source.

pub mod delivery;
pub mod ledger;
pub mod lifecycle;
pub mod upstream;
