"""Export to ONNX: onnxruntime gives the logits and the texts of transformers."""

import json
import sys
from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from models import MULTILINGUAL, SPECIAL, make_processor, make_tokenizer, make_whisper
from scripts import ROOT
from spoken_digits import TEACHER
from traced_once import traced_once
from transformers import WhisperFeatureExtractor, WhisperProcessor

from askd_hf.arguments.export import ExportArguments
from askd_hf.commands.export import export
from askd_hf.errors import UserError
from askd_hf.export import onnx_graphs
from askd_hf.export.comparison import transformers_transcriber, word_errors
from askd_hf.export.onnx import (
    OnnxWhisper,
    check_extra,
    export_onnx,
    onnx_transcriber,
    portable_generation_config,
    restrictions,
)
from askd_hf.models.generation_config import set_language
from askd_hf.models.smaller_vocabulary import choose_tokens, smaller_tokenizer, with_smaller_vocabulary
from askd_hf.models.window import crop_window, with_window_of

FOLDED = 512 * 512  # numbers; the exporter stores the transposed copy of a smaller embedding
SPEECH = ROOT / "examples" / "demo" / "data" / "studio"


def english():
    """English-only, with suppressed tokens, alignment heads, and an embedding too large to be folded.

    Its rows behind the tokenizer's are 0, as those that pad a vocabulary.
    """
    processor = make_processor()
    model = make_whisper(processor, encoder_layers=1, decoder_layers=2, vocab_size=FOLDED // 16 + 1).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight[len(processor.tokenizer) :] = 0
    model.generation_config.suppress_tokens = [3, 8]
    model.generation_config.begin_suppress_tokens = [19]
    model.generation_config.alignment_heads = [[1, 0]]
    return model, processor


def reduced():
    """Multilingual, with a window cropped to 1 s and without some tokens."""
    merges = [("a", "b"), ("ab", "c"), ("d", "e"), ("f", "g")]
    tokenizer = make_tokenizer("abcdefghijklmnopqrstuvwxyzĠ", [*SPECIAL[:2], *MULTILINGUAL, *SPECIAL[2:]], merges)
    processor = WhisperProcessor(WhisperFeatureExtractor(feature_size=8, chunk_length=2), tokenizer)
    model = make_whisper(processor, seed=3, max_source_positions=100, encoder_layers=1, decoder_layers=2)
    token = tokenizer.convert_tokens_to_ids
    model.generation_config.is_multilingual = True
    model.generation_config.lang_to_id = {name: token(name) for name in ("<|en|>", "<|zh|>")}
    model.generation_config.task_to_id = {name: token(f"<|{name}|>") for name in ("transcribe", "translate")}
    crop_window(model, 1)
    kept = choose_tokens(tokenizer, Counter({"ab": 1}), 1)
    smaller = smaller_tokenizer(tokenizer, model.config.vocab_size, kept, 1)
    assert len(smaller) < len(tokenizer)
    model = with_smaller_vocabulary(model, tokenizer, smaller, 1).eval()
    processor = with_window_of(model, WhisperProcessor(processor.feature_extractor, smaller))
    set_language(model, processor, "zh", "transcribe")
    return model, processor


@pytest.fixture(scope="module", params=[english, pytest.param(reduced, marks=pytest.mark.slow)])
def exported(request, tmp_path_factory):
    """A model, its processor, and its exported directories by type. Its graphs are traced once."""
    model, processor = request.param()
    directory = tmp_path_factory.mktemp("onnx")
    with traced_once(model, directory) as patch:
        export_onnx(model, processor, directory / "f32")
        export_onnx(model, processor, directory / "int8", "int8")
        patch.setattr(onnx_graphs, "LARGEST_FILE", 10_000)
        export_onnx(model, processor, directory / "large")
    return model, processor, directory


def waves(count: int) -> list[np.ndarray]:
    return [np.random.default_rng(seed).normal(0, 0.02 * 4**seed, 16_000).astype(np.float32) for seed in range(count)]


@torch.no_grad()
def logits(model, features: torch.Tensor, tokens: torch.Tensor) -> np.ndarray:
    return model(input_features=features, decoder_input_ids=tokens, use_cache=False).logits.numpy()


@pytest.mark.parametrize("parts", [[1], [4], [1, 1, 1], [3, 1, 1, 1], [2, 3], [31]], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_the_logits_are_those_of_transformers_with_and_without_earlier_steps(exported, parts, batch):
    model, _, directory = exported
    generator = torch.Generator().manual_seed(batch)
    features = torch.randn(batch, 8, 100, generator=generator)
    tokens = torch.randint(0, model.config.vocab_size, (batch, sum(parts)), generator=generator)
    runtime = OnnxWhisper(directory / "f32")
    states, past, found = runtime.encode(features.numpy()), None, []
    for part in tokens.split(parts, dim=1):
        step, past = runtime.decode(part.numpy(), states, past)
        found.append(step)
    expected = logits(model, features, tokens)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(np.concatenate(found, axis=1), expected, atol=2e-5)


def test_without_earlier_steps_what_they_are_said_to_be_is_ignored(exported):
    """optimum gives tensors with one position then."""
    model, _, directory = exported
    features, tokens = torch.randn(2, 8, 100), torch.randint(0, model.config.vocab_size, (2, 3))
    runtime = OnnxWhisper(directory / "f32")
    names = [value.name for value in runtime.decoder.get_inputs() if value.name.startswith("past")]
    inputs = dict.fromkeys(names, np.ones((2, runtime.heads, 1, runtime.width), np.float32))
    inputs |= {"input_ids": tokens.numpy(), "encoder_hidden_states": runtime.encode(features.numpy())}
    found = runtime.decoder.run(["logits"], inputs | {"use_cache_branch": np.array([False])})[0]
    np.testing.assert_allclose(found, logits(model, features, tokens), atol=2e-5)


@pytest.mark.parametrize("name", ["f32", "large"])
def test_the_texts_are_those_of_transformers(exported, name):
    model, processor, directory = exported
    expected = [*map(transformers_transcriber(model, processor), waves(4))]
    assert [*map(onnx_transcriber(directory / name, processor), waves(4))] == expected
    assert max(map(len, expected)) > 8


def test_the_language_is_that_of_the_prompt(exported):
    model, processor, directory = exported
    if model.generation_config.is_multilingual:
        set_language(model, processor, "en", "translate")
        expected = [*map(transformers_transcriber(model, processor), waves(4))]
        assert [*map(onnx_transcriber(directory / "f32", processor), waves(4))] == expected
        set_language(model, processor, "zh", "transcribe")
        assert [*map(transformers_transcriber(model, processor), waves(4))] != expected


def test_8_bits_are_nearly_the_same_and_smaller(exported):
    model, processor, directory = exported
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 8, 100, generator=generator)
    tokens = torch.randint(0, model.config.vocab_size, (2, 7), generator=generator)
    runtime = OnnxWhisper(directory / "int8")
    states = runtime.encode(features.numpy())
    first, past = runtime.decode(tokens.numpy()[:, :4], states, None)
    then, _ = runtime.decode(tokens.numpy()[:, 4:], states, past)
    expected = logits(model, features, tokens)
    difference = np.abs(np.concatenate([first, then], axis=1) - expected)
    assert 1e-4 < difference.max() < 0.1 * np.abs(expected).max()
    assert len([*map(onnx_transcriber(directory / "int8", processor), waves(2))]) == 2
    weights = [
        sum(len(weight.raw_data) for weight in onnx.load(file).graph.initializer)
        for file in sorted(
            (directory / name / "onnx" / f"{onnx_graphs.DECODER}{ending}.onnx")
            for name, ending in (("f32", ""), ("int8", "_quantized"))
        )
    ]
    assert weights[1] < weights[0] / 2  # positions and biases keep 32 bits


@pytest.mark.parametrize(("name", "ending"), [("f32", ""), ("int8", "_quantized")])
def test_the_embedding_is_stored_once(exported, name, ending):
    model, _, directory = exported
    graph = onnx.load(directory / name / "onnx" / f"decoder_model_merged{ending}.onnx").graph
    size = model.config.vocab_size * model.config.d_model
    if size > FOLDED:
        assert sum(int(np.prod(weight.dims)) == size for weight in graph.initializer) == 1
    onnx.checker.check_model(directory / name / "onnx" / f"decoder_model_merged{ending}.onnx", full_check=True)


def test_names_and_sizes_are_those_that_transformers_js_reads(exported):
    _, _, directory = exported
    files = {file.relative_to(directory / "f32").as_posix() for file in (directory / "f32").rglob("*.*")}
    assert files == {
        *("onnx/encoder_model.onnx", "onnx/decoder_model_merged.onnx", "config.json", "generation_config.json"),
        *("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"),
    }
    encoder, decoder = (
        onnx.load(directory / "f32" / "onnx" / f"{name}.onnx") for name in ("encoder_model", "decoder_model_merged")
    )
    assert [value.name for value in (*encoder.graph.input, *encoder.graph.output)] == [
        *("input_features", "last_hidden_state"),
    ]
    sizes = {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in decoder.graph.input
    }
    expected = {"input_ids": ["batch_size", "decoder_sequence_length"]}
    expected["encoder_hidden_states"] = ["batch_size", "encoder_sequence_length", 16]
    for layer in (0, 1):
        for side, length in (("decoder", "past_decoder_sequence_length"), ("encoder", "encoder_sequence_length")):
            for kind in ("key", "value"):
                expected[f"past_key_values.{layer}.{side}.{kind}"] = ["batch_size", 2, length, 8]
    assert sizes == expected | {"use_cache_branch": [1]}
    past = [name for name in sizes if name.startswith("past")]
    names = [value.name for value in decoder.graph.output]
    assert names == ["logits", *(name.replace("past_key_values", "present") for name in past)]
    for file in (directory / "f32" / "onnx").iterdir():
        assert str(ROOT).encode() not in file.read_bytes() and b"site-packages" not in file.read_bytes()


def test_the_configs_are_those_that_transformers_js_reads(exported):
    model, _, directory = exported
    types = {"f32": "fp32", "int8": "q8", "large": "fp32"}
    for name, dtype in types.items():
        config = json.loads((directory / name / "config.json").read_text())
        assert config["transformers.js_config"]["dtype"] == dtype
        assert config["decoder_layers"] == 2 and config["model_type"] == "whisper"
    assert config["transformers.js_config"]["use_external_data_format"] == {"decoder_model_merged.onnx": 1} | (
        {"encoder_model.onnx": 1} if (directory / "large" / "onnx" / "encoder_model.onnx_data").exists() else {}
    )
    assert (directory / "large" / "onnx" / "decoder_model_merged.onnx_data").stat().st_size > 10_000
    generation = json.loads((directory / "f32" / "generation_config.json").read_text())
    assert generation["max_length"] == 32
    assert "alignment_heads" not in generation
    assert ("task" in generation) == ("language" in generation) == model.generation_config.is_multilingual
    features = json.loads((directory / "f32" / "preprocessor_config.json").read_text())
    assert (features["n_samples"], features["nb_max_frames"]) == (16_000, 100)


def test_the_model_is_left_as_it_was():
    model, _ = english()
    model.train()
    attention, heads = model.config._attn_implementation, model.generation_config.alignment_heads
    with onnx_graphs.exportable(model):
        assert model.config._attn_implementation == "eager"
    assert (model.config._attn_implementation, model.training) == (attention, True)
    model.generation_config.task = "transcribe"
    portable = portable_generation_config(model)
    assert not hasattr(portable, "alignment_heads") and not hasattr(portable, "task")
    assert (model.generation_config.alignment_heads, model.generation_config.task) == (heads, "transcribe")


def test_what_transformers_js_cannot_do_is_said():
    model, processor = reduced()
    said = " ".join(restrictions(model, processor))
    assert "no word timestamps" in said and "chunk_length_s=1" in said and "language" not in said
    model.generation_config.language = None
    assert "takes English unless" in " ".join(restrictions(model, processor))
    del model.generation_config.lang_to_id["<|en|>"]
    assert "the model has no English" in " ".join(restrictions(model, processor))


def test_the_word_errors_of_each_runtime_are_listed():
    texts = {"transformers": ["one two", "three four"], "onnxruntime": ["one", "three four five"]}
    assert word_errors(texts, ["one two", "three four"], str) == (
        "WER against the transcripts of the dataset, 2 clips: transformers 0.00 %, onnxruntime 50.00 %"
    )
    assert word_errors(texts, ["", " "], str) is None


def test_errors_are_found_before_the_export(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--to onnx has --quantization float32 or int8, got float16"):
        ExportArguments(model="x", to="onnx", quantization="float16")
    with pytest.raises(UserError, match="--clip_context requires --to ctranslate2"):
        ExportArguments(model="x", to="onnx", dataset="y", clip_context=True)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "file").touch()
    arguments = ExportArguments(model=str(TEACHER), to="onnx", output_dir=str(tmp_path / "here"))
    with pytest.raises(UserError, match="already exists"):
        export(arguments)
    check_extra()
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"pip install 'askd-hf\[onnx\]'"):
        export(ExportArguments(model=str(TEACHER), to="onnx", output_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command_exports_in_8_bits_and_compares(tmp_path, capsys):
    export(
        ExportArguments(
            model=str(TEACHER),
            to="onnx",
            output_dir=str(tmp_path / "out"),
            quantization="int8",
            dataset=str(SPEECH),
            max_samples=6,
        )
    )
    printed = capsys.readouterr().out
    assert "onnxruntime: same text as transformers for all 6 clips" in printed
    assert "6 clips: transformers 0.00 %, onnxruntime 0.00 %" in printed
    assert "chunk_length_s=3" in printed
    assert {file.name for file in tmp_path.iterdir()} == {"out"}  # no temporary directory is left
