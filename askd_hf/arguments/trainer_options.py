"""The checks of Trainer's options, and the defaults of those that depend on others."""

import os
from typing import Any

from transformers.trainer_utils import SchedulerType

from ..errors import UserError

SHARDING = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")  # set by `accelerate launch`
EVALUATING_SCHEDULERS = ("reduce_lr_on_plateau", "greedy")  # they lower the learning rate by an evaluation's metric
SAVE_STEPS = 500  # Trainer's default
# options of Trainer that are not supported -> reason and advice
UNSUPPORTED = {
    "enable_jit_checkpoint": ", as both would handle SIGTERM. Leave it out: on SIGTERM a run finishes its current "
    "update and saves a checkpoint",
    "ddp_static_graph": ": the loss is computed outside of the model's forward pass, and DDP would miss gradients",
    "use_liger_kernel": ": Liger has no kernels for Whisper",
    "batch_eval_metrics": ": the metrics are of all clips together, not means over batches",
}


def check_steps(config: Any) -> None:
    """Raise `UserError` for an impossible number of steps."""
    if config.max_steps < 1 and config.max_steps != -1:
        raise UserError(
            f"--max_steps must be at least 1, got {config.max_steps}; leave it out to train for --num_train_epochs"
        )
    if config.max_steps > 0 and config.warmup_steps > max(config.max_steps, 1):
        raise UserError(
            f"--warmup_steps must be at most --max_steps, got {config.warmup_steps:g} and {config.max_steps}; below 1 "
            "it is a fraction of the run"
        )


def set_strategies(config: Any) -> None:
    """Set when to evaluate and save, unless given: every so many steps if their number is given, else every epoch.

    Raises `UserError` for a number of steps with another strategy, unless that is "no".

    Args:
        config: an `ASKDConfig`.
    """
    undecided = (config.eval_strategy, config.save_strategy) == (None, None)
    if config.load_best_model_at_end and undecided and None in (config.eval_steps, config.save_steps):
        config.eval_steps = config.save_steps = config.save_steps or config.eval_steps  # every checkpoint is evaluated
    for name, default in (("eval", None), ("save", SAVE_STEPS)):
        steps, strategy = getattr(config, f"{name}_steps"), getattr(config, f"{name}_strategy")
        if strategy is None:
            setattr(config, f"{name}_strategy", "epoch" if steps is None else "steps")
        elif steps not in (None, default) and strategy not in ("steps", "no"):
            value = getattr(strategy, "value", strategy)
            raise UserError(
                f"--{name}_steps {steps:g} has no effect with --{name}_strategy {value}: leave out one of them"
            )
    if config.save_steps is None:
        config.save_steps = SAVE_STEPS


def check_trainer_options(config: Any) -> None:
    """Raise `UserError` for options of Trainer that are not supported, or exclude each other."""
    from accelerate.utils import parse_flag_from_env

    if config.fp16 and config.bf16:
        raise UserError("--fp16 and --bf16 exclude each other: give one of them")
    if config.fsdp or config.deepspeed or any(parse_flag_from_env(name) for name in SHARDING):
        raise UserError(
            "FSDP and DeepSpeed (ZeRO) are not supported, nor needed: only the student is trained. Its weights "
            "and optimizer fit on one GPU for every size of Whisper, and so does the teacher (large-v3 in bf16: "
            "3 GB). Use plain DDP: `accelerate launch --multi_gpu` (or torchrun), with --bf16 and "
            "--gradient_accumulation_steps to save memory. If the teacher doesn't fit, use --teacher_dtype int8, "
            "--teacher_offload or --teacher_cache_dir"
        )
    if config.auto_find_batch_size and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(
            "--auto_find_batch_size requires one process: a process without memory would restart, and the others "
            "would wait for it. Give a smaller --per_device_train_batch_size, and --gradient_accumulation_steps"
        )
    for name, reason in UNSUPPORTED.items():
        if getattr(config, name):
            raise UserError(f"--{name} is not supported{reason}")
    if "underflow_overflow" in str(config.debug):
        raise UserError(
            "--debug underflow_overflow is not supported: its hooks fail at empty tensors. Training stops at a loss "
            "that isn't finite, and names the clips"
        )
    if not config.eval_do_concat_batches:
        raise UserError("--eval_do_concat_batches must be True: the metrics are of all clips together")
    if config.train_sampling_strategy == "batch_rebalance":
        raise UserError(
            "--train_sampling_strategy batch_rebalance is not supported: its order of the clips ignores --seed, "
            "and --auto_find_batch_size can't change its batches. Use group_by_length or random"
        )
    if config.label_smoothing_factor:
        raise UserError(
            f"--label_smoothing_factor must be 0, got {config.label_smoothing_factor:g}: the objective has soft "
            "targets instead"
        )
    if config.lr_scheduler_type in EVALUATING_SCHEDULERS and config.eval_strategy == "no":
        scheduler = SchedulerType(config.lr_scheduler_type).value
        raise UserError(f"--lr_scheduler_type {scheduler} requires --eval_strategy steps or epoch")
    if config.remove_unused_columns:
        raise UserError("--remove_unused_columns must be False: the collator needs the audio and text columns")
