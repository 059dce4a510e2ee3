"""Distill Whisper with Adaptive Self-Knowledge Distillation, on the Hugging Face Trainer.

Public names are imported on first use, because torch and transformers take seconds that `askd-hf --help` doesn't need.
"""

import importlib
import warnings
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

from .models import torchao_warnings  # isort: skip  (before anything imports torchao)

if TYPE_CHECKING:
    from .callbacks import AdaptiveBlendCallback as AdaptiveBlendCallback
    from .commands.python import distill as distill
    from .config import ASKDConfig as ASKDConfig
    from .data import SpeechCollator as SpeechCollator
    from .data import filter_invalid_clips as filter_invalid_clips
    from .data import load_speech_dataset as load_speech_dataset
    from .errors import UserError as UserError
    from .models.generation_config import set_language as set_language
    from .models.loading import load_processor as load_processor
    from .models.loading import load_whisper as load_whisper
    from .models.student import init_student as init_student
    from .objective import distillation_loss as distillation_loss
    from .schedule import BlendSchedule as BlendSchedule
    from .trainer import ASKDTrainer as ASKDTrainer

# public name -> its module
_MODULES = {
    "ASKDConfig": "config",
    "ASKDTrainer": "trainer",
    "AdaptiveBlendCallback": "callbacks",
    "BlendSchedule": "schedule",
    "SpeechCollator": "data",
    "UserError": "errors",
    "distill": "commands.python",
    "distillation_loss": "objective",
    "filter_invalid_clips": "data",
    "init_student": "models.student",
    "load_processor": "models.loading",
    "load_speech_dataset": "data",
    "load_whisper": "models.loading",
    "set_language": "models.generation_config",
}

__all__ = list(_MODULES)

# old name -> current name
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
