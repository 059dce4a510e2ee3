"""The directory of a run, options whose defaults depend on models and splits, and the end of a run."""

import logging
import os
import sys
from pathlib import Path

from accelerate import PartialState
from transformers import WhisperConfig
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType

from ..arguments import CacheArguments, ModelArguments
from ..arguments.trainer_options import EVALUATING_SCHEDULERS
from ..arguments.writable import check_writable
from ..config import TEXT_METRICS, UNNAMED_RUN, ASKDConfig
from ..data.stream import steps_per_part
from ..errors import UserError
from .checkpoint_saving import is_checkpoint
from .checks import check_best_metric

logger = logging.getLogger(__name__)

# With 2 of the 4 encoder layers of whisper-tiny.en on LibriSpeech, the gradient of the divergence in the encoder was
# 1.5 to 7 times that of the hidden-state loss with weight 1. With 10 both losses decreased faster than with 1.
DEFAULT_HIDDEN_WEIGHT = 10.0


def set_default_output_dir(config: ASKDConfig, models: ModelArguments) -> None:
    """Set `config.output_dir`, unless given, such as `runs/whisper-large-v3-2-decoder-layers-askd`."""
    if config.output_dir != UNNAMED_RUN:
        return
    if models.student:
        name = Path(models.student).name + (f"-from-{Path(models.teacher).name}" if models.teacher else "")
    else:
        layers = models.decoder_layers
        if "," in layers:
            layers = str(len(layers.removesuffix(",").split(",")))
        name = f"{Path(models.teacher).name}-{layers}-decoder-layers"
        if models.encoder_layers:
            name += f"-{models.encoder_layers.removesuffix(',').replace(',', '.')}-encoder-layers"
    config.output_dir = f"runs/{name}-{config.preset}"


def prepare_evaluation(config: ASKDConfig, splits: list[str]) -> None:
    """Set the options of evaluation for these evaluation splits.

    Raises `UserError` if an option requires evaluation and there are no splits, or if a metric doesn't exist.
    """
    if not splits:
        if config.load_best_model_at_end or config.save_strategy == "best" or config.eval_on_start:
            raise UserError(
                "--load_best_model_at_end, --save_strategy best and --eval_on_start require --eval_splits or "
                "--eval_dataset"
            )
        if not config.evaluates_by_default and config.eval_strategy != "no":
            strategy = IntervalStrategy(config.eval_strategy).value
            raise UserError(f"--eval_strategy {strategy} requires --eval_splits or --eval_dataset")
        scheduler = SchedulerType(config.lr_scheduler_type).value
        if scheduler in EVALUATING_SCHEDULERS:
            raise UserError(f"--lr_scheduler_type {scheduler} requires --eval_splits or --eval_dataset")
        config.eval_strategy = "no"
    metric = config.metric_for_best_model
    if metric and len(splits) > 1 and not metric.removeprefix("eval_").startswith(tuple(f"{s}_" for s in splits)):
        # with several splits Trainer logs eval_<split>_wer; the first split chooses
        config.metric_for_best_model = f"{splits[0]}_{metric.removeprefix('eval_')}"
    check_best_metric(config, splits if len(splits) > 1 else [], TEXT_METRICS)


def prepare_stream(config: ASKDConfig) -> None:
    """Evaluate and save ten times per run in place of at every epoch, as the length of an epoch is unknown."""
    steps = steps_per_part(config.max_steps)
    if config.eval_strategy == IntervalStrategy.EPOCH:
        config.eval_strategy, config.eval_steps = IntervalStrategy.STEPS, steps
    if config.save_strategy == SaveStrategy.EPOCH:
        config.save_strategy, config.save_steps = SaveStrategy.STEPS, steps


def prepare_encoder(config: ASKDConfig, compressed: bool) -> None:
    """Set `config.freeze_encoder`, unless given. Raises `UserError` if a pruned encoder would be frozen.

    Args:
        compressed: whether the student's encoder was pruned: it has only some of its teacher's layers.
    """
    if config.freeze_encoder is None:
        config.freeze_encoder = not compressed
    if config.freeze_encoder and compressed:
        raise UserError(
            "a pruned encoder must be trained: leave out --freeze_encoder True, or give --encoder_recovery_epochs"
        )
    if config.freeze_encoder and config.hidden_weight:
        raise UserError(
            f"--hidden_weight {config.hidden_weight:g} requires a trained encoder: leave it out, or give "
            "--freeze_encoder False"
        )


def prepare_hidden_loss(
    config: ASKDConfig, student: WhisperConfig, teacher: WhisperConfig | None, compressed: bool
) -> None:
    """Set `config.hidden_weight`, unless given: a student with a pruned encoder has a hidden-state loss.

    Raises `UserError` if the hidden-state loss can't be computed.

    Args:
        teacher: None if training doesn't run it, as it doesn't exist or its labels are cached.
        compressed: as in `prepare_encoder`.
    """
    if config.hidden_weight is None and compressed and config.uses_teacher:
        if teacher is not None:
            config.hidden_weight = DEFAULT_HIDDEN_WEIGHT
        else:
            logger.warning("no hidden-state loss for the pruned encoder: there are only cached labels of the teacher")
    if not config.hidden_weight:
        return
    if teacher is None:
        raise UserError(
            f"--hidden_weight {config.hidden_weight:g} requires the teacher, not its cached labels: leave out "
            "--teacher_cache_dir and train on a dataset without cached labels, or give --hidden_weight 0"
        )
    if student.d_model != teacher.d_model:
        raise UserError(
            f"--hidden_weight {config.hidden_weight:g} requires student and teacher with the same d_model, got "
            f"{student.d_model} and {teacher.d_model}: give --hidden_weight 0"
        )
    if student.encoder_layerdrop:
        raise UserError(
            f"--hidden_weight {config.hidden_weight:g} requires all encoder layers at every step: set "
            f"encoder_layerdrop ({student.encoder_layerdrop:g}) to 0 in the student's config.json"
        )


def exit_non_main_processes() -> None:
    """End all processes but the main one after training.

    They exit without Python's clean-up: while it frees the process group, Gloo's threads sometimes abort the process
    or deadlock (seen with torch 2.13).
    """
    process = PartialState()
    process.wait_for_everyone()
    if not process.is_main_process:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def check_directories(config: ASKDConfig, caches: CacheArguments, trains: bool = True) -> None:
    """Raise `UserError` if a directory of the run isn't writable.

    Args:
        trains: False if nothing is written to `--output_dir`.
    """
    if trains:
        if is_checkpoint(Path(config.output_dir)):
            raise UserError(
                f"--output_dir {config.output_dir}: such names are those of checkpoints, choose another one"
            )
        check_writable(config.output_dir, "--output_dir")
    logs = os.environ.get("TENSORBOARD_LOGGING_DIR")
    if logs and "tensorboard" in config.report_to:
        check_writable(logs, "TENSORBOARD_LOGGING_DIR")
    for name in ("encoder_cache_dir", "teacher_cache_dir"):
        if getattr(caches, name):
            check_writable(getattr(caches, name), f"--{name}")
