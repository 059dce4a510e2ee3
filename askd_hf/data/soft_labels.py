"""The teacher's soft labels as columns of a dataset, and checks that they belong to its rows and to a run.

For each label token they are the `k` most probable tokens with their log-probabilities, the log-probability of all
other tokens together, and the log-probability of the label: `objective.TopK`, a few KB per clip. Two more columns say
what they were computed from: `teacher_key`, a hash of the clip's audio and label tokens, and `teacher_settings`, which
contains the teacher, the temperature and `k`. Columns that don't match a row or a run are hence detected before
training.
"""

import hashlib
import json
import logging
from typing import Any

import torch
from datasets import Dataset, Features, LargeList, List, Value
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration
from transformers.models.whisper.modeling_whisper import shift_tokens_right

from ..errors import UserError
from ..objective import TopK
from ..projection import at_positions, capture_lm_head_inputs, label_positions
from .collator import TEACHER_COLUMNS, SpeechCollator
from .columns import is_text
from .encoder_cache import feature_settings, weights_digest
from .stream import SpeechStream

logger = logging.getLogger(__name__)

TOKEN_CHUNK_SIZE = 1024  # label tokens projected onto the vocabulary at a time
RECOMPUTE = "compute its soft labels again with examples/cache_teacher.py or --teacher_cache_dir DIR"
KEY_COLUMN, SETTINGS_COLUMN = "teacher_key", "teacher_settings"
SOFT_LABEL_COLUMNS = (KEY_COLUMN, SETTINGS_COLUMN, *TEACHER_COLUMNS)
LABEL_FORMAT = 2  # increase it when the same transcript gets other label tokens; 1 had no leading space
OUTDATED = (
    "soft labels of an earlier version of askd_hf. They are for label texts without Whisper's leading space and don't "
    "match the current label tokens"
)
SETTING_NAMES = ("labels", "teacher", "weights", "computed_in", "vocabulary", "top_k", "temperature", "features")
# float16 stores a log-probability with an error of 0.05 %; the distribution is normalized again when it is read
SOFT_LABEL_FEATURES = Features(
    {
        KEY_COLUMN: Value("string"),
        SETTINGS_COLUMN: Value("string"),
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
    """Return everything that soft labels depend on besides audio and transcripts, as JSON.

    Args:
        teacher: with its full weights, before any cast.
        name: path or Hub id of the teacher.
        dtype: compute dtype: that of autocast, or else of the weights.
        extractor: the teacher's feature extractor. Default: Whisper's with the teacher's number of mel bins.
    """
    extractor = extractor or WhisperFeatureExtractor(feature_size=teacher.config.num_mel_bins)
    settings = dict(
        labels=LABEL_FORMAT,
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
    """Return for each row a hash of its audio and label tokens."""
    keys = []
    for row in dataset.remove_columns("audio"):
        labels = " ".join(map(str, collator.label_ids(row)))
        keys.append(hashlib.blake2b(f"{row['audio_key']} {labels}".encode(), digest_size=16).hexdigest())
    return keys


def has_soft_labels(dataset: Dataset | SpeechStream) -> bool:
    """Return whether the dataset has all `SOFT_LABEL_COLUMNS`, with their types."""
    if not isinstance(dataset, Dataset) or not set(SOFT_LABEL_COLUMNS) <= set(dataset.column_names):
        return False
    features = dataset.features
    return all(map(is_text, (features[KEY_COLUMN], features[SETTINGS_COLUMN]))) and all(
        isinstance(features[name], List | LargeList) for name in TEACHER_COLUMNS
    )


def without_soft_labels(dataset: Dataset) -> Dataset:
    return dataset.remove_columns([name for name in SOFT_LABEL_COLUMNS if name in dataset.column_names])


def warn_of_unused_soft_labels(datasets: dict[str, Dataset], without: list[str]) -> None:
    """Warn about soft labels that the mix loses, as another part of it has none.

    Args:
        datasets: the training sets by name.
        without: the other parts, which have no soft labels.
    """
    labeled = [name for name, dataset in datasets.items() if has_soft_labels(dataset)]
    others = [name for name in datasets if name not in labeled] + without
    if labeled and others:
        logger.warning(
            "the soft labels of %s are not used, because there are none of %s. To use them, train on %s alone; or "
            "give the speech itself as --dataset, with the teacher and its --teacher_cache_dir",
            *(" and ".join(labeled), " and ".join(others), " and ".join(labeled)),
        )


def check_settings(dataset: Dataset, temperature: float, vocabulary: int, run_settings: str | None = None) -> None:
    """Raise `UserError` unless the settings of the dataset's soft labels match a run.

    Args:
        dataset: with `SOFT_LABEL_COLUMNS`.
        run_settings: `teacher_settings` of the run's teacher; None if it has no teacher.
    """
    run = None if run_settings is None else json.loads(run_settings)
    for settings in read_settings(dataset, "the dataset"):
        if settings["labels"] != LABEL_FORMAT:
            raise UserError(f"the dataset has {OUTDATED}: {RECOMPUTE}")
        differences = []
        if settings["temperature"] != temperature:
            differences.append(f"temperature {settings['temperature']:g}, the run's is {temperature:g}")
        if run is not None and settings["weights"] != run["weights"]:
            differences.append(f"another teacher ({settings['teacher']})")
        if run is not None and settings["features"] != run["features"]:
            differences.append("other features (preprocessor_config.json)")
        if settings["vocabulary"] != vocabulary:
            differences.append(f"{settings['vocabulary']} tokens in the vocabulary, the student has {vocabulary}")
        if differences:
            raise UserError(
                f"the soft labels of the dataset were computed with {'; '.join(differences)}. Change the run's "
                f"options, or {RECOMPUTE}"
            )


def check_soft_labels(
    dataset: Dataset, collator: SpeechCollator, temperature: float, run_settings: str | None
) -> None:
    """Raise `UserError` as `check_settings`, and if audio or transcripts have changed since.

    Args:
        dataset: the result of `filter_invalid_clips`, with `SOFT_LABEL_COLUMNS`.
    """
    check_settings(dataset, temperature, collator.config.vocab_size, run_settings)
    keys = zip(dataset[KEY_COLUMN][:], label_keys(dataset, collator), strict=True)
    changed = [row for row, (saved, current) in enumerate(keys) if saved != current]
    if changed:
        raise UserError(
            f"the audio or label tokens of {len(changed)} of {len(dataset)} rows differ from those of their soft "
            f"labels, the first is row {changed[0]}, {dataset['clip'][changed[0]]}: {RECOMPUTE}. (Label tokens also "
            "depend on --language, --task, --text_case and the tokenizer)"
        )


def check_same_settings(dataset: Dataset, settings: str, directory: str) -> None:
    """Raise `UserError` unless the soft labels of a cache have the given settings. The teacher's name may differ.

    Args:
        dataset: with `SOFT_LABEL_COLUMNS`.
        settings: `teacher_settings` of the run.
    """
    run = json.loads(settings)
    for cached in read_settings(dataset, directory):
        if cached["labels"] != LABEL_FORMAT:
            raise UserError(
                f"--teacher_cache_dir {directory} has {OUTDATED}. Nothing in it can be used: choose another "
                "directory, or delete it"
            )
        changed = [name for name in run if cached[name] != run[name]]
        if changed and changed != ["teacher"]:  # the same weights may have another name
            differences = [_difference(name, cached, run) for name in changed]
            raise UserError(
                f"--teacher_cache_dir {directory} was created with {', '.join(differences)}. Use the same settings, "
                "or choose another directory"
            )


def _difference(name: str, cached: dict[str, Any], run: dict[str, Any]) -> str:
    """Return how a setting of cached soft labels differs from that of a run."""
    if name == "features":
        return "other features"
    if name == "weights" and cached["teacher"] == run["teacher"]:
        # a teacher with a smaller vocabulary has fewer weights
        return (
            f"another vocabulary (it depends on --vocabulary, --window_seconds and the transcripts) or other weights "
            f"of {run['teacher']}"
        )
    return f"{name} {cached[name]} (now {run[name]})"


def read_settings(dataset: Dataset, name: str) -> list[dict[str, Any]]:
    """Return the distinct `teacher_settings` in a dataset; a setting that is missing is None.

    Raises `UserError` if a value isn't the JSON of `teacher_settings`.
    """
    found = []
    for text in dataset.unique(SETTINGS_COLUMN):
        try:
            found.append(dict.fromkeys(SETTING_NAMES) | json.loads(text))
        except (TypeError, ValueError):  # None, invalid JSON, or not an object
            raise UserError(
                f"{name}: column {SETTINGS_COLUMN} contains {text!r}, not a teacher's settings: {RECOMPUTE}"
            ) from None
    return found


@torch.no_grad()
def compute_soft_labels(
    teacher: WhisperForConditionalGeneration,
    batch: dict[str, Any],
    top_k: int,
    temperature: float,
    autocast: torch.dtype | None = None,
) -> TopK:
    """Return the teacher's soft labels at the label tokens of a batch, clip after clip.

    Args:
        teacher: on its device, in its dtype.
        batch: of `SpeechCollator`.
        autocast: compute dtype; None for the teacher's.
    """
    device = teacher.device
    labels = batch["labels"].to(device)
    positions = label_positions(labels)
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
        with capture_lm_head_inputs(teacher, positions) as captured:
            teacher(**inputs)
        hidden, weight = captured[0].in_compute_dtype()
    chunks = zip(hidden.split(TOKEN_CHUNK_SIZE), at_positions(labels, positions).split(TOKEN_CHUNK_SIZE), strict=True)
    targets = [TopK.from_logits(h @ weight.T, tokens, top_k, temperature) for h, tokens in chunks]
    return TopK(*(torch.cat(column) for column in zip(*targets, strict=True)))
