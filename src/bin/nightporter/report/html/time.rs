//! What there was over time: memory, stacked, below what it would be with every app resident; and messages.

use nightporter::{
    model::Profile,
    view::{History, TotalAt},
};

use super::{
    super::{
        series::{Point, Window, means, sums},
        units::{clock, count, date, float, size},
    },
    chart::{Chart, area, legend, line, rectangle},
    markup::Markup,
    scale::{Linear, times},
};

/// Parts of the window that are drawn as one each.
const PARTS: usize = 144;
/// Parts a pointer is told about, and bars of messages.
const BARS: usize = 48;

pub(super) fn memory(page: &mut Markup, history: &History, window: Window, profile: Profile) {
    let totals = &history.totals;
    if totals.is_empty() {
        page.leaf("p", &[("class", &"none")], "Nothing was recorded in this time.");
        return;
    }
    let mib = |parts: usize, pick: &dyn Fn(&TotalAt) -> u64| {
        let points: Vec<Point> = totals
            .iter()
            .map(|row| Point { at: row.at, span: row.span, value: Some(float(pick(row)) / 1024.0) })
            .collect();
        means(&points, window, parts)
    };
    let now = mib(PARTS, &|row| row.total.now);
    let with_zram = mib(PARTS, &|row| row.total.now.saturating_add(row.total.zram));
    let all = mib(PARTS, &|row| after(row));
    let resident = mib(PARTS, &|row| row.total.resident);
    let most = all.iter().chain(&resident).flatten().copied().fold(0.0, f64::max);
    let scale = Linear::to(most);
    let at = |values: &[Option<f64>]| -> Vec<Option<f64>> {
        values.iter().map(|value| value.map(|value| scale.position(value))).collect()
    };
    let (now, with_zram, all, resident) = (at(&now), at(&with_zram), at(&all), at(&resident));
    let ground: Vec<Option<f64>> = now.iter().map(|value| value.map(|_| 0.0)).collect();
    let mut entries =
        vec![("line", "each app resident"), ("now", "apps"), ("zram", "zram"), ("daemon", "Night Porter")];
    if profile != Profile::Observe {
        entries.push(("saved", "less than resident"));
    }
    legend(page, &entries);
    page.leaf("p", &[("class", &"unit")], "MiB");
    let marks = scale.marks();
    let chart = Chart { label: "Memory of all apps over time", class: "tall", left: &marks, below: &times(window) };
    chart.draw(page, |page| {
        if profile != Profile::Observe {
            let upper: Vec<Option<f64>> =
                all.iter().zip(&resident).map(|(all, resident)| all.zip(*resident).map(|(a, b)| a.max(b))).collect();
            area(page, "saved", &all, &upper);
        }
        area(page, "now", &ground, &now);
        area(page, "zram", &now, &with_zram);
        area(page, "daemon", &with_zram, &all);
        line(page, "resident", &resident);
        told(page, history, window);
    });
}

pub(super) fn messages(page: &mut Markup, history: &History, window: Window) {
    let received: Vec<Point> = history
        .totals
        .iter()
        .map(|row| Point { at: row.at, span: row.span, value: Some(f64::from(row.total.messages)) })
        .collect();
    let delivered: Vec<Point> =
        history.wakes.iter().map(|wake| Point { at: wake.at, span: 0, value: Some(1.0) }).collect();
    let any = received.iter().any(|point| point.value > Some(0.0));
    let (bars, what) = match any {
        true => (sums(&received, window, BARS), "received"),
        false => (sums(&delivered, window, BARS), "delivered"),
    };
    let all: f64 = bars.iter().sum();
    if all <= 0.0 {
        page.leaf("p", &[("class", &"none")], "No messages came in this time.");
        return;
    }
    let each = window.secs() / parts(BARS);
    let unit = format!("{what} in {} each, {} in all", crate::render::duration(each), whole(all));
    page.leaf("p", &[("class", &"unit")], unit);
    let scale = Linear::to(bars.iter().copied().fold(4.0, f64::max));
    let marks = scale.marks();
    let chart = Chart { label: "Messages over time", class: "short", left: &marks, below: &times(window) };
    chart.draw(page, |page| {
        for (index, (bar, x)) in bars.iter().zip(starts()).enumerate() {
            let height = scale.position(*bar);
            if height > 0.0 {
                let text = format!("{}: {}", moment(window, index), whole(*bar));
                rectangle(page, "message", (x + 0.15 / f64::from(48u8), 0.7 / 48.0), (1.0 - height, height), &text);
            }
        }
    });
}

/// Figures for who points at the chart.
fn told(page: &mut Markup, history: &History, window: Window) {
    let of = |pick: fn(&TotalAt) -> u64| {
        let points: Vec<Point> = history
            .totals
            .iter()
            .map(|row| Point { at: row.at, span: row.span, value: Some(float(pick(row))) })
            .collect();
        means(&points, window, BARS)
    };
    let figures =
        [of(|row| row.total.now), of(|row| row.total.zram), of(|row| row.total.daemon), of(|row| row.total.resident)];
    for (index, x) in starts().enumerate() {
        let [Some(now), Some(zram), Some(daemon), Some(resident)] = figures.each_ref().map(|figure| figure[index])
        else {
            continue;
        };
        let [now, zram, daemon, resident] = [now, zram, daemon, resident].map(|kib| size(rounded(kib)));
        let text =
            format!("{}: apps {now}, zram {zram}, Night Porter {daemon}; resident {resident}", moment(window, index));
        rectangle(page, "hit", (x, 1.0 / 48.0), (0.0, 1.0), &text);
    }
}

fn after(row: &TotalAt) -> u64 {
    row.total.now.saturating_add(row.total.zram).saturating_add(row.total.daemon)
}

/// Where the bars begin, 0 to 1.
fn starts() -> impl Iterator<Item = f64> {
    (0..48u8).map(|index| f64::from(index) / 48.0)
}

fn moment(window: Window, index: usize) -> String {
    let at = window.from.saturating_add((window.secs() / parts(BARS)).saturating_mul(parts(index)));
    format!("{} {} UTC", date(at, false), clock(at))
}

fn parts(count: usize) -> u64 {
    u64::try_from(count).unwrap_or(u64::MAX)
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it saturates")]
fn rounded(figure: f64) -> u64 {
    figure.round() as u64
}

fn whole(messages: f64) -> String {
    count(rounded(messages))
}
