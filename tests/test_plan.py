"""The planner: sizes and costs of candidates, and which one it proposes."""

import re

import pytest
import torch
from models import make_processor, make_whisper
from scripts import ROOT, run_here
from speech import write_speech
from transformers import GenerationConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperProcessor

from askd_hf.commands import plan as commands
from askd_hf.data import load_speech_dataset
from askd_hf.data.columns import replace_column
from askd_hf.errors import UserError
from askd_hf.evaluation import planning
from askd_hf.evaluation.planning import (
    Candidate,
    Costs,
    candidates,
    measure_costs,
    random_model,
    reaching,
    windows_up_to,
)

WINDOWS = (10, 8, 6, 5, 4, 3, 2)


@pytest.fixture
def config():
    """Of a teacher with a window of 10 s, 4 encoder and 4 decoder layers."""
    return make_whisper(make_processor(), max_source_positions=500, encoder_layers=4, vocab_size=9000).config


@pytest.fixture
def costs() -> Costs:
    """Per second of audio 1 ms of features, 2 ms of convolutions and 10 ms per encoder layer."""
    windows = dict.fromkeys(WINDOWS)
    return Costs(
        features={window: 0.001 * window for window in windows},
        encoder={window: (0.002 + 4 * 0.01) * window for window in windows},
        stem={window: 0.002 * window for window in windows},
        decoder=dict.fromkeys(windows, (0.001, 0.003)),
        cross_attention={window: (0.0, 0.0005 * window) for window in windows},
        projection=1e-6,
        encoder_layers=4,
        tokens=20,
    )


def test_costs_add_up(costs):
    assert costs.of(Candidate(10, 9000, 4, 4)) == pytest.approx(0.01 + 0.42 + 0.02 + 20 * (0.001 + 4 * 0.003 + 0.009))
    assert costs.of(Candidate(2, 1000, 2, 1)) == pytest.approx(0.002 + 0.044 + 0.001 + 20 * (0.001 + 0.003 + 0.001))


def test_parameters_are_those_of_the_model(config, costs):
    found = candidates(config, costs, vocabularies=dict.fromkeys(WINDOWS, 300))
    assert {shape.window for shape in found} == set(WINDOWS)
    assert {shape.vocabulary for shape in found} == {300, 3_000, 6_000, 9_000}
    for shape in found[::7]:
        changes = dict(max_source_positions=50 * shape.window, vocab_size=shape.vocabulary)
        changes |= dict(encoder_layers=shape.encoder_layers, decoder_layers=shape.decoder_layers)
        model = make_whisper(make_processor(), **config.to_dict() | changes)
        assert shape.parameters == model.num_parameters()
    whole = next(s for s in found if (s.window, s.vocabulary, s.encoder_layers, s.decoder_layers) == (10, 9000, 4, 2))
    assert whole.speedup == pytest.approx(costs.of(Candidate(10, 9000, 4, 4)) / costs.of(whole))


def test_what_loses_least_comes_first(config, costs):
    durations = [1.5] * 50 + [4.5] * 49 + [9.0]
    found = candidates(config, costs, durations, vocabularies=dict.fromkeys(WINDOWS, 300))
    (best, *_) = good = reaching(found, speedup=2.0, max_parameters=None)
    assert all(shape.speedup >= 2.0 for shape in good)
    # one clip in a hundred may be too long; the whole encoder, the most tokens, then decoder layers, then the window
    assert (best.encoder_layers, best.fitting) == (4, 0.99)
    alike = [shape for shape in good if shape.encoder_layers == 4 and shape.fitting >= 0.99]
    assert best.vocabulary == max(shape.vocabulary for shape in alike if shape.decoder_layers > 1)
    alike = [shape for shape in alike if shape.vocabulary == best.vocabulary]
    assert best.decoder_layers == max(shape.decoder_layers for shape in alike) >= 2
    assert best.window == max(shape.window for shape in alike if shape.decoder_layers == best.decoder_layers)
    # 1 decoder layer comes after all with more, also after those with fewer encoder layers
    layers = [(shape.decoder_layers > 1, shape.encoder_layers) for shape in good]
    assert layers == sorted(layers, reverse=True) and set(layers) >= {(True, 2), (False, 4)}
    least = reaching(found, None, max_parameters=best.parameters / 1e6)
    assert all(shape.parameters <= best.parameters for shape in least)


def test_a_target_out_of_reach_says_what_is_within(config, costs):
    found = candidates(config, costs)
    fastest = max(shape.speedup for shape in found)
    with pytest.raises(UserError, match=rf"the fastest reaches {fastest:.1f}x, the smallest has 0\.\d M parameters"):
        reaching(found, speedup=1000.0, max_parameters=None)


def test_measured_costs_grow_with_the_window(config):
    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=10)
    model = random_model(config)
    layers = model.model.encoder.layers, model.model.decoder.layers
    costs = measure_costs(model, extractor, (10, 2), batch_size=2, tokens=5)
    assert costs.encoder[10] > costs.encoder[2] > 0 and costs.stem[10] < costs.encoder[10]
    assert costs.features[10] > costs.features[2] and costs.projection > 0
    assert model.model.encoder.layers is layers[0] and model.model.decoder.layers is layers[1]  # put back


def test_a_large_teacher_is_measured_by_two_of_its_layers(monkeypatch, capsys, tmp_path):
    """Neither built nor run as a whole: large-v3 takes a minute per clip on one core."""
    processor = WhisperProcessor(WhisperFeatureExtractor(feature_size=8, chunk_length=10), make_processor().tokenizer)
    changes = dict(max_source_positions=500, encoder_layers=12, decoder_layers=12, vocab_size=2000)
    make_whisper(make_processor(), **changes).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    built = []

    class Whisper(WhisperForConditionalGeneration):
        def __init__(self, config):
            layers = config.encoder_layers, config.decoder_layers
            built.append((*layers, config.max_source_positions, torch.empty(0).device.type))
            super().__init__(config)

    monkeypatch.setattr(planning, "WhisperForConditionalGeneration", Whisper)
    monkeypatch.setattr(planning, "LONGEST_PASS", 0.0)
    best = commands.plan(
        commands.parse_args(commands.OPTIONS, ["--teacher", str(tmp_path), "--max_parameters", "9"])[0]
    )
    assert "The teacher takes too long for this: its time is the sum of its parts" in capsys.readouterr().out
    student = (best.encoder_layers, best.decoder_layers, 50 * best.window, "cpu")
    assert built == [(2, 2, 500, "cpu"), (12, 12, 500, "meta"), student]  # its weights are counted without memory


def test_parts_of_few_layers_add_up_to_the_whole(config, monkeypatch):
    """Seconds are faked: a layer of the encoder takes 1 per second of audio, one of the decoder 0.1 per token."""
    config.encoder_layers, config.decoder_layers = 12, 12

    def run_encoder(encoder, inputs):
        clock[0] += 2.0 + len(encoder.layers) * inputs.shape[-1] / 100

    def decode(model, hidden, tokens):
        clock[0] += len(model.model.decoder.layers) * (0.01 * hidden.shape[1] + 0.1 * tokens) + 0.02 * tokens

    clock = [0.0]
    monkeypatch.setattr(planning, "run_encoder", run_encoder)
    monkeypatch.setattr(planning, "decode", decode)
    monkeypatch.setattr(planning, "extract_features", lambda *args: None)
    monkeypatch.setattr(planning.time, "perf_counter", lambda: clock[0])
    model = random_model(config, few_layers=True)
    costs = measure_costs(model, WhisperFeatureExtractor(feature_size=8, chunk_length=10), (10, 2), 1, tokens=20)
    for window, encoder, decoder in ((10, 12, 12), (2, 6, 3)):
        whole = 2.0 + encoder * window + decoder * (0.5 * window + 0.1 * 20) + 0.02 * 20
        assert costs.of(Candidate(window, 9000, encoder, decoder)) == pytest.approx(whole)


def test_a_long_call_is_timed_once(monkeypatch):
    clock = iter([0.0, 2.0, 10.0, 10.5])
    monkeypatch.setattr(planning.time, "perf_counter", lambda: next(clock))
    assert planning._seconds(lambda: None) == 2.0


@pytest.fixture
def teacher_dir(tmp_path, config):
    processor = WhisperProcessor(WhisperFeatureExtractor(feature_size=8, chunk_length=10), make_processor().tokenizer)
    directory = tmp_path / "teacher"
    WhisperForConditionalGeneration(config).save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


def test_the_command_prints_students_and_how_to_make_the_first(monkeypatch, capsys, tmp_path, teacher_dir):
    speech = write_speech(tmp_path / "speech", clips=5)
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    arguments = ("--teacher", teacher_dir, "--dataset", speech, "--max_parameters", 0.05, "--threads", 1)
    ended = run_here(monkeypatch, capsys, *arguments, file=ROOT / "examples" / "plan.py")
    assert ended.returncode == 0, ended.stderr
    assert threads[0] == 1
    assert "clips that fit, %" in ended.stdout
    command = ended.stdout.strip().splitlines()[-1]
    assert command.startswith(f"askd-hf distill --teacher {teacher_dir} --decoder_layers 4 ")
    assert "--vocabulary auto" in command and f" --dataset {speech} --encoder_cache_dir" in command
    caches, training = command.split(" --encoder_cache_dir ")[1].split(" --learning_rate ")
    assert re.fullmatch(r"cache/encoder --teacher_cache_dir cache/labels-auto-\d+s", caches)
    assert training == "5e-5 --num_train_epochs 5"
    assert "misses" not in ended.stdout  # a size is no speed


@pytest.mark.parametrize("share, measured, missed", [(1.0, 1, False), (0.9, 2, False), (0.01, 1, True)])
def test_a_student_that_misses_the_target_is_followed_by_a_faster_one(
    monkeypatch, capsys, teacher_dir, costs, share, measured, missed
):
    """Measured speed is `share` of the expected one. The command is for the first that reaches the target."""
    tried = []

    def measure(config, extractor, shape, batch_size, costs):
        tried.append(shape)
        return share ** (len(tried) == 1 or missed) * shape.speedup

    monkeypatch.setattr(commands, "measure", lambda *args: costs)
    monkeypatch.setattr(commands, "measured_speedup", measure)
    best = commands.plan(commands.parse_args(commands.OPTIONS, ["--teacher", str(teacher_dir), "--speedup", "2"])[0])
    printed = capsys.readouterr().out
    assert f"on {torch.get_num_threads()} thread" in printed
    assert best is tried[-1] and f"The student with {best.window} s, {best.vocabulary:,} tokens" in printed
    assert f"--decoder_layers {best.decoder_layers} --" in printed.splitlines()[-1]
    assert ("This misses 2x" in printed) == missed
    assert len(tried) == measured  # with 0.01 none is expected to be 200 times as fast
    assert all(shape.speedup >= 2 / share for shape in tried[1:])


@pytest.mark.parametrize("layers, rate", [(1, "1e-4"), (2, "1e-4"), (3, "5e-5"), (4, "5e-5")])
def test_a_deeper_student_gets_a_lower_learning_rate(teacher_dir, layers, rate):
    (args,) = commands.parse_args(commands.OPTIONS, ["--teacher", str(teacher_dir), "--speedup", "2"])
    printed = commands.command(args, commands.Domain([], [10], {}, 20), Candidate(10, 300, 4, layers))
    assert f"--decoder_layers {layers} --vocabulary 300 " in printed and f"--learning_rate {rate} " in printed


def test_the_command_names_the_speech_that_was_planned_for(monkeypatch, teacher_dir, config, tmp_path):
    """distill requires the language of a multilingual teacher, and would take another split."""
    given = ["--teacher", str(teacher_dir), "--speedup", "2"]
    (args,) = commands.parse_args(commands.OPTIONS, given)
    domain = commands.describe_domain(args, config, make_processor())
    shape = Candidate(10, 300, 4, 2)
    assert "--language" not in commands.command(args, domain, shape)  # the teacher is English-only
    monkeypatch.setattr(commands, "MULTILINGUAL_VOCABULARY", 9000)
    assert " --language english --dataset my_speech " in commands.command(args, domain, shape)
    write_speech(tmp_path / "speech" / "dev", clips=2)
    more = ["--dataset", str(tmp_path / "speech"), "--split", "dev"]
    (args,) = commands.parse_args(commands.OPTIONS, given + more)
    domain = commands.describe_domain(args, config, make_processor())
    args.dataset_config = "fr"  # only datasets on the Hub have some
    line = commands.command(args, domain, shape)
    assert f" --language english --dataset {tmp_path / 'speech'} --dataset_config fr --train_split dev " in line
    assert "--eval_splits" not in line


@pytest.mark.parametrize("multilingual", [True, False])
def test_the_generation_config_says_whether_a_teacher_has_languages(tmp_path, multilingual):
    """A multilingual model may have a small vocabulary, and an English-only one a large one."""
    GenerationConfig(is_multilingual=multilingual).save_pretrained(tmp_path)
    assert commands.has_languages(str(tmp_path), 300 if multilingual else 51_865) is multilingual


def test_windows_fit_the_clips():
    assert windows_up_to(30) == [30, 20, 15, 12, 10, 8, 6, 5, 4, 3, 2]
    durations = [3.2] * 985 + [6.4] * 10 + [16.3] * 5  # 99.5 % of up to 6.4 s
    assert windows_up_to(30, durations) == [30, 20, 17, 15, 12, 10, 8, 7, 6, 5, 4, 3, 2]
    assert windows_up_to(10, durations) == [10, 8, 7, 6, 5, 4, 3, 2]
    assert windows_up_to(30, [35.0]) == windows_up_to(30)


def test_without_a_target_there_is_nothing_to_plan(monkeypatch, capsys, teacher_dir):
    ended = run_here(monkeypatch, capsys, "--teacher", teacher_dir, file=ROOT / "examples" / "plan.py")
    assert ended.returncode == 2 and "--speedup or --max_parameters is required" in ended.stderr


def test_a_column_of_durations_is_not_believed(monkeypatch, capsys, tmp_path, teacher_dir):
    """It may be in another unit, and long transcripts may have more tokens than the decoder."""
    speech = load_speech_dataset(str(write_speech(tmp_path / "speech", clips=5)), None, "train")
    long = speech.add_column("duration", [5000.0, None, 4000.0, 100.0, 9.0])
    long = replace_column(long, "text", ["abcdefgh " * 100] * 5)
    long.save_to_disk(tmp_path / "saved")
    arguments = ("--teacher", teacher_dir, "--dataset", tmp_path / "saved", "--speedup", 1.2)
    ended = run_here(monkeypatch, capsys, *arguments, file=ROOT / "examples" / "plan.py")
    assert ended.returncode == 0, ended.stderr
    assert "100.0" in ended.stdout
