//! Notifications in an app's stead, on one session bus: the Desktop Notifications Specification from its client's side.
//!
//! One task for each connection, and only while something is shown. It makes one call at a time and waits [`ANSWER`] for it,
//! and takes in signals meanwhile. The call is a plain one: a server that does not run is started only if it has a service
//! file, which is what any app's own notification would do; where it has none the bus refuses, and what is to be shown waits
//! until there is a server. A server that has ended has forgotten everything: the next one is told anew.

use std::{
    collections::{BTreeMap, HashMap},
    future::{Future, poll_fn},
    num::NonZeroUsize,
    pin::Pin,
    sync::Arc,
    task::Poll,
    time::Duration,
};

use async_channel::{Receiver, Sender as Orders};
use futures_core::Stream;
use zbus::{Connection, MatchRule, Message, MessageStream, Variant, message::Type};
use zruntime::{Shared, SharedRuntime, Task};

use super::{
    desktop::{self, DesktopFile},
    session::Way,
    wire::BUS_NAME,
};
use crate::{
    event::{BusEvent, Event},
    model::{AppKey, Bus, Priority},
    notification::{Notification, NotifyNews, NotifyOrder, Text},
    sys::inbox::{Incoming, Sender},
};

const NAME: &str = "org.freedesktop.Notifications";
const PATH: &str = "/org/freedesktop/Notifications";
/// A server that has not answered by then does not show it.
const ANSWER: Duration = Duration::from_secs(5);
/// Signals that wait for this task; what a server sends beyond it keeps its own bus waiting.
const SIGNALS: NonZeroUsize = NonZeroUsize::new(256).unwrap();
/// Bytes of an activation token at most.
const TOKEN: usize = 512;

/// What is shown on one bus.
#[derive(Default)]
pub(super) struct Notifications {
    task: Option<(Orders<Ordered>, Task<(), Shared>)>,
}

type Ordered = (AppKey, NotifyOrder);

impl Notifications {
    /// Shows or closes something, soon.
    pub(super) fn order(
        &mut self,
        app: AppKey,
        order: NotifyOrder,
        connection: &Connection,
        way: &Way,
        inbox: &Sender,
    ) {
        let Bus::Session(_) = app.bus else { return };
        if self.task.as_ref().is_none_or(|(_, task)| task.is_finished()) {
            if !matches!(order, NotifyOrder::Show(_)) {
                return;
            }
            // Unbounded like the one it is filled from; the core paces its orders by app.
            let (orders, taken) = async_channel::unbounded();
            let (connection, way, inbox) = (connection.clone(), way.clone(), inbox.clone());
            let task = zruntime::spawn(async move {
                if let Err(error) = Desk::new(connection, way, inbox).serve(taken).await {
                    log::debug!("notifications: {error}");
                }
            });
            self.task = Some((orders, task));
        }
        if let Some((orders, _)) = &self.task {
            let _ = orders.try_send((app, order));
        }
    }

    /// Closes what is shown, for nobody will know of it any more.
    pub(super) async fn close(&mut self) {
        if let Some((orders, task)) = self.task.take() {
            drop(orders);
            let _ = task.await;
        }
    }
}

/// One notification.
#[derive(Debug)]
struct Slot {
    notification: Notification,
    /// The server's number of it, once it has answered.
    id: Option<u32>,
    /// It is to be sent: it is new, or not the same any more, or the server is another.
    due: bool,
    /// It was sent, and the server has not answered.
    underway: bool,
    told: bool,
    token: Option<Arc<str>>,
}

type Key = (AppKey, Arc<str>);

/// What is known of the server that runs.
#[derive(Clone, Debug, Default)]
struct Server {
    /// Its unique name.
    owner: Option<Arc<str>>,
    markup: bool,
    actions: bool,
}

struct Desk {
    connection: Connection,
    way: Way,
    inbox: Sender,
    slots: BTreeMap<Key, Slot>,
    server: Server,
    locale: Option<String>,
    files: HashMap<AppKey, Option<DesktopFile>>,
}

type Sent = Result<(Server, u32), String>;
type Sending = Pin<Box<dyn Future<Output = (Key, Sent)> + Send>>;

enum Input {
    Order(AppKey, NotifyOrder),
    Signal(Message),
    Sent(Key, Sent),
    Stop,
    Broken,
}

impl Desk {
    fn new(connection: Connection, way: Way, inbox: Sender) -> Self {
        Self {
            connection,
            way,
            inbox,
            slots: BTreeMap::new(),
            server: Server::default(),
            locale: None,
            files: HashMap::new(),
        }
    }

    /// Until there is nothing more to show, or `orders` is closed.
    async fn serve(mut self, orders: Receiver<Ordered>) -> zbus::Result<()> {
        let rule = MatchRule::builder().msg_type(Type::Signal).interface(NAME).path(PATH).build()?.to_owned();
        let mut signals = MessageStream::for_match_rule(rule, &self.connection, Some(SIGNALS)).await?;
        let rule = MatchRule::builder()
            .msg_type(Type::Signal)
            .sender(BUS_NAME)
            .interface(BUS_NAME)
            .member("NameOwnerChanged")
            .arg(0, NAME)
            .build()?
            .to_owned();
        let mut owners = MessageStream::for_match_rule(rule, &self.connection, Some(SIGNALS)).await?;
        let mut orders = Box::pin(orders);
        let mut sending: Option<Sending> = None;
        // A signal that has come, and waits for an answer that may have come before it.
        let mut heard: Option<Message> = None;
        loop {
            if sending.is_none() && heard.is_none() {
                sending = self.next_to_send().await;
            }
            if sending.is_none() && self.slots.is_empty() && orders.is_empty() {
                return Ok(());
            }
            let input = poll_fn(|context| {
                for stream in [&mut owners, &mut signals] {
                    if heard.is_none() {
                        match Pin::new(stream).poll_next(context) {
                            Poll::Ready(Some(Ok(message))) => heard = Some(message),
                            Poll::Ready(_) => return Poll::Ready(Input::Broken),
                            Poll::Pending => {}
                        }
                    }
                }
                if let Some(call) = &mut sending
                    && let Poll::Ready((key, sent)) = call.as_mut().poll(context)
                {
                    return Poll::Ready(Input::Sent(key, sent));
                }
                if let Some(message) = heard.take() {
                    return Poll::Ready(Input::Signal(message));
                }
                let order = orders.as_mut().poll_next(context);
                order.map(|order| order.map_or(Input::Stop, |(app, order)| Input::Order(app, order)))
            });
            match input.await {
                Input::Order(app, NotifyOrder::Show(notification)) => self.show(app, notification),
                Input::Order(app, NotifyOrder::Close(tag)) => {
                    self.close(|(of, other)| *of == app && *other == tag).await;
                }
                Input::Order(app, NotifyOrder::CloseAll) => self.close(|(of, _)| *of == app).await,
                Input::Signal(message) => {
                    if let Some(id) = self.signal(&message) {
                        self.close_at_server(id).await;
                    }
                }
                Input::Sent(key, sent) => {
                    sending = None;
                    self.sent(key, sent).await;
                }
                Input::Stop => {
                    self.close(|_| true).await;
                    if let Some(call) = sending
                        && let Ok(runtime) = SharedRuntime::current()
                        && let Ok((_, Ok((_, id)))) = runtime.timeout(Duration::from_millis(500), call).await
                    {
                        self.close_at_server(id).await;
                    }
                    return Ok(());
                }
                Input::Broken => return Ok(()),
            }
        }
    }

    fn show(&mut self, app: AppKey, notification: Notification) {
        let key = (app, Arc::clone(&notification.tag));
        match self.slots.get_mut(&key) {
            Some(slot) => (slot.notification, slot.due, slot.told) = (notification, true, false),
            None => {
                let slot = Slot { notification, id: None, due: true, underway: false, told: false, token: None };
                self.slots.insert(key, slot);
            }
        }
    }

    async fn close(&mut self, which: impl Fn(&Key) -> bool) {
        let keys: Vec<Key> = self.slots.keys().filter(|key| which(key)).cloned().collect();
        for key in keys {
            // One that is just being sent is closed when its number is known (`sent`).
            if let Some(id) = self.slots.remove(&key).and_then(|slot| slot.id) {
                self.close_at_server(id).await;
            }
        }
    }

    async fn close_at_server(&self, id: u32) {
        // Only to the server that gave the number, and to start nobody.
        let Some(owner) = self.server.owner.as_deref() else { return };
        let flags = zbus::message::Flags::NO_REPLY_EXPECTED | zbus::message::Flags::NO_AUTO_START;
        let message = Message::method_call(PATH, "CloseNotification")
            .destination(owner)
            .interface(NAME)
            .with_flags(flags)
            .build(&id);
        match message {
            Ok(message) => drop(self.connection.send(&message).await),
            Err(error) => log::debug!("notifications: {error}"),
        }
    }

    /// The call for the next notification that is to be sent.
    async fn next_to_send(&mut self) -> Option<Sending> {
        let key = self.slots.iter().find(|(_, slot)| slot.due).map(|(key, _)| key.clone())?;
        if !self.files.contains_key(&key.0) {
            if self.files.len() >= 64 {
                self.files.clear();
            }
            let locale = self.locale().await;
            let file = desktop::find(&self.way, &key.0, &locale).await;
            self.files.insert(key.0.clone(), file);
        }
        let file = self.files.get(&key.0).cloned().flatten();
        let slot = self.slots.get_mut(&key)?;
        (slot.due, slot.underway) = (false, true);
        let (connection, server, replaces) = (self.connection.clone(), self.server.clone(), slot.id.unwrap_or(0));
        let (notification, app) = (slot.notification.clone(), key.0.clone());
        Some(Box::pin(async move {
            let runtime = SharedRuntime::current();
            let sent = match runtime {
                Ok(runtime) => {
                    let call = notify(&connection, server, &app, file.as_ref(), &notification, replaces);
                    runtime.timeout(ANSWER, call).await.unwrap_or_else(|_| {
                        Err(format!("the notification server does not answer within {} s", ANSWER.as_secs()))
                    })
                }
                Err(error) => Err(error.to_string()),
            };
            (key, sent)
        }))
    }

    async fn sent(&mut self, key: Key, sent: Sent) {
        if let Some(slot) = self.slots.get_mut(&key) {
            slot.underway = false;
        }
        match sent {
            Ok((server, id)) => {
                let same = self.server.owner == server.owner;
                self.server = server;
                if !same {
                    self.renew();
                }
                match self.slots.get_mut(&key) {
                    Some(slot) => slot.id = Some(id),
                    // Closed meanwhile.
                    None => self.close_at_server(id).await,
                }
            }
            Err(text) => {
                if let Some(slot) = self.slots.get_mut(&key)
                    && !std::mem::replace(&mut slot.told, true)
                {
                    let number = slot.notification.number;
                    self.tell(key, number, NotifyNews::NotShown(text.into()));
                }
            }
        }
    }

    /// Another server, or none: what the one before knew is known no more.
    fn renew(&mut self) {
        for slot in self.slots.values_mut() {
            (slot.id, slot.token) = (None, None);
        }
    }

    /// The number of the notification that is to be closed for it.
    fn signal(&mut self, message: &Message) -> Option<u32> {
        let header = message.header();
        let (sender, body) = (header.sender().map(|sender| sender.as_str()), message.body());
        let member = header.member().map(|member| member.as_str());
        if sender == Some(BUS_NAME) {
            if let Ok((NAME, _, new)) = body.deserialize::<(&str, &str, &str)>() {
                self.server = Server::default();
                self.renew();
                // One that has just come shows what waits; where none is, the next one will.
                self.slots.values_mut().for_each(|slot| slot.due = !new.is_empty());
            }
            return None;
        }
        if sender.is_none() || sender != self.server.owner.as_deref() {
            return None;
        }
        match member {
            Some("ActivationToken") => {
                if let Ok((id, token)) = body.deserialize::<(u32, &str)>()
                    && token.len() <= TOKEN
                    && !token.chars().any(char::is_control)
                    && let Some((_, slot)) = self.by_id(id)
                {
                    slot.token = Some(token.into());
                }
            }
            Some("ActionInvoked") => {
                if let Ok((id, "default")) = body.deserialize::<(u32, &str)>()
                    && let Some((key, slot)) = self.by_id(id)
                {
                    let (token, number) = (slot.token.take(), slot.notification.number);
                    self.slots.remove(&key);
                    self.tell(key, number, NotifyNews::Clicked(token));
                    return Some(id);
                }
            }
            Some("NotificationClosed") => {
                if let Ok((id, _)) = body.deserialize::<(u32, u32)>()
                    && let Some((key, slot)) = self.by_id(id)
                {
                    // What the server has not shown yet is not what the user dismissed.
                    if slot.due || slot.underway {
                        (slot.id, slot.token) = (None, None);
                        return None;
                    }
                    let number = slot.notification.number;
                    self.slots.remove(&key);
                    self.tell(key, number, NotifyNews::Gone);
                }
            }
            _ => {}
        }
        None
    }

    fn by_id(&mut self, id: u32) -> Option<(Key, &mut Slot)> {
        self.slots.iter_mut().find(|(_, slot)| slot.id == Some(id)).map(|(key, slot)| (key.clone(), slot))
    }

    fn tell(&self, (app, tag): Key, number: u64, news: NotifyNews) {
        let event = BusEvent::Notified { app, tag, number, news };
        let _ = self.inbox.send(Incoming::Event(Event::Bus(event)));
    }

    /// The language of the session: its systemd knows, or this daemon's own environment.
    async fn locale(&mut self) -> String {
        if let Some(locale) = &self.locale {
            return locale.clone();
        }
        let asked = match SharedRuntime::current() {
            Ok(runtime) => {
                runtime.timeout(Duration::from_secs(1), session_locale(&self.connection)).await.ok().flatten()
            }
            Err(_) => None,
        };
        let own = || ["LC_ALL", "LC_MESSAGES", "LANG"].iter().find_map(|name| std::env::var(name).ok());
        let locale = asked.or_else(own).unwrap_or_default();
        self.locale = Some(locale.clone());
        locale
    }
}

async fn session_locale(connection: &Connection) -> Option<String> {
    let (name, path, properties) =
        ("org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.DBus.Properties");
    let arguments = ("org.freedesktop.systemd1.Manager", "Environment");
    let reply = connection.call_method(Some(name), path, Some(properties), "Get", &arguments).await.ok()?;
    let body = reply.body();
    let Variant::Array(words) = body.deserialize::<Variant<'_>>().ok()? else { return None };
    let words: Vec<String> = Vec::try_from(Variant::Array(words)).ok()?;
    let of = |name: &str| words.iter().find_map(|word| word.strip_prefix(name)?.strip_prefix('=')).map(str::to_owned);
    of("LC_ALL").or_else(|| of("LC_MESSAGES")).or_else(|| of("LANG"))
}

/// Sends one, and first asks a server that is not known yet what it can do.
async fn notify(
    connection: &Connection,
    mut server: Server,
    app: &AppKey,
    file: Option<&DesktopFile>,
    notification: &Notification,
    replaces: u32,
) -> Sent {
    if server.owner.is_none() {
        server = capabilities(connection).await?;
    }
    let name = file.map_or(&*app.service, |file| &*file.name);
    let own_icon = file.map_or("", |file| &*file.icon);
    let (summary, body, icon) = match &notification.text {
        Text::Messages(1) => (name.to_owned(), "New message".to_owned(), own_icon),
        Text::Messages(count) => (name.to_owned(), format!("{count} new messages"), own_icon),
        Text::Own { summary, body, icon } => {
            (summary.to_string(), body.to_string(), icon.as_deref().unwrap_or(own_icon))
        }
    };
    let body = if server.markup { escaped(&body) } else { body };
    let urgency: u8 = match notification.priority {
        Priority::Low => 0,
        Priority::Normal => 1,
        Priority::High | Priority::Call => 2,
    };
    let mut hints: HashMap<&str, Variant<'_>> = HashMap::new();
    hints.insert("urgency", Variant::from(urgency));
    hints.insert("desktop-entry", Variant::from(&*app.service));
    if let Some(category) = notification.category.as_deref() {
        hints.insert("category", Variant::from(category));
    }
    let actions: &[&str] = if server.actions { &["default", ""] } else { &[] };
    let arguments = (name, replaces, icon, &*summary, &*body, actions, hints, -1_i32);
    let call = connection.call_method(Some(NAME), PATH, Some(NAME), "Notify", &arguments);
    let reply = call.await.map_err(|error| format!("the notification server: {error}"))?;
    let id = reply.body().deserialize::<u32>().map_err(|error| format!("the notification server: {error}"))?;
    // It may be another by now.
    server.owner = reply.header().sender().map(|sender| sender.as_str().into());
    Ok((server, id))
}

async fn capabilities(connection: &Connection) -> Result<Server, String> {
    let reply = connection.call_method(Some(NAME), PATH, Some(NAME), "GetCapabilities", &()).await;
    let reply = match reply {
        Ok(reply) => reply,
        Err(zbus::Error::FDO(error)) if matches!(*error, zbus::fdo::Error::ServiceUnknown(_)) => {
            return Err("no notification server runs in this session".into());
        }
        Err(error) => return Err(format!("the notification server: {error}")),
    };
    let body = reply.body();
    let able: Vec<&str> = body.deserialize().map_err(|error| format!("the notification server: {error}"))?;
    let owner = reply.header().sender().map(|sender| sender.as_str().into());
    Ok(Server { owner, markup: able.contains(&"body-markup"), actions: able.contains(&"actions") })
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_text_stays_plain() {
        assert_eq!(escaped("<b>1 & 2</b>"), "&lt;b&gt;1 &amp; 2&lt;/b&gt;");
    }
}
