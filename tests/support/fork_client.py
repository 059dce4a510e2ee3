"""Asks `fork_server.py` for processes. As a script: a `python -c CODE` that has imported the libraries already.

It imports little, so that it starts at once.
"""

import json
import os
import signal
import socket
import sys
from typing import Any

ADDRESS = "ASKD_TESTS_FORK_SERVER"  # the variable that holds it
LENGTH = 12  # of an answer, in bytes


class Forked:
    """A process that the server at `address` has forked."""

    def __init__(self, address: str, request: dict[str, Any], files: list[int]):
        self.log = os.path.join(os.path.dirname(address), "log")
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.connect(address)
        socket.send_fds(self.connection, [f"{json.dumps(request)}\n".encode()], files)
        self.pid = self.answer()

    def answer(self) -> int:
        """The next number that the server says; it has a fixed length."""
        answer = self.connection.recv(LENGTH)
        if not answer:
            with open(self.log) as log:
                raise RuntimeError(f"the server that forks has ended:\n{log.read()[-3000:]}")
        return int(answer)

    def status(self, wait: bool = False) -> int | None:
        """What it ended with; None while it runs. To be asked for once."""
        self.connection.setblocking(wait)
        try:
            return self.answer()
        except BlockingIOError:
            return None


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process
    request = dict(code=sys.argv[-1], arguments=[], directory=os.getcwd(), environment=dict(os.environ))
    forked = Forked(os.environ[ADDRESS], request, [0, 1, 2])
    signal.signal(signal.SIGTERM, lambda *_: os.kill(forked.pid, signal.SIGTERM))
    for file in (0, 1):
        os.close(file)
    status = forked.status(wait=True)
    os._exit(status if status >= 0 else 128 - status)
