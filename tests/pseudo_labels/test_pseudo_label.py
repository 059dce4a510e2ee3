"""`examples/pseudo_label.py` as a user runs it: real processes, killed and continued, pushed, trained on."""

import csv
import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from datasets import Audio, Dataset, load_from_disk
from fake_hub import Failure, serve_hub
from hub import hub_environment
from models import make_multilingual
from processes import Ended, killed_when, run_there
from scripts import ROOT, load_script, run_here
from tiny_teacher import incline_to_end, save_teacher, tone, write_clips
from transformers import WhisperForConditionalGeneration

from askd_hf.arguments import SpeechSource
from askd_hf.data import decode_audio
from askd_hf.hub.provenance import TrainingData
from askd_hf.models.loading import load_processor, load_whisper
from askd_hf.models.student import init_student
from askd_hf.pseudo_labels import PseudoLabelArguments

SCRIPT = ROOT / "examples" / "pseudo_label.py"
# of a random teacher everything is good enough
LENIENT = "--logprob_threshold", -50, "--repeated_5gram_threshold", 100, "--compression_ratio_threshold", 99
SECONDS = [0.3, 0.4, 0.25, 0.9, 0.5, 0.2, 0.35, 0.6]
SPEAKERS = ["a", "a", "a", "a", "b", "b", "b", "a"]


@pytest.fixture(scope="module")
def script():
    return load_script(SCRIPT)


@pytest.fixture
def label(script, teacher_dir, monkeypatch, capfd):
    """The script's `main()` in this process, on the CPU."""

    def run(*arguments, teacher=teacher_dir) -> Ended:
        return run_here(monkeypatch, capfd, "--teacher", teacher, "--device", "cpu", *arguments, script=script)

    return run


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("models") / "teacher")


@pytest.fixture(scope="module")
def speech(tmp_path_factory) -> Path:
    return write_clips(tmp_path_factory.mktemp("speech") / "clips", SECONDS, {"speaker": SPEAKERS})


def no_decoding(monkeypatch) -> None:
    def refuse(*args, **kwargs):
        raise AssertionError("something was decoded")

    monkeypatch.setattr(WhisperForConditionalGeneration, "generate", refuse)


def dropped(directory: Path) -> list[dict[str, str]]:
    with (directory / "dropped.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--language", "xx"], "xx"),
        (["--task", "translate"], "translate"),
        (["--hub_dataset_id", "a/b--c"], "'a/b--c' is no Hub id, such as you/my-student. Cannot have -- or .. in"),
        (["--hub_dataset_id", "my labels"], "--hub_dataset_id 'my labels' is no Hub id"),
    ],
)  # fmt: skip
def test_what_the_teacher_cannot_do_is_said_before_the_clips_are_read(
    label, speech, tmp_path, monkeypatch, options, message
):
    def never(*args, **kwargs):
        raise AssertionError("the speech was loaded")

    monkeypatch.setattr("askd_hf.commands.pseudo_label.load_set", never)
    ended = label("--dataset", speech, "--output_dir", tmp_path / "out", *options)
    assert ended.returncode == 2 and message in ended.stderr, ended.stderr
    assert not list(tmp_path.rglob("*.jsonl"))


def test_a_result_inside_of_bare_audio_is_refused(label, speech, tmp_path):
    shutil.copytree(speech / "audio", tmp_path / "audio")
    inside = "--dataset", tmp_path / "audio", "--output_dir", tmp_path / "audio" / "labels"
    refused = label(*inside, *LENIENT)
    assert refused.returncode == 2 and "where the next command would take them for the dataset" in refused.stderr
    assert not (tmp_path / "audio" / "labels").exists()


def test_references_of_punctuation_are_none(label, tmp_path):
    """The teacher's transcripts are kept, as those of speech without transcripts."""
    folder = write_clips(tmp_path / "clips", SECONDS[:3], {"text": ["...", "?!", "-"]})
    done = label("--dataset", folder, "--output_dir", tmp_path / "out", *LENIENT)
    assert done.returncode == 0, done.stderr
    assert len(load_from_disk(str(tmp_path / "out" / "dataset"))) == 3


def test_a_column_of_other_languages_is_a_warning(label, tmp_path):
    folder = write_clips(tmp_path / "clips", SECONDS[:3], {"language": ["German", "en_US", "pt-BR"]})
    done = label("--dataset", folder, "--output_dir", tmp_path / "out", *LENIENT)
    assert done.returncode == 0, done.stderr
    assert "its column `language` has de, pt, but all clips are taken for en: leave them out" in done.stderr


def test_unlabeled_speech_becomes_a_dataset(label, speech, tmp_path):
    done = label("--dataset", speech, "--output_dir", tmp_path, "--timestamps", *LENIENT)
    assert done.returncode == 0, done.stderr
    assert f"8 rows, 0.00 hours: --dataset {tmp_path / 'dataset'}" in done.stdout
    rows = list(load_from_disk(str(tmp_path / "dataset")))
    lines = [json.loads(line) for line in (tmp_path / "transcripts/teacher/clips.jsonl").read_text().splitlines()]
    heard = {line["clip"]: line for line in lines}
    assert [row["clip"] for row in rows] == [f"audio/{i:03d}.wav" for i in range(8)]
    assert [row["speaker"] for row in rows] == SPEAKERS
    for i, row in enumerate(rows):
        assert row["text"] and row["text"] == heard[row["clip"]]["text"]
        assert row["segments"] == heard[row["clip"]]["segments"] and row["segments"]
        assert row["avg_logprob"] == heard[row["clip"]]["avg_logprob"]
        assert row["wer"] is None and row["prompt"] is None
        np.testing.assert_allclose(decode_audio(row["audio"]), tone(SECONDS[i], i), atol=1e-4)
    assert "language" not in rows[0] and "reference" not in rows[0]
    for card in (tmp_path / "README.md", tmp_path / "dataset" / "README.md"):
        text = card.read_text()
        assert "`teacher` transcribed 8 clips of `clips train`" in text
        assert "average log-probability per token at\n  least -50" in text and "word error rate at most" not in text
        assert str(speech) not in text and str(tmp_path) not in text and str(speech.parents[2]) not in text


def test_a_models_card_names_what_was_transcribed_and_by_whom(label, speech, tmp_path):
    (speech / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    assert label("--dataset", speech, "--split", "train[:3]", "--output_dir", tmp_path, *LENIENT).returncode == 0
    (speech / "README.md").unlink()
    moved = (tmp_path / "dataset").rename(tmp_path / "moved")
    found = TrainingData.of(SpeechSource(str(moved), None, "train"))
    assert found == TrainingData("clips", False, None, "train[:3]", transcribed_by="teacher", license="cc-by-4.0")
    (moved / "README.md").write_text("---\npseudo_labels: [what]\n---\n")
    assert TrainingData.of(SpeechSource(str(moved), None, "train")) == TrainingData("moved", False, None, "train")


def test_each_split_has_a_directory_of_its_own_by_default():
    given = dict(teacher="you/base", dataset="my/speech")
    names = [PseudoLabelArguments(**given, **more).output_dir for more in ({}, dict(split="test"))]
    names.append(PseudoLabelArguments(**given, dataset_config="fr", split="train.100").output_dir)
    names.append(PseudoLabelArguments(**given, split="train[:10%]+test").output_dir)
    assert names[:3] == ["runs/speech-by-base", "runs/speech-test-by-base", "runs/speech-fr-train.100-by-base"]
    assert names[3] == "runs/speech-train-10-test-by-base"


def test_of_clips_that_are_named_by_their_paths_the_paths_are_not_published(label, tmp_path):
    folder = write_clips(tmp_path / "speech", [0.3, 0.4], {})
    files = [str(folder / "audio" / f"00{i}.wav") for i in range(2)]
    names = {"clip": [files[0], "C:\\me\\b.wav"]}
    Dataset.from_dict({"audio": files} | names).cast_column("audio", Audio()).save_to_disk(str(tmp_path / "named"))
    done = label("--dataset", tmp_path / "named", "--output_dir", tmp_path / "out", *LENIENT)
    assert done.returncode == 0, done.stderr
    assert load_from_disk(str(tmp_path / "out" / "dataset"))["clip"][:] == ["000.wav", "b.wav"]
    for file in (tmp_path / "out" / "dataset").iterdir():  # nor in what the library writes
        assert bytes(tmp_path) not in file.read_bytes()


def test_the_card_says_which_rule_held_for_how_many(label, speech, tmp_path):
    assert label("--dataset", speech, "--output_dir", tmp_path / "first", *LENIENT).returncode == 0
    texts = load_from_disk(str(tmp_path / "first" / "dataset"))["text"][:]
    references = [text if i < 5 else "ignore_time_segment_in_scoring" for i, text in enumerate(texts)]
    folder = write_clips(tmp_path / "partly", SECONDS, {"speaker": SPEAKERS, "text": references})
    arguments = "--dataset", folder, "--output_dir", tmp_path / "out", *LENIENT
    assert label(*arguments).returncode == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "With a reference (5 rows): word error rate at most 10 %" in card
    assert "Without a reference (3 rows): average log-probability per token at\n  least -50" in card
    assert label(*arguments, "--concatenate").returncode == 0
    rows = list(load_from_disk(str(tmp_path / "out" / "dataset")))
    whole = sum(row["reference"] is not None for row in rows)
    assert 0 < whole < len(rows)
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        f"With a reference ({whole} rows)" in card and f"({len(rows) - whole} rows, at least one clip of each)" in card
    )


def test_references_in_capitals_choose_and_the_teachers_text_is_learned(label, speech, tmp_path):
    assert label("--dataset", speech, "--output_dir", tmp_path / "first", *LENIENT).returncode == 0
    texts = load_from_disk(str(tmp_path / "first" / "dataset"))["text"][:]
    references = [text.upper() for text in texts]
    references[2], references[5] = "SOMETHING ELSE", ""
    columns = {"speaker": SPEAKERS, "transcription": references}
    folder = write_clips(tmp_path / "labelled", SECONDS, columns)

    done = label("--dataset", folder, "--output_dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "6 of 8 transcripts are kept" in done.stdout
    kept = [0, 1, 3, 4, 6, 7]
    result = load_from_disk(str(tmp_path / "out" / "dataset"))
    assert result["text"][:] == [texts[i] for i in kept]
    assert result["reference"][:] == [references[i] for i in kept]
    assert result["wer"][:] == [0] * 6
    reasons = {row["clip"]: row["reason"] for row in dropped(tmp_path / "out")}
    assert reasons == {
        "audio/002.wav": "word error rate over 10 %",
        "audio/005.wav": "text for an empty reference",
    }

    done = label("--dataset", folder, "--output_dir", tmp_path / "out", "--label_source", "reference")
    assert load_from_disk(str(tmp_path / "out" / "dataset"))["text"][:] == [references[i] for i in kept]


def test_other_limits_and_packing_decode_nothing(label, speech, tmp_path, monkeypatch):
    arguments = "--dataset", speech, "--output_dir", tmp_path, "--timestamps"
    assert label(*arguments, *LENIENT).returncode == 0
    rows = list(load_from_disk(str(tmp_path / "dataset")))
    no_decoding(monkeypatch)
    limit = sorted(row["avg_logprob"] for row in rows)[3]
    done = label(*arguments, *LENIENT, "--logprob_threshold", limit)
    assert done.returncode == 0, done.stderr
    kept = [row for row in rows if row["avg_logprob"] >= limit]
    assert list(load_from_disk(str(tmp_path / "dataset"))) == kept and len(kept) == 5
    assert {row["clip"] for row in dropped(tmp_path)} == {row["clip"] for row in rows} - {r["clip"] for r in kept}

    done = label(*arguments, *LENIENT, "--concatenate", "--max_samples", 8)
    assert done.returncode == 0, done.stderr
    packs = list(load_from_disk(str(tmp_path / "dataset")))
    assert [row["text"] for row in packs] != [row["text"] for row in rows]
    assert " ".join(row["text"] for row in packs) == " ".join(row["text"] for row in rows)
    speakers = {f"audio/{i:03d}.wav": name for i, name in enumerate(SPEAKERS)}
    assert any(".." in row["clip"] for row in packs)
    assert [row["speaker"] for row in packs] == [speakers[row["clip"].partition("..")[0]] for row in packs]
    assert not (tmp_path / "concatenation").exists()


def test_packing_comes_after_filtering(label, speech, tmp_path):
    arguments = "--dataset", speech, "--output_dir", tmp_path, *LENIENT
    assert label(*arguments).returncode == 0
    rows = list(load_from_disk(str(tmp_path / "dataset")))
    worst = min(rows[:3], key=lambda row: row["avg_logprob"])["clip"]
    limit = sorted(row["avg_logprob"] for row in rows if row["clip"] == worst)[0] + 1e-9
    assert label(*arguments, "--logprob_threshold", limit, "--concatenate").returncode == 0
    good = [row for row in rows if row["avg_logprob"] >= limit]
    assert worst not in [row["clip"] for row in good] and len(good) > 1
    packs = list(load_from_disk(str(tmp_path / "dataset")))
    audio = [np.concatenate([decode_audio(row["audio"]) for row in of]) for of in (packs, good)]
    np.testing.assert_array_equal(*audio)
    assert " ".join(row["text"] for row in packs) == " ".join(row["text"] for row in good)


def test_corrupt_clips_are_counted_and_listed(label, speech, tmp_path, caplog):
    folder = shutil.copytree(speech, tmp_path / "corrupt")
    (folder / "audio" / "001.wav").write_bytes(b"RIFF, or so")
    (folder / "audio" / "004.wav").unlink()
    refused = label("--dataset", folder, "--output_dir", tmp_path / "out")
    assert refused.returncode == 2
    assert "row 1, audio/001.wav" in refused.stderr and "--on_bad_audio skip" in refused.stderr
    done = label("--dataset", folder, "--output_dir", tmp_path / "out", "--on_bad_audio", "skip", *LENIENT)
    assert done.returncode == 0, done.stderr
    assert "2 of 8 clips are invalid" in caplog.text
    with (tmp_path / "out" / "skipped.csv").open(newline="") as file:
        assert [(row["row"], row["clip"]) for row in csv.DictReader(file)] == [
            ("1", "audio/001.wav"),
            ("4", "audio/004.wav"),
        ]
    assert len(load_from_disk(str(tmp_path / "out" / "dataset"))) == 6


def test_other_settings_other_clips_and_another_teacher_are_refused(label, speech, tmp_path, teacher_dir):
    arguments = "--dataset", speech, "--output_dir", tmp_path / "out", *LENIENT
    assert label(*arguments).returncode == 0
    transcripts = tmp_path / "out" / "transcripts" / "teacher" / "clips.jsonl"
    before = transcripts.read_bytes()
    other = save_teacher(tmp_path / "other", seed=1)
    for changes, what in (
        (dict(teacher=other), "the model's weights"),
        (("--timestamps",), "the decoding settings (timestamps none, now segment)"),
        (("--max_samples", 5), "(8 clips, now 5)"),
    ):
        done = label(*arguments, **changes) if isinstance(changes, dict) else label(*arguments, *changes)
        assert done.returncode == 2
        assert what in done.stderr and "askd-hf pseudo-label --overwrite True, or --output_dir" in done.stderr
        assert transcripts.read_bytes() == before
    assert label(*arguments, "--overwrite", teacher=other).returncode == 0
    assert transcripts.read_bytes() != before


def test_a_killed_run_goes_on_to_the_same_dataset(label, teacher_dir, tmp_path):
    rng = np.random.default_rng(0)
    seconds = [round(float(length), 2) for length in rng.uniform(0.1, 1.0, size=60)]
    speech = write_clips(tmp_path / "speech", seconds, {"speaker": [f"s{i // 10}" for i in range(60)]})
    arguments = "--dataset", speech, "--timestamps", "--concatenate", "--batch_size", 3, *LENIENT
    whole = label(*arguments, "--output_dir", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr

    lines = tmp_path / "killed" / "transcripts" / "teacher" / "clips.jsonl"
    options = ["--teacher", teacher_dir, "--device", "cpu", "--output_dir", tmp_path / "killed"]
    killed = killed_when(lambda: lines.exists() and lines.read_bytes().count(b"\n") >= 9, SCRIPT, *arguments, *options)
    assert killed.returncode == -signal.SIGKILL
    left = lines.read_bytes().splitlines(keepends=True)
    assert 9 <= len(left) < 60
    lines.write_bytes(b"".join(left[:10]) + left[1][:30])  # in the middle of a batch, and of a line

    rest = label(*arguments, "--output_dir", tmp_path / "killed")
    assert rest.returncode == 0, rest.stderr
    assert lines.read_bytes() == (tmp_path / "whole" / "transcripts" / "teacher" / "clips.jsonl").read_bytes()
    results = [list(load_from_disk(str(tmp_path / run / "dataset"))) for run in ("whole", "killed")]
    assert results[0] == results[1] and 0 < len(results[0]) < 60


def test_an_interrupted_run_says_how_to_go_on(label, speech, tmp_path, monkeypatch):
    generate = WhisperForConditionalGeneration.generate
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*args, **kwargs)

    arguments = "--dataset", speech, "--output_dir", tmp_path, "--batch_size", 2, *LENIENT
    with monkeypatch.context() as patch:
        patch.setattr(WhisperForConditionalGeneration, "generate", interrupted)
        stopped = label(*arguments)
    assert stopped.returncode == 130
    assert "4 of 8 clips are transcribed; run the same command again to resume" in stopped.stderr
    assert label(*arguments).returncode == 0
    assert len(load_from_disk(str(tmp_path / "dataset"))) == 8


def test_a_multilingual_teacher_says_which_language_it_is(label, speech, tmp_path):
    model, processor = make_multilingual()
    model.generation_config.max_length = 32
    incline_to_end(model)
    model.save_pretrained(tmp_path / "multilingual")
    processor.save_pretrained(tmp_path / "multilingual")
    arguments = "--dataset", speech, "--output_dir", tmp_path / "out", *LENIENT
    assert "--language is required" in label(*arguments, teacher=tmp_path / "multilingual").stderr
    done = label(*arguments, "--language", "chinese", "--task", "translate", teacher=tmp_path / "multilingual")
    assert done.returncode == 0, done.stderr
    result = load_from_disk(str(tmp_path / "out" / "dataset"))
    assert set(result["language"]) == {"zh"} and set(result["task"]) == {"translate"}
    # transcripts are no references for translations, unless they are named
    transcribed = write_clips(tmp_path / "speech", SECONDS[:2], {"transcription": ["dead beef", "cab"]})
    given = [
        "--dataset",
        transcribed,
        "--language",
        "chinese",
        "--task",
        "translate",
        "--wer_threshold",
        "inf",
        *LENIENT,
    ]
    for out, more in (("without", []), ("named", ["--text_column_name", "transcription"])):
        done = label(*given, *more, "--output_dir", tmp_path / out, teacher=tmp_path / "multilingual")
        assert done.returncode == 0, done.stderr
        columns = load_from_disk(str(tmp_path / out / "dataset")).column_names
        assert ("reference" in columns) is bool(more)
    assert "language: en\n" in (tmp_path / "out" / "README.md").read_text()  # of the texts
    refused = label(*arguments, "--language", "english", "--task", "translate", teacher=tmp_path / "multilingual")
    assert refused.returncode == 2 and "language zh, now en" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--concatenate"], "--speaker_column"),
        (["--label_source", "reference"], "the dataset has no transcripts"),
        (["--label_source", "reference", "--timestamps"], "can't be combined with --timestamps"),
        (["--concatenate_seconds", 3], "--concatenate_seconds requires --concatenate"),
        (["--batch_size", 0], "must be at least 1, got 0"),
        (["--split", "test"], "has no split 'test'; it has train"),
    ],
)
def test_what_cannot_be_done_is_refused_before_decoding(label, speech, tmp_path, monkeypatch, arguments, message):
    shutil.copytree(speech / "audio", tmp_path / "audio")  # without metadata
    no_decoding(monkeypatch)
    done = label("--dataset", tmp_path / "audio", "--output_dir", tmp_path / "out", *arguments)
    assert done.returncode == 2 and message in done.stderr


@pytest.mark.slow
def test_the_result_is_pushed_and_trained_on(label, speech, teacher_dir, tmp_path):
    """In processes of their own, because the libraries read the endpoint once."""
    student = init_student(load_whisper(str(teacher_dir)), decoder_layers=2)
    student.save_pretrained(tmp_path / "student")
    load_processor(str(teacher_dir)).save_pretrained(tmp_path / "student")
    token = "hf_tokenThatMayWrite"

    with serve_hub(tmp_path / "hub", {token: "write"}) as hub:

        def run(name: str, *arguments, with_token: bool = True) -> Ended:
            environment = hub_environment(hub, tmp_path / "home", token if with_token else None)
            script = ROOT / "examples" / name
            return run_there(script, *arguments, directory=tmp_path, environment=environment)

        arguments = "--teacher", teacher_dir, "--device", "cpu", "--dataset", speech, "--output_dir", "out", *LENIENT
        arguments += "--timestamps", "--concatenate", "--hub_dataset_id", "me/labels"
        refused = run("pseudo_label.py", *arguments, with_token=False)
        assert refused.returncode == 2 and "Traceback" not in refused.stderr
        assert "log in with `hf auth login`, or remove --hub_dataset_id" in refused.stderr
        assert not (tmp_path / "out" / "dataset").exists()  # before anything is transcribed
        hub.failures.append(Failure("POST /api/repos/create", status=403))
        failed = run("pseudo_label.py", *arguments)
        assert failed.returncode == 2 and "Traceback" not in failed.stderr
        assert "the labels are safe in out: run the same command again" in failed.stderr
        pushed = run("pseudo_label.py", *arguments)
        assert pushed.returncode == 0, pushed.stderr
        assert hub.private == {"datasets/me/labels"}
        card = (tmp_path / "hub" / "datasets" / "me" / "labels" / "README.md").read_text()
        assert "# Speech transcribed by" in card and "dataset_info" in card and "pseudo-labels" in card

        assert str(teacher_dir) not in card and str(speech) not in card

        others = tmp_path / "hub" / "datasets" / "me" / "described"
        others.mkdir()
        (others / "README.md").write_text("---\ntags: [mine]\n---\n\nBy hand.\n")
        for repository in ("me/labels", "me/described"):
            pushed = run("pseudo_label.py", *arguments[:-1], repository, "--repeated_5gram_threshold", 99)
            assert pushed.returncode == 0, pushed.stderr
        card = (tmp_path / "hub" / "datasets" / "me" / "labels" / "README.md").read_text()
        assert "repeated 5-grams at most 99 %" in card and "dataset_info" in card
        card = (others / "README.md").read_text()
        assert "By hand." in card and "5-grams" not in card and "dataset_info" in card

        train = "--student", "student", "--teacher", teacher_dir, "--max_steps", 2, "--logging_steps", 1, "--use_cpu"
        trained = run("distill.py", *train, "--dataset", "me/labels", "--output_dir", "trained")
        assert trained.returncode == 0, trained.stderr
        state = json.loads((tmp_path / "trained" / "trainer_state.json").read_text())
        assert len([row["loss"] for row in state["log_history"] if "loss" in row]) == 2
