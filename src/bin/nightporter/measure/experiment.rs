//! The experiment's file: TOML, checked key by key into an [`Experiment`] that can be run. nightporter-measure(5) describes it.

use std::{collections::BTreeMap, time::Duration};

use nightporter::config::Settings;
use serde::Deserialize;

use super::{
    arm::Arm,
    values::{Problem, count, duration, percent, size, wrong},
};
use crate::lab::{scripts::AppSpec, state::State};

/// Everything that is to be done. Sizes in KiB.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Experiment {
    pub(super) name: String,
    pub(super) runs: usize,
    pub(super) seed: u64,
    pub(super) arms: Vec<Arm>,
    /// Kinds of apps, in the order of the file.
    pub(super) kinds: Vec<Kind>,
    pub(super) start_at_once: usize,
    pub(super) settle_within: Duration,
    pub(super) hold: Duration,
    pub(super) late_after: Duration,
    pub(super) drop_caches: bool,
    pub(super) messages: Plan,
    pub(super) lifecycle: Lifecycle,
    /// A push server that runs already.
    pub(super) server: Option<String>,
    pub(super) ballast: Option<BallastPlan>,
    pub(super) reach: Option<ReachPlan>,
    pub(super) expect: Expectations,
}

/// `[[app]]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Kind {
    pub(super) name: String,
    pub(super) resident: Vec<String>,
    pub(super) shared: Vec<String>,
    pub(super) registering: Option<Vec<String>>,
    pub(super) count: usize,
    pub(super) env: BTreeMap<String, String>,
    pub(super) ready_within: Duration,
}

/// `[messages]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) each: usize,
    pub(super) bytes: usize,
    pub(super) interval: Duration,
    pub(super) states: Vec<State>,
}

/// `[lifecycle]`, as the daemon reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Lifecycle {
    pub(super) text: String,
    pub(super) grace: Duration,
    pub(super) page_out_after: Duration,
    pub(super) tombstone_after: Duration,
}

/// `[ballast]`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct BallastPlan {
    pub(super) step: u64,
    /// None: [`super::ballast::FACTOR`] times what is available.
    pub(super) max: Option<u64>,
    pub(super) pressure: f64,
    pub(super) window: Duration,
}

/// `[reach]`.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct ReachPlan {
    pub(super) arms: Vec<Arm>,
    /// The number tried first.
    pub(super) first: usize,
    pub(super) most: usize,
    /// The arms after the first are tried up to this many times what the first has kept.
    pub(super) times_enough: Option<usize>,
    pub(super) pressure: f64,
    pub(super) window: Duration,
    pub(super) probes: usize,
}

/// `[expect]`; percentages as they are written.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Expectations {
    pub(super) claim_within: Option<f64>,
    pub(super) returned_at_least: Option<f64>,
    pub(super) frozen_returned_at_least: Option<f64>,
    pub(super) daemon_at_most: Option<f64>,
    pub(super) lost_at_most: Option<usize>,
    pub(super) apps_at_least: Option<usize>,
    pub(super) times_as_many_at_least: Option<f64>,
}

/// More apps than the daemon's private bus and this machine's patience are made for.
const MOST_APPS: usize = 1000;
const SECOND: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_secs(3600);

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Raw {
    name: Option<String>,
    runs: Option<usize>,
    seed: Option<u64>,
    arms: Option<Vec<Arm>>,
    start_at_once: Option<usize>,
    settle_within: Option<String>,
    hold: Option<String>,
    late_after: Option<String>,
    drop_caches: Option<bool>,
    #[serde(default)]
    app: Vec<RawApp>,
    #[serde(default)]
    messages: RawMessages,
    #[serde(default)]
    lifecycle: RawLifecycle,
    #[serde(default)]
    server: RawServer,
    ballast: Option<RawBallast>,
    reach: Option<RawReach>,
    #[serde(default)]
    expect: RawExpect,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct RawApp {
    name: String,
    resident: Option<Vec<String>>,
    shared: Option<Vec<String>>,
    registering: Option<Vec<String>>,
    count: Option<usize>,
    #[serde(default)]
    env: BTreeMap<String, String>,
    ready_within: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct RawMessages {
    each: Option<usize>,
    bytes: Option<usize>,
    interval: Option<String>,
    states: Option<Vec<State>>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct RawLifecycle {
    grace: Option<String>,
    page_out_after: Option<String>,
    tombstone_after: Option<String>,
    awake_window: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct RawServer {
    url: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct RawBallast {
    step: Option<String>,
    max: Option<String>,
    pressure: Option<String>,
    window: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct RawReach {
    arms: Option<Vec<Arm>>,
    first: Option<usize>,
    most: Option<usize>,
    times_enough: Option<usize>,
    pressure: Option<String>,
    window: Option<String>,
    probes: Option<usize>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct RawExpect {
    claim_within: Option<String>,
    returned_at_least: Option<String>,
    frozen_returned_at_least: Option<String>,
    daemon_at_most: Option<String>,
    lost_at_most: Option<usize>,
    apps_at_least: Option<usize>,
    times_as_many_at_least: Option<f64>,
}

impl Experiment {
    /// Reads the file's text.
    ///
    /// # Errors
    /// Names the key and says what it takes.
    pub(super) fn parse(text: &str) -> Result<Self, Problem> {
        let raw: Raw = toml::from_str(text).map_err(|error| Problem(error.to_string().trim_end().to_owned()))?;
        let minute = 60 * SECOND;
        let kinds = raw.app.into_iter().enumerate().map(|(n, app)| kind(n, app)).collect::<Result<Vec<_>, _>>()?;
        if kinds.is_empty() {
            return Err(Problem("there is no [[app]]: nothing to measure".into()));
        }
        let total: usize = kinds.iter().map(|kind| kind.count).sum();
        if total > MOST_APPS {
            return Err(wrong("app.count", format!("{total} apps in all; {MOST_APPS} are possible")));
        }
        let arms = arms("arms", raw.arms, &Arm::DEFAULT)?;
        Ok(Self {
            name: raw.name.unwrap_or_else(|| "experiment".into()),
            runs: count("runs", raw.runs, 3, 1..=100)?,
            seed: raw.seed.unwrap_or(1),
            arms,
            kinds,
            start_at_once: count("start-at-once", raw.start_at_once, 4, 1..=MOST_APPS)?,
            settle_within: duration("settle-within", raw.settle_within, minute, SECOND..=HOUR)?,
            hold: duration("hold", raw.hold, 10 * SECOND, SECOND / 2..=6 * HOUR)?,
            late_after: duration("late-after", raw.late_after, 10 * SECOND, SECOND..=HOUR)?,
            drop_caches: raw.drop_caches.unwrap_or(true),
            messages: messages(raw.messages)?,
            lifecycle: lifecycle(raw.lifecycle)?,
            server: server(raw.server.url)?,
            ballast: raw.ballast.map(ballast).transpose()?,
            reach: raw.reach.map(reach).transpose()?,
            expect: Expectations {
                claim_within: percent("expect.claim-within", raw.expect.claim_within)?,
                returned_at_least: percent("expect.returned-at-least", raw.expect.returned_at_least)?,
                frozen_returned_at_least: percent(
                    "expect.frozen-returned-at-least",
                    raw.expect.frozen_returned_at_least,
                )?,
                daemon_at_most: percent("expect.daemon-at-most", raw.expect.daemon_at_most)?,
                lost_at_most: raw.expect.lost_at_most,
                apps_at_least: raw.expect.apps_at_least,
                times_as_many_at_least: raw.expect.times_as_many_at_least,
            },
        })
    }

    /// The apps of one run, each kind as often as it says, mixed: the first of each kind, then the second of each.
    pub(super) fn apps(&self) -> Vec<AppSpec> {
        self.order().enumerate().map(|(n, kind)| self.kinds[kind].spec(n + 1)).collect()
    }

    /// `most` apps in the same mixture, over and over.
    pub(super) fn many(&self, most: usize) -> Vec<AppSpec> {
        let order: Vec<usize> = self.order().collect();
        order.iter().cycle().take(most).enumerate().map(|(n, kind)| self.kinds[*kind].spec(n + 1)).collect()
    }

    /// Longest any app may take until it is ready.
    pub(super) fn ready_within(&self) -> Duration {
        self.kinds.iter().map(|kind| kind.ready_within).max().unwrap_or(SECOND)
    }

    fn order(&self) -> impl Iterator<Item = usize> + '_ {
        let rounds = self.kinds.iter().map(|kind| kind.count).max().unwrap_or(0);
        (0..rounds).flat_map(move |round| {
            self.kinds.iter().enumerate().filter(move |(_, kind)| round < kind.count).map(|(index, _)| index)
        })
    }
}

impl Kind {
    /// The app with this number.
    fn spec(&self, number: usize) -> AppSpec {
        let name = format!("org.nightporter.Sample{number}");
        let fill = |text: &str| text.replace("{n}", &number.to_string()).replace("{name}", &name);
        let words = |words: &[String]| words.iter().map(|word| fill(word)).collect::<Vec<_>>();
        AppSpec {
            resident: super::commands::line(&words(&self.resident)),
            shared: super::commands::line(&words(&self.shared)),
            registering: self.registering.as_ref().map(|registering| super::commands::line(&words(registering))),
            env: self.env.iter().map(|(name, value)| (name.clone(), fill(value))).collect(),
            cgroup: None,
            name,
        }
    }
}

fn kind(index: usize, raw: RawApp) -> Result<Kind, Problem> {
    let key = |name: &str| format!("app[{index}].{name}");
    let command = |name: &str, words: Option<Vec<String>>| {
        let words = words.unwrap_or_else(|| vec!["nightporter-sample".into()]);
        match words.first() {
            None => Err(wrong(&key(name), "needs a program")),
            Some(_) if words.iter().any(|word| word.contains('\0')) => {
                Err(wrong(&key(name), "cannot hold a null character"))
            }
            Some(_) => Ok(words),
        }
    };
    for name in raw.env.keys() {
        let fits = |byte: u8| byte == b'_' || byte.is_ascii_alphanumeric();
        if name.is_empty() || !name.bytes().all(fits) || name.as_bytes()[0].is_ascii_digit() {
            return Err(wrong(&key("env"), format!("\"{name}\" is no name of a variable")));
        }
    }
    Ok(Kind {
        resident: command("resident", raw.resident)?,
        shared: command("shared", raw.shared)?,
        registering: raw.registering.map(|words| command("registering", Some(words))).transpose()?,
        count: count(&key("count"), raw.count, 1, 1..=MOST_APPS)?,
        env: raw.env,
        ready_within: duration(&key("ready-within"), raw.ready_within, 60 * SECOND, SECOND..=HOUR)?,
        name: raw.name,
    })
}

fn arms(key: &str, given: Option<Vec<Arm>>, default: &[Arm]) -> Result<Vec<Arm>, Problem> {
    let arms = given.unwrap_or_else(|| default.to_vec());
    let twice = |(n, arm): (usize, &Arm)| arms[..n].contains(arm);
    if arms.is_empty() || arms.iter().enumerate().any(twice) {
        return Err(wrong(key, "needs one arm at least, and each once"));
    }
    Ok(arms)
}

fn messages(raw: RawMessages) -> Result<Plan, Problem> {
    let states = raw.states.unwrap_or_else(|| State::ALL.to_vec());
    if states.iter().enumerate().any(|(n, state)| states[..n].contains(state)) {
        return Err(wrong("messages.states", "names a state twice"));
    }
    Ok(Plan {
        each: count("messages.each", raw.each, 2, 0..=1000)?,
        bytes: count("messages.bytes", raw.bytes, 200, 1..=4096)?,
        interval: duration("messages.interval", raw.interval, SECOND / 10, Duration::ZERO..=HOUR)?,
        states,
    })
}

fn lifecycle(raw: RawLifecycle) -> Result<Lifecycle, Problem> {
    let given = [
        ("grace", raw.grace, "3s"),
        ("page-out-after", raw.page_out_after, "6s"),
        ("tombstone-after", raw.tombstone_after, "20s"),
        ("awake-window", raw.awake_window, "2s"),
    ];
    let text: String = given
        .into_iter()
        .map(|(key, value, default)| format!("{key} = {:?}\n", value.unwrap_or_else(|| default.into())))
        .collect();
    // The daemon's own rules, by the daemon's own words.
    let settings = Settings::parse(&format!("profile = \"tombstone\"\n[lifecycle]\n{text}"))
        .map_err(|error| Problem(error.to_string()))?;
    let times = settings.lifecycle;
    Ok(Lifecycle {
        text,
        grace: times.grace,
        page_out_after: times.page_out_after,
        tombstone_after: times.tombstone_after,
    })
}

fn server(url: Option<String>) -> Result<Option<String>, Problem> {
    match url {
        Some(url) if super::commands::port_of(&url).is_none() => {
            Err(wrong("server.url", format!("\"{url}\" must be like ws://127.0.0.1:8030/, with its port")))
        }
        url => Ok(url),
    }
}

fn ballast(raw: RawBallast) -> Result<BallastPlan, Problem> {
    Ok(BallastPlan {
        step: size("ballast.step", raw.step)?.unwrap_or(16 * 1024),
        max: size("ballast.max", raw.max)?,
        pressure: percent("ballast.pressure", raw.pressure)?.unwrap_or(10.0),
        window: duration("ballast.window", raw.window, 2 * SECOND, SECOND / 5..=60 * SECOND)?,
    })
}

fn reach(raw: RawReach) -> Result<ReachPlan, Problem> {
    let most = count("reach.most", raw.most, 200, 1..=MOST_APPS)?;
    Ok(ReachPlan {
        arms: arms("reach.arms", raw.arms, &[Arm::Resident, Arm::Tombstone])?,
        first: count("reach.first", raw.first, 1, 1..=most)?,
        most,
        times_enough: raw
            .times_enough
            .map(|times| count("reach.times-enough", Some(times), 1, 1..=MOST_APPS))
            .transpose()?,
        pressure: percent("reach.pressure", raw.pressure)?.unwrap_or(10.0),
        window: duration("reach.window", raw.window, 10 * SECOND, SECOND..=10 * 60 * SECOND)?,
        probes: count("reach.probes", raw.probes, 3, 1..=100)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: &str = "[[app]]\nname = \"sample\"\n";

    fn error(text: &str) -> String {
        Experiment::parse(text).unwrap_err().to_string()
    }

    #[test]
    fn a_name_is_enough() {
        let experiment = Experiment::parse(SMALL).unwrap();
        assert_eq!(experiment.arms, Arm::DEFAULT);
        assert_eq!((experiment.runs, experiment.seed), (3, 1));
        assert_eq!(experiment.lifecycle.grace, 3 * SECOND);
        assert!(experiment.ballast.is_none() && experiment.reach.is_none());
        let apps = experiment.apps();
        assert_eq!(apps.len(), 1);
        assert_eq!(apps[0].name, "org.nightporter.Sample1");
    }

    #[test]
    fn kinds_are_mixed_and_numbered() {
        let text = "[[app]]\nname = \"a\"\ncount = 3\nresident = [\"sh\", \"-c\", \"echo {n} {name}\"]\n\
                    env = { HOME = \"{dir}/{n}\" }\n[[app]]\nname = \"b\"\nresident = [\"b\"]\n";
        let experiment = Experiment::parse(text).unwrap();
        let apps = experiment.apps();
        let commands: Vec<&str> = apps.iter().map(|app| app.resident.as_str()).collect();
        assert_eq!(
            commands,
            [
                "'sh' '-c' 'echo 1 org.nightporter.Sample1'",
                "'b'",
                "'sh' '-c' 'echo 3 org.nightporter.Sample3'",
                "'sh' '-c' 'echo 4 org.nightporter.Sample4'"
            ]
        );
        assert_eq!(apps[2].env, [("HOME".to_owned(), "{dir}/3".to_owned())]);
        let many = experiment.many(10);
        assert_eq!(many.len(), 10);
        assert_eq!((many[4].name.as_str(), many[5].resident.as_str()), ("org.nightporter.Sample5", "'b'"));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, named) in [
            ("", "[[app]]"),
            ("runs = 0\n", "runs"),
            ("arms = []\n", "arms"),
            ("arms = [\"resident\", \"resident\"]\n", "arms"),
            ("arms = [\"resdent\"]\n", "resdent"),
            ("hold = \"soon\"\n", "hold"),
            ("settle-within = \"1d\"\n", "settle-within"),
            ("colour = 1\n", "colour"),
            ("[messages]\nbytes = 5000\n", "messages.bytes"),
            ("[messages]\nstates = [\"frozen\", \"frozen\"]\n", "messages.states"),
            ("[lifecycle]\ngrace = \"1s\"\ntombstone-after = \"500ms\"\n", "lifecycle.tombstone-after"),
            ("[server]\nurl = \"http//x\"\n", "server.url"),
            ("[ballast]\nmax = \"lots\"\n", "ballast.max"),
            ("[ballast]\nmax = \"0MiB\"\n", "ballast.max"),
            ("[reach]\nmost = 100000\n", "reach.most"),
            ("[reach]\nmost = 5\nfirst = 6\n", "reach.first"),
            ("[reach]\ntimes-enough = 0\n", "reach.times-enough"),
            ("[reach]\npressure = \"ten\"\n", "reach.pressure"),
            ("[expect]\nclaim-within = \"10\"\n", "expect.claim-within"),
            ("[expect]\nclaim = \"10%\"\n", "claim"),
        ] {
            let text = if text.is_empty() { String::new() } else { format!("{text}{SMALL}") };
            let said = error(&text);
            assert!(said.contains(named), "{text:?}: {said}");
        }
        for (more, named) in [
            ("count = 0", "app[0].count"),
            ("resident = []", "app[0].resident"),
            ("env = { \"A B\" = \"\" }", "app[0].env"),
            ("ready-within = \"never\"", "app[0].ready-within"),
            ("comand = []", "comand"),
        ] {
            let said = error(&format!("{SMALL}{more}\n"));
            assert!(said.contains(named), "{more:?}: {said}");
        }
    }
}
