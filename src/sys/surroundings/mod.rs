//! What the machine is in, as the services of the system bus say: power (UPower), the network (NetworkManager,
//! ModemManager), sleep and who is logged in (logind). Absent services are normal, and so is an absent system bus: then nothing is known.
//!
//! - `session`: one connection: who is there, what is read from them and when that is told.
//! - `facts`: properties as they come in; `upower`, `network_manager`: what to read, and what it means.
//! - `logind`: locks against sleep. `users`: who is logged in. `settling`: when a change is told. `calls`: what waits for a reply.
//!
//! It runs on the bus thread ([`super::bus::BusThread::spawn_with`]) and sleeps while nothing changes: no timer, and match
//! rules for the very objects that matter.

mod calls;
mod facts;
mod logind;
mod network_manager;
mod session;
mod settling;
mod upower;
mod users;

use std::{
    fmt,
    future::{Future, poll_fn},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::Poll,
    time::Duration,
};

use async_channel::Receiver;
use futures_core::Stream;
use zbus::{Connection, connection::Builder};
use zruntime::SharedRuntime;

use self::{session::Session, settling::Settling, users::Users};
use super::{inbox::Sender, signs::Signs, users::Usher};
use crate::{model, sys::clock, time::Instant};

/// A bus that does not finish the handshake within this is as good as absent.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// After a connection that broke, it is tried again after each of these; then, and where there never was one, only when
/// [`Surroundings::look_again`] says so. Where users are served the last goes on and on: without logind nobody is.
const RETRIES: [Duration; 3] = [Duration::from_secs(2), Duration::from_secs(15), Duration::from_secs(60)];

/// The loop's hold on the services of the system bus. Dropped, everything ends: locks are let go.
pub struct Surroundings {
    wishes: Arc<Mutex<Wishes>>,
    ring: async_channel::Sender<()>,
}

impl fmt::Debug for Surroundings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Surroundings").finish_non_exhaustive()
    }
}

/// What the loop wants; the latest counts, so nothing need be queued.
#[derive(Clone, Copy, Debug, Default)]
struct Wishes {
    stay_awake: bool,
    /// Set when `stay_awake` was said since it was last looked at.
    renewed: Option<bool>,
    allow_sleep: bool,
    look_again: bool,
}

impl Surroundings {
    /// The loop's end, and the task for the bus thread, which runs until this end is dropped.
    ///
    /// `address` is a D-Bus server address; `None` for where the system bus is (`DBUS_SYSTEM_BUS_ADDRESS`, its default).
    /// `low_battery`: the charge in percent up to which the battery is low; crossing it is always told. `inbox` gets
    /// `Surroundings`, `FallingAsleep` and `Resumed`.
    pub fn new(
        address: Option<String>,
        low_battery: u8,
        inbox: Sender,
    ) -> (Self, impl Future<Output = ()> + Send + 'static) {
        Self::with_users(address, low_battery, None, inbox)
    }

    /// [`Surroundings::new`] that says to `usher` who is logged in as well.
    pub fn with_users(
        address: Option<String>,
        low_battery: u8,
        usher: Option<Usher>,
        inbox: Sender,
    ) -> (Self, impl Future<Output = ()> + Send + 'static) {
        Self::watching(address, low_battery, usher, None, inbox)
    }

    /// [`Surroundings::with_users`] that has `signs` watch the system bus as well.
    pub fn watching(
        address: Option<String>,
        low_battery: u8,
        usher: Option<Usher>,
        signs: Option<Signs>,
        inbox: Sender,
    ) -> (Self, impl Future<Output = ()> + Send + 'static) {
        let wishes = Arc::new(Mutex::new(Wishes::default()));
        let (ring, rung) = async_channel::bounded(1);
        let bell = Bell { wishes: Arc::clone(&wishes), rung: Box::pin(rung) };
        (
            Self { wishes, ring },
            serve(
                address,
                Lasting { inbox, bell, settling: Settling::new(low_battery), users: usher.map(Users::new), signs },
            ),
        )
    }

    /// Holds sleep off, or no more: `Action::StayAwake`. After five minutes without a word it is not held off any more.
    pub fn stay_awake(&self, stay_awake: bool) {
        self.wish(|wishes| (wishes.stay_awake, wishes.renewed) = (stay_awake, Some(stay_awake)));
    }

    /// The machine may sleep: `Action::AllowSleep`, the answer to `Event::FallingAsleep`.
    pub fn allow_sleep(&self) {
        self.wish(|wishes| wishes.allow_sleep = true);
    }

    /// Something happened after which what was not to be had may be there: the network returned, the machine woke up.
    pub fn look_again(&self) {
        self.wish(|wishes| wishes.look_again = true);
    }

    fn wish(&self, wish: impl FnOnce(&mut Wishes)) {
        wish(&mut lock(&self.wishes));
        // Full means that it rings already.
        let _ = self.ring.try_send(());
    }
}

fn lock(wishes: &Mutex<Wishes>) -> MutexGuard<'_, Wishes> {
    wishes.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The task's end of [`Surroundings`].
struct Bell {
    wishes: Arc<Mutex<Wishes>>,
    // Pinned once and for all, to be polled as it is.
    rung: Pin<Box<Receiver<()>>>,
}

/// Why the task was woken.
#[derive(Debug, PartialEq, Eq)]
enum Turn {
    /// The loop wants something.
    Rang,
    /// The deadline passed.
    Deadline,
    /// The loop's end was dropped.
    Stop,
}

impl Bell {
    /// What the loop wants; what it said once is taken.
    fn wishes(&self) -> Wishes {
        let mut wishes = lock(&self.wishes);
        let taken = *wishes;
        *wishes = Wishes { stay_awake: taken.stay_awake, ..Wishes::default() };
        taken
    }

    /// Waits for the loop, until `deadline` at most.
    async fn turn(&mut self, deadline: Option<Instant>) -> Turn {
        let mut timer = match (deadline, SharedRuntime::current()) {
            (Some(at), Ok(runtime)) => Some(runtime.sleep(at.since(clock::boot()))),
            _ => None,
        };
        poll_fn(|context| {
            if let Poll::Ready(rang) = self.rung.as_mut().poll_next(context) {
                return Poll::Ready(if rang.is_some() { Turn::Rang } else { Turn::Stop });
            }
            match &mut timer {
                Some(timer) => Pin::new(timer).poll(context).map(|()| Turn::Deadline),
                None => Poll::Pending,
            }
        })
        .await
    }
}

/// What outlasts a connection.
struct Lasting {
    inbox: Sender,
    bell: Bell,
    settling: Settling,
    users: Option<Users>,
    signs: Option<Signs>,
}

async fn serve(address: Option<String>, mut lasting: Lasting) {
    let runtime = match SharedRuntime::current() {
        Ok(runtime) => runtime,
        Err(error) => return log::error!("no runtime for the system bus: {error}"),
    };
    let mut said = false;
    let mut retries = [].iter();
    loop {
        let text = match runtime.timeout(CONNECT_LIMIT, connect(address.as_deref())).await {
            Ok(Ok(connection)) => {
                said = false;
                retries = RETRIES.iter();
                // Ends with the connection.
                let _signs = lasting.signs.as_ref().map(|signs| signs.on_system_bus(connection.clone()));
                match Session::new(&mut lasting, connection).run().await {
                    Some(text) => text,
                    None => return,
                }
            }
            Ok(Err(error)) => format!("cannot connect: {error}"),
            Err(_) => "cannot connect: it does not answer".into(),
        };
        if std::mem::replace(&mut said, true) {
            log::debug!("system bus: {text}");
        } else {
            log::info!("system bus: {text}; nothing is known of power, network and sleep");
        }
        let next = retries.next();
        let again = next.or(RETRIES.last().filter(|_| lasting.users.is_some()));
        if !lasting.while_down(again.map(|delay| clock::boot() + *delay), next.is_none()).await {
            return;
        }
    }
}

async fn connect(address: Option<&str>) -> zbus::Result<Connection> {
    address.map_or_else(Builder::system, Builder::address).build().await
}

impl Lasting {
    /// Waits until it is worth trying again; false when told to stop. `lost`: it is not expected back soon.
    async fn while_down(&mut self, until: Option<Instant>, lost: bool) -> bool {
        loop {
            let now = clock::boot();
            // What was known is known no more, unless it is back soon.
            self.tell(model::Surroundings::default(), lost, now);
            if until.is_some_and(|until| until <= now) {
                return true;
            }
            let deadline = crate::time::earliest(until, self.settling.poll_timeout());
            match self.bell.turn(deadline).await {
                Turn::Stop => return false,
                Turn::Rang if self.bell.wishes().look_again => return true,
                Turn::Rang | Turn::Deadline => {}
            }
        }
    }
}
