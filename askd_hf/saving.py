"""`SavingTrainer`: what a run writes is a plain Whisper, or an adapter, whatever training has made of the model."""

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
from transformers.utils import CONFIG_NAME

from .adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_base, load_adapter, loadable_base, merged
from .config import ASKDConfig
from .errors import UserError, saving_errors
from .publishing import PublishingTrainer
from .run_dir import how_to_go_on


class SavingTrainer(PublishingTrainer):
    """Saves the student as `pipeline` and `from_pretrained` load it; of an adapter, its weights only in checkpoints.

    Args:
        model: the student, or an adapter on it: then `adapter` is that, and `model` the student that it changes.
        keep_adapter: the finished run is the adapter alone, and not merged (`LoraArguments.keep_adapter`).
        kwargs: the other arguments of `Seq2SeqTrainer`.

    Raises `UserError` for an adapter that is to be kept, or pushed, and that nobody could load.
    """

    model: Any  # Trainer's

    def __init__(
        self,
        model: WhisperForConditionalGeneration | PeftModel,
        args: ASKDConfig,
        keep_adapter: bool = False,
        **kwargs: Any,
    ):
        self.adapter, self.keeps_adapter = None, keep_adapter
        if isinstance(model, PeftModel):
            self.adapter, model = model, model.get_base_model()
            if args.push_to_hub and args.hub_strategy != "end":
                raise UserError("hub_strategy: a checkpoint of an adapter is no student: choose end")
        if keep_adapter:
            if self.adapter is None:
                raise UserError("keep_adapter: the model has no adapter")
            if args.save_dtype != "float32":
                raise UserError(f"save_dtype {args.save_dtype}: an adapter is kept in float32; leave it out")
            base = loadable_base(model.name_or_path, args.push_to_hub)
            check_base(self.adapter, base)
            self.adapter.active_peft_config.base_model_name_or_path = base
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
        directory = Path(output_dir or self.args.output_dir)
        if _internal_call:  # of a checkpoint, which says for itself
            super().save_model(output_dir, _internal_call=True)
            return
        with saving_errors(directory, lambda: how_to_go_on(Path(self.args.output_dir))):
            super().save_model(output_dir, _internal_call=True)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        directory = Path(output_dir or self.args.output_dir)
        is_checkpoint = directory.name.startswith(PREFIX_CHECKPOINT_DIR)
        if self.adapter is not None and (is_checkpoint or self.keeps_adapter):
            self._save_adapter(directory, complete=not is_checkpoint)
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
        remove(directory, ADAPTER_CONFIG, ADAPTER_WEIGHTS)  # of an earlier run: it would be loaded on top of this one
        self._save_spelling(directory)
        dtype = getattr(torch, self.args.save_dtype)
        # a checkpoint keeps the dtype of training, or a resumed run would go on from rounded weights
        if dtype != self.model.dtype and not is_checkpoint:
            WhisperForConditionalGeneration.from_pretrained(directory, dtype=dtype).save_pretrained(directory)

    def _save_adapter(self, directory: Path, complete: bool) -> None:
        """Write the adapter, `complete` with what else a student has."""
        if not self.args.should_save:
            return
        self.adapter.save_pretrained(directory, save_embedding_layers=False)  # "auto" would ask the Hub about them
        if not complete:
            return
        remove(directory, CONFIG_NAME, "model*.safetensors*")  # with a config.json it would be taken for a whole model
        self._generation_config.save_pretrained(directory)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(directory)
            self._save_spelling(directory)

    def _save_spelling(self, directory: Path) -> None:
        """Save what Whisper's normalizer needs, and `save_pretrained` forgets."""
        spelling = getattr(getattr(self.processing_class, "tokenizer", None), "english_spelling_normalizer", None)
        if spelling:
            (directory / "normalizer.json").write_text(json.dumps(spelling, indent=2))

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # trainer_state.json, which completes a checkpoint, comes next, and only when all processes have written theirs
        self.accelerator.wait_for_everyone()

    def is_student(self, directory: Path) -> bool:
        """Whether what this trainer has saved there is a student, and not the checkpoint of an adapter."""
        return self.adapter is None or not directory.name.startswith(PREFIX_CHECKPOINT_DIR)

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


def remove(directory: Path, *patterns: str) -> None:
    for pattern in patterns:
        for file in directory.glob(pattern):
            file.unlink()
