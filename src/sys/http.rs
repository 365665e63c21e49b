//! HTTP requests to upstreams, on a worker thread.

pub(super) mod client;
pub(super) mod resolver;
#[cfg(test)]
pub(super) mod stand_in;

use std::{
    io::Read,
    time::{Duration, Instant},
};

use http::{Method, Uri, header};

use self::client::Client;
use crate::{
    action::HttpRequest,
    config::{Proxy, UpstreamSettings},
    event::{Event, HttpError, HttpResponse, HttpTicket},
    sys::{inbox, jobs::Jobs},
};

/// From the core's word to its answer.
const LIMIT: Duration = Duration::from_secs(30);

/// Makes `request` to `upstream`, through `proxy` where there is one to go through, and reports `Event::Http` with
/// `ticket`. Credentials and certificates are the upstream's; redirects are followed on its own host only.
///
/// The event itself when too much is waiting already: it is then for the caller to pass on.
#[must_use]
pub fn request(
    jobs: &Jobs,
    sender: &inbox::Sender,
    ticket: HttpTicket,
    upstream: &UpstreamSettings,
    proxy: &Proxy,
    request: HttpRequest,
) -> Option<Event> {
    let deadline = Instant::now() + LIMIT;
    let (upstream, proxy, worker) = (upstream.clone(), proxy.clone(), sender.clone());
    let taken = jobs.run(move || {
        let result = perform(&Client { upstream: &upstream, proxy: &proxy, deadline }, &request);
        worker.event(Event::Http(ticket, result));
    });
    let failed = || Event::Http(ticket, Err(HttpError::Failed("too much is waiting to be done".into())));
    (!taken).then(failed)
}

fn perform(client: &Client<'_>, request: &HttpRequest) -> Result<HttpResponse, HttpError> {
    let failed = HttpError::Failed;
    let url = format!("{}{}", client.upstream.http_url(), request.path);
    let uri: Uri = url.parse().map_err(|error| failed(format!("\"{url}\" is not a URL: {error}")))?;
    let method: Method = request.method.parse().map_err(|_| failed(format!("\"{}\" is no method", request.method)))?;
    let response = client.send(method, uri, request.json.as_deref()).map_err(failed)?;
    let retry_after = response
        .headers()
        .get(header::RETRY_AFTER)
        .and_then(|value| value.to_str().ok()?.trim().parse().ok())
        .map(Duration::from_secs);
    let status = response.status().as_u16();
    let mut bytes = Vec::new();
    let most = u64::from(request.limit);
    let read = response.into_body().into_reader().take(most + 1).read_to_end(&mut bytes);
    read.map_err(|error| failed(format!("its answer broke off: {error}")))?;
    if bytes.len() as u64 > most {
        return Err(HttpError::Unusable(format!("it has more than {most} bytes")));
    }
    let body = String::from_utf8(bytes).map_err(|_| HttpError::Unusable("it is not text (UTF-8)".into()))?;
    Ok(HttpResponse { status, body, retry_after })
}

#[cfg(test)]
mod tests;
