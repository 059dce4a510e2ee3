"""Run the student, the teacher and the self-teacher on a batch: only models whose loss weight is nonzero."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, WhisperForConditionalGeneration
from transformers.modeling_outputs import Seq2SeqLMOutput
from transformers.models.whisper.modeling_whisper import shift_tokens_right

from ..callbacks import AdaptiveBlendCallback
from ..config import ASKDConfig
from ..data import TEACHER_COLUMNS, SpeechCollator, run_encoder
from ..data.audio_context import context_of
from ..data.encoder_cache import matches
from ..errors import UserError
from ..models.layers import LayerPairs, copied_encoder_layers, is_pruned_encoder, matched_layers
from ..models.lora import has_lora_dropout
from ..models.spec_augment import enable_spec_augment
from ..models.student import check_pair, encoder_is_deterministic, same_encoder
from ..models.teacher_memory import place_teacher
from ..objective import DIVERGENCES, LossTerms, TopK, hidden_state_loss
from ..projection import (
    LMHeadInputs,
    at_positions,
    capture_lm_head_inputs,
    chunked_distillation_loss,
    label_positions,
)
from ..schedule import BlendWeights
from .run_dir import prepare_encoder, prepare_hidden_loss
from .run_settings import models_digest

logger = logging.getLogger(__name__)

FREED = "the teacher was freed at the end of its phase: create a new trainer to train again"
# columns of a batch that aren't inputs of the models
NOT_FOR_MODELS = ("labels", "label_positions", "no_speech", "teacher_input_features", *TEACHER_COLUMNS)


class ModelRunner:
    """The models of a run and the objective of `askd_hf.objective` on a batch.

    Args:
        student: its encoder is frozen here if `args.freeze_encoder`.
        teacher: frozen and put in evaluation mode here. Dropped if neither training nor evaluation runs it.
        teacher_is_cached: True if the batches contain the teacher's soft labels.
        collator: defines whether the teacher has separate features and whether encoder outputs are cached.

    Attributes:
        teacher: None if it isn't run or was freed.
        teacher_digest: `models_digest` of the teacher, None if it isn't run.
        layer_pairs: the encoder layers that the hidden-state loss compares. None without that loss.

    Raises `UserError` if models, options and cached outputs don't fit together.
    """

    def __init__(
        self,
        student: WhisperForConditionalGeneration,
        args: ASKDConfig,
        teacher: WhisperForConditionalGeneration | None,
        teacher_is_cached: bool,
        collator: Any,
        accelerator: Accelerator,
    ):
        self.student, self.args, self.collator, self.accelerator = student, args, collator, accelerator
        self.teacher_is_cached = teacher_is_cached
        enable_spec_augment(student.config, args.spec_augment)
        self._encoder_has_lora_dropout = has_lora_dropout(student.model.encoder)
        pruned = is_pruned_encoder(student.config)
        prepare_encoder(args, pruned)
        self._freeze_encoder()
        check_precision(student)
        self.teacher = None
        if args.uses_teacher and (args.eval_teacher_losses or not teacher_is_cached):
            check_pair(teacher, student, own_features=self._teacher_has_own_features())
            self.teacher = teacher.eval().requires_grad_(False)
        self.teacher_digest = None if self.teacher is None else models_digest(self.teacher)
        in_training = None if self.teacher is None or teacher_is_cached else teacher.config
        prepare_hidden_loss(args, student.config, in_training, pruned)
        self.layer_pairs: LayerPairs | None = None
        if args.hidden_weight:
            layers = student.config.encoder_layers, teacher.config.encoder_layers
            self.layer_pairs = matched_layers(*layers, copied_encoder_layers(student.config))
        self.check_encoder()
        self._compiled_encoder = self._compile_encoder()
        if self.teacher is not None:
            shares = self.teacher_has_student_encoder and not self._keeps_teacher_clean()
            encoder_runs = not (shares and self.encoder_is_fixed())
            place_teacher(self.teacher, args.device, encoder_runs)
            if args.compile_options is not None:
                self.teacher.compile(**args.compile_options)

    def _freeze_encoder(self) -> None:
        encoder = self.student.model.encoder
        encoder.embed_positions.requires_grad_(False)  # sinusoids, which `from_pretrained` leaves trainable
        if self.args.freeze_encoder:
            encoder.requires_grad_(False)
        elif not any(parameter.requires_grad for parameter in encoder.parameters()):
            raise UserError(
                "--freeze_encoder False requires an adapter with trainable weights in the encoder: create it by "
                "with_lora(..., freeze_encoder=False)"
            )

    def _compile_encoder(self) -> Callable[..., Any] | None:
        """Return the compiled encoder of the student for `encode`: what Trainer compiles isn't called there.

        None without `torch_compile`, and with random audio contexts: each length would be compiled anew.
        """
        if self.args.compile_options is None or self._context_varies():
            return None
        return torch.compile(self.student.model.encoder, **self.args.compile_options)

    def check_encoder(self) -> None:
        """Compare the current weights of the student's encoder with the teacher's and with the cache's.

        Raises `UserError` if the encoder cache is stale.
        """
        # with a random audio context the teacher still takes its whole window
        shares = self.teacher is not None and self.args.freeze_encoder and not self._context_varies()
        self.teacher_has_student_encoder = shares and same_encoder(self.teacher, self.student)
        cache = self.collator.encoder_cache if isinstance(self.collator, SpeechCollator) else None
        if cache is not None:
            self._check_cache_is_valid()
            if not matches(cache, self.student, self.collator.processor):
                raise UserError(
                    f"encoder cache {cache.folder}: it was made with another encoder or other features than the "
                    "student's; compute it again"
                )

    def _teacher_has_own_features(self) -> bool:
        return isinstance(self.collator, SpeechCollator) and self.collator.teacher_extractor is not None

    def _context_varies(self) -> bool:
        return isinstance(self.collator, SpeechCollator) and self.collator.shortest_context is not None

    def _keeps_teacher_clean(self) -> bool:
        return isinstance(self.collator, SpeechCollator) and self.collator.keeps_teacher_clean

    def encoder_is_fixed(self) -> bool:
        """Return whether the output of the student's encoder for the same features is the same at every step."""
        fixed = bool(self.args.freeze_encoder) and encoder_is_deterministic(self.student.config)
        return fixed and not self._encoder_has_lora_dropout

    def _check_cache_is_valid(self) -> None:
        if not self.encoder_is_fixed():
            raise UserError(
                "cached encoder outputs require a frozen encoder without SpecAugment, layerdrop and dropout"
            )

    def release_teacher(self, step: int) -> None:
        """Free the teacher's memory, unless the caller has kept a reference."""
        if self.args.auto_find_batch_size:  # needed again after a restart with a smaller batch
            place_teacher(self.teacher, torch.device("cpu"))
        self.teacher = None
        clear_device_cache()
        logger.warning("step %d: freed the teacher, as its weight is 0 from now on", step)

    def restore_teacher(self, teacher: WhisperForConditionalGeneration | None) -> None:
        """Put back a teacher that was freed, before training restarts."""
        if self.teacher is None and teacher is not None:
            self.teacher = place_teacher(teacher, self.args.device)

    # ---- one batch ----

    def run(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        weights: BlendWeights,
        blend: AdaptiveBlendCallback,
        keep_logits: bool = False,
        gradient_scale: Tensor | float = 1.0,
    ) -> tuple[Tensor, LossTerms, Seq2SeqLMOutput]:
        """Run the models on one batch and compute the objective.

        Args:
            model: the student, as the trainer has wrapped it.
            blend: owns the self-teacher.
            keep_logits: True for outputs with the student's logits, `(batch, tokens, vocabulary)`.
            gradient_scale: the factor of the gradient in the backward pass.

        Returns:
            The objective summed over the label tokens, its terms at each label token, and the student's outputs.
        """
        student = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        labels, positions = inputs["labels"], self.positions_of(inputs)
        has_speech = ~inputs["no_speech"][:, None].expand_as(labels) if "no_speech" in inputs else None
        batch = self.model_inputs(inputs)
        pairs = self.layer_pairs if weights.teacher > 0.0 else None
        # the student runs last, as its SpecAugment overwrites the input features
        targets, teacher_states = {}, None
        with context_of(student, batch):
            with torch.no_grad(), self.accelerator.autocast():
                self.encode(model, batch, with_states=pairs is not None)
                if weights.teacher > 0.0:
                    targets["teacher"], teacher_states = self.teacher_target(inputs, batch, positions, pairs)
                if weights.self > 0.0:
                    targets["self_teacher"] = self._self_teacher_target(student, batch, positions, blend.self_teacher)
            if "encoder_outputs" in batch:
                batch.pop("input_features", None)
            if pairs is not None:
                batch["output_hidden_states"] = pairs.student
            with capture_lm_head_inputs(student, positions, keep_logits) as captured:
                outputs = model(**batch)
        with self.accelerator.autocast():
            total, terms = chunked_distillation_loss(
                captured[0],
                at_positions(labels, positions),
                **targets,
                teacher_weight=weights.teacher,
                self_weight=weights.self,
                temperature=self.args.temperature,
                divergence=DIVERGENCES[self.args.divergence],
                mix=self.args.divergence_beta,
                weight_teacher_by_label_prob=self.args.weight_teacher_by_label_prob,
                teacher_mask=None if has_speech is None else at_positions(has_speech, positions),
                gradient_scale=gradient_scale,
            )
            if pairs is not None:
                states = [outputs.encoder_hidden_states[i] for i in pairs.student]
                # the teacher's window may be longer
                teacher_states = [state[:, : states[0].shape[1]] for state in teacher_states]
                of_clip = positions // labels.shape[1]
                terms.hidden = hidden_state_loss(states, teacher_states).index_select(0, of_clip)
                total = total + self._weigh_hidden(terms, weights)
        return total, terms, outputs

    @staticmethod
    def positions_of(inputs: dict[str, Tensor]) -> Tensor:
        """Return the `label_positions` of a batch, which `SpeechCollator` has computed."""
        positions = inputs.get("label_positions")
        return label_positions(inputs["labels"]) if positions is None else positions

    def model_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Any]:
        """Return the arguments of the model: the batch without labels, with the decoder's inputs."""
        batch = {name: value for name, value in inputs.items() if name not in NOT_FOR_MODELS}
        if "decoder_input_ids" not in batch:  # another collator than `SpeechCollator`, so without prompts
            config = self.student.config
            batch["decoder_input_ids"] = shift_tokens_right(
                inputs["labels"], config.pad_token_id, config.decoder_start_token_id
            )
        # without a cache, even an empty one, Transformers looks for packed sequences, which waits for the GPU
        return batch | {"use_cache": False, "past_key_values": EncoderDecoderCache(DynamicCache(), DynamicCache())}

    def _weigh_hidden(self, terms: LossTerms, weights: BlendWeights) -> Tensor:
        """Return the weighted hidden-state loss, summed over label tokens. Add it to the terms, without gradient."""
        weighted = weights.teacher * self.args.hidden_weight * terms.hidden
        terms.total = terms.total + weighted.detach()
        terms.hidden = terms.hidden.detach()
        return weighted.sum()

    def encode(self, model: nn.Module, batch: dict[str, Any], with_states: bool) -> None:
        """Add the student's `encoder_outputs` to the batch, for all models, unless its encoder is trained.

        In evaluation this includes a trained encoder, unless its hidden states are needed (`with_states`): those come
        from the forward pass.
        """
        student = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        if "encoder_outputs" in batch:
            self._check_cache_is_valid()
            batch["encoder_outputs"] = (batch["encoder_outputs"].to(student.dtype),)
            return
        batch["input_features"] = batch["input_features"].to(student.dtype)  # bf16_full_eval casts the model
        if self.encoder_is_fixed() or not (model.training or with_states):
            encoded = run_encoder(student.model.encoder, batch["input_features"], self._compiled_encoder)
            batch["encoder_outputs"] = (encoded,)

    def teacher_target(
        self, inputs: dict[str, Tensor], batch: dict[str, Any], positions: Tensor, pairs: LayerPairs | None = None
    ) -> tuple[LMHeadInputs | TopK, list[Tensor] | None]:
        """Return the teacher's soft target at the label tokens, cached or computed.

        With `pairs` also the hidden states of its encoder, one `(batch, positions, d_model)` per layer.
        """
        if set(TEACHER_COLUMNS) <= inputs.keys():
            return TopK(*(at_positions(inputs[name], positions) for name in TEACHER_COLUMNS)), None
        if self.teacher is None:  # after training, and a checkpoint of the teacher phase is resumed
            raise UserError(FREED)
        batch = dict(batch)
        batch.pop("attention_mask", None)  # for SpecAugment only
        # batches of augmented clips have the features of the clean ones for the teacher
        takes_clean = self._keeps_teacher_clean() and "teacher_input_features" in inputs
        if "encoder_outputs" in batch and self.teacher_has_student_encoder and not takes_clean:
            batch.pop("input_features", None)
            batch["encoder_outputs"] = (batch["encoder_outputs"][0].to(self.teacher.dtype),)
        else:
            features = inputs.get("teacher_input_features", inputs.get("input_features"))
            if features is None:
                raise UserError(
                    "the batches contain only cached outputs of the student's encoder, and the teacher's encoder "
                    "differs: create them with SpeechCollator(..., teacher_extractor=...)"
                )
            batch.pop("encoder_outputs", None)
            batch["input_features"] = features.to(self.teacher.dtype)
        if pairs is not None:
            batch["output_hidden_states"] = pairs.teacher
        with capture_lm_head_inputs(self.teacher, positions) as captured:
            outputs = self.teacher(**batch)
        states = None if pairs is None else [outputs.encoder_hidden_states[i] for i in pairs.teacher]
        return captured[0], states

    def _self_teacher_target(
        self, student: nn.Module, batch: dict[str, Any], positions: Tensor, self_teacher: Callable[..., Any]
    ) -> LMHeadInputs:
        """Return the self-teacher's soft target at the label tokens. It includes the encoder if that is trained."""
        if not self.args.freeze_encoder:
            batch = {name: value for name, value in batch.items() if name != "encoder_outputs"}
        with capture_lm_head_inputs(student, positions) as captured:
            self_teacher(student, batch)
        return captured[0]


def check_precision(student: nn.Module) -> None:
    """Raise `UserError` if trained weights are in half precision, where small updates are rounded away."""
    for name, parameter in student.named_parameters():
        if parameter.requires_grad and torch.finfo(parameter.dtype).bits < 32:
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise UserError(
                f"the student's weights are {dtype} ({name}), which would round away most updates. Load them in "
                "float32: student.float() or from_pretrained(..., dtype=torch.float32). For mixed precision: "
                "bf16=True or fp16=True. evaluate() before train() with --bf16_full_eval or --fp16_full_eval rounds "
                "them too: create a new trainer"
            )
