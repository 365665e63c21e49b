//! Small models of other clients' ways to come back, to compare with. They are models: no line of those clients is run.

use std::time::Duration;

use nightporter::{
    core::upstream::{CONNECT_TIMEOUT, Output},
    event::{LinkError, LinkEvent, LinkId},
    time::{Instant, Now},
    view::LinkState,
};

use crate::world::{Daemon, random};

/// A link without a ping for so long is dead; the real session's own figure, given to the models for fairness.
const SILENCE: Duration = Duration::from_secs(310);

/// How long to wait.
#[derive(Clone, Copy)]
pub(crate) enum Policy {
    /// Always the same.
    Fixed(Duration),
    /// The first one by chance from a range, each further one longer by a factor, without end (kunifiedpush's Wait).
    Growing { from: Duration, to: Duration, factor: f64 },
    /// By chance from a share of a limit that doubles, but half a second at least, up to it. A server's wish is obeyed,
    /// with a share of it as jitter.
    Doubling { first: Duration, ceiling: Duration, from: f64, over: f64 },
}

/// A client that only has a link.
pub(crate) struct Model {
    policy: Policy,
    seed: u64,
    draws: u64,
    failures: u32,
    delay: Duration,
    next_link: u64,
    state: State,
    outputs: [Option<Output>; 2],
}

#[derive(Clone, Copy)]
enum State {
    Waiting { until: Instant },
    Connecting { link: LinkId, asked: Instant },
    Online { link: LinkId, heard: Instant },
}

impl Model {
    pub(crate) fn new(policy: Policy, seed: u64, now: Now) -> Self {
        let mut model = Self {
            policy,
            seed,
            draws: 0,
            failures: 0,
            delay: Duration::ZERO,
            next_link: 0,
            state: State::Waiting { until: now.boot },
            outputs: [None, None],
        };
        model.connect(now.boot);
        model
    }

    fn connect(&mut self, now: Instant) {
        let link = LinkId(self.next_link);
        self.next_link += 1;
        self.state = State::Connecting { link, asked: now };
        self.outputs[1] = Some(Output::Connect { link, path: String::new(), headers: Vec::new() });
    }

    fn failed(&mut self, wish: Option<Duration>, now: Instant) {
        let (low, high) = match self.policy {
            Policy::Fixed(delay) => (delay, delay),
            Policy::Growing { from, to, .. } if self.failures == 0 => (from, to),
            Policy::Growing { factor, .. } => (self.delay.mul_f64(factor), self.delay.mul_f64(factor)),
            Policy::Doubling { first, ceiling, from, .. } => {
                let limit = ceiling.min(first * (1 << self.failures.min(16)));
                (limit.mul_f64(from).max(Duration::from_millis(500)), limit)
            }
        };
        self.delay = self.between(low, high);
        self.failures += 1;
        let mut until = now + self.delay;
        if let (Policy::Doubling { over, .. }, Some(wish)) = (self.policy, wish) {
            let x = if over > 0.5 { wish.mul_f64(over).max(high) } else { wish.mul_f64(over) };
            until = until.max(now + wish + self.between(Duration::ZERO, x));
        }
        self.state = State::Waiting { until };
    }

    fn between(&mut self, low: Duration, high: Duration) -> Duration {
        self.draws += 1;
        let share = random(self.seed, self.draws) as f64 / u64::MAX as f64;
        low + (high - low).mul_f64(share)
    }
}

impl Daemon for Model {
    fn handle_link(&mut self, id: LinkId, event: LinkEvent, now: Now) {
        let current = match self.state {
            State::Waiting { .. } => None,
            State::Connecting { link, .. } | State::Online { link, .. } => Some(link),
        };
        if current != Some(id) {
            return;
        }
        match event {
            LinkEvent::Open => {
                self.state = State::Online { link: id, heard: now.boot };
                self.failures = 0;
                self.outputs[0] = Some(Output::StateChanged(LinkState::Online));
            }
            LinkEvent::Ping => self.state = State::Online { link: id, heard: now.boot },
            LinkEvent::Closed { .. } => self.failed(None, now.boot),
            LinkEvent::Failed(LinkError::Http { retry_after, .. }) => self.failed(retry_after, now.boot),
            LinkEvent::Failed(_) => self.failed(None, now.boot),
            _ => {}
        }
    }

    fn handle_timeout(&mut self, now: Now) {
        match self.state {
            State::Waiting { .. } => self.connect(now.boot),
            State::Connecting { link, .. } | State::Online { link, .. } => {
                self.outputs[0] = Some(Output::Close(link));
                self.failed(None, now.boot);
            }
        }
    }

    /// Of these only the doubling one is told.
    fn handle_network(&mut self, now: Now) {
        if let (Policy::Doubling { .. }, State::Waiting { .. }) = (self.policy, self.state) {
            self.failures = 0;
            self.connect(now.boot);
        }
    }

    fn poll_output(&mut self) -> Option<Output> {
        self.outputs.iter_mut().find_map(Option::take)
    }

    fn poll_timeout(&self) -> Option<Instant> {
        Some(match self.state {
            State::Waiting { until } => until,
            State::Connecting { asked, .. } => asked + CONNECT_TIMEOUT,
            State::Online { heard, .. } => heard + SILENCE,
        })
    }
}
