"""`ASKDConfig`: how to train. What the models and the data are is in `arguments`.

Every field is a command-line option and a key of the YAML file given by `--config`; its help is its documentation.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from accelerate.utils import parse_flag_from_env
from transformers import Seq2SeqTrainingArguments

from .arguments.packages import check_reporting
from .arguments.ranges import COUNT, NOT_NEGATIVE, POSITIVE, SEED, Range, check_ranges
from .arguments.renamed import accepts_renamed
from .errors import UserError
from .objective import DIVERGENCES, DIVERGENCES_WITH_MIX
from .schedule import PRESETS, SELF_SCHEDULES, TEACHER_SCHEDULES
from .self_teacher import SELF_TEACHERS

SHARDING = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")  # set by `accelerate launch`
UNNAMED_RUN = "runs/unnamed"
BLEND_METRICS = ("blend_loss", "teacher_loss", "self_loss", "teacher_ce", "agreement", "hidden_loss")

# what Seq2SeqTrainingArguments takes without a word, and fails or does nonsense with later
RANGES = dict(
    learning_rate=POSITIVE,
    weight_decay=NOT_NEGATIVE,
    adam_beta1=Range(low=0, below=1),
    adam_beta2=Range(low=0, below=1),
    adam_epsilon=POSITIVE,
    max_grad_norm=NOT_NEGATIVE,
    num_train_epochs=POSITIVE,
    warmup_steps=NOT_NEGATIVE,
    per_device_train_batch_size=COUNT,
    per_device_eval_batch_size=COUNT,
    gradient_accumulation_steps=COUNT,
    eval_accumulation_steps=COUNT,
    eval_delay=NOT_NEGATIVE,
    logging_steps=POSITIVE,
    eval_steps=POSITIVE,
    save_steps=POSITIVE,
    save_total_limit=NOT_NEGATIVE,
    seed=SEED,
    data_seed=SEED,
    dataloader_num_workers=NOT_NEGATIVE,
    dataloader_prefetch_factor=COUNT,
    generation_max_length=COUNT,
    generation_num_beams=COUNT,
    neftune_noise_alpha=POSITIVE,
    ddp_timeout=COUNT,
    ddp_bucket_cap_mb=COUNT,
    torch_empty_cache_steps=COUNT,
)


@accepts_renamed
@dataclass
class ASKDConfig(Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` and the blend of labels, teacher and self-teacher.

    A blend field left at None takes the value of `preset`. Raises `UserError` for values that make no objective.
    """

    _argument_group_name = "the blend, and all of Seq2SeqTrainingArguments"

    preset: str = field(
        default="askd",
        metadata={
            "help": "Sets the blend fields below that aren't given: askd (teacher, then self), kd (static teacher, "
            "distil-whisper's weights), annealing (teacher to labels), ps-kd (self only), ce (labels only)."
        },
    )
    teacher_weight: float | None = field(
        default=None, metadata={"help": "Weight `a` on the teacher at the first step, 0 to 1. None: the preset's."}
    )
    teacher_weight_end: float | None = field(
        default=None,
        metadata={"help": "Weight on the teacher that the end of the teacher phase reaches. None: the preset's."},
    )
    teacher_phase_ratio: float | None = field(
        default=None,
        metadata={
            "help": "The teacher phase as a fraction of the run; the self phase is the rest. None: the preset's."
        },
    )
    teacher_schedule: str | None = field(
        default=None,
        metadata={
            "help": f"How the teacher's weight falls: {', '.join(TEACHER_SCHEDULES)}. adaptive: as linear where the "
            "labels bear out; where they don't, as with wrong transcripts, the teacher keeps more weight, and beyond "
            "its phase. It keeps 5 %% of the training clips (at most 128) out of training, to look at them 40 times "
            "per run; with fewer than 160 clips it is linear. None: the preset's."
        },
    )
    adaptive_window: int = field(
        default=50, metadata={"help": "Updates over which the adaptive schedule smooths what it measures."}
    )
    self_weight: float | None = field(
        default=None,
        metadata={"help": "Weight `b` on the self-teacher that the self phase reaches, 0 to 1. None: the preset's."},
    )
    self_schedule: str | None = field(
        default=None,
        metadata={"help": f"How the self-teacher's weight rises: {', '.join(SELF_SCHEDULES)}. None: the preset's."},
    )
    self_teacher: str | None = field(
        default=None,
        metadata={
            "help": "The student's other self: ema (its average), snapshot (as it entered the phase), or none. "
            "None: the preset's."
        },
    )
    self_ema_decay: float = field(
        default=0.99, metadata={"help": "Share of the average that an update keeps (self_teacher=ema)."}
    )
    snapshot_strategy: str | None = field(
        default=None, metadata={"help": "When to renew the snapshot: no, epoch. Default: the preset's."}
    )
    temperature: float | None = field(
        default=None, metadata={"help": "Softens the targets and the student in the divergences. None: the preset's."}
    )
    divergence: str = field(
        default="forward_kl", metadata={"help": f"Distance to the soft targets: {', '.join(DIVERGENCES)}."}
    )
    divergence_beta: float = field(
        default=0.5,
        metadata={"help": "beta of jensen_shannon, alpha of skewed_kl: the share of the target in the mixture."},
    )
    weight_teacher_by_label_prob: bool = field(
        default=False,
        metadata={"help": "Weigh the teacher at each token by the probability that it gives the label there."},
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "Stop when metric_for_best_model, by default the WER, hasn't got better in so many evaluations. "
            "With load_best_model_at_end."
        },
    )
    freeze_encoder: bool | None = field(
        default=None,
        metadata={"help": "Train the decoder only. Default: on, unless --encoder_layers has compressed the encoder."},
    )
    hidden_weight: float | None = field(
        default=None,
        metadata={
            "help": "Weight on the hidden-state loss of a trained encoder against the teacher's layers, relative to "
            "the teacher's weight, with which it falls. Default: 10 with --encoder_layers, else 0."
        },
    )
    eval_teacher_losses: bool = field(
        default=False,
        metadata={
            "help": "Also run teacher and self-teacher in evaluation, for eval_teacher_loss, eval_teacher_ce, "
            "eval_self_loss, eval_hidden_loss, eval_blend_loss, eval_agreement. Without it evaluation runs the "
            "student alone."
        },
    )

    save_dtype: Literal["float32", "float16", "bfloat16"] = field(
        default="float32", metadata={"help": "Weights of the finished student on disk. Checkpoints keep float32."}
    )

    # Defaults of ours for Seq2SeqTrainingArguments
    output_dir: str | None = field(
        default=None, metadata={"help": "Where checkpoints and the student go. Default: runs/ and the models' names."}
    )
    learning_rate: float = field(default=1e-4, metadata={"help": "The initial learning rate."})
    warmup_steps: float = field(
        default=0.05, metadata={"help": "Linear warm-up: a number of steps, or below 1 a fraction of the run."}
    )
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Clips a device and micro-batch."})
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "Clips a device and evaluation batch."})
    # what depends on the machine is decided in __post_init__: asked at import, CUDA is lost to processes forked later
    bf16: bool | None = field(
        default=None,
        metadata={
            "help": "Autocast to bfloat16. Default: on a GPU that computes in it, and doesn't emulate it, as a T4 "
            "does. On a CPU also give --use_cpu."
        },
    )
    dataloader_num_workers: int | None = field(
        default=None,
        metadata={"help": "Processes that decode audio and compute features. Default: 4 with a GPU, else none."},
    )
    eval_strategy: str | None = field(
        default=None,
        metadata={"help": "When to evaluate: no, steps, epoch. Default: epoch, if there is something to evaluate on."},
    )
    save_strategy: str = field(default="epoch", metadata={"help": "When to save checkpoints: no, steps, epoch, best."})
    save_total_limit: int | None = field(default=2, metadata={"help": "How many checkpoints to keep."})
    logging_steps: float = field(default=25, metadata={"help": "Log every so many steps; below 1 a fraction."})
    hub_strategy: str = field(
        default="end",
        metadata={
            "help": "When to publish, with --push_to_hub: end, or every_save (also the student of every checkpoint)."
        },
    )
    predict_with_generate: bool = field(default=True, metadata={"help": "Evaluate WER and CER by generation."})
    dataloader_pin_memory: bool | None = field(
        default=None, metadata={"help": "Pin the batches' memory. Default: with a GPU."}
    )
    length_column_name: str = field(
        default="label_tokens", metadata={"help": "What --train_sampling_strategy group_by_length groups by."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay off: the collator makes the model's inputs from other columns."}
    )

    def __post_init__(self):
        if self.preset not in PRESETS:
            raise UserError(f"preset: {self.preset!r} is none of {', '.join(PRESETS)}")
        given = {name for name in PRESETS[self.preset] if getattr(self, name) is not None}
        for name in PRESETS[self.preset].keys() - given:
            setattr(self, name, PRESETS[self.preset][name])
        if self.self_teacher == "none" and "self_weight" not in given:
            self.self_weight = 0.0
        if self.output_dir is None:
            self.output_dir = UNNAMED_RUN
        check_ranges(self, **RANGES)
        self._check_steps()
        self._check_blend()
        if self.teacher_schedule == "adaptive" and "teacher_schedule" not in given and not self._can_adapt():
            self.teacher_schedule = "linear"  # the preset's adaptive one would be the same, or undefined
        self._check_effects({name for name in given if getattr(self, name) != PRESETS[self.preset][name]})
        self._check_training()
        self._fit_to_the_machine()
        self.evaluates_by_default = self.eval_strategy is None
        if self.eval_strategy is None:
            self.eval_strategy = "epoch"
        self._choose_best_by_error_rate()
        super().__post_init__()
        check_reporting(self.report_to)

    def _check_steps(self) -> None:
        if self.max_steps < 1 and self.max_steps != -1:
            raise UserError(f"--max_steps {self.max_steps} is not at least 1; leave it out for --num_train_epochs")
        if self.max_steps > 0 and self.warmup_steps > max(self.max_steps, 1):
            raise UserError(
                f"--warmup_steps {self.warmup_steps:g} is more than --max_steps {self.max_steps}: the learning rate "
                "would never be reached; below 1 it is a fraction of the run"
            )

    def _choose_best_by_error_rate(self) -> None:
        """Unless told otherwise. The blend's own loss can't choose a checkpoint: its weights change over the run."""
        if self.metric_for_best_model is None and (self.load_best_model_at_end or self.save_strategy == "best"):
            self.metric_for_best_model: str | None = "wer" if self.predict_with_generate else "ce_loss"
        if self.metric_for_best_model and self.greater_is_better is None:
            self.greater_is_better: bool | None = not self.metric_for_best_model.endswith(("wer", "cer", "loss"))

    def _check_blend(self) -> None:
        choices = {
            "teacher_schedule": TEACHER_SCHEDULES,
            "self_schedule": SELF_SCHEDULES,
            "self_teacher": [*SELF_TEACHERS, "none"],
            "snapshot_strategy": ["no", "epoch"],
            "divergence": DIVERGENCES,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"{name}: {getattr(self, name)!r} is none of {', '.join(allowed)}")
        for name in ("teacher_weight", "teacher_weight_end", "teacher_phase_ratio", "self_weight"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise UserError(f"{name}: {getattr(self, name)} is not between 0 and 1")
        if not 0.0 <= self.self_ema_decay < 1.0:
            raise UserError(f"self_ema_decay: {self.self_ema_decay} is not in [0, 1)")
        if self.divergence in DIVERGENCES_WITH_MIX and not 0.0 < self.divergence_beta < 1.0:
            raise UserError(f"divergence_beta: {self.divergence_beta} is not strictly between 0 and 1")
        if self.temperature not in POSITIVE:
            raise UserError(f"temperature: {self.temperature} is not positive")
        if self.self_weight and self.self_teacher == "none":
            raise UserError(f"self_weight: {self.self_weight} has no effect without a self_teacher (ema, snapshot)")
        if self.hidden_weight is not None and self.hidden_weight not in NOT_NEGATIVE:
            raise UserError(f"hidden_weight: {self.hidden_weight} is not at least 0")
        if self.hidden_weight and not self.uses_teacher:
            raise UserError(f"hidden_weight: {self.hidden_weight} has no effect without a teacher phase")
        if self.snapshot_strategy == "epoch" and self.self_teacher != "snapshot":
            raise UserError("snapshot_strategy: only a snapshot is renewed; the ema follows the student by itself")
        if self.hub_strategy in ("checkpoint", "all_checkpoints"):
            raise UserError(
                f"hub_strategy: {str(self.hub_strategy)!r} publishes the optimizer's state, and here only the student "
                "is ever published: choose every_save (the student of every checkpoint) or end"
            )
        if (self.metric_for_best_model or "").removeprefix("eval_") in BLEND_METRICS and not self.eval_teacher_losses:
            raise UserError(
                f"metric_for_best_model: {self.metric_for_best_model} is evaluated only with eval_teacher_losses"
            )
        if self.adaptive_window < 1:
            raise UserError(f"adaptive_window: {self.adaptive_window} is not at least 1")
        if self.early_stopping_patience is not None and not (
            self.early_stopping_patience >= 1 and self.load_best_model_at_end
        ):
            raise UserError("early_stopping_patience: it must be at least 1, and needs load_best_model_at_end")

    def _fit_to_the_machine(self) -> None:
        """What isn't given, by the GPU, if there is one to train on."""
        gpu = torch.accelerator.is_available() and not self.use_cpu
        if self.bf16 is None:
            able = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
            self.bf16 = able and not (self.use_cpu or self.fp16)
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = 4 if gpu else 0
        if self.dataloader_pin_memory is None:
            self.dataloader_pin_memory = gpu

    def _check_training(self) -> None:
        """Raise `UserError` for options of Trainer that can't be had here."""
        if self.fp16 and self.bf16:
            raise UserError("fp16, bf16: choose one of them")
        if self.fsdp or self.deepspeed or any(parse_flag_from_env(name) for name in SHARDING):
            raise UserError(
                "FSDP and DeepSpeed (ZeRO) aren't supported, nor needed: only the student is trained, and its weights "
                "and optimizer fit on one GPU for all of Whisper's sizes. Start with plain DDP: `accelerate launch "
                "--multi_gpu` (or torchrun), with --bf16 and --gradient_accumulation_steps where memory is short"
            )
        if self.enable_jit_checkpoint:
            raise UserError(
                "enable_jit_checkpoint: on SIGTERM a run saves a checkpoint without it, after the update under way; "
                "leave it out"
            )
        if self.ddp_static_graph:
            raise UserError("ddp_static_graph: DDP would miss the gradients of a loss outside of the model's forward")
        if self.label_smoothing_factor:
            raise UserError("label_smoothing_factor: the soft targets do its work; it must be 0")
        if self.use_liger_kernel:
            raise UserError("use_liger_kernel: Liger has no kernels for Whisper; it would change nothing")
        if self.remove_unused_columns:
            raise UserError("remove_unused_columns: must be False, the collator needs the audio and text columns")

    def _can_adapt(self) -> bool:
        """Whether the teacher's weight falls, or ends before the run does, so that it can be held back."""
        start, end = self.teacher_weight, self.teacher_weight_end
        return self.uses_teacher and (end < start or (end == start and self.teacher_phase_ratio < 1.0))

    def _check_effects(self, changed: set[str]) -> None:
        """Raise `UserError` for blend options that would do nothing. Those left as in the preset may.

        Args:
            changed: the options that were given, with other values than the preset's.
        """
        start, end, phase = self.teacher_weight, self.teacher_weight_end, self.teacher_phase_ratio
        for name in ("teacher_weight", "teacher_weight_end"):
            if getattr(self, name) and not phase:
                raise UserError(f"{name}: {getattr(self, name)} has no effect with a teacher_phase_ratio of 0")
        if "teacher_schedule" in changed and not self.uses_teacher:
            raise UserError(
                f"teacher_schedule: {self.teacher_schedule} has no effect, the teacher's weight is always 0"
            )
        if "teacher_weight_end" in changed and self.teacher_schedule == "constant" and end != start:
            raise UserError(f"teacher_weight_end: {end} has no effect with teacher_schedule constant")
        if self.teacher_schedule == "adaptive" and end > start:
            raise UserError(
                f"teacher_schedule: adaptive only lowers the weight, and teacher_weight_end {end} is above {start}"
            )
        if "teacher_schedule" in changed and self.teacher_schedule == "adaptive" and end == start and phase == 1.0:
            raise UserError(
                f"teacher_schedule: adaptive has no effect, the teacher's weight is {start} in all of the run"
            )
        if "self_weight" in changed and self.self_weight and self.uses_teacher and phase == 1.0:
            raise UserError(
                f"self_weight: {self.self_weight} has no effect, a teacher_phase_ratio of 1 leaves no self phase"
            )
        for name in ("self_schedule", "snapshot_strategy", "self_teacher"):
            if name in changed and not self.self_weight and getattr(self, name) != "none":
                raise UserError(f"{name}: {getattr(self, name)} has no effect with a self_weight of 0")

    @property
    def order_seed(self) -> int:
        """The seed of the order of the clips: `data_seed`, or `seed` where that isn't given."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def uses_teacher(self) -> bool:
        """Whether the teacher has any weight at any step."""
        return self.teacher_phase_ratio > 0.0 and max(self.teacher_weight, self.teacher_weight_end) > 0.0


def resolve_dtype(name: str, config: ASKDConfig) -> torch.dtype:
    """The `torch.dtype` of `ModelArguments.teacher_dtype`; of int8 that of the other weights, and of computing."""
    if name in ("auto", "int8"):
        name = "bfloat16" if config.bf16 else "float16" if config.fp16 else "float32"
    return getattr(torch, name)
