//! The states an app is pushed to in.

use nightporter::view::App;
use serde::{Deserialize, Serialize};

/// As people and files name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum State {
    Running,
    Frozen,
    #[serde(rename = "reclaimed")]
    PagedOut,
    #[serde(rename = "tombstone")]
    Tombstoned,
}

impl State {
    pub(crate) const ALL: [Self; 4] = [Self::Running, Self::Frozen, Self::PagedOut, Self::Tombstoned];

    pub(crate) const fn label(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Frozen => "frozen",
            Self::PagedOut => "paged out",
            Self::Tombstoned => "tombstone",
        }
    }

    /// As the daemon says it; none on the way from one to another.
    pub(crate) fn of(app: &App) -> Option<Self> {
        match app.state.as_str() {
            "foreground" | "background" | "awake" => Some(Self::Running),
            "frozen" => Some(Self::Frozen),
            "reclaimed" => Some(Self::PagedOut),
            "tombstone" | "gone" if app.pid.is_none() => Some(Self::Tombstoned),
            _ => None,
        }
    }
}
