"""Check the clips of a folder, and write what this process found and which files it decoded.

audio_checks_run.py FOLDER HOME RESULT
"""

import json
import sys
from pathlib import Path

from accelerate import PartialState
from huggingface_hub import constants

from askd_hf.data import Limits, audio_checks, filter_invalid_clips, load_speech_dataset
from askd_hf.data.audio import read_audio


def main() -> None:
    folder, home, result = map(Path, sys.argv[1:])
    constants.HF_HOME = str(home)
    process = PartialState(cpu=True)
    decoded: list[str] = []

    def read(audio):
        decoded.append(Path(audio["path"]).name)
        return read_audio(audio)

    audio_checks.read_audio = read
    checked = filter_invalid_clips(
        load_speech_dataset(str(folder), None, "train"),
        lambda row: [0] * len(row["text"]),
        Limits(30.0, min_label_length=5),
        on_bad_audio="skip",
        num_proc=0,
        share_work=True,
        report_file=result.parent / "skipped.csv",
    )
    names = ("clip", "duration", "audio_key", "label_tokens")
    found = dict(decoded=decoded, columns={name: checked[name][:] for name in names})
    result.with_name(f"{result.name}-{process.process_index}.json").write_text(json.dumps(found))
    process.wait_for_everyone()
    process.destroy_process_group()


if __name__ == "__main__":
    main()
