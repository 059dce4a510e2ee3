"""Scores from manifests alone: neither model nor audio is needed, so that other normalizers cost seconds."""

import dataclasses
import json
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
from tqdm.auto import tqdm

from ..arguments import Normalizer
from ..data.languages import UNSPACED
from ..errors import UserError
from .bootstrap import RESAMPLES, SEED, blocks_of, interval, probability_of_improvement, resampled_rates
from .manifest import FOLDER, Manifest, Settings, all_values, check_comparable, read_manifests, role_order
from .metrics import UNIFIED, characters, normalize_pairs, normalizer_for, text_language
from .results import Paired, Results, Scores, SetResult
from .suites import UNTRANSCRIBED, is_untranscribed

SPELLING_FILE = "normalizer.json"  # beside the manifests, as it lies beside OpenAI's models
NO_REFERENCE = "no transcript"
EMPTIED = "reference empty after normalization"
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


def plain_words(text: str, language: str | None) -> str:
    """A text in lower case without punctuation: nothing that was said is taken out, as normalizers do with fillers.

    In languages without spaces every letter counts as a word.
    """
    kept = "".join(" " if unicodedata.category(letter)[0] in "PS" else letter for letter in text.lower())
    return " ".join("".join(kept.split()) if language in UNSPACED else kept.split())


def drop_reason(raw: str, reference: str) -> str | None:
    """Why a clip of a set with speech can't be scored, from its reference before and after normalization."""
    if is_untranscribed(raw):
        return UNTRANSCRIBED
    if not raw.strip():
        return NO_REFERENCE
    return None if reference else EMPTIED


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
    check_comparable(folder, sidecars)
    spelling = load_spelling(folder)
    every = [settings for roles in sidecars.values() for settings in roles.values()]
    models = {settings.role: dataclasses.replace(settings.facts, weights=settings.weights) for settings in every}
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
    names = dict.fromkeys(name for of_one in conditions for name in of_one)
    return {name: all_values(of_one[name] for of_one in conditions if name in of_one) for name in names}


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
    language = text_language(settings.set["task"], settings.set["language"])
    name, normalize = normalizer_for(normalizer, language, spelling)
    rows = {role: manifest.rows() for role, manifest in manifests.items()}
    some = next(iter(rows.values()))
    raw = [row["reference"] for row in some]
    pairs = {role: normalize_pairs(raw, [row["prediction"] for row in of], normalize) for role, of in rows.items()}
    references = next(iter(pairs.values()))[0]  # the same with every role
    dropped = [drop_reason(row["reference"], text) for row, text in zip(some, references, strict=True)]
    # manifests of older versions don't say: where no reference says anything nobody spoke
    no_speech = settings.set.get("no_speech")
    speech = any(reason in (None, EMPTIED) for reason in dropped) if no_speech is None else not no_speech
    silent = [i for i, reason in enumerate(dropped) if reason == NO_REFERENCE]
    if not speech:
        dropped = [reason if reason == UNTRANSCRIBED else None for reason in dropped]
    kept = [i for i, reason in enumerate(dropped) if reason is None]
    counts = dict(Counter(reason for reason in dropped if reason is not None))
    if not kept:
        raise UserError(f"{settings.set['name']}: no clip is left to score ({counts}); another --normalizer may help")
    scored = Scored(
        references=[references[i] for i in kept],
        predictions={role: [texts[i] for i in kept] for role, (_, texts) in pairs.items()},
        speakers=[some[i].get("speaker") for i in kept],
        seconds={role: sum(lines[i]["seconds"] for i in kept) for role, lines in rows.items()},
        by_letter=normalize.by_letter,
    )
    blocks, scores, paired = _scores(scored, speech, resamples)
    for role, score in scores.items():
        _add_plain_counts(score, rows[role], kept, silent, language)
        score.clips_at_limit = _at_limit([rows[role][i] for i in kept], sidecars[role])
    return SetResult(
        **{key: value for key, value in settings.set.items() if key != "no_speech"},
        method=settings.method,
        normalizer=name,
        clips=len(kept),
        dropped=settings.dropped | counts,
        hours=sum(some[i]["duration"] for i in kept) / 3600,
        reference_words=sum(len(text.split()) for text in scored.references),
        speech=speech,
        blocks=blocks,
        scores=scores,
        paired=paired,
        spelling=bool(spelling) if name in ("english", UNIFIED) else None,
        broken_words=name.startswith("basic") and any(_has_marks(some[i]["reference"]) for i in kept),
        silent_clips=len(silent),
    )


def _has_marks(text: str) -> bool:
    """Whether letters have combining marks that aren't one character with them, as vowel signs: basic drops these."""
    return any(unicodedata.category(letter)[0] == "M" for letter in unicodedata.normalize("NFKC", text))


def _at_limit(lines: list[dict[str, Any]], settings: Settings) -> int | None:
    """How many texts have as many tokens as there may be; None if nobody knows how many that are."""
    limit = settings.run.get("token_limit")
    return sum(line["tokens"] >= limit for line in lines) if isinstance(limit, int) else None


def _add_plain_counts(
    scores: Scores, lines: list[dict[str, Any]], kept: list[int], silent: list[int], language: str | None
) -> None:
    """What is counted in texts that no normalizer has touched."""
    plain = [plain_words(line["prediction"], language) for line in lines]
    texts = [plain[i] for i in kept]
    scores.repeated_5grams = repeated_ngrams(texts)
    scores.clips_with_text = sum(map(bool, texts))
    scores.silent_with_text = sum(bool(plain[i]) for i in silent)


@dataclass
class Scored:
    """The clips of a set that are scored, normalized.

    Attributes:
        predictions: by role.
        speakers: None where they aren't known.
        seconds: spent transcribing, by role.
        by_letter: whether every letter was made a word; the spaces between are no characters then.
    """

    references: list[str]
    predictions: dict[str, list[str]]
    speakers: list[str | None]
    seconds: dict[str, float]
    by_letter: bool

    def characters(self, texts: list[str]) -> list[str]:
        return [characters(text, self.by_letter) for text in texts]


def _scores(scored: Scored, speech: bool, resamples: int) -> tuple[str, dict[str, Scores], Paired | None]:
    """What the bootstrap draws, the scores of all roles, and the comparison of the first with the last of them."""
    words = {
        role: count_errors(jiwer.process_words(scored.references, texts)) for role, texts in scored.predictions.items()
    }
    scores = {
        role: Scores(
            wer=None,
            wer_interval=None,
            cer=None,
            cer_interval=None,
            substitutions=int(counts.substitutions.sum()),
            deletions=int(counts.deletions.sum()),
            insertions=int(counts.insertions.sum()),
            insertion_rate=None,
            repeated_5grams=0.0,
            clips_with_text=0,
            seconds=scored.seconds[role],
        )
        for role, counts in words.items()
    }
    drawn, blocks = blocks_of(scored.speakers)
    paired = _rates(scored, words, scores, blocks, resamples) if speech else None
    return drawn, scores, paired


def _rates(
    scored: Scored, words: dict[str, Errors], scores: dict[str, Scores], blocks: np.ndarray, resamples: int
) -> Paired | None:
    """Fill in the error rates of a set with speech."""
    word_counts = np.array([len(text.split()) for text in scored.references])
    characters = scored.characters(scored.references)
    character_counts = np.array([len(text) for text in characters])
    word_errors = np.stack([counts.total for counts in words.values()])
    character_errors = np.stack(
        [
            count_errors(jiwer.process_characters(characters, scored.characters(texts))).total
            for texts in scored.predictions.values()
        ]
    )
    wers = resampled_rates(word_errors, word_counts, blocks, resamples)
    cers = resampled_rates(character_errors, character_counts, blocks, resamples)
    for i, score in enumerate(scores.values()):
        score.wer = _percent(word_errors[i], word_counts)
        score.cer = _percent(character_errors[i], character_counts)
        if blocks.any():  # of a single block every resample is the same: that says nothing
            score.wer_interval, score.cer_interval = interval(wers[i]), interval(cers[i])
        score.insertion_rate = 100 * score.insertions / int(word_counts.sum())
        score.wer_by_speaker = _by_speaker(word_errors[i], word_counts, scored.speakers)
    if len(scores) == 1 or not blocks.any():
        return None
    roles = list(scores)
    return Paired(
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
