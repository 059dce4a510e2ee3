"""How well and how fast models transcribe the evaluation splits, side by side."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from .data import SpeechCollator
from .metrics import error_rates


@dataclass
class Score:
    """One model's row of the comparison.

    Attributes:
        model: what the row is called.
        wer: percent, by evaluation split.
        parameters: of the whole model.
        speed: seconds of audio transcribed in a second of `generate`, audio decoding and features not counted.
    """

    model: str
    wer: dict[str, float]
    parameters: int
    speed: float


@torch.inference_mode()
def score(
    name: str,
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    splits: dict[str, Dataset],
    normalize: Callable[[str], str],
    batch_size: int,
) -> Score:
    """Transcribe every split greedily where the model is, `batch_size` clips at a time.

    Args:
        splits: of `check_clips`: `text` and `seconds` are read besides the audio.
    """
    model = model.eval()
    collator = SpeechCollator(processor, model.config)
    wer, audio_seconds, run_seconds = {}, 0.0, 0.0
    for split, dataset in splits.items():
        predictions: list[str] = []
        for batch in tqdm(DataLoader(dataset, batch_size, collate_fn=collator), desc=f"{name}, {split}", leave=False):
            features = batch["input_features"].to(model.device, model.dtype)
            mask = torch.ones_like(features[:, 0]).long()  # Whisper sees the padding's silence too
            greedy = dict(attention_mask=mask, num_beams=1, do_sample=False)
            if not run_seconds:  # the very first call is slower
                model.generate(features, **greedy)
            start = time.perf_counter()
            tokens = model.generate(features, **greedy).cpu()
            run_seconds += time.perf_counter() - start
            predictions += processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        wer[split] = error_rates(predictions, dataset["text"], normalize)["wer"]
        audio_seconds += sum(dataset["seconds"])
    return Score(name, wer, model.num_parameters(), audio_seconds / run_seconds)


def comparison(scores: list[Score]) -> str:
    """The scores as a table for the terminal."""
    splits = list(scores[0].wer)
    header = ["", *(f"WER {split}" for split in splits), "parameters", "audio s / s"]
    rows = [
        [s.model, *(f"{s.wer[split]:.1f} %" for split in splits), f"{s.parameters:,}", f"{s.speed:.0f}"]
        for s in scores
    ]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in [header, *rows]]
    for line, row in zip(lines, [header, *rows], strict=True):
        line[0] = row[0].ljust(widths[0])
    return "\n".join("  ".join(line) for line in lines)
