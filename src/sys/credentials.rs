//! Reads secrets from files and systemd credentials when a link is made.

use std::{
    collections::BTreeSet,
    ffi::OsString,
    fmt,
    fs::OpenOptions,
    io::{self, Read},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use base64::{Engine, prelude::BASE64_STANDARD};

use crate::config::{Credentials, SecretSource};

/// The longest secret taken, in bytes.
const LONGEST: u64 = 4096;
/// World-readable.
const OTHERS_READ: u32 = 0o004;

/// A header value nobody is to see in a log.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// The value, for the wire.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// Why a secret could not be had. Never holds the secret.
#[derive(Debug, thiserror::Error)]
pub enum CredentialError {
    /// The file cannot be read.
    #[error("cannot read the credentials in {}: {source}", path.display())]
    Unreadable {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file's first line is no secret that can be sent.
    #[error("the credentials in {} {problem}", path.display())]
    Unusable {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        problem: &'static str,
    },
    /// A systemd credential is configured but systemd handed none over.
    #[error("no CREDENTIALS_DIRECTORY for the credential \"{0}\"; the unit needs LoadCredential={0}:…")]
    NoDirectory(String),
    /// RFC 7617 §2.
    #[error("the user name \"{0}\" must hold neither \":\" nor control characters")]
    UserName(String),
}

/// The `Authorization` header for `credentials`; `None` when none is needed. Reads the file anew. Blocks on it.
///
/// # Errors
/// [`CredentialError`] naming the file at fault.
pub fn authorization(credentials: &Credentials) -> Result<Option<Secret>, CredentialError> {
    from_directory(credentials, std::env::var_os("CREDENTIALS_DIRECTORY"))
}

fn from_directory(credentials: &Credentials, directory: Option<OsString>) -> Result<Option<Secret>, CredentialError> {
    let read = |source: &SecretSource| {
        let path = match (source, directory) {
            (SecretSource::Given(secret), _) => {
                return Ok((PathBuf::from("the settings panel"), secret.reveal().to_owned()));
            }
            (SecretSource::File(path), _) => path.clone(),
            (SecretSource::Credential(name), Some(directory)) => Path::new(&directory).join(name),
            (SecretSource::Credential(name), None) => return Err(CredentialError::NoDirectory(name.clone())),
        };
        first_line(&path).map(|line| (path, line))
    };
    match credentials {
        Credentials::None => Ok(None),
        Credentials::TokenFile(source) => {
            let (path, token) = read(source)?;
            // It goes into the header as it is.
            if !token.bytes().all(|byte| byte.is_ascii_graphic()) {
                return Err(CredentialError::Unusable { path, problem: "hold a character no token can have" });
            }
            Ok(Some(Secret(format!("Bearer {token}"))))
        }
        Credentials::Password { username, password } => {
            if username.contains(|c: char| c == ':' || c.is_control()) {
                return Err(CredentialError::UserName(username.to_string()));
            }
            let (_, password) = read(password)?;
            Ok(Some(Secret(format!("Basic {}", BASE64_STANDARD.encode(format!("{username}:{password}"))))))
        }
    }
}

fn first_line(path: &Path) -> Result<String, CredentialError> {
    let unreadable = |source| CredentialError::Unreadable { path: path.to_owned(), source };
    let unusable = |problem| CredentialError::Unusable { path: path.to_owned(), problem };
    // O_NONBLOCK: a FIFO in its place must not stop the worker for good.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(unreadable)?;
    let metadata = file.metadata().map_err(unreadable)?;
    if !metadata.is_file() {
        return Err(unusable("are not in a regular file"));
    }
    if metadata.mode() & OTHERS_READ != 0 {
        warn_once(path);
    }
    let mut bytes = Vec::new();
    file.take(LONGEST + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() as u64 > LONGEST {
        return Err(unusable("are longer than 4096 bytes"));
    }
    let text = String::from_utf8(bytes).map_err(|_| unusable("are not text (UTF-8)"))?;
    let line = text.lines().next().unwrap_or_default().trim();
    if line.is_empty() {
        return Err(unusable("have an empty first line"));
    }
    if line.contains(char::is_control) {
        return Err(unusable("hold a control character"));
    }
    Ok(line.to_owned())
}

/// The files are read at each connect; the log need not say it each time.
fn warn_once(path: &Path) {
    static WARNED: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());
    if WARNED.lock().unwrap_or_else(PoisonError::into_inner).insert(path.to_owned()) {
        log::warn!("everyone on this machine can read the credentials in {}; try chmod o-r", path.display());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(content: &[u8]) -> Result<Option<Secret>, CredentialError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        std::fs::write(&path, content).unwrap();
        authorization(&Credentials::TokenFile(SecretSource::File(path)))
    }

    #[test]
    fn a_token_is_the_first_line_trimmed() {
        assert_eq!(token(b"  tk_abc \nsecond line\n").unwrap().unwrap().expose(), "Bearer tk_abc");
        assert_eq!(authorization(&Credentials::None).unwrap(), None);
    }

    #[test]
    fn a_password_becomes_basic() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("ntfy"), "open sésame\n").unwrap();
        let credentials = |username: &str| Credentials::Password {
            username: username.into(),
            password: SecretSource::Credential("ntfy".into()),
        };
        let secret = from_directory(&credentials("ali"), Some(dir.path().into())).unwrap().unwrap();
        assert_eq!(secret.expose(), format!("Basic {}", BASE64_STANDARD.encode("ali:open sésame")));
        let error = from_directory(&credentials("ali"), None).unwrap_err();
        assert!(error.to_string().contains("LoadCredential=ntfy"), "{error}");
        assert!(from_directory(&credentials("a:b"), Some(dir.path().into())).is_err());
    }

    #[test]
    fn bad_files_are_named_and_never_quoted() {
        let long = vec![b'a'; 4097];
        for (content, word) in [
            (&b""[..], "empty"),
            (b"\nsecond", "empty"),
            (b"hush\x07hush", "control"),
            (b"hush hush", "character"),
            ("hüsh".as_bytes(), "character"),
            (b"\xff\xfe", "UTF-8"),
            (&long, "4096"),
        ] {
            let error = token(content).unwrap_err();
            let (text, debug) = (error.to_string(), format!("{error:?}"));
            assert!(text.contains(word) && text.contains("token"), "{text}");
            assert!(!text.contains("hush") && !debug.contains("hush"), "{debug}");
        }
        assert!(matches!(token(&vec![b'a'; 4096]), Ok(Some(_))));
        let missing = Credentials::TokenFile(SecretSource::File("/nonexistent/token".into()));
        assert!(authorization(&missing).unwrap_err().to_string().contains("/nonexistent/token"));
        let directory = Credentials::TokenFile(SecretSource::File("/tmp".into()));
        assert!(authorization(&directory).unwrap_err().to_string().contains("regular"));
    }

    #[test]
    fn a_fifo_does_not_block() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(authorization(&Credentials::TokenFile(SecretSource::File(path))).is_err());
    }

    #[test]
    fn debug_does_not_print_it() {
        assert_eq!(format!("{:?}", token(b"hush").unwrap()), "Some(Secret(..))");
    }
}
