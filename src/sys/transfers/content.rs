//! What an app hands over for an upload, through a pipe: nothing depends on the app or its files afterwards, and no file
//! descriptor of a user's is ever taken in.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsFd, OwnedFd},
    time::{Duration, Instant},
};

use nix::{
    fcntl::OFlag,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};

use super::{CHUNK, spool::Spool};
use crate::transfer::TransferId;

/// For the next bytes, and for all of them: an app is kept awake meanwhile.
const SILENCE: Duration = Duration::from_secs(30);
const LONGEST: Duration = Duration::from_secs(600);

/// The end to read from, and the one for the app.
pub(super) fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let (ours, theirs) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    Ok((ours, theirs))
}

/// Reads all of it into the spool and makes it durable; else why not, as a sentence.
pub(super) fn take(spool: &Spool, id: TransferId, from: OwnedFd, size: u64) -> Result<(), String> {
    if spool.room() < size {
        return Err("the disk has no room for it".into());
    }
    copy(spool, id, from, size).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof | io::ErrorKind::TimedOut | io::ErrorKind::InvalidData => error.to_string(),
        _ => format!("its content cannot be kept: {error}"),
    })
}

fn copy(spool: &Spool, id: TransferId, from: OwnedFd, size: u64) -> io::Result<()> {
    let mut file = spool.content(id)?;
    let mut from = File::from(from);
    let mut buffer = vec![0; CHUNK];
    let mut left = size;
    let end = Instant::now() + LONGEST;
    loop {
        let wait = SILENCE.min(end.saturating_duration_since(Instant::now()));
        let timeout = PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX);
        if poll(&mut [PollFd::new(from.as_fd(), PollFlags::POLLIN)], timeout)? == 0 {
            let text = format!("its content did not come to an end in time: {left} of {size} bytes are missing");
            return Err(io::Error::new(io::ErrorKind::TimedOut, text));
        }
        let got = match from.read(&mut buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            got => got?,
        };
        if got == 0 {
            break;
        }
        let Some(after) = left.checked_sub(got as u64) else {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("more than the {size} bytes came that were said"),
            ));
        };
        left = after;
        file.write_all(&buffer[..got])?;
    }
    if left > 0 {
        let text = format!("its content ended early: {left} of {size} bytes are missing");
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, text));
    }
    spool.sync(&file)
}
