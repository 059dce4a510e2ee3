"""Speculative decoding: identical tokens, acceptance rate, speedup, and no changes to the assistant."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from models import make_processor, make_whisper
from speech import write_speech
from transformers import WhisperForConditionalGeneration
from transformers.generation import AssistedCandidateGenerator

from askd_hf import init_student
from askd_hf.commands import evaluate
from askd_hf.data import load_speech_dataset
from askd_hf.errors import UserError
from askd_hf.evaluation import speculative
from askd_hf.evaluation.result_tables import speculative_table, speculative_verdict
from askd_hf.evaluation.results import DraftLength, Results, Speculative, Timing
from askd_hf.evaluation.speculative import (
    as_assistant,
    count_proposals,
    measure_speculative,
    save_draft_length,
)
from askd_hf.models.generation_config import generation_config_file


@pytest.fixture
def clips(tmp_path):
    return load_speech_dataset(str(write_speech(tmp_path, clips=2)), None, "train")


@pytest.fixture
def other_encoder(processor):
    return make_whisper(processor, seed=5, decoder_layers=2).eval()


@pytest.fixture
def same_encoder(teacher):
    return init_student(teacher, 2).eval()


@pytest.mark.parametrize("kind", ["same_encoder", "other_encoder"])
def test_the_teacher_keeps_its_tokens(kind, teacher, processor, clips, request):
    student = request.getfixturevalue(kind)
    result = measure_speculative(teacher, student, processor, clips, "tones", num_assistant_tokens=[20], repetitions=1)
    assert (result.set, result.clips, result.identical) == ("tones", 2, 2)
    assert 0 <= result.acceptance_rate < 1  # an untrained student with fewer layers isn't always right
    assert result.teacher.lowest > 0 and result.assisted.lowest > 0 and result.speedup > 0


@pytest.mark.parametrize("shared", [True, False])
def test_the_teacher_keeps_all_of_its_own_proposals(shared, teacher, processor, clips, monkeypatch):
    twin = copy.deepcopy(teacher)
    monkeypatch.setattr(speculative, "same_encoder", lambda *_: shared)
    result = measure_speculative(teacher, twin, processor, clips, "tones", repetitions=1)
    assert (result.identical, result.acceptance_rate) == (2, 1.0)


def test_a_shared_encoder_runs_once(teacher, same_encoder, other_encoder, processor, clips):
    runs = {"teacher": 0, "same": 0, "other": 0}
    for name, model in {"teacher": teacher, "same": same_encoder, "other": other_encoder}.items():
        model.model.encoder.register_forward_hook(lambda *_, name=name: runs.update({name: runs[name] + 1}))
    measure_speculative(teacher, same_encoder, processor, clips, "tones", num_assistant_tokens=[20], repetitions=1)
    assert runs == {"teacher": 2 * 4, "same": 0, "other": 0}  # 2 clips, with and without assistant, untimed and timed
    measure_speculative(teacher, other_encoder, processor, clips, "tones", num_assistant_tokens=[20], repetitions=1)
    assert runs == {"teacher": 2 * 2 * 4, "same": 0, "other": 2 * 2}


def write_always(model, tokens: list[int]) -> None:
    """Replace the logits of a model so that it generates these tokens for every input."""

    def replace_logits(_, args, kwargs, output):
        new = output.logits.shape[1]
        past = output.past_key_values.get_seq_length() - new
        output.logits.fill_(0.0)
        for i in range(new):
            # the logits at a position are for the token after it; the prompt has 2: start and no timestamps
            place = past + i - 1
            output.logits[:, i, tokens[place] if 0 <= place < len(tokens) else tokens[-1]] = 50.0
        return output

    model.register_forward_hook(replace_logits, with_kwargs=True)


@pytest.mark.parametrize("proposed_at_once", [3, 5])
def test_acceptance_counted_by_hand(teacher, other_encoder, processor, clips, proposed_at_once):
    ids = processor.tokenizer.convert_tokens_to_ids
    end = ids("<|endoftext|>")
    write_always(teacher, [*map(ids, "abcdefgh"), end])
    write_always(other_encoder, [*map(ids, "abXdefgX".replace("X", "z")), end])
    other_encoder.generation_config.assistant_confidence_threshold = 0.0
    numbers = [proposed_at_once]
    result = measure_speculative(
        teacher, other_encoder, processor, clips, "tones", num_assistant_tokens=numbers, repetitions=1
    )
    # 3 at once: ab(z) -> c; def -> g; (z)<end> -> h; <end>
    # 5 at once: ab(zde) -> c; defg(z) -> h; <end>
    kept, made = {3: (2 + 3 + 0 + 1, 3 + 3 + 2 + 1), 5: (2 + 4 + 1, 5 + 5 + 1)}[proposed_at_once]
    assert result.identical == 2
    assert result.acceptance_rate == pytest.approx(kept / made)


def test_nothing_right(teacher, other_encoder, processor, clips):
    ids = processor.tokenizer.convert_tokens_to_ids
    write_always(teacher, [*map(ids, "abc"), ids("<|endoftext|>")])
    write_always(other_encoder, [ids("z")])
    result = measure_speculative(teacher, other_encoder, processor, clips, "tones", repetitions=1)
    assert (result.identical, result.acceptance_rate) == (2, 0.0)


def test_the_ratio_is_that_of_the_clock(teacher, other_encoder, processor, clips, monkeypatch):
    clock, order = [0.0], []
    generate = teacher.generate
    # seconds per clip: the untimed pass over 2 clips, then 3 timed passes
    takes = {False: iter([9.0] * 2 + [4.0] * 2 + [6.0] * 2 + [5.0] * 2), True: iter([9.0] * 2 + [2.0] * 2 + [1.0] * 4)}

    def slow_generate(*args, **kwargs):
        helped = "assistant_model" in kwargs
        order.append(helped)
        clock[0] += next(takes[helped])
        return generate(*args, **kwargs)

    monkeypatch.setattr(teacher, "generate", slow_generate)
    monkeypatch.setattr(speculative, "synchronized_time", lambda device: clock[0])
    result = measure_speculative(
        teacher, other_encoder, processor, clips, "tones", num_assistant_tokens=[3], repetitions=3
    )
    assert (result.teacher.median, result.assisted.median) == (10.0, 2.0)
    assert result.speedup == 5.0  # of 8 / 4, 12 / 2, 10 / 2
    assert order[4:] == [False, True] * 2 + [True, False] * 2 + [False, True] * 2


def test_the_assistant_is_left_as_it_was(teacher, same_encoder, other_encoder, processor, clips):
    for student in (same_encoder, other_encoder):
        student.generation_config.num_assistant_tokens_schedule = "heuristic"  # `generate` writes to the config then
        config, before = student.generation_config, student.generation_config.to_dict()
        features = torch.randn(1, 8, 100)
        alone = student.generate(features)
        measure_speculative(teacher, student, processor, clips, "tones", repetitions=1)
        assert student.generation_config is config
        assert config.to_dict() == before
        assert not hasattr(config, "force_unique_generate_call")
        assert student.config.is_encoder_decoder
        assert torch.equal(student.generate(features), alone)


def test_the_assistant_is_left_as_it_was_after_an_error(teacher, other_encoder):
    config = other_encoder.generation_config
    with pytest.raises(KeyError), as_assistant(other_encoder, teacher) as assistant:
        teacher.generate(torch.randn(1, 8, 100), assistant_model=assistant)
        raise KeyError
    assert other_encoder.generation_config is config and not hasattr(config, "force_unique_generate_call")


def test_counting_ends(teacher, other_encoder):
    features = torch.randn(1, 8, 100)
    with count_proposals() as count:
        teacher.generate(features, assistant_model=other_encoder)
    made = count.proposed
    assert made > 0
    teacher.generate(features, assistant_model=other_encoder)
    assert count.proposed == made


def test_another_vocabulary_is_refused(teacher, clips):
    processor = make_processor(("<|en|>",))
    student = make_whisper(processor)
    with pytest.raises(UserError, match="vocab_size: teacher"):
        measure_speculative(teacher, student, processor, clips, "tones")


def test_a_shorter_window_is_refused(teacher, processor, clips):
    student = make_whisper(processor, max_source_positions=25)
    with pytest.raises(UserError, match="max_source_positions: teacher 50, student 25"):
        measure_speculative(teacher, student, processor, clips, "tones")


def test_each_number_is_measured_and_the_fastest_is_reported(teacher, other_encoder, processor, clips, monkeypatch):
    ids = processor.tokenizer.convert_tokens_to_ids
    write_always(teacher, [*map(ids, "abcdefgh"), ids("<|endoftext|>")])
    write_always(other_encoder, [*map(ids, "abzdefgz"), ids("<|endoftext|>")])
    other_encoder.generation_config.assistant_confidence_threshold = 0.0
    clock, generate = [0.0], teacher.generate
    takes = {0: 6.0, 1: 3.0, 3: 2.0, 5: 8.0}  # seconds per clip by number of proposed tokens

    def timed_generate(*args, assistant_model=None, **kwargs):
        clock[0] += takes[assistant_model.generation_config.num_assistant_tokens if assistant_model else 0]
        given = {} if assistant_model is None else {"assistant_model": assistant_model}
        tokens = generate(*args, **given, **kwargs)
        # a wrong token in the first clip with one proposed token: a difference is counted
        return tokens + 1 if given and clock[0] == 2 * takes[0] + takes[1] else tokens

    monkeypatch.setattr(teacher, "generate", timed_generate)
    monkeypatch.setattr(speculative, "synchronized_time", lambda device: clock[0])
    result = measure_speculative(
        teacher, other_encoder, processor, clips, "tones", num_assistant_tokens=[1, 3, 5], repetitions=2
    )
    found = {each.num_assistant_tokens: each for each in result.draft_lengths}
    assert {number: each.speedup for number, each in found.items()} == {1: 2.0, 3: 3.0, 5: 0.75}
    assert found[3].acceptance_rate == pytest.approx(6 / 9)  # counted by hand above
    assert found[5].acceptance_rate == pytest.approx(7 / 11)
    assert (result.num_assistant_tokens, result.speedup, result.assisted.median) == (3, 3.0, 4.0)
    assert [each.identical for each in result.draft_lengths] == [1, 2, 2]
    assert result.differing == [clips["clip"][0]]
    assert speculative_verdict(result).endswith("3.00x as fast as the teacher alone (num_assistant_tokens 3)")
    table = speculative_table(result)
    assert [row[0] for row in table.rows] == ["teacher alone", "1", "3", "5"]
    assert clips["clip"][0] in table.text()


def of_speedups(*speedups: tuple[float, float, float]) -> Speculative:
    """Results with the median, lowest and highest speedup of 2, 4, ... proposed tokens."""
    second = Timing(1.0, 1.0, 1.0)
    lengths = [DraftLength(2 * i + 2, 1, 0.5, s[0], second, s[1:]) for i, s in enumerate(speedups)]
    best = max(lengths, key=lambda length: length.speedup)
    return Speculative("tones", 1, 1, 0.5, best.speedup, second, second, best.num_assistant_tokens, lengths)


@pytest.mark.parametrize(
    ("speedups", "said"),
    [
        (
            [(0.7, 0.6, 0.8), (0.8, 0.7, 0.9)],
            "is 0.80x as fast as the teacher alone (num_assistant_tokens 4): don't use it",
        ),
        ([(1.1, 0.9, 1.3)], "(num_assistant_tokens 2), and not faster in every repetition: no clear gain"),
        ([(1.5, 1.4, 1.6), (1.2, 1.1, 1.3)], "1.50x as fast as the teacher alone (num_assistant_tokens 2)"),
    ],
)
def test_the_verdict(speedups, said, tmp_path):
    result = of_speedups(*speedups)
    assert speculative_verdict(result).endswith(said)
    saved = Results({}, {}, speculative=result)
    saved.save(tmp_path / "results.json")
    assert Results.load(tmp_path / "results.json").speculative == result


def test_the_saved_number_is_what_generate_proposes(teacher, same_encoder, processor, tmp_path, monkeypatch):
    same_encoder.save_pretrained(tmp_path)
    file = generation_config_file(str(tmp_path), "--save_num_assistant_tokens")
    before = json.loads(file.read_text())
    for speedups in ((0.9, 0.8, 1.0), (1.1, 0.9, 1.3)):  # slower, and no clear gain
        assert not save_draft_length(tmp_path, of_speedups(speedups))
    assert json.loads(file.read_text()) == before
    assert save_draft_length(tmp_path, of_speedups((1.1, 1.0, 1.2), (1.5, 1.4, 1.6), (1.3, 1.2, 1.4)))
    changed = {"num_assistant_tokens": 4, "num_assistant_tokens_schedule": "constant"}
    assert json.loads(file.read_text()) == before | changed

    student = WhisperForConditionalGeneration.from_pretrained(tmp_path)
    student.generation_config.assistant_confidence_threshold = 0.0
    lengths, propose = [], AssistedCandidateGenerator.get_candidates

    def spy(self, input_ids, **kwargs):
        candidates, logits = propose(self, input_ids, **kwargs)
        lengths.append(candidates.shape[1] - input_ids.shape[1])
        return candidates, logits

    monkeypatch.setattr(AssistedCandidateGenerator, "get_candidates", spy)
    teacher.generate(torch.randn(1, 8, 100), assistant_model=student, num_beams=1)
    assert lengths[0] == 4


def test_a_model_without_a_directory_is_refused(tmp_path):
    message = "--model you/student must be a local directory with a generation_config.json, to which --save_num"
    with pytest.raises(UserError, match=message):
        generation_config_file("you/student", "--save_num_assistant_tokens")


@pytest.mark.parametrize(
    "speedups, printed",
    [
        ([(1.5, 1.4, 1.6)], "num_assistant_tokens 2"),
        ([(0.9, 0.8, 1.0)], "not changed, as the teacher isn't faster with it in every repetition"),
    ],
)
def test_the_command_prints_what_it_saved_or_why_not(same_encoder, tmp_path, monkeypatch, capsys, speedups, printed):
    same_encoder.save_pretrained(tmp_path)
    monkeypatch.setattr(evaluate, "measure_speculative", lambda *_, **__: of_speedups(*speedups))
    monkeypatch.setattr(evaluate, "set_language", lambda *_: None)
    timed = SimpleNamespace(name="x", language=None, task="transcribe"), None
    values = dict.fromkeys(("student", "teacher"))
    args = SimpleNamespace(
        model=str(tmp_path), speed=False, speculative=True, num_assistant_tokens=[2], repetitions=1,
        save_num_assistant_tokens=True, generation_max_length=None,
    )  # fmt: skip
    evaluate.time_models(args, evaluate.Models(values, values, values), evaluate.Speech([], timed), Results({}, {}))
    assert capsys.readouterr().out == f"{tmp_path / 'generation_config.json'}: {printed}\n"


def test_no_room_for_proposals(teacher, other_encoder, processor, clips):
    with pytest.raises(UserError, match="proposed no tokens"):
        measure_speculative(teacher, other_encoder, processor, clips, "tones", max_length=1)
