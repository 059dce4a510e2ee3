"""Export a Whisper model to ggml, the format of whisper.cpp, and transcribe with whisper.cpp.

The file is the one that whisper.cpp's `models/convert-h5-to-ggml.py` writes and, with blocks of 8 or 5 bits, its
`quantize`. whisper.cpp knows alignment heads of OpenAI's models only, so the file has none: an exported student gets
no word timestamps by attention (DTW).
"""

import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from transformers import WhisperForConditionalGeneration, WhisperProcessor, WhisperTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from ..data import SAMPLING_RATE
from ..errors import UserError
from ..models.generation_config import MULTILINGUAL_VOCABULARY
from .comparison import Transcriber, atomic_output_dir

MAGIC = 0x67676D6C
N_FFT, HOP_LENGTH = 400, 160  # samples; whisper.cpp supports no others
WHISPER_CPP_WINDOW = 30  # seconds by which it advances without timestamps
LARGE_V3_VOCABULARY = 51866
BLOCK = 32  # weights with a common scale


# Numbers of a file whose large weights have a type; with blocks plus 1000 times the version of the block format, 2.
# whisper.cpp 1.8 loads files of float32 alone (0), and aborts at the convolutions on a CPU.
FILE_TYPES = {"f16": 1, "q8_0": 2007, "q5_0": 2008}
TENSOR_TYPES = {"f32": 0, "f16": 1, "q8_0": 8, "q5_0": 6}
QUANTIZED = ("q8_0", "q5_0")
CONV_BIASES = ("encoder.conv1.bias", "encoder.conv2.bias")
ALWAYS_F32 = (*CONV_BIASES, "encoder.positional_embedding", "decoder.positional_embedding")
# parts of names of transformers, and of OpenAI; replaced in this order
RENAMED = {
    "model.": "",
    ".layers.": ".blocks.",
    "encoder_attn": "cross_attn",
    "self_attn": "attn",
    "_attn_layer_norm": "_attn_ln",
    ".attn_layer_norm": ".attn_ln",
    ".q_proj": ".query",
    ".k_proj": ".key",
    ".v_proj": ".value",
    ".out_proj": ".out",
    ".fc1": ".mlp.0",
    ".fc2": ".mlp.2",
    ".final_layer_norm": ".mlp_ln",
    "encoder.layer_norm": "encoder.ln_post",
    "decoder.layer_norm": "decoder.ln",
    "embed_positions.weight": "positional_embedding",
    "embed_tokens": "token_embedding",
}


def check_ggml_extra() -> None:
    """Raise `UserError` if pywhispercpp, with which transcripts are compared, isn't installed."""
    try:
        import pywhispercpp.model  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"the comparison requires pywhispercpp ({error}). Install it with pip install 'askd-hf[ggml]'"
        ) from error


# ---- what whisper.cpp can run ----


def check_ggml(model: WhisperForConditionalGeneration, processor: WhisperProcessor, quantization: str) -> None:
    """Raise `UserError` if whisper.cpp can't run the model, or if its width is not a multiple of the block."""
    if obstacle := ggml_obstacle(model, processor):
        raise UserError(f"whisper.cpp can't run this model: {obstacle}")
    if quantization in QUANTIZED and model.config.d_model % BLOCK:
        raise UserError(
            f"--quantization {quantization} stores blocks of {BLOCK} weights, and the model's width is "
            f"{model.config.d_model}. Use f16"
        )


def ggml_obstacle(model: WhisperForConditionalGeneration, processor: WhisperProcessor) -> str | None:
    """Return why whisper.cpp can't run a model; None if it can.

    It runs any number of layers in encoder and decoder, any width, number of mel bins and length of the window.
    """
    config, extractor = model.config, processor.feature_extractor
    for part, width in (("encoder", config.encoder_ffn_dim), ("decoder", config.decoder_ffn_dim)):
        if width != 4 * config.d_model:
            return (
                f"its feed-forward layers are {4 * config.d_model} wide, 4 times the model's width, and those of this "
                f"{part} are {width} wide"
            )
    if config.encoder_attention_heads != config.decoder_attention_heads:
        return (
            "it scales cross-attention by the encoder's number of heads, and this model has "
            f"{config.encoder_attention_heads} in the encoder and {config.decoder_attention_heads} in the decoder"
        )
    if config.activation_function != "gelu" or config.scale_embedding:
        return "it knows gelu as the only activation function, and embeddings that aren't scaled"
    if not model.proj_out.weight.equal(model.model.decoder.embed_tokens.weight):
        return "it projects onto the vocabulary by the token embeddings, and this model has other weights there"
    if (extractor.n_fft, extractor.hop_length, extractor.sampling_rate) != (N_FFT, HOP_LENGTH, SAMPLING_RATE):
        return (
            f"it computes features only with frames of {N_FFT} samples, a hop of {HOP_LENGTH} and {SAMPLING_RATE:,} Hz"
        )
    return _vocabulary_obstacle(processor.tokenizer, config.vocab_size)


def restrictions(model: WhisperForConditionalGeneration, processor: WhisperProcessor) -> list[str]:
    """Return what whisper.cpp can't do with a model, one sentence each."""
    window = processor.feature_extractor.chunk_length
    found = ["no word timestamps by attention: it knows the alignment heads of OpenAI's models only"]
    if window != WHISPER_CPP_WINDOW:
        found.append(
            f"without timestamps it transcribes only the first {window} s of every {WHISPER_CPP_WINDOW} s: give it "
            f"clips of up to {window} s"
        )
    if model.config.decoder_layers == 2 and model.config.vocab_size != LARGE_V3_VOCABULARY:
        found.append("no timestamps: it takes a decoder of 2 layers for that of an early Distil-Whisper")
    return found


def _vocabulary_obstacle(tokenizer: WhisperTokenizer, vocab_size: int) -> str | None:
    """Return which special token whisper.cpp would look for at another id than the tokenizer's."""
    ids = tokenizer.get_vocab()
    for names, expected in expected_ids(vocab_size).items():
        found = next((ids[name] for name in names if name in ids), None)
        if found != expected and not (found is None and expected < vocab_size):
            at = "none" if found is None else f"it at {found}"
            return (
                f"it expects {names[0]} at id {expected} in a vocabulary of {vocab_size:,} tokens, and the model has "
                f"{at}, as models with a reduced or another vocabulary than OpenAI's"
            )
    return None


def expected_ids(vocab_size: int) -> dict[tuple[str, ...], int]:
    """Return the ids that whisper.cpp derives from the size of the vocabulary, by the names of a special token."""
    multilingual = vocab_size >= MULTILINGUAL_VOCABULARY
    end = 50257 if multilingual else 50256
    ids: dict[tuple[str, ...], int] = {("<|endoftext|>",): end, ("<|startoftranscript|>",): end + 1}
    if multilingual:
        languages = list(LANGUAGES)[: vocab_size - MULTILINGUAL_VOCABULARY + 99]
        ids |= {(f"<|{language}|>",): end + 2 + i for i, language in enumerate(languages)}
    task = end + 101 + (vocab_size - MULTILINGUAL_VOCABULARY if multilingual else 0)
    single = ("<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>")
    ids |= {(name,): task + i for i, name in enumerate(single)}
    ids[("<|nospeech|>", "<|nocaptions|>")] = task + 4
    return ids | {("<|notimestamps|>",): task + 5, ("<|0.00|>",): task + 6}


# ---- to ggml ----


def export_ggml(
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    output_dir: str | Path,
    quantization: str = "f16",
) -> Path:
    """Write `model` to a file for whisper.cpp, and return its path: OUTPUT_DIR/ggml-model-f16.bin.

    Biases, norms, and positions are float32 in all files, convolutions float16 in quantized ones.

    Args:
        output_dir: directory to write; must be empty or not exist.
        quantization: type of the weights: "f16", "q8_0" or "q5_0", the latter in blocks of 32 integers of 8 or 5 bits
            with a float16 scale, 8.5 or 5.5 bits per weight.

    Raises `UserError` if `output_dir` isn't empty or can't be written, and as `check_ggml` does.
    """
    check_ggml(model, processor, quantization)
    file = ggml_file(output_dir, quantization)
    with atomic_output_dir(output_dir) as (directory, _), (directory / file.name).open("wb") as opened:
        _write_header(opened, model, FILE_TYPES[quantization])
        _write_filters(opened, processor.feature_extractor.mel_filters)
        _write_tokens(opened, processor.tokenizer)
        for source, weight in model.state_dict().items():
            if source != "proj_out.weight":  # the token embeddings
                _write_tensor(opened, tensor_name(source), weight.float().cpu().numpy(), quantization)
    return file


def ggml_file(output_dir: str | Path, quantization: str) -> Path:
    """Return the path of the file that `export_ggml` writes."""
    return Path(output_dir) / f"ggml-model-{quantization}.bin"


def _write_header(file: BinaryIO, model: WhisperForConditionalGeneration, file_type: int) -> None:
    config = model.config
    encoder = (config.max_source_positions, config.d_model, config.encoder_attention_heads, config.encoder_layers)
    decoder = (config.max_target_positions, config.d_model, config.decoder_attention_heads, config.decoder_layers)
    file.write(struct.pack("<12i", MAGIC, config.vocab_size, *encoder, *decoder, config.num_mel_bins, file_type))


def _write_filters(file: BinaryIO, filters: np.ndarray) -> None:
    """Write the mel filters, `(frequencies, mel bins)`."""
    file.write(struct.pack("<2i", *filters.T.shape) + np.ascontiguousarray(filters.T, "<f4").tobytes())


def _write_tokens(file: BinaryIO, tokenizer: WhisperTokenizer) -> None:
    """Write the bytes of the text tokens by id. whisper.cpp adds the special tokens, which follow."""
    tokens = text_tokens(tokenizer)
    file.write(struct.pack("<i", len(tokens)))
    for token in tokens:
        file.write(struct.pack("<i", len(token)) + token)


def text_tokens(tokenizer: WhisperTokenizer) -> list[bytes]:
    """Return the bytes of the tokens before the end of text, by id. No bytes if there is no token with an id."""
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    names = {i: token for token, i in tokenizer.get_vocab().items()}
    count = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    return [bytes(byte_of[character] for character in names.get(i, "")) for i in range(count)]


def tensor_name(name: str) -> str:
    """Return OpenAI's name of a weight of transformers."""
    for ours, theirs in RENAMED.items():
        name = name.replace(ours, theirs)
    return name


def _write_tensor(file: BinaryIO, name: str, weight: np.ndarray, quantization: str) -> None:
    """Write a weight, float32, as the type that `quantization` has for its shape and name."""
    if name in CONV_BIASES:
        weight = weight[:, None]
    if weight.ndim < 2 or name in ALWAYS_F32:
        quantization = "f32"
    elif weight.ndim > 2 and quantization in QUANTIZED:
        quantization = "f16"
    data = {"f32": to_f32, "f16": to_f16, "q8_0": to_q8_0, "q5_0": to_q5_0}[quantization](weight)
    encoded = name.encode()
    file.write(struct.pack("<3i", weight.ndim, len(encoded), TENSOR_TYPES[quantization]))
    file.write(struct.pack(f"<{weight.ndim}i", *reversed(weight.shape)) + encoded + data)


# ---- types of weights ----


def to_f32(weight: np.ndarray) -> bytes:
    return weight.astype("<f4").tobytes()


def to_f16(weight: np.ndarray) -> bytes:
    return weight.astype("<f2").tobytes()


def to_q8_0(weight: np.ndarray) -> bytes:
    """Quantize to blocks of a float16 scale and 32 int8, as ggml's `quantize_row_q8_0_ref`."""
    blocks = weight.reshape(-1, BLOCK)
    scale = np.abs(blocks).max(1) / np.float32(127)
    scaled = blocks * _inverse(scale)
    rounded = np.copysign(np.floor(np.abs(scaled) + np.float32(0.5)), scaled)  # halves away from zero
    return _joined(scale, rounded.astype(np.int8).view(np.uint8))


def to_q5_0(weight: np.ndarray) -> bytes:
    """Quantize to blocks of a float16 scale, 32 fifth bits and 32 times 4 bits, as ggml's `quantize_row_q5_0_ref`.

    The weight with the largest magnitude becomes -16 times the scale, which has the opposite sign.
    """
    blocks = weight.reshape(-1, BLOCK)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], 1)[:, 0]
    scale = largest / np.float32(-16)
    integers = np.minimum(blocks * _inverse(scale) + np.float32(16.5), 31).astype(np.uint8)
    fifth = np.packbits(integers >> 4, axis=1, bitorder="little")
    low, high = integers[:, : BLOCK // 2] & 15, integers[:, BLOCK // 2 :] & 15
    return _joined(scale, fifth, low | high << 4)


def _inverse(scale: np.ndarray) -> np.ndarray:
    """Return 1 / scale, 0 for blocks of zeros: `(blocks, 1)`."""
    return np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)[:, None]


def _joined(scale: np.ndarray, *integers: np.ndarray) -> bytes:
    """Return the bytes of blocks: the scales `(blocks,)` as float16, then uint8 `(blocks, bytes)`."""
    return np.concatenate([scale.astype("<f2")[:, None].view(np.uint8), *integers], axis=1).tobytes()


# ---- transcripts ----


def whisper_cpp_transcriber(
    file: str | Path, model: WhisperForConditionalGeneration, language: str, task: str, threads: int = 1
) -> Transcriber:
    """Load a model that transcribes as `transformers_transcriber`'s does, from features of its own.

    It returns no text for clips shorter than 0.1 s.

    Args:
        file: the result of `export_ggml`.
        model: the exported model; its generation config says which tokens to suppress.
        threads: number of CPU threads. Default: 1.
    """
    from pywhispercpp.model import Model

    suppressed = model.generation_config
    options: dict[str, Any] = dict(n_threads=threads, language=language, translate=task == "translate")
    options["print_progress"] = False
    options |= dict(no_timestamps=True, single_segment=True)
    # whisper.cpp's own lists of tokens, which are OpenAI's
    options |= dict(suppress_nst=bool(suppressed.suppress_tokens))
    options |= dict(suppress_blank=model.config.eos_token_id in (suppressed.begin_suppress_tokens or []))
    # without the temperature fallback and the no-speech check of whisper.cpp
    options |= dict(temperature_inc=0.0, no_speech_thold=1.0)
    # flash attention also attends to padding behind the window
    context: Any = dict(use_gpu=False, flash_attn=False)
    whisper = Model(str(file), redirect_whispercpp_logs_to=None, context_params=context, **options)
    return lambda clip: "".join(segment.text for segment in whisper.transcribe(clip))
