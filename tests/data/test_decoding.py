"""Files of any format: as long as what was put in, or named. What goes in is written by soundfile and FFmpeg."""

import csv
import io
import struct
import sys

import av
import librosa
import numpy as np
import pytest
import soundfile
from scripts import ROOT
from speech import RATE, encoded, noise, tone

from askd_hf.data import AudioError, decode_audio, load_speech_dataset
from askd_hf.data.audio import resample
from askd_hf.data.audiofolder import audio_files

CUT = "truncated|corrupt|no audio track"


def ffmpeg(
    container: str,
    codec: str,
    wave: np.ndarray,
    rate: int = RATE,
    tracks: int = 1,
    kbps: int | None = None,
    encoder: dict | None = None,
    **muxer: str,
) -> bytes:
    """A mono file as FFmpeg writes it; `wave` has 16 kHz."""
    file = io.BytesIO()
    with av.open(file, "w", format=container, container_options=muxer) as output:
        streams = [output.add_stream(codec, rate=rate, layout="mono") for _ in range(tracks)]
        for stream in streams:
            if kbps:
                stream.bit_rate = 1000 * kbps
            stream.options = encoder or {}
        frame = av.AudioFrame.from_ndarray(wave[None].copy(), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = RATE, 0
        resampler = av.AudioResampler(format=streams[0].format.name, layout="mono", rate=rate)
        frames = [*resampler.resample(frame), *resampler.resample(None)]
        for stream in streams:
            for packet in [packet for part in (*frames, None) for packet in stream.encode(part)]:
                output.mux(packet)
    return file.getvalue()


def vbr_without_header(wave: np.ndarray) -> bytes:
    options = dict(encoder={"q": "2", "compression_level": "2"}, write_xing="0", id3v2_version="0")
    return ffmpeg("mp3", "libmp3lame", wave, **options)


def decoded(content: bytes) -> np.ndarray:
    return decode_audio({"path": None, "bytes": content})


def sound(seconds: float = 3.0) -> np.ndarray:
    return tone(440, seconds) + noise(seconds) / 2


@pytest.mark.parametrize(
    "container, subtype",
    [
        *[("WAV", kind) for kind in ("GSM610", "G721_32", "NMS_ADPCM_16", "IMA_ADPCM", "ULAW", "PCM_U8", "DOUBLE")],
        *[("AU", "G723_24"), ("AIFF", "GSM610"), ("AIFF", "IMA_ADPCM"), ("CAF", "ALAC_16"), ("RF64", "PCM_16")],
        *[("W64", "GSM610"), ("W64", "PCM_16"), ("NIST", "ULAW"), ("OGG", "OPUS"), ("CAF", "PCM_24")],
    ],
)
def test_what_libsndfile_knows_is_whole_or_named(container, subtype):
    content = encoded(sound(), container=container, subtype=subtype)
    length = len(decoded(content))
    assert 3 * RATE <= length < 3.06 * RATE  # up to a block of ADPCM more
    for kept in (0.95, 0.5):
        with pytest.raises(AudioError, match=CUT):
            decoded(content[: int(kept * len(content))])


@pytest.mark.parametrize("container", ["PAF", "AVR", "IRCAM", "XI", "HTK", "MAT4"])
def test_a_format_that_cannot_tell_its_length_is_named(container):
    with pytest.raises(AudioError, match=f"unsupported format {container}, which can't be checked"):
        decoded(encoded(sound(), container=container))


@pytest.mark.parametrize(
    "arguments, tolerance",
    [
        (dict(container="ipod", codec="aac"), 0.04),
        (dict(container="ipod", codec="alac"), 0.0),
        (dict(container="mp4", codec="aac", movflags="frag_keyframe+empty_moov", frag_duration="500000"), 0.1),
        (dict(container="adts", codec="aac"), 0.1),
        (dict(container="webm", codec="libopus"), 0.0),
        (dict(container="webm", codec="libopus", live="1"), 0.0),  # no duration, as a browser records it
        (dict(container="matroska", codec="flac"), 0.0),
        (dict(container="amr", codec="libopencore_amrnb", rate=8000), 0.04),
        (dict(container="3gp", codec="libopencore_amrnb", rate=8000), 0.04),
        (dict(container="asf", codec="wmav2", rate=44100, kbps=64), 0.05),
        (dict(container="wv", codec="wavpack"), 0.0),
        (dict(container="mp3", codec="libmp3lame"), 0.0),
        (dict(container="wav", codec="mp3"), 0.1),
        (dict(container="wav", codec="g722"), 0.0),
    ],
    ids=lambda value: value if isinstance(value, float) else "-".join(map(str, value.values())),
)
def test_what_only_ffmpeg_knows_is_whole_or_named(arguments, tolerance):
    content = ffmpeg(wave=sound(), **arguments)
    samples = decoded(content)
    assert abs(len(samples) / RATE - 3.0) <= tolerance
    spectrum = np.abs(np.fft.rfft(samples))
    assert spectrum.argmax() * RATE / len(samples) == pytest.approx(440, abs=1)
    for kept in (0.93, 0.5):
        with pytest.raises(AudioError, match=CUT):
            decoded(content[: int(kept * len(content))])


def test_speech_sounds_as_in_the_file_it_was_converted_from():
    folder = ROOT / "examples" / "demo" / "data" / "studio"
    with (folder / "metadata.csv").open(newline="") as file:
        clip = next(csv.DictReader(file))["file_name"]
    wave = decode_audio({"path": str(folder / clip), "bytes": None})
    same = decoded(ffmpeg("ipod", "alac", wave))
    np.testing.assert_allclose(same, wave, atol=2**-15)
    mp3 = decoded(encoded(wave, container="MP3"))
    assert len(mp3) == len(wave)  # without the encoder's delay, in its place
    assert np.corrcoef(mp3, wave)[0, 1] > 0.98


def test_an_mp3_without_a_header_is_whole():
    """libsndfile guesses its length from the first frame's bit rate, which is that of silence here."""
    wave = np.concatenate([noise(3), np.zeros(3 * RATE, np.float32)])
    content = vbr_without_header(wave)
    assert b"Xing" not in content
    assert b"Info" not in content
    assert 6 * RATE <= len(decoded(content)) <= 6 * RATE + 3 * 1152
    with pytest.raises(AudioError, match="truncated: the file ends within a frame"):
        decoded(content[: int(0.3 * len(content))])


def test_tags_of_an_mp3_are_no_sound():
    content = encoded(sound(), container="MP3")
    id3 = b"ID3\4\0\0" + bytes([0, 2, 0, 0]) + bytes(2 << 14)
    ape = [b"APETAGEX" + struct.pack("<4I8x", 2000, 32 + 97, 1, flags) for flags in (0xA0000000, 0x80000000)]
    ape = ape[0] + struct.pack("<II", 88, 0) + b"\0".join([b"CO", b"x" * 86]) + ape[1]
    for tagged in (id3 + content, content + b"TAG" + bytes(125), content + ape, content + ape + b"TAG" + bytes(125)):
        np.testing.assert_array_equal(decoded(tagged), decoded(content))


def test_joined_streams_are_decoded_whole():
    for container, subtype in (("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None)):
        one, other = (encoded(wave, container=container, subtype=subtype) for wave in (tone(440, 2), tone(880, 1)))
        both = decoded(one + other)
        assert 3 * RATE <= len(both) <= 3.2 * RATE
        np.testing.assert_array_equal(both[: 2 * RATE - 3000], decoded(one)[: 2 * RATE - 3000])
        assert np.abs(np.fft.rfft(both[-RATE:])).argmax() == pytest.approx(880, abs=2)
    adts = ffmpeg("adts", "aac", sound())
    assert len(decoded(adts + adts)) == 2 * len(decoded(adts))


@pytest.mark.parametrize("container", ["WAV", "AIFF", "AU", "FLAC", "CAF", "RF64", "W64", "NIST"])
def test_joined_files_are_named(container):
    content = encoded(sound(), container=container)
    with pytest.raises(AudioError, match="several files in one: 2 were joined"):
        decoded(content + content)


def test_streams_that_do_not_fit_are_named():
    ogg, stereo = encoded(sound(), container="OGG"), encoded(np.stack([sound()] * 2, axis=1), container="OGG")
    with pytest.raises(AudioError, match="the audio changes from 16000 to 22050 Hz"):
        decoded(ogg + encoded(sound(), 22_050, "OGG"))
    with pytest.raises(AudioError, match="the audio changes from mono to stereo"):
        decoded(ogg + stereo)
    with pytest.raises(AudioError, match="from 16000 to 22050 Hz"):
        decoded(encoded(sound(), container="MP3") + encoded(sound(), 22_050, "MP3"))
    with pytest.raises(AudioError, match="several audio tracks: 2"):
        decoded(ffmpeg("matroska", "aac", sound(), tracks=2))


def test_the_sound_of_a_video():
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        video = output.add_stream("mpeg4", rate=10)
        video.width = video.height = 64
        for _ in range(5):
            for packet in video.encode(av.VideoFrame(64, 64, "yuv420p")):
                output.mux(packet)
        for packet in video.encode(None):
            output.mux(packet)
    with pytest.raises(AudioError, match="no audio track"):
        decoded(file.getvalue())


def test_a_page_that_is_missing_from_an_ogg_file_is_found():
    content = encoded(noise(9), container="OGG")
    pages = [at for at in range(len(content)) if content.startswith(b"OggS", at)]
    assert len(pages) > 4
    with pytest.raises(AudioError, match="a page of the Ogg stream is missing"):
        decoded(content[: pages[-2]] + content[pages[-1] :])


def test_wav_and_au_of_a_size_that_was_not_known():
    wav, au = encoded(sound()), encoded(sound(), container="AU")
    for size in (0, 0x7FFFFFFF, 0xFFFFFFFF):
        assert len(decoded(wav[:40] + struct.pack("<I", size) + wav[44:])) == 3 * RATE
    for size in (0, 0xFFFFFFFF):
        assert len(decoded(au[:8] + struct.pack(">I", size) + au[12:])) == 3 * RATE
    flac = bytearray(encoded(sound(), container="FLAC"))
    flac[21] &= 0xF0  # the number of samples, 36 bits
    flac[22:26] = bytes(4)
    assert len(decoded(bytes(flac))) == 3 * RATE
    with pytest.raises(AudioError, match=CUT):
        decoded(bytes(flac[: len(flac) // 2]))


def test_audio_that_a_header_does_not_count_is_named():
    wav, au = encoded(sound()), encoded(sound(), container="AU")
    assert len(decoded(wav + b"junk" * 20)) == 3 * RATE
    with pytest.raises(AudioError, match="length unknown: 64000 bytes follow the 32000 bytes"):
        decoded(wav[:40] + struct.pack("<I", 32_000) + wav[44:])
    with pytest.raises(AudioError, match="length unknown: 64000 bytes follow"):
        decoded(au[:8] + struct.pack(">I", 32_000) + au[12:])
    with pytest.raises(AudioError, match="several streams in one file: 2 chunks of audio"):
        decoded(wav + wav[36:])


def test_playlists_open_no_other_files(tmp_path):
    other = tmp_path / "other.wav"
    other.write_bytes(encoded(sound()))
    hls = f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{other.as_uri()}\n#EXT-X-ENDLIST\n"
    for playlist in (hls, f"ffconcat version 1.0\nfile '{other}'\n"):
        with pytest.raises(AudioError, match="not an audio file"):
            decoded(playlist.encode())


@pytest.mark.parametrize(
    "start", [b"\xff", b"\xff\xfb\x90\x64", b"ID3\4", b"RIFF", b"OggS", b".snd", b"fLaC", b"caff"]
)
def test_a_mere_header_is_named(start):
    for content in (start, start + np.random.default_rng(0).bytes(3000)):
        with pytest.raises(AudioError):
            decoded(content)


def test_any_exception_of_a_decoder_is_named(monkeypatch):
    for error in (ValueError("odd"), RuntimeError("odd"), MemoryError(), soundfile.SoundFileRuntimeError("odd")):

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(soundfile.SoundFile, "read", fail)
        with pytest.raises(AudioError, match=f"corrupt or truncated: (odd|{type(error).__name__})"):
            decoded(encoded(sound()))


def test_without_pyav_wav_is_decoded_and_mp3_says_what_is_missing(monkeypatch):
    mp3, m4a = encoded(sound(), container="MP3"), ffmpeg("ipod", "aac", sound())
    monkeypatch.setitem(sys.modules, "av", None)
    for container in ("WAV", "FLAC", "OGG"):
        assert len(decoded(encoded(sound(), container=container))) == 3 * RATE
    for content in (mp3, m4a):
        with pytest.raises(AudioError, match=r"requires PyAV, .*: pip install av; or convert it to wav or flac"):
            decoded(content)


def test_an_m4a_works_in_a_dataset_and_is_found_in_a_folder(tmp_path):
    (tmp_path / "a.m4a").write_bytes(ffmpeg("ipod", "alac", sound()))
    assert audio_files(tmp_path) == [tmp_path / "a.m4a"]
    (tmp_path / "metadata.csv").write_text("file_name,text\na.m4a,hello\n")
    (row,) = load_speech_dataset(str(tmp_path), None, "train")
    assert len(decode_audio(row["audio"])) == 3 * RATE


def test_a_link_to_a_directory_beside_it_changes_no_names(tmp_path, caplog):
    (tmp_path / "wavs").mkdir()
    (tmp_path / "wavs" / "0.wav").write_bytes(encoded(sound()))
    (tmp_path / "audio").symlink_to("wavs")
    assert audio_files(tmp_path) == [tmp_path / "wavs" / "0.wav"]
    for listed in ("wavs/0.wav", "audio/0.wav"):
        (tmp_path / "metadata.csv").write_text(f"file_name,text\n{listed},hello\n")
        assert load_speech_dataset(str(tmp_path), None, "train")["clip"][:] == [listed]
    assert "have no row" not in caplog.text


def test_audio_behind_links_to_directories_is_found_once(tmp_path, caplog):
    """As of recordings on another disk; a link to a directory above doesn't end in a loop."""
    (tmp_path / "disk" / "more").mkdir(parents=True)
    (tmp_path / "speech").mkdir()
    for place in ("disk/b.wav", "disk/more/c.wav", "speech/a.wav"):
        (tmp_path / place).write_bytes(encoded(sound()))
    (tmp_path / "speech" / "linked").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "back").symlink_to(tmp_path / "speech")
    names = [str(file.relative_to(tmp_path / "speech")) for file in audio_files(tmp_path / "speech")]
    assert names == ["a.wav", "linked/b.wav", "linked/more/c.wav"]
    rows = load_speech_dataset(str(tmp_path / "speech"), None, "train", text_required=False)
    assert rows["clip"][:] == names
    (tmp_path / "speech" / "metadata.csv").write_text("file_name,text\na.wav,hello\n")
    load_speech_dataset(str(tmp_path / "speech"), None, "train")
    assert "2 audio files in its directory have no row and are ignored, such as linked/b.wav" in caplog.text


@pytest.mark.parametrize("rate", [4_000, 8_000, 11_025, 22_050, 44_100, 48_000, 96_000])
def test_resampling_is_that_of_librosa_to_the_bit(rate):
    rng = np.random.default_rng(rate)
    for length in (1, 7, rate // 3, rate + 1):
        samples = (0.1 * rng.standard_normal(length)).astype(np.float32)
        expected = librosa.resample(samples, orig_sr=rate, target_sr=16_000, res_type="soxr_hq")
        found = resample(samples, rate)
        assert found.dtype == np.float32 and np.array_equal(found, expected)
