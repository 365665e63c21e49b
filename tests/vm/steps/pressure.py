"""Memory gets short: frozen apps are paged out, then ended, the least valuable first, and come back with a message."""

import time

from machine import Failed

from . import step
from .apps import view
from .sessions import users_log_in
from .units import ACTIVATION, UNIT, USER, Sample, systemctl, unit_of

# By size, in MiB. Nothing starts the last one again: it has no D-Bus service file.
SIZES = {"org.example.Large": 48, "org.example.Middle": 24, "org.example.Small": 12, "org.example.Alone": 64}
ALONE = "org.example.Alone"
# The one takes memory until a third is available; the other, held to less than it uses, waits for its pages all the time.
# Nothing is at the mercy of the kernel's own killer.
HOG = """
import os, time
def available():
    fields = dict(line.split(":") for line in open("/proc/meminfo"))
    return int(fields["MemAvailable"].split()[0]) / int(fields["MemTotal"].split()[0])
held = []
while available() > 0.33:
    held.append(os.urandom(4 << 20))
print("short", flush=True)
time.sleep(3600)
"""
THRASH = """
import os
pages = [bytearray(os.urandom(1 << 16)) for _ in range(1536)]
while True:
    for page in pages:
        page[0] = page[0] + 1 & 255
        page[4096] = page[0]
"""
CONFIGURATION = "/etc/nightporter/nightporter.toml"


def restart(vm):
    """With the configuration as it is now."""
    vm.run("nightporterd --check-config && systemctl restart nightporterd")
    vm.wait_for("the daemon on the user's bus", vm.in_session(USER, "nightporter --user status"), limit=240)


@step(users_log_in)
def short_memory_pages_out_then_ends(vm):
    """Frozen apps are paged out, and only then ended, never one that nothing starts again; and all are reached afterwards."""
    vm.run(f"cp {CONFIGURATION} /run/before.toml")
    # Time alone does nothing to them.
    vm.run(f"sed -i 's/^page-out-after.*/page-out-after = \"12h\"/; s/^tombstone-after.*/tombstone-after = \"24h\"/' {CONFIGURATION}")
    restart(vm)
    apps = {}
    before = list(vm.apps)
    for name, size in SIZES.items():
        vm.write(f"/etc/systemd/user/{unit_of(name)}", UNIT.format(name=name, more=f"Environment=NIGHTPORTER_SAMPLE_BALLAST_KIB={size << 10}"))
        if name != ALONE:
            vm.write(f"/usr/share/dbus-1/services/{name}.service", ACTIVATION.format(name=name))
    systemctl(vm, "daemon-reload")
    vm.as_user(USER, "busctl --user call org.freedesktop.DBus / org.freedesktop.DBus ReloadConfig")
    for name in SIZES:
        apps[name] = Sample(name, USER, f"systemctl --user start {unit_of(name)}")
        apps[name].launch(vm)
    for app in apps.values():
        app.freezes(vm)
    since = vm.run("date '+%F %T'").strip()
    vm.write("/run/hog.py", HOG)
    vm.write("/run/thrash.py", THRASH)
    vm.run("systemd-run --quiet --collect --unit=hog python3 /run/hog.py")
    vm.wait_for("the hog", "journalctl -q -o cat -u hog | grep -qx short", limit=240)
    vm.run("systemd-run --quiet --collect --unit=thrash -p MemoryHigh=48M python3 /run/thrash.py")
    log = f"journalctl --no-pager -q -o cat -u nightporterd --since '{since}'"
    vm.wait_for("a page-out for want of memory", f"{log} | grep -q ': page-out: memory is short'", limit=240)
    # How deep it has to go depends on how long tasks go on waiting: whatever it takes is to be in this order.
    time.sleep(30)
    log = vm.run(log)
    short = [line for line in log.splitlines() if "memory is short" in line]
    ended = [line.split(":")[0].split()[-1] for line in short if ": kill: " in line]
    paged = [line.split(":")[0].split()[-1] for line in short if ": page-out: " in line]
    if ": kill: " in log and log.index(": page-out: ") > log.index(": kill: "):
        raise Failed(f"something was ended before anything was paged out:\n{log}")
    if ALONE in ended:
        raise Failed(f"{ALONE} was ended, and nothing starts it:\n{log}")
    pressure = view(vm, "status")["pressure"]
    if pressure["ended"] < len(ended) or pressure["paged_out"] < 1:
        raise Failed(f"status says {pressure}")
    vm.run("systemctl stop thrash hog")
    for name, app in apps.items():
        app.pushed(vm, f"to {name} after memory was short")
    vm.run(f"cp /run/before.toml {CONFIGURATION}")
    restart(vm)
    for name, app in apps.items():
        systemctl(vm, f"stop {unit_of(name)}", limit=120)
    vm.apps[:] = before
    return f"{len(paged)} paged out, {len(ended)} ended: {pressure['reason']}"
