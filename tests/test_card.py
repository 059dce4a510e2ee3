"""The model card: its golden copies, its metadata as the Hub's own parser reads them, what it must not say."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import jinja2
import pytest
import yaml
from conftest import ROOT, make_multilingual, make_trainer
from datasets import Dataset
from huggingface_hub import ModelCard
from make_cards import CARDS, GOLDEN, INPUTS, read_facts, read_results, render

from askd_hf.card import TEMPLATE, inherited_license, model_index, render_card
from askd_hf.card_text import objective
from askd_hf.data import decode_audio
from askd_hf.facts import (
    ARGUMENTS,
    FACTS_FILE,
    Ancestor,
    Facts,
    Origin,
    Student,
    cached_teacher,
    public_name,
    stated_license,
)
from askd_hf.student import init_student, load_processor, load_whisper, set_language
from askd_hf.teacher_cache import SETTINGS

MADE_UP = ("made-up-facts", "made-up-results", "you/made-up", True)


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_the_golden_card_is_what_is_rendered(path):
    assert str(render(*CARDS[path])).encode() == path.read_bytes(), "if that is as it should be: make cards"


@pytest.mark.parametrize("inputs", CARDS.values(), ids=[path.stem for path in CARDS])
def test_every_name_in_the_template_is_defined(inputs, monkeypatch):
    monkeypatch.setattr(jinja2, "Template", functools.partial(jinja2.Template, undefined=jinja2.StrictUndefined))
    render(*inputs)


def test_an_undefined_name_would_be_found(monkeypatch, tmp_path):
    monkeypatch.setattr(jinja2, "Template", functools.partial(jinja2.Template, undefined=jinja2.StrictUndefined))
    broken = tmp_path / "card.md"
    broken.write_text(TEMPLATE.read_text() + "{{ student.layers }}")
    monkeypatch.setattr("askd_hf.card.TEMPLATE", broken)
    with pytest.raises(jinja2.UndefinedError, match="layers"):
        render(*MADE_UP)


def test_the_hub_reads_the_metadata_back():
    card = ModelCard(str(render(*MADE_UP)))
    expected = model_index(read_results("made-up-results"))
    assert card.data.eval_results == expected
    assert [result.metric_value for result in expected] == [11.11, 4.44, 15.0, 7.0]
    first = expected[0]
    assert (first.dataset_type, first.dataset_config, first.dataset_split) == ("you/made-up-speech", "clean", "test")
    assert first.metric_name == "WER (basic normaliser, 1111 clips)"
    assert first.metric_args == dict(normalizer="basic", clips=1111, hours=2.22, interval=[10.5, 11.75])
    assert expected[2].dataset_type == "lectures"  # what isn't on the Hub is named without its path
    assert card.data.model_name == "made-up"
    metadata = card.data.to_dict()
    del metadata["model-index"]
    assert metadata == dict(
        base_model="openai/whisper-large-v3",
        base_model_relation="finetune",
        datasets=["you/made-up-speech"],
        language="fr",
        library_name="transformers",
        license="apache-2.0",
        metrics=["wer", "cer"],
        pipeline_tag="automatic-speech-recognition",
        tags=["whisper", "knowledge-distillation", "askd_hf", "hf-asr-leaderboard"],
    )


def test_without_evaluation_there_are_no_results():
    card = render("made-up-facts", None, "you/made-up", False)
    metadata = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", str(card), re.DOTALL)[1])
    assert not {"model-index", "metrics", "model_name", "eval_results"} & metadata.keys()
    assert "Evaluation" not in card.text and "WER" not in card.text and "run.png" not in card.text
    assert "haven't been measured" in card.text
    full = render(*MADE_UP)
    assert "## Evaluation" in full.text and "WER" in full.text and "run.png" in full.text


@pytest.mark.parametrize(
    ("changes", "gone"),
    [
        (dict(speed=None), ["audio s / s", "interleaved"]),
        (dict(speculative=None), ["As the assistant of its teacher, on"]),
        (dict(sets=[]), ["WER", "Corpus-level", "bootstrap", "Words that nobody said", "nobody speaks"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_was_not_measured_is_left_out(changes, gone):
    facts, results = read_facts("made-up-facts"), read_results("made-up-results")
    whole = str(render_card(facts, results, "you/made-up"))
    part = str(render_card(facts, dataclasses.replace(results, **changes), "you/made-up"))
    for text in gone:
        assert text in whole and text not in part
    assert "None" not in whole + part


def test_nothing_of_this_machine_is_in_the_cards():
    for path in CARDS:
        text = path.read_text(encoding="utf-8")
        assert "somewhere" not in text and not re.search(r"(?<![\w./:(])/(home|work|tmp|root|usr)/", text)


def test_the_figures_in_the_text_are_those_of_the_results():
    text = render(*MADE_UP).text
    for expected in (
        "| made-up-fr | 1,111 | 2.22 | basic | student | 11.11 [10.50, 11.75] | 4.44 [4.10, 4.90] | 111 / 22 / 33 |",
        "| made-up-fr | 1,111 | 2.22 | basic | teacher | 10.00 [9.50, 10.50] | 4.00 | 100 / 20 / 30 |",
        "WER of the student less that of the teacher: +1.11 points [+0.40, +1.80]",
        "the student's is lower: 0.5 %",
        "12 of 50 clips of made-up-noise got some (teacher: 30)",
        "3.21 % of its word 5-grams",
        "WER from 5.5 to 22.2 % over 2 of them",
        "clips not scored: 3 (empty reference)",
        "| student | 1 | 12.00 | 10.00 | 2.00 | 0.300 | 33.3 | 3,210 | 4.56 |",
        "40 of 40 have exactly the teacher's tokens",
    ):
        assert expected in text


def test_the_examples_of_the_card_run(tmp_path):
    source = ROOT / "examples" / "demo" / "teacher"  # of half precision, as OpenAI's are; the student is not
    student, processor = init_student(load_whisper(str(source)), 2), load_processor(str(source))
    student.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    facts = read_facts("made-up-facts")
    facts.origin.teacher.name = str(source)
    facts.student = dataclasses.replace(facts.student, timestamps=False)  # it has no tokens for them
    text = render_card(facts, None, str(tmp_path)).text
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(examples) == 2
    clip = decode_audio({"path": str(ROOT / "examples/demo/data/known/audio/george-000.ogg"), "bytes": None})
    for example in examples:
        example = example.replace('"speech.flac"', "dict(clip)").replace("transcribe(dict", "heard = transcribe(dict")
        names = {"clip": {"raw": clip, "sampling_rate": 16000}}
        exec(example, names)
    assert names["heard"] == "eight nine five three"  # what the teacher hears, though its assistant wasn't trained


# ---- the objective ----

KD = dict(teacher_phase=1.0, teacher_weight=0.5, teacher_weight_end=0.5, self_weight=0.0)
PS_KD = dict(teacher_phase=0.0, teacher_weight=0.0, teacher_weight_end=0.0, self_weight=0.8, temperature=1.0)


@pytest.mark.parametrize(
    ("changes", "formula"),
    [
        ({}, "(1 - a - b)·CEᵢ + a·2²·KL(teacherᵢ ‖ studentᵢ) + b·2²·KL(selfᵢ ‖ studentᵢ)"),
        (dict(trust_label=True, **KD), "(1 - a·gᵢ)·CEᵢ + a·gᵢ·2²·KL(teacherᵢ ‖ studentᵢ)"),
        (PS_KD, "(1 - b)·CEᵢ + b·KL(selfᵢ ‖ studentᵢ)"),
        (dict(divergence="reverse_kl", **KD), "(1 - a)·CEᵢ + a·2²·KL(studentᵢ ‖ teacherᵢ)"),
        (
            dict(divergence="skewed_kl", divergence_mix=0.1, **KD),
            "(1 - a)·CEᵢ + a·2²·KL(teacherᵢ ‖ 0.1·teacherᵢ + (1 - 0.1)·studentᵢ)",
        ),
        ({**PS_KD, "self_weight": 0.0}, "CEᵢ"),
    ],
    ids=["askd", "kd", "ps-kd", "reverse", "skewed", "ce"],
)
def test_the_formula_has_the_terms_of_the_run(changes, formula):
    askd = dict(read_facts("made-up-facts").arguments, divergence="forward_kl", trust_label=False)
    assert objective(askd | changes) == f"L = Σᵢ [ {formula} ] / N"


# ---- licences ----


def test_the_licence_is_the_teachers_where_it_is_stated(tmp_path):
    (tmp_path / "README.md").write_text(
        "---\nlicense: other\nlicense_name: made-up\nlicense_link: LICENSE\ntags: [x]\n---\n# x\n"
    )
    stated = stated_license(str(tmp_path))
    assert stated == dict(license="other", license_name="made-up", license_link="LICENSE")
    facts = read_facts("made-up-facts")
    facts.origin.teacher.license = stated
    data = render_card(facts, None, "you/x").data.to_dict()
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "made-up", "LICENSE")
    facts.origin.teacher.license = {}
    assert "license" not in render_card(facts, None, "you/x").data.to_dict()
    assert stated_license(str(tmp_path / "none")) == {} and stated_license("somebody/unreachable") == {}


def test_two_licences_that_differ_are_left_out():
    mit, apache = ({"license": name} for name in ("mit", "apache-2.0"))
    teacher, student = Ancestor("a/t", True, mit), Ancestor("a/s", True, apache)
    assert inherited_license(Origin(teacher=teacher, student=student)) == {}
    assert inherited_license(Origin(teacher=teacher, student=Ancestor("a/s", True)))["license"] == "mit"


# ---- facts ----


def test_the_facts_are_those_of_the_run(tmp_path, teacher, student, processor):
    token = "hf_aSecretThatMustNotBeThere"
    trainer = make_trainer(tmp_path / "run", teacher, student, processor=processor, max_steps=10, hub_token=token)
    trainer.train()
    trainer.save_model()
    text = (tmp_path / "run" / FACTS_FILE).read_text()
    assert token not in text and str(tmp_path) not in text
    facts = Facts.load(tmp_path / "run")
    assert (facts.step, facts.total_steps, facts.clips, facts.batch_size) == (10, 10, 16, 4)
    assert facts.student.parameters == student.num_parameters()
    assert (facts.student.encoder_layers, facts.student.decoder_layers, facts.student.window) == (2, 2, 1.0)
    assert facts.student.dtype == "float32" and not facts.student.timestamps
    assert facts.origin.language == "en"
    last = [row for row in trainer.state.log_history if "teacher_weight" in row][-1]
    assert facts.weights["self"] == last["self_weight"] > 0
    assert facts.phases[0]["teacher_weight"][0] == 0.8 and facts.phases[0]["last_step"] == 5
    assert facts.phases[1]["self_weight"][1] == last["self_weight"]
    assert facts.arguments.keys() == set(ARGUMENTS)
    assert facts.arguments["learning_rate"] == 1e-2
    assert json.loads(text)["arguments"]["preset"] == "askd"


def test_what_the_files_say_is_read_from_them(tmp_path):
    model, processor = make_multilingual()
    set_language(model, processor, "english", "transcribe")
    model.save_pretrained(tmp_path)
    found = Student.of(tmp_path)
    assert found.multilingual and not found.timestamps and not found.word_timestamps
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    generation["no_timestamps_token_id"] = model.config.vocab_size - 5  # so that four timestamp tokens follow
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert Student.of(tmp_path).timestamps and Student.of(tmp_path).word_timestamps
    del generation["alignment_heads"]
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert Student.of(tmp_path).timestamps and not Student.of(tmp_path).word_timestamps


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("openai/whisper-small", ("openai/whisper-small", True)),
        ("/home/somebody/secret/teacher", ("teacher", False)),
        ("~/models/teacher/", ("teacher", False)),
        (str(Path(__file__).parent), ("tests", False)),
        (None, (None, False)),
    ],
)
def test_only_hub_ids_are_named_whole(name, public):
    assert public_name(name) == public


def test_models_tell_where_they_come_from(teacher):
    teacher.config._name_or_path = teacher.name_or_path = "somebody/teacher"
    student = init_student(teacher, 2)
    made = Origin.of_models(teacher, student)
    assert made.teacher.name == "somebody/teacher" and made.teacher.decoder_layers == 4 and made.student is None
    student.name_or_path = "somebody/student"
    assert Origin.of_models(teacher, student).student.name == "somebody/student"
    assert Origin.of_models(None, student).teacher is None


def test_who_labelled_the_training_set_is_named_but_no_base_model():
    labelled = Dataset.from_dict({SETTINGS: [json.dumps({"teacher": "openai/whisper-large-v3"})]})
    facts = read_facts("made-up-facts")
    facts.origin.teacher, facts.origin.student = cached_teacher(labelled), Ancestor("you/start", True)
    facts.origin.copied_decoder_layers = None
    card = render_card(facts, None, "you/x")
    assert (
        "from [you/start](https://huggingface.co/you/start), with `openai/whisper-large-v3` as its teacher."
        in card.text
    )
    assert card.data.base_model == "you/start"
    facts.origin.student.on_hub = False
    assert not {"base_model", "base_model_relation"} & render_card(facts, None, "you/x").data.to_dict().keys()


def test_all_inputs_are_used():
    assert {path.name for path in INPUTS.iterdir()} == {
        "demo-facts.json", "demo-results.json", "made-up-facts.json", "made-up-results.json", "made-up.md"
    }  # fmt: skip
    assert {path.name for path in GOLDEN.iterdir()} == {
        "demo-teacher.md", "demo-student.md", "demo-student-not-evaluated.md"
    }  # fmt: skip
