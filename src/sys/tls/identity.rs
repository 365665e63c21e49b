//! The certificate this machine shows to a server that wants one.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, Weak},
};

use rustls::{
    SignatureScheme,
    client::ResolvesClientCert,
    crypto::CryptoProvider,
    pki_types::{
        CertificateDer, PrivateKeyDer,
        pem::{self, PemObject},
    },
    sign::CertifiedKey,
};

use crate::{
    config::ClientCertificate,
    sys::credentials::{self, CredentialError},
};

/// Why this machine has nothing to show.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The certificate or the key cannot be used.
    #[error("{}: {problem}", path.display())]
    Unusable {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The key cannot be read.
    #[error(transparent)]
    Key(#[from] CredentialError),
}

/// Hands rustls the certificate while a handshake holds it.
#[derive(Debug)]
pub(super) struct Identity {
    provider: Arc<CryptoProvider>,
    source: ClientCertificate,
    /// With the fingerprint of the certificate.
    current: Mutex<(Weak<CertifiedKey>, u64)>,
}

impl Identity {
    pub(super) fn new(provider: Arc<CryptoProvider>, source: ClientCertificate) -> Self {
        Self { provider, source, current: Mutex::default() }
    }

    /// The certificate with its key and its fingerprint; read unless somebody holds it already.
    pub(super) fn key(&self) -> Result<(Arc<CertifiedKey>, u64), IdentityError> {
        let mut slot = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(key) = slot.0.upgrade() {
            return Ok((key, slot.1));
        }
        let chain = chain(&self.source.certificate)?;
        let (path, pem) = credentials::key(&self.source.key)?;
        let key = PrivateKeyDer::from_pem_slice(&pem).map_err(|_| no_key(path))?;
        let mut hasher = DefaultHasher::new();
        for certificate in &chain {
            certificate.as_ref().hash(&mut hasher);
        }
        let fingerprint = hasher.finish();
        let key = CertifiedKey::from_der(chain, key, &self.provider).map(Arc::new).map_err(|error| {
            let problem = format!("does not go with its private key, or cannot be used: {error}");
            IdentityError::Unusable { path: self.source.certificate.clone(), problem }
        })?;
        *slot = (Arc::downgrade(&key), fingerprint);
        Ok((key, fingerprint))
    }
}

impl ResolvesClientCert for Identity {
    fn resolve(&self, _root_hints: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner).0.upgrade()
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// The same for ureq.
pub(super) fn for_ureq(source: &ClientCertificate) -> Result<ureq::tls::ClientCert, IdentityError> {
    use ureq::tls::{Certificate, ClientCert, PrivateKey};
    let chain: Vec<_> = chain(&source.certificate)?.iter().map(|der| Certificate::from_der(der).to_owned()).collect();
    let (path, pem) = credentials::key(&source.key)?;
    let key = PrivateKey::from_pem(&pem).map_err(|_| no_key(path))?;
    Ok(ClientCert::new_with_certs(&chain, key))
}

fn chain(path: &Path) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    let unusable = |problem| IdentityError::Unusable { path: path.to_owned(), problem };
    let chain: Result<Vec<_>, _> = CertificateDer::pem_file_iter(path).and_then(Iterator::collect);
    match chain {
        Ok(chain) if chain.is_empty() => Err(unusable("holds no PEM certificate".into())),
        Ok(chain) => Ok(chain),
        Err(pem::Error::Io(error)) => Err(unusable(error.to_string())),
        Err(error) => Err(unusable(format!("is not a PEM file of certificates: {error}"))),
    }
}

/// The parser's own words are not shown: they could hold part of the key.
fn no_key(path: PathBuf) -> IdentityError {
    let problem = "holds no private key in PEM that can be used (one with a passphrase cannot)".into();
    IdentityError::Unusable { path, problem }
}
