"""Load the clips to transcribe, with or without references."""

from pathlib import Path

from datasets import Dataset

from ..data.audiofolder import audio_files, audiofolder_splits, read_audio_files
from ..data.common_voice import common_voice_splits
from ..errors import UserError
from ..evaluation.suites import DatasetSpec, load_set

DATA_FILES = ("*.parquet", "*.arrow")  # files of a dataset, next to which audio files aren't the data


def load_clips(source: DatasetSpec, limit: int | None = None, num_proc: int | None = None) -> Dataset:
    """Return the first `limit` rows of a dataset, or of a directory that contains only audio files, in order.

    Returns:
        `audio`, `clip`, `text` (the reference, or None) and, where known, `speaker`.

    Raises:
        UserError: as `load_set`; or options for a split, configuration or column with a directory of audio files.
    """
    files = _bare_audio(Path(source.dataset).expanduser())
    if not files:
        return load_set(source, limit, num_proc, text_required=False)
    if source.split != "train" or source.config:
        raise UserError(f"{source.dataset} is a directory of audio files: remove --split and --dataset_config")
    for column in (source.text_column_name, source.audio_column_name, source.speaker_column):
        if column:
            raise UserError(
                f"{source.dataset} is a directory of audio files without metadata.csv: no column {column!r}"
            )
    return read_audio_files(files[:limit], Path(source.dataset).expanduser())


def _bare_audio(folder: Path) -> list[Path]:
    """Return the audio files of a folder without metadata; empty if the folder contains a dataset."""
    if not folder.is_dir() or audiofolder_splits(folder) or common_voice_splits(folder):
        return []
    if any(any(folder.rglob(pattern)) for pattern in DATA_FILES):
        return []
    return audio_files(folder)
