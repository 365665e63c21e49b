//! What protocols with an HTTP interface have in common: answers and what follows from them, registrations the server
//! makes on request, and things to be deleted there.

pub(super) mod deletions;
pub(super) mod registrations;

use std::time::Duration;

use crate::event::{HttpError, HttpResponse};

/// Without a wish of the server's own (RFC 6585 §4).
pub(super) const TOO_MANY_REQUESTS: Duration = Duration::from_secs(60);

/// Why a request was not done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// 401 or 403: only the user can mend it.
    Credentials(u16),
    /// 429 or 5xx: later, and not before the time the server wishes.
    Busy(u16, Option<Duration>),
    /// Any other status, or an answer that cannot be used.
    Refused(String),
    /// There was no answer.
    Unreachable(String),
}

/// The body of a good answer, or what is wrong.
pub(super) fn outcome(result: Result<HttpResponse, HttpError>) -> Result<String, Fault> {
    let response = match result {
        Ok(response) => response,
        Err(HttpError::Unusable(text)) => return Err(Fault::Refused(format!("its answer cannot be used: {text}"))),
        Err(HttpError::Failed(text)) => return Err(Fault::Unreachable(text)),
    };
    match response.status {
        200..=299 => Ok(response.body),
        status @ (401 | 403) => Err(Fault::Credentials(status)),
        429 => Err(Fault::Busy(429, Some(response.retry_after.unwrap_or(TOO_MANY_REQUESTS)))),
        status @ 500..=599 => Err(Fault::Busy(status, response.retry_after)),
        status => Err(Fault::Refused(format!("it answered {status}"))),
    }
}

/// Whether a server's name for something can be used in a path as it is.
pub(super) fn is_plain(name: &str) -> bool {
    (1..=256).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'~'))
        && !name.bytes().all(|byte| byte == b'.')
}

/// FNV-1a, 64 bits: tells channels apart in names that outlive this program's version, and hides them.
pub(super) fn fingerprint(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_told_apart() {
        let answer = |status, retry_after| Ok(HttpResponse { status, body: "b".into(), retry_after });
        assert_eq!(outcome(answer(204, None)), Ok("b".into()));
        assert_eq!(outcome(answer(403, None)), Err(Fault::Credentials(403)));
        assert_eq!(outcome(answer(429, None)), Err(Fault::Busy(429, Some(TOO_MANY_REQUESTS))));
        let wish = Duration::from_secs(7);
        assert_eq!(outcome(answer(429, Some(wish))), Err(Fault::Busy(429, Some(wish))));
        assert_eq!(outcome(answer(503, Some(wish))), Err(Fault::Busy(503, Some(wish))));
        assert_eq!(outcome(answer(302, None)), Err(Fault::Refused("it answered 302".into())));
        assert_eq!(outcome(Err(HttpError::Failed("x".into()))), Err(Fault::Unreachable("x".into())));
    }

    #[test]
    fn only_plain_names_go_into_paths() {
        for good in ["a", "0b-_~.", "AWH0wZ5r0Mbac.r"] {
            assert!(is_plain(good), "{good}");
        }
        let long = "x".repeat(257);
        for bad in ["", ".", "..", "a/b", "a?b", "a b", "é", &long] {
            assert!(!is_plain(bad), "{bad}");
        }
    }

    #[test]
    fn fingerprints_are_those_of_the_standard_function() {
        assert_eq!(fingerprint(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(fingerprint(b"foobar"), 0x8594_4171_f739_67e8);
    }
}
