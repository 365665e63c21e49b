"""A UnifiedPush app as any Python programmer writes one: python3-dbus and the specification, nothing of Night Porter. It
reports to the test what it is told, each thing a datagram.

usage: connector.py NAME [1|2]: speaks that version of UnifiedPush
"""

import json
import os
import socket
import sys

import dbus
import dbus.mainloop.glib
import dbus.service
from gi.repository import GLib

NAME = sys.argv[1]
VERSION = int(sys.argv[2]) if len(sys.argv) > 2 else 2
PATH = "/org/unifiedpush/Connector"
PREFIX = "org.unifiedpush.Distributor."
TOKEN = f"{NAME}-{os.getuid()}"
# What a chat client remembers: 12 MiB of lines that are alike, as text is.
HISTORY = "".join(f"{line * 2654435761 % 2**32} is what somebody said to somebody else\n" for line in range(240_000))

out = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)


def report(event, **more):
    out.sendto(json.dumps({"app": NAME, "uid": os.getuid(), "event": event, **more}).encode(), "/run/sample-reports")


class Connector(dbus.service.Object):
    """Both versions of the interface."""

    def take(self, token, body):
        if token != TOKEN:
            raise dbus.DBusException(f"this is not my token: {token}")
        report("message", body=bytes(body).decode())

    @dbus.service.method("org.unifiedpush.Connector2", in_signature="a{sv}", out_signature="a{sv}")
    def Message(self, arguments):
        self.take(arguments["token"], arguments["message"])
        return {"id": arguments["id"]} if "id" in arguments else {}

    @dbus.service.method("org.unifiedpush.Connector2", in_signature="a{sv}", out_signature="a{sv}")
    def NewEndpoint(self, arguments):
        report("endpoint", endpoint=str(arguments["endpoint"]))
        return {}

    @dbus.service.method("org.unifiedpush.Connector2", in_signature="a{sv}", out_signature="a{sv}")
    def Unregistered(self, arguments):
        report("unregistered")
        return {}


class ConnectorOne(dbus.service.Object):
    """The first version of the interface."""

    @dbus.service.method("org.unifiedpush.Connector1", in_signature="says", out_signature="")
    def Message(self, token, body, identity):
        Connector.take(self, token, body)

    @dbus.service.method("org.unifiedpush.Connector1", in_signature="ss", out_signature="")
    def NewEndpoint(self, token, endpoint):
        report("endpoint", endpoint=str(endpoint))

    @dbus.service.method("org.unifiedpush.Connector1", in_signature="s", out_signature="")
    def Unregistered(self, token):
        report("unregistered")


def main():
    dbus.mainloop.glib.DBusGMainLoop(set_as_default=True)
    bus = dbus.SessionBus()
    connector = (Connector if VERSION == 2 else ConnectorOne)(bus, PATH)
    name = dbus.service.BusName(NAME, bus, do_not_queue=True)
    GLib.idle_add(register, bus)
    GLib.MainLoop().run()
    return connector, name


def register(bus):
    # Of the distributors that are there the first, as the connector libraries choose.
    distributor = min(name for name in bus.list_names() if name.startswith(PREFIX))
    distributor = bus.get_object(distributor, "/org/unifiedpush/Distributor", introspect=False)
    if VERSION == 2:
        arguments = {"service": NAME, "token": TOKEN, "description": "Messages"}
        arguments = dbus.Dictionary(arguments, signature="sv")
        interface = dbus.Interface(distributor, "org.unifiedpush.Distributor2")
        interface.Register(arguments, timeout=120, reply_handler=lambda reply: registered(reply["success"]), error_handler=failed)
    else:
        interface = dbus.Interface(distributor, "org.unifiedpush.Distributor1")
        interface.Register(
            NAME, TOKEN, "Messages", timeout=120, reply_handler=lambda word, reason: registered(word), error_handler=failed
        )


def registered(word):
    report("ready" if word == "REGISTRATION_SUCCEEDED" else "refused", word=str(word))


def failed(error):
    report("refused", word=str(error))


main()
