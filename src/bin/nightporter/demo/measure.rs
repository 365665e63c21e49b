//! The figures: what they are called, and how they are counted.

use serde::Serialize;

use crate::lab::pushes::Messages;

/// `--json FILE`: exactly these fields.
#[derive(Debug, Serialize)]
pub(super) struct Figures {
    pub(super) apps: u16,
    pub(super) upstream_connections: Connections,
    pub(super) memory_kib: MemoryFigures,
    pub(super) messages: Messages,
    pub(super) wake_ms: Wakes,
    pub(super) freezer: nightporter::model::Freezer,
    pub(super) seconds: f64,
}

/// Established TCP connections to the push server, the demo's own not counted.
#[derive(Debug, Serialize)]
pub(super) struct Connections {
    pub(super) resident: usize,
    pub(super) shared: usize,
}

#[derive(Debug, Serialize)]
pub(super) struct MemoryFigures {
    /// All apps, each on its own.
    pub(super) resident_pss: u64,
    /// All apps behind the daemon, at rest after the last push.
    pub(super) shared_pss: u64,
    pub(super) daemon_pss: u64,
    /// Real memory behind what was paged out into zram, by the daemon's report.
    pub(super) zram: u64,
    /// `resident_pss - shared_pss - daemon_pss - zram`.
    pub(super) saved: i64,
    /// The daemon's own claim.
    pub(super) ledger_saved: i64,
}

#[derive(Debug, Serialize)]
pub(super) struct Wakes {
    pub(super) running: Wake,
    pub(super) frozen: Wake,
    pub(super) tombstoned: Wake,
}

/// From the HTTP request to the app's handler, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Wake {
    pub(super) p50: f64,
    pub(super) p99: f64,
}

impl Wake {
    /// The percentiles of some latencies in nanoseconds, by nearest rank; none without any.
    pub(super) fn of(mut nanos: Vec<u64>) -> Option<Self> {
        nanos.sort_unstable();
        let rank = |percent: usize| {
            let index = (nanos.len() * percent).div_ceil(100).checked_sub(1)?;
            #[expect(clippy::cast_precision_loss, reason = "latencies are far below 2^53 ns")]
            nanos.get(index).map(|nanos| rounded(*nanos as f64 / 1e6))
        };
        Some(Self { p50: rank(50)?, p99: rank(99)? })
    }
}

/// To three digits after the point: more would be noise.
pub(super) fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_by_nearest_rank() {
        let nanos: Vec<u64> = (1..=200).rev().map(|ms| ms * 1_000_000).collect();
        assert_eq!(Wake::of(nanos), Some(Wake { p50: 100.0, p99: 198.0 }));
        assert_eq!(Wake::of(vec![1_234_567]), Some(Wake { p50: 1.235, p99: 1.235 }));
        assert_eq!(Wake::of(Vec::new()), None);
    }

    #[test]
    fn the_document_has_exactly_the_fields_promised() {
        let wake = Wake { p50: 1.0, p99: 2.0 };
        let figures = Figures {
            apps: 12,
            upstream_connections: Connections { resident: 12, shared: 1 },
            memory_kib: MemoryFigures {
                resident_pss: 6,
                shared_pss: 1,
                daemon_pss: 1,
                zram: 1,
                saved: 3,
                ledger_saved: -1,
            },
            messages: Messages::default(),
            wake_ms: Wakes { running: wake, frozen: wake, tombstoned: wake },
            freezer: nightporter::model::Freezer::Cgroup2,
            seconds: 1.5,
        };
        assert_eq!(
            serde_json::to_string(&figures).unwrap(),
            "{\"apps\":12,\"upstream_connections\":{\"resident\":12,\"shared\":1},\"memory_kib\":{\"resident_pss\":6,\
             \"shared_pss\":1,\"daemon_pss\":1,\"zram\":1,\"saved\":3,\"ledger_saved\":-1},\"messages\":{\"sent\":0,\
             \"delivered\":0,\"lost\":0,\"duplicated\":0},\"wake_ms\":{\"running\":{\"p50\":1.0,\"p99\":2.0},\
             \"frozen\":{\"p50\":1.0,\"p99\":2.0},\"tombstoned\":{\"p50\":1.0,\"p99\":2.0}},\"freezer\":\"cgroup2\",\
             \"seconds\":1.5}"
        );
    }
}
