//! Logging to stderr with the priorities journald reads.
