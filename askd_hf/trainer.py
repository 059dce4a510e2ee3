"""`ASKDTrainer`: a `Seq2SeqTrainer` whose loss combines labels, teacher and self-teacher."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device, set_seed
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import ProcessorMixin, WhisperForConditionalGeneration
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput

from .arguments.effects import check_average
from .arguments.renamed import renamed_keywords
from .callbacks import AdaptiveBlendCallback, data_epoch
from .config import LOGGING_STEPS, ASKDConfig
from .data import (
    PaddedDataset,
    ResumableLengthGroupedSampler,
    SeededDataset,
    SpeechStream,
    StreamSampler,
    pad_last_batches,
)
from .data.soft_labels import has_soft_labels
from .errors import EVALUATION_MEMORY, LABELS_MEMORY, UserError, memory_errors, training_memory_message
from .hub.provenance import Provenance
from .hub.publisher import HubPublisher
from .schedule import BlendWeights
from .training import checks, loss_sums, run_callbacks
from .training.checkpoint_saving import StudentSaver
from .training.generation import generation_inputs
from .training.held_out import HeldOutClips, hold_out
from .training.log_lines import use_log_lines
from .training.model_runner import FREED, ModelRunner, check_precision
from .training.resuming import RunIdentity, make_due_evaluation
from .training.run_dir import prepare_evaluation, prepare_stream
from .training.saving_trainer import SavingTrainer
from .training.skipped_rows import SkippedRows
from .training.smaller_batch import InitialState, save_or_restore, set_random_states


class ASKDTrainer(SavingTrainer):
    """Distill `teacher_model` into `model` with the objective of `askd_hf.objective`.

    Args:
        model: the student, or a PEFT adapter on it (`askd_hf.models.lora`); then only the adapter is trained. The
            encoder is frozen if `args.freeze_encoder` is True, or if it is None and no encoder layer was pruned.
        teacher_model: a Whisper model with the student's vocabulary (see `askd_hf.models.vocabulary`). The trainer
            freezes it, puts it in evaluation mode, never saves it, and frees it once its weight stays 0. Not needed if
            its weight is always 0, or if `train_dataset` has its cached soft labels (`askd_hf.data.teacher_cache`).
        processing_class: the `WhisperProcessor` that is saved with the student.
        origin: the sources of models and data, for the model card. Default: the names that the models were loaded by.
        peft_config: such as a `LoraConfig`: puts an adapter on `model`.
        keep_adapter: True to save the adapter alone at the end, without merging it into the student.
        kwargs: the other arguments of `Seq2SeqTrainer`. `data_collator` is a `SpeechCollator`.

    Training logs the keys of `training.loss_sums.LOG_NAMES` (means over label tokens), of
    `AdaptiveBlendCallback.logs` and of `ThroughputCallback.measured`. Evaluation logs the cross-entropy
    as `eval_loss`, with `args.eval_teacher_losses` the other terms, and `compute_metrics` of the generated tokens.

    Raises `UserError` if options, models and data don't fit together.
    """

    # compute_loss itself divides by the number of label tokens of the whole update
    loss_is_scaled_for_ga = True
    model: WhisperForConditionalGeneration
    data_collator: Any

    @renamed_keywords(teacher="teacher_model")
    def __init__(
        self,
        model: WhisperForConditionalGeneration | PeftModel,
        args: ASKDConfig,
        teacher_model: WhisperForConditionalGeneration | None = None,
        processing_class: ProcessorMixin | None = None,
        origin: Provenance | None = None,
        peft_config: PeftConfig | None = None,
        keep_adapter: bool = False,
        **kwargs: Any,
    ):
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func would replace the objective: use Seq2SeqTrainer for a custom loss")
        args = copy.copy(args)  # which gets the defaults that depend on models and data
        train_dataset = kwargs.get("train_dataset")
        if isinstance(train_dataset, SpeechStream):
            prepare_stream(args)
        if kwargs.get("eval_dataset") is None and args.evaluates_by_default:
            prepare_evaluation(args, [])
        checks.check_processes(args)
        checks.check_data(args, train_dataset, kwargs.get("eval_dataset"), kwargs.get("data_collator"))
        is_cached = isinstance(train_dataset, Dataset) and has_soft_labels(train_dataset)
        checks.check_teacher(args, teacher_model, train_dataset if is_cached else None, model.config.vocab_size)

        # ---- components ----
        self.saver = StudentSaver(model, args, peft_config, keep_adapter)
        self.publisher = HubPublisher(args)
        self.identity = RunIdentity(args)
        held_out: Sequence[Any] = []
        if args.teacher_schedule == "adaptive" and args.uses_teacher:
            kwargs["train_dataset"], held_out = hold_out(train_dataset)
        super().__init__(model=self.saver.student, args=args, processing_class=processing_class, **kwargs)
        self.origin = Provenance.of_models(teacher_model, self.model) if origin is None else origin
        self.runner = ModelRunner(self.model, args, teacher_model, is_cached, self.data_collator, self.accelerator)
        self._held_out = HeldOutClips(held_out)
        checks.check_batches(args, self.data_collator, is_cached)
        if train_dataset is not None:
            checks.check_language(self.model, self.data_collator, train_dataset)
        if self.eval_dataset is not None:
            splits = list(self.eval_dataset) if isinstance(self.eval_dataset, dict) else []
            checks.check_best_metric(args, splits, () if self.compute_metrics is None else None)
        # without it the order of the clips would depend on random numbers drawn before training
        self.accelerator.dataloader_config.data_seed = self.args.order_seed
        self.model_accepts_loss_kwargs = True  # makes Trainer count the label tokens of every update

        # ---- callbacks ----
        self.log_lines = use_log_lines(self)
        self.blend = AdaptiveBlendCallback(args, self._judge_labels, len(held_out))
        self.stop = run_callbacks.StopGracefullyCallback()
        self.throughput = run_callbacks.ThroughputCallback()
        for callback in (self.blend, self.stop, self.throughput, run_callbacks.LogLastStepCallback()):
            self.add_callback(callback)
        if args.early_stopping_patience is not None:
            self.add_callback(run_callbacks.StopEarlyCallback())
        self._seeded_dataset: SeededDataset | None = None
        # the rows of a stream already carry the collator's random seed
        if checks.is_random(self.data_collator) and not isinstance(train_dataset, SpeechStream):
            self._seeded_dataset = SeededDataset(self.train_dataset, self.args.order_seed)
            self.add_callback(run_callbacks.SetEpochCallback(self._seeded_dataset))

        self.skipped = SkippedRows.of_run(args, train_dataset)
        self._clips, self._update = list[str](), list[loss_sums.ClipLosses]()
        self.train_sums, self.eval_sums = (loss_sums.new_sums(args.device) for _ in range(2))

    @property
    def teacher(self) -> WhisperForConditionalGeneration | None:
        """The teacher, or None if it isn't used or was freed."""
        return self.runner.teacher

    def _data_epoch(self) -> int:
        return data_epoch(self.args, self.state, self.callback_handler.train_dataloader)

    def _judge_labels(self) -> Any:
        with memory_errors(LABELS_MEMORY):
            return self._held_out.judge_labels(self.runner, self.model_wrapped, self.data_collator)

    # ---- the run ----

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        needs_model = self.args.uses_teacher and not self.runner.teacher_is_cached
        if needs_model and self.teacher is None and not resume_from_checkpoint:
            raise UserError(FREED)
        check_precision(self.model)  # evaluate() may have cast it
        resume_from_checkpoint = self.identity.begin(self, resume_from_checkpoint)
        self._initial_state: InitialState | None = None
        try:
            batch, searched = self.args.train_batch_size, self.args.auto_find_batch_size
            with memory_errors(training_memory_message(batch, self.args.world_size, searched)):
                return super().train(resume_from_checkpoint, **kwargs)
        finally:
            self._initial_state = None
            self.stop.restore()

    def _inner_training_loop(self, *args: Any, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        self._random_states: tuple[Any, ...] | None = None  # after an evaluation that was still due
        self._resumed_from = resume_from_checkpoint
        self._update = []  # an attempt with a larger batch may have ended in the middle of an update
        if self.args.auto_find_batch_size:
            self._initial_state = save_or_restore(self, self._initial_state, resume_from_checkpoint)
        return super()._inner_training_loop(*args, resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        if self.args.logs_by_default:
            self.args.logging_steps = min(LOGGING_STEPS, max(max_steps // 10, 1))
        check_average(self.args, max_steps)
        started = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        # those of the checkpoint were loaded
        self.state.train_batch_size = self._train_batch_size
        self.state.compute_steps(self.args, max_steps)
        saved = None if resume_from_checkpoint is None else self.blend.state.options
        self.blend.options = self.identity.settings(self._train_batch_size, max_steps, saved, resume_from_checkpoint)
        if self.args.world_size > 1:
            # Each process draws its own dropout and SpecAugment. The seed is the same until here, so that all create
            # the same models. The random states of a checkpoint are loaded after this
            set_seed(self.args.seed, device_specific=True)
        return started

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Trainer would train a step more if a finished run whose last epoch isn't whole is resumed
        self.control.should_training_stop |= self.state.global_step >= self.state.max_steps
        if self.stop.is_due(self.blend.state, self.args):
            trial, ignored = kwargs["trial"], kwargs["ignore_keys_for_eval"]
            self._random_states = make_due_evaluation(self, self._resumed_from, trial, ignored)
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self._random_states is None:
            super()._load_rng_state(checkpoint)
        else:
            set_random_states(self._random_states)
            self._random_states = None

    def free_memory(self) -> None:
        """Free the teacher, the self-teacher and the optimizer, and move the student to the CPU."""
        self.runner.teacher = self.blend.self_teacher = self.optimizer = self.lr_scheduler = None
        self.model_wrapped = self.model = self.model.to("cpu")
        self.accelerator.free_memory()

    # ---- the loss ----

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        with self.throughput.waiting():
            return super().get_batch_samples(*args, **kwargs)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = dict(inputs)
        self._clips = inputs.pop("clip", self._clips)
        self.skipped.add(inputs.pop("skipped", []), self.state.global_step)
        inputs = send_to_device(inputs, self.args.device)  # also `WaveformFeatures`, which super() would leave
        return super()._prepare_inputs(inputs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Return the objective summed over the batch's label tokens, divided by `num_items_in_batch`.

        Args:
            num_items_in_batch: the number of label tokens of the whole update. None for that of the batch.

        Returns:
            The loss, with `return_outputs` also the outputs, with logits `(batch, tokens, vocabulary)`.
        """
        if model.training and self.teacher is not None and not self.blend.needs_teacher(self.state.global_step):
            self.runner.release_teacher(self.state.global_step)
        scale = loss_sums.gradient_scale(self.accelerator, num_items_in_batch)
        total, terms, outputs = self.runner.run(
            model, inputs, self.blend.weights, self.blend, keep_logits=return_outputs, gradient_scale=scale
        )
        if model.training:
            by_clip = loss_sums.sums_by_clip(terms, inputs["labels"], self.runner.positions_of(inputs))
            self._update.append(loss_sums.ClipLosses(by_clip[:, 0], self._clips))
            self.train_sums += by_clip.sum(0)
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        loss = loss_sums.mean_over_tokens(total, len(terms.total), num_items_in_batch, processes)
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # Check before the optimizer step, so that no checkpoint contains NaNs. The scaler of fp16 skips such gradients
        checked = grad_norm if self.accelerator.scaler is None else None
        loss_sums.check_finite(self._update, checked, self.state.global_step)
        self._update = []
        return grad_norm

    # ---- batches ----

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        if isinstance(self.train_dataset, SpeechStream):
            rows_per_step = self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
            return StreamSampler(self.train_dataset, self.args.max_steps * rows_per_step, self._train_batch_size)
        sampler = super()._get_train_sampler(self.train_dataset)  # not the `SeededDataset`, which has no columns
        if isinstance(sampler, LengthGroupedSampler):
            return ResumableLengthGroupedSampler(sampler, self.args.order_seed, self._data_epoch)
        return sampler

    def _get_dataloader(self, dataset: Any, *args: Any, is_training: bool = False, **kwargs: Any) -> DataLoader:
        # that of `evaluate` or `predict` may be another one
        checks.check_has_rows("train_dataset" if is_training else "eval_dataset", dataset, self.data_collator)
        if is_training and self._seeded_dataset is not None:
            dataset = self._seeded_dataset
        drop_last, collator = self.args.dataloader_drop_last, self.data_collator
        if is_training and drop_last and not isinstance(self.train_dataset, SpeechStream):
            checks.check_whole_batch(len(dataset), self._train_batch_size * self.args.world_size)
        pads = is_training and checks.fills_last_batches(self.args, self.train_dataset, collator)
        if pads:
            dataset = PaddedDataset(dataset)
        self.args.dataloader_drop_last = drop_last and is_training  # evaluation uses all clips
        if not is_training:
            self.data_collator = self.collator_of_evaluation()
        try:
            loader = super()._get_dataloader(dataset, *args, is_training=is_training, **kwargs)
        finally:
            self.args.dataloader_drop_last, self.data_collator = drop_last, collator
        if pads:
            pad_last_batches(loader)
        run_callbacks.keep_workers(loader)
        return loader

    # ---- evaluation ----

    def collator_of_evaluation(self) -> Any:
        """Return the collator without the features of the teacher, if the teacher doesn't run in evaluations."""
        collator = self.data_collator
        if self.args.eval_teacher_losses or getattr(collator, "teacher_extractor", None) is None:
            return collator
        collator = copy.copy(collator)
        collator.teacher_extractor = None
        return collator

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: Any,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Compute the terms on the labels and generate, with one pass of the encoder."""
        self.stop.check_evaluation(self.args)
        if "labels" not in inputs:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, **gen_kwargs)
        inputs = self._prepare_inputs(inputs)
        labels = inputs["labels"]
        with torch.no_grad(), self.compute_loss_context_manager():
            weights = self.blend.weights if self.args.eval_teacher_losses else BlendWeights()
            _, terms, outputs = self.runner.run(model, inputs, weights, self.blend)
        # one row per clip, so that gathering can drop the clips that pad the last batch under DDP
        by_clip = loss_sums.sums_by_clip(terms, labels, self.runner.positions_of(inputs))
        by_clip = self.accelerator.gather_for_metrics(by_clip)
        self.eval_sums += by_clip.sum(0)
        loss = terms.ce.mean()
        if prediction_loss_only or not self.args.predict_with_generate:
            return loss, None, None
        generation = generation_inputs(self.model, outputs.encoder_last_hidden_state, labels)
        _, tokens, _ = super().prediction_step(model, generation, False, ignore_keys, **gen_kwargs)
        return loss, tokens, labels

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        # of all splits, each of which is a call of its own
        with memory_errors(EVALUATION_MEMORY), self.log_lines.one_evaluation(self.state):
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> PredictionOutput:
        with memory_errors(EVALUATION_MEMORY):
            return super().predict(*args, **kwargs)

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics: dict[str, float] = {}
        with self.stop.evaluating(self.state, self.control):
            metrics = super()._evaluate(*args, **kwargs)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # True saves a checkpoint with any --save_strategy
        return self.stop.evaluation_due or super()._determine_best_metric(metrics, trial)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        # Seq2SeqTrainer sets plain `gather`, which keeps the clips that pad the last batch under DDP
        self.gather_function = self.accelerator.gather_for_metrics
        self.eval_sums = loss_sums.new_sums(self.args.device)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics.update(loss_sums.eval_metrics(self.eval_sums, metric_key_prefix, self.args.eval_teacher_losses))
        return output

    # ---- logging ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the terms, the weights and the speed to the logs of training steps. Steps without labels have none."""
        if "loss" in logs and "learning_rate" in logs:
            terms = loss_sums.train_metrics(self.accelerator.reduce(self.train_sums, reduction="sum"))
            if not terms:
                self.skipped.check_empty(self.state, self._initial_global_step)
                return
            logs |= terms | self.throughput.measured(self.args, self.state) | self.blend.logs()
            if isinstance(self.train_dataset, SpeechStream):
                logs["skipped_rows"] = sum(self.skipped.counts(self.accelerator))
            self.train_sums = loss_sums.new_sums(self.args.device)
        super().log(logs, start_time)
