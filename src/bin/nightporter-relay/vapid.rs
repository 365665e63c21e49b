//! RFC 8292: who posts. An endpoint registered with a key takes messages from the holder of that key only.

use std::sync::Arc;

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use ring::signature::{ECDSA_P256_SHA256_FIXED, UnparsedPublicKey};
use serde::Deserialize;

/// RFC 8292 §2: `exp` lies at most a day ahead.
const EXPIRY_MAX: i64 = 24 * 60 * 60;
/// What clocks may differ by.
const SKEW: i64 = 60;
/// A longer `Authorization` is no JWT of a push message.
const CREDENTIALS_MAX: usize = 4096;
/// An uncompressed point of P-256.
const KEY_BYTES: usize = 65;

/// An application server's public key, in the one writing it is compared and stored in: 87 characters of base64url.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Key(Arc<str>);

/// What the `Authorization` of a push message proved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Proof {
    /// Nothing was sent.
    Absent,
    /// Something was sent that proves nothing.
    Failed(VapidError),
    /// The sender holds this key.
    Holds(Key),
}

/// Why credentials prove nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum VapidError {
    /// Another scheme, or parameters missing.
    #[error("Authorization must be: vapid t=<JWT>, k=<public key>")]
    Scheme,
    /// `k`.
    #[error("k must be an uncompressed P-256 public key in base64url")]
    Key,
    /// Not three parts of base64url JSON, or another algorithm.
    #[error("t must be a JWT signed with ES256 that has aud and exp")]
    Token,
    /// `exp`.
    #[error("the JWT has expired or is valid for more than 24 hours")]
    Expiry,
    /// `aud`.
    #[error("aud of the JWT must be the origin of this push server")]
    Audience,
    /// The signature.
    #[error("the JWT is not signed by the key in k")]
    Signature,
}

impl Key {
    /// From base64url, padded or not.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let text = text.trim_end_matches('=');
        let bytes = BASE64_URL_SAFE_NO_PAD.decode(text).ok()?;
        (bytes.len() == KEY_BYTES && bytes.first() == Some(&4)).then(|| Self(text.into()))
    }

    /// As stored.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl Proof {
    /// Judge the value of `Authorization`; `origin` is what `aud` must be, `now` in Unix seconds.
    pub(crate) fn of(authorization: Option<&str>, origin: &str, now: i64) -> Self {
        match authorization {
            None => Self::Absent,
            Some(value) => match verify(value, origin, now) {
                Ok(key) => Self::Holds(key),
                Err(error) => Self::Failed(error),
            },
        }
    }
}

#[derive(Deserialize)]
struct Header {
    alg: String,
}

#[derive(Deserialize)]
struct Claims {
    aud: String,
    // Some libraries write a fraction.
    exp: f64,
}

fn verify(authorization: &str, origin: &str, now: i64) -> Result<Key, VapidError> {
    let (token, key) = parameters(authorization).ok_or(VapidError::Scheme)?;
    let key = Key::parse(key).ok_or(VapidError::Key)?;
    let (signed, signature) = token.rsplit_once('.').ok_or(VapidError::Token)?;
    let (header, claims) = signed.split_once('.').ok_or(VapidError::Token)?;
    let header: Header = json(header)?;
    let claims: Claims = json(claims)?;
    if header.alg != "ES256" {
        return Err(VapidError::Token);
    }
    let now = now as f64;
    // Written so that a NaN is refused.
    if !(claims.exp > now && claims.exp <= now + (EXPIRY_MAX + SKEW) as f64) {
        return Err(VapidError::Expiry);
    }
    if !claims.aud.trim_end_matches('/').eq_ignore_ascii_case(origin) {
        return Err(VapidError::Audience);
    }
    let point = BASE64_URL_SAFE_NO_PAD.decode(key.as_str()).map_err(|_| VapidError::Key)?;
    let signature = base64url(signature)?;
    UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, point)
        .verify(signed.as_bytes(), &signature)
        .map_err(|_| VapidError::Signature)?;
    Ok(key)
}

/// `t` and `k` of `vapid t=…, k=…`, in either order, quoted or not.
fn parameters(authorization: &str) -> Option<(&str, &str)> {
    let (scheme, rest) = authorization.trim().split_once(' ')?;
    if authorization.len() > CREDENTIALS_MAX || !scheme.eq_ignore_ascii_case("vapid") {
        return None;
    }
    let (mut token, mut key) = (None, None);
    for parameter in rest.split(',') {
        let (name, value) = parameter.trim().split_once('=')?;
        let value = value.trim_matches('"');
        match name {
            "t" if token.is_none() => token = Some(value),
            "k" if key.is_none() => key = Some(value),
            "t" | "k" => return None,
            _ => {}
        }
    }
    Some((token?, key?))
}

fn json<T: for<'a> Deserialize<'a>>(part: &str) -> Result<T, VapidError> {
    serde_json::from_slice(&base64url(part)?).map_err(|_| VapidError::Token)
}

fn base64url(text: &str) -> Result<Vec<u8>, VapidError> {
    BASE64_URL_SAFE_NO_PAD.decode(text.trim_end_matches('=')).map_err(|_| VapidError::Token)
}

#[cfg(test)]
mod tests {
    use ring::{
        rand::SystemRandom,
        signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair},
    };

    use super::*;

    const NOW: i64 = 1_800_000_000;
    const ORIGIN: &str = "https://push.example:8443";

    struct Signer(EcdsaKeyPair);

    impl Signer {
        fn new() -> Self {
            let random = SystemRandom::new();
            let pkcs8 = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &random).unwrap();
            let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, pkcs8.as_ref(), &random).unwrap();
            Self(pair)
        }

        fn key(&self) -> String {
            BASE64_URL_SAFE_NO_PAD.encode(self.0.public_key().as_ref())
        }

        fn token(&self, header: &str, claims: &str) -> String {
            let signed = format!("{}.{}", BASE64_URL_SAFE_NO_PAD.encode(header), BASE64_URL_SAFE_NO_PAD.encode(claims));
            let signature = self.0.sign(&SystemRandom::new(), signed.as_bytes()).unwrap();
            format!("{signed}.{}", BASE64_URL_SAFE_NO_PAD.encode(signature.as_ref()))
        }
    }

    const ES256: &str = r#"{"typ":"JWT","alg":"ES256"}"#;

    fn claims(aud: &str, exp: i64) -> String {
        format!(r#"{{"aud":"{aud}","exp":{exp},"sub":"mailto:me@example.org"}}"#)
    }

    fn judge(authorization: &str) -> Result<Key, VapidError> {
        match Proof::of(Some(authorization), ORIGIN, NOW) {
            Proof::Holds(key) => Ok(key),
            Proof::Failed(error) => Err(error),
            Proof::Absent => panic!("something was sent"),
        }
    }

    #[test]
    fn a_good_signature_proves_the_key() {
        let signer = Signer::new();
        let token = signer.token(ES256, &claims(ORIGIN, NOW + 3600));
        let key = Key::parse(&signer.key()).unwrap();
        for authorization in
            [format!("vapid t={token}, k={}", signer.key()), format!("Vapid k=\"{}=\",t={token},x=y", signer.key())]
        {
            assert_eq!(judge(&authorization), Ok(key.clone()), "{authorization}");
        }
        assert_eq!(Proof::of(None, ORIGIN, NOW), Proof::Absent);
    }

    #[test]
    fn everything_else_proves_nothing() {
        let (signer, other) = (Signer::new(), Signer::new());
        let good = signer.token(ES256, &claims(ORIGIN, NOW + 3600));
        let with = |token: &str, key: &str| judge(&format!("vapid t={token}, k={key}"));
        assert_eq!(with(&good, &other.key()), Err(VapidError::Signature));
        let (head, tail) = good.split_at(good.len() - 3);
        let other_char = if tail.starts_with('A') { 'Q' } else { 'A' };
        let forged = format!("{head}{other_char}{}", &tail[1..]);
        assert_eq!(with(&forged, &signer.key()), Err(VapidError::Signature));
        for (exp, aud, error) in [
            (NOW, ORIGIN, VapidError::Expiry),
            (NOW + EXPIRY_MAX + SKEW + 1, ORIGIN, VapidError::Expiry),
            (NOW + 60, "https://push.example", VapidError::Audience),
        ] {
            assert_eq!(with(&signer.token(ES256, &claims(aud, exp)), &signer.key()), Err(error));
        }
        let none = signer.token(r#"{"alg":"none"}"#, &claims(ORIGIN, NOW + 60));
        assert_eq!(with(&none, &signer.key()), Err(VapidError::Token));
        assert_eq!(with(&good, "BAAA"), Err(VapidError::Key));
        for scheme in ["", "vapid", "Bearer abc", "vapid t=a", "vapid t=a,t=b,k=c", "vapid t"] {
            assert_eq!(judge(scheme), Err(VapidError::Scheme), "{scheme:?}");
        }
        for token in ["", "a", "a.b", "a.b.c", "....", "e30.e30.e30"] {
            assert_eq!(with(token, &signer.key()), Err(VapidError::Token), "{token:?}");
        }
    }

    #[test]
    fn a_key_is_an_uncompressed_point() {
        let key = Signer::new().key();
        assert!(Key::parse(&key).is_some());
        assert_eq!(Key::parse(&format!("{key}=")), Key::parse(&key));
        for wrong in ["", "AAAA", &key[..86], &format!("{key}AA"), &key.replacen('B', "A", 1)] {
            assert_eq!(Key::parse(wrong), None, "{wrong:?}");
        }
    }
}
