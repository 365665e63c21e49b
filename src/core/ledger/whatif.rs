//! What the profile `tombstone` would do, while `observe` lets all apps run: times in which an app would be held still, paged
//! out or ended, what that would save, and what kept it from that in between.
//!
//! What would be saved is nothing while an app would only be frozen; paged out its anonymous memory less what zram would take for
//! that ([`Compression`]); ended all that counts of its baseline. Time goes by the boot clock, so that a wall clock that is set
//! neither makes nor loses any.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use super::history::{Parts, app_of};
use crate::{
    model::{AppKey, History, HistoryRow, Profile},
    time::{Instant, Now, UnixTime},
    view::{self, WhatIfApp, WhatIfSpan},
};

/// Shorter times are not worth a row.
const LEAST: Duration = Duration::from_secs(1);
/// A time that goes on is written in pieces this long, lest a crash lose all of it.
const PIECE: Duration = Duration::from_secs(3600);
/// Pieces this close to one another are one.
const SEAM: Duration = Duration::from_secs(2);
/// Reasons remembered of each app: those that kept it longest.
const REASONS: usize = 8;
/// How well zram is taken to compress before it has shown that here: less well than most memory of apps is.
const ASSUMED: f64 = 2.0;
const KIB_SECS_PER_MIB_HOUR: f64 = 1024.0 * 3600.0;

/// How well what is paged out is taken to be compressed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Compression {
    /// There is no swap.
    Nowhere,
    /// As well as what is in zram now.
    Measured(f64),
    /// Nothing is in zram yet.
    Assumed,
}

impl Compression {
    /// Before over after; 1: paging out saves nothing.
    pub const fn ratio(self) -> f64 {
        match self {
            Self::Nowhere => 1.0,
            Self::Measured(ratio) => ratio.max(1.0),
            Self::Assumed => ASSUMED,
        }
    }

    /// What paging so many KiB out saves.
    pub fn saves(self, pageable: u64) -> u64 {
        // Within what it is of: rounding may not add to it.
        ((pageable as f64 * (1.0 - 1.0 / self.ratio())) as u64).min(pageable)
    }
}

/// What would be done with all apps now.
#[derive(Clone, Debug, Default)]
pub struct Shadows {
    apps: BTreeMap<AppKey, Shadowed>,
    /// Since when there is anything to observe.
    since: Option<Now>,
}

#[derive(Clone, Debug, Default)]
struct Shadowed {
    span: Option<Span>,
    kept: Option<(Arc<str>, Instant)>,
    /// How long each reason has kept it, those that are over.
    reasons: BTreeMap<Arc<str>, Duration>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Span {
    state: &'static str,
    since: Now,
    reason: Arc<str>,
    saved: u64,
}

impl Span {
    fn row(&self, app: &AppKey, now: Instant) -> Option<HistoryRow> {
        let length = now.since(self.since.boot);
        let what = History::Would {
            app: app.clone(),
            state: self.state.into(),
            reason: Arc::clone(&self.reason),
            saved: self.saved,
        };
        let span = u32::try_from(length.as_secs()).unwrap_or(u32::MAX);
        (length >= LEAST).then_some(HistoryRow { at: self.since.wall, span, what })
    }
}

impl Shadows {
    /// The app is observed, and this is what would be done with it: the state it would be in, why, and what that saves; else
    /// what keeps it from that, as a sentence. What has ended by that is given back.
    pub fn set(
        &mut self,
        app: &AppKey,
        would: Option<(&'static str, Arc<str>, u64)>,
        kept: Option<Arc<str>>,
        now: Now,
    ) -> Option<HistoryRow> {
        self.since.get_or_insert(now);
        let shadowed = self.apps.entry(app.clone()).or_default();
        let kept = kept.filter(|_| would.is_none());
        if shadowed.kept.as_ref().map(|(reason, _)| reason) != kept.as_ref() {
            if let Some((reason, since)) = shadowed.kept.take() {
                shadowed.add(reason, now.boot.since(since));
            }
            shadowed.kept = kept.map(|reason| (reason, now.boot));
        }
        if shadowed.span.as_ref().map(|span| span.state) == would.as_ref().map(|(state, ..)| *state) {
            return None;
        }
        let next = would.map(|(state, reason, saved)| Span { state, since: now, reason, saved });
        let ended = std::mem::replace(&mut shadowed.span, next);
        ended?.row(app, now.boot)
    }

    /// What has gone on for long, up to now; with `all` whatever goes on. It goes on.
    pub fn cut(&mut self, all: bool, now: Now) -> Vec<HistoryRow> {
        let mut rows = Vec::new();
        for (app, shadowed) in &mut self.apps {
            let Some(span) = &mut shadowed.span else { continue };
            if !all && now.boot.since(span.since.boot) < PIECE {
                continue;
            }
            if let Some(row) = span.row(app, now.boot) {
                // Whole seconds are written; what is over goes into the next piece.
                let written = Duration::from_secs(row.span.into());
                span.since = Now { boot: span.since.boot + written, wall: span.since.wall + written };
                rows.push(row);
            }
        }
        rows
    }

    /// What goes on, as if it ended now.
    pub fn live(&self, now: Instant) -> Vec<HistoryRow> {
        let spans = self.apps.iter().filter_map(|(app, shadowed)| Some((app, shadowed.span.as_ref()?)));
        spans.filter_map(|(app, span)| span.row(app, now)).collect()
    }

    /// Nothing is kept of the app any more.
    pub fn remove(&mut self, app: &AppKey) {
        self.apps.remove(app);
    }

    /// What kept the app from being frozen longest.
    fn kept_by(&self, app: &AppKey, now: Instant) -> Option<String> {
        let shadowed = self.apps.get(app)?;
        let mut reasons = shadowed.reasons.clone();
        if let Some((reason, since)) = &shadowed.kept {
            *reasons.entry(Arc::clone(reason)).or_default() += now.since(*since);
        }
        let (reason, _) = reasons.into_iter().max_by_key(|(_, time)| *time)?;
        Some(reason.to_string())
    }
}

impl Shadowed {
    fn add(&mut self, reason: Arc<str>, time: Duration) {
        let sum = self.reasons.entry(reason).or_default();
        *sum = sum.saturating_add(time);
        if self.reasons.len() > REASONS {
            let least = self.reasons.iter().min_by_key(|(_, time)| **time).map(|(reason, _)| Arc::clone(reason));
            least.map(|reason| self.reasons.remove(&reason));
        }
    }
}

/// What is asked about: the time, the apps, and what is in force.
#[derive(Clone, Debug)]
pub struct Window<'a> {
    /// From.
    pub since: UnixTime,
    /// Until.
    pub now: Now,
    /// The profile in force.
    pub profile: Profile,
    /// Apps to be listed, whether anything would have been done with them or not.
    pub apps: Vec<&'a AppKey>,
    /// How well zram is taken to compress.
    pub compression: Compression,
}

impl Shadows {
    /// As a document: `parts` are the rows of the time asked about, with those that go on ([`Shadows::live`]).
    ///
    /// Observed is the time from the first row there is, or from when this daemon began to observe, until now, or the last
    /// row of what would have been done. A daemon that did not run in between observed nothing, which is not known here: the
    /// mean is then too small, never too large.
    pub fn view(&self, parts: &Parts, window: &Window<'_>) -> view::WhatIf {
        let until = window.now.wall;
        let mut spans: BTreeMap<&AppKey, Vec<Piece>> = window.apps.iter().map(|app| (*app, Vec::new())).collect();
        let mut last = window.since;
        for row in parts.rows() {
            let (Some(app), History::Would { state, reason, saved, .. }) = (app_of(&row.what), &row.what) else {
                continue;
            };
            let end = (row.at + Duration::from_secs(row.span.into())).min(until);
            let from = row.at.max(window.since);
            if end <= from {
                continue;
            }
            last = last.max(end);
            let pieces = spans.entry(app).or_default();
            let piece = Piece { from, end, state, reason, saved: *saved };
            match pieces.last_mut() {
                Some(before) if before.goes_on_in(&piece) => before.end = before.end.max(piece.end),
                _ => pieces.push(piece),
            }
        }
        let first = parts.rows().first().map(|row| row.at);
        let observing = self.since.map(|since| since.wall);
        let begun = [first, observing].into_iter().flatten().min().unwrap_or(until).max(window.since);
        let ended = if self.since.is_some() { until } else { last };
        let observed = ended.since(begun);
        let mut apps: Vec<WhatIfApp> = spans
            .into_iter()
            .map(|(app, pieces)| WhatIfApp {
                name: app.to_string(),
                saved_mib_hours: pieces.iter().map(Piece::kib_secs).sum::<f64>() / KIB_SECS_PER_MIB_HOUR,
                spans: pieces.iter().map(Piece::view).collect(),
                kept_by: self.kept_by(app, window.now.boot),
            })
            .collect();
        apps.sort_by(|a, b| a.name.cmp(&b.name));
        let saved_mib_hours = apps.iter().map(|app| app.saved_mib_hours).sum::<f64>();
        let hours = observed.as_secs_f64() / 3600.0;
        view::WhatIf {
            since: window.since.to_string(),
            until: until.to_string(),
            hours,
            profile: window.profile,
            saved_mean: if hours > 0.0 { (saved_mib_hours / hours * 1024.0) as u64 } else { 0 },
            apps,
            saved_mib_hours,
            compression: window.compression.ratio(),
            compression_measured: matches!(window.compression, Compression::Measured(_)),
        }
    }
}

struct Piece<'a> {
    from: UnixTime,
    end: UnixTime,
    state: &'a Arc<str>,
    reason: &'a Arc<str>,
    saved: u64,
}

impl Piece<'_> {
    fn goes_on_in(&self, next: &Self) -> bool {
        self.state == next.state && self.saved == next.saved && next.from.since(self.end) <= SEAM
    }

    fn kib_secs(&self) -> f64 {
        self.saved as f64 * self.end.since(self.from).as_secs_f64()
    }

    fn view(&self) -> WhatIfSpan {
        WhatIfSpan {
            from: self.from.to_string(),
            secs: self.end.since(self.from).as_secs(),
            state: self.state.to_string(),
            reason: self.reason.to_string(),
            saved: self.saved,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::Bus;

    const BUS: Bus = Bus::Session(1000);

    fn at(secs: u64) -> Now {
        Now { boot: Instant::from_nanos(secs * 1_000_000_000), wall: UnixTime::from_secs(1_000_000 + secs) }
    }

    fn key(name: &str) -> AppKey {
        AppKey::new(BUS, name)
    }

    fn view(shadows: &Shadows, rows: &[HistoryRow], apps: &[&AppKey], from: u64, until: u64) -> view::WhatIf {
        let rows = rows.iter().cloned().chain(shadows.live(at(until).boot));
        let parts = Parts::new(rows, |bus| bus == BUS, at(from).wall);
        let window = Window {
            since: at(from).wall,
            now: at(until),
            profile: Profile::Observe,
            apps: apps.to_vec(),
            compression: Compression::Assumed,
        };
        shadows.view(&parts, &window)
    }

    #[test]
    fn a_day_is_told_in_spans_with_their_reasons_and_what_they_save() {
        const HOUR: u64 = 3600;
        let (chat, mail) = (key("org.chat"), key("org.mail"));
        let mut shadows = Shadows::default();
        let mut rows = Vec::new();
        let mut tell = |shadows: &mut Shadows, secs, would: Option<(&'static str, u64)>, kept: Option<&str>| {
            let would = would.map(|(state, saved)| (state, Arc::from(format!("{state} for a reason")), saved));
            rows.extend(shadows.set(&chat, would, kept.map(Arc::from), at(secs)));
            rows.extend(shadows.cut(false, at(secs)));
        };
        tell(&mut shadows, 0, None, Some("somebody looks at it"));
        tell(&mut shadows, HOUR, Some(("frozen", 0)), None);
        tell(&mut shadows, HOUR + 60, Some(("reclaimed", 20 * 1024)), None);
        tell(&mut shadows, HOUR + 600, Some(("tombstone", 60 * 1024)), None);
        tell(&mut shadows, 3 * HOUR, Some(("tombstone", 60 * 1024)), None);
        tell(&mut shadows, 5 * HOUR, None, Some("a message"));
        tell(&mut shadows, 5 * HOUR + 30, Some(("frozen", 0)), None);
        assert_eq!(shadows.set(&mail, None, Some("it plays".into()), at(HOUR)), None);
        let shown = view(&shadows, &rows, &[&chat, &mail], 0, 6 * HOUR);
        let spans: Vec<_> = shown.apps[0].spans.iter().map(|s| (&*s.state, s.secs, s.saved)).collect();
        let long = 5 * HOUR - HOUR - 600;
        let expected = [
            ("frozen", 60, 0),
            ("reclaimed", 540, 20 * 1024),
            ("tombstone", long, 60 * 1024),
            ("frozen", HOUR - 30, 0),
        ];
        assert_eq!(spans, expected, "pieces are one again, and what goes on is there");
        assert_eq!(shown.apps[0].spans[1].reason, "reclaimed for a reason");
        assert_eq!(shown.apps[0].spans[0].from, at(HOUR).wall.to_string());
        let hours = 20.0 * 540.0 / 3600.0 + 60.0 * long as f64 / 3600.0;
        assert!((shown.saved_mib_hours - hours).abs() < 1e-6 && (shown.apps[0].saved_mib_hours - hours).abs() < 1e-6);
        assert_eq!((shown.hours, shown.saved_mean), (6.0, (hours / 6.0 * 1024.0) as u64));
        assert_eq!(shown.apps[0].kept_by.as_deref(), Some("somebody looks at it"), "an hour, and the message 30 s");
        assert_eq!((shown.apps[1].spans.len(), shown.apps[1].kept_by.as_deref()), (0, Some("it plays")));
        assert_eq!((shown.compression, shown.compression_measured), (2.0, false));
        // Of what is older only what reaches into the time asked about.
        let late = view(&shadows, &rows, &[&chat], 4 * HOUR, 6 * HOUR);
        let spans: Vec<_> = late.apps[0].spans.iter().map(|s| (&*s.state, s.secs)).collect();
        assert_eq!((spans, late.hours), (vec![("tombstone", HOUR), ("frozen", HOUR - 30)], 2.0));
    }

    #[test]
    fn what_an_earlier_life_observed_counts_and_what_none_did_does_not() {
        let app = key("org.a");
        let would = |saved| History::Would { app: app.clone(), state: "tombstone".into(), reason: "why".into(), saved };
        let rows = [HistoryRow { at: at(1000).wall, span: 1800, what: would(1024) }];
        let shown = view(&Shadows::default(), &rows, &[], 0, 100_000);
        assert_eq!((shown.hours, shown.saved_mib_hours, shown.saved_mean), (0.5, 0.5, 1024));
        assert_eq!(shown.apps.len(), 1, "it is gone by now, and was there");
        let nothing = view(&Shadows::default(), &[], &[&app], 0, 100_000);
        assert_eq!((nothing.hours, nothing.saved_mean, nothing.apps.len()), (0.0, 0, 1));
        let other = HistoryRow {
            what: History::Would {
                app: AppKey::new(Bus::System, "s"),
                state: "tombstone".into(),
                reason: "".into(),
                saved: 9,
            },
            ..rows[0].clone()
        };
        assert_eq!(view(&Shadows::default(), &[other], &[], 0, 100_000).apps, []);
    }

    #[test]
    fn paging_out_saves_what_zram_does_not_take() {
        for (compression, saves) in [
            (Compression::Nowhere, 0),
            (Compression::Measured(4.0), 750),
            (Compression::Measured(0.5), 0),
            (Compression::Measured(f64::NAN), 0),
            (Compression::Measured(f64::INFINITY), 1000),
            (Compression::Assumed, 500),
        ] {
            assert_eq!(compression.saves(1000), saves, "{compression:?}");
        }
        assert_eq!(Compression::Measured(1e300).saves(u64::MAX), u64::MAX);
    }

    #[test]
    fn reasons_are_few() {
        let app = key("org.a");
        let mut shadows = Shadows::default();
        for n in 0..1000u64 {
            let reason = if n % 2 == 0 { "the long one".to_owned() } else { format!("window {n}") };
            let secs = n / 2 * 11 + if n % 2 == 0 { 0 } else { 10 };
            shadows.set(&app, None, Some(reason.into()), at(secs));
        }
        assert!(shadows.apps[&app].reasons.len() <= REASONS);
        assert_eq!(shadows.kept_by(&app, at(6000).boot).as_deref(), Some("the long one"));
    }

    proptest! {
        #[test]
        fn pieces_lose_no_time(cuts in prop::collection::vec(1u64..20_000, 0..20), end in 1u64..20_000) {
            let app = key("org.a");
            let mut shadows = Shadows::default();
            let mut rows = Vec::new();
            shadows.set(&app, Some(("tombstone", "why".into(), 100)), None, at(0));
            let mut secs = 0;
            for cut in cuts {
                secs += cut;
                rows.extend(shadows.cut(cut % 3 == 0, at(secs)));
            }
            secs += end;
            rows.extend(shadows.set(&app, None, None, at(secs)));
            prop_assert_eq!(rows.iter().map(|row| u64::from(row.span)).sum::<u64>(), secs);
            let shown = view(&shadows, &rows, &[], 0, secs + 10);
            prop_assert_eq!(shown.apps[0].spans.len(), 1);
            prop_assert_eq!(shown.apps[0].spans[0].secs, secs);
        }
    }
}
