"""Tests of evaluate.py: from outputs to instances, and from instances to AP."""

import contextlib
import io
import json

import numpy as np
import pytest
import torch
from pycocotools import mask as rle_tools
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from data import encode_rle
from evaluate import coco_results, evaluate, instances, mask_ap, model_settings, parse_arguments
from layouts import load_data

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
    assert model_settings(arguments, config)[1] == expected


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
