"""Evaluation: mask AP of a checkpoint's student and teacher, what they find in any images, and export.

    python evaluate.py runs/shapes-0.1/distill.pt --data shapes                # AP by size and by class
    python evaluate.py runs/coco-0.01/distill.pt --data coco --json ap.json    # the same into a file
    torchrun --nproc_per_node=8 evaluate.py runs/coco-0.01/distill.pt --data coco
    python evaluate.py model_final_3c8ec9.pkl --data coco                      # a published checkpoint
    python evaluate.py runs/coco-0.01/distill.pt --images photos/ --out found/ # pictures, and COCO results
    python evaluate.py runs/coco-0.01/distill.pt --images photos/ --pseudo new_labels/    # labels to correct
    python evaluate.py runs/coco-0.01/distill.pt --export my_model             # for other code

Letters in shapes: B images, Q queries, K classes, N detections of one image, H W pixels, h w = a quarter of
the padded image's."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from pycocotools import mask as rle_tools
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from tqdm import tqdm

import cityscapes
import engine
from data import CocoDataset, DataError, find_data, test_size, to_rle, to_tensor
from flags import Parser, user_errors
from model import Mask2Former, resize
from weights import read_weights


def instances(outputs: dict, image_sizes, output_sizes=None, top_k: int = 100) -> list[dict]:
    """What the model sees in each image (Mask2Former, section 4.1): the top_k pairs of query and class by
    class probability.

    outputs: as `Mask2Former` returns them. image_sizes: [(H, W)] of the images before padding.
    output_sizes: [(H, W)] of the masks wanted, default image_sizes. Returns per image, best first: "scores"
    (N,), class probability times mean mask probability inside the mask, in [0, 1]; "labels" (N,) int64;
    "masks" (N, H, W) bool."""
    results = []
    for b, image_size in enumerate(image_sizes):
        output_size = tuple(output_sizes[b] if output_sizes is not None else image_size)
        probabilities = outputs["pred_logits"][b].float().softmax(-1)[:, :-1]  # (Q, K)
        K = probabilities.shape[1]
        scores, best = probabilities.flatten().topk(min(top_k, probabilities.numel()))
        kept, inverse = (best // K).unique(return_inverse=True)  # a query counts once for several classes
        masks, mask_scores = [], []
        # Columns first, as COCO's encoding has them; and so few at a time that they stay in a CPU's cache.
        for mask_logits in outputs["pred_masks"][b, kept].float().mT.split(8):
            padded = [4 * side for side in mask_logits.shape[-2:]]
            mask_logits = resize(mask_logits[None], padded)[..., : image_size[1], : image_size[0]]
            if output_size[::-1] != tuple(mask_logits.shape[-2:]):
                mask_logits = resize(mask_logits, output_size[::-1])
            mask_logits = mask_logits[0]
            masks.append(mask_logits > 0)
            inside = mask_logits.sigmoid().mul_(masks[-1]).sum((1, 2))
            mask_scores.append(inside / (masks[-1].sum((1, 2)) + 1e-6))
        masks, mask_scores = torch.cat(masks), torch.cat(mask_scores)
        scores, order = (scores * mask_scores[inverse]).sort(descending=True)
        results.append({"scores": scores, "labels": best[order] % K, "masks": masks[inverse[order]].mT})
    return results


@torch.no_grad()
def predict(model, images: list[Tensor], output_sizes, device) -> list[dict]:
    """instances() of uint8 images (3, H, W) of one common size."""
    with engine.autocast(device):
        outputs = model(torch.stack(images).to(device))
    return instances(outputs, [image.shape[-2:] for image in images], output_sizes)


def evaluate(model, dataset: CocoDataset, device="cpu", *, short_side=0, long_side=0, batch=4) -> dict:
    """Mask AP by the rules of COCO, in percent: {"AP", "AP50", "AP75", "APs", "APm", "APl", "per_class":
    {name: AP}}; -1 where there is nothing to find. Each process takes its share of the images; all return
    the same.

    short_side, long_side: images are resized so at test time (data.test_size); 0 keeps them as they are.
    batch: images that go through the model together, where neighbours have one size.
    """
    device, training = torch.device(device), model.training
    model.eval()
    sizes = {i: test_size(*dataset.size(i), short_side, long_side) for i in dataset.image_ids}
    mine = sorted(dataset.image_ids[engine.rank() :: engine.world_size()], key=lambda i: (sizes[i], i))
    detections = []
    bar = tqdm(total=len(mine), desc="images", leave=False, disable=None if engine.rank() == 0 else True)
    while mine:
        group = [i for i in mine[:batch] if sizes[i] == sizes[mine[0]]]  # a batch has one size
        mine = mine[len(group) :]
        images = [
            to_tensor(dataset.image(i).resize(sizes[i][::-1], Image.Resampling.BILINEAR)) for i in group
        ]
        for i, result in zip(group, predict(model, images, [dataset.size(i) for i in group], device)):
            detections += coco_results(i, result, dataset.category_ids)
        bar.update(len(group))
    bar.close()
    model.train(training)
    detections = gather(detections)
    return gather([ap_of(dataset, detections)] if engine.rank() == 0 else [])[0]


def ap_of(dataset: CocoDataset, detections: list[dict]) -> dict:
    """Mask AP by the rules of COCO, on Cityscapes also by its own."""
    result = mask_ap(dataset, detections)
    if is_cityscapes(dataset):
        root = dataset.image_folder.parent
        files = {i: cityscapes.label_file(root, dataset.path(i)) for i in dataset.image_ids}
        theirs = cityscapes.cityscapes_ap(files, detections)
        result |= {"Cityscapes AP": theirs["AP"], "Cityscapes AP50": theirs["AP50"]}
    return result


def is_cityscapes(dataset: CocoDataset | None) -> bool:
    """Whether it lies in the folders of Cityscapes, with its label files and classes."""
    if dataset is None or dataset.image_folder.name != "leftImg8bit":
        return False
    has_classes = set(dataset.category_ids) <= cityscapes.CLASSES.keys()
    return has_classes and (dataset.image_folder.parent / "gtFine").is_dir()


def coco_results(image_id, result: dict, category_ids) -> list[dict]:
    """An image's instances in COCO's result form: original category ids, masks as RLE."""
    masks = result["masks"].mT.contiguous().view(torch.uint8).cpu().numpy()  # (N, W, H)
    rles = rle_tools.encode(masks.transpose(2, 1, 0))
    return [
        {"image_id": image_id, "category_id": category_ids[label], "segmentation": rle, "score": score}
        for rle, label, score in zip(rles, result["labels"].tolist(), result["scores"].tolist())
        if rle_tools.area(rle) > 0
    ]


def gather(items: list) -> list:
    """The items of all processes, on every process."""
    if engine.world_size() == 1:
        return items
    engine.wait_for_all()
    parts = [None] * engine.world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def mask_ap(dataset: CocoDataset, detections: list[dict]) -> dict:
    """pycocotools' AP of detections in COCO's result form."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        annotations = []
        for image_id in dataset.image_ids:
            for annotation in dataset.annotations(image_id):
                rle = to_rle(annotation["segmentation"], *dataset.size(image_id))
                area = annotation["area"] or float(rle_tools.area(rle))
                number = len(annotations) + 1  # pycocotools takes an id of 0 for "not matched"
                annotations.append({**annotation, "id": number, "segmentation": rle, "area": area})
        images = {i: dataset.size(i) for i in dataset.image_ids}
        categories = [{"id": i, "name": n} for i, n in zip(dataset.category_ids, dataset.class_names)]
        truth.dataset = {
            "images": [{"id": i, "height": H, "width": W} for i, (H, W) in images.items()],
            "annotations": annotations,
            "categories": categories,
        }
        truth.createIndex()
        found = COCO()
        found.dataset = {**truth.dataset, "annotations": []}
        for number, detection in enumerate(detections, start=1):
            area = float(rle_tools.area(detection["segmentation"]))
            found.dataset["annotations"].append({**detection, "id": number, "area": area, "iscrowd": 0})
        found.createIndex()
        coco_eval = COCOeval(truth, found, "segm")
        coco_eval.evaluate()
        coco_eval.accumulate()
        coco_eval.summarize()
    precision = coco_eval.eval["precision"][:, :, :, 0, -1]  # (IoU, recall, class): all sizes, 100 detections
    per_class = [values[values > -1] for values in np.moveaxis(precision, 2, 0)]
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    result = {name: _percent(value) for name, value in zip(names, coco_eval.stats)}
    result["per_class"] = {
        name: _percent(values.mean()) if values.size else -1.0
        for name, values in zip(dataset.class_names, per_class)
    }
    return result


def _percent(value) -> float:
    return round(100 * float(value), 4) if value >= 0 else -1.0


# --------------------------------------------------------------------------------------- tables and pictures


def ap_line(ap: dict) -> str:
    return "  ".join(f"{name} {_number(value)}" for name, value in ap.items() if name != "per_class")


def ap_table(columns: dict[str, dict], by_class=True) -> str:
    """AP dictionaries side by side, a line for each number."""
    width = max(8, *(len(name) for name in columns)) + 2
    first = next(iter(columns.values()))
    rows = [[name] + [c[name] for c in columns.values()] for name in first if name != "per_class"]
    if by_class:
        rows += [
            ["  " + name] + [c["per_class"][name] for c in columns.values()] for name in first["per_class"]
        ]
    label = max(len(row[0]) for row in rows) + 2
    lines = [" " * label + "".join(name.rjust(width) for name in columns)]
    lines += [row[0].ljust(label) + "".join(_number(value).rjust(width) for value in row[1:]) for row in rows]
    return "\n".join(lines)


def _number(value: float) -> str:
    return "-" if value < 0 else f"{value:.1f}"


COLOURS = [(255, 255, 255), (255, 220, 60), (90, 220, 255), (255, 130, 200), (140, 255, 140), (255, 160, 80)]


def draw_instances(image: Image.Image, masks=(), names=(), scale: int = 1, dim: float = 0.35) -> Image.Image:
    """The image, `scale` times as large, masks (N, H, W) bool outlined and named, the rest times `dim`."""
    pixels = np.asarray(image.resize((image.width * scale, image.height * scale))).astype(float)
    masks = [np.kron(np.asarray(mask), np.ones((scale, scale), dtype=bool)) for mask in masks]
    pixels[~np.any([np.zeros(pixels.shape[:2], dtype=bool), *masks], axis=0)] *= dim
    for number, mask in enumerate(masks):
        inner = mask.copy()
        for axis in (0, 1):
            for shift in (-1, 1):
                inner &= np.roll(mask, shift, axis)
        pixels[mask & ~inner] = COLOURS[number % len(COLOURS)]
    picture = Image.fromarray(pixels.astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for mask, name in zip(masks, names):
        if mask.any():
            y, x = (int(values.mean()) for values in np.nonzero(mask))
            draw.text((x, y), name, fill="white", anchor="mm", stroke_width=1, stroke_fill="black")
    return picture


def pictures(models: dict, dataset: CocoDataset, device, *, count=6, threshold=0.5, **sizes) -> list[list]:
    """For `count` images of a data set a row of pictures: the image, its ground truth, and what each of the
    named models sees with a score above the threshold. sizes: as of `find`."""
    rows = []
    for image_id in dataset.image_ids[:: max(1, len(dataset) // count)][:count]:
        size, image = dataset.size(image_id), dataset.image(image_id)
        scale = max(1, 240 // max(size))
        masks = [rle_tools.decode(to_rle(o["segmentation"], *size)) > 0 for o in dataset.objects(image_id)]
        names = [dataset.class_names[label] for label in dataset.labels(image_id)]
        row = [draw_instances(image, scale=scale, dim=1), draw_instances(image, masks, names, scale)]
        for model in models.values():
            found = find(model, image, device, **sizes)
            row.append(draw_found(image, found, dataset.class_names, threshold, scale))
        rows.append(row)
    return rows


def find(model, image: Image.Image, device, *, short_side=0, long_side=0) -> dict:
    """What a model finds in an image, resized at test time by `data.test_size`."""
    size = image.height, image.width
    resized = image.resize(test_size(*size, short_side, long_side)[::-1], Image.Resampling.BILINEAR)
    return predict(model, [to_tensor(resized)], [size], device)[0]


def draw_found(image, found: dict, class_names, threshold: float, scale: int = 1, **more) -> Image.Image:
    """The instances of `find` above a score, with classes and scores."""
    sure = found["scores"] > threshold
    labels, scores = found["labels"][sure].tolist(), found["scores"][sure].tolist()
    names = [f"{class_names[label]} {score:.2f}" for label, score in zip(labels, scores)]
    return draw_instances(image, found["masks"][sure].cpu().numpy(), names, scale, **more)


def sheet(rows: list[list[Image.Image]], names: list[str]) -> Image.Image:
    """Rows of pictures as one, with the names of the columns."""
    widths = [max(row[c].width for row in rows) + 6 for c in range(len(names))]
    heights = [row[0].height + 6 for row in rows]
    page = Image.new("RGB", (sum(widths), sum(heights) + 20), "white")
    draw, x = ImageDraw.Draw(page), 0
    for c, (name, width) in enumerate(zip(names, widths)):
        draw.text((x + width // 2, 10), name, fill="black", anchor="mm")
        y = 20
        for row, height in zip(rows, heights):
            page.paste(row[c], (x + 3, y))
            y += height
        x += width
    return page


def load_model(checkpoint: dict, which: str, device) -> Mask2Former:
    """The "student" (what a phase has trained) or the "teacher" of a checkpoint, for inference."""
    of_a_teacher = which == "teacher" and checkpoint.get("teacher_args")  # in phase 2 it may be another model
    model = Mask2Former(**(of_a_teacher or checkpoint["model_args"]))
    model.load_state_dict(checkpoint[which])
    return model.to(device).eval().requires_grad_(False)


def check_classes(checkpoint: dict, class_names: list[str]) -> None:
    """Raises ValueError unless a checkpoint knows the classes of the data, or as many if it has no names."""
    known, number = checkpoint.get("class_names"), checkpoint["model_args"]["num_classes"]
    if known and known != class_names:
        raise ValueError(f"the checkpoint knows the classes {known}, the data has {class_names}")
    if number != len(class_names):
        raise ValueError(f"the checkpoint knows {number} classes, the data has {len(class_names)}")


def arguments(argv=None):
    """The flags."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("checkpoint", help="ours, or the official Mask2Former's, or Hugging Face's")
    add("--device", default="", help="cuda, mps or cpu; default: the best there is")
    add("--precision", help="bf16 or fp32; default: that of the run")
    add("--short-side", type=int, help="at test time, pixels; 0 keeps images; default: as trained, or 800")
    add("--long-side", type=int, help="limit of the longer side, pixels; default: as trained, or 1333")
    add = parser.add_argument_group("average precision").add_argument
    add("--data", help="shapes, coco, cityscapes or a folder; default: what the checkpoint was trained on")
    add("--root", help="where COCO or Cityscapes lies, or where shapes is written")
    add("--val-json", default="", help="in place of the folder's instances_val.json")
    add("--image-folder", default="", help="in place of the folder's images/")
    add("--batch", type=int, default=4, help="images at once in each process [4]")
    add("--json", help="write the APs into this file")
    add("--picture", help="write a picture of predictions beside ground truth into this file")
    add = parser.add_argument_group("predictions for any images").add_argument
    add(
        "--images", nargs="+", metavar="DIR|FILE", help="folders, with all that is below, and files of images"
    )
    add("--out", default="predictions", help="folder for pictures and results.json [predictions]")
    add("--threshold", type=float, default=0.5, help="lowest score that is kept [0.5]")
    add(
        "--pseudo", metavar="DIR", help="write the teacher's pseudo-labels of --images there, to correct them"
    )
    add = parser.add_argument_group("the model for other code").add_argument
    add(
        "--export", metavar="DIR", help="write torch.export's and ONNX's programs, and files for transformers"
    )
    add(
        "--which",
        choices=("student", "teacher"),
        help="which model predicts or is exported [student; teacher for --pseudo]",
    )
    return parser.parse_args(argv)


def main(argv=None) -> None:
    flags = arguments(argv)
    with user_errors():
        if flags.batch < 1:
            raise ValueError(f"--batch must be at least 1, found {flags.batch}")
        checkpoint = read_weights(flags.checkpoint)
        cfg = {"data": None, "test_short_side": 800, "test_long_side": 1333} | checkpoint.get("config", {})
        device = engine.start_processes(flags.device, flags.precision or cfg.get("precision", ""))
        sizes = {
            "short_side": cfg["test_short_side"] if flags.short_side is None else flags.short_side,
            "long_side": cfg["test_long_side"] if flags.long_side is None else flags.long_side,
        }
        if flags.export:
            from tools.export import export

            return export(checkpoint, flags.which or "student", Path(flags.export))
        if flags.images or flags.pseudo:
            from tools.predict import main as predict_images

            return predict_images(checkpoint, flags, sizes, device)
        dataset = validation_set(flags, cfg)
        check_classes(checkpoint, dataset.class_names)
        if is_cityscapes(dataset):
            cityscapes.rules()
    models = {}
    for which in ("student", "teacher"):
        if checkpoint[which] is not None:
            name = "teacher" if checkpoint.get("phase") == "teacher" else which  # phase 1 trains the teacher
            models[name] = load_model(checkpoint, which, device)
    with user_errors(DataError):
        how = dict(batch=flags.batch, **sizes)
        aps = {which: evaluate(model, dataset, device, **how) for which, model in models.items()}
    engine.say(ap_table(aps))
    with user_errors():
        if engine.rank() == 0 and flags.json:
            Path(flags.json).write_text(json.dumps(aps, indent=1))
        if engine.rank() == 0 and flags.picture:
            rows = pictures(models, dataset, device, **sizes)
            sheet(rows, ["image", "ground truth", *models]).save(flags.picture)


def validation_set(flags, cfg: dict) -> CocoDataset:
    """What --data names, or what a run with the settings cfg was measured on. Raises ValueError."""
    data = flags.data or cfg["data"]
    if not data:
        raise ValueError(f"{flags.checkpoint} does not say what it was trained on: --data does")
    before = cfg if data == cfg["data"] else {}  # where the run had its files
    files = {name: getattr(flags, name, "") or before.get(name, "") for name in ("train_json", "val_json")}
    images = flags.image_folder or before.get("image_folder", "")
    with engine.rank_zero_first():
        _, found = find_data(data, flags.root or before.get("root") or None, images=images, **files)
        if not found:
            raise ValueError(f"{data} has no instances_val.json")
        return CocoDataset(*found)


if __name__ == "__main__":
    main()
