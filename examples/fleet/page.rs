//! `docs/scale.md`.

use std::fmt::Write as _;

use nightporter::core::upstream::backoff::{BASE, CEILING, CROWD_LIMIT, FLOOR};

use crate::{
    crowd::{Crowd, REGISTRATIONS},
    scenario::Cut,
    survey::Chapter,
    world::HORIZON,
};

pub(crate) const COMMAND: &str = "cargo run --profile fleet --no-default-features --example fleet";

/// The page. The same numbers give the same page.
pub(crate) fn page(chapters: &[Chapter], upstream: &str, phones: u32, seed: u64) -> String {
    let mut out = String::new();
    // Writing to a string does not fail.
    let _ = write(&mut out, chapters, upstream, phones, seed);
    out
}

fn write(out: &mut String, chapters: &[Chapter], upstream: &str, phones: u32, seed: u64) -> std::fmt::Result {
    let crowd = thousands(u64::from(phones));
    writeln!(out, "# {crowd} phones, one server\n")?;
    writeln!(out, "<!-- Made by `{COMMAND}`; do not edit. -->\n")?;
    writeln!(
        out,
        "A push server that restarts loses every phone at the same moment, and they all come back. How they do so decides \
         whether it stays up. This page simulates {crowd} of our daemons against one server: not a model of them but the \
         code the daemon runs (`core::upstream::Session` with its {upstream} protocol, backoff, watchdog and \
         registrations), each on its own timers, in virtual time.\n"
    )?;
    writeln!(out, "![Connection attempts per second and share of phones connected, four bad days](scale.svg)\n")?;
    overview(out, chapters)?;
    backoff(out)?;
    writeln!(out, "## Each bad day\n")?;
    writeln!(
        out,
        "Times run from the moment a phone *could* be connected again (the server is back, and so is the phone's own \
         network) to its session being online, handshake included. \"away\" is the worst second while the server was \
         away, \"back\" the worst one after. Attempts are those of a phone until it is connected.\n"
    )?;
    for chapter in chapters {
        table(out, chapter)?;
    }
    reading(out)?;
    again(out, upstream, phones, seed)
}

fn overview(out: &mut String, chapters: &[Chapter]) -> std::fmt::Result {
    writeln!(
        out,
        "| | peak attempts/s, server back | 99 % connected | ideal | attempts per phone | every 5 s instead |"
    )?;
    writeln!(out, "|---|--:|--:|--:|--:|--:|")?;
    for chapter in chapters {
        let ours = chapter.of(Crowd::NightPorter);
        let fixed = chapter.of(Crowd::Fixed);
        writeln!(
            out,
            "| **{}** | {} | {} | {} | {:.1} | {}/s, {}, {:.1} |",
            chapter.scenario.title,
            thousands(chapter.peak_after(ours).into()),
            time_or_never(ours.seconds(0.99)),
            chapter.ideal().map_or("at once".to_owned(), |ideal| time(ideal.seconds(0.99))),
            ours.mean_tries(),
            thousands(chapter.peak_after(fixed).into()),
            time_or_never(fixed.seconds(0.99)),
            fixed.mean_tries(),
        )?;
    }
    writeln!(
        out,
        "\nThe ideal knows what no phone can: when the server is back and how many others there are. Nobody tries before, \
         then a steady stream, as wide as the server's capacity or, where that has no limit, as our own peak.\n"
    )
}

fn backoff(out: &mut String) -> std::fmt::Result {
    writeln!(out, "## What the phones do\n")?;
    writeln!(
        out,
        "- **A link that was good and ends** may have ended for everybody. The first attempt comes at a random moment from \
         {} to {} after; each failure doubles both, up to {} to {}.",
        time((CROWD_LIMIT / 4).as_secs_f64()),
        time(CROWD_LIMIT.as_secs_f64()),
        time((CEILING / 4).as_secs_f64()),
        time(CEILING.as_secs_f64())
    )?;
    writeln!(
        out,
        "- **The phone's own network returns, or it wakes up:** nobody else does at that moment. It tries at once, and \
         should that fail again after {} to {}.",
        time(FLOOR.as_secs_f64()),
        time(BASE.as_secs_f64())
    )?;
    writeln!(
        out,
        "- **`Retry-After`** is a minimum, and as long again is spread over: who was told the same 30 s comes between 30 and \
         60 s, so that the wave does not come back as it went."
    )?;
    writeln!(
        out,
        "- **A server that accepts and does not answer** is given up after 20 s, which counts as a failure: the crowd thins \
         out until it fits through the door.\n"
    )
}

fn table(out: &mut String, chapter: &Chapter) -> std::fmt::Result {
    let scenario = chapter.scenario;
    writeln!(out, "### {}\n\n{}{}.\n", scenario.title, scenario.story[..1].to_uppercase(), &scenario.story[1..])?;
    writeln!(out, "| | peak/s, away | peak/s, back | 50 % | 90 % | 99 % | all | attempts, mean | most |")?;
    writeln!(out, "|---|--:|--:|--:|--:|--:|--:|--:|--:|")?;
    for crowd in Crowd::ALL {
        let outcome = chapter.of(crowd);
        let name = if crowd == Crowd::NightPorter { format!("**{}**", crowd.name()) } else { crowd.name().to_owned() };
        let away =
            if scenario.down.is_zero() { "–".to_owned() } else { thousands(chapter.peak_before(outcome).into()) };
        writeln!(
            out,
            "| {name} | {away} | {} | {} | {} | {} | {} | {:.1} | {} |",
            thousands(chapter.peak_after(outcome).into()),
            time_or_never(outcome.seconds(0.5)),
            time_or_never(outcome.seconds(0.9)),
            time_or_never(outcome.seconds(0.99)),
            time_or_never(outcome.seconds(1.0)),
            outcome.mean_tries(),
            outcome.most_tries(),
        )?;
    }
    if let Some(ideal) = chapter.ideal() {
        writeln!(
            out,
            "| *ideal* | 0 | {} | {} | {} | {} | {} | 1.0 | 1 |",
            thousands(ideal.rate as u64),
            time(ideal.seconds(0.5)),
            time(ideal.seconds(0.9)),
            time(ideal.seconds(0.99)),
            time(ideal.seconds(1.0)),
        )?;
    }
    writeln!(out)?;
    let ours = chapter.of(Crowd::NightPorter);
    if ours.wasted > 0 {
        let wasted = Crowd::ALL.map(|crowd| {
            let outcome = chapter.of(crowd);
            format!("{} {:.1}", crowd.name(), outcome.wasted as f64 / outcome.phones as f64)
        });
        writeln!(out, "Handshakes worked on for phones that had given up, per phone: {}.\n", wasted.join(", "))?;
    }
    if scenario.forgets {
        let total: u64 = ours.registers.iter().map(|n| u64::from(*n)).sum();
        let peak = ours.registers.iter().max().copied().unwrap_or(0);
        writeln!(
            out,
            "Registrations made again: {} ({REGISTRATIONS} for each phone, once), {} in the worst second. The models \
             register nothing.\n",
            thousands(total),
            thousands(peak.into())
        )?;
    }
    if matches!(scenario.cut, Cut::Network { .. }) {
        writeln!(
            out,
            "Each phone's time runs from its own network's return. Nothing here is spread: the phones do that by themselves.\n"
        )?;
    }
    Ok(())
}

fn reading(out: &mut String) -> std::fmt::Result {
    writeln!(
        out,
        "## How to read it

- The **models** are a few lines each (`examples/fleet/model.rs`), not other projects' code. *Every 5 s*: a fixed delay after
  every end and failure. *kunifiedpush's policy*: first a random 15 to 40 s, then 1.5 times longer each time, without end,
  as its source has it; everything else (20 s to give up, silence noticed after 310 s) is ours, so that only the policies
  differ. *Its former backoff*: ours before this simulation, 0.5 to 2 s first, doubling to 10 min, a tenth of jitter over
  `Retry-After`.
- **What the simulation changed.** A first delay of at most 2 s brought most of the fleet within one second when the server
  restarted quickly. A tenth of jitter over `Retry-After: 30` brought everybody refused in a second back within three. Delays
  that could be next to nothing let some phones fail three times in a row and then wait for minutes. A limit of 10 min made
  the last phones wait ten minutes more after an outage of ten. And an attempt that was under way when the phone's network
  returned, and failed, was followed by another only after the old, long delay.
- **Where others are better**, the table says so. Hammering every 5 s is quick as long as being refused costs the
  server nothing, and never recovers where it costs something. A first delay of 15 to 40 s is gentler to the server,
  and each phone that loses a link for a reason of its own waits as long.
- **Phones**: one way to the server takes 15 to 150 ms (log-uniform), a connection three round trips (TCP, TLS 1.3, upgrade).
  Each was up for at least two minutes, its server pings at a moment of its own.
- **Not simulated**: name resolution, lost packets and the kernel's own retries, load balancers, what connections cost the
  server in memory, messages that waited. *Drowns* stands for a server that accepts everything and shares itself among
  all; *sheds* for one with an admission limit in front. \"Never\" is: not within {} min.
",
        HORIZON.as_secs() / 60
    )
}

fn again(out: &mut String, upstream: &str, phones: u32, seed: u64) -> std::fmt::Result {
    writeln!(
        out,
        "## Make it again

```sh
{COMMAND}
```

writes this page and its figure. The same seed gives the same bytes; this is seed {seed}, {phones} phones, `{upstream}`. Other
crowds: `-- --phones 20000 --seed 7 --upstream ntfy --out /tmp`. A small fleet is checked by `cargo test --example fleet`."
    )
}

/// Seconds as people say them: two digits, and a third where it says something.
pub(crate) fn time(seconds: f64) -> String {
    let (number, unit) = if seconds < 119.5 { (seconds, "s") } else { (seconds / 60.0, "min") };
    let text = if number < 9.95 || unit == "min" { format!("{number:.1}") } else { format!("{number:.0}") };
    format!("{} {unit}", text.strip_suffix(".0").unwrap_or(&text))
}

/// The same, of what may not have happened.
fn time_or_never(seconds: Option<f64>) -> String {
    seconds.map_or_else(|| "never".to_owned(), time)
}

/// Digits in groups of three.
pub(crate) fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let groups: Vec<&str> =
        digits.as_bytes().rchunks(3).rev().map(|group| std::str::from_utf8(group).unwrap_or_default()).collect();
    groups.join(",")
}
