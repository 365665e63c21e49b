//! What all compositors of one user tell together, and what of it the loop has been told.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::session::{Listed, WINDOWS, listed};
use crate::sys::inbox::{Incoming, Sender};

/// One user's windows, by compositor.
#[derive(Clone, Debug)]
pub(super) struct Desk(Arc<Mutex<Windows>>);

#[derive(Debug)]
struct Windows {
    uid: u32,
    inbox: Sender,
    /// Nothing, where the compositor is there and does not tell.
    by_compositor: BTreeMap<Box<str>, Option<Vec<Listed>>>,
    /// There are compositors that nobody listens to.
    more: bool,
    told: Option<Vec<Listed>>,
    /// The user is logged out.
    closed: bool,
}

impl Desk {
    pub(super) fn new(uid: u32, inbox: Sender) -> Self {
        let by_compositor = BTreeMap::new();
        Self(Arc::new(Mutex::new(Windows { uid, inbox, by_compositor, more: false, told: None, closed: false })))
    }

    /// A compositor tells its windows; nothing: it tells none. True if that is news.
    pub(super) fn told(&self, compositor: &str, windows: Option<Vec<Listed>>) -> bool {
        let mut desk = self.lock();
        desk.by_compositor.insert(compositor.into(), windows);
        desk.tell()
    }

    /// A compositor is gone.
    pub(super) fn gone(&self, compositor: &str) {
        let mut desk = self.lock();
        desk.by_compositor.remove(compositor);
        desk.tell();
    }

    /// Whether there are compositors that nobody listens to.
    pub(super) fn more(&self, more: bool) {
        let mut desk = self.lock();
        desk.more = more;
        desk.tell();
    }

    /// The user is logged out: nothing is heard of the windows after this.
    pub(super) fn close(&self) {
        let mut desk = self.lock();
        desk.by_compositor.clear();
        desk.tell();
        desk.closed = true;
    }

    fn lock(&self) -> MutexGuard<'_, Windows> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Windows {
    fn tell(&mut self) -> bool {
        let windows = self.together();
        if self.closed || windows == self.told {
            return false;
        }
        match (&windows, &self.told) {
            (Some(_), None) => log::info!("the windows of user {} are known", self.uid),
            (None, Some(_)) => log::info!("the windows of user {} are not known any more", self.uid),
            _ => {}
        }
        self.told.clone_from(&windows);
        // False means that the loop is gone, and this thread about to end.
        self.inbox.send(Incoming::Windows { uid: self.uid, windows })
    }

    /// All windows. A compositor that does not tell beside one that does is one window that may be anybody's.
    fn together(&self) -> Option<Vec<Listed>> {
        let lists = || self.by_compositor.values();
        if !lists().any(Option::is_some) {
            return None;
        }
        let silent = self.more || lists().any(Option::is_none);
        let anybody = silent.then(|| listed("".into(), None, false, false));
        let mut windows: Vec<Listed> = lists().flatten().flatten().cloned().chain(anybody).collect();
        // In the order in which compositors make objects it would change without a window having changed.
        windows.sort_by(|(one, pid), (other, other_pid)| (&one.app_id, pid).cmp(&(&other.app_id, other_pid)));
        (windows.len() <= WINDOWS).then_some(windows)
    }
}

#[cfg(test)]
mod tests {
    use mio::{Poll, Token};

    use super::*;
    use crate::sys::inbox::{self, Inbox};

    fn next(inbox: &mut Inbox) -> Option<Option<Vec<String>>> {
        match inbox.take()? {
            Incoming::Windows { uid: 7, windows } => {
                Some(windows.map(|windows| windows.iter().map(|(window, _)| window.app_id.to_string()).collect()))
            }
            other => panic!("{other:?}"),
        }
    }

    fn names(names: &[&str]) -> Option<Vec<Listed>> {
        Some(names.iter().map(|name| listed((*name).into(), None, false, false)).collect())
    }

    fn some(names: &[&str]) -> Option<Option<Vec<String>>> {
        Some(Some(names.iter().map(ToString::to_string).collect()))
    }

    #[test]
    fn compositors_are_told_of_together_and_only_of_what_is_new() {
        let poll = Poll::new().unwrap();
        let (sender, mut inbox) = inbox::channel(poll.registry(), Token(0)).unwrap();
        let desk = Desk::new(7, sender);
        assert!(!desk.told("wayland-0", None));
        assert!(desk.told("wayland-1", names(&["b", "a"])));
        assert!(!desk.told("wayland-1", names(&["a", "b"])));
        assert_eq!(next(&mut inbox), some(&["", "a", "b"]), "the other may have anybody's");
        desk.told("wayland-0", names(&["c"]));
        assert_eq!(next(&mut inbox), some(&["a", "b", "c"]));
        desk.more(true);
        assert_eq!(next(&mut inbox), some(&["", "a", "b", "c"]));
        desk.more(false);
        desk.gone("wayland-0");
        desk.gone("wayland-1");
        for expected in [some(&["a", "b", "c"]), some(&["a", "b"]), Some(None), None] {
            assert_eq!(next(&mut inbox), expected);
        }
        desk.told("wayland-1", names(&["x"; WINDOWS]));
        desk.told("wayland-0", names(&["y"]));
        assert!(next(&mut inbox).unwrap().is_some());
        assert_eq!(next(&mut inbox), Some(None), "too many");
        desk.told("wayland-0", names(&[]));
        desk.close();
        desk.told("wayland-0", names(&["late"]));
        assert!(next(&mut inbox).unwrap().is_some());
        assert_eq!((next(&mut inbox), next(&mut inbox)), (Some(None), None));
    }
}
