//! Everything the world can tell the core. Plain data: the shell translates, the core decides.

use std::{sync::Arc, time::Duration};

use crate::{
    config::UpstreamSettings,
    model::{
        AppKey, Bus, ConnectorVersion, HistoryRow, LeaseId, LeaseKind, MessageSeq, Owner, Pressure, ProcessFacts,
        Sample, Secret, SelfSample, Surroundings, TargetId, Veto, Window, Zram, ZramSource,
    },
    notification::{HelperAnswer, NotifyNews, NotifyWhen},
    transfer::{TransferEvent, TransferId, TransferRequest},
};

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Nothing but time passed; deadlines may be due.
    Tick,
    /// Something on an upstream link.
    Link(LinkId, LinkEvent),
    /// Something on a bus.
    Bus(BusEvent),
    /// A store operation that carried this ticket, and every one before it, is durable, or failed.
    Stored(StoreTicket, Result<(), StoreError>),
    /// A body asked for with `StoreOp::LoadBody`; `None` when the row is gone or unreadable.
    Body(MessageSeq, Option<Arc<[u8]>>),
    /// A state asked for with `StoreOp::LoadState`, under its ticket; empty when there is none.
    State(StoreTicket, Result<Arc<[u8]>, StoreError>),
    /// An attachment asked for with `Action::Fetch`.
    Fetched(FetchTicket, Result<Arc<[u8]>, FetchError>),
    /// The process behind an app's name was looked at; on error it stays untouchable, with the reason.
    Identified {
        /// Which app.
        app: AppKey,
        /// Which instance of it.
        owner: Owner,
        /// The handle and what is known of it.
        process: Result<(TargetId, ProcessFacts), Arc<str>>,
    },
    /// A lifecycle operation ended.
    Outcome(TargetId, Outcome),
    /// The process behind the target ended.
    TargetGone(TargetId),
    /// What is watched all the time says of the target: all that speaks against holding it still, at each change.
    Vetoes(TargetId, Vec<Veto>),
    /// The answer to `Action::Inspect`: all that was found to speak against holding it still.
    Inspected(TargetId, Result<Vec<Veto>, Arc<str>>),
    /// All windows of the session on this bus, at each change; `None`: nothing tells of them (any more).
    Windows(Bus, Option<Vec<Window>>),
    /// Notifications on the bus are seen from now on (`Action::WatchNotifications`), or no more: what was sent meanwhile is
    /// not known.
    NotificationsSeen(Bus, bool),
    /// Somebody has notified the user: the sender's unique name and, where it is an app's process, the target.
    Notified {
        /// On which bus.
        bus: Bus,
        /// Who.
        owner: Owner,
        /// As which process.
        target: Option<TargetId>,
    },
    /// The answer to `Action::Help`; on error nothing came of it, with why as a sentence part.
    Helped(MessageSeq, Result<HelperAnswer, Arc<str>>),
    /// An app's memory, as asked with `Action::Sample`.
    Sampled(TargetId, Result<Sample, Arc<str>>),
    /// The daemon's own memory and zram's real use, as asked with `Action::SampleSelf`.
    SampledSelf {
        /// This process.
        daemon: SelfSample,
        /// All zram devices.
        zram: Zram,
    },
    /// History asked for with `StoreOp::LoadHistory`, under its ticket; oldest first.
    History(StoreTicket, Result<Vec<HistoryRow>, StoreError>),
    /// Something happened to a transfer.
    Transfer(TransferId, TransferEvent),
    /// An HTTP request ended.
    Http(HttpTicket, Result<HttpResponse, HttpError>),
    /// An address or a route came: worth an attempt at once.
    NetworkReturned,
    /// Power or network are not what they were. Sent once at start, where something says so, and at each change.
    Surroundings(Surroundings),
    /// The machine is about to sleep and waits for `Action::AllowSleep`, a few seconds at most.
    FallingAsleep,
    /// The machine slept and is awake again.
    Resumed,
    /// Memory is short, as the kernel says by itself, or the answer to `Action::ReadPressure`.
    Pressure(Pressure),
    /// Asked to end (SIGTERM, SIGINT): thaw, close, exit.
    Shutdown,
}

/// A WebSocket link as the core names it; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LinkId(pub u64);

/// What happens on a link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkEvent {
    /// The user name and the password for this link, where they go into the protocol itself (MQTT): right before `Open`.
    Login(Login),
    /// The link can be used: the WebSocket handshake is done, the stream is connected (and encrypted), or the response to
    /// the request for an event stream has begun.
    Open,
    /// A text frame, within the size limit.
    Text(String),
    /// A binary frame, or the next bytes of a stream, cut anywhere.
    Bytes(Vec<u8>),
    /// A ping came (the pong is already on its way).
    Ping,
    /// A pong came.
    Pong,
    /// The peer closed, or the connection ended: the last event of a link.
    Closed {
        /// Close code, where one was sent (RFC 6455 §7.4).
        code: Option<u16>,
        /// Close reason, possibly empty.
        reason: String,
    },
    /// The link could not be made or broke: the last event of a link.
    Failed(LinkError),
}

impl LinkEvent {
    /// Whether it is the last of its link.
    pub const fn is_last(&self) -> bool {
        matches!(self, Self::Closed { .. } | Self::Failed(_))
    }
}

/// What a protocol of its own logs in with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Login {
    /// User name, where there is one.
    pub username: Option<Arc<str>>,
    /// Password or token, where there is one.
    pub password: Option<Secret>,
}

/// Why a link could not be made or broke.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    /// Name resolution.
    #[error("cannot resolve the server's name: {0}")]
    Resolve(String),
    /// TCP.
    #[error("cannot connect: {0}")]
    Connect(String),
    /// TLS: certificate, protocol.
    #[error("TLS: {0}")]
    Tls(String),
    /// The certificate is not valid at the time this machine believes it is.
    #[error("this machine's clock is wrong, or the server's certificate is out of date: {0}")]
    Clock(String),
    /// Somebody between here and the server answers in its place, and wants a person to look at a page first.
    #[error("the network wants you to log in on a web page first (captive portal){}", .0.as_deref().map(|page| format!(": {page}")).unwrap_or_default())]
    Portal(Option<String>),
    /// The proxy would not lead to the server.
    #[error("the proxy: {0}")]
    Proxy(String),
    /// Not done in time.
    #[error("the server did not answer in time")]
    Timeout,
    /// The server answered the WebSocket handshake with another status.
    #[error("the server answered {status}: {body}")]
    Http {
        /// HTTP status.
        status: u16,
        /// The first 512 bytes of the body, as text.
        body: String,
        /// `Retry-After`, if it was given in seconds.
        retry_after: Option<Duration>,
    },
    /// A frame over the limit, invalid UTF-8, or another breach of RFC 6455.
    #[error("the server broke the WebSocket protocol: {0}")]
    Protocol(String),
    /// Reading or writing.
    #[error("the connection broke: {0}")]
    Io(String),
}

/// Names an HTTP request; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HttpTicket(pub u64);

/// An answer of a server, whatever its status.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpResponse {
    /// HTTP status.
    pub status: u16,
    /// The body as text, within the limit of the request.
    pub body: String,
    /// `Retry-After`, if it was given in seconds.
    pub retry_after: Option<Duration>,
}

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HttpError {
    /// The body is larger than the request allowed, or is not UTF-8.
    #[error("the server's answer cannot be used: {0}")]
    Unusable(String),
    /// The server was not reached, did not answer in time, or the credentials could not be read.
    #[error("{0}")]
    Failed(String),
}

/// Orders store operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StoreTicket(pub u64);

/// Why the store could not write.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// ENOSPC or SQLITE_FULL.
    #[error("the disk is full")]
    Full,
    /// Anything else.
    #[error("{0}")]
    Other(String),
}

/// Names an attachment download.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FetchTicket(pub u64);

/// Why an attachment could not be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FetchError {
    /// Over the limit given with the action.
    #[error("larger than {limit} bytes")]
    TooLarge {
        /// The limit in bytes.
        limit: u32,
    },
    /// The server says it is not there (any more): 404 or 410.
    #[error("the server does not have it (any more)")]
    Gone,
    /// Not fetched, now or later: its URL leads to where no sender may send this machine.
    #[error("{0}")]
    Refused(String),
    /// May work later.
    #[error("{0}")]
    Failed(String),
}

/// A call on a bus that waits for our reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CallId(pub u64);

/// A call to an app that we wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeliveryTicket(pub u64);

/// A notice to an app before it is frozen, whose end we wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NoticeTicket(pub u64);

/// A call that tells an app how a transfer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TransferTicket(pub u64);

/// What happens on a bus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BusEvent {
    /// Connected, names owned.
    Up(Bus),
    /// The connection is gone; every owner on it with it.
    Down(Bus, String),
    /// An app, or a tool, calls us. Each is answered with exactly one `Action::Reply`; after a `Reply::Authorize` the
    /// call comes again, under another id.
    Call {
        /// To reply with.
        call: CallId,
        /// Who calls.
        caller: Caller,
        /// What for.
        request: Request,
    },
    /// Who owns a watched name now; sent once at `Action::Watch` and at each change.
    OwnerChanged(AppKey, Option<Owner>),
    /// A call to an app ended.
    CallDone(DeliveryTicket, CallOutcome),
    /// Whether anything on this system says how to start the app; told for each instance of it, soon after it came. Not
    /// at all where that cannot be found out.
    Startable(AppKey, bool),
    /// The app answered a notice (`ClientCall::WillSuspend`), whatever it said, or cannot be asked.
    Prepared(AppKey, NoticeTicket),
    /// A start asked for with `Action::Start` ended. An app that came up is announced by `OwnerChanged` as well.
    Started(AppKey, StartOutcome),
    /// A call of `ClientCall::TransferDone` ended.
    TransferTold(TransferTicket, CallOutcome),
    /// The holder of a lease closed its end, or died.
    LeaseClosed(LeaseId),
    /// Something has become of a notification in an app's stead.
    Notified {
        /// Which app's.
        app: AppKey,
        /// Which of them.
        tag: Arc<str>,
        /// As it was when that happened.
        number: u64,
        /// What.
        news: NotifyNews,
    },
}

/// Who makes a call: all of it told by the bus and the kernel, nothing by the caller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// The bus the call came over.
    pub bus: Bus,
    /// Its unique name.
    pub owner: Owner,
    /// Its user id.
    pub uid: u32,
    /// Its process id, for people.
    pub pid: u32,
    /// Its application id where the system vouches for one: Flatpak's, or that of its `app-*.scope`/`.service` unit.
    pub app_id: Option<Arc<str>>,
    /// Whether it runs in a sandbox (then it is an app, never the user's own tool).
    pub sandboxed: bool,
    /// Whether it is in the same network namespace as this daemon: else it has no network, or another one.
    pub networked: bool,
    /// Whether it owns the service name its request is about (the unique name itself counts).
    pub owns_service: bool,
    /// What polkit says of this call; asked for with `Reply::Authorize`.
    pub authorization: Authorization,
}

/// What polkit says of a call for which the caller's own rights do not suffice.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Authorization {
    /// It was not asked.
    #[default]
    NotAsked,
    /// The caller has this privilege, for this one call.
    Granted(Privilege),
    /// The caller has it not, or there is nobody to ask: why, and what may help.
    Refused(Arc<str>),
}

/// What an administrator can let somebody do beyond what is one's own: the actions in `org.nightporter1.policy`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Privilege {
    /// Read about apps that are not one's own.
    Read,
    /// Freeze, thaw, end and move them, and read their endpoints.
    ManageApps,
    /// Forget a user.
    ManageUsers,
}

impl Privilege {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Read, Self::ManageApps, Self::ManageUsers];

    /// polkit's name for it.
    pub const fn action(self) -> &'static str {
        match self {
            Self::Read => "org.nightporter1.read",
            Self::ManageApps => "org.nightporter1.manage-apps",
            Self::ManageUsers => "org.nightporter1.manage-users",
        }
    }
}

/// What a caller wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// `org.unifiedpush.Distributor{1,2}.Register`.
    Register {
        /// The app's bus name.
        service: Arc<str>,
        /// The app's name for the registration.
        token: Arc<str>,
        /// Shown to the user.
        description: Arc<str>,
        /// VAPID public key.
        vapid: Option<Arc<str>>,
        /// Which interface was called.
        version: ConnectorVersion,
        /// The upstream the app wants, by name (our key `org.nightporter.upstream` in version 2's dictionary).
        upstream: Option<Arc<str>>,
        /// When the user is to be notified in the app's stead (our key `org.nightporter.notify`).
        notify: Option<NotifyWhen>,
    },
    /// `org.unifiedpush.Distributor{1,2}.Unregister`.
    Unregister {
        /// The app's name for the registration.
        token: Arc<str>,
        /// Which interface was called.
        version: ConnectorVersion,
    },
    /// `org.nightporter1.App.SetState` (no service: itself) or `SetStateOf`.
    Declare {
        /// Whom it is about; `None`: the caller.
        service: Option<Arc<str>>,
        /// What it is now.
        claim: Claim,
    },
    /// `org.nightporter1.App.Listen`: whether the caller wants to be told before it is frozen, and after.
    Listen(bool),
    /// `org.nightporter1.App.SaveState`: at most `STATE_MAX` bytes; none forgets.
    SaveState(Arc<[u8]>),
    /// `org.nightporter1.App.RestoreState`, answered with `Reply::State`.
    RestoreState,
    /// `org.nightporter1.Manager`: reading.
    Query(Query),
    /// `org.nightporter1.Manager.Move`: from now on the app, or all apps of the caller's bus, use this upstream.
    Move {
        /// Which app; `None`: all.
        service: Option<Arc<str>>,
        /// The upstream's name.
        upstream: Arc<str>,
    },
    /// `org.nightporter1.Manager.ForgetUser`: all that is kept for a user goes, at the servers as well.
    ForgetUser(u32),
    /// `org.kde.kunifiedpush.Management` (push.md §1.8).
    Panel(PanelRequest),
    /// `org.nightporter1.Manager`: acting on an app.
    Command {
        /// Whom to act on.
        service: Arc<str>,
        /// What to do.
        command: Command,
    },
    /// `org.nightporter1.App.Lease`: keep an app awake in the background.
    Lease {
        /// What for.
        kind: LeaseKind,
        /// The same in the holder's words, for people: 1 to 100 bytes without control characters.
        reason: Arc<str>,
        /// How long at most in the background, where that is less than the kind's own time; not zero.
        seconds: Option<u32>,
        /// Which app; `None`: the caller itself.
        service: Option<Arc<str>>,
    },
    /// `org.nightporter1.Transfers`, and `org.nightporter1.Manager.CancelTransfer`.
    Transfer(TransferRequest),
    /// `org.nightporter1.Manager.EndLease`: take a lease away.
    EndLease(LeaseId),
}

/// Bytes of a saved state at most.
pub const STATE_MAX: usize = 64 * 1024;

/// What KDE's settings panel asks for, on behalf of the user whose bus it is on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PanelRequest {
    /// `status`, `errorMessage`, `pushProviderId`, `registeredClients`, `pushProviderConfiguration`: answered with
    /// `Reply::Panel`.
    State,
    /// `setPushProvider`: this upstream is the user's own from now on, and all of the user's apps move to it.
    SetProvider(Box<UpstreamSettings>),
    /// `forceUnregisterClient`, by the token of the registration.
    ForceUnregister(Arc<str>),
}

/// A declared lifecycle state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Claim {
    /// Somebody looks at it.
    Foreground,
    /// Nobody looks at it.
    Background,
}

/// What can be read; each is answered with `Reply::Json`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Query {
    /// Upstreams, buses, counts.
    Status,
    /// All apps, one line each.
    Apps,
    /// One app in full.
    Show(Arc<str>),
    /// One app's last decisions with their reasons.
    Why(Arc<str>),
    /// The latest decisions about all apps, those after this number (0: all that are kept).
    Log {
        /// `view::Log::latest` of the answer before.
        after: u64,
    },
    /// The memory report, measured now.
    Report,
    /// The ledger's history of the last hours: `view::History`.
    History {
        /// How far back.
        hours: u32,
    },
    /// What would have been done and saved under the profile `observe`: `view::WhatIf`.
    WhatIf {
        /// How far back.
        hours: u32,
    },
    /// One app's endpoints: capability URLs, so only for whom may act on it.
    Endpoints(Arc<str>),
    /// The leases held now: one app's, or all.
    Leases(Option<Arc<str>>),
    /// The transfers there are: one app's, or all.
    Transfers(Option<Arc<str>>),
}

/// What a user can do to an app by hand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Command {
    /// Freeze now.
    Freeze,
    /// Thaw now.
    Thaw,
    /// Leave a tombstone now.
    Kill,
}

/// How a call to an app ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CallOutcome {
    /// It replied without an error: the message is its own now.
    Accepted,
    /// It replied with an error, at both paths connectors are known to use.
    Refused(String),
    /// The name had no owner, or the owner vanished before it replied.
    Vanished,
    /// The call could not be sent (bus gone, message refused by the bus).
    NotSent(String),
}

/// How a start ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StartOutcome {
    /// It owns its name, or will shortly.
    Started,
    /// Nothing on this system says how to start it: no D-Bus service file.
    NotActivatable,
    /// It was tried and failed or took too long; may work later.
    Failed(String),
}

/// How a lifecycle operation ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// `cgroup.events` says frozen, or every process is stopped.
    Frozen {
        /// From the write to the kernel's word.
        took: Duration,
    },
    /// Not frozen: rolled back, thawed.
    FreezeFailed(Arc<str>),
    /// Running again.
    Thawed {
        /// From the write to the kernel's word.
        took: Duration,
    },
    /// Could not be thawed; tried again by the core.
    ThawFailed(Arc<str>),
    /// Paged out.
    PagedOut {
        /// Memory before minus memory after, KiB of PSS.
        freed: u64,
        /// What that costs of zram's real memory, KiB.
        zram: u64,
        /// How that is known.
        source: ZramSource,
        /// How long it took.
        took: Duration,
    },
    /// Not paged out.
    PageOutFailed(Arc<str>),
    /// Not killed, with why; a kill that worked is announced by `Event::TargetGone`.
    KillFailed(Arc<str>),
}
