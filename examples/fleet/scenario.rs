//! What happens to the crowd.

use std::time::Duration;

/// One bad day.
pub(crate) struct Scenario {
    pub(crate) title: &'static str,
    /// For the reader of the table.
    pub(crate) story: &'static str,
    /// How much of it the figure shows, from the cut on.
    pub(crate) window: Duration,
    pub(crate) cut: Cut,
    /// How long the server is away.
    pub(crate) down: Duration,
    /// What an attempt meets meanwhile.
    pub(crate) away: Away,
    pub(crate) capacity: Capacity,
    /// The server has lost its memory of devices: every registration must be made again.
    pub(crate) forgets: bool,
}

/// How the links end.
pub(crate) enum Cut {
    /// The server's kernel says so to everybody.
    Closed,
    /// Nobody is told.
    Silent,
    /// The phones lose their network and regain it one by one within this time; the server is well.
    Network { within: Duration },
}

#[derive(PartialEq, Eq)]
pub(crate) enum Away {
    /// A closed port.
    Refuses,
    /// No answer at all.
    Silent,
}

/// What the server can do once it is back. A share is the part of the crowd it can shake hands with in a second.
#[derive(Clone, Copy)]
pub(crate) enum Capacity {
    /// Whatever comes.
    Boundless,
    /// Who would wait longer than `queue` is told 503 with `retry_after`, at no cost.
    Sheds { share: f64, queue: Duration, retry_after: Duration },
    /// Everybody within `queue` is served in order, those included that have given up meanwhile; the others hear nothing.
    Drowns { share: f64, queue: Duration },
}

impl Scenario {
    /// Handshakes a second for a crowd of `phones`, if there is a limit.
    pub(crate) fn rate(&self, phones: usize) -> Option<f64> {
        match self.capacity {
            Capacity::Boundless => None,
            Capacity::Sheds { share, .. } | Capacity::Drowns { share, .. } => Some(share * phones as f64),
        }
    }

    pub(crate) const fn retry_after(&self) -> Option<Duration> {
        match self.capacity {
            Capacity::Sheds { retry_after, .. } => Some(retry_after),
            Capacity::Boundless | Capacity::Drowns { .. } => None,
        }
    }
}

const SHARE: f64 = 0.01;

/// All of them, those of the figure first.
pub(crate) const ALL: [Scenario; 8] = [
    Scenario {
        title: "Restart, 10 s",
        story: "the server's process ends and is back after 10 s; meanwhile its port is closed",
        window: Duration::from_secs(45),
        cut: Cut::Closed,
        down: Duration::from_secs(10),
        away: Away::Refuses,
        capacity: Capacity::Boundless,
        forgets: false,
    },
    Scenario {
        title: "Outage, 10 min",
        story: "the same with ten minutes",
        window: Duration::from_secs(960),
        cut: Cut::Closed,
        down: Duration::from_secs(600),
        away: Away::Refuses,
        capacity: Capacity::Boundless,
        forgets: false,
    },
    Scenario {
        title: "Restart, server sheds load",
        story: "back after 10 s; it shakes hands with 1 % of the phones a second, and whoever would wait for more than \
                2 s is told 503 with `Retry-After: 30`, at no cost",
        window: Duration::from_secs(240),
        cut: Cut::Closed,
        down: Duration::from_secs(10),
        away: Away::Refuses,
        capacity: Capacity::Sheds { share: SHARE, queue: Duration::from_secs(2), retry_after: Duration::from_secs(30) },
        forgets: false,
    },
    Scenario {
        title: "Restart, server drowns",
        story: "back after 10 s with the same 1 %, but it takes in up to 60 s of work and does it in order, for those as \
                well who gave up after 20 s; beyond that it is silent",
        window: Duration::from_secs(900),
        cut: Cut::Closed,
        down: Duration::from_secs(10),
        away: Away::Refuses,
        capacity: Capacity::Drowns { share: SHARE, queue: Duration::from_secs(60) },
        forgets: false,
    },
    Scenario {
        title: "Restart, 1 s",
        story: "back after a second: the worst case for a short first delay",
        window: Duration::from_secs(30),
        cut: Cut::Closed,
        down: Duration::from_secs(1),
        away: Away::Refuses,
        capacity: Capacity::Boundless,
        forgets: false,
    },
    Scenario {
        title: "Restart, 10 s, memory lost",
        story: "the first, and the server knows no device any more: each makes its five registrations again",
        window: Duration::from_secs(60),
        cut: Cut::Closed,
        down: Duration::from_secs(10),
        away: Away::Refuses,
        capacity: Capacity::Boundless,
        forgets: true,
    },
    Scenario {
        title: "Dead network, 10 min",
        story: "the way to the server is cut for ten minutes: links end without a word, attempts are not answered",
        window: Duration::from_secs(960),
        cut: Cut::Silent,
        down: Duration::from_secs(600),
        away: Away::Silent,
        capacity: Capacity::Boundless,
        forgets: false,
    },
    Scenario {
        title: "Phones' own networks, 60 s",
        story: "the server is well; every phone loses its network and regains it at a moment of its own within 60 s",
        window: Duration::from_secs(90),
        cut: Cut::Network { within: Duration::from_secs(60) },
        down: Duration::ZERO,
        away: Away::Refuses,
        capacity: Capacity::Boundless,
        forgets: false,
    },
];

/// How many of [`ALL`] the figure shows.
pub(crate) const DRAWN: usize = 4;
