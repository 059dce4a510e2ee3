"""The clips of the report: those on which two models differ most, with audio and with all texts aligned."""

import itertools
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jiwer
from datasets import Dataset

from .clip_audio import AUDIO_DIR, audio_uri
from .manifest import Manifest
from .metrics import normalize_pairs, normalizer_for, text_language
from .results import SetResult
from .scoring import load_spelling_normalizer
from .suites import UNTRANSCRIBED
from .word_errors import count_errors, exclusion_reason

MAX_CLIPS = 20  # per list
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
    difference: int | None  # word errors of the student minus those of the teacher; None without a teacher
    audio: str | None  # a `data:` URI; see `audio_uri`
    columns: list[Column]  # the alignment, at most `MAX_COLUMNS`
    hidden: int  # number of words after the last column


@dataclass
class ClipList:
    """The first clips of an order."""

    title: str
    clips: list[Clip]  # at most `MAX_CLIPS`
    total: int  # number of clips that could be listed
    condition: str  # what these have


def clip_lists(entry: SetResult, manifests: Path, roles: list[str], speech: Dataset | None) -> list[ClipList]:
    """Return the clips of a set on which the student has more errors than the teacher, and those with fewer.

    The largest difference is first. Without a manifest of a teacher there is one list: the clips with the most errors.

    Args:
        manifests: directory of the manifests.
        roles: the student's first, the teacher's last if there is one.
        speech: the clips of the set in the order of its manifests; None to use only audio that was saved before.

    Returns:
        The lists that aren't empty; none if the student has no manifest.
    """
    rows = {role: found for role in entry.scores if (found := Manifest(manifests, role, entry.name).rows())}
    student, teacher = roles[0], roles[-1]
    if student not in rows:
        return []
    references, predictions = _normalized(entry, manifests, rows)
    errors = {role: count_errors(jiwer.process_words(references, of)).total for role, of in predictions.items()}
    paired = teacher != student and teacher in rows
    worse = errors[student] - errors[teacher] if paired else errors[student]
    scored = [i for i, row in enumerate(rows[student]) if _is_scored(entry, row, references[i])]
    audio = manifests.parent / AUDIO_DIR / Manifest(manifests, student, entry.name).metadata().data

    def clip(i: int) -> Clip:
        row, texts = rows[student][i], {role: of[i] for role, of in predictions.items()}
        uri = audio_uri(audio / f"{i}.mp3", row["duration"], speech, i)
        return _clip(row, references[i], texts, int(worse[i]) if paired else None, uri)

    def first_clips(title: str, condition: str, sign: int) -> ClipList:
        found = [i for i in scored if sign * worse[i] > 0]
        found.sort(key=lambda i: (-sign * worse[i], len(references[i].split()), rows[student][i]["clip"]))
        return ClipList(title, [clip(i) for i in found[:MAX_CLIPS]], len(found), condition)

    if paired:
        lists = [
            first_clips(f"The {student} is worse than the {teacher}", "with more errors", 1),
            first_clips(f"The {student} is better than the {teacher}", "with fewer errors", -1),
        ]
    else:
        lists = [first_clips(f"Most errors of the {student}", "with errors", 1)]
    return [one for one in lists if one.clips]


def _normalized(
    entry: SetResult, manifests: Path, rows: dict[str, list[dict[str, Any]]]
) -> tuple[list[str], dict[str, list[str]]]:
    """Return the normalized references, and the normalized predictions by role."""
    language, name = text_language(entry.task, entry.language), entry.normalizer.partition(",")[0]
    _, normalize = normalizer_for(name, language, load_spelling_normalizer(manifests))
    raw = [row["reference"] for row in next(iter(rows.values()))]
    pairs = {role: normalize_pairs(raw, [row["prediction"] for row in of], normalize) for role, of in rows.items()}
    return next(iter(pairs.values()))[0], {role: predictions for role, (_, predictions) in pairs.items()}


def _is_scored(entry: SetResult, row: dict[str, Any], reference: str) -> bool:
    """Return whether `score_set` scores the clip: in a set without speech a reference may be empty."""
    reason = exclusion_reason(row["reference"], reference)
    return reason is None or (reason != UNTRANSCRIBED and not entry.has_speech)


def _clip(
    row: dict[str, Any], reference: str, predictions: dict[str, str], difference: int | None, audio: str | None
) -> Clip:
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
        difference=difference,
        audio=audio,
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
