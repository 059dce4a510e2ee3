"""Export to CTranslate2: the converted model is run by CTranslate2 and faster-whisper on real speech."""

import math
import re
import sys
from pathlib import Path

import ctranslate2
import jiwer
import numpy as np
import pytest
import soundfile
import torch
from fake_hub import serve_hub
from hub import hub_environment
from models import make_multilingual, make_processor, make_whisper
from processes import run_there
from scripts import ROOT
from speech import RATE, audiofolder, tone
from spoken_digits import TEACHER, long_teacher, save_long_teacher

from askd_hf.arguments.export import ExportArguments
from askd_hf.commands.export import load_model
from askd_hf.data.audio_context import audio_context
from askd_hf.errors import UserError
from askd_hf.export import ctranslate2 as export
from askd_hf.export.comparison import agreement, input_features, load_clips, transformers_transcriber
from askd_hf.export.ctranslate2 import (
    check_extra,
    ctranslate2_transcriber,
    export_ctranslate2,
    faster_whisper_transcriber,
    transcribe_at_clip_context,
)
from askd_hf.models.generation_config import set_language
from askd_hf.models.loading import load_processor, load_whisper

SPEECH = ROOT / "examples" / "demo" / "data" / "studio"
SCRIPT = ROOT / "examples" / "export.py"


@pytest.fixture(scope="module")
def processor():
    return load_processor(str(TEACHER))


@pytest.fixture
def teacher():
    return load_whisper(str(TEACHER)).eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory, processor) -> Path:
    """The converted demo teacher."""
    directory = tmp_path_factory.mktemp("export") / "teacher"
    export_ctranslate2(load_whisper(str(TEACHER)), processor, directory)
    return directory


@pytest.fixture(scope="module")
def saved_long(tmp_path_factory) -> Path:
    return save_long_teacher(tmp_path_factory.mktemp("long") / "model")


@pytest.fixture(scope="module")
def long_exported(tmp_path_factory, saved_long) -> Path:
    """The converted demo teacher with 30 s windows, which faster-whisper requires."""
    directory = tmp_path_factory.mktemp("export") / "long"
    export_ctranslate2(*long_teacher(), directory)
    return directory


def test_the_converted_model_gives_the_tokens_of_transformers(exported, teacher, processor, clips):
    converted = ctranslate2.models.Whisper(str(exported), device="cpu")
    prompt = processor.tokenizer.convert_tokens_to_ids(["<|startoftranscript|>", "<|notimestamps|>"])
    count = 0
    for clip in clips:
        features = input_features(processor, clip)
        expected = teacher.generate(features, num_beams=1)[0].tolist()
        view = ctranslate2.StorageView.from_array(features.numpy())
        predicted = converted.generate(view, [prompt], beam_size=1)[0].sequences_ids[0]
        assert predicted == [token for token in expected if token != teacher.config.eos_token_id]
        count += len(predicted)
    assert count > 36  # three words per clip


def test_ctranslate2_takes_the_context_of_each_clip(exported, teacher, processor, clips, monkeypatch):
    """The texts are those of transformers at the same context, clip by clip."""
    clips = [clip[: len(clip) * (3 + i % 4) // 6] for i, clip in enumerate(clips)]
    positions = teacher.config.max_target_positions
    taken, generate = [], export._generate

    def spy(model, processor, features, positions):
        taken.append(features.shape[-1])
        return generate(model, processor, features, positions)

    monkeypatch.setattr(export, "_generate", spy)
    both = transcribe_at_clip_context(exported, processor, clips, positions)
    contexts = [min(2 * math.ceil(50 * (len(clip) / 16_000 + 0.64)), 300) for clip in clips]
    assert taken[2:] == [frames for context in contexts for frames in (300, context)]  # the first clip twice
    assert min(contexts) < 200
    assert both.window_texts == [*map(ctranslate2_transcriber(exported, processor, positions), clips)]
    expected = []
    for clip, frames in zip(clips, contexts, strict=True):
        features = input_features(processor, clip)[..., :frames]
        with audio_context(teacher.model.encoder, features.shape[-1]):
            tokens = teacher.generate(features, num_beams=1)
        expected += processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    assert both.clip_texts == expected
    assert both.window_seconds > 0 and both.clip_seconds > 0


def test_faster_whisper_hears_what_transformers_hears(long_exported, clips):
    model, processor = long_teacher()
    expected = [text.strip() for text in [*map(transformers_transcriber(model, processor), clips)]]
    # faster-whisper pads features with zeros instead of silence, so these clips fill the window
    padded = [np.pad(clip, (0, 30 * 16_000 - len(clip))) for clip in clips]
    predicted = [*map(faster_whisper_transcriber(long_exported, "en", "transcribe"), padded)]
    assert [text.strip() for text in predicted] == expected
    assert len({text for text in expected if len(text.split()) > 1}) > 6


def test_a_multilingual_model_is_asked_in_the_language_given(tmp_path):
    texts = set()
    for language in ("en", "zh"):
        model, processor = make_multilingual()
        model.save_pretrained(tmp_path / language)
        set_language(model, processor, language, "transcribe")
        clips = [np.random.default_rng(seed).normal(0, 0.1, 16_000).astype(np.float32) for seed in range(3)]
        expected = [*map(transformers_transcriber(model.eval(), processor), clips)]
        export_ctranslate2(model, processor, tmp_path / f"{language}-out")
        predicted = [*map(ctranslate2_transcriber(tmp_path / f"{language}-out", processor, 32), clips)]
        assert predicted == expected  # random weights: texts up to the token limit
        assert max(map(len, predicted)) > 8
        texts.add(tuple(predicted))
    assert len(texts) == 2


def test_8_bits_take_less_than_half_the_size_and_hear_nearly_the_same(
    tmp_path, exported, teacher, processor, speech, clips
):
    weights = {name: weight.clone() for name, weight in teacher.state_dict().items()}
    export_ctranslate2(teacher, processor, tmp_path / "int8", "int8")
    assert all(torch.equal(weight, weights[name]) for name, weight in teacher.state_dict().items())
    sizes = [(directory / "model.bin").stat().st_size for directory in (tmp_path / "int8", exported)]
    assert sizes[0] < sizes[1] / 2
    predicted = [text.strip() for text in [*map(ctranslate2_transcriber(tmp_path / "int8", processor, 64), clips)]]
    assert 100 * jiwer.wer([row["text"] for row in speech], predicted) <= 10


def test_a_planted_difference_is_reported(tmp_path, teacher, processor, speech, clips):
    expected = [*map(transformers_transcriber(teacher, processor), clips)]
    with torch.no_grad():  # simulates a broken conversion: two layers swapped
        layers = teacher.model.decoder.layers
        layers[0], layers[3] = layers[3], layers[0]
    export_ctranslate2(teacher, processor, tmp_path / "swapped")
    predicted = [*map(ctranslate2_transcriber(tmp_path / "swapped", processor, 64), clips)]
    result = agreement("ctranslate2", [row["clip"] for row in speech], expected, predicted, str)
    differing = [i for i in range(len(clips)) if expected[i].strip() != predicted[i].strip()]
    assert differing
    assert [clip for clip, _, _ in result.differing] == [speech[i]["clip"] for i in differing]
    wer = 100 * jiwer.wer([text.strip() for text in expected], [text.strip() for text in predicted])
    assert result.wer == pytest.approx(wer)
    first_line, *examples = str(result).splitlines()
    assert first_line == (
        f"ctranslate2: different text than transformers for {len(differing)} of 12 clips; WER against transformers "
        f"{wer:.2f} %"
    )
    assert examples[:3] == [
        f"  {speech[differing[0]]['clip']}",
        f"    transformers: {expected[differing[0]].strip()}",
        f"    ctranslate2:  {predicted[differing[0]].strip()}",
    ]


def test_the_report_counts_texts_and_shows_five():
    same = agreement("x", ["a", "b"], [" one", "two"], ["one", " two "], str.lower)
    assert str(same) == "x: same text as transformers for all 2 clips"
    names = [str(i) for i in range(8)]
    result = agreement("x", names, ["One two"] * 8, ["one two"] + ["one"] * 7, str.lower)
    assert len(result.differing) == 8  # the first differs in case only: a different text with the same words
    assert result.wer == pytest.approx(100 * 7 / 16)
    lines = str(result).splitlines()
    assert lines[0] == "x: different text than transformers for 8 of 8 clips; WER against transformers 43.75 %"
    assert len(lines) == 1 + 5 * 3 + 1
    assert lines[-1] == "  ... and 3 more"
    assert agreement("x", ["a"], [""], ["one"], str.lower).wer is None


@pytest.mark.slow
def test_the_script_converts_compares_and_overwrites_nothing(tmp_path, saved_long):
    arguments = ["--model", saved_long, "--output_dir", "out", "--dataset", SPEECH, "--max_samples", 6]
    done = run_there(SCRIPT, *arguments, directory=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "ctranslate2: same text as transformers for all 6 clips" in done.stdout
    # how many agree is another test's; here all six have been compared
    assert re.search(r"^faster-whisper: .* text .* transformers for (all|\d of) 6 clips", done.stdout, re.MULTILINE)
    assert "No word timestamps: " in done.stdout
    assert {file.name for file in tmp_path.iterdir()} == {"out"}  # no temporary directory is left
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"model.bin", "config.json", "vocabulary.json", "tokenizer.json", "preprocessor_config.json"} <= written
    before = (tmp_path / "out" / "model.bin").stat().st_mtime_ns
    done = run_there(SCRIPT, *arguments, directory=tmp_path)
    assert done.returncode == 2
    assert (
        done.stderr.strip().splitlines()[-1]
        == "error: --output_dir out already exists. Use another directory, or remove it first"
    )
    assert (tmp_path / "out" / "model.bin").stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_model_of_the_hub_is_exported_and_one_with_other_windows_compared_in_ctranslate2_alone(tmp_path, exported):
    model = tmp_path / "hub" / "models" / "me" / "student"
    model.parent.mkdir(parents=True)
    model.symlink_to(TEACHER)
    with serve_hub(tmp_path / "hub") as hub:
        done = run_there(
            SCRIPT,
            *("--model", "me/student", "--dataset", SPEECH, "--max_samples", 2),
            directory=tmp_path,
            environment=hub_environment(hub, tmp_path / "home", None),
        )
    assert done.returncode == 0, done.stderr
    assert "ctranslate2: same text as transformers for all 2 clips" in done.stdout
    assert (
        "faster-whisper can't run this model: it pads all audio to 30 s, and the model's window is 3 s" in done.stdout
    )
    written = tmp_path / "student-ctranslate2"
    assert (written / "model.bin").read_bytes() == (exported / "model.bin").read_bytes()


def test_clips_that_are_silent_broken_or_too_long_are_named_and_left_out(tmp_path, caplog):
    folder = audiofolder(tmp_path / "speech", ["one", "two", "three", "four", "five"])
    soundfile.write(folder / "audio" / "1.wav", np.zeros(RATE), RATE)
    (folder / "audio" / "2.wav").write_bytes(b"broken")
    soundfile.write(folder / "audio" / "3.wav", tone(seconds=3.1), RATE)
    clips = load_clips(str(folder), None, "train", 5, 3.0)
    assert [(clip.name, clip.text) for clip in clips] == [("audio/0.wav", "one"), ("audio/4.wav", "five")]
    np.testing.assert_array_equal(clips[1].wave, soundfile.read(folder / "audio" / "4.wav", dtype="float32")[0])
    for reason in ("audio/1.wav: silent", "audio/2.wav: not an audio file", "1 longer than the window of 3 s"):
        assert reason in caplog.text
    assert "--on_bad_audio" not in caplog.text
    timed = audiofolder(tmp_path / "timed", ["<|0.00|> one<|0.50|>"])
    assert [clip.text for clip in load_clips(str(timed), None, "train", 1, 3.0)] == ["one"]
    with pytest.raises(UserError, match=r"1 of 1 clips are filtered out \(1 longer .* so no clip is left"):
        load_clips(str(folder), None, "train", 1, 0.1)


def test_without_the_extra_the_user_is_told_what_to_install(monkeypatch):
    check_extra()
    monkeypatch.setitem(sys.modules, "faster_whisper", None)
    with pytest.raises(UserError, match=r"pip install 'askd-hf\[export\]'"):
        check_extra()


def test_timestamps_that_nobody_asked_for_are_suppressed():
    """`generate` continues after them otherwise, and never ends if they don't increase."""
    processor = make_processor()
    processor.tokenizer.add_tokens([f"<|{0.02 * i:.2f}|>" for i in range(51)])
    model = make_whisper(processor).eval()
    ids = processor.tokenizer.convert_tokens_to_ids
    tokens = ids([*"abc", "<|0.40|>", "<|0.40|>", *"de", "<|endoftext|>"])

    def write_tokens(_, args, kwargs, output):
        start = output.past_key_values.get_seq_length() - output.logits.shape[1] - 1
        for i in range(output.logits.shape[1]):
            output.logits[:, i] = 0.0  # "a" is the first of the most probable tokens
            output.logits[:, i, tokens[min(max(start + i, 0), len(tokens) - 1)]] = 50.0
        return output

    model.register_forward_hook(write_tokens, with_kwargs=True)
    assert transformers_transcriber(model, processor)(tone()) == "abcaade"


def test_the_language_is_set_without_speech_to_compare_on(tmp_path):
    """Formats have a default language; whisper.cpp's command is printed with it."""
    model, processor = make_multilingual()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    options = dict(model=str(tmp_path / "model"), output_dir=str(tmp_path / "out"))
    model, processor = load_model(ExportArguments(language="Chinese", **options))
    assert model.generation_config.language == "zh"
    assert processor.tokenizer.convert_tokens_to_ids("<|zh|>") in processor.tokenizer.prefix_tokens
    with pytest.raises(UserError, match="--language must be one of en, zh, got 'fr'"):
        load_model(ExportArguments(language="fr", **options))
    model, _ = load_model(ExportArguments(**options))
    assert getattr(model.generation_config, "language", None) is None
    with pytest.raises(UserError, match="--language is required"):
        load_model(ExportArguments(task="translate", **options))
    set_language(model, processor, "zh", "translate")
    model.save_pretrained(tmp_path / "model")
    for given, expected in (
        (dict(language="en"), ("en", "translate")),
        (dict(task="transcribe"), ("zh", "transcribe")),
        ({}, ("zh", "translate")),
    ):
        arguments = ExportArguments(**options, **given)
        model, _ = load_model(arguments)
        assert (model.generation_config.language, model.generation_config.task) == expected
        assert arguments.task == expected[1]
