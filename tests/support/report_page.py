"""Results and manifests for the tests of the HTML report, and a parser of the page."""

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path

from manifests import SETTINGS

from askd_hf.data.json_files import write_json
from askd_hf.evaluation import report
from askd_hf.evaluation.results import (
    EvaluatedModel,
    ModelSpeed,
    PairedComparison,
    Results,
    Scores,
    SetResult,
    Speculative,
    Speed,
    Timing,
)

VOID = {"br", "hr", "img", "input", "link", "meta"}
MAY_STAND_ALONE = {"circle", "line", "path", "rect", "use"}  # self-closing SVG elements
HOSTILE = '<script>alert("x")</script><img src=https://evil.example/a.png onerror=alert(1)>{{ 7 * 7 }}'


class Element:
    def __init__(self, tag: str, attributes: dict[str, str | None], parent: "Element | None"):
        self.tag, self.attributes, self.parent = tag, attributes, parent
        self.children: list[Element | str] = []

    def __getitem__(self, name: str) -> str:
        return self.attributes[name]

    def all(self, tag: str, cls: str | None = None) -> list["Element"]:
        """Return all descendants with this tag and class, in document order."""
        found = []
        for child in self.children:
            if isinstance(child, Element):
                if child.tag == tag and (cls is None or cls in (child.attributes.get("class") or "").split()):
                    found.append(child)
                found += child.all(tag, cls)
        return found

    def by_id(self, name: str) -> "Element | None":
        for child in self.children:
            if isinstance(child, Element):
                if child.attributes.get("id") == name:
                    return child
                if found := child.by_id(name):
                    return found
        return None

    @property
    def text(self) -> str:
        texts = [child if isinstance(child, str) else child.text for child in self.children]
        return re.sub(r"\s+", " ", "".join(texts)).strip()


class Page(HTMLParser):
    """Parse a page into a tree; assert that all elements are closed correctly."""

    def __init__(self, html: str):
        super().__init__()
        self.root = self.here = Element("", {}, None)
        self.feed(html)
        self.close()
        assert self.here is self.root, f"<{self.here.tag}> is never closed"

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"<{tag}> has an attribute twice"
        element = Element(tag, dict(attrs), self.here)
        self.here.children.append(element)
        if tag not in VOID:
            self.here = element

    def handle_startendtag(self, tag, attrs):
        assert tag in MAY_STAND_ALONE, f"<{tag}/>"
        self.here.children.append(Element(tag, dict(attrs), self.here))

    def handle_endtag(self, tag):
        assert self.here.tag == tag, f"</{tag}> closes <{self.here.tag}>"
        self.here = self.here.parent

    def handle_data(self, data):
        self.here.children.append(data)


def scores(wer: float | None, **changes) -> Scores:
    spoken = wer is not None
    defaults = dict(
        wer=wer,
        wer_confidence_interval=(wer - 1.5, wer + 2.25) if spoken else None,
        cer=wer / 3 if spoken else None,
        cer_confidence_interval=(wer / 3 - 0.5, wer / 3 + 0.75) if spoken else None,
        substitutions=61,
        deletions=22,
        insertions=13,
        insertion_rate=1.234 if spoken else None,
        repeated_5grams=0.567,
        capped_wer=13.21 if spoken else None,
        loops=2 if spoken else 0,
    )
    return Scores(**defaults | changes)


def speech_set(name: str = "librispeech-test-other", **changes) -> SetResult:
    defaults = dict(
        name=name,
        dataset="openslr/librispeech_asr",
        config="other",
        split="test",
        language="en",
        method="short_form",
        normalizer="english",
        clips=1234,
        excluded={"reference empty after normalization": 3, "ignore time segment in scoring": 2},
        hours=5.432,
        reference_words=4321,
        has_speech=True,
        bootstrap_unit="speaker",
        scores={
            "student": scores(14.234, wer_by_speaker={"1688": 20.5, "367": 9.25, "2033": 41.75}),
            "teacher": scores(12.012, substitutions=50, wer_by_speaker={"1688": 18.5, "367": 8.0, "2033": 33.0}),
        },
        comparison=PairedComparison("student", "teacher", 2.222, (1.111, 3.333), 0.012),
    )
    return SetResult(**defaults | changes)


def silent_set() -> SetResult:
    return speech_set(
        "nonspeech",
        dataset="noises",
        config=None,
        clips=80,
        reference_words=0,
        has_speech=False,
        no_speech_clips=80,
        excluded={},
        scores={
            "student": scores(None, no_speech_hallucinations=34),
            "teacher": scores(None, no_speech_hallucinations=20),
        },
        comparison=None,
    )


def speed_row(role: str, batch_size: int, rtfx: float, speedup: float | None) -> ModelSpeed:
    encoder, decoder = Timing(4.125, 4.0, 4.25), Timing(3.5 * batch_size, 3.25, 60.0)
    total = Timing(encoder.median + decoder.median, 7.0, 64.0)
    return ModelSpeed(role, batch_size, encoder, decoder, total, 0.4321, rtfx, 2345, 987.6, speedup)


def results(**changes) -> Results:
    defaults = dict(
        models={
            "student": EvaluatedModel("runs/tiny-2-askd", 29_502_720, 118.04, 4, 2),
            "teacher": EvaluatedModel("openai/whisper-tiny.en", 37_760_256, None, 4, 4),
        },
        settings={
            "date": "2026-11-23",
            "device": "cpu",
            "dtype": "float32",
            "num_beams": 1,
            "versions": {"torch": "2.13"},
        },
        sets=[speech_set(), silent_set()],
        speed=Speed(
            "librispeech-test-other",
            20,
            187.65,
            5,
            "cpu",
            "float32",
            2,
            "sdpa",
            [
                speed_row("student", 1, 33.25, 1.875),
                speed_row("student", 8, 61.5, 2.125),
                speed_row("teacher", 1, 17.75, None),
                speed_row("teacher", 8, 29.0, None),
            ],
        ),
        speculative=Speculative(
            "librispeech-test-other",
            40,
            39,
            0.7125,
            1.375,
            Timing(20, 19, 22),
            Timing(15, 14, 17),
            differing=["a.wav", "b.wav"],
        ),
    )
    return Results(**defaults | changes)


def one_model() -> Results:
    alone = copy.deepcopy(results(speculative=None))
    del alone.models["teacher"]
    for entry in alone.sets:
        del entry.scores["teacher"]
        entry.comparison = None
    alone.speed.rows = [row for row in alone.speed.rows if row.role == "student"]
    for row in alone.speed.rows:
        row.speedup = None
    return alone


def write_manifest(folder: Path, role: str, name: str, rows: list[tuple], speaker: str | None = None) -> None:
    file = folder / "manifests" / role / f"{name}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for clip, reference, prediction in rows:
        row = dict(clip=clip, reference=reference, prediction=prediction, duration=4.2, transcription_time=0.1)
        lines.append(json.dumps(row | ({"speaker": speaker} if speaker else {}), ensure_ascii=False) + "\n")
    file.write_text("".join(lines), encoding="utf-8")
    write_json(file.with_name(f"{name}.json"), SETTINGS)


def render(found: Results, folder: Path) -> tuple[Element, str]:
    path = report.write_report(found, folder)
    assert path == folder / "report.html"
    html = path.read_text(encoding="utf-8")
    return Page(html).root, html


def rows_of(table: Element) -> list[list[str]]:
    return [[cell.text for cell in row.children if isinstance(cell, Element)] for row in table.all("tr")]


def lines_of(article: Element) -> list[list[tuple[str, str]]]:
    """Return the lines of the reference and the models as (tag, word), without the marks of skipped words."""
    columns = [
        span.children for span in article.all("div", "words")[0].all("span") if span.attributes.get("class") != "cut"
    ]
    columns = [[child for child in column if isinstance(child, Element)] for column in columns]
    return [[(cell.tag, cell.text) for cell in line] for line in zip(*columns, strict=True)]
