"""Pseudo-labels: transcribe speech with a teacher, filter the transcripts, concatenate clips, and save a dataset."""

from .concatenation import check_can_concatenate, concatenate_clips
from .filters import filter_transcripts, known_references, score_transcripts
from .options import PseudoLabelArguments
from .result import DATASET, build_dataset, dataset_card, push_dataset, save_dataset
from .speech import load_clips
from .transcribe import plan_transcription, transcribe
