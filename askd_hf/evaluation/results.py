"""What an evaluation found, as plain data: `results.json`, which the table, the report and the model card read.

A field without a measured value is None or absent; nothing in here is ever a guess.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CONFIDENCE = 0.95  # of all intervals


@dataclass
class ModelFacts:
    """One model of the comparison.

    Attributes:
        name: the directory or Hub id it was loaded from.
        parameters: of the whole model.
        megabytes: of its weights' files on disk (10^6 bytes); None if they are no files here.
        encoder_layers, decoder_layers: how many.
        stored_dtype: of the floating-point weights in these files, such as `float16`; None if they are no files here.
        weights: digest of the weights that were evaluated; None where it wasn't noted.
    """

    name: str
    parameters: int
    megabytes: float | None
    encoder_layers: int
    decoder_layers: int
    stored_dtype: str | None = None
    weights: str | None = None


@dataclass
class Scores:
    """One model on one set, texts normalized unless it says otherwise.

    Attributes:
        wer, cer: percent, corpus level. None for a set without speech.
        wer_interval, cer_interval: percent, by bootstrap over `SetResult.blocks`; None if there is only one of them.
        substitutions, deletions, insertions: of words, over the corpus.
        insertion_rate: insertions over the references' words, percent.
        repeated_5grams: share of the predictions' word 5-grams that stand earlier in the same prediction, percent; of
            texts in lower case without punctuation, whatever the normalizer, as a normalizer may delete a loop.
        clips_with_text: how many clips got any text, in the same form; in a set without speech all of them are
            hallucinations.
        wer_by_speaker: percent; empty where speakers aren't known.
        seconds: spent transcribing, for information: speed is measured apart, see `Speed`.
        clips_at_limit: how many clips' text was still going on at the limit of tokens; None where it isn't known, as
            of what the pipeline transcribes.
        silent_with_text: how many of `SetResult.silent_clips` got any text.
    """

    wer: float | None
    wer_interval: tuple[float, float] | None
    cer: float | None
    cer_interval: tuple[float, float] | None
    substitutions: int
    deletions: int
    insertions: int
    insertion_rate: float | None
    repeated_5grams: float
    clips_with_text: int
    seconds: float
    wer_by_speaker: dict[str, float] = field(default_factory=dict)
    clips_at_limit: int | None = None
    silent_with_text: int = 0


@dataclass
class Paired:
    """Two models on the same clips of a set, by paired bootstrap.

    Attributes:
        first, second: roles, as in `SetResult.scores`.
        difference: WER of the first less that of the second, points. Below 0 the first is better.
        interval: of the difference.
        probability_of_improvement: that the first has the lower WER: share of the resamples (ties count half).
    """

    first: str
    second: str
    difference: float
    interval: tuple[float, float]
    probability_of_improvement: float


@dataclass
class SetResult:
    """All models on one set of clips.

    Attributes:
        name: as reports call it, such as `librispeech-test-other`.
        dataset, config, split: where it was loaded from.
        on_hub: whether `dataset` is a Hub id; otherwise it is a path, which nothing that is published may show whole.
        language: spoken, as a code such as `en`.
        task: transcribe, or translate, into English.
        method: `short` (clips up to 30 s, batched), or long-form: `sequential`, `chunked`.
        normalizer: as `metrics.normalizer_for` names it: english-unified, multilingual, english, basic,
            open-asr-leaderboard or none; multilingual and basic "by letter" in languages without spaces.
        clips: scored.
        dropped: clips that weren't scored, by reason.
        hours: of audio, of the scored clips.
        reference_words: after normalization; 0 for a set without speech.
        speech: False if nobody speaks in any clip (`EvalSet.no_speech`): then only `clips_with_text` says something.
        blocks: what the bootstrap draws: `speaker` or `clip`.
        scores: by role (`student`, `teacher`, ...).
        spelling: whether Whisper's English normalizer had a list of British and American words, which comes with a
            model; None for other normalizers.
        broken_words: whether words of the references have combining marks, such as the vowel signs of Hindi: the
            basic normalizer breaks them up there.
        silent_clips: clips with an empty reference as it stands in the dataset, in a set with speech as well, where
            they count as dropped.
    """

    name: str
    dataset: str
    config: str | None
    split: str
    language: str | None
    method: str
    normalizer: str
    clips: int
    dropped: dict[str, int]
    hours: float
    reference_words: int
    speech: bool
    blocks: str
    scores: dict[str, Scores]
    paired: Paired | None = None
    on_hub: bool = False
    task: str = "transcribe"
    spelling: bool | None = None
    broken_words: bool = False
    silent_clips: int = 0

    @property
    def normalizer_name(self) -> str:
        """The normalizer, and whether it had a spelling list."""
        if self.spelling is None:
            return self.normalizer
        return f"{self.normalizer}, {'with' if self.spelling else 'no'} spelling list"


@dataclass
class Timing:
    """Seconds for all clips of the measurement: over its interleaved repetitions."""

    median: float
    lowest: float
    highest: float


@dataclass
class SpeedOfModel:
    """One model at one batch size.

    Attributes:
        encoder, decoder, total: seconds for all clips; audio decoding and features are not counted.
        latency: seconds a batch (a clip at batch size 1), median.
        rtfx: seconds of audio transcribed in a second.
        tokens: generated for all clips.
        peak_memory_mb: 10^6 bytes: the weights, and what the batch with the most tokens takes above them; None where
            it can't be told.
        times_faster: than the last model of the comparison (the teacher), by total; median of the repetitions' ratios.
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
    times_faster: float | None


@dataclass
class Speed:
    """All models on the same clips in one interleaved run, with greedy decoding."""

    set: str
    clips: int
    audio_seconds: float
    repetitions: int
    device: str
    dtype: str
    threads: int
    attention: str
    rows: list[SpeedOfModel]


@dataclass
class Speculative:
    """The student as `assistant_model` of its teacher, clip by clip.

    Attributes:
        identical: clips with exactly the teacher's tokens.
        acceptance_rate: share of the student's proposed tokens that the teacher kept.
        times_faster: than the teacher alone, greedy, batch 1, interleaved; median of the repetitions' ratios.
    """

    set: str
    clips: int
    identical: int
    acceptance_rate: float
    times_faster: float
    teacher: Timing
    assisted: Timing


@dataclass
class Results:
    """An evaluation.

    Attributes:
        models: by role, the model under test (`student`) first, the `teacher` last.
        settings: how it was decoded and where: device, dtype, batch size, beams, token limit, versions, date.
        manifests: directory of the manifests, relative to that of `results.json`.
    """

    models: dict[str, ModelFacts]
    settings: dict[str, Any]
    sets: list[SetResult] = field(default_factory=list)
    speed: Speed | None = None
    speculative: Speculative | None = None
    manifests: str = "manifests"

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False, allow_nan=False)
        unfinished = path.with_name(f"{path.name}.tmp")
        unfinished.write_text(text + "\n", encoding="utf-8")
        unfinished.replace(path)  # whole or not at all: the next run reads it

    def keep_measurements(self, earlier: "Results") -> None:
        """Take over what an earlier run has measured of the same weights, and this one hasn't."""

        def same(*roles: str) -> bool:
            then, now = ([of.models[role].weights for role in roles if role in of.models] for of in (earlier, self))
            return then == now and len(now) == len(roles) and None not in now

        if self.speed is None and earlier.speed is not None and same(*{row.role for row in earlier.speed.rows}):
            self.speed = earlier.speed
        if self.speculative is None and earlier.speculative is not None and same("student", "teacher"):
            self.speculative = earlier.speculative

    @classmethod
    def load(cls, path: Path) -> "Results":
        """Read what `save` wrote."""
        data = json.loads(path.read_text(encoding="utf-8"))
        data["models"] = {role: ModelFacts(**facts) for role, facts in data["models"].items()}
        data["sets"] = [_set_result(entry) for entry in data["sets"]]
        if data["speed"] is not None:
            data["speed"] = _speed(data["speed"])
        if data["speculative"] is not None:
            data["speculative"] = _with_timings(Speculative, data["speculative"], "teacher", "assisted")
        return cls(**data)


def _set_result(data: dict[str, Any]) -> SetResult:
    scores = {role: Scores(**_with_intervals(scores)) for role, scores in data["scores"].items()}
    paired = None if data["paired"] is None else Paired(**_with_intervals(data["paired"]))
    return SetResult(**{**data, "scores": scores, "paired": paired})


def _speed(data: dict[str, Any]) -> Speed:
    rows = [_with_timings(SpeedOfModel, row, "encoder", "decoder", "total") for row in data["rows"]]
    return Speed(**{**data, "rows": rows})


def _with_timings(kind: type, data: dict[str, Any], *names: str) -> Any:
    return kind(**{**data, **{name: Timing(**data[name]) for name in names}})


def _with_intervals(data: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists where the dataclasses have tuples."""
    return {name: tuple(value) if name.endswith("interval") and value else value for name, value in data.items()}
