"""Two users logged in at the same time, with apps that know nothing of Night Porter: KDE's own client library, and Python
with nothing but the D-Bus specification of UnifiedPush (version 2, and 1)."""

import json

from machine import Failed

from . import step
from .apps import MIB, App, frozen, running, runs, waits
from .installing import is_configured

KDE = "org.example.Kde"
USERS = {"alice": "org.example.PythonTwo", "bob": "org.example.PythonOne"}
# What each remembers (kde/connector.cpp, apps/connector.py), and most of that.
KDE_HISTORY, PYTHON_HISTORY = 24 * MIB, 12 * MIB
MOST = 0.7


def apps_of(vm, user):
    """The two apps of a user."""
    return [app for app in vm.apps if app.user == user]


def used(vm):
    """What the whole system uses of its memory, in bytes; zram's own is among it."""
    total, available = vm.run("sed -n 's/^\\(MemTotal\\|MemAvailable\\): *\\([0-9]*\\) kB/\\2/p' /proc/meminfo").split()
    # Linux 6.7 and later keep tens of MiB of free pages in lists of each processor for a while, and MemFree is without them.
    listed = vm.run("awk '$1 == \"count:\" { pages += $2 } END { print pages * 4096 }' /proc/zoneinfo")
    return ((int(total) - int(available)) << 10) - int(listed)


def forget_the_page_cache(vm):
    """So that two readings of the memory can be compared."""
    vm.run("sync; echo 3 >/proc/sys/vm/drop_caches")


def is_served(vm, user):
    """Waits until the daemon is on the user's session bus."""
    vm.wait_for(f"the daemon on {user}'s bus", vm.in_session(user, "nightporter --user status"), limit=240)


@step(is_configured, core=True)
def users_log_in(vm):
    """alice and bob are logged in at the same time, each with a systemd and a bus; one daemon serves both."""
    for user in USERS:
        vm.start_login(user)
    for user in USERS:
        vm.wait_for_login(user)
    for user in USERS:
        name = vm.as_user(user, "systemctl --user show-environment | grep ^USER=; busctl --user status >/dev/null").strip()
        if name != f"USER={user}":
            raise Failed(f"{user}'s systemd is of {name}")
        is_served(vm, user)
    if (processes := running(vm, "nightporterd")) != 1:
        raise Failed(f"{processes} daemons")


@step(users_log_in, core=True)
def unmodified_apps_register(vm):
    """KDE's library and Python connectors of both versions register for both users; each app gets its message."""
    vm.run("cp /payload/org.example.*.service /usr/share/dbus-1/services/")
    vm.run("cp /payload/app-org.example.*.service /etc/systemd/user/")
    for user, python in USERS.items():
        vm.as_user(user, "busctl --user call org.freedesktop.DBus / org.freedesktop.DBus ReloadConfig; systemctl --user daemon-reload")
        # As a desktop starts them.
        desktop = f"systemd-run --user --quiet --collect --slice=app.slice --unit=app-{KDE}@desktop.service"
        App(KDE, user, f"{desktop} /opt/kde/usr/bin/connector {KDE}").launch(vm)
        App(python, user, f"systemctl --user start app-{python}.service").launch(vm)
    for app in vm.apps:
        app.post(vm, f"to {app} while it runs")
    for app in vm.apps:
        app.takes(vm, f"to {app} while it runs")
    if len({app.endpoint for app in vm.apps}) != len(vm.apps):
        raise Failed("two apps have one endpoint")


@step(unmodified_apps_register, core=True)
def pages_out_and_wakes_users_apps(vm):
    """Left alone the users' apps are frozen and paged out: the whole system uses less; each push gets through."""
    forget_the_page_cache(vm)
    before = used(vm)
    cgroups = {app: app.cgroup(vm) for app in vm.apps}
    for app in vm.apps:
        app.is_left(vm)
    held = 0
    for app, cgroup in cgroups.items():
        app.wait_for(vm, "the freeze", frozen(cgroup))
        most = int((KDE_HISTORY if app.name == KDE else PYTHON_HISTORY) * MOST)
        app.pages_out(vm, cgroup, most)
        held += most
    forget_the_page_cache(vm)
    after = used(vm)
    stored, _, zram, *_ = map(int, vm.run("cat /sys/block/zram0/mm_stat").split())
    figures = (
        f"the system used {before / MIB:.0f} MiB, then {after / MIB:.0f} MiB; "
        f"zram holds {stored / MIB:.0f} MiB in {zram / MIB:.0f} MiB"
    )
    # What is paged out is not free: zram keeps it, smaller.
    if stored < held or before - after < (stored - zram) * 0.7:
        raise Failed(figures)
    for app, cgroup in cgroups.items():
        vm.run(frozen(cgroup))
        app.post(vm, "while it is paged out")
    for app in vm.apps:
        app.takes(vm, "while it is paged out")
    # They were left, and are frozen again by themselves; now with most of their memory still in swap.
    for app, cgroup in cgroups.items():
        app.wait_for(vm, "the next freeze", frozen(cgroup))
        app.pushed(vm, "while it is frozen again")
    return figures


@step(unmodified_apps_register)
def users_are_kept_apart(vm):
    """What one user sees, sends and does is of that user's apps alone."""
    for app in vm.apps:
        app.is_looked_at(vm)
    for user, python in USERS.items():
        mine, others = apps_of(vm, user), [app for app in vm.apps if app.user != user]
        uid = vm.run(f"id -u {user}").strip()
        shown = json.loads(vm.as_user(user, "nightporter apps --json"))
        if {(one["name"], one["bus"]) for one in shown} != {(app.name, f"user {uid}") for app in mine}:
            raise Failed(f"{user} sees {shown}")
        for app in mine:
            (pid,) = (one["pid"] for one in shown if one["name"] == app.name)
            if pid != app.pid(vm) or vm.run(f"stat -c %u /proc/{pid}").strip() != uid:
                raise Failed(f"{app} is taken for process {pid}")
        status = json.loads(vm.as_user(user, "nightporter status --json"))
        if (status["apps"], status["registrations"], status["buses"]) != (2, 2, [f"user {uid}"]):
            raise Failed(f"{user} sees {status}")
        everything = vm.as_user(user, f"nightporter show {KDE} --json; nightporter report --json; nightporter why {KDE}")
        for app in others:
            if app.endpoint in everything or app.name != KDE and app.name in everything:
                raise Failed(f"{user} sees something of {app}:\n{everything}")
        # Neither the daemon's own view nor the other's bus is open.
        vm.run("! " + vm.in_session(user, "nightporter --system apps"))
        other = vm.run(f"id -u {others[0].user}").strip()
        vm.run("! " + vm.in_session(user, f"busctl --address=unix:path=/run/user/{other}/bus list"))
        for app in mine:
            if (got := [body for body in app.bodies(vm) if body.startswith("to ")]) != [f"to {app} while it runs"]:
                raise Failed(f"{app} got {got}")
        # Its own name for somebody else's registration (connector.py: NAME-UID) takes nothing away from the other.
        token = next(f"{app.name}-{other}" for app in others if app.name != KDE)
        call = "busctl --user call org.unifiedpush.Distributor.nightporter /org/unifiedpush/Distributor"
        vm.as_user(user, f"{call} org.unifiedpush.Distributor2 Unregister 'a{{sv}}' 1 token s {token}", check=False)
    alices, bobs = (next(app for app in vm.apps if (app.name, app.user) == (KDE, user)) for user in USERS)
    cgroup = alices.freezes(vm)
    vm.run(runs(bobs.cgroup(vm)))
    for app in vm.apps:
        if app is not alices:
            app.pushed(vm, "while alice's is frozen")
    vm.run(frozen(cgroup))
    alices.pushed(vm, "while it is frozen")


@step(unmodified_apps_register, core=True)
def pushes_start_users_apps(vm):
    """Apps that are gone, by the daemon's hand and by a crash, are started for a message, by the user's own systemd."""
    for user, python in USERS.items():
        kde, other = apps_of(vm, user)
        kde.tool(vm, f"kill {KDE}")
        kde.is_gone(vm)
        vm.run(f"kill -KILL {other.pid(vm)}")
        other.is_gone(vm)
        for app in (kde, other):
            app.post(vm, "while it is gone")
        for app in (kde, other):
            app.takes(vm, "while it is gone")
        uid = vm.run(f"id -u {user}").strip()
        app_slice = f"/sys/fs/cgroup/user.slice/user-{uid}.slice/user@{uid}.service/app.slice"
        for app, unit in ((kde, f"app-nightporter-{KDE}@"), (other, f"app-{python}.service")):
            cgroup = app.cgroup(vm)
            if not cgroup.startswith(f"{app_slice}/{unit}"):
                raise Failed(f"{app} runs in {cgroup}")
            vm.run(f'[ "$(stat -c %u /proc/{app.pid(vm)})" = {uid} ]')
            app.keeps_its_endpoint(vm)


@step(unmodified_apps_register)
def a_logout_keeps_what_comes(vm):
    """While alice is logged out her messages wait and bob's come; when she is back, she gets hers, at the same address."""
    hers, his = (apps_of(vm, user) for user in USERS)
    vm.logout("alice")
    texts = [f"away {number}" for number in range(3)]
    for text in texts:
        for app in hers:
            app.post(vm, text)
    for app in his:
        app.pushed(vm, "meanwhile")
    waits(vm, len(texts) * len(hers))
    vm.login("alice")
    # Nobody but the daemon starts them.
    for app in hers:
        app.takes(vm, texts[-1])
        if (got := [body for body in app.bodies(vm) if body in texts]) != texts:
            raise Failed(f"{app} got {got}")
        app.keeps_its_endpoint(vm)
        app.pushed(vm, "after her login")
    waits(vm, 0)
