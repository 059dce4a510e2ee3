"""`ASKDConfig`: the options of training. Those of models and data are in `arguments`.

Every field is a command-line option and a key of the YAML file given by `--config`. Its help is its documentation.

Can be imported without torch, for `--help`: what imports torch is imported when it is used.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from transformers import Seq2SeqTrainingArguments
from transformers.hf_argparser import HfArg
from transformers.training_args import OptimizerNames

from .arguments.effects import check_average, check_effects
from .arguments.machine import default_workers
from .arguments.ranges import COUNT, NOT_NEGATIVE, POSITIVE, SEED, SHARE, Range, check_choice, check_ranges
from .arguments.renamed import accepts_renamed
from .arguments.trainer_options import check_steps, check_trainer_options, set_strategies
from .errors import UserError
from .schedule import PRESETS, SELF_SCHEDULES, TEACHER_SCHEDULES

if TYPE_CHECKING:
    import torch

UNNAMED_RUN = "runs/unnamed"
LOGGING_STEPS = 25  # between two log lines, by default; a tenth of a shorter run
# evaluated with `eval_teacher_losses` only
TEACHER_METRICS = ("total_loss", "teacher_loss", "self_loss", "teacher_ce", "top1_agreement", "hidden_loss")
# of the generated texts, with `predict_with_generate`: the keys of `evaluation.metrics.compute_metrics_for`
TEXT_METRICS = ("wer", "cer", "capped_wer", "loops")
RENAMED_METRICS = {"blend_loss": "total_loss", "agreement": "top1_agreement"}

# Seq2SeqTrainingArguments accepts other values too, and fails or misbehaves later
RANGES = {
    **dict.fromkeys(("learning_rate", "adam_epsilon", "num_train_epochs", "neftune_noise_alpha"), POSITIVE),
    **dict.fromkeys(("logging_steps", "eval_steps", "save_steps"), POSITIVE),
    **dict.fromkeys(("weight_decay", "max_grad_norm", "warmup_steps", "eval_delay", "save_total_limit"), NOT_NEGATIVE),
    **dict.fromkeys(("dataloader_num_workers",), NOT_NEGATIVE),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), Range(low=0, below=1)),
    **dict.fromkeys(("seed", "data_seed"), SEED),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), COUNT),
    **dict.fromkeys(("gradient_accumulation_steps", "eval_accumulation_steps", "dataloader_prefetch_factor"), COUNT),
    **dict.fromkeys(("generation_max_length", "generation_num_beams", "torch_empty_cache_steps"), COUNT),
    **dict.fromkeys(("ddp_timeout", "ddp_bucket_cap_mb"), COUNT),
}


@accepts_renamed
@dataclass
class ASKDConfig(Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments`, and the options of the objective and the schedule.

    Fields of `schedule.PRESETS` that are None take the value of `preset`. Raises `UserError` for invalid values.
    """

    _argument_group_name = "training"

    preset: str = HfArg(
        default="askd",
        help="Defaults of the options below: askd (teacher, then labels or self-teacher), kd (constant weights, those "
        "of distil-whisper), annealing (from teacher to labels), ps-kd (self-teacher only), ce (labels only).",
    )
    teacher_weight: float | None = HfArg(
        default=None, help="Teacher weight at the first step, 0 to 1. Default: set by --preset."
    )
    teacher_weight_end: float | None = HfArg(
        default=None,
        help="Teacher weight at the end of the teacher phase, 0 to 1. Default: set by --preset, at most "
        "--teacher_weight.",
    )
    teacher_phase_ratio: float | None = HfArg(
        default=None,
        help="Length of the teacher phase as a fraction of the run, 0 to 1. The rest is the self phase. Default: set "
        "by --preset.",
    )
    teacher_schedule: str | None = HfArg(
        default=None,
        help=f"Decay of the teacher weight: {', '.join(TEACHER_SCHEDULES)}. adaptive: linear if the labels are "
        "reliable; with unreliable ones, such as wrong transcripts, the teacher keeps more weight, and keeps it "
        "after its phase. The reliability is measured after every fortieth of the run, on 5 %% of the clips (at most "
        "128) that are held out of training; with fewer than 160 clips the decay is linear. Default: set by "
        "--preset.",
    )
    adaptive_window: int = HfArg(
        default=50, help="Number of updates over which the adaptive schedule averages its measurements."
    )
    self_weight: float | None = HfArg(
        default=None, help="Self-teacher weight at the end of the self phase, 0 to 1. Default: set by --preset."
    )
    self_schedule: str | None = HfArg(
        default=None, help=f"Growth of the self-teacher weight: {', '.join(SELF_SCHEDULES)}. Default: set by --preset."
    )
    self_teacher: str | None = HfArg(
        default=None,
        help="Self-teacher: ema (moving average of the weights), snapshot (copy made when the self phase starts), "
        "none. Default: set by --preset.",
    )
    self_ema_decay: float = HfArg(
        default=0.99, help="Decay of the moving average per update, with --self_teacher ema."
    )
    average: bool = HfArg(
        default=False,
        help="Publish the self-teacher's averaged weights, in place of those of the last step. Checkpoints have both.",
    )
    snapshot_strategy: str | None = HfArg(
        default=None, help="When to copy the student into the snapshot again: no, epoch. Default: set by --preset."
    )
    temperature: float | None = HfArg(
        default=None, help="Softmax temperature of the targets and the student. Default: set by --preset."
    )
    divergence: str = HfArg(
        default="forward_kl",
        help="Divergence from the soft targets: forward_kl, reverse_kl, jensen_shannon, skewed_kl.",
    )
    divergence_beta: float = HfArg(
        default=0.5, help="beta of jensen_shannon, alpha of skewed_kl: the weight of the target in the mixture."
    )
    weight_teacher_by_label_prob: bool = HfArg(
        default=False, help="Multiply the teacher weight at each token by the teacher's probability of the label."
    )
    early_stopping_patience: int | None = HfArg(
        default=None,
        help="Stop after this many evaluations without an improvement of --metric_for_best_model (default: the WER). "
        "Requires --load_best_model_at_end.",
    )
    freeze_encoder: bool | None = HfArg(
        default=None,
        help="Train the decoder only. Default: True. False if --encoder_layers removes layers and "
        "--encoder_recovery_epochs is 0.",
    )
    spec_augment: bool = HfArg(
        default=False,
        help="SpecAugment: mask parts of the student's features in training, as mask_time_prob, mask_feature_prob and "
        "their lengths in its config.json say. Teacher and self-teacher take all features. The config.json of the "
        "trained student keeps its own apply_spec_augment. False: as in config.json.",
    )
    hidden_weight: float | None = HfArg(
        default=None,
        help="Weight of the loss between the hidden states of the student's encoder and the teacher's. It is "
        "multiplied by the teacher weight. Default: 10 with --encoder_layers and --freeze_encoder False, else 0.",
    )
    eval_teacher_losses: bool = HfArg(
        default=False,
        help="Also run teacher and self-teacher in evaluation, and log eval_teacher_loss, eval_teacher_ce, "
        "eval_self_loss, eval_hidden_loss, eval_total_loss and eval_top1_agreement.",
    )
    save_dtype: Literal["float32", "float16", "bfloat16"] = HfArg(
        default="float32", help="Dtype of the finished student on disk. Checkpoints are float32."
    )

    # options of Seq2SeqTrainingArguments with other defaults
    output_dir: str | None = HfArg(
        default=None, help="Directory of checkpoints and student. Default: runs/ and the models' names."
    )
    learning_rate: float = HfArg(default=1e-4, help="The initial learning rate.")
    warmup_steps: float = HfArg(
        default=0.05, help="Number of steps of the linear warm-up; below 1 a fraction of the run."
    )
    optim: OptimizerNames | None = HfArg(
        default=None,
        help="Optimizer. Default: Trainer's, which is adamw_torch_fused, before PyTorch 2.8 adamw_torch.",
    )
    per_device_train_batch_size: int = HfArg(default=16, help="Training batch size per device.")
    per_device_eval_batch_size: int = HfArg(default=16, help="Evaluation batch size per device.")
    # Defaults that depend on the machine are set in __post_init__. Queried at import, CUDA would be initialized, and
    # unusable in processes forked later
    bf16: bool | None = HfArg(
        default=None,
        help="Autocast to bfloat16. Default: True on a GPU that supports it without emulation (unlike a T4). On a CPU "
        "it also requires --use_cpu.",
    )
    dataloader_num_workers: int | None = HfArg(
        default=None,
        help="Worker processes that decode audio and compute features. Default: with a GPU the cores of each "
        "process of the run less one, at least 1 and at most 8, else 0.",
    )
    eval_strategy: str | None = HfArg(
        default=None, help="When to evaluate: no, steps, epoch. Default: steps with --eval_steps, else epoch."
    )
    save_strategy: str | None = HfArg(
        default=None,
        help="When to save: no, steps, epoch, best. Default: steps with --save_steps, else epoch.",
    )
    save_steps: float | None = HfArg(
        default=None,
        help="Save every this many steps; below 1 a fraction of the run. Default: 500.",
    )
    save_total_limit: int | None = HfArg(default=2, help="Maximum number of checkpoints to keep; 0 for all.")
    resume_from_checkpoint: str | None = HfArg(
        default=None,
        help="Checkpoint to resume from: a directory; last, for the last complete one in --output_dir; or auto: the "
        "last complete one, or a new run if there is none.",
    )
    logging_steps: float | None = HfArg(
        default=None,
        help="Log every this many steps; below 1 a fraction of the run. Default: 25, or a tenth of a shorter run.",
    )
    logging_nan_inf_filter: bool = HfArg(
        default=False,
        help="Leave NaN and infinite losses out of the logged loss. Synchronizes the GPU after every micro-batch. "
        "Training stops at a NaN with or without it.",
    )
    report_to: list[str] = HfArg(
        default_factory=lambda: ["none"],
        help="Where to log besides trainer_state.json: one or more of tensorboard, trackio, wandb and the others of "
        "Trainer, or all that are installed.",
    )
    hub_strategy: str = HfArg(
        default="end", help="When --push_to_hub publishes: end, or every_save (also the student of every checkpoint)."
    )
    predict_with_generate: bool = HfArg(default=True, help="Generate in evaluation, for WER and CER.")
    dataloader_pin_memory: bool | None = HfArg(
        default=None, help="Put batches into pinned memory. Default: True with a GPU."
    )
    length_column_name: str = HfArg(
        default="label_tokens", help="Column with the lengths, for --train_sampling_strategy group_by_length."
    )
    remove_unused_columns: bool = HfArg(
        default=False, help="Must be False: the collator needs the audio and text columns."
    )

    def __post_init__(self):
        check_choice(self, "preset", PRESETS)
        given = {name for name in PRESETS[self.preset] if getattr(self, name) is not None}
        for name in PRESETS[self.preset].keys() - given:
            setattr(self, name, PRESETS[self.preset][name])
        if "teacher_weight_end" not in given:  # else a smaller --teacher_weight would grow to the preset's end
            self.teacher_weight_end = min(self.teacher_weight_end, self.teacher_weight)
        if self.self_teacher == "none" and "self_weight" not in given:
            self.self_weight = 0.0
        if self.self_teacher != "snapshot" and "snapshot_strategy" not in given:
            self.snapshot_strategy = "no"
        if self.output_dir is None:
            self.output_dir = UNNAMED_RUN
        if self.optim is None:
            self.optim = Seq2SeqTrainingArguments.optim
        check_ranges(self, **RANGES)
        check_steps(self)
        self._check_objective()
        self._check_metric()
        changed = {name for name in given if getattr(self, name) != PRESETS[self.preset][name]}
        if PRESETS[self.preset]["teacher_schedule"] == "adaptive" and not self._can_adapt():
            if "teacher_schedule" not in given:  # adaptive, set by the preset, would be the same or undefined
                self.teacher_schedule = "linear"
            if self.teacher_schedule == "linear":  # perhaps of such a config, given to `dataclasses.replace`
                changed.discard("teacher_schedule")
        check_effects(self, changed)
        if self.max_steps > 0:
            check_average(self, self.max_steps)
        check_trainer_options(self)
        self._set_machine_defaults()
        self.logs_by_default = self.logging_steps is None
        if self.logging_steps is None:
            self.logging_steps = LOGGING_STEPS
        self.evaluates_by_default = self.eval_strategy is None and self.eval_steps is None
        set_strategies(self)
        self._set_default_metric()
        if self.trackio_static_space_id in ("False", "false"):  # of the command line, where it would name a Space
            self.trackio_static_space_id: str | bool | None = False
        super().__post_init__()
        from .arguments.packages import check_reporting

        check_reporting(self.report_to)

    def _set_default_metric(self) -> None:
        """Choose the best checkpoint by the WER. The objective can't choose it, as its weights change over the run."""
        if self.metric_for_best_model is None and (self.load_best_model_at_end or self.save_strategy == "best"):
            self.metric_for_best_model: str | None = "wer" if self.predict_with_generate else "loss"
        if self.metric_for_best_model and self.greater_is_better is None:
            self.greater_is_better: bool | None = not self.metric_for_best_model.endswith(
                ("wer", "cer", "loss", "loops", "_ce")
            )

    def _check_objective(self) -> None:
        from .objective import DIVERGENCES
        from .self_teacher import SELF_TEACHERS

        choices = {
            "teacher_schedule": TEACHER_SCHEDULES,
            "self_schedule": SELF_SCHEDULES,
            "self_teacher": [*SELF_TEACHERS, "none"],
            "snapshot_strategy": ["no", "epoch"],
            "divergence": DIVERGENCES,
        }
        for name, allowed in choices.items():
            check_choice(self, name, allowed)
        weights = ("teacher_weight", "teacher_weight_end", "teacher_phase_ratio", "self_weight")
        check_ranges(self, **dict.fromkeys(weights, SHARE))
        check_ranges(self, temperature=POSITIVE, hidden_weight=NOT_NEGATIVE, adaptive_window=COUNT)
        check_ranges(self, self_ema_decay=Range(low=0, below=1))
        if DIVERGENCES[self.divergence].uses_mix:
            check_ranges(self, divergence_beta=Range(above=0, below=1))
        elif self.divergence_beta != type(self).divergence_beta:
            raise UserError(
                f"--divergence_beta {self.divergence_beta} has no effect with --divergence {self.divergence}"
            )
        if self.self_weight and self.self_teacher == "none":
            raise UserError(f"--self_weight {self.self_weight} requires --self_teacher ema or snapshot")
        if self.hidden_weight and not self.uses_teacher:
            raise UserError(f"--hidden_weight {self.hidden_weight} requires a teacher phase")
        if self.average and (self.self_teacher != "ema" or not self.self_weight):
            raise UserError("--average requires --self_teacher ema and a --self_weight above 0, such as 0.3")
        if self.average and self.uses_teacher and self.teacher_phase_ratio == 1.0:
            raise UserError("--average has no effect: with --teacher_phase_ratio 1 there is no self phase")
        if self.average and self.load_best_model_at_end:
            raise UserError("--average is not supported with --load_best_model_at_end, which publishes a checkpoint")
        if self.snapshot_strategy == "epoch" and self.self_teacher != "snapshot":
            raise UserError("--snapshot_strategy epoch requires --self_teacher snapshot")

    def _check_metric(self) -> None:
        """Check the options of the best checkpoint, early stopping and publishing."""
        metric = (self.metric_for_best_model or "").removeprefix("eval_")
        if metric in RENAMED_METRICS:
            raise UserError(f"--metric_for_best_model {metric} is called {RENAMED_METRICS[metric]} now")
        if metric in TEACHER_METRICS and not self.eval_teacher_losses:
            raise UserError(f"--metric_for_best_model {metric} requires --eval_teacher_losses")
        check_ranges(self, early_stopping_patience=COUNT)
        if self.early_stopping_patience is not None and not self.load_best_model_at_end:
            raise UserError("--early_stopping_patience requires --load_best_model_at_end")
        if self.hub_strategy in ("checkpoint", "all_checkpoints"):
            raise UserError(
                f"--hub_strategy must be end or every_save, got {str(self.hub_strategy)!r}, which would publish the "
                "optimizer's state"
            )

    def _set_machine_defaults(self) -> None:
        import torch

        gpu = torch.accelerator.is_available() and not self.use_cpu
        if self.bf16 is None:
            supported = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
            self.bf16 = supported and not (self.use_cpu or self.fp16)
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = default_workers() if gpu else 0
        if self.dataloader_pin_memory is None:
            self.dataloader_pin_memory = gpu
        if self.dataloader_pin_memory and self.accelerator_config is None:  # type: ignore[has-type]
            self.accelerator_config = {"non_blocking": True}  # copies from pinned memory don't wait for the GPU

    def _can_adapt(self) -> bool:
        """Return whether the teacher weight decreases, or ends before the run: else adaptive means nothing."""
        start, end = self.teacher_weight, self.teacher_weight_end
        return self.uses_teacher and (end < start or (end == start and self.teacher_phase_ratio < 1.0))

    @property
    def order_seed(self) -> int:
        """The seed of the order of the clips: `data_seed`, or `seed` if `data_seed` is None."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def compile_options(self) -> dict[str, Any] | None:
        """The arguments of `torch.compile`, None without `torch_compile`. Trainer compiles the student only."""
        if not self.torch_compile:
            return None
        return dict(backend=self.torch_compile_backend, mode=self.torch_compile_mode)

    @property
    def uses_teacher(self) -> bool:
        """Whether the teacher weight is above 0 at any step."""
        return self.teacher_phase_ratio > 0.0 and max(self.teacher_weight, self.teacher_weight_end) > 0.0


@accepts_renamed
@dataclass
class FinetuningConfig(ASKDConfig):
    """`ASKDConfig` with the defaults for a student that already transcribes its language."""

    preset: str = HfArg(
        default="ps-kd", help="As of `askd-hf distill`: ps-kd (self only), askd (teacher, then labels), ce..."
    )
    learning_rate: float = HfArg(default=1e-5, help="The initial learning rate. For an adapter 1e-3 is usual.")


def resolve_dtype(name: str, config: ASKDConfig) -> "torch.dtype":
    """Return the `torch.dtype` for `ModelArguments.teacher_dtype`; for int8 that of the weights that stay in float."""
    import torch

    if name in ("auto", "int8"):
        name = "bfloat16" if config.bf16 else "float16" if config.fp16 else "float32"
    return getattr(torch, name)
