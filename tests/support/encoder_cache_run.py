"""Fills an encoder cache slowly, for test_encoder_cache.py: SPEECH DIRECTORY [PROCESS OF_PROCESSES]."""

import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from models import make_processor, make_whisper

from askd_hf.data import EncoderCache, Limits, cache_encoder, filter_invalid_clips, load_speech_dataset


def speech(folder: Path) -> Dataset:
    dataset = load_speech_dataset(str(folder), None, "train")
    return filter_invalid_clips(dataset, lambda row: list(row["text"]), Limits(1.0, 20), on_bad_audio="error")


def cached(model, processor, datasets, directory, **changes) -> EncoderCache:
    options = dict(batch_size=4, device=torch.device("cpu"), dtype=torch.float32)
    return cache_encoder(model, processor, datasets, directory, **(options | changes))


if __name__ == "__main__":
    folder, directory, *shares = sys.argv[1:]
    processor = make_processor()
    model = make_whisper(processor)
    model.model.encoder.register_forward_pre_hook(lambda *_: time.sleep(0.1))
    share = dict(zip(("process_index", "num_processes"), map(int, shares), strict=False))
    cached(model, processor, [speech(Path(folder))], Path(directory), batch_size=1, **share)
