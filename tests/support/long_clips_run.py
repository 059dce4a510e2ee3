"""Cut the long clips of a saved dataset, and write the rows that this process got and how many clips it decoded.

long_clips_run.py DATASET HOME RESULT
"""

import json
import sys
from pathlib import Path

from accelerate import PartialState
from huggingface_hub import constants

from askd_hf.data import audio_checks, load_speech_dataset, long_clips
from askd_hf.data.audio import read_audio


def main() -> None:
    folder, home, result = map(Path, sys.argv[1:])
    constants.HF_HOME = str(home)
    process, decoded = PartialState(cpu=True), []

    def read(audio):
        decoded.append(audio)
        return read_audio(audio)

    audio_checks.read_audio = long_clips.read_audio = read
    cut = long_clips.cut_long_clips(load_speech_dataset(str(folder), None, "train"), 4.0, "speech")
    found = dict(decoded=len(decoded), rows=cut.remove_columns("audio").to_list())
    result.with_name(f"{result.name}-{process.process_index}.json").write_text(json.dumps(found))
    process.wait_for_everyone()
    process.destroy_process_group()


if __name__ == "__main__":
    main()
