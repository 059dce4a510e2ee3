"""Scores from manifests alone: neither model nor audio is needed, so that other normalisers cost seconds."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
from tqdm.auto import tqdm

from ..errors import UserError
from ..metrics import Normalizer, normalizer_for
from .bootstrap import RESAMPLES, SEED, blocks_of, interval, probability_of_improvement, resampled_rates
from .manifest import FOLDER, Manifest, Settings, read_manifests, role_order
from .results import Paired, Results, Scores, SetResult

SPELLING_FILE = "normalizer.json"  # beside the manifests, as it lies beside OpenAI's models
# TED-LIUM's transcript of stretches that nobody transcribed; the Open ASR Leaderboard drops it as well
UNTRANSCRIBED = "ignore time segment in scoring"
LONGEST_REPEAT = 5


def save_spelling(folder: Path, spelling: dict[str, str] | None) -> None:
    """Keep the spelling list of a model that has one in the folder of the manifests; the first one stays."""
    file = folder / SPELLING_FILE
    if spelling and not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(spelling, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")


def load_spelling(folder: Path) -> dict[str, str]:
    """The spelling list that was kept; empty if no model had one: then spelling is left alone."""
    file = folder / SPELLING_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


@dataclass
class Errors:
    """Of one system, clip by clip, int `(clips,)` each."""

    substitutions: np.ndarray
    deletions: np.ndarray
    insertions: np.ndarray

    @property
    def total(self) -> np.ndarray:
        return self.substitutions + self.deletions + self.insertions


def count_errors(output: jiwer.WordOutput | jiwer.CharacterOutput) -> Errors:
    """What jiwer has aligned, clip by clip."""
    counts = np.zeros((3, len(output.alignments)), dtype=np.int64)
    kinds = {"substitute": 0, "delete": 1, "insert": 2}
    for clip, chunks in enumerate(output.alignments):
        for chunk in chunks:
            if chunk.type in kinds:
                length = max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx)
                counts[kinds[chunk.type], clip] += length
    return Errors(*counts)


def repeated_ngrams(texts: list[str], n: int = LONGEST_REPEAT) -> float:
    """Share of the texts' word n-grams that stand earlier in the same text, percent; 0 where there are none.

    A decoder that runs in circles repeats itself: Gandhi et al. 2023, Distil-Whisper, count 5-grams so.
    """
    repeated, total = 0, 0
    for text in texts:
        words = text.split()
        ngrams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        total += len(ngrams)
        repeated += len(ngrams) - len(set(ngrams))
    return 100 * repeated / total if total else 0.0


def drop_reason(raw: str, reference: str) -> str | None:
    """Why a clip of a set with speech can't be scored, from its reference before and after normalisation."""
    if UNTRANSCRIBED in raw.lower().replace("_", " "):
        return UNTRANSCRIBED
    if not reference:
        return "reference empty after normalisation"
    return None


def score_directory(directory: Path, normalizer: Normalizer = "auto", resamples: int = RESAMPLES) -> Results:
    """Score all manifests of an evaluation.

    Args:
        directory: of the evaluation, with `manifests`.
        normalizer: as in `normalizer_for`.
        resamples: of the bootstrap.

    Raises:
        UserError: no manifests, incomplete ones, or ones that can't be compared.
    """
    folder = directory / FOLDER
    manifests = read_manifests(folder)
    if not manifests:
        raise UserError(f"{folder}: no manifests; evaluate a model first, with --output_dir {directory}")
    sidecars = {name: {role: m.settings() for role, m in roles.items()} for name, roles in manifests.items()}
    _check(folder, sidecars)
    spelling = load_spelling(folder)
    every = [settings for roles in sidecars.values() for settings in roles.values()]
    models = {settings.role: settings.facts for settings in every}
    results = Results(
        models={role: models[role] for role in sorted(models, key=role_order)},
        settings=_conditions(every) | {"resamples": resamples, "seed": SEED},
        manifests=FOLDER,
    )
    for name, roles in tqdm(manifests.items(), desc="Scoring", unit="set", leave=False):
        results.sets.append(score_set(roles, sidecars[name], normalizer, spelling, resamples))
    return results


def _conditions(every: list[Settings]) -> dict[str, Any]:
    """How and where everything was decoded; of what wasn't the same for all, such as the date, all values."""
    conditions = [settings.decoding | settings.run for settings in every]
    values = {name: list(dict.fromkeys(of_one.get(name) for of_one in conditions)) for name in conditions[0]}
    return {name: found[0] if len(found) == 1 else ", ".join(map(str, found)) for name, found in values.items()}


def _check(folder: Path, sidecars: dict[str, dict[str, Settings]]) -> None:
    """Raise `UserError` unless all manifests are complete, of one model a role, and of the same clips a set."""
    weights: dict[str, Settings] = {}
    decoding = next(iter(next(iter(sidecars.values())).values())).decoding
    for name, roles in sidecars.items():
        first = next(iter(roles.values()))
        for role, settings in roles.items():
            file = folder / role / f"{name}.jsonl"
            if not settings.complete:
                raise UserError(f"{file} is incomplete: run the evaluation again, it goes on where it stopped")
            if weights.setdefault(role, settings).weights != settings.weights:
                raise UserError(
                    f"{file} is of another model ({settings.facts.name}) than the manifests of the other sets "
                    f"({weights[role].facts.name}): evaluate that set again with --overwrite True, or remove the file"
                )
            if settings.decoding != decoding:
                raise UserError(
                    f"{file} was decoded with {settings.decoding}, others in {folder} with {decoding}: they can't be "
                    "compared. Evaluate all again with --overwrite True"
                )
            if settings.data != first.data:
                raise UserError(
                    f"{file} is of other clips or transcripts than that of the {first.role}: they can't be compared. "
                    "Evaluate both again with --overwrite True"
                )


def score_set(
    manifests: dict[str, Manifest],
    sidecars: dict[str, Settings],
    normalizer: Normalizer,
    spelling: dict[str, str],
    resamples: int = RESAMPLES,
) -> SetResult:
    """Score all models on one set.

    Args:
        manifests, sidecars: by role, the model under test first, the teacher last; all of the same clips.
    """
    settings = next(iter(sidecars.values()))
    language = "en" if settings.set["task"] == "translate" else settings.set["language"]
    name, normalize = normalizer_for(normalizer, language, spelling)
    rows = {role: manifest.rows() for role, manifest in manifests.items()}
    some = next(iter(rows.values()))
    references = [normalize(row["reference"]) for row in some]
    dropped = [drop_reason(row["reference"], text) for row, text in zip(some, references, strict=True)]
    # where no reference has any text, the set is one without speech: nothing is missing from it
    speech = any(text and reason is None for text, reason in zip(references, dropped, strict=True))
    if not speech:
        dropped = [reason if reason == UNTRANSCRIBED else None for reason in dropped]
    kept = [i for i, reason in enumerate(dropped) if reason is None]
    if not kept:
        raise UserError(f"{settings.set['name']}: no clip is left to score; all say {UNTRANSCRIBED!r}")
    references = [references[i] for i in kept]
    predictions = {role: [normalize(lines[i]["prediction"]) for i in kept] for role, lines in rows.items()}
    speakers = [some[i].get("speaker") for i in kept]
    seconds = {role: sum(lines[i]["seconds"] for i in kept) for role, lines in rows.items()}
    blocks, block_of = blocks_of(speakers)
    scores, paired = _scores(references, predictions, speakers, seconds, block_of, speech, resamples)
    return SetResult(
        **settings.set,
        method=settings.method,
        normalizer=name,
        clips=len(kept),
        dropped=settings.dropped | dict(Counter(reason for reason in dropped if reason is not None)),
        hours=sum(some[i]["duration"] for i in kept) / 3600,
        reference_words=sum(len(text.split()) for text in references),
        speech=speech,
        blocks=blocks,
        scores=scores,
        paired=paired,
    )


def _scores(
    references: list[str],
    predictions: dict[str, list[str]],
    speakers: list[str | None],
    seconds: dict[str, float],
    blocks: np.ndarray,
    speech: bool,
    resamples: int,
) -> tuple[dict[str, Scores], Paired | None]:
    """The scores of all roles, and the comparison of the first with the last of them."""
    words = {role: count_errors(jiwer.process_words(references, texts)) for role, texts in predictions.items()}
    scores = {}
    for role, texts in predictions.items():
        counts = words[role]
        scores[role] = Scores(
            wer=None,
            wer_interval=None,
            cer=None,
            cer_interval=None,
            substitutions=int(counts.substitutions.sum()),
            deletions=int(counts.deletions.sum()),
            insertions=int(counts.insertions.sum()),
            insertion_rate=None,
            repeated_5grams=repeated_ngrams(texts),
            clips_with_text=sum(map(bool, texts)),
            seconds=seconds[role],
        )
    if not speech:
        return scores, None

    word_counts = np.array([len(text.split()) for text in references])
    character_counts = np.array([len(text) for text in references])
    word_errors = np.stack([counts.total for counts in words.values()])
    character_errors = np.stack(
        [count_errors(jiwer.process_characters(references, texts)).total for texts in predictions.values()]
    )
    wers = resampled_rates(word_errors, word_counts, blocks, resamples)
    cers = resampled_rates(character_errors, character_counts, blocks, resamples)
    for i, score in enumerate(scores.values()):
        score.wer = _percent(word_errors[i], word_counts)
        score.cer = _percent(character_errors[i], character_counts)
        if blocks.any():  # of a single block every resample is the same: that says nothing
            score.wer_interval, score.cer_interval = interval(wers[i]), interval(cers[i])
        score.insertion_rate = 100 * score.insertions / int(word_counts.sum())
        score.wer_by_speaker = _by_speaker(word_errors[i], word_counts, speakers)
    if len(scores) == 1 or not blocks.any():
        return scores, None
    roles = list(scores)
    return scores, Paired(
        first=roles[0],
        second=roles[-1],
        difference=scores[roles[0]].wer - scores[roles[-1]].wer,
        interval=interval(wers[0] - wers[-1]),
        probability_of_improvement=probability_of_improvement(wers[0], wers[-1]),
    )


def _percent(errors: np.ndarray, lengths: np.ndarray) -> float:
    return float(100 * errors.sum() / lengths.sum())


def _by_speaker(errors: np.ndarray, lengths: np.ndarray, speakers: list[str | None]) -> dict[str, float]:
    """WER in percent of the speakers that are known."""
    names = np.array([name or "" for name in speakers])
    known = sorted({name for name in speakers if name is not None})
    return {name: _percent(errors[names == name], lengths[names == name]) for name in known}
