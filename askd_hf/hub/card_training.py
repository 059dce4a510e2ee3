"""Text of the model card on the training procedure: objective, schedule and hyperparameters, as Markdown strings."""

from typing import Any

from ..evaluation.result_tables import Table
from ..objective import DIVERGENCES
from .training_summary import TrainingSummary

# shown in the objective and the schedule
NOT_HYPERPARAMETERS = ("teacher_weight", "teacher_weight_end", "teacher_phase_ratio", "self_weight", "temperature")


def has_no_speech_clips(summary: TrainingSummary) -> bool:
    """Return whether the training set includes clips without speech."""
    return summary.no_speech_clips is None or summary.no_speech_clips > 0


def uses(arguments: dict[str, Any]) -> tuple[bool, bool]:
    """Return whether the teacher and the self-teacher had a nonzero loss weight."""
    teacher = (
        arguments["teacher_phase_ratio"] > 0 and max(arguments["teacher_weight"], arguments["teacher_weight_end"]) > 0
    )
    return teacher, arguments["self_weight"] > 0 and (arguments["teacher_phase_ratio"] < 1 or not teacher)


def divergence_formula(name: str) -> str:
    """Return the formula of a divergence, with {target}, {student} and {mix}.

    For a divergence that the script of the run has added itself, and this process hasn't, it is the name.
    """
    return DIVERGENCES[name].formula if name in DIVERGENCES else f"{name}({{target}}, {{student}})"


def objective(arguments: dict[str, Any], no_speech_clips: bool = False) -> str:
    """Return the formula of the objective, with the terms that the run used.

    Args:
        no_speech_clips: whether the training set includes clips without speech, which the teacher doesn't label.
    """
    teacher, self_teacher = uses(arguments)
    on_teacher = "a·gᵢ" if arguments["weight_teacher_by_label_prob"] or no_speech_clips else "a"
    on_labels = " - ".join(["1", *([on_teacher] if teacher else []), *(["b"] if self_teacher else [])])
    terms = [f"({on_labels})·CEᵢ" if teacher or self_teacher else "CEᵢ"]
    if teacher:
        terms.append(f"{on_teacher}·{divergence('teacherᵢ', arguments)}")
        if arguments.get("hidden_weight"):
            terms.append("a·h·Hᵢ")
    if self_teacher:
        terms.append(f"b·{divergence('selfᵢ', arguments)}")
    return f"L = Σᵢ [ {' + '.join(terms)} ] / N"


def divergence(target: str, arguments: dict[str, Any]) -> str:
    """Return the formula of T² D(target, student), with T as a number."""
    formula = divergence_formula(arguments["divergence"]).format(
        target=target, student="studentᵢ", mix=f"{arguments['divergence_beta']:g}"
    )
    temperature = f"{arguments['temperature']:g}"
    return formula if temperature == "1" else f"{temperature}²·{formula}"


def schedule_table(summary: TrainingSummary) -> str:
    """Return the loss weights at the first and the last step of each phase."""
    adaptive = summary.arguments["teacher_schedule"] == "adaptive"
    at_least = summary.arguments["weight_teacher_by_label_prob"] or has_no_speech_clips(summary)
    label_note = " (at least)" if at_least else ""
    if adaptive:
        label_note = " (planned)" if at_least else " (at most)"
    rows = []
    for phase in summary.phases:
        steps = f"{phase['first_step']} to {phase['last_step']}"
        (a, a_end), (b, b_end) = phase["teacher_weight"], phase["self_weight"]
        weights = [(1 - a - b, 1 - a_end - b_end), (a, a_end), (b, b_end)]
        rows.append([phase["phase"], steps, *(_change(*ends) for ends in weights)])
    header = [
        "phase",
        "steps",
        f"label weight{label_note}",
        f"teacher weight a{' (at least)' if adaptive else ''}",
        f"self-teacher weight b{' (at most)' if adaptive else ''}",
    ]
    return Table("Schedule", header, rows, len(header)).markdown()


def _change(first: float, last: float) -> str:
    return f"{first:.3g}" if first == last else f"{first:.3g} → {last:.3g}"


def hyperparameter_table(summary: TrainingSummary) -> str:
    """Return the hyperparameters that aren't in the schedule; options that are off, unset or unused are omitted."""
    arguments = {name: value for name, value in summary.arguments.items() if name not in NOT_HYPERPARAMETERS}
    teacher, self_teacher = uses(summary.arguments)
    unused = {"adaptive_window"} if summary.arguments["teacher_schedule"] != "adaptive" else set()
    unused |= set() if teacher else {"teacher_schedule", "weight_teacher_by_label_prob"}
    unused |= set() if self_teacher else {"self_schedule", "self_teacher", "snapshot_strategy"}
    if not self_teacher or summary.arguments["self_teacher"] != "ema":
        unused.add("self_ema_decay")
    if "{mix}" not in divergence_formula(summary.arguments["divergence"]):
        unused.add("divergence_beta")
    unused.add("num_train_epochs" if arguments["max_steps"] > 0 else "max_steps")
    rows = [
        [f"`{name}`", _argument_value(name, value)]
        for name, value in arguments.items()
        if name not in unused and value is not None and value is not False
    ]
    return Table("Hyperparameters", ["option", "value"], rows, 2).markdown()


def _argument_value(name: str, value: Any) -> str:
    """Return the value of an option; `warmup_steps` below 1 as a share of the steps."""
    if name == "warmup_steps" and 0 < value < 1:
        return f"{value:g} ({100 * value:g} % of the steps)"
    return f"{value:g}" if isinstance(value, float) else str(value)
