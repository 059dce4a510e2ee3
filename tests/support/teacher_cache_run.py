"""A labelling pass in a process of its own, for test_teacher_cache.py: SPEECH DIRECTORY [WHERE_IT_KILLS_ITSELF]."""

import faulthandler
import os
import signal
import sys
from pathlib import Path

from accelerate import PartialState
from models import make_processor, make_whisper
from soft_labels import PART_CLIPS, label, speech, transcribed_by

from askd_hf.data import SpeechCollator, dataset_files, teacher_cache
from askd_hf.training.run_dir import exit_non_main_processes

faulthandler.dump_traceback_later(200, exit=True)  # a hang shows where it is
PartialState(cpu=True)
folder, directory, killed = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
teacher_cache.PART_CLIPS = PART_CLIPS
processor = make_processor()
teacher = make_whisper(processor).eval()
calls = []


def kill(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


if killed == ["labelling"]:  # in the third batch
    teacher.register_forward_pre_hook(lambda *_: calls.append(1) if len(calls) < 2 else kill())
if killed == ["saving"]:  # when the new files are in the directory, and its list of files isn't written yet
    dataset_files.write_json = kill
if killed == ["cleaning up"]:  # when the list of files is written, and the parts aren't removed yet
    rename = Path.rename
    unfinished = directory.with_name(f"{directory.name}.unfinished")
    Path.rename = lambda path, target: kill() if path == unfinished else rename(path, target)
sizes = transcribed_by(teacher)
label(directory, speech(folder), SpeechCollator(processor, teacher.config), teacher)
print(f"process {PartialState().process_index}: {sum(sizes)} clips", flush=True)
exit_non_main_processes()
