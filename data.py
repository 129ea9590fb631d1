"""Every dataset as COCO JSON: reading, the split into labelled and unlabelled images, weak and strong
views, and endless streams of batches.

    train, val = load_data("shapes")                         # or "coco", or the folder of a dataset
    labelled = labelled_split(train.image_ids, ratio=0.1, seed=0)
    batches = stream(Views(train, View(crop=(96, 96))), labelled, batch=8, seed=seed_of(0, "labelled"))
    batch = next(batches)                                    # [{"image", "labels", "masks"}] * 8

Nothing here draws from a global random generator: the view of an image is a function of the stream's seed
and the position in the stream, so neither the number of workers nor a restart changes it. This file needs
torch, torchvision, numpy, Pillow and pycocotools and can be copied out alone.

Letters in shapes: N objects of one image, H W pixels."""

import colorsys
import hashlib
import itertools
import json
import math
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from pycocotools import mask as rle_tools
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as TF

GREY = 128  # what lies outside an image within a crop


def seed_of(*key) -> int:
    """A 63-bit seed from any plain values: the same on every machine, in every process, in any order of
    calls."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


# --------------------------------------------------------------------------------------------------- reading


class CocoDataset:
    """Images and instance masks of one COCO JSON file.

    image_ids: ascending. class_names, category_ids: label k is the k-th category in the order of ids, which
    may have gaps. Images without annotations are images like any other. Crowd regions are kept apart: they
    are no training targets. Raises ValueError for a file that is missing or not of this form."""

    def __init__(self, json_file, image_folder):
        self.json_file, self.image_folder = Path(json_file), Path(image_folder)
        if not self.json_file.is_file():
            raise ValueError(f"no annotation file {str(json_file)!r}")
        try:
            content = json.loads(self.json_file.read_text(encoding="utf-8"))
            categories = sorted(content["categories"], key=lambda category: category["id"])
            self.category_ids = [category["id"] for category in categories]
            self.class_names = [category["name"] for category in categories]
            self.images = {image["id"]: image for image in content["images"]}
            self.image_ids = sorted(self.images)
            self.annotations = {image_id: [] for image_id in self.image_ids}
            self.label_of = {category_id: label for label, category_id in enumerate(self.category_ids)}
            for annotation in content["annotations"]:
                self.annotations[annotation["image_id"]].append(annotation)
                self.label_of[annotation["category_id"]], annotation["segmentation"]  # a KeyError if missing
            for image in self.images.values():
                image["height"], image["width"], image["file_name"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{json_file} is not a COCO instances file: {error!r}") from None
        missing = [image["file_name"] for image in self.images.values() if not self.path(image).is_file()]
        if missing:
            raise ValueError(
                f"{len(missing)} images of {json_file} are not in {image_folder}: {missing[0]!r}"
            )

    def __len__(self) -> int:
        return len(self.image_ids)

    def path(self, image: dict) -> Path:
        return self.image_folder / image["file_name"]

    def size(self, image_id) -> tuple[int, int]:
        """(H, W)"""
        return self.images[image_id]["height"], self.images[image_id]["width"]

    def image(self, image_id) -> Image.Image:
        return Image.open(self.path(self.images[image_id])).convert("RGB")

    def objects(self, image_id) -> list[dict]:
        """The annotations of an image that are single objects, not crowds."""
        return [annotation for annotation in self.annotations[image_id] if not annotation.get("iscrowd")]

    def labels(self, image_id) -> list[int]:
        return [self.label_of[annotation["category_id"]] for annotation in self.objects(image_id)]


def to_rle(segmentation, height: int, width: int) -> dict:
    """A polygon list, an uncompressed or a compressed RLE -> compressed RLE of (height, width)."""
    if isinstance(segmentation, list):
        polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
        return rle_tools.merge(rle_tools.frPyObjects(polygons or [[0.0] * 6], height, width))
    if isinstance(segmentation["counts"], list):
        return rle_tools.frPyObjects(segmentation, height, width)
    return segmentation


def load_data(data: str, root: str | None = None) -> tuple[CocoDataset, CocoDataset]:
    """The training and the validation set of `data`: "shapes", "coco", or the path of a folder. root: where
    COCO lies, or where shapes is written (default: datasets). Raises ValueError for anything else."""
    if data == "shapes":
        folder = Path(root or "datasets") / "shapes"
        if not folder.exists():
            write_shapes(folder)
    elif data == "coco":
        root = Path(root or "datasets/coco")
        return tuple(
            CocoDataset(root / f"annotations/instances_{part}2017.json", root / f"{part}2017")
            for part in ("train", "val")
        )
    else:
        folder = Path(data)
        if not folder.is_dir():
            raise ValueError(f"--data {data!r} is neither shapes, coco nor a folder that exists")
    return tuple(
        CocoDataset(folder / f"instances_{part}.json", folder / "images") for part in ("train", "val")
    )


def labelled_split(image_ids, ratio: float, seed: int) -> list:
    """The labelled share of a training set, a function of (seed, ratio, image ids) alone and nested: the
    images of 1 % are among those of 2 %."""
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio {ratio} must be in (0, 1]: 0.05 is 5 %")
    order = sorted(image_ids, key=lambda image_id: seed_of(seed, "split", image_id))
    return sorted(order[: max(1, round(ratio * len(order)))])


def split_hash(image_ids) -> str:
    """Eight letters that tell two splits apart."""
    return hashlib.sha256(repr(sorted(image_ids)).encode()).hexdigest()[:8]


# ----------------------------------------------------------------------------------------------------- views


@dataclass(frozen=True)
class View:
    """How a training crop is taken: large-scale jitter (Ghiasi et al., CVPR 2021, arXiv 2012.07177), or a
    shortest side, then crop and flip.

    crop: (H, W) of the result, multiples of 32. scale: the image is first resized to fit the crop times a
    factor drawn from this range. short_side: instead, it is resized so that its shorter side is one of
    these lengths. flip: mirror half of the images.
    colour: a photometric jitter of the weak view after SSD (arXiv 1512.02325, section 3.6), with brightness
    as a factor. blur: sigmas of the strong view, in pixels."""

    crop: tuple[int, int]
    scale: tuple[float, float] = (0.1, 2.0)
    short_side: tuple[int, ...] = ()
    flip: bool = True
    colour: bool = False
    blur: tuple[float, float] = (0.1, 2.0)

    def __post_init__(self):
        if len(self.crop) != 2 or any(side % 32 or side < 32 for side in self.crop):
            raise ValueError(f"a crop is height and width, multiples of 32, found {self.crop}")


@dataclass(frozen=True)
class Geometry:
    """One way to cut a crop: the image (H, W) is resized to `resized`, the window at (top, left) of size
    `window` is cut out, mirrored if `flip`, and laid into the upper left corner of `crop`."""

    resized: tuple[int, int]
    top: int
    left: int
    window: tuple[int, int]
    flip: bool
    crop: tuple[int, int]

    @staticmethod
    def draw(view: View, H: int, W: int, rng: np.random.Generator) -> "Geometry":
        if view.short_side:
            factor = rng.choice(view.short_side) / min(H, W)
        else:
            factor = rng.uniform(*view.scale) * min(view.crop[0] / H, view.crop[1] / W)
        resized = max(1, round(H * factor)), max(1, round(W * factor))
        window = min(resized[0], view.crop[0]), min(resized[1], view.crop[1])
        top, left = (int(rng.integers(0, r - w + 1)) for r, w in zip(resized, window))
        return Geometry(resized, top, left, window, view.flip and rng.random() < 0.5, view.crop)

    def cut(self, image: Image.Image, resample=Image.Resampling.BILINEAR) -> Image.Image:
        """The window of an image; only what is kept is resized."""
        y, x = image.height / self.resized[0], image.width / self.resized[1]
        (h, w), top, left = self.window, self.top, self.left
        image = image.resize((w, h), resample, box=(left * x, top * y, (left + w) * x, (top + h) * y))
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flip else image

    def image(self, image: Image.Image) -> Image.Image:
        canvas = Image.new("RGB", self.crop[::-1], (GREY,) * 3)
        canvas.paste(self.cut(image))
        return canvas

    def mask(self, segmentation, H: int, W: int) -> np.ndarray:
        """A segmentation of the image (H, W) in any COCO form -> its mask in the crop, bool."""
        if isinstance(segmentation, list):  # move the corners, then rasterise once
            polygons = []
            for polygon in segmentation:
                corners = np.asarray(polygon, dtype=np.float64).reshape(-1, 2)
                corners = corners * (self.resized[1] / W, self.resized[0] / H) - (self.left, self.top)
                if self.flip:
                    corners[:, 0] = self.window[1] - corners[:, 0]
                polygons.append(corners.flatten().tolist())
            mask = rle_tools.decode(to_rle(polygons, *self.crop)).astype(bool)
            mask[self.window[0] :] = mask[:, self.window[1] :] = False  # of a polygon that leaves its image
            return mask
        full = Image.fromarray(rle_tools.decode(to_rle(segmentation, H, W)))
        mask = np.zeros(self.crop, dtype=bool)
        mask[: self.window[0], : self.window[1]] = np.asarray(self.cut(full, Image.Resampling.NEAREST))
        return mask


def strong_view(image: Image.Image, rng: np.random.Generator, blur=(0.1, 2.0)) -> Image.Image:
    """Colour jitter, grey, blur: nothing that moves a pixel, so that masks of the weak view fit. As in
    SimCLR (arXiv 2002.05709, appendix A) with the strengths of the paper: (.4, .4, .4, .1) with p .8, grey
    with p .2, blur with p .5."""
    if rng.random() < 0.8:
        image = colour_jitter(image, rng, 0.4, 0.4, 0.4, 0.1)
    if rng.random() < 0.2:
        image = image.convert("L").convert("RGB")
    if rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(*blur)))
    return image


def colour_jitter(image, rng, brightness, contrast, saturation, hue, probability=1.0):
    """Factors of 1 +- the given strengths and a turn of the hue by +- its strength, each with the given
    probability, in random order."""
    changes = [
        (TF.adjust_brightness, 1 + rng.uniform(-brightness, brightness)),
        (TF.adjust_contrast, 1 + rng.uniform(-contrast, contrast)),
        (TF.adjust_saturation, 1 + rng.uniform(-saturation, saturation)),
        (TF.adjust_hue, rng.uniform(-hue, hue)),
    ]
    for index in rng.permutation(len(changes)):
        adjust, strength = changes[index]
        if probability == 1 or rng.random() < probability:
            image = adjust(image, strength)
    return image


class Views(Dataset):
    """Training views of a dataset. Asked for (image_id, seed) it gives {"image": (3, H, W) uint8} and

    - if `strong`: "strong" (3, H, W) uint8, the strong view of the same crop;
    - if `labels`: "labels" (N,) int64 and "masks" (N, H, W) bool, of the objects visible in the crop.
    """

    def __init__(self, dataset: CocoDataset, view: View, *, labels: bool = True, strong: bool = False):
        self.dataset, self.view, self.with_labels, self.with_strong = dataset, view, labels, strong

    def __getitem__(self, key) -> dict:
        image_id, seed = key
        rng = np.random.default_rng(seed)
        image = self.dataset.image(image_id)
        H, W = image.height, image.width
        geometry = Geometry.draw(self.view, H, W, rng)
        weak = geometry.image(image)
        if self.view.colour:
            weak = colour_jitter(weak, rng, 32 / 255, 0.5, 0.5, 18 / 360, probability=0.5)
        item = {"image": to_tensor(weak)}
        if self.with_strong:
            item["strong"] = to_tensor(strong_view(weak, rng, self.view.blur))
        if self.with_labels:
            size = self.dataset.size(image_id)  # of the annotations; the file may be a smaller copy
            masks = [geometry.mask(o["segmentation"], *size) for o in self.dataset.objects(image_id)]
            masks = np.stack(masks) if masks else np.zeros((0, *self.view.crop), dtype=bool)
            visible = masks.any(axis=(1, 2))
            item["labels"] = torch.tensor(self.dataset.labels(image_id), dtype=torch.int64)[visible]
            item["masks"] = torch.from_numpy(masks[visible])
        return item


def to_tensor(image: Image.Image) -> torch.Tensor:
    """(3, H, W) uint8"""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


# --------------------------------------------------------------------------------------------------- streams


def stream(
    views: Dataset,
    image_ids,
    batch: int,
    seed: int,
    *,
    rank=0,
    world_size=1,
    workers=0,
    first_step=0,
    **sampling,
):
    """An endless iterator over batches, each a list of `batch` items of `views`. With several processes
    each takes its own part of a common batch. first_step: where to go on. sampling: arguments of
    `StepSampler`."""
    sampler = StepSampler(image_ids, batch, seed, rank, world_size, first_step, **sampling)
    return iter(
        DataLoader(
            views,
            batch_sampler=sampler,
            num_workers=workers,
            collate_fn=list,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # or it would draw from the global one
            worker_init_fn=_leave_ctrl_c_to_the_main_process,
        )
    )


def _leave_ctrl_c_to_the_main_process(_) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class StepSampler:
    """Yields for step after step the (image_id, seed) of a batch, without end.

    The stream is a row of epochs, each a permutation of the images in which image i stands repeats[i] times
    on average. Position p of the stream is a function of (seed, p), and step s of all processes together
    takes the positions s * G to (s + 1) * G - 1, where G = batch * world_size; so two processes with half
    the batch see what one process sees."""

    def __init__(self, image_ids, batch, seed, rank=0, world_size=1, first_step=0, repeats=None):
        if not len(image_ids):
            raise ValueError("no image to sample from")
        self.image_ids = list(image_ids)
        self.batch, self.seed, self.rank, self.world_size = batch, seed, rank, world_size
        self.first_step = first_step
        repeats = np.ones(len(self.image_ids)) if repeats is None else np.asarray(repeats, dtype=float)
        self.epoch_length = max(1, round(repeats.sum()))
        self.bounds = np.cumsum(repeats) * (self.epoch_length / repeats.sum())

    def epoch(self, epoch: int) -> np.ndarray:
        """Indices into image_ids: systematic sampling rounds every image's repeats up or down at random,
        but their sum never changes."""
        rng = np.random.default_rng(seed_of(self.seed, "epoch", epoch))
        counts = np.diff(np.floor(self.bounds + rng.random() * (1 - 1e-6)), prepend=0).astype(int)
        counts[-1] += self.epoch_length - counts.sum()
        return rng.permutation(np.repeat(np.arange(len(self.image_ids)), counts))

    def __iter__(self):
        current, order = None, None
        for step in itertools.count(self.first_step):
            keys = []
            for position in range(self.batch):
                position += (step * self.world_size + self.rank) * self.batch
                epoch, place = divmod(position, self.epoch_length)
                if epoch != current:
                    current, order = epoch, self.epoch(epoch)
                keys.append((self.image_ids[order[place]], seed_of(self.seed, position)))
            yield keys


def repeat_factors(dataset: CocoDataset, image_ids, threshold: float) -> list[float]:
    """Repeat-factor sampling (LVIS, Gupta et al., CVPR 2019, arXiv 1908.03195, section 4): how often each
    image should be seen so that rare classes count for more: the largest max(1, sqrt(threshold / share of
    images with the class)) of its classes."""
    classes = [set(dataset.labels(image_id)) for image_id in image_ids]
    counts = np.bincount([label for labels in classes for label in labels], minlength=1)
    factors = np.sqrt(threshold * len(image_ids) / np.maximum(counts, 1)).clip(min=1)
    return [max((factors[label] for label in labels), default=1.0) for labels in classes]


def test_size(H: int, W: int, short_side: int = 800, long_side: int = 1333) -> tuple[int, int]:
    """(H, W) of an image at test time: the shorter side becomes short_side unless the longer one would pass
    long_side (0: no limit). A short_side of 0 keeps the size."""
    if not short_side:
        return H, W
    factor = min(short_side / min(H, W), (long_side or math.inf) / max(H, W))
    return round(H * factor), round(W * factor)


# ---------------------------------------------------------------------------------------------------- shapes

SHAPES = ("circle", "square", "triangle", "star")


def write_shapes(folder, num_train=1000, num_val=200, size=96, seed=0) -> None:
    """Writes the generated dataset: textured shapes that occlude one another on cluttered backgrounds, as
    PNGs and COCO JSON with RLE masks."""
    folder = Path(folder)
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    (temporary / "images").mkdir(parents=True)
    for part, count in (("train", num_train), ("val", num_val)):
        images, annotations = [], []
        for index in range(count):
            pixels, objects = draw_shapes(size, np.random.default_rng(seed_of(seed, "shapes", part, index)))
            name = f"{part}_{index:05d}.png"
            Image.fromarray(pixels).save(temporary / "images" / name)
            images.append({"id": index, "file_name": name, "height": size, "width": size})
            for label, mask in objects:
                rle = rle_tools.encode(np.asfortranarray(mask.astype(np.uint8)))
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": index,
                        "category_id": label + 1,
                        "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
                        "area": int(mask.sum()),
                        "bbox": rle_tools.toBbox(rle).tolist(),
                        "iscrowd": 0,
                    }
                )
        categories = [{"id": label + 1, "name": name} for label, name in enumerate(SHAPES)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (temporary / f"instances_{part}.json").write_text(json.dumps(content))
    temporary.rename(folder)


def draw_shapes(size: int, rng: np.random.Generator):
    """One image (size, size, 3) uint8 and its objects [(label, visible mask)], from back to front."""
    pixels = _texture(size, rng, [_colour(rng, rng.random(), (0, 0.5)) for _ in range(2)])
    for _ in range(rng.integers(2, 6)):  # clutter: thin lines of any colour, which belong to nothing
        pixels[_polygon_mask(_line(size, rng), size)] = _colour(rng, rng.random())
    objects = []
    for _ in range(rng.integers(2, 5)):
        label, radius = int(rng.integers(len(SHAPES))), size * rng.uniform(0.13, 0.26)
        centre = rng.uniform(0.6 * radius, size - 0.6 * radius, 2)
        mask = _polygon_mask(_outline(label, centre, radius, rng.uniform(0, 2 * math.pi)), size)
        if any((mask & other).sum() > 0.4 * min(mask.sum(), other.sum()) for _, other in objects):
            continue
        hue = label / len(SHAPES) + rng.normal(0, 0.06)
        pixels = np.where(mask[..., None], _texture(size, rng, [_colour(rng, hue) for _ in range(2)]), pixels)
        objects = [(other_label, other & ~mask) for other_label, other in objects] + [(label, mask)]
    pixels = pixels + rng.normal(0, 6, pixels.shape)
    objects = [(label, mask) for label, mask in objects if mask.sum() >= 30]
    return pixels.clip(0, 255).astype(np.uint8), objects


def _outline(label, centre, radius, angle):
    """The corners (n, 2) of a shape; all four have about the same area."""
    if SHAPES[label] == "circle":
        corners, radii = 40, 0.85
    elif SHAPES[label] == "square":
        corners, radii = 4, 1.05
    elif SHAPES[label] == "triangle":
        corners, radii = 3, 1.3
    else:
        corners, radii = 10, np.where(np.arange(10) % 2, 0.5, 1.25)
    angles = angle + np.arange(corners) * (2 * math.pi / corners)
    return centre + radius * np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _line(size, rng):
    start, end = rng.uniform(0, size, 2), rng.uniform(0, size, 2)
    across = (end - start)[::-1] * (1, -1) / (np.linalg.norm(end - start) + 1e-6) * rng.uniform(0.5, 1.5)
    return np.stack([start - across, start + across, end + across, end - across])


def _polygon_mask(corners, size, oversample=4):
    image = Image.new("L", (size * oversample,) * 2)
    ImageDraw.Draw(image).polygon([tuple(corner) for corner in corners * oversample], fill=255)
    return np.asarray(image.resize((size, size), Image.Resampling.BOX)) >= 128


def _colour(rng, hue, saturation=(0.4, 1.0)):
    """(3,) in 0..255"""
    return 255 * np.array(colorsys.hsv_to_rgb(hue % 1, rng.uniform(*saturation), rng.uniform(0.3, 1.0)))


def _texture(size, rng, colours):
    """(size, size, 3) float: two colours in stripes, checks, dots, blots or a gradient."""
    y, x = np.mgrid[:size, :size]
    angle, period = rng.uniform(0, math.pi), size * rng.uniform(0.06, 0.15)
    u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    a, b = np.sin(2 * math.pi * u / period), np.sin(2 * math.pi * v / period)
    coarse = Image.fromarray(rng.uniform(0, 255, (5, 5)).astype(np.uint8))
    blots = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)) / 255
    gradient = (u - u.min()) / (u.max() - u.min())
    mix = (a > 0, a * b > 0, a + b > 0.9, blots, gradient)[rng.integers(5)]
    return colours[0] + (colours[1] - colours[0]) * mix[..., None]
