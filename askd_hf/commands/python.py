"""`askd-hf distill` as a function, for scripts and notebooks."""

from typing import Any

from ..arguments.parser import as_arguments, parse_args
from . import distill as command
from .terminal import readable_terminal


def distill(**options: Any) -> str:
    """Train and evaluate a student as `askd-hf distill` does, and return its directory.

    Args:
        options: those of `askd-hf distill --help`, such as `teacher="openai/whisper-small.en"` and
            `dataset="my_speech"`. A list stands for several values, None for the default.

    Raises:
        UserError: options, models and speech that are invalid or don't fit together.
        SystemExit: training was interrupted, after a checkpoint was saved. Continue with
            `resume_from_checkpoint="last"`.
    """
    given = {name: _as_text(value) for name, value in options.items() if value is not None}
    parsed = parse_args(command.OPTIONS, as_arguments(given))
    with readable_terminal():
        command.distill(*parsed)
    return parsed[-1].output_dir


def _as_text(value: Any) -> Any:
    """Return an option's value as `as_arguments` takes it."""
    if isinstance(value, list | tuple):
        return [str(item) for item in value]
    return value if isinstance(value, dict) else str(value)
