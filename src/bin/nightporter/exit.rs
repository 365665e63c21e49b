//! Exit codes: those of sysexits.h, so that scripts can tell what went wrong without reading the text.

use std::{fmt, process::ExitCode};

/// How the program can end other than well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// The daemon will not do it: the app is protected, or the profile forbids it. Or `doctor` has found
    /// something broken, or `measure` missed what was expected.
    Refused = 1,
    /// EX_USAGE: the command line is wrong, or APP fits several apps.
    Usage = 64,
    /// EX_DATAERR: the input cannot be used, such as a message over 4096 bytes.
    Data = 65,
    /// EX_NOUSER: no such app or registration.
    NoSuchApp = 67,
    /// EX_UNAVAILABLE: the daemon, the server or a program needed is not there.
    Unavailable = 69,
    /// EX_SOFTWARE: it was tried and failed.
    Failed = 70,
    /// EX_OSERR: the system would not let us: a process, a socket.
    System = 71,
    /// EX_CANTCREAT: an output file cannot be written.
    CannotCreate = 73,
    /// EX_TEMPFAIL: not now, perhaps later: the app is not running, the server is busy.
    Temporary = 75,
    /// EX_PROTOCOL: the other side answered something unexpected.
    Protocol = 76,
    /// EX_NOPERM: not allowed.
    NotAllowed = 77,
    /// Ended by Ctrl-C, as shells count it.
    Interrupted = 130,
}

/// What each code means, for the manual page.
pub(crate) const MEANINGS: [(Exit, &str); 12] = [
    (
        Exit::Refused,
        "The daemon refused: the app is protected or the profile does not allow it; for doctor: something is broken; for \
         measure: an expectation was missed.",
    ),
    (Exit::Usage, "Wrong use, or APP fits several apps."),
    (Exit::Data, "The input cannot be used, such as a message over 4096 bytes."),
    (Exit::NoSuchApp, "No such app, or it has no such registration."),
    (Exit::Unavailable, "The daemon, the push server or a program needed is not there."),
    (Exit::Failed, "It was tried and failed; for the demo: a message was lost or something was left behind."),
    (Exit::System, "The operating system refused a process, a socket or a file."),
    (Exit::CannotCreate, "The output file cannot be written."),
    (Exit::Temporary, "Not now, perhaps later: the app is not running, or the server is busy."),
    (Exit::Protocol, "The daemon or the server answered something this version does not understand."),
    (Exit::NotAllowed, "Not allowed for this user, or only the app's own server may send to this endpoint."),
    (Exit::Interrupted, "Interrupted."),
];

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// Why a command did not do its work: the code and a text a user can act on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) exit: Exit,
    pub(crate) text: String,
}

impl Failure {
    pub(crate) fn new(exit: Exit, text: impl Into<String>) -> Self {
        Self { exit, text: text.into() }
    }

    /// A failed system call or file operation: what was tried, and why it failed.
    pub(crate) fn system(what: impl fmt::Display, error: impl fmt::Display) -> Self {
        Self::new(Exit::System, format!("{what}: {error}"))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}
