"""Checks of the trainer's arguments, before anything is computed."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from datasets import IterableDataset as HubStream
from torch.utils.data import IterableDataset
from transformers import WhisperForConditionalGeneration
from transformers.trainer_utils import IntervalStrategy

from ..arguments.augment import AugmentArguments
from ..config import TEXT_METRICS, ASKDConfig
from ..data import SpeechCollator, SpeechStream
from ..data.soft_labels import check_settings
from ..errors import UserError
from ..models.generation_config import is_multilingual

PERSISTENT_WORKERS = (
    "--dataloader_persistent_workers is not supported with --augmentations, --timestamp_probability, "
    "--condition_on_prev_probability and a range of --window_seconds: the workers would repeat the random numbers of "
    "the first epoch"
)


def check_teacher(
    args: ASKDConfig,
    teacher: WhisperForConditionalGeneration | None,
    soft_labels: Dataset | None,
    vocabulary: int,
) -> None:
    """Raise `UserError` if the options require a teacher, and there is neither a teacher nor its soft labels.

    Args:
        soft_labels: the training set if it has cached soft labels, else None.
    """
    if soft_labels is not None and args.uses_teacher:
        check_settings(soft_labels, args.temperature, vocabulary)
    if args.uses_teacher and teacher is None and (soft_labels is None or args.eval_teacher_losses):
        option = "--eval_teacher_losses" if soft_labels is not None else f"--preset {args.preset}"
        raise UserError(
            f"{option} requires a teacher, and there is no teacher: give --teacher, or choose a preset without one "
            "(ps-kd, ce)"
        )


def check_processes(args: ASKDConfig) -> None:
    """Raise `UserError` if a process has several GPUs, for which Trainer would use `DataParallel`."""
    if args.n_gpu > 1:
        raise UserError("several GPUs require one process each: start with `accelerate launch` (or torchrun)")


def check_has_rows(name: str, dataset: Any, collator: Any) -> None:
    """Raise `UserError` for an iterable dataset with a `SpeechCollator`.

    accelerate would cut its batches to as many label positions as clips.

    Args:
        name: of the argument, for the message.
        dataset: a dataset, a dictionary of datasets, or None.
    """
    if not isinstance(collator, SpeechCollator):
        return
    parts = list(dataset.values()) if isinstance(dataset, dict) else [dataset]
    if any(isinstance(part, HubStream | IterableDataset) for part in parts):
        stream = "askd_hf.data.SpeechStream([askd_hf.data.select_training_columns(dataset)]) with max_steps and "
        stream += "SpeechCollator(..., limits=askd_hf.data.Limits(30, 448)), or "
        instead = stream if name == "train_dataset" else ""
        raise UserError(
            f"{name}: iterable datasets are not supported with SpeechCollator; give {instead}a dataset with rows and "
            "a length"
        )


def check_data(args: ASKDConfig, train_dataset: Any, eval_dataset: Any, collator: Any) -> None:
    """Raise `UserError` for iterable datasets, and for options that the batches don't support."""
    lacks_features = isinstance(collator, SpeechCollator) and (collator.encoder_cache or collator.features_on_device)
    if lacks_features and "inputs" in args.include_for_metrics:
        raise UserError(
            "--include_for_metrics inputs is not supported with --encoder_cache_dir and --features_on_device: the "
            "batches have no features"
        )
    check_has_rows("train_dataset", train_dataset, collator)
    check_has_rows("eval_dataset", eval_dataset, collator)
    options: Any = args.accelerator_config
    if options.dispatch_batches and isinstance(collator, SpeechCollator):
        raise UserError(
            "accelerator_config: dispatch_batches=True is not supported with SpeechCollator, because accelerate would "
            "cut the label positions of its batches. Leave it out: each process reads its own batches"
        )
    if options.split_batches and isinstance(train_dataset, SpeechStream):
        raise UserError("accelerator_config: split_batches=True is not supported with a stream")


def check_language(model: WhisperForConditionalGeneration, collator: Any, dataset: Any) -> None:
    """Raise `UserError` if the labels of a multilingual model would have no language, which `generate` expects.

    Args:
        dataset: the training set. The rows of a stream aren't known.
    """
    if not isinstance(collator, SpeechCollator) or isinstance(dataset, SpeechStream) or not is_multilingual(model):
        return
    if collator.processor.tokenizer.language is None and len(dataset) and dataset[0].get("language") is None:
        raise UserError(
            "the model is multilingual, and neither its tokenizer nor the clips have a language: call "
            'askd_hf.set_language(model, processor, "fr"), or give the dataset a column `language`'
        )


def check_best_metric(args: ASKDConfig, splits: Sequence[str], text_metrics: Sequence[str] | None) -> None:
    """Raise `UserError` if not every evaluation has `metric_for_best_model`.

    Args:
        splits: the names of the evaluation splits; empty if there is one without a name in its metrics.
        text_metrics: the metrics of the generated texts. None if they aren't known.
    """
    generates = args.predict_with_generate and not args.prediction_loss_only
    if args.metric_for_best_model is None or args.eval_strategy == IntervalStrategy.NO:
        return
    if generates and text_metrics is None:
        return
    names = [*_loss_metrics(args), *((text_metrics or ()) if generates else ())]
    known = [f"{split}_{name}" for split in splits for name in names] if splits else names
    metric = args.metric_for_best_model.removeprefix("eval_")
    if metric not in known:
        more = ""
        if metric.endswith(TEXT_METRICS) and not generates:
            more = ". Error rates require --predict_with_generate True, and no --prediction_loss_only"
        raise UserError(f"--metric_for_best_model must be one of {', '.join(known)}, got {metric!r}{more}")


def _loss_metrics(args: ASKDConfig) -> list[str]:
    """Return the losses of every evaluation. Those of a teacher are computed while it has a weight."""
    names = ["loss"]
    if args.eval_teacher_losses:
        names.append("total_loss")
        if args.uses_teacher and args.teacher_phase_ratio == 1.0:
            names += ["teacher_loss", "teacher_ce", "top1_agreement"]
            if args.hidden_weight != 0.0:
                names.append("hidden_loss")
        if args.self_weight and not args.uses_teacher:
            names.append("self_loss")
    return names


def check_batches(args: ASKDConfig, collator: Any, teacher_is_cached: bool) -> None:
    """Raise `UserError` if the collator changes clips at random and an option doesn't allow that."""
    if not is_random(collator):
        return
    runs_teacher = args.uses_teacher and not teacher_is_cached
    if teacher_is_cached and args.uses_teacher and collator.changes_targets:
        raise UserError(
            "the teacher's cached labels are of the unchanged clips: --augment_teacher, --timestamp_probability and "
            "--condition_on_prev_probability are not supported with them"
        )
    if collator.shortest_context is not None and collator.teacher_extractor is None and runs_teacher:
        raise UserError(
            "shortest_context shortens the student's features, the teacher takes its whole window, and the batches "
            "have no features for it: create them with SpeechCollator(..., teacher_extractor=...), the feature "
            "extractor of the teacher"
        )
    if collator.augmenter is not None:
        if collator.keeps_teacher_clean and collator.teacher_extractor is None and runs_teacher:
            raise UserError(
                "the student's clips are augmented and the teacher's are not, and the batches have no features for "
                "the teacher: create them with SpeechCollator(..., teacher_extractor=processor.feature_extractor)"
            )
        check_speed(collator.augmenter.options, collator.timestamp_probability, args, bool(args.hidden_weight))
    if args.dataloader_persistent_workers:
        raise UserError(PERSISTENT_WORKERS)


def fills_last_batches(args: ASKDConfig, train_dataset: Any, collator: Any) -> bool:
    """Return whether the last batches of an epoch may have to be filled, as every process needs the same number."""
    has_rows = isinstance(collator, SpeechCollator) and not isinstance(train_dataset, SpeechStream)
    # without the average, a process that has only such rows would shrink the update
    averages = args.average_tokens_across_devices
    return has_rows and averages and args.world_size > 1 and not args.dataloader_drop_last


def check_whole_batch(clips: int, clips_per_batch: int) -> None:
    """Raise `UserError` if `--dataloader_drop_last` leaves no batch.

    Args:
        clips_per_batch: of all processes.
    """
    if clips < clips_per_batch:
        raise UserError(
            f"--dataloader_drop_last leaves no batch: there are {clips:,} training clips, and all processes together "
            f"take {clips_per_batch:,} at a time. Leave it out, or choose a smaller --per_device_train_batch_size"
        )


def check_speed(
    augment: AugmentArguments, timestamp_probability: float, args: ASKDConfig, has_hidden_loss: bool
) -> None:
    """Raise `UserError` if the student's clips have another speed than the teacher's, and times are compared.

    Text tokens have no times: the teacher's distribution at each of them is that of the same text.
    """
    if "speed" not in augment.augmentations or augment.augment_teacher or not args.uses_teacher:
        return
    if timestamp_probability:
        raise UserError(
            "--augmentations speed moves the timestamps of --timestamp_probability, and the teacher takes the clip at "
            "its own speed: leave out speed, or give --augment_teacher True"
        )
    if has_hidden_loss:
        raise UserError(
            "--augmentations speed moves the frames of the student's clip, and the hidden-state loss compares them "
            "with the teacher's: leave out speed, or give --hidden_weight 0 or --augment_teacher True"
        )


def is_random(collator: Any) -> bool:
    """Return whether the batch of a clip differs between epochs."""
    return isinstance(collator, SpeechCollator) and collator.is_random
