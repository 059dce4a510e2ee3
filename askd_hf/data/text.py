"""Transcripts as Whisper knows them."""

import functools
import logging
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from datasets import Dataset, IterableDataset
from transformers.models.whisper.english_normalizer import BasicTextNormalizer

from ..errors import UserError
from .columns import SEGMENTS, arrow_type, replace_column
from .languages import lower_case
from .markup import has_markup, read_markup

logger = logging.getLogger(__name__)

LOOKED_AT = 100  # rows of a stream that decide about its case, and whether its transcripts have times
SAID = ("text", "prompt", "segments")


def clean_texts(
    dataset: Dataset | IterableDataset,
    text_case: str,
    name: str,
    normalize: Callable[[str], str] | None = None,
    written_in: str | None = None,
) -> Dataset | IterableDataset:
    """Transcripts without markup, in Unicode's composed form (NFC), their white space squeezed.

    Whisper's own times in a transcript become `segments`, unless the row has some (`read_markup`); what can't be read
    so stays as it is, for `Limits.unusable` to name. Lower case is that of the row's language. Whisper's tokenizer
    splits capitals into about twice as many tokens, and a teacher hardly believes them.

    Args:
        dataset: with a column `text` (string or None), and perhaps `prompt` and `segments`, cleaned likewise; with
            `language` (codes) and `task`, if the model is multilingual.
        text_case: "keep"; "lower"; "auto" lower-cases the transcripts of a language if they have capitals, but not one
            small letter, and aren't in a script without case; of a stream the first `LOOKED_AT` rows decide.
        name: the dataset's name in the log.
        normalize: a text normalizer, for texts in lower case if `text_case` says so.
        written_in: the only language that it is for, a code. None: any.

    Raises `UserError` for a row of another language than `written_in`, in a stream when it comes.
    """
    streamed = isinstance(dataset, IterableDataset)
    used = [column for column in (*SAID, "language", "task") if column in dataset.column_names]
    looked_at = dataset.take(LOOKED_AT) if streamed else dataset
    rows = [_read({column: row[column] for column in used}) for row in looked_at.select_columns(used)]
    columns = [column for column in used if column in SAID]
    timed = sum(row.get("segments") is not None and has_markup(row["marked"]) for row in rows)
    if timed:
        where = f"{timed} of the first {len(rows)} transcripts" if streamed else f"{timed} of {len(rows)} transcripts"
        logger.warning("%s: %s have Whisper's times `<|0.00|>`, which are read as `segments`", name, where)
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
        kind = dataset.features.get(column, SEGMENTS)
        dataset = replace_column(dataset, column, pa.array([row[column] for row in cleaned], arrow_type(kind)))
    return dataset


def without_times(dataset: Dataset, language: str | None, task: str | None = None) -> Dataset:
    """The dataset with transcripts as text alone where they have Whisper's times; other markup stays as it is."""
    texts = dataset["text"][:]
    if not any(map(has_markup, texts)):
        return dataset
    rows = [_read({"text": text, "language": language, "task": task}) for text in texts]
    return replace_column(dataset, "text", pa.array([row["text"] for row in rows], pa.string()))


def _read(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with its markup read where that can be, and its transcript as it was in `marked`."""
    row = {**row, "marked": row["text"]}
    for column in ("text", "prompt"):
        if not has_markup(row.get(column)):
            continue
        try:
            read = read_markup(row[column], row.get("language"), row.get("task"))
        except UserError:  # `Limits.unusable` names it
            continue
        row[column] = read.text
        if column == "text" and not row.get("segments"):
            row["segments"] = read.segments
    return row


def written_language(row: Mapping[str, Any]) -> str | None:
    """The language of a row's text, a code: English of a translation. None or `UNKNOWN` if the row doesn't say it."""
    return "en" if row.get("task") == "translate" else row.get("language")


@dataclass(frozen=True)
class Case:
    """Whose transcripts are lower-cased.

    Attributes:
        lowered: for each language, of the texts, whether they are.
        others: likewise for languages that aren't in `lowered`.
    """

    lowered: dict[str | None, bool]
    others: bool

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]]) -> "Case":
        """Lower-case languages whose transcripts are all in capitals; others too, if that is so in all with case."""
        small: set[str | None] = set()
        letters: dict[str | None, Counter[bool]] = {}
        for row in rows:
            text, language = (row["text"] or "").replace("ß", ""), written_language(row)  # its capital is hardly used
            if language in small or has_markup(text):
                continue
            if text.upper() != text:
                small.add(language)
                continue
            count = letters.setdefault(language, Counter())
            count.update(letter.isupper() for letter in text if letter.isalpha())
        # in a script without case capitals are others' acronyms
        capitals = {language for language, count in letters.items() if count[True] > count[False]} - small
        seen = small | set(letters)
        return cls({language: language in capitals for language in seen}, bool(capitals) and not small)

    def report(self, name: str) -> None:
        lowered = [language for language, is_lowered in self.lowered.items() if is_lowered]
        if not lowered:
            return
        which = "" if len(self.lowered) == 1 else f" in {', '.join(sorted(language or 'en' for language in lowered))}"
        logger.warning(
            "%s: the transcripts%s are all in capitals; lower-cased (--text_case keep leaves them)", name, which
        )


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
        raise UserError(f"--text_normalizer is for {written_in}, and {name} has rows in {language}: choose basic")
    row = _read(row)
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
    """Whisper's basic normalizer for labels: it keeps combining marks, without which Hindi and Thai aren't legible.

    `BasicTextNormalizer` makes spaces of them, and compatibility forms (NFKC). Texts have to be in lower case already.
    """
    normalizer = BasicTextNormalizer()
    normalizer.clean = _without_symbols
    return normalizer


def _without_symbols(text: str) -> str:
    return "".join(" " if unicodedata.category(letter)[0] in "SP" else letter for letter in text)
