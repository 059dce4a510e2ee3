"""The steps of `askd-hf export --to sherpa-onnx`."""

from pathlib import Path

import torch
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from ..arguments.export import ExportArguments
from ..export.comparison import Transcripts
from ..export.sherpa_onnx import export_sherpa_onnx, restrictions, sherpa_onnx_transcriber


def convert(args: ExportArguments, model: WhisperForConditionalGeneration, processor: WhisperProcessor) -> None:
    """Write the converted model to `--output_dir`, and print its size and what sherpa-onnx can't do with it."""
    export_sherpa_onnx(model, processor, args.output_dir, args.quantization)
    size = sum(file.stat().st_size for file in Path(args.output_dir).iterdir())
    print(f"{args.output_dir}: {size / 1e6:.1f} MB, for sherpa_onnx.OfflineRecognizer.from_whisper")
    for restriction in restrictions(processor):
        print(f"sherpa-onnx: {restriction}")


def compare(
    args: ExportArguments,
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    expected: Transcripts,
) -> None:
    """Transcribe with sherpa-onnx, and print the texts that differ, the WER and the time of both."""
    directory, threads = args.output_dir, torch.get_num_threads()
    transcribe = sherpa_onnx_transcriber(directory, expected.language, args.task, args.quantization, threads)
    print(expected.compare("sherpa-onnx", transcribe))
    print("(greedy, no timestamps; sherpa-onnx makes its own features)")
