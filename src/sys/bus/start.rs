//! Starting an app that is not running. Through systemd where it is there, so that the app gets a cgroup of its own:
//! plain activation by dbus-daemon puts it into the bus's own (lifecycle.md §0, finding 5), where it could never be
//! frozen.

use std::{
    future::{Future, poll_fn},
    pin::pin,
    sync::Arc,
    time::Duration,
};

use futures_core::Stream;
use serde::Serialize;
use zbus::{Connection, DynamicType, MatchRule, Message, MessageStream, OwnedObjectPath, Variant, message::Type};
use zruntime::SharedRuntime;

use super::{
    activation::{self, ServiceFile},
    session::Way,
    unit,
    wire::BUS_NAME,
};
use crate::{
    event::StartOutcome,
    model::{AppKey, Bus},
};

/// A start that takes longer has failed.
const LIMIT: Duration = Duration::from_secs(60);
const SYSTEMD: &str = "org.freedesktop.systemd1";
const SYSTEMD_PATH: &str = "/org/freedesktop/systemd1";
const SYSTEMD_MANAGER: &str = "org.freedesktop.systemd1.Manager";

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

async fn attempt(connection: &Connection, way: &Way, app: &AppKey) -> StartOutcome {
    if has_owner(connection, &app.service).await {
        return StartOutcome::Started;
    }
    if has_owner(connection, SYSTEMD).await
        && let Some(file) = service_file(way, app).await
        && let Some(outcome) = by_systemd(connection, app, &file).await
    {
        return outcome;
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
async fn by_systemd(connection: &Connection, app: &AppKey, file: &ServiceFile) -> Option<StartOutcome> {
    if let Some(unit) = &file.systemd_service {
        let outcome = run_job(connection, unit, "StartUnit", &(unit.as_str(), "replace")).await;
        match outcome {
            Err(zbus::Error::MethodError(name, ..)) if name.as_str() == "org.freedesktop.systemd1.NoSuchUnit" => {
                log::warn!("{app}: its service file names {unit}, which systemd does not know");
            }
            outcome => return Some(ended(outcome)),
        }
    }
    let path = file.exec.first()?;
    if app.bus == Bus::System && file.user.is_none() {
        return Some(StartOutcome::Failed("its service file names no user to run as".into()));
    }
    let mut random = [0; 4];
    if let Err(error) = rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty()) {
        return Some(StartOutcome::Failed(format!("no random number for the unit's name: {error}")));
    }
    let unit = unit::unit_for(&app.service, u32::from_ne_bytes(random))?;
    let mut properties = vec![
        ("Description", Variant::from(format!("{app}, started by Night Porter"))),
        ("ExecStart", Variant::from(vec![(path.clone(), file.exec.clone(), false)])),
        ("Type", Variant::from("dbus")),
        ("BusName", Variant::from(app.service.to_string())),
        ("CollectMode", Variant::from("inactive-or-failed")),
    ];
    match (app.bus, &file.user) {
        (Bus::System, Some(user)) => properties.push(("User", Variant::from(user.clone()))),
        _ => properties.push(("Slice", Variant::from("app.slice"))),
    }
    let none: Vec<(&str, Vec<(&str, Variant<'_>)>)> = Vec::new();
    Some(ended(run_job(connection, &unit, "StartTransientUnit", &(unit.as_str(), "fail", properties, none)).await))
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
        .path(SYSTEMD_PATH)
        .interface(SYSTEMD_MANAGER)
        .member("JobRemoved")
        .arg(2, unit)
        .build()?
        .to_owned();
    let mut removed = pin!(MessageStream::for_match_rule(rule, connection, None).await?);
    let reply = connection.call_method(Some(SYSTEMD), SYSTEMD_PATH, Some(SYSTEMD_MANAGER), method, arguments).await?;
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

fn ended(result: zbus::Result<String>) -> StartOutcome {
    match result {
        Ok(result) if result == "done" => StartOutcome::Started,
        Ok(result) => StartOutcome::Failed(format!("systemd could not start it: {result}")),
        Err(error) => StartOutcome::Failed(format!("systemd: {error}")),
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
