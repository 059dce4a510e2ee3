"""A tiny training run, started by `accelerate launch` in test_invariants.py: RESULT.json OPTIONS_AS_JSON."""

import json
import sys
from pathlib import Path

from conftest import Clips, history, init_student, make_processor, make_trainer, make_whisper
from test_invariants import NAMES

result, changes = Path(sys.argv[1]), json.loads(sys.argv[2])
processor = make_processor()
student = init_student(make_whisper(processor, seed=5), decoder_layers=2)
evaluation = Clips(student.config, clips=7, seed=2)
trainer = make_trainer(result.parent, make_whisper(processor).eval(), student, evaluation, **changes)
trainer.train()
metrics = trainer.evaluate()
assert trainer.args.world_size == 2
if trainer.is_world_process_zero():
    result.write_text(json.dumps({"history": history(trainer, *NAMES).tolist(), "metrics": metrics}))
