r"""Convert a Whisper model to CTranslate2, and compare its transcripts with those of transformers.

    pip install 'askd-hf[export]'
    askd-hf export --model runs/student --output_dir student-ct2 --dataset my_speech

writes a directory that faster-whisper loads, `faster_whisper.WhisperModel("student-ct2")`. Some clips of the dataset
are transcribed with transformers and with the converted model, both greedily and without timestamps. Texts that differ
are shown. --quantization int8 stores weights in 8 bits, a quarter of the size.

faster-whisper gives word timestamps only if the model's `generation_config.json` has alignment heads in layers that
the model has.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from ..arguments.export import ExportArguments
from ..arguments.parser import parse_args
from ..data import SAMPLING_RATE, decode_audio, load_speech_dataset
from ..errors import UserError
from ..evaluation.metrics import error_rates, text_normalizer
from ..export.ctranslate2 import (
    agreement,
    alignment_heads,
    check_extra,
    check_output_dir,
    export_ctranslate2,
    faster_whisper_obstacle,
    transcribe_at_clip_context,
    transcribe_ctranslate2,
    transcribe_faster_whisper,
    transcribe_transformers,
)
from ..models.generation_config import set_language
from ..models.loading import check_processor, load_processor, load_whisper
from ..progress import progress
from .options import options_of

OPTIONS = options_of("export")


class Clip(NamedTuple):
    """A clip to compare transcripts on."""

    name: str
    wave: np.ndarray  # 16 kHz, float32, `(samples,)`
    text: str  # the transcript of the dataset


def main(argv: list[str] | None = None) -> None:
    export(*parse_args(OPTIONS, argv, "askd-hf export", __doc__))


def export(args: ExportArguments) -> None:
    """Convert a model and compare transcripts, as examples/export.py does step by step.

    Raises `UserError` if a package is missing, the directory exists, or a model or the speech can't be used.
    """
    model, processor = load_model(args)
    clips = load_clips(args, processor)
    convert(args, model, processor)
    if clips is not None:
        compare(args, model, processor, clips)
    else:
        print("Not compared with transformers: give speech with --dataset")


def load_model(args: ExportArguments) -> tuple[WhisperForConditionalGeneration, WhisperProcessor]:
    """Load the model and its processor, after packages and output directory were checked."""
    check_extra()
    check_output_dir(args.output_dir)
    model, processor = load_whisper(args.model), load_processor(args.model)
    check_processor(model, processor)
    if args.dataset is not None:
        set_language(model, processor, args.language, args.task)
    return model, processor


def load_clips(args: ExportArguments, processor: WhisperProcessor) -> list[Clip] | None:
    """Return the clips to compare on. None without `--dataset`.

    Clips longer than the model's window are left out.
    """
    if args.dataset is None:
        return None
    window = processor.feature_extractor.chunk_length
    speech = load_speech_dataset(args.dataset, args.dataset_config, args.split)
    number = min(args.max_samples, len(speech))
    rows = speech.select(range(number))
    clips = [Clip(row["clip"], decode_audio(row["audio"]), row["text"] or "") for row in rows]
    clips = [clip for clip in clips if len(clip.wave) <= window * SAMPLING_RATE]
    if len(clips) < number:
        print(f"{number - len(clips)} clips longer than {window} s are left out")
    if not clips:
        raise UserError(f"--dataset {args.dataset}: none of its first {args.max_samples} clips fits {window} s")
    return clips


def convert(args: ExportArguments, model: WhisperForConditionalGeneration, processor: WhisperProcessor) -> None:
    """Write the converted model to `--output_dir`."""
    export_ctranslate2(model, processor, args.output_dir, args.quantization)
    obstacle = faster_whisper_obstacle(model, processor)
    if obstacle is None:
        print(f"{args.output_dir}: faster_whisper.WhisperModel({args.output_dir!r})")
    else:
        print(f"{args.output_dir}: ctranslate2.models.Whisper({args.output_dir!r})")
        print(f"faster-whisper can't run this model: {obstacle}")
    if alignment_heads(model) is None:
        print("No word timestamps: the model's generation config names no alignment heads that its decoder has")


def compare(
    args: ExportArguments,
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    clips: list[Clip],
) -> None:
    """Transcribe the clips with transformers and with the converted model, and print the texts that differ."""
    # a multilingual model's language is a code by now; the others are English-only
    language = getattr(model.generation_config, "language", None) or "en"
    normalize: Callable[[str], str] = text_normalizer(processor, None if args.task == "translate" else language)
    names, waves = [clip.name for clip in clips], [clip.wave for clip in clips]
    expected = transcribe_transformers(model, processor, progress(waves, "transformers"))
    shown = progress(waves, "ctranslate2")
    texts = transcribe_ctranslate2(args.output_dir, processor, shown, model.config.max_target_positions)
    print(agreement("ctranslate2", names, expected, texts, normalize))
    if args.clip_context:
        compare_contexts(args, processor, clips, model.config.max_target_positions, normalize)
    if faster_whisper_obstacle(model, processor) is not None:
        return
    shown = progress(waves, "faster-whisper")
    texts = transcribe_faster_whisper(args.output_dir, shown, language, args.task)
    print(agreement("faster-whisper", names, expected, texts, normalize))
    print(
        "(greedy, no timestamps; ctranslate2 had the features of transformers; faster-whisper makes its own, and pads "
        "them with zeros where Whisper has silence)"
    )


def compare_contexts(
    args: ExportArguments,
    processor: WhisperProcessor,
    clips: list[Clip],
    positions: int,
    normalize: Callable[[str], str],
) -> None:
    """Print WER and time of CTranslate2 with the whole window and with the audio context of each clip."""
    shown = progress([clip.wave for clip in clips], "ctranslate2, both contexts")
    both = transcribe_at_clip_context(args.output_dir, processor, shown, positions)
    references = [clip.text for clip in clips]
    window, own = (error_rates(texts, references, normalize)["wer"] for texts in (both.window_texts, both.clip_texts))
    print(
        f"ctranslate2, {len(clips)} clips: WER {window:.2f} %, {both.window_seconds:.2f} s with the whole window of "
        f"{processor.feature_extractor.chunk_length} s; WER {own:.2f} %, {both.clip_seconds:.2f} s at the audio "
        f"context of each clip: {both.window_seconds / both.clip_seconds:.2f}x (batch size 1)"
    )
