"""Compute the teacher's soft labels once and save them with the dataset: training then needs no teacher."""

import contextlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, DatasetInfo, Features, concatenate_datasets, load_from_disk
from datasets.config import DATASET_STATE_JSON_FILENAME, DATASETDICT_JSON_FILENAME
from datasets.features.features import get_nested_type
from torch.utils.data import DataLoader
from transformers import WhisperForConditionalGeneration

from ..errors import UserError, disk_errors
from ..objective import TopK
from ..progress import hide_datasets_bars, progress_bar
from .cache_space import CacheSpace, free_bytes
from .collator import TEACHER_COLUMNS, SpeechCollator
from .columns import replace_column, require_audio_files, with_current_names, with_features
from .dataset_files import add_files, load_saved, replaced, rewrites
from .shared_disk import locked_for, others_wait, processes_sharing
from .soft_labels import (
    KEY_COLUMN,
    SETTINGS_COLUMN,
    SOFT_LABEL_COLUMNS,
    SOFT_LABEL_FEATURES,
    check_same_settings,
    compute_soft_labels,
    has_soft_labels,
    label_keys,
    without_soft_labels,
)

REMOVE = "remove it; its clips are labeled again"
PART_CLIPS = 256  # clips per part; a killed pass loses at most two parts per process


def cache_teacher(
    load_teacher: Callable[[], WhisperForConditionalGeneration],
    settings: str,
    dataset: Dataset,
    collator: SpeechCollator,
    directory: str | Path,
    *,
    batch_size: int,
    autocast: torch.dtype | None = None,
    num_workers: int = 0,
) -> Dataset:
    """Return the rows of the dataset with soft labels from `directory`; missing ones are computed first.

    `directory` is a dataset of `save_to_disk` with all rows that were ever cached there, including their audio. New
    rows are added as further files. An interrupted pass resumes where it stopped. While another run adds rows, this
    one waits, and takes what it added. The processes that share the disk compute a part each; without a shared disk
    each node computes all.

    The processes take turns with the batches that one process would compute, so the labels are the same bits for any
    number of processes on the same hardware. So are those of a pass that was interrupted and resumed, also by another
    number, if clips and batch size are the same. The order of the rows in `directory` depends on the processes.

    Args:
        load_teacher: returns the teacher on its device, in its working dtype. Called only if soft labels are missing.
        settings: the result of `teacher_settings`.
        dataset: the result of `filter_invalid_clips`.
        collator: makes the batches. Its `encoder_cache`, if any, must be that of the teacher's encoder.
        batch_size: clips per forward pass.
        autocast: compute dtype; None for the teacher's.
        num_workers: number of processes that decode audio; 0 for the current one.

    Raises:
        UserError: `directory` has soft labels of another teacher, temperature or k, or columns of another type; or
            the disk is full.
    """
    directory, process = Path(directory), PartialState()
    sharing = processes_sharing(directory.absolute().parent)
    is_first, unfinished = process.process_index == sharing[0], _unfinished(directory)
    dataset = without_soft_labels(dataset)
    keys = label_keys(dataset, collator)
    stored, dataset, missing = _missing(directory, settings, dataset, keys)
    if is_first:
        top_k = json.loads(settings)["top_k"]
        print(
            f"teacher cache {directory}: {len(dataset)} clips, {_label_bytes(dataset, top_k) / 1e6:.1f} MB of soft "
            f"labels on disk besides the audio ({len(dataset) - len(missing)} of {len(dataset)} cached)",
            flush=True,
        )
        _check_disk_space(directory, _space(directory, dataset, len(set(keys)), missing, top_k))
    if _in_any_process(bool(missing) or _is_between_renames(directory)):
        with _writing(directory, sharing):
            # again, as another run may have added rows
            stored, dataset, missing = _missing(directory, settings, dataset, keys)
            clips = list(missing.items())
            batches = [clips[first : first + batch_size] for first in range(0, len(clips), batch_size)]
            share = batches[sharing.index(process.process_index) :: len(sharing)]
            with others_wait():
                if share:
                    teacher = load_teacher()
                    _compute_parts(teacher, settings, dataset, share, collator, unfinished, autocast, num_workers)
            with others_wait():
                if is_first:
                    stored_keys = set() if stored is None else set(stored[KEY_COLUMN][:])
                    # skip parts that were added by a process which was killed before it removed them
                    parts = _parts(unfinished, settings, dataset.features).items()
                    if new := [path for path, part in parts if not stored_keys.issuperset(part[KEY_COLUMN][:])]:
                        add_files(stored, new, directory)
            stored = with_current_names(load_from_disk(str(directory)))
    rows = {key: row for row, key in enumerate(stored[KEY_COLUMN][:])}
    return stored.select([rows[key] for key in keys], keep_in_memory=True)


def _in_any_process(condition: bool) -> bool:
    """Return whether the condition holds in any process. All processes must call it."""
    return condition if PartialState().num_processes == 1 else any(gather_object([condition]))


def _missing(
    directory: Path, settings: str, dataset: Dataset, keys: list[str]
) -> tuple[Dataset | None, Dataset, dict[str, int]]:
    """Return the saved rows, the dataset with their columns, and the row of each key that isn't saved.

    Each key is there once, in the same order in all processes.
    """
    stored, dataset = _with_equal_columns(_open(directory, settings), dataset, directory)
    stored_keys = set() if stored is None else set(stored[KEY_COLUMN][:])
    return stored, dataset, {key: row for row, key in enumerate(keys) if key not in stored_keys}


@contextlib.contextmanager
def _writing(directory: Path, sharing: list[int]) -> Iterator[None]:
    """Lock the cache for this run, and remove the parts at the end. Waits while another run holds the lock.

    All processes must call it.
    """
    process, unfinished = PartialState(), _unfinished(directory)
    removed = directory.with_name(f"{directory.name}.removed")
    with disk_errors(f"--teacher_cache_dir {directory}"), locked_for(unfinished, sharing):
        if process.process_index == sharing[0]:
            shutil.rmtree(removed, ignore_errors=True)
            if _is_between_renames(directory):
                replaced(directory).rename(directory)
        process.wait_for_everyone()
        yield
        process.wait_for_everyone()
        if process.process_index == sharing[0]:
            # renamed before it is removed: the lock file is inside, and another run may create the directory again
            # at once
            unfinished.rename(removed)
            shutil.rmtree(removed, ignore_errors=True)
        process.wait_for_everyone()


def check_teacher_cache(directory: str | Path, settings: str) -> None:
    """Raise `UserError` if a directory has something else than soft labels with these settings.

    Args:
        settings: the result of `teacher_settings`.
    """
    _open(Path(directory), settings)


def teacher_cache_space(
    settings: str, dataset: Dataset, collator: SpeechCollator, directory: str | Path
) -> CacheSpace:
    """Return the disk space that `cache_teacher` takes for these arguments. Nothing is computed or written.

    Clips of an interrupted pass count as cached.

    Raises `UserError` as `cache_teacher` does before it computes anything.
    """
    directory = Path(directory)
    stored, dataset = _with_equal_columns(_open(directory, settings), without_soft_labels(dataset), directory)
    unfinished = _parts(_unfinished(directory), settings, dataset.features)
    done = {
        key for part in (*unfinished.values(), *([] if stored is None else [stored])) for key in part[KEY_COLUMN][:]
    }
    keys = label_keys(dataset, collator)
    missing = {key: row for row, key in enumerate(keys) if key not in done}
    space = _space(directory, dataset, len(set(keys)), missing, json.loads(settings)["top_k"])
    _check_disk_space(directory, space)
    return space


def _compute_parts(
    teacher: WhisperForConditionalGeneration,
    settings: str,
    dataset: Dataset,
    batches: list[list[tuple[str, int]]],
    collator: SpeechCollator,
    unfinished: Path,
    autocast: torch.dtype | None,
    num_workers: int,
) -> None:
    """Compute soft labels for the clips missing in `unfinished`, and save parts of at least `PART_CLIPS` clips.

    Args:
        batches: the `(key, row)` of the clips in each.
    """
    options = json.loads(settings)
    done = {key for part in _parts(unfinished, settings, dataset.features).values() for key in part[KEY_COLUMN][:]}
    batches = [[clip for clip in batch if clip[0] not in done] for batch in batches]
    share = [clip for batch in batches for clip in batch]
    clips = dataset.select([row for _, row in share], keep_in_memory=True)
    rows = [[row for _, row in batch] for batch in batches if batch]
    columns: dict[str, list] = {name: [] for name in SOFT_LABEL_COLUMNS}
    computed = written = 0  # not read from the progress bar, which doesn't count when it is hidden
    progress = progress_bar(len(share), "Soft labels")
    # a thread writes a part while the next one is computed
    writer, writing = ThreadPoolExecutor(max_workers=1), deque[Future]()

    def write_part() -> None:
        """Have the clips written of which everything is computed."""
        nonlocal written, columns
        first, written = written, written + len(columns[SETTINGS_COLUMN])
        part = {name: column[: written - first] for name, column in columns.items()}  # one may be longer, after Ctrl-C
        columns = {name: [] for name in SOFT_LABEL_COLUMNS}
        writing.append(writer.submit(_write_part, clips.select(range(first, written)), part, unfinished))

    with writer:
        try:
            for batch in DataLoader(dataset, batch_sampler=rows, collate_fn=collator, num_workers=num_workers):
                target = compute_soft_labels(teacher, batch, options["top_k"], options["temperature"], autocast)
                lengths = (batch["labels"] != -100).sum(1).tolist()
                _check_finite(target, batch["clip"], lengths)
                for name, column in zip(TEACHER_COLUMNS, target, strict=True):
                    columns[name] += [clip.numpy() for clip in column.cpu().split(lengths)]
                columns[KEY_COLUMN] += [key for key, _ in share[computed : computed + len(lengths)]]
                columns[SETTINGS_COLUMN] += [settings] * len(lengths)
                computed += len(lengths)
                progress.update(len(lengths))
                if computed - written >= PART_CLIPS:
                    if writing:
                        writing.popleft().result()
                    write_part()
        finally:  # also after Ctrl-C
            progress.close()
            if columns[SETTINGS_COLUMN]:
                write_part()
            for part in writing:
                part.result()


def _check_finite(target: TopK, clips: list[str], lengths: list[int]) -> None:
    finite = target.log_rest.isfinite() & target.log_probs.isfinite().all(1) & target.label_log_prob.isfinite()
    invalid = [clip for clip, part in zip(clips, finite.split(lengths), strict=True) if not part.all()]
    if invalid:
        raise UserError(f"the teacher's logits are not finite for {', '.join(invalid)}: check these clips")


def _write_part(clips: Dataset, columns: dict[str, list], unfinished: Path) -> None:
    """Save clips with their soft labels atomically."""
    # in memory: joining columns on disk would first rewrite a dataset that has an index mapping
    rows = Dataset(clips.with_format("arrow")[:], info=DatasetInfo(features=clips.features))
    if "more_audio" in rows.features:  # `save_to_disk` embeds the files of `audio` only
        joined = [files and [_embedded(file) for file in files] for files in rows["more_audio"][:]]
        embedded = replace_column(rows, "more_audio", pa.array(joined, get_nested_type(rows.features["more_audio"])))
        rows = embedded.select_columns(list(rows.features))
    labels = Dataset.from_dict(columns, features=SOFT_LABEL_FEATURES)
    process = PartialState().process_index
    number = sum(part.suffix != ".saving" for part in unfinished.glob(f"part-{process:03d}-*"))
    part = unfinished / f"part-{process:03d}-{number:05d}"
    saving = part.with_suffix(".saving")
    shutil.rmtree(saving, ignore_errors=True)
    with hide_datasets_bars():
        concatenate_datasets([rows, labels], axis=1).save_to_disk(str(saving))
    for file in saving.iterdir():  # flush the files before the directory gets its final name
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())
    saving.rename(part)


def _embedded(file: dict[str, Any]) -> dict[str, Any]:
    """Return an audio file with its bytes, and without its directory."""
    if file["bytes"] is not None:
        return file
    return {"bytes": Path(file["path"]).read_bytes(), "path": Path(file["path"]).name}


def _parts(unfinished: Path, settings: str, columns: Features) -> dict[Path, Dataset]:
    """Load the parts of interrupted passes by directory.

    Raises `UserError` if their settings differ, or the types of their columns from those of `columns`.
    """
    directories = [part for part in sorted(unfinished.glob("part-*")) if part.suffix != ".saving"]
    parts = {part: with_current_names(load_saved(part, REMOVE)) for part in directories}
    for part in parts.values():
        check_same_settings(part, settings, str(unfinished))
        _check_types(part.features, columns, f"{unfinished} has clips of an interrupted run", "remove it, or choose")
    return parts


def _with_equal_columns(stored: Dataset | None, dataset: Dataset, directory: Path) -> tuple[Dataset | None, Dataset]:
    """Return both with the columns that one of them has, None where it is missing.

    So runs with joined clips and without, or with speech that has no column of speakers, share a cache.

    Raises `UserError` if a column has another type.
    """
    if stored is None:
        return stored, dataset
    _check_types(stored.features, dataset.features, f"--teacher_cache_dir {directory} has clips", "choose")
    columns = {name: feature for name, feature in stored.features.items() if name not in SOFT_LABEL_COLUMNS}
    added = {name: feature for name, feature in dataset.features.items() if name not in columns}
    stored = with_features(stored, Features(stored.features | added))
    return stored, with_features(dataset, Features(columns | added))


def _check_types(cached: Features, columns: Features, what: str, advice: str) -> None:
    """Raise `UserError` if a column of cached clips has another type than that of the dataset."""
    differing = [name for name, feature in columns.items() if cached.get(name, feature) != feature]
    if differing:
        raise UserError(
            f"{what} with other types of the columns {', '.join(differing)} than this dataset: {advice} another "
            "--teacher_cache_dir"
        )


def _unfinished(directory: Path) -> Path:
    """Return the directory with the parts of an interrupted pass."""
    return directory.with_name(f"{directory.name}.unfinished")


def _is_between_renames(directory: Path) -> bool:
    """Return whether `add_files` is between its two renames, in a running or a killed process."""
    return replaced(directory).is_dir() and not directory.exists()


def _open(directory: Path, settings: str) -> Dataset | None:
    """Load the saved rows; None if there are none. Raise `UserError` if their settings don't match the run's."""
    if _is_between_renames(directory):
        directory = replaced(directory)
    if not directory.exists() or not any(directory.iterdir()):
        return None
    if not any((directory / name).is_file() for name in (DATASET_STATE_JSON_FILENAME, DATASETDICT_JSON_FILENAME)):
        raise UserError(f"--teacher_cache_dir {directory} contains other files: choose another directory")
    stored = load_saved(directory, REMOVE)
    if not isinstance(stored, Dataset) or not has_soft_labels(stored):
        raise UserError(
            f"--teacher_cache_dir {directory} contains a dataset without soft labels: choose another directory"
        )
    check_same_settings(stored, settings, str(directory))
    return with_current_names(stored)


def _space(directory: Path, dataset: Dataset, distinct: int, missing: dict[str, int], top_k: int) -> CacheSpace:
    """Return the disk space for the `missing` rows, {key: row}, of a number of `distinct` clips."""
    require_audio_files(dataset.features["audio"], "--teacher_cache_dir", "cache")
    rows = dataset.select(list(missing.values()), keep_in_memory=True)
    added = _audio_bytes(rows) + _label_bytes(rows, top_k) if missing else 0
    peak = added
    if missing and rewrites(directory, dataset.features | SOFT_LABEL_FEATURES):
        # beside the parts, and before the present files are removed
        peak += added + sum(file.stat().st_size for file in directory.iterdir())
    return CacheSpace(distinct, distinct - len(missing), added, peak, free_bytes(directory))


def _check_disk_space(directory: Path, space: CacheSpace) -> None:
    """Raise `UserError` if the missing rows don't fit on the disk."""
    if space.peak_bytes > space.free_bytes:
        raise UserError(
            f"--teacher_cache_dir {directory}: not enough disk space. {space.peak_bytes / 1e9:.2f} GB are needed "
            f"while it is written, {space.free_bytes / 1e9:.2f} GB are free. Free disk space, or choose a directory "
            "on another disk"
        )


def _label_bytes(dataset: Dataset, top_k: int) -> int:
    """Return the size of the soft labels of the clips."""
    return sum(dataset["label_tokens"][:]) * (4 * top_k + 8)


def _audio_bytes(dataset: Dataset) -> int:
    """Return the size of the clips' audio, which is saved with the soft labels."""
    total = 0
    columns = [name for name in ("audio", "more_audio") if name in dataset.features]
    for rows in dataset.with_format("arrow").select_columns(columns).iter(1000):
        for name in columns:
            audio = rows[name] if name == "audio" else pc.list_flatten(rows[name])
            embedded, paths = (pc.struct_field(audio, field) for field in ("bytes", "path"))
            total += pc.sum(pc.binary_length(embedded)).as_py() or 0
            files = [path for path, content in zip(paths, embedded, strict=True) if not content.is_valid]
            total += sum(Path(path.as_py()).stat().st_size for path in files if path.is_valid)
    return total
