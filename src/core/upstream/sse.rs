//! Server-sent events (WHATWG HTML, "Server-sent events", 9.2.5 and 9.2.6): bytes cut anywhere in, events out.

use std::{borrow::Cow, mem, time::Duration};

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Reads one stream. What it keeps is bounded: an event beyond the limit is skipped up to the blank line that ends it.
#[derive(Debug)]
pub(super) struct Parser {
    limit: usize,
    line: Vec<u8>,
    /// The last byte was a carriage return: a line feed right after it belongs to the same line end.
    after_cr: bool,
    /// The first line has been read.
    begun: bool,
    /// The current line did not fit.
    line_cut: bool,
    /// A line of the current event did not fit.
    cut: bool,
    kind: String,
    /// The lines of `data`, each with a line feed at its end.
    data: String,
    id: Option<String>,
    retry: Option<Duration>,
}

/// What a blank line ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Item {
    Event(Event),
    /// An event larger than the limit, with its id where that could be read.
    TooLarge {
        id: Option<String>,
    },
}

/// One event.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Event {
    /// The `event` field; `message` without one.
    pub(super) kind: String,
    /// The `data` fields, joined with line feeds.
    pub(super) data: String,
    /// The `id` field of this very event. (A browser's "last event ID" also remembers those of events before it.)
    pub(super) id: Option<String>,
}

impl Parser {
    /// A parser of a new stream that keeps at most `limit` bytes of an event.
    pub(super) const fn new(limit: usize) -> Self {
        Self {
            limit,
            line: Vec::new(),
            after_cr: false,
            begun: false,
            line_cut: false,
            cut: false,
            kind: String::new(),
            data: String::new(),
            id: None,
            retry: None,
        }
    }

    /// The time the server wants between the end of a stream and the next, if it has said so.
    pub(super) const fn retry(&self) -> Option<Duration> {
        self.retry
    }

    /// The next bytes; returns what they completed. An event that the stream's end leaves incomplete never comes.
    pub(super) fn push(&mut self, bytes: &[u8]) -> Vec<Item> {
        let mut items = Vec::new();
        let mut rest = bytes;
        while !rest.is_empty() {
            if mem::take(&mut self.after_cr)
                && let Some(after) = rest.strip_prefix(b"\n")
            {
                rest = after;
                continue;
            }
            let Some(end) = rest.iter().position(|byte| matches!(byte, b'\r' | b'\n')) else {
                self.keep(rest);
                break;
            };
            let (part, after) = rest.split_at(end);
            self.keep(part);
            self.after_cr = after.first() == Some(&b'\r');
            rest = after.get(1..).unwrap_or_default();
            items.extend(self.end_line());
        }
        items
    }

    fn keep(&mut self, part: &[u8]) {
        let stored = self.line.len() + self.kind.len() + self.data.len() + self.id.as_ref().map_or(0, String::len);
        let room = self.limit.saturating_sub(stored);
        self.line_cut |= part.len() > room;
        self.line.extend_from_slice(part.get(..room).unwrap_or(part));
    }

    fn end_line(&mut self) -> Option<Item> {
        let mut line = mem::take(&mut self.line);
        if !mem::replace(&mut self.begun, true) && line.starts_with(BYTE_ORDER_MARK) {
            line.drain(..BYTE_ORDER_MARK.len());
        }
        let line_cut = mem::take(&mut self.line_cut);
        let item = match line.first() {
            None if !line_cut => self.end_event(),
            Some(b':') => None,
            None | Some(_) if line_cut => {
                self.cut = true;
                self.data.clear();
                None
            }
            None | Some(_) => {
                self.field(&line);
                None
            }
        };
        line.clear();
        self.line = line;
        item
    }

    fn field(&mut self, line: &[u8]) {
        let (name, value) = match line.iter().position(|byte| *byte == b':') {
            Some(colon) => (&line[..colon], &line[colon + 1..]),
            None => (line, &[][..]),
        };
        let value = text(value.strip_prefix(b" ").unwrap_or(value));
        match name {
            b"event" => self.kind = value.into_owned(),
            b"data" if !self.cut => {
                self.data.push_str(&value);
                self.data.push('\n');
            }
            b"id" if !value.contains('\0') => self.id = Some(value.into_owned()),
            b"retry" if !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit()) => {
                self.retry = value.parse().ok().map(Duration::from_millis).or(self.retry);
            }
            _ => {}
        }
    }

    fn end_event(&mut self) -> Option<Item> {
        let (kind, mut data) = (mem::take(&mut self.kind), mem::take(&mut self.data));
        let id = self.id.take();
        if mem::take(&mut self.cut) {
            return Some(Item::TooLarge { id });
        }
        data.pop()?;
        let kind = if kind.is_empty() { "message".to_owned() } else { kind };
        Some(Item::Event(Event { kind, data, id }))
    }
}

fn text(bytes: &[u8]) -> Cow<'_, str> {
    String::from_utf8_lossy(bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn event(kind: &str, data: &str, id: Option<&str>) -> Item {
        Item::Event(Event { kind: kind.into(), data: data.into(), id: id.map(String::from) })
    }

    fn parse(text: &str) -> Vec<Item> {
        Parser::new(1000).push(text.as_bytes())
    }

    #[test]
    fn the_examples_of_the_standard() {
        assert_eq!(
            parse("data: YHOO\ndata: +2\ndata: 10\n\n"),
            [event("message", "YHOO\n+2\n10", None)],
            "several data lines are joined with line feeds (push.md §1.6.15 has KDE's bug)"
        );
        assert_eq!(
            parse(": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n\n"),
            [
                event("message", "first event", Some("1")),
                event("message", "second event", Some("")),
                event("message", " third event", None),
            ]
        );
        assert_eq!(parse("data\n\ndata\ndata\n\ndata:"), [event("message", "", None), event("message", "\n", None)]);
        assert_eq!(
            parse("data:test\n\ndata: test\n\n"),
            [event("message", "test", None), event("message", "test", None)]
        );
    }

    #[test]
    fn line_ends_may_be_of_three_kinds() {
        let expected = [event("a", "1\n2", None), event("message", "3", None)];
        for end in ["\n", "\r", "\r\n"] {
            let text = "event: a\ndata: 1\ndata: 2\n\ndata: 3\n\n".replace('\n', end);
            assert_eq!(parse(&text), expected, "{end:?}");
        }
    }

    #[test]
    fn a_byte_order_mark_counts_at_the_beginning_only() {
        assert_eq!(parse("\u{feff}data: a\n\n\u{feff}data: b\n\n"), [event("message", "a", None)]);
    }

    #[test]
    fn fields_that_are_none_are_ignored() {
        assert_eq!(
            parse("event: x\n\nid: a\0b\nretry: 12x\nData: no\nother: y\n: comment\ndata: d\n\n"),
            [event("message", "d", None)],
            "an event without data is none, and its type does not stay"
        );
        let mut parser = Parser::new(100);
        parser.push(b"retry: 1500\nretry: -1\n");
        assert_eq!(parser.retry(), Some(Duration::from_millis(1500)));
    }

    #[test]
    fn bytes_that_are_no_text_are_replaced() {
        assert_eq!(Parser::new(100).push(b"data: a\xffb\n\n"), [event("message", "a\u{fffd}b", None)]);
    }

    #[test]
    fn an_event_over_the_limit_is_reported_and_the_next_one_read() {
        let mut parser = Parser::new(40);
        let mut items = parser.push(b"id: 7\nevent: message\ndata: ");
        for _ in 0..1000 {
            items.extend(parser.push(&[b'x'; 100]));
            assert!(parser.line.capacity() <= 200, "{}", parser.line.capacity());
        }
        items.extend(parser.push(b"\ndata: more\n\ndata: next\n\n"));
        assert_eq!(items, [Item::TooLarge { id: Some("7".into()) }, event("message", "next", None)]);
        // Many small lines are no way around it either.
        let many = "data: 123\n".repeat(1000);
        assert_eq!(
            Parser::new(40).push(format!("{many}id: 8\n\n").as_bytes()),
            [Item::TooLarge { id: Some("8".into()) }]
        );
        // Comments are not kept.
        let comments = ": 123456789 123456789 123456789 123456789 123456789\n".repeat(1000);
        assert_eq!(Parser::new(40).push(format!("{comments}data: 1\n\n").as_bytes()), [event("message", "1", None)]);
    }

    /// The standard's own procedure, on the whole text at once.
    fn reference(text: &str) -> Vec<Item> {
        let text = text.strip_prefix('\u{feff}').unwrap_or(text).replace("\r\n", "\n").replace('\r', "\n");
        let (mut items, mut kind, mut data, mut id) = (Vec::new(), String::new(), Vec::new(), None);
        let Some((lines, _)) = text.rsplit_once('\n') else { return items };
        for line in lines.split('\n') {
            if line.is_empty() {
                if !data.is_empty() {
                    let kind = if kind.is_empty() { "message" } else { &kind };
                    items.push(event(kind, &data.join("\n"), id.as_deref()));
                }
                (kind, data, id) = (String::new(), Vec::new(), None);
                continue;
            }
            let (name, value) = line.split_once(':').unwrap_or((line, ""));
            let value = value.strip_prefix(' ').unwrap_or(value).to_owned();
            match name {
                "event" => kind = value,
                "data" => data.push(value),
                "id" if !value.contains('\0') => id = Some(value),
                _ => {}
            }
        }
        items
    }

    fn pieces() -> impl Strategy<Value = String> {
        let piece = prop::sample::select(vec![
            "data",
            "event",
            "id",
            "retry",
            ":",
            " ",
            "\n",
            "\r",
            "\r\n",
            "\n\n",
            "x",
            "é",
            "\u{feff}",
            "12",
            "\0",
            "data: ",
            "id: 1\n",
            "event: ping\n",
            "data: {}\n\n",
        ]);
        prop::collection::vec(piece, 0..60).prop_map(|pieces| pieces.concat())
    }

    proptest! {
        #[test]
        fn wherever_it_is_cut_it_reads_as_the_standard_says(
            text in pieces(),
            cuts in prop::collection::vec(1_usize..9, 1..200),
        ) {
            let mut parser = Parser::new(10_000);
            let (mut items, mut rest, mut cuts) = (Vec::new(), text.as_bytes(), cuts.iter().cycle());
            while !rest.is_empty() {
                let (part, after) = rest.split_at((*cuts.next().unwrap()).min(rest.len()));
                items.extend(parser.push(part));
                rest = after;
            }
            prop_assert_eq!(&items, &reference(&text));
            prop_assert_eq!(items, Parser::new(10_000).push(text.as_bytes()));
        }

        #[test]
        fn garbage_neither_panics_nor_grows(bytes in prop::collection::vec(any::<u8>(), 0..3000), limit in 0_usize..64) {
            let mut parser = Parser::new(limit);
            for part in bytes.chunks(7) {
                parser.push(part);
                let kept = parser.line.len() + parser.kind.len() + parser.data.len()
                    + parser.id.as_ref().map_or(0, String::len);
                // A byte that is no text becomes three.
                prop_assert!(kept <= 3 * limit + 8, "{kept} bytes at a limit of {limit}");
            }
        }
    }
}
