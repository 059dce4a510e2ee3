"""`SavingTrainer`: what a run writes is a plain Whisper, whatever training has made of the model in memory."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import WhisperForConditionalGeneration
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .adapter import load_adapter, merged
from .config import ASKDConfig
from .errors import UserError
from .publishing import PublishingTrainer


class SavingTrainer(PublishingTrainer):
    """Saves the student as `pipeline` and `from_pretrained` load it; of an adapter, its weights only in checkpoints.

    Args:
        model: the student, or an adapter on it: then `adapter` is that, and `model` the student that it changes.
        kwargs: the other arguments of `Seq2SeqTrainer`.
    """

    def __init__(self, model: WhisperForConditionalGeneration | PeftModel, args: ASKDConfig, **kwargs: Any):
        self.adapter = None
        if isinstance(model, PeftModel):
            self.adapter, model = model, model.get_base_model()
            if args.push_to_hub and args.hub_strategy != "end":
                raise UserError("hub_strategy: a checkpoint of an adapter is no student: choose end")
        # as the student is to be published: Trainer switches the cache off and fills the generation config up
        self._use_cache = model.config.use_cache
        self._generation_config = copy.deepcopy(model.generation_config)
        self._generation_config._from_model_config = False  # or `from_pretrained` would not read it
        if self._generation_config.max_length is None:
            self._generation_config.max_length = model.config.max_target_positions
        super().__init__(model=model, args=args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write a directory that `pipeline` and `from_pretrained` load, in `args.save_dtype`. Doesn't push.

        Trainer's own would push here with `args.push_to_hub`; `push_to_hub` does it, when all else is done.
        """
        super().save_model(output_dir, _internal_call=True)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        directory = Path(output_dir or self.args.output_dir)
        is_checkpoint = directory.name.startswith(PREFIX_CHECKPOINT_DIR)
        if self.adapter is not None and is_checkpoint:
            self.adapter.save_pretrained(directory)
            return
        trained = self.model
        if self.adapter is not None:
            self.model, state_dict = merged(self.adapter), None
        student = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        in_training = student.config.use_cache, student.generation_config
        student.config.use_cache, student.generation_config = self._use_cache, self._generation_config
        try:
            super()._save(output_dir, state_dict)
        finally:
            student.config.use_cache, student.generation_config = in_training
            self.model = trained
        if not self.args.should_save:
            return
        (directory / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle of all arguments, a Hub token among them
        spelling = getattr(getattr(self.processing_class, "tokenizer", None), "english_spelling_normalizer", None)
        if spelling:  # `save_pretrained` forgets it, and Whisper's normaliser needs it
            (directory / "normalizer.json").write_text(json.dumps(spelling, indent=2))
        dtype = getattr(torch, self.args.save_dtype)
        # a checkpoint keeps the dtype of training, or a resumed run would go on from rounded weights
        if dtype != self.model.dtype and not is_checkpoint:
            WhisperForConditionalGeneration.from_pretrained(directory, dtype=dtype).save_pretrained(directory)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.adapter is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_adapter(self.adapter, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self.adapter is None:
            super()._load_best_model()
        else:
            load_adapter(self.adapter, Path(self.state.best_model_checkpoint))
