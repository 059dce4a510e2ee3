"""What the terminal shows of a command, besides what the command prints itself."""

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

from .options import HELP

# logger -> part of a warning that users can't do anything about; examples/guides/troubleshooting.md lists them
HIDDEN = {
    "transformers.generation.utils": "together with generation-related",
    "transformers.models.whisper.tokenization_whisper": "did not predict an ending timestamp",
    "transformers.trainer_utils": "The tokenizer has new PAD/BOS/EOS tokens",
}
LOGGERS = ("askd_hf", "transformers", "datasets", "huggingface_hub")


@contextlib.contextmanager
def readable_terminal() -> Iterator[None]:
    """Hide the bars for loading and writing weights, and print log messages above the bars, not into them.

    The warnings of transformers in `HIDDEN` aren't shown. Bars of downloads are shown. Everything is as before when
    the command ends.
    """
    if not set(sys.argv).isdisjoint(HELP):  # transformers is imported without torch then, see `options.parse`
        yield
        return
    from tqdm.contrib.logging import logging_redirect_tqdm
    from transformers.utils import logging as transformers_logging

    hook = transformers_logging.set_tqdm_hook(_hidden)
    for name in HIDDEN:
        logging.getLogger(name).addFilter(_is_for_users)
    try:
        with logging_redirect_tqdm([logging.getLogger(name) for name in LOGGERS]):
            yield
    finally:
        transformers_logging.set_tqdm_hook(hook)
        for name in HIDDEN:
            logging.getLogger(name).removeFilter(_is_for_users)


def _is_for_users(record: logging.LogRecord) -> bool:
    return HIDDEN[record.name] not in record.getMessage()


def _hidden(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return a bar of transformers that isn't shown."""
    return factory(*args, **(kwargs | {"disable": True}))
