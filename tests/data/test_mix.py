"""Mixes and streams: shares, columns, order."""

import itertools
import logging
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from accelerate.data_loader import prepare_data_loader
from datasets import Audio, Dataset, IterableDataset, load_dataset
from speech import audiofolder
from torch.utils.data import BatchSampler, DataLoader

from askd_hf.data import (
    Limits,
    SeededDataset,
    SpeechStream,
    StreamSampler,
    clean_texts,
    filter_invalid_clips,
    load_speech_dataset,
    mix,
    select_training_columns,
    to_iterable_dataset,
    with_no_speech,
)
from askd_hf.data.columns import AUDIO_FILE
from askd_hf.data.languages import with_language, without_language
from askd_hf.data.no_speech import as_no_speech
from askd_hf.data.stream import warn_of_repeated_reads
from askd_hf.errors import UserError, warn_once

COLUMNS = ["audio", "text", "clip", "language", "task", "segments", "prompt", "no_speech"]


def speech(folder, name: str, clips: int) -> Dataset:
    """Clips `NAME/audio/I.wav` with the texts `NAME I`."""
    dataset = load_speech_dataset(
        str(audiofolder(folder / name, [f"{name} {i}" for i in range(clips)])), None, "train"
    )
    return filter_invalid_clips(dataset, lambda row: list(row["text"]), Limits(1.0), on_bad_audio="error")


@pytest.fixture
def two(tmp_path) -> list[Dataset]:
    return [speech(tmp_path, "a", 12), speech(tmp_path, "b", 4)]


def test_without_weights_every_clip_is_there_once(two):
    mixed = mix(two, [], seed=0)
    assert mixed["text"][:] == [f"a {i}" for i in range(12)] + [f"b {i}" for i in range(4)]
    assert set(mixed.column_names) == {*COLUMNS, "duration", "audio_key", "label_tokens", "speaker"}
    assert mixed["audio_key"][:12] == two[0]["audio_key"][:]
    assert mix(two[:1], [], seed=0) is two[0]


def test_weights_are_shares_and_every_clip_is_there(two):
    mixed = mix(two, [3.0, 1.0], seed=0)
    counts = Counter(mixed["text"][:])
    assert set(counts) == {*(f"a {i}" for i in range(12)), *(f"b {i}" for i in range(4))}
    many = mix(two, [1.0, 9.0], seed=1)["text"][:]
    share = sum(text.startswith("b") for text in many) / len(many)
    assert abs(share - 0.9) < 4 * (0.09 / len(many)) ** 0.5
    assert mix(two, [3.0, 1.0], seed=0)["text"][:] == mixed["text"][:] != mix(two, [3.0, 1.0], seed=5)["text"][:]


def test_columns_that_one_lacks_are_empty_there(two):
    two[0] = two[0].add_column("segments", [[{"start": 0.0, "end": 0.5, "text": "x"}]] * 12).remove_columns("speaker")
    mixed = mix([with_language(two[0], "French", None), two[1]], [], seed=0)
    assert mixed["language"][:] == ["fr"] * 12 + [None] * 4
    assert mixed["task"][:] == ["transcribe"] * 12 + [None] * 4
    assert mixed[0]["segments"] == [{"start": 0.0, "end": 0.5, "text": "x"}] and mixed[15]["segments"] is None
    assert "speaker" not in mixed.column_names


def test_negatives_are_their_share(two):
    silence = as_no_speech(two[1])
    silence = filter_invalid_clips(
        silence, lambda row: [1, 2], Limits(1.0, allow_empty_text=True), on_bad_audio="error"
    )
    mixed = with_no_speech(two[0], silence, 0.4, seed=0)
    assert mixed["text"][:] == [*two[0]["text"][:], *[""] * 8]  # 8 of 20
    assert Counter(mixed["clip"][12:]) == dict.fromkeys(two[1]["clip"][:], 2)


def saved_with_audio_inside(folder, clips: int) -> Dataset:
    """As `audiofolder`, but saved by `datasets` with the files' bytes; the second clip isn't audio."""
    dataset = load_speech_dataset(str(audiofolder(folder / "files", [f"t {i}" for i in range(clips)])), None, "train")
    audio = [{"bytes": Path(row["audio"]["path"]).read_bytes(), "path": None} for row in dataset]
    audio[1]["bytes"] = b"broken"
    texts = Dataset.from_dict({"text": dataset["text"][:], "prompt": ["before"] * clips})
    texts.add_column("audio", audio, feature=Audio(decode=False)).save_to_disk(folder / "saved")
    return load_speech_dataset(str(folder / "saved"), None, "train")


def audio_addresses(dataset: Dataset) -> set[int]:
    """Where the bytes of the clips lie in memory, or in the mapped file."""
    return {chunk.field("bytes").buffers()[2].address for chunk in dataset.data.column("audio").chunks} - {0}


@pytest.mark.parametrize("weights", [[], [1.0, 2.0]])
def test_no_audio_is_copied(tmp_path, two, weights):
    loaded = saved_with_audio_inside(tmp_path / "c", 6)
    limits = Limits(1.0, allow_empty_text=True)
    saved, silence = (
        filter_invalid_clips(dataset, lambda row: list(row["text"]), limits, on_bad_audio="skip")
        for dataset in (loaded, as_no_speech(loaded))
    )
    assert saved["text"][:] == ["t 0", "t 2", "t 3", "t 4", "t 5"]  # by a mapping of indices
    files = sorted(tmp_path.rglob("*"))
    mixed = with_no_speech(mix([two[1], saved], weights, seed=0), silence, 0.3, seed=0)
    assert audio_addresses(loaded) <= audio_addresses(mixed)
    assert sorted(tmp_path.rglob("*")) == files
    assert len({row["text"] for row in mixed}) == 4 + 5 + 1
    originals = {row["clip"]: row | {"segments": None, "language": None} for part in (two[1], saved) for row in part}
    for row in mixed:
        expected = originals[row["clip"]]
        if row["text"] == "":
            expected |= {"text": "", "prompt": None, "label_tokens": 0, "no_speech": True}
        assert {name: expected.get(name) for name in row} == row


def test_arrays_of_samples_are_not_mixed_or_streamed(two):
    array = {"array": [0.1, 0.2], "sampling_rate": 16_000}
    arrays = two[1].remove_columns("audio").add_column("audio", [array] * 4)
    with pytest.raises(UserError, match=r"audio/0\.wav: cannot mix datasets whose audio is stored as arrays; save it"):
        mix([two[0], arrays], [], seed=0)
    assert mix([arrays], [], seed=0) is arrays
    with pytest.raises(
        UserError, match="cannot stream datasets whose audio is stored as arrays; save it as audio files"
    ):
        to_iterable_dataset(arrays)


# ---- streams ----


def streamed(two: list[Dataset], **options) -> SpeechStream:
    return SpeechStream([select_training_columns(to_iterable_dataset(dataset)) for dataset in two], **options)


def first(stream: SpeechStream, number: int) -> list[str]:
    return [row["text"] for row in itertools.islice(stream.rows(), number)]


def test_a_stream_without_weights_gives_every_clip_once_an_epoch(two):
    everything = sorted([*two[0]["text"][:], *two[1]["text"][:]])
    texts = first(streamed(two, seed=3, buffer_size=5), 48)
    epochs = [texts[:16], texts[16:32], texts[32:]]
    assert all(sorted(epoch) == everything for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert Counter(text[0] for text in texts[:8]) == {"a": 4, "b": 4}  # they take turns while both have some


def test_the_order_of_a_stream_is_the_seeds(two):
    assert first(streamed(two, seed=3), 40) == first(streamed(two, seed=3), 40) != first(streamed(two, seed=4), 40)
    rows = list(itertools.islice(streamed(two, seed=3).rows(), 20))
    assert [row["rng_key"] for row in rows] == [(3, 0, i) for i in range(16)] + [(3, 1, i) for i in range(4)]
    assert set(rows[0]) == {*COLUMNS, "rng_key"}


def test_shares_of_a_stream(two):
    texts = first(streamed(two, probabilities=[1.0, 4.0], seed=1), 600)
    share = sum(text.startswith("b") for text in texts) / 600
    assert abs(share - 0.8) < 4 * (0.16 / 600) ** 0.5
    assert len(set(texts)) == 16
    silence = select_training_columns(to_iterable_dataset(as_no_speech(two[1])))
    texts = first(streamed(two[:1], seed=1, no_speech_dataset=silence, no_speech_probability=0.25), 600)
    assert abs(texts.count("") / 600 - 0.25) < 4 * (0.1875 / 600) ** 0.5


def test_an_empty_stream_ends(two):
    nothing = select_training_columns(to_iterable_dataset(two[0])).take(0)
    with pytest.raises(UserError, match="no rows"):
        first(SpeechStream([nothing]), 1)


def test_a_streams_sampler_gives_rows(two):
    stream = streamed(two, seed=3)
    sampler = StreamSampler(stream, 20)
    assert len(sampler) == 20
    rows = list(sampler)
    assert [row["text"] for row in rows] == first(stream, 20)
    assert stream[rows[0]] is rows[0]


def counted_reads(clips: int, **options) -> tuple[list[int], "SpeechStream"]:
    """A stream of clips `0`, `1`, ..., and the clips that were read from it."""
    read: list[int] = []

    def note(row: dict) -> dict:
        read.append(int(row["clip"]))
        return row

    audio = [{"path": f"{i}.wav", "bytes": None} for i in range(clips)]
    rows = Dataset.from_dict({"clip": [str(i) for i in range(clips)], "audio": audio, "text": ["a"] * clips})
    rows = rows.cast_column("audio", Audio(decode=False))
    return read, SpeechStream([select_training_columns(to_iterable_dataset(rows).map(note))], **options)


def batches_of(stream: SpeechStream, process: int, processes: int, steps: int, batch_size: int) -> list[list[dict]]:
    """The batches that accelerate gives to a process."""
    stream = replace(stream, process=process, processes=processes)
    sampler = StreamSampler(stream, steps * processes * batch_size, batch_size)
    loader = DataLoader(stream, batch_sampler=BatchSampler(sampler, batch_size, drop_last=False), collate_fn=list)
    return list(prepare_data_loader(loader, num_processes=processes, process_index=process, put_on_device=False))


def test_processes_read_their_shares_only():
    """8 processes that train on 40 of 400 rows each read at most 1.25 times as many."""
    seen: list[str] = []
    keys: set[tuple[int, ...]] = set()
    total = 0
    for process in range(8):
        read, stream = counted_reads(400, seed=3)
        batches = batches_of(stream, process, 8, steps=10, batch_size=4)
        assert len(batches) == 10 and all(len(batch) == 4 for batch in batches)
        rows = [row for batch in batches for row in batch]
        total += len(read)  # all of its share, for the shuffle buffer
        seen += [row["clip"] for row in rows]
        keys |= {row["rng_key"] for row in rows}
        rest = batches_of(counted_reads(400, seed=3)[1], process, 8, steps=10, batch_size=4)
        assert rest == batches  # defined by the seed
    assert len(set(seen)) == 320 and len(keys) == 320 and total <= 1.25 * 320


def shards_of(sizes: list[int]) -> tuple[list[str], IterableDataset]:
    """A list of the clips that are read, and a dataset in shards of these sizes."""
    read: list[str] = []

    def rows(clips: list[range]) -> Iterator[dict]:
        for clip in itertools.chain(*clips):
            read.append(str(clip))
            yield dict(clip=str(clip), text="a", no_speech=False)

    ends = list(itertools.accumulate(sizes))
    clips = [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    return read, IterableDataset.from_generator(rows, gen_kwargs=dict(clips=clips))


@pytest.mark.parametrize(
    ("sizes", "most", "warned"),
    [
        ([400], 8, True),
        ([134, 133, 133], 8 / 3 + 0.1, True),  # three processes share one in turn
        ([60, 60, 60, 55, 55, 55, 55], 1.25, False),
        ([50] * 8, 1, False),
        ([295, *[15] * 7], 1, False),
        ([20] * 20, 1, False),
        ([210, *[10] * 19], 1, False),
    ],
)
def test_a_row_is_read_about_once_where_there_are_as_many_shards_as_processes(sizes, most, warned, caplog):
    total, epoch = 0, []
    for process in range(8):
        read, dataset = shards_of(sizes)
        warn_of_repeated_reads(["speech"], [dataset], 8)
        stream = SpeechStream([dataset], seed=3, buffer_size=20, process=process, processes=8)
        epoch += [row["clip"] for row in stream._kept(0)]
        total += len(read)
    assert sorted(map(int, epoch)) == list(range(400))
    assert total <= most * 400
    assert ("speech has" in caplog.text) == warned


@pytest.mark.parametrize(("clips", "processes"), [(5, 2), (5, 3), (12, 8), (400, 3)])
def test_all_processes_together_have_each_clip_once_in_an_epoch(clips, processes):
    epoch: list[str] = []
    for process in range(processes):
        stream = replace(counted_reads(clips, seed=5)[1], process=process, processes=processes)
        epoch += [row["clip"] for row in itertools.takewhile(lambda row: row["rng_key"][1] == 0, stream.rows())]
    assert sorted(map(int, epoch)) == list(range(clips))


def test_a_process_has_other_clips_in_the_next_epoch():
    stream = replace(counted_reads(40, seed=5)[1], process=0, processes=4)
    rows = list(itertools.islice(stream.rows(), 20))
    first, second = ({row["clip"] for row in rows if row["rng_key"][1] == epoch} for epoch in (0, 1))
    assert len(first) == len(second) == 10 and first != second


def test_a_file_is_shared_out_by_its_row_groups(monkeypatch, tmp_path, caplog):
    """And by its rows if it has too few of them."""
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)  # 5 seconds per epoch of Parquet
    rows = Dataset.from_dict({"clip": [str(i) for i in range(12)], "text": ["a"] * 12})
    for size, warned in ((2, False), (12, True)):
        file = tmp_path / f"{size}.parquet"
        pq.write_table(rows.data.table, file, row_group_size=size)
        streamed = load_dataset("parquet", data_files=str(file), split="train", streaming=True)
        assert streamed.num_shards == 1
        clips = []
        for process in range(4):
            stream = SpeechStream([select_training_columns(streamed)], process=process, processes=4)
            of_process = list(itertools.takewhile(lambda row: row["rng_key"][1] == 0, stream.rows()))
            assert 2 <= len(of_process) <= 4
            clips += [row["clip"] for row in of_process]
        assert sorted(map(int, clips)) == list(range(12))
        warn_of_repeated_reads([str(file)], [streamed], 4)
        assert ("has 1 shards for 4 processes: up to 4 processes read the same shard" in caplog.text) == warned


def test_an_empty_share_ends_by_name():
    stream = replace(counted_reads(2)[1], process=3, processes=4)
    with pytest.raises(UserError, match="no rows for process 3 of 4"):
        next(stream.rows())


def test_drawn_rows_know_their_epoch(two):
    drawn = SeededDataset(two[0], seed=9)
    drawn.epoch = 2
    assert len(drawn) == 12 and drawn[5] == two[0][5] | {"rng_key": (9, 2, 5)}


@pytest.mark.parametrize("layout", ["audiofolder", "saved", "parquet", "hub"])
@pytest.mark.parametrize("english", [True, False])
def test_what_is_streamed_is_what_is_loaded(tmp_path, layout, english):
    folder = audiofolder(tmp_path / "speech", ["x y", "y", "z"])
    loaded = load_speech_dataset(str(folder), None, "train")
    if layout == "saved":
        loaded.save_to_disk(tmp_path / "saved")
        folder = tmp_path / "saved"
    elif layout != "audiofolder":
        target = tmp_path / ("data.parquet" if layout == "parquet" else "hub/data/train-00000-of-00001.parquet")
        target.parent.mkdir(parents=True, exist_ok=True)
        embedded = [{"bytes": Path(row["audio"]["path"]).read_bytes(), "path": None} for row in loaded]
        loaded = loaded.remove_columns(["audio", "clip"]).add_column("audio", embedded)
        loaded.to_parquet(target)
        folder = target if layout == "parquet" else tmp_path / "hub"
    expected = load_speech_dataset(str(folder), None, "train")
    streamed = load_speech_dataset(str(folder), None, "train", streaming=True)
    assert set(streamed.column_names) == set(expected.column_names)
    assert streamed.features == expected.features | {"audio": AUDIO_FILE}
    assert list(select_training_columns(streamed).column_names) == COLUMNS
    spoken = without_language(with_language(streamed, "fr", None)) if english else with_language(streamed, "fr", None)
    rows = list(select_training_columns(clean_texts(spoken, "auto", "speech")))
    assert [row["text"] for row in rows] == ["x y", "y", "z"]
    if layout in ("audiofolder", "saved"):
        assert [row["clip"] for row in rows] == expected["clip"][:]
    else:
        assert all(re.fullmatch("train-[0-9a-f]{12}", row["clip"]) for row in rows)
    assert [row["audio"] for row in rows] == expected["audio"][:]
    assert {row["language"] for row in rows} == {None if english else "fr"} and {row["prompt"] for row in rows} == {
        None
    }


def test_texts_of_a_stream_are_cleaned(tmp_path, caplog):
    folder = audiofolder(tmp_path, ["ONE  TWO", "(SIGHS) THREE"])
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        stream = clean_texts(load_speech_dataset(str(folder), None, "train", streaming=True), "auto", "mine")
    assert "mine: the transcripts are all upper-case and are lower-cased" in caplog.text
    assert [row["text"] for row in stream] == ["one two", "(sighs) three"]
    stream = load_speech_dataset(str(folder), None, "train", streaming=True)
    cleaned = clean_texts(stream, "keep", "mine", lambda text: text.replace("(SIGHS)", " "))
    assert [row["text"] for row in cleaned] == ["ONE TWO", "THREE"]


def test_a_stream_has_no_slices(tmp_path):
    folder = audiofolder(tmp_path / "a", ["x", "y"])
    load_speech_dataset(str(folder), None, "train").remove_columns(["audio", "clip"]).add_column(
        "audio", [{"bytes": b"", "path": None}] * 2
    ).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(UserError, match="doesn't support split slices \\('train\\[:1\\]'\\); use --max_train_samples"):
        load_speech_dataset(str(tmp_path / "x.parquet"), None, "train[:1]", streaming=True)
    both = load_speech_dataset(str(folder), None, "train[:1]+train[1:]", streaming=True)
    assert [row["text"] for row in both] == ["x", "y"]
    assert set(both.take(1).column_names) == {"audio", "text", "clip", "speaker"}
    added = load_speech_dataset(str(tmp_path / "x.parquet"), None, "train+train", streaming=True)
    assert set(added.take(1).column_names) == {"audio", "text", "clip", "speaker"}


@pytest.mark.parametrize("stream", [False, True])
def test_segments_and_prompts_are_cleaned_like_texts(tmp_path, stream):
    speech = load_speech_dataset(str(audiofolder(tmp_path, ["AB  CD"])), None, "train")
    speech = speech.add_column("prompt", ["EF "]).add_column(
        "segments", [[{"start": 0.0, "end": 0.5, "text": "AB"}, {"start": 0.5, "end": 0.5, "text": "CD"}]]
    )
    (row,) = clean_texts(to_iterable_dataset(speech) if stream else speech, "auto", "mine")
    assert (row["text"], row["prompt"]) == ("ab cd", "ef")
    assert [segment["text"] for segment in row["segments"]] == ["ab", "cd"]
    assert row["segments"][1]["start"] == 0.5
