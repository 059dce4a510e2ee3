"""Resolve the audio paths in rows, and restrict which files may be opened.

Paths in local data are unrestricted. Paths in a downloaded dataset must stay within the dataset: otherwise its author
could make any local file part of the training data, and of a published cache or pseudo-label dataset.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from ..errors import UserError, warn_once


@dataclass(frozen=True)
class ClipFiles:
    """Resolves the audio paths in the rows of a dataset."""

    name: str
    # where relative paths are searched, in order. The working directory is searched last.
    folders: tuple[Path, ...] = ()
    root: Path | None = None  # directory of a downloaded dataset, which no path may leave; None for local data
    downloaded: bool = False  # whether the dataset was downloaded. If so and `root` is None, no file is opened.

    def locate(self, path: str) -> str | None:
        """Return the file of a path in a row, whether it exists or not, or None if it may not be opened.

        Raises `UserError` for a path outside a downloaded dataset.
        """
        if self.downloaded and self.root is None:
            check_inside(path, Path("/dataset"), Path("/dataset"), self.name)
            return None
        folders = self.folders
        if self.root is not None:
            folders = tuple(folder for folder in folders if is_inside(path, folder, self.root))
            check_inside(path, (folders or self.folders)[0], self.root, self.name)
        found = next((file for folder in folders if (file := clip_file(folder, path)).exists()), None)
        if found is None and self.root is None and (not folders or os.path.exists(path)):
            return path
        if found is None:
            where = " and ".join(map(str, folders)) + ("" if self.root else ", and in the working directory")
            warn_once(f"{self.name}: audio files with relative paths are missing; searched in {where}")
            found = clip_file(folders[0], path)
        if self.root is not None:
            check_target(found, self.root, self.name)
        return str(found)

    def of_row(self, audio: Mapping[str, Any] | str | bytes | None) -> dict[str, Any] | None:
        """Return a row's audio as `{"bytes", "path"}`. The path is resolved with `locate` if there are no bytes."""
        if isinstance(audio, str):
            audio = {"path": audio}
        elif isinstance(audio, bytes):
            audio = {"bytes": audio}
        if audio is None:
            return None
        content, path = audio.get("bytes"), audio.get("path")
        return {"bytes": content, "path": self.locate(path) if content is None and path else path}


def clip_file(folder: Path, name: str) -> Path:
    """Return the file with this path, relative to the folder or absolute. Windows separators are supported."""
    file = folder / name
    if "\\" in name and not file.exists():
        return folder / name.replace("\\", "/")
    return file


def is_inside(name: str, folder: Path, root: Path) -> bool:
    """Return whether a path, relative to `folder`, is within `root` on every platform. Links aren't resolved."""
    windows = PureWindowsPath(name)  # parses both separators
    if windows.drive or windows.root or "://" in name:
        return False
    return Path(os.path.normpath(folder / windows.as_posix())).is_relative_to(root)


def check_inside(name: str, folder: Path, root: Path, dataset: str) -> None:
    """Raise `UserError` for a path outside a downloaded dataset."""
    if not is_inside(name, folder, root):
        raise UserError(
            f"{dataset}: the audio path {name!r} is outside the dataset. Since the dataset was downloaded, other "
            "local files can't be read"
        )


def check_target(file: Path, root: Path, dataset: str) -> None:
    """Raise `UserError` if a symbolic link points outside a downloaded dataset.

    In the cache of huggingface_hub all files are links from `snapshots/REVISION` to `blobs` in the same directory.
    """
    cached = root.parent.parent if root.parent.name == "snapshots" else root
    if not Path(os.path.realpath(file)).is_relative_to(os.path.realpath(cached)):
        raise UserError(f"{dataset}: {file} links to {os.path.realpath(file)}, outside the downloaded dataset")


def was_downloaded(folder: Path) -> bool:
    """Return whether the folder was created by `hf download --local-dir`."""
    return (folder / ".cache" / "huggingface").is_dir()
