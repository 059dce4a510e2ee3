"""The steps of `askd-hf export --to ggml`."""

import torch
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from ..arguments.export import ExportArguments
from ..export.comparison import Transcripts
from ..export.ggml import check_ggml, export_ggml, ggml_file, restrictions, whisper_cpp_transcriber
from ..models.generation_config import is_multilingual

DEFAULT = "f16"


def convert(args: ExportArguments, model: WhisperForConditionalGeneration, processor: WhisperProcessor) -> None:
    """Write the converted model to `--output_dir`, and print its size, the command for it, and what isn't possible."""
    quantization = args.quantization or DEFAULT
    check_ggml(model, processor, quantization)
    file = export_ggml(model, processor, args.output_dir, quantization)
    options = ""
    if is_multilingual(model):  # whisper-cli takes speech as English without -l
        options = f" -l {getattr(model.generation_config, 'language', None) or 'auto'}"
        options += " -tr" if args.task == "translate" else ""
    print(f"{file}: {file.stat().st_size / 1e6:.1f} MB, whisper-cli -m {file}{options} -nt -nfa -f speech.wav")
    for restriction in restrictions(model, processor):
        print(f"whisper.cpp: {restriction}")


def compare(
    args: ExportArguments,
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    expected: Transcripts,
) -> None:
    """Transcribe with whisper.cpp, and print the texts that differ, the WER and the time of both."""
    file, threads = ggml_file(args.output_dir, args.quantization or DEFAULT), torch.get_num_threads()
    transcribe = whisper_cpp_transcriber(file, model, expected.language, args.task, threads)
    print(expected.compare("whisper.cpp", transcribe))
    print("(greedy, no timestamps; whisper.cpp makes its own features)")
