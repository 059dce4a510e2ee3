r"""Label speech with a teacher once, so that students can be trained without it, here or elsewhere.

    python examples/cache_teacher.py --teacher openai/whisper-large-v3 --teacher_cache_dir speech-by-large-v3

saves the 100 hours of LibriSpeech with the teacher's 32 most probable tokens at every label token as further columns
(--teacher_top_k). Any machine then trains on it without loading the teacher:

    python examples/distill.py --student my-student --dataset speech-by-large-v3

For a student of another vocabulary than the teacher's, such as openai/whisper-small's, name it here too: --student.
Options of speech, teacher, language and temperature are those of examples/distill.py, and must be the same there: what
doesn't fit is refused. With --push_labels_to you/speech-by-large-v3 it is also pushed to the Hub, audio included. An
interrupted pass goes on where it stopped; on several GPUs: accelerate launch examples/cache_teacher.py ...
"""

from dataclasses import dataclass, field
from pathlib import Path

import askd_hf.models.torchao_warnings  # noqa: F401  # isort: skip  (before transformers)
from transformers import WhisperProcessor

from askd_hf import ASKDConfig, SpeechCollator, UserError
from askd_hf.arguments import CacheArguments, DataArguments, MixArguments, ModelArguments
from askd_hf.arguments.parser import parse_args
from askd_hf.errors import exit_on_user_error
from askd_hf.hub_access import hub_upload
from askd_hf.models.generation_config import is_multilingual, set_languages
from askd_hf.models.loading import check_processor, load_processor, load_whisper
from askd_hf.models.teacher_memory import check_int8
from askd_hf.models.vocabulary import with_vocabulary_of
from askd_hf.training.caches import check_caches, with_encoder_cache, with_soft_labels
from askd_hf.training.datasets import training_speech
from askd_hf.training.run_dir import check_directories, exit_non_main_processes


@dataclass
class PushArguments:
    """Where the labelled speech goes."""

    _argument_group_name = "hub"

    push_labels_to: str | None = field(
        default=None,
        metadata={
            "help": "Hub id of a dataset to push the labelled speech to. It is made private if it is new; one that is "
            "public stays so."
        },
    )


def main() -> None:
    model_args, data_args, caches, push, config = parse_args(
        (ModelArguments, DataArguments, CacheArguments, PushArguments, ASKDConfig)
    )
    if not (model_args.teacher and caches.teacher_cache_dir):
        raise UserError("--teacher and --teacher_cache_dir are needed: who labels, and the directory for the labels")
    if data_args.unlabeled_dataset:
        raise UserError(
            "--unlabeled_dataset: transcribe it by examples/pseudo_label.py, and give the result as --dataset"
        )
    check_directories(config, caches, trains=False)
    spoken = [(source.language, source.task) for source in data_args.train_sources()]
    if model_args.teacher_dtype == "int8":
        check_int8()
    teacher = load_whisper(model_args.teacher, attn_implementation=model_args.attn_implementation)
    processor = load_processor(model_args.teacher)
    check_processor(teacher, processor)
    if model_args.student:  # the labels are in its vocabulary
        student, ours = load_whisper(model_args.student), load_processor(model_args.student)
        check_processor(student, ours)
        set_languages(student, ours, spoken)
        teacher = with_vocabulary_of(student.config, ours.tokenizer, teacher, processor.tokenizer)
        processor = WhisperProcessor(processor.feature_extractor, ours.tokenizer)
    else:
        set_languages(teacher, processor, spoken)
    check_caches(caches, model_args, config, teacher.config.vocab_size)

    collator = SpeechCollator(processor, teacher.config)
    report_to = f"{Path(caches.teacher_cache_dir)}.skipped"
    speech = training_speech(data_args, MixArguments(), config, collator, is_multilingual(teacher), report_to)

    collator = with_encoder_cache(collator, teacher, [speech], caches, config)
    labelled = with_soft_labels(speech, teacher, collator, model_args, caches, config)
    exit_non_main_processes()
    print(f"{len(labelled)} labelled clips: --dataset {caches.teacher_cache_dir}")
    if push.push_labels_to:
        advice = f"the labels are safe in {caches.teacher_cache_dir}: run the same command again, if need be after "
        with hub_upload(advice + "`hf auth login` with a token that may write there"):
            labelled.push_to_hub(push.push_labels_to, private=True)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
