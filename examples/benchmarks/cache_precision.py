r"""What the types of the encoder cache cost: the model's loss and WER on outputs that were stored and read again.

    python examples/benchmarks/cache_precision.py --model openai/whisper-tiny.en --dataset my_speech

For each of --encoder_cache_dtype, and for the outputs as they are: bytes per clip, the cross-entropy of the labels,
how many of the most probable tokens are those on the outputs as they are, and the WER of greedy decoding.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from steps import print_table
from torch import Tensor
from transformers import WhisperForConditionalGeneration
from transformers.hf_argparser import HfArg

from askd_hf import load_whisper
from askd_hf.arguments.parser import parse_args
from askd_hf.data import EncoderCache, SpeechCollator, load_speech_dataset, run_encoder
from askd_hf.errors import UserError, exit_on_user_error
from askd_hf.evaluation.metrics import error_rates, text_normalizer
from askd_hf.models.generation_config import set_language
from askd_hf.models.loading import load_processor
from askd_hf.progress import progress
from askd_hf.projection import at_positions
from askd_hf.training.generation import generation_inputs

EXACT = "not stored"


@dataclass
class PrecisionArguments:
    """Which model, on what."""

    model: str | None = HfArg(default=None, help="Hub id or directory.")
    dataset: str | None = HfArg(default=None, help="Directory with speech, as `askd-hf distill` takes it.")
    language: str | None = HfArg(default=None, help="Language of the speech, for a multilingual model.")
    clips: int = HfArg(default=100, help="Number of clips, the first of the dataset.")


def main() -> None:
    (args,) = parse_args((PrecisionArguments,), None, "cache_precision.py", __doc__)
    if not (args.model and args.dataset):
        raise UserError("--model and --dataset are required")
    model, processor = load_whisper(args.model).eval(), load_processor(args.model)
    set_language(model, processor, args.language, "transcribe")
    speech = load_speech_dataset(args.dataset, None, "train")
    rows = [speech[i] for i in range(min(args.clips, len(speech)))]
    collator = SpeechCollator(processor, model.config)
    positions, width = model.config.max_source_positions, model.config.d_model
    texts: dict[str, list[str]] = {}
    tops: dict[str, list[Tensor]] = {}
    losses: dict[str, list[Tensor]] = {}
    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        caches = {name: EncoderCache(Path(directory), positions, width, name) for name in ("float16", "int8")}
        for row in progress(rows, "Clips"):
            batch = collator([row])
            exact = run_encoder(model.model.encoder, batch["input_features"])
            stored = {name: unpacked(cache, exact) for name, cache in caches.items()}
            for name, outputs in {EXACT: exact, **stored}.items():
                of_labels, labels = label_logits(model, batch, outputs)
                tops.setdefault(name, []).append(of_labels.argmax(-1))
                losses.setdefault(name, []).append(F.cross_entropy(of_labels, labels, reduction="none"))
                tokens = model.generate(**generation_inputs(model, outputs, batch["labels"]), num_beams=1)
                texts.setdefault(name, []).extend(processor.tokenizer.batch_decode(tokens, skip_special_tokens=True))
    table, normalize = [], text_normalizer(processor, args.language)
    choices = torch.cat(tops[EXACT])
    for name in texts:
        size = 4 * positions * width if name == EXACT else caches[name].row_bytes
        same = (torch.cat(tops[name]) == choices).sum().item()
        wer = error_rates(texts[name], [row["text"] for row in rows], normalize)["wer"]
        loss = torch.cat(losses[name]).mean().item()
        table.append([name, f"{size / 1e6:.2f} MB", f"{loss:.4f}", f"{same} of {len(choices)}", f"{wer:.2f} %"])
    print_table(["outputs", "per clip", "cross-entropy", "same token", "WER"], table)
    print(f"({len(rows)} clips, greedy, {args.model})")


def unpacked(cache: EncoderCache, outputs: Tensor) -> Tensor:
    """Return outputs `(1, positions, width)` as they are read from the cache."""
    content = torch.frombuffer(bytearray(cache.packed(outputs.half())), dtype=torch.uint8).numpy()
    return torch.from_numpy(cache.unpacked(content)).float()[None]


def label_logits(
    model: WhisperForConditionalGeneration, batch: dict[str, Tensor], outputs: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the logits at the label tokens, `(tokens, vocabulary)`, and the labels."""
    inputs = dict(encoder_outputs=(outputs,), decoder_input_ids=batch["decoder_input_ids"])
    return tuple(
        at_positions(values, batch["label_positions"]) for values in (model(**inputs).logits, batch["labels"])
    )


if __name__ == "__main__":
    with exit_on_user_error():
        main()
