r"""Have a teacher transcribe speech, keep what it got right, and train students on that.

    python examples/pseudo_label.py --teacher openai/whisper-large-v3 --language fr --dataset my_audio

`my_audio` needs no transcripts: a directory of audio files will do. Transcripts that the teacher isn't sure of, or
that go in circles, are dropped and listed with the reason in runs/my_audio-by-whisper-large-v3/dropped.csv; the others
are a `datasets` dataset:

    python examples/distill.py --teacher openai/whisper-large-v3 --language fr \
        --dataset runs/my_audio-by-whisper-large-v3/dataset

Where the speech has transcripts, one of the teacher's is kept if its word error rate is at most --max_wer; here with
timestamps, and the clips of a speaker joined to 30 s:

    python examples/pseudo_label.py --teacher openai/whisper-large-v3 --dataset openslr/librispeech_asr \
        --dataset_config clean --split train.100 --language en --max_wer 5 --timestamps --pack --push_to_hub you/labels

An interrupted run goes on where it stopped: give the same command again. With other limits, or with --pack, nothing is
transcribed anew. All options: --help. They can also stand in a YAML file: --config labels.yaml.
"""

from pathlib import Path

from askd_hf import filter_invalid_clips, load_processor, load_whisper
from askd_hf.arguments.parser import parse_args
from askd_hf.arguments.writable import check_writable
from askd_hf.data import Limits
from askd_hf.errors import exit_on_user_error
from askd_hf.evaluation.metrics import language_code, normalizer_for
from askd_hf.models.loading import check_max_length, check_processor
from askd_hf.pseudo_labels import (
    DATASET,
    PseudoLabelArguments,
    build_dataset,
    check_can_concatenate,
    concatenate_clips,
    dataset_card,
    filter_transcripts,
    known_references,
    load_clips,
    plan_transcription,
    push_dataset,
    save_dataset,
    score_transcripts,
    transcribe,
)


def main() -> None:
    (args,) = parse_args((PseudoLabelArguments,))
    pseudo_label(args)


def pseudo_label(args: PseudoLabelArguments) -> Path:
    """The directory of the dataset of transcripts that are kept."""
    directory = Path(args.output_dir)
    check_writable(directory, "--output_dir")

    # ---- the teacher ----
    processor = load_processor(args.teacher)
    teacher = load_whisper(args.teacher, attn_implementation=args.attn_implementation)
    check_processor(teacher, processor)
    check_max_length(teacher, args.generation_max_length)
    window = processor.feature_extractor.chunk_length

    # ---- the speech: every clip is looked at once, before anything is transcribed ----
    clips = load_clips(args.source(), args.max_samples, args.num_workers or None)
    if args.concatenate:
        check_can_concatenate(clips, window, args.concatenate_seconds)
    clips = filter_invalid_clips(
        clips,
        None,
        Limits(window),
        on_bad_audio=args.on_bad_audio,
        num_proc=args.num_workers or None,
        report_file=directory / "skipped.csv",
        split=args.split,
    )

    language = language_code(args.language) if args.task == "transcribe" else "en"
    _, normalize = normalizer_for(args.normalizer, language, processor.tokenizer.english_spelling_normalizer or {})
    references = known_references(clips["text"][:], required=args.label_source == "reference")

    # ---- transcripts: what is on the disk already isn't made again ----
    lines = transcribe(plan_transcription(args, teacher, processor, clips))

    # ---- filters: by the references where there are any ----
    transcripts = score_transcripts(lines, references, normalize, language, label_source=args.label_source)
    kept = filter_transcripts(transcripts, args.thresholds(), directory / "dropped.csv")

    # ---- the dataset ----
    language = getattr(teacher.generation_config, "language", None)  # an English-only teacher has none
    labeled = build_dataset(clips, transcripts, kept, language, args.task)
    if args.concatenate:
        labeled = concatenate_clips(
            labeled,
            processor.tokenizer,
            max_duration_in_seconds=args.concatenate_seconds or window,
            max_label_length=teacher.config.max_target_positions,
            directory=directory,
            num_proc=args.num_workers or None,
        )
    card = dataset_card(args, labeled, len(clips), len(kept))
    labeled = save_dataset(labeled, directory, card)
    hours = sum(labeled["duration"]) / 3600
    print(f"{len(labeled)} rows, {hours:.2f} hours: --dataset {directory / DATASET}")
    if args.hub_dataset_id:
        advice = f"the labels are safe in {directory}: run the same command again, if need be after `hf auth login`"
        push_dataset(labeled, args.hub_dataset_id, card, advice + " with a token that may write there")
    return directory / DATASET


if __name__ == "__main__":
    with exit_on_user_error():
        main()
