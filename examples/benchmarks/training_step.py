r"""What a training step costs: naive distillation, plain fine-tuning and ours, side by side in one run.

    python examples/benchmarks/training_step.py --model tiny --json runs/benchmark-tiny.json

makes a Whisper of random weights in the shape of tiny (base, small, large-v3; or `--model DIRECTORY`), a student with
2 of its decoder layers, and batches of random features and labels (or `--dataset DIRECTORY` with speech). Then every
variant makes one update in turn, again and again, so that whatever else the machine does meets all of them:

    a           naive: teacher and student whole, full-vocabulary KL and CE, labels padded to the batch's longest
    a448        the same with labels padded to the decoder's 448 positions, as distil-whisper pads them
    b           Seq2SeqTrainer, plain fine-tuning of the same student
    c           ASKDTrainer in its teacher phase, nothing cached
    d           c with the encoder's output cached
    e           d with the teacher's most probable tokens cached: the teacher isn't run
    f-ema       ASKDTrainer in its self phase, the self-teacher an average; the encoder's output cached
    f-snapshot  the same with a snapshot
    g           floor: cross-entropy alone on cached encoder output, no trainer

The encoder is frozen in all of them. Batches are in the device's memory beforehand: reading them isn't measured.
Ratios between variants of one run mean something, seconds only on the machine that they are from. A GPU is measured by
the same command, with --bf16, --torch_compile or --attn_implementation. For the rows of cost_model.py, measured beside
computed:

    python examples/benchmarks/training_step.py --model large-v3 --batch_size 32 --label_tokens 25 74 --bf16 \
        --peak_tflops 989 --cost_table

In place of the comparison:

    python examples/benchmarks/training_step.py --sweep labels       # or batch, vocabulary, decoder_layers, clips
    python examples/benchmarks/training_step.py --fast_student       # e with a short window and a small vocabulary
    python examples/benchmarks/training_step.py --loss_memory --batch_size 32 --label_tokens 128 128
    python examples/benchmarks/training_step.py --trainer_overhead 100
"""

import json
import platform
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import memory
import overhead
import steps
import torch
import transformers
from comparison import BenchmarkArguments, measure, megabytes, prepare, print_comparison, print_utilization
from cost_table import cost_table
from growth import fast_student, sweep, sweep_clips

from askd_hf.arguments.parser import parse_args
from askd_hf.errors import exit_on_user_error


def main() -> None:
    (args,) = parse_args((BenchmarkArguments,))
    report: dict[str, Any] = {"arguments": asdict(args), "machine": machine(args.device)}
    print(" ".join(f"{name}={value}" for name, value in report["machine"].items()), flush=True)
    if args.sweep:
        report["sweep"] = sweep_clips(args) if args.sweep == "clips" else sweep(args)
    if args.fast_student:
        report["fast_student"] = fast_student(args)
    if args.loss_memory:
        report["loss_memory"] = loss_memory(args)
    if args.trainer_overhead:
        report["trainer_overhead"] = trainer_overhead(args)
    if not (args.sweep or args.fast_student or args.loss_memory or args.trainer_overhead):
        bench = prepare(args)
        report["label_tokens"] = [(batch["labels"] != -100).sum(1).tolist() for batch in bench.batches]
        report["variants"] = measure(bench, args.variants, with_memory=True)
        print_comparison(report["variants"])
        print_utilization(report["variants"], report["label_tokens"], args.peak_tflops)
        if args.cost_table:
            configs = bench.teacher.config, bench.student.config
            report["cost_table"] = cost_table(report["variants"], report["label_tokens"], *configs, args.peak_tflops)
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")


def machine(device: torch.device) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


# ---- the loss alone, and Trainer around the step ----


def loss_memory(args: BenchmarkArguments) -> dict[str, dict[str, Any]]:
    """Peak memory of the loss from hidden states on, forward and backward, each in a process of its own."""
    config = steps.whisper_config(args.model)
    size = args.batch_size, args.label_tokens[1], config.d_model, config.vocab_size
    report = {}
    # fresh processes: what one has freed and the C library kept would hide what the next one takes
    processes = get_context("forkserver")
    processes.set_forkserver_preload(["memory"])  # imports once
    for kind in memory.LOSSES:
        with ProcessPoolExecutor(1, mp_context=processes) as pool:
            report[kind] = pool.submit(memory.measure_loss, kind, size, args.device, args.bf16).result()
    naive = report["naive"]["peak_bytes"]
    rows = [
        [kind, megabytes(r["peak_bytes"]), f"{naive / r['peak_bytes']:.1f}" if naive else "n/a", f"{r['seconds']:.3f}"]
        for kind, r in report.items()
    ]
    steps.print_table([f"{size[0]} x {size[1]} label tokens", "MB at the peak", "times less", "s"], rows)
    return report


def trainer_overhead(args: BenchmarkArguments) -> dict[str, Any]:
    """`ASKDTrainer.train()` in the self phase on cached encoder output: where its time goes."""
    bench = prepare(args)
    seconds = overhead.train_timed(bench.student, bench.batches, args.trainer_overhead, bench.trainer_options)
    wall = seconds.pop("wall")
    inside = sum(seconds[name] for name in overhead.COMPUTING)
    seconds["anything else"] = wall - sum(seconds.values())
    percent = 100 * (wall - inside) / wall
    steps.print_table(
        [f"{args.trainer_overhead} steps", "s", "%"],
        [[name, f"{s:.3f}", f"{100 * s / wall:.2f}"] for name, s in seconds.items()],
    )
    print(f"overhead of train() around forward, backward, clipping and the optimizer: {percent:.2f} %")
    return {"steps": args.trainer_overhead, "wall": wall, "seconds": seconds, "overhead_percent": percent}


if __name__ == "__main__":
    with exit_on_user_error():
        main()
