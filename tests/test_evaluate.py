"""Tests of evaluate.py: from outputs to instances, and from instances to AP."""

import contextlib
import io
import json

import numpy as np
import pytest
import torch
from commands import run
from conftest import TINY
from PIL import Image
from pycocotools import mask as rle_tools
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

import evaluate as evaluation
from data import encode_rle
from evaluate import (
    coco_results,
    compare_predictions,
    evaluate,
    instances,
    mask_ap,
    model_settings,
    parse_arguments,
    predict_image,
)
from layouts import load_data
from training.checkpoint import REQUIRED_KEYS, save_checkpoint
from training.cli import expected_errors
from training.visualize import COLORS, draw_instances, make_grid

APS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def random_outputs(B=2, Q=5, K=3, size=(8, 16), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "pred_logits": 2 * torch.randn(B, Q, K + 1, generator=generator),
        "pred_masks": 4 * torch.randn(B, Q, *size, generator=generator),
    }


# ------------------------------------------------------------------------------------------ instances


@pytest.mark.parametrize("top_k", [7, 100])
@pytest.mark.parametrize("output_sizes", [None, [(35, 41), (20, 30)]])
def test_instances_equal_a_plain_computation(resize, output_sizes, top_k):
    outputs, image_sizes = random_outputs(), [(27, 50), (32, 33)]
    results = instances(outputs, image_sizes, output_sizes, top_k)
    for b, result in enumerate(results):
        H, W = image_sizes[b]
        masks = resize(outputs["pred_masks"][b].double().numpy(), (32, 64))[:, :H, :W]
        if output_sizes:
            masks = resize(masks, output_sizes[b])
        exponentials = outputs["pred_logits"][b].double().exp().numpy()
        probabilities = exponentials / exponentials.sum(1, keepdims=True)
        pairs = [(probabilities[q, k], q, k) for q in range(5) for k in range(3)]  # not "no object"
        expected = []
        for probability, q, k in sorted(pairs, reverse=True)[:top_k]:
            inside = masks[q][masks[q] > 0]
            expected.append((probability * (1 / (1 + np.exp(-inside))).mean(), q, k))
        expected.sort(reverse=True)

        assert len(result["scores"]) == len(expected) == min(top_k, 15)
        np.testing.assert_allclose(result["scores"], [score for score, _, _ in expected], rtol=1e-4)
        assert result["labels"].tolist() == [k for _, _, k in expected]
        assert result["labels"].dtype == torch.int64 and result["masks"].dtype == torch.bool
        for mask, (_, q, _) in zip(result["masks"].numpy(), expected, strict=True):
            assert mask.shape == masks[q].shape
            assert (mask == (masks[q] > 0))[np.abs(masks[q]) > 1e-4].all()


def test_the_best_instance_comes_first():
    for result in instances(random_outputs(B=4, Q=20), [(32, 64)] * 4):
        assert (result["scores"][:-1] >= result["scores"][1:]).all()
        assert (result["scores"] >= 0).all() and (result["scores"] <= 1).all()


def test_the_padding_is_cut_off():
    """A mask that lies in the padding is empty and has a score of 0."""
    outputs = {"pred_logits": torch.tensor([[[9.0, 0.0]]]), "pred_masks": torch.full((1, 1, 16, 16), -9.0)}
    outputs["pred_masks"][:, :, 12:] = outputs["pred_masks"][:, :, :, 12:] = 9
    [whole] = instances(outputs, [(64, 64)])
    [cut] = instances(outputs, [(40, 44)])
    assert whole["masks"].shape == (1, 64, 64) and whole["masks"].any() and whole["scores"] > 0.9
    assert cut["masks"].shape == (1, 40, 44) and not cut["masks"].any() and cut["scores"] == 0


def test_masks_are_resized_after_the_padding_is_cut_off():
    """The left half of the image remains the left half."""
    outputs = {"pred_logits": torch.zeros(1, 1, 2), "pred_masks": torch.full((1, 1, 16, 16), -9.0)}
    outputs["pred_masks"][..., :5] = 9  # 20 of 40 pixels
    [result] = instances(outputs, [(40, 40)], [(60, 120)])
    assert result["masks"].shape == (1, 60, 120)
    assert result["masks"][..., :59].all() and not result["masks"][..., 61:].any()


def test_a_query_counts_for_each_of_its_classes():
    outputs = {"pred_logits": torch.tensor([[[3.0, 2.0, 0.0]]]), "pred_masks": torch.full((1, 1, 8, 8), 9.0)}
    [result] = instances(outputs, [(32, 32)])
    assert result["labels"].tolist() == [0, 1]
    assert torch.equal(result["masks"][0], result["masks"][1])


@pytest.mark.parametrize("output_sizes", [None, [(35, 41), (120, 90)]])
@pytest.mark.parametrize("max_pixels", [1, 5000, 2**24])
def test_rles_are_those_of_the_masks(monkeypatch, output_sizes, max_pixels):
    """Whatever number of masks is upsampled at once."""
    outputs, image_sizes = random_outputs(Q=20), [(27, 50), (32, 33)]
    expected = instances(outputs, image_sizes, output_sizes)
    monkeypatch.setattr(evaluation, "MAX_PIXELS_PER_CHUNK", max_pixels)
    for result, masks in zip(instances(outputs, image_sizes, output_sizes, rle=True), expected, strict=True):
        assert set(result) == {"scores", "labels", "rles"} and len(result["rles"]) == 60
        torch.testing.assert_close(result["scores"], masks["scores"])
        assert torch.equal(result["labels"], masks["labels"])
        for encoded, mask in zip(result["rles"], masks["masks"].numpy(), strict=True):
            assert encoded == rle_tools.encode(np.asfortranarray(mask, dtype=np.uint8))


# ------------------------------------------------------------------------------------------------- AP


def truth_as_detections(dataset):
    return [
        {
            "image_id": image_id,
            "category_id": annotation["category_id"],
            "segmentation": encode_rle(annotation["segmentation"], *dataset.size(image_id)),
            "score": 1.0,
        }
        for image_id in dataset.image_ids
        for annotation in dataset.objects(image_id)
    ]


def imperfect_detections(dataset, seed=0):
    """Return the ground truth, shifted by a few pixels, some of it missing, doubled, or of another class."""
    rng, detections = np.random.default_rng(seed), []
    for detection in truth_as_detections(dataset):
        for _ in range(rng.integers(0, 4)):
            mask = rle_tools.decode(detection["segmentation"])
            mask = np.roll(mask, rng.integers(-3, 4, 2), axis=(0, 1))
            rle = rle_tools.encode(np.asfortranarray(mask))
            category = detection["category_id"] if rng.random() < 0.8 else rng.choice(dataset.category_ids)
            detections.append(
                {
                    **detection,
                    "category_id": int(category),
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
                    "score": float(rng.random()),
                }
            )
    return detections


def pycocotools_ap(annotation_file, detections, folder):
    """Compute AP by pycocotools on files, without code of this project. Returns the six numbers and the AP of
    each category."""
    (folder / "detections.json").write_text(json.dumps(detections))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(annotation_file)
        coco_eval = COCOeval(truth, truth.loadRes(str(folder / "detections.json")), "segm")
        coco_eval.evaluate()
        coco_eval.accumulate()
        coco_eval.summarize()
    per_class = []
    for k in range(len(coco_eval.params.catIds)):
        precision = coco_eval.eval["precision"][:, :, k, 0, -1]
        per_class.append(precision[precision > -1].mean() if (precision > -1).any() else -0.01)
    return 100 * coco_eval.stats[:6], 100 * np.array(per_class)


def rectangle_mask(top, left, bottom, right, size=(96, 128)):
    mask = np.zeros(size, dtype=np.uint8, order="F")
    mask[top:bottom, left:right] = 1
    return mask


def rle(mask):
    encoded = rle_tools.encode(np.asfortranarray(mask))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def test_the_ground_truth_has_an_ap_of_100(shapes):
    _, val = load_data(str(shapes))
    ap = mask_ap(val, truth_as_detections(val))
    present = {val.class_names[label] for i in val.image_ids for label in val.labels(i)}
    assert ap["AP"] == ap["AP50"] == ap["AP75"] == 100
    assert ap["per_class"] == {name: 100 if name in present else -1 for name in val.class_names}


def test_many_detections_are_evaluated(shapes):
    """pycocotools cannot compute the areas of more than 255 masks at once."""
    _, val = load_data(str(shapes))
    detections = truth_as_detections(val)
    copies = [{**d, "score": 0.01} for d in detections for _ in range(300 // len(detections) + 1)]
    assert len(copies) > 255
    assert mask_ap(val, [*detections, *copies])["AP"] == 100


def test_no_prediction_has_an_ap_of_0(shapes):
    _, val = load_data(str(shapes))
    ap = mask_ap(val, [])
    assert set(ap) == {*APS, "per_class"}
    assert ap["AP"] == ap["AP50"] == ap["AP75"] == 0
    assert all(value in (0, -1) for value in ap["per_class"].values())


@pytest.mark.parametrize("seed", range(3))
def test_ap_equals_that_of_pycocotools_on_files(shapes, tmp_path, seed):
    _, val = load_data(str(shapes))
    detections = imperfect_detections(val, seed)
    expected, expected_per_class = pycocotools_ap(val.json_file, detections, tmp_path)
    assert 5 < expected[0] < 95
    ap = mask_ap(val, detections)
    np.testing.assert_allclose([ap[name] for name in APS], np.where(expected < 0, -1, expected), atol=1e-4)
    np.testing.assert_allclose(list(ap["per_class"].values()), expected_per_class, atol=1e-4)


@pytest.fixture
def crowded(make_dataset):
    """Make objects of three sizes and a crowd, with polygons and RLE, and category ids with gaps."""
    regions = [(5, 5, 25, 25), (5, 60, 90, 120), (40, 10, 80, 50), (30, 30, 90, 120)]
    annotations = [
        {"image_id": 1 + n // 3, "category_id": (4, 9, 9, 9)[n], "segmentation": rle(rectangle_mask(*region))}
        for n, region in enumerate(regions)
    ]
    top, left, bottom, right = regions[1]
    annotations[1]["segmentation"] = [[left, top, right, top, right, bottom, left, bottom]]
    annotations[3]["iscrowd"] = 1
    annotations.append({**annotations[0], "image_id": 2, "id": 50})
    for annotation in annotations:
        annotation["area"] = int(rle_tools.area(encode_rle(annotation["segmentation"], 96, 128)))
    return make_dataset({i: np.zeros((96, 128, 3)) for i in (1, 2)}, annotations, category_ids=(9, 4, 30))


def test_a_detection_within_a_crowd_is_neither_right_nor_wrong(crowded, tmp_path):
    within = {
        "image_id": 2,
        "category_id": 9,
        "segmentation": rle(rectangle_mask(40, 40, 80, 100)),
        "score": 2.0,
    }
    found = truth_as_detections(crowded)
    assert mask_ap(crowded, [*found, within])["AP"] == 100
    assert mask_ap(crowded, [*found, {**within, "image_id": 1}])["AP"] < 100
    detections = [*imperfect_detections(crowded), within]
    expected, expected_per_class = pycocotools_ap(crowded.json_file, detections, tmp_path)
    ap = mask_ap(crowded, detections)
    np.testing.assert_allclose([ap[name] for name in APS], np.where(expected < 0, -1, expected), atol=1e-4)
    np.testing.assert_allclose(list(ap["per_class"].values()), expected_per_class, atol=1e-4)


def test_an_annotation_with_id_0_can_be_matched(make_dataset):
    """In pycocotools the id 0 means "not matched"."""
    annotations = [
        {
            "id": n,
            "image_id": 1,
            "category_id": 1,
            "segmentation": rle(rectangle_mask(5, left, 45, left + 30)),
        }
        for n, left in enumerate((5, 50))
    ]
    dataset = make_dataset({1: np.zeros((96, 128, 3))}, annotations)
    assert [annotation["id"] for annotation in dataset.annotations(1)] == [0, 1]
    assert mask_ap(dataset, truth_as_detections(dataset))["AP"] == 100


def test_an_annotation_without_an_area_gets_the_area_of_its_mask(make_dataset):
    """20 x 20 is small, 40 x 50 medium, 100 x 100 large."""
    sizes = ((20, 20), (40, 50), (100, 100))
    masks = [rectangle_mask(0, 0, *size, size=(100, 128)) for size in sizes]
    annotations = [
        {"image_id": n, "category_id": 1, "segmentation": rle(mask)} for n, mask in enumerate(masks, start=1)
    ]
    dataset = make_dataset({n: np.zeros((100, 128, 3)) for n in (1, 2, 3)}, annotations)
    found = truth_as_detections(dataset)
    assert [mask_ap(dataset, found)[name] for name in APS[3:]] == [100, 100, 100]
    assert [mask_ap(dataset, found[:1])[name] for name in APS[3:]] == [100, 0, 0]


# ---------------------------------------------------------------------------------- the whole evaluation


class Oracle(nn.Module):
    """A model that reads the answer from the image: channel k shows the object of class k."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def forward(self, images):
        assert not self.training and not torch.is_grad_enabled()
        self.shapes.append(tuple(images.shape))
        H, W = images.shape[-2:]
        images = nn.functional.pad(images.float(), (0, -W % 32, 0, -H % 32))
        masks = nn.functional.avg_pool2d(images, 4) - 127.5
        present = (masks > 0).flatten(2).any(-1).float()
        classes = 20 * torch.diag_embed(present)
        return {
            "pred_logits": torch.cat([classes, 20 - 20 * present[..., None]], dim=-1),
            "pred_masks": masks,
        }


@pytest.fixture
def painted(make_dataset):
    """Make images of two sizes with objects of some classes, each painted into the channel of its label."""
    rng, images, annotations = np.random.default_rng(0), {}, []
    for image_id in range(10, 17):
        H, W = (64, 96) if image_id % 3 else (100, 76)
        images[image_id] = np.zeros((H, W, 3), dtype=np.uint8)
        for label in rng.permutation(3)[: image_id % 4]:
            top, left = 4 * rng.integers(0, 4, 2)
            mask = rectangle_mask(top, left, top + 40, left + 48, (H, W))
            images[image_id][..., label] = 255 * mask
            annotation = {"image_id": image_id, "category_id": (3, 7, 40)[label], "segmentation": rle(mask)}
            annotations.append(annotation)
    return make_dataset(images, annotations, category_ids=(3, 7, 40))


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("test_size", [(0, 0), (128, 1000), (96, 128)])
def test_a_perfect_model_has_an_ap_of_100(painted, batch_size, test_size):
    """The batch size and the test size do not change that. Each batch has images of one size."""
    oracle = Oracle().train()
    ap = evaluate(oracle, painted, batch_size=batch_size, test_size=test_size)
    assert ap["AP"] == 100 and ap["per_class"] == {"class 3": 100, "class 7": 100, "class 40": 100}
    assert oracle.training
    assert sum(shape[0] for shape in oracle.shapes) == len(painted)
    assert max(shape[0] for shape in oracle.shapes) <= batch_size
    assert len({shape[2:] for shape in oracle.shapes}) == 2
    if test_size == (0, 0):
        assert {shape[2:] for shape in oracle.shapes} == {(64, 96), (100, 76)}


@pytest.mark.parametrize("tile, test_size, shape", [(48, (0, 0), (48, 48)), (64, (96, 96), (96, 96))])
def test_windows_find_what_whole_images_show(painted, tile, test_size, shape):
    """Most objects are nearly as large as a window, so they are joined from pieces."""
    oracle = Oracle().eval()
    ap = evaluate(oracle, painted, test_size=test_size, tile=tile)
    assert ap["AP50"] == 100 and ap["AP"] > 90
    assert {sizes[2:] for sizes in oracle.shapes} == {shape}
    image = painted.image(painted.image_ids[0])
    for threshold in (0.0, 0.5):
        result = predict_image(oracle, image, test_size=test_size, tile=tile, threshold=threshold)
        assert sorted(result["labels"].tolist()) == sorted(painted.labels(painted.image_ids[0]))
    nothing = predict_image(oracle, image, test_size=test_size, tile=tile, threshold=1.0)
    assert nothing["rles"] == [] and len(nothing["scores"]) == 0


def test_the_masks_in_memory_do_not_grow_with_the_images_of_a_batch(painted, monkeypatch):
    """No more than MAX_PIXELS_PER_CHUNK pixels of masks at the size of the original images."""
    sizes, resize = [], evaluation.resize

    def recorded(maps, size):
        sizes.append((maps.shape[1], *size))
        return resize(maps, size)

    monkeypatch.setattr(evaluation, "resize", recorded)
    monkeypatch.setattr(evaluation, "MAX_PIXELS_PER_CHUNK", 2 * 64 * 96)
    assert evaluate(Oracle(), painted, batch_size=16, test_size=(128, 1000))["AP"] == 100
    at_full_size = [size for size in sizes if size[1:] in ((96, 64), (76, 100))]
    assert max(N * H * W for N, H, W in at_full_size) == 2 * 64 * 96
    assert {size[0] for size in at_full_size} == {1, 2}


class Fixed(nn.Module):
    """A model with one query for each of some masks (Q, H, W), which must be aligned to strides of 4."""

    def __init__(self, masks):
        super().__init__()
        self.logits = 40 * torch.as_tensor(masks[:, ::4, ::4]).float() - 20

    def forward(self, images):
        B, Q = len(images), len(self.logits)
        return {
            "pred_logits": torch.tensor([9.0, 0.0]).expand(B, Q, 2),
            "pred_masks": self.logits.expand(B, *self.logits.shape),
        }


@pytest.fixture
def cells(make_dataset):
    """Make an image of 160 objects of 24 x 24 pixels, and return it with their masks (160, H, W)."""
    masks = np.zeros((160, 320, 512), dtype=np.uint8)
    for n in range(160):
        top, left = 32 * (n // 16), 32 * (n % 16)
        masks[n, top : top + 24, left : left + 24] = 1
    annotations = [{"image_id": 1, "category_id": 1, "segmentation": rle(mask)} for mask in masks]
    return make_dataset({1: np.zeros((320, 512, 3))}, annotations, category_ids=[1]), masks


def test_more_than_100_objects_are_found(cells, capsys):
    """COCO's AP counts 100 of them: at most 63 of 101 levels of recall have a precision."""
    dataset, masks = cells
    model = Fixed(masks)
    assert len(predict_image(model, dataset.image(1))["rles"]) == 160
    ap = evaluate(model, dataset)
    assert ap["AP_all"] == 100 and ap["AP"] == pytest.approx(100 * 63 / 101, abs=1e-3)
    assert ap["per_class"] == {"class 1": ap["AP"]}
    warning = "an image has 160 objects, but COCO's AP counts at most 100 detections of a class in an image"
    assert warning in capsys.readouterr().out
    half = mask_ap(dataset, truth_as_detections(dataset)[:80])
    assert half["AP_all"] == half["AP"] == pytest.approx(100 * 51 / 101, abs=1e-3)


def test_up_to_100_objects_are_evaluated_with_100_detections(cells, monkeypatch):
    """Of a model with more queries the official evaluation also keeps 100."""
    dataset, masks = cells
    found, mask_ap = [], evaluation.mask_ap
    monkeypatch.setattr(evaluation, "mask_ap", lambda *args: found.append(len(args[1])) or mask_ap(*args))
    monkeypatch.setattr(evaluation, "most_objects", lambda dataset: 100)
    assert "AP_all" not in evaluate(Fixed(masks), dataset) and found == [100]


# --------------------------------------------------------------------------------- empty sets and pictures


@pytest.fixture
def own_checkpoint(make_model, tmp_path):
    content = dict.fromkeys(REQUIRED_KEYS, 0) | {"phase": "distill", "teacher": None}
    del content["format"]
    content |= {"config": {"test_size": (0, 0)}, "model_args": TINY, "model": make_model().state_dict()}
    save_checkpoint(tmp_path / "distill.pt", content)
    return tmp_path / "distill.pt"


def without(file, *keys):
    """Write a copy of a COCO file with nothing under these keys. Returns its path."""
    content = json.loads(file.read_text()) | {key: [] for key in keys}
    copy = file.with_name("val.json")
    copy.write_text(json.dumps(content))
    return copy


SQUARE = {"image_id": 1, "category_id": 1, "segmentation": [[2, 2, 30, 2, 30, 30, 2, 30]]}


def test_a_validation_set_without_objects_has_no_ap(make_dataset, own_checkpoint, tmp_path):
    train = make_dataset({1: np.zeros((64, 96, 3))}, [SQUARE]).json_file
    val = without(train, "annotations")
    files = ["--data", tmp_path, "--train-json", train, "--val-json", val]
    done = run("evaluate.py", own_checkpoint, *files, "--picture", tmp_path / "p.png")
    assert f"warning: {val}: AP is '-', because no image has an object to find" in done.stdout
    table = done.stdout.splitlines()[-10:]
    assert table[0].split() == ["student"] and all(line.split()[-1] == "-" for line in table[1:])
    assert Image.open(tmp_path / "p.png").width > 3 * 96


def test_a_validation_set_without_images_is_refused(make_dataset, own_checkpoint, tmp_path):
    train = make_dataset({1: np.zeros((64, 96, 3))}, [SQUARE]).json_file
    val = without(train, "images", "annotations")
    files = ["--data", tmp_path, "--train-json", train, "--val-json", val]
    error = run("evaluate.py", own_checkpoint, *files, code=2).stderr
    assert error == f"error: cannot evaluate: {str(val)!r} has no image; pass another --val-json\n"


def test_a_picture_of_an_empty_set_has_its_captions_only(make_dataset):
    dataset = make_dataset({}, [])
    assert compare_predictions({}, dataset) == []
    page = make_grid([], ["image", "ground truth"])
    assert page.width > 200 and len(page.getcolors()) > 1


def test_pictures_of_large_images_are_small(make_dataset):
    dataset = make_dataset({1: np.zeros((900, 2000, 3))}, [])
    [row] = compare_predictions({}, dataset)
    assert [picture.size for picture in row] == [(1000, 450)] * 2


@pytest.mark.parametrize("scale", [1, 3, 0.25])
def test_masks_are_outlined_and_everything_else_is_dimmed(scale):
    """A mask may be an array or an RLE. Lines have the same width relative to the picture."""
    image, mask = Image.new("RGB", (400, 200), (100, 150, 200)), rectangle_mask(40, 80, 120, 240, (200, 400))
    picture = draw_instances(image, [mask > 0], scale=scale, dim=0.5)
    assert picture.tobytes() == draw_instances(image, [rle(mask)], scale=scale, dim=0.5).tobytes()
    assert picture.size == (400 * scale, 200 * scale)
    pixels = np.asarray(picture)
    inside = np.zeros(pixels.shape[:2], dtype=bool)
    inside[int(40 * scale) : int(120 * scale), int(80 * scale) : int(240 * scale)] = True
    line = max(1, round(400 * scale / 600))
    inner = np.zeros_like(inside)
    inner[
        int(40 * scale) + line : int(120 * scale) - line, int(80 * scale) + line : int(240 * scale) - line
    ] = 1
    assert (pixels[~inside] == (50, 75, 100)).all()
    assert (pixels[inside & ~inner] == COLORS[0]).all()
    assert (pixels[inner] == (100, 150, 200)).all()


def test_lines_and_text_grow_with_the_picture():
    def white(size):
        mask = rectangle_mask(size // 4, size // 4, size // 2, size // 2, (size, size))
        pixels = np.asarray(draw_instances(Image.new("RGB", (size, size)), [mask], ["a name"]))
        return (pixels == 255).all(-1).mean()

    assert white(3000) == pytest.approx(white(1200), rel=0.3)


# --------------------------------------------------------------------------------------- errors of torch


@pytest.mark.parametrize(
    "allocate, amount",
    [
        (lambda: torch.empty(2**50, dtype=torch.uint8), "1125899906842624 bytes of memory"),
        (lambda: np.empty(2**50, dtype=np.uint8), "1.00 PiB of memory"),
        (lambda: bytearray(2**60), "memory"),
    ],
)
def test_too_little_memory_is_one_line_that_names_the_flags(allocate, amount, capsys):
    with pytest.raises(SystemExit) as stop, expected_errors():
        allocate()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: cannot allocate {amount}; use a smaller --batch, --test-size")
    assert error.count("\n") == 1


def test_too_little_memory_of_a_gpu_is_the_same_line(capsys):
    message = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.18 GiB"
    with pytest.raises(SystemExit) as stop, expected_errors():
        raise torch.OutOfMemoryError(message)
    assert stop.value.code == 2 and "cannot allocate 2.00 GiB of memory; use" in capsys.readouterr().err


def test_a_model_that_cannot_be_compiled_is_one_line_that_names_the_flag(capsys):
    def branch_on_values(x):
        return x if x.sum() > 0 else -x

    compiled = torch.compile(branch_on_values, fullgraph=True, backend="eager")
    with pytest.raises(SystemExit) as stop, expected_errors():
        compiled(torch.ones(2))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert error.startswith("error: torch.compile cannot trace this model: ") and "drop --compile" in error


# ------------------------------------------------------------------------------------------------ results


def test_results_have_the_category_ids_of_the_dataset_and_no_empty_masks():
    masks = torch.zeros(3, 10, 12, dtype=torch.bool)
    masks[0, 2:5, 3:9] = masks[2] = True
    result = {"scores": torch.tensor([0.9, 0.5, 0.25]), "labels": torch.tensor([1, 0, 2]), "masks": masks}
    results = coco_results(77, result, category_ids=[3, 7, 40])
    assert [(d["image_id"], d["category_id"]) for d in results] == [(77, 7), (77, 40)]
    assert [d["score"] for d in results] == pytest.approx([0.9, 0.25])
    for detection, mask in zip(results, masks[[0, 2]].numpy(), strict=True):
        np.testing.assert_array_equal(rle_tools.decode(detection["segmentation"]), mask)


def test_the_longer_side_may_have_no_limit(painted):
    oracle = Oracle()
    assert evaluate(oracle, painted, test_size=(128, 0))["AP"] == 100
    assert {shape[2:] for shape in oracle.shapes} == {(128, 192), (168, 128)}


# ------------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    "flags, config, expected",
    [
        ("", {}, (800, 1333)),
        ("", {"test_size": (96, 128)}, (96, 128)),
        ("--test-size 0,0", {"test_size": (96, 128)}, (0, 0)),
        ("--short-side 64", {"test_size": (96, 128)}, (64, 128)),  # the former flags
        ("--short-side 0 --long-side 0", {}, (0, 0)),
    ],
)
def test_the_test_size_is_that_of_the_flags_or_of_the_training_run(flags, config, expected):
    arguments = parse_arguments(["a.pt", "--device", "cpu", *flags.split()])
    settings = model_settings(arguments, config)
    assert settings["test_size"] == expected and settings["tile"] == 0


def test_the_tile_is_that_of_the_flag_or_of_the_training_run():
    for flags, expected in (([], 96), (["--tile", "64"], 64), (["--tile", "0"], 0)):
        flags = parse_arguments(["a.pt", "--device", "cpu", *flags])
        assert model_settings(flags, {"tile": 96})["tile"] == expected


def test_the_test_size_has_two_numbers():
    with pytest.raises(ValueError, match="two numbers"):
        model_settings(parse_arguments(["a.pt", "--device", "cpu", "--test-size", "64"]), {})


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--images photos/ --out found/", "python -m tools.predict a.pt photos/"),
        ("--images photos/ --pseudo new/", "python -m tools.predict a.pt photos/"),
        ("--pseudo new/", "--pseudo-labels new_labels/"),
        ("--export my_model --which teacher", "python -m tools.export a.pt my_model"),
        ("--threshold 0.3", "python -m tools.predict a.pt photos/"),
    ],
)
def test_flags_that_moved_name_the_command_that_has_them(flags, words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_arguments(["a.pt", *flags.split()])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "has moved" in error and words in error
