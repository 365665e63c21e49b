//! The HTTP side: four paths, by hand, so that every status code is in sight.

use std::{future::poll_fn, pin::Pin, sync::Arc, time::Duration};

use ::http::{
    HeaderValue, Method, Request, StatusCode,
    header::{self, HeaderName},
    request::Parts,
};
use axum::{
    body::{Body, HttpBody},
    extract::{FromRequestParts, ws::WebSocketUpgrade},
    response::{IntoResponse, Response},
};
use tokio::{sync::OwnedSemaphorePermit, time::timeout};

use crate::{
    clock,
    server::Relay,
    session::FRAME_MAX,
    socket,
    store::{StoreError, Submission, Verdict},
    token,
    vapid::Proof,
    webpush::Headers,
};

/// Where endpoints live, below the public URL.
pub(crate) const ENDPOINT_PATH: &str = "/wpush/";
/// Where messages live, below the public URL.
pub(crate) const MESSAGE_PATH: &str = "/m/";

/// What a sender waits when the storage is full or busy.
const STORAGE_RETRY: Duration = Duration::from_secs(30);
const BUSY_RETRY: Duration = Duration::from_secs(1);

/// Answer a request. `slot` is the connection's place among `--max-connections`; a WebSocket keeps it.
pub(crate) async fn respond(relay: Arc<Relay>, slot: Arc<OwnedSemaphorePermit>, request: Request<Body>) -> Response {
    let (parts, body) = request.into_parts();
    let path = parts.uri.path().to_owned();
    if path == "/" {
        return upgrade(relay, slot, parts).await;
    }
    if path == "/health" {
        return match parts.method {
            Method::GET | Method::HEAD => text(StatusCode::OK, "ok"),
            _ => wrong_method("GET, HEAD"),
        };
    }
    if let Some(token) = path.strip_prefix(ENDPOINT_PATH) {
        return match parts.method {
            Method::POST => submit(&relay, token, &parts, body).await,
            _ => wrong_method("POST"),
        };
    }
    if let Some(version) = path.strip_prefix(MESSAGE_PATH) {
        return match parts.method {
            Method::DELETE => delete(&relay, version).await,
            _ => wrong_method("DELETE"),
        };
    }
    not_found()
}

async fn upgrade(relay: Arc<Relay>, slot: Arc<OwnedSemaphorePermit>, mut parts: Parts) -> Response {
    if parts.method != Method::GET {
        return wrong_method("GET");
    }
    match WebSocketUpgrade::from_request_parts(&mut parts, &()).await {
        Ok(upgrade) => upgrade
            // The defaults are for few and large connections: 128 KiB each.
            .read_buffer_size(4096)
            .write_buffer_size(0)
            .max_write_buffer_size(4 * FRAME_MAX)
            // The session refuses shorter ones with a reason; this only bounds memory.
            .max_message_size(4 * FRAME_MAX)
            .max_frame_size(4 * FRAME_MAX)
            .protocols(["push-notification"])
            .on_upgrade(move |socket| async move {
                socket::run(socket, relay).await;
                drop(slot);
            }),
        Err(rejection) => rejection.into_response(),
    }
}

async fn submit(relay: &Relay, token: &str, parts: &Parts, body: Body) -> Response {
    if !token::is_capability(token) {
        return not_found();
    }
    let headers = match Headers::parse(&parts.headers) {
        Ok(headers) => headers,
        Err(error) => return text(StatusCode::BAD_REQUEST, &error.to_string()),
    };
    let data = match timeout(relay.times.request_timeout, read(body, relay.limits.max_body as usize)).await {
        Ok(Ok(data)) => data,
        Ok(Err(BodyError::TooLarge)) => {
            return text(StatusCode::PAYLOAD_TOO_LARGE, &format!("at most {} bytes", relay.limits.max_body));
        }
        Ok(Err(BodyError::Broken)) => return text(StatusCode::BAD_REQUEST, "the body ended early"),
        Err(_) => return text(StatusCode::REQUEST_TIMEOUT, "the body came too slowly"),
    };
    let Ok(version) = token::capability() else {
        return later(StatusCode::SERVICE_UNAVAILABLE, "no random numbers", BUSY_RETRY);
    };
    // Text that is no ASCII proves nothing, like any other rubbish.
    let authorization = parts.headers.get(header::AUTHORIZATION).map(|value| value.to_str().unwrap_or_default());
    let proof = Proof::of(authorization, &relay.public_url.origin, clock::unix_now());
    let ttl = headers.ttl;
    let location = relay.message(&version);
    let submission = Submission { token: token.to_owned(), version, headers, data: data.into(), proof };
    match relay.store.submit(submission).await {
        Ok(Verdict::Accepted) => accepted(&location, ttl),
        Ok(Verdict::Unknown) => not_found(),
        Ok(Verdict::Removed) => text(StatusCode::GONE, "this endpoint was removed"),
        Ok(Verdict::Unauthorized(reason)) => {
            let reason = reason
                .map_or("this endpoint wants the VAPID key it was made with".to_owned(), |error| error.to_string());
            with(text(StatusCode::UNAUTHORIZED, &reason), header::WWW_AUTHENTICATE, "vapid")
        }
        Ok(Verdict::TooMany(wait)) => later(StatusCode::TOO_MANY_REQUESTS, "too many messages for this endpoint", wait),
        Err(error) => storage_error(error),
    }
}

async fn delete(relay: &Relay, version: &str) -> Response {
    if !token::is_capability(version) {
        return not_found();
    }
    match relay.store.delete(version.to_owned()).await {
        Ok(true) => StatusCode::NO_CONTENT.into_response(),
        Ok(false) => not_found(),
        Err(error) => storage_error(error),
    }
}

enum BodyError {
    TooLarge,
    Broken,
}

async fn read(mut body: Body, limit: usize) -> Result<Vec<u8>, BodyError> {
    if body.size_hint().lower() > limit as u64 {
        return Err(BodyError::TooLarge);
    }
    let mut data = Vec::new();
    while let Some(frame) = poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await {
        // Trailers are of no interest.
        let Ok(bytes) = frame.map_err(|_| BodyError::Broken)?.into_data() else { continue };
        if data.len() + bytes.len() > limit {
            return Err(BodyError::TooLarge);
        }
        data.extend_from_slice(&bytes);
    }
    Ok(data)
}

fn accepted(location: &str, ttl: i64) -> Response {
    let response = with(StatusCode::CREATED.into_response(), header::LOCATION, location);
    with(response, HeaderName::from_static("ttl"), &ttl.to_string())
}

fn storage_error(error: StoreError) -> Response {
    match error {
        StoreError::Busy => later(StatusCode::SERVICE_UNAVAILABLE, &error.to_string(), BUSY_RETRY),
        StoreError::Full => later(StatusCode::INSUFFICIENT_STORAGE, &error.to_string(), STORAGE_RETRY),
        StoreError::Failed => later(StatusCode::SERVICE_UNAVAILABLE, &error.to_string(), STORAGE_RETRY),
    }
}

fn later(status: StatusCode, reason: &str, wait: Duration) -> Response {
    let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
    with(text(status, reason), header::RETRY_AFTER, &seconds.max(1).to_string())
}

fn wrong_method(allowed: &'static str) -> Response {
    with(text(StatusCode::METHOD_NOT_ALLOWED, &format!("only {allowed}")), header::ALLOW, allowed)
}

fn not_found() -> Response {
    text(StatusCode::NOT_FOUND, "nothing here")
}

fn text(status: StatusCode, reason: &str) -> Response {
    (status, format!("{reason}\n")).into_response()
}

fn with(mut response: Response, name: HeaderName, value: &str) -> Response {
    // Our own values are ASCII, and --public-url was parsed as a URI.
    if let Ok(value) = HeaderValue::from_str(value) {
        response.headers_mut().insert(name, value);
    }
    response
}
