"""Tiny training runs, started by `accelerate launch` in test_invariants.py: RESULT.json OPTIONS_AS_JSON.

With `interrupt_second_process_at` there are three: a whole one with SpecAugment, one that is interrupted at that step
by the second process, which is also slow to save its random state, and one that goes on from there.
"""

import faulthandler
import json
import signal
import sys
import time
from pathlib import Path

import torch
from conftest import Clips, history, init_student, make_processor, make_trainer, make_whisper
from test_invariants import NAMES
from transformers import TrainerCallback

from askd_hf.trainer import ASKDTrainer
from askd_hf.training.checkpoint_lookup import checkpoint_to_resume
from askd_hf.training.run_dir import exit_non_main_processes

faulthandler.dump_traceback_later(200, exit=True)  # a hang shows where it is
result, changes = Path(sys.argv[1]), json.loads(sys.argv[2])
interrupt_at = changes.pop("interrupt_second_process_at", None)
processor = make_processor()
student = init_student(make_whisper(processor, seed=5), decoder_layers=2)
evaluation = Clips(student.config, clips=7, seed=2)
if interrupt_at is not None:
    student.config.apply_spec_augment, student.config.mask_time_prob, student.config.mask_time_length = True, 0.3, 4


class Interrupt(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == interrupt_at and args.process_index == 1:
            signal.raise_signal(signal.SIGINT)


def train(directory: Path, interrupted: bool = False, resume: bool = False) -> tuple[ASKDTrainer, list]:
    """A run, and the frames that were masked in each of its batches."""
    trainer = make_trainer(directory, make_whisper(processor).eval(), student, evaluation, **changes)
    masked = []
    trainer.model.model.encoder.register_forward_pre_hook(
        lambda module, args: masked.append((args[0] == 0).all(1).tolist()) if module.training else None
    )
    if interrupted:
        trainer.add_callback(Interrupt())
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(str(directory), "last") if resume else None)
    return trainer, masked


def save_slowly(*args, **kwargs) -> None:
    time.sleep(1)
    save(*args, **kwargs)


outcome = {}
if interrupt_at is None:
    trainer, _ = train(result.parent)
    outcome |= {"metrics": trainer.evaluate()}
else:
    whole, outcome["masked"] = train(result.parent / "whole")
    rank, save = whole.args.process_index, torch.save
    torch.save = save_slowly if rank == 1 else save
    trainer, _ = train(result.parent, interrupted=True)
    resumed, outcome["masked_then"] = train(result.parent, resume=True)
    outcome["equal"] = all(
        torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    )
assert trainer.args.world_size == 2
outcome |= {"step": trainer.state.global_step, "stopped": trainer.stop.stopped}
outcome |= {"history": history(trainer, *NAMES).tolist()}
if trainer.is_world_process_zero():
    result.write_text(json.dumps(outcome))
else:
    result.with_suffix(".second").write_text(json.dumps(outcome))
trainer.accelerator.wait_for_everyone()
exit_non_main_processes()
