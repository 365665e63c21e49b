//! A notification server, played: what it was asked to show and close, and what its user does.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

use futures_core::Stream;
use zbus::{Connection, Message, MessageStream, OwnedVariant, block_on, connection::Builder, message::Type};

const NAME: &str = "org.freedesktop.Notifications";
const PATH: &str = "/org/freedesktop/Notifications";

/// One Notify.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Shown {
    pub(crate) id: u32,
    pub(crate) app: String,
    pub(crate) replaces: u32,
    pub(crate) icon: String,
    pub(crate) summary: String,
    pub(crate) body: String,
    pub(crate) actions: Vec<String>,
    pub(crate) urgency: u8,
    pub(crate) desktop_entry: String,
    pub(crate) category: Option<String>,
}

#[derive(Default)]
struct Book {
    shown: Vec<Shown>,
    closed: Vec<u32>,
}

pub(crate) struct Desk {
    pub(crate) connection: Connection,
    book: Arc<Mutex<Book>>,
    /// It answers no Notify.
    pub(crate) silent: Arc<AtomicBool>,
    quit: async_channel::Sender<()>,
    thread: Option<JoinHandle<()>>,
}

impl Desk {
    pub(crate) fn start(address: &str) -> Self {
        Self::able(address, &["body", "body-markup", "actions"])
    }

    pub(crate) fn able(address: &str, capabilities: &'static [&'static str]) -> Self {
        let connection = block_on(async { Builder::address(address).build().await.unwrap() });
        let (book, silent) = (Arc::<Mutex<Book>>::default(), Arc::<AtomicBool>::default());
        let (quit, quitting) = async_channel::bounded::<()>(1);
        let (serving, written, mute) = (connection.clone(), Arc::clone(&book), Arc::clone(&silent));
        let (told, ready) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            block_on(async move {
                let stream = MessageStream::from(&serving);
                serving.request_name(NAME).await.unwrap();
                told.send(()).unwrap();
                let task = zruntime::spawn(serve(serving.clone(), stream, written, mute, capabilities));
                let _ = quitting.recv().await;
                drop(task);
                let _ = serving.close().await;
            });
        });
        ready.recv().unwrap();
        Self { connection, book, silent, quit, thread: Some(thread) }
    }

    pub(crate) fn shown(&self) -> Vec<Shown> {
        self.book.lock().unwrap().shown.clone()
    }

    pub(crate) fn closed(&self) -> Vec<u32> {
        self.book.lock().unwrap().closed.clone()
    }

    pub(crate) fn click(&self, id: u32, token: Option<&str>) {
        if let Some(token) = token {
            self.emit("ActivationToken", &(id, token));
        }
        self.emit("ActionInvoked", &(id, "default"));
    }

    pub(crate) fn dismiss(&self, id: u32) {
        self.emit("NotificationClosed", &(id, 2_u32));
    }

    fn emit<B: serde::Serialize + zbus::DynamicType + Sync>(&self, member: &'static str, body: &B) {
        block_on(self.connection.emit_signal(None::<&str>, PATH, NAME, member, body)).unwrap();
    }
}

impl Drop for Desk {
    fn drop(&mut self) {
        let _ = self.quit.try_send(());
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

type Arguments<'a> = (&'a str, u32, &'a str, &'a str, &'a str, Vec<&'a str>, HashMap<String, OwnedVariant>, i32);

async fn serve(
    connection: Connection,
    mut stream: MessageStream,
    book: Arc<Mutex<Book>>,
    silent: Arc<AtomicBool>,
    capabilities: &'static [&'static str],
) {
    let mut next = 1;
    while let Some(Ok(message)) = std::future::poll_fn(|c| std::pin::Pin::new(&mut stream).poll_next(c)).await {
        let header = message.header();
        if message.message_type() != Type::MethodCall || header.interface().is_none_or(|name| name.as_str() != NAME) {
            continue;
        }
        match header.member().map(|member| member.as_str().to_owned()).as_deref() {
            Some("GetCapabilities") => connection.send(&reply(&message, &capabilities)).await.unwrap(),
            Some("Notify") => {
                let body = message.body();
                let (app, replaces, icon, summary, text, actions, hints, _) =
                    body.deserialize::<Arguments<'_>>().unwrap();
                let id = if replaces == 0 { next } else { replaces };
                next += u32::from(replaces == 0);
                let word = |key: &str| hints.get(key).map(|value| <&str>::try_from(value).unwrap().to_owned());
                let shown = Shown {
                    id,
                    app: app.into(),
                    replaces,
                    icon: icon.into(),
                    summary: summary.into(),
                    body: text.into(),
                    actions: actions.into_iter().map(str::to_owned).collect(),
                    urgency: hints.get("urgency").map_or(1, |value| u8::try_from(value).unwrap()),
                    desktop_entry: word("desktop-entry").unwrap_or_default(),
                    category: word("category"),
                };
                let mute = silent.load(Ordering::Relaxed);
                if !mute {
                    connection.send(&reply(&message, &id)).await.unwrap();
                }
                book.lock().unwrap().shown.push(shown);
            }
            Some("CloseNotification") => {
                let id: u32 = message.body().deserialize().unwrap();
                book.lock().unwrap().closed.push(id);
            }
            other => panic!("a notification server has no {other:?}"),
        }
    }
}

fn reply<B: serde::Serialize + zbus::DynamicType>(call: &Message, body: &B) -> Message {
    Message::method_return(&call.header()).build(body).unwrap()
}
