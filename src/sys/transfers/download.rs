//! One attempt at a download: from where the last one has come to, if the server still has the same version and gives parts.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom, Write},
    sync::Arc,
    time::{Duration, Instant},
};

use http::{HeaderMap, Response, StatusCode, header};
use ring::digest;
use ureq::Body;

use super::{CHUNK, Pace, Worker, request};
use crate::{
    sys::clock,
    transfer::{Attempted, TransferEvent},
};

/// Written to the disk each time so much has come: what a power cut can cost.
const SYNC: u64 = 16 * 1024 * 1024;
/// A date tells one version from another only if it is this much older than the answer (RFC 9110 §8.8.2.2).
const OLD_ENOUGH: Duration = Duration::from_secs(60);

pub(super) fn attempt(worker: &Worker) -> Attempted {
    try_it(worker).unwrap_or_else(|error| match is_full(&error) {
        true => Attempted::NoRoom { bytes: worker.attempt.progress.good },
        false => worker.later(worker.attempt.progress.good, &format!("the spool cannot be used: {error}")),
    })
}

fn try_it(worker: &Worker) -> io::Result<Attempted> {
    let progress = &worker.attempt.progress;
    let (id, version) = (worker.attempt.id, progress.validator.as_deref());
    let (file, have, version) = worker.spool.resume(id, progress.good, version)?;
    if have > 0
        && let Some(version) = version
    {
        if progress.total == Some(have) && progress.validator.as_ref() == Some(&version) {
            return finish(worker, &file, have, "it was complete already");
        }
        let part = [(header::RANGE, format!("bytes={have}-")), (header::IF_RANGE, version.to_string())];
        let answer = match request::send(worker, &part, || Ok(None)) {
            Ok(answer) => answer,
            Err(trouble) => return Ok(trouble.ended(worker, have)),
        };
        match answer.status() {
            StatusCode::PARTIAL_CONTENT => {
                let told = validator(answer.headers());
                let same = told.is_none_or(|told| told == version) && !is_many(answer.headers());
                if let (true, Some((from, total))) = (same, content_range(answer.headers()))
                    && from == have
                {
                    return receive(worker, file, have, total, Some(version), answer);
                }
            }
            status if status.is_success() => return whole(worker, answer),
            StatusCode::RANGE_NOT_SATISFIABLE => {}
            _ => return Ok(request::refused(&answer, have)),
        }
        // What it gives does not go with what is there.
        log::debug!("transfer {}: begun again from the start", id.0);
    }
    match request::send(worker, &[], || Ok(None)) {
        Ok(answer) if answer.status() == StatusCode::PARTIAL_CONTENT => {
            Ok(Attempted::Failed("the server sent a part of the file that was not asked for".into()))
        }
        Ok(answer) if answer.status().is_success() => whole(worker, answer),
        Ok(answer) => Ok(request::refused(&answer, 0)),
        Err(trouble) => Ok(trouble.ended(worker, have)),
    }
}

/// From the first byte.
fn whole(worker: &Worker, answer: Response<Body>) -> io::Result<Attempted> {
    let version = validator(answer.headers());
    let total = answer.body().content_length();
    let file = worker.spool.restart(worker.attempt.id, version.as_deref())?;
    receive(worker, file, 0, total, version, answer)
}

fn receive(
    worker: &Worker,
    mut file: File,
    have: u64,
    total: Option<u64>,
    version: Option<Arc<str>>,
    answer: Response<Body>,
) -> io::Result<Attempted> {
    let attempt = &worker.attempt;
    let too_large = || {
        Ok(Attempted::Failed(format!("it has more than {} bytes, which is the most it may have", attempt.most).into()))
    };
    if total.is_some_and(|total| total > attempt.most) {
        return too_large();
    }
    let text = answer.status().to_string();
    worker.tell(TransferEvent::Begun { total, validator: version.clone() });
    worker.tell(TransferEvent::Progress { bytes: have, good: have.min(attempt.progress.good) });
    let left = total.map(|total| total.saturating_sub(have));
    if attempt.metered.zip(left).is_some_and(|(most, left)| left > most) {
        return Ok(Attempted::Metered);
    }
    if left.is_some_and(|left| left > worker.spool.room()) {
        return Ok(Attempted::NoRoom { bytes: have });
    }
    let mut body = answer.into_body().into_reader();
    let mut buffer = vec![0; CHUNK];
    let (mut bytes, mut good, mut pace) = (have, have.min(attempt.progress.good), Pace::new(have, Instant::now()));
    let ended = loop {
        if worker.stop.is_asked() {
            break Err(Attempted::Stopped { bytes });
        }
        match body.read(&mut buffer) {
            Ok(0) => break Ok(()),
            Ok(count) => {
                let after = bytes + count as u64;
                if after > attempt.most {
                    return too_large();
                }
                // What nobody has said the size of.
                if left.is_none() && attempt.metered.is_some_and(|most| after - have > most) {
                    break Err(Attempted::Metered);
                }
                file.write_all(&buffer[..count])?;
                bytes = after;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => break Err(worker.later(bytes, &format!("the connection broke: {error}"))),
        }
        let now = Instant::now();
        if !pace.is_enough(bytes, now) {
            break Err(worker.later(bytes, "the server sends next to nothing"));
        }
        if bytes - good >= SYNC {
            file.sync_data()?;
            good = bytes;
            worker.tell(TransferEvent::Progress { bytes, good });
            if worker.spool.room() == 0 {
                break Err(Attempted::NoRoom { bytes });
            }
        } else if pace.is_report_due(now) {
            worker.tell(TransferEvent::Progress { bytes, good });
        }
    };
    if let Err(attempted) = ended {
        file.sync_data()?;
        let kept = if version.is_some() { bytes } else { 0 };
        worker.tell(TransferEvent::Progress { bytes: kept, good: kept });
        return Ok(match attempted {
            Attempted::Later { after, text, .. } => Attempted::Later { bytes: kept, after, text },
            Attempted::Stopped { .. } => Attempted::Stopped { bytes: kept },
            Attempted::NoRoom { .. } => Attempted::NoRoom { bytes: kept },
            other => other,
        });
    }
    if total.is_some_and(|total| total != bytes) {
        return Ok(worker.later(bytes, "the server's answer ended early"));
    }
    finish(worker, &file, bytes, &text)
}

fn finish(worker: &Worker, file: &File, bytes: u64, text: &str) -> io::Result<Attempted> {
    worker.spool.sync(file)?;
    if let Some(wanted) = &worker.attempt.wish.sha256 {
        let found = sha256(worker)?;
        if found != **wanted {
            return Ok(Attempted::Failed(format!("it is not what was wanted: its SHA-256 is {found}").into()));
        }
    }
    Ok(Attempted::Done { bytes, text: text.into() })
}

fn sha256(worker: &Worker) -> io::Result<String> {
    let mut file = worker.spool.read(worker.attempt.id)?;
    file.seek(SeekFrom::Start(0))?;
    let mut context = digest::Context::new(&digest::SHA256);
    let mut buffer = vec![0; CHUNK];
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            count => context.update(&buffer[..count]),
        }
    }
    Ok(context.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// What tells this version from every other: a strong ETag, or a date that is old enough. At most 512 bytes.
fn validator(headers: &HeaderMap) -> Option<Arc<str>> {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok()).map(str::trim);
    if let Some(tag) = text(header::ETAG) {
        let strong = tag.len() >= 2 && tag.starts_with('"') && tag.ends_with('"') && tag.len() <= 512;
        return strong.then(|| tag.into());
    }
    let (changed, date) = (text(header::LAST_MODIFIED)?, text(header::DATE)?);
    let age = clock::http_date(date)?.since(clock::http_date(changed)?);
    (age >= OLD_ENOUGH).then(|| changed.into())
}

/// Several parts at once, which nobody asked for.
fn is_many(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    kind.trim_start().to_ascii_lowercase().starts_with("multipart/byteranges")
}

/// `bytes FROM-TO/TOTAL`: from where, and how much in all.
fn content_range(headers: &HeaderMap) -> Option<(u64, Option<u64>)> {
    let value = headers.get(header::CONTENT_RANGE)?.to_str().ok()?.trim();
    let (range, total) = value.strip_prefix("bytes ")?.split_once('/')?;
    let (from, to) = range.trim().split_once('-')?;
    let (from, to): (u64, u64) = (from.parse().ok()?, to.parse().ok()?);
    let total = match total.trim() {
        "*" => None,
        total => Some(total.parse().ok()?),
    };
    // One that stops short of the end would be asked for again and again.
    (from <= to && total.is_none_or(|total: u64| to.checked_add(1) == Some(total))).then_some((from, total))
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(all: &[(header::HeaderName, &str)]) -> HeaderMap {
        all.iter().map(|(name, value)| (name.clone(), value.parse().unwrap())).collect()
    }

    #[test]
    fn only_what_surely_tells_versions_apart_is_believed() {
        const DATE: &str = "Sun, 06 Nov 1994 08:49:37 GMT";
        let of = |all: &[_]| validator(&headers(all));
        assert_eq!(of(&[(header::ETAG, "\"x\"")]).as_deref(), Some("\"x\""));
        assert_eq!(of(&[(header::ETAG, "W/\"x\""), (header::LAST_MODIFIED, DATE), (header::DATE, DATE)]), None);
        assert_eq!(of(&[(header::ETAG, "x")]), None);
        let of = |changed, date| of(&[(header::LAST_MODIFIED, changed), (header::DATE, date)]);
        assert_eq!(of(DATE, "Sun, 06 Nov 1994 08:50:37 GMT").as_deref(), Some(DATE));
        assert_eq!(of(DATE, "Sun, 06 Nov 1994 08:50:36 GMT"), None);
        assert_eq!(of("yesterday", DATE), None);
    }

    #[test]
    fn parts_are_read_and_odd_ones_are_not_used() {
        let of = |value| content_range(&headers(&[(header::CONTENT_RANGE, value)]));
        assert_eq!(of("bytes 5-9/10"), Some((5, Some(10))));
        assert_eq!(of("bytes 5-9/*"), Some((5, None)));
        for odd in ["bytes 5-8/10", "bytes 9-5/10", "bytes */10", "items 5-9/10", "bytes 5-18446744073709551615/*x", ""]
        {
            assert_eq!(of(odd), None, "{odd}");
        }
    }
}
