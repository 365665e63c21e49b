//! Starting: configuration, a second daemon, a damaged database, what the program is made of.

use std::{fs, path::Path, process::Stdio};

use crate::support::{Behaviour, Setup, World, nightporterd, of, wait};

/// A valid configuration with this in it.
fn run_with(config: &str) -> (Option<i32>, String) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nightporter.toml");
    fs::write(&path, config).unwrap();
    let mut outputs = ["--check-config", "--user"].map(|mode| {
        let mut command = nightporterd();
        command.arg(mode).arg("--config").arg(&path).arg("--state-dir").arg(dir.path().join("state"));
        let output = command.env("DBUS_SESSION_BUS_ADDRESS", "unix:path=/nonexistent").output().unwrap();
        (output.status.code(), of(&output))
    });
    assert_eq!(outputs[0].0, outputs[1].0, "checking and starting differ: {outputs:?}");
    assert!(!dir.path().join("state").exists(), "it began with a configuration it does not understand");
    std::mem::take(&mut outputs[1])
}

#[test]
fn a_configuration_that_makes_no_sense_is_refused_by_the_key() {
    let upstream = "[[upstream]]\nname = \"a\"\nkind = \"autopush\"\n";
    for (config, key) in [
        ("colour = \"red\"", "colour"),
        ("[lifecycle]\ngrce = \"1s\"", "grce"),
        ("[limits]\nmessages = 3", "messages"),
        ("profile = \"ios\"", "ios"),
        ("[lifecycle]\ngrace = \"soon\"", "lifecycle.grace"),
        ("[lifecycle]\ngrace = 10", "grace"),
        ("[lifecycle]\ngrace = \"30days\"", "lifecycle.grace"),
        ("[lifecycle]\ngrace = \"1h\"", "lifecycle.tombstone-after"),
        ("[limits]\nattempts = 0", "limits.attempts"),
        ("[limits]\nregistrations = -1", "registrations"),
        (&format!("{upstream}url = \"ftp://example.org\""), "upstream[0].url"),
        (&format!("{upstream}url = \"ws://a:b@example.org\""), "upstream[0].url"),
        (&format!("{upstream}url = \"ws://example.org\"\nca-file = \"ca.pem\""), "upstream[0].ca-file"),
        (upstream, "url"),
        ("not toml at all", "nightporter.toml"),
    ] {
        let (code, said) = run_with(config);
        assert_eq!(code, Some(78), "{config:?}: {said}");
        assert!(said.contains(key), "{config:?}: {said}");
        assert!(said.contains("nightporter.toml"), "the file is named: {said}");
    }
}

#[test]
fn the_configuration_we_ship_is_valid() {
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/nightporter.toml");
    let check = |path: &Path| nightporterd().arg("--check-config").arg("--config").arg(path).output().unwrap();
    let output = check(&shipped);
    assert!(output.status.success(), "{}", of(&output));
    assert!(String::from_utf8(output.stdout).unwrap().contains("valid"));
    // With everything in it that is commented out but the alternatives.
    let text = fs::read_to_string(&shipped).unwrap().lines().fold(String::new(), |text, line| {
        let key = line.strip_prefix("# ").filter(|line| line.starts_with('[') || line.split_once(" = ").is_some());
        let line = key.filter(|key| !key.starts_with("token") && !key.contains("nightporterd")).unwrap_or(line);
        text + line + "\n"
    });
    assert!(text.contains("\n[[upstream]]\n") && text.contains("\nca-file"), "{text}");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("all.toml");
    fs::write(&path, text).unwrap();
    let output = check(&path);
    assert!(output.status.success(), "{}", of(&output));
}

#[test]
fn options_that_make_no_sense() {
    let code = |arguments: &[&str]| {
        let output = nightporterd().args(arguments).output().unwrap();
        (output.status.code(), of(&output))
    };
    let (usage, said) = code(&["--colour"]);
    assert!(usage == Some(64) && said.contains("--colour"), "{said}");
    let (missing, said) = code(&["--user", "--config", "/nonexistent/nightporter.toml"]);
    assert!(missing == Some(66) && said.contains("/nonexistent/nightporter.toml"), "{said}");
}

#[test]
fn a_state_directory_that_cannot_be() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "").unwrap();
    let state = dir.path().join("file/state");
    let mut command = nightporterd();
    command.arg("--user").arg("--config").arg("/dev/null").arg("--state-dir").arg(&state);
    let output = command.env("DBUS_SESSION_BUS_ADDRESS", "unix:path=/nonexistent").output().unwrap();
    assert_eq!(output.status.code(), Some(73), "{}", of(&output));
    assert!(of(&output).contains(state.to_str().unwrap()), "{}", of(&output));
}

#[test]
fn a_second_daemon_leaves_the_first_alone() {
    let mut world = World::new(Setup::default());
    world.samples(&[("org.example.A", "")]);
    let mut command = world.daemon_command();
    let second = command.stdout(Stdio::piped()).stderr(Stdio::piped()).output().unwrap();
    assert_eq!(second.status.code(), Some(75), "{}", of(&second));
    assert!(of(&second).contains(world.state.to_str().unwrap()), "{}", of(&second));
    assert!(world.daemon_lives());
    world.post("org.example.A", "still served");
    world.expect("org.example.A", &["still served"]);
}

#[test]
fn a_damaged_database_is_kept_aside() {
    let mut world = World::new(Setup::default());
    let app = world.client("org.example.A", Behaviour::Accept);
    app.endpoint("t");
    assert!(world.stop_daemon().success());
    let database = fs::read_dir(&world.state).unwrap().flatten().map(|file| file.path());
    let mut database = database.filter(|path| path.is_file() && fs::metadata(path).unwrap().len() > 4096);
    let database = database.next().expect("there is a database");
    let garbage = vec![0x5a; 20_000];
    fs::write(&database, &garbage).unwrap();
    world.start_daemon();
    let troubles = world.status().troubles;
    assert!(troubles.iter().any(|trouble| trouble.contains("damaged")), "{troubles:?}");
    let aside = fs::read_dir(&world.state).unwrap().flatten().map(|file| file.path());
    let aside = aside.filter(|path| *path != database).find(|path| fs::read(path).is_ok_and(|text| text == garbage));
    let aside = aside.expect("the damaged file is kept");
    assert!(troubles.iter().any(|trouble| trouble.contains(aside.to_str().unwrap())), "{troubles:?} names {aside:?}");
    let printed = world.cli(&["status"]);
    assert!(String::from_utf8_lossy(&printed.stdout).contains("damaged"));
    // It works as on the first day.
    let endpoint = app.endpoint("t");
    world.post_to(&endpoint, &[("TTL", "60")], "from the start");
    assert_eq!(app.message(), "from the start");
    assert!(world.stop_daemon().success());
    world.start_daemon();
    wait("the registration to be known", || (world.status().registrations == 1).then_some(()));
    assert!(world.status().troubles.is_empty());
}

#[test]
fn the_daemon_links_no_http_server() {
    // Paths of sources are in every panic message and, in a debug build, for every function.
    let traces = |program: &str, name: &str| {
        let bytes = fs::read(program).unwrap();
        let needle = name.as_bytes();
        bytes.windows(needle.len()).any(|window| window == needle)
    };
    let (daemon, relay) = (env!("CARGO_BIN_EXE_nightporterd"), env!("CARGO_BIN_EXE_nightporter-relay"));
    let cli = env!("CARGO_BIN_EXE_nightporter");
    for (name, user) in [
        ("/axum-0.", relay),
        ("/hyper-1.", relay),
        ("/tokio-1.", relay),
        ("/clap_builder-4.", cli),
        ("/indicatif-0.", cli),
    ] {
        assert!(traces(user, name), "{name} leaves no trace even where it is used");
        assert!(!traces(daemon, name), "{name} is in the daemon");
    }
}

#[test]
fn on_the_system_bus_with_the_policy_we_ship() {
    let mut world = World::new(Setup { system: true, ..Setup::default() });
    assert_eq!(world.status().buses, ["system"]);
    let app = world.client("org.example.Allowed", Behaviour::Accept);
    let endpoint = app.endpoint("t");
    world.post_to(&endpoint, &[("TTL", "600")], "to a service");
    assert_eq!(app.message(), "to a service");
    assert_eq!(world.show("org.example.Allowed").app.bus, "system");
    let printed = world.cli(&["apps"]);
    assert!(String::from_utf8_lossy(&printed.stdout).contains("org.example.Allowed"), "{}", of(&printed));
    assert_eq!(world.stop_daemon().code(), Some(0));
}
