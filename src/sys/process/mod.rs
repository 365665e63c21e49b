//! App processes: identity, freezing, paging out, killing, measuring.
//!
//! [`Targets`] belongs to the loop thread and never blocks: what the kernel finishes later comes back through a file
//! descriptor or a deadline, what reads memory runs on [`Jobs`](crate::sys::jobs::Jobs), what looks at all of `/proc` or
//! at open files on workers of its own (`look`). A process is known by its pidfd and start time, a cgroup by its
//! directory and inode; both are checked again on the loop right before a freeze or a kill, whatever a worker saw
//! (design.md, invariants 3, 4 and 5).

mod cgroup;
mod connections;
mod hold;
mod home;
mod inspect;
mod locks;
mod look;
mod measure;
mod oom;
mod open_files;
mod own;
mod page_out;
mod procfs;
mod record;
mod role;
mod target;
mod targets;
mod walks;
mod whose;
mod zram;

pub use cgroup::mount as cgroup_mount;
pub(in crate::sys) use cgroup::parse_mountinfo;
pub use page_out::{Paged, page_out_now};
pub use record::{ThawReport, thaw_leftovers};
pub use targets::{Options, ProcessError, Targets, UnitOf};
