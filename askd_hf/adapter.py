"""LoRA: the student's weights stay as they are, and small matrices beside them are trained (Hu et al. 2021).

The trainer is given a `PeftModel`. It trains the Whisper model inside, whose layers PEFT has replaced, so that all
else is as without an adapter: only the adapter is optimised, averaged into the self-teacher and saved in checkpoints.
The finished student has it merged into its weights, and is a plain Whisper again.
"""

import copy
import re
from dataclasses import dataclass, field
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import nn
from transformers import WhisperForConditionalGeneration

from .errors import UserError


@dataclass
class LoraArguments:
    """Training an adapter in place of the student's weights."""

    _argument_group_name = "LoRA"

    lora_rank: int | None = field(
        default=None, metadata={"help": "Train an adapter of this rank, merged at the end. Default: all weights."}
    )
    lora_alpha: float | None = field(
        default=None, metadata={"help": "The adapter is scaled by lora_alpha / lora_rank. Default: twice the rank."}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
        metadata={"help": "Linear layers of every decoder layer (and encoder layer, unless it is frozen) to adapt."},
    )
    use_dora: bool = field(
        default=False, metadata={"help": "DoRA: the weights' magnitude is trained apart from their direction."}
    )

    def __post_init__(self):
        if self.lora_rank is not None and self.lora_rank < 1:
            raise UserError(f"lora_rank: {self.lora_rank} is not at least 1")
        if self.use_dora and self.lora_rank is None:
            raise UserError("use_dora: it needs --lora_rank")


def with_lora(
    student: WhisperForConditionalGeneration, arguments: LoraArguments, freeze_encoder: bool | None
) -> PeftModel:
    """Put an adapter beside the linear layers of the decoder, and of the encoder if `freeze_encoder` is off.

    Raises `UserError` if there are no such layers.
    """
    layers = {name for name, module in student.named_modules() if isinstance(module, nn.Linear)}
    parts = "(encoder|decoder)" if freeze_encoder is False else "decoder"
    names = "|".join(re.escape(name) for name in arguments.lora_target_modules)
    target = rf"model\.{parts}\.layers\.\d+\.(.*\.)?({names})"
    for name in arguments.lora_target_modules:
        if not any(re.fullmatch(target, layer) and layer.endswith(f".{name}") for layer in layers):
            known = sorted({layer.rpartition(".")[2] for layer in layers if ".layers." in layer})
            raise UserError(f"--lora_target_modules {name}: the student's layers have {', '.join(known)}")
    return get_peft_model(
        student,
        LoraConfig(  # without a task type: that of sequence-to-sequence models takes text only
            r=arguments.lora_rank,
            lora_alpha=arguments.lora_alpha or 2 * arguments.lora_rank,
            lora_dropout=arguments.lora_dropout,
            use_dora=arguments.use_dora,
            target_modules=target,
        ),
    )


def lora_settings(adapter: PeftModel) -> dict[str, float | bool]:
    """What a model card says of an adapter."""
    config = adapter.active_peft_config
    return dict(
        lora_rank=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout or None,
        use_dora=config.use_dora,
    )


def merged(adapter: PeftModel) -> WhisperForConditionalGeneration:
    """A plain copy of the student with the adapter in its weights, added in their own precision."""
    return copy.deepcopy(adapter).merge_and_unload(safe_merge=True)


def load_adapter(adapter: PeftModel, directory: Path) -> None:
    """Read what `adapter.save_pretrained` wrote. Raises `UserError` if it is another adapter."""
    file = directory / SAFETENSORS_WEIGHTS_NAME
    if not file.is_file():
        raise UserError(f"{directory} has no {SAFETENSORS_WEIGHTS_NAME}: it isn't a checkpoint of a run with LoRA")
    try:
        result = set_peft_model_state_dict(adapter, load_file(file))
    except RuntimeError as error:  # other shapes
        raise UserError(f"{directory} is of another adapter (--lora_rank?): {error}") from error
    if result.unexpected_keys or any("lora" in name for name in result.missing_keys):
        raise UserError(f"{directory} is of another adapter (--lora_target_modules, --decoder_layers?)")
