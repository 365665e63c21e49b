//! A stand-in for polkit: `org.freedesktop.PolicyKit1.Authority` as polkit 122 has it, on a bus of the test's.

use std::{
    collections::HashMap,
    future::poll_fn,
    os::fd::{AsFd, AsRawFd},
    pin::Pin,
    sync::{Arc, Mutex, mpsc},
    thread::{self, JoinHandle},
    time::Duration,
};

use futures_core::Stream;
use zbus::{Connection, Message, MessageStream, Variant, connection::Builder, message::Type};

/// How the next questions are answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Says {
    /// Yes.
    Yes,
    /// Yes to this action, no to the others.
    YesTo(&'static str),
    /// No.
    No,
    /// It takes a password, and nobody was or could be asked.
    Challenge,
    /// Somebody was asked and would not.
    Dismissed,
    /// An error of polkit's own.
    Error,
    /// Nothing, ever.
    Nothing,
    /// It ends instead.
    Vanish,
    /// A yes that is none: other types.
    Garbage,
    /// A yes without the struct around it.
    Loose,
    /// A reply without a body.
    Empty,
}

/// What polkit heard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Heard {
    /// `CheckAuthorization`.
    Check(Check),
    /// `CancelCheckAuthorization`, with the identifier.
    Cancel(String),
}

/// The arguments of `CheckAuthorization`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Check {
    pub(crate) kind: String,
    pub(crate) name: Option<String>,
    pub(crate) pid: Option<u32>,
    pub(crate) start_time: Option<u64>,
    pub(crate) uid: Option<i32>,
    /// The process behind the pidfd.
    pub(crate) pidfd: Option<u32>,
    pub(crate) action: String,
    pub(crate) details: HashMap<String, String>,
    pub(crate) flags: u32,
    pub(crate) number: String,
}

/// The stand-in; it ends with this.
pub(crate) struct Polkit {
    says: Arc<Mutex<Says>>,
    heard: mpsc::Receiver<Heard>,
    quit: async_channel::Sender<()>,
    thread: Option<JoinHandle<()>>,
}

impl Polkit {
    pub(crate) fn start(address: &str, says: Says) -> Self {
        let says = Arc::new(Mutex::new(says));
        let (tell, heard) = mpsc::channel();
        let (told, ready) = mpsc::channel();
        let (quit, quitting) = async_channel::bounded::<()>(1);
        let (address, spoken) = (address.to_owned(), Arc::clone(&says));
        let thread = thread::spawn(move || {
            zbus::block_on(async move {
                let connection = Builder::address(address.as_str()).build().await.unwrap();
                let stream = MessageStream::from(&connection);
                connection.request_name("org.freedesktop.PolicyKit1").await.unwrap();
                told.send(()).unwrap();
                let serving = connection.clone();
                let task = zruntime::spawn(async move { serve(&serving, stream, &spoken, &tell).await });
                let _ = quitting.recv().await;
                let _ = task.cancel().await;
                let _ = connection.close().await;
            });
        });
        ready.recv_timeout(Duration::from_secs(20)).unwrap();
        Self { says, heard, quit, thread: Some(thread) }
    }

    pub(crate) fn set(&self, says: Says) {
        *self.says.lock().unwrap() = says;
    }

    pub(crate) fn next(&self) -> Heard {
        self.heard.recv_timeout(Duration::from_secs(30)).expect("polkit was not asked")
    }

    pub(crate) fn check(&self) -> Check {
        match self.next() {
            Heard::Check(check) => check,
            other => panic!("{other:?}"),
        }
    }

    /// Whether it has heard nothing that was not looked at.
    pub(crate) fn was_left_alone(&self) -> bool {
        self.heard.try_recv().is_err()
    }
}

impl Drop for Polkit {
    fn drop(&mut self) {
        self.quit.close();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

async fn serve(connection: &Connection, mut stream: MessageStream, says: &Mutex<Says>, heard: &mpsc::Sender<Heard>) {
    loop {
        let next = poll_fn(|context| Pin::new(&mut stream).poll_next(context)).await;
        let Some(Ok(call)) = next else { return };
        if call.message_type() != Type::MethodCall {
            continue;
        }
        let header = call.header();
        if header.member().unwrap().as_str() == "CancelCheckAuthorization" {
            let _ = heard.send(Heard::Cancel(call.body().deserialize().unwrap()));
            connection.reply(&header, &()).await.unwrap();
            continue;
        }
        assert_eq!(header.path().unwrap().as_str(), "/org/freedesktop/PolicyKit1/Authority");
        assert_eq!(header.interface().unwrap().as_str(), "org.freedesktop.PolicyKit1.Authority");
        assert_eq!(call.body().signature().to_string(), "((sa{sv})sa{ss}us)");
        let check = read(&call);
        let says = *says.lock().unwrap();
        let answer = |yes: bool, challenge: bool, details: &[(&'static str, &'static str)]| {
            ((yes, challenge, details.iter().copied().collect::<HashMap<_, _>>()),)
        };
        let yes = says == Says::YesTo(action(&check.action)) || says == Says::Yes;
        let _ = heard.send(Heard::Check(check));
        match says {
            Says::Yes | Says::YesTo(_) | Says::No => connection.reply(&header, &answer(yes, false, &[])).await,
            Says::Challenge => connection.reply(&header, &answer(false, true, &[])).await,
            Says::Dismissed => connection.reply(&header, &answer(false, false, &[("polkit.dismissed", "true")])).await,
            Says::Error => {
                let name = "org.freedesktop.PolicyKit1.Error.Failed";
                connection.reply_error(&header, name, &"Action org.nightporter1.read is not registered").await
            }
            Says::Garbage => connection.reply(&header, &((1_u32, 1_u32, "yes"),)).await,
            Says::Loose => connection.reply(&header, &(true, false)).await,
            Says::Empty => connection.reply(&header, &()).await,
            Says::Nothing => Ok(()),
            Says::Vanish => return connection.clone().close().await.unwrap(),
        }
        .unwrap();
    }
}

fn action(name: &str) -> &'static str {
    let known = ["org.nightporter1.read", "org.nightporter1.manage-apps", "org.nightporter1.manage-users"];
    known.into_iter().find(|known| *known == name).expect("an action we install")
}

fn read(call: &Message) -> Check {
    type Arguments<'a> = ((&'a str, HashMap<&'a str, Variant<'a>>), &'a str, HashMap<String, String>, u32, String);
    let body = call.body();
    let ((kind, subject), action, details, flags, number): Arguments<'_> = body.deserialize().unwrap();
    let mut check = Check { kind: kind.into(), action: action.into(), details, flags, number, ..Check::default() };
    for (key, value) in &subject {
        match (*key, value) {
            ("name", Variant::Str(name)) => check.name = Some(name.as_str().into()),
            ("pid", Variant::U32(pid)) => check.pid = Some(*pid),
            ("start-time", Variant::U64(time)) => check.start_time = Some(*time),
            ("uid", Variant::I32(uid)) => check.uid = Some(*uid),
            ("pidfd", Variant::Fd(fd)) => {
                let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_fd().as_raw_fd())).unwrap();
                let pid = info.lines().find_map(|line| line.strip_prefix("Pid:")).expect("a pidfd");
                check.pidfd = Some(pid.trim().parse().unwrap());
            }
            other => panic!("{other:?}"),
        }
    }
    check
}
