//! SQLite on its own thread.
