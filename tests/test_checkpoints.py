"""Checkpoints as the community has them: of old versions, by plain PEFT, cut off, or of other models."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from models import make_multilingual, make_processor, make_whisper
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from scripts import ROOT, run_here
from speech import write_speech
from transformers import T5Config, Wav2Vec2Config, WhisperForConditionalGeneration, pipeline

from askd_hf.commands.select_heads import has_alignment_heads
from askd_hf.errors import UserError
from askd_hf.hub.provenance import stored_vocabulary
from askd_hf.models.generation_config import complete, is_multilingual, missing_fields, set_language
from askd_hf.models.loading import check_processor, load_config, load_processor, load_whisper
from askd_hf.models.lora import is_adapter

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4665aa\nsize 151060136\n"


def edit(file: Path, *removed: str, **changes) -> None:
    values = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in values.items() if name not in removed} | changes))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """`english` and `multilingual`, whole."""
    folder = tmp_path_factory.mktemp("models")
    processor = make_processor()
    pairs = {"english": (make_whisper(processor), processor), "multilingual": make_multilingual()}
    for name, (model, its) in pairs.items():
        model.save_pretrained(folder / name)
        its.save_pretrained(folder / name)
    return folder


@pytest.fixture
def multilingual(models, tmp_path) -> Path:
    return Path(shutil.copytree(models / "multilingual", tmp_path / "multilingual"))


@pytest.fixture
def english(models, tmp_path) -> Path:
    return Path(shutil.copytree(models / "english", tmp_path / "english"))


# ---- generation configs of other times ----


def without_file(directory: Path) -> None:
    (directory / "generation_config.json").unlink()


def with_ids_alone(directory: Path) -> None:
    """As `save_pretrained` of 2022 left it."""
    ids = {"bos_token_id": 27, "decoder_start_token_id": 28, "eos_token_id": 27, "pad_token_id": 27}
    forced = {"forced_decoder_ids": [[1, 30], [2, 32], [3, 33]]}
    (directory / "generation_config.json").write_text(json.dumps(ids | forced | {"_from_model_config": True}))
    edit(directory / "config.json", **forced)


def with_model_config_alone(directory: Path) -> None:
    without_file(directory)
    edit(directory / "config.json", forced_decoder_ids=[[1, 30], [2, 32], [3, 33]], suppress_tokens=[], max_length=32)


@pytest.mark.parametrize("age", [without_file, with_ids_alone, with_model_config_alone])
def test_an_old_generation_config_is_completed_from_the_tokenizer(multilingual, age):
    edit(multilingual / "generation_config.json", max_length=32)  # the decoder's positions
    expected = load_whisper(str(multilingual)).generation_config
    age(multilingual)
    model, processor = load_whisper(str(multilingual)), load_processor(str(multilingual))
    for name in ("is_multilingual", "lang_to_id", "task_to_id", "no_timestamps_token_id", "max_length"):
        assert getattr(model.generation_config, name) == getattr(expected, name), name
    if age is not without_file:  # what it was trained for is still the default
        assert (model.generation_config.language, model.generation_config.task) == ("zh", "transcribe")
    features = torch.zeros(1, 8, 100)
    for language, code in (("english", "en"), ("zh", "zh")):
        set_language(model, processor, language, "transcribe")
        assert model.generation_config.language == code
        model.generate(features, language=code, task="translate")
    with pytest.raises(UserError, match="--language must be one of en, zh, got 'french'"):
        set_language(model, processor, "french", "transcribe")


@pytest.mark.parametrize("age", [without_file, with_ids_alone])
def test_an_old_english_only_model_stays_english_only(english, age):
    age(english)
    if age is with_ids_alone:
        edit(english / "config.json", forced_decoder_ids=[[1, 30]])
    model = load_whisper(str(english))
    assert not is_multilingual(model) and not missing_fields(model)
    assert not hasattr(model.generation_config, "lang_to_id")
    assert model.generation_config.no_timestamps_token_id == 30
    assert model.generate(torch.zeros(1, 8, 100)).shape[1] <= 32


def test_what_a_generation_config_says_is_left_alone(multilingual):
    model, processor = load_whisper(str(multilingual)), load_processor(str(multilingual))
    del model.generation_config.task_to_id
    model.generation_config.lang_to_id = {"<|zh|>": 30}
    model.generation_config.max_length = 7
    complete(model, processor.tokenizer)
    config = model.generation_config
    assert config.lang_to_id == {"<|zh|>": 30} and config.max_length == 7
    assert config.task_to_id == {"transcribe": 32, "translate": 31}


def test_alignment_heads_of_layers_that_are_not_there_go(multilingual, caplog):
    edit(multilingual / "generation_config.json", alignment_heads=[[1, 0], [23, 1]])
    assert not hasattr(load_whisper(str(multilingual)).generation_config, "alignment_heads")
    assert "no word timestamps" in caplog.text


def test_a_student_of_an_old_teacher_speaks_its_language(monkeypatch, capsys, tmp_path, multilingual):
    """distill.py, and the saved directory by itself: generate(language=) and pipeline."""
    with_model_config_alone(multilingual)
    speech = write_speech(tmp_path / "speech", 4)
    run = f"--teacher {multilingual} --dataset {speech} --eval_dataset {speech} --language zh --max_steps 1"
    run += f" --generation_max_length 8 --use_cpu True --output_dir {tmp_path / 'run'} --report_to none"
    ended = run_here(monkeypatch, capsys, *run.split())
    assert ended.returncode == 0, ended.stderr
    saved = json.loads((tmp_path / "run" / "generation_config.json").read_text())
    assert saved["lang_to_id"] == {"<|en|>": 29, "<|zh|>": 30} and saved["is_multilingual"] is True
    assert (saved["language"], saved["task"]) == ("zh", "transcribe") and saved.get("forced_decoder_ids") is None
    transcribe = pipeline("automatic-speech-recognition", model=str(tmp_path / "run"))
    sound = {"raw": torch.zeros(8000).numpy(), "sampling_rate": 16_000}
    transcribe(sound, generate_kwargs={"language": "en", "task": "translate", "max_new_tokens": 3})


def test_other_scripts_take_an_old_checkpoint_too(monkeypatch, capsys, tmp_path, multilingual):
    without_file(multilingual)
    speech = write_speech(tmp_path / "speech", 4)
    both = f"--dataset {speech} --language zh"
    decoding = f"{both} --generation_max_length 8 --device cpu"
    labels = f"--teacher_cache_dir {tmp_path / 'c'} --teacher_top_k 4 --use_cpu True"
    commands = {
        "evaluate": f"--model {multilingual} {decoding} --output_dir {tmp_path / 'e'}",
        "pseudo_label": f"--teacher {multilingual} {decoding} --wer_threshold inf --output_dir {tmp_path / 'p'}",
        "cache_teacher": f"--teacher {multilingual} {both} {labels}",
    }
    for name, command in commands.items():
        ended = run_here(monkeypatch, capsys, *command.split(), file=ROOT / "examples" / f"{name}.py")
        # what random weights say may be too bad to be kept
        assert ended.returncode == 0 or "0 of 4 transcripts are kept" in ended.stdout, (name, ended.stderr)


# ---- tokenizers of other times ----


def in_the_old_way(directory: Path, tokenizer_class: str = "WhisperTokenizer") -> None:
    """vocab.json, merges.txt, added_tokens.json, special_tokens_map.json, preprocessor_config.json."""
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    added = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    end = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    files = {
        "vocab.json": tokenizer["model"]["vocab"],
        "added_tokens.json": added,
        "special_tokens_map.json": end | {"additional_special_tokens": list(added)},
        "tokenizer_config.json": {"tokenizer_class": tokenizer_class, "add_prefix_space": False},
        "preprocessor_config.json": json.loads((directory / "processor_config.json").read_text())["feature_extractor"],
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    for name in ("tokenizer.json", "processor_config.json", "normalizer.json"):
        (directory / name).unlink(missing_ok=True)


@pytest.mark.parametrize("tokenizer_class", ["WhisperTokenizer", "WhisperTokenizerFast"])
@pytest.mark.parametrize(
    "removed",
    [(), ("added_tokens.json",), ("special_tokens_map.json",), ("tokenizer_config.json", "special_tokens_map.json")],
)
def test_an_old_tokenizer_gives_the_same_tokens_and_texts(models, multilingual, tokenizer_class, removed):
    expected = load_processor(str(models / "multilingual")).tokenizer
    in_the_old_way(multilingual, tokenizer_class)
    for name in removed:
        (multilingual / name).unlink()
    processor = load_processor(str(multilingual))
    check_processor(load_whisper(str(multilingual)), processor)
    tokenizer = processor.tokenizer
    for one in (expected, tokenizer):
        one.set_prefix_tokens(language="zh", task="transcribe")
    ids = expected("abc").input_ids
    assert tokenizer("abc").input_ids == ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == expected.decode(ids, skip_special_tokens=True) == "abc"
    assert tokenizer.pad_token_id == expected.pad_token_id
    tokenizer.save_pretrained(multilingual / "again")  # as a student is saved
    again = type(tokenizer).from_pretrained(multilingual / "again")
    assert again.decode(ids, skip_special_tokens=True) == "abc"


@pytest.mark.parametrize("removed", ["vocab.json", "merges.txt"])
def test_half_a_tokenizer_is_named(multilingual, removed):
    in_the_old_way(multilingual)
    (multilingual / removed).unlink()
    with pytest.raises(UserError, match=r"no complete Whisper processor .*vocab\.json and merges\.txt"):
        load_processor(str(multilingual))


def test_no_tokenizer_at_all_is_named(multilingual):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (multilingual / name).unlink()
    with pytest.raises(UserError, match=r"its tokenizer has \d tokens and no <\|startoftranscript\|>"):
        load_processor(str(multilingual))


def test_another_models_tokenizer_is_named(models, english, multilingual):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(multilingual / name, english / name)
    with pytest.raises(UserError, match=r"has a vocabulary of 31 tokens, but its tokenizer has ids up to 33"):
        check_processor(load_whisper(str(english)), load_processor(str(english)))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(models / "english" / name, multilingual / name)
    with pytest.raises(UserError, match=r"<\|notimestamps\|> is 33 in its config, 30 in its tokenizer"):
        check_processor(load_whisper(str(multilingual)), load_processor(str(multilingual)))


def test_a_padded_vocabulary_is_no_mistake(models, tmp_path):
    processor = make_processor()
    make_whisper(processor, vocab_size=64).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model = load_whisper(str(tmp_path))
    check_processor(model, load_processor(str(tmp_path)))
    assert not is_multilingual(model)


# ---- files that aren't whole ----


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def as_bin(directory: Path) -> Path:
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    return directory / "pytorch_model.bin"


def as_shards(directory: Path) -> list[Path]:
    model = WhisperForConditionalGeneration.from_pretrained(directory)
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size="20KB")
    return sorted(directory.glob("model-*.safetensors"))


POINTED = ["model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "processor_config.json"]


@pytest.mark.parametrize("name", POINTED)
def test_a_git_lfs_pointer_is_named(english, name):
    (english / name).write_text(POINTER)
    for load in (load_whisper, load_processor):
        with pytest.raises(UserError, match=rf"{name} is only a Git LFS pointer .* bytes.*pull"):
            load(str(english))


@pytest.mark.parametrize("name", POINTED)
def test_a_file_cut_off_is_named(english, name):
    cut(english / name)
    with pytest.raises(UserError, match=rf"{name} is incomplete .*\([\d,]+ bytes") as error:
        load_whisper(str(english))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("spoil", [cut, lambda file: file.write_bytes(b""), lambda file: file.write_text(POINTER)])
def test_weights_of_torch_are_named_too(english, spoil):
    spoil(as_bin(english))
    with pytest.raises(UserError, match=r"pytorch_model\.bin is"):
        load_whisper(str(english))


def test_a_shard_that_is_missing_or_cut_off_is_named(english):
    shards = as_shards(english)
    assert len(shards) > 2 and load_whisper(str(english)).config.d_model == 16
    cut(shards[1])
    with pytest.raises(UserError, match=rf"{shards[1].name} is incomplete"):
        load_whisper(str(english))
    shards[1].unlink()
    with pytest.raises(UserError, match=rf"lacks {shards[1].name}, listed in model.safetensors.index.json"):
        load_whisper(str(english))


def test_whole_weights_count_and_not_a_pointer_beside_them(english):
    (english / "pytorch_model.bin").write_text(POINTER)
    assert load_whisper(str(english)).config.d_model == 16


def test_weights_that_are_missing_or_of_another_shape_are_named(english):
    file = english / "model.safetensors"
    weights = load_file(file)
    lacking = {name: weight for name, weight in weights.items() if "decoder.layers.2." not in name}
    save_file(lacking, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"its weights lack model\.decoder\.layers\.2\.\S+, .* and \d+ more"):
        load_whisper(str(english))
    narrow = weights | {"model.decoder.layers.1.fc1.weight": torch.zeros(8, 16)}
    save_file(narrow, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.1\.fc1\.weight is \(8, 16\), but \(32, 16\) in config\.json"):
        load_whisper(str(english))
    save_file(weights, file, metadata={"format": "pt"})
    edit(english / "config.json", decoder_layers=3)
    with pytest.raises(
        UserError, match=r"its weights have model\.decoder\.layers\.3.* config\.json has no such layers"
    ):
        load_whisper(str(english))


def test_what_is_computed_may_be_missing(english):
    file = english / "model.safetensors"
    weights = load_file(file)
    expected = load_whisper(str(english)).model.encoder.embed_positions.weight
    weights.pop("model.encoder.embed_positions.weight")
    save_file(weights, file, metadata={"format": "pt"})
    assert torch.allclose(load_whisper(str(english)).model.encoder.embed_positions.weight, expected, atol=1e-6)


@pytest.mark.parametrize("config", [Wav2Vec2Config(), T5Config()], ids=["Wav2Vec2", "T5"])
def test_another_architecture_is_named(english, config):
    config.save_pretrained(english)
    with pytest.raises(UserError, match=f"is a '{config.model_type}' model, not Whisper"):
        load_whisper(str(english))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: edit(d / "config.json", "model_type"), "can't be loaded: .*model_type"),
        (
            lambda d: (d / "config.json").unlink(),
            "has no config.json: expected a Hub id or a directory with config.json and",
        ),
        (
            lambda d: (d / "model.safetensors").rename(d / "tf_model.h5"),
            "has no weights: .*Convert TensorFlow's tf_model.h5",
        ),
    ],
)
def test_a_directory_of_something_else_is_named(english, spoil, message):
    spoil(english)
    with pytest.raises(UserError, match=message):
        load_whisper(str(english))


def test_a_file_is_no_model(english):
    with pytest.raises(
        UserError, match=r"model\.safetensors is a file: expected a Hub id or a directory with config\.json and"
    ):
        load_whisper(str(english / "model.safetensors"))


# ---- adapters by plain PEFT ----


@pytest.fixture
def adapter(english, tmp_path) -> Path:
    """As `PeftModel.save_pretrained` leaves it: no processor, no generation config."""
    model = WhisperForConditionalGeneration.from_pretrained(english)
    torch.manual_seed(0)
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    peft.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_models_and_adapters_in_the_home_directory_are_found(monkeypatch, english, adapter):
    monkeypatch.setenv("HOME", str(english.parent))
    for directory in (english, adapter):
        there, same = load_whisper(str(directory)), load_whisper(f"~/{directory.name}")
        assert all(torch.equal(weight, same.state_dict()[name]) for name, weight in there.state_dict().items())
        tokenizer = load_processor(f"~/{directory.name}").tokenizer
        assert tokenizer.get_vocab() == load_processor(str(directory)).tokenizer.get_vocab()
        assert is_adapter(f"~/{directory.name}") == (directory == adapter)
    assert load_config(f"~/{english.name}").to_dict() == load_config(str(english)).to_dict()
    assert stored_vocabulary(f"~/{english.name}") == load_config(str(english)).vocab_size
    assert not has_alignment_heads(f"~/{english.name}")
    edit(english / "generation_config.json", alignment_heads=[[1, 0]])
    assert has_alignment_heads(f"~/{english.name}")
    with pytest.raises(UserError, match="no such file or directory"):
        load_whisper("~/nothing")


def test_an_adapter_takes_its_processor_from_its_base(english, adapter):
    files = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert {file.name for file in adapter.iterdir()} <= files
    model, base = load_whisper(str(adapter)), load_whisper(str(english))
    check_processor(model, load_processor(str(adapter)))
    name = "model.decoder.layers.1.self_attn.q_proj.weight"
    low_rank = load_file(adapter / "adapter_model.safetensors")
    prefix = f"base_model.model.{name.removesuffix('.weight')}"
    added = low_rank[f"{prefix}.lora_B.weight"] @ low_rank[f"{prefix}.lora_A.weight"] * 8 / 2  # alpha / r
    assert torch.allclose(model.state_dict()[name], base.state_dict()[name] + added, atol=1e-5)


def test_scripts_take_an_adapter_of_plain_peft(monkeypatch, capsys, tmp_path, adapter):
    speech = write_speech(tmp_path / "speech", 4)
    run = f"--student {adapter} --dataset {speech} --max_steps 1 --use_cpu True --output_dir {tmp_path / 'run'}"
    ended = run_here(monkeypatch, capsys, *run.split(), file=ROOT / "examples" / "finetune.py")
    assert ended.returncode == 0, ended.stderr
    assert load_whisper(str(tmp_path / "run")).config.d_model == 16


def test_an_adapter_that_does_not_fit_or_is_not_whole_is_named(english, adapter):
    other = make_whisper(make_processor(), decoder_layers=2)
    base = english.parent / "smaller"
    other.save_pretrained(base)
    edit(adapter / "adapter_config.json", base_model_name_or_path=str(base))
    with pytest.raises(UserError, match=r"doesn't fit its base, .*smaller: the base has no .*decoder\.layers\.[23]"):
        load_whisper(str(adapter))
    edit(adapter / "adapter_config.json", base_model_name_or_path=str(english), r=4)
    with pytest.raises(UserError, match="doesn't fit its base"):
        load_whisper(str(adapter))
    edit(adapter / "adapter_config.json", r=2)
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({name: weight for name, weight in weights.items() if "layers.1." not in name}, file)
    with pytest.raises(UserError, match=r"doesn't fit its base.*missing adapter keys"):
        load_whisper(str(adapter))
    cut(file)
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is incomplete"):
        load_whisper(str(adapter))
    file.write_text(POINTER)
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is only a Git LFS pointer"):
        load_processor(str(adapter))
    edit(adapter / "adapter_config.json", base_model_name_or_path=str(english / "gone"))
    file.unlink()
    with pytest.raises(UserError, match="no weights of the adapter"):
        load_whisper(str(adapter))


def test_the_base_of_an_adapter_that_is_gone_or_not_whole_is_named(english, adapter):
    (english / "model.safetensors").write_text(POINTER)
    with pytest.raises(UserError, match=r"english/model\.safetensors is only a Git LFS pointer"):
        load_whisper(str(adapter))
    shutil.rmtree(english)
    with pytest.raises(UserError, match=r"no such file or directory: .*english"):
        load_processor(str(adapter))


def test_words_behind_the_timestamps_are_named(caplog):
    """As `add_tokens` and `resize_token_embeddings` make them: no transcript has them."""
    processor = make_processor()
    before = len(processor.tokenizer)
    processor.tokenizer.add_tokens([f"<|{0.02 * i:.2f}|>" for i in range(1501)] + ["kwaheri"])
    model = make_whisper(processor)
    model.generation_config.no_timestamps_token_id = before - 1
    check_processor(model, processor)
    assert "1 tokens behind the timestamps, such as 'kwaheri'" in caplog.text
