"""The recipes of the guide, each as it is printed there, on tiny models of the same names."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
from models import by_generate, by_pipeline, make_processor, make_whisper
from processes import run_there
from scripts import ROOT
from speech import write_speech
from training import learn_by_heart

GUIDE = (ROOT / "examples" / "guides" / "recipes.md").read_text(encoding="utf-8")
# title: what training.json says of its run, and of no other's
RECIPES = {
    "Your own student": lambda facts: facts["provenance"]["student"] and facts["arguments"]["preset"] == "askd",
    "LoRA": lambda facts: facts["arguments"].get("lora_r") == 32 and facts["arguments"]["preset"] == "ps-kd",
    "Unlabeled audio": lambda facts: (
        [speech["transcribed_by"] for speech in facts["provenance"]["speech"]] == [None, "whisper-large-v3"]
    ),
    "Two languages": lambda facts: facts["provenance"]["languages"] == ["fr", "de"],
    "A smaller encoder": lambda facts: facts["student"]["encoder_layers"] == 8,
}
# the command that is installed with the package, as the script of the same name
COMMAND = 'askd-hf() { "$PYTHON" "examples/${1//-/_}.py" "${@:2}"; }\n'
# in the order of Whisper's own list, up to French
TOKENS = ("<|en|>", "<|zh|>", "<|de|>", "<|es|>", "<|ru|>", "<|ko|>", "<|fr|>", "<|translate|>", "<|startofprev|>")


def recipe(title: str) -> str:
    """The first command of a section of the guide."""
    section = GUIDE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return re.findall(r"```bash\n(.*?)```", section, re.DOTALL)[0]


def make_model(directory: Path, layers: int, seed: int, knows: Path | None = None) -> None:
    """A tiny model that has learned the speech that it `knows` by heart."""
    processor = make_processor(TOKENS)
    model = make_whisper(processor, seed, vocab_size=len(processor.tokenizer) + 51, encoder_layers=layers)
    token = processor.tokenizer.convert_tokens_to_ids
    languages = [name for name in TOKENS if len(name) == 6]
    settings = dict(
        is_multilingual=True,
        lang_to_id={name: token(name) for name in languages},
        task_to_id={name: token(f"<|{name}|>") for name in ("transcribe", "translate")},
        max_length=12,  # a random model finds no end
    )
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    if knows is not None:
        processor.tokenizer.set_prefix_tokens(language="fr", task="transcribe")
        learn_by_heart(model, processor, knows)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A directory where all names of the recipes are tiny models and speech."""
    folder = tmp_path_factory.mktemp("recipes")
    audio = write_speech(folder / "my_audio", clips=6, seed=20)
    make_model(folder / "openai" / "whisper-large-v3", layers=10, seed=0, knows=audio)
    (audio / "metadata.csv").unlink()
    make_model(folder / "you" / "whisper-small-fr", layers=2, seed=1)
    for seed, name in enumerate(("my_speech", "my_french", "my_german")):
        write_speech(folder / name / "train", clips=8, seed=seed)
        write_speech(folder / name / "validation", clips=3, seed=10 + seed)
    (folder / "examples").symlink_to(ROOT / "examples")
    return folder


@pytest.mark.parametrize("title", RECIPES)
def test_a_recipe_runs_as_it_is_printed(place, title):
    command = recipe(title)
    assert len(re.findall(r"^askd-hf ", command, re.MULTILINE)) == 1  # one command
    shutil.rmtree(place / "runs", ignore_errors=True)  # two recipes may name their runs alike
    if title == "LoRA":  # one by a shell and Python themselves
        environment = os.environ | {"PYTHON": sys.executable}
        shell = ["bash", "-c", COMMAND + command]
        ended = subprocess.run(shell, cwd=place, env=environment, capture_output=True, text=True, timeout=400)
    else:
        name, subcommand, *arguments = shlex.split(command.replace("\\\n", " "))
        assert name == "askd-hf"
        script = place / "examples" / f"{subcommand.replace('-', '_')}.py"
        ended = run_there(script, *arguments, directory=place)
    assert ended.returncode == 0, ended.stderr
    (run,) = (file.parent for file in (place / "runs").glob("*/training.json"))
    facts = json.loads((run / "training.json").read_text())
    assert [name for name, holds in RECIPES.items() if holds(facts)] == [title]
    tone = soundfile.read(place / "my_speech" / "train" / "audio" / "000.wav")[0]
    language = {} if facts["provenance"]["languages"] == ["fr"] else {"language": "de"}
    assert by_pipeline(run, tone, **language) == by_generate(run, tone, **language)
