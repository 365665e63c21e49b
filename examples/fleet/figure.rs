//! `docs/scale.svg`: the first scenarios side by side; attempts per second above, phones connected below.

use std::fmt::Write as _;

use crate::{
    crowd::Crowd,
    page::{thousands, time},
    scenario::DRAWN,
    survey::Chapter,
    world::Outcome,
};

const WIDTH: f64 = 1280.0;
const HEIGHT: f64 = 690.0;
const LEFT: f64 = 74.0;
const RIGHT: f64 = 24.0;
const GAP: f64 = 26.0;
/// Top and bottom of the two rows.
const ATTEMPTS: (f64, f64) = (164.0, 376.0);
const CONNECTED: (f64, f64) = (436.0, 626.0);
/// Points of a curve.
const STEPS: usize = 240;

/// The curves, the last on top.
const CURVES: [(Crowd, &str); 3] =
    [(Crowd::Fixed, "fixed"), (Crowd::Kunifiedpush, "growing"), (Crowd::NightPorter, "ours")];

/// Both colour schemes; the reader's browser chooses.
const STYLE: &str = "
  .paper { fill: #ffffff } .plot { fill: #f6f8fa } .away { fill: #8c959f; opacity: .2 }
  text { font-family: system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', sans-serif; fill: #57606a; font-size: 12px }
  .title { font-size: 22px; font-weight: 650; fill: #1f2328 } .lead { font-size: 14px }
  .name { font-size: 14.5px; font-weight: 650; fill: #1f2328 } .row { font-size: 12.5px; font-weight: 600; fill: #1f2328 }
  .end { text-anchor: end } .middle { text-anchor: middle } .key { font-size: 13px; fill: #1f2328 }
  .grid { stroke: #d0d7de; stroke-width: 1; fill: none }
  .ours, .fixed, .growing, .ideal { fill: none; stroke-linejoin: round; stroke-linecap: round }
  .ours { stroke: #0969da; stroke-width: 2.6 } .fixed { stroke: #cf5b0a; stroke-width: 1.5 }
  .growing { stroke: #8250df; stroke-width: 1.5 } .ideal { stroke: #57606a; stroke-width: 1.5; stroke-dasharray: 2 4.5 }
  .wash { fill: #0969da; opacity: .13 } .dot { fill: #0969da } .told { fill: #0550ae; font-size: 13px; font-weight: 650 }
  @media (prefers-color-scheme: dark) {
    .paper { fill: #0d1117 } .plot { fill: #161b22 } .away { fill: #8b949e; opacity: .2 }
    text { fill: #8b949e } .title, .name, .row, .key { fill: #e6edf3 } .grid { stroke: #30363d }
    .ours { stroke: #58a6ff } .fixed { stroke: #f0883e } .growing { stroke: #bc8cff } .ideal { stroke: #8b949e }
    .wash { fill: #58a6ff; opacity: .16 } .dot { fill: #58a6ff } .told { fill: #79c0ff }
  }";

/// The figure. The same numbers give the same figure.
pub(crate) fn figure(chapters: &[Chapter], phones: u32) -> String {
    let mut out = String::new();
    // Writing to a string does not fail.
    let _ = draw(&mut out, &chapters[..DRAWN.min(chapters.len())], phones);
    out
}

fn draw(out: &mut String, chapters: &[Chapter], phones: u32) -> std::fmt::Result {
    let crowd = thousands(phones.into());
    writeln!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" width=\"{WIDTH}\" height=\"{HEIGHT}\" \
         role=\"img\" aria-label=\"How {crowd} phones come back to one push server\">\n<style>{STYLE}\n</style>\n\
         <rect class=\"paper\" width=\"{WIDTH}\" height=\"{HEIGHT}\" rx=\"10\"/>"
    )?;
    writeln!(out, "<text class=\"title\" x=\"{LEFT}\" y=\"42\">{crowd} phones lose their push server</text>")?;
    writeln!(out, "<text class=\"lead\" x=\"{LEFT}\" y=\"65\">How they come back, on four bad days</text>")?;
    legend(out)?;
    let width = (WIDTH - LEFT - RIGHT - GAP * (chapters.len() - 1) as f64) / chapters.len() as f64;
    for (n, chapter) in chapters.iter().enumerate() {
        let left = LEFT + n as f64 * (width + GAP);
        Panel { chapter, left, width, top: decade_above(phones), first: n == 0 }.draw(out)?;
    }
    writeln!(out, "</svg>")
}

fn legend(out: &mut String) -> std::fmt::Result {
    let keys = [
        ("ours", "Night Porter", 0.0),
        ("ideal", "ideal", 132.0),
        ("fixed", "every 5 s (model)", 214.0),
        ("growing", "kunifiedpush’s policy (model)", 372.0),
    ];
    for (class, text, x) in keys {
        let x = x + WIDTH - RIGHT - 590.0;
        writeln!(out, "<path class=\"{class}\" d=\"M{:.1} 38h24\"/>", x)?;
        writeln!(out, "<text class=\"key\" x=\"{:.1}\" y=\"42.5\">{text}</text>", x + 32.0)?;
    }
    let x = WIDTH - RIGHT - 590.0;
    writeln!(out, "<rect class=\"away\" x=\"{x:.1}\" y=\"55\" width=\"24\" height=\"12\"/>")?;
    writeln!(out, "<text class=\"key\" x=\"{:.1}\" y=\"65.5\">server away</text>", x + 32.0)
}

/// One scenario.
struct Panel<'a> {
    chapter: &'a Chapter,
    left: f64,
    width: f64,
    /// The decade at the upper end of the attempts.
    top: f64,
    first: bool,
}

impl Panel<'_> {
    fn draw(&self, out: &mut String) -> std::fmt::Result {
        let Self { chapter, left, width, .. } = self;
        writeln!(out, "<text class=\"name\" x=\"{left:.1}\" y=\"116\">{}</text>", chapter.scenario.title)?;
        let down = chapter.scenario.down.as_secs_f64();
        let capacity = match chapter.scenario.rate(chapter.of(Crowd::NightPorter).phones) {
            Some(rate) => format!("takes {} handshakes/s", thousands(rate as u64)),
            None => "takes whatever comes".to_owned(),
        };
        writeln!(out, "<text x=\"{left:.1}\" y=\"134\">back after {}, {capacity}</text>", time(down))?;
        for (top, bottom) in [ATTEMPTS, CONNECTED] {
            let height = bottom - top;
            writeln!(
                out,
                "<rect class=\"plot\" x=\"{left:.1}\" y=\"{top}\" width=\"{width:.1}\" height=\"{height}\"/>"
            )?;
            writeln!(
                out,
                "<rect class=\"away\" x=\"{left:.1}\" y=\"{top}\" width=\"{:.1}\" height=\"{height}\"/>",
                self.x(down) - left
            )?;
        }
        self.grid(out)?;
        self.ideal(out)?;
        for (crowd, class) in CURVES {
            let outcome = chapter.of(crowd);
            let points = self.attempts(outcome);
            if crowd == Crowd::NightPorter {
                let (from, to) = (left, left + width);
                let bottom = ATTEMPTS.1;
                writeln!(out, "<path class=\"wash\" d=\"M{from:.1} {bottom}L{points}L{to:.1} {bottom}z\"/>")?;
            }
            writeln!(out, "<path class=\"{class}\" d=\"M{points}\"/>")?;
            writeln!(out, "<path class=\"{class}\" d=\"M{}\"/>", self.connected(outcome))?;
        }
        self.told(out)
    }

    fn grid(&self, out: &mut String) -> std::fmt::Result {
        let (left, right) = (self.left, self.left + self.width);
        if self.first {
            for ((top, bottom), name) in [(ATTEMPTS, "attempts per second"), (CONNECTED, "phones connected")] {
                let y = (top + bottom) / 2.0;
                writeln!(out, "<text class=\"row middle\" transform=\"translate(16 {y}) rotate(-90)\">{name}</text>")?;
            }
        }
        for decade in 0..=self.top as u32 {
            let y = self.y_attempts(10_f64.powi(decade as i32));
            writeln!(out, "<path class=\"grid\" d=\"M{left:.1} {y:.1}H{right:.1}\"/>")?;
            if self.first {
                let label = match decade {
                    0..3 => 10_u32.pow(decade).to_string(),
                    3..6 => format!("{} k", 10_u32.pow(decade - 3)),
                    _ => format!("{} M", 10_u32.pow(decade - 6)),
                };
                writeln!(out, "<text class=\"end\" x=\"{:.1}\" y=\"{:.1}\">{label}</text>", left - 8.0, y + 4.0)?;
            }
        }
        for percent in [0, 25, 50, 75, 100] {
            let y = y_connected(f64::from(percent) / 100.0);
            writeln!(out, "<path class=\"grid\" d=\"M{left:.1} {y:.1}H{right:.1}\"/>")?;
            if self.first {
                writeln!(out, "<text class=\"end\" x=\"{:.1}\" y=\"{:.1}\">{percent} %</text>", left - 8.0, y + 4.0)?;
            }
        }
        let window = self.window();
        let (step, unit, name) = match window {
            ..=90.0 => (15.0, 1.0, " s"),
            ..=360.0 => (60.0, 60.0, " min"),
            _ => (300.0, 60.0, " min"),
        };
        for tick in 0..=(window / step) as u32 {
            let at = f64::from(tick) * step;
            let x = self.x(at);
            let (class, unit_name) = match tick {
                0 => ("", ""),
                _ if at + step > window => (" class=\"end\"", name),
                _ => (" class=\"middle\"", ""),
            };
            writeln!(out, "<path class=\"grid\" d=\"M{x:.1} {}v5\"/>", CONNECTED.1)?;
            let y = CONNECTED.1 + 20.0;
            writeln!(out, "<text{class} x=\"{x:.1}\" y=\"{y}\">{}{unit_name}</text>", at / unit)?;
        }
        Ok(())
    }

    fn ideal(&self, out: &mut String) -> std::fmt::Result {
        let Some(ideal) = self.chapter.ideal() else { return Ok(()) };
        let down = self.chapter.scenario.down.as_secs_f64();
        let (from, to) = (self.x(down), self.x((down + ideal.seconds(1.0)).min(self.window())));
        let y = self.y_attempts(ideal.rate);
        let (foot, zero, full) = (ATTEMPTS.1, y_connected(0.0), y_connected(1.0));
        writeln!(out, "<path class=\"ideal\" d=\"M{from:.1} {foot}V{y:.1}H{to:.1}V{foot}\"/>")?;
        let right = self.left + self.width;
        writeln!(out, "<path class=\"ideal\" d=\"M{from:.1} {zero:.1}L{to:.1} {full:.1}H{right:.1}\"/>")
    }

    /// The two figures that count, above their rows.
    fn told(&self, out: &mut String) -> std::fmt::Result {
        let ours = self.chapter.of(Crowd::NightPorter);
        let right = self.left + self.width;
        let peak = thousands(self.chapter.peak_after(ours).into());
        writeln!(
            out,
            "<text class=\"told end\" x=\"{right:.1}\" y=\"{}\">peak {peak}/s once back</text>",
            ATTEMPTS.0 - 8.0
        )?;
        let Some(seconds) = ours.seconds(0.99) else { return Ok(()) };
        let x = self.x(self.chapter.scenario.down.as_secs_f64() + seconds).min(right);
        writeln!(out, "<circle class=\"dot\" cx=\"{x:.1}\" cy=\"{:.1}\" r=\"4.5\"/>", y_connected(0.99))?;
        let ideal = self.chapter.ideal().map(|ideal| format!(", ideal {}", time(ideal.seconds(0.99))));
        writeln!(
            out,
            "<text class=\"told end\" x=\"{right:.1}\" y=\"{}\">99 % after {}{}</text>",
            CONNECTED.0 - 8.0,
            time(seconds),
            ideal.unwrap_or_default()
        )
    }

    /// Where a step has several seconds its point is the worst of them.
    fn attempts(&self, outcome: &Outcome) -> String {
        let window = self.window();
        let mut points = String::new();
        let steps = STEPS.min(window as usize);
        for step in 0..steps {
            let (from, to) = (step * window as usize / steps, (step + 1) * window as usize / steps);
            let most = outcome.attempts.get(from..to).into_iter().flatten().max().copied().unwrap_or(0);
            let x = self.x((from as f64 + to as f64) / 2.0);
            let _ = write!(points, "{x:.1} {:.1} ", self.y_attempts(most.into()));
        }
        points
    }

    fn connected(&self, outcome: &Outcome) -> String {
        let mut points = String::new();
        for step in 0..=STEPS {
            let at = self.window() * step as f64 / STEPS as f64;
            let back = outcome.back.partition_point(|millis| f64::from(*millis) <= at * 1000.0);
            let _ = write!(points, "{:.1} {:.1} ", self.x(at), y_connected(back as f64 / outcome.phones as f64));
        }
        points
    }

    fn window(&self) -> f64 {
        self.chapter.scenario.window.as_secs_f64()
    }

    fn x(&self, seconds: f64) -> f64 {
        self.left + self.width * seconds / self.window()
    }

    fn y_attempts(&self, rate: f64) -> f64 {
        let (top, bottom) = ATTEMPTS;
        // Nothing at all lies on the line of one.
        bottom - (bottom - top) * rate.max(1.0).log10() / self.top
    }
}

fn y_connected(share: f64) -> f64 {
    let (top, bottom) = CONNECTED;
    bottom - 4.0 - (bottom - top - 14.0) * share
}

fn decade_above(phones: u32) -> f64 {
    f64::from(phones).log10().ceil().max(1.0) + 0.15
}
