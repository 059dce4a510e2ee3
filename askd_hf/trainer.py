"""`ASKDTrainer`: Seq2SeqTrainer with the blend of labels, teacher and self-teacher as its loss."""

import contextlib
import copy
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ProcessorMixin, Seq2SeqTrainer, WhisperForConditionalGeneration
from transformers.models.whisper.modeling_whisper import shift_tokens_right
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput

from .callbacks import AdaptiveBlendCallback, StopGracefullyCallback
from .config import ASKDConfig
from .errors import UserError
from .hub import hub_upload
from .objective import DIVERGENCES, BlendTerms, blend
from .run_dir import checkpoint_to_resume
from .student import check_pair, same_encoder

logger = logging.getLogger(__name__)

# the terms that are logged, as columns of the sums: each a sum over label tokens, then how many tokens it sums
TERMS = ("total", "ce", "teacher", "self", "teacher_ce", "agreement")
LOG_NAMES = {
    "total": "blend_loss",
    "ce": "ce_loss",
    "teacher": "teacher_loss",
    "self": "self_loss",
    "teacher_ce": "teacher_ce",
    "agreement": "agreement",
}


class NonFiniteLossError(UserError):
    """The loss or the gradient is NaN or infinite. The weights are those of the last update and still finite."""


class ASKDTrainer(Seq2SeqTrainer):
    """Distils `teacher` into `model` by the objective of `askd_hf.objective`.

    Args:
        model: the student. Its encoder is frozen here if `args.freeze_encoder`.
        args: the run's options, the blend's among them.
        teacher: a Whisper model with the student's vocabulary and mel bins; frozen and put in evaluation mode here,
            never saved, dropped as soon as its weight is 0 for good. None if its weight is 0 from the start.
        processing_class: the `WhisperProcessor` that is saved with the student.
        kwargs: the other arguments of `Seq2SeqTrainer`. Batches come from `data_collator` and hold `input_features`
            `(batch, mel_bins, frames)`, `labels` `(batch, tokens)` padded with -100 and, for messages, `clip`, the
            names of the clips.

    Logged besides Trainer's own values, over the label tokens since the last time: `ce_loss`, `teacher_loss`,
    `self_loss` (with their T^2), `blend_loss` (their blend), `teacher_ce`, `agreement` and the weights. Evaluation
    gives the same with the prefix `eval_`, and `compute_metrics` on generated tokens.
    """

    # compute_loss divides by the label tokens of the whole update itself
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: WhisperForConditionalGeneration,
        args: ASKDConfig,
        teacher: WhisperForConditionalGeneration | None = None,
        processing_class: ProcessorMixin | None = None,
        **kwargs: Any,
    ):
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func would replace the objective: use Seq2SeqTrainer for your own loss")
        if args.uses_teacher and teacher is None:
            raise UserError(
                f"preset {args.preset!r} has a teacher phase but there is no teacher: give it with --teacher, or "
                "choose a preset without one (ps-kd, ce)"
            )
        if args.n_gpu > 1:
            raise UserError("several GPUs need one process each: start with `accelerate launch` (or torchrun)")
        if args.fsdp or args.deepspeed:
            raise UserError("FSDP and DeepSpeed split the weights, which the self-teacher needs whole: use DDP")
        if args.freeze_encoder:
            # `from_pretrained` leaves the position embeddings trainable, so all parameters are named here
            model.model.encoder.requires_grad_(False)
        # as the student is to be published: Trainer switches the cache off and fills the generation config up
        self._use_cache = model.config.use_cache
        self._generation_config = copy.deepcopy(model.generation_config)
        self._generation_config._from_model_config = False  # or `from_pretrained` would not read it
        if self._generation_config.max_length is None:
            self._generation_config.max_length = model.config.max_target_positions
        super().__init__(model=model, args=args, processing_class=processing_class, **kwargs)
        self.model_accepts_loss_kwargs = True  # makes Trainer count the label tokens of every update

        self.teacher = None
        self._teacher_has_our_encoder = False
        if args.uses_teacher:
            check_pair(teacher, model)
            self.teacher = teacher.to(args.device).eval().requires_grad_(False)
            self._teacher_has_our_encoder = args.freeze_encoder and same_encoder(teacher, model)

        self.blend = AdaptiveBlendCallback(args)
        self.stop = StopGracefullyCallback()
        self.add_callback(self.blend)
        self.add_callback(self.stop)
        self._clips: list[str] = []
        self._train_sums = self._new_sums()
        self._eval_sums = self._new_sums()

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any):
        if self.args.uses_teacher and self.teacher is None and not resume_from_checkpoint:
            raise UserError("the teacher was freed when its phase ended: make a new trainer to train again")
        if resume_from_checkpoint is True:  # Trainer would take the newest, finished or not
            resume_from_checkpoint = checkpoint_to_resume(self.args.output_dir, "last")
        try:
            return super().train(resume_from_checkpoint, **kwargs)
        finally:
            self.stop.restore()

    # ---- the loss ----

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = dict(inputs)
        self._clips = inputs.pop("clip", self._clips)
        return super()._prepare_inputs(inputs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The blend summed over the batch's label tokens, divided by `num_items_in_batch`, those of the whole update.

        Without `num_items_in_batch` it is the mean over the batch's own tokens. The outputs, if asked for, have the
        student's logits `(batch, tokens, vocabulary)`.
        """
        terms, outputs = self._run_models(model, inputs, keep_padding=return_outputs)
        if model.training:
            self._check_finite(terms.total, inputs["labels"])
            self._train_sums += _sums(terms)
            if terms.teacher_ce is not None:
                self.blend.observe(terms.teacher_ce, terms.ce.detach())
        if num_items_in_batch is None:
            loss = terms.total.mean()
        else:
            loss = terms.total.sum() / num_items_in_batch
            if self.args.average_tokens_across_devices:
                # DDP averages the gradients of processes that each divided by the tokens of all
                loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, outputs) if return_outputs else loss

    def _run_models(self, model: nn.Module, inputs: dict[str, Tensor], keep_padding: bool) -> tuple[BlendTerms, Any]:
        """Teacher, self-teacher and student on one batch: the terms at each label token, and the student's outputs."""
        student = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        weights = self.blend.weights
        labels = inputs["labels"]
        real = labels != -100
        batch = {name: value for name, value in inputs.items() if name != "labels"}
        batch["decoder_input_ids"] = shift_tokens_right(
            labels, student.config.pad_token_id, student.config.decoder_start_token_id
        )
        batch["use_cache"] = False
        # The student comes last: SpecAugment writes into its input features
        teacher_logits = self_logits = None
        if model.training and self.teacher is not None and not self.blend.needs_teacher(self.state.global_step):
            self._release_teacher()
        run_teacher = self.teacher is not None and weights.teacher > 0.0
        run_self = self.blend.self_teacher is not None and weights.self > 0.0
        with torch.no_grad(), self.accelerator.autocast():
            if (run_teacher or run_self) and self._encoder_is_fixed(model):
                features = batch["input_features"].to(student.dtype)
                batch["encoder_outputs"] = (student.model.encoder(features).last_hidden_state,)
            if run_teacher:
                with _project_only(self.teacher, real):
                    teacher_logits = self.teacher(**self._teacher_inputs(batch)).logits
            if run_self:
                with _project_only(student, real):
                    self_logits = self.blend.self_teacher(student, batch).logits
        with contextlib.nullcontext() if keep_padding else _project_only(student, real):
            outputs = model(**batch)
        terms = blend(
            outputs.logits[real] if keep_padding else outputs.logits,
            labels[real],
            teacher_logits=teacher_logits,
            self_logits=self_logits,
            teacher_weight=weights.teacher,
            self_weight=weights.self,
            temperature=self.args.temperature,
            divergence=DIVERGENCES[self.args.divergence],
            mix=self.args.divergence_mix,
            trust_label=self.args.trust_label,
        )
        return terms, outputs

    def _encoder_is_fixed(self, model: nn.Module) -> bool:
        """Whether the student's encoder gives the same output for the same clip, training or not, now and later."""
        config = self.model.config
        varies = config.apply_spec_augment or config.encoder_layerdrop or config.dropout or config.attention_dropout
        return self.args.freeze_encoder and not (model.training and (varies or config.activation_dropout))

    def _teacher_inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The teacher's batch: our encoder's output where the encoders are the same, else the features."""
        batch = dict(batch)
        batch.pop("attention_mask", None)  # only SpecAugment reads it
        if "encoder_outputs" in batch:
            if self._teacher_has_our_encoder:
                batch.pop("input_features")
                batch["encoder_outputs"] = (batch["encoder_outputs"][0].to(self.teacher.dtype),)
                return batch
            batch.pop("encoder_outputs")
        batch["input_features"] = batch["input_features"].to(self.teacher.dtype)
        return batch

    def _release_teacher(self) -> None:
        """Free the teacher's memory, unless the caller has kept a reference."""
        self.teacher = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        logger.warning("step %d: the teacher's weight is 0 from here on; it is freed", self.state.global_step)

    def _check_finite(self, total: Tensor, labels: Tensor) -> None:
        if torch.isfinite(total.sum()):
            return
        rows = (labels != -100).nonzero()[:, 0][~torch.isfinite(total)].unique().tolist()
        clips = [self._clips[row] if row < len(self._clips) else f"row {row} of the batch" for row in rows]
        raise NonFiniteLossError(
            f"the loss is not finite at step {self.state.global_step}, in {len(clips)} of {len(labels)} clips: "
            f"{', '.join(clips[:8])}{', ...' if len(clips) > 8 else ''}. Lower the learning rate, or look at these "
            "clips. Checkpoints are from before"
        )

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # the last look before the update, so that no checkpoint ever holds NaN weights; fp16's scaler skips its own
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self.accelerator.scaler is None and grad_norm is not None and not math.isfinite(grad_norm):
            raise NonFiniteLossError(
                f"the gradient is not finite at step {self.state.global_step}, last clips: "
                f"{', '.join(self._clips[:8])}. Lower the learning rate. Checkpoints are from before"
            )
        return grad_norm

    # ---- evaluation ----

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: Any,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The blend's terms on the labels, and generated tokens. Seq2SeqTrainer would report its plain loss."""
        if "labels" not in inputs:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, **gen_kwargs)
        inputs = self._prepare_inputs(inputs)
        # bf16_full_eval casts the model
        inputs["input_features"] = inputs["input_features"].to(self.model.dtype)
        labels = inputs["labels"]
        with torch.no_grad(), self.compute_loss_context_manager():
            terms, _ = self._run_models(model, inputs, keep_padding=False)
        # a row a clip, so that the clips that even out the processes' last batch can be dropped again
        by_clip = self.accelerator.gather_for_metrics(_sums_by_clip(terms, labels))
        self._eval_sums += by_clip.sum(0)
        loss = terms.total.mean()
        if prediction_loss_only or not self.args.predict_with_generate:
            return loss, None, None
        features = inputs["input_features"]
        # of ones, as Whisper sees the padding's silence too; without a mask `generate` warns at every run
        generation_inputs = {"input_features": features, "attention_mask": torch.ones_like(features[:, 0]).long()}
        _, tokens, _ = super().prediction_step(model, generation_inputs, False, ignore_keys, **gen_kwargs)
        return loss, tokens, labels

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        # Seq2SeqTrainer sets plain `gather`, which keeps the clips that pad the last batch under DDP
        self.gather_function = self.accelerator.gather_for_metrics
        self._eval_sums = self._new_sums()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = self._means(self._eval_sums)
        if means:
            output.metrics[f"{metric_key_prefix}_loss"] = means["blend_loss"]  # over tokens, not a mean of batch means
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    # ---- logging ----

    def _new_sums(self) -> Tensor:
        # float64, so that the logged means are exact to the digits shown; Apple's GPUs have none
        dtype = torch.float32 if self.args.device.type == "mps" else torch.float64
        return torch.zeros(2 * len(TERMS), dtype=dtype, device=self.args.device)

    @staticmethod
    def _means(sums: Tensor) -> dict[str, float]:
        """Mean of each term over the tokens where it was measured; terms that weren't are left out."""
        values, counts = sums.view(2, -1).tolist()
        return {LOG_NAMES[t]: v / n for t, v, n in zip(TERMS, values, counts, strict=True) if n}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the terms and the weights to the log of training steps, on its way to log_history and all reporters."""
        if "loss" in logs and "learning_rate" in logs:
            sums = self.accelerator.reduce(self._train_sums, reduction="sum")
            logs |= self._means(sums)
            logs["teacher_weight"], logs["self_weight"] = self.blend.weights
            if self.args.teacher_schedule == "adaptive":
                logs["teacher_advantage"] = self.blend.state.advantage
            self._train_sums = self._new_sums()
        super().log(logs, start_time)

    # ---- saving ----

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # before Trainer writes trainer_state.json, which completes a checkpoint
        if self.args.should_save:
            directory = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            directory.mkdir(parents=True, exist_ok=True)
            self.blend.save(directory)
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.blend.load(Path(resume_from_checkpoint))
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write a directory that `pipeline` and `from_pretrained` load, in `args.save_dtype`. Doesn't push.

        Trainer's own would push here with `args.push_to_hub`; `push_to_hub` does it, when all else is done.
        """
        super().save_model(output_dir, _internal_call=True)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's. Raises `UserError` if it fails: the student is on disk, and the message says how to go on."""
        again = (
            f"hf upload {self.hub_model_id or '<your name>/<model>'} {self.args.output_dir} --exclude 'checkpoint-*/*'"
        )
        with hub_upload(f"the student is safe in {self.args.output_dir}; push it later with: {again}"):
            return super().push_to_hub(*args, **kwargs)

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        with hub_upload("nothing can be pushed: log in with `hf auth login`, or leave out --push_to_hub"):
            super().init_hf_repo(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        student = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        in_training = student.config.use_cache, student.generation_config
        student.config.use_cache, student.generation_config = self._use_cache, self._generation_config
        try:
            super()._save(output_dir, state_dict)
        finally:
            student.config.use_cache, student.generation_config = in_training
        if not self.args.should_save:
            return
        directory = Path(output_dir or self.args.output_dir)
        (directory / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle of all arguments, a Hub token among them
        spelling = getattr(getattr(self.processing_class, "tokenizer", None), "english_spelling_normalizer", None)
        if spelling:  # `save_pretrained` forgets it, and Whisper's normaliser needs it
            (directory / "normalizer.json").write_text(json.dumps(spelling, indent=2))
        dtype = getattr(torch, self.args.save_dtype)
        # a checkpoint keeps the dtype of training, or a resumed run would go on from rounded weights
        if dtype != self.model.dtype and not directory.name.startswith(PREFIX_CHECKPOINT_DIR):
            WhisperForConditionalGeneration.from_pretrained(directory, dtype=dtype).save_pretrained(directory)


# ---- helpers ----


@contextlib.contextmanager
def _project_only(model: WhisperForConditionalGeneration, real: Tensor) -> Iterator[None]:
    """Within it, `model` projects only the positions of the `(batch, tokens)` mask onto the vocabulary.

    Its logits are then `(tokens, vocabulary)`. As a hook it works through DDP and autocast wrappers.
    """
    hook = model.proj_out.register_forward_pre_hook(lambda module, args: (args[0][real],))
    try:
        yield
    finally:
        hook.remove()


def _sums(terms: BlendTerms) -> Tensor:
    """`(2 * len(TERMS),)` float64: the terms' sums over tokens, then how many tokens each sums."""
    measured = terms.measured()
    tokens = float(len(terms.total))
    sums = [measured[t].sum() if t in measured else terms.total.new_zeros(()) for t in TERMS]
    counts = [terms.total.new_tensor(tokens if t in measured else 0.0) for t in TERMS]
    return torch.stack(sums + counts).detach()


def _sums_by_clip(terms: BlendTerms, labels: Tensor) -> Tensor:
    """`_sums` for each clip of a `(batch, tokens)` batch: `(batch, 2 * len(TERMS))`."""
    measured = terms.measured()
    real = labels != -100
    columns = []
    for term in TERMS:
        column = terms.total.new_zeros(labels.shape)
        if term in measured:
            column[real] = measured[term]
        columns.append(column.sum(1))
    columns += [real.sum(1).to(columns[0].dtype) * (term in measured) for term in TERMS]
    return torch.stack(columns, dim=1)
