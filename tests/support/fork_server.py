"""Runs scripts in processes that need not import anything: one that has imported it all forks for each of them.

Started by `processes.py`, with the modules to import as arguments. Each line of stdin asks for a script:

    {"script": file, "arguments": [...], "directory": ..., "environment": {...}, "stdout": file, "stderr": file}

and is answered with the process id. When that process has ended, a file of that name in the directory of the first
argument holds its status, as `subprocess` gives it. The child leaves the loop and runs the script as Python does: its
exit status, its handlers at exit and what a signal does to it are those of a process that was started by itself.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn


def report_ended(statuses: Path) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        unfinished = statuses / f"{pid}.unfinished"
        unfinished.write_text(str(os.waitstatus_to_exitcode(status)))
        unfinished.rename(statuses / str(pid))


def serve(statuses: Path) -> dict[str, Any]:
    """Fork for each request. It returns in the child, with what that is to run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest, which then closes our stdin
    signal.signal(signal.SIGCHLD, lambda *_: report_ended(statuses))
    while line := sys.stdin.readline():
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return json.loads(line)
        print(pid, flush=True)
    sys.exit()


def become(request: dict[str, Any]) -> None:
    """Everything that a new process has of its own."""
    files = [
        os.open(os.devnull, os.O_RDONLY),
        *(os.open(request[name], os.O_WRONLY | os.O_APPEND) for name in ("stdout", "stderr")),
    ]
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["directory"])
    sys.path.insert(0, str(Path(request["script"]).parent))
    sys.argv = [request["script"], *request["arguments"]]


def run(script: str) -> int:
    """Run the script; the status that Python would end with."""
    try:
        runpy.run_path(script, run_name="__main__")
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


if __name__ == "__main__":
    for name in sys.argv[2:]:
        importlib.import_module(name)
    gc.freeze()  # so that a child's collector touches, and so copies, no page of what is here already
    request = serve(Path(sys.argv[1]))
    become(request)
    leave(run(request["script"]))
