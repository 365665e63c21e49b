//! TLS configuration: system trust store or a CA file, and a certificate of our own where the server wants one.
//!
//! The roots (some 150 certificates on a Debian system) and the private key are in memory only while a handshake needs
//! them: an idle daemon does not pay for a trust store it reads once a day. They are read anew each time, so that a
//! changed file needs no restart.

mod identity;

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, Weak},
};

use rustls::{
    AlertDescription, CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::{
        ResolvesClientCert, Resumption, WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::CryptoProvider,
    pki_types::{
        CertificateDer, ServerName, UnixTime as PkiTime,
        pem::{self, PemObject},
    },
    sign::CertifiedKey,
};

use self::identity::Identity;
pub use self::identity::IdentityError;
use crate::{
    config::{ClientCertificate, UpstreamSettings},
    time::UnixTime,
};

/// Sessions kept for resumption.
const SESSIONS: usize = 4;
/// Names of a wrong certificate that are shown, and characters of what else a peer makes us say.
const NAMES: usize = 3;
const LONGEST_TEXT: usize = 300;

/// Why TLS cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The configured file cannot be read or holds no certificate.
    #[error("{path}: {problem}")]
    CaFile {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// No certificate was found where the system keeps them.
    #[error("the system has no trusted certificates (install the ca-certificates package, or set ca-file){problem}")]
    SystemStore {
        /// What failed on the way, possibly nothing.
        problem: String,
    },
    /// What this machine is to show to the server cannot be read.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The cryptography library refused the certificates.
    #[error("{0}")]
    Library(String),
}

/// One upstream's TLS client. Cheap to make: nothing is read before [`TlsClient::prepare`].
#[derive(Debug)]
pub struct TlsClient {
    current: Mutex<Current>,
    trust: Arc<Trust>,
    identity: Option<Arc<Identity>>,
}

#[derive(Debug)]
struct Current {
    config: Arc<ClientConfig>,
    /// Of what the sessions in `config` were made with.
    fingerprint: Option<[u64; 2]>,
}

/// Keeps the trusted certificates and the private key in memory. Held while a handshake is under way.
#[derive(Clone, Debug)]
pub struct Roots {
    _verifier: Arc<WebPkiServerVerifier>,
    _identity: Option<Arc<CertifiedKey>>,
}

impl TlsClient {
    /// A client that trusts the certificates in `ca_file`, or the system's, and shows `certificate` where it is asked to.
    ///
    /// # Errors
    /// [`TlsError::Library`] when the cryptography library cannot be set up.
    pub fn new(ca_file: Option<PathBuf>, certificate: Option<ClientCertificate>) -> Result<Self, TlsError> {
        let provider = provider();
        let trust = Arc::new(Trust { provider: Arc::clone(&provider), ca_file, verifier: Mutex::default() });
        let identity = certificate.map(|certificate| Arc::new(Identity::new(Arc::clone(&provider), certificate)));
        let builder = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
            .map_err(|e| TlsError::Library(e.to_string()))?
            .dangerous()
            .with_custom_certificate_verifier(Arc::clone(&trust) as Arc<dyn ServerCertVerifier>);
        let mut config = match &identity {
            None => builder.with_no_client_auth(),
            Some(identity) => builder.with_client_cert_resolver(Arc::clone(identity) as Arc<dyn ResolvesClientCert>),
        };
        config.resumption = Resumption::in_memory_sessions(SESSIONS);
        Ok(Self { current: Mutex::new(Current { config: Arc::new(config), fingerprint: None }), trust, identity })
    }

    /// What a connection needs; hold the [`Roots`] until its handshake is done. Reads the trusted certificates and the
    /// private key, unless another handshake holds them already; when they are not what they were, earlier sessions are
    /// not resumed. Blocks on files.
    ///
    /// # Errors
    /// [`TlsError`] naming the file or package at fault.
    pub fn prepare(&self) -> Result<(Arc<ClientConfig>, Roots), TlsError> {
        let (verifier, trusted) = self.trust.verifier()?;
        let identity = self.identity.as_ref().map(|identity| identity.key()).transpose()?;
        let (identity, shown) = identity.map_or((None, 0), |(key, fingerprint)| (Some(key), fingerprint));
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if current.fingerprint.replace([trusted, shown]).is_some_and(|before| before != [trusted, shown]) {
            let mut config = ClientConfig::clone(&current.config);
            config.resumption = Resumption::in_memory_sessions(SESSIONS);
            current.config = Arc::new(config);
        }
        Ok((Arc::clone(&current.config), Roots { _verifier: verifier, _identity: identity }))
    }

    #[cfg(test)]
    pub(super) fn roots_held(&self) -> bool {
        self.trust.verifier.lock().unwrap().0.strong_count() > 0
    }
}

/// The same trust for ureq. Blocks on files.
///
/// # Errors
/// [`TlsError`] naming the file or package at fault.
pub fn ureq_config(ca_file: Option<&Path>) -> Result<ureq::tls::TlsConfig, TlsError> {
    certificates(ca_file).map(|certificates| ureq_with(&certificates, None))
}

/// The same trust, and the same certificate to show, as for a link to `upstream`. Blocks on files.
///
/// # Errors
/// [`TlsError`] naming the file or package at fault.
pub fn ureq_for(upstream: &UpstreamSettings) -> Result<ureq::tls::TlsConfig, TlsError> {
    let trusted = certificates(upstream.ca_file.as_deref())?;
    let shown = match &upstream.client_certificate {
        None => None,
        Some(certificate) => Some(identity::for_ureq(certificate)?),
    };
    Ok(ureq_with(&trusted, shown))
}

/// ureq's configuration for a server without TLS; should that redirect to one with TLS, it is not trusted.
pub fn ureq_without_trust() -> ureq::tls::TlsConfig {
    ureq_with(&[], None)
}

fn ureq_with(trusted: &[CertificateDer<'_>], shown: Option<ureq::tls::ClientCert>) -> ureq::tls::TlsConfig {
    let roots: Vec<_> = trusted.iter().map(|der| ureq::tls::Certificate::from_der(der).to_owned()).collect();
    ureq::tls::TlsConfig::builder()
        .provider(ureq::tls::TlsProvider::Rustls)
        .unversioned_rustls_crypto_provider(provider())
        .root_certs(ureq::tls::RootCerts::from(roots))
        .client_cert(shown)
        .build()
}

/// A TLS failure in words a user can act on.
pub fn describe(error: &rustls::Error) -> String {
    if let Some(times) = wrong_time(error) {
        return format!("the server's certificate is out of date, or this machine's clock is wrong: {times}");
    }
    match error {
        rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer) => {
            "the server's certificate is signed by nobody this system trusts (ca-file names another authority; a network \
             that wants you to log in on a web page first shows itself like this, too)"
                .into()
        }
        rustls::Error::InvalidCertificate(CertificateError::NotValidForNameContext { expected, presented }) => {
            let names: Vec<String> = presented.iter().take(NAMES).map(|name| plain(name)).collect();
            format!(
                "the certificate is not for {} but for {}; a network that wants you to log in on a web page first \
                 (captive portal) shows itself like this",
                expected.to_str(),
                if names.is_empty() { "nobody".into() } else { names.join(", ") },
            )
        }
        rustls::Error::InvalidCertificate(problem) => {
            format!("the server's certificate is not accepted: {}", plain(&problem.to_string()))
        }
        rustls::Error::AlertReceived(AlertDescription::CertificateRequired) => {
            "the server wants a certificate from this machine (certificate-file and key-file)".into()
        }
        error => plain(&error.to_string()),
    }
}

/// What the clock says and what the certificate says, where they contradict each other.
pub fn wrong_time(error: &rustls::Error) -> Option<String> {
    let rustls::Error::InvalidCertificate(problem) = error else { return None };
    let show = |time: &PkiTime| UnixTime::from_secs(time.as_secs());
    let (now, bound) = match problem {
        CertificateError::NotValidYetContext { time, not_before } => {
            (show(time), format!("from {} on", show(not_before)))
        }
        CertificateError::ExpiredContext { time, not_after } => (show(time), format!("until {}", show(not_after))),
        CertificateError::NotValidYet => (show(&PkiTime::now()), "from a later time on".into()),
        CertificateError::Expired => (show(&PkiTime::now()), "until an earlier time".into()),
        _ => return None,
    };
    Some(format!("this machine believes it is {now}, and the certificate is valid {bound}"))
}

/// What a peer made us say, without what could move a terminal's cursor, and not endless.
fn plain(text: &str) -> String {
    text.chars().take(LONGEST_TEXT).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn certificates(ca_file: Option<&Path>) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let Some(path) = ca_file else { return system_certificates() };
    let fail = |problem| TlsError::CaFile { path: path.to_owned(), problem };
    let parsed: Result<Vec<_>, _> = CertificateDer::pem_file_iter(path).and_then(Iterator::collect);
    match parsed {
        Ok(certificates) if certificates.is_empty() => Err(fail("holds no PEM certificate".into())),
        Ok(certificates) => Ok(certificates),
        Err(pem::Error::Io(error)) => Err(fail(error.to_string())),
        Err(error) => Err(fail(format!("is not a PEM file of certificates: {error}"))),
    }
}

fn system_certificates() -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let found = rustls_native_certs::load_native_certs();
    if found.certs.is_empty() {
        let problem = found.errors.first().map_or_else(String::new, |error| format!(": {error}"));
        return Err(TlsError::SystemStore { problem });
    }
    for error in found.errors {
        log::debug!("a trusted certificate of the system was passed over: {error}");
    }
    Ok(found.certs)
}

/// Verifies as rustls's own verifier does, with roots that come and go.
#[derive(Debug)]
struct Trust {
    provider: Arc<CryptoProvider>,
    ca_file: Option<PathBuf>,
    /// With the fingerprint of the certificates it was made of.
    verifier: Mutex<(Weak<WebPkiServerVerifier>, u64)>,
}

impl Trust {
    fn verifier(&self) -> Result<(Arc<WebPkiServerVerifier>, u64), TlsError> {
        let mut slot = self.verifier.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(verifier) = slot.0.upgrade() {
            return Ok((verifier, slot.1));
        }
        let found = certificates(self.ca_file.as_deref())?;
        let fingerprint = fingerprint(&found);
        let mut roots = RootCertStore::empty();
        let (added, _) = roots.add_parsable_certificates(found);
        if added == 0 {
            return Err(self.ca_file.clone().map_or_else(
                || TlsError::SystemStore { problem: ": none of those found could be read".into() },
                |path| TlsError::CaFile { path, problem: "holds no usable certificate".into() },
            ));
        }
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&self.provider))
            .build()
            .map_err(|e| TlsError::Library(e.to_string()))?;
        *slot = (Arc::downgrade(&verifier), fingerprint);
        Ok((verifier, fingerprint))
    }
}

/// Tells one set of certificates from another.
fn fingerprint(certificates: &[CertificateDer<'_>]) -> u64 {
    let mut hasher = DefaultHasher::new();
    for certificate in certificates {
        certificate.as_ref().hash(&mut hasher);
    }
    hasher.finish()
}

impl ServerCertVerifier for Trust {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: PkiTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        // Held by the link's `Roots` meanwhile, so this reads no file.
        let (verifier, _) = self.verifier().map_err(|e| rustls::Error::General(e.to_string()))?;
        verifier.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, cert, dss, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// rustls hands its errors through `io::Error`.
pub(super) fn tls_error(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref()?.downcast_ref()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client_config(ca_file: Option<&Path>) -> Result<Arc<ClientConfig>, TlsError> {
        TlsClient::new(ca_file.map(Path::to_owned), None)?.prepare().map(|(config, _)| config)
    }

    #[test]
    fn a_missing_or_empty_ca_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("missing.pem");
        let error = client_config(Some(&missing)).unwrap_err().to_string();
        assert!(error.contains("missing.pem") && error.contains("No such file"), "{error}");
        let empty = dir.path().join("empty.pem");
        std::fs::write(&empty, "nothing here").unwrap();
        let error = client_config(Some(&empty)).unwrap_err().to_string();
        assert!(error.contains("empty.pem") && error.contains("no PEM certificate"), "{error}");
        let broken = dir.path().join("broken.pem");
        std::fs::write(&broken, "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n").unwrap();
        let error = client_config(Some(&broken)).unwrap_err().to_string();
        assert!(error.contains("broken.pem") && error.contains("usable"), "{error}");
    }

    #[test]
    fn the_roots_are_gone_when_no_handshake_holds_them() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ca.pem");
        let cert = rcgen::generate_simple_self_signed(vec!["x".into()]).unwrap();
        std::fs::write(&path, cert.cert.pem()).unwrap();
        let client = TlsClient::new(Some(path.clone()), None).unwrap();
        let count = || client.trust.verifier.lock().unwrap().0.strong_count();
        assert_eq!(count(), 0);
        let (config, first) = client.prepare().unwrap();
        let (_, second) = client.prepare().unwrap();
        assert_eq!(count(), 2);
        drop((first, second));
        assert_eq!(count(), 0);
        // The sessions stay with the certificates they were made under.
        assert!(Arc::ptr_eq(&config, &client.prepare().unwrap().0));
        let other = rcgen::generate_simple_self_signed(vec!["x".into()]).unwrap();
        std::fs::write(&path, other.cert.pem()).unwrap();
        assert!(!Arc::ptr_eq(&config, &client.prepare().unwrap().0));
    }
}
