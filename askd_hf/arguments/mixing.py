"""Options: how the training datasets are mixed, and what is cached on disk."""

from dataclasses import dataclass, field

from ..errors import UserError
from .ranges import COUNT, POSITIVE, SHARE, Range, check_ranges
from .renamed import accepts_renamed


@accepts_renamed
@dataclass
class MixArguments:
    """What training makes of the speech: how the datasets are mixed, and what a clip is learned with."""

    _argument_group_name = "the mix"

    dataset_probabilities: list[float] = field(
        default_factory=list,
        metadata={
            "help": "Shares of several datasets in training. An epoch lasts until every clip of all came at least "
            "once. Default: every clip once an epoch."
        },
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read the training speech as it comes, from the Hub or a disk, for sets that fit on neither disk "
            "nor patience: nothing is looked at before training. Needs --max_steps."
        },
    )
    shuffle_buffer_size: int = field(
        default=1000,
        metadata={"help": "With --streaming: clips of a dataset in memory; the next is drawn of them."},
    )
    no_speech_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Clips in which nobody speaks, to be answered with nothing, against hallucinations: a dataset, "
            "whose transcripts don't count, or `synthetic`: silence, noise and hum."
        },
    )
    no_speech_probability: float = field(default=0.05, metadata={"help": "Share of --no_speech_dataset in training."})
    timestamp_probability: float = field(
        default=0.0,
        metadata={
            "help": "Share of the clips that are learned with timestamps, where a column `segments` has the times: "
            "askd-hf pseudo-label --timestamps makes it. A student trained without them forgets them; one that "
            "always has them forgets how to go without, and may then never come to an end."
        },
    )
    condition_on_prev_probability: float = field(
        default=0.0,
        metadata={
            "help": "Share of the clips that are learned with the text before them, where a column `prompt` has it: "
            "askd-hf pseudo-label --pack makes it."
        },
    )

    def __post_init__(self):
        check_ranges(self, timestamp_probability=SHARE, condition_on_prev_probability=SHARE, shuffle_buffer_size=COUNT)
        check_ranges(self, no_speech_probability=Range(above=0, below=1))
        if any(weight not in POSITIVE for weight in self.dataset_probabilities):
            raise UserError(
                f"--dataset_probabilities {' '.join(map(str, self.dataset_probabilities))}: all must be positive"
            )


@accepts_renamed
@dataclass
class CacheArguments:
    """What no training step changes, computed once and kept on disk for later epochs and runs."""

    _argument_group_name = "caches"

    encoder_cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Directory for the frozen encoder's outputs, which are computed for all clips before training: "
            "float16, 2 * 1500 * d_model bytes a clip (1.2 MB for tiny, 3.8 MB for large). Stale ones are never used."
        },
    )
    teacher_cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Directory for a copy of the training set, audio included, with the teacher's --teacher_top_k "
            "log-probabilities as columns (some KB a clip), computed before training. It is a saved `datasets` "
            "dataset: given as --dataset, no teacher is loaded at all."
        },
    )
    teacher_top_k: int = field(
        default=32,
        metadata={
            "help": "Tokens of which --teacher_cache_dir keeps the probability. All others count as one, which makes the "
            "divergence a lower bound of the whole: a close one at --temperature 1, where the teacher is sure."
        },
    )

    def __post_init__(self):
        check_ranges(self, teacher_top_k=COUNT)
