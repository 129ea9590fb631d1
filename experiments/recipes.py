"""The recipes of ablation.py: the data they run on, what each one changes, and its commands."""

import json
import math
import shlex
from pathlib import Path

from training.auto import SMALL_MODEL

# What --preset auto chooses on a CPU from most of the labeled sets below. They are given, so that all seeds
# train the same model, and machines with a GPU too.
SMALL = (
    "--recipe paper --hours 0 --save-every 250 --lsj-scale 0.7,1.3 --num-points 1024 --batch 8 --workers 0 "
    "--precision fp32 --lr 1e-3 --clip-grad-norm 1"
)
FROM_IMAGENET = (
    f"--backbone tf_efficientnet_lite2 --pretrained tf_efficientnet_lite2.safetensors {SMALL} "
    f"--model-args '{json.dumps(SMALL_MODEL)}'"
)
# Flags of a dataset, and the steps of teacher burn-in, guided burn-in and distillation.
DATA = {
    "shapes": ("--data shapes --eval-every 250", (500, 700, 900)),
    "cells": ("--data datasets/cells --preset shapes --num-queries 30", (500, 700, 900)),
    "animals": (
        f"--data animals {FROM_IMAGENET} --crop 128,128 --num-queries 20 --eval-every 150",
        (450, 600, 600),
    ),
    # From ImageNet's weights alone, short runs on nuclei measure how fast a model converges.
    "nuclei": (
        f"--data nuclei --init-from cells.pt {SMALL} --tile 96 --crop 96,96 --eval-every 200",
        (900, 600, 600),
    ),
    "nuclei-fresh": (
        f"--data nuclei {FROM_IMAGENET} --tile 96 --crop 96,96 --num-queries 40 --eval-every 250",
        (900, 750, 750),
    ),
    "tiles": (
        "--data tiles --labeled-list tiles/splits/RATIO-SEED.txt --preset shapes --crop 96,96 "
        "--num-queries 30 --num-points 512 --score-threshold 0.7 --eval-every 750 "
        "--backbone mobilenetv2_100 --pretrained mobilenetv2_100.safetensors --norm frozen "
        """--model-args '{"backbone_args": {"pad_type": "same"}, "pixel_mean": [127.5, 127.5, 127.5], """
        """"pixel_std": [127.5, 127.5, 127.5]}' --backbone-lr-factor 0.5""",
        (2500, 1500, 1500),
    ),
}
QUICK_STEPS = (200, 130, 150)

# Checkpoints from which other recipes with the same seed start.
STARTS = {
    "teacher": "paper/teacher.pt",
    "student": "paper/burnin.pt",
    "distilled": "paper/distill.pt",
    "clean": "clean/distill.pt",
    "labels": "labels-only/supervised.pt",
}

# What each recipe is, and its commands. {own} is the folder of the run. {t}, {b}, {d} are the steps of the
# phases, {whole} those of both guided phases.
RECIPES = {
    "paper": ("Guided Distillation", ["distill.py"]),
    "labels-only": ("labels only, for the steps of all phases", ["distill.py --supervised-only"]),
    "all-labels": (
        "labels of all training images, for the steps of all phases: an upper bound",
        ["distill.py --supervised-only --labeled-list '' --ratio 1"],
    ),
    "unguided": (
        "unguided burn-in: the student learns from labels only, then distillation",
        [
            "burnin.py --teacher-checkpoint {teacher} --unsupervised-weight 0 --out {own}-start",
            "distill.py --student-checkpoint {own}-start/burnin.pt",
        ],
    ),
    "no-distillation": (
        "no distillation: guided burn-in for all remaining steps, with the initial teacher",
        ["burnin.py --teacher-checkpoint {teacher} --steps {t},{whole},1"],
    ),
    "two-phase": (
        "no guided burn-in: student and EMA teacher both start as copies of the teacher",
        ["distill.py --student-checkpoint {teacher} --steps {t},1,{whole}"],
    ),
    "labels-only-jitter": (
        "labels only, for the steps of all phases, with color jitter",
        ["distill.py --supervised-only --color-jitter"],
    ),
    "from-teacher": (
        "the student starts from the teacher's weights",
        ["distill.py --teacher-checkpoint {teacher} --init-from {teacher}"],
    ),
    "frozen": (
        "distillation with a frozen teacher, a copy of the burnt-in student",
        ["distill.py --student-checkpoint {student} --ema-decay 1"],
    ),
    "ema-0.99": ("EMA decay 0.99", ["distill.py --student-checkpoint {student} --ema-decay 0.99"]),
    "ema-0.9996": ("EMA decay 0.9996", ["distill.py --student-checkpoint {student} --ema-decay 0.9996"]),
    "paper-values": (
        "score threshold 0.7 and EMA decay 0.9996, the paper's values for much longer runs",
        ["distill.py --teacher-checkpoint {teacher} --score-threshold 0.7 --ema-decay 0.9996"],
    ),
    "uniform": (
        "labeled images sampled uniformly in all phases",
        ["distill.py --teacher-checkpoint {teacher} --repeat-threshold 0"],
    ),
    "threshold-0.5": (
        "score threshold 0.5",
        ["distill.py --teacher-checkpoint {teacher} --score-threshold 0.5"],
    ),
    "threshold-0.7": (
        "score threshold 0.7",
        ["distill.py --teacher-checkpoint {teacher} --score-threshold 0.7"],
    ),
    "threshold-0.9": (
        "score threshold 0.9",
        ["distill.py --teacher-checkpoint {teacher} --score-threshold 0.9"],
    ),
    "threshold-0.95": (
        "score threshold 0.95",
        ["distill.py --teacher-checkpoint {teacher} --score-threshold 0.95"],
    ),
    "lower-later": (
        "score threshold 0.7 in distillation only",
        ["distill.py --student-checkpoint {student} --score-threshold 0.7"],
    ),
    "unguided-lower-later": (
        "unguided burn-in, and score threshold 0.7 in distillation",
        [
            "burnin.py --teacher-checkpoint {teacher} --unsupervised-weight 0 --out {own}-start",
            "distill.py --student-checkpoint {own}-start/burnin.pt --score-threshold 0.7",
        ],
    ),
    "weight-1": (
        "unsupervised weight 1",
        ["distill.py --teacher-checkpoint {teacher} --unsupervised-weight 1"],
    ),
    "weight-4": (
        "unsupervised weight 4",
        ["distill.py --teacher-checkpoint {teacher} --unsupervised-weight 4"],
    ),
    "weak-view": (
        "no strong view: the student sees the same weak view as the teacher",
        ["distill.py --teacher-checkpoint {teacher} --strong-view false"],
    ),
    "shorter": (
        "guided burn-in half as long, the steps saved added to distillation",
        ["distill.py --teacher-checkpoint {teacher} --steps {t},{b_half},{d_more}"],
    ),
    "longer": (
        "distillation half as long, the steps saved added to guided burn-in",
        ["distill.py --teacher-checkpoint {teacher} --steps {t},{b_more},{d_half}"],
    ),
    "mask-quality": (
        "only pseudo-labels with a mean mask probability of at least 0.9 (PL-DC)",
        ["distill.py --teacher {teacher} --mask-threshold 0.9"],
    ),
    "no-duplicates": (
        "mask NMS on pseudo-labels, IoU threshold 0.5",
        ["distill.py --teacher-checkpoint {teacher} --mask-nms-iou 0.5"],
    ),
    "no-duplicates-0.7": (
        "score threshold 0.7 and mask NMS",
        ["distill.py --teacher-checkpoint {teacher} --mask-nms-iou 0.5 --score-threshold 0.7"],
    ),
    "fine-masks": (
        "pseudo-label masks at full resolution",
        ["distill.py --teacher-checkpoint {teacher} --full-res-masks"],
    ),
    "clean": (
        "mask NMS, and pseudo-label masks at full resolution",
        ["distill.py --teacher-checkpoint {teacher} --mask-nms-iou 0.5 --full-res-masks"],
    ),
    "clean-refined": (
        "`clean`, then fine-tuning as in `refined`",
        [
            "distill.py --supervised-only --init-from {clean} --lr 1e-4 --steps {finetune} "
            "--mask-nms-iou 0.5 --full-res-masks",
        ],
    ),
    "clean-0.7": (
        "score threshold 0.7, mask NMS, and pseudo-label masks at full resolution",
        [
            "distill.py --teacher-checkpoint {teacher} --mask-nms-iou 0.5 --full-res-masks "
            "--score-threshold 0.7"
        ],
    ),
    "pixel-weights": (
        "mask BCE weighted by the teacher's confidence in each pixel (PL-DC)",
        ["distill.py --teacher {teacher} --pixel-weights"],
    ),
    "soft-weights": (
        "score threshold 0.5, losses weighted by the score to the power of 4 (PAIS)",
        ["distill.py --teacher {teacher} --score-threshold 0.5 --score-power 4"],
    ),
    # The same as --finetune-steps, but it starts from the checkpoint of another recipe: nothing is run twice.
    "refined": (
        "fine-tuning (CAST): a third of phase 3 more, on labels only, at a tenth of the learning rate",
        ["distill.py --supervised-only --init-from {distilled} --lr 1e-4 --steps {finetune}"],
    ),
    "labels-only-refined": (
        "labels only, for the steps of all phases, then the same fine-tuning",
        ["distill.py --supervised-only --init-from {labels} --lr 1e-4 --steps {finetune}"],
    ),
    "more-distillation": (
        "phase 3 longer by a third",
        ["distill.py --student-checkpoint {student} --steps {t},{b},{d_third_more}"],
    ),
    "restarted": (
        "like fine-tuning, but with pseudo-labels: a third of phase 3 more, at a tenth of the learning rate",
        ["distill.py --student-checkpoint {distilled} --lr 1e-4 --steps {t},1,{third}"],
    ),
    "robust": ("the recipe `robust`", ["distill.py --teacher-checkpoint {teacher} --recipe robust"]),
    "robust-min-area": (
        "the recipe `robust`, and a minimum area of 0.1 % of the crop",
        ["distill.py --teacher-checkpoint {teacher} --recipe robust --min-area 0.001"],
    ),
    "labels-as-long": (
        "labels only, for the steps of all phases and a third of phase 3 more",
        ["distill.py --supervised-only --steps {t},{b},{d_third_more}"],
    ),
    "labels-as-many": (
        "labels only, for as many labeled images as the student sees",
        ["distill.py --supervised-only --steps {student_steps}"],
    ),
}
# Single changes of guided burn-in, which ends with the learning rate at zero.
BURN_IN = "burnin.py --teacher-checkpoint {teacher} --steps {t},{b},1"
CLEAN = "--mask-nms-iou 0.5 --full-res-masks true"
VIEW = f"{CLEAN} --strong-view color,noise,cutmix"
COPY = f"{VIEW} --student-from-teacher true"
HALF = "--unsupervised-weight 0.5"
for name, description, flags in [
    ("paper", "the paper's rule", ""),
    ("labels", "unguided: labels only", "--unsupervised-weight 0"),
    ("nms", "mask NMS", "--mask-nms-iou 0.5"),
    ("masks", "full-resolution masks", "--full-res-masks true"),
    ("clean", "mask NMS and full-resolution masks", CLEAN),
    ("view", "mask NMS, full-resolution masks, and a strong view with noise and CutMix", VIEW),
    ("noise", "as `burn-in-clean`, and a strong view with noise", f"{CLEAN} --strong-view color,noise"),
    ("cutmix", "as `burn-in-clean`, and a strong view with CutMix", f"{CLEAN} --strong-view color,cutmix"),
    ("erase", "as `burn-in-view`, and random erasing", f"{VIEW},erase"),
    ("turn", "as `burn-in-view`, and quarter turns", f"{VIEW},turn"),
    ("copy", "as `burn-in-view`, and the student starts as a copy", COPY),
    ("weight-0.5", "as `burn-in-copy`, with an unsupervised weight of 0.5", f"{COPY} {HALF}"),
    ("threshold-0.9", "as `burn-in-view`, and a score threshold of 0.9", f"{VIEW} --score-threshold 0.9"),
    ("min-area", "as `burn-in-view`, and a minimum area of 0.1 % of the crop", f"{VIEW} --min-area 0.001"),
]:  # fmt: skip
    RECIPES[f"burn-in-{name}"] = (f"guided burn-in alone: {description}", [f"{BURN_IN} {flags}".strip()])
# Recipes that were measured with an earlier version. Their options are gone, so they cannot be run, and their
# commands above are those of that version.
REMOVED = ("mask-quality", "pixel-weights", "soft-weights")
LAST_COMMIT_OF_REMOVED = "5b0a3ca"
RUNNABLE = [recipe for recipe in RECIPES if recipe not in REMOVED]
# Recipes that repeat another one on a dataset, because their threshold is the default there.
DUPLICATES = {("shapes", "threshold-0.9")} | {
    ("tiles", recipe)
    for recipe in ("threshold-0.7", "lower-later", "unguided-lower-later", "no-duplicates-0.7", "clean-0.7")
}
# The short experiment of --quick.
QUICK = {"data": ["shapes", "cells"], "ratio": [0.05], "seeds": [0, 1]}
QUICK |= {"recipes": ["paper", "robust", "labels-as-long"]}


def step_numbers(t: int, b: int, d: int) -> dict:
    """Return the numbers in the commands of RECIPES, from the steps of the three phases."""
    numbers = {"t": t, "b": b, "d": d, "whole": b + d - 1}
    # --supervised-only trains three times as long as one number of --steps: a third of phase 3 in all.
    numbers["finetune"] = max(1, d // 9)
    numbers["third"] = 3 * numbers["finetune"]
    numbers["d_third_more"] = d + numbers["third"]
    # --supervised-only trains three times --steps.
    numbers["student_steps"] = math.ceil((b + d) / 3)
    return numbers | {"b_half": b // 2, "d_more": d + b - b // 2, "d_half": d // 2, "b_more": b + d - d // 2}


def command(text: str, data: str, ratio: float, seed: int, steps: tuple, own: Path) -> str:
    """Complete a command of RECIPES for a run in the folder `own`. The flags of the recipe come last, so that
    they override those of the dataset."""
    t, b, d = steps
    paths = {"own": own} | {name: own.parent / place for name, place in STARTS.items()}
    paths = {name: shlex.quote(str(path)) for name, path in paths.items()}
    script, _, flags = text.format(**paths, **step_numbers(t, b, d)).partition(" ")
    flags += "" if "--steps" in flags else f" --steps {t},{b},{d}"
    flags += "" if "--out" in flags else f" --out {paths['own']}"
    data_flags = DATA[data][0].replace("RATIO", f"{ratio:g}").replace("SEED", str(seed))
    return f"{script} {data_flags} --ratio {ratio:g} --seed {seed} {flags.strip()}"
