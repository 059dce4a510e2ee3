"""A run: its directory, the checkpoint to resume from, options that depend on models and splits, its end."""

import logging
import os
import sys
from pathlib import Path

from accelerate import PartialState
from transformers import WhisperConfig

from ..arguments import CacheArguments, ModelArguments
from ..arguments.writable import check_writable
from ..config import UNNAMED_RUN, ASKDConfig
from ..errors import UserError

logger = logging.getLogger(__name__)

# With 2 of whisper-tiny.en's 4 encoder layers on LibriSpeech, the divergence's gradient in the encoder was 1.5 to 7
# times that of the hidden-state loss; at 10 both losses fell faster than at 1.
DEFAULT_HIDDEN_WEIGHT = 10.0


def set_default_output_dir(config: ASKDConfig, models: ModelArguments) -> None:
    """Name `config.output_dir` after the models and the preset, unless it was given.

    Such as `runs/whisper-large-v3-2-decoder-layers-askd`.
    """
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
    """Fit the options of evaluation to the evaluation splits there are.

    Raises `UserError` if an option needs evaluation and there is nothing to evaluate on.
    """
    if not splits:
        if config.load_best_model_at_end or config.save_strategy == "best" or config.eval_on_start:
            raise UserError("the best model can't be chosen, nor eval_on_start done, without --eval_splits")
        if not config.evaluates_by_default and config.eval_strategy != "no":
            strategy = getattr(config.eval_strategy, "value", config.eval_strategy)
            raise UserError(
                f"--eval_strategy {strategy}: there is nothing to evaluate on; give "
                "--eval_dataset or --eval_splits, or leave it out"
            )
        config.eval_strategy = "no"
    metric = config.metric_for_best_model
    if metric and len(splits) > 1 and not any(metric.removeprefix("eval_").startswith(split) for split in splits):
        # Trainer reports several splits as eval_<split>_wer: the first one chooses
        config.metric_for_best_model = f"{splits[0]}_{metric.removeprefix('eval_')}"


def prepare_encoder(config: ASKDConfig, compressed: bool) -> None:
    """Decide whether the encoder is trained, unless `config.freeze_encoder` says so.

    Raises `UserError` if a frozen encoder makes no sense.

    Args:
        compressed: whether the student's encoder has only some of its teacher's layers.
    """
    if config.freeze_encoder is None:
        config.freeze_encoder = not compressed
    if config.freeze_encoder and compressed:
        raise UserError(
            "freeze_encoder: the student's encoder has lost layers, and must be trained to hear again: leave out "
            "--freeze_encoder True, or --encoder_layers"
        )
    if config.freeze_encoder and config.hidden_weight:
        raise UserError(
            f"hidden_weight: {config.hidden_weight:g} has no effect on a frozen encoder: leave it out, or train the "
            "encoder (--freeze_encoder False; by default with --encoder_layers)"
        )


def prepare_hidden_loss(
    config: ASKDConfig, student: WhisperConfig, teacher: WhisperConfig | None, compressed: bool
) -> None:
    """Give a student whose encoder was compressed a hidden-state loss, unless `config.hidden_weight` says otherwise.

    Raises `UserError` for a loss that can't be.

    Args:
        teacher: None if training doesn't run it: there is none, or its labels are cached.
        compressed: as in `prepare_encoder`.
    """
    if config.hidden_weight is None and compressed and config.uses_teacher:
        if teacher is not None:
            config.hidden_weight = DEFAULT_HIDDEN_WEIGHT
        else:
            logger.warning("no hidden-state loss for the compressed encoder: of the teacher there are only labels")
    if not config.hidden_weight:
        return
    if teacher is None:
        raise UserError(
            f"hidden_weight: {config.hidden_weight:g} needs the teacher itself, and not its cached labels: leave out "
            "--teacher_cache_dir (train on the speech itself), or give --hidden_weight 0"
        )
    if student.d_model != teacher.d_model:
        raise UserError(
            f"hidden_weight: {config.hidden_weight:g} can't be, as the hidden states of student and teacher are "
            f"{student.d_model} and {teacher.d_model} wide: give --hidden_weight 0"
        )
    if student.encoder_layerdrop:
        raise UserError(
            f"hidden_weight: {config.hidden_weight:g} needs all layers of the encoder, and the student's config "
            f"drops some at random: set encoder_layerdrop ({student.encoder_layerdrop:g}) to 0 in its config.json"
        )


def exit_non_main_processes() -> None:
    """After training: only the main process returns, to report and publish alone. For a single process: nothing.

    The others leave without Python's clean-up: while it frees the process group, Gloo's threads now and then abort
    the process or wait for each other for ever (seen with torch 2.13).
    """
    process = PartialState()
    process.wait_for_everyone()
    if not process.is_main_process:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def check_directories(config: ASKDConfig, caches: CacheArguments, trains: bool = True) -> None:
    """Raise `UserError` for a directory that the run is to write, and can't.

    Args:
        trains: whether there is a run in `--output_dir`.
    """
    if trains:
        check_writable(config.output_dir, "--output_dir")
    logs = os.environ.get("TENSORBOARD_LOGGING_DIR")
    if logs and "tensorboard" in config.report_to:
        check_writable(logs, "TENSORBOARD_LOGGING_DIR")
    for name in ("encoder_cache_dir", "teacher_cache_dir"):
        if getattr(caches, name):
            check_writable(getattr(caches, name), f"--{name}")
