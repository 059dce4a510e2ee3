"""Export a Whisper model to CTranslate2, the runtime of faster-whisper, and transcribe with it."""

import copy
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from ..data import SAMPLING_RATE
from ..data.audio_context import context_frames
from ..errors import UserError
from ..models.generation_config import MULTILINGUAL_VOCABULARY, alignment_heads, is_multilingual
from .comparison import Transcriber, atomic_output_dir, input_features

FASTER_WHISPER_WINDOW = 30  # seconds; faster-whisper supports no other window
WARM_UP = ((False, False), (True, False))  # untimed passes of the first clip: whether at its own context, timed


def check_extra() -> None:
    """Raise `UserError` if the packages that the export requires aren't installed."""
    try:
        import ctranslate2  # noqa: F401
        import faster_whisper  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"the export requires ctranslate2 and faster-whisper ({error}). Install them with "
            "pip install 'askd-hf[export]'"
        ) from error


def faster_whisper_obstacle(model: WhisperForConditionalGeneration, processor: WhisperProcessor) -> str | None:
    """Return why faster-whisper can't run a model; None if it can. CTranslate2 itself can."""
    window = processor.feature_extractor.chunk_length
    if window != FASTER_WHISPER_WINDOW:
        return f"it pads all audio to {FASTER_WHISPER_WINDOW} s, and the model's window is {window} s"
    if is_multilingual(model) and model.config.vocab_size < MULTILINGUAL_VOCABULARY:
        return (
            f"it takes a model with fewer than {MULTILINGUAL_VOCABULARY:,} tokens for an English-only one, and this "
            f"multilingual model has {model.config.vocab_size:,}"
        )
    return None


# ---- to CTranslate2 ----


def export_ctranslate2(
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    output_dir: str | Path,
    quantization: str | None = None,
) -> None:
    """Write `model` to a directory for `faster_whisper.WhisperModel`, using CTranslate2's converter.

    The alignment heads are those of the model's generation config. If it has none, or one of them doesn't exist, the
    directory has none, and faster-whisper rejects `word_timestamps=True`. The converter's default (all heads of the
    last layers) would give timestamps of unknown quality, and heads of missing layers would crash faster-whisper.

    Args:
        output_dir: directory to write; must be empty or not exist.
        quantization: CTranslate2's type of the weights: "float16", "int8", ... None for that of the model.

    Raises `UserError` if `output_dir` isn't empty or can't be written.
    """
    from ctranslate2.converters import TransformersConverter

    class Loaded(TransformersConverter):
        """Converts the loaded model."""

        def load_model(self, *args: Any, **kwargs: Any) -> WhisperForConditionalGeneration:
            # the converter makes integers of float32 weights in place
            return copy.deepcopy(model) if (quantization or "").startswith("int") else model

        def load_tokenizer(self, *args: Any, **kwargs: Any) -> Any:
            return processor.tokenizer

    with atomic_output_dir(output_dir) as (directory, source):
        model.config.save_pretrained(source)  # read by the converter
        Loaded(str(source)).convert(str(directory), quantization=quantization, force=True)
        config_file = directory / "config.json"
        config = json.loads(config_file.read_text(encoding="utf-8"))
        config.pop("alignment_heads", None)
        if heads := alignment_heads(model):
            config["alignment_heads"] = heads
        config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        processor.tokenizer.save_pretrained(directory)
        processor.feature_extractor.save_pretrained(directory)


# ---- transcripts of the same clips ----


def ctranslate2_transcriber(
    directory: str | Path, processor: WhisperProcessor, positions: int, threads: int = 0
) -> Transcriber:
    """Load a model that transcribes as `transformers_transcriber`'s does, from the same features.

    Args:
        directory: the result of `export_ctranslate2`.
        positions: `max_target_positions` of the decoder.
        threads: 0 for CTranslate2's default.
    """
    import ctranslate2

    model = ctranslate2.models.Whisper(str(directory), device="cpu", intra_threads=threads)
    return lambda clip: _generate(model, processor, input_features(processor, clip).numpy(), positions)


def _generate(model: Any, processor: WhisperProcessor, features: np.ndarray, positions: int) -> str:
    """Transcribe one clip with a `ctranslate2.models.Whisper`.

    Args:
        features: `(1, mel bins, frames)`, of the whole window or fewer frames.
    """
    from ctranslate2 import StorageView

    inputs = StorageView.from_array(np.ascontiguousarray(features))
    result = model.generate(inputs, [processor.tokenizer.prefix_tokens], beam_size=1, max_length=positions)[0]
    return processor.tokenizer.decode(result.sequences_ids[0], skip_special_tokens=True)


class ContextComparison(NamedTuple):
    """Texts and seconds of CTranslate2, with the whole window and with the audio context of each clip."""

    window_texts: list[str]
    clip_texts: list[str]
    window_seconds: float  # of `generate` for all clips, batch size 1
    clip_seconds: float


def transcribe_at_clip_context(
    directory: str | Path, processor: WhisperProcessor, clips: Iterable[np.ndarray], positions: int
) -> ContextComparison:
    """Transcribe each clip with CTranslate2 at the whole window, then at its own audio context.

    Args:
        clips, positions: see `ctranslate2_transcriber`.
    """
    import ctranslate2

    model = ctranslate2.models.Whisper(str(directory), device="cpu")
    texts: dict[bool, list[str]] = {False: [], True: []}
    seconds = {False: 0.0, True: 0.0}
    for number, clip in enumerate(clips):
        features = input_features(processor, clip).numpy()
        frames = context_frames(len(clip) / SAMPLING_RATE, features.shape[-1])
        inputs = {False: features, True: features[..., :frames]}
        for own, timed in [(False, True), (True, True)] if number else [*WARM_UP, (False, True), (True, True)]:
            start = time.perf_counter()
            text = _generate(model, processor, inputs[own], positions)
            if len(texts[own]) == number:
                texts[own].append(text)
            if timed:
                seconds[own] += time.perf_counter() - start
    return ContextComparison(texts[False], texts[True], seconds[False], seconds[True])


def faster_whisper_transcriber(directory: str | Path, language: str, task: str, threads: int = 0) -> Transcriber:
    """Load a model that transcribes as `transformers_transcriber`'s does, from features of its own.

    Args:
        threads: 0 for CTranslate2's default.
    """
    import faster_whisper

    model = faster_whisper.WhisperModel(str(directory), device="cpu", cpu_threads=threads)
    # without the temperature fallback and the no-speech check of faster-whisper
    options = dict(beam_size=1, temperature=0.0, without_timestamps=True, condition_on_previous_text=False)
    options |= dict(no_speech_threshold=None, log_prob_threshold=None, compression_ratio_threshold=None)

    def transcribe(clip: np.ndarray) -> str:
        segments, _ = model.transcribe(clip, language=language, task=task, **options)
        return "".join(segment.text for segment in segments)

    return transcribe
