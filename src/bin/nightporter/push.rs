//! `nightporter push`: posts a test message to an app's endpoint, the whole way through its real push server.

use std::{fmt::Write, path::Path, time::Duration};

use nightporter::{sys::tls, view::Endpoint};
use serde_json::json;
use ureq::Agent;

use crate::{
    args::Push,
    client::{self, Daemon},
    exit::{Exit, Failure},
    resolve,
};

/// UnifiedPush: 1 to 4096 bytes.
const LIMIT: usize = 4096;
const TIMEOUT: Duration = Duration::from_secs(30);
/// As much of a server's answer as helps.
const ANSWER_LIMIT: u64 = 1024;

/// Does the command and gives back what to print.
pub(crate) fn run(daemon: &Daemon, args: &Push) -> Result<String, Failure> {
    if args.text.is_empty() || args.text.len() > LIMIT {
        return Err(Failure::new(
            Exit::Data,
            format!("a message has 1 to {LIMIT} bytes; this one has {}", args.text.len()),
        ));
    }
    let app = resolve::app(daemon, &args.app)?;
    let endpoints: Vec<Endpoint> = client::decode(&daemon.ask("Endpoints", Some(&app))?)?;
    let endpoint = choose(&app, &endpoints, args.registration.as_deref())?;
    if endpoint.vapid {
        return Err(Failure::new(
            Exit::NotAllowed,
            format!(
                "{app} registered \"{}\" with the VAPID key of its own server, so the push server takes messages from \
                 that server only; nobody else can sign them",
                endpoint.token
            ),
        ));
    }
    let sent = post(endpoint, &args.text, args.ca_file.as_deref())?;
    if !(200..300).contains(&sent.status) {
        return Err(refused(&sent));
    }
    Ok(if args.output.json {
        let document = json!({ "app": app, "token": endpoint.token, "status": sent.status, "location": sent.location });
        format!("{document}\n")
    } else {
        let mut text = format!("{}: the push server took the message (HTTP {}).\n", app, sent.status);
        let _ = writeln!(
            text,
            "The text is not encrypted, so an app that decrypts its messages (RFC 8291) will ignore it.\n\
             What the daemon did with it: nightporter why {app}"
        );
        text
    })
}

struct Sent {
    status: u16,
    location: Option<String>,
    answer: String,
}

fn choose<'a>(app: &str, endpoints: &'a [Endpoint], token: Option<&str>) -> Result<&'a Endpoint, Failure> {
    let tokens = || {
        let tokens: Vec<&str> = endpoints.iter().map(|endpoint| endpoint.token.as_str()).collect();
        crate::render::clean(&tokens.join("\u{2028}")).replace('\u{2028}', "\n  ")
    };
    match (endpoints, token) {
        ([], _) => Err(Failure::new(Exit::NoSuchApp, format!("{app} has no registration to send to"))),
        (_, Some(token)) => endpoints.iter().find(|endpoint| endpoint.token == token).ok_or_else(|| {
            Failure::new(Exit::NoSuchApp, format!("{app} has no registration \"{token}\"; it has:\n  {}", tokens()))
        }),
        ([only], None) => Ok(only),
        (_, None) => Err(Failure::new(
            Exit::Usage,
            format!("{app} has several registrations; choose one with --registration:\n  {}", tokens()),
        )),
    }
}

fn post(endpoint: &Endpoint, text: &str, ca_file: Option<&Path>) -> Result<Sent, Failure> {
    let unified_push = endpoint.kind == "ntfy";
    let url = match unified_push {
        true if endpoint.endpoint.contains('?') => endpoint.endpoint.clone(),
        true => format!("{}?up=1", endpoint.endpoint),
        false => endpoint.endpoint.clone(),
    };
    let mut request =
        agent(ca_file, url.starts_with("https:"))?.post(&url).header("TTL", "60").header("Urgency", "normal");
    if !unified_push {
        request = request.header("Content-Encoding", "aes128gcm");
    }
    let mut response = request.send(text.as_bytes()).map_err(|error| {
        let hint = match error {
            ureq::Error::Rustls(_) => " (a server with a certificate of its own needs --ca-file)",
            _ => "",
        };
        Failure::new(Exit::Unavailable, format!("cannot reach the push server: {error}{hint}"))
    })?;
    Ok(Sent {
        status: response.status().as_u16(),
        location: response.headers().get("location").and_then(|value| value.to_str().ok()).map(str::to_owned),
        answer: response.body_mut().with_config().limit(ANSWER_LIMIT).read_to_string().unwrap_or_default(),
    })
}

fn agent(ca_file: Option<&Path>, secure: bool) -> Result<Agent, Failure> {
    let tls = match tls::ureq_config(ca_file) {
        Ok(tls) => tls,
        // A device without certificates can still reach a server on its own network.
        Err(_) if ca_file.is_none() && !secure => tls::ureq_without_trust(),
        Err(error) => return Err(Failure::new(Exit::Data, error.to_string())),
    };
    Ok(Agent::config_builder()
        .tls_config(tls)
        .http_status_as_error(false)
        // The endpoint is a secret meant for one host.
        .max_redirects(0)
        .timeout_global(Some(TIMEOUT))
        .user_agent(concat!("nightporter/", env!("CARGO_PKG_VERSION")))
        .build()
        .into())
}

fn refused(sent: &Sent) -> Failure {
    let (exit, why) = match sent.status {
        401 | 403 => (Exit::NotAllowed, "it wants a sender that can identify itself"),
        404 | 410 => (Exit::Unavailable, "the endpoint is gone; the app has to register again"),
        413 => (Exit::Data, "the message is too long for it"),
        429 => (Exit::Temporary, "too many messages; try again later"),
        500..600 => (Exit::Temporary, "it has trouble of its own"),
        _ => (Exit::Protocol, "this is not an answer known here"),
    };
    let mut text = format!("the push server refused the message: {why} (HTTP {})", sent.status);
    let answer = crate::render::clean(sent.answer.trim());
    if !answer.is_empty() {
        let _ = write!(text, "\n  {answer}");
    }
    Failure::new(exit, text)
}
