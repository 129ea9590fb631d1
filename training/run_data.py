"""The data of a run: datasets, labeled images, the unlabeled pool, and what their owner should know."""

from collections.abc import Iterator
from dataclasses import dataclass

from data import (
    Augmentation,
    AugmentedDataset,
    CocoDataset,
    DataError,
    UnlabeledImages,
    endless_batches,
    labeled_split,
    labels_hash,
    repeat_factors,
    shortest_edge_size,
    split_from_file,
    split_hash,
    stable_seed,
)
from layouts import load_data
from layouts.cityscapes import is_cityscapes, official_evaluation
from layouts.images import find_unlabeled, inspect_images
from layouts.validate import format_bins
from training.auto import count_in_windows, object_boxes, sample_images
from training.config import Config
from training.distributed import Env, print_rank0, rank, rank0_first, world_size

NEAR_OBJECTS = 1 / 3  # of the labeled windows: most may be empty. nnU-Net (Isensee et al., 2021) has the same
LOADER_TIMEOUT = 300.0  # seconds without a batch after which a loader process counts as stuck


@dataclass
class Data:
    """The data of a run: datasets, labeled image ids, the unlabeled pool (every training image, the
    labeled ones too, and those of --unlabeled: {folder: number} in folder_counts). val may be None. notes are
    about image files that are left out or look wrong; with any of the errors, no run starts."""

    cfg: Config
    env: Env
    train: CocoDataset
    val: CocoDataset | None
    labeled: list
    unlabeled: UnlabeledImages
    folder_counts: dict[str, int]
    notes: list[str]
    errors: list[str]

    @property
    def augmentation(self) -> Augmentation:
        cfg = self.cfg
        return Augmentation(
            cfg.crop, cfg.lsj_scale, cfg.short_sides, cfg.tile, color_jitter=cfg.color_jitter, blur=cfg.blur
        )

    @property
    def test_settings(self) -> dict:
        """Return how images are predicted: keyword arguments of `evaluate.predict_image`."""
        return {"env": self.env, "test_size": self.cfg.test_size, "tile": self.cfg.tile}

    @property
    def hashes(self) -> dict:
        """Return what identifies the labeled images and their objects."""
        return {"split": split_hash(self.labeled), "labels": labels_hash(self.train, self.labeled)}

    @property
    def num_classes(self) -> int:
        return len(self.train.class_names)

    def labeled_batches(self, phase: str, first_step: int, uniform: bool = False) -> Iterator[dict]:
        """Return endless batches {"image", "targets", "file"} from a step on. Images with rare classes
        are repeated (data.repeat_factors), unless `uniform`."""
        threshold = 0 if uniform else self.cfg.repeat_threshold
        repeats = repeat_factors(self.train, self.labeled, threshold) if threshold else None
        views = AugmentedDataset(
            self.train, self.augmentation, near_objects=NEAR_OBJECTS if self.cfg.tile else 0
        )
        return self._batches(views, self.labeled, (phase, "labeled"), first_step, repeats=repeats)

    def unlabeled_batches(self, phase: str, first_step: int) -> Iterator[dict]:
        """Return endless batches {"image", "strong", "file"}: weak and strong views of the same crops. With
        --strong-view false the strong view is the weak one."""
        changes = self.cfg.strong_view.split(",") if self.cfg.strong_view else ()
        views = AugmentedDataset(self.unlabeled, self.augmentation, labels=False, strong=changes)
        for batch in self._batches(views, self.unlabeled.image_ids, (phase, "unlabeled"), first_step):
            yield {"strong": batch["image"], **batch}  # the weak view, if the batch has no strong one

    def _batches(self, views, image_ids, key: tuple, first_step: int, **kwargs):
        return endless_batches(
            views,
            image_ids,
            batch_size=self.cfg.batch // world_size(),
            seed=stable_seed(self.cfg.seed, *key),
            rank=rank(),
            world_size=world_size(),
            num_workers=self.cfg.workers,
            timeout=LOADER_TIMEOUT,
            first_step=first_step,
            pin_memory=self.env.device.type == "cuda",
            **kwargs,
        )


def read_data(cfg: Config, env: Env) -> Data:
    """Read the datasets and choose the labeled images. Rank 0 reads first, as it may have to write files."""
    with rank0_first():
        train, val = load_data(cfg.data, **cfg.data_args)
    print_rank0(f"{cfg.data}: {train.layout}")
    with rank0_first():  # the other ranks then read from the page cache
        data = select_data(cfg, env, train, val)
    if data.errors:
        raise ValueError(data.errors[0])
    return data


def select_data(cfg: Config, env: Env, train: CocoDataset, val: CocoDataset | None) -> Data:
    """Look at the image files, choose the labeled images and find the unlabeled ones. Raises ValueError."""
    notes, errors = inspect(train, val)
    labeled = choose_labeled(cfg, train)
    if is_cityscapes(val):
        official_evaluation()  # raises if cityscapesscripts is not installed
    paths, counts, left_out = find_unlabeled(cfg.unlabeled or (), train, val)
    unlabeled = UnlabeledImages(train, paths)
    notes += left_out + inspect_unlabeled(unlabeled)
    return Data(cfg, env, train, val, labeled, unlabeled, counts, notes, errors)


def choose_labeled(cfg: Config, train: CocoDataset) -> list:
    """Choose the labeled images. Raises ValueError."""
    candidates = train.image_ids
    if unannotated_are_unlabeled(cfg):
        candidates = [image_id for image_id in train.image_ids if train.annotations(image_id)]
    if cfg.labeled_list:
        try:
            labeled = split_from_file(cfg.labeled_list, train)
        except DataError as error:
            held_out = "; some images are held out for validation, see --val-ratio"
            raise ValueError(f"{error}{held_out if 'held out' in train.layout else ''}") from None
    else:
        labeled = labeled_split(candidates, cfg.ratio, cfg.seed)
    if not any(map(train.labels, labeled)):
        bins = format_bins(train.bins, one_line=True)
        raise ValueError(f"{train.json_file}: no labeled image has an object; {bins}")
    return labeled


def unannotated_are_unlabeled(cfg: Config) -> bool:
    """Return whether images without annotations are unlabeled, not images without objects: by default in a
    folder, whose owner may have more to annotate, but not in the datasets with a name."""
    default = "background" if cfg.data in ("shapes", "coco", "cityscapes") else "unlabeled"
    return (cfg.unannotated or default) == "unlabeled"


def inspect(train: CocoDataset, val: CocoDataset | None) -> tuple[list[str], list[str]]:
    """Look at the headers of the images, and set how the datasets read them. Returns notes about the images,
    and errors."""
    notes, errors = [], []
    for kind, dataset in (("training", train), ("validation", val)):
        if dataset:
            found = inspect_images(dataset)
            dataset.pixel_range = found.pixel_range if dataset is train else train.pixel_range
            dataset.exif_stored = found.exif_stored
            notes += found.notes
            too_many = too_many_unreadable(kind, found.unreadable, len(dataset))
            errors += too_many
            notes += [] if too_many else [f"{e}; another image takes its place" for e in found.unreadable]
    return notes, errors


def too_many_unreadable(kind: str, unreadable: list[str], total: int) -> list[str]:
    """Return an error, or nothing if a run can do without these images: it replaces one image, or 1 % of
    them, but no validation image."""
    limit = 0 if kind == "validation" else max(1, total / 100)
    if len(unreadable) <= limit:
        return []
    return [f"{len(unreadable)} {kind} images cannot be read, such as: {unreadable[0]}"]


def inspect_unlabeled(unlabeled: UnlabeledImages) -> list[str]:
    """Look at the headers of some of the images of --unlabeled. Returns notes about them."""
    train = unlabeled.dataset
    pool = inspect_images(unlabeled, unlabeled.image_ids[len(train) :], max_images=200)
    notes, pixel_range = pool.notes, train.pixel_range or (0, 65535)
    if pool.pixel_range and pool.pixel_range != pixel_range:
        notes.append(
            f"unlabeled images have values in {pool.pixel_range}; they are read with the range of the "
            f"labeled ones, {pixel_range}"
        )
    if pool.unreadable:
        example = pool.unreadable[0]
        notes.append(
            f"{len(pool.unreadable)} of up to 200 sampled unlabeled images cannot be read, such as: {example}"
        )
    return notes


def bins_of_run(data: Data) -> dict[str, int]:
    """Return what becomes of each annotation of the training file in this run."""
    labeled = sum(len(data.train.objects(image_id)) for image_id in data.labeled)
    crowds = sum(len(data.train.annotations(image_id)) for image_id in data.labeled) - labeled
    in_training = sum(len(data.train.annotations(image_id)) for image_id in data.train.image_ids)
    bins = dict(data.train.bins)
    kept = bins.pop("trained") + bins.pop("crowd", 0)
    bins = {
        "trained": labeled,
        "crowd": crowds,
        "of unlabeled images": in_training - labeled - crowds,
        "of images held out for validation": kept - in_training,
        **bins,
    }
    return {bin: number for bin, number in bins.items() if number or bin == "trained"}


def data_warnings(cfg: Config, data: Data) -> Iterator[str]:
    """Yield what training can handle, but the owner of the data should know."""
    train, val = data.train, data.val
    if val is None and not any("no validation set" in note for note in train.notes):
        yield f"{cfg.data} has no validation set, so no AP will be shown; --val-json names one"
    for dataset in (train, val):
        yield from (f"{dataset.json_file}: {note}" for note in (() if dataset is None else dataset.notes))
    yield from data.notes
    unannotated = {image_id for image_id in train.image_ids if not train.annotations(image_id)}
    count = len(unannotated - set(data.labeled))
    if count and unannotated_are_unlabeled(cfg):
        yield (
            f"{count} images without annotations are unlabeled; if they show no object, pass "
            "--unannotated background"
        )
    elif count > len(train) / 20:
        yield (
            f"{count} of {len(train)} training images have no annotation and count as images without "
            "objects; if nobody has annotated them yet, pass --unannotated unlabeled"
        )
    labels = [train.labels(image_id) for image_id in data.labeled]
    missing = set(range(data.num_classes)) - {label for image in labels for label in image}
    if missing:
        names = ", ".join(train.class_names[label] for label in sorted(missing)[:10])
        yield (
            f"{len(missing)} classes are in no labeled image: {names}; they cannot be learned, unless "
            "--ratio or --labeled-list adds images with them"
        )
    if len(data.labeled) < cfg.batch:
        yield f"a batch has {cfg.batch} images, but only {len(data.labeled)} are labeled"
    empty = sum(not image for image in labels)
    if empty > len(labels) / 2:
        yield f"{empty} of {len(labels)} labeled images have no object"
    place, most = "an image", max(map(len, labels))
    if cfg.tile:
        boxes = [object_boxes(train, image_id) for image_id in sample_images(train, data.labeled)]
        place, most = f"a window of {cfg.tile} pixels", max(count_in_windows(boxes, cfg.tile))
    if most > cfg.num_queries:
        yield f"{place} has {most} objects, the model {cfg.num_queries} queries; pass --num-queries {most}"
    unseen = []  # validation images whose scale at test time does not occur in training
    for H, W in map(val.size, val.image_ids) if val else ():
        scale = shortest_edge_size(H, W, *cfg.test_size, cfg.tile)[0] / H
        low, high = data.augmentation.scale_range(H, W)
        unseen += [(H, W, scale, low, high)] if not 0.99 * low <= scale <= 1.01 * high else []
    if unseen and len(unseen) > len(val) / 2:
        H, W, scale, low, high = unseen[0]
        flag = "--short-sides" if cfg.short_sides else "--lsj-scale"
        yield (
            f"an image of {H} x {W} is resized by {scale:.3g} at test time, in training by {low:.3g} to "
            f"{high:.3g}; --test-size changes the former, {flag} the latter"
        )
