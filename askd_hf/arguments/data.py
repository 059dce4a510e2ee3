"""Options of the training and evaluation sets."""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, get_origin, get_type_hints

from transformers.hf_argparser import HfArg

from ..errors import UserError
from .ranges import COUNT, NOT_NEGATIVE, Range, check_order, check_ranges
from .renamed import accepts_renamed

Normalizer = Literal["auto", "english-unified", "multilingual", "english", "basic", "open-asr-leaderboard", "none"]

# descriptions for --help, tables and cards
NORMALIZERS = {
    "english-unified": "Whisper's English normalizer, applied after apostrophes, quotes, dashes and dots are unified",
    "multilingual": "removes case, punctuation and spelling variants, and keeps combining marks",
    "english": "Whisper's English normalizer",
    "basic": "Whisper's basic normalizer",
    "open-asr-leaderboard": "the Open ASR Leaderboard's English normalizer, from its checkout on the PYTHONPATH",
    "none": "no normalization",
}
NORMALIZER_HELP = (
    "auto: english-unified for English, multilingual for other languages. "
    + "".join(f"{name}: {description}. " for name, description in NORMALIZERS.items())
    + "multilingual and basic make each letter a word in languages without spaces; basic splits words at combining "
    "marks."
)

NONE = "-"  # no value for a dataset, in a list with one value per dataset

# 100 hours of read English, 6 GB
DEFAULT_DATASET = dict(
    dataset=["openslr/librispeech_asr"],
    dataset_config=["clean"],
    train_split=["train.100"],
    eval_splits=["validation"],
    language=["english"],
)


class SpeechSource(NamedTuple):
    """A split of a dataset (arguments of `load_speech_dataset`), its language and task."""

    dataset: str
    config: str | None
    split: str
    language: str | None = None
    task: str | None = None
    audio_column_name: str | None = None
    text_column_name: str | None = None

    @property
    def name(self) -> str:
        """The name in reports: the split, or for `train` the directory."""
        return self.split if self.split != "train" else self.directory

    @property
    def directory(self) -> str:
        return Path(os.path.abspath(self.dataset)).name  # also for `.`


@accepts_renamed
@dataclass
class DataArguments:
    """Options of the training and evaluation sets."""

    _argument_group_name = "data"

    dataset: list[str] = HfArg(
        default_factory=list,
        help="Training sets with transcripts: directories with metadata.csv (audiofolder), saved `datasets` datasets, "
        "parquet files, or Hub ids. Several are mixed. The options below take one value for all of them or one per "
        "dataset ('-' for none). Default: openslr/librispeech_asr, 100 hours.",
    )
    unlabeled_dataset: str | None = HfArg(
        default=None,
        help="A dataset without transcripts: a directory of audio files, or as --dataset. The teacher transcribes it "
        "before training, as askd-hf pseudo-label does, with the times of words for --long_clips cut. It is the last "
        "training set.",
    )
    pseudo_labeled_dataset: str | None = field(default=None, init=False)
    """The directory of `unlabeled_dataset` with the teacher's transcripts, a saved dataset."""
    dataset_config: list[str] = HfArg(default_factory=list, help="Configuration of the dataset on the Hub.")
    train_split: list[str] = HfArg(default_factory=list, help="Training split. Default: train.")
    eval_dataset: list[str] = HfArg(
        default_factory=list, help="Datasets with the evaluation splits. Default: the training sets."
    )
    eval_dataset_config: list[str] = HfArg(default_factory=list, help="Configuration of --eval_dataset on the Hub.")
    eval_splits: list[str] = HfArg(
        default_factory=list,
        help="Evaluation splits, each evaluated separately. Default: none, or with --eval_dataset its split `train` "
        "(that of a directory without splits).",
    )
    audio_column_name: list[str] = HfArg(
        default_factory=list, help="Column with the audio. Default: detected by name."
    )
    text_column_name: list[str] = HfArg(
        default_factory=list, help="Column with the transcript. Default: detected by name (text, transcription, ...)."
    )
    language: list[str] = HfArg(
        default_factory=list,
        help="Language, such as english or fr. Required for a multilingual model, unless the dataset has a column "
        "`language`.",
    )
    task: list[str] = HfArg(
        default_factory=list,
        help="Task of a multilingual model: transcribe, or translate (into English). Default: the column `task`, else "
        "transcribe.",
    )
    eval_language: list[str] = HfArg(default_factory=list, help="Language of --eval_dataset. Default: --language.")
    text_case: Literal["auto", "keep", "lower"] = HfArg(
        default="auto", help="auto: lower-case transcripts that are entirely upper-case. keep: never. lower: always."
    )
    text_normalizer: Literal["none", "basic", "english"] = HfArg(
        default="none", help="Normalize training transcripts with Whisper's basic or English normalizer."
    )
    min_duration_in_seconds: float = HfArg(default=0.0, help="Drop training clips shorter than this, in seconds.")
    max_duration_in_seconds: float = HfArg(default=math.inf, help="Drop training clips longer than this, in seconds.")
    min_label_length: int = HfArg(
        default=0, help="Drop training clips with fewer label tokens, special tokens included."
    )
    max_label_length: float = HfArg(default=math.inf, help="Drop training clips with more label tokens.")
    normalizer: Normalizer = HfArg(default="auto", help=f"Text normalizer of WER and CER. {NORMALIZER_HELP}")
    on_bad_audio: Literal["error", "skip"] = HfArg(
        default="error",
        help="For invalid clips (missing, corrupt, empty, too long, no transcript, ...): error (before training, "
        "except with --streaming) or skip. Skipped clips are listed in the output directory.",
    )
    long_clips: Literal["error", "skip", "cut"] = HfArg(
        default="error",
        help="For clips longer than the student's window. error: as for other invalid clips. skip: they are listed in "
        "the output directory. cut: training clips are cut at pauses, without long silence, if the dataset has the "
        "column words or segments (start, end, text; as of askd-hf pseudo-label --timestamps); what still doesn't "
        "fit, and evaluation clips, are skipped.",
    )
    max_train_samples: int | None = HfArg(
        default=None, help="Maximum number of training clips per dataset: the first ones are used."
    )
    max_eval_samples: int | None = HfArg(
        default=None, help="Maximum number of evaluation clips per split: the first ones are used."
    )
    preprocessing_num_workers: int | None = HfArg(
        default=None,
        help="Number of processes that check the clips. Default: one per core of this machine, for many clips.",
    )
    features_on_device: bool = HfArg(
        default=False,
        help="Compute the audio features of training and evaluation batches on the device of the models, in place of "
        "the worker processes: for many GPUs per CPU core. No effect on clips whose encoder outputs are cached "
        "(--encoder_cache_dir): they have no features.",
    )
    recheck: bool = HfArg(
        default=False,
        help="Decode every clip again to check it. Default: a file is decoded once; later runs use what was found "
        "(kept in HF_HOME/askd_hf) as long as its path, size and time of change are the same.",
    )
    compare: bool = HfArg(
        default=True,
        help="After training, evaluate teacher, initial student and trained student on the same splits, and "
        "measure the speed of student and teacher.",
    )

    def __post_init__(self):
        for name, kind in get_type_hints(type(self)).items():  # Python code may pass one value without a list
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
                raise UserError(f"--task must be one of transcribe, translate, got {task!r}")
        check_ranges(self, "leave it out for all clips", max_train_samples=COUNT, max_eval_samples=COUNT)
        check_ranges(self, "leave it out for one per core", preprocessing_num_workers=COUNT)
        check_ranges(self, min_duration_in_seconds=NOT_NEGATIVE, min_label_length=NOT_NEGATIVE)
        at_most = Range(above=0, infinite=True)  # infinity is the default
        check_ranges(self, max_duration_in_seconds=at_most, max_label_length=at_most)
        check_order(self, "min_duration_in_seconds", "max_duration_in_seconds")
        check_order(self, "min_label_length", "max_label_length")

    def train_sources(self) -> list[SpeechSource]:
        """Return the training splits. Raises `UserError` for options with neither one value nor one per dataset."""
        sources = self._sources(self.dataset, self.dataset_config, self.train_split or ["train"], self.language)
        if self.pseudo_labeled_dataset:
            sources.append(
                SpeechSource(self.pseudo_labeled_dataset, None, "train", self.only_language, self.only_task)
            )
        return sources

    @property
    def only_language(self) -> str | None:
        """The language of `unlabeled_dataset`. Raises `UserError` if there are several."""
        return self._only(self.language, "language")

    @property
    def only_task(self) -> str | None:
        """The task for `unlabeled_dataset`. Raises `UserError` if there are several."""
        return self._only(self.task, "task")

    def _only(self, values: list[str], option: str) -> str | None:
        if len(set(values)) > 1:
            raise UserError(
                f"--unlabeled_dataset requires a single --{option}, got {', '.join(values)}: transcribe it with "
                "askd-hf pseudo-label, and give the result as one of --dataset"
            )
        return values[0] if values and values[0] != NONE else None

    def eval_sources(self) -> list[SpeechSource]:
        """Return each evaluation split of each dataset. Raises `UserError` if there are splits and no datasets."""
        if self.eval_splits and not (self.dataset or self.eval_dataset):
            raise UserError("--eval_splits requires --dataset or --eval_dataset")
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
        if elsewhere:  # values per training set don't apply to other datasets
            for option in ("task", "audio_column_name", "text_column_name"):
                columns[option] = columns[option] if len(columns[option]) == 1 else []
        named = [one_each(values, len(datasets), option) for option, values in columns.items()]
        return [
            SpeechSource(dataset, config, split or "train", language, task, audio, text)
            for dataset, config, split, language, task, audio, text in zip(datasets, *named, strict=True)
        ]


def names_of(sources: list[SpeechSource]) -> list[str]:
    """Return a distinct name for each split, as short as possible, with a number if the splits are the same."""
    for parts in (("name",), ("directory", "split"), ("directory", "config", "split")):
        names = ["-".join(filter(None, (getattr(source, part) for part in parts))) for source in sources]
        if len(set(names)) == len(names):
            return names
    return [f"{name}-{number}" for number, name in enumerate(names)]


def one_each(values: list[str], number: int, option: str) -> list[str | None]:
    """Return one value for each of `number` datasets, None for `NONE` or if there are no values.

    Raises `UserError` unless there are none, one or `number` values.
    """
    if len(values) not in (0, 1, number):
        raise UserError(f"--{option} requires one value or one per dataset, got {len(values)} for {number} datasets")
    values = [None if value == NONE else value for value in values] or [None]
    return values * number if len(values) == 1 else values
