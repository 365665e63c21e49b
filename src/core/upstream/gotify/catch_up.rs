//! What was stored while there was no link, in the order it was sent, together with what comes live meanwhile.
//!
//! Gotify pages backwards: newest first, `since=<id>` for those before. So a walk goes back page by page to the last id
//! that need not come again, and hands on from there. Only this session's messages are kept on the way, and of those only
//! so many: of a longer backlog the oldest, after which the walk is made again for the rest. Messages that come over the
//! stream meanwhile wait; the stream was subscribed before the first page was asked for, so nothing is between the two.
//! Ids are given in the order of storing, which makes one order of both.

use std::collections::BTreeMap;

use super::wire::{Message, Page};

/// Messages on a page; the server's own limit is 200.
const PAGE: u32 = 100;
/// Pages of one walk; what is older is left at the server.
const PAGES: u32 = 100;
/// Messages kept of one walk.
pub(super) const KEPT: usize = 256;
/// Live messages that wait for the walk to end; of more the newest are left for another walk.
const WAITING: usize = 256;
/// How far behind the newest id the next walk goes: messages stored at the same time may be sent in another order.
const OVERLAP: u64 = 64;

/// One walk, or several until nothing is left.
#[derive(Debug)]
pub(super) struct CatchUp {
    /// Ids up to here need not come again.
    floor: u64,
    /// The id before which the next page begins; `None` for the first.
    before: Option<u64>,
    limit: u32,
    pages: u32,
    newest: Option<u64>,
    kept: BTreeMap<u64, Message>,
    live: BTreeMap<u64, Message>,
    /// More was found than kept.
    again: bool,
}

/// What a page led to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// Ask for the next page.
    More,
    /// These, oldest first, and then another walk.
    Part(Vec<Message>),
    /// These, oldest first, and it is done: everything up to this id is known.
    Done(Vec<Message>, u64),
}

impl CatchUp {
    /// From everything up to `known`; `None` when there is nothing to look for, only the newest id.
    pub(super) fn new(known: Option<u64>) -> Self {
        Self {
            floor: known.map_or(u64::MAX, |known| known.saturating_sub(OVERLAP)),
            before: None,
            limit: if known.is_some() { PAGE } else { 1 },
            pages: 0,
            newest: None,
            kept: BTreeMap::new(),
            live: BTreeMap::new(),
            again: false,
        }
    }

    /// The page to ask for.
    pub(super) fn path(&self) -> String {
        match self.before {
            None => format!("message?limit={}", self.limit),
            Some(before) => format!("message?limit={}&since={before}", self.limit),
        }
    }

    /// A live message: it has to wait.
    pub(super) fn wait(&mut self, message: Message) {
        self.live.insert(message.id, message);
        if self.live.len() > WAITING {
            self.live.pop_last();
            self.again = true;
        }
    }

    /// The page was too large. False when it cannot be made smaller.
    pub(super) const fn shrink(&mut self) -> bool {
        self.limit /= 2;
        self.limit > 0
    }

    /// A page came; `wanted` says whose messages are kept.
    pub(super) fn page(&mut self, page: Page, wanted: impl Fn(&Message) -> bool) -> Progress {
        let first = self.pages == 0;
        self.pages += 1;
        let oldest = page.messages.iter().map(|message| message.id).min();
        if first {
            let newest = page.messages.iter().map(|message| message.id).max();
            self.newest = self.newest.max(newest);
            if newest.is_some_and(|newest| newest < self.floor) && self.floor != u64::MAX {
                // The server counts anew, or has deleted its newest. Which of these are old cannot be told by the id.
                self.floor = 0;
                self.pages = PAGES;
            }
        }
        for message in page.messages {
            if message.id > self.floor && wanted(&message) {
                self.kept.insert(message.id, message);
                if self.kept.len() > KEPT {
                    self.kept.pop_last();
                    self.again = true;
                }
            }
        }
        let stuck = oldest.is_none() || self.before.is_some_and(|before| oldest >= Some(before));
        if page.more && !stuck && oldest > Some(self.floor.saturating_add(1)) {
            if self.pages < PAGES {
                self.before = oldest;
                return Progress::More;
            }
            log::warn!("the server has more stored messages than are looked through; the oldest are left there");
        }
        self.finish()
    }

    /// What has been found is all that can be had.
    pub(super) fn finish(&mut self) -> Progress {
        let mut found = std::mem::take(&mut self.kept);
        if std::mem::take(&mut self.again) {
            // Without any the live ones alone were too many, and all that was stored is known.
            let known = found.keys().next_back().copied().or(self.newest).unwrap_or(0);
            let later = self.live.split_off(&(known.saturating_add(1)));
            found.extend(std::mem::replace(&mut self.live, later));
            (self.floor, self.before, self.pages, self.limit) = (known, None, 0, PAGE);
            return Progress::Part(found.into_values().collect());
        }
        found.extend(std::mem::take(&mut self.live));
        let newest = self.newest.max(found.keys().next_back().copied()).unwrap_or(0);
        Progress::Done(found.into_values().collect(), newest)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::core::upstream::IncomingBody;

    fn message(id: u64, application: u64) -> Message {
        let body = IncomingBody::Bytes([].as_slice().into());
        Message { id, application, body, urgency: None }
    }

    /// The server's answer to a path.
    fn answer(stored: &BTreeMap<u64, u64>, path: &str) -> Page {
        let number = |name: &str| {
            let at = path.split_once(&format!("{name}="))?.1;
            at.split('&').next()?.parse::<u64>().ok()
        };
        let (limit, since) = (number("limit").unwrap() as usize, number("since").unwrap_or(u64::MAX));
        let before: Vec<_> = stored.range(..since).rev().take(limit + 1).map(|(id, app)| message(*id, *app)).collect();
        let more = before.len() > limit;
        Page { messages: before.into_iter().take(limit).collect(), more }
    }

    #[test]
    fn without_anything_to_look_for_one_message_tells_the_newest_id() {
        let stored = BTreeMap::from([(3, 1), (9, 1)]);
        let mut walk = CatchUp::new(None);
        assert_eq!(walk.path(), "message?limit=1");
        let page = answer(&stored, &walk.path());
        assert_eq!(walk.page(page, |_| true), Progress::Done(vec![], 9));
        let mut walk = CatchUp::new(None);
        walk.wait(message(12, 1));
        assert_eq!(
            walk.page(Page { messages: vec![], more: false }, |_| true),
            Progress::Done(vec![message(12, 1)], 12)
        );
    }

    #[test]
    fn a_server_that_counts_anew_is_looked_at_once() {
        let stored: BTreeMap<u64, u64> = (1..=500).map(|id| (id, 1)).collect();
        let mut walk = CatchUp::new(Some(100_000));
        let page = answer(&stored, &walk.path());
        let Progress::Done(messages, newest) = walk.page(page, |_| true) else { panic!() };
        assert_eq!((messages.len(), newest), (100, 500));
    }

    #[test]
    fn pages_shrink_down_to_one_message() {
        let mut walk = CatchUp::new(Some(0));
        let mut sizes = vec![walk.path()];
        while walk.shrink() {
            sizes.push(walk.path());
        }
        assert_eq!(sizes.len(), 7);
        assert_eq!(sizes.last().unwrap(), "message?limit=1");
    }

    #[test]
    fn a_server_that_repeats_itself_is_left() {
        let mut walk = CatchUp::new(Some(0));
        let page = || Page { messages: vec![message(500, 1), message(499, 1)], more: true };
        assert_eq!(walk.page(page(), |_| false), Progress::More);
        assert_eq!(walk.page(page(), |_| false), Progress::Done(vec![], 500));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        /// Live messages come in between pages, many are other applications', and backlogs are longer than what is kept.
        #[test]
        fn nothing_is_lost_doubled_or_out_of_order(
            old in prop::collection::vec(0_u64..4, 0..1200),
            known in 0_u64..400,
            live in prop::collection::vec((any::<bool>(), 0_u64..40), 1..40),
        ) {
            let mut stored: BTreeMap<u64, u64> = old.iter().enumerate().map(|(n, app)| (n as u64 + 1, *app)).collect();
            let known = known.min(stored.len() as u64);
            let wanted = |message: &Message| message.application != 0;
            let mut expected: BTreeSet<u64> =
                stored.iter().filter(|(id, app)| **id > known && **app != 0).map(|(id, _)| *id).collect();
            let mut walk = CatchUp::new(Some(known));
            let (mut handed, mut live) = (Vec::new(), live.into_iter().cycle());
            for turn in 0.. {
                prop_assert!(turn < 500, "it ends");
                let page = answer(&stored, &walk.path());
                prop_assert!(walk.kept.len() <= KEPT && walk.live.len() <= WAITING);
                // Stored and sent before or after the page is read, while it is on its way.
                let (_, burst) = live.next().unwrap();
                for _ in 0..if turn < 20 { burst } else { 0 } {
                    let id = stored.len() as u64 + 1;
                    stored.insert(id, 1);
                    expected.insert(id);
                    walk.wait(message(id, 1));
                }
                match walk.page(page, wanted) {
                    Progress::More => {}
                    Progress::Part(messages) => handed.extend(messages),
                    Progress::Done(messages, newest) => {
                        handed.extend(messages);
                        prop_assert!(newest <= stored.len() as u64);
                        break;
                    }
                }
            }
            let ids: Vec<u64> = handed.iter().map(|message| message.id).collect();
            prop_assert!(ids.is_sorted_by(|a, b| a < b), "{ids:?}");
            let ids: BTreeSet<u64> = ids.into_iter().collect();
            let lost: Vec<_> = expected.difference(&ids).collect();
            prop_assert!(lost.is_empty(), "{lost:?} lost");
            prop_assert!(ids.iter().all(|id| *id + OVERLAP > known), "older than asked for");
        }
    }
}
