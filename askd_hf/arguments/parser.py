"""Parse the options of a script from its command line and a YAML file."""

import argparse
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from ..errors import UserError
from .help import HelpFormatter, shorten_help
from .renamed import current_name, rename_arguments, unknown_options

NULL = ("", "null", "~")  # YAML's null, as text


class _Parser(HfArgumentParser):
    """Raise errors without the usage of two hundred options."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parse_args(
    types: tuple[type, ...], argv: list[str] | None = None, prog: str | None = None, description: str | None = None
) -> tuple[Any, ...]:
    """Return instances of the dataclasses `types`, from the command line and the YAML file given by `--config`.

    The command line overrides the file, and the file the defaults. Unlike `HfArgumentParser.parse_yaml_file`, the
    command line can override the file.

    Raises:
        UserError: options that none of `types` has, all of them in one message, or invalid values.
    """
    argv = sys.argv[1:] if argv is None else argv
    usage = f"{prog or Path(sys.argv[0]).name} [OPTIONS]"  # else all options are listed twice
    texts = dict(prog=prog, usage=usage, description=description)
    parser = _Parser(types, allow_abbrev=False, formatter_class=HelpFormatter, **texts)
    parser.add_argument(
        "--config", type=Path, metavar="FILE.yaml", help="YAML file with options; the command line overrides them."
    )
    shorten_help(parser, types, argv)
    config_only = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config_only.error = parser.error  # type: ignore[method-assign]  # both parsers complain in one way
    config_only.add_argument("--config", type=Path)
    config_file, rest = config_only.parse_known_args(argv)
    known = [f.name for dataclass_type in types for f in fields(dataclass_type) if f.init]
    rest = rename_arguments(rest, known)
    _check_names(rest, [*known, "config"])
    from_file = _read_yaml(config_file.config.expanduser(), known) if config_file.config else []
    from_file, rest = ([_expand_home(word) for word in words] for words in (from_file, rest))
    try:
        # one parser checks both, and later options override earlier ones
        *parsed, stray = parser.parse_args_into_dataclasses(
            [*from_file, *rest], look_for_args_file=False, return_remaining_strings=True
        )
    except UserError:
        raise
    except ValueError as error:  # Seq2SeqTrainingArguments' own checks
        raise UserError(" ".join(str(error).split())) from error
    if stray:
        hint = "; give a file of options by --config" if Path(stray[0]).suffix in (".json", ".yaml", ".yml") else ""
        raise UserError(f"value without an option: {' '.join(stray)}{hint}")
    return tuple(parsed[: len(types)])


def _expand_home(word: str) -> str:
    """Expand `~/` at the start of a value, which a shell doesn't do in a file or after `--option=`."""
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return option + equals + (os.path.expanduser(value) if value.startswith("~/") else value)


def _check_names(argv: list[str], known: list[str]) -> None:
    """Raise `UserError` for unknown options in `argv`. The option `a_b` may be written `--a-b`, `--no_a_b`."""
    names = [word.removeprefix("--").partition("=")[0] for word in argv if word.startswith("--") and word != "--"]
    exists = {*known, *(f"no_{name}" for name in known), "help", "help_all"}
    if unknown := [name for name in names if name.replace("-", "_") not in exists]:
        raise UserError(unknown_options(unknown, known))


def _read_yaml(path: Path, known: list[str]) -> list[str]:
    """Return the options of the file as command-line arguments."""
    try:
        # all values as text, for the parser: YAML would read `no` as False, and 1e-4 as a string
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {path}: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: expected `option: value` lines")
    if unknown := [str(key) for key in values if current_name(str(key), known) not in known]:
        raise UserError(f"--config {path}: {unknown_options(unknown, known)}")
    for name, value in values.items():
        if isinstance(value, list) and not all(isinstance(item, str) for item in value):
            raise UserError(f"--config {path}: {name} must be a list of plain values")
    return rename_arguments(as_arguments(values), known)


def as_arguments(options: Mapping[str, Any]) -> list[str]:
    """Return the options of a YAML file as a command line. YAML's null leaves an option at its default.

    Args:
        options: text, lists of text or mappings, as `yaml.BaseLoader` reads them.
    """
    arguments = []
    for name, value in options.items():
        if value in NULL:
            continue
        if isinstance(value, dict):
            value = json.dumps(value)
        # `=` also allows values that start with a minus sign, such as -1e-3
        arguments += [f"--{name}", *value] if isinstance(value, list) else [f"--{name}={value}"]
    return arguments
