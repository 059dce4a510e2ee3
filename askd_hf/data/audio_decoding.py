"""Decode the bytes of an audio file with libsndfile or FFmpeg (PyAV), and check that the file is complete.

libsndfile decodes WAV, FLAC, Ogg and similar formats. FFmpeg decodes MP3, whose length libsndfile only estimates, and
the formats that libsndfile doesn't support: m4a, AAC, AMR, WMA and the audio tracks of videos.
"""

import contextlib
import io
import re
from collections.abc import Iterator

import numpy as np
import soundfile

ADVICE = "convert it to wav or flac"
BLOCK = 1 << 20  # samples per read by libsndfile; most clips are shorter
# A program that writes to a pipe doesn't know the length. It writes this size or a larger one, up to 0xFFFFFFFF.
UNKNOWN_SIZE = 0x7FFFF000
UNKNOWN_FRAMES = 1 << 62  # libsndfile states this many or more if it doesn't know the length
SIZES = "data|SSND|Data Size|Riff size|riff"  # names of the audio size in libsndfile's header log
# libsndfile's containers whose completeness can be checked
CHECKABLE = ("WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "FLAC", "OGG", "NIST")
# Allowed containers of FFmpeg. It also supports playlists, with which a file could make it open other files and URLs.
ROUNDED = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "asf")  # duration in the header is rounded
UNTIMED = ("mp3", "aac", "ac3", "amr")  # no header, so FFmpeg estimates the duration
CONTAINERS = (*ROUNDED, *UNTIMED, "wav", "w64", "aiff", "au", "caf", "flac", "ogg", "wv")
# First 4 bytes of a container -> bytes that start every such file. If they occur twice, several files were joined.
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
MAX_GAP = 0.1  # seconds between two packets, or at the end: a longer gap isn't due to rounding


class AudioError(ValueError):
    """Audio that can't be decoded. The message is a short reason without the clip's name."""


def decode(content: bytes) -> tuple[np.ndarray, int]:
    """Decode an audio file. Return float32 `(samples,)` or `(samples, channels)`, and the sampling rate in Hz.

    Raises `AudioError` if the content is not audio, corrupt, truncated, empty, or has several tracks or files.
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
    except Exception as error:  # decoders raise MemoryError for absurd headers, ValueError, or their own errors
        raise AudioError(f"corrupt or truncated: {_reason(error)}") from None


def as_float(samples: np.ndarray) -> np.ndarray:
    """Convert to float32. Integers of 8 to 32 bits are scaled to [-1, 1]; the middle of unsigned ones is 0."""
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
        except (soundfile.LibsndfileError, TypeError):  # TypeError: raw samples without header
            return _by_ffmpeg(content)
        with file:
            if "MPEG" in file.subtype or file.frames >= UNKNOWN_FRAMES:  # the length is estimated or unknown
                return _by_ffmpeg(content)
            if file.format not in CHECKABLE:
                raise AudioError(
                    f"unsupported format {file.format}, which can't be checked for completeness; {ADVICE}"
                )
            decoded.append((_blocks(file), file.samplerate))
            _check_complete(link, file, len(decoded[-1][0]))
    return _joined(decoded)


def _blocks(file: soundfile.SoundFile) -> np.ndarray:
    """Read all samples in blocks, since libsndfile doesn't know the length of some files."""
    size = max(BLOCK // file.channels, 1)
    blocks = [file.read(size, dtype="float32")]
    while len(blocks[-1]) == size:
        blocks.append(file.read(size, dtype="float32"))
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)


def _joined(decoded: list[tuple[np.ndarray, int]]) -> tuple[np.ndarray, int]:
    """Concatenate the parts. Raise `AudioError` unless they have the same sampling rate and number of channels."""
    kinds = {(rate, samples.shape[1:]) for samples, rate in decoded}
    if len(kinds) > 1:
        rates = sorted({rate for _, rate in decoded})
        what = f"from {rates[0]} to {rates[-1]} Hz" if len(rates) > 1 else "from mono to stereo"
        raise AudioError(f"several streams in one file: the audio changes {what}; {ADVICE}")
    samples = [block for block, _ in decoded]
    return samples[0] if len(samples) == 1 else np.concatenate(samples), decoded[0][1]


def _check_complete(content: bytes, file: soundfile.SoundFile, decoded: int) -> None:
    """Raise `AudioError` if the file is shorter than its header or container states.

    libsndfile itself raises only for FLAC. It shortens other formats silently, and for most of them logs the
    difference: `data : 96000 (should be 47978)`.
    """
    if file.frames > decoded:
        raise AudioError(f"truncated or corrupt: {decoded} of {file.frames} samples can be decoded")
    for size, present in re.findall(rf"(?:{SIZES}) *: (\d+) \(should be (\d+)\)", file.extra_info):
        if int(present) < int(size) < UNKNOWN_SIZE:
            raise AudioError(f"truncated: {present} of {size} bytes of audio")
    if file.format == "AU":
        offset, size = (
            int.from_bytes(content[at : at + 4], "big" if content[:1] == b"." else "little") for at in (4, 8)
        )
        _check_rest(size, len(content) - offset - size)
    stated = re.search(rb"\nsample_count -i (\d+)", content[:1024]) if file.format == "NIST" else None
    if stated and int(stated[1]) > decoded:
        raise AudioError(f"truncated: {decoded} of {int(stated[1])} samples")


def _check_chunks(content: bytes) -> None:
    """Raise `AudioError` if a WAV or AIFF file has more audio than its header states."""
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
    """Set a size of 0, which WAV and AU have if they were written to a pipe, to the value for "unknown"."""
    if content[:4] == b"RIFF" and (at := content.find(b"data\0\0\0\0", 12, 4096)) > 0:
        return b"%b\xff\xff\xff\xff%b" % (content[: at + 4], content[at + 8 :])
    if content[:4] == b".snd" and content[8:12] == b"\0\0\0\0":
        return b"%b\xff\xff\xff\xff%b" % (content[:8], content[12:])
    return content


def _check_rest(size: int, rest: int) -> None:
    """Raise `AudioError` if too many bytes (`rest`) follow the `size` bytes of audio."""
    if size and rest > 1024 + size // 20:
        raise AudioError(
            f"length unknown: {rest} bytes follow the {size} bytes of audio stated in the header; {ADVICE}"
        )


def _check_single(content: bytes) -> None:
    """Raise `AudioError` if several files were joined into one: decoders would read only the first."""
    where = BEGINNINGS.get(content[:4], slice(4, 12) if content[4:8] == b"ftyp" else slice(0, 0))
    beginning = content[where]
    if beginning and (files := content.count(beginning)) > 1:
        raise AudioError(f"several files in one: {files} were joined; split them, or convert each one before joining")


def _ogg_links(content: bytes) -> list[bytes]:
    """Return the links of a chained Ogg file (RFC 3533), of which libsndfile decodes only the first.

    The list is empty if a link has several multiplexed streams, as in a video.

    Raises `AudioError` if a page is missing.
    """
    starts, at, before = [], 0, 4
    pages: dict[bytes, int] = {}  # sequence number of the last page of each stream
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
        import av  # imported only here: most files don't need it, and importing is slow
    except ImportError as error:
        raise AudioError(f"requires PyAV, which can't be imported ({error}): pip install av; or {ADVICE}") from None
    try:
        options = {"format_whitelist": ",".join(CONTAINERS)}
        container = av.open(io.BytesIO(content), options=options, metadata_errors="ignore")
    except av.FFmpegError as error:
        # FFmpeg reports a format that isn't allowed as an invalid argument
        if _has_known_header(content) and not isinstance(error, av.ArgumentError):
            raise AudioError(f"corrupt or truncated: {_reason(error)}") from None
        raise AudioError(f"not an audio file, or an unknown format: {ADVICE}") from None
    with container:
        tracks = container.streams.audio
        if not tracks:
            raise AudioError("no audio track in the file")
        if len(tracks) > 1:
            raise AudioError(f"several audio tracks: {len(tracks)}; keep the transcribed one only")
        return _decode_track(av, container, tracks[0], content)


def _decode_track(av, container, track, content: bytes) -> tuple[np.ndarray, int]:
    decoded: list[tuple[np.ndarray, int]] = []
    first = last = None
    start, end, packets = None, 0.0, 0
    with _log(av) as log:
        for packet in container.demux(track):
            if packet.is_corrupt:
                raise AudioError(f"truncated or corrupt: incomplete packet at {end:.2f} s")
            if packet.size:
                first, last, packets = first or packet, packet, packets + 1
            for frame in packet.decode():
                time = end if frame.time is None else frame.time
                if decoded and time - end > MAX_GAP:
                    raise AudioError(f"truncated or corrupt: {time - end:.2f} s missing at {end:.2f} s")
                start = time if start is None else start
                end = time + frame.samples / frame.sample_rate
                decoded.append((_samples(frame), frame.sample_rate))
    if any("ended prematurely" in message for _, _, message in log):
        raise AudioError(f"truncated: the file ends within a packet at {end:.2f} s")
    if container.format.name in UNTIMED:
        if first is not None:
            _check_frames(av, track, content[: first.pos], packets, bytes(first), bytes(last))
    else:
        _check_length(container, track, start or 0.0, end)
    if not decoded:
        raise AudioError("empty: no samples")
    return _joined(decoded)


def _samples(frame) -> np.ndarray:
    """Return the samples of a frame, float32 `(samples, channels)`."""
    values = frame.to_ndarray()  # (channels, samples), or (1, samples x channels)
    values = values.T if frame.format.is_planar else values.reshape(-1, frame.layout.nb_channels)
    return as_float(values)


def _check_frames(av, track, header: bytes, packets: int, first: bytes, last: bytes) -> None:
    """Raise `AudioError` if there are fewer frames than the header states, or the last frame is incomplete.

    Args:
        header: the bytes before the first frame. They may contain the number of frames (Xing or Info frame).
    """
    match = re.search(rb"(?:Xing|Info)\0\0\0[\x01\x03\x05\x07\x09\x0b\x0d\x0f](.{4})", header[-4096:], re.DOTALL)
    stated = int.from_bytes(match[1], "big") if match else 0
    if packets + 1 < stated:  # some encoders count the Xing frame
        raise AudioError(f"truncated: {packets} of {stated} frames")
    parser = av.CodecContext.create(track.codec_context.name, "r")
    frames = [*parser.parse(last + first), *parser.parse(None)]  # a complete frame ends where the next one starts
    if frames and frames[0].size != len(last):
        raise AudioError(f"truncated: the file ends within a frame, after {packets - 1} complete ones")


def _check_length(container, track, start: float, end: float) -> None:
    """Raise `AudioError` if the decoded audio, from `start` to `end` in seconds, is shorter than the header states."""
    decoded, stated = end, 0.0
    if track.duration is not None:
        decoded, stated = end - start, float(track.duration * track.time_base)
    elif container.duration is not None and len(container.streams) == 1:
        stated = container.duration / 1_000_000
    if decoded < stated - (MAX_GAP if container.format.name in ROUNDED else 0.001):
        raise AudioError(f"truncated: {decoded:.2f} of {stated:.2f} s can be decoded")


@contextlib.contextmanager
def _log(av) -> Iterator[list[tuple[int, str, str]]]:
    """Capture FFmpeg's error log, which is the only sign that a WebM file of unknown length is truncated."""
    level, skip = av.logging.get_level(), av.logging.get_skip_repeated()
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)
    try:
        with av.logging.Capture() as messages:
            yield messages
    finally:
        av.logging.set_level(level)
        av.logging.set_skip_repeated(skip)


def _has_known_header(content: bytes) -> bool:
    return content[:4] in (*BEGINNINGS, b"OggS") or content[:3] == b"ID3" or content[4:8] == b"ftyp"
