"""The options of `askd-hf evaluate`: every field is one, its help is its documentation."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from ..arguments import NORMALIZER_HELP, Normalizer
from ..arguments.ranges import COUNT, NOT_NEGATIVE, POSITIVE, check_ranges
from ..arguments.renamed import accepts_renamed
from ..errors import UserError
from .bootstrap import RESAMPLES
from .metrics import normalizer_for, text_language
from .suites import SUITE_NAMES, EvalSet, language_code, suite_sets
from .transcribe import Decoding


@dataclass
class DecodingArguments:
    """How clips are decoded, whatever for."""

    _argument_group_name = "decoding"

    device: str | None = field(default=None, metadata={"help": "cpu, cuda, cuda:1... Default: a GPU if there is one."})
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = field(
        default="auto", metadata={"help": "Weights while decoding. auto: float16 on a GPU, float32 on a CPU."}
    )
    attn_implementation: str = field(
        default="sdpa", metadata={"help": "Attention of the models: sdpa, eager, flash_attention_2."}
    )
    batch_size: int = field(default=16, metadata={"help": "Clips at a time."})
    generation_max_length: int | None = field(
        default=None, metadata={"help": "Tokens of a clip, at most. Default: what the model's generation config says."}
    )
    num_workers: int | None = field(
        default=None,
        metadata={"help": "Processes that decode audio and compute features. Default: 4 with a GPU, else none."},
    )

    def __post_init__(self):
        if self.num_workers is None:
            self.num_workers = 4 if torch.accelerator.is_available() else 0
        check_ranges(self, batch_size=COUNT, generation_max_length=COUNT, num_workers=NOT_NEGATIVE)
        if self.device is None:
            self.device = str(torch.accelerator.current_accelerator() or "cpu")
        check_device(self.device)

    def torch_dtype(self) -> torch.dtype:
        if self.dtype == "auto":
            return torch.float32 if torch.device(self.device).type == "cpu" else torch.float16
        return getattr(torch, self.dtype)


def check_device(name: str) -> None:
    """Raise `UserError` unless torch has such a device here."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--device {name}: {reason}; leave it out for the GPU, or the CPU without one") from error


@accepts_renamed
@dataclass
class EvaluationArguments(DecodingArguments):
    """The models, the speech, and what to find out."""

    _argument_group_name = "evaluation"

    model: str | None = field(
        default=None, metadata={"help": "Whisper model to evaluate, the student: a local directory or a Hub id."}
    )
    teacher: str | None = field(default=None, metadata={"help": "Model to compare it with, as a rule its teacher."})
    suite: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"Named sets, several if you like: {', '.join(SUITE_NAMES)}. open-asr is LibriSpeech, AMI, "
            "Earnings-22 and TED-LIUM; common-voice and fleurs are of one --language."
        },
    )
    dataset: str | None = field(
        default=None,
        metadata={
            "help": "Your own speech, besides or instead of a suite: a directory with metadata.csv, a saved dataset, "
            "parquet, or a Hub id. In a clip whose transcript is empty nobody speaks; one without a transcript (null) "
            "is left out."
        },
    )
    no_speech: bool = field(
        default=False,
        metadata={"help": "Nobody speaks in --dataset (noises, music): any text is made up. It needs no transcripts."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of --dataset on the Hub."})
    eval_splits: list[str] = field(
        default_factory=list,
        metadata={"help": "Splits of --dataset, each a set. Default: train, the one of a directory without splits."},
    )
    audio_column_name: str | None = field(default=None, metadata={"help": "Column of --dataset with the audio."})
    text_column_name: str | None = field(default=None, metadata={"help": "Column of --dataset with the transcript."})
    speaker_column: str | None = field(
        default=None,
        metadata={"help": "Column of --dataset with the speaker. Default: found by name."},
    )
    language: str | None = field(
        default=None,
        metadata={"help": "Language of the speech, as in english or fr. Required for multilingual models."},
    )
    task: Literal["transcribe", "translate"] = field(
        default="transcribe",
        metadata={"help": "What multilingual models are asked to do with --dataset; translations are English."},
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on the first so many clips of each set only."}
    )
    on_bad_audio: Literal["error", "skip"] = field(
        default="error",
        metadata={"help": "A clip that can't be decoded: stop before evaluating, or skip and count it."},
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "For manifests, results and report. Default: runs/evaluation-NAME."}
    )
    overwrite: bool = field(
        default=False, metadata={"help": "Decode anew what other settings have made in --output_dir."}
    )
    score_only: bool = field(
        default=False,
        metadata={"help": "Score the manifests in --output_dir again, as with another --normalizer; decode nothing."},
    )
    normalizer: Normalizer = field(
        default="auto",
        metadata={"help": f"Texts are compared as normalized by this. {NORMALIZER_HELP}"},
    )
    resamples: int = field(default=RESAMPLES, metadata={"help": "Of the bootstrap, for the intervals."})
    num_beams: int = field(default=1, metadata={"help": "Beams of the search; 1 is greedy."})
    timestamps: Literal["none", "segment", "word"] = field(
        default="none",
        metadata={
            "help": "Also write to the manifests when segments or words are said (chunks). Texts may differ a little "
            "from those without."
        },
    )
    long_form: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Also evaluate clips that are longer than the model hears at once (30 s): sequential, chunked or "
            "both. Without it they are left out and counted."
        },
    )
    join_clips: float | None = field(
        default=None,
        metadata={
            "help": "For --long_form: make recordings of about so many seconds of a speaker's clips in a row. Longer "
            "than a window (30 s)."
        },
    )
    speed: bool = field(default=False, metadata={"help": "Measure speed and memory of the models, taking turns."})
    speculative: bool = field(
        default=False, metadata={"help": "Measure speculative decoding of the teacher with the student's help."}
    )
    speed_clips: int = field(
        default=32, metadata={"help": "Clips of the first set that --speed and --speculative take, spread over it."}
    )
    speed_batch_sizes: list[int] = field(
        default_factory=lambda: [1, 16],
        metadata={"help": "Clips a batch of --speed; all models at each. At most as many as there are."},
    )
    repetitions: int = field(default=5, metadata={"help": "Timed passes of --speed and --speculative."})

    def __post_init__(self):
        check_ranges(self, num_beams=COUNT, resamples=COUNT, speed_clips=COUNT, repetitions=COUNT, join_clips=POSITIVE)
        check_ranges(self, "leave it out for all clips", max_eval_samples=COUNT)
        if self.score_only:
            if self.output_dir is None:
                raise UserError("--score_only scores what is in --output_dir: which?")
            return
        if self.model is None:
            raise UserError("--model is missing: a Whisper model to evaluate")
        if not (self.suite or self.dataset):
            raise UserError(f"--suite or --dataset is missing. Suites: {', '.join(SUITE_NAMES)}")
        if self.no_speech and not self.dataset:
            raise UserError("--no_speech says that nobody speaks in --dataset, which is missing")
        if unknown := set(self.long_form) - {"sequential", "chunked"}:
            raise UserError(f"--long_form {' '.join(sorted(unknown))}: there are sequential and chunked")
        if self.join_clips is not None and not self.long_form:
            raise UserError("--join_clips makes recordings for --long_form: give sequential, chunked or both")
        if self.speculative and self.teacher is None:
            raise UserError("--speculative needs the --teacher, whose text the student speeds up")
        if not self.speed_batch_sizes or min(self.speed_batch_sizes) < 1:
            raise UserError(
                f"--speed_batch_sizes {' '.join(map(str, self.speed_batch_sizes))}: not all are at least 1"
            )
        super().__post_init__()
        normalizer_for(self.normalizer, text_language(self.task, self.language), {})  # may not be there, or not for it
        if self.output_dir is None:
            self.output_dir = f"runs/evaluation-{_last_part(self.model)}"

    def sets(self) -> list[EvalSet]:
        """All that is asked for, a set once. Raises `UserError` if two sets would have one name."""
        sets = [source for name in self.suite for source in suite_sets(name, self.language)]
        if self.dataset:
            for split in self.eval_splits or ["train"]:
                sets.append(self._own_set(split))
        named: dict[str, EvalSet] = {}
        for source in sets:
            if named.setdefault(source.name, source) != source:
                raise UserError(f"two different sets are called {source.name}: evaluate them with two --output_dir")
        return list(named.values())

    def _own_set(self, split: str) -> EvalSet:
        parts = [_last_part(self.dataset), self.dataset_config, None if split == "train" else split]
        name = "-".join(part for part in parts if part)
        return EvalSet(
            re.sub(r"[^\w.-]+", "-", name).strip("-"),
            self.dataset,
            self.dataset_config,
            split,
            self.text_column_name,
            self.audio_column_name,
            self.speaker_column,
            language_code(self.language),
            self.task,
            self.no_speech,
        )

    def decoding(self) -> Decoding:
        return Decoding(self.num_beams, self.generation_max_length, self.timestamps, self.batch_size, self.num_workers)


def _last_part(name: str) -> str:
    """What to call a directory, file or Hub id: `.` by the directory's name."""
    return Path(os.path.abspath(name)).name
