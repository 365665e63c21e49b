//! Asks the daemon: `org.nightporter1.Manager`. Synchronous, since the command line does one thing at a time.

use std::time::Duration;

use serde::{Serialize, de::DeserializeOwned};
use zbus::{
    Connection, DynamicType, Message, Proxy, block_on, connection::Builder, fdo, message::Flags, proxy::MethodFlags,
    wire::DynamicDeserialize,
};
use zruntime::SharedRuntime;

use crate::{
    agent::Agent,
    args::BusChoice,
    exit::{Exit, Failure},
};

/// The daemon's bus name.
pub(crate) const NAME: &str = "org.nightporter1";
const PATH: &str = "/org/nightporter1";
const MANAGER: &str = "org.nightporter1.Manager";
/// Somebody may have to type a password, which the daemon waits two minutes for; a report measures every app. So this is
/// long; it only guards against a daemon that hangs.
const TIMEOUT: Duration = Duration::from_secs(150);

/// A daemon that owns its name on the bus.
#[derive(Debug)]
pub(crate) struct Daemon {
    connection: Connection,
    /// Whether it is on the system bus, where what is not the user's own is.
    system: bool,
}

impl Daemon {
    /// Looks for the daemon where `choice` says: by default on the session bus, then on the system bus.
    pub(crate) fn find(choice: BusChoice) -> Result<Self, Failure> {
        let mut tried = Vec::new();
        for (wanted, name, builder) in [
            (!choice.system, "session", Builder::session as fn() -> Builder<'static>),
            (!choice.user, "system", Builder::system),
        ] {
            if !wanted {
                continue;
            }
            match connect(builder()) {
                Ok(connection) => match owned(&connection, NAME) {
                    Ok(true) => return Ok(Self { connection, system: name == "system" }),
                    Ok(false) => tried.push(format!("{name} bus: {NAME} is not there")),
                    Err(error) => tried.push(format!("{name} bus: {error}")),
                },
                Err(error) => tried.push(format!("{name} bus: cannot connect: {error}")),
            }
        }
        let start = match (choice.user, choice.system) {
            (true, _) => "nightporterd --user",
            (_, true) => "systemctl start nightporterd",
            _ => "systemctl start nightporterd (for the whole device) or nightporterd --user (for this session)",
        };
        Err(Failure::new(
            Exit::Unavailable,
            format!("the daemon is not running.\n  tried {}\n  start it with: {start}", tried.join("\n  tried ")),
        ))
    }

    /// The daemon on the bus at `address`, whether it is up already or not.
    pub(crate) fn at(address: &str) -> Result<Self, Failure> {
        let connection = connect(Builder::address(address))
            .map_err(|error| Failure::new(Exit::Unavailable, format!("cannot connect to {address}: {error}")))?;
        Ok(Self { connection, system: false })
    }

    /// Whether somebody owns `name` on this bus.
    pub(crate) fn owned(&self, name: &str) -> Result<bool, Failure> {
        owned(&self.connection, name).map_err(|error| failure(&error))
    }

    /// Has the bus start the owner of `name`, without waiting for it: starts of several go on at once.
    pub(crate) fn start(&self, name: &str) -> Result<(), Failure> {
        let sent = Message::method_call("/org/freedesktop/DBus", "StartServiceByName")
            .destination("org.freedesktop.DBus")
            .interface("org.freedesktop.DBus")
            .with_flags(Flags::NO_REPLY_EXPECTED)
            .build(&(name, 0_u32))
            .map(|message| block_on(self.connection.send(&message)));
        match sent {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) | Err(error) => Err(Failure::system(format!("cannot start {name}"), error)),
        }
    }

    /// Calls a method that answers with a JSON text.
    pub(crate) fn ask(&self, method: &str, app: Option<&str>) -> Result<String, Failure> {
        match app {
            Some(app) => self.call(method, &app),
            None => self.call(method, &()),
        }
    }

    /// [`Daemon::ask`] without asking anybody for a password.
    pub(crate) fn ask_silently(&self, method: &str) -> Result<String, Failure> {
        answer(method, self.call_with(MethodFlags::empty(), method, &()))
    }

    /// Calls a method that answers for the last `hours` with a JSON text; none where the daemon does not know the method.
    pub(crate) fn ask_hours(&self, method: &str, hours: u32) -> Result<Option<String>, Failure> {
        match self.try_call(method, &hours) {
            Ok(Some(text)) => Ok(Some(text)),
            Ok(None) => Err(no_answer(method)),
            Err(error) if is_unknown(&error) => Ok(None),
            Err(error) => Err(failure(&error)),
        }
    }

    /// The decisions after number `after`, as a JSON text.
    pub(crate) fn log(&self, after: u64) -> Result<String, Failure> {
        self.call("Log", &after)
    }

    /// Calls a method that does something to an app.
    pub(crate) fn act(&self, method: &str, app: &str) -> Result<(), Failure> {
        self.call(method, &app)
    }

    /// Has an app, or all of them, use an upstream.
    pub(crate) fn relocate(&self, app: Option<&str>, upstream: &str) -> Result<(), Failure> {
        self.call("Move", &(app.unwrap_or_default(), upstream))
    }

    /// Takes a lease away.
    pub(crate) fn end_lease(&self, id: u32) -> Result<(), Failure> {
        self.call("EndLease", &id)
    }

    /// Has a transfer come to its end.
    pub(crate) fn cancel_transfer(&self, id: u64) -> Result<(), Failure> {
        self.call("CancelTransfer", &id)
    }

    /// Has the system's daemon forget a user.
    pub(crate) fn forget_user(&self, uid: u32) -> Result<(), Failure> {
        self.call("ForgetUser", &uid)
    }

    fn call<B, R>(&self, method: &str, body: &B) -> Result<R, Failure>
    where
        B: Serialize + DynamicType,
        R: for<'d> DynamicDeserialize<'d>,
    {
        answer(method, self.try_call(method, body))
    }

    /// Calls a method; polkit may have an administrator's password asked for.
    fn try_call<B, R>(&self, method: &str, body: &B) -> zbus::Result<Option<R>>
    where
        B: Serialize + DynamicType,
        R: for<'d> DynamicDeserialize<'d>,
    {
        // Anybody may ask for the status.
        let _agent = (self.system && method != "Status").then(Agent::start);
        self.call_with(MethodFlags::ALLOW_INTERACTIVE_AUTH, method, body)
    }

    fn call_with<B, R>(&self, flags: MethodFlags, method: &str, body: &B) -> zbus::Result<Option<R>>
    where
        B: Serialize + DynamicType,
        R: for<'d> DynamicDeserialize<'d>,
    {
        block_on(async {
            let runtime = SharedRuntime::current()?;
            let call = async {
                let proxy = Proxy::new(&self.connection, NAME, PATH, MANAGER).await?;
                proxy.call_with_flags(method, flags, body).await
            };
            // Timed out like any other call on a connection.
            runtime.timeout(TIMEOUT, call).await.map_err(|_| std::io::Error::from(std::io::ErrorKind::TimedOut))?
        })
    }
}

fn answer<R>(method: &str, called: zbus::Result<Option<R>>) -> Result<R, Failure> {
    called.map_err(|error| failure(&error))?.ok_or_else(|| no_answer(method))
}

fn no_answer(method: &str) -> Failure {
    Failure::new(Exit::Protocol, format!("the daemon did not answer {method}"))
}

/// Whether the other side has no such method.
fn is_unknown(error: &zbus::Error) -> bool {
    match error {
        zbus::Error::FDO(error) => matches!(**error, fdo::Error::UnknownMethod(_)),
        zbus::Error::MethodError(name, ..) => name.as_str() == "org.freedesktop.DBus.Error.UnknownMethod",
        _ => false,
    }
}

/// Reads one of the daemon's documents.
pub(crate) fn decode<T: DeserializeOwned>(text: &str) -> Result<T, Failure> {
    serde_json::from_str(text).map_err(|error| {
        Failure::new(
            Exit::Protocol,
            format!(
                "the daemon's answer cannot be read ({error}); are nightporter and nightporterd of the same version?"
            ),
        )
    })
}

fn connect(builder: Builder<'_>) -> zbus::Result<Connection> {
    block_on(builder.method_timeout(TIMEOUT).build())
}

fn owned(connection: &Connection, name: &str) -> zbus::Result<bool> {
    let reply = block_on(connection.call_method(
        Some("org.freedesktop.DBus"),
        "/org/freedesktop/DBus",
        Some("org.freedesktop.DBus"),
        "NameHasOwner",
        &(name,),
    ))?;
    reply.body().deserialize()
}

/// Turns a D-Bus error into a text and an exit code.
fn failure(error: &zbus::Error) -> Failure {
    let gone = || {
        Failure::new(
            Exit::Unavailable,
            "the daemon went away while it was asked; see `journalctl -u nightporterd` for why".to_owned(),
        )
    };
    match error {
        zbus::Error::MethodError(name, text, _) => {
            let text = text.as_deref().unwrap_or(name.as_str());
            match name.as_str().strip_prefix("org.nightporter1.Error.") {
                Some("NotAuthorized") => {
                    let help = "as root it is (sudo nightporter …), and where an authentication agent can ask for an \
                                administrator's password: a desktop's own, or in a terminal pkttyagent (package \
                                polkitd), which nightporter starts itself";
                    Failure::new(Exit::NotAllowed, format!("not allowed: {text}\n  {help}"))
                }
                Some("NoSuchApp") => Failure::new(Exit::NoSuchApp, text),
                Some("NotRunning") => Failure::new(Exit::Temporary, text),
                Some("Refused") => Failure::new(Exit::Refused, format!("refused: {text}")),
                Some(_) => Failure::new(Exit::Failed, text),
                None => Failure::new(Exit::Protocol, format!("{}: {text}", name.as_str())),
            }
        }
        zbus::Error::FDO(error) => match &**error {
            fdo::Error::InvalidArgs(text) => Failure::new(Exit::Usage, text.clone()),
            fdo::Error::AccessDenied(text) => {
                Failure::new(Exit::NotAllowed, format!("the bus does not allow it: {text}"))
            }
            fdo::Error::ServiceUnknown(_) | fdo::Error::NameHasNoOwner(_) | fdo::Error::Disconnected(_) => gone(),
            fdo::Error::NoReply(_) | fdo::Error::Timeout(_) | fdo::Error::TimedOut(_) => {
                Failure::new(Exit::Temporary, format!("the daemon did not answer: {error}"))
            }
            fdo::Error::UnknownMethod(_) | fdo::Error::UnknownInterface(_) | fdo::Error::UnknownObject(_) => {
                Failure::new(
                    Exit::Protocol,
                    "the daemon does not know this request; is it older than this nightporter? Restart it after an update",
                )
            }
            other => Failure::new(Exit::Failed, other.to_string()),
        },
        zbus::Error::InputOutput(io) if io.kind() == std::io::ErrorKind::TimedOut => {
            Failure::new(Exit::Temporary, format!("the daemon did not answer within {} s", TIMEOUT.as_secs()))
        }
        zbus::Error::InputOutput(_) => gone(),
        other => Failure::new(Exit::Protocol, other.to_string()),
    }
}
