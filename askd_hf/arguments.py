"""The options of a run besides training: what the models are, what the data are, what is cached.

Every field is a command-line option and a key of the YAML file given by `--config`; its help is its documentation.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from .metrics import Normalizer

# 100 hours of read English, 6 GB; its splits are named as on the Hub
DEFAULT_DATASET = dict(
    dataset="openslr/librispeech_asr",
    dataset_config="clean",
    train_split="train.100",
    eval_splits=["validation"],
    language="english",
)


@dataclass
class ModelArguments:
    """The teacher, and where the student comes from."""

    _argument_group_name = "models"

    teacher: str | None = field(
        default=None,
        metadata={"help": "Whisper model to distil: a Hub id such as openai/whisper-large-v3 or a local directory."},
    )
    student: str | None = field(
        default=None,
        metadata={"help": "Student to train: a Hub id or a local directory. Default: made from the teacher's layers."},
    )
    decoder_layers: str = field(
        default="2",
        metadata={
            "help": "Decoder layers of a student made from the teacher: a number (spread evenly, the first and the "
            "last are kept), or the teacher's layers to copy, as in 0,1,31."
        },
    )
    encoder_layers: str | None = field(
        default=None, metadata={"help": "Likewise for the encoder. Default: all of the teacher's layers."}
    )
    teacher_dtype: Literal["auto", "float32", "float16", "bfloat16", "int8"] = field(
        default="auto",
        metadata={
            "help": "Weights of the teacher in memory. auto: bfloat16 under --bf16, float16 under --fp16, or float32. "
            "int8: those of its decoder layers in 8 bits, all others as auto; it needs pip install '.[int8]'."
        },
    )
    teacher_offload: bool = field(
        default=False,
        metadata={
            "help": "Keep the teacher's layers in CPU memory and bring each to the GPU when it runs: little of its "
            "memory for much more time, which with --cache_teacher is spent once."
        },
    )
    attn_implementation: str = field(
        default="sdpa", metadata={"help": "Attention of teacher and student: sdpa, eager, flash_attention_2."}
    )


class SpeechSource(NamedTuple):
    """One split of one dataset, as `load_speech` takes them."""

    dataset: str
    config: str | None
    split: str

    @property
    def name(self) -> str:
        """What reports call it: the split, or for the only split of a directory the directory."""
        return self.split if self.split != "train" else Path(os.path.abspath(self.dataset)).name  # of `.` as well


@dataclass
class DataArguments:
    """The speech to train on and to evaluate on."""

    _argument_group_name = "speech"

    dataset: str | None = field(
        default=None,
        metadata={
            "help": "Speech with transcripts: a directory with metadata.csv (audiofolder), a saved `datasets` "
            "dataset, parquet, or a Hub id. Default: openslr/librispeech_asr, 100 hours."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    train_split: str | None = field(default=None, metadata={"help": "Split to train on. Default: train."})
    eval_dataset: str | None = field(
        default=None, metadata={"help": "Where the evaluation splits are. Default: the training dataset."}
    )
    eval_dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of --eval_dataset on the Hub."}
    )
    eval_splits: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Splits to evaluate on, each reported on its own. Default: none, or for --eval_dataset its "
            "`train` split (the one of a directory without splits)."
        },
    )
    audio_column: str | None = field(default=None, metadata={"help": "Column with the audio. Default: found by name."})
    text_column: str | None = field(
        default=None, metadata={"help": "Column with the transcript. Default: by name (text, transcription, ...)."}
    )
    language: str | None = field(
        default=None,
        metadata={"help": "Language of the speech, as in english or fr. Required for a multilingual teacher."},
    )
    task: Literal["transcribe", "translate"] = field(
        default="transcribe", metadata={"help": "What a multilingual model is asked to do with the speech."}
    )
    text_case: Literal["auto", "keep", "lower"] = field(
        default="auto",
        metadata={"help": "auto: transcripts that are all in capitals are lower-cased, which Whisper knows better."},
    )
    normalizer: Normalizer = field(
        default="auto",
        metadata={
            "help": "Text normaliser for WER and CER: Whisper's english or basic one, or none. auto: english for "
            "English, basic for other languages."
        },
    )
    on_bad_audio: Literal["error", "skip"] = field(
        default="error",
        metadata={
            "help": "A clip that can't be used (missing, corrupt, empty, too long, no transcript...): stop before "
            "training, or skip it; skipped ones are counted and listed in the output directory."
        },
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first so many clips only."})
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on the first so many clips of each split only."}
    )
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Processes that check the clips before training. Default: this one."}
    )
    compare: bool = field(
        default=True,
        metadata={"help": "End with a table of teacher, student before and student after on the evaluation splits."},
    )

    def __post_init__(self):
        if self.eval_dataset and not self.eval_splits:
            self.eval_splits = ["train"]
        if self.dataset is None:
            for name, value in DEFAULT_DATASET.items():
                if not getattr(self, name):
                    setattr(self, name, value)
        self.train_split = self.train_split or "train"

    def train_source(self) -> SpeechSource:
        return SpeechSource(self.dataset, self.dataset_config, self.train_split)

    def eval_sources(self) -> list[SpeechSource]:
        if self.eval_dataset:
            dataset, config = self.eval_dataset, self.eval_dataset_config
        else:
            dataset, config = self.dataset, self.dataset_config
        return [SpeechSource(dataset, config, split) for split in self.eval_splits]


@dataclass
class CacheArguments:
    """What no training step changes, computed once and kept on disk for later epochs and runs."""

    _argument_group_name = "caches"

    cache_encoder: str | None = field(
        default=None,
        metadata={
            "help": "Directory for the frozen encoder's outputs, which are computed for all clips before training: "
            "float16, 2 * 1500 * d_model bytes a clip (1.2 MB for tiny, 3.8 MB for large). Stale ones are never used."
        },
    )
    cache_teacher: str | None = field(
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
            "help": "Tokens of which --cache_teacher keeps the probability. All others count as one, which makes the "
            "divergence a lower bound of the whole: a close one at --temperature 1, where the teacher is sure."
        },
    )
