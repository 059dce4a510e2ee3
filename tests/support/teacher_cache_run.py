"""A labelling pass in a process of its own, for test_teacher_cache.py: SPEECH DIRECTORY [WHERE_IT_KILLS_ITSELF]."""

import faulthandler
import os
import signal
import sys
import time
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


unfinished = directory.with_name(f"{directory.name}.unfinished")


def kill_in_the_third_batch(*_) -> None:
    """When the thread has written the parts of the first two of this process."""
    calls.append(1)
    own = f"part-{PartialState().process_index:03d}-*"
    while len(calls) == 3:
        if len([part for part in unfinished.glob(own) if part.suffix != ".saving"]) == 2:
            kill()
        time.sleep(0.01)


def kill_while_the_second_part_is_written(path: Path, target: Path) -> None:
    """When its files are complete, and have the name of an unfinished part."""
    if target.name == "part-000-00001":
        kill()
    rename(path, target)


rename = Path.rename
if killed == ["labelling"]:
    teacher.register_forward_pre_hook(kill_in_the_third_batch)
if killed == ["writing"]:
    Path.rename = kill_while_the_second_part_is_written
if killed == ["saving"]:  # when the new files are in the directory, and its list of files isn't written yet
    dataset_files.write_json = kill
if killed == ["cleaning up"]:  # when the list of files is written, and the parts aren't removed yet
    Path.rename = lambda path, target: kill() if path == unfinished else rename(path, target)
sizes = transcribed_by(teacher)
label(directory, speech(folder), SpeechCollator(processor, teacher.config), teacher)
print(f"process {PartialState().process_index}: {sum(sizes)} clips", flush=True)
exit_non_main_processes()
