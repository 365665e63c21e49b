"""Apps in the machine: what they report, what is sent to them, and how they are held. Steps put those that have registered
into `vm.apps`, and later steps look after all that are in there."""

import json
import shlex
import urllib.parse

from machine import Failed

LOG = "/run/sample-reports.log"
MIB = 1 << 20
BUS = "org.freedesktop.DBus /org/freedesktop/DBus org.freedesktop.DBus"
# The machine may be slow beyond belief; what is not there by then does not come.
LIMIT = 240


class App:
    """`name` on the session bus of `user`; on the system bus without one. `start`: how the desktop starts it."""

    def __init__(self, name, user=None, start=None):
        self.name = name
        self.user = user
        self.start = start
        self.endpoint = None
        self._uid = None
        self._flag = "--user" if user else "--system"

    def __str__(self):
        return f"{self.user or 'the system'}'s {self.name}"

    def shell(self, vm, command, **more):
        """What the command says in the app's session, or as root."""
        return vm.as_user(self.user, command, **more) if self.user else vm.run(command, **more)

    def busctl(self, vm, arguments, **more):
        """What `busctl` says on the app's bus."""
        return self.shell(vm, f"busctl {self._flag} {arguments}", **more)

    def tool(self, vm, command, **more):
        """What `nightporter` says on the app's bus."""
        return self.shell(vm, f"nightporter {self._flag} {command}", **more)

    def among(self, vm, log, event):
        """What it has reported under this name in that log, oldest first."""
        if self.user and self._uid is None:
            self._uid = int(vm.run(f"id -u {self.user}"))
        wanted = (self.name, self._uid, event)
        return [one for one in map(json.loads, log.splitlines()) if (one["app"], one.get("uid"), one["event"]) == wanted]

    def reports(self, vm, event):
        """What it has reported under this name since the machine booted, oldest first."""
        return self.among(vm, vm.run(f"cat {LOG}"), event)

    def bodies(self, vm):
        """The messages it has taken."""
        return [report["body"] for report in self.reports(vm, "message")]

    def reported(self, vm, event, what, wanted, limit=LIMIT):
        """Waits for a report that is as wanted. Gives the last such."""

        def there(log):
            return [one for one in self.among(vm, log, event) if wanted(one)]

        try:
            return there(vm.wait_for(f"{what} at {self}", f"cat {LOG}", until=there, limit=limit))[-1]
        except Failed as error:
            raise Failed(f"{error}\n{self.why(vm)}") from None

    def why(self, vm):
        """What the daemon says about it. For the text of a failure."""
        return self.tool(vm, f"why {self.name} 2>&1", check=False)

    def launch(self, vm):
        """Starts it as the desktop does, and waits until it has registered and knows its endpoint."""
        self.shell(vm, self.start, limit=120)
        self.reported(vm, "ready", "a registration", lambda _: True)
        self.endpoint = self.reported(vm, "endpoint", "an endpoint", lambda one: one["endpoint"])["endpoint"]
        vm.apps.append(self)

    def keeps_its_endpoint(self, vm):
        """It was told no other endpoint than its first, since the machine booted."""
        if others := [one["endpoint"] for one in self.reports(vm, "endpoint") if one["endpoint"] not in ("", self.endpoint)]:
            raise Failed(f"{self} has another endpoint: {others}")

    def post(self, vm, text):
        """Sends a message the way an application server does."""
        url = urllib.parse.urlsplit(self.endpoint)
        head = f"POST {url.path} HTTP/1.1\r\nHost: {url.netloc}\r\nTTL: 3600\r\nConnection: close\r\n"
        request = shlex.quote(f"{head}Content-Length: {len(text)}\r\n\r\n{text}")
        exchange = f"exec 3<>/dev/tcp/{url.hostname}/{url.port}; printf %s {request} >&3; read -r _ status _ <&3"
        vm.run(f'{exchange}; echo "HTTP $status"; [ "$status" = 201 ]')

    def takes(self, vm, text):
        """Waits until it has taken a message with this text. Once, not more often."""
        self.reported(vm, "message", f"the message {text!r}", lambda one: one["body"] == text)
        if (times := self.bodies(vm).count(text)) != 1:
            raise Failed(f"{self} has got {text!r} {times} times")

    def pushed(self, vm, text):
        """A message gets through."""
        self.post(vm, text)
        self.takes(vm, text)

    def pid(self, vm):
        """The process that has its name."""
        return int(self.busctl(vm, f"call {BUS} GetConnectionUnixProcessID s {self.name}").split()[1])

    def cgroup(self, vm):
        """The directory of its cgroup."""
        return "/sys/fs/cgroup" + vm.run(f"sed -n s/^0:://p /proc/{self.pid(vm)}/cgroup").strip()

    def is_left(self, vm, state="background"):
        """The shell says that nobody looks at it. (A daemon that was started anew takes it for foreground again.)"""
        self.busctl(vm, f"call org.nightporter1 /org/nightporter1 org.nightporter1.App SetStateOf ss {self.name} {state}")

    def is_looked_at(self, vm):
        """The shell says that somebody looks at it; it runs."""
        self.is_left(vm, "foreground")
        self.wait_for(vm, "the thaw", runs(self.cgroup(vm)))

    def freezes(self, vm):
        """Waits until it is frozen, after nobody looks at it. Gives its cgroup."""
        cgroup = self.cgroup(vm)
        self.is_left(vm)
        self.wait_for(vm, "the freeze", frozen(cgroup))
        return cgroup

    def pages_out(self, vm, cgroup, wanted):
        """Waits until that many bytes of it are in swap."""
        self.wait_for(vm, "the page-out", f'[ "$(cat {cgroup}/memory.swap.current)" -ge {wanted} ]')

    def is_gone(self, vm):
        """Waits until nobody has its name."""
        owner = f"busctl {self._flag} call {BUS} NameHasOwner s {self.name} | grep -q false"
        self.wait_for(vm, "the end", vm.in_session(self.user, owner) if self.user else owner)

    def wait_for(self, vm, what, command):
        """Waits until root's command succeeds."""
        try:
            vm.wait_for(f"{what} of {self}", command, limit=LIMIT)
        except Failed as error:
            raise Failed(f"{error}\n{self.why(vm)}") from None


def frozen(cgroup):
    """A command: is this cgroup frozen?"""
    return f"grep -qx 'frozen 1' {cgroup}/cgroup.events"


def runs(cgroup):
    """A command: is this cgroup not frozen?"""
    return f"grep -qx 'frozen 0' {cgroup}/cgroup.events"


def main_pid(vm):
    """Of the daemon."""
    # Until it is up systemd may name none, or one that is about to be another.
    vm.wait_for("the daemon", "systemctl is-active --quiet nightporterd")
    return int(vm.run("systemctl show -p MainPID --value nightporterd"))


def running(vm, name):
    """How many processes have that name, of which the kernel keeps 15 characters."""
    return int(vm.run(f"cat /proc/[0-9]*/comm 2>/dev/null | grep -cx '{name[:15]}' || :"))


def view(vm, command):
    """A JSON document of the daemon, as root sees it."""
    return json.loads(vm.run(f"nightporter --system {command} --json"))


def waits(vm, number):
    """Waits until so many messages are at the daemon and not yet taken."""

    def there(text):
        return json.loads(text)["messages_waiting"] == number

    vm.wait_for(f"{number} messages at the daemon", "nightporter --system status --json", until=there, limit=LIMIT)


SENDER = """
import time, urllib.request
for text in {texts!r}:
    for endpoint in {endpoints!r}:
        request = urllib.request.Request(endpoint, text.encode(), {{"TTL": "3600"}}, method="POST")
        urllib.request.urlopen(request, timeout=60).close()
    time.sleep(0.3)
"""


def sender(vm, apps, texts):
    """Writes /run/sender.py, which sends the texts to each app in this order, straight to the server."""
    vm.write("/run/sender.py", SENDER.format(endpoints=[app.endpoint for app in apps], texts=texts))
