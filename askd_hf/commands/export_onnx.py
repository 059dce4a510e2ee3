"""The steps of `askd-hf export --to onnx`."""

from pathlib import Path

import torch
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from ..arguments.export import ExportArguments
from ..export.comparison import Transcripts
from ..export.onnx import export_onnx, onnx_transcriber, restrictions


def convert(args: ExportArguments, model: WhisperForConditionalGeneration, processor: WhisperProcessor) -> None:
    """Write the converted model to `--output_dir`, and print its size and what transformers.js can't do with it."""
    export_onnx(model, processor, args.output_dir, args.quantization)
    size = sum(file.stat().st_size for file in Path(args.output_dir, "onnx").iterdir())
    print(f"{args.output_dir}: {size / 1e6:.1f} MB in onnx/, for onnxruntime and transformers.js")
    for restriction in restrictions(model, processor):
        print(f"transformers.js: {restriction}")


def compare(
    args: ExportArguments,
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    expected: Transcripts,
) -> None:
    """Transcribe with onnxruntime, and print the texts that differ, the WER and the time of both."""
    directory, threads = args.output_dir, torch.get_num_threads()
    print(expected.compare("onnxruntime", onnx_transcriber(directory, processor, threads)))
    print("(greedy, no timestamps; onnxruntime had the features of transformers)")
