"""Distil Whisper with Adaptive Self-Knowledge Distillation, on the Hugging Face Trainer."""

__version__ = "0.1.0"

from .models import torchao_warnings  # noqa: F401  # isort: skip  (before anything imports torchao)
from .callbacks import AdaptiveBlendCallback
from .config import ASKDConfig
from .data import SpeechCollator, check_clips, load_speech
from .errors import UserError
from .models.loading import load_processor, load_whisper
from .models.student import init_student
from .objective import blend
from .schedule import BlendSchedule
from .trainer import ASKDTrainer

__all__ = [
    "ASKDConfig",
    "ASKDTrainer",
    "AdaptiveBlendCallback",
    "BlendSchedule",
    "SpeechCollator",
    "UserError",
    "blend",
    "check_clips",
    "init_student",
    "load_processor",
    "load_speech",
    "load_whisper",
]
