r"""Convert a Whisper model to another runtime, and compare its transcripts with those of transformers.

    pip install 'askd-hf[export]'
    askd-hf export --model runs/student --output_dir student-ct2 --dataset my_speech

writes a directory that faster-whisper loads, `faster_whisper.WhisperModel("student-ct2")`. Some clips of the dataset
are transcribed with transformers and with the converted model, both greedily and without timestamps. Texts that differ
are shown. --quantization int8 stores weights in 8 bits, a quarter of the size.

    pip install 'askd-hf[onnx]'
    askd-hf export --model runs/student --to onnx --output_dir student-onnx --dataset my_speech

writes a directory that onnxruntime and transformers.js load, in Node.js or in a browser: examples/web has a page.
--to ggml (pip install 'askd-hf[ggml]') writes a file for whisper.cpp, --to sherpa-onnx
(pip install 'askd-hf[sherpa-onnx]') a directory for sherpa-onnx.

faster-whisper gives word timestamps only if the model's `generation_config.json` has alignment heads in layers that
the model has: see `askd-hf select-heads`.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

from transformers import WhisperForConditionalGeneration, WhisperProcessor

from ..arguments.export import ExportArguments
from ..arguments.parser import parse_args
from ..evaluation.metrics import text_normalizer
from ..export import comparison, ctranslate2, ggml, onnx, sherpa_onnx
from ..export.comparison import Clip, Transcripts, check_output_dir, transformers_transcriber
from ..models.generation_config import set_language
from ..models.loading import check_processor, load_processor, load_whisper
from ..progress import progress
from . import export_ctranslate2, export_ggml, export_onnx, export_sherpa_onnx
from .options import options_of

OPTIONS = options_of("export")


class Runtime(NamedTuple):
    """What the command calls for a value of `--to`."""

    check_extra: Callable[[], None]  # raises `UserError` if packages are missing
    convert: Callable[[ExportArguments, WhisperForConditionalGeneration, WhisperProcessor], None]
    compare: Callable[[ExportArguments, WhisperForConditionalGeneration, WhisperProcessor, Transcripts], None]


RUNTIMES = {
    "ctranslate2": Runtime(ctranslate2.check_extra, export_ctranslate2.convert, export_ctranslate2.compare),
    "onnx": Runtime(onnx.check_extra, export_onnx.convert, export_onnx.compare),
    "ggml": Runtime(ggml.check_ggml_extra, export_ggml.convert, export_ggml.compare),
    "sherpa-onnx": Runtime(
        sherpa_onnx.check_sherpa_onnx_extra, export_sherpa_onnx.convert, export_sherpa_onnx.compare
    ),
}


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
    """Load the model and its processor, after packages and output directory were checked. Sets `args.task`."""
    RUNTIMES[args.to].check_extra()
    check_output_dir(args.output_dir)
    model, processor = load_whisper(args.model), load_processor(args.model)
    check_processor(model, processor)
    config, is_given = model.generation_config, args.language is not None or args.task is not None
    args.task = args.task or getattr(config, "task", None) or "transcribe"
    if args.dataset is not None or is_given:
        set_language(model, processor, args.language or getattr(config, "language", None), args.task)
    return model, processor


def load_clips(args: ExportArguments, processor: WhisperProcessor) -> list[Clip] | None:
    """Return the clips to compare on. None without `--dataset`."""
    if args.dataset is None:
        return None
    window = processor.feature_extractor.chunk_length
    return comparison.load_clips(args.dataset, args.dataset_config, args.split, args.max_samples, window)


def convert(args: ExportArguments, model: WhisperForConditionalGeneration, processor: WhisperProcessor) -> None:
    """Write the converted model to `--output_dir`."""
    RUNTIMES[args.to].convert(args, model, processor)


def compare(
    args: ExportArguments,
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    clips: list[Clip],
) -> None:
    """Transcribe the clips with transformers and with the converted model, and print the texts that differ."""
    # a multilingual model's language is a code by now; the others are English-only
    language = getattr(model.generation_config, "language", None) or "en"
    normalize = text_normalizer(processor, None if args.task == "translate" else language)
    transcribe = transformers_transcriber(model, processor)
    start = time.perf_counter()
    texts = [transcribe(wave) for wave in progress([clip.wave for clip in clips], "transformers")]
    expected = Transcripts(clips, texts, language, normalize, time.perf_counter() - start)
    RUNTIMES[args.to].compare(args, model, processor, expected)
