"""Students with a smaller vocabulary: the same tokens for the training texts, and bytes for all others."""

import json
import random
import re
from collections import Counter

import pytest
import torch
from datasets import Dataset, Features, Value, load_from_disk
from models import make_whisper
from processes import run_there
from scripts import ROOT, run_here
from speech import encoded, tone, write_speech
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperProcessor, WhisperTokenizer

from askd_hf.arguments import DataArguments, ModelArguments
from askd_hf.data import SpeechCollator
from askd_hf.data.columns import AUDIO_FILE, SEGMENTS
from askd_hf.data.labels import text_ids
from askd_hf.errors import UserError
from askd_hf.hub.provenance import Provenance
from askd_hf.models.generation_config import is_multilingual, set_language
from askd_hf.models.loading import load_processor, load_whisper
from askd_hf.models.smaller_vocabulary import (
    TextTokens,
    choose_domain_tokens,
    choose_tokens,
    count_tokens,
    smaller_tokenizer,
    vocabulary_size,
    with_smaller_vocabulary,
)
from askd_hf.models.vocabulary import token_partners, with_vocabulary_of
from askd_hf.training.run_settings import check_same_run, data_settings
from askd_hf.training.student_vocabulary import transcripts

SPECIAL = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|fr|>", "<|translate|>", "<|transcribe|>"]
SPECIAL += ["<|startofprev|>", "<|notimestamps|>"]
TIMES = 2 * 50 + 1  # a window of 2 s
WORDS = 91  # tokens of the tokenizer besides the bytes
TEXTS = ["the cat sat on the mat", "the other cat sees that mat", "a bee", "abba", "fed a bad cab"]
MORE = ["quick brown foxes jump over lazy dogs", "whichever way the weather goes", "naïve café über straße"]
CORPUS = [*TEXTS, *MORE] * 9


def words_tokenizer(named_times: bool) -> WhisperTokenizer:
    """A byte-level BPE tokenizer with merges, trained on `CORPUS`, with Whisper's special tokens behind it."""
    trained = Tokenizer(BPE())
    trained.pre_tokenizer, trained.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    model = json.loads(trained.to_str())["model"]
    special = dict.fromkeys(("unk_token", "bos_token", "eos_token", "pad_token"), "<|endoftext|>")
    tokenizer = WhisperTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]], **special)
    tokenizer.add_tokens(SPECIAL, special_tokens=True)
    if named_times:
        tokenizer.add_tokens([f"<|{0.02 * i:.2f}|>" for i in range(TIMES)])
    tokenizer.set_prefix_tokens(language="en", task="transcribe")
    return tokenizer


@pytest.fixture(scope="module", params=[True, False], ids=["named timestamps", "unnamed timestamps"])
def tokenizer(request) -> WhisperTokenizer:
    return words_tokenizer(request.param)


def whisper_of(tokenizer: WhisperTokenizer, **changes):
    """A model with a window of 2 s, configured as OpenAI's multilingual models are."""
    processor = WhisperProcessor(WhisperFeatureExtractor(feature_size=8, chunk_length=2), tokenizer)
    ids = tokenizer.get_vocab()
    size = ids["<|notimestamps|>"] + 1 + TIMES
    shape = dict(vocab_size=size, max_source_positions=100, max_target_positions=64)
    settings = dict(suppress_tokens=[ids["!"], ids["the"], ids["Ġbrown"], ids["<|startofprev|>"]])
    settings |= dict(begin_suppress_tokens=[ids["Ġ"], ids["<|endoftext|>"]])
    model = make_whisper(processor, **shape | settings | changes).eval()
    settings |= dict(is_multilingual=True, lang_to_id={name: ids[name] for name in ("<|en|>", "<|fr|>")})
    settings |= dict(task_to_id={name: ids[f"<|{name}|>"] for name in ("transcribe", "translate")})
    settings |= dict(prev_sot_token_id=ids["<|startofprev|>"], max_length=64)
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    set_language(model, processor, "en", "transcribe")
    return model, processor


def reduced(tokenizer, texts=TEXTS, number=None, window=2.0):
    """A tokenizer with the tokens of the texts, or with a number of tokens."""
    counts = count_tokens(tokenizer, [{"text": text} for text in texts])
    size = tokenizer.get_vocab()["<|notimestamps|>"] + 1 + TIMES
    kept = choose_tokens(tokenizer, counts, number or 0, keep_counted=number is None)
    return smaller_tokenizer(tokenizer, size, kept, window)


def tokens(tokenizer, text: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(text_ids(tokenizer, text))


def test_training_texts_are_tokenized_as_before(tokenizer):
    smaller = reduced(tokenizer)
    assert len(smaller.get_vocab()) < 0.9 * len(tokenizer.get_vocab())
    for text in TEXTS:
        assert tokens(smaller, text) == tokens(tokenizer, text)
    assert any(len(token) > 2 for token in tokens(smaller, TEXTS[0]))  # merges are at work
    assert tokens(smaller, "brown foxes") != tokens(tokenizer, "brown foxes")


def test_any_text_of_a_subset_is_tokenized_as_before(tokenizer):
    """Whichever texts are chosen for training, and however they overlap."""
    rng = random.Random(0)
    words = sorted({word for text in CORPUS for word in text.split()})
    for _ in range(20):
        texts = [" ".join(rng.choices(words, k=rng.randrange(1, 8))) for _ in range(3)]
        smaller = reduced(tokenizer, texts)
        for text in texts:
            assert tokens(smaller, text) == tokens(tokenizer, text), text


def test_every_text_is_written_and_read_back(tokenizer):
    smaller = reduced(tokenizer)
    rng = random.Random(0)
    # without surrogates: control characters, white space, combining marks, private use and all planes
    ranges = [(0, 0x20), (0x20, 0x7F), (0x7F, 0x600), (0x900, 0xDFF), (0x2000, 0x2070), (0x4E00, 0x9FFF)]
    ranges += [(0xE000, 0x10000), (0x1F300, 0x1FAFF), (0, 0xD800), (0x10000, 0x110000)]
    texts = [
        "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(1, 30))) for _ in range(1000)
    ]
    texts += ["<|endoftext|>", "a <|en|> b", "\r\n\t \u2028", "e\u0301\u0302", "👩‍👩‍👧‍👦", "  two  spaces  "]
    for text in texts:
        for each in (tokenizer, smaller):
            ids = each(text, add_special_tokens=False, split_special_tokens=True).input_ids
            assert each.decode(ids, clean_up_tokenization_spaces=False) == text
            assert max(ids) < smaller.get_vocab()["<|endoftext|>"] or each is tokenizer


@pytest.mark.parametrize("number", [0, 10, 50, WORDS])
def test_a_number_of_tokens_is_kept_the_most_frequent_first(tokenizer, number):
    rows = [{"text": "cat"}] * 4 + [{"text": "mat"}] * 3 + [{"text": "lazy"}] * 2
    kept = choose_tokens(tokenizer, count_tokens(tokenizer, rows), number, min_count=3)
    assert len(kept) == 256 + number
    if number >= 10:
        assert {"Ġcat", "Ġmat"} <= kept
    # a rare token is kept only if it is as general as the others
    general = choose_tokens(tokenizer, count_tokens(tokenizer, rows[:7]), number, min_count=3)
    assert kept == general and ("Ġlazy" in kept) == (number >= tokenizer.get_vocab()["Ġlazy"] - 255)
    assert reduced(tokenizer, number=number).get_vocab()["<|endoftext|>"] == 256 + number


def test_without_counts_the_first_merges_are_kept(tokenizer):
    kept = choose_tokens(tokenizer, Counter(), 20)
    ids = tokenizer.get_vocab()
    assert kept == {token for token, i in ids.items() if i < 276 and token not in SPECIAL}


@pytest.mark.parametrize("auto_size", [0, 410, 425, 9999])
def test_auto_keeps_all_counted_tokens_and_general_ones_up_to_a_size(monkeypatch, tokenizer, auto_size):
    monkeypatch.setattr("askd_hf.models.smaller_vocabulary.AUTO_SIZE", auto_size)
    size = tokenizer.get_vocab()["<|notimestamps|>"] + 1 + TIMES
    counts = count_tokens(tokenizer, [{"text": text} for text in TEXTS])
    kept = choose_domain_tokens(tokenizer, size, 2.0, counts)
    counted = choose_tokens(tokenizer, counts, 0, keep_counted=True)
    of_counted = vocabulary_size(tokenizer, size, 2.0, counted)
    assert counted <= kept and {*counts} <= kept
    assert vocabulary_size(tokenizer, size, 2.0, kept) == min(max(of_counted, auto_size), size)
    ranked = [token for token in TextTokens(tokenizer).ranked if token not in counted]
    assert kept == counted | {*ranked[: len(kept) - len(counted)]}  # the first merges
    smaller = smaller_tokenizer(tokenizer, size, kept, 2.0)
    assert all(tokens(smaller, text) == tokens(tokenizer, text) for text in TEXTS)


def test_segments_and_prompts_count(tokenizer):
    rows = [{"text": "a", "segments": [{"text": "cat"}, None], "prompt": "mat"}, {"text": "", "segments": None}]
    assert set(count_tokens(tokenizer, rows)) == {"Ġa", "Ġcat", "Ġmat"}


def test_timestamps_end_with_the_window(tokenizer):
    model, _ = whisper_of(tokenizer)
    half = reduced(tokenizer, window=1.0)
    small = with_smaller_vocabulary(model, tokenizer, half, 1.0)
    first = half.get_vocab()["<|notimestamps|>"] + 1
    assert small.config.vocab_size == first + 51
    if "<|0.00|>" in tokenizer.get_vocab():
        assert "<|1.00|>" in half.get_vocab() and "<|1.02|>" not in half.get_vocab()
    embedding, full = small.get_output_embeddings().weight, model.get_output_embeddings().weight
    old = tokenizer.get_vocab()["<|notimestamps|>"] + 1
    assert torch.equal(embedding[first : first + 51], full[old : old + 51])


def test_logits_are_those_of_the_kept_tokens(tokenizer):
    model, _ = whisper_of(tokenizer)
    smaller = reduced(tokenizer)
    small = with_smaller_vocabulary(model, tokenizer, smaller, 2.0)
    features = torch.randn(1, 8, 200)
    names = ["<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>", *tokens(tokenizer, TEXTS[0])]
    ids, new_ids = (torch.tensor([t.convert_tokens_to_ids(names)]) for t in (tokenizer, smaller))
    with torch.no_grad():
        full = model(input_features=features, decoder_input_ids=ids).logits
        logits = small(input_features=features, decoder_input_ids=new_ids).logits
    common = [(new, tokenizer.get_vocab()[token]) for token, new in smaller.get_vocab().items()]
    new, old = (list(part) for part in zip(*common, strict=True))
    assert len(common) > 256
    torch.testing.assert_close(logits[..., new], full[..., old])
    assert small.num_parameters() < model.num_parameters()
    assert torch.equal(small.proj_out.weight, small.model.decoder.embed_tokens.weight)


def test_every_id_of_the_configs_follows(tokenizer):
    model, _ = whisper_of(tokenizer)
    smaller = reduced(tokenizer)
    small = with_smaller_vocabulary(model, tokenizer, smaller, 2.0)
    ids = smaller.get_vocab()
    assert "Ġbrown" not in ids
    for config in (small.config, small.generation_config):
        assert config.decoder_start_token_id == ids["<|startoftranscript|>"]
        assert config.eos_token_id == config.pad_token_id == ids["<|endoftext|>"]
        assert config.begin_suppress_tokens == [ids["Ġ"], ids["<|endoftext|>"]]
    suppressed = [ids[token] for token in ("!", "the", "<|startofprev|>") if token in ids]
    assert small.generation_config.suppress_tokens == suppressed
    assert small.generation_config.lang_to_id == {name: ids[name] for name in ("<|en|>", "<|fr|>")}
    assert small.generation_config.task_to_id == {name: ids[f"<|{name}|>"] for name in ("transcribe", "translate")}
    assert small.generation_config.no_timestamps_token_id == ids["<|notimestamps|>"]
    assert small.generation_config.prev_sot_token_id == ids["<|startofprev|>"]
    assert small.config.vocab_size == ids["<|notimestamps|>"] + 1 + TIMES
    assert model.config.decoder_start_token_id == tokenizer.get_vocab()["<|startoftranscript|>"]  # unchanged


def test_a_kept_vocabulary_changes_nothing(tokenizer):
    model, _ = whisper_of(tokenizer)
    whole = reduced(tokenizer, number=1000)
    assert whole.get_vocab() == tokenizer.get_vocab()
    same = with_smaller_vocabulary(model, tokenizer, whole, 2.0)
    assert all(torch.equal(weight, same.state_dict()[name]) for name, weight in model.state_dict().items())
    assert same.config.to_dict() == model.config.to_dict()
    assert same.generation_config.to_dict() == model.generation_config.to_dict()


def test_tokens_behind_the_timestamps_are_kept():
    """A fine-tuned model may have tokens that its owner added."""
    tokenizer = words_tokenizer(True)
    tokenizer.add_tokens(["<|extra|>"], special_tokens=True)
    model, _ = whisper_of(tokenizer, vocab_size=len(tokenizer))
    smaller = reduced(tokenizer, window=1.0)
    small = with_smaller_vocabulary(model, tokenizer, smaller, 1.0)
    new, old = (each.convert_tokens_to_ids("<|extra|>") for each in (smaller, tokenizer))
    assert new == len(smaller) - 1 == small.config.vocab_size - 1
    embedding, full = small.get_output_embeddings().weight, model.get_output_embeddings().weight
    assert torch.equal(embedding[new], full[old]) and torch.equal(embedding[new - 1], full[old - 51])


def test_other_tokens_of_the_same_number_are_another_run(tokenizer):
    """A checkpoint's rows would be those of other tokens."""
    model, processor = whisper_of(tokenizer)

    def settings(text: str) -> dict:
        smaller = reduced(tokenizer, [text], 20)
        config = with_smaller_vocabulary(model, tokenizer, smaller, 2.0).config
        collator = SpeechCollator(WhisperProcessor(processor.feature_extractor, smaller), config)
        return data_settings([], collator, Provenance()) | {"vocab_size": config.vocab_size}

    saved = settings(TEXTS[0])
    check_same_run(saved, settings(TEXTS[0]), "checkpoint-1")
    with pytest.raises(UserError, match=r"differ \(tokens \(--vocabulary\)"):
        check_same_run(saved, settings(MORE[0]), "checkpoint-1")


def test_the_tokens_of_the_pieces_of_long_clips_count(tokenizer, tmp_path):
    """Two words without a space between them are one text, and a cut makes two of it."""
    sound = {"bytes": encoded(tone(seconds=3.0)), "path": None}
    times = [{"start": 0.0, "end": 1.2, "text": "cat"}, {"start": 1.6, "end": 2.8, "text": "mat"}]
    features = Features(audio=AUDIO_FILE, text=Value("string"), clip=Value("string"), words=SEGMENTS)
    columns = {"audio": [sound], "text": ["catmat"], "clip": ["a"], "words": [times]}
    Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "speech")
    model, processor = whisper_of(tokenizer)
    arguments = DataArguments(dataset=[str(tmp_path / "speech")], language=["en"], long_clips="cut")
    rows = transcripts("auto", arguments, SpeechCollator(processor, model.config), True, False)
    assert [row["text"] for row in rows] == ["cat", "mat"]


def test_a_teacher_is_mapped_to_a_saved_student(tokenizer, tmp_path):
    """As for a second run with --student: the whole teacher, and the student's files."""
    model, _ = whisper_of(tokenizer)
    smaller = reduced(tokenizer)
    smaller.save_pretrained(tmp_path)
    loaded = WhisperTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == smaller.get_vocab()
    expected = with_smaller_vocabulary(model, tokenizer, smaller, 2.0)
    mapped = with_vocabulary_of(expected.config, loaded, model, tokenizer)
    assert torch.equal(mapped.get_output_embeddings().weight, expected.get_output_embeddings().weight)
    with pytest.raises(UserError, match="split text into different tokens"):
        token_partners(smaller, tokenizer)  # a teacher with fewer tokens than its student


def test_the_vocabulary_size_are_bytes_special_tokens_and_timestamps(tokenizer):
    size = tokenizer.get_vocab()["<|notimestamps|>"] + 1 + TIMES
    assert vocabulary_size(tokenizer, size, 2.0) == 256 + len(SPECIAL) + TIMES
    assert vocabulary_size(tokenizer, size, 1.0) == 256 + len(SPECIAL) + 51


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "must be auto, a number of tokens, or a text file"),
        (b" \n", "the file has no text"),
        (b"\xff\xfe\x00", "not a text file in UTF-8"),
    ],
)
def test_wrong_vocabularies_are_one_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "words.txt").write_bytes(content)
    with pytest.raises(UserError, match=f"--vocabulary .*{message}"):
        ModelArguments(teacher="there-is-none", vocabulary=str(tmp_path / "words.txt"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")
    model, processor = whisper_of(words_tokenizer(True))
    model.save_pretrained(folder / "teacher")
    processor.save_pretrained(folder / "teacher")
    speech = write_speech(folder / "speech" / "train", clips=8)
    rows = (speech / "metadata.csv").read_text().splitlines()
    texts = [f"{row.split(',')[0]},{TEXTS[number % 5]}" for number, row in enumerate(rows[1:])]
    (speech / "metadata.csv").write_text("\n".join([rows[0], *texts]) + "\n")
    (folder / "words.txt").write_text("\n".join(TEXTS))
    return folder


def distill(monkeypatch, capsys, place, out, *more):
    command = f"--teacher {place / 'teacher'} --dataset {place / 'speech'} --language en --output_dir {out} --use_cpu"
    command += " --num_train_epochs 1 --per_device_train_batch_size 4"
    command += " --teacher_top_k 8" * ("--teacher_cache_dir" in more)
    return run_here(monkeypatch, capsys, *command.split(), *map(str, more))


LOADED = """
import sys
import numpy as np
from transformers import pipeline
assert "askd_hf" not in sys.modules
recognize = pipeline("automatic-speech-recognition", model=sys.argv[1])
wave = np.random.default_rng(0).standard_normal(24_000).astype(np.float32)
print(repr(recognize({"raw": wave, "sampling_rate": 16_000}, generate_kwargs={"max_new_tokens": 9})["text"]))
"""


@pytest.fixture
def no_general_tokens(monkeypatch):
    """The teacher of these tests has fewer tokens than `--vocabulary auto` keeps."""
    monkeypatch.setattr("askd_hf.models.smaller_vocabulary.AUTO_SIZE", 0)


@pytest.mark.usefixtures("no_general_tokens")
def test_a_run_gives_a_student_that_loads_without_us(monkeypatch, capsys, tmp_path, place):
    out = tmp_path / "run"
    ended = distill(
        monkeypatch, capsys, place, out, "--vocabulary", "auto", "--window_seconds", 1,
        "--teacher_cache_dir", tmp_path / "t", "--eval_splits", "train",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    student, processor = load_whisper(str(out)), load_processor(str(out))
    teacher_tokenizer = load_processor(str(place / "teacher")).tokenizer
    assert re.search(r"million weights instead of [\d.]+ with all tokens$", ended.stderr, re.MULTILINE)
    assert student.config.vocab_size == len(processor.tokenizer) < 420 and student.config.max_source_positions == 50
    assert [tokens(processor.tokenizer, text) for text in TEXTS] == [tokens(teacher_tokenizer, text) for text in TEXTS]
    facts = json.loads((out / "training.json").read_text())["provenance"]["teacher"]
    whole = load_whisper(str(place / "teacher"))
    assert (facts["parameters"], facts["vocabulary"]) == (whole.num_parameters(), whole.config.vocab_size)
    (tmp_path / "loaded.py").write_text(LOADED)
    printed = run_there(tmp_path / "loaded.py", out, without_us=True)
    assert printed.returncode == 0, printed.stderr
    # the teacher of another vocabulary has other labels, which is found before the encoder runs
    caches = ("--teacher_cache_dir", tmp_path / "t", "--encoder_cache_dir", tmp_path / "e")
    ended = distill(monkeypatch, capsys, place, tmp_path / "other", "--vocabulary", 430, *caches)
    assert ended.returncode == 2 and not (tmp_path / "e").exists()
    assert "was created with another vocabulary (it depends on --vocabulary, --window_seconds and" in ended.stderr
    # trained further by its own files and the whole teacher
    again = distill(
        monkeypatch, capsys, place, tmp_path / "again", "--student", out, "--preset", "kd", "--max_steps", 1
    )
    assert again.returncode == 0, again.stderr
    assert load_whisper(str(tmp_path / "again")).config.vocab_size == student.config.vocab_size


@pytest.mark.usefixtures("no_general_tokens")
def test_a_file_gives_the_same_vocabulary_as_its_texts(monkeypatch, capsys, tmp_path, place):
    """The lines get the case of the labels: all upper-case lines are lower-cased, as such transcripts are."""
    tokens_of, sizes = [], []
    shouted = tmp_path / "shouted.txt"
    shouted.write_text("\n".join(TEXTS).upper())
    for name, vocabulary in (("a", "auto"), ("b", place / "words.txt"), ("c", 430), ("d", shouted)):
        ended = distill(
            monkeypatch, capsys, place, tmp_path / name, "--vocabulary", vocabulary, "--max_steps", 1,
            "--preset", "ce", "--compare", "False",
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr
        sizes.append(load_whisper(str(tmp_path / name)).config.vocab_size)
        tokens_of.append(load_processor(str(tmp_path / name)).tokenizer.get_vocab())
    assert tokens_of[0] == tokens_of[1] == tokens_of[3] and sizes[0] == sizes[1] == sizes[3] and sizes[2] == 430


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--vocabulary", 300], "--vocabulary must be between 365 (bytes, special tokens and the timestamps"),
        (["--vocabulary", 9999], "and 456, the teacher's, got 9999"),
        (["--vocabulary", "auto", "--student", "{teacher}"], "--vocabulary is not supported with --student"),
        (
            ["--vocabulary", "auto", "--streaming", "--max_steps", 1],
            "--vocabulary auto is not supported with --stream",
        ),
        (["--vocabulary", "auto", "--vocabulary_min_count", 2], "--vocabulary_min_count requires a number of tokens"),
    ],
)
def test_vocabularies_that_do_not_fit_are_refused_before_a_clip_is_read(
    monkeypatch, capsys, tmp_path, place, given, message
):
    monkeypatch.setattr("askd_hf.data.audio.read_audio", lambda _: pytest.fail("a clip was read"))
    given = [str(option).format(teacher=place / "teacher") for option in given]
    ended = distill(monkeypatch, capsys, place, tmp_path / "run", *given)
    assert ended.returncode == 2 and message in ended.stderr.strip().splitlines()[-1], ended.stderr


@pytest.mark.usefixtures("no_general_tokens")
def test_a_killed_run_resumes_with_the_same_vocabulary_and_no_other(monkeypatch, capsys, tmp_path, place):
    out, common = tmp_path / "run", ("--vocabulary", "auto", "--preset", "ce", "--compare", "False")
    common += ("--save_strategy", "steps", "--save_steps", 1, "--save_total_limit", 9)
    assert distill(monkeypatch, capsys, place, out, *common).returncode == 0
    weights = (out / "model.safetensors").read_bytes()
    resume = ("--resume_from_checkpoint", out / "checkpoint-1")
    ended = distill(monkeypatch, capsys, place, out, *common, *resume)
    assert ended.returncode == 0 and "resumed at step 1" in ended.stdout, ended.stderr
    assert (out / "model.safetensors").read_bytes() == weights
    ended = distill(monkeypatch, capsys, place, out, *common, *resume, "--vocabulary", 430)
    assert ended.returncode == 2 and "vocab_size" in ended.stderr.strip().splitlines()[-1]


@pytest.mark.usefixtures("no_general_tokens")
def test_cache_teacher_keeps_the_languages_of_a_student_with_few_tokens(monkeypatch, capsys, tmp_path, place):
    """A column has the language of each clip. The default, the tokenizer's, would be another one."""
    out = tmp_path / "run"
    assert distill(monkeypatch, capsys, place, out, "--vocabulary", "auto", "--compare", "False").returncode == 0
    assert not is_multilingual(WhisperForConditionalGeneration(load_whisper(out).config))  # by its vocabulary
    given = ("--teacher", place / "teacher", "--student", out, "--dataset", place / "speech", "--use_cpu")
    given += ("--teacher_cache_dir", tmp_path / "labels", "--teacher_top_k", 8, "--features_on_device", "True")
    script = ROOT / "examples" / "cache_teacher.py"
    ended = run_here(monkeypatch, capsys, *given, file=script)
    assert ended.returncode == 2 and "--language is required" in ended.stderr, ended.stderr
    ended = run_here(monkeypatch, capsys, *given, "--language", "en", file=script)
    assert ended.returncode == 0, ended.stderr
    assert set(load_from_disk(tmp_path / "labels")["language"][:]) == {"en"}


def test_cache_teacher_and_evaluation_refuse_what_they_would_ignore(monkeypatch, capsys, tmp_path, place):
    common = ("--teacher", place / "teacher", "--dataset", place / "speech", "--language", "en", "--use_cpu")
    for option, value in (("--vocabulary", "auto"), ("--window_seconds", 1)):
        cached = ("--teacher_cache_dir", tmp_path / "t", option, value)
        ended = run_here(monkeypatch, capsys, *common, *cached, file=ROOT / "examples" / "cache_teacher.py")
        assert ended.returncode == 2 and "--window_seconds and --vocabulary are not supported" in ended.stderr
    french = ("--teacher", place / "teacher", "--teacher_cache_dir", tmp_path / "t", "--language", "fr")
    ended = run_here(monkeypatch, capsys, *french, file=ROOT / "examples" / "cache_teacher.py")
    assert ended.returncode == 2 and "--language fr requires --dataset: " in ended.stderr
    arguments = ("--model", place / "teacher", "--dataset", place / "speech", "--language", "en")
    arguments += ("--clip_context", "True")
    for more in (("--timestamps", "segment"), ("--long_form", "chunked")):
        ended = run_here(monkeypatch, capsys, *arguments, *more, file=ROOT / "examples" / "evaluate.py")
        assert ended.returncode == 2 and "--clip_context is not supported with --long_form" in ended.stderr
