"""The sentences and tables of the model card, each a string of Markdown; `card.py` puts them into its template."""

from typing import Any

from ..evaluation.metrics import BASIC_BY_LETTER, meaning_of
from ..evaluation.results import Paired, Results, SetResult, Speculative, Speed
from ..objective import DIVERGENCES_WITH_MIX
from .provenance import HUB, BaseModelInfo
from .training_summary import TrainingSummary

# what the objective and the schedule say already
NOT_HYPERPARAMETERS = ("teacher_weight", "teacher_weight_end", "teacher_phase_ratio", "self_weight", "temperature")


# ---- where it comes from ----


def link(model: BaseModelInfo) -> str:
    return f"[{model.name}]({HUB}/{model.name})" if model.on_hub else f"`{model.name}`"


def listed(items: list[Any]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    words = [str(item) for item in items]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def descent(facts: TrainingSummary) -> str:
    """The sentence that says of which models it was made, and how; empty if that isn't known."""
    origin = facts.origin
    begun = "Training started from" if facts.step else "Its weights are those of"
    taught = was_taught(facts)
    if origin.from_teacher:
        layers = "layers"
        if origin.copied_decoder_layers is not None:
            encoder = "encoder"
            if origin.copied_encoder_layers is not None:
                encoder += f" {plural('layer', origin.copied_encoder_layers)}"
            layers = f"the {encoder} and decoder {plural('layer', origin.copied_decoder_layers)} (counted from 0)"
        sentence = f"{begun} {layers} of {link(origin.teacher)}" + (", its teacher" if taught else "")
    elif taught:
        start = "It was trained" if origin.student is None else f"{begun} {link(origin.student)},"
        sentence = f"{start} with {link(origin.teacher)} as its teacher"
    else:
        return "" if origin.student is None else f"{begun} {link(origin.student)}."
    if origin.teacher.decoder_layers is not None:
        sentence += (
            f", which has {origin.teacher.encoder_layers} encoder and {origin.teacher.decoder_layers} decoder layers "
            f"and {origin.teacher.parameters:,} parameters"
        )
    return f"{sentence}."


def keeps_adapter(facts: TrainingSummary) -> bool:
    """Whether what is published is an adapter, and not a whole model."""
    return facts.student.adapter_parameters is not None


def was_taught(facts: TrainingSummary) -> bool:
    """Whether a model that is known by its name was its teacher."""
    return facts.origin.teacher is not None and facts.step > 0 and uses(facts.arguments)[0]


def was_distilled(facts: TrainingSummary) -> bool:
    """Whether it learned from a teacher or from itself, not from the labels alone."""
    return facts.step > 0 and any(uses(facts.arguments))


def title_line(facts: TrainingSummary) -> str:
    """What it is."""
    kind = "recognizer"
    if facts.origin.task == "translate":
        kind = "translator" + (f", from `{facts.origin.language}` into English," if facts.origin.language else "")
    made = "distilled" if was_distilled(facts) else "trained" if facts.step else "made"
    student = facts.student
    layers = f"{student.encoder_layers} encoder and {student.decoder_layers} decoder layers"
    if keeps_adapter(facts):
        return (
            f"A LoRA adapter of {student.adapter_parameters:,} parameters that makes of {link(facts.origin.base)}, a\n"
            f"Whisper with {layers} and {student.parameters:,} parameters, a speech {kind}. It was {made} with\n"
            "`askd_hf`."
        )
    return f"A Whisper speech {kind} with {layers} and\n{student.parameters:,} parameters, {made} with `askd_hf`."


def intended_use(facts: TrainingSummary) -> str:
    """What it is for, and what it isn't."""
    origin = facts.origin
    what = "Translating speech into English" if origin.task == "translate" else "Transcribing speech"
    languages = f" in {quoted(origin.languages)}" if origin.languages else ""
    return (
        f"{what}{languages}, recorded like the speech that it was trained on.\n"
        "What it writes may be wrong, or made up in silence and noise: measure it on speech like yours first, and let"
        "\n"
        "nothing that matters to people rest on its text alone. It doesn't tell who speaks, or how they feel."
    )


def quoted(names: list[str]) -> str:
    return listed([f"`{name}`" for name in names])


def plural(noun: str, items: list[int]) -> str:
    return f"{noun}{'s' if len(items) > 1 else ''} {listed(items)}"


def speech_line(facts: TrainingSummary) -> str:
    """What it was trained on."""
    origin, known = facts.origin, []
    for speech in origin.speech:
        name = f"[{speech.dataset}]({HUB}/datasets/{speech.dataset})" if speech.on_hub else f"`{speech.dataset}`"
        details = [
            f"{kind} `{value}`" for kind, value in (("configuration", speech.config), ("split", speech.split)) if value
        ]
        details += [f"license `{speech.license}`"] if speech.license else []
        by_whom = f", transcribed by `{speech.transcribed_by}`" if speech.transcribed_by else ""
        known.append(name + (f" ({', '.join(details)})" if details else "") + by_whom)
    if facts.clips is not None:
        known.append(f"{facts.clips:,} clips")
    if facts.hours is not None:
        known.append(f"{facts.hours:.2f} hours" if facts.hours < 10 else f"{facts.hours:,.0f} hours")
    if has_negatives(facts):
        known.append(
            f"and {'' if facts.no_speech_clips is None else f'{facts.no_speech_clips:,} '}clips in which nobody speaks"
        )
    if origin.languages:
        known.append(f"{'languages' if len(origin.languages) > 1 else 'language'} {quoted(origin.languages)}")
    if origin.tasks != ["transcribe"]:
        known.append(f"{'tasks' if len(origin.tasks) > 1 else 'task'} {quoted(origin.tasks)}")
    return ", ".join(known)


# ---- the training procedure ----


def has_negatives(facts: TrainingSummary) -> bool:
    """Whether it was trained on clips in which nobody speaks as well."""
    return facts.no_speech_clips is None or facts.no_speech_clips > 0


def objective(arguments: dict[str, Any], no_speech_clips: bool = False) -> str:
    """The objective with the terms that the run had; with `negatives` the teacher isn't trusted everywhere."""
    teacher, own = uses(arguments)
    on_teacher = "a·gᵢ" if arguments["weight_teacher_by_label_prob"] or no_speech_clips else "a"
    on_labels = " - ".join(["1", *([on_teacher] if teacher else []), *(["b"] if own else [])])
    terms = [f"({on_labels})·CEᵢ" if teacher or own else "CEᵢ"]
    if teacher:
        terms.append(f"{on_teacher}·{divergence('teacherᵢ', arguments)}")
        if arguments.get("hidden_weight"):
            terms.append("a·h·Hᵢ")
    if own:
        terms.append(f"b·{divergence('selfᵢ', arguments)}")
    return f"L = Σᵢ [ {' + '.join(terms)} ] / N"


def uses(arguments: dict[str, Any]) -> tuple[bool, bool]:
    """Whether teacher and self-teacher had any weight."""
    teacher = (
        arguments["teacher_phase_ratio"] > 0 and max(arguments["teacher_weight"], arguments["teacher_weight_end"]) > 0
    )
    return teacher, arguments["self_weight"] > 0 and (arguments["teacher_phase_ratio"] < 1 or not teacher)


def divergence(target: str, arguments: dict[str, Any]) -> str:
    """T² D(target, student) in symbols, T as a number."""
    name, mix = arguments["divergence"], f"{arguments['divergence_beta']:g}"
    written = {
        "forward_kl": f"KL({target} ‖ studentᵢ)",
        "reverse_kl": f"KL(studentᵢ ‖ {target})",
        "jensen_shannon": f"JSD_{mix}({target} ‖ studentᵢ)",
        "skewed_kl": f"KL({target} ‖ {mix}·{target} + (1 - {mix})·studentᵢ)",
    }[name]
    temperature = f"{arguments['temperature']:g}"
    return written if temperature == "1" else f"{temperature}²·{written}"


def symbols(facts: TrainingSummary) -> list[str]:
    """What the objective's letters stand for, with the values they had."""
    arguments = facts.arguments
    teacher, own = uses(arguments)
    lines = ["CEᵢ: the cross-entropy of the student on label token i; N: the label tokens of an update"]
    if teacher:
        text = f"a: the weight on the teacher, `{arguments['teacher_schedule']}`"
        if arguments["teacher_schedule"] == "adaptive":
            text += ": as `linear`, but more and longer where clips kept out of training don't bear out their labels"
        lines.append(text)
    if teacher and has_negatives(facts):
        elsewhere = "the teacher's probability of the label" if arguments["weight_teacher_by_label_prob"] else "1"
        lines.append(f"gᵢ: 0 in clips in which nobody speaks, in the others {elsewhere}")
    elif teacher and arguments["weight_teacher_by_label_prob"]:
        lines.append("gᵢ: the teacher's probability of the label")
    if teacher and arguments.get("hidden_weight"):
        lines.append(
            "Hᵢ: the mean over matched encoder layers of |student - teacher|² / |teacher|², their hidden states of "
            f"token i's clip; h: {arguments['hidden_weight']:g}"
        )
    if teacher and facts.top_k is not None:
        lines.append(
            f"teacherᵢ: its {facts.top_k} most probable tokens one by one, all others lumped together; so the "
            "divergence is a lower bound of the one over the whole vocabulary"
        )
    if own:
        kind = "its running average" if arguments["self_teacher"] == "ema" else "an earlier snapshot of it"
        detail = f", decay {arguments['self_ema_decay']:g}" if arguments["self_teacher"] == "ema" else ""
        if arguments["snapshot_strategy"] == "epoch":
            detail = ", renewed every epoch"
        lines.append(
            f"b: the weight on the student's own earlier self ({kind}{detail}), `{arguments['self_schedule']}`"
        )
    if (teacher or own) and arguments["temperature"] != 1:
        lines.append(f"teacher, self and student in the divergence: at temperature {arguments['temperature']:g}")
    if (teacher or own) and arguments["divergence"] in DIVERGENCES_WITH_MIX:
        lines.append(f"the share of the target in the divergence's mixture: {arguments['divergence_beta']:g}")
    return lines


def phase_table(facts: TrainingSummary) -> str:
    adaptive = facts.arguments["teacher_schedule"] == "adaptive"
    on_teacher = " (at least)" if adaptive else ""
    on_labels = " (at least)" if facts.arguments["weight_teacher_by_label_prob"] or has_negatives(facts) else ""
    if adaptive:
        on_labels = " (planned)" if on_labels else " (at most)"
    rows = []
    for phase in facts.phases:
        steps = f"{phase['first_step']} to {phase['last_step']}"
        (a, a_end), (b, b_end) = phase["teacher_weight"], phase["self_weight"]
        rows.append([phase["phase"], steps, course(1 - a - b, 1 - a_end - b_end), course(a, a_end), course(b, b_end)])
    return table(
        [
            "phase",
            "steps",
            f"weight on the labels{on_labels}",
            f"on the teacher{on_teacher}, a",
            f"on its own self{' (at most)' if adaptive else ''}, b",
        ],
        rows,
    )


def course(first: float, last: float) -> str:
    return f"{first:.3g}" if first == last else f"{first:.3g} → {last:.3g}"


def hyperparameter_table(facts: TrainingSummary) -> str:
    """What the schedule doesn't say; options that are off, or without a value, are left out."""
    arguments = {name: value for name, value in facts.arguments.items() if name not in NOT_HYPERPARAMETERS}
    teacher, own = uses(facts.arguments)
    unused = {"adaptive_window"} if facts.arguments["teacher_schedule"] != "adaptive" else set()
    unused |= set() if teacher else {"teacher_schedule", "weight_teacher_by_label_prob"}
    unused |= set() if own else {"self_schedule", "self_teacher", "snapshot_strategy"}
    if not own or facts.arguments["self_teacher"] != "ema":
        unused.add("self_ema_decay")
    if facts.arguments["divergence"] not in DIVERGENCES_WITH_MIX:
        unused.add("divergence_beta")
    if arguments["max_steps"] <= 0:
        unused.add("max_steps")
    elif arguments["max_steps"] > 0:
        unused.add("num_train_epochs")
    rows = [
        [f"`{name}`", argument_value(name, value)]
        for name, value in arguments.items()
        if name not in unused and value is not None and value is not False
    ]
    return table(["option", "value"], rows)


def argument_value(name: str, value: Any) -> str:
    """As it is written in an option, and what isn't plain from that."""
    written = f"{value:g}" if isinstance(value, float) else str(value)
    return f"{written} (a fraction of the run)" if name == "warmup_steps" and 0 < value < 1 else written


# ---- the evaluation ----


def results_line(results: Results) -> str | None:
    """The student's word error rates, with the teacher's, in a sentence; None if there are none."""
    found = []
    for entry in results.sets:
        rates = {role: scores.wer for role, scores in entry.scores.items() if entry.speech and scores.wer is not None}
        if "student" in rates:
            beside = f" (teacher: {rates['teacher']:.2f} %)" if "teacher" in rates else ""
            found.append(f"{rates['student']:.2f} %{beside} on {set_name(entry)}")
    return f"Word error rate: {listed(found)}." if found else None


def table(header: list[str], rows: list[list[str]], numbers_from: int | None = None) -> str:
    """A Markdown table; columns from `numbers_from` on are aligned to the right."""
    numbers_from = len(header) if numbers_from is None else numbers_from
    rules = ["---" if i < numbers_from else "---:" for i in range(len(header))]
    lines = [header, rules, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def with_interval(value: float | None, interval: tuple[float, float] | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval is not None else "")


def set_name(entry: SetResult) -> str:
    details = [entry.method] if entry.method != "short" else []
    details += [entry.task] if entry.task != "transcribe" else []
    return ", ".join([entry.name, *details])


def score_table(results: Results) -> str:
    rows = []
    for entry in results.sets:
        if not entry.speech:
            continue
        for role in (role for role in results.models if role in entry.scores):
            s = entry.scores[role]
            errors = f"{s.substitutions} / {s.deletions} / {s.insertions}"
            wer, cer = with_interval(s.wer, s.wer_interval), with_interval(s.cer, s.cer_interval)
            size = f"{entry.clips:,}", f"{entry.hours:.2f}"
            rows.append([set_name(entry), *size, entry.normalizer_name, role, wer, cer, errors])
    header = [
        "set",
        "clips",
        "hours",
        "normalizer",
        "model",
        "WER, %",
        "CER, %",
        "words substituted / deleted / inserted",
    ]
    return table(header, rows, 5)


def rates_line(results: Results) -> str:
    """What the rates of `score_table` are of."""
    normalizers = {entry.normalizer for entry in results.sets if entry.speech}
    if normalizers == {"none"}:
        return "Corpus-level rates of the texts as they are"
    if normalizers <= {"english", "basic", BASIC_BY_LETTER, "none"}:
        as_they_are = " (none: of the texts as they are)" if "none" in normalizers else ""
        return f"Corpus-level rates after Whisper's text normalizer of that name{as_they_are}"
    return f"Corpus-level rates after the text normalizer of that name ({meaning_of(normalizers)})"


def model_table(results: Results) -> str:
    rows = []
    for role, model in results.models.items():
        size = "" if model.megabytes is None else f"{model.megabytes:,.1f}"
        if model.stored_dtype is not None:
            size += f" {model.stored_dtype}"
        rows.append([role, f"{model.encoder_layers} / {model.decoder_layers}", f"{model.parameters:,}", size])
    return table(["model", "encoder / decoder layers", "parameters", "MB on disk"], rows, 1)


def comparison(entry: SetResult) -> str:
    paired: Paired = entry.paired
    low, high = paired.interval
    return (
        f"{set_name(entry)}: WER of the {paired.first} less that of the {paired.second}: "
        f"{paired.difference:+.2f} points [{low:+.2f}, {high:+.2f}]; probability that the {paired.first}'s is lower: "
        f"{100 * paired.probability_of_improvement:.1f} %"
    )


def dropped(entry: SetResult) -> str:
    reasons = ", ".join(f"{count:,} ({reason})" for reason, count in entry.dropped.items())
    return f"{set_name(entry)}: clips not scored: {reasons}"


def settings_line(settings: dict[str, Any]) -> str:
    """The settings that are a single value, and none that is a path."""
    plain = {name: value for name, value in settings.items() if isinstance(value, str | int | float)}
    shown = {name: value for name, value in plain.items() if not (isinstance(value, str) and set(value) & {"/", "\\"})}
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in shown.items())


def speed_table(speed: Speed) -> str:
    rows = []
    for row in speed.rows:
        seconds = [f"{part.median:.2f}" for part in (row.total, row.encoder, row.decoder)]
        memory = "" if row.peak_memory_mb is None else f"{row.peak_memory_mb:,.0f}"
        faster = "" if row.times_faster is None else f"{row.times_faster:.2f}"
        latency, rtfx = f"{row.latency:.3f}", f"{row.rtfx:.1f}"
        rows.append([row.role, str(row.batch_size), *seconds, latency, rtfx, memory, faster])
    header = [
        "model",
        "batch",
        "seconds",
        "encoder",
        "decoder",
        "latency, s",
        "audio s / s",
        "peak memory, MB",
        "times faster",
    ]
    return table(header, rows, 1)


def speed_conditions(speed: Speed) -> str:
    return (
        f"{speed.clips} clips of {speed.set}, {speed.audio_seconds:.0f} s of audio; medians of {speed.repetitions} "
        f"interleaved repetitions, greedy; {speed.device}, {speed.dtype}, {speed.threads} threads, {speed.attention} "
        "attention"
    )


def speculative_line(found: Speculative) -> str:
    return (
        f"As the assistant of its teacher, on {found.clips} clips of {found.set}: {found.identical} of {found.clips} "
        f"have exactly the teacher's tokens, the teacher kept {100 * found.acceptance_rate:.1f} % of the proposed "
        f"tokens, and it was {found.times_faster:.2f} times as fast as the teacher alone (greedy, batch 1)."
    )
