"""Processes that know no other Hub than one on the loopback."""

import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from fake_hub import FakeHub
from processes import Ended, start


def hub_environment(hub: FakeHub, home: Path, token: str | None) -> dict[str, str]:
    """The environment of a process that knows no other Hub, with a cache of its own."""
    environment = {key: value for key, value in os.environ.items() if key != "HF_TOKEN"}
    environment |= {"HF_HOME": str(home), "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    return environment | ({} if token is None else {"HF_TOKEN": token})


@dataclass
class HubVisit:
    """A folder, a Hub on the loopback, and the processes that were run with them."""

    folder: Path
    hub: FakeHub
    ended: dict[str, Ended] = field(default_factory=dict)

    def run(self, **commands: tuple[str, str | None]) -> None:
        """Run commands side by side, `name=(script and arguments, token)`: each with an empty cache of its own.

        In processes of their own, because the libraries read the endpoint once.
        """
        started = {}
        for name, (command, token) in commands.items():
            environment = hub_environment(self.hub, self.folder / "homes" / name, token)
            script, *arguments = shlex.split(command)
            without_us = not Path(script).is_absolute()  # the scripts of tests stand for those of anyone
            options = dict(directory=self.folder, environment=environment, without_us=without_us)
            started[name] = start(Path(script), *arguments, **options)
        self.ended |= {name: process.ended() for name, process in started.items()}

    def error(self, name: str) -> str:
        """The message with which it ended."""
        assert self.ended[name].returncode == 2, self.ended[name].stderr
        assert "Traceback" not in self.ended[name].stderr
        message = self.ended[name].stderr.strip().splitlines()[-1]
        assert message.startswith("error: ")
        return message
