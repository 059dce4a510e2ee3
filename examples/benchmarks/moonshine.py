r"""Moonshine base, what a user could take for English speech on a device, on the clips of an evaluation.

    pip install --no-deps useful-moonshine-onnx
    python examples/benchmarks/moonshine.py --dataset my_speech --eval_splits test --max_duration_in_seconds 6 \
        --normalizer_file runs/my-student/normalizer.json

The weights (61 M parameters, MIT license) are loaded from the Hub, or from --models_dir: the 8-bit weights inside the
wheel of moonshine-cpp 0.1.4, for example. Decoding is greedy, with Moonshine's limit of 6.5 tokens per second. The
clips and the scores are those of `askd-hf evaluate`: WER, WER with at most all words of a clip as errors, loops.
"""

import functools
import math
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import jiwer
import numpy as np
import torch
from tqdm.auto import tqdm

from askd_hf.arguments.parser import parse_args
from askd_hf.data.audio import SAMPLING_RATE, waveform
from askd_hf.data.json_files import read_json
from askd_hf.errors import UserError, exit_on_user_error
from askd_hf.evaluation import DatasetSpec, prepare_set
from askd_hf.evaluation.metrics import normalize_pairs, normalizer_for
from askd_hf.evaluation.word_errors import capped_errors, count_errors, exclusion_reason, is_loop

TOKENS_PER_SECOND = 6.5


@dataclass
class Arguments:
    """The speech."""

    dataset: str = field(metadata={"help": "Directory with speech, or a Hub id."})
    eval_splits: str = field(default="train", metadata={"help": "Split of the dataset."})
    max_duration_in_seconds: float = field(default=30.0, metadata={"help": "Exclude longer clips."})
    no_speech: bool = field(default=False, metadata={"help": "The clips have no speech: count those with text."})
    models_dir: Path | None = field(
        default=None, metadata={"help": "Directory with encoder_model.ort and decoder_model_merged.ort."}
    )
    normalizer_file: Path | None = field(
        default=None, metadata={"help": "normalizer.json of the model to compare with: British to American spelling."}
    )


def load(models_dir: Path | None) -> tuple[Any, Any]:
    """Return the model and its tokenizer. Raises `UserError` if the package isn't installed."""
    try:
        import moonshine_onnx  # neither is a dependency of the project
        import onnxruntime
    except ImportError as error:
        raise UserError("Moonshine isn't installed: pip install --no-deps useful-moonshine-onnx") from error
    where = {} if models_dir is None else dict(models_dir=str(models_dir), model_format="ort")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # as PyTorch, for one comparison of speed
    session = functools.partial(onnxruntime.InferenceSession, sess_options=options)
    with mock.patch("onnxruntime.InferenceSession", session):  # the package has no option
        model = moonshine_onnx.MoonshineOnnxModel(model_name="base", **where)
    return model, moonshine_onnx.load_tokenizer()


def main() -> None:
    (args,) = parse_args((Arguments,), description=__doc__)
    spec = DatasetSpec("clips", args.dataset, None, args.eval_splits, language="en", no_speech=args.no_speech)
    (prepared,) = prepare_set(spec, window=args.max_duration_in_seconds)
    model, tokenizer = load(args.models_dir)
    texts, seconds = [], []
    for row in tqdm(prepared.clips, unit="clip"):
        wave, start = waveform(row)[None], time.perf_counter()
        tokens = model.generate(wave, max_len=math.ceil(TOKENS_PER_SECOND * wave.size / SAMPLING_RATE))
        texts.append(tokenizer.decode_batch(tokens)[0])
        seconds.append(time.perf_counter() - start)
    spelling = read_json(args.normalizer_file) if args.normalizer_file else {}
    name, normalize = normalizer_for("auto", "en", spelling)
    references, predictions = normalize_pairs(prepared.clips["text"][:], texts, normalize)
    size = f"{len(texts)} clips, median {1000 * statistics.median(seconds):.0f} ms per clip"
    if args.no_speech:
        print(f"{size}; text in {sum(map(bool, predictions))} clips without speech")
        return
    raw = prepared.clips["text"][:]
    scored = [i for i, text in enumerate(references) if exclusion_reason(raw[i], text) is None]
    references, predictions = ([texts[i] for i in scored] for texts in (references, predictions))
    lengths = np.array([len(text.split()) for text in references])
    errors = count_errors(jiwer.process_words(references, predictions)).total
    capped = capped_errors(errors, lengths).sum()
    words = lengths.sum()
    print(
        f"{size}, {words:,} words, normalizer {name}: WER {100 * errors.sum() / words:.1f} %, capped per clip "
        f"{100 * capped / words:.1f} %, {sum(map(is_loop, references, predictions))} loops"
    )


if __name__ == "__main__":
    with exit_on_user_error():
        main()
