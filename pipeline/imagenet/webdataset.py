"""ImageNet in WebDataset tars, such as those that make_shards writes: the layout `webdataset`.

    train/*.tar, val/*.tar        or tars in one folder whose names contain the split

Tar files of images without labels are read, too, if wnids in the names or folders in the tar give the classes. The
classes come from the manifest that make_shards wrote beside the tars. Without a manifest they come from the wnids in
the keys and, if there are none, from the labels.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from pipeline.imagenet.entries import Skipped
from pipeline.imagenet.labels import LabelledImage, Scan, classes_by_label, outlying_labels, scan_of
from pipeline.imagenet.listing import ClassName
from pipeline.imagenet.parts import Part, check_complete, counted, without_numbers
from pipeline.imagenet.tar_samples import class_in_folder, images_by_name, samples, wnid_in_name

MANIFEST = "manifest.json"  # of a shard set. It is defined here because `shards` imports `imagenet`, never the reverse.
EXPECTED = "train/*.tar or *train*.tar with .jpg and .cls"


def webdataset_part(split: str, tars: Sequence[Path], where: str) -> Part | None:
    """The part for a split's tars; None if there is no tar."""
    if not tars:
        return None
    manifest = tars[0].parent / MANIFEST
    uses = (*tars, manifest) if manifest.is_file() else tuple(tars)
    what = f"{tars[0].name if len(tars) == 1 else counted(len(tars), 'tar') + without_numbers(tars)} in {where}"
    return Part("webdataset", split, what, uses, lambda: _scan(split, tars), _classes)


def _scan(split: str, tars: Sequence[Path]) -> Scan:
    """The samples of a split by their labels. If no sample has one, its name or its folder gives the class."""
    check_complete(tars)
    by_wnid = partial(images_by_name, class_of=wnid_in_name)
    by_folder = partial(images_by_name, class_of=class_in_folder)
    first_error: ValueError | None = None
    for read in (samples, by_wnid, by_folder):
        skipped, unusable = Skipped(), [0]

        def images(read=read, skipped=skipped, counts=unusable) -> Iterator[LabelledImage]:  # type: ignore[no-untyped-def]
            for tar in tars:
                for image in read(tar, skipped):
                    counts[0] += image.label is None
                    yield image

        try:
            scan = scan_of(images(), skipped)
        except ValueError as error:
            if not unusable[0]:
                raise
            first_error = first_error or error
            continue
        if len(scan.items) and (read is samples or not unusable[0]):
            return scan
    raise first_error or ValueError(
        f"{tars[0]}: no sample in it, nor in any other tar of {split}; download the set again"
    )


def _classes(split: str, parts: Mapping[str, Part], scans: Mapping[str, Scan]) -> Mapping[str, ClassName]:
    """The class of each label: by the manifest of the split, of another split, or by the labels of all splits."""
    for part in sorted(parts.values(), key=lambda other: other.split != split):
        if (class_of := _manifest_classes(part.uses[0].parent / MANIFEST)) is not None:
            return class_of
    return classes_by_label(scans.values(), outlying_labels(scans.values()))


def _manifest_classes(path: Path) -> dict[str, ClassName] | None:
    """Label -> class, from a manifest that make_shards wrote; None if there is no file or another tool wrote it."""
    if not path.is_file():
        return None
    try:
        fields = json.loads(path.read_bytes())
        if not isinstance(fields, dict) or not str(fields.get("format")).startswith("alexnet-pipeline shards"):
            return None
        return {str(label): ClassName(c["wnid"], c["words"]) for label, c in enumerate(fields["classes"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: no classes in it ({error!r}); restore it, or remove it to take the classes from keys and labels"
        ) from error
