//! A user's bus belongs to that user, who may put anything in its place. So of what comes over it no file descriptors are
//! taken (closing one can wait for whoever made it: FUSE), and no message that has any, and none larger than any that we
//! have a use for: they are read past.
//!
//! The bus is told that file descriptors may come all the same: dbus-broker cuts a connection off that may not have them
//! and is sent some in a reply, which any app could do.

use std::{
    io::{self, Read, Write},
    os::{
        fd::{BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::Arc,
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
/// What comes before the rest of a message and tells its length (D-Bus specification, "Message Format").
const HEADER: usize = 16;

/// The stream to a bus that is not trusted.
#[derive(Debug)]
pub(super) struct Guarded {
    stream: Arc<AsyncIo<UnixStream, Shared>>,
    strict: bool,
}

impl Guarded {
    /// Switches the stream to non-blocking mode. `strict`: what is not taken is an error, instead of being read past.
    pub(super) fn new(stream: UnixStream, strict: bool) -> io::Result<Self> {
        Ok(Self { stream: Arc::new(AsyncIo::new(&SharedRuntime::current()?, stream)?), strict })
    }
}

impl Socket for Guarded {
    type ReadHalf = Reader;
    type WriteHalf = Writer;

    fn split(self) -> Split<Reader, Writer> {
        let reader = Reader { bare: Bare(Arc::clone(&self.stream)), strict: self.strict };
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

/// Reads bytes; file descriptors that come with them the kernel drops.
#[derive(Debug)]
struct Bare(Arc<AsyncIo<UnixStream, Shared>>);

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
        let read = self.0.read_with(|mut stream| stream.read(buffer)).await?;
        Ok((read, Vec::new()))
    }
}

/// Writes bytes.
#[derive(Debug)]
pub(super) struct Writer(Arc<AsyncIo<UnixStream, Shared>>);

#[async_trait]
impl WriteHalf for Writer {
    async fn sendmsg(&mut self, buffer: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
        if !fds.is_empty() {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        self.0.write_with(|mut stream| stream.write(buffer)).await
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
    use std::os::fd::AsFd;

    use super::*;

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
        let writing = std::thread::spawn(move || {
            let message = |text: &str| Message::method_call("/a", "B").build(&text).unwrap();
            theirs.write_all(message(&"x".repeat(1 << 20)).data()).unwrap();
            theirs.write_all(message("small").data()).unwrap();
            let mut header = message("").data().get(..HEADER).unwrap().to_vec();
            header[4..8].fill(0xff);
            theirs.write_all(&header).unwrap();
            theirs
        });
        zbus::block_on(async {
            let (mut reader, _writer) = Guarded::new(ours, false).unwrap().split().take();
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
            let writing = std::thread::spawn(move || theirs.write_all(message.data()));
            zbus::block_on(async {
                let (mut reader, _writer) = Guarded::new(ours, true).unwrap().split().take();
                assert!(reader.receive_message(1, &mut Vec::new(), &mut Vec::new()).await.is_err());
            });
            // It was not read to its end.
            let _ = writing.join().unwrap();
        }
    }

    #[test]
    fn what_has_file_descriptors_is_read_past() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        // What came along is lost on the way to us whether it was there or not: `read` takes bytes alone.
        let message = |fd| Message::method_call("/a", "B").build(&zbus::Fd::from(fd)).unwrap();
        theirs.write_all(message(ours.as_fd()).data()).unwrap();
        theirs.write_all(Message::method_call("/a", "B").build(&"next").unwrap().data()).unwrap();
        zbus::block_on(async {
            let (mut reader, _writer) = Guarded::new(ours, false).unwrap().split().take();
            assert!(reader.can_pass_unix_fd());
            let read = reader.receive_message(1, &mut Vec::new(), &mut Vec::new()).await.unwrap();
            assert_eq!(read.body().deserialize::<&str>().unwrap(), "next");
        });
    }
}
