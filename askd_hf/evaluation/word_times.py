"""Agreement of two models on when words begin and end, from the word timestamps in their manifests."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..models.word_times import matching_words
from .results import WordTimes

LIMITS = {"within_100ms": 0.1, "within_200ms": 0.2}  # seconds
ROUNDING = 1e-6  # seconds; 0.3 - 0.2 exceeds 0.1


def compare_word_times(lines: Sequence[dict[str, Any]], baseline: Sequence[dict[str, Any]]) -> WordTimes | None:
    """Compare the starts and ends of the words that both transcripts of a clip have.

    Args:
        lines, baseline: lines of two manifests of the same clips, with word timestamps (`chunks`).

    Returns None if the transcripts have no word in common.
    """
    errors: list[float] = []
    for line, other in zip(lines, baseline, strict=True):
        chunks, others = line.get("chunks") or [], other.get("chunks") or []
        matches = matching_words([text for *_, text in chunks], [text for *_, text in others])
        errors += [abs(chunks[i][side] - others[j][side]) for i, j in matches for side in (0, 1)]
    if not errors:
        return None
    differences = np.array(errors)
    within = {name: 100 * float((differences <= limit + ROUNDING).mean()) for name, limit in LIMITS.items()}
    return WordTimes(len(errors) // 2, float(differences.mean()), **within)
