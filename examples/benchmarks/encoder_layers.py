r"""What a smaller encoder costs: selections of its layers, trained as by `--encoder_recovery_epochs`, and compared.

    python examples/benchmarks/encoder_layers.py --student runs/my-student --dataset my_speech \
        --eval_splits validation --selections 3 0,1,3 0,1,2 merged:3 --epochs 5

The student has been distilled with its whole encoder. Each smaller encoder takes the place of the whole one, without
further training of the decoder: the error rate shows what is lost before the decoder adapts to it. The inputs of the
layers and the outputs of the whole encoder are computed once and kept in memory in half precision, 0.46 MB per window
of 6 s of whisper-tiny.
"""

import copy
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import Trainer, TrainingArguments, WhisperForConditionalGeneration, WhisperProcessor

from askd_hf.arguments.parser import as_arguments, parse_args
from askd_hf.data import Limits, filter_invalid_clips, load_speech_dataset
from askd_hf.data.audio import extract_features
from askd_hf.errors import exit_on_user_error
from askd_hf.models.loading import load_processor, load_whisper
from askd_hf.models.student import prune_encoder
from askd_hf.training.encoder_recovery import BATCH_SIZE, WARMUP, WEIGHT_DECAY, AudioWindows, learning_rate


@dataclass
class Arguments:
    """The student, the audio, and the encoders to compare."""

    student: str = field(metadata={"help": "Directory or Hub id of a distilled student with its whole encoder."})
    dataset: str = field(metadata={"help": "Directory with audio for training. Transcripts aren't used."})
    eval_dataset: str | None = field(default=None, metadata={"help": "Default: --dataset."})
    eval_splits: str = field(default="validation", metadata={"help": "Split of the held-out speech."})
    selections: list[str] = field(
        default_factory=lambda: ["3", "merged:3"],
        metadata={
            "help": "As of --encoder_layers; with `merged:`, dropped layers are averaged into the kept ones. 3/2: "
            "three layers, and two of these after their training."
        },
    )
    epochs: int = field(default=5, metadata={"help": "Epochs of the training of each encoder."})
    bf16: bool = field(default=False, metadata={"help": "Train in bfloat16."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on only that many clips."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on only that many clips."})
    max_duration_in_seconds: float = field(default=30.0, metadata={"help": "Leave out longer held-out clips."})
    language: str | None = field(default=None, metadata={"help": "Language of the speech, of a multilingual model."})


class States(Dataset):
    """The input of the first layer and the output of the encoder, for each window of audio, in half precision."""

    def __init__(self, model: WhisperForConditionalGeneration, processor: WhisperProcessor, windows: AudioWindows):
        encoder, self.rows = model.model.encoder.eval(), []
        for window in tqdm(windows, desc="encoder outputs"):
            features = extract_features(processor.feature_extractor, [window.numpy()])["input_features"]
            with torch.no_grad():
                states = encoder(features, output_hidden_states=True)
            self.rows.append((states.hidden_states[0][0].half(), states.last_hidden_state[0].half()))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        inputs, targets = self.rows[index]
        return {"inputs": inputs.float(), "targets": targets.float()}


class Layers(nn.Module):
    """The layers of a smaller encoder, which are trained to give the outputs of the whole one."""

    def __init__(self, model: WhisperForConditionalGeneration):
        super().__init__()
        self.layers = model.model.encoder.layers
        self.layer_norm = model.model.encoder.layer_norm.requires_grad_(False)

    def forward(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        for layer in self.layers:
            inputs = layer(inputs, None)
        return {"loss": F.mse_loss(self.layer_norm(inputs.float()), targets)}


def relative_error(layers: Layers, states: States) -> float:
    """Return the squared error of the outputs divided by the squared norm of the whole encoder's."""
    layers.eval()
    with torch.no_grad():
        errors = [float(layers(row["inputs"][None], row["targets"][None])["loss"]) for row in states]
    return sum(errors) / sum(float(row["targets"].square().mean()) for row in states)


def main() -> None:
    (args,) = parse_args((Arguments,), prog="python examples/benchmarks/encoder_layers.py", description=__doc__)
    student, processor = load_whisper(args.student).float(), load_processor(args.student)
    trained = States(student, processor, audio(args.dataset, "train", args.max_train_samples, processor))
    held_out = audio(args.eval_dataset or args.dataset, args.eval_splits, args.max_eval_samples, processor)
    held_out_states = States(student, processor, held_out)
    table = ["layers     parameters  error, %  WER, %  capped, %  words"]
    with tempfile.TemporaryDirectory() as directory:
        for number, selection in enumerate(["all", *args.selections]):
            model, folder = student, Path(directory) / str(number)
            for hop in selection.split("/") if selection != "all" else []:
                layers = hop.removeprefix("merged:")
                model = prune_encoder(copy.deepcopy(model), layers, layers != hop)
                recover(Layers(model), model.config.d_model, trained, args, folder)
            error = relative_error(Layers(model), held_out_states)
            parameters = f"{model.num_parameters() / 1e6:8.1f} M"
            table.append(f"{selection:10} {parameters}  {error:8.1%}  {scores(model, processor, args, folder)}")
    print(*table, sep="\n")


def audio(name: str, split: str, most: int | None, processor: WhisperProcessor) -> AudioWindows:
    """Return the clips of a dataset in windows of the student's length."""
    clips = load_speech_dataset(name, None, split, text_required=False)
    clips = clips.select(range(min(len(clips), most or len(clips))))
    clips = filter_invalid_clips(clips, None, Limits(float("inf")), on_bad_audio="error")
    return AudioWindows([clips], processor.feature_extractor.chunk_length)


def recover(layers: Layers, width: int, states: States, args: Arguments, folder: Path) -> None:
    """Train the layers in place, with the settings of the recovery in a run."""
    arguments = TrainingArguments(
        output_dir=str(folder / "recovery"),
        num_train_epochs=args.epochs,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=learning_rate(width),
        warmup_steps=WARMUP,
        weight_decay=WEIGHT_DECAY,
        bf16=args.bf16,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        report_to=[],
        label_names=[],
    )
    Trainer(model=layers, args=arguments, train_dataset=states).train()
    layers.cpu()


def scores(model: WhisperForConditionalGeneration, processor: WhisperProcessor, args: Arguments, folder: Path) -> str:
    """Return the error rates of the model on the held-out speech, as a part of a row of the table."""
    from askd_hf.commands import evaluate
    from askd_hf.data.json_files import read_json

    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    options = {
        "model": str(folder / "model"),
        "dataset": args.eval_dataset or args.dataset,
        "eval_splits": args.eval_splits,
        "language": args.language or "null",
        "max_duration_in_seconds": str(args.max_duration_in_seconds),
        "max_eval_samples": "null" if args.max_eval_samples is None else str(args.max_eval_samples),
        "output_dir": str(folder / "evaluation"),
    }
    evaluate.main(as_arguments(options))
    (one,) = read_json(folder / "evaluation" / "results.json")["sets"]
    of_student = one["scores"]["student"]
    return f"{of_student['wer']:6.1f}  {of_student['capped_wer']:9.1f}  {one['reference_words']:5,}"


if __name__ == "__main__":
    with exit_on_user_error():
        main()
