//! Payload helpers as they are: real processes with a user's rights, some of which do their worst. Must run as root.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::{
    fs,
    os::unix::fs::{PermissionsExt, chown},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use nightporter::{
    model::{AppKey, Bus, MessageSeq, Urgency},
    notification::{HelperAnswer, HelperJob, Text},
    sys::helper::run,
};
use nix::{sys::signal::kill, unistd::Pid};

/// On every Debian (base-passwd).
const USER: u32 = 6;

fn job_of(uid: u32, words: &[&str]) -> HelperJob {
    assert!(nix::unistd::geteuid().is_root(), "this test must run as root");
    HelperJob {
        seq: MessageSeq(1),
        app: AppKey::new(Bus::Session(uid), "org.example.Chat"),
        command: words.iter().map(|word| (*word).into()).collect(),
        network: false,
        token: "token-1".into(),
        id: "message-1".into(),
        urgency: Urgency::High,
        body: b"the payload"[..].into(),
    }
}

fn sh(script: &str) -> HelperJob {
    job_of(USER, &["/bin/sh", "-c", script])
}

fn body(answer: Result<HelperAnswer, String>) -> String {
    match answer {
        Ok(HelperAnswer::Show { text: Text::Own { body, .. }, .. }) => body.to_string(),
        other => panic!("it shows nothing: {other:?}"),
    }
}

/// A directory of that user's.
fn directory() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700)).unwrap();
    chown(dir.path(), Some(USER), Some(USER)).unwrap();
    dir
}

fn pid_in(path: &Path) -> Pid {
    Pid::from_raw(fs::read_to_string(path).unwrap().trim().parse().unwrap())
}

/// A zombie of init's, or whoever reaps here, is gone as well.
fn ends(pid: Pid) -> bool {
    let until = Instant::now() + Duration::from_secs(30);
    let runs = || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        kill(pid, None).is_ok() && !stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('Z'))
    };
    while runs() {
        if Instant::now() > until {
            return false;
        }
        thread::sleep(Duration::from_millis(10));
    }
    true
}

#[test]
fn it_has_the_payload_what_it_is_for_and_the_users_rights_alone() {
    let said =
        body(run(&sh("echo \"{\\\"summary\\\": \\\"x\\\", \\\"body\\\": \\\"$(cat) $(id -u):$(id -g):$(id -G) \
         $NIGHTPORTER_APP $NIGHTPORTER_TOKEN $NIGHTPORTER_MESSAGE_ID $NIGHTPORTER_URGENCY $HOME $(pwd) \
         $(grep NoNewPrivs /proc/self/status | tr '\\t' ' ') $(grep CapEff /proc/self/status | tr '\\t' ' ') \
         $(env | grep -c CARGO) $(ls /proc/self/fd | wc -l)\\\"}\"")));
    let home = nix::unistd::User::from_uid(USER.into()).unwrap().unwrap().dir;
    let group = nix::unistd::User::from_uid(USER.into()).unwrap().unwrap().gid;
    let expected = format!(
        "the payload 6:{group}:{group} org.example.Chat token-1 message-1 high {} / NoNewPrivs: 1 CapEff: 0000000000000000 \
         0 ",
        home.display()
    );
    assert!(said.starts_with(&expected), "{said}\n{expected}");
    let open: u32 = said.rsplit(' ').next().unwrap().parse().unwrap();
    assert!(open <= 6, "{open} open files");
}

#[test]
fn what_it_may_not_do() {
    let said = body(run(&sh("cat /etc/shadow && exit 1; ulimit -S -c >&2; \
         echo \"{\\\"summary\\\": \\\"x\\\", \\\"body\\\": \\\"$(ulimit -d) $(ulimit -n) $(ulimit -c)\\\"}\"")));
    assert_eq!(said, "65536 64 0");
    let socket = "use Socket; exit(socket(S, PF_INET, SOCK_STREAM, 0) ? 3 : 4) unless socket(U, PF_UNIX, SOCK_STREAM, 0) \
                  && !socket(S, PF_INET, SOCK_STREAM, 0) && !socket(S, PF_INET6, SOCK_DGRAM, 0); print '{\"wake\":true}'";
    let mut job = job_of(USER, &["/usr/bin/perl", "-e", socket]);
    assert_eq!(run(&job), Ok(HelperAnswer::Wake), "it has no network, and sockets within the machine");
    job.network = true;
    assert!(run(&job).unwrap_err().contains('3'), "now it has");
    assert!(run(&job_of(0, &["/bin/true"])).unwrap_err().contains("may not run as user 0"));
    assert!(run(&job_of(3_999_999, &["/bin/true"])).unwrap_err().contains("not in the user database"));
    let mut system = sh("true");
    system.app.bus = Bus::System;
    assert!(run(&system).is_err());
}

#[test]
fn one_that_fails_or_prints_rubbish() {
    for (script, words) in [
        ("exit 3", "exit status: 3"),
        ("echo '{\"wake\": true}'; exit 1", "exit status: 1"),
        ("kill -9 $$", "signal: 9"),
        ("true", "no answer"),
        ("echo hello", "no answer"),
        ("head -c 5000 /dev/urandom", "no answer"),
        ("yes", "more than 65536 bytes"),
        ("exec 0<&- ; echo '{\"summary\": \"\"}'", "summary is empty"),
    ] {
        let said = run(&sh(script)).unwrap_err();
        assert!(said.contains(words), "{script}: {said}");
    }
    assert!(run(&job_of(USER, &["/nonexistent"])).unwrap_err().contains("cannot be started"));
    assert_eq!(run(&sh("exec 0<&-; echo '{\"drop\": true}'")), Ok(HelperAnswer::Drop), "it need not read");
}

#[test]
fn one_that_hangs_is_ended_with_its_children() {
    let dir = directory();
    let path = dir.path().join("pid");
    let script = format!("sleep 1000 & echo $! > {0}; echo $$ > {0}.own; wait", path.display());
    let began = Instant::now();
    let said = run(&sh(&script)).unwrap_err();
    assert!(said.contains("not done within 5 s"), "{said}");
    assert!(began.elapsed() >= Duration::from_secs(5));
    assert!(ends(pid_in(&path)) && ends(pid_in(&path.with_extension("own"))));
}

#[test]
fn a_child_it_leaves_behind_keeps_nobody_waiting_and_is_ended() {
    let dir = directory();
    let path = dir.path().join("pid");
    let script = format!("sleep 1000 & echo $! > {}; echo '{{\"wake\": true}}'", path.display());
    let quickest = (0..3).map(|_| {
        let began = Instant::now();
        assert_eq!(run(&sh(&script)), Ok(HelperAnswer::Wake), "the child holds its output open");
        assert!(ends(pid_in(&path)));
        began.elapsed()
    });
    assert!(quickest.min().unwrap() < Duration::from_secs(4));
}

#[test]
fn a_child_that_leaves_its_session_is_ended_by_the_cgroup() {
    let dir = directory();
    let path = dir.path().join("pid");
    let script = format!(
        "cat /proc/self/cgroup > {0}.cgroup; setsid sleep 1000 & echo $! > {0}; echo '{{\"wake\": true}}'",
        path.display()
    );
    assert_eq!(run(&sh(&script)), Ok(HelperAnswer::Wake));
    let cgroup = fs::read_to_string(path.with_extension("cgroup")).unwrap();
    let own = cgroup.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or_default();
    let pid = pid_in(&path);
    if own.contains("/helper-") {
        assert!(ends(pid), "{own}");
    } else {
        // Under a systemd that has not delegated anything to this test. What has left its group lives on, and is ours.
        assert!(Path::new("/run/systemd/system").is_dir(), "there could be a cgroup here: {own:?}");
        let _ = kill(pid, nix::sys::signal::Signal::SIGKILL);
    }
}

#[test]
fn one_that_eats_memory_fails() {
    let eater = "my @all; push @all, 'x' x 1_000_000 for 1 .. 500; print '{\"wake\":true}'";
    let said = run(&job_of(USER, &["/usr/bin/perl", "-e", eater])).unwrap_err();
    assert!(said.contains("it failed"), "{said}");
    let modest = "my @all; push @all, 'x' x 1_000_000 for 1 .. 20; print '{\"wake\":true}'";
    assert_eq!(run(&job_of(USER, &["/usr/bin/perl", "-e", modest])), Ok(HelperAnswer::Wake));
}
