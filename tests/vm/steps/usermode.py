"""Who may not install a system service: `nightporterd --user` from a home directory, as the README says, in a session of its
own, next to no system service. Needs no other step; the programs come out of the packages. And the same from the package."""

import json
import shlex

from machine import Failed

from . import step
from .installing import boots

USER = "carol"
APP = "org.nightporter.Sample2"
MIB = 1 << 20
BALLAST = 16 * MIB
LIMIT = 240
CONFIG = """profile = "tombstone"
[[upstream]]
name = "relay"
kind = "autopush"
url = "ws://127.0.0.1:8031/"
[lifecycle]
grace = "2s"
page-out-after = "3s"
tombstone-after = "1h"
awake-window = "1s"
"""
# The sample's environment, without systemd's help, for the bus's service file as well.
COMMAND = (
    f"/usr/bin/env NIGHTPORTER_SAMPLE_NAME={APP} NIGHTPORTER_SAMPLE_MODE=shared NIGHTPORTER_SAMPLE_BALLAST_KIB={BALLAST >> 10} "
    f"NIGHTPORTER_SAMPLE_REPORT=/run/usermode/reports /home/{USER}/.local/bin/nightporter-sample"
)
REPORTS = """
import os, socket
os.makedirs("/run/usermode", exist_ok=True)
reports = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
reports.bind("/run/usermode/reports")
os.chmod("/run/usermode/reports", 0o666)
with open("/run/usermode/log", "ab", buffering=0) as log:
    while True:
        log.write(reports.recv(65536) + b"\\n")
"""


def home(name):
    """A path below the user's home."""
    return f"/home/{USER}/{name}"


def user(vm, command, **more):
    """What the command says in the user's session."""
    return vm.as_user(USER, f"export PATH=~/.local/bin:$PATH; {command}", **more)


def told(vm, event):
    """What the app has reported under this name, oldest first."""
    reports = map(json.loads, vm.run("cat /run/usermode/log").splitlines())
    return [report for report in reports if report["event"] == event]


def takes(vm, text):
    """A message that was sent arrives, once."""
    vm.wait_for(f"the message {text!r}", "cat /run/usermode/log", until=lambda log: f'"{text}"' in log, limit=LIMIT)
    if (times := [report["body"] for report in told(vm, "message")].count(text)) != 1:
        raise Failed(f"{text!r} came {times} times")


def pushed(vm, text):
    """A message gets through."""
    user(vm, f"nightporter push {APP} {shlex.quote(text)}")
    takes(vm, text)


def is_up(vm):
    """Waits until the daemon serves the session."""
    vm.wait_for("the daemon", vm_command("nightporter --user status"), limit=LIMIT)


def vm_command(command):
    """The command as root runs it in the user's session."""
    uid = f"$(id -u {USER})"
    environment = f"XDG_RUNTIME_DIR=/run/user/{uid} DBUS_SESSION_BUS_ADDRESS=unix:path=/run/user/{uid}/bus"
    return f"runuser -u {USER} -- env {environment} {home('.local/bin')}/{command}"


def cgroup(vm):
    """The directory of the app's cgroup."""
    call = "busctl --user call org.freedesktop.DBus /org/freedesktop/DBus org.freedesktop.DBus GetConnectionUnixProcessID s"
    pid = user(vm, f"{call} {APP}").split()[1]
    return "/sys/fs/cgroup" + vm.run(f"sed -n s/^0:://p /proc/{pid}/cgroup").strip()


def freezes(vm):
    """Waits until the app is frozen, after the shell has said that nobody looks at it. Gives its cgroup."""
    where = cgroup(vm)
    user(vm, f"busctl --user call org.nightporter1 /org/nightporter1 org.nightporter1.App SetStateOf ss {APP} background")
    vm.wait_for("the freeze", f"grep -qx 'frozen 1' {where}/cgroup.events", limit=LIMIT)
    return where


@step(boots)
def a_user_installs_it(vm):
    """A user without privileges puts it into the home directory and enables the user unit; an app registers."""
    vm.run("systemctl stop nightporterd", check=False)
    vm.run(f"useradd --create-home --shell /bin/bash {USER} && passwd --quiet --delete {USER}")
    vm.run("for deb in nightporter nightporter-relay; do dpkg-deb -x /payload/$deb.deb /run/unpacked; done", limit=LIMIT)
    vm.write("/run/usermode.py", REPORTS)
    vm.run("systemd-run --quiet --unit=usermode-reports python3 /run/usermode.py")
    relay = "/run/unpacked/usr/bin/nightporter-relay --memory --listen 127.0.0.1:8031"
    vm.run(f"systemd-run --quiet --unit=usermode-relay {relay}")
    vm.wait_for("the reports' socket", "test -S /run/usermode/reports")
    vm.login(USER)
    # By the user's hands from here on.
    user(vm, "install -Dt ~/.local/bin /run/unpacked/usr/bin/*", limit=LIMIT)
    vm.write("/run/usermode.toml", CONFIG)
    user(vm, "mkdir -p ~/.config/systemd/user ~/.config/nightporter ~/.local/share/dbus-1/services")
    user(vm, "cp /run/usermode.toml ~/.config/nightporter/nightporter.toml && nightporterd --user --check-config")
    # The README's words.
    unit = "/run/unpacked/usr/lib/systemd/user/nightporterd.service"
    user(vm, f"sed 's|/usr/bin/|%h/.local/bin/|' {unit} >~/.config/systemd/user/nightporterd.service")
    user(vm, "systemctl --user enable --now nightporterd", limit=LIMIT)
    is_up(vm)
    service = f"[D-BUS Service]\nName={APP}\nExec={COMMAND}\n"
    vm.write("/run/usermode.dbus", service)
    user(vm, f"cp /run/usermode.dbus ~/.local/share/dbus-1/services/{APP}.service")
    user(vm, "busctl --user call org.freedesktop.DBus / org.freedesktop.DBus ReloadConfig")
    user(vm, f"systemd-run --user --quiet --collect --slice=app.slice --unit=app-{APP}@1.service {COMMAND}")
    vm.wait_for("the registration", "cat /run/usermode/log", until=lambda log: '"ready"' in log, limit=LIMIT)
    pushed(vm, "while it runs")
    pid = user(vm, "systemctl --user show -P MainPID nightporterd").strip()
    status = dict(line.split(":", 1) for line in vm.run(f"cat /proc/{pid}/status").splitlines())
    if int(status["CapEff"], 16) or status["NoNewPrivs"].strip() != "1" or status["Seccomp"].strip() != "2":
        raise Failed(f"the daemon of the user has rights it does not need: {status}")


@step(a_user_installs_it)
def a_user_pages_out_and_wakes(vm):
    """With the user's own rights an app is frozen and paged out, and woken from that and from its end."""
    where = freezes(vm)
    vm.wait_for("the page-out", f"cat {where}/memory.swap.current", until=lambda text: int(text) > BALLAST * 0.7, limit=LIMIT)
    vm.run(f"grep -qx 'frozen 1' {where}/cgroup.events")
    pushed(vm, "while it is paged out")
    freezes(vm)
    user(vm, f"nightporter kill {APP}")
    vm.wait_for("its end", f"! test -e {where} || ! grep -q . {where}/cgroup.procs", limit=LIMIT)
    pushed(vm, "to a tombstone")
    uid = vm.run(f"id -u {USER}").strip()
    mine = f"/sys/fs/cgroup/user.slice/user-{uid}.slice/user@{uid}.service/app.slice/app-nightporter-{APP}@"
    if not (where := cgroup(vm)).startswith(mine):
        raise Failed(f"it was not started by the user's systemd in a unit of its own: {where}")


@step(a_user_installs_it)
def a_users_daemon_leaves_nothing_frozen(vm):
    """Killed with SIGKILL it is started again and what it froze runs; a logout ends all, and a login brings it back."""
    endpoint = told(vm, "endpoint")[-1]["endpoint"]
    where = freezes(vm)
    user(vm, "systemctl --user kill --signal=KILL --kill-whom=main nightporterd")
    vm.wait_for("the thaw", f"grep -qx 'frozen 0' {where}/cgroup.events", limit=LIMIT)
    is_up(vm)
    journal = vm.run("journalctl --no-pager -q -b -o cat -t nightporterd")
    if "1 thawed" not in journal:
        raise Failed(f"ExecStopPost= did not say that it thawed anything:\n{journal[-2000:]}")
    pushed(vm, "after a crash")
    freezes(vm)
    vm.logout(USER)
    vm.run("! pgrep -u " + USER + " nightporter")
    vm.login(USER)
    is_up(vm)
    # The app is gone with the session; the message starts it.
    pushed(vm, "after a login")
    if [report["endpoint"] for report in told(vm, "endpoint") if report["endpoint"] not in ("", endpoint)]:
        raise Failed("the logout changed the endpoint")
    user(vm, "systemctl --user disable --now nightporterd")
    vm.logout(USER)


@step(a_user_installs_it)
def a_users_daemon_follows_the_package(vm):
    """The user unit of the package: an upgrade restarts it in the session, a purge stops it; nothing stays frozen."""
    vm.run("dpkg -i /payload/nightporter.deb && systemctl --quiet disable --now nightporterd", limit=LIMIT)
    vm.login(USER)
    user(vm, "systemctl --user disable --quiet --now nightporterd; rm ~/.config/systemd/user/nightporterd.service")
    user(vm, "systemctl --user daemon-reload && systemctl --user start nightporterd", limit=LIMIT)
    is_up(vm)
    pushed(vm, "with the package's unit")
    of = "systemctl --user show -P MainPID nightporterd"
    first = user(vm, of)
    if (program := vm.run(f"readlink /proc/{first.strip()}/exe").strip()) != "/usr/bin/nightporterd":
        raise Failed(f"it runs {program}")
    where = freezes(vm)
    vm.run("dpkg -i /payload/nightporter-next.deb", limit=LIMIT)
    is_up(vm)
    if user(vm, of) == first:
        raise Failed("the daemon of the old version runs on")
    vm.run(f"grep -qx 'frozen 0' {where}/cgroup.events")
    pushed(vm, "after an upgrade")
    where = freezes(vm)
    vm.run("dpkg -P nightporter", limit=LIMIT)
    vm.run(f"grep -qx 'frozen 0' {where}/cgroup.events")
    vm.run(f"! pgrep -u {USER} nightporterd")
    # What is the user's own stays.
    vm.run(f"test -s {home('.local/state/nightporter/nightporter.db')}")
    vm.logout(USER)
