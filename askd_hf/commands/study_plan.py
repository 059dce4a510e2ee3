"""The file of a study: names that stand for options, and the cells that their combinations are."""

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..arguments.parser import NULL, as_arguments, parse_args
from ..errors import UserError
from .options import options_of

Options = dict[str, Any]  # of `askd-hf distill` or `askd-hf evaluate`: text or lists of text, as in a YAML file
SPOKEN = ("language", "task")  # options of a study that are also those of its evaluation sets


@dataclass
class Plan:
    """The contents of a study's file. Each name stands for options."""

    teachers: dict[str, str]  # name -> directory or Hub id
    students: dict[str, Options]
    training: dict[str, Options]  # also `in_domain`: a list of evaluation sets
    methods: dict[str, Options]
    evaluation: dict[str, Options]  # of `askd-hf evaluate`; `SPOKEN` are those of `options` by default
    seeds: list[str]
    options: Options = field(default_factory=dict)  # of every cell
    baselines: list[str] = field(default_factory=list)  # see `Study`
    speed_set: str | None = None  # the evaluation set that speed is measured on
    speed_clips: int = 32
    title: str = "Study"


@dataclass
class Cell:
    """A student to train and evaluate with one seed. A teacher, which is only evaluated, has no student."""

    teacher: str
    student: str = ""
    training: str = ""
    method: str = ""
    seed: int = 0
    options: Options = field(default_factory=dict)

    @property
    def name(self) -> str:
        from ..evaluation.study import TEACHER

        parts = [self.student, self.training, self.method, str(self.seed)] if self.student else [TEACHER]
        return "/".join([self.teacher, *parts])

    @property
    def labels(self) -> str:
        """The directory of the teacher's cached labels, "" if the cell uses none."""
        directory = self.options.get("teacher_cache_dir", "")
        return "" if directory in NULL else directory


def read_plan(file: Path) -> Plan:
    """Read the file of a study. Raises `UserError` for parts that are missing, unknown, or don't fit together."""
    from ..evaluation.study import TEACHER

    try:
        plan = Plan(**yaml.load(file.read_text(encoding="utf-8"), Loader=yaml.BaseLoader))
    except (OSError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"{file}: {' '.join(str(error).split())}") from error
    for part in ("students", "training", "methods", "evaluation"):
        with named_errors(f"{file}: {part}"):
            setattr(plan, part, named_options(getattr(plan, part)))
    spoken = {name: plan.options[name] for name in SPOKEN if name in plan.options}
    plan.evaluation = {name: {**spoken, **options} for name, options in plan.evaluation.items()}
    with named_errors(f"{file}: teachers"):
        named_options(dict.fromkeys(plan.teachers, "") if isinstance(plan.teachers, dict) else plan.teachers)
    check_values(plan, file)
    if unknown := {*plan.baselines} - {*plan.methods, *plan.students, TEACHER}:
        raise UserError(f"{file}: baselines: {', '.join(sorted(unknown))}: not a method, a student or `{TEACHER}`")
    named = {name for options in plan.training.values() for name in options.get("in_domain", [])}
    named |= {plan.speed_set} - {None}
    if unknown := named - {*plan.evaluation}:
        raise UserError(f"{file}: {', '.join(sorted(unknown))}: not an evaluation set")
    return plan


def check_values(plan: Plan, file: Path) -> None:
    """Raise `UserError` for parts of the file that must be lists or integers and aren't. Convert `speed_clips`."""
    parts: dict[str, Any] = {"seeds": plan.seeds, "baselines": plan.baselines}
    parts |= {f"training: {name}: in_domain": part.get("in_domain", []) for name, part in plan.training.items()}
    for name, part in parts.items():
        if not isinstance(part, list):
            raise UserError(f"{file}: {name}: must be a list such as [{part}], not {part!r}")
    integers: dict[str, list[Any]] = {"seeds": plan.seeds, "speed_clips": [plan.speed_clips]}
    for name, numbers in integers.items():
        if wrong := [number for number in numbers if not str(number).isdecimal()]:
            raise UserError(f"{file}: {name}: must be integers, not {', '.join(map(str, wrong))}")
    plan.speed_clips = int(plan.speed_clips)


def named_options(part: Any) -> dict[str, Options]:
    """Return the options of each name in a part of the file; a name without options has none.

    Raises `UserError` for anything but names with options, and for names that can't be part of a cell's name.
    """
    if not isinstance(part, dict):
        raise UserError("must be names, each with options")
    found = {name: {} if options in NULL else options for name, options in part.items()}
    for name, options in found.items():
        if not isinstance(options, dict):
            raise UserError(f"{name}: must be options such as `preset: askd`, not {options!r}")
        if not name or "/" in name:
            raise UserError(f"a name can't be empty or contain a slash: {name!r}")
    return found


def make_cells(plan: Plan, directory: Path) -> list[Cell]:
    """Return a cell for each teacher, and one for each combination, in the order of the file."""
    cells = [Cell(name, options={"teacher": model}) for name, model in plan.teachers.items()]
    axes = plan.teachers, plan.students, plan.training, plan.methods, map(int, plan.seeds)
    for teacher, student, training, method, seed in itertools.product(*axes):
        cell = Cell(teacher, student, training, method, seed)
        cell.options = {
            "encoder_cache_dir": str(directory / "cache" / "encoder"),
            "compare": "False",
            "save_total_limit": "1",
            **plan.options,
            **plan.students[student],
            **plan.training[training],
            **plan.methods[method],
            "teacher": plan.teachers[teacher],
            "seed": str(seed),
            "output_dir": str(directory / "runs" / cell.name),
        }
        labels = "-".join((teacher, student, training, f"temperature {temperature_of(cell.options)}"))
        cell.options.setdefault("teacher_cache_dir", str(directory / "cache" / labels))
        cell.options.pop("in_domain", None)
        for cache, option in (("teacher_cache_dir", "teacher_top_k"), ("encoder_cache_dir", "encoder_cache_dtype")):
            if cell.options[cache] in NULL:  # of a method without this cache
                cell.options.pop(option, None)
        cells.append(cell)
    return cells


def temperature_of(options: Options) -> str:
    """Return the temperature of the teacher's labels, for which they are cached."""
    from ..schedule import PRESETS

    preset = options.get("preset", "askd")  # a wrong one is found by `check_cells`
    return options.get("temperature") or format(PRESETS.get(preset, {}).get("temperature", 1.0), "g")


def check_cells(cells: list[Cell], evaluation: dict[str, Options]) -> None:
    """Parse the options of all cells and evaluation sets, before the first one runs.

    Raises `UserError` for an option that doesn't exist or has an invalid value, and for an evaluation set without a
    language if students have one.
    """
    multilingual = next((cell.name for cell in cells if cell.options.get("language", "") not in NULL), None)
    for name, options in evaluation.items():
        with named_errors(f"evaluation: {name}"):
            (args,) = parse_args(options_of("evaluate"), as_arguments({**options, "model": "any"}))
            if len(args.sets()) != 1 or args.long_form:
                raise UserError("must be one set of clips, without long_form: give each split a name of its own")
            if multilingual and args.language is None:
                raise UserError(f"give `language`, which {multilingual} has, here or in the study's `options`")
    for cell in {cell.name.rpartition("/")[0]: cell for cell in cells if cell.student}.values():
        with named_errors(cell.name):
            parse_args(options_of("distill"), as_arguments(cell.options))


def check_datasets(cells: list[Cell], evaluation: dict[str, Options]) -> None:
    """Raise `UserError` if a dataset of the study doesn't exist, before the first cell runs."""
    from ..data.sources import check_exist

    named = [options.get("dataset", []) for options in (*evaluation.values(), *(cell.options for cell in cells))]
    check_exist(name for names in named for name in ([names] if isinstance(names, str) else names))


@contextlib.contextmanager
def named_errors(name: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
