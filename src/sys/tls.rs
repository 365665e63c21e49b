//! TLS configuration: system trust store or a CA file.
