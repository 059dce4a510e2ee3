"""Selecting a student's alignment heads, and the word times that it is based on."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from fake_hub import hub_of_this_process
from models import make_multilingual, make_processor, make_whisper
from run_plans import plan_of
from scripts import ROOT, run_here
from speech import write_speech
from spoken_digits import spoken_strings
from transformers import WhisperFeatureExtractor, WhisperProcessor
from transformers.generation.utils import GenerateEncoderDecoderOutput
from transformers.models.whisper.generation_whisper import _dynamic_time_warping

from askd_hf.arguments.select_heads import SelectHeadsArguments
from askd_hf.commands import select_heads as commands
from askd_hf.commands.main import main
from askd_hf.commands.select_heads import load_clips, select_heads
from askd_hf.data import load_speech_dataset
from askd_hf.data.audio import waveform
from askd_hf.errors import UserError
from askd_hf.models import word_times
from askd_hf.models.alignment_heads import AlignedClip, best_heads, boundary_errors, select_alignment_heads
from askd_hf.models.loading import load_processor, load_whisper
from askd_hf.models.student import init_student
from askd_hf.models.word_times import (
    align,
    attending,
    attention_of_heads,
    encode,
    matching_words,
    split_words,
    time_words,
)

HEADS = [[2, 0], [2, 3], [3, 0], [3, 3]]  # of tests/digits_teacher, which follow the speech well


def spaced(directory, clips: int = 6):
    """Clips of tones, with transcripts of several words."""
    rows = list(load_speech_dataset(str(write_speech(directory, clips)), None, "train"))
    return [row | {"text": f"{row['text']} {row['text'][::-1]} ab"} for row in rows]


def with_heads(model, heads: list[list[int]]):
    model.generation_config.alignment_heads = heads
    return model


# ---- times of words ----


@pytest.mark.parametrize("rows, columns", [(1, 5), (5, 1), (9, 4), (7, 60)])
def test_the_path_is_that_of_transformers(rows, columns):
    rng = np.random.default_rng(rows)
    matrices = rng.standard_normal((6, rows, columns)).astype(np.float32)
    matrices[3:] = matrices[3:].round()  # with ties
    for matrix, starts in zip(matrices, align(matrices), strict=True):
        texts, times = _dynamic_time_warping(-matrix.astype(np.float64))
        assert starts.tolist() == [int(times[texts == row][0]) for row in range(rows)]


def test_token_times_are_those_of_generate():
    """`generate` decodes token by token; here all tokens are known."""
    processor = make_processor()
    processor.tokenizer.add_tokens([f"<|{0.02 * i:.2f}|>" for i in range(1501)])
    processor = WhisperProcessor(WhisperFeatureExtractor(feature_size=8), processor.tokenizer)
    model = with_heads(make_whisper(processor, max_source_positions=1500).eval(), [[1, 0], [3, 1]])
    wave = 0.1 * np.random.default_rng(0).standard_normal(16_000 * 5).astype(np.float32)
    options = dict(sampling_rate=16_000, return_attention_mask=True, return_tensors="pt")
    features = processor.feature_extractor(wave, **options)
    options = dict(return_timestamps=True, return_token_timestamps=True, force_unique_generate_call=True)
    output = model.generate(**features, num_beams=1, **options)
    start, first, *text = output["sequences"][0].tolist()
    _, *expected = output["token_timestamps"][0].tolist()
    with attending(model):
        states, positions = encode(model, processor, wave)
        attention = attention_of_heads(model, states, positions, [start, first], text[:-1], [[1, 0], [3, 1]])
    assert positions == 250 and attention.shape == (2, len(text), 250)
    times = 0.02 * align(attention.mean(0)[None])[0]
    assert times.tolist() == pytest.approx(expected[: len(text)], abs=1e-6) and len(set(expected)) == 3


def test_words_are_matched_by_their_texts():
    words, others = [" Well,", " he", " said", " no."], [" well", " said", " he", " no"]
    matches = matching_words(words, others)
    assert matches[0] == (0, 0) and matches[-1] == (3, 3) and len(matches) == 3
    assert matching_words(["a"], ["b"]) == matching_words([], ["b"]) == []


def test_words_begin_and_end_at_tokens():
    tokenizer = make_processor().tokenizer
    words = split_words(tokenizer, tokenizer("Ġab c".replace("Ġ", " "), add_special_tokens=False).input_ids)
    assert words.texts == [" ab", " c"] and words.starts.tolist() == [0, 3] and words.ends.tolist() == [3, 5]


@pytest.mark.parametrize(
    "language, task, row, expected",
    [
        ("zh", "transcribe", {}, [" a", "b"]),  # without spaces, each character is a word
        ("zh", "translate", {}, [" ab"]),
        ("zh", "transcribe", dict(language="zh", task="translate"), [" ab"]),
        ("en", "transcribe", dict(language="zh", task="transcribe"), [" a", "b"]),
    ],
)
def test_the_words_of_a_translation_are_english(language, task, row, expected):
    _, processor = make_multilingual()
    tokenizer = processor.tokenizer
    tokenizer.set_prefix_tokens(language=language, task=task)
    assert split_words(tokenizer, tokenizer(" ab", add_special_tokens=False).input_ids, **row).texts == expected


# ---- selection ----


def ridge(columns: list[int], positions: int = 60) -> np.ndarray:
    """Attention of rows that begin at these columns."""
    matrix = np.full((len(columns), positions), -1.0, np.float32)
    for row, (start, end) in enumerate(zip(columns, [*columns[1:], positions], strict=True)):
        matrix[row, start:end] = 1.0
    return matrix


def test_the_heads_that_know_the_times_are_selected():
    known = [0, 10, 25, 40]
    late = [0, 15, 30, 45]
    noise = np.random.default_rng(0).standard_normal((4, 60)).astype(np.float32)
    attention = np.stack([noise, ridge(late), ridge(known), np.full((4, 60), np.nan, np.float32)])
    clips = [AlignedClip(attention, np.array([1, 2, 3]), 0.02 * np.array(known[1:]))] * 2
    sets = [[1], [2], [3], [1, 2]]
    errors = boundary_errors(clips, [np.stack([attention[heads].mean(0) for heads in sets])] * 2)
    assert errors[0] == pytest.approx(0.1) and errors[1] == 0.0 and errors[2] == np.inf
    assert best_heads(clips) == [2]
    with pytest.raises(UserError, match="the attention of all heads is NaN"):
        best_heads([clip._replace(attention=clip.attention[3:]) for clip in clips])


def test_the_heads_with_the_smallest_joint_error_are_selected():
    """Noisy heads are better together."""
    known, rng = [0, 10, 25, 40], np.random.default_rng(1)
    attention = [ridge(known) + scale * rng.standard_normal((4, 60)).astype(np.float32) for scale in (5, 2, 2, 2, 9)]
    clip = AlignedClip(np.stack(attention), np.array([1, 2, 3]), 0.02 * np.array(known[1:]))

    def error(heads: list[int]) -> float:
        texts, times = _dynamic_time_warping(-np.mean([attention[head] for head in heads], axis=0).astype(np.float64))
        return 0.02 * float(np.mean([abs(times[texts == row][0] - known[row]) for row in (1, 2, 3)]))

    ranking = sorted(range(5), key=lambda head: error([head]))
    best = min((ranking[:n] for n in range(1, 6)), key=error)
    assert best_heads([clip]) == sorted(best) and 1 < len(best) < 5


def times_of(model, processor, row, heads):
    """The times of the tokens of a text by transformers' own function."""
    tokenizer = processor.tokenizer
    text = tokenizer(f" {row['text']}", add_special_tokens=False).input_ids
    prefix = tokenizer.convert_tokens_to_ids(["<|startoftranscript|>", "<|notimestamps|>"])
    wave = waveform(row)
    features = processor.feature_extractor(wave, sampling_rate=16_000, return_tensors="pt").input_features
    tokens = torch.tensor([[*prefix, *text]])
    with torch.no_grad():
        output = model(features, decoder_input_ids=tokens, output_attentions=True)
    generated = GenerateEncoderDecoderOutput(cross_attentions=(output.cross_attentions,), sequences=tokens)
    frames = torch.tensor([-(-len(wave) // 160)])
    times = model._extract_token_timestamps(generated, heads, num_frames=frames, num_input_ids=1)[0].tolist()[1:-1]
    starts = [0, *(i for i, token in enumerate(text) if tokenizer.decode([token]) == " " and i), len(text)]
    return [(times[a], times[b]) for a, b in itertools.pairwise(starts)]


def test_the_selection_is_that_of_a_search_by_hand(tmp_path):
    processor, rows = make_processor(), spaced(tmp_path)
    teacher = with_heads(make_whisper(processor).eval(), [[1, 0], [3, 1]])
    student = init_student(make_whisper(processor, seed=5), 2).eval()
    student.generation_config.alignment_heads = [[1, 1]]
    before = {name: weight.clone() for name, weight in student.state_dict().items()}
    selection = select_alignment_heads(student, processor, teacher, processor, rows)
    assert all(torch.equal(weight, before[name]) for name, weight in student.state_dict().items())
    for model in (teacher, student):
        assert model.config._attn_implementation == "sdpa" and not model.training
        model.set_attn_implementation("eager")
    expected = [times_of(teacher, processor, row, teacher.generation_config.alignment_heads) for row in rows]

    def error(heads: list[list[int]]) -> float:
        found = [times_of(student, processor, row, heads) for row in rows]
        return float(np.abs(np.concatenate(found) - np.concatenate(expected)).mean())

    ranking = sorted(([layer, head] for layer in (0, 1) for head in (0, 1)), key=lambda head: error([head]))
    by_hand = {len(heads): error(heads) for heads in (ranking[: n + 1] for n in range(4))}
    best = min(by_hand, key=by_hand.get)
    assert selection.error == pytest.approx(min(by_hand[best], error([[1, 1]])), abs=1e-5)
    assert selection.former_error == pytest.approx(error([[1, 1]]), abs=1e-5)
    assert selection.heads == ([[1, 1]] if error([[1, 1]]) <= by_hand[best] else sorted(ranking[:best]))
    assert (selection.words, selection.clips) == (18, 6)


def test_a_student_that_is_its_teacher_keeps_its_heads(tmp_path, teacher):
    processor, rows = make_processor(), spaced(tmp_path)
    with_heads(teacher, [[1, 0], [3, 1]])
    selection = select_alignment_heads(teacher, processor, teacher, processor, rows)
    assert selection.error == selection.former_error == 0.0 and selection.heads == [[1, 0], [3, 1]]


def test_clips_without_words_or_too_long_are_left_out(tmp_path, teacher):
    processor, rows = make_processor(), spaced(tmp_path, 3)
    long = {"array": np.ones(16_001, np.float32) / 2, "sampling_rate": 16_000}
    rows += [rows[0] | {"text": ""}, rows[0] | {"audio": long}, rows[0] | {"text": "abc " * 8}]
    with_heads(teacher, [[1, 0]])
    assert select_alignment_heads(teacher, processor, teacher, processor, rows).clips == 3
    with pytest.raises(UserError, match="none of 3 clips has words and fits"):
        select_alignment_heads(teacher, processor, teacher, processor, rows[3:])
    with pytest.raises(UserError, match="no alignment heads in its generation config"):
        select_alignment_heads(teacher, processor, make_whisper(processor), processor, rows)


def without_variation(model, layer: int, head: int) -> None:
    """All tokens give all positions the same weight, so that the head has NaN."""
    query = model.model.decoder.layers[layer].encoder_attn.q_proj
    rows = slice(head * 8, (head + 1) * 8)
    with torch.no_grad():
        query.weight[rows], query.bias[rows] = 0.0, 0.0


def test_a_head_with_nan_matters_only_where_it_is_used(tmp_path, teacher, student):
    processor, rows = make_processor(), spaced(tmp_path)
    with_heads(teacher, [[1, 0], [3, 1]])
    with_heads(student, [[1, 1]])
    without_variation(teacher, 0, 0)
    without_variation(student, 1, 1)
    selection = select_alignment_heads(student, processor, teacher, processor, rows)
    assert selection.clips == 6 and selection.error < 0.5 and [1, 1] not in selection.heads
    assert selection.former_error == np.inf
    assert "on average; the former heads have no times, as their attention has NaN (18 words" in str(selection)
    without_variation(teacher, 3, 1)
    with pytest.raises(UserError, match=r"none of 6 clips .* without NaN in the teacher's attention"):
        select_alignment_heads(student, processor, teacher, processor, rows)


def test_only_the_teachers_alignment_heads_are_filtered(tmp_path, monkeypatch, teacher, student):
    processor, rows, shapes = make_processor(), spaced(tmp_path, 1), []
    median_filter = word_times._median_filter
    monkeypatch.setattr(
        word_times,
        "_median_filter",
        lambda weights, width: (shapes.append(weights.shape), median_filter(weights, width))[1],
    )
    select_alignment_heads(student, processor, with_heads(teacher, [[1, 0], [3, 1], [3, 0]]), processor, rows)
    assert [shape[0] for shape in shapes] == [3, 4]  # of the teacher; all of the student's two layers


@pytest.mark.slow
def test_a_student_has_the_times_of_real_words():
    """Digits whose times are known. The student has one of the two layers with the teacher's alignment heads."""
    directory = str(ROOT / "tests" / "digits_teacher")
    teacher, processor = with_heads(load_whisper(directory), HEADS), load_processor(directory)
    strings = spoken_strings(12)
    rows = [
        {"audio": {"array": string.audio, "sampling_rate": 16_000}, "clip": "", "text": string.text}
        for string in strings
    ]
    student = init_student(teacher, [0, 1, 3])
    del student.generation_config.alignment_heads
    selection = select_alignment_heads(student, processor, teacher, processor, rows[:6])
    with_heads(student, selection.heads)
    assert selection.former_error is None and selection.error < 0.15

    def starts(model) -> list[float]:
        found = [[start for start, _, _ in time_words(model, processor, row)] for row in rows[6:]]
        pairs = zip(found, strings[6:], strict=True)
        return [abs(a - b) for times, string in pairs for a, (b, _) in zip(times, string.times, strict=True)]

    assert np.mean(starts(teacher)) < 0.1 and np.mean(starts(student)) < 0.2


# ---- the command, and the end of a run ----


def saved_pair(directory, **changes):
    """A teacher with alignment heads and a student of two of its layers, trained on nothing, and speech."""
    processor = make_processor()
    teacher = with_heads(make_whisper(processor), [[1, 0], [3, 1]])
    for name, model in (("teacher", teacher), ("student", init_student(teacher, 2, **changes))):
        model.save_pretrained(directory / name)
        processor.save_pretrained(directory / name)
    speech = directory / "speech"
    write_speech(speech)
    table = speech / "metadata.csv"
    table.write_text(table.read_text().replace("\n", " ab\n").replace("transcription ab", "transcription"))
    return [str(directory / name) for name in ("student", "teacher", "speech")]


def test_the_command_writes_the_heads_and_nothing_else(tmp_path, capsys):
    student, teacher, speech = saved_pair(tmp_path)
    file = tmp_path / "student" / "generation_config.json"
    before = json.loads(file.read_text())
    assert before["alignment_heads"] == [[1, 1]]
    arguments = ["select-heads", "--model", student, "--teacher", teacher, "--dataset", speech]
    main(arguments)
    after = json.loads(file.read_text())
    clips = [row | {"text": row["text"]} for row in load_speech_dataset(speech, None, "train")]
    models = [part for name in (student, teacher) for part in (load_whisper(name), load_processor(name))]
    expected = select_alignment_heads(*models, clips)
    assert after == before | {"alignment_heads": expected.heads}
    assert f"alignment heads [layer, head] {expected.heads}: word boundaries differ" in capsys.readouterr().out
    assert load_whisper(student).generation_config.alignment_heads == expected.heads


def test_what_the_command_refuses(tmp_path):
    student, teacher, speech = saved_pair(tmp_path)
    with pytest.raises(UserError, match=r"--model openai/x must be a local directory"):
        select_heads(SelectHeadsArguments("openai/x", teacher, speech))
    (tmp_path / "teacher" / "generation_config.json").unlink()
    with pytest.raises(UserError, match="has no alignment heads in its generation config"):
        select_heads(SelectHeadsArguments(student, teacher, speech))


def test_transcripts_are_lower_cased_by_the_rules_of_their_language(tmp_path, caplog):
    speech = write_speech(tmp_path / "speech", clips=2) / "metadata.csv"
    names = [row.partition(",")[0] for row in speech.read_text().splitlines()[1:]]
    speech.write_text("file_name,text,language\n" + "".join(f"{name},IŞIK ILIK,tr\n" for name in names))
    clips = load_clips(SelectHeadsArguments("s", "t", str(speech.parent), language="turkish"))
    assert clips["text"][:] == ["ışık ılık"] * 2 and "column `language`" not in caplog.text


def test_a_shortage_of_memory_is_named_with_a_remedy(tmp_path, monkeypatch, capsys):
    student, teacher, _ = saved_pair(tmp_path)

    def fails(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(commands, "select_alignment_heads", fails)
    config = SimpleNamespace(output_dir=student, device="cpu")
    trainer = SimpleNamespace(args=config, free_memory=lambda: None)
    commands.select_heads_after_training(trainer, SimpleNamespace(teacher=teacher), {}, Dataset.from_dict({"a": [1]}))
    expected = (
        f"alignment heads aren't selected: out of memory: run askd-hf select-heads --model {student} --device cpu."
    )
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("selects, pushes", [(True, False), (True, True), (False, False)])
def test_a_run_ends_with_the_selection(tmp_path, monkeypatch, capsys, selects, pushes):
    _, teacher, speech = saved_pair(tmp_path)
    run = tmp_path / "run"
    options = ["--max_steps", 1, "--use_cpu", "--per_device_train_batch_size", 2, "--dataloader_num_workers", 0]
    options += ["--output_dir", run] + ([] if selects else ["--no_select_alignment_heads"])
    options += ["--teacher", teacher, "--dataset", speech]
    planned = run_here(monkeypatch, capsys, *options, "--dry_run")
    expected = f"on {len(load_speech_dataset(speech, None, 'train'))} clips: about " if selects else "None"
    assert str(plan_of(planned.stdout).get("time: alignment heads")).startswith(expected)
    options += ["--push_to_hub", "--hub_model_id", "me/x", "--hub_token", "hf_writer"] if pushes else []
    with hub_of_this_process(tmp_path / "hub", {"hf_writer": "write"}, monkeypatch):
        status, out, err = run_here(monkeypatch, capsys, *options)
    assert status == 0, err
    if pushes:
        file = "generation_config.json"
        assert (tmp_path / "hub" / "models" / "me" / "x" / file).read_bytes() == (run / file).read_bytes()
    heads = load_whisper(str(run)).generation_config.alignment_heads
    assert ("alignment heads [layer, head]" in out) == selects
    if not selects:
        assert heads == [[1, 1]]
        return
    models = [part for name in (str(run), teacher) for part in (load_whisper(name), load_processor(name))]
    assert heads == select_alignment_heads(*models, list(load_speech_dataset(speech, None, "train"))).heads
