"""The teacher's soft labels, computed once and kept as columns of a saved dataset: training then needs no teacher.

For each label token they are the `k` most probable tokens with their log-probabilities, the mass of all others, and
the label's own log-probability: `objective.TopK`, a few KB a clip. With them goes what they belong to: `teacher_key`,
a hash of the clip's audio and its label tokens, and `teacher_settings`, their teacher, temperature and `k`. So columns
that no longer belong to a row, or to a run, are found out before training.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from datasets import Dataset, Features, List, Value, concatenate_datasets, load_from_disk
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import WhisperForConditionalGeneration
from transformers.models.whisper.modeling_whisper import shift_tokens_right

from .data import TEACHER_COLUMNS, SpeechCollator
from .data.encoder_cache import weights_digest
from .errors import UserError
from .objective import TopK
from .projection import unprojected

PART_CLIPS = 256  # a killed pass loses at most so many clips a process
TOKENS_AT_ONCE = 1024  # projected onto the vocabulary
KEY, SETTINGS = "teacher_key", "teacher_settings"
ALL_COLUMNS = (KEY, SETTINGS, *TEACHER_COLUMNS)
# float16 keeps a log-probability to 0.05 %; the target is normalised anew when it is read
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
    teacher: WhisperForConditionalGeneration, name: str, top_k: int, temperature: float, dtype: torch.dtype
) -> str:
    """What soft labels depend on besides audio and labels, as JSON. `teacher` has its full weights, not yet cast."""
    settings = dict(
        teacher=name,
        weights=weights_digest(teacher),
        dtype=str(dtype).removeprefix("torch."),
        vocabulary=teacher.config.vocab_size,
        top_k=top_k,
        temperature=temperature,
    )
    return json.dumps(settings)


def label_keys(dataset: Dataset, collator: SpeechCollator) -> list[str]:
    """For each row a hash of its audio and its label tokens. Needs the columns `audio_key` and `text`."""
    keys = []
    for audio_key, text in zip(dataset["audio_key"][:], dataset["text"][:], strict=True):
        labels = " ".join(map(str, collator.label_ids(text)))
        keys.append(hashlib.blake2b(f"{audio_key} {labels}".encode(), digest_size=16).hexdigest())
    return keys


def has_soft_labels(dataset: Dataset) -> bool:
    return set(ALL_COLUMNS) <= set(dataset.column_names)


def check_soft_labels(dataset: Dataset, collator: SpeechCollator, temperature: float, ours: str | None) -> None:
    """Raise `UserError` unless the dataset's teacher columns belong to its rows and to this run.

    Args:
        dataset: of `check_clips`, loaded with its teacher columns.
        temperature: of the objective.
        ours: `teacher_settings` of this run's teacher; None if it has none of its own.
    """
    advice = "label it again: examples/cache_teacher.py, or --cache_teacher DIR"
    for text in dataset.unique(SETTINGS):
        settings = json.loads(text)
        differences = []
        if settings["temperature"] != temperature:
            differences.append(f"at temperature {settings['temperature']:g}, the run's is {temperature:g}")
        if ours is not None and settings["weights"] != json.loads(ours)["weights"]:
            differences.append(f"by another teacher ({settings['teacher']})")
        if settings["vocabulary"] != collator.config.vocab_size:
            differences.append(
                f"with {settings['vocabulary']} tokens in the vocabulary, the student has {collator.config.vocab_size}"
            )
        if differences:
            raise UserError(
                f"the dataset was labelled by its teacher {'; '.join(differences)}. Change that, or {advice}"
            )
    changed = [
        i for i, (a, b) in enumerate(zip(dataset[KEY][:], label_keys(dataset, collator), strict=True)) if a != b
    ]
    if changed:
        raise UserError(
            f"{len(changed)} of {len(dataset)} rows have other audio or another transcript than when the teacher "
            f"labelled them, the first is row {changed[0]}, {dataset['clip'][changed[0]]}: {advice}. (Other label "
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
    """The dataset with the teacher's columns, from `directory`, where those that aren't there yet are added first.

    `directory` is a dataset of `save_to_disk`: all rows that were ever labelled there, with all their columns. The
    pass goes on where it was interrupted. Of several processes each labels its share, and the main one saves.

    Args:
        load_teacher: gives the teacher where it is to run, in its working dtype; called if a label is missing.
        settings: of `teacher_settings`.
        dataset: of `check_clips`.
        collator: its `encoder_cache`, if it has one, is of the teacher's encoder.
        autocast: the dtype to compute in, if not the teacher's.

    Raises:
        UserError: `directory` has the labels of another teacher, temperature or k, or other columns.
    """
    process = PartialState()
    directory = Path(directory)
    dataset = dataset.remove_columns([name for name in ALL_COLUMNS if name in dataset.column_names])
    keys = label_keys(dataset, collator)
    stored = _open(directory, settings, dataset)
    there = set() if stored is None else set(stored[KEY][:])
    # each once, in the order of the rows, and the same for all processes: nothing is saved there before all are done
    missing = {key: row for row, key in reversed(list(enumerate(keys))) if key not in there}
    missing = dict(reversed(missing.items()))
    if process.is_main_process:
        _say_size(directory, dataset, json.loads(settings)["top_k"], len(missing))
    if missing:
        unfinished = directory.with_name(f"{directory.name}.unfinished")
        unfinished.mkdir(parents=True, exist_ok=True)
        share = list(missing.items())[process.process_index :: process.num_processes]
        _label(load_teacher(), settings, dataset, share, collator, unfinished, batch_size, autocast, num_workers)
        process.wait_for_everyone()
        if process.is_main_process:
            _save(stored, dataset, missing, _read_parts(unfinished, settings), directory)
            shutil.rmtree(unfinished)
        process.wait_for_everyone()
        stored = load_from_disk(str(directory))
    rows = {key: row for row, key in enumerate(stored[KEY][:])}
    labels = stored.select_columns(list(ALL_COLUMNS)).select([rows[key] for key in keys])
    return concatenate_datasets([dataset, labels], axis=1)


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
    start, pad = teacher.config.decoder_start_token_id, teacher.config.pad_token_id
    inputs = {"decoder_input_ids": shift_tokens_right(labels, pad, start), "use_cache": False}
    if "encoder_outputs" in batch:
        inputs["encoder_outputs"] = (batch["encoder_outputs"].to(device, teacher.dtype),)
    else:
        inputs["input_features"] = batch["input_features"].to(device, teacher.dtype)
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        with unprojected(teacher, real) as noted:
            teacher(**inputs)
        hidden, weight = noted[0].in_compute_dtype()
    chunks = zip(hidden.split(TOKENS_AT_ONCE), labels[real].split(TOKENS_AT_ONCE), strict=True)
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
    """Label the clips `(key, row)` that aren't in `unfinished` yet; a file there for every `PART_CLIPS` of them."""
    process = PartialState()
    read = json.loads(settings)
    done = set(_read_parts(unfinished, settings)[KEY][:])
    share = [(key, row) for key, row in share if key not in done]
    progress = tqdm(total=len(share), desc="Labelling", unit="clip", disable=not process.is_main_process)
    for start in range(0, len(share), PART_CLIPS):
        part = share[start : start + PART_CLIPS]
        clips = dataset.select([row for _, row in part])
        columns: dict[str, list] = {KEY: [key for key, _ in part], SETTINGS: [settings] * len(part)}
        columns |= {name: [] for name in TEACHER_COLUMNS}
        for batch in DataLoader(clips, batch_size, collate_fn=collator, num_workers=num_workers):
            target = soft_labels(teacher, batch, read["top_k"], read["temperature"], autocast)
            lengths = (batch["labels"] != -100).sum(1).tolist()
            _check_finite(target, batch["clip"], lengths)
            for name, column in zip(TEACHER_COLUMNS, target, strict=True):
                columns[name] += [clip.numpy() for clip in column.cpu().split(lengths)]
            progress.update(len(lengths))
        _write_part(Dataset.from_dict(columns, features=SOFT_LABELS), unfinished, process.process_index)
    progress.close()


def _check_finite(target: TopK, clips: list[str], lengths: list[int]) -> None:
    sound = target.log_rest.isfinite() & target.log_probs.isfinite().all(1) & target.label_log_prob.isfinite()
    bad = [clip for clip, part in zip(clips, sound.split(lengths), strict=True) if not part.all()]
    if bad:
        raise UserError(f"the teacher's logits are not finite for {', '.join(bad)}: look at these clips")


def _write_part(part: Dataset, unfinished: Path, process_index: int) -> None:
    """Whole or not at all, under a name that is free."""
    number = len(list(unfinished.glob(f"part-{process_index:03d}-*.parquet")))
    file = unfinished / f"part-{process_index:03d}-{number:05d}.parquet"
    pq.write_table(part.data.table, file.with_suffix(".tmp"))
    os.replace(file.with_suffix(".tmp"), file)


def _read_parts(unfinished: Path, settings: str) -> Dataset:
    """What interrupted passes have labelled."""
    tables = [Dataset(pq.read_table(file)).cast(SOFT_LABELS) for file in sorted(unfinished.glob("part-*.parquet"))]
    if not tables:
        return Dataset.from_dict({name: [] for name in SOFT_LABELS}, features=SOFT_LABELS)
    parts = concatenate_datasets(tables)
    _check_settings(parts, settings, unfinished)
    return parts


def _save(
    stored: Dataset | None, dataset: Dataset, missing: dict[str, int], labelled: Dataset, directory: Path
) -> None:
    """Save the rows in `stored` and the `missing` ones, `{key: row}`, to `directory`: whole or not at all."""
    rows = {key: row for row, key in enumerate(labelled[KEY][:])}
    labels = labelled.select([rows[key] for key in missing])
    whole = concatenate_datasets([dataset.select(list(missing.values())), labels], axis=1)
    if stored is not None:
        whole = concatenate_datasets([stored, whole])
    saving, old = (directory.with_name(f"{directory.name}.{end}") for end in ("saving", "replaced"))
    shutil.rmtree(saving, ignore_errors=True)
    whole.save_to_disk(str(saving))
    if directory.exists():
        shutil.rmtree(old, ignore_errors=True)  # of a process killed before the last line here
        directory.rename(old)
    saving.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


def _open(directory: Path, settings: str, dataset: Dataset) -> Dataset | None:
    """What is saved there; None if nothing is. Raises `UserError` if `dataset` labelled so doesn't belong there."""
    old = directory.with_name(f"{directory.name}.replaced")
    if old.is_dir() and not directory.exists():  # killed between the two renamings of `_save`
        old.rename(directory)
    if not directory.exists() or not any(directory.iterdir()):
        return None
    try:
        stored = load_from_disk(str(directory))
    except FileNotFoundError as error:
        raise UserError(f"--cache_teacher {directory}: no dataset is saved there; name a new directory") from error
    if not isinstance(stored, Dataset) or not has_soft_labels(stored):
        raise UserError(f"--cache_teacher {directory}: a dataset without a teacher's labels; name a new directory")
    _check_settings(stored, settings, directory)
    columns = {name: feature for name, feature in stored.features.items() if name not in ALL_COLUMNS}
    if columns != dict(dataset.features):
        raise UserError(
            f"--cache_teacher {directory} holds a dataset with other columns ({', '.join(columns)}) than this one "
            f"({', '.join(dataset.features)}): name another directory"
        )
    return stored


def _check_settings(labelled: Dataset, settings: str, directory: Path) -> None:
    ours = json.loads(settings)
    for text in labelled.unique(SETTINGS):
        theirs = json.loads(text)
        differences = [f"{name} {theirs[name]} (now {ours[name]})" for name in ours if theirs[name] != ours[name]]
        # the same weights may have another name
        if any(theirs[name] != ours[name] for name in ours if name != "teacher"):
            raise UserError(
                f"--cache_teacher {directory} was made with {', '.join(differences)}. Use the same, or name another "
                "directory"
            )


def _say_size(directory: Path, dataset: Dataset, top_k: int, missing: int) -> None:
    token_bytes = 4 * top_k + 8
    size = sum(dataset["label_tokens"][:]) * token_bytes
    print(
        f"teacher cache {directory}: {len(dataset)} clips, {size / 1e6:.1f} MB on disk besides the audio "
        f"({len(dataset) - missing} of {len(dataset)} there)",
        flush=True,
    )
