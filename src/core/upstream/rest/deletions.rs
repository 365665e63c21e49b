//! Things to be deleted at a server: acknowledged messages, registrations nobody wants. Bounded, a few at a time, tried
//! again; what is forgotten on the way comes again and is deleted then.

use std::{
    collections::{BTreeMap, HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use rand_chacha::ChaCha12Rng;

use super::{Fault, outcome};
use crate::{
    action::HttpRequest,
    core::upstream::{LinkIds, backoff::Backoff},
    event::{HttpError, HttpResponse, HttpTicket},
    time::{Instant, earliest},
};

/// Waiting at most; of more the oldest is forgotten.
const LIMIT: usize = 4096;
/// Under way at a time.
const WINDOW: usize = 4;
/// Tries of one before it is forgotten.
const TRIES: u32 = 6;
/// The shell answers within 30 s; an answer later than this is taken for none.
const ANSWER_WITHIN: Duration = Duration::from_secs(40);
/// Bytes of an answer looked at.
const ANSWER_LIMIT: u32 = 16 * 1024;

/// The queue.
#[derive(Debug, Default)]
pub(crate) struct Deletions {
    queue: VecDeque<Deletion>,
    known: HashSet<Arc<str>>,
    under_way: BTreeMap<HttpTicket, (Deletion, Instant)>,
    backoff: Backoff,
}

#[derive(Debug)]
struct Deletion {
    path: Arc<str>,
    tries: u32,
}

impl Deletions {
    /// Delete what is at this path below the base URL, unless that is under way already.
    pub(crate) fn add(&mut self, path: impl Into<Arc<str>>) {
        let path = path.into();
        if !self.known.insert(Arc::clone(&path)) {
            return;
        }
        if self.queue.len() == LIMIT
            && let Some(oldest) = self.queue.pop_front()
        {
            self.known.remove(&oldest.path);
        }
        self.queue.push_back(Deletion { path, tries: 0 });
    }

    /// The next request to make now, if any. While the server fails it is tried with one at a time.
    pub(crate) fn next(&mut self, now: Instant, ids: &mut LinkIds) -> Option<(HttpTicket, HttpRequest)> {
        let (window, early) = match self.backoff.retry_at() {
            Some(at) => (1, at > now),
            None => (WINDOW, false),
        };
        if early || self.under_way.len() >= window {
            return None;
        }
        let mut deletion = self.queue.pop_front()?;
        deletion.tries += 1;
        let ticket = ids.take_request();
        let request =
            HttpRequest { method: "DELETE", path: deletion.path.to_string(), json: None, limit: ANSWER_LIMIT };
        self.under_way.insert(ticket, (deletion, now + ANSWER_WITHIN));
        Some((ticket, request))
    }

    /// Whether the request is one of these.
    pub(crate) fn owns(&self, ticket: HttpTicket) -> bool {
        self.under_way.contains_key(&ticket)
    }

    /// A request of these ended; `gone` when its answer says that there is no such thing.
    pub(crate) fn answered(
        &mut self,
        ticket: HttpTicket,
        result: Result<HttpResponse, HttpError>,
        gone: bool,
        now: Instant,
        rng: &mut ChaCha12Rng,
    ) {
        let Some((deletion, _)) = self.under_way.remove(&ticket) else {
            return;
        };
        let wish = match outcome(result) {
            _ if gone => return self.done(&deletion),
            Ok(_) | Err(Fault::Refused(_)) => return self.done(&deletion),
            Err(Fault::Busy(_, wish)) => wish,
            Err(Fault::Credentials(_) | Fault::Unreachable(_)) => None,
        };
        self.again(deletion);
        self.backoff.failed(wish, now, rng);
    }

    /// Takes requests for unanswered that have been under way for too long.
    pub(crate) fn expire(&mut self, now: Instant, rng: &mut ChaCha12Rng) {
        let late: Vec<_> = self.under_way.iter().filter(|(_, (_, by))| *by <= now).map(|(ticket, _)| *ticket).collect();
        for ticket in late {
            if let Some((deletion, _)) = self.under_way.remove(&ticket) {
                self.again(deletion);
                self.backoff.failed(None, now, rng);
            }
        }
    }

    /// The network came back.
    pub(crate) fn at_once(&mut self, now: Instant) {
        if self.backoff.retry_at().is_some() {
            self.backoff.at_once(now);
        }
    }

    /// When [`Deletions::next`] or [`Deletions::expire`] has something to do; `allowed` is whether requests may be made.
    pub(crate) fn due(&self, allowed: bool) -> Option<Instant> {
        let late = self.under_way.values().map(|(_, by)| *by).min();
        let idle = allowed && self.under_way.is_empty() && !self.queue.is_empty();
        earliest(late, self.backoff.retry_at().filter(|_| idle))
    }

    fn done(&mut self, deletion: &Deletion) {
        self.known.remove(&deletion.path);
        self.backoff.succeeded();
        self.backoff.clear();
    }

    fn again(&mut self, deletion: Deletion) {
        if deletion.tries < TRIES && self.queue.len() < LIMIT {
            self.queue.push_front(deletion);
        } else {
            log::debug!("a deletion is given up; what is left at the server comes again or costs nothing");
            self.known.remove(&deletion.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use rand_chacha::rand_core::SeedableRng;

    use super::*;

    struct World {
        deletions: Deletions,
        ids: LinkIds,
        rng: ChaCha12Rng,
        now: Instant,
    }

    impl World {
        fn new() -> Self {
            Self {
                deletions: Deletions::default(),
                ids: LinkIds::new(0),
                rng: ChaCha12Rng::from_seed([1; 32]),
                now: Instant::from_nanos(1_000_000_000_000),
            }
        }

        fn asked(&mut self) -> Vec<(HttpTicket, String)> {
            std::iter::from_fn(|| self.deletions.next(self.now, &mut self.ids)).map(|(t, r)| (t, r.path)).collect()
        }

        fn answer(&mut self, ticket: HttpTicket, status: u16) {
            let answer = Ok(HttpResponse { status, body: String::new(), retry_after: None });
            self.deletions.answered(ticket, answer, false, self.now, &mut self.rng);
        }
    }

    #[test]
    fn a_few_at_a_time_each_once_in_order() {
        let mut world = World::new();
        for n in [0, 1, 2, 3, 4, 5, 0, 5] {
            world.deletions.add(format!("m/{n}"));
        }
        let asked = world.asked();
        assert_eq!(asked.iter().map(|(_, path)| path.as_str()).collect::<Vec<_>>(), ["m/0", "m/1", "m/2", "m/3"]);
        world.answer(asked[0].0, 200);
        world.answer(asked[1].0, 404);
        assert_eq!(world.asked().len(), 2);
        assert_eq!(world.asked(), []);
        world.deletions.add("m/0");
        assert_eq!(world.deletions.queue.len(), 1, "it may be asked for again once it is done");
    }

    #[test]
    fn failures_are_tried_again_one_at_a_time_with_pauses_and_given_up_in_the_end() {
        let mut world = World::new();
        world.deletions.add("m/0");
        world.deletions.add("m/1");
        for _ in 0..2 {
            let asked = world.asked();
            world.answer(asked[0].0, 503);
            if let Some((other, _)) = asked.get(1) {
                world.answer(*other, 200);
            }
        }
        let mut tries = 2;
        while let Some(at) = world.deletions.due(true) {
            assert_eq!(world.asked(), [], "not before its time");
            assert_eq!(world.deletions.due(false), None, "nothing is due when nothing may be asked");
            world.now = at;
            let asked = world.asked();
            assert_eq!(asked.len(), 1);
            tries += 1;
            world.answer(asked[0].0, 503);
        }
        assert_eq!(tries, TRIES);
        assert!(world.deletions.known.is_empty());
    }

    #[test]
    fn no_answer_is_a_failure_and_the_queue_is_bounded() {
        let mut world = World::new();
        for n in 0..2 * LIMIT {
            world.deletions.add(format!("m/{n}"));
        }
        assert_eq!(world.deletions.queue.len(), LIMIT);
        assert_eq!(world.deletions.known.len(), LIMIT);
        let asked = world.asked();
        assert_eq!(asked[0].1, format!("m/{LIMIT}"), "the oldest are forgotten");
        world.now = world.deletions.due(true).unwrap();
        world.deletions.expire(world.now, &mut world.rng);
        assert!(!world.deletions.owns(asked[0].0));
        assert!(world.deletions.due(true).unwrap() > world.now);
    }
}
