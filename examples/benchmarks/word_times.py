r"""Word timestamps of models in transformers and faster-whisper, against those of the last model, or true ones.

    python examples/benchmarks/word_times.py --models runs/student openai/whisper-tiny.en --dataset my_speech
    python examples/benchmarks/word_times.py --models runs/student openai/whisper-tiny.en --dataset digits --join 5

Both runtimes transcribe greedily, one clip at a time. Of the starts and ends of words that two transcripts have in
common: the mean difference, and the share within 0.1 and 0.2 s.

With --join, --dataset has recordings of one word each. Some of a speaker are joined, so that it is known when words
begin and end, and the models align the known text (teacher forcing): no recognition error counts.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from steps import print_table
from transformers import WhisperForConditionalGeneration, WhisperProcessor
from transformers.hf_argparser import HfArg

from askd_hf import load_processor, load_speech_dataset, load_whisper
from askd_hf.arguments.parser import parse_args
from askd_hf.data.audio import SAMPLING_RATE, waveform
from askd_hf.errors import UserError, exit_on_user_error
from askd_hf.evaluation.long_form import transcribe_long
from askd_hf.evaluation.prepared_sets import spread
from askd_hf.evaluation.word_times import compare_word_times
from askd_hf.export.ctranslate2 import check_extra, export_ctranslate2
from askd_hf.models.generation_config import set_language
from askd_hf.models.word_times import time_words
from askd_hf.progress import progress

PAUSE = 0.2  # seconds between joined words
LOUD = 0.05  # of a recording's peak; what is softer at its ends is silence
Lines = list[dict[str, Any]]
Model = tuple[WhisperForConditionalGeneration, WhisperProcessor]


@dataclass
class WordTimesArguments:
    """Which models, on what."""

    models: list[str] = HfArg(default_factory=list, help="Hub ids or directories, the teacher last.")
    dataset: str | None = HfArg(default=None, help="Directory with speech, as `askd-hf distill` takes it.")
    clips: int = HfArg(default=100, help="Number of clips, at equal distances in the dataset; with --join the result.")
    runtimes: list[str] = HfArg(
        default_factory=lambda: list(RUNTIMES),
        help="Runtimes to transcribe with: transformers, faster-whisper, or both.",
    )
    join: int | None = HfArg(default=None, help="Join this many recordings of one word.")
    language: str | None = HfArg(default=None, help="Language of the speech, for a multilingual model.")


def main() -> None:
    (args,) = parse_args((WordTimesArguments,), None, "word_times.py", __doc__)
    if not (args.models and args.dataset):
        raise UserError("--models and --dataset are required")
    if unknown := set(args.runtimes) - RUNTIMES.keys():
        raise UserError(f"--runtimes must be one or both of {', '.join(RUNTIMES)}, got {', '.join(sorted(unknown))}")
    models = {name: (load_whisper(name).eval(), load_processor(name)) for name in args.models}
    for model in models.values():
        set_language(*model, args.language, "transcribe")
    speech = load_speech_dataset(args.dataset, None, "train")
    if args.join is not None:
        clips, truth = joined_words(list(speech), args.join, args.clips)
        timed = {
            name: [{"chunks": time_words(*model, clip)} for clip in progress(clips, name)]
            for name, model in models.items()
        }
        return print_rows([(name, "known text", lines, truth) for name, lines in timed.items()])
    check_extra()
    clips = [dict(row) for row in spread(speech, args.clips)]
    rows = []
    for runtime in args.runtimes:
        lines = {name: RUNTIMES[runtime](model, clips) for name, model in models.items()}
        rows += [(name, runtime, found, lines[args.models[-1]]) for name, found in lines.items()]
    print_rows(rows)


def by_transformers(model: Model, clips: Lines) -> Lines:
    transcripts = transcribe_long(*model, clips, "short_form", timestamps="word")
    return [
        {"chunks": transcript.chunks}
        for transcript, _ in zip(transcripts, progress(clips, "transformers"), strict=True)
    ]


def by_faster_whisper(model: Model, clips: Lines) -> Lines:
    from faster_whisper import WhisperModel

    options = dict(beam_size=1, temperature=0.0, condition_on_previous_text=False, word_timestamps=True)
    lines = []
    with tempfile.TemporaryDirectory() as directory:
        export_ctranslate2(*model, Path(directory) / "model")
        recognizer = WhisperModel(str(Path(directory) / "model"), device="cpu")
        language = getattr(model[0].generation_config, "language", None) or "en"
        for clip in progress(clips, "faster-whisper"):
            segments, _ = recognizer.transcribe(waveform(clip), language=language, **options)
            lines.append({"chunks": [(word.start, word.end, word.word) for part in segments for word in part.words]})
    return lines


def joined_words(rows: Lines, join: int, count: int) -> tuple[Lines, Lines]:
    """Return clips of `join` recordings of one speaker, drawn at random, and their words with the true times."""
    random = np.random.default_rng(0)
    speakers = sorted({row.get("speaker") or "" for row in rows})
    clips, truth = [], []
    for number in range(count):
        speaker = speakers[number % len(speakers)]
        of_speaker = [row for row in rows if (row.get("speaker") or "") == speaker]
        pieces, chunks, samples = [], [], 0
        for i in random.choice(len(of_speaker), join):
            wave = waveform(of_speaker[i])
            loud = np.flatnonzero(np.abs(wave) > LOUD * np.abs(wave).max())
            pieces += [np.zeros(round(PAUSE * SAMPLING_RATE), np.float32), wave]
            samples += len(pieces[-2])
            start, end = ((samples + loud[side]) / SAMPLING_RATE for side in (0, -1))
            chunks.append((start, end, of_speaker[i]["text"]))
            samples += len(wave)
        audio = {"array": np.concatenate(pieces), "sampling_rate": SAMPLING_RATE}
        clips.append({"audio": audio, "clip": f"{speaker} {number}", "text": " ".join(text for *_, text in chunks)})
        truth.append({"chunks": chunks})
    return clips, truth


def print_rows(rows: list[tuple[str, str, Lines, Lines]]) -> None:
    """Print the differences of each model's word times from the others in its row."""
    cells = []
    for name, runtime, lines, baseline in rows:
        times = compare_word_times(lines, baseline)
        if times is not None:
            shares = f"{times.within_100ms:.1f}", f"{times.within_200ms:.1f}"
            cells.append([name, runtime, str(times.words), f"{times.error:.3f}", *shares])
    print_table(["model", "times", "words", "mean, s", "within 0.1 s, %", "within 0.2 s, %"], cells)


RUNTIMES: dict[str, Callable[[Model, Lines], Lines]] = {
    "transformers": by_transformers,
    "faster-whisper": by_faster_whisper,
}

if __name__ == "__main__":
    with exit_on_user_error():
        main()
