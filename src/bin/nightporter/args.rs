//! The command line, as clap reads it. `nightporter man` and `nightporter completions` are made from it as well.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;

/// One push connection for all apps, tombstones for the apps nobody looks at, and a ledger of the memory saved.
#[derive(Debug, Parser)]
#[command(
    name = "nightporter",
    version,
    after_help = "APP is a bus name such as im.dino.Dino, or as much of its end as fits one app only: \"dino\".\n\
                  Exit codes are those of sysexits.h; see nightporter(1)."
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) bus: BusChoice,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Where to look for the daemon.
#[derive(Args, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct BusChoice {
    /// Ask the daemon on the session bus (`nightporterd --user`)
    #[arg(long, global = true, conflicts_with = "system")]
    pub(crate) user: bool,
    /// Ask the daemon on the system bus
    #[arg(long, global = true)]
    pub(crate) system: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show the upstream connections, the buses served and the message counts
    Status(Output),
    /// List all apps with their lifecycle state
    Apps(Output),
    /// Show one app in full: state, process, registrations, memory
    Show(OneApp),
    /// Show the last decisions about an app, each with its reason
    Why(OneApp),
    /// Show the latest decisions about all apps, or one, each with its reason
    ///
    /// Some 250 are kept while the daemon runs; `journalctl -u nightporterd` has what is older.
    Log(Log),
    /// Freeze an app now
    Freeze(OneApp),
    /// Let a frozen app run now
    Thaw(OneApp),
    /// End an app now; the next push starts it again
    Kill(OneApp),
    /// List the leases that keep apps awake in the background
    ///
    /// An app takes one through D-Bus (org.nightporter1.App.Lease), says what for, and gives it back when it is done. Its
    /// time runs only while the app is in the background. `background = false` in nightporter.toml(5) allows an app none.
    Leases {
        /// The app's bus name, or the end of it; all apps without it
        app: Option<String>,
        #[command(flatten)]
        output: Output,
    },
    /// Take a lease away from the app that holds it
    EndLease {
        /// The lease's number, as `nightporter leases` lists it
        id: u32,
        #[command(flatten)]
        output: Output,
    },
    /// Have an app, or all apps, reached through another push server from now on
    ///
    /// The app is told its new endpoint, and what is on its way along the old one still arrives. `nightporter status`
    /// lists the upstreams by name.
    Move(Move),
    /// Forget all registrations, waiting messages and choices of a user whose account is gone
    ///
    /// To be run by an administrator after deluser(8): the account's number may be given to somebody else some day.
    /// Refused while that user is logged in. What the user's apps have registered stays otherwise, however long the user
    /// is away.
    ForgetUser {
        /// The user's number
        uid: u32,
    },
    /// Send a test message to an app through its real push server
    ///
    /// The text is not encrypted. Apps that decrypt what they get (RFC 8291) will ignore it; that the daemon woke them
    /// can be seen with `nightporter why APP`.
    Push(Push),
    /// Measure now what the apps cost, and what is saved
    Report(Output),
    /// Say what this machine offers and lacks, what the daemon does instead, and what mends it
    ///
    /// Looks at the kernel, cgroups, memory, systemd, the buses, the daemon and its configuration, the push servers (where
    /// the daemon does not run, by connecting to them) and the apps that have registered. It needs neither the daemon nor
    /// a bus nor root, says what it could not see, changes nothing, and ends within some ten seconds.
    ///
    /// Each finding is ok, a note, something this machine lacks, or broken. The exit status is 1 when something is broken,
    /// 0 otherwise. With --user it is about nightporterd --user.
    Doctor(Output),
    /// Run the whole main job on a private bus, with real processes, and show what it saves
    Demo(Demo),
    /// Measure what the daemon saves, in an experiment with the same apps run with it and without
    ///
    /// nightporter-measure(5) describes the file. Everything is started and ended by this command, on a private bus and
    /// against a push server of its own. Run it as root on a machine with nothing else to do, such as a virtual one: then
    /// apps have cgroups of their own, memory can be paged out, and caches are dropped before each measurement.
    ///
    /// The exit status is 1 when something the file expects was missed.
    Measure(Measure),
    /// The child of the ballast test
    #[command(hide = true)]
    MeasureBallast(Ballast),
    /// Print a completion script for a shell
    #[command(hide = true)]
    Completions {
        /// Which shell
        shell: Shell,
    },
    /// Print the manual page
    #[command(hide = true)]
    Man,
}

#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct Output {
    /// Print JSON instead of text
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args, Debug)]
pub(crate) struct OneApp {
    /// The app's bus name, or the end of it
    pub(crate) app: String,
    #[command(flatten)]
    pub(crate) output: Output,
}

#[derive(Args, Debug)]
pub(crate) struct Log {
    /// The app's bus name, or the end of it; all apps if it is left out
    pub(crate) app: Option<String>,
    /// Go on showing what is decided, until interrupted
    #[arg(short, long)]
    pub(crate) follow: bool,
    #[command(flatten)]
    pub(crate) output: Output,
}

#[derive(Args, Debug)]
#[command(allow_missing_positional = true, override_usage = "nightporter move [OPTIONS] <APP|--all> <UPSTREAM>")]
pub(crate) struct Move {
    /// The app's bus name, or the end of it
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    pub(crate) app: Option<String>,
    /// The upstream's name, as in the configuration
    pub(crate) upstream: String,
    /// Move all apps, and those to come
    #[arg(long)]
    pub(crate) all: bool,
    #[command(flatten)]
    pub(crate) output: Output,
}

#[derive(Args, Debug)]
pub(crate) struct Push {
    /// The app's bus name, or the end of it
    pub(crate) app: String,
    /// The message: 1 to 4096 bytes
    pub(crate) text: String,
    /// Which registration to send to, where the app has several
    #[arg(long, value_name = "TOKEN")]
    pub(crate) registration: Option<String>,
    /// Trust the certificates in this PEM file instead of the system's
    #[arg(long, value_name = "FILE")]
    pub(crate) ca_file: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) output: Output,
}

/// What `demo --help` and the manual page say about programs given with `--app-command`.
pub(crate) const CONTRACT: &str = "\
A program given with --app-command is started N times in either half, with:
  NIGHTPORTER_SAMPLE_NAME        its bus name, such as org.nightporter.Sample7
  NIGHTPORTER_SAMPLE_MODE        resident: hold a connection of its own; shared: register with the daemon
  NIGHTPORTER_SAMPLE_SERVER      resident: the push server, as a ws:// URL (Mozilla autopush protocol)
  NIGHTPORTER_SAMPLE_REPORT      a unix datagram socket to report to
  NIGHTPORTER_SAMPLE_LISTEN      shared: be told of freezes, and save and restore state
  NIGHTPORTER_SAMPLE_BALLAST_KIB message history to hold in memory
  DBUS_SESSION_BUS_ADDRESS       shared: the demo's private bus
It reports JSON datagrams, each with \"app\" (its bus name) and \"event\":
  {\"event\":\"endpoint\",\"endpoint\":URL}   where to send pushes for it
  {\"event\":\"ready\"}                     registered; in shared mode after
                                        org.nightporter1.App.SetState(\"background\")
  {\"event\":\"message\",\"body\":TEXT,\"id\":ID,\"boottime_ns\":N}
                                        for each push, with CLOCK_BOOTTIME on arrival
In shared mode it must own its name, serve org.unifiedpush.Connector2 and register the same token at each start.
A program that knows nothing of this is wrapped: nightporter-sample --exec CMD ARGS… does all of it, and runs CMD below
itself. It is ready once CMD is idle, after NIGHTPORTER_SAMPLE_IDLE_WITHIN seconds (60) at the latest.";

#[derive(Args, Debug)]
#[command(after_long_help = CONTRACT)]
pub(crate) struct Demo {
    /// How many apps to run
    #[arg(long, value_name = "N", default_value_t = 12, value_parser = clap::value_parser!(u16).range(1..=200))]
    pub(crate) apps: u16,
    /// Write the figures to this file as JSON
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Run this program as the app instead of nightporter-sample (see --help)
    #[arg(long, value_name = "CMD")]
    pub(crate) app_command: Option<String>,
    /// How many pushes to send to each app in each state
    #[arg(long, value_name = "M", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=20))]
    pub(crate) messages: u16,
}

#[derive(Args, Debug)]
pub(crate) struct Measure {
    /// What to do, as TOML: nightporter-measure(5)
    pub(crate) experiment: PathBuf,
    /// Find out how many apps can be kept reachable, instead of measuring the arms
    #[arg(long)]
    pub(crate) reach: bool,
    /// Check the file, say what would be done, and do nothing
    #[arg(long)]
    pub(crate) check: bool,
    /// Write all figures and all raw samples to this file as JSON
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Write the figures to this file as a section of Markdown
    #[arg(long, value_name = "FILE")]
    pub(crate) markdown: Option<PathBuf>,
}

#[derive(Args, Debug)]
pub(crate) struct Ballast {
    /// Whose child it is
    pub(crate) parent: u32,
    /// The file that takes it into its cgroup
    pub(crate) cgroup: Option<PathBuf>,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_bus_may_be_chosen_anywhere_but_only_one() {
        let cli = Cli::try_parse_from(["nightporter", "show", "--user", "dino"]).unwrap();
        assert!(cli.bus.user);
        assert!(Cli::try_parse_from(["nightporter", "--user", "--system", "apps"]).is_err());
    }

    #[test]
    fn one_app_moves_or_all_of_them() {
        let parse = |args: &[&str]| match Cli::try_parse_from(["nightporter", "move"].iter().chain(args)) {
            Ok(Cli { command: Command::Move(args), .. }) => Some((args.app, args.upstream, args.all)),
            _ => None,
        };
        assert_eq!(parse(&["dino", "home"]), Some((Some("dino".into()), "home".into(), false)));
        assert_eq!(parse(&["--all", "home"]), Some((None, "home".into(), true)));
        assert_eq!(parse(&["home", "--all"]), Some((None, "home".into(), true)));
        for wrong in [&[][..], &["--all"], &["home"], &["dino", "home", "--all"]] {
            assert_eq!(parse(wrong), None, "{wrong:?}");
        }
    }
}
