"""Which clips are decoded, by which method, and errors before decoding."""

import dataclasses

import numpy as np
import pytest
import soundfile
import torch
from models import make_multilingual, make_whisper
from transformers import GenerationConfig

from askd_hf.errors import UserError
from askd_hf.evaluation import DatasetSpec, Decoding, plan_jobs, prepare_set, run_job, spread_clips
from askd_hf.evaluation.results import LongClips
from askd_hf.evaluation.transcribe import _generation_digest, fixed_seed, token_limit
from askd_hf.models.generation_config import set_language

CLIPS = [(0.4, "a b"), (0.9, "c"), (0.3, "ignore_time_segment_in_scoring"), (0.5, "d e"), (2.2, "f"), (0.8, "")]


@pytest.fixture
def source(tmp_path):
    rows = ["file_name,transcription"]
    for i, (seconds, text) in enumerate(CLIPS):
        soundfile.write(tmp_path / f"{i}.wav", np.sin(np.arange(int(16_000 * seconds)) / 9), 16_000)
        rows.append(f"{i}.wav,{text}")
    (tmp_path / "metadata.csv").write_text("\n".join(rows) + "\n")
    return DatasetSpec("own", str(tmp_path), None, "train")


def test_all_joined_recordings_are_decoded(source):
    short, joined = prepare_set(source, window=1.0, long_form=["chunked"], concatenate_seconds=2.0)
    assert (short.spec.name, len(short.clips), short.excluded) == ("own", 5, {"longer than 1 s": 1})
    letters = sum(len(text) for _, text in CLIPS)
    assert short.long_clips == LongClips(1.0, 1, 6, 100 / letters, []) and joined.long_clips is None
    assert (joined.spec.name, joined.method) == ("own-joined-chunked", "chunked")
    # 0.4 + 0.9 s and the pause; 0.5 s, because 2.2 s doesn't fit; 2.2 s; 0.8 s
    assert dict(zip(joined.clips["text"], joined.clips["duration"], strict=True)) == pytest.approx(
        {"f": 2.2, "a b c": 1.8, "": 0.8, "d e": 0.5}
    )
    assert joined.excluded == {"ignore time segment in scoring": 1}


def test_speakers_without_a_short_clip_are_found(source, tmp_path):
    listed = tmp_path / "metadata.csv"
    heading, *rows = listed.read_text().splitlines()
    speakers = "ann", "bob", "ann", "bob", "eve", ""
    lines = [f"{row},{who}" for row, who in zip(rows, speakers, strict=True)]
    listed.write_text("\n".join([f"{heading},speaker", *lines]))
    (found,) = prepare_set(source, window=0.85)
    texts = [text for seconds, text in CLIPS if seconds > 0.85]
    share = 100 * len("".join(texts)) / sum(len(text) for _, text in CLIPS)
    assert found.long_clips == LongClips(0.85, 2, 6, share, ["eve"])
    (found,) = prepare_set(source, window=3.0)
    assert found.long_clips is None


def test_other_speakers_make_another_set(source, tmp_path):
    """Lines that were decoded without them, or with others, are not those of the set: the intervals would differ."""
    listed = tmp_path / "metadata.csv"
    heading, *rows = listed.read_text().splitlines()
    digests = {prepare_set(source, window=3.0)[0].digest()}
    for speakers in ("aabbcc", "aabbcd"):
        lines = [f"{row},{who}" for row, who in zip(rows, speakers, strict=True)]
        listed.write_text("\n".join([f"{heading},speaker", *lines]))
        digests.add(prepare_set(source, window=3.0)[0].digest())
    assert len(digests) == 3


def test_recordings_that_would_not_be_long_are_refused(source):
    for seconds in (0.5, 1.0):
        with pytest.raises(UserError, match=rf"--concatenate_seconds must be greater than .*\(1 s\), got {seconds:g}"):
            prepare_set(source, window=1.0, long_form=["chunked"], concatenate_seconds=seconds)


def test_it_is_said_when_nothing_is_long(source, caplog):
    assert [prepared.spec.name for prepared in prepare_set(source, window=3.0, long_form=["sequential"])] == ["own"]
    assert "own: no clips for --long_form" in caplog.text
    caplog.clear()
    assert len(prepare_set(source, window=2.0, long_form=["sequential"])) == 2
    assert "--long_form" not in caplog.text
    assert "own: 1 of 6 clips have an empty transcript and count as clips without speech, such as" in caplog.text


def test_clips_to_time_are_spread_over_the_short_ones(source):
    sets = prepare_set(source, window=1.0, long_form=["chunked"])
    timed, clips = spread_clips(sets[::-1], 2)
    assert (timed.name, clips["duration"][:]) == ("own", [0.9, 0.5])  # the first and the third of five, longest first
    assert len(spread_clips(sets, 32)[1]) == 5
    with pytest.raises(UserError, match="Remove these options"):
        spread_clips(sets[1:], 2)


@pytest.mark.parametrize("max_length", [None, 5])
def test_the_limit_of_tokens_is_that_of_generate(processor, max_length):
    """The untrained models generate up to the limit."""
    multilingual, its_processor = make_multilingual()
    set_language(multilingual, its_processor, "zh", "transcribe")
    options = {} if max_length is None else {"max_length": max_length}
    for model, of_model in ((make_whisper(processor, seed=2), processor), (multilingual, its_processor)):
        tokens = model.eval().generate(torch.randn(2, 8, 100), **options)
        assert token_limit(model, of_model, max_length) == tokens.shape[1]


def test_labels_are_no_work_where_none_are_needed(source, tmp_path, monkeypatch):
    """Transcripts may have any length: they aren't tokenized, but generated tokens are counted."""
    model, processor = make_multilingual()

    def refuse(*args, **kwargs):
        raise AssertionError("a transcript was tokenized")

    monkeypatch.setattr(type(processor.tokenizer), "__call__", refuse)
    for name in ("encode", "_encode_plus"):
        monkeypatch.setattr(type(processor.tokenizer), name, refuse)
    source = dataclasses.replace(source, language="zh")
    prepared = prepare_set(source, window=1.0)
    options = dict(device=torch.device("cpu"), dtype=torch.float32)
    models = {"student": ("x", model, processor)}
    (job,) = plan_jobs(models, prepared, Decoding(batch_size=2), tmp_path / "manifests", **options)
    run_job(job)
    assert len(job.manifest.rows()) == 5


def ngrams(ids: list[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(ids[i : i + size]) for i in range(len(ids) - size + 1)]


def test_help_against_loops_changes_the_texts_and_is_named_in_the_manifest(source, processor, tmp_path):
    """The untrained model repeats itself up to its limit."""
    model = make_whisper(processor, seed=2)
    prepared = prepare_set(source, window=1.0)
    found = {}
    for name, decoding in {
        "greedy": Decoding(batch_size=2),
        "ngrams": Decoding(batch_size=2, no_repeat_ngram_size=3),
        "fallback": Decoding(batch_size=2, temperature_fallback=True),
        "again": Decoding(batch_size=2, temperature_fallback=True),
    }.items():
        torch.rand(1)  # the texts don't depend on the state of the generator
        options = dict(device=torch.device("cpu"), dtype=torch.float32)
        (job,) = plan_jobs({"student": ("x", model, processor)}, prepared, decoding, tmp_path / name, **options)
        run_job(job)
        found[name] = [line["prediction"] for line in job.manifest.rows()]
        settings = job.manifest.metadata().decoding
        assert settings.get("no_repeat_ngram_size") == (3 if name == "ngrams" else None)
        assert settings.get("temperature_fallback") == (True if name in ("fallback", "again") else None)
    ids = {name: [processor.tokenizer(text).input_ids for text in texts] for name, texts in found.items()}
    assert any(len(set(ngrams(clip, 3))) < len(ngrams(clip, 3)) for clip in ids["greedy"])
    assert found["ngrams"] != found["greedy"] != found["fallback"]
    assert found["fallback"] == found["again"]


@pytest.mark.parametrize("device, saved", [("cpu", []), ("cuda:1", ["get cuda:1", "set cuda:1"])])
def test_only_the_random_state_of_the_models_device_is_restored(monkeypatch, device, saved):
    """torch warns if it has to save the states of several GPUs."""
    calls = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: calls.append(f"get {device}"))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: calls.append(f"set {device}"))
    before = torch.get_rng_state()
    with fixed_seed(torch.device(device)):
        first = torch.rand(2)
    assert calls == saved and torch.equal(torch.get_rng_state(), before)
    with fixed_seed(torch.device(device)):
        assert torch.equal(torch.rand(2), first)


def test_the_generation_config_counts_as_far_as_it_changes_texts_or_times():
    def digest(timestamps="none", **changes) -> str:
        return _generation_digest(GenerationConfig(**(dict(suppress_tokens=[1, 2]) | changes)), timestamps)

    assert digest() == digest(num_assistant_tokens=7, language="fr", task="translate", alignment_heads=[[1, 0]])
    assert digest() != digest(suppress_tokens=[1])
    assert digest("word", alignment_heads=[[1, 0]]) != digest("word", alignment_heads=[[1, 1]])


def test_seeds_are_for_devices_without_a_state_of_their_own_too():
    """`fork_rng` takes its devices for CUDA's: `mps` and `xpu` would raise."""
    before = torch.get_rng_state()
    with fixed_seed(torch.device("mps")):
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
