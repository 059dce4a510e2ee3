"""Distil Whisper with Adaptive Self-Knowledge Distillation, on the Hugging Face Trainer.

Public names are imported on first use, because torch and transformers take seconds that `askd-hf --help` doesn't need.
"""

import importlib
import warnings
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

from .models import torchao_warnings  # noqa: F401  # isort: skip  (before anything imports torchao)

if TYPE_CHECKING:
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

# public name -> its module
_MODULES = {
    "ASKDConfig": "config",
    "ASKDTrainer": "trainer",
    "AdaptiveBlendCallback": "callbacks",
    "BlendSchedule": "schedule",
    "SpeechCollator": "data",
    "UserError": "errors",
    "distillation_loss": "objective",
    "filter_invalid_clips": "data",
    "init_student": "models.student",
    "load_processor": "models.loading",
    "load_speech_dataset": "data",
    "load_whisper": "models.loading",
}

# old name -> name now
_RENAMED = {
    "blend": "distillation_loss",
    "check_clips": "filter_invalid_clips",
    "load_speech": "load_speech_dataset",
}


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        warnings.warn(f"askd_hf.{name} is called {_RENAMED[name]} now", FutureWarning, stacklevel=2)
    current = _RENAMED.get(name, name)
    if current not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULES[current]}", __name__), current)
    globals()[current] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
