"""The options of `askd-hf pseudo-label`: every field is one, its help is its documentation."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..arguments import NORMALIZER_HELP, Normalizer
from ..arguments.ranges import COUNT, Range, check_ranges
from ..arguments.renamed import accepts_renamed
from ..errors import UserError
from ..evaluation.metrics import language_code
from ..evaluation.options import DecodingArguments
from ..evaluation.suites import DatasetSpec
from .filters import Thresholds


@accepts_renamed
@dataclass
class PseudoLabelArguments(DecodingArguments):
    """The teacher, the speech, which transcripts to keep, and what to make of them."""

    _argument_group_name = "pseudo-labels"

    teacher: str | None = field(
        default=None, metadata={"help": "Whisper model that transcribes: a local directory or a Hub id."}
    )
    dataset: str | None = field(
        default=None,
        metadata={
            "help": "Speech, with or without transcripts: a directory with metadata.csv or of audio files alone, a "
            "saved dataset, parquet, or a Hub id."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of --dataset on the Hub."})
    split: str = field(default="train", metadata={"help": "Split of --dataset, as in train or train[:10%%]."})
    audio_column_name: str | None = field(
        default=None, metadata={"help": "Column with the audio. Default: found by name."}
    )
    text_column_name: str | None = field(
        default=None,
        metadata={"help": "Column with references. Default: found by name; without one there are none."},
    )
    speaker_column: str | None = field(
        default=None, metadata={"help": "Column with the speaker. Default: found by name."}
    )
    language: str | None = field(
        default=None,
        metadata={"help": "Language of the speech, as in english or fr. Required for a multilingual teacher."},
    )
    task: Literal["transcribe", "translate"] = field(
        default="transcribe",
        metadata={"help": "What a multilingual teacher is asked to do; translations are English."},
    )
    max_samples: int | None = field(default=None, metadata={"help": "Transcribe the first so many clips only."})
    on_bad_audio: Literal["error", "skip"] = field(
        default="error",
        metadata={
            "help": "A clip that can't be used (missing, corrupt, empty, too long): stop before transcribing, or skip "
            "it; skipped ones are counted and listed in --output_dir."
        },
    )
    output_dir: str | None = field(
        default=None,
        metadata={
            "help": "For the transcripts, the list of what was dropped, and the dataset. Default: "
            "runs/DATASET-by-TEACHER."
        },
    )
    overwrite: bool = field(
        default=False, metadata={"help": "Transcribe anew what other settings have made in --output_dir."}
    )
    timestamps: bool = field(
        default=False,
        metadata={"help": "Have the teacher say when its phrases begin and end: the column segments."},
    )
    text: Literal["teacher", "reference"] = field(
        default="teacher",
        metadata={
            "help": "What the students learn: the teacher's transcripts, with its case and punctuation, or the "
            "references where the teacher agrees with them."
        },
    )
    normalizer: Normalizer = field(
        default="auto",
        metadata={
            "help": "For --max_wer, transcripts and references are compared as normalized by this, so that capitals "
            f"and missing punctuation cost nothing. {NORMALIZER_HELP}"
        },
    )
    max_wer: float = field(
        default=10.0,
        metadata={"help": "Where there is a reference: drop transcripts of a higher word error rate, in percent."},
    )
    min_log_prob: float = field(
        default=-1.0,
        metadata={
            "help": "Where there is none: drop transcripts that the teacher gives less than this on average, log of "
            "the probability of a token. OpenAI's threshold."
        },
    )
    max_compression_ratio: float = field(
        default=2.4,
        metadata={"help": "Where there is none: drop transcripts that zlib makes smaller than this. OpenAI's."},
    )
    max_repetition: float = field(
        default=20.0,
        metadata={"help": "Where there is none: drop transcripts of which more 5-grams are repeated, in percent."},
    )
    pack: bool = field(
        default=False,
        metadata={"help": "Join consecutive clips of a speaker, those that are kept, to clips of --pack_seconds."},
    )
    pack_seconds: float | None = field(
        default=None, metadata={"help": "The longest pack. Default: the teacher's window, 30 s."}
    )
    push_to_hub: str | None = field(
        default=None,
        metadata={
            "help": "Hub id of a dataset to push the result to. It is made private if it is new; one that is public "
            "stays so."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if not (self.teacher and self.dataset):
            raise UserError("--teacher and --dataset are needed: who transcribes, and what")
        if self.text == "reference" and self.timestamps:
            raise UserError("--text reference: references have no timestamps; leave out --timestamps")
        check_ranges(self, "leave it out for all clips", max_samples=COUNT)
        # an infinite threshold lets everything pass
        percent, no_limit = Range(low=0, infinite=True), Range(above=0, infinite=True)
        check_ranges(self, max_wer=percent, max_repetition=percent, max_compression_ratio=no_limit)
        check_ranges(self, min_log_prob=Range(high=0, infinite=True), pack_seconds=Range(above=0))
        if self.pack_seconds is not None and not self.pack:
            raise UserError(f"--pack_seconds {self.pack_seconds:g} is for --pack, and above 0")
        if self.output_dir is None:
            dataset, teacher = (Path(os.path.abspath(name)).name for name in (self.dataset, self.teacher))
            self.output_dir = f"runs/{dataset}-by-{teacher}"

    def source(self) -> DatasetSpec:
        # one name whatever the set: a directory is of one set
        columns = self.text_column_name, self.audio_column_name, self.speaker_column
        where = self.dataset, self.dataset_config, self.split
        return DatasetSpec("clips", *where, *columns, language_code(self.language), self.task)

    def thresholds(self) -> Thresholds:
        return Thresholds(self.max_wer, self.min_log_prob, self.max_compression_ratio, self.max_repetition)
