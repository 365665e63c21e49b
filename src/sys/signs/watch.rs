//! What is watched on one connection to a bus, beside whatever else that connection is for: one task, one stream of messages,
//! no timer but for a telling that is due.

use std::{
    future::{Future, poll_fn},
    num::NonZeroU32,
    pin::{Pin, pin},
    task::{Context, Poll},
};

use futures_core::Stream;
use zbus::{Connection, Message, MessageStream, message::Type};
use zruntime::SharedRuntime;

use super::teller::Teller;
use crate::{
    sys::{
        asking::{BUS_NAME, Calls, OWNERS_RULE, Response},
        clock,
    },
    time::{Instant, earliest},
};

/// Messages handled before what they caused is written and told.
const BATCH: usize = 64;
/// Larger messages are not looked at.
const LARGEST_BODY: usize = 256 * 1024;
/// Calls of ours that wait for an answer: several for each thing looked at. The bus answers for who is gone, so only one
/// that is no bus gets here.
const UNANSWERED: usize = 2048;

/// What is watched.
pub(super) trait Watch {
    /// What replies are for.
    type Asked;
    /// The connection is there.
    fn begin(&mut self, calls: &mut Calls<Self::Asked>);
    /// A reply came.
    fn reply(&mut self, calls: &mut Calls<Self::Asked>, serial: NonZeroU32, asked: Self::Asked, response: Response);
    /// A signal came.
    fn signal(&mut self, calls: &mut Calls<Self::Asked>, signal: &Signal<'_>);
    /// Something came, or changed elsewhere: what is seen now.
    fn look(&mut self, teller: &mut Teller, now: Instant);
    /// Waits for a change elsewhere.
    fn poll_elsewhere(&mut self, _: &mut Context<'_>) -> Poll<()> {
        Poll::Pending
    }
}

/// A signal that says where it comes from.
pub(super) struct Signal<'a> {
    pub(super) sender: &'a str,
    pub(super) path: &'a str,
    pub(super) interface: &'a str,
    pub(super) member: &'a str,
    pub(super) message: &'a Message,
}

impl Signal<'_> {
    /// The name, and who owns it from now on, if it is the bus that says so.
    pub(super) fn owner_changed(&self) -> Option<(String, Option<String>)> {
        if (self.sender, self.interface, self.member) != (BUS_NAME, BUS_NAME, "NameOwnerChanged") {
            return None;
        }
        let body = self.message.body();
        let (name, _, new) = body.deserialize::<(&str, &str, &str)>().ok()?;
        Some((name.to_owned(), (!new.is_empty()).then(|| new.to_owned())))
    }
}

enum Input {
    Message(Message),
    Elsewhere,
    Deadline,
    Broken,
}

/// Watches until the connection breaks.
pub(super) async fn watch<W: Watch>(connection: Connection, mut watch: W, mut teller: Teller) {
    let Ok(runtime) = SharedRuntime::current() else { return };
    let mut stream = MessageStream::from(&connection);
    let mut calls = Calls::default();
    watch.begin(&mut calls);
    let mut changed = true;
    loop {
        if connection.send_all(&calls.drain()).await.is_err() {
            return;
        }
        if calls.waiting() > UNANSWERED {
            return log::warn!("a bus does not answer; it is not watched any more");
        }
        let deadline = earliest(changed.then(|| teller.open_at()), teller.poll_timeout());
        let mut deadline = deadline.map(|at| runtime.sleep(at.since(clock::boot())));
        let mut input = poll_fn(|context| {
            if let Some(deadline) = &mut deadline
                && pin!(deadline).poll(context).is_ready()
            {
                return Poll::Ready(Input::Deadline);
            }
            if watch.poll_elsewhere(context).is_ready() {
                return Poll::Ready(Input::Elsewhere);
            }
            poll_message(&mut stream, context)
        })
        .await;
        for handled in 1.. {
            match input {
                Input::Message(message) => changed |= handle(&mut watch, &mut calls, &message),
                Input::Elsewhere => changed = true,
                Input::Deadline => {}
                Input::Broken => return,
            }
            if handled == BATCH {
                break;
            }
            let more = poll_fn(|context| Poll::Ready(poll_message(&mut stream, context))).await;
            let Poll::Ready(next) = more else { break };
            input = next;
        }
        let now = clock::boot();
        if changed && teller.open_at() <= now {
            changed = false;
            watch.look(&mut teller, now);
        }
        teller.poll(now);
    }
}

/// Whether it was of interest.
fn handle<W: Watch>(watch: &mut W, calls: &mut Calls<W::Asked>, message: &Message) -> bool {
    match message.message_type() {
        // Whoever the connection belongs to answers those.
        Type::MethodCall => false,
        Type::MethodReturn | Type::Error => {
            let Some((serial, asked, response)) = calls.take(message) else { return false };
            let response = response.and_then(|message| match message.body().len() {
                ..=LARGEST_BODY => Ok(message),
                length => Err(format!("{length} bytes")),
            });
            watch.reply(calls, serial, asked, response);
            true
        }
        Type::Signal => {
            let header = message.header();
            if let (Some(sender), Some(path), Some(interface), Some(member)) =
                (header.sender(), header.path(), header.interface(), header.member())
                && message.body().len() <= LARGEST_BODY
            {
                let (sender, path) = (sender.as_str(), path.as_str());
                let (interface, member) = (interface.as_str(), member.as_str());
                watch.signal(calls, &Signal { sender, path, interface, member, message });
            }
            true
        }
    }
}

fn poll_message(stream: &mut MessageStream, context: &mut Context<'_>) -> Poll<Input> {
    Pin::new(stream).poll_next(context).map(|message| match message {
        Some(Ok(message)) => Input::Message(message),
        Some(Err(_)) | None => Input::Broken,
    })
}

/// The rule for the owner of `name`; one that ends with `.*` stands for all names below it as well.
pub(super) fn owner_rule(name: &str) -> String {
    let (key, name) = name.strip_suffix(".*").map_or(("arg0", name), |space| ("arg0namespace", space));
    format!("{OWNERS_RULE},{key}='{name}'")
}

/// Whether [`owner_rule`] of `pattern` is for `name`.
pub(super) fn covers(pattern: &str, name: &str) -> bool {
    match pattern.strip_suffix(".*") {
        None => pattern == name,
        Some(space) => name.strip_prefix(space).is_some_and(|rest| rest.is_empty() || rest.starts_with('.')),
    }
}
