//! Where the body of a response ends and what of it is data (RFC 9112 §6, §7.1): chunked, by length, or until the end.

use http::{HeaderMap, header};

/// Digits of a chunk's size taken at most; no chunk anybody sends needs more.
const DIGITS: u8 = 15;
/// Extensions of one chunk, or all trailers, in bytes.
const DECORATION: usize = 4096;

/// Takes the framing off a body, however it is cut.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Body {
    state: State,
}

#[derive(Debug, PartialEq, Eq)]
enum State {
    UntilEnd,
    Length(u64),
    /// In the size of a chunk.
    Size {
        size: u64,
        digits: u8,
    },
    /// In what follows the size up to the end of its line.
    Extension {
        size: u64,
        length: usize,
    },
    Chunk(u64),
    /// Between a chunk and the next size.
    ChunkEnd,
    /// In the lines after the last chunk; how long the current line is, and how much came in all.
    Trailer {
        line: usize,
        length: usize,
    },
    Done,
}

impl Body {
    /// As the response's header says. Chunked wins over a length (RFC 9112 §6.3).
    ///
    /// # Errors
    /// A length that is no number.
    pub(super) fn new(headers: &HeaderMap) -> Result<Self, &'static str> {
        let state = if has_token(headers, header::TRANSFER_ENCODING, "chunked") {
            State::Size { size: 0, digits: 0 }
        } else if let Some(length) = headers.get(header::CONTENT_LENGTH) {
            let length = length.to_str().ok().and_then(|text| text.trim().parse().ok());
            match length.ok_or("its Content-Length is not a number")? {
                0 => State::Done,
                length => State::Length(length),
            }
        } else {
            State::UntilEnd
        };
        Ok(Self { state })
    }

    /// Appends the data within `bytes` to `out`. What comes after the end is ignored.
    ///
    /// # Errors
    /// Framing that is none.
    pub(super) fn take(&mut self, mut bytes: &[u8], out: &mut Vec<u8>) -> Result<(), &'static str> {
        while let Some((&first, rest)) = bytes.split_first() {
            let left = match &mut self.state {
                State::UntilEnd => {
                    out.extend_from_slice(bytes);
                    return Ok(());
                }
                State::Done => return Ok(()),
                State::Length(left) | State::Chunk(left) => left,
                _ => {
                    self.framing(first)?;
                    bytes = rest;
                    continue;
                }
            };
            let length = usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len());
            let (data, rest) = bytes.split_at(length);
            out.extend_from_slice(data);
            bytes = rest;
            *left -= length as u64;
            if *left == 0 {
                self.state = if matches!(self.state, State::Chunk(_)) { State::ChunkEnd } else { State::Done };
            }
        }
        Ok(())
    }

    /// Whether nothing more can come.
    pub(super) const fn done(&self) -> bool {
        matches!(self.state, State::Done)
    }

    /// Whether the connection may end here without anything missing.
    pub(super) const fn may_end(&self) -> bool {
        matches!(self.state, State::Done | State::UntilEnd)
    }

    fn framing(&mut self, byte: u8) -> Result<(), &'static str> {
        match &mut self.state {
            State::Size { size, digits } => match char::from(byte).to_digit(16) {
                Some(_) if *digits == DIGITS => return Err("a chunk's size is too large"),
                Some(digit) => {
                    *size = *size * 16 + u64::from(digit);
                    *digits += 1;
                }
                None if *digits == 0 => return Err("a chunk has no size"),
                None => {
                    self.state = State::Extension { size: *size, length: 0 };
                    return self.framing(byte);
                }
            },
            State::Extension { size, length } => match byte {
                b'\n' => {
                    self.state = match *size {
                        0 => State::Trailer { line: 0, length: 0 },
                        size => State::Chunk(size),
                    };
                }
                // Between the size and the end of its line there is nothing, or `;` and whatever.
                b'\r' | b' ' | b'\t' | b';' => *length += 1,
                _ if *length == 0 => return Err("a chunk's size is not a number"),
                _ => *length += 1,
            },
            State::ChunkEnd => match byte {
                b'\r' => {}
                b'\n' => self.state = State::Size { size: 0, digits: 0 },
                _ => return Err("a chunk is longer than its size"),
            },
            State::Trailer { line, length } => {
                *length += 1;
                match byte {
                    b'\n' if *line == 0 => self.state = State::Done,
                    b'\n' => *line = 0,
                    b'\r' => {}
                    _ => *line += 1,
                }
            }
            State::UntilEnd | State::Length(_) | State::Chunk(_) | State::Done => {}
        }
        match self.state {
            State::Extension { length, .. } | State::Trailer { length, .. } if length > DECORATION => {
                Err("what goes with a chunk is over 4 KiB")
            }
            _ => Ok(()),
        }
    }
}

/// Whether a header that is a list holds `token`.
pub(super) fn has_token(headers: &HeaderMap, name: header::HeaderName, token: &str) -> bool {
    headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|part| part.trim().eq_ignore_ascii_case(token))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunked() -> Body {
        Body { state: State::Size { size: 0, digits: 0 } }
    }

    fn read(mut body: Body, pieces: &[&[u8]]) -> Result<(Vec<u8>, bool), &'static str> {
        let mut out = Vec::new();
        for piece in pieces {
            body.take(piece, &mut out)?;
        }
        Ok((out, body.done()))
    }

    #[test]
    fn chunks_are_joined_however_they_are_cut() {
        let bytes = b"3\r\nabc\r\n00A;x=\"y\"\r\n0123456789\r\n1 \r\n\n\r\n0\r\nExpires: never\r\n\r\nmore";
        let expected = Ok((b"abc0123456789\n".to_vec(), true));
        assert_eq!(read(chunked(), &[bytes]), expected);
        for cut in 0..bytes.len() {
            let (one, other) = bytes.split_at(cut);
            assert_eq!(read(chunked(), &[one, other]), expected, "cut at {cut}");
        }
        assert_eq!(read(chunked(), &bytes.chunks(1).collect::<Vec<_>>()), expected);
        assert_eq!(read(chunked(), &[b"3\r\nab"]), Ok((b"ab".to_vec(), false)));
        // Servers that end lines with LF alone.
        assert_eq!(read(chunked(), &[b"2\nab\n0\n\n"]), Ok((b"ab".to_vec(), true)));
    }

    #[test]
    fn rubbish_and_hostile_sizes_are_refused() {
        for bytes in [
            &b"zz\r\nab"[..],
            b"\r\nab",
            b"-1\r\nab",
            b"3x\r\nabc",
            b"3\r\nabcd",
            b"ffffffffffffffff\r\nab",
            b"10000000000000000\r\nab",
        ] {
            assert!(read(chunked(), &[bytes]).is_err(), "{:?}", bytes.escape_ascii().to_string());
        }
        let long = [&b"1;"[..], &[b'x'; 5000]].concat();
        assert!(read(chunked(), &[&long]).is_err());
        let trailers = [&b"0\r\n"[..], &b"a: b\r\n".repeat(1000)].concat();
        assert!(read(chunked(), &[&trailers]).is_err());
        // As large as can be told: nothing is kept for it.
        assert_eq!(read(chunked(), &[b"fffffffffffffff\r\nab"]), Ok((b"ab".to_vec(), false)));
    }

    #[test]
    fn the_header_says_how_long_it_is() {
        let body = |name: header::HeaderName, value: &'static str| {
            Body::new(&HeaderMap::from_iter([(name, header::HeaderValue::from_static(value))]))
        };
        let three = body(header::CONTENT_LENGTH, "3").unwrap();
        assert!(!three.may_end());
        assert_eq!(read(three, &[b"a", b"bcd"]), Ok((b"abc".to_vec(), true)));
        assert!(body(header::CONTENT_LENGTH, "0").unwrap().done());
        assert!(body(header::CONTENT_LENGTH, "-3").is_err());
        assert!(body(header::CONTENT_LENGTH, "99999999999999999999").is_err());
        assert_eq!(body(header::TRANSFER_ENCODING, "Chunked").unwrap(), chunked());
        let rest = Body::new(&HeaderMap::new()).unwrap();
        assert!(rest.may_end());
        assert_eq!(read(rest, &[b"a", b"b"]), Ok((b"ab".to_vec(), false)));
    }
}
