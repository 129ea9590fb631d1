"""--preset auto: choose the options of a run from the images and the machine.

    facts = measure_facts(train, labeled, device)
    choices = choose_options(facts, given={"crop": (512, 512)})    # {"lr": (1e-3, "for a small model"), ...}

Every choice has a reason, which the banner prints. An option that was given as a flag is not chosen, and
the choices that depend on it follow it."""

import math
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from pycocotools import mask as rle_tools

from data import CocoDataset, encode_rle, stable_seed
from training.config import RECIPES, Config
from training.distributed import Env, all_reduce_mean, autocast, num_objects, to_device, world_size

MAX_IMAGES = 500  # whose objects are measured
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


class Crops(NamedTuple):
    """The crops that --preset auto chooses from, sides in pixels.

    object_side: of the median object in a crop; masks are predicted at a quarter of it. smallest, largest: of
    crops that show a whole image. window: of crops that show a window, where a whole image would need a crop
    larger than `whole`."""

    object_side: int
    smallest: int
    whole: int
    largest: int
    window: int


CPU_CROPS = Crops(object_side=14, smallest=160, whole=160, largest=320, window=96)
GPU_CROPS = Crops(object_side=32, smallest=256, whole=1024, largest=1024, window=512)


@dataclass(frozen=True)
class Facts:
    """The facts that the choices depend on.

    long_side: median longer side of the images, pixels. object_side: median of the square root of an object's
    area, relative to the longer side of its image; large_object_side: 95th percentile. num_objects: 99th
    percentile and maximum of the objects of an image. boxes: `object_boxes` of each image. gpu_memory: GiB of
    this process's GPU, 0 on a CPU. num_processes: processes in all. num_local: processes of this machine,
    which share its num_cores."""

    long_side: int
    object_side: float
    large_object_side: float
    num_objects: tuple[int, int]
    num_labeled: int
    boxes: tuple[np.ndarray, ...] = ()
    gpu_memory: float = 0.0
    num_processes: int = 1
    num_local: int = 1
    num_cores: int = 2


def measure_facts(train: CocoDataset, labeled: list, device: torch.device) -> Facts:
    """Measure the labeled images (at most MAX_IMAGES of them) and the machine."""
    sample = sample_images(train, labeled)
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
        large_object_side=float(np.percentile(sides, 95)),
        num_objects=(int(np.percentile(counts, 99, method="higher")), max(counts)),
        num_labeled=len(labeled),
        boxes=tuple(object_boxes(train, image_id) for image_id in sample),
        gpu_memory=torch.cuda.get_device_properties(device).total_memory / 2**30 if on_gpu else 0.0,
        num_processes=world_size(),
        num_local=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        num_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    )


def sample_images(train: CocoDataset, labeled: list) -> list:
    """Return at most MAX_IMAGES of the labeled images with objects, always the same ones."""
    with_objects = [image_id for image_id in labeled if train.objects(image_id)]
    return sorted(with_objects, key=lambda image_id: stable_seed("facts", image_id))[:MAX_IMAGES]


def object_boxes(train: CocoDataset, image_id) -> np.ndarray:
    """Return the boxes of the objects of an image (N, 4): left, top, width, height in pixels."""
    rles = [encode_rle(o["segmentation"], *train.size(image_id)) for o in train.objects(image_id)]
    return rle_tools.toBbox(rles)


def count_in_windows(boxes: Iterable[np.ndarray], side: float) -> list[int]:
    """Count the objects that a window of side x side pixels shows, for windows around the objects of each
    image (around every k-th, so that there are fewer than 2,000). boxes: `object_boxes` of each image."""
    counts = []
    for image_boxes in boxes:
        start, size = image_boxes[:, :2], image_boxes[:, 2:]
        center = (start + size / 2)[:: max(1, len(size) // 1000)]
        left, right = center - side / 2, center + side / 2
        shown = (start[None] < right[:, None]) & ((start + size)[None] > left[:, None])  # window, object, 2
        counts += shown.all(2).sum(1).tolist()
    return counts


def choose_tile(facts: Facts, crops: Crops) -> int:
    """Return the side of windows, in pixels of an image; 0 for whole images, if they fit a crop in which
    objects are large enough, or if the large objects are larger than half a window."""
    enlargement = min(crops.object_side / (facts.object_side * facts.long_side), 2)
    tile = max(32, 32 * round(crops.window / enlargement / 32))
    whole_fits = enlargement * facts.long_side <= crops.whole
    return 0 if whole_fits or facts.large_object_side * facts.long_side > tile / 2 else tile


def choose_side(facts: Facts, crops: Crops) -> int:
    """Return the side of a crop of a whole image: large enough for small objects, but an image is enlarged
    by a factor of 2 at most."""
    side = crops.object_side / facts.object_side
    side = max(side, facts.long_side) if facts.gpu_memory else side  # A GPU has time for all pixels.
    side = min(max(side, crops.smallest), crops.largest, 2 * facts.long_side)
    return max(64, 32 * math.ceil(side / 32))


def choose_options(facts: Facts, given: dict, start: dict | None = None) -> dict[str, tuple]:
    """Choose the options that are not given.

    start: the arguments of the model of the checkpoint that the run starts from, if any. They are kept,
    unless another backbone is given.
    Returns {name: (value, reason)} in the order of the banner."""
    choices, stored = {}, dict(start or {})
    if given.get("backbone", stored.get("backbone")) != stored.get("backbone"):
        stored = {}
    from_checkpoint = bool(stored)

    def choose(name, value, reason):
        if name in given:
            return given[name]
        choices[name] = (value, reason)
        return value

    on_gpu = facts.gpu_memory > 0
    small = not on_gpu and (not from_checkpoint or stored.get("hidden_dim", 256) < 256)
    long_side, object_side = facts.long_side, facts.object_side
    as_stored = "as in the checkpoint that the run starts from"
    if from_checkpoint:
        choose("backbone", stored.pop("backbone"), as_stored)
    else:
        backbone = "resnet50" if on_gpu else "resnet18"
        choose("backbone", backbone, "the paper's" if on_gpu else "a small one, for a CPU")
    pretrained = choose("pretrained", "true", "few labels need a pretrained backbone")
    if from_checkpoint:
        norm = choose("norm", stored.pop("norm", "frozen"), as_stored)
    else:
        group, frozen = ("group", "for training from scratch"), ("frozen", "keeps the pretrained statistics")
        norm = choose("norm", *(group if pretrained == "false" else frozen))
    stored_queries = stored.pop("num_queries", None)
    stored.pop("num_classes", None)
    if stored:
        choices["model_args"] = ({**stored, **given.get("model_args", {})}, as_stored)
    elif small and not from_checkpoint:
        model_args = {**SMALL_MODEL, **given.get("model_args", {})}
        choices["model_args"] = (model_args, "a narrow and shallow model, for a CPU")

    # Small objects need large crops. Where the whole image would need too large a one, crops are windows.
    crops = GPU_CROPS if on_gpu else CPU_CROPS
    if "crop" in given:
        side = min(given["crop"])
        crops = crops._replace(smallest=side, whole=side, largest=side, window=side)
    pixels = f"the median object is {object_side * long_side:.0f} pixels wide in an image of {long_side}"
    tile = 0 if given.get("short_sides") else choose_tile(facts, crops)
    tile = choose("tile", tile, f"windows of it, as {pixels}" if tile else "a crop shows a whole image")
    side = crops.window if tile else choose_side(facts, crops)
    fits = tile or long_side  # pixels of an image that fit a crop
    crop = choose("crop", (side, side), f"{pixels}, {object_side * long_side / fits * side:.0f} in a crop")
    fit = min(crop)
    jitter = (0.5, 1.5) if on_gpu else (0.7, 1.3)
    shown = "a window" if tile else "an image"
    choose("lsj_scale", jitter, f"around the scale at which {shown} fits the crop")
    choose("test_size", (fit, fit), "the scale of the crops")

    (most, maximum), place = facts.num_objects, "images"
    if tile:
        counts = count_in_windows(facts.boxes, tile / min(jitter))
        most, maximum, place = int(np.percentile(counts, 99, method="higher")), max(counts), "windows"
    queries = 10 * math.ceil(1.5 * most / 10)
    queries = min(max(queries, 100 if on_gpu else 20), 300)
    numbers = f"99 % of the {place} have at most {most} objects, the largest number is {maximum}"
    choose("num_queries", stored_queries or queries, as_stored if stored_queries else numbers)
    points = int(min(max(crop[0] * crop[1] / 25, 1024), 12544))
    choose("num_points", points, "one per 25 pixels of a crop, at least 1,024 and at most the paper's 12,544")

    if on_gpu:
        room = 0.8 * facts.gpu_memory / (2 * GIB_PER_MEGAPIXEL * crop[0] * crop[1] / 2**20)
        batch = facts.num_processes * max(1, min(int(room), math.ceil(16 / facts.num_processes)))
        reason = (
            f"{facts.num_processes} x {facts.gpu_memory:.0f} GiB of GPU memory, "
            f"crops of {crop[0]} x {crop[1]}"
        )
    else:
        images = 8 if crop[0] * crop[1] <= 160**2 else 4
        batch = facts.num_processes * max(1, math.ceil(images / facts.num_processes))
        reason = f"labeled, and as many unlabeled images per step: few on a CPU, with crops of {fit}"
    batch = choose("batch", batch, reason)
    workers = max(0, min(8, facts.num_cores // facts.num_local // 2 - (0 if on_gpu else 1)))
    choose("workers", workers, f"{facts.num_cores} cores")

    steps_of_100_epochs = round(100 * facts.num_labeled / batch)
    if on_gpu:
        first = int(np.clip(steps_of_100_epochs, 2000, 25_000))
        steps = first, 2 * first, 4 * first
        reason = (
            f"100 epochs of the {facts.num_labeled} labeled images, at least 2,000; 2 and 4 times as many"
        )
    else:
        # Windows show fewer objects than an image, and there are more of them.
        steps = (1500, 2000, 2000) if tile else (1000, 1500, 1500)
        reason = "enough for a small model" if small else "for a CPU"
    steps = choose("steps", steps, reason)
    steps = steps * 3 if len(steps) == 1 else steps
    for name, value in RECIPES["robust"].items():
        choose(name, value, "recipe robust")
    if not on_gpu:
        if small:
            choose("precision", "fp32", "bf16 does not speed up a model this small")
        if "steps" not in given:
            choose("hours", 2.5, "for all phases on a CPU: fewer steps if they take longer")

    if small:
        choose("lr", 1e-3, "for a small model and a short run")
        choose("clip_grad_norm", 1.0, "goes with the learning rate")
    else:
        choose("lr", round(1e-4 * math.sqrt(batch / 16), 8), "the paper's 1e-4 for 16 images, times sqrt(k)")
    choose("schedule", "cosine", "for short runs")
    choose("ema_decay", ema_decay(steps[2]), "averages over half of the last phase at most")
    threshold, reason = (0.9, "for training from scratch") if norm == "group" else (0.7, "the paper's")
    choose("score_threshold", threshold, reason)
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
    # Within the limit of --preset auto, the supervised baseline has the steps that guided phases would have.
    guided = 1.0 if cfg.supervised_only and "hours" in cfg.given else GUIDED_STEP_COST
    fixed = cfg.finetune_steps if "finetune_steps" in cfg.given else 0
    available = 0.9 * 3600 * cfg.hours / seconds - fixed  # the rest is for evaluation
    factor = max(available, 0) / (t + guided * (b + d) + cfg.finetune_steps - fixed)
    if factor >= 1 and "hours" not in cfg.given:
        return {}
    steps = tuple(max(1, round(factor * number)) for number in cfg.steps)
    fitted = {"steps": steps}
    if cfg.finetune_steps:
        fitted["finetune_steps"] = math.ceil(factor * cfg.finetune_steps)
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
