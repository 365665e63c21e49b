"""The packages go: nothing stays frozen, and what is kept or removed is what dpkg promises."""

from machine import Failed

from . import step
from .apps import running, runs
from .installing import is_configured


@step(is_configured)
def removal_thaws_and_keeps(vm):
    """Removed while apps are frozen: they run, the registrations stay, and are there again when it is back."""
    cgroups = [app.freezes(vm) for app in vm.apps]
    vm.run("dpkg -r nightporter", limit=600)
    for cgroup in cgroups:
        vm.run(runs(cgroup))
    vm.run("! systemctl is-active --quiet nightporterd")
    if running(vm, "nightporterd"):
        raise Failed("the daemon runs on")
    vm.run("test -s /var/lib/nightporter/nightporter.db && test -e /etc/nightporter/nightporter.toml")
    vm.run("! test -e /run/nightporter")
    for app in vm.apps:
        app.post(vm, "while it is removed")
    vm.run("dpkg -i /payload/nightporter.deb", limit=600)
    vm.wait_for("the daemon", "nightporter --system status")
    for app in vm.apps:
        app.takes(vm, "while it is removed")
        app.keeps_its_endpoint(vm)


@step(is_configured)
def purge_leaves_nothing(vm):
    """Purged, the packages leave no file, no unit, no process and nothing frozen."""
    cgroups = [app.freezes(vm) for app in vm.apps]
    vm.run("dpkg -P nightporter nightporter-relay", limit=600)
    for cgroup in cgroups:
        vm.run(runs(cgroup))
    left = vm.run(
        "find / -xdev \\( -path /proc -o -path /sys -o -path /payload -o -path /var/log/journal \\) -prune -o "
        "-iname '*nightporter*' -print; find /run -iname '*nightporter*'",
        check=False,
    )
    # The sample's own files are the test's, and what systemd notes of apps that were started and run on is theirs.
    left = [path for path in left.splitlines() if not any(ours in path for ours in ("org.nightporter.Sample1", "app-nightporter-"))]
    if left:
        raise Failed("left behind:\n" + "\n".join(left))
    for name in ("nightporterd", "nightporter-relay"):
        if running(vm, name):
            raise Failed(f"{name} runs on")
    state = vm.run("systemctl list-unit-files --no-legend 'nightporter*'", check=False)
    if state.strip():
        raise Failed(f"units left: {state}")
