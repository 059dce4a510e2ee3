"""The HTML report of a real evaluation in Chromium. `make test-browser` runs it."""

import json
import os
import re
import shutil

import jiwer
import pytest
import torch
from scripts import ROOT
from transformers import WhisperForConditionalGeneration
from transformers.models.whisper.english_normalizer import BasicTextNormalizer

from askd_hf.commands.evaluate import main
from askd_hf.evaluation import Results
from askd_hf.models.loading import load_processor

pytestmark = pytest.mark.browser

DEMO = ROOT / "examples" / "demo"
NARROW, WIDE = dict(width=400, height=800), dict(width=1200, height=900)
LEAST_CONTRAST = 4.5  # WCAG 2, level AA, text of normal size

# the text elements of the page that can be seen: [the text, its color, the backgrounds from the nearest one outward]
COLORS = """() => {
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.data.trim(), element = walker.currentNode.parentElement;
    if (!text || element.closest("script, title") || !element.checkVisibility({visibilityProperty: true})) continue;
    const style = getComputedStyle(element), drawn = element instanceof SVGElement, grounds = [];
    if (element.matches(".part-label")) grounds.push(getComputedStyle(element.previousElementSibling).fill);
    for (let box = element; box; box = box.parentElement) grounds.push(getComputedStyle(box).backgroundColor);
    found.push([text, drawn ? style.fill : style.color, grounds]);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An evaluation of the demo's teacher, and of a student with other errors: the teacher with noise added."""
    directory = tmp_path_factory.mktemp("evaluation")
    student = WhisperForConditionalGeneration.from_pretrained(DEMO / "teacher")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weights in student.model.decoder.layers.parameters():
            if weights.dim() > 1:
                weights += weights.std() * torch.randn(weights.shape, generator=generator)
    student.save_pretrained(directory / "student")
    load_processor(str(DEMO / "teacher")).save_pretrained(directory / "student")
    command = f"--model {directory / 'student'} --teacher {DEMO / 'teacher'} --dataset {DEMO / 'data'} --device cpu"
    command += f" --eval_splits calls studio --max_eval_samples 30 --normalizer basic --output_dir {directory / 'out'}"
    command += " --n_resamples 200 --speed True --speed_clips 2 --speed_batch_sizes 1 2 --repetitions 1"
    main(command.split())
    return directory / "out"


@pytest.fixture(scope="module")
def browser(folder):
    from playwright.sync_api import sync_playwright

    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if path is None:
        pytest.fail(
            "Chromium is needed, such as Debian's package chromium; or set CHROMIUM to its path", pytrace=False
        )
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=path) as started:
        yield started


@pytest.fixture
def open_report(browser, folder):
    """Open the page without a network. Afterwards there must be no message in its console, and no request."""
    contexts, problems = [], []

    def note(request) -> None:
        if request.url.partition("#")[0] != address and not request.url.startswith("data:"):
            problems.append(request.url)

    def load(viewport: dict[str, int], scheme: str = "light"):
        context = browser.new_context(viewport=viewport, color_scheme=scheme, offline=True)
        contexts.append(context)
        context.set_default_timeout(10_000)
        page = context.new_page()
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", note)
        page.goto(address)
        closed = page.locator("details:not([open]) > summary")
        while closed.count():
            closed.first.click()
        return page

    address = (folder / "report.html").as_uri()
    yield load
    for context in contexts:
        context.close()
    assert problems == []


def cells(table) -> list[list[str]]:
    """Return the text of each row of the table's body; in a column of joined cells each row has the text."""
    return table.evaluate("""table => [...table.tBodies].flatMap(body => [...body.rows].map(row => [
      ...(row.cells.length < table.tHead.rows[0].cells.length ? [body.rows[0].cells[0]] : []), ...row.cells,
    ].map(cell => cell.innerText.trim())))""")


def number(text: str) -> float | None:
    """Return the first number in a cell, None if there is none."""
    found = re.search(r"[−-]?[\d,]*\.?\d+", text)
    return float(found[0].replace(",", "").replace("−", "-")) if found else None


def differences(folder, name: str) -> dict[str, tuple[int, int]]:
    """Return the word errors of student and teacher by clip, from the manifests."""
    normalize, errors = BasicTextNormalizer(), {}
    for role in ("student", "teacher"):
        for line in (folder / "manifests" / role / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            found = jiwer.process_words(normalize(row["reference"]), normalize(row["prediction"]))
            errors[row["clip"]] = (
                *errors.get(row["clip"], ()),
                found.substitutions + found.deletions + found.insertions,
            )
    return errors


def test_the_clips_are_those_that_differ_in_both_directions(open_report, folder):
    page = open_report(WIDE)
    shown, expected = [], []
    for entry in Results.load(folder / "results.json").sets:
        errors = differences(folder, entry.name)
        worse = {clip: student - teacher for clip, (student, teacher) in errors.items()}
        for direction in (1, -1):
            expected.append({clip: errors[clip] for clip in worse if direction * worse[clip] > 0})
    assert [len(clips) > 0 for clips in expected] == [
        True,
        True,
        True,
        False,
    ]  # the teacher's studio speech is perfect
    expected.pop()
    for details in page.locator("#clips details").all():
        clips = {}
        for article in details.locator("article").all():
            header = article.locator("header").inner_text().replace("−", "-")
            difference, clip, student, teacher = re.search(
                r"([+-]\d+) errors?\s+([^,]+),.* student (\d+) error.* teacher (\d+) error", header, re.DOTALL
            ).groups()
            clips[clip] = int(student), int(teacher)
            assert int(difference) == int(student) - int(teacher)
        sizes = [abs(student - teacher) for student, teacher in clips.values()]
        assert sizes == sorted(sizes, reverse=True)
        shown.append(clips)
    assert shown == expected and all(0 < len(clips) <= 20 for clips in shown)


def test_each_clip_can_be_heard(open_report):
    page = open_report(WIDE)
    written = [float(re.search(r"([\d.]+) s,", text)[1]) for text in page.locator("article header").all_inner_texts()]
    loaded = page.evaluate("""() => Promise.all([...document.querySelectorAll("article audio")].map(async audio => {
      const ended = new Promise(done => { audio.oncanplay = audio.onerror = done; setTimeout(done, 10_000); });
      audio.preload = "auto";
      audio.load();
      await ended;
      return [audio.readyState, audio.duration];
    }))""")
    assert len(loaded) == len(written) > 10 and all(state >= 3 for state, _ in loaded)
    assert [duration for _, duration in loaded] == pytest.approx(written, abs=0.1)


def test_one_clip_plays_at_a_time(open_report):
    page = open_report(WIDE)
    for details in page.locator("#clips details").all():
        for player in details.locator("audio").all()[:2]:
            player.scroll_into_view_if_needed()
            player.evaluate("audio => { audio.loop = true; }")  # it does not end before the next one begins
            player.click(position=dict(x=20, y=19))  # on the button of Chromium's player
            page.wait_for_function("audio => audio.currentTime > 0", arg=player.element_handle())
            assert not player.evaluate("audio => audio.paused")
            assert page.evaluate("[...document.querySelectorAll('audio')].filter(audio => !audio.paused).length") == 1


def test_headings_sort_their_table(open_report):
    page = open_report(WIDE)
    tables = page.locator("table:has(thead)").all()
    assert len(tables) >= 7
    changed = 0
    for table in tables:
        before = cells(table)
        for column, heading in enumerate(table.locator("thead th").all()):
            text = column == 0 or "left" in (heading.get_attribute("class") or "")
            button = heading.locator("button")
            presses = {"ascending": button.click, "descending": lambda button=button: button.press("Enter")}
            for order, press in presses.items():
                press()
                after = cells(table)
                assert heading.get_attribute("aria-sort") == order and table.locator("[aria-sort]").count() == 1
                assert sorted(after) == sorted(before)
                changed += after != before
                keys = [row[column] for row in after] if text else [number(row[column]) for row in after]
                filled = [key for key in keys if key not in (None, "")]
                assert keys == filled + keys[len(filled) :]  # empty cells are last
                assert filled == sorted(filled, reverse=order == "descending")
    assert changed > len(tables)


def test_word_error_rates_sort_as_numbers_across_sets(open_report, folder):
    page = open_report(WIDE)
    table = page.locator("#wer table")
    found = Results.load(folder / "results.json")
    rates = [(scores.wer, entry.name, role) for entry in found.sets for role, scores in entry.scores.items()]
    assert len({len(f"{rate:.2f}") for rate, *_ in rates}) == 2  # as text, 20.21 would be before 4.44
    table.get_by_role("button", name="WER").click()
    shown = [[row[0].splitlines()[0], *row[1:3]] for row in cells(table)]
    assert shown == [[name, role, f"{rate:.2f}"] for rate, name, role in sorted(rates)]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_page_does_not_scroll_sideways(open_report, scheme):
    page = open_report(NARROW, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= NARROW["width"]
    for heading in page.locator("#wer thead button").all():  # sorted, a row is wider than in a group
        heading.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= NARROW["width"]
    wide = page.locator("#wer .table")
    assert wide.evaluate("box => [box.scrollWidth > box.clientWidth, (box.scrollLeft = 1e6, box.scrollLeft) > 0]") == [
        *(True, True),
    ]
    for player in page.locator("audio").all():
        box = player.bounding_box()
        assert box["width"] > 250 and box["x"] >= 0 and box["x"] + box["width"] <= NARROW["width"]


def rgba(color: str) -> tuple[float, float, float, float]:
    red, green, blue, *alpha = map(float, re.findall(r"[\d.]+", color))
    return red, green, blue, alpha[0] if alpha else 1.0


def luminance(color: tuple[float, ...]) -> float:
    """Return the relative luminance of WCAG 2."""
    channels = [c / 255 for c in color]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(color: str, grounds: list[str]) -> float:
    """Return the contrast of an opaque color to its background."""
    *ink, opacity = rgba(color)
    assert opacity == 1
    *paper, opacity = next(ground for ground in map(rgba, grounds) if ground[3])
    assert opacity == 1
    low, high = sorted((luminance(ink), luminance(paper)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [NARROW, WIDE], ids=["narrow", "wide"])
def test_all_text_is_legible(open_report, scheme, viewport):
    page = open_report(viewport, scheme)
    found = page.evaluate(COLORS)
    assert len(found) > 500
    *paper, _ = rgba(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert (luminance(paper) < 0.05) == (scheme == "dark")
    faint = {(text, round(value, 2)) for text, *colors in found if (value := contrast(*colors)) < LEAST_CONTRAST}
    assert not faint
