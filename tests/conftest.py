"""Fixtures of all tests. What tests import is in support/."""

import gc
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: threads only get in each other's way

import pytest
import quick_report
from models import make_processor, make_whisper
from speech import write_speech
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from askd_hf.models.student import init_student

quick_report.install()
pytest.register_assert_rewrite("hub", "report_page")


def pytest_collection_finish() -> None:
    """Garbage is collected often; most of the time would go to what the libraries have defined."""
    gc.freeze()


@pytest.fixture(scope="session")
def processor() -> WhisperProcessor:
    return make_processor()


@pytest.fixture
def teacher(processor) -> WhisperForConditionalGeneration:
    return make_whisper(processor).eval()


@pytest.fixture(scope="session")
def speech_dir(tmp_path_factory) -> Path:
    """A directory with the splits train, 16 clips, and validation, 6."""
    directory = tmp_path_factory.mktemp("speech")
    write_speech(directory / "train", clips=16, seed=0)
    write_speech(directory / "validation", clips=6, seed=1)
    return directory


@pytest.fixture
def student(processor) -> WhisperForConditionalGeneration:
    """Of other weights than the teacher, so that they disagree."""
    return init_student(make_whisper(processor, seed=5), decoder_layers=2)


@pytest.fixture
def deep_teacher(processor) -> WhisperForConditionalGeneration:
    """With 4 encoder layers."""
    return make_whisper(processor, encoder_layers=4).eval()


@pytest.fixture
def compressed(deep_teacher) -> WhisperForConditionalGeneration:
    """With the encoder layers 0 and 2 of `deep_teacher`: it has a hidden-state loss."""
    return init_student(deep_teacher, 2, encoder_layers=[0, 2])
