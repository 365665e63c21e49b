"""A service on the system bus as an app: registered, frozen, paged out, woken; and the daemon crashing meanwhile."""

import json
import shlex

from machine import Failed

from . import step
from .installing import installs

APP = "org.nightporter.Sample1"
CGROUP = "/sys/fs/cgroup/system.slice/sample1.service"
# NIGHTPORTER_SAMPLE_BALLAST_KIB of apps/sample1.service.
BALLAST = 16 << 20
MIB = 1 << 20
FROZEN = f"grep -qx 'frozen 1' {CGROUP}/cgroup.events"
RUNS = f"grep -qx 'frozen 0' {CGROUP}/cgroup.events"


def view(vm, command):
    """A JSON document of the command line tool."""
    return json.loads(vm.run(f"nightporter --system {command} --json"))


def reports(vm, event):
    """What the sample has reported under this name, oldest first."""
    lines = vm.run("cat /run/sample-reports.log").splitlines()
    return [report for report in map(json.loads, lines) if report["event"] == event]


def bodies(vm):
    """The messages the sample has taken."""
    return [report["body"] for report in reports(vm, "message")]


def push(vm, text):
    """Sends a message through the relay, as an application server does."""
    vm.run(f"nightporter --system push {APP} {shlex.quote(text)}")


def arrives(vm, text, limit=60):
    """Waits for a message at the sample."""
    vm.wait_for(f"the message {text!r}", "cat /run/sample-reports.log", until=lambda log: f'"{text}"' in log, limit=limit)


def freezes(vm):
    """Waits until the app is frozen, after the shell has said that nobody looks at it. A daemon that was started anew
    does not know it any more, and unknown is foreground."""
    vm.run(f"busctl --system call org.nightporter1 /org/nightporter1 org.nightporter1.App SetStateOf ss {APP} background")
    vm.wait_for("the freeze", FROZEN)


def main_pid(vm):
    """Of the daemon."""
    return int(vm.run("systemctl show -p MainPID --value nightporterd"))


@step(installs)
def is_configured(vm):
    """The daemon takes a configuration of its own: a relay on the same machine, and profile "tombstone"."""
    vm.run("cp /payload/nightporter.toml /etc/nightporter/nightporter.toml && nightporterd --check-config")
    vm.run("systemctl restart nightporterd")
    status = view(vm, "status")
    if status["profile"] != "tombstone" or [one["name"] for one in status["upstreams"]] != ["relay"]:
        raise Failed(f"it does not go by its configuration: {status}")


@step(is_configured)
def registers(vm):
    """A system service registers, the daemon connects for it, and a message comes while it runs."""
    vm.run("cp /payload/sample.conf /etc/dbus-1/system.d/ && cp /payload/sample*.service /etc/systemd/system/")
    vm.run(f"cp /payload/{APP}.service /usr/share/dbus-1/system-services/")
    vm.run("systemctl daemon-reload && systemctl reload dbus && systemctl --quiet enable --now sample-reports")
    vm.wait_for("the reports' socket", "test -S /run/sample-reports")
    vm.run("systemctl start sample1", limit=120)
    vm.wait_for("the sample's registration", "cat /run/sample-reports.log", until=lambda log: '"ready"' in log)
    push(vm, "while it runs")
    arrives(vm, "while it runs")
    upstreams = view(vm, "status")["upstreams"]
    if [(one["state"], one["registrations"]) for one in upstreams] != [("online", 1)]:
        raise Failed(f"not one registration on a live connection: {upstreams}")


@step(registers)
def freezes_and_pages_out(vm):
    """Left alone the app is frozen, then its memory goes to zram for real; a push thaws it and it loses nothing."""
    before = int(vm.run(f"cat {CGROUP}/memory.current"))
    vm.wait_for("the freeze", FROZEN)
    vm.wait_for("the page-out", f"cat {CGROUP}/memory.swap.current", until=lambda text: int(text) > BALLAST * 0.7, limit=120)
    after = int(vm.run(f"cat {CGROUP}/memory.current"))
    stored, _, used, *_ = map(int, vm.run("cat /sys/block/zram0/mm_stat").split())
    figures = f"{before / MIB:.1f} MiB of memory became {after / MIB:.1f} MiB; zram holds {stored / MIB:.1f} MiB in {used / MIB:.1f} MiB"
    if before - after < BALLAST * 0.7 or used > stored * 0.8:
        raise Failed(f"{figures}\n{vm.run(f'nightporter --system why {APP}')}")
    why = vm.run(f"nightporter --system why {APP}")
    if "page-out" not in why:
        raise Failed(f"why does not tell of it:\n{why}")
    push(vm, "while it is paged out")
    arrives(vm, "while it is paged out")
    vm.wait_for("the next freeze", FROZEN)
    return figures


@step(registers)
def a_crash_thaws(vm):
    """The daemon killed with SIGKILL while an app is frozen: systemd thaws the app and starts the daemon again."""
    freezes(vm)
    # A daemon that comes back thaws as well; that it did not come back in time must not matter.
    vm.run("mkdir -p /run/systemd/system/nightporterd.service.d")
    vm.run("printf '[Service]\\nRestartSec=20\\nRestartSteps=0\\n' >/run/systemd/system/nightporterd.service.d/slow.conf")
    vm.run("systemctl daemon-reload")
    pid = main_pid(vm)
    vm.run(f"kill -KILL {pid}")
    vm.wait_for("the thaw", RUNS, limit=15)
    if vm.run("systemctl is-active nightporterd", check=False).strip() == "active":
        raise Failed("the daemon was back before the thaw was seen: nothing is proved")
    journal = vm.run("journalctl --no-pager -q -b -o cat -u nightporterd")
    if "1 thawed" not in journal:
        raise Failed(f"ExecStopPost= did not say that it thawed anything:\n{journal[-2000:]}")
    vm.run("rm -r /run/systemd/system/nightporterd.service.d && systemctl daemon-reload")
    vm.wait_for("the restart", "systemctl is-active nightporterd", limit=60)
    if main_pid(vm) == pid:
        raise Failed("it was not killed")
    push(vm, "after a crash")
    arrives(vm, "after a crash")


@step(registers)
def a_wrong_configuration_leaves_nothing_frozen(vm):
    """The daemon ends and cannot start again: it is not tried in vain, and nothing stays frozen."""
    freezes(vm)
    vm.run("echo 'unknown = 1' >>/etc/nightporter/nightporter.toml")
    vm.run(f"kill -KILL {main_pid(vm)}")
    vm.wait_for("the thaw", RUNS, limit=30)
    vm.wait_for("giving up", "systemctl is-failed nightporterd", limit=30)
    if (status := vm.run("systemctl show -p ExecMainStatus --value nightporterd").strip()) != "78":
        raise Failed(f"the daemon ended with {status}, not 78")
    vm.run("cp /payload/nightporter.toml /etc/nightporter/nightporter.toml && systemctl start nightporterd")
    push(vm, "after a wrong configuration")
    arrives(vm, "after a wrong configuration")


@step(registers)
def a_push_starts_a_tombstone(vm):
    """An app that was ended is started by the next message, in the cgroup of its own unit."""
    vm.run(f"nightporter --system kill {APP}")
    vm.wait_for("the end of the app", "! systemctl is-active --quiet sample1")
    push(vm, "while it is a tombstone")
    arrives(vm, "while it is a tombstone", limit=120)
    vm.run(f"grep -qx \"$(systemctl show -p MainPID --value sample1)\" {CGROUP}/cgroup.procs")


@step(registers)
def upgrades(vm):
    """dpkg puts in the next version while the app is frozen and messages flow: none is lost, none comes twice."""
    endpoint = reports(vm, "endpoint")[-1]["endpoint"]
    freezes(vm)
    texts = [f"upgrade {number}" for number in range(20)]
    # Straight to the server, as senders do: they know nothing of the daemon.
    vm.write("/run/senders.py", SENDER.format(endpoint=endpoint, texts=texts))
    vm.run("systemd-run --quiet --unit=senders --collect python3 /run/senders.py")
    pid = main_pid(vm)
    vm.run("dpkg -i /payload/nightporter-next.deb", limit=180)
    if main_pid(vm) == pid:
        raise Failed("the daemon of the old version runs on")
    if not vm.run("dpkg-query -W -f '${Version}' nightporter").endswith("+1"):
        raise Failed("the next version is not installed")
    for text in texts:
        arrives(vm, text)
    got = [body for body in bodies(vm) if body.startswith("upgrade ")]
    if sorted(got) != sorted(texts):
        raise Failed(f"sent {texts}, got {got}")
    if got != texts:
        raise Failed(f"out of order: {got}")
    if reports(vm, "endpoint")[-1]["endpoint"] != endpoint:
        raise Failed("the upgrade changed the endpoint")


SENDER = """
import time, urllib.request
for text in {texts!r}:
    request = urllib.request.Request({endpoint!r}, text.encode(), {{"TTL": "3600"}}, method="POST")
    urllib.request.urlopen(request, timeout=60).close()
    time.sleep(0.3)
"""


@step(registers)
def a_reboot_keeps_what_was(vm):
    """After a reboot the registration is there with its endpoint, and a message sent meanwhile comes."""
    endpoint = reports(vm, "endpoint")[-1]["endpoint"]
    # Until the reboot the sample cannot be started: the message stays undelivered.
    vm.run("mkdir -p /run/systemd/system/sample1.service.d")
    vm.run("printf '[Service]\\nExecStart=\\nExecStart=/bin/false\\n' >/run/systemd/system/sample1.service.d/no.conf")
    vm.run("systemctl daemon-reload")
    # Not systemctl: it would wait for a frozen app until TimeoutStopSec= is over.
    vm.run(f"nightporter --system kill {APP}")
    vm.wait_for("the end of the app", "! systemctl is-active --quiet sample1")
    vm.write("/run/senders.py", SENDER.format(endpoint=endpoint, texts=["before the reboot"]))
    vm.run("python3 /run/senders.py")
    vm.wait_for(
        "the message at the daemon",
        "nightporter --system status --json",
        until=lambda text: json.loads(text)["messages_waiting"] == 1,
    )
    vm.reboot()
    vm.wait_for("the reports", "test -S /run/sample-reports")
    arrives(vm, "before the reboot", limit=120)
    if [report["endpoint"] for report in reports(vm, "endpoint") if report["endpoint"] != endpoint]:
        raise Failed("the reboot changed the endpoint")
    push(vm, "after the reboot")
    arrives(vm, "after the reboot")
