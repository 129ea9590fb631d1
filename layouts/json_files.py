"""Read a COCO JSON file as a file: its encoding, and what it is if it is something else.

content = read_json("my_dataset/instances_train.json")   # {"images": [...], "annotations": [...], ...}"""

import json
from pathlib import Path

from data import DataError

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
LFS_HINT = "a Git LFS pointer instead of the file; run git lfs pull"
MAGIC = {  # what a file is that begins with these bytes
    b"": "empty",
    LFS_POINTER: LFS_HINT,
    b"\x80": "a pickle; export it as JSON",
    b"PK\x03\x04": "a ZIP archive; unpack it",
    b"\x1f\x8b": "compressed by gzip; unpack it",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"\x89HDF": "an HDF5 file",
    b"<": "XML or a web page; export or download it as JSON",
}


def read_json(json_file) -> dict[str, list]:
    """Return the lists "images", "annotations" and "categories" of a COCO JSON file.

    UTF-8 with or without a byte-order mark, UTF-16 and UTF-32 are read. Raises DataError, one line that says
    what the file is instead."""
    try:
        if not Path(json_file).is_file():  # A device such as /dev/zero would never end.
            raise FileNotFoundError
        return check_lists(json.loads(decode(Path(json_file).read_bytes())))
    except FileNotFoundError:
        raise DataError(f"cannot read annotations: no annotation file {str(json_file)!r}") from None
    except DataError as error:
        problem = str(error)
    except json.JSONDecodeError as error:
        problem = describe_syntax_error(error)
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        problem = repr(error)
    raise DataError(f"{json_file} is not a COCO instances file: {problem}"[:500])


def decode(raw: bytes) -> str:
    """Decode the bytes of a JSON file. Raises DataError for bytes that are no text."""
    for magic, kind in MAGIC.items():
        if raw.startswith(magic) if magic else not raw.strip():
            raise DataError(f"it is {kind}")
    codec = json.detect_encoding(raw)
    try:
        return raw.decode(codec)
    except UnicodeDecodeError as error:
        remedy = "binary data or another encoding; save it as UTF-8"
        raise DataError(f"byte {error.start} is not {codec.removesuffix('-sig')}: {remedy}") from None


def describe_syntax_error(error: json.JSONDecodeError) -> str:
    """Describe in one line where a text stops being JSON. A text that ends early was cut off."""
    length = len(error.doc.rstrip())
    if error.msg.startswith("Unterminated") or error.pos >= length - 5:  # half of a word such as "false"
        return f"it is cut off, it ends early at character {length}; copy, download or export it again"
    return f"it is not JSON, {error.msg} in line {error.lineno}, column {error.colno}"


def check_lists(content) -> dict[str, list]:
    """Return the three lists of a COCO file's content. Raises DataError with the name of another kind."""
    names = ("images", "annotations", "categories")
    if isinstance(content, list):
        is_result = content and isinstance(content[0], dict) and "image_id" in content[0]
        raise DataError(f"it is a list{' of detections (COCO results)' if is_result else ''}, no annotations")
    if not isinstance(content, dict):
        raise DataError(f"it is a {type(content).__name__}, not a dictionary")
    if "shapes" in content and "imagePath" in content:
        raise DataError("it is labelme's own JSON of one image; pass the folder of these files as --data")
    annotations = content.get("annotations")
    first = annotations[0] if isinstance(annotations, list) and annotations else {}
    first = first if isinstance(first, dict) else {}
    if "segments_info" in first:
        raise DataError("it is a panoptic file (segments_info); use the instances file of the dataset")
    if "caption" in first:
        raise DataError("it is a captions file; use the instances file of the dataset")
    for name in names:
        if name not in content:
            raise DataError(f"it has no {name!r}")
        if not isinstance(content[name], list):
            raise DataError(f"its {name!r} is a {type(content[name]).__name__}, not a list")
    return {name: content[name] for name in names}
