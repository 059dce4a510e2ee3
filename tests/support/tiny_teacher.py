"""A random teacher that ends its texts and tells times, and speech of several speakers."""

import csv
from pathlib import Path

import numpy as np
import soundfile
import torch
from models import make_processor, make_whisper
from transformers import WhisperForConditionalGeneration, WhisperProcessor

RATE = 16_000


def make_teacher(seed: int = 0) -> tuple[WhisperForConditionalGeneration, WhisperProcessor]:
    """As `make_whisper`, with tokens for timestamps, and inclined to the end of text."""
    processor = make_processor()
    processor.tokenizer.add_tokens([f"<|{0.02 * i:.2f}|>" for i in range(51)])
    model = make_whisper(processor, seed).eval()
    model.generation_config.max_length = 32
    words = model.get_output_embeddings().weight
    with torch.no_grad():  # so that they hardly stand where no times are asked for
        words[processor.tokenizer.convert_tokens_to_ids("<|0.00|>") :] *= 0.5
    incline_to_end(model)
    return model, processor


def incline_to_end(model: WhisperForConditionalGeneration) -> None:
    """Make the end of text the more likely the longer the text is."""
    words, end = model.get_output_embeddings().weight, model.config.eos_token_id
    with torch.no_grad():
        words[end] = words[:end].mean(0)  # it was 0, being that of padding as well
    model.generation_config.exponential_decay_length_penalty = (6, 1.4)


def save_teacher(directory: Path, seed: int = 0) -> Path:
    for part in make_teacher(seed):
        part.save_pretrained(directory)
    return directory


def tone(seconds: float, seed: int = 0) -> np.ndarray:
    """Tones that change every tenth of a second."""
    rng = np.random.default_rng(seed)
    steps = rng.uniform(100, 4000, size=int(10 * seconds) + 1).repeat(RATE // 10)[: round(RATE * seconds)]
    return 0.3 * np.sin(2 * np.pi * np.cumsum(steps) / RATE) + 0.02 * rng.standard_normal(len(steps))


def write_clips(folder: Path, seconds: list[float], columns: dict[str, list[str]]) -> Path:
    """An audiofolder with these columns besides `file_name`."""
    (folder / "audio").mkdir(parents=True)
    for i, length in enumerate(seconds):
        soundfile.write(folder / "audio" / f"{i:03d}.wav", tone(length, i), RATE)
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", *columns])
        writer.writerows(
            [f"audio/{i:03d}.wav", *values] for i, values in enumerate(zip(*columns.values(), strict=True))
        )
    return folder
