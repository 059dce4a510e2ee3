"""Short training runs of tiny models."""

import copy
import json
from pathlib import Path

import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration, WhisperProcessor

from askd_hf.config import ASKDConfig
from askd_hf.data import SpeechCollator, load_speech_dataset
from askd_hf.trainer import ASKDTrainer

NAMES = ["loss", "grad_norm", "ce_loss", "teacher_weight", "self_weight"]  # of a trajectory


def learn_by_heart(model: WhisperForConditionalGeneration, processor: WhisperProcessor, folder: Path) -> None:
    """Train a decoder until it knows what is said in a few clips, in the language that the tokenizer is set to."""
    batch = SpeechCollator(processor, model.config)(list(load_speech_dataset(str(folder), None, "train")))
    with torch.no_grad():
        heard = model.model.encoder(batch["input_features"])
    optimizer = torch.optim.Adam(model.model.decoder.parameters(), 1e-2)
    for _ in range(300):
        loss = model(encoder_outputs=heard, labels=batch["labels"]).loss
        if loss < 0.02:
            return
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    raise AssertionError("it can't be learned by heart")


class Clips(torch.utils.data.Dataset):
    """Random features and labels of different lengths, for tests of the trainer alone."""

    def __init__(self, config: WhisperConfig, clips: int = 16, seed: int = 1):
        generator = torch.Generator().manual_seed(seed)
        self.rows = []
        for i in range(clips):
            length = int(torch.randint(2, 12, (1,), generator=generator))
            frames = 2 * config.max_source_positions
            self.rows.append(
                {
                    "input_features": torch.randn(config.num_mel_bins, frames, generator=generator),
                    "labels": torch.randint(0, 26, (length,), generator=generator),
                    "clip": f"clip-{i}",
                }
            )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict:
        return self.rows[i]


def collate(rows: list[dict]) -> dict:
    labels = torch.nn.utils.rnn.pad_sequence([r["labels"] for r in rows], batch_first=True, padding_value=-100)
    return {
        "input_features": torch.stack([r["input_features"] for r in rows]),
        "labels": labels,
        "clip": [r["clip"] for r in rows],
    }


class SeedsAsNames(SpeechCollator):
    """As `collate`, with the `rng_key` of each clip in place of its name."""

    is_random = True

    def __call__(self, rows: list[dict]) -> dict:
        return collate([row | {"clip": json.dumps(list(map(int, row["rng_key"])))} for row in rows])


def options(output_dir, **changes) -> dict:
    """Training arguments of a short run on `Clips`."""
    defaults = dict(
        output_dir=str(output_dir),
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        warmup_steps=0,
        logging_steps=1,
        eval_strategy="no",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
    )
    return defaults | changes


def on(device: str) -> dict:
    """The options of a run in float32 on "cpu" or "cuda"."""
    if device == "cpu":
        return dict(use_cpu=True, bf16=False)
    return dict(use_cpu=False, bf16=False, tf32=False, dataloader_num_workers=0)  # --torch_compile turns TF32 on


def make_trainer(
    output_dir, teacher, student, eval_dataset=None, compute_metrics=None, processor=None, clips=16, **changes
):
    """An `ASKDTrainer` on copies of the models; of 10 steps of the preset askd 6 are teacher phase, from 0.8 to 0."""
    if changes.get("preset", "askd") == "askd":
        end = {} if changes.get("teacher_schedule") == "constant" else dict(teacher_weight_end=0.0)
        has_self_phase = changes.get("self_teacher") != "none" and changes.get("teacher_phase_ratio") != 1.0
        self_phase = dict(self_weight=0.3) if has_self_phase else {}
        changes = dict(teacher_weight=0.8, teacher_phase_ratio=0.6) | self_phase | end | changes
    return ASKDTrainer(
        model=copy.deepcopy(student),
        args=ASKDConfig(**options(output_dir, **changes)),
        teacher_model=copy.deepcopy(teacher),
        train_dataset=Clips(student.config, clips),
        eval_dataset=eval_dataset,
        data_collator=collate,
        compute_metrics=compute_metrics,
        processing_class=processor,
    )


def train_on_speech(trainer: ASKDTrainer, folder: Path) -> None:
    """Give the trainer the clips of an audiofolder, in place of those it was created with."""
    trainer.train_dataset = load_speech_dataset(str(folder), None, "train")
    trainer.data_collator = SpeechCollator(trainer.processing_class, trainer.model.config)


def history(trainer, *names: str) -> torch.Tensor:
    """The named values of every training step, `(steps, names)`."""
    return torch.tensor([[row[name] for name in names] for row in trainer.state.log_history if "loss" in row])


def first_step(output_dir, teacher, student, **changes) -> torch.Tensor:
    """The terms of the first step, of all clips at once and before any update, and the norm of its gradient."""
    once = dict(max_steps=1, per_device_train_batch_size=16, teacher_phase_ratio=1.0)
    trainer = make_trainer(output_dir, teacher, student, **(once | changes))
    trainer.train()
    return history(trainer, "loss", "ce_loss", "teacher_loss", "teacher_ce", "top1_agreement", "grad_norm")


def answer_right(trainer: ASKDTrainer, clips: int) -> None:
    """Let the student be right about the first evaluation clips: their labels become what it generates."""
    special = set(trainer.processing_class.tokenizer.all_special_ids)
    for row in trainer.eval_dataset.rows[:clips]:
        features = row["input_features"][None].to(trainer.model.device)
        tokens = trainer.model.eval().generate(features, num_beams=1)[0]
        row["labels"] = torch.tensor([token for token in tokens.tolist() if token not in special])
