"""The daemon crashes, cannot start, is upgraded, and the machine is rebooted: for all apps that have registered so far, on
whatever bus they are."""

from machine import Failed

from . import step
from .apps import frozen, main_pid, runs, sender, waits
from .installing import is_configured
from .sessions import USERS, is_served

DROP_IN = "/run/systemd/system/nightporterd.service.d"


@step(is_configured, core=True)
def a_crash_thaws(vm):
    """The daemon killed with SIGKILL while apps are frozen: systemd thaws them and starts the daemon again."""
    cgroups = [app.freezes(vm) for app in vm.apps]
    # A daemon that comes back thaws as well; that it did not come back in time must not matter.
    vm.write(f"{DROP_IN}/slow.conf", "[Service]\nRestartSec=1h\nRestartSteps=0\n")
    vm.run("systemctl daemon-reload")
    pid = main_pid(vm)
    vm.run(f"kill -KILL {pid}")
    for cgroup in cgroups:
        vm.wait_for("the thaw", runs(cgroup))
    if vm.run("systemctl is-active nightporterd", check=False).strip() == "active":
        raise Failed("the daemon was back before the thaw was seen: nothing is proved")
    journal = vm.run("journalctl --no-pager -q -b -o cat -u nightporterd")
    if f"{len(cgroups)} thawed" not in journal:
        raise Failed(f"ExecStopPost= did not say that it thawed {len(cgroups)}:\n{journal[-2000:]}")
    for app in vm.apps:
        app.post(vm, "while the daemon is dead")
    vm.run(f"rm -r {DROP_IN} && systemctl daemon-reload && systemctl start nightporterd")
    if main_pid(vm) == pid:
        raise Failed("it was not killed")
    for app in vm.apps:
        app.takes(vm, "while the daemon is dead")
        app.pushed(vm, "after a crash")


@step(is_configured)
def a_crash_is_mended_by_systemd(vm):
    """As the unit is, the daemon comes back by itself; and an app that is frozen meanwhile is not forgotten."""
    cgroups = [app.freezes(vm) for app in vm.apps]
    pid = main_pid(vm)
    vm.run(f"kill -KILL {pid}")
    for cgroup in cgroups:
        vm.wait_for("the thaw", runs(cgroup))
    another = f'p=$(systemctl show -p MainPID --value nightporterd) && [ "$p" != 0 ] && [ "$p" != {pid} ]'
    vm.wait_for("the restart", f"systemctl is-active --quiet nightporterd && {another}")
    for app in vm.apps:
        app.pushed(vm, "after another crash")


@step(is_configured)
def a_wrong_configuration_leaves_nothing_frozen(vm):
    """The daemon ends and cannot start again: it is not tried in vain, and nothing stays frozen."""
    cgroups = [app.freezes(vm) for app in vm.apps]
    vm.run("echo 'unknown = 1' >>/etc/nightporter/nightporter.toml")
    vm.run(f"kill -KILL {main_pid(vm)}")
    for cgroup in cgroups:
        vm.wait_for("the thaw", runs(cgroup))
    vm.wait_for("giving up", "systemctl is-failed nightporterd", limit=120)
    if (status := vm.run("systemctl show -p ExecMainStatus --value nightporterd").strip()) != "78":
        raise Failed(f"the daemon ended with {status}, not 78")
    vm.run("cp /payload/nightporter.toml /etc/nightporter/nightporter.toml && systemctl start nightporterd")
    for app in vm.apps:
        app.pushed(vm, "after a wrong configuration")


@step(is_configured)
def upgrades(vm):
    """dpkg puts in the next version while apps are frozen and messages flow: none is lost, none comes twice."""
    for app in vm.apps:
        app.freezes(vm)
    texts = [f"upgrade {number}" for number in range(20)]
    # Straight to the server, as senders do: they know nothing of the daemon.
    sender(vm, vm.apps, texts)
    vm.run("systemd-run --quiet --unit=sender python3 /run/sender.py")
    pid = main_pid(vm)
    vm.run("dpkg -i /payload/nightporter-next.deb", limit=600)
    if main_pid(vm) == pid:
        raise Failed("the daemon of the old version runs on")
    if not vm.run("dpkg-query -W -f '${Version}' nightporter").endswith("+1"):
        raise Failed("the next version is not installed")
    for app in vm.apps:
        # In order: the last is the last to come.
        app.takes(vm, texts[-1])
        if (got := [body for body in app.bodies(vm) if body in texts]) != texts:
            raise Failed(f"{app} got {got}")
        app.keeps_its_endpoint(vm)


@step(is_configured)
def a_reboot_keeps_what_was(vm):
    """After a reboot each registration is there with its address, and what could not be delivered before it comes."""
    # alice is not there and a service cannot be started: their messages stay undelivered. bob's apps are frozen.
    users = {app.user for app in vm.apps} - {None}
    if "alice" in users:
        vm.logout("alice")
    services = [app for app in vm.apps if app.user is None]
    for app in services:
        drop_in = "/run/systemd/system/sample1.service.d/no.conf"
        vm.write(drop_in, "[Service]\nExecStart=\nExecStart=/bin/false\n")
        vm.run("systemctl daemon-reload")
        app.tool(vm, f"kill {app.name}")
        app.is_gone(vm)
    there = [app for app in vm.apps if app.user == "bob"]
    away = [app for app in vm.apps if app.user != "bob"]
    for app in there:
        app.freezes(vm)
    for app in away:
        app.post(vm, "before the reboot")
    waits(vm, len(away))
    for cgroup in [app.cgroup(vm) for app in there]:
        vm.run(frozen(cgroup))
    vm.reboot()
    vm.wait_for("the reports", "test -S /run/sample-reports")
    late = vm.run("journalctl --no-pager -q -b -1 -o cat | grep -i 'timed out. Killing' || :")
    if late:
        raise Failed(f"the shutdown had to kill:\n{late}")
    for user in USERS.keys() & users:
        vm.start_login(user)
    for app in services:
        app.takes(vm, "before the reboot")
    for user in USERS.keys() & users:
        vm.wait_for_login(user)
        is_served(vm, user)
    for app in away:
        app.takes(vm, "before the reboot")
    for app in vm.apps:
        app.pushed(vm, "after the reboot")
        app.keeps_its_endpoint(vm)
