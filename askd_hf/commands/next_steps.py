"""The end of a run or an evaluation: where everything is, and the commands that come next."""

import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from ..arguments import DataArguments, ModelArguments, SpeechSource
from ..config import ASKDConfig
from ..evaluation.comparison import EVALUATION
from ..hub.figure import wer_names
from ..hub.training_summary import SUMMARY_FILE, ModelInfo
from ..hub.upload import CARD
from ..models.window import shortest_context
from ..training.checkpoint_lookup import checkpoint_directories

OTHER_SPEECH = "other_speech"  # stands for a directory of the user
WHOLE_WINDOW = 30  # seconds
FILE = "speech.wav"  # stands for a file of the user


def print_next_steps(
    model_args: ModelArguments, data_args: DataArguments, config: ASKDConfig, source: SpeechSource, clip: str | None
) -> None:
    """Print where the files of a finished run are, and commands that transcribe, evaluate and publish.

    Args:
        source: the speech whose language and task the commands have.
        clip: a file to transcribe. None for a name that stands for one.
    """
    print()
    for name, place in places(config):
        print(f"{name:<13}{place}")
    for purpose, command in next_steps(model_args, data_args, config, source, clip):
        print(f"\n{purpose}:\n  {shlex.join(command)}")


def places(config: ASKDConfig) -> Iterator[tuple[str, str]]:
    """Yield the parts of a run, and the path or command by which each is found."""
    run = Path(config.output_dir)
    yield "student", str(run)
    yield "model card", str(run / CARD)
    if (run / EVALUATION / "report.html").is_file():
        yield "report", str(run / EVALUATION / "report.html")
    if checkpoints := checkpoint_directories(run):
        others = f" and {len(checkpoints) - 1} before it" if checkpoints[1:] else ""
        yield "checkpoints", f"{checkpoints[-1]}{others}"
    yield "log", str(run / "trainer_state.json")
    if "tensorboard" in config.report_to:
        logs = os.environ.get("TENSORBOARD_LOGGING_DIR", config.output_dir)
        yield "curves", shlex.join(["tensorboard", "--logdir", logs])
    if "trackio" in config.report_to:
        yield "curves", shlex.join(["trackio", "show", "--project", config.project])


PIPELINE = "from transformers import pipeline"


def next_steps(
    model_args: ModelArguments, data_args: DataArguments, config: ASKDConfig, source: SpeechSource, clip: str | None
) -> Iterator[tuple[str, list[str]]]:
    """Yield the purpose and the words of each command. See `print_next_steps` for the arguments."""
    run, file = (json.dumps(path, ensure_ascii=False) for path in (config.output_dir, clip or FILE))
    # not `pipeline(...)(file)`, which requires ffmpeg
    wave = f'decode_audio({{"path": {file}}})'
    text = f'pipeline("automatic-speech-recognition", model={run})({wave})["text"]'
    yield "transcribe a file", ["python", "-c", f"from askd_hf.data import decode_audio; {PIPELINE}; print({text})"]

    given = {"teacher": model_args.teacher, "dataset": OTHER_SPEECH, "language": source.language}
    given["task"] = source.task if source.task != "transcribe" else None
    given["normalizer"] = data_args.normalizer if data_args.normalizer != "auto" else None
    given["clip_context"] = "True" if shortest_context(model_args) is not None else None
    options = [word for name, value in given.items() if value is not None for word in (f"--{name}", value)]
    yield "evaluate on other speech", ["askd-hf", "evaluate", "--model", config.output_dir, *options]

    if config.push_to_hub:
        yield export_step(Path(config.output_dir))
    else:
        yield "publish", push_command(config.output_dir, config.hub_model_id)


def push_command(run: str, repo_id: str | None = None) -> list[str]:
    """Return the words of the command that publishes a run. Default: as `you/` and the name of its directory."""
    name = re.sub(r"[^\w.-]+", "-", Path(run).absolute().name, flags=re.ASCII).strip("-.")
    return ["askd-hf", "push", "--model_dir", run, "--repo_id", repo_id or f"you/{name}"]


def print_publishing(run: str, results: Path) -> None:
    """Print the command that publishes an evaluated model with these results. Nothing unless it is of a run."""
    if (Path(run) / SUMMARY_FILE).is_file():
        print(f"\npublish with these results:\n  {shlex.join([*push_command(run), '--results', str(results)])}")


def export_step(run: Path) -> tuple[str, list[str]]:
    """Return the purpose and the words of the export.

    faster-whisper pads all audio to 30 s, and takes a multilingual model with few tokens for an English-only one.
    """
    command = ["askd-hf", "export", "--model", str(run)]
    student = ModelInfo.of(run) if (run / "config.json").is_file() else None  # None with --keep_adapter
    if student and (student.window != WHOLE_WINDOW or student.is_small_multilingual):
        return "convert for CTranslate2", [*command, "--to", "ctranslate2"]
    return "convert for faster-whisper", command


def better_step(log_history: list[dict[str, float]]) -> str | None:
    """Return a sentence on the evaluation with the lowest word error rate, None if that is the last one.

    Of several evaluation sets, the first one counts.
    """
    key = next(iter(wer_names(log_history)), "")
    evaluations = [(row[key], int(row["step"])) for row in log_history if key in row]
    if not evaluations or min(evaluations)[0] >= evaluations[-1][0]:
        return None
    (best, step), (last, last_step) = min(evaluations), evaluations[-1]
    return f"the student is that of step {last_step}, {key} {last:.1f} %; step {step} had {best:.1f} %"
