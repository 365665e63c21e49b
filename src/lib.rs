//! Night Porter: one porter stays awake so that every app can sleep.
//!
//! Two flows (ARCHITECTURE.md walks through both by file name):
//!
//! - **Push**: socket bytes → `sys::link` → [`core::upstream`] → `core::delivery` → (thaw | start) → `sys::bus` → app.
//! - **Lifecycle**: event → `core::lifecycle` → verdict → `sys` executor → outcome → `core::ledger` → report.
//!
//! The pure half (`time`, `model`, `notification`, `transfer`, `event`, `action`, `config`, `view`, `doctor`, `core`)
//! touches nothing; `sys` touches the world and knows nothing of the core; `daemon` is the one loop that joins them.

pub mod action;
pub mod config;
pub mod core;
pub mod doctor;
pub mod event;
pub mod model;
pub mod notification;
pub mod time;
pub mod transfer;
pub mod view;

#[cfg(feature = "daemon")]
pub mod daemon;
#[cfg(feature = "daemon")]
pub mod sys;
