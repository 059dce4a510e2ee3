r"""What the order of the clips costs in batched decoding: by name, or longest first, as evaluation decodes them.

    python examples/benchmarks/decoding_order.py --model runs/my-student --dataset my_speech --eval_splits test

A batch is decoded until its longest text ends, and texts that have ended are padded meanwhile. Both orders take turns.
"""

import math
import statistics
import time
from dataclasses import dataclass, field

import torch
from datasets import Dataset

from askd_hf.arguments.parser import parse_args
from askd_hf.errors import exit_on_user_error
from askd_hf.evaluation import DatasetSpec, prepare_set
from askd_hf.evaluation.transcribe import Decoding, generate_batches
from askd_hf.models.generation_config import set_language
from askd_hf.models.loading import load_processor, load_whisper


@dataclass
class Arguments:
    """What is decoded, and how often."""

    model: str = field(metadata={"help": "Directory or Hub id of the model."})
    dataset: str = field(metadata={"help": "Directory with speech, or a Hub id."})
    eval_splits: str = field(default="train", metadata={"help": "Split of the dataset."})
    language: str | None = field(default=None, metadata={"help": "Language of the speech, for a multilingual model."})
    batch_size: int = field(default=16, metadata={"help": "Clips per batch."})
    repetitions: int = field(default=3, metadata={"help": "Timed passes per order."})


@torch.inference_mode()
def main() -> None:
    (args,) = parse_args((Arguments,))
    model, processor = load_whisper(args.model).eval(), load_processor(args.model)
    set_language(model, processor, args.language, "transcribe")
    spec = DatasetSpec("clips", args.dataset, None, args.eval_splits, language=args.language)
    sorted_clips = prepare_set(spec, window=processor.feature_extractor.chunk_length)[0].clips
    names = sorted_clips["clip"][:]
    in_file = sorted_clips.select(sorted(range(len(names)), key=names.__getitem__))
    orders = {"by name": in_file, "longest first": sorted_clips}
    seconds: dict[str, list[float]] = {name: [] for name in orders}
    steps: dict[str, tuple[int, int]] = {}

    def decode(clips: Dataset) -> tuple[float, int, int]:
        start, useful, computed = time.perf_counter(), 0, 0
        for batch in generate_batches(model, processor, clips, Decoding(batch_size=args.batch_size)):
            tokens = [transcript["tokens"] for transcript in batch]
            useful, computed = useful + sum(tokens), computed + max(tokens) * len(tokens)
        return time.perf_counter() - start, useful, computed

    for _ in range(args.repetitions):
        for name, clips in orders.items():
            elapsed, *steps[name] = decode(clips)
            seconds[name].append(elapsed)
    for name, times in seconds.items():
        useful, computed = steps[name]
        ratio = statistics.median(seconds["by name"]) / statistics.median(times)
        print(
            f"{name}: {statistics.median(times):.1f} s ({min(times):.1f} to {max(times):.1f}), {ratio:.2f}x; "
            f"{computed:,} decoder positions for {useful:,} tokens, {100 * (1 - useful / computed):.0f} % padding"
        )
    print(f"{len(names)} clips, batches of {args.batch_size}, {math.ceil(len(names) / args.batch_size)} batches")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
