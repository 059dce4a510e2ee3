"""Word timestamps of students, in transformers and in faster-whisper, on real speech whose word times are known."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from spoken_digits import SpokenString, long_teacher, save_long_teacher, spoken_strings

from askd_hf.export.ctranslate2 import export_ctranslate2
from askd_hf.models.generation_config import alignment_heads
from askd_hf.models.student import init_student

HEADS = [[2, 0], [2, 3], [3, 0], [3, 3]]  # of the demo's teacher, which follow the speech well

# What faster-whisper hears, in a process of its own: what is wrong in there can end the process without a trace.
FASTER_WHISPER = """
import sys
import numpy as np
from faster_whisper import WhisperModel
import json
model = WhisperModel(sys.argv[1], device="cpu", cpu_threads=1)
heard = []
for clip in sys.argv[2:]:
    options = dict(beam_size=1, temperature=0.0, without_timestamps=True, condition_on_previous_text=False)
    options |= dict(no_speech_threshold=None, log_prob_threshold=None, compression_ratio_threshold=None)
    try:
        segments, _ = model.transcribe(np.load(clip), word_timestamps=True, **options)
        heard.append([[word.word.strip(), word.start] for segment in segments for word in segment.words])
    except RuntimeError as error:
        heard.append(str(error))
print(json.dumps(heard))
"""


@pytest.fixture(scope="module")
def strings() -> list[SpokenString]:
    return spoken_strings(12)


@pytest.fixture
def teacher():
    return long_teacher()[0]


@pytest.fixture(scope="module")
def processor():
    return long_teacher()[1]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return save_long_teacher(tmp_path_factory.mktemp("teacher"))


def by_transformers(model, processor, string: SpokenString) -> list[tuple[str, float]]:
    """The words that are heard, and when each begins, seconds."""
    options = dict(sampling_rate=16_000, return_attention_mask=True, return_tensors="pt")
    features = processor.feature_extractor(string.audio, **options)
    output = model.generate(**features, num_beams=1, return_token_timestamps=True)
    words = []
    for token, time in zip(output["sequences"][0].tolist(), output["token_timestamps"][0].tolist(), strict=True):
        if token < model.config.eos_token_id:  # Whisper's special tokens come after its words
            piece = processor.tokenizer.decode([token])
            if piece.startswith(" ") or not words:
                words.append((piece.strip(), time))
            else:
                words[-1] = (words[-1][0] + piece, words[-1][1])
    return words


def by_faster_whisper(directory: Path, strings: list[SpokenString], scratch: Path) -> list:
    """The same of every string, or the message of the error that it ended with."""
    for number, string in enumerate(strings):
        np.save(scratch / f"{number}.npy", string.audio)
    clips = [str(scratch / f"{number}.npy") for number in range(len(strings))]
    command = [sys.executable, "-c", FASTER_WHISPER, str(directory), *clips]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"ended with {done.returncode}: {done.stderr}"
    return json.loads(done.stdout)


def errors(words: list, string: SpokenString) -> list[float]:
    """Seconds between when a word begins, and may begin: from the end of the word before to its own first sound.

    Only of a string that is heard right, whatever is heard in the silence after it.
    """
    if [word for word, _ in words[: len(string.times)]] != string.text.split():
        return []
    earliest = [0.0, *(end for _, end in string.times)]
    latest = [start for start, _ in string.times]
    return [max(a - time, time - b, 0.0) for (_, time), a, b in zip(words, earliest, latest, strict=False)]


def with_heads(model, heads: list[list[int]]):
    model.generation_config.alignment_heads = heads
    return model


def test_heads_of_layers_or_heads_that_are_not_there_are_none(teacher):
    assert alignment_heads(teacher) is None
    assert alignment_heads(with_heads(teacher, HEADS)) == HEADS
    for wrong in ([[4, 0]], [[0, 4]], [[1, 0], [31, 1]], [[-1, 0]], []):
        assert alignment_heads(with_heads(teacher, wrong)) is None


@pytest.mark.slow
def test_a_student_with_some_of_the_heads_has_word_times_in_both(tmp_path, teacher, processor, saved, strings):
    student = init_student(with_heads(teacher, [[2, 2], *HEADS]), [0, 1, 3]).eval()
    heads = [[2, 0], [2, 3]]  # the student's layer 2 was the teacher's 3
    assert student.generation_config.alignment_heads == heads
    export_ctranslate2(student, processor, tmp_path / "student")
    assert json.loads((tmp_path / "student" / "config.json").read_text())["alignment_heads"] == heads

    heard = by_faster_whisper(tmp_path / "student", strings, tmp_path)
    found = [error for words, string in zip(heard, strings, strict=True) for error in errors(words, string)]
    assert len(found) >= 30  # of 36 words
    assert np.mean(found) < 0.05

    for string in strings[:3]:
        times = [time for _, time in by_transformers(student, processor, string)]
        assert times == sorted(times)
        assert 0 < times[-1] <= len(string.audio) / 16_000


@pytest.mark.parametrize("heads", [None, [[7, 0], [31, 3]]], ids=["dropped", "of missing layers"])
def test_faster_whisper_refuses_word_times_of_a_student_without_heads(
    tmp_path, teacher, processor, saved, strings, heads
):
    student = init_student(with_heads(teacher, HEADS), [0])
    assert not hasattr(student.generation_config, "alignment_heads")
    if heads:  # as the students of others have them, from their teacher
        with_heads(student, heads)
    export_ctranslate2(student, processor, tmp_path / "student")
    assert "alignment_heads" not in json.loads((tmp_path / "student" / "config.json").read_text())
    (message,) = by_faster_whisper(tmp_path / "student", strings[:1], tmp_path)
    assert "does not contain the field 'alignment_heads'" in message


def test_transformers_refuses_word_times_of_a_student_without_heads(teacher, processor, strings):
    student = init_student(with_heads(teacher, HEADS), [0])
    with pytest.raises(ValueError, match="no `alignment_heads`, token-level timestamps not available"):
        by_transformers(student, processor, strings[0])
