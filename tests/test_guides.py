"""Every command of the README and the guides runs, as it is printed, on tiny models and speech of the printed names.

The commands of a document run in this process and in their order, in a directory that has each model and dataset that
they name, with a Hub on the loopback. Its Python runs between them. `SHORTER` lists the options that are added at the
end of commands whose size is that of real work. `accelerate launch` is replaced by one process: test_distill.py has a
real launch.
"""

import contextlib
import functools
import io
import itertools
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import evaluate  # noqa: F401  (the library, before examples/evaluate.py is in the path)
import fake_hub
import numpy as np
import pytest
import soundfile
from documents import DOCUMENTS, GUIDES, ROOT, blocks, code_blocks, commands_in, document_id
from fake_hub import FakeHub, hub_of_this_process
from places import make_place
from transformers import WhisperForConditionalGeneration
from transformers.pipelines import automatic_speech_recognition

import askd_hf
from askd_hf.commands.main import main as run_askd_hf
from askd_hf.hub import upload
from askd_hf.schedule import TEACHER_SCHEDULES

# commands that don't run here, and why
NOT_RUN = {
    "python examples/study.py --study examples/studies/digits.yaml": "minutes long: test_study.py runs a smaller one",
    "python examples/study.py --study my_study.yaml": "minutes long: test_study.py runs a smaller one",
    "python examples/study.py --study examples/studies/levers.yaml": "hours long",
    "python examples/study.py --study examples/studies/encoder.yaml": "hours long",
    "python examples/study.py --study examples/studies/defaults.yaml": "hours long",
    "python examples/study.py --study examples/studies/presets.yaml": "hours long",
    "python examples/study.py --study examples/studies/base.yaml": "two hours long",
    "python examples/study.py --study examples/studies/flagship.yaml --only '3 decoder layers, 6 s, 20,000 tokens'": (
        "hours long"
    ),
    "python examples/study.py --study examples/studies/ablations.yaml": "an hour long",
    "python examples/study.py --study examples/studies/depth.yaml": "an hour long",
    "python examples/study.py --study examples/studies/noise.yaml": "an hour long",
    "python examples/study.py --study examples/studies/noise_librispeech.yaml": "two hours long",
    "python examples/study.py --study examples/studies/noise_digits.yaml": "an hour long",
    "python examples/study.py --study examples/studies/replay.yaml": "an hour long",
    "python examples/study.py --study examples/studies/recipe.yaml": "an hour long",
    "askd-hf pseudo-label --teacher openai/whisper-tiny.en --dataset librispeech --word_timestamps "
    "--output_dir runs/librispeech_words": "the English teacher made for this test has no timestamp tokens",
    "askd-hf pseudo-label --teacher openai/whisper-tiny.en --dataset unlabeled --word_timestamps "
    "--output_dir runs/unlabeled_words": "the English teacher made for this test has no timestamp tokens",
    "make demo": "minutes long: test_demo.py runs its script",
    "make test": "runs this test",
    "pip install -c constraints.txt .": "installs: a slow test of test_wheel.py does it in a new environment",
    "git clone https://github.com/Jakobovski/free-spoken-digit-dataset": "needs the network",
    "tensorboard --logdir runs": "a server, which doesn't end",
}

# commands that only `make test-slow` runs
SLOW = (
    "python examples/demo/make_digits.py --fsdd free-spoken-digit-dataset",
    "python examples/demo/make_strings.py",  # encodes 480 clips
    "python examples/demo/train_teacher.py",  # reads what make_digits.py makes
    "python examples/demo/widen_teacher.py",  # transcribes 80 clips
    "python examples/benchmarks/training_step.py --loss_memory --batch_size 32 --label_tokens 128 128",  # 3 processes
)
# documents whose commands `make test` runs; `make test-slow` runs those of the others
FAST = ("README", "publishing", "several-gpus")


# test_runtimes.py runs this one, on a model that all runtimes run
RUN_HERE = [document for document in DOCUMENTS if document != GUIDES / "runtimes.md"]


def in_its_suite(document: Path):
    fast = document.stem in FAST and document.parent.name != "demo"
    return document if fast else pytest.param(document, marks=pytest.mark.slow)


WITH_SLOW = (ROOT / "examples" / "demo" / "README.md", GUIDES / "speed.md")

TOKEN = "hf_tokenThatMayWrite"
FIGURE = ROOT / "examples" / "demo" / "run.png"
SHORT_RUN = "--max_steps 2 --use_cpu --dataloader_num_workers 0"
TRAINING = f"{SHORT_RUN} --compare False"  # without the evaluation of three models and their speed
EVALUATION = "--device cpu --max_eval_samples 2 --speed_clips 1 --repetitions 1 --n_resamples 20"
# a model of the shape of tiny takes seconds per step
STEP = "--model openai/whisper-tiny.en --use_cpu --batch_size 2 --label_tokens 3 8 --top_k 8 --repetitions 1"
# words of a command: options that are added to it; the entry with the most words counts
SHORTER = {
    "askd-hf distill": TRAINING,
    "askd-hf distill --min_duration_in_seconds": f"{TRAINING} --min_duration_in_seconds 0.5",  # windows have a second
    "askd-hf distill --window_seconds": f"{TRAINING} --window_seconds 1",
    "askd-hf distill --window_seconds --vocabulary 20000": f"{TRAINING} --window_seconds 1 --vocabulary auto",
    "askd-hf distill --encoder_layers": f"{TRAINING} --encoder_layers 0, --encoder_recovery_epochs 1",
    "askd-hf plan": "--speedup 0.01",
    "askd-hf prepare --audio_dir": "--target prepared",  # my_speech is here already
    "askd-hf finetune": TRAINING,
    "askd-hf cache-teacher": "--use_cpu",
    "askd-hf evaluate": EVALUATION,
    "askd-hf evaluate --score_only": "--n_resamples 20",
    # a random teacher is never sure of its transcripts with timestamps
    "askd-hf pseudo-label": "--device cpu --logprob_threshold -99 --compression_ratio_threshold 99",
    "python examples/distill.py": SHORT_RUN,
    "python examples/distill.py --config": f"{TRAINING} --eval_steps 1 --max_train_samples 4 --max_eval_samples 2",
    "python examples/finetune.py": TRAINING,
    "python examples/demo/train_teacher.py": "--steps 2 --batch_size 2 --threads 1",
    "python examples/demo/widen_teacher.py": "--steps 2 --batch_size 2 --threads 1",
    "python examples/benchmarks/schedules.py": f"{TRAINING} --noises 0.3 --seeds 1 --max_train_samples 4 "
    "--max_eval_samples 2",
    "python examples/benchmarks/top_k.py": "--top_k 1 8 --batches 1",
    "python examples/benchmarks/cache_precision.py": "--clips 2",
    "python examples/benchmarks/vocabulary.py": "--sizes 300 --max_eval_samples 2",
    "python examples/benchmarks/encoder_layers.py": "--selections 1, --epochs 1 --max_train_samples 2 "
    "--max_eval_samples 2",
    "python examples/benchmarks/by_hand.py": "--max_seconds 1",  # the windows of the students here
    "python examples/benchmarks/loops.py": f"{SHORT_RUN} --window_seconds 1 --vocabulary 31",
    "python examples/benchmarks/training_step.py": STEP,
    "python examples/benchmarks/training_step.py --sweep": f"{STEP} --sweep_values 4 8",
    "python examples/benchmarks/training_step.py --trainer_overhead": f"{STEP} --trainer_overhead 3",
}
TRAINS = re.compile(r"\b(distill|finetune)(\.py)?\b")


def shorter(command: list[str]) -> list[str]:
    """Return the options of `SHORTER` for a command."""
    found = [words for words in SHORTER if set(words.split()) <= set(command)]
    options = SHORTER[max(found, key=lambda words: len(words.split()))].split() if found else []
    labels = ["--teacher_top_k", "8"]  # the demo's vocabulary has fewer tokens than the default
    return options + labels if "--teacher_cache_dir" in command and "askd-hf distill" in " ".join(command) else options


@contextlib.contextmanager
def script_directory(directory: Path) -> Iterator[None]:
    """Let a script import its neighbors, and no module of their names that another test has imported."""
    names = {file.stem for file in directory.glob("*.py")} - {"evaluate"}
    hidden = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, str(directory))
    try:
        yield
    finally:
        sys.path.remove(str(directory))
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(hidden)


def run_script(file: Path, arguments: list[str], monkeypatch) -> None:
    """Run a script as `python FILE ARGUMENTS` does."""
    monkeypatch.setattr(sys, "argv", [str(file), *arguments])
    with script_directory(file.parent.resolve()):
        runpy.run_path(str(file), run_name="__main__")


def as_one_process(words: list[str]) -> list[str]:
    """Return the command that `accelerate launch` starts several times."""
    if words[:2] == ["accelerate", "launch"]:
        return ["askd-hf", *words[words.index("askd_hf.commands.main") + 1 :]]
    return words


def run_command(words: list[str], monkeypatch) -> None:
    """Run a command in this process. Raise `SystemExit` if it fails."""
    program, *arguments = as_one_process(words)
    arguments += shorter([program, *arguments])
    if program == "askd-hf":
        run_askd_hf(arguments)
    elif program == "python":
        run_script(Path(arguments[0]), arguments[1:], monkeypatch)
    else:
        raise AssertionError(f"no way to run {program}")


def new_runs(kept: set[Path]) -> list[Path]:
    """Return the finished runs that weren't there before."""
    return [file.parent for file in Path("runs").glob("*/training.json") if file.parent not in kept]


def forget_runs(words: list[str], kept: set[Path]) -> None:
    """Delete earlier runs before one that doesn't resume: the commands of a guide have the same --output_dir."""
    if TRAINS.search(" ".join(words)) and "--resume_from_checkpoint" not in words:
        for directory in new_runs(kept):
            shutil.rmtree(directory)


def check_result(words: list[str], hub: FakeHub, kept: set[Path]) -> None:
    """Check that a command has left what it is for."""
    command = " ".join(words)
    if TRAINS.search(command):
        (run,) = new_runs(kept)
        WhisperForConditionalGeneration.from_pretrained(run)
    elif "evaluate" in words:
        newest = max(Path("runs").glob("evaluation-*/results.json"), key=lambda file: file.stat().st_mtime)
        assert newest.with_name("report.html").is_file()
    if "push" in words or "--push_to_hub" in words:
        (repo,) = (name for option, name in itertools.pairwise(words) if option in ("--repo_id", "--hub_model_id"))
        pushed = run if TRAINS.search(command) else Path(words[words.index("--model_dir") + 1])
        for name in ("model.safetensors", "generation_config.json"):
            there = hub.root / "models" / repo / name
            assert there.read_bytes() == (pushed / name).read_bytes(), name
    for option, directory in itertools.pairwise(words):
        if option in ("--encoder_cache_dir", "--teacher_cache_dir"):
            assert any(Path(directory).iterdir())


def run_document(document: Path, slow: bool, hub: FakeHub, monkeypatch, capsys) -> list[str]:
    """Run either the slow commands of a document, or the others and its Python. Return the failures."""
    failures, namespace = [], {"__name__": "example"}
    kept = set(Path("runs").glob("*"))
    for language, text in code_blocks(document):
        for words in commands_in(text) if language == "bash" else []:
            command = shlex.join(words)
            if command in NOT_RUN or (command in SLOW) != slow:
                continue
            forget_runs(words, kept)
            try:
                run_command(words, monkeypatch)
                check_result(words, hub, kept)
            except (Exception, SystemExit) as error:
                printed = capsys.readouterr().err.strip().splitlines()
                failures.append(f"{command}\n    {error!r}\n    {printed[-1] if printed else ''}")
        if language == "python" and not slow:
            exec(compile(text, document.name, "exec"), namespace)
    return failures


def read_as_ffmpeg(content: bytes, sampling_rate: int) -> np.ndarray:
    wave, rate = soundfile.read(io.BytesIO(content), dtype="float32")
    assert rate == sampling_rate
    return wave


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[FakeHub]:
    """Work in an empty directory, with a Hub on which `you` may write."""
    (tmp_path / "place").mkdir()
    monkeypatch.chdir(tmp_path / "place")
    monkeypatch.setattr(fake_hub, "USER", "you")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with hub_of_this_process(tmp_path / "hub", {TOKEN: "write"}, monkeypatch) as hub:
        yield hub


@pytest.mark.parametrize("document", map(in_its_suite, RUN_HERE), ids=document_id)
def test_the_commands_of_a_document_run(document, hub, monkeypatch, capsys):
    # a third of the time of such short runs; test_figure.py draws it
    monkeypatch.setattr(upload, "write_run_figure", lambda log, file: shutil.copy(FIGURE, file))
    if shutil.which("ffmpeg") is None:  # with which `pipeline` reads files
        monkeypatch.setattr(automatic_speech_recognition, "ffmpeg_read", read_as_ffmpeg)
    monkeypatch.setitem(TEACHER_SCHEDULES, "quadratic", None)  # which the guide of the method adds
    shorter_run = dict(max_steps=2, use_cpu=True, dataloader_num_workers=0, max_train_samples=4, max_eval_samples=2)
    monkeypatch.setattr(askd_hf, "distill", functools.partial(askd_hf.distill, compare=False, **shorter_run))
    make_place(document.read_text(encoding="utf-8"))
    failures = run_document(document, False, hub, monkeypatch, capsys)
    assert not failures, "\n".join(failures)


@pytest.mark.slow
@pytest.mark.parametrize("document", WITH_SLOW, ids=lambda document: f"{document.parent.name}-{document.stem}")
def test_the_slow_commands_of_a_document_run(document, hub, monkeypatch, capsys):
    make_place(document.read_text(encoding="utf-8"))
    failures = run_document(document, True, hub, monkeypatch, capsys)
    assert not failures, "\n".join(failures)


def test_no_exception_is_stale():
    printed = [words for document in RUN_HERE for text in blocks(document, "bash") for words in commands_in(text)]
    assert {*NOT_RUN, *SLOW} <= {shlex.join(words) for words in printed}
    for words in SHORTER:
        assert any(set(words.split()) <= set(as_one_process(command)) for command in printed), words


def test_bash_reads_the_commands_as_they_are_run():
    # in this PATH every command is unknown to bash, which then calls this function
    script = "command_not_found_handle() { printf '%s\\0' \"$@\"; printf '\\n'; }\nPATH=/none\n"
    for document in DOCUMENTS:
        block = "\n".join(blocks(document, "bash"))
        done = subprocess.run(["bash", "-c", script + block], capture_output=True, text=True, check=True)
        assert [line.split("\0")[:-1] for line in done.stdout.splitlines()] == commands_in(block), document
