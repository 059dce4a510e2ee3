"""Checks of the options of the data, before anything is loaded."""

from ..arguments import NONE, DataArguments, MixArguments
from ..arguments.data import DEFAULT_DATASET
from ..config import ASKDConfig
from ..data.languages import language_code
from ..errors import UserError
from ..evaluation.metrics import normalizer_for, text_language


def check_mix(data_args: DataArguments, mix_args: MixArguments, config: ASKDConfig) -> None:
    """Raise `UserError` for options of the data that don't fit together."""
    weights, datasets = mix_args.dataset_probabilities, len(data_args.dataset) + bool(data_args.unlabeled_dataset)
    if weights and len(weights) != datasets:
        raise UserError(
            f"--dataset_probabilities requires one value per dataset, got {len(weights)} for {datasets} datasets "
            "(--unlabeled_dataset is the last)"
        )
    if len(weights) == 1:
        raise UserError("--dataset_probabilities has no effect with one dataset")
    check_normalizer(data_args)
    check_default_dataset(data_args)
    data_args.train_sources()  # raises for options with neither one value nor one per dataset
    data_args.eval_sources()
    if mix_args.streaming and data_args.long_clips == "cut":
        raise UserError("--long_clips cut is not supported with --streaming: choose skip")
    if mix_args.streaming and config.max_steps <= 0:
        raise UserError("--streaming requires --max_steps: the length of an epoch is unknown")
    if mix_args.streaming and config.train_sampling_strategy == "group_by_length":
        raise UserError(
            "--train_sampling_strategy group_by_length is not supported with --streaming: the lengths are unknown"
        )


def check_normalizer(data_args: DataArguments) -> None:
    """Raise `UserError` if `--normalizer` isn't installed or doesn't support the language of the transcripts."""
    task = "translate" if "translate" in data_args.task else "transcribe"
    for language in data_args.eval_language or data_args.language or [NONE]:
        spoken = None if language == NONE else language
        normalizer_for(data_args.normalizer, text_language(task, spoken), {})


def check_default_dataset(data_args: DataArguments) -> None:
    """Raise `UserError` if the default dataset is given another language or task than its own."""
    (default,) = DEFAULT_DATASET["dataset"]
    if data_args.dataset != [default]:
        return
    if others := [language for language in data_args.language if language_code(language) not in ("en", NONE)]:
        raise UserError(f"--language {others[0]} requires --dataset: {default}, the default, is English")
    if "translate" in data_args.task:
        raise UserError(f"--task translate requires --dataset: {default}, the default, has no translations")
