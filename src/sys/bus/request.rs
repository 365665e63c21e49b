//! From a method call to what is wanted: every argument checked against the UnifiedPush D-Bus specification 0.3.0
//! before the loop hears of it.

use std::{collections::HashMap, sync::Arc};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use zbus::{Message, Variant, message::Body, names::BusName};

use super::{
    interfaces::{
        APP, DISTRIBUTOR1, DISTRIBUTOR2, INTROSPECTABLE, MANAGEMENT, MANAGER, PEER, PROPERTIES, TRANSFERS, VERSION,
        interfaces, introspection, members,
    },
    panel::{self, Shown},
    transfers,
};
use crate::{
    event::{Claim, Command, Query, Request, STATE_MAX},
    model::{ConnectorVersion, LeaseId, LeaseKind},
    notification::NotifyWhen,
    transfer::{TransferId, TransferRequest},
};

/// What to do with a call.
#[derive(Debug)]
pub(super) enum Call {
    /// Answered here and now.
    Answer(Answer),
    /// For the loop.
    Ask {
        /// What is wanted.
        request: Request,
        /// How to word the reply.
        wording: Wording,
        /// What has to be found out about the caller.
        about: About,
    },
}

/// An answer that needs nobody.
#[derive(Debug, PartialEq)]
pub(super) enum Answer {
    /// No arguments.
    Empty,
    /// One string.
    Text(String),
    /// One string in a variant.
    Property(&'static str),
    /// All properties of an interface.
    Properties(HashMap<&'static str, &'static str>),
    /// An empty `a{sv}`.
    EmptyDict,
}

/// How the loop's reply is worded on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wording {
    /// `(ss)`: result, reason.
    RegisterV1,
    /// `a{sv}` with `success` and `reason`.
    RegisterV2,
    /// An empty `a{sv}`.
    EmptyDict,
    /// One string.
    Text,
    /// Nothing.
    Empty,
    /// Nothing; that it was refused the caller reads elsewhere (`panel`).
    SetProvider,
    /// Bytes (`ay`).
    State,
    /// A part of `Reply::Panel`.
    Panel(Shown),
    /// `(hu)`: the lease and its number.
    Lease,
    /// `t`: the number of a transfer.
    Transfer,
    /// `(ht)`: a file, with a number.
    File,
}

/// Whose service name a request is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum About {
    /// The caller's own, whatever it is.
    Caller,
    /// Nobody's in particular.
    Nobody,
    /// This one's.
    Service(Arc<str>),
}

/// An error reply.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Fault {
    /// D-Bus error name.
    pub(super) name: &'static str,
    /// For people.
    pub(super) text: String,
}

pub(super) const INVALID_ARGS: &str = "org.freedesktop.DBus.Error.InvalidArgs";
pub(super) const LIMITS_EXCEEDED: &str = "org.freedesktop.DBus.Error.LimitsExceeded";

/// Token and description at most, in bytes (UnifiedPush D-Bus 0.3.0).
const TEXT: usize = 100;
/// Body of any call we serve at most, in bytes: far above what a valid one can need.
const BODY: usize = STATE_MAX + 64;

/// Reads one method call. `panel` says whether KDE's settings panel is served.
pub(super) fn read(message: &Message, panel: bool) -> Result<Call, Fault> {
    let header = message.header();
    let path = header.path().map_or("", |path| path.as_str());
    let Some(own) = interfaces(path, panel) else {
        return Err(fault("org.freedesktop.DBus.Error.UnknownObject", format!("there is no object at {path}")));
    };
    let member = header.member().map_or("", |member| member.as_str());
    let body = message.body();
    if body.len() > BODY {
        return Err(fault(LIMITS_EXCEEDED, format!("arguments of more than {BODY} bytes")));
    }
    let interface = match header.interface() {
        Some(name) => {
            let standard = [INTROSPECTABLE, PEER, PROPERTIES];
            let known = own.iter().chain(&standard).find(|known| **known == name.as_str());
            known.copied().ok_or_else(|| {
                fault("org.freedesktop.DBus.Error.UnknownInterface", format!("{path} has no interface {name}"))
            })?
        }
        None => guess_interface(own, member, &body),
    };
    if !members(interface).contains(&member) {
        let text = format!("{path} has no method {member} in interface {interface}");
        return Err(fault("org.freedesktop.DBus.Error.UnknownMethod", text));
    }
    match interface {
        INTROSPECTABLE => arguments::<()>(&body).map(|()| Call::Answer(Answer::Text(introspection(path, panel)))),
        PEER => arguments::<()>(&body).and_then(|()| peer(member)).map(Call::Answer),
        PROPERTIES => properties(own, member, &body).map(Call::Answer),
        DISTRIBUTOR1 => distributor1(member, &body),
        DISTRIBUTOR2 => distributor2(member, &body),
        APP => app(member, &body),
        TRANSFERS => transfers::read(member, &body),
        MANAGER => manager(member, &body),
        MANAGEMENT => panel::read(member, &body),
        _ => Err(fault("org.freedesktop.DBus.Error.UnknownInterface", format!("no interface {interface}"))),
    }
}

/// A call may leave the interface out; then the first that has the member is meant, and of the two distributor
/// interfaces the one whose arguments these are.
fn guess_interface(own: &[&'static str], member: &str, body: &Body) -> &'static str {
    let standard = [INTROSPECTABLE, PEER, PROPERTIES];
    let mut having = own.iter().chain(&standard).copied().filter(|interface| members(interface).contains(&member));
    let dict = body.signature().to_string() == "a{sv}";
    match having.next() {
        Some(DISTRIBUTOR1) if dict => DISTRIBUTOR2,
        Some(interface) => interface,
        None => INTROSPECTABLE,
    }
}

fn peer(member: &str) -> Result<Answer, Fault> {
    if member == "Ping" {
        return Ok(Answer::Empty);
    }
    let id = ["/etc/machine-id", "/var/lib/dbus/machine-id"].iter().find_map(|path| std::fs::read_to_string(path).ok());
    let id = id.ok_or_else(|| fault("org.freedesktop.DBus.Error.Failed", "this machine has no machine id".into()))?;
    Ok(Answer::Text(id.trim().to_owned()))
}

fn properties(own: &[&str], member: &str, body: &Body) -> Result<Answer, Fault> {
    let has_version = own.contains(&MANAGER);
    match member {
        "Get" => {
            let (interface, property) = arguments::<(&str, &str)>(body)?;
            if has_version && (interface == MANAGER || interface.is_empty()) && property == "Version" {
                return Ok(Answer::Property(VERSION));
            }
            Err(fault("org.freedesktop.DBus.Error.UnknownProperty", format!("no property {property} in {interface}")))
        }
        "GetAll" => {
            let interface = arguments::<&str>(body)?;
            let version = has_version && (interface == MANAGER || interface.is_empty());
            Ok(Answer::Properties(version.then_some(("Version", VERSION)).into_iter().collect()))
        }
        _ => Err(fault("org.freedesktop.DBus.Error.PropertyReadOnly", "every property is read-only".into())),
    }
}

fn distributor1(member: &str, body: &Body) -> Result<Call, Fault> {
    if member == "Register" {
        let (service, token, description) = arguments::<(&str, &str, &str)>(body)?;
        return register(service, token, description, None, ConnectorVersion::V1, (None, None));
    }
    unregister(arguments::<&str>(body)?, ConnectorVersion::V1)
}

fn distributor2(member: &str, body: &Body) -> Result<Call, Fault> {
    let dict = arguments::<HashMap<&str, Variant<'_>>>(body)?;
    let text = |key: &str| match dict.get(key) {
        None => Ok(None),
        Some(Variant::Str(text)) => Ok(Some(text.as_str())),
        Some(other) => Err(invalid(format!("\"{key}\" must be a string (s), not {}", other.value_signature()))),
    };
    let needed = |key: &str| text(key)?.ok_or_else(|| invalid(format!("\"{key}\" is missing")));
    if member == "Register" {
        let (service, token) = (needed("service")?, needed("token")?);
        let description = text("description")?.unwrap_or_default();
        let upstream = text("org.nightporter.upstream")?;
        let wishes = (upstream, text("org.nightporter.notify")?);
        return register(service, token, description, text("vapid")?, ConnectorVersion::V2, wishes);
    }
    unregister(needed("token")?, ConnectorVersion::V2)
}

fn register(
    service: &str,
    token: &str,
    description: &str,
    vapid: Option<&str>,
    version: ConnectorVersion,
    (upstream, notify): (Option<&str>, Option<&str>),
) -> Result<Call, Fault> {
    check_service(service)?;
    check_token(token)?;
    if description.len() > TEXT {
        return Err(invalid(format!("the description has {} bytes; at most {TEXT} are allowed", description.len())));
    }
    if let Some(key) = vapid {
        check_vapid(key)?;
    }
    if let Some(name) = upstream {
        check_upstream(name)?;
    }
    let notify = match notify.map(|word| (NotifyWhen::parse(word), word)) {
        None => None,
        Some((Some(when), _)) => Some(when),
        Some((None, word)) => {
            let known = "never, unstartable or always";
            return Err(invalid(format!("\"org.nightporter.notify\" is {known}, not \"{}\"", start_of(word))));
        }
    };
    let service: Arc<str> = service.into();
    Ok(Call::Ask {
        about: About::Service(Arc::clone(&service)),
        wording: match version {
            ConnectorVersion::V1 => Wording::RegisterV1,
            ConnectorVersion::V2 => Wording::RegisterV2,
        },
        request: Request::Register {
            service,
            token: token.into(),
            description: description.into(),
            vapid: vapid.map(Into::into),
            version,
            upstream: upstream.map(Into::into),
            notify,
        },
    })
}

fn unregister(token: &str, version: ConnectorVersion) -> Result<Call, Fault> {
    check_token(token)?;
    let wording = match version {
        ConnectorVersion::V1 => Wording::Empty,
        ConnectorVersion::V2 => Wording::EmptyDict,
    };
    Ok(Call::Ask { request: Request::Unregister { token: token.into(), version }, wording, about: About::Nobody })
}

fn app(member: &str, body: &Body) -> Result<Call, Fault> {
    let ask = |request, wording| Ok(Call::Ask { request, wording, about: About::Caller });
    let (service, state) = match member {
        "Lease" => return lease(body),
        "Listen" => return ask(Request::Listen(arguments::<bool>(body)?), Wording::Empty),
        "SaveState" => {
            let state = arguments::<&[u8]>(body)?;
            if state.len() > STATE_MAX {
                let text = format!("the state has {} bytes; at most {STATE_MAX} are kept", state.len());
                return Err(fault(LIMITS_EXCEEDED, text));
            }
            return ask(Request::SaveState(state.into()), Wording::Empty);
        }
        "RestoreState" => {
            arguments::<()>(body)?;
            return ask(Request::RestoreState, Wording::State);
        }
        "SetState" => (None, arguments::<&str>(body)?),
        _ => {
            let (service, state) = arguments::<(&str, &str)>(body)?;
            check_service(service)?;
            (Some(Arc::<str>::from(service)), state)
        }
    };
    let claim = match state {
        "foreground" => Claim::Foreground,
        "background" => Claim::Background,
        _ => return Err(invalid("the state must be \"foreground\" or \"background\"".into())),
    };
    let about = service.clone().map_or(About::Caller, About::Service);
    Ok(Call::Ask { request: Request::Declare { service, claim }, wording: Wording::Empty, about })
}

fn lease(body: &Body) -> Result<Call, Fault> {
    let (kind, reason, options) = arguments::<(&str, &str, HashMap<&str, Variant<'_>>)>(body)?;
    let kind = LeaseKind::parse(kind).ok_or_else(|| {
        let kinds = LeaseKind::ALL.map(LeaseKind::as_str).join(", ");
        invalid(format!("there is no kind of lease \"{}\"; there are {kinds}", start_of(kind)))
    })?;
    if !(1..=TEXT).contains(&reason.len()) || reason.chars().any(char::is_control) {
        return Err(invalid(format!("the reason must be 1 to {TEXT} bytes without control characters: users read it")));
    }
    let seconds = match options.get("seconds") {
        None => None,
        Some(Variant::U32(seconds)) if *seconds > 0 => Some(*seconds),
        Some(_) => return Err(invalid("\"seconds\" must be a number (u) above 0".into())),
    };
    let service = match options.get("service") {
        None => None,
        Some(Variant::Str(service)) => {
            check_service(service)?;
            Some(Arc::<str>::from(service.as_str()))
        }
        Some(_) => return Err(invalid("\"service\" must be a string (s)".into())),
    };
    let about = service.clone().map_or(About::Caller, About::Service);
    let request = Request::Lease { kind, reason: reason.into(), seconds, service };
    Ok(Call::Ask { request, wording: Wording::Lease, about })
}

fn manager(member: &str, body: &Body) -> Result<Call, Fault> {
    let (request, wording) = match member {
        "Status" | "Apps" | "Report" => {
            arguments::<()>(body)?;
            let query = match member {
                "Status" => Query::Status,
                "Apps" => Query::Apps,
                _ => Query::Report,
            };
            return Ok(Call::Ask { request: Request::Query(query), wording: Wording::Text, about: About::Nobody });
        }
        "Move" => {
            let (service, upstream) = arguments::<(&str, &str)>(body)?;
            if !service.is_empty() {
                check_service(service)?;
            }
            check_upstream(upstream)?;
            let service = (!service.is_empty()).then(|| service.into());
            (Request::Move { service, upstream: upstream.into() }, Wording::Empty)
        }
        "Log" => (Request::Query(Query::Log { after: arguments::<u64>(body)? }), Wording::Text),
        "History" => (Request::Query(Query::History { hours: arguments::<u32>(body)? }), Wording::Text),
        "WhatIf" => (Request::Query(Query::WhatIf { hours: arguments::<u32>(body)? }), Wording::Text),
        "Leases" => {
            let service = arguments::<&str>(body)?;
            if !service.is_empty() {
                check_service(service)?;
            }
            (Request::Query(Query::Leases((!service.is_empty()).then(|| service.into()))), Wording::Text)
        }
        "Transfers" => {
            let service = arguments::<&str>(body)?;
            if !service.is_empty() {
                check_service(service)?;
            }
            (Request::Query(Query::Transfers((!service.is_empty()).then(|| service.into()))), Wording::Text)
        }
        "CancelTransfer" => {
            let id = TransferId(arguments::<u64>(body)?);
            (Request::Transfer(TransferRequest::Cancel(id)), Wording::Empty)
        }
        "EndLease" => (Request::EndLease(LeaseId(arguments::<u32>(body)?)), Wording::Empty),
        "ForgetUser" => (Request::ForgetUser(arguments::<u32>(body)?), Wording::Empty),
        _ => {
            let service = arguments::<&str>(body)?;
            check_service(service)?;
            let service: Arc<str> = service.into();
            match member {
                "Show" => (Request::Query(Query::Show(service)), Wording::Text),
                "Why" => (Request::Query(Query::Why(service)), Wording::Text),
                "Endpoints" => (Request::Query(Query::Endpoints(service)), Wording::Text),
                "Freeze" => (Request::Command { service, command: Command::Freeze }, Wording::Empty),
                "Thaw" => (Request::Command { service, command: Command::Thaw }, Wording::Empty),
                _ => (Request::Command { service, command: Command::Kill }, Wording::Empty),
            }
        }
    };
    let about = match &request {
        Request::Query(
            Query::Show(service) | Query::Why(service) | Query::Endpoints(service) | Query::Leases(Some(service)),
        )
        | Request::Move { service: Some(service), .. }
        | Request::Command { service, .. } => About::Service(Arc::clone(service)),
        _ => About::Nobody,
    };
    Ok(Call::Ask { request, wording, about })
}

fn check_service(service: &str) -> Result<(), Fault> {
    // The reason zbus gives names every rule of the grammar; the name itself is what the developer must look at.
    BusName::try_from(service)
        .map(|_| ())
        .map_err(|_| invalid(format!("\"{}\" is not a D-Bus name", start_of(service))))
}

pub(super) fn check_token(token: &str) -> Result<(), Fault> {
    match token.len() {
        0 => Err(invalid("the token is empty".into())),
        len if len > TEXT => Err(invalid(format!("the token has {len} bytes; at most {TEXT} are allowed"))),
        _ => Ok(()),
    }
}

/// What `config` lets an upstream be called.
fn check_upstream(name: &str) -> Result<(), Fault> {
    match (1..=64).contains(&name.len()) && !name.chars().any(char::is_control) {
        true => Ok(()),
        false => Err(invalid("the upstream's name must be 1 to 64 bytes without control characters".into())),
    }
}

fn check_vapid(key: &str) -> Result<(), Fault> {
    let point = (key.len() == 87).then(|| URL_SAFE_NO_PAD.decode(key).ok()).flatten();
    match point {
        Some(point) if point.len() == 65 && point[0] == 4 => Ok(()),
        _ => Err(invalid(
            "the VAPID key must be an uncompressed P-256 public key as 87 characters of base64url without padding"
                .into(),
        )),
    }
}

pub(super) fn arguments<'b, T: zbus::wire::DynamicDeserialize<'b>>(body: &'b Body) -> Result<T, Fault> {
    body.deserialize().map_err(|error| invalid(format!("wrong arguments: {error}")))
}

pub(super) fn invalid(text: String) -> Fault {
    fault(INVALID_ARGS, text)
}

fn fault(name: &'static str, text: String) -> Fault {
    Fault { name, text }
}

/// Enough of a text from outside to know it again.
fn start_of(text: &str) -> String {
    text.chars().take(TEXT).flat_map(char::escape_debug).collect()
}

#[cfg(test)]
mod tests {
    use serde::Serialize;
    use zbus::DynamicType;

    use super::{
        super::interfaces::{DISTRIBUTOR_PATH, NIGHTPORTER_PATH},
        *,
    };

    fn call<B: Serialize + DynamicType>(
        path: &str,
        interface: Option<&str>,
        member: &str,
        body: &B,
    ) -> Result<Call, Fault> {
        let mut message = Message::method_call(path, member);
        if let Some(interface) = interface {
            message = message.interface(interface);
        }
        read(&message.build(body).unwrap(), false)
    }

    fn asked(result: Result<Call, Fault>) -> (Request, Wording, About) {
        match result.unwrap() {
            Call::Ask { request, wording, about } => (request, wording, about),
            Call::Answer(answer) => panic!("{answer:?}"),
        }
    }

    #[test]
    fn the_interface_may_be_left_out() {
        let dict: HashMap<&str, Variant<'_>> = [("token", Variant::from("{t}"))].into();
        let (request, wording, about) = asked(call(DISTRIBUTOR_PATH, None, "Unregister", &dict));
        assert_eq!(request, Request::Unregister { token: "{t}".into(), version: ConnectorVersion::V2 });
        assert_eq!((wording, about), (Wording::EmptyDict, About::Nobody));
        let (request, ..) = asked(call(DISTRIBUTOR_PATH, None, "Unregister", &"{t}"));
        assert_eq!(request, Request::Unregister { token: "{t}".into(), version: ConnectorVersion::V1 });
        assert!(matches!(call("/", None, "Introspect", &()), Ok(Call::Answer(Answer::Text(_)))));
    }

    #[test]
    fn what_is_not_there_is_said_by_kind() {
        for (path, interface, member, name) in [
            ("/nowhere", Some(DISTRIBUTOR1), "Register", "UnknownObject"),
            (NIGHTPORTER_PATH, Some(DISTRIBUTOR1), "Register", "UnknownInterface"),
            (NIGHTPORTER_PATH, Some(MANAGER), "Register", "UnknownMethod"),
            (NIGHTPORTER_PATH, None, "Nothing", "UnknownMethod"),
            ("/", None, "Register", "UnknownMethod"),
        ] {
            let fault = call(path, interface, member, &()).unwrap_err();
            assert_eq!(fault.name.rsplit('.').next(), Some(name), "{path} {member}");
        }
    }

    #[test]
    fn our_own_interface() {
        let (request, _, about) = asked(call(NIGHTPORTER_PATH, Some(APP), "SetState", &"background"));
        assert_eq!(request, Request::Declare { service: None, claim: Claim::Background });
        assert_eq!(about, About::Caller);
        let (request, _, about) = asked(call(NIGHTPORTER_PATH, Some(APP), "SetStateOf", &("org.a.B", "foreground")));
        assert_eq!(request, Request::Declare { service: Some("org.a.B".into()), claim: Claim::Foreground });
        assert_eq!(about, About::Service("org.a.B".into()));
        assert_eq!(call(NIGHTPORTER_PATH, Some(APP), "SetState", &"hidden").unwrap_err().name, INVALID_ARGS);
        for on in [true, false] {
            let (request, wording, about) = asked(call(NIGHTPORTER_PATH, Some(APP), "Listen", &on));
            assert_eq!((request, wording, about), (Request::Listen(on), Wording::Empty, About::Caller));
        }
        let (request, wording, _) = asked(call(NIGHTPORTER_PATH, Some(APP), "SaveState", &vec![7_u8; STATE_MAX]));
        assert_eq!((request, wording), (Request::SaveState(vec![7; STATE_MAX].into()), Wording::Empty));
        let fault = call(NIGHTPORTER_PATH, Some(APP), "SaveState", &vec![7_u8; STATE_MAX + 1]).unwrap_err();
        assert_eq!(fault.name, LIMITS_EXCEEDED);
        assert_eq!(call(NIGHTPORTER_PATH, Some(APP), "SaveState", &"text").unwrap_err().name, INVALID_ARGS);
        let (request, wording, _) = asked(call(NIGHTPORTER_PATH, Some(APP), "RestoreState", &()));
        assert_eq!((request, wording), (Request::RestoreState, Wording::State));
        for (member, query) in [("Status", Query::Status), ("Apps", Query::Apps), ("Report", Query::Report)] {
            let (request, wording, _) = asked(call(NIGHTPORTER_PATH, Some(MANAGER), member, &()));
            assert_eq!((request, wording), (Request::Query(query), Wording::Text));
            assert_eq!(call(NIGHTPORTER_PATH, Some(MANAGER), member, &"x").unwrap_err().name, INVALID_ARGS);
        }
        for (member, query) in [("History", Query::History { hours: 24 }), ("WhatIf", Query::WhatIf { hours: 24 })] {
            let (request, wording, about) = asked(call(NIGHTPORTER_PATH, Some(MANAGER), member, &24_u32));
            assert_eq!((request, wording, about), (Request::Query(query), Wording::Text, About::Nobody));
            assert_eq!(call(NIGHTPORTER_PATH, Some(MANAGER), member, &()).unwrap_err().name, INVALID_ARGS);
            assert_eq!(call(NIGHTPORTER_PATH, Some(MANAGER), member, &-24_i32).unwrap_err().name, INVALID_ARGS);
        }
        for (member, command) in [("Freeze", Command::Freeze), ("Thaw", Command::Thaw), ("Kill", Command::Kill)] {
            let (request, wording, _) = asked(call(NIGHTPORTER_PATH, Some(MANAGER), member, &"org.a.B"));
            assert_eq!((request, wording), (Request::Command { service: "org.a.B".into(), command }, Wording::Empty));
        }
        for (service, meant) in [("org.a.B", Some("org.a.B")), ("", None)] {
            let (request, wording, about) = asked(call(NIGHTPORTER_PATH, Some(MANAGER), "Move", &(service, "home")));
            let meant = meant.map(Arc::<str>::from);
            assert_eq!(about, meant.clone().map_or(About::Nobody, About::Service));
            assert_eq!((request, wording), (Request::Move { service: meant, upstream: "home".into() }, Wording::Empty));
        }
        let (request, ..) = asked(call(NIGHTPORTER_PATH, Some(MANAGER), "ForgetUser", &7_u32));
        assert_eq!(request, Request::ForgetUser(7));
        assert_eq!(call(NIGHTPORTER_PATH, Some(MANAGER), "ForgetUser", &"7").unwrap_err().name, INVALID_ARGS);
        for wrong in [("no name", "home"), ("org.a.B", ""), ("", "\n"), ("", &*"x".repeat(65))] {
            assert_eq!(call(NIGHTPORTER_PATH, Some(MANAGER), "Move", &wrong).unwrap_err().name, INVALID_ARGS);
        }
        let (request, ..) = asked(call(NIGHTPORTER_PATH, Some(MANAGER), "Endpoints", &":1.5"));
        assert_eq!(request, Request::Query(Query::Endpoints(":1.5".into())));
        assert_eq!(call(NIGHTPORTER_PATH, Some(MANAGER), "Why", &"no name").unwrap_err().name, INVALID_ARGS);
        let version = call(NIGHTPORTER_PATH, Some(PROPERTIES), "Get", &(MANAGER, "Version")).unwrap();
        assert!(matches!(version, Call::Answer(Answer::Property(VERSION))));
        assert!(call(NIGHTPORTER_PATH, Some(PROPERTIES), "Get", &(MANAGER, "Other")).is_err());
        assert!(call(NIGHTPORTER_PATH, Some(PROPERTIES), "Set", &(MANAGER, "Version", Variant::from("9"))).is_err());
    }

    #[test]
    fn leases() {
        let options = |pairs: &[(&'static str, Variant<'static>)]| {
            pairs.iter().map(|(key, value)| (*key, value.try_clone().unwrap())).collect::<HashMap<_, _>>()
        };
        let lease = |kind: &str, reason: &str, pairs: &[(&'static str, Variant<'static>)]| {
            call(NIGHTPORTER_PATH, Some(APP), "Lease", &(kind, reason, options(pairs)))
        };
        let given =
            [("seconds", Variant::from(7_u32)), ("service", Variant::from("org.a.B")), ("new", Variant::from(1))];
        for (pairs, seconds, service) in [(&given[..], Some(7), Some("org.a.B")), (&given[2..], None, None)] {
            let (request, wording, about) = asked(lease("transfer", "upload", pairs));
            let service = service.map(Arc::<str>::from);
            assert_eq!(about, service.clone().map_or(About::Caller, About::Service));
            let wish = Request::Lease { kind: LeaseKind::Transfer, reason: "upload".into(), seconds, service };
            assert_eq!((request, wording), (wish, Wording::Lease));
        }
        for kind in LeaseKind::ALL {
            assert!(lease(kind.as_str(), &"r".repeat(100), &[]).is_ok());
        }
        for (kind, reason, pairs) in [
            ("Task", "r", &[][..]),
            ("task", "", &[]),
            ("task", &*"r".repeat(101), &[]),
            ("task", "\u{1b}[2J", &[]),
            ("task", "r", &[("seconds", Variant::from(0_u32))]),
            ("task", "r", &[("seconds", Variant::from(5_i32))]),
            ("task", "r", &[("service", Variant::from("no name"))]),
            ("task", "r", &[("service", Variant::from(1_u32))]),
        ] {
            assert_eq!(lease(kind, reason, pairs).unwrap_err().name, INVALID_ARGS, "{kind} {reason} {pairs:?}");
        }
        let manager = |member: &str, service: &str| asked(call(NIGHTPORTER_PATH, Some(MANAGER), member, &service)).0;
        assert_eq!(manager("Leases", ""), Request::Query(Query::Leases(None)));
        assert_eq!(manager("Leases", "org.a.B"), Request::Query(Query::Leases(Some("org.a.B".into()))));
        let (request, wording, _) = asked(call(NIGHTPORTER_PATH, Some(MANAGER), "EndLease", &7_u32));
        assert_eq!((request, wording), (Request::EndLease(LeaseId(7)), Wording::Empty));
        assert_eq!(call(NIGHTPORTER_PATH, Some(MANAGER), "EndLease", &"7").unwrap_err().name, INVALID_ARGS);
    }

    #[test]
    fn a_body_far_too_large_is_not_even_looked_at() {
        let fault = call(DISTRIBUTOR_PATH, Some(DISTRIBUTOR1), "Unregister", &"x".repeat(BODY)).unwrap_err();
        assert_eq!(fault.name, LIMITS_EXCEEDED);
    }
}
