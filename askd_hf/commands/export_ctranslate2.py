"""The steps of `askd-hf export --to ctranslate2`."""

import torch
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from ..arguments.export import ExportArguments
from ..evaluation.metrics import error_rates
from ..export.comparison import Transcripts
from ..export.ctranslate2 import (
    alignment_heads,
    ctranslate2_transcriber,
    export_ctranslate2,
    faster_whisper_obstacle,
    faster_whisper_transcriber,
    transcribe_at_clip_context,
)
from ..progress import progress


def convert(args: ExportArguments, model: WhisperForConditionalGeneration, processor: WhisperProcessor) -> None:
    """Write the converted model to `--output_dir`, and print which runtimes load it."""
    export_ctranslate2(model, processor, args.output_dir, args.quantization)
    obstacle = faster_whisper_obstacle(model, processor)
    if obstacle is None:
        print(f"{args.output_dir}: faster_whisper.WhisperModel({args.output_dir!r})")
    else:
        print(f"{args.output_dir}: ctranslate2.models.Whisper({args.output_dir!r})")
        print(f"faster-whisper can't run this model: {obstacle}")
    if alignment_heads(model) is None:
        print(
            "No word timestamps: the generation config has no alignment heads of this model. Select them with askd-hf "
            "select-heads"
        )


def compare(
    args: ExportArguments,
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    expected: Transcripts,
) -> None:
    """Transcribe with CTranslate2 and, if it can, with faster-whisper, and print the texts that differ."""
    positions, directory = model.config.max_target_positions, args.output_dir
    threads = torch.get_num_threads()
    print(expected.compare("ctranslate2", ctranslate2_transcriber(directory, processor, positions, threads)))
    if args.clip_context:
        compare_contexts(args, processor, expected, positions)
    if faster_whisper_obstacle(model, processor) is not None:
        return
    transcribe = faster_whisper_transcriber(directory, expected.language, args.task, threads)
    print(expected.compare("faster-whisper", transcribe))
    print(
        "(greedy, no timestamps; ctranslate2 had the features of transformers; faster-whisper makes its own, and pads "
        "them with zeros where Whisper has silence)"
    )


def compare_contexts(
    args: ExportArguments, processor: WhisperProcessor, expected: Transcripts, positions: int
) -> None:
    """Print WER and time of CTranslate2 with the whole window and with the audio context of each clip."""
    shown = progress([clip.wave for clip in expected.clips], "ctranslate2, both contexts")
    both = transcribe_at_clip_context(args.output_dir, processor, shown, positions)
    references = [clip.text for clip in expected.clips]
    window, own = (
        error_rates(texts, references, expected.normalize)["wer"] for texts in (both.window_texts, both.clip_texts)
    )
    print(
        f"ctranslate2, {len(references)} clips: WER {window:.2f} %, {both.window_seconds:.2f} s with the whole window "
        f"of {processor.feature_extractor.chunk_length} s; WER {own:.2f} %, {both.clip_seconds:.2f} s at the audio "
        f"context of each clip: {both.window_seconds / both.clip_seconds:.2f}x (batch size 1)"
    )
