r"""What distilling a large Whisper should cost, computed and not measured.

    python examples/benchmarks/cost_model.py --hours 1000 --epochs 10
    python examples/benchmarks/cost_model.py --plan

counts the floating-point operations of a training step, the bytes that it moves, and the CPU's work on its clips, for
Whisper large-v3 and a student with 2 decoder layers on H100s, and divides them by what the GPU, its memory, the CPU,
the disk and the network can do. --plan compares 1,000 to 100,000 hours on 1 to 64 GPUs, in nodes of 8 that each have a
disk with the caches. Every function below is arithmetic that can be checked by hand; tests/test_cost_model.py checks
the operations against PyTorch's own counter. What is assumed and what is left out is printed below the table.
"""

import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from askd_hf.arguments.parser import parse_args
from askd_hf.errors import exit_on_user_error

PEAK_FLOPS = 989e12  # an H100's bf16 matrix products, dense, per second
MEMORY_BANDWIDTH = 3.35e12  # bytes per second of its memory
GPUS_PER_NODE = 8

ASSUMPTIONS = """\
Computed, not measured. Assumed:
- a clip has {clip_seconds:g} s and {tokens:.0f} label tokens, padded to {padded:.0f} in a batch of {batch_size};
- matrix products run in bf16 at {utilization:.0%} of the H100's {peak:.0f} TFLOP/s, the same in all rows: what isn't a
  matrix product, launching kernels and waiting for Python are in the rest;
- weights, gradients, AdamW's moments and {passes} passes over the float32 logits move at {bandwidth:.2f} TB/s;
- each node of up to {node} GPUs has {cores} cores, and the caches of all clips on a disk that reads at
  {read_bandwidth:g} GB/s and writes at {write_bandwidth:g} GB/s; each GPU exchanges gradients at
  {network_bandwidth:g} GB/s. All work at the same time: the slowest counts;
- a core decodes {decoding_speed:g} s of audio per second, and makes the features of {window:g} s in
  {features_ms:g} ms. Steps with the encoder cached need neither;
- audio takes {audio_rate:g} kB per second on the disk, and as much in the teacher cache, which has a copy;
- clips are checked once, before training: each node decodes a part;
- collating batches, evaluation and checkpoints cost nothing."""

FEATURES_SECONDS = 30  # of audio, silence included, whose features take `features_ms`


@dataclass
class CostArguments:
    """The run that is computed."""

    hours: float = field(default=1000.0, metadata={"help": "Hours of audio."})
    clip_seconds: float = field(default=15.0, metadata={"help": "Mean length of a clip."})
    tokens_per_second: float = field(default=3.3, metadata={"help": "Label tokens per second of speech."})
    padding: float = field(
        default=1.5, metadata={"help": "The longest of a batch's labels, as a multiple of their mean length."}
    )
    epochs: int = field(default=10, metadata={"help": "Epochs of training."})
    batch_size: int = field(default=32, metadata={"help": "Clips per step and GPU."})
    decoder_layers: int = field(default=2, metadata={"help": "Decoder layers of the student."})
    top_k: int = field(default=32, metadata={"help": "Tokens that the teacher cache holds at every label token."})
    utilization: float = field(default=0.4, metadata={"help": "Share of the GPU's peak that is reached."})
    read_bandwidth: float = field(default=5.0, metadata={"help": "GB/s that the disk of a node reads."})
    write_bandwidth: float = field(default=2.0, metadata={"help": "GB/s that the disk of a node writes."})
    gpus: int = field(default=1, metadata={"help": "GPUs, 8 per node."})
    network_bandwidth: float = field(default=25.0, metadata={"help": "GB/s of gradients between two GPUs."})
    cores: int = field(default=16, metadata={"help": "CPU cores of a node that decode audio and make features."})
    # 16 kHz Ogg Vorbis, and features with 128 mel bins, on a core of an EPYC that other work shared. Alone, it took
    # 4.7 ms instead of 11 to decode and check 15 s, and 14 ms instead of 35 for the features
    decoding_speed: float = field(default=1340.0, metadata={"help": "Seconds of audio that a core decodes in one."})
    features_ms: float = field(
        default=35.0,
        metadata={"help": "Milliseconds of a core for the features of 30 s; 0 computes --features_on_device."},
    )
    audio_rate: float = field(default=16.0, metadata={"help": "kB of a second of audio on the disk, here FLAC."})
    window_seconds: int = field(default=30, metadata={"help": "Audio window of the student."})
    vocabulary: int = field(default=51_866, metadata={"help": "Tokens of the student."})
    plan: bool = field(default=False, metadata={"help": "Print hours, disk and bottleneck for 1 to 64 GPUs instead."})


class Shape(NamedTuple):
    """A Whisper model; large-v3 unless told otherwise. The inner width of the MLPs is 4 * width."""

    width: int = 1280
    encoder_layers: int = 32
    decoder_layers: int = 32
    mels: int = 128
    vocabulary: int = 51_866
    positions: int = 1500
    max_tokens: int = 448


class Scenario(NamedTuple):
    """A way to train, by what one step computes."""

    name: str
    encoder_passes: int
    teacher: bool = False
    self_teacher: bool = False
    padded_to_all: bool = False
    """labels padded to the decoder's maximum rather than to the batch's longest"""
    projects_padding: bool = False
    reads_encoder: bool = False
    reads_teacher: bool = False


SCENARIOS = [
    Scenario("naive, padded to 448", 2, teacher=True, padded_to_all=True, projects_padding=True),
    Scenario("naive, padded to the batch", 2, teacher=True, projects_padding=True),
    Scenario("ours, no caches", 1, teacher=True),
    Scenario("ours, encoder cached", 0, teacher=True, reads_encoder=True),
    Scenario("ours, both cached", 0, reads_encoder=True, reads_teacher=True),
    Scenario("ours, self phase", 0, self_teacher=True, reads_encoder=True),
]

PLANNED = SCENARIOS[2:5]

# ---- operations; a multiplication and its addition are 2 ----


def encoder_forward(shape: Shape) -> float:
    """FLOPs of the encoder for one clip; it sees the whole window."""
    d, p = shape.width, shape.positions
    convolutions = 2 * 3 * shape.mels * d * (2 * p) + 2 * 3 * d * d * p  # kernels of 3, the second with stride 2
    projections = 4 * 2 * p * d * d
    attention = 2 * 2 * p * p * d  # query times key, weights times value
    mlp = 2 * 2 * p * d * 4 * d
    return convolutions + shape.encoder_layers * (projections + attention + mlp)


def _decoder_layer(shape: Shape, tokens: float) -> tuple[float, float]:
    """FLOPs of one decoder layer, forward, for one clip: of its tokens, and of the encoder's keys and values."""
    d, p = shape.width, shape.positions
    projections = (4 + 2) * 2 * tokens * d * d  # self-attention's four, cross-attention's query and output
    attention = 2 * 2 * tokens * tokens * d + 2 * 2 * tokens * p * d  # the causal half isn't left out
    mlp = 2 * 2 * tokens * d * 4 * d
    return projections + attention + mlp, 2 * 2 * p * d * d


def decoder_forward(shape: Shape, layers: int, tokens: float) -> float:
    """FLOPs of the decoder without the vocabulary, for one clip of `tokens` positions."""
    return layers * sum(_decoder_layer(shape, tokens))


def decoder_backward(shape: Shape, layers: int, tokens: float) -> float:
    """Likewise, backward: the gradients of weights and of inputs, but none of the frozen encoder's output."""
    of_tokens, of_keys_and_values = _decoder_layer(shape, tokens)
    return layers * (2 * of_tokens + of_keys_and_values)


def projection_forward(shape: Shape, tokens: float) -> float:
    """FLOPs of the logits of `tokens` positions. Backward, for weight and hidden states, are twice as many."""
    return 2 * tokens * shape.width * shape.vocabulary


def step_flops(
    scenario: Scenario,
    shape: Shape,
    student_layers: int,
    tokens: float,
    padded: float,
    student: Shape | None = None,
) -> float:
    """FLOPs of one clip in one training step, of `tokens` label tokens padded to `padded`.

    Args:
        student: the student's window and vocabulary. Default: those of the teacher, whose encoder output then serves
            both. The teacher's projection leaves out the tokens that the student hasn't.
    """
    student = student or shape
    positions = shape.max_tokens if scenario.padded_to_all else padded
    projected = positions if scenario.projects_padding else tokens
    total = scenario.encoder_passes * encoder_forward(student)
    if scenario.teacher and student.positions != shape.positions:  # the teacher keeps its own window
        total += encoder_forward(shape) - (scenario.encoder_passes == 2) * encoder_forward(student)
    if scenario.teacher:
        total += decoder_forward(shape, shape.decoder_layers, positions) + projection_forward(student, projected)
    if scenario.self_teacher:
        total += decoder_forward(student, student_layers, positions) + projection_forward(student, projected)
    total += decoder_forward(student, student_layers, positions) + projection_forward(student, projected)
    return total + decoder_backward(student, student_layers, positions) + 2 * projection_forward(student, projected)


# ---- bytes ----

# Reads and writes of a (tokens, vocabulary) float32 tensor in one step, counted in the naive step: two projections,
# two temperatures, three softmaxes, divergence, mask, sum, and about as many again backward. Ours makes fewer, but is
# counted with as many: only the tokens differ.
LOGIT_PASSES = 40
# AdamW reads weight, gradient and both moments and writes all but the gradient; clipping reads and writes the gradient
OPTIMIZER_PASSES = 7 + 2
AVERAGE_PASSES = 3  # the self-teacher's moving average: reads itself and the weight, writes itself


def trained_parameters(shape: Shape, layers: int) -> float:
    """Weights of the decoder's matrices, and of the embedding that is also the projection; biases are left out."""
    d = shape.width
    return layers * (8 * d * d + 2 * d * 4 * d) + (shape.vocabulary + shape.max_tokens) * d


def audio_bytes(args: CostArguments) -> float:
    """Of one clip."""
    return args.clip_seconds * args.audio_rate * 1e3


def encoder_cache_bytes(shape: Shape) -> float:
    """Of one clip: float16 of all positions."""
    return 2 * shape.positions * shape.width


def teacher_cache_bytes(tokens: float, k: int) -> float:
    """Of one clip: k token ids and log-probabilities of 2 bytes each, the rest's and the label's of 4 bytes."""
    return tokens * (k * (2 + 2) + 2 * 4)


def cached_bytes(scenario: Scenario, shape: Shape, tokens: float, k: int) -> float:
    """What the caches have of one clip, besides the copy of the audio; a step reads it from disk."""
    encoder = encoder_cache_bytes(shape) if scenario.reads_encoder else 0.0
    return encoder + (teacher_cache_bytes(tokens, k) if scenario.reads_teacher else 0.0)


# ---- seconds ----


def student_shape(shape: Shape, args: CostArguments) -> Shape:
    """Return the teacher's shape with the student's window and vocabulary."""
    return shape._replace(positions=50 * args.window_seconds, vocabulary=args.vocabulary)


def compute_seconds(scenario: Scenario, shape: Shape, args: CostArguments) -> float:
    """Return the seconds of a GPU for one step."""
    tokens, padded = clip_tokens(args)
    student = student_shape(shape, args)
    flops = args.batch_size * step_flops(scenario, shape, args.decoder_layers, tokens, padded, student)
    positions = shape.max_tokens if scenario.padded_to_all else padded
    logits = args.batch_size * (positions if scenario.projects_padding else tokens) * student.vocabulary
    passes = OPTIMIZER_PASSES + (AVERAGE_PASSES if scenario.self_teacher else 0)
    moved = 4 * (LOGIT_PASSES * logits + passes * trained_parameters(student, args.decoder_layers))
    return flops / (args.utilization * PEAK_FLOPS) + moved / MEMORY_BANDWIDTH


def node_gpus(args: CostArguments) -> int:
    return min(args.gpus, GPUS_PER_NODE)


def read_seconds(scenario: Scenario, shape: Shape, args: CostArguments) -> float:
    """Return the seconds that the disk of a node needs for one step of all its GPUs."""
    tokens, _ = clip_tokens(args)
    clips = args.batch_size * node_gpus(args)
    a_clip = cached_bytes(scenario, student_shape(shape, args), tokens, args.top_k) + audio_bytes(args)
    return clips * a_clip / (args.read_bandwidth * 1e9)


def core_seconds(scenario: Scenario, shape: Shape, args: CostArguments) -> float:
    """Return the seconds of one core for the audio of one clip in one step."""
    windows = {student_shape(shape, args).positions} if scenario.encoder_passes else set()
    if scenario.teacher and shape.positions != student_shape(shape, args).positions:
        windows.add(shape.positions)  # the teacher's encoder runs on its own window
    return audio_seconds(windows, args)


def audio_seconds(windows: set[int], args: CostArguments) -> float:
    """Return the seconds of one core to decode a clip and make the features of windows of so many positions."""
    if not windows:
        return 0.0
    features = sum(windows) / (50 * FEATURES_SECONDS) * args.features_ms / 1000
    return args.clip_seconds / args.decoding_speed + features


def cpu_seconds(scenario: Scenario, shape: Shape, args: CostArguments) -> float:
    """Return the seconds that all cores of a node need for one step of all its GPUs."""
    return args.batch_size * node_gpus(args) * core_seconds(scenario, shape, args) / args.cores


def network_seconds(shape: Shape, args: CostArguments) -> float:
    """Return the seconds of exchanging gradients in one step.

    A ring sends and receives 2 (n - 1) / n of the float32 gradients.
    """
    gradients = 4 * trained_parameters(student_shape(shape, args), args.decoder_layers)
    return 2 * (args.gpus - 1) / args.gpus * gradients / (args.network_bandwidth * 1e9)


def step_seconds(scenario: Scenario, shape: Shape, args: CostArguments) -> dict[str, float]:
    """Return the seconds of one step by what does the work. All work at the same time."""
    return {
        "GPU": compute_seconds(scenario, shape, args),
        "CPU": cpu_seconds(scenario, shape, args),
        "disk": read_seconds(scenario, shape, args),
        "network": network_seconds(shape, args),
    }


def bottleneck(scenario: Scenario, shape: Shape, args: CostArguments) -> str:
    """Return what a training step waits for."""
    seconds = step_seconds(scenario, shape, args)
    return max(seconds, key=seconds.__getitem__)


def cache_passes(scenario: Scenario, shape: Shape, args: CostArguments) -> list[dict[str, float]]:
    """Return the seconds of a node for one clip, by what does the work, in each pass that fills a cache.

    Every node fills caches of its own.
    """
    tokens, padded = clip_tokens(args)
    student = student_shape(shape, args)
    read, write = args.read_bandwidth * 1e9, args.write_bandwidth * 1e9
    gpu = node_gpus(args) * args.utilization * PEAK_FLOPS
    passes = []
    if scenario.reads_encoder:
        passes.append(
            {
                "GPU": encoder_forward(student) / gpu,
                "CPU": audio_seconds({student.positions}, args) / args.cores,
                "disk": audio_bytes(args) / read + encoder_cache_bytes(student) / write,
            }
        )
    if scenario.reads_teacher:
        flops = decoder_forward(shape, shape.decoder_layers, padded) + projection_forward(student, tokens)
        own_encoder = student.positions != shape.positions  # else its outputs are in the encoder cache
        read_bytes = audio_bytes(args) + (0.0 if own_encoder else encoder_cache_bytes(student))
        written = teacher_cache_bytes(tokens, args.top_k) + audio_bytes(args)
        passes.append(
            {
                "GPU": (flops + own_encoder * encoder_forward(shape)) / gpu,
                "CPU": audio_seconds({shape.positions} if own_encoder else set(), args) / args.cores,
                "disk": read_bytes / read + written / write,
            }
        )
    return passes


def cache_hours(scenario: Scenario, shape: Shape, args: CostArguments) -> float:
    """Return the hours in which each node fills its caches, once before training."""
    clips = 3600 * args.hours / args.clip_seconds
    return clips * sum(max(one.values()) for one in cache_passes(scenario, shape, args)) / 3600


def check_hours(args: CostArguments) -> float:
    """Return the hours in which all nodes together decode every clip once."""
    nodes = math.ceil(args.gpus / GPUS_PER_NODE)
    return args.hours / (args.decoding_speed * args.cores * nodes)


def clip_tokens(args: CostArguments) -> tuple[float, float]:
    """Label tokens of a mean clip, and the positions it is padded to in its batch."""
    tokens = args.clip_seconds * args.tokens_per_second
    return tokens, args.padding * tokens


# ---- the table ----


def row(scenario: Scenario, shape: Shape, args: CostArguments) -> dict[str, float]:
    """The numbers of one line; sizes and rates in giga-, times in hours or as named."""
    clips = 3600 * args.hours / args.clip_seconds
    steps = args.epochs * clips / (args.batch_size * args.gpus)
    tokens, padded = clip_tokens(args)
    student = student_shape(shape, args)
    seconds = step_seconds(scenario, shape, args)
    step, compute = max(seconds.values()), seconds["GPU"]
    a_clip = cached_bytes(scenario, student, tokens, args.top_k)
    stored = a_clip + (audio_bytes(args) if scenario.reads_teacher else 0.0)
    once, training = cache_hours(scenario, shape, args), steps * step / 3600
    return {
        "GFLOP per clip": step_flops(scenario, shape, args.decoder_layers, tokens, padded, student) / 1e9,
        "ms per step": 1000 * step,
        "of it GPU": 1000 * compute,
        "checking clips, h": check_hours(args),
        "filling caches, h": once,
        "training, h": training,
        "in all, h": check_hours(args) + once + training,
        "caches, GB": clips * stored / 1e9,
        "read at full speed, GB/s": args.batch_size * node_gpus(args) * a_clip / compute / 1e9,
        "cores at full speed": args.cores * seconds["CPU"] / compute,
    }


def plan_table(shape: Shape, args: CostArguments) -> str:
    """Return hours in all, size of the caches and bottleneck of several sizes."""
    lines = ["| hours of audio | GPUs | " + " | ".join(f"{one.name}: h, TB, waits for" for one in PLANNED) + " |"]
    lines.append("|---:|---:|" + "---|" * len(PLANNED))
    for hours in (1_000, 10_000, 100_000):
        for gpus in (1, 8, 64):
            sized = replace(args, hours=hours, gpus=gpus)
            cells = []
            for scenario in PLANNED:
                values = row(scenario, shape, sized)
                disk = f"{values['caches, GB'] / 1000:,.1f}" if values["caches, GB"] else "0"
                total = values["in all, h"]
                cells.append(f"{total:,.{2 if total < 10 else 0}f}, {disk}, {bottleneck(scenario, shape, sized)}")
            lines.append(f"| {hours:,} | {gpus} | {' | '.join(cells)} |")
    return "\n".join(lines)


def table(shape: Shape, args: CostArguments) -> str:
    """Return all numbers of each way to train, and what its steps wait for."""
    rows = {scenario.name: row(scenario, shape, args) for scenario in SCENARIOS}
    waits = [bottleneck(scenario, shape, args) for scenario in SCENARIOS]
    heads = next(iter(rows.values())).keys()
    naive = [values["in all, h"] for name, values in rows.items() if name.startswith("naive")]
    lines = [f"| | {' | '.join(heads)} | waits for | times faster than naive: 448 / batch |"]
    lines.append("|---|" + "---:|" * (len(heads) + 2))
    for (name, values), resource in zip(rows.items(), waits, strict=True):
        cells = [f"{value:,.1f}" if value else "" for value in values.values()]
        faster = " / ".join(f"{hours / values['in all, h']:.1f}" for hours in naive)
        lines.append(f"| {name} | {' | '.join(cells)} | {resource} | {faster} |")
    return "\n".join(lines)


def main() -> None:
    (args,) = parse_args((CostArguments,))
    shape = Shape()
    tokens, padded = clip_tokens(args)
    clips = 3600 * args.hours / args.clip_seconds
    print(
        f"Whisper large-v3, student with {args.decoder_layers} decoder layers, a window of {args.window_seconds} s "
        f"and {args.vocabulary:,} tokens, {args.epochs} epochs"
    )
    if not args.plan:
        steps = args.epochs * clips / (args.batch_size * args.gpus)
        print(f"{args.hours:g} hours of audio: {clips:,.0f} clips, {steps:,.0f} steps")
    print()
    if args.plan:
        print(plan_table(shape, args))
    else:
        print(table(shape, args))
    assumed = vars(args) | dict(tokens=tokens, padded=padded, passes=LOGIT_PASSES)
    assumed |= dict(node=GPUS_PER_NODE, window=FEATURES_SECONDS)
    print("\n" + ASSUMPTIONS.format(peak=PEAK_FLOPS / 1e12, bandwidth=MEMORY_BANDWIDTH / 1e12, **assumed))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
