//! How far it is: drawn on a terminal, elsewhere a line on standard error for each thing begun, so that hours of work show in
//! a log as well.

use std::{
    io::{IsTerminal, Write, stderr},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};

pub(super) struct Progress {
    /// On a terminal.
    bar: Option<ProgressBar>,
    began: Instant,
}

const TICK: Duration = Duration::from_millis(200);

impl Progress {
    /// `steps`: how many there will be, 0 when nobody knows.
    pub(super) fn new(steps: usize) -> Self {
        let bar = stderr().is_terminal().then(|| drawn(u64::try_from(steps).unwrap_or(u64::MAX)));
        Self { bar, began: Instant::now() }
    }

    /// Tells what is begun.
    pub(super) fn say(&self, what: String) {
        match &self.bar {
            Some(bar) => bar.set_message(what),
            None => self.line(&what),
        }
    }

    /// Tells what has come out, which stays on the terminal.
    pub(super) fn tell(&self, what: &str) {
        match &self.bar {
            Some(bar) => bar.println(what),
            None => self.line(what),
        }
    }

    /// One step is done.
    pub(super) fn step(&self) {
        if let Some(bar) = &self.bar {
            bar.inc(1);
        }
    }

    fn line(&self, what: &str) {
        // Who does not listen any more is no reason to stop.
        let _ = writeln!(stderr(), "nightporter measure: {:>6} s: {what}", self.began.elapsed().as_secs());
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn drawn(steps: u64) -> ProgressBar {
    let bar = ProgressBar::new(steps);
    let template = if steps > 0 { "{spinner} {msg:<64} {bar:20} {elapsed}" } else { "{spinner} {msg:<64} {elapsed}" };
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.enable_steady_tick(TICK);
    bar
}
