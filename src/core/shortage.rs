//! When memory is short, one frozen app after the other goes deeper (`pressure` says which).

use super::{
    Core,
    lifecycle::Squeeze,
    pressure::{Candidate, Deep},
};
use crate::{model::Pressure, time::Now};

impl Core {
    /// Memory was read: one frozen app goes deeper, if it must.
    pub(super) fn pressed(&mut self, reading: &Pressure, now: Now) {
        if self.ending.is_some() {
            return;
        }
        let mut busy = self.lifecycle.is_ending_any();
        let (mut held, mut going) = (Vec::new(), Vec::new());
        for app in self.lifecycle.held() {
            busy |= app.paging;
            going.extend(app.going.map(|_| app.app.clone()));
            held.push(Candidate {
                frozen: app.since,
                unseen: app.unseen.unwrap_or(app.since),
                uss: app.uss,
                paged_out: app.paged_out,
                can_page_out: app.can_page_out,
                can_end: app.can_end,
                app: app.app,
            });
        }
        let was_pressed = self.pressure.is_pressed();
        let order = self.pressure.read(reading, &held, busy, now.boot);
        match (was_pressed, self.pressure.is_pressed()) {
            (false, true) => log::info!("{}", self.pressure.sentence()),
            (true, false) => {
                log::info!("{}", self.pressure.sentence());
                for app in going {
                    self.lifecycle.unsqueeze(&app, now);
                }
            }
            _ => {}
        }
        if let Some(order) = order {
            let squeeze = match order.deep {
                Deep::PageOut => Squeeze::PageOut,
                Deep::End => Squeeze::Kill,
            };
            self.lifecycle.squeeze(&order.app, squeeze, &order.reason, now);
        }
    }
}
