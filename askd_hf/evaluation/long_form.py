"""Long recordings, and timestamps, through transformers' pipeline."""

import copy
import io
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import soundfile
from datasets import Audio, Dataset
from tqdm.auto import tqdm
from transformers import (
    AutomaticSpeechRecognitionPipeline,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    pipeline,
)
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from ..data.audio import SAMPLING_RATE, waveform
from ..errors import UserError

Method = Literal["short", "sequential", "chunked"]
Timestamps = Literal["none", "segment", "word"]


@dataclass
class Transcript:
    """What a model made of a recording.

    Attributes:
        text: as the model wrote it.
        chunks: (start, end, text) of the segments or words, seconds from the recording's beginning; None unless asked
            for. Where the model gave no end it is the recording's; where it gave no start, the end before.
        duration: of the recording, seconds.
        seconds: spent on it, features included; in a batch every clip has an equal share.
        tokens: of the text as the tokenizer splits it: the pipeline doesn't tell how many were generated.
    """

    text: str
    chunks: list[tuple[float, float, str]] | None
    duration: float
    seconds: float
    tokens: int


def transcribe_long(
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    clips: Sequence[Mapping[str, Any]],
    method: Method,
    *,
    batch_size: int = 1,
    timestamps: Timestamps = "none",
    num_beams: int = 1,
    max_length: int | None = None,
) -> Iterator[Transcript]:
    """Transcribe recordings of any length where the model is, in the language of its generation config.

    "sequential" is Whisper's own way (Radford et al. 2023, section 3.8): window after window, each from where the last
    timestamp of the one before is; without its sampling at higher temperatures, so that every run gives the same. It
    needs a model that predicts timestamps. "chunked" cuts the recording into windows that overlap by a third, decodes
    `batch_size` of them at once and joins the texts where they agree, as distil-whisper does (Gandhi et al. 2023).
    A model that was trained with timestamps can end a window at a pause without them, and what follows is lost: such
    a one is steadier with `timestamps="segment"`. "short" is for timestamps of clips that fit into a window,
    `batch_size` of them at once.

    Args:
        clips: rows of `load_speech_dataset` or `join_clips`: `audio` and `clip` are read.
        timestamps: fill in `Transcript.chunks`. "word" needs the alignment heads of the model's generation config.
        num_beams: of beam search; 1 is greedy (the pipeline's own default is 5).
        max_length: tokens of a window, at most. Default: that of the model's generation config.

    Returns:
        The transcripts in the order of the rows, one by one as they are ready.

    Raises:
        UserError: at once, if the model can't do what is asked; later, for a clip that can't be decoded, or is too
            long for "short".
    """
    check_can_transcribe(model, method, timestamps)
    generate_kwargs: dict[str, Any] = {"num_beams": num_beams, "do_sample": False}
    if max_length is not None:
        generate_kwargs["max_length"] = max_length
    options: dict[str, Any] = {"generate_kwargs": generate_kwargs}
    if method == "chunked":
        # of the model: 30 s for Whisper. The warning says that sequential is more accurate
        options |= {"chunk_length_s": processor.feature_extractor.chunk_length, "ignore_warning": True}
    if method != "sequential":
        options["batch_size"] = batch_size
    if timestamps != "none" or method == "sequential":
        options["return_timestamps"] = "word" if timestamps == "word" else True
    tokenizer = copy.deepcopy(processor.tokenizer)
    # words of Chinese, Japanese and such aren't between spaces, which the pipeline knows by the language's name only
    tokenizer.language = LANGUAGES.get(tokenizer.language, tokenizer.language)
    recognizer = pipeline(
        "automatic-speech-recognition",
        model=model.eval(),
        tokenizer=tokenizer,
        feature_extractor=processor.feature_extractor,
        device=model.device,
    )
    return _transcripts(recognizer, clips, batch_size if method == "short" else 1, method, timestamps, options)


def check_can_transcribe(model: WhisperForConditionalGeneration, method: Method, timestamps: Timestamps) -> None:
    """Raise `UserError` if the model lacks the tokens or the alignment heads for it."""
    config, generation = model.config, model.generation_config
    name = model.name_or_path or "the model"
    if method == "sequential" or timestamps != "none":
        what = "sequential transcription" if timestamps == "none" else f"{timestamps} timestamps"
        first = getattr(generation, "no_timestamps_token_id", None)  # there only if its file has it
        # one for every position of the encoder, 0.02 s apart, and one for the end
        if first is None or first + config.max_source_positions + 1 >= config.vocab_size:
            reason = "no no_timestamps_token_id" if first is None else "too few tokens for them in the vocabulary"
            raise UserError(
                f"{name} has no timestamp tokens ({reason}), so no {what}. The method chunked without timestamps works"
            )
    if timestamps == "word":
        heads = getattr(generation, "alignment_heads", None)
        if not heads:
            raise UserError(
                f"{name} has no alignment_heads in its generation config, so no word timestamps; ask for segment "
                "timestamps"
            )
        outside = [
            [layer, head]
            for layer, head in heads
            if not (0 <= layer < config.decoder_layers and 0 <= head < config.decoder_attention_heads)
        ]
        if outside:
            raise UserError(
                f"{name} has {config.decoder_layers} decoder layers with {config.decoder_attention_heads} heads, but "
                f"alignment_heads that name [layer, head] {outside}, counted from 0: they are another model's. "
                "Recompute or remove them; segment timestamps work without"
            )


def _transcripts(
    recognizer: AutomaticSpeechRecognitionPipeline,
    clips: Sequence[Mapping[str, Any]],
    at_once: int,
    method: Method,
    timestamps: Timestamps,
    options: dict[str, Any],
) -> Iterator[Transcript]:
    window = recognizer.feature_extractor.chunk_length
    for start in range(0, len(clips), at_once):
        rows = [clips[row] for row in range(start, min(start + at_once, len(clips)))]
        waves = [waveform(row) for row in rows]
        durations = [len(wave) / SAMPLING_RATE for wave in waves]
        for row, duration in zip(rows, durations, strict=True):
            if method == "short" and duration > window:
                raise UserError(
                    f"{row['clip']}: {duration:.1f} s, longer than the window of {window:g} s: transcribe long "
                    "recordings with the method sequential or chunked"
                )
        before = time.perf_counter()
        outputs = _recognize(recognizer, waves, options)
        seconds = (time.perf_counter() - before) / len(rows)
        for output, duration in zip(outputs, durations, strict=True):
            yield Transcript(
                text=output["text"],
                chunks=None if timestamps == "none" else _chunks(output["chunks"], duration),
                duration=duration,
                seconds=seconds,
                tokens=len(recognizer.tokenizer(output["text"], add_special_tokens=False).input_ids),
            )


def _recognize(
    recognizer: AutomaticSpeechRecognitionPipeline, waves: list[np.ndarray], options: dict[str, Any]
) -> list[dict[str, Any]]:
    model = recognizer.model
    attention = model.config._attn_implementation
    try:
        # arrays, because the pipeline would start ffmpeg for files
        return recognizer([{"raw": wave, "sampling_rate": SAMPLING_RATE} for wave in waves], **options)
    finally:
        # word timestamps leave the model with the slow attention that gives its weights out
        if model.config._attn_implementation != attention:
            model.set_attn_implementation(attention)


def _chunks(pieces: list[dict[str, Any]], duration: float) -> list[tuple[float, float, str]]:
    chunks: list[tuple[float, float, str]] = []
    for piece in pieces:
        start, end = piece["timestamp"]
        if start is None:
            start = chunks[-1][1] if chunks else 0.0
        chunks.append((float(start), duration if end is None else float(end), piece["text"]))
    return chunks


# ---- long recordings of short clips ----


def join_clips(dataset: Dataset, seconds: float, silence: float = 0.5) -> Dataset:
    """Long recordings made of short clips, for trying long-form transcription where there are no long ones.

    Clips that follow each other and are of one speaker are joined as long as they fit. A clip that is longer by itself
    stays alone.

    Args:
        dataset: of `load_speech_dataset`; a column `speaker` is heeded if there is one.
        seconds: the longest recording.
        silence: seconds between two clips.

    Returns:
        `audio`: WAV files in memory, 16 kHz, float32; `text`: the clips' joined by spaces; `clip`: the first clip's
        name and the number of the others; and `speaker`, if it was there.

    Raises:
        UserError: a clip can't be decoded.
    """
    has_speaker = "speaker" in dataset.column_names
    recordings: list[dict[str, Any]] = []
    members: list[dict[str, Any]] = []
    waves: list[np.ndarray] = []
    pause = np.zeros(round(silence * SAMPLING_RATE), dtype=np.float32)
    for row in tqdm(dataset, "Joining clips", leave=False):
        wave = waveform(row)
        joined = sum(map(len, waves)) + len(waves) * len(pause) + len(wave)
        same_speaker = not has_speaker or not members or row["speaker"] == members[-1]["speaker"]
        if members and (not same_speaker or joined > seconds * SAMPLING_RATE):
            recordings.append(_recording(members, waves, pause))
            members, waves = [], []
        members.append(row)
        waves.append(wave)
    if members:
        recordings.append(_recording(members, waves, pause))
    columns = ["audio", "text", "clip"] + (["speaker"] if has_speaker else [])
    table = pa.table({name: [recording[name] for recording in recordings] for name in columns})
    return Dataset(table).cast_column("audio", Audio(decode=False))


def _recording(members: list[dict[str, Any]], waves: list[np.ndarray], pause: np.ndarray) -> dict[str, Any]:
    pieces = [piece for wave in waves for piece in (pause, wave)][1:]
    file = io.BytesIO()
    soundfile.write(file, np.concatenate(pieces), SAMPLING_RATE, format="WAV", subtype="FLOAT")
    others = f" and {len(members) - 1} more" if len(members) > 1 else ""
    return {
        "audio": {"bytes": file.getvalue(), "path": None},
        "text": " ".join(text for row in members if (text := (row["text"] or "").strip())),
        "clip": members[0]["clip"] + others,
        "speaker": members[0].get("speaker"),
    }
