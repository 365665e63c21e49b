//! Plain old data, the values in PipeWire's messages (spa/pod/pod.h; docs.pipewire.org, "SPA POD"): a length, a type and a
//! body, padded to eight bytes, in the machine's own byte order. Only the types that are of use here, and nothing recursive.

const BOOL: u32 = 2;
const ID: u32 = 3;
const INT: u32 = 4;
const LONG: u32 = 5;
const STRING: u32 = 8;
const STRUCT: u32 = 14;

/// The members of a struct, to be taken one after the other. `None` is what is not there or is something else.
#[derive(Clone, Copy, Debug)]
pub(super) struct Members<'a>(&'a [u8]);

impl<'a> Members<'a> {
    /// Those of the struct that `bytes` begins with.
    pub(super) fn of(bytes: &'a [u8]) -> Option<Self> {
        Self(bytes).structure()
    }

    /// An integer of 32 bits, or an id.
    pub(super) fn int(&mut self) -> Option<i32> {
        match self.next()? {
            (INT | ID | BOOL, body) => Some(i32::from_ne_bytes(body.get(..4)?.try_into().ok()?)),
            _ => None,
        }
    }

    /// [`Members::int`] of what is never negative.
    pub(super) fn id(&mut self) -> Option<u32> {
        self.int().and_then(|number| u32::try_from(number).ok())
    }

    /// An integer of 64 bits.
    pub(super) fn long(&mut self) -> Option<i64> {
        match self.next()? {
            (LONG, body) => Some(i64::from_ne_bytes(body.get(..8)?.try_into().ok()?)),
            _ => None,
        }
    }

    /// A text. `Some(None)`: there is none, or it is not UTF-8.
    pub(super) fn text(&mut self) -> Option<Option<&'a str>> {
        match self.next()? {
            (STRING, body) => {
                let end = body.iter().position(|byte| *byte == 0)?;
                Some(std::str::from_utf8(body.get(..end)?).ok())
            }
            (1, _) => Some(None),
            _ => None,
        }
    }

    /// A struct's members.
    pub(super) fn structure(&mut self) -> Option<Self> {
        match self.next()? {
            (STRUCT, body) => Some(Self(body)),
            _ => None,
        }
    }

    /// A dictionary: a struct of its length and of keys and values. Pairs that are no texts are left out.
    pub(super) fn dictionary(&mut self) -> Option<impl Iterator<Item = (&'a str, &'a str)> + use<'a>> {
        let mut pairs = self.structure()?;
        // The length is what it says; the members are what there is.
        pairs.int()?;
        let pairs = std::iter::from_fn(move || Some((pairs.text()?, pairs.text()?)));
        Some(pairs.filter_map(|(key, value)| key.zip(value)))
    }

    fn next(&mut self) -> Option<(u32, &'a [u8])> {
        let number = |at: usize| Some(u32::from_ne_bytes(self.0.get(at..at + 4)?.try_into().ok()?));
        let (size, kind) = (usize::try_from(number(0)?).ok()?, number(4)?);
        let end = size.checked_add(8)?;
        let body = self.0.get(8..end)?;
        // The last one may come without its padding.
        self.0 = self.0.get(end.checked_next_multiple_of(8)?..).unwrap_or_default();
        Some((kind, body))
    }
}

/// A struct being written.
#[derive(Debug, Default)]
pub(super) struct Writer(Vec<u8>);

impl Writer {
    pub(super) fn int(mut self, number: u32) -> Self {
        self.put(INT, &number.to_ne_bytes());
        self
    }

    pub(super) fn text(mut self, text: &str) -> Self {
        let mut body = text.as_bytes().to_vec();
        body.push(0);
        self.put(STRING, &body);
        self
    }

    pub(super) fn structure(mut self, inner: Self) -> Self {
        self.put(STRUCT, &inner.0);
        self
    }

    pub(super) fn dictionary(self, pairs: &[(&str, &str)]) -> Self {
        let start = Self::default().int(u32::try_from(pairs.len()).unwrap_or(u32::MAX));
        let inner = pairs.iter().fold(start, |inner, (key, value)| inner.text(key).text(value));
        self.structure(inner)
    }

    /// The struct as bytes.
    pub(super) fn finish(self) -> Vec<u8> {
        Self::default().structure(self).0
    }

    fn put(&mut self, kind: u32, body: &[u8]) {
        self.0.extend(u32::try_from(body.len()).unwrap_or(u32::MAX).to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(body);
        self.0.resize(self.0.len().next_multiple_of(8), 0);
    }

    #[cfg(test)]
    pub(super) fn long(mut self, number: i64) -> Self {
        self.put(LONG, &number.to_ne_bytes());
        self
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let bytes = Writer::default().int(7).text("seven").dictionary(&[("a", "b"), ("c", "")]).long(-1).finish();
        let mut members = Members::of(&bytes).unwrap();
        assert_eq!(members.int(), Some(7));
        assert_eq!(members.text(), Some(Some("seven")));
        assert_eq!(members.dictionary().unwrap().collect::<Vec<_>>(), [("a", "b"), ("c", "")]);
        assert_eq!(members.long(), Some(-1));
        assert_eq!(members.int(), None);
    }

    #[test]
    fn a_text_ends_where_it_ends_and_may_be_missing() {
        let text = |body: &[u8], kind: u32| {
            let mut writer = Writer::default();
            writer.put(kind, body);
            let bytes = writer.finish();
            Members::of(&bytes).unwrap().text().map(|text| text.map(str::to_owned))
        };
        assert_eq!(text(b"one\0two\0", STRING), Some(Some("one".into())));
        assert_eq!(text(b"endless", STRING), None);
        assert_eq!(text(b"\xff\0", STRING), Some(None));
        assert_eq!(text(b"", 1), Some(None));
        assert_eq!(text(&7_u32.to_ne_bytes(), INT), None);
    }

    proptest! {
        #[test]
        fn nothing_that_is_read_panics_or_goes_on_for_ever(bytes in prop::collection::vec(any::<u8>(), 0..512)) {
            for mut members in [Some(Members(&bytes)), Members::of(&bytes)].into_iter().flatten() {
                for turn in 0..1000 {
                    let before = members.0.len();
                    let read = match turn % 5 {
                        0 => members.int().is_some(),
                        1 => members.long().is_some(),
                        2 => members.text().is_some(),
                        3 => members.structure().is_some(),
                        _ => members.dictionary().is_some_and(|pairs| pairs.count() < bytes.len()),
                    };
                    prop_assert!(!read || members.0.len() < before);
                }
            }
        }
    }
}
