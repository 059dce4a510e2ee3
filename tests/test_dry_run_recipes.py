"""`--dry_run` with caches, LoRA, a pruned encoder, unlabeled audio, streams and the Hub."""

import shutil
from pathlib import Path

import datasets
import pytest
import torch
from datasets import Dataset
from fake_hub import hub_of_this_process
from models import make_processor, make_whisper
from run_plans import plan_of, sizes, table, tree
from safetensors.torch import load_file
from scripts import ROOT, run_here
from scripts import distill_options as options
from speech import write_speech
from training import learn_by_heart

from askd_hf.commands.measured_run import MeasuringTrainer
from askd_hf.config import ASKDConfig
from askd_hf.data import load_speech_dataset
from askd_hf.errors import UserError
from askd_hf.models import layer_selection
from askd_hf.models.loading import load_processor
from askd_hf.models.student import init_student
from askd_hf.training.run_plan import RunLength, duration, evaluations, run_length, saves

FINETUNE = ROOT / "examples" / "finetune.py"
WRITER, READER = "hf_tokenThatMayWrite", "hf_tokenThatMayRead"


@pytest.fixture
def plan(monkeypatch, capsys):
    """A function that makes a plan, and sees that nothing has changed in some directories."""

    def make(*arguments, unchanged: tuple[Path, ...] = (), file: Path | None = None) -> dict[str, str]:
        before = tree(*unchanged)
        ended = run_here(monkeypatch, capsys, *arguments, "--dry_run", file=file)
        assert ended.returncode == 0, ended.stderr
        assert tree(*unchanged) == before
        return plan_of(ended.stdout)

    return make


def run(monkeypatch, capsys, *arguments, file: Path | None = None) -> str:
    ended = run_here(monkeypatch, capsys, *arguments, file=file)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_caches_that_are_partly_filled(monkeypatch, capsys, tmp_path, teacher_dir, speech_dir, plan):
    caches = ["--encoder_cache_dir", tmp_path / "encoder", "--teacher_cache_dir", tmp_path / "labels"]
    arguments = options(teacher_dir, speech_dir, tmp_path / "run", *caches, "--teacher_top_k", 5)
    first = options(
        teacher_dir, speech_dir, tmp_path / "first", *caches, "--teacher_top_k", 5, "--max_train_samples", 10
    )
    run(monkeypatch, capsys, *first)
    planned = plan(*arguments, unchanged=(tmp_path,))
    encoder, labels = planned["before training: encoder cache"], planned["before training: teacher cache"]
    assert encoder.startswith(f"{tmp_path / 'encoder'}: 10 of 16 clips cached; 6 to do: ")
    assert sizes(encoder)[0] == pytest.approx(6 * 50 * 16 * 2, abs=500)  # positions, width, float16
    assert labels.startswith(f"{tmp_path / 'labels'}: 10 of 16 clips cached; 6 to do: ")
    tokenizer = load_processor(str(teacher_dir)).tokenizer
    rows = load_speech_dataset(str(speech_dir), None, "train").select(range(10, 16))
    tokens = sum(len(tokenizer(f" {row['text']}").input_ids) - 1 for row in rows)
    audio = sum(Path(row["audio"]["path"]).stat().st_size for row in rows)
    of_labels = tokens * (5 * 4 + 8)
    assert sizes(labels)[0] == pytest.approx(audio + of_labels, abs=500)
    assert "while it is written" not in labels  # the stored rows aren't written again
    assert shutil.disk_usage(tmp_path).free == pytest.approx(sizes(labels)[1], rel=0.1)
    printed = run(monkeypatch, capsys, *arguments)
    assert printed.count("(10 of 16 cached)") == 2
    planned = plan(*arguments, "--output_dir", tmp_path / "again", unchanged=(tmp_path,))
    assert all(
        "16 of 16 clips cached; " in planned[f"before training: {name} cache"] for name in ("encoder", "teacher")
    )


def test_a_dataset_of_cached_labels(monkeypatch, capsys, tmp_path, teacher_dir, speech_dir, plan):
    """`datasets` would keep the rows without joined clips beside it."""
    caches = ["--teacher_cache_dir", tmp_path / "labels", "--teacher_top_k", 5, "--concatenate_probability", 0.3]
    run(monkeypatch, capsys, *options(teacher_dir, speech_dir, tmp_path / "first", *caches, "--compare", "False"))
    labeled = ["--dataset", tmp_path / "labels"]
    planned = plan(*options(teacher_dir, speech_dir, tmp_path / "run", *labeled), unchanged=(tmp_path,))
    assert planned["data: training"].startswith("16 clips, ")


def test_a_cache_of_another_teacher_is_named(monkeypatch, capsys, tmp_path, teacher_dir, deep_teacher_dir, speech_dir):
    caches = ["--teacher_cache_dir", tmp_path / "labels", "--teacher_top_k", 5]
    run(monkeypatch, capsys, *options(teacher_dir, speech_dir, tmp_path / "first", *caches))
    ended = run_here(
        monkeypatch, capsys, *options(deep_teacher_dir, speech_dir, tmp_path / "run", *caches), "--dry_run"
    )
    assert ended.returncode == 2 and f"error: --teacher_cache_dir {tmp_path / 'labels'} was created" in ended.stderr
    # the soft labels of a dataset are checked for all its rows
    labeled = ["--dataset", tmp_path / "labels", "--temperature", 3]
    arguments = options(teacher_dir, speech_dir, tmp_path / "run", *labeled)
    ended = run_here(monkeypatch, capsys, *arguments, "--dry_run")
    assert ended.returncode == 2 and "computed with temperature 2, the run's is 3" in ended.stderr


@pytest.fixture(scope="module")
def student_dir(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("student")
    processor = make_processor()
    init_student(make_whisper(processor, seed=5), 2).save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("keep", [False, True], ids=["merged", "kept"])
def test_lora_on_a_student(monkeypatch, capsys, tmp_path, student_dir, speech_dir, plan, keep):
    arguments = ["--student", student_dir, "--dataset", speech_dir, "--use_cpu", "--lora_r", "4", "--max_steps", "2"]
    arguments += ["--output_dir", tmp_path / "run", "--save_strategy", "no", *(["--keep_adapter"] if keep else [])]
    planned = plan(*arguments, unchanged=(tmp_path, student_dir), file=FINETUNE)
    # 4 x (inputs + outputs) of the 8 projections of the attentions and the 2 of the MLP, in 2 layers
    trained = 2 * (8 * 4 * (16 + 16) + 2 * 4 * (16 + 32))
    assert planned["student: trained"] == f"{trained:,}"
    weights = sum(weight.numel() for weight in load_file(student_dir / "model.safetensors").values())
    assert planned["student: parameters"] == f"{weights:,}" and "student: speed" not in planned
    assert planned["student: made from"] == str(student_dir)
    assert planned["schedule: phases"].splitlines()[1].startswith("self ")
    assert planned["memory and disk: checkpoints"] == "none"
    run(monkeypatch, capsys, *arguments, file=FINETUNE)
    if keep:
        stored = load_file(tmp_path / "run" / "adapter_model.safetensors")
        assert sum(weight.numel() for weight in stored.values()) == trained
        assert sizes(planned["memory and disk: adapter"]) == pytest.approx([4 * trained], abs=500)
    else:
        assert sizes(planned["memory and disk: student"]) == pytest.approx([4 * weights], abs=500)


def test_a_window_and_a_vocabulary_on_real_speech(monkeypatch, capsys, tmp_path, plan):
    demo = ROOT / "examples" / "demo"
    arguments = options(demo / "teacher", demo / "data", tmp_path / "run", "--max_train_samples", 24)
    arguments += ["--window_seconds", "2", "--vocabulary", "320", "--long_clips", "skip", "--save_dtype", "float16"]
    arguments += ["--max_steps", "2", "--save_strategy", "no"]
    planned = plan(*arguments, unchanged=(demo, tmp_path))
    run(monkeypatch, capsys, *arguments)
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert planned["student: parameters"].split()[0] == f"{sum(weight.numel() for weight in weights.values()):,}"
    assert planned["student: tokens"].split() == ["320", "1,500"]
    assert planned["student: window"].split() == ["2", "s", "30", "s"]
    stored = (tmp_path / "run" / "model.safetensors").stat().st_size
    assert sizes(planned["memory and disk: student"]) == pytest.approx([stored], rel=0.02)
    assert float(planned["student: speed"].split()[0]) > 1.0


def test_greedy_selection_and_the_recovery_of_the_encoder(
    monkeypatch, capsys, tmp_path, deep_teacher_dir, speech_dir, plan
):
    arguments = options(deep_teacher_dir, speech_dir, tmp_path / "run", "--layer_selection", "greedy")
    arguments += ["--encoder_layers", "3", "--encoder_recovery_epochs", "2", "--max_steps", "2"]
    planned = plan(*arguments, unchanged=(tmp_path,))
    calls, cross_entropy = [], layer_selection.cross_entropy
    monkeypatch.setattr(layer_selection, "cross_entropy", lambda *args: calls.append(1) or cross_entropy(*args))
    printed = run(monkeypatch, capsys, *arguments)
    trials = len(calls) - 2 * 3  # besides, the result of each kind is compared with others
    selection = planned["before training: layer selection"]
    assert selection.startswith(f"{trials} trials, at most ") and "evenly spread layers" in selection
    assert planned["before training: encoder recovery"].startswith("2 epochs, 2 steps of ")  # of 16 clips
    assert "trained on 16 windows of audio, 2 epochs" in printed
    assert planned["student: encoder layers"].split() == ["3", "4"]


def test_a_recovered_encoder_is_read(monkeypatch, capsys, tmp_path, deep_teacher_dir, speech_dir, plan):
    arguments = options(
        deep_teacher_dir, speech_dir, tmp_path / "run", "--encoder_layers", "0,1,3", "--max_steps", "2"
    )
    arguments += ["--compare", "False"]
    run(monkeypatch, capsys, *arguments, "--encoder_recovery_epochs", "1")
    resumed = ["--resume_from_checkpoint", "last"]
    planned = plan(*arguments, *resumed, "--encoder_recovery_epochs", "1", unchanged=(tmp_path,))
    assert planned["before training: encoder recovery"] == "finished by the earlier run"
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    (tmp_path / "run" / "model.safetensors").unlink()  # as if it was killed after the recovery
    planned = plan(*arguments, *resumed, "--encoder_recovery_epochs", "1", unchanged=(tmp_path,))
    assert planned["before training: encoder recovery"] == "finished by the earlier run"
    assert planned["output: resumed from"].startswith("nothing")
    ended = run_here(monkeypatch, capsys, *arguments, *resumed, "--encoder_recovery_epochs", "3", "--dry_run")
    file = tmp_path / "run" / "encoder_recovery" / "encoder.safetensors"
    assert ended.returncode == 2 and f"error: {file} was recovered with other values of epochs" in ended.stderr


@pytest.mark.slow
def test_unlabeled_audio(monkeypatch, capsys, tmp_path, teacher_dir, speech_dir, plan):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("askd_hf.commands.dry_run.TRANSCRIBED", 4)
    audio = write_speech(tmp_path / "audio", clips=9, seed=3)
    processor = make_processor()
    teacher = make_whisper(processor)
    learn_by_heart(teacher, processor, audio)
    teacher.save_pretrained("teacher")
    processor.save_pretrained("teacher")
    (audio / "metadata.csv").unlink()
    more = ["--unlabeled_dataset", "audio", "--compare", "False"]
    arguments = options("teacher", speech_dir, tmp_path / "run", *more)
    planned = plan(*arguments, unchanged=(tmp_path,))
    text = planned["before training: transcription"]
    assert text.startswith("audio: 0 of 9 clips transcribed; 9 to do: ")
    assert "; the filters of askd-hf pseudo-label keep 4 of 4.\nVocabulary, " in text
    assert "; and about 5 more that the teacher transcribes first" in planned["data: training"]
    assert planned["schedule: steps"].endswith(": 3 epochs of 7 steps")  # 16 + 9 clips, batches of 4
    printed = run(monkeypatch, capsys, *arguments)
    assert "9 of 9 transcripts are kept" in printed and table(printed) == planned["schedule: phases"]
    planned = plan(*arguments, "--output_dir", tmp_path / "again", unchanged=(tmp_path,))
    expected = "audio: 9 of 9 clips transcribed; the filters of askd-hf pseudo-label keep 9 of 9"
    assert planned["before training: transcription"] == expected
    assert planned["data: training"].startswith("25 clips, ")
    # a teacher that doesn't know where to end
    arguments = options(teacher_dir, speech_dir, tmp_path / "run", *more, "--output_dir", tmp_path / "other")
    ended = run_here(monkeypatch, capsys, *arguments, "--dry_run")
    assert ended.returncode == 2 and "drop 4 of 4 transcripts (truncated at the token limit)" in ended.stderr


def test_a_stream(tmp_path, teacher_dir, speech_dir, plan):
    arguments = options(teacher_dir, speech_dir, tmp_path / "run", "--streaming", "--max_steps", 40)
    planned = plan(*arguments, unchanged=(tmp_path, speech_dir))
    assert planned["data: training"] == "a stream: its clips are checked in training"
    assert planned["schedule: steps"] == "40 of 4 clips"
    assert planned["memory and disk: checkpoints"].startswith("10 times, ")


def test_data_that_is_converted_is_named(monkeypatch, tmp_path, teacher_dir, speech_dir, plan):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = load_speech_dataset(str(speech_dir), None, "train")
    files = [{"path": None, "bytes": Path(audio["path"]).read_bytes()} for audio in rows["audio"][:]]
    Dataset.from_dict({"audio": files, "text": rows["text"][:]}).to_parquet(tmp_path / "speech.parquet")
    planned = plan(*options(teacher_dir, tmp_path / "speech.parquet", tmp_path / "run"))
    converted = list((tmp_path / "cache").rglob("*.arrow"))
    assert planned["output: converted data"].endswith(f", kept in {tmp_path / 'cache'}")
    stored = sum(file.stat().st_size for file in converted)
    assert sizes(planned["output: converted data"]) == pytest.approx([stored], abs=500)
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "speech.parquet"}


def test_a_batch_that_takes_too_much_memory(monkeypatch, tmp_path, teacher_dir, speech_dir, plan):
    compute_loss = MeasuringTrainer.compute_loss

    def limited(self, model, inputs, *args, **kwargs):
        if len(inputs["labels"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(MeasuringTrainer, "compute_loss", limited)
    planned = plan(*options(teacher_dir, speech_dir, tmp_path / "run", "--auto_find_batch_size", "True"))
    assert planned["schedule: steps"] == "24 of 2 clips: 3 epochs of 8 steps"


def test_ctrl_c_leaves_nothing(monkeypatch, capsys, tmp_path, teacher_dir, speech_dir):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(MeasuringTrainer, "training_step", interrupted)
    ended = run_here(monkeypatch, capsys, *options(teacher_dir, speech_dir, tmp_path / "run"), "--dry_run")
    assert ended.returncode == 130 and ended.stderr.endswith("\ninterrupted\n")
    assert not list(tmp_path.glob("*run*"))


# ---- the Hub ----


@pytest.mark.parametrize(
    ("more", "token", "said"),
    [
        ([], WRITER, "at the end, to me/run (will be created, as public or private as its owner's default)"),
        (["--hub_model_id", "me/there", "--hub_private_repo", "True"], WRITER, "to me/there (exists, private)"),
        (["--hub_strategy", "every_save"], WRITER, "at every checkpoint and at the end, to me/run"),
        ([], READER, "the Hub token has only read access"),
        ([], "hf_unknown", "log in with `hf auth login`"),
        (["--hub_model_id", "me/open", "--hub_private_repo", "True"], WRITER, "me/open is public"),
        (["--hub_model_id", "me/open", "--hub_revision", "dev"], WRITER, "me/open has no branch 'dev'"),
        (["--hub_revision", "dev"], WRITER, "me/run has no branch 'dev'"),
        (["--hub_model_id", "them/new"], WRITER, "them/new doesn't exist, and me can't create a repository of them"),
    ],
)
def test_the_hub_is_only_read(monkeypatch, capsys, tmp_path, teacher_dir, speech_dir, more, token, said):
    for name in ("there", "open"):
        (tmp_path / "hub" / "models" / "me" / name).mkdir(parents=True)
    arguments = options(teacher_dir, speech_dir, tmp_path / "run", "--push_to_hub", "--hub_token", token, *more)
    with hub_of_this_process(tmp_path / "hub", {WRITER: "write", READER: "read"}, monkeypatch) as hub:
        hub.private.add("models/me/there")
        before = tree(tmp_path)
        ended = run_here(monkeypatch, capsys, *arguments, "--dry_run")
        assert tree(tmp_path) == before
    asked = {request.rsplit(" ", 1)[0] for request in hub.requests}
    assert "GET /api/whoami-v2" in asked and all(request.startswith("GET ") for request in asked), asked
    if "token" in said or "me/open" in said or "branch" in said or "them" in said or "log in" in said:
        assert ended.returncode == 2 and said in ended.stderr[ended.stderr.index("error: ") :]
        assert token not in ended.stderr
    else:
        assert ended.returncode == 0, ended.stderr
        pushed = plan_of(ended.stdout)["output: pushed"]
        assert pushed.startswith("student, processor and model card, ") and said in pushed


# ---- numbers that follow from the options ----


def config(tmp_path, **changes) -> ASKDConfig:
    return ASKDConfig(output_dir=str(tmp_path), use_cpu=True, **changes)


@pytest.mark.parametrize(
    ("changes", "clips", "length"),
    [
        (dict(num_train_epochs=3), 33, RunLength(3, 9)),  # batches of 16, 16 and 1
        (dict(num_train_epochs=3, dataloader_drop_last=True), 33, RunLength(2, 6)),
        (dict(num_train_epochs=1.5, gradient_accumulation_steps=2), 33, RunLength(2, 3)),
        (dict(max_steps=7), 33, RunLength(3, 7)),
        (dict(max_steps=7), None, RunLength(None, 7)),
    ],
)
def test_the_length_of_a_run(tmp_path, changes, clips, length):
    assert run_length(config(tmp_path, **changes), clips, batch_size=16) == length


def test_a_run_without_a_whole_batch_has_no_length(tmp_path):
    with pytest.raises(UserError, match="--dataloader_drop_last leaves no batch: there are 15 training clips"):
        run_length(config(tmp_path, dataloader_drop_last=True), 15, batch_size=16)


@pytest.mark.parametrize(
    ("changes", "length", "evaluated", "saved"),
    [
        (dict(), RunLength(3, 9), 3, 3),
        (dict(), RunLength(2, 3), 2, 2),  # the last epoch is half
        (dict(), RunLength(3, 9, done=6), 1, 1),
        (dict(eval_strategy="steps", eval_steps=4, save_strategy="no"), RunLength(3, 9), 3, 0),
        (dict(eval_strategy="steps", eval_steps=3, save_strategy="steps", save_steps=0.5), RunLength(3, 9), 3, 2),
        (dict(eval_strategy="no", save_strategy="steps", save_steps=2), RunLength(None, 9, done=4), 0, 3),
        (dict(save_strategy="best"), RunLength(3, 9), 3, None),
    ],
)
def test_how_often_a_run_evaluates_and_saves(tmp_path, changes, length, evaluated, saved):
    options_of_run = config(tmp_path, **changes)
    assert (evaluations(options_of_run, length), saves(options_of_run, length)) == (evaluated, saved)


def test_durations():
    seconds = {0.0123: "0.012 s", 9.96: "10 s", 59.6: "1 min 0 s", 185: "3 min 5 s", 7830: "2 h 10 min"}
    assert {value: duration(value) for value in seconds} == seconds
