"""Directories where the models and datasets that commands name are tiny models and tones."""

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import soundfile
from datasets import Dataset
from documents import ROOT
from models import make_processor, make_whisper
from speech import write_speech
from training import learn_by_heart
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from askd_hf.commands.main import main as askd_hf

# in the order of Whisper's own list, up to French
TOKENS = ("<|en|>", "<|zh|>", "<|de|>", "<|es|>", "<|ru|>", "<|ko|>", "<|fr|>", "<|translate|>", "<|startofprev|>")
MULTILINGUAL = {  # encoder layers
    "openai/whisper-large-v3": 9,
    "openai/whisper-small": 2,
    "you/whisper-small-fr": 2,
    "my-student": 2,
}
ENGLISH = ("openai/whisper-small.en", "openai/whisper-tiny.en")
MAX_LENGTH = 12  # a random model finds no end
FINISHED = {  # runs, and the options of their models and speech
    "runs/my-student": "--teacher openai/whisper-small --language fr --dataset my_speech",
    "runs/my-english-student": "--teacher openai/whisper-small.en --dataset my_speech",
}


def make_multilingual(encoder_layers: int, seed: int) -> tuple[WhisperForConditionalGeneration, WhisperProcessor]:
    """A tiny multilingual model, with timestamps and French."""
    processor = make_processor(TOKENS)
    processor.tokenizer.add_tokens([f"<|{0.02 * i:.2f}|>" for i in range(51)])
    model = make_whisper(processor, seed, encoder_layers=encoder_layers)
    token = processor.tokenizer.convert_tokens_to_ids
    settings = dict(
        is_multilingual=True,
        lang_to_id={name: token(name) for name in TOKENS if len(name) == 6},
        task_to_id={name: token(f"<|{name}|>") for name in ("transcribe", "translate")},
        alignment_heads=[[0, 0], [1, 1], [3, 1]],
        max_length=MAX_LENGTH,
    )
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    return model, processor


def make_models(folder: Path, named: Callable[[str], bool]) -> None:
    for seed, (name, layers) in enumerate(MULTILINGUAL.items()):
        if not named(name):
            continue
        model, processor = make_multilingual(layers, seed)
        if name == "openai/whisper-large-v3" and (folder / "my_audio").is_dir():  # it is sure of its transcripts
            processor.tokenizer.set_prefix_tokens(language="fr", task="transcribe")
            learn_by_heart(model, processor, folder / "my_audio")
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    for seed, name in enumerate(filter(named, ENGLISH)):
        processor = make_processor()
        if name == "openai/whisper-tiny.en" and (folder / "my_audio").is_dir():  # it is sure of its transcripts
            processor.tokenizer.add_tokens([f"<|{0.02 * i:.2f}|>" for i in range(51)])
            model = make_whisper(processor, seed)
            model.generation_config.alignment_heads = [[0, 0], [1, 1], [3, 1]]
            learn_by_heart(model, processor, folder / "my_audio")
        else:
            model = make_whisper(processor, seed)
        model.generation_config.max_length = MAX_LENGTH
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)


def make_recordings(folder: Path) -> None:
    """Recordings that are longer than the models' window of a second."""
    write_speech(folder, clips=2)
    for file in (folder / "audio").iterdir():
        wave, rate = soundfile.read(file)
        soundfile.write(file, list(wave) * 4, rate)


def make_list(folder: Path) -> None:
    """A list of recordings with columns of its own, and the recordings."""
    clips = write_speech(folder / "listed", clips=12)
    (clips / "audio").rename(folder / "recordings")
    with (clips / "metadata.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines = ["recording;what_was_said;who"]
    lines += [f"{row['file_name'].removeprefix('audio/')};{row['transcription']};{i}" for i, row in enumerate(rows)]
    (folder / "transcripts.csv").write_text("\n".join(lines) + "\n")


def make_packed(folder: Path) -> None:
    """Clips with the columns of `askd-hf pseudo-label --timestamps --concatenate`."""
    write_speech(folder)
    with (folder / "metadata.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    (folder / "metadata.csv").unlink()
    lines = []
    for row in rows:
        text = row["transcription"]
        lines.append(row | {"segments": [{"start": 0.0, "end": 0.2, "text": text}], "prompt": text[:3]})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_as_on_hub(folder: Path, splits: dict[str, tuple[str, ...]], text: str, speaker: str) -> None:
    """A dataset laid out as on the Hub, with these splits of its configurations."""
    clips = write_speech(folder.with_name(f"{folder.name}-clips"), clips=4)
    with (clips / "metadata.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    table = {
        "audio": [
            {"path": Path(row["file_name"]).name, "bytes": (clips / row["file_name"]).read_bytes()} for row in rows
        ],
        text: [row["transcription"] for row in rows],
        speaker: [str(number % 2) for number in range(len(rows))],
    }
    lines = ["---", "configs:"]
    for config, names in splits.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for name in names:
            file = folder / config / name / "0000.parquet"
            file.parent.mkdir(parents=True)
            Dataset.from_dict(table).to_parquet(str(file))
            lines += [f"  - split: {name}", f"    path: {config}/{name}/*.parquet"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


def make_speech(folder: Path, named: Callable[[str], bool]) -> None:
    for seed, name in enumerate(filter(named, ("my_speech", "my_french", "my_german", "other_speech"))):
        for split, clips in (("train", 8), ("validation", 3), ("test", 3)):
            write_speech(folder / name / split, clips=clips, seed=10 * seed + clips)
    if named("my_test_speech"):
        write_speech(folder / "my_test_speech", clips=3)
    for name in filter(named, ("my_audio", "my_noises", "sounds_test")):
        write_speech(folder / name, clips=6, seed=20)
    if named("my_clips"):
        write_speech(folder / "my_clips", clips=24)
    if named("long_recordings"):  # not longer than the models' window
        (write_speech(folder / "unlisted", clips=6, seed=20) / "audio").rename(folder / "long_recordings")
    if named("my_recordings"):
        make_recordings(folder / "my_recordings")
    if named("transcripts.csv"):
        make_list(folder)
    if named("speechocean"):
        make_speakers(folder / "speechocean")
    if named("my_packed_speech"):
        make_packed(folder / "my_packed_speech")
    if named("speech.flac"):
        wave, rate = soundfile.read(folder / "my_speech" / "train" / "audio" / "000.wav")
        soundfile.write(folder / "speech.flac", wave, rate)


def make_hub_datasets(folder: Path) -> None:
    """The datasets of runs without --dataset and of the suites, as if they had been downloaded."""
    libri = {"clean": ("train.100", "validation", "test"), "other": ("test",)}
    make_as_on_hub(folder / "openslr" / "librispeech_asr", libri, "text", "speaker_id")
    esb = dict.fromkeys(("ami", "earnings22", "tedlium"), ("test",))
    make_as_on_hub(folder / "hf-audio" / "esb-datasets-test-only-sorted", esb, "text", "dataset")
    voices = {"fr": ("test",)}
    make_as_on_hub(folder / "fixie-ai" / "common_voice_17_0", voices, "sentence", "client_id")


def make_single_digits(folder: Path) -> None:
    """The recordings of examples/demo/digits, one file each as in the dataset that they are from."""
    digits = ROOT / "examples" / "demo" / "digits"
    (folder / "recordings").mkdir(parents=True)
    with (digits / "index.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    audio = {file.stem: soundfile.read(file) for file in digits.glob("*.ogg")}
    for row in rows:
        wave, rate = audio[row["speaker"]]
        clip = wave[int(row["start_sample"]) : int(row["end_sample"])]
        soundfile.write(folder / "recordings" / f"{row['digit']}_{row['speaker']}_{row['take']}.wav", clip, rate)


def make_speakers(folder: Path) -> None:
    """Speech of 12 speakers, one clip each, with its duration."""
    write_speech(folder, clips=12)
    header, *rows = (folder / "metadata.csv").read_text().splitlines()
    spoken = [f"{row},{number:02d},0.9" for number, row in enumerate(rows)]
    (folder / "metadata.csv").write_text("\n".join([f"{header},speaker,duration", *spoken, ""]))


def remove_transcripts(folder: Path) -> None:
    """Replace the transcripts of an audio folder by a speaker."""
    names = [line.partition(",")[0] for line in (folder / "metadata.csv").read_text().splitlines()[1:]]
    (folder / "metadata.csv").write_text("\n".join(["file_name,speaker", *(f"{name},ann" for name in names), ""]))


def make_place(text: str) -> None:
    """Fill the current directory with all that the commands in `text` name."""
    folder = Path.cwd()
    text += "".join(options for run, options in FINISHED.items() if run in text)

    def named(name: str) -> bool:
        return re.search(rf"(?<![\w/.-]){re.escape(name)}(?![\w.-])", text) is not None

    make_speech(folder, named)
    make_models(folder, named)
    for name in filter(named, ("my_audio", "my_noises")):
        remove_transcripts(folder / name)
    if "--suite" in text or "examples/distill.py --teacher" in text:
        make_hub_datasets(folder)
    if named("free-spoken-digit-dataset"):
        make_single_digits(folder / "free-spoken-digit-dataset")
    if "python examples/" in text:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "examples", folder / "examples", ignore=ignored)  # some scripts write beside themselves
        shutil.copy(ROOT / "LICENSE", folder)  # the words of the demo's tokens
    for run, options in FINISHED.items():
        if named(run):
            options += f" --output_dir {run} --max_steps 1 --use_cpu --disable_tqdm True"
            askd_hf(["distill", *options.split()])
