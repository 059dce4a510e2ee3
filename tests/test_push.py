"""Publishing in this process, with a Hub on the loopback: what is refused, what messages say, what Trainer does."""

import errno
import inspect
import json
import os
import re
import shlex
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fake_hub import Failure, FakeHub, hub_of_this_process
from huggingface_hub import HfApi, ModelCard
from models import make_processor, make_whisper
from scripts import ROOT, run_here
from speech import write_speech
from training import make_trainer
from transformers import Seq2SeqTrainer, WhisperForConditionalGeneration

from askd_hf.data.encoder_cache import weights_digest
from askd_hf.errors import UserError
from askd_hf.evaluation.results import Results
from askd_hf.hub.publisher import _copy_student as copy_student
from askd_hf.hub.upload import find_results, publish, resume_advice
from askd_hf.models.loading import load_whisper
from askd_hf.models.student import init_student
from askd_hf.trainer import ASKDTrainer
from askd_hf.training.run_callbacks import StopGracefullyCallback

WRITER = "hf_tokenThatMayWrite"
RESULTS = Path(__file__).parent / "cards" / "made-up-results.json"
PUSH = ROOT / "examples" / "push.py"


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[FakeHub]:
    monkeypatch.setenv("HF_TOKEN", WRITER)
    with hub_of_this_process(tmp_path / "hub", {WRITER: "write"}, monkeypatch) as hub:
        yield hub


def save_run(directory: Path, seed: int = 5) -> Path:
    processor = make_processor()
    teacher = make_whisper(processor)
    student = init_student(make_whisper(processor, seed=seed), 2)
    trainer = make_trainer(directory, teacher, student, processor=processor, max_steps=2)
    trainer.train()
    trainer.save_state()
    trainer.save_model()
    return directory


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return save_run(tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "my run")


def pushing(output_dir: Path, processor=None, **changes):
    """A trainer that pushes every checkpoint."""
    processor = processor or make_processor()
    options = dict(push_to_hub=True, hub_model_id="me/x", hub_strategy="every_save", hub_always_push=True, max_steps=2)
    options |= dict(save_strategy="steps", save_steps=1)
    teacher, student = make_whisper(processor), init_student(make_whisper(processor, seed=5), 2)
    return make_trainer(output_dir, teacher, student, processor=processor, **options | changes)


# ---- the advice ----


def test_the_advice_is_the_whole_command():
    text = resume_advice(Path("my run"), "me/x", results=Path("a b.json"), private=True, revision="dev", license="mit")
    command = shlex.split(text.partition("resume with: ")[2])
    assert command[:2] == ["askd-hf", "push"]
    assert command[2:] == shlex.split(
        "--model_dir 'my run' --repo_id me/x --results 'a b.json' --revision dev --license mit --private"
    )
    assert "--private" not in resume_advice(Path("run"), "me/x")


def test_the_advice_of_a_failed_private_push_makes_a_private_repository(hub, run, monkeypatch, capsys):
    failure = Failure("POST /api/repos/create", 500, times=3)
    hub.failures.append(failure)
    status, _, err = run_here(monkeypatch, capsys, "--model_dir", run, "--repo_id", "me/x", "--private", file=PUSH)
    assert status == 2 and failure.times == 0
    arguments = shlex.split(re.search(r"resume with: askd-hf push (.*)", err)[1])
    assert "--private" in arguments
    status, out, err = run_here(monkeypatch, capsys, *arguments, file=PUSH)
    assert status == 0 and "published" in out, err
    assert "models/me/x" in hub.private and len(hub.commits["models/me/x"]) == 1


def test_the_trainers_advice_is_as_private_as_its_push(hub, tmp_path):
    trainer = pushing(tmp_path / "run", hub_strategy="end", save_strategy="no", hub_private_repo=True)
    trainer.train()
    hub.failures.append(Failure("POST .*/commit/", 500, times=3))
    with pytest.raises(UserError, match=r"resume with: .* --private$"):
        trainer.push_to_hub()
    trainer.args.hub_private_repo = None
    hub.failures.append(Failure("POST .*/commit/", 500, times=3))
    with pytest.raises(UserError, match=r"resume with: .* --private$"):
        trainer.push_to_hub(private=True)


# ---- results ----


def results_of(directory: Path, place: Path) -> Path:
    """An evaluation of the weights in a directory, as they are loaded there."""
    results = Results.load(RESULTS)
    results.models["student"].weights = weights_digest(load_whisper(str(directory)))
    results.save(place)
    return place


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_results_count_for_the_weights_they_are_of(run, tmp_path, caplog, dtype):
    WhisperForConditionalGeneration.from_pretrained(run, dtype=dtype).save_pretrained(run)
    own = run / "evaluation" / "results.json"
    assert find_results(run) is None
    results_of(run, own)
    assert find_results(run).sets and find_results(run, own).sets
    other = save_run(tmp_path / "other", seed=6)  # of the same shape
    given = results_of(other, tmp_path / "given.json")
    with pytest.raises(UserError, match="is of another model than"):
        find_results(run, given)
    shutil.copy(given, own)
    caplog.clear()
    assert find_results(run) is None and "the card is written without results" in caplog.text


def test_results_that_do_not_say_of_which_weights_do_not_count(run):
    with pytest.raises(UserError, match="another model"):
        find_results(run, RESULTS)


def test_own_results_become_the_cards(hub, run):
    results_of(run, run / "evaluation" / "results.json")
    publish(run, "me/x")
    card = ModelCard.load(hub.root / "models" / "me" / "x" / "README.md")
    assert card.data.eval_results[0].metric_value == 11.11


@pytest.mark.parametrize(("wer", "warned"), [(20.0, False), (656.2, True)])
def test_a_student_with_far_more_errors_than_its_teacher_is_warned_of(hub, run, caplog, wer, warned):
    place = results_of(run, run / "evaluation" / "results.json")
    results = Results.load(place)
    results.sets[0].scores["student"].wer = wer  # the teacher's is 10.0
    results.save(place)
    publish(run, "me/x", license="mit")
    line = "the student makes far more errors than its teacher: WER 656.2 % and 10.0 % on made-up-fr"
    assert [record.message for record in caplog.records if "license" in record.message] == []
    assert [record.message for record in caplog.records if "errors" in record.message] == [line] * warned


def test_a_card_without_a_license_is_warned_of(hub, run, caplog):
    publish(run, "me/x")
    assert "no license, because none was found for the model that training started from: give one with" in caplog.text


# ---- what the Hub refuses, and what isn't its fault ----


def test_a_license_that_the_hub_does_not_know_is_named_and_can_be_replaced(hub, run, monkeypatch, capsys):
    summary = json.loads((run / "training.json").read_text())
    summary["provenance"]["student"] = dict(name="a", on_hub=False, license={"license": "my-own"})
    (run / "training.json").write_text(json.dumps(summary))
    with pytest.raises(UserError) as error:
        publish(run, "me/x")
    message = str(error.value)
    assert message.startswith('the Hub rejects the metadata of the card: "license" must be one of [apache-2.0, mit')
    assert "give a license of its list with --license" in message and "\n" not in message
    assert not hub.commits
    arguments = ("--model_dir", run, "--repo_id", "me/x", "--license", "other")
    status, _, err = run_here(monkeypatch, capsys, *arguments, file=PUSH)
    assert status == 0, err
    assert ModelCard.load(hub.root / "models" / "me" / "x" / "README.md").data.license == "other"


def test_the_address_of_an_upload_is_not_shown(hub, run):
    hub.failures.append(Failure("PUT /objects/", 500, times=99))
    with pytest.raises(UserError, match="500") as error:
        publish(run, "me/x")
    assert "/objects/" not in str(error.value) and "http" not in str(error.value)


def test_a_branch_is_pushed_to_if_it_is_there(hub, run):
    publish(run, "me/x")
    with pytest.raises(UserError, match=r"me/x has no branch 'dev'. .* `hf repos branch create me/x dev`"):
        publish(run, "me/x", revision="dev")
    shutil.copytree(hub.root / "models/me/x", hub.root / "models/me/x@dev")
    (hub.root / "models/me/x@dev/config.json").write_text("{}")
    publish(run, "me/x", revision="dev")
    (commit,) = hub.commits["models/me/x@dev"]
    assert "config.json" in commit.written and len(hub.commits["models/me/x"]) == 1
    assert (hub.root / "models/me/x@dev/config.json").read_bytes() == (run / "config.json").read_bytes()


def test_a_branch_that_is_gone_meanwhile_is_no_mere_client_error(hub, run, monkeypatch):
    monkeypatch.setattr("askd_hf.hub.upload.create_repository", lambda repo_id, *args: repo_id)
    HfApi().create_repo("me/x")
    with pytest.raises(UserError, match="Revision Not Found"):
        publish(run, "me/x", revision="dev")


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_not_the_hubs_fault(hub, run, monkeypatch):
    for broken, message in (
        ("askd_hf.hub.upload.write_run_figure", "the model card in .*: No space left on device"),
        (
            "askd_hf.hub.upload.CommitOperationAdd",
            "nothing was published: .*No space left on device; the model is saved",
        ),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(broken, no_space)
            with pytest.raises(UserError, match=message) as error:
                publish(run, "me/x")
        assert "Hub" not in str(error.value)
    with pytest.raises(UserError, match="nothing was published: Repo id must") as error:
        publish(run, "me/not/a/repository")


def test_shards_replace_a_whole_file(hub, run):
    publish(run, "me/x")
    (run / "model.safetensors").unlink()
    model = init_student(make_whisper(make_processor(), seed=5), 2)
    model.save_pretrained(run, max_shard_size="20KB")
    shards = {file.name for file in run.glob("model-*-of-*.safetensors")}
    assert len(shards) > 1
    publish(run, "me/x")
    there = {file.name for file in (hub.root / "models/me/x").glob("model*")}
    assert there == shards | {"model.safetensors.index.json"}
    assert (hub.root / "models/me/x/README.md").is_file()
    publish(run, "me/x")  # nothing is left to be deleted


def test_a_whole_model_replaces_an_adapter(hub, run):
    """Transformers would load the adapter on top of it."""
    publish(run, "me/x")
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    others = {"added_tokens.json", "preprocessor_config.json"}  # of another tokenizer, and of another window
    for name in adapter | others:
        (hub.root / "models/me/x" / name).write_text("{}")
    publish(run, "me/x", commit_message="again")
    assert not (adapter | others) & {file.name for file in (hub.root / "models/me/x").iterdir()}


# ---- within training ----


def test_the_arguments_are_those_of_trainer(hub, tmp_path, caplog):
    ours, theirs = (inspect.signature(kind.push_to_hub) for kind in (ASKDTrainer, Seq2SeqTrainer))
    assert [(p.name, p.kind, p.default) for p in ours.parameters.values()] == [
        (p.name, p.kind, p.default) for p in theirs.parameters.values()
    ]
    trainer = pushing(tmp_path / "run", hub_strategy="end", save_strategy="no")
    trainer.train()
    job = trainer.push_to_hub("in the background", blocking=False)
    assert "/commit/" in job.result(timeout=60)
    trainer.push_to_hub(language="fr", finetuned_from="x", tasks="asr")
    assert "finetuned_from, language, tasks ignored" in caplog.text
    assert [commit.message for commit in hub.commits["models/me/x"]] == ["in the background"]  # nothing new since


def test_without_a_processor_there_is_nothing_to_push(hub, tmp_path, teacher, student):
    with pytest.raises(UserError, match="give it as processing_class"):
        make_trainer(tmp_path, teacher, student, push_to_hub=True, hub_model_id="me/x")
    assert not hub.requests


def test_a_missing_branch_is_found_before_training(hub, tmp_path):
    with pytest.raises(UserError, match="has no branch 'dev'"):
        pushing(tmp_path, hub_revision="dev")


@pytest.mark.parametrize("strategy", ["every_save", "end"])
def test_a_run_is_published_in_the_branch_alone(hub, tmp_path, strategy):
    (hub.root / "models" / "me" / "x").mkdir(parents=True)
    (hub.root / "models" / "me" / "x@dev").mkdir()
    trainer = pushing(tmp_path, hub_revision="dev", hub_strategy=strategy)
    trainer.train()
    if strategy == "every_save":
        trainer._finish_current_push()
    else:
        trainer.push_to_hub()
    assert (hub.root / "models" / "me" / "x@dev" / "model.safetensors").is_file()
    assert not [*(hub.root / "models" / "me" / "x").iterdir()]
    assert "--revision dev" in trainer.publisher.advice()


@pytest.mark.parametrize("broken", ["shutil.copy", "askd_hf.hub.upload.render_card"])
def test_training_goes_on_whatever_becomes_of_a_push(hub, tmp_path, monkeypatch, caplog, broken):
    (tmp_path / "run" / "_push-left").mkdir(parents=True)
    trainer = pushing(tmp_path / "run")
    assert not list((tmp_path / "run").glob("_push-*"))
    monkeypatch.setattr("os.link", no_space)
    monkeypatch.setattr(broken, no_space)
    trainer.train()
    assert trainer.state.global_step == 2 and not hub.commits
    for step in (1, 2):
        assert f"step {step} wasn't published, training continues: " in caplog.text
    assert caplog.text.count("No space left on device") == 2
    assert not list((tmp_path / "run").glob("_push-*"))


def test_checkpoints_are_linked_or_else_copied(run, tmp_path, monkeypatch):
    (run / "optimizer.pt").write_text("x")
    (run / "README.md").write_text("x")
    copy_student(run, tmp_path / "linked")
    weights = tmp_path / "linked" / "model.safetensors"
    assert weights.samefile(run / "model.safetensors")
    assert not (tmp_path / "linked" / "README.md").exists() and not (tmp_path / "linked" / "optimizer.pt").exists()
    monkeypatch.setattr("os.link", no_space)
    copy_student(run, tmp_path / "copied")
    names = {file.name for file in (tmp_path / "copied").iterdir()}
    assert names == {file.name for file in (tmp_path / "linked").iterdir()}
    copied = tmp_path / "copied" / "model.safetensors"
    assert not copied.samefile(weights) and copied.read_bytes() == weights.read_bytes()


def test_ctrl_c_after_the_last_step_says_that_nothing_was_published(hub, tmp_path, monkeypatch, capsys):
    processor = make_processor()
    make_whisper(processor).save_pretrained(tmp_path / "teacher")
    processor.save_pretrained(tmp_path / "teacher")
    speech = write_speech(tmp_path / "speech", 4)

    end = StopGracefullyCallback.on_train_end

    def interrupted(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        end(*args, **kwargs)

    monkeypatch.setattr(StopGracefullyCallback, "on_train_end", interrupted)
    arguments = f"--teacher {tmp_path / 'teacher'} --dataset {speech} --output_dir {tmp_path / 'run'} --max_steps 2"
    arguments += " --use_cpu --push_to_hub --hub_model_id me/x --hub_private_repo True"
    status, out, _ = run_here(monkeypatch, capsys, *arguments.split())
    assert status == 130 and not hub.commits
    assert f"not published: the model is saved in {tmp_path / 'run'}; resume with: askd-hf push" in out
    assert "--repo_id me/x --private" in out


def test_the_readme_of_the_demos_teacher_is_a_card_as_well():
    readme, card = ROOT / "examples/demo/teacher/README.md", ROOT / "model_cards/demo-teacher.md"
    assert not readme.is_symlink() and readme.read_bytes() == card.read_bytes()
