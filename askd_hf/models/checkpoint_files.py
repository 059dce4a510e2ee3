"""Check that the files of a model's directory are complete, before they are loaded.

A clone without git-lfs has small text files in place of the large ones. An interrupted copy or download truncates
files. The errors of the libraries that read them don't name the file.
"""

import contextlib
import json
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import WhisperConfig

from ..errors import UserError

CONFIG = "config.json"
# in the order of transformers
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
# of generation and the processor, as current and older versions of `save_pretrained` write them
PROCESSOR_FILES = (
    *("generation_config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "normalizer.json"),
)
SMALL_FILES = (CONFIG, *PROCESSOR_FILES, ADAPTER[0])
OTHER_WEIGHTS = {
    "tf_model.h5": "TensorFlow's",
    "flax_model.msgpack": "Flax's",
    "model.bin": "CTranslate2's",
    "model.pt": "OpenAI's",
}
POINTER = b"version https://git-lfs.github.com/spec/"  # the start of a pointer file of git-lfs
EXPECTED = "expected a Hub id or a directory with config.json and model.safetensors, as `save_pretrained` writes it"


def check_model_type(name: str, model_type: str | None) -> None:
    """Raise `UserError` if the model isn't Whisper. None, for a config without the field, passes."""
    if model_type not in (None, WhisperConfig.model_type):
        raise UserError(f"{name} is a {model_type!r} model, not Whisper: only Whisper models can be distilled")


def check_files(name: str) -> None:
    """Raise `UserError` if files in a local directory are missing or incomplete. A Hub id passes."""
    directory = Path(name).expanduser()
    if directory.is_file():
        raise UserError(f"{name} is a file: {EXPECTED}")
    if not directory.is_dir():
        return
    for file in SMALL_FILES:
        if (directory / file).is_file():
            _check_small(directory / file)
    if (directory / CONFIG).is_file():
        # before the weights, as other models have other file names
        check_model_type(name, json.loads((directory / CONFIG).read_text(encoding="utf-8")).get("model_type"))
        for weights in weight_files(directory):
            check_weights(weights)
    elif (directory / ADAPTER[0]).is_file():
        files = [directory / file for file in ADAPTER[1:] if (directory / file).is_file()]
        if not files:
            raise UserError(f"{directory} has an {ADAPTER[0]}, but no weights of the adapter: {ADAPTER[1]} is missing")
        check_weights(files[0])
    else:
        raise UserError(f"{directory} has no {CONFIG}: {EXPECTED}")


def weight_files(directory: Path) -> list[Path]:
    """Return the weight files that `from_pretrained` reads. Raises `UserError` if files are missing."""
    found = next((directory / name for name in WEIGHTS if (directory / name).is_file()), None)
    if found is None:
        others = [f"{whose} {name}" for name, whose in OTHER_WEIGHTS.items() if (directory / name).is_file()]
        has = f". Convert {' and '.join(others)} first" if others else ""
        raise UserError(f"{directory} has no weights: model.safetensors is missing{has}")
    if found.suffix != ".json":
        return [found]
    _check_small(found)
    shards = json.loads(found.read_text(encoding="utf-8")).get("weight_map", {})
    files = [directory / name for name in sorted(set(shards.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise UserError(
            f"{directory} lacks {', '.join(missing) or 'all shards'}, listed in {found.name}: {_again(found)}"
        )
    return files


def check_weights(file: Path) -> None:
    """Raise `UserError` if a weight file is incomplete, as far as its format shows."""
    _check_pointer(file)
    size = file.stat().st_size
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is incomplete ({size:,} bytes; {error}): {_again(file)}") from error
        return
    with file.open("rb") as opened:
        is_zip = opened.read(4) == b"PK\x03\x04"  # torch before 1.6 wrote a pickle
    if not size or (is_zip and not zipfile.is_zipfile(file)):  # the directory of a zip file is at its end
        raise UserError(f"{file} is incomplete ({size:,} bytes): {_again(file)}")


def _check_small(file: Path) -> None:
    _check_pointer(file)
    if file.suffix != ".json":
        return
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        size = file.stat().st_size
        raise UserError(f"{file} is incomplete or not JSON ({size:,} bytes; {error}): {_again(file)}") from error


def _check_pointer(file: Path) -> None:
    with file.open("rb") as opened:
        if opened.read(len(POINTER)) != POINTER:
            return
    raise UserError(
        f"{file} is only a Git LFS pointer ({file.stat().st_size} bytes): run "
        f"`git lfs install` and `git lfs pull` in {file.parent}"
    )


def _again(file: Path) -> str:
    return f"copy or download it again into {file.parent}"


@contextlib.contextmanager
def loading_errors(name: str) -> Iterator[None]:
    """Turn the errors of libraries that can't read a file into a `UserError` about `name`."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name} can't be loaded: {reason[:300]}") from error
