//! Calls to us that wait for the loop's reply: who calls is found out first, calls of one sender stay in order, and
//! nobody can have more than a few waiting.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use serde::Serialize;
use zbus::{DynamicType, Message, SerializeDict, Type, message::Flags};

use super::{
    checks::{Checks, Verdict},
    panel::{self, Refusal, Shown},
    polkit::Authority,
    process::{self, Identity, Purpose},
    request::{self, About, Answer, Call, Fault, INVALID_ARGS, LIMITS_EXCEEDED, Wording},
    transfers::Handed,
    wire::{Pending, Response, Wire},
};
use crate::{
    action::{ErrorKind, PanelState, Reply},
    event::{Authorization, BusEvent, CallId, Caller, Privilege, Request},
    model::Owner,
    sys::inbox::Process,
};

/// Calls of one sender waiting at most.
const PER_SENDER: usize = 32;
/// Calls waiting at most.
const TOTAL: usize = 1024;
/// Senders without a waiting call whose identity is remembered.
const REMEMBERED: usize = 256;
/// How long a caller without an application id is believed to have none: shells move apps into their own unit shortly
/// after the start.
const UNKNOWN_FOR: Duration = Duration::from_secs(10);

/// The waiting calls of one connection.
pub(super) struct Calls {
    senders: HashMap<Arc<str>, Peer>,
    asked: BTreeMap<u64, Asked>,
    /// Calls waiting, wherever.
    waiting: usize,
    clock: u64,
    /// Whether KDE's settings panel is served.
    panel: bool,
    refusal: Refusal,
    checks: Checks<Asked>,
}

/// One sender.
#[derive(Default)]
struct Peer {
    identity: Option<(Identity, Instant)>,
    identifying: bool,
    queue: VecDeque<Queued>,
    /// Its calls that the loop has.
    asked: usize,
    /// When it last called, to know whom to forget.
    used: u64,
}

/// Not yet with the loop.
struct Queued {
    message: Message,
    request: Request,
    wording: Wording,
    about: About,
    owns: Owns,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Owns {
    Unknown,
    Asking,
    Known(bool),
}

/// With the loop, or with polkit.
struct Asked {
    message: Message,
    wording: Wording,
    caller: Caller,
    request: Request,
}

impl Calls {
    pub(super) fn new(panel: bool, authority: Authority, verdicts: async_channel::Sender<Verdict>) -> Self {
        Self {
            senders: HashMap::new(),
            asked: BTreeMap::new(),
            waiting: 0,
            clock: 0,
            panel,
            refusal: Refusal::default(),
            checks: Checks::new(authority, verdicts),
        }
    }

    /// A method call came. `refuse` is set, with the reason, while we may not serve. `next` numbers calls.
    pub(super) fn incoming(&mut self, wire: &mut Wire, message: Message, refuse: Option<&str>, next: Option<&mut u64>) {
        let Some(sender) = message.header().sender().map(|sender| Arc::<str>::from(sender.as_str())) else { return };
        let (request, wording, about) = match request::read(&message, self.panel) {
            Ok(Call::Answer(answer)) => return answer_now(wire, &message, &answer),
            Ok(Call::Ask { request, wording, about }) => (request, wording, about),
            Err(fault) => {
                log::debug!("{sender}: {}", fault.text);
                if fault.name == INVALID_ARGS && panel::sets_provider(&message) {
                    self.refused(wire, &sender, &fault.text);
                }
                return reply_error(wire, &message, fault.name, &fault.text);
            }
        };
        if let Some(reason) = refuse {
            return reply_error(wire, &message, "org.freedesktop.DBus.Error.Failed", reason);
        }
        let own = self.senders.get(&sender).map_or(0, |peer| peer.queue.len() + peer.asked);
        if own >= PER_SENDER || self.waiting >= TOTAL {
            let Fault { name, text } = busy(own);
            return reply_error(wire, &message, name, &text);
        }
        self.clock += 1;
        self.waiting += 1;
        let peer = self.senders.entry(Arc::clone(&sender)).or_default();
        peer.used = self.clock;
        let stale = peer.identity.as_ref().is_some_and(|(identity, since)| {
            identity.app_id.is_none() && since.elapsed() > UNKNOWN_FOR && peer.queue.is_empty()
        });
        if stale {
            peer.identity = None;
        }
        peer.queue.push_back(Queued { message, request, wording, about, owns: Owns::Unknown });
        self.forget_somebody();
        if let Some(next) = next {
            self.pump(wire, &sender, next);
        }
    }

    /// We may serve now: hands over what came before.
    pub(super) fn pump_all(&mut self, wire: &mut Wire, next: &mut u64) {
        let senders: Vec<_> = self.senders.keys().cloned().collect();
        for sender in senders {
            self.pump(wire, &sender, next);
        }
    }

    /// We may not serve: refuses what waits.
    pub(super) fn refuse_all(&mut self, wire: &mut Wire, reason: &str) {
        for queued in self.senders.values_mut().flat_map(|peer| peer.queue.drain(..)) {
            self.waiting -= 1;
            reply_error(wire, &queued.message, "org.freedesktop.DBus.Error.Failed", reason);
        }
    }

    /// A caller's process was found, or not.
    pub(super) fn identified(
        &mut self,
        wire: &mut Wire,
        sender: &Arc<str>,
        process: Result<Process, Arc<str>>,
        next: &mut u64,
    ) {
        let Some(peer) = self.senders.get_mut(sender) else { return };
        peer.identifying = false;
        match process.and_then(|process| process::identify(&process)) {
            Ok(identity) => {
                peer.identity = Some((identity, Instant::now()));
                self.pump(wire, sender, next);
            }
            Err(reason) => {
                let queued: Vec<_> = peer.queue.drain(..).collect();
                self.waiting -= queued.len();
                for call in queued {
                    // If it is gone, the bus drops this.
                    let text = format!("cannot tell who calls: {reason}");
                    reply_error(wire, &call.message, "org.freedesktop.DBus.Error.AccessDenied", &text);
                }
            }
        }
    }

    /// The bus told who owns the service that `sender`'s first waiting call is about.
    pub(super) fn service_owner(&mut self, wire: &mut Wire, sender: &Arc<str>, response: Response, next: &mut u64) {
        let owner = response.ok().map(|message| message.body().deserialize::<&str>().map(ToOwned::to_owned));
        let owns = matches!(owner, Some(Ok(owner)) if *owner == **sender);
        let front = self.senders.get_mut(sender).and_then(|peer| peer.queue.front_mut());
        if let Some(front) = front.filter(|front| front.owns == Owns::Asking) {
            front.owns = Owns::Known(owns);
            self.pump(wire, sender, next);
        }
    }

    /// The loop replied.
    pub(super) fn reply(&mut self, wire: &mut Wire, call: CallId, reply: Reply, next: &mut u64) {
        // Unknown: from before the connection was lost, and so is who asked.
        let Some(asked) = self.asked.remove(&call.0) else { return };
        if let Reply::Authorize { privilege, interactive } = reply {
            return self.authorize(wire, (call.0, asked), privilege, interactive, next);
        }
        self.done(&asked);
        let Asked { message, wording, caller: Caller { owner: Owner(sender), .. }, .. } = asked;
        let reply = match (wording, reply) {
            (Wording::SetProvider, Reply::Error(kind, text)) => {
                self.refused(wire, &sender, &text);
                Reply::Error(kind, text)
            }
            (Wording::SetProvider, reply) => {
                for signal in self.refusal.clear(&sender) {
                    wire.send(signal);
                }
                reply
            }
            (Wording::Panel(_), Reply::Panel(mut state)) => {
                self.refusal.apply(&sender, &mut state);
                Reply::Panel(state)
            }
            (_, reply) => reply,
        };
        word(wire, &message, wording, reply);
    }

    /// The loop answers with a file.
    pub(super) fn hand(&mut self, wire: &mut Wire, handed: Handed) {
        let Some(asked) = self.asked.remove(&handed.call.0) else {
            Handed::outcome(handed.id, handed.collected, false).into_iter().for_each(|incoming| wire.tell(incoming));
            return;
        };
        self.done(&asked);
        wire.hand(asked.message, handed);
    }

    /// The loop wants to know what polkit says before it answers.
    fn authorize(
        &mut self,
        wire: &mut Wire,
        (number, asked): (u64, Asked),
        privilege: Privilege,
        interactive: bool,
        next: &mut u64,
    ) {
        let flags = asked.message.primary_header().flags();
        let interactive = interactive && flags.contains(Flags::ALLOW_INTERACTIVE_AUTH);
        let (Owner(sender), request) = (asked.caller.owner.clone(), asked.request.clone());
        let begun = self.checks.begin(wire, (number, asked), &sender, (privilege, request), interactive);
        if let Err((asked, reason)) = begun {
            self.ask_again(wire, asked, Authorization::Refused(reason), next);
        }
    }

    /// The process of a caller that polkit is to be asked about was found, or not.
    pub(super) fn found(&mut self, wire: &Wire, call: u64, process: Result<Process, Arc<str>>) {
        self.checks.found(wire, call, process);
    }

    /// polkit answered, or could not be asked.
    pub(super) fn decided(&mut self, wire: &mut Wire, (call, authorization): Verdict, next: &mut u64) {
        if let Some(asked) = self.checks.take(wire, call) {
            self.ask_again(wire, asked, authorization, next);
        }
    }

    /// A name has no owner any more.
    pub(super) fn left(&mut self, wire: &mut Wire, name: &str) {
        for asked in self.checks.left(wire, name) {
            self.done(&asked);
        }
    }

    fn ask_again(&mut self, wire: &Wire, mut asked: Asked, authorization: Authorization, next: &mut u64) {
        asked.caller.authorization = authorization;
        hand_over(wire, &mut self.asked, asked, next);
    }

    /// A call waits no more.
    fn done(&mut self, asked: &Asked) {
        self.waiting -= 1;
        if let Some(peer) = self.senders.get_mut(&asked.caller.owner.0) {
            peer.asked -= 1;
        }
        self.forget_somebody();
    }

    /// What the panel wants is refused: it is told, for it does not wait for a reply.
    fn refused(&mut self, wire: &mut Wire, sender: &Arc<str>, reason: &str) {
        for signal in self.refusal.note(sender, reason) {
            wire.send(signal);
        }
    }

    /// Gives the loop every call of `sender` that is ready, in order.
    fn pump(&mut self, wire: &mut Wire, sender: &Arc<str>, next: &mut u64) {
        let Some(peer) = self.senders.get_mut(sender) else { return };
        while let Some(front) = peer.queue.front_mut() {
            let Some((identity, _)) = &peer.identity else {
                if !peer.identifying {
                    peer.identifying = true;
                    process::ask(wire, sender, Purpose::Caller);
                }
                return;
            };
            let owns_service = match (front.owns, &front.about) {
                (Owns::Known(owns), _) => owns,
                (Owns::Asking, _) => return,
                (_, About::Caller) => true,
                (_, About::Nobody) => false,
                (_, About::Service(service)) if service == sender => true,
                (_, About::Service(service)) if service.starts_with(':') => false,
                (_, About::Service(service)) => {
                    front.owns = Owns::Asking;
                    wire.ask_bus("GetNameOwner", &&**service, Pending::Service(Arc::clone(sender)));
                    return;
                }
            };
            let caller = Caller {
                bus: wire.bus,
                owner: Owner(Arc::clone(sender)),
                uid: identity.uid,
                pid: identity.pid,
                app_id: identity.app_id.clone(),
                sandboxed: identity.sandboxed,
                networked: identity.networked,
                owns_service,
                authorization: Authorization::NotAsked,
            };
            let Some(Queued { message, request, wording, .. }) = peer.queue.pop_front() else { return };
            peer.asked += 1;
            hand_over(wire, &mut self.asked, Asked { message, wording, caller, request }, next);
        }
    }

    /// Keeps the table of senders within its bound: who has nothing waiting and called longest ago goes.
    fn forget_somebody(&mut self) {
        let busy = |peer: &Peer| peer.identifying || peer.asked > 0 || !peer.queue.is_empty();
        if self.senders.len() <= REMEMBERED {
            return;
        }
        let idle = self.senders.iter().filter(|(_, peer)| !busy(peer));
        if let Some(oldest) = idle.min_by_key(|(_, peer)| peer.used).map(|(sender, _)| Arc::clone(sender)) {
            self.senders.remove(&oldest);
        }
    }
}

/// Gives the loop a call under a number of its own.
fn hand_over(wire: &Wire, asked: &mut BTreeMap<u64, Asked>, call: Asked, next: &mut u64) {
    let event = BusEvent::Call { call: CallId(*next), caller: call.caller.clone(), request: call.request.clone() };
    asked.insert(*next, call);
    *next += 1;
    wire.event(event);
}

fn busy(own: usize) -> Fault {
    let text = if own >= PER_SENDER {
        format!("{own} of your calls wait for an answer already")
    } else {
        format!("{TOTAL} calls wait for an answer already")
    };
    Fault { name: LIMITS_EXCEEDED, text }
}

fn answer_now(wire: &mut Wire, call: &Message, answer: &Answer) {
    match answer {
        Answer::Empty => reply(wire, call, &()),
        Answer::Text(text) => reply(wire, call, &text.as_str()),
        Answer::EmptyDict => reply(wire, call, &HashMap::<&str, zbus::Variant<'_>>::new()),
        Answer::Property(text) => reply(wire, call, &zbus::Variant::from(*text)),
        Answer::Properties(all) => {
            let all: HashMap<_, _> = all.iter().map(|(name, value)| (*name, zbus::Variant::from(*value))).collect();
            reply(wire, call, &all);
        }
    }
}

/// Results of version 2's Register.
#[derive(SerializeDict, Type)]
#[zbus(signature = "a{sv}")]
struct RegisterResult {
    success: &'static str,
    reason: Option<&'static str>,
}

const SUCCEEDED: &str = "REGISTRATION_SUCCEEDED";
const FAILED: &str = "REGISTRATION_FAILED";

fn word(wire: &mut Wire, call: &Message, wording: Wording, answer: Reply) {
    match (answer, wording) {
        (Reply::Error(kind, text), _) => reply_error(wire, call, error_name(kind), &text),
        (Reply::Registered, Wording::RegisterV1) => reply(wire, call, &(SUCCEEDED, "")),
        (Reply::Registered, Wording::RegisterV2) => {
            reply(wire, call, &RegisterResult { success: SUCCEEDED, reason: None });
        }
        (Reply::RegisterFailed(reason, text), Wording::RegisterV1) => {
            let text = if text.is_empty() { reason.as_str() } else { &text };
            reply(wire, call, &(FAILED, text));
        }
        (Reply::RegisterFailed(reason, text), Wording::RegisterV2) => {
            log::info!("a registration failed: {}: {text}", reason.as_str());
            reply(wire, call, &RegisterResult { success: FAILED, reason: Some(reason.as_str()) });
        }
        (Reply::Json(text), Wording::Text) => reply(wire, call, &text.as_str()),
        (Reply::State(state), Wording::State) => reply(wire, call, &&*state),
        (Reply::Panel(state), Wording::Panel(shown)) => show(wire, call, shown, *state),
        (Reply::Done, Wording::Empty | Wording::SetProvider) => reply(wire, call, &()),
        (Reply::Done, Wording::EmptyDict) => reply(wire, call, &HashMap::<&str, zbus::Variant<'_>>::new()),
        (Reply::Lease(lease), Wording::Lease) => wire.lease(call, lease),
        (Reply::Transfer(id), Wording::Transfer) => reply(wire, call, &id.0),
        // `Authorize` does not come here.
        (answer, wording) => {
            log::error!("a reply {answer:?} does not fit a call that wants {wording:?}");
            reply_error(wire, call, "org.freedesktop.DBus.Error.Failed", "this daemon made a mistake");
        }
    }
}

fn show(wire: &mut Wire, call: &Message, shown: Shown, state: PanelState) {
    match shown {
        Shown::Status => reply(wire, call, &state.status),
        Shown::Error => reply(wire, call, &state.error.replace('\0', "").as_str()),
        Shown::Provider => reply(wire, call, &panel::provider(state.upstream.kind)),
        Shown::Configuration(kind) if kind == state.upstream.kind => {
            reply(wire, call, &panel::configuration(&state.upstream));
        }
        // The settings of the others are not kept.
        Shown::Configuration(_) => reply(wire, call, &HashMap::<&str, zbus::Variant<'_>>::new()),
        Shown::Clients => {
            let clients: Vec<_> =
                state.clients.iter().map(|(token, service, text)| (&**token, &**service, &**text)).collect();
            reply(wire, call, &clients);
        }
    }
}

const fn error_name(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::InvalidArgs => INVALID_ARGS,
        ErrorKind::LimitsExceeded => LIMITS_EXCEEDED,
        ErrorKind::NotAuthorized => "org.nightporter1.Error.NotAuthorized",
        ErrorKind::NoSuchApp => "org.nightporter1.Error.NoSuchApp",
        ErrorKind::NotRunning => "org.nightporter1.Error.NotRunning",
        ErrorKind::Refused => "org.nightporter1.Error.Refused",
        ErrorKind::Failed => "org.nightporter1.Error.Failed",
    }
}

fn reply<B: Serialize + DynamicType>(wire: &mut Wire, call: &Message, body: &B) {
    if !wants_reply(call) {
        return;
    }
    match Message::method_return(&call.header()).build(body) {
        Ok(message) => wire.send(message),
        Err(error) => {
            reply_error(wire, call, "org.freedesktop.DBus.Error.Failed", &format!("no reply can be made: {error}"))
        }
    }
}

pub(super) fn reply_error(wire: &mut Wire, call: &Message, name: &'static str, text: &str) {
    if wants_reply(call) {
        // NUL cannot be in a D-Bus string, and some of these texts quote others.
        let text = text.replace('\0', "");
        match Message::error(&call.header(), name).build(&text.as_str()) {
            Ok(message) => wire.send(message),
            Err(error) => log::error!("cannot make an error reply: {error}"),
        }
    }
}

pub(super) fn wants_reply(call: &Message) -> bool {
    !call.primary_header().flags().contains(Flags::NO_REPLY_EXPECTED)
}
