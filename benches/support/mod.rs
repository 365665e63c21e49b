//! What the benchmarks share: a private bus, a TLS proxy, looking at processes, and percentiles.

pub(crate) mod bus;
pub(crate) mod child;
pub(crate) mod memory;
pub(crate) mod stats;
pub(crate) mod tls;

/// Whatever went wrong, for `main` to show.
pub(crate) type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;
