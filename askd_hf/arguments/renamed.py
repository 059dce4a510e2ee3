"""Renamed options and keywords: the old names still work, with a warning."""

import functools
import logging
import warnings
from collections.abc import Callable, Collection
from dataclasses import fields
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

# old name of an option -> current name
OPTIONS = {
    "audio_column": "audio_column_name",
    "augment": "augmentations",
    "cache_encoder": "encoder_cache_dir",
    "cache_teacher": "teacher_cache_dir",
    "dataset_weights": "dataset_probabilities",
    "divergence_mix": "divergence_beta",
    "eval_blend": "eval_teacher_losses",
    "join_clips": "concatenate_seconds",
    "layer_choice": "layer_selection",
    "lora_rank": "lora_r",
    "max_compression_ratio": "compression_ratio_threshold",
    "max_label_tokens": "max_label_length",
    "max_repetition": "repeated_5gram_threshold",
    "max_seconds": "max_duration_in_seconds",
    "max_wer": "wer_threshold",
    "min_label_tokens": "min_label_length",
    "min_log_prob": "logprob_threshold",
    "min_seconds": "min_duration_in_seconds",
    "negatives": "no_speech_dataset",
    "negatives_share": "no_speech_probability",
    "noise_folder": "noise_dir",
    "pack": "concatenate",
    "pack_seconds": "concatenate_seconds",
    "prompt_probability": "condition_on_prev_probability",
    "model": "model_dir",
    "repo": "repo_id",
    "push_labels_to": "hub_dataset_id",
    "push_to_hub": "hub_dataset_id",  # where it names a dataset: askd-hf pseudo-label
    "resamples": "n_resamples",
    "self_refresh": "snapshot_strategy",
    "shuffle_buffer": "shuffle_buffer_size",
    "teacher_phase": "teacher_phase_ratio",
    "text": "label_source",
    "text_column": "text_column_name",
    "trust_label": "weight_teacher_by_label_prob",
    "unlabelled": "unlabeled_dataset",
    # names of other training scripts
    "dataset_config_name": "dataset_config",
    "dataset_name": "dataset",
    "model_name_or_path": "student",
    "student_model_name_or_path": "student",
    "teacher_model_name_or_path": "teacher",
}
# current name of an option -> old value -> current value
VALUES = {"layer_selection": {"probe": "greedy"}, "snapshot_strategy": {"never": "no"}}

T = TypeVar("T")
R = TypeVar("R")


def current_name(name: str, known: Collection[str]) -> str:
    """Return the current name of an option, or `name` itself if it isn't the old name of a `known` option."""
    new = OPTIONS.get(name, name)
    return new if name not in known and new in known else name


def rename_arguments(argv: list[str], known: Collection[str]) -> list[str]:
    """Return a command line with the current names and values of options. Log a warning for each old one.

    Args:
        argv: arguments such as `--name value`, `--name=value` or `--no_name`, with `_` or `-`.
        known: the current names of the options.
    """
    renamed, option = [], ""
    for word in argv:
        if word.startswith("--") and word != "--":
            written, equals, value = word.removeprefix("--").partition("=")
            name = written.replace("-", "_")
            negated = name.startswith("no_") and name not in known and current_name(name, known) == name
            option = current_name(name.removeprefix("no_") if negated else name, known)
            if option != name.removeprefix("no_" if negated else ""):
                logger.warning("--%s is called --%s now", name, f"no_{option}" if negated else option)
                word = f"--{'no_' if negated else ''}{option}{equals}{_current_value(option, value)}"
            elif equals:
                word = word.partition("=")[0] + equals + _current_value(option, value)
        else:
            word = _current_value(option, word)
        renamed.append(word)
    return renamed


def _current_value(option: str, value: str) -> str:
    new = VALUES.get(option, {}).get(value, value)
    if new != value:
        logger.warning("--%s %s is called --%s %s now", option, value, option, new)
    return new


def rename_saved(options: dict[str, Any]) -> dict[str, Any]:
    """Return options saved by an earlier version with their current names and values."""
    named = {OPTIONS.get(name, name): value for name, value in options.items()}
    return {
        name: VALUES[name].get(value, value) if name in VALUES and isinstance(value, str) else value
        for name, value in named.items()
    }


def renamed_keywords(**old: str) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Decorate a function: with `renamed_keywords(old="new")` it also accepts the keyword `old`, with a warning."""

    def decorate(function: Callable[..., R]) -> Callable[..., R]:
        @functools.wraps(function)
        def renaming(*args: Any, **kwargs: Any) -> R:
            for name in old.keys() & kwargs.keys():
                warnings.warn(f"{name}= is called {old[name]}= now", FutureWarning, stacklevel=2)
                kwargs[old[name]] = kwargs.pop(name)
            return function(*args, **kwargs)

        return renaming

    return decorate


def accepts_renamed(cls: type[T]) -> type[T]:
    """Decorate a dataclass of options: its constructor also accepts the old names, with a FutureWarning."""
    init = cls.__init__
    known = {field.name for field in fields(cls)}  # type: ignore[arg-type]  # a dataclass

    @functools.wraps(init)
    def renaming(self: T, *args: Any, **kwargs: Any) -> None:
        current = {}
        for name, value in kwargs.items():
            new = current_name(name, known)
            if new != name:
                warnings.warn(f"{cls.__name__}({name}=) is called {new}= now", FutureWarning, stacklevel=2)
            if new in VALUES and isinstance(value, str):
                value = VALUES[new].get(value, value)
            current[new] = value
        init(self, *args, **current)

    cls.__init__ = renaming  # type: ignore[method-assign, assignment]
    return cls
