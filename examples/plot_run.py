"""Draw the weights of the blend, the losses and the WER over a run, from the `trainer_state.json` that it leaves.

    python examples/plot_run.py runs/demo picture.png

The WER needs evaluations in the run: --eval_strategy steps --eval_steps 50 --eval_on_start.
"""

import json
import sys
from pathlib import Path

from askd_hf.hub.figure import write_run_figure

if __name__ == "__main__":
    run, picture = Path(sys.argv[1]), Path(sys.argv[2])
    write_run_figure(json.loads((run / "trainer_state.json").read_text())["log_history"], picture)
