"""LoRA: only the adapter is trained and saved, and the finished student is a plain Whisper."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from training import Clips, collate, history, options
from transformers import WhisperForConditionalGeneration

from askd_hf import ASKDConfig, ASKDTrainer, UserError
from askd_hf.arguments import CacheArguments
from askd_hf.models.lora import LoraArguments, load_adapter, merged, with_lora
from askd_hf.models.student import same_encoder
from askd_hf.training.run_dir import check_directories

BOTH_PHASES = dict(teacher_weight=0.8, teacher_phase_ratio=0.6, self_weight=0.3)


def make_trainer(output_dir, teacher, student, processor=None, lora=None, eval_dataset=None, **changes) -> ASKDTrainer:
    config = ASKDConfig(**options(output_dir, **(BOTH_PHASES | changes)))
    torch.manual_seed(0)
    adapter = with_lora(copy.deepcopy(student), lora or LoraArguments(lora_r=4), config.freeze_encoder)
    return ASKDTrainer(
        model=adapter,
        args=config,
        teacher_model=copy.deepcopy(teacher),
        train_dataset=Clips(student.config),
        eval_dataset=eval_dataset,
        data_collator=collate,
        processing_class=processor,
    )


@torch.no_grad()
def logits(model, student) -> torch.Tensor:
    batch = collate(list(Clips(student.config, clips=4)))
    ids = batch["labels"].clamp(min=0)
    return model.eval()(input_features=batch["input_features"], decoder_input_ids=ids).logits


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_the_finished_student_has_the_adapters_logits_and_is_a_plain_whisper(
    tmp_path, teacher, student, processor, dora
):
    trainer = make_trainer(tmp_path, teacher, student, processor, LoraArguments(lora_r=4, use_dora=dora))
    trainer.train()
    trainer.save_model()
    expected = logits(trainer.adapter, student)
    saved = WhisperForConditionalGeneration.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(saved, student), expected, rtol=0, atol=1e-4)
    assert (expected - logits(student, student)).abs().max() > 0.1  # it has learnt something
    weights = load_file(tmp_path / "model.safetensors")
    assert not any("lora" in name or "base_layer" in name for name in weights)
    assert weights.keys() == {name for name in student.state_dict() if name != "proj_out.weight"}
    assert not list(tmp_path.glob("adapter*"))
    assert json.loads((tmp_path / "training.json").read_text())["arguments"]["lora_r"] == 4
    # the trainer's own model is still the one with the adapter
    assert any("lora" in name for name, _ in trainer.model.named_parameters())


def test_a_directory_called_checkpoints_is_none(tmp_path, teacher, student, processor):
    trainer = make_trainer(tmp_path / "checkpoints", teacher, student, processor, LoraArguments(lora_r=2))
    trainer.save_model()
    assert not list((tmp_path / "checkpoints").glob("adapter*"))
    WhisperForConditionalGeneration.from_pretrained(tmp_path / "checkpoints")
    with pytest.raises(UserError, match="checkpoint-3: such names are those of checkpoints, choose another one"):
        check_directories(ASKDConfig(output_dir=str(tmp_path / "checkpoint-3"), use_cpu=True), CacheArguments())


@pytest.mark.slow
def test_the_student_loads_where_there_is_no_peft(tmp_path, teacher, student, processor):
    make_trainer(tmp_path, teacher, student, processor, max_steps=1).save_model()
    code = "import sys; sys.modules['peft'] = None\n"
    code += "from transformers import WhisperForConditionalGeneration as W\n"
    code += f"print(W.from_pretrained({str(tmp_path)!r}).num_parameters())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == str(student.num_parameters()), done.stderr


def test_only_the_adapter_is_trained_averaged_and_saved(tmp_path, teacher, student):
    trainer = make_trainer(tmp_path, teacher, student, save_strategy="steps", save_steps=8)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all("lora" in name and ".decoder." in name for name in changed)
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trainer.blend.self_teacher.parameters.keys() == trained == changed
    checkpoint = tmp_path / "checkpoint-8"
    assert not (checkpoint / "model.safetensors").exists()
    saved = load_file(checkpoint / "adapter_model.safetensors")
    assert len(saved) == len(trained) and all("lora" in name for name in saved)
    average = load_file(checkpoint / "self_teacher.safetensors")
    assert average.keys() == trained
    size = sum(t.numel() for t in saved.values())
    # the self-teacher is another adapter, and no second model
    assert sum(t.numel() for t in average.values()) == size < 0.2 * trainer.model.num_parameters()
    assert size == sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)


def test_a_resumed_run_ends_with_the_same_adapter(tmp_path, teacher, student):
    saving = dict(save_strategy="steps", save_steps=3, max_steps=8)
    whole = make_trainer(tmp_path / "a", teacher, student, **saving)
    whole.train()
    resumed = make_trainer(tmp_path / "a", teacher, student, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-6"))
    assert resumed.state.global_step == 8
    for name, weight in whole.adapter.state_dict().items():
        assert torch.equal(resumed.adapter.state_dict()[name], weight), name
    assert torch.equal(history(whole, "loss")[-2:], history(resumed, "loss")[-2:])


def test_adapters_on_the_frozen_encoder_do_not_prevent_resuming(tmp_path, student):
    """`target_modules` of both parts: those of the encoder stay as they were initialized, at random."""

    def run(seed: int) -> ASKDTrainer:
        torch.manual_seed(seed)
        return ASKDTrainer(
            model=copy.deepcopy(student),
            args=ASKDConfig(**options(tmp_path, preset="ce", save_strategy="steps", save_steps=4)),
            train_dataset=Clips(student.config),
            data_collator=collate,
            peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
        )

    whole, resumed = run(seed=0), run(seed=1)
    pairs = zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True)
    differing = [name for (name, a), b in pairs if not torch.equal(a, b)]
    assert sum(".encoder." in name for name in differing) == 4  # lora_A of 2 modules in 2 layers
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for (name, weight), again in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(weight, again), name


def test_the_teacher_hears_what_an_adapter_of_the_frozen_encoder_changes(tmp_path, teacher, student):
    """The adapter was trained before. The teacher has the student's encoder, but not its adapter."""
    adapter = get_peft_model(copy.deepcopy(student), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    assert same_encoder(student, adapter.get_base_model())  # a new one changes nothing
    for name, weight in adapter.named_parameters():
        if ".encoder." in name and ".lora_B." in name:
            torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(0))
    trainer = ASKDTrainer(
        model=adapter,
        args=ASKDConfig(**options(tmp_path, preset="kd", freeze_encoder=True)),
        teacher_model=copy.deepcopy(student),
        train_dataset=Clips(student.config),
        data_collator=collate,
    )
    assert not trainer.runner.teacher_has_student_encoder
    batch = collate(list(Clips(student.config, clips=2)))
    inputs = trainer.runner.model_inputs(batch)
    positions = trainer.runner.positions_of(batch)
    trainer.runner.encode(trainer.model, inputs, with_states=False)
    heard, _ = trainer.runner.teacher_target(batch, inputs, positions)
    with torch.no_grad():
        alone = student.eval().model(**trainer.runner.model_inputs(batch)).last_hidden_state.flatten(0, 1)[positions]
    torch.testing.assert_close(heard.hidden, alone)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_dropout_of_an_adapter_makes_a_frozen_encoder_random(tmp_path, student, dropout):
    lora = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=dropout)
    trainer = ASKDTrainer(
        model=copy.deepcopy(student),
        args=ASKDConfig(**options(tmp_path, preset="ce", freeze_encoder=True)),
        train_dataset=Clips(student.config),
        data_collator=collate,
        peft_config=lora,
    )
    assert trainer.runner.encoder_is_fixed() == (dropout == 0.0)


def test_a_checkpoint_of_another_adapter_is_refused(tmp_path, teacher, student):
    make_trainer(tmp_path, teacher, student, save_strategy="steps", save_steps=4, max_steps=4).train()
    checkpoint = tmp_path / "checkpoint-4"
    for arguments in (LoraArguments(lora_r=2), LoraArguments(lora_r=4, lora_target_modules=["q_proj"])):
        other = with_lora(copy.deepcopy(student), arguments, freeze_encoder=True)
        with pytest.raises(UserError, match="has another adapter"):
            load_adapter(other, checkpoint)
    (checkpoint / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="is not a checkpoint of a run with LoRA"):
        load_adapter(other, checkpoint)


def test_what_is_adapted(student):
    def adapted(**arguments) -> set[str]:
        freeze = arguments.pop("freeze_encoder", True)
        model = with_lora(copy.deepcopy(student), LoraArguments(lora_r=2, **arguments), freeze).get_base_model()
        return {name.partition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}

    everything = adapted()
    assert len(everything) == 2 * 10 and not any(".encoder." in name for name in everything)
    assert len(adapted(freeze_encoder=False)) == 2 * 10 + 2 * 6
    assert {name.rpartition(".")[2] for name in adapted(lora_target_modules=["q_proj", "fc1"])} == {"q_proj", "fc1"}
    with pytest.raises(UserError, match="--lora_target_modules must be among fc1, fc2, k_proj"):
        adapted(lora_target_modules=["query"])


@pytest.mark.parametrize(
    ("peft_config", "message"),
    [
        (
            IA3Config(target_modules=["k_proj", "fc2"], feedforward_modules=["fc2"]),
            "must be a LoraConfig.* IA3: only",
        ),
        (LoHaConfig(target_modules=["q_proj"]), "must be a LoraConfig, got one of type LOHA: only"),
        (LoraConfig(r=2, target_modules=["q_proj", "proj_out"]), "Leave proj_out out of target_modules"),
        (LoraConfig(r=2, target_modules=["embed_tokens"]), "Leave embed_tokens out of target_modules"),
    ],
    ids=["IA3", "LoHa", "output projection", "embeddings"],
)
@pytest.mark.parametrize("already_on_model", [False, True])
def test_adapters_that_would_not_be_trained_are_refused(tmp_path, student, peft_config, message, already_on_model):
    given = dict(peft_config=copy.deepcopy(peft_config))
    if already_on_model:
        student, given = get_peft_model(student, given["peft_config"]), {}
    config = ASKDConfig(**options(tmp_path, preset="ce"))
    with pytest.raises(UserError, match=message):
        ASKDTrainer(student, config, train_dataset=Clips(student.config), data_collator=collate, **given)


def test_merging_leaves_the_adapter_alone(student):
    adapter = with_lora(copy.deepcopy(student), LoraArguments(lora_r=2), freeze_encoder=True)
    before = {name: weight.clone() for name, weight in adapter.state_dict().items()}
    plain = merged(adapter)
    assert type(plain) is WhisperForConditionalGeneration and isinstance(adapter, PeftModel)
    assert all(torch.equal(weight, before[name]) for name, weight in adapter.state_dict().items())


def test_checkpoints_of_an_adapter_are_not_published(tmp_path, teacher, student):
    with pytest.raises(UserError, match="--hub_strategy must be end for an adapter"):
        make_trainer(tmp_path, teacher, student, push_to_hub=True, hub_strategy="every_save")


def test_the_best_adapter_is_the_one_that_is_kept(tmp_path, teacher, student):
    config = dict(save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2, max_steps=6)
    config |= dict(load_best_model_at_end=True, metric_for_best_model="loss", predict_with_generate=False)
    trainer = make_trainer(tmp_path, teacher, student, eval_dataset=Clips(student.config, seed=2), **config)
    trainer.train()
    best = tmp_path / f"checkpoint-{trainer.state.best_global_step}"
    saved = load_file(best / "adapter_model.safetensors")
    ours = {name.replace(".default", ""): weight for name, weight in trainer.adapter.state_dict().items()}
    assert saved and all(torch.equal(ours[name], weight) for name, weight in saved.items())
    losses = {row["step"]: row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row}
    assert trainer.state.best_global_step == min(losses, key=losses.get)
