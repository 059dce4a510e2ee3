"""The report on a finished run of `askd-hf distill` or `askd-hf finetune`."""

import sys
from pathlib import Path

from datasets import Dataset
from transformers import WhisperForConditionalGeneration, WhisperProcessor, pipeline

from ..arguments import DataArguments, ModelArguments
from ..config import ASKDConfig
from ..data import SAMPLING_RATE, SpeechStream
from ..data.audio import waveform
from ..errors import UserError, memory_errors
from ..evaluation import format_results
from ..evaluation.comparison import EvalSplit, evaluate_models
from ..evaluation.results import CLIP_CONTEXT
from ..hub.upload import published_lines
from ..models.from_arguments import load_student, load_teacher
from ..models.generation_config import no_timestamps
from ..models.loading import load_processor, load_whisper
from ..models.smaller_vocabulary import with_smaller_vocabulary
from ..models.window import shortest_context, window_seconds
from ..trainer import ASKDTrainer
from ..training.datasets import spoken_in
from .next_steps import better_step, print_next_steps


def report(
    trainer: ASKDTrainer,
    model_args: ModelArguments,
    data_args: DataArguments,
    splits: dict[str, EvalSplit],
    train_dataset: Dataset | SpeechStream,
) -> None:
    """Print error rates, a transcript and what comes next, and write the model card. Push it if `--push_to_hub`.

    Args:
        splits: evaluation splits by name. Without them there are no error rates, and the transcript is of a training
            clip.
    """
    config, clips, file = trainer.args, train_dataset, None
    if not config.load_best_model_at_end and (note := better_step(trainer.state.log_history)):
        print(f"\n{note}: --load_best_model_at_end keeps the best")
    if splits and data_args.compare:
        others = "its initial weights and its teacher" if model_args.teacher else "its initial weights"
        number = sum(len(split.clips) for split in splits.values())
        print(f"\nthe student is saved in {config.output_dir}; it is compared with {others}")
        print(f"on {number:,} clips of {', '.join(splits)} (not with --no_compare)", flush=True)
        trainer.free_memory()
        print_comparison(model_args, data_args, splits, config)
    source = data_args.train_sources()[0]
    if splits:
        source, clips, _ = next(iter(splits.values()))
    elif not isinstance(clips, SpeechStream) and (spoken := spoken_in(clips)):
        source = source._replace(language=spoken[0][0], task=spoken[0][1])
    if not isinstance(clips, SpeechStream):
        clip = clips[len(clips) // 2]  # evaluation clips are sorted by duration
        print_sample_transcript(config.output_dir, clip)
        path = clip["audio"].get("path")  # arrays of samples have none
        file = path if path is not None and Path(path).is_file() else None
    trainer.create_model_card()
    print_next_steps(model_args, data_args, config, source, file)
    if config.push_to_hub:
        print(f"\n{published_lines(str(trainer.push_to_hub()))}")


def print_comparison(
    model_args: ModelArguments, data_args: DataArguments, splits: dict[str, EvalSplit], config: ASKDConfig
) -> None:
    """Evaluate student, initial student and teacher, and print the tables. A `UserError` is only printed."""
    try:
        with memory_errors("out of memory: run askd-hf evaluate with a smaller --batch_size"):
            models = models_to_compare(model_args, config.output_dir)
            results = evaluate_models(models, splits, data_args.normalizer, config)
            print(f"\n{format_results(results)}")
    except UserError as error:  # the student is trained and saved: continue with the rest of the report
        print(f"\nno comparison: {error}", file=sys.stderr)


def models_to_compare(
    model_args: ModelArguments, output_dir: str
) -> dict[str, tuple[str, WhisperForConditionalGeneration, WhisperProcessor]]:
    """Return name, model and processor of student, initial student and teacher.

    A student trained for a range of contexts is also evaluated at the context of the clips.
    """
    teacher = load_teacher(model_args) if model_args.teacher else None
    student = load_whisper(output_dir, attn_implementation=model_args.attn_implementation)
    processor = load_processor(output_dir)
    made_of = model_args.student or f"layers of {model_args.teacher}"
    initial = load_student(model_args, teacher)
    teacher_processor = load_processor(model_args.teacher) if teacher is not None else None
    if model_args.vocabulary is not None and teacher_processor is not None:
        tokenizers = teacher_processor.tokenizer, processor.tokenizer
        initial = with_smaller_vocabulary(initial, *tokenizers, window_seconds(student))
    models = {"student": (output_dir, student, processor)}
    if shortest_context(model_args) is not None:
        models[CLIP_CONTEXT] = models["student"]
    models["initial student"] = (made_of, initial, processor)
    if teacher_processor is not None:
        models["teacher"] = (model_args.teacher, teacher, teacher_processor)
    return models


def print_sample_transcript(model_dir: str, clip: dict) -> None:
    """Transcribe a clip with `pipeline`, as users of the saved directory do, and print it with its reference."""
    transcribe = pipeline("automatic-speech-recognition", model=model_dir)
    sound = {"raw": waveform(clip), "sampling_rate": SAMPLING_RATE}
    transcript = transcribe(sound, generate_kwargs=no_timestamps(transcribe.model))["text"]
    print(f"\n{clip['clip']}\n  reference: {clip['text']}\n  pipeline:  {transcript.strip()}")
