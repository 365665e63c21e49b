//! The D-Bus side: one thread for every bus, UnifiedPush towards apps, `org.nightporter1` towards everybody.
//!
//! - `session`: one connection: names, orders, and everything the bus says, in order.
//! - `interfaces`, `request`, `calls`: what we serve; arguments checked, callers identified, replies worded.
//! - `panel`: KDE's settings panel.
//! - `process`, `sandbox`, `unit`: from a bus name to a process, and what the kernel vouches for.
//! - `watch`, `deliver`, `start`, `activation`: the apps: who is there, calling them, starting them.
//! - `wire`: what waits to be written and what waits for a reply.

mod activation;
mod calls;
mod deliver;
mod interfaces;
mod panel;
mod process;
mod request;
mod sandbox;
mod session;
mod start;
mod unit;
mod watch;
mod wire;

use std::{
    collections::BTreeMap,
    future::{Future, ready},
    io,
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::Duration,
};

use async_channel::Receiver;
use zruntime::{Shared, Task};

use super::inbox::{Incoming, Sender};
use crate::{
    action::Action,
    event::{CallId, Event},
    model::{AppKey, Bus},
};

/// Where a bus is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BusAddress {
    /// Which bus it is.
    pub bus: Bus,
    /// A D-Bus server address; `None` for where this kind of bus usually is (`DBUS_SESSION_BUS_ADDRESS`,
    /// `DBUS_SYSTEM_BUS_ADDRESS`, their defaults).
    pub address: Option<String>,
}

/// The thread that serves the buses.
#[derive(Debug)]
pub struct BusThread {
    // Unbounded, for the loop must never wait: what is in it the core asked for, and the core has bounded both its apps
    // (one watch and one start each) and its deliveries (one per registration); replies are bounded by the calls.
    orders: async_channel::Sender<Action>,
    ended: mpsc::Receiver<()>,
}

/// How long [`BusThread::stop`] waits at most.
const STOP_LIMIT: Duration = Duration::from_secs(2);
/// Where in a [`CallId`] the bus's index is; below it 2^48 calls fit.
const INDEX_SHIFT: u32 = 48;

impl BusThread {
    /// Starts serving `buses`; what happens on them goes to `sender`, beginning with `Up` or `Down` of each. `panel` says
    /// whether the session buses among them get what KDE's settings panel needs (push.md §1.8).
    ///
    /// # Errors
    /// When no thread can be made.
    pub fn spawn(buses: Vec<BusAddress>, panel: bool, sender: Sender) -> io::Result<Self> {
        Self::spawn_with(buses, panel, sender, ready(()))
    }

    /// [`BusThread::spawn`] with one task more on the same thread: a thread costs memory. It is cancelled when the thread
    /// ends.
    ///
    /// # Errors
    /// When no thread can be made.
    pub fn spawn_with(
        buses: Vec<BusAddress>,
        panel: bool,
        sender: Sender,
        beside: impl Future<Output = ()> + Send + 'static,
    ) -> io::Result<Self> {
        let (orders, receiver) = async_channel::unbounded();
        let (end, ended) = mpsc::channel::<()>();
        thread::Builder::new().name("bus".into()).spawn(move || {
            // Dropped with the thread's last word; `stop` waits for that.
            let _end = end;
            zbus::block_on(async {
                let beside = zruntime::spawn(beside);
                route(buses, panel, receiver, sender).await;
                let _ = beside.cancel().await;
            });
        })?;
        Ok(Self { orders, ended })
    }

    /// Does `action`, which must be one of `Reply`, `Watch`, `Unwatch`, `Call`, `Start`, `PanelChanged`. Never blocks.
    pub fn perform(&self, action: Action) {
        if self.orders.try_send(action).is_err() {
            log::error!("the bus thread is gone");
        }
    }

    /// Does what was asked so far, closes the connections and ends the thread. Waits at most 2 s.
    pub fn stop(self) {
        self.orders.close();
        if self.ended.recv_timeout(STOP_LIMIT) == Err(RecvTimeoutError::Timeout) {
            log::warn!("the bus thread did not end in time");
        }
    }
}

/// Hands every order to its bus.
async fn route(buses: Vec<BusAddress>, panel: bool, orders: Receiver<Action>, inbox: Sender) {
    let mut routes: Vec<(async_channel::Sender<Action>, Task<(), Shared>)> = Vec::new();
    let mut indices = BTreeMap::new();
    for (index, address) in (0_u16..).zip(buses) {
        // Unbounded like the one it is filled from.
        let (sender, receiver) = async_channel::unbounded();
        indices.insert(address.bus, usize::from(index));
        let first_call = u64::from(index) << INDEX_SHIFT;
        routes.push((sender, zruntime::spawn(session::serve(address, panel, receiver, inbox.clone(), first_call))));
    }
    while let Ok(order) = orders.recv().await {
        let index = match &order {
            Action::Reply(CallId(call), _) => usize::try_from(call >> INDEX_SHIFT).ok(),
            Action::Watch(AppKey { bus, .. })
            | Action::Unwatch(AppKey { bus, .. })
            | Action::Call { app: AppKey { bus, .. }, .. }
            | Action::Start(AppKey { bus, .. })
            | Action::PanelChanged(bus) => indices.get(bus).copied(),
            other => {
                log::error!("the bus thread was given {other:?}");
                continue;
            }
        };
        match index.and_then(|index| routes.get(index)) {
            Some((route, _)) => {
                // It is closed only below.
                let _ = route.try_send(order);
            }
            // An app of a bus that is not served now.
            None => session::refuse(order, |event| {
                let _ = inbox.send(Incoming::Event(Event::Bus(event)));
            }),
        }
    }
    for (route, task) in routes {
        route.close();
        let _ = task.await;
    }
}
