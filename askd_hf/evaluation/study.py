"""Statistics and tables of a study: many students, each trained with several seeds, on the same evaluation sets.

The bootstrap resamples speakers (or clips) and seeds, so a difference counts only if it is larger than what other
speakers and other seeds change. All systems share the resamples.
"""

import hashlib
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jiwer
import numpy as np

from ..arguments import Normalizer
from ..errors import UserError
from .bootstrap import (
    MAX_DRAWN_UNITS,
    N_RESAMPLES,
    SEED,
    bootstrap_units,
    confidence_interval,
    probability_of_improvement,
)
from .manifest import MANIFESTS_DIR, Manifest
from .result_tables import Table, verdict, with_interval
from .scoring import load_spelling_normalizer, normalized_texts
from .word_errors import capped_errors, count_errors, is_loop, plain_words

TEACHER = "teacher"
AXES = ("teacher", "student", "training", "method")
System = tuple[str, str, str, str]  # a name of each axis
COMPARISON_HEADINGS = ["baseline", "seeds", "WER, points", "P", "capped, points", "P", "verdict (capped)"]
COMPARISON_NOTE = (
    "System minus baseline [95 % bootstrap interval over {unit}s and seeds]. Seeds: those that both have; with one, "
    "the interval doesn't include what another seed changes, and with two or three it has half or two thirds of the "
    "seeds' variance and is somewhat too narrow, as it is with few speakers. Negative: the system is better. P: "
    "probability of improvement, the share of resamples in which the system is better. The verdict is that of the "
    "capped errors, as one loop can decide the WER"
)


@dataclass
class SetErrors:
    """Errors of one model on one set, clip by clip, in the order of the manifest."""

    name: str  # of the set
    data: str  # digest of audio and transcripts: only equal clips are compared
    words: list[int]  # reference words; 0 for a clip without speech
    errors: list[int]  # word errors
    insertions: list[int]
    loops: int  # number of clips with more than twice the reference's words and 10
    texts: int  # number of clips for which the model wrote a word
    speakers: list[str | None]


def set_errors(evaluation: Path, name: str, called: str, normalizer: Normalizer = "auto") -> SetErrors:
    """Return the errors of the `student` of an evaluation on one of its sets.

    Args:
        evaluation: output directory of `askd-hf evaluate`.
        name: of the set in the evaluation.
        called: name of the set in the study.
        normalizer: see `normalizer_for`.
    """
    folder, role = evaluation / MANIFESTS_DIR, "student"
    manifest = Manifest(folder, role, name)
    metadata = manifest.metadata()
    texts = normalized_texts({role: manifest}, metadata, normalizer, load_spelling_normalizer(folder))
    predictions = texts.predictions[role]
    counts = count_errors(jiwer.process_words(texts.references, predictions))
    return SetErrors(
        name=called,
        data=metadata.data,
        words=[len(text.split()) for text in texts.references],
        errors=counts.total.tolist(),
        insertions=counts.insertions.tolist(),
        loops=sum(map(is_loop, texts.references, predictions)),
        texts=sum(bool(plain_words(texts.rows[role][i]["prediction"], texts.language)) for i in texts.no_speech),
        speakers=[texts.rows[role][i].get("speaker") for i in texts.scored],
    )


@dataclass
class CellResult:
    """One trained student of a study, or its teacher, with its errors on every evaluation set."""

    teacher: str  # names in the study's file; the teacher itself has no student, training and method
    sets: list[SetErrors]
    student: str = ""
    training: str = ""
    method: str = ""
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)  # of `askd-hf distill`
    evaluation: dict[str, dict[str, Any]] = field(default_factory=dict)  # of `askd-hf evaluate`, by set
    parameters: int = 0
    code: str = ""  # `source_digest` of the package that trained it

    @property
    def system(self) -> System:
        """Everything but the seed."""
        return self.teacher, self.student, self.training, self.method

    def set(self, name: str) -> SetErrors:
        return next(one for one in self.sets if one.name == name)


def source_digest() -> str:
    """Return a digest of the package's Python files."""
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    return hashlib.blake2b(b"".join(file.read_bytes() for file in files), digest_size=8).hexdigest()


def check_same_clips(results: Sequence[CellResult]) -> None:
    """Raise `UserError` unless all models were evaluated on the same sets and clips."""
    first, *others = results
    for other in others:
        if [one.name for one in other.sets] != [one.name for one in first.sets]:
            raise UserError(f"{other.system} was evaluated on other sets than {first.system}: remove its line")
        for ours, theirs in zip(first.sets, other.sets, strict=True):
            if ours.data != theirs.data:
                raise UserError(
                    f"{ours.name}: {other.system} and {first.system} were evaluated on other clips. Give "
                    "max_duration_in_seconds in `evaluation`, the shortest window of the students"
                )


@dataclass
class SeedErrors:
    """Errors of one system with all its seeds on some clips, summed per bootstrap unit."""

    errors: np.ndarray  # int (seeds, units)
    words: np.ndarray  # int (units,)

    @property
    def rates(self) -> np.ndarray:
        """Error rate of each seed in percent."""
        return 100 * self.errors.sum(axis=1) / self.words.sum()


def seed_errors(results: Sequence[CellResult], sets: Iterable[str], capped: bool) -> SeedErrors:
    """Sum the word errors of one system per speaker (or clip), for each seed.

    Args:
        results: one per seed, sorted by seed.
        sets: names of the sets; their errors are pooled.
        capped: count at most all words of a clip as errors.
    """
    return _summed([(results, name) for name in sets], capped)


def _summed(parts: Sequence[tuple[Sequence[CellResult], str]], capped: bool) -> SeedErrors:
    """Sum the word errors of several sets per unit: a speaker or clip of two sets is one unit.

    Args:
        parts: the results, one per seed, and the name of the set.
        capped: as in `seed_errors`.
    """
    index: dict[Hashable, int] = {}
    units, lengths, errors = [], [], []
    for results, name in parts:
        one = results[0].set(name)
        group, of_clips = _units(one)
        numbers = [
            index.setdefault((group, one.speakers[clip], unit), len(index))
            for unit, clip in zip(*np.unique(of_clips, return_index=True), strict=True)
        ]
        of_seeds = np.array([result.set(name).errors for result in results])
        units.append(np.array(numbers)[of_clips])
        lengths.append(np.array(one.words))
        errors.append(capped_errors(of_seeds, lengths[-1]) if capped else of_seeds)
    unit, length, error = np.concatenate(units), np.concatenate(lengths), np.concatenate(errors, axis=1)
    return SeedErrors(np.stack([np.bincount(unit, weights=of_seed) for of_seed in error]), np.bincount(unit, length))


def _units(one: SetErrors) -> tuple[Hashable, np.ndarray]:
    """Return a key, which is equal for sets with the same units, and the resampling unit of each clip.

    Noisy copies of a set have the same speakers with as many words. Speakers of different corpora may have the same
    names by chance.
    """
    kind, units = bootstrap_units(one.speakers)
    if kind == "clip":
        return (tuple(one.words), tuple(one.speakers)), units
    return tuple(np.bincount(units, weights=one.words)), units


def resampled_means(systems: Sequence[SeedErrors], n_resamples: int = N_RESAMPLES, seed: int = SEED) -> np.ndarray:
    """Return the mean error rates of resampled units and seeds in percent, float `(systems, n_resamples)`.

    A system with one seed, such as the teacher, keeps it. The others must have the same number of seeds.
    """
    generator = np.random.default_rng(seed)
    words = systems[0].words
    n_seeds = max(len(system.errors) for system in systems)
    rates, step = [], max(1, MAX_DRAWN_UNITS // len(words))
    for start in range(0, n_resamples, step):
        count = min(step, n_resamples - start)
        units = generator.multinomial(len(words), np.full(len(words), 1 / len(words)), size=count)
        seeds = generator.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=count) / n_seeds
        total = units @ words
        found = []
        for system in systems:
            of_seeds = units @ system.errors.T  # (resamples, seeds)
            found.append((of_seeds * seeds).sum(axis=1) if len(system.errors) > 1 else of_seeds[:, 0])
        rates.append(100 * np.stack(found) / total)
    return np.concatenate(rates, axis=1)


@dataclass
class Study:
    """All results of a study.

    Args:
        results: of the teachers and of the finished cells.
        baselines: names of methods or students, or `teacher`, that every other system is compared with.
    """

    results: list[CellResult]
    baselines: list[str] = field(default_factory=list)

    def systems(self) -> list[System]:
        """Return the trained systems in the order of the study's file."""
        return list(dict.fromkeys(result.system for result in self.results if result.student))

    def of(self, system: System) -> list[CellResult]:
        """Return the results of a system, sorted by seed."""
        found = [result for result in self.results if result.system == system]
        return sorted(found, key=lambda result: result.seed)

    def all_systems(self) -> list[System]:
        """Return the teachers and the trained systems."""
        return list(dict.fromkeys(result.system for result in self.results))

    def headings(self) -> list[str]:
        """Return the names of what differs between the trained systems: at least the method."""
        return [AXES[axis] for axis in self._varying()]

    def labels(self, system: System) -> list[str]:
        """Return a system's cells below the headings."""
        if system in self.systems():
            return [system[axis] for axis in self._varying()]
        name = TEACHER if len({one[0] for one in self.all_systems()}) == 1 else f"{system[0]}, the {TEACHER}"
        return [name, *([""] * (len(self._varying()) - 1))]

    def _varying(self) -> list[int]:
        trained = self.systems()
        return [axis for axis in range(len(AXES)) if len({system[axis] for system in trained}) > 1] or [len(AXES) - 1]

    def seeds(self, systems: list[System]) -> list[list[int]]:
        """Return the seeds of each system."""
        return [[result.seed for result in self.of(system)] for system in systems]

    def with_common_seeds(self, system: System, baseline: System) -> tuple[list[CellResult], list[CellResult]]:
        """Return the results of both with the seeds that both have; a teacher has no seeds."""
        ours, theirs = self.of(system), self.of(baseline)
        if not theirs[0].student:
            return ours, theirs
        common = {result.seed for result in ours} & {result.seed for result in theirs}
        return [one for one in ours if one.seed in common], [one for one in theirs if one.seed in common]

    def sets(self, speech: bool) -> list[str]:
        """Return the names of the sets with speech, or without."""
        first = self.results[0].sets if self.results else []
        return [one.name for one in first if any(one.words) == speech]

    def baselines_of(self, system: System) -> dict[str, System]:
        """Return the system to compare with for each baseline: the same but for the student or the method."""
        teacher, student, training, method = system
        known, found = {result.system for result in self.results}, {}
        for name in self.baselines:
            if name == TEACHER:
                other = (teacher, "", "", "")
            elif (teacher, name, training, method) in known:
                other = (teacher, name, training, method)
            else:
                other = (teacher, student, training, name)
            if other in known and other != system:
                found[name] = other
        return found


def error_table(study: Study, name: str) -> Table:
    """Return the error rates of all systems on one set with speech: mean over the seeds, lowest, highest, interval."""
    rows = []
    for system in study.all_systems():
        results = study.of(system)
        raw, capped = (seed_errors(results, [name], cap) for cap in (False, True))
        low, high = confidence_interval(resampled_means([capped])[0])
        sets = [result.set(name) for result in results]
        inserted = 100 * np.mean([sum(one.insertions) for one in sets]) / sum(sets[0].words)
        seeds = str(len(results)) if results[0].student else ""
        cells = [seeds, _spread(raw.rates), _spread(capped.rates), f"[{low:.1f}, {high:.1f}]", f"{inserted:.1f}"]
        rows.append([*study.labels(system), *cells, _each(one.loops for one in sets)])
    some = study.results[0].set(name)
    unit, units = bootstrap_units(some.speakers)
    size = f"{len(some.words):,} clips, {sum(some.words):,} words"
    if unit != "clip":
        size += f", {units.max() + 1} {unit}s"
    columns = ["seeds", "WER, %", "capped per clip, %", "capped, 95 %", "insertions, %", "loops"]
    header = [*study.headings(), *columns]
    notes = [
        "Mean over the seeds (lowest to highest). Capped: a clip has at most as many errors as words. 95 %: bootstrap "
        f"interval over {unit}s and seeds. Loops of each seed: clips with more than 2 x the reference's words + 10"
    ]
    return Table(f"{name}: {size}", header, rows, len(study.headings()), notes)


def comparison_table(study: Study, sets: list[str], title: str) -> Table:
    """Return the differences of all systems to their baselines on these sets, pooled."""
    rows = []
    for system in study.systems():
        for name, baseline in study.baselines_of(system).items():
            ours, theirs = study.with_common_seeds(system, baseline)
            if ours:
                pairs = [[seed_errors(results, sets, cap) for results in (ours, theirs)] for cap in (False, True)]
                rows.append([*study.labels(system), name, str(len(ours)), *_compared(*pairs)])
    header = [*study.headings(), *COMPARISON_HEADINGS]
    units = [bootstrap_units(study.results[0].set(name).speakers)[0] for name in sets]
    return Table(title, header, rows, len(study.headings()) + 1, [_comparison_note(units)])


def pooled_table(study: Study, sets_of: dict[str, list[str]], title: str) -> Table:
    """Return the differences between methods, pooled over the trainings that both have, with the seeds they share.

    Args:
        sets_of: for each training, the names of the sets to pool.
    """
    rows = []
    known = set(study.systems())
    for teacher, student, method in dict.fromkeys((system[0], system[1], system[3]) for system in study.systems()):
        for name in study.baselines:
            pairs = {
                training: ((teacher, student, training, method), (teacher, student, training, name))
                for training, sets in sets_of.items()
                if sets
            }
            pairs = {training: pair for training, pair in pairs.items() if name != method and {*pair} <= known}
            seeds = study.seeds([system for pair in pairs.values() for system in pair])
            if common := set.intersection(*map(set, seeds)) if seeds else set():
                sides = list(zip(*pairs.values(), strict=True))
                pooled = [[_pool(study, side, sets_of, cap, common) for side in sides] for cap in (False, True)]
                cells = [", ".join(pairs), str(len(common)), *_compared(*pooled)]
                rows.append([teacher, student, method, name, *cells])
    header = ["teacher", "student", "method", "baseline", "trainings", *COMPARISON_HEADINGS[1:]]
    names = dict.fromkeys(name for sets in sets_of.values() for name in sets)
    note = _comparison_note([bootstrap_units(study.results[0].set(name).speakers)[0] for name in names])
    return Table(title, header, rows, 5, [note, "Errors of all trainings are summed"])


def no_speech_table(study: Study, name: str) -> Table:
    """Return for how many clips without speech each system wrote text."""
    rows = []
    for system in study.all_systems():
        sets = [result.set(name) for result in study.of(system)]
        rows.append([*study.labels(system), _each(one.texts for one in sets), _each(one.loops for one in sets)])
    number = len(study.results[0].set(name).words)
    clips = "1 clip" if number == 1 else f"{number:,} clips"
    header = [*study.headings(), "clips with text", "more than 10 words"]
    return Table(f"{name}: {clips} without speech", header, rows, len(study.headings()), ["Of each seed"])


def _compared(raw: list[SeedErrors], capped: list[SeedErrors]) -> list[str]:
    """Return the cells of a comparison: difference of the mean error rates and probability of improvement, verdict.

    Args:
        raw, capped: errors of a system and of its baseline.
    """
    cells, interval = [], (0.0, 0.0)
    for ours, theirs in (raw, capped):
        rates = resampled_means([ours, theirs])
        interval = confidence_interval(rates[0] - rates[1])
        value = float(ours.rates.mean() - theirs.rates.mean())
        cells += [with_interval(value, interval, signed=True), f"{probability_of_improvement(rates[0], rates[1]):.3f}"]
    return [*cells, verdict(interval, int(capped[0].words.sum()))]


def _pool(
    study: Study, systems: Iterable[System], sets_of: dict[str, list[str]], capped: bool, seeds: set[int]
) -> SeedErrors:
    """Return the errors of one method in several trainings."""
    results = {system: [result for result in study.of(system) if result.seed in seeds] for system in systems}
    return _summed([(found, name) for system, found in results.items() for name in sets_of[system[2]]], capped)


def _comparison_note(units: Iterable[str]) -> str:
    return COMPARISON_NOTE.format(unit="s or ".join(dict.fromkeys(units)))


def _spread(rates: np.ndarray) -> str:
    text = f"{rates.mean():.1f}"
    return text if len(rates) == 1 else f"{text} ({rates.min():.1f} to {rates.max():.1f})"


def _each(counts: Iterable[int]) -> str:
    return "/".join(map(str, counts))
