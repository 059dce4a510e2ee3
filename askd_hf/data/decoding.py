"""The bytes of an audio file to samples: by libsndfile, or by FFmpeg (PyAV), and whether the file is whole.

libsndfile decodes WAV, FLAC, Ogg and their relatives. It only estimates the length of an MP3, and knows neither m4a,
AAC, AMR, WMA nor the sound of video files: FFmpeg decodes these.
"""

import contextlib
import io
import re
from collections.abc import Iterator

import numpy as np
import soundfile

ADVICE = "convert it to wav or flac"
BLOCK = 1 << 20  # samples that libsndfile decodes at once: a usual clip
# A size that a program wrote before it knew the length, because its output was a pipe: 0xFFFFFFFF or close to 2^31.
UNKNOWN_SIZE = 0x7FFFF000
SIZES = "data|SSND|Data Size|Riff size|riff"  # of audio, in libsndfile's log of the header
# libsndfile's containers of which can be said whether they are whole
WHOLE = ("WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "FLAC", "OGG", "NIST")
# FFmpeg's containers that are decoded. No others: it knows playlists too, which make it open other files and URLs.
ROUNDED = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "asf")  # whose times may differ from what is decoded
UNTIMED = ("mp3", "aac", "ac3", "amr")  # without a header, so that FFmpeg guesses the length
CONTAINERS = (*ROUNDED, *UNTIMED, "wav", "w64", "aiff", "au", "caf", "flac", "ogg", "wv")
# What every file of a container begins with, by its first 4 bytes. Twice in a file: several were joined.
BEGINNINGS = {
    b"RIFF": slice(8, 16),
    b"RF64": slice(8, 16),
    b"FORM": slice(8, 16),
    b"riff": slice(0, 16),
    b"fLaC": slice(0, 8),
    b".snd": slice(0, 8),
    b"caff": slice(0, 8),
    b"NIST": slice(0, 8),
    b"#!AM": slice(0, 6),
    b"ID3\x03": slice(0, 5),
    b"ID3\x04": slice(0, 5),
    b"\x1a\x45\xdf\xa3": slice(0, 8),
    b"\x30\x26\xb2\x75": slice(0, 16),
}
GAP = 0.1  # seconds between two packets, or at the end, that are no rounding of their times


class AudioError(ValueError):
    """A clip that can't be used; the message is a short reason without the clip's name."""


def decode(content: bytes) -> tuple[np.ndarray, int]:
    """A whole audio file as float32 `(samples,)` or `(samples, channels)`, and its sampling rate in Hz.

    Raises:
        AudioError: not audio, corrupt, truncated, several tracks or files in one, or empty.
    """
    try:
        _check_single(content)
        if content[:3] == b"ID3" or (content[:1] == b"\xff" and content[1:2] >= b"\xe0"):  # MPEG
            return _by_ffmpeg(content)
        if content[:4] in (b"RIFF", b"FORM"):
            _check_chunks(content)
        return _by_libsndfile(_with_size(content))
    except AudioError:
        raise
    except Exception as error:  # of any decoder: MemoryError for absurd headers, ValueError, their own...
        raise AudioError(f"corrupt or truncated: {_reason(error)}") from None


def as_float(samples: np.ndarray) -> np.ndarray:
    """float32; integers of 8 to 32 bits scaled to -1 to 1, unsigned ones around their middle."""
    kind, bits = samples.dtype.kind, 8 * samples.dtype.itemsize
    if kind == "f" or bits > 32:
        return samples.astype(np.float32, copy=False)
    half = 2.0 ** (bits - 1)
    middle = half if kind == "u" else 0.0
    return ((samples.astype(np.float64) - middle) / half).astype(np.float32)


def _reason(error: Exception) -> str:
    text = getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error)
    return " ".join(text.split()) or type(error).__name__


# libsndfile


def _by_libsndfile(content: bytes) -> tuple[np.ndarray, int]:
    links = _ogg_links(content) if content[:4] == b"OggS" else [content]
    if not links:
        return _by_ffmpeg(content)
    decoded = []
    for link in links:
        try:
            file = soundfile.SoundFile(io.BytesIO(link))
        except (soundfile.LibsndfileError, TypeError):  # TypeError: raw samples without a header
            return _by_ffmpeg(content)
        with file:
            if "MPEG" in file.subtype or file.frames >= 1 << 62:  # estimates its length, or doesn't know it
                return _by_ffmpeg(content)
            if file.format not in WHOLE:
                raise AudioError(f"rare format: of {file.format} can't be said whether a file is whole; {ADVICE}")
            decoded.append((_blocks(file), file.samplerate))
            _check_complete(link, file, len(decoded[-1][0]))
    return _joined(decoded)


def _blocks(file: soundfile.SoundFile) -> np.ndarray:
    """All samples; by blocks, since libsndfile doesn't know the length of some."""
    size = max(BLOCK // file.channels, 1)
    blocks = [file.read(size, dtype="float32")]
    while len(blocks[-1]) == size:
        blocks.append(file.read(size, dtype="float32"))
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)


def _joined(decoded: list[tuple[np.ndarray, int]]) -> tuple[np.ndarray, int]:
    """One after another. Raises `AudioError` unless their rates and channels are the same."""
    kinds = {(rate, samples.shape[1:]) for samples, rate in decoded}
    if len(kinds) > 1:
        rates = sorted({rate for _, rate in decoded})
        what = f"from {rates[0]} to {rates[-1]} Hz" if len(rates) > 1 else "from mono to stereo"
        raise AudioError(f"several streams in one file: its sound changes {what}; {ADVICE}")
    samples = [block for block, _ in decoded]
    return samples[0] if len(samples) == 1 else np.concatenate(samples), decoded[0][1]


def _check_complete(content: bytes, file: soundfile.SoundFile, decoded: int) -> None:
    """Raise `AudioError` if the file ends before its header, or its container, says it does.

    libsndfile raises by itself only for FLAC. It silently shortens the rest, and says so for most in its log of the
    header: `data : 96000 (should be 47978)`.
    """
    if file.frames > decoded:
        raise AudioError(f"truncated or corrupt: {decoded} of {file.frames} samples can be decoded")
    for size, there in re.findall(rf"(?:{SIZES}) *: (\d+) \(should be (\d+)\)", file.extra_info):
        if int(there) < int(size) < UNKNOWN_SIZE:
            raise AudioError(f"truncated: {there} of {size} bytes of audio are there")
    if file.format == "AU":
        offset, size = (
            int.from_bytes(content[at : at + 4], "big" if content[:1] == b"." else "little") for at in (4, 8)
        )
        _check_rest(size, len(content) - offset - size)
    promised = re.search(rb"\nsample_count -i (\d+)", content[:1024]) if file.format == "NIST" else None
    if promised and int(promised[1]) > decoded:
        raise AudioError(f"truncated: {decoded} of {int(promised[1])} samples are there")


def _check_chunks(content: bytes) -> None:
    """Raise `AudioError` if a WAV or AIFF file has audio that its header doesn't count."""
    is_wav = content[:4] == b"RIFF"
    at, audio = 12, []
    while at + 8 <= len(content) and re.fullmatch(rb"[ -~]{4}", content[at : at + 4]):
        size = int.from_bytes(content[at + 4 : at + 8], "little" if is_wav else "big")
        if content[at : at + 4] in (b"data", b"SSND"):
            audio.append(size)
        at += 8 + size + size % 2
    if len(audio) > 1:
        raise AudioError(f"several streams in one file: {len(audio)} chunks of audio; {ADVICE}")
    _check_rest(sum(audio), len(content) - at)


def _with_size(content: bytes) -> bytes:
    """WAV and AU whose size is 0, because they were written to a pipe, as those that say that it isn't known."""
    if content[:4] == b"RIFF" and (at := content.find(b"data\0\0\0\0", 12, 4096)) > 0:
        return b"%b\xff\xff\xff\xff%b" % (content[: at + 4], content[at + 8 :])
    if content[:4] == b".snd" and content[8:12] == b"\0\0\0\0":
        return b"%b\xff\xff\xff\xff%b" % (content[:8], content[12:])
    return content


def _check_rest(size: int, rest: int) -> None:
    """Raise `AudioError` if the `rest` of a file isn't just some bytes behind its `size` bytes of audio."""
    if size and rest > 1024 + size // 20:
        raise AudioError(f"length unknown: {rest} bytes follow the {size} bytes of audio of its header; {ADVICE}")


def _check_single(content: bytes) -> None:
    """Raise `AudioError` if several files were joined to one, of which decoders would see the first alone."""
    where = BEGINNINGS.get(content[:4], slice(4, 12) if content[4:8] == b"ftyp" else slice(0, 0))
    beginning = content[where]
    if beginning and (files := content.count(beginning)) > 1:
        raise AudioError(f"several files in one: {files} were joined; split them, or convert each before")


def _ogg_links(content: bytes) -> list[bytes]:
    """The files that an Ogg file was chained of (RFC 3533): libsndfile decodes the first alone.

    None if several streams lie side by side in one of them, as in a video.

    Raises:
        AudioError: a page is missing.
    """
    starts, at, before = [], 0, 4
    pages: dict[bytes, int] = {}  # the number of the last page of each stream
    while content[at : at + 4] == b"OggS" and at + 27 <= len(content):
        flags, serial, number = content[at + 5], content[at + 14 : at + 18], content[at + 18 : at + 22]
        if flags & 2 and before & 2:
            return []
        if flags & 2:
            if not before & 4:
                break
            starts.append(at)
        elif int.from_bytes(number, "little") != pages.get(serial, -1) + 1:
            raise AudioError(f"truncated or corrupt: a page of the Ogg stream is missing before byte {at}")
        pages[serial], before = int.from_bytes(number, "little"), flags
        segments = content[at + 26]
        at += 27 + segments + sum(content[at + 27 : at + 27 + segments])
    if not before & 4 or at > len(content):
        raise AudioError("truncated: the last page of the Ogg stream is missing")
    if b"OggS" in content[at:]:
        raise AudioError(f"truncated or corrupt: no page of the Ogg stream at byte {at}")
    return [content[start:end] for start, end in zip(starts, [*starts[1:], at], strict=True)]


# FFmpeg


def _by_ffmpeg(content: bytes) -> tuple[np.ndarray, int]:
    try:
        import av  # only here: most speech doesn't need it, and it takes a while to load
    except ImportError as error:
        raise AudioError(f"needs PyAV, which can't be imported ({error}): pip install av; or {ADVICE}") from None
    try:
        options = {"format_whitelist": ",".join(CONTAINERS)}
        container = av.open(io.BytesIO(content), options=options, metadata_errors="ignore")
    except av.FFmpegError as error:
        # an invalid argument is a format that isn't on the list
        if _has_known_header(content) and not isinstance(error, av.ArgumentError):
            raise AudioError(f"corrupt or truncated: {_reason(error)}") from None
        raise AudioError(f"not an audio file, or of an unknown format: {ADVICE}") from None
    with container:
        tracks = container.streams.audio
        if not tracks:
            raise AudioError("no audio track in the file")
        if len(tracks) > 1:
            raise AudioError(f"several audio tracks: {len(tracks)}; keep the one that the transcript is of")
        return _decode_track(av, container, tracks[0], content)


def _decode_track(av, container, track, content: bytes) -> tuple[np.ndarray, int]:
    decoded: list[tuple[np.ndarray, int]] = []
    first = last = None
    start, end, packets = None, 0.0, 0
    with _log(av) as log:
        for packet in container.demux(track):
            if packet.is_corrupt:
                raise AudioError(f"truncated or corrupt: a packet at {end:.2f} s isn't whole")
            if packet.size:
                first, last, packets = first or packet, packet, packets + 1
            for frame in packet.decode():
                time = end if frame.time is None else frame.time
                if decoded and time - end > GAP:
                    raise AudioError(f"truncated or corrupt: {time - end:.2f} s are missing at {end:.2f} s")
                start = time if start is None else start
                end = time + frame.samples / frame.sample_rate
                decoded.append((_samples(frame), frame.sample_rate))
    if any("ended prematurely" in message for _, _, message in log):
        raise AudioError(f"truncated: the file ends in a packet, at {end:.2f} s")
    if container.format.name in UNTIMED:
        if first is not None:
            _check_frames(av, track, content[: first.pos], packets, bytes(first), bytes(last))
    else:
        _check_length(container, track, start or 0.0, end)
    if not decoded:
        raise AudioError("empty: no samples")
    return _joined(decoded)


def _samples(frame) -> np.ndarray:
    """`(samples, channels)` of a frame, float32."""
    values = frame.to_ndarray()  # (channels, samples), or (1, samples x channels)
    values = values.T if frame.format.is_planar else values.reshape(-1, frame.layout.nb_channels)
    return as_float(values)


def _check_frames(av, track, header: bytes, packets: int, first: bytes, last: bytes) -> None:
    """Raise `AudioError` if a stream of frames has less than its header says, or ends in a frame.

    Args:
        header: what comes before the first frame: perhaps their number, in a frame of its own (Xing).
    """
    found = re.search(rb"(?:Xing|Info)\0\0\0[\x01\x03\x05\x07\x09\x0b\x0d\x0f](.{4})", header[-4096:], re.DOTALL)
    promised = int.from_bytes(found[1], "big") if found else 0
    if packets + 1 < promised:  # some count the frame with their number
        raise AudioError(f"truncated: {packets} of {promised} frames are there")
    parser = av.CodecContext.create(track.codec_context.name, "r")
    frames = [*parser.parse(last + first), *parser.parse(None)]  # a whole one ends where another begins
    if frames and frames[0].size != len(last):
        raise AudioError(f"truncated: the file ends in a frame, after {packets - 1} whole ones")


def _check_length(container, track, start: float, end: float) -> None:
    """Raise `AudioError` if what was decoded, from `start` to `end` in seconds, is less than the header says."""
    there, promised = end, 0.0
    if track.duration is not None:
        there, promised = end - start, float(track.duration * track.time_base)
    elif container.duration is not None and len(container.streams) == 1:
        promised = container.duration / 1_000_000
    if there < promised - (GAP if container.format.name in ROUNDED else 0.001):
        raise AudioError(f"truncated: {there:.2f} of {promised:.2f} s can be decoded")


@contextlib.contextmanager
def _log(av) -> Iterator[list[tuple[int, str, str]]]:
    """FFmpeg's errors meanwhile: that a WebM of unknown length ends too early it says there alone."""
    level, skip = av.logging.get_level(), av.logging.get_skip_repeated()
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)
    try:
        with av.logging.Capture() as messages:
            yield messages
    finally:
        av.logging.set_level(level)
        av.logging.set_skip_repeated(skip)


# An audio file, though FFmpeg can't make sense of it
HEADERS = (
    b"RIFF",
    b"RF64",
    b"riff",
    b"FORM",
    b"fLaC",
    b"OggS",
    b"ID3",
    b"caff",
    b".snd",
    b"#!AM",
    b"\x1a\x45\xdf\xa3",
)


def _has_known_header(content: bytes) -> bool:
    return content[:4] in (*BEGINNINGS, b"OggS") or content[:3] == b"ID3" or content[4:8] == b"ftyp"
