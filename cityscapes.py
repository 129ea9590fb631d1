"""Cityscapes: from the layout of its archives to COCO JSON, and mask AP by its own rules.

    train_json, val_json = convert("datasets/cityscapes")    # which has leftImg8bit/ and gtFine/
    cityscapes_ap(label_files, detections)

The archives are leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip of cityscapes-dataset.com."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as rle_tools

from data import DataError

CLASSES = {
    24: "person",
    25: "rider",
    26: "car",
    27: "truck",
    28: "bus",
    31: "train",
    32: "motorcycle",
    33: "bicycle",
}
LABELS = "_gtFine_instanceIds.png"


def convert(root) -> list[Path]:
    """Writes root/instances_train.json and root/instances_val.json unless they are there, and returns their
    paths. Masks are RLEs, categories have Cityscapes' label ids, groups are crowds. Raises DataError where
    the archives are not as they should be."""
    root, paths = Path(root), []
    for split in ("train", "val"):
        path = root / f"instances_{split}.json"
        paths.append(path)
        if path.exists():
            continue
        images = sorted((root / "leftImg8bit" / split).glob("*/*_leftImg8bit.png"))
        if not images:
            pattern = f"{root}/leftImg8bit/{split}/*/*_leftImg8bit.png"
            raise DataError(f"no image {pattern}: --root says where Cityscapes lies")
        missing = [file for file in images if not label_file(root, file).is_file()]
        if missing:
            raise DataError(f"{len(missing)} label files are missing, such as {label_file(root, missing[0])}")
        print(f"writing {path} from {len(images)} label files", flush=True)
        with ThreadPoolExecutor(min(16, os.cpu_count())) as threads:
            found = list(threads.map(lambda file: objects(label_file(root, file)), images))
        content = {"images": [], "annotations": []}
        content["categories"] = [{"id": label, "name": name} for label, name in CLASSES.items()]
        for number, (file, ((H, W), annotations)) in enumerate(zip(images, found), start=1):
            name = file.relative_to(root / "leftImg8bit").as_posix()
            content["images"].append({"id": number, "file_name": name, "height": H, "width": W})
            for annotation in annotations:
                place = {"id": len(content["annotations"]) + 1, "image_id": number}
                content["annotations"].append(place | annotation)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(content))
        temporary.replace(path)
    return paths


def label_file(root, image_file) -> Path:
    """Of leftImg8bit/train/ulm/x_leftImg8bit.png it is gtFine/train/ulm/x_gtFine_instanceIds.png."""
    inside = Path(image_file).relative_to(Path(root) / "leftImg8bit")
    return Path(root) / "gtFine" / inside.with_name(inside.name.replace("_leftImg8bit.png", LABELS))


def read_ids(file) -> np.ndarray:
    """(H, W) int64: label * 1000 + number for an object, the label alone for a group or for stuff."""
    try:
        return np.asarray(Image.open(file, formats=["PNG"])).astype(np.int64)
    except OSError as error:
        raise DataError(f"the label file {file} cannot be read: {error}") from None


def objects(file) -> tuple[tuple[int, int], list[dict]]:
    """Size and COCO annotations of a label file."""
    ids = read_ids(file)
    # RLEs run down the columns: one pass finds the segments of all objects.
    flat = ids.flatten(order="F")
    starts = np.concatenate([[0], np.flatnonzero(np.diff(flat)) + 1])
    ends, values = np.append(starts[1:], flat.size), flat[starts]
    annotations = []
    for value in np.unique(values).tolist():
        label = value // 1000 if value >= 1000 else value
        if label not in CLASSES:
            continue
        mine = values == value
        edges = np.stack([starts[mine], ends[mine]], axis=1).flatten()
        counts = np.diff(edges, prepend=0, append=flat.size)
        counts = counts[:-1] if counts[-1] == 0 else counts
        rle = rle_tools.frPyObjects({"counts": counts.tolist(), "size": list(ids.shape)}, *ids.shape)
        annotation = {
            "category_id": label,
            "iscrowd": int(value < 1000),
            "area": int((ends[mine] - starts[mine]).sum()),
            "bbox": rle_tools.toBbox(rle).tolist(),
            "segmentation": {"size": list(ids.shape), "counts": rle["counts"].decode()},
        }
        annotations.append(annotation)
    return ids.shape, annotations


def rules():
    """The evaluation of cityscapesscripts. Raises DataError where that is not installed."""
    try:
        from cityscapesscripts.evaluation import evalInstanceLevelSemanticLabeling as evaluation
    except ImportError:
        raise DataError("AP by the rules of Cityscapes needs: pip install cityscapesscripts") from None
    evaluation.setInstanceLabels(evaluation.args)
    return evaluation


def cityscapes_ap(label_files: dict, detections: list[dict]) -> dict:
    """Mask AP by the rules of Cityscapes, in percent: {"AP", "AP50", "per_class": {name: AP}}; -1 where there
    is nothing to find.

    label_files: {image id: *_gtFine_instanceIds.png}. detections: in COCO's result form, with Cityscapes'
    label ids. The overlaps are counted here, from RLEs (cityscapesscripts reads a PNG for each detection);
    what is found, missed or ignored, and the AP, is decided by its evaluateMatches and computeAverages."""
    evaluation = rules()
    by_image = {image_id: [] for image_id in label_files}
    for detection in detections:
        by_image[detection["image_id"]].append(detection)
    matches = {
        image_id: overlaps(read_ids(file), by_image[image_id]) for image_id, file in label_files.items()
    }
    with np.errstate(all="ignore"):
        averages = evaluation.computeAverages(
            evaluation.evaluateMatches(matches, evaluation.args), evaluation.args
        )

    def percent(value):
        return round(100 * float(value), 4) if np.isfinite(value) else -1.0

    per_class = {name: percent(averages["classes"][name]["ap"]) for name in CLASSES.values()}
    return {"AP": percent(averages["allAp"]), "AP50": percent(averages["allAp50%"]), "per_class": per_class}


def overlaps(ids: np.ndarray, detections: list[dict]) -> dict:
    """The objects of an image and what was detected in it, each with what it overlaps, in the form of
    cityscapesscripts."""
    from cityscapesscripts.helpers.labels import labels

    void = [label.id for label in labels if label.ignoreInEval and label.id >= 0]
    truth, found = ({name: [] for name in CLASSES.values()} for _ in range(2))
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
        matched = []
        for target in truth[name]:
            intersection = int(shared[target["instID"]])
            if intersection:
                without = {key: value for key, value in target.items() if key != "matchedPred"}
                matched.append(without | {"intersection": intersection})
                target["matchedPred"].append(entry | {"intersection": intersection})
        found[name].append(entry | {"matchedGt": matched})
    return {"groundTruth": truth, "prediction": found}
