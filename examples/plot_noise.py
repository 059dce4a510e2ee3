"""Plot the WER of several models against the signal-to-noise ratio, from their evaluations on noisy sets.

    python examples/plot_noise.py runs/evaluation-clean runs/evaluation-noisy picture.png

The sets are those of examples/noisy_sets.py. Bars are the 95 % intervals of the evaluations. Those of a study are in
directories of their own:

    python examples/plot_noise.py runs/noise/evaluations/tiny.en/*/*/*/1/* picture.png
"""

import argparse
from pathlib import Path

from askd_hf.errors import UserError, exit_on_user_error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evaluations", type=Path, nargs="+", help="Output directories of askd-hf evaluate.")
    parser.add_argument("picture", type=Path, help="Image to write, such as picture.png.")
    args = parser.parse_args()
    from matplotlib.figure import Figure

    from askd_hf.evaluation.noise_figure import scores_by_condition, write_noise_figure
    from askd_hf.evaluation.results import Results

    if args.picture.suffix.lstrip(".") not in (formats := Figure().canvas.get_supported_filetypes()):
        raise UserError(
            f"{args.picture}: give the picture to write last, with one of the suffixes {', '.join(formats)}"
        )
    files = [directory / "results.json" for directory in args.evaluations]
    if missing := [str(file) for file in files if not file.is_file()]:
        raise UserError(f"{', '.join(missing)}: no such file; give the output directories of askd-hf evaluate")
    evaluations = [Results.load(file) for file in files]
    write_noise_figure(scores_by_condition(evaluations), args.picture)
    print(args.picture)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
