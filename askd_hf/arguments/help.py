"""The text of `--help`: every option of this package, and those of the Trainer that most runs set.

`--help_all` also describes the other options of `Seq2SeqTrainingArguments`.
"""

import argparse
import inspect
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import fields

HELP_ALL = ("--help_all", "--help-all")
# described by --help, besides the options of the Trainer for which this package has another default or text
COMMON = {
    "eval_steps",
    "fp16",
    "gradient_accumulation_steps",
    "hub_model_id",
    "hub_private_repo",
    "lr_scheduler_type",
    "max_grad_norm",
    "max_steps",
    "num_train_epochs",
    "push_to_hub",
    "resume_from_checkpoint",
    "run_name",
    "save_steps",
    "seed",
    "torch_compile",
    "use_cpu",
    "weight_decay",
}
LONGEST_CHOICES = 60  # characters


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Show each option in one spelling, and the defaults that the texts don't name."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=8)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if action.nargs == 0:
            return ", ".join(name for name in action.option_strings if name != HELP_ALL[1])
        value = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
        if action.choices:
            choices = "{" + ",".join(map(str, action.choices)) + "}"
            value = choices if len(choices) <= LONGEST_CHOICES else value
        values = {"?": f"[{value}]", "+": f"{value} ...", "*": f"[{value} ...]"}
        return f"{action.option_strings[0]} {values.get(str(action.nargs), value)}"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        named = action.default in (None, [], argparse.SUPPRESS) or "Default:" in (action.help or "")
        return action.help if named else f"{action.help} (default: %(default)s)"


def shorten_help(parser: argparse.ArgumentParser, types: Iterable[type], argv: Sequence[str]) -> None:
    """Hide the `--no_x` spellings and, without `--help_all`, the less common options of the Trainer.

    Args:
        parser: has the options of `types`.
        argv: the command line. All options are described if it has one of `HELP_ALL`.
    """
    hidden = trainer_options(types)
    text = "Show this, with all options of the Trainer, and exit." if hidden else argparse.SUPPRESS
    parser.add_argument(*HELP_ALL, action="help", help=text)
    if not set(argv).isdisjoint(HELP_ALL):
        hidden = set()
    if hidden:
        names = textwrap.fill(", ".join(sorted(hidden)), width=98, initial_indent="  ", subsequent_indent="  ")
        parser.epilog = f"other options of Seq2SeqTrainingArguments, described by {HELP_ALL[0]}:\n{names}"
    for action in parser._actions:
        no = any(name.startswith("--no_") for name in action.option_strings)
        if action.dest in hidden or (no and action.nargs == 0):  # --no_x is --x False
            action.help = argparse.SUPPRESS


def trainer_options(types: Iterable[type]) -> set[str]:
    """Return the options of the classes that only `--help_all` describes."""
    for one in types:
        # by name: its module imports torch, and only the commands that train need it
        for base in (base for base in one.__mro__ if base.__name__ == "Seq2SeqTrainingArguments"):
            own = [later for later in one.__mro__ if not issubclass(base, later)]
            ours = {name for later in own for name in inspect.get_annotations(later)}
            return {field.name for field in fields(base) if field.init} - ours - COMMON
    return set()
