"""LoRA: train small matrices beside the student's weights, which stay frozen (Hu et al. 2021).

The trainer takes a `PeftModel` and trains the Whisper model inside, whose layers PEFT has replaced. Only the adapter
is optimized, averaged into the self-teacher and saved in checkpoints. At the end the adapter is merged into the
student, a plain Whisper model. Or with `keep_adapter` the adapter alone is saved, and `pipeline` loads it on top of
its base model.
"""

import copy
import re
import warnings
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
from peft.tuners.lora import LoraLayer
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG
from peft.utils import SAFETENSORS_WEIGHTS_NAME as ADAPTER_WEIGHTS
from torch import nn
from transformers import AutoConfig, GenerationConfig, WhisperForConditionalGeneration
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, cached_file, find_adapter_config_file

from ..arguments.lora import LoraArguments
from ..config import ASKDConfig
from ..errors import UserError
from ..hub_access import expanded, hub_access, local_or_hub

SHAPE = ("vocab_size", "d_model", "encoder_layers", "decoder_layers")


def with_lora(
    student: WhisperForConditionalGeneration, arguments: LoraArguments, freeze_encoder: bool | None
) -> PeftModel:
    """Add an adapter to the linear modules of the decoder, and of the encoder if `freeze_encoder` is False.

    Raises `UserError` if a module of `lora_target_modules` doesn't exist.
    """
    target = find_target_modules(student, arguments, freeze_encoder)
    return get_peft_model(
        student,
        LoraConfig(  # without a task type: SEQ_2_SEQ_LM accepts text inputs only
            r=arguments.lora_r,
            lora_alpha=arguments.lora_alpha or 2 * arguments.lora_r,
            lora_dropout=arguments.lora_dropout,
            use_dora=arguments.use_dora,
            target_modules=target,
        ),
    )


def find_target_modules(
    student: WhisperForConditionalGeneration, arguments: LoraArguments, freeze_encoder: bool | None
) -> str:
    """Return a regular expression for the names of the modules to adapt. Raises `UserError` as `with_lora`."""
    layers = {name for name, module in student.named_modules() if isinstance(module, nn.Linear)}
    parts = "(encoder|decoder)" if freeze_encoder is False else "decoder"
    names = "|".join(re.escape(name) for name in arguments.lora_target_modules)
    target = rf"model\.{parts}\.layers\.\d+\.(.*\.)?({names})"
    for name in arguments.lora_target_modules:
        if not any(re.fullmatch(target, layer) and layer.endswith(f".{name}") for layer in layers):
            modules = sorted({layer.rpartition(".")[2] for layer in layers if ".layers." in layer})
            raise UserError(f"--lora_target_modules must be among {', '.join(modules)}, got {name!r}")
    return target


def check_adapter_options(config: ASKDConfig, keep_adapter: bool) -> None:
    """Raise `UserError` for options of training that are not supported with an adapter."""
    if config.push_to_hub and config.hub_strategy != "end":
        raise UserError(
            f"--hub_strategy must be end for an adapter, got {str(config.hub_strategy)!r}: its checkpoints are not "
            "students"
        )
    if keep_adapter and config.save_dtype != "float32":
        raise UserError(f"--save_dtype must be float32 with --keep_adapter, got {config.save_dtype!r}")


def check_peft_type(config: PeftConfig) -> None:
    """Raise `UserError` for other adapters than LoRA."""
    if config.peft_type != PeftType.LORA:
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        raise UserError(f"peft_config must be a LoraConfig, got one of type {kind}: only LoRA adapters are supported")


def check_adapter(adapter: PeftModel) -> None:
    """Raise `UserError` for other adapters than LoRA, and for one on the output projection or what it shares."""
    check_peft_type(adapter.active_peft_config)
    if isinstance(adapter.get_base_model().model.decoder.embed_tokens, LoraLayer):
        raise UserError(
            "LoRA on the decoder's embed_tokens is not supported: the output projection has the same weights, and "
            "merging the adapter would change it. Leave embed_tokens out of target_modules"
        )
    if isinstance(adapter.get_base_model().proj_out, LoraLayer):
        raise UserError(
            "LoRA on the output projection is not supported: the objective takes its weight without the adapter, "
            "which would not be trained. Leave proj_out out of target_modules"
        )


def has_lora_dropout(module: nn.Module) -> bool:
    """Return whether an adapter in `module` has dropout, which makes the output random in training."""
    layers = (layer for layer in module.modules() if isinstance(layer, LoraLayer))
    return any(getattr(dropout, "p", 0.0) > 0.0 for layer in layers for dropout in layer.lora_dropout.values())


def lora_settings(adapter: PeftModel) -> dict[str, float | bool]:
    """Return the settings of an adapter, for the model card and for resuming."""
    config = adapter.active_peft_config
    return dict(
        lora_r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout or None,
        use_dora=config.use_dora,
    )


def merged(adapter: PeftModel) -> WhisperForConditionalGeneration:
    """Return a copy of the student with the adapter merged into its weights, in the precision of the weights."""
    return copy.deepcopy(adapter).merge_and_unload(safe_merge=True)


def load_adapter(adapter: PeftModel, directory: Path) -> None:
    """Load the weights that `adapter.save_pretrained` wrote. Raises `UserError` if they don't fit the adapter."""
    if not (directory / ADAPTER_WEIGHTS).is_file():
        raise UserError(f"{directory} has no {ADAPTER_WEIGHTS}: it is not a checkpoint of a run with LoRA")
    try:
        result = set_peft_model_state_dict(adapter, load_peft_weights(str(directory), device="cpu"))
    except RuntimeError as error:  # other shapes
        raise UserError(f"{directory} has another adapter (check --lora_r): {error}") from error
    if result.unexpected_keys or any("lora" in name for name in result.missing_keys):
        raise UserError(f"{directory} has another adapter (check --lora_target_modules and --decoder_layers)")


# ---- adapters without their base ----


def is_adapter(name: str) -> bool:
    """Return whether a directory or Hub repository contains an adapter and no model."""
    name = expanded(name)
    if (Path(name) / CONFIG_NAME).is_file():
        return False
    with hub_access("the model", name):
        return find_adapter_config_file(name) is not None


def adapter_base(name: str) -> str:
    """Return the base model of an adapter, a path or a Hub id. Raises `UserError` if its config doesn't name one."""
    name = expanded(name)
    with hub_access("the adapter", name):
        config = PeftConfig.from_pretrained(name)
    if config.peft_type != PeftType.LORA:
        raise UserError(f"{name} is a {config.peft_type} adapter: only LoRA adapters are supported")
    if not config.base_model_name_or_path:
        raise UserError(f"{name}: {ADAPTER_CONFIG} has no base_model_name_or_path")
    return config.base_model_name_or_path


def with_adapter(base: WhisperForConditionalGeneration, name: str) -> WhisperForConditionalGeneration:
    """Return `base` with the adapter merged into its weights, and with the adapter's generation config, if any."""
    with hub_access("the adapter", name):
        try:
            with warnings.catch_warnings():
                # missing weights would keep their initial values
                warnings.filterwarnings("error", message="Found missing adapter keys")
                adapter = PeftModel.from_pretrained(base, name)
            surplus = load_peft_weights(name, device="cpu").keys() - get_peft_model_state_dict(adapter).keys()
            if surplus:
                raise ValueError(f"the base has no {sorted(surplus)[0]}")
            model = adapter.merge_and_unload(safe_merge=True)
        except (RuntimeError, ValueError, KeyError, UserWarning) as error:  # other shapes, layers, names
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"the adapter {name} doesn't fit its base, {base.name_or_path}: {reason}") from error
        if cached_file(name, GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False) is not None:
            model.generation_config = GenerationConfig.from_pretrained(name)
    model.name_or_path = name
    return model.requires_grad_(True)  # PEFT has frozen it


def loadable_base(student: str | None, push_to_hub: bool) -> str:
    """Return the base that the adapter's config names: the Hub id or the absolute path of the student.

    Raises `UserError` if the student can't be loaded again, or with `push_to_hub` can't be loaded by others.
    """
    if not student:
        raise UserError(
            "--keep_adapter requires --student: the adapter is loaded on top of that model, and a student made from "
            "the teacher's layers isn't saved. Without --keep_adapter the adapter is merged into the student"
        )
    if is_adapter(student):
        raise UserError(
            f"--keep_adapter requires a whole model as --student, and {student} is an adapter. Without --keep_adapter "
            "both adapters are merged into one student"
        )
    if not local_or_hub(student):
        return student
    if push_to_hub:
        raise UserError(
            f"--keep_adapter with --push_to_hub requires a Hub id as --student, got the local directory {student}. "
            "Publish that model first, or leave out --keep_adapter"
        )
    return str(Path(student).expanduser().resolve())


def check_base(adapter: PeftModel, base: str) -> None:
    """Raise `UserError` if the model `base` has another shape than the one that the adapter is trained on."""
    with hub_access("the model", base):
        config = AutoConfig.from_pretrained(base)
    student = adapter.get_base_model().config
    differing = [name for name in SHAPE if getattr(config, name, None) != getattr(student, name)]
    if differing:
        raise UserError(
            f"--keep_adapter: the adapter would be loaded on top of {base}, which differs from the student in "
            f"{', '.join(differing)}. Save the student before training and load it from there, or merge the adapter"
        )
