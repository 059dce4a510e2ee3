"""The ONNX graphs of a Whisper model: made by torch's exporter, quantized, and the decoder's two joined into one.

Inputs and outputs have the names that optimum gave them, which transformers.js reads.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import WhisperForConditionalGeneration
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

OPSET = 18
LARGEST_FILE = 1_900_000_000  # bytes; a protobuf file ends at 2 GB, and the weights of a larger graph get their own
ENCODER, DECODER = "encoder_model", "decoder_model_merged"
# sizes that may differ from call to call
BATCH, LENGTH, POSITIONS = "batch_size", "decoder_sequence_length", "encoder_sequence_length"
PAST_LENGTH = "past_decoder_sequence_length"


# ---- from torch to ONNX ----


class Encoder(nn.Module):
    """Features `(batch, mel bins, frames)` to hidden states `(batch, positions, width)`."""

    def __init__(self, model: WhisperForConditionalGeneration):
        super().__init__()
        self.encoder: Any = model.get_encoder()

    def forward(self, input_features: Tensor) -> Tensor:
        output = self.encoder(input_features=input_features)
        return output.last_hidden_state


class FirstPast(nn.Module):
    """The encoder's hidden states to what a decoder without earlier tokens takes as those of earlier steps.

    These are, for each layer, keys and values of the self-attention of no tokens, and the keys and values of the
    cross-attention, each `(batch, heads, 0 or positions, width of a head)`.
    """

    def __init__(self, model: WhisperForConditionalGeneration):
        super().__init__()
        self.attentions: Any = nn.ModuleList(layer.encoder_attn for layer in model.get_decoder().layers)

    def forward(self, encoder_hidden_states: Tensor) -> tuple[Tensor, ...]:
        tensors = []
        for attention in self.attentions:
            projected = (attention.k_proj(encoder_hidden_states), attention.v_proj(encoder_hidden_states))
            cross = [each.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2).contiguous() for each in projected]
            tensors += [each[:, :, :0] for each in cross] + cross
        return tuple(tensors)


class Step(nn.Module):
    """Tokens `(batch, length)` and the tensors of earlier steps to logits and, for each layer, keys and values.

    These are those of the self-attention, `(batch, heads, earlier length + length, width of a head)`.
    """

    def __init__(self, model: WhisperForConditionalGeneration):
        super().__init__()
        self.decoder, self.proj_out = model.get_decoder(), model.proj_out

    def forward(self, input_ids: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
        own, cross = DynamicCache(), DynamicCache()
        for layer in range(len(past) // 4):
            own.update(*past[4 * layer : 4 * layer + 2], layer)
            cross.update(*past[4 * layer + 2 : 4 * layer + 4], layer)
        output = self.decoder(
            input_ids=input_ids,
            encoder_hidden_states=past[2],  # only that there is one counts: its keys and values are in the cache
            past_key_values=EncoderDecoderCache(own, cross),
            use_cache=True,
        )
        layers = output.past_key_values.self_attention_cache.layers
        return self.proj_out(output.last_hidden_state), *(each for own in layers for each in (own.keys, own.values))


def cache_names(prefix: str, layers: int) -> list[str]:
    """Return the names of the tensors of `FirstPast`; `prefix` is present or past_key_values."""
    parts = [f"{side}.{kind}" for side in ("decoder", "encoder") for kind in ("key", "value")]
    return [f"{prefix}.{layer}.{part}" for layer in range(layers) for part in parts]


def write_graphs(model: WhisperForConditionalGeneration, directory: Path) -> tuple[Path, Path, Path]:
    """Write the graphs of `Encoder`, `FirstPast` and `Step` to `directory`, and return their paths."""
    config = model.config
    layers, heads, positions = config.decoder_layers, config.decoder_attention_heads, config.max_source_positions
    dim = {name: torch.export.Dim(name) for name in (BATCH, LENGTH, POSITIONS, PAST_LENGTH)}
    # a size of 1 in an example would be taken for a constant
    features = torch.zeros(2, config.num_mel_bins, 2 * positions)
    tokens, states = torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, positions, config.d_model)
    lengths = [2, 2, positions, positions] * layers
    past = [torch.zeros(2, heads, length, config.d_model // heads) for length in lengths]
    sizes = [{0: dim[BATCH], 2: dim[name]} for name in (PAST_LENGTH, PAST_LENGTH, POSITIONS, POSITIONS)] * layers
    names = cache_names("past_key_values", layers)
    outputs = ["logits", *(name for name in cache_names("present", layers) if ".decoder." in name)]
    encoder, first, step = (directory / f"{name}.onnx" for name in (ENCODER, "first_past", "step"))
    with exportable(model):
        batch = {0: dim[BATCH]}
        write_graph(Encoder(model), (features,), ["input_features"], ["last_hidden_state"], (batch,), encoder)
        state_sizes = (batch | {1: dim[POSITIONS]},)
        write_graph(FirstPast(model), (states,), ["encoder_hidden_states"], names, state_sizes, first)
        step_sizes = (batch | {1: dim[LENGTH]}, sizes)
        write_graph(Step(model), (tokens, past), ["input_ids", *names], outputs, step_sizes, step)
    return encoder, first, step


def write_graph(
    module: nn.Module,
    inputs: tuple[Any, ...],
    input_names: list[str],
    output_names: list[str],
    sizes: tuple[Any, ...],
    file: Path,
) -> None:
    """Write the graph of a module. Its weights are beside it, in FILE.data."""
    torch.onnx.export(
        module.eval(),
        inputs,
        file,
        input_names=input_names,
        output_names=output_names,
        dynamic_shapes=sizes,
        opset_version=OPSET,
        dynamo=True,
        external_data=True,
        verbose=False,
    )


@contextlib.contextmanager
def exportable(model: WhisperForConditionalGeneration) -> Iterator[None]:
    """Switch to attention written in plain operations, without gradients and the messages of torch's exporter."""
    attention, training = model.config._attn_implementation, model.training
    log = logging.getLogger("torch.onnx")
    level = log.level
    model.set_attn_implementation("eager")
    log.setLevel(logging.ERROR)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
        model.set_attn_implementation(attention)
        model.train(training)


# ---- 8 bits ----


def quantize(file: Path, output: Path) -> None:
    """Write a graph with the weights of its matrix products and embeddings in 8 bits, by onnxruntime's quantizer.

    The weights are unsigned: with signed ones the products overflow on CPUs without VNNI.
    """
    import onnx_ir as ir
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph = ir.load(file)
    tied = _untie(graph.graph)
    untied = file.with_name(f"untied_{file.name}")
    ir.save(graph, untied, external_data=f"{untied.name}.data")
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # the quantizer advises to infer shapes, which the exporter has done
    try:
        quantize_dynamic(
            untied,
            output,
            op_types_to_quantize=["MatMul", "Gather"],
            weight_type=QuantType.QUInt8,
            use_external_data_format=True,
            extra_options={"WeightSymmetric": False},
        )
    finally:
        root.setLevel(level)
    if tied:
        graph = ir.load(output)
        _tie(graph.graph, *(f"{name}_quantized" for name in tied))
        ir.save(graph, output, external_data=f"{output.name}.tied.data")


def _untie(graph: Any) -> tuple[str, str] | None:
    """Replace the transposed embedding of the output projection by a weight, which the quantizer requires.

    Returns the names of the embedding and of the new weight; None if the graph has none.
    """
    import onnx_ir as ir

    for node in graph:
        source = node.inputs[0] if node.op_type == "Transpose" else None
        if source is not None and source.name in graph.initializers:
            name = f"{source.name}_transposed"
            tensor = ir.tensor(source.const_value.numpy().T.copy(), name=name)
            weight = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
            graph.register_initializer(weight)
            ir.convenience.replace_all_uses_with(node.outputs[0], weight)
            graph.remove(node, safe=True)
            return source.name, name
    return None


def _tie(graph: Any, embedding: str, transposed: str) -> None:
    """Replace a weight by the transposed embedding, which is the same in 8 bits: scale and zero point are equal."""
    import onnx_ir as ir

    source, weight = graph.initializers[embedding], graph.initializers[transposed]
    node = ir.node("Transpose", [source], attributes={"perm": [1, 0]})
    graph.insert_before(graph[0], node)
    ir.convenience.replace_all_uses_with(weight, node.outputs[0])
    del graph.initializers[transposed]


# ---- the first and the later steps of the decoder in one graph ----


def join_decoder(first_past: Path, step: Path) -> Any:
    """Return the model of the decoder with and without earlier steps, as the input `use_cache_branch` says.

    Without, what it takes from earlier steps is that of `first_past`. With, it returns empty tensors for the keys and
    values of the cross-attention: they are those of the first step.
    """
    import onnx_ir as ir

    first, graph = ir.load(first_past).graph, ir.load(step).graph
    tokens, *used = graph.inputs
    past, states = [_like(value) for value in used], _like(first.inputs[0])
    weights = list(first.initializers.values())
    choice = _choice(first, past, states)
    first.initializers.clear()
    for value in weights:
        value.name = f"first/{value.name}"
        graph.register_initializer(value)
    for old, new in zip(used, choice.outputs, strict=False):
        ir.convenience.replace_all_uses_with(old, new)
    graph.insert_before(graph[0], choice)
    graph.inputs[:] = [tokens, states, *past, choice.inputs[0]]
    logits, *own = graph.outputs
    cross = iter(choice.outputs[len(past) :])
    own_values = iter(own)
    outputs = [next(own_values if ".decoder." in value.name else cross) for value in past]
    for value, template in zip(outputs, past, strict=True):
        value.name = template.name.replace("past_key_values", "present")
    graph.outputs[:] = [logits, *outputs]
    return ir.Model(graph, ir_version=10, producer_name="askd_hf")


def _like(value: Any) -> Any:
    """Return a new value with the name, the type and the sizes of another one."""
    import onnx_ir as ir

    return ir.Value(name=value.name, shape=value.shape, type=value.type)


def _choice(first: Any, past: list[Any], states: Any) -> Any:
    """Return the node that chooses between `past` and the outputs of the graph `first`.

    Its outputs are the tensors of earlier steps, and then those of the cross-attention once more, which are empty if
    `past` is chosen.
    """
    import onnx_ir as ir

    ir.convenience.replace_all_uses_with(first.inputs[0], states)
    computed, nodes = list(first.outputs), list(first)
    first.outputs.clear()
    first.inputs.clear()
    first.remove(nodes)
    for node in nodes:
        node.name = f"first/{node.name}"
        for value in node.outputs:
            value.name = f"first/{value.name}"
    cross = [i for i, value in enumerate(past) if ".encoder." in value.name]
    again = [ir.node("Identity", [computed[i]]) for i in cross]
    given = [ir.node("Identity", [value]) for value in past]
    empty = [ir.node("Constant", [], attributes={"value": _empty(past[i])}) for i in cross]
    for prefix, added in (("first/again", again), ("next/past", given), ("next/empty", empty)):
        for i, node in enumerate(added):
            node.outputs[0].name = node.name = f"{prefix}_{i}"
    named = [*past, *(past[i] for i in cross)]
    for node, template in zip([*given, *empty, *again], [*named, *named[len(past) :]], strict=True):
        node.outputs[0].type = template.type
    then_branch = ir.Graph([], [node.outputs[0] for node in [*given, *empty]], nodes=[*given, *empty], name="next")
    repeated = [node.outputs[0] for node in again]
    else_branch = ir.Graph([], [*computed, *repeated], nodes=[*nodes, *again], name="first")
    flag = ir.Value(name="use_cache_branch", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.BOOL))
    attributes = {"then_branch": then_branch, "else_branch": else_branch}
    choice = ir.node("If", [flag], attributes=attributes, num_outputs=len(named), name="use_cache_branch")
    for i, (value, template) in enumerate(zip(choice.outputs, named, strict=True)):
        value.name, value.type = f"chosen_{i}", template.type
        sizes = list(template.shape)
        value.shape = ir.Shape([sizes[0], sizes[1], f"chosen_size_{i}", sizes[3]])
    return choice


def _empty(value: Any) -> Any:
    """Return an empty tensor with the heads and the width of `value`, `(0, heads, 1, width)`, as optimum does."""
    import onnx_ir as ir

    _, heads, _, width = value.shape
    return ir.tensor(np.zeros((0, int(heads), 1, int(width)), np.float32))


def save_graph(model: Any, file: Path) -> bool:
    """Write a graph with its weights, and return whether they are too large for one file and beside it, in FILE_data.

    transformers.js looks for the weights under this name.
    """
    import onnx_ir as ir

    ir.passes.common.ClearMetadataAndDocStringPass()(model)  # where torch traced each node, with paths of this machine
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    if size > LARGEST_FILE:
        ir.save(model, file, external_data=f"{file.name}_data")
        return True
    ir.external_data.load_to_model(model)
    ir.save(model, file)
    return False
