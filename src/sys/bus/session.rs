//! One bus: connecting, staying connected, and everything that is said meanwhile, in the order it is said.

use std::{
    collections::{BTreeSet, HashMap},
    future::{Future, poll_fn},
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use async_channel::Receiver;
use futures_core::Stream;
use zbus::{Connection, Message, MessageStream, connection::Builder, message::Type};
use zruntime::{SharedRuntime, Task};

use super::{
    Common, Order,
    calls::{self, Calls},
    checks::Verdict,
    clients::Clients,
    deliver::Deliveries,
    interfaces::NAMES,
    leases::{self, Ends},
    manager::Manager,
    notifications::Notifications,
    panel::{self, KDE_NAME},
    polkit::Authority,
    process::{self, Purpose},
    start,
    transfers::Handed,
    watch::{self, Watches},
    wire::{BUS_NAME, Pending, Response, Wire},
};
use crate::{
    action::{Action, ClientCall},
    event::{BusEvent, CallOutcome, Event, StartOutcome},
    model::{AppKey, Bus},
    sys::{
        inbox::{Incoming, Process, Sender},
        signs::Signs,
        users::{User, door::Door, errand::Errands},
    },
};

/// A bus that does not finish the handshake within this is as good as absent.
pub(super) const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// Between two attempts to connect, first and at most.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// For what is still to be said when the daemon ends.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// Messages handled before what they caused is written.
const BATCH: usize = 64;
/// RequestName without flags: nobody may take the names from us, and if somebody has them we wait in line, so that the
/// bus tells when they are free and nothing need be tried again.
const WAIT_IN_LINE: u32 = 0;
/// RequestName with DBUS_NAME_FLAG_DO_NOT_QUEUE, as KDE's own distributor asks: "it has an owner" is an answer, not a place
/// in line, and that owner's end is seen by watching the name.
const NOT_IN_LINE: u32 = 4;

/// How a bus is reached.
#[derive(Clone, Debug)]
pub(super) enum Way {
    /// With the daemon's own rights, at this address or where this kind of bus usually is.
    Address(Option<String>),
    /// With a user's, at that user's own bus.
    User(User, Errands),
}

/// Serves one bus until `orders` is closed. `next_call` is the first number of this bus's calls.
pub(super) async fn serve(bus: Bus, way: Way, common: Common, orders: Receiver<Order>, next_call: u64) {
    let Common { panel, authority, signs, inbox } = common;
    let panel = panel && matches!(bus, Bus::Session(_));
    let runtime = match SharedRuntime::current() {
        Ok(runtime) => runtime,
        Err(error) => return log::error!("no runtime for the {bus} bus: {error}"),
    };
    let mut door = match &way {
        Way::Address(_) => None,
        Way::User(user, errands) => Some(Door::new(user.clone(), errands.clone())),
    };
    let mut lasting =
        Lasting { bus, way, authority, signs, inbox, watched: BTreeSet::new(), next_call, told_down: false };
    let mut orders = pin!(orders);
    let mut delay = RETRY.0;
    loop {
        let address = match &lasting.way {
            Way::Address(address) => address.clone(),
            Way::User(..) => None,
        };
        let attempt = async {
            match &mut door {
                Some(door) => door.connect().await,
                None => match runtime.timeout(CONNECT_LIMIT, connect(address, bus)).await {
                    Ok(connected) => connected.map_err(|error| error.to_string()),
                    Err(_) => Err("it does not answer".into()),
                },
            }
        };
        let (ended, was_up) = match lasting.while_down(orders.as_mut(), attempt).await {
            None => return,
            Some(Ok(connection)) => match Session::new(&mut lasting, connection, panel).run(orders.as_mut()).await {
                Ended::Stopped => return,
                Ended::Lost { text, was_up } => (text, was_up),
            },
            Some(Err(error)) => (format!("cannot connect: {error}"), false),
        };
        if was_up {
            delay = RETRY.0;
            door.iter_mut().for_each(Door::succeeded);
        }
        lasting.down(&ended);
        let wait = async {
            match &mut door {
                Some(door) => door.wait().await,
                None => runtime.sleep(delay).await,
            }
        };
        if lasting.while_down(orders.as_mut(), wait).await.is_none() {
            return;
        }
        delay = (delay * 2).min(RETRY.1);
    }
}

pub(super) async fn connect(address: Option<String>, bus: Bus) -> zbus::Result<Connection> {
    let builder = match (&address, bus) {
        (Some(address), _) => Builder::address(address.as_str()),
        (None, Bus::System) => Builder::system(),
        (None, Bus::Session(_)) => Builder::session(),
    };
    builder.build().await
}

/// What outlasts a connection.
struct Lasting {
    bus: Bus,
    way: Way,
    authority: Authority,
    signs: Option<Signs>,
    inbox: Sender,
    watched: BTreeSet<AppKey>,
    next_call: u64,
    told_down: bool,
}

impl Lasting {
    /// Says once that the bus is not to be had; loudly, for without it no app gets a message.
    fn down(&mut self, text: &str) {
        if self.told_down {
            return log::debug!("{} bus: {text}", self.bus);
        }
        match self.way {
            // Sessions come and go, and some never have a bus.
            Way::User(..) => log::info!("{} bus: {text}", self.bus),
            Way::Address(_) => log::error!("{} bus: {text}", self.bus),
        }
        self.told_down = true;
        self.event(BusEvent::Down(self.bus, text.to_owned()));
    }

    fn up(&mut self) {
        log::info!("{} bus: ready", self.bus);
        self.told_down = false;
        self.event(BusEvent::Up(self.bus));
    }

    fn event(&self, event: BusEvent) {
        self.tell(Incoming::Event(Event::Bus(event)));
    }

    fn tell(&self, incoming: Incoming) {
        // False means that the loop is gone, and this thread about to end.
        let _ = self.inbox.send(incoming);
    }

    /// Runs `work` and answers orders meanwhile as there is no bus. `None` when told to stop.
    async fn while_down<T>(
        &mut self,
        mut orders: Pin<&mut Receiver<Order>>,
        work: impl Future<Output = T>,
    ) -> Option<T> {
        let mut work = pin!(work);
        poll_fn(|context| {
            if let Poll::Ready(done) = work.as_mut().poll(context) {
                return Poll::Ready(Some(done));
            }
            loop {
                match orders.as_mut().poll_next(context) {
                    Poll::Ready(Some(order)) => self.refuse(order),
                    Poll::Ready(None) => return Poll::Ready(None),
                    Poll::Pending => return Poll::Pending,
                }
            }
        })
        .await
    }

    /// An order while there is no bus: nobody owns anything, nobody can be called.
    fn refuse(&mut self, order: Order) {
        match order {
            Order::Act(Action::Watch(app)) => {
                self.event(BusEvent::OwnerChanged(app.clone(), None));
                self.watched.insert(app);
            }
            Order::Act(Action::Unwatch(app)) => {
                self.watched.remove(&app);
            }
            other => refuse(other, |incoming| self.tell(incoming)),
        }
    }
}

/// Answers an order that needs a bus there is none of.
pub(super) fn refuse(order: Order, tell: impl FnOnce(Incoming)) {
    let event = match order {
        Order::Act(Action::Watch(app)) => BusEvent::OwnerChanged(app, None),
        Order::Act(Action::Call { ticket, .. }) => {
            BusEvent::CallDone(ticket, CallOutcome::NotSent("the bus is not there".into()))
        }
        Order::Act(Action::CallClient { app, call: ClientCall::WillSuspend { ticket, .. }, .. }) => {
            BusEvent::Prepared(app, ticket)
        }
        Order::Act(Action::Start(app) | Action::Activate { app, owner: None, .. }) => {
            BusEvent::Started(app, StartOutcome::Failed("the bus is not there".into()))
        }
        Order::Unit(order) => {
            if let Some(refusal) = order.refusal() {
                tell(refusal);
            }
            return;
        }
        Order::Act(Action::CallClient { call: ClientCall::TransferDone { ticket, .. }, .. }) => {
            BusEvent::TransferTold(ticket, CallOutcome::NotSent("the bus is not there".into()))
        }
        Order::File(handed) => {
            if let Some(outcome) = Handed::outcome(handed.id, handed.collected, false) {
                tell(outcome);
            }
            return;
        }
        // A reply to somebody who is gone.
        Order::Act(_) => return,
    };
    tell(Incoming::Event(Event::Bus(event)));
}

/// How a connection ended.
enum Ended {
    /// Told to stop.
    Stopped,
    /// It broke, or is of no use.
    Lost { text: String, was_up: bool },
}

/// One connection.
struct Session<'a> {
    lasting: &'a mut Lasting,
    connection: Connection,
    wire: Wire,
    calls: Calls,
    watches: Watches,
    deliveries: Deliveries,
    clients: Clients,
    manager: Manager,
    leases: Ends,
    notifications: Notifications,
    starts: HashMap<AppKey, Task<(), zruntime::Shared>>,
    startable: HashMap<AppKey, Task<(), zruntime::Shared>>,
    // Pinned once and for all, to be polled as it is.
    verdicts: Pin<Box<Receiver<Verdict>>>,
    /// Watches this bus for what speaks against holding apps still; ends with the connection.
    _signs: Option<Task<(), zruntime::Shared>>,
    names: [bool; NAMES.len()],
    panel: Panel,
    was_up: bool,
    /// Why the names are not ours, once that is known.
    taken: Option<String>,
    /// Set when the connection is of no use.
    useless: Option<String>,
}

/// What there is for KDE's settings panel.
struct Panel {
    /// Whether it is served on this bus.
    served: bool,
    /// Whether the name it looks for is ours.
    named: bool,
    /// Whether it was said already that the name is not.
    told: bool,
    /// Whether what it shows has changed since it was told.
    changed: bool,
}

enum Input {
    Message(Message),
    Order(Order),
    Verdict(Verdict),
    Stop,
    Broken(String),
}

impl<'a> Session<'a> {
    fn new(lasting: &'a mut Lasting, connection: Connection, panel: bool) -> Self {
        let (told, verdicts) = async_channel::unbounded();
        let _signs = match (&lasting.signs, lasting.bus) {
            (Some(signs), Bus::Session(uid)) => Some(signs.on_session_bus(connection.clone(), uid)),
            _ => None,
        };
        Self {
            wire: Wire::new(lasting.bus, lasting.inbox.clone(), matches!(lasting.way, Way::Address(_))),
            calls: Calls::new(panel, lasting.authority.clone(), told),
            lasting,
            connection,
            verdicts: Box::pin(verdicts),
            watches: Watches::default(),
            deliveries: Deliveries::default(),
            clients: Clients::default(),
            manager: Manager::default(),
            leases: Ends::default(),
            notifications: Notifications::default(),
            starts: HashMap::new(),
            _signs,
            startable: HashMap::new(),
            names: [false; NAMES.len()],
            panel: Panel { served: panel, named: false, told: false, changed: false },
            was_up: false,
            taken: None,
            useless: None,
        }
    }

    async fn run(mut self, mut orders: Pin<&mut Receiver<Order>>) -> Ended {
        let mut stream = MessageStream::from(&self.connection);
        for (index, name) in NAMES.into_iter().enumerate() {
            self.wire.ask_bus("RequestName", &(name, WAIT_IN_LINE), Pending::Name(index));
        }
        let mut orders_first = false;
        loop {
            self.tell_panel();
            if let Err(error) = self.hand_out_files().await {
                return self.lost(format!("the connection broke: {error}"));
            }
            if let Err(error) = self.hand_out_leases().await {
                return self.lost(format!("the connection broke: {error}"));
            }
            let out = self.wire.drain();
            if !out.is_empty()
                && let Err(error) = self.connection.send_all(&out).await
            {
                return self.lost(format!("the connection broke: {error}"));
            }
            let mut input =
                poll_fn(|context| self.poll_input(&mut stream, orders.as_mut(), orders_first, context)).await;
            orders_first = !orders_first;
            for handled in 1.. {
                match input {
                    Input::Message(message) => self.message(message),
                    Input::Order(order) => self.order(order),
                    Input::Verdict(verdict) => {
                        self.calls.decided(&mut self.wire, verdict, &mut self.lasting.next_call);
                    }
                    Input::Stop => {
                        self.say_last_words().await;
                        return Ended::Stopped;
                    }
                    Input::Broken(text) => return self.lost(text),
                }
                if let Some(text) = self.useless.take() {
                    return self.lost(text);
                }
                if handled == BATCH {
                    break;
                }
                let more = poll_fn(|context| {
                    Poll::Ready(self.poll_input(&mut stream, orders.as_mut(), orders_first, context))
                });
                let Poll::Ready(next) = more.await else { break };
                orders_first = !orders_first;
                input = next;
            }
        }
    }

    /// Before all else that waits to be written: what is said of a lease comes after it.
    async fn hand_out_leases(&mut self) -> zbus::Result<()> {
        for (call, lease) in self.wire.drain_leases() {
            let opened = match calls::wants_reply(&call) {
                true => self.leases.open(&call, lease, &self.lasting.inbox),
                false => Err("nobody takes it".into()),
            };
            let failed = match opened {
                Ok(answer) => match self.connection.send(&answer).await {
                    Ok(()) => continue,
                    Err(zbus::Error::Unsupported) => "this bus does not pass file descriptors".into(),
                    Err(error) => return Err(error),
                },
                Err(text) => text,
            };
            self.leases.close(lease);
            leases::tell_closed(&self.lasting.inbox, lease);
            let text = format!("no lease can be given: {failed}");
            calls::reply_error(&mut self.wire, &call, "org.freedesktop.DBus.Error.Failed", &text);
        }
        Ok(())
    }

    async fn hand_out_files(&mut self) -> zbus::Result<()> {
        for (call, Handed { id, file, collected, .. }) in self.wire.drain_files() {
            let answer = file.and_then(|(file, number)| match calls::wants_reply(&call) {
                true => Handed::answer(file, number, &call),
                false => Err("nobody takes it".into()),
            });
            let failed = match answer {
                Ok(answer) => match self.connection.send(&answer).await {
                    Ok(()) => None,
                    Err(zbus::Error::Unsupported) => Some("this bus does not pass file descriptors".into()),
                    Err(error) => return Err(error),
                },
                Err(text) => Some(text),
            };
            Handed::outcome(id, collected, failed.is_none()).into_iter().for_each(|incoming| self.wire.tell(incoming));
            if let Some(failed) = failed {
                let text = format!("no file can be given: {failed}");
                calls::reply_error(&mut self.wire, &call, "org.freedesktop.DBus.Error.Failed", &text);
            }
        }
        Ok(())
    }

    async fn say_last_words(&mut self) {
        if let Ok(runtime) = SharedRuntime::current() {
            // Nobody could be asked about them any more.
            let _ = runtime.timeout(LAST_WORDS, self.notifications.close()).await;
        }
        let out = self.wire.drain();
        let sent = self.connection.send_all(&out);
        let sent = match SharedRuntime::current() {
            // Nobody waits for a bus that does not read.
            Ok(runtime) => runtime.timeout(LAST_WORDS, sent).await.map_err(|_| "it does not read".to_owned()),
            Err(error) => Err(error.to_string()),
        };
        if let Err(error) = sent.and_then(|sent| sent.map_err(|error| error.to_string())) {
            log::debug!("{} bus: the last words were not sent: {error}", self.lasting.bus);
        }
    }

    fn lost(mut self, text: String) -> Ended {
        for (app, task) in self.starts {
            if !task.is_finished() {
                let outcome = StartOutcome::Failed("the bus went away".into());
                self.lasting.event(BusEvent::Started(app, outcome));
            }
        }
        self.deliveries.end(&self.wire);
        self.clients.end(&self.wire);
        self.manager.end(&self.wire);
        Ended::Lost { text, was_up: self.was_up }
    }

    fn order(&mut self, order: Order) {
        if !self.is_up() {
            return self.lasting.refuse(order);
        }
        let action = match order {
            Order::Act(action) => action,
            Order::Unit(order) => return self.manager.order(&mut self.wire, order),
            Order::File(handed) => return self.calls.hand(&mut self.wire, handed),
        };
        match action {
            Action::Reply(call, reply) => {
                self.calls.reply(&mut self.wire, call, reply, &mut self.lasting.next_call);
            }
            Action::Watch(app) => {
                self.watches.add(&mut self.wire, &app);
                self.lasting.watched.insert(app);
            }
            Action::Unwatch(app) => {
                self.watches.remove(&mut self.wire, &app);
                self.manager.gone(&mut self.wire, &app.service);
                self.lasting.watched.remove(&app);
            }
            Action::Call { ticket, app, owner, version, call } => {
                self.deliveries.call(&mut self.wire, ticket, app, owner, version, call);
            }
            Action::CallClient { app, owner, call } => self.clients.call(&mut self.wire, app, owner, call),
            Action::Start(app) => self.start(app, None),
            Action::Activate { app, owner: None, token } => self.start(app, Some(token)),
            Action::Activate { app, owner: Some(owner), token } => {
                start::present(&mut self.wire, &app, &owner.0, token.as_deref());
            }
            Action::Notify(app, order) => {
                let Lasting { way, inbox, .. } = &*self.lasting;
                self.notifications.order(app, order, &self.connection, way, inbox);
            }
            Action::PanelChanged(_) => self.panel.changed = true,
            Action::EndLease(_, lease) => self.leases.close(lease),
            Action::LeaseEnding { .. } => {
                if let Some(signal) = leases::ending(&action) {
                    self.wire.send(signal);
                }
            }
            other => log::error!("the bus thread was given {other:?}"),
        }
    }

    /// With `shown` because the user wants to see it, by the activation token if there is one.
    fn start(&mut self, app: AppKey, shown: Option<Option<Arc<str>>>) {
        self.starts.retain(|_, task| !task.is_finished());
        if self.starts.contains_key(&app) {
            return;
        }
        let (connection, inbox, starting) = (self.connection.clone(), self.lasting.inbox.clone(), app.clone());
        let way = self.lasting.way.clone();
        let task = zruntime::spawn(async move {
            let outcome = match shown {
                None => start::start(connection, way, starting.clone()).await,
                Some(token) => start::start_shown(connection, way, starting.clone(), token).await,
            };
            let _ = inbox.send(Incoming::Event(Event::Bus(BusEvent::Started(starting, outcome))));
        });
        self.starts.insert(app, task);
    }

    /// Finds out whether the app could be started again; one look at a time for each.
    fn tell_startable(&mut self, app: AppKey) {
        self.startable.retain(|_, task| !task.is_finished());
        if self.startable.contains_key(&app) {
            return;
        }
        let looked_at = app.clone();
        let (connection, inbox, way) = (self.connection.clone(), self.lasting.inbox.clone(), self.lasting.way.clone());
        let task = zruntime::spawn(async move {
            match start::is_startable(connection, way, app.clone()).await {
                Some(startable) => {
                    let _ = inbox.send(Incoming::Event(Event::Bus(BusEvent::Startable(app, startable))));
                }
                None => log::debug!("{app}: it cannot be found out whether it could be started again"),
            }
        });
        self.startable.insert(looked_at, task);
    }

    /// A watched name came: whoever was starting it need wait no longer.
    fn started(&mut self, name: &str) {
        let app = AppKey::new(self.lasting.bus, name);
        if let Some(task) = self.starts.remove(&app)
            && !task.is_finished()
        {
            self.wire.event(BusEvent::Started(app, StartOutcome::Started));
        }
    }

    fn message(&mut self, message: Message) {
        match message.message_type() {
            Type::MethodCall => {
                let next = self.was_up.then_some(&mut self.lasting.next_call);
                self.calls.incoming(&mut self.wire, message, self.taken.as_deref(), next);
            }
            Type::MethodReturn | Type::Error => {
                if let Some((pending, response)) = self.wire.take(&message) {
                    self.response(pending, response);
                }
            }
            Type::Signal => self.signal(&message),
        }
    }

    fn response(&mut self, pending: Pending, response: Response) {
        match pending {
            Pending::Name(index) => self.name_requested(index, response),
            Pending::PanelName => self.panel_name_requested(response),
            Pending::Holder(index) => {
                let holder = response.ok().and_then(|message| message.body().deserialize::<u32>().ok());
                let holder = holder.map_or_else(|| "another process".into(), |pid| format!("process {pid}"));
                // It may have been let go in the meantime.
                if !self.names[index] {
                    self.refuse_service(format!(
                        "{} owns the name {}: is another Night Porter running? Waiting until the name is free",
                        holder, NAMES[index]
                    ));
                }
            }
            Pending::Match(app) => Watches::matched(&app, response),
            Pending::Owner(app, number) => self.watches.owner(&mut self.wire, &app, number, response),
            Pending::Credentials(owner, purpose) => {
                if let Some(process) = process::credentials(&mut self.wire, &owner, &purpose, response) {
                    self.identified(&owner, purpose, process);
                }
            }
            Pending::User(owner, purpose) => {
                if let Some(process) = process::user(&mut self.wire, &owner, &purpose, response) {
                    self.identified(&owner, purpose, process);
                }
            }
            Pending::Number(owner, purpose, uid) => {
                if let Some(process) = process::number(&mut self.wire, &owner, &purpose, uid, response) {
                    self.identified(&owner, purpose, process);
                }
            }
            Pending::Alive(owner, purpose, process) => {
                self.identified(&owner, purpose, process::alive(process, response));
            }
            Pending::Service(sender) => {
                self.calls.service_owner(&mut self.wire, &sender, response, &mut self.lasting.next_call);
            }
            Pending::Delivery(number) => self.deliveries.answered(&mut self.wire, number, response),
            Pending::Ping(number) => self.deliveries.pinged(&mut self.wire, number, response),
            Pending::Transfer(ticket) => self.clients.told(&self.wire, ticket, response),
            Pending::Notice(app, ticket) => self.clients.answered(&self.wire, app, ticket, response),
            Pending::Manager(asked) => self.manager.answered(&mut self.wire, asked, response),
        }
    }

    fn identified(&mut self, owner: &Arc<str>, purpose: Purpose, process: Result<Process, Arc<str>>) {
        match purpose {
            Purpose::Watch(app) => {
                let (service, pid) = (Arc::clone(&app.service), process.as_ref().ok().map(|process| process.pid));
                if self.watches.identified(&self.wire, app.clone(), Arc::clone(owner), process) {
                    self.tell_startable(app);
                    if let Some(pid) = pid {
                        self.manager.seen(&mut self.wire, &service, pid);
                    }
                }
            }
            Purpose::Check(call) => self.calls.found(&self.wire, call, process),
            Purpose::Caller => self.calls.identified(&mut self.wire, owner, process, &mut self.lasting.next_call),
        }
    }

    fn signal(&mut self, message: &Message) {
        let header = message.header();
        if header.sender().is_some_and(|sender| self.manager.is(sender.as_str())) {
            return self.manager.signal(&mut self.wire, message);
        }
        // Anybody can send us a signal of this name; only the bus can be its sender.
        if header.sender().is_none_or(|sender| sender.as_str() != BUS_NAME) {
            return;
        }
        let body = message.body();
        match header.member().map(|member| member.as_str()) {
            Some("NameOwnerChanged") => {
                if let Ok((name, _, new)) = body.deserialize::<(&str, &str, &str)>() {
                    if name == KDE_NAME {
                        self.panel_name_changed(new);
                    }
                    self.watches.changed(&mut self.wire, name, new);
                    self.manager.changed(&mut self.wire, name, new);
                    if new.is_empty() {
                        self.calls.left(&mut self.wire, name);
                    } else {
                        self.started(name);
                    }
                }
            }
            Some("NameAcquired") => {
                let index = body.deserialize::<&str>().ok().and_then(|name| NAMES.iter().position(|own| *own == name));
                if let Some(index) = index {
                    self.have(index);
                }
            }
            Some("NameLost") => {
                let name = body.deserialize::<&str>().ok().filter(|name| NAMES.contains(name));
                self.useless = name.map(|name| format!("the bus took the name {name} away"));
            }
            _ => {}
        }
    }

    fn name_requested(&mut self, index: usize, response: Response) {
        const OWNER: u32 = 1;
        const IN_LINE: u32 = 2;
        const OWNER_ALREADY: u32 = 4;
        match response.map(|message| message.body().deserialize::<u32>()) {
            Ok(Ok(OWNER | OWNER_ALREADY)) => self.have(index),
            Ok(Ok(IN_LINE)) => {
                self.wire.ask_bus("GetConnectionUnixProcessID", &NAMES[index], Pending::Holder(index));
            }
            Ok(other) => self.useless = Some(format!("the bus does not give us the name {}: {other:?}", NAMES[index])),
            Err(failure) => {
                self.useless = Some(format!(
                    "the bus refuses us the name {}: {failure}. Is the policy file in dbus-1/system.d installed?",
                    NAMES[index]
                ));
            }
        }
    }

    fn have(&mut self, index: usize) {
        self.names[index] = true;
        if !self.is_up() || self.was_up {
            return;
        }
        self.was_up = true;
        self.taken = None;
        self.lasting.up();
        for app in &self.lasting.watched {
            self.watches.add(&mut self.wire, app);
        }
        self.calls.pump_all(&mut self.wire, &mut self.lasting.next_call);
        if self.panel.served {
            // First of all the watch: then the name cannot become free between the refusal and it.
            self.wire.tell_bus("AddMatch", &watch::rule(KDE_NAME).as_str());
            self.ask_for_panel_name();
        }
    }

    fn ask_for_panel_name(&mut self) {
        self.wire.ask_bus("RequestName", &(KDE_NAME, NOT_IN_LINE), Pending::PanelName);
    }

    fn panel_name_requested(&mut self, response: Response) {
        const OWNER: u32 = 1;
        const EXISTS: u32 = 3;
        const OWNER_ALREADY: u32 = 4;
        let told = std::mem::replace(&mut self.panel.told, true);
        match response.map(|message| message.body().deserialize::<u32>()) {
            Ok(Ok(OWNER | OWNER_ALREADY)) => {
                self.panel.named = true;
                log::info!("{} bus: KDE's settings panel finds this daemon now", self.lasting.bus);
            }
            Ok(Ok(EXISTS)) if !told => log::info!(
                "{} bus: another program owns {KDE_NAME}, KDE's own distributor it seems; its settings panel shows that \
                 one until it ends",
                self.lasting.bus
            ),
            Ok(Ok(EXISTS)) => {}
            Ok(other) => log::warn!("the bus does not give us the name {KDE_NAME}: {other:?}"),
            Err(failure) => log::warn!("the bus refuses us the name {KDE_NAME}: {failure}"),
        }
    }

    fn panel_name_changed(&mut self, new: &str) {
        self.panel.named = self.connection.unique_name().is_some_and(|own| own.as_str() == new);
        if new.is_empty() && self.panel.served {
            self.ask_for_panel_name();
        }
    }

    /// Once for all that has changed.
    fn tell_panel(&mut self) {
        if std::mem::take(&mut self.panel.changed) && self.panel.named {
            for signal in panel::signals(None) {
                self.wire.send(signal);
            }
        }
    }

    fn refuse_service(&mut self, reason: String) {
        self.lasting.down(&reason);
        self.calls.refuse_all(&mut self.wire, &reason);
        self.taken = Some(reason);
    }

    fn is_up(&self) -> bool {
        self.names.iter().all(|owned| *owned)
    }

    /// The next thing that happens, either kind first in turn so that neither starves the other. Verdicts are few.
    fn poll_input(
        &mut self,
        stream: &mut MessageStream,
        mut orders: Pin<&mut Receiver<Order>>,
        orders_first: bool,
        context: &mut Context<'_>,
    ) -> Poll<Input> {
        if let Poll::Ready(Some(verdict)) = self.verdicts.as_mut().poll_next(context) {
            return Poll::Ready(Input::Verdict(verdict));
        }
        for kind in [orders_first, !orders_first] {
            let polled = if kind {
                orders.as_mut().poll_next(context).map(|order| order.map_or(Input::Stop, Input::Order))
            } else {
                Pin::new(&mut *stream).poll_next(context).map(|message| match message {
                    Some(Ok(message)) => Input::Message(message),
                    Some(Err(error)) => Input::Broken(format!("the connection broke: {error}")),
                    None => Input::Broken("the bus closed the connection".into()),
                })
            };
            if polled.is_ready() {
                return polled;
            }
        }
        Poll::Pending
    }
}
