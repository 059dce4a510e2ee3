"""The training summary: provenance, arguments, and no secrets."""

import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from models import make_multilingual, make_processor, make_whisper
from safetensors.torch import load_file
from training import Clips, collate, make_trainer, options

import askd_hf
from askd_hf.config import ASKDConfig
from askd_hf.data import SpeechStream
from askd_hf.data.soft_labels import KEY_COLUMN, SETTINGS_COLUMN, SOFT_LABEL_COLUMNS, SOFT_LABEL_FEATURES
from askd_hf.errors import UserError
from askd_hf.hub.provenance import BaseModelInfo, Provenance, public_name, stated_license
from askd_hf.hub.training_summary import ARGUMENTS, SUMMARY_FILE, ModelInfo, TrainingSummary, count_clips
from askd_hf.models.generation_config import set_language
from askd_hf.models.student import init_student
from askd_hf.trainer import ASKDTrainer


def test_the_facts_are_those_of_the_run(tmp_path, teacher, student, processor):
    token = "hf_aSecretThatMustNotBeThere"
    trainer = make_trainer(tmp_path / "run", teacher, student, processor=processor, max_steps=10, hub_token=token)
    trainer.train()
    trainer.save_model()
    text = (tmp_path / "run" / SUMMARY_FILE).read_text()
    assert token not in text and str(tmp_path) not in text
    summary = TrainingSummary.load(tmp_path / "run")
    assert (summary.step, summary.total_steps, summary.clips, summary.batch_size) == (10, 10, 16, 4)
    assert summary.student.parameters == student.num_parameters()
    assert (summary.student.encoder_layers, summary.student.decoder_layers, summary.student.window) == (2, 2, 1.0)
    assert summary.student.vocabulary == student.config.vocab_size
    assert summary.student.mel_bins == student.config.num_mel_bins
    assert summary.student.dtype == "float32" and not summary.student.timestamps
    assert summary.provenance.language == "en"
    last = [row for row in trainer.state.log_history if "teacher_weight" in row][-1]
    assert summary.weights["self"] == last["self_weight"] > 0
    assert summary.phases[0]["teacher_weight"][0] == 0.8 and summary.phases[0]["last_step"] == 5
    assert summary.phases[1]["self_weight"][1] == last["self_weight"]
    assert summary.arguments.keys() == set(ARGUMENTS)
    assert summary.arguments["learning_rate"] == 1e-2
    assert json.loads(text)["arguments"]["preset"] == "askd"


def test_what_the_files_say_is_read_from_them(tmp_path):
    model, processor = make_multilingual()
    set_language(model, processor, "english", "transcribe")
    model.save_pretrained(tmp_path)
    found = ModelInfo.of(tmp_path)
    assert found.multilingual and not found.timestamps and not found.word_timestamps
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    generation["no_timestamps_token_id"] = model.config.vocab_size - 5  # four timestamp tokens follow
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert ModelInfo.of(tmp_path).timestamps and ModelInfo.of(tmp_path).word_timestamps
    for heads in ([[4, 0]], [[1, 0], [0, 2]]):  # it has 4 layers of 2 heads
        (tmp_path / "generation_config.json").write_text(json.dumps(generation | {"alignment_heads": heads}))
        assert ModelInfo.of(tmp_path).timestamps and not ModelInfo.of(tmp_path).word_timestamps
    del generation["alignment_heads"]
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert ModelInfo.of(tmp_path).timestamps and not ModelInfo.of(tmp_path).word_timestamps


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
    made = Provenance.of_models(teacher, student)
    assert made.teacher.name == "somebody/teacher" and made.teacher.decoder_layers == 4 and made.student is None
    assert made.from_teacher and made.teachers_encoder and made.base is made.teacher
    student.name_or_path = "somebody/student"
    made = Provenance.of_models(teacher, student)
    assert made.base is made.student and made.student.name == "somebody/student" and not made.from_teacher
    assert Provenance.of_models(None, student).teacher is None
    scratch = make_whisper(make_processor(), seed=7)
    for name in ("somebody/teacher", ""):
        teacher.name_or_path = name
        made = Provenance.of_models(teacher, scratch)
        assert not made.from_teacher and not made.teachers_encoder and made.base is None


def test_what_is_not_on_the_hub_is_named_without_its_path(tmp_path, monkeypatch):
    (tmp_path / "speech").mkdir()
    monkeypatch.chdir(tmp_path / "speech")
    assert public_name(".") == ("speech", False)
    assert public_name("..") == (tmp_path.name, False)


def test_what_a_card_states_of_its_licence(tmp_path):
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: other\nlicense_name: made-up\nlicense_link: LICENSE\ntags: [x]\n---\n# x\n")
    stated = dict(license="other", license_name="made-up")
    assert stated_license(str(tmp_path)) == stated  # a relative link in a local directory is dropped
    card.write_text(card.read_text().replace("LICENSE", "https://somewhere/x"))
    assert stated_license(str(tmp_path)) == stated | dict(license_link="https://somewhere/x")
    card.write_text("---\nlicense: [mit\ntags: }\n---\n# x\n")
    assert stated_license(str(tmp_path)) == {}
    assert stated_license(str(tmp_path / "none")) == {} and stated_license("somebody/unreachable") == {}


class Stream(torch.utils.data.IterableDataset):
    """An iterable dataset of unknown length."""

    def __init__(self, config):
        self.clips = Clips(config)

    def __iter__(self):
        return iter(self.clips.rows)


def test_iterable_datasets_with_a_collator_of_ones_own_reach_the_self_phase(tmp_path, teacher, student):
    """accelerate dispatches their batches. Without a length a run has ten epochs for the snapshots."""
    for changes in (dict(self_weight=0.3), dict(preset="ps-kd")):
        trainer = ASKDTrainer(
            model=student,
            args=ASKDConfig(**options(tmp_path, max_steps=10, per_device_train_batch_size=1, **changes)),
            teacher_model=teacher,
            train_dataset=Stream(student.config),
            data_collator=collate,
        )
        trainer.train()
        assert [row["step"] for row in trainer.state.log_history if "self_loss" in row], changes


def test_a_stream_has_no_number_of_clips(tmp_path, teacher, student, processor):
    trainer = ASKDTrainer(
        model=student,
        args=ASKDConfig(**options(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)),
        teacher_model=teacher,
        train_dataset=Stream(student.config),
        data_collator=collate,
        processing_class=processor,
    )
    trainer.train()
    summary = TrainingSummary.load(tmp_path / "checkpoint-2")
    assert (summary.step, summary.clips, summary.hours) == (2, None, None)


def test_what_comes_more_than_once_in_an_epoch_is_counted_once():
    columns = dict(
        audio_key=["a", "b", "a", "silence", "a", "silence", "hum"],
        duration=[1800.0, 5400.0, 1800.0, 900.0, 1800.0, 900.0, 60.0],
        no_speech=[None, False, None, True, None, True, True],
    )
    mixed = Dataset.from_dict(columns)
    assert count_clips(mixed) == (2, 2.0, 2)
    assert count_clips(mixed.remove_columns("no_speech").select(range(3))) == (2, 2.0, 0)
    assert count_clips(Dataset.from_dict({"text": ["a", "a"]})) == (2, None, 0)
    rows = mixed.to_iterable_dataset()
    assert count_clips(SpeechStream([rows])) == (None, None, 0)
    assert count_clips(SpeechStream([rows], no_speech_dataset=rows, no_speech_probability=0.1)) == (None, None, None)


def test_a_run_that_was_ended_early_says_so(tmp_path, teacher, student, processor):
    changes = dict(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, save_total_limit=None)
    changes |= dict(load_best_model_at_end=True, metric_for_best_model="loss", early_stopping_patience=2)
    changes |= dict(predict_with_generate=False, preset="ce", max_steps=30)
    evaluation = Clips(student.config, seed=2)  # random labels: the loss increases after a few steps
    trainer = make_trainer(tmp_path, None, student, evaluation, processor=processor, **changes)
    trainer.train()
    trainer.save_model()
    summary = TrainingSummary.load(tmp_path)
    assert summary.ended_early and summary.step == trainer.state.global_step < summary.total_steps == 30
    assert not TrainingSummary.load(tmp_path / f"checkpoint-{summary.step - 1}").ended_early  # saved before the end
    trainer.args.early_stopping_patience = None
    trainer.save_model()
    assert not TrainingSummary.load(tmp_path).ended_early


def test_a_teacher_has_the_vocabulary_that_it_was_stored_with(tmp_path, teacher):
    teacher.save_pretrained(tmp_path)
    stored = teacher.config.vocab_size
    teacher.config.vocab_size = stored - 1  # as if resized to the student's vocabulary
    found = BaseModelInfo.of(str(tmp_path), teacher)
    assert (found.vocabulary, found.mel_bins) == (stored, teacher.config.num_mel_bins)
    assert BaseModelInfo.of("somebody/unreachable", teacher).vocabulary == stored - 1


def test_of_the_best_weights_the_step_is_known(tmp_path, teacher, student, processor):
    changes = dict(
        eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, load_best_model_at_end=True
    )
    # with greater_is_better the first loss is the best
    changes |= dict(metric_for_best_model="loss", greater_is_better=True, predict_with_generate=False, max_steps=6)
    trainer = make_trainer(tmp_path, teacher, student, Clips(student.config, seed=2), processor=processor, **changes)
    trainer.train()
    trainer.save_model()
    losses = {row["step"]: row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row}
    best = max(losses, key=losses.get)
    summary = TrainingSummary.load(tmp_path)
    assert best < 6 and (summary.step, summary.best_step) == (6, best)
    assert summary.arguments["metric_for_best_model"] == "loss"
    checkpoint, saved = (
        load_file(place / "model.safetensors") for place in (tmp_path / f"checkpoint-{best}", tmp_path)
    )
    assert all(torch.equal(checkpoint[name], saved[name]) for name in saved)
    assert TrainingSummary.load(tmp_path / "checkpoint-6").best_step is None


def test_of_cached_labels_their_number_is_known(tmp_path, teacher, student, processor):
    trainer = make_trainer(tmp_path, teacher, student, processor=processor, max_steps=2)
    trainer.train()
    trainer.save_model()
    assert TrainingSummary.load(tmp_path).top_k is None and TrainingSummary.load(tmp_path).provenance.teacher is None
    settings = json.dumps(dict(teacher="proj/teacher", top_k=8))
    columns = {
        name: ["x"] if name == KEY_COLUMN else [settings] if name == SETTINGS_COLUMN else [[]]
        for name in SOFT_LABEL_COLUMNS
    }
    trainer.train_dataset = Dataset.from_dict(columns, features=SOFT_LABEL_FEATURES)
    trainer.save_model()
    summary = TrainingSummary.load(tmp_path)
    assert summary.top_k == 8 and summary.provenance.teacher.name == "teacher"
    trainer.args.teacher_phase_ratio = 0.0
    trainer.save_model()
    assert TrainingSummary.load(tmp_path).top_k is None


def test_saving_without_training_keeps_what_is_known(tmp_path, teacher, student, processor):
    trainer = make_trainer(tmp_path, teacher, student, processor=processor, max_steps=2)
    trainer.train()
    trainer.save_state()
    trainer.save_model()
    before = {name: (tmp_path / name).read_bytes() for name in (SUMMARY_FILE, "trainer_state.json")}
    other = make_trainer(tmp_path, teacher, student, processor=processor)
    other.save_model()
    with pytest.raises(UserError, match="resume with"):  # with HF_HUB_OFFLINE
        other.push_to_hub()
    assert before == {name: (tmp_path / name).read_bytes() for name in before}
    other.save_model(str(tmp_path / "elsewhere"))
    assert TrainingSummary.load(tmp_path / "elsewhere").step == 0


def test_a_package_that_was_not_installed_has_its_version(tmp_path, teacher, student, processor, monkeypatch):
    def installed(name: str) -> str:
        if name == "askd-hf":
            raise PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr("askd_hf.hub.training_summary.version", installed)
    trainer = make_trainer(tmp_path, teacher, student, processor=processor)
    trainer.save_model()
    assert TrainingSummary.load(tmp_path).versions["askd-hf"] == askd_hf.__version__
