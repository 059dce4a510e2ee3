"""The clips that a model got worst, with all models' words aligned to the reference's."""

import itertools
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jiwer

from .manifest import Manifest
from .metrics import normalize_pairs, normalizer_for, text_language
from .results import SetResult
from .scoring import count_errors, drop_reason, load_spelling
from .suites import UNTRANSCRIBED

WORST_CLIPS = 20  # of a set
NEIGHBOURS = 6  # right words shown on either side of an error; longer runs are cut
LONGEST_INSERTION = 24  # words of one insertion shown: a decoder in a loop writes hundreds
MOST_COLUMNS = 240  # of one clip: an hour of speech has 10,000 words


@dataclass
class Column:
    """One word of the reference, or a place between two, with what each model has there.

    Attributes:
        reference: "" where a model inserted a word.
        cells: by role, what it did (`equal`, `substitute`, `delete`, `insert`, or "" for nothing here) and the word:
            its own, for a deletion that of the reference.
        skipped: instead of all this, so many words that all models have right, or with `inserted` so many more of an
            insertion.
    """

    reference: str = ""
    cells: dict[str, tuple[str, str]] = field(default_factory=dict)
    skipped: int = 0
    inserted: bool = False


@dataclass
class Clip:
    """A clip with all models' predictions aligned to its reference.

    Attributes:
        words: of the reference.
        edits: by role: substitutions, deletions, insertions.
        hidden: how many words follow the last column that is shown.
    """

    name: str
    speaker: str | None
    duration: float
    words: int
    edits: dict[str, tuple[int, int, int]]
    columns: list[Column]
    hidden: int


def worst_clips(entry: SetResult, manifests: Path, student: str) -> tuple[list[Clip], int] | None:
    """The clips of the set with the most word errors of the student, and how many have any.

    None where the student has no manifest or no errors.
    """
    rows = {role: Manifest(manifests, role, entry.name).rows() for role in entry.scores}
    if not rows.get(student):
        return None
    language, name = text_language(entry.task, entry.language), entry.normalizer.partition(",")[0]
    _, normalize = normalizer_for(name, language, load_spelling(manifests))
    raw, clips = ([row[name] for row in rows[student]] for name in ("reference", "clip"))
    normalized = {
        role: normalize_pairs(raw[: len(lines)], [row["prediction"] for row in lines[: len(raw)]], normalize)
        for role, lines in rows.items()
    }
    references, _ = normalized[student]  # the same with every role
    output = jiwer.process_words(*normalized[student])
    errors, lengths = count_errors(output).total, [len(words) for words in output.references]
    wrong = [i for i, row in enumerate(rows[student]) if errors[i] and _is_scored(entry, row, references[i])]
    if not wrong:
        return None
    worst = sorted(wrong, key=lambda i: (-errors[i], lengths[i], clips[i]))[:WORST_CLIPS]
    # by their place, which is the same in all manifests of a set: several clips may have one name
    texts = [{role: heard[i] for role, (_, heard) in normalized.items() if i < len(heard)} for i in worst]
    return [_clip(rows[student][i], references[i], of_clip) for i, of_clip in zip(worst, texts, strict=True)], len(
        wrong
    )


def _is_scored(entry: SetResult, row: dict[str, Any], reference: str) -> bool:
    """As `score_set` has it: in a set without speech a reference may be empty."""
    reason = drop_reason(row["reference"], reference)
    return reason is None or (reason != UNTRANSCRIBED and not entry.speech)


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
        columns=columns[:MOST_COLUMNS],
        hidden=sum(column.skipped or 1 for column in columns[MOST_COLUMNS:]),
    )


def align(reference: list[str], outputs: dict[str, jiwer.WordOutput]) -> list[Column]:
    """All models' alignments with the same reference as one row of columns.

    Args:
        reference: words.
        outputs: by role, of jiwer for this one clip.
    """
    columns = [Column(word) for word in reference]
    inserted: dict[int, dict[str, list[str]]] = defaultdict(dict)  # before which word of the reference, by whom
    for role, output in outputs.items():
        for chunk in output.alignments[0]:
            words = output.hypotheses[0][chunk.hyp_start_idx : chunk.hyp_end_idx]
            if chunk.type == "insert":
                inserted[chunk.ref_start_idx][role] = words
                continue
            span = range(chunk.ref_start_idx, chunk.ref_end_idx)
            for i, word in zip(span, words or reference[span.start : span.stop], strict=True):
                columns[i].cells[role] = (chunk.type, word)
    together = []
    for i in range(len(reference) + 1):
        for j in range(max(map(len, inserted[i].values()), default=0)):
            cells = {role: ("insert", words[j]) for role, words in inserted[i].items() if j < len(words)}
            together.append(Column(cells={role: cells.get(role, ("", "")) for role in outputs}))
        together += columns[i : i + 1]
    return together


def shorten(columns: list[Column]) -> list[Column]:
    """Cut runs of words that all models have right to `NEIGHBOURS` beside an error, and insertions' ends."""
    shown: list[Column] = []
    for kind, group in itertools.groupby(columns, key=_kind):
        run = list(group)
        if kind == "inserted" and len(run) > LONGEST_INSERTION:
            run = [*run[:LONGEST_INSERTION], Column(skipped=len(run) - LONGEST_INSERTION, inserted=True)]
        elif kind == "right":
            head = NEIGHBOURS if shown else 0
            tail = NEIGHBOURS if run[-1] is not columns[-1] else 0
            skipped = len(run) - head - tail
            if skipped > 3:  # fewer aren't worth a mark
                run = [*run[:head], Column(skipped=skipped), *run[len(run) - tail :]]
        shown += run
    return shown


def _kind(column: Column) -> str:
    if not column.reference:
        return "inserted"
    return "right" if all(what == "equal" for what, _ in column.cells.values()) else "wrong"
