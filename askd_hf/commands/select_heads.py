r"""Select a student's alignment heads, the attention heads that give the times of words.

    askd-hf select-heads --model runs/student --teacher openai/whisper-small.en --dataset my_speech

reads the transcripts of some clips with student and teacher, and writes the heads whose word times are nearest to the
teacher's to runs/student/generation_config.json. transformers and faster-whisper (`askd-hf export`) use them for word
timestamps. `askd-hf distill` does the same at the end of training.
"""

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import GenerationConfig, WhisperForConditionalGeneration, WhisperProcessor

from ..arguments import ModelArguments
from ..arguments.parser import parse_args
from ..arguments.select_heads import SelectHeadsArguments
from ..data import Limits, SpeechStream, filter_invalid_clips
from ..data.columns import replace_column
from ..data.languages import language_code
from ..data.text import clean_texts
from ..errors import UserError, memory_errors
from ..evaluation.comparison import EvalSplit
from ..evaluation.options import check_device
from ..evaluation.prepared_sets import spread
from ..evaluation.suites import DatasetSpec, load_set
from ..hub_access import expanded
from ..models.alignment_heads import CLIPS, Selection, save_alignment_heads, select_alignment_heads
from ..models.generation_config import generation_config_file, set_language
from ..models.loading import check_processor, load_processor, load_whisper
from ..models.lora import adapter_base, is_adapter
from ..trainer import ASKDTrainer
from .options import options_of

OPTIONS = options_of("select-heads")
Model = tuple[WhisperForConditionalGeneration, WhisperProcessor]


def main(argv: list[str] | None = None) -> None:
    select_heads(*parse_args(OPTIONS, argv, "askd-hf select-heads", __doc__))


def select_heads(args: SelectHeadsArguments) -> None:
    """Select the alignment heads and write them, as examples/select_heads.py does step by step.

    Raises `UserError` for models and speech that don't fit together.
    """
    student, teacher = load_models(args)
    selection = select_alignment_heads(*student, *teacher, load_clips(args))
    save(args.model, selection)


def load_models(args: SelectHeadsArguments) -> tuple[Model, Model]:
    """Load the student and the teacher, each with its processor."""
    generation_config_file(args.model, "askd-hf select-heads")  # raises UserError if there is none
    device = args.device or str(torch.accelerator.current_accelerator() or "cpu")
    check_device(device)
    models = []
    for name in (args.model, args.teacher):
        model, processor = load_whisper(name).to(device), load_processor(name)
        check_processor(model, processor)
        set_language(model, processor, args.language, args.task)
        models.append((model, processor))
    student, teacher = models
    return student, teacher


def load_clips(args: SelectHeadsArguments) -> Sequence[dict[str, Any]]:
    """Load `--max_samples` clips. Those that can't be decoded are left out.

    Transcripts that are all upper-case are lower-cased, as in training.
    """
    columns = args.text_column_name, args.audio_column_name
    language = language_code(args.language)
    spoken: dict[str, Any] = dict(language=language, task=args.task)
    speech = load_set(DatasetSpec(args.dataset, args.dataset, args.dataset_config, args.split, *columns, **spoken))
    if language is not None:  # decides which letters are the lower-case ones
        for name, value in spoken.items():
            speech = replace_column(speech, name, [value] * len(speech))
    speech = clean_texts(speech, "auto", args.dataset)
    clips = spread(speech, args.max_samples).select_columns(["audio", "clip", "text"])
    return filter_invalid_clips(clips, None, Limits(math.inf), on_bad_audio="skip", split=args.split)


def save(directory: str, selection: Selection) -> None:
    """Write the selected heads, and print them with their errors."""
    save_alignment_heads(directory, selection.heads)
    print(f"{directory}: {selection}")


def select_heads_after_training(
    trainer: ASKDTrainer,
    model_args: ModelArguments,
    splits: dict[str, EvalSplit],
    train_dataset: Dataset | SpeechStream,
) -> None:
    """Select the alignment heads of the saved student of a run, on training clips.

    Does nothing if the run has no teacher with alignment heads, or keeps an adapter. A `UserError` is only printed.

    Args:
        splits: evaluation splits by name, of which the first is used if the training set is a stream.
    """
    config, clips = trainer.args, train_dataset
    if isinstance(clips, SpeechStream):
        clips = next((split.clips for split in splits.values()), None)
    if clips is None or is_adapter(config.output_dir) or not has_alignment_heads(model_args.teacher):
        return
    trainer.free_memory()
    try:
        with memory_errors(f"out of memory: run askd-hf select-heads --model {config.output_dir} --device cpu"):
            names = config.output_dir, model_args.teacher
            student, teacher = ((load_whisper(name).to(config.device), load_processor(name)) for name in names)
            selection = select_alignment_heads(*student, *teacher, spread(clips, CLIPS))
    except UserError as error:  # the student is trained and saved: continue with the report
        print(f"alignment heads aren't selected: {error}", file=sys.stderr)
        return
    trainer.saver.set_alignment_heads(selection.heads)  # for --push_to_hub, which saves the student again
    save(config.output_dir, selection)


def has_alignment_heads(name: str | None) -> bool:
    """Return whether a model, if any, has alignment heads in its generation config. No weights are loaded."""
    if name is None:
        return False
    try:
        return bool(getattr(GenerationConfig.from_pretrained(expanded(name)), "alignment_heads", None))
    except OSError:  # it has no generation config
        pass
    try:  # an adapter has that of its base
        return is_adapter(name) and has_alignment_heads(adapter_base(name))
    except UserError:  # the Hub can't be reached now
        return False
