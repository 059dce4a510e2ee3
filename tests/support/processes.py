"""Scripts in processes of their own, without the ten seconds in which each would import torch and transformers.

`start` and `run_there` have the process forked by `fork_server.py`, which has imported the libraries: it is clean of
what tests have patched, has a process id, and can be killed. `environment` is that of the process; but what a library
reads from it when it is imported is read already, except for all about the Hub, which is read again.
"""

import atexit
import contextlib
import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from fork_client import ADDRESS, Forked

SERVER = Path(__file__).with_name("fork_server.py")
# what others use a model with, and all that pytest's own processes need besides
LIBRARIES = ["torch._dynamo", "torch.distributed.tensor", "hub_settings", "transformers.pipelines"]
LIBRARIES += ["transformers.models.whisper.modeling_whisper", "transformers.models.whisper.processing_whisper"]
LIBRARIES += ["transformers.models.auto.modeling_auto", "transformers.models.auto.processing_auto"]
OURS = ["preloaded", "pytest"]
TIMEOUT = 300


class Ended(NamedTuple):
    """How a script ended, and what it printed."""

    returncode: int
    stdout: str
    stderr: str


@functools.cache
def folder() -> Path:
    """For the files of this process; it is removed at the end."""
    made = Path(tempfile.mkdtemp(prefix="askd-processes-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def start_server() -> str:
    """Start a server that ends when this process does. Returns its address, at once.

    At that address with "-plain" behind it is another, which has imported nothing of ours.
    """
    address = str(folder() / "server")
    # scripts may import what is here
    paths = [str(SERVER.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # a library that asks for a card keeps no fork from using it
    with contextlib.ExitStack() as opened:
        command, files = [sys.executable, str(SERVER)], []
        for name, modules in ((f"{address}-plain", LIBRARIES), (address, OURS)):
            listener = opened.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(name)
            listener.listen()
            files.append(listener.fileno())
            command += [str(listener.fileno()), ",".join(modules)]
        log = opened.enter_context((folder() / "log").open("w"))
        options = dict(env=environment, pass_fds=files, stdin=subprocess.PIPE, stdout=log, stderr=log)
        process = subprocess.Popen(command, **options)

    def close() -> None:
        process.stdin.close()
        process.wait()

    atexit.register(close)
    return address


@functools.cache
def server() -> str:
    """The address of the server that all processes of pytest share."""
    return os.environ.get(ADDRESS) or start_server()


class Process:
    """A script that runs; the names are those of `subprocess.Popen`."""

    def __init__(self, script: Path, arguments, directory: Path | None, environment: dict[str, str], without_us: bool):
        output = Path(tempfile.mkdtemp(dir=folder()))
        self.stdout, self.stderr = output / "stdout", output / "stderr"
        request = dict(script=str(script), arguments=[str(argument) for argument in arguments])
        request |= dict(directory=str(directory or os.getcwd()), environment=environment)
        with open(os.devnull) as nothing, self.stdout.open("a") as stdout, self.stderr.open("a") as stderr:
            address = f"{server()}-plain" if without_us else server()
            self.forked = Forked(address, request, [file.fileno() for file in (nothing, stdout, stderr)])
        self.pid = self.forked.pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self.forked.status()
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
            with contextlib.suppress(ProcessLookupError):  # it has ended, and its status isn't there yet
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
    without_us: bool = False,
) -> Process:
    """Start a script; `without_us`: where nothing of this repository is imported."""
    environment = dict(os.environ) if environment is None else environment
    return Process(script, arguments, directory, environment, without_us)


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
    """A script in two processes on the CPU, see `launch`."""
    return launch(2, script, *arguments, until=until)


def launch(
    number: int,
    script: Path,
    *arguments,
    until: Callable[[], object] = lambda: False,
    nodes: Sequence[Path] = (),
) -> Ended:
    """A script in processes on the CPU that know of each other, as `accelerate launch` would start them.

    All are killed as soon as `until` holds, or one of them fails. The status is that of the one which failed.

    Args:
        nodes: the disk of each node, in which its processes run, with a Hugging Face cache of its own. Relative paths
            in `arguments` are on it. Default: all processes run here.
    """
    of_node = number // max(len(nodes), 1)
    places = [node for node in nodes for _ in range(of_node)] or [None] * number
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = dict(os.environ) | dict(WORLD_SIZE=str(number), LOCAL_WORLD_SIZE=str(of_node), MASTER_ADDR="127.0.0.1")
    shared |= dict(MASTER_PORT=str(port), ACCELERATE_MIXED_PRECISION="no", ACCELERATE_DYNAMO_BACKEND="no")
    started = []
    for rank, place in enumerate(places):
        own = dict(RANK=str(rank), LOCAL_RANK=str(rank % of_node)) | ({} if place is None else {"HF_HOME": str(place)})
        started.append(start(script, *arguments, directory=place, environment=shared | own))
    failed = 0
    while any(process.poll() is None for process in started):
        failed = failed or next((process.poll() for process in started if process.poll()), 0)
        if failed or until():  # the others would wait for the one that failed
            for process in started:
                process.kill()
        time.sleep(0.01)
    ended = [process.ended() for process in started]
    failed = failed or next((status for status, *_ in ended if status), 0)
    return Ended(failed, *("".join(parts) for parts in list(zip(*ended, strict=True))[1:]))
