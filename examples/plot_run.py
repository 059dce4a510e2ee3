"""Draw the weights of the blend, the losses and the WER over a run, from the `trainer_state.json` that it leaves.

    python examples/plot_run.py runs/demo picture.png

The WER needs evaluations in the run: --eval_strategy steps --eval_steps 50 --eval_on_start.
"""

import argparse
import json
from pathlib import Path

from askd_hf.errors import UserError, exit_on_user_error
from askd_hf.hub.figure import write_run_figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="Directory of the run.")
    parser.add_argument("picture", type=Path, help="Image to write, such as picture.png.")
    args = parser.parse_args()
    state = args.run / "trainer_state.json"
    if not state.is_file():
        raise UserError(
            f"{state}: no such file; give the output directory of a finished run, or one of its checkpoints"
        )
    write_run_figure(json.loads(state.read_text())["log_history"], args.picture)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
