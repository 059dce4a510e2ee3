"""The decoder's input and labels, token by token, written by hand."""

import copy

import numpy as np
import pytest
import soundfile
import torch
from models import MULTILINGUAL, make_processor, make_tokenizer, make_whisper
from speech import RATE, tone, write_csv
from transformers.models.whisper.modeling_whisper import shift_tokens_right

from askd_hf.data import SpeechCollator, load_speech_dataset
from askd_hf.data.labels import build_decoder_tokens
from askd_hf.errors import UserError

SEGMENTS = [{"start": 0.0, "end": 0.3, "text": "ab"}, {"start": 0.34, "end": 0.5, "text": "c"}]


@pytest.fixture
def english():
    return make_processor(("<|startofprev|>",)).tokenizer


@pytest.fixture
def multilingual():
    return make_processor((*MULTILINGUAL, "<|startofprev|>")).tokenizer


def named(tokenizer, ids: list[int]) -> list[str]:
    """The tokens; a timestamp, which has no name, as its seconds; -100 as `_`."""
    zero = tokenizer.convert_tokens_to_ids("<|notimestamps|>") + 1
    names = []
    for i in ids:
        if i == -100:
            names.append("_")
        elif i >= zero:
            names.append(f"{(i - zero) * 0.02:.2f}")
        else:
            names.append(tokenizer.convert_ids_to_tokens(i).strip("<|>"))
    return names


def tokens(tokenizer, row, **options) -> tuple[str, str]:
    made = build_decoder_tokens(tokenizer, row, **options)
    return tuple(" ".join(named(tokenizer, ids)) for ids in made)


def test_plain_labels_are_the_tokenizers(english, multilingual):
    assert tokens(english, {"text": "ab"}) == ("startoftranscript notimestamps Ġ a b", "notimestamps Ġ a b endoftext")
    multilingual.set_prefix_tokens(language="chinese", task="translate")
    for tokenizer in (english, multilingual):  # a translation is English
        made = build_decoder_tokens(tokenizer, {"text": "ab"})
        assert [made.decoder_input_ids[0], *made.labels] == tokenizer(" ab").input_ids
        shifted = shift_tokens_right(
            torch.tensor([made.labels]), 0, tokenizer.convert_tokens_to_ids("<|startoftranscript|>")
        )
        assert shifted.tolist() == [made.decoder_input_ids]


def test_language_and_task_are_the_rows(multilingual):
    multilingual.set_prefix_tokens(language="english", task="transcribe")
    chinese = {"text": "a", "language": "zh", "task": "translate"}
    assert tokens(multilingual, chinese)[1] == "zh translate notimestamps Ġ a endoftext"
    spoken = {"text": "a b", "language": "zh", "task": None}
    assert tokens(multilingual, spoken)[1] == "zh transcribe notimestamps a Ġ b endoftext"
    assert tokens(multilingual, {"text": "a", "language": None})[1] == "en transcribe notimestamps Ġ a endoftext"
    unset = make_processor((*MULTILINGUAL, "<|startofprev|>")).tokenizer  # whose prefix names no language
    assert tokens(unset, chinese) == (
        "startoftranscript zh translate notimestamps Ġ a",
        "zh translate notimestamps Ġ a endoftext",
    )
    with pytest.raises(UserError, match="the model doesn't support language 'fr'"):
        build_decoder_tokens(multilingual, {"text": "a", "language": "fr"})


def test_timestamps_stand_around_every_segment(english, multilingual):
    row = {"text": "ab c", "segments": SEGMENTS}
    assert tokens(english, row, timestamps=True) == (
        "startoftranscript 0.00 Ġ a b 0.30 0.34 Ġ c 0.50",
        "0.00 Ġ a b 0.30 0.34 Ġ c 0.50 endoftext",
    )
    assert "notimestamps Ġ a b Ġ c" in tokens(english, row)[0]
    spoken = row | {"language": "zh", "task": "transcribe"}
    assert tokens(multilingual, spoken, timestamps=True)[1].startswith("zh transcribe 0.00 a b 0.30 0.34 c ")
    english_text = spoken | {"task": "translate"}
    assert tokens(multilingual, english_text, timestamps=True)[1].startswith("zh translate 0.00 Ġ a b 0.30 ")
    assert tokens(english, {"text": "ab", "segments": None}, timestamps=True)[1] == "notimestamps Ġ a b endoftext"
    assert tokens(english, row, timestamps=True, max_positions=20)[1].endswith("0.40 endoftext")  # the window's end
    slower = tokens(english, row, timestamps=True, time_factor=2.0)[1]
    assert slower == "0.00 Ġ a b 0.60 0.68 Ġ c 1.00 endoftext"
    assert tokens(english, row, timestamps=True, max_tokens=9)[1] == "notimestamps Ġ a b Ġ c endoftext"  # no room


def test_timestamps_that_just_fit_are_kept(english):
    row = {"text": "ab c", "segments": SEGMENTS}
    given, learned = tokens(english, row, timestamps=True, max_tokens=10)
    assert len(given.split()) == 10 and learned == "0.00 Ġ a b 0.30 0.34 Ġ c 0.50 endoftext"


# The first merges of GPT-2, which are those of Whisper's English vocabulary
MERGES = "Ġ t,Ġ a,h e,i n,r e,o n,Ġt he,e r,Ġ s,a t,Ġ w,Ġ o,e n,Ġ c,i t,i s,a n,o r,e s,Ġ b,e d,Ġ f,in g,Ġ p,o u,Ġa n"
MERGES += ",a l,a r,Ġt o,Ġ m,Ġo f,Ġ in,Ġ d,Ġ h,Ġan d"


def test_labels_are_the_word_initial_tokens_that_whisper_writes():
    """Merged by hand. Whisper's text begins with a space, as every window of a long recording and every segment."""
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|startofprev|>", "<|transcribe|>", "<|notimestamps|>"]
    merges = [tuple(pair.split()) for pair in MERGES.split(",")]
    bpe = make_tokenizer("abcdefghijklmnopqrstuvwxyzĠ", special, merges)
    plain = tokens(bpe, {"text": "the hand of a man"})[1]
    assert plain == "notimestamps Ġthe Ġh an d Ġof Ġa Ġm an endoftext"
    assert bpe.decode(build_decoder_tokens(bpe, {"text": "the hand of a man"}).labels[1:-1]) == " the hand of a man"
    segments = [{"start": 0.0, "end": 0.3, "text": "the hand"}, {"start": 0.34, "end": 0.5, "text": "of a man"}]
    row = {"text": "the hand of a man", "segments": segments, "prompt": "in the sand"}
    given, learned = tokens(bpe, row, timestamps=True, prompt=True)
    assert given.startswith("startofprev Ġin Ġthe Ġs an d startoftranscript 0.00 Ġthe ")
    assert learned.endswith("0.00 Ġthe Ġh an d 0.30 0.34 Ġof Ġa Ġm an 0.50 endoftext")
    # the tokens of a text are those of its parts: none is another one for being first
    parts = [build_decoder_tokens(bpe, {"text": text}).labels[1:-1] for text in ("the hand", "of a man")]
    assert parts[0] + parts[1] == build_decoder_tokens(bpe, {"text": "the hand of a man"}).labels[1:-1]
    assert [bpe.convert_ids_to_tokens(i) for i in bpe("the", add_special_tokens=False).input_ids] == ["t", "he"]


def test_a_prompt_is_read_and_never_learned(english):
    row = {"text": "ab", "prompt": "cd e"}
    given, learned = tokens(english, row, prompt=True)
    assert given == "startofprev Ġ c d Ġ e startoftranscript notimestamps Ġ a b"
    assert learned == "_ _ _ _ _ _ notimestamps Ġ a b endoftext"
    ids = build_decoder_tokens(english, row, prompt=True).decoder_input_ids[:6]
    assert ids == english.get_prompt_ids("cd e").tolist()
    for empty in (None, "", "  "):
        assert tokens(english, {"text": "ab", "prompt": empty}, prompt=True) == tokens(english, {"text": "ab"})
    assert tokens(english, row) == tokens(english, {"text": "ab"})  # without being asked


def test_a_long_prompt_loses_its_beginning(english):
    row = {"text": "ab", "prompt": "abcdefghijklmnop"}
    given, learned = tokens(english, row, prompt=True, max_tokens=12)
    assert given == "startofprev l m n o p startoftranscript notimestamps Ġ a b"  # half of the positions
    assert len(given.split()) == len(learned.split())
    given, learned = tokens(english, row | {"text": "abcdefg"}, prompt=True, max_tokens=12)
    assert given == "startofprev p startoftranscript notimestamps Ġ a b c d e f g"  # what is left of them
    assert learned.count("_") == 2
    assert tokens(english, row | {"text": "abcdefghi"}, prompt=True, max_tokens=12)[0].startswith("startoftranscript")


# ---- in batches ----


@pytest.fixture
def collator() -> SpeechCollator:
    processor = make_processor(("<|startofprev|>",))
    model = make_whisper(processor, vocab_size=len(processor.tokenizer) + 51, max_target_positions=64)
    return SpeechCollator(processor, model.config, timestamp_probability=0.5, condition_on_prev_probability=0.25)


@pytest.fixture
def rows(tmp_path) -> list[dict]:
    write_csv(tmp_path / "metadata.csv", [["file_name", "text"], ["0.wav", "ab c"]])
    soundfile.write(tmp_path / "0.wav", tone(), RATE)
    (row,) = load_speech_dataset(str(tmp_path), None, "train")
    return [row | {"segments": SEGMENTS, "prompt": "cd", "rng_key": (7, 0, i)} for i in range(400)]


def kind(collator: SpeechCollator, inputs: list[int], labels: list[int]) -> tuple[bool, bool]:
    """Whether with timestamps, whether with a prompt."""
    tokenizer = collator.processor.tokenizer
    token = tokenizer.convert_tokens_to_ids
    return token("<|notimestamps|>") not in inputs, inputs[0] == token("<|startofprev|>")


def test_timestamps_and_prompts_come_with_their_probabilities(collator, rows):
    kinds = [kind(collator, *collator._decoder_tokens(row, 1.0)) for row in rows]
    timestamps, prompts = np.mean(kinds, axis=0)
    assert abs(timestamps - 0.5) < 4 * (0.25 / 400) ** 0.5 and abs(prompts - 0.25) < 4 * (0.1875 / 400) ** 0.5
    both = np.mean([all(pair) for pair in kinds])  # independent of one another
    assert abs(both - 0.125) < 4 * (0.11 / 400) ** 0.5
    assert kinds == [kind(collator, *collator._decoder_tokens(row, 1.0)) for row in rows]
    later = [
        kind(collator, *collator._decoder_tokens(row | {"rng_key": (7, 1, i)}, 1.0)) for i, row in enumerate(rows)
    ]
    assert kinds != later


def test_without_a_draw_nothing_is_random(collator, rows):
    certain = copy.copy(collator)
    certain.timestamp_probability = certain.condition_on_prev_probability = 1.0
    plain = {name: value for name, value in rows[0].items() if name != "rng_key"}
    assert kind(certain, *certain._decoder_tokens(plain, 1.0)) == (False, False)
    assert kind(certain, *certain._decoder_tokens(rows[0], 1.0)) == (True, True)


def test_a_batch_is_padded_to_its_longest(collator, rows):
    collator.timestamp_probability, collator.condition_on_prev_probability = 0.0, 1.0
    batch = collator([rows[0], rows[1] | {"text": "a", "prompt": None}])
    tokenizer = collator.processor.tokenizer
    read, learned = (named(tokenizer, batch[name][0].tolist()) for name in ("decoder_input_ids", "labels"))
    assert " ".join(read) == "startofprev Ġ c d startoftranscript notimestamps Ġ a b Ġ c"
    assert " ".join(learned) == "_ _ _ _ notimestamps Ġ a b Ġ c endoftext"
    assert named(tokenizer, batch["decoder_input_ids"][1].tolist()) == (
        ["startoftranscript", "notimestamps", "Ġ", "a"] + ["endoftext"] * 7
    )
    assert named(tokenizer, batch["labels"][1].tolist()) == ["notimestamps", "Ġ", "a", "endoftext"] + ["_"] * 7


def test_a_vocabulary_without_timestamps_is_refused(collator):
    collator.config.vocab_size -= 1
    with pytest.raises(UserError, match="the model's vocabulary has no timestamps"):
        SpeechCollator(collator.processor, collator.config, timestamp_probability=0.1)
    SpeechCollator(collator.processor, collator.config, condition_on_prev_probability=0.1)
