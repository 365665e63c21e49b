//! Starting an app that is not running. Through systemd where it is there, so that the app gets a cgroup of its own:
//! plain activation by dbus-daemon puts it into the bus's own (lifecycle.md §0, finding 5), where it could never be
//! frozen.

use std::{
    collections::HashMap,
    future::{Future, poll_fn},
    pin::pin,
    sync::Arc,
    time::Duration,
};

use futures_core::Stream;
use serde::Serialize;
use zbus::{
    Connection, DynamicType, MatchRule, Message, MessageStream, OwnedObjectPath, Variant,
    message::{Flags, Type},
};
use zruntime::SharedRuntime;

use super::{
    activation::{self, ServiceFile},
    desktop,
    manager::{MANAGER, PATH, SYSTEMD},
    session::Way,
    unit,
    wire::{BUS_NAME, Wire},
};
use crate::{
    event::StartOutcome,
    model::{AppKey, Bus},
};

/// A start that takes longer has failed.
const LIMIT: Duration = Duration::from_secs(60);
/// A manager that has not even taken the job after this will not.
const ANSWER: Duration = Duration::from_secs(10);
/// Error names with which the manager says that we may not. The bus may all the same.
const DENIED: [&str; 2] =
    ["org.freedesktop.DBus.Error.AccessDenied", "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired"];

/// Starts the app and waits for the word of whoever starts it.
pub(super) async fn start(connection: Connection, way: Way, app: AppKey) -> StartOutcome {
    if app.is_unique_name() {
        return StartOutcome::NotActivatable;
    }
    let limited = match SharedRuntime::current() {
        Ok(runtime) => runtime.timeout(LIMIT, attempt(&connection, &way, &app)).await,
        Err(error) => return StartOutcome::Failed(format!("no runtime: {error}")),
    };
    match limited {
        Ok(outcome) => outcome,
        // Its own word may have got lost; the name has not.
        Err(_) if has_owner(&connection, &app.service).await => StartOutcome::Started,
        Err(_) => StartOutcome::Failed(format!("it did not come up within {} s", LIMIT.as_secs())),
    }
}

/// Starts the app because the user wants to see it, and has it show itself: by its D-Bus service, or else by the command of its
/// desktop file, in a unit of its own.
pub(super) async fn start_shown(
    connection: Connection,
    way: Way,
    app: AppKey,
    token: Option<Arc<str>>,
) -> StartOutcome {
    match start(connection.clone(), way.clone(), app.clone()).await {
        StartOutcome::Started => {
            let message = presentation(&app, &app.service, token.as_deref());
            if let Some(message) = message {
                let _ = connection.send(&message).await;
            }
            StartOutcome::Started
        }
        StartOutcome::Failed(text) => StartOutcome::Failed(text),
        StartOutcome::NotActivatable => {
            let file = desktop::find(&way, &app, "").await.filter(|file| !file.exec.is_empty());
            let Some(file) = file else { return StartOutcome::NotActivatable };
            if !has_owner(&connection, SYSTEMD).await {
                return StartOutcome::Failed("without systemd its desktop file cannot be carried out".into());
            }
            let launch = launch(&connection, &app, &file.exec, token.as_deref());
            match SharedRuntime::current() {
                Ok(runtime) => runtime.timeout(LIMIT, launch).await.unwrap_or_else(|_| {
                    StartOutcome::Failed(format!("systemd did not start it within {} s", LIMIT.as_secs()))
                }),
                Err(error) => StartOutcome::Failed(format!("no runtime: {error}")),
            }
        }
    }
}

/// Has an app that runs come to the front, if it can be asked to (Desktop Entry Specification, "D-Bus Activation").
pub(super) fn present(wire: &mut Wire, app: &AppKey, owner: &str, token: Option<&str>) {
    if let Some(message) = presentation(app, owner, token) {
        wire.send(message);
    }
}

fn presentation(app: &AppKey, owner: &str, token: Option<&str>) -> Option<Message> {
    if app.is_unique_name() {
        return None;
    }
    let path = format!("/{}", app.service.replace('.', "/").replace('-', "_"));
    let mut platform: HashMap<&str, Variant<'_>> = HashMap::new();
    if let Some(token) = token {
        // GTK 3 knows it by the older name.
        platform.insert("activation-token", Variant::from(token));
        platform.insert("desktop-startup-id", Variant::from(token));
    }
    let message = Message::method_call(path.as_str(), "Activate")
        .destination(owner)
        .interface("org.freedesktop.Application")
        .with_flags(Flags::NO_REPLY_EXPECTED | Flags::NO_AUTO_START)
        .build(&platform);
    message.inspect_err(|error| log::debug!("{app}: it cannot be asked to show itself: {error}")).ok()
}

async fn launch(connection: &Connection, app: &AppKey, exec: &[String], token: Option<&str>) -> StartOutcome {
    let mut random = [0; 4];
    if let Err(error) = rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty()) {
        return StartOutcome::Failed(format!("no random number for the unit's name: {error}"));
    }
    let Some((unit, program)) = unit::unit_for(&app.service, u32::from_ne_bytes(random)).zip(exec.first()) else {
        return StartOutcome::NotActivatable;
    };
    let words: Vec<String> = exec.iter().map(|word| word.replace('$', "$$")).collect();
    let environment: Vec<String> = token
        .into_iter()
        .flat_map(|token| [format!("XDG_ACTIVATION_TOKEN={token}"), format!("DESKTOP_STARTUP_ID={token}")])
        .collect();
    let properties = vec![
        ("Description", Variant::from(format!("{app}, started by Night Porter for the user"))),
        ("ExecStart", Variant::from(vec![(program.clone(), words, false)])),
        ("Type", Variant::from("exec")),
        ("CollectMode", Variant::from("inactive-or-failed")),
        ("Environment", Variant::from(environment)),
        ("Slice", Variant::from("app.slice")),
    ];
    let none: Vec<(&str, Vec<(&str, Variant<'_>)>)> = Vec::new();
    let outcome = run_job(connection, &unit, "StartTransientUnit", &(unit.as_str(), "fail", properties, none)).await;
    let denied = || StartOutcome::Failed("systemd does not let us start it".into());
    ended(connection, app, &unit, outcome).await.unwrap_or_else(denied)
}

/// Whether anything says how to start the app: the bus, or a service file it has not read yet. `None` when that cannot be
/// found out.
pub(super) async fn is_startable(connection: Connection, way: Way, app: AppKey) -> Option<bool> {
    if app.is_unique_name() {
        return Some(false);
    }
    let ask = bus_call(&connection, "ListActivatableNames", &());
    let reply = SharedRuntime::current().ok()?.timeout(ANSWER, ask).await.ok()?.ok()?;
    let body = reply.body();
    let names: Vec<&str> = body.deserialize().ok()?;
    if names.contains(&&*app.service) {
        return Some(true);
    }
    // Systemd starts what has a service file, whether or not the bus knows of it; and the bus looks again before it says
    // that it does not.
    let usable = |file: &ServiceFile| {
        file.systemd_service.is_some() || (!file.exec.is_empty() && (app.bus != Bus::System || file.user.is_some()))
    };
    Some(service_file(&way, &app).await.is_some_and(|file| usable(&file)))
}

async fn attempt(connection: &Connection, way: &Way, app: &AppKey) -> StartOutcome {
    if has_owner(connection, &app.service).await {
        return StartOutcome::Started;
    }
    if has_owner(connection, SYSTEMD).await {
        match service_file(way, app).await {
            Some(file) => {
                if let Some(outcome) = by_systemd(connection, way, app, &file).await {
                    return outcome;
                }
            }
            // dbus-daemon runs it in its own cgroup then. An app that can be stopped by signals only is better than one
            // that gets no messages.
            None => log::debug!("{app}: no service file of it can be read; left to the bus"),
        }
    }
    by_bus(connection, app).await
}

/// What is in a user's directories is read as that user.
async fn service_file(way: &Way, app: &AppKey) -> Option<ServiceFile> {
    let Way::User(user, errands) = way else { return activation::find(app.bus, &app.service) };
    let (searched, name) = (user.clone(), Arc::clone(&app.service));
    let found = errands.run(user, move || activation::find_of(&searched, &name)).await;
    found.inspect_err(|error| log::warn!("{app}: no service file is looked for: {error}")).ok().flatten()
}

/// `None` when systemd has nothing to start it by, and the bus may.
async fn by_systemd(connection: &Connection, way: &Way, app: &AppKey, file: &ServiceFile) -> Option<StartOutcome> {
    if let Some(unit) = &file.systemd_service {
        // Whatever job it has: a stop that is under way ends first, a start is joined.
        let outcome = run_job(connection, unit, "StartUnit", &(unit.as_str(), "replace")).await;
        match outcome {
            Err(error) if is_named(&error, &["org.freedesktop.systemd1.NoSuchUnit"]) => {
                log::warn!("{app}: its service file names {unit}, which systemd does not know");
            }
            outcome => return ended(connection, app, unit, outcome).await,
        }
    }
    if app.bus == Bus::System && file.user.is_none() {
        return Some(StartOutcome::Failed("its service file names no user to run as".into()));
    }
    // Another unit of that name: it bears another number then.
    for again in [true, false] {
        let mut random = [0; 4];
        if let Err(error) = rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty()) {
            return Some(StartOutcome::Failed(format!("no random number for the unit's name: {error}")));
        }
        let unit = unit::unit_for(&app.service, u32::from_ne_bytes(random))?;
        let properties = transient(app, file, &starter_address(way, app.bus))?;
        let none: Vec<(&str, Vec<(&str, Variant<'_>)>)> = Vec::new();
        let arguments = (unit.as_str(), "fail", properties, none);
        match run_job(connection, &unit, "StartTransientUnit", &arguments).await {
            Err(error) if again && is_named(&error, &["org.freedesktop.systemd1.UnitExists"]) => {}
            outcome => return ended(connection, app, &unit, outcome).await,
        }
    }
    None
}

/// What the app's own unit is to be. The rest is its manager's default: its environment, which sessions keep in step with
/// that of the bus, and no `Restart=`.
fn transient(app: &AppKey, file: &ServiceFile, address: &str) -> Option<Vec<(&'static str, Variant<'static>)>> {
    let path = file.exec.first()?;
    // systemd puts variables into a command line, the bus does not.
    let words: Vec<String> = file.exec.iter().map(|word| word.replace('$', "$$")).collect();
    let kind = match app.bus {
        Bus::System => "system",
        Bus::Session(_) => "session",
    };
    // As the D-Bus specification has it ("Message Bus Starting Services").
    let environment = vec![format!("DBUS_STARTER_ADDRESS={address}"), format!("DBUS_STARTER_BUS_TYPE={kind}")];
    let mut properties = vec![
        ("Description", Variant::from(format!("{app}, started by Night Porter"))),
        ("ExecStart", Variant::from(vec![(path.clone(), words, false)])),
        ("Type", Variant::from("dbus")),
        ("BusName", Variant::from(app.service.to_string())),
        ("CollectMode", Variant::from("inactive-or-failed")),
        ("Environment", Variant::from(environment)),
    ];
    match (app.bus, &file.user) {
        (Bus::System, Some(user)) => properties.push(("User", Variant::from(user.clone()))),
        _ => properties.push(("Slice", Variant::from("app.slice"))),
    }
    Some(properties)
}

/// Where the app is to find the bus.
fn starter_address(way: &Way, bus: Bus) -> String {
    let variable = |name| std::env::var(name).ok().filter(|address| !address.is_empty());
    let own = |dir: &std::path::Path| format!("unix:path={}/bus", dir.display());
    match (way, bus) {
        (Way::Address(Some(address)), _) => address.clone(),
        (Way::User(user, _), _) => own(&user.runtime_dir),
        (_, Bus::System) => {
            variable("DBUS_SYSTEM_BUS_ADDRESS").unwrap_or_else(|| "unix:path=/run/dbus/system_bus_socket".into())
        }
        (_, Bus::Session(uid)) => variable("DBUS_SESSION_BUS_ADDRESS")
            .unwrap_or_else(|| own(std::path::Path::new(&format!("/run/user/{uid}")))),
    }
}

/// Has systemd make a job for `unit` and waits until it is done; gives its result (`done`, `failed`, …).
async fn run_job<B>(connection: &Connection, unit: &str, method: &'static str, arguments: &B) -> zbus::Result<String>
where
    B: Serialize + DynamicType,
{
    // systemd tells the end of a job to whoever asked for it; the rule lets only this unit's through.
    let rule = MatchRule::builder()
        .msg_type(Type::Signal)
        .sender(SYSTEMD)
        .path(PATH)
        .interface(MANAGER)
        .member("JobRemoved")
        .arg(2, unit)
        .build()?
        .to_owned();
    let mut removed = pin!(MessageStream::for_match_rule(rule, connection, None).await?);
    let call = connection.call_method(Some(SYSTEMD), PATH, Some(MANAGER), method, arguments);
    let reply = match SharedRuntime::current()?.timeout(ANSWER, call).await {
        Ok(reply) => reply?,
        Err(_) => return Err(zbus::Error::Failure(format!("it does not answer within {} s", ANSWER.as_secs()))),
    };
    let job: OwnedObjectPath = reply.body().deserialize()?;
    while let Some(signal) = poll_fn(|context| removed.as_mut().poll_next(context)).await {
        let signal = signal?;
        let body = signal.body();
        let (_, path, _, result): (u32, OwnedObjectPath, &str, &str) = body.deserialize()?;
        if path == job {
            return Ok(result.to_owned());
        }
    }
    Err(zbus::Error::Failure("the connection is gone".into()))
}

/// `None` when we may not have systemd start it. The bus may: it knows the user, and hands what has a unit to systemd.
async fn ended(
    connection: &Connection,
    app: &AppKey,
    unit: &str,
    result: zbus::Result<String>,
) -> Option<StartOutcome> {
    let result = match result {
        Ok(result) if result == "done" => return Some(StartOutcome::Started),
        Ok(result) => result,
        Err(error) if is_named(&error, &DENIED) => {
            log::info!("{app}: systemd does not let us start {unit} ({error}); left to the bus");
            return None;
        }
        Err(error) => return Some(StartOutcome::Failed(format!("systemd: {error}"))),
    };
    let user = if app.bus == Bus::System { "" } else { " --user" };
    let text = match &*result {
        // lifecycle.md §4.2: since systemd 256, and it says no more than this.
        "frozen" => format!("somebody has frozen its unit: systemctl{user} thaw {unit}"),
        _ => {
            let why = why(connection, unit).await.filter(|why| *why != result);
            let why = why.map_or_else(String::new, |why| format!(" ({why})"));
            format!("systemd could not start it: {result}{why}; see systemctl{user} status {unit}")
        }
    };
    Some(StartOutcome::Failed(text))
}

/// What became of a service (`Result=`), if its unit is still there to be asked.
async fn why(connection: &Connection, unit: &str) -> Option<String> {
    let ask = async {
        let reply = connection.call_method(Some(SYSTEMD), PATH, Some(MANAGER), "GetUnit", &unit).await.ok()?;
        let path: OwnedObjectPath = reply.body().deserialize().ok()?;
        let (properties, service) = ("org.freedesktop.DBus.Properties", "org.freedesktop.systemd1.Service");
        let property = (service, "Result");
        let reply = connection.call_method(Some(SYSTEMD), &path, Some(properties), "Get", &property).await.ok()?;
        match reply.body().deserialize::<Variant<'_>>() {
            Ok(Variant::Str(text)) => Some(text.chars().take(100).collect()),
            _ => None,
        }
    };
    SharedRuntime::current().ok()?.timeout(Duration::from_secs(2), ask).await.ok().flatten()
}

fn is_named(error: &zbus::Error, names: &[&str]) -> bool {
    match error {
        zbus::Error::MethodError(name, ..) => names.contains(&name.as_str()),
        zbus::Error::FDO(error) => names.contains(&zbus::DBusError::name(&**error).as_str()),
        _ => false,
    }
}

async fn by_bus(connection: &Connection, app: &AppKey) -> StartOutcome {
    match bus_call(connection, "StartServiceByName", &(&*app.service, 0_u32)).await {
        Ok(_) => StartOutcome::Started,
        Err(zbus::Error::FDO(error)) if matches!(*error, zbus::fdo::Error::ServiceUnknown(_)) => {
            StartOutcome::NotActivatable
        }
        Err(error) => StartOutcome::Failed(error.to_string()),
    }
}

async fn has_owner(connection: &Connection, name: &str) -> bool {
    let reply = bus_call(connection, "NameHasOwner", &name).await;
    reply.is_ok_and(|reply| reply.body().deserialize().unwrap_or(false))
}

fn bus_call<B>(
    connection: &Connection,
    member: &'static str,
    body: &B,
) -> impl Future<Output = zbus::Result<Message>> + Send
where
    B: Serialize + DynamicType + Sync,
{
    connection.call_method(Some(BUS_NAME), "/org/freedesktop/DBus", Some(BUS_NAME), member, body)
}
