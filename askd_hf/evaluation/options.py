"""The options of `askd-hf evaluate`. Each field is an option, documented by its help.

What the options need beyond their help, torch and `datasets` among it, is imported when it is used.
"""

import math
import os
import re
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from transformers.hf_argparser import HfArg

from ..arguments import NORMALIZER_HELP, Normalizer
from ..arguments.machine import default_workers
from ..arguments.ranges import COUNT, NOT_NEGATIVE, POSITIVE, Range, check_ranges
from ..arguments.renamed import accepts_renamed
from ..errors import UserError
from .suites import SUITE_NAMES, DatasetSpec, suite_sets

if TYPE_CHECKING:
    import torch

    from .transcribe import Decoding

N_RESAMPLES = 10_000
ASSISTANT_TOKENS = (1, 2, 4, 8)  # numbers of proposed tokens that are measured by default
LONG_FORM_METHODS = ("sequential", "chunked")


@dataclass
class DecodingArguments:
    """Decoding options, shared with `askd-hf pseudo-label`."""

    _argument_group_name = "decoding"

    device: str | None = HfArg(default=None, help="cpu, cuda, cuda:1, ... Default: a GPU if available, else the CPU.")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = HfArg(
        default="auto", help="Dtype of the weights. auto: float16 on a GPU, float32 on a CPU."
    )
    attn_implementation: str = HfArg(default="sdpa", help="Attention implementation: sdpa, eager, flash_attention_2.")
    batch_size: int = HfArg(default=16, help="Clips per batch.")
    generation_max_length: int | None = HfArg(
        default=None, help="Maximum number of tokens per clip. Default: from the model's generation config."
    )
    num_workers: int | None = HfArg(
        default=None,
        help="Processes that decode audio and compute features. Default: with a GPU its share of the cores less one, "
        "at most 8, else 0.",
    )
    recheck: bool = HfArg(
        default=False,
        help="Decode every clip again to check it. Default: a file is decoded once; later runs use what was found "
        "(kept in HF_HOME/askd_hf) as long as its path, size and time of change are the same.",
    )

    check_workers: int | None = field(init=False, default=None)

    def __post_init__(self):
        import torch

        self.check_workers = self.num_workers  # of the check of the clips, which is fast in several processes
        if self.num_workers is None:
            self.num_workers = default_workers() if torch.accelerator.is_available() else 0
        check_ranges(self, batch_size=COUNT, generation_max_length=COUNT, num_workers=NOT_NEGATIVE)
        if self.device is None:
            self.device = str(torch.accelerator.current_accelerator() or "cpu")
        check_device(self.device)

    def start_processes(self) -> None:
        """Let the processes that `accelerate launch` has started know of each other, each with a GPU of its own."""
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            from accelerate import PartialState
            from transformers import TrainingArguments

            timeout = timedelta(seconds=TrainingArguments.ddp_timeout)  # torch's own is shorter with NCCL
            device = PartialState(cpu=self.device == "cpu", timeout=timeout).device
            # to "cpu:0" the weights would be copied, and with another alignment the last bit of a sum may differ
            self.device = "cpu" if device.type == "cpu" else str(device)

    def torch_dtype(self) -> "torch.dtype":
        """Return the dtype of `--dtype`; "auto" depends on the device."""
        import torch

        if self.dtype == "auto":
            return torch.float32 if torch.device(self.device).type == "cpu" else torch.float16
        return getattr(torch, self.dtype)


def check_device(name: str) -> None:
    """Raise `UserError` unless torch supports the device on this machine."""
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--device {name}: {reason}. Remove it to use the GPU if available, else the CPU") from error


@accepts_renamed
@dataclass
class EvaluationArguments(DecodingArguments):
    """Models, data and measurements."""

    _argument_group_name = "evaluation"

    model: str | None = HfArg(
        default=None, help="Whisper model to evaluate (the student): a local directory or a Hub id."
    )
    teacher: str | None = HfArg(
        default=None, help="Model to compare it with, usually its teacher: a local directory or a Hub id."
    )
    clip_context: bool = HfArg(
        default=False,
        help="Also evaluate the student at the audio context of each batch: its longest clip and 0.64 s. For a model "
        "trained with a range of --window_seconds.",
    )
    suite: list[str] = HfArg(
        default_factory=list,
        help=f"One or more named sets: {', '.join(SUITE_NAMES)}. open-asr: LibriSpeech, AMI, Earnings-22 and "
        "TED-LIUM. common-voice and fleurs require --language.",
    )
    dataset: str | None = HfArg(
        default=None,
        help="Your own speech, in addition to --suite or instead of it: a directory with metadata.csv, a saved "
        "dataset, Parquet files, or a Hub id. An empty transcript means that the clip has no speech; a clip without a "
        "transcript (null) is excluded.",
    )
    no_speech: bool = HfArg(
        default=False,
        help="No clip of --dataset has speech (noise, music): any text counts as a hallucination. Transcripts are not "
        "required.",
    )
    dataset_config: str | None = HfArg(default=None, help="Configuration of --dataset, if it is on the Hub.")
    eval_splits: list[str] = HfArg(
        default_factory=list, help="Splits of --dataset; each is a set of its own. Default: train."
    )
    audio_column_name: str | None = HfArg(default=None, help="Audio column of --dataset. Default: found by its name.")
    text_column_name: str | None = HfArg(
        default=None, help="Transcript column of --dataset. Default: found by its name."
    )
    speaker_column: str | None = HfArg(default=None, help="Speaker column of --dataset. Default: found by its name.")
    language: str | None = HfArg(
        default=None, help="Language of the speech, such as english or fr. Required for multilingual models."
    )
    task: Literal["transcribe", "translate"] = HfArg(
        default="transcribe", help="Task of multilingual models on --dataset. translate: into English."
    )
    max_eval_samples: int | None = HfArg(default=None, help="Evaluate only the first N clips of each set.")
    max_duration_in_seconds: float = HfArg(
        default=math.inf,
        help="Exclude and count clips longer than this, in seconds, for results on the same clips as those of a model "
        "with a shorter window.",
    )
    on_bad_audio: Literal["error", "skip"] = HfArg(
        default="error",
        help="Clips that can't be decoded. error: stop before the evaluation; skip: exclude and count.",
    )
    output_dir: str | None = HfArg(
        default=None, help="Directory for manifests, results and report. Default: runs/evaluation-NAME."
    )
    overwrite: bool = HfArg(
        default=False, help="Decode again what was decoded with other settings in --output_dir, instead of stopping."
    )
    score_only: bool = HfArg(
        default=False, help="Only score the manifests in --output_dir again, for example with another --normalizer."
    )
    normalizer: Normalizer = HfArg(default="auto", help=f"Text normalizer, applied before scoring. {NORMALIZER_HELP}")
    n_resamples: int = HfArg(default=N_RESAMPLES, help="Number of bootstrap resamples for the confidence intervals.")
    num_beams: int = HfArg(default=1, help="Number of beams; 1 is greedy decoding.")
    no_repeat_ngram_size: int = HfArg(
        default=0, help="Against loops: no sequence of this many tokens occurs twice in a text. 0: off."
    )
    temperature_fallback: bool = HfArg(
        default=False,
        help="Against loops, as OpenAI's Whisper: decode a clip again at temperatures 0.2 to 1 while the compression "
        "ratio of its tokens exceeds 1.35 or its mean log-probability is below -1. Sampled with a fixed seed.",
    )
    timestamps: Literal["none", "segment", "word"] = HfArg(
        default="none",
        help="Also write timestamps of segments or words to the manifests (chunks). The texts may differ slightly "
        "from those without timestamps.",
    )
    long_form: list[str] = HfArg(
        default_factory=list,
        help="Also evaluate clips longer than the model's window: sequential, chunked or both. Without this option "
        "they are excluded and counted.",
    )
    concatenate_seconds: float | None = HfArg(
        default=None,
        help="Evaluate --long_form on recordings of up to this length, made of consecutive clips of a speaker. Must "
        "be greater than the model's window.",
    )
    speed: bool = HfArg(default=False, help="Measure speed and memory of all models, interleaved on the same clips.")
    speculative: bool = HfArg(
        default=False, help="Measure the teacher's speculative decoding with the student as assistant."
    )
    num_assistant_tokens: list[int] = HfArg(
        default_factory=lambda: [*ASSISTANT_TOKENS],
        help="Numbers of tokens that the student proposes at once in --speculative; each is measured.",
    )
    save_num_assistant_tokens: bool = HfArg(
        default=False,
        help="Write the number of --num_assistant_tokens with the highest speedup to generation_config.json of "
        "--model, where `generate(assistant_model=student)` reads it, if the teacher is faster with it in every "
        "repetition.",
    )
    speed_clips: int = HfArg(
        default=32, help="Number of clips for --speed and --speculative, taken at equal distances in the first set."
    )
    speed_batch_sizes: list[int] = HfArg(
        default_factory=lambda: [1, 16], help="Batch sizes of --speed; reduced to --speed_clips if larger."
    )
    repetitions: int = HfArg(default=5, help="Timed passes of --speed and --speculative.")

    def __post_init__(self):
        check_ranges(self, num_beams=COUNT, n_resamples=COUNT, speed_clips=COUNT, repetitions=COUNT)
        check_ranges(self, concatenate_seconds=POSITIVE, max_duration_in_seconds=Range(above=0, infinite=True))
        check_ranges(self, "leave it out for all clips", max_eval_samples=COUNT)
        check_ranges(self, no_repeat_ngram_size=NOT_NEGATIVE, num_assistant_tokens=COUNT, speed_batch_sizes=COUNT)
        if self.score_only:
            if self.output_dir is None:
                raise UserError("--score_only requires --output_dir")
            return
        if self.model is None:
            raise UserError("--model is required")
        if not (self.suite or self.dataset):
            raise UserError(f"--suite or --dataset is required. Suites: {', '.join(SUITE_NAMES)}")
        self._check_own_set()
        if unknown := set(self.long_form) - {*LONG_FORM_METHODS}:
            raise UserError(
                f"--long_form must be one or more of {', '.join(LONG_FORM_METHODS)}, got {' '.join(sorted(unknown))}"
            )
        if self.concatenate_seconds is not None and not self.long_form:
            raise UserError("--concatenate_seconds requires --long_form sequential, chunked or both")
        if self.long_form and self.max_duration_in_seconds < math.inf:
            raise UserError("--max_duration_in_seconds is not supported with --long_form, which is for long clips")
        if self.clip_context and (self.long_form or self.timestamps != "none"):
            raise UserError("--clip_context is not supported with --long_form and --timestamps, which decode windows")
        if (self.no_repeat_ngram_size or self.temperature_fallback) and (self.long_form or self.timestamps != "none"):
            raise UserError(
                "--no_repeat_ngram_size and --temperature_fallback are not supported with --long_form and --timestamps"
            )
        if self.temperature_fallback and self.num_beams > 1:
            raise UserError("--temperature_fallback requires --num_beams 1")
        if self.speculative and self.teacher is None:
            raise UserError("--speculative requires --teacher")
        if self.save_num_assistant_tokens and not self.speculative:
            raise UserError("--save_num_assistant_tokens requires --speculative")
        for name in ("num_assistant_tokens", "speed_batch_sizes"):
            if not getattr(self, name):
                raise UserError(f"--{name} requires at least one number")
        super().__post_init__()
        from .metrics import normalizer_for, text_language

        # raises if the normalizer doesn't support the language or isn't installed
        normalizer_for(self.normalizer, text_language(self.task, self.language), {})
        if self.output_dir is None:
            self.output_dir = f"runs/evaluation-{_base_name(self.model)}"

    def _check_own_set(self) -> None:
        """Raise `UserError` for options of `--dataset` without it. Each set of a suite has its own."""
        if self.dataset:
            return
        names = ("dataset_config", "eval_splits", "audio_column_name", "text_column_name", "speaker_column")
        given = [name for name in names if getattr(self, name)]
        if self.task == "translate":
            given.append("task translate")
        if self.no_speech:
            given.append("no_speech")
        if given:
            raise UserError(f"--{given[0]} requires --dataset")

    def sets(self) -> list[DatasetSpec]:
        """Return the sets of `--suite` and `--dataset`, each once. Raises `UserError` if two have the same name."""
        specs = [spec for name in self.suite for spec in suite_sets(name, self.language)]
        if self.dataset:
            specs += [self._own_set(split) for split in self.eval_splits or ["train"]]
        named: dict[str, DatasetSpec] = {}
        for spec in specs:
            if named.setdefault(spec.name, spec) != spec:
                raise UserError(f"two different sets are named {spec.name}: evaluate them with separate --output_dir")
        return list(named.values())

    def _own_set(self, split: str) -> DatasetSpec:
        from ..data.languages import language_code

        parts = [_base_name(self.dataset), self.dataset_config, None if split == "train" else split]
        name = "-".join(part for part in parts if part)
        return DatasetSpec(
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

    def decoding(self) -> "Decoding":
        from .transcribe import Decoding

        return Decoding(
            self.num_beams,
            self.generation_max_length,
            self.timestamps,
            self.batch_size,
            self.num_workers,
            no_repeat_ngram_size=self.no_repeat_ngram_size,
            temperature_fallback=self.temperature_fallback,
        )


def _base_name(name: str) -> str:
    """Return the last part of a path or Hub id; for `.` the name of the directory."""
    return Path(os.path.abspath(name)).name
