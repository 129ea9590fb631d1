"""The recipes of bench/ablation.py: what they are run on, what each is, and its commands."""

import shlex
from pathlib import Path

# flags, and the steps of teacher burn-in, guided burn-in and distillation
DATA = {
    "shapes": ("--data shapes --eval-every 250", (500, 700, 900)),
    "nuclei": (
        "--data tiles --split tiles/splits/RATIO-SEED.txt --preset shapes --crop 96,96 --num-queries 30 "
        "--num-points 512 --score-threshold 0.7 --eval-every 750 --backbone mobilenetv2_100 --backbone-args "
        '\'{"pad_type": "same"}\' --backbone-weights mobilenetv2_100.safetensors --norm frozen '
        "--pixel-mean 127.5,127.5,127.5 --pixel-std 127.5,127.5,127.5 --backbone-lr-factor 0.5",
        (2500, 1500, 1500),
    ),
}
QUICK = (200, 280, 360)

# Checkpoints of other recipes with the same seed, from which one may start.
STARTS = {
    "teacher": "paper/teacher.pt",
    "student": "paper/burnin.pt",
    "distilled": "paper/distill.pt",
    "clean": "clean/distill.pt",
    "labels": "labels-only/labels_only.pt",
}

# What each recipe is, and its commands. {own} is the folder of the run; {t}, {b}, {d} are the steps of the
# phases, {whole} those of the guided ones together.
RECIPES = {
    "paper": ("Guided Distillation", ["distill.py"]),
    "labels-only": ("labels only, for the steps of all phases", ["distill.py --labels-only"]),
    "all-labels": (
        "labels of all training images, for the steps of all phases: what could be reached",
        ["distill.py --labels-only --split '' --ratio 1"],
    ),
    "unguided": (
        "unguided burn-in: the student's on labels only, then distillation",
        [
            "burnin.py --teacher {teacher} --unsupervised-weight 0 --out {own}-start",
            "distill.py --student {own}-start/burnin.pt",
        ],
    ),
    "no-distillation": (
        "no distillation: guided burn-in all the way, the first teacher stays",
        ["burnin.py --teacher {teacher} --steps {t},{whole},1"],
    ),
    "two-phase": (
        "no student's burn-in: the teacher goes on as student and EMA teacher",
        ["distill.py --student {teacher} --steps {t},1,{whole}"],
    ),
    "labels-only-jitter": (
        "labels only for all steps, and colour jitter of their images",
        ["distill.py --labels-only --colour"],
    ),
    "from-teacher": (
        "the student starts from the teacher, not fresh",
        ["distill.py --teacher {teacher} --init {teacher}"],
    ),
    "frozen": (
        "distillation from a copy of the burnt-in student that stays",
        ["distill.py --student {student} --ema-decay 1"],
    ),
    "ema-0.99": ("EMA decay 0.99", ["distill.py --student {student} --ema-decay 0.99"]),
    "ema-0.9996": ("EMA decay 0.9996", ["distill.py --student {student} --ema-decay 0.9996"]),
    "paper-values": (
        "threshold 0.7 and EMA decay 0.9996, as in the paper's far longer runs",
        ["distill.py --teacher {teacher} --score-threshold 0.7 --ema-decay 0.9996"],
    ),
    "uniform": (
        "labelled images sampled uniformly in all phases",
        ["distill.py --teacher {teacher} --repeat-threshold 0"],
    ),
    "threshold-0.5": ("threshold 0.5", ["distill.py --teacher {teacher} --score-threshold 0.5"]),
    "threshold-0.7": ("threshold 0.7", ["distill.py --teacher {teacher} --score-threshold 0.7"]),
    "threshold-0.9": ("threshold 0.9", ["distill.py --teacher {teacher} --score-threshold 0.9"]),
    "threshold-0.95": ("threshold 0.95", ["distill.py --teacher {teacher} --score-threshold 0.95"]),
    "lower-later": (
        "threshold 0.7 in distillation alone",
        ["distill.py --student {student} --score-threshold 0.7"],
    ),
    "unguided-lower-later": (
        "unguided burn-in, and threshold 0.7 in distillation",
        [
            "burnin.py --teacher {teacher} --unsupervised-weight 0 --out {own}-start",
            "distill.py --student {own}-start/burnin.pt --score-threshold 0.7",
        ],
    ),
    "weight-1": ("unsupervised weight 1", ["distill.py --teacher {teacher} --unsupervised-weight 1"]),
    "weight-4": ("unsupervised weight 4", ["distill.py --teacher {teacher} --unsupervised-weight 4"]),
    "weak-view": (
        "strong view off: the student sees what the teacher sees",
        ["distill.py --teacher {teacher} --strong-view false"],
    ),
    "shorter": (
        "guided burn-in half as long, distillation longer by as much",
        ["distill.py --teacher {teacher} --steps {t},{b_half},{d_more}"],
    ),
    "longer": (
        "distillation half as long, guided burn-in longer by as much",
        ["distill.py --teacher {teacher} --steps {t},{b_more},{d_half}"],
    ),
    "mask-quality": (
        "only pseudo-labels with a mean mask probability of 0.9 (PL-DC)",
        ["distill.py --teacher {teacher} --mask-threshold 0.9"],
    ),
    "no-duplicates": (
        "without duplicates: of two pseudo-labels that overlap by more than half the better one stays",
        ["distill.py --teacher {teacher} --max-overlap 0.5"],
    ),
    "no-duplicates-0.7": (
        "threshold 0.7 without duplicates",
        ["distill.py --teacher {teacher} --max-overlap 0.5 --score-threshold 0.7"],
    ),
    "fine-masks": (
        "masks of pseudo-labels at full resolution",
        ["distill.py --teacher {teacher} --fine-masks"],
    ),
    "clean": (
        "without duplicates, and masks of pseudo-labels at full resolution",
        ["distill.py --teacher {teacher} --max-overlap 0.5 --fine-masks"],
    ),
    "clean-refined": (
        "clean and --refine",
        [
            "distill.py --labels-only --init {clean} --lr 1e-4 --steps {refine} "
            "--max-overlap 0.5 --fine-masks",
        ],
    ),
    "clean-0.7": (
        "threshold 0.7 without duplicates, and masks of pseudo-labels at full resolution",
        ["distill.py --teacher {teacher} --max-overlap 0.5 --fine-masks --score-threshold 0.7"],
    ),
    "pixel-weights": (
        "mask BCE weighted by how sure the teacher is of a pixel (PL-DC)",
        ["distill.py --teacher {teacher} --pixel-weights"],
    ),
    "soft-weights": (
        "threshold 0.5, losses weighted by the score to the power of 4 (PAIS)",
        ["distill.py --teacher {teacher} --score-threshold 0.5 --score-power 4"],
    ),
    # What --refine does, but from the other recipe's checkpoint, so that nothing is run twice.
    "refined": (
        "--refine: a third of phase 3 more, on labels only, with at most a tenth of the learning rate (CAST)",
        ["distill.py --labels-only --init {distilled} --lr 1e-4 --steps {refine}"],
    ),
    "labels-only-refined": (
        "labels only for the steps of all phases, then such a last phase",
        ["distill.py --labels-only --init {labels} --lr 1e-4 --steps {refine}"],
    ),
    "more-distillation": (
        "phase 3 a third longer",
        ["distill.py --student {student} --steps {t},{b},{d_third_more}"],
    ),
    "restarted": (
        "a third of phase 3 more, with the tenth of the learning rate of --refine, but with pseudo-labels",
        ["distill.py --student {distilled} --lr 1e-4 --steps {t},1,{third}"],
    ),
}
# Recipes that repeat what another does there, because that is its threshold.
SAME = {("shapes", "threshold-0.9")} | {
    ("nuclei", recipe)
    for recipe in (
        "threshold-0.7",
        "lower-later",
        "unguided-lower-later",
        "no-duplicates-0.7",
        "clean-0.7",
    )
}
MAIN = ["paper", "labels-only", "unguided", "no-distillation"]


def numbers_of(t: int, b: int, d: int) -> dict:
    """The numbers that stand in the commands of RECIPES, from the steps of the phases."""
    numbers = {"t": t, "b": b, "d": d, "whole": b + d - 1}
    numbers["refine"] = max(1, d // 9)  # --labels-only has the steps of three phases: a third of the third's
    numbers["third"] = 3 * numbers["refine"]
    numbers["d_third_more"] = d + numbers["third"]
    return numbers | {"b_half": b // 2, "d_more": d + b - b // 2, "d_half": d // 2, "b_more": b + d - d // 2}


def command(text: str, data: str, ratio: float, seed: int, steps: tuple, own: Path) -> str:
    """A recipe's command for a run, with all flags; its own come last, so that they hold."""
    t, b, d = steps
    paths = {"own": own} | {name: own.parent / place for name, place in STARTS.items()}
    paths = {name: shlex.quote(str(path)) for name, path in paths.items()}
    script, _, more = text.format(**paths, **numbers_of(t, b, d)).partition(" ")
    more += "" if "--steps" in more else f" --steps {t},{b},{d}"
    more += "" if "--out" in more else f" --out {paths['own']}"
    flags = DATA[data][0].replace("RATIO", f"{ratio:g}").replace("SEED", str(seed))
    return f"{script} {flags} --ratio {ratio:g} --seed {seed} {more.strip()}"
