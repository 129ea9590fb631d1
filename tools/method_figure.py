"""Draw views, pseudo-labels and predictions of unlabeled training images, from the folder of a run.

    python -m tools.method_figure runs/shapes-0.02 docs/method.jpg --images 306 335 315

Views are drawn as in training. The pseudo-labels are those of guided burn-in."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from burnin import predict_pseudo_labels
from data import AugmentedDataset, stable_seed
from evaluate import CPU, predict_batch
from training.checkpoint import load_checkpoint, load_model
from training.cli import Parser, expected_errors
from training.config import Config
from training.run_data import read_data
from training.visualize import COLORS

CAPTIONS = ["unlabeled image,\nweak view", "pseudo-labels\nof the teacher"]
CAPTIONS += ["strong view,\nseen by the student", "student after\nguided burn-in", "student\nat the end"]
SIDE, GAP, TOP = 240, 8, 60  # longer side of a picture, space between pictures, height of captions: pixels


def main(argv=None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder with burnin.pt and distill.pt")
    parser.add_argument("picture", help="file to write")
    parser.add_argument("--images", nargs="+", type=int, help="image ids [the first three without labels]")
    flags = parser.parse_args(argv)
    with expected_errors():
        make_page([*draw_rows(flags.run, flags.images)]).save(flags.picture, quality=70)


def draw_rows(run: Path, image_ids: list[int] | None = None) -> Iterator[list[Image.Image]]:
    """Yield for each image a row of pictures, one for each of CAPTIONS. Raises ValueError for an image that
    is labeled or does not exist."""
    burnin, distill = (load_checkpoint(run / name) for name in ("burnin.pt", "distill.pt"))
    teacher = load_model(burnin, CPU.device, "teacher")
    students = [load_model(checkpoint, CPU.device) for checkpoint in (burnin, distill)]
    with tempfile.TemporaryDirectory() as out:  # reading the data reserves the folder of a run
        cfg = Config(**distill["config"] | {"out": out})
        data = read_data(cfg, CPU)
    held_out = sorted(set(data.train.image_ids) - set(data.labeled))
    if wrong := set(image_ids or ()) - set(held_out):
        raise ValueError(f"cannot draw image {min(wrong)}: it is no unlabeled training image of this run")
    views = AugmentedDataset(data.train, data.augmentation, labels=False, strong=cfg.strong_view.split(","))
    for image_id in image_ids or held_out[:3]:
        view = views[image_id, stable_seed(cfg.seed, "figure", image_id)]
        weak, strong = view["image"], view.get("strong", view["image"])
        [pseudo] = predict_pseudo_labels(teacher, weak[None], cfg, CPU)
        drawings = [(weak, {}), (weak, pseudo), (strong, {})]
        predictions = [predict_batch(student, [strong], None, rle=False)[0] for student in students]
        drawings += [(strong, prediction, 0.5) for prediction in predictions]
        yield [draw(data.train.class_names, *drawing) for drawing in drawings]


def draw(class_names: list[str], view, instances: dict, min_score: float = 0) -> Image.Image:
    """Draw a view (3, H, W) uint8, and outline, class and score of each instance above min_score."""
    H, W = (round(side * SIDE / max(view.shape)) for side in view.shape[1:])
    picture = Image.fromarray(view.permute(1, 2, 0).numpy()).resize((W, H), Image.Resampling.BICUBIC)
    drawing, font, texts = ImageDraw.Draw(picture), ImageFont.load_default(15), []
    for label, score, mask in zip(*(instances.get(key, ()) for key in ("labels", "scores", "masks"))):
        mask = Image.fromarray(mask.byte().numpy() * 255).resize((W, H), Image.Resampling.BILINEAR)
        mask = mask.point(lambda value: 255 * (value > 127))
        if score > min_score and mask.getbbox():
            outline = ImageChops.difference(mask, mask.filter(ImageFilter.MinFilter(5)))
            picture.paste(COLORS[label % len(COLORS)], mask=outline)
            y, x = (places.mean() for places in np.nonzero(np.asarray(mask)))
            texts.append((f"{class_names[label]} {score:.2f}", x, y))
    for text, x, y in texts:  # above all outlines, and not across the sides
        half = drawing.textlength(text, font) / 2 + 3
        place = min(max(x, half), W - half), y
        drawing.text(place, text, "white", font, anchor="mm", stroke_width=2, stroke_fill="black")
    return picture


def make_page(rows: list[list[Image.Image]]) -> Image.Image:
    """Combine rows of pictures of one size, and write CAPTIONS above the columns."""
    W, H = (side + GAP for side in rows[0][0].size)
    page = Image.new("RGB", (len(CAPTIONS) * W - GAP, TOP + len(rows) * H - GAP), "white")
    for column, caption in enumerate(CAPTIONS):
        place, font = (column * W + (W - GAP) // 2, TOP // 2), ImageFont.load_default(19)
        ImageDraw.Draw(page).text(place, caption, "black", font, anchor="mm", align="center")
        for row, pictures in enumerate(rows):
            page.paste(pictures[column], (column * W, TOP + row * H))
    return page


if __name__ == "__main__":
    main()
