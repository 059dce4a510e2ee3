"""A teacher's soft labels for a few clips, computed by `cache_teacher`."""

from pathlib import Path

import torch
from datasets import Dataset
from models import make_processor, make_whisper

from askd_hf.data import Limits, SpeechCollator, filter_invalid_clips, load_speech_dataset
from askd_hf.data.soft_labels import teacher_settings
from askd_hf.data.teacher_cache import cache_teacher

CLIPS, TOP_K, TEMPERATURE, BATCH, PART_CLIPS = 7, 5, 2.0, 2, 2


def speech(folder: Path) -> Dataset:
    collator = SpeechCollator(processor := make_processor(), make_whisper(processor).config)
    dataset = load_speech_dataset(str(folder), None, "train")
    return filter_invalid_clips(dataset, collator.label_ids, Limits(1.0, 20), on_bad_audio="error")


def settings(teacher, name="tiny", top_k=TOP_K, temperature=TEMPERATURE, dtype=torch.float32) -> str:
    return teacher_settings(teacher, name, top_k, temperature, dtype)


def label(directory, dataset, collator, teacher, batch_size=BATCH, autocast=None, num_workers=0, **changes) -> Dataset:
    options = dict(batch_size=batch_size, autocast=autocast, num_workers=num_workers)
    return cache_teacher(lambda: teacher, settings(teacher, **changes), dataset, collator, directory, **options)


def transcribed_by(teacher) -> list[int]:
    """The sizes of the batches that the teacher has labeled since, as a list that grows."""
    sizes = []

    def note(module, args, kwargs):
        if "labels" not in kwargs:  # of the comparison in `assert_plain`
            sizes.append(len(kwargs["decoder_input_ids"]))

    teacher.register_forward_pre_hook(note, with_kwargs=True)
    return sizes
