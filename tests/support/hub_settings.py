"""Has the libraries read from the environment again what they know of the Hub: its address, their caches, offline."""

import importlib
import sys
from pathlib import Path
from typing import Any

import datasets.config
import evaluate.config
import huggingface_hub
from accelerate.commands.config import config_args
from huggingface_hub import constants, hf_api, hf_file_system

MODULES = (constants, datasets.config, evaluate.config, config_args)  # in the order in which they read one another
LIBRARIES = ("huggingface_hub", "datasets", "evaluate", "transformers", "peft", "accelerate", "askd_hf")


def settings() -> list[tuple[str, Any]]:
    values = [
        pair for module in MODULES for pair in vars(module).items() if isinstance(pair[1], str | bool | int | Path)
    ]
    # transformers has its own as text
    return [*values, *((name, str(value)) for name, value in values if isinstance(value, Path))]


def read_again() -> None:
    """As if the libraries were imported now; test_processes.py compares."""
    before = settings()
    for module in MODULES:
        importlib.reload(module)
    changed = [(name, old, new) for (name, old), (_, new) in zip(before, settings(), strict=True) if old != new]
    for module in [module for name, module in sys.modules.items() if name.partition(".")[0] in LIBRARIES]:
        for name, old, new in changed:
            if vars(module).get(name) == old:  # a copy
                setattr(module, name, new)
    hf_api.api.endpoint = constants.ENDPOINT
    hf_file_system.HfFileSystem.clear_instance_cache()
    hf_file_system.hffs = huggingface_hub.HfFileSystem()
    huggingface_hub.close_session()
