"""A teacher that needs little memory: decoder layers in 8 bits, and layers offloaded to CPU memory.

The embedding of the vocabulary is neither quantized nor offloaded, as the projection reads it directly. The encoder
isn't quantized, because its weights are compared with the student's: if they are equal, the teacher's encoder isn't
run, and stays in CPU memory with any options.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils import align_module_device, has_offloaded_params
from torch import Tensor, nn
from transformers import WhisperForConditionalGeneration
from transformers.utils import is_torchao_available

from ..errors import UserError

TORCHAO_VERSION = "0.16.0"


def check_int8() -> None:
    """Raise `UserError` if torchao isn't installed."""
    if not is_torchao_available(TORCHAO_VERSION):
        raise UserError(
            f"--teacher_dtype int8 requires torchao, version {TORCHAO_VERSION} or later: pip install 'askd-hf[int8]'"
        )


def quantize_decoder(teacher: WhisperForConditionalGeneration) -> None:
    """Quantize the linear layers of the decoder to int8 weights with one scale per row, in place.

    They are multiplied in the teacher's dtype.
    """
    check_int8()
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(teacher.model.decoder.layers, Int8WeightOnlyConfig(), filter_fn=_is_unquantized_linear)


def _is_unquantized_linear(module: nn.Module, name: str) -> bool:
    from torchao.utils import TorchAOBaseTensor

    return isinstance(module, nn.Linear) and not isinstance(module.weight, TorchAOBaseTensor)


class PinnedWeights(Mapping[str, Tensor]):
    """Weights in pinned CPU memory. Reading one starts its copy to a GPU, which the CPU doesn't wait for.

    Args:
        weights: by name. Those of torchao stay in ordinary memory, as they can't be pinned.
        device: of the copies.
    """

    def __init__(self, weights: Mapping[str, Tensor], device: torch.device):
        self.device = device
        self.weights = {
            name: weight.pin_memory() if type(weight) is Tensor else weight for name, weight in weights.items()
        }

    def __getitem__(self, name: str) -> Tensor:
        return self.weights[name].to(self.device, non_blocking=True)

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def offload(layers: Iterable[nn.Module], device: torch.device, run: bool = True) -> None:
    """Keep layers in CPU memory, and copy each to `device` while it runs.

    Args:
        run: whether they are expected to run: their weights are then in pinned memory, if `device` is a CUDA GPU.
    """
    for layer in layers:
        if has_offloaded_params(layer):
            continue
        weights: Mapping[str, Tensor] = {name: weight.to("cpu") for name, weight in layer.state_dict().items()}
        if run and device.type == "cuda":
            weights = PinnedWeights(weights, device)
        hook = AlignDevicesHook(execution_device=device, offload=True, weights_map=weights, place_submodules=True)
        add_hook_to_module(layer, hook)


def place_teacher(
    teacher: WhisperForConditionalGeneration, device: torch.device, encoder_runs: bool = True
) -> WhisperForConditionalGeneration:
    """Move the teacher to `device` in place, except for offloaded layers.

    Args:
        encoder_runs: False to offload the encoder layers, which are not expected to run.
    """
    if not encoder_runs and device.type != "cpu":
        offload(teacher.model.encoder.layers, device, run=False)
    for part in (teacher.model.encoder, teacher.model.decoder):
        for module in part.children():
            for child in module if module is part.layers else [module]:
                if not has_offloaded_params(child):
                    child.to(device)
    teacher.proj_out.to(device)
    return teacher


def full_weights(module: nn.Module) -> dict[str, Tensor]:
    """Return `module.state_dict()` with the weights of offloaded layers, in CPU memory."""
    with contextlib.ExitStack() as stack:
        for part in module.modules():
            if has_offloaded_params(part):
                stack.enter_context(align_module_device(part, "cpu"))
        return module.state_dict()
