"""What the trainer's numbers may not depend on, as trajectories of loss and gradient norm over several updates."""

import copy
from pathlib import Path

import pytest
import torch
from conftest import make_whisper
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from askd_hf.config import ASKDConfig
from askd_hf.student import init_student
from askd_hf.trainer import ASKDTrainer


class Clips(torch.utils.data.Dataset):
    """Random features and labels of different lengths."""

    def __init__(self, model, clips: int = 16):
        generator = torch.Generator().manual_seed(1)
        config = model.config
        self.rows = []
        for i in range(clips):
            length = int(torch.randint(2, 12, (1,), generator=generator))
            self.rows.append(
                {
                    "input_features": torch.randn(config.num_mel_bins, 100, generator=generator),
                    "labels": torch.randint(0, 26, (length,), generator=generator),
                    "clip": f"clip-{i}",
                }
            )

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


def collate(rows):
    labels = torch.nn.utils.rnn.pad_sequence([r["labels"] for r in rows], batch_first=True, padding_value=-100)
    return {
        "input_features": torch.stack([r["input_features"] for r in rows]),
        "labels": labels,
        "clip": [r["clip"] for r in rows],
    }


def collate_plain(rows):
    batch = collate(rows)
    del batch["clip"]
    return batch


def options(tmp_path: Path, **changes):
    return dict(
        output_dir=str(tmp_path),
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
    ) | changes


def train(tmp_path, teacher, student, **changes):
    trainer = ASKDTrainer(
        model=copy.deepcopy(student),
        args=ASKDConfig(**options(tmp_path, **changes)),
        teacher=copy.deepcopy(teacher),
        train_dataset=Clips(teacher),
        data_collator=collate,
    )
    trainer.train()
    return trainer


def trajectory(trainer, *names):
    return torch.tensor([[row[name] for name in names] for row in trainer.state.log_history if "loss" in row])


@pytest.fixture
def pair(processor):
    teacher = make_whisper(processor)
    return teacher, init_student(make_whisper(processor, seed=5), decoder_layers=2)


@pytest.mark.parametrize("freeze_encoder", [True, False])
def test_without_soft_targets_it_is_seq2seq_trainer(tmp_path, pair, freeze_encoder):
    teacher, student = pair
    ours = train(tmp_path, teacher, student, preset="ce", freeze_encoder=freeze_encoder)
    plain = copy.deepcopy(student)
    if freeze_encoder:
        plain.model.encoder.requires_grad_(False)
    theirs = Seq2SeqTrainer(
        model=plain,
        args=Seq2SeqTrainingArguments(**options(tmp_path, remove_unused_columns=False)),
        train_dataset=Clips(teacher),
        data_collator=collate_plain,
    )
    theirs.train()
    torch.testing.assert_close(
        trajectory(ours, "loss", "grad_norm"), trajectory(theirs, "loss", "grad_norm"), rtol=2e-5, atol=1e-6
    )
    for (name, a), (_, b) in zip(ours.model.named_parameters(), theirs.model.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("preset", ["askd", "ce", "ps-kd"])
def test_accumulation_does_not_change_the_trajectory(tmp_path, pair, preset):
    runs = [
        train(tmp_path, *pair, preset=preset, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size)
        for size in (8, 4, 1)
    ]
    names = ["loss", "grad_norm", "ce_loss", "blend_loss", "teacher_weight", "self_weight"]
    for other in runs[1:]:
        torch.testing.assert_close(trajectory(other, *names), trajectory(runs[0], *names), rtol=1e-4, atol=1e-6)
