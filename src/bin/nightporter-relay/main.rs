//! `nightporter-relay`: the embedded push server for one household, the demo and the tests.
//!
//! Web Push (RFC 8030) comes in over HTTP, goes into SQLite, and leaves on the autopush WebSocket:
//! `http` → `webpush` + `vapid` → `store` → `session` → `socket`. The storage thread is the one place where order is
//! made: it commits, hands messages to connected devices and only then lets `http` answer 201.

mod args;
mod autopush;
mod clock;
mod database;
mod http;
mod quota;
mod server;
mod session;
mod socket;
mod store;
mod token;
mod vapid;
mod webpush;

use std::process::ExitCode;

fn main() -> ExitCode {
    match args::parse() {
        Ok(args) => server::main(args),
        Err(code) => code,
    }
}
