//! Documents of the ledger as a phone with a dozen apps would have them. The figures are made up.

use nightporter::{
    model::{Memory, Profile, Total, ZramSource},
    time::UnixTime,
    view::{
        Account, AppAt, AppHistory, History, LedgerRow, Report, TotalAt, WakeAt, WakeStats, WhatIf, WhatIfApp,
        WhatIfSpan,
    },
};

/// 22 November 2026, 11:36 UTC.
const UNTIL: u64 = 1_795_347_360;
const DAY: u64 = 86_400;
const STEP: u64 = 600;

/// Name, what it costs resident in MiB, messages a day, whether it is ended at last.
const APPS: [(&str, u64, u64, bool); 12] = [
    ("de.schmidhuberj.Flare", 96, 30, true),
    ("dev.geopjr.Tuba", 88, 14, true),
    ("im.dino.Dino", 84, 60, true),
    ("im.fluffychat.Fluffychat", 231, 40, true),
    ("io.github.nokse22.inspector", 41, 2, true),
    ("org.gnome.Evolution-calendar", 58, 6, false),
    ("org.gnome.Fractal", 212, 70, false),
    ("org.gnome.Geary", 126, 26, true),
    ("org.kde.neochat", 148, 50, false),
    ("org.kde.tokodon", 112, 18, true),
    ("org.telegram.desktop", 236, 90, false),
    ("sm.puri.Chatty", 61, 12, false),
];

/// Repeats itself, and looks as if it did not.
struct Dice(u64);

impl Dice {
    fn next(&mut self, most: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % most.max(1)
    }
}

fn utc(secs: u64) -> String {
    UnixTime::from_secs(secs).to_string()
}

fn memory(pss: u64) -> Memory {
    Memory { pss, uss: pss * 9 / 10, swap: 0 }
}

/// An app at some time after a message: state, PSS and zram in KiB.
fn settled(resident: u64, since: u64, ends: bool) -> (&'static str, u64, u64) {
    match since {
        0..600 => ("frozen", resident, 0),
        600..1800 => ("reclaimed", resident / 14, resident * 3 / 10),
        _ if ends => ("tombstone", 0, 0),
        _ => ("reclaimed", resident / 20, resident * 3 / 10),
    }
}

pub(crate) fn history() -> History {
    let mut dice = Dice(6);
    let begin = UNTIL - DAY;
    let mut history = History { since: utc(begin), until: utc(UNTIL), ..History::default() };
    let mut totals = vec![Total::default(); usize::try_from(DAY / STEP).unwrap()];
    for (name, mib, messages, ends) in APPS {
        let resident = mib * 1024;
        // Nobody writes at night.
        let mut times: Vec<u64> =
            (0..messages).map(|_| begin + dice.next(DAY)).filter(|at| !(0..6).contains(&(at % DAY / 3600))).collect();
        times.sort_unstable();
        let mut app = AppHistory { name: name.into(), points: Vec::new() };
        for (index, total) in totals.iter_mut().enumerate() {
            let at = begin + u64::try_from(index).unwrap() * STEP;
            // The daemon was started two hours into the day.
            let last = times.iter().rev().find(|time| **time <= at).copied().unwrap_or(begin);
            let started = begin + 7200;
            let (state, pss, zram) = match at < started {
                true => ("background", resident, 0),
                false => settled(resident, at - last.max(started), ends),
            };
            app.points.push(AppAt {
                at,
                span: 0,
                state: state.into(),
                pss: Some(pss),
                zram,
                saved: Some(i64::try_from(resident).unwrap() - i64::try_from(pss + zram).unwrap()),
            });
            total.apps += 1;
            total.running += u32::from(state != "tombstone");
            total.resident += resident;
            total.now += pss;
            total.zram += zram;
            total.messages +=
                u32::try_from(times.iter().filter(|time| (at..at + STEP).contains(time)).count()).unwrap();
        }
        let mut before = begin;
        for at in times {
            let from = match at - before {
                _ if at < begin + 7200 => "running",
                0..60 => "running",
                60..600 => "frozen",
                600..1800 => "reclaimed",
                _ if ends => "tombstone",
                _ => "reclaimed",
            };
            before = at;
            let (least, most) = match from {
                "running" => (2, 9),
                "frozen" => (4, 24),
                "reclaimed" => (38, 260),
                _ => (340, 1900),
            };
            // Three dice: most are in the middle.
            let spread = (0..3).map(|_| dice.next(most)).sum::<u64>() / 3;
            let took_ms = u32::try_from(least + spread).unwrap();
            history.wakes.push(WakeAt { at, name: name.into(), from: from.into(), took_ms });
        }
        history.apps.push(app);
    }
    history.wakes.sort_by_key(|wake| wake.at);
    for (index, mut total) in totals.into_iter().enumerate() {
        total.daemon = 3_180;
        total.connections = 1;
        total.replaced = 12;
        history.totals.push(TotalAt { at: begin + u64::try_from(index).unwrap() * STEP, span: 0, total });
    }
    history
}

pub(crate) fn report(profile: Profile) -> Report {
    let mut rows = Vec::new();
    let (mut resident, mut now, mut zram) = (0, 0, 0);
    let past = history();
    for (name, mib, messages, _) in APPS {
        let app = past.apps.iter().find(|app| app.name == name).unwrap();
        let last = app.points.last().unwrap();
        let baseline = mib * 1024;
        let pss = last.pss.unwrap();
        resident += baseline;
        now += pss;
        zram += last.zram;
        rows.push(LedgerRow {
            name: name.into(),
            state: last.state.clone(),
            resident: Some(memory(baseline)),
            measured: Some("2026-11-20T07:02:00Z".into()),
            conditions: Some("in the background for 10 s".into()),
            frozen: Some(memory(baseline)),
            paged_out: Some(memory(baseline / 14)),
            now: Some(memory(pss)),
            charged: None,
            zram: last.zram,
            zram_source: (last.zram > 0).then_some(ZramSource::Measured),
            saved: last.saved,
            cache: 0,
            drift: 0,
            kernel: 0,
            saved_mib_hours: if profile == Profile::Observe {
                0.0
            } else {
                f64::from(u32::try_from(mib).unwrap()) * 38.5
            },
            wakes: messages,
            wake_cpu_ms: messages * 41,
            wake_faults: messages * 130,
        });
    }
    rows.push(LedgerRow {
        name: "org.example.JustInstalled".into(),
        state: "background".into(),
        resident: None,
        measured: None,
        conditions: None,
        frozen: None,
        paged_out: None,
        now: Some(memory(33_000)),
        saved: None,
        wakes: 0,
        saved_mib_hours: 0.0,
        zram: 0,
        zram_source: None,
        wake_cpu_ms: 0,
        wake_faults: 0,
        ..rows[0].clone()
    });
    rows.sort_by(|a, b| a.name.cmp(&b.name));
    let (daemon, sockets) = (2_980, 200);
    let stats = |from: &str, count, p50_ms, p95_ms, max_ms, cpu_ms, faults| WakeStats {
        from: from.into(),
        count,
        p50_ms,
        p95_ms,
        max_ms,
        cpu_ms,
        faults,
    };
    Report {
        at: utc(UNTIL),
        profile,
        apps: rows,
        daemon: memory(daemon),
        sockets,
        zram,
        zram_source: Some(ZramSource::Measured),
        resident,
        now,
        saved: i64::try_from(resident).unwrap() - i64::try_from(now + zram + daemon + sockets).unwrap(),
        cache: 0,
        drift: 0,
        kernel: 0,
        unmeasured: 1,
        account: Some(Account {
            since: "2026-11-20T06:12:00Z".into(),
            hours: 53.4,
            saved_mib_hours: if profile == Profile::Observe { 0.0 } else { 57_480.2 },
            connections: 1,
            connections_replaced: 12,
            heartbeats: 641,
            heartbeats_replaced: 7_690,
            daemon_cpu_ms: 8_412,
            wakes: vec![
                stats("running", 214, 4, 9, 12, 2_140, 0),
                stats("frozen", 143, 12, 20, 26, 3_003, 12),
                stats("reclaimed", 201, 126, 231, 288, 17_085, 96_480),
                stats("tombstone", 88, 961, 1_704, 2_105, 81_312, 41_008),
            ],
        }),
    }
}

/// The day as observed: each app would have been frozen after a while, paged out and ended.
pub(crate) fn what_if() -> WhatIf {
    let mut dice = Dice(11);
    let begin = UNTIL - DAY;
    let mut apps: Vec<WhatIfApp> = Vec::new();
    for (name, mib, messages, _) in APPS {
        let mut app = WhatIfApp { name: name.into(), ..WhatIfApp::default() };
        if name == "sm.puri.Chatty" {
            app.kept_by = Some("it has a tray item, so it may have something to show at any time".into());
            apps.push(app);
            continue;
        }
        let mut at = begin + dice.next(3600);
        while at + 60 < UNTIL {
            let until = (at + 1800 + dice.next(2 * DAY / messages.clamp(4, 30))).min(UNTIL);
            for (state, from, to, reason, saved) in [
                ("frozen", at, at + 60, "in the background for 10 s", 0),
                ("reclaimed", at + 60, at + 660, "frozen for 60 s", mib * 1024 * 2 / 3),
                ("tombstone", at + 660, until, "frozen for 10 min", mib * 1024),
            ] {
                let secs = to.min(until).saturating_sub(from);
                app.saved_mib_hours += saved as f64 / 1024.0 * secs as f64 / 3600.0;
                app.spans.push(WhatIfSpan { from: utc(from), secs, state: state.into(), reason: reason.into(), saved });
            }
            at = until + 40 + dice.next(1500);
        }
        apps.push(app);
    }
    let saved_mib_hours: f64 = apps.iter().map(|app| app.saved_mib_hours).sum();
    WhatIf {
        since: utc(begin),
        until: utc(UNTIL),
        hours: 24.0,
        profile: Profile::Observe,
        apps,
        saved_mib_hours,
        saved_mean: (saved_mib_hours / 24.0 * 1024.0) as u64,
        compression: 3.1,
        compression_measured: true,
    }
}
