//! RFC 8030: what an application server may ask of a push message, read from its headers.

use std::sync::Arc;

use ::http::{HeaderMap, HeaderName, header};
use nightporter::model::Urgency;

use crate::token::is_base64url;

/// The longest a message is kept: 30 days. RFC 8030 §5.2 lets the server shorten a TTL if it says so.
pub(crate) const TTL_MAX: i64 = 30 * 24 * 60 * 60;
/// RFC 8030 §5.4.
const TOPIC_MAX: usize = 32;
/// `Encryption` and `Crypto-Key` of the older encodings hold two keys and a salt; this is several times that.
const KEPT_HEADER_MAX: usize = 1024;

/// The headers of a push message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Headers {
    /// Seconds to keep it, already capped.
    pub(crate) ttl: i64,
    /// Replaces a waiting message with the same topic.
    pub(crate) topic: Option<Arc<str>>,
    /// How much it matters.
    pub(crate) urgency: Urgency,
    /// `Content-Encoding`, as it came.
    pub(crate) encoding: Option<Arc<str>>,
    /// `Encryption` (aesgcm), as it came.
    pub(crate) encryption: Option<Arc<str>>,
    /// `Crypto-Key` (aesgcm), as it came.
    pub(crate) crypto_key: Option<Arc<str>>,
}

/// Why a push message was refused with 400.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum HeaderError {
    /// RFC 8030 §5.2 makes it mandatory.
    #[error("the TTL header is missing; send TTL: 0 if the message is of no use later")]
    TtlMissing,
    /// Signs, fractions, words, two of them.
    #[error("the TTL header must be one number of seconds, zero or more")]
    Ttl,
    /// RFC 8030 §5.4.
    #[error("the Topic header must be 1 to 32 characters of base64url")]
    Topic,
    /// RFC 8030 §5.3.
    #[error("the Urgency header must be very-low, low, normal or high")]
    Urgency,
    /// Too long or not text.
    #[error("the {0} header is too long or not printable ASCII")]
    Kept(&'static str),
}

impl Headers {
    /// Read and check them.
    pub(crate) fn parse(headers: &HeaderMap) -> Result<Self, HeaderError> {
        Ok(Self {
            ttl: ttl(single(headers, &HeaderName::from_static("ttl"), HeaderError::Ttl)?)?,
            topic: topic(single(headers, &HeaderName::from_static("topic"), HeaderError::Topic)?)?,
            urgency: urgency(single(headers, &HeaderName::from_static("urgency"), HeaderError::Urgency)?)?,
            encoding: kept(headers, &header::CONTENT_ENCODING, "Content-Encoding")?,
            encryption: kept(headers, &HeaderName::from_static("encryption"), "Encryption")?,
            crypto_key: kept(headers, &HeaderName::from_static("crypto-key"), "Crypto-Key")?,
        })
    }
}

fn single<'a>(headers: &'a HeaderMap, name: &HeaderName, error: HeaderError) -> Result<Option<&'a str>, HeaderError> {
    let mut values = headers.get_all(name).iter();
    match (values.next(), values.next()) {
        (None, _) => Ok(None),
        (Some(value), None) => value.to_str().map(|text| Some(text.trim())).map_err(|_| error),
        (Some(_), Some(_)) => Err(error),
    }
}

fn ttl(value: Option<&str>) -> Result<i64, HeaderError> {
    let value = value.ok_or(HeaderError::TtlMissing)?;
    if value.is_empty() || !value.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(HeaderError::Ttl);
    }
    // Digits that do not fit are a very long time, not an error.
    Ok(value.parse().unwrap_or(TTL_MAX).min(TTL_MAX))
}

fn topic(value: Option<&str>) -> Result<Option<Arc<str>>, HeaderError> {
    match value {
        None => Ok(None),
        Some(topic) if (1..=TOPIC_MAX).contains(&topic.len()) && topic.bytes().all(is_base64url) => {
            Ok(Some(topic.into()))
        }
        Some(_) => Err(HeaderError::Topic),
    }
}

fn urgency(value: Option<&str>) -> Result<Urgency, HeaderError> {
    value.map_or(Ok(Urgency::Normal), |word| Urgency::parse(word).ok_or(HeaderError::Urgency))
}

fn kept(headers: &HeaderMap, name: &HeaderName, shown: &'static str) -> Result<Option<Arc<str>>, HeaderError> {
    match headers.get(name) {
        None => Ok(None),
        Some(value) => match value.to_str() {
            Ok(text) if text.len() <= KEPT_HEADER_MAX => Ok(Some(text.into())),
            _ => Err(HeaderError::Kept(shown)),
        },
    }
}

#[cfg(test)]
mod tests {
    use ::http::HeaderValue;

    use super::*;

    fn parse(headers: &[(&'static str, &str)]) -> Result<Headers, HeaderError> {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(*name, HeaderValue::from_str(value).unwrap());
        }
        Headers::parse(&map)
    }

    #[test]
    fn ttl_is_mandatory_and_a_plain_number() {
        assert_eq!(parse(&[]), Err(HeaderError::TtlMissing));
        for wrong in ["", "-1", "+1", "1.5", "1 2", "soon", "0x10", "1,2"] {
            assert_eq!(parse(&[("ttl", wrong)]), Err(HeaderError::Ttl), "{wrong:?}");
        }
        assert_eq!(parse(&[("ttl", "1"), ("ttl", "2")]), Err(HeaderError::Ttl));
        assert_eq!(parse(&[("ttl", "0")]).unwrap().ttl, 0);
        assert_eq!(parse(&[("ttl", "60")]).unwrap().ttl, 60);
        assert_eq!(parse(&[("ttl", "2592001")]).unwrap().ttl, TTL_MAX);
        assert_eq!(parse(&[("ttl", "99999999999999999999999999")]).unwrap().ttl, TTL_MAX);
    }

    #[test]
    fn topic_is_up_to_32_characters_of_base64url() {
        let with = |topic: &str| parse(&[("ttl", "1"), ("topic", topic)]).map(|headers| headers.topic);
        assert_eq!(with("a-Z_9"), Ok(Some("a-Z_9".into())));
        assert!(with(&"x".repeat(32)).is_ok());
        for wrong in ["", "a b", "a=", "a/b", "ü", &"x".repeat(33)] {
            assert_eq!(with(wrong), Err(HeaderError::Topic), "{wrong:?}");
        }
    }

    #[test]
    fn urgency_is_one_of_four_words() {
        let with = |word: &str| parse(&[("ttl", "1"), ("urgency", word)]).map(|headers| headers.urgency);
        assert_eq!(parse(&[("ttl", "1")]).unwrap().urgency, Urgency::Normal);
        assert_eq!(with("very-low"), Ok(Urgency::VeryLow));
        assert_eq!(with("High"), Ok(Urgency::High));
        for wrong in ["", "urgent", "normal,high"] {
            assert_eq!(with(wrong), Err(HeaderError::Urgency), "{wrong:?}");
        }
    }

    #[test]
    fn encodings_are_kept_as_they_came() {
        let headers = parse(&[
            ("ttl", "1"),
            ("content-encoding", "aesgcm"),
            ("encryption", "salt=abc"),
            ("crypto-key", "dh=def;p256ecdsa=ghi"),
        ])
        .unwrap();
        assert_eq!(headers.encoding.as_deref(), Some("aesgcm"));
        assert_eq!(headers.encryption.as_deref(), Some("salt=abc"));
        assert_eq!(headers.crypto_key.as_deref(), Some("dh=def;p256ecdsa=ghi"));
        assert_eq!(parse(&[("ttl", "1"), ("crypto-key", &"k".repeat(1025))]), Err(HeaderError::Kept("Crypto-Key")));
    }
}
