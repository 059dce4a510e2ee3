"""Clips of a stream that are joined to fill the window."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UserError
from .audio import stated_seconds
from .checks import Limits
from .concatenation import fits, joined_row


@dataclass(frozen=True)
class Packing:
    """Join clips of a stream with those that follow, as many as fit into the window.

    The clips have the same language and task, and have speech. Unlike those of `with_concatenated`, they aren't also
    trained on one by one, so that fewer windows are encoded. Clips that the user's filters drop stay alone. The audio
    is decoded by the collator. If one clip can't be decoded, the whole joined row is dropped.
    """

    probability: float  # that a row is joined with the next ones
    limits: Limits  # joined clips leave 0.5 s of the window free
    label_length: Callable[[Mapping[str, Any]], int]  # label tokens of a row

    def pack(self, rows: Iterable[dict[str, Any]], rng_key: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Yield the rows in their order, some of them joined.

        Args:
            rng_key: integers that seed the choice.
        """
        generator = np.random.default_rng([*rng_key, 0])
        waiting: list[dict[str, Any]] = []  # begin a joined clip
        for row in rows:
            if waiting:
                known = self._with_lengths(row)
                if known is not None and _alike(waiting[0], known) and self._fits([*waiting, known]):
                    waiting.append(known)
                    continue
                yield _join(waiting)
                waiting = []
            if generator.random() < self.probability and (known := self._with_lengths(row)) is not None:
                waiting = [known]
            else:
                yield row
        if waiting:
            yield _join(waiting)

    def _fits(self, rows: list[dict[str, Any]]) -> bool:
        tokens = int(min(self.limits.max_target_positions, self.limits.max_label_length))
        return fits(rows, self.limits.chunk_length, tokens)

    def _with_lengths(self, row: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return a row with `duration` and `label_tokens`; None for one that stays alone."""
        if row["no_speech"] or not (row["text"] or "").strip():
            return None
        duration = stated_seconds(row["audio"])
        if duration is None:
            return None
        try:
            tokens = self.label_length(row)
        except UserError:  # the collator reports it
            return None
        if self.limits.filter_reason(duration, tokens) is not None:
            return None
        return {**row, "duration": duration, "label_tokens": tokens}


def _alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(one[name] == other[name] for name in ("language", "task"))


def _join(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return rows[0] if len(rows) == 1 else joined_row(rows, [row["audio"] for row in rows])
