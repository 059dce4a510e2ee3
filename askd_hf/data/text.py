"""Normalize transcripts to the form that Whisper produces."""

import functools
import logging
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from datasets import Dataset, IterableDataset
from datasets.features.features import get_nested_type
from transformers.models.whisper.english_normalizer import BasicTextNormalizer

from ..errors import UserError, warn_once
from .columns import SEGMENTS, iterate_rows, replace_column
from .languages import lower_case
from .markup import has_markup, read_markup

logger = logging.getLogger(__name__)

SAMPLE_SIZE = 100  # rows of a stream that determine its case, and whether its transcripts have timestamps
TRANSCRIPT_COLUMNS = ("text", "prompt", "segments")


def clean_texts(
    dataset: Dataset | IterableDataset,
    text_case: str,
    name: str,
    normalize: Callable[[str], str] | None = None,
    written_in: str | None = None,
) -> Dataset | IterableDataset:
    """Normalize transcripts: remove markup, apply Unicode NFC, collapse white space, and adjust the case.

    Whisper's timestamps in a transcript become `segments`, unless the row has segments (`read_markup`). Invalid markup
    is left for `Limits.invalid_reason` to report. Lower-casing follows the rules of the row's language. It matters:
    Whisper's tokenizer needs about twice as many tokens for upper-case text, and the teacher gives it low probability.

    Args:
        dataset: with `text` (string or None); optionally `prompt` and `segments`, which are normalized too; and with
            `language` (codes) and `task` for a multilingual model.
        text_case: "keep"; "lower"; or "auto" to lower-case the transcripts of a language if all of them are entirely
            upper-case. In a stream the first `SAMPLE_SIZE` rows determine this.
        normalize: text normalizer, applied after lower-casing; None for none.
        written_in: the only language code that `normalize` supports; None if it supports any.

    Raises `UserError` if a row has another language than `written_in`; for a stream, when the row is read.
    """
    streamed = isinstance(dataset, IterableDataset)
    used = [column for column in (*TRANSCRIPT_COLUMNS, "language", "task") if column in dataset.column_names]
    transcripts = dataset.select_columns(used)
    sample = transcripts.take(SAMPLE_SIZE) if streamed else iterate_rows(transcripts)
    rows = [_parse_markup({column: row[column] for column in used}) for row in sample]
    columns = [column for column in used if column in TRANSCRIPT_COLUMNS]
    timed = sum(row.get("segments") is not None and has_markup(row["original"]) for row in rows)
    if timed:
        where = f"{timed} of the first {len(rows)} transcripts" if streamed else f"{timed} of {len(rows)} transcripts"
        logger.warning("%s: Whisper's timestamps `<|0.00|>` in %s are converted to `segments`", name, where)
        columns += [] if "segments" in columns else ["segments"]
    case = Case({}, text_case == "lower")
    if text_case == "auto":
        case = Case.of(rows)
        case.report(name)
    clean = functools.partial(
        _clean_row, columns=columns, case=case, normalize=normalize, written_in=written_in, name=name
    )
    if streamed:
        features = dataset.features.copy()
        if "segments" in columns:
            features["segments"] = SEGMENTS
        return dataset.map(clean, features=features)
    cleaned = [clean(row) for row in rows]
    for column in columns:
        arrow_type = get_nested_type(dataset.features.get(column, SEGMENTS))
        dataset = replace_column(dataset, column, pa.array([row[column] for row in cleaned], arrow_type))
    return dataset


def without_times(dataset: Dataset, language: str | None, task: str | None = None) -> Dataset:
    """Remove Whisper's timestamps from the transcripts. Invalid markup is kept.

    Args:
        language: of the dataset, a code; None for English.
        task: "transcribe" or "translate"; None for "transcribe".
    """
    texts = dataset["text"][:]
    if not any(map(has_markup, texts)):
        return dataset
    rows = [_parse_markup({"text": text, "language": language, "task": task}) for text in texts]
    return replace_column(dataset, "text", pa.array([row["text"] for row in rows], pa.string()))


def _parse_markup(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row with valid markup removed, and its original transcript as `original`."""
    row = {**row, "original": row["text"]}
    for column in ("text", "prompt"):
        if not has_markup(row.get(column)):
            continue
        try:
            parsed = read_markup(row[column], row.get("language"), row.get("task"))
        except UserError:  # reported by `Limits.invalid_reason`
            continue
        row[column] = parsed.text
        if column == "text" and not row.get("segments"):
            row["segments"] = parsed.segments
    return row


def written_language(row: Mapping[str, Any]) -> str | None:
    """Return the language code of a row's text: "en" for a translation; None or `UNKNOWN` if the row has none."""
    return "en" if row.get("task") == "translate" else row.get("language")


@dataclass(frozen=True)
class Case:
    """Which transcripts are lower-cased."""

    lowered: dict[str | None, bool]  # language of the text -> whether it is lower-cased
    others: bool  # whether other languages are lower-cased

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]]) -> "Case":
        """Lower-case languages whose transcripts are all upper-case; other languages too if this holds for all."""
        small: set[str | None] = set()
        letters: dict[str | None, Counter[bool]] = {}
        for row in rows:
            text, language = (row["text"] or "").replace("ß", ""), written_language(row)  # rarely used in upper case
            if language in small or has_markup(text):
                continue
            if text.upper() != text:
                small.add(language)
                continue
            count = letters.setdefault(language, Counter())
            count.update(letter.isupper() for letter in text if letter.isalpha())
        # upper-case letters in a script without case are foreign acronyms
        capitals = {language for language, count in letters.items() if count[True] > count[False]} - small
        seen = small | set(letters)
        return cls({language: language in capitals for language in seen}, bool(capitals) and not small)

    def report(self, name: str) -> None:
        lowered = [language for language, is_lowered in self.lowered.items() if is_lowered]
        if not lowered:
            return
        which = "" if len(self.lowered) == 1 else f" in {', '.join(sorted(language or 'en' for language in lowered))}"
        # the training set is read twice with --vocabulary
        keep = "askd-hf distill --text_case keep doesn't change them"
        warn_once(f"{name}: the transcripts{which} are all upper-case and are lower-cased; {keep}")


def _clean_row(
    row: Mapping[str, Any],
    columns: list[str],
    case: Case,
    normalize: Callable[[str], str] | None,
    written_in: str | None,
    name: str,
) -> dict[str, Any]:
    language = written_language(row)
    if written_in is not None and (language or written_in) != written_in:
        raise UserError(
            f"--text_normalizer supports only {written_in}, but {name} has rows in {language}: use "
            "--text_normalizer basic"
        )
    row = _parse_markup(row)
    lower = case.lowered.get(language, case.others)
    clean = functools.partial(_clean, language=language, lower=lower, normalize=normalize)
    cleaned: dict[str, Any] = {column: clean(row[column]) for column in columns if column != "segments"}
    if "segments" in columns:
        segments = row.get("segments")
        cleaned["segments"] = segments and [s and {**s, "text": clean(s["text"])} for s in segments]
    return cleaned


def _clean(text: str | None, language: str | None, lower: bool, normalize: Callable[[str], str] | None) -> str | None:
    if text is None or has_markup(text):
        return text
    text = unicodedata.normalize("NFC", text)
    text = lower_case(text, language) if lower else text
    return " ".join((text if normalize is None else normalize(text)).split())


def basic_normalizer() -> Callable[[str], str]:
    """Return Whisper's basic normalizer for labels, which keeps combining marks, as Hindi and Thai need them.

    `BasicTextNormalizer` replaces combining marks by spaces and applies NFKC. Texts must be lower-case already.
    """
    normalizer = BasicTextNormalizer()
    normalizer.clean = _without_symbols
    return normalizer


def _without_symbols(text: str) -> str:
    return "".join(" " if unicodedata.category(letter)[0] in "SP" else letter for letter in text)
