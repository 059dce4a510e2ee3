"""Export a Whisper model to ONNX, for onnxruntime and transformers.js, and transcribe with it.

The directory is one that transformers.js loads: config, tokenizer and feature extractor, and in `onnx/` the graphs
`encoder_model` and `decoder_model_merged`, with the ending `_quantized` if their weights have 8 bits.
"""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
from transformers import GenerationConfig, WhisperForConditionalGeneration, WhisperProcessor

from ..errors import UserError
from ..models.generation_config import is_multilingual
from .comparison import Transcriber, atomic_output_dir, input_features
from .onnx_graphs import DECODER, ENCODER, join_decoder, quantize, save_graph, write_graphs

DEFAULT_LANGUAGE = "<|en|>"  # of transformers.js
# the types of transformers.js, and the endings of their files
ENDINGS = {"fp32": "", "q8": "_quantized"}


def check_extra() -> None:
    """Raise `UserError` if the packages that the export requires aren't installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"the export to ONNX requires onnx, onnxscript and onnxruntime ({error}). Install them with "
            "pip install 'askd-hf[onnx]'"
        ) from error


def restrictions(model: WhisperForConditionalGeneration, processor: WhisperProcessor) -> list[str]:
    """Return what transformers.js can't do with a model, one sentence each."""
    window = processor.feature_extractor.chunk_length
    found = ["no word timestamps: the graphs have no cross-attentions"]
    if window != 30:
        found.append(f"it cuts off audio after {window} s, unless it is called with chunk_length_s={window}")
    if is_multilingual(model) and getattr(model.generation_config, "language", None) is None:
        if DEFAULT_LANGUAGE in model.generation_config.lang_to_id:
            found.append("it doesn't detect the language: it takes English unless it is called with language=")
        else:
            found.append("it doesn't detect the language: call it with language=, as the model has no English")
    return found


# ---- to ONNX ----


def export_onnx(
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    output_dir: str | Path,
    quantization: str | None = None,
) -> None:
    """Write `model` to a directory for `transformers.js` and onnxruntime, using torch's ONNX exporter.

    Args:
        output_dir: directory to write; must be empty or not exist.
        quantization: "int8" for weights of 8 bits, None for float32.

    Raises `UserError` if `output_dir` isn't empty or can't be written.
    """
    dtype = "q8" if quantization == "int8" else "fp32"
    with atomic_output_dir(output_dir) as (directory, parts):
        (directory / "onnx").mkdir()
        large = _write_onnx(model, parts, directory / "onnx", dtype)
        _write_configs(model, processor, directory, {"dtype": dtype} | large)


def _write_onnx(model: WhisperForConditionalGeneration, parts: Path, output: Path, dtype: str) -> dict[str, Any]:
    """Write both graphs, and return the setting of transformers.js for weights beside a graph.

    Args:
        parts: directory for temporary files.
    """
    import onnx_ir as ir

    files = write_graphs(model, parts)
    if dtype == "q8":
        for file in files:
            quantize(file, file.with_name(f"8_bits_{file.name}"))
    prefix = "8_bits_" if dtype == "q8" else ""
    encoder, first_past, step = (file.with_name(f"{prefix}{file.name}") for file in files)
    graphs = {ENCODER: ir.load(encoder), DECODER: join_decoder(first_past, step)}
    names = {name: f"{name}{ENDINGS[dtype]}.onnx" for name in graphs}
    beside = {names[name]: 1 for name, graph in graphs.items() if save_graph(graph, output / names[name])}
    return {"use_external_data_format": beside} if beside else {}


def _write_configs(
    model: WhisperForConditionalGeneration, processor: WhisperProcessor, directory: Path, settings: dict[str, Any]
) -> None:
    """Write the configs, the tokenizer and the feature extractor.

    Args:
        settings: of transformers.js.
    """
    config = copy.deepcopy(model.config)
    setattr(config, "transformers.js_config", settings)
    config.save_pretrained(directory)
    portable_generation_config(model).save_pretrained(directory)
    processor.tokenizer.save_pretrained(directory)
    processor.feature_extractor.save_pretrained(directory)


def portable_generation_config(model: WhisperForConditionalGeneration) -> GenerationConfig:
    """Return the generation config for transformers.js.

    It has the number of tokens, which is 20 there by default, and no alignment heads. That of an English-only model
    has neither language nor task, which transformers.js rejects.
    """
    config = copy.deepcopy(model.generation_config)
    config.max_length = model.config.max_target_positions
    dropped = ["alignment_heads"] + ([] if is_multilingual(model) else ["language", "task"])
    for name in dropped:
        if hasattr(config, name):
            delattr(config, name)
    return config


# ---- transcripts ----


class OnnxWhisper:
    """An exported model in onnxruntime on the CPU, decoding greedily.

    Args:
        directory: of `export_onnx`.
        threads: of onnxruntime, which doesn't read OMP_NUM_THREADS.
    """

    def __init__(self, directory: str | Path, threads: int = 1):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads

        directory = Path(directory)
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        ending = ENDINGS[config["transformers.js_config"]["dtype"]]
        self.layers, self.heads = config["decoder_layers"], config["decoder_attention_heads"]
        self.width, self.positions = config["d_model"] // self.heads, config["max_target_positions"]
        self.generation = GenerationConfig.from_pretrained(directory)
        self.encoder, self.decoder = (
            onnxruntime.InferenceSession(
                directory / "onnx" / f"{name}{ending}.onnx", options, providers=["CPUExecutionProvider"]
            )
            for name in (ENCODER, DECODER)
        )

    def encode(self, features: np.ndarray) -> np.ndarray:
        """Return the hidden states `(batch, positions, width)` of features `(batch, mel bins, frames)`."""
        return self.encoder.run(None, {"input_features": features})[0]

    def decode(
        self, tokens: np.ndarray, states: np.ndarray, past: dict[str, np.ndarray] | None
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return the logits of tokens `(batch, length)`, and the keys and values for the next step.

        Args:
            states: of `encode`.
            past: keys and values of earlier steps. None at first.
        """
        empty = np.zeros((len(tokens), self.heads, 0, self.width), np.float32)
        names = [name for name in (value.name for value in self.decoder.get_inputs()) if name.startswith("past")]
        inputs = dict.fromkeys(names, empty) if past is None else past
        inputs = inputs | {"input_ids": tokens, "encoder_hidden_states": states}
        outputs = self.decoder.run(None, inputs | {"use_cache_branch": np.array([past is not None])})
        present = dict(zip((value.name for value in self.decoder.get_outputs()), outputs, strict=True))
        logits = present.pop("logits")
        present = {name.replace("present", "past_key_values"): value for name, value in present.items()}
        if past is not None:
            present |= {name: value for name, value in past.items() if ".encoder." in name}
        return logits, present

    def generate(self, features: np.ndarray, prompt: list[int], most: int) -> list[int]:
        """Return the tokens of one clip, without the prompt and the end of text.

        Args:
            features: `(1, mel bins, frames)`.
            most: the largest number of tokens.
        """
        states, past, tokens = self.encode(features), None, np.array([prompt])
        config, found = self.generation, list[int]()
        while len(found) < most:
            logits, past = self.decode(tokens, states, past)
            scores = logits[0, -1]
            scores[config.suppress_tokens or []] = -np.inf
            if not found:
                scores[config.begin_suppress_tokens or []] = -np.inf
            token = int(scores.argmax())
            if token == config.eos_token_id:
                break
            found.append(token)
            tokens = np.array([[token]])
        return found


def onnx_transcriber(directory: str | Path, processor: WhisperProcessor, threads: int = 1) -> Transcriber:
    """Load a model that transcribes as `transformers_transcriber`'s does, from the same features.

    Args:
        directory: the result of `export_onnx`.
        threads: number of CPU threads. Default: 1.
    """
    model = OnnxWhisper(directory, threads)

    def transcribe(clip: np.ndarray) -> str:
        features = input_features(processor, clip).numpy()
        tokens = model.generate(features, processor.tokenizer.prefix_tokens, model.positions // 2)
        return processor.tokenizer.decode(tokens, skip_special_tokens=True)

    return transcribe
