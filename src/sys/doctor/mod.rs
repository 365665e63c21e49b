//! What `nightporter doctor` looks at. Every look has a time limit of its own and none needs a daemon, a bus or root:
//! what cannot be seen is said to be so.
//!
//! The looks run on threads that are left to themselves when their time is up: a file system or a bus that never answers
//! keeps nobody waiting, and the program ends soon after.

mod apps;
mod bus;
mod cgroups;
mod kernel;
mod machine;
mod root;
mod state;
mod swap;
mod upstreams;

use std::{path::PathBuf, sync::mpsc, thread, time::Duration};

pub use self::{kernel::Abilities, root::Root};
use crate::{
    config::{Proxy, Settings},
    doctor::facts::{Bus, Cgroups, Config, Daemon, Facts, Kernel, Machine, Seen, Swap},
};

/// For files of the kernel and the system.
const FILES: Duration = Duration::from_secs(2);
/// For a bus and all that is asked there.
const BUS: Duration = Duration::from_millis(4500);
/// For the service files of all apps, some of them in users' homes.
const APPS: Duration = Duration::from_secs(2);
/// For all push servers at once.
const UPSTREAMS: Duration = Duration::from_millis(4500);

/// What is to be looked at.
pub struct Question {
    /// Whether it is about `nightporterd --user`.
    pub user: bool,
    /// Where the state directory is, or why that is not known.
    pub state_dir: Result<PathBuf, String>,
    /// Reads the configuration.
    pub config: Box<dyn FnOnce() -> Config + Send>,
}

/// Looks at this machine. Takes some 10 s at most, whatever hangs.
pub fn look(question: Question) -> Facts {
    let Question { user, state_dir, config } = question;
    let uid = rustix::process::geteuid().as_raw();
    // All at once; then what follows from what they found.
    let (system_bus, session_bus) =
        (Look::begin(|| bus::look(bus::Which::System)), bus::session().map(Look::begin_bus));
    let machine = Look::begin(|| Ok(machine::look(&Root::real())));
    let kernel = Look::begin(|| kernel::look(&Root::real(), Abilities::of_this_kernel()));
    let cgroups = Look::begin(move || cgroups::look(&Root::real(), user.then_some(uid)));
    let swap = Look::begin(|| swap::look(&Root::real()));
    let config = Look::begin(move || Ok(config()));
    let state = Look::begin(move || state::look(&state_dir?));
    let machine = machine.end(FILES);
    let kernel = kernel.end(FILES);
    let cgroups = cgroups.end(FILES);
    let (swap, config, state) = (swap.end(FILES), config.end(FILES), state.end(FILES));
    let (system_bus, session_bus) = (system_bus.end(BUS), session_bus.map(|look| look.end(BUS)));

    let daemon = match user {
        true => session_bus.as_ref().and_then(|bus| bus.as_ref().ok()),
        false => system_bus.as_ref().ok(),
    };
    let daemon = daemon.and_then(|bus| bus.daemon.as_ref());
    let apps = begin_apps(uid, daemon, &system_bus, session_bus.as_ref());
    let upstreams = begin_upstreams(daemon, &config);
    let apps = apps.and_then(|look| look.end(APPS));
    let upstreams = upstreams.and_then(|look| look.end(UPSTREAMS));
    Facts { user, uid, machine, kernel, cgroups, swap, system_bus, session_bus, config, state, apps, upstreams }
}

/// What can be seen in a tree of files alone, with what the kernel is able to do given: for machines that are not this one.
pub fn look_in(
    root: &Root,
    abilities: Abilities,
    user: Option<u32>,
) -> (Machine, Seen<Kernel>, Seen<Cgroups>, Seen<Swap>) {
    (machine::look(root), kernel::look(root, abilities), cgroups::look(root, user), swap::look(root))
}

/// A look under way on a thread of its own.
struct Look<T> {
    begun: std::time::Instant,
    answer: Result<mpsc::Receiver<Seen<T>>, String>,
}

impl<T: Send + 'static> Look<T> {
    fn begin(look: impl FnOnce() -> Seen<T> + Send + 'static) -> Self {
        let (told, answer) = mpsc::channel();
        let thread = thread::Builder::new().name("look".into()).spawn(move || {
            // Nobody may be waiting any more.
            let _ = told.send(look());
        });
        let answer = thread.map(|_| answer).map_err(|error| format!("no thread for it: {error}"));
        Self { begun: std::time::Instant::now(), answer }
    }

    /// Its result, within `limit` of its begin.
    fn end(self, limit: Duration) -> Seen<T> {
        let left = limit.saturating_sub(self.begun.elapsed());
        self.answer?.recv_timeout(left).unwrap_or_else(|error| {
            Err(match error {
                mpsc::RecvTimeoutError::Timeout => format!("no answer within {} s", limit.as_secs_f32()),
                mpsc::RecvTimeoutError::Disconnected => "looking there failed".to_owned(),
            })
        })
    }
}

impl Look<Bus> {
    fn begin_bus(which: bus::Which) -> Self {
        Self::begin(move || bus::look(which))
    }
}

fn begin_apps(
    uid: u32,
    daemon: Option<&Daemon>,
    system: &Seen<Bus>,
    session: Option<&Seen<Bus>>,
) -> Seen<Look<Vec<crate::doctor::facts::App>>> {
    let Some(daemon) = daemon else { return Err("the daemon, which knows them, could not be asked".to_owned()) };
    let apps = daemon.apps.clone().map_err(|why| format!("the daemon does not tell them: {why}"))?;
    let activatable = |bus: &Bus| bus.activatable.clone();
    let known = apps::Known {
        uid,
        system: system.as_ref().ok().map(activatable),
        session: session.and_then(|bus| bus.as_ref().ok()).map(activatable),
    };
    Ok(Look::begin(move || Ok(apps::look(&apps, &known))))
}

fn begin_upstreams(daemon: Option<&Daemon>, config: &Seen<Config>) -> Seen<Look<Vec<crate::doctor::facts::Upstream>>> {
    let told = daemon.and_then(|daemon| daemon.status.as_ref().ok()).map(|status| status.upstreams.clone());
    let settings = match config {
        Ok(Config::Defaults) => Ok(Settings::default()),
        Ok(Config::Valid(_, settings)) => Ok((**settings).clone()),
        Ok(Config::Denied(path)) => Err(format!("{path}, which names them, may not be read by this user")),
        Ok(Config::Unreadable(path, _)) => Err(format!("{path}, which names them, cannot be read")),
        Ok(Config::Invalid(path, _)) => Err(format!("{path}, which names them, is wrong")),
        Err(why) => Err(format!("the configuration, which names them, could not be seen: {why}")),
    };
    let (settings, proxy) = match (settings, &told) {
        (Ok(settings), _) => (settings.upstreams, settings.network.proxy),
        (Err(_), Some(_)) => (Vec::new(), Proxy::Environment),
        (Err(why), None) => return Err(why),
    };
    // What has answered by then must not be lost with what has not.
    let limit = UPSTREAMS.saturating_sub(Duration::from_millis(500));
    Ok(Look::begin(move || Ok(upstreams::look(told, settings, proxy, limit))))
}
