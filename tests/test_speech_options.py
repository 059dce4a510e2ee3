"""What the options of the data do to the clips that a run is trained on, from the parsed options on."""

import json

import pytest
from models import make_whisper
from scripts import distill_options as options
from scripts import run_here
from speech import audiofolder
from transformers import GenerationConfig

from askd_hf.arguments import DataArguments, MixArguments
from askd_hf.arguments.parser import parse_args
from askd_hf.config import ASKDConfig
from askd_hf.data import SpeechCollator
from askd_hf.training.datasets import training_speech
from askd_hf.training.run_settings import config_settings

TEXTS = ["A BC, DE", "ab cd ef ab", "a"]


@pytest.fixture
def chosen(tmp_path, processor):
    """The transcripts of the training clips with some options."""
    speech = audiofolder(tmp_path / "speech", TEXTS)
    model = make_whisper(processor)

    def texts(*more: str) -> list[str]:
        given = ["--dataset", str(speech), *more]
        data, mix, config = parse_args(
            (DataArguments, MixArguments, ASKDConfig), [*given, "--output_dir", str(tmp_path / "run"), "--use_cpu"]
        )
        return training_speech(data, mix, config, SpeechCollator(processor, model.config), False)["text"][:]

    return texts


def test_transcripts_are_changed_as_asked(chosen):
    assert chosen() == TEXTS
    assert chosen("--text_case", "lower") == ["a bc, de", "ab cd ef ab", "a"]
    assert chosen("--text_normalizer", "basic") == ["a bc de", "ab cd ef ab", "a"]


def test_clips_are_kept_by_the_length_of_their_labels(chosen, processor):
    lengths = [len(processor.tokenizer(text).input_ids) for text in TEXTS]
    shortest, middle, longest = sorted(lengths)
    assert shortest < middle < longest
    assert chosen("--min_label_length", str(middle)) == [t for t, n in zip(TEXTS, lengths, strict=True) if n >= middle]
    assert chosen("--max_label_length", str(middle)) == [t for t, n in zip(TEXTS, lengths, strict=True) if n <= middle]


def test_a_student_of_clips_without_speech_may_write_nothing(monkeypatch, capsys, tmp_path, speech_dir, processor):
    """OpenAI's configs suppress the end of text as the first token."""
    file = tmp_path / "teacher"
    make_whisper(processor).save_pretrained(file)
    processor.save_pretrained(file)
    settings = json.loads((file / "generation_config.json").read_text())
    end = settings["eos_token_id"]
    (file / "generation_config.json").write_text(json.dumps(settings | {"begin_suppress_tokens": [3, end]}))
    for more, expected in (([], [3, end]), (["--no_speech_dataset", "synthetic"], [3])):
        run = tmp_path / f"run{len(more)}"
        ended = run_here(monkeypatch, capsys, *options(file, speech_dir, run, "--max_steps", 1, *more))
        assert ended.returncode == 0, ended.stderr
        assert GenerationConfig.from_pretrained(run).begin_suppress_tokens == expected


def test_grouping_by_length_depends_on_the_clips_of_a_process(tmp_path):
    def settings(batch: int, accumulation: int, **changes) -> dict:
        given = dict(output_dir=str(tmp_path), use_cpu=True, train_sampling_strategy="group_by_length") | changes
        sizes = dict(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
        return config_settings(ASKDConfig(**given, **sizes))

    assert settings(4, 1) == settings(2, 2) and settings(4, 1)["clips_of_a_process"] == 4
    assert settings(4, 1) != settings(4, 2)
    assert "clips_of_a_process" not in settings(4, 1, train_sampling_strategy="random")
