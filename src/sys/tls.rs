//! TLS configuration: system trust store or a CA file.
//!
//! The roots (some 150 certificates on a Debian system) are in memory only while a handshake needs them: an idle daemon
//! does not pay for a trust store it reads once a day.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, Weak},
};

use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::{
        Resumption, WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::CryptoProvider,
    pki_types::{
        CertificateDer, ServerName, UnixTime,
        pem::{self, PemObject},
    },
};

/// Why there is nothing to trust.
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
    /// The cryptography library refused the certificates.
    #[error("{0}")]
    Library(String),
}

/// One upstream's TLS client. Cheap to make: nothing is read before [`TlsClient::roots`].
#[derive(Debug)]
pub struct TlsClient {
    config: Arc<ClientConfig>,
    trust: Arc<Trust>,
}

/// Keeps the trusted certificates in memory. Held while a handshake is under way.
#[derive(Clone, Debug)]
pub struct Roots {
    _verifier: Arc<WebPkiServerVerifier>,
}

impl TlsClient {
    /// A client that trusts the certificates in `ca_file`, or the system's.
    ///
    /// # Errors
    /// [`TlsError::Library`] when the cryptography library cannot be set up.
    pub fn new(ca_file: Option<PathBuf>) -> Result<Self, TlsError> {
        let provider = provider();
        let trust = Arc::new(Trust { provider: Arc::clone(&provider), ca_file, verifier: Mutex::new(Weak::new()) });
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
            .map_err(|e| TlsError::Library(e.to_string()))?
            .dangerous()
            .with_custom_certificate_verifier(Arc::clone(&trust) as Arc<dyn ServerCertVerifier>)
            .with_no_client_auth();
        config.resumption = Resumption::in_memory_sessions(4);
        Ok(Self { config: Arc::new(config), trust })
    }

    /// The configuration for a connection. Hold [`TlsClient::roots`] until its handshake is done.
    pub fn config(&self) -> Arc<ClientConfig> {
        Arc::clone(&self.config)
    }

    /// Reads the trusted certificates unless another handshake holds them already. Blocks on files.
    ///
    /// # Errors
    /// [`TlsError`] naming the file or package at fault.
    pub fn roots(&self) -> Result<Roots, TlsError> {
        Ok(Roots { _verifier: self.trust.verifier()? })
    }

    #[cfg(test)]
    pub(super) fn roots_held(&self) -> bool {
        self.trust.verifier.lock().unwrap().strong_count() > 0
    }
}

/// A rustls configuration with a small session cache; the trusted certificates are read now, to tell early when they
/// cannot be, and again at each handshake.
///
/// # Errors
/// [`TlsError`] naming the file or package at fault.
pub fn client_config(ca_file: Option<&Path>) -> Result<Arc<ClientConfig>, TlsError> {
    let client = TlsClient::new(ca_file.map(Path::to_owned))?;
    client.roots()?;
    Ok(client.config())
}

/// The same trust for ureq. Blocks on files.
///
/// # Errors
/// [`TlsError`] naming the file or package at fault.
pub fn ureq_config(ca_file: Option<&Path>) -> Result<ureq::tls::TlsConfig, TlsError> {
    certificates(ca_file).map(|certificates| ureq_trusting(&certificates))
}

/// ureq's configuration for a server without TLS; should that redirect to one with TLS, it is not trusted.
pub fn ureq_without_trust() -> ureq::tls::TlsConfig {
    ureq_trusting(&[])
}

fn ureq_trusting(certificates: &[CertificateDer<'_>]) -> ureq::tls::TlsConfig {
    let roots: Vec<_> = certificates.iter().map(|der| ureq::tls::Certificate::from_der(der).to_owned()).collect();
    ureq::tls::TlsConfig::builder()
        .provider(ureq::tls::TlsProvider::Rustls)
        .unversioned_rustls_crypto_provider(provider())
        .root_certs(ureq::tls::RootCerts::from(roots))
        .build()
}

/// A TLS failure in words a user can act on.
pub fn describe(error: &rustls::Error) -> String {
    let rustls::Error::InvalidCertificate(problem) = error else { return error.to_string() };
    let hint = match problem {
        CertificateError::UnknownIssuer => "signed by nobody this system trusts (ca-file names another authority)",
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "not valid yet; is this machine's clock right?"
        }
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            "expired, unless this machine's clock is wrong"
        }
        _ => return format!("the server's certificate is not accepted: {problem}"),
    };
    format!("the server's certificate is {hint}")
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
    verifier: Mutex<Weak<WebPkiServerVerifier>>,
}

impl Trust {
    fn verifier(&self) -> Result<Arc<WebPkiServerVerifier>, TlsError> {
        let mut slot = self.verifier.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(verifier) = slot.upgrade() {
            return Ok(verifier);
        }
        let mut roots = RootCertStore::empty();
        let (added, _) = roots.add_parsable_certificates(certificates(self.ca_file.as_deref())?);
        if added == 0 {
            return Err(self.ca_file.clone().map_or_else(
                || TlsError::SystemStore { problem: ": none of those found could be read".into() },
                |path| TlsError::CaFile { path, problem: "holds no usable certificate".into() },
            ));
        }
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&self.provider))
            .build()
            .map_err(|e| TlsError::Library(e.to_string()))?;
        *slot = Arc::downgrade(&verifier);
        Ok(verifier)
    }
}

impl ServerCertVerifier for Trust {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        // Held by the link's `Roots` meanwhile, so this reads no file.
        let verifier = self.verifier().map_err(|e| rustls::Error::General(e.to_string()))?;
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
        let client = TlsClient::new(Some(path)).unwrap();
        assert_eq!(client.trust.verifier.lock().unwrap().strong_count(), 0);
        let first = client.roots().unwrap();
        let second = client.roots().unwrap();
        assert_eq!(client.trust.verifier.lock().unwrap().strong_count(), 2);
        drop((first, second));
        assert_eq!(client.trust.verifier.lock().unwrap().strong_count(), 0);
    }
}
