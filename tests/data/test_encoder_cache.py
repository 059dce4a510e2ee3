"""The cache against the encoder itself, and against everything that can go wrong with files."""

import json
import os
import pickle
import shutil
import signal
import socket
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from datasets import Dataset
from encoder_cache_run import cached, speech
from models import make_processor, make_whisper
from processes import killed_when, start
from scripts import ROOT
from speech import RATE, tone, write_speech
from torch.utils.data import DataLoader

from askd_hf.data import (
    EncoderCache,
    SpeechCollator,
    encoder_fingerprint,
)
from askd_hf.data.encoder_cache import matches
from askd_hf.errors import UserError

ROW_BYTES = 2 * 50 * 16


@pytest.fixture
def clips(tmp_path) -> Dataset:
    return speech(write_speech(tmp_path / "speech", clips=6))


@pytest.fixture
def model(processor):
    return make_whisper(processor).eval()


def plain(model, processor, dataset: Dataset) -> torch.Tensor:
    """The encoder's float32 outputs without any cache."""
    features = SpeechCollator(processor, model.config)(list(dataset))["input_features"]
    with torch.no_grad():
        return model.model.encoder(features).last_hidden_state


def assert_plain(cache: EncoderCache, model, processor, dataset: Dataset) -> None:
    """The cache has the encoder's outputs for all clips, up to float16's rounding."""
    expected = plain(model, processor, dataset)
    torch.testing.assert_close(cache.read(dataset["audio_key"][:]).float(), expected, rtol=1e-3, atol=1e-3)


def encoded_by(model) -> list[int]:
    """The sizes of the batches that the encoder has seen since, as a list that grows."""
    batches = []
    model.model.encoder.register_forward_hook(lambda module, args, output: batches.append(len(args[0])))
    return batches


def part(cache: EncoderCache, end: str) -> Path:
    """Of the first writer."""
    return min(cache.folder.glob(f"part-*.{end}"), key=lambda file: file.stat().st_ctime_ns)


def rows_on_disk(cache: EncoderCache) -> int:
    return sum(len(file.read_bytes().splitlines()) for file in cache.folder.glob("*.keys"))


def test_values_are_the_encoders(model, processor, clips, tmp_path, capsys):
    cache = cached(model, processor, [clips], tmp_path / "cache")
    outputs = cache.read(clips["audio_key"][:])
    assert outputs.dtype == torch.float16
    assert_plain(cache, model, processor, clips)
    again = cache.read(clips["audio_key"][2::-1])  # any clips in any order
    assert torch.equal(again, outputs[[2, 1, 0]])
    assert part(cache, "f16").stat().st_size == 6 * ROW_BYTES
    assert part(cache, "keys").read_text().split() == clips["audio_key"][:]
    printed = capsys.readouterr()
    assert f"encoder cache {cache.folder}: 6 clips, 0.00 GB on disk (0 of 6 cached); " in printed.out
    assert "Encoder outputs: 6/6" in printed.err


def test_decoder_logits_are_the_same(model, processor, clips, tmp_path):
    cache = cached(model, processor, [clips], tmp_path)
    batch = SpeechCollator(processor, model.config, cache, processor.feature_extractor)(list(clips))
    with torch.no_grad():
        expected = model(input_features=batch["teacher_input_features"], labels=batch["labels"]).logits
        outputs = (batch["encoder_outputs"].float(),)
        got = model(encoder_outputs=outputs, labels=batch["labels"]).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=5e-3)
    assert expected.abs().max() > 1


def test_a_second_call_computes_nothing(model, processor, clips, tmp_path, capsys):
    cached(model, processor, [clips], tmp_path)
    batches = encoded_by(model)
    assert_plain(cached(model, processor, [clips], tmp_path), model, processor, clips)
    assert batches == [6]  # of the comparison itself
    assert "(6 of 6 cached)" in capsys.readouterr().out


def test_only_new_and_changed_clips_are_computed(model, processor, clips, tmp_path):
    cached(model, processor, [clips.select(range(4))], tmp_path / "cache")
    batches = encoded_by(model)
    cached(model, processor, [clips], tmp_path / "cache")
    assert batches == [2]
    audio, metadata = tmp_path / "speech" / "audio", tmp_path / "speech" / "metadata.csv"
    soundfile.write(audio / "001.wav", tone(700), RATE)
    (audio / "002.wav").rename(audio / "x.wav")
    metadata.write_text(metadata.read_text().replace("002.wav", "x.wav"))
    changed = speech(tmp_path / "speech")
    cache = cached(model, processor, [changed], tmp_path / "cache")
    assert batches == [2, 1]
    assert sum(a != b for a, b in zip(changed["audio_key"], clips["audio_key"], strict=True)) == 1
    assert_plain(cache, model, processor, changed)


def test_each_distinct_clip_of_several_data_sets_is_computed_once(model, processor, clips, tmp_path):
    batches = encoded_by(model)
    parts = [clips.select([0, 1]), clips.select([1, 2, 3, 4]).remove_columns("duration"), clips.select([5, 0])]
    cache = cached(model, processor, parts, tmp_path, num_workers=1)
    assert sum(batches) == rows_on_disk(cache) == 6
    assert_plain(cache, model, processor, clips)


def test_shares_of_processes_that_start_one_after_the_other(model, processor, clips, tmp_path):
    batches = encoded_by(model)
    shares = []
    for index in range(2):
        cache = cached(model, processor, [clips], tmp_path, process_index=index, num_processes=2)
        shares.append(sum(batches) - sum(shares))
    assert shares == [3, 3]
    assert_plain(cache, model, processor, clips)


def test_the_model_is_left_as_it_was(processor, clips, tmp_path):
    model = make_whisper(processor, dropout=0.5, encoder_layerdrop=0.5).train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    cache = cached(model, processor, [clips], tmp_path, dtype=torch.bfloat16)
    assert all(module.training for module in model.modules())
    for name, weight in model.state_dict().items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, before[name])
    # in evaluation mode, or half of it would be dropped
    error = (cache.read(clips["audio_key"][:]).float() - plain(model.eval(), processor, clips)).abs()
    assert error.max() < 0.3
    assert 1e-3 < error.mean() < 0.03  # bfloat16 has 8 bits


def test_the_fingerprint_is_of_all_that_counts(model, processor, tmp_path):
    def fingerprint(dtype="float32", **settings):
        other = make_processor()
        for name, value in settings.items():
            setattr(other.feature_extractor, name, value)
        return encoder_fingerprint(model, other, dtype)

    first = fingerprint()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    saved = type(model).from_pretrained(tmp_path), type(processor).from_pretrained(tmp_path)
    assert encoder_fingerprint(*saved, "float32") == first
    with torch.no_grad():
        model.model.decoder.layer_norm.weight += 1
        assert fingerprint(return_attention_mask=True) == first
        others = [fingerprint("bfloat16"), fingerprint(hop_length=80), fingerprint(padding_value=0.1)]
        model.model.encoder.layers[1].fc2.bias[3] += 1e-6
        others.append(fingerprint())
        model.config.encoder_attention_heads = 4
        others.append(fingerprint())
    others.append(encoder_fingerprint(model.to(torch.bfloat16), processor, "float32"))
    assert len({first, *others}) == 7


def test_a_changed_encoder_or_feature_is_computed_anew(model, processor, clips, tmp_path):
    cache = cached(model, processor, [clips], tmp_path)
    before = {file.name: file.read_bytes() for file in cache.folder.iterdir()}
    batches = encoded_by(model)
    louder = make_processor()
    louder.feature_extractor.padding_value = 0.1
    assert cached(model, louder, [clips], tmp_path).folder != cache.folder
    with torch.no_grad():
        model.model.encoder.conv1.weight *= 1.5
    trained = cached(model, processor, [clips], tmp_path)
    assert sum(batches) == 12
    assert_plain(trained, model, processor, clips)
    assert {file.name: file.read_bytes() for file in cache.folder.iterdir()} == before
    settings = json.loads((trained.folder / "settings.json").read_text())
    assert settings["encoder"]["d_model"] == 16
    assert settings["features"]["hop_length"] == 160
    assert settings["computed_in"] == "float32"


RUN = ROOT / "tests" / "support" / "encoder_cache_run.py"


def test_a_killed_pass_is_resumed(model, processor, tmp_path):
    folder, directory = write_speech(tmp_path / "speech", clips=24), tmp_path / "cache"
    clips = speech(folder)
    cached_keys = directory / encoder_fingerprint(model, processor, "float32")

    def there() -> int:
        return sum(keys.read_bytes().count(b"\n") for keys in cached_keys.glob("*.keys"))

    killed = killed_when(lambda: there() >= 4, RUN, folder, directory)
    assert killed.returncode == -signal.SIGKILL
    assert 4 <= there() < 24
    kept = {file: file.read_bytes() for file in cached_keys.iterdir()}
    missing, batches = 24 - there(), encoded_by(model)
    cache = cached(model, processor, [clips], directory)
    assert sum(batches) == missing
    assert all(file.read_bytes() == content for file, content in kept.items())
    assert rows_on_disk(cache) == 24
    assert_plain(cache, model, processor, clips)


def test_two_processes_write_at_once(model, processor, tmp_path):
    folder, directory = write_speech(tmp_path / "speech", clips=24), tmp_path / "cache"
    processes = [start(RUN, folder, directory, index, 2) for index in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    clips, batches = speech(folder), encoded_by(model)
    cache = cached(model, processor, [clips], directory)
    assert batches == []
    assert rows_on_disk(cache) == 24
    assert_plain(cache, model, processor, clips)


def test_writers_never_share_a_part_even_where_locks_do_nothing(tmp_path, monkeypatch):
    """As on a disk whose locks hold within a node only."""
    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", lambda *_: None)
    cache, other = EncoderCache(tmp_path, 50, 16), EncoderCache(tmp_path, 50, 16)
    rows = {key: torch.full((1, 50, 16), value).half() for value, key in enumerate("abcdef")}
    with cache.open_writer() as append, other.open_writer() as append_other:
        for key in "abc":  # both compute b
            append([key], rows[key])
            append_other([chr(ord(key) + 1)], rows[chr(ord(key) + 1)])
        append_other(["e", "f"], torch.cat([rows["e"], rows["f"]]))
    assert sorted(file.read_text() for file in tmp_path.glob("*.keys")) == ["a\nb\nc\n", "b\nc\nd\ne\nf\n"]
    assert all(f"{socket.gethostname()}-{os.getpid()}-" in file.name for file in tmp_path.iterdir())
    assert cache.has(["a", "b"]).tolist() == [False, False]
    cache.reload()
    assert cache.has(["f", "nothing", "a", "aa", ""]).tolist() == [True, False, True, False, False]
    assert torch.equal(cache.read([*rows]), torch.cat([*rows.values()]))


def test_a_cache_of_an_earlier_version_is_read_and_completed(model, processor, clips, tmp_path):
    """Its parts have a number, and a file for the lock."""
    folder = cached(model, processor, [clips.select(range(4))], tmp_path).folder
    for file in folder.glob("part-*"):
        file.rename(folder / f"part-00000{file.suffix}")
    (folder / "part-00000.lock").touch()
    batches = encoded_by(model)
    cache = cached(model, processor, [clips], tmp_path)
    assert batches == [2]
    assert (folder / "part-00000.f16").stat().st_size == 4 * ROW_BYTES
    assert_plain(cache, model, processor, clips)


def test_after_a_failed_write_nothing_is_written_to_that_part(tmp_path):
    """Half a row may be there: the next rows would be read in the place of others."""
    resource = pytest.importorskip("resource")
    cache, limits = EncoderCache(tmp_path, 50, 16), resource.getrlimit(resource.RLIMIT_FSIZE)
    rows = torch.arange(4.0).reshape(4, 1, 1).expand(4, 50, 16).half()
    with cache.open_writer() as append:
        append(["a", "b"], rows[:2])
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(2.5 * ROW_BYTES), limits[1]))
        try:
            with pytest.raises(UserError, match="File too large"):
                append(["c"], rows[2:3])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        with pytest.raises(ValueError, match="closed file"):  # there is room again
            append(["d"], rows[3:])
    cache.reload()
    assert cache.has(["a", "b", "c", "d"]).tolist() == [True, True, False, False]
    assert torch.equal(cache.read(["a", "b"]), rows[:2])


def test_eight_bits_are_the_nearest_steps_of_each_position(model, processor, clips, tmp_path):
    exact, cache = (
        cached(model, processor, [clips], tmp_path / "cache", stored=stored) for stored in ("float16", "int8")
    )
    assert exact.folder != cache.folder and cache.row_bytes < 0.6 * exact.row_bytes
    assert matches(cache, model, processor) and matches(exact, model, processor)
    outputs = plain(model, processor, clips).numpy()
    steps = np.abs(outputs).max(axis=-1, keepdims=True) / 127
    found = cache.read(clips["audio_key"][:]).numpy()
    assert np.all(np.abs(found - outputs) <= 0.505 * steps + 0.002 * np.abs(outputs))  # and the rounding of float16
    assert np.mean(np.abs(found - outputs)) > 0.1 * steps.mean()  # it isn't float16
    again = EncoderCache(cache.folder, 50, 16, "int8")
    assert torch.equal(again.read(clips["audio_key"][:]), torch.from_numpy(found))
    assert torch.equal(pickle.loads(pickle.dumps(cache)).read(clips["audio_key"][:2]), torch.from_numpy(found[:2]))


def test_a_silent_position_stays_zero(tmp_path):
    cache = EncoderCache(tmp_path, 2, 4, "int8")
    outputs = torch.tensor([[[0.0, 0.0, 0.0, 0.0], [1.0, -2.0, 0.5, 60000.0]]]).half()
    with cache.open_writer() as append:
        append(["a"], outputs)
    cache.reload()
    read = cache.read(["a"]).float()
    assert torch.equal(read[0, 0], torch.zeros(4)) and read.isfinite().all()
    torch.testing.assert_close(read[0, 1], outputs[0, 1].float(), atol=60000 / 254 * 1.01, rtol=0)


def test_nothing_behind_zeros_is_used(tmp_path):
    """A power cut may have damaged the rows of the later keys as well."""
    cache = EncoderCache(tmp_path, 2, 4)
    with cache.open_writer() as append:
        append(["a", "b", "c"], torch.ones(3, 2, 4).half())
    part(cache, "keys").write_bytes(b"a\n\0\nc\n")
    cache.reload()
    assert cache.has(["a", "b", "c"]).tolist() == [True, False, False]


@pytest.mark.parametrize(
    "rows, keys, complete",
    [
        (b"\1" * ROW_BYTES, b"", 6),  # killed between a row and its key
        (b"\1" * (ROW_BYTES // 3), b"", 6),  # within a row
        (b"\1" * ROW_BYTES, b"0123", 6),  # within the key
        (b"", b"0123\n", 6),  # a disk that lost the row, but kept the key
        (b"\1" * 2 * ROW_BYTES, b"\0" * 40 + b"12\n", 6),  # a power cut that left zeros
        (None, b"", 5),  # a disk that lost the end of the last row
    ],
)
def test_a_torn_tail_is_healed(model, processor, clips, tmp_path, rows, keys, complete):
    cache = cached(model, processor, [clips], tmp_path / "cache")
    expected = cache.read(clips["audio_key"][:])
    data = part(cache, "f16").read_bytes()
    part(cache, "f16").write_bytes(data[:-10] if rows is None else data + rows)
    with part(cache, "keys").open("ab") as file:
        file.write(keys)
    cache.reload()
    assert cache.has(clips["audio_key"][:]).tolist() == [True] * complete + [False] * (6 - complete)
    more = speech(write_speech(tmp_path / "more", clips=3, seed=7))
    batches = encoded_by(model)
    cache = cached(model, processor, [clips, more], tmp_path / "cache", batch_size=1)
    assert len(batches) == 6 - complete + 3
    assert torch.equal(cache.read(clips["audio_key"][:5]), expected[:5])
    torch.testing.assert_close(cache.read(clips["audio_key"][5:]), expected[5:])
    assert_plain(cache, model, processor, more)


def test_ctrl_c_leaves_a_valid_store(model, processor, clips, tmp_path):
    def interrupt(*_):
        if len(batches) == 2:
            raise KeyboardInterrupt

    batches = encoded_by(model)
    hook = model.model.encoder.register_forward_pre_hook(interrupt)
    model.train()
    with pytest.raises(KeyboardInterrupt):
        cached(model, processor, [clips], tmp_path, batch_size=1)
    hook.remove()
    assert model.model.encoder.training
    cached(model, processor, [clips], tmp_path, batch_size=1)
    assert len(batches) == 6


def test_no_room_is_said_before_anything_is_computed(model, processor, clips, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    cached(model, processor, [clips.select(range(4))], tmp_path)
    batches = encoded_by(model)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**12, 10**12, 500_000_000 + 2 * ROW_BYTES - 1))
    message = r"not enough disk space\. 2 clips need 0\.00 GB and a reserve of 0\.50 GB, 0\.50 GB are free\. Free disk"
    with pytest.raises(UserError, match=message):
        cached(model, processor, [clips], tmp_path)
    assert batches == []
    cached(model, processor, [clips.select(range(4))], tmp_path)  # what is there needs no room
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**12, 10**12, 500_000_000 + 2 * ROW_BYTES))
    cached(model, processor, [clips], tmp_path)
    assert batches == [2]


def test_a_disk_that_fills_up_on_the_way(model, processor, tmp_path):
    resource = pytest.importorskip("resource")
    clips = speech(write_speech(tmp_path / "speech", clips=24))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(20.5 * ROW_BYTES), limits[1]))
    try:
        with pytest.raises(UserError, match=r"File too large.*earlier results are kept"):
            cached(model, processor, [clips], tmp_path / "cache", batch_size=3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    batches = encoded_by(model)
    cache = cached(model, processor, [clips], tmp_path / "cache", batch_size=3)
    assert sum(batches) == 24 - 18
    assert_plain(cache, model, processor, clips)


def test_a_place_that_cant_be_written_to(model, processor, clips, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"encoder cache .*file.*Not a directory.*give another one"):
        cached(model, processor, [clips], tmp_path / "file")


@pytest.mark.parametrize("value", [float("nan"), 1e5])
def test_an_output_beyond_float16_is_refused(model, processor, clips, tmp_path, value):
    def spoil(module, args, output):
        hook.remove()
        output.last_hidden_state[1, 7, 3] = value

    hook = model.model.encoder.register_forward_hook(spoil)
    with pytest.raises(UserError, match=r"^audio/001\.wav: the encoder's output is NaN, infinite or beyond 65504"):
        cached(model, processor, [clips], tmp_path)
    assert rows_on_disk(EncoderCache(tmp_path / encoder_fingerprint(model, processor, "float32"), 50, 16)) == 0


def test_augmentation_is_refused(processor, clips, tmp_path):
    with pytest.raises(UserError, match=r"set apply_spec_augment to False \(model config, now True\)"):
        cached(make_whisper(processor, apply_spec_augment=True), processor, [clips], tmp_path)
    noisy = make_processor()
    noisy.feature_extractor.dither = 1e-4
    with pytest.raises(UserError, match=r"dither to 0\.0 \(feature extractor, now 0\.0001\)"):
        cached(make_whisper(processor), noisy, [clips], tmp_path)


def test_a_clip_that_changed_since_its_check_is_named(model, processor, clips, tmp_path):
    (tmp_path / "speech" / "audio" / "004.wav").unlink()
    with pytest.raises(UserError, match=r"audio/004\.wav: missing file"):
        cached(model, processor, [clips], tmp_path / "cache")


def test_what_isnt_there_is_named(model, processor, clips, tmp_path):
    cache = cached(model, processor, [clips.select(range(4))], tmp_path)
    keys = clips["audio_key"][:]
    with pytest.raises(UserError, match=rf"no cached encoder output for 2 of 6 clips \(audio_key {keys[4]}, \.\.\.\)"):
        cache.read(keys)


def test_batches_from_the_cache_need_no_audio(model, processor, clips, tmp_path):
    cache = cached(model, processor, [clips], tmp_path / "cache")
    expected = SpeechCollator(processor, model.config)(list(clips))
    both = SpeechCollator(processor, model.config, cache, processor.feature_extractor)(list(clips))
    shutil.rmtree(tmp_path / "speech")
    batch = SpeechCollator(processor, model.config, cache)(list(clips))
    assert list(batch) == ["encoder_outputs", "decoder_input_ids", "labels", "label_positions", "clip"]
    assert list(both) == [
        "encoder_outputs",
        "teacher_input_features",
        "decoder_input_ids",
        "labels",
        "label_positions",
        "clip",
    ]
    assert torch.equal(both["teacher_input_features"], expected["input_features"])
    for got in (batch, both):
        assert torch.equal(got["encoder_outputs"], cache.read(clips["audio_key"][:]))
        assert torch.equal(got["labels"], expected["labels"])
        assert got["clip"] == expected["clip"]


@pytest.mark.slow
def test_spawned_data_workers_open_the_files_themselves(model, processor, clips, tmp_path):
    cache = cached(model, processor, [clips], tmp_path)
    expected = cache.read(clips["audio_key"][:])
    assert len(pickle.dumps(cache)) < 1000
    collator = SpeechCollator(processor, model.config, cache)
    batches = DataLoader(clips, batch_size=4, collate_fn=collator, num_workers=1, multiprocessing_context="spawn")
    assert torch.equal(torch.cat([batch["encoder_outputs"] for batch in batches]), expected)
