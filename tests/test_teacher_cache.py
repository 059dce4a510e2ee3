"""The teacher's labels on disk against the teacher itself, and against all that happens to files."""

import errno
import json
import os
import pickle
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Value, concatenate_datasets, load_dataset, load_from_disk
from models import make_processor, make_whisper
from processes import Ended, launch, launch_two, run_there, start
from scripts import ROOT, load_script, run_here
from soft_labels import BATCH, CLIPS, PART_CLIPS, TEMPERATURE, TOP_K, label, settings, speech, transcribed_by
from speech import write_speech
from transformers import WhisperFeatureExtractor

from askd_hf.commands.cache_teacher import publishable
from askd_hf.data import (
    TEACHER_COLUMNS,
    Limits,
    SpeechCollator,
    cache_encoder,
    filter_invalid_clips,
    load_speech_dataset,
    teacher_cache,
)
from askd_hf.data.columns import replace_column
from askd_hf.data.concatenation import with_concatenated
from askd_hf.data.locks import locked
from askd_hf.data.shared_disk import locked_for
from askd_hf.data.soft_labels import (
    SETTINGS_COLUMN,
    SOFT_LABEL_COLUMNS,
    SOFT_LABEL_FEATURES,
    check_soft_labels,
    compute_soft_labels,
    teacher_settings,
)
from askd_hf.data.teacher_cache import cache_teacher
from askd_hf.errors import UserError


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_speech(tmp_path / "speech", CLIPS)


@pytest.fixture
def clips(folder) -> Dataset:
    return speech(folder)


@pytest.fixture
def collator(processor, teacher) -> SpeechCollator:
    return SpeechCollator(processor, teacher.config)


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(teacher_cache, "PART_CLIPS", PART_CLIPS)


def rows(dataset: Dataset, names=SOFT_LABEL_COLUMNS) -> dict[str, dict]:
    """By clip."""
    return {row["clip"]: {name: row[name] for name in names} for row in dataset.select_columns(["clip", *names])}


def assert_plain(labeled: Dataset, teacher, collator, top_k=TOP_K, temperature=TEMPERATURE, tolerance=1e-3) -> None:
    """The columns are the teacher's logits, each clip alone and unpadded, up to float16's rounding."""
    for row in labeled:
        batch = collator([{name: row[name] for name in ("audio", "text", "clip", "audio_key")}])
        with torch.no_grad():
            logits = teacher(input_features=batch["input_features"], labels=batch["labels"]).logits[0].double()
        log_probs = torch.log_softmax(logits / temperature, dim=-1)
        best, token_ids = log_probs.topk(top_k)
        others = log_probs.scatter(-1, token_ids, -torch.inf)
        assert (
            [len(row[name]) for name in TEACHER_COLUMNS] == 4 * [batch["labels"].shape[1]] == 4 * [row["label_tokens"]]
        )
        assert torch.tensor(np.array(row["teacher_token_ids"], dtype=int)).equal(token_ids)
        for name, expected in {
            "teacher_log_probs": best,
            "teacher_log_rest": others.logsumexp(-1),
            "teacher_label_log_prob": torch.log_softmax(logits, -1).gather(-1, batch["labels"][0][:, None])[:, 0],
        }.items():
            got = torch.tensor(np.array(row[name], dtype=np.float64))
            torch.testing.assert_close(
                got, expected, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )


# ---- the labels ----


@pytest.mark.parametrize("batch_size", [1, 3, CLIPS])
def test_the_labels_are_the_teachers_whatever_the_batch(teacher, collator, clips, tmp_path, batch_size, capsys):
    labeled = label(tmp_path / "cache", clips, collator, teacher, batch_size)
    assert labeled.column_names == clips.column_names + list(SOFT_LABEL_COLUMNS) and len(labeled) == CLIPS
    assert_plain(labeled, teacher, collator)
    assert (
        f"cache: {CLIPS} clips, 0.0 MB of soft labels on disk besides the audio (0 of {CLIPS} cached)"
        in capsys.readouterr().out
    )


def test_other_temperatures_and_numbers_of_tokens(teacher, collator, clips, tmp_path):
    labeled = label(tmp_path / "cache", clips, collator, teacher, temperature=1.0, top_k=30)
    assert_plain(labeled, teacher, collator, 30, 1.0)


def test_from_cached_encoder_outputs_they_are_the_same(teacher, processor, collator, clips, tmp_path):
    options = dict(batch_size=4, device=torch.device("cpu"), dtype=torch.float32)
    cache = cache_encoder(teacher, processor, [clips], tmp_path / "encoder", **options)
    calls = []
    teacher.model.encoder.register_forward_hook(lambda *_: calls.append(1))
    labeled = label(tmp_path / "cache", clips, SpeechCollator(processor, teacher.config, cache), teacher)
    assert calls == []
    assert_plain(labeled, teacher, collator, tolerance=5e-3)


def test_in_bfloat16_they_are_the_same_up_to_its_rounding(processor, collator, clips, tmp_path):
    labeled = {}
    for name, options in {
        "autocast": dict(autocast=torch.bfloat16),
        "cast": dict(dtype=torch.bfloat16, autocast=torch.bfloat16),
        "cast alone": dict(dtype=torch.bfloat16),
        "float32": dict(),
    }.items():
        model = make_whisper(processor).eval().to(options.get("dtype", torch.float32))
        labeled[name] = label(tmp_path / name, clips, collator, model, **options)
    exact = labeled.pop("float32")
    for dataset in labeled.values():
        pairs = zip(dataset["teacher_label_log_prob"], exact["teacher_label_log_prob"], strict=True)
        differences = np.abs(np.concatenate([np.array(a) - np.array(b) for a, b in pairs]))
        assert 1e-4 < differences.mean() < 0.1


def test_batches_from_worker_processes(teacher, collator, clips, tmp_path):
    labeled = label(tmp_path / "cache", clips, collator, teacher, num_workers=1)
    assert rows(labeled) == rows(label(tmp_path / "other", clips, collator, teacher))


def test_a_batch_has_the_labels_of_its_clips_padded(teacher, collator, clips, tmp_path):
    labeled = label(tmp_path / "cache", clips, collator, teacher)
    batch = collator([labeled[3], labeled[0]])
    length = batch["labels"].shape[1]
    for name in TEACHER_COLUMNS:
        column = batch[name]
        assert column.shape == ((2, length, TOP_K) if name in TEACHER_COLUMNS[:2] else (2, length))
        assert column.dtype == (torch.int64 if name == "teacher_token_ids" else torch.float32)
        for i, row in enumerate((3, 0)):
            values = torch.tensor(np.array(labeled[row][name], dtype=np.float64))
            assert torch.equal(column[i][batch["labels"][i] != -100].double(), values)


def test_a_teacher_that_gives_nan_is_an_error_that_names_the_clip(teacher, collator, clips, tmp_path):
    second = collator([clips[1]])["input_features"]

    def spoil(module, args, kwargs):
        features = kwargs["input_features"].clone()
        features[[torch.equal(clip, second[0]) for clip in features]] = torch.nan
        return args, kwargs | {"input_features": features}

    teacher.register_forward_pre_hook(spoil, with_kwargs=True)
    with pytest.raises(UserError, match=r"^the teacher's logits are not finite for audio/001\.wav: check"):
        label(tmp_path / "cache", clips, collator, teacher)
    assert not (tmp_path / "cache").exists()


def test_a_label_that_the_teacher_rules_out_is_an_error_that_names_the_clip(
    teacher, collator, clips, tmp_path, monkeypatch
):
    """Its cross-entropy would be infinite, although the most probable tokens are finite."""

    def ruled_out(teacher, batch, *args):
        target = compute_soft_labels(teacher, batch, *args)
        first = int((batch["labels"][0] != -100).sum())
        target.label_log_prob[first] = -torch.inf
        return target

    monkeypatch.setattr(teacher_cache, "compute_soft_labels", ruled_out)
    with pytest.raises(UserError, match=r"^the teacher's logits are not finite for audio/001\.wav: check"):
        label(tmp_path / "cache", clips.select(range(2)), collator, teacher, batch_size=2)


# ---- what is there already ----


def test_a_second_call_computes_nothing_and_writes_nothing(teacher, collator, clips, tmp_path, capsys):
    first = label(tmp_path / "cache", clips, collator, teacher)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*")}

    def never():
        raise AssertionError("the teacher isn't needed")

    capsys.readouterr()
    for dataset in (clips, clips.select([4, 1]), first):  # a part of it, and what has labels already
        again = cache_teacher(never, settings(teacher, "renamed"), dataset, collator, tmp_path / "cache", batch_size=2)
        assert again["clip"][:] == dataset["clip"][:]
        assert rows(again).items() <= rows(first).items()
        assert f"({len(dataset)} of {len(dataset)} cached)" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*")} == before
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "speech"}


def test_rows_in_another_order_and_twice_get_their_own_labels(teacher, collator, clips, tmp_path):
    first = label(tmp_path / "cache", clips, collator, teacher)
    order = [6, 0, 3, 3, 2, 5, 1, 4, 0]
    again = label(tmp_path / "cache", clips.select(order), collator, teacher)
    assert again["clip"][:] == clips.select(order)["clip"][:]
    for row, i in zip(again, order, strict=True):
        assert row == first[i]
    sizes = transcribed_by(teacher)
    twice = label(tmp_path / "new", clips.select(order), collator, teacher)
    assert sum(sizes) == CLIPS and len(load_from_disk(tmp_path / "new")) == CLIPS
    assert twice["teacher_token_ids"][:] == again["teacher_token_ids"][:]


def test_only_new_and_changed_clips_are_labeled(teacher, collator, folder, tmp_path, capsys):
    all_clips = speech(folder)
    first = label(tmp_path / "cache", all_clips.select(range(5)), collator, teacher)
    sizes = transcribed_by(teacher)
    second = label(tmp_path / "cache", all_clips, collator, teacher)
    assert sum(sizes) == 2 and "(5 of 7 cached)" in capsys.readouterr().out
    assert rows(first).items() <= rows(second).items()
    metadata = folder / "metadata.csv"
    lines = metadata.read_text().splitlines()
    lines[2] = "audio/001.wav,fed"
    metadata.write_text("\n".join(lines) + "\n")
    shutil.copy(folder / "audio" / "003.wav", folder / "audio" / "004.wav")
    changed = speech(folder)
    third = label(tmp_path / "cache", changed, collator, teacher)
    assert sum(sizes) == 2 + 2 and "(5 of 7 cached)" in capsys.readouterr().out
    assert_plain(third, teacher, collator)
    same = {f"audio/{i:03d}.wav" for i in (0, 2, 3, 5, 6)}
    assert {clip for clip, row in rows(third).items() if row == rows(second)[clip]} == same
    # the old ones are still there for the old data
    label(tmp_path / "cache", all_clips, collator, teacher)
    assert sum(sizes) == 4 and len(load_from_disk(tmp_path / "cache")) == CLIPS + 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(temperature=3.0), r"temperature 2\.0 \(now 3\.0\)\. Use the same settings, or choose another"),
        (dict(top_k=4), r"top_k 5 \(now 4\)"),
        (dict(dtype=torch.bfloat16), r"computed_in float32 \(now bfloat16\)"),
        (dict(top_k=4, name="x", temperature=1.0), r"teacher tiny \(now x\), top_k 5 \(now 4\), temperature 2\.0"),
    ],
    ids=str,
)
def test_labels_made_otherwise_are_refused(teacher, collator, clips, tmp_path, changes, message):
    label(tmp_path / "cache", clips, collator, teacher)
    with pytest.raises(UserError, match=rf"--teacher_cache_dir \S+cache was created with .*{message}"):
        label(tmp_path / "cache", clips, collator, teacher, **changes)


def test_another_teacher_is_refused_whatever_its_name(processor, teacher, collator, clips, tmp_path):
    label(tmp_path / "cache", clips, collator, teacher)
    with torch.no_grad():
        teacher.model.decoder.layers[1].fc1.bias[3] += 1e-3
    with pytest.raises(UserError, match=r"was created with another vocabulary \(.*\) or other weights of tiny\. Use"):
        label(tmp_path / "cache", clips, collator, teacher)
    with pytest.raises(UserError, match=r"was created with teacher tiny \(now x\), weights \w{32} \(now \w{32}\)"):
        label(tmp_path / "cache", clips, collator, teacher, name="x")
    label(tmp_path / "cache", clips, collator, make_whisper(processor).eval(), name="the same elsewhere")


def test_directories_with_something_else_are_refused(teacher, collator, clips, tmp_path):
    clips.save_to_disk(tmp_path / "plain")
    with pytest.raises(UserError, match=r"plain contains a dataset without soft labels: choose another directory"):
        label(tmp_path / "plain", clips, collator, teacher)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("precious")
    with pytest.raises(UserError, match="notes contains other files: choose another directory"):
        label(tmp_path / "notes", clips, collator, teacher)
    assert (tmp_path / "notes" / "a.txt").read_text() == "precious"
    label(tmp_path / "cache", clips, collator, teacher)
    with pytest.raises(UserError, match=r"cache has clips with other types of the columns duration than this dataset"):
        label(tmp_path / "cache", clips.cast_column("duration", Value("float32")), collator, teacher)
    (tmp_path / "empty").mkdir()
    assert len(label(tmp_path / "empty", clips, collator, teacher)) == CLIPS
    (file,) = (tmp_path / "cache").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(
        UserError, match=r"cache is incomplete or damaged \(.*\): remove it; its clips are labeled again"
    ):
        label(tmp_path / "cache", clips, collator, teacher)


def test_rows_of_earlier_commands_are_counted(tmp_path, monkeypatch, capfd):
    """After a transcript is corrected the cache has both, and `--dataset` would train on both."""
    processor = make_processor()
    make_whisper(processor).save_pretrained(tmp_path / "teacher")
    processor.save_pretrained(tmp_path / "teacher")
    folder = write_speech(tmp_path / "speech", 4)
    options = "--use_cpu", "--teacher", tmp_path / "teacher", "--dataset", folder, "--teacher_top_k", 5
    script = load_script(SCRIPT)

    def labeled() -> Ended:
        return run_here(monkeypatch, capfd, *options, "--teacher_cache_dir", tmp_path / "cache", script=script)

    first = labeled()
    assert first.returncode == 0 and "4 labeled clips" in first.stdout and "warning" not in first.stderr, first.stderr
    rows = (folder / "metadata.csv").read_text().splitlines()
    (folder / "metadata.csv").write_text("\n".join([*rows[:-1], rows[-1].partition(",")[0] + ",nine", rows[1]]))
    second = labeled()
    assert "4 labeled clips" in second.stdout  # the row that is there twice is one
    assert "cache also has 1 rows of earlier commands" in second.stderr
    assert len(load_from_disk(str(tmp_path / "cache"))) == 5


# ---- interrupted passes ----


RUN = ROOT / "tests" / "support" / "teacher_cache_run.py"
SCRIPT = ROOT / "examples" / "cache_teacher.py"


def test_a_pass_that_was_killed_goes_on(teacher, collator, folder, clips, tmp_path, small_parts):
    done = run_there(RUN, folder, tmp_path / "cache", "labelling")
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert not (tmp_path / "cache").exists()
    half = tmp_path / "cache.unfinished" / "part-000-00002.saving"
    half.mkdir()
    (half / "data-00000-of-00001.arrow").write_bytes(b"half a part")
    sizes = transcribed_by(teacher)
    label(tmp_path / "cache", clips, collator, teacher)
    assert sum(sizes) == CLIPS - 2 * BATCH
    label(tmp_path / "whole", clips, collator, teacher)
    resumed, whole = (load_from_disk(tmp_path / name) for name in ("cache", "whole"))
    assert resumed.features == whole.features and resumed.to_dict() == whole.to_dict()
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "whole", "speech"}


def test_a_killed_pass_goes_on_with_joined_clips_and_then_without(
    teacher, collator, folder, clips, tmp_path, small_parts
):
    done = run_there(RUN, folder, tmp_path / "cache", "labelling")
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    joined = with_concatenated(clips, 0.5, 1.5, 20, seed=0)
    sizes = transcribed_by(teacher)
    labeled = label(tmp_path / "cache", joined, collator, teacher)
    assert sum(sizes) == len(joined) - 2 * BATCH and len(joined) > CLIPS
    assert_plain(labeled.select(range(CLIPS)), teacher, collator)
    assert labeled["joined_keys"][:] == joined["joined_keys"][:]
    sizes.clear()
    assert_plain(label(tmp_path / "cache", clips, collator, teacher), teacher, collator)
    assert sizes == []


@pytest.mark.parametrize("killed", [False, True])
def test_a_column_more_or_less_keeps_the_labels(teacher, collator, folder, clips, tmp_path, small_parts, killed):
    """Such as that of the speaker, which speech in a mix may lack."""
    if killed:
        run_there(RUN, folder, tmp_path / "cache", "labelling")
    else:
        label(tmp_path / "cache", clips, collator, teacher)
    sizes = transcribed_by(teacher)
    for dataset in (replace_column(clips, "speaker", ["x"] * CLIPS), clips):
        labeled = label(tmp_path / "cache", dataset, collator, teacher)
        assert_plain(labeled.select_columns(sorted({*labeled.column_names} - {"speaker"})), teacher, collator)
    assert sum(sizes) == (CLIPS - 2 * BATCH if killed else 0)


def test_parts_with_other_types_are_named_before_the_teacher_runs(
    teacher, collator, folder, clips, tmp_path, small_parts
):
    run_there(RUN, folder, tmp_path / "cache", "labelling")
    before = sorted(tmp_path.rglob("*"))
    sizes = transcribed_by(teacher)
    with pytest.raises(UserError, match=r"cache.unfinished has clips of an interrupted run with other types of"):
        label(tmp_path / "cache", clips.cast_column("duration", Value("float32")), collator, teacher)
    assert sizes == [] and sorted(tmp_path.rglob("*")) == before


def test_a_part_that_a_kill_interrupts_is_computed_again(teacher, collator, folder, clips, tmp_path, small_parts):
    """A thread writes the second part while the third is computed. The first one is complete, the second absent."""
    done = run_there(RUN, folder, tmp_path / "cache", "writing")
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert sorted(part.name for part in (tmp_path / "cache.unfinished").glob("part-*")) == [
        "part-000-00000",
        "part-000-00001.saving",
    ]
    sizes = transcribed_by(teacher)
    assert_plain(label(tmp_path / "cache", clips, collator, teacher), teacher, collator)
    assert sum(sizes) == CLIPS - BATCH
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "speech"}


def test_the_next_part_is_computed_while_a_thread_writes(monkeypatch, teacher, collator, clips, tmp_path, small_parts):
    """And no more than that: with it, the pass waits for the thread."""
    write, batches, computed = teacher_cache._write_part, transcribed_by(teacher), []

    def write_late(*arguments):
        deadline = time.monotonic() + 10
        while len(batches) < min(len(computed) + 2, 4) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        computed.append(len(batches))
        write(*arguments)

    monkeypatch.setattr(teacher_cache, "_write_part", write_late)
    assert_plain(label(tmp_path / "cache", clips, collator, teacher), teacher, collator)
    assert computed == [2, 3, 4, 4]  # batches, of 4, when each part is written


@pytest.mark.parametrize(("failing", "missing"), [(2, BATCH + CLIPS % BATCH), (4, CLIPS % BATCH)])
def test_a_part_that_cannot_be_written_ends_the_pass(
    monkeypatch, teacher, collator, clips, tmp_path, small_parts, failing, missing
):
    """The part after it, which is computed by then, is written; so is every part before the last."""
    write, parts = teacher_cache._write_part, []

    def write_or_fail(*arguments):
        parts.append(arguments)
        if len(parts) == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*arguments)

    monkeypatch.setattr(teacher_cache, "_write_part", write_or_fail)
    with pytest.raises(UserError, match=r"cache: No space left on device\. .*earlier results are kept"):
        label(tmp_path / "cache", clips, collator, teacher)
    sizes = transcribed_by(teacher)
    assert_plain(label(tmp_path / "cache", clips, collator, teacher), teacher, collator)
    assert sum(sizes) == missing


@pytest.mark.parametrize("where", ["saving", "cleaning up"])
def test_a_pass_that_was_killed_while_it_saved_goes_on(teacher, collator, folder, clips, tmp_path, small_parts, where):
    label(tmp_path / "cache", clips.select(range(3)), collator, teacher)
    done = run_there(RUN, folder, tmp_path / "cache", where)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert len(load_from_disk(tmp_path / "cache")) == (3 if where == "saving" else CLIPS)
    assert len(list((tmp_path / "cache").glob("*.arrow"))) > 1 and (tmp_path / "cache.unfinished").exists()
    sizes = transcribed_by(teacher)
    again = label(tmp_path / "cache", clips, collator, teacher)
    assert sizes == []  # all parts were done
    assert_plain(again, teacher, collator)
    other = speech(write_speech(tmp_path / "more", 2, seed=9))
    label(tmp_path / "cache", other, collator, teacher)
    assert len(load_from_disk(tmp_path / "cache")) == CLIPS + 2
    listed = json.loads((tmp_path / "cache" / "state.json").read_text())["_data_files"]
    assert sorted(file.name for file in (tmp_path / "cache").glob("*.arrow")) == sorted(f["filename"] for f in listed)
    left = {"cache", "speech", "more"}
    assert {path.name for path in tmp_path.iterdir()} == left


def test_added_clips_leave_the_stored_files_alone(teacher, collator, clips, tmp_path):
    first = label(tmp_path / "cache", clips, collator, teacher)
    before = {file: (file.stat().st_ino, file.read_bytes()) for file in (tmp_path / "cache").glob("*.arrow")}
    expected = rows(first)
    other = speech(write_speech(tmp_path / "more", 2, seed=9))
    added = label(tmp_path / "cache", other, collator, teacher)
    assert {file: (file.stat().st_ino, file.read_bytes()) for file in before} == before
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == len(before) + 1
    assert rows(first) == expected == rows(label(tmp_path / "cache", clips, collator, teacher))  # a run that reads it
    assert_plain(added, teacher, collator)


def test_joined_clips_given_later_leave_the_stored_audio_alone(teacher, collator, clips, tmp_path):
    """They have two more columns. No process writes the audio that is there again, while the others wait."""
    label(tmp_path / "cache", clips, collator, teacher)
    before = {file.stat().st_ino: file.read_bytes() for file in (tmp_path / "cache").glob("*.arrow")}
    joined = with_concatenated(clips, 0.5, 1.5, 20, seed=0)
    labeled = label(tmp_path / "cache", joined, collator, teacher)
    after = {file.stat().st_ino: file.read_bytes() for file in (tmp_path / "cache").glob("*.arrow")}
    assert after.items() >= before.items()
    label(tmp_path / "whole", joined, collator, teacher)
    assert sum(map(len, after.values())) < 1.3 * sum(file.stat().st_size for file in (tmp_path / "whole").iterdir())
    assert_plain(labeled.select(range(CLIPS)), teacher, collator)
    names = ["teacher_key", "teacher_token_ids", "joined_keys", "more_audio", "audio", "text"]
    expected = rows(load_from_disk(tmp_path / "whole"), names)
    saved = load_from_disk(tmp_path / "cache")
    assert rows(labeled, names) == rows(saved, names) == rows(pickle.loads(pickle.dumps(saved)), names) == expected
    other = speech(write_speech(tmp_path / "more", 2, seed=9))  # without these columns
    assert_plain(label(tmp_path / "cache", other, collator, teacher), teacher, collator)
    both = load_from_disk(tmp_path / "cache")
    assert len(both) == len(joined) + 2 and both.features == saved.features


def test_a_dataset_with_former_names_is_written_again_with_new_clips(teacher, collator, clips, tmp_path):
    label(tmp_path / "first", clips.select(range(3)), collator, teacher)
    former = load_from_disk(tmp_path / "first").rename_column("duration", "seconds")
    former.save_to_disk(tmp_path / "cache")
    assert_plain(label(tmp_path / "cache", clips, collator, teacher), teacher, collator)
    label(tmp_path / "whole", clips, collator, teacher)
    again, whole = (load_from_disk(tmp_path / name) for name in ("cache", "whole"))
    assert again.features == whole.features
    assert rows(again, ["audio", "duration", "text"]) == rows(whole, ["audio", "duration", "text"])


def test_a_disk_without_links_gets_copies(monkeypatch, teacher, collator, clips, tmp_path):
    def no_links(*_):
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", no_links)
    assert_plain(label(tmp_path / "cache", clips, collator, teacher), teacher, collator)


def test_parts_of_another_teacher_are_not_taken(processor, teacher, collator, folder, clips, tmp_path):
    label(tmp_path / "other", clips, collator, make_whisper(processor, seed=8).eval())
    (tmp_path / "cache.unfinished").mkdir()
    (tmp_path / "other").rename(tmp_path / "cache.unfinished" / "part-000-00000")
    with pytest.raises(UserError, match=r"cache\.unfinished was created with another vocabulary"):
        label(tmp_path / "cache", clips, collator, teacher)


def test_a_second_run_waits_for_the_first_and_takes_its_labels(teacher, collator, folder, clips, tmp_path):
    """It starts when the first one has begun and asks for its teacher."""
    started = []

    def load_teacher():
        started.append(start(RUN, folder, tmp_path / "cache"))
        started[0].wait_until(lambda: "cache.unfinished is in use by another run: waiting" in started[0].printed())
        return teacher

    first = cache_teacher(load_teacher, settings(teacher), clips, collator, tmp_path / "cache", batch_size=BATCH)
    assert_plain(first, teacher, collator)
    ended = started[0].ended()
    assert ended.returncode == 0 and "process 0: 0 clips" in ended.stdout, ended.stderr[-3000:]
    assert rows(label(tmp_path / "cache", clips, collator, teacher)) == rows(first)
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "speech"}


def test_rows_that_another_run_adds_before_this_one_writes_are_kept(
    monkeypatch, teacher, collator, clips, tmp_path, small_parts
):
    """The other run begins after this one has looked what is missing, and ends before it writes."""
    half, locks = clips.select(range(CLIPS // 2)), []

    def locked_late(*arguments):
        if not locks:
            locks.append(arguments)
            label(tmp_path / "cache", half, collator, teacher)
        return locked_for(*arguments)

    monkeypatch.setattr(teacher_cache, "locked_for", locked_late)
    sizes = transcribed_by(teacher)
    rest = clips.select(range(2, CLIPS))
    assert_plain(label(tmp_path / "cache", rest, collator, teacher), teacher, collator)
    assert sum(sizes) == CLIPS
    assert sorted(load_from_disk(tmp_path / "cache")["clip"]) == sorted(clips["clip"])


def test_a_run_that_begins_while_the_parts_are_removed_is_not_in_the_way(
    monkeypatch, teacher, collator, clips, tmp_path
):
    remove, begun = shutil.rmtree, []

    def remove_slowly(path, *args, **options):
        if path.exists() and path.parent == tmp_path:
            begun.append(path)
            with locked(tmp_path / "cache.unfinished"):
                pass
        remove(path, *args, **options)

    monkeypatch.setattr(teacher_cache.shutil, "rmtree", remove_slowly)
    label(tmp_path / "cache", clips, collator, teacher)
    monkeypatch.undo()
    assert len(begun) == 1
    other = label(tmp_path / "cache", clips, collator, teacher)
    assert_plain(other, teacher, collator)


def test_two_processes_give_the_labels_of_one_to_the_bit(teacher, collator, folder, clips, tmp_path, small_parts):
    """Each has a part of the batches that one has, so that clips are padded to the same length."""
    for name in ("one", "two"):
        label(tmp_path / name, clips.select(range(1)), collator, teacher)
    label(tmp_path / "one", clips, collator, teacher)
    (tmp_path / "two").rename(tmp_path / "two.replaced")  # and the process that did so was killed
    done = launch_two(RUN, folder, tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(f"(1 of {CLIPS} cached)") == 1
    # the two may print into each other's lines
    assert sorted(re.findall(r"process (\d): (\d) clips", done.stdout)) == [("0", "4"), ("1", "2")]
    one, two = (load_from_disk(tmp_path / name) for name in ("one", "two"))
    assert one.features == two.features and len(two) == CLIPS
    assert rows(two, two.column_names) == rows(one, one.column_names)
    assert_plain(two, teacher, collator)
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two", "speech"}


@pytest.mark.parametrize(("before", "after"), [(2, 1), (3, 2)])
def test_a_pass_resumed_by_another_number_of_processes_has_the_same_bits(
    teacher, collator, tmp_path, small_parts, before, after
):
    folder = write_speech(tmp_path / "speech", 17)
    whole = label(tmp_path / "whole", speech(folder), collator, teacher)
    done = launch(before, RUN, folder, tmp_path / "cache", "labelling")  # each kills itself in its third batch
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    left = [load_from_disk(part) for part in (tmp_path / "cache.unfinished").glob("part-*") if not part.suffix]
    assert 0 < sum(map(len, left)) <= before * 2 * BATCH
    done = launch(after, RUN, folder, tmp_path / "cache")
    assert done.returncode == 0, done.stderr[-3000:]
    assert rows(load_from_disk(tmp_path / "cache")) == rows(whole)


def test_the_script_in_two_processes_writes_the_labels_of_one(teacher_dir, speech_dir, tmp_path):
    options = f"--teacher {teacher_dir} --dataset {speech_dir} --language en --use_cpu --teacher_top_k 5"
    options += " --per_device_eval_batch_size 3"
    found = []
    for processes in (1, 2):
        directory = tmp_path / f"by {processes}"
        done = launch(processes, SCRIPT, *options.split(), "--teacher_cache_dir", directory)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("16 labeled clips: --dataset") == 1
        found.append(load_from_disk(directory))
    assert len(found[0]) == len(found[1]) == 16
    assert rows(found[1], found[1].column_names) == rows(found[0], found[0].column_names)


# ---- the saved dataset ----


def test_it_is_a_dataset_of_its_own_with_the_audio_in_it(teacher, collator, folder, clips, tmp_path):
    labeled = label(tmp_path / "cache", clips, collator, teacher)
    shutil.rmtree(folder)
    load_from_disk(tmp_path / "cache").to_parquet(tmp_path / "cache.parquet")
    shutil.copytree(tmp_path / "cache", tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "cache")
    for name in ("elsewhere", "cache.parquet"):
        loaded = load_speech_dataset(str(tmp_path / name), None, "train")
        loaded = filter_invalid_clips(loaded, collator.label_ids, Limits(1.0, 20), on_bad_audio="error")
        assert {column: loaded.features[column] for column in SOFT_LABEL_COLUMNS} == dict(SOFT_LABEL_FEATURES)
        assert str(loaded.features["teacher_token_ids"]) == "List(List(Value('uint16')))"
        assert str(loaded.features["teacher_log_probs"]) == "List(List(Value('float16')))"
        assert rows(loaded) == rows(labeled)
        assert loaded["audio_key"][:] == clips["audio_key"][:]
        check_soft_labels(loaded, collator, TEMPERATURE, settings(teacher, "any name", top_k=9))
        assert_plain(loaded, teacher, collator)
    hub = load_dataset("parquet", data_files=str(tmp_path / "cache.parquet"), cache_dir=str(tmp_path), split="train")
    assert {column: hub.features[column] for column in SOFT_LABEL_COLUMNS} == dict(SOFT_LABEL_FEATURES)


def test_labels_that_do_not_belong_to_the_run_are_refused(processor, teacher, collator, clips, tmp_path):
    labeled = label(tmp_path / "cache", clips, collator, teacher)
    check_soft_labels(labeled, collator, TEMPERATURE, None)
    with pytest.raises(
        UserError, match=r"temperature 2, the run's is 1\. Change the run's options, or compute its soft labels again"
    ):
        check_soft_labels(labeled, collator, 1.0, None)
    other = make_whisper(processor, seed=8)
    with pytest.raises(UserError, match=r"computed with another teacher \(tiny\)"):
        check_soft_labels(labeled, collator, TEMPERATURE, settings(other))
    larger = SpeechCollator(processor, make_whisper(processor, vocab_size=40).config)
    with pytest.raises(UserError, match=r"with 31 tokens in the vocabulary, the student has 40"):
        check_soft_labels(labeled, larger, TEMPERATURE, None)
    edited = replace_column(labeled, "text", ["ab", *labeled["text"][1:5], "abc", "abcd"])
    with pytest.raises(
        UserError, match=r"^the audio or label tokens of 3 of 7 rows differ .* row 0, audio/000\.wav: compute"
    ):
        check_soft_labels(edited, collator, TEMPERATURE, None)
    swapped = replace_column(labeled, "audio_key", [*labeled["audio_key"][:5], *labeled["audio_key"][:4:-1]])
    with pytest.raises(UserError, match=r"^the audio or label tokens of 2 of 7 rows"):
        check_soft_labels(swapped, collator, TEMPERATURE, None)
    mixed = concatenate_datasets([labeled, label(tmp_path / "other", clips, collator, teacher, temperature=3.0)])
    with pytest.raises(UserError, match="with temperature 3, the run's is 2"):
        check_soft_labels(mixed, collator, TEMPERATURE, None)


# ---- of an older version ----


def made_before_the_space(labeled: Dataset) -> Dataset:
    """As caches were when labels had no space in front and nothing was said of the features."""
    said = json.loads(labeled["teacher_settings"][0])
    old = json.dumps({name: value for name, value in said.items() if name not in ("labels", "features")})
    return replace_column(labeled, "teacher_settings", [old] * len(labeled)).select_columns(labeled.column_names)


def test_labels_of_texts_without_the_space_are_refused(teacher, collator, clips, tmp_path):
    labeled = label(tmp_path / "new", clips, collator, teacher)
    made_before_the_space(labeled).save_to_disk(tmp_path / "old")
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "old").iterdir()}
    sizes = transcribed_by(teacher)
    with pytest.raises(
        UserError,
        match=r"old has soft labels of an earlier version .* without Whisper's leading space.*choose another dir",
    ):
        label(tmp_path / "old", clips, collator, teacher)
    assert not sizes and {file.name: file.stat().st_mtime_ns for file in (tmp_path / "old").iterdir()} == before
    with pytest.raises(
        UserError, match=r"^the dataset has soft labels of an earlier version .*: compute its soft labels again"
    ):
        check_soft_labels(load_from_disk(tmp_path / "old"), collator, TEMPERATURE, None)
    odd = replace_column(labeled, "teacher_settings", ["yes"] * len(labeled))
    with pytest.raises(UserError, match="column teacher_settings contains 'yes'"):
        check_soft_labels(odd, collator, TEMPERATURE, None)


def test_other_features_of_the_same_teacher_are_refused(teacher, collator, clips, processor, tmp_path):
    louder = WhisperFeatureExtractor(feature_size=8, chunk_length=1, n_fft=512)
    theirs, ours = (
        teacher_settings(teacher, "tiny", TOP_K, TEMPERATURE, torch.float32, extractor=extractor)
        for extractor in (louder, processor.feature_extractor)
    )
    options = dict(batch_size=BATCH, num_workers=0)
    labeled = cache_teacher(lambda: teacher, ours, clips, collator, tmp_path / "cache", **options)
    with pytest.raises(UserError, match="cache was created with other features"):
        cache_teacher(lambda: teacher, theirs, clips, collator, tmp_path / "cache", **options)
    check_soft_labels(labeled, collator, TEMPERATURE, ours)
    with pytest.raises(UserError, match=r"with other features \(preprocessor_config\.json\)"):
        check_soft_labels(labeled, collator, TEMPERATURE, theirs)


def test_pushed_labels_have_no_paths_of_this_machine():
    made_by = [json.dumps({"teacher": "/home/me/models/large", "top_k": 8})] * 2
    labeled = Dataset.from_dict({"clip": ["/home/me/a.wav", "b.wav"], SETTINGS_COLUMN: made_by, "text": ["x", "y"]})
    pushed = publishable(labeled)
    assert pushed["clip"][:] == ["a.wav", "b.wav"] and pushed["text"][:] == ["x", "y"]
    assert [json.loads(one) for one in pushed[SETTINGS_COLUMN]] == [{"teacher": "large", "top_k": 8}] * 2
