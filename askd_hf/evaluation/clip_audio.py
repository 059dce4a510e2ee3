"""The audio of the clips in the report.

    DIR/audio/DATA/LINE.mp3  the clip in line LINE, counted from 0, of the manifests with `ManifestMetadata.data` DATA

Scores can be computed again without the speech, so the report finds the audio of an earlier one there.
"""

import base64
import io
import os
from pathlib import Path

import soundfile
from datasets import Dataset

from ..data.audio import SAMPLING_RATE, waveform
from ..errors import disk_errors

AUDIO_DIR = "audio"
MAX_SECONDS = 60.0  # of a clip in the report: the audio is inside the page, about 4 kB per second


def audio_uri(file: Path, duration: float, speech: Dataset | None, line: int) -> str | None:
    """Return a clip as the models heard it, at 16 kHz in mono, as a `data:` URI of an MP3 file.

    Saves it to `file` unless it is there.

    Args:
        duration: of the clip in seconds.
        speech, line: the clips of the set, and which of them it is.

    Returns:
        None for a clip longer than `MAX_SECONDS`, and if the clip isn't saved and `speech` is None.
    """
    if not file.exists():
        if speech is None or duration > MAX_SECONDS:
            return None
        content = io.BytesIO()
        soundfile.write(content, waveform(speech[line]), SAMPLING_RATE, format="MP3")
        unfinished = file.with_name(f"{file.name}.tmp")
        with disk_errors(f"{file} can't be written"):
            file.parent.mkdir(parents=True, exist_ok=True)
            unfinished.write_bytes(content.getvalue())
            os.replace(unfinished, file)
    return f"data:audio/mpeg;base64,{base64.b64encode(file.read_bytes()).decode()}"
