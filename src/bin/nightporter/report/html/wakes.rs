//! How long messages took to their apps, by the state those were in; and what connections were held instead of theirs.

use std::collections::BTreeMap;

use nightporter::view::{Account, History};

use super::{
    super::units::{count, float, millis},
    chart::{axis, block, picture, rectangle},
    markup::Markup,
    scale::Decades,
};

/// Bars in each decade of the distribution.
const FINE: u8 = 6;

/// What is known of deliveries: each, or what they come to.
#[derive(Debug)]
pub(super) struct Source {
    rows: Vec<Row>,
    /// Whether each is known, from the history.
    pub(super) single: bool,
}

#[derive(Debug)]
struct Row {
    state: String,
    count: u64,
    median: u32,
    most: u32,
    slowest: u32,
    /// How long each took, in order; empty where only the summary is known.
    each: Vec<u32>,
}

impl Source {
    /// The history's deliveries, or else the account's summary; none without any.
    pub(super) fn of(history: Option<&History>, account: Option<&Account>) -> Option<Self> {
        let mut times: BTreeMap<&str, Vec<u32>> = BTreeMap::new();
        for wake in history.iter().flat_map(|history| &history.wakes) {
            times.entry(&wake.from).or_default().push(wake.took_ms);
        }
        let single = !times.is_empty();
        let mut rows: Vec<Row> = if single {
            times.into_iter().map(|(state, each)| Row::of(state, each)).collect()
        } else {
            let wakes = account.iter().flat_map(|account| &account.wakes).filter(|wakes| wakes.count > 0);
            wakes
                .map(|wakes| Row {
                    state: wakes.from.clone(),
                    count: wakes.count,
                    median: wakes.p50_ms,
                    most: wakes.p95_ms,
                    slowest: wakes.max_ms,
                    each: Vec::new(),
                })
                .collect()
        };
        rows.sort_by_key(|row| (depth(&row.state), row.state.clone()));
        (!rows.is_empty()).then_some(Self { rows, single })
    }
}

impl Row {
    fn of(state: &str, mut each: Vec<u32>) -> Self {
        each.sort_unstable();
        // The smallest time that so many of a hundred did not exceed.
        let rank = |percent: usize| each.get((each.len() * percent).div_ceil(100).saturating_sub(1)).copied();
        let (median, most) = (rank(50).unwrap_or(0), rank(95).unwrap_or(0));
        Self {
            state: state.to_owned(),
            count: u64::try_from(each.len()).unwrap_or(u64::MAX),
            median,
            most,
            slowest: each.last().copied().unwrap_or(0),
            each,
        }
    }
}

pub(super) fn section(page: &mut Markup, source: &Source) {
    let slowest = source.rows.iter().map(|row| row.slowest).max().unwrap_or(0);
    let scale = Decades::to(u64::from(slowest));
    for row in &source.rows {
        let ms = |ms: u32| millis(u64::from(ms));
        let told = format!(
            "{}: {} messages, median {}, 95 of 100 within {}, slowest {}",
            state(&row.state),
            count(row.count),
            ms(row.median),
            ms(row.most),
            ms(row.slowest)
        );
        page.element("div", &[("class", &"latency")], |page| {
            page.element("div", &[("class", &"name")], |page| {
                page.leaf("b", &[], state(&row.state));
                page.text(" ");
                page.leaf("small", &[], count(row.count));
            });
            page.element("div", &[("class", &"figure")], |page| {
                page.text("median ");
                page.leaf("b", &[], ms(row.median));
                page.text(format_args!(", 95 % within {}", ms(row.most)));
            });
            picture(page, &told, &["histogram"], |page| shapes(page, row, scale, &told));
        });
    }
    axis(page, &scale.marks());
}

pub(super) fn connections(page: &mut Markup, account: &Account) {
    let pairs = [
        ("Connections held", account.connections, account.connections_replaced),
        ("Heartbeats sent", account.heartbeats, account.heartbeats_replaced),
    ];
    for (title, ours, theirs) in pairs {
        page.leaf("h3", &[], title);
        let whole = float(ours.max(theirs)).max(1.0);
        for (class, name, number) in [("ours", "Night Porter", ours), ("theirs", "each app on its own", theirs)] {
            page.element("div", &[("class", &"pair")], |page| {
                page.leaf("div", &[("class", &"name")], name);
                let told = format!("{name}: {}", count(number));
                picture(page, &told, &["bar"], |page| block(page, class, 0.0, float(number) / whole, &told));
                page.leaf("div", &[("class", &"figure")], count(number));
            });
        }
    }
    page.leaf(
        "p",
        &[("class", &"note")],
        "Heartbeats are computed from their rhythm; each wakes the radio, and on a mobile network often the phone.",
    );
}

/// A state, and what it means where its name does not say.
fn state(state: &str) -> &str {
    match state {
        "reclaimed" => "reclaimed (paged out)",
        "tombstone" => "tombstone (ended)",
        other => other,
    }
}

fn shapes(page: &mut Markup, row: &Row, scale: Decades, told: &str) {
    let at = |ms: u32| scale.position(f64::from(ms));
    page.empty("path", &[("class", &"grid"), ("d", &"M0 1000H1000")]);
    if row.each.is_empty() {
        // Only how far half of them and nearly all of them went.
        rectangle(page, "range", (at(row.median), at(row.slowest) - at(row.median)), (0.62, 0.16), told);
        rectangle(page, "latent", (at(row.median), at(row.most) - at(row.median)), (0.5, 0.4), told);
    } else {
        let mut bars: BTreeMap<u32, u32> = BTreeMap::new();
        for ms in &row.each {
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to 58")]
            let bar = (f64::from(*ms).max(1.0).log10() * f64::from(FINE)).floor() as u32;
            *bars.entry(bar).or_default() += 1;
        }
        let most = f64::from(bars.values().copied().max().unwrap_or(1));
        let edge = |bar: u32| scale.position(10f64.powf(f64::from(bar) / f64::from(FINE)));
        for (bar, number) in bars {
            let (from, to) = (edge(bar), edge(bar + 1));
            // What took as long as the axis goes is in the last bar.
            let (from, to) = if to > from { (from, to) } else { (edge(bar.saturating_sub(1)), to) };
            let height = f64::from(number) / most * 0.94;
            let width = (to - from) * 0.9;
            rectangle(page, "latent", (from, width), (1.0 - height, height), told);
        }
    }
    let x = super::chart::number(at(row.median) * super::chart::PLANE);
    page.empty("path", &[("class", &"median"), ("d", &format_args!("M{x} 0V1000"))]);
}

fn depth(state: &str) -> u8 {
    match state {
        "running" => 0,
        "frozen" => 1,
        "reclaimed" => 2,
        "tombstone" => 3,
        _ => 4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_and_95_of_100_are_times_that_were_measured() {
        let row = Row::of("frozen", (1..=100).rev().collect());
        assert_eq!((row.median, row.most, row.slowest, row.count), (50, 95, 100, 100));
        let one = Row::of("frozen", vec![7]);
        assert_eq!((one.median, one.most), (7, 7));
    }
}
