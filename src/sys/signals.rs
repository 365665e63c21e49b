//! SIGTERM and SIGINT as readable bytes.
