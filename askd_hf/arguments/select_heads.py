"""Options of `askd-hf select-heads`."""

from dataclasses import dataclass
from typing import Literal

from transformers.hf_argparser import HfArg

from .ranges import COUNT, check_ranges


@dataclass
class SelectHeadsArguments:
    """The student, its teacher, and transcribed clips."""

    _argument_group_name = "alignment heads"

    model: str = HfArg(help="Student: a local directory, whose generation_config.json is changed.")
    teacher: str = HfArg(
        help="Whisper model with alignment heads, as OpenAI's have: a local directory or a Hub id. The student's word "
        "times are compared with its word times."
    )
    dataset: str = HfArg(help="Transcribed speech, as `askd-hf distill` takes it. The training set is suitable.")
    dataset_config: str | None = HfArg(default=None, help="Configuration of a Hub dataset.")
    split: str = HfArg(
        default="train", help="Split of --dataset. A directory without splits has the split train only."
    )
    audio_column_name: str | None = HfArg(default=None, help="Audio column of --dataset. Default: found by its name.")
    text_column_name: str | None = HfArg(
        default=None, help="Transcript column of --dataset. Default: found by its name."
    )
    max_samples: int = HfArg(default=32, help="Number of clips, taken at equal distances in --dataset.")
    language: str | None = HfArg(default=None, help="Language of the speech. Required for multilingual models.")
    task: Literal["transcribe", "translate"] = HfArg(default="transcribe", help="Task of a multilingual model.")
    device: str | None = HfArg(default=None, help="cpu, cuda, cuda:1, ... Default: a GPU if available, else the CPU.")

    def __post_init__(self):
        check_ranges(self, max_samples=COUNT)
