"""The rows of `cost_model.py` measured beside computed, for the batches of a benchmark."""

import statistics
from typing import Any

import cost_model
from steps import print_table
from transformers import WhisperConfig

# of `comparison.VARIANTS`, in the order of the cost model's rows
ROWS = dict(zip(("a448", "a", "c", "d", "e", "f-ema"), cost_model.SCENARIOS, strict=True))


def cost_table(
    results: dict[str, dict[str, Any]],
    label_tokens: list[list[int]],
    teacher: WhisperConfig,
    student: WhisperConfig,
    peak_tflops: float | None,
) -> dict[str, dict[str, Any]]:
    """Print and return operations, time of a step, and hours of the GPU, computed and measured.

    Computed is what the cost model assumes of the GPU and of a run, with the batches' own numbers of clips and tokens.

    Args:
        results: of `comparison.measure`.
        label_tokens: of each clip of each batch.
        peak_tflops: of the device. None: the share that is reached isn't known.
    """
    shape = cost_model.Shape(
        teacher.d_model,
        teacher.encoder_layers,
        teacher.decoder_layers,
        teacher.num_mel_bins,
        teacher.vocab_size,
        teacher.max_source_positions,
        teacher.max_target_positions,
    )
    tokens, padded = statistics.mean(map(statistics.mean, label_tokens)), statistics.mean(map(max, label_tokens))
    args = cost_model.CostArguments(batch_size=len(label_tokens[0]), vocabulary=teacher.vocab_size)
    args.tokens_per_second, args.padding = tokens / args.clip_seconds, padded / tokens
    args.decoder_layers = student.decoder_layers
    args.window_seconds = teacher.max_source_positions // 50
    steps = args.epochs * 3600 * args.hours / args.clip_seconds / args.batch_size
    report, rows = {}, []
    for name, scenario in ROWS.items():
        if name not in results:
            continue
        computed = cost_model.compute_seconds(scenario, shape, args)
        seconds = statistics.median(results[name]["seconds"])
        flops = statistics.mean(results[name]["flops"])
        counted = flops / args.batch_size
        expected = cost_model.step_flops(scenario, shape, args.decoder_layers, tokens, padded)
        report[name] = {
            "row": scenario.name,
            "flops_per_clip": {"computed": expected, "counted": counted},
            "seconds_per_step": {"computed": computed, "measured": seconds},
        }
        share = f"{100 * flops / seconds / (peak_tflops * 1e12):.1f}" if peak_tflops else "n/a"
        cells = [
            f"{expected / 1e9:,.1f}",
            f"{counted / 1e9:,.1f}",
            f"{1000 * computed:,.1f}",
            f"{1000 * seconds:,.1f}",
        ]
        hours = [f"{steps * one / 3600:,.2f}" for one in (computed, seconds)]
        rows.append([scenario.name, *cells, share, *hours])
    heads = ["", "GFLOP per clip: computed", "counted", "ms per step: computed", "measured", "% of the peak"]
    print_table([*heads, "GPU hours: computed", "measured"], rows)
    print(
        f"(computed: an H100 at {args.utilization:.0%} of its peak in bf16. GPU hours: {args.epochs} epochs of "
        f"{args.hours:,.0f} hours of audio in clips of {args.clip_seconds:g} s)"
    )
    return report
