"""What a checkpoint's model finds in any images, as pictures and as files in COCO's form.

    python evaluate.py runs/coco-0.01/distill.pt --images photos/ --out found/
    python evaluate.py runs/coco-0.01/distill.pt --images photos/ --pseudo new_labels/

The first writes each image with what was found, and results.json, a list of detections as pycocotools reads
them: original category ids, masks as RLE, image ids that count the files in order. The second writes the
teacher's pseudo-labels (`burnin.pseudo_labels`) as instances_train.json, most doubtful images first, to be
corrected by people; with --images it is a data set to train on. One image is in memory at a time."""

import dataclasses
import json
import os
import shlex
from pathlib import Path

import torch
from PIL import Image
from pycocotools import mask as rle_tools
from tqdm import tqdm

import engine
from burnin import KEPT_BY, PRESETS, Config, pseudo_labels
from data import DataError, image_files, read_image, test_size, to_tensor
from evaluate import check_classes, coco_results, draw_found, find, load_model, validation_set
from flags import shown
from model import resize

# Settings of a run that another one on other data does not share.
OF_ITS_DATA = {"data", "root", "train_json", "val_json", "image_folder", "unlabelled", "split", "ratio"}
OF_ITS_DATA |= {"preset", "out", "init", "teacher", "student", "labels_only", "device"}


def main(checkpoint: dict, flags, sizes: dict, device) -> None:
    """flags: of evaluate.py. sizes: short_side and long_side at test time. Raises ValueError."""
    if not flags.images:
        raise ValueError("--pseudo needs the images: --images DIR")
    if engine.world_size() > 1:
        raise ValueError("--images and --pseudo run in one process")
    # Of a phase without a teacher, the model that it has trained is one.
    which = flags.which or ("teacher" if flags.pseudo and checkpoint["teacher"] is not None else "student")
    if checkpoint[which] is None:
        raise ValueError(f"{flags.checkpoint} has no {which}")
    model = load_model(checkpoint, which, device)
    K = checkpoint["model_args"]["num_classes"]
    names = checkpoint.get("class_names") or [f"class {k}" for k in range(K)]
    ids = checkpoint.get("category_ids") or list(range(1, K + 1))
    if flags.data:
        dataset = validation_set(flags, {"data": None})
        check_classes(checkpoint, dataset.class_names)
        names, ids = dataset.class_names, dataset.category_ids
    categories = [{"id": i, "name": name} for i, name in zip(ids, names)]
    files = list_images(flags.images)
    if flags.pseudo:
        cfg = checkpoint.get("config", {})
        settings = {name: cfg[name] for name in KEPT_BY if name in cfg}
        folder = write_pseudo_labels(model, files, categories, Path(flags.pseudo), device, sizes, settings)
        print(f"when they are corrected: {training_command(cfg, flags.pseudo, folder)}")
    else:
        write_predictions(model, files, categories, Path(flags.out), device, sizes, flags.threshold)


def list_images(places: list[str]) -> list[Path]:
    """The real paths of the image files among and below them, in order. Raises DataError where there is
    none."""
    files = []
    for place in map(Path, places):
        if not place.exists():
            raise DataError(f"no file or folder --images {str(place)!r}")
        found = [Path(path) for path in image_files(place)] if place.is_dir() else [place.resolve()]
        if not found:
            raise DataError(f"no image below --images {str(place)!r}")
        files += found
    return list(dict.fromkeys(files))


def each_image(files: list[Path]):
    """(number, file, image) of those that can be read; the others are named and left out."""
    unreadable = 0
    for number, file in enumerate(tqdm(files, desc="images", disable=None), start=1):
        try:
            image = read_image(file)
        except DataError as error:
            unreadable += 1
            engine.warn(f"{error}; it is left out")
            continue
        yield number, file, image
    if unreadable == len(files):
        raise DataError("none of the images can be read")


def write_predictions(model, files, categories, out: Path, device, sizes, threshold: float) -> None:
    """out/<number>-<name>.jpg with the instances above a score, out/results.json with them in COCO's form,
    and out/images.json, a COCO file without annotations: COCO("images.json").loadRes("results.json")."""
    out.mkdir(parents=True, exist_ok=True)
    ids, names = ([category[key] for category in categories] for key in ("id", "name"))
    count, images = 0, []
    with open(out / "results.json", "w") as results:
        for number, file, image in each_image(files):
            found = find(model, image, device, **sizes)
            found = {name: values[found["scores"] > threshold] for name, values in found.items()}
            for result in coco_results(number, found, ids):
                results.write(("," if count else "[") + "\n" + json.dumps(readable(result)))
                count += 1
            picture = draw_found(image, found, names, threshold, dim=0.5)
            picture.save(out / f"{number:06}-{file.stem}.jpg", quality=90)
            images.append(image_entry(number, str(file), image))
        results.write("\n]\n" if count else "[]\n")
    write_coco(out / "images.json", images, [], categories)
    print(f"{count} objects in {len(images)} images -> {out}: pictures, results.json, images.json")


@torch.no_grad()
def write_pseudo_labels(model, files, categories, out: Path, device, sizes, settings: dict) -> Path:
    """out/instances_train.json. An annotation has its "score" besides, an image its "doubt": 1 minus the
    lowest score of its pseudo-labels, or without any the highest score. settings: of `pseudo_labels`. Returns
    the folder that the images' names start from."""
    out.mkdir(parents=True, exist_ok=True)
    folder = Path(os.path.commonpath([file.parent for file in files]))
    images, annotations = [], []
    for number, file, image in each_image(files):
        H, W = test_size(image.height, image.width, **sizes)
        pixels = to_tensor(image.resize((W, H), Image.Resampling.BILINEAR))
        with engine.autocast(device):
            outputs = model(pixels[None].to(device))
        pseudo = pseudo_labels(outputs, fine_masks=True, **settings)[0]  # a person will correct them
        masks = pseudo["masks"][None, :, :H, :W].float()
        if masks.shape[1]:
            masks = resize(masks, (image.height, image.width))
        results = coco_results(number, {**pseudo, "masks": masks[0] > 0.5}, [c["id"] for c in categories])
        for result in map(readable, results):
            area = int(rle_tools.area(result["segmentation"]))
            more = {"id": len(annotations) + 1, "iscrowd": 0, "area": area}
            annotations.append({**result, **more, "bbox": rle_tools.toBbox(result["segmentation"]).tolist()})
        scores = pseudo["scores"].tolist()
        doubt = 1 - min(scores) if scores else float(pseudo["highest"])
        name = str(file.relative_to(folder))
        images.append({**image_entry(number, name, image), "doubt": round(doubt, 4)})
    images.sort(key=lambda entry: -entry["doubt"])
    place = {entry["id"]: number for number, entry in enumerate(images)}
    annotations.sort(key=lambda entry: (place[entry["image_id"]], entry["score"]))
    write_coco(out / "instances_train.json", images, annotations, categories)
    print(f"{len(annotations)} pseudo-labels of {len(images)} images -> {out / 'instances_train.json'}")
    return folder


def training_command(cfg: dict, data, images) -> str:
    """That trains on other data with the settings cfg of a run, which are empty if it is none of ours."""
    words = ["python", "distill.py", "--data", str(data), "--image-folder", str(images), "--ratio", "1"]
    if "preset" in cfg:
        words += ["--preset", cfg["preset"]]
        preset = dataclasses.asdict(Config(**PRESETS[cfg["preset"]]))  # without the flags of distill.py alone
        for name, value in cfg.items():
            if name not in OF_ITS_DATA and (name not in preset or value != preset[name]):
                words += ["--" + name.replace("_", "-"), shown(value)]
    return shlex.join(words)


def readable(result: dict) -> dict:
    """As JSON can hold it."""
    rle = result["segmentation"]
    return {**result, "segmentation": {**rle, "counts": rle["counts"].decode()}}


def image_entry(number: int, name: str, image: Image.Image) -> dict:
    return {"id": number, "file_name": name, "width": image.width, "height": image.height}


def write_coco(path: Path, images, annotations, categories) -> None:
    content = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(content, indent=1))
