"""Export a Whisper model to sherpa-onnx, and transcribe with sherpa-onnx.

The files have the layout of sherpa-onnx's `scripts/whisper/export-onnx.py`: encoder, decoder and `tokens.txt`.
sherpa-onnx reads the shape of the model and the ids of its special tokens from the encoder's metadata, so that any
number of layers, a smaller vocabulary and a shorter window are possible.
"""

import base64
from pathlib import Path
from typing import Any

import numpy as np
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from ..data import SAMPLING_RATE
from ..errors import UserError
from ..models.generation_config import is_multilingual
from . import onnx
from .comparison import Transcriber, atomic_output_dir
from .ggml import HOP_LENGTH, N_FFT, text_tokens
from .onnx_graphs import quantize, save_graph
from .sherpa_onnx_graphs import write_graphs

MAINTAINER = "askd-hf"
MOST_FRAMES = 3000  # sherpa-onnx pads a clip to at most this many frames
TOKENS_PER_SECOND = 6  # sherpa-onnx stops decoding after this many tokens per second of the clip
DELAY = 80  # samples; sherpa-onnx's frames are this much later than Whisper's


def check_sherpa_onnx_extra() -> None:
    """Raise `UserError` if sherpa-onnx, or packages that the export requires, aren't installed."""
    onnx.check_extra()
    try:
        import sherpa_onnx  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"the comparison requires sherpa-onnx ({error}). Install it with pip install 'askd-hf[sherpa-onnx]'"
        ) from error


# ---- what sherpa-onnx can run ----


def check_sherpa_onnx(model: WhisperForConditionalGeneration, processor: WhisperProcessor) -> None:
    """Raise `UserError` if sherpa-onnx can't run the model."""
    if obstacle := sherpa_onnx_obstacle(model, processor):
        raise UserError(f"sherpa-onnx can't run this model: {obstacle}")


def sherpa_onnx_obstacle(model: WhisperForConditionalGeneration, processor: WhisperProcessor) -> str | None:
    """Return why sherpa-onnx can't run a model; None if it can."""
    extractor, vocabulary = processor.feature_extractor, processor.tokenizer.get_vocab()
    if (extractor.n_fft, extractor.hop_length, extractor.sampling_rate) != (N_FFT, HOP_LENGTH, SAMPLING_RATE):
        return (
            f"it computes features only with frames of {N_FFT} samples, a hop of {HOP_LENGTH} and {SAMPLING_RATE:,} Hz"
        )
    required = ["<|startoftranscript|>", "<|notimestamps|>"]
    if is_multilingual(model):
        required += ["<|transcribe|>", "<|translate|>", *model.generation_config.lang_to_id]
    if missing := [name for name in required if name not in vocabulary]:
        return f"it requires the special token {missing[0]}, which this model lacks"
    return None


def restrictions(processor: WhisperProcessor) -> list[str]:
    """Return what sherpa-onnx can't do with a model, one sentence each."""
    window = processor.feature_extractor.chunk_length
    found = [
        "no word timestamps: the graphs have no cross-attentions",
        f"it ends a text after {TOKENS_PER_SECOND} tokens per second of the clip: append silence if this is too few",
    ]
    if window < 30:
        found.append(f"it cuts off audio after {window} s")
    return found


# ---- to sherpa-onnx ----


def export_sherpa_onnx(
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    output_dir: str | Path,
    quantization: str | None = None,
) -> None:
    """Write `model` to a directory for sherpa-onnx, using torch's ONNX exporter.

    Args:
        output_dir: directory to write; must be empty or not exist.
        quantization: "int8" for weights of 8 bits, None for float32.

    Raises `UserError` if `output_dir` isn't empty or can't be written, and as `check_sherpa_onnx` does.
    """
    import onnx_ir as ir

    check_sherpa_onnx(model, processor)
    with atomic_output_dir(output_dir) as (directory, parts):
        metadata = sherpa_onnx_metadata(model, processor)
        graphs = model_files(directory, quantization)[:2]
        for traced, file in zip(write_graphs(model, parts), graphs, strict=True):
            source = traced
            if quantization == "int8":
                source = traced.with_name(f"8_bits_{traced.name}")
                quantize(traced, source)
            graph = ir.load(source)
            graph.metadata_props.update(metadata)  # read from the encoder only
            save_graph(graph, file)
        _write_tokens(processor, directory / "tokens.txt")


def model_files(directory: str | Path, quantization: str | None = None) -> tuple[Path, Path, Path]:
    """Return the paths of encoder, decoder and tokens."""
    ending = "int8.onnx" if quantization == "int8" else "onnx"
    names = (f"encoder.{ending}", f"decoder.{ending}", "tokens.txt")
    encoder, decoder, tokens = (Path(directory) / name for name in names)
    return encoder, decoder, tokens


def sherpa_onnx_metadata(model: WhisperForConditionalGeneration, processor: WhisperProcessor) -> dict[str, str]:
    """Return what sherpa-onnx reads beside the graphs: the shape of the model and the ids of special tokens.

    A token that the model lacks has the id of the end of text: sherpa-onnx ends the process if an id is negative.
    """
    config, generation, ids = model.config, model.generation_config, processor.tokenizer.get_vocab()
    end, start = ids["<|endoftext|>"], ids["<|startoftranscript|>"]
    transcribe = ids.get("<|transcribe|>", end)
    languages = {name.strip("<|>"): i for name, i in getattr(generation, "lang_to_id", {}).items()}
    multilingual = is_multilingual(model)
    default = languages.get(getattr(generation, "language", None) or "en", next(iter(languages.values()), end))
    values: dict[str, Any] = dict(model_type="whisper", version=1, maintainer=MAINTAINER)
    values |= dict(n_mels=config.num_mel_bins, n_vocab=config.vocab_size)
    for side, source, part in (("audio", "source", "encoder"), ("text", "target", "decoder")):
        values[f"n_{side}_ctx"] = getattr(config, f"max_{source}_positions")
        values[f"n_{side}_state"] = config.d_model
        values[f"n_{side}_head"] = getattr(config, f"{part}_attention_heads")
        values[f"n_{side}_layer"] = getattr(config, f"{part}_layers")
    values |= dict(
        is_multilingual=int(multilingual),
        sot_sequence=[start, default, transcribe] if multilingual else [start],
        sot=start,
        sot_index=0,
        eot=end,
        blank_id=ids.get("Ġ", end),
        all_language_tokens=languages.values(),
        all_language_codes=languages,
        non_speech_tokens=[token for token in generation.suppress_tokens or [] if token < end],
        transcribe=transcribe,
        translate=ids.get("<|translate|>", end),
        sot_prev=ids.get("<|startofprev|>", end),
        sot_lm=ids.get("<|startoflm|>", end),
        no_speech=ids.get("<|nospeech|>", ids.get("<|nocaptions|>", end)),
        no_timestamps=ids["<|notimestamps|>"],
    )
    return {
        name: str(value) if isinstance(value, int | str) else ",".join(map(str, value))
        for name, value in values.items()
    }


def _write_tokens(processor: WhisperProcessor, file: Path) -> None:
    """Write the bytes of the text tokens, in base64, with their ids. Tokens that aren't in the file have no text."""
    lines = [
        f"{base64.b64encode(text).decode()} {i}\n" for i, text in enumerate(text_tokens(processor.tokenizer)) if text
    ]
    file.write_text("".join(lines), encoding="utf-8")


# ---- transcripts ----


def sherpa_onnx_transcriber(
    directory: str | Path, language: str, task: str, quantization: str | None = None, threads: int = 1
) -> Transcriber:
    """Load a model that transcribes as `transformers_transcriber`'s does, from features of its own.

    Args:
        directory: the result of `export_sherpa_onnx`.
        language: the code; of no effect for an English-only model.
        quantization: of `export_sherpa_onnx`.
        threads: number of CPU threads. Default: 1.
    """
    import sherpa_onnx

    recognizer = sherpa_onnx.OfflineRecognizer.from_whisper(
        *map(str, model_files(directory, quantization)),
        language=language,
        task=task,
        num_threads=threads,
        tail_paddings=MOST_FRAMES,
    )

    def transcribe(clip: np.ndarray) -> str:
        stream = recognizer.create_stream()
        stream.accept_waveform(SAMPLING_RATE, np.pad(clip, (DELAY, 0)))
        recognizer.decode_stream(stream)
        return stream.result.text

    return transcribe
