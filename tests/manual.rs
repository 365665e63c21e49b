//! The manual against the program: every key the parser knows is described, every example is taken by it, and the pages
//! are set without a warning. What is asked here is the parser itself, by its own errors, not a list kept beside it.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use nightporter::{
    config::{MqttSettings, Settings, UpstreamKind},
    model::Urgency,
};

/// No key has this name.
const UNKNOWN: &str = "xyzzy";
/// A section's name and keys; the top level's is "".
type Sections = BTreeMap<String, BTreeSet<String>>;

#[test]
fn every_key_is_described_and_no_other() {
    let known = sections();
    let upstream = &known["[[upstream]]"];
    assert!(upstream.len() >= 19 && known.len() >= 8, "the parser is not understood any more: {known:?}");
    let described = described(&page("nightporter.toml.5"));
    for (section, keys) in &known {
        let found = described.get(section).cloned().unwrap_or_default();
        assert_eq!(&found, keys, "section {section:?} of man/nightporter.toml.5");
    }
    assert_eq!(described.len(), known.len(), "{:?}", described.keys());
}

#[test]
fn every_key_is_in_the_file_we_ship() {
    let mut shown = Sections::new();
    let mut section = String::new();
    for line in uncommented(&shipped()).lines() {
        if line.starts_with('[') {
            section = section_of(line);
        } else if let Some((key, _)) = line.split_once(" = ") {
            shown.entry(section.clone()).or_default().insert(key.to_owned());
            // Such as "or token-credential".
            let others = line.split_once(" # ").map(|(_, comment)| comment).unwrap_or_default();
            let other =
                others.split([' ', ',', ';']).filter(|word| word.ends_with("-file") || word.ends_with("-credential"));
            shown.entry(section.clone()).or_default().extend(other.map(str::to_owned));
        }
    }
    assert_eq!(shown, sections());
}

#[test]
fn the_file_we_ship_says_the_defaults_and_parses_with_everything_in_it() {
    let text = shipped();
    assert_eq!(Settings::parse(&text).unwrap(), Settings::default());
    let all = Settings::parse(&uncommented(&text)).unwrap();
    let kinds: BTreeSet<&str> = all.upstreams.iter().map(|upstream| upstream.kind.as_str()).collect();
    assert_eq!(kinds, words("[[upstream]]", "kind").iter().map(String::as_str).collect());
    let default = &Settings::default().upstreams[0];
    assert_eq!(all.upstreams[0], *default, "the first one shown is the one that is used without any");
    let broker = all.upstreams.iter().find(|upstream| upstream.kind == UpstreamKind::Mqtt).unwrap();
    assert_eq!(MqttSettings { version: None, ..broker.mqtt.clone() }, default.mqtt);
    assert_eq!(all.apps[0].urgency, Urgency::default());
}

#[test]
fn every_word_a_key_takes_is_described() {
    let text = page("nightporter.toml.5");
    for (section, key) in [("", "profile"), ("[[upstream]]", "kind"), ("[[app]]", "urgency"), ("[network]", "roaming")]
    {
        let taken = words(section, key);
        assert!(taken.len() >= 2, "{key}: {taken:?}");
        for word in taken {
            let is_it = |line: &str| line.starts_with(".Cm ") && line.split(&[' ', ','][..]).any(|part| part == word);
            assert!(text.lines().any(is_it), "{word}, a value of {key}, is not in man/nightporter.toml.5");
        }
    }
}

#[test]
fn every_example_is_taken() {
    let mut taken = 0;
    // Experiments have a parser of their own, which tests/measure.rs asks.
    for path in pages().into_iter().filter(|path| !path.ends_with("nightporter-measure.5")) {
        let text = fs::read_to_string(&path).unwrap();
        for example in examples(&text) {
            for text in [example.clone(), uncommented(&example)] {
                let parsed = Settings::parse(&text);
                assert!(parsed.is_ok(), "an example in {}: {}\n{text}", path.display(), parsed.unwrap_err());
            }
            taken += 1;
        }
    }
    assert!(taken >= 11, "only {taken} examples were found");
}

/// Issue 3: each upstream has a page with a working configuration and what it can and cannot do.
#[test]
fn every_kind_of_upstream_has_its_page() {
    let overview = page("nightporter-upstreams.7");
    for kind in words("[[upstream]]", "kind") {
        let name = format!("nightporter-{kind}");
        let text = page(&format!("{name}.7"));
        let of_kind = |settings: &Settings| settings.upstreams.iter().any(|upstream| upstream.kind.as_str() == kind);
        let settings: Vec<Settings> = examples(&text).iter().filter_map(|text| Settings::parse(text).ok()).collect();
        assert!(settings.iter().any(of_kind), "{name}.7 has no configuration");
        let described: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix(".It ")).collect();
        for subjects in [&["Urgency"][..], &["TTL"], &["Collapse", "Topic"], &["Acknowledgement"]] {
            let said = |item: &&str| subjects.iter().any(|subject| item.contains(subject));
            assert!(described.iter().any(said), "{name}.7 does not say what becomes of {subjects:?}");
        }
        assert!(overview.contains(&format!(".Xr {name} 7")), "nightporter-upstreams.7 does not name {name}(7)");
    }
}

#[test]
fn pages_name_only_pages_that_are_there() {
    let there: BTreeSet<String> =
        pages().iter().map(|path| path.file_name().unwrap().to_str().unwrap().to_owned()).collect();
    for path in pages() {
        let text = fs::read_to_string(&path).unwrap();
        // Both macro packages' ways: `.Xr name 8` and `\\fBname\\fR(8)`.
        let text = text.replace("\\-", "-").replace("\\fB", "Xr ").replace("\\fR(", " ");
        let (_, see_also) = text.split_once("SEE ALSO").unwrap_or_else(|| panic!("{}: no SEE ALSO", path.display()));
        assert!(see_also.contains("Xr nightporter"), "{}", path.display());
        for named in text.split("Xr ").skip(1) {
            let mut parts = named.split([' ', ')', '\n']);
            let (name, section) = (parts.next().unwrap(), parts.next().unwrap_or_default());
            if name.starts_with("nightporter") && section.starts_with(|c: char| c.is_ascii_digit()) {
                let file = format!("{name}.{section}");
                assert!(there.contains(&file), "{} names {file}, which is not there", path.display());
            }
        }
    }
}

#[test]
fn every_page_is_in_one_package() {
    let lists = ["nightporter", "nightporter-relay"]
        .map(|package| fs::read_to_string(root().join(format!("debian/{package}.manpages"))).unwrap());
    let mut packaged: Vec<PathBuf> = lists.iter().flat_map(|list| list.lines()).map(|line| root().join(line)).collect();
    packaged.sort();
    let mut there = pages();
    there.sort();
    assert_eq!(packaged, there);
}

/// As `man --warnings` does, on a terminal of 80 columns, and stricter.
#[test]
fn pages_are_set_without_a_warning() {
    for path in pages() {
        let mut groff = Command::new("groff");
        groff.args(["-ww", "-k", "-mandoc", "-Tutf8", "-rLL=78n"]).arg(&path);
        let output = groff.output().unwrap_or_else(|error| panic!("groff (Debian's package groff-base): {error}"));
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.is_empty(), "{}:\n{said}", path.display());
        assert!(output.stdout.len() > 1000, "{} is empty", path.display());
    }
}

// What the parser knows, from its own mouth.

/// All sections with their keys; the top level's are those that are no section.
fn sections() -> Sections {
    let mut known = Sections::new();
    let mut top = BTreeSet::new();
    for key in expected("field", &format!("{UNKNOWN} = 1")) {
        let headers = [format!("[[{key}]]"), format!("[{key}]")];
        let named =
            expected("variant", &format!("[{key}]\n{UNKNOWN} = 1")).into_iter().map(|name| format!("[{key}.{name}]"));
        let section = headers.into_iter().chain(named).find_map(|header| {
            let keys = expected("field", &format!("{header}\n{UNKNOWN} = 1"));
            (!keys.is_empty()).then_some((section_of(&header), keys))
        });
        match section {
            Some((header, keys)) => drop(known.insert(header, keys)),
            None => drop(top.insert(key)),
        }
    }
    known.insert(String::new(), top);
    known
}

/// The section a header begins; of a table of tables (`[role.music]`) any (`[role.NAME]`).
fn section_of(header: &str) -> String {
    let header = header.split('#').next().unwrap().trim();
    match header.split_once('.') {
        Some((table, _)) => format!("{table}.NAME]"),
        None => header.to_owned(),
    }
}

/// The words a key takes.
fn words(section: &str, key: &str) -> BTreeSet<String> {
    expected("variant", &format!("{section}\n{key} = \"{UNKNOWN}\""))
}

/// What the parser would have expected instead of a field or variant [`UNKNOWN`]; nothing if it complains of something else.
fn expected(what: &str, text: &str) -> BTreeSet<String> {
    let error = Settings::parse(text).unwrap_err().to_string();
    let complaint = format!("unknown {what} `{UNKNOWN}`, expected ");
    let Some((_, rest)) = error.split_once(&complaint) else { return BTreeSet::new() };
    rest.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

// What the files say.

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn page(name: &str) -> String {
    let path = root().join("man").join(name);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn pages() -> Vec<PathBuf> {
    let paths: Vec<PathBuf> = fs::read_dir(root().join("man")).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(paths.len() >= 5, "{paths:?}");
    paths
}

fn shipped() -> String {
    fs::read_to_string(Path::new(&root()).join("config/nightporter.toml")).unwrap()
}

/// Keys described in each section of nightporter.toml(5): the words after `Cm` in the heads of its lists.
fn described(page: &str) -> Sections {
    let mut found = Sections::new();
    let mut section = Some(String::new());
    for line in page.lines() {
        if line.starts_with(".Sh ") {
            section = (line == ".Sh DESCRIPTION").then(String::new);
        } else if let Some(name) = line.strip_prefix(".Ss ") {
            section = Some(name.to_owned());
        } else if let (Some(section), Some(head)) = (&section, line.strip_prefix(".It ")) {
            let words: Vec<&str> = head.split([' ', ',']).collect();
            let keys = words.windows(2).filter(|pair| pair[0] == "Cm").map(|pair| pair[1].to_owned());
            let keys: BTreeSet<String> = keys.collect();
            if !keys.is_empty() {
                found.entry(section.clone()).or_default().extend(keys);
            }
        }
    }
    found
}

/// Configuration files shown in a page: literal displays with a section of ours, and displays of nothing but our keys, which
/// go on where the one before ended.
fn examples(page: &str) -> Vec<String> {
    let known = sections();
    let keys: BTreeSet<&String> = known.values().flatten().collect();
    let is_header = |line: &str| line.starts_with('[') && known.contains_key(&section_of(line));
    let is_key = |line: &str| line.split_once(" = ").is_some_and(|(key, _)| keys.contains(&key.to_owned()));
    let is_nothing = |line: &str| line.is_empty() || line.starts_with('#');
    let mut found: Vec<String> = Vec::new();
    for display in page.split("\n.Bd -literal").skip(1) {
        let (_, text) = display.split_once('\n').unwrap();
        let (text, _) = text.split_once("\n.Ed").unwrap();
        let text = text.replace("\\(dq", "\"").replace("\\-", "-").replace("\\&", "").replace("\\e", "\\");
        let lines = || text.lines().filter(|line| !is_nothing(line));
        if lines().any(is_header) {
            found.push(text);
        } else if lines().count() > 0 && lines().all(is_key) {
            let before = found.last_mut().unwrap_or_else(|| panic!("keys that belong nowhere:\n{text}"));
            *before = format!("{before}\n{text}");
        }
    }
    found
}

/// The text with its commented sections and keys in force.
fn uncommented(text: &str) -> String {
    let known = sections();
    let keys: BTreeSet<&String> = known.values().flatten().collect();
    let lines = text.lines().map(|line| {
        let Some(rest) = line.strip_prefix("# ") else { return line };
        let header = rest.starts_with('[') && known.contains_key(&section_of(rest));
        let key = rest.split_once(" = ").is_some_and(|(key, _)| keys.contains(&key.to_owned()));
        if header || key { rest } else { line }
    });
    lines.fold(String::new(), |text, line| text + line + "\n")
}
