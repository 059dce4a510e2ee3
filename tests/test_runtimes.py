"""The guide of the runtimes: its commands and blocks run as printed, and give the text of transformers."""

import base64
import contextlib
import io
import json
import runpy
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import soundfile
from documents import GUIDES, blocks, commands_in
from english_shape import with_english_ids, with_english_shape
from huggingface_hub import InferenceClient, constants
from node import LIBRARY, PACKAGES
from scripts import ROOT
from spoken_digits import long_teacher
from traced_once import traced_once
from transformers import WhisperForConditionalGeneration, WhisperProcessor, pipeline

from askd_hf.commands.main import main as run_askd_hf
from askd_hf.data import decode_audio, load_speech_dataset
from askd_hf.export.comparison import transformers_transcriber

GUIDE = GUIDES / "runtimes.md"
STUDIO = ROOT / "examples" / "demo" / "data" / "studio"
WINDOW = 30 * 16_000
STUDENT = Path("runs") / "my-student"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[Path]:
    """The current directory, with what the guide names."""
    directory = tmp_path_factory.mktemp("place")
    with contextlib.chdir(directory):
        model, processor = long_teacher()
        tokenizer = with_english_ids(processor.tokenizer, directory / "tokenizer")
        with_english_shape(model).save_pretrained(STUDENT)
        WhisperProcessor(processor.feature_extractor, tokenizer).save_pretrained(STUDENT)
        shutil.copytree(STUDIO, "my_test_speech")
        row = load_speech_dataset(str(STUDIO), None, "train")[0]
        # full windows: faster-whisper pads features with zeros instead of silence
        wave = np.pad(decode_audio(row["audio"]), (0, WINDOW))[:WINDOW]
        for name in ("speech.flac", "speech.wav"):
            soundfile.write(name, wave, 16_000, subtype="PCM_16")
        soundfile.read("speech.wav", dtype="float32")[0].tofile("speech.f32")
        yield directory


@pytest.fixture(scope="module")
def expected(place) -> str:
    model = WhisperForConditionalGeneration.from_pretrained(STUDENT).eval()
    wave, _ = soundfile.read("speech.wav", dtype="float32")
    (text,) = [*map(transformers_transcriber(model, WhisperProcessor.from_pretrained(STUDENT)), [wave])]
    assert len(text.split()) == 3  # digits
    return text.strip()


def export(runtime: str) -> None:
    """Run the guide's command for a runtime."""
    commands = [words for block in blocks(GUIDE, "bash") for words in commands_in(block)]
    (words,) = [words for words in commands if runtime in words and str(STUDENT) in words]
    run_askd_hf([*words[1:], "--max_samples", "1"])


def run_benchmark(name: str, options: list[str], monkeypatch) -> None:
    """Run the guide's command with a benchmark, and with further options."""
    commands = [words for block in blocks(GUIDE, "bash") for words in commands_in(block)]
    (words,) = [words for words in commands if words[0] == "python" and words[1].endswith(f"/{name}")]
    with monkeypatch.context() as changed:
        changed.setattr(sys, "argv", [*words[1:], *options])
        changed.syspath_prepend(ROOT / "examples" / "benchmarks")
        runpy.run_path(str(ROOT / words[1]), run_name="__main__")


def printed(module: str, capsys) -> str:
    """What the guide's block that imports a module prints."""
    (code,) = [code for code in blocks(GUIDE, "python") if f"from {module} import" in code]
    capsys.readouterr()
    exec(compile(code, module, "exec"), {})
    return capsys.readouterr().out.strip()


def test_faster_whisper(place, expected, capsys):
    export("ctranslate2")
    assert printed("faster_whisper", capsys) == expected


def test_whisper_cpp(place, expected, capsys):
    export("ggml")
    assert printed("pywhispercpp.model", capsys) == expected


def test_word_timestamps(place, monkeypatch, capsys):
    """Heads are selected against a teacher that has some, and the times of both models are compared."""
    teacher = WhisperForConditionalGeneration.from_pretrained(STUDENT)
    teacher.generation_config.alignment_heads = [[0, 0], [0, 1]]
    teacher.save_pretrained("my-teacher")
    WhisperProcessor.from_pretrained(STUDENT).save_pretrained("my-teacher")
    student = shutil.copytree(STUDENT, "my-aligned-student")
    commands = [words for block in blocks(GUIDE, "bash") for words in commands_in(block)]
    local = {"openai/whisper-small": "my-teacher", str(STUDENT): str(student), "my_speech": "my_test_speech"}
    shorter = {"select-heads": "--max_samples 2", "evaluate": "--max_eval_samples 2 --n_resamples 20"}
    ran = []
    for words in commands:
        if "select-heads" in words or "word" in words:
            at = words.index("--language")  # the model here is English
            given = [local.get(word, word) for word in words[1:at] + words[at + 2 :]]
            run_askd_hf(given + shorter[words[1]].split())
            ran.append(words[1])
    assert ran == ["select-heads", "evaluate"]
    assert WhisperForConditionalGeneration.from_pretrained(student).generation_config.alignment_heads
    (scored,) = json.loads(Path("runs/evaluation-words/results.json").read_text())["sets"]
    times = scored["scores"]["student"]["word_times"]
    assert times["words"] > 0 and times["error"] < 0.5  # seconds
    shutil.copytree("my_test_speech", "librispeech_other", dirs_exist_ok=True)
    capsys.readouterr()
    run_benchmark(
        "word_times.py",
        ["--models", str(student), "my-teacher", "--clips", "2", "--runtimes", "transformers"],
        monkeypatch,
    )
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "transformers" in line]
    assert [row[0] for row in rows] == [str(student), "my-teacher"]
    assert all(float(row[2]) > 0 for row in rows)


# ---- an inference endpoint ----


class Endpoint(BaseHTTPRequestHandler):
    """Answers as huggingface-inference-toolkit does: audio as the body, or JSON with base64, to the pipeline."""

    recognize = None

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        kind, parameters = self.headers["Content-Type"], {}
        if kind == "application/json":
            request = json.loads(body)
            body, parameters = base64.b64decode(request["inputs"], validate=True), request["parameters"]
        status, answer = 400, {"error": f"Content type {kind} not supported"}
        if kind == "application/json" or kind.startswith("audio/"):
            wave, rate = soundfile.read(io.BytesIO(body), dtype="float32")
            status, answer = 200, self.recognize({"raw": wave, "sampling_rate": rate}, **parameters)
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def endpoint(place, monkeypatch) -> Iterator[str]:
    recognize = pipeline("automatic-speech-recognition", model=str(STUDENT))
    monkeypatch.setattr(Endpoint, "recognize", staticmethod(recognize))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    server = ThreadingHTTPServer(("localhost", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("ENDPOINT_URL", f"http://localhost:{server.server_port}")
    yield f"http://localhost:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_an_endpoint(endpoint, expected, capsys):
    assert printed("huggingface_hub", capsys) == expected
    shorter = {"generate_kwargs": {"max_new_tokens": 2}}
    answer = InferenceClient(model=endpoint).automatic_speech_recognition("speech.flac", extra_body=shorter)
    assert answer.text.strip() and expected.startswith(answer.text.strip()) and answer.text.strip() != expected


# ---- the exported graphs ----


@pytest.fixture(scope="module")
def graphs(place) -> Iterator[None]:
    model = WhisperForConditionalGeneration.from_pretrained(STUDENT).eval()
    with traced_once(model, place):
        export("onnx")
        yield


@pytest.mark.slow  # traces the graphs
def test_onnxruntime(graphs, expected, capsys):
    assert printed("askd_hf.export.onnx", capsys) == expected


@pytest.mark.slow  # traces the graphs
def test_sherpa_onnx(place, expected, capsys):
    export("sherpa-onnx")
    assert printed("sherpa_onnx", capsys) == expected


@pytest.mark.slow
@pytest.mark.node
def test_transformers_js(graphs, place, expected):
    assert LIBRARY.is_dir(), "Node.js and its package @huggingface/transformers are needed: make test-node"
    (code,) = blocks(GUIDE, "js")
    Path("transcribe.mjs").write_text(code)
    Path("node_modules").symlink_to(PACKAGES)
    done = subprocess.run(["node", "transcribe.mjs"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == expected


@pytest.mark.slow
def test_the_benchmark_runs_all(graphs, place, monkeypatch, capsys):
    shutil.copytree("my_test_speech", "librispeech_other", dirs_exist_ok=True)
    run_benchmark("runtimes.py", ["--max_samples", "2", "--repetitions", "1"], monkeypatch)
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in capsys.readouterr().out.splitlines()
        if "|" in line
    ]
    measured = {(row[0], row[1]): row for row in rows[2:]}
    assert len(measured) == 12
    exact = [
        ("transformers", "float32"),
        ("CTranslate2", "float32"),
        ("onnxruntime", "float32"),
        ("whisper.cpp", "f16"),
    ]
    for name in exact:
        assert measured[name][-1] == "2 of 2"
    assert float(measured["CTranslate2", "int8"][2]) < float(measured["CTranslate2", "float32"][2]) / 2
    assert all(float(row[3]) > 0 for row in measured.values())
