"""Speech to be transcribed, with references or without."""

from pathlib import Path

from datasets import Dataset

from ..data.audiofolder import audio_files, audiofolder_splits, read_audio_files
from ..data.common_voice import common_voice_splits
from ..errors import UserError
from ..evaluation.suites import DatasetSpec, load_set

BUILT = ("*.parquet", "*.arrow")  # a dataset's own files


def load_clips(source: DatasetSpec, limit: int | None = None, num_proc: int | None = None) -> Dataset:
    """The first `limit` rows of a dataset, or of a directory that has nothing but audio files, in their order.

    Returns:
        `audio`, `clip`, `text` (the reference, None without one) and, where speakers are known, `speaker`.

    Raises:
        UserError: as `load_set`.
    """
    files = _bare_audio(Path(source.dataset).expanduser())
    if not files:
        return load_set(source, limit, num_proc, text_required=False)
    if source.split != "train" or source.config:
        raise UserError(f"{source.dataset} has audio files only, no splits or configurations: leave these options out")
    for column in (source.text_column_name, source.audio_column_name, source.speaker_column):
        if column:
            raise UserError(f"{source.dataset} has audio files and no metadata.csv, so no column {column!r}")
    return read_audio_files(files[:limit], Path(source.dataset).expanduser())


def _bare_audio(folder: Path) -> list[Path]:
    """The audio files of a folder without any metadata; none of a folder that is a dataset."""
    if not folder.is_dir() or audiofolder_splits(folder) or common_voice_splits(folder):
        return []
    if any(any(folder.rglob(kind)) for kind in BUILT):
        return []
    return audio_files(folder)
