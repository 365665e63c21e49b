//! Names nobody can guess: endpoint tokens, message ids and device ids.

use std::{fmt::Write, sync::Arc};

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use ring::rand::{SecureRandom, SystemRandom};

/// Random bytes of an endpoint token or message id: 192 bits, and no padding in base64url.
const CAPABILITY_BYTES: usize = 24;
const CAPABILITY_CHARS: usize = 32;

/// The kernel gave no random bytes.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the kernel's random source failed")]
pub(crate) struct NoRandomness;

/// A new endpoint token or message id.
pub(crate) fn capability() -> Result<Arc<str>, NoRandomness> {
    Ok(BASE64_URL_SAFE_NO_PAD.encode(random::<CAPABILITY_BYTES>()?).into())
}

/// Whether `text` could have come from [`capability`]; anything else needs no look into the database.
pub(crate) fn is_capability(text: &str) -> bool {
    text.len() == CAPABILITY_CHARS && text.bytes().all(is_base64url)
}

/// Whether `byte` belongs to the URL and filename safe base64 alphabet.
pub(crate) fn is_base64url(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_'
}

/// A device's id: autopush's `uaid`. Who knows it can take over the device's connection, so it has no `Display` and
/// its `Debug` hides it.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) struct Uaid(Arc<str>);

impl Uaid {
    /// A new one.
    pub(crate) fn random() -> Result<Self, NoRandomness> {
        let hex = random::<16>()?.iter().fold(String::with_capacity(32), |mut hex, byte| {
            // Writing to a string cannot fail.
            let _ = write!(hex, "{byte:02x}");
            hex
        });
        Ok(Self(hex.into()))
    }

    /// The one a client sent: 32 hexadecimal digits, in either case.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        (text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit()))
            .then(|| Self(text.to_ascii_lowercase().into()))
    }

    /// For the wire and the database only.
    pub(crate) fn reveal(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for Uaid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Uaid(..)")
    }
}

fn random<const N: usize>() -> Result<[u8; N], NoRandomness> {
    let mut bytes = [0; N];
    SystemRandom::new().fill(&mut bytes).map_err(|_| NoRandomness)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_capability_has_192_bits_and_recognises_itself() {
        let (one, other) = (capability().unwrap(), capability().unwrap());
        assert_ne!(one, other);
        assert!(is_capability(&one) && is_capability(&other));
        for wrong in ["", "short", &format!("{}=", &one[..31]), &format!("{one}x")] {
            assert!(!is_capability(wrong), "{wrong}");
        }
    }

    #[test]
    fn a_uaid_is_32_hexadecimal_digits_and_never_printed() {
        let uaid = Uaid::random().unwrap();
        assert_eq!(Uaid::parse(uaid.reveal()), Some(uaid.clone()));
        assert_eq!(Uaid::parse(&uaid.reveal().to_uppercase()), Some(uaid.clone()));
        assert_eq!(Uaid::parse(""), None);
        assert_eq!(Uaid::parse("0000-000000000000000000000000000"), None);
        assert!(!format!("{uaid:?}").contains(uaid.reveal()));
    }
}
