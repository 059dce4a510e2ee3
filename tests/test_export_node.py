"""Exported models in transformers.js under Node.js, and the page of examples/web in Chromium. `make test-node`."""

import json
import os
import shutil
import subprocess
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import soundfile
from models import make_multilingual
from node import LIBRARY, PACKAGES
from scripts import ROOT
from spoken_digits import TEACHER
from traced_once import traced_once

from askd_hf import init_student
from askd_hf.data import decode_audio, load_speech_dataset
from askd_hf.export.comparison import transformers_transcriber
from askd_hf.export.onnx import export_onnx
from askd_hf.models.generation_config import set_language
from askd_hf.models.loading import load_processor, load_whisper

pytestmark = pytest.mark.node

DEMO = ROOT / "examples" / "demo"
WEB = ROOT / "examples" / "web"
SCRIPT = Path(__file__).parent / "support" / "transcribe.mjs"
RUNTIME = PACKAGES / "onnxruntime-web" / "dist"


@pytest.fixture(scope="module", autouse=True)
def installed():
    if shutil.which("node") is None or not LIBRARY.is_dir():
        pytest.fail("Node.js and its package @huggingface/transformers are needed: make test-node", pytrace=False)


@pytest.fixture(scope="module")
def clips():
    rows = load_speech_dataset(str(DEMO / "data" / "studio"), None, "train").select(range(8))
    return [decode_audio(row["audio"]) for row in rows]


@pytest.fixture(scope="module")
def files(tmp_path_factory, clips) -> list[Path]:
    directory = tmp_path_factory.mktemp("wav")
    for i, clip in enumerate(clips):
        soundfile.write(directory / f"{i}.wav", clip, 16_000, subtype="FLOAT")
    return sorted(directory.iterdir())


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """Directory with the digits model, which has a window of 3 s, as f32 and as int8."""
    directory = tmp_path_factory.mktemp("exported")
    model, processor = load_whisper(str(TEACHER)), load_processor(str(TEACHER))
    with traced_once(model, directory):
        export_onnx(model, processor, directory / "f32")
        export_onnx(model, processor, directory / "int8", "int8")
    return directory


@pytest.fixture(scope="module")
def expected(clips) -> list[str]:
    texts = [*map(transformers_transcriber(load_whisper(str(TEACHER)).eval(), load_processor(str(TEACHER))), clips)]
    assert len(set(texts)) > 5
    return [text.strip() for text in texts]


def by_node(model: Path, files: list[Path], **options) -> list[str]:
    command = ["node", SCRIPT, LIBRARY, model, json.dumps(options), *files]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [text.strip() for text in json.loads(done.stdout.splitlines()[-1])]


@pytest.mark.parametrize("name", ["f32", "int8"])
def test_the_texts_are_those_of_transformers(exported, files, expected, name):
    assert by_node(exported / name, files) == expected


def test_a_longer_clip_is_cut_into_windows(exported, tmp_path, clips):
    """Both halves are heard, with the setting that the export names."""
    pause = np.zeros(16_000, np.float32)
    soundfile.write(tmp_path / "long.wav", np.concatenate([clips[0], pause, clips[1]]), 16_000, subtype="FLOAT")
    cut, *_ = by_node(exported / "f32", [tmp_path / "long.wav"])
    text, *_ = by_node(exported / "f32", [tmp_path / "long.wav"], chunk_length_s=3)
    assert len(text.split()) > len(cut.split())


def test_a_multilingual_model_takes_the_language_given(tmp_path, files, clips):
    model, processor = make_multilingual()
    model = init_student(model, decoder_layers=1, encoder_layers=1).eval()
    found = {}
    export_onnx(model, processor, tmp_path / "out")
    short = [clip[:16_000] for clip in clips[:2]]
    for i, clip in enumerate(short):
        soundfile.write(tmp_path / f"{i}.wav", clip, 16_000, subtype="FLOAT")
    for language in ("en", "zh"):
        set_language(model, processor, language, "transcribe")
        texts = [*map(transformers_transcriber(model, processor), short)]
        wavs = [tmp_path / f"{i}.wav" for i in range(2)]
        found[language] = by_node(tmp_path / "out", wavs, language=language, task="transcribe", max_new_tokens=16)
        assert found[language] == [text.strip() for text in texts]
    assert found["en"] != found["zh"]


# ---- the page ----


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None:
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory, exported):
    """The address of the page as README.md builds it, and its directory."""
    directory = tmp_path_factory.mktemp("site")
    shutil.copytree(exported / "int8", directory / "model")
    library = directory / "transformers.js"
    library.mkdir()
    files = [LIBRARY / "dist" / "transformers.min.js", *RUNTIME.glob("ort-wasm-simd-threaded.asyncify.*")]
    for file in [*files, WEB / "index.html", WEB / "app.js"]:
        shutil.copy(file, library if file in files else directory)
    server = ThreadingHTTPServer(("localhost", 0), partial(Handler, directory=str(directory)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://localhost:{server.server_port}/", directory
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if path is None:
        pytest.fail("Chromium is needed, such as Debian's package chromium", pytrace=False)
    silent = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=path, args=silent) as started:
        yield started


@pytest.fixture
def open_page(browser, site):
    """Open the page. Afterwards it has asked for nothing from elsewhere, and no error is in its console.

    Chromium notes there that a file is missing. With `missing` this is expected.
    """
    contexts, elsewhere, errors = [], [], []

    def load(query: str = "", scheme: str = "light", missing: str = ""):
        context = browser.new_context(viewport=dict(width=400, height=800), color_scheme=scheme)
        contexts.append(context)
        context.set_default_timeout(60_000)
        page = context.new_page()
        page.on("request", lambda request: elsewhere.append(request.url) if outside(request.url) else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: note(message, missing))
        page.goto(site[0] + query)
        return page

    def note(message, missing: str) -> None:
        if message.type == "error" and not (missing and missing in message.location["url"]):
            errors.append(message.text)

    def outside(url: str) -> bool:
        return not url.startswith((site[0], "data:", "blob:"))

    yield load
    for context in contexts:
        context.close()
    assert (elsewhere, errors) == ([], [])


@pytest.mark.browser
def test_the_page_transcribes_a_file(open_page, files, expected):
    page = open_page()
    page.locator("#controls").wait_for()
    assert "a window of 3 s" in page.locator("#status").inner_text()
    for file, text in list(zip(files, expected, strict=True))[:2]:
        page.locator("#file").set_input_files(file)
        page.locator("#time:not(:empty)").wait_for()
        assert page.locator("#text").inner_text() == text
        player = page.locator("#player")
        player.click(position=dict(x=20, y=27))  # on the button of Chromium's player
        page.wait_for_function("audio => audio.currentTime > 0", arg=player.element_handle())
    page.locator("#file").set_input_files(WEB / "app.js")
    page.locator("#error:visible").wait_for()
    assert "can't read the audio" in page.locator("#error").inner_text()


@pytest.mark.browser
def test_the_page_records(open_page):
    page = open_page()
    page.locator("#record").click()
    page.get_by_role("button", name="Stop").wait_for()
    page.wait_for_timeout(1000)  # Chromium's beeps
    page.locator("#record").click()
    page.locator("#time:not(:empty)").wait_for()
    assert "s of audio in" in page.locator("#time").inner_text()
    assert page.locator("#error").is_hidden()


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_400_pixels_and_names_a_missing_model(open_page, scheme):
    page = open_page("?model=absent", scheme, missing="absent/")
    page.locator("#error:visible").wait_for()
    assert "absent/generation_config.json isn't there. Export a model" in page.locator("#error").inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    red = page.evaluate("parseInt(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])")
    assert (red < 60) == (scheme == "dark")
