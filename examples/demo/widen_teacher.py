"""Give the small teacher of the demo Whisper's shape: windows of 30 s, and more tokens than the digits need.

python examples/demo/widen_teacher.py

The encoder's positions are sinusoids, so the longer window has no new weights, only silence that the model learns
to ignore. The new tokens are pieces of English words. At the end the teacher is evaluated once, on `data/studio`.
"""

import argparse
import csv
import json
from pathlib import Path

import jiwer
import numpy as np
import soundfile as sf
import soxr
import torch
from digits import HERE, load_takes
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from train_teacher import SPECIAL_TOKENS, make_batch, train
from transformers import (
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)
from transformers.models.whisper.modeling_whisper import sinusoids

TEXT = HERE.parents[1] / "LICENSE"  # English text whose words become tokens
TOKENS = 1500
WINDOW = 30  # seconds


def add_tokens(tokenizer: WhisperTokenizer, size: int) -> WhisperTokenizer:
    """Return a tokenizer of `size` tokens: those of `tokenizer`, and the most frequent pieces of `TEXT`.

    Its own merges come first, so what it was trained on is tokenized as before. Special tokens stay the last.
    """
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in bpe["merges"]]
    pieces = [piece for piece in sorted(bpe["vocab"], key=bpe["vocab"].get) if piece not in SPECIAL_TOKENS]
    text = Tokenizer(BPE())
    text.pre_tokenizer = ByteLevel(add_prefix_space=False)
    text.train(
        [str(TEXT)], BpeTrainer(vocab_size=2 * size, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    )
    for left, right in json.loads(text.to_str())["model"]["merges"]:
        if len(pieces) + len(SPECIAL_TOKENS) == size:
            break
        if left + right not in pieces:
            merges.append((left, right))
            pieces.append(left + right)
    vocab = {piece: index for index, piece in enumerate(pieces + SPECIAL_TOKENS)}
    assert len(vocab) == size, f"{TEXT} has only enough text for {len(vocab)} tokens"
    return WhisperTokenizer(vocab=vocab, merges=merges, pad_token="<|endoftext|>", extra_special_tokens=SPECIAL_TOKENS)


def widen(
    short: WhisperForConditionalGeneration, old: WhisperTokenizer, new: WhisperTokenizer
) -> WhisperForConditionalGeneration:
    """Return `short` with windows of 30 s and the tokens of `new`; the new ones have random embeddings."""
    moved = {index: new.convert_tokens_to_ids(token) for token, index in old.get_vocab().items()}
    shared = {name: moved[getattr(short.config, name)] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    shared["decoder_start_token_id"] = moved[short.config.decoder_start_token_id]
    config = WhisperConfig.from_dict(
        short.config.to_dict() | shared | {"vocab_size": len(new), "max_source_positions": 50 * WINDOW}
    )
    wide = WhisperForConditionalGeneration(config)
    weights = {name: weight.float() for name, weight in short.state_dict().items()}
    weights["model.encoder.embed_positions.weight"] = sinusoids(50 * WINDOW, config.d_model)
    embeddings = wide.state_dict()["proj_out.weight"].clone()
    embeddings[list(moved.values())] = weights["proj_out.weight"][list(moved)]
    weights["proj_out.weight"] = weights["model.decoder.embed_tokens.weight"] = embeddings
    wide.load_state_dict(weights)
    generation = short.generation_config
    generation.update(
        **shared,
        no_timestamps_token_id=moved[generation.no_timestamps_token_id],
        prev_sot_token_id=moved[generation.prev_sot_token_id],
    )
    wide.generation_config = generation
    return wide


@torch.no_grad()
def evaluate(model: WhisperForConditionalGeneration, processor: WhisperProcessor, folder: Path) -> tuple[float, int]:
    """WER of greedy decoding on an audio folder, without any text normalizer, and the number of strings."""
    with open(folder / "metadata.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    model.eval()
    predictions: list[str] = []
    for begin in range(0, len(rows), 40):
        waves = []
        for row in rows[begin : begin + 40]:
            wave, sample_rate = sf.read(folder / row["file_name"], dtype="float32")
            waves.append(soxr.resample(wave, sample_rate, 16000))
        inputs = processor(waves, sampling_rate=16000, return_tensors="pt", return_attention_mask=True)
        tokens = model.generate(**inputs.to(model.dtype), num_beams=1)
        predictions += processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    model.train()
    return jiwer.wer([row["transcription"] for row in rows], [text.strip() for text in predictions]), len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short_teacher", type=Path, default=HERE.parents[1] / "runs" / "short_teacher")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output_dir", type=Path, default=HERE / "teacher")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    short = WhisperForConditionalGeneration.from_pretrained(args.short_teacher, dtype=torch.float32)
    old = WhisperTokenizer.from_pretrained(args.short_teacher)
    tokenizer = add_tokens(old, TOKENS)
    processor = WhisperProcessor(WhisperFeatureExtractor(feature_size=80, chunk_length=WINDOW), tokenizer)
    model = widen(short, old, tokenizer).train()
    takes = load_takes("teacher")
    train(
        model,
        lambda step: make_batch(rng, takes, processor, args.batch_size, 5),
        args.steps,
        args.learning_rate,
        min(20, args.steps // 10),
    )
    wer, count = evaluate(model, processor, HERE / "data" / "studio")
    print(f"studio WER {wer:.2%} on {count} strings")
    model.half().save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
