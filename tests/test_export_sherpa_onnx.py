"""Export to sherpa-onnx: its graphs give the logits of transformers, and sherpa-onnx gives the texts."""

import base64
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from models import MULTILINGUAL, make_processor, make_whisper
from scripts import ROOT
from spoken_digits import TEACHER
from traced_once import traced_once
from transformers import WhisperFeatureExtractor, WhisperProcessor

from askd_hf.arguments.export import ExportArguments
from askd_hf.commands import export_sherpa_onnx as command
from askd_hf.commands.export import export
from askd_hf.errors import UserError
from askd_hf.export import sherpa_onnx as exporter
from askd_hf.export.comparison import input_features, transformers_transcriber
from askd_hf.export.sherpa_onnx import (
    TOKENS_PER_SECOND,
    check_sherpa_onnx_extra,
    export_sherpa_onnx,
    model_files,
    restrictions,
    sherpa_onnx_obstacle,
    sherpa_onnx_transcriber,
)
from askd_hf.models.generation_config import set_language

SPEECH = ROOT / "examples" / "demo" / "data" / "studio"
SUPPRESSED, SUPPRESSED_FIRST = [3, 8], [19, 27]
LEVELS = 2048  # tokens, each for a value of a feature: 1024 for 0, 500 more for 1
HEADER = '<ir_version: 9, opset_import: ["": 18]>'
FEATURES_AS_KEYS = """keys (float[1,80,frames] mel) => (float[1,1,frames,80] n_layer_cross_k, float[1,1,frames,80] v) {
    by_frame = Transpose<perm=[0,2,1]>(mel)
    axes = Constant<value_ints=[0]>()
    n_layer_cross_k = Unsqueeze(by_frame, axes)
    v = Identity(n_layer_cross_k)
}"""
FEATURE_AS_TOKEN = """token (
    int64[1,n] tokens, float[1,1,448,80] k, float[1,1,448,80] v, float[1,1,frames,80] cross_k,
    float[1,1,frames,80] cross_v, int64[1] offset
) => (float[1,1,2048] logits, float[1,1,448,80] out_k, float[1,1,448,80] out_v) {
    row = Gather<axis=2>(cross_k, offset)
    bin = Constant<value_ints=[40]>()
    feature = Gather<axis=3>(row, bin)
    scale = Constant<value_float=500.0>()
    zero = Constant<value_float=1024.0>()
    scaled = Mul(feature, scale)
    level = Add(scaled, zero)
    distance = Sub(levels, level)
    squared = Mul(distance, distance)
    negative = Neg(squared)
    shape = Constant<value_ints=[1,1,2048]>()
    logits = Reshape(negative, shape)
    out_k = Identity(k)
    out_v = Identity(v)
}"""


def make_model():
    """Multilingual, with a window of 1 s and suppressed tokens."""
    processor = make_processor(MULTILINGUAL)
    model = make_whisper(processor, seed=1, encoder_layers=1, decoder_layers=2).eval()
    token = processor.tokenizer.convert_tokens_to_ids
    generation = model.generation_config
    generation.is_multilingual = True
    generation.lang_to_id = {name: token(name) for name in ("<|en|>", "<|zh|>")}
    generation.task_to_id = {name: token(f"<|{name}|>") for name in ("transcribe", "translate")}
    generation.suppress_tokens, generation.begin_suppress_tokens = SUPPRESSED, SUPPRESSED_FIRST
    return model, processor


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model, its processor, and its exported directories by type. Its graphs are traced once."""
    model, processor = make_model()
    directory = tmp_path_factory.mktemp("sherpa")
    with traced_once(model, directory, exporter):
        export_sherpa_onnx(model, processor, directory / "f32")
        export_sherpa_onnx(model, processor, directory / "int8", "int8")
    return model, processor, directory


def noise(seconds: float, seed: int) -> np.ndarray:
    """Noise, with silence behind it up to 3 s: sherpa-onnx writes 6 tokens per second."""
    wave = np.random.default_rng(seed).normal(0, 0.02 * 4 ** (seed % 3), int(seconds * 16_000)).astype(np.float32)
    return np.pad(wave, (0, 48_000 - len(wave)))


# ---- the graphs ----


@torch.no_grad()
@pytest.mark.parametrize("parts", [[1], [4, 1, 1], [3, 2, 5]], ids=str)
def test_the_logits_are_those_of_transformers(exported, parts):
    model, _, directory = exported
    encoder, decoder = (onnxruntime.InferenceSession(file) for file in model_files(directory / "f32")[:2])
    features = torch.randn(1, 8, 100)
    tokens = torch.randint(0, model.config.vocab_size, (1, sum(parts)))
    cross = encoder.run(None, {"mel": features.numpy()})
    keys, values = (np.zeros((2, 1, 32, 16), np.float32) for _ in range(2))
    found, position = [], 0
    for part in tokens.split(parts, dim=1):
        inputs = (part.numpy(), keys, values, *cross, np.array([position]))
        names = [value.name for value in decoder.get_inputs()]
        logits, keys, values = decoder.run(None, dict(zip(names, inputs, strict=True)))
        found.append(logits)
        position += part.shape[1]
    expected = model(input_features=features, decoder_input_ids=tokens, use_cache=False).logits.numpy()
    assert np.abs(expected).max() > 1
    found = np.concatenate(found, axis=1)
    assert (found[:, :, SUPPRESSED] < -1e30).all()
    assert (found[:, : parts[0], SUPPRESSED_FIRST] < -1e30).all()
    assert np.isfinite(found).all()
    others = [i for i in range(model.config.vocab_size) if i not in SUPPRESSED + SUPPRESSED_FIRST]
    np.testing.assert_allclose(found[:, :, others], expected[:, :, others], atol=2e-5)
    later = found[:, parts[0] :, SUPPRESSED_FIRST]
    np.testing.assert_allclose(later, expected[:, parts[0] :, SUPPRESSED_FIRST], atol=2e-5)


@torch.no_grad()
def test_zeros_are_replaced_by_silence_and_what_is_behind_the_window_is_cut_off(exported):
    model, processor, directory = exported
    features = input_features(processor, noise(0.5, 1)[:8000]).numpy()
    states = model.get_encoder()(torch.tensor(features)).last_hidden_state
    layers = model.get_decoder().layers
    expected = [torch.stack([layer.encoder_attn.k_proj(states) for layer in layers])]
    expected.append(torch.stack([layer.encoder_attn.v_proj(states) for layer in layers]))
    encoder = onnxruntime.InferenceSession(model_files(directory / "f32")[0])
    padded = np.zeros((1, 8, 300), np.float32)
    padded[:, :, :52] = features[:, :, :52]  # the window of the transform reaches 1.25 frames further than the clip
    for frames in (100, 300):
        for one, other in zip(encoder.run(None, {"mel": padded[:, :, :frames]}), expected, strict=True):
            np.testing.assert_allclose(one, other, atol=2e-5)
    assert encoder.run(None, {"mel": padded[:, :, :61]})[0].shape == (2, 1, 31, 16)
    assert np.isfinite(encoder.run(None, {"mel": np.zeros((1, 8, 50), np.float32)})[0]).all()


def test_8_bits_are_smaller(exported):
    _, _, directory = exported
    for one, other in zip(model_files(directory / "f32"), model_files(directory / "int8", "int8"), strict=True):
        if one.suffix == ".onnx":
            weights = [sum(len(each.raw_data) for each in onnx.load(f).graph.initializer) for f in (one, other)]
            assert weights[1] < 0.75 * weights[0]  # convolutions, positions and biases keep 32 bits
            onnx.checker.check_model(other, full_check=True)
            assert str(ROOT).encode() not in one.read_bytes() and b"site-packages" not in one.read_bytes()


# ---- what sherpa-onnx reads beside them ----


def test_the_metadata_are_the_shape_and_the_ids(exported):
    _, processor, directory = exported
    found = {each.key: each.value for each in onnx.load(model_files(directory / "f32")[0]).metadata_props}
    ids = processor.tokenizer.get_vocab()
    shape = {"n_mels": 8, "n_audio_ctx": 50, "n_audio_state": 16, "n_audio_head": 2, "n_audio_layer": 1}
    shape |= {"n_text_ctx": 32, "n_text_state": 16, "n_text_head": 2, "n_text_layer": 2, "n_vocab": len(ids)}
    assert {name: int(found[name]) for name in shape} == shape
    names = {"sot": "startoftranscript", "eot": "endoftext", "no_timestamps": "notimestamps"}
    for name, token in (names | {"transcribe": "transcribe", "translate": "translate"}).items():
        assert int(found[name]) == ids[f"<|{token}|>"]
    assert found["is_multilingual"] == "1" and found["all_language_codes"] == "en,zh"
    assert found["all_language_tokens"] == f"{ids['<|en|>']},{ids['<|zh|>']}"
    assert found["sot_sequence"] == ",".join(
        str(ids[f"<|{name}|>"]) for name in ("startoftranscript", "en", "transcribe")
    )
    assert all(int(found[name]) >= 0 for name in ("blank_id", "no_speech", "sot_lm", "sot_prev"))


def test_the_tokens_are_bytes_in_base64(exported):
    _, processor, directory = exported
    lines = model_files(directory / "f32")[2].read_text().splitlines()
    tokens = {int(i): base64.b64decode(text) for text, i in map(str.split, lines)}
    ids = processor.tokenizer("ab z", add_special_tokens=False).input_ids
    assert b"".join(tokens[i] for i in ids) == b"ab z"
    assert sorted(tokens) == list(range(27))  # no special tokens


# ---- sherpa-onnx ----


@pytest.mark.parametrize(("language", "task"), [("en", "transcribe"), ("zh", "translate")])
def test_the_texts_are_those_of_transformers(exported, language, task):
    model, processor, directory = exported
    set_language(model, processor, language, task)
    waves = [noise(seconds, seed) for seed, seconds in enumerate((0.9, 0.5, 0.7, 0.3))]
    expected = [*map(transformers_transcriber(model, processor), waves)]
    found = [*map(sherpa_onnx_transcriber(directory / "f32", language, task), waves)]
    assert found == expected
    assert max(map(len, expected)) > 8
    assert all(isinstance(sherpa_onnx_transcriber(directory / "int8", language, task, "int8")(w), str) for w in waves)


def test_the_features_are_those_of_whisper(tmp_path):
    """Models made by hand say them: the encoder returns the features, the decoder one per step as a token."""
    encoder, decoder, tokens = model_files(tmp_path)
    ids = dict(n_mels=80, n_text_layer=1, n_text_ctx=448, n_text_state=80, n_vocab=LEVELS, is_multilingual=0)
    ids |= dict(sot=0, sot_sequence=0, eot=LEVELS, blank_id=0, translate=0, transcribe=0, no_timestamps=0, no_speech=0)
    model = onnx.parser.parse_model(HEADER + FEATURES_AS_KEYS)
    onnx.helper.set_model_props(model, {name: str(value) for name, value in ids.items()})
    onnx.save(model, encoder)
    model = onnx.parser.parse_model(HEADER + FEATURE_AS_TOKEN)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.arange(LEVELS, dtype=np.float32), "levels"))
    onnx.save(model, decoder)
    tokens.write_text("".join(f"{base64.b64encode(f'{i} '.encode()).decode()} {i}\n" for i in range(LEVELS)))
    wave = noise(2.9, 0)
    found = (np.array(sherpa_onnx_transcriber(tmp_path, "en", "transcribe")(wave).split(), int) - 1024) / 500
    processor = WhisperProcessor(WhisperFeatureExtractor(feature_size=80), make_processor().tokenizer)
    expected = input_features(processor, wave)[0, 40].numpy()
    assert len(found) == 3 * TOKENS_PER_SECOND
    # the first step reads frame 0, the second frame 2, behind two tokens; the beginning of the clip is mirrored
    np.testing.assert_allclose(found[1:], expected[2 : len(found) + 1], atol=2e-3)


@pytest.mark.slow  # traces a larger model
def test_the_command_exports_a_short_window_and_a_small_vocabulary(tmp_path, capsys):
    arguments = ExportArguments(
        model=str(TEACHER), to="sherpa-onnx", output_dir=str(tmp_path / "out"), dataset=str(SPEECH), max_samples=6
    )
    export(arguments)
    printed = capsys.readouterr().out
    assert "sherpa-onnx: same text as transformers for all 6 clips" in printed
    assert "6 clips: transformers 0.00 %, sherpa-onnx 0.00 %" in printed
    assert "cuts off audio after 3 s" in printed
    assert {file.name for file in tmp_path.rglob("*")} == {"out", "encoder.onnx", "decoder.onnx", "tokens.txt"}


def test_the_size_printed_is_that_of_all_files(tmp_path, monkeypatch, capsys, processor):
    """The weights of a large graph are in a file of their own."""
    sizes = {"encoder.onnx": 100_000, "encoder.onnx_data": 7_000_000, "decoder.onnx": 1_000_000, "tokens.txt": 50_000}

    def export_sizes(model, processor, directory, quantization):
        for name, size in sizes.items():
            (tmp_path / name).write_bytes(bytes(size))

    monkeypatch.setattr(command, "export_sherpa_onnx", export_sizes)
    arguments = ExportArguments(model="student", to="sherpa-onnx", output_dir=str(tmp_path))
    command.convert(arguments, None, processor)
    assert capsys.readouterr().out.startswith(f"{tmp_path}: 8.2 MB, ")  # 8.15


# ---- what it can't run, and errors ----


def test_what_sherpa_onnx_cannot_do_is_said(processor):
    said = " ".join(restrictions(processor))
    assert "no word timestamps" in said and "6 tokens per second" in said and "cuts off audio after 1 s" in said


def test_a_model_that_sherpa_onnx_cant_run_is_refused_by_what_is_wrong(tmp_path):
    model, processor = make_model()
    assert sherpa_onnx_obstacle(model, processor) is None
    extractor = WhisperFeatureExtractor(feature_size=8, hop_length=80)
    assert "400 samples, a hop of 160" in sherpa_onnx_obstacle(model, WhisperProcessor(extractor, processor.tokenizer))
    model.generation_config.lang_to_id["<|fr|>"] = 2
    with pytest.raises(UserError, match=r"^sherpa-onnx can't run this model: it requires .* <\|fr\|>, which"):
        export_sherpa_onnx(model, processor, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_errors_are_found_before_the_export(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--to sherpa-onnx has --quantization float32 or int8, got f16"):
        ExportArguments(model="x", to="sherpa-onnx", quantization="f16")
    check_sherpa_onnx_extra()
    monkeypatch.setitem(sys.modules, "sherpa_onnx", None)
    with pytest.raises(UserError, match=r"pip install 'askd-hf\[sherpa-onnx\]'"):
        export(ExportArguments(model=str(TEACHER), to="sherpa-onnx", output_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
