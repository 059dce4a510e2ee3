"""Build the pseudo-labeled dataset and its card, save it, and push it to the Hub."""

import dataclasses
import shutil
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any

import pyarrow as pa
from datasets import Dataset, List, Value
from datasets.features.features import get_nested_type
from huggingface_hub import DatasetCard, DatasetCardData, HfApi

from ..data.columns import replace_column
from ..errors import disk_errors
from ..evaluation.metrics import language_code
from ..hub.card import ISO_CODES
from ..hub.provenance import PSEUDO_LABELS, TrainingData, public_name, stated_data_license
from ..hub_access import hub_upload
from ..progress import hide_datasets_bars
from .concatenation import TEMPORARY_DIR
from .filters import PseudoLabel
from .options import PseudoLabelArguments

SEGMENTS = List({"start": Value("float64"), "end": Value("float64"), "text": Value("string")})
SCORES = ("avg_logprob", "compression_ratio", "repeated_5gram_rate", "wer")
DATASET = "dataset"  # subdirectory of the output directory
CARD = "README.md"
TEMPLATE = Path(__file__).parent / "templates" / "dataset_card.md"
TAG = "askd_hf"  # marks cards that may be overwritten


def build_dataset(
    clips: Dataset, transcripts: list[PseudoLabel], kept: list[int], language: str | None, task: str
) -> Dataset:
    """Return the kept clips with their labels and scores.

    Args:
        clips: the result of `filter_invalid_clips`.
        language: code for the column `language`; None, for an English-only teacher, to omit `language` and `task`.

    Returns:
        audio, duration, speaker: as in `clips`; `speaker` only if known.
        clip: name of the clip, without directories if it is an absolute path.
        text: the label.
        segments, prompt: None if there are none.
        words: only with word timestamps.
        language, task: only with `language`.
        avg_logprob, compression_ratio, repeated_5gram_rate, wer: scores, as in `PseudoLabel`.
        reference: only if some clip has one.
    """
    text, number, rows = Value("string"), Value("float64"), len(transcripts)
    columns: dict[str, tuple[Any, list[Any]]] = {
        "text": (text, [transcript.label for transcript in transcripts]),
        "segments": (SEGMENTS, [transcript.segments for transcript in transcripts]),
        "prompt": (text, [None] * rows),
    }
    if any(transcript.words is not None for transcript in transcripts):
        columns["words"] = (SEGMENTS, [transcript.words for transcript in transcripts])
    if language is not None:
        columns |= {"language": (text, [language] * rows), "task": (text, [task] * rows)}
    columns |= {name: (number, [getattr(transcript, name) for transcript in transcripts]) for name in SCORES}
    if any(transcript.reference is not None for transcript in transcripts):
        columns["reference"] = (text, [transcript.reference for transcript in transcripts])
    columns["clip"] = (text, [without_path(name) for name in clips["clip"][:]])
    dataset = clips.select_columns([name for name in ("audio", "speaker", "duration") if name in clips.column_names])
    for name, (feature, values) in columns.items():
        dataset = replace_column(dataset, name, pa.array(values, get_nested_type(feature)))
    return dataset.select(kept)


def without_path(name: str) -> str:
    """Return the last part of an absolute POSIX or Windows path, and any other name unchanged."""
    path: PurePath
    for path in (PurePosixPath(name), PureWindowsPath(name)):
        if path.is_absolute():
            return path.name
    return name


def save_dataset(dataset: Dataset, directory: Path, card: str) -> Dataset:
    """Save the dataset as `directory/dataset`, replacing an earlier one, and the card in both directories."""
    target, saving = directory / DATASET, directory / f"{DATASET}.saving"
    with disk_errors(str(target)):
        shutil.rmtree(saving, ignore_errors=True)
        with hide_datasets_bars():
            dataset.save_to_disk(str(saving))
        (saving / CARD).write_text(card, encoding="utf-8")  # `TrainingData.of` reads it there
        shutil.rmtree(target, ignore_errors=True)
        saving.rename(target)
        shutil.rmtree(directory / TEMPORARY_DIR, ignore_errors=True)
        (directory / CARD).write_text(card, encoding="utf-8")
    return Dataset.load_from_disk(str(target))


def dataset_card(args: PseudoLabelArguments, dataset: Dataset, clips: int, kept: int) -> str:
    """Return the dataset card: who transcribed which data, and how the transcripts were filtered.

    Args:
        clips: number of transcribed clips.
        kept: number of transcripts that passed the filters.
    """
    teacher, _ = public_name(args.teacher)
    data = TrainingData(*public_name(args.dataset), args.dataset_config, args.split, transcribed_by=teacher)
    data.license = stated_data_license(args.dataset)
    language = ("en" if args.task == "translate" else language_code(args.language)) or "en"  # translations are English
    references = dataset["reference"][:] if "reference" in dataset.column_names else []
    metadata = DatasetCardData(
        language=ISO_CODES.get(language, language),
        task_categories=["automatic-speech-recognition"],
        tags=["pseudo-labels", "whisper", TAG],
    )
    metadata[PSEUDO_LABELS] = dataclasses.asdict(data)
    return DatasetCard.from_template(
        metadata,
        str(TEMPLATE),
        teacher=teacher,
        source=" ".join(part for part in (data.dataset, data.config, data.split) if part),
        clips=clips,
        kept=kept,
        label_source=args.label_source,
        rows=len(dataset),
        hours=sum(dataset["duration"][:]) / 3600,
        concatenated=args.concatenate,
        rows_with_reference=sum(reference is not None for reference in references),
        has_wer=any(rate is not None for rate in dataset["wer"][:]),
        limits=args.thresholds(),
    ).content


def push_dataset(dataset: Dataset, repo_id: str, card: str, advice: str) -> None:
    """Push the dataset to the Hub as the split train. A new repository is private.

    A card without the tag of askd_hf is kept.

    Raises `UserError`, ending with `advice`, if it fails.
    """
    with hub_upload(advice):
        hub = HfApi()
        hub.create_repo(repo_id, repo_type="dataset", private=True, exist_ok=True)
        existing = None
        if hub.file_exists(repo_id, CARD, repo_type="dataset"):
            existing = DatasetCard.load(repo_id, ignore_metadata_errors=True)
        # a card of an earlier result would describe other data
        if existing is None or TAG in (existing.data.tags or []):
            hub.upload_file(path_or_fileobj=card.encode(), path_in_repo=CARD, repo_id=repo_id, repo_type="dataset")
        # adds the features to the card's metadata
        dataset.push_to_hub(repo_id, split="train", private=True)
