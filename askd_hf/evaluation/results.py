"""Evaluation results as plain data: the contents of `results.json`, read by the tables, the report and the model card.

A field without a measured value is None or absent. Nothing is estimated.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.json_files import OLD_KEYS, from_json, read_json, write_json

CONFIDENCE = 0.95  # level of all confidence intervals


# role of the student that takes each batch at the audio context of its longest clip, not at its whole window
CLIP_CONTEXT = "student at clip context"


@dataclass
class EvaluatedModel:
    """One of the compared models."""

    name: str  # the directory or Hub id it was loaded from
    parameters: int
    size_mb: float | None  # size of the weight files in MB (10^6 bytes); None if they aren't stored locally
    encoder_layers: int
    decoder_layers: int
    # dtype of the floating-point weights in these files, such as `float16`; None if they aren't stored locally
    stored_dtype: str | None = None
    weights: str | None = None  # digest of the evaluated weights; None if unknown
    window: float | None = None  # audio window in seconds; None in results of earlier versions
    vocabulary: int | None = None  # number of tokens; None in results of earlier versions


@dataclass
class WordTimes:
    """Starts and ends of words against those of the last model, the teacher."""

    words: int  # number of words that both models have written
    error: float  # mean absolute difference of starts and ends in seconds
    # within_100ms, within_200ms: share of the starts and ends whose difference is at most 0.1 or 0.2 s, in percent
    within_100ms: float
    within_200ms: float


@dataclass
class Scores:
    """Scores of one model on one set. Texts are normalized unless stated otherwise."""

    # wer, cer: corpus-level error rates in percent. None for a set without speech.
    wer: float | None
    # wer_confidence_interval, cer_confidence_interval: in percent, by bootstrap over `SetResult.bootstrap_unit`; None
    # if there is only one unit
    wer_confidence_interval: tuple[float, float] | None
    cer: float | None
    cer_confidence_interval: tuple[float, float] | None
    # substitutions, deletions, insertions: word counts over the corpus
    substitutions: int
    deletions: int
    insertions: int
    insertion_rate: float | None  # insertions per 100 reference words
    # share of the predictions' word 5-grams that occur earlier in the same prediction, in percent. Counted in
    # lower-case text without punctuation, for every normalizer: a normalizer may delete a loop.
    repeated_5grams: float
    # number of `SetResult.no_speech_clips` for which the model wrote any word, in lower-case text without punctuation
    no_speech_hallucinations: int = 0
    # wer with at most all words of a clip as errors, so that no loop decides it. None for a set without speech, and in
    # results of earlier versions.
    capped_wer: float | None = None
    # number of clips with more than twice the reference's words and 10; None in results of earlier versions
    loops: int | None = None
    # WER of each speaker in percent; empty if speakers are unknown
    wer_by_speaker: dict[str, float] = field(default_factory=dict)
    # number of clips whose text was cut off at the token limit; None if unknown, as for clips transcribed through the
    # pipeline
    clips_at_limit: int | None = None
    # None without word timestamps, for the last model, and if no words agree
    word_times: WordTimes | None = None


@dataclass
class PairedComparison:
    """Paired bootstrap of two models on the same clips of a set."""

    # system, baseline: roles, as in `SetResult.scores`
    system: str
    baseline: str
    wer_difference: float  # WER of the system minus WER of the baseline, in points. Negative if the system is better.
    confidence_interval: tuple[float, float]  # of the difference, in points
    probability_of_improvement: float  # share of the resamples in which the system has the lower WER; ties count half


@dataclass
class LongClips:
    """Clips that no model has transcribed, as they are longer than a window or `--max_duration_in_seconds`."""

    seconds: float  # the longest that were transcribed may have
    clips: int
    of_clips: int  # number of clips of the set, these included
    text_share: float  # share of the set's transcripts that they have, in percent of the characters
    speakers: list[str]  # those with no other clips, sorted


@dataclass
class SetResult:
    """All models on one set of clips."""

    name: str  # name in tables and reports, such as `librispeech-test-other`
    dataset: str
    config: str | None
    split: str
    language: str | None  # language of the speech, as a code such as `en`
    method: str  # `short_form` (clips up to 30 s, batched), or a long-form algorithm: `sequential`, `chunked`
    # name from `metrics.normalizer_for`: english-unified, multilingual, english, basic, open-asr-leaderboard or none;
    # "multilingual, by letter" and "basic, by letter" in languages without spaces
    normalizer: str
    clips: int  # number of scored clips
    excluded: dict[str, int]  # number of clips that weren't scored, by reason
    hours: float  # total duration of the scored clips
    reference_words: int  # number of words after normalization; 0 for a set without speech
    # False if no clip has speech (`DatasetSpec.no_speech`); then only `no_speech_hallucinations` is meaningful
    has_speech: bool
    bootstrap_unit: str  # what the bootstrap resamples: `speaker` or `clip`
    scores: dict[str, Scores]  # by role (`student`, `teacher`, ...)
    # the first model against the last one; None with one model or one bootstrap unit
    comparison: PairedComparison | None = None
    on_hub: bool = False  # whether `dataset` is a Hub id. Otherwise it is a path, which must not be published.
    task: str = "transcribe"  # `transcribe`, or `translate` with English references
    # whether Whisper's English normalizer had a list of British and American spellings, which is part of a model; None
    # for other normalizers
    spelling_normalizer: bool | None = None
    # whether the basic normalizer was applied to references with combining marks, such as the vowel signs of Hindi. It
    # removes these marks, which splits words.
    has_combining_marks: bool = False
    # number of clips with an empty reference. In a set with speech they are excluded from the WER.
    no_speech_clips: int = 0
    # those of `excluded` that are too long; None if there are none, and in results of earlier versions
    long_clips: LongClips | None = None

    @property
    def normalizer_name(self) -> str:
        """The normalizer, and whether it had a spelling list."""
        if self.spelling_normalizer is None:
            return self.normalizer
        return f"{self.normalizer}, {'with' if self.spelling_normalizer else 'no'} spelling list"


def set_name(result: SetResult) -> str:
    """Return the name of a set, with its method and task unless they are short-form and transcribe."""
    details = [result.method] if result.method != "short_form" else []
    details += [result.task] if result.task != "transcribe" else []
    return ", ".join([result.name, *details])


@dataclass
class Timing:
    """Seconds for all clips: median, minimum and maximum over the interleaved repetitions."""

    median: float
    lowest: float
    highest: float


@dataclass
class ModelSpeed:
    """One model at one batch size."""

    role: str
    batch_size: int
    # encoder, decoder, total: seconds for all clips, without audio decoding and feature extraction
    encoder: Timing
    decoder: Timing
    total: Timing
    latency: float  # median seconds per batch
    rtfx: float  # inverse real-time factor: seconds of audio transcribed per second
    tokens: int  # number of tokens generated for all clips
    # in MB (10^6 bytes): the weights plus what the batch with the most tokens allocates; None if it can't be measured
    peak_memory_mb: float | None
    speedup: float | None  # time of the last model (the teacher) / time of this one; median over the repetitions

    def __post_init__(self):
        self.role = OLD_KEYS.get(self.role, self.role)


@dataclass
class PartLatency:
    """Median latency of the parts of one model, seconds per batch."""

    role: str
    batch_size: int
    threads: int
    tokens: int  # generated tokens per clip
    features: float  # log-mel features, computed clip by clip on the CPU
    encoder: float  # one pass over the window
    decoder: float  # the decoder layers, for all tokens
    projection: float  # the output projection, for all tokens

    @property
    def total(self) -> float:
        return self.features + self.encoder + self.decoder + self.projection


@dataclass
class Speed:
    """Speed of all models on the same clips, measured in one interleaved run with greedy decoding."""

    set: str
    clips: int
    audio_seconds: float  # total duration of the clips
    repetitions: int
    device: str
    dtype: str
    threads: int
    attention: str
    rows: list[ModelSpeed]
    parts: list[PartLatency] = field(default_factory=list)  # empty in results of earlier versions


@dataclass
class DraftLength:
    """Speculative decoding with one number of proposed tokens per step of the teacher."""

    num_assistant_tokens: int | None  # None in results of earlier versions
    identical: int  # number of clips with exactly the teacher's tokens
    acceptance_rate: float  # share of the student's proposed tokens that the teacher accepted
    speedup: float  # over the teacher alone, greedy, batch size 1, interleaved; median over the repetitions
    assisted: Timing
    speedup_range: tuple[float, float] | None = None  # lowest and highest over the repetitions


@dataclass
class Speculative:
    """Speculative decoding with the student as the `assistant_model` of its teacher, one clip at a time.

    `identical`, `acceptance_rate`, `speedup` and `assisted` are those of the number of proposed tokens with the
    highest speedup.
    """

    set: str
    clips: int
    identical: int
    acceptance_rate: float
    speedup: float
    teacher: Timing
    assisted: Timing
    num_assistant_tokens: int | None = None  # None in results of earlier versions
    # one entry per measured number of proposed tokens
    draft_lengths: list[DraftLength] = field(default_factory=list)
    # names of the clips whose tokens differ from the teacher's for any of the numbers
    differing: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.draft_lengths:  # results of an earlier version
            rates = (self.identical, self.acceptance_rate, self.speedup)
            self.draft_lengths = [DraftLength(self.num_assistant_tokens, *rates, self.assisted)]

    @property
    def best(self) -> DraftLength:
        """The entry with the highest speedup."""
        return max(self.draft_lengths, key=lambda length: length.speedup)

    @property
    def is_faster(self) -> bool:
        """Whether the teacher is faster with the student than alone, by the median of the best number of tokens."""
        return self.best.speedup > 1

    @property
    def is_clearly_faster(self) -> bool:
        """Whether it is faster in every repetition. False for results of earlier versions, without repetitions."""
        speedups = self.best.speedup_range
        return speedups is not None and speedups[0] > 1


@dataclass
class Results:
    """An evaluation."""

    models: dict[str, EvaluatedModel]  # by role, the evaluated model (`student`) first, the `teacher` last
    # decoding settings and environment: device, dtype, batch size, beams, token limit, versions, date
    settings: dict[str, Any]
    sets: list[SetResult] = field(default_factory=list)
    speed: Speed | None = None
    speculative: Speculative | None = None
    manifests: str = "manifests"  # directory of the manifests, relative to that of `results.json`

    def save(self, path: Path) -> None:
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
