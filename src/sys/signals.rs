//! SIGTERM and SIGINT as readable bytes.

use std::{
    io::{self, Read},
    os::unix::net::UnixStream as StdStream,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use mio::{Interest, Registry, Token, event::Source, net::UnixStream};
use nix::sys::signal::{SigHandler, Signal, signal};
use signal_hook::{
    SigId,
    consts::{SIGHUP, SIGINT, SIGTERM},
    flag,
    low_level::{pipe, unregister},
};

/// The daemon's signals. Becomes readable when one came; they are the default ones again when this is dropped.
#[derive(Debug)]
pub struct Signals {
    reader: UnixStream,
    shutdown: Arc<AtomicBool>,
    hangup: Arc<AtomicBool>,
    registered: Vec<SigId>,
}

impl Signals {
    /// Takes SIGTERM, SIGINT and SIGHUP, and ignores SIGPIPE.
    ///
    /// # Errors
    /// When a handler or the pipe behind it cannot be made.
    pub fn new() -> io::Result<Self> {
        ignore_sigpipe()?;
        let (reader, writer) = StdStream::pair()?;
        reader.set_nonblocking(true)?;
        let mut signals = Self {
            reader: UnixStream::from_std(reader),
            shutdown: Arc::default(),
            hangup: Arc::default(),
            registered: Vec::with_capacity(6),
        };
        for (number, which) in [(SIGTERM, true), (SIGINT, true), (SIGHUP, false)] {
            let flag = if which { &signals.shutdown } else { &signals.hangup };
            // The flag before the byte: who reads the byte finds the flag set.
            let flag = flag::register(number, Arc::clone(flag))?;
            signals.registered.push(flag);
            signals.registered.push(pipe::register(number, writer.try_clone()?)?);
        }
        Ok(signals)
    }

    /// Whether the daemon was asked to end. To be called when it is readable.
    pub fn drain(&mut self) -> bool {
        let mut bytes = [0; 64];
        loop {
            match self.reader.read(&mut bytes) {
                Ok(1..) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(0) | Err(_) => break,
            }
        }
        if self.hangup.swap(false, Ordering::AcqRel) {
            log::info!("SIGHUP ignored: the configuration is read at the start only; restart to apply a change");
        }
        self.shutdown.swap(false, Ordering::AcqRel)
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        for id in self.registered.drain(..) {
            unregister(id);
        }
    }
}

impl Source for Signals {
    fn register(&mut self, registry: &Registry, token: Token, interests: Interest) -> io::Result<()> {
        self.reader.register(registry, token, interests)
    }

    fn reregister(&mut self, registry: &Registry, token: Token, interests: Interest) -> io::Result<()> {
        self.reader.reregister(registry, token, interests)
    }

    fn deregister(&mut self, registry: &Registry) -> io::Result<()> {
        self.reader.deregister(registry)
    }
}

#[expect(unsafe_code, reason = "sigaction has no safe wrapper")]
fn ignore_sigpipe() -> io::Result<()> {
    // SAFETY: SIG_IGN runs no code of ours.
    unsafe { signal(Signal::SIGPIPE, SigHandler::SigIgn) }?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use mio::{Events, Poll};
    use signal_hook::low_level::raise;

    use super::*;

    // One test: signals belong to the whole process.
    #[test]
    fn term_and_int_ask_to_end_and_hup_does_not() {
        let mut poll = Poll::new().unwrap();
        let mut events = Events::with_capacity(4);
        let mut signals = Signals::new().unwrap();
        poll.registry().register(&mut signals, Token(3), Interest::READABLE).unwrap();
        assert!(!signals.drain());
        for (number, ends) in [(SIGTERM, true), (SIGHUP, false), (SIGINT, true)] {
            raise(number).unwrap();
            poll.poll(&mut events, Some(Duration::from_secs(5))).unwrap();
            assert_eq!(events.iter().next().map(mio::event::Event::token), Some(Token(3)));
            assert_eq!(signals.drain(), ends);
            assert!(!signals.drain());
        }
        // More signals than the pipe can hold still end in one word.
        for _ in 0..10_000 {
            raise(SIGTERM).unwrap();
        }
        assert!(signals.drain());
        assert!(!signals.drain());
    }
}
