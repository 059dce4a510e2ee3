"""Tiny training runs in one or several processes, for test_two_processes.py: DIRECTORY RUNS_AS_JSON, {name: options}.

Each process writes what it saw of a run into DIRECTORY/NAME/PROCESS.json. With `interrupt_second_process_at` a run is
three: a whole one with SpecAugment, one that is interrupted at that step by the second process, which is also slow to
save its random state, and one that resumes from there. With `interrupt_evaluation_at` it is interrupted in the
evaluation after that step.
"""

import faulthandler
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from models import make_processor, make_whisper
from training import NAMES, Clips, answer_right, history, make_trainer, train_on_speech
from transformers import TrainerCallback

from askd_hf.evaluation.metrics import compute_metrics_for
from askd_hf.models.student import init_student
from askd_hf.trainer import ASKDTrainer
from askd_hf.training.checkpoint_lookup import checkpoint_to_resume
from askd_hf.training.run_dir import exit_non_main_processes

processor = make_processor()


class Interrupt(TrainerCallback):
    def __init__(self, step: int, evaluating: bool):
        self.step, self.evaluating = step, evaluating

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step and args.process_index == 1 and not self.evaluating:
            signal.raise_signal(signal.SIGINT)

    def on_prediction_step(self, args, state, control, **kwargs):
        if state.global_step == self.step and args.process_index == 1:
            self.step = None
            signal.raise_signal(signal.SIGINT)


def make_run(
    directory: Path, augmented: bool = False, speech: str | None = None, **changes
) -> tuple[ASKDTrainer, list]:
    """A trainer, and the frames that are masked in each of its batches, as a list that grows."""
    student = init_student(make_whisper(processor, seed=5), decoder_layers=2)
    if augmented:
        student.config.apply_spec_augment, student.config.mask_time_prob, student.config.mask_time_length = (
            True,
            0.3,
            4,
        )
    evaluation, metrics = Clips(student.config, clips=7, seed=2), compute_metrics_for(processor, "none")
    teacher = make_whisper(processor).eval()
    trainer = make_trainer(directory, teacher, student, evaluation, metrics, processor, **changes)
    if speech is not None:
        train_on_speech(trainer, Path(speech))
    masked = []
    trainer.model.model.encoder.register_forward_pre_hook(
        lambda module, args: masked.append((args[0] == 0).all(1).tolist()) if module.training else None
    )
    return trainer, masked


def save_slowly(*args, save=torch.save, **kwargs) -> None:
    time.sleep(1)
    save(*args, **kwargs)


def run(directory: Path, **changes) -> tuple[ASKDTrainer, dict]:
    trainer, _ = make_run(directory, **changes)
    trainer.train()
    clips = trainer._clips  # of the last batch
    if "speech" in changes:  # the evaluation clips are for another collator
        return trainer, {}
    answer_right(trainer, clips=3)
    return trainer, {"metrics": trainer.evaluate(), "clips": clips}


def interrupted_run(directory: Path, step: int, evaluating: bool, **changes) -> tuple[ASKDTrainer, dict]:
    whole, masked = make_run(directory / "whole", augmented=True, **changes)
    whole.train()
    interrupted, _ = make_run(directory, augmented=True, **changes)
    interrupted.add_callback(Interrupt(step, evaluating))
    save = torch.save
    torch.save = save_slowly if interrupted.args.process_index == 1 else save
    interrupted.train()
    torch.save = save
    resumed, masked_then = make_run(directory, augmented=True, **changes)
    resumed.train(resume_from_checkpoint=checkpoint_to_resume(str(directory), "last"))
    pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    equal = all(torch.equal(a, b) for a, b in pairs)
    seen = {"masked": masked, "masked_then": masked_then, "equal": equal}
    return interrupted, seen | {"upheld": resumed.blend.state.labels_upheld}


if __name__ == "__main__":
    faulthandler.dump_traceback_later(200, exit=True)  # a hang shows where it is
    for name, changes in json.loads(sys.argv[2]).items():
        directory = Path(sys.argv[1]) / name
        steps = changes.pop("interrupt_second_process_at", None), changes.pop("interrupt_evaluation_at", None)
        if steps == (None, None):
            trainer, seen = run(directory, **changes)
        else:
            evaluating = steps[1] is not None
            trainer, seen = interrupted_run(directory, steps[evaluating], evaluating, **changes)
        assert trainer.args.world_size == int(os.environ["WORLD_SIZE"])
        seen |= {"step": trainer.state.global_step, "stopped": trainer.stop.stopped}
        seen |= {"history": history(trainer, *NAMES).tolist(), "wrapped": type(trainer.model_wrapped).__name__}
        seen |= {"backend": torch.distributed.get_backend()}
        directory.mkdir(exist_ok=True)
        (directory / f"{trainer.args.process_index}.json").write_text(json.dumps(seen))
    trainer.accelerator.wait_for_everyone()
    exit_non_main_processes()
