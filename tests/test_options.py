"""Options of the command line, of YAML and of Trainer that once went wrong, or easily could."""

import contextlib
import copy
import dataclasses
import gc
import re
import subprocess
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters
from training import Clips, collate, history, make_trainer, options
from transformers import GenerationConfig, Seq2SeqTrainingArguments, TrainerCallback
from transformers.models.whisper.modeling_whisper import WhisperEncoderLayer

from askd_hf import ASKDTrainer
from askd_hf.arguments import (
    CacheArguments,
    DataArguments,
    MixArguments,
    ModelArguments,
    SpeechSource,
    machine,
    names_of,
)
from askd_hf.arguments.parser import parse_args
from askd_hf.commands.pseudo_label import unlabeled_arguments
from askd_hf.config import ASKDConfig
from askd_hf.data import audio_checks
from askd_hf.errors import UserError, exit_on_user_error
from askd_hf.evaluation import EvaluationArguments
from askd_hf.evaluation.metrics import compute_metrics_for
from askd_hf.models.lora import LoraArguments, with_lora
from askd_hf.models.student import init_student
from askd_hf.pseudo_labels import PseudoLabelArguments
from askd_hf.training.dataset_checks import check_mix
from askd_hf.training.run_dir import prepare_evaluation, set_default_output_dir

real_bf16_support = torch.cuda.is_bf16_supported

TYPES = (ModelArguments, DataArguments, ASKDConfig)


def from_yaml(tmp_path, text: str, *argv: str):
    (tmp_path / "run.yaml").write_text(text)
    return parse_args(TYPES, ["--config", str(tmp_path / "run.yaml"), *argv])


# ---- where values come from ----


def test_yaml_values_are_parsed_as_on_the_command_line(tmp_path):
    models, data, config = from_yaml(
        tmp_path,
        "teacher: t\ndecoder_layers: 1\ndataset: d\neval_splits: validation\nlanguage: no\nlearning_rate: 1e-3\n"
        "freeze_encoder: no\nstudent: null\nlr_scheduler_kwargs: {num_cycles: 2}\neval_steps: 0.5\nuse_cpu: true\n",
        "--learning_rate",
        "2e-3",
    )
    assert (models.decoder_layers, models.student) == ("1", None)
    assert (data.eval_splits, data.language) == (["validation"], ["no"])
    assert (config.learning_rate, config.freeze_encoder, config.eval_steps) == (2e-3, False, 0.5)
    assert config.lr_scheduler_kwargs == {"num_cycles": 2}
    set_default_output_dir(config, models)
    assert config.output_dir == "runs/t-1-decoder-layers-askd"


@pytest.mark.parametrize("line", ["save_dtype: fp16", "on_bad_audio: skp", "teacher_weight: a"])
def test_a_yaml_value_of_the_wrong_kind_ends_like_a_wrong_argument(tmp_path, line):
    with pytest.raises(UserError, match=f"--{line.split(':')[0]}"):
        from_yaml(tmp_path, f"teacher: t\n{line}\n")


def test_an_unknown_option_is_refused(tmp_path):
    with pytest.raises(UserError, match="--teecher"):
        parse_args(TYPES, ["--teecher", "x"])


def test_without_a_dataset_only_what_is_not_given_is_librispeech(tmp_path):
    default = DataArguments()
    assert [source[:4] for source in default.train_sources()] == [
        ("openslr/librispeech_asr", "clean", "train.100", "english")
    ]
    assert [source[:3] for source in default.eval_sources()] == [("openslr/librispeech_asr", "clean", "validation")]
    given = DataArguments(dataset_config="other", train_split="train.500", eval_splits=["test"], language="en")
    assert given.train_sources()[0][:4] == ("openslr/librispeech_asr", "other", "train.500", "en")
    assert given.eval_sources()[0][:3] == ("openslr/librispeech_asr", "other", "test")
    assert DataArguments(eval_dataset="mine").eval_sources()[0][:3] == ("mine", None, "train")
    assert DataArguments(dataset="mine").train_sources() == [SpeechSource("mine", None, "train")]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (dict(language="fr"), "--language fr requires --dataset: openslr/librispeech_asr, the default, is English"),
        (dict(language="English"), None),
        (dict(task="translate"), "--task translate requires --dataset"),
        (dict(language="fr", dataset="mine"), None),
        (dict(language="fr", unlabeled_dataset="mine"), None),
    ],
)
def test_librispeech_is_english(tmp_path, given, expected):
    """100 hours of English under the prompt of another language, if --dataset is forgotten."""
    config = ASKDConfig(output_dir=str(tmp_path), use_cpu=True)
    refused = pytest.raises(UserError, match=expected) if expected else contextlib.nullcontext()
    with refused:
        check_mix(DataArguments(**given), MixArguments(), config)


def test_several_datasets_have_one_value_each_or_the_same():
    data = DataArguments(
        dataset=["a", "b"], dataset_config=["-", "clean"], language=["fr", "de"], train_split="x", eval_splits=["v"]
    )
    assert data.train_sources() == [SpeechSource("a", None, "x", "fr"), SpeechSource("b", "clean", "x", "de")]
    assert data.eval_sources() == [SpeechSource("a", None, "v", "fr"), SpeechSource("b", "clean", "v", "de")]
    elsewhere = DataArguments(dataset=["a", "b"], language=["fr", "de"], eval_dataset=["c"], eval_language=["fr"])
    assert elsewhere.eval_sources() == [SpeechSource("c", None, "train", "fr")]
    with pytest.raises(UserError, match="--eval_language requires one value or one per dataset, got 2 for 1 datasets"):
        DataArguments(dataset=["a", "b"], language=["fr", "de"], eval_dataset=["c"]).eval_sources()
    assert names_of(data.eval_sources()) == ["a-v", "b-v"] and names_of(data.eval_sources()[:1]) == ["v"]
    same = DataArguments(dataset=["x/a", "x/a"], dataset_config=["fr", "de"], eval_splits=["v"])
    assert names_of(same.eval_sources()) == ["a-fr-v", "a-de-v"]
    assert names_of(DataArguments(dataset=["a", "a"]).train_sources()) == ["a-train-0", "a-train-1"]
    with pytest.raises(UserError, match="--eval_splits requires --dataset or --eval_dataset"):
        DataArguments(unlabeled_dataset="x", eval_splits=["v"]).eval_sources()
    with pytest.raises(UserError, match="--train_split requires one value or one per dataset, got 3 for 2 datasets"):
        DataArguments(dataset=["a", "b"], train_split=["x", "y", "z"]).train_sources()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(preset="ce", self_weight=0.5), "--self_weight 0.5 requires --self_teacher"),
        (dict(preset="ps-kd", teacher_weight=0.5), "--teacher_weight 0.5 has no effect"),
        (dict(snapshot_strategy="epoch"), "--snapshot_strategy epoch requires --self_teacher snapshot"),
        (dict(hub_strategy="checkpoint"), "--hub_strategy must be end or every_save, got .checkpoint."),
    ],
    ids=str,
)
def test_an_option_without_effect_or_with_a_bad_one_is_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        ASKDConfig(output_dir=str(tmp_path), **options)
    assert ASKDConfig(output_dir=str(tmp_path), self_teacher="none").self_weight == 0.0


# ---- the best checkpoint ----


def test_the_best_checkpoint_has_the_lowest_word_error_rate(tmp_path, teacher, student, processor):
    trainer = make_trainer(
        tmp_path,
        teacher,
        student,
        Clips(student.config, clips=8, seed=2),
        compute_metrics_for(processor, "none"),
        processor,
        max_steps=8,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
    )
    rates = iter([70.0, 50.0, 60.0, 80.0])
    trainer.compute_metrics = lambda _: {"wer": next(rates), "cer": 1.0}
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")


def test_several_splits_choose_by_the_first_and_no_split_is_an_error(tmp_path):
    options = dict(output_dir=str(tmp_path), load_best_model_at_end=True)
    config = ASKDConfig(**options)
    prepare_evaluation(config, ["known", "unseen"])
    assert (config.metric_for_best_model, config.greater_is_better) == ("known_wer", False)
    config = ASKDConfig(**options)
    prepare_evaluation(config, ["known"])
    assert config.metric_for_best_model == "wer"
    for changes in (dict(load_best_model_at_end=True), dict(save_strategy="best"), dict(eval_on_start=True)):
        message = "--load_best_model_at_end, --save_strategy best and --eval_on_start require --eval_splits or"
        with pytest.raises(UserError, match=message):
            prepare_evaluation(ASKDConfig(output_dir=str(tmp_path), **changes), [])
    prepare_evaluation(ASKDConfig(output_dir=str(tmp_path)), [])


LOSSES = dict(eval_teacher_losses=True)


@pytest.mark.parametrize(
    ("metric", "changes", "splits", "known"),
    [
        ("foo", {}, ["a"], "loss, wer, cer, capped_wer, loops"),
        ("foo", LOSSES, ["a"], "loss, total_loss, wer, cer, capped_wer, loops"),
        ("a_wer", {}, ["a"], "loss, wer, cer, capped_wer, loops"),
        ("foo", dict(predict_with_generate=False), ["a", "b"], "a_loss, b_loss"),
        ("eval_wer", dict(predict_with_generate=False), ["a"], "loss"),
        # they are missing while the teacher or the self-teacher has no weight
        ("teacher_loss", dict(**LOSSES, predict_with_generate=False), ["a"], "loss, total_loss"),
        ("self_loss", dict(**LOSSES, predict_with_generate=False), ["a"], "loss, total_loss"),
        ("foo", dict(**LOSSES, preset="ps-kd", prediction_loss_only=True), ["a"], "loss, total_loss, self_loss"),
    ],
)
def test_a_metric_that_does_not_exist_is_refused_before_training(tmp_path, metric, changes, splits, known):
    config = ASKDConfig(output_dir=str(tmp_path), metric_for_best_model=metric, load_best_model_at_end=True, **changes)
    message = rf"--metric_for_best_model must be one of {known}, got '\w+'"
    with pytest.raises(UserError, match=message) as refused:
        prepare_evaluation(config, splits)
    assert ("--predict_with_generate" in str(refused.value)) == (metric == "eval_wer")


def test_the_trainer_refuses_a_metric_that_no_evaluation_would_have(tmp_path, student):
    """Every metric that it takes is in an evaluation."""
    changes = dict(preset="ps-kd", eval_teacher_losses=True, load_best_model_at_end=True)
    changes |= dict(eval_strategy="steps", eval_steps=4, save_strategy="steps", save_steps=4)
    evaluation = Clips(student.config, clips=4, seed=2)

    def make(metric, compute_metrics=None, evaluation=evaluation, **more):
        more = changes | more
        return make_trainer(tmp_path, None, student, evaluation, compute_metrics, metric_for_best_model=metric, **more)

    for metric in ("wer", "foo", "a_loss"):
        with pytest.raises(UserError, match="must be one of loss, total_loss, self_loss, got"):
            make(metric)
    with pytest.raises(UserError, match="must be one of a_loss, a_total_loss, a_self_loss, got"):
        make("loss", evaluation={"a": evaluation})
    with pytest.raises(UserError, match="must be one of loss, total_loss, self_loss, got"):
        make("mine", lambda _: {"mine": 1.0}, predict_with_generate=False)
    for metric, compute_metrics in (("total_loss", None), ("self_loss", None), ("mine", lambda _: {"mine": 1.0})):
        trainer = make(metric, compute_metrics)
        trainer.train()
        assert trainer.state.best_metric is not None


# ---- ways to run ----


def test_evaluation_before_the_first_step_of_a_self_phase(tmp_path, teacher, student):
    evaluation = Clips(student.config, clips=4, seed=2)
    changes = dict(eval_on_start=True, eval_teacher_losses=True, predict_with_generate=False)
    trainer = make_trainer(tmp_path, None, student, evaluation, preset="ps-kd", **changes)
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["step"] == 0 and first["eval_self_loss"] == pytest.approx(0.0, abs=1e-6)


def test_training_again_without_the_freed_teacher_is_refused(tmp_path, teacher, student):
    trainer = make_trainer(tmp_path, teacher, student)
    trainer.train()
    with pytest.raises(UserError, match="create a new trainer"):
        trainer.train()


def test_nor_is_it_resumed_in_the_teacher_phase_without_it(tmp_path, teacher, student):
    """In the self phase nobody needs it."""
    trainer = make_trainer(tmp_path, teacher, student, save_strategy="steps", save_steps=2, save_total_limit=None)
    trainer.train()
    expected = history(trainer, "loss")
    with pytest.raises(
        UserError, match="the teacher was freed at the end of its phase: create a new trainer to train"
    ):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert trainer.state.global_step == 8 and torch.equal(history(trainer, "loss"), expected)


def test_the_freed_teacher_is_really_gone(tmp_path, teacher, student):
    trainer = make_trainer(tmp_path, teacher, student)
    reference = weakref.ref(trainer.teacher)
    trainer.train()
    gc.collect()
    assert reference() is None


def test_full_half_precision_evaluation(tmp_path, teacher, student):
    evaluation = Clips(student.config, clips=4, seed=2)
    plain = make_trainer(tmp_path, teacher, student, evaluation).evaluate()
    half = make_trainer(tmp_path, teacher, student, evaluation, bf16_full_eval=True).evaluate()
    assert half["eval_loss"] == pytest.approx(plain["eval_loss"], rel=0.05)
    assert half["eval_loss"] != plain["eval_loss"]


def test_weights_that_an_evaluation_has_rounded_are_not_trained(tmp_path, student):
    """Trainer casts the model itself."""
    evaluation = Clips(student.config, clips=4, seed=2)
    trainer = make_trainer(tmp_path, None, student, evaluation, preset="ce", bf16_full_eval=True, max_steps=2)
    trainer.evaluate()
    with pytest.raises(UserError, match=r"the student's weights are bfloat16 .*before .*--bf16_full_eval"):
        trainer.train()


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True], ids=["a trained encoder", "a frozen encoder"])
def test_a_compiled_run_is_the_same_run(tmp_path, teacher, deep_teacher, frozen, monkeypatch):
    """Hooks are at work in every step, label lengths change, and evaluation runs the model in between.

    The last three steps are the self phase.
    """
    ran_compiled = {}  # of the layers of encoders; a list would be compiled again whenever it has grown
    forward = WhisperEncoderLayer.forward

    def noted(*args, **kwargs):
        ran_compiled[torch.compiler.is_compiling()] = True
        return forward(*args, **kwargs)

    monkeypatch.setattr(WhisperEncoderLayer, "forward", noted)
    # with more layers compiling takes longer
    teacher = teacher if frozen else deep_teacher
    student = init_student(teacher, 1) if frozen else init_student(teacher, 1, encoder_layers=1)
    evaluation = Clips(student.config, clips=4, seed=2)
    changes = dict(
        max_steps=8, eval_strategy="steps", eval_steps=3, eval_teacher_losses=True, predict_with_generate=False
    )
    runs = []
    # a plain trainer that is made before a compiled one trains would be compiled as well
    for compiled in ({}, dict(torch_compile=True, torch_compile_backend="eager")):
        torch.compiler.reset()
        counters.clear()
        ran_compiled.clear()
        runs.append(make_trainer(tmp_path, teacher, student, evaluation, **changes, **compiled))
        assert (runs[-1].teacher._compiled_call_impl is not None) == bool(compiled)
        runs[-1].train()
        assert (counters["stats"]["unique_graphs"] > 0) == bool(compiled)
        if frozen:
            assert ran_compiled == {bool(compiled): True}
    plain, compiled = (
        [(row["step"], {name: row[name] for name in row if "loss" in name}) for row in run.state.log_history]
        for run in runs
    )
    expected = {"teacher_loss", "self_loss"} | (set() if frozen else {"hidden_loss"})
    assert expected <= {name for _, losses in plain for name in losses}
    assert [step for step, _ in plain] == [step for step, _ in compiled]
    for (step, ours), (_, theirs) in zip(plain, compiled, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-4, abs=1e-6), step


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_teacher_with_a_float32_student(tmp_path, teacher, dtype):
    student = init_student(teacher)
    full = make_trainer(tmp_path, teacher, student, max_steps=4, teacher_phase_ratio=1.0)
    half = make_trainer(tmp_path, teacher.to(dtype), student, max_steps=4, teacher_phase_ratio=1.0)
    assert half.runner.teacher_has_student_encoder  # equal up to the teacher's dtype
    full.train()
    half.train()
    torch.testing.assert_close(
        history(half, "loss", "teacher_loss"), history(full, "loss", "teacher_loss"), rtol=0.1, atol=0.01
    )


def test_bf16_and_activation_checkpointing_are_really_on(tmp_path, teacher, student):
    seen = {}

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            seen["checkpointing"] = model.model.decoder.gradient_checkpointing

    trainer = make_trainer(tmp_path, teacher, student, bf16=True, activation_checkpointing=True, max_steps=1)
    trainer.add_callback(Look())
    trainer.model.model.decoder.layers[0].fc1.register_forward_hook(
        lambda module, args, output: seen.update(dtype=output.dtype)
    )
    trainer.train()
    assert seen == {"checkpointing": True, "dtype": torch.bfloat16}


def test_the_saved_generation_config_is_the_students_own(tmp_path, teacher, student, processor):
    student.generation_config.max_length = None
    evaluation = Clips(student.config, clips=4, seed=2)
    trainer = make_trainer(
        tmp_path, teacher, student, evaluation, compute_metrics_for(processor, "none"), processor, max_steps=1
    )
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    saved = (tmp_path / "generation_config.json").read_text()
    assert '"max_length": 32' in saved  # the decoder's positions
    assert "top_k" not in saved and "temperature" not in saved


@pytest.mark.parametrize("option", [dict(fsdp="full_shard"), dict(deepspeed="zero2.json")], ids=str)
def test_sharded_training_is_refused(tmp_path, option):
    message = r"FSDP and DeepSpeed \(ZeRO\) are not supported.*plain DDP.*If the teacher doesn't fit, use (.*)"
    with pytest.raises(UserError, match=message) as refused:
        ASKDConfig(output_dir=str(tmp_path), **option)
    named = set(re.findall(r"--(teacher_\w+)", re.search(message, str(refused.value))[1]))
    options = {field.name for group in (ModelArguments, CacheArguments) for field in dataclasses.fields(group)}
    assert named == {"teacher_dtype", "teacher_offload", "teacher_cache_dir"} <= options


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_sharded_training_by_accelerates_own_configuration_is_refused(tmp_path, monkeypatch, variable):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(UserError, match="FSDP and DeepSpeed"):
        ASKDConfig(output_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (dict(enable_jit_checkpoint=True), "--enable_jit_checkpoint is not supported"),
        (dict(fp16=True, bf16=True), "--fp16 and --bf16 exclude each other"),
        (dict(ddp_static_graph=True), "--ddp_static_graph is not supported: the loss is computed outside"),
        (dict(train_sampling_strategy="batch_rebalance"), "batch_rebalance is not supported.*Use group_by_length or"),
        (dict(batch_eval_metrics=True), "--batch_eval_metrics is not supported: the metrics are of all clips"),
        (dict(debug="underflow_overflow"), "--debug underflow_overflow is not supported"),
        (dict(eval_do_concat_batches=False), "--eval_do_concat_batches must be True: the metrics are of all clips"),
        (dict(use_liger_kernel=True), "--use_liger_kernel is not supported: Liger has no kernels for Whisper"),
    ],
    ids=str,
)
def test_options_of_trainer_that_cannot_be_had_are_refused(tmp_path, option, message):
    with pytest.raises(UserError, match=message):
        ASKDConfig(output_dir=str(tmp_path), use_cpu=True, **option)


def test_several_gpus_in_one_process_are_refused(tmp_path, teacher, student, monkeypatch):
    """`torch.nn.DataParallel` is what Trainer would use."""
    monkeypatch.setattr(ASKDConfig, "n_gpu", 2)
    with pytest.raises(UserError, match=r"several GPUs require one process each: start with `accelerate launch`"):
        make_trainer(tmp_path, teacher, student)


# ---- what the machine decides ----


def without_device(config: ASKDConfig) -> None:
    """Transformers' own `__post_init__` would look for the device."""
    config.report_to = []


def pretend_gpu(monkeypatch, capability: int) -> None:
    """A CUDA device of this compute capability: 7 is a T4, 8 an A100. No tensor can be on it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(major=capability))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(machine, "available_cores", lambda: 12)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # of torchrun
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", real_bf16_support)
    monkeypatch.setattr(Seq2SeqTrainingArguments, "__post_init__", without_device)


@pytest.mark.parametrize(
    ("capability", "options", "bf16"),
    [
        *((7, {}, False), (8, {}, True), (9, {}, True), (7, dict(bf16=True), True), (8, dict(bf16=False), False)),
        *((8, dict(fp16=True), False), (8, dict(use_cpu=True), False)),
    ],
)
def test_bf16_is_the_default_where_it_is_computed_in(monkeypatch, tmp_path, capability, options, bf16):
    pretend_gpu(monkeypatch, capability)
    config = ASKDConfig(output_dir=str(tmp_path), **options)
    assert config.bf16 is bf16
    gpu = not options.get("use_cpu", False)
    assert (config.dataloader_num_workers, config.dataloader_pin_memory) == (5 if gpu else 0, gpu)
    assert config.accelerator_config == ({"non_blocking": True} if gpu else None)
    argv = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    assert parse_args((ASKDConfig,), argv)[0].bf16 is bf16  # and on the command line
    assert ASKDConfig(output_dir=str(tmp_path), dataloader_num_workers=2).dataloader_num_workers == 2


@pytest.mark.parametrize(
    ("cores", "processes", "workers"), [(6, None, 5), (6, 2, 2), (12, None, 8), (24, 2, 8), (4, 4, 1), (2, 4, 1)]
)
def test_the_cores_are_shared_by_the_processes_and_not_by_the_gpus(monkeypatch, tmp_path, cores, processes, workers):
    """Slurm gives each process cores of its own, and lets it see all GPUs."""
    pretend_gpu(monkeypatch, 8)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    monkeypatch.setattr(machine, "available_cores", lambda: cores)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    if processes is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert ASKDConfig(output_dir=str(tmp_path)).dataloader_num_workers == workers
    assert audio_checks._processes(10**6) == (max(cores // (processes or 1), 1) if workers > 1 else 0)


def test_evaluations_have_as_many_workers_as_training(monkeypatch):
    given = dict(model="m", dataset="d", device="cpu")
    assert EvaluationArguments(**given).num_workers == 0
    pretend_gpu(monkeypatch, 8)
    assert (
        EvaluationArguments(**given).num_workers
        == PseudoLabelArguments(teacher="t", dataset="d", device="cpu").num_workers
        == 5
    )
    assert EvaluationArguments(**given, num_workers=3).num_workers == 3


def test_unlabeled_speech_is_checked_as_the_other_clips(tmp_path):
    """As `--recheck`, `--on_bad_audio` and `--max_train_samples` say."""
    data = DataArguments(unlabeled_dataset="d", recheck=True, on_bad_audio="skip", max_train_samples=7)
    config = ASKDConfig(output_dir=str(tmp_path), use_cpu=True)
    given = unlabeled_arguments(ModelArguments(teacher="t"), data, MixArguments(), config)
    assert (given.recheck, given.on_bad_audio, given.max_samples) == (True, "skip", 7)


@pytest.mark.parametrize("heads", [None, [[0, 1]]])
def test_unlabeled_speech_gets_the_times_that_cutting_requires(tmp_path, heads):
    """Those of words, if the teacher has alignment heads."""
    GenerationConfig(alignment_heads=heads).save_pretrained(tmp_path / "teacher")
    models, config = ModelArguments(teacher=str(tmp_path / "teacher")), ASKDConfig(output_dir="x", use_cpu=True)
    for long_clips, expected in (("skip", (False, False)), ("cut", (True, heads is not None))):
        data = DataArguments(unlabeled_dataset="d", long_clips=long_clips)
        given = unlabeled_arguments(models, data, MixArguments(), config)
        assert (given.timestamps, given.word_timestamps) == expected


IMPORTS = """
import os, sys, torch
asked = []
for module, names in ((torch.cuda, ("is_available", "is_bf16_supported", "current_device", "get_device_properties")),
                      (torch.accelerator, ("is_available", "current_accelerator"))):
    for name in names:
        def note(*_, name=name, real=getattr(module, name), **__):
            if f"{os.sep}askd_hf{os.sep}" in sys._getframe(1).f_code.co_filename:
                asked.append(name)
            return real(*_, **__)
        setattr(module, name, note)
import askd_hf, askd_hf.trainer, askd_hf.evaluation, askd_hf.pseudo_labels
assert not torch.cuda.is_initialized()
assert not asked, asked
"""


@pytest.mark.slow
def test_to_import_us_asks_nothing_of_the_gpu():
    """Processes that are forked later, as those of `notebook_launcher`, couldn't use it."""
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")  # and nothing is printed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_student_in_half_precision_is_refused(tmp_path, teacher, student, dtype):
    """In bfloat16 an update of less than 1/256 of a weight is lost."""
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(UserError, match=rf"weights are {kind} \(model.*student\.float\(\)"):
        make_trainer(tmp_path, teacher, copy.deepcopy(student).to(dtype))
    mixed = copy.deepcopy(student)
    mixed.model.decoder.to(dtype)
    with pytest.raises(UserError, match=rf"weights are {kind} \(model\.decoder"):
        make_trainer(tmp_path, teacher, mixed)


def test_an_adapter_on_a_half_precision_student_is_trained_in_float32(tmp_path, student):
    adapted = with_lora(copy.deepcopy(student).bfloat16(), LoraArguments(lora_r=2), freeze_encoder=True)
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
    config = ASKDConfig(**options(tmp_path, preset="ps-kd", max_steps=2))
    trainer = ASKDTrainer(adapted, config, train_dataset=Clips(student.config), data_collator=collate)
    trainer.train()
    assert {w.dtype for w in trainer.blend.self_teacher.parameters.values()} == {torch.float32}


def test_a_users_error_in_a_worker_process_ends_as_one_line(capsys):
    inner = "Caught UserError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  ...\n"
    with pytest.raises(SystemExit) as stop, exit_on_user_error():
        raise UserError(f"{inner}askd_hf.errors.UserError: audio/003.wav: missing file")
    assert stop.value.code == 2
    assert capsys.readouterr().err.strip() == "error: audio/003.wav: missing file"
