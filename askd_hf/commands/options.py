"""The options of each command, without what the command does: `--help` answers at once.

The modules of the commands import torch, transformers' models and `datasets`, which takes 10 s. The classes of the
options need only transformers' parser. Those of training need its `Seq2SeqTrainingArguments` as well. transformers
can describe them without torch, and then imports neither torch nor PEFT.
"""

import ast
import os
import sys
from pathlib import Path
from typing import Any

TRAINING = ("distill", "finetune", "cache-teacher")
HELP = ("-h", "--help", "--help_all", "--help-all")


def options_of(command: str) -> tuple[type, ...]:
    """Return the classes of the options of a command. Only their modules are imported."""
    if command in TRAINING:
        return _training_options(command)
    if command == "plan":
        from ..arguments.plan import PlanArguments

        return (PlanArguments,)
    if command == "evaluate":
        from ..evaluation.options import EvaluationArguments

        return (EvaluationArguments,)
    if command == "pseudo-label":
        from ..pseudo_labels.options import PseudoLabelArguments

        return (PseudoLabelArguments,)
    if command == "prepare":
        from ..arguments.prepare import PrepareArguments

        return (PrepareArguments,)
    if command == "push":
        from ..arguments.push import PushArguments

        return (PushArguments,)
    if command == "select-heads":
        from ..arguments.select_heads import SelectHeadsArguments

        return (SelectHeadsArguments,)
    if command == "export":
        from ..arguments.export import ExportArguments

        return (ExportArguments,)
    raise KeyError(command)


def _training_options(command: str) -> tuple[type, ...]:
    from ..arguments import CacheArguments, DataArguments, MixArguments, ModelArguments, RunArguments
    from ..arguments.augment import AugmentArguments
    from ..arguments.lora import LoraArguments
    from ..arguments.push import PushLabelsArguments
    from ..config import ASKDConfig, FinetuningConfig

    if command == "cache-teacher":
        return (ModelArguments, DataArguments, CacheArguments, PushLabelsArguments, ASKDConfig)
    config = FinetuningConfig if command == "finetune" else ASKDConfig
    speech = (DataArguments, MixArguments, AugmentArguments, CacheArguments)
    return (ModelArguments, *speech, LoraArguments, RunArguments, config)


def parse(
    command: str, argv: list[str] | None = None, prog: str | None = None, description: str | None = None
) -> tuple[Any, ...]:
    """Return the options of a command as `parse_args` does. `--help` prints them and ends the process.

    Args:
        command: as `askd-hf` names it.
        argv: the arguments. Default: those of the process.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if command in TRAINING and not set(arguments).isdisjoint(HELP):
        _hide_torch()
    from ..arguments.parser import parse_args

    return parse_args(options_of(command), argv, prog, description)


def _hide_torch() -> None:
    """Let transformers find no torch, in a process that prints the options and ends. No option depends on it.

    Does nothing if transformers has been imported, as it would then lack torch in what follows.
    """
    if "transformers" not in sys.modules:
        sys.modules["torch"] = None  # the import system's mark of a missing module
        os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # that torch is missing


def show_help(command: str, option: str) -> None:
    """Print the options of a command with the docstring of its module, which isn't imported, and end the process.

    Args:
        option: one of `HELP`.
    """
    source = Path(__file__).with_name(f"{command.replace('-', '_')}.py").read_text(encoding="utf-8")
    parse(command, [option], f"askd-hf {command}", ast.get_docstring(ast.parse(source), clean=False))
