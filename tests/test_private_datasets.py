"""Datasets with a user's own speech: new ones on the Hub are private. With a Hub on the loopback."""

import subprocess
import sys

from datasets import Dataset
from fake_hub import serve_hub
from hub import hub_environment

TOKEN = "hf_tokenThatMayWrite"
# a process of its own, because the libraries read the endpoint once
PUSH = """
from types import SimpleNamespace
from datasets import Dataset
from askd_hf.commands.cache_teacher import push_labels
from askd_hf.data.soft_labels import SETTINGS_COLUMN
from askd_hf.pseudo_labels.result import push_dataset

mine = {"path": ["/home/me/a.wav"], "notes": ["of a patient"]}
labeled = {"clip": ["/home/me/a.wav"], "text": ["one"], SETTINGS_COLUMN: ['{"teacher": "/m/base"}']}
labeled = Dataset.from_dict(labeled | mine, split="validation")
push_labels(labeled, SimpleNamespace(teacher_cache_dir="cache"), SimpleNamespace(hub_dataset_id="me/labels"))
push_dataset(Dataset.from_dict({"text": ["one"]}), "me/transcripts", "---\\ntags: [askd_hf]\\n---\\nA card.", "advice")
"""


def test_new_datasets_on_the_hub_are_private_and_have_no_other_columns(tmp_path):
    with serve_hub(tmp_path / "hub", {TOKEN: "write"}) as hub:
        environment = hub_environment(hub, tmp_path / "home", TOKEN)
        command = [sys.executable, "-c", PUSH]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
        assert hub.private == {"datasets/me/labels", "datasets/me/transcripts"}
        for name in hub.private:
            assert "data/train-00000-of-00001.parquet" in hub.commits[name][-1].written
        (file,) = (tmp_path / "hub" / "datasets" / "me" / "labels").rglob("*.parquet")
        (row,) = Dataset.from_parquet(str(file), cache_dir=str(tmp_path))
        assert row == {"clip": "a.wav", "text": "one", "teacher_settings": '{"teacher": "base"}'}
