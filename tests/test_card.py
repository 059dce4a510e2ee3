"""The model card: golden copies, metadata as parsed by huggingface_hub, and claims that must not be made."""

import dataclasses
import functools
import json
import re

import jinja2
import numpy as np
import pytest
import yaml
from datasets import Dataset
from huggingface_hub import ModelCard
from make_cards import CARDS, read_results, read_summary, render
from scripts import ROOT

from askd_hf.arguments import SpeechSource
from askd_hf.data import decode_audio
from askd_hf.data.soft_labels import SETTINGS_COLUMN
from askd_hf.evaluation.results import Results
from askd_hf.hub.card import TEMPLATE, inherited_license, model_index, render_card
from askd_hf.hub.card_sections import results_line
from askd_hf.hub.card_training import hyperparameter_table, objective
from askd_hf.hub.provenance import BaseModelInfo, Provenance, TrainingData, cached_teacher
from askd_hf.models.loading import load_processor, load_whisper
from askd_hf.models.student import init_student
from askd_hf.objective import DIVERGENCES

MADE_UP = ("made-up-summary", "made-up-results", "you/made-up", True)


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_the_golden_card_is_what_is_rendered(path):
    assert str(render(*CARDS[path])).encode() == path.read_bytes(), "if the change is intended: make cards"


@pytest.mark.parametrize("inputs", CARDS.values(), ids=[path.stem for path in CARDS])
def test_every_name_in_the_template_is_defined(inputs, monkeypatch):
    monkeypatch.setattr(jinja2, "Template", functools.partial(jinja2.Template, undefined=jinja2.StrictUndefined))
    render(*inputs)


def test_an_undefined_name_would_be_found(monkeypatch, tmp_path):
    monkeypatch.setattr(jinja2, "Template", functools.partial(jinja2.Template, undefined=jinja2.StrictUndefined))
    broken = tmp_path / "card.md"
    broken.write_text(TEMPLATE.read_text() + "{{ student.layers }}")
    monkeypatch.setattr("askd_hf.hub.card.TEMPLATE", broken)
    with pytest.raises(jinja2.UndefinedError, match="layers"):
        render(*MADE_UP)


def test_the_hub_reads_the_metadata_back():
    card = ModelCard(str(render(*MADE_UP)))
    expected = model_index(read_results("made-up-results"))
    assert card.data.eval_results == expected
    # local datasets are omitted: the metadata can only name datasets of the Hub
    assert [result.metric_value for result in expected] == [11.11, 4.44]
    first = expected[0]
    assert (first.dataset_type, first.dataset_config, first.dataset_split) == ("you/made-up-speech", "clean", "test")
    assert first.metric_name == "WER (basic normalizer, 1111 clips)"
    assert first.metric_args == dict(normalizer="basic", clips=1111, hours=2.22, interval=[10.5, 11.75])
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
    card = render("made-up-summary", None, "you/made-up", False)
    metadata = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", str(card), re.DOTALL)[1])
    assert not {"model-index", "metrics", "model_name", "eval_results"} & metadata.keys()
    assert "Evaluation" not in card.text and "WER" not in card.text and "run.png" not in card.text
    assert "Error rates have not been measured." in card.text
    full = render(*MADE_UP)
    assert "## Evaluation" in full.text and "WER" in full.text and "run.png" in full.text


@pytest.mark.parametrize(
    ("changes", "gone"),
    [
        (dict(speed=None), ["RTFx", "interleaved"]),
        (dict(speculative=None), ["Speculative decoding is", "With the student as assistant"]),
        (dict(sets=[]), ["WER, %", "Word error rate", "bootstrap", "Insertion rate on", "Hallucinations on"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_was_not_measured_is_left_out(changes, gone):
    summary, results = read_summary("made-up-summary"), read_results("made-up-results")
    whole = str(render_card(summary, results, "you/made-up"))
    part = str(render_card(summary, dataclasses.replace(results, **changes), "you/made-up"))
    for text in gone:
        assert text in whole and text not in part
    assert "None" not in whole + part


def test_an_assistant_that_is_slower_is_not_offered():
    summary, results = read_summary("made-up-summary"), read_results("made-up-results")
    slower = dataclasses.replace(
        results, speculative=dataclasses.replace(results.speculative, speedup=0.9, draft_lengths=[])
    )
    texts = [str(render_card(summary, each, "you/made-up")) for each in (results, slower)]
    assert ["assistant_model" in text for text in texts] == [True, False]
    assert ["is 0.90x as fast as the teacher alone: don't use it" in text for text in texts] == [False, True]


@pytest.mark.parametrize(
    ("changes", "trained"),
    [
        (dict(self_weight=0.3), ""),
        (dict(self_weight=0.0), "with the preset `askd`, without a self-teacher"),
        (dict(preset="ps-kd", teacher_phase_ratio=0.0), "with the preset `ps-kd`, without a teacher"),
        (
            dict(preset="ce", self_weight=0.0, teacher_phase_ratio=0.0),
            "with the preset `ce`, without a teacher, without a self-teacher",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_the_card_says_which_parts_of_the_method_the_student_had(changes, trained):
    summary = read_summary("made-up-summary")
    summary = dataclasses.replace(summary, arguments=summary.arguments | changes)
    sentence = f"This student was trained {trained}. " if trained else ""
    text = f"ASKD-Whisper combines a decaying teacher weight with self-distillation. {sentence}Schedule, self-teacher"
    assert text in render_card(summary, None, "you/made-up").text


def test_nothing_of_this_machine_is_in_the_cards():
    for path in CARDS:
        text = path.read_text(encoding="utf-8")
        assert "somewhere" not in text and not re.search(r"(?<![\w./:(])/(home|work|tmp|root|usr)/", text)


def test_the_figures_in_the_text_are_those_of_the_results():
    text = render(*MADE_UP).text
    for expected in (
        "| made-up-fr | student | 11.11 [10.50, 11.75] | 4.44 [4.10, 4.90] | 1,111 | 2.22 | 3,333 | basic |",
        "| made-up-fr | teacher | 10.00 [9.50, 10.50] | 4.00 | 1,111 | 2.22 | 3,333 | basic |",
        "| made-up-fr | student | 111 | 22 | 33 |",
        "| made-up-fr | student - teacher | +1.11 [+0.40, +1.80] | +11.1 % | 0.5 % |",
        "Hallucinations on made-up-noise: text for 12 of 50 clips without speech (teacher: 30).",
        "Repeated 5-grams on made-up-lectures, sequential: 3.21 %.",
        "WER by speaker on made-up-fr: 5.5 to 22.2 % (2 speakers).",
        "made-up-fr: excluded clips: 3 (empty reference)",
        "| student | 1 | 4.56x | 33.3 | 0.300 | 12.00 | 10.00 | 2.00 | 3,210 |",
        "Speedup over the teacher: 4.56x at batch size 1.",
        "Speculative decoding is 1.23x as fast as the teacher alone. With the student as assistant",
        "greedy, batch size 1: accepted tokens 78.9 %, identical tokens for 40 of 40 clips.",
    ):
        assert expected in text


@pytest.mark.parametrize(("probability", "step", "timed"), [(0.5, 1000, True), (0.0, 1000, False), (0.0, 0, True)])
def test_only_a_student_that_knows_timestamps_is_offered_for_them(probability, step, timed):
    """Trained without, it repeats itself in the sequential algorithm."""
    summary = dataclasses.replace(read_summary("made-up-summary"), timestamp_probability=probability, step=step)
    text = render_card(summary, None, "you/made-up").text
    assert ('transcribe("lecture.flac", return_timestamps=True' in text) == timed
    assert ("Trained without timestamps" in text) != timed and "chunk_length_s=" in text


def test_the_examples_of_the_card_run(tmp_path):
    source = ROOT / "tests" / "digits_teacher"  # in half precision; the student is in float32
    student, processor = init_student(load_whisper(str(source)), 2), load_processor(str(source))
    student.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    summary = read_summary("made-up-summary")
    summary.provenance.teacher.name, summary.provenance.teacher.window = str(source), 3.0
    # its vocabulary has no timestamp tokens
    summary.student = dataclasses.replace(summary.student, timestamps=False, window=3.0)
    text = render_card(summary, None, str(tmp_path)).text
    plain, long, assisted = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert "return_timestamps" not in text and "Without `chunk_length_s`, longer audio is an error" in text
    clip = decode_audio({"path": str(ROOT / "examples/demo/data/studio/audio/george-000.ogg"), "bytes": None})
    names = {"clip": {"raw": clip, "sampling_rate": 16000}, "twice": {"raw": np.tile(clip, 2), "sampling_rate": 16000}}
    for example in (plain, long, assisted):
        example = example.replace('"speech.flac"', "dict(clip)").replace('"lecture.flac"', "dict(twice)")
        exec(example.replace("transcribe(dict", "text = transcribe(dict"), names)
        if example == plain:  # as the card says of a clip beyond the window
            with pytest.raises(ValueError, match=r"30 seconds"):
                names["transcribe"](dict(names["twice"]))
    assert names["text"] == " eight four two"  # the teacher's text, although the assistant is untrained


# ---- the objective ----

KD = dict(
    teacher_phase_ratio=1.0, teacher_weight=0.5, teacher_weight_end=0.5, teacher_schedule="constant", self_weight=0.0
)
PS_KD = dict(teacher_phase_ratio=0.0, teacher_weight=0.0, teacher_weight_end=0.0, self_weight=0.8, temperature=1.0)


@pytest.mark.parametrize(
    ("changes", "formula"),
    [
        ({}, "(1 - a - b)·CEᵢ + a·2²·KL(teacherᵢ ‖ studentᵢ) + b·2²·KL(selfᵢ ‖ studentᵢ)"),
        (dict(weight_teacher_by_label_prob=True, **KD), "(1 - a·gᵢ)·CEᵢ + a·gᵢ·2²·KL(teacherᵢ ‖ studentᵢ)"),
        (PS_KD, "(1 - b)·CEᵢ + b·KL(selfᵢ ‖ studentᵢ)"),
        (dict(divergence="reverse_kl", **KD), "(1 - a)·CEᵢ + a·2²·KL(studentᵢ ‖ teacherᵢ)"),
        (
            dict(divergence="skewed_kl", divergence_beta=0.1, **KD),
            "(1 - a)·CEᵢ + a·2²·KL(teacherᵢ ‖ 0.1·teacherᵢ + (1 - 0.1)·studentᵢ)",
        ),
        ({**PS_KD, "self_weight": 0.0}, "CEᵢ"),
    ],
    ids=["askd", "kd", "ps-kd", "reverse", "skewed", "ce"],
)
def test_the_formula_has_the_terms_of_the_run(changes, formula):
    askd = dict(read_summary("made-up-summary").arguments, divergence="forward_kl", weight_teacher_by_label_prob=False)
    assert objective(askd | changes) == f"L = Σᵢ [ {formula} ] / N"


@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_divergence_has_a_formula_of_teacher_and_student(name):
    arguments = read_summary("made-up-summary").arguments | KD | dict(divergence=name, divergence_beta=0.25)
    formula = objective(arguments)
    assert "teacherᵢ" in formula and "studentᵢ" in formula and "{" not in formula
    assert ("0.25" in formula) == DIVERGENCES[name].uses_mix


def test_a_divergence_of_the_runs_own_script_has_its_name():
    arguments = read_summary("made-up-summary").arguments | KD | dict(divergence="my_tv")
    assert "2²·my_tv(teacherᵢ, studentᵢ)" in objective(arguments)
    summary = dataclasses.replace(read_summary("made-up-summary"), arguments=arguments)
    assert "`divergence_beta`" not in hyperparameter_table(summary)


# ---- licenses ----


def test_the_license_is_that_of_what_training_started_from():
    mit, apache = ({"license": name} for name in ("mit", "apache-2.0"))
    teacher = BaseModelInfo("a/t", True, mit)
    assert inherited_license(Provenance(teacher=teacher, from_teacher=True)) == mit
    assert inherited_license(Provenance(teacher=teacher, student=BaseModelInfo("a/s", True, apache))) == apache
    assert inherited_license(Provenance(teacher=teacher, student=BaseModelInfo("a/s", True))) == {}
    assert inherited_license(Provenance(teacher=teacher)) == {}  # the student doesn't have its weights
    whole = dict(license="other", license_name="made-up", license_link="https://somewhere/LICENSE")
    summary = read_summary("made-up-summary")
    summary.provenance.teacher.license = whole
    data = render_card(summary, None, "you/x").data.to_dict()
    assert {key: data[key] for key in whole} == whole
    data = render_card(summary, None, "you/x", license="mit").data.to_dict()
    assert data["license"] == "mit" and not {"license_name", "license_link"} & data.keys()
    summary.provenance.teacher.license = {}
    assert "license" not in render_card(summary, None, "you/x").data.to_dict()


# ---- where it comes from, and what it was ----

CE = dict(teacher_phase_ratio=0.0, teacher_weight=0.0, teacher_weight_end=0.0, self_weight=0.0)


def card_of(arguments: dict | None = None, summary: dict | None = None, **origin) -> ModelCard:
    """Return the card of the made-up run with changes."""
    found = read_summary("made-up-summary")
    found = dataclasses.replace(found, **(summary or {}), arguments=found.arguments | (arguments or {}))
    found.provenance = dataclasses.replace(found.provenance, **origin)
    return render_card(found, None, "you/x")


def test_no_teacher_is_claimed_that_was_not_used():
    started = (
        "Training started from the encoder and decoder layers 0 and 31 (counted from 0) of [openai/whisper-large-v3]"
    )
    assert f"{started}(https://huggingface.co/openai/whisper-large-v3), its teacher (32" in card_of().text
    for arguments in (CE, PS_KD):
        card = card_of(arguments)
        assert f"{started}(https://huggingface.co/openai/whisper-large-v3) (32 encoder" in card.text
        assert "its teacher" not in card.text and "assistant" not in card.text
        assert card.data.base_model == "openai/whisper-large-v3"
        distilled = arguments is PS_KD
        assert ("distilled with" in card.text) == ("knowledge-distillation" in card.data.tags) == distilled
        assert ("trained with" in card.text) == (not distilled)
    card = card_of(PS_KD, from_teacher=False, student=BaseModelInfo("you/start", True))
    assert "Training started from [you/start](https://huggingface.co/you/start).\n" in card.text
    assert "whisper-large" not in card.text


def test_no_descent_is_claimed_of_a_student_from_scratch():
    card = card_of(from_teacher=False, teachers_encoder=False)
    expected = (
        "It was trained with [openai/whisper-large-v3](https://huggingface.co/openai/whisper-large-v3) as its teacher"
    )
    assert expected in card.text and "started from" not in card.text
    assert not {"base_model", "base_model_relation", "license"} & card.data.to_dict().keys()


@pytest.mark.parametrize(
    ("freeze_encoder", "teachers_encoder", "loaded_as"),
    [(True, True, "CausalLM"), (True, False, "SpeechSeq2Seq"), (False, True, "SpeechSeq2Seq")],
)
def test_the_assistant_goes_without_an_encoder_only_if_it_is_the_teachers(freeze_encoder, teachers_encoder, loaded_as):
    text = card_of(dict(freeze_encoder=freeze_encoder), teachers_encoder=teachers_encoder).text
    assert f"student = AutoModelFor{loaded_as}.from_pretrained" in text


@pytest.mark.parametrize(
    ("teachers", "students", "offered"),
    [((51866, 128), (51866, 128), True), ((51866, 128), (51865, 128), False), ((51866, 128), (51866, 80), False)],
)
def test_no_assistant_is_offered_that_its_teacher_cannot_use(teachers, students, offered):
    summary = read_summary("made-up-summary")
    teacher = dataclasses.replace(summary.provenance.teacher, vocabulary=teachers[0], mel_bins=teachers[1])
    student = dataclasses.replace(summary.student, vocabulary=students[0], mel_bins=students[1])
    assert ("assistant_model" in card_of(summary=dict(student=student), teacher=teacher).text) == offered
    shorter = dataclasses.replace(student, window=10.0)  # the teacher's features don't fit
    assert "assistant_model" not in card_of(summary=dict(student=shorter), teacher=teacher).text


def test_a_run_that_was_ended_early_is_not_unfinished():
    early = dict(step=600, total_steps=1000, ended_early=True)
    text = card_of(dict(metric_for_best_model="wer"), summary=early).text
    assert "Training was stopped early, at step 600 of 1,000, because the WER stopped improving." in text
    assert "unfinished" not in text
    text = card_of(dict(metric_for_best_model="eval_test_wer"), summary=early).text
    assert "because the `test_wer` stopped improving." in text
    assert "Checkpoint of an unfinished training" in card_of(summary=early | dict(ended_early=False)).text


def test_clips_without_speech_are_told_apart():
    kd = dict(KD, weight_teacher_by_label_prob=False)
    text = card_of(kd, summary=dict(no_speech_clips=1234)).text
    assert "12,345 clips, 68 hours, 1,234 clips without speech, language `fr`" in text
    assert "(1 - a·gᵢ)·CEᵢ + a·gᵢ·" in text and "- gᵢ: 0 in clips without speech, otherwise 1\n" in text
    assert "label weight (at least)" in text
    assert "68 hours, clips without speech" in card_of(kd, summary=dict(no_speech_clips=None)).text
    trusted = card_of(dict(kd, weight_teacher_by_label_prob=True), summary=dict(no_speech_clips=1)).text
    assert "otherwise the teacher's probability of the label" in trusted
    text = card_of(kd).text
    assert "without speech" not in text.split("## Training")[1] and "gᵢ" not in text


def test_a_translator_says_so():
    text = card_of(tasks=["translate"]).text
    assert "A Whisper speech translator from `fr` into English (32 encoder" in text and "recognizer" not in text
    assert "--dataset my_speech --language fr --task translate" in text
    assert '.transcribe("speech.flac", language="fr", task="translate")' in text
    text = card_of().text
    assert "A Whisper speech recognizer (32 encoder" in text and "translator" not in text and "--task" not in text


def test_a_student_that_was_not_trained_has_no_training_section():
    card = card_of(summary=dict(step=0, total_steps=0, phases=[], epochs=0.0))
    assert (
        "## Training" not in card.text and "updates of" not in card.text and "The model was not trained" in card.text
    )
    assert "initialized with `askd_hf`. Its weights are those of the encoder and decoder layers" in card.text
    assert "knowledge-distillation" not in card.data.tags and "## Citation" in card.text


def test_the_step_of_the_best_weights_is_named():
    text = card_of(dict(metric_for_best_model="wer"), summary=dict(best_step=200)).text
    assert "The published weights are those of step 200, the best by\n`wer`." in text
    assert "The published weights" not in card_of().text


def test_of_cached_labels_the_bound_is_named():
    text = card_of(summary=dict(top_k=8)).text
    assert "teacherᵢ: the 8 most probable tokens, and all others as one" in text and "lower bound" in text
    assert "lower bound" not in card_of().text and "lower bound" not in card_of(CE, summary=dict(top_k=8)).text


def test_faster_whisper_is_shown_for_its_own_window_alone():
    student = read_summary("made-up-summary").student
    assert "faster_whisper" in card_of().text
    assert "faster_whisper" not in card_of(summary=dict(student=dataclasses.replace(student, window=20.0))).text


def test_who_labelled_the_training_set_is_named_but_no_base_model():
    for place in ("proj/secret-v3", "/home/somebody/secret-v3", "C:\\somebody\\secret-v3"):
        labelled = Dataset.from_dict({SETTINGS_COLUMN: [json.dumps({"teacher": place})]})
        origin = dict(teacher=cached_teacher(labelled), student=BaseModelInfo("you/start", True), from_teacher=False)
        card = card_of(**origin)
        assert "from [you/start](https://huggingface.co/you/start), with `secret-v3` as its teacher." in card.text
        assert "proj" not in card.text and "somebody" not in card.text
        assert card.data.base_model == "you/start"
    card = card_of(**origin | dict(student=BaseModelInfo("start", False)))
    assert not {"base_model", "base_model_relation"} & card.data.to_dict().keys()


# ---- results ----


def with_sets(*changes: dict) -> Results:
    """Return results on copies of the first made-up set, each with changes."""
    results = read_results("made-up-results")
    return dataclasses.replace(results, sets=[dataclasses.replace(results.sets[0], **each) for each in changes])


def test_every_set_of_the_hub_stays_one_in_the_metadata():
    sets = [dict(name=f"made-up-{method}", method=method) for method in ("short_form", "sequential", "chunked")]
    results = with_sets(*sets)
    card = ModelCard(str(render_card(read_summary("made-up-summary"), results, "you/x")))
    found = [(result.dataset_name, result.metric_type) for result in card.data.eval_results]
    assert found == [(each["name"], metric) for each in sets for metric in ("wer", "cer")]
    assert card.data.eval_results == model_index(results)


@pytest.mark.parametrize("dataset", ["/a/speech", ".", "..", "speech"])
def test_results_on_speech_of_ones_own_are_in_the_text_alone(dataset):
    results = with_sets(dict(name="mine", dataset=dataset, config=None, on_hub=False))
    card = ModelCard(str(render_card(read_summary("made-up-summary"), results, "you/x")))
    assert card.data.eval_results is None and "hf-asr-leaderboard" not in card.data.tags
    assert "| mine | student |" in card.text
    on_top = card.text.split("## ")[0]
    assert "Word error rate: 11.11 % (teacher: 10.00 %) on mine." in on_top


def test_the_leaderboards_tag_needs_results():
    assert "hf-asr-leaderboard" in render(*MADE_UP).data.tags
    assert "hf-asr-leaderboard" not in render("made-up-summary", None, "you/x", False).data.tags


@pytest.mark.parametrize(("value", "written"), [(0.05, "0.05 (5 % of the steps)"), (500.0, "500"), (0.0, "0")])
def test_a_warm_up_below_one_is_a_fraction(value, written):
    assert f"| `warmup_steps` | {written} |" in card_of(dict(warmup_steps=value)).text


def test_the_license_of_the_speech_is_named(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# Speech\n")
    speech = TrainingData.of(SpeechSource(str(tmp_path), None, "train"))
    assert speech.license == "cc-by-4.0" and not speech.on_hub
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: custom\n---\n")
    assert TrainingData.of(SpeechSource(str(tmp_path), None, "train")).license == "custom"
    labels = (
        "---\nlicense: cc-by-4.0\npseudo_labels: {dataset: calls, on_hub: false, config: null, split: train}\n---\n"
    )
    (tmp_path / "README.md").write_text(labels)
    transcribed = TrainingData.of(SpeechSource(str(tmp_path), None, "train"))
    assert (transcribed.dataset, transcribed.license) == ("calls", "cc-by-4.0")
    (tmp_path / "README.md").unlink()
    assert TrainingData.of(SpeechSource(str(tmp_path), None, "train")).license is None
    assert (
        "`mine` (split `train`, license `cc-by-4.0`)"
        in card_of(speech=[dataclasses.replace(speech, dataset="mine")]).text
    )


def test_a_translation_is_no_recognition():
    results = with_sets(dict(name="plain"), dict(name="into-english", task="translate"))
    card = render_card(read_summary("made-up-summary"), results, "you/x")
    assert {result.dataset_name for result in card.data.eval_results} == {"plain"}
    assert "| into-english, translate | student |" in card.text and "| plain | student |" in card.text


def test_the_texts_as_they_are_have_no_normalizer():
    summary = read_summary("made-up-summary")
    plain = with_sets(dict(normalizer="none"))
    card = render_card(summary, plain, "you/x")
    assert "Normalizers: none: no normalization." in card.text
    assert card.data.eval_results[0].metric_name == "WER (no normalizer, 1111 clips)"
    both = with_sets(dict(normalizer="none"), dict(name="b", normalizer="basic"))
    expected = "Normalizers: basic: Whisper's basic normalizer; none: no normalization."
    assert expected in render_card(summary, both, "you/x").text


def test_every_dataset_and_language_is_named():
    speech = [
        TrainingData("mozilla/voices", True, "fr", "train"),
        TrainingData("my_german", False, None, "train"),
        TrainingData("recordings", False, None, "train", transcribed_by="openai/whisper-large-v3"),
    ]
    card = card_of(speech=speech, languages=["fr", "de"], tasks=["transcribe", "translate"])
    assert (
        "- [mozilla/voices](https://huggingface.co/datasets/mozilla/voices) (configuration `fr`, split `train`, "
        "license unknown)\n- `my_german` (split `train`, license unknown)\n- `recordings` (split `train`, license "
        "unknown), transcribed by `openai/whisper-large-v3`\n"
    ) in card.text
    assert "languages `fr` and `de`, tasks `transcribe` and `translate`" in card.text
    assert "Trained on `fr` and `de` only" in card.text
    assert card.data.datasets == ["mozilla/voices"] and card.data.language == ["fr", "de"]
    unknown = card_of(speech=[], languages=[])
    assert unknown.data.datasets is None and unknown.data.language is None
    assert "Trained on unknown languages only" in unknown.text


def test_the_first_line_has_the_capped_rates_if_a_model_loops():
    """One loop can be 20 points of a WER."""
    results = read_results("accented-results")
    line = (
        "31.21 % (teacher: 58.92 %) on speechocean_split-test, 29.66 % (teacher: 38.25 %) with at most as many errors"
    )
    assert line in results_line(results)
    for scores in next(one for one in results.sets if one.name == "speechocean_split-test").scores.values():
        scores.loops = 0
    assert "38.25" not in results_line(results)


def test_the_first_line_has_the_tokens_if_they_differ_much():
    """The speedup depends on them."""
    results = read_results("accented-results")
    assert "tokens per clip" not in results_line(results)
    for row in results.speed.rows:
        row.tokens = 106 if row.role == "student" else 138  # of 16 clips
    assert results_line(results).endswith(
        "The student wrote 6.62 tokens per clip, the teacher 8.62, and each token takes time."
    )


def test_a_multilingual_model_with_few_tokens_is_not_offered_for_faster_whisper():
    summary = read_summary("made-up-summary")
    texts = []
    for vocabulary in (51_865, 6_000):
        student = dataclasses.replace(summary.student, multilingual=True, vocabulary=vocabulary, timestamps=True)
        student = dataclasses.replace(student, window=30.0)
        texts.append(render_card(dataclasses.replace(summary, student=student), None, "you/made-up").text)
    assert ["from faster_whisper import" in text for text in texts] == [True, False]
    assert ["with fewer than 51,865 tokens for an English-only one" in text for text in texts] == [False, True]


def test_no_speedup_over_a_teacher_that_was_not_measured():
    """With `--clip_context` and no teacher, speeds are relative to the student itself."""
    results = read_results("accented-results")
    results.speed.rows = [row for row in results.speed.rows if row.role != "teacher"]
    assert "Speedup over the teacher" not in results_line(results)
