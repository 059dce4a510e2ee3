"""The options of a script from its command line and a YAML file."""

import argparse
import difflib
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from .errors import UserError


def parse_args(types: tuple[type, ...], argv: list[str] | None = None) -> tuple[Any, ...]:
    """Instances of the dataclasses `types` from the command line and the YAML file named by `--config`.

    The command line wins over the file, the file over the defaults. Raises `UserError` for a key that none has.
    """
    argv = sys.argv[1:] if argv is None else argv
    config_only = argparse.ArgumentParser(add_help=False)
    config_only.add_argument("--config", type=Path)
    config_file, rest = config_only.parse_known_args(argv)
    parser = HfArgumentParser(types, allow_abbrev=False)
    parser.add_argument("--config", type=Path, metavar="FILE.yaml", help="Options as YAML; the command line wins.")
    from_file = _read_yaml(config_file.config, types) if config_file.config else []
    try:
        # the file's options stand before the command line's, so one parser checks both and the later ones win
        return parser.parse_args_into_dataclasses([*from_file, *rest], look_for_args_file=False)[: len(types)]
    except UserError:
        raise
    except ValueError as error:  # unknown options, and Seq2SeqTrainingArguments' own checks
        raise UserError(str(error)) from error


def _read_yaml(path: Path, types: tuple[type, ...]) -> list[str]:
    """The file's options as they would be written on the command line."""
    try:
        # all values as they are written: `no` is a language, and 1e-4 not a string
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader) or {}
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"--config {path}: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: expected `option: value` lines")
    known = {f.name for dataclass_type in types for f in fields(dataclass_type) if f.init}
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            raise UserError(f"--config {path}: no option {key!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
    arguments = []
    for name, value in values.items():
        if value in ("", "null", "~"):  # YAML's ways to say nothing: the default
            continue
        if isinstance(value, dict):
            value = json.dumps(value)
        arguments += [f"--{name}", *(value if isinstance(value, list) else [value])]
    return arguments
