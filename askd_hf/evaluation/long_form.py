"""Transcription of long recordings, and with timestamps, through transformers' pipeline."""

import copy
import io
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import soundfile
from datasets import Audio, Dataset, concatenate_datasets
from transformers import (
    AutomaticSpeechRecognitionPipeline,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    pipeline,
)
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from ..data.audio import SAMPLING_RATE, waveform
from ..errors import UserError
from ..progress import progress

Method = Literal["short_form", "sequential", "chunked"]
Timestamps = Literal["none", "segment", "word"]
PART_BYTES = 10**9  # of the audio in one table


@dataclass
class LongFormTranscript:
    """Transcript of one recording."""

    text: str
    # (start, end, text) of each segment or word, seconds from the start of the recording; None unless requested. A
    # missing end is replaced by the end of the recording, a missing start by the previous end.
    chunks: list[tuple[float, float, str]] | None
    duration: float  # length of the recording in seconds
    # seconds spent on the recording, feature extraction included; a batch is divided equally
    transcription_time: float
    tokens: int  # length of the text in tokens. The pipeline doesn't return how many were generated.


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
) -> Iterator[LongFormTranscript]:
    """Transcribe recordings of any length, on the model's device and in the language of its generation config.

    - "sequential" is Whisper's algorithm (Radford et al. 2023, section 3.8): each window starts at the last timestamp
      of the previous one. Sampling at higher temperatures is off, so that results are reproducible. It requires a
      model that predicts timestamps.
    - "chunked" cuts the recording into windows that overlap by a third, decodes `batch_size` of them at a time and
      merges the texts where they agree, as Distil-Whisper does (Gandhi et al. 2023).
    - "short_form" decodes clips of at most one window with timestamps, `batch_size` at a time.

    Without timestamps, a model trained with them may stop at a pause and lose the rest of the window; use
    `timestamps="segment"`.

    Args:
        clips: rows of `load_speech_dataset` or `concatenate_clips`; `audio` and `clip` are read.
        batch_size: windows or clips per batch; "sequential" has none.
        timestamps: what to put into `LongFormTranscript.chunks`. "word" requires alignment heads in the model's
            generation config.
        num_beams: 1 is greedy (the pipeline's own default is 5).
        max_length: maximum number of tokens per window. Default: from the model's generation config.

    Returns:
        An iterator over the transcripts, in the order of the rows.

    Raises:
        UserError: immediately if the model lacks the required tokens or alignment heads; while iterating if a clip
            can't be decoded, or is too long for "short_form".
    """
    check_can_transcribe(model, method, timestamps)
    generate_kwargs: dict[str, Any] = {"num_beams": num_beams, "do_sample": False}
    if max_length is not None:
        generate_kwargs["max_length"] = max_length
    options: dict[str, Any] = {"generate_kwargs": generate_kwargs}
    if method == "chunked":
        # 30 s for Whisper. The ignored warning recommends the sequential algorithm
        options |= {"chunk_length_s": processor.feature_extractor.chunk_length, "ignore_warning": True}
    if method != "sequential":
        options["batch_size"] = batch_size
    if timestamps != "none" or method == "sequential":
        options["return_timestamps"] = "word" if timestamps == "word" else True
    tokenizer = copy.deepcopy(processor.tokenizer)
    # the pipeline splits words of languages without spaces, such as Chinese, by the name of the language, not its code
    tokenizer.language = LANGUAGES.get(tokenizer.language, tokenizer.language)
    recognizer = pipeline(
        "automatic-speech-recognition",
        model=model.eval(),
        tokenizer=tokenizer,
        feature_extractor=processor.feature_extractor,
        device=model.device,
    )
    return _transcripts(recognizer, clips, batch_size if method == "short_form" else 1, method, timestamps, options)


def check_can_transcribe(model: WhisperForConditionalGeneration, method: Method, timestamps: Timestamps) -> None:
    """Raise `UserError` if the model lacks the timestamp tokens or the alignment heads that are required."""
    config, generation = model.config, model.generation_config
    name = model.name_or_path or "the model"
    if method == "sequential" or timestamps != "none":
        what = "sequential transcription" if timestamps == "none" else f"{timestamps} timestamps"
        first = getattr(generation, "no_timestamps_token_id", None)  # absent unless generation_config.json has it
        # one timestamp token per encoder position (0.02 s), and one for the end
        if first is None or first + config.max_source_positions + 1 >= config.vocab_size:
            reason = "no_timestamps_token_id is not set" if first is None else "the vocabulary is too small"
            advice = "transcribe without timestamps" if timestamps != "none" else "use --long_form chunked"
            raise UserError(f"{name} has no timestamp tokens ({reason}), which are required for {what}: {advice}")
    if timestamps == "word":
        heads = getattr(generation, "alignment_heads", None)
        if not heads:
            raise UserError(
                f"word timestamps require alignment_heads, which {name} doesn't have in its generation config. "
                "Select them with askd-hf select-heads, or transcribe with the times of segments"
            )
        outside = [
            [layer, head]
            for layer, head in heads
            if not (0 <= layer < config.decoder_layers and 0 <= head < config.decoder_attention_heads)
        ]
        if outside:
            raise UserError(
                f"{name} has {config.decoder_layers} decoder layers with {config.decoder_attention_heads} heads, but "
                f"its alignment_heads contain [layer, head] {outside} (from 0), which are of another model. Select "
                "its own with askd-hf select-heads, or use --timestamps segment"
            )


def _transcripts(
    recognizer: AutomaticSpeechRecognitionPipeline,
    clips: Sequence[Mapping[str, Any]],
    batch_size: int,
    method: Method,
    timestamps: Timestamps,
    options: dict[str, Any],
) -> Iterator[LongFormTranscript]:
    window = recognizer.feature_extractor.chunk_length
    for start in range(0, len(clips), batch_size):
        rows = [clips[row] for row in range(start, min(start + batch_size, len(clips)))]
        waves = [waveform(row) for row in rows]
        durations = [len(wave) / SAMPLING_RATE for wave in waves]
        for row, duration in zip(rows, durations, strict=True):
            if method == "short_form" and duration > window:
                raise UserError(
                    f"{row['clip']}: short-form transcription requires clips of at most {window:g} s, got "
                    f"{duration:.1f} s. Use --long_form sequential or chunked"
                )
        before = time.perf_counter()
        outputs = _recognize(recognizer, waves, options)
        transcription_time = (time.perf_counter() - before) / len(rows)
        for output, duration in zip(outputs, durations, strict=True):
            yield LongFormTranscript(
                text=output["text"],
                chunks=None if timestamps == "none" else _chunks(output["chunks"], duration),
                duration=duration,
                transcription_time=transcription_time,
                tokens=len(recognizer.tokenizer(output["text"], add_special_tokens=False).input_ids),
            )


def _recognize(
    recognizer: AutomaticSpeechRecognitionPipeline, waves: list[np.ndarray], options: dict[str, Any]
) -> list[dict[str, Any]]:
    model = recognizer.model
    attention = model.config._attn_implementation
    try:
        # arrays, because the pipeline calls ffmpeg for files
        return recognizer([{"raw": wave, "sampling_rate": SAMPLING_RATE} for wave in waves], **options)
    finally:
        # word timestamps switch the model to eager attention, which returns the attention weights
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


# ---- concatenation of short clips ----


def concatenate_clips(dataset: Dataset, max_duration: float, pause_duration: float = 0.5) -> Dataset:
    """Concatenate short clips to long recordings, to evaluate long-form transcription on a set without long ones.

    Consecutive clips of the same speaker are joined while they fit. A clip longer than `max_duration` stays alone.

    Args:
        dataset: from `load_speech_dataset`; the column `speaker` is optional.
        max_duration: maximum length of a recording in seconds.
        pause_duration: silence between two clips in seconds.

    Returns:
        A dataset with `audio` (WAV files in memory, 16 kHz, float32), `text` (joined by spaces), `clip` (name of the
        first clip and number of the others), and `speaker` if the dataset has it.

    Raises `UserError` if a clip can't be decoded.
    """
    has_speaker = "speaker" in dataset.column_names
    recordings: list[dict[str, Any]] = []
    members: list[dict[str, Any]] = []
    waves: list[np.ndarray] = []
    pause = np.zeros(round(pause_duration * SAMPLING_RATE), dtype=np.float32)
    for row in progress(dataset, "Concatenating clips"):
        wave = waveform(row)
        joined = sum(map(len, waves)) + len(waves) * len(pause) + len(wave)
        same_speaker = not has_speaker or not members or row["speaker"] == members[-1]["speaker"]
        if members and (not same_speaker or joined > max_duration * SAMPLING_RATE):
            recordings.append(_recording(members, waves, pause))
            members, waves = [], []
        members.append(row)
        waves.append(wave)
    if members:
        recordings.append(_recording(members, waves, pause))
    columns = ["audio", "text", "clip"] + (["speaker"] if has_speaker else [])
    return concatenate_datasets([_dataset_of(part, columns) for part in _parts(recordings)])


def _parts(recordings: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Yield the recordings in parts of about `PART_BYTES`: an Arrow array of files has less than 2 GiB."""
    part: list[dict[str, Any]] = []
    size = 0
    for recording in recordings:
        part.append(recording)
        size += len(recording["audio"]["bytes"])
        if size >= PART_BYTES:
            yield part
            part, size = [], 0
    if part or not recordings:
        yield part


def _dataset_of(recordings: list[dict[str, Any]], columns: list[str]) -> Dataset:
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
