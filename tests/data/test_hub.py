"""Real requests: to a closed port, and to a Hub of our own on the loopback."""

import json
import os
from pathlib import Path

import pytest
from datasets import Dataset
from fake_hub import fake_hub
from models import END, NO_TIMESTAMPS, START, tiny_processor
from processes import run_there
from speech import audiofolder, encoded, tone, write_csv

from askd_hf.data import load_speech_dataset
from askd_hf.errors import UserError
from askd_hf.hub_access import hub_access, local_or_hub

# Runs the calls of its argument and prints a result or an error each.
LOAD = """
import json, sys
from transformers import WhisperProcessor
from askd_hf.data import load_speech_dataset
from askd_hf.errors import UserError
from askd_hf.hub.provenance import stated_license
from askd_hf.hub_access import hub_access

def model(name, revision):
    with hub_access("the model", name):
        return WhisperProcessor.from_pretrained(name, revision=revision).tokenizer("ab").input_ids

def dataset(name, config, split, streaming=False):
    loaded = list(load_speech_dataset(name, config, split, streaming=streaming))
    return [[row["text"] for row in loaded], [row["clip"] for row in loaded]]

calls = {"model": model, "dataset": dataset, "license": stated_license}
for kind, *arguments in json.loads(sys.argv[1]):
    try:
        print(json.dumps(calls[kind](*arguments)), flush=True)
    except UserError as error:
        print(json.dumps(f"error: {error}"), flush=True)
"""
GOOD_CALLS = {
    "model": ("model", "a/tiny", None),
    "one split": ("dataset", "a/speech", "clean", "train.100[:1]"),
    "audiofolder": ("dataset", "a/folder", None, "train"),
    "metadata at the top": ("dataset", "a/top", None, "train"),
    "license": ("license", "a/tiny"),
}
BAD_CALLS = {
    "no such dataset on the Hub, and no such local directory": ("dataset", "a/none", None, "train"),
    "datasets/a/gated, then log in with `hf auth login`": ("dataset", "a/gated", None, "train"),
    "'cleen' not found. Available: ['clean']": ("dataset", "a/speech", "cleen", "train"),
    "no split 'dev'; it has train.100, train.360": ("dataset", "a/speech", "clean", "dev"),
    "the audio path '../../../../../secret.wav' is outside": ("dataset", "a/up", None, "train"),
    "0.wav' is outside the dataset. Since the dataset was downloaded": ("dataset", "a/absolute", None, "train"),
    "a/paths: the audio path": ("dataset", "a/paths", None, "train"),
    "other local files can't be read": ("dataset", "a/paths", None, "train", True),
    "a/folder: --streaming doesn't support audio files": ("dataset", "a/folder", None, "test", True),
    "no such model on the Hub": ("model", "a/none", None),
    "no such revision": ("model", "a/tiny", "v9"),
}
UNREACHABLE_CALLS = {
    "the model 'openai/whisper-none'": ("model", "openai/whisper-none", None),
    "the dataset 'openai/speech'": ("dataset", "openai/speech", "clean", "train.100"),
}


def run(calls: dict[str, tuple], home: Path, endpoint: str, offline: bool = False) -> dict:
    """The results by name; in a process of its own, because the libraries read the endpoint once."""
    environment = {**os.environ, "HF_HOME": str(home), "HF_ENDPOINT": endpoint, "NO_PROXY": "127.0.0.1"}
    environment["HF_HUB_OFFLINE"] = "1" if offline else "0"
    home.mkdir(exist_ok=True)
    script = home / "load.py"
    script.write_text(LOAD)
    done = run_there(script, json.dumps(list(calls.values())), environment=environment)
    assert done.returncode == 0, done.stderr
    return dict(zip(calls, map(json.loads, done.stdout.splitlines()), strict=True))


def fill(root: Path, scratch: Path) -> None:
    """A model; a dataset in splits laid out as openslr/librispeech_asr is; a gated one; and audio files in folders."""
    tiny_processor().save_pretrained(root / "models" / "a" / "tiny")
    card = "---\nlicense: other\nlicense_name: tiny\nlicense_link: LICENSE.md\n---\n# tiny\n"
    (root / "models" / "a" / "tiny" / "README.md").write_text(card)
    dataset = root / "datasets" / "a" / "speech"
    rows = load_speech_dataset(str(audiofolder(scratch, ["ab", "cd"])), None, "train")
    rows = rows.map(lambda row: {"audio": {"path": row["clip"][6:], "bytes": Path(row["audio"]["path"]).read_bytes()}})
    for split in ("train.100", "train.360"):
        (dataset / "clean" / split).mkdir(parents=True)
        rows.remove_columns("clip").to_parquet(str(dataset / "clean" / split / "0000.parquet"))
    (dataset / "README.md").write_text(
        "---\nconfigs:\n- config_name: clean\n  data_files:\n"
        "  - split: train.100\n    path: clean/train.100/*.parquet\n"
        "  - split: train.360\n    path: clean/train.360/*.parquet\n---\n"
    )
    (root / "datasets" / "a" / "gated").mkdir()
    audiofolder(root / "datasets" / "a" / "folder" / "train", ["null", "x"])
    audiofolder(root / "datasets" / "a" / "folder" / "test", ["y"])
    top = root / "datasets" / "a" / "top"
    for split in ("train", "test"):
        (top / split).mkdir(parents=True)
        (top / split / "0.wav").write_bytes(encoded(tone()))
    write_csv(top / "metadata.csv", [["file_name", "text"], ["train/0.wav", "a"], ["test/0.wav", "b"]])
    secret = scratch / "audio" / "0.wav"
    for name, path in {"up": "../../../../../secret.wav", "absolute": str(secret)}.items():
        audiofolder(root / "datasets" / "a" / name / "train", ["x"])
        write_csv(root / "datasets" / "a" / name / "train" / "metadata.csv", [["file_name", "text"], [path, "x"]])
    (root / "datasets" / "a" / "paths" / "data").mkdir(parents=True)
    named = Dataset.from_dict({"audio": [{"bytes": None, "path": str(secret)}], "text": ["x"]})
    named.to_parquet(str(root / "datasets" / "a" / "paths" / "data" / "train-00000-of-00001.parquet"))


@pytest.fixture(scope="module")
def visit(tmp_path_factory) -> tuple[dict, list[str], dict]:
    """Results of all calls to a Hub, the files that it sent, and the results without it afterwards."""
    folder = tmp_path_factory.mktemp("hub")
    fill(folder / "repos", folder / "local")
    with fake_hub(folder / "repos") as (endpoint, served):
        online = run(GOOD_CALLS | BAD_CALLS, folder / "home", endpoint)
    return online, served, run(GOOD_CALLS, folder / "home", endpoint, offline=True)


def test_model_from_a_hub_and_then_from_its_cache(visit):
    online, _, offline = visit
    assert online["model"] == offline["model"] == [START, NO_TIMESTAMPS, 0, 1, END]


def test_a_license_on_the_hub_has_its_link_made_whole(visit):
    online, _, offline = visit
    link = "https://huggingface.co/a/tiny/blob/main/LICENSE.md"
    assert online["license"] == offline["license"] == dict(license="other", license_name="tiny", license_link=link)


def test_only_the_split_is_downloaded(visit):
    online, served, offline = visit
    assert online["one split"] == [["ab"], ["0.wav"]]
    assert [name for name in served if name.startswith("clean/")] == ["clean/train.100/0000.parquet"]
    assert "hf download a/speech --repo-type dataset --local-dir DIR" in offline["one split"]


def test_audiofolder_on_a_hub(visit):
    online, served, _ = visit
    assert online["audiofolder"] == [["null", "x"], ["train/audio/0.wav", "train/audio/1.wav"]]
    assert not any(name.startswith("test/") for name in served)  # nor for the stream that is refused
    assert online["metadata at the top"] == [["a"], ["train/0.wav"]]


@pytest.mark.parametrize("message", BAD_CALLS)
def test_what_a_hub_refuses(visit, message):
    online, *_ = visit
    assert online[message].startswith("error: ")
    assert message in online[message]


@pytest.mark.parametrize("offline", [False, True])
def test_unreachable_hub_is_one_line(tmp_path, offline):
    for what, message in run(UNREACHABLE_CALLS, tmp_path, "http://127.0.0.1:9", offline).items():
        assert message.startswith(f"error: cannot load {what}: ")
        assert ("HF_HUB_OFFLINE is set" if offline else "can't be reached") in message
        assert "make demo" in message
        assert "\n" not in message


def test_local_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "whisper-tiny").mkdir()
    assert local_or_hub("whisper-tiny")
    assert local_or_hub(str(tmp_path / "whisper-tiny"))
    assert not local_or_hub("openai/whisper-tiny")
    for name in ("./whisper-tyni", str(tmp_path / "whisper-tyni"), "../x/", "a/b/c", ""):
        with pytest.raises(UserError, match="no such file or directory"):
            local_or_hub(name)
    with pytest.raises(UserError, match=r"did you mean '.*whisper-tiny'"):
        local_or_hub("./whisper-tyni")


def test_other_errors_pass(tmp_path):
    for error in (FileNotFoundError(2, "no config.json"), ValueError("bad"), KeyError("x"), UserError("mine")):
        with pytest.raises(type(error)) as raised, hub_access("the model", str(tmp_path)):
            raise error
        assert raised.value is error
    for error in (OSError(28, "No space left on device"), ValueError("bad"), UserError("mine")):
        with pytest.raises(type(error)) as raised, hub_access("the model", "a/cached"):
            raise error
        assert raised.value is error
