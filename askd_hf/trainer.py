"""`ASKDTrainer`: Seq2SeqTrainer with the blend of labels, teacher and self-teacher as its loss."""

import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import ProcessorMixin, WhisperForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput

from .adapter import lora_settings
from .callbacks import (
    DrawsCallback,
    StopEarlyCallback,
    StopGracefullyCallback,
    ThroughputCallback,
    data_epoch,
)
from .config import ASKDConfig
from .data import DrawnRows, ResumableLengthGroupedSampler, SpeechCollator, SpeechStream, StreamSampler
from .errors import UserError, memory_errors, saving_errors
from .facts import FACTS_FILE, Student, gather_facts
from .origin import Origin
from .restart import Beginning
from .resuming import ResumingTrainer
from .run_dir import how_to_go_on
from .schedule import BlendWeights
from .skipped import SkippedRows, skipped_rows_file
from .student import no_timestamps
from .teacher_cache import check_settings, has_soft_labels
from .teacher_memory import place_teacher
from .terms import NonFiniteLossError, check_finite, means, new_sums, sums, sums_by_clip

logger = logging.getLogger(__name__)


class ASKDTrainer(ResumingTrainer):
    """Distils `teacher` into `model` by the objective of `askd_hf.objective`.

    Args:
        model: the student, or an adapter on it (`askd_hf.adapter`), of which then nothing else is trained. Its encoder
            is frozen here if `args.freeze_encoder`; if that is None, unless it has some only of the teacher's layers.
        args: the run's options, the blend's among them.
        teacher: a Whisper model with the student's vocabulary (`askd_hf.vocabulary` sees to it); frozen and put in
            evaluation mode here, never saved, dropped as soon as its weight is 0 for good. None if its weight is 0
            from the start, or if `train_dataset` has the teacher's cached columns (`askd_hf.teacher_cache`).
        processing_class: the `WhisperProcessor` that is saved with the student.
        origin: where models and speech come from, for the model card. Default: what the models know of it.
        kwargs: the other arguments of `SavingTrainer` and `Seq2SeqTrainer`. Batches come from `data_collator`, see
            `SpeechCollator`.

    Logged besides Trainer's own values, over the label tokens since the last time: `ce_loss`, `teacher_loss`,
    `self_loss` (with their T^2), `hidden_loss` (of a trained encoder, see `askd_hf.hidden_states`), `blend_loss` (all
    of these, weighted), `teacher_ce`, `agreement` and the weights; and what `ThroughputCallback.measured` tells.
    An adaptive `args.teacher_schedule` keeps some of `train_dataset` out of training (`askd_hf.held_out`). Then also
    `disputed_labels`, the share of their label tokens that aren't the teacher's first choice, and `teacher_advantage`,
    the share of these, by clip and smoothed, on which the student doesn't uphold the label. Both are from 0 to 1.
    Evaluation gives `eval_ce_loss` (also as `eval_loss`), the other terms if `args.eval_blend`, and
    `compute_metrics` on generated tokens.
    """

    # compute_loss divides by the label tokens of the whole update itself
    loss_is_scaled_for_ga = True

    _beginning: Beginning | None = None

    def __init__(
        self,
        model: WhisperForConditionalGeneration | PeftModel,
        args: ASKDConfig,
        teacher: WhisperForConditionalGeneration | None = None,
        processing_class: ProcessorMixin | None = None,
        origin: Origin | None = None,
        **kwargs: Any,
    ):
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func would replace the objective: use Seq2SeqTrainer for your own loss")
        train_dataset = kwargs.get("train_dataset")
        cached = isinstance(train_dataset, Dataset) and has_soft_labels(train_dataset)
        if cached and args.uses_teacher:
            check_settings(train_dataset, args.temperature, model.config.vocab_size)
        if args.uses_teacher and teacher is None and (not cached or args.eval_blend):
            raise UserError(
                f"preset {args.preset!r} has a teacher phase"
                f"{' and --eval_blend evaluates it, ' if args.eval_blend else ' '}but there is no teacher: give it "
                "with --teacher, or choose a preset without one (ps-kd, ce)"
            )
        if args.n_gpu > 1:
            raise UserError("several GPUs need one process each: start with `accelerate launch` (or torchrun)")
        super().__init__(
            model=model,
            args=args,
            teacher=teacher,
            teacher_is_cached=cached,
            origin=origin,
            processing_class=processing_class,
            **kwargs,
        )
        if (
            cached
            and args.uses_teacher
            and isinstance(self.data_collator, SpeechCollator)
            and self.data_collator.is_random
        ):
            raise UserError("the teacher's cached labels are of the clips as they are: the collator may change none")
        # or the order of the clips would depend on what has been seeded or drawn since
        self.accelerator.dataloader_config.data_seed = self._data_seed
        self.model_accepts_loss_kwargs = True  # makes Trainer count the label tokens of every update

        self.stop = StopGracefullyCallback()
        self.throughput = ThroughputCallback()
        for callback in (self.stop, self.throughput):
            self.add_callback(callback)
        if args.early_stopping_patience is not None:
            self.add_callback(StopEarlyCallback(args.early_stopping_patience))
        self._draws = self._drawn_rows(self.train_dataset)
        on_bad_audio = train_dataset.on_bad_audio if isinstance(train_dataset, SpeechStream) else "error"
        self.skipped = SkippedRows(skipped_rows_file(args.output_dir, args.process_index), on_bad_audio)
        self._clips: list[str] = []
        self._train_sums = new_sums(args.device)
        self._eval_sums = new_sums(args.device)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any):
        needs_model = self.args.uses_teacher and not self._teacher_is_cached
        if needs_model and self.teacher is None and not resume_from_checkpoint:
            raise UserError("the teacher was freed when its phase ended: make a new trainer to train again")
        resume_from_checkpoint = self._begin_or_resume(resume_from_checkpoint)
        self._beginning = None
        try:
            with memory_errors(self.args.train_batch_size):
                return super().train(resume_from_checkpoint, **kwargs)
        finally:
            self._beginning = None
            self.stop.restore()

    def _inner_training_loop(self, *args: Any, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        """All of training; with `auto_find_batch_size` called again, with a smaller batch, when memory is out."""
        if self.args.auto_find_batch_size:
            if self._beginning is None:
                self._beginning = Beginning.of(self, self.teacher)
            else:
                self._begin_again(resume_from_checkpoint)
        return super()._inner_training_loop(*args, resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _data_epoch(self) -> int:
        return data_epoch(self.args, self.state, self.callback_handler.train_dataloader)

    def _begin_again(self, resume_from_checkpoint: str | None) -> None:
        self._began_again = True
        self._beginning.restore(self, resume_from_checkpoint)
        self.skipped.count = 0
        if resume_from_checkpoint is not None:
            self.blend.load(Path(resume_from_checkpoint))
            self.skipped.load(Path(resume_from_checkpoint), self.args.process_index)
        if self.teacher is None and self._beginning.teacher is not None:
            self.teacher = place_teacher(self._beginning.teacher, self.args.device)
        self._train_sums = new_sums(self.args.device)
        self.throughput.reset()

    def free_memory(self) -> None:
        """Give up what only training needs: the other models, the optimizer, the student on the device."""
        self.teacher = self.blend.self_teacher = self.optimizer = self.lr_scheduler = None
        self.accelerator.free_memory()
        self.model_wrapped = self.model = self.model.to("cpu")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # ---- the loss ----

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return super().get_batch_samples(*args, **kwargs)
        finally:
            self.throughput.note(start)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = dict(inputs)
        self._clips = inputs.pop("clip", self._clips)
        self.skipped.add(inputs.pop("skipped", []), self.state.global_step)
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
        if model.training and self.teacher is not None and not self.blend.needs_teacher(self.state.global_step):
            self._release_teacher()
        # what the backward pass will multiply the gradient by; only float16 has a scaler
        scaler = self.accelerator.scaler
        scale = 1.0 if scaler is None else scaler.get_scale() / (num_items_in_batch or 1)
        total, terms, outputs = self._run_models(
            model, inputs, self.blend.weights, keep_logits=return_outputs, gradient_scale=float(scale)
        )
        if model.training:
            check_finite(terms, inputs["labels"], self._clips, self.state.global_step)
            self._train_sums += sums(terms)
        # of a stream all rows of an update may have been skipped: then there is nothing to learn, and nothing is NaN
        if num_items_in_batch is None:
            loss = total / max(len(terms.total), 1)
        else:
            loss = total / torch.as_tensor(num_items_in_batch).clamp(min=1)
            if self.args.average_tokens_across_devices:
                # DDP averages the gradients of processes that each divided by the tokens of all
                loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # the last look before the update, so that no checkpoint ever holds NaN weights; fp16's scaler skips its own
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self.accelerator.scaler is None and grad_norm is not None and not math.isfinite(grad_norm):
            raise NonFiniteLossError(
                f"the gradient is not finite at step {self.state.global_step}, last clips: "
                f"{', '.join(self._clips[:8])}. Lower the learning rate. Checkpoints are from before"
            )
        return grad_norm

    # ---- batches ----

    def _drawn_rows(self, train_dataset: Any) -> DrawnRows | None:
        """The rows with what their collator draws from, if it does; those of a stream have it already."""
        if not self._draws_at_random() or isinstance(train_dataset, SpeechStream):
            return None
        if self.args.dataloader_persistent_workers:
            raise UserError(
                "dataloader_persistent_workers: the workers would draw the same in every epoch; leave it off with "
                "--augment, --timestamp_probability and --prompt_probability"
            )
        draws = DrawnRows(train_dataset, self._data_seed)
        self.add_callback(DrawsCallback(draws))
        return draws

    def _draws_at_random(self) -> bool:
        return isinstance(self.data_collator, SpeechCollator) and self.data_collator.is_random

    @property
    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def get_train_dataloader(self) -> DataLoader:
        if self._draws is None:
            return super().get_train_dataloader()
        return self._get_dataloader(
            dataset=self._draws,
            description="Training",
            batch_size=self._train_batch_size,
            sampler_fn=lambda _: self._get_train_sampler(self.train_dataset),
            is_training=True,
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        if isinstance(self.train_dataset, SpeechStream):
            a_step = self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
            return StreamSampler(self.train_dataset, self.args.max_steps * a_step)
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            return ResumableLengthGroupedSampler(sampler, self._data_seed, self._data_epoch)
        return sampler

    def _get_dataloader(self, *args: Any, is_training: bool = False, **kwargs: Any) -> DataLoader:
        drop_last = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drop_last and is_training  # evaluation is of all clips
        try:
            return super()._get_dataloader(*args, is_training=is_training, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop_last

    # ---- evaluation ----

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: Any,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The terms on the labels, and generated tokens, from one pass of the encoder."""
        if "labels" not in inputs:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, **gen_kwargs)
        inputs = self._prepare_inputs(inputs)
        labels = inputs["labels"]
        with torch.no_grad(), self.compute_loss_context_manager():
            weights = self.blend.weights if self.args.eval_blend else BlendWeights()
            _, terms, outputs = self._run_models(model, inputs, weights)
        # a row a clip, so that the clips that even out the processes' last batch can be dropped again
        by_clip = self.accelerator.gather_for_metrics(sums_by_clip(terms, labels))
        self._eval_sums += by_clip.sum(0)
        loss = terms.ce.mean()
        if prediction_loss_only or not self.args.predict_with_generate:
            return loss, None, None
        encoded = outputs.encoder_last_hidden_state.to(self.model.dtype)
        # the mask is of ones, as Whisper sees the padding's silence too; without it `generate` warns at every run
        frames = 2 * encoded.shape[1]
        generation_inputs = {
            "encoder_outputs": BaseModelOutput(last_hidden_state=encoded),
            "attention_mask": torch.ones(len(encoded), frames, dtype=torch.long, device=encoded.device),
            **self._prefixes(labels),
            **no_timestamps(self.model),
        }
        _, tokens, _ = super().prediction_step(model, generation_inputs, False, ignore_keys, **gen_kwargs)
        return loss, tokens, labels

    def _prefixes(self, labels: Tensor) -> dict[str, Tensor]:
        """What `generate` is to go on from, so that each clip is heard in its own language: `(clips, tokens)`.

        Nothing if the labels aren't those of `SpeechCollator`, with `<|notimestamps|>` in front of the text.
        """
        token = getattr(self.model.generation_config, "no_timestamps_token_id", None)
        before_text = [] if token is None else (labels[0] == token).nonzero().flatten()
        if not len(before_text):
            return {}
        start = labels.new_full((len(labels), 1), self.model.config.decoder_start_token_id)
        return {"decoder_input_ids": torch.cat([start, labels[:, : before_text[0] + 1]], dim=1)}

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        # Seq2SeqTrainer sets plain `gather`, which keeps the clips that pad the last batch under DDP
        self.gather_function = self.accelerator.gather_for_metrics
        self._eval_sums = new_sums(self.args.device)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        terms = means(self._eval_sums)
        if terms:
            # over tokens, not a mean of batch means; and not the blend, whose weights change from step to step
            output.metrics[f"{metric_key_prefix}_loss"] = terms["ce_loss"]
            if not self.args.eval_blend:
                terms = {"ce_loss": terms["ce_loss"]}
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in terms.items()})
        return output

    # ---- logging ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the terms and the weights to the log of training steps, on its way to log_history and all reporters."""
        if "loss" in logs and "learning_rate" in logs:
            terms = means(self.accelerator.reduce(self._train_sums, reduction="sum"))
            if not terms:
                raise UserError(
                    f"step {self.state.global_step}: of the clips since the last log not one could be used, or was "
                    f"wanted; see {self.skipped.file}"
                )
            logs |= terms
            logs |= self.throughput.measured(self.args, self.state)
            logs["teacher_weight"], logs["self_weight"] = self.blend.weights
            if isinstance(self.train_dataset, SpeechStream):
                logs["skipped_rows"] = sum(self._skipped_rows())
            if self.args.teacher_schedule == "adaptive":
                logs["teacher_advantage"] = 1.0 - self.blend.state.labels_upheld
                if self.blend.state.disputed is not None:
                    logs["disputed_labels"] = self.blend.state.disputed
            self._train_sums = new_sums(self.args.device)
        super().log(logs, start_time)

    # ---- saving ----

    def _skipped_rows(self) -> list[int]:
        """How many rows each process has skipped so far."""
        return self.accelerator.gather(torch.tensor([self.skipped.count], device=self.args.device)).tolist()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        skipped = self._skipped_rows()
        run = Path(self._get_output_dir(trial))
        directory = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with saving_errors(directory, lambda: how_to_go_on(run)):
            # before Trainer writes trainer_state.json, which completes a checkpoint
            if self.args.should_save:
                directory.mkdir(parents=True, exist_ok=True)
                self.blend.save(directory)
                self.skipped.save(directory, skipped)
            super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.blend.load(Path(resume_from_checkpoint))
        self.skipped.load(Path(resume_from_checkpoint), self.args.process_index)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._check_encoder()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        directory = Path(output_dir or self.args.output_dir)
        if not self.args.should_save or not self.is_student(directory):
            return
        if self.state.global_step > 0 or not (directory / FACTS_FILE).is_file():  # or they tell of an earlier run
            run = self.origin, self.args, self.state, self.blend, self.train_dataset, self.is_in_train
            kept = self.adapter is not None and self.keeps_adapter
            student = Student.of_adapter(directory, self.adapter) if kept else Student.of(directory)
            facts = gather_facts(student, *run)
            if self.adapter is not None:
                facts.arguments |= lora_settings(self.adapter)
            facts.save(directory)
