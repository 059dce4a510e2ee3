"""Scripts in processes of their own, without the ten seconds in which each would import torch and transformers.

`start` and `run_there` have the process forked by `fork_server.py`, which has imported the libraries: it is clean of
what tests have patched, has a process id, and can be killed. `environment` is that of the process; but what a library
reads from it when it is imported is read already, unless the server is the one that has imported no library of the
Hub: `before_hub=True`.
"""

import atexit
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

SERVER = Path(__file__).with_name("fork_server.py")
# torch and what takes long besides; none of them imports huggingface_hub
BEFORE_HUB = ["torch._dynamo", "torch.distributed.tensor", "librosa", "matplotlib.figure", "pandas", "pyarrow"]
BEFORE_HUB += ["scipy.stats", "sklearn.metrics", "numba"]
ALL = [*BEFORE_HUB, "preloaded", "pytest"]
TIMEOUT = 300


class Ended(NamedTuple):
    """How a script ended, and what it printed."""

    returncode: int
    stdout: str
    stderr: str


class Server:
    def __init__(self, modules: list[str]):
        self.folder = Path(tempfile.mkdtemp(prefix="askd-processes-"))
        self.count = 0
        log = (self.folder / "log").open("w")
        command = [sys.executable, str(SERVER), str(self.folder), *modules]
        # scripts may import what is here
        paths = [str(SERVER.parent), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        self.process = subprocess.Popen(command, env=environment, **pipes)
        log.close()
        atexit.register(self.close)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def fork(self, request: dict) -> int:
        print(json.dumps(request), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        assert answer, (self.folder / "log").read_text()[-3000:]
        return int(answer)


@functools.cache
def server(before_hub: bool) -> Server:
    return Server(BEFORE_HUB if before_hub else ALL)


class Process:
    """A script that runs; the names are those of `subprocess.Popen`."""

    def __init__(self, server: Server, script: Path, arguments, directory, environment: dict[str, str]):
        self.server = server
        server.count += 1
        self.stdout, self.stderr = (server.folder / f"{server.count}.{name}" for name in ("stdout", "stderr"))
        request = dict(script=str(script), arguments=[str(argument) for argument in arguments])
        request |= dict(directory=str(directory or os.getcwd()), environment=environment)
        for file in (self.stdout, self.stderr):
            file.touch()
        request |= dict(stdout=str(self.stdout), stderr=str(self.stderr))
        self.pid = server.fork(request)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        status = self.server.folder / str(self.pid)
        if self.returncode is None and status.exists():
            self.returncode = int(status.read_text())
            status.unlink()  # its number may be another's one day
        return self.returncode

    def wait(self, timeout: float = TIMEOUT) -> int:
        self.wait_until(lambda: self.poll() is not None, timeout)
        return self.returncode

    def wait_until(self, condition: Callable[[], object], timeout: float = TIMEOUT) -> None:
        """Wait for what the process does; an error if it ends before, or takes longer."""
        deadline = time.monotonic() + timeout
        while not condition():
            ended = self.poll() is not None
            if condition():
                return
            if ended or time.monotonic() > deadline:
                self.kill()
                what = f"ended with {self.returncode}" if ended else f"was still waited for after {timeout} s"
                raise AssertionError(f"{what}:\n{self.printed()[-6000:]}")
            time.sleep(0.002)

    def printed(self) -> str:
        return "".join(file.read_text() for file in (self.stdout, self.stderr))

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def ended(self, timeout: float = TIMEOUT) -> Ended:
        """Wait for its end."""
        return Ended(self.wait(timeout), self.stdout.read_text(), self.stderr.read_text())


def start(
    script: Path,
    *arguments,
    directory: Path | None = None,
    environment: dict[str, str] | None = None,
    before_hub: bool = False,
) -> Process:
    environment = dict(os.environ) if environment is None else environment
    return Process(server(before_hub), script, arguments, directory, environment)


def run_there(script: Path, *arguments, **options) -> Ended:
    """Run a script to its end."""
    return start(script, *arguments, **options).ended()


def killed_when(
    condition: Callable[[], object], script: Path, *arguments, by: int = signal.SIGKILL, **options
) -> Ended:
    """Start a script, and end it by a signal as soon as `condition` holds."""
    process = start(script, *arguments, **options)
    process.wait_until(condition)
    process.send_signal(by)
    return process.ended()


def launch_two(script: Path, *arguments, until: Callable[[], object] = lambda: False) -> Ended:
    """A script in two processes on the CPU that know of each other, as `accelerate launch` would start them.

    Both are killed as soon as `until` holds, or one of them fails.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = dict(os.environ) | dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    shared |= dict(MASTER_PORT=str(port), ACCELERATE_MIXED_PRECISION="no", ACCELERATE_DYNAMO_BACKEND="no")
    started = [
        start(script, *arguments, environment=shared | dict(RANK=str(rank), LOCAL_RANK=str(rank))) for rank in (0, 1)
    ]
    while any(process.poll() is None for process in started):
        if until() or any(process.poll() for process in started):  # the other would wait for it
            for process in started:
                process.kill()
        time.sleep(0.01)
    ended = [process.ended() for process in started]
    statuses = [status for status, *_ in ended if status]
    return Ended(statuses[0] if statuses else 0, *("".join(parts) for parts in list(zip(*ended, strict=True))[1:]))
