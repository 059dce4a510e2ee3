"""`--hub_dataset_id` of `examples/cache_teacher.py`, and training on what it pushed, with a Hub on the loopback."""

import json
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from datasets import Dataset, load_from_disk
from fake_hub import Failure, serve_hub
from hub import HubVisit
from models import make_processor, make_whisper
from scripts import ROOT
from speech import write_speech

from askd_hf.data.soft_labels import SOFT_LABEL_COLUMNS
from askd_hf.models.student import init_student

pytestmark = pytest.mark.slow  # five processes, two of which train

WRITER, READER = "hf_tokenThatMayWrite", "hf_tokenThatMayRead"
PARQUET = "data/train-00000-of-00001.parquet"
CLIPS = 16


@dataclass
class Visit(HubVisit):
    labels: list[dict] = field(default_factory=list)  # the labelled rows as they were on disk
    recordings: list[bytes] = field(default_factory=list)

    def losses(self, run: str) -> list[float]:
        state = json.loads((self.folder / run / "trainer_state.json").read_text())
        return [row["loss"] for row in state["log_history"] if "loss" in row]


@pytest.fixture(scope="module")
def visit(tmp_path_factory) -> Iterator[Visit]:
    folder = tmp_path_factory.mktemp("push")
    processor = make_processor()
    teacher, student = make_whisper(processor), init_student(make_whisper(processor, seed=5), decoder_layers=2)
    for name, model in {"teacher": teacher, "student": student}.items():
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    write_speech(folder / "speech", CLIPS)

    labeller, trainer = ROOT / "examples" / "cache_teacher.py", ROOT / "examples" / "distill.py"
    label = f"{labeller} --use_cpu --teacher teacher --dataset speech --teacher_cache_dir labelled --teacher_top_k 8 "
    label += "--hub_dataset_id"
    train = f"{trainer} --use_cpu --student student --max_steps 6 --logging_steps 1 --learning_rate 1e-2 "
    train += "--per_device_train_batch_size 4"
    with serve_hub(folder / "hub", {WRITER: "write", READER: "read"}) as hub:
        visit = Visit(folder, hub)
        visit.run(no_token=(f"{label} me/nothing", None))
        visit.run(reader=(f"{label} me/nothing", READER))
        visit.run(stranger=(f"{label} others/nothing", WRITER))
        assert not (folder / "labelled").exists()
        hub.failures.append(Failure("POST /api/repos/create", status=403))
        visit.run(failed=(f"{label} me/nothing", WRITER))
        visit.run(
            writer=(f"{label} me/labelled", WRITER),
            local=(f"{train} --dataset labelled --output_dir local", None),
        )
        visit.labels = load_from_disk(str(folder / "labelled")).select_columns(["text", *SOFT_LABEL_COLUMNS]).to_list()
        visit.recordings = [file.read_bytes() for file in sorted((folder / "speech" / "audio").iterdir())]
        shutil.rmtree(folder / "labelled")
        shutil.rmtree(folder / "speech")
        visit.run(pushed=(f"{train} --dataset me/labelled --output_dir pushed", READER))
        yield visit


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no_token", "log in with `hf auth login`, or remove --hub_dataset_id"),
        ("reader", "the Hub token has only read access"),
        ("stranger", "others/nothing doesn't exist, and me can't create a repository of others"),
    ],
)
def test_without_the_right_to_write_nothing_is_computed(visit, name, reason):
    assert reason in visit.error(name)
    assert "cached)" not in visit.ended[name].stdout


def test_after_a_failed_push_the_labels_are_kept(visit):
    message = visit.error("failed")
    assert "403 Forbidden" in message
    assert "the labels are safe in labelled: run the same command again" in message
    assert "hf auth login" in message
    assert not (visit.hub.root / "datasets" / "me" / "nothing").exists()


def test_labels_are_not_computed_again_for_another_push(visit):
    assert f"(0 of {CLIPS} cached)" in visit.ended["failed"].stdout
    assert f"({CLIPS} of {CLIPS} cached)" in visit.ended["writer"].stdout


def test_audio_and_labels_arrive_in_a_private_dataset(visit):
    assert visit.ended["writer"].returncode == 0, visit.ended["writer"].stderr
    assert visit.hub.private == {"datasets/me/labelled"}
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{visit.hub.endpoint}/api/datasets/me/labelled")
    (commit,) = visit.hub.commits["datasets/me/labelled"]
    assert set(commit.written) == {PARQUET, "README.md"}
    pushed = Dataset.from_parquet(str(visit.hub.root / "datasets" / "me" / "labelled" / PARQUET), keep_in_memory=True)
    assert [row["bytes"] for row in pushed["audio"]] == visit.recordings
    assert pushed.select_columns(["text", *SOFT_LABEL_COLUMNS]).to_list() == visit.labels
    assert len(visit.labels) == CLIPS


def test_training_on_the_pushed_dataset_is_training_on_the_local_one(visit):
    for name in ("local", "pushed"):
        assert visit.ended[name].returncode == 0, visit.ended[name].stderr
    assert visit.hub.served.count(PARQUET) == 1
    assert visit.losses("pushed") == visit.losses("local")
    assert len(visit.losses("local")) == 6


def test_tokens_are_never_printed(visit):
    for done in visit.ended.values():
        assert not any(token in done.stdout + done.stderr for token in (WRITER, READER))
    assert len(visit.ended) == 7
