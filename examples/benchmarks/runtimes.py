r"""Compare faster-whisper, CTranslate2, whisper.cpp, onnxruntime and sherpa-onnx on one student.

Printed are speed, size, WER, and agreement with transformers.

    pip install 'askd-hf[export,onnx,ggml,sherpa-onnx]'
    OMP_NUM_THREADS=1 python examples/benchmarks/runtimes.py --model runs/my-student --dataset my_test_speech

Batch size 1, greedy, without timestamps, from the waveform to the text. The runtimes take turns on each clip, so that
other load on the machine affects all of them; of several passes the fastest of each clip counts. CTranslate2 and
onnxruntime have the features of transformers, the others make their own. Runtimes that can't run
the model are left out, with the reason.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from askd_hf.arguments.parser import parse_args
from askd_hf.data import SAMPLING_RATE
from askd_hf.errors import exit_on_user_error
from askd_hf.evaluation.metrics import error_rates, text_normalizer
from askd_hf.evaluation.result_tables import Table, speedup
from askd_hf.export import ctranslate2, ggml, onnx, sherpa_onnx
from askd_hf.export.comparison import Clip, Transcriber, agreement, load_clips, transformers_transcriber
from askd_hf.models.generation_config import set_language
from askd_hf.models.loading import check_processor, load_processor, load_whisper
from askd_hf.progress import progress

WEIGHTS = (".bin", ".onnx", ".onnx_data", ".safetensors")


@dataclass
class Arguments:
    """The model and the speech."""

    model: str = field(metadata={"help": "Directory or Hub id of the model."})
    dataset: str = field(metadata={"help": "Directory with speech, or a Hub id."})
    split: str = field(default="train", metadata={"help": "Split of the dataset."})
    language: str | None = field(default=None, metadata={"help": "Language of the speech, for a multilingual model."})
    max_samples: int = field(default=100, metadata={"help": "Number of clips, the first of the dataset."})
    repetitions: int = field(default=3, metadata={"help": "Timed passes."})


class Runtime(NamedTuple):
    name: str
    weights: str
    mb: float  # size of the weight files, 10^6 bytes
    transcribe: Transcriber


class Measured(NamedTuple):
    texts: list[str]
    seconds: list[float]  # per clip


def size_mb(directory: Path) -> float:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.suffix in WEIGHTS) / 1e6


def load_model(args: Arguments) -> tuple[WhisperForConditionalGeneration, WhisperProcessor]:
    model, processor = load_whisper(args.model).float().eval(), load_processor(args.model)
    check_processor(model, processor)
    set_language(model, processor, args.language, "transcribe")
    return model, processor


def runtimes(
    model: WhisperForConditionalGeneration, processor: WhisperProcessor, language: str, work: Path
) -> Iterator[Runtime]:
    """Convert the model to every format in `work`, and yield the runtimes. transformers is the first."""
    threads, positions = torch.get_num_threads(), model.config.max_target_positions
    model.save_pretrained(work / "float32")
    yield Runtime("transformers", "float32", size_mb(work / "float32"), transformers_transcriber(model, processor))
    obstacle = ctranslate2.faster_whisper_obstacle(model, processor)
    if obstacle is not None:
        print(f"faster-whisper can't run this model: {obstacle}")
    for weights in ("float32", "int8"):
        directory = work / f"ctranslate2-{weights}"
        ctranslate2.export_ctranslate2(model, processor, directory, weights)
        mb = size_mb(directory)
        of_features = ctranslate2.ctranslate2_transcriber(directory, processor, positions, threads)
        yield Runtime("CTranslate2", weights, mb, of_features)
        if obstacle is None:
            of_waves = ctranslate2.faster_whisper_transcriber(directory, language, "transcribe", threads)
            yield Runtime("faster-whisper", weights, mb, of_waves)
    obstacle = ggml.ggml_obstacle(model, processor)
    if obstacle is not None:
        print(f"whisper.cpp can't run this model: {obstacle}")
    for weights in ("f16", "q8_0", "q5_0") if obstacle is None else ():
        file = ggml.export_ggml(model, processor, work / f"ggml-{weights}", weights)
        of_waves = ggml.whisper_cpp_transcriber(file, model, language, "transcribe", threads)
        yield Runtime("whisper.cpp", weights, size_mb(file.parent), of_waves)
    for weights in ("float32", "int8"):
        directory = work / f"onnx-{weights}"
        onnx.export_onnx(model, processor, directory, weights)
        yield Runtime("onnxruntime", weights, size_mb(directory), onnx.onnx_transcriber(directory, processor, threads))
    obstacle = sherpa_onnx.sherpa_onnx_obstacle(model, processor)
    if obstacle is not None:
        print(f"sherpa-onnx can't run this model: {obstacle}")
    for weights, quantization in (("float32", None), ("int8", "int8")) if obstacle is None else ():
        directory = work / f"sherpa-onnx-{weights}"
        sherpa_onnx.export_sherpa_onnx(model, processor, directory, quantization)
        of_waves = sherpa_onnx.sherpa_onnx_transcriber(directory, language, "transcribe", quantization, threads)
        yield Runtime("sherpa-onnx", weights, size_mb(directory), of_waves)


def measure(found: list[Runtime], clips: list[Clip], repetitions: int) -> list[Measured]:
    """Transcribe each clip with all runtimes in turn, beginning with another one each time."""
    measured = [Measured([], [float("inf")] * len(clips)) for _ in found]
    for runtime in found:
        runtime.transcribe(clips[0].wave)  # untimed
    for repetition in range(repetitions):
        for number, clip in enumerate(progress(clips, f"Pass {repetition + 1} of {repetitions}")):
            for turn in range(len(found)):
                which = (turn + number + repetition) % len(found)
                start = time.perf_counter()
                text = found[which].transcribe(clip.wave)
                seconds = time.perf_counter() - start
                measured[which].seconds[number] = min(seconds, measured[which].seconds[number])
                if repetition == 0:
                    measured[which].texts.append(text)
    return measured


def table(found: list[Runtime], measured: list[Measured], clips: list[Clip], normalize: Callable[[str], str]) -> Table:
    audio, references = sum(len(clip.wave) for clip in clips) / SAMPLING_RATE, [clip.text for clip in clips]
    expected, rows = measured[0], []
    for runtime, own in zip(found, measured, strict=True):
        total = sum(own.seconds)
        same = sum(one.strip() == other.strip() for one, other in zip(expected.texts, own.texts, strict=True))
        rows.append(
            [
                runtime.name,
                runtime.weights,
                f"{runtime.mb:.0f}",
                f"{total / len(clips):.3f}",
                f"{total / audio:.4f}",
                speedup(sum(expected.seconds) / total),
                f"{error_rates(own.texts, references, normalize)['wer']:.2f}",
                f"{same} of {len(clips)}",
            ]
        )
    header = ["runtime", "weights", "MB", "s per clip", "real-time factor", "as fast", "WER, %", "same text"]
    threads = torch.get_num_threads()
    conditions = f"batch size 1, {threads} thread{'s' * (threads > 1)}, from waveform to text"
    notes = [f"{len(clips)} clips, {audio:.0f} s of audio, {conditions}"]
    return Table("Runtimes", header, rows, 2, notes)


def main() -> None:
    (args,) = parse_args((Arguments,), description=__doc__)
    extras = (ctranslate2.check_extra, onnx.check_extra, ggml.check_ggml_extra, sherpa_onnx.check_sherpa_onnx_extra)
    for check in extras:
        check()
    model, processor = load_model(args)
    clips = load_clips(args.dataset, None, args.split, args.max_samples, processor.feature_extractor.chunk_length)
    language = getattr(model.generation_config, "language", None) or "en"
    normalize = text_normalizer(processor, language)
    with tempfile.TemporaryDirectory() as work:
        found = list(runtimes(model, processor, language, Path(work)))
        measured = measure(found, clips, args.repetitions)
    result = table(found, measured, clips, normalize)
    print(f"{result.markdown()}\n\n{result.notes[0]}.\n")
    names = [clip.name for clip in clips]
    for runtime, own in zip(found[1:], measured[1:], strict=True):
        print(agreement(f"{runtime.name}, {runtime.weights}", names, measured[0].texts, own.texts, normalize))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
