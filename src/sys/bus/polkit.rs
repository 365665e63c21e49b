//! polkit (org.freedesktop.PolicyKit1.Authority): whether an administrator lets a caller do more than its own rights
//! allow.
//!
//! It is asked over a connection that is there as long as the question is: most systems never ask, and polkit lets go of
//! a question whose asker is gone. Whatever goes wrong, the answer is no.

use std::{
    collections::HashMap,
    future::{Future, poll_fn},
    os::fd::{AsFd, OwnedFd},
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    task::Poll,
    time::Duration,
};

use async_channel::Receiver;
use futures_core::Stream;
use zbus::{Connection, Fd, Message, Variant, connection::Builder, fdo};
use zruntime::SharedRuntime;

use super::wire::{BUS_NAME, clip};
use crate::event::{Authorization, Privilege};

const NAME: &str = "org.freedesktop.PolicyKit1";
const PATH: &str = "/org/freedesktop/PolicyKit1/Authority";
const INTERFACE: &str = "org.freedesktop.PolicyKit1.Authority";
/// `CheckAuthorizationFlags.AllowUserInteraction`.
const ALLOW_USER_INTERACTION: u32 = 1;

/// Questions under way at most, from all buses.
const QUESTIONS: usize = 16;
/// For an answer that needs nobody; polkit may have to be started first.
const PATIENCE: Duration = Duration::from_secs(25);
/// For somebody to type a password.
const PATIENCE_WITH_PEOPLE: Duration = Duration::from_secs(120);
/// For taking a question back.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Where polkit is asked.
#[derive(Clone, Debug)]
pub(super) struct Authority {
    /// The system bus; `None` for where it usually is.
    address: Option<String>,
    under_way: Arc<AtomicUsize>,
}

impl Authority {
    pub(super) fn at(address: Option<String>) -> Self {
        Self { address, under_way: Arc::default() }
    }

    /// Room for one more question, if there is any.
    pub(super) fn place(&self) -> Option<Place> {
        let more = |count: usize| (count < QUESTIONS).then_some(count + 1);
        self.under_way.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok()?;
        Some(Place { address: self.address.clone(), under_way: Arc::clone(&self.under_way) })
    }
}

/// Room for one question.
#[derive(Debug)]
pub(super) struct Place {
    address: Option<String>,
    under_way: Arc<AtomicUsize>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.under_way.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What polkit is asked.
#[derive(Debug)]
pub(super) struct Question {
    pub(super) subject: Subject,
    pub(super) privilege: Privilege,
    /// What a rule can look at: the app, or the user.
    pub(super) details: HashMap<&'static str, String>,
    /// Whether somebody may be asked for a password.
    pub(super) interactive: bool,
}

/// Whom it is about.
#[derive(Debug)]
pub(super) enum Subject {
    /// The owner of this unique name on the system bus, which polkit looks up there itself.
    OnSystemBus(Arc<str>),
    /// A process that polkit cannot know by a name, for it is on another bus.
    Process {
        pid: u32,
        /// Clock ticks after boot; with the pid it names a process for those who know no pidfd (polkit before 124).
        start_time: u64,
        uid: u32,
        pidfd: OwnedFd,
    },
}

impl Subject {
    fn dict(&self) -> (&'static str, HashMap<&'static str, Variant<'_>>) {
        match self {
            Self::OnSystemBus(name) => ("system-bus-name", [("name", Variant::from(&**name))].into()),
            Self::Process { pid, start_time, uid, pidfd } => {
                // Signed on the wire, and -1 means none.
                let uid = i32::from_ne_bytes(uid.to_ne_bytes());
                let known = [
                    ("pid", Variant::from(*pid)),
                    ("start-time", Variant::from(*start_time)),
                    ("uid", Variant::from(uid)),
                    ("pidfd", Variant::from(Fd::from(pidfd.as_fd()))),
                ];
                ("unix-process", known.into())
            }
        }
    }
}

/// Asks; ends within two and a half minutes. The question is taken back when `withdrawn` is closed.
pub(super) async fn ask(place: Place, question: Question, withdrawn: Receiver<()>) -> Authorization {
    let answer = match SharedRuntime::current() {
        Ok(runtime) => attempt(&runtime, &place, &question, withdrawn).await,
        Err(error) => Err(error.to_string()),
    };
    match answer {
        Ok(()) => Authorization::Granted(question.privilege),
        Err(reason) => {
            log::debug!("{}: {reason}", question.privilege.action());
            Authorization::Refused(reason.into())
        }
    }
}

async fn attempt(
    runtime: &SharedRuntime,
    place: &Place,
    question: &Question,
    withdrawn: Receiver<()>,
) -> Result<(), String> {
    static QUESTION: AtomicU64 = AtomicU64::new(0);
    let connecting = runtime.timeout(PATIENCE, connect(place.address.as_deref())).await;
    let connection = match connecting {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => return Err(format!("there is no system bus to ask polkit on ({error})")),
        Err(_) => return Err("the system bus does not answer, so polkit cannot be asked".into()),
    };
    let number = format!("nightporter-{}", QUESTION.fetch_add(1, Ordering::Relaxed));
    let patience = if question.interactive { PATIENCE_WITH_PEOPLE } else { PATIENCE };
    let mut checking = pin!(runtime.timeout(patience, check(&connection, question, &number)));
    let mut withdrawn = pin!(withdrawn);
    let checked = poll_fn(|context| {
        if withdrawn.as_mut().poll_next(context).is_ready() {
            return Poll::Ready(None);
        }
        checking.as_mut().poll(context).map(Some)
    });
    let reason = match checked.await {
        Some(Ok(answer)) => return answer,
        Some(Err(_)) => format!("nobody answered polkit's question within {} s", patience.as_secs()),
        None => "the caller is gone".into(),
    };
    let number = number.as_str();
    let cancel = connection.call_method(Some(NAME), PATH, Some(INTERFACE), "CancelCheckAuthorization", &number);
    if let Ok(Err(error)) = runtime.timeout(LAST_WORDS, cancel).await {
        log::debug!("a question to polkit was not taken back: {error}");
    }
    Err(reason)
}

async fn connect(address: Option<&str>) -> zbus::Result<Connection> {
    address.map_or_else(Builder::system, Builder::address).build().await
}

/// polkit's answer; the reason when it is not a clear yes.
async fn check(connection: &Connection, question: &Question, number: &str) -> Result<(), String> {
    let none = HashMap::new();
    // polkit takes them from root alone, and a question with them from somebody else is an error.
    let details = if rustix::process::geteuid().is_root() { &question.details } else { &none };
    let flags = if question.interactive { ALLOW_USER_INTERACTION } else { 0 };
    let arguments = (question.subject.dict(), question.privilege.action(), details, flags, number);
    let asked = connection.call_method(Some(NAME), PATH, Some(INTERFACE), "CheckAuthorization", &arguments);
    let reply = asked.await.map_err(|error| unanswered(&error))?;
    // A bus lets nobody answer who was not asked, unless its policy says otherwise.
    let owner = connection.call_method(Some(BUS_NAME), "/org/freedesktop/DBus", Some(BUS_NAME), "GetNameOwner", &NAME);
    let owner = owner.await.map_err(|error| unanswered(&error))?;
    let owner = owner.body();
    let owner = owner.deserialize::<&str>().map_err(|error| format!("the bus does not tell who polkit is: {error}"))?;
    if reply.header().sender().is_none_or(|sender| sender.as_str() != owner) {
        return Err("it was not polkit that answered".into());
    }
    judge(&reply, question.interactive)
}

fn judge(reply: &Message, interactive: bool) -> Result<(), String> {
    let body = reply.body();
    let Ok(((authorized, challenge, details),)) = body.deserialize::<((bool, bool, HashMap<&str, &str>),)>() else {
        return Err("polkit answered in a form that is not known here".into());
    };
    let reason = if authorized {
        return Ok(());
    } else if details.contains_key("polkit.dismissed") {
        "the question for the password was dismissed"
    } else if challenge && interactive {
        "it takes an administrator's password, and no authentication agent was there to ask for it"
    } else if challenge {
        "it takes an administrator's password, and the caller does not let anybody be asked for one"
    } else {
        "polkit does not allow it"
    };
    Err(reason.into())
}

fn unanswered(error: &zbus::Error) -> String {
    match error {
        zbus::Error::FDO(error) => match &**error {
            fdo::Error::ServiceUnknown(_) | fdo::Error::NameHasNoOwner(_) => "there is no polkit here to ask".into(),
            fdo::Error::NoReply(_) | fdo::Error::Disconnected(_) => "polkit ended while it was asked".into(),
            other => format!("polkit cannot be asked: {}", clip(&other.to_string())),
        },
        other => format!("polkit cannot be asked: {}", clip(&other.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(body: &(impl serde::Serialize + zbus::DynamicType)) -> Message {
        let call = Message::method_call("/", "X").build(&()).unwrap();
        Message::method_return(&call.header()).build(body).unwrap()
    }

    #[test]
    fn only_a_clear_yes_is_one() {
        let said = |authorized: bool, challenge: bool, details: &[(&str, &str)]| {
            reply(&((authorized, challenge, details.iter().copied().collect::<HashMap<_, _>>()),))
        };
        assert_eq!(judge(&said(true, false, &[("polkit.temporary_authorization_id", "x")]), false), Ok(()));
        assert_eq!(judge(&said(true, true, &[]), true), Ok(()));
        for (answer, interactive, word) in [
            (said(false, false, &[]), true, "does not allow"),
            (said(false, true, &[]), false, "does not let anybody be asked"),
            (said(false, true, &[]), true, "authentication agent"),
            (said(false, false, &[("polkit.dismissed", "true")]), true, "dismissed"),
            (reply(&()), true, "form"),
            (reply(&true), true, "form"),
            (reply(&"yes"), true, "form"),
            (reply(&(true, false)), true, "form"),
            (reply(&((1_u32, 0_u32, HashMap::<&str, &str>::new()),)), true, "form"),
        ] {
            let reason = judge(&answer, interactive).unwrap_err();
            assert!(reason.contains(word), "{reason}");
        }
    }

    #[test]
    fn there_is_room_for_a_few_questions() {
        let authority = Authority::at(None);
        let mut places: Vec<_> = std::iter::from_fn(|| authority.place()).collect();
        assert_eq!(places.len(), QUESTIONS);
        places.pop();
        assert!(authority.place().is_some(), "a question that ended makes room");
        drop(places);
        assert_eq!(std::iter::from_fn(|| authority.place()).collect::<Vec<_>>().len(), QUESTIONS);
    }
}
