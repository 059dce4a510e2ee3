"""What the validation found in each audio file. It is kept on disk, so that a later start decodes nothing again."""

import contextlib
import hashlib
import logging
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Audio, Dataset
from huggingface_hub import constants
from torch.utils.data import DataLoader

from ..arguments.machine import cores_per_process
from .audio import AudioError, read_audio, silence

logger = logging.getLogger(__name__)

VERSION = 1  # raise it if `read_audio`, `silence` or `audio_key` find something else in the same file
BATCH = 16  # clips that are read, or that a decoding process returns, at a time
CLIPS_PER_PROCESS = 500  # fewer clips are decoded before another process has started
PART_CLIPS = 20_000  # are kept at a time, so that an interrupted check loses few
MAX_FILES = 64  # more are merged
MAX_ROW_KEYS = 500  # files of `_row_keys`; the oldest ones are removed
KEY_BYTES = 16
SCHEMA = pa.schema(dict(file=pa.binary(KEY_BYTES), duration=pa.float64(), key=pa.string(), silence=pa.string()))


class AudioInfo(NamedTuple):
    """What is known of an audio file."""

    duration: float  # seconds
    key: str  # see `audio_key`
    error: str = ""
    silence: str = ""  # see `audio.silence`


def audio_infos(
    audio: Dataset, num_proc: int | None, recheck: bool, after_clips: Callable[[int], object]
) -> list[AudioInfo]:
    """Return what is in each audio file: from an earlier check, or decoded.

    Files that can't be decoded aren't kept: the next start decodes them again.

    Args:
        audio: with the column `audio` only.
        num_proc: number of decoding processes; 0 for the current process. Default: None, as many as there are cores
            for this process of a distributed run, and one per `CLIPS_PER_PROCESS` clips.
        recheck: whether to decode all files.
        after_clips: called with the number of clips of which everything is known, besides those of earlier calls.
    """
    files = _file_keys(audio, recheck)
    found: list[AudioInfo | None] = [None] * len(files) if recheck else _read_kept(files)
    missing = [row for row, info in enumerate(found) if info is None]
    after_clips(len(files) - len(missing))
    # Workers get only the audio: in forked processes, the threads of tokenizers and torch can deadlock.
    workers = _processes(len(missing)) if num_proc is None else num_proc
    for first in range(0, len(missing), PART_CLIPS):
        part = missing[first : first + PART_CLIPS]
        decoded: list[AudioInfo] = []
        for infos in DataLoader(audio.select(part), BATCH, num_workers=workers, collate_fn=_decoded):
            decoded += infos
            after_clips(len(infos))
        _keep([(files[row], info) for row, info in zip(part, decoded, strict=True) if files[row] and not info.error])
        for row, info in zip(part, decoded, strict=True):
            found[row] = info
    return [info for info in found if info is not None]


def file_key(audio: Mapping[str, Any] | None) -> bytes | None:
    """Return a hash of the file's path, size and time of change, or of the bytes or samples in the row.

    Returns None if there is no such file.
    """
    if audio is None:
        return None
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    if audio.get("array") is not None:
        samples = np.ascontiguousarray(audio["array"])
        digest.update(f"{samples.dtype} {samples.shape} {audio.get('sampling_rate')} ".encode())
        digest.update(samples.data)
    elif audio.get("bytes") is not None:
        digest.update(audio["bytes"])
    else:
        path = os.path.abspath(audio.get("path") or "")
        try:
            stat = os.stat(path)
        except OSError:
            return None
        digest.update(f"{path}\0{stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.digest()


def audio_key(samples: np.ndarray, rate: int) -> str:
    """Return a hash of the audio, 32 hexadecimal digits. It doesn't depend on file name or lossless compression.

    Args:
        samples: float32 `(samples,)`, mono.
        rate: sampling rate, Hz.
    """
    digest = hashlib.blake2b(f"{rate} ".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(samples, dtype="<f4").data)
    return digest.hexdigest()


def kept_in() -> Path:
    """Return the directory of what earlier checks found: `askd_hf/audio_checks-1` in `HF_HOME`."""
    return Path(constants.HF_HOME) / "askd_hf" / f"audio_checks-{VERSION}"


def _decoded(rows: Sequence[Mapping[str, Any]]) -> list[AudioInfo]:
    return [_audio_info(row["audio"]) for row in rows]


def _audio_info(audio: Mapping[str, Any] | None) -> AudioInfo:
    try:
        samples, rate = read_audio(audio)
    except AudioError as error:
        return AudioInfo(0.0, "", str(error))
    return AudioInfo(len(samples) / rate, audio_key(samples, rate), silence=silence(samples))


def _processes(clips: int) -> int:
    """Return the number of decoding processes, 0 for the current one."""
    processes = min(cores_per_process(), clips // CLIPS_PER_PROCESS)
    return processes if processes > 1 else 0


# ---- the keys of embedded audio, on disk ----


def _file_keys(audio: Dataset, recheck: bool) -> list[bytes | None]:
    """Return the `file_key` of each row: hashed, or from an earlier check of the same rows of the same Arrow files."""
    path = _row_keys(audio)
    if path is not None and not recheck and (kept := _read_row_keys(path, len(audio))):
        return kept
    # few at a time: samples that are stored as arrays become lists of Python numbers
    keys = [key for rows in audio.iter(BATCH) for key in map(file_key, rows["audio"])]
    if path is not None:
        _write_row_keys(path, b"".join(key for key in keys if key is not None))
    return keys


def _row_keys(audio: Dataset) -> Path | None:
    """Return the file for the keys of rows whose audio is embedded in Arrow files; else None.

    Its name depends on the dataset's fingerprint, as what `datasets` caches does, and on the path, size and time of
    change of the Arrow files.
    """
    files = [Path(file["filename"]) for file in audio.cache_files]
    if not files or not isinstance(audio.features["audio"], Audio):
        return None
    chunks = audio.data.column("audio").chunks
    if any(chunk.null_count or chunk.field("bytes").null_count for chunk in chunks):
        return None  # the files that they name may change
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    name = hashlib.blake2b(repr((audio._fingerprint, len(audio), stats)).encode(), digest_size=16).hexdigest()
    return kept_in() / f"{name}.keys"


def _read_row_keys(path: Path, rows: int) -> list[bytes | None] | None:
    """Return the keys in a file; None if there is none, or it isn't whole."""
    try:
        content = path.read_bytes()
        path.touch()  # used last
    except OSError:
        return None
    keys, digest = content[: KEY_BYTES * rows], content[KEY_BYTES * rows :]
    if hashlib.blake2b(keys).digest() != digest:
        return None
    return [keys[first : first + KEY_BYTES] for first in range(0, len(keys), KEY_BYTES)]


def _write_row_keys(path: Path, keys: bytes) -> None:
    """Write the keys and their hash, as a power failure may leave zeros in a file. Without a disk they are lost."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}.unfinished")
        unfinished.write_bytes(keys + hashlib.blake2b(keys).digest())
        unfinished.replace(path)
        used_last = sorted(path.parent.glob("*.keys"), key=lambda file: -file.stat().st_mtime_ns)
        for old in used_last[MAX_ROW_KEYS:]:
            old.unlink(missing_ok=True)


# ---- what was found, on disk ----


def _read_kept(files: list[bytes | None]) -> list[AudioInfo | None]:
    """Return what the last check of each of these files found, None for files that were never checked."""
    kept = _table(_newest_first(kept_in()))
    rows = pc.index_in(pa.array(files, SCHEMA.field("file").type), value_set=kept["file"], skip_nulls=True)
    columns = (kept[name].take(rows).to_pylist() for name in ("duration", "key", "silence"))
    return [
        None if key is None else AudioInfo(duration, key, silence=silent)
        for duration, key, silent in zip(*columns, strict=True)
    ]


def _newest_first(directory: Path) -> list[Path]:
    """Return the files of what was found. Their names begin with their time, in nanoseconds."""
    return sorted(directory.glob("*.parquet"), reverse=True)


def _table(paths: Sequence[Path]) -> pa.Table:
    """Return the rows of the files in their order."""
    tables = [SCHEMA.empty_table()]
    for path in paths:
        try:
            tables.append(pq.read_table(path, schema=SCHEMA))
        except FileNotFoundError:  # another run has merged it
            continue
        except (OSError, pa.ArrowInvalid) as error:
            logger.warning("%s: can't be read, so its clips are decoded again: %s", path, error)
    return pa.concat_tables(tables).combine_chunks()


def _keep(found: list[tuple[bytes | None, AudioInfo]]) -> None:
    """Write a file of what was found. No process reads a file before it is complete, and none changes one."""
    if not found:
        return
    rows = [(file, info.duration, info.key, info.silence) for file, info in found]
    table = pa.table(dict(zip(SCHEMA.names, zip(*rows, strict=True), strict=True)), schema=SCHEMA)
    directory = kept_in()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        paths = _newest_first(directory)
        merged = paths if len(paths) >= MAX_FILES else []
        path = directory / f"{time.time_ns():020}-{uuid.uuid4().hex}.parquet"
        table = pa.concat_tables([table, _table(merged)]).combine_chunks()
        is_last_check = pc.equal(pc.index_in(table["file"], value_set=table["file"]), pa.array(range(len(table))))
        pq.write_table(table.filter(is_last_check), path.with_suffix(".unfinished"))
        path.with_suffix(".unfinished").replace(path)
        for old in merged:
            old.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s: can't be written, so the next start decodes the clips again: %s", directory, error)
