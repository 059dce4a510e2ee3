"""Speed measurement: the same tokens as `generate`, and times from a fake clock."""

import itertools
import json
import statistics

import numpy as np
import pytest
import soundfile
import torch
from models import make_whisper
from speech import write_speech
from transformers import PreTrainedModel

from askd_hf import init_student
from askd_hf.data import load_speech_dataset
from askd_hf.errors import UserError
from askd_hf.evaluation import latency, memory, speed
from askd_hf.evaluation.model_info import describe_model
from askd_hf.evaluation.speed import clips_measured, measure_speed, timed_generate


@pytest.fixture
def clips(tmp_path):
    return load_speech_dataset(str(write_speech(tmp_path / "speech", clips=5)), None, "train")


@pytest.fixture
def pair(processor):
    """A student and a teacher that generate texts of different lengths."""
    return {"student": make_whisper(processor, seed=2, decoder_layers=2), "teacher": make_whisper(processor)}


def both(processor, pair):
    return dict.fromkeys(pair, processor)


def features_of(processor, clips):
    waves = [soundfile.read(row["audio"]["path"], dtype="float32")[0] for row in clips]
    return processor.feature_extractor(waves, sampling_rate=16_000, return_tensors="pt").input_features


@pytest.mark.parametrize("batch_size", [1, 5])
def test_the_halves_give_the_tokens_of_plain_generate(processor, pair, clips, batch_size):
    features = features_of(processor, clips)
    for model in pair.values():
        for batch in features.split(batch_size):
            plain = model.eval().generate(batch, num_beams=1, do_sample=False)
            for _ in range(2):  # twice: the first call must not change the model
                tokens, encoder, decoder = timed_generate(model, batch)
                assert torch.equal(tokens, plain)
            assert encoder > 0 and decoder > 0


def test_lengths_that_are_known_cost_no_decoding(clips, monkeypatch):
    seconds = speed.clip_durations(clips, 1.0)
    assert seconds == [len(soundfile.read(row["audio"]["path"])[0]) / 16_000 for row in clips]
    monkeypatch.setattr(speed, "waveform", None)
    known = clips.add_column("duration", seconds)
    assert speed.clip_durations(known, 1.0) == seconds
    with pytest.raises(UserError, match=r"speed requires clips of at most 0.1 s"):
        speed.clip_durations(known, 0.1)


class FakeTime:
    """A fake clock: the encoder takes 1 s per batch, `generate` the given seconds."""

    def __init__(self, monkeypatch, models, decoding):
        self.now = 0.0
        self.order = []
        self.decoding = decoding  # iterator of seconds by role
        monkeypatch.setattr(speed, "synchronized_time", lambda device: self.now)
        for role, model in models.items():
            self.slow_down(role, model)

    def slow_down(self, role: str, model: PreTrainedModel):
        encode, generate = model.model.encoder.forward, model.generate

        def slow_encode(*args, **kwargs):
            self.now += 1.0
            return encode(*args, **kwargs)

        def slow_generate(*args, **kwargs):
            self.order.append(role)
            self.now += next(self.decoding[role])
            return generate(*args, **kwargs)

        model.model.encoder.forward = slow_encode
        model.generate = slow_generate


def test_times_are_those_of_the_clock(processor, pair, clips, monkeypatch):
    # warm-up, then 3 passes of 2 batches (of 3 and 2 clips), then the measurement of memory
    student = iter([99.0, *(1.5, 0.5), *(3.5, 0.5), *(6.5, 1.5), 99.0])
    teacher = iter([99.0, *(9.0, 9.0), *(5.0, 5.0), *(4.0, 4.0), 99.0])
    FakeTime(monkeypatch, pair, {"student": student, "teacher": teacher})
    result = measure_speed(pair, both(processor, pair), clips, "tones", batch_sizes=[3], repetitions=3)
    student_row, teacher_row = result.rows
    assert (student_row.role, student_row.batch_size, teacher_row.role) == ("student", 3, "teacher")
    # totals: student 2+2, 2+4, 2+8; teacher 2+18, 2+10, 2+8
    assert (student_row.total.median, student_row.total.lowest, student_row.total.highest) == (6.0, 4.0, 10.0)
    assert (teacher_row.total.median, teacher_row.total.lowest, teacher_row.total.highest) == (12.0, 10.0, 20.0)
    assert (student_row.encoder.median, student_row.decoder.median, teacher_row.decoder.highest) == (2.0, 4.0, 18.0)
    assert student_row.speedup == statistics.median([20 / 4, 12 / 6, 10 / 10]) == 2.0
    assert teacher_row.speedup == 1.0
    # latency is of full batches only: the first batch of each pass
    assert student_row.latency == statistics.median([1 + 1.5, 1 + 3.5, 1 + 6.5])
    seconds = sum(soundfile.info(row["audio"]["path"]).duration for row in clips)
    assert result.audio_seconds == pytest.approx(seconds)
    assert student_row.rtfx == pytest.approx(seconds / 6)
    assert (result.set, result.clips, result.repetitions) == ("tones", 5, 3)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_plan_counts_the_clips_of_a_model(processor, pair, clips, monkeypatch, threads):
    taken, encoder = [], pair["student"].model.encoder
    monkeypatch.setattr(
        encoder, "forward", lambda x, *a, f=encoder.forward, **k: taken.append(len(x)) or f(x, *a, **k)
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        measure_speed(pair, both(processor, pair), clips, "tones", batch_sizes=[1, 5], repetitions=2)
        assert clips_measured(5, [1, 5], 2, torch.device("cpu")) == sum(taken)
    finally:
        torch.set_num_threads(before)


def test_models_take_turns_and_start_in_turn(processor, pair, clips, monkeypatch):
    pair = {"student": pair["student"], "before": make_whisper(processor, seed=3), "teacher": pair["teacher"]}
    fake = FakeTime(monkeypatch, pair, {role: itertools.repeat(1.0) for role in pair})
    measure_speed(pair, both(processor, pair), clips, "tones", batch_sizes=[5], repetitions=3)
    warm_up, *passes, _ = [fake.order[i : i + 3] for i in range(0, len(fake.order), 3)]
    assert warm_up == ["student", "before", "teacher"]
    assert passes == [
        ["student", "before", "teacher"],
        ["before", "teacher", "student"],
        ["teacher", "student", "before"],
    ]


def test_tokens_are_counted_without_filling_and_end(processor, pair, clips):
    result = measure_speed(pair, both(processor, pair), clips, "tones", batch_sizes=[1, 5], repetitions=1)
    end = processor.tokenizer.eos_token_id
    for role, model in pair.items():
        texts = [model.generate(one[None])[0].tolist() for one in features_of(processor, clips)]
        expected = sum(token != end for text in texts for token in text)
        assert expected > 0
        assert [row.tokens for row in result.rows if row.role == role] == [expected, expected]


def test_padding_is_not_counted(processor, pair):
    end = processor.tokenizer.eos_token_id
    assert speed.count_tokens(pair["student"], torch.tensor([[5, 6, 7, end], [5, end, end, end], [end] * 4])) == 4


def test_the_limit_of_tokens_holds_for_all_models(processor, pair, clips):
    result = measure_speed(pair, both(processor, pair), clips, "tones", batch_sizes=[1], repetitions=1, max_length=3)
    limited = [model.generate(features_of(processor, clips), max_length=3) for model in pair.values()]
    assert max(tokens.shape[1] for tokens in limited) < 10
    assert [row.tokens for row in result.rows] == [
        speed.count_tokens(model, tokens) for model, tokens in zip(pair.values(), limited, strict=True)
    ]


def test_conditions_are_noted(processor, pair, clips):
    result = measure_speed(pair, both(processor, pair), clips, "tones", batch_sizes=[2], repetitions=1)
    assert (result.dtype, result.attention) == ("float32", "sdpa")
    assert result.threads == torch.get_num_threads()


def test_a_single_model_has_no_speedup(processor, pair, clips):
    alone = {"student": pair["student"]}
    result = measure_speed(alone, both(processor, alone), clips, "tones", batch_sizes=[1], repetitions=1)
    assert [row.speedup for row in result.rows] == [None]


def test_different_conditions_are_refused(processor, pair, clips):
    pair["student"].to(torch.bfloat16)
    with pytest.raises(ValueError, match="bfloat16"):
        measure_speed(pair, both(processor, pair), clips, "tones")


def test_too_few_clips_for_a_batch(processor, pair, clips):
    with pytest.raises(UserError, match=r"batch size 16 requires .* got 5"):
        measure_speed(pair, both(processor, pair), clips, "tones", batch_sizes=[1, 16])


def test_a_clip_longer_than_the_window_is_named(processor, pair, clips, tmp_path):
    soundfile.write(tmp_path / "speech/audio/003.wav", np.zeros(24_000), 16_000)
    with pytest.raises(UserError, match=r"003\.wav: .* got 1\.5 s"):
        measure_speed(pair, both(processor, pair), clips, "tones", batch_sizes=[1])


@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu"])
def test_the_clock_waits_for_any_accelerator(kind, monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    speed.synchronized_time(torch.device(kind))
    speed.synchronized_time(torch.device("cpu"))
    assert waited == [torch.device(kind)]


# ---- memory ----


def test_no_memory_is_claimed_of_an_accelerator_that_keeps_no_account():
    assert memory.peak_bytes(lambda: np.ones(10**7).sum(), torch.device("mps")) is None


def test_the_peak_is_that_of_the_call():
    megabytes = 1_000_000

    def take_and_free():
        taken = np.ones(40 * megabytes, dtype=np.uint8)
        return taken.sum()

    take_and_free()
    measured = [memory.peak_bytes(run, torch.device("cpu")) for run in (take_and_free, lambda: None, take_and_free)]
    if measured[0] is None:
        pytest.skip("no /proc/self/clear_refs here")
    assert 39 * megabytes < measured[0] < 50 * megabytes
    assert measured[1] < 10 * megabytes
    assert 39 * megabytes < measured[2] < 50 * megabytes


def test_peak_memory_is_that_of_the_call_and_the_weights(processor, pair, clips, monkeypatch):
    monkeypatch.setattr(speed, "peak_bytes", lambda function, device: (function() and None) or 5_000_000)
    result = measure_speed(pair, both(processor, pair), clips, "tones", batch_sizes=[1], repetitions=1)
    for row, model in zip(result.rows, pair.values(), strict=True):
        # the projection to the vocabulary is the token embedding: counted once
        assert model.get_memory_footprint() == 4 * model.num_parameters()
        assert row.peak_memory_mb == pytest.approx(5.0 + 4 * model.num_parameters() / 1e6)


# ---- facts ----


def test_facts_of_a_directory(processor, tmp_path):
    student = init_student(make_whisper(processor), 2)
    student.save_pretrained(tmp_path / "whole")
    facts = describe_model(str(tmp_path / "whole"), student)
    assert (facts.encoder_layers, facts.decoder_layers) == (2, 2)
    assert facts.parameters == sum(p.numel() for p in student.parameters())
    assert facts.size_mb == (tmp_path / "whole/model.safetensors").stat().st_size / 1e6
    (tmp_path / "whole/model.fp32.safetensors").write_bytes(b"another format of the same weights")
    assert describe_model(str(tmp_path / "whole"), student) == facts


def test_the_dtype_on_disk_is_said(processor, tmp_path):
    model = make_whisper(processor)
    assert describe_model("layers of something", model).stored_dtype is None
    model.save_pretrained(tmp_path / "whole")
    assert describe_model(str(tmp_path / "whole"), model).stored_dtype == "float32"
    model.half().save_pretrained(tmp_path / "half", max_shard_size="20KB")
    assert describe_model(str(tmp_path / "half"), model.float()).stored_dtype == "float16"


def test_size_of_weights_in_several_files(processor, tmp_path):
    model = make_whisper(processor)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = list(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert describe_model(str(tmp_path), model).size_mb == sum(f.stat().st_size for f in shards) / 1e6
    shards[0].unlink()
    assert describe_model(str(tmp_path), model).size_mb is None


def test_size_of_weights_in_the_hub_cache(processor, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = make_whisper(processor)
    assert describe_model("someone/whisper", model).size_mb is None
    snapshot = tmp_path / "models--someone--whisper" / "snapshots" / "abc"
    model.save_pretrained(snapshot)
    (tmp_path / "models--someone--whisper/refs").mkdir()
    (tmp_path / "models--someone--whisper/refs/main").write_text("abc")
    weights = (snapshot / "model.safetensors").stat().st_size
    assert describe_model("someone/whisper", model).size_mb == weights / 1e6
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "missing.safetensors"}}))
    assert describe_model("someone/whisper", model).size_mb is None


def test_parts_are_timed_on_clips_of_all_durations(monkeypatch):
    """One clip is the median one, not the longest, as the clips are sorted by duration."""
    timed = []
    monkeypatch.setattr(latency, "_parts", lambda model, extractor, clips, *_: timed.append(clips) or (0.0,) * 4)
    waves = [np.zeros(samples) for samples in (90, 80, 70, 60, 50)]
    latency.measure_parts({"student": (None, None)}, waves, {"student": 1}, batch_sizes=(1, 5, 7), repetitions=1)
    lengths = [[len(wave) for wave in clips] for clips in timed[::2]]
    assert lengths == [[70], [90, 80, 70, 60, 50], [90, 80, 80, 70, 60, 60, 50]]
