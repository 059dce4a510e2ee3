"""Export to ggml: the file is read back by a reader of the test's own, and whisper.cpp runs it on real speech."""

import copy
import ctypes
import re
import struct
import sys
from importlib.metadata import files
from operator import attrgetter
from pathlib import Path

import _pywhispercpp
import jiwer
import numpy as np
import pytest
import torch
from english_shape import ENGLISH, SPECIAL, with_english_ids, with_english_shape
from models import make_multilingual, make_processor, make_whisper
from pywhispercpp.model import Model
from scripts import ROOT
from spoken_digits import TEACHER
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperProcessor

from askd_hf.arguments.export import ExportArguments
from askd_hf.commands import export_ggml as export_command
from askd_hf.errors import UserError
from askd_hf.export.comparison import transformers_transcriber
from askd_hf.export.ggml import (
    check_ggml_extra,
    expected_ids,
    export_ggml,
    ggml_file,
    ggml_obstacle,
    restrictions,
    to_q5_0,
    to_q8_0,
    whisper_cpp_transcriber,
)
from askd_hf.models.generation_config import allow_silence, set_language
from askd_hf.models.loading import load_processor, load_whisper

SPEECH = ROOT / "examples" / "demo" / "data" / "studio"
# OpenAI's names in a layer of the decoder
LAYER = {
    "attn_ln": "self_attn_layer_norm",
    "attn.query": "self_attn.q_proj",
    "attn.key": "self_attn.k_proj",
    "attn.value": "self_attn.v_proj",
    "attn.out": "self_attn.out_proj",
    "cross_attn_ln": "encoder_attn_layer_norm",
    "cross_attn.query": "encoder_attn.q_proj",
    "cross_attn.key": "encoder_attn.k_proj",
    "cross_attn.value": "encoder_attn.v_proj",
    "cross_attn.out": "encoder_attn.out_proj",
    "mlp_ln": "final_layer_norm",
    "mlp.0": "fc1",
    "mlp.2": "fc2",
}


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    processor = load_processor(str(TEACHER))
    tokenizer = with_english_ids(processor.tokenizer, tmp_path_factory.mktemp("tokenizer"))
    return WhisperProcessor(processor.feature_extractor, tokenizer)


@pytest.fixture(scope="module")
def shared_model():
    return with_english_shape(load_whisper(str(TEACHER)))


@pytest.fixture
def model(shared_model):
    """A copy, which a test may change."""
    return copy.deepcopy(shared_model)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, shared_model, processor) -> dict[str, Path]:
    """The files by type."""
    directory = tmp_path_factory.mktemp("ggml")
    return {name: export_ggml(shared_model, processor, directory / name, name) for name in ("f16", "q8_0", "q5_0")}


@pytest.fixture(scope="module")
def expected(shared_model, processor, clips) -> list[str]:
    """What transformers hears."""
    return [text.strip() for text in [*map(transformers_transcriber(shared_model, processor), clips)]]


# ---- the reader ----


def unpack_q8_0(data: bytes) -> np.ndarray:
    """Blocks of a float16 and 32 int8."""
    return np.array([d * np.array(q) for d, *q in struct.iter_unpack("<e32b", data)], np.float32)


def unpack_q5_0(data: bytes) -> np.ndarray:
    """Blocks of a float16, the fifth bits of 32 numbers, and the other bits: two numbers per byte, 16 apart."""
    blocks = []
    for d, high, *low in struct.iter_unpack("<eI16B", data):
        numbers = [byte & 15 for byte in low] + [byte >> 4 for byte in low]
        blocks.append([d * (number + 16 * (high >> i & 1) - 16) for i, number in enumerate(numbers)])
    return np.array(blocks, np.float32)


READERS = {  # by the number of the type: bytes per 32 weights, and how to read them
    0: (128, lambda data: np.frombuffer(data, "<f4")),
    1: (64, lambda data: np.frombuffer(data, "<f2").astype(np.float32)),
    8: (34, unpack_q8_0),
    6: (22, unpack_q5_0),
}


class GgmlFile:
    """`header`, `filters`, `tokens` (bytes), and of every tensor type and values by name."""

    def __init__(self, path: Path):
        with path.open("rb") as self.file:
            self.header = self.read("<12i")
            bins, frequencies = self.read("<2i")
            self.filters = np.frombuffer(self.file.read(4 * bins * frequencies), "<f4").reshape(bins, frequencies)
            (count,) = self.read("<i")
            self.tokens = [self.file.read(*self.read("<i")) for _ in range(count)]
            self.types: dict[str, int] = {}
            self.tensors: dict[str, np.ndarray] = {}
            while start := self.file.read(12):
                dimensions, length, kind = struct.unpack("<3i", start)
                shape = self.read(f"<{dimensions}i")[::-1]
                name = self.file.read(length).decode()
                size, unpack = READERS[kind]
                if name == "decoder.token_embedding.weight" and kind in (6, 8):
                    shape = (100, shape[1])  # the first rows, as unpacking is slow
                    values = unpack(self.file.read(size * np.prod(shape) // 32))
                    self.file.seek(size * (ENGLISH - 100) * shape[1] // 32, 1)
                else:
                    values = unpack(self.file.read(size * np.prod(shape) // 32))
                self.types[name], self.tensors[name] = kind, values.reshape(shape)

    def read(self, form: str) -> tuple[int, ...]:
        return struct.unpack(form, self.file.read(struct.calcsize(form)))


def weights_of(model: WhisperForConditionalGeneration) -> dict[str, np.ndarray]:
    """The weights by OpenAI's names."""
    parts = {"encoder.ln_post": model.model.encoder.layer_norm, "decoder.ln": model.model.decoder.layer_norm}
    parts |= {"encoder.conv1": model.model.encoder.conv1, "encoder.conv2": model.model.encoder.conv2}
    parts["decoder.token_embedding"] = model.model.decoder.embed_tokens
    for side, cross in (("encoder", False), ("decoder", True)):
        for i, layer in enumerate(getattr(model.model, side).layers):
            for theirs, ours in LAYER.items():
                if cross or not theirs.startswith("cross"):
                    parts[f"{side}.blocks.{i}.{theirs}"] = attrgetter(ours)(layer)
    named = {f"{part}.{name}": weight for part, module in parts.items() for name, weight in module.named_parameters()}
    for side in ("encoder", "decoder"):
        named[f"{side}.positional_embedding"] = getattr(model.model, side).embed_positions.weight
    return {name: weight.detach().float().numpy() for name, weight in named.items()}


# ---- the file ----


def test_the_file_has_the_model_the_filters_and_the_bytes_of_the_tokens(exported, shared_model, processor):
    read = GgmlFile(exported["f16"])
    assert read.header == (0x67676D6C, ENGLISH, 150, 128, 4, 3, 64, 128, 4, 4, 80, 1)
    assert np.array_equal(read.filters, processor.feature_extractor.mel_filters.T.astype(np.float32))
    assert len(read.tokens) == 50256
    for text in (" zero nine", "été 你好\n"):
        ids = processor.tokenizer(text, add_special_tokens=False).input_ids
        assert b"".join(read.tokens[i] for i in ids) == text.encode()
    weights = weights_of(shared_model)
    assert read.tensors.keys() == weights.keys()
    for name, weight in weights.items():
        small = weight.ndim == 1 or name.endswith("positional_embedding")
        if re.fullmatch(r"encoder\.conv[12]\.bias", name):
            weight = weight.reshape(-1, 1)
        assert read.tensors[name].shape == weight.shape, name
        assert read.types[name] == (0 if small else 1), name
        np.testing.assert_allclose(read.tensors[name], weight, rtol=0 if small else 2**-11, atol=1e-7, err_msg=name)


@pytest.mark.parametrize(("quantization", "kind", "file_type"), [("q8_0", 8, 2007), ("q5_0", 6, 2008)])
def test_blocks_are_within_half_a_step_of_the_weights(exported, shared_model, quantization, kind, file_type):
    read = GgmlFile(exported[quantization])
    assert read.header[-1] == file_type
    count = 0
    for name, weight in weights_of(shared_model).items():
        if weight.ndim == 2 and name.endswith(".weight"):
            assert read.types[name] == kind
            stored = read.tensors[name]
            blocks = weight[: len(stored)].reshape(-1, 32)
            step = np.abs(blocks).max(1, keepdims=True) / (127 if kind == 8 else 16)
            error = np.abs(stored.reshape(-1, 32) - blocks) / np.maximum(step, 1e-30)
            # 5 bits are -16 to 15: a weight that would be 16 steps is a whole step off. The scale is rounded, too
            assert error.max() < (0.57 if kind == 8 else 1.01), name
            assert (error < 0.57).mean() > 0.98, name
            count += 1
        else:
            assert read.types[name] == (1 if weight.ndim == 3 else 0), name
    assert count == 1 + 3 * 6 + 4 * 10


@pytest.mark.parametrize(("quantize", "kind"), [(to_q8_0, 8), (to_q5_0, 6)])
def test_blocks_are_those_of_ggml(quantize, kind):
    """Bit by bit, also for blocks of zeros and for values that lie between two integers."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(300, 64)).astype(np.float32)
    weight[:100] = np.round(weight[:100] * 8) / 2
    weight[100:102] = 0
    libraries = (file.locate() for file in files("pywhispercpp") if file.name.startswith("libggml-base"))
    ggml = ctypes.CDLL(str(next(libraries))).ggml_quantize_chunk
    ggml.restype = ctypes.c_size_t
    theirs, pointer = np.empty(weight.size, np.uint16), ctypes.c_void_p
    numbers = [ctypes.c_int64(number) for number in (0, *weight.shape)]  # from the first row, rows, weights per row
    size = ggml(kind, pointer(weight.ctypes.data), pointer(theirs.ctypes.data), *numbers, None)
    assert quantize(weight) == theirs.tobytes()[:size]


def test_the_size_is_that_of_the_bits(exported):
    sizes = {name: file.stat().st_size for name, file in exported.items()}
    assert sizes["q8_0"] < 0.6 * sizes["f16"]
    assert sizes["q5_0"] < 0.45 * sizes["f16"]


# ---- whisper.cpp ----


def test_whisper_cpp_hears_what_transformers_hears(exported, shared_model, clips, expected):
    """In a window of 3 s, computing its own features."""
    heard = [*map(whisper_cpp_transcriber(exported["f16"], shared_model, "en", "transcribe"), clips)]
    assert heard == expected
    assert len({text for text in expected if len(text.split()) > 1}) > 6


@pytest.mark.parametrize("quantization", ["q8_0", "q5_0"])
def test_whisper_cpp_hears_nearly_the_same_with_blocks(exported, shared_model, speech, clips, quantization):
    heard = [*map(whisper_cpp_transcriber(exported[quantization], shared_model, "en", "transcribe"), clips)]
    assert 100 * jiwer.wer([row["text"] for row in speech], heard) <= 10


def test_the_end_of_text_is_suppressed_first_as_the_generation_config_says(exported, model, processor):
    silence = [np.zeros(16_000, np.float32)]
    model.generation_config.begin_suppress_tokens = [SPECIAL["<|endoftext|>"]]
    assert [*map(whisper_cpp_transcriber(exported["f16"], model, "en", "transcribe"), silence)] != [""]
    allow_silence(model)
    expected = [*map(transformers_transcriber(model, processor), silence)]
    assert expected == [""]
    assert [*map(whisper_cpp_transcriber(exported["f16"], model, "en", "transcribe"), silence)] == expected


@pytest.mark.parametrize("size", [51864, 51865, 51866])
def test_the_expected_ids_are_those_of_whisper_cpp(tmp_path, size):
    """It derives them from the size in the header of a file without tensors."""
    header = struct.pack("<12i", 0x67676D6C, size, 50, 32, 2, 1, 32, 32, 2, 1, 8, 1)
    (tmp_path / "model.bin").write_bytes(header + struct.pack("<2i", 8, 201) + bytes(4 * 8 * 201 + 4))
    loaded = Model(str(tmp_path / "model.bin"), redirect_whispercpp_logs_to=None)
    ids = {names[0]: i for names, i in expected_ids(size).items()}
    names = {"eot": "endoftext", "sot": "startoftranscript", "translate": "translate", "transcribe": "transcribe"}
    names |= {"solm": "startoflm", "prev": "startofprev", "not": "notimestamps", "beg": "0.00"}
    for theirs, ours in names.items():
        assert getattr(_pywhispercpp, f"whisper_token_{theirs}")(loaded._ctx) == ids.pop(f"<|{ours}|>"), ours
    assert _pywhispercpp.whisper_token_to_str(loaded._ctx, ids.pop("<|nospeech|>")) == "[_NOSP_]"
    assert _pywhispercpp.whisper_is_multilingual(loaded._ctx) == (size > 51864)
    assert len(ids) == {51864: 0, 51865: 99, 51866: 100}[size]  # the languages
    for name, i in ids.items():
        language = _pywhispercpp.whisper_lang_id(name.strip("<|>"))
        assert _pywhispercpp.whisper_token_lang(loaded._ctx, language) == i, name


# ---- what it can't run, and errors ----


def test_a_model_that_whisper_cpp_cant_run_is_refused_by_what_is_wrong(tmp_path, model, processor):
    assert ggml_obstacle(model, processor) is None
    teacher, tokenizer = load_whisper(str(TEACHER)), load_processor(str(TEACHER)).tokenizer
    assert ggml_obstacle(teacher, processor) == (
        "its feed-forward layers are 512 wide, 4 times the model's width, and those of this encoder are 256 wide"
    )
    with pytest.raises(UserError, match=r"^whisper\.cpp can't run this model: its feed-forward layers are 512 wide"):
        export_ggml(teacher, processor, tmp_path / "out")
    assert not any(tmp_path.iterdir())
    reduced = WhisperProcessor(processor.feature_extractor, tokenizer)
    model.config.vocab_size = 305
    assert ggml_obstacle(model, reduced) == (
        "it expects <|endoftext|> at id 50256 in a vocabulary of 305 tokens, and the model has it at 296, as models "
        "with a reduced or another vocabulary than OpenAI's"
    )
    model.config.vocab_size = ENGLISH + 1  # with an added token whisper.cpp takes it for multilingual
    assert "expects <|endoftext|> at id 50257 in a vocabulary of 51,865 tokens" in ggml_obstacle(model, processor)
    model.config.vocab_size = SPECIAL["<|notimestamps|>"] + 1  # without timestamps it would read behind the logits
    assert "expects <|0.00|> at id 50363 in a vocabulary of 50,363 tokens" in ggml_obstacle(model, processor)


def test_other_shapes_are_refused(model, processor):
    changes = {
        "encoder_attention_heads": (2, "2 in the encoder and 4 in the decoder"),
        "activation_function": ("relu", "gelu as the only activation function"),
        "scale_embedding": (True, "embeddings that aren't scaled"),
    }
    for name, (value, reason) in changes.items():
        before = getattr(model.config, name)
        setattr(model.config, name, value)
        assert reason in ggml_obstacle(model, processor)
        setattr(model.config, name, before)
    extractor = WhisperFeatureExtractor(feature_size=80, hop_length=80)
    assert "400 samples, a hop of 160" in ggml_obstacle(model, WhisperProcessor(extractor, processor.tokenizer))
    model.proj_out.weight = torch.nn.Parameter(model.proj_out.weight + 1)
    assert "other weights there" in ggml_obstacle(model, processor)


def test_a_narrow_model_has_no_blocks(tmp_path, processor):
    changes = dict(vocab_size=ENGLISH, encoder_ffn_dim=64, decoder_ffn_dim=64)
    narrow = make_whisper(make_processor(), **changes)
    with pytest.raises(UserError, match=r"--quantization q5_0 stores blocks of 32 weights, .* width is 16\. Use f16"):
        export_ggml(narrow, processor, tmp_path / "out", "q5_0")


def test_an_export_leaves_nothing_but_its_file_and_overwrites_nothing(tmp_path, exported, model, processor):
    assert exported["f16"].name == "ggml-model-f16.bin" and exported["q8_0"].name == "ggml-model-q8_0.bin"
    assert ggml_file(exported["f16"].parent, "f16") == exported["f16"]
    assert {file.name for file in exported["f16"].parent.parent.iterdir()} == {"f16", "q8_0", "q5_0"}
    with pytest.raises(UserError, match="already exists"):
        export_ggml(model, processor, exported["f16"].parent)


@pytest.mark.parametrize(
    ("language", "task", "options"),
    [("zh", "transcribe", " -l zh"), ("zh", "translate", " -l zh -tr"), (None, "", "")],
)
def test_the_printed_command_names_the_language(tmp_path, monkeypatch, capsys, language, task, options):
    """whisper-cli takes all speech as English otherwise."""
    monkeypatch.setattr(export_command, "check_ggml", lambda *args: None)
    monkeypatch.setattr(export_command, "export_ggml", lambda *args: Path(__file__))
    model, its_processor = make_multilingual() if language else (make_whisper(make_processor()), make_processor())
    if language:
        set_language(model, its_processor, language, task)
    args = ExportArguments(model="x", to="ggml", output_dir=str(tmp_path), task=task or "transcribe")
    export_command.convert(args, model, its_processor)
    printed = capsys.readouterr().out
    assert f"whisper-cli -m {__file__}{options} -nt" in printed
    assert "whisper.cpp: without timestamps it transcribes only the first 1 s of every 30 s" in printed


def test_what_whisper_cpp_cannot_do_is_said():
    processor = make_processor()
    named = restrictions(make_whisper(processor, decoder_layers=2), processor)
    assert [text.partition(":")[0].partition(" of every")[0] for text in named] == [
        "no word timestamps by attention",
        "without timestamps it transcribes only the first 1 s",
        "no timestamps",
    ]
    whole = WhisperProcessor(WhisperFeatureExtractor(feature_size=8), processor.tokenizer)
    assert len(restrictions(make_whisper(processor), whole)) == 1
    assert len(restrictions(make_whisper(processor, decoder_layers=2, vocab_size=51866), whole)) == 1


def test_without_the_extra_the_user_is_told_what_to_install(monkeypatch):
    check_ggml_extra()
    monkeypatch.setitem(sys.modules, "pywhispercpp.model", None)
    with pytest.raises(UserError, match=r"pip install 'askd-hf\[ggml\]'"):
        check_ggml_extra()
