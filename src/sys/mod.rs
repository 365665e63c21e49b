//! Everything the kernel, the network or a bus is asked. Knows events and actions, never the core.

pub mod clock;
pub mod inbox;
pub mod jobs;
