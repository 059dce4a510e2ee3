"""Distil Whisper with Adaptive Self-Knowledge Distillation, on the Hugging Face Trainer."""

__version__ = "0.1.0"

from . import quiet  # noqa: F401  (first: before anything imports torchao)
from .callbacks import AdaptiveBlendCallback
from .config import ASKDConfig
from .data import SpeechCollator, check_clips, load_speech
from .errors import UserError
from .objective import blend
from .schedule import BlendSchedule
from .student import init_student, load_processor, load_whisper
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
