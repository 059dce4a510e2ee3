"""Match the names of splits and directories: synonyms such as `dev` for `validation`."""

import re
from collections.abc import Collection, Mapping
from pathlib import PureWindowsPath
from typing import TypeVar

from ..errors import UserError

# keywords of `datasets`, between separators in the name of a split or directory: train, my-train, train.100
KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
KINDS = {keyword: kind for kind, keywords in KEYWORDS.items() for keyword in keywords}
_IN_A_NAME = re.compile(rf"(?:^|[-._ 0-9])({'|'.join(KINDS)})(?=$|[-._ 0-9])", re.IGNORECASE)
T = TypeVar("T")


def kind_of(name: str) -> str | None:
    """Return train, validation or test if the name of a split or directory contains a keyword, else None."""
    found = _IN_A_NAME.search(name)
    return KINDS[found[1].lower()] if found else None


def split_directory(file_name: str, others: Collection[str] = ()) -> str | None:
    """Return the first directory in a path with the name of a split or one of `others`, or None."""
    for part in PureWindowsPath(file_name).parent.parts:  # parses both separators
        if part in others or kind_of(part):
            return part
    return None


def pick(name: str, split: str, splits: Mapping[str, T]) -> T:
    """Return the value for a split, under its name or the only synonym, such as `dev` for `validation`.

    `train` also matches the only split with a training keyword in its name, such as `train-clean-100`.

    Raises `UserError` if no split or several splits match.
    """
    if split in splits:
        return splits[split]
    kind = KINDS.get(split.lower())
    same = [other for other in splits if kind is not None and KINDS.get(other.lower()) == kind]
    if kind == "train" and not same:
        same = [other for other in splits if kind_of(other) == kind]
    if len(same) == 1:
        return splits[same[0]]
    raise UserError(f"{name} has no split {split!r}; it has {', '.join(splits)}")
