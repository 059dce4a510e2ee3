"""Compact lines of what Trainer logs, and the callbacks that print them in place of its dictionaries.

Only what is printed differs: `trainer_state.json` and all of `--report_to` have every value.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from ..progress import Bar, progress_bar, write

WIDTH = 100  # columns of the terminal that a line may take
GAP = "  "


class LogLines:
    """Prints compact lines. The splits of an evaluation, which Trainer logs one after another, are one line."""

    def __init__(self) -> None:
        self._first_step = 0
        self._evaluating = 0
        self._evaluated: list[dict[str, Any]] = []

    def begin(self, state: TrainerState) -> None:
        """Note the step that training begins at, which isn't 0 if it is resumed."""
        self._first_step = state.global_step

    @contextlib.contextmanager
    def one_evaluation(self, state: TrainerState) -> Iterator[None]:
        """Print what is logged in here as one line. Can be entered again in here, as for each split."""
        self._evaluating += 1
        try:
            yield
        finally:
            self._evaluating -= 1
            if self._evaluated and not self._evaluating:
                write(evaluation_line(self._evaluated, state))
                self._evaluated = []

    def print(self, logs: dict[str, Any], state: TrainerState) -> None:
        if self._evaluating and _prefix(logs):
            self._evaluated.append(logs)
        else:
            write(self._line(logs, state))

    def _line(self, logs: dict[str, Any], state: TrainerState) -> str:
        if "loss" in logs:
            return step_line(logs, state)
        if "train_runtime" in logs:
            return end_line(logs, state, self._first_step)
        if _prefix(logs):
            return evaluation_line([logs], state)
        return str(logs)  # of a user's own call of `log`


def _step(state: TrainerState) -> str:
    """Return the step and the number of steps, aligned; without the number outside of training."""
    width = len(str(state.max_steps))
    return f"step {state.global_step:{width}}" + (f"/{state.max_steps}" if state.max_steps > 0 else "")


def step_line(logs: dict[str, Any], state: TrainerState) -> str:
    """Return the line of a training step, from what was logged of loss, weights, learning rate and speed."""
    cells = [_step(state), f"loss {_loss(logs['loss'])}"]
    if "teacher_weight" in logs:
        cells += [f"teacher {logs['teacher_weight']:.2f}", f"self {logs['self_weight']:.2f}"]
    if "learning_rate" in logs:
        cells.append(f"lr {logs['learning_rate']:.1e}")
    if "samples_per_second" in logs:
        cells.append(f"{_rate(logs['samples_per_second']):>4} clips/s")
    if logs.get("skipped_rows"):
        cells.append(f"skipped {logs['skipped_rows']}")
    return GAP.join(cells)


def _loss(value: float) -> str:
    """Return five characters for the usual values, so that the lines are aligned."""
    if abs(value) < 0.01 and value:
        return f"{value:.1e}"
    return f"{value:.{3 if value < 10 else 2 if value < 100 else 1}f}"


def _rate(value: float) -> str:
    return f"{value:.{1 if value < 100 else 0}f}"


def _prefix(logs: dict[str, Any]) -> str | None:
    """Return the prefix of the keys of an evaluation, such as `eval` or `eval_known`; None for other logs."""
    names = (key.removesuffix("_runtime") for key in logs if key.endswith("_runtime"))
    return next((name for name in names if name != "train"), None)


def evaluation_line(evaluated: list[dict[str, Any]], state: TrainerState) -> str:
    """Return the line of an evaluation: the WER of each split in percent, or the loss where there is no WER.

    A split with loops also has their number and the capped WER, as one loop can be many points of a WER.
    If there are many splits, it is continued in further lines.

    Args:
        evaluated: what was logged for each split.
    """
    start, cells = _step(state), []
    for logs in evaluated:
        prefix = _prefix(logs)
        wer, loss = logs.get(f"{prefix}_wer"), logs.get(f"{prefix}_loss")
        split = prefix.removeprefix("eval").removeprefix("_")
        value = f"{wer:.1f} %" if wer is not None else "-" if loss is None else _loss(loss)
        if loops := round(logs.get(f"{prefix}_loops", 0)):
            value += f" ({loops} loop{'s' if loops > 1 else ''}, capped {logs[f'{prefix}_capped_wer']:.1f} %)"
        cells.append((("eval loss" if wer is None else "WER"), f"{split} {value}".lstrip()))
    lines, name = [start], None
    for kind, cell in cells:
        text = cell if kind == name else f"{kind} {cell}"
        if len(lines[-1]) + len(GAP) + len(text) > WIDTH and lines[-1] != start:
            lines.append(" " * len(start))
        lines[-1] += GAP + text
        name = kind
    return "\n".join(lines)


def end_line(logs: dict[str, Any], state: TrainerState, first_step: int) -> str:
    """Return the line of the end of training.

    Trainer counts the clips of all steps, and the losses of its own. Both are left out if training was resumed.
    """
    epochs = f" ({logs['epoch']:.3g} epochs)" if "epoch" in logs else ""
    text = f"{_step(state)}{GAP}trained in {tqdm.format_interval(logs['train_runtime'])}{epochs}"
    if first_step:
        return f"{text}{GAP}resumed at step {first_step}"
    return f"{text}{GAP}mean loss {_loss(logs['train_loss'])}{GAP}{_rate(logs['train_samples_per_second'])} clips/s"


class LinePrinterCallback(PrinterCallback):
    """Prints compact lines; for `--disable_tqdm`."""

    def __init__(self, lines: LogLines):
        self.lines = lines

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.lines.begin(state)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs=None, **kwargs):
        if state.is_local_process_zero and logs is not None:
            self.lines.print(logs, state)


class LineProgressCallback(ProgressCallback):
    """Prints compact lines above the bar of the training. The time left is right in a resumed run, too."""

    training_bar: Bar | None
    prediction_bar: Bar | None

    def __init__(self, lines: LogLines, phase: str):
        super().__init__()
        self.lines = lines
        self.phase = phase

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.lines.begin(state)
        self.current_step = state.global_step
        if state.is_world_process_zero:
            if self.training_bar is not None:  # training was restarted with a smaller batch
                self.training_bar.close()
            self.training_bar = progress_bar(state.max_steps, self.phase, "step", done=state.global_step)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, eval_dataloader=None, **kwargs
    ):
        if state.is_world_process_zero and has_length(eval_dataloader):
            if self.prediction_bar is None:
                leave = self.training_bar is None
                self.prediction_bar = progress_bar(len(eval_dataloader), "Evaluating", "batch", leave=leave)
            self.prediction_bar.update()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None and logs is not None:
            self.lines.print(logs, state)


def use_log_lines(trainer: Trainer, phase: str = "Training") -> LogLines:
    """Replace the callback by which Trainer prints by one of compact lines.

    In a notebook, where Trainer shows a table, nothing is replaced.

    Args:
        trainer: a new one, to which no callback was added yet: its own is the last.
        phase: the description of the bar.
    """
    lines, callbacks = LogLines(), trainer.callback_handler.callbacks
    if type(callbacks[-1]) is ProgressCallback:
        callbacks[-1] = LineProgressCallback(lines, phase)
    elif type(callbacks[-1]) is PrinterCallback:
        callbacks[-1] = LinePrinterCallback(lines)
    return lines
