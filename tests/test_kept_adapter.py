"""`--keep_adapter`: the run's directory is an adapter repository, which serves wherever a student does."""

import copy
import json
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_hub import hub_of_this_process, serve_hub
from hub import HubVisit
from huggingface_hub import ModelCard
from models import by_generate, make_multilingual, make_processor, make_whisper, spoken
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from scripts import ROOT, run_here
from speech import write_speech
from training import Clips, collate, options
from transformers import AutoModelForSpeechSeq2Seq, WhisperForConditionalGeneration, pipeline

from askd_hf import ASKDConfig, ASKDTrainer, UserError, load_whisper
from askd_hf.commands.select_heads import has_alignment_heads
from askd_hf.evaluation import Results
from askd_hf.hub.provenance import BaseModelInfo
from askd_hf.hub.training_summary import TrainingSummary
from askd_hf.hub.upload import publish
from askd_hf.models.loading import load_processor
from askd_hf.models.lora import LoraArguments, is_adapter, merged, with_lora
from askd_hf.models.student import init_student

DISTILL = ROOT / "examples" / "distill.py"
WRITER, READER = "hf_tokenThatMayWrite", "hf_tokenThatMayRead"
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
WHOLE = {"config.json", "model.safetensors"}
BESIDE = {"generation_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}
BESIDE |= {"training.json", "README.md", "run.png"}


def save_student(directory: Path) -> Path:
    processor = make_processor()
    init_student(make_whisper(processor, seed=5), 2).save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def student_dir(tmp_path_factory) -> Path:
    return save_student(tmp_path_factory.mktemp("students") / "my-student")


def lora_run(student, dataset, output_dir, *more) -> list:
    command = (
        f"--student {student} --dataset {dataset} --output_dir {output_dir} --preset ps-kd --use_cpu --max_steps 6"
    )
    command += " --logging_steps 1 --lora_r 4 --learning_rate 3e-2 --keep_adapter"
    return [*command.split(), *more]


@pytest.fixture(scope="module")
def run(tmp_path_factory, student_dir, speech_dir) -> Path:
    """A whole run of the script."""
    directory = tmp_path_factory.mktemp("kept") / "run"
    with pytest.MonkeyPatch.context() as patch:
        arguments = lora_run(student_dir, speech_dir, directory, "--eval_splits", "validation")
        ended = run_here(patch, Uncaptured(), *arguments)
    assert ended.returncode == 0
    return directory


class Uncaptured:
    """What module fixtures have in place of capsys."""

    def readouterr(self) -> tuple[str, str]:
        return "", ""


@torch.no_grad()
def logits(model) -> torch.Tensor:
    batch = collate(list(Clips(model.config, clips=4)))
    ids = batch["labels"].clamp(min=0)
    return model.eval()(input_features=batch["input_features"], decoder_input_ids=ids).logits


def trainer_of(output_dir: Path, student: WhisperForConditionalGeneration, **changes) -> ASKDTrainer:
    keep = changes.pop("keep_adapter", True)
    lora = LoraArguments(lora_r=4, use_dora=changes.pop("use_dora", False))
    torch.manual_seed(0)
    return ASKDTrainer(
        model=with_lora(copy.deepcopy(student), lora, freeze_encoder=True),
        args=ASKDConfig(**options(output_dir, preset="ps-kd", **changes)),
        keep_adapter=keep,
        train_dataset=Clips(student.config),
        data_collator=collate,
        processing_class=make_processor(),
    )


# ---- what a run leaves ----


def test_the_runs_directory_is_an_adapter_repository(run, student_dir):
    there = {file.name for file in run.iterdir() if file.is_file()}
    assert there >= ADAPTER | BESIDE
    assert not there & WHOLE
    config = json.loads((run / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(student_dir)  # where it lies, from wherever it is loaded
    weights = load_file(run / "adapter_model.safetensors")
    assert weights and all("lora" in name for name in weights)
    assert is_adapter(str(run)) and not is_adapter(str(student_dir))


def test_its_facts_are_those_of_adapter_and_base(run, student_dir):
    student = TrainingSummary.load(run).student
    whole = WhisperForConditionalGeneration.from_pretrained(student_dir)
    assert student.parameters == whole.num_parameters()
    assert student.adapter_parameters == sum(w.numel() for w in load_file(run / "adapter_model.safetensors").values())
    assert (student.encoder_layers, student.decoder_layers, student.dtype) == (2, 2, "float32")


def test_its_card_is_one_of_peft_without_paths(run, student_dir):
    card = ModelCard.load(run / "README.md")
    assert card.data.library_name == "peft" and "base_model" not in card.data.to_dict()
    assert "LoRA adapter with" in card.text and "for `my-student`" in card.text
    for name in ("README.md", "training.json"):
        assert str(student_dir.parent) not in (run / name).read_text()
    (scored,) = Results.load(run / "evaluation" / "results.json").sets
    assert f"{scored.scores['student'].wer:.2f}" in card.text  # of these weights


def test_pipeline_auto_class_and_peft_load_what_load_whisper_merges(run, student_dir):
    ours = load_whisper(str(run))
    assert type(ours) is WhisperForConditionalGeneration
    assert not any("lora" in name for name in ours.state_dict())
    expected = logits(ours)
    before = WhisperForConditionalGeneration.from_pretrained(student_dir)
    assert (expected - logits(before)).abs().max() > 0.1  # it has learnt something
    by_peft = PeftModel.from_pretrained(before, run)
    torch.testing.assert_close(logits(by_peft), expected, rtol=0, atol=1e-4)
    by_class = AutoModelForSpeechSeq2Seq.from_pretrained(run)
    torch.testing.assert_close(logits(by_class), expected, rtol=0, atol=1e-4)
    transcribe = pipeline("automatic-speech-recognition", model=str(run))
    torch.testing.assert_close(logits(transcribe.model), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
def test_it_is_the_adapter_that_was_trained(tmp_path, student_dir, use_dora):
    trainer = trainer_of(tmp_path / "run", load_whisper(str(student_dir)), use_dora=use_dora)
    trainer.train()
    trainer.save_model()
    expected = logits(merged(trainer.adapter))
    torch.testing.assert_close(logits(load_whisper(str(tmp_path / "run"))), expected, rtol=0, atol=1e-4)
    half = load_whisper(str(tmp_path / "run"), dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    rounded = merged(trainer.adapter).to(torch.bfloat16)
    assert all(torch.equal(half.state_dict()[name], weight) for name, weight in rounded.state_dict().items())


def test_the_adapters_language_counts_not_its_bases(tmp_path):
    base, processor = make_multilingual()
    base.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    write_speech(tmp_path / "speech", 4)
    with pytest.MonkeyPatch.context() as patch:
        arguments = lora_run(tmp_path / "base", tmp_path / "speech", tmp_path / "run", "--language", "zh")
        assert run_here(patch, Uncaptured(), *arguments).returncode == 0
    assert load_whisper(str(tmp_path / "run")).generation_config.language == "zh"
    text = (tmp_path / "run" / "README.md").read_text()
    # `pipeline` takes the base's generation config, so it must be told
    assert 'transcribe("speech.flac", generate_kwargs={"language": "zh", "task": "transcribe"})["text"]' in text


def test_what_an_adapter_lacks_is_that_of_its_base(tmp_path):
    """As of a PEFT repository without a generation config."""
    base, processor = make_multilingual()
    base.generation_config.alignment_heads = [[0, 1]]
    base.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    adapter = get_peft_model(load_whisper(str(tmp_path / "base")), LoraConfig(r=2, target_modules=["q_proj"]))
    adapter.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "generation_config.json").exists()
    assert has_alignment_heads(str(tmp_path / "adapter"))
    ours, whole = (BaseModelInfo.of(str(tmp_path / name), base) for name in ("adapter", "base"))
    assert (ours.vocabulary, ours.parameters) == (whole.vocabulary, whole.parameters)


def test_what_an_earlier_run_left_is_not_loaded_with_it(tmp_path, student_dir):
    """A directory with both would be loaded by transformers as the adapter on top of the merged student."""
    student = load_whisper(str(student_dir))
    for keep in (True, False, True):
        trainer = trainer_of(tmp_path / "run", student, keep_adapter=keep)
        trainer.save_model()
        there = {file.name for file in (tmp_path / "run").iterdir()}
        assert there >= ADAPTER if keep else not there & ADAPTER
        assert (there >= WHOLE) is not keep


# ---- what takes it ----


def test_it_is_evaluated_as_any_model(monkeypatch, capsys, tmp_path, run, student_dir, speech_dir):
    command = f"--model {run} --teacher {student_dir} --dataset {speech_dir} --eval_splits validation --device cpu"
    arguments = [*command.split(), "--output_dir", tmp_path / "evaluation"]
    ended = run_here(monkeypatch, capsys, *arguments, file=ROOT / "examples" / "evaluate.py")
    assert ended.returncode == 0, ended.stderr
    here, there = (Results.load(d / "results.json") for d in (tmp_path / "evaluation", run / "evaluation"))
    assert here.models["student"].weights == there.models["student"].weights
    assert here.models["student"].weights != here.models["teacher"].weights
    assert here.sets[0].scores["student"].wer == there.sets[0].scores["student"].wer


def test_it_is_trained_further_as_any_student(monkeypatch, capsys, tmp_path, run, speech_dir):
    arguments = ["--student", run, "--dataset", speech_dir, "--preset", "ps-kd", "--max_steps", 1, "--use_cpu"]
    arguments += ["--learning_rate", "1e-6", "--output_dir", tmp_path / "further"]
    ended = run_here(monkeypatch, capsys, *arguments)
    assert ended.returncode == 0, ended.stderr
    after = WhisperForConditionalGeneration.from_pretrained(tmp_path / "further")
    torch.testing.assert_close(logits(after), logits(load_whisper(str(run))), rtol=0, atol=0.05)
    card = ModelCard.load(tmp_path / "further" / "README.md")
    assert card.data.library_name == "transformers" and "started from `run`" in card.text.replace("\n", " ")


def test_it_is_exported_as_any_model(monkeypatch, capsys, tmp_path, run, speech_dir):
    arguments = ["--model", run, "--output_dir", tmp_path / "ct2", "--dataset", speech_dir, "--max_samples", 4]
    ended = run_here(monkeypatch, capsys, *arguments, file=ROOT / "examples" / "export.py")
    assert ended.returncode == 0, ended.stderr
    assert "same text as transformers for all 4 clips" in ended.stdout
    assert (tmp_path / "ct2" / "model.bin").is_file()


def test_a_run_that_is_there_is_not_overwritten(monkeypatch, capsys, run, student_dir, speech_dir):
    ended = run_here(monkeypatch, capsys, *lora_run(student_dir, speech_dir, run))
    assert ended.returncode == 2 and "already contains a run" in ended.stderr


# ---- what is refused ----


def test_a_student_that_nobody_could_load_is_refused_before_anything_is_loaded(
    monkeypatch, capsys, tmp_path, run, student_dir, speech_dir
):
    def message(*arguments) -> str:
        with monkeypatch.context() as patch:
            patch.setattr("askd_hf.models.student.WhisperForConditionalGeneration", None)  # no model is ever loaded
            ended = run_here(patch, capsys, *arguments)
        assert ended.returncode == 2 and "Traceback" not in ended.stderr
        return ended.stderr

    _, _, *made = lora_run(student_dir, speech_dir, tmp_path / "run")
    assert "--keep_adapter requires --student" in message("--teacher", student_dir, *made)
    assert f"{run} is an adapter. Without --keep_adapter" in message(*lora_run(run, speech_dir, tmp_path / "run"))
    pushed = message(*lora_run(student_dir, speech_dir, tmp_path / "run", "--push_to_hub"))
    assert f"requires a Hub id as --student, got the local directory {student_dir}. Publish" in pushed
    ended = run_here(monkeypatch, capsys, "--student", student_dir, "--keep_adapter")
    assert ended.returncode == 2 and "--keep_adapter requires --lora_r" in ended.stderr


def test_from_python_too(tmp_path, teacher, student_dir):
    teacher.save_pretrained(tmp_path / "teacher")
    layers = init_student(load_whisper(str(tmp_path / "teacher")), 2)
    assert layers.name_or_path == str(tmp_path / "teacher")  # though it isn't what is loaded there
    with pytest.raises(UserError, match=r"on top of .*/teacher, which differs from the student in decoder_layers"):
        trainer_of(tmp_path / "run", layers)
    with pytest.raises(UserError, match="--keep_adapter requires --student"):
        trainer_of(tmp_path / "run", teacher)
    student = load_whisper(str(student_dir))
    with pytest.raises(UserError, match="requires a Hub id as --student"):
        trainer_of(tmp_path / "run", student, push_to_hub=True)
    with pytest.raises(UserError, match="--save_dtype must be float32 with --keep_adapter"):
        trainer_of(tmp_path / "run", student, save_dtype="float16")
    with pytest.raises(UserError, match="--keep_adapter requires a model with an adapter"):
        ASKDTrainer(model=student, args=ASKDConfig(**options(tmp_path, preset="ps-kd")), keep_adapter=True)


def test_an_adapter_of_a_directory_is_not_published(run):
    with pytest.raises(UserError, match=r"an adapter whose base model is a local directory \(.*my-student\)"):
        publish(run, "me/x", token=WRITER)


def test_broken_adapters_are_named(tmp_path, run, student_dir):
    config = json.loads((run / "adapter_config.json").read_text())
    broken = tmp_path / "broken"
    broken.mkdir()

    def write(**changes) -> str:
        (broken / "adapter_config.json").write_text(json.dumps(config | changes))
        (broken / "adapter_model.safetensors").write_bytes((run / "adapter_model.safetensors").read_bytes())
        return str(broken)

    with pytest.raises(UserError, match="has no base_model_name_or_path"):
        load_whisper(write(base_model_name_or_path=None))
    with pytest.raises(UserError, match="no such file or directory"):
        load_whisper(write(base_model_name_or_path=str(tmp_path / "moved")))
    with pytest.raises(UserError, match="doesn't fit its base"):
        load_whisper(write(r=2))
    with pytest.raises(UserError, match="only LoRA adapters are supported"):
        load_whisper(write(peft_type="IA3", feedforward_modules=[]))


# ---- on the Hub ----

# What anyone does who knows nothing but the adapter's id.
LOAD = """
import json, sys
import numpy as np
from transformers import pipeline
from askd_hf import load_whisper

wave = np.sin(np.arange(16000) / 5).astype(np.float32)
transcribe = pipeline("automatic-speech-recognition", model=sys.argv[1])
weights = {name: weight.double().sum().item() for name, weight in load_whisper(sys.argv[1]).state_dict().items()}
clip = {"raw": wave, "sampling_rate": 16000}
print(json.dumps([transcribe(clip, generate_kwargs={"num_beams": 1})["text"], weights]))
"""


@pytest.fixture(scope="module")
def visit(tmp_path_factory) -> Iterator[HubVisit]:
    folder = tmp_path_factory.mktemp("hub-visit")
    write_speech(folder / "speech", 8)
    base = save_student(folder / "hub" / "models" / "me" / "base")
    (base / "README.md").write_text("---\nlicense: mit\n---\n# base\n")
    with serve_hub(folder / "hub", {WRITER: "write", READER: "read"}) as hub:
        visit = HubVisit(folder, hub)
        pushing = lora_run("me/base", "speech", "run", "--push_to_hub", "--hub_model_id", "me/adapter")
        visit.run(train=(shlex.join([str(DISTILL), *map(str, pushing)]), WRITER))
        (folder / "load.py").write_text(LOAD)
        visit.run(
            load=("load.py me/adapter", READER),
            again=(f"{ROOT}/examples/push.py --model_dir run --repo_id me/another", WRITER),
        )
        yield visit


@pytest.mark.slow
def test_an_adapter_of_a_hub_model_is_pushed_and_loaded_by_its_id(visit):
    for ended in visit.ended.values():
        assert ended.returncode == 0, ended.stderr
    (commit,) = visit.hub.commits["models/me/adapter"]
    assert set(commit.written) == ADAPTER | BESIDE
    there = visit.hub.root / "models" / "me" / "adapter"
    assert json.loads((there / "adapter_config.json").read_text())["base_model_name_or_path"] == "me/base"
    card = ModelCard.load(there / "README.md")
    metadata = card.data.to_dict()
    expected = dict(base_model="me/base", base_model_relation="adapter", library_name="peft", license="mit")
    assert {name: metadata[name] for name in expected} == expected
    assert 'from_pretrained("me/base")' in card.text and 'from_pretrained(base, "me/adapter")' in card.text
    for file in there.iterdir():
        assert str(visit.folder).encode() not in file.read_bytes(), file
    (again,) = visit.hub.commits["models/me/another"]
    assert set(again.written) == ADAPTER | BESIDE


@pytest.mark.slow
def test_the_adapter_that_is_downloaded_is_the_one_that_was_trained(visit, tmp_path):
    text, weights = json.loads(visit.ended["load"].stdout.splitlines()[-1])
    base = WhisperForConditionalGeneration.from_pretrained(visit.hub.root / "models" / "me" / "base")
    student = PeftModel.from_pretrained(base, visit.folder / "run").merge_and_unload()
    assert weights == {name: weight.double().sum().item() for name, weight in student.state_dict().items()}
    wave = np.sin(np.arange(16000) / 5).astype(np.float32)
    student.save_pretrained(tmp_path / "merged")
    load_processor(str(visit.hub.root / "models" / "me" / "base")).save_pretrained(tmp_path / "merged")
    assert spoken(text) == by_generate(tmp_path / "merged", wave) != ""


@pytest.mark.slow
def test_the_cards_own_example_gives_the_student(visit, monkeypatch):
    """It is run with the base's directory in place of its id."""
    there = visit.hub.root / "models" / "me"
    text = (there / "adapter" / "README.md").read_text()
    code = next(part for part in text.split("```python\n")[1:] if "PeftModel" in part).partition("```")[0]
    scope = {}
    exec(code.replace('"me/', f'"{there}/'), scope)
    base = WhisperForConditionalGeneration.from_pretrained(there / "base")
    expected = PeftModel.from_pretrained(base, visit.folder / "run")
    torch.testing.assert_close(logits(scope["student"]), logits(expected), rtol=0, atol=1e-4)
    assert scope["student"].generation_config.max_length == 12


@pytest.mark.slow
def test_of_adapter_and_student_only_the_last_that_was_pushed_is_there(visit, tmp_path, student_dir, monkeypatch):
    """Or transformers would load the adapter on top of the student."""
    trainer = trainer_of(tmp_path / "whole", load_whisper(str(student_dir)), keep_adapter=False)
    trainer.save_model()
    with hub_of_this_process(tmp_path / "hub", {WRITER: "write"}, monkeypatch) as hub:
        for directory, other in ((visit.folder / "run", WHOLE), (tmp_path / "whole", ADAPTER)) * 2:
            publish(directory, "me/x", token=WRITER)
            there = {file.name for file in (hub.root / "models" / "me" / "x").iterdir()}
            assert there >= (ADAPTER | WHOLE) - other and not there & other
