"""The teacher's log-probabilities and times, against computations of their own."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Audio, Dataset
from tiny_teacher import make_teacher, tone, write_clips
from transformers import GenerationConfig

from askd_hf.data import Limits, filter_invalid_clips
from askd_hf.data.audio import extract_features
from askd_hf.errors import UserError
from askd_hf.evaluation.suites import load_set
from askd_hf.pseudo_labels import PseudoLabelArguments, plan_transcription, transcribe
from askd_hf.pseudo_labels.transcription import has_spaces, segments_of, words_of

SECONDS = [0.5, 1.0, 0.3, 0.8, 0.7, 0.44, 0.9]


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("speech") / "clips", SECONDS, {"speaker": ["a"] * len(SECONDS)})


def heard(teacher, processor, speech, directory, *, timestamps: bool, batch_size: int = 3):
    args = PseudoLabelArguments(
        teacher="tiny",
        dataset=str(speech),
        output_dir=str(directory),
        timestamps=timestamps,
        batch_size=batch_size,
        device="cpu",
    )
    clips = filter_invalid_clips(load_set(args.source(), text_required=False), None, Limits(1.0), on_bad_audio="error")
    return transcribe(plan_transcription(args, teacher, processor, clips))


def features_of(processor, i: int) -> torch.Tensor:
    wave = np.round(tone(SECONDS[i], i) * 2**15) / 2**15  # as the file has it
    return extract_features(processor.feature_extractor, [wave.astype(np.float32)])["input_features"]


def test_log_probs_are_of_the_tokens_and_the_end_after_suppression(speech, tmp_path):
    """OpenAI's definition, by hand: forced decoding, suppressed tokens masked, sum over all tokens and the end."""
    teacher, processor = make_teacher()
    special = range(teacher.config.eos_token_id + 1, teacher.config.vocab_size)
    suppressed = [*processor.tokenizer.convert_tokens_to_ids(["u", "z"]), *special]
    teacher.generation_config.suppress_tokens = suppressed
    lines = heard(teacher, processor, speech, tmp_path, timestamps=False)
    start, end = teacher.config.decoder_start_token_id, teacher.config.eos_token_id
    no_timestamps = teacher.generation_config.no_timestamps_token_id
    penalty_from, factor = teacher.generation_config.exponential_decay_length_penalty
    assert len({line["tokens"] for line in lines}) > 2  # so that clips of a batch end at different places
    for i, line in enumerate(lines):
        ids = processor.tokenizer.convert_tokens_to_ids(list(line["text"]))
        assert line["ended"] and line["tokens"] == len(ids)
        prompt = [start, no_timestamps]
        with torch.no_grad():
            logits = teacher(features_of(processor, i), decoder_input_ids=torch.tensor([prompt + ids])).logits[0]
        total = 0.0
        for k, token in enumerate([*ids, end]):
            scores = logits[len(prompt) - 1 + k].clone()
            if k > penalty_from:
                scores[end] += scores[end].abs() * (factor ** (k - penalty_from) - 1)
            scores[suppressed] = -torch.inf
            assert scores.argmax() == token
            total += scores.log_softmax(0)[token].item()
        assert line["avg_logprob"] == pytest.approx(total / (len(ids) + 1), abs=1e-4)


def test_with_timestamps_they_count_as_tokens(speech, tmp_path):
    """Against the scores that `generate` gives out, clip by clip."""
    teacher, processor = make_teacher()
    lines = heard(teacher, processor, speech, tmp_path, timestamps=True)
    first = teacher.generation_config.no_timestamps_token_id + 1
    for i, line in enumerate(lines):
        features = features_of(processor, i)
        options = dict(return_dict_in_generate=True, output_scores=True, force_unique_generate_call=True)
        output = teacher.generate(features, return_timestamps=True, do_sample=False, num_beams=1, **options)
        ids = output.sequences[0, -len(output.scores) :]
        assert (ids >= first).sum() >= 2
        log_probs = [scores[0].log_softmax(0)[token].item() for scores, token in zip(output.scores, ids, strict=True)]
        assert line["avg_logprob"] == pytest.approx(np.mean(log_probs), abs=1e-4)
        assert line["tokens"] == len(ids) - 1
        assert "".join(segment["text"] for segment in line["segments"]) == line["text"]


def test_lines_are_those_of_their_clips_whatever_the_batch(speech, tmp_path):
    teacher, processor = make_teacher()
    lines = heard(teacher, processor, speech, tmp_path / "three", timestamps=True)
    alone = heard(teacher, processor, speech, tmp_path / "one", timestamps=True, batch_size=1)
    assert [line["clip"] for line in lines] == [f"audio/{i:03d}.wav" for i in range(len(SECONDS))]
    for line, other, seconds in zip(lines, alone, SECONDS, strict=True):
        assert line | {"avg_logprob": 0} == other | {"avg_logprob": 0}
        assert line["avg_logprob"] == pytest.approx(other["avg_logprob"], abs=1e-4)
        assert all(0 <= s["start"] <= s["end"] <= seconds for s in line["segments"])


def test_a_text_cut_off_by_the_limit_is_known(speech, tmp_path):
    teacher, processor = make_teacher()
    teacher.generation_config.max_length = 16
    lines = heard(teacher, processor, speech, tmp_path, timestamps=False)
    assert {line["ended"] for line in lines} == {True, False}
    assert all(line["tokens"] == 16 for line in lines if not line["ended"])


def test_logits_that_are_not_finite_are_refused_by_the_clip(speech, tmp_path):
    teacher, processor = make_teacher()
    with torch.no_grad():
        teacher.model.decoder.layer_norm.weight.fill_(torch.nan)
    with pytest.raises(
        UserError, match=r"audio/001.wav: the teacher's logits are not finite; try askd-hf pseudo-label --dtype"
    ):
        heard(teacher, processor, speech, tmp_path, timestamps=False)


def test_a_teacher_without_timestamps_is_refused_before_decoding(speech, tmp_path):
    teacher, processor = make_teacher()
    del teacher.generation_config.no_timestamps_token_id
    with pytest.raises(UserError, match="has no timestamp tokens"):
        heard(teacher, processor, speech, tmp_path, timestamps=True)


# ---- phrases ----

END, FIRST = 100, 200  # texts are below, times from here on


def phrases(ids: list[int], seconds: float) -> list[tuple[float, float, str]]:
    found = segments_of(ids, FIRST, END, seconds, lambda text: "".join(chr(i) for i in text))
    return [(segment["start"], segment["end"], segment["text"]) for segment in found]


def at(seconds: float) -> int:
    return FIRST + round(seconds / 0.02)


def test_no_phrase_ends_before_it_starts():
    """A model may write a timestamp that is before the last one."""
    ids = [at(0.5), ord("a"), at(0.2), ord("b"), at(1.0)]
    assert phrases(ids, 2.0) == [(0.5, 0.5, "a"), (0.5, 1.0, "b")]


def test_phrases_are_between_their_timestamps():
    ids = [at(0.5), ord("a"), ord("b"), at(1.0), at(1.3), ord("c"), at(2)]
    assert phrases(ids, 2.5) == [(0.5, 1.0, "ab"), (1.3, 2.0, "c")]


def test_a_phrase_without_an_end_ends_with_the_clip():
    assert phrases([at(0), ord("a"), at(1), at(1), ord("b")], 2.47) == [(0.0, 1.0, "a"), (1.0, 2.46, "b")]
    assert phrases([ord("a")], 0.5) == [(0.0, 0.5, "a")]


def test_times_after_the_end_of_the_clip_are_its_end():
    assert phrases([at(0), ord("a"), at(3.0), at(4.0), ord("b"), at(5.0)], 2.5) == [(0.0, 2.5, "a"), (2.5, 2.5, "b")]


def test_no_phrase_has_no_text_and_special_tokens_are_none():
    assert phrases([at(0), at(1), ord("a"), END + 3, at(2)], 3) == [(1.0, 2.0, "a")]
    assert phrases([], 1.0) == []


# ---- speech without references ----


def test_references_are_optional(speech):
    args = PseudoLabelArguments(teacher="tiny", dataset=str(speech))
    clips = load_set(args.source(), text_required=False)
    assert clips["text"][:] == [None] * len(SECONDS)
    assert clips["speaker"][:] == ["a"] * len(SECONDS)


def test_a_directory_of_audio_files_needs_no_metadata(speech, tmp_path):
    for i, file in enumerate(sorted((speech / "audio").iterdir())[:3]):
        (tmp_path / "bare" / f"disc {i}").mkdir(parents=True)
        (tmp_path / "bare" / f"disc {i}" / "Track.WAV").write_bytes(file.read_bytes())
    (tmp_path / "bare" / "notes.txt").write_text("not audio")
    source = PseudoLabelArguments(teacher="tiny", dataset=str(tmp_path / "bare")).source()
    clips = load_set(source, text_required=False)
    assert clips["clip"][:] == [f"disc {i}/Track.WAV" for i in range(3)]
    assert filter_invalid_clips(clips, None, Limits(1.0), on_bad_audio="error")["duration"][:] == SECONDS[:3]
    assert len(load_set(source, limit=2, text_required=False)) == 2
    with pytest.raises(UserError, match="no column 'who'"):
        load_set(replace(source, speaker_column="who"), text_required=False)
    with pytest.raises(UserError, match="has no split 'test'; it has train"):
        load_set(replace(source, split="test"), text_required=False)
    with pytest.raises(UserError, match="has no configurations"):
        load_set(replace(source, config="en"), text_required=False)


def test_a_saved_dataset_without_text_loads(tmp_path):
    rows = [{"sound": {"path": None, "bytes": b"x"}, "id": 3}]
    Dataset.from_list(rows).cast_column("sound", Audio(decode=False)).save_to_disk(tmp_path / "saved")
    source = PseudoLabelArguments(teacher="tiny", dataset=str(tmp_path / "saved")).source()
    clips = load_set(source, text_required=False)
    assert clips["text"][:] == [None]
    with pytest.raises(UserError, match="no column 'text'"):
        load_set(replace(source, text_column_name="text"), text_required=False)


def test_words_end_where_their_letters_end():
    """A pause is the time of the punctuation behind a word; timestamps between segments are no words."""
    pieces = ["<|0.00|>", "ĠOne", ",", "Ġtwo", "-", "three", "<|2.00|>", "<|2.00|>", "Ġfour", ".", "<|9.00|>"]
    ends = [0.0, 0.5, 1.1, 1.4, 1.45, 1.9, 2.0, 2.6, 3.0, 3.9, 9.0]
    ids = [100 + i if piece.startswith("<") else i for i, piece in enumerate(pieces)]
    tokens = list(zip(ids, pieces, ends, strict=True))

    def decode(ids):
        return "".join(pieces[i] for i in ids).replace("Ġ", " ").strip()

    words = words_of(tokens, 100, 3.5, decode, spaced=True)
    assert [(word["text"], word["start"], word["end"]) for word in words] == [
        ("One,", 0.0, 0.5),
        ("two-three", 1.1, 1.9),
        ("four.", 2.6, 3.0),
    ]
    characters = "一二。"
    tokens = [(i, piece, 0.1 * i) for i, piece in enumerate(characters)]
    words = words_of(tokens, 100, 1.0, lambda ids: "".join(characters[i] for i in ids), spaced=False)
    assert [word["text"] for word in words] == ["一", "二", "。"]


def test_no_word_starts_before_the_last_one_ends():
    tokens = [(0, "Ġa", 1.0), (1, "Ġb", 0.4), (2, "Ġc", 1.5)]
    words = words_of(tokens, 100, 2.0, lambda ids: " ".join("abc"[i] for i in ids), spaced=True)
    assert [(word["start"], word["end"]) for word in words] == [(0.0, 1.0), (1.0, 1.0), (1.0, 1.5)]


def test_translations_have_the_spaces_of_english():
    assert not has_spaces(GenerationConfig(language="ja", task="transcribe"))
    assert has_spaces(GenerationConfig(language="ja", task="translate"))
    assert has_spaces(GenerationConfig(language="fr", task="transcribe"))
    assert has_spaces(GenerationConfig())  # English only
