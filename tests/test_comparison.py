"""The evaluation after a run uses the decoding settings of the evaluations during training."""

import json

import pytest
from scripts import run_here

from askd_hf.evaluation import Results


@pytest.mark.parametrize("beams", ["option", "generation config"])
def test_the_last_evaluation_and_the_comparison_agree(monkeypatch, capsys, tmp_path, teacher_dir, speech_dir, beams):
    command = (
        f"--teacher {teacher_dir} --dataset {speech_dir} --eval_splits validation --output_dir {tmp_path / 'run'}"
    )
    more = (
        "--use_cpu --max_steps 2 --eval_strategy steps --eval_steps 2 --learning_rate 1e-2 --generation_max_length 9"
    )
    if beams == "option":
        more += " --generation_num_beams 3"
    else:  # overrides the model's generation config
        settings = json.loads((teacher_dir / "generation_config.json").read_text())
        (tmp_path / "settings").mkdir()
        file = tmp_path / "settings" / "generation_config.json"
        file.write_text(json.dumps(settings | {"num_beams": 3, "repetition_penalty": 2.0}))
        more += f" --generation_config {file.parent}"
    ended = run_here(monkeypatch, capsys, *command.split(), *more.split())
    assert ended.returncode == 0 and "no comparison" not in ended.stderr, ended.stderr
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    results = Results.load(tmp_path / "run" / "evaluation" / "results.json")
    assert (results.settings["num_beams"], results.settings["generation_max_length"]) == (3, 9)
    rates = [(row["eval_wer"], row["eval_cer"]) for row in log if "eval_wer" in row]
    student = results.sets[0].scores["student"]
    assert rates[-1] == pytest.approx((student.wer, student.cer))
    assert "| `num_beams` | 3 |" in (tmp_path / "run" / "README.md").read_text()
    assert "num_beams 3" in ended.stdout
