"""Tiny Whisper models and clips of tones, all made offline."""

import copy
import gc
import importlib.util
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: threads only get in each other's way

import numpy as np
import pytest
import soundfile
import torch
from transformers import (
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

from askd_hf.config import ASKDConfig
from askd_hf.data import SpeechCollator, load_speech_dataset
from askd_hf.models.student import init_student
from askd_hf.trainer import ASKDTrainer

sys.path.append(str(Path(__file__).parent / "data"))
import quick_report
from fake_hub import FakeHub
from processes import Ended, launch_two, run_there, start  # noqa: F401  (for tests, beside `run_here`)

ROOT = Path(__file__).parents[1]
quick_report.install()
SPECIAL = ["<|endoftext|>", "<|startoftranscript|>", "<|transcribe|>", "<|notimestamps|>"]
MULTILINGUAL = ("<|en|>", "<|zh|>", "<|translate|>")  # languages in the order of Whisper's own list


def pytest_collection_finish() -> None:
    """Garbage is collected often; most of the time would go to what the libraries have defined."""
    gc.freeze()


def make_tokenizer(letters: Iterable[str], added: Iterable[str]) -> WhisperTokenizer:
    """A vocabulary of letters, and behind them the special tokens `added`."""
    tokenizer = WhisperTokenizer(
        vocab={letter: i for i, letter in enumerate(letters)},
        merges=[],
        unk_token="<|endoftext|>",
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.add_tokens(list(added), special_tokens=True)
    tokenizer.set_prefix_tokens()  # looks the added tokens up
    return tokenizer


def make_processor(more_tokens: tuple[str, ...] = ()) -> WhisperProcessor:
    """One-second windows of 100 frames, 8 mel bins; a vocabulary of letters."""
    tokenizer = make_tokenizer("abcdefghijklmnopqrstuvwxyzĠ", [*SPECIAL[:2], *more_tokens, *SPECIAL[2:]])
    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    return WhisperProcessor(extractor, tokenizer)


def make_whisper(processor: WhisperProcessor, seed: int = 0, **changes) -> WhisperForConditionalGeneration:
    """A randomly initialized Whisper of width 16 with 2 encoder and 4 decoder layers."""
    token = processor.tokenizer.convert_tokens_to_ids
    options = dict(
        vocab_size=len(processor.tokenizer),
        num_mel_bins=8,
        d_model=16,
        encoder_layers=2,
        decoder_layers=4,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_source_positions=50,
        max_target_positions=32,
        decoder_start_token_id=token("<|startoftranscript|>"),
        bos_token_id=token("<|endoftext|>"),
        eos_token_id=token("<|endoftext|>"),
        pad_token_id=token("<|endoftext|>"),
        suppress_tokens=None,
        begin_suppress_tokens=None,
        init_std=0.3,
    )
    torch.manual_seed(seed)
    model = WhisperForConditionalGeneration(WhisperConfig(**(options | changes)))
    model.generation_config._from_model_config = False  # as one that was read from its file
    model.generation_config.no_timestamps_token_id = token("<|notimestamps|>")
    model.generation_config.is_multilingual = False
    model.generation_config.max_length = 12  # a random model finds no end
    return model


def make_multilingual() -> tuple[WhisperForConditionalGeneration, WhisperProcessor]:
    """As `make_whisper`, of English and Chinese, configured as OpenAI's multilingual models are."""
    processor = make_processor(MULTILINGUAL)
    model = make_whisper(processor)
    token = processor.tokenizer.convert_tokens_to_ids
    settings = dict(
        is_multilingual=True,
        lang_to_id={name: token(name) for name in ("<|en|>", "<|zh|>")},
        task_to_id={name: token(f"<|{name}|>") for name in ("transcribe", "translate")},
        alignment_heads=[[1, 0], [3, 1]],
        forced_decoder_ids=[[1, None], [2, token("<|transcribe|>")]],
    )
    for name, value in settings.items():  # `update` knows only names that are there already
        setattr(model.generation_config, name, value)
    return model, processor


@pytest.fixture(scope="session")
def processor() -> WhisperProcessor:
    return make_processor()


@pytest.fixture
def teacher(processor) -> WhisperForConditionalGeneration:
    return make_whisper(processor).eval()


def learn_by_heart(model: WhisperForConditionalGeneration, processor: WhisperProcessor, folder: Path) -> None:
    """Train a model until it knows what is said in a few clips, in the language that the tokenizer is set to."""
    batch = SpeechCollator(processor, model.config)(list(load_speech_dataset(str(folder), None, "train")))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        model(**{name: batch[name] for name in ("input_features", "labels")}).loss.backward()
        optimizer.step()


def write_speech(folder, clips: int = 16, seed: int = 0):
    """An audiofolder of tones: `folder/metadata.csv` and one wav a clip, 0.3 to 1 s, longer texts higher."""
    rng = np.random.default_rng(seed)
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    rows = ["file_name,transcription"]
    for i in range(clips):
        text = "".join(rng.choice(list("abcdef"), size=rng.integers(2, 9)))
        seconds = rng.uniform(0.3, 1.0)
        time = np.arange(int(16_000 * seconds)) / 16_000
        wave = 0.3 * np.sin(2 * np.pi * (200 + 100 * len(text)) * time) + 0.01 * rng.standard_normal(len(time))
        soundfile.write(folder / "audio" / f"{i:03d}.wav", wave, 16_000)
        rows.append(f"audio/{i:03d}.wav,{text}")
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="session")
def speech_dir(tmp_path_factory) -> Path:
    """A directory with the splits train, 16 clips, and validation, 6."""
    directory = tmp_path_factory.mktemp("speech")
    write_speech(directory / "train", clips=16, seed=0)
    write_speech(directory / "validation", clips=6, seed=1)
    return directory


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


def make_trainer(
    output_dir, teacher, student, eval_dataset=None, compute_metrics=None, processor=None, clips=16, **changes
):
    """An `ASKDTrainer` on copies of the models; of 10 steps of the preset askd 6 are teacher phase, from 0.8 on."""
    if changes.get("preset", "askd") == "askd":
        changes = dict(teacher_weight=0.8, teacher_phase_ratio=0.6) | changes
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


def history(trainer, *names: str) -> torch.Tensor:
    """The named values of every training step, `(steps, names)`."""
    return torch.tensor([[row[name] for name in names] for row in trainer.state.log_history if "loss" in row])


@pytest.fixture
def student(processor) -> WhisperForConditionalGeneration:
    """Of other weights than the teacher, so that they disagree."""
    return init_student(make_whisper(processor, seed=5), decoder_layers=2)


def load_script(file: Path) -> ModuleType:
    if str(file.parent) not in sys.path:  # scripts import one another; last, as evaluate.py isn't the library
        sys.path.append(str(file.parent))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    script = importlib.util.module_from_spec(spec)
    if file.stem != "evaluate":  # what is pickled must be found again; but the library of that name as well
        sys.modules[file.stem] = script
    spec.loader.exec_module(script)
    return script


def run_here(monkeypatch, capture, *arguments, file: Path | None = None, script: ModuleType | None = None) -> Ended:
    """A script's `main()` in this process, where starting another one takes longer than all that it does.

    Args:
        capture: capsys or capfd.
        file: that it is loaded from, unless `script` is given; examples/distill.py by default.
    """
    script = script or load_script(file or ROOT / "examples" / "distill.py")
    monkeypatch.setattr(sys, "argv", [Path(script.__file__).name, *map(str, arguments)])
    status = 0
    try:
        with script.exit_on_user_error():
            script.main()
    except SystemExit as stop:
        status = stop.code
    return Ended(status, *capture.readouterr())


def accelerate_launch(script: Path, *arguments) -> subprocess.CompletedProcess:
    """`script` under `accelerate launch` with two processes on the CPU; `launch_two` is 30 seconds faster."""
    # accelerate's own --cpu would start a single process, or ask for MPI; the script chooses the CPU by `use_cpu`
    launch = "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
    launch += f" --dynamo_backend no --main_process_port {29500 + os.getpid() % 2000}"
    command = [sys.executable, "-m", *launch.split(), str(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def hub_environment(hub: FakeHub, home: Path, token: str | None) -> dict[str, str]:
    """The environment of a process that knows no other Hub, with a cache of its own."""
    environment = {key: value for key, value in os.environ.items() if key != "HF_TOKEN"}
    environment |= {"HF_HOME": str(home), "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    return environment | ({} if token is None else {"HF_TOKEN": token})


@dataclass
class HubVisit:
    """A folder, a Hub on the loopback, and the processes that were run with them."""

    folder: Path
    hub: FakeHub
    ended: dict[str, Ended] = field(default_factory=dict)

    def run(self, **commands: tuple[str, str | None]) -> None:
        """Run commands side by side, `name=(script and arguments, token)`: each with an empty cache of its own.

        In processes of their own, because the libraries read the endpoint when they are imported.
        """
        started = {}
        for name, (command, token) in commands.items():
            environment = hub_environment(self.hub, self.folder / "homes" / name, token)
            script, *arguments = shlex.split(command)
            options = dict(directory=self.folder, environment=environment, before_hub=True)
            started[name] = start(Path(script), *arguments, **options)
        self.ended |= {name: process.ended() for name, process in started.items()}

    def error(self, name: str) -> str:
        """The message with which it ended."""
        assert self.ended[name].returncode == 2, self.ended[name].stderr
        assert "Traceback" not in self.ended[name].stderr
        message = self.ended[name].stderr.strip().splitlines()[-1]
        assert message.startswith("error: ")
        return message
