"""The ONNX graphs of a Whisper model for sherpa-onnx, made by torch's exporter.

Inputs and outputs have the names that sherpa-onnx gave them. The batch size is 1.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu
from transformers import WhisperForConditionalGeneration
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from .onnx_graphs import exportable, write_graph

SILENCE = -1.5  # the feature of digital silence, if nothing in the clip is loud
RANGE = 2.0  # the largest difference of two features in a clip


class Encoder(nn.Module):
    """Features `(1, mel bins, frames)` to the cross-attention's keys and values, each `(layers, 1, positions, width)`.

    sherpa-onnx pads features with zeros. They are replaced by silence, with which Whisper is trained. Features behind
    the window are cut off.
    """

    def __init__(self, model: WhisperForConditionalGeneration):
        super().__init__()
        self.encoder: Any = model.get_encoder()
        self.frames = 2 * model.config.max_source_positions
        self.attentions: Any = nn.ModuleList(layer.encoder_attn for layer in model.get_decoder().layers)

    def forward(self, mel: Tensor) -> tuple[Tensor, Tensor]:
        states = gelu(self.encoder.conv1(with_silence(mel[:, :, : self.frames])))
        states = gelu(self.encoder.conv2(states)).permute(0, 2, 1)
        states = states + self.encoder.embed_positions.weight[: states.shape[1]]
        for layer in self.encoder.layers:
            states = layer(states, None)
        states = self.encoder.layer_norm(states)
        keys = torch.stack([attention.k_proj(states) for attention in self.attentions])
        values = torch.stack([attention.v_proj(states) for attention in self.attentions])
        return keys, values


def with_silence(mel: Tensor) -> Tensor:
    """Replace frames of zeros by the features that silence has in this clip with Whisper's feature extractor."""
    padding = (mel == 0).all(dim=1, keepdim=True)
    loudest = mel.masked_fill(padding, SILENCE).amax((1, 2), keepdim=True)
    return torch.where(padding, (loudest - RANGE).clamp(min=SILENCE), mel)


class Decoder(nn.Module):
    """Tokens `(1, length)` at the positions from `offset` to logits `(1, length, tokens)`, and the caches.

    The caches have the self-attention's keys and values of all positions, each `(layers, 1, positions, width)`. Logits
    of tokens that the generation config suppresses are very low, as sherpa-onnx suppresses none.
    """

    suppress_tokens: Tensor
    begin_suppress_tokens: Tensor

    def __init__(self, model: WhisperForConditionalGeneration):
        super().__init__()
        self.decoder: Any = model.get_decoder()
        self.proj_out = model.proj_out
        self.heads, generation = model.config.decoder_attention_heads, model.generation_config
        for name in ("suppress_tokens", "begin_suppress_tokens"):
            suppressed = torch.zeros(model.config.vocab_size)
            suppressed[getattr(generation, name) or []] = torch.finfo(torch.float32).min / 4
            self.register_buffer(name, suppressed)

    def forward(
        self, tokens: Tensor, own_keys: Tensor, own_values: Tensor, keys: Tensor, values: Tensor, offset: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        positions = offset + torch.arange(tokens.shape[1])
        future = torch.arange(own_keys.shape[2]) > positions[:, None]
        mask = torch.zeros_like(future, dtype=torch.float32).masked_fill(future, torch.finfo(torch.float32).min)
        own, cross = FixedCache(own_keys, own_values, positions, self.heads), DynamicCache()
        for layer, pair in enumerate(zip(keys, values, strict=True)):
            cross.update(*(by_head(each, self.heads) for each in pair), layer)
        past = EncoderDecoderCache(own, cross)
        states = self.decoder.embed_tokens(tokens) + self.decoder.embed_positions.weight[positions]
        for layer in self.decoder.layers:
            # the layer only tests that encoder_hidden_states isn't None: keys and values come from the cache
            states = layer(states, mask[None, None], encoder_hidden_states=keys[0], past_key_values=past)
        logits = self.proj_out(self.decoder.layer_norm(states)) + self.suppress_tokens
        logits = logits + (offset == 0) * self.begin_suppress_tokens
        return logits, torch.stack(own.all_keys), torch.stack(own.all_values)


class FixedCache(DynamicCache):
    """Keys and values of all positions, of which those of the tokens are replaced."""

    def __init__(self, keys: Tensor, values: Tensor, positions: Tensor, heads: int):
        super().__init__()
        self.all_keys, self.all_values = [*keys], [*values]
        self.positions, self.heads = positions, heads

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        """Write keys and values `(1, heads, length, width of a head)`, and return those of all positions."""
        found = []
        for cache, states in ((self.all_keys, key_states), (self.all_values, value_states)):
            states = states.transpose(1, 2).flatten(2)
            index = self.positions[None, :, None].expand_as(states)
            cache[layer_idx] = cache[layer_idx].scatter(1, index, states)
            found.append(by_head(cache[layer_idx], self.heads))
        return found[0], found[1]


def by_head(states: Tensor, heads: int) -> Tensor:
    """From `(1, positions, width)` to `(1, heads, positions, width of a head)`."""
    return states.unflatten(-1, (heads, -1)).transpose(1, 2)


def write_graphs(model: WhisperForConditionalGeneration, directory: Path) -> tuple[Path, Path]:
    """Write the graphs of `Encoder` and `Decoder` to `directory`, and return their paths."""
    config = model.config
    frames, length, positions = (torch.export.Dim(name) for name in ("frames", "n_tokens", "positions"))
    layers, half = config.decoder_layers, config.max_source_positions // 2
    cross, own = ["n_layer_cross_k", "n_layer_cross_v"], ["n_layer_self_k_cache", "n_layer_self_v_cache"]
    past = [torch.zeros(layers, 1, n, config.d_model) for n in (*[config.max_target_positions] * 2, half, half)]
    encoder, decoder = directory / "encoder.onnx", directory / "decoder.onnx"
    with exportable(model):
        mel = torch.zeros(1, config.num_mel_bins, 2 * half)
        write_graph(Encoder(model), (mel,), ["mel"], cross, ({2: frames},), encoder)
        tokens, offset = torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, dtype=torch.long)
        names = ["tokens", *(f"in_{name}" for name in own), *cross, "offset"]
        sizes: tuple[dict[int, Any], ...] = ({1: length}, {}, {}, {2: positions}, {2: positions}, {})
        outputs = ["logits", *(f"out_{name}" for name in own)]
        write_graph(Decoder(model), (tokens, *past, offset), names, outputs, sizes, decoder)
    return encoder, decoder
