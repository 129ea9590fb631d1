"""Cityscapes: convert its label files to COCO JSON, and compute mask AP by its own rules.

    layout, train, val = find(Path("datasets/cityscapes"))   # a folder with leftImg8bit/ and gtFine/
    cityscapes_ap(label_files, detections)

The data are in leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip from cityscapes-dataset.com.

Shapes: H W pixels."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as rle_tools

from data import CocoDataset, DataError
from layouts.files import Found, Source

CLASSES = {  # the label ids of the classes with instances
    24: "person",
    25: "rider",
    26: "car",
    27: "truck",
    28: "bus",
    31: "train",
    32: "motorcycle",
    33: "bicycle",
}
LABEL_SUFFIX = "_gtFine_instanceIds.png"


def find(folder: Path) -> Found | None:
    """Find and convert Cityscapes in a folder. Returns None for a folder without leftImg8bit/ and gtFine/."""
    has_both = (folder / "leftImg8bit").is_dir() and (folder / "gtFine").is_dir()
    return find_cityscapes(folder) if has_both else None


def find_cityscapes(root: Path) -> Found:
    """Find Cityscapes where its archives unpack, and convert it. Raises DataError."""
    train, val = (Source(file, root / "leftImg8bit") for file in convert(root))
    return Found("Cityscapes (leftImg8bit/, gtFine/)", train, val)


def is_cityscapes(dataset: CocoDataset | None) -> bool:
    """Check that a dataset has the folders, label files and classes of Cityscapes."""
    if dataset is None or dataset.image_folder.name != "leftImg8bit":
        return False
    has_classes = set(dataset.category_ids) <= CLASSES.keys()
    return has_classes and (dataset.image_folder.parent / "gtFine").is_dir()


# ------------------------------------------------------------------------------------------------ conversion


def convert(root) -> list[Path]:
    """Write root/instances_train.json and root/instances_val.json, unless they exist. Returns their paths.

    Masks are RLEs, category ids are Cityscapes' label ids, and groups become crowds. Raises DataError for
    missing or damaged files."""
    root, paths = Path(root), []
    for split in ("train", "val"):
        path = root / f"instances_{split}.json"
        paths.append(path)
        if path.exists():
            continue
        image_files = sorted((root / "leftImg8bit" / split).glob("*/*_leftImg8bit.png"))
        if not image_files:
            pattern = f"{root}/leftImg8bit/{split}/*/*_leftImg8bit.png"
            raise DataError(
                f"cannot find Cityscapes: no image {pattern}; unpack leftImg8bit_trainvaltest.zip and "
                "gtFine_trainvaltest.zip of cityscapes-dataset.com into one folder, which then has "
                "leftImg8bit/ and gtFine/, and set --root to it"
            )
        missing = [file for file in image_files if not label_file(root, file).is_file()]
        if missing:
            example = label_file(root, missing[0])
            raise DataError(
                f"cannot convert Cityscapes: {len(missing)} label files are missing, such as {example}"
            )
        print(f"writing {path} from {len(image_files)} label files", flush=True)
        with ThreadPoolExecutor(min(16, os.cpu_count())) as threads:
            labels = list(threads.map(lambda file: read_objects(label_file(root, file)), image_files))
        content = {"images": [], "annotations": []}
        content["categories"] = [{"id": label, "name": name} for label, name in CLASSES.items()]
        for image_id, (file, ((H, W), annotations)) in enumerate(zip(image_files, labels), start=1):
            name = file.relative_to(root / "leftImg8bit").as_posix()
            content["images"].append({"id": image_id, "file_name": name, "height": H, "width": W})
            for annotation in annotations:
                ids = {"id": len(content["annotations"]) + 1, "image_id": image_id}
                content["annotations"].append(ids | annotation)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(content))
        temporary.replace(path)  # Another process never sees half a file.
    return paths


def label_file(root, image_file) -> Path:
    """Return the label file of an image file: gtFine/train/ulm/x_gtFine_instanceIds.png of
    leftImg8bit/train/ulm/x_leftImg8bit.png."""
    relative = Path(image_file).relative_to(Path(root) / "leftImg8bit")
    return Path(root) / "gtFine" / relative.with_name(relative.name.replace("_leftImg8bit.png", LABEL_SUFFIX))


def read_ids(file) -> np.ndarray:
    """Read a label file: (H, W) int64, label * 1000 + number for an object, the label alone for a group or
    stuff.

    Raises DataError for a damaged file."""
    try:
        return np.asarray(Image.open(file, formats=["PNG"])).astype(np.int64)
    except OSError as error:
        raise DataError(f"cannot read the label file {file}: {error}") from None


def read_objects(file) -> tuple[tuple[int, int], list[dict]]:
    """Read the size (H, W) of a label file and its objects as COCO annotations without ids."""
    ids = read_ids(file)
    # RLEs run down the columns, so one pass over the pixels finds the runs of all objects.
    flat = ids.flatten(order="F")
    starts = np.concatenate([[0], np.flatnonzero(np.diff(flat)) + 1])
    ends, values = np.append(starts[1:], flat.size), flat[starts]
    annotations = []
    for value in np.unique(values).tolist():
        label = value // 1000 if value >= 1000 else value
        if label not in CLASSES:
            continue
        in_object = values == value
        edges = np.stack([starts[in_object], ends[in_object]], axis=1).flatten()
        counts = np.diff(edges, prepend=0, append=flat.size)
        counts = counts[:-1] if counts[-1] == 0 else counts
        rle = rle_tools.frPyObjects({"counts": counts.tolist(), "size": list(ids.shape)}, *ids.shape)
        annotation = {
            "category_id": label,
            "iscrowd": int(value < 1000),
            "area": int((ends[in_object] - starts[in_object]).sum()),
            "bbox": rle_tools.toBbox(rle).tolist(),
            "segmentation": {"size": list(ids.shape), "counts": rle["counts"].decode()},
        }
        annotations.append(annotation)
    return ids.shape, annotations


# -------------------------------------------------------------------------------------------------------- AP


def official_evaluation():
    """Import the evaluation of cityscapesscripts. Raises DataError if that package is not installed."""
    try:
        from cityscapesscripts.evaluation import evalInstanceLevelSemanticLabeling as evaluation
    except ImportError:
        raise DataError("AP by the rules of Cityscapes needs: pip install cityscapesscripts") from None
    evaluation.setInstanceLabels(evaluation.args)
    return evaluation


def cityscapes_ap(label_files: dict, detections: list[dict]) -> dict:
    """Compute mask AP by the rules of Cityscapes, in percent.

    Overlaps are counted here, from RLEs, because cityscapesscripts reads a PNG file for each detection. Its
    evaluateMatches and computeAverages decide what is a match, and compute AP.

    Args:
        label_files: {image id: *_gtFine_instanceIds.png}.
        detections: in COCO's result form, with Cityscapes' label ids as category ids.

    Returns {"AP", "AP50", "per_class": {name: AP}}, with -1 for a class without objects."""
    evaluation = official_evaluation()
    by_image = {image_id: [] for image_id in label_files}
    for detection in detections:
        by_image[detection["image_id"]].append(detection)
    matches = {
        image_id: count_overlaps(read_ids(file), by_image[image_id]) for image_id, file in label_files.items()
    }
    with np.errstate(all="ignore"):
        averages = evaluation.computeAverages(
            evaluation.evaluateMatches(matches, evaluation.args), evaluation.args
        )

    def percent(value):
        return round(100 * float(value), 4) if np.isfinite(value) else -1.0

    per_class = {name: percent(averages["classes"][name]["ap"]) for name in CLASSES.values()}
    return {"AP": percent(averages["allAp"]), "AP50": percent(averages["allAp50%"]), "per_class": per_class}


def count_overlaps(ids: np.ndarray, detections: list[dict]) -> dict:
    """Count the pixels that the objects and the detections of one image share.

    ids: (H, W), see `read_ids`. Returns {"groundTruth", "prediction"} in the form of cityscapesscripts."""
    from cityscapesscripts.helpers.labels import labels

    void = [label.id for label in labels if label.ignoreInEval and label.id >= 0]
    truth, predictions = ({name: [] for name in CLASSES.values()} for _ in range(2))
    for value, pixels in zip(*(array.tolist() for array in np.unique(ids, return_counts=True))):
        label = value // 1000 if value >= 1000 else value
        if label in CLASSES:
            entry = {"instID": value, "labelID": label, "pixelCount": pixels, "medDist": -1, "distConf": 0.0}
            truth[CLASSES[label]].append(entry | {"matchedPred": []})
    for number, detection in enumerate(detections):
        x, y, w, h = rle_tools.toBbox(detection["segmentation"]).astype(int).tolist()
        box = slice(y, y + h), slice(x, x + w)
        inside = ids[box][rle_tools.decode(detection["segmentation"])[box] > 0]
        shared = np.bincount(inside, minlength=34_000)  # pixels of each id within the detection
        entry = {
            "predID": number,
            "labelID": detection["category_id"],
            "confidence": detection["score"],
            "pixelCount": len(inside),
            "voidIntersection": int(shared[void].sum()),
        }
        name = CLASSES[detection["category_id"]]
        matches = []
        for target in truth[name]:
            intersection = int(shared[target["instID"]])
            if intersection:
                fields = {key: value for key, value in target.items() if key != "matchedPred"}
                matches.append(fields | {"intersection": intersection})
                target["matchedPred"].append(entry | {"intersection": intersection})
        predictions[name].append(entry | {"matchedGt": matches})
    return {"groundTruth": truth, "prediction": predictions}
