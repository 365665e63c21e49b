"""The packages go: nothing stays frozen, and what is kept or removed is what dpkg promises."""

from machine import Failed

from . import step
from .serving import RUNS, arrives, freezes, push, registers, reports


@step(registers)
def removal_thaws_and_keeps(vm):
    """Removed while an app is frozen: the app runs, the registrations stay, and are there again when it is back."""
    endpoint = reports(vm, "endpoint")[-1]["endpoint"]
    freezes(vm)
    vm.run("dpkg -r nightporter", limit=120)
    vm.run(RUNS)
    vm.run("! systemctl is-active --quiet nightporterd && ! pgrep -x nightporterd")
    vm.run("test -s /var/lib/nightporter/nightporter.db && test -e /etc/nightporter/nightporter.toml")
    vm.run("! test -e /run/nightporter")
    vm.run("dpkg -i /payload/nightporter.deb", limit=120)
    vm.wait_for("the daemon", "nightporter --system status")
    push(vm, "after a removal")
    arrives(vm, "after a removal")
    if reports(vm, "endpoint")[-1]["endpoint"] != endpoint:
        raise Failed("the removal cost the registration")


@step(registers)
def purge_leaves_nothing(vm):
    """Purged, the packages leave no file, no unit, no process and nothing frozen."""
    freezes(vm)
    vm.run("dpkg -P nightporter nightporter-relay", limit=120)
    vm.run(RUNS)
    left = vm.run(
        "find / -xdev \\( -path /proc -o -path /sys -o -path /payload -o -path /var/log/journal \\) -prune -o "
        "-iname '*nightporter*' -print; find /run -iname '*nightporter*' -not -path '*/transient/*'",
        check=False,
    )
    # The sample's own files are the test's.
    left = [path for path in left.splitlines() if "org.nightporter.Sample1" not in path]
    if left:
        raise Failed("left behind:\n" + "\n".join(left))
    vm.run("! pgrep -l nightporter")
    state = vm.run("systemctl list-unit-files --no-legend 'nightporter*'", check=False)
    if state.strip():
        raise Failed(f"units left: {state}")
