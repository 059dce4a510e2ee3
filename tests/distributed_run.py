"""A tiny training run, started by `accelerate launch` in test_invariants.py: RESULT.json OPTIONS_AS_JSON."""

import faulthandler
import json
import signal
import sys
from pathlib import Path

from conftest import Clips, history, init_student, make_processor, make_trainer, make_whisper
from test_invariants import NAMES
from transformers import TrainerCallback

from askd_hf.run_dir import end_other_processes

faulthandler.dump_traceback_later(200, exit=True)  # a hang shows where it is
result, changes = Path(sys.argv[1]), json.loads(sys.argv[2])
interrupt_at = changes.pop("interrupt_second_process_at", None)
processor = make_processor()
student = init_student(make_whisper(processor, seed=5), decoder_layers=2)
evaluation = Clips(student.config, clips=7, seed=2)
trainer = make_trainer(result.parent, make_whisper(processor).eval(), student, evaluation, **changes)


class Interrupt(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == interrupt_at and args.process_index == 1:
            signal.raise_signal(signal.SIGINT)


trainer.add_callback(Interrupt())
trainer.train()
metrics = trainer.evaluate()
assert trainer.args.world_size == 2
if trainer.is_world_process_zero():
    outcome = {"history": history(trainer, *NAMES).tolist(), "metrics": metrics}
    outcome |= {"step": trainer.state.global_step, "stopped": trainer.stop.stopped}
    result.write_text(json.dumps(outcome))
end_other_processes()
