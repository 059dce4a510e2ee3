"""Keep the position embeddings of Whisper's encoder fixed: they are sinusoids.

`from_pretrained` leaves them trainable. Earlier versions trained them with the encoder, so the optimizer in their
checkpoints has the state of one more parameter.
"""

from collections.abc import Collection
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..self_teacher import POSITIONS


def load_without_positions(optimizer: Optimizer, student: nn.Module, decayed: Collection[str]) -> None:
    """Let the optimizer load the states of earlier versions too: leave out that of the positions.

    Args:
        student: whose trained parameters the optimizer has, in two groups: those with weight decay first.
        decayed: the names of the parameters with weight decay.
    """
    names = [name for name, parameter in student.named_parameters() if name == POSITIONS or parameter.requires_grad]
    group = [name for name in names if name in decayed]
    if POSITIONS not in group:
        return
    place = group.index(POSITIONS)

    def leave_out(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any] | None:
        first, *others = state["param_groups"]
        if len(first["params"]) != len(group) or len(optimizer.param_groups[0]["params"]) != len(group) - 1:
            return None
        positions = first["params"][place]
        first = first | {"params": [number for number in first["params"] if number != positions]}
        kept = {number: values for number, values in state["state"].items() if number != positions}
        return state | {"param_groups": [first, *others], "state": kept}

    optimizer.register_load_state_dict_pre_hook(leave_out)
