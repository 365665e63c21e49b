//! Reads secrets from files and systemd credentials when a link is made.
