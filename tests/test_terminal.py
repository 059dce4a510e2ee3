"""What a run shows in a terminal and writes into a log file."""

import copy
import io
import logging
import re
from contextlib import redirect_stderr
from types import SimpleNamespace

import numpy as np
import pytest
from scripts import distill_options, run_here, steps_printed
from training import Clips, make_trainer
from transformers import ProgressCallback, TrainerCallback, WhisperForConditionalGeneration
from transformers.models.whisper.tokenization_whisper import _decode_asr

from askd_hf import progress
from askd_hf.commands.terminal import readable_terminal
from askd_hf.progress import ProgressLines, hide_datasets_bars, progress_bar
from askd_hf.training.log_lines import LogLines, evaluation_line, step_line

WEIGHTS = ("Loading weights", "Writing model shards")
STEP = re.compile(r"step +\d+/6  loss [\d.]{5}  teacher [01]\.\d\d  self 0\.\d\d  lr \d\.\de[-+]\d\d  +[\d.]+ clips/s")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def bars(self) -> list[str]:
        """The descriptions of the bars, in the order in which they appeared."""
        return list(dict.fromkeys(re.findall(r"([A-Z][\w ]+): +\d+%\|", self.getvalue())))


def run_of_all_phases(monkeypatch, capsys, teacher_dir, speech_dir, folder, *more):
    caches = [
        "--encoder_cache_dir",
        folder / "encoder",
        "--teacher_cache_dir",
        folder / "labels",
        "--teacher_top_k",
        5,
    ]
    more = ["--eval_splits", "validation", "train", "--logging_steps", 1, "--max_steps", 6, *caches, *more]
    ended = run_here(monkeypatch, capsys, *distill_options(teacher_dir, speech_dir, folder / "run", *more))
    assert ended.returncode == 0, ended.stderr
    return ended


def test_a_terminal_shows_one_bar_per_phase(monkeypatch, capsys, tmp_path, teacher_dir, speech_dir):
    with redirect_stderr(Terminal()) as terminal:
        ended = run_of_all_phases(monkeypatch, capsys, teacher_dir, speech_dir, tmp_path)
    checks = ["Checking training clips", "Checking evaluation clips"]
    phases = [*checks, "Encoder outputs", "Soft labels", "Training", "Evaluating", "Transcribing", "Scoring"]
    assert terminal.bars() == phases
    for phase in phases:
        assert phase == "Evaluating" or re.search(rf"{phase}: 100%.*00:00<?", terminal.getvalue()), phase
    assert not any(name in terminal.getvalue() for name in WEIGHTS)
    lines = ended.stdout.splitlines()
    assert sum(bool(STEP.fullmatch(line)) for line in lines) == len(steps_printed(ended.stdout)) == 6
    evaluated = [line for line in lines if re.fullmatch(r"step \d/6  WER validation \d+\.\d %  \w+ \d+\.\d %", line)]
    assert len(evaluated) == 2  # after each of two epochs, each with both splits
    assert (
        len([line for line in lines if re.match(r"step 6/6  trained in 00:\d\d \(1\.5 epochs\)  mean loss", line)])
        == 1
    )
    assert "{'" not in ended.stdout


def without_speed(output: str) -> list[str]:
    """The lines of the steps, without what depends on the time."""
    lines = [line for line in output.splitlines() if line.startswith("step ")]
    return [re.sub(r"  +[\d.]+ clips/s|trained in \S+", "", line) for line in lines]


def test_a_log_file_has_the_same_lines_and_no_bars(monkeypatch, capsys, tmp_path, teacher_dir, speech_dir):
    bars, no_tqdm = (
        run_of_all_phases(monkeypatch, capsys, teacher_dir, speech_dir, tmp_path / value, "--disable_tqdm", value)
        for value in ("False", "True")
    )
    assert without_speed(bars.stdout) == without_speed(no_tqdm.stdout) and len(without_speed(bars.stdout)) == 9
    for ended in (bars, no_tqdm):
        assert "\r" not in ended.stdout + ended.stderr and "%|" not in ended.stderr
        assert not any(name in ended.stderr for name in WEIGHTS)
        assert "Soft labels: 16/16, 00:00 taken" in ended.stderr
    assert "Training: 6/6, " in bars.stderr and "Training:" not in no_tqdm.stderr


def test_a_resumed_run_continues_its_bar(monkeypatch, capsys, tmp_path, teacher_dir, speech_dir):
    options = distill_options(teacher_dir, speech_dir, tmp_path, "--max_steps", 4, "--save_steps", 2)
    options += ["--save_strategy", "steps", "--logging_steps", "1"]
    assert run_here(monkeypatch, capsys, *options).returncode == 0
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "checkpoint-4" / "trainer_state.json").unlink()
    with redirect_stderr(Terminal()) as terminal:
        ended = run_here(monkeypatch, capsys, *options, "--resume_from_checkpoint", "last")
    assert steps_printed(ended.stdout) == [3, 4]
    assert "Training:  50%" in terminal.getvalue() and "Training:   0%" not in terminal.getvalue()
    assert re.search(r"^step 4/4  trained in 00:\d\d \(1 epochs\)  resumed at step 2$", ended.stdout, re.MULTILINE)


def test_messages_are_printed_above_the_bar_and_all_is_restored(teacher_dir):
    def load() -> str:
        with redirect_stderr(Terminal()) as terminal:
            WhisperForConditionalGeneration.from_pretrained(teacher_dir)
        return terminal.getvalue()

    logger = logging.getLogger("askd_hf.somewhere")
    handlers = list(logging.getLogger("askd_hf").handlers)
    assert "Loading weights" in load()
    with redirect_stderr(Terminal()) as terminal, readable_terminal():
        assert load() == ""
        with progress_bar(4, "Phase") as bar:
            bar.update(2)
            logger.warning("something happened")
            assert bar.n == 2
    shown = re.split(r"[\r\n]", terminal.getvalue())
    assert "something happened" in shown and any(line.startswith("Phase:  50%") for line in shown)
    assert "Loading weights" in load()
    assert logging.getLogger("askd_hf").handlers == handlers


def test_what_transformers_says_of_its_own_code_is_hidden(teacher_dir):
    import torch
    from transformers.generation import utils

    def generate() -> str:
        utils.logger.warning_once.cache_clear()
        model = WhisperForConditionalGeneration.from_pretrained(teacher_dir)
        features = torch.zeros(1, model.config.num_mel_bins, 2 * model.config.max_source_positions)
        with redirect_stderr(Terminal()) as terminal, readable_terminal():
            model.generate(features, max_length=8, suppress_tokens=[1])
            utils.logger.warning("something else")
        return terminal.getvalue()

    shown = generate()
    assert "something else" in shown and "is deprecated and will be removed" not in shown
    assert utils.logger.filters == []


def test_what_the_trainer_and_the_tokenizer_say_of_tokens_is_hidden(tmp_path, processor, student, caplog, monkeypatch):
    tokens = np.array([processor.tokenizer("abc").input_ids])
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)

    def warn() -> str:
        caplog.clear()
        student.config.bos_token_id = processor.tokenizer.bos_token_id + 1
        make_trainer(tmp_path, None, student, processor=processor, preset="ce", max_steps=1).train()
        _decode_asr(
            processor.tokenizer,
            [{"tokens": tokens}],
            return_timestamps=True,
            return_language=False,
            time_precision=0.02,
        )
        return caplog.text

    shown = warn()
    assert "new PAD/BOS/EOS tokens" in shown and "did not predict an ending timestamp" in shown
    with readable_terminal():
        shown = warn()
    assert "PAD/BOS/EOS" not in shown and "ending timestamp" not in shown


def test_the_bars_of_datasets_are_hidden_within_a_phase_only():
    import datasets

    with hide_datasets_bars():
        assert datasets.are_progress_bars_disabled()
    assert not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()  # by the user
    with hide_datasets_bars():
        pass
    assert datasets.are_progress_bars_disabled()
    datasets.enable_progress_bars()


def test_a_log_file_gets_a_line_a_minute(monkeypatch, capsys):
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress_bar(100, "Phase", done=10) as lines:
        assert isinstance(lines, ProgressLines)
        for _ in range(90):
            now[0] += 2.0
            lines.update()
    assert capsys.readouterr().err.splitlines() == [
        "Phase: 40/100, 02:00 left",
        "Phase: 70/100, 01:00 left",
        "Phase: 100/100, 03:00 taken",
    ]
    with progress_bar(100, "Phase", leave=False) as lines:
        lines.update(3)
    assert capsys.readouterr().err == ""


def test_only_the_first_process_shows_a_bar(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with redirect_stderr(Terminal()) as terminal, progress_bar(2, "Phase") as bar:
        bar.update()
    assert terminal.getvalue() == ""


class TableCallback(TrainerCallback):
    """Stands for that of notebooks, which needs IPython."""


class OwnCallback(ProgressCallback):
    """A user's."""


def test_only_trainers_own_callbacks_are_replaced(monkeypatch, tmp_path, teacher, student):
    def kinds(**changes) -> set[str]:
        trainer = make_trainer(tmp_path, teacher, student, **changes)
        return {type(callback).__name__ for callback in trainer.callback_handler.callbacks}

    ours, defaults = {"LineProgressCallback", "LinePrinterCallback"}, {"ProgressCallback", "PrinterCallback"}
    assert kinds(disable_tqdm=False) & (ours | defaults) == {"LineProgressCallback"}
    assert kinds(disable_tqdm=True) & (ours | defaults) == {"LinePrinterCallback"}
    monkeypatch.setattr("transformers.trainer.DEFAULT_PROGRESS_CALLBACK", TableCallback)
    assert kinds(disable_tqdm=False) & (ours | defaults | {"TableCallback"}) == {"TableCallback"}
    monkeypatch.setattr("transformers.trainer.DEFAULT_PROGRESS_CALLBACK", OwnCallback)
    assert kinds(disable_tqdm=False) & (ours | defaults | {"OwnCallback"}) == {"OwnCallback"}


def test_python_code_gets_trainers_bars_and_a_line_for_its_own_logs(capsys, tmp_path, teacher, student):
    evaluation = {name: Clips(student.config, clips=4, seed=seed) for seed, name in enumerate(("a", "b_c"))}
    changes = dict(eval_strategy="steps", eval_steps=2, max_steps=2, predict_with_generate=False)
    trainer = make_trainer(tmp_path, teacher, student, evaluation, disable_tqdm=False, **changes)
    with redirect_stderr(Terminal()) as terminal:
        trainer.train()
        out = capsys.readouterr().out
    assert re.search(r"^step 2/2  eval loss a \d\.\d{3}  b_c \d\.\d{3}$", out, re.MULTILINE)
    assert terminal.bars() == ["Training", "Evaluating"]
    trainer.evaluate()  # outside of training Trainer prints nothing, but shows a bar
    assert capsys.readouterr().out == ""
    quiet = make_trainer(tmp_path, teacher, student, evaluation, **changes)
    quiet.log({"mine": 1.5})
    assert capsys.readouterr().out == "{'mine': 1.5, 'epoch': 0}\n"
    quiet.evaluate()
    assert re.fullmatch(r"step 0  eval loss a \d\.\d{3}  b_c \d\.\d{3}\n", capsys.readouterr().out)


def at(step: int, steps: int) -> SimpleNamespace:
    return SimpleNamespace(global_step=step, max_steps=steps)


def test_lines_are_aligned_and_not_wide():
    logs = dict(loss=0.7012, teacher_weight=0.8249, self_weight=0.0, learning_rate=1.649e-3, samples_per_second=195.4)
    line = step_line(logs, at(100, 450))
    assert line == "step 100/450  loss 0.701  teacher 0.82  self 0.00  lr 1.6e-03   195 clips/s"
    others = [dict(loss=10.863, samples_per_second=8.31), dict(loss=123.4, samples_per_second=29.53)]
    assert {len(step_line(logs | other, at(5, 450))) for other in others} == {len(line)}
    # the longest run, with rows that were skipped, and without a teacher
    assert len(step_line(logs | {"skipped_rows": 12345}, at(100_000, 450_000))) <= 100
    assert step_line(dict(loss=0.00123, learning_rate=0.0), at(1, 10)) == "step  1/10  loss 1.2e-03  lr 0.0e+00"


def test_many_splits_are_several_lines():
    names = ["test", "known", *(f"split-{number}" for number in range(20))]
    logs = [
        {f"eval_{name}_wer": 17.42 - number, f"eval_{name}_loss": 1.0, f"eval_{name}_runtime": 1.0}
        for number, name in enumerate(names)
    ]
    assert evaluation_line(logs[:2], at(450, 450)) == "step 450/450  WER test 17.4 %  known 16.4 %"
    lines = evaluation_line(logs, at(450, 450)).splitlines()
    assert len(lines) > 2 and max(map(len, lines)) <= 100
    assert all(f"{name} {17.42 - number:.1f} %" in "\n".join(lines) for number, name in enumerate(names))
    only = [{"eval_wer": 17.42, "eval_runtime": 1.0}]
    assert evaluation_line(only, at(9, 10)) == "step  9/10  WER 17.4 %"
    only[0] |= {"eval_loops": 2.0, "eval_capped_wer": 12.31}
    assert evaluation_line(only, at(9, 10)) == "step  9/10  WER 17.4 % (2 loops, capped 12.3 %)"


def test_what_is_printed_is_not_what_is_logged(capsys, tmp_path, teacher, student):
    """Every value stays in the history."""
    trainer = make_trainer(tmp_path, teacher, student, max_steps=2)
    trainer.train()
    row, *_ = trainer.state.log_history
    assert {"loss", "ce_loss", "teacher_loss", "teacher_ce", "top1_agreement", "grad_norm", "epoch"} <= row.keys()
    assert "ce_loss" not in capsys.readouterr().out


def test_splits_are_printed_even_if_the_last_one_fails(capsys):
    lines, state = LogLines(), at(1, 2)
    with pytest.raises(RuntimeError), lines.one_evaluation(state):
        lines.print({"eval_a_wer": 5.0, "eval_a_runtime": 1.0}, copy.copy(state))
        raise RuntimeError
    assert capsys.readouterr().out == "step 1/2  WER a 5.0 %\n"
