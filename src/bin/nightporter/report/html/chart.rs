//! What all pictures are made of. The SVG holds shapes alone, stretched to whatever room there is; labels are HTML beside it,
//! so that they are as large on a phone as anywhere.

use super::{markup::Markup, scale::Mark};

/// Shapes are placed on a plane of so much each way.
pub(super) const PLANE: f64 = 1000.0;

/// A chart with an axis on the left and one below.
#[derive(Debug)]
pub(super) struct Chart<'a> {
    /// What is to be seen, for who cannot.
    pub(super) label: &'a str,
    /// What sizes it in the style sheet.
    pub(super) class: &'a str,
    pub(super) left: &'a [Mark],
    pub(super) below: &'a [Mark],
}

impl Chart<'_> {
    /// Draws it; `shapes` on a plane of [`PLANE`] each way, y downwards.
    pub(super) fn draw(&self, page: &mut Markup, shapes: impl FnOnce(&mut Markup)) {
        page.element("div", &[("class", &format_args!("chart {}", self.class))], |page| {
            page.element("div", &[("class", &"left")], |page| {
                for (at, text) in self.left {
                    page.leaf("span", &[("style", &format_args!("bottom:{}%", number(at * 100.0)))], text);
                }
                // Makes room for the widest.
                let widest = self.left.iter().max_by_key(|(_, text)| text.chars().count());
                page.leaf("b", &[("aria-hidden", &"true")], widest.map_or("", |(_, text)| text));
            });
            picture(page, self.label, &["plot"], |page| {
                for (at, _) in self.left {
                    let y = number(PLANE * (1.0 - at));
                    page.empty("path", &[("class", &"grid"), ("d", &format_args!("M0 {y}H{PLANE}"))]);
                }
                for (at, _) in self.below {
                    let x = number(PLANE * at);
                    page.empty("path", &[("class", &"grid tick"), ("d", &format_args!("M{x} 0V{PLANE}"))]);
                }
                shapes(page);
            });
            axis(page, self.below);
        });
    }
}

/// Marks along the bottom.
pub(super) fn axis(page: &mut Markup, marks: &[Mark]) {
    page.element("div", &[("class", &"below"), ("aria-hidden", &"true")], |page| {
        for (at, text) in marks {
            let class = match at {
                at if *at < 0.03 => "first",
                at if *at > 0.94 => "last",
                _ => "mark",
            };
            page.leaf("span", &[("class", &class), ("style", &format_args!("left:{}%", number(at * 100.0)))], text);
        }
    });
}

/// An SVG of [`PLANE`] each way that fills what the style sheet gives it.
pub(super) fn picture(page: &mut Markup, label: &str, classes: &[&str], shapes: impl FnOnce(&mut Markup)) {
    let plane = format!("0 0 {PLANE} {PLANE}");
    let attributes: [(&str, &dyn std::fmt::Display); 5] = [
        ("class", &classes.join(" ")),
        ("viewBox", &plane),
        ("preserveAspectRatio", &"none"),
        ("role", &"img"),
        ("aria-label", &label),
    ];
    page.element("svg", &attributes, shapes);
}

/// A rectangle from `x` (0 to 1) on, as high as the plane, with what a pointer over it is told.
pub(super) fn block(page: &mut Markup, class: &str, x: f64, width: f64, told: &str) {
    rectangle(page, class, (x, width), (0.0, 1.0), told);
}

/// A rectangle: begin and length each way, 0 to 1.
pub(super) fn rectangle(page: &mut Markup, class: &str, (x, width): (f64, f64), (y, height): (f64, f64), told: &str) {
    let [x, width, y, height] = [x, width, y, height].map(|part| number(part * PLANE));
    let attributes: [(&str, &dyn std::fmt::Display); 5] =
        [("class", &class), ("x", &x), ("y", &y), ("width", &width), ("height", &height)];
    page.element("rect", &attributes, |page| {
        if !told.is_empty() {
            page.leaf("title", &[], told);
        }
    });
}

/// An area between two lines through the middles of equal parts; parts where nothing is known are left out.
pub(super) fn area(page: &mut Markup, class: &str, lower: &[Option<f64>], upper: &[Option<f64>]) {
    for (from, to) in known(upper) {
        let points = |values: &[Option<f64>]| steps(values, from, to);
        let mut back = points(lower);
        back.reverse();
        let path = format!("M{}L{}Z", joined(&points(upper)), joined(&back));
        page.empty("path", &[("class", &class), ("d", &path)]);
    }
}

/// A line, as [`area`].
pub(super) fn line(page: &mut Markup, class: &str, values: &[Option<f64>]) {
    for (from, to) in known(values) {
        let path = format!("M{}", joined(&steps(values, from, to)));
        page.empty("path", &[("class", &class), ("d", &path)]);
    }
}

/// Marks in a list of colours and what they stand for.
pub(super) fn legend(page: &mut Markup, entries: &[(&str, &str)]) {
    page.element("ul", &[("class", &"legend")], |page| {
        for (class, text) in entries {
            page.element("li", &[], |page| {
                page.empty("i", &[("class", class)]);
                page.text(text);
            });
        }
    });
}

/// A coordinate: two decimals, never NaN.
pub(super) fn number(value: f64) -> String {
    let value = if value.is_finite() { value } else { 0.0 };
    let text = format!("{value:.2}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text == "-0" { "0".into() } else { text.to_owned() }
}

/// Where values are known without a gap: from, to (exclusive).
fn known(values: &[Option<f64>]) -> Vec<(usize, usize)> {
    let mut runs = Vec::new();
    let mut begun = None;
    for (index, value) in values.iter().chain([&None]).enumerate() {
        match (begun, value) {
            (None, Some(_)) => begun = Some(index),
            (Some(from), None) => {
                runs.push((from, index));
                begun = None;
            }
            _ => {}
        }
    }
    runs
}

/// Points of a stepped line: what holds for a part holds from its begin to its end.
fn steps(values: &[Option<f64>], from: usize, to: usize) -> Vec<(f64, f64)> {
    #[expect(clippy::cast_precision_loss, reason = "a few hundred")]
    let x = |index: usize| index as f64 / values.len().max(1) as f64 * PLANE;
    let mut points: Vec<(f64, f64)> = Vec::new();
    for (index, value) in values.iter().enumerate().take(to).skip(from) {
        let y = PLANE * (1.0 - value.unwrap_or(0.0));
        // A run of the same height is one line.
        if points.last().is_none_or(|last| (last.1 - y).abs() > f64::EPSILON) {
            points.push((x(index), y));
        } else {
            points.pop();
        }
        points.push((x(index + 1), y));
    }
    points
}

fn joined(points: &[(f64, f64)]) -> String {
    let points: Vec<String> = points.iter().map(|(x, y)| format!("{} {}", number(*x), number(*y))).collect();
    points.join("L")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn coordinates_are_short_and_never_nonsense() {
        assert_eq!([1.0, 0.333_33, -0.0001, f64::NAN, f64::INFINITY].map(number), ["1", "0.33", "0", "0", "0"]);
    }

    #[test]
    fn gaps_stay_gaps_and_level_runs_are_short() {
        assert_eq!(known(&[None, Some(1.0), Some(1.0), None, Some(0.0)]), [(1, 3), (4, 5)]);
        let level = [Some(0.5), Some(0.5), Some(0.5), Some(0.25)];
        assert_eq!(joined(&steps(&level, 0, 4)), "0 500L750 500L750 750L1000 750");
    }
}
