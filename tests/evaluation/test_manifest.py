"""Manifests: resuming, truncation, and lines of other settings."""

import dataclasses
import json

import pytest
from manifests import SETTINGS

from askd_hf.errors import UserError
from askd_hf.evaluation.manifest import Manifest, read_manifests


def line(i: int) -> dict:
    return dict(
        clip=f"{i}.wav", reference="a\u2028b\r é", prediction="a", duration=1.5, transcription_time=0.1, tokens=2
    )


@pytest.fixture
def manifest(tmp_path) -> Manifest:
    """Two batches of 4; the second one has 3 lines and a partial one."""
    manifest = Manifest(tmp_path, "student", "set.1")
    assert manifest.prepare(SETTINGS, batch_size=4) == 0
    manifest.append([line(i) for i in range(4)])
    manifest.append([line(i) for i in range(4, 7)])
    with manifest.lines_file.open("ab") as file:
        file.write(json.dumps(line(7)).encode()[:20])
    return manifest


def test_a_partial_batch_is_truncated(manifest):
    before = manifest.lines_file.read_bytes().splitlines(keepends=True)[:4]
    assert len(manifest.rows()) == 7
    assert manifest.prepare(SETTINGS, batch_size=4) == 4
    assert manifest.lines_file.read_bytes() == b"".join(before)
    manifest.append([line(i) for i in range(4, 8)])
    assert manifest.rows() == [line(i) for i in range(8)]


def test_zeros_after_a_power_failure_are_ignored(manifest):
    with manifest.lines_file.open("ab") as file:
        file.write(b"\0" * 50 + b"\n" + json.dumps(line(8)).encode() + b"\n")
    assert len(manifest.rows()) == 7


def test_complete_means_all_rows(manifest):
    manifest.prepare(SETTINGS, batch_size=4)
    assert not manifest.metadata().complete
    manifest.append([line(i) for i in range(4, 10)])
    manifest.finish()
    assert manifest.metadata() == dataclasses.replace(SETTINGS, complete=True)
    today = dataclasses.replace(SETTINGS, runtime=dict(batch_size=8, device="cuda"))
    assert manifest.prepare(today, batch_size=8) == 10  # the last 10 % 8 lines are kept
    assert manifest.metadata() == dataclasses.replace(SETTINGS, complete=True)  # with the runtime of the first run


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(weights="1111"), r"the model's weights \(of runs/tiny, now runs/tiny\)"),
        (dict(data="1111", rows=11), r"the clips or their transcripts \(10 clips, now 11\)"),
        (dict(data="1111"), "the clips or their transcripts"),
        (dict(decoding={**SETTINGS.decoding, "num_beams": 5}), r"the decoding settings \(num_beams 1, now 5\)"),
        (dict(method="chunked"), r"the method \(short_form, now chunked\)"),
        (dict(set={**SETTINGS.set, "language": "fr"}), r"the set \(language en, now fr\)"),
    ],
)
def test_other_settings_raise_unless_overwritten(manifest, change, message):
    before = manifest.lines_file.read_bytes()
    other = dataclasses.replace(SETTINGS, **change)
    with pytest.raises(
        UserError, match=rf"set\.1\.jsonl was created with different settings.*{message}.*--output_dir.*--overwrite"
    ):
        manifest.prepare(other, batch_size=4)
    assert manifest.lines_file.read_bytes() == before
    assert manifest.metadata() == SETTINGS
    assert manifest.prepare(other, batch_size=4, overwrite=True) == 0
    assert manifest.rows() == []
    assert manifest.metadata() == other


def test_parts_of_other_weights_are_removed(manifest):
    """Several processes that were killed left them."""
    manifest.parts.mkdir()
    (manifest.parts / "0.jsonl").write_text(json.dumps(dict(first=0, lines=[line(i) for i in range(4)])) + "\n")
    manifest.prepare(SETTINGS, batch_size=4)
    assert manifest.parts.exists()
    manifest.prepare(dataclasses.replace(SETTINGS, weights="1111"), batch_size=4, overwrite=True)
    assert not manifest.parts.exists()


def test_name_of_the_model_and_runtime_may_differ(manifest):
    moved = dataclasses.replace(
        SETTINGS,
        model=dataclasses.replace(SETTINGS.model, name="elsewhere"),
        runtime=dict(batch_size=3, device="cuda"),
    )
    assert manifest.prepare(moved, batch_size=3) == 6
    assert manifest.metadata().model.name == "elsewhere"


def test_all_batch_sizes_are_recorded(manifest):
    """7 lines were decoded with batch size 4. The rest is decoded with batch size 1, and interrupted again."""
    alone = dataclasses.replace(SETTINGS, runtime=dict(batch_size=1, device="cpu"))
    for _ in range(2):
        assert manifest.prepare(alone, batch_size=1) == 7
        assert manifest.metadata().runtime == dict(batch_size="4, 1", device="cpu")


def test_the_location_of_the_dataset_may_differ(manifest):
    elsewhere = dataclasses.replace(SETTINGS, set={**SETTINGS.set, "dataset": "./speech", "on_hub": True})
    assert manifest.prepare(elsewhere, batch_size=4) == 4
    assert manifest.metadata().set["dataset"] == "./speech"


def test_metadata_of_earlier_versions_is_read(manifest):
    old = json.loads(manifest.metadata_file.read_text())
    old["facts"], old["run"], old["dropped"] = old.pop("model"), old.pop("runtime"), old.pop("excluded")
    old["facts"]["megabytes"] = old["facts"].pop("size_mb")
    manifest.metadata_file.write_text(json.dumps(old | {"method": "short"}))
    assert manifest.metadata() == SETTINGS
    assert manifest.prepare(SETTINGS, batch_size=4) == 4


def test_lines_without_metadata_are_not_used(manifest):
    manifest.metadata_file.unlink()
    assert manifest.prepare(SETTINGS, batch_size=4) == 0
    assert manifest.rows() == []


def test_manifests_are_found_with_the_student_first_and_the_teacher_last(tmp_path):
    for role in ("teacher", "before", "student"):
        for name in ("b", "a.x"):
            Manifest(tmp_path, role, name).prepare(SETTINGS, batch_size=4)
    (tmp_path / "normalizer.json").write_text("{}")
    found = read_manifests(tmp_path)
    assert {name: list(roles) for name, roles in found.items()} == {
        name: ["student", "before", "teacher"] for name in ("a.x", "b")
    }
    assert list(found) == ["a.x", "b"]
    assert found["a.x"]["before"].lines_file == tmp_path / "before" / "a.x.jsonl"


def test_another_generation_config_is_another_setting(manifest):
    """Suppressed tokens change the texts. Manifests of earlier versions don't have it."""
    new = dataclasses.replace(SETTINGS, generation_config="b")
    manifest.check_metadata(new)
    manifest.prepare(dataclasses.replace(SETTINGS, generation_config="a"), batch_size=4)
    with pytest.raises(UserError, match="different settings: the model's generation config"):
        manifest.check_metadata(new)
    assert manifest.prepare(new, batch_size=4, overwrite=True) == 0
