//! A user's bus belongs to that user, who may put anything in its place. So of what comes over it no file descriptors are
//! taken, and no message that has any, and none larger than any that we have a use for: they are read past. File descriptors
//! go over it (leases).
//!
//! The bus is told that file descriptors may come all the same: dbus-broker cuts a connection off that may not have them
//! and is sent some in a reply, which any app could do. Closing one can wait for whoever made it (FUSE, SO_LINGER), so they
//! are closed on a thread of their own, one for each user. It has a bound; beyond it the connection ends.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::{
        fd::{BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::{Arc, Mutex, PoisonError},
    thread,
};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use zbus::{
    Message,
    connection::socket::{ReadHalf, Socket, Split, WriteHalf},
    export::async_trait::async_trait,
};
use zruntime::{AsyncIo, Shared, SharedRuntime};

/// Largest message taken, in bytes: some times the largest request there is.
const LARGEST: u64 = 256 * 1024;
/// Largest message there can be.
const MAXIMUM: u64 = 128 * 1024 * 1024;
/// File descriptors in one message at most: the kernel's bound (SCM_MAX_FD).
const DESCRIPTORS: usize = 253;
/// File descriptors waiting to be closed at most.
const UNCLOSED: usize = 256;
/// For a thread that closes files.
const STACK: usize = 64 * 1024;
/// What comes before the rest of a message and tells its length (D-Bus specification, "Message Format").
const HEADER: usize = 16;

/// The stream to a bus that is not trusted.
#[derive(Debug)]
pub(super) struct Guarded {
    stream: Arc<AsyncIo<UnixStream, Shared>>,
    closer: Closer,
    strict: bool,
}

impl Guarded {
    /// Switches the stream to non-blocking mode. `strict`: what is not taken is an error, instead of being read past.
    pub(super) fn new(stream: UnixStream, closer: Closer, strict: bool) -> io::Result<Self> {
        Ok(Self { stream: Arc::new(AsyncIo::new(&SharedRuntime::current()?, stream)?), closer, strict })
    }
}

/// Closes what nobody asked for, where nobody waits for it.
#[derive(Clone, Debug, Default)]
pub(super) struct Closer(Arc<Mutex<Closing>>);

#[derive(Debug, Default)]
struct Closing {
    waiting: Vec<OwnedFd>,
    running: bool,
}

impl Closer {
    fn take(&self, fds: Vec<OwnedFd>) -> io::Result<()> {
        if fds.is_empty() {
            return Ok(());
        }
        log::debug!("{} file descriptors came that nobody asked for", fds.len());
        let mut closing = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Also beyond the bound, for here they cannot be closed.
        closing.waiting.extend(fds);
        if closing.waiting.len() > UNCLOSED {
            return Err(io::Error::other("too many file descriptors came that nobody asked for"));
        }
        if !closing.running {
            let own = self.clone();
            thread::Builder::new().name("closing".into()).stack_size(STACK).spawn(move || own.close_all())?;
            closing.running = true;
        }
        Ok(())
    }

    fn close_all(&self) {
        loop {
            let mut closing = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let fds = std::mem::take(&mut closing.waiting);
            closing.running = !fds.is_empty();
            if fds.is_empty() {
                return;
            }
            drop(closing);
            drop(fds);
        }
    }
}

impl Socket for Guarded {
    type ReadHalf = Reader;
    type WriteHalf = Writer;

    fn split(self) -> Split<Reader, Writer> {
        let reader = Reader { bare: Bare(Arc::clone(&self.stream), self.closer), strict: self.strict };
        Split::new(reader, Writer(self.stream))
    }
}

/// Lets no message through that is too large.
#[derive(Debug)]
pub(super) struct Reader {
    bare: Bare,
    strict: bool,
}

#[async_trait]
impl ReadHalf for Reader {
    async fn receive_message(
        &mut self,
        seq: u64,
        received: &mut Vec<u8>,
        fds: &mut Vec<OwnedFd>,
    ) -> zbus::Result<Message> {
        loop {
            self.skip_large(received).await?;
            match self.bare.receive_message(seq, received, fds).await {
                // It has been read to its end by then.
                Err(zbus::Error::MissingParameter(_)) if !self.strict => {
                    log::debug!("a message with file descriptors was not taken")
                }
                other => return other,
            }
        }
    }

    async fn recvmsg(&mut self, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
        self.bare.recvmsg(buffer).await
    }

    /// By this the bus is asked whether it passes them, in either direction.
    fn can_pass_unix_fd(&self) -> bool {
        true
    }
}

impl Reader {
    /// Until the next message is one that is taken. Its first bytes are in `received` then.
    async fn skip_large(&mut self, received: &mut Vec<u8>) -> zbus::Result<()> {
        loop {
            while received.len() < HEADER {
                let mut buffer = [0; HEADER];
                let wanted = buffer.get_mut(received.len()..).unwrap_or_default();
                let length = self.bare.some(wanted).await?;
                received.extend_from_slice(wanted.get(..length).unwrap_or_default());
            }
            match length_of(received) {
                Some(length) if length <= LARGEST => return Ok(()),
                Some(length) if length <= MAXIMUM && !self.strict => self.skip(length, received).await?,
                _ => return Err(zbus::Error::InvalidReply),
            }
        }
    }

    /// Reads past a message of which some has been received.
    async fn skip(&mut self, length: u64, received: &mut Vec<u8>) -> io::Result<()> {
        let begun = received.len().min(usize::try_from(length).unwrap_or(usize::MAX));
        received.drain(..begun);
        let mut left = length - begun as u64;
        let mut buffer = vec![0; 4096];
        while left > 0 {
            let most = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
            left -= self.bare.some(buffer.get_mut(..most).unwrap_or_default()).await? as u64;
        }
        log::debug!("a message of {length} bytes is of no use and was not read");
        Ok(())
    }
}

/// Reads bytes; file descriptors that come with them are closed.
#[derive(Debug)]
struct Bare(Arc<AsyncIo<UnixStream, Shared>>, Closer);

impl Bare {
    /// At least one byte.
    async fn some(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.recvmsg(buffer).await? {
            (0, _) => Err(io::Error::from(io::ErrorKind::UnexpectedEof)),
            (length, _) => Ok(length),
        }
    }
}

#[async_trait]
impl ReadHalf for Bare {
    async fn recvmsg(&mut self, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
        let read = self.0.read_with(|stream| {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let mut buffer = [IoSliceMut::new(buffer)];
            let read = recvmsg(stream, &mut buffer, &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
            let mut came = Vec::new();
            for message in ancillary.drain() {
                if let RecvAncillaryMessage::ScmRights(fds) = message {
                    came.extend(fds);
                }
            }
            Ok((read.bytes, came))
        });
        let (bytes, came) = read.await?;
        self.1.take(came)?;
        Ok((bytes, Vec::new()))
    }
}

/// Writes bytes, and file descriptors with the first of them.
#[derive(Debug)]
pub(super) struct Writer(Arc<AsyncIo<UnixStream, Shared>>);

#[async_trait]
impl WriteHalf for Writer {
    async fn sendmsg(&mut self, buffer: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
        let write = self.0.write_with(|stream| {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
                return Err(io::Error::from(io::ErrorKind::InvalidInput));
            }
            Ok(sendmsg(stream, &[IoSlice::new(buffer)], &mut ancillary, SendFlags::NOSIGNAL)?)
        });
        write.await
    }

    fn can_pass_unix_fd(&self) -> bool {
        true
    }

    async fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }

    async fn close(&mut self) -> io::Result<()> {
        self.0.get_ref().shutdown(std::net::Shutdown::Both)
    }
}

/// The length of the message that begins with `header`; `None` for what is no message.
fn length_of(header: &[u8]) -> Option<u64> {
    let number = |at: usize| -> Option<u64> {
        let bytes: [u8; 4] = header.get(at..at + 4)?.try_into().ok()?;
        match header.first()? {
            b'l' => Some(u32::from_le_bytes(bytes).into()),
            b'B' => Some(u32::from_be_bytes(bytes).into()),
            _ => None,
        }
    };
    Some(HEADER as u64 + number(12)?.next_multiple_of(8) + number(4)?)
}

#[cfg(test)]
mod tests {
    use std::{
        io::{PipeWriter, Read, Write, pipe},
        os::fd::AsFd,
        time::{Duration, Instant},
    };

    use super::*;

    fn write_with_fds(stream: &UnixStream, bytes: &[u8], ends: &[PipeWriter]) {
        let fds: Vec<_> = ends.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
        let sent = sendmsg(stream, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::empty()).unwrap();
        assert_eq!(sent, bytes.len());
    }

    #[test]
    fn file_descriptors_that_come_are_closed_and_those_that_go_arrive() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (mut end, sent) = pipe().unwrap();
        let message = Message::method_call("/a", "B").build(&"text").unwrap();
        write_with_fds(&theirs, message.data(), &[sent.try_clone().unwrap(), sent]);
        let (mut our_end, ours_sent) = pipe().unwrap();
        zbus::block_on(async {
            let (mut reader, mut writer) = Guarded::new(ours, Closer::default(), false).unwrap().split().take();
            let read = reader.receive_message(1, &mut Vec::new(), &mut Vec::new()).await.unwrap();
            assert_eq!(read.body().deserialize::<&str>().unwrap(), "text");
            assert!(read.data().fds().is_empty());
            // Nobody can write into it any more, so this ends.
            assert_eq!(end.read(&mut [0]).unwrap(), 0);
            let message = Message::method_call("/a", "B").build(&zbus::Fd::from(OwnedFd::from(ours_sent))).unwrap();
            writer.send_message(&message).await.unwrap();
        });
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut buffer = [0; 256];
        recvmsg(&theirs, &mut [IoSliceMut::new(&mut buffer)], &mut ancillary, RecvFlags::empty()).unwrap();
        let came: Vec<OwnedFd> = ancillary
            .drain()
            .flat_map(|message| match message {
                RecvAncillaryMessage::ScmRights(fds) => fds.collect(),
                _ => Vec::new(),
            })
            .collect();
        let [came] = <[OwnedFd; 1]>::try_from(came).unwrap();
        std::fs::File::from(came).write_all(b"through it").unwrap();
        let mut text = String::new();
        our_end.read_to_string(&mut text).unwrap();
        assert_eq!(text, "through it");
    }

    /// Closing a socket with SO_LINGER waits for the other side, if that side does not read.
    #[test]
    fn what_takes_long_to_close_holds_nobody_up() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let lingering = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        let linger = Some(Duration::from_secs(20));
        rustix::net::sockopt::set_socket_linger(&lingering, linger).unwrap();
        lingering.set_nonblocking(true).unwrap();
        while (&lingering).write(&[0; 65536]).is_ok() {}
        lingering.set_nonblocking(false).unwrap();
        let closer = Closer::default();
        let begun = Instant::now();
        closer.take(vec![OwnedFd::from(lingering)]).unwrap();
        let (mut end, sent) = pipe().unwrap();
        let fill = |count: usize| (0..count).map(|_| OwnedFd::from(sent.try_clone().unwrap())).collect::<Vec<_>>();
        while !closer.0.lock().unwrap().waiting.is_empty() {
            thread::yield_now();
        }
        closer.take(fill(UNCLOSED)).unwrap();
        assert!(closer.take(fill(1)).is_err(), "there is a bound");
        assert!(begun.elapsed() < Duration::from_secs(10), "it was waited for: {:?}", begun.elapsed());
        // When that is over, so are all the others.
        drop(accepted);
        drop(sent);
        assert_eq!(end.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn the_length_is_read_from_the_header() {
        let message = Message::method_call("/a", "B").build(&("x".repeat(1000), 7_u8)).unwrap();
        let bytes = message.data();
        assert_eq!(length_of(bytes), Some(bytes.len() as u64));
        let mut huge = bytes.get(..HEADER).unwrap().to_vec();
        huge[4..8].fill(0xff);
        huge[12..16].fill(0xff);
        assert!(length_of(&huge).unwrap() > u64::from(u32::MAX));
        assert_eq!(length_of(b"x_______________"), None);
        assert_eq!(length_of(b"l"), None);
    }

    #[test]
    fn what_is_too_large_is_read_past() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let writing = thread::spawn(move || {
            let message = |text: &str| Message::method_call("/a", "B").build(&text).unwrap();
            theirs.write_all(message(&"x".repeat(1 << 20)).data()).unwrap();
            theirs.write_all(message("small").data()).unwrap();
            let mut header = message("").data().get(..HEADER).unwrap().to_vec();
            header[4..8].fill(0xff);
            theirs.write_all(&header).unwrap();
            theirs
        });
        zbus::block_on(async {
            let (mut reader, _writer) = Guarded::new(ours, Closer::default(), false).unwrap().split().take();
            let read = reader.receive_message(1, &mut Vec::new(), &mut Vec::new()).await.unwrap();
            assert_eq!(read.body().deserialize::<&str>().unwrap(), "small");
            assert!(reader.receive_message(2, &mut Vec::new(), &mut Vec::new()).await.is_err());
        });
        drop(writing.join().unwrap());
    }

    #[test]
    fn who_must_hear_everything_is_told_that_something_was_not_taken() {
        let large = Message::method_call("/a", "B").build(&"x".repeat(1 << 20)).unwrap();
        let with_fd =
            |stream: &UnixStream| Message::method_call("/a", "B").build(&zbus::Fd::from(stream.as_fd())).unwrap();
        for large in [Some(large), None] {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            let message = large.unwrap_or_else(|| with_fd(&ours));
            let writing = thread::spawn(move || theirs.write_all(message.data()));
            zbus::block_on(async {
                let (mut reader, _writer) = Guarded::new(ours, Closer::default(), true).unwrap().split().take();
                assert!(reader.receive_message(1, &mut Vec::new(), &mut Vec::new()).await.is_err());
            });
            // It was not read to its end.
            let _ = writing.join().unwrap();
        }
    }

    #[test]
    fn what_has_file_descriptors_is_read_past() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        // What came along is closed on the way to us whether it was there or not.
        let message = |fd| Message::method_call("/a", "B").build(&zbus::Fd::from(fd)).unwrap();
        theirs.write_all(message(ours.as_fd()).data()).unwrap();
        theirs.write_all(Message::method_call("/a", "B").build(&"next").unwrap().data()).unwrap();
        zbus::block_on(async {
            let (mut reader, _writer) = Guarded::new(ours, Closer::default(), false).unwrap().split().take();
            assert!(reader.can_pass_unix_fd());
            let read = reader.receive_message(1, &mut Vec::new(), &mut Vec::new()).await.unwrap();
            assert_eq!(read.body().deserialize::<&str>().unwrap(), "next");
        });
    }
}
