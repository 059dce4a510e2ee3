"""A teacher that takes little memory: decoder layers in 8 bits, layers that stay in CPU memory until they run.

What the projection reads directly, the embeddings of the vocabulary, stays as it is and where training computes. The
encoder isn't quantised either: whether the student has its layers is seen by their weights, and where it has all of
them, the teacher's own isn't run at all and can stay in CPU memory whatever the options.
"""

import contextlib
from collections.abc import Iterable

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils import align_module_device, has_offloaded_params
from torch import Tensor, nn
from transformers import WhisperForConditionalGeneration

from ..errors import UserError


def check_int8() -> None:
    """Raise `UserError` if what 8-bit weights need isn't installed."""
    try:
        import torchao.quantization  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--teacher_dtype int8 needs torchao ({error}): install it with pip install 'askd-hf[int8]'"
        ) from error


def quantize_decoder(teacher: WhisperForConditionalGeneration) -> None:
    """Keep the weights of the decoder's linear layers in 8 bits, a scale a row, where they are; in place.

    They are multiplied in the teacher's dtype, which is that of all other weights.
    """
    check_int8()
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(teacher.model.decoder.layers, Int8WeightOnlyConfig(), filter_fn=_is_whole_linear)


def _is_whole_linear(module: nn.Module, name: str) -> bool:
    from torchao.utils import TorchAOBaseTensor

    return isinstance(module, nn.Linear) and not isinstance(module.weight, TorchAOBaseTensor)


def offload(layers: Iterable[nn.Module], device: torch.device) -> None:
    """Keep layers in CPU memory; each comes to `device` when it is run, and leaves it again."""
    for layer in layers:
        if has_offloaded_params(layer):
            continue
        weights = {name: weight.to("cpu") for name, weight in layer.state_dict().items()}
        hook = AlignDevicesHook(execution_device=device, offload=True, weights_map=weights, place_submodules=True)
        add_hook_to_module(layer, hook)


def place_teacher(
    teacher: WhisperForConditionalGeneration, device: torch.device, encoder_runs: bool = True
) -> WhisperForConditionalGeneration:
    """Move the teacher itself to `device`, except for the layers that are offloaded.

    Args:
        encoder_runs: False: its layers aren't expected to run, and stay in CPU memory.
    """
    if not encoder_runs and device.type != "cpu":
        offload(teacher.model.encoder.layers, device)
    for part in (teacher.model.encoder, teacher.model.decoder):
        for module in part.children():
            for child in module if module is part.layers else [module]:
                if not has_offloaded_params(child):
                    child.to(device)
    teacher.proj_out.to(device)
    return teacher


def full_weights(module: nn.Module) -> dict[str, Tensor]:
    """`module.state_dict()`, with those of offloaded layers as they are in CPU memory."""
    with contextlib.ExitStack() as stack:
        for part in module.modules():
            if has_offloaded_params(part):
                stack.enter_context(align_module_device(part, "cpu"))
        return module.state_dict()
