r"""Make a dataset for askd-hf of a CSV file and the audio files that it names, split by speaker.

    askd-hf prepare --source transcripts.csv --audio_dir recordings --target my_speech \
        --audio_column recording --text_column what_was_said --speaker_column who

Writes the directories train, validation and test, each with its clips and a metadata.csv with the columns file_name,
transcription and speaker; other columns are kept. No speaker is in two of them, so the error rates are those of
speakers that the student wasn't trained on. Of the speakers in sorted order, every fifth (0, 5, 10, ...) is for
testing and every tenth (1, 11, ...) for validation. The audio files are linked, or copied where that isn't possible.
"""

import csv
import os
import random
import shlex
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path, PurePath
from statistics import median

from ..arguments.parser import parse_args
from ..arguments.prepare import PrepareArguments
from ..csv_files import SEPARATORS, csv_rows
from ..data.audio import AudioError, read_audio, stated_seconds
from ..data.clip_files import clip_file
from ..data.loading import TEXT_COLUMNS
from ..errors import UserError, disk_errors
from ..progress import progress
from ..training.run_plan import counted, duration, little_speech
from .options import options_of

OPTIONS = options_of("prepare")
SPLITS = ("train", "validation", "test")
MAX_LISTED = 10  # missing files in a message
FEW = 3  # speakers: an error rate of fewer says little about others
WINDOWS = (6, 10)  # seconds; `askd-hf plan` compares more
LONGEST = 30  # seconds, the window of OpenAI's models

Row = dict[str, str]


def main(argv: list[str] | None = None) -> None:
    prepare(*parse_args(OPTIONS, argv, "askd-hf prepare", __doc__))


def prepare(args: PrepareArguments) -> None:
    """Write the splits, as examples/prepare.py does step by step. Raises `UserError` for a wrong list of clips."""
    clips = read_clips(args)
    splits = split_by_speaker(args, clips)
    write_splits(args, splits)
    print_splits(args, splits)


def read_clips(args: PrepareArguments) -> list[Row]:
    """Return the rows with the columns file_name, transcription and speaker, without spaces around their values.

    Raises `UserError` if a column, a file, a speaker or all rows are missing, or two rows name the same file.
    """
    if Path(args.target).exists():
        raise UserError(f"{args.target} already exists: choose another --target, or remove it first")
    file = csv_file(args)
    header, rows = read_rows(file)
    wanted = dict(file_name=args.audio_column, transcription=args.text_column, speaker=args.speaker_column)
    for option, column in zip(("audio_column", "text_column", "speaker_column"), wanted.values(), strict=True):
        if column not in header and not (option == "speaker_column" and column == "none"):
            also = ". Without speakers: --speaker_column none" if option == "speaker_column" else ""
            raise UserError(f"{file} has no column {column!r}; it has {', '.join(header)}: give --{option}{also}")
    if args.speaker_column == "none":
        del wanted["speaker"]
    others = {name: kept_as(name, header, wanted) for name in header if name and name not in wanted.values()}
    clips = [
        {new: row[column].strip() for new, column in wanted.items()} | {new: row[name] for name, new in others.items()}
        for row in rows
    ]
    check_files(args, clips, file)
    check_speakers(args, clips, file)
    return clips if args.max_seconds is None else shorter_clips(args, clips, args.max_seconds)


def kept_as(column: str, header: list[str], wanted: Iterable[str]) -> str:
    """Return the name of another column: one that isn't taken for the file, the transcript or the speaker later."""
    reserved = {*wanted, *TEXT_COLUMNS[: TEXT_COLUMNS.index("transcription")]}
    name = column
    while name in reserved or (name != column and name in header):
        name = f"other_{name}"
    return name


def csv_file(args: PrepareArguments) -> Path:
    source = Path(args.source)
    file = source / "metadata.csv" if source.is_dir() else source
    if not file.is_file():
        raise UserError(f"--source {source}: expected a CSV file, or a directory with a metadata.csv")
    return file


def read_rows(file: Path) -> tuple[list[str], list[Row]]:
    """Return the names of the columns, and the rows. The separator is the one that gives the most columns."""
    if file.suffix in (".json", ".jsonl", ".parquet"):
        raise UserError(f"{file}: expected a CSV file, with the names of its columns in the first line")
    separator = max((",", *SEPARATORS), key=lambda one: number_of_columns(file, one))
    header, *rows = csv_rows(file, separator)
    if not rows:
        raise UserError(f"{file} has no rows")
    return header, [dict(zip(header, row, strict=True)) for row in rows]


def number_of_columns(file: Path, separator: str) -> int:
    """Return how many columns the header has with this separator, 0 if it can't be read with it."""
    try:
        return len(next(csv_rows(file, separator), []))
    except UserError:  # a quoted name isn't followed by it
        return 0


def shorter_clips(args: PrepareArguments, clips: list[Row], max_seconds: float) -> list[Row]:
    """Return the clips of at most `max_seconds`, and those whose length is unknown: training reports them.

    Raises `UserError` if there are none.
    """
    files = [clip_file(audio_directory(args), clip["file_name"]) for clip in clips]
    lengths = [seconds_of(file) for file in progress(files, "Reading durations", "clip")]
    kept = [clip for clip, seconds in zip(clips, lengths, strict=True) if (seconds or 0.0) <= max_seconds]
    if not kept:
        shortest = min(seconds for seconds in lengths if seconds is not None)
        raise UserError(f"no clip is as short as --max_seconds {max_seconds:g}: the shortest has {shortest:.1f} s")
    if longer := len(clips) - len(kept):
        print(f"{longer:,} of {counted(len(clips), 'clip')} left out: longer than --max_seconds {max_seconds:g}")
    return kept


def seconds_of(file: Path) -> float | None:
    """Return the length of an audio file by its header, or else by decoding it. None if it can't be decoded."""
    audio = {"path": str(file)}
    if (stated := stated_seconds(audio)) is not None:
        return stated
    try:
        samples, rate = read_audio(audio)
    except AudioError:
        return None
    return len(samples) / rate


def audio_directory(args: PrepareArguments) -> Path:
    """Return the directory that the files of the rows are in, unless their paths are absolute."""
    return Path(args.audio_dir) if args.audio_dir else csv_file(args).parent


def file_name(args: PrepareArguments, name: str) -> str:
    """Return the path of a row's file in its split: relative to the audio directory, or the name of a file outside."""
    directory = audio_directory(args)
    inside = PurePath(os.path.relpath(clip_file(directory, name), directory))
    return inside.name if inside.parts[0] == ".." else inside.as_posix()


def check_files(args: PrepareArguments, clips: list[Row], file: Path) -> None:
    """Raise `UserError` for files that are missing, or that would have the same name."""
    directory = audio_directory(args)
    if unnamed := [row for row, clip in enumerate(clips) if not clip["file_name"]]:
        raise UserError(
            f"{file}: {len(unnamed)} of {counted(len(clips), 'row')} have no file in column {args.audio_column!r}, "
            f"the first is row {unnamed[0]} (counted from 0): fill it in, or remove the row"
        )
    missing = [
        f"  row {row}: {clip['file_name']}"
        for row, clip in enumerate(clips)
        if not clip_file(directory, clip["file_name"]).is_file()
    ]
    if missing:
        listed = missing[:MAX_LISTED] + ([f"  and {len(missing) - MAX_LISTED} more"] if missing[MAX_LISTED:] else [])
        lines = "\n".join(listed)
        give = "give another --audio_dir" if args.audio_dir else "give --audio_dir"
        raise UserError(f"{len(missing)} of {len(clips)} audio files are not in {directory}: {give}\n{lines}")
    names: dict[str, str] = {}
    for clip in clips:
        other = names.setdefault(file_name(args, clip["file_name"]), clip["file_name"])
        if other is not clip["file_name"]:
            raise UserError(
                f"{file}: {other} and {clip['file_name']} are one file, or have the same name outside of {directory}. "
                "If they are two, give an --audio_dir that both are in"
            )


def check_speakers(args: PrepareArguments, clips: list[Row], file: Path) -> None:
    """Raise `UserError` for rows without a speaker. Print a warning about names that differ only in case."""
    if args.speaker_column == "none":
        return
    if unknown := [row for row, clip in enumerate(clips) if not clip["speaker"]]:
        raise UserError(
            f"{file}: {len(unknown)} of {counted(len(clips), 'row')} have no speaker in column "
            f"{args.speaker_column!r}, the first is row {unknown[0]} (counted from 0): fill it in, or give "
            "--speaker_column none to split by clip"
        )
    names: dict[str, str] = {}
    for speaker in sorted({clip["speaker"] for clip in clips}):
        other = names.setdefault(speaker.casefold(), speaker)
        if other != speaker:
            print(f"{file}: {other!r} and {speaker!r} are taken for two speakers", file=sys.stderr)


def split_by_speaker(args: PrepareArguments, clips: list[Row]) -> dict[str, list[Row]]:
    """Return the clips of each split. Without speakers each clip is one, in random order."""
    if args.speaker_column == "none":
        order = random.Random(0).sample(range(len(clips)), len(clips))
    else:
        speakers = sorted({clip["speaker"] for clip in clips})
        numbers = {speaker: number for number, speaker in enumerate(speakers)}
        order = [numbers[clip["speaker"]] for clip in clips]
    splits: dict[str, list[Row]] = {name: [] for name in SPLITS}
    for clip, number in zip(clips, order, strict=True):
        splits[split_of(args, number)].append(clip)
    if empty := [name for name, chosen in splits.items() if not chosen]:
        by_clip = args.speaker_column == "none"
        number = max(order) + 1
        size = "larger" if "train" in empty else "smaller"
        advice = [f"give a {size} --test_every or --validation_every"] if number >= len(SPLITS) else []
        advice += [] if by_clip else ["give --speaker_column none to split by clip"]
        advice = advice or ["prepare more clips"]
        raise UserError(
            f"there is no clip for {', '.join(empty)}, of {counted(number, 'clip' if by_clip else 'speaker')}: "
            + ", or ".join(advice)
        )
    return splits


def split_of(args: PrepareArguments, number: int) -> str:
    """Return the split of a speaker by its number in sorted order."""
    if number % args.test_every == 0:
        return "test"
    return "validation" if number % args.validation_every == 1 else "train"


def write_splits(args: PrepareArguments, splits: dict[str, list[Row]]) -> None:
    """Write the splits to `--target`, which exists only when they are complete."""
    target, directory = Path(args.target), audio_directory(args)
    unfinished = target.with_name(f"{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    rows = [(name, clip) for name, clips in splits.items() for clip in clips]
    with disk_errors(f"--target {target}"):
        for name, clip in progress(rows, "Writing"):
            copy = unfinished / name / file_name(args, clip["file_name"])
            copy.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(clip_file(directory, clip["file_name"]), copy)
        for name, clips in splits.items():
            with (unfinished / name / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, clips[0].keys())
                writer.writeheader()
                writer.writerows(clip | {"file_name": file_name(args, clip["file_name"])} for clip in clips)
        unfinished.rename(target)


def link_or_copy(source: Path, copy: Path) -> None:
    try:
        os.link(source.resolve(), copy)
    except OSError:  # on another disk, or not supported
        shutil.copyfile(source, copy)


def print_splits(args: PrepareArguments, splits: dict[str, list[Row]]) -> None:
    """Print the size of each split, and how to train on them."""
    for name, clips in splits.items():
        by_speaker = args.speaker_column != "none"
        speakers = len({clip["speaker"] for clip in clips}) if by_speaker else 0
        who = f" of {counted(speakers, 'speaker')}" if by_speaker else ""
        words = sum(len(clip["transcription"].split()) for clip in clips)
        files = [Path(args.target, name, file_name(args, clip["file_name"])) for clip in clips]
        lengths = [seconds for file in files if (seconds := seconds_of(file)) is not None]
        print(f"{name}: {counted(len(clips), 'clip')}{who}, {words:,} words, {duration(sum(lengths))}")
        if lengths:
            print(f"  {spread_of(lengths)}")
        if len(lengths) < len(clips):
            print(f"  {counted(len(clips) - len(lengths), 'clip')} can't be decoded: askd-hf distill names them")
        if silent := sum(not clip["transcription"] for clip in clips):
            print(f"  {counted(silent, 'clip')} without a transcript")
        if name == "train" and (note := little_speech(sum(lengths))):
            print(f"  {note}")
        if by_speaker and name != "train" and speakers < FEW:
            print(f"  few speakers: a smaller --{name}_every makes the error rate of {name} more reliable")
    teacher = f"--teacher openai/whisper-small --language en --dataset {shlex.quote(args.target)}"
    print(
        f"\nfind a student that is 5 times as fast, and the command that trains it (en for English, else give the "
        f"language):\n  askd-hf plan --speedup 5 {teacher}\n\nand at the end, once:\n  askd-hf evaluate --model "
        f"runs/YOUR_RUN {teacher} --eval_splits test"
    )


def spread_of(lengths: list[float]) -> str:
    """Return the range of the lengths, in seconds, and the share of the clips that fit in short windows."""
    shares = [100 * sum(length <= window for length in lengths) / len(lengths) for window in WINDOWS]
    fits = ", ".join(f"{share:.0f} % fit in {window} s" for share, window in zip(shares, WINDOWS, strict=True))
    text = f"{min(lengths):.1f} to {max(lengths):.1f} s, median {median(lengths):.1f} s; {fits}"
    if long := sum(length > LONGEST for length in lengths):
        text += f"\n  {counted(long, 'clip')} longer than {LONGEST} s, Whisper's window: cut them, or leave them out "
        text += f"with --max_seconds {LONGEST}"
    return text
