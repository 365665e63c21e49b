"""Apps as the user's systemd knows them: stopped while they are frozen, restarted whatever happens, guarded by a watchdog."""

import json
import time

from machine import Failed

from . import step
from .apps import App, frozen, runs
from .sessions import users_log_in

USER = "alice"
STUBBORN, GUARDED = "org.example.Stubborn", "org.example.Guarded"
# The sample has a handler for SIGTERM, so that it must run to end: what has none dies frozen, too.
UNIT = """[Unit]
Description={name}

[Service]
Type=dbus
BusName={name}
Slice=app.slice
Environment=NIGHTPORTER_SAMPLE_NAME={name} NIGHTPORTER_SAMPLE_MODE=shared NIGHTPORTER_SAMPLE_BALLAST_KIB=1024
Environment=NIGHTPORTER_SAMPLE_REPORT=/run/sample-reports
ExecStart=/usr/bin/nightporter-sample
{more}
"""
ACTIVATION = "[D-BUS Service]\nName={name}\nExec=/bin/false\nSystemdService=app-{name}.service\n"
MORE = {STUBBORN: "Restart=always\nRestartSec=1", GUARDED: "WatchdogSec=20min"}


class Sample(App):
    """A sample, which does not say whose it is; of these names there is one."""

    def among(self, vm, log, event):
        return [one for one in map(json.loads, log.splitlines()) if (one["app"], one["event"]) == (self.name, event)]


def unit_of(name):
    """As a desktop names it."""
    return f"app-{name}.service"


def systemctl(vm, command, **more):
    """Of the user's systemd."""
    return vm.as_user(USER, f"systemctl --user {command}", **more)


def app_of(vm, name):
    """One of the two, which has registered."""
    return next(app for app in vm.apps if app.name == name)


@step(users_log_in)
def apps_in_units_register(vm):
    """An app that its user's systemd restarts whatever happens, and one with a watchdog."""
    for name, more in MORE.items():
        vm.write(f"/etc/systemd/user/{unit_of(name)}", UNIT.format(name=name, more=more))
        vm.write(f"/usr/share/dbus-1/services/{name}.service", ACTIVATION.format(name=name))
    systemctl(vm, "daemon-reload")
    vm.as_user(USER, "busctl --user call org.freedesktop.DBus / org.freedesktop.DBus ReloadConfig")
    for name in MORE:
        Sample(name, USER, f"systemctl --user start {unit_of(name)}").launch(vm)


@step(apps_in_units_register)
def a_frozen_app_is_stopped_at_once(vm):
    """`systemctl stop` of a frozen app does not wait for TimeoutStopSec=: the job thaws it."""
    app = app_of(vm, STUBBORN)
    app.freezes(vm)
    begin = time.monotonic()
    systemctl(vm, f"stop {unit_of(STUBBORN)}", limit=120)
    took = time.monotonic() - begin
    result = systemctl(vm, f"show -P Result {unit_of(STUBBORN)}").strip()
    # The default is 90 s, after which it is killed: "timeout".
    if took > 45 or result != "success":
        raise Failed(f"it took {took:.1f} s, and ended with {result!r}\n{app.why(vm)}")
    app.is_gone(vm)
    app.pushed(vm, "after systemctl stop")
    return f"{took:.1f} s"


@step(apps_in_units_register)
def an_app_that_restarts_always_stays_a_tombstone(vm):
    """Ended through its systemd it does not come back by itself, but with the next message, in its own unit."""
    app = app_of(vm, STUBBORN)
    cgroup = app.freezes(vm)
    app.tool(vm, f"kill {STUBBORN}", limit=120)
    app.is_gone(vm)
    # RestartSec= is one second.
    time.sleep(5)
    show = set(systemctl(vm, f"show -p ActiveState,NRestarts,Result {unit_of(STUBBORN)}").split())
    if show != {"ActiveState=inactive", "NRestarts=0", "Result=success"}:
        raise Failed(f"the unit is {show}\n{app.why(vm)}")
    app.pushed(vm, "to a tombstone")
    if app.cgroup(vm) != cgroup:
        raise Failed(f"it was in {cgroup}, now in {app.cgroup(vm)}")


@step(apps_in_units_register)
def an_app_with_a_watchdog_is_not_frozen(vm):
    """It would be ended for being frozen, so it is not; `why` says so. Without the watchdog it is like any other."""
    app = app_of(vm, GUARDED)
    cgroup = app.cgroup(vm)
    app.is_left(vm)
    vm.wait_for("the reason", vm.in_session(USER, f"nightporter --user why {GUARDED}"), until=lambda text: "watchdog" in text)
    # The grace is two seconds.
    time.sleep(6)
    vm.run(runs(cgroup))
    app_of(vm, STUBBORN).freezes(vm)
    if vm.try_run(frozen(cgroup))[0] == 0:
        raise Failed(f"it is frozen:\n{app.why(vm)}")
    vm.write(f"/etc/systemd/user/{unit_of(GUARDED)}.d/none.conf", "[Service]\nWatchdogSec=0\n")
    systemctl(vm, "daemon-reload")
    systemctl(vm, f"restart {unit_of(GUARDED)}")
    app.freezes(vm)
