"""The evaluation after a run uses the decoding settings of the evaluations during training."""

import json

import pytest
from models import make_multilingual
from scripts import run_here
from speech import write_speech

from askd_hf import ASKDConfig
from askd_hf.arguments import SpeechSource
from askd_hf.data import Limits, filter_invalid_clips, load_speech_dataset
from askd_hf.evaluation import Results, comparison
from askd_hf.evaluation.comparison import EvalSplit, evaluate_models


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


def test_speed_is_measured_in_the_language_of_the_set(monkeypatch, tmp_path):
    """The sets of other languages are transcribed before."""
    languages = []

    def measure(models, *args, **kwargs):
        languages.append({model.generation_config.language for model in models.values()})
        return original(models, *args, **kwargs)

    original = comparison.measure_speed
    monkeypatch.setattr(comparison, "measure_speed", measure)
    model, processor = make_multilingual()
    speech = str(write_speech(tmp_path / "speech", clips=2))
    clips = filter_invalid_clips(load_speech_dataset(speech, None, "train"), None, Limits(1.0), on_bad_audio="error")
    splits = {
        code: EvalSplit(SpeechSource(speech, None, "train", code, "transcribe"), clips, 0) for code in ("zh", "en")
    }
    config = ASKDConfig(output_dir=str(tmp_path / "run"), use_cpu=True, generation_max_length=6)
    results = evaluate_models({"student": ("s", model, processor)}, splits, "auto", config)
    assert {one.language for one in results.sets} == {"zh", "en"}
    assert languages == [{"zh"}] and results.speed.set == "zh"
