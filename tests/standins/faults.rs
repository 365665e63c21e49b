//! Faults that can be ordered from a stand-in.

use std::{collections::VecDeque, sync::Mutex};

use super::http::{Answer, Request};

/// Answers to give in the place of the right ones.
#[derive(Debug, Default)]
pub(crate) struct Faults(Mutex<VecDeque<(String, Answer)>>);

impl Faults {
    /// The next request that begins like this (`"PUT app/"`) gets this answer, and nothing is done.
    pub(crate) fn order(&self, beginning: &str, answer: Answer) {
        self.0.lock().unwrap().push_back((beginning.to_owned(), answer));
    }

    /// The fault ordered for this request.
    pub(crate) fn take(&self, request: &Request, below: &str) -> Option<Answer> {
        let path = request.path.strip_prefix(below).unwrap_or(&request.path);
        let line = format!("{} {path}", request.method);
        let mut faults = self.0.lock().unwrap();
        let at = faults.iter().position(|(beginning, _)| line.starts_with(beginning))?;
        faults.remove(at).map(|(_, answer)| answer)
    }

    pub(crate) fn left(&self) -> usize {
        self.0.lock().unwrap().len()
    }
}
