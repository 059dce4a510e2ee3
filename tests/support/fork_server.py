"""Runs scripts in processes that need not import anything: one that has imported it all forks for each of them.

Started by `processes.py`, with a listening socket, the modules to import, a second socket and more modules: what
comes by the first socket has only the first modules. It ends when its stdin does. A client sends one line, with its
own stdin, stdout and stderr or files instead, and may run code instead of a script:

    {"script": file or "code": text, "arguments": [...], "directory": ..., "environment": {...}}

It is answered with two numbers: the process id, and, when that process has ended, its status, as `subprocess` gives
it. The child leaves the loop and runs the script as Python does: its exit status, its handlers at exit and what a
signal does to it are those of a process that was started by itself.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn

from fork_client import LENGTH

# what the libraries of the Hub read when they are imported
HUB = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "XDG_CACHE_HOME")


def receive(client: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """A request and its stdin, stdout and stderr; None from a client that has gone."""
    line, files, *_ = socket.recv_fds(client, 2**16, 3)
    while not line.endswith(b"\n"):
        more = client.recv(2**16)
        if not more:
            return None, files
        line += more
    return json.loads(line), files


def send(client: socket.socket, number: int) -> None:
    try:
        client.sendall(f"{number:{LENGTH}}".encode())
    except OSError:  # it isn't waiting anymore
        client.close()


def report_ended(clients: dict[int, socket.socket]) -> None:
    while clients:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        if client := clients.pop(pid, None):
            send(client, os.waitstatus_to_exitcode(status))
            client.close()


def serve(listener: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Fork for each request. It returns in the child, with what that is to run, and its files."""
    clients: dict[int, socket.socket] = {}
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest, which then closes our stdin
    signal.signal(signal.SIGCHLD, lambda *_: None)
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    with selectors.DefaultSelector() as selector:
        for file in (listener, sys.stdin.fileno(), woken):
            selector.register(file, selectors.EVENT_READ)
        while True:
            ready = [key.fileobj for key, _ in selector.select()]
            if woken in ready:
                os.read(woken, 2**10)
                report_ended(clients)
            if listener in ready:
                client, _ = listener.accept()
                request, files = receive(client)
                pid = os.fork() if request else None
                if pid == 0:
                    break
                for file in files:
                    os.close(file)
                if pid:
                    clients[pid] = client
                    send(client, pid)
            elif sys.stdin.fileno() in ready:
                os._exit(0)
    signal.set_wakeup_fd(-1)
    for file in (woken, wake):
        os.close(file)
    for connection in (listener, client, *clients.values()):
        connection.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return request, files


def become(request: dict[str, Any], files: list[int]) -> None:
    """Everything that a new process has of its own."""
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    before = {name: value for name, value in os.environ.items() if name.startswith(HUB)}
    os.environ.clear()
    os.environ.update(request["environment"])
    if before != {name: value for name, value in os.environ.items() if name.startswith(HUB)}:
        import hub_settings

        hub_settings.read_again()
    os.chdir(request["directory"])
    script = request.get("script")
    sys.path.insert(0, str(Path(script).parent) if script else "")
    sys.argv = [script or "-c", *request["arguments"]]


def run(request: dict[str, Any]) -> int:
    """Run the script or the code; the status that Python would end with."""
    try:
        if "script" in request:
            runpy.run_path(request["script"], run_name="__main__")
        else:
            exec(request["code"], {"__name__": "__main__"})
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())
        return -signal.SIGINT
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def leave(status: int) -> NoReturn:
    """As Python ends, except that it doesn't take its modules apart, which in a fork takes two seconds."""
    threading._shutdown()  # waits for threads that aren't daemons
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def serve_in_stages(stages: list[str]) -> tuple[dict[str, Any], list[int]]:
    """Import the modules of each stage and serve it, in a process of its own if it isn't the last."""
    while stages:
        listener, modules, *stages = stages
        for name in modules.split(","):
            importlib.import_module(name)
        gc.freeze()  # so that a child's collector touches, and so copies, no page of what is here already
        if not stages or os.fork() == 0:
            for later in stages[::2]:
                os.close(int(later))
            break
        os.close(int(listener))
    return serve(socket.socket(fileno=int(listener)))


if __name__ == "__main__":
    request, files = serve_in_stages(sys.argv[1:])
    become(request, files)
    leave(run(request))
