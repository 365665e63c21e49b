//! D-Bus service files: where they are and what they say (D-Bus specification, "Message Bus Starting Services").

use std::{
    env,
    ffi::OsStr,
    fs,
    io::Read,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use rustix::fs::OFlags;

use crate::{model::Bus, sys::users::User};

/// How a name's service file says it is started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::sys) struct ServiceFile {
    /// `SystemdService=`: the unit to start.
    pub(in crate::sys) systemd_service: Option<String>,
    /// `Exec=`, split into words; empty when there is none or it cannot be split.
    pub(in crate::sys) exec: Vec<String>,
    /// `User=`, for the system bus.
    pub(in crate::sys) user: Option<String>,
}

/// Largest service file read, in bytes.
const SIZE: u64 = 64 * 1024;
/// Files looked at in one directory when none has the name's own file name.
const FILES: usize = 4096;

/// The service file of `name` on `bus`, which is the system's or the daemon's own, from the first directory that has one.
pub(in crate::sys) fn find(bus: Bus, name: &str) -> Option<ServiceFile> {
    directories(bus).iter().find_map(|directory| find_in(directory, name))
}

/// The service file of `name` on another user's session bus. To be called with that user's rights.
pub(in crate::sys) fn find_of(user: &User, name: &str) -> Option<ServiceFile> {
    services(shares_of_user(user)).iter().find_map(|directory| find_in(directory, name))
}

/// Where another user's shared files are, most important first. To be called with that user's rights.
pub(super) fn shares_of_user(user: &User) -> Vec<PathBuf> {
    // The password database may be asked over the network; this thread may wait for it.
    let home = nix::unistd::User::from_uid(user.uid.into()).ok().flatten().map(|user| user.dir);
    shares_of(user, home.as_deref())
}

fn find_in(directory: &Path, name: &str) -> Option<ServiceFile> {
    // By convention the file is named after the service; the bus itself goes by what is inside.
    if let Some(found) = read(&directory.join(format!("{name}.service"))).and_then(|text| parse(&text, name)) {
        return Some(found);
    }
    let entries = fs::read_dir(directory).ok()?;
    entries
        .take(FILES)
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .filter(|path| path.extension() == Some(OsStr::new("service")))
        .find_map(|path| parse(&read(&path)?, name))
}

/// What `text` says of `name`; `None` when it is not a service file of that name.
fn parse(text: &str, name: &str) -> Option<ServiceFile> {
    let mut inside = false;
    let (mut own_name, mut exec, mut user, mut systemd_service) = (None, None, None, None);
    for line in text.lines().map(str::trim) {
        if let Some(group) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            inside = group == "D-BUS Service";
            continue;
        }
        if !inside || line.starts_with('#') {
            continue;
        }
        let Some((key, value)) = line.split_once('=') else { continue };
        let value = value.trim();
        match key.trim_end() {
            "Name" => own_name = Some(value),
            "Exec" => exec = Some(value),
            "User" => user = Some(value),
            "SystemdService" => systemd_service = Some(value),
            _ => {}
        }
    }
    (own_name? == name).then(|| ServiceFile {
        systemd_service: systemd_service.filter(|s| !s.is_empty()).map(str::to_owned),
        exec: exec.and_then(split_words).unwrap_or_default(),
        user: user.filter(|s| !s.is_empty()).map(str::to_owned),
    })
}

/// Splits as a POSIX shell would, without any expansion, as the bus itself does. `None` for an open quote.
pub(super) fn split_words(text: &str) -> Option<Vec<String>> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            c if c.is_ascii_whitespace() => words.extend(word.take()),
            '\'' => {
                let word = word.get_or_insert_default();
                loop {
                    match chars.next()? {
                        '\'' => break,
                        c => word.push(c),
                    }
                }
            }
            '"' => {
                let word = word.get_or_insert_default();
                loop {
                    match chars.next()? {
                        '"' => break,
                        '\\' => match chars.next()? {
                            c @ ('"' | '\\' | '$' | '`') => word.push(c),
                            c => word.extend(['\\', c]),
                        },
                        c => word.push(c),
                    }
                }
            }
            '\\' => word.get_or_insert_default().push(chars.next()?),
            '#' if word.is_none() => break,
            c => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    Some(words)
}

/// Where service files of `bus` are, most important first.
fn directories(bus: Bus) -> Vec<PathBuf> {
    match bus {
        Bus::System => [
            "/etc/dbus-1/system-services",
            "/run/dbus-1/system-services",
            "/usr/local/share/dbus-1/system-services",
            "/usr/share/dbus-1/system-services",
            "/lib/dbus-1/system-services",
        ]
        .map(PathBuf::from)
        .to_vec(),
        Bus::Session(_) => services(own_shares(|name| env::var(name).ok().filter(|value| !value.is_empty()))),
    }
}

fn services(shares: Vec<PathBuf>) -> Vec<PathBuf> {
    shares.into_iter().filter(|share| share.is_absolute()).map(|share| share.join("dbus-1/services")).collect()
}

/// Another user's environment is not ours to know; these are the defaults plus Flatpak's exports.
fn shares_of(user: &User, home: Option<&Path>) -> Vec<PathBuf> {
    let mut shares = vec![user.runtime_dir.clone()];
    shares.extend(home.map(|home| home.join(".local/share")));
    shares.extend(home.map(|home| home.join(".local/share/flatpak/exports/share")));
    shares.extend(["/var/lib/flatpak/exports/share", "/usr/local/share", "/usr/share"].map(PathBuf::from));
    shares
}

/// `$XDG_RUNTIME_DIR`, `$XDG_DATA_HOME` and `$XDG_DATA_DIRS` with their defaults (XDG base directory specification).
pub(super) fn own_shares(variable: impl Fn(&str) -> Option<String>) -> Vec<PathBuf> {
    let mut shares: Vec<PathBuf> = variable("XDG_RUNTIME_DIR").into_iter().map(PathBuf::from).collect();
    let data_home = variable("XDG_DATA_HOME").map(PathBuf::from);
    shares.extend(data_home.or_else(|| variable("HOME").map(|home| PathBuf::from(home).join(".local/share"))));
    let data_dirs = variable("XDG_DATA_DIRS").unwrap_or_else(|| "/usr/local/share:/usr/share".into());
    shares.extend(data_dirs.split(':').map(PathBuf::from));
    shares
}

/// A regular file's text. Anything else under that name (a FIFO that would block us) counts as absent.
pub(super) fn read(path: &Path) -> Option<String> {
    let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = fs::OpenOptions::new().read(true).custom_flags(i32::try_from(flags.bits()).ok()?).open(path).ok()?;
    if !file.metadata().ok()?.is_file() {
        return None;
    }
    let mut text = String::new();
    file.take(SIZE).read_to_string(&mut text).ok()?;
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn service_files() {
        let text = "# comment\n[Other]\nName=org.other\n[D-BUS Service]\n Name = org.a.B \nExec=/bin/app --gapplication-service\n\
                    SystemdService=a.service\nUser=root\nFuture=1\n";
        assert_eq!(
            parse(text, "org.a.B"),
            Some(ServiceFile {
                systemd_service: Some("a.service".into()),
                exec: vec!["/bin/app".into(), "--gapplication-service".into()],
                user: Some("root".into()),
            })
        );
        assert_eq!(parse(text, "org.other"), None);
        assert_eq!(parse("", "org.a.B"), None);
        assert_eq!(parse("[D-BUS Service]\nName\n=\n[]\n[", "org.a.B"), None);
        let bare = parse("[D-BUS Service]\nName=org.a.B\nExec='open\nSystemdService=\n", "org.a.B").unwrap();
        assert_eq!(bare, ServiceFile { systemd_service: None, exec: vec![], user: None });
    }

    #[test]
    fn exec_is_split_like_a_shell() {
        for (text, words) in [
            ("/bin/a", Some(vec!["/bin/a"])),
            ("  /bin/a   b\tc ", Some(vec!["/bin/a", "b", "c"])),
            ("'/opt/my app/run' \"a \\\"b\\\"\" c\\ d", Some(vec!["/opt/my app/run", "a \"b\"", "c d"])),
            ("a'b'\"c\"d ''", Some(vec!["abcd", ""])),
            ("a # comment", Some(vec!["a"])),
            ("a#b $HOME `x`", Some(vec!["a#b", "$HOME", "`x`"])),
            ("\"a\\n\"", Some(vec!["a\\n"])),
            ("", Some(vec![])),
            ("'open", None),
            ("\"open", None),
            ("\"open\\", None),
            ("end\\", None),
        ] {
            let split = split_words(text);
            assert_eq!(
                split.as_deref(),
                words.map(|w| w.into_iter().map(str::to_owned).collect::<Vec<_>>()).as_deref()
            );
        }
    }

    #[test]
    fn a_name_is_found_by_content_and_odd_files_do_no_harm() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        write("a.service", "[D-BUS Service]\nName=org.hidden.Name\nExec=/bin/x\n");
        write("org.wrong.service", "[D-BUS Service]\nName=org.else\nExec=/bin/x\n");
        write("b.txt", "[D-BUS Service]\nName=org.txt\nExec=/bin/x\n");
        fs::write(dir.path().join("org.bin.service"), [0xff, 0xfe, 0]).unwrap();
        fs::create_dir(dir.path().join("org.dir.service")).unwrap();
        nix::unistd::mkfifo(&dir.path().join("org.fifo.service"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(find_in(dir.path(), "org.hidden.Name").is_some());
        for name in ["org.wrong", "org.txt", "org.bin", "org.dir", "org.fifo", "../a", "x/y"] {
            assert_eq!(find_in(dir.path(), name), None, "{name}");
        }
        assert_eq!(find_in(Path::new("/nonexistent"), "org.a"), None);
    }

    #[test]
    fn directories_follow_the_environment() {
        let shares = own_shares(|name| match name {
            "HOME" => Some("/home/u".into()),
            "XDG_RUNTIME_DIR" => Some("/run/user/7".into()),
            "XDG_DATA_DIRS" => Some("/a:/b".into()),
            _ => None,
        });
        assert_eq!(shares, ["/run/user/7", "/home/u/.local/share", "/a", "/b"].map(PathBuf::from));
        assert!(directories(Bus::System).contains(&PathBuf::from("/usr/share/dbus-1/system-services")));
        let user = User { uid: 7, gid: 7, runtime_dir: "/run/user/7".into() };
        let found = services(shares_of(&user, Some(Path::new("/home/u"))));
        let expected = ["/run/user/7/dbus-1/services", "/home/u/.local/share/dbus-1/services"].map(PathBuf::from);
        assert_eq!(found.get(..2), Some(&expected[..]));
        assert!(services(shares_of(&user, None)).contains(&PathBuf::from("/usr/share/dbus-1/services")));
    }
}
