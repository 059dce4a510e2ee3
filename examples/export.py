r"""Convert a Whisper for another runtime, and check that it hears the same there.

    pip install '.[export]'
    python examples/export.py --model runs/student --output_dir student-ct2 --dataset my_speech

writes a directory that faster-whisper loads, `faster_whisper.WhisperModel("student-ct2")`, and transcribes some clips
of the dataset with transformers and with the converted model, both greedily and without timestamps. Where the texts
differ, they are shown. Weights in 8 bits, a quarter of the size: --quantization int8.

faster-whisper gives word timestamps if the model's `generation_config.json` names alignment heads that it has, and
refuses them otherwise.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tqdm.auto import tqdm

from askd_hf import UserError, load_processor, load_speech_dataset, load_whisper
from askd_hf.arguments.parser import parse_args
from askd_hf.data import SAMPLING_RATE, decode_audio
from askd_hf.errors import exit_on_user_error
from askd_hf.evaluation.metrics import text_normalizer
from askd_hf.export.ctranslate2 import (
    FASTER_WHISPER_WINDOW,
    agreement,
    alignment_heads,
    check_extra,
    check_output_dir,
    export_ctranslate2,
    transcribe_ctranslate2,
    transcribe_faster_whisper,
    transcribe_transformers,
)
from askd_hf.models.generation_config import set_language
from askd_hf.models.loading import check_processor


@dataclass
class ExportArguments:
    """What is converted, to what, and the clips that are compared."""

    model: str = field(metadata={"help": "Whisper model: a directory or a Hub id."})
    to: Literal["ctranslate2"] = field(
        default="ctranslate2",
        metadata={
            "help": "The runtime. ONNX and ggml are left out: optimum-onnx 0.1 needs transformers 4, the converter of "
            "onnxruntime-genai 0.18 fails on a decoder that has fewer layers than the encoder, as all students have, "
            "and whisper.cpp's is in no package."
        },
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Directory to write; it must not be there. Default: MODEL-ctranslate2, here."}
    )
    quantization: (
        Literal["float32", "float16", "bfloat16", "int16", "int8", "int8_float32", "int8_float16", "int8_bfloat16"]
        | None
    ) = field(default=None, metadata={"help": "Type of the weights. Default: as they are, float32."})
    dataset: str | None = field(
        default=None, metadata={"help": "Speech to compare on, as examples/distill.py takes it. Default: none."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    split: str = field(default="train", metadata={"help": "Its split; of a directory without splits: train."})
    max_samples: int = field(default=20, metadata={"help": "Compare on the first so many clips."})
    language: str | None = field(default=None, metadata={"help": "Language of the speech, for a multilingual model."})
    task: Literal["transcribe", "translate"] = field(
        default="transcribe", metadata={"help": "What a multilingual model is asked to do with the speech."}
    )

    def __post_init__(self):
        if self.output_dir is None:
            self.output_dir = f"{Path(self.model).name}-{self.to}"
        if self.max_samples < 1:
            raise UserError(f"--max_samples {self.max_samples}: at least one clip is needed to compare")


def main() -> None:
    (args,) = parse_args((ExportArguments,))
    check_extra()
    check_output_dir(args.output_dir)
    model, processor = load_whisper(args.model), load_processor(args.model)
    check_processor(model, processor)
    window = processor.feature_extractor.chunk_length
    names, clips = ([], []) if args.dataset is None else load_clips(args, window)
    if clips:
        set_language(model, processor, args.language, args.task)

    export_ctranslate2(model, processor, args.output_dir, args.quantization)
    print(f"{args.output_dir}: faster_whisper.WhisperModel({args.output_dir!r})")
    if alignment_heads(model) is None:
        print("No word timestamps: the model's generation config names no alignment heads that its decoder has")

    if not clips:
        print("Not compared with transformers: give speech with --dataset")
        return
    # a multilingual model's language is a code by now; the others know English only
    language = getattr(model.generation_config, "language", None) or "en"
    normalize = text_normalizer(processor, None if args.task == "translate" else language)
    expected = transcribe_transformers(model, processor, tqdm(clips, desc="transformers", leave=False))
    progress = tqdm(clips, desc="ctranslate2", leave=False)
    heard = transcribe_ctranslate2(args.output_dir, processor, progress, model.config.max_target_positions)
    print(agreement("ctranslate2", names, expected, heard, normalize))
    if window != FASTER_WHISPER_WINDOW:
        print(f"faster-whisper: can't run this model, whose window is {window} s and not {FASTER_WHISPER_WINDOW} s")
        return
    progress = tqdm(clips, desc="faster-whisper", leave=False)
    heard = transcribe_faster_whisper(args.output_dir, progress, language, args.task)
    print(agreement("faster-whisper", names, expected, heard, normalize))
    print(
        "(greedy, no timestamps; ctranslate2 had the features of transformers; faster-whisper makes its own, and pads "
        "them with zeros where Whisper has silence)"
    )


def load_clips(args: ExportArguments, window: int) -> tuple[list[str], list]:
    """The names and waveforms of the clips to compare; those longer than the model's window, seconds, are left out."""
    speech = load_speech_dataset(args.dataset, args.dataset_config, args.split)
    names, clips = [], []
    for row in speech.select(range(min(args.max_samples, len(speech)))):
        clip = decode_audio(row["audio"])
        if len(clip) <= window * SAMPLING_RATE:
            names.append(row["clip"])
            clips.append(clip)
    if len(clips) < min(args.max_samples, len(speech)):
        print(f"{min(args.max_samples, len(speech)) - len(clips)} clips longer than {window} s are left out")
    if not clips:
        raise UserError(f"--dataset {args.dataset}: none of its first {args.max_samples} clips fits {window} s")
    return names, clips


if __name__ == "__main__":
    with exit_on_user_error():
        main()
