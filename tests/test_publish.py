"""Publishing a run, during training and from its directory, with a Hub on the loopback."""

import json
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import Failure, FakeHub, hub_of_this_process, serve_hub
from hub import HubVisit
from huggingface_hub import ModelCard
from models import make_processor, make_whisper
from safetensors.torch import load_file, save_file
from scripts import ROOT
from speech import write_speech

from askd_hf.errors import UserError
from askd_hf.hub.upload import PUBLISHED, published
from askd_hf.hub.upload import publish as publish_run

WRITER, READER = "hf_tokenThatMayWrite", "hf_tokenThatMayRead"
PUSHED = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "normalizer.json",
    "processor_config.json",
    "run.png",
    "tokenizer.json",
    "tokenizer_config.json",
    "training.json",
}
# what a run's directory may hold besides, and nobody else should get
PRIVATE = {
    "training_args.bin": WRITER,
    "optimizer.pt": "x",
    "scheduler.pt": "x",
    "self_teacher.safetensors": "x",
    "blend_state.json": "{}",
    "skipped-training-speech.csv": "row,clip,reason",
    "model.safetensors.tmp": "x",
    ".env": f"HF_TOKEN={WRITER}",
    "log.txt": "x",
    "evaluation/manifests/student/speech.jsonl": "{}",
    "logs/events.out.tfevents": "x",
    "teacher/model.safetensors": "x",
}

# What anyone does who knows nothing but a directory, or the id on the Hub.
LOAD = """
import json, sys
import numpy as np
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor, pipeline

source = sys.argv[1]
model, processor = AutoModelForSpeechSeq2Seq.from_pretrained(source), AutoProcessor.from_pretrained(source)
wave = np.sin(np.arange(16000) / 5).astype(np.float32)
tokens = model.generate(**processor(wave, sampling_rate=16000, return_tensors="pt"), num_beams=1)[0].tolist()
heard = pipeline("automatic-speech-recognition", model=source)({"raw": wave, "sampling_rate": 16000})["text"]
weights = sum(weight.double().sum().item() for weight in model.state_dict().values())
print(json.dumps([tokens, heard, weights, processor.tokenizer.english_spelling_normalizer]))
"""


class Visit(HubVisit):
    def requests(self, pattern: str) -> list[str]:
        return [request for request in self.hub.requests if re.search(pattern, request)]


@pytest.fixture(scope="module")
def visit(tmp_path_factory) -> Iterator[Visit]:
    folder = tmp_path_factory.mktemp("publish")
    processor = make_processor()
    processor.save_pretrained(folder / "teacher")
    make_whisper(processor).save_pretrained(folder / "teacher")
    (folder / "teacher" / "README.md").write_text("---\nlicense: mit\n---\n# teacher\n")
    (folder / "teacher" / "normalizer.json").write_text('{"colour": "color"}')
    write_speech(folder / "speech", 8)
    (folder / "load.py").write_text(LOAD)
    impatient = ROOT / "tests" / "support" / "impatient.py"
    push, train = (f"{impatient} {ROOT}/examples/{name}.py" for name in ("push", "distill"))
    with serve_hub(folder / "hub", {WRITER: "write", READER: "read"}) as hub:
        visit = Visit(folder, hub)
        # the first checkpoint meets a Hub that is out of order for good, the second a whole one
        hub.failures.append(Failure("POST /api/models/me/during/commit", 503, times=3))
        options = "--teacher teacher --dataset speech --output_dir run --max_steps 4 --logging_steps 1 --use_cpu "
        options += "--per_device_train_batch_size 4 --save_strategy steps --save_steps 2 --hub_always_push "
        options += f"--push_to_hub --hub_model_id me/during --hub_strategy every_save --hub_token {WRITER}"
        visit.run(train=(f"{train} {options}", None))
        for name, content in PRIVATE.items():
            (folder / "run" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "run" / name).write_text(content)
        for shift, name in enumerate(("alone", "unlucky", "forbidden"), start=1):
            shutil.copytree(folder / "run", folder / name)
            weights = load_file(folder / name / "model.safetensors")  # of each other ones, or the Hub had them already
            weights = {key: weight + 0.001 * shift for key, weight in weights.items()}
            save_file(weights, folder / name / "model.safetensors", metadata={"format": "pt"})

        hub.failures += [
            Failure("PUT /objects/me/student", None),  # the connection is cut while the weights are sent
            Failure("POST /api/repos/create", 502),
            Failure("POST /api/models/me/student/commit", None, late=True),  # done, but the answer is lost
            Failure("POST /api/models/me/unlucky/commit", 503, times=3),
        ]
        visit.run(
            student=(f"{push} --model_dir alone --repo_id student --private", WRITER),
            unlucky=(f"{push} --model_dir unlucky --repo_id me/unlucky", WRITER),
            no_token=(f"{push} --model_dir forbidden --repo_id me/nothing", None),
        )
        resume = re.search(r"resume with: askd-hf push (.*)$", visit.error("unlucky"))[1]
        visit.run(
            resumed=(f"{push} {resume}", WRITER),
            downloaded=("load.py me/student", READER),
        )
        yield visit


def test_what_is_published_is_the_student_and_its_card_in_one_commit(visit):
    assert visit.ended["student"].returncode == 0, visit.ended["student"].stderr
    (commit,) = visit.hub.commits["models/me/student"]
    assert set(commit.written) == PUSHED and not commit.deleted
    assert {path.name for path in (visit.hub.root / "models/me/student").iterdir()} == {*PUSHED, ".gitattributes"}
    for name in PUSHED:
        there = visit.hub.root / "models/me/student" / name
        assert there.read_bytes() == (visit.folder / "alone" / name).read_bytes()


def test_a_cut_connection_and_a_hub_out_of_order_are_tried_again(visit):
    assert len(visit.requests("PUT /objects/me/student/.* cut")) == 1
    assert len(visit.requests("PUT /objects/me/student/.* 200")) == 1
    assert len(visit.requests("POST /api/repos/create 502")) == 1
    # the commit whose answer was lost is found there, and not made again
    assert visit.requests("POST /api/models/me/student/commit") == ["POST /api/models/me/student/commit/main cut"]


def test_it_is_loaded_by_its_id_alone(visit, monkeypatch, capsys):
    done = visit.ended["downloaded"]
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr("sys.argv", ["", str(visit.folder / "alone")])
    exec(LOAD, {})
    here, there = (json.loads(out.splitlines()[-1]) for out in (capsys.readouterr().out, done.stdout))
    assert there == here
    assert there[3] == {"colour": "color"}


def test_a_private_one_is_private(visit):
    assert "models/me/student" in visit.hub.private and "models/me/unlucky" not in visit.hub.private
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{visit.hub.endpoint}/me/student/resolve/main/config.json")


def test_without_a_token_it_says_so(visit):
    message = visit.error("no_token")
    assert "401 Unauthorized" in message and "log in with `hf auth login`" in message
    assert (
        "the model is saved in forbidden; resume with: askd-hf push --model_dir forbidden --repo_id me/no" in message
    )
    assert not (visit.hub.root / "models" / "me" / "nothing").exists()


def test_after_the_last_attempt_the_model_is_there_and_the_command_goes_on(visit):
    message = visit.error("unlucky")
    assert "503" in message
    assert message.endswith("resume with: askd-hf push --model_dir unlucky --repo_id me/unlucky")
    assert len(visit.requests("POST /api/models/me/unlucky/commit/main 503")) == 3
    assert visit.ended["resumed"].returncode == 0, visit.ended["resumed"].stderr
    (commit,) = visit.hub.commits["models/me/unlucky"]
    assert set(commit.written) == PUSHED
    sent = visit.requests("PUT /objects/me/unlucky/")
    assert len(sent) == 1, "large files that had arrived aren't sent again"


def test_every_checkpoint_is_published_while_training_goes_on(visit):
    done = visit.ended["train"]
    assert done.returncode == 0, done.stderr
    assert (
        "step 2 wasn't published, training continues" in done.stderr
        and "checkpoint-2 --repo_id me/during" in done.stderr
    )
    # the finished student had been published as a checkpoint, and nothing about it has changed since: no other commit
    (commit,) = visit.hub.commits["models/me/during"]
    assert commit.message == "Training in progress, step 4" and set(commit.written) == PUSHED
    there = visit.hub.root / "models" / "me" / "during"
    assert {path.name for path in there.iterdir()} == {*PUSHED, ".gitattributes"}
    for name in PUSHED:
        assert (there / name).read_bytes() == (visit.folder / "run" / name).read_bytes()
    assert not list((visit.folder / "run").glob("_push-*"))


def test_the_card_is_that_of_the_run(visit):
    card = ModelCard.load(visit.hub.root / "models" / "me" / "student" / "README.md")
    assert card.data.license == "mit"  # the teacher's
    assert card.data.eval_results is None
    assert "`speech` (split `train`, license unknown)" in card.text and "In total: 8 clips" in card.text
    assert "decoder layers 0 and 3 (counted from 0) of `teacher`" in card.text
    assert 'model="me/student"' in card.text


def test_tokens_are_nowhere(visit):
    secrets = (WRITER, READER)
    assert len(visit.ended) == 6
    for done in visit.ended.values():
        assert not any(token in done.stdout + done.stderr for token in secrets)
    places = ("hub/models", "hub/objects", "run")
    files = [(path, place) for place in places for path in (visit.folder / place).rglob("*")]
    for path, place in files:
        if path.is_file() and str(path.relative_to(visit.folder / place)) not in PRIVATE:
            assert not any(token.encode() in path.read_bytes() for token in secrets), path
    facts = (visit.folder / "run" / "training.json").read_text()
    assert str(visit.folder) not in facts and "hub_" not in facts


# ---- in this process ----


@pytest.fixture
def hub(visit, tmp_path, monkeypatch) -> Iterator[FakeHub]:
    with hub_of_this_process(tmp_path / "hub", {WRITER: "write", READER: "read"}, monkeypatch) as hub:
        yield hub


@pytest.fixture
def run(visit, tmp_path) -> Path:
    return shutil.copytree(visit.folder / "run", tmp_path / "run")


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (Failure("PUT /objects/", None, times=99), "Error while uploading 'model.safetensors'"),
        (Failure("PUT /objects/", 500, times=99), "500"),
        (Failure("POST .*/preupload/", 503, times=99), "503"),
        (Failure("POST .*/preupload/", None, times=99), "disconnected"),
        (Failure("POST /api/validate-yaml", 502, times=99), "Expecting value"),
        (Failure("POST .*/commit/", None, times=99), "disconnected"),
        (Failure("POST /api/repos/create", 500, times=99), "500"),
    ],
    ids=lambda value: f"{value.pattern} {value.status}" if isinstance(value, Failure) else "",
)
def test_wherever_the_hub_fails_for_good_the_message_is_one_line(hub, run, failure, reason):
    hub.failures.append(failure)
    with pytest.raises(UserError, match=r"the model is saved in .*; resume with: askd-hf push --model_dir") as error:
        publish_run(run, "me/x", token=WRITER)
    assert reason in str(error.value) and "\n" not in str(error.value) and WRITER not in str(error.value)
    assert 99 - failure.times < 20  # attempts
    assert not hub.commits
    failure.times = 0
    publish_run(run, "me/x", token=WRITER)
    (commit,) = hub.commits["models/me/x"]
    assert set(commit.written) == PUSHED


def test_a_token_that_may_only_read_is_told_apart(hub, run):
    with pytest.raises(
        UserError, match=r"403 Forbidden: You don.t have the rights .* with a token that has write access"
    ):
        publish_run(run, "me/x", token=READER)
    assert not (hub.root / "models").exists()


def test_what_is_to_be_private_does_not_become_public(hub, run):
    publish_run(run, "me/x", token=WRITER)
    with pytest.raises(UserError, match="nothing was published: me/x is public"):
        publish_run(run, "me/x", token=WRITER, private=True)
    assert len(hub.commits["models/me/x"]) == 1


def test_a_token_that_http_cannot_carry_is_not_shown(hub, run):
    with pytest.raises(UserError, match="contains invalid characters") as error:
        publish_run(run, "me/x", token="hf_some\x01Secret")
    assert "Secret" not in str(error.value) and not hub.requests


def test_what_is_not_a_run_is_refused_before_anything_is_sent(hub, run, tmp_path):
    with pytest.raises(UserError, match="doesn't exist"):
        publish_run(tmp_path / "none", "me/x", token=WRITER)
    (run / "training.json").unlink()
    with pytest.raises(UserError, match=r"has no training\.json"):
        publish_run(run, "me/x", token=WRITER)
    assert not hub.requests


def test_results_of_another_model_are_refused_before_anything_is_sent(hub, run):
    results = Path(__file__).parent / "cards" / "made-up-results.json"
    with pytest.raises(UserError, match="is of another model"):
        publish_run(run, "me/x", token=WRITER, results=results)
    assert not hub.requests, "nothing is made on the Hub before all is known to be right"


def test_only_named_files_are_published():
    assert all(published(name) for name in (*PUSHED, "model-00001-of-00002.safetensors"))
    assert not any(published(Path(name).name) for name in PRIVATE if name != "teacher/model.safetensors")
    assert "trainer_state.json" not in PUBLISHED and not published("trainer_state.json")
