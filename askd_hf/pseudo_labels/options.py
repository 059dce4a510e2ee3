"""The options of `askd-hf pseudo-label`."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from transformers.hf_argparser import HfArg

from ..arguments import NORMALIZER_HELP, Normalizer
from ..arguments.push import check_hub_id
from ..arguments.ranges import COUNT, Range, check_ranges
from ..arguments.renamed import accepts_renamed
from ..errors import UserError
from ..evaluation.options import DecodingArguments

if TYPE_CHECKING:
    from ..evaluation.long_form import Timestamps
    from ..evaluation.suites import DatasetSpec
    from .filters import Thresholds


@accepts_renamed
@dataclass
class PseudoLabelArguments(DecodingArguments):
    """Options of pseudo-labeling: teacher, speech, filters and result."""

    _argument_group_name = "pseudo-labels"

    teacher: str | None = HfArg(default=None, help="Whisper model that transcribes: a local directory or a Hub id.")
    dataset: str | None = HfArg(
        default=None,
        help="Speech with or without transcripts: a directory with metadata.csv, a directory of audio files, a saved "
        "dataset, parquet, or a Hub id.",
    )
    dataset_config: str | None = HfArg(default=None, help="Configuration of --dataset on the Hub.")
    split: str = HfArg(default="train", help="Split of --dataset, such as train or train[:10%%].")
    audio_column_name: str | None = HfArg(default=None, help="Audio column. Default: detected by name or type.")
    text_column_name: str | None = HfArg(
        default=None,
        help="Column with reference transcripts. Default: detected by name; there may be none. With --task "
        "translate: a column with English references; none is detected.",
    )
    speaker_column: str | None = HfArg(default=None, help="Speaker column. Default: detected by name.")
    language: str | None = HfArg(
        default=None, help="Language of the speech, such as english or fr. Required for a multilingual teacher."
    )
    task: Literal["transcribe", "translate"] = HfArg(
        default="transcribe", help="Task of a multilingual teacher: transcribe, or translate into English."
    )
    max_samples: int | None = HfArg(default=None, help="Transcribe only the first max_samples clips. Default: all.")
    on_bad_audio: Literal["error", "skip"] = HfArg(
        default="error",
        help="On invalid clips (missing, corrupt, empty, too long): stop before transcribing, or skip them. Skipped "
        "clips are counted and listed in --output_dir.",
    )
    output_dir: str | None = HfArg(
        default=None,
        help="Directory for the transcripts, the list of dropped clips and the dataset. Default: "
        "runs/DATASET-by-TEACHER. A configuration, and a split other than train, are added to DATASET.",
    )
    overwrite: bool = HfArg(
        default=False, help="Transcribe again if --output_dir has transcripts that were made with other settings."
    )
    timestamps: bool = HfArg(default=False, help="Transcribe with timestamps, which become the column segments.")
    word_timestamps: bool = HfArg(
        default=False,
        help="Also save the times of the words, as the column words, to cut long clips at pauses (askd-hf distill "
        "--long_clips cut). Implies --timestamps. Requires alignment heads in the teacher's generation config.",
    )
    label_source: Literal["teacher", "reference"] = HfArg(
        default="teacher",
        help="Labels of the dataset: the teacher's transcripts, with case and punctuation, or the references. Where "
        "there are references, only clips within --wer_threshold are kept.",
    )
    normalizer: Normalizer = HfArg(
        default="auto",
        help="Text normalizer for --wer_threshold, so that case and punctuation don't count as errors. "
        f"{NORMALIZER_HELP}",
    )
    wer_threshold: float = HfArg(
        default=10.0, help="With a reference: drop transcripts whose word error rate, in percent, exceeds this."
    )
    logprob_threshold: float = HfArg(
        default=-1.0,
        help="Without a reference: drop transcripts whose average log-probability per token is below this; "
        "--logprob_threshold=-inf for no limit. Default: OpenAI Whisper's, -1.",
    )
    compression_ratio_threshold: float = HfArg(
        default=2.4,
        help="Without a reference: drop transcripts whose compression ratio (text bytes / zlib bytes) exceeds this. "
        "Default: OpenAI Whisper's, 2.4. (The threshold of generate in Transformers, 1.35, is for token bytes.)",
    )
    repeated_5gram_threshold: float = HfArg(
        default=20.0,
        help="Without a reference: drop transcripts with a higher percentage of word 5-grams that occur earlier in "
        "the same transcript.",
    )
    concatenate: bool = HfArg(
        default=False, help="Concatenate consecutive clips of a speaker after filtering, up to --concatenate_seconds."
    )
    concatenate_seconds: float | None = HfArg(
        default=None, help="With --concatenate: longest result in seconds. Default: the teacher's window, 30 s."
    )
    hub_dataset_id: str | None = HfArg(
        default=None,
        help="Hub id of a dataset to push the result to, as its split train. A new dataset is private; the visibility "
        "of an existing one isn't changed.",
    )

    def __post_init__(self):
        super().__post_init__()
        self.timestamps = self.timestamps or self.word_timestamps
        if self.word_timestamps and self.concatenate:
            raise UserError("--word_timestamps is not supported with --concatenate, which makes clips longer")
        if not (self.teacher and self.dataset):
            raise UserError("--teacher and --dataset are required")
        if self.label_source == "reference" and self.timestamps:
            raise UserError("--label_source reference can't be combined with --timestamps: references have none")
        check_ranges(self, "leave it out for all clips", max_samples=COUNT)
        # an infinite threshold disables a filter
        percent, ratio = Range(low=0, infinite=True), Range(above=0, infinite=True)
        check_ranges(
            self,
            wer_threshold=percent,
            logprob_threshold=Range(high=0, infinite=True),
            compression_ratio_threshold=ratio,
            repeated_5gram_threshold=percent,
            concatenate_seconds=Range(above=0),
        )
        check_hub_id("hub_dataset_id", self.hub_dataset_id)
        if self.concatenate_seconds is not None and not self.concatenate:
            raise UserError("--concatenate_seconds requires --concatenate")
        if self.output_dir is None:
            dataset, teacher = (Path(os.path.abspath(name)).name for name in (self.dataset, self.teacher))
            part = "".join(f"-{name}" for name in (self.dataset_config, self.split) if name not in (None, "train"))
            part = re.sub(r"[^\w.-]+", "-", part)  # such as train[:10%]
            self.output_dir = f"runs/{dataset}{part}-by-{teacher}"

    def source(self) -> "DatasetSpec":
        """Return the dataset split to transcribe."""
        from ..data.languages import language_code
        from ..evaluation.suites import DatasetSpec

        # the name is constant, because an output directory belongs to one dataset
        columns = self.text_column_name, self.audio_column_name, self.speaker_column
        where = self.dataset, self.dataset_config, self.split
        return DatasetSpec("clips", *where, *columns, language_code(self.language), self.task)

    def time_marks(self) -> "Timestamps":
        """Return the times of the transcripts: word, segment or none."""
        return "word" if self.word_timestamps else "segment" if self.timestamps else "none"

    def thresholds(self) -> "Thresholds":
        from .filters import Thresholds

        return Thresholds(
            self.wer_threshold,
            self.logprob_threshold,
            self.compression_ratio_threshold,
            self.repeated_5gram_threshold,
        )
