//! One compositor's socket, read at the pace of people.

use std::{
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

use zruntime::{AsyncIo, Shared, SharedRuntime};

use super::{desk::Desk, session::Session};

/// Read in one go.
const CHUNK: usize = 4096;
/// What may be spent in one [`PERIOD`]: a byte read costs one, what the loop is told [`TOLD`]. Who goes beyond waits until it is
/// over; the busiest terminal's title does not come near.
const LIMIT: usize = 64 * 1024;
const TOLD: usize = 4 * 1024;
const PERIOD: Duration = Duration::from_millis(250);

/// Follows a compositor as long as it is there, or of use; tells the desk of it, and why it ended.
pub(super) async fn follow(name: &str, stream: UnixStream, desk: &Desk) -> String {
    // It is there, whatever it will say.
    desk.told(name, None);
    let ended = listen(name, stream, desk).await;
    desk.gone(name);
    ended
}

async fn listen(name: &str, stream: UnixStream, desk: &Desk) -> String {
    let opened = SharedRuntime::current().and_then(|runtime| Ok((AsyncIo::new(&runtime, stream)?, runtime)));
    let (socket, runtime) = match opened {
        Ok(opened) => opened,
        Err(error) => return error.to_string(),
    };
    let mut session = Session::new();
    let mut meter = Meter::new(Instant::now());
    loop {
        if let Err(error) = write(&socket, &session.outgoing()) {
            return error.to_string();
        }
        let mut buffer = [0; CHUNK];
        // File descriptors that come with it the kernel drops.
        let read = match socket.read_with(|mut socket| socket.read(&mut buffer)).await {
            Ok(0) => return "it is gone".into(),
            Ok(read) => read,
            Err(error) => return error.to_string(),
        };
        if let Err(error) = session.take(buffer.get(..read).unwrap_or_default()) {
            return error.to_string();
        }
        let told = session.news().is_some_and(|windows| desk.told(name, windows));
        if let Some(pause) = meter.spend(read + if told { TOLD } else { 0 }, Instant::now()) {
            runtime.sleep(pause).await;
        }
    }
}

/// All at once: what is asked is far less than a socket holds, unless nobody reads there.
fn write(socket: &AsyncIo<UnixStream, Shared>, bytes: &[u8]) -> io::Result<()> {
    let mut stream = socket.get_ref();
    stream.write_all(bytes).map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock => io::Error::other("it does not read what it is asked"),
        _ => error,
    })
}

/// Keeps who says very much from keeping us busy.
#[derive(Debug)]
struct Meter {
    begun: Instant,
    spent: usize,
}

impl Meter {
    fn new(now: Instant) -> Self {
        Self { begun: now, spent: 0 }
    }

    /// How long to wait before anything more is read, if at all.
    fn spend(&mut self, cost: usize, now: Instant) -> Option<Duration> {
        if now.saturating_duration_since(self.begun) >= PERIOD {
            *self = Self::new(now);
        }
        self.spent += cost;
        (self.spent >= LIMIT).then(|| (self.begun + PERIOD).saturating_duration_since(now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_says_little_never_waits_and_who_says_much_does() {
        let begun = Instant::now();
        let at = |millis: u64| begun + Duration::from_millis(millis);
        let mut meter = Meter::new(begun);
        // A window is activated every 20 ms.
        assert!((0..1000).all(|n| meter.spend(200 + TOLD, at(20 * n)).is_none()));
        let mut now = at(100_000);
        let mut read = 0;
        while now < at(110_000) {
            read += CHUNK;
            now += meter.spend(CHUNK, now).unwrap_or_default();
        }
        assert!(read <= 41 * (LIMIT + CHUNK), "{read}");
    }
}
