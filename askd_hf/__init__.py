"""Distill Whisper with Adaptive Self-Knowledge Distillation and the Hugging Face Trainer."""

import warnings
from typing import Any

__version__ = "0.1.0"

from .models import torchao_warnings  # noqa: F401  # isort: skip  (before anything imports torchao)
from .callbacks import AdaptiveBlendCallback
from .config import ASKDConfig
from .data import SpeechCollator, filter_invalid_clips, load_speech_dataset
from .errors import UserError
from .models.loading import load_processor, load_whisper
from .models.student import init_student
from .objective import distillation_loss
from .schedule import BlendSchedule
from .trainer import ASKDTrainer

__all__ = [
    "ASKDConfig",
    "ASKDTrainer",
    "AdaptiveBlendCallback",
    "BlendSchedule",
    "SpeechCollator",
    "UserError",
    "distillation_loss",
    "filter_invalid_clips",
    "init_student",
    "load_processor",
    "load_speech_dataset",
    "load_whisper",
]

# old name -> current name
_RENAMED = {
    "blend": "distillation_loss",
    "check_clips": "filter_invalid_clips",
    "load_speech": "load_speech_dataset",
}


def __getattr__(name: str) -> Any:
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"askd_hf.{name} is called {_RENAMED[name]} now", FutureWarning, stacklevel=2)
    return globals()[_RENAMED[name]]
