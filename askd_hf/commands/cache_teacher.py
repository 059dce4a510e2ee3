r"""Cache a teacher's soft labels with the speech, so that students are trained without the teacher.

    askd-hf cache-teacher --teacher openai/whisper-large-v3 --teacher_cache_dir speech-by-large-v3

saves the 100 hours of LibriSpeech with the teacher's 32 most probable tokens at every label token as further columns
(--teacher_top_k). Any machine then trains on it without loading the teacher:

    askd-hf distill --student my-student --dataset speech-by-large-v3

If the student's vocabulary differs from the teacher's, as openai/whisper-small's does, give the student here too:
--student. The options of speech, teacher, language and temperature are those of `askd-hf distill` and must be the same
there: labels that don't fit are refused. With --hub_dataset_id you/speech-by-large-v3 the result is also pushed to the
Hub, audio included. To resume an interrupted run, repeat the command. On several GPUs: accelerate launch -m
askd_hf.commands.main cache-teacher ...
"""

import json
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from ..arguments import CacheArguments, DataArguments, MixArguments, ModelArguments
from ..arguments.parser import parse_args
from ..arguments.push import PushLabelsArguments
from ..config import ASKDConfig
from ..data import SpeechCollator
from ..data.columns import COLUMNS, JOINED_COLUMNS, VALIDATION_COLUMNS, replace_column
from ..data.dataset_files import load_saved
from ..data.soft_labels import KEY_COLUMN, SETTINGS_COLUMN, SOFT_LABEL_COLUMNS
from ..errors import UserError
from ..hub.provenance import public_name
from ..hub.upload import check_can_push_dataset
from ..hub_access import hub_upload
from ..models.from_arguments import load_teacher
from ..models.generation_config import is_multilingual, set_languages
from ..models.loading import check_processor, load_processor, load_whisper
from ..models.teacher_memory import check_int8
from ..models.vocabulary import with_vocabulary_of
from ..pseudo_labels.result import without_path
from ..training.caches import check_caches, check_labels_of_cache, with_encoder_cache, with_soft_labels
from ..training.dataset_checks import check_default_dataset
from ..training.datasets import training_speech
from ..training.run_dir import check_directories, exit_non_main_processes
from .options import options_of

OPTIONS = options_of("cache-teacher")


def main(argv: list[str] | None = None) -> None:
    cache_teacher(*parse_args(OPTIONS, argv, "askd-hf cache-teacher", __doc__))


def cache_teacher(
    model_args: ModelArguments,
    data_args: DataArguments,
    cache_args: CacheArguments,
    push_args: PushLabelsArguments,
    config: ASKDConfig,
) -> None:
    """Save speech with a teacher's soft labels, as examples/cache_teacher.py does step by step.

    Raises `UserError` for options, models and speech that don't fit together.
    """
    check_run(model_args, data_args, cache_args, push_args, config)
    teacher, processor = load_models(model_args, data_args)
    check_caches(cache_args, model_args, config, teacher.config.vocab_size)
    labeled = label(teacher, processor, model_args, data_args, cache_args, config)
    push_labels(labeled, cache_args, push_args)


def check_run(
    model_args: ModelArguments,
    data_args: DataArguments,
    cache_args: CacheArguments,
    push_args: PushLabelsArguments,
    config: ASKDConfig,
) -> None:
    """Raise `UserError` for every mistake that can be found before a model is loaded."""
    if not (model_args.teacher and cache_args.teacher_cache_dir):
        raise UserError("--teacher and --teacher_cache_dir are required")
    if model_args.window_seconds is not None or model_args.vocabulary is not None:
        raise UserError(
            "--window_seconds and --vocabulary are not supported: give a student that has them as --student, or cache "
            "with askd-hf distill --teacher_cache_dir"
        )
    if data_args.unlabeled_dataset:
        raise UserError(
            "--unlabeled_dataset is not supported: transcribe it with `askd-hf pseudo-label`, and give the result "
            "as --dataset"
        )
    check_default_dataset(data_args)
    check_directories(config, cache_args, trains=False)
    data_args.train_sources()  # raises UserError
    if model_args.teacher_dtype == "int8":
        check_int8()
    if push_args.hub_dataset_id:
        check_can_push_dataset(push_args.hub_dataset_id)


def load_models(
    model_args: ModelArguments, data_args: DataArguments
) -> tuple[WhisperForConditionalGeneration, WhisperProcessor]:
    """Load the teacher and its processor. With `--student` both have the student's vocabulary."""
    spoken = [(source.language, source.task) for source in data_args.train_sources()]
    teacher, processor = load_teacher(model_args), load_processor(model_args.teacher)
    check_processor(teacher, processor)
    if not model_args.student:
        set_languages(teacher, processor, spoken)
        return teacher, processor
    student, student_processor = load_whisper(model_args.student), load_processor(model_args.student)
    check_processor(student, student_processor)
    set_languages(student, student_processor, spoken)
    teacher = with_vocabulary_of(student.config, student_processor.tokenizer, teacher, processor.tokenizer)
    teacher.generation_config.is_multilingual = is_multilingual(student)  # the labels have the student's prefix
    return teacher, WhisperProcessor(processor.feature_extractor, student_processor.tokenizer)


def label(
    teacher: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    model_args: ModelArguments,
    data_args: DataArguments,
    cache_args: CacheArguments,
    config: ASKDConfig,
) -> Dataset:
    """Check every clip, and save the speech with the teacher's soft labels in `--teacher_cache_dir`.

    Only the main process returns.
    """
    collator = SpeechCollator(processor, teacher.config, features_on_device=data_args.features_on_device)
    report_to = f"{Path(cache_args.teacher_cache_dir)}.skipped"
    speech = training_speech(data_args, MixArguments(), config, collator, is_multilingual(teacher), report_to)
    settings = check_labels_of_cache(teacher, collator, model_args, cache_args, config)
    collator = with_encoder_cache(collator, teacher, [speech], cache_args, config)
    labeled: Any = with_soft_labels(speech, teacher, collator, model_args, cache_args, config, settings=settings)
    exit_non_main_processes()
    directory, number = Path(cache_args.teacher_cache_dir), len(set(labeled[KEY_COLUMN][:]))
    print(f"{number} labeled clips: --dataset {directory}")
    if others := len(load_saved(directory, "remove it, and repeat the command")) - number:
        print(
            f"warning: {directory} also has {others} rows of earlier commands, such as those whose transcripts were "
            f"others: --dataset {directory} trains on them, too. For these {number} clips alone, remove the directory "
            "and repeat the command, or choose another --teacher_cache_dir",
            file=sys.stderr,
        )
    return labeled


def push_labels(labeled: Dataset, cache_args: CacheArguments, push_args: PushLabelsArguments) -> None:
    """Push the labeled speech to `--hub_dataset_id`, if that is given."""
    if push_args.hub_dataset_id is None:
        return
    advice = f"the labels are safe in {cache_args.teacher_cache_dir}: run the same command again, if need be after "
    with hub_upload(advice + "`hf auth login` with a token that may write there"):
        public = publishable(labeled)
        public.push_to_hub(push_args.hub_dataset_id, split="train", private=True)


def publishable(labeled: Dataset) -> Dataset:
    """Return the columns that training uses, with the names of clips and teacher in place of paths on this machine."""
    known = (*COLUMNS, "speaker", *VALIDATION_COLUMNS, *JOINED_COLUMNS, *SOFT_LABEL_COLUMNS)
    labeled = labeled.select_columns([name for name in labeled.column_names if name in known])
    settings = [json.loads(text) for text in labeled[SETTINGS_COLUMN][:]]
    named = [json.dumps(one | {"teacher": public_name(one["teacher"])[0]}) for one in settings]
    labeled = replace_column(labeled, SETTINGS_COLUMN, named)
    return replace_column(labeled, "clip", [without_path(name) for name in labeled["clip"][:]])
