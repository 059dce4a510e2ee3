"""The models, batches and training steps that `training_step.py` compares, and how it measures memory."""

import contextlib
import copy
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import askd_hf.models.torchao_warnings  # noqa: F401  # isort: skip  (before transformers)
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerState,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.models.whisper.modeling_whisper import shift_tokens_right

from askd_hf import (
    ASKDConfig,
    ASKDTrainer,
    SpeechCollator,
    UserError,
    load_processor,
    load_speech_dataset,
    load_whisper,
)
from askd_hf.data import TEACHER_COLUMNS
from askd_hf.data.soft_labels import SOFT_LABEL_FEATURES, compute_soft_labels
from askd_hf.models.generation_config import set_language
from askd_hf.models.window import POSITIONS_PER_SECOND
from askd_hf.projection import label_positions

TEMPERATURE = 2.0
LEARNING_RATE = 1e-5
MAX_GRAD_NORM = 1.0
# of a run's schedules; long, so that the learning rate and the weights hardly change while we measure
TOTAL_STEPS = 100_000

Batch = dict[str, Tensor]

# ---- models ----

# width, layers of encoder and of decoder, heads, mel bins, vocabulary; the small ones as their .en versions
SHAPES = {
    "tiny": (384, 4, 6, 80, 51_864),
    "base": (512, 6, 8, 80, 51_864),
    "small": (768, 12, 12, 80, 51_864),
    "large-v3": (1280, 32, 20, 128, 51_866),
}


def whisper_config(name: str, vocabulary: int | None = None, window_seconds: int | None = None) -> WhisperConfig:
    """Return the configuration of a shape by name, or of a local directory; with another vocabulary size or window."""
    if name not in SHAPES and not Path(name).is_dir():
        raise UserError(f"--model {name}: neither a directory nor one of {', '.join(SHAPES)}")
    config = WhisperConfig.from_pretrained(name) if name not in SHAPES else _shape(name)
    if vocabulary is not None:
        _set_vocabulary(config, vocabulary)
    if window_seconds is not None:
        config.max_source_positions = POSITIONS_PER_SECOND * window_seconds
    return config


def _shape(name: str) -> WhisperConfig:
    width, layers, heads, mels, tokens = SHAPES[name]
    config = WhisperConfig(
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        num_mel_bins=mels,
    )
    _set_vocabulary(config, tokens)
    return config


def _set_vocabulary(config: WhisperConfig, tokens: int) -> None:
    config.vocab_size = tokens
    config.decoder_start_token_id = tokens - 1
    config.pad_token_id = config.bos_token_id = config.eos_token_id = tokens - 2


def make_teacher(
    name: str,
    device: torch.device,
    attn_implementation: str,
    vocabulary: int | None = None,
    window_seconds: int | None = None,
) -> WhisperForConditionalGeneration:
    """The model in a directory, or one of random weights: what a step costs doesn't depend on the weights."""
    if name not in SHAPES and vocabulary is None and window_seconds is None and Path(name).is_dir():
        model = load_whisper(name).to(device)
    else:
        config = whisper_config(name, vocabulary, window_seconds)
        torch.manual_seed(0)
        with device:  # made where it is used: a large model's random weights take minutes on a CPU
            model = WhisperForConditionalGeneration(config)
    model.set_attn_implementation(attn_implementation)
    return model.eval().requires_grad_(False)


# ---- batches ----


def synthetic_batches(config: WhisperConfig, number: int, clips: int, tokens: tuple[int, int]) -> list[Batch]:
    """Random features, and random labels whose lengths are uniform between the two of `tokens`, both included."""
    if tokens[1] > config.max_target_positions:
        raise UserError(f"--label_tokens {tokens[1]}: the decoder has {config.max_target_positions} positions")
    generator = torch.Generator().manual_seed(0)
    shape = (clips, config.num_mel_bins, 2 * config.max_source_positions)
    batches = []
    for _ in range(number):
        lengths = torch.randint(tokens[0], tokens[1] + 1, (clips,), generator=generator)
        labels = torch.randint(config.vocab_size - 2, (clips, int(lengths.max())), generator=generator)
        labels[torch.arange(labels.shape[1]) >= lengths[:, None]] = -100
        features = torch.randn(shape, generator=generator)
        batches.append({"input_features": features, "labels": labels, "label_positions": label_positions(labels)})
    return batches


def real_batches(model: str, dataset: str, language: str | None, number: int, clips: int) -> list[Batch]:
    """Of the first clips of a dataset's train split."""
    if model in SHAPES:
        raise UserError("--dataset needs a tokenizer: give --model as a directory with a processor in it")
    whisper, processor = load_whisper(model), load_processor(model)
    set_language(whisper, processor, language, "transcribe")
    speech = load_speech_dataset(dataset, None, "train")
    if len(speech) < clips:
        raise UserError(f"{dataset} has {len(speech)} clips, not enough for a batch of {clips} (--batch_size)")
    number = min(number, len(speech) // clips)
    collator = SpeechCollator(processor, whisper.config)
    rows = [[speech[i * clips + j] for j in range(clips)] for i in range(number)]
    columns = ("input_features", "labels", "label_positions")
    return [{name: batch[name] for name in columns} for batch in map(collator, rows)]


@torch.no_grad()
def with_encoder_output(batch: Batch, student: WhisperForConditionalGeneration, bf16: bool) -> Batch:
    """The batch with what the encoder cache holds: the encoder's output in float16, `(clips, positions, width)`."""
    with torch.autocast(student.device.type, torch.bfloat16, enabled=bf16):
        encoded = student.model.encoder(batch["input_features"]).last_hidden_state
    return batch | {"encoder_outputs": encoded.to(torch.float16)}


def with_teacher_columns(batch: Batch, teacher: WhisperForConditionalGeneration, k: int) -> Batch:
    """The batch with what the teacher cache holds: its `k` most probable tokens at every label token."""
    target = compute_soft_labels(teacher, batch, k, TEMPERATURE)
    real = batch["labels"] != -100
    columns = {}
    for name, values in zip(TEACHER_COLUMNS, target, strict=True):
        columns[name] = values.new_zeros((*real.shape, *values.shape[1:]))
        columns[name][real] = values
    return batch | columns


def padded_to(batch: Batch, tokens: int) -> Batch:
    """The batch with its labels padded to `tokens`."""
    labels = batch["labels"]
    return batch | {"labels": F.pad(labels, (0, tokens - labels.shape[1]), value=-100)}


def decoder_inputs(labels: Tensor, config: WhisperConfig) -> Tensor:
    return shift_tokens_right(labels, config.pad_token_id, config.decoder_start_token_id)


# ---- steps, written plainly ----


class PlainStep:
    """One update by a `loss` of a batch, without a trainer: backward, clip, AdamW (fused, as Trainer's default)."""

    def __init__(self, student: WhisperForConditionalGeneration, bf16: bool):
        student.train().model.encoder.requires_grad_(False)
        self.student = student
        self.bf16 = bf16
        self.trained = [p for p in student.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=LEARNING_RATE, fused=True)

    def loss(self, batch: Batch) -> Tensor:
        raise NotImplementedError

    def __call__(self, batch: Batch) -> Tensor:
        with torch.autocast(self.student.device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def held(self) -> Iterator[Tensor]:
        """What stays in memory between steps."""
        yield from self.student.parameters()
        yield from _tensors_in(self.optimizer.state)


class NaiveStep(PlainStep):
    """A naive reference step, written plainly: both models whole, both distributions over the whole vocabulary."""

    def __init__(self, student: WhisperForConditionalGeneration, teacher: WhisperForConditionalGeneration, bf16: bool):
        super().__init__(student, bf16)
        self.teacher = teacher

    def loss(self, batch: Batch) -> Tensor:
        features, labels = batch["input_features"], batch["labels"]
        with torch.no_grad():
            teacher = self.teacher(input_features=features.to(self.teacher.dtype), labels=labels)
        student = self.student(input_features=features, labels=labels)
        return distil_whisper_loss(student.loss, student.logits, teacher.logits, labels)

    def held(self) -> Iterator[Tensor]:
        yield from super().held()
        yield from self.teacher.parameters()


def distil_whisper_loss(ce: Tensor, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """0.8*CE + T^2*KL, the mean over label tokens, from logits `(clips, tokens, vocabulary)` padded like `labels`."""
    student = F.log_softmax(student_logits / TEMPERATURE, dim=-1)
    teacher = F.softmax(teacher_logits / TEMPERATURE, dim=-1)
    real = (labels >= 0).unsqueeze(-1)
    kl = (F.kl_div(student, teacher, reduction="none") * real).sum() / real.sum()
    return 0.8 * ce + TEMPERATURE**2 * kl


class FloorStep(PlainStep):
    """The least that training this student can cost: cross-entropy alone, encoder cached, no padding projected."""

    def loss(self, batch: Batch) -> Tensor:
        labels = batch["labels"]
        encoded = batch["encoder_outputs"].to(self.student.dtype)
        inputs = decoder_inputs(labels, self.student.config)
        hidden = self.student.model.decoder(inputs, encoder_hidden_states=encoded, use_cache=False).last_hidden_state
        real = labels != -100
        return F.cross_entropy(self.student.proj_out(hidden[real]).float(), labels[real])


# ---- steps of trainers ----


class TrainerStep:
    """One update as `Trainer.train` makes it: what `Trainer._run_epoch` does with a batch, callbacks included."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        trainer.create_optimizer_and_scheduler(TOTAL_STEPS)
        trainer.model_wrapped, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        trainer.state = TrainerState(max_steps=TOTAL_STEPS, num_train_epochs=1, epoch=0.0)
        trainer.callback_handler.train_dataloader = DataLoader(range(TOTAL_STEPS))  # callbacks need only its length
        with contextlib.redirect_stdout(io.StringIO()):  # the plan of a run that isn't one
            trainer.control = trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
        if isinstance(trainer, ASKDTrainer):
            trainer.stop.restore()  # Ctrl-C ends a benchmark at once

    def __call__(self, batch: Batch) -> Tensor:
        trainer, model = self.trainer, self.trainer.model_wrapped
        args, state, events = trainer.args, trainer.state, trainer.callback_handler
        (inputs,), label_tokens = trainer.get_batch_samples(iter([batch]), 1, args.device)
        trainer.control = events.on_step_begin(args, state, trainer.control)
        loss = trainer.training_step(model, inputs, label_tokens)
        grad_norm = trainer.accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        trainer._get_grad_norm(model, grad_norm=grad_norm)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        model.zero_grad()
        state.global_step += 1
        trainer.control = events.on_step_end(args, state, trainer.control)
        return loss

    def held(self) -> Iterator[Tensor]:
        trainer = self.trainer
        yield from trainer.model.parameters()
        yield from _tensors_in(trainer.optimizer.state)
        if getattr(trainer, "teacher", None) is not None:
            yield from trainer.teacher.parameters()
        blend = getattr(trainer, "blend", None)
        if blend is not None and blend.self_teacher is not None:
            yield from blend.self_teacher.parameters.values()


# a run that is all self phase, with the whole weight on the self-teacher from the first step
SELF_PHASE: dict[str, Any] = dict(
    teacher_weight=0.0, teacher_weight_end=0.0, teacher_phase_ratio=0.0, self_weight=0.3, self_schedule="constant"
)


def trainer_options(device: torch.device, bf16: bool, torch_compile: bool) -> dict[str, Any]:
    """Arguments of every trainer here."""
    return dict(
        output_dir=str(Path(tempfile.gettempdir()) / "askd-benchmark"),  # a trainer wants one; nothing is saved
        learning_rate=LEARNING_RATE,
        max_grad_norm=MAX_GRAD_NORM,
        use_cpu=device.type == "cpu",
        bf16=bf16,
        torch_compile=torch_compile,
        eval_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
    )


def fine_tuning(student: WhisperForConditionalGeneration, options: dict[str, Any]) -> TrainerStep:
    """Seq2SeqTrainer as it is, on the labels alone."""
    student.model.encoder.requires_grad_(False)
    return TrainerStep(Seq2SeqTrainer(model=student, args=Seq2SeqTrainingArguments(**options)))


def teacher_phase_ratio(
    student: WhisperForConditionalGeneration, teacher: WhisperForConditionalGeneration | None, options: dict[str, Any]
) -> TrainerStep:
    """ASKDTrainer with the static weights of `kd`: at every step the objective of `NaiveStep`, divided by 1.8.

    Without a teacher for batches of `with_teacher_columns`. The trainer gets a copy: on a GPU it moves encoder layers
    that it doesn't run to the CPU's memory, and `NaiveStep` runs them.
    """
    # the trainer sees from the dataset's columns that the teacher is cached; it gets its batches from us
    columns = (
        Dataset.from_dict({name: [] for name in SOFT_LABEL_FEATURES}, features=SOFT_LABEL_FEATURES)
        if teacher is None
        else None
    )
    args = ASKDConfig(preset="kd", **options)
    own = copy.deepcopy(teacher)
    return TrainerStep(ASKDTrainer(model=student, args=args, teacher_model=own, train_dataset=columns))


def self_phase(student: WhisperForConditionalGeneration, self_teacher: str, options: dict[str, Any]) -> TrainerStep:
    """ASKDTrainer with a self-teacher: ema or snapshot."""
    args = ASKDConfig(preset="askd", self_teacher=self_teacher, **SELF_PHASE, **options)
    return TrainerStep(ASKDTrainer(model=student, args=args))


# ---- what a step holds ----


def _tensors_in(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from _tensors_in(value)


def held_bytes(tensors: Iterator[Tensor]) -> int:
    """Memory of the tensors, shared ones (tied embeddings) counted once, offloaded ones (on `meta`) not at all."""
    here = (t.untyped_storage() for t in tensors if t.device.type != "meta")
    storages = {storage.data_ptr(): storage.nbytes() for storage in here}
    return sum(storages.values())


# ---- tables ----


def print_table(heads: list[str], rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    print()
    for row in [heads, *rows]:
        # words to the left, numbers to the right
        cells = [
            c.rjust(w) if c[:1].isdigit() or row is heads else c.ljust(w) for c, w in zip(row, widths, strict=True)
        ]
        print("  ".join(cells).rstrip())
