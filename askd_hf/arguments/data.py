"""Options: the datasets to train and to evaluate on."""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, get_origin, get_type_hints

from ..errors import UserError
from .normalizer import NORMALIZER_HELP, Normalizer
from .ranges import COUNT, NOT_NEGATIVE, Range, check_order, check_ranges
from .renamed import accepts_renamed

NONE = "-"  # in a list of values, one for each dataset


# 100 hours of read English, 6 GB; its splits are named as on the Hub
DEFAULT_DATASET = dict(
    dataset=["openslr/librispeech_asr"],
    dataset_config=["clean"],
    train_split=["train.100"],
    eval_splits=["validation"],
    language=["english"],
)


class SpeechSource(NamedTuple):
    """One split of one dataset, as `load_speech_dataset` takes them, and what is spoken in it."""

    dataset: str
    config: str | None
    split: str
    language: str | None = None
    task: str | None = None
    audio_column_name: str | None = None
    text_column_name: str | None = None

    @property
    def name(self) -> str:
        """What reports call it: the split, or for the only split of a directory the directory."""
        return self.split if self.split != "train" else self.directory

    @property
    def directory(self) -> str:
        return Path(os.path.abspath(self.dataset)).name  # of `.` as well


@accepts_renamed
@dataclass
class DataArguments:
    """The speech to train on and to evaluate on."""

    _argument_group_name = "speech"

    dataset: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Speech with transcripts: a directory with metadata.csv (audiofolder), a saved `datasets` "
            "dataset, parquet, or a Hub id. Several are mixed; what is said of them below is one value for all, or "
            "one for each ('-' for none). Default: openslr/librispeech_asr, 100 hours."
        },
    )
    unlabeled_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Speech without transcripts, a directory of audio files or as --dataset: the teacher transcribes "
            "it first, as askd-hf pseudo-label does, and it is one dataset more, the last."
        },
    )
    labelled: str | None = field(default=None, init=False)
    """Where the transcripts of `unlabeled_dataset` are, a saved dataset."""
    dataset_config: list[str] = field(default_factory=list, metadata={"help": "Configuration of a Hub dataset."})
    train_split: list[str] = field(default_factory=list, metadata={"help": "Split to train on. Default: train."})
    eval_dataset: list[str] = field(
        default_factory=list, metadata={"help": "Where the evaluation splits are. Default: the training datasets."}
    )
    eval_dataset_config: list[str] = field(
        default_factory=list, metadata={"help": "Configuration of --eval_dataset on the Hub."}
    )
    eval_splits: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Splits to evaluate on, each reported on its own. Default: none, or for --eval_dataset its "
            "`train` split (the one of a directory without splits)."
        },
    )
    audio_column_name: list[str] = field(
        default_factory=list, metadata={"help": "Column with the audio. Default: found by name."}
    )
    text_column_name: list[str] = field(
        default_factory=list,
        metadata={"help": "Column with the transcript. Default: by name (text, transcription, ...)."},
    )
    language: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Language of the speech, as in english or fr. A multilingual model needs it, unless the rows have "
            "a column `language`."
        },
    )
    task: list[str] = field(
        default_factory=list,
        metadata={
            "help": "What a multilingual model is asked to do with the speech: transcribe, or translate (into "
            "English). Default: transcribe, or what a column `task` says."
        },
    )
    eval_language: list[str] = field(
        default_factory=list, metadata={"help": "Language of --eval_dataset. Default: --language."}
    )
    text_case: Literal["auto", "keep", "lower"] = field(
        default="auto",
        metadata={"help": "auto: transcripts that are all in capitals are lower-cased, which Whisper knows better."},
    )
    text_normalizer: Literal["none", "basic", "english"] = field(
        default="none",
        metadata={"help": "Train on transcripts normalized so, with Whisper's basic or English normalizer."},
    )
    min_duration_in_seconds: float = field(
        default=0.0, metadata={"help": "Train on clips of at least so many seconds."}
    )
    max_duration_in_seconds: float = field(
        default=math.inf, metadata={"help": "Train on clips of at most so many seconds."}
    )
    min_label_length: int = field(
        default=0, metadata={"help": "Train on clips of at least so many label tokens, end and language included."}
    )
    max_label_length: float = field(default=math.inf, metadata={"help": "Train on clips of at most so many."})
    normalizer: Normalizer = field(
        default="auto",
        metadata={"help": f"Text normalizer for WER and CER, while training and after it. {NORMALIZER_HELP}"},
    )
    on_bad_audio: Literal["error", "skip"] = field(
        default="error",
        metadata={
            "help": "A clip that can't be used (missing, corrupt, empty, too long, no transcript...): stop (before "
            "training, unless it is a stream), or skip it; skipped ones are counted and listed in the output "
            "directory."
        },
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on the first so many clips of each dataset only."}
    )
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
        for name, kind in get_type_hints(type(self)).items():  # from Python one value needs no list
            if get_origin(kind) is list and not isinstance(getattr(self, name), list):
                setattr(self, name, [] if getattr(self, name) is None else [getattr(self, name)])
        if self.eval_dataset and not self.eval_splits:
            self.eval_splits = ["train"]
        if not (self.dataset or self.unlabeled_dataset):
            for name, value in DEFAULT_DATASET.items():
                if not getattr(self, name):
                    setattr(self, name, value)
        self._check()

    def _check(self) -> None:
        for task in self.task:
            if task not in ("transcribe", "translate", NONE):
                raise UserError(f"--task {task}: it is transcribe or translate")
        check_ranges(self, "leave it out for all clips", max_train_samples=COUNT, max_eval_samples=COUNT)
        check_ranges(self, "leave it out for none beside this one", preprocessing_num_workers=COUNT)
        check_ranges(self, min_duration_in_seconds=NOT_NEGATIVE, min_label_length=NOT_NEGATIVE)
        at_most = Range(above=0, infinite=True)  # infinity is the default
        check_ranges(self, max_duration_in_seconds=at_most, max_label_length=at_most)
        check_order(self, "min_duration_in_seconds", "max_duration_in_seconds")
        check_order(self, "min_label_length", "max_label_length")

    def train_sources(self) -> list[SpeechSource]:
        sources = self._sources(self.dataset, self.dataset_config, self.train_split or ["train"], self.language)
        if self.labelled:
            sources.append(SpeechSource(self.labelled, None, "train", self.only_language, self.only_task))
        return sources

    @property
    def only_language(self) -> str | None:
        return self._only(self.language, "language")

    @property
    def only_task(self) -> str | None:
        return self._only(self.task, "task")

    def _only(self, values: list[str], option: str) -> str | None:
        if len(set(values)) > 1:
            raise UserError(
                f"--unlabeled_dataset: which --{option} is it, of {', '.join(values)}? Transcribe it by "
                "askd-hf pseudo-label, and give the result as one of --dataset"
            )
        return values[0] if values and values[0] != NONE else None

    def eval_sources(self) -> list[SpeechSource]:
        """Each evaluation split of each dataset.

        Raises `UserError` if there are splits and no datasets.
        """
        if self.eval_splits and not (self.dataset or self.eval_dataset):
            raise UserError("--eval_splits: of which dataset? Give --eval_dataset")
        datasets, configs = self.dataset, self.dataset_config
        if self.eval_dataset:
            datasets, configs = self.eval_dataset, self.eval_dataset_config
        languages = self.eval_language or self.language
        return [
            source
            for split in self.eval_splits
            for source in self._sources(datasets, configs, [split], languages, evaluation=True)
        ]

    def _sources(
        self,
        datasets: list[str],
        configs: list[str],
        splits: list[str],
        languages: list[str],
        evaluation: bool = False,
    ) -> list[SpeechSource]:
        elsewhere = evaluation and bool(self.eval_dataset)
        columns = {
            "dataset_config": configs,
            "train_split": splits,
            "eval_language" if elsewhere else "language": languages,
            "task": self.task,
            "audio_column_name": self.audio_column_name,
            "text_column_name": self.text_column_name,
        }
        if elsewhere:  # what differs between the training datasets says nothing about others
            for option in ("task", "audio_column_name", "text_column_name"):
                columns[option] = columns[option] if len(columns[option]) == 1 else []
        named = [one_each(values, len(datasets), option) for option, values in columns.items()]
        return [
            SpeechSource(dataset, config, split or "train", language, task, audio, text)
            for dataset, config, split, language, task, audio, text in zip(datasets, *named, strict=True)
        ]


def names_of(sources: list[SpeechSource]) -> list[str]:
    """Names of splits, short ones where they tell them apart; with a number where nothing does."""
    for parts in (("name",), ("directory", "split"), ("directory", "config", "split")):
        names = ["-".join(filter(None, (getattr(source, part) for part in parts))) for source in sources]
        if len(set(names)) == len(names):
            return names
    return [f"{name}-{number}" for number, name in enumerate(names)]


def one_each(values: list[str], number: int, option: str) -> list[str | None]:
    """One value for each of `number` datasets from none, one or so many; `NONE` stands for None."""
    if len(values) not in (0, 1, number):
        raise UserError(f"--{option}: {len(values)} values for {number} datasets; give one, or one for each")
    values = [None if value == NONE else value for value in values] or [None]
    return values * number if len(values) == 1 else values
