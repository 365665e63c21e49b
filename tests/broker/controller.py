"""The controller of a dbus-broker, in place of dbus-broker-launch: gives it a socket to listen on, and holds it.

Arguments: the program, where the socket is to be. Standard input: the call of AddListener, whose one file descriptor is
the socket. Says "ok" or "no". The broker ends with this.
"""

import os
import socket
import subprocess
import sys

program, path = sys.argv[1:]
call = sys.stdin.buffer.read()
listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
listener.bind(path)
os.chmod(path, 0o666)
listener.listen(256)
ours, theirs = socket.socketpair()
ours.settimeout(20)
arguments = ["--controller", str(theirs.fileno()), "--machine-id", "0123456789abcdef0123456789abcdef"]
limits = ["--max-bytes", "536870912", "--max-fds", "4096", "--max-matches", "131072"]
broker = subprocess.Popen([program, *arguments, *limits], pass_fds=[theirs.fileno()])
theirs.close()
try:
    uid = str(os.getuid()).encode().hex().encode()
    ours.sendall(b"\0AUTH EXTERNAL " + uid + b"\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n")
    said = b""
    while said.count(b"\n") < 2:
        said += ours.recv(1) or sys.exit("the broker hung up")
    socket.send_fds(ours, [call], [listener.fileno()])
    reply = ours.recv(65536)
    # The second byte of a message is its type; 2 is a method's return.
    print("ok" if reply[1:2] == b"\x02" else "no", flush=True)
    ours.settimeout(None)
    while ours.recv(65536):
        pass
except OSError:
    print("no", flush=True)
finally:
    broker.kill()
    broker.wait()
