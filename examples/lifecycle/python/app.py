#!/usr/bin/python3
"""An app that sleeps well: docs/lifecycle.md in 190 lines of Python, with nothing but GLib (Debian: python3-gi).

    app.py org.example.App

It registers for push, says that it is in the background, saves what it knows when it is about to be frozen, and has it back
when a push starts it again. What it knows is how many messages it has seen. A message "fetch URL" has it download a file
without staying awake for that. An app with windows says "foreground" when one
is shown, and "background" when the last is hidden.
"""

import hashlib
import os
import sys

from gi.repository import Gio, GLib

DISTRIBUTOR = "org.unifiedpush.Distributor.nightporter"
PORTER = "org.nightporter1"
# Any text of at most 100 bytes that is the same at each start. An app with several accounts has one for each.
TOKEN = "messages"

INTERFACES = """<node>
  <interface name="org.unifiedpush.Connector2">
    <method name="Message">
      <arg type="a{sv}" direction="in"/><arg type="a{sv}" direction="out"/>
    </method>
    <method name="NewEndpoint">
      <arg type="a{sv}" direction="in"/><arg type="a{sv}" direction="out"/>
    </method>
    <method name="Unregistered">
      <arg type="a{sv}" direction="in"/><arg type="a{sv}" direction="out"/>
    </method>
  </interface>
  <interface name="org.nightporter1.Client">
    <method name="WillSuspend"><arg name="milliseconds" type="t" direction="in"/></method>
    <method name="Resumed"><arg name="frozen_milliseconds" type="t" direction="in"/></method>
    <method name="TransferDone">
      <arg name="id" type="t" direction="in"/>
      <arg name="status" type="s" direction="in"/>
      <arg name="text" type="s" direction="in"/>
    </method>
  </interface>
</node>"""


def say(text):
    print(text, flush=True)


class App:
    def __init__(self, name):
        self.name = name
        self.seen = 0
        self.restored = False
        self.bus = Gio.bus_get_sync(Gio.BusType.SESSION)
        # First what can be called, then the name it is called by: a message may come at once.
        for interface in Gio.DBusNodeInfo.new_for_xml(INTERFACES).interfaces:
            connector = interface.name == "org.unifiedpush.Connector2"
            path = "/org/unifiedpush/Connector" if connector else "/org/nightporter1/Client"
            called = self.connector_called if connector else self.client_called
            self.bus.register_object(path, interface, called, None, None)
        do_not_queue = 4
        arguments = GLib.Variant("(su)", (name, do_not_queue))
        reply = self.call("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus", "RequestName", arguments)
        if reply[0] != 1:
            sys.exit(f"{name} is running already")
        # The daemon may be started anew (an update) and then knows nothing of what this instance has said.
        Gio.bus_watch_name_on_connection(self.bus, PORTER, Gio.BusNameWatcherFlags.NONE, self.greet, None)

    def call(self, destination, path, interface, member, arguments=None, timeout=30_000):
        flags = Gio.DBusCallFlags.NONE
        return self.bus.call_sync(destination, path, interface, member, arguments, None, flags, timeout, None).unpack()

    def porter(self, member, arguments=None):
        return self.call(PORTER, "/org/nightporter1", "org.nightporter1.App", member, arguments)

    def greet(self, _bus, _name, _owner):
        """Registers, and says what this app is and wants. Most of this is for registered apps only, so that comes first."""
        texts = {"service": self.name, "token": TOKEN, "description": "Messages"}
        arguments = GLib.Variant("(a{sv})", ({key: GLib.Variant("s", text) for key, text in texts.items()},))
        interface = "org.unifiedpush.Distributor2"
        (result,) = self.call(DISTRIBUTOR, "/org/unifiedpush/Distributor", interface, "Register", arguments)
        if result["success"] != "REGISTRATION_SUCCEEDED":
            sys.exit(f"not registered: {result}")
        if not self.restored:
            (state,) = self.porter("RestoreState")
            # A message may have been faster.
            self.seen += int(bytes(state) or b"0")
            self.restored = True
            say(f"restored: {self.seen}")
        self.porter("Listen", GLib.Variant("(b)", (True,)))
        self.porter("SetState", GLib.Variant("(s)", ("background",)))
        say("ready")

    def connector_called(self, _bus, _sender, _path, _interface, method, parameters, invocation):
        (arguments,) = parameters.unpack()
        answer = {}
        if method == "Message":
            self.seen += 1
            text = bytes(arguments["message"]).decode()
            say(f"message {self.seen}: {text}")
            if text.startswith("fetch "):
                self.fetch(text.removeprefix("fetch "))
            # The answer says that the message is this app's own now. An app that shows notifications shows it first.
            answer = {"id": GLib.Variant("s", arguments["id"])} if "id" in arguments else {}
        elif method == "NewEndpoint":
            # To be sent to the app's own server, which pushes to it from now on.
            say(f"endpoint: {arguments['endpoint']}")
        else:
            say("unregistered")
        invocation.return_value(GLib.Variant("(a{sv})", (answer,)))

    def fetch(self, url):
        """Has a file downloaded, which goes on while this app is frozen or dead."""
        options = {"title": GLib.Variant("s", "What the message is about")}
        arguments = GLib.Variant("(sa{ss}a{sv})", (url, {}, options))
        (transfer,) = self.call(PORTER, "/org/nightporter1", "org.nightporter1.Transfers", "Download", arguments)
        say(f"transfer {transfer}")

    def collect(self, transfer):
        """The file is this app's own before the daemon is told so: it is deleted there with the answer to TransferDone."""
        reply, files = self.bus.call_with_unix_fd_list_sync(
            PORTER, "/org/nightporter1", "org.nightporter1.Transfers", "Collect", GLib.Variant("(t)", (transfer,)),
            None, Gio.DBusCallFlags.NONE, 30_000, None, None)
        (index, _size) = reply.unpack()
        with os.fdopen(files.get(index), "rb") as file:
            content = file.read()
        say(f"fetched {len(content)} bytes: {hashlib.sha256(content).hexdigest()[:16]}")

    def client_called(self, _bus, _sender, _path, _interface, method, parameters, invocation):
        if method == "TransferDone":
            (transfer, status, text) = parameters.unpack()
            if status == "done":
                self.collect(transfer)
            else:
                say(f"transfer {transfer} {status}: {text}")
            return invocation.return_value(None)
        (milliseconds,) = parameters.unpack()
        if method == "WillSuspend":
            # With the answer, or when the time is over, nothing runs here any more: so what matters is saved before.
            # This is also the moment to tell one's server that it must push from now on.
            say(f"freezing, within {milliseconds} ms")
            self.porter("SaveState", GLib.Variant("(ay)", (str(self.seen).encode(),)))
        else:
            # Timers that were due meanwhile run now. Connections of one's own are to be looked at after this long.
            say(f"resumed after {milliseconds} ms")
        invocation.return_value(None)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: app.py BUS-NAME")
    APP = App(sys.argv[1])
    GLib.MainLoop().run()
