"""Where the audio files are that rows name instead of holding them, and which of them may be opened.

A path in one's own data may lead anywhere. One that was downloaded may not leave its dataset: whoever wrote it could
have any file of this machine trained on, and published with a cache or with pseudo-labels.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from ..errors import UserError
from .metadata import warn_once


@dataclass(frozen=True)
class ClipFiles:
    """How the paths of a dataset's rows are understood.

    Attributes:
        name: of the dataset in messages.
        folders: those that a relative path is looked for in, one after another; after them in the working directory.
        root: of a dataset that was downloaded: the directory that no path may leave.
        downloaded: whether it was. Without a `root` there are no files beside the rows, and none is opened.
    """

    name: str
    folders: tuple[Path, ...] = ()
    root: Path | None = None
    downloaded: bool = False

    def locate(self, path: str) -> str | None:
        """The file that a path of a row means, whether it exists or not; None for one that isn't opened.

        Raises `UserError` for a path that leads out of a downloaded dataset.
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
            warn_once(f"{self.name}: audio files with relative names are missing; they were looked for in {where}")
            found = clip_file(folders[0], path)
        if self.root is not None:
            check_target(found, self.root, self.name)
        return str(found)

    def of_row(self, audio: Mapping[str, Any] | str | bytes | None) -> dict[str, Any] | None:
        """A row's audio as `{"bytes", "path"}`, with `locate` of its path if that is to be opened."""
        if isinstance(audio, str):
            audio = {"path": audio}
        elif isinstance(audio, bytes):
            audio = {"bytes": audio}
        if audio is None:
            return None
        content, path = audio.get("bytes"), audio.get("path")
        return {"bytes": content, "path": self.locate(path) if content is None and path else path}


def clip_file(folder: Path, name: str) -> Path:
    """The file of this name, relative to the folder or absolute. Windows' separators are understood."""
    file = folder / name
    if "\\" in name and not file.exists():
        return folder / name.replace("\\", "/")
    return file


def is_inside(name: str, folder: Path, root: Path) -> bool:
    """Whether the name of a file, relative to `folder`, stays in `root` on every system, links left aside."""
    windows = PureWindowsPath(name)  # understands both separators
    if windows.drive or windows.root or "://" in name:
        return False
    return Path(os.path.normpath(folder / windows.as_posix())).is_relative_to(root)


def check_inside(name: str, folder: Path, root: Path, dataset: str) -> None:
    """Raise `UserError` for the name of a file outside of a downloaded dataset."""
    if not is_inside(name, folder, root):
        raise UserError(
            f"{dataset}: a row names the audio file {name!r}, which is no part of the dataset. It was downloaded, so "
            "no other file of this machine is read for it"
        )


def check_target(file: Path, root: Path, dataset: str) -> None:
    """Raise `UserError` if a symbolic link leads out of a downloaded dataset.

    In the cache of huggingface_hub all files are links, from `snapshots/REVISION` to `blobs` beside it.
    """
    cached = root.parent.parent if root.parent.name == "snapshots" else root
    if not Path(os.path.realpath(file)).is_relative_to(os.path.realpath(cached)):
        raise UserError(f"{dataset}: {file} leads to {os.path.realpath(file)}, out of the downloaded dataset")


def was_downloaded(folder: Path) -> bool:
    """Whether `hf download --local-dir` made the folder."""
    return (folder / ".cache" / "huggingface").is_dir()
