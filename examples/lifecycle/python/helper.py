#!/usr/bin/python3
"""A payload helper for Night Porter: makes a notification of a message while its app stays frozen, or dead.

The user names it in nightporter.toml:

    [[app]]
    name = "org.example.Chat"
    payload-helper = ["/usr/libexec/example-chat-helper"]

The message is on standard input, exactly as it came; one JSON object goes to standard output. Anything else (an exception, an
exit status that is not 0, 5 s without an answer) wakes the app, which gets the message as if there were no helper: so there is
no error to handle here. What this app's server sends is JSON; one that encrypts (RFC 8291) decrypts here first, with the key
it finds in $HOME.
"""

import json
import os
import sys


def answer(message):
    """What is to become of the message."""
    if message["type"] == "read":
        # Read on another device. Nobody needs to know.
        return {"drop": True}
    if message["type"] == "call":
        # It must ring: that is for the app.
        return {"wake": True}
    return {
        "summary": message["from"],
        "body": message["text"],
        "category": "im.received",
        # One notification for each room: the next one from there takes its place.
        "replace": message["room"],
    }


if __name__ == "__main__":
    if sys.stdin.isatty():
        sys.exit("usage: echo '{\"type\": \"text\", …}' | " + os.path.basename(sys.argv[0]))
    json.dump(answer(json.load(sys.stdin.buffer)), sys.stdout)
