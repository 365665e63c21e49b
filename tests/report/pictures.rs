//! The page in Chromium: on a phone and a desk, light and dark. What is drawn is as long as its figures ask for, in its own
//! color; nothing overlaps, leaves the page or is too faint to read.
//!
//! With NIGHTPORTER_TEST_PICTURES=DIR the pictures are kept there.

use std::{env, fs, path::PathBuf};

use base64::{Engine, engine::general_purpose::STANDARD};
use nightporter::{
    model::Profile,
    view::{History, Report},
};
use serde::Deserialize;
use serde_json::json;

use super::{
    Phone,
    browser::{Browser, Page},
    fixture,
};

const PHONE: (u32, u32) = (360, 800);
const DESK: (u32, u32) = (1280, 900);

#[derive(Debug, Deserialize)]
struct Looks {
    texts: Vec<Text>,
    shapes: Vec<Shape>,
    boxes: Vec<Placed>,
    scroll: f64,
    client: f64,
    height: f64,
    scripts: u32,
    title: String,
}

#[derive(Debug, Deserialize)]
struct Text {
    text: String,
    lines: Vec<Area>,
    scrolls: bool,
    size: f64,
}

#[derive(Debug, Deserialize)]
struct Shape {
    #[serde(flatten)]
    area: Area,
    class: String,
    fill: String,
    section: String,
    name: String,
    svg: Area,
}

#[derive(Debug, Deserialize)]
struct Placed {
    #[serde(flatten)]
    area: Area,
    what: String,
}

#[derive(Clone, Copy, Debug, Deserialize)]
struct Area {
    x: f64,
    y: f64,
    w: f64,
    h: f64,
}

#[derive(Debug, Deserialize)]
struct Pixels {
    middle: [u8; 3],
    contrast: f64,
    width: f64,
    height: f64,
}

#[test]
fn the_page_is_good_to_look_at_on_a_phone_and_on_a_desk() {
    let mut browser = Browser::start();
    let page = browser.page();
    let dir = tempfile::tempdir().unwrap();
    for (name, profile, args) in
        [("tombstone", Profile::Tombstone, &["--html"][..]), ("observe", Profile::Observe, &["--html", "--what-if"])]
    {
        let (report, history) = (fixture::report(profile), fixture::history());
        let file = dir.path().join(format!("{name}.html"));
        fs::write(&file, Phone::usual(profile).text(args)).unwrap();
        for (screen, dark) in [(PHONE, false), (PHONE, true), (DESK, false), (DESK, true)] {
            browser.open(&page, &file, screen, dark);
            let looks: Looks = serde_json::from_value(browser.eval(&page, include_str!("looks.js"))).unwrap();
            let what = format!("{name}-{}-{}", screen.0, if dark { "dark" } else { "light" });
            let png = browser.screenshot(&page, true);
            keep(&what, &png);
            assert_eq!((looks.scripts, looks.title.as_str()), (0, "Night Porter: memory"));
            fits(&what, &looks, screen);
            nothing_overlaps(&what, &looks);
            bars_are_true(&what, &looks, &report);
            areas_are_true(&what, &looks, &history);
            let bands = if screen == DESK { bands(&looks, &history) } else { Vec::new() };
            paint_is_there(&what, &mut browser, &page, &png, &looks, &bands, screen);
        }
    }
    // For docs/report.md.
    browser.open(&page, &dir.path().join("tombstone.html"), (900, 1120), false);
    keep("sample", &browser.screenshot(&page, false));
    let asked: Vec<&String> = browser.asked.iter().filter(|url| !url.starts_with("file:")).collect();
    assert!(asked.iter().all(|url| *url == "about:blank" || url.starts_with("data:")), "it went for {asked:?}");
}

#[test]
fn two_hundred_apps_with_long_names_fit_a_phone() {
    let mut report = fixture::report(Profile::Tombstone);
    let row = report.apps[0].clone();
    report.apps.extend((0..200).map(|index| {
        let mut row = row.clone();
        row.name = format!("org.example.{}{index}.</b><script>", "AVeryLongNameWithoutAnyPlaceToBreakIt".repeat(6));
        row
    }));
    report.saved = -1_234_567_890_123;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("many.html");
    fs::write(&file, Phone::older(report).text(&["--html"])).unwrap();
    let mut browser = Browser::start();
    let page = browser.page();
    browser.open(&page, &file, PHONE, false);
    let looks = |browser: &mut Browser| -> Looks {
        serde_json::from_value(browser.eval(&page, include_str!("looks.js"))).unwrap()
    };
    let folded = looks(&mut browser);
    fits("folded", &folded, PHONE);
    assert_eq!(folded.scripts, 0);
    browser.eval(&page, "document.querySelectorAll('details').forEach(e => e.open = true)");
    let open = looks(&mut browser);
    fits("open", &open, PHONE);
    nothing_overlaps("open", &open);
    let bars = |looks: &Looks| looks.shapes.iter().filter(|s| s.section == "apps" && s.class == "now").count();
    assert_eq!((bars(&folded), bars(&open)), (24, 213), "the rest is folded away, and there when asked for");
}

fn keep(name: &str, png: &[u8]) {
    if let Some(kept) = env::var_os("NIGHTPORTER_TEST_PICTURES").map(PathBuf::from) {
        fs::create_dir_all(&kept).unwrap();
        fs::write(kept.join(format!("{name}.png")), png).unwrap();
    }
}

/// Nothing is wider than the screen.
fn fits(what: &str, looks: &Looks, screen: (u32, u32)) {
    assert!(looks.scroll <= looks.client, "{what}: {} wide on a screen of {}", looks.scroll, looks.client);
    assert!((looks.client - f64::from(screen.0)).abs() < 1.0, "{what}: {}", looks.client);
    let right = f64::from(screen.0) + 0.5;
    for placed in &looks.boxes {
        let is_in = placed.area.x >= -0.5 && placed.area.x + placed.area.w <= right;
        assert!(is_in, "{what}: {} at {:?}", placed.what, placed.area);
    }
    for text in looks.texts.iter().filter(|text| !text.scrolls) {
        assert!(text.size >= 12.0, "{what}: {text:?} is too small for a phone");
        assert!(text.lines.iter().all(|line| line.x >= -0.5 && line.x + line.w <= right), "{what}: {text:?}");
    }
}

/// No two texts are in the same place. Lines of one text may touch: fonts reach beyond their line.
fn nothing_overlaps(what: &str, looks: &Looks) {
    let mut lines: Vec<(usize, Area)> = Vec::new();
    for (index, text) in looks.texts.iter().enumerate().filter(|(_, text)| !text.scrolls) {
        lines.extend(text.lines.iter().map(|line| {
            let inner = Area { y: line.y + line.h * 0.2, h: line.h * 0.6, ..*line };
            (index, inner)
        }));
    }
    lines.sort_by(|a, b| a.1.y.total_cmp(&b.1.y));
    for (index, (one, a)) in lines.iter().enumerate() {
        for (other, b) in lines[index + 1..].iter().take_while(|(_, b)| b.y < a.y + a.h) {
            let across = (a.x + a.w).min(b.x + b.w) - a.x.max(b.x);
            let (one, other) = (&looks.texts[*one].text, &looks.texts[*other].text);
            assert!(across <= 1.0, "{what}: {one:?} and {other:?} overlap by {across}: {a:?} {b:?}");
        }
    }
}

/// Each app's bar, and the pairs of connections, are as long as their figures ask for.
fn bars_are_true(what: &str, looks: &Looks, report: &Report) {
    let whole = report.apps.iter().map(|app| app.resident.map_or(0, |memory| memory.pss)).max().unwrap() as f64;
    let share = |shape: &Shape| shape.area.w / shape.svg.w;
    let is = |shape: &Shape, expected: f64, name: &str| {
        let off = (share(shape) - expected).abs() * shape.svg.w;
        assert!(off < 0.6, "{what}: {name}'s {} is {off} px off: {shape:?}, not {expected}", shape.class);
        assert!(shape.svg.w > 150.0, "{what}: no room for bars: {shape:?}");
    };
    let of = |section: &str, name: &str, class: &str| {
        let found = looks.shapes.iter().find(|s| s.section == section && s.name == name && s.class == class);
        found.unwrap_or_else(|| panic!("{what}: no {class} of {name} in {section}"))
    };
    for app in &report.apps {
        let now = app.now.unwrap().pss as f64;
        is(of("apps", &app.name, "now"), now / whole, &app.name);
        let zram = of("apps", &app.name, "zram");
        is(zram, app.zram as f64 / whole, &app.name);
        assert!((zram.area.x - zram.svg.x - now / whole * zram.svg.w).abs() < 0.6, "{what}: {zram:?}");
        if let Some(memory) = app.resident {
            is(of("apps", &app.name, "baseline"), memory.pss as f64 / whole, &app.name);
            if report.profile != Profile::Observe {
                let saved = of("apps", &app.name, "saved");
                is(saved, app.saved.unwrap() as f64 / whole, &app.name);
                assert!((saved.area.x - zram.area.x - zram.area.w).abs() < 0.6, "{what}: {saved:?}");
            }
        }
    }
    is(of("connections", "Night Porter", "ours"), 1.0 / 12.0, "connections");
    is(of("connections", "each app on its own", "theirs"), 1.0, "connections");
    // The sum of all, end to end.
    let own = report.daemon.pss + report.sockets;
    let mut x = 0.0;
    for (class, kib) in [("now", report.now), ("zram", report.zram), ("daemon", own)] {
        let shape = looks.shapes.iter().find(|s| s.section == "head" && s.class == class).unwrap();
        is(shape, kib as f64 / report.resident as f64, "all");
        assert!((shape.area.x - shape.svg.x - x).abs() < 0.6, "{what}: {shape:?} does not begin at {x}");
        x += shape.area.w;
    }
}

/// Messages over time and the distribution of latencies: as many as there were, and where they were.
fn areas_are_true(what: &str, looks: &Looks, history: &History) {
    let of = |section: &str, class: &str| -> Vec<&Shape> {
        looks.shapes.iter().filter(|s| s.section == section && s.class == class).collect()
    };
    let bars = of("messages", "message");
    let begin = history.totals[0].at;
    let mut counts = [0.0; 48];
    for row in &history.totals {
        counts[usize::try_from((row.at - begin) / 1800).unwrap()] += f64::from(row.total.messages);
    }
    let most = counts.iter().copied().fold(0.0, f64::max);
    assert_eq!(bars.len(), counts.iter().filter(|count| **count > 0.0).count(), "{what}");
    let tallest = bars.iter().map(|bar| bar.area.h).fold(0.0, f64::max);
    for bar in bars {
        let index = ((bar.area.x + bar.area.w / 2.0 - bar.svg.x) / bar.svg.w * 48.0).floor() as usize;
        let (is, asked) = (bar.area.h / tallest, counts[index] / most);
        assert!((is - asked).abs() < 0.02, "{what}: {index}: {is} and not {asked}");
    }
    for from in ["running", "frozen", "reclaimed", "tombstone"] {
        let times: Vec<u32> = history.wakes.iter().filter(|wake| wake.from == from).map(|wake| wake.took_ms).collect();
        assert!(times.len() > 5, "{from}: {}", times.len());
        let bars: Vec<&Shape> = of("wakes", "latent").into_iter().filter(|s| s.name.starts_with(from)).collect();
        // Their slowest is up to 2.1 s, so the axis ends at 10 s.
        let at = |ms: u32| (f64::from(ms).log10() / 4.0) * bars[0].svg.w + bars[0].svg.x;
        let (first, last) = (at(*times.iter().min().unwrap()), at(*times.iter().max().unwrap()));
        let (left, right) = bars.iter().fold((f64::MAX, 0.0f64), |(left, right), bar| {
            (left.min(bar.area.x), right.max(bar.area.x + bar.area.w / 0.9))
        });
        assert!(
            left <= first + 0.6 && right >= last - 0.6,
            "{what}: {from} from {left} to {right}, not {first} to {last}"
        );
    }
}

/// Points in the middle of what is stacked over time, and the color each should have. A part of the chart is ten minutes, as a
/// step of the fixture is; the axis goes to 1,500 MiB.
fn bands(looks: &Looks, history: &History) -> Vec<(Area, String)> {
    let color = |class: &str| {
        looks.shapes.iter().find(|s| s.section != "what-if" && s.class == class).map(|shape| shape.fill.clone())
    };
    let plot = looks.shapes.iter().find(|shape| shape.section == "memory").unwrap().svg;
    let mut points = Vec::new();
    for index in (2..144).step_by(7) {
        let total = history.totals[index].total;
        let x = plot.x + (index as f64 + 0.5) / 144.0 * plot.w;
        let mut from = 0.0;
        let spared =
            total.resident - total.now - total.zram - total.daemon.min(total.resident - total.now - total.zram);
        for (class, kib) in [("now", total.now), ("zram", total.zram), ("daemon", total.daemon), ("saved", spared)] {
            let height = kib as f64 / 1024.0 / 1500.0 * plot.h;
            let middle = plot.y + plot.h - from - height / 2.0;
            from += height;
            if let Some(color) = color(class).filter(|_| height > 12.0) {
                points.push((Area { x: x - 0.5, y: middle - 0.5, w: 1.0, h: 1.0 }, color));
            }
        }
    }
    assert!(points.len() > 30, "{}", points.len());
    points
}

/// Bars have their color where they should be, and every text stands out from what is behind it.
fn paint_is_there(
    what: &str,
    browser: &mut Browser,
    page: &Page,
    png: &[u8],
    looks: &Looks,
    bands: &[(Area, String)],
    screen: (u32, u32),
) {
    let shapes: Vec<&Shape> = looks
        .shapes
        .iter()
        .filter(|shape| {
            shape.area.w >= 4.0 && shape.area.h >= 4.0 && ["apps", "head"].contains(&shape.section.as_str())
        })
        // Its middle is below the others.
        .filter(|shape| shape.class != "saved" && shape.class != "baseline")
        .collect();
    let texts: Vec<(&str, Area)> = looks
        .texts
        .iter()
        .filter(|text| !text.scrolls)
        .flat_map(|text| text.lines.iter().map(|line| (text.text.as_str(), *line)))
        .filter(|(_, line)| line.w >= 3.0)
        .collect();
    assert!(shapes.len() > 10 && texts.len() > 60, "{what}: {} shapes, {} texts", shapes.len(), texts.len());
    let areas: Vec<_> = shapes
        .iter()
        .map(|shape| shape.area)
        .chain(texts.iter().map(|(_, line)| *line))
        .chain(bands.iter().map(|(point, _)| *point))
        .collect();
    let areas: Vec<_> = areas.iter().map(|a| json!({ "x": a.x, "y": a.y, "w": a.w, "h": a.h })).collect();
    browser.leave(page);
    let script = format!("({})('{}', {})", include_str!("pixels.js").trim(), STANDARD.encode(png), json!(areas));
    let pixels: Vec<Pixels> = serde_json::from_value(browser.eval(page, &script)).unwrap();
    assert!(
        (pixels[0].width - f64::from(screen.0)).abs() < 1.0 && (pixels[0].height - looks.height).abs() < 2.0,
        "{what}"
    );
    for (shape, pixels) in shapes.iter().zip(&pixels) {
        let [r, g, b] = pixels.middle;
        assert_eq!(format!("rgb({r}, {g}, {b})"), shape.fill, "{what}: {shape:?}");
    }
    for ((point, color), pixels) in bands.iter().zip(&pixels[shapes.len() + texts.len()..]) {
        let [r, g, b] = pixels.middle;
        assert_eq!(&format!("rgb({r}, {g}, {b})"), color, "{what}: memory over time at {point:?}");
    }
    for ((text, line), pixels) in texts.iter().zip(&pixels[shapes.len()..]) {
        // WCAG 2 asks for 4.5; thin strokes are drawn paler than their color.
        assert!(pixels.contrast >= 3.5, "{what}: {text:?} has a contrast of {:.1} at {line:?}", pixels.contrast);
    }
}
