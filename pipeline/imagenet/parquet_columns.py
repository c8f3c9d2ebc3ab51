"""Which columns of a parquet file hold the images and the labels, found by type and name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "image_bytes", "bytes", "content", "data")
LABEL_NAMES: tuple[str, ...] = ("label", "labels", "cls", "class", "fine_label", "class_id", "label_id", "target", "y")
LABEL_NAMES += ("category", "wnid", "synset", "class_name", "coarse_label")
MAX_LABEL = 2**31 - 1  # from here on, a number is a mark for "no label", not a class


@dataclass(frozen=True)
class Columns:
    """The columns of a file, each as a path such as `image.bytes`.

    Attributes:
        image: Holds the encoded images.
        path: Holds their file names; None if there is none.
        label: Holds the labels.
    """

    image: str
    path: str | None
    label: str


def flat_types(schema: Any) -> dict[str, Any]:
    """The columns of an Arrow schema with their types; a struct's fields as `NAME.FIELD`."""
    from pyarrow import types

    found: dict[str, Any] = {}
    for column in schema:
        if types.is_struct(column.type):
            found |= {f"{column.name}.{field.name}": field.type for field in column.type}
        else:
            found[column.name] = column.type
    return found


def flat_columns(schema: Any) -> list[str]:
    """The names of `flat_types`."""
    return list(flat_types(schema))


def choose_columns(path: Path, schema: Any, image: str | None = None, label: str | None = None) -> Columns:
    """The image and label columns of a file.

    Args:
        path: The file, for messages.
        schema: Its Arrow schema.
        image: Name of the image column; None finds it.
        label: Name of the label column; None finds it.

    Raises:
        ValueError: There is no such column, or more than one.
    """
    images = {str(column.name): found for column in schema if (found := _image_path(column))}
    labels = [column.name for column in schema if _may_be_label(column.type)]
    image = _choose(path, schema, "image", image, list(images), IMAGE_NAMES, "image.bytes, image.path and label")
    others = [name for name in labels if name != image]
    label = _choose(path, schema, "label", label, others, LABEL_NAMES, "image.bytes, image.path and label")
    name = f"{image}.path"
    return Columns(images[image], name if name in flat_columns(schema) else None, label)


def label_text(value: object) -> str | None:
    """A label as text, a number without leading zeros or a fraction; None if it is no label.

    Negative numbers, by which some sets mark an unknown class, are none.
    """
    if isinstance(value, list) and len(value) == 1:
        (value,) = value
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if isinstance(value, float):
        value = int(value) if math.isfinite(value) and value == int(value) else None
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    text = str(value).strip()
    try:
        number = int(text) if text.isascii() else float(text)
    except ValueError:
        try:
            number = float(text)
        except ValueError:
            return text if text and text.isprintable() else None
    if not math.isfinite(number) or number != int(number):
        return None if not math.isfinite(number) else text
    return str(int(number)) if 0 <= number < MAX_LABEL else None


def _image_path(column: Any) -> str | None:
    """The path of the bytes in a column; None if it is no image column."""
    from pyarrow import types

    def is_bytes(kind: Any) -> bool:
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    if types.is_struct(column.type):
        inner = next((field for field in column.type if field.name == "bytes" and is_bytes(field.type)), None)
        return f"{column.name}.bytes" if inner is not None else None
    return str(column.name) if is_bytes(column.type) else None


def _may_be_label(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind) or types.is_list(kind):  # a list must hold one label
        kind = kind.value_type
    return bool(
        types.is_integer(kind) or types.is_floating(kind) or types.is_string(kind) or types.is_large_string(kind)
    )


def _choose(
    path: Path, schema: Any, what: str, given: str | None, found: Sequence[str], known: Sequence[str], expected: str
) -> str:
    """The column `given`, the one with the best known name, or the only one."""
    every = ", ".join(f"{name} ({kind})" for name, kind in flat_types(schema).items())
    if given is not None:
        if given not in found:
            raise ValueError(f"{path}: columns {every}; --{what}-column {given} is none that can hold {what}s")
        return given
    if known[0] in found:
        return known[0]
    likely = [name for name in found if name.lower() in known]
    choices = likely or list(found)
    if len(choices) == 1:
        return choices[0]
    if not choices:
        raise ValueError(f"{path}: columns {every}; expected {expected}; use files of ImageNet")
    raise ValueError(
        f"{path}: columns {', '.join(choices)} may hold the {what}s; name one: --{what}-column {choices[0]}"
    )
