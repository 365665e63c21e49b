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

use crate::{
    config::{Credentials, SecretSource, UpstreamKind},
    event::Login,
    model,
};

/// The longest secret taken, in bytes.
const LONGEST: u64 = 4096;
/// The longest file with a private key, in bytes.
const LONGEST_KEY: u64 = 64 * 1024;
/// World-readable.
const OTHERS_READ: u32 = 0o004;

/// A header value nobody is to see in a log.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    pub(super) const fn new(value: String) -> Self {
        Self(value)
    }

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

/// A header field that says who asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Field {
    /// Its name.
    pub name: &'static str,
    /// Its value.
    pub value: Secret,
}

/// What goes into the header of each request to a server of this kind; `None` where nothing does. Reads the file anew.
/// Blocks on it.
///
/// # Errors
/// [`CredentialError`] naming the file at fault.
pub fn header(kind: UpstreamKind, credentials: &Credentials) -> Result<Option<Field>, CredentialError> {
    header_from(kind, credentials, directory())
}

/// What a protocol of its own logs in with (MQTT). Reads the file anew. Blocks on it.
///
/// # Errors
/// [`CredentialError`] naming the file at fault.
pub fn login(credentials: &Credentials) -> Result<Login, CredentialError> {
    let secret = |source| read(source, directory()).map(|(_, secret)| Some(model::Secret::new(secret)));
    Ok(match credentials {
        Credentials::None => Login { username: None, password: None },
        Credentials::TokenFile(source) => Login { username: None, password: secret(source)? },
        Credentials::Password { username, password } => {
            Login { username: Some(username.clone()), password: secret(password)? }
        }
    })
}

/// A private key in PEM, and where it is from. Blocks on the file.
///
/// # Errors
/// [`CredentialError`] naming the file at fault.
pub fn key(source: &SecretSource) -> Result<(PathBuf, Vec<u8>), CredentialError> {
    match place(source, directory())? {
        Place::Given(secret) => Ok((panel(), secret.as_bytes().to_vec())),
        Place::File(path) => file(&path, LONGEST_KEY).map(|bytes| (path, bytes)),
    }
}

fn directory() -> Option<OsString> {
    std::env::var_os("CREDENTIALS_DIRECTORY")
}

fn header_from(
    kind: UpstreamKind,
    credentials: &Credentials,
    directory: Option<OsString>,
) -> Result<Option<Field>, CredentialError> {
    if kind == UpstreamKind::Mqtt {
        return Ok(None);
    }
    match credentials {
        Credentials::None => Ok(None),
        Credentials::TokenFile(source) => {
            let (path, token) = read(source, directory)?;
            // It goes into the header as it is.
            if !token.bytes().all(|byte| byte.is_ascii_graphic()) {
                return Err(CredentialError::Unusable { path, problem: "hold a character no token can have" });
            }
            Ok(Some(if kind == UpstreamKind::Gotify {
                Field { name: "X-Gotify-Key", value: Secret(token) }
            } else {
                Field { name: "Authorization", value: Secret(format!("Bearer {token}")) }
            }))
        }
        Credentials::Password { username, password } => {
            if username.contains(|c: char| c == ':' || c.is_control()) {
                return Err(CredentialError::UserName(username.to_string()));
            }
            let (_, password) = read(password, directory)?;
            let value = Secret(format!("Basic {}", BASE64_STANDARD.encode(format!("{username}:{password}"))));
            Ok(Some(Field { name: "Authorization", value }))
        }
    }
}

enum Place<'a> {
    Given(&'a str),
    File(PathBuf),
}

fn place(source: &SecretSource, directory: Option<OsString>) -> Result<Place<'_>, CredentialError> {
    match (source, directory) {
        (SecretSource::Given(secret), _) => Ok(Place::Given(secret.reveal())),
        (SecretSource::File(path), _) => Ok(Place::File(path.clone())),
        (SecretSource::Credential(name), Some(directory)) => Ok(Place::File(Path::new(&directory).join(name))),
        (SecretSource::Credential(name), None) => Err(CredentialError::NoDirectory(name.clone())),
    }
}

/// A secret of one line, and where it is from.
fn read(source: &SecretSource, directory: Option<OsString>) -> Result<(PathBuf, String), CredentialError> {
    match place(source, directory)? {
        Place::File(path) => first_line(&path).map(|line| (path, line)),
        Place::Given(secret) if secret.contains(char::is_control) => {
            Err(CredentialError::Unusable { path: panel(), problem: "hold a control character" })
        }
        Place::Given(secret) => Ok((panel(), secret.to_owned())),
    }
}

fn panel() -> PathBuf {
    PathBuf::from("the settings panel")
}

fn first_line(path: &Path) -> Result<String, CredentialError> {
    let unusable = |problem| CredentialError::Unusable { path: path.to_owned(), problem };
    let bytes = file(path, LONGEST)?;
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

fn file(path: &Path, longest: u64) -> Result<Vec<u8>, CredentialError> {
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
    file.take(longest + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() as u64 > longest {
        return Err(unusable("are longer than a secret can be"));
    }
    Ok(bytes)
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

    fn authorization(credentials: &Credentials) -> Result<Option<Secret>, CredentialError> {
        let field = header_from(UpstreamKind::Ntfy, credentials, None)?;
        Ok(field.map(|Field { name, value }| {
            assert_eq!(name, "Authorization");
            value
        }))
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
        let ntfy = UpstreamKind::Ntfy;
        let field = header_from(ntfy, &credentials("ali"), Some(dir.path().into())).unwrap().unwrap();
        assert_eq!(field.value.expose(), format!("Basic {}", BASE64_STANDARD.encode("ali:open sésame")));
        let error = header_from(ntfy, &credentials("ali"), None).unwrap_err();
        assert!(error.to_string().contains("LoadCredential=ntfy"), "{error}");
        assert!(header_from(ntfy, &credentials("a:b"), Some(dir.path().into())).is_err());
    }

    #[test]
    fn each_kind_says_it_in_its_own_way() {
        let given = |secret: &str| SecretSource::Given(model::Secret::new(secret));
        let token = Credentials::TokenFile(given("C1"));
        let password = Credentials::Password { username: "ali".into(), password: given("open sésame") };
        let field = |kind, credentials| header_from(kind, credentials, None).unwrap();
        let shown = |field: Option<Field>| field.map(|field| (field.name, field.value.expose().to_owned()));
        assert_eq!(shown(field(UpstreamKind::Gotify, &token)), Some(("X-Gotify-Key", "C1".into())));
        assert_eq!(field(UpstreamKind::Gotify, &password).unwrap().name, "Authorization");
        assert_eq!(shown(field(UpstreamKind::NextPush, &token)), Some(("Authorization", "Bearer C1".into())));
        assert_eq!(field(UpstreamKind::Mqtt, &token), None);
        let logged_in = login(&token).unwrap();
        assert_eq!((logged_in.username, logged_in.password), (None, Some(model::Secret::new("C1"))));
        let logged_in = login(&password).unwrap();
        assert_eq!(logged_in.username.as_deref(), Some("ali"));
        assert_eq!(logged_in.password, Some(model::Secret::new("open sésame")));
        assert_eq!(login(&Credentials::None).unwrap(), Login { username: None, password: None });
        // What was typed into a panel goes into no header with a line end.
        assert!(login(&Credentials::TokenFile(given("a\r\nb"))).is_err());
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
            (&long, "longer"),
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
