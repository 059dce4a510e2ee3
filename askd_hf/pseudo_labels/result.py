"""Labelled clips as a `datasets` dataset: its columns, its card, on the disk and on the Hub."""

import dataclasses
import shutil
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any

import pyarrow as pa
import yaml
from datasets import Dataset, Features, List, Value
from huggingface_hub import DatasetCard, HfApi

from ..data.columns import arrow_type, replace_column
from ..errors import disk_errors
from ..evaluation.metrics import language_code
from ..hub.provenance import PSEUDO_LABELS, TrainingData, public_name
from ..hub_access import hub_upload
from .filters import Transcript
from .options import PseudoLabelArguments
from .packing import PACKING

SEGMENTS = List({"start": Value("float64"), "end": Value("float64"), "text": Value("string")})
MEASURES = ("avg_log_prob", "compression_ratio", "repetition", "wer")
DATASET = "dataset"  # in the output directory
CARD = "README.md"
TAG = "askd_hf"  # of the cards that are ours to write anew


def label_clips(
    clips: Dataset, transcripts: list[Transcript], kept: list[int], language: str | None, task: str
) -> Dataset:
    """The clips that are kept with their labels.

    Args:
        clips: of `filter_invalid_clips`.
        transcripts: of all of them.
        kept: their places.
        language: code for the columns `language` and `task`; None, for an English-only teacher: without these.

    Returns:
        `audio`, `seconds` and, where it is known, `speaker` as they were; `clip`, without the path to a file that is
        named by its whole path; `text`; `segments` and `prompt`,
        None unless there are any; `language`, `task`; the measures; and where there are any `reference`.
    """
    columns: dict[str, list[Any]] = {
        "text": [transcript.label for transcript in transcripts],
        "segments": [transcript.segments for transcript in transcripts],
        "prompt": [None] * len(transcripts),
    }
    features = Features(text=Value("string"), segments=SEGMENTS, prompt=Value("string"))
    if language is not None:
        columns |= {"language": [language] * len(transcripts), "task": [task] * len(transcripts)}
        features |= {"language": Value("string"), "task": Value("string")}
    for name in MEASURES:
        columns[name] = [getattr(transcript, name) for transcript in transcripts]
        features[name] = Value("float64")
    if any(transcript.reference is not None for transcript in transcripts):
        columns["reference"] = [transcript.reference for transcript in transcripts]
        features["reference"] = Value("string")
    columns["clip"] = [without_path(name) for name in clips["clip"][:]]
    features["clip"] = Value("string")
    own = [name for name in ("audio", "speaker", "seconds") if name in clips.column_names]
    labelled = clips.select_columns(own)
    for name, values in columns.items():
        labelled = replace_column(labelled, name, pa.array(values, arrow_type(features[name])))
    return labelled.select(kept)


def without_path(name: str) -> str:
    """The last part of an absolute path, of whatever system; any other name as it is."""
    path: PurePath
    for path in (PurePosixPath(name), PureWindowsPath(name)):
        if path.is_absolute():
            return path.name
    return name


def save(labelled: Dataset, directory: Path, card: str) -> Dataset:
    """Save the dataset as `directory/dataset`, in place of an earlier one, and its card in it and beside it."""
    target, saving = directory / DATASET, directory / f"{DATASET}.saving"
    with disk_errors(str(target)):
        shutil.rmtree(saving, ignore_errors=True)
        labelled.save_to_disk(str(saving))
        (saving / CARD).write_text(card, encoding="utf-8")  # there `Speech.of` reads whose words these are
        shutil.rmtree(target, ignore_errors=True)
        saving.rename(target)
        shutil.rmtree(directory / PACKING, ignore_errors=True)
        (directory / CARD).write_text(card, encoding="utf-8")
    return Dataset.load_from_disk(str(target))


def card_of(args: PseudoLabelArguments, labelled: Dataset, clips: int, kept: int) -> str:
    """The dataset's card: whose words these are, and how they were chosen.

    Args:
        labelled: the result.
        clips, kept: how many were transcribed, and how many of their transcripts are in it.
    """
    whose = "the references with which it agrees" if args.text == "reference" else "its transcripts"
    teacher, _ = public_name(args.teacher)
    speech = TrainingData(*public_name(args.dataset), args.dataset_config, args.split, transcribed_by=teacher)
    source = " ".join(part for part in (speech.dataset, speech.config, speech.split) if part)
    code = language_code(args.language)
    metadata = {
        "task_categories": ["automatic-speech-recognition"],
        "tags": ["pseudo-labels", "whisper", TAG],
        # translations are English
        "language": ("en" if args.task == "translate" else code) or "en",
        PSEUDO_LABELS: dataclasses.asdict(speech),
    }
    packed = f" Consecutive clips of a speaker are packed: {len(labelled)} rows." if args.pack else ""
    hours = sum(labelled["seconds"][:]) / 3600
    return f"""---
{yaml.safe_dump(metadata, sort_keys=False)}---

# Speech labelled by {teacher}

`{teacher}` transcribed {clips} clips of `{source}`; the labels are {whose}. {kept} transcripts are kept:
{_rules(args, labelled)}.{packed} {hours:.2f} hours. Nobody has checked them.

Columns: `text`, the label; `segments`, when its parts are said, in seconds; `prompt`, the text before; `avg_log_prob`,
`compression_ratio`, `repetition` (% of 5-grams) and `wer` (%, against `reference`), of the teacher's transcript, in a
pack the worst. Made with `askd-hf pseudo-label`.
"""


def _rules(args: PseudoLabelArguments, labelled: Dataset) -> str:
    """What is true of the transcripts that are kept; which of two rules of how many rows, if both were needed."""
    limits, rows = args.thresholds(), len(labelled)
    by_wer = f"their word error rate against the reference is at most {limits.max_wer:g} %"
    by_themselves = (
        f"their average log-probability is at least {limits.min_log_prob:g}, their compression ratio at most "
        f"{limits.max_compression_ratio:g}, and at most {limits.max_repetition:g} % of their 5-grams are repeated"
    )
    references = labelled["reference"][:] if "reference" in labelled.column_names else []
    known = sum(reference is not None for reference in references)
    if known == rows:
        return by_wer
    if all(rate is None for rate in labelled["wer"][:]):  # of a pack there may be some
        return by_themselves
    partly = ", or not for all clips of a pack" if args.pack else ""
    return (
        f"where there is a reference ({known} rows), {by_wer}; where there is none ({rows - known} rows{partly}), "
        f"{by_themselves}"
    )


def push(labelled: Dataset, repository: str, card: str, advice: str) -> None:
    """Push to the Hub, into a private dataset if it is new; a card that somebody else wrote stays.

    Raises `UserError`, ending with `advice`, if it fails.
    """
    with hub_upload(advice):
        hub = HfApi()
        hub.create_repo(repository, repo_type="dataset", private=True, exist_ok=True)
        there = None
        if hub.file_exists(repository, CARD, repo_type="dataset"):
            there = DatasetCard.load(repository, ignore_metadata_errors=True)
        # one that tells of other data than these is worse than none
        if there is None or TAG in (there.data.tags or []):
            hub.upload_file(path_or_fileobj=card.encode(), path_in_repo=CARD, repo_id=repository, repo_type="dataset")
        labelled.push_to_hub(repository, private=True)  # adds to the card's metadata what the columns are
