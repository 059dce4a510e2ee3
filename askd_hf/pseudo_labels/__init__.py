"""A teacher's transcripts as labels: speech -> transcripts on disk -> those good enough -> packed to windows."""

from .filters import keep_good, known_references, measure
from .options import PseudoLabelArguments
from .packing import check_can_pack, pack
from .result import DATASET, card_of, label_clips, push, save
from .speech import load_clips
from .transcribe import plan, transcribe

__all__ = [
    "DATASET",
    "PseudoLabelArguments",
    "card_of",
    "check_can_pack",
    "keep_good",
    "known_references",
    "label_clips",
    "load_clips",
    "measure",
    "pack",
    "plan",
    "push",
    "save",
    "transcribe",
]
