"""`examples/distill.py` on several datasets, streams, two languages, timestamps and prompts."""

import csv
import itertools
import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import soundfile
import torch
from datasets import Dataset, Features, Value, load_from_disk
from models import by_generate, by_pipeline, make_multilingual, make_processor, make_whisper
from processes import killed_when, launch_two, start
from safetensors.torch import load_file
from scripts import ROOT, run_here, steps_printed
from speech import encoded, tone, write_speech
from training import learn_by_heart
from transformers import WhisperForConditionalGeneration, pipeline

from askd_hf import ASKDTrainer
from askd_hf.arguments import DataArguments, MixArguments
from askd_hf.config import ASKDConfig
from askd_hf.data import SpeechCollator, decode_audio, load_speech_dataset
from askd_hf.data.columns import AUDIO_FILE, SEGMENTS
from askd_hf.errors import UserError
from askd_hf.evaluation import Results
from askd_hf.models.loading import load_processor
from askd_hf.training.checkpoint_lookup import checkpoint_to_resume
from askd_hf.training.datasets import training_speech

SCRIPT = ROOT / "examples" / "distill.py"


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory) -> Path:
    """An English-only teacher with timestamps and prompts."""
    directory = tmp_path_factory.mktemp("teacher")
    processor = make_processor(("<|startofprev|>",))
    make_whisper(processor, vocab_size=len(processor.tokenizer) + 51).save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def multilingual_dir(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("multilingual")
    model, processor = make_multilingual()
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[Path]:
    """Two directories of speech, the second with times and the text before, and a corrupt clip."""
    first, second = (tmp_path_factory.mktemp(name) for name in ("first", "second"))
    write_speech(first, clips=14, seed=0)
    write_speech(second / "files", clips=9, seed=1)
    rows = []
    for row in load_speech_dataset(str(second / "files"), None, "train"):
        seconds = soundfile.info(row["audio"]["path"]).duration
        segments = [
            {"start": 0.0, "end": 0.1, "text": row["text"][:1]},
            {"start": 0.12, "end": round(seconds, 2), "text": row["text"][1:]},
        ]
        rows.append({"file_name": f"files/{row['clip']}", "text": row["text"], "segments": segments, "prompt": "fed"})
    (second / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.move(second / "files" / "metadata.csv", second / "unused.csv")
    (second / "files" / "audio" / "004.wav").write_bytes(b"no audio")
    return [first, second]


def options(teacher: Path, two: list[Path], output_dir: Path, *more) -> list[str]:
    command = (
        f"--teacher {teacher} --dataset {two[0]} {two[1]} --output_dir {output_dir} --use_cpu --disable_tqdm True"
    )
    command += " --per_device_train_batch_size 4 --learning_rate 1e-2 --logging_steps 1 --on_bad_audio skip"
    return [*command.split(), *map(str, more)]


RESUME = ("--resume_from_checkpoint", "last")
STREAM = "--streaming True --max_steps 14 --dataset_probabilities 0.6 0.4 --shuffle_buffer_size 6 "
STREAM += "--no_speech_dataset synthetic --no_speech_probability 0.1 --timestamp_probability 0.5 "
STREAM += "--condition_on_prev_probability 0.5 --augmentations gain noise "
STREAM += "--max_duration_in_seconds 0.95 --save_strategy steps --save_steps 2 --save_total_limit 8"


def log_of(run: Path) -> list[dict]:
    """What each training step logged, timings aside."""
    state = json.loads(
        max(run.glob("checkpoint-*/trainer_state.json"), key=lambda file: file.stat().st_mtime).read_text()
    )
    timings = ("data_time_ratio", "samples_per_second")
    return [{k: v for k, v in row.items() if k not in timings} for row in state["log_history"] if "loss" in row]


@pytest.mark.slow
def test_a_streamed_mix_killed_twice_ends_as_if_it_had_not_been(tmp_path, teacher_dir, two):
    """In the middle of an epoch, with all that is random about a clip, by rows that can't be used or aren't wanted."""
    whole = start(SCRIPT, *options(teacher_dir, two, tmp_path / "whole", *STREAM.split()))
    arguments = options(teacher_dir, two, tmp_path / "killed", *STREAM.split())
    for number, checkpoint in enumerate(("checkpoint-4", "checkpoint-8")):
        state = tmp_path / "killed" / checkpoint / "trainer_state.json"
        killed = killed_when(
            state.exists, SCRIPT, *arguments, *(["--resume_from_checkpoint", "last"] if number else [])
        )
        assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    steps_done = int(checkpoint_to_resume(str(tmp_path / "killed"), "last").rpartition("-")[2])
    resumed = start(SCRIPT, *arguments, "--resume_from_checkpoint", "last", "--dataloader_num_workers", "2")
    for process, steps in ((whole, 14), (resumed, 14 - steps_done)):
        ended = process.ended()
        assert ended.returncode == 0, ended.stderr
        assert len(steps_printed(ended.stdout)) == steps  # and it didn't begin at the beginning
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "killed")
    listed = [list(csv.reader((tmp_path / name / "skipped-stream.csv").open())) for name in ("whole", "killed")]
    assert listed[0] == listed[1]
    assert len(listed[0]) - 1 == log_of(tmp_path / "whole")[-1]["skipped_rows"]
    reasons = {reason.partition(":")[0] for _, reason in listed[0][1:]}
    assert reasons == {"not an audio file, or an unknown format", "over --max_duration_in_seconds"}


def test_a_stream_starts_anew_with_a_smaller_batch(monkeypatch, capsys, tmp_path, teacher_dir, two):
    """After --auto_find_batch_size has found it, the run is the one that had this batch from the start."""
    step, tried = ASKDTrainer.training_step, []

    def little_memory(trainer, *args):
        size = trainer.state.train_batch_size
        tried.append(size)
        if size > 2 and trainer.state.global_step >= 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return step(trainer, *args)

    monkeypatch.setattr(ASKDTrainer, "training_step", little_memory)
    stream = STREAM.replace("--max_steps 14", "--max_steps 12 --compare False").split()
    for name, more in (("expected", ("--per_device_train_batch_size", "2")), ("found", ("--auto_find_batch_size",))):
        ended = run_here(monkeypatch, capsys, *options(teacher_dir, two, tmp_path / name, *stream, *more))
        assert ended[0] == 0, ended[2]
    assert sorted({*tried}) == [2, 3, 4]
    assert log_of(tmp_path / "found") == log_of(tmp_path / "expected")
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("expected", "found")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    listed = [(tmp_path / name / "skipped-stream.csv").read_text() for name in ("expected", "found")]
    assert listed[0] == listed[1]


def test_a_clip_of_a_stream_that_cannot_be_used_ends_the_run_by_name(monkeypatch, capsys, tmp_path, teacher_dir, two):
    arguments = options(teacher_dir, two[::-1], tmp_path / "run", "--streaming", "True", "--max_steps", "9")
    ended = run_here(monkeypatch, capsys, *arguments, "--on_bad_audio", "error")
    assert ended[0] == 2
    assert re.search(r"step \d, files/audio/004.wav: not an audio file.*--on_bad_audio skip", ended[2])


def test_two_processes_share_a_stream_also_killed_and_resumed(monkeypatch, capsys, tmp_path, teacher_dir, two):
    """Each reads other clips. Killed and resumed it ends bit for bit as if it had not been, on as many processes."""
    common = "--streaming True --max_steps 9 --dataset_probabilities 0.6 0.4 --compare False --optim sgd"
    common += " --save_strategy steps --save_steps 1 --max_duration_in_seconds 0.8 --per_device_train_batch_size 2"
    whole, killed = (options(teacher_dir, two, tmp_path / name, *common.split()) for name in ("whole", "killed"))
    ended = launch_two(SCRIPT, *whole)
    assert ended.returncode == 0, ended.stderr
    ended = launch_two(SCRIPT, *killed, until=(tmp_path / "killed" / "checkpoint-3" / "trainer_state.json").exists)
    assert ended.returncode == -signal.SIGKILL and not (tmp_path / "killed" / "model.safetensors").exists()
    steps_done = int(checkpoint_to_resume(str(tmp_path / "killed"), "last").rpartition("-")[2])
    refused = run_here(monkeypatch, capsys, *killed, "--gradient_accumulation_steps", "2", *RESUME)
    assert refused.returncode == 2 and "(streaming.processes 2 -> 1)" in refused.stderr, refused.stderr
    ended = launch_two(SCRIPT, *killed, *RESUME)
    assert ended.returncode == 0, ended.stderr
    assert len(steps_printed(ended.stdout)) == 9 - steps_done
    skipped = []
    for name in ("whole", "killed"):
        files = sorted((tmp_path / name).glob("skipped-stream*.csv"))
        skipped.append([[tuple(row) for row in csv.reader(file.open())][1:] for file in files])
    assert skipped[0] == skipped[1] and len(skipped[0]) == 2 and any(skipped[0])
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--streaming True", "--streaming requires --max_steps"),
        ("--streaming True --max_steps 2 --encoder_cache_dir x", "are not supported with --streaming"),
        ("--timestamp_probability 0.5 --teacher_cache_dir x", "--teacher_cache_dir is not supported with"),
        ("--dataset_probabilities 1 2 3", "requires one value per dataset, got 3 for 2 datasets"),
        ("--dataset_probabilities 1 -2", "must be above 0, got -2.0"),
        ("--condition_on_prev_probability 1.5", "must be between 0 and 1, got 1.5"),
        ("--task sing", "--task must be one of transcribe, translate, got 'sing'"),
        (
            "--no_speech_dataset synthetic --no_speech_probability 1",
            "--no_speech_probability must be strictly between 0 and 1, got 1.0",
        ),
        ("--encoder_cache_dir x --augmentations gain", "--augmentations is not supported with --encoder_cache_dir"),
        (
            "--augmentations gain --dataloader_persistent_workers True --dataloader_num_workers 1",
            "--dataloader_persistent_workers is not supported",
        ),
        ("--streaming True --max_steps 2 --train_sampling_strategy group_by_length", "the lengths are unknown"),
    ],
)
def test_options_that_do_not_go_together_are_refused(monkeypatch, capsys, tmp_path, teacher_dir, two, more, message):
    monkeypatch.chdir(tmp_path)
    ended = run_here(monkeypatch, capsys, *options(teacher_dir, two, tmp_path / "run", *more.split()))
    assert ended[0] == 2 and message in ended[2], ended[2]


@pytest.mark.slow
def test_filters_and_skipped_rows_are_those_of_training(monkeypatch, capsys, tmp_path, teacher_dir, speech_dir):
    arguments = f"--teacher {teacher_dir} --dataset {speech_dir} --eval_splits validation --use_cpu --streaming True"
    arguments += f" --max_steps 20 --per_device_train_batch_size 4 --output_dir {tmp_path / 'run'}"
    arguments += " --min_duration_in_seconds 0.6 --eval_steps 20 --logging_steps 1 --disable_tqdm True"
    arguments += " --no_speech_dataset synthetic --no_speech_probability 0.3"
    ended = run_here(monkeypatch, capsys, *arguments.split())
    assert ended[0] == 0, ended[2]
    with (tmp_path / "run" / "skipped-stream.csv").open() as file:
        skipped = list(csv.reader(file))[1:]
    assert skipped and all(
        clip.startswith("train/") and "--min_duration_in_seconds" in reason for clip, reason in skipped
    )
    (result,) = Results.load(tmp_path / "run" / "evaluation" / "results.json").sets
    assert result.clips == 6
    # without epochs they come ten times in the run
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert [row["step"] for row in state["log_history"] if "eval_wer" in row] == list(range(2, 21, 2))
    assert {file.name for file in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-18", "checkpoint-20"}


def test_a_stream_of_which_nothing_is_wanted_ends(monkeypatch, capsys, tmp_path, teacher_dir, two):
    more = ["--streaming", "True", "--max_steps", "9", "--max_duration_in_seconds", "0.1"]
    ended = run_here(monkeypatch, capsys, *options(teacher_dir, two, tmp_path / "run", *more))
    assert ended[0] == 2 and "step 5: every clip of the last 5 updates was invalid or filtered out" in ended[2]


def test_a_teachers_answers_are_for_clips_as_they_are(monkeypatch, capsys, tmp_path, teacher_dir, two):
    labelled = tmp_path / "labelled"
    arguments = options(teacher_dir, two[1:] * 2, tmp_path / "run", "--max_steps", 1, "--teacher_cache_dir", labelled)
    ended = run_here(monkeypatch, capsys, *arguments)
    assert ended[0] == 0, ended[2]
    again = f"--teacher {teacher_dir} --dataset {labelled} --output_dir {tmp_path / 'other'} --use_cpu"
    for more in ("--timestamp_probability 0.5", "--augmentations gain --augment_teacher True"):
        ended = run_here(monkeypatch, capsys, *again.split(), *more.split())
        assert ended[0] == 2 and "the dataset has cached soft labels of the unchanged clips" in ended[2]


@pytest.mark.parametrize("streaming", [True, False])
def test_mixes_and_streams_follow_the_data_seed(tmp_path, processor, two, streaming):
    collator = SpeechCollator(processor, make_whisper(processor).config)
    data = DataArguments(dataset=[str(two[0])] * 2, text_column_name="transcription")
    mixing = MixArguments(streaming=streaming, dataset_probabilities=[0.5, 0.5])

    def order(**seeds) -> list[str]:
        config = ASKDConfig(output_dir=str(tmp_path), max_steps=1, use_cpu=True, **seeds)
        speech = training_speech(data, mixing, config, collator, multilingual=False)
        return [row["clip"] for row in itertools.islice(speech.rows() if streaming else speech, 14)]

    followed = order(seed=1, data_seed=9)
    assert followed == order(seed=2, data_seed=9) == order(seed=9) != order(seed=1)


def test_long_clips_are_cut_where_the_times_are_known_and_skipped_elsewhere(tmp_path, processor, caplog):
    """One's own speech, without times of words, beside the teacher's transcripts, which have them."""
    audio = [{"bytes": encoded(tone(seconds=seconds)), "path": None} for seconds in (1.6, 0.6)]
    words = [
        [{"start": 0.0, "end": 0.7, "text": "ab"}, {"start": 0.9, "end": 1.5, "text": "cd"}],
        [{"start": 0.0, "end": 0.5, "text": "ef"}],
    ]
    columns = {"audio": audio, "text": ["ab cd", "ef"], "clip": ["long", "short"], "words": words}
    features = Features(audio=AUDIO_FILE, text=Value("string"), clip=Value("string"), words=SEGMENTS)
    timed = Dataset.from_dict(columns, features=features)
    timed.save_to_disk(tmp_path / "timed")
    timed.remove_columns("words").save_to_disk(tmp_path / "untimed")
    collator = SpeechCollator(processor, make_whisper(processor).config)  # a window of 1 s
    config = ASKDConfig(output_dir=str(tmp_path / "run"), max_steps=1, use_cpu=True)

    def texts(*names: str) -> list[str]:
        data = DataArguments(dataset=[str(tmp_path / name) for name in names], long_clips="cut")
        return sorted(training_speech(data, MixArguments(), config, collator, multilingual=False)["text"][:])

    assert texts("untimed", "timed") == ["ab", "cd", "ef", "ef"]
    assert "untimed: 1 of 2 clips are filtered out (1 longer than the window of 1 s)" in caplog.text
    assert "longer than the window of 1 s: 1.60 s" in (tmp_path / "run" / "skipped-training-untimed.csv").read_text()
    with pytest.raises(UserError, match="--long_clips cut requires the times of words or segments"):
        texts("untimed")


# ---- languages ----


def test_two_languages_in_one_run(monkeypatch, capsys, tmp_path, multilingual_dir, speech_dir):
    chinese = tmp_path / "chinese"
    for split, clips in (("train", 6), ("validation", 3)):
        write_speech(chinese / split, clips=clips, seed=5)
    arguments = f"--teacher {multilingual_dir} --dataset {speech_dir} {chinese} --language english zh --use_cpu"
    arguments += f" --output_dir {tmp_path / 'run'} --eval_splits validation --num_train_epochs 2"
    arguments += " --per_device_train_batch_size 8 --eval_strategy epoch"
    ended = run_here(monkeypatch, capsys, *arguments.split(), "--text_normalizer", "english")
    assert (
        ended[0] == 2
        and f"--text_normalizer english requires English transcripts, and {chinese} is zh; choose basic" in ended[2]
    )
    ended = run_here(monkeypatch, capsys, *arguments.split())
    assert ended[0] == 0, ended[2]
    sets = {entry.language: entry for entry in Results.load(tmp_path / "run" / "evaluation" / "results.json").sets}
    assert {entry.name: (language, entry.clips) for language, entry in sets.items()} == {
        f"{speech_dir.name}-validation": ("en", 6),
        "chinese-validation": ("zh", 3),
    }
    assert sets["zh"].normalizer == "multilingual, by letter" and sets["en"].normalizer.startswith("english")
    student = WhisperForConditionalGeneration.from_pretrained(tmp_path / "run")
    assert student.generation_config.language is None  # found out clip by clip
    tone = soundfile.read(chinese / "validation" / "audio" / "000.wav")[0]
    heard = [by_pipeline(tmp_path / "run", tone, language=language) for language in ("en", "zh")]
    assert heard == [by_generate(tmp_path / "run", tone, language=language) for language in ("en", "zh")]
    assert heard[0] != heard[1]
    card = (tmp_path / "run" / "README.md").read_text()
    assert "languages `en` and `zh`" in card and re.search(r"^language:\n- en\n- zh$", card, re.MULTILINE)


def test_a_column_says_what_is_spoken(monkeypatch, capsys, tmp_path, multilingual_dir, speech_dir):
    mixed = load_speech_dataset(str(speech_dir), None, "train")
    languages = ["Chinese", "en"] * 8
    mixed = mixed.add_column("language", languages).add_column("task", ["translate", "transcribe"] * 8)
    mixed.save_to_disk(tmp_path / "mixed")
    arguments = (
        f"--teacher {multilingual_dir} --dataset {tmp_path / 'mixed'} --output_dir {tmp_path / 'run'} --use_cpu"
    )
    arguments += " --eval_splits train --max_steps 2 --teacher_cache_dir " + str(tmp_path / "labelled")
    ended = run_here(monkeypatch, capsys, *arguments.split())
    assert ended[0] == 0, ended[2]
    sets = Results.load(tmp_path / "run" / "evaluation" / "results.json").sets
    assert [(entry.name, entry.language, entry.task, entry.clips) for entry in sets] == [
        ("mixed-en", "en", "transcribe", 8),
        ("mixed-zh-translate", "zh", "translate", 8),
    ]
    labelled = load_from_disk(tmp_path / "labelled")
    assert labelled["language"][:] == ["zh", "en"] * 8 and labelled["task"][:2] == ["translate", "transcribe"]
    student = WhisperForConditionalGeneration.from_pretrained(tmp_path / "run")
    assert (student.generation_config.language, student.generation_config.task) == (None, "transcribe")
    summary = json.loads((tmp_path / "run" / "training.json").read_text())
    assert summary["provenance"]["tasks"] == ["transcribe", "translate"]  # of the column
    wrong = mixed.remove_columns("language").add_column("language", ["en"] * 15 + ["klingon"])
    wrong.save_to_disk(tmp_path / "wrong")
    again = arguments.replace(str(tmp_path / "mixed"), str(tmp_path / "wrong")).replace("/run", "/other")
    ended = run_here(monkeypatch, capsys, *again.split())
    assert ended[0] == 2 and "row 15, train/audio/015.wav: the model doesn't support language 'klingon'" in ended[2]


def test_sounds_of_a_stream_have_its_languages(tmp_path, multilingual_dir, speech_dir):
    """Of the column `language`, or the option: the student learns to write nothing where it is asked for German."""
    rows = load_speech_dataset(str(speech_dir), None, "train")
    for name, column in (("chinese", ["zh"] * 15 + [""]), ("none", None)):
        saved = rows if column is None else rows.add_column("language", column)
        saved.save_to_disk(tmp_path / name)
    processor = load_processor(str(multilingual_dir))
    collator = SpeechCollator(processor, WhisperForConditionalGeneration.from_pretrained(multilingual_dir).config)
    mixing = MixArguments(streaming=True, no_speech_dataset="synthetic", no_speech_probability=0.5)
    config = ASKDConfig(output_dir=str(tmp_path), max_steps=1, use_cpu=True)
    for data, expected in (
        (DataArguments(dataset=[str(tmp_path / "chinese")]), {("zh", "transcribe")}),
        (DataArguments(dataset=[str(tmp_path / "none")], language=["zh"], task=["translate"]), {("zh", "translate")}),
    ):
        stream = training_speech(data, mixing, config, collator, multilingual=True)
        sounds = [row for row in itertools.islice(stream.rows(), 30) if row["no_speech"]]
        assert sounds and {(row["language"], row["task"]) for row in sounds} == expected


# ---- arrays ----


def test_arrays_of_samples_are_trained_on_and_refused_where_files_are_copied(
    monkeypatch, capsys, tmp_path, teacher_dir, two
):
    rows = load_speech_dataset(str(two[0]), None, "train")
    sounds = [{"array": decode_audio(row["audio"]).tolist(), "sampling_rate": 16_000} for row in rows]
    Dataset.from_dict({"text": rows["text"][:], "audio": sounds}).save_to_disk(tmp_path / "arrays")
    arguments = f"--teacher {teacher_dir} --dataset {tmp_path / 'arrays'} --output_dir {tmp_path / 'run'} --use_cpu"
    ended = run_here(monkeypatch, capsys, *arguments.split(), "--max_steps", "2")
    assert ended[0] == 0, ended[2]
    assert "reference:" in ended[1] and (tmp_path / "run" / "README.md").is_file()
    again = arguments.replace("/run ", "/other ") + f" --teacher_cache_dir {tmp_path / 'cache'}"
    ended = run_here(monkeypatch, capsys, *again.split())
    assert ended[0] == 2
    assert "--teacher_cache_dir: cannot cache datasets whose audio is stored as arrays; save it" in ended[2]


# ---- timestamps ----


@pytest.mark.slow
def test_a_student_trained_with_timestamps_gives_them(monkeypatch, capsys, tmp_path, two):
    """Before training it is random; it learns one clip by heart, with its times and without."""
    processor = make_processor(("<|startofprev|>",))
    teacher = make_whisper(processor, vocab_size=len(processor.tokenizer) + 51)
    teacher.generation_config.alignment_heads = [[3, 0], [3, 1]]
    teacher.save_pretrained(tmp_path / "teacher")
    processor.save_pretrained(tmp_path / "teacher")
    more = "--preset ce --max_train_samples 1 --timestamp_probability 0.5 --max_steps 120 --learning_rate 5e-3"
    arguments = options(tmp_path / "teacher", two[1:] * 2, tmp_path / "run", *more.split())
    ended = run_here(monkeypatch, capsys, *arguments)
    assert ended[0] == 0, ended[2]
    (row,) = load_speech_dataset(str(two[1]), None, "train[:1]")
    clip = {"raw": soundfile.read(row["audio"]["path"])[0], "sampling_rate": 16_000}
    transcribe = pipeline("automatic-speech-recognition", model=str(tmp_path / "run"))
    heard = transcribe(dict(clip), return_timestamps=True)
    expected = [(segment["start"], segment["end"], segment["text"]) for segment in row["segments"]]
    assert [(*chunk["timestamp"], chunk["text"].strip()) for chunk in heard["chunks"]] == [
        (pytest.approx(start, abs=0.011), pytest.approx(end, abs=0.011), text) for start, end, text in expected
    ]
    assert heard["text"].split() == [text for *_, text in expected]
    assert transcribe(dict(clip))["text"].strip() == row["text"]
    words = transcribe(dict(clip), return_timestamps="word")["chunks"]
    assert [word["text"].strip() for word in words] == [text for *_, text in expected]
    seconds = len(clip["raw"]) / 16_000
    times = [time for word in words for time in word["timestamp"]]
    assert times == sorted(times) and times[0] >= 0.0 and times[-1] <= seconds + 0.02
    assert 'transcribe("lecture.flac", return_timestamps=True' in (tmp_path / "run" / "README.md").read_text()


# ---- what the teacher says, and nothing more ----


@pytest.mark.slow
def test_a_teacher_of_other_tokens_can_still_transcribe(monkeypatch, capsys, tmp_path, multilingual_dir, speech_dir):
    """English-only and multilingual models share no tokens: the student learns from the teacher's transcripts."""
    monkeypatch.chdir(tmp_path)
    audio = write_speech(tmp_path / "audio", clips=6, seed=3)
    processor = make_processor()
    teacher = make_whisper(processor)
    learn_by_heart(teacher, processor, audio)
    teacher.save_pretrained("teacher")
    processor.save_pretrained("teacher")
    said = load_speech_dataset(str(audio), None, "train")["text"][:]
    (audio / "metadata.csv").unlink()
    arguments = f"--student {multilingual_dir} --teacher teacher --unlabeled_dataset audio --language en --use_cpu"
    arguments += " --max_steps 2 --output_dir run"
    finetune = ROOT / "examples" / "finetune.py"
    ended = run_here(monkeypatch, capsys, *arguments.split(), file=finetune)
    assert ended[0] == 0, ended[2]
    labelled = load_from_disk("runs/audio-by-teacher/dataset")
    assert labelled["text"][:] == said
    facts = json.loads((tmp_path / "run" / "training.json").read_text())
    assert facts["provenance"]["speech"] == [
        {
            "dataset": "audio",
            "on_hub": False,
            "config": None,
            "split": "train",
            "transcribed_by": "teacher",
            "license": None,
        }
    ]
    ended = run_here(monkeypatch, capsys, "--student", multilingual_dir, "--unlabeled_dataset", "audio", file=finetune)
    assert ended[0] == 2 and "--unlabeled_dataset requires --teacher" in ended[2]
    two = [
        "--teacher",
        "teacher",
        "--unlabeled_dataset",
        "audio",
        "--dataset",
        "x",
        "y",
        "--language",
        "en",
        "zh",
        "--output_dir",
        "another",
    ]
    ended = run_here(monkeypatch, capsys, "--student", multilingual_dir, *two, file=finetune)
    assert ended[0] == 2 and "--unlabeled_dataset requires a single --language, got en, zh" in ended[2]


# ---- soft labels in a mix ----


def test_a_teacher_cache_with_sounds_is_a_dataset_for_a_run_without_a_teacher(
    monkeypatch, capsys, tmp_path, teacher_dir, speech_dir, caplog
):
    """Its clips without speech keep their empty transcripts. Mixed with speech without soft labels it needs one."""
    common = f"--use_cpu --max_steps 2 --per_device_train_batch_size 4 --compare False --dataset {speech_dir}"
    common += f" --no_speech_dataset synthetic --no_speech_probability 0.2 --teacher_cache_dir {tmp_path / 'cache'}"
    common += " --teacher_top_k 8"
    ended = run_here(monkeypatch, capsys, *f"{common} --teacher {teacher_dir} --output_dir {tmp_path / 'a'}".split())
    assert ended.returncode == 0, ended.stderr
    saved = load_from_disk(tmp_path / "cache")
    assert sum(row is True for row in saved["no_speech"][:]) == 4 and len(saved) == 20
    alone = f"--use_cpu --max_steps 2 --compare False --student {tmp_path / 'a'} --dataset {tmp_path / 'cache'}"
    ended = run_here(monkeypatch, capsys, *alone.split(), "--output_dir", tmp_path / "b")
    assert ended.returncode == 0, ended.stderr
    summary = json.loads((tmp_path / "b" / "training.json").read_text())
    assert (summary["clips"], summary["no_speech_clips"]) == (16, 4)
    assert not caplog.text.count("soft labels")
    ended = run_here(monkeypatch, capsys, *alone.split(), speech_dir, "--output_dir", tmp_path / "c")
    assert ended.returncode == 2 and "--preset askd requires --teacher" in ended.stderr
    assert "are not used, because" in caplog.text and "train on cache alone" in caplog.text


def test_a_resumed_stream_must_have_the_same_rows(monkeypatch, capsys, tmp_path, teacher_dir, two):
    arguments = options(teacher_dir, two[:1] * 2, tmp_path / "run", "--streaming", "True", "--max_steps", 4)
    arguments += ["--save_strategy", "steps", "--save_steps", "2", "--compare", "False"]
    assert run_here(monkeypatch, capsys, *arguments).returncode == 0
    for option, change in (
        (["--text_normalizer", "basic"], "row_options.text_normalizer none -> basic"),
        (["--max_train_samples", 9], "row_options.max_train_samples None -> 9"),
    ):
        ended = run_here(monkeypatch, capsys, *arguments, "--resume_from_checkpoint", "last", *option)
        assert ended.returncode == 2 and change in ended.stderr, ended.stderr
