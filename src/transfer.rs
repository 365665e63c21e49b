//! Transfers on an app's behalf: the nouns both halves share (docs/lifecycle.md, "Transfers").

use std::{sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};

use crate::{event::CallId, model::AppKey, time::UnixTime};

/// Names a transfer; never used twice, also not by a later life of the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TransferId(pub u64);

/// Which way it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// From a server to the app.
    Download,
    /// From the app to a server.
    Upload,
}

/// What may go over a network where each byte is paid for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Metered {
    /// Nothing.
    Never,
    /// What is known to be small ([`SMALL`]).
    Small,
    /// Everything.
    Allow,
}

/// Bytes of a transfer that counts as small.
pub const SMALL: u64 = 1024 * 1024;

/// Bytes kept of a server's answer to an upload.
pub const ANSWER_MAX: u64 = 64 * 1024;

/// A header field: name and value.
pub type Field = (Arc<str>, Arc<str>);

/// What an app wants to have done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wish {
    /// Which way.
    pub direction: Direction,
    /// Absolute, `http` or `https`, at most 4096 bytes.
    pub url: Arc<str>,
    /// `GET`, `PUT` or `POST`.
    pub method: Arc<str>,
    /// Header fields of the request beside those the daemon makes itself. They may be secrets.
    pub headers: Vec<Field>,
    /// Bytes of an upload.
    pub size: Option<u64>,
    /// For people: at most 100 bytes, possibly empty.
    pub title: Arc<str>,
    /// What the app wants of metered networks.
    pub metered: Option<Metered>,
    /// What a download's SHA-256 must be, in lower-case hexadecimal.
    pub sha256: Option<Arc<str>>,
    /// Bytes of a download at most, where that is less than the daemon's own bound.
    pub most: Option<u64>,
}

/// A transfer as it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transfer {
    /// Its number.
    pub id: TransferId,
    /// Whose.
    pub app: AppKey,
    /// What for.
    pub wish: Wish,
    /// How far it has come.
    pub progress: Progress,
    /// How it ended, once it has.
    pub end: Option<End>,
}

/// How far a transfer has come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// When it was handed over.
    pub begun: UnixTime,
    /// Whether all of an upload's content is in the spool.
    pub content: bool,
    /// Bytes that are durable in the spool.
    pub good: u64,
    /// Bytes in all, where the server says so.
    pub total: Option<u64>,
    /// What tells this version of the file from others: a strong ETag or a date, as `If-Range` has it.
    pub validator: Option<Arc<str>>,
    /// Not tried again before that: the server's word.
    pub not_before: Option<UnixTime>,
}

/// How a transfer ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// How.
    pub how: How,
    /// For the app's developer and for people; what the server said, or what went wrong.
    pub text: Arc<str>,
    /// When.
    pub at: UnixTime,
    /// Whether the app has heard of it.
    pub told: bool,
    /// Whether the app has fetched the file.
    pub collected: bool,
}

/// The kinds of ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum How {
    /// Everything is there.
    Done,
    /// It will not be.
    Failed,
    /// The user does not want it.
    Cancelled,
}

impl How {
    /// The word on the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

/// What apps ask of `org.nightporter1.Transfers`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TransferRequest {
    /// `Download` or `Upload`: answered with `Reply::Transfer`, or `TransferOrder::Take`.
    Begin(Box<Wish>),
    /// `Collect`: answered with `TransferOrder::Collect`.
    Collect(TransferId),
    /// `Cancel`, the app's own or, from who may act on apps, anybody's.
    Cancel(TransferId),
    /// `List`: the caller's own.
    List,
}

/// What is to be done about a transfer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TransferOrder {
    /// Make an attempt. Ends with one `TransferEvent::Ended`.
    Start(Box<Attempt>),
    /// End the attempt soon, keeping what is there. Its `TransferEvent::Ended` still comes.
    Stop(TransferId),
    /// Answer the call with the end of a pipe that takes the content of an upload. Ends with `TransferEvent::Spooled`.
    Take {
        /// To reply to.
        call: CallId,
        /// Which upload.
        id: TransferId,
        /// How much is to come.
        size: u64,
    },
    /// Answer the call with the file, open for reading. Ends with `TransferEvent::Collected`.
    Collect {
        /// To reply to.
        call: CallId,
        /// Which transfer.
        id: TransferId,
        /// Which way it went: of an upload it is what the server answered.
        direction: Direction,
    },
    /// Forget it, and delete what is in the spool. An attempt that runs is stopped; nothing more is heard of it.
    Remove(TransferId),
}

/// One attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attempt {
    /// Which transfer.
    pub id: TransferId,
    /// What for.
    pub wish: Wish,
    /// How far it has come.
    pub progress: Progress,
    /// Bytes of the download at most: beyond it the attempt fails.
    pub most: u64,
    /// Bytes that may be left at most: with more to come it ends with [`Attempted::Metered`].
    pub metered: Option<u64>,
    /// Whether it may lead to this machine itself.
    pub loopback: bool,
}

/// What happens to a transfer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TransferEvent {
    /// The content of an upload is durable in the spool, or why it will not be.
    Spooled(Result<(), Arc<str>>),
    /// The server sends the file.
    Begun {
        /// Bytes in all, where it says so.
        total: Option<u64>,
        /// See [`Progress::validator`].
        validator: Option<Arc<str>>,
    },
    /// From time to time.
    Progress {
        /// Bytes that are there, or sent.
        bytes: u64,
        /// Of them durable.
        good: u64,
    },
    /// The attempt ended.
    Ended(Attempted),
    /// The app has the file now, or could not be given it.
    Collected(bool),
}

/// How an attempt ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Attempted {
    /// Everything is there and durable; what the server said.
    Done {
        /// Size of the download, or of the server's answer.
        bytes: u64,
        /// A status line.
        text: Arc<str>,
    },
    /// It makes no sense to try again: why.
    Failed(Arc<str>),
    /// It may work later.
    Later {
        /// Bytes in the spool; of an upload zero.
        bytes: u64,
        /// The server's word on when.
        after: Option<Duration>,
        /// Why not now.
        text: Arc<str>,
    },
    /// It was asked to stop.
    Stopped {
        /// Bytes in the spool.
        bytes: u64,
    },
    /// More is to come than may come over a metered network.
    Metered,
    /// The disk has no room for it.
    NoRoom {
        /// Bytes in the spool.
        bytes: u64,
    },
}
