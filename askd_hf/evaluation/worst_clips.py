"""The clips with the most word errors, with the words of all models aligned to the reference."""

import itertools
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jiwer

from .manifest import Manifest
from .metrics import normalize_pairs, normalizer_for, text_language
from .results import SetResult
from .scoring import load_spelling_normalizer
from .suites import UNTRANSCRIBED
from .word_errors import count_errors, exclusion_reason

WORST_CLIPS = 20  # per set
CONTEXT_WORDS = 6  # correct words shown on either side of an error; longer runs are cut
MAX_INSERTION = 24  # words shown per insertion: a repetition loop inserts hundreds
MAX_COLUMNS = 240  # per clip: an hour of speech has 10,000 words


@dataclass
class Column:
    """A word of the reference, or a position between two words, with the aligned word of each model."""

    reference: str = ""  # the word; "" at an insertion
    # by role, the operation (`equal`, `substitute`, `delete`, `insert`, or "" for none) and the model's word; for a
    # deletion the reference word
    cells: dict[str, tuple[str, str]] = field(default_factory=dict)
    skipped: int = 0  # if not 0, the column stands for this many words that all models have right
    inserted: bool = False  # the skipped words are of an insertion instead


@dataclass
class Clip:
    """A clip with the predictions of all models aligned to its reference."""

    name: str
    speaker: str | None  # None if unknown
    duration: float  # in seconds
    words: int  # number of reference words
    edits: dict[str, tuple[int, int, int]]  # substitutions, deletions and insertions by role
    columns: list[Column]  # the alignment, at most `MAX_COLUMNS`
    hidden: int  # number of words after the last column


def worst_clips(entry: SetResult, manifests: Path, student: str) -> tuple[list[Clip], int] | None:
    """Return the clips of the set with the most word errors of the student, and the number of clips with errors.

    Returns None if the student has no manifest or no errors.
    """
    rows = {role: Manifest(manifests, role, entry.name).rows() for role in entry.scores}
    if not rows.get(student):
        return None
    language, name = text_language(entry.task, entry.language), entry.normalizer.partition(",")[0]
    _, normalize = normalizer_for(name, language, load_spelling_normalizer(manifests))
    raw, clips = ([row[name] for row in rows[student]] for name in ("reference", "clip"))
    normalized = {
        role: normalize_pairs(raw[: len(lines)], [row["prediction"] for row in lines[: len(raw)]], normalize)
        for role, lines in rows.items()
    }
    references, _ = normalized[student]  # equal for all roles
    output = jiwer.process_words(*normalized[student])
    errors, lengths = count_errors(output).total, [len(words) for words in output.references]
    wrong = [i for i, row in enumerate(rows[student]) if errors[i] and _is_scored(entry, row, references[i])]
    if not wrong:
        return None
    worst = sorted(wrong, key=lambda i: (-errors[i], lengths[i], clips[i]))[:WORST_CLIPS]
    # by line number, which is the same in all manifests of a set: clip names may be ambiguous
    texts = [{role: of_role[i] for role, (_, of_role) in normalized.items() if i < len(of_role)} for i in worst]
    return [_clip(rows[student][i], references[i], of_clip) for i, of_clip in zip(worst, texts, strict=True)], len(
        wrong
    )


def _is_scored(entry: SetResult, row: dict[str, Any], reference: str) -> bool:
    """Return whether `score_set` scores the clip: in a set without speech a reference may be empty."""
    reason = exclusion_reason(row["reference"], reference)
    return reason is None or (reason != UNTRANSCRIBED and not entry.has_speech)


def _clip(row: dict[str, Any], reference: str, predictions: dict[str, str]) -> Clip:
    outputs = {role: jiwer.process_words(reference, text) for role, text in predictions.items()}
    counts = {role: count_errors(output) for role, output in outputs.items()}
    words = reference.split()
    columns = shorten(align(words, outputs))
    return Clip(
        name=row["clip"],
        speaker=row.get("speaker"),
        duration=row["duration"],
        words=len(words),
        edits={
            role: (int(c.substitutions[0]), int(c.deletions[0]), int(c.insertions[0])) for role, c in counts.items()
        },
        columns=columns[:MAX_COLUMNS],
        hidden=sum(column.skipped or 1 for column in columns[MAX_COLUMNS:]),
    )


def align(reference: list[str], outputs: dict[str, jiwer.WordOutput]) -> list[Column]:
    """Merge the alignments of all models with the same reference into one row of columns."""
    columns = [Column(word) for word in reference]
    inserted: dict[int, dict[str, list[str]]] = defaultdict(dict)  # by position in the reference and role
    for role, output in outputs.items():
        for chunk in output.alignments[0]:
            words = output.hypotheses[0][chunk.hyp_start_idx : chunk.hyp_end_idx]
            if chunk.type == "insert":
                inserted[chunk.ref_start_idx][role] = words
                continue
            span = range(chunk.ref_start_idx, chunk.ref_end_idx)
            for i, word in zip(span, words or reference[span.start : span.stop], strict=True):
                columns[i].cells[role] = (chunk.type, word)
    merged = []
    for i in range(len(reference) + 1):
        for j in range(max(map(len, inserted[i].values()), default=0)):
            cells = {role: ("insert", words[j]) for role, words in inserted[i].items() if j < len(words)}
            merged.append(Column(cells={role: cells.get(role, ("", "")) for role in outputs}))
        merged += columns[i : i + 1]
    return merged


def shorten(columns: list[Column]) -> list[Column]:
    """Cut runs of correct words to `CONTEXT_WORDS` beside an error, and insertions to `MAX_INSERTION` words."""
    shown: list[Column] = []
    for kind, group in itertools.groupby(columns, key=_kind):
        run = list(group)
        if kind == "inserted" and len(run) > MAX_INSERTION:
            run = [*run[:MAX_INSERTION], Column(skipped=len(run) - MAX_INSERTION, inserted=True)]
        elif kind == "right":
            head = CONTEXT_WORDS if shown else 0
            tail = CONTEXT_WORDS if run[-1] is not columns[-1] else 0
            skipped = len(run) - head - tail
            if skipped > 3:  # a mark takes the space of three words
                run = [*run[:head], Column(skipped=skipped), *run[len(run) - tail :]]
        shown += run
    return shown


def _kind(column: Column) -> str:
    if not column.reference:
        return "inserted"
    return "right" if all(kind == "equal" for kind, _ in column.cells.values()) else "wrong"
