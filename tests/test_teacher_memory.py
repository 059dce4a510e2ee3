"""Teachers that take little memory: decoder layers in 8 bits, layers that stay in CPU memory until they run."""

import copy
import json

import pytest
import torch
from datasets import load_from_disk
from safetensors.torch import load_file
from scripts import run_here
from torch import nn
from training import Clips, collate, history, make_trainer, on

from askd_hf.data.encoder_cache import weights_digest
from askd_hf.data.soft_labels import SETTINGS_COLUMN
from askd_hf.models import teacher_memory
from askd_hf.models.student import init_student, same_encoder
from askd_hf.models.teacher_memory import full_weights, offload, place_teacher, quantize_decoder

META = torch.device("meta")
CPU = torch.device("cpu")


@torch.no_grad()
def logits(model) -> torch.Tensor:
    batch = collate(list(Clips(model.config, clips=4)))
    ids = batch["labels"].clamp(min=0)
    return model(input_features=batch["input_features"].to(model.dtype), decoder_input_ids=ids).logits


def all_layers(model) -> list[nn.Module]:
    return [*model.model.encoder.layers, *model.model.decoder.layers]


def on_meta(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.device == META}


# ---- 8 bits ----


def linear_layers(model) -> dict[str, nn.Linear]:
    return {
        name: module for name, module in model.model.decoder.layers.named_modules() if isinstance(module, nn.Linear)
    }


def test_the_decoders_linear_layers_are_rounded_to_8_bits_and_nothing_else(teacher):
    full, plain = logits(teacher), copy.deepcopy(teacher)
    quantize_decoder(teacher)
    rounded = linear_layers(teacher)
    assert len(rounded) == 4 * 10
    for name, module in linear_layers(plain).items():
        before, after = module.weight.data, rounded[name].weight.dequantize()
        step = before.abs().amax(1, keepdim=True) / 127  # 255 steps from the largest of a row to its negative
        assert ((after - before).abs() <= 0.51 * step).all() and (after != before).any()
        assert len((after / step).round().unique()) > 20
        module.weight.data = after
    # the rest is as it was: the same weights give the same
    torch.testing.assert_close(logits(teacher), logits(plain), rtol=0, atol=1e-4)
    assert (logits(teacher) - full).abs().max() > 1e-3
    assert teacher.proj_out.weight is teacher.model.decoder.embed_tokens.weight


def test_they_take_a_quarter_of_the_memory(teacher):
    layers = linear_layers(teacher).values()
    before = sum(4 * layer.weight.numel() for layer in layers)
    quantize_decoder(teacher)
    weights = [layer.weight for layer in layers]
    parts = [getattr(weight, name) for weight in weights for name in weight.__tensor_flatten__()[0]]
    after = sum(part.numel() * part.element_size() for part in parts)
    assert after <= before / 4 + 8 * sum(layer.out_features for layer in layers)  # some bytes a row for its scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_run_in_the_teachers_dtype_and_under_autocast(teacher, dtype):
    full = logits(teacher).float()
    quantize_decoder(teacher.to(dtype))
    assert teacher.dtype == dtype
    assert logits(teacher).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        half = logits(teacher)
    for ours in (logits(teacher), half):
        assert (ours.float() - full).abs().mean() < 0.1 * full.abs().mean()


def test_to_quantize_twice_changes_nothing(teacher):
    quantize_decoder(teacher)
    once = logits(teacher)
    quantize_decoder(teacher)
    assert torch.equal(logits(teacher), once)


# ---- offloading ----


def test_offloaded_layers_are_there_only_while_they_run(teacher):
    expected, digest = logits(teacher), weights_digest(teacher)
    seen = []

    def note(*_):
        seen.append(sum(not on_meta(layer) for layer in all_layers(teacher)))

    for layer in all_layers(teacher):
        layer.fc1.register_forward_pre_hook(note)
    offload(all_layers(teacher), CPU)
    waiting = {name for name, _ in teacher.named_parameters() if ".layers." in name}
    assert waiting and on_meta(teacher) == waiting
    assert torch.equal(logits(teacher), expected)
    assert on_meta(teacher) == waiting  # again
    assert seen == [1] * len(all_layers(teacher))  # one at a time
    # and what compares weights finds them
    whole = full_weights(teacher)
    assert not any(weight.device == META for weight in whole.values())
    other = init_student(make_whole(teacher, whole), 4)
    assert weights_digest(other) == digest


def make_whole(teacher, weights):
    whole = type(teacher)(teacher.config)
    whole.load_state_dict(weights)
    whole.generation_config = teacher.generation_config
    return whole


def test_layers_that_a_gpu_runs_are_pinned_and_copied_without_waiting(monkeypatch, teacher):
    """Without a GPU: what pins a weight, and what copies it, note it and leave it where it is."""
    expected, pinned, copied = logits(teacher), [], []
    to = torch.Tensor.to

    def pin(weight):
        pinned.append(weight.clone())
        return pinned[-1]

    def copy_to(weight, *where, **options):
        if where != (torch.device("cuda"),):
            return to(weight, *where, **options)
        copied.append((weight, options))
        return weight

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", copy_to)
    decoder = teacher.model.decoder.layers
    offload(decoder, torch.device("cuda"))
    weights = [weight for layer in decoder for weight in layer._hf_hook.weights_map.weights.values()]
    assert list(map(id, weights)) == list(map(id, pinned)) and len(pinned) == len(on_meta(decoder)) > 0
    for layer in decoder:
        layer._hf_hook.execution_device = CPU
    assert torch.equal(logits(teacher), expected)
    assert {id(weight) for weight, _ in copied} == {id(weight) for weight in pinned}
    assert all(options == {"non_blocking": True} for _, options in copied)
    whole = full_weights(teacher)
    assert not any(weight.device == META for weight in whole.values())
    # layers that don't run are not pinned
    pinned.clear()
    offload(teacher.model.encoder.layers, torch.device("cuda"), run=False)
    assert on_meta(teacher.model.encoder) and not pinned


def test_weights_of_torchao_stay_in_ordinary_memory(monkeypatch, teacher):
    """They can't be pinned."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda weight: pinned.append(weight) or weight)
    quantize_decoder(teacher)
    linear = {id(layer.weight) for layer in linear_layers(teacher).values()}
    offload(teacher.model.decoder.layers, torch.device("cuda"))
    names = {name for name, _ in teacher.model.decoder.layers.named_parameters()}
    assert len(pinned) == len(names) - len(linear) and {type(weight) for weight in pinned} == {torch.Tensor}


def test_an_offloaded_encoder_is_still_recognized(teacher):
    student, other = init_student(teacher, 2), init_student(teacher, 2)
    other.model.encoder.layers[1].fc2.bias.data += 1
    offload(all_layers(teacher), CPU)
    assert same_encoder(teacher, student) and not same_encoder(teacher, other)
    assert len(on_meta(teacher.model.encoder)) == 2 * 15


def test_an_encoder_that_does_not_run_stays_in_cpu_memory(teacher):
    """The device is one that holds nothing: on it are all parameters that aren't kept in CPU memory."""
    before = {name: weight.clone() for name, weight in teacher.state_dict().items()}
    place_teacher(teacher, META, encoder_runs=False)
    assert on_meta(teacher) == {name for name, _ in teacher.named_parameters()}
    there = {name for name, weight in full_weights(teacher).items() if weight.device != META}
    assert there == {name for name in before if ".encoder.layers." in name}
    assert all(torch.equal(full_weights(teacher)[name], before[name]) for name in there)


def test_on_a_cpu_there_is_nothing_to_gain(teacher):
    place_teacher(teacher, CPU, encoder_runs=False)
    assert not on_meta(teacher)


# ---- runs ----

TERMS = ("loss", "ce_loss", "grad_norm", "teacher_weight")


@pytest.mark.parametrize("own_encoder", [False, True], ids=["shared encoder", "an encoder of its own"])
def test_a_run_with_an_offloaded_teacher_is_the_same_run(tmp_path, teacher, student, own_encoder, device):
    student = student if own_encoder else init_student(teacher, 2)
    plain = make_trainer(tmp_path / "a", teacher, student, **on(device))
    plain.train()
    offload(all_layers(teacher), torch.device(device))
    light = make_trainer(tmp_path / "b", teacher, student, **on(device))
    assert on_meta(light.teacher)
    light.train()
    assert light.teacher is None
    # some sums of a card have no fixed order
    exact = dict(rtol=0, atol=0) if device == "cpu" else dict(rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(history(light, *TERMS), history(plain, *TERMS), **exact)
    if device == "cpu":
        for name, weight in plain.model.state_dict().items():
            assert torch.equal(light.model.state_dict()[name], weight), name


def test_a_run_with_a_quantized_teacher_is_nearly_the_same(tmp_path, teacher, student, device):
    plain = make_trainer(tmp_path / "a", teacher, student, **on(device))
    plain.train()
    quantize_decoder(teacher)
    light = make_trainer(tmp_path / "b", teacher, student, **on(device))
    assert {weight.device.type for weight in light.teacher.state_dict().values()} == {device}
    light.train()
    ours, theirs = history(light, *TERMS), history(plain, *TERMS)
    assert not torch.equal(ours, theirs)
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


# ---- the script ----


def options(teacher_dir, speech_dir, output_dir, *more) -> list:
    command = f"--teacher {teacher_dir} --dataset {speech_dir} --output_dir {output_dir} --use_cpu --max_steps 6"
    return [*command.split(), *["--logging_steps", "1", "--learning_rate", "1e-2", "--save_strategy", "no"], *more]


def weights(directory) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def test_the_students_layers_are_copied_before_the_teachers_are_rounded(
    monkeypatch, capsys, tmp_path, teacher_dir, speech_dir
):
    arguments = options(teacher_dir, speech_dir, tmp_path / "run", "--teacher_dtype", "int8", "--preset", "kd")
    arguments += ["--learning_rate", "1e-30"]
    ended = run_here(monkeypatch, capsys, *arguments)
    assert ended.returncode == 0, ended.stderr
    student, full = weights(tmp_path / "run"), weights(teacher_dir)
    for old, new in ((0, 0), (3, 1)):
        name = "model.decoder.layers.{}.fc1.weight"
        assert torch.equal(student[name.format(new)], full[name.format(old)])


@pytest.mark.parametrize(
    "more", [pytest.param([], marks=pytest.mark.slow), ["--teacher_dtype", "int8"]], ids=["float32", "int8"]
)
def test_an_offloaded_teacher_gives_the_same_student(monkeypatch, capsys, tmp_path, teacher_dir, speech_dir, more):
    for name, offloaded in (("plain", []), ("light", ["--teacher_offload"])):
        arguments = options(teacher_dir, speech_dir, tmp_path / name, *more, *offloaded)
        ended = run_here(monkeypatch, capsys, *arguments)
        assert ended.returncode == 0, ended.stderr
    plain, light = weights(tmp_path / "plain"), weights(tmp_path / "light")
    assert all(torch.equal(light[name], weight) for name, weight in plain.items())


def test_cached_labels_say_what_made_them(monkeypatch, capsys, tmp_path, teacher_dir, speech_dir):
    def label(cache: str, run: str, *more: str):
        caches = ["--teacher_cache_dir", tmp_path / cache, "--teacher_top_k", 8]
        arguments = options(teacher_dir, speech_dir, tmp_path / run, *caches, *more)
        return run_here(monkeypatch, capsys, *arguments)

    assert label("full", "a").returncode == 0
    assert label("offloaded", "b", "--teacher_offload").returncode == 0
    assert label("int8", "c", "--teacher_dtype", "int8").returncode == 0
    full, offloaded, int8 = (load_from_disk(str(tmp_path / name)) for name in ("full", "offloaded", "int8"))
    columns = [name for name in full.column_names if name.startswith("teacher_")]
    assert all(full[name][:] == offloaded[name][:] for name in columns)  # settings included: nothing differs
    settings = json.loads(int8[SETTINGS_COLUMN][0])
    assert settings["computed_in"] == "float32 with int8 weights"
    assert settings["weights"] == json.loads(full[SETTINGS_COLUMN][0])["weights"]  # of what was rounded
    assert int8["teacher_log_probs"][0] != full["teacher_log_probs"][0]
    mixed = label("full", "d", "--teacher_dtype", "int8")
    assert (
        mixed.returncode == 2
        and "was created with computed_in float32 (now float32 with int8 weights)" in mixed.stderr
    )


def test_without_torchao_the_extra_is_named_before_anything_is_loaded(monkeypatch, capsys, tmp_path, teacher_dir):
    monkeypatch.setattr(teacher_memory, "is_torchao_available", lambda version: False)
    arguments = options(teacher_dir, tmp_path / "nothing", tmp_path / "run", "--teacher_dtype", "int8")
    ended = run_here(monkeypatch, capsys, *arguments)
    assert ended.returncode == 2
    assert "--teacher_dtype int8 requires torchao" in ended.stderr and "pip install 'askd-hf[int8]'" in ended.stderr
