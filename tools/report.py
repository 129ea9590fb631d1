"""The report of a run: one HTML file with its curves, pseudo-labels, AP, pictures, options and commands. It
loads nothing from elsewhere.

distill.py writes it at the end of a run. For other results:

    write_report("report.html", "shapes, 2 % labeled", "runs/shapes-0.02/metrics.jsonl",
                 aps={"teacher": ap, "student": ap}, pictures=[[image, truth, prediction]],
                 picture_names=["image", "ground truth", "student"], config=dataclasses.asdict(cfg))"""

import base64
import dataclasses
import io
import json
import math
import re
from html import escape
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from evaluate import ap_table, compare_predictions
from training.checkpoint import (
    load_checkpoint,
    load_model,
    load_student_checkpoint,
    load_teacher_checkpoint,
)
from training.cli import expected_errors
from training.config import Config
from training.distributed import warn_once
from training.run_data import Data
from training.setup import model_arguments
from training.visualize import make_grid

try:  # optional: a run without matplotlib ends without a report
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
except ImportError:
    matplotlib = None

AP_COLUMNS = ("teacher", "labels only", "burnt-in", "student", "EMA teacher", "fine-tuned")
# Consecutive phases, and the model that each phase trains. "supervised" is the control beside them.
PHASE_NAMES = {"teacher": "teacher burn-in", "burnin": "guided burn-in", "distill": "distillation"}
PHASE_NAMES |= {"finetune": "fine-tuning"}
MODEL_NAMES = {"teacher": "teacher", "burnin": "burnt-in", "distill": "student", "finetune": "fine-tuned"}
MODEL_NAMES |= {"supervised": "labels only"}
SIZE_NAMES = {"APs": "APs, small", "APm": "APm, medium", "APl": "APl, large"}
SVG_METADATA = dict.fromkeys(["Creator", "Date", "Format", "Type"])  # None leaves out URIs and the time
MAX_BARS = 20  # classes in the bar chart
MAX_OPEN_ROWS = 12  # classes in the AP table that are shown without a click


# One color for one thing on the whole page, on white and on black. The palettes of Okabe and Ito and of Paul
# Tol are distinct for color-blind readers.
COLORS = {
    "teacher": ("#d55e00", "#ff9350"),
    "burnt-in": ("#56b4e9", "#9bd7f9"),
    "student": ("#0072b2", "#4aa3e8"),
    "EMA teacher": ("#009e73", "#3ccfa3"),
    "fine-tuned": ("#8c510a", "#d9a066"),
    "labels only": ("#cc79a7", "#e9a3c9"),
    "pseudo-labels": ("#e69f00", "#f3bd45"),
    "labeled images": ("#8a929c", "#8b949f"),
    "precision": ("#332288", "#a99bf5"),
    "recall": ("#999933", "#cdcd62"),
    "mask IoU": ("#882255", "#e0709f"),
    "ink": ("#1f2328", "#e4e7eb"),
    "muted": ("#646c76", "#9aa3ae"),
    "rule": ("#dfe3e8", "#343a42"),
    "paper": ("#ffffff", "#15181c"),
}
CSS = """
body { max-width: 1080px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; font: 16px/1.5 system-ui, sans-serif;
  color: var(--ink); background: var(--paper) }
h1 { margin: 0; font-size: 1.7rem; line-height: 1.25; overflow-wrap: anywhere }
h2 { margin: 2.5rem 0 0; padding-top: .6rem; border-top: 1px solid var(--rule); font-size: 1.15rem }
.lead { margin: .5rem 0 0; font-size: 1.1rem }
.key, th, summary, .row > span { color: var(--muted); font-weight: normal }
section { display: grid; gap: 1rem 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)) }
section > :not(figure) { grid-column: 1 / -1; min-width: 0; margin-bottom: 0 }
figure { margin: 0; min-width: 0; display: flex; flex-direction: column; justify-content: space-between }
figcaption b { font-weight: 600 }
.key { margin: 0; font-size: .85rem }
.key span { display: inline-block; margin-right: 1em }
i { display: inline-block; width: 1.4em; margin-right: .4em; vertical-align: .25em }
i.dot { width: .6em; height: .6em; vertical-align: 0; border-radius: 50% }
svg { display: block; width: 100%; height: auto; overflow: visible }
svg text { font-family: inherit !important }
.bars { columns: 2 22rem; column-gap: 2rem; font-size: .85rem; line-height: 1.2 }
.bars div { display: grid; grid-template-columns: 8rem 1fr; align-items: center; gap: .8rem;
  padding: .3rem 0; break-inside: avoid }
.bars p { margin: 0 }
.bars b { font-weight: normal; text-align: right; overflow-wrap: anywhere }
.bars span { display: flex; align-items: center; font-size: .75rem; white-space: nowrap }
.bars i { height: .7rem; border-radius: 0 2px 2px 0 }
.scroll { overflow-x: auto; font-size: .95rem }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--rule); text-align: right }
th:first-child { position: sticky; left: 0; padding-left: 0; text-align: left; background: var(--paper) }
.scroll table { table-layout: fixed }
.scroll th { vertical-align: bottom }
.scroll th:first-child { width: 7rem; overflow-wrap: anywhere }
.config { display: block; columns: 3 18rem; column-gap: 2rem; font-size: .85rem }
.config tr { display: grid; grid-template-columns: 10rem 1fr; break-inside: avoid }
.config td { text-align: left; overflow-wrap: anywhere }
summary { padding: .6rem 0; cursor: pointer }
.row { display: grid; gap: .5rem; font-size: .85rem }
img { display: block; width: 100%; border-radius: 3px }
label { position: relative; cursor: zoom-in }
label:has(:checked) { grid-column: 1 / -1; cursor: zoom-out }
label:has(:focus-visible) { outline: 2px solid var(--student) }
label span { display: none; color: var(--muted) }
label input { position: absolute; opacity: 0 }
code { font: .85rem/1.6 ui-monospace, monospace; color: var(--ink); overflow-wrap: anywhere }
ol { padding-left: 1.4rem; font-size: .85rem; color: var(--muted) }
@media (max-width: 40rem) {
  .row { grid-template-columns: 1fr 1fr !important }
  .row > span { display: none }
  label span { display: inline }
}
"""


class Curve(NamedTuple):
    """A curve of a chart: its label in the legend, its color (a key of COLORS), matplotlib's format, and
    points (step, value), where steps count from the start of the first phase."""

    label: str
    color: str
    format: str
    points: list[tuple[int, float]]


def report_run(cfg: Config, data: Data) -> None:
    """Print the AP table of all phases, and write predictions.png and report.html to the run's folder.

    It runs on one rank after the last phase. Exits with one line if a checkpoint is missing. Raises OSError
    if a file cannot be written."""
    out = Path(cfg.out)
    with expected_errors():
        phases = load_phases(cfg, data)
    last = "fine-tuned" if "fine-tuned" in phases else "student"
    aps = {name: checkpoint.get("ap") for name, checkpoint in phases.items()}
    aps["EMA teacher"] = phases["student"].get("teacher_ap")
    for name, path in (("teacher", cfg.teacher_checkpoint), ("burnt-in", cfg.student_checkpoint)):
        if path:
            aps.pop(name, None)  # it may have been measured on other images
    aps = {name: aps[name] for name in AP_COLUMNS if aps.get(name)}
    if aps:
        print(f"\nmask AP on {len(data.val)} images, after training with {len(data.labeled)} labeled ones\n")
        print(ap_table(aps, by_class=data.num_classes <= 10))

    first = "burnt-in" if cfg.student_checkpoint else "teacher"
    models = {name: load_model(phases[name], data.env.device) for name in (first, last)}
    pictures = compare_predictions(models, data.val, **data.test_settings)
    picture_names = ["image", "ground truth", *models]
    make_grid(pictures, picture_names).save(out / "predictions.png")
    print(f"\npicture: {out / 'predictions.png'}")
    if matplotlib is None:
        return warn_once("cannot write report.html: matplotlib is missing; pip install matplotlib")
    title = f"Guided Distillation: {cfg.data}, {len(data.labeled)} labeled images"
    config = dataclasses.asdict(cfg)
    write_report(out / "report.html", title, out / "metrics.jsonl", aps, pictures, picture_names, config)
    print(f"curves, tables and pictures: {out / 'report.html'}")


def load_phases(cfg: Config, data: Data) -> dict[str, dict]:
    """Return the checkpoints of a finished run as {name of the trained model: checkpoint}. Raises ValueError
    or OSError for one that is missing or cannot be read."""
    out, class_names, phases = Path(cfg.out), data.train.class_names, {}
    if not cfg.student_checkpoint:
        phases["teacher"] = load_teacher_checkpoint(cfg, class_names)
    phases["burnt-in"] = load_student_checkpoint(cfg, class_names, model_arguments(cfg, data))
    phases["student"] = load_checkpoint(out / "distill.pt")
    for phase in ("supervised", "finetune"):
        if (out / f"{phase}.pt").exists():
            phases[MODEL_NAMES[phase]] = load_checkpoint(out / f"{phase}.pt")
    return phases


def write_report(
    path, title: str, metrics_file, aps: dict, pictures: list[list], picture_names: list[str], config: dict
) -> None:
    """Write the page to a path.

    Args:
        metrics_file: the metrics.jsonl of a run, with any of its phases.
        aps: {name of a model: what evaluate.evaluate returns, or {}}.
        pictures: one row per image, with one picture for each of picture_names.
        config: the options of the run."""
    banners, phases = read_metrics(metrics_file)
    starts, total = phase_starts(phases)
    charts = build_charts(phases, aps, starts, total)
    figures = [draw_chart(name, chart, starts, total) for name, chart in charts.items()]
    records = [record for phase in ("burnin", "distill") for record in phases.get(phase, {}).values()]
    qualities = [record["pseudo"] for record in records if record.get("pseudo")]
    sections = {
        "Training": "".join(figures[:2]),
        "Pseudo-labels": "".join(figures[2:]),
        "Class frequencies of pseudo-labels": class_bars(qualities[-1]) if qualities else "",
        "Mask AP": ap_tables(aps),
        "Predictions": picture_rows(pictures, picture_names),
        "Configuration": option_table(config),
        "Commands": command_list(banners),
    }
    body = "".join(
        f"<section><h2>{name}</h2>\n{content or 'Nothing was recorded.'}</section>\n"
        for name, content in sections.items()
    )
    light, dark = (" ".join(f"--{slug(n)}: {pair[k]};" for n, pair in COLORS.items()) for k in (0, 1))
    html = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root {{ color-scheme: light dark; {light} }}
@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}{CSS}</style></head>
<body><h1>{escape(title)}</h1>
<p class="lead">{summary(charts["Mask AP"][""], aps)}</p>
{body}</body>
</html>
"""
    Path(path).write_text(html, encoding="utf-8")


def read_metrics(file) -> tuple[list[dict], dict[str, dict[int, dict]]]:
    """Read a metrics.jsonl. Returns its banners and {phase: {step: record}} with ascending steps.

    If a resumed run repeated a step, its last record counts. A line that a killed run left incomplete is
    skipped."""
    banners, phases = [], {}
    for line in Path(file).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if "banner" in record:
            banners.append(record["banner"])
        elif record.get("phase") in MODEL_NAMES:  # losses and evaluations of a step are separate lines
            phases.setdefault(record["phase"], {}).setdefault(record["step"], {}).update(record)
    return banners, {phase: dict(sorted(records.items())) for phase, records in phases.items()}


def get_number(record: dict | None, *keys) -> float | None:
    """Return record[keys[0]][keys[1]]..., or None if it is missing, not finite, or negative. An AP is
    negative if there is no object."""
    for key in keys:
        record = (record or {}).get(key)
    return record if record is not None and 0 <= record < math.inf else None


# ---------------------------------------------------------------------------------------------------- curves


def phase_starts(phases: dict) -> tuple[dict[str, int], int]:
    """Return {phase: its first step}, where steps count from the start of the first phase, and the number of
    all steps. The supervised control is not listed; it starts at 0."""
    starts, total = {}, 0
    for phase in PHASE_NAMES:
        if phase in phases:
            starts[phase] = total
            total += max(phases[phase])
    return starts, max([total, *phases.get("supervised", {})])


def build_charts(phases: dict, aps: dict, starts: dict, total: int) -> dict[str, dict[str, list[Curve]]]:
    """Return {title of a chart: {label of a y axis: its curves}}. A curve may have no points."""

    def points(phase, *keys):
        start, records = starts.get(phase, 0), phases.get(phase, {})
        numbers = [(start + step, get_number(record, *keys)) for step, record in records.items()]
        return [point for point in numbers if point[1] is not None]

    loss, ap, quality, kept, score = [], [], [], [], []
    for phase, name in MODEL_NAMES.items():
        loss.append(Curve(name, name, "-", points(phase, "loss")))
        loss.append(Curve(f"{name}, on pseudo-labels", name, ":", points(phase, "unlabeled_loss")))
        ap.append(Curve(name, name, "-o", points(phase, "ap", "AP")))
    ap.append(Curve("EMA teacher", "EMA teacher", "D", points("distill", "teacher_ap", "AP")))
    teacher_ap, start = final_aps(ap, aps).get("teacher"), starts.get("burnin", total)
    if teacher_ap is not None and start < total:
        ap.append(Curve("final teacher", "teacher", ":", [(start, teacher_ap), (total, teacher_ap)]))
    for phase in ("burnin", "distill"):
        for name, format in {"precision": "-o", "recall": "--s", "mask IoU": ":^"}.items():
            quality.append(Curve(name, name, format, points(phase, "pseudo", name.lower().replace(" ", "_"))))
        for curves, logged, evaluated in ((kept, "pseudo_labels", "kept"), (score, "mean_score", "score")):
            curves.append(Curve("in training", "pseudo-labels", "-", points(phase, logged)))
            curves.append(Curve("at evaluations", "ink", "D", points(phase, "pseudo", evaluated)))
    return {
        "Loss": {"": loss},
        "Mask AP": {"": ap},
        "Quality on held-out annotations, %": {"": quality},
        "Number and mean score": {"per image": kept, "mean score": score},
    }


def draw_chart(title: str, chart: dict[str, list[Curve]], starts: dict, total: int) -> str:
    """Draw a chart as SVG, with title and legend. Returns HTML, or "" if no curve has points."""
    chart = {label: [curve for curve in curves if curve.points] for label, curves in chart.items()}
    chart = {label: curves for label, curves in chart.items() if curves}
    if not chart:
        return ""
    # Text remains text in the SVG, so that the page chooses its font.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 8}):
        figure = Figure(figsize=(4.4, 2.5), layout="constrained")
        rows = figure.subplots(len(chart), sharex=True, squeeze=False)[:, 0]
        for axes, (label, curves) in zip(rows, chart.items()):
            plot_curves(axes, label, curves, log_scale=title == "Loss")
            for start in starts.values():
                axes.axvline(start, color=COLORS["muted"][0], linewidth=0.5)
        axes.set_xlim(0, max(total, 1))
        axes.set_xlabel("steps", color=COLORS["muted"][0])
        write_phase_names(rows[0], starts, total)
        svg = to_svg(figure, title)
    swatches = {
        curve.label: swatch(curve.color, curve.format) for curves in chart.values() for curve in curves
    }
    return f"<figure><figcaption><b>{title}</b>{legend(swatches)}</figcaption>{svg}</figure>\n"


def plot_curves(axes, label: str, curves: list[Curve], log_scale: bool) -> None:
    """Plot curves over steps. label: of the y axis."""
    muted, rule = COLORS["muted"][0], COLORS["rule"][0]
    for curve in curves:
        style = {"color": COLORS[curve.color][0], "linewidth": 1.1, "markersize": 2.5, "clip_on": False}
        axes.plot(*zip(*curve.points), curve.format, **style)
    if log_scale:
        axes.set_yscale("log", nonpositive="mask")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.set_ylabel(label, color=muted)
    axes.tick_params(color=rule, labelcolor=muted, length=2)
    axes.grid(axis="y", color=rule, linewidth=0.5)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(rule)


def write_phase_names(axes, starts: dict[str, int], total: int) -> None:
    """Write the name of each phase above its start. If a phase is too narrow for its name, the names stand
    one above the other, each with a vertical line down to its start."""
    ends = [*starts.values(), total]
    narrow = any(end - start < 0.28 * total for start, end in zip(ends, ends[1:]))
    muted = COLORS["muted"][0]
    style = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points", "color": muted}
    line = {"arrowstyle": "-", "linewidth": 0.5, "color": muted, "shrinkA": 0, "shrinkB": 0}
    for row, (phase, start) in enumerate(reversed(starts.items())):
        height = 3 + 9 * row * narrow
        axes.annotate("", (start, 1), (0, height + 6), arrowprops=line, **style)
        axes.annotate(PHASE_NAMES[phase], (start, 1), (3, height), **style)


def to_svg(figure, title: str) -> str:
    """Convert a figure to an SVG element in the colors of the page."""
    with io.StringIO() as file:
        figure.savefig(file, format="svg", transparent=True, metadata=SVG_METADATA)
        svg = file.getvalue()
    svg = svg[svg.index("<svg") :]  # without the XML declarations
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{slug(title)}-", svg)  # ids are unique on the page
    svg = re.sub(r'width="\S+" height="\S+"', f'role="img" aria-label="{title}"', svg, count=1)
    for name, (light, _) in COLORS.items():
        svg = svg.replace(light, f"var(--{slug(name)})")
    return svg


def swatch(color: str, format: str = "D") -> str:
    """Return the sample of a curve for legends: a line, or a dot for the format "D"."""
    if format == "D":
        return f'<i class="dot" style="background: var(--{slug(color)})"></i>'
    line = "dashed" if format.startswith("--") else "dotted" if format.startswith(":") else "solid"
    return f'<i style="border-top: 3px {line} var(--{slug(color)})"></i>'


def legend(swatches: dict[str, str]) -> str:
    entries = "".join(f"<span>{sample}{label}</span>" for label, sample in swatches.items())
    return f'<p class="key">{entries}</p>'


def slug(name: str) -> str:
    """Convert a name to letters, digits and hyphens."""
    return re.sub(r"\W+", "-", name).lower()


# --------------------------------------------------------------------------------------------- other sections


def final_aps(curves: list[Curve], aps: dict) -> dict[str, float]:
    """Return {name of a model: its AP in aps, or that of its last evaluation}."""
    last = {curve.label: curve.points[-1][1] for curve in curves if curve.points}
    return last | {name: ap["AP"] for name, ap in aps.items() if get_number(ap, "AP") is not None}


def summary(curves: list[Curve], aps: dict) -> str:
    """Return the AP of the last model that was trained, in one sentence, and compare it with the teacher and
    with the supervised control. curves: of AP."""
    ap = {name: round(number, 1) for name, number in final_aps(curves, aps).items()}
    latest_first = ("fine-tuned", "student", "burnt-in", "teacher", "labels only")
    name = next((name for name in latest_first if name in ap), None)
    if name is None:
        return "No AP was recorded."
    text = f"<b>{ap[name]:.1f}</b> mask AP ({swatch(name)}{name})"
    for other in ("teacher", "labels only"):
        if other in ap and other != name:
            text += f", {ap[name] - ap[other]:+.1f} compared with {swatch(other)}{other} ({ap[other]:.1f})"
    evaluations = [number for curve in curves if curve.label == name for _, number in curve.points]
    highest = round(max(evaluations, default=0), 1)
    return text + (f"; highest during training: {highest:.1f}" if highest > ap[name] else "")


def class_bars(quality: dict) -> str:
    """Draw the class frequencies of pseudo-labels and of labeled images, largest differences first.
    quality: what measure_pseudo_labels returns."""
    kinds = {"pseudo-labels": "classes", "labeled images": "labeled_classes"}
    names = dict.fromkeys(name for kind in kinds.values() for name in quality.get(kind) or {})
    frequencies = {name: [get_number(quality, kind, name) or 0 for kind in kinds.values()] for name in names}
    by_difference = sorted(names, key=lambda name: -abs(frequencies[name][0] - frequencies[name][1]))
    chosen = by_difference[:MAX_BARS]
    highest = max((max(frequencies[name]) for name in chosen), default=0) or 1
    html = ""
    for name in chosen:
        html += f"<div><b>{escape(name)}</b><p>"
        for kind, frequency in zip(kinds, frequencies[name]):
            style = f"width: {75 * frequency / highest:.1f}%; background: var(--{slug(kind)})"
            html += f'<span><i style="{style}"></i>{100 * frequency:.1f} %</span>'
        html += "</p></div>\n"
    swatches = {kind: swatch(kind) for kind in kinds}
    if len(names) > MAX_BARS:
        swatches[f"the {MAX_BARS} of {len(names)} classes with the largest difference"] = ""
    return html and f'{legend(swatches)}<div class="bars">{html}</div>'


def ap_tables(aps: dict[str, dict]) -> str:
    """Return a table of AP, and below it one with the AP of each class. The best numbers of a row are
    bold."""
    if not any(aps.values()):
        return ""
    names = dict.fromkeys(["AP", "AP50", "AP75", *SIZE_NAMES, *(name for ap in aps.values() for name in ap)])
    names.pop("per_class", None)
    class_names = dict.fromkeys(name for ap in aps.values() for name in ap.get("per_class", {}))
    html = ap_table_html(aps, names)
    if class_names:
        html += f"<details{' open' * (len(class_names) <= MAX_OPEN_ROWS)}><summary>AP by class</summary>\n"
        html += ap_table_html({name: ap.get("per_class") for name, ap in aps.items()}, class_names)
        html += "</details>"
    return html


def ap_table_html(columns: dict[str, dict | None], rows) -> str:
    """Return a table with one row for each key of the columns."""
    head = "".join(f"<th>{swatch(name) if name in COLORS else ''}{escape(name)}</th>" for name in columns)
    width = f"min-width: {7 + 5.5 * len(columns)}rem; max-width: {12 + 12 * len(columns)}rem"
    html = f'<div class="scroll"><table style="{width}"><tr><th></th>{head}</tr>\n'
    for row in rows:
        numbers = [get_number(column, row) for column in columns.values()]
        cells = ["-" if number is None else f"{number:.1f}" for number in numbers]
        best = f"{max((number for number in numbers if number is not None), default=-1):.1f}"
        if len(cells) > 1:  # numbers that are equal after rounding are all bold
            cells = [f"<b>{cell}</b>" if cell == best else cell for cell in cells]
        html += f"<tr><th>{escape(SIZE_NAMES.get(row, row))}</th><td>{'</td><td>'.join(cells)}</td></tr>\n"
    return html + "</table></div>\n"


def picture_rows(pictures: list[list[Image.Image]], names: list[str]) -> str:
    """Return a row of pictures per image. Each picture is the label of a check box: a click enlarges it to
    the full width."""
    row = f'<div class="row" style="grid-template-columns: repeat({len(names)}, 1fr)">'
    html = row + "".join(f"<span>{escape(name)}</span>" for name in names) + "</div>\n"
    for number, images in enumerate(pictures, start=1):
        html += row
        for name, image in zip(map(escape, names), images):
            image = image.convert("RGB")
            image.thumbnail((640, 640))
            with io.BytesIO() as file:
                image.save(file, format="PNG")
                data = base64.b64encode(file.getvalue()).decode()
            html += f'<label><input type="checkbox"><img alt="{name}, {number}" '
            html += f'src="data:image/png;base64,{data}"><span>{name}</span></label>'
        html += "</div>\n"
    return html if pictures else ""


def option_table(config: dict) -> str:
    """Return a table of the options in alphabetical order, without those that are empty."""
    options = {name: v for name, v in sorted(config.items()) if v not in (None, "", [], (), {})}
    rows = "".join(f"<tr><th>{escape(n)}</th><td>{escape(str(v))}</td></tr>\n" for n, v in options.items())
    table = f'<table><tbody class="config">{rows}</tbody></table>'
    return f"<details><summary>{len(options)} options</summary>{table}</details>" if options else ""


def command_list(banners: list[dict]) -> str:
    """Return a list of the commands that started or resumed the run. Below each stand the lines of its
    banner that differ from the banner before."""
    html = ""
    for banner, previous in zip(banners, [{}, *banners]):
        lines = [str(v) for k, v in banner.items() if k != "command" and v and v != previous.get(k)]
        html += f"<li><code>{escape(banner.get('command', ''))}</code><br>{escape(' · '.join(lines))}</li>\n"
    return html and f"<ol>{html}</ol>"
