"""A run on one page: an HTML file with its curves, pseudo-labels, AP, pictures and settings, which needs
nothing else.

    write_report("runs/shapes-0.02/report.html", "shapes, 2 % labelled", "runs/shapes-0.02/metrics.jsonl",
                 aps={"teacher": ap, "student": ap}, pictures=[[image, truth, seen]],
                 picture_names=["image", "ground truth", "student"], config=dataclasses.asdict(cfg))"""

import base64
import io
import json
import math
import re
from html import escape
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from PIL import Image

# Phases one after the other, as they are shown; and what each trains, with the control beside them.
PHASES = {"teacher": "teacher burn-in", "burnin": "guided burn-in", "distill": "distillation"}
PHASES |= {"refine": "refinement"}
TRAINED = {"teacher": "teacher", "burnin": "burnt-in", "distill": "student", "refine": "refined"}
TRAINED |= {"labels_only": "labels only"}
SIZES = {"APs": "APs, small", "APm": "APm, medium", "APl": "APl, large"}
NO_METADATA = dict.fromkeys(["Creator", "Date", "Format", "Type"])  # of an SVG: URIs and the time
MOST_BARS = 20  # classes in the histogram
MOST_ROWS = 12  # classes in the table that are shown without a click

# One colour for one thing on the whole page, on white and on black; from the palettes of Okabe and Ito and of
# Paul Tol, which the colour-blind can tell apart.
COLOURS = {
    "teacher": ("#d55e00", "#ff9350"),
    "burnt-in": ("#56b4e9", "#9bd7f9"),
    "student": ("#0072b2", "#4aa3e8"),
    "EMA teacher": ("#009e73", "#3ccfa3"),
    "refined": ("#8c510a", "#d9a066"),
    "labels only": ("#cc79a7", "#e9a3c9"),
    "pseudo-labels": ("#e69f00", "#f3bd45"),
    "labelled images": ("#8a929c", "#8b949f"),
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


def write_report(
    path, title: str, metrics_file, aps: dict, pictures: list[list], picture_names: list[str], config: dict
) -> None:
    """Writes the page to path.

    metrics_file: a run's metrics.jsonl, of whatever phases. aps: {name of a model: what evaluate.evaluate()
    returns, or {}}. pictures: for each image a row, with a picture for each of picture_names."""
    banners, phases = read_metrics(metrics_file)
    panels, borders, total = curves(phases, aps)
    charts = [chart(name, panel, borders, total) for name, panel in panels.items()]
    records = [record for phase in ("burnin", "distill") for record in phases.get(phase, {}).values()]
    pseudo = [record["pseudo"] for record in records if record.get("pseudo")]
    sections = {
        "Training": "".join(charts[:2]),
        "Pseudo-labels": "".join(charts[2:]),
        "Classes of pseudo-labels": bars(pseudo[-1]) if pseudo else "",
        "Mask AP": ap_tables(aps),
        "Predictions": strip(pictures, picture_names),
        "Configuration": settings(config),
        "Commands": commands(banners),
    }
    body = "".join(
        f"<section><h2>{name}</h2>\n{content or 'Nothing was recorded.'}</section>\n"
        for name, content in sections.items()
    )
    light, dark = (" ".join(f"--{slug(n)}: {pair[k]};" for n, pair in COLOURS.items()) for k in (0, 1))
    html = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root {{ color-scheme: light dark; {light} }}
@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}{CSS}</style></head>
<body><h1>{escape(title)}</h1>
<p class="lead">{summary(panels["Mask AP"][""], aps)}</p>
{body}</body>
</html>
"""
    Path(path).write_text(html, encoding="utf-8")


def read_metrics(file) -> tuple[list[dict], dict[str, dict[int, dict]]]:
    """The banners, and {phase: {step: record}} by rising steps. Of what a resumed run has written twice the
    last counts; what a killed run has left of a line is skipped."""
    banners, phases = [], {}
    for line in Path(file).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if "banner" in record:
            banners.append(record["banner"])
        elif record.get("phase") in TRAINED:  # a step has a line of losses and one of its evaluation
            phases.setdefault(record["phase"], {}).setdefault(record["step"], {}).update(record)
    return banners, {phase: dict(sorted(records.items())) for phase, records in phases.items()}


def value(record: dict | None, *keys) -> float | None:
    """The number below keys; None if it is missing, not finite, or below zero, as AP is where there is
    nothing to find."""
    for key in keys:
        record = (record or {}).get(key)
    return record if record is not None and 0 <= record < math.inf else None


def curves(phases: dict, aps: dict) -> tuple[dict[str, dict[str, list]], dict[str, int], int]:
    """Panels {title: {label of the y axis: lines}}, where a line is (label, colour, matplotlib's format,
    [(cumulative step, value)]); {shown name of a phase: step where it begins}; and the number of steps."""
    starts, total = {"labels_only": 0}, 0
    for phase in PHASES:
        if phase in phases:
            starts[phase] = total
            total += max(phases[phase])
    total = max([total, *phases.get("labels_only", {})])

    def points(phase, *keys):
        found = [(starts[phase] + step, value(r, *keys)) for step, r in phases.get(phase, {}).items()]
        return [point for point in found if point[1] is not None]

    loss, ap, quality, kept, score = [], [], [], [], []
    for phase, name in TRAINED.items():
        loss.append((name, name, "-", points(phase, "loss")))
        loss.append((f"{name}, on pseudo-labels", name, ":", points(phase, "guided_loss")))
        ap.append((name, name, "-o", points(phase, "ap", "AP")))
    ap.append(("EMA teacher", "EMA teacher", "D", points("distill", "teacher_ap", "AP")))
    teacher, begin = finals(ap, aps).get("teacher"), starts.get("burnin", total)
    if teacher is not None and begin < total:
        ap.append(("teacher at its end", "teacher", ":", [(begin, teacher), (total, teacher)]))
    for phase in ("burnin", "distill"):
        for name, fmt in {"precision": "-o", "recall": "--s", "mask IoU": ":^"}.items():
            quality.append((name, name, fmt, points(phase, "pseudo", slug(name).replace("-", "_"))))
        for lines, logged, evaluated in ((kept, "pseudo_labels", "kept"), (score, "mean_score", "score")):
            lines.append(("in training", "pseudo-labels", "-", points(phase, logged)))
            lines.append(("at evaluations", "ink", "D", points(phase, "pseudo", evaluated)))
    panels = {
        "Loss": {"": loss},
        "Mask AP": {"": ap},
        "Pseudo-labels against the truth, %": {"": quality},
        "Pseudo-labels kept, and their score": {"per image": kept, "mean score": score},
    }
    return panels, {PHASES[phase]: starts[phase] for phase in PHASES if phase in starts}, total


def chart(title: str, panel: dict[str, list], borders: dict[str, int], total: int) -> str:
    """A figure of curves with its key; "" where there is nothing to draw."""
    panel = {label: [line for line in lines if line[3]] for label, lines in panel.items()}
    panel = {label: lines for label, lines in panel.items() if lines}
    if not panel:
        return ""
    muted, rule = COLOURS["muted"][0], COLOURS["rule"][0]
    # Text stays text, for the page to choose the font.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 8}):
        figure = Figure(figsize=(4.4, 2.5), layout="constrained")
        rows = figure.subplots(len(panel), sharex=True, squeeze=False)[:, 0]
        for axes, (label, lines) in zip(rows, panel.items()):
            for _, colour, fmt, points in lines:
                style = {"color": COLOURS[colour][0], "linewidth": 1.1, "markersize": 2.5, "clip_on": False}
                axes.plot(*zip(*points), fmt, **style)
            if title == "Loss":
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
            for start in borders.values():
                axes.axvline(start, color=muted, linewidth=0.5)
        axes.set_xlim(0, max(total, 1))
        axes.set_xlabel("steps", color=muted)
        steps = [*borders.values(), total]
        narrow = any(end - start < 0.28 * total for start, end in zip(steps, steps[1:]))
        for row, (name, start) in enumerate(reversed(borders.items())):
            # Names that would overlap stand one above the other, each with its border as a pole.
            height = 3 + 9 * row * narrow
            style = {"xycoords": rows[0].get_xaxis_transform(), "textcoords": "offset points", "color": muted}
            pole = {"arrowstyle": "-", "linewidth": 0.5, "color": muted, "shrinkA": 0, "shrinkB": 0}
            rows[0].annotate("", (start, 1), (0, height + 6), arrowprops=pole, **style)
            rows[0].annotate(name, (start, 1), (3, height), **style)
        with io.StringIO() as file:
            figure.savefig(file, format="svg", transparent=True, metadata=NO_METADATA)
            svg = file.getvalue()
    svg = svg[svg.index("<svg") :]  # without XML's declarations
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{slug(title)}-", svg)  # no id twice on the page
    svg = re.sub(r'width="\S+" height="\S+"', f'role="img" aria-label="{title}"', svg, count=1)
    for name, (light, _) in COLOURS.items():
        svg = svg.replace(light, f"var(--{slug(name)})")
    key = {label: swatch(colour, fmt) for lines in panel.values() for label, colour, fmt, _ in lines}
    return f"<figure><figcaption><b>{title}</b>{legend(key)}</figcaption>{svg}</figure>\n"


def swatch(colour: str, fmt: str = "D") -> str:
    """A line of matplotlib's format, or a dot."""
    if fmt == "D":
        return f'<i class="dot" style="background: var(--{slug(colour)})"></i>'
    line = "dashed" if fmt.startswith("--") else "dotted" if fmt.startswith(":") else "solid"
    return f'<i style="border-top: 3px {line} var(--{slug(colour)})"></i>'


def legend(key: dict[str, str]) -> str:
    return '<p class="key">' + "".join(f"<span>{look}{label}</span>" for label, look in key.items()) + "</p>"


def slug(name: str) -> str:
    return re.sub(r"\W+", "-", name).lower()


def finals(ap_lines: list[tuple], aps: dict) -> dict[str, float]:
    """{name of a model: its AP in aps, or that of its last evaluation}"""
    last = {label: points[-1][1] for label, _, _, points in ap_lines if points}
    return last | {name: ap["AP"] for name, ap in aps.items() if value(ap, "AP") is not None}


def summary(ap_lines: list[tuple], aps: dict) -> str:
    ap = {name: round(number, 1) for name, number in finals(ap_lines, aps).items()}
    by_age = ("refined", "student", "burnt-in", "teacher", "labels only")
    name = next((name for name in by_age if name in ap), None)
    if name is None:
        return "No AP was recorded."
    text = f"<b>{ap[name]:.1f}</b> mask AP ({swatch(name)}{name})"
    for other in ("teacher", "labels only"):
        if other in ap and other != name:
            text += f", {ap[name] - ap[other]:+.1f} against {swatch(other)}{other} ({ap[other]:.1f})"
    best = max((v for label, _, _, points in ap_lines if label == name for _, v in points), default=0)
    return text + (f"; best evaluation {best:.1f}" if round(best, 1) > ap[name] else "")


def bars(pseudo: dict) -> str:
    """The classes' shares, those with the largest difference first."""
    kinds = {"pseudo-labels": "classes", "labelled images": "labelled_classes"}
    classes = dict.fromkeys(name for kind in kinds.values() for name in pseudo.get(kind) or {})
    shares = {name: [value(pseudo, kind, name) or 0 for kind in kinds.values()] for name in classes}
    chosen = sorted(shares, key=lambda name: -abs(shares[name][0] - shares[name][1]))[:MOST_BARS]
    longest = max((max(shares[name]) for name in chosen), default=0) or 1
    html = ""
    for name in chosen:
        html += f"<div><b>{escape(name)}</b><p>"
        for kind, share in zip(kinds, shares[name]):
            style = f"width: {75 * share / longest:.1f}%; background: var(--{slug(kind)})"
            html += f'<span><i style="{style}"></i>{100 * share:.1f} %</span>'
        html += "</p></div>\n"
    key = {kind: swatch(kind) for kind in kinds}
    if len(shares) > MOST_BARS:
        key[f"the {MOST_BARS} of {len(shares)} classes with the largest difference"] = ""
    return html and f'{legend(key)}<div class="bars">{html}</div>'


def ap_tables(aps: dict[str, dict]) -> str:
    """AP, and below it that of each class; the best of a row in bold."""
    if not any(aps.values()):
        return ""
    names = dict.fromkeys(["AP", "AP50", "AP75", *SIZES, *(name for ap in aps.values() for name in ap)])
    classes = dict.fromkeys(name for ap in aps.values() for name in ap.get("per_class", {}))
    head = "".join(f"<th>{swatch(n) if n in COLOURS else ''}{escape(n)}</th>" for n in aps)
    width = f"min-width: {7 + 5.5 * len(aps)}rem; max-width: {12 + 12 * len(aps)}rem"
    table = f'<div class="scroll"><table style="{width}"><tr><th></th>{head}</tr>\n'

    def rows(names, *keys):
        html = ""
        for name in names:
            numbers = [value(ap, *keys, name) for ap in aps.values()]
            cells = ["-" if number is None else f"{number:.1f}" for number in numbers]
            best = max((n for n in numbers if n is not None), default=-1)
            best = f"{best:.1f}" if len(cells) > 1 else ""
            cells = [f"<b>{cell}</b>" if cell == best else cell for cell in cells]
            html += f"<tr><th>{escape(SIZES.get(name, name))}</th><td>{'</td><td>'.join(cells)}</td></tr>\n"
        return html + "</table></div>\n"

    html = table + rows(name for name in names if name != "per_class")
    if classes:
        html += f"<details{' open' * (len(classes) <= MOST_ROWS)}><summary>AP by class</summary>\n"
        html += table + rows(classes, "per_class") + "</details>"
    return html


def strip(pictures: list[list[Image.Image]], names: list[str]) -> str:
    """A row for each image. A picture is a check box's label: one that is checked is shown in full width."""
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


def settings(config: dict) -> str:
    """The configuration by name, without what is empty."""
    rows = {name: v for name, v in sorted(config.items()) if v not in (None, "", [], (), {})}
    html = "".join(f"<tr><th>{escape(n)}</th><td>{escape(str(v))}</td></tr>\n" for n, v in rows.items())
    html = f'<table><tbody class="config">{html}</tbody></table>'
    return f"<details><summary>{len(rows)} values</summary>{html}</details>" if rows else ""


def commands(banners: list[dict]) -> str:
    """Each start of the program, with what has changed since the one before."""
    html = ""
    for banner, before in zip(banners, [{}, *banners]):
        rest = [str(v) for k, v in banner.items() if k != "command" and v and v != before.get(k)]
        html += f"<li><code>{escape(banner.get('command', ''))}</code><br>{escape(' · '.join(rest))}</li>\n"
    return html and f"<ol>{html}</ol>"
