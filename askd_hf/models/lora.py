"""LoRA: the student's weights stay as they are, and small matrices beside them are trained (Hu et al. 2021).

The trainer is given a `PeftModel`. It trains the Whisper model inside, whose layers PEFT has replaced, so that all
else is as without an adapter: only the adapter is optimized, averaged into the self-teacher and saved in checkpoints.
The finished student has it merged into its weights, and is a plain Whisper again; or what is kept is the adapter
alone, in a directory that `pipeline` loads on top of the model that its configuration names (`keep_adapter`).
"""

import copy
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG
from peft.utils import SAFETENSORS_WEIGHTS_NAME as ADAPTER_WEIGHTS
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, GenerationConfig, WhisperForConditionalGeneration
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, cached_file, find_adapter_config_file

from ..arguments.ranges import POSITIVE, Range, check_ranges
from ..arguments.renamed import accepts_renamed
from ..errors import UserError
from ..hub_access import hub_access, local_or_hub

SHAPE = ("vocab_size", "d_model", "encoder_layers", "decoder_layers")


@accepts_renamed
@dataclass
class LoraArguments:
    """Training an adapter in place of the student's weights."""

    _argument_group_name = "LoRA"

    lora_r: int | None = field(
        default=None, metadata={"help": "Train an adapter of this rank, merged at the end. Default: all weights."}
    )
    lora_alpha: float | None = field(
        default=None, metadata={"help": "The adapter is scaled by lora_alpha / lora_r. Default: twice the rank."}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
        metadata={"help": "Linear layers of every decoder layer (and encoder layer, unless it is frozen) to adapt."},
    )
    use_dora: bool = field(
        default=False, metadata={"help": "DoRA: the weights' magnitude is trained apart from their direction."}
    )
    keep_adapter: bool = field(
        default=False,
        metadata={
            "help": "Keep the adapter on its own, some MB that load on top of --student wherever peft is installed, "
            "and don't merge it. To be published it needs a --student that is on the Hub."
        },
    )

    def __post_init__(self):
        if self.lora_r is not None and self.lora_r < 1:
            raise UserError(f"lora_r: {self.lora_r} is not at least 1")
        check_ranges(self, lora_alpha=POSITIVE, lora_dropout=Range(low=0, below=1))
        if self.use_dora and self.lora_r is None:
            raise UserError("use_dora: it needs --lora_r")
        if self.keep_adapter and self.lora_r is None:
            raise UserError("keep_adapter: it needs --lora_r")


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
            r=arguments.lora_r,
            lora_alpha=arguments.lora_alpha or 2 * arguments.lora_r,
            lora_dropout=arguments.lora_dropout,
            use_dora=arguments.use_dora,
            target_modules=target,
        ),
    )


def lora_settings(adapter: PeftModel) -> dict[str, float | bool]:
    """What a model card says of an adapter."""
    config = adapter.active_peft_config
    return dict(
        lora_r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout or None,
        use_dora=config.use_dora,
    )


def merged(adapter: PeftModel) -> WhisperForConditionalGeneration:
    """A plain copy of the student with the adapter in its weights, added in their own precision."""
    return copy.deepcopy(adapter).merge_and_unload(safe_merge=True)


def load_adapter(adapter: PeftModel, directory: Path) -> None:
    """Read what `adapter.save_pretrained` wrote. Raises `UserError` if it is another adapter."""
    file = directory / ADAPTER_WEIGHTS
    if not file.is_file():
        raise UserError(f"{directory} has no {ADAPTER_WEIGHTS}: it isn't a checkpoint of a run with LoRA")
    try:
        result = set_peft_model_state_dict(adapter, load_file(file))
    except RuntimeError as error:  # other shapes
        raise UserError(f"{directory} is of another adapter (--lora_r?): {error}") from error
    if result.unexpected_keys or any("lora" in name for name in result.missing_keys):
        raise UserError(f"{directory} is of another adapter (--lora_target_modules, --decoder_layers?)")


# ---- an adapter that is kept ----


def is_adapter(name: str) -> bool:
    """Whether a directory or Hub id holds an adapter and no model."""
    if (Path(name) / CONFIG_NAME).is_file():
        return False
    with hub_access("the model", name):
        return find_adapter_config_file(name) is not None


def adapter_base(name: str) -> str:
    """What an adapter is loaded on top of: a path or a Hub id. Raises `UserError` if that isn't known."""
    with hub_access("the adapter", name):
        config = PeftConfig.from_pretrained(name)
    if config.peft_type != PeftType.LORA:
        raise UserError(f"{name} is an adapter of the kind {config.peft_type}: only those of LoRA can be merged")
    if not config.base_model_name_or_path:
        raise UserError(f"{name}: its {ADAPTER_CONFIG} doesn't name the model that it changes")
    return config.base_model_name_or_path


def with_adapter(base: WhisperForConditionalGeneration, name: str) -> WhisperForConditionalGeneration:
    """`base` with the adapter of a directory or Hub id merged into its weights, and that one's generation config."""
    with hub_access("the adapter", name):
        try:
            with warnings.catch_warnings():
                # weights that it lacks would stay as they were initialized
                warnings.filterwarnings("error", message="Found missing adapter keys")
                adapter = PeftModel.from_pretrained(base, name)
            surplus = load_peft_weights(name, device="cpu").keys() - get_peft_model_state_dict(adapter).keys()
            if surplus:
                raise ValueError(f"it has no {sorted(surplus)[0]}")
            model = adapter.merge_and_unload(safe_merge=True)
        except (RuntimeError, ValueError, KeyError, UserWarning) as error:  # other shapes, layers, names
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"the adapter {name} doesn't fit its base, {base.name_or_path}: {reason}") from error
        if cached_file(name, GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False) is not None:
            model.generation_config = GenerationConfig.from_pretrained(name)
    model.name_or_path = name
    return model.requires_grad_(True)  # PEFT has frozen it


def loadable_base(student: str | None, push_to_hub: bool) -> str:
    """What an adapter that is kept names as its base: the Hub id, or the whole path, that the student was loaded by.

    Raises `UserError` if there is nothing to load it by, or with `push_to_hub` nothing that others could.
    """
    if not student:
        raise UserError(
            "--keep_adapter: an adapter is loaded on top of the model that --student names, and a student made of the "
            "teacher's layers is nowhere to be loaded from. Give --student, or leave --keep_adapter out: then the "
            "adapter is merged into the student"
        )
    if is_adapter(student):
        raise UserError(
            f"--keep_adapter: {student} is an adapter itself, on which no other can be loaded. Leave --keep_adapter "
            "out: then both are merged into one student"
        )
    if not local_or_hub(student):
        return student
    if push_to_hub:
        raise UserError(
            f"--keep_adapter with --push_to_hub: nobody else can load an adapter of {student}, a directory here. "
            "Publish that model first and give --student its Hub id, or leave --keep_adapter out"
        )
    return str(Path(student).expanduser().resolve())


def check_base(adapter: PeftModel, base: str) -> None:
    """Raise `UserError` unless the model loaded by `base` has the shape of the one that the adapter was trained on."""
    with hub_access("the model", base):
        config = AutoConfig.from_pretrained(base)
    ours = adapter.get_base_model().config
    differing = [name for name in SHAPE if getattr(config, name, None) != getattr(ours, name)]
    if differing:
        raise UserError(
            f"keep_adapter: the adapter would be loaded on top of {base}, which isn't the student: it has other "
            f"{', '.join(differing)}. Save the student before training and load it from there, or merge the adapter"
        )
