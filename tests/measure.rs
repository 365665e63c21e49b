//! Real experiments, as small as they can be: real processes, a real bus, this machine's own kernel. They run one after
//! the other, so that each has the machine to itself as far as that can be had.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should say where")]

#[path = "demo/support.rs"]
mod support;

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use nightporter::sys::process::cgroup_mount;
use serde_json::Value;
use support::{assert_clean, interrupt, left_behind, run, text};
use tempfile::TempDir;

static ALONE: Mutex<()> = Mutex::new(());

/// Three apps, one of them a program that knows nothing of any of this.
const TINY: &str = r#"
name = "tiny"
runs = 1
seed = 7
arms = ["resident", "resident-frozen", "tombstone"]
settle-within = "2s"
hold = "500ms"
late-after = "8s"
drop-caches = false

[[app]]
name = "sample"
count = 2
env = { NIGHTPORTER_SAMPLE_BALLAST_KIB = "2048" }

[[app]]
name = "wrapped"
resident = ["nightporter-sample", "--exec", "sleep", "{n}000"]
shared = ["nightporter-sample", "--exec", "sleep", "{n}000"]
env = { NIGHTPORTER_SAMPLE_IDLE_WITHIN = "5", HOME = "{dir}" }

[messages]
each = 1
bytes = 300
interval = "10ms"
states = ["running", "frozen", "tombstone"]

[lifecycle]
grace = "300ms"
page-out-after = "600ms"
tombstone-after = "3s"
awake-window = "300ms"

[expect]
lost-at-most = 0
"#;

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn measure(dir: &Path, experiment: &str) -> Command {
    let file = dir.with_extension("toml");
    fs::write(&file, experiment).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_nightporter"));
    command.arg("measure").arg(&file).env("TMPDIR", dir);
    command
}

/// A directory for the experiment's own, and one beside it for what it is given and gives back.
fn dirs() -> (TempDir, PathBuf) {
    let out = TempDir::new().unwrap();
    let dir = out.path().join("world");
    fs::create_dir(&dir).unwrap();
    (out, dir)
}

/// Cgroups of the process `pid`, wherever it made them.
fn cgroups_of(pid: u32) -> Vec<PathBuf> {
    let name = format!("nightporter-measure-{pid}");
    let own = fs::read_to_string("/proc/self/cgroup").unwrap();
    let own = own.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/").trim_start_matches('/').to_owned();
    let mount = cgroup_mount().into_iter();
    let places: BTreeSet<PathBuf> = mount.flat_map(|mount| [mount.join(&name), mount.join(&own).join(&name)]).collect();
    places.into_iter().filter(|path| path.exists()).collect()
}

/// What the kernel says of the apps that run for the experiment below `dir`: processes, PSS in KiB, established TCP
/// connections.
fn seen(dir: &Path, mode: &str) -> (usize, u64, usize) {
    let needle = dir.to_str().unwrap();
    let mode = format!("NIGHTPORTER_SAMPLE_MODE={mode}\0");
    let established: HashSet<String> = fs::read_to_string("/proc/net/tcp")
        .unwrap()
        .lines()
        .map(|line| line.split_ascii_whitespace().map(str::to_owned).collect::<Vec<_>>())
        .filter(|fields| fields.get(3).is_some_and(|state| state == "01"))
        .filter_map(|fields| Some(format!("socket:[{}]", fields.get(9)?)))
        .collect();
    let mut found = (0, 0, 0);
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let environment = text(&fs::read(entry.path().join("environ")).unwrap_or_default());
        let program = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        if !environment.contains(needle) || !environment.contains(&mode) || program == "sh\n" {
            continue;
        }
        let rollup = fs::read_to_string(entry.path().join("smaps_rollup")).unwrap_or_default();
        let pss = rollup.lines().find_map(|line| line.strip_prefix("Pss:"));
        found.0 += 1;
        found.1 += pss.and_then(|pss| pss.trim().strip_suffix(" kB")?.parse::<u64>().ok()).unwrap_or(0);
        let fds = fs::read_dir(entry.path().join("fd")).into_iter().flatten().flatten();
        let links = fds.filter_map(|fd| fs::read_link(fd.path()).ok());
        found.2 += links.filter(|link| established.contains(&*link.to_string_lossy())).count();
    }
    found
}

#[test]
fn what_is_measured_is_what_the_kernel_says_and_nothing_is_left() {
    let _alone = alone();
    let (out, dir) = dirs();
    let (json, markdown) = (out.path().join("figures.json"), out.path().join("figures.md"));
    let mut command = measure(&dir, TINY);
    command.arg("--json").arg(&json).arg("--markdown").arg(&markdown);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let pid = child.id();

    // Looks of our own all the while: four processes are all there are in the arm without the daemon.
    let over = Arc::new(AtomicBool::new(false));
    let looker = thread::spawn({
        let (dir, over) = (dir.clone(), Arc::clone(&over));
        move || {
            let (mut resident, mut frozen) = (Vec::new(), false);
            while !over.load(Ordering::Relaxed) {
                let look = seen(&dir, "resident");
                if look.0 == 4 {
                    resident.push(look);
                }
                let events =
                    cgroups_of(pid).into_iter().flat_map(|base| fs::read_dir(base).into_iter().flatten().flatten());
                let events = events.filter_map(|app| fs::read_to_string(app.path().join("cgroup.events")).ok());
                frozen |= events.filter(|text| text.contains("frozen 1")).count() == 3;
                thread::sleep(Duration::from_millis(50));
            }
            (resident, frozen)
        }
    });
    let output = child.wait_with_output().unwrap();
    over.store(true, Ordering::Relaxed);
    let (resident_looks, frozen) = looker.join().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_clean(&dir);
    assert_eq!(cgroups_of(pid), Vec::<PathBuf>::new());

    let document: Value = serde_json::from_str(&fs::read_to_string(&json).unwrap()).unwrap();
    let samples = document["samples"].as_array().unwrap();
    let sample = |arm: &str| samples.iter().find(|sample| sample["arm"] == arm).unwrap();
    assert_eq!(samples.len(), 3, "{document}");
    let whole = |sample: &Value, at: &str| {
        sample.pointer(at).and_then(Value::as_i64).unwrap_or_else(|| panic!("{at}: {sample}"))
    };

    // The whole machine: what is used is what is neither free nor can be dropped, and the cost is the difference less the
    // server's.
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap();
    let total = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:")).unwrap();
    let total: i64 = total.trim().strip_suffix(" kB").unwrap().parse().unwrap();
    for sample in samples {
        for at in ["/before", "/rest"] {
            assert_eq!(whole(sample, &format!("{at}/total")), total);
            let spare = ["free", "at_hand", "droppable"].map(|part| whole(sample, &format!("{at}/{part}")));
            assert!(spare.iter().all(|part| (0..total).contains(part)), "{sample}");
            assert_eq!(whole(sample, &format!("{at}/used")), total - spare.iter().sum::<i64>());
        }
        let server = whole(sample, "/server_pss/1") - whole(sample, "/server_pss/0");
        assert_eq!(whole(sample, "/cost"), whole(sample, "/rest/used") - whole(sample, "/before/used") - server);
        let gone = whole(sample, "/before/available") - whole(sample, "/rest/available");
        assert_eq!(whole(sample, "/cost_unavailable"), gone - server);
        assert_eq!((whole(sample, "/messages/lost"), whole(sample, "/messages/duplicated")), (0, 0), "{sample}");
    }

    // The apps: as our own looks have it.
    let resident = sample("resident");
    let (pss, connections) = (whole(resident, "/apps_pss"), whole(resident, "/connections"));
    assert_eq!(connections, 3, "{resident}");
    let near = |look: &&(usize, u64, usize)| {
        look.2 == 3 && i64::try_from(look.1).unwrap().abs_diff(pss) * 100 < pss.unsigned_abs() * 5
    };
    assert!(resident_looks.iter().any(|look| near(&look)), "{pss} KiB against {resident_looks:?}");
    assert!(pss > 2 * 2048, "{resident}");
    let processes: Vec<i64> = (0..3).map(|n| whole(resident, &format!("/apps/{n}/processes"))).collect();
    assert_eq!(processes.iter().sum::<i64>(), 4, "the wrapped one is two: {resident}");
    assert_eq!((whole(resident, "/messages/sent"), whole(resident, "/reachable")), (12, 3));
    assert_eq!(whole(resident, "/messages/in_time"), 12);

    // Held still, nobody hears anything; and all of it comes late.
    let held = sample("resident-frozen");
    assert!(frozen || cgroup_mount().is_none(), "the kernel never said that all three are frozen");
    assert_eq!(whole(held, "/reachable"), 0, "{held}");
    assert_eq!((whole(held, "/messages/sent"), whole(held, "/messages/in_time")), (12, 3), "{held}");
    assert_eq!(whole(held, "/messages/late"), 9, "{held}");

    let tombstone = sample("tombstone");
    assert_eq!((whole(tombstone, "/apps_pss"), whole(tombstone, "/connections")), (0, 1), "{tombstone}");
    assert_eq!(whole(tombstone, "/reachable"), 3, "{tombstone}");
    assert!(whole(tombstone, "/daemon_pss") > 0 && tombstone["daemon_cpu"].as_f64().unwrap() > 0.0, "{tombstone}");
    assert_eq!(tombstone["claim"], tombstone["report"]["saved"]);
    for state in ["running", "frozen", "tombstone"] {
        assert!(tombstone["latencies_ms"][state][0].as_f64().unwrap() > 0.0, "{state}: {tombstone}");
    }

    let of =
        |arm: &str| document["arms"].as_array().unwrap().iter().find(|figures| figures["arm"] == arm).unwrap().clone();
    let saved = of("tombstone")["saved"]["median"].as_f64().unwrap();
    #[expect(clippy::cast_precision_loss, reason = "KiB of a small experiment")]
    let cost = |arm: &str| whole(sample(arm), "/cost") as f64;
    assert!((saved - (cost("resident") - cost("tombstone"))).abs() < 0.5, "{saved}");
    assert_eq!(of("resident")["saved"], Value::Null);
    assert_eq!(document["expectations"][0]["met"], true, "{document}");

    let said = text(&output.stdout);
    for expected in ["Memory used", "resident-frozen", "The daemon's own claim", "met: lost-at-most"] {
        assert!(said.contains(expected), "{expected} is missing:\n{said}");
    }
    let markdown = fs::read_to_string(&markdown).unwrap();
    assert!(
        markdown.starts_with("### tiny\n") && markdown.contains("| | resident | resident-frozen | tombstone |"),
        "{markdown}"
    );
}

/// The fourth app never comes up by itself nor ends when it is asked to, so that three are as many as can be kept; behind the
/// daemon it does, and as many again are enough. What is beyond three only registers, once.
#[test]
fn the_search_for_the_greatest_number_ends_where_apps_fail_and_where_it_is_enough() {
    let _alone = alone();
    let (out, dir) = dirs();
    let json = out.path().join("reach.json");
    let registered = out.path().join("registered");
    let experiment = r#"
settle-within = "1s"
late-after = "15s"
[[app]]
name = "three"
resident = ["sh", "-c", "test {n} -lt 4 && exec \"$SAMPLE\"; trap '' TERM; exec sleep 1000"]
registering = ["sh", "-c", "echo {n} >>REGISTERED; exec \"$SAMPLE\""]
env = { NIGHTPORTER_SAMPLE_BALLAST_KIB = "256", SAMPLE = "SAMPLE_PATH" }
ready-within = "5s"
[lifecycle]
grace = "1s"
page-out-after = "2s"
tombstone-after = "3s"
awake-window = "1s"
[reach]
first = 2
most = 8
times-enough = 2
window = "1s"
pressure = "100%"
[expect]
apps-at-least = 7
times-as-many-at-least = 2.0
"#
    .replace("SAMPLE_PATH", env!("CARGO_BIN_EXE_nightporter-sample"))
    .replace("REGISTERED", registered.to_str().unwrap());
    let output = run(measure(&dir, &experiment).arg("--reach").arg("--json").arg(&json));
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
    for expected in ["MISSED: apps-at-least 6", "met: times-as-many-at-least 2.0 times", "s: tombstone: 6 apps, kept"] {
        assert!(text(&output.stderr).contains(expected), "{}", text(&output.stderr));
    }
    assert_clean(&dir);
    let document: Value = serde_json::from_str(&fs::read_to_string(&json).unwrap()).unwrap();
    let reach = &document["reach"][0];
    assert_eq!((reach["apps"].as_u64(), reach["too_many"].as_u64()), (Some(3), Some(4)), "{document}");
    assert_eq!(reach["ended"], "not-ready", "{document}");
    assert_eq!(reach["connections"], 3, "{document}");
    // A machine that has too many apps has no time to ask them to end, one by one.
    assert!(!reach["notes"].to_string().contains("SIGTERM"), "{document}");
    let steps = reach["steps"].as_array().unwrap();
    let tried: Vec<(u64, bool)> =
        steps.iter().map(|step| (step["apps"].as_u64().unwrap(), step["kept"].as_bool().unwrap())).collect();
    assert_eq!(tried, [(2, true), (3, true), (4, false)], "{document}");
    assert!(steps[1]["slowest_push_ms"].as_f64().unwrap() > 0.0, "{document}");
    let behind = &document["reach"][1];
    assert_eq!((behind["apps"].as_u64(), behind["ended"].as_str()), (Some(6), Some("most")), "{document}");
    let mut once: Vec<String> = fs::read_to_string(&registered).unwrap().lines().map(str::to_owned).collect();
    once.sort();
    assert_eq!(once, ["4", "5", "6"], "{document}");
    assert!(behind["notes"].to_string().contains("3 apps were started in full"), "{document}");
}

/// Waits until `look` sees it while `child` runs, then interrupts it and expects a clean end.
fn interrupted_when(experiment: &str, what: &str, look: impl Fn(&Path, u32) -> bool) {
    let (_out, dir) = dirs();
    let mut child = measure(&dir, experiment).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let pid = child.id();
    let deadline = Instant::now() + Duration::from_secs(120);
    while !look(&dir, pid) {
        if let Some(status) = child.try_wait().unwrap() {
            panic!("{what} never came: {status}, {}", text(&child.wait_with_output().unwrap().stderr));
        }
        assert!(Instant::now() < deadline, "{what} never came");
        thread::sleep(Duration::from_millis(5));
    }
    interrupt(&child);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", text(&output.stderr));
    assert_clean(&dir);
    assert_eq!(cgroups_of(pid), Vec::<PathBuf>::new());
    assert!(children_of(pid).is_empty());
}

fn children_of(pid: u32) -> Vec<String> {
    let stats =
        fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| fs::read_to_string(entry.path().join("stat")).ok());
    stats
        .filter(|stat| stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.split(' ').nth(1) == Some(&pid.to_string())))
        .collect()
}

#[test]
fn an_interrupted_experiment_leaves_nothing_frozen() {
    let _alone = alone();
    let experiment =
        TINY.replace("arms = [\"resident\", \"resident-frozen\", \"tombstone\"]", "arms = [\"resident-frozen\"]");
    let experiment = experiment
        .replace("hold = \"500ms\"", "hold = \"60s\"")
        .replace("settle-within = \"2s\"", "settle-within = \"1s\"");
    // Not while it holds for the figures before.
    interrupted_when(
        &experiment.replace("hold = \"60s\"", "hold = \"2s\""),
        "the freeze",
        |dir, pid| match cgroups_of(pid).first() {
            Some(base) => fs::read_dir(base).into_iter().flatten().flatten().any(|app| {
                fs::read_to_string(app.path().join("cgroup.events")).is_ok_and(|text| text.contains("frozen 1"))
            }),
            None => cgroup_mount().is_none() && seen(dir, "resident").0 == 4,
        },
    );
}

#[test]
fn an_interrupted_experiment_gives_its_ballast_back() {
    let _alone = alone();
    if !Path::new("/proc/pressure/memory").exists() {
        // Without it there is no such test, and it says so.
        return;
    }
    let experiment = TINY.replace("arms = [\"resident\", \"resident-frozen\", \"tombstone\"]", "arms = [\"resident\"]");
    let experiment = experiment
        .replace("[expect]\nlost-at-most = 0\n", "[ballast]\nstep = \"1MiB\"\nmax = \"2GiB\"\npressure = \"100%\"\n");
    interrupted_when(&experiment, "the ballast", |_, pid| {
        children_of(pid).iter().any(|stat| {
            let child = stat.split(' ').next().unwrap();
            let command = fs::read(format!("/proc/{child}/cmdline")).unwrap_or_default();
            text(&command).contains("measure-ballast")
        })
    });
}

#[test]
fn the_ballast_stops_at_its_bound_and_is_given_back() {
    let _alone = alone();
    if !Path::new("/proc/pressure/memory").exists() {
        return;
    }
    let (out, dir) = dirs();
    let json = out.path().join("figures.json");
    let experiment = TINY.replace("arms = [\"resident\", \"resident-frozen\", \"tombstone\"]", "arms = [\"daemon\"]");
    let experiment = experiment
        .replace("[expect]\nlost-at-most = 0\n", "[ballast]\nstep = \"16MiB\"\nmax = \"40MiB\"\npressure = \"100%\"\n");
    let output = run(measure(&dir, &experiment).arg("--json").arg(&json));
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_clean(&dir);
    let document: Value = serde_json::from_str(&fs::read_to_string(&json).unwrap()).unwrap();
    let ballast = &document["samples"][0]["ballast"];
    assert_eq!((ballast["kib"].as_u64(), ballast["ended"].as_str()), (Some(40 * 1024), Some("max")), "{ballast}");
    assert!(text(&output.stdout).contains("at least 40.0 MiB"), "{}", text(&output.stdout));
    // Behind a daemon that touches nothing all apps run, on one connection.
    assert_eq!(
        (document["samples"][0]["connections"].as_u64(), document["samples"][0]["reachable"].as_u64()),
        (Some(1), Some(3))
    );
}

#[test]
fn a_file_that_is_wrong_is_refused_before_anything_starts() {
    for (experiment, named) in [
        ("[[app]]\nname = \"x\"\ncuont = 2\n", "cuont"),
        ("[[app]]\nname = \"x\"\n[ballast]\nmax = \"much\"\n", "ballast.max"),
        ("runs = 3\n", "[[app]]"),
        ("not toml", "line 1"),
    ] {
        let (_out, dir) = dirs();
        let output = run(&mut measure(&dir, experiment));
        assert_eq!(output.status.code(), Some(65), "{}", text(&output.stderr));
        assert!(text(&output.stderr).contains(named), "{named}: {}", text(&output.stderr));
        assert_clean(&dir);
    }
    let (_out, dir) = dirs();
    let output = run(measure(&dir, "[[app]]\nname = \"x\"\n").arg("--reach"));
    assert_eq!(output.status.code(), Some(65), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("[reach]"), "{}", text(&output.stderr));
    assert_eq!(left_behind(&dir), Vec::<String>::new());
}

fn root(name: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(name)).unwrap()
}

/// What `measure --check` says to this file, and whether it takes it.
fn check(experiment: &str) -> (bool, String) {
    let (_out, dir) = dirs();
    let output = run(measure(&dir, experiment).arg("--check"));
    (output.status.success(), text(&output.stdout) + &text(&output.stderr))
}

/// Keys by section, as the parser itself names them when it is given one that is none.
fn known() -> BTreeMap<String, BTreeSet<String>> {
    let of = |section: &str| {
        let (_, said) = check(&format!("{section}\nxyzzy = 1\n"));
        let (_, rest) = said.split_once("expected ").unwrap_or_else(|| panic!("{section}: {said}"));
        rest.split('`').skip(1).step_by(2).map(str::to_owned).collect::<BTreeSet<String>>()
    };
    let mut known = BTreeMap::new();
    let mut top = of("");
    for section in ["app", "messages", "lifecycle", "server", "ballast", "reach", "expect"] {
        assert!(top.remove(section), "{section}: {top:?}");
        let header = if section == "app" { "[[app]]".into() } else { format!("[{section}]") };
        let keys = of(&header);
        known.insert(header, keys);
    }
    known.insert(String::new(), top);
    known
}

#[test]
fn every_key_is_in_the_manual_and_in_the_example_and_no_other() {
    let known = known();
    assert!(known.values().map(BTreeSet::len).sum::<usize>() >= 30, "the parser is not understood any more: {known:?}");

    let mut described: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let page = root("man/nightporter-measure.5");
    let (page, _) = page.split_once(".Sh FIGURES").unwrap();
    let mut section = String::new();
    for line in page.lines() {
        if let Some(header) = line.strip_prefix(".Ss ") {
            section = header.to_owned();
        } else if let Some(keys) = line.strip_prefix(".It Cm ") {
            let keys = keys.split(" , Cm ").map(str::to_owned);
            described.entry(section.clone()).or_default().extend(keys);
        }
    }
    // Values of a key, in a list of their own.
    for arm in ["resident", "resident-frozen", "daemon", "cached", "tombstone"] {
        assert!(described.get_mut("").unwrap().remove(arm), "{arm} is not described");
    }
    assert_eq!(described, known);

    let mut shown: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let example = root("docs/experiment.toml");
    let mut section = String::new();
    for line in example.lines().map(|line| line.strip_prefix("# ").unwrap_or(line)) {
        if line.starts_with('[') {
            line.clone_into(&mut section);
        } else if let Some((key, _)) = line.split_once(" = ").filter(|(key, _)| !key.contains(' ')) {
            shown.entry(section.clone()).or_default().insert(key.to_owned());
        }
    }
    assert_eq!(shown, known);
}

#[test]
fn the_example_is_an_experiment_and_says_the_defaults() {
    let example = root("docs/experiment.toml");
    let (taken, said) = check(&example);
    assert!(taken && said.contains("run 5: ") && said.contains("with --reach: up to 200 apps"), "{said}");
    let is_key = |rest: &str| rest.split_once(" = ").is_some_and(|(key, _)| !key.contains(' '));
    let all: String = example
        .lines()
        .map(|line| line.strip_prefix("# ").filter(|rest| is_key(rest)).unwrap_or(line))
        .fold(String::new(), |text, line| text + line + "\n");
    let (taken, said_of_all) = check(&all);
    assert!(taken, "{said_of_all}");
    assert_eq!(said, said_of_all);
    // In the manual there is one more.
    let page = root("man/nightporter-measure.5");
    let (_, rest) = page.split_once(".Bd -literal -offset indent\n").unwrap();
    let (taken, said) = check(rest.split_once("\n.Ed").unwrap().0);
    assert!(taken && said.contains("5 × sample"), "{said}");
}
