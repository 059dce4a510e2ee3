"""Fixtures of all tests. What tests import is in support/."""

import gc
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: threads only get in each other's way

if "PYTEST_XDIST_WORKER" not in os.environ:  # workers get the directory of the process that started them
    _home = tempfile.TemporaryDirectory(prefix="askd_hf-tests-")  # deleted at the end; the user's cache is left alone
    os.environ["HF_HOME"] = _home.name

import pytest

# Libraries are imported where they are needed: with `-n`, the process that only hands out the tests needs none
pytest.register_assert_rewrite("hub", "report_page")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(specs: list) -> None:
    """With `-n`, the processes that run tests are forked too, from the server that they share."""
    import fork_client
    import processes

    os.environ[fork_client.ADDRESS] = processes.start_server()
    for spec in (spec for spec in specs if spec.popen):  # on this machine
        spec.python = shlex.join([sys.executable, "-I", "-S", fork_client.__file__])


def pytest_sessionstart(session: pytest.Session) -> None:
    config = session.config
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):  # tests are run here
        import quick_report

        quick_report.install()


def pytest_collection_finish() -> None:
    """Garbage is collected often; most of the time would go to what the libraries have defined."""
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """As `pytest_collection_finish`, for what the tests of a file have left."""
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        gc.freeze()


@pytest.fixture
def card() -> Iterator[None]:
    """A CUDA card that computes float32 products in float32."""
    import torch
    from transformers.utils.import_utils import enable_tf32

    # asked here and not at import: a process that has asked for CUDA can't fork any that use it
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA card")
    enable_tf32(False)
    yield
    enable_tf32(False)  # a run with --torch_compile, or a test, may have turned it on


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where the test runs; on a card by `make test-gpu` alone."""
    if request.param == "cuda":
        request.getfixturevalue("card")
    return request.param


@pytest.fixture(
    params=[
        pytest.param(("cpu", "eager"), marks=pytest.mark.slow, id="cpu"),
        pytest.param(("cuda", "inductor"), marks=pytest.mark.gpu, id="cuda"),
    ]
)
def compiling(request: pytest.FixtureRequest) -> tuple[str, dict]:
    """As `device`, with the options that compile the models; on the CPU without generating code, which takes long."""
    import torch

    torch.compiler.reset()  # what another test has compiled counts for the limit of graphs
    device, backend = request.param
    if device == "cuda":
        request.getfixturevalue("card")
    return device, dict(torch_compile=True, torch_compile_backend=backend)


@pytest.fixture(scope="session")
def processor() -> "WhisperProcessor":
    from models import make_processor

    return make_processor()


@pytest.fixture
def teacher(processor) -> "WhisperForConditionalGeneration":
    from models import make_whisper

    return make_whisper(processor).eval()


@pytest.fixture(scope="session")
def speech() -> list[dict]:
    """Twelve clips of the demo, which its teacher knows."""
    from scripts import ROOT

    from askd_hf.data import load_speech_dataset

    return list(
        load_speech_dataset(str(ROOT / "examples" / "demo" / "data" / "studio"), None, "train").select(range(12))
    )


@pytest.fixture(scope="session")
def clips(speech) -> list:
    """Their waveforms."""
    from askd_hf.data import decode_audio

    return [decode_audio(row["audio"]) for row in speech]


@pytest.fixture(scope="session")
def speech_dir(tmp_path_factory) -> Path:
    """A directory with the splits train, 16 clips, and validation, 6."""
    from speech import write_speech

    directory = tmp_path_factory.mktemp("speech")
    write_speech(directory / "train", clips=16, seed=0)
    write_speech(directory / "validation", clips=6, seed=1)
    return directory


@pytest.fixture
def student(processor) -> "WhisperForConditionalGeneration":
    """Of other weights than the teacher, so that they disagree."""
    from models import make_whisper

    from askd_hf.models.student import init_student

    return init_student(make_whisper(processor, seed=5), decoder_layers=2)


@pytest.fixture
def deep_teacher(processor) -> "WhisperForConditionalGeneration":
    """With 4 encoder layers."""
    from models import make_whisper

    return make_whisper(processor, encoder_layers=4).eval()


@pytest.fixture
def compressed(deep_teacher) -> "WhisperForConditionalGeneration":
    """With the encoder layers 0 and 2 of `deep_teacher`: it has a hidden-state loss."""
    from askd_hf.models.student import init_student

    return init_student(deep_teacher, 2, encoder_layers=[0, 2])


@pytest.fixture(scope="session")
def teacher_dir(tmp_path_factory) -> Path:
    """A tiny Whisper with its processor, which no test changes."""
    from models import save_whisper

    return save_whisper(tmp_path_factory.mktemp("tiny-whisper"))


@pytest.fixture(scope="session")
def deep_teacher_dir(tmp_path_factory) -> Path:
    """As `teacher_dir`, with 4 encoder layers."""
    from models import save_whisper

    return save_whisper(tmp_path_factory.mktemp("deep-whisper"), encoder_layers=4)
