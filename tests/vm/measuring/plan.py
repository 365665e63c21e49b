"""What is measured in which machine."""

import dataclasses
import pathlib
import re

EXPERIMENTS = pathlib.Path(__file__).parent / "experiments"
# What the programs and their servers are packaged as.
PACKAGES = [
    "dbus-daemon",
    "dino-im",
    "dovecot-imapd",
    "glib-networking",
    "iproute2",
    "mosquitto",
    "node-mqtt",
    "nodejs",
    "offlineimap3",
    "openssl",
    "procps",
    "prosody",
    "sqlite3",
    "weston",
]
# Kinds of apps: the experiment's name, the package with the program, and what a reader calls it.
KINDS = {
    "chat": ("dino-im", "Dino (GTK 4)"),
    "mail": ("offlineimap3", "OfflineIMAP (Python)"),
    "node": ("node-mqtt", "MQTT.js (Node.js)"),
    "sample": ("nightporter", "the sample (Rust)"),
}
MIXED = "mixed"
REACH = "reach"
# In which order results are told.
ORDER = [*KINDS, MIXED, REACH]


def runs_of(experiment):
    """Runs of each arm, as the experiment's file says; none where it searches."""
    found = re.search(r"(?m)^runs = (\d+)$", (EXPERIMENTS / f"{experiment}.toml").read_text())
    return int(found[1]) if found else None


@dataclasses.dataclass(frozen=True)
class Task:
    """One experiment in one machine. `count`: of each kind; None leaves what the file says. `changes`: keys of the file and their
    values here, None for a key that is not to be in it."""

    experiment: str
    count: int | None = None
    changes: tuple = ()

    @property
    def label(self):
        """As `--only` has it, after the size."""
        return {MIXED: "20", REACH: "reach"}.get(self.experiment, str(self.count))

    def with_runs(self, runs):
        """The same with as many runs of each arm; a search has none."""
        return self if self.experiment == REACH else dataclasses.replace(self, changes=(*self.changes, ("runs", runs)))

    def text(self):
        """The experiment's file, with what is different here."""
        text = (EXPERIMENTS / f"{self.experiment}.toml").read_text()
        changes = [*self.changes, *([("count", self.count)] if self.count else [])]
        for key, value in changes:
            line = "" if value is None else f"{key} = {value}"
            text, found = re.subn(rf"(?m)^{key} = .*$", line, text)
            if not found:
                raise ValueError(f"{self.experiment}.toml has no {key}")
        return text


@dataclasses.dataclass(frozen=True)
class Job:
    """One machine, from its boot to its end. `gib`: its memory; `cpus`: how many processors it needs to end within hours; `alone`: no
    other is to run beside it, for how soon something comes decides what is found."""

    gib: int
    tasks: tuple
    cpus: int = 1
    alone: bool = False


def jobs(quick, only, runs=None):
    """Those to do; `only`: SIZE/COUNT each, such as 2/20 or 1/reach; `runs`: of each arm, in place of what the file says."""
    if quick:
        # As much of everything as a few minutes allow: whether it works, not what comes out.
        small = tuple(Task(kind, 1) for kind in ("mail", "sample"))
        few = Task(REACH, changes=(("first", 2), ("most", 3), ("times-enough", None), ("window", '"2s"'), ("times-as-many-at-least", 1.0)))
        planned = [Job(2, (*small, few))]
    else:
        each = tuple(Task(kind, count) for count in (1, 5) for kind in KINDS)
        # The longest first, so that those at a time end together. The target is for 2 GiB.
        planned = [Job(gib, (*each, Task(MIXED))) for gib in (2, 3)]
        planned.append(Job(2, (Task(REACH),), cpus=4, alone=True))
        planned.append(Job(1, (Task(REACH, changes=(("first", 24), ("times-as-many-at-least", None))),), cpus=4, alone=True))
    if runs:
        planned = [dataclasses.replace(job, tasks=tuple(task.with_runs(runs) for task in job.tasks)) for job in planned]
    if not only:
        return planned
    known = {f"{job.gib}/{task.label}" for job in planned for task in job.tasks}
    if unknown := set(only) - known:
        raise SystemExit(f"tests/vm/measure: no {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
    chosen = [
        dataclasses.replace(job, tasks=tuple(task for task in job.tasks if f"{job.gib}/{task.label}" in only)) for job in planned
    ]
    return [job for job in chosen if job.tasks]
