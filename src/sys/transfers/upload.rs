//! One attempt at an upload, from the first byte: HTTP has no way to go on with one that all servers know.

use std::{
    fs::File,
    io::{self, Read},
    time::Instant,
};

use http::header;
use ureq::SendBody;

use super::{Pace, Stop, Worker, request};
use crate::{
    event::Event,
    sys::inbox::Sender,
    transfer::{ANSWER_MAX, Attempted, TransferEvent, TransferId},
};

pub(super) fn attempt(worker: &Worker) -> Attempted {
    let attempt = &worker.attempt;
    let size = attempt.wish.size.unwrap_or_default();
    if attempt.metered.is_some_and(|most| size > most) {
        return Attempted::Metered;
    }
    let length = [(header::CONTENT_LENGTH, size.to_string())];
    let content = || -> io::Result<Option<SendBody<'_>>> {
        let file = worker.spool.read(attempt.id)?;
        if file.metadata()?.len() != size {
            return Err(io::Error::other("its content is not there any more"));
        }
        let (id, stop, sender) = (attempt.id, worker.stop.clone(), worker.sender.clone());
        Ok(Some(SendBody::from_owned_reader(Content {
            id,
            file,
            sent: 0,
            pace: Pace::new(0, Instant::now()),
            stop,
            sender,
        })))
    };
    let answer = match request::send(worker, &length, content) {
        Ok(answer) => answer,
        Err(trouble) => return trouble.ended(worker, 0),
    };
    if answer.status().is_redirection() {
        return Attempted::Failed(
            format!("{}, which leads nowhere an upload can follow", request::status(&answer)).into(),
        );
    }
    if !answer.status().is_success() {
        return request::refused(&answer, 0);
    }
    let text = answer.status().to_string();
    // The server has it: whatever becomes of the answer's body.
    let mut body = Vec::new();
    let read = answer.into_body().into_reader().take(ANSWER_MAX).read_to_end(&mut body);
    let kept = read.and_then(|_| worker.spool.keep_answer(attempt.id, &body));
    if let Err(error) = kept {
        log::debug!("transfer {}: the server's answer is lost: {error}", attempt.id.0);
        let _ = worker.spool.keep_answer(attempt.id, &[]);
    }
    Attempted::Done { bytes: body.len() as u64, text: text.into() }
}

/// The content, as it is read to be sent.
struct Content {
    id: TransferId,
    file: File,
    sent: u64,
    pace: Pace,
    stop: Stop,
    sender: Sender,
}

impl Read for Content {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.stop.is_asked() {
            return Err(io::Error::other("it was stopped"));
        }
        let now = Instant::now();
        if !self.pace.is_enough(self.sent, now) {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the server takes next to nothing"));
        }
        let count = self.file.read(buffer)?;
        self.sent += count as u64;
        if self.pace.is_report_due(now) {
            let progress = TransferEvent::Progress { bytes: self.sent, good: 0 };
            self.sender.event(Event::Transfer(self.id, progress));
        }
        Ok(count)
    }
}
