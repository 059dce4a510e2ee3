"""Train a small Whisper with windows of 3 s from scratch, on digit strings composed on the fly.

python examples/demo/train_teacher.py

widen_teacher.py makes the teacher of the demo from it. The length of the training is fixed in advance, and nothing is
evaluated in it.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soxr
import torch
from digits import HERE, MAX_SECONDS, SAMPLE_RATE, WORDS, Takes, compose, load_takes
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
    get_cosine_schedule_with_warmup,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

# The special tokens that Whisper's code looks up by name, in Whisper's order; "<|notimestamps|>" must be the last,
# because every id above it is read as a timestamp.
SPECIAL_TOKENS = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|translate|>", "<|transcribe|>"]
SPECIAL_TOKENS += ["<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]


def build_processor() -> WhisperProcessor:
    """Features of 3 s windows, and a byte-level BPE in which "five" and " five" are one token each."""
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        merges += [(word[:end], word[end]) for end in range(1, len(word))]
    merges += [("Ġ", word) for word in WORDS]
    merges = list(dict.fromkeys(merges))
    pieces = list(bytes_to_unicode().values()) + ["".join(pair) for pair in merges]
    tokenizer = WhisperTokenizer(
        vocab={piece: index for index, piece in enumerate(pieces + SPECIAL_TOKENS)},
        merges=merges,
        pad_token="<|endoftext|>",
        extra_special_tokens=SPECIAL_TOKENS,
    )
    return WhisperProcessor(WhisperFeatureExtractor(feature_size=80, chunk_length=int(MAX_SECONDS)), tokenizer)


def build_model(processor: WhisperProcessor) -> WhisperForConditionalGeneration:
    ids = {name: processor.tokenizer.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS}
    shared = {
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|endoftext|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "decoder_start_token_id": ids["<|startoftranscript|>"],
        "suppress_tokens": None,
        "begin_suppress_tokens": None,
    }
    config = WhisperConfig(
        vocab_size=len(processor.tokenizer),
        d_model=128,
        encoder_layers=3,
        decoder_layers=4,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=256,
        decoder_ffn_dim=256,
        max_source_positions=processor.feature_extractor.nb_max_frames // 2,
        max_target_positions=64,
        dropout=0.1,
        init_std=0.06,  # the default 0.02 suits wide models; at this width attention then takes much longer to form
        apply_spec_augment=True,
        mask_time_prob=0.1,
        mask_time_length=8,
        mask_feature_prob=0.1,
        mask_feature_length=8,
        **shared,
    )
    model = WhisperForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        max_length=32,
        is_multilingual=False,  # as the English-only Whisper: no language, no task in the prompt
        no_timestamps_token_id=ids["<|notimestamps|>"],
        prev_sot_token_id=ids["<|startofprev|>"],
        return_timestamps=False,
        **shared,
    )
    return model


def augment(rng: np.random.Generator, wave: np.ndarray, speed: float) -> np.ndarray:
    """Vary noise, microphone (spectral tilt), voice (speed and pitch together) and loudness; return 16 kHz."""
    noise = rng.standard_normal(len(wave)).astype(np.float32)
    loudness = max(float(np.sqrt(np.mean(wave**2))), 1e-3)
    wave = wave + noise * loudness * 10 ** (-rng.uniform(10, 60) / 20)
    tilt = rng.uniform(-0.6, 0.6)
    wave = np.concatenate([wave[:1], wave[1:] - tilt * wave[:-1]])
    wave = soxr.resample(wave, SAMPLE_RATE * speed, 16000, quality="LQ")
    return wave * 10 ** (rng.uniform(-25, 5) / 20)


def warp_frequency(features: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Stretch the mel axis of each clip, as a longer or shorter vocal tract does, and leave its tempo alone."""
    theta = torch.zeros(len(features), 2, 3)
    theta[:, 0, 0] = 1.0
    theta[:, 1, 1] = factor
    theta[:, 1, 2] = factor - 1.0  # the lowest band stays where it is
    grid = torch.nn.functional.affine_grid(theta, [len(features), 1, *features.shape[1:]], align_corners=False)
    images = features[:, None]
    return torch.nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)[:, 0]


def make_batch(
    rng: np.random.Generator, takes: Takes, processor: WhisperProcessor, size: int, max_digits: int
) -> dict[str, torch.Tensor]:
    waves, texts = [], []
    for _ in range(size):
        speaker = takes[list(takes)[rng.integers(len(takes))]]
        speed = rng.uniform(0.8, 1.25)
        room = MAX_SECONDS * speed  # seconds at 8 kHz that fill the window once the speed is changed
        wave, text = compose(rng, speaker, 1, max_digits, (0.0, 0.35), room)
        if rng.random() < 0.03:
            wave, text = np.zeros_like(wave), ""  # noise alone is transcribed as nothing
        start = rng.integers(int(room * SAMPLE_RATE) - len(wave) + 1) if rng.random() < 0.3 else 0
        wave = np.concatenate([np.zeros(start, dtype=np.float32), wave])
        waves.append(augment(rng, wave, speed))
        texts.append(text)
    features = processor.feature_extractor(waves, sampling_rate=16000, return_tensors="pt").input_features
    features = warp_frequency(features, torch.from_numpy(rng.uniform(0.92, 1.1, size).astype(np.float32)))
    texts = [text and f" {text}" for text in texts]  # as Whisper writes: a space before the first word too
    tokens = processor.tokenizer(texts, padding=True, return_tensors="pt")
    labels = tokens.input_ids.masked_fill(tokens.attention_mask == 0, -100)
    return {"input_features": features, "labels": labels[:, 1:]}  # forward puts the start token back


def train(
    model: WhisperForConditionalGeneration,
    batch: Callable[[int], dict[str, torch.Tensor]],
    steps: int,
    learning_rate: float,
    warmup_steps: int,
) -> None:
    """Train `model` on the batches of steps 1 to `steps`, and print its loss. The last weights are the result."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    print(f"{sum(weight.numel() for weight in model.parameters()) / 1e6:.2f} M parameters")
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.01)
    scheduler = get_cosine_schedule_with_warmup(optimizer, warmup_steps, steps)
    began, losses = time.time(), []
    for step in range(1, steps + 1):
        loss = model(**batch(step)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 20 == 0:
            print(f"step {step} loss {np.mean(losses[-20:]):.3f} {(time.time() - began) / 60:.1f} min", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5400)
    parser.add_argument("--batch_size", type=int, default=24)
    parser.add_argument("--learning_rate", type=float, default=1.2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="1 where other work shares the cores: much faster then")
    parser.add_argument("--output_dir", type=Path, default=HERE.parents[1] / "runs" / "short_teacher")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    np.random.seed(args.seed)  # Whisper's SpecAugment draws from numpy's global generator
    rng = np.random.default_rng(args.seed)
    processor = build_processor()
    model = build_model(processor).train()
    takes = load_takes("teacher")

    def batch(step: int) -> dict[str, torch.Tensor]:
        # Short strings first: cross-attention learns where a digit is before it has to learn the order of several.
        max_digits = min(5, 1 + int(5 * step / (0.25 * args.steps)))
        return make_batch(rng, takes, processor, args.batch_size, max_digits)

    train(model, batch, args.steps, args.learning_rate, min(200, args.steps // 10))
    # A student made from this model's configuration should not inherit how the teacher was regularized.
    model.config.update({"apply_spec_augment": False, "dropout": 0.0})
    model.half().save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
