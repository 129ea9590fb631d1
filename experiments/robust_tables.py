"""The page ROBUST.md, from the records in robust.jsonl: the paper's recipe, the recipe `robust` and labels
only in several settings, and the experiments by which the recipe was chosen.

Records are those of ablation.py (ablation_tables.py describes them)."""

import statistics
from pathlib import Path

from ablation_tables import (
    describe_machines,
    final_aps,
    format_difference,
    format_mean,
    group_by_row,
    import_pyplot,
    make_commands,
    wrap,
)
from scipy import stats

SETTINGS = [
    ("animals", 0.05),
    ("animals", 0.1),
    ("nuclei", 0.05),
    ("nuclei", 0.1),
    ("shapes", 0.02),
    ("shapes", 0.05),
    ("shapes", 0.1),
    ("nuclei-fresh", 0.1),
]
CONTROLS = {"labels-as-long": "labels only, more steps", "labels-as-many": "labels only, as many images"}
ROWS = {**CONTROLS, "paper": "paper", "robust": "robust"}

# Questions, and for each the rows of `final_aps` that are compared: {question: [(row, other)]}.
QUESTIONS = {
    "Is `robust` better than the paper's recipe?": [("robust", "paper")],
    "Does guided burn-in teach the student?": [("burn-in-paper", "burn-in-labels")],
    "Do duplicates hurt, or coarse masks?": [
        ("burn-in-nms", "burn-in-paper"),
        ("burn-in-masks", "burn-in-paper"),
        ("burn-in-clean", "burn-in-paper"),
    ],
    "Does a stronger strong view help?": [
        ("burn-in-view", "burn-in-clean"),
        ("burn-in-noise", "burn-in-clean"),
        ("burn-in-cutmix", "burn-in-clean"),
        ("burn-in-erase", "burn-in-view"),
        ("burn-in-turn", "burn-in-view"),
    ],
    "Does a copy of the teacher make a better student?": [("burn-in-copy", "burn-in-view")],
    "Do pseudo-labels help that weigh less, or that are fewer and surer?": [
        ("burn-in-weight-0.5", "burn-in-copy"),
        ("burn-in-threshold-0.9", "burn-in-view"),
        ("burn-in-min-area", "burn-in-view"),
    ],
    "Is guided burn-in better than an unguided one, after distillation?": [("paper", "unguided")],
    "Does fine-tuning on labels help after `robust`?": [("robust, fine-tuned", "robust")],
    "Do smaller pseudo-labels help?": [("robust-min-area", "robust")],
    "Is phase 3 to blame?": [("paper", "no-distillation")],
}


def pair(runs: list[dict], row: str, other: str, data: str | None = None) -> list[float]:
    """Return the differences in AP between two rows of `final_aps`, for all settings and seeds (of a dataset)
    that both have."""
    aps = {row: {}, other: {}}
    for run in runs:
        if data in (None, run["data"]):
            for name, ap in final_aps(run).items():
                if name in aps:
                    aps[name][run["data"], run["ratio"], run["seed"]] = ap
    places = sorted(aps[row].keys() & aps[other].keys())
    return [aps[row][place] - aps[other][place] for place in places]


def interval(differences: list[float]) -> str:
    """Format the mean of differences, its 95 % confidence interval (of Student's t), and their number."""
    n = len(differences)
    if n == 0:
        return ""
    mean = statistics.mean(differences)
    if n == 1:
        return f"{mean:+.1f} (1)"
    half = stats.t.ppf(0.975, n - 1) * statistics.stdev(differences) / n**0.5
    return f"{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}] ({n})"


# --------------------------------------------------------------------------------------------------- tables


def better_control(rows: dict) -> dict:
    """Return {seed: AP} of the control with the higher mean."""
    controls = [rows[name] for name in CONTROLS if name in rows]
    return max(controls, key=lambda row: statistics.mean(row.values()), default={})


def make_summary(groups: dict, settings=SETTINGS) -> list[str]:
    """Make the table of all settings: the AP of each row, and the gains over the better control."""
    settings = [setting for setting in settings if "paper" in groups.get(setting, {})]
    names = [f"{data}, {100 * ratio:g} %" for data, ratio in settings]
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for row, title in ROWS.items():
        cells = [format_mean(list(groups[s][row].values())) if row in groups[s] else "" for s in settings]
        if any(cells):
            lines.append(f"| {title} | {' | '.join(cells)} |")
        if any(cells) and row not in CONTROLS:
            controls = [better_control(groups[s]) for s in settings]
            gains = [
                format_difference(groups[s].get(row, {}), control) for s, control in zip(settings, controls)
            ]
            lines.append(f"| — gain | {' | '.join(gains)} |")
    return lines


def make_questions(runs: list[dict]) -> list[str]:
    """Make the table of QUESTIONS that runs answer."""
    datasets = list(dict.fromkeys(data for data, _ in SETTINGS))
    lines = [f"| question | difference | {' | '.join(datasets)} | all |", "|---" * (len(datasets) + 3) + "|"]
    for question, comparisons in QUESTIONS.items():
        for row, other in comparisons:
            cells = [interval(pair(runs, row, other, data)) for data in (*datasets, None)]
            if any(cells):
                lines.append(f"| {question} | `{row}` over `{other}` | {' | '.join(cells)} |")
                question = ""
    return lines


# -------------------------------------------------------------------------------------------------- figures


def plot_quality(runs: list[dict], file: Path, data: str, ratio: float, min_share=0.05) -> None:
    """Plot precision, recall and mask IoU of pseudo-labels by size over the guided phases of the recipes
    `paper` and `robust`: in burn-in of the pseudo-labels that the student would give, then of the EMA
    teacher's. Sizes with less than min_share of the objects are left out."""
    pyplot = import_pyplot()
    runs = [run for run in runs if (run["data"], run["ratio"]) == (data, ratio)]
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.4), layout="constrained", sharex=True)
    last = next(run for run in runs if run["recipe"] == "paper")["curve"][-1]
    objects = {size: last[f"{size}_objects"] for size in ("small", "medium", "large")}
    sizes = [size for size in objects if objects[size] >= min_share * sum(objects.values())]
    for axis, name in zip(axes, ("precision", "recall", "mask_iou")):
        for recipe, style in (("paper", "--"), ("robust", "-")):
            for size in sizes:
                curve = mean_curve([run for run in runs if run["recipe"] == recipe], f"{size}_{name}")
                color = {"small": "C3", "medium": "C1", "large": "C0"}[size]
                axis.plot(*zip(*curve.items()), style, color=color, label=f"{recipe}, {size}")
        axis.set_title(f"{name.replace('_iou', ' IoU')}, %", fontsize=10)
        axis.set_xlabel("step of the guided phases")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside right center")
    figure.suptitle(f"pseudo-labels on {data}, {100 * ratio:g} % of the labels", fontsize=11)
    pyplot.savefig(file, dpi=100)
    pyplot.close()


def mean_curve(runs: list[dict], name: str) -> dict:
    """Return {step of the guided phases: mean over runs of a number of the curve}."""
    curves = []
    for run in runs:
        _, burn_in, _ = run["steps"]
        keys = {"burnin": (0, f"student_{name}"), "distill": (burn_in, name)}
        points = [(p, *keys[p["phase"]]) for p in run["curve"] if p["phase"] in keys]
        curves.append({first + p["step"]: p[key] for p, first, key in points if key in p})
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    return {step: statistics.mean(curve[step] for curve in curves) for step in steps}


# ----------------------------------------------------------------------------------------------------- page

INTRODUCTION = """\
`python experiments/ablation.py --tables` makes this page from the runs in `robust.jsonl`. That file has the
commands and the evaluations of every run.

`paper` is the paper's recipe, `robust` the recipe of that name (`RECIPES` in `training/config.py`). The
baseline, labels only, was trained for the steps of all phases together and a third of phase 3 more. So it
has seen more labeled images than the student.{as_many}

AP is the mask AP of the final student (no checkpoint selection), mean ± standard deviation (seeds). Gains
are means of the paired differences ± their standard error (seeds): runs of one seed have the same labeled
images, and the guided ones the same teacher."""

AS_MANY_TEXT = """\
 A second baseline was trained for as many steps as the student, and so for as many labeled images. *Gain* is
over the one of the two with the higher mean."""

QUESTIONS_TEXT = """\
One change at a time, paired by seed: points of AP, mean [95 % confidence interval of Student's t] (pairs of
runs). The recipes named burn-in end with guided burn-in, whose learning rate falls to zero, so that each
takes minutes."""

FIGURE_TEXT = """\
Precision, recall and mask IoU of the pseudo-labels on 200 training images whose annotations are held out,
by size of the object: small below 1 % of the crop's area, medium below 10 %. In burn-in they are those that
the student would give, in distillation those of the EMA teacher; mean over the seeds. A size without
pseudo-labels is drawn as 0: in windows of 96 pixels the minimum area, 5 pixels at stride 4, is 0.9 % of the
crop, so there are almost no small pseudo-labels."""


def list_figures(runs: list[dict]) -> list[tuple]:
    """Return (file name, data, ratio) of the figures."""
    found = {(run["data"], run["ratio"], run["recipe"]) for run in runs}
    return [
        (f"robust-{data}-{100 * ratio:g}.png", data, ratio)
        for data, ratio in SETTINGS
        if data != "shapes" and {(data, ratio, "paper"), (data, ratio, "robust")} <= found
    ]


def make_page(runs: list[dict]) -> str:
    """Return the text of ROBUST.md."""
    as_many = AS_MANY_TEXT if "labels-as-many" in {run["recipe"] for run in runs} else ""
    introduction = wrap(INTRODUCTION.format(as_many=as_many))
    lines = ["# Two recipes", "", introduction, "", *make_summary(group_by_row(runs)), ""]
    hours, dates = sum(run["hours"] for run in runs), sorted({run["date"] for run in runs})
    period = " to ".join(sorted({dates[0], dates[-1]}))
    cost = f"{len(runs)} runs, {hours:.1f} hours of training without evaluations, {period}."
    lines += [wrap(f"{cost} {describe_machines(runs)}"), ""]
    lines += ["## Comparisons", "", wrap(QUESTIONS_TEXT), "", *make_questions(runs), ""]
    figures = list_figures(runs)
    if figures:
        lines += ["## What changes", "", wrap(FIGURE_TEXT), ""]
    for name, data, ratio in figures:
        lines += [f"![pseudo-labels on {data}, {100 * ratio:g} % of the labels]({name})", ""]
    note = (
        "These commands repeat the runs today; `robust.jsonl` has them as they were run. On CPUs some of "
        "the flags were left to `--preset auto`, whose choices have changed since."
    )
    return "\n".join(lines + make_commands(runs, note)) + "\n"


def write_page(runs: list[dict], folder: Path) -> None:
    """Write ROBUST.md and its figures, if there are runs."""
    if not runs:
        return
    (folder / "ROBUST.md").write_text(make_page(runs))
    for name, data, ratio in list_figures(runs):
        plot_quality(runs, folder / name, data, ratio)
