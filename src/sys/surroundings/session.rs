//! One connection to the system bus: which services are there, what they say, and the locks of logind.

use std::{
    collections::{BTreeMap, HashMap},
    future::{Future, poll_fn},
    num::NonZeroU32,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures_core::Stream;
use zbus::{Connection, Message, MessageStream, ObjectPath, Variant, message::Type};

use super::{
    Lasting, Turn,
    calls::{BUS_NAME, Calls, OWNERS_RULE, PROPERTIES, Pending, Response},
    facts::{Facts, Known, Object, Service},
    logind::{self, Inhibitors},
    network_manager, upower,
    users::Users,
};
use crate::{
    event::Event,
    model::Surroundings,
    sys::clock,
    time::{Instant, earliest},
};

/// A service that went away and is back within this has restarted; until then its last word holds.
const RESTART: Duration = Duration::from_secs(10);
/// Larger messages are not read: what is asked for here fits many times.
const LARGEST_BODY: usize = 128 * 1024;
/// Messages handled before what they caused is written.
const BATCH: usize = 64;

/// One connection.
pub(super) struct Session<'a> {
    lasting: &'a mut Lasting,
    connection: Connection,
    calls: Calls,
    /// The unique names of the services that are there.
    owners: BTreeMap<Service, Arc<str>>,
    /// Services that went away, and until when they may be restarting.
    gone: BTreeMap<Service, Instant>,
    /// Services the bus has not spoken of yet.
    unheard: Vec<Service>,
    known: Known,
    /// The objects followed, and the latest GetAll of each that is not answered.
    followed: BTreeMap<Object, Option<NonZeroU32>>,
    inhibitors: Inhibitors,
}

enum Input {
    Message(Message),
    Turn(Turn),
    Broken(String),
}

impl<'a> Session<'a> {
    pub(super) fn new(lasting: &'a mut Lasting, connection: Connection) -> Self {
        Self {
            lasting,
            connection,
            calls: Calls::default(),
            owners: BTreeMap::new(),
            gone: BTreeMap::new(),
            unheard: Service::ALL.to_vec(),
            known: Known::default(),
            followed: BTreeMap::new(),
            inhibitors: Inhibitors::default(),
        }
    }

    /// Until the connection breaks: why. `None` when told to stop.
    pub(super) async fn run(mut self) -> Option<String> {
        let mut stream = MessageStream::from(&self.connection);
        for service in Service::ALL {
            self.calls.ask_bus("AddMatch", &owner_rule(service), Pending::Match);
            self.calls.ask_bus("GetNameOwner", service.name(), Pending::Owner(service));
        }
        self.calls.ask_bus("AddMatch", &logind_rule("PrepareForSleep"), Pending::Match);
        if self.lasting.users.is_some() {
            // Before the list is asked for, so that nobody comes between.
            for member in ["UserNew", "UserRemoved"] {
                self.calls.ask_bus("AddMatch", &logind_rule(member), Pending::Match);
            }
        }
        let stay_awake = self.lasting.bell.wishes().stay_awake;
        self.inhibitors.stay_awake(&mut self.calls, stay_awake, clock::boot());
        let ended = loop {
            let out = self.calls.drain();
            if let Err(error) = self.connection.send_all(&out).await {
                break Some(format!("the connection broke: {error}"));
            }
            let users = self.lasting.users.as_ref().and_then(Users::poll_timeout);
            let deadline = earliest(self.lasting.settling.poll_timeout(), self.inhibitors.poll_timeout());
            let deadline = earliest(deadline, users);
            let mut input = {
                let mut turn = pin!(self.lasting.bell.turn(deadline));
                // The loop first: what it wants is little, and a flood on the bus must not hold it up.
                poll_fn(|context| match turn.as_mut().poll(context) {
                    Poll::Pending => poll_message(&mut stream, context),
                    Poll::Ready(turn) => Poll::Ready(Input::Turn(turn)),
                })
                .await
            };
            let mut handled = 0;
            let stop = loop {
                match input {
                    Input::Message(message) => self.message(&message),
                    Input::Turn(Turn::Stop) => break Some(None),
                    Input::Turn(Turn::Rang) => self.rang(),
                    Input::Turn(Turn::Deadline) => {
                        let now = clock::boot();
                        self.inhibitors.handle_timeout(now);
                        if let Some(users) = &mut self.lasting.users {
                            users.handle_timeout(&mut self.calls, now);
                        }
                    }
                    Input::Broken(text) => break Some(Some(text)),
                }
                handled += 1;
                let more = poll_fn(|context| Poll::Ready(poll_message(&mut stream, context))).await;
                let (true, Poll::Ready(next)) = (handled < BATCH, more) else { break None };
                input = next;
            };
            if let Some(ended) = stop {
                break ended;
            }
            self.tell();
        };
        if let Some(event) = self.inhibitors.vanished() {
            self.lasting.event(event);
        }
        self.lasting.users.iter_mut().for_each(Users::vanished);
        ended
    }

    fn rang(&mut self) {
        let wishes = self.lasting.bell.wishes();
        if wishes.allow_sleep {
            self.inhibitors.allow_sleep();
        }
        if let Some(stay_awake) = wishes.renewed {
            self.inhibitors.stay_awake(&mut self.calls, stay_awake, clock::boot());
        }
        if wishes.look_again {
            self.inhibitors.take_missing(&mut self.calls);
            let unread: Vec<Object> =
                self.followed.keys().filter(|object| !self.known.0.contains_key(object)).cloned().collect();
            for object in unread {
                self.read(object);
            }
        }
    }

    fn message(&mut self, message: &Message) {
        match message.message_type() {
            // Nobody has anything to ask of us here, and nobody is owed an answer on a connection without a name.
            Type::MethodCall => {}
            Type::MethodReturn | Type::Error => {
                if let Some((serial, pending, response)) = self.calls.take(message) {
                    self.response(serial, pending, response);
                }
            }
            Type::Signal => self.signal(message),
        }
    }

    fn response(&mut self, serial: NonZeroU32, pending: Pending, response: Response) {
        match pending {
            Pending::Match => {
                if let Err(text) = response {
                    log::info!("system bus: a change will go unnoticed: {text}");
                }
            }
            Pending::Owner(service) => {
                let owner = response.ok().and_then(|message| message.body().deserialize::<&str>().ok().map(Arc::from));
                self.owner(service, owner);
            }
            Pending::Properties(object) => self.properties(object, serial, response),
            Pending::Inhibitor(mode) => self.inhibitors.answered(mode, serial, response),
            Pending::Users => {
                if let Some(users) = &mut self.lasting.users {
                    users.listed(&mut self.calls, serial, response);
                }
            }
            Pending::User(uid) => {
                if let Some(users) = &mut self.lasting.users {
                    users.described(uid, serial, response);
                }
            }
        }
    }

    fn properties(&mut self, object: Object, serial: NonZeroU32, response: Response) {
        let Some(latest) = self.followed.get_mut(&object).filter(|latest| **latest == Some(serial)) else { return };
        *latest = None;
        let kind = object.kind;
        let read = response.and_then(|message| {
            let body = message.body();
            if body.len() > LARGEST_BODY {
                return Err(format!("{} bytes", body.len()));
            }
            let properties = body.deserialize::<HashMap<&str, Variant<'_>>>().map_err(|error| error.to_string())?;
            self.known.0.entry(object.clone()).or_default().take(kind, &properties);
            Ok(())
        });
        match read {
            Ok(()) => self.follow(),
            Err(text) => log::debug!("{} at {} cannot be read: {text}", kind.interface(), object.path),
        }
    }

    fn signal(&mut self, message: &Message) {
        let header = message.header();
        let (Some(sender), Some(member)) = (header.sender(), header.member()) else { return };
        let body = message.body();
        match (header.interface().map(|interface| interface.as_str()), member.as_str()) {
            (Some(BUS_NAME), "NameOwnerChanged") if sender.as_str() == BUS_NAME => {
                if let Ok((name, _, new)) = body.deserialize::<(&str, &str, &str)>()
                    && let Some(service) = Service::named(name)
                    // The answer about the present owner is still to come, and newer.
                    && !self.unheard.contains(&service)
                {
                    self.owner(service, (!new.is_empty()).then(|| new.into()));
                }
            }
            (Some(logind::MANAGER), "PrepareForSleep") if self.is(Service::Logind, sender.as_str()) => {
                let event = body.deserialize::<bool>().ok();
                let event = event.and_then(|start| self.inhibitors.prepare_for_sleep(&mut self.calls, start));
                if let Some(event) = event {
                    self.lasting.event(event);
                }
            }
            (Some(logind::MANAGER), member @ ("UserNew" | "UserRemoved"))
                if self.is(Service::Logind, sender.as_str()) =>
            {
                if let Some(users) = &mut self.lasting.users
                    && let Ok((uid, path)) = body.deserialize::<(u32, ObjectPath<'_>)>()
                {
                    match member {
                        "UserNew" => users.came(&mut self.calls, uid, path.as_str()),
                        _ => users.left(&mut self.calls, uid),
                    }
                }
            }
            (Some(PROPERTIES), "PropertiesChanged") if body.len() <= LARGEST_BODY => {
                let Some(path) = header.path() else { return };
                let Ok((interface, changed, gone)) =
                    body.deserialize::<(&str, HashMap<&str, Variant<'_>>, Vec<&str>)>()
                else {
                    return;
                };
                let object = self.followed.keys().find(|object| {
                    *object.path == *path.as_str()
                        && object.kind.interface() == interface
                        && self.is(object.kind.service(), sender.as_str())
                });
                let Some(object) = object.cloned() else { return };
                // Before the first answer there is nothing to change.
                if let Some(facts) = self.known.0.get_mut(&object) {
                    facts.take(object.kind, &changed);
                }
                if Facts::concern(object.kind, &gone) {
                    self.read(object);
                }
                self.follow();
            }
            _ => {}
        }
    }

    fn is(&self, service: Service, sender: &str) -> bool {
        self.owners.get(&service).is_some_and(|owner| **owner == *sender)
    }

    /// A service has come, gone, or been replaced.
    fn owner(&mut self, service: Service, owner: Option<Arc<str>>) {
        self.unheard.retain(|unheard| *unheard != service);
        if self.owners.get(&service) == owner.as_ref() {
            return;
        }
        if self.owners.remove(&service).is_some() {
            self.gone.insert(service, clock::boot() + RESTART);
            if service == Service::Logind {
                if let Some(event) = self.inhibitors.vanished() {
                    self.lasting.event(event);
                }
                self.lasting.users.iter_mut().for_each(Users::vanished);
            }
        }
        // Gone, or about to be read anew.
        self.follow();
        if let Some(owner) = owner {
            self.gone.remove(&service);
            self.owners.insert(service, Arc::clone(&owner));
            if service == Service::Logind {
                self.inhibitors.appeared(&mut self.calls, Arc::clone(&owner));
                if let Some(users) = &mut self.lasting.users {
                    users.appeared(&mut self.calls, owner);
                }
            }
            self.follow();
        }
    }

    /// Follows what is of interest now, and nothing else.
    fn follow(&mut self) {
        let mut wanted = Vec::new();
        if self.owners.contains_key(&Service::UPower) {
            wanted.extend(upower::wanted());
        }
        if self.owners.contains_key(&Service::NetworkManager) {
            let modems = self.owners.contains_key(&Service::ModemManager);
            wanted.extend(network_manager::wanted(&self.known, modems));
        }
        let unwanted: Vec<Object> = self.followed.keys().filter(|object| !wanted.contains(object)).cloned().collect();
        let lost = !unwanted.is_empty();
        for object in unwanted {
            if let Some(serial) = self.followed.remove(&object).flatten() {
                self.calls.forget(serial);
            }
            self.known.0.remove(&object);
            if object.kind.changes() {
                self.calls.ask_bus("RemoveMatch", &change_rule(&object), Pending::Match);
            }
        }
        for object in wanted {
            if !self.followed.contains_key(&object) {
                if object.kind.changes() {
                    self.calls.ask_bus("AddMatch", &change_rule(&object), Pending::Match);
                }
                self.read(object);
            }
        }
        if lost {
            // What was known only through those is of no interest either.
            self.follow();
        }
    }

    /// Reads an object's properties, for the first time or again.
    fn read(&mut self, object: Object) {
        let Some(owner) = self.owners.get(&object.kind.service()) else { return };
        let asked = Pending::Properties(object.clone());
        let serial = self.calls.call(owner, &object.path, PROPERTIES, "GetAll", &object.kind.interface(), asked);
        // One answer is waited for at a time, or who says a lot and answers nothing would make us grow.
        if let Some(earlier) = self.followed.insert(object, serial).flatten() {
            self.calls.forget(earlier);
        }
    }

    /// Tells the loop how things are, when it is time.
    fn tell(&mut self) {
        let now = clock::boot();
        self.gone.retain(|_, until| *until > now);
        let (on_mains, battery) = upower::read(&self.known);
        let surroundings = Surroundings { on_mains, battery, network: network_manager::read(&self.known) };
        let complete = self.unheard.is_empty()
            && self.gone.is_empty()
            && self.followed.values().all(Option::is_none)
            && !network_manager::starting(&self.known);
        self.lasting.tell(surroundings, complete, now);
    }
}

impl Lasting {
    fn event(&self, event: Event) {
        // False means that the loop is gone, and this thread about to end.
        let _ = self.inbox.event(event);
    }

    /// Takes in how things are and tells the loop when it is time.
    pub(super) fn tell(&mut self, surroundings: Surroundings, complete: bool, now: Instant) {
        self.settling.update(surroundings, complete, now);
        if let Some(surroundings) = self.settling.poll(now) {
            log::debug!("surroundings: {surroundings:?}");
            self.event(Event::Surroundings(surroundings));
        }
    }
}

fn poll_message(stream: &mut MessageStream, context: &mut Context<'_>) -> Poll<Input> {
    Pin::new(stream).poll_next(context).map(|message| match message {
        Some(Ok(message)) => Input::Message(message),
        Some(Err(error)) => Input::Broken(format!("the connection broke: {error}")),
        None => Input::Broken("the bus closed the connection".into()),
    })
}

fn owner_rule(service: Service) -> String {
    format!("{OWNERS_RULE},arg0='{}'", service.name())
}

fn logind_rule(member: &str) -> String {
    format!(
        "type='signal',sender='{}',path='{}',interface='{}',member='{member}'",
        Service::Logind.name(),
        logind::PATH,
        logind::MANAGER
    )
}

fn change_rule(object: &Object) -> String {
    // An object path contains neither quotes nor commas.
    format!(
        "type='signal',sender='{}',path='{}',interface='{PROPERTIES}',member='PropertiesChanged',arg0='{}'",
        object.kind.service().name(),
        object.path,
        object.kind.interface()
    )
}
