"""`BlendingTrainer`: student, teacher and self-teacher on one batch, each run no more than the weights ask for."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import WhisperForConditionalGeneration
from transformers.modeling_outputs import Seq2SeqLMOutput
from transformers.models.whisper.modeling_whisper import shift_tokens_right

from .callbacks import AdaptiveBlendCallback
from .config import ASKDConfig
from .data import TEACHER_COLUMNS, SpeechCollator, encode
from .errors import UserError
from .held_out import HeldOutClips, first_choices, hold_out, judge
from .hidden_states import LayerPairs, hidden_state_loss, matched_layers
from .objective import DIVERGENCES, BlendTerms, TopK
from .origin import Origin
from .projection import Unprojected, chunked_blend, unprojected
from .run_dir import prepare_encoder, prepare_hidden_loss
from .run_settings import models_digest
from .saving import SavingTrainer
from .schedule import BlendWeights, LabelsJudged
from .student import check_pair, encoder_is_deterministic, same_encoder
from .teacher_memory import place_teacher

logger = logging.getLogger(__name__)


class BlendingTrainer(SavingTrainer):
    """Owns the models besides the student, and works out the objective of `askd_hf.objective` on a batch.

    Args:
        model: the student, or an adapter on it. Its encoder is frozen here if `args.freeze_encoder`.
        teacher: frozen and put in evaluation mode here; not kept if no step, and no evaluation, runs it.
        teacher_is_cached: whether its soft labels are in the batches.
        origin: where the models come from; None: as far as they tell.
        kwargs: the other arguments of `Seq2SeqTrainer`.
    """

    origin: Origin
    teacher: WhisperForConditionalGeneration | None
    teacher_digest: str | None
    blend: AdaptiveBlendCallback
    _teacher_is_cached: bool
    _teacher_has_our_encoder: bool

    def __init__(
        self,
        model: WhisperForConditionalGeneration | PeftModel,
        args: ASKDConfig,
        teacher: WhisperForConditionalGeneration | None,
        teacher_is_cached: bool,
        origin: Origin | None,
        **kwargs: Any,
    ):
        held_out: Sequence[Any] = []
        if args.teacher_schedule == "adaptive" and args.uses_teacher:
            kwargs["train_dataset"], held_out = hold_out(kwargs.get("train_dataset"))
        super().__init__(model=model, args=args, **kwargs)
        self.origin = Origin.of_models(teacher, self.model) if origin is None else origin
        prepare_encoder(args, self.origin.compressed_encoder)
        if args.freeze_encoder:
            # `from_pretrained` leaves the position embeddings trainable, so all parameters are named here
            self.model.model.encoder.requires_grad_(False)
        elif not any(parameter.requires_grad for parameter in self.model.model.encoder.parameters()):
            raise UserError(
                "freeze_encoder is off, but the adapter has nothing in the encoder to train: make it by "
                "with_lora(..., freeze_encoder=False)"
            )
        self._check_precision()
        self.teacher = None
        self._teacher_is_cached = teacher_is_cached
        if args.uses_teacher and (args.eval_blend or not teacher_is_cached):
            check_pair(teacher, self.model, own_features=self._teacher_has_own_features())
            self.teacher = teacher.eval().requires_grad_(False)
        self.teacher_digest = None if self.teacher is None else models_digest(self.teacher)
        in_training = None if self.teacher is None or teacher_is_cached else teacher.config
        prepare_hidden_loss(args, self.model.config, in_training, self.origin.compressed_encoder)
        self._pairs = None
        if args.hidden_weight:
            layers = self.model.config.encoder_layers, teacher.config.encoder_layers
            self._pairs = matched_layers(*layers, self.origin.copied_encoder_layers)
        self._check_encoder()
        if self.teacher is not None:
            encoder_runs = not (self._teacher_has_our_encoder and self._encoder_is_fixed())
            place_teacher(self.teacher, args.device, encoder_runs)
        self._held_out = HeldOutClips(held_out)
        self.blend = AdaptiveBlendCallback(args, self._judge_labels, len(held_out))
        self.add_callback(self.blend)

    def _check_precision(self) -> None:
        """Raise `UserError` if small updates would be lost in the rounding of the trained weights."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and torch.finfo(parameter.dtype).bits < 32:
                dtype = str(parameter.dtype).removeprefix("torch.")
                raise UserError(
                    f"the student's weights are {dtype} ({name}), in which most updates are rounded away, and an "
                    "average of them stands still. Train them in float32: student.float(), or "
                    "from_pretrained(..., dtype=torch.float32). To compute in half precision: bf16=True, fp16=True"
                )

    def _check_encoder(self) -> None:
        """See whose encoder the student has, by its weights as they are now. Raises `UserError` for a stale cache."""
        shares = self.teacher is not None and self.args.freeze_encoder
        self._teacher_has_our_encoder = shares and same_encoder(self.teacher, self.model)
        cache = self.data_collator.encoder_cache if isinstance(self.data_collator, SpeechCollator) else None
        if cache is not None:
            self._check_cache_is_valid()
            if not cache.is_of(self.model, self.data_collator.processor):
                raise UserError(f"encoder cache {cache.folder}: it isn't of the student's encoder and features")

    def _teacher_has_own_features(self) -> bool:
        return isinstance(self.data_collator, SpeechCollator) and self.data_collator.teacher_extractor is not None

    def _run_models(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        weights: BlendWeights,
        keep_logits: bool = False,
        gradient_scale: float = 1.0,
    ) -> tuple[Tensor, BlendTerms, Seq2SeqLMOutput]:
        """Student, and teacher and self-teacher where they have a weight, on one batch and its decoder input.

        Returns: the objective summed over the label tokens, its terms at each, and the student's outputs.
        """
        student = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        labels = inputs["labels"]
        real = labels != -100
        speech = ~inputs["no_speech"][:, None].expand_as(labels) if "no_speech" in inputs else None
        batch = self._for_models(student, inputs)
        pairs = self._pairs if weights.teacher > 0.0 else None
        # The student comes last: SpecAugment writes into its input features
        targets, teacher_states = {}, None
        with torch.no_grad(), self.accelerator.autocast():
            self._encode(model, batch, with_states=pairs is not None)
            if weights.teacher > 0.0:
                targets["teacher"], teacher_states = self._teacher_target(inputs, batch, real, pairs)
            if weights.self > 0.0:
                targets["self_teacher"] = self._self_target(student, batch, real)
        if "encoder_outputs" in batch:
            batch.pop("input_features", None)
        if pairs is not None:
            batch["output_hidden_states"] = pairs.student
        with unprojected(student, real, keep_logits) as noted:
            outputs = model(**batch)
        with self.accelerator.autocast():
            total, terms = chunked_blend(
                noted[0],
                labels[real],
                **targets,
                teacher_weight=weights.teacher,
                self_weight=weights.self,
                temperature=self.args.temperature,
                divergence=DIVERGENCES[self.args.divergence],
                mix=self.args.divergence_mix,
                trust_label=self.args.trust_label,
                trusted=None if speech is None else speech[real],
                gradient_scale=gradient_scale,
            )
            if pairs is not None:
                states = [outputs.encoder_hidden_states[i] for i in pairs.student]
                terms.hidden = hidden_state_loss(states, teacher_states).repeat_interleave(real.sum(1))
                total = total + self._weigh_hidden(terms, weights)
        return total, terms, outputs

    @staticmethod
    def _for_models(student: WhisperForConditionalGeneration, inputs: dict[str, Tensor]) -> dict[str, Any]:
        """What the models are run on: a batch without labels, and with the decoder's input."""
        not_models = ("labels", "no_speech", "teacher_input_features", *TEACHER_COLUMNS)
        batch = {name: value for name, value in inputs.items() if name not in not_models}
        if "decoder_input_ids" not in batch:  # another collator's: no prompts, so they follow from the labels
            batch["decoder_input_ids"] = shift_tokens_right(
                inputs["labels"], student.config.pad_token_id, student.config.decoder_start_token_id
            )
        return batch | {"use_cache": False}

    def _weigh_hidden(self, terms: BlendTerms, weights: BlendWeights) -> Tensor:
        """The hidden-state loss of the label tokens, weighted and summed. Added to the terms without its gradient."""
        weighted = weights.teacher * self.args.hidden_weight * terms.hidden
        terms.total = terms.total + weighted.detach()
        terms.hidden = terms.hidden.detach()
        return weighted.sum()

    def _encode(self, model: nn.Module, batch: dict[str, Any], with_states: bool) -> None:
        """Put the student's `encoder_outputs` into the batch, for all models, unless its encoder is trained.

        Evaluation does so for a trained encoder as well, `with_states` excepted, which its forward pass has to give.
        """
        student = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        if "encoder_outputs" in batch:
            self._check_cache_is_valid()
            batch["encoder_outputs"] = (batch["encoder_outputs"].to(student.dtype),)
            return
        batch["input_features"] = batch["input_features"].to(student.dtype)  # bf16_full_eval casts the model
        if self._encoder_is_fixed() or not (model.training or with_states):
            batch["encoder_outputs"] = (encode(student.model.encoder, batch["input_features"]),)

    def _encoder_is_fixed(self) -> bool:
        """Whether the student's encoder gives a clip the same output at every step."""
        return self.args.freeze_encoder and encoder_is_deterministic(self.model.config)

    def _check_cache_is_valid(self) -> None:
        if not self._encoder_is_fixed():
            raise UserError("cached encoder outputs need a frozen encoder without SpecAugment, layerdrop, dropout")

    def _teacher_target(
        self, inputs: dict[str, Tensor], batch: dict[str, Any], real: Tensor, pairs: LayerPairs | None
    ) -> tuple[Unprojected | TopK, list[Tensor] | None]:
        """What the teacher expects at the label tokens, from its cached columns or by running it.

        And, where `pairs` asks for them, the hidden states of its encoder.
        """
        if set(TEACHER_COLUMNS) <= inputs.keys():
            return TopK(*(inputs[name][real] for name in TEACHER_COLUMNS)), None
        batch = dict(batch)
        batch.pop("attention_mask", None)  # only SpecAugment reads it
        if "encoder_outputs" in batch and self._teacher_has_our_encoder:
            batch.pop("input_features", None)
            batch["encoder_outputs"] = (batch["encoder_outputs"][0].to(self.teacher.dtype),)
        else:
            features = inputs.get("teacher_input_features", inputs.get("input_features"))
            if features is None:
                raise UserError(
                    "the batches have only cached outputs of the student's encoder, and the teacher has another one: "
                    "make them with SpeechCollator(..., teacher_extractor=...)"
                )
            batch.pop("encoder_outputs", None)
            batch["input_features"] = features.to(self.teacher.dtype)
        if pairs is not None:
            batch["output_hidden_states"] = pairs.teacher
        with unprojected(self.teacher, real) as noted:
            outputs = self.teacher(**batch)
        states = None if pairs is None else [outputs.encoder_hidden_states[i] for i in pairs.teacher]
        return noted[0], states

    @torch.no_grad()
    def _judge_labels(self) -> LabelsJudged:
        """What the student, as it is now, makes of the labels of clips that it never saw; over all processes."""
        student = self.accelerator.unwrap_model(self.model_wrapped, keep_torch_compile=False)
        training = student.training
        student.eval()
        counts = torch.zeros(4, device=self.args.device)
        for held_out in self._held_out.batches(self.data_collator, self.args):
            inputs = self._prepare_inputs(held_out.inputs)
            real = inputs["labels"] != -100
            batch = self._for_models(student, inputs)
            with self.accelerator.autocast():
                self._encode(student, batch, with_states=False)
                if held_out.choices is None:  # the teacher hears them once
                    held_out.choices = first_choices(self._teacher_target(inputs, batch, real, None)[0])
                if "encoder_outputs" in batch:
                    batch.pop("input_features", None)
                with unprojected(student, real) as noted:
                    student(**batch)
                counts += judge(noted[0], inputs, held_out.choices, student.config.eos_token_id)
            if self._encoder_is_fixed():  # it hears them once as well
                held_out.keep_encoded(batch["encoder_outputs"][0])
        student.train(training)
        return LabelsJudged(*self.accelerator.reduce(counts, reduction="sum").tolist())

    def _self_target(self, student: nn.Module, batch: dict[str, Any], real: Tensor) -> Unprojected:
        """What the self-teacher expects at the label tokens; of a trained encoder it runs its own average."""
        if not self.args.freeze_encoder:
            batch = {name: value for name, value in batch.items() if name != "encoder_outputs"}
        with unprojected(student, real) as noted:
            self.blend.self_teacher(student, batch)
        return noted[0]

    def _release_teacher(self) -> None:
        """Free the teacher's memory, unless the caller has kept a reference."""
        if self.args.auto_find_batch_size:  # with a smaller batch training would begin with it again
            place_teacher(self.teacher, torch.device("cpu"))
        self.teacher = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        logger.warning("step %d: the teacher's weight is 0 from here on; it is freed", self.state.global_step)
