//! The D-Bus side: one thread for every bus, UnifiedPush towards apps, `org.nightporter1` towards everybody.
//!
//! - `session`: one connection: names, orders, and everything the bus says, in order.
//! - `interfaces`, `request`, `calls`: what we serve; arguments checked, callers identified, replies worded.
//! - `checks`, `polkit`: what a caller may not do by its own right, and an administrator may allow.
//! - `panel`: KDE's settings panel.
//! - `process`, `sandbox`, `unit`: from a bus name to a process, and what the kernel vouches for.
//! - `watch`, `deliver`, `clients`, `start`, `activation`: the apps: who is there, calling them, starting them.
//! - `leases`: the ends of the leases apps hold.
//! - `transfers`: what apps have downloaded and uploaded for them, and the files that go to them.
//! - `manager`: the bus's systemd: the units of the apps, what is done to them, stopping them.
//! - `notified`: who notifies the user, while that is wanted.
//! - `notifications`, `desktop`: notifying the user in an app's stead, and by what name users know an app.
//! - `wire`: what waits to be written and what waits for a reply.

pub(super) mod activation;
mod calls;
mod checks;
mod clients;
mod deliver;
mod desktop;
mod interfaces;
mod leases;
mod manager;
mod notifications;
mod notified;
mod panel;
mod polkit;
mod process;
mod request;
mod sandbox;
mod session;
mod start;
mod transfers;
mod unit;
mod watch;
mod wire;

use std::{
    collections::BTreeMap,
    future::{Future, poll_fn, ready},
    io,
    path::PathBuf,
    pin::pin,
    sync::mpsc::{self, RecvTimeoutError},
    task::Poll,
    thread,
    time::Duration,
};

use async_channel::Receiver;
use futures_core::Stream;
use zruntime::{Shared, Task};

pub use self::transfers::Handed;
use self::{manager::UnitOrder, polkit::Authority, session::Way};
use super::{
    inbox::{Incoming, Sender},
    signs::Signs,
    users::{Roster, USERS, User, errand::Errands},
};
use crate::{
    action::Action,
    event::{BusEvent, CallId, Event},
    model::{AppKey, Bus, TargetId},
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
    orders: async_channel::Sender<Order>,
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
        Self::spawn_with(buses, None, panel, sender, ready(()))
    }

    /// [`BusThread::spawn`] that also serves the session bus of every user in `roster` while that user is in it (they get
    /// `Up` and `Down` as well), with one task more on the same thread: a thread costs memory. It is cancelled when the
    /// thread ends.
    ///
    /// # Errors
    /// When no thread can be made.
    pub fn spawn_with(
        buses: Vec<BusAddress>,
        roster: Option<Roster>,
        panel: bool,
        sender: Sender,
        beside: impl Future<Output = ()> + Send + 'static,
    ) -> io::Result<Self> {
        Self::spawn_watching(buses, roster, panel, None, sender, beside)
    }

    /// [`BusThread::spawn_with`] that also has `signs` watch every session bus served, and what else its user has.
    ///
    /// # Errors
    /// When no thread can be made.
    pub fn spawn_watching(
        buses: Vec<BusAddress>,
        roster: Option<Roster>,
        panel: bool,
        signs: Option<Signs>,
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
                route(buses, roster, panel, signs, receiver, sender).await;
                let _ = beside.cancel().await;
            });
        })?;
        Ok(Self { orders, ended })
    }

    /// Does `action`, which must be one of `Reply`, `Watch`, `Unwatch`, `Call`, `CallClient`, `Start`, `PanelChanged`,
    /// `EndLease`, `LeaseEnding`, `WatchNotifications`, `Activate`, `Notify`. Never blocks.
    pub fn perform(&self, action: Action) {
        self.send(Order::Act(action));
    }

    /// Has systemd stop the unit with this cgroup, which holds the app and nothing else. `Incoming::UnitStopped` says
    /// whether it will. Never blocks.
    pub fn stop_unit(&self, app: AppKey, target: TargetId, group: String) {
        self.send(Order::Unit(UnitOrder::Stop { app, target, group }));
    }

    /// Looks which unit the app with this process is in now; what speaks against holding it still comes as
    /// `Incoming::Sightings`. It is done by itself when the process is found. Never blocks.
    pub fn look_at_unit(&self, app: AppKey, pid: u32) {
        self.send(Order::Unit(UnitOrder::Look { app, pid }));
    }

    /// Answers a call with a file. Never blocks.
    pub fn hand(&self, handed: Handed) {
        self.send(Order::File(handed));
    }

    fn send(&self, order: Order) {
        if self.orders.try_send(order).is_err() {
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

/// What is asked of one bus.
enum Order {
    Act(Action),
    Unit(UnitOrder),
    File(Handed),
}

enum Input {
    Order(Order),
    Users(Vec<User>),
    Stop,
}

/// Hands every order to its bus, until there are no more.
async fn route(
    buses: Vec<BusAddress>,
    mut roster: Option<Roster>,
    panel: bool,
    signs: Option<Signs>,
    orders: Receiver<Order>,
    inbox: Sender,
) {
    // polkit is where the system bus is, whatever is served here.
    let system = buses.iter().find(|at| at.bus == Bus::System).and_then(|at| at.address.clone());
    let authority = Authority::at(system);
    let mut routes = Routes {
        common: Common { panel, authority, signs, inbox },
        errands: Errands::default(),
        open: BTreeMap::new(),
        users: Vec::new(),
        next: 0,
    };
    for BusAddress { bus, address } in buses {
        routes.add(bus, Way::Address(address));
    }
    let mut orders = pin!(orders);
    loop {
        let input = poll_fn(|context| {
            if let Some(heard) = &mut roster
                && let Poll::Ready(users) = heard.poll_changed(context)
            {
                match users {
                    Some(users) => return Poll::Ready(Input::Users(users)),
                    None => roster = None,
                }
            }
            orders.as_mut().poll_next(context).map(|order| order.map_or(Input::Stop, Input::Order))
        });
        match input.await {
            Input::Order(order) => routes.order(order),
            Input::Users(users) => routes.present(users).await,
            Input::Stop => break,
        }
    }
    // All at once: none waits for another's last words.
    let (ends, tasks): (Vec<_>, Vec<_>) = routes.open.into_values().map(|route| (route.orders, route.task)).unzip();
    drop(ends);
    for task in tasks {
        let _ = task.await;
    }
}

/// Whose bus it is, and where that user's other sockets are.
fn user(bus: Bus, way: &Way) -> Option<User> {
    match (way, bus) {
        (Way::User(user, _), _) => Some(user.clone()),
        (Way::Address(_), Bus::System) => None,
        // This daemon's own user's.
        (Way::Address(_), Bus::Session(uid)) => {
            let runtime_dir = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
            let runtime_dir = runtime_dir.unwrap_or_else(|| format!("/run/user/{uid}").into());
            Some(User { uid, gid: rustix::process::getegid().as_raw(), runtime_dir })
        }
    }
}

/// What all buses have in common.
#[derive(Clone)]
struct Common {
    /// Whether KDE's settings panel is served.
    panel: bool,
    authority: Authority,
    signs: Option<Signs>,
    inbox: Sender,
}

/// The buses served now.
struct Routes {
    common: Common,
    errands: Errands,
    /// By the index in their calls, which is used again only when all others have been: an answer to who is gone must
    /// not reach who came instead.
    open: BTreeMap<u16, Route>,
    users: Vec<User>,
    next: u16,
}

struct Route {
    bus: Bus,
    way: Way,
    /// Watches who notifies the user, while that is wanted.
    notified: Option<Task<(), Shared>>,
    // Unbounded like the one it is filled from.
    orders: async_channel::Sender<Order>,
    task: Task<(), Shared>,
    /// Watches what the user has beside the bus; ends with the route.
    _beside: Option<Task<(), Shared>>,
}

impl Routes {
    fn add(&mut self, bus: Bus, way: Way) {
        // There are far fewer buses than numbers.
        while self.open.contains_key(&self.next) {
            self.next = self.next.wrapping_add(1);
        }
        let index = self.next;
        self.next = index.wrapping_add(1);
        let (orders, receiver) = async_channel::unbounded();
        let first_call = u64::from(index) << INDEX_SHIFT;
        let _beside = self
            .common
            .signs
            .as_ref()
            .zip(user(bus, &way))
            .map(|(signs, user)| signs.of_user(user, self.errands.clone()));
        let task = session::serve(bus, way.clone(), self.common.clone(), receiver, first_call);
        self.open.insert(index, Route { bus, way, notified: None, orders, task: zruntime::spawn(task), _beside });
    }

    /// Serves these users' buses and no others'.
    async fn present(&mut self, mut users: Vec<User>) {
        if users.len() > USERS {
            log::warn!("{} users are logged in; {USERS} of them are served", users.len());
            users.truncate(USERS);
        }
        let gone: Vec<User> = self.users.extract_if(.., |user| !users.contains(user)).collect();
        for User { uid, .. } in gone {
            let bus = Bus::Session(uid);
            for (_, route) in self.open.extract_if(.., |_, route| route.bus == bus) {
                // Nothing is heard of it any more after this.
                route.task.cancel().await;
            }
            log::info!("{bus}: logged out");
            self.hand_over(manager::nothing(bus));
            self.tell(BusEvent::Down(bus, "its user is not logged in".into()));
        }
        for user in users {
            let bus = Bus::Session(user.uid);
            if !self.open.values().any(|route| route.bus == bus) {
                log::info!("{bus}: logged in");
                self.users.push(user.clone());
                self.add(bus, Way::User(user, self.errands.clone()));
            }
        }
    }

    fn order(&mut self, order: Order) {
        if let Order::Act(Action::WatchNotifications(bus, on)) = order {
            return self.watch_notifications(bus, on);
        }
        let of = |bus: Bus| self.open.values().find(|route| route.bus == bus);
        let route = match &order {
            Order::Act(Action::Reply(CallId(call), _)) | Order::File(Handed { call: CallId(call), .. }) => {
                u16::try_from(call >> INDEX_SHIFT).ok().and_then(|index| self.open.get(&index))
            }
            Order::Act(
                Action::Watch(AppKey { bus, .. })
                | Action::Unwatch(AppKey { bus, .. })
                | Action::Call { app: AppKey { bus, .. }, .. }
                | Action::CallClient { app: AppKey { bus, .. }, .. }
                | Action::Start(AppKey { bus, .. })
                | Action::Activate { app: AppKey { bus, .. }, .. }
                | Action::Notify(AppKey { bus, .. }, _)
                | Action::PanelChanged(bus)
                | Action::EndLease(bus, _)
                | Action::LeaseEnding { bus, .. },
            ) => of(*bus),
            Order::Act(other) => return log::error!("the bus thread was given {other:?}"),
            Order::Unit(order) => of(order.bus()),
        };
        match route {
            Some(route) => {
                // It is closed only when it is taken out.
                let _ = route.orders.try_send(order);
            }
            // An app of a bus that is not served now.
            None => session::refuse(order, |incoming| self.hand_over(incoming)),
        }
    }

    fn watch_notifications(&mut self, bus: Bus, on: bool) {
        let Some(route) = self.open.values_mut().find(|route| route.bus == bus) else {
            if on {
                self.hand_over(Incoming::Event(Event::NotificationsSeen(bus, false)));
            }
            return;
        };
        let watch = || zruntime::spawn(notified::watch(bus, route.way.clone(), self.common.inbox.clone()));
        route.notified = on.then(watch);
    }

    fn tell(&self, event: BusEvent) {
        self.hand_over(Incoming::Event(Event::Bus(event)));
    }

    fn hand_over(&self, incoming: Incoming) {
        // False means that the loop is gone, and this thread about to end.
        let _ = self.common.inbox.send(incoming);
    }
}
