"""--preset auto: choose the options of a run from the images and the machine.

    facts = measure_facts(train, labeled, num_unlabeled, device)
    choices = choose_options(facts, given={"crop": (512, 512)})    # {"lr": (5e-4, "for a small model"), ...}

Every choice has a reason, which the banner prints. An option that was given as a flag is not chosen, and
the choices that depend on it follow it."""

import math
import os
import time
from dataclasses import dataclass

import numpy as np
import torch
from pycocotools import mask as rle_tools

from data import CocoDataset, encode_rle, stable_seed
from training.config import Config
from training.distributed import Env, all_reduce_mean, autocast, num_objects, to_device, world_size

MAX_IMAGES = 500  # whose objects are measured
OBJECT_SIDE = 16  # pixels that the median object should have in a crop on a CPU; a mask has a quarter of them
GUIDED_STEP_COST = 2.2  # times a step on labels: twice the images for the student, and the teacher
GIB_PER_MEGAPIXEL = 2.2  # of a training image, ResNet-50 in bf16 (benchmarks/RESULTS.md, "On a GPU")
# A model for a CPU: about a third of the paper's width and depth, with one encoder layer of six.
SMALL_MODEL = {
    "hidden_dim": 96,
    "encoder_layers": 1,
    "encoder_ffn": 192,
    "decoder_layers": 3,
    "decoder_ffn": 192,
}


@dataclass(frozen=True)
class Facts:
    """The facts that the choices depend on.

    long_side: median longer side of the images, pixels. object_side: median of the square root of an
    object's area, relative to the longer side of its image. num_objects: 99th percentile and maximum of the
    objects of an image. gpu_memory: GiB of this process's GPU, 0 on a CPU. num_gpus: processes in all.
    num_local: processes of this machine, which share its num_cores."""

    long_side: int
    object_side: float
    num_objects: tuple[int, int]
    num_labeled: int
    num_unlabeled: int
    gpu_memory: float = 0.0
    num_gpus: int = 1
    num_local: int = 1
    num_cores: int = 2


def measure_facts(train: CocoDataset, labeled: list, num_unlabeled: int, device: torch.device) -> Facts:
    """Measure the labeled images (at most MAX_IMAGES of them) and the machine."""
    with_objects = [image_id for image_id in labeled if train.objects(image_id)]
    sample = sorted(with_objects, key=lambda image_id: stable_seed("facts", image_id))[:MAX_IMAGES]
    sides = []
    for image_id in sample:
        H, W = train.size(image_id)
        areas = [float(rle_tools.area(encode_rle(o["segmentation"], H, W))) for o in train.objects(image_id)]
        sides += [math.sqrt(area) / max(H, W) for area in areas]
    counts = [len(train.labels(image_id)) for image_id in labeled]
    on_gpu = device.type == "cuda"
    return Facts(
        long_side=int(np.median([max(train.size(image_id)) for image_id in sample])),
        object_side=float(np.median(sides)),
        num_objects=(int(np.percentile(counts, 99)), max(counts)),
        num_labeled=len(labeled),
        num_unlabeled=num_unlabeled,
        gpu_memory=torch.cuda.get_device_properties(device).total_memory / 2**30 if on_gpu else 0.0,
        num_gpus=world_size(),
        num_local=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        num_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    )


def choose_options(facts: Facts, given: dict) -> dict[str, tuple]:
    """Choose the options that are not given. Returns {name: (value, reason)} in the order of the banner."""
    choices = {}

    def choose(name, value, reason):
        if name in given:
            return given[name]
        choices[name] = (value, reason)
        return value

    on_gpu = facts.gpu_memory > 0
    long_side, object_side = facts.long_side, facts.object_side
    starts_from_model = given.get("init_from") or given.get("student_checkpoint")
    if not starts_from_model:
        backbone = "resnet50" if on_gpu else "resnet18"
        choose("backbone", backbone, "the paper's" if on_gpu else "a small one, for a CPU")
    pretrained = choose("pretrained", True, "few labels need a pretrained backbone")
    pretrained = pretrained or bool(given.get("backbone_weights")) or bool(given.get("init_from"))
    norm_reason = "keeps the pretrained statistics" if pretrained else "for training from scratch"
    choose("norm", "frozen" if pretrained else "group", norm_reason)
    if not on_gpu and not starts_from_model:
        small = {**SMALL_MODEL, **given.get("model_args", {})}
        choices["model_args"] = (small, "a narrow and shallow model, for a CPU")

    # Small objects need a larger crop, but an image is enlarged twice at most.
    shortest, longest, wanted = (256, 1024, 2 * OBJECT_SIDE) if on_gpu else (160, 320, OBJECT_SIDE)
    side = wanted / object_side if not on_gpu else max(long_side, wanted / object_side)
    side = min(max(side, shortest), longest, 2 * long_side)
    side = max(64, 32 * math.ceil(side / 32))
    pixels = f"the median object is {object_side * long_side:.0f} pixels wide in an image of {long_side}"
    crop = choose("crop", (side, side), f"{pixels}, {object_side * side:.0f} in a crop")
    fit = min(crop)
    jitter = (0.5, 1.5) if on_gpu else (0.7, 1.3)
    choose("lsj_scale", jitter, "around the scale at which an image fits the crop")
    choose("test_size", (fit, fit), "the scale of the crops")
    pixels = object_side * fit
    choose("full_res_masks", pixels < 48, f"the median object is {pixels:.0f} pixels wide in a crop")

    most, maximum = facts.num_objects
    queries = 10 * math.ceil(1.5 * most / 10)
    queries = min(max(queries, 100 if on_gpu else 20), 300)
    choose(
        "num_queries",
        queries,
        f"99 % of the images have at most {most} objects, the largest number is {maximum}",
    )
    points = int(min(max(crop[0] * crop[1] / 25, 1024), 12544))
    choose("num_points", points, "one for 25 pixels of a crop, at most the paper's number")

    if on_gpu:
        room = 0.8 * facts.gpu_memory / (2 * GIB_PER_MEGAPIXEL * crop[0] * crop[1] / 2**20)
        batch = facts.num_gpus * max(1, min(int(room), math.ceil(16 / facts.num_gpus)))
        reason = (
            f"{facts.num_gpus} x {facts.gpu_memory:.0f} GiB of GPU memory, crops of {crop[0]} x {crop[1]}"
        )
    else:
        images = 8 if crop[0] * crop[1] <= 160**2 else 4
        batch = facts.num_gpus * max(1, math.ceil(images / facts.num_gpus))
        reason = f"labeled, and as many unlabeled images per step: few on a CPU, with crops of {fit}"
    batch = choose("batch", batch, reason)
    workers = max(0, min(8, facts.num_cores // facts.num_local // 2 - (0 if on_gpu else 1)))
    choose("workers", workers, f"{facts.num_cores} cores")

    epochs = round(100 * facts.num_labeled / batch)
    if on_gpu:
        first = int(np.clip(epochs, 2000, 25_000))
        steps = first, 2 * first, 4 * first
        reason = (
            f"100 epochs of the {facts.num_labeled} labeled images, at least 2,000; 2 and 4 times as many"
        )
    else:
        steps, reason = (1000, 1500, 1500), "enough for a small model"
    steps = choose("steps", steps, reason)
    steps = steps * 3 if len(steps) == 1 else steps
    if not given.get("supervised_only"):
        choose("finetune_steps", max(1, steps[2] // 3), "a third of the last phase, on labels alone")
    if not on_gpu:
        choose("precision", "fp32", "bf16 does not speed up a model this small")
        if "steps" not in given:
            choose("hours", 2.5, "for all phases on a CPU: fewer steps if they take longer")

    if on_gpu:
        choose("lr", round(1e-4 * math.sqrt(batch / 16), 8), "the paper's 1e-4 for 16 images, times sqrt(k)")
    else:
        choose("lr", 5e-4, "for a small model and a short run")
        choose("clip_grad_norm", 1.0, "goes with the learning rate")
    choose("schedule", "cosine", "for short runs")
    choose("ema_decay", ema_decay(steps[2]), "averages over half of the last phase at most")
    threshold = 0.7 if pretrained else 0.9
    choose("score_threshold", threshold, "the paper's" if pretrained else "for training from scratch")
    choose("mask_nms_iou", 0.5, "no object twice among pseudo-labels")
    choose("save_every", 1000 if on_gpu else 100, "some minutes")
    return choices


def ema_decay(steps: int) -> float:
    """Return the decay at which the EMA teacher averages over about half of `steps`, at most the paper's."""
    return round(min(0.9996, 1 - 2 / max(steps, 4)), 5)


def fit_steps(cfg: Config, seconds: float) -> dict:
    """Return the steps, and the options that follow them, that take cfg.hours if a step on labels takes
    `seconds`. {} if cfg.hours is a limit of --preset auto that is kept already."""
    t, b, d = cfg.steps
    t = 0 if cfg.teacher_checkpoint or cfg.student_checkpoint else t
    b = 0 if cfg.student_checkpoint else b
    guided = 1.0 if cfg.supervised_only else GUIDED_STEP_COST
    total = seconds * (t + guided * (b + d) + cfg.finetune_steps)
    factor = 0.9 * 3600 * cfg.hours / total  # the rest is for evaluation
    if factor >= 1 and "hours" not in cfg.given:
        return {}
    steps = tuple(max(1, round(factor * number)) for number in cfg.steps)
    fitted = {"steps": steps, "finetune_steps": math.ceil(factor * cfg.finetune_steps)}
    if cfg.preset == "auto":
        fitted["ema_decay"] = ema_decay(steps[2])
    return {name: value for name, value in fitted.items() if name not in cfg.given}


def measure_step_seconds(model, optimizer, batches, criterion, env: Env, steps: int = 10) -> float:
    """Time steps on labels with a throwaway model: the median of `steps`, the same on all ranks."""
    times = []
    for _ in range(steps + 2):
        started = time.perf_counter()
        x = to_device(next(batches), env)
        with autocast(env):
            outputs = model(x["image"])
        loss = sum(criterion(outputs, x["targets"], num_objects(x["targets"], env)).values())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        loss.detach().item()  # waits for a GPU
        times.append(time.perf_counter() - started)
    return float(all_reduce_mean(torch.tensor(float(np.median(times[2:])), device=env.device)))
