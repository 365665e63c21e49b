//! The real polkitd, on a bus of the test's, with our actions and rules in a mount namespace of its own.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use nightporter::{
    action::Reply,
    event::{Authorization, Privilege},
    model::Bus,
};

use super::{
    APP, authorize, refusal, serving,
    support::{Daemon, Ended, connect},
};

/// A user without rights that every Debian has (base-passwd), and the uid of another.
const GAMES: u32 = 5;
const MAN: u32 = 6;

/// A bus that is open to every user.
fn open_bus() -> Daemon {
    let rules = "<policy context=\"default\"><allow user=\"*\"/><allow send_destination=\"*\" eavesdrop=\"true\"/>\
         <allow eavesdrop=\"true\"/><allow own=\"*\"/></policy>";
    let daemon = Daemon::with(rules, "");
    fs::set_permissions(daemon.path(""), fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(daemon.path("socket"), fs::Permissions::from_mode(0o666)).unwrap();
    daemon
}

/// polkitd with the actions we install and these rules.
fn polkitd(daemon: &Daemon, rules: &str) -> Ended {
    assert!(nix::unistd::geteuid().is_root(), "this test must run as root");
    let (actions, own) = (daemon.path("actions"), daemon.path("rules"));
    for dir in [&actions, &own] {
        fs::create_dir(dir).unwrap();
    }
    let policy = concat!(env!("CARGO_MANIFEST_DIR"), "/config/polkit-1/actions/org.nightporter1.policy");
    fs::copy(policy, actions.join("org.nightporter1.policy")).unwrap();
    fs::write(own.join("10-test.rules"), rules).unwrap();
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/config/polkit-1/rules.d/50-nightporter.rules");
    fs::copy(example, own.join("50-nightporter.rules")).unwrap();
    // polkitd gives up root's rights, and reads them as its own user.
    let script = "chmod -R a+rX \"$0\" && mount --make-rprivate / && \
                  mount --bind \"$0/actions\" /usr/share/polkit-1/actions && \
                  mount --bind \"$0/rules\" /etc/polkit-1/rules.d && \
                  exec $(ls /usr/lib/polkit-1/polkitd /usr/libexec/polkitd 2>/dev/null | head -n 1) --no-debug";
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-c", script]).arg(daemon.path(""));
    command.env("DBUS_SYSTEM_BUS_ADDRESS", daemon.address()).stdin(Stdio::null());
    let child = Ended(command.stdout(Stdio::null()).spawn().unwrap());
    let until = Instant::now() + Duration::from_secs(30);
    zbus::block_on(async {
        let client = connect(&daemon.address()).await;
        let bus = "org.freedesktop.DBus";
        loop {
            let name = "org.freedesktop.PolicyKit1";
            let reply = client.call_method(Some(bus), "/", Some(bus), "NameHasOwner", &name).await.unwrap();
            if reply.body().deserialize::<bool>().unwrap() {
                return;
            }
            assert!(Instant::now() < until, "polkitd does not come up (package polkitd)");
        }
    });
    child
}

/// `dbus-send` by this user.
fn send(daemon: &Daemon, uid: u32, member: &str, arguments: &[&str]) -> Ended {
    let uid = uid.to_string();
    let mut command = Command::new("setpriv");
    command.args(["--reuid", &uid, "--regid", &uid, "--clear-groups", "--", "dbus-send", "--print-reply"]);
    command.arg(format!("--bus={}", daemon.address())).args(["--dest=org.nightporter1", "/org/nightporter1"]);
    command.arg(format!("org.nightporter1.Manager.{member}")).args(arguments);
    Ended(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
}

#[test]
fn the_real_polkit_judges_by_our_actions_and_an_administrators_rules() {
    let rules = "polkit.addRule(function(action, subject) {\
                   if (action.id == 'org.nightporter1.manage-apps' && subject.user == 'games' &&\
                       action.lookup('service') == 'org.example.App') { return polkit.Result.YES; }\
                   if (action.id == 'org.nightporter1.read' && subject.user == 'games') { return polkit.Result.NO; }\
                 });";
    let (system, session) = (open_bus(), open_bus());
    let _polkitd = polkitd(&system, rules);
    let mut main = serving(&[(Bus::System, &system), (Bus::Session(GAMES), &session)]);
    let app = format!("string:{APP}");
    let granted = || Ok(Authorization::Granted(Privilege::ManageApps));
    for (bus, uid, member, arguments, privilege, expected) in [
        (&system, GAMES, "Kill", vec![&*app], Privilege::ManageApps, granted()),
        (&session, GAMES, "Kill", vec![&*app], Privilege::ManageApps, granted()),
        (&system, GAMES, "Kill", vec!["string:org.example.Other"], Privilege::ManageApps, Err("password")),
        (&session, GAMES, "Kill", vec!["string:org.example.Other"], Privilege::ManageApps, Err("password")),
        (&system, GAMES, "Apps", vec![], Privilege::Read, Err("does not allow")),
        (&system, MAN, "Kill", vec![&*app], Privilege::ManageApps, Err("password")),
        (&system, MAN, "Apps", vec![], Privilege::Read, Err("password")),
        (&system, GAMES, "ForgetUser", vec!["uint32:5"], Privilege::ManageUsers, Err("password")),
    ] {
        let _sent = send(bus, uid, member, &arguments);
        let (_, asking, _) = authorize(&mut main, privilege, true);
        assert_eq!(asking.uid, uid);
        let (call, caller, _) = main.call();
        match expected {
            Ok(authorization) => assert_eq!(caller.authorization, authorization, "{member} by {uid}"),
            Err(word) => assert!(refusal(&caller).contains(word), "{member} by {uid}: {caller:?}"),
        }
        main.reply(call, Reply::Done);
    }
}
