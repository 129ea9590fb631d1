"""How fast training views are made: images per second of one core, side by side with two peers.

    python bench/data.py
    python bench/data.py --files 1000000    # instead: what so many unlabelled files cost at a run's start

On JPEGs of COCO's size with 7 polygons each, made on the spot, cut by the paper's large-scale jitter into
1024 x 1024 crops. "labelled" is the weak view with its masks, "unlabelled" the weak and the strong view. The
peers: torchvision's transforms.v2 in its plainest form, and the order of steps of detectron2's mappers
(resize the whole image and whole masks, then crop and pad). All draw from the same distributions and are
timed in turn, round by round; medians over rounds."""

import argparse
import json
import platform
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image, ImageFilter
from pycocotools import mask as rle_tools
from torchvision import tv_tensors
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import CocoDataset, Geometry, Pool, StepSampler, View, Views, strong_view, to_rle  # noqa: E402

SIZE, OBJECTS = (480, 640), 7


def write_images(folder: Path, count: int) -> CocoDataset:
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "thing"}]}
    H, W = SIZE
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((W, H))
        pixels = np.asarray(coarse, dtype=float) + rng.normal(
            0, 12, (H, W, 3)
        )  # some noise, or the files would be tiny
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        image.filter(ImageFilter.GaussianBlur(0.6)).save(folder / f"images/{number}.jpg", quality=92)
        content["images"].append({"id": number, "file_name": f"{number}.jpg", "height": H, "width": W})
        for _ in range(OBJECTS):
            centre, radius = rng.uniform((60, 60), (W - 60, H - 60)), rng.uniform(15, 120)
            angles = np.sort(rng.uniform(0, 2 * np.pi, 30))
            circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
            corners = centre + radius * rng.uniform(0.6, 1, (30, 1)) * circle
            polygon = corners.clip(0, (W, H)).flatten().round(2).tolist()
            entry = {
                "id": len(content["annotations"]) + 1,
                "image_id": number,
                "category_id": 1,
                "iscrowd": 0,
            }
            content["annotations"].append(entry | {"segmentation": [polygon], "area": 1.0})
    (folder / "a.json").write_text(json.dumps(content))
    return CocoDataset(folder / "a.json", folder / "images")


def full_masks(dataset, image_id) -> np.ndarray:
    """(N, H, W) uint8 at the size of the image."""
    rles = [to_rle(o["segmentation"], *dataset.size(image_id)) for o in dataset.objects(image_id)]
    return rle_tools.decode(rles).transpose(2, 0, 1)


def ours(dataset, view):
    labelled, unlabelled = Views(dataset, view), Views(dataset, view, labels=False, strong=True)
    return lambda i, seed: labelled[i, seed], lambda i, seed: unlabelled[i, seed]


def torchvision_v2(dataset, view):
    crop = list(view.crop)
    weak = v2.Compose(
        [
            v2.ScaleJitter(crop, view.scale, antialias=True),
            v2.RandomCrop(crop, pad_if_needed=True, fill={tv_tensors.Image: 128, tv_tensors.Mask: 0}),
            v2.RandomHorizontalFlip(),
        ]
    )
    strong = v2.Compose(
        [
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(9, view.blur)], 0.5),
        ]
    )

    def image(i):
        return tv_tensors.Image(torchvision.io.decode_image(str(dataset.path(i)), "RGB"))

    def labelled(i, seed):
        torch.manual_seed(seed)
        return weak(image(i), tv_tensors.Mask(torch.from_numpy(full_masks(dataset, i)).bool()))

    def unlabelled(i, seed):
        torch.manual_seed(seed)
        weak_view = weak(image(i))
        return weak_view, strong(weak_view)

    return labelled, unlabelled


def detectron2_order(dataset, view):
    """Whole image and whole masks are resized, then cut; the strong view is ours."""

    def cut(array, geometry, fill):
        (h, w), (H, W) = geometry.window, geometry.crop
        part = array[geometry.top : geometry.top + h, geometry.left : geometry.left + w]
        part = part[:, ::-1] if geometry.flip else part
        return np.pad(part, ((0, H - h), (0, W - w)) + ((0, 0),) * (array.ndim - 2), constant_values=fill)

    def weak(i, rng):
        image = dataset.image(i)
        geometry = Geometry.draw(view, *dataset.size(i), rng)
        resized = image.resize(geometry.resized[::-1], Image.Resampling.BILINEAR)
        return cut(np.asarray(resized), geometry, 128), geometry

    def labelled(i, seed):
        pixels, geometry = weak(i, np.random.default_rng(seed))
        masks = [
            cut(np.asarray(Image.fromarray(mask).resize(geometry.resized[::-1], 0)), geometry, 0)
            for mask in full_masks(dataset, i)
        ]
        tensor = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        return tensor, torch.from_numpy(np.stack(masks)).bool()

    def unlabelled(i, seed):
        rng = np.random.default_rng(seed)
        pixels, _ = weak(i, rng)
        strong = np.asarray(strong_view(Image.fromarray(pixels), rng, view.blur))
        return [torch.from_numpy(np.ascontiguousarray(p.transpose(2, 0, 1))) for p in (pixels, strong)]

    return labelled, unlabelled


def many_files(number):
    """Seconds until the pool knows them, MiB of its list, GiB of this process at its peak, and seconds of the
    first batch of names."""
    with tempfile.TemporaryDirectory() as folder:
        dataset = write_images(Path(folder), 1)
        for n in range(number):
            file = Path(folder) / "files" / f"{n // 1000:06d}" / f"{n:09d}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        start = time.perf_counter()
        pool = Pool(dataset, [Path(folder) / "files"])
        listed = time.perf_counter() - start
        arrays = sum(array.nbytes for array in vars(pool._paths).values()) / 2**20
        start = time.perf_counter()
        next(iter(StepSampler(pool.image_ids, batch=16, seed=0)))
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{number} empty files, 1,000 in each folder: listed in {listed:.2f} s, {arrays:.1f} MiB of arrays,"
    )
    print(f"first batch of keys after {seconds:.2f} s; this process at its peak {peak:.2f} GiB")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--files", type=int, help="measure a pool of so many files instead")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    if flags.files:
        return many_files(flags.files)
    print(f"{platform.processor() or platform.machine()}, one thread, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        dataset = write_images(Path(folder), flags.images)
        bytes_each = sum(dataset.path(i).stat().st_size for i in dataset.image_ids) / len(dataset)
        each = f"{bytes_each / 1000:.0f} kB and {OBJECTS} polygons each"
        print(f"{flags.images} JPEGs of {SIZE[1]} x {SIZE[0]}, {each}")
        view = View((1024, 1024), scale=(0.1, 2.0))
        makers = {"ours": ours, "torchvision v2": torchvision_v2, "detectron2's order": detectron2_order}
        pipelines = {name: make(dataset, view) for name, make in makers.items()}
        times = {(name, kind): [] for name in pipelines for kind in (0, 1)}
        for number in range(flags.rounds + 1):
            for (name, kind), seconds in times.items():
                start = time.perf_counter()
                for i in dataset.image_ids:
                    pipelines[name][kind](i, 1000 * number + i)
                if number:  # the first warms up
                    seconds.append((time.perf_counter() - start) / len(dataset))
    print(f"\n{'images/s of one core':24}{'labelled':>12}{'unlabelled':>12}{'ours is faster by':>24}")
    medians = {key: statistics.median(seconds) for key, seconds in times.items()}
    for name in pipelines:
        rates = "".join(f"{1 / medians[name, kind]:12.1f}" for kind in (0, 1))
        factors = "   ".join(f"{medians[name, kind] / medians['ours', kind]:.2f} x" for kind in (0, 1))
        print(f"{name:24}{rates}{factors if name != 'ours' else '':>24}")


if __name__ == "__main__":
    main()
