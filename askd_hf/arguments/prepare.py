"""Options of `askd-hf prepare`."""

from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from .ranges import POSITIVE, Range, check_ranges


@dataclass
class PrepareArguments:
    """A list of clips, and the directory to write."""

    _argument_group_name = "prepare"

    source: str = HfArg(
        help="CSV file with one clip per row, separated by commas, semicolons, tabs or vertical bars; or a directory "
        "with a metadata.csv."
    )
    target: str = HfArg(help="Directory to write.")
    audio_dir: str | None = HfArg(
        default=None, help="Directory that the files of the rows are in. Default: that of the CSV file."
    )
    audio_column: str = HfArg(default="file_name", help="Column of the audio file.")
    text_column: str = HfArg(default="transcription", help="Column of the transcript.")
    speaker_column: str = HfArg(
        default="speaker", help="Column of the speaker. none: clips are split at random, whoever speaks."
    )
    test_every: int = HfArg(default=5, help="One of this many speakers is for testing.")
    validation_every: int = HfArg(default=10, help="One of this many speakers is for validation.")
    max_seconds: float | None = HfArg(default=None, help="Leave out clips longer than this.")

    def __post_init__(self):
        at_least = Range(low=2)
        check_ranges(self, test_every=at_least, validation_every=at_least, max_seconds=POSITIVE)
