//! Everything the core can ask of the world. Plain data: the shell is one `match` over it and never blocks on it.

use std::{sync::Arc, time::Duration};

use crate::{
    config::UpstreamSettings,
    event::{
        CallId, DeliveryTicket, FetchTicket, HttpTicket, LinkId, NoticeTicket, Privilege, StoreTicket, TransferTicket,
    },
    model::{
        AppKey, AppRecord, Bus, ConnectorVersion, Ending, FailureReason, FormerRoute, HistoryRow, LeaseId, Message,
        MessageSeq, Owner, Preference, Registration, RegistrationId, TargetId,
    },
    notification::{HelperJob, NotifyOrder},
    time::UnixTime,
    transfer::{Transfer, TransferId, TransferOrder},
};

/// One thing to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Open a link to an upstream: a WebSocket, a plain or TLS stream, or an HTTP event stream, as its protocol is. The
    /// shell adds the configured base URL, credentials and TLS.
    Connect {
        /// Its name from now on.
        link: LinkId,
        /// Which upstream.
        upstream: Arc<str>,
        /// Appended to the base URL; may be empty.
        path: String,
        /// Header fields of the request, where there is one, beside those the shell adds itself.
        headers: Vec<(&'static str, String)>,
    },
    /// Send a text frame.
    Send(LinkId, String),
    /// Send a binary frame, or bytes on a stream.
    SendBytes(LinkId, Vec<u8>),
    /// Send a ping frame.
    Ping(LinkId),
    /// Close a link: with a close frame where it is open. No event follows.
    Close(LinkId),
    /// Download an attachment.
    Fetch {
        /// Comes back with the result.
        ticket: FetchTicket,
        /// Which upstream's credentials and TLS, if the URL is on its host.
        upstream: Arc<str>,
        /// Absolute URL.
        url: String,
        /// Most bytes to take.
        limit: u32,
    },
    /// Make an HTTP request to an upstream, with its credentials and TLS. Ends with `Event::Http` within 30 s.
    Http {
        /// Comes back with the result.
        ticket: HttpTicket,
        /// Which upstream.
        upstream: Arc<str>,
        /// What to ask.
        request: HttpRequest,
    },
    /// This upstream exists from now on, or has these settings: the user has set it up on a panel.
    Configure(Box<UpstreamSettings>),
    /// Hold off sleep (`true`: a message must reach its app first) or no more.
    StayAwake(bool),
    /// The answer to `Event::FallingAsleep`: the machine may sleep now.
    AllowSleep,
    /// Tell KDE's settings panel on this bus that what it shows has changed.
    PanelChanged(Bus),
    /// Write to the store.
    Store(StoreOp, Option<StoreTicket>),
    /// Answer a call on a bus.
    Reply(CallId, Reply),
    /// Tell of the owner of an app's name, now and at each change.
    Watch(AppKey),
    /// Stop telling.
    Unwatch(AppKey),
    /// Call an app's connector. Never starts the app (NO_AUTO_START). Ends with `BusEvent::CallDone`, however late.
    Call {
        /// Comes back with the outcome.
        ticket: DeliveryTicket,
        /// Which app.
        app: AppKey,
        /// Which instance; the call goes to this unique name.
        owner: Owner,
        /// Which interface.
        version: ConnectorVersion,
        /// Which method.
        call: ConnectorCall,
    },
    /// Call `org.nightporter1.Client` of an app that listens. Never starts the app.
    CallClient {
        /// Which app.
        app: AppKey,
        /// Which connection of it.
        owner: Owner,
        /// Which method.
        call: ClientCall,
    },
    /// Start an app that is not running: through systemd where there is one, else by D-Bus activation.
    Start(AppKey),
    /// The user wants to see the app: start it with a window if it does not run (ends with `BusEvent::Started`), else have
    /// this instance come to the front. The token is the one its compositor lets it do so with.
    Activate {
        /// Which app.
        app: AppKey,
        /// Which instance, which is not held still; none: it does not run.
        owner: Option<Owner>,
        /// XDG activation token.
        token: Option<Arc<str>>,
    },
    /// Notify the user in an app's stead, or no more. `BusEvent::Notified` says what comes of it.
    Notify(AppKey, NotifyOrder),
    /// Have an app's payload helper make something of a message. Ends with `Event::Helped`.
    Help(Box<HelperJob>),
    /// Watch for notifications to the user on this session bus, or no more. `Event::NotificationsSeen` says when they are seen.
    WatchNotifications(Bus, bool),
    /// Look whether something speaks against holding an app still, or on: locks, devices, file systems, its unit. Ends with
    /// `Event::Inspected` within 5 s.
    Inspect(TargetId),
    /// Hold an app still. Ends with an `Outcome` within 2 s; what cannot be frozen is rolled back.
    Freeze(TargetId),
    /// Let an app run. Ends with an `Outcome`.
    Thaw(TargetId),
    /// Move a frozen app's memory to swap. Ends with an `Outcome`.
    PageOut(TargetId),
    /// End an app: thaw, SIGTERM, and SIGKILL after `grace`.
    Kill {
        /// Which instance.
        target: TargetId,
        /// Between SIGTERM and SIGKILL.
        grace: Duration,
    },
    /// Nobody asks for this target any more; forget it (thawing it, if it is frozen).
    Forget(TargetId),
    /// Measure an app. Ends with `Event::Sampled`.
    Sample(TargetId),
    /// Measure this daemon. Ends with `Event::SampledSelf`.
    SampleSelf,
    /// Read how short memory is. Ends with `Event::Pressure`.
    ReadPressure,
    /// Everything is thawed and closed: end the process.
    Exit,
    /// Do something about a transfer.
    Transfer(TransferOrder),
    /// A lease on this bus is over: close our end of it, by which its holder sees that. No event follows.
    EndLease(Bus, LeaseId),
    /// Tell the holder of a lease that it is about to be taken (`org.nightporter1.App.LeaseEnding`).
    LeaseEnding {
        /// The bus it is on.
        bus: Bus,
        /// Its unique name.
        holder: Owner,
        /// Which lease.
        lease: LeaseId,
        /// How soon.
        within: Duration,
    },
}

/// An HTTP request to an upstream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpRequest {
    /// `GET`, `POST`, `PUT` or `DELETE`.
    pub method: &'static str,
    /// Appended to the base URL, query included.
    pub path: String,
    /// A JSON document to send.
    pub json: Option<String>,
    /// Most bytes to take of the answer.
    pub limit: u32,
}

/// A method of the app's connector (push.md §0).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConnectorCall {
    /// `NewEndpoint`.
    NewEndpoint {
        /// The app's name for the registration.
        token: Arc<str>,
        /// The capability URL.
        endpoint: Arc<str>,
    },
    /// `Message`.
    Message {
        /// The app's name for the registration.
        token: Arc<str>,
        /// Exactly as received.
        body: Arc<[u8]>,
        /// The upstream's id.
        id: Arc<str>,
    },
    /// `Unregistered`.
    Unregistered {
        /// The app's name for the registration; empty for v1's confirmation of the app's own request.
        token: Arc<str>,
    },
}

/// A method of `org.nightporter1.Client` (docs/lifecycle.md).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClientCall {
    /// `WillSuspend`. Ends with `BusEvent::Prepared`, however late.
    WillSuspend {
        /// Comes back when it is over.
        ticket: NoticeTicket,
        /// How long is waited.
        within: Duration,
    },
    /// `Resumed`; no reply is asked for.
    Resumed {
        /// How long it was frozen; zero if it was not after all.
        frozen: Duration,
    },
    /// `TransferDone`. Ends with `BusEvent::TransferTold`, however late.
    TransferDone {
        /// Comes back with the outcome.
        ticket: TransferTicket,
        /// Which transfer.
        id: TransferId,
        /// `done`, `failed` or `cancelled`.
        status: &'static str,
        /// Why, or what the server said.
        text: Arc<str>,
    },
}

/// A write to the store. Operations are applied in order, several in one transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreOp {
    /// Insert or replace a registration.
    PutRegistration(Registration),
    /// Remove a registration with all its messages and former routes.
    DeleteRegistration(RegistrationId),
    /// Keep a message until it ends.
    PutMessage(Message),
    /// A message's life ended: drop the body, keep its id for duplicates. May be delayed up to 2 s to join another write.
    EndMessage(MessageSeq, Ending),
    /// Read a body; answered with `Event::Body`.
    LoadBody(MessageSeq),
    /// Remember something for an upstream. May be delayed up to 2 s to join another write.
    PutUpstream {
        /// Which upstream.
        upstream: Arc<str>,
        /// Its key (`uaid`, `cursor`).
        key: Arc<str>,
        /// The value; empty forgets it.
        value: Arc<str>,
    },
    /// Insert or replace a former route (by registration and upstream).
    PutFormer(FormerRoute),
    /// Remove a former route.
    DeleteFormer(RegistrationId, Arc<str>),
    /// Insert or replace a preference (by bus and app).
    PutPreference(Preference),
    /// Remove a preference.
    DeletePreference(Bus, Option<Arc<str>>),
    /// Insert or replace an app's lifecycle record. May be delayed up to 2 s to join another write.
    PutApp(AppRecord),
    /// Remove an app's lifecycle record and its saved state.
    DeleteApp(AppKey),
    /// Insert or replace an app's saved state; empty removes it.
    PutState(AppKey, Arc<[u8]>),
    /// Add rows to the ledger's history. May be delayed to join another write: up to 1 h, or until the store closes.
    PutHistory(Arc<[HistoryRow]>),
    /// Read the history since then; its ticket is answered with `Event::History`.
    LoadHistory(UnixTime),
    /// Insert or replace a transfer.
    PutTransfer(Box<Transfer>),
    /// How far one has come, or that it was told: may be delayed up to 2 s to join another write.
    NoteTransfer(Box<Transfer>),
    /// Remove a transfer.
    DeleteTransfer(TransferId),
    /// Read an app's saved state; its ticket is answered with `Event::State`.
    LoadState(AppKey),
}

/// The key of [`StoreOp::PutUpstream`] on which the ids of messages rest: MQTT's era.
pub const NAMING: &str = "era";

impl StoreOp {
    /// Whether the operation may wait for company: nothing is lost but work if the power goes before it is written. Not
    /// what messages are known again by: they wait for it ([`NAMING`]).
    pub fn is_lazy(&self) -> bool {
        match self {
            Self::PutUpstream { key, .. } => **key != *NAMING,
            _ => matches!(self, Self::EndMessage(..) | Self::PutApp(_) | Self::PutHistory(_) | Self::NoteTransfer(_)),
        }
    }
}

/// The answer to a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// Register: succeeded.
    Registered,
    /// Register: failed. The text is for the log of the app's developer.
    RegisterFailed(FailureReason, String),
    /// Done; nothing to say.
    Done,
    /// A JSON document.
    Json(String),
    /// A transfer is taken over under this number.
    Transfer(TransferId),
    /// What KDE's settings panel shows.
    Panel(Box<PanelState>),
    /// An app's saved state; empty if there is none.
    State(Arc<[u8]>),
    /// A D-Bus error.
    Error(ErrorKind, String),
    /// Not yet: the caller's own rights do not suffice. polkit is asked, and the call comes again under another id with
    /// what it says (`Caller::authorization`).
    Authorize {
        /// What for.
        privilege: Privilege,
        /// Whether somebody may be asked for a password, if the caller allows that.
        interactive: bool,
    },
    /// A lease is given: the bus thread makes its two ends. `BusEvent::LeaseClosed` follows when the holder's is closed,
    /// also when the reply does not reach it.
    Lease(LeaseId),
}

/// The errors our interfaces reply with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// `org.freedesktop.DBus.Error.InvalidArgs`.
    InvalidArgs,
    /// `org.freedesktop.DBus.Error.LimitsExceeded`.
    LimitsExceeded,
    /// `org.nightporter1.Error.NotAuthorized`.
    NotAuthorized,
    /// `org.nightporter1.Error.NoSuchApp`.
    NoSuchApp,
    /// `org.nightporter1.Error.NotRunning`.
    NotRunning,
    /// `org.nightporter1.Error.Refused`: it must not be done, the text says why.
    Refused,
    /// `org.nightporter1.Error.Failed`: it was tried and did not work.
    Failed,
}

/// What KDE's settings panel shows (push.md §1.8), for the user who asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PanelState {
    /// `status`: 0 unknown, 1 idle, 2 connected, 3 no network, 4 authentication error, 5 no setup.
    pub status: i32,
    /// `errorMessage`; empty if there is none.
    pub error: String,
    /// The upstream new registrations of the user go to.
    pub upstream: UpstreamSettings,
    /// `registeredClients`: token, service, description.
    pub clients: Vec<(Arc<str>, Arc<str>, Arc<str>)>,
}
