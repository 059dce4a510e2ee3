"""Scores computed from manifests alone, without models or audio: another normalizer takes only seconds."""

import dataclasses
import unicodedata
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jiwer
import numpy as np

from ..arguments import Normalizer
from ..data.json_files import read_json, write_json
from ..errors import UserError
from ..progress import progress
from .bootstrap import (
    N_RESAMPLES,
    SEED,
    bootstrap_units,
    confidence_interval,
    probability_of_improvement,
    resampled_rates,
)
from .manifest import (
    MANIFESTS_DIR,
    Manifest,
    ManifestMetadata,
    all_values,
    check_comparable,
    read_manifests,
    role_order,
)
from .metrics import UNIFIED, characters, normalize_pairs, normalizer_for, text_language
from .results import PairedComparison, Results, Scores, SetResult
from .suites import UNTRANSCRIBED, DatasetSpec
from .word_errors import (
    EMPTY_AFTER_NORMALIZATION,
    NO_REFERENCE,
    Errors,
    capped_errors,
    count_errors,
    exclusion_reason,
    is_loop,
    plain_words,
    repeated_ngrams,
)
from .word_times import compare_word_times

SPELLING_FILE = "normalizer.json"  # in the directory of the manifests; OpenAI's models have a file of this name


def save_spelling_normalizer(folder: Path, spelling: dict[str, str] | None) -> None:
    """Save a model's list of spellings in the directory of the manifests, unless there already is one."""
    file = folder / SPELLING_FILE
    if spelling and not file.exists():
        write_json(file, spelling)


def load_spelling_normalizer(folder: Path) -> dict[str, str]:
    """Return the saved list of spellings; empty if no model had one, which leaves spelling unchanged."""
    file = folder / SPELLING_FILE
    return read_json(file) if file.exists() else {}


def score_directory(directory: Path, normalizer: Normalizer = "auto", n_resamples: int = N_RESAMPLES) -> Results:
    """Score all manifests of an evaluation.

    Args:
        directory: output directory of the evaluation; it contains `manifests`.
        normalizer: see `normalizer_for`.

    Raises `UserError` if there are no manifests, or they are incomplete or not comparable.
    """
    folder = directory / MANIFESTS_DIR
    manifests = read_manifests(folder)
    if not manifests:
        raise UserError(f"{folder} has no manifests: evaluate a model first, with --output_dir {directory}")
    metadata = {name: {role: m.metadata() for role, m in roles.items()} for name, roles in manifests.items()}
    check_comparable(folder, metadata)
    spelling = load_spelling_normalizer(folder)
    flat = [one for roles in metadata.values() for one in roles.values()]
    models = {one.role: dataclasses.replace(one.model, weights=one.weights) for one in flat}
    scoring = dict(n_resamples=n_resamples, seed=SEED, jiwer=version("jiwer"))
    results = Results(
        models={role: models[role] for role in sorted(models, key=role_order)},
        settings=_settings(flat) | scoring,
        manifests=MANIFESTS_DIR,
    )
    for name, roles in progress(manifests.items(), "Scoring", "set"):
        results.sets.append(score_set(roles, metadata[name], normalizer, spelling, n_resamples))
    return results


def _settings(metadata: list[ManifestMetadata]) -> dict[str, Any]:
    """Return decoding and runtime settings; values that differ between manifests are listed."""
    settings = [one.decoding | one.runtime for one in metadata]
    names = dict.fromkeys(name for one in settings for name in one)
    return {name: all_values(one[name] for one in settings if name in one) for name in names}


def score_set(
    manifests: dict[str, Manifest],
    metadata: dict[str, ManifestMetadata],
    normalizer: Normalizer,
    spelling: dict[str, str],
    n_resamples: int = N_RESAMPLES,
) -> SetResult:
    """Score all models on one set.

    Args:
        manifests, metadata: by role, the evaluated model first, the teacher last; all of the same clips.
        normalizer: see `normalizer_for`.
        spelling: British to American words, for English.
    """
    first = next(iter(metadata.values()))
    texts = normalized_texts(manifests, first, normalizer, spelling)
    counts = dict(Counter(texts.excluded))
    if not texts.scored:
        raise _all_excluded(first.set["name"], counts)
    some = [next(iter(texts.rows.values()))[i] for i in texts.scored]
    speakers = [row.get("speaker") for row in some]
    word_errors = {
        role: count_errors(jiwer.process_words(texts.references, predictions))
        for role, predictions in texts.predictions.items()
    }
    unit, units = bootstrap_units(speakers)
    rates: dict[str, dict[str, Any]] = {}
    comparison = None
    if texts.has_speech:
        rates, comparison = _error_rates(texts, speakers, word_errors, units, n_resamples)
    scores = {
        role: _scores(texts, role, errors, rates.get(role), metadata[role]) for role, errors in word_errors.items()
    }
    if all(one.decoding["timestamps"] == "word" for one in metadata.values()):
        *others, baseline = texts.rows
        for role in others:
            scores[role].word_times = compare_word_times(texts.rows[role], texts.rows[baseline])
    return SetResult(
        **{key: value for key, value in first.set.items() if key != "no_speech"},
        method=first.method,
        normalizer=texts.normalizer,
        clips=len(texts.scored),
        excluded=first.excluded | counts,
        hours=sum(row["duration"] for row in some) / 3600,
        reference_words=sum(len(text.split()) for text in texts.references),
        has_speech=texts.has_speech,
        bootstrap_unit=unit,
        scores=scores,
        comparison=comparison,
        spelling_normalizer=bool(spelling) if texts.normalizer in ("english", UNIFIED) else None,
        has_combining_marks=texts.normalizer.startswith("basic") and any(_has_marks(row["reference"]) for row in some),
        no_speech_clips=len(texts.no_speech),
        long_clips=first.long_clips,
    )


def check_references(spec: DatasetSpec, references: list[str], normalizer: Normalizer) -> None:
    """Raise `UserError` if no clip of a set with speech can be scored, before the set is transcribed.

    Args:
        references: of all clips, as they are in the dataset.
        normalizer: see `normalizer_for`.
    """
    if spec.no_speech:
        return
    # without a model's list of spellings: it doesn't empty a text
    _, normalize = normalizer_for(normalizer, text_language(spec.task, spec.language), {})
    normalized, _ = normalize_pairs(references, references, normalize)
    reasons = [exclusion_reason(raw, text) for raw, text in zip(references, normalized, strict=True)]
    if None not in reasons:
        raise _all_excluded(spec.name, Counter(reason for reason in reasons if reason is not None))


def _all_excluded(name: str, reasons: Mapping[str, int]) -> UserError:
    counts = ", ".join(f"{reason}: {number}" for reason, number in reasons.items())
    return UserError(f"{name}: all clips are excluded ({counts}). Another --normalizer may keep some of them")


@dataclass
class NormalizedTexts:
    """The texts of all models on one set."""

    rows: dict[str, list[dict[str, Any]]]  # lines of the manifests, by role
    scored: list[int]  # indices of the lines that can be scored
    excluded: list[str]  # reasons why the other lines can't be
    no_speech: list[int]  # indices of the lines whose reference is empty
    references: list[str]  # normalized, of the scored lines
    predictions: dict[str, list[str]]  # normalized, of the scored lines, by role
    has_speech: bool  # False for a set whose clips all have no speech
    normalizer: str  # its name
    by_letter: bool  # whether each letter counts as a word
    language: str | None  # of the texts


def normalized_texts(
    manifests: dict[str, Manifest], first: ManifestMetadata, normalizer: Normalizer, spelling: dict[str, str]
) -> NormalizedTexts:
    """Return the normalized texts of one set.

    Args:
        manifests: by role, all of the same clips.
        first: metadata of one of them.
        normalizer, spelling: see `score_set`.
    """
    language = text_language(first.set["task"], first.set["language"])
    name, normalize = normalizer_for(normalizer, language, spelling)
    rows = {role: manifest.rows() for role, manifest in manifests.items()}
    some = next(iter(rows.values()))
    raw = [row["reference"] for row in some]
    pairs = {role: normalize_pairs(raw, [row["prediction"] for row in of], normalize) for role, of in rows.items()}
    references = next(iter(pairs.values()))[0]  # equal for all roles
    excluded = [exclusion_reason(row["reference"], text) for row, text in zip(some, references, strict=True)]
    # manifests of earlier versions don't state it: a set whose references are all empty is without speech
    no_speech = first.set.get("no_speech")
    has_speech = any(e in (None, EMPTY_AFTER_NORMALIZATION) for e in excluded) if no_speech is None else not no_speech
    if not has_speech:
        excluded = [reason if reason == UNTRANSCRIBED else None for reason in excluded]
    scored = [i for i, reason in enumerate(excluded) if reason is None]
    return NormalizedTexts(
        rows=rows,
        scored=scored,
        excluded=[reason for reason in excluded if reason is not None],
        no_speech=[i for i, reason in enumerate(excluded) if reason == NO_REFERENCE] if has_speech else scored,
        references=[references[i] for i in scored],
        predictions={role: [texts[i] for i in scored] for role, (_, texts) in pairs.items()},
        has_speech=has_speech,
        normalizer=name,
        by_letter=normalize.by_letter,
        language=language,
    )


def _has_marks(text: str) -> bool:
    """Return whether a text has combining marks after NFKC, such as vowel signs. `basic` removes these."""
    return any(unicodedata.category(letter)[0] == "M" for letter in unicodedata.normalize("NFKC", text))


def _scores(
    texts: NormalizedTexts, role: str, errors: Errors, rates: dict[str, Any] | None, metadata: ManifestMetadata
) -> Scores:
    """Return the scores of one model.

    Args:
        errors: word errors of each scored clip.
        rates: fields of `Scores` from `_error_rates`; None for a set without speech.
    """
    no_rates = dict(
        wer=None, wer_confidence_interval=None, cer=None, cer_confidence_interval=None, insertion_rate=None
    )
    lines = texts.rows[role]
    plain = [plain_words(line["prediction"], texts.language) for line in lines]
    limit = metadata.runtime.get("token_limit")
    return Scores(
        **(no_rates if rates is None else rates),
        substitutions=int(errors.substitutions.sum()),
        deletions=int(errors.deletions.sum()),
        insertions=int(errors.insertions.sum()),
        repeated_5grams=repeated_ngrams([plain[i] for i in texts.scored]),
        loops=sum(map(is_loop, texts.references, texts.predictions[role])),
        no_speech_hallucinations=sum(bool(plain[i]) for i in texts.no_speech),
        # several limits, as a string: the manifest was decoded by different versions
        clips_at_limit=sum(lines[i]["tokens"] >= limit for i in texts.scored) if isinstance(limit, int) else None,
    )


def _error_rates(
    texts: NormalizedTexts,
    speakers: list[str | None],
    word_errors: dict[str, Errors],
    units: np.ndarray,
    n_resamples: int,
) -> tuple[dict[str, dict[str, Any]], PairedComparison | None]:
    """Return error rates by role, as fields of `Scores`, and the comparison of the first model with the last one.

    With a single bootstrap unit all resamples are equal: then there are no intervals and no comparison.
    """
    word_counts = np.array([len(text.split()) for text in texts.references])
    letters_of = {role: [characters(text, texts.by_letter) for text in of] for role, of in texts.predictions.items()}
    reference_letters = [characters(text, texts.by_letter) for text in texts.references]
    character_counts = np.array([len(text) for text in reference_letters])
    words = np.stack([errors.total for errors in word_errors.values()])
    letters = np.stack(
        [count_errors(jiwer.process_characters(reference_letters, letters)).total for letters in letters_of.values()]
    )
    wers = resampled_rates(words, word_counts, units, n_resamples)
    cers = resampled_rates(letters, character_counts, units, n_resamples)
    several = bool(units.any())
    rates: dict[str, dict[str, Any]] = {
        role: dict(
            wer=_percent(words[i], word_counts),
            wer_confidence_interval=confidence_interval(wers[i]) if several else None,
            capped_wer=_percent(capped_errors(words[i], word_counts), word_counts),
            cer=_percent(letters[i], character_counts),
            cer_confidence_interval=confidence_interval(cers[i]) if several else None,
            insertion_rate=_percent(errors.insertions, word_counts),
            wer_by_speaker=_by_speaker(words[i], word_counts, speakers),
        )
        for i, (role, errors) in enumerate(word_errors.items())
    }
    if len(rates) == 1 or not several:
        return rates, None
    system, *_, baseline = rates
    return rates, PairedComparison(
        system=system,
        baseline=baseline,
        wer_difference=rates[system]["wer"] - rates[baseline]["wer"],
        confidence_interval=confidence_interval(wers[0] - wers[-1]),
        probability_of_improvement=probability_of_improvement(wers[0], wers[-1]),
    )


def _percent(errors: np.ndarray, lengths: np.ndarray) -> float:
    return float(100 * errors.sum() / lengths.sum())


def _by_speaker(errors: np.ndarray, lengths: np.ndarray, speakers: list[str | None]) -> dict[str, float]:
    """Return the WER of each known speaker in percent."""
    names = np.array([name or "" for name in speakers])
    known = sorted({name for name in speakers if name is not None})
    return {name: _percent(errors[names == name], lengths[names == name]) for name in known}
