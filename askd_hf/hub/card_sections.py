"""Text of the model card on the model, its data and its evaluation, as Markdown strings.

`card_training.py` has the text on the training procedure, `card.py` the metadata and the template.
"""

from typing import Any

from ..evaluation.result_tables import Table, speedup, token_notes
from ..evaluation.results import Results, SetResult, set_name
from .card_training import has_no_speech_clips, uses
from .provenance import HUB, BaseModelInfo, TrainingData
from .training_summary import ModelInfo, TrainingSummary

STUDENT, TEACHER = "student", "teacher"


# ---- helpers ----


def link(model: BaseModelInfo) -> str:
    """Return the name of a model, as a link if it is on the Hub."""
    return f"[{model.name}]({HUB}/{model.name})" if model.on_hub else f"`{model.name}`"


def join_words(items: list[Any]) -> str:
    """Return "a", "a and b", or "a, b and c"."""
    words = [str(item) for item in items]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def join_code(names: list[str]) -> str:
    """Return names in backquotes, joined as by `join_words`."""
    return join_words([f"`{name}`" for name in names])


def plural(count: int, noun: str) -> str:
    """Return "1 layer" or "2 layers"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def layers(model: ModelInfo | BaseModelInfo) -> str:
    """Return "3 encoder layers, 1 decoder layer"."""
    return f"{plural(model.encoder_layers, 'encoder layer')}, {plural(model.decoder_layers, 'decoder layer')}"


# ---- the model ----


def keeps_adapter(summary: TrainingSummary) -> bool:
    """Return whether an adapter is published, not a whole model."""
    return summary.student.adapter_parameters is not None


def had_named_teacher(summary: TrainingSummary) -> bool:
    """Return whether the student was trained with a teacher whose name is known."""
    return summary.provenance.teacher is not None and summary.step > 0 and uses(summary.arguments)[0]


def was_distilled(summary: TrainingSummary) -> bool:
    """Return whether the student was trained with a teacher or a self-teacher, not with labels only."""
    return summary.step > 0 and any(uses(summary.arguments))


def title_line(summary: TrainingSummary) -> str:
    """Return the first sentence of the card: task and size of the model."""
    provenance, student = summary.provenance, summary.student
    kind = "speech recognizer"
    if provenance.task == "translate":
        kind = "speech translator" + (f" from `{provenance.language}` into English" if provenance.language else "")
    made = "distilled" if was_distilled(summary) else "trained" if summary.step else "initialized"
    size = f"{layers(student)}, {student.parameters:,} parameters"
    if keeps_adapter(summary):
        return (
            f"A LoRA adapter with {student.adapter_parameters:,} parameters for {link(provenance.base)}\n"
            f"({size}). Together they are a Whisper {kind}, {made} with `askd_hf`."
        )
    return f"A Whisper {kind} ({size}), {made} with `askd_hf`."


def base_model_sentence(summary: TrainingSummary) -> str:
    """Return the sentence on the base model and the teacher; empty if both are unknown."""
    provenance = summary.provenance
    start = "Training started from" if summary.step else "Its weights are those of"
    has_teacher = had_named_teacher(summary)
    if provenance.from_teacher:
        copied = "layers"
        if provenance.copied_decoder_layers is not None:
            encoder = "the encoder"
            if provenance.copied_encoder_layers is not None:
                encoder = f"encoder {_numbered_layers(provenance.copied_encoder_layers)}"
            copied = f"{encoder} and decoder {_numbered_layers(provenance.copied_decoder_layers)} (counted from 0)"
        sentence = f"{start} {copied} of {link(provenance.teacher)}" + (", its teacher" if has_teacher else "")
    elif has_teacher:
        base = "It was trained" if provenance.student is None else f"{start} {link(provenance.student)},"
        sentence = f"{base} with {link(provenance.teacher)} as its teacher"
    else:
        return "" if provenance.student is None else f"{start} {link(provenance.student)}."
    if provenance.teacher.decoder_layers is not None:
        sentence += f" ({layers(provenance.teacher)}, {provenance.teacher.parameters:,} parameters)"
    if provenance.encoder_recovery_epochs:
        epochs = plural(provenance.encoder_recovery_epochs, "epoch")
        sentence += f". Its encoder was first trained for {epochs} on audio alone, to give the whole encoder's outputs"
    return f"{sentence}."


def _numbered_layers(numbers: list[int]) -> str:
    return f"layer{'s' if len(numbers) > 1 else ''} {join_words(numbers)}"


def results_line(results: Results) -> str | None:
    """Return the student's WER and speedup, compared with the teacher, in one sentence; None without a WER.

    If a model loops on a clip of a set, the WER with at most all words of a clip as errors is given as well.
    """
    rates = []
    for entry in results.sets:
        if rate := _student_rate({role: scores.wer for role, scores in entry.scores.items()}):
            rates.append(f"{rate} on {set_name(entry)}")
            capped = _student_rate({role: scores.capped_wer for role, scores in entry.scores.items()})
            if capped and any(scores.loops for scores in entry.scores.values()):
                rates[-1] += f", {capped} with at most as many errors as words per clip (there are loops)"
    if not rates:
        return None
    rows = results.speed.rows if results.speed else []
    if all(row.role != TEACHER for row in rows):  # those of other evaluations are relative to another model
        rows = []
    speedups = [
        f"{speedup(row.speedup)} at batch size {row.batch_size}"
        for row in rows
        if row.role == STUDENT and row.speedup is not None
    ]
    line = f"Word error rate: {join_words(rates)}."
    if speedups:
        line += f" Speedup over the teacher: {join_words(speedups)}.{shape_sentence(results)}"
        line += "".join(f" {note}." for note in token_notes(results.speed))
    return line


def _student_rate(rates: dict[str, float | None]) -> str:
    """Return the student's rate, and the teacher's if known; "" without the student's."""
    own, other = rates.get(STUDENT), rates.get(TEACHER)
    if own is None:
        return ""
    return f"{own:.2f} %" if other is None else f"{own:.2f} % (teacher: {other:.2f} %)"


def shape_sentence(results: Results) -> str:
    """Return what the student has less of than the teacher, in one sentence with a space before; "" if nothing.

    Seconds are those of the audio window.
    """
    student, teacher = (results.models.get(role) for role in (STUDENT, TEACHER))
    if student is None or teacher is None:
        return ""
    sizes = [
        (student.encoder_layers, teacher.encoder_layers, "encoder layer"),
        (student.decoder_layers, teacher.decoder_layers, "decoder layer"),
        (student.window, teacher.window, "audio second"),
        (student.vocabulary, teacher.vocabulary, "token"),
    ]
    less = [
        f"{plural(round(own), name)} (teacher: {round(other):,})"
        for own, other, name in sizes
        if own and other and own < other
    ]
    return f" It has {join_words(less)}." if less else ""


def training_data(summary: TrainingSummary) -> list[str]:
    """Return one line per dataset, and one on the amount of speech, languages and tasks."""
    provenance = summary.provenance
    lines = [_dataset_line(data) for data in provenance.speech]
    details = [] if summary.clips is None else [plural(summary.clips, "clip")]
    if summary.hours is not None:
        details.append(f"{summary.hours:.2f} hours" if summary.hours < 10 else f"{summary.hours:,.0f} hours")
    if summary.concatenated_clips:
        details.append(f"{plural(summary.concatenated_clips, 'clip')}, each of two or three of these joined at random")
    if has_no_speech_clips(summary):
        count = summary.no_speech_clips
        details.append("clips without speech" if count is None else f"{plural(count, 'clip')} without speech")
    if provenance.languages:
        details.append(f"{_noun('language', provenance.languages)} {join_code(provenance.languages)}")
    if provenance.tasks != ["transcribe"]:
        details.append(f"{_noun('task', provenance.tasks)} {join_code(provenance.tasks)}")
    return lines + ([f"In total: {', '.join(details)}"] if details else [])


def _dataset_line(data: TrainingData) -> str:
    name = f"[{data.dataset}]({HUB}/datasets/{data.dataset})" if data.on_hub else f"`{data.dataset}`"
    details = [f"{kind} `{value}`" for kind, value in (("configuration", data.config), ("split", data.split)) if value]
    details.append(f"license `{data.license}`" if data.license else "license unknown")
    transcribed = f", transcribed by `{data.transcribed_by}`" if data.transcribed_by else ""
    return f"{name} ({', '.join(details)}){transcribed}"


def _noun(noun: str, items: list[Any]) -> str:
    return f"{noun}{'s' if len(items) > 1 else ''}"


# ---- evaluation ----


def observed_errors(entry: SetResult) -> list[str]:
    """Return the hallucination indicators of the student on one set, and the spread of its WER over speakers."""
    student, teacher = entry.scores.get(STUDENT), entry.scores.get(TEACHER)
    if student is None:
        return []

    def compared(value: str | None) -> str:
        return "" if value is None else f" (teacher: {value})"

    name, found = set_name(entry), []
    if entry.no_speech_clips:
        value = compared(f"{teacher.no_speech_hallucinations}" if teacher else None)
        found.append(
            f"Hallucinations on {name}: text for {student.no_speech_hallucinations} of "
            f"{plural(entry.no_speech_clips, 'clip')} without speech{value}."
        )
    if not entry.has_speech:
        return found
    if student.insertion_rate:
        value = compared(f"{teacher.insertion_rate:.2f} %" if teacher else None)
        found.append(f"Insertion rate on {name}: {student.insertion_rate:.2f} %{value}.")
    if student.repeated_5grams:
        value = compared(f"{teacher.repeated_5grams:.2f} %" if teacher else None)
        found.append(f"Repeated 5-grams on {name}: {student.repeated_5grams:.2f} %{value}.")
    rates = student.wer_by_speaker.values()
    if len(rates) > 1:
        found.append(f"WER by speaker on {name}: {min(rates):.1f} to {max(rates):.1f} % ({len(rates)} speakers).")
    return found


def settings_table(settings: dict[str, Any]) -> str:
    """Return the evaluation settings that have a single value, except paths and the command, which may have some."""
    plain = {n: value for n, value in settings.items() if isinstance(value, str | int | float) and n != "command"}
    shown = {name: value for name, value in plain.items() if not (isinstance(value, str) and set(value) & {"/", "\\"})}
    return Table(
        "Settings", ["setting", "value"], [[f"`{name}`", str(value)] for name, value in shown.items()], 2
    ).markdown()
