"""Whisper's own markup in transcripts: times are segments, the rest is named, and none of it is ever a token."""

import csv
import logging
import re

import pytest
import soundfile
from models import MULTILINGUAL, make_processor, make_whisper
from scripts import ROOT
from speech import RATE, tone, write_csv
from transformers import WhisperTokenizer

from askd_hf.data import (
    Limits,
    SpeechCollator,
    SpeechStream,
    clean_texts,
    filter_invalid_clips,
    load_speech_dataset,
    select_training_columns,
)
from askd_hf.data.labels import build_decoder_tokens, text_ids
from askd_hf.data.languages import with_language
from askd_hf.data.markup import read_markup
from askd_hf.errors import UserError
from askd_hf.evaluation.suites import DatasetSpec, load_set

TIMED = "<|0.00|> Hello there.<|1.20|><|1.20|> How are you?<|2.40|>"
HELLO = {"start": 0.0, "end": 1.2, "text": "Hello there."}
HOW = {"start": 1.2, "end": 2.4, "text": "How are you?"}
OPEN = HOW | {"end": None}
EN = "<|startoftranscript|><|en|><|transcribe|>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (TIMED, [HELLO, HOW]),
        (f"{TIMED}<|endoftext|>", [HELLO, HOW]),
        (f"{EN}{TIMED}<|endoftext|><|endoftext|>", [HELLO, HOW]),  # as distil-whisper writes it
        (f"<|startoftranscript|>{TIMED}<|endoftext|>", [HELLO, HOW]),  # and of an English-only teacher
        (TIMED.removesuffix("<|2.40|>") + "<|endoftext|>", [HELLO, OPEN]),  # cut off by the window
        (f"{TIMED}<|2.40|><|endoftext|>", [HELLO, HOW]),  # a start with nothing after it
        (f"{EN}<|notimestamps|> Hello there.<|endoftext|>", None),
        (" Hello there.<|endoftext|>", None),
    ],
)
def test_what_is_read(text, expected):
    read = read_markup(text, "en", "transcribe")
    assert read.segments == expected
    assert read.text == ("Hello there. How are you?" if expected else "Hello there.")


def test_phrases_are_joined_as_the_language_is_written():
    text = "<|0.00|>你好<|1.20|><|1.20|>再见<|2.40|>"
    assert read_markup(text, "zh").text == "你好再见"
    assert read_markup(text, "zh", "translate").text == "你好 再见"


BAD = {
    "<|en|> hello": r"`<\|en\|>`: a special token",
    "one<|endoftext|>two": r"`<\|endoftext\|>`: a special token",
    "<|transcribe|> a": r"`<\|transcribe\|>`",
    "<|startofprev|> a <|startoftranscript|> b": r"`<\|startofprev\|>`",
    "<|nospeech|>": r"`<\|nospeech\|>`",
    "<|nocaptions|> a": r"`<\|nocaptions\|>`",
    "a <|notimestamps|> b": r"`<\|notimestamps\|>`",
    "<|HAPPY|> a": r"`<\|HAPPY\|>`",
    "<|startoftranscript|><|fr|><|transcribe|> a": r"`<\|fr\|>`: the language of the row is en",
    "<|startoftranscript|><|en|><|translate|> a": r"`<\|translate\|>`: the task of the row is transcribe",
    f"{EN}<|notimestamps|><|0.00|> a<|1.00|>": r"`<\|0.00\|>`: a timestamp after",
    "<|0|> a<|1|>": r"`<\|0\|>`",
    "<|0.00> a<|1.00|>": r"`<\|0.00>`: incomplete special token",
    "a <|endoftext": r"`<\|endoftext`: incomplete special token",
    "<|0.00|><|1.00|>": r"`<\|1.00\|>`: two timestamps",
    "<|0.00|> a<|1.00|> b<|2.00|>": r"`b`: text without a start timestamp",
    "a<|1.00|>": r"`a`: text without a start timestamp",
    "<|1.00|> a<|0.50|>": r"`<\|0.50\|>`: a timestamp before",
    "<|0.00|> a<|1.00|><|0.80|> b<|2.00|>": r"`<\|0.80\|>`: a timestamp before",
}


@pytest.mark.parametrize("text", BAD)
def test_what_is_refused(text):
    with pytest.raises(UserError, match=f"^transcript has {BAD[text]}"):
        read_markup(text, "en", "transcribe")


# ---- no text is a special token ----


@pytest.mark.parametrize("times_are_tokens", [False, True])
def test_no_special_token_comes_of_a_text(times_are_tokens, tmp_path):
    tokenizer = WhisperTokenizer.from_pretrained(ROOT / "tests" / "digits_teacher")
    if times_are_tokens:  # as OpenAI's are: tokens, but no special ones
        tokenizer.add_tokens(["<|0.00|>", "<|1.20|>"])
    tokenizer("a")  # any call says in the file that nothing is truncated
    tokenizer.save_pretrained(tmp_path / "before")
    text = "<|0.00|> a<|1.20|> b<|endoftext|><|startoftranscript|> <|endoftext|>"
    ids = text_ids(tokenizer, text)
    assert max(ids) < tokenizer.eos_token_id
    assert tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False) == f" {text}"
    # and the tokenizer is as it was
    assert tokenizer("<|endoftext|>", add_special_tokens=False).input_ids == [tokenizer.eos_token_id]
    tokenizer.save_pretrained(tmp_path / "after")
    for file in (tmp_path / "before").iterdir():
        assert (tmp_path / "after" / file.name).read_bytes() == file.read_bytes()


def test_a_phrase_without_an_end_has_no_token_for_it():
    tokenizer = make_processor().tokenizer
    row = {"text": "ab c", "segments": [HELLO | {"text": "ab"}, OPEN | {"text": "c"}]}
    zero, *rest = build_decoder_tokens(tokenizer, row, timestamps=True).labels
    space, a, b, c, end = tokenizer.convert_tokens_to_ids(["Ġ", "a", "b", "c", "<|endoftext|>"])
    assert rest == [space, a, b, zero + 60, zero + 60, space, c, end]


# ---- in datasets ----


@pytest.fixture
def folder(tmp_path):
    """Clips of half a second; row 0 with times, 1 as text alone, 2 and 3 bad, 4 of a whole prefix."""
    texts = [
        "<|0.00|> AB<|0.30|><|0.30|> C",
        "D E",
        "<|fr|> F",
        "<|0.30|> A<|0.10|>",
        f"{EN}<|notimestamps|> G<|endoftext|>",
    ]
    rows = [[f"{i}.wav", text, "<|0.00|> H<|0.10|>" if i else "<|fr|>"] for i, text in enumerate(texts)]
    write_csv(tmp_path / "metadata.csv", [["file_name", "whisper_transcript", "prompt"], *rows])
    for i in range(len(texts)):
        soundfile.write(tmp_path / f"{i}.wav", tone(), RATE)
    return tmp_path


def loaded(folder, streaming=False):
    speech = load_speech_dataset(
        str(folder), None, "train", text_column_name="whisper_transcript", streaming=streaming
    )
    return clean_texts(with_language(speech, "en", None), "auto", "mine")


@pytest.fixture
def collator():
    processor = make_processor((*MULTILINGUAL, "<|startofprev|>"))
    return SpeechCollator(processor, make_whisper(processor).config)


def test_times_are_segments_and_other_markup_is_a_bad_row(folder, collator, caplog, tmp_path):
    with caplog.at_level(logging.WARNING):
        speech = loaded(folder)
    assert "mine: Whisper's timestamps `<|0.00|>` in 1 of 5 transcripts are converted" in caplog.text
    with pytest.raises(UserError) as error:
        filter_invalid_clips(speech, collator.label_ids, Limits(1.0, 20), on_bad_audio="error")
    assert "2 of 5 clips are invalid (1 transcript has `<|fr|>`, 1 transcript has `<|0.10|>`)" in str(error.value)
    assert re.search(r"  row 2, 2\.wav: transcript has `<\|fr\|>`: a special token", str(error.value))
    options = dict(on_bad_audio="skip", report_file=tmp_path / "skipped.csv")
    kept = filter_invalid_clips(speech, collator.label_ids, Limits(1.0, 20, check_timestamps=True), **options)
    assert kept["text"][:] == ["ab c", "d e", "g"]
    segments = [[(round(s["start"], 2), s["end"] and round(s["end"], 2), s["text"]) for s in kept["segments"][0]]]
    assert segments == [[(0.0, 0.3, "ab"), (0.3, None, "c")]] and kept["segments"][1:] == [None, None]
    with (tmp_path / "skipped.csv").open() as file:
        assert [row[0] for row in csv.reader(file)] == ["row", "2", "3"]
    with pytest.raises(UserError, match=r"row 0, 0\.wav: prompt has `<\|fr\|>`"):
        filter_invalid_clips(speech, collator.label_ids, Limits(1.0, 20, check_prompts=True), on_bad_audio="error")
    assert speech["prompt"][1] == "h"


def test_a_stream_is_read_likewise(folder, collator):
    stream = SpeechStream([select_training_columns(loaded(folder, streaming=True))], buffer_size=1)
    rows = sorted(stream._epoch(0), key=lambda row: row["clip"])
    assert [row["text"] for row in rows[:2]] == ["ab c", "d e"]
    assert [segment["text"] for segment in rows[0]["segments"]] == ["ab", "c"]
    collator.limits = Limits(1.0, 20)
    batch = collator([row | {"rng_key": (0, 0, i)} for i, row in enumerate(rows)])
    assert [(clip, reason.partition(":")[0]) for clip, reason, _ in batch["skipped"]] == [
        ("2.wav", "transcript has `<|fr|>`"),
        ("3.wav", "transcript has `<|0.10|>`"),
    ]
    assert batch["clip"] == ["0.wav", "1.wav", "4.wav"]


def test_segments_that_are_there_stay(folder):
    speech = load_speech_dataset(str(folder), None, "train", text_column_name="whisper_transcript").select([0])
    own = [[{"start": 0.0, "end": 0.5, "text": "AB C"}]]
    (row,) = clean_texts(speech.add_column("segments", own), "keep", "mine")
    assert row["text"] == "AB C" and row["segments"] == own[0]


def test_references_of_an_evaluation_are_text_alone(folder):
    clips = load_set(DatasetSpec("mine", str(folder), None, "train", "whisper_transcript", language="en"))
    assert clips["text"][:2] == ["AB C", "D E"] and clips["text"][4] == "G"
    with pytest.raises(UserError, match=r"row 2, 2\.wav: transcript has `<\|fr\|>`"):
        filter_invalid_clips(clips, None, Limits(1.0), on_bad_audio="error")
    assert len(filter_invalid_clips(clips, None, Limits(1.0), on_bad_audio="skip")) == 3


@pytest.mark.parametrize("segments", [[None], [{"start": 0.0, "end": 0.1, "text": None}]])
def test_segments_without_text_are_bad_rows(folder, collator, segments):
    speech = loaded(folder).select([1]).remove_columns("segments")
    speech = speech.add_column("segments", [segments])
    with pytest.raises(UserError, match="segment without text: number 1 of 1"):
        filter_invalid_clips(speech, collator.label_ids, Limits(1.0, 20, check_timestamps=True), on_bad_audio="error")
    assert len(filter_invalid_clips(speech, collator.label_ids, Limits(1.0, 20), on_bad_audio="error")) == 1
