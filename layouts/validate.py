"""Check untrusted COCO annotations before pycocotools' C code, which checks nothing, reads them.

    dataset = load_coco("my_dataset/instances_train.json", "my_dataset/images")
    print(format_bins(dataset.bins))            # what became of each annotation
    print(*dataset.notes, sep="\\n")             # what was repaired, left out, or looks wrong

What annotation tools write is read as it was meant, and counted. What contradicts itself is an error.

Shapes: H W pixels."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from data import CocoDataset, DataError
from layouts.file_names import (
    UnreadableError,
    file_identities,
    find_files,
    is_lfs_pointer,
    nearest_file,
    read_sizes,
)
from layouts.json_files import LFS_HINT, read_json
from layouts.masks import read_mask, whole_number

# Pillow refuses larger images as decompression bombs, unless its limit is switched off.
MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 2**27)
MAX_MISSING = 0.1  # share of missing images that is left out without --allow-missing
MANY_CROWDS = 0.1  # share of crowds that is worth a note, as COCO has 1 %
NUM_HEADERS = 50  # images whose headers are compared with the annotations

# Each annotation ends in one of these bins. The text follows the number of those that are left out.
BINS = {
    "trained": "",
    "crowd": "",
    "boxes only": "without a mask (boxes only)",
    "unreadable form": "with a mask that is neither polygons nor an RLE",
    "fewer than three corners": "with polygons of fewer than three corners",
    "not numbers": "with coordinates that are not numbers",
    "outside": "outside of the image",
    "empty": "with an empty mask",
    "duplicate": "repeating another one (same image, class and mask)",
    "image missing": "of missing images",
    "class not in training": "of classes that are not in the training set",
    "invalid": "",  # each is an error of its own
}
NOTES = {bin: f"annotations left out: {{}} {why}" for bin, why in BINS.items() if why} | {
    "shared": "{} validation files are training files, so AP will be too high",
    "ids": "annotation ids: {} repeated or missing, so all annotations are numbered anew",
    "names": "image file names: {} found under another name",
    "sizes": "image sizes: {} missing and taken from the image files",
    "merged": "image entries: {} for a file that has an earlier entry, merged with it",
    "unusual form": "masks: {} nested otherwise than COCO's, or with numbers as text, read as meant",
}


@dataclass
class Findings:
    """What the validation finds: a message for each error, finished notes, and a count with an example for
    each bin, repair and suspicion."""

    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def count(self, kind: str, example) -> None:
        self.counts[kind] += 1
        self.examples.setdefault(kind, str(example)[:200])


def load_coco(
    json_file,
    image_folder,
    strict: bool = True,
    *,
    content: dict | None = None,
    like: CocoDataset | None = None,
    allow_missing: bool = False,
    crowd_is_object: bool = False,
    follow_links: bool = True,
) -> CocoDataset:
    """Read and validate a COCO JSON file and find its images.

    Args:
        strict: raise the first error. Otherwise invalid entries are left out, and the attribute `errors` of
            the result lists all errors.
        content: the parsed content {"images", "annotations", "categories"} of the file, if it is not to be
            read, because it had another form.
        like: the training set, if a validation set is read. The result has its classes, matched by name.
        allow_missing: leave out any number of missing images, if one remains.
        crowd_is_object: take each crowd as one object.
        follow_links: follow links in the image folder that leave it.

    Attributes `notes` and `bins` of the result: a line for each kind of repair, of thing that is left out and
    of suspicion; and the number of annotations that ended in each of BINS, `trained` first.

    Raises DataError for a file that is missing or invalid, or contradicts itself or its images."""
    content = read_json(json_file) if content is None else content
    found = Findings()
    categories, category_of = read_categories(content, like, found)
    images, image_of = read_images(content["images"], image_folder, follow_links, allow_missing, found)
    annotations = read_annotations(content["annotations"], image_of, category_of, crowd_is_object, found)
    check_sizes(images, image_folder, found)
    check_masks(found)
    if like is None:
        check_training_set(images, found)
    else:
        check_validation_set(images, image_folder, like, found)
    for kind, text in NOTES.items():
        if found.counts[kind]:
            found.notes.append(f"{text.format(f'{found.counts[kind]:,}')}, such as {found.examples[kind]}")
    if found.errors and strict:
        more = f" ({len(found.errors)} problems in all; python -m tools.check_data lists them)"
        raise DataError(f"{json_file}: {found.errors[0]}{more if len(found.errors) > 1 else ''}")
    valid = {"images": images, "annotations": annotations, "categories": categories}
    dataset = CocoDataset(json_file, image_folder, valid)
    dataset.errors, dataset.notes, dataset.bins = found.errors, found.notes, bin_counts(found)
    return dataset


def bin_counts(found: Findings) -> dict[str, int]:
    return {bin: found.counts[bin] for bin in BINS if found.counts[bin] or bin == "trained"}


def format_bins(bins: dict[str, int], one_line: bool = False) -> str:
    """Format the number of annotations in each bin as a table, or as one line."""
    rows = [(f"{count:,}", bin) for bin, count in bins.items()]
    if one_line:
        text = ", ".join(f"{count} {bin}" for count, bin in rows)
        return f"{sum(bins.values()):,} annotations: {text}"
    width = max((len(count) for count, _ in rows), default=0)
    return "\n".join(f"{count:>{width}}  {bin}" for count, bin in rows)


# ------------------------------------------------------------------------------------------------------- ids


def as_id(value) -> int | str | None:
    """Return an id as an integer or text. Whole floats are integers, other kinds of values are None."""
    return value if type(value) in (int, str) else whole_number(value)


def as_key(value) -> str | None:
    """Return an id as text, by which ids are compared: 7, 7.0 and "7" are the same."""
    identifier = as_id(value)
    return None if identifier is None else str(identifier)


def keep_valid(entries: list, kind: str, errors: list[str]) -> dict[str, dict]:
    """Return {id as text: entry}, without the entries that are no dictionaries, or have no id or that of an
    earlier one. The ids of the entries become integers, or text if any of them is text."""
    result = {}
    for entry in entries:
        given = entry.get("id") if isinstance(entry, dict) else entry
        key, name = as_key(given), f"{kind} {given!r}"[:80]
        if not isinstance(entry, dict):
            errors.append(f"{name}: it is not a dictionary")
        elif key is None:
            errors.append(f"{name}: its id is neither an integer nor text")
        elif key in result:
            errors.append(f"{name}: its id is used twice")
        else:
            result[key] = entry | {"id": as_id(given)}
    if any(isinstance(entry["id"], str) for entry in result.values()):
        result = {key: entry | {"id": key} for key, entry in result.items()}
    return result


# ------------------------------------------------------------------------------------------------ categories


def read_categories(content: dict, like, found: Findings) -> tuple[list[dict], dict[str, dict | str]]:
    """Read the categories. Returns (those of the dataset, {id as text: category, or the bin of its
    annotations})."""
    entries = keep_valid(content["categories"], "category", found.errors)
    if not content["categories"]:
        found.errors.append("it has no category")
    used = {as_key(a.get("category_id")) for a in content["annotations"] if isinstance(a, dict)}
    result, names = dict.fromkeys(entries, "invalid"), set()
    for key, entry in leave_out_unused(entries, used, found).items():
        name = entry.get("name")
        if not isinstance(name, str):
            found.errors.append(f"category {entry['id']!r}"[:80] + f": its name {name!r} is not text"[:200])
        elif name in names:
            found.errors.append(f"category {entry['id']!r}"[:80] + f": its name {name!r} is used twice"[:200])
        else:
            names.add(name)
            result[key] = {"id": entry["id"], "name": name}
    if like is None:
        return [entry for entry in result.values() if isinstance(entry, dict)], result
    return match_categories(result, like, found)


def leave_out_unused(entries: dict[str, dict], used: set, found: Findings) -> dict[str, dict]:
    """Leave out the categories that no annotation uses and that are no classes: the background, another's
    supercategory, and those that share a name with another one."""
    parents = [(str(entry.get("supercategory")), str(entry.get("name"))) for entry in entries.values()]
    parents = {parent for parent, name in parents if parent != name}
    result, names, unused = {}, set(), []
    for key, entry in sorted(entries.items(), key=lambda item: item[0] not in used):
        name = str(entry.get("name"))
        is_background = name.lower() in ("background", "_background_", "__background__")
        if key not in used and (is_background or name in parents or name in names):
            unused.append(name)
        else:
            result[key] = entry
            names.add(name)
    if unused:
        why = "(the background, a supercategory or the name of another one)"
        found.notes.append(
            f"categories left out, as no annotation uses them {why}: {str(unused)[1:-1]}"[:300]
        )
    return result


def match_categories(categories: dict, like: CocoDataset, found: Findings) -> tuple[list[dict], dict]:
    """Give the categories of a validation set the ids that those of the training set have."""
    training = dict(zip(like.class_names, like.category_ids))
    names = [entry["name"] for entry in categories.values() if isinstance(entry, dict)]
    if names and not set(names) & training.keys():
        found.errors.append(
            f"training has the classes {like.class_names!r}"[:300] + f", validation {names!r}"[:300]
        )
    others = [name for name in names if name not in training]
    if others:
        found.notes.append(
            f"classes left out: {len(others)} not in the training set: {str(others)[1:-1]}"[:300]
        )
    for key, entry in categories.items():
        if isinstance(entry, dict):
            name = entry["name"]
            is_class = name in training
            categories[key] = {"id": training[name], "name": name} if is_class else "class not in training"
    return [{"id": identifier, "name": name} for name, identifier in training.items()], categories


# ---------------------------------------------------------------------------------------------------- images


def read_images(
    entries: list, folder, follow_links: bool, allow_missing: bool, found: Findings
) -> tuple[list[dict], dict[str, dict | str]]:
    """Read the image entries and find their files. Returns (images, {id as text: image, or the bin of its
    annotations}). Entries of one file are one image."""
    valid = keep_valid(entries, "image", found.errors)
    names = {key: image_name(entry) for key, entry in valid.items()}
    paths, missing, refused = find_files(dict.fromkeys(filter(None, names.values())), folder, follow_links)
    result, by_file = dict.fromkeys(valid, "invalid"), {}
    for key, entry in valid.items():
        name, identifier = names[key], entry["id"]
        where = f"image {identifier!r}"[:80]
        if name in refused:
            found.errors.append(f"{where}: {refused[name]}")
        elif name not in paths:
            why = missing.get(name) or f"its file_name {entry.get('file_name')!r} is not a file name"[:200]
            found.count("missing", f"{where}: {why}")
            result[key] = "image missing"
        else:
            try:
                image = read_image_entry(entry, paths[name], Path(folder), found)
                result[key] = merge_image(image, by_file, found)
            except UnreadableError as error:
                found.count("missing", f"{where}: it has no size, and {error}")
                result[key] = "image missing"
            except DataError as error:
                found.errors.append(f"{where}: {error}")
            if name != paths[name]:
                found.count("names", f"{name!r}, taken as {paths[name]!r}")
    check_missing(missing, len(valid), folder, follow_links, allow_missing, found)
    return list(by_file.values()), result


def image_name(entry: dict) -> str:
    """Return the file name of an image entry, or "" if it has none. LVIS has a URL in its place."""
    name, url = entry.get("file_name"), entry.get("coco_url")
    name = url.split("/")[-1] if not name and isinstance(url, str) else name
    return name if isinstance(name, str) and "\0" not in name else ""


def read_image_entry(entry: dict, path: str, folder: Path, found: Findings) -> dict:
    """Return {"id", "height", "width", "file_name"} of an image. Raises DataError for an invalid size, and
    UnreadableError if the size is missing and the file cannot tell it."""
    given = entry.get("height"), entry.get("width")
    size = tuple(map(whole_number, given))
    if None in given or given == (0, 0):
        if is_lfs_pointer(folder / path):
            raise DataError(f"its file {path!r} is {LFS_HINT}"[:500])
        size, _ = read_sizes(folder / path)
        found.count("sizes", repr(path))
    if not all(side and side > 0 for side in size) or size[0] * size[1] > MAX_PIXELS:
        raise DataError(f"height and width {given!r} are not a valid image size"[:200])
    return {"id": entry["id"], "height": size[0], "width": size[1], "file_name": path}


def merge_image(image: dict, by_file: dict[str, dict], found: Findings) -> dict:
    """Return the first image of the same file, or add the image to `by_file`. Raises DataError if they have
    different sizes."""
    first = by_file.setdefault(image["file_name"], image)
    if first is not image:
        found.count("merged", f"{image['id']!r} ({image['file_name']!r})")
        if (first["height"], first["width"]) != (image["height"], image["width"]):
            raise DataError(f"it has the file of image {first['id']!r} and another size"[:200])
    return first


def check_missing(missing: dict, total: int, folder, follow_links, allow_missing: bool, found: Findings):
    """Note the images that are missing. Too many, or all of them, are an error."""
    number = found.counts["missing"]
    if not number:
        return
    name = next(iter(missing), "")
    example = found.examples["missing"]
    nearest = nearest_file(name, folder, follow_links) if name and ascii(name) in example else ""
    example += f" (the nearest file is {nearest!r})"[:200] if nearest else ""
    # Up to three images, and a quarter of a tiny set, are few.
    is_few = number <= max(MAX_MISSING * total, min(3, total / 4))
    if number == total:
        if Path(folder).is_dir():
            problem = f"none of its {total} images is there, such as {example}"
        else:
            problem = f"there is no image folder {str(folder)!r}"
        found.errors.append(f"{problem}; pass the folder that the file names start from")
    elif is_few or allow_missing:
        found.notes.append(f"{number} of {total} images are missing and left out, such as {example}")
    else:
        remedy = "add them, or pass --allow-missing to leave them out"
        found.errors.append(f"{number} of {total} images are missing, such as {example}; {remedy}")


def check_sizes(images: list[dict], folder, found: Findings) -> None:
    """Compare the sizes of some images with their headers. Training replaces single damaged images, so only a
    sample of nothing else is an error."""
    pointers = [image for image in images if is_lfs_pointer(Path(folder) / image["file_name"])]
    if pointers:
        name = pointers[0]["file_name"]
        found.errors.append(f"{len(pointers)} images, such as {name!r}, are each {LFS_HINT}")
        return
    sample = images[:: -(-len(images) // NUM_HEADERS) or 1]
    wrong, damaged = [], []
    for image in sample:
        size = image["height"], image["width"]
        try:
            sizes = read_sizes(Path(folder) / image["file_name"])
            if size not in sizes:
                wrong.append((image, size, sizes[0]))
        except UnreadableError as error:
            damaged.append(str(error))
    if damaged and len(damaged) == len(sample):
        found.errors.append(f"none of {len(sample)} images can be read, such as: {damaged[0]}")
    if wrong:
        image, size, shown = wrong[0]
        swapped = size == shown[::-1]
        why = "height and width are exchanged" if swapped else "images were resized after annotation"
        found.errors.append(
            f"{len(wrong)} of {len(sample)} images have another size than their annotations: image "
            f"{image['id']!r} ({image['file_name']!r}) is {shown[0]} x {shown[1]}, its annotations are for "
            f"{size[0]} x {size[1]} (height x width); {why}"
        )


# ----------------------------------------------------------------------------------------------- annotations


def read_annotations(
    entries: list, images: dict, categories: dict, crowd_is_object: bool, found: Findings
) -> list[dict]:
    """Read the annotations and put each into a bin. Returns those of the bins "trained" and "crowd"."""
    result = []
    for entry, identifier in zip(entries, annotation_ids(entries, found)):
        try:
            annotation, remarks = read_annotation(entry, identifier, images, categories)
        except DataError as error:
            name = entry.get("id") if isinstance(entry, dict) else entry
            found.errors.append(f"annotation {name!r}"[:80] + f": {error}")
            annotation, remarks = "invalid", ()
        if isinstance(annotation, str):
            found.count(annotation, annotation_name(entry))
        else:
            result.append(annotation)
        for remark in remarks:
            found.count(remark, annotation_name(entry))
    result = drop_duplicates(result, found)
    for annotation in result:
        annotation["iscrowd"] &= not crowd_is_object
        if annotation["iscrowd"]:
            found.count("crowd", annotation_name(annotation))
    found.counts["trained"] = len(result) - found.counts["crowd"]
    return result


def annotation_name(entry) -> str:
    if not isinstance(entry, dict):
        return f"annotation {entry!r}"[:80]
    name = f"annotation {entry['id']!r}"[:80] if "id" in entry else "an annotation"
    return name + f" (image {entry.get('image_id')!r})"[:80]


def annotation_ids(entries: list, found: Findings) -> list:
    """Return the ids of the annotations, or 1, 2, 3, ... if any is missing or repeated."""
    ids = [as_id(entry.get("id")) if isinstance(entry, dict) else None for entry in entries]
    unique = set()
    if len(set(ids) - {None}) == len(ids):
        return ids
    for entry, identifier in zip(entries, ids):
        if identifier is None or identifier in unique:
            found.count("ids", annotation_name(entry))
        unique.add(identifier)
    return list(range(1, len(ids) + 1))


def read_annotation(entry, identifier, images: dict, categories: dict) -> tuple[dict | str, list[str]]:
    """Check an annotation against its image and category. Raises DataError.

    Returns (annotation, remarks of `read_mask`). The annotation has the keys that training needs. If it is
    left out it is the bin in its place."""
    if not isinstance(entry, dict):
        raise DataError("it is not a dictionary")
    parents = []
    for key, entries in (("image_id", images), ("category_id", categories)):
        parent = entries.get(as_key(entry.get(key)))
        if parent is None:
            raise DataError(f"its {key} {entry.get(key)!r} is not in the file"[:200])
        if isinstance(parent, str):
            return parent, []
        parents.append(parent)
    image, category = parents
    given = entry.get("iscrowd") or 0
    iscrowd = whole_number(given) if type(given) is not bool else 1
    if iscrowd not in (0, 1):
        raise DataError(f"its iscrowd {given!r} is not 0 or 1"[:200])
    try:
        mask, remarks = read_mask(entry.get("segmentation"), image["height"], image["width"])
    except DataError as error:
        raise DataError(f"(image {image['id']!r}) {error}") from None
    if isinstance(mask, str):
        return mask, remarks
    area = entry.get("area")
    area = float(area) if isinstance(area, (int, float)) and 0 < area < MAX_PIXELS else None
    ids = {"id": identifier, "image_id": image["id"], "category_id": category["id"]}
    return {**ids, "area": area, "iscrowd": iscrowd, "segmentation": mask}, remarks


def drop_duplicates(annotations: list[dict], found: Findings) -> list[dict]:
    """Leave out all but the first of the annotations with one image, class and mask."""

    def summary(annotation) -> tuple:
        """Return what equal annotations share, and few others: hashing all masks would take long."""
        mask = annotation["segmentation"]
        first = mask[0] if isinstance(mask, list) else mask["counts"]
        return annotation["image_id"], annotation["category_id"], len(first), first[0], first[-1]

    def exact(annotation) -> tuple:
        mask = annotation["segmentation"]
        whole = tuple(map(tuple, mask)) if isinstance(mask, list) else tuple(mask["counts"])
        return annotation["image_id"], annotation["category_id"], annotation["iscrowd"], whole

    keys = list(map(summary, annotations))
    counts, seen, result = Counter(keys), set(), []
    for annotation, key in zip(annotations, keys):
        if counts[key] > 1:
            whole = exact(annotation)
            if whole in seen:
                found.count("duplicate", annotation_name(annotation))
                continue
            seen.add(whole)
        result.append(annotation)
    return result


# ---------------------------------------------------------------------------------------------- the whole set


def check_masks(found: Findings) -> None:
    """Raise suspicion if crowds are many, and an error if nearly nothing is where it should be."""
    counts = found.counts
    masks = counts["trained"] + counts["crowd"]
    remedy = "if each is one object, as CVAT's brush masks are, pass --crowd-is-object"
    if counts["crowd"] and not counts["trained"]:
        bins = format_bins(bin_counts(found), one_line=True)
        text = f"its masks are {counts['crowd']:,} crowds (iscrowd 1), which are not trained ({bins})"
        found.errors.append(f"{text}; {remedy}")
    elif counts["crowd"] > MANY_CROWDS * masks:
        text = f"of {masks:,} masks are crowds (iscrowd 1) and are not trained; {remedy}"
        found.notes.append(f"{counts['crowd']:,} {text}")
    placed = masks + counts["outside"]
    reasons = {
        "mostly outside": "lie outside of their images; images or their sizes were changed after annotation",
        "fractions": "have no coordinate above 1; multiply the coordinates by the size of the image",
    }
    for remark, why in reasons.items():
        if counts[remark] > placed / 2:
            example = found.examples[remark]
            found.errors.append(f"{counts[remark]:,} of {placed:,} objects, such as {example}, {why}")


def check_training_set(images: list, found: Findings) -> None:
    """Refuse a training set without images or objects, if no other error explains it."""
    if not found.errors and not images:
        found.errors.append("it has no image")
    elif not found.errors and not found.counts["trained"]:
        bins = format_bins(bin_counts(found), one_line=True)
        remedy = "; boxes are not enough, annotate masks" if found.counts["boxes only"] else ""
        found.errors.append(f"it has no object to train on ({bins}){remedy}")


def check_validation_set(images: list, folder, like: CocoDataset, found: Findings) -> None:
    """Note a validation set without images or objects, or with images of the training set."""
    if not images:
        found.notes.append("it has no image, so AP is '-'")
    elif not found.counts["trained"]:
        bins = format_bins(bin_counts(found), one_line=True)
        found.notes.append(f"it has no object to find ({bins}), so AP is '-'")
    training = file_identities(like.path(image_id) for image_id in like.image_ids)
    for image in images:
        if file_identities([Path(folder) / image["file_name"]]) & training:
            found.count("shared", repr(image["file_name"]))
