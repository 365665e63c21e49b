//! Full-jitter reconnect delays with a ceiling.
