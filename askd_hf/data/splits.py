"""Names of splits: what one is called by others, and the directories that are splits."""

import re
from collections.abc import Collection, Mapping
from pathlib import PureWindowsPath
from typing import TypeVar

from ..errors import UserError

# those by which `datasets` knows a split, in a directory's name between separators: train, my-train, train.100
KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
KINDS = {keyword: kind for kind, keywords in KEYWORDS.items() for keyword in keywords}
_IN_A_NAME = re.compile(rf"(?:^|[-._ 0-9])({'|'.join(KINDS)})(?=$|[-._ 0-9])", re.IGNORECASE)
T = TypeVar("T")


def kind_of(name: str) -> str | None:
    """train, validation or test, if the name of a split or of a directory says so."""
    found = _IN_A_NAME.search(name)
    return KINDS[found[1].lower()] if found else None


def split_directory(file_name: str, others: Collection[str] = ()) -> str | None:
    """The first directory in a file's name that is called as a split, or as one of `others`."""
    for part in PureWindowsPath(file_name).parent.parts:  # understands both separators
        if part in others or kind_of(part):
            return part
    return None


def pick(name: str, split: str, splits: Mapping[str, T]) -> T:
    """What a dataset has for a split, perhaps under another name: `validation` may be called `dev`.

    Where `train` is asked for the only split of training is taken, such as `train-clean-100`.

    Raises `UserError` if there is no such split, or if several may be meant.
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
