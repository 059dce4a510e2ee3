"""Save the student as a plain Whisper model that `from_pretrained` loads, or as an adapter."""

import contextlib
import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import ProcessorMixin, Trainer, WhisperForConditionalGeneration
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME

from ..config import ASKDConfig
from ..errors import UserError
from ..hub.training_summary import save_training_summary
from ..models.layers import COPIED_LAYERS
from ..models.lora import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    check_adapter,
    check_adapter_options,
    check_base,
    check_peft_type,
    loadable_base,
    merged,
)


class StudentSaver:
    """Write the student's files. If an adapter is trained, checkpoints contain the adapter only.

    Args:
        peft_config: puts an adapter on `model`.
        keep_adapter: True to save the adapter alone at the end, without merging it into the student.

    Attributes:
        student: the Whisper model, without the adapter around it.
        adapter: None if the whole student is trained.

    Raises `UserError` if the adapter isn't LoRA or is on the output projection, or if it is to be kept or pushed, and
    its base can't be loaded by others.
    """

    def __init__(
        self,
        model: WhisperForConditionalGeneration | PeftModel,
        args: ASKDConfig,
        peft_config: PeftConfig | None,
        keep_adapter: bool,
    ):
        if peft_config is not None:
            check_peft_type(peft_config)
            model = get_peft_model(model, peft_config)
        self.args, self.keeps_adapter = args, keep_adapter
        self.adapter: PeftModel | None = model if isinstance(model, PeftModel) else None
        self.student: WhisperForConditionalGeneration = model if self.adapter is None else model.get_base_model()
        if self.adapter is not None:
            check_adapter(self.adapter)
            check_adapter_options(args, keep_adapter)
        if keep_adapter:
            self._name_base()
        # saved with the student later: Trainer disables the cache and adds to the generation config
        self._use_cache = self.student.config.use_cache
        # before --spec_augment, which is of this run: whoever trains the student further decides anew
        self._spec_augment = self.student.config.apply_spec_augment
        self._generation_config = copy.deepcopy(self.student.generation_config)
        self._generation_config._from_model_config = False  # or `from_pretrained` would not read it
        if self._generation_config.max_length is None:
            self._generation_config.max_length = self.student.config.max_target_positions

    def _name_base(self) -> None:
        if self.adapter is None:
            raise UserError("--keep_adapter requires a model with an adapter")
        base = loadable_base(self.student.name_or_path, self.args.push_to_hub)
        check_base(self.adapter, base)
        self.adapter.active_peft_config.base_model_name_or_path = base

    def save(
        self,
        trainer: Trainer,
        directory: Path,
        save_model: Callable[[str, dict[str, Tensor] | None], None],
        state_dict: dict[str, Tensor] | None,
    ) -> None:
        """Write the student with `training.json`, or the adapter.

        Args:
            save_model: Trainer's `_save`, which writes `trainer.model`.
        """
        processor, state = trainer.processing_class, trainer.state
        if self.adapter is not None and (self.keeps_adapter or is_checkpoint(directory)):
            if self.args.should_save:
                self._save_adapter(directory, processor)
        else:
            trained = trainer.model
            if self.adapter is not None:
                trainer.model, state_dict = merged(self.adapter), None
            student = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
            try:
                with self._published_config(student, trained=state.global_step > 0):
                    save_model(str(directory), state_dict)
            finally:
                trainer.model = trained
            if self.args.should_save:
                self._finish_student(directory, trained.dtype, processor)
        if self.args.should_save and self.is_student(directory):
            save_training_summary(directory, trainer, self.adapter, self.keeps_adapter)

    def set_alignment_heads(self, heads: list[list[int]]) -> None:
        """Set the alignment heads, [layer, head], of the generation config that `save` writes."""
        self._generation_config.alignment_heads = heads

    def is_student(self, directory: Path) -> bool:
        """Return whether a student is saved in `directory`, rather than the checkpoint of an adapter."""
        return self.adapter is None or not is_checkpoint(directory)

    @contextlib.contextmanager
    def _published_config(self, student: WhisperForConditionalGeneration, trained: bool) -> Iterator[None]:
        """Restore the student's configuration of before training, while it is saved.

        Args:
            trained: whether the student was trained. The config of a student of `init_student` records this, so that
                its encoder no longer counts as just pruned.
        """
        in_training = student.config.use_cache, student.config.apply_spec_augment, student.generation_config
        student.config.use_cache, student.config.apply_spec_augment = self._use_cache, self._spec_augment
        student.generation_config = self._generation_config
        if trained and hasattr(student.config, COPIED_LAYERS):
            getattr(student.config, COPIED_LAYERS)["trained"] = True
        try:
            yield
        finally:
            student.config.use_cache, student.config.apply_spec_augment, student.generation_config = in_training

    def _finish_student(self, directory: Path, dtype: torch.dtype, processor: ProcessorMixin | None) -> None:
        """Complete a directory that Trainer has written.

        Args:
            dtype: of the saved weights. Those of a finished run are cast to `args.save_dtype`.
        """
        (directory / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle of all arguments, with the Hub token
        _remove(directory, ADAPTER_CONFIG, ADAPTER_WEIGHTS)  # an adapter of an earlier run would be loaded on top
        _save_spelling(directory, processor)
        save_dtype = getattr(torch, self.args.save_dtype)
        # a checkpoint keeps the dtype of training, or a resumed run would start from rounded weights
        if save_dtype != dtype and not is_checkpoint(directory):
            WhisperForConditionalGeneration.from_pretrained(directory, dtype=save_dtype).save_pretrained(directory)

    def _save_adapter(self, directory: Path, processor: ProcessorMixin | None) -> None:
        """Write the adapter; for a finished run also the generation config and the processor."""
        self.adapter.save_pretrained(directory, save_embedding_layers=False)  # "auto" would call the Hub
        if is_checkpoint(directory):
            return
        # with a config.json the directory would be loaded as a whole model
        _remove(directory, CONFIG_NAME, "model*.safetensors*")
        self._generation_config.save_pretrained(directory)
        if processor is not None:
            processor.save_pretrained(directory)
            _save_spelling(directory, processor)


def is_checkpoint(directory: Path) -> bool:
    return re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", directory.name) is not None


def _save_spelling(directory: Path, processor: ProcessorMixin | None) -> None:
    """Save the spelling table of Whisper's normalizer, which the tokenizer's `save_pretrained` leaves out."""
    spelling = getattr(getattr(processor, "tokenizer", None), "english_spelling_normalizer", None)
    if spelling:
        (directory / "normalizer.json").write_text(json.dumps(spelling, indent=2))


def _remove(directory: Path, *patterns: str) -> None:
    for pattern in patterns:
        for file in directory.glob(pattern):
            file.unlink()
