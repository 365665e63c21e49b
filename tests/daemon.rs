//! The daemon as it is: the real program on a real bus with the real push server and real apps, through what others see
//! of it. Each test has a world of its own.
#![cfg(all(feature = "cli", feature = "relay"))]
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking, in its helpers too")]
#![expect(clippy::print_stderr, reason = "what a failing test wants to be known")]

#[expect(dead_code, reason = "made for the tests of units; shared")]
#[path = "units/group.rs"]
mod group;
#[expect(dead_code, reason = "made for the tests of units; shared")]
#[path = "units/systemd.rs"]
mod systemd;

#[path = "support/desk.rs"]
#[expect(dead_code, reason = "made for the tests of the buses; shared")]
mod desk;
#[path = "support/lease.rs"]
mod lease;

#[path = "daemon/crashes.rs"]
mod crashes;
#[path = "daemon/delivery.rs"]
mod delivery;
#[path = "daemon/leases.rs"]
mod leases;
#[path = "daemon/lifecycle.rs"]
mod lifecycle;
#[path = "daemon/moves.rs"]
mod moves;
#[path = "daemon/notice.rs"]
mod notice;
#[path = "daemon/registration.rs"]
mod registration;
#[path = "daemon/stand_in.rs"]
mod stand_in;
#[path = "daemon/start.rs"]
mod start;
mod support;
#[path = "daemon/trouble.rs"]
mod trouble;
#[path = "daemon/units.rs"]
mod units;
#[path = "daemon/upstream.rs"]
mod upstream;
