//! Whether a call is ringing or under way: said by the system bus, of use on every session's.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
};

use async_channel::Receiver;
use futures_core::Stream;

/// The phone line, for everybody.
#[derive(Clone, Debug, Default)]
pub(super) struct Line(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    busy: bool,
    /// As many as there are session buses.
    listeners: Vec<async_channel::Sender<()>>,
}

impl Line {
    pub(super) fn set(&self, busy: bool) {
        let mut state = self.lock();
        if std::mem::replace(&mut state.busy, busy) != busy {
            log::debug!("a call is {}", if busy { "ringing or under way" } else { "no more" });
            for listener in &state.listeners {
                // Full means that it rings already.
                let _ = listener.try_send(());
            }
        }
    }

    pub(super) fn listen(&self) -> Listener {
        let (ring, rung) = async_channel::bounded(1);
        let mut state = self.lock();
        state.listeners.retain(|listener| !listener.is_closed());
        state.listeners.push(ring);
        Listener { line: self.clone(), rung: Box::pin(rung) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One end of it.
#[derive(Debug)]
pub(super) struct Listener {
    line: Line,
    // Pinned once and for all, to be polled as it is.
    rung: Pin<Box<Receiver<()>>>,
}

impl Listener {
    pub(super) fn is_busy(&self) -> bool {
        self.line.lock().busy
    }

    /// Waits for a change.
    pub(super) fn poll_changed(&mut self, context: &mut Context<'_>) -> Poll<()> {
        match self.rung.as_mut().poll_next(context) {
            Poll::Ready(Some(())) => Poll::Ready(()),
            Poll::Ready(None) | Poll::Pending => Poll::Pending,
        }
    }
}
