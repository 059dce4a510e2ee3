"""What the terminal shows of a command, besides what the command prints itself."""

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

from .options import HELP

# Whisper's own `generate` passes both to the general one: nobody else can mend it
ADVICE_FOR_TRANSFORMERS = "Passing `generation_config` together with"
LOGGERS = ("askd_hf", "transformers", "datasets", "huggingface_hub")


@contextlib.contextmanager
def readable_terminal() -> Iterator[None]:
    """Hide the bars for loading and writing weights, and print log messages above the bars, not into them.

    A warning of transformers about its own code is hidden. Bars of downloads are shown. Everything is as before when
    the command ends.
    """
    if not set(sys.argv).isdisjoint(HELP):  # transformers is imported without torch then, see `options.parse`
        yield
        return
    from tqdm.contrib.logging import logging_redirect_tqdm
    from transformers.utils import logging as transformers_logging

    hook = transformers_logging.set_tqdm_hook(_hidden)
    generation = logging.getLogger("transformers.generation.utils")
    generation.addFilter(_is_for_users)
    try:
        with logging_redirect_tqdm([logging.getLogger(name) for name in LOGGERS]):
            yield
    finally:
        transformers_logging.set_tqdm_hook(hook)
        generation.removeFilter(_is_for_users)


def _is_for_users(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(ADVICE_FOR_TRANSFORMERS)


def _hidden(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return a bar of transformers that isn't shown."""
    return factory(*args, **(kwargs | {"disable": True}))
