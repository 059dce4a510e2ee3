"""Evaluation results as plain data: the contents of `results.json`, read by the tables, the report and the model card.

A field without a measured value is None or absent. Nothing is estimated.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..json_files import OLD_KEYS, from_json, read_json, write_json

CONFIDENCE = 0.95  # level of all confidence intervals


@dataclass
class EvaluatedModel:
    """One of the compared models.

    Attributes:
        name: the directory or Hub id it was loaded from.
        size_mb: size of the weight files in MB (10^6 bytes); None if they aren't stored locally.
        stored_dtype: dtype of the floating-point weights in these files, such as `float16`; None if they aren't stored
            locally.
        weights: digest of the evaluated weights; None if unknown.
    """

    name: str
    parameters: int
    size_mb: float | None
    encoder_layers: int
    decoder_layers: int
    stored_dtype: str | None = None
    weights: str | None = None


@dataclass
class Scores:
    """Scores of one model on one set. Texts are normalized unless stated otherwise.

    Attributes:
        wer, cer: corpus-level error rates in percent. None for a set without speech.
        wer_confidence_interval, cer_confidence_interval: in percent, by bootstrap over `SetResult.bootstrap_unit`;
            None if there is only one unit.
        substitutions, deletions, insertions: word counts over the corpus.
        insertion_rate: insertions per 100 reference words.
        repeated_5grams: share of the predictions' word 5-grams that occur earlier in the same prediction, in percent.
            Counted in lower-case text without punctuation, for every normalizer: a normalizer may delete a loop.
        no_speech_hallucinations: number of `SetResult.no_speech_clips` for which the model wrote any word, in
            lower-case text without punctuation.
        wer_by_speaker: WER of each speaker in percent; empty if speakers are unknown.
        clips_at_limit: number of clips whose text was cut off at the token limit; None if unknown, as for clips
            transcribed through the pipeline.
    """

    wer: float | None
    wer_confidence_interval: tuple[float, float] | None
    cer: float | None
    cer_confidence_interval: tuple[float, float] | None
    substitutions: int
    deletions: int
    insertions: int
    insertion_rate: float | None
    repeated_5grams: float
    no_speech_hallucinations: int = 0
    wer_by_speaker: dict[str, float] = field(default_factory=dict)
    clips_at_limit: int | None = None


@dataclass
class PairedComparison:
    """Paired bootstrap of two models on the same clips of a set.

    Attributes:
        system, baseline: roles, as in `SetResult.scores`.
        wer_difference: WER of the system minus WER of the baseline, in points. Negative if the system is better.
        confidence_interval: of the difference, in points.
        probability_of_improvement: share of the resamples in which the system has the lower WER; ties count half.
    """

    system: str
    baseline: str
    wer_difference: float
    confidence_interval: tuple[float, float]
    probability_of_improvement: float


@dataclass
class SetResult:
    """All models on one set of clips.

    Attributes:
        name: name in tables and reports, such as `librispeech-test-other`.
        on_hub: whether `dataset` is a Hub id. Otherwise it is a path, which must not be published.
        language: language of the speech, as a code such as `en`.
        task: `transcribe`, or `translate` with English references.
        method: `short_form` (clips up to 30 s, batched), or a long-form algorithm: `sequential`, `chunked`.
        normalizer: name from `metrics.normalizer_for`: english-unified, multilingual, english, basic,
            open-asr-leaderboard or none; "multilingual, by letter" and "basic, by letter" in languages without
            spaces.
        clips: number of scored clips.
        excluded: number of clips that weren't scored, by reason.
        hours: total duration of the scored clips.
        reference_words: number of words after normalization; 0 for a set without speech.
        has_speech: False if no clip has speech (`DatasetSpec.no_speech`); then only `no_speech_hallucinations` is
            meaningful.
        bootstrap_unit: what the bootstrap resamples: `speaker` or `clip`.
        scores: by role (`student`, `teacher`, ...).
        comparison: the first model against the last one; None with one model or one bootstrap unit.
        spelling_normalizer: whether Whisper's English normalizer had a list of British and American spellings, which
            is part of a model; None for other normalizers.
        has_combining_marks: whether the basic normalizer was applied to references with combining marks, such as the
            vowel signs of Hindi. It removes these marks, which splits words.
        no_speech_clips: number of clips with an empty reference. In a set with speech they are excluded from the WER.
    """

    name: str
    dataset: str
    config: str | None
    split: str
    language: str | None
    method: str
    normalizer: str
    clips: int
    excluded: dict[str, int]
    hours: float
    reference_words: int
    has_speech: bool
    bootstrap_unit: str
    scores: dict[str, Scores]
    comparison: PairedComparison | None = None
    on_hub: bool = False
    task: str = "transcribe"
    spelling_normalizer: bool | None = None
    has_combining_marks: bool = False
    no_speech_clips: int = 0

    @property
    def normalizer_name(self) -> str:
        """The normalizer, and whether it had a spelling list."""
        if self.spelling_normalizer is None:
            return self.normalizer
        return f"{self.normalizer}, {'with' if self.spelling_normalizer else 'no'} spelling list"


@dataclass
class Timing:
    """Seconds for all clips: median, minimum and maximum over the interleaved repetitions."""

    median: float
    lowest: float
    highest: float


@dataclass
class ModelSpeed:
    """One model at one batch size.

    Attributes:
        encoder, decoder, total: seconds for all clips, without audio decoding and feature extraction.
        latency: median seconds per batch.
        rtfx: inverse real-time factor: seconds of audio transcribed per second.
        tokens: number of tokens generated for all clips.
        peak_memory_mb: in MB (10^6 bytes): the weights plus what the batch with the most tokens allocates; None if it
            can't be measured.
        speedup: time of the last model (the teacher) / time of this one; median over the repetitions.
    """

    role: str
    batch_size: int
    encoder: Timing
    decoder: Timing
    total: Timing
    latency: float
    rtfx: float
    tokens: int
    peak_memory_mb: float | None
    speedup: float | None

    def __post_init__(self):
        self.role = OLD_KEYS.get(self.role, self.role)


@dataclass
class Speed:
    """Speed of all models on the same clips, measured in one interleaved run with greedy decoding.

    Attributes:
        audio_seconds: total duration of the clips.
    """

    set: str
    clips: int
    audio_seconds: float
    repetitions: int
    device: str
    dtype: str
    threads: int
    attention: str
    rows: list[ModelSpeed]


@dataclass
class Speculative:
    """Speculative decoding with the student as the `assistant_model` of its teacher, one clip at a time.

    Attributes:
        identical: number of clips with exactly the teacher's tokens.
        acceptance_rate: share of the student's proposed tokens that the teacher accepted.
        speedup: over the teacher alone, greedy, batch size 1, interleaved; median over the repetitions.
    """

    set: str
    clips: int
    identical: int
    acceptance_rate: float
    speedup: float
    teacher: Timing
    assisted: Timing


@dataclass
class Results:
    """An evaluation.

    Attributes:
        models: by role, the evaluated model (`student`) first, the `teacher` last.
        settings: decoding settings and environment: device, dtype, batch size, beams, token limit, versions, date.
        manifests: directory of the manifests, relative to that of `results.json`.
    """

    models: dict[str, EvaluatedModel]
    settings: dict[str, Any]
    sets: list[SetResult] = field(default_factory=list)
    speed: Speed | None = None
    speculative: Speculative | None = None
    manifests: str = "manifests"

    def save(self, path: Path) -> None:
        """Write the results as JSON."""
        write_json(path, self)

    def keep_measurements(self, earlier: "Results") -> None:
        """Copy speed measurements that `self` lacks from an earlier evaluation of the same weights."""

        def same_weights(*roles: str) -> bool:
            then, now = ([of.models[role].weights for role in roles if role in of.models] for of in (earlier, self))
            return then == now and len(now) == len(roles) and None not in now

        if self.speed is None and earlier.speed and same_weights(*{row.role for row in earlier.speed.rows}):
            self.speed = earlier.speed
        if self.speculative is None and earlier.speculative is not None and same_weights("student", "teacher"):
            self.speculative = earlier.speculative

    @classmethod
    def load(cls, path: Path) -> "Results":
        """Read what `save` wrote, in this or an earlier version."""
        data = read_json(path)
        for entry in data["sets"]:
            _upgrade(entry)
        return from_json(cls, data)


def _upgrade(entry: dict[str, Any]) -> None:
    """Change a set in `results.json` of an earlier version to that of this one, apart from the names of fields."""
    if entry["method"] == "short":
        entry["method"] = "short_form"
    for scores in entry["scores"].values():
        scores.pop("seconds", None)
        with_text = scores.pop("clips_with_text", None)
        if with_text is not None and not entry.get("speech", entry.get("has_speech")):
            entry["no_speech_clips"], scores["no_speech_hallucinations"] = entry["clips"], with_text
