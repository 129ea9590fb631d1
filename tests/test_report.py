"""Tests of tools/report.py: the page is complete, well formed and self-contained, and a browser shows it."""

import base64
import io
import json
import math
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from tools.report import (
    COLORS,
    MAX_BARS,
    build_charts,
    class_bars,
    phase_starts,
    read_metrics,
    write_report,
)

SECTIONS = ["Training", "Pseudo-labels", "Class frequencies of pseudo-labels", "Mask AP", "Predictions"]
SECTIONS += ["Configuration", "Commands"]
NAMES = ["image", "ground truth", "teacher", "student"]
PICTURES = [
    [Image.new("RGB", (60, 40), (250 - 40 * row, 30 * column, 200)) for column in range(4)]
    for row in range(2)
]
STEPS = {"teacher": 60, "burnin": 40, "distill": 200, "finetune": 20, "supervised": 280}
CONFIG = {"seed": 0, "init_from": "", "lsj_scale": (0.1, 2.0)}
BANNER = {"command": "python distill.py --ratio 0.02", "started": "2026-11-24 17:30", "device": "a GPU"}
CLASSES = ["circle", "a <b> & c"]


def ap_of(number, large=-1.0):
    per_class = {CLASSES[0]: number + 5, CLASSES[1]: -1.0}
    return dict(AP=number, AP50=number + 20, AP75=number, APs=7.0, APm=number, APl=large, per_class=per_class)


APS = {
    "teacher": ap_of(30.0),
    "labels only": ap_of(33.04),
    "student": ap_of(41.26),
    "EMA teacher": ap_of(41.3),
}


def run_lines():
    """Yield the lines of a whole run with its control: losses every 10 steps, evaluations every 20."""
    yield {"banner": BANNER}
    for phase, steps in STEPS.items():
        for step in range(10, steps + 1, 10):
            losses, pseudo = {"loss": 40 - step / 10}, {}
            if phase in ("burnin", "distill"):
                losses |= {
                    "unlabeled_loss": 30 - step / 20,
                    "pseudo_labels": 2 + step / 400,
                    "mean_score": 0.95,
                }
                pseudo = {
                    "images": 9,
                    "kept": 2.5,
                    "score": 0.9,
                    "precision": 90,
                    "recall": 70,
                    "mask_iou": 80,
                }
                pseudo |= {
                    "classes": {CLASSES[0]: 0.25, CLASSES[1]: 0.75},
                    "labeled_classes": {CLASSES[0]: 1.0},
                }
            yield {"phase": phase, "step": step, **losses, "lr": 1e-4}
            if step % 20 == 0:
                yield {"phase": phase, "step": step, "ap": ap_of(20 + step / 20), "pseudo": pseudo}
    yield {"phase": "distill", "step": 200, "ap": ap_of(41.26), "teacher_ap": ap_of(41.3)}


class Page(HTMLParser):
    """Parse a page. Raises AssertionError for tags that are not closed in order."""

    VOID = {"meta", "img", "input", "br"}

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.ids, self.cells = [], Counter(), Counter(), [[]]
        self.images, self.headings, self.words = [], [], []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in ("th", "td"):
            self.cells[-1].append("")

    def handle_startendtag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags[tag] += 1
        self.ids.update([attributes["id"]] if "id" in attributes else [])
        self.images += [attributes["src"]] if tag == "img" else []
        self.headings += [""] if tag == "h2" else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if "h2" in self.open:
            self.headings[-1] += data
        if {"td", "th"} & set(self.open):
            self.cells[-1][-1] += f"*{data}*" if self.open[-1] == "b" else data


def report(folder, lines=None, aps=APS, pictures=PICTURES, names=NAMES, config=CONFIG, title="a run") -> str:
    """Write the page of a run whose metrics.jsonl has these lines, records or text, and return it."""
    lines = [line if isinstance(line, str) else json.dumps(line) for line in lines or ()]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    write_report(folder / "report.html", title, folder / "metrics.jsonl", aps, pictures, names, config)
    return (folder / "report.html").read_text()


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    """Return the page of a whole run."""
    return report(tmp_path_factory.mktemp("run"), run_lines())


@pytest.fixture
def read(tmp_path):
    """Return read(lines): what read_metrics returns for them."""

    def read(lines):
        (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
        return read_metrics(tmp_path / "metrics.jsonl")

    return read


def test_the_page_has_every_section_curve_and_picture(html):
    page = Page(html)
    assert page.headings == SECTIONS and page.tags["svg"] == 4
    assert "Nothing was recorded" not in html
    pictures = [Image.open(io.BytesIO(base64.b64decode(src.split(",")[1]))) for src in page.images]
    pixels = [np.asarray(picture).tolist() for picture in pictures]
    assert pixels == [np.asarray(picture).tolist() for row in PICTURES for picture in row]
    assert set(NAMES) <= set(page.words)
    assert page.cells[-2:] == [["lsj_scale", "(0.1, 2.0)"], ["seed", "0"]], "sorted, without empty options"
    assert BANNER["command"] in page.words and "2026-11-24 17:30 · a GPU" in page.words


def test_it_loads_nothing_from_elsewhere(html):
    outside = re.sub(r'xmlns(:xlink)?="[^"]*"', "", html)
    assert not re.search(r"http|<script|<link|@import|url\((?!#)", outside)


def test_no_id_is_used_twice_and_none_is_missing(html):
    ids = Page(html).ids
    assert max(ids.values()) == 1
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', html)) <= set(ids)


def test_the_same_run_gives_the_same_bytes(html, tmp_path):
    assert report(tmp_path, run_lines()) == html


def test_the_summary_compares_the_model_that_was_trained_last(html, tmp_path):
    def summary(html):
        return re.sub("<[^>]*>", "", html.split('"lead">')[1].split("</p>")[0])

    assert summary(html) == (
        "21.0 mask AP (fine-tuned), -9.0 compared with teacher (30.0), -12.0 compared with labels only (33.0)"
    )
    lines = [{"phase": "distill", "step": step, "ap": {"AP": ap}} for step, ap in ((10, 31), (20, 28.96))]
    assert summary(report(tmp_path, lines, {"teacher": ap_of(30.0)}, [])) == (
        "29.0 mask AP (student), -1.0 compared with teacher (30.0); highest during training: 31.0"
    )
    assert summary(report(tmp_path, [], {}, [])) == "No AP was recorded."


def test_the_table_has_every_number_and_the_best_of_a_row_in_bold(html):
    cells = Page(html).cells
    assert cells[1:8] == [
        ["", *APS],
        ["AP", "30.0", "33.0", "*41.3*", "*41.3*"],  # equal after rounding
        ["AP50", "50.0", "53.0", "*61.3*", "*61.3*"],
        ["AP75", "30.0", "33.0", "*41.3*", "*41.3*"],
        ["APs, small", *["*7.0*"] * 4],
        ["APm, medium", "30.0", "33.0", "*41.3*", "*41.3*"],
        ["APl, large", *"----"],
    ]
    assert cells[8:11] == [["", *APS], ["circle", "35.0", "38.0", "*46.3*", "*46.3*"], [CLASSES[1], *"----"]]


def test_many_classes_are_folded_and_a_model_without_ap_keeps_its_column(html, tmp_path):
    assert "<details open><summary>AP by class" in html
    many = {"student": ap_of(40.0) | {"per_class": dict.fromkeys(map(str, range(80)), 1.0)}, "other": {}}
    html = report(tmp_path, [], many, [])
    assert "<details><summary>AP by class" in html
    assert ["79", "*1.0*", "-"] in Page(html).cells


def test_text_is_escaped(tmp_path):
    bad = "<b>&\"'</b><script>x</script>"
    aps = {bad: ap_of(1.0) | {"per_class": {bad: 1.0}, bad: 1.0}}
    pseudo = {"classes": {bad: 1.0}, "labeled_classes": {bad: 1.0}}
    lines = [{"banner": {"command": bad, "device": bad}}, {"phase": "burnin", "step": 1, "pseudo": pseudo}]
    page = Page(report(tmp_path, lines, aps, [PICTURES[0][:1]], [bad], {bad: bad}, title=bad))
    assert page.tags["script"] == 0
    assert page.words.count(bad) == 13


def test_the_bars_show_the_classes_that_differ_most():
    pseudo = {f"class {k}": k / 1000 for k in range(30)}
    labeled = {f"class {k}": 0.002 for k in range(30)} | {"unseen": math.nan}
    page = Page(class_bars({"classes": pseudo, "labeled_classes": labeled}))
    shown = [word for word in page.words if word.startswith("class ")]
    assert shown == [f"class {k}" for k in range(29, 29 - MAX_BARS, -1)]
    assert "2.9 %" in page.words and "0.2 %" in page.words


def test_the_last_line_of_a_repeated_step_counts_and_a_cut_line_is_skipped(read):
    lines = [{"phase": "teacher", "step": step, "loss": 5.0} for step in (10, 20, 30)]
    lines += [{"phase": "teacher", "step": 20, "ap": {"AP": 1.0}}, {"banner": {"command": "again"}}]
    lines += [{"phase": "teacher", "step": step, "loss": 4.0} for step in (20, 30)]
    lines += [{"phase": "teacher", "step": 20, "ap": {"AP": 2.0}}]
    lines = [*map(json.dumps, lines), '{"phase": "teacher", "step": 40, "lo']
    banners, phases = read(lines[:3] + [lines[-1]] + lines[3:])
    assert banners == [{"command": "again"}]
    assert {step: record["loss"] for step, record in phases["teacher"].items()} == {10: 5.0, 20: 4.0, 30: 4.0}
    assert phases["teacher"][20]["ap"] == {"AP": 2.0}


def test_phases_follow_one_another_and_the_control_starts_at_zero(read):
    _, phases = read(map(json.dumps, run_lines()))
    starts, total = phase_starts(phases)
    assert starts == {"teacher": 0, "burnin": 60, "distill": 100, "finetune": 300} and total == 320
    charts = build_charts(phases, APS, starts, total)
    loss = {curve.label: curve.points for curve in charts["Loss"][""]}
    assert loss["teacher"][0] == (10, 39) and loss["burnt-in"][0] == (70, 39)
    assert loss["student"][-1] == (300, 20) and loss["student, on pseudo-labels"][-1] == (300, 20)
    assert loss["labels only"][0] == (10, 39) and loss["labels only"][-1] == (280, 12)
    ap = {curve.label: curve.points for curve in charts["Mask AP"][""]}
    assert ap["student"][-1] == (300, 41.26) and ap["EMA teacher"] == [(300, 41.3)]
    assert ap["final teacher"] == [(60, 30.0), (320, 30.0)] and ap["fine-tuned"] == [(320, 21)]


def test_a_given_teacher_has_no_phase(read):
    lines = [json.dumps(line) for line in run_lines() if line.get("phase") in ("burnin", "distill")]
    phases = read(lines)[1]
    starts, total = phase_starts(phases)
    assert starts == {"burnin": 0, "distill": 40} and total == 240
    ap = {curve.label: curve.points for curve in build_charts(phases, APS, starts, total)["Mask AP"][""]}
    assert ap["teacher"] == [] and ap["final teacher"] == [(0, 30.0), (240, 30.0)]


UNUSUAL = {
    "empty": [],
    "blank lines": ["", "", "\0"],
    "only a banner": [{"banner": {}}],
    "only the teacher": [line for line in run_lines() if line.get("phase") == "teacher"],
    "only the control": [line for line in run_lines() if line.get("phase") == "supervised"],
    "one step": [{"phase": "distill", "step": 1, "loss": 3.0, "unlabeled_loss": 0.0}],
    "just started": [*run_lines()][:16] + [{"phase": "distill", "step": 1, "loss": 3.0}],
    "NaN and infinite": [
        {"phase": "distill", "step": 1, "loss": math.nan, "unlabeled_loss": math.inf, "mean_score": None},
        {
            "phase": "distill",
            "step": 1,
            "ap": {"AP": math.nan},
            "pseudo": {"images": 0, "precision": math.nan},
        },
    ],
    "no validation": [{"phase": "distill", "step": 1, "ap": {}, "teacher_ap": None, "pseudo": {"images": 3}}],
    "cut off": [*map(json.dumps, run_lines()), '{"phase": "distill", "step": 20'],
}


@pytest.mark.parametrize("lines", UNUSUAL.values(), ids=UNUSUAL)
def test_any_metrics_give_a_page(tmp_path, lines):
    html = report(
        tmp_path, lines, aps={"student": {"AP": math.nan, "AP50": math.inf}}, pictures=[], config={}
    )
    assert Page(html).headings == SECTIONS
    assert not re.search(r"\bnan\b|\binf\b|None", html.split("</style>", 1)[1])


# ----------------------------------------------------------------------------------------------- in a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHECK = """<style>.key i, .lead i, th i { visibility: hidden }</style>
<script>onload = () => {
  for (const image of document.images) if (!image.naturalWidth) console.error("not shown: " + image.alt)
}</script>"""


def browser_problems(html, folder) -> list[str]:
    """Open the page in a browser. Returns the lines of its console, images that it cannot show, and the
    colors of curves, bars and pictures that are missing on its screenshot. Legends are hidden, because they
    have the same colors."""
    (folder / "page.html").write_text(html.replace("</body>", f"{CHECK}</body>"))
    flags = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --force-color-profile=srgb"
    flags += " --enable-logging=stderr --v=0 --virtual-time-budget=2000 --window-size=1200,3000"
    files = [f"--user-data-dir={folder / 'profile'}", f"--screenshot={folder / 'page.png'}"]
    command = [CHROMIUM, *flags.split(), *files, f"file://{folder / 'page.html'}"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60)
    found = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    pixels = Image.open(folder / "page.png").convert("RGB")
    counts = {color: count for count, color in pixels.getcolors(pixels.width * pixels.height)}
    for name, (light, _) in COLORS.items():
        if counts.get(tuple(bytes.fromhex(light[1:])), 0) < 5:
            found.append(f"missing: {name}")
    for picture in (picture for row in PICTURES for picture in row):
        if counts.get(picture.getpixel((0, 0)), 0) < 10_000:
            found.append(f"missing: {picture.getpixel((0, 0))}")
    return found


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium")
def test_a_browser_shows_the_whole_page(html, tmp_path):
    assert browser_problems(html, tmp_path) == []


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium")
def test_planted_problems_of_a_page_are_found(html, tmp_path):
    html = re.sub(r'base64,[^"]{60}', "base64,", html, count=1)
    html = re.sub("<svg.*?</svg>", "", html, flags=re.DOTALL)
    found = browser_problems(
        html.replace("</body>", "<script>throw Error('planted')</script></body>"), tmp_path
    )
    for expected in ("planted", "not shown: image, 1", f"missing: {PICTURES[0][0].getpixel((0, 0))}"):
        assert any(expected in problem for problem in found)
    curves = (
        "teacher",
        "burnt-in",
        "student",
        "EMA teacher",
        "labels only",
        "precision",
        "recall",
        "mask IoU",
    )
    assert {f"missing: {name}" for name in curves} <= set(found)
