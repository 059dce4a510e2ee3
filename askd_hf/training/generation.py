"""Generation in evaluation, from the encoder outputs of the loss."""

from typing import Any

import torch
from torch import Tensor
from transformers import WhisperForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from ..models.generation_config import no_timestamps


def generation_inputs(
    model: WhisperForConditionalGeneration, encoder_outputs: Tensor, labels: Tensor
) -> dict[str, Any]:
    """Return the arguments of `generate` for a batch, with the language and task of each clip's labels.

    The decoder's prompt is taken from the labels. There is none if the labels don't have `<|notimestamps|>` before the
    text, as those of `SpeechCollator` do.

    Args:
        encoder_outputs: `(batch, positions, d_model)`.
        labels: `(batch, tokens)`.
    """
    encoder_outputs = encoder_outputs.to(model.dtype)
    # all ones, as Whisper also attends to the silence of the padding; without a mask `generate` logs a warning
    frames = 2 * encoder_outputs.shape[1]
    inputs = {
        "encoder_outputs": BaseModelOutput(last_hidden_state=encoder_outputs),
        "attention_mask": torch.ones(len(labels), frames, dtype=torch.long, device=encoder_outputs.device),
        **no_timestamps(model),
    }
    token = getattr(model.generation_config, "no_timestamps_token_id", None)
    before_text = [] if token is None else (labels[0] == token).nonzero().flatten()
    if len(before_text):
        start = labels.new_full((len(labels), 1), model.config.decoder_start_token_id)
        inputs["decoder_input_ids"] = torch.cat([start, labels[:, : before_text[0] + 1]], dim=1)
    return inputs
