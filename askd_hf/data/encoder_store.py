"""The files of a cache of encoder outputs, see `askd_hf.data.encoder_cache`."""

import contextlib
import itertools
import json
import os
import secrets
import socket
from collections.abc import Callable, Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError, disk_errors
from .cache_space import CacheSpace, free_bytes

SETTINGS_FILE = "settings.json"
ENDS = "f16", "keys"  # of the two files of a part
INT8 = "int8"


class EncoderCache:
    """Encoder outputs by `audio_key`, as filled by `cache_encoder`.

    A pickled cache contains only the arguments. The receiving process opens the files itself.

    Args:
        folder: `DIR/FINGERPRINT`.
        positions, width: shape of an output.
        stored: "float16"; or "int8" for 8-bit integers with a float16 scale per position.
    """

    def __init__(self, folder: Path, positions: int, width: int, stored: str = "float16"):
        self.folder, self.positions, self.width, self.stored = folder, positions, width, stored
        self.row_bytes = positions * (width + 2 if stored == INT8 else 2 * width)
        self.reload()

    def __reduce__(self):
        return EncoderCache, (self.folder, self.positions, self.width, self.stored)

    @property
    def settings(self) -> dict[str, Any]:
        """What the outputs depend on."""
        return json.loads((self.folder / SETTINGS_FILE).read_text(encoding="utf-8"))

    def has(self, keys: Sequence[str]) -> np.ndarray:
        """Return which of these keys have an output, bool `(keys,)`."""
        return self._find(keys) >= 0

    def reload(self) -> None:
        """Read the files again, with the outputs that this and other processes have added."""
        self._parts: list[np.ndarray] = []  # memory-mapped, uint8 (rows, bytes)
        found: list[bytes] = []
        places: list[np.ndarray] = []
        for data in sorted(self.folder.glob("part-*.f16")):
            if keys := _complete_keys(data, self.row_bytes):
                places.append(np.stack([np.full(len(keys), len(self._parts)), np.arange(len(keys))], axis=1))
                self._parts.append(np.memmap(data, np.uint8, mode="r", shape=(len(keys), self.row_bytes)))
                found += keys
        # sorted arrays take a twelfth of the memory of a dictionary, and processes that are forked share them
        unsorted = np.array(found, dtype=bytes)
        order = np.argsort(unsorted)
        self._keys = unsorted[order]
        self._places = np.concatenate(places)[order] if places else np.zeros((0, 2), dtype=np.int64)  # part, row

    def _find(self, keys: Sequence[str]) -> np.ndarray:
        """Return the index of each key in the sorted keys, int `(keys,)`; -1 for a missing one."""
        wanted = np.array([key.encode("ascii") for key in keys], dtype=bytes)
        if not len(self._keys) or not len(wanted):
            return np.full(len(wanted), -1)
        index = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
        return np.where(self._keys[index] == wanted, index, -1)

    def read(self, keys: list[str]) -> Tensor:
        """Return the outputs of `keys`, float16 `(clips, positions, width)`. Raise `UserError` if one is missing."""
        index = self._find(keys)
        if (index < 0).any():
            raise UserError(
                f"encoder cache {self.folder}: no cached encoder output for {(index < 0).sum()} of {len(keys)} clips "
                f"(audio_key {keys[np.argmin(index)]}, ...). The cache was complete when training started, so its "
                "files have changed; restart to recompute them"
            )
        outputs = np.empty((len(keys), self.positions, self.width), np.float16)
        for output, (part, row) in zip(outputs, self._places[index], strict=True):
            output[:] = self.unpacked(self._parts[part][row])
        return torch.from_numpy(outputs)

    def unpacked(self, row: np.ndarray) -> np.ndarray:
        """Return a stored output, float16 `(positions, width)`."""
        if self.stored != INT8:
            return row.view(np.float16).reshape(self.positions, self.width)
        scales, values = row[: 2 * self.positions].view(np.float16), row[2 * self.positions :].view(np.int8)
        return scales[:, None] * values.reshape(self.positions, self.width)

    def packed(self, outputs: Tensor) -> bytes:
        """Return the bytes of outputs, float16 `(clips, positions, width)`."""
        if self.stored != INT8:
            return outputs.contiguous().numpy().tobytes()
        values = outputs.float()
        scales = (values.abs().amax(dim=-1, keepdim=True) / 127).to(torch.float16)
        # a scale below the smallest float16 is 0, and so are its values
        integers = (values / scales.float().clamp(min=1e-12)).round().clamp(-127, 127).to(torch.int8)
        return b"".join(
            scale.numpy().tobytes() + clip.numpy().tobytes() for scale, clip in zip(scales, integers, strict=True)
        )

    def space(self, keys: list[str]) -> CacheSpace:
        """Return the disk space for the outputs of these distinct keys."""
        cached = int(self.has(keys).sum())
        missing = (len(keys) - cached) * self.row_bytes
        return CacheSpace(len(keys), cached, missing, missing, free_bytes(self.folder))

    @contextlib.contextmanager
    def open_writer(self) -> Iterator[Callable[[list[str], Tensor], None]]:
        """Yield a function `append(keys, outputs)`; outputs are float16 `(clips, positions, width)`.

        Each writer has a part of its own, so it needs no lock: on many shared disks a lock holds within a node only.
        """
        name = f"part-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        with contextlib.ExitStack() as stack:
            with disk_errors(f"encoder cache {self.folder}"):
                data, lines = (stack.enter_context(FileIO(self.folder / f"{name}.{end}", "xb")) for end in ENDS)

            def append(keys: list[str], outputs: Tensor) -> None:
                with disk_errors(f"encoder cache {self.folder}"):
                    try:
                        # in this order, so that every key on disk has its row
                        _write(data, self.packed(outputs))
                        _write(lines, "".join(f"{key}\n" for key in keys).encode("ascii"))
                    except OSError:  # the disk is full: what is written after half a row would have the wrong key
                        stack.close()
                        raise

            yield append


def _complete_keys(data: Path, row_bytes: int) -> list[bytes]:
    """Return the keys of the valid rows of a part, in order."""
    file = data.with_suffix(".keys")
    if not file.exists():
        return []
    lines = file.read_bytes().split(b"\n")[:-1]  # after the last newline: nothing, or an incomplete key
    # a power failure can leave zeros in a line
    return list(itertools.takewhile(bytes.isalnum, lines))[: data.stat().st_size // row_bytes]


def _write(file: FileIO, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]
    os.fsync(file.fileno())
