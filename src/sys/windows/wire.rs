//! Wayland's wire format (wayland.freedesktop.org, "Wire Format"), as far as a client needs it that neither sends nor takes
//! file descriptors.
//!
//! The `wayland-client` crate is not used here: on the other side is a socket that belongs to a user, and this process serves
//! all of them. wayland-backend 0.3.17 panics on `wl_display.error` with a null string (`handle_display_event`,
//! `unreachable!()`), which ends a daemon built with `panic = "abort"`, and keeps every file descriptor that nobody asked for
//! in a queue without a bound (`BufferedSocket::in_fds`).

use std::collections::BTreeSet;

/// Largest message there can be, in bytes (libwayland's `WL_MAX_MESSAGE_SIZE`).
const LARGEST: usize = 4096;
/// Object id and size with opcode.
const HEADER: usize = 8;
/// Ids of objects that are gone for us and not for the compositor; one that never says so is broken.
const ZOMBIES: usize = 4096;

/// It is not Wayland, or more than we take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Malformed;

/// An event.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Message<'a> {
    pub(super) object: u32,
    pub(super) opcode: u16,
    pub(super) args: Args<'a>,
}

/// The first message in `bytes` and its length, once all of it is there.
///
/// # Errors
/// When what is there cannot be the beginning of a message.
pub(super) fn message(bytes: &[u8]) -> Result<Option<(Message<'_>, usize)>, Malformed> {
    let Some(([object, second], rest)) = words(bytes) else { return Ok(None) };
    let length = (second >> 16) as usize;
    if object == 0 || !(HEADER..=LARGEST).contains(&length) || !length.is_multiple_of(4) {
        return Err(Malformed);
    }
    let opcode = u16::try_from(second & 0xffff).map_err(|_| Malformed)?;
    Ok(rest.get(..length - HEADER).map(|args| (Message { object, opcode, args: Args(args) }, length)))
}

/// The arguments of a message that have not been read yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Args<'a>(&'a [u8]);

impl<'a> Args<'a> {
    /// An unsigned number, an object or a new id.
    pub(super) fn uint(&mut self) -> Result<u32, Malformed> {
        let ([word], rest) = words(self.0).ok_or(Malformed)?;
        self.0 = rest;
        Ok(word)
    }

    /// A signed number.
    pub(super) fn int(&mut self) -> Result<i32, Malformed> {
        self.uint().map(u32::cast_signed)
    }

    /// A string without its end; nothing where it is null.
    pub(super) fn string(&mut self) -> Result<&'a [u8], Malformed> {
        let text = self.array()?;
        match text.split_last() {
            Some((0, text)) => Ok(text),
            Some(_) => Err(Malformed),
            None => Ok(text),
        }
    }

    /// An array.
    pub(super) fn array(&mut self) -> Result<&'a [u8], Malformed> {
        let length = self.uint()? as usize;
        let (padded, rest) = self.0.split_at_checked(length.next_multiple_of(4)).ok_or(Malformed)?;
        self.0 = rest;
        padded.get(..length).ok_or(Malformed)
    }
}

/// The numbers in an array.
pub(super) fn numbers(array: &[u8]) -> impl Iterator<Item = u32> {
    array.as_chunks().0.iter().copied().map(u32::from_ne_bytes)
}

fn words<const N: usize>(bytes: &[u8]) -> Option<([u32; N], &[u8])> {
    let (words, _) = bytes.as_chunks::<4>();
    let words = words.first_chunk::<N>()?.map(u32::from_ne_bytes);
    Some((words, bytes.get(4 * N..)?))
}

/// An argument of a request.
#[derive(Clone, Copy, Debug)]
pub(super) enum Arg<'a> {
    Uint(u32),
    Str(&'a str),
}

/// Requests to be sent, and the ids of objects made by them.
#[derive(Debug)]
pub(super) struct Requests {
    bytes: Vec<u8>,
    next: u32,
    free: Vec<u32>,
    zombies: BTreeSet<u32>,
}

impl Requests {
    /// Nothing to be sent; `first` is the first id given out.
    pub(super) fn new(first: u32) -> Self {
        Self { bytes: Vec::new(), next: first, free: Vec::new(), zombies: BTreeSet::new() }
    }

    /// Asks `object` for something.
    pub(super) fn push(&mut self, object: u32, opcode: u16, args: &[Arg<'_>]) {
        let begin = self.bytes.len();
        self.bytes.extend(object.to_ne_bytes());
        self.bytes.extend([0; 4]);
        for arg in args {
            match arg {
                Arg::Uint(number) => self.bytes.extend(number.to_ne_bytes()),
                Arg::Str(text) => {
                    let length = text.len() + 1;
                    self.bytes.extend(u32::try_from(length).unwrap_or_default().to_ne_bytes());
                    self.bytes.extend(text.as_bytes());
                    self.bytes.resize(self.bytes.len() + length.next_multiple_of(4) - text.len(), 0);
                }
            }
        }
        let length = u32::try_from(self.bytes.len() - begin).unwrap_or_default();
        if let Some(place) = self.bytes.get_mut(begin + 4..begin + HEADER) {
            place.copy_from_slice(&(length << 16 | u32::from(opcode)).to_ne_bytes());
        }
    }

    /// An id for a new object.
    pub(super) fn id(&mut self) -> u32 {
        self.free.pop().unwrap_or_else(|| {
            let id = self.next;
            self.next = id.wrapping_add(1);
            id
        })
    }

    /// The object with this id, one of ours, is gone for us.
    ///
    /// # Errors
    /// When too many are.
    pub(super) fn retire(&mut self, id: u32) -> Result<(), Malformed> {
        self.zombies.insert(id);
        if self.zombies.len() > ZOMBIES { Err(Malformed) } else { Ok(()) }
    }

    /// The compositor will not mention this id any more.
    pub(super) fn deleted(&mut self, id: u32) {
        if self.zombies.remove(&id) {
            self.free.push(id);
        }
    }

    /// What is to be sent.
    pub(super) fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.bytes)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// An event as a compositor would send it.
    pub(in super::super) fn event(object: u32, opcode: u16, args: &[Arg<'_>]) -> Vec<u8> {
        let mut requests = Requests::new(2);
        requests.push(object, opcode, args);
        requests.take()
    }

    #[test]
    fn what_is_written_is_read() {
        for text in ["", "a", "abc", "abcd", "ünïcödé"] {
            let bytes = event(7, 3, &[Arg::Uint(9), Arg::Str(text), Arg::Uint(u32::MAX)]);
            let (message, length) = message(&bytes).unwrap().unwrap();
            assert_eq!((message.object, message.opcode, length), (7, 3, bytes.len()));
            let mut args = message.args;
            assert_eq!((args.uint(), args.string(), args.int()), (Ok(9), Ok(text.as_bytes()), Ok(-1)));
            assert_eq!(args.uint(), Err(Malformed));
        }
    }

    #[test]
    fn what_is_not_all_there_is_waited_for() {
        let bytes = event(7, 3, &[Arg::Str("text")]);
        for length in 0..bytes.len() {
            assert_eq!(message(&bytes[..length]), Ok(None), "{length}");
        }
    }

    #[test]
    fn nonsense_is_told_from_messages() {
        let header = |object: u32, second: u32| [object.to_ne_bytes(), second.to_ne_bytes()].concat();
        for (object, second) in [(0, 8 << 16), (1, 4 << 16), (1, 10 << 16), (1, 4100 << 16), (1, 0)] {
            assert_eq!(message(&header(object, second)), Err(Malformed), "{object} {second:x}");
        }
        // A length that leads beyond the message; a string that does not end.
        for args in
            [[5_u32.to_ne_bytes(), *b"abcd"], [u32::MAX.to_ne_bytes(), *b"abcd"], [4_u32.to_ne_bytes(), *b"abcd"]]
        {
            assert_eq!(Args(args.as_flattened()).string(), Err(Malformed));
        }
        assert_eq!(Args(&[0; 4]).string(), Ok(&b""[..]), "null");
    }

    #[test]
    fn an_id_is_given_out_again_only_when_the_compositor_has_let_go_of_it() {
        let mut requests = Requests::new(2);
        assert_eq!((requests.id(), requests.id()), (2, 3));
        requests.deleted(2);
        assert_eq!(requests.id(), 4, "it was still in use");
        requests.retire(2).unwrap();
        assert_eq!(requests.id(), 5);
        requests.deleted(2);
        requests.deleted(2);
        assert_eq!((requests.id(), requests.id()), (2, 6));
        assert!((10..).take(ZOMBIES + 1).any(|id| requests.retire(id).is_err()));
    }
}
