//! App processes: identity, freezing, paging out, killing, measuring.
//!
//! [`Targets`] belongs to the loop thread and never blocks: what the kernel finishes later comes back through a file
//! descriptor or a deadline, what reads memory runs on [`Jobs`](crate::sys::jobs::Jobs). A process is known by its
//! pidfd and start time, a cgroup by its directory and inode; both are checked again right before a freeze or a kill
//! (design.md, invariants 3, 4 and 5).

mod cgroup;
mod hold;
mod home;
mod measure;
mod page_out;
mod procfs;
mod record;
mod role;
mod target;
mod targets;

pub use record::{ThawReport, thaw_leftovers};
pub use targets::{Options, ProcessError, Targets, UnitOf};
