"""Training views: images per second of one core, ours beside two peers.

    python benchmarks/data.py
    python benchmarks/data.py --files 1000000    # instead: what a million unlabeled files cost at the start

The images are synthetic JPEGs of COCO's size with 7 polygons each. They are cut by the paper's large-scale
jitter into crops of 1024 x 1024. "labeled" is the weak view with its masks, "unlabeled" the weak and the
strong view. The peers are torchvision's transforms.v2 in its plainest form, and the order of steps of
detectron2's mappers: resize the whole image and whole masks, then crop and pad. All draw from the same
distributions. They take turns, round by round; the figures are medians over rounds."""

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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import (
    PAD_VALUE,
    Augmentation,
    AugmentedDataset,
    CocoDataset,
    CropTransform,
    ResumableSampler,
    UnlabeledImages,
    encode_rle,
    strong_view,
)
from layouts.images import find_unlabeled

SIZE, NUM_OBJECTS = (480, 640), 7


def write_images(folder: Path, count: int) -> CocoDataset:
    """Write synthetic JPEGs and their annotations to a folder."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "thing"}]}
    H, W = SIZE
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((W, H))
        noise = rng.normal(0, 12, (H, W, 3))  # Without it the files would be tiny.
        pixels = np.asarray(coarse, dtype=float) + noise
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        image.filter(ImageFilter.GaussianBlur(0.6)).save(folder / f"images/{number}.jpg", quality=92)
        content["images"].append({"id": number, "file_name": f"{number}.jpg", "height": H, "width": W})
        for _ in range(NUM_OBJECTS):
            center, radius = rng.uniform((60, 60), (W - 60, H - 60)), rng.uniform(15, 120)
            angles = np.sort(rng.uniform(0, 2 * np.pi, 30))
            circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
            corners = center + radius * rng.uniform(0.6, 1, (30, 1)) * circle
            polygon = corners.clip(0, (W, H)).flatten().round(2).tolist()
            annotation = {"id": len(content["annotations"]) + 1, "image_id": number, "category_id": 1}
            annotation |= {"iscrowd": 0, "segmentation": [polygon], "area": 1.0}
            content["annotations"].append(annotation)
    (folder / "a.json").write_text(json.dumps(content))
    return CocoDataset(folder / "a.json", folder / "images")


def decode_masks(dataset, image_id) -> np.ndarray:
    """Return the masks (N, H, W) uint8 of an image at its full size."""
    rles = [encode_rle(o["segmentation"], *dataset.size(image_id)) for o in dataset.objects(image_id)]
    return rle_tools.decode(rles).transpose(2, 0, 1)


# Each of the three returns two functions of (image id, seed): the labeled and the unlabeled view.


def ours(dataset, augmentation):
    labeled = AugmentedDataset(dataset, augmentation)
    unlabeled = AugmentedDataset(dataset, augmentation, labels=False, strong=True)
    return lambda i, seed: labeled[i, seed], lambda i, seed: unlabeled[i, seed]


def torchvision_v2(dataset, augmentation):
    crop, fill = list(augmentation.crop), {tv_tensors.Image: PAD_VALUE, tv_tensors.Mask: 0}
    weak = v2.Compose(
        [
            v2.ScaleJitter(crop, augmentation.lsj_scale, antialias=True),
            v2.RandomCrop(crop, pad_if_needed=True, fill=fill),
            v2.RandomHorizontalFlip(),
        ]
    )
    strong = v2.Compose(
        [
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(9, augmentation.blur)], 0.5),
        ]
    )

    def image(i):
        return tv_tensors.Image(torchvision.io.decode_image(str(dataset.path(i)), "RGB"))

    def labeled(i, seed):
        torch.manual_seed(seed)
        return weak(image(i), tv_tensors.Mask(torch.from_numpy(decode_masks(dataset, i)).bool()))

    def unlabeled(i, seed):
        torch.manual_seed(seed)
        weak_view = weak(image(i))
        return weak_view, strong(weak_view)

    return labeled, unlabeled


def detectron2_order(dataset, augmentation):
    """Resize the whole image and whole masks, then crop them. The strong view is ours."""

    def crop_and_pad(array, transform, fill):
        (h, w), (H, W) = transform.window, transform.crop
        part = array[transform.top : transform.top + h, transform.left : transform.left + w]
        part = part[:, ::-1] if transform.flip else part
        return np.pad(part, ((0, H - h), (0, W - w)) + ((0, 0),) * (array.ndim - 2), constant_values=fill)

    def weak(i, rng):
        image = dataset.image(i)
        transform = CropTransform.random(augmentation, *dataset.size(i), rng)
        resized = image.resize(transform.resized[::-1], Image.Resampling.BILINEAR)
        return crop_and_pad(np.asarray(resized), transform, PAD_VALUE), transform

    def to_tensor(pixels):
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))

    def labeled(i, seed):
        pixels, transform = weak(i, np.random.default_rng(seed))
        size = transform.resized[::-1]
        masks = [
            crop_and_pad(np.asarray(Image.fromarray(mask).resize(size, 0)), transform, 0)
            for mask in decode_masks(dataset, i)
        ]
        return to_tensor(pixels), torch.from_numpy(np.stack(masks)).bool()

    def unlabeled(i, seed):
        rng = np.random.default_rng(seed)
        pixels, _ = weak(i, rng)
        strong = np.asarray(strong_view(Image.fromarray(pixels), rng, augmentation.blur))
        return [to_tensor(view) for view in (pixels, strong)]

    return labeled, unlabeled


def measure_many_files(number: int) -> None:
    """Print the time and memory that it takes to list so many unlabeled files, and the time until the first
    batch of keys."""
    with tempfile.TemporaryDirectory() as folder:
        dataset = write_images(Path(folder), 1)
        for n in range(number):
            file = Path(folder) / "files" / f"{n // 1000:06d}" / f"{n:09d}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        start = time.perf_counter()
        paths, _, _ = find_unlabeled([Path(folder) / "files"], dataset, None)
        unlabeled = UnlabeledImages(dataset, paths)
        listed = time.perf_counter() - start
        arrays = sum(array.nbytes for array in vars(unlabeled._paths).values()) / 2**20
        start = time.perf_counter()
        next(iter(ResumableSampler(unlabeled.image_ids, batch_size=16, seed=0)))
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    files = f"{number} empty files, 1,000 in each folder"
    print(f"{files}: listed in {listed:.2f} s, {arrays:.1f} MiB of arrays")
    print(f"first batch of keys after {seconds:.2f} s; peak memory of this process {peak:.2f} GiB")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--files", type=int, help="measure a pool of so many unlabeled files instead")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    if flags.files:
        return measure_many_files(flags.files)
    print(f"{platform.processor() or platform.machine()}, one thread, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        dataset = write_images(Path(folder), flags.images)
        num_bytes = sum(dataset.path(i).stat().st_size for i in dataset.image_ids) / len(dataset)
        details = f"{num_bytes / 1000:.0f} kB and {NUM_OBJECTS} polygons each"
        print(f"{flags.images} JPEGs of {SIZE[1]} x {SIZE[0]}, {details}")
        augmentation = Augmentation((1024, 1024), lsj_scale=(0.1, 2.0))
        makers = {"ours": ours, "torchvision v2": torchvision_v2, "detectron2's order": detectron2_order}
        pipelines = {name: make(dataset, augmentation) for name, make in makers.items()}
        times = {(name, kind): [] for name in pipelines for kind in (0, 1)}
        for round_number in range(flags.rounds + 1):
            for (name, kind), seconds in times.items():
                start = time.perf_counter()
                for i in dataset.image_ids:
                    pipelines[name][kind](i, 1000 * round_number + i)
                if round_number:  # The first round warms up.
                    seconds.append((time.perf_counter() - start) / len(dataset))
    print(f"\n{'images/s of one core':24}{'labeled':>12}{'unlabeled':>12}{'ours is faster by':>24}")
    medians = {key: statistics.median(seconds) for key, seconds in times.items()}
    for name in pipelines:
        rates = "".join(f"{1 / medians[name, kind]:12.1f}" for kind in (0, 1))
        factors = "   ".join(f"{medians[name, kind] / medians['ours', kind]:.2f} x" for kind in (0, 1))
        print(f"{name:24}{rates}{factors if name != 'ours' else '':>24}")


if __name__ == "__main__":
    main()
