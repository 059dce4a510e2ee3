"""A teacher whose vocabulary, or whose mel bins, are others than the student's."""

import copy
import json
from pathlib import Path

import pytest
import torch
from models import MULTILINGUAL, SPECIAL, make_processor, make_tokenizer, make_whisper
from processes import run_there
from scripts import ROOT
from speech import write_speech
from training import Clips, make_trainer
from transformers import WhisperFeatureExtractor, WhisperProcessor, WhisperTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from askd_hf.data import decode_audio, load_speech_dataset
from askd_hf.data.labels import build_decoder_tokens
from askd_hf.errors import UserError
from askd_hf.models.loading import load_whisper
from askd_hf.models.student import init_student
from askd_hf.models.vocabulary import timestamp_ids, token_partners, with_vocabulary_of

ENGLISH_ONLY = make_processor().tokenizer


def renumbered(tokenizer: WhisperTokenizer, order: list[int]) -> WhisperTokenizer:
    """The same tokens with other ids: token `order[i]` is now `i`. Letters are first, as added tokens must be last."""
    names = tokenizer.convert_ids_to_tokens(order)
    letters = sum(len(name) == 1 for name in names)
    return make_tokenizer(names[:letters], names[letters:])


@pytest.fixture
def permuted():
    """A tokenizer of the same tokens with other ids, and for each of its tokens the id in the ordinary one."""
    size = len(ENGLISH_ONLY)
    generator = torch.Generator().manual_seed(0)
    letters = torch.randperm(27, generator=generator).tolist()
    special = (27 + torch.randperm(size - 27, generator=generator)).tolist()
    tokenizer = renumbered(ENGLISH_ONLY, letters + special)
    old = [ENGLISH_ONLY.get_vocab()[token] for token in tokenizer.convert_ids_to_tokens(range(size))]
    assert old != list(range(size))
    return tokenizer, torch.tensor(old)


def in_other_ids(model, old: torch.Tensor):
    """The same model with its vocabulary permuted: its token `i` is the token `old[i]` of `model`."""
    other = copy.deepcopy(model)
    other.model.decoder.embed_tokens.weight.data = model.model.decoder.embed_tokens.weight.data[old]
    other.tie_weights()
    new = old.argsort()
    for name in ("decoder_start_token_id", "pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(other.config, name, int(new[getattr(model.config, name)]))
    return other


def test_partners_are_tokens_of_the_same_text(permuted):
    tokenizer, old = permuted
    assert torch.equal(token_partners(tokenizer, ENGLISH_ONLY), old.argsort())
    assert torch.equal(token_partners(ENGLISH_ONLY, tokenizer), old)


def test_a_language_more_moves_the_tokens_behind_it():
    teacher, student = make_processor(MULTILINGUAL).tokenizer, make_processor(MULTILINGUAL[:1]).tokenizer
    partners = token_partners(teacher, student)
    assert partners[:30].tolist() == list(range(30))  # letters, end, start, <|en|>
    assert partners[30:].tolist() == [32, 33]  # transcribe, notimestamps
    back = token_partners(student, teacher)
    names = teacher.convert_ids_to_tokens((back < 0).nonzero().flatten().tolist())
    assert names == ["<|zh|>", "<|translate|>"]


@pytest.mark.parametrize("trained", [0, 8])
def test_a_permuted_teacher_distils_as_the_ordinary_one(tmp_path, teacher, student, permuted, trained):
    tokenizer, old = permuted
    strange = in_other_ids(teacher, old)
    adapted = with_vocabulary_of(student.config, ENGLISH_ONLY, strange, tokenizer)
    for name, weight in teacher.state_dict().items():
        assert torch.equal(adapted.state_dict()[name], weight), name
    runs = []
    for i, model in enumerate((teacher, adapted)):
        trainer = make_trainer(tmp_path / str(i), model, student, preset="kd", max_steps=max(trained, 1))
        trainer.train()
        runs.append(trainer)
    assert [row.get("teacher_loss") for row in runs[0].state.log_history] == [
        row.get("teacher_loss") for row in runs[1].state.log_history
    ]
    for name, weight in runs[0].model.state_dict().items():
        assert torch.equal(runs[1].model.state_dict()[name], weight), name


def test_without_the_permutation_undone_it_would_be_another_teacher(teacher, permuted):
    _, old = permuted
    ids = torch.randint(0, 26, (1, 5))
    features = torch.randn(1, 8, 100)
    plain, strange = (m(features, decoder_input_ids=ids).logits for m in (teacher, in_other_ids(teacher, old)))
    assert (plain - strange).abs().max() > 0.1


def test_a_token_of_the_teacher_alone_gives_its_probability_to_the_others():
    ours, theirs = make_processor(MULTILINGUAL[:1]), make_processor(MULTILINGUAL)
    teacher = make_whisper(theirs).eval()
    student = init_student(make_whisper(ours, seed=5))
    adapted = with_vocabulary_of(student.config, ours.tokenizer, teacher, theirs.tokenizer)
    partners = token_partners(theirs.tokenizer, ours.tokenizer)
    ids, features = torch.randint(0, 26, (2, 5)), torch.randn(2, 8, 100)
    with torch.no_grad():
        whole = teacher(features, decoder_input_ids=partners[ids]).logits.softmax(-1)
        seen = adapted(features, decoder_input_ids=ids).logits.softmax(-1)
    expected = whole[..., partners]
    torch.testing.assert_close(seen, expected / expected.sum(-1, keepdim=True))
    assert seen.shape[-1] == len(ours.tokenizer)


def test_a_token_of_the_student_alone_is_as_likely_as_the_start_token():
    ours, theirs = make_processor(MULTILINGUAL), make_processor(MULTILINGUAL[:1])
    teacher = make_whisper(theirs).eval()
    student = init_student(make_whisper(ours, seed=5))
    adapted = with_vocabulary_of(student.config, ours.tokenizer, teacher, theirs.tokenizer)
    token = ours.tokenizer.convert_tokens_to_ids
    with torch.no_grad():
        logits = adapted(torch.randn(1, 8, 100), decoder_input_ids=torch.tensor([[0, 1, 2]])).logits[0, -1]
    assert logits[token("<|zh|>")] == logits[token("<|startoftranscript|>")]
    assert logits[token("<|translate|>")] == logits[token("<|startoftranscript|>")]
    assert logits[token("<|transcribe|>")] != logits[token("<|startoftranscript|>")]


def test_a_language_that_the_teacher_does_not_know_is_refused():
    ours, theirs = make_processor(MULTILINGUAL), make_processor(MULTILINGUAL[:1])
    ours.tokenizer.set_prefix_tokens(language="zh", task="transcribe", predict_timestamps=False)
    student, teacher = make_whisper(ours), make_whisper(theirs)
    with pytest.raises(UserError, match=r"the teacher's vocabulary lacks <\|zh\|>"):
        with_vocabulary_of(student.config, ours.tokenizer, teacher, theirs.tokenizer)


def test_the_same_vocabulary_leaves_the_teacher_as_it_is(teacher, student):
    assert with_vocabulary_of(student.config, ENGLISH_ONLY, teacher, make_processor().tokenizer) is teacher


def test_another_way_to_split_text_is_refused_with_advice():
    vocab = {letter: i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyzĠ")} | {"ab": 27}
    other = WhisperTokenizer(vocab=vocab, merges=[("a", "b")], unk_token="<|endoftext|>", pad_token="<|endoftext|>")
    with pytest.raises(UserError, match=r"split text into different tokens.*pseudo-label"):
        token_partners(ENGLISH_ONLY, other)  # the student has a merge that the teacher lacks


# ---- timestamps ----

TIMES = [f"<|{i * 0.02:.2f}|>" for i in range(51)]


def with_timestamps(languages: tuple[str, ...], named: bool) -> WhisperProcessor:
    """With names for the 51 timestamps of a window of one second, or without."""
    processor = make_processor(languages)
    if named:
        processor.tokenizer.add_tokens(TIMES, special_tokens=True)
    return processor


def timed_whisper(processor: WhisperProcessor, seed: int):
    first = processor.tokenizer.convert_tokens_to_ids("<|notimestamps|>") + 1
    return make_whisper(processor, seed=seed, vocab_size=first + 51)


def timed_clips(student, tokenizer: WhisperTokenizer) -> list[dict]:
    texts = ("ab", "cde", "f", "gh")
    labels = [
        build_decoder_tokens(
            tokenizer,
            {"text": text, "segments": [{"start": 0.02 * i, "end": 0.6 + 0.1 * i, "text": text}]},
            timestamps=True,
            max_tokens=32,
            max_positions=50,
        ).labels
        for i, text in enumerate(texts)
    ]
    first = tokenizer.convert_tokens_to_ids("<|notimestamps|>") + 1
    assert [first + 2, first + 40] == [i for i in labels[2] if i >= first]
    rows = list(Clips(student.config, clips=4))
    return [row | {"labels": torch.tensor(ids)} for row, ids in zip(rows, labels, strict=True)]


@pytest.mark.parametrize("named_by_student", [False, True])
@pytest.mark.parametrize("named_by_teacher", [False, True])
def test_timestamps_are_partners_by_their_place(tmp_path, caplog, named_by_student, named_by_teacher):
    ours = with_timestamps(MULTILINGUAL[:1], named_by_student)
    theirs = with_timestamps(MULTILINGUAL[:2], named_by_teacher)
    plain, student = timed_whisper(ours, seed=0), init_student(timed_whisper(ours, seed=5), decoder_layers=2)
    # the same teacher with a language more
    strange = timed_whisper(theirs, seed=0)
    more = theirs.tokenizer.convert_tokens_to_ids("<|zh|>")
    rows = plain.model.decoder.embed_tokens.weight.data
    weights = plain.state_dict()
    weights["model.decoder.embed_tokens.weight"] = torch.cat([rows[:more], torch.randn(1, 16), rows[more:]])
    weights["proj_out.weight"] = weights["model.decoder.embed_tokens.weight"]
    strange.load_state_dict(weights)

    adapted = with_vocabulary_of(student.config, ours.tokenizer, strange, theirs.tokenizer)
    assert "1 of its tokens are not in the student's, 0 of the student's are not in the teacher's" in caplog.text
    losses = []
    for i, teacher in enumerate((plain, adapted)):
        trainer = make_trainer(tmp_path / str(i), teacher, student, preset="kd", max_steps=4)
        trainer.train_dataset = timed_clips(student, ours.tokenizer)
        trainer.train()
        losses.append([row["teacher_loss"] for row in trainer.state.log_history if "teacher_loss" in row])
        for name, weight in teacher.state_dict().items():
            assert torch.equal(weight, plain.state_dict()[name]), name
    assert losses[0] == losses[1] and len(losses[0]) == 4


@pytest.mark.parametrize("named_by_student", [False, True])
def test_names_for_timestamps_alone_make_no_other_vocabulary(named_by_student):
    ours = with_timestamps(MULTILINGUAL, named_by_student)
    theirs = with_timestamps(MULTILINGUAL, not named_by_student)
    teacher, student = timed_whisper(theirs, seed=0), timed_whisper(ours, seed=5)
    assert with_vocabulary_of(student.config, ours.tokenizer, teacher, theirs.tokenizer) is teacher


def test_what_follows_notimestamps_under_another_name_is_no_timestamp():
    ours = make_tokenizer("abcdefghijklmnopqrstuvwxyzĠ", [*SPECIAL, *TIMES[:2], "<|noise|>", "<|music|>"])
    theirs = make_tokenizer("abcdefghijklmnopqrstuvwxyzĠ", [*SPECIAL, *TIMES[:2], "<|music|>", "<|noise|>"])
    first = ours.convert_tokens_to_ids("<|0.00|>")
    assert timestamp_ids(ours, 100) == range(first, first + 2)
    assert timestamp_ids(ENGLISH_ONLY, 2000) == range(first, first + 1501)
    assert timestamp_ids(ENGLISH_ONLY, first + 7) == range(first, first + 7)
    assert token_partners(theirs, ours)[-2:].tolist() == [first + 3, first + 2]


# ---- large-v3 and small ----


def whisper_shaped(folder: Path, mel_bins: int, languages: list[str]) -> WhisperTokenizer:
    """A tiny model and its processor in `folder`, with a vocabulary of the size and order of a real multilingual one.

    Its text tokens are single bytes, and 50,001 that no text has.
    """
    pieces = [*bytes_to_unicode().values(), *(f"<{i}>" for i in range(50_001))]
    tokenizer = WhisperTokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=[],
        unk_token="<|endoftext|>",
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    tasks = ["translate", "transcribe", "startoflm", "startofprev", "nospeech", "notimestamps"]
    special = [f"<|{name}|>" for name in ("endoftext", "startoftranscript", *languages, *tasks)]
    special += [f"<|{i * 0.02:.2f}|>" for i in range(1501)]
    tokenizer.add_tokens(special, special_tokens=True)
    token = tokenizer.convert_tokens_to_ids
    processor = WhisperProcessor(WhisperFeatureExtractor(feature_size=mel_bins, chunk_length=1), tokenizer)
    model = make_whisper(processor, num_mel_bins=mel_bins, vocab_size=len(tokenizer), init_std=0.2)
    settings = dict(
        is_multilingual=True,
        lang_to_id={f"<|{name}|>": token(f"<|{name}|>") for name in languages},
        task_to_id={name: token(f"<|{name}|>") for name in ("transcribe", "translate")},
    )
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return tokenizer


def run(folder: Path, command: str) -> str:
    """A script of examples/ in `folder`; what it wrote to stderr."""
    script, *arguments = command.split()
    done = run_there(ROOT / "examples" / script, *arguments, "--language", "en", "--use_cpu", directory=folder)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def shaped(tmp_path_factory) -> tuple[Path, WhisperTokenizer, WhisperTokenizer]:
    """A directory with a teacher like large-v3 and a student like small, and their tokenizers."""
    folder = tmp_path_factory.mktemp("shaped")
    languages = list(LANGUAGES)
    assert languages[-1] == "yue"
    theirs = whisper_shaped(folder / "teacher", 128, languages)
    ours = whisper_shaped(folder / "student", 80, languages[:-1])
    write_speech(folder / "speech", 4)
    return folder, theirs, ours


CACHES = "--encoder_cache_dir encoder --teacher_cache_dir labels --teacher_top_k 51864"


@pytest.mark.parametrize(
    "teacher", ["live", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cached", "absent"))]
)
def test_a_teacher_like_large_v3_distils_into_a_student_like_small(tmp_path, shaped, teacher):
    folder, theirs, ours = shaped
    speech_dir = folder / "speech"
    for name in ("teacher", "student"):
        (tmp_path / name).symlink_to(folder / name)
    assert (len(theirs), len(ours)) == (51866, 51865)
    assert theirs.convert_tokens_to_ids("<|transcribe|>") == ours.convert_tokens_to_ids("<|transcribe|>") + 1
    train = "distill.py --compare False --student student --preset kd --max_steps 3 --output_dir run --logging_steps 1"
    speech = f"--teacher teacher --dataset {speech_dir}"
    if teacher == "live":
        warned = run(tmp_path, f"{train} {speech}")
    elif teacher == "cached":
        warned = run(tmp_path, f"{train} {speech} {CACHES}")
    else:
        warned = run(tmp_path, f"cache_teacher.py {speech} --student student {CACHES}")
        run(tmp_path, f"{train} --dataset labels")
    assert "1 of its tokens are not in the student's, 0 of the student's are not in the teacher's" in warned
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    losses = [row["teacher_loss"] for row in log if "teacher_loss" in row]
    assert len(losses) == 3

    # the first loss by hand: all clips are in the first batch
    student, model = (load_whisper(str(tmp_path / name)).eval() for name in ("student", "teacher"))
    total, tokens = 0.0, 0
    partners = token_partners(theirs, ours)
    ours.set_prefix_tokens(language="en", task="transcribe", predict_timestamps=False)
    extractors = {80: WhisperFeatureExtractor(80, chunk_length=1), 128: WhisperFeatureExtractor(128, chunk_length=1)}
    for row in load_speech_dataset(str(speech_dir), None, "train"):
        ids = torch.tensor(ours.encode(f" {row['text']}"))
        wave = decode_audio(row["audio"])
        features = {
            n: e(wave, sampling_rate=16_000, return_tensors="pt").input_features for n, e in extractors.items()
        }
        with torch.no_grad():
            q = student(features[80], decoder_input_ids=ids[None, :-1]).logits[0] / 2
            p = model(features[128], decoder_input_ids=partners[ids][None, :-1]).logits[0, :, partners] / 2
        total += 4 * (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum().item()
        tokens += len(ids) - 1
    assert losses[0] == pytest.approx(total / tokens, rel=1e-4 if teacher == "live" else 2e-3)
