r"""Run a study: train many students, evaluate all of them on the same sets, and compare them.

    python examples/study.py --study examples/studies/digits.yaml

The file names teachers, students, training sets, methods and seeds. Each combination is a cell: it is trained as by
`askd-hf distill` and evaluated as by `askd-hf evaluate`. Every finished cell is a line of OUTPUT_DIR/results.jsonl. To
resume an interrupted study, repeat the command. At the end, tables and figures are in OUTPUT_DIR/study.md. `--config`
is another name of `--study`.
"""

import json
import os
import re
import shutil
import sys
import threading
import time
import traceback
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from askd_hf.arguments.parser import NULL, as_arguments, parse_args
from askd_hf.arguments.ranges import COUNT, check_ranges
from askd_hf.commands.options import options_of
from askd_hf.commands.study_plan import Cell, Options, Plan, check_cells, check_datasets, make_cells, read_plan
from askd_hf.commands.terminal import readable_terminal
from askd_hf.errors import UserError, exit_on_user_error

if TYPE_CHECKING:  # else imported in the functions, as --help needs none of it
    from askd_hf.evaluation.results import Speed
    from askd_hf.evaluation.study import CellResult, Study

MAY_DIFFER = {"output_dir", "encoder_cache_dir", "teacher_cache_dir"}  # options that don't change the student


@dataclass
class Arguments:
    """The study."""

    study: Path = field(metadata={"help": "YAML file of the study, such as those in examples/studies."})
    output_dir: Path | None = field(default=None, metadata={"help": "Default: runs/ and the name of the file."})
    processes: int = field(default=1, metadata={"help": "Number of cells that run at the same time."})
    only: list[str] = field(
        default_factory=list, metadata={"help": "Only cells whose names have all of these parts, such as askd 1."}
    )
    report_only: bool = field(
        default=False, metadata={"help": "Write the tables and figures of what is done so far. Run nothing."}
    )

    def __post_init__(self):
        check_ranges(self, processes=COUNT)
        if self.output_dir is None:
            self.output_dir = Path("runs") / self.study.stem


def main() -> None:
    argv = [re.sub("^--config(?==|$)", "--study", word) for word in sys.argv[1:]]
    (args,) = parse_args((Arguments,), argv, prog="python examples/study.py", description=__doc__)
    from askd_hf.evaluation.study import Study, check_same_clips
    from askd_hf.evaluation.study_report import FIGURE_FILE, REPORT_FILE, write_study

    directory = args.output_dir
    plan = read_plan(args.study)
    cells = make_cells(plan, directory)
    failed = []
    if unknown := {*args.only} - {part for cell in cells for part in cell.name.split("/")}:
        raise UserError(f"--only: no cell has {', '.join(sorted(unknown))} in its name, such as {cells[-1].name}")
    if not args.report_only:
        check_cells(cells, plan.evaluation)
        check_datasets(cells, plan.evaluation)
        done = read_results(directory, cells, plan.evaluation)
        chosen = [cell for cell in cells if {*args.only} <= {*cell.name.split("/")} and cell.name not in done]
        failed = run_cells(chosen, plan.evaluation, directory, args.processes)
    results = list(read_results(directory, cells, plan.evaluation).values())
    if results:
        check_same_clips(results)
        warn_of_other_code(results, directory / "results.jsonl")
        study = Study(results, plan.baselines)
        in_domain = {name: options.get("in_domain", []) for name, options in plan.training.items()}
        tables = write_study(study, in_domain, saved_speeds(plan, directory), directory, plan.title)
        if plan.speed_set and not args.report_only:
            tables = write_study(study, in_domain, measure_speeds(plan, study, directory), directory, plan.title)
        print(*(table.text() for table in tables), f"{directory / REPORT_FILE}, {FIGURE_FILE}", sep="\n\n")
    if failed or not results:
        raise UserError("; ".join(failed) or f"{directory / 'results.jsonl'} has no results of this study")


# ---- results ----


def read_results(directory: Path, cells: list[Cell], evaluation: dict[str, Options]) -> "dict[str, CellResult]":
    """Return the results of the cells that are done, by name.

    Raises `UserError` if a cell was trained or evaluated with other options than those in the file.
    """
    from askd_hf.data.json_files import from_json
    from askd_hf.evaluation.study import CellResult

    file = directory / "results.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    complete = [json.loads(line) for line in lines if line.endswith("\n")]  # a killed process may leave half a line
    saved = [from_json(CellResult, line) for line in complete]
    by_cell = {(*result.system, result.seed): result for result in saved}
    found = {}
    for cell in cells:
        result = by_cell.get((cell.teacher, cell.student, cell.training, cell.method, cell.seed))
        if result is None:
            continue
        then = {**result.options, "evaluation": result.evaluation}
        check_same_options(cell, then, {**cell.options, "evaluation": evaluation}, directory)
        found[cell.name] = result
    for cell in cells:
        if cell.student and cell.name not in found and options_file(cell).is_file():
            check_same_options(cell, json.loads(options_file(cell).read_text()), cell.options, directory)
    return found


def check_same_options(cell: Cell, then: dict[str, Any], now: dict[str, Any], directory: Path) -> None:
    """Raise `UserError` if the options of a cell have changed since it was run. Output and caches may be elsewhere."""
    names = sorted({*then, *now} - MAY_DIFFER)
    if changed := [name for name in names if then.get(name) != now.get(name)]:
        made = [directory / "evaluations" / cell.name]
        made += [directory / "runs" / cell.name] if changed != ["evaluation"] else []  # else the student can stay
        raise UserError(
            f"{cell.name} was run with another value of {', '.join(changed)}: rename the part of the study that "
            f"changed, or remove its line from {directory / 'results.jsonl'}, if there is one, and "
            f"{' and '.join(map(str, made))}"
        )


def options_file(cell: Cell) -> Path:
    """Return the file with the options that a student is trained with, in its directory."""
    return Path(cell.options["output_dir"]) / "study_options.json"


def warn_of_other_code(results: "list[CellResult]", file: Path) -> None:
    from askd_hf.evaluation.study import source_digest

    now = source_digest()
    others = ["/".join((*filter(None, one.system), str(one.seed))) for one in results if one.code not in ("", now)]
    if others:
        print(
            f"{len(others)} cells were run with other code of askd_hf, and aren't run again: {', '.join(others)}. To "
            f"compare the present code, give another --output_dir, or remove their lines from {file} and their runs",
            file=sys.stderr,
        )


# ---- running ----


def run_cells(cells: list[Cell], evaluation: dict[str, Options], directory: Path, processes: int) -> list[str]:
    """Run each cell in a process of its own, and append its result to results.jsonl.

    Of the cells that use the same cached labels, the first one computes them before the others start. After Ctrl-C,
    the running cells save a checkpoint. A cell that fails doesn't stop the others.

    Returns:
        What went wrong, a line per cell that failed.
    """
    import torch

    os.environ["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // processes))  # of the new processes
    waiting, running = list(cells), {}
    cached: set[str] = set()
    failed: list[str] = []
    progress = tqdm(total=len(cells), desc="Cells", unit="cell")
    try:
        while waiting or running:
            while len(running) < processes and (cell := next_cell(waiting, list(running.values()), cached)):
                waiting.remove(cell)
                # a pool of its own, as a process that is killed, such as for its memory, breaks its pool
                pool = ProcessPoolExecutor(1, get_context("spawn"))
                running[pool.submit(run_cell, cell, evaluation, directory, os.getpid())] = cell
                pool.shutdown(wait=False)
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                cell = running.pop(future)
                if future.exception() is None:
                    save_result(future.result(), directory)
                    remove_checkpoints(cell)
                    cached |= {cell.labels} - {""}
                else:
                    error = future.exception()
                    what = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                    failed.append(f"{cell.name}: {what}; see {log_file(cell, directory)}")
                    progress.write(failed[-1], file=sys.stderr)
                progress.update()
    except KeyboardInterrupt:
        print("\nstopping: running cells save a checkpoint. To resume, repeat the command", file=sys.stderr)
        wait(running)
        for future, cell in running.items():  # some may have finished
            if future.exception() is None:
                save_result(future.result(), directory)
                remove_checkpoints(cell)
        sys.exit(130)
    return failed


def next_cell(waiting: list[Cell], running: list[Cell], cached: set[str]) -> Cell | None:
    """Return the next cell to start, None if all have to wait: two runs can't add labels to one cache."""

    def adds_labels(cell: Cell) -> bool:  # joined clips depend on the seed
        return bool(cell.labels) and (cell.labels not in cached or "concatenate_probability" in cell.options)

    in_use = {cell.labels for cell in running if adds_labels(cell)}
    return next((cell for cell in waiting if not (adds_labels(cell) and cell.labels in in_use)), None)


def save_result(result: "CellResult", directory: Path) -> None:
    """Append a line to results.jsonl, in place of half a line that a killed process may have left."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "results.jsonl").open("a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json.dumps(asdict(result), allow_nan=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def remove_checkpoints(cell: Cell) -> None:
    """Remove the checkpoints of a finished cell, which are several times as large as the student."""
    from askd_hf.training.checkpoint_lookup import checkpoint_directories

    if cell.student:
        for checkpoint in checkpoint_directories(Path(cell.options["output_dir"])):
            shutil.rmtree(checkpoint)


def log_file(cell: Cell, directory: Path) -> Path:
    return directory / "logs" / f"{cell.name.replace('/', '-')}.txt"


def run_cell(cell: Cell, evaluation: dict[str, Options], directory: Path, study: int) -> "CellResult":
    """Train and evaluate a student, or evaluate a teacher, in a process of its own. Its output goes to a log file.

    Args:
        study: id of the process of the study, which may have been killed while this one started.
    """
    threading.Thread(target=end_with, args=(study,), daemon=True).start()
    log = log_file(cell, directory)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    try:
        with readable_terminal():
            return _run_cell(cell, evaluation, directory)
    except BaseException:
        traceback.print_exc()
        raise


def _run_cell(cell: Cell, evaluation: dict[str, Options], directory: Path) -> "CellResult":
    from askd_hf.commands import evaluate
    from askd_hf.data.json_files import read_json
    from askd_hf.evaluation.study import CellResult, set_errors, source_digest

    model = cell.options["output_dir"] if cell.student else cell.options["teacher"]
    result = CellResult(
        cell.teacher, [], cell.student, cell.training, cell.method, cell.seed, cell.options, evaluation
    )
    result.code = source_digest()
    if cell.student:
        train(cell)
    for name, given in evaluation.items():
        options = {option: value for option, value in given.items() if value not in NULL}
        target = directory / "evaluations" / cell.name / name
        evaluate.main(as_arguments({**options, "model": model, "output_dir": str(target)}))
        scores = read_json(target / "results.json")
        result.parameters = scores["models"]["student"]["parameters"]
        (scored,) = scores["sets"]
        result.sets.append(set_errors(target, scored["name"], name, options.get("normalizer", "auto")))
    return result


def end_with(parent: int) -> None:
    """End this process when its parent was killed: the resumed study starts the cell again from its checkpoint."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def train(cell: Cell) -> None:
    """Train the student, from its last checkpoint if there is one."""
    from askd_hf.commands import distill
    from askd_hf.training.checkpoint_lookup import checkpoint_directories, is_finished
    from askd_hf.training.encoder_recovery import RECOVERY_DIR

    run = Path(cell.options["output_dir"])
    options = dict(cell.options)
    recovery = run / RECOVERY_DIR
    if (run / "model.safetensors").is_file() and not checkpoint_directories(run):
        return  # trained; the evaluation didn't finish
    if any(map(is_finished, checkpoint_directories(run))) or recovery.is_dir():
        options["resume_from_checkpoint"] = "last"
    else:
        shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True, exist_ok=True)
    options_file(cell).write_text(json.dumps(cell.options, indent=2))
    distill.main(as_arguments(options))


# ---- speed ----


def speed_file(directory: Path, teacher: str) -> Path:
    return directory / f"speed-{teacher}.json"


def saved_speeds(plan: Plan, directory: Path) -> "dict[str, Speed]":
    """Return what was measured before, by teacher."""
    from askd_hf.evaluation.study_speed import saved_speed

    found = {teacher: saved_speed(speed_file(directory, teacher)) for teacher in plan.teachers}
    return {teacher: speed for teacher, speed in found.items() if speed is not None}


def measure_speeds(plan: Plan, study: "Study", directory: Path) -> "dict[str, Speed]":
    """Return the speed of the students beside that of their teacher, by teacher, on `speed_set`."""
    from askd_hf.evaluation.study_speed import measure_students

    options = plan.evaluation[plan.speed_set]
    (evaluation,) = parse_args(options_of("evaluate"), as_arguments({**options, "model": "any"}))
    (spec,) = evaluation.sets()
    spec = replace(spec, name=plan.speed_set)
    return {
        teacher: measure_students(
            study, teacher, model, evaluation, spec, plan.speed_clips, speed_file(directory, teacher)
        )
        for teacher, model in plan.teachers.items()
    }


if __name__ == "__main__":
    with exit_on_user_error(), readable_terminal():
        main()
