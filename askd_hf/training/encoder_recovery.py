"""Train a pruned encoder on audio alone, until its outputs are those of the whole encoder again; then it is frozen.

No transcripts are required, so any speech will do, and what the encoder learns doesn't depend on the labels: with few
hours, an encoder that is trained on labels memorizes them. The outputs of the frozen encoder can be cached.
"""

import functools
import math
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as IndexedDataset
from transformers import (
    Trainer,
    TrainerCallback,
    TrainingArguments,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from ..arguments import DataArguments, ModelArguments
from ..config import ASKDConfig
from ..data import SAMPLING_RATE, Limits, filter_invalid_clips, load_speech_dataset
from ..data.audio import extract_features, waveform_segment
from ..data.audio_context import audio_context
from ..data.encoder_cache import weights_digest
from ..data.json_files import read_json, write_json
from ..data.shared_disk import of_main_process, processes_sharing
from ..errors import UserError, disk_errors
from ..models.layers import COPIED_LAYERS, copied_encoder_layers, is_pruned_encoder
from ..models.lora import ADAPTER_WEIGHTS
from .checkpoint_lookup import checkpoint_directories, is_finished
from .log_lines import use_log_lines
from .run_callbacks import StepClock, StopGracefullyCallback, keep_workers
from .run_dir import exit_non_main_processes

RECOVERY_DIR = "encoder_recovery"  # in the output directory of the run
ENCODER_FILE = "encoder.safetensors"
MADE_OF_FILE = "made_of.json"  # what the encoder is recovered from, written before training
DEFAULT_EPOCHS = 10
# measured with 3 of the 4 layers of whisper-tiny.en, whose width is WIDTH
LEARNING_RATE, WIDTH, BATCH_SIZE, WARMUP, WEIGHT_DECAY = 1e-3, 384, 16, 0.05, 0.01


class AudioWindows(IndexedDataset):
    """The clips of datasets in windows: a longer clip is several of them, the last of which may be short.

    Args:
        datasets: with `audio`, `clip` and `duration`.
        seconds: the window.
    """

    def __init__(self, datasets: list[Dataset], seconds: float):
        self.datasets, self.samples = datasets, round(seconds * SAMPLING_RATE)
        self.places = [
            (number, row, start)
            for number, dataset in enumerate(datasets)
            for row, duration in enumerate(dataset["duration"][:])
            for start in range(0, max(1, round(duration * SAMPLING_RATE)), self.samples)
        ]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Tensor:
        number, row, start = self.places[index]
        return torch.from_numpy(waveform_segment(self.datasets[number][row], start, self.samples))


class EncoderRecoveryTrainer(Trainer):
    """Trains an encoder on the mean squared difference between its output and that of another one.

    Args:
        model: a `WhisperEncoder`. The parameters that require gradients are trained.
        target_encoder: the whole encoder. Its window may be longer: then it takes the first positions.
    """

    def __init__(self, model: nn.Module, args: TrainingArguments, target_encoder: nn.Module, **options: Any):
        super().__init__(model=model, args=args, **options)
        self.target_encoder = target_encoder.to(args.device).eval()
        use_log_lines(self, "Recovering the encoder")

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **kwargs: Any):
        features = inputs["input_features"]
        # Trainer puts only the forward pass of `model` under autocast
        encoding = audio_context(self.target_encoder, features.shape[-1])
        with torch.no_grad(), self.accelerator.autocast(), encoding:
            target = self.target_encoder(features.to(next(self.target_encoder.parameters()).dtype)).last_hidden_state
        loss = F.mse_loss(model(features).last_hidden_state.float(), target.float())
        return (loss, {}) if return_outputs else loss

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        loader = super()._get_dataloader(*args, **kwargs)
        keep_workers(loader)
        return loader


def learning_rate(width: int) -> float:
    """Return the peak learning rate for an encoder of this width: less for wider ones than whisper-tiny.

    Our choice. Whisper's own rates also decrease with the width (Radford et al. 2022, appendix F).
    """
    return LEARNING_RATE * min(1.0, WIDTH / width)


def recovery_epochs(
    models: ModelArguments, config: ASKDConfig, student: WhisperForConditionalGeneration, streaming: bool
) -> int:
    """Return the epochs of the recovery of the student's encoder, 0 for none.

    Raises `UserError` for options of the recovery that have no effect.
    """
    pruned = is_pruned_encoder(student.config)
    epochs = models.encoder_recovery_epochs
    if epochs is None:
        joint = config.freeze_encoder is False or bool(config.hidden_weight)
        epochs = DEFAULT_EPOCHS if pruned and models.encoder_layers and not joint and not streaming else 0
    elif epochs and not (pruned and models.encoder_layers):
        raise UserError("--encoder_recovery_epochs requires --encoder_layers with fewer layers than the encoder has")
    elif epochs and streaming:
        raise UserError("--encoder_recovery_epochs is not supported with --streaming")
    if models.encoder_recovery_dataset and not epochs:
        raise UserError(
            "--encoder_recovery_dataset has no effect without a recovery of the encoder: give --encoder_layers, and "
            "leave out --freeze_encoder False, --hidden_weight and --encoder_recovery_epochs 0"
        )
    return epochs


@dataclass
class EncoderRecovery:
    """The recovery of a student's pruned encoder, which is trained in place.

    Args:
        student: the layers of its encoder are trained.
        whole: the model that the layers of the student's encoder are from.
        speech: the training set. The audio of `--encoder_recovery_dataset` is added.
        extractor: the student's.
        epochs: of `recovery_epochs`.
        data_args: how the audio of `--encoder_recovery_dataset` is checked.
    """

    models: ModelArguments
    config: ASKDConfig
    student: WhisperForConditionalGeneration
    whole: WhisperForConditionalGeneration
    speech: Dataset
    extractor: WhisperFeatureExtractor
    epochs: int
    data_args: DataArguments

    def run(self) -> None:
        """Train the encoder and mark it as trained.

        The result is saved in `encoder_recovery` in the output directory. A resumed run reads it from the directory of
        its checkpoint or from there, or continues from the last checkpoint. Ends the process with status 130 if
        training was interrupted.
        """
        folder = Path(self.config.output_dir) / RECOVERY_DIR
        resume = self.config.resume_from_checkpoint not in (None, "", "False", "false")
        if not resume and PartialState().process_index == processes_sharing(folder.absolute().parent)[0]:
            shutil.rmtree(folder, ignore_errors=True)
        PartialState().wait_for_everyone()
        finished = self._finished(folder)
        if finished is not None:  # the other nodes have a copy then
            self._load(finished)
            if PartialState().is_main_process and finished.resolve() != (folder / ENCODER_FILE).resolve():
                self._save(folder / ENCODER_FILE)
        else:
            self._begin(folder)
            self._train_or_stop(folder)
            if PartialState().is_main_process:
                self._save(folder / ENCODER_FILE)
                for checkpoint in checkpoint_directories(folder):
                    shutil.rmtree(checkpoint)
            PartialState().wait_for_everyone()
        getattr(self.student.config, COPIED_LAYERS)["trained"] = True

    def measure(self, folder: Path, steps: int) -> tuple[int, float]:
        """Train for a few steps, and mark the encoder as trained. Nothing is saved.

        Args:
            folder: a temporary directory.

        Returns:
            The number of steps of the whole recovery, and the median seconds of a step.
        """
        clock = StepClock()
        limits: dict[str, Any] = dict(max_steps=steps, save_strategy="no", logging_strategy="no", disable_tqdm=True)
        trainer = self._train(folder, clock, **limits)
        getattr(self.student.config, COPIED_LAYERS)["trained"] = True
        batches = len(trainer.get_train_dataloader())
        return self.epochs * math.ceil(batches / trainer.args.gradient_accumulation_steps), median(clock.seconds)

    def _finished(self, folder: Path) -> Path | None:
        """Return the recovered encoder of the resumed run: that beside its checkpoint first. None if there is none."""
        resumed = self.config.resume_from_checkpoint
        checkpoint = resumed if resumed and Path(resumed).is_dir() else None
        return of_main_process(recovered_encoder(checkpoint, folder.parent))

    def _made_of(self) -> dict[str, str]:
        return {
            "layers": str(copied_encoder_layers(self.student.config)),
            "whole encoder": weights_digest(self.whole.model.encoder),
            "epochs": str(self.epochs),
            "window": str(self.student.config.max_source_positions),
            "merged layers": str(self.models.layer_selection == "merged"),
        }

    def _check_made_of(self, saved: dict[str, str], path: Path) -> None:
        """Raise `UserError` if the encoder in `path`, made of `saved`, was made with other options."""
        # one of an earlier version lacks some values
        if changed := [name for name, value in self._made_of().items() if saved.get(name, value) != value]:
            raise UserError(
                f"{path} was recovered with other values of {', '.join(changed)}: resume with the same options, or "
                "give another --output_dir"
            )

    def _begin(self, folder: Path) -> None:
        """Write what the encoder is made of, before training. All processes must call it.

        Raises `UserError` if training continues from a checkpoint that was made with other options.
        """
        file = folder / MADE_OF_FILE
        continues = bool(_finished_checkpoints(folder)) and file.is_file()
        saved = of_main_process(read_json(file) if continues else {})
        self._check_made_of(saved, folder)
        if PartialState().is_main_process:
            with disk_errors(str(folder)):
                folder.mkdir(parents=True, exist_ok=True)
                write_json(file, self._made_of())

    def _load(self, file: Path) -> None:
        """Read the encoder of an earlier run. Raise `UserError` if it was made with other options."""
        with safe_open(file, "pt") as opened:
            saved = opened.metadata() or {}
        self._check_made_of(saved, file)
        self.student.model.encoder.load_state_dict(load_file(file))

    def _save(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_name(f"{file.name}.tmp")
        weights = {name: weight.contiguous() for name, weight in self.student.model.encoder.state_dict().items()}
        save_file(weights, unfinished, metadata=self._made_of())
        os.replace(unfinished, file)

    def _train_or_stop(self, folder: Path) -> None:
        """Train the encoder. Ends the process if training was interrupted."""
        stop = StopGracefullyCallback()
        trainer = self._train(folder, stop)
        if stop.stopped or any(gather_object([stop.requested])):  # requested in the last update, of any process
            exit_non_main_processes()
            print(
                f"stopped in the recovery of the encoder after step {trainer.state.global_step}; go on with "
                "--resume_from_checkpoint last"
            )
            sys.exit(130)

    def _train(self, folder: Path, callback: TrainerCallback, **limits: Any) -> EncoderRecoveryTrainer:
        """Train the encoder. `limits` override the arguments of the recovery."""
        encoder, whole = self.student.model.encoder, self.whole.model.encoder
        frozen = {name: parameter.requires_grad for name, parameter in encoder.named_parameters()}
        encoder.requires_grad_(False)
        encoder.layers.requires_grad_(True)
        devices = self.student.device, self.whole.device
        trainer = EncoderRecoveryTrainer(
            encoder,
            _arguments(self.config, whole.config.d_model, self.epochs, folder, limits),
            whole,
            train_dataset=AudioWindows(
                [self.speech, *_unlabeled(self.models, self.data_args, self.config)],
                self.extractor.chunk_length,
            ),
            data_collator=functools.partial(_collate, self.extractor),
            callbacks=[callback],
        )
        finished = _finished_checkpoints(folder)
        if PartialState().is_main_process:
            print(
                f"recovering the encoder: {len(encoder.layers)} of {len(whole.layers)} layers are trained on "
                f"{len(trainer.train_dataset)} windows of audio, {self.epochs} epochs"
            )
        trainer.train(resume_from_checkpoint=str(finished[-1]) if finished else None)
        encoder.to(devices[0])
        whole.to(devices[1])
        for name, parameter in encoder.named_parameters():
            parameter.requires_grad_(frozen[name])
        return trainer


def recovered_encoder(checkpoint: str | Path | None, output_dir: str | Path) -> Path | None:
    """Return the file of a finished recovery: that of the checkpoint's run first. None if there is none."""
    runs = [*([Path(checkpoint).parent] if checkpoint else []), Path(output_dir)]
    files = (run / RECOVERY_DIR / ENCODER_FILE for run in runs)
    return next((file for file in files if file.is_file()), None)


def _finished_checkpoints(folder: Path) -> list[Path]:
    return [checkpoint for checkpoint in checkpoint_directories(folder) if is_finished(checkpoint)]


def _collate(extractor: WhisperFeatureExtractor, waves: list[Tensor]) -> dict[str, Tensor]:
    return extract_features(extractor, [wave.numpy() for wave in waves])


def _arguments(config: ASKDConfig, width: int, epochs: int, folder: Path, limits: dict[str, Any]) -> TrainingArguments:
    """Return the arguments of the recovery: `BATCH_SIZE` clips per step and process, in parts that fit in memory."""
    fitting = range(1, config.per_device_train_batch_size + 1)
    clips = max(size for size in fitting if BATCH_SIZE % size == 0)
    arguments: dict[str, Any] = dict(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=clips,
        gradient_accumulation_steps=BATCH_SIZE // clips,
        activation_checkpointing=config.activation_checkpointing,
        learning_rate=learning_rate(width),
        warmup_steps=WARMUP,
        weight_decay=WEIGHT_DECAY,
        bf16=config.bf16,
        fp16=config.fp16,
        use_cpu=config.use_cpu,
        seed=config.seed,
        data_seed=config.data_seed,
        logging_steps=config.logging_steps,
        disable_tqdm=config.disable_tqdm,
        report_to=[],
        save_strategy="epoch",
        save_total_limit=1,
        dataloader_num_workers=config.dataloader_num_workers,
        dataloader_pin_memory=config.dataloader_pin_memory,
        remove_unused_columns=False,
        label_names=[],
    )
    return TrainingArguments(**arguments | limits)


def _unlabeled(models: ModelArguments, data_args: DataArguments, config: ASKDConfig) -> list[Dataset]:
    """Return the valid clips of `--encoder_recovery_dataset`, of any length."""
    found, workers = [], data_args.preprocessing_num_workers
    for number, name in enumerate(models.encoder_recovery_dataset):
        clips = load_speech_dataset(name, None, "train", text_required=False, num_proc=workers)
        report = Path(config.output_dir) / f"skipped-recovery-{number}-{Path(name).name}.csv"
        found.append(
            filter_invalid_clips(
                clips,
                None,
                Limits(float("inf")),
                on_bad_audio="skip",
                num_proc=workers,
                recheck=data_args.recheck,
                share_work=True,
                report_file=report,
            )
        )
    return found


def is_recovering(config: ASKDConfig) -> bool:
    """Return whether the run was stopped in the recovery of its encoder, before its first checkpoint."""
    run = Path(config.output_dir)
    if config.resume_from_checkpoint not in ("last", "True", "true") or checkpoint_directories(run):
        return False
    trained = any((run / name).is_file() for name in ("model.safetensors", ADAPTER_WEIGHTS))
    return (run / RECOVERY_DIR).is_dir() and not trained
