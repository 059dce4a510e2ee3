"""Options of `askd-hf export`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers.hf_argparser import HfArg

from ..errors import UserError

# The types of the weights by runtime. A further runtime gets an entry here, in `to`, and in RUNTIMES of
# commands/export.py.
QUANTIZATIONS = {
    "ctranslate2": (
        *("float32", "float16", "bfloat16", "int16"),
        *("int8", "int8_float32", "int8_float16", "int8_bfloat16"),
    ),
    "onnx": ("float32", "int8"),
    "ggml": ("f16", "q8_0", "q5_0"),
    "sherpa-onnx": ("float32", "int8"),
}


@dataclass
class ExportArguments:
    """The model, the format, and the clips to compare transcripts on."""

    model: str = HfArg(help="Whisper model: a directory or a Hub id.")
    to: Literal["ctranslate2", "onnx", "ggml", "sherpa-onnx"] = HfArg(
        default="ctranslate2",
        help="The runtime: ctranslate2 for faster-whisper, onnx for onnxruntime and transformers.js, ggml for "
        "whisper.cpp, sherpa-onnx for sherpa-onnx.",
    )
    output_dir: str | None = HfArg(
        default=None,
        help="Directory to write, which must not exist. Default: MODEL-ctranslate2, MODEL-onnx, MODEL-ggml or "
        "MODEL-sherpa-onnx in the current directory.",
    )
    # fmt: off
    quantization: Literal[
        "float32", "float16", "bfloat16", "int16", "int8", "int8_float32", "int8_float16", "int8_bfloat16",
        "f16", "q8_0", "q5_0",
    ] | None = HfArg(
        default=None,
        help="Type of the weights. onnx, sherpa-onnx: float32 or int8. ggml: f16, or q8_0 or q5_0 for blocks of 8 or "
        "5 bits. The others are of ctranslate2. Default: float32, with ggml f16.",
    )
    # fmt: on
    dataset: str | None = HfArg(
        default=None,
        help="Speech to compare on, as `askd-hf distill` takes it. Clips that are invalid or longer than the model's "
        "window are left out. Default: none.",
    )
    dataset_config: str | None = HfArg(default=None, help="Configuration of a Hub dataset.")
    split: str = HfArg(
        default="train", help="Split of --dataset. A directory without splits has the split train only."
    )
    max_samples: int = HfArg(default=20, help="Number of clips to compare on, the first of --dataset.")
    clip_context: bool = HfArg(
        default=False,
        help="Also transcribe with CTranslate2 at the audio context of each clip, its duration plus 0.64 s; print the "
        "WER and the time of both. For a model trained with a range of --window_seconds.",
    )
    language: str | None = HfArg(
        default=None,
        help="Language of the speech, for a multilingual model; onnx and sherpa-onnx take it as the default language. "
        "Default: that of its generation config.",
    )
    task: Literal["transcribe", "translate"] | None = HfArg(
        default=None, help="Task of a multilingual model. Default: that of its generation config."
    )

    def __post_init__(self):
        if self.output_dir is None:
            self.output_dir = f"{Path(self.model).name or Path(self.model).resolve().name}-{self.to}"
        types = QUANTIZATIONS[self.to]
        if self.quantization not in (None, *types):
            raise UserError(f"--to {self.to} has --quantization {' or '.join(types)}, got {self.quantization}")
        if self.clip_context and self.to != "ctranslate2":
            raise UserError("--clip_context requires --to ctranslate2")
        if self.max_samples < 1:
            raise UserError(f"--max_samples must be at least 1, got {self.max_samples}")
        if self.clip_context and self.dataset is None:
            raise UserError("--clip_context requires --dataset")
