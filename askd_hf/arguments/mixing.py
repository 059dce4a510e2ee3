"""Options of dataset mixing and of the caches on disk."""

from dataclasses import dataclass
from typing import Literal

from transformers.hf_argparser import HfArg

from ..errors import UserError
from .ranges import COUNT, POSITIVE, SHARE, Range, check_ranges
from .renamed import accepts_renamed

NO_SPEECH_PROBABILITY = 0.05
SHUFFLE_BUFFER_SIZE = 1000
TEACHER_TOP_K = 32


@accepts_renamed
@dataclass
class MixArguments:
    """Options of dataset mixing."""

    _argument_group_name = "dataset mixing"

    dataset_probabilities: list[float] = HfArg(
        default_factory=list,
        help="Sampling probabilities of the training sets, as in `datasets.interleave_datasets` with the stopping "
        "strategy all_exhausted; normalized to 1. Default: every clip once per epoch.",
    )
    streaming: bool = HfArg(
        default=False,
        help="Stream the training sets without downloading or validating them first. Requires --max_steps. Each "
        "process reads its share of the files.",
    )
    shuffle_buffer_size: int = HfArg(
        default=SHUFFLE_BUFFER_SIZE, help="Size of the shuffle buffer per dataset, in clips, with --streaming."
    )
    no_speech_dataset: str | None = HfArg(
        default=None,
        help="Clips without speech and with empty labels, against hallucinations: a dataset, whose transcripts are "
        "ignored, or `synthetic` for silence, noise and hum.",
    )
    no_speech_probability: float = HfArg(
        default=NO_SPEECH_PROBABILITY, help="Sampling probability of --no_speech_dataset, strictly between 0 and 1."
    )
    concatenate_probability: float = HfArg(
        default=0.0,
        help="Join two or three random clips of a speaker until joined clips are this share of the training clips. "
        "Without a speaker column, clips of the same dataset. Reduces loops on longer clips. From 0 to below 1. With "
        "--streaming: probability that a clip is joined with those that follow, as many as fit into the window, which "
        "also makes training faster. These clips aren't trained on one by one.",
    )
    timestamp_probability: float = HfArg(
        default=0.0,
        help="Probability of labels with timestamps, 0 to 1. Requires a column `segments`, created by askd-hf "
        "pseudo-label --timestamps. With 0 the student unlearns timestamps. With 1 it unlearns generation without "
        "them, which may then not end.",
    )
    condition_on_prev_probability: float = HfArg(
        default=0.0,
        help="Probability of training with the previous text as a prompt, 0 to 1. Requires a column `prompt`, created "
        "by askd-hf pseudo-label --concatenate.",
    )

    def __post_init__(self):
        check_ranges(self, timestamp_probability=SHARE, condition_on_prev_probability=SHARE, shuffle_buffer_size=COUNT)
        check_ranges(self, no_speech_probability=Range(above=0, below=1))
        if self.no_speech_probability != NO_SPEECH_PROBABILITY and self.no_speech_dataset is None:
            raise UserError("--no_speech_probability requires --no_speech_dataset")
        check_ranges(self, concatenate_probability=Range(low=0, below=1))
        check_ranges(self, dataset_probabilities=POSITIVE)
        if self.shuffle_buffer_size != SHUFFLE_BUFFER_SIZE and not self.streaming:
            raise UserError("--shuffle_buffer_size requires --streaming: other datasets are shuffled as a whole")


@accepts_renamed
@dataclass
class CacheArguments:
    """Options of the caches on disk, which later epochs and runs reuse."""

    _argument_group_name = "caches"

    encoder_cache_dir: str | None = HfArg(
        default=None,
        help="Directory of the cache of the frozen encoder's outputs, which are computed before training: float16, "
        "100 * d_model bytes per second of the window (with 30 s 1.2 MB per clip for tiny, 3.8 MB for "
        "large). Outdated outputs are computed again. "
        "Several runs can share it: --teacher_cache_dir uses the outputs of the teacher's whole encoder if an earlier "
        "run cached them.",
    )
    encoder_cache_dtype: Literal["float16", "int8"] = HfArg(
        default="float16",
        help="How --encoder_cache_dir stores outputs. int8: 8-bit integers with a scale per position, half the size.",
    )
    teacher_cache_dir: str | None = HfArg(
        default=None,
        help="Directory of a copy of the training set, audio included, with the teacher's --teacher_top_k "
        "log-probabilities as columns (a few KB per clip), computed before training. A later run with it as --dataset "
        "needs no teacher.",
    )
    teacher_top_k: int = HfArg(
        default=TEACHER_TOP_K,
        help="Number of tokens whose log-probabilities --teacher_cache_dir stores. All other tokens count as one, so "
        "that the divergence is a lower bound; it is close at --temperature 1 if the teacher is confident.",
    )

    def __post_init__(self):
        check_ranges(self, teacher_top_k=COUNT)
        if self.teacher_top_k != TEACHER_TOP_K and self.teacher_cache_dir is None:
            raise UserError("--teacher_top_k requires --teacher_cache_dir: it is a number of tokens in that cache")
        if self.encoder_cache_dtype != "float16" and self.encoder_cache_dir is None:
            raise UserError("--encoder_cache_dtype requires --encoder_cache_dir")
