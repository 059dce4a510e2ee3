"""Generate in evaluation from the encoder's outputs that the loss has computed."""

from typing import Any

import torch
from torch import Tensor
from transformers import WhisperForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from ..models.generation_config import no_timestamps


def generation_inputs(
    model: WhisperForConditionalGeneration, encoder_outputs: Tensor, labels: Tensor
) -> dict[str, Any]:
    """The arguments of `generate` for a batch, each clip in the language of its labels.

    Args:
        encoder_outputs: `(batch, positions, d_model)`.
        labels: `(batch, tokens)`.
    """
    encoder_outputs = encoder_outputs.to(model.dtype)
    # the mask is of ones, as Whisper sees the padding's silence too; without it `generate` warns at every run
    frames = 2 * encoder_outputs.shape[1]
    return {
        "encoder_outputs": BaseModelOutput(last_hidden_state=encoder_outputs),
        "attention_mask": torch.ones(len(labels), frames, dtype=torch.long, device=encoder_outputs.device),
        **decoder_prompts(model, labels),
        **no_timestamps(model),
    }


def decoder_prompts(model: WhisperForConditionalGeneration, labels: Tensor) -> dict[str, Tensor]:
    """The decoder prompt of each clip, its language and task tokens, from its labels: `(batch, tokens)`.

    Empty if the labels aren't those of `SpeechCollator`, with `<|notimestamps|>` in front of the text.
    """
    token = getattr(model.generation_config, "no_timestamps_token_id", None)
    before_text = [] if token is None else (labels[0] == token).nonzero().flatten()
    if not len(before_text):
        return {}
    start = labels.new_full((len(labels), 1), model.config.decoder_start_token_id)
    return {"decoder_input_ids": torch.cat([start, labels[:, : before_text[0] + 1]], dim=1)}
