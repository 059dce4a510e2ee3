"""The report of a study: tables in Markdown, and figures."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .result_tables import Table, speed_table
from .results import Speed
from .study import Study, System, comparison_table, error_table, no_speech_table, pooled_table, seed_errors

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REPORT_FILE, FIGURE_FILE = "study.md", "study.png"
MARKERS = "os^Dv<>PX*"


def write_study(
    study: Study, in_domain: dict[str, list[str]], speed: dict[str, Speed], directory: Path, title: str
) -> list[Table]:
    """Write `study.md` and `study.png`, and return the tables of the first.

    Args:
        in_domain: for each training, the names of the evaluation sets of its domain.
        speed: by teacher; the roles are `STUDENT, TRAINING` and `teacher`.
    """
    speech = study.sets(speech=True)
    outside = {training: [name for name in speech if name not in inside] for training, inside in in_domain.items()}
    tables = [error_table(study, name) for name in speech]
    tables += [comparison_table(study, [name], f"{name}: compared with the baselines") for name in speech]
    if len(in_domain) > 1:
        tables.append(pooled_table(study, in_domain, "Trainings together, sets of the domain"))
    tables.append(pooled_table(study, outside, "Trainings together, sets of other domains"))
    tables += [no_speech_table(study, name) for name in study.sets(speech=False)]
    tables += [speed_table(one) for one in speed.values()]
    tables = [table for table in tables if table.rows]
    sections = [_section(table) for table in tables]
    directory.mkdir(parents=True, exist_ok=True)
    if in_domain and speech:
        write_study_figure(study, in_domain, speed, directory / FIGURE_FILE)
        sections.insert(0, f"![{title}]({FIGURE_FILE})")
    text = "\n\n".join([f"# {title}", *sections]) + "\n"
    (directory / REPORT_FILE).write_text(text, encoding="utf-8")
    return tables


def _section(table: Table) -> str:
    return "\n\n".join([f"## {table.title}", table.markdown(), *(f"{note}." for note in table.notes)])


# ---- figures ----


def write_study_figure(study: Study, in_domain: dict[str, list[str]], speed: dict[str, Speed], path: Path) -> None:
    """Plot the systems: errors in the domain against those outside it and against speed, and insertions.

    Args:
        in_domain, speed: see `write_study`.
        path: file to write; the suffix selects the format.
    """
    from matplotlib.figure import Figure  # takes a second, and few processes draw

    panels = 3 if speed else 2
    figure = Figure(figsize=(5 * panels, 4.5), layout="constrained")
    axes = figure.subplots(1, panels)
    outside = [n for n in study.sets(speech=True) if not all(n in inside for inside in in_domain.values())]
    _draw_domains(axes[0], study, in_domain, outside)
    _draw_insertions(axes[1], study)
    if speed:
        _draw_speed(axes[2], study, in_domain, speed)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path, dpi=110)


def _label(study: Study, system: System) -> str:
    return ", ".join(filter(None, study.labels(system)))


def _style(study: Study, system: System) -> dict[str, Any]:
    """Return the style of the points of a system: a color per method, a marker per student and training."""
    systems = study.systems()
    methods = list(dict.fromkeys(each[3] for each in systems))
    trained = list(dict.fromkeys(each[:3] for each in systems))
    color, marker = methods.index(system[3]), trained.index(system[:3])
    return dict(color=f"C{color % 10}", marker=MARKERS[marker % len(MARKERS)], linestyle="")


def _rates(study: Study, system: System, sets: list[str]) -> np.ndarray:
    return seed_errors(study.of(system), sets, capped=True).rates


def _draw_domains(axes: "Axes", study: Study, in_domain: dict[str, list[str]], outside: list[str]) -> None:
    for system in study.systems():
        inside = in_domain[system[2]]
        others = [name for name in outside if name not in inside]
        if inside and others:
            points = _rates(study, system, inside), _rates(study, system, others)
            axes.plot(*points, **_style(study, system), label=_label(study, system))
    axes.set(xlabel="WER in the domain, capped per clip, %", ylabel="WER outside the domain, capped per clip, %")
    axes.grid(alpha=0.3)


def _draw_insertions(axes: "Axes", study: Study) -> None:
    systems = study.all_systems()
    names = study.sets(speech=True)
    for row, name in enumerate(names):
        shares = []
        for system in systems:
            sets = [result.set(name) for result in study.of(system)]
            shares.append(100 * np.mean([sum(one.insertions) for one in sets]) / sum(sets[0].words))
        axes.barh(np.arange(len(systems)) + 0.8 * row / len(names), shares, height=0.8 / len(names), label=name)
    axes.set(yticks=range(len(systems)), xlabel="insertions per 100 words, mean of the seeds")
    axes.set_yticklabels([_label(study, system) for system in systems], fontsize="x-small")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3, axis="x")


def _draw_speed(axes: "Axes", study: Study, in_domain: dict[str, list[str]], speed: dict[str, Speed]) -> None:
    for system in study.systems():
        teacher, student, training, _ = system
        rows = [row for row in speed[teacher].rows if row.batch_size == 1] if teacher in speed else []
        speedups = [row.speedup for row in rows if row.role == f"{student}, {training}"]
        if speedups and in_domain[training]:
            rates = _rates(study, system, in_domain[training])
            axes.plot(speedups * len(rates), rates, **_style(study, system), label=_label(study, system))
    axes.set(xlabel="speedup over the teacher, batch size 1", ylabel="WER in the domain, capped per clip, %")
    axes.grid(alpha=0.3)
