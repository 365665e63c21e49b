//! The pure core: a deterministic state machine without clock, file, socket, thread or random source.

pub mod upstream;
