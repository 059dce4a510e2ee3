"""The teacher's soft labels, computed once and kept as columns of a saved dataset: training then needs no teacher.

For each label token they are the `k` most probable tokens with their log-probabilities, the mass of all others, and
the label's own log-probability: `objective.TopK`, a few KB a clip. With them goes what they belong to: `teacher_key`,
a hash of the clip's audio and its label tokens, and `teacher_settings`, their teacher, temperature and `k`. So columns
that no longer belong to a row, or to a run, are found out before training.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch
from accelerate import PartialState
from datasets import Dataset, DatasetInfo, Features, LargeList, List, Value, concatenate_datasets, load_from_disk
from filelock import FileLock, Timeout
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration
from transformers.models.whisper.modeling_whisper import shift_tokens_right

from ..errors import UserError, disk_errors
from ..objective import TopK
from ..projection import capture_lm_head_inputs
from . import TEACHER_COLUMNS, SpeechCollator, SpeechStream
from .columns import is_text
from .encoder_cache import feature_settings, weights_digest

PART_CLIPS = 256  # a killed pass loses at most so many clips a process
TOKEN_CHUNK_SIZE = 1024  # projected onto the vocabulary
RELABEL = "label it again: askd-hf cache-teacher, or --teacher_cache_dir DIR"
KEY, SETTINGS = "teacher_key", "teacher_settings"
ALL_COLUMNS = (KEY, SETTINGS, *TEACHER_COLUMNS)
LABELS = 2  # the kind of label texts: raise it if the same transcript gets other tokens. 1: without a leading space
OLD_LABELS = (
    "was labelled by an older version of askd_hf, whose label texts had no space in front, as Whisper writes it: the "
    "teacher's answers are to other tokens"
)
SAID_OF_TEACHERS = dict.fromkeys(
    ("labels", "teacher", "weights", "computed_in", "vocabulary", "top_k", "temperature", "features")
)
# float16 keeps a log-probability to 0.05 %; the target is normalized anew when it is read
SOFT_LABELS = Features(
    {
        KEY: Value("string"),
        SETTINGS: Value("string"),
        "teacher_token_ids": List(List(Value("uint16"))),
        "teacher_log_probs": List(List(Value("float16"))),
        "teacher_log_rest": List(Value("float32")),
        "teacher_label_log_prob": List(Value("float32")),
    }
)


def teacher_settings(
    teacher: WhisperForConditionalGeneration,
    name: str,
    top_k: int,
    temperature: float,
    dtype: torch.dtype,
    int8: bool = False,
    extractor: WhisperFeatureExtractor | None = None,
) -> str:
    """What soft labels depend on besides audio and transcripts, as JSON.

    Args:
        teacher: with its full weights, not yet cast.
        dtype: that it computes in: of autocast, or else of its weights.
        int8: whether it will have weights in 8 bits.
        extractor: of its features. Default: Whisper's with so many mel bins.
    """
    extractor = extractor or WhisperFeatureExtractor(feature_size=teacher.config.num_mel_bins)
    settings = dict(
        labels=LABELS,
        teacher=name,
        weights=weights_digest(teacher),
        computed_in=str(dtype).removeprefix("torch.") + (" with int8 weights" if int8 else ""),
        vocabulary=teacher.config.vocab_size,
        top_k=top_k,
        temperature=temperature,
        features=feature_settings(extractor),
    )
    return json.dumps(settings)


def label_keys(dataset: Dataset, collator: SpeechCollator) -> list[str]:
    """For each row a hash of its audio and its label tokens. Needs the column `audio_key` and those of labels."""
    keys = []
    for row in dataset.remove_columns("audio"):
        labels = " ".join(map(str, collator.label_ids(row)))
        keys.append(hashlib.blake2b(f"{row['audio_key']} {labels}".encode(), digest_size=16).hexdigest())
    return keys


def has_soft_labels(dataset: Dataset | SpeechStream) -> bool:
    """Whether the dataset has all columns of `cache_teacher`, and not others that are called so."""
    if not isinstance(dataset, Dataset) or not set(ALL_COLUMNS) <= set(dataset.column_names):
        return False
    kinds = dataset.features
    return all(map(is_text, (kinds[KEY], kinds[SETTINGS]))) and all(
        isinstance(kinds[name], List | LargeList) for name in TEACHER_COLUMNS
    )


def without_soft_labels(dataset: Dataset) -> Dataset:
    return dataset.remove_columns([name for name in ALL_COLUMNS if name in dataset.column_names])


def check_settings(dataset: Dataset, temperature: float, vocabulary: int, ours: str | None = None) -> None:
    """Raise `UserError` unless the dataset's soft labels are such as a run needs.

    Args:
        temperature, vocabulary: of the objective, of the student.
        ours: `teacher_settings` of this run's teacher; None if it has none of its own.
    """
    for settings in _settings_of(dataset, "the dataset"):
        if settings["labels"] != LABELS:
            raise UserError(f"the dataset {OLD_LABELS}: {RELABEL}")
        differences = []
        if settings["temperature"] != temperature:
            differences.append(f"at temperature {settings['temperature']:g}, the run's is {temperature:g}")
        if ours is not None and settings["weights"] != json.loads(ours)["weights"]:
            differences.append(f"by another teacher ({settings['teacher']})")
        if ours is not None and settings["features"] != json.loads(ours)["features"]:
            differences.append("from other features (preprocessor_config.json)")
        if settings["vocabulary"] != vocabulary:
            differences.append(f"with {settings['vocabulary']} tokens in the vocabulary, the student has {vocabulary}")
        if differences:
            raise UserError(f"the dataset was labelled {'; '.join(differences)}. Change that, or {RELABEL}")


def check_soft_labels(dataset: Dataset, collator: SpeechCollator, temperature: float, ours: str | None) -> None:
    """As `check_settings`, and unless they are those of the dataset's audio and transcripts as they are now.

    Args:
        dataset: of `filter_invalid_clips`, loaded with its teacher columns.
        ours: `teacher_settings` of this run's teacher; None if it has none of its own.
    """
    check_settings(dataset, temperature, collator.config.vocab_size, ours)
    keys = zip(dataset[KEY][:], label_keys(dataset, collator), strict=True)
    changed = [row for row, (then, now) in enumerate(keys) if then != now]
    if changed:
        raise UserError(
            f"{len(changed)} of {len(dataset)} rows have other audio or another transcript than when the teacher "
            f"labelled them, the first is row {changed[0]}, {dataset['clip'][changed[0]]}: {RELABEL}. (Other label "
            "tokens may come from another --language, --task, --text_case or tokenizer)"
        )


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
    """The rows of the dataset with the teacher's columns, from `directory`; what isn't there is labelled first.

    `directory` is a dataset of `save_to_disk`: all rows that were ever labelled there, with all their columns and
    their audio. The pass goes on where it was interrupted. Of several processes, which must share the disk, each
    labels its part, and the main one saves.

    Args:
        load_teacher: gives the teacher where it is to run, in its working dtype; called if a label is missing.
        settings: of `teacher_settings`.
        dataset: of `filter_invalid_clips`.
        collator: its `encoder_cache`, if it has one, is of the teacher's encoder.
        autocast: the dtype to compute in, if not the teacher's.

    Raises:
        UserError: `directory` has the labels of another teacher, temperature or k, or other columns; another run is
            labelling there; no room on the disk.
    """
    directory = Path(directory)
    dataset = dataset.remove_columns([name for name in ALL_COLUMNS if name in dataset.column_names])
    keys = label_keys(dataset, collator)
    stored = _open(directory, settings, dataset)
    there = set() if stored is None else set(stored[KEY][:])
    # each once, and the same for all processes: nothing is saved there before all are done
    missing = {key: row for row, key in enumerate(keys) if key not in there}
    _check_room(directory, dataset, list(missing.values()), json.loads(settings)["top_k"])
    if missing:
        process = PartialState()
        unfinished = directory.with_name(f"{directory.name}.unfinished")
        with disk_errors(f"--teacher_cache_dir {directory}"), _alone(unfinished):
            share = list(missing.items())[process.process_index :: process.num_processes]
            _label(load_teacher(), settings, dataset, share, collator, unfinished, batch_size, autocast, num_workers)
            process.wait_for_everyone()
            if process.is_main_process:
                # a process killed after it had saved left its parts
                parts = [part for part in _parts(unfinished, settings) if not there.issuperset(part[KEY][:])]
                _save(stored, parts, directory)
                shutil.rmtree(unfinished)
            process.wait_for_everyone()
        stored = load_from_disk(str(directory))
    rows = {key: row for row, key in enumerate(stored[KEY][:])}
    return stored.select([rows[key] for key in keys], keep_in_memory=True)


@torch.no_grad()
def soft_labels(
    teacher: WhisperForConditionalGeneration,
    batch: dict[str, Any],
    top_k: int,
    temperature: float,
    autocast: torch.dtype | None = None,
) -> TopK:
    """The teacher's soft labels at the label tokens of a batch of `SpeechCollator`, clip after clip."""
    device = teacher.device
    labels = batch["labels"].to(device)
    real = labels != -100
    if "decoder_input_ids" in batch:
        decoder_input_ids = batch["decoder_input_ids"].to(device)
    else:
        config = teacher.config
        decoder_input_ids = shift_tokens_right(labels, config.pad_token_id, config.decoder_start_token_id)
    inputs = {"decoder_input_ids": decoder_input_ids, "use_cache": False}
    if "encoder_outputs" in batch:
        inputs["encoder_outputs"] = (batch["encoder_outputs"].to(device, teacher.dtype),)
    else:
        inputs["input_features"] = batch["input_features"].to(device, teacher.dtype)
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        with capture_lm_head_inputs(teacher, real) as captured:
            teacher(**inputs)
        hidden, weight = captured[0].in_compute_dtype()
    chunks = zip(hidden.split(TOKEN_CHUNK_SIZE), labels[real].split(TOKEN_CHUNK_SIZE), strict=True)
    targets = [TopK.from_logits(h @ weight.T, tokens, top_k, temperature) for h, tokens in chunks]
    return TopK(*(torch.cat(column) for column in zip(*targets, strict=True)))


def _label(
    teacher: WhisperForConditionalGeneration,
    settings: str,
    dataset: Dataset,
    share: list[tuple[str, int]],
    collator: SpeechCollator,
    unfinished: Path,
    batch_size: int,
    autocast: torch.dtype | None,
    num_workers: int,
) -> None:
    """Label the clips `(key, row)` that aren't in `unfinished` yet; a dataset there for about every `PART_CLIPS`."""
    read = json.loads(settings)
    done = {key for part in _parts(unfinished, settings) for key in part[KEY][:]}
    share = [(key, row) for key, row in share if key not in done]
    clips = dataset.select([row for _, row in share], keep_in_memory=True)
    columns: dict[str, list] = {name: [] for name in ALL_COLUMNS}
    labelled = written = 0  # counted here: a progress bar that isn't shown doesn't count
    progress = tqdm(total=len(share), desc="Labelling", unit="clip", disable=not PartialState().is_main_process)
    try:
        for batch in DataLoader(clips, batch_size, collate_fn=collator, num_workers=num_workers):
            target = soft_labels(teacher, batch, read["top_k"], read["temperature"], autocast)
            lengths = (batch["labels"] != -100).sum(1).tolist()
            _check_finite(target, batch["clip"], lengths)
            for name, column in zip(TEACHER_COLUMNS, target, strict=True):
                columns[name] += [clip.numpy() for clip in column.cpu().split(lengths)]
            columns[KEY] += [key for key, _ in share[labelled : labelled + len(lengths)]]
            columns[SETTINGS] += [settings] * len(lengths)
            labelled += len(lengths)
            progress.update(len(lengths))
            if labelled - written >= PART_CLIPS:
                _write_part(clips.select(range(written, labelled)), columns, unfinished)
                written, columns = labelled, {name: [] for name in ALL_COLUMNS}
    finally:  # after Ctrl-C too
        progress.close()
        whole = len(columns[SETTINGS])
        if whole:
            columns = {name: column[:whole] for name, column in columns.items()}
            _write_part(clips.select(range(written, written + whole)), columns, unfinished)


def _check_finite(target: TopK, clips: list[str], lengths: list[int]) -> None:
    sound = target.log_rest.isfinite() & target.log_probs.isfinite().all(1) & target.label_log_prob.isfinite()
    bad = [clip for clip, part in zip(clips, sound.split(lengths), strict=True) if not part.all()]
    if bad:
        raise UserError(f"the teacher's logits are not finite for {', '.join(bad)}: look at these clips")


def _write_part(clips: Dataset, columns: dict[str, list], unfinished: Path) -> None:
    """Clips with their labels, whole or not at all."""
    # in memory: joined on the disk, a dataset with an index would first be written anew as a whole
    rows = Dataset(clips.with_format("arrow")[:], info=DatasetInfo(features=clips.features))
    labels = Dataset.from_dict(columns, features=SOFT_LABELS)
    process = PartialState().process_index
    number = sum(part.suffix != ".saving" for part in unfinished.glob(f"part-{process:03d}-*"))
    part = unfinished / f"part-{process:03d}-{number:05d}"
    saving = part.with_suffix(".saving")
    shutil.rmtree(saving, ignore_errors=True)
    concatenate_datasets([rows, labels], axis=1).save_to_disk(str(saving))
    for file in saving.iterdir():  # on the disk before its name is
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())
    saving.rename(part)


def _parts(unfinished: Path, settings: str) -> list[Dataset]:
    """What interrupted passes have labelled."""
    parts = [load_from_disk(str(part)) for part in sorted(unfinished.glob("part-*")) if part.suffix != ".saving"]
    for part in parts:
        _check_same_settings(part, settings, unfinished)
    return parts


def _save(stored: Dataset | None, parts: list[Dataset], directory: Path) -> None:
    """Save what is `stored` and the parts to `directory`: whole or not at all."""
    whole = concatenate_datasets(parts if stored is None else [stored, *parts])
    saving, old = (directory.with_name(f"{directory.name}.{end}") for end in ("saving", "replaced"))
    shutil.rmtree(saving, ignore_errors=True)
    whole.save_to_disk(str(saving))
    if directory.exists():
        shutil.rmtree(old, ignore_errors=True)  # of a process killed before the last line here
        directory.rename(old)
    saving.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _alone(unfinished: Path) -> Iterator[None]:
    """Make the directory, and be the only run that labels there."""
    unfinished.mkdir(parents=True, exist_ok=True)
    if not PartialState().is_main_process:
        yield
        return
    try:
        with FileLock(unfinished / "lock", timeout=0):
            yield
    except Timeout:
        raise UserError(f"{unfinished}: another run is labelling there; wait for it, or stop it") from None


def _open(directory: Path, settings: str, dataset: Dataset) -> Dataset | None:
    """What is saved there; None if nothing is. Raises `UserError` if `dataset` labelled so doesn't belong there."""
    process = PartialState()
    old = directory.with_name(f"{directory.name}.replaced")
    if process.is_main_process and old.is_dir() and not directory.exists():
        old.rename(directory)  # a process was killed between the two renamings of `_save`
    process.wait_for_everyone()
    if not directory.exists() or not any(directory.iterdir()):
        return None
    try:
        stored = load_from_disk(str(directory))
    except FileNotFoundError as error:
        raise UserError(f"--teacher_cache_dir {directory}: no dataset is saved there; name a new directory") from error
    if not isinstance(stored, Dataset) or not has_soft_labels(stored):
        raise UserError(f"--teacher_cache_dir {directory}: a dataset without a teacher's labels; name a new directory")
    _check_same_settings(stored, settings, directory)
    columns = {name: feature for name, feature in stored.features.items() if name not in ALL_COLUMNS}
    if columns != dict(dataset.features):
        raise UserError(
            f"--teacher_cache_dir {directory} holds a dataset with other columns ({', '.join(columns)}) than this one "
            f"({', '.join(dataset.features)}): name another directory"
        )
    return stored


def _check_same_settings(labelled: Dataset, settings: str, directory: Path) -> None:
    ours = json.loads(settings)
    for theirs in _settings_of(labelled, str(directory)):
        if theirs["labels"] != LABELS:
            raise UserError(
                f"--teacher_cache_dir {directory} {OLD_LABELS}. Nothing in it can be used: name another directory, or "
                "delete it"
            )
        differences = [
            f"{name} {theirs[name]} (now {ours[name]})" if name != "features" else "other features"
            for name in ours
            if theirs[name] != ours[name]
        ]
        # the same weights may have another name
        if any(theirs[name] != ours[name] for name in ours if name != "teacher"):
            raise UserError(
                f"--teacher_cache_dir {directory} was made with {', '.join(differences)}. Use the same, or name another "
                "directory"
            )


def _settings_of(labelled: Dataset, where: str) -> list[dict[str, Any]]:
    """The different `teacher_settings` in a dataset, None where they don't say something.

    Raises `UserError` if they are something else.
    """
    found = []
    for text in labelled.unique(SETTINGS):
        try:
            found.append(SAID_OF_TEACHERS | json.loads(text))
        except (TypeError, ValueError):  # None, no JSON, or not an object
            raise UserError(
                f"{where}: the column {SETTINGS} has {text!r}, not the settings of a teacher: {RELABEL}"
            ) from None
    return found


def _check_room(directory: Path, dataset: Dataset, missing: list[int], top_k: int) -> None:
    """Say how big the cache will be; raise `UserError` if the disk is too small for what is missing."""
    if not PartialState().is_main_process:
        return
    labels = sum(dataset["label_tokens"][:]) * (4 * top_k + 8)
    print(
        f"teacher cache {directory}: {len(dataset)} clips, {labels / 1e6:.1f} MB of labels on disk beside the audio "
        f"({len(dataset) - len(missing)} of {len(dataset)} there)",
        flush=True,
    )
    if not missing:
        return
    stored = sum(file.stat().st_size for file in directory.iterdir()) if directory.is_dir() else 0
    # what was there and what is new, once more while both are being joined
    needed = stored + 2 * (_audio_bytes(dataset.select(missing, keep_in_memory=True)) + labels)
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"--teacher_cache_dir {directory}: no room on the disk. {needed / 1e9:.2f} GB are needed while it is written, "
            f"{free / 1e9:.2f} GB are free. Make room, or name a directory on another disk"
        )


def _audio_bytes(dataset: Dataset) -> int:
    """Of the clips' files, which are saved with the labels."""
    total = 0
    for audio in dataset.with_format("arrow").select_columns("audio").iter(1000):
        embedded, paths = (pc.struct_field(audio["audio"], name) for name in ("bytes", "path"))
        total += pc.sum(pc.binary_length(embedded)).as_py() or 0
        alone = [path for path, content in zip(paths, embedded, strict=True) if not content.is_valid]
        total += sum(Path(path.as_py()).stat().st_size for path in alone if path.is_valid)
    return total
