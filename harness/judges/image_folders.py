"""Image data sets in the layout of the hub: parquet files of encoded images, or a directory of image files.

Parquet files may contain labels or captions. No code from a data set is run.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.diffusion.images import from_uint8
from harness.types import Data

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
LABELS = ("label", "labels", "fine_label")
CAPTIONS = ("caption", "captions", "text", "prompt")


class DataError(OSError):
    """A data set that cannot be read; the message names the file and a remedy."""


HELD_OUT = 10  # every tenth example of data without a split for it is held out


def has(directory: Path, splits: Sequence[str]) -> bool:
    """Whether a data set has parquet files or a folder of one of `splits`."""
    return any(_parquets(directory, split) or (directory / split).is_dir() for split in splits)


def read(
    directory: Path, splits: Sequence[str], size: int | tuple[int, int], most: int = 0, held_out: bool | None = None
) -> Data:
    """The first `most` examples (0 = all) of `splits`, in the order of their files.

    held_out: True for every tenth of these examples alone, False for all but those, None for all.

    size: (height, width) in pixels, one number for a square. Images are (N, 3, height, width) in [-1, 1]; others are
    cropped around their middle to this shape and resized. Labels and captions are read if the data have them in every
    split. A parquet file belongs to a split if its name or the name of one of its folders begins with the split
    (train-00000-of-00001.parquet, train/0000.parquet). Without parquet files, the image files in a folder with the name
    of the split are read, or those in `directory` itself. Raises DataError.
    """
    files = [file for split in splits for file in _parquets(directory, split)]
    rows = _rows(files) if files else _pictures(directory, splits)
    height, width = (size, size) if isinstance(size, int) else size
    images, labels, captions = [], [], []
    for i, (raw, label, caption, place) in enumerate(rows):
        if held_out is not None and held_out != (i % HELD_OUT == HELD_OUT - 1):
            continue
        images.append(_picture(raw, (width, height), place))
        labels.append(label)
        captions.append(caption)
        if most and len(images) == most:
            break
    if not images:
        raise DataError(f"{directory}: no images of {' or '.join(splits)}")
    return Data(
        from_uint8(torch.stack(images)),
        None if None in captions else tuple(captions),
        None if None in labels else torch.tensor(labels, dtype=torch.int64),
    )


def captions(directory: Path, splits: Sequence[str], most: int = 0) -> tuple[str, ...]:
    """The first `most` captions (0 = all) of `splits`, without their images. Raises DataError if there are none."""
    found: list[str] = []
    for split in splits:
        for path in _parquets(directory, split):
            file = _opened(path)
            name = _column(file, CAPTIONS)
            if name is None:
                raise DataError(f"{path}: no column of captions; one of {', '.join(CAPTIONS)} is read")
            for batch in file.iter_batches(columns=[name]):
                found += [_caption(value) for value in batch.column(0).to_pylist()]
                if most and len(found) >= most:
                    return tuple(found[:most])
    if not found:
        raise DataError(f"{directory}: no parquet files of {' or '.join(splits)} with captions")
    return tuple(found)


def _parquets(directory: Path, split: str) -> list[Path]:
    named = re.compile(rf"(^|/){re.escape(split)}([-_./]|$)")
    return [p for p in sorted(directory.rglob("*.parquet")) if named.search(p.relative_to(directory).as_posix())]


def _rows(files: Sequence[Path]) -> Iterator[tuple[bytes, int | None, str | None, str]]:
    """(encoded image, label, caption, place) of every row."""
    for path in files:
        file = _opened(path)
        image, label, caption = _image_column(file, path), _column(file, LABELS), _column(file, CAPTIONS)
        row = 0
        for batch in file.iter_batches(batch_size=512, columns=[c for c in (image, label, caption) if c is not None]):
            for values in batch.to_pylist():
                place = f"{path}, row {row}"
                raw = values[image]["bytes"] if isinstance(values[image], dict) else values[image]
                if raw is None:
                    raise DataError(
                        f"{place}: names an image file instead of holding the image; save with embedded images"
                    )
                text = None if caption is None else _caption(values[caption])
                yield raw, None if label is None else values[label], text, place
                row += 1


def _opened(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: parquet files need pyarrow; pip install 'diffusion-defense-bench[papers]'") from None
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a parquet file ({error}); fetch it again") from None


def _image_column(file: Any, path: Path) -> str:
    """The first column of encoded images: a struct with `bytes`, as on the hub, or plain binary."""
    import pyarrow

    for field in file.schema_arrow:
        kind = field.type
        if pyarrow.types.is_binary(kind) or (pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0):
            return field.name
    raise DataError(f"{path}: no column of images among {', '.join(file.schema_arrow.names)}")


def _column(file: Any, names: Sequence[str]) -> str | None:
    return next((name for name in names if name in file.schema_arrow.names), None)


def _caption(value: Any) -> str:
    """A caption; the first one if an image has several."""
    return str(value[0] if isinstance(value, list) and value else value)


def _pictures(directory: Path, splits: Sequence[str]) -> Iterator[tuple[bytes, None, None, str]]:
    """The image files in the folders of the splits, or in `directory` itself if it has no such folders."""
    folders = [directory / split for split in splits if (directory / split).is_dir()] or [directory]
    for folder in folders:
        for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURES):
            yield path.read_bytes(), None, None, str(path)


def _picture(raw: bytes, size: tuple[int, int], place: str) -> Tensor:
    """An encoded image as (3, height, width) uint8. size: (width, height)."""
    import numpy as np
    from PIL import Image, ImageOps

    try:
        picture = Image.open(io.BytesIO(raw)).convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{place}: not an image that can be read ({error})") from None
    if picture.size != size:
        picture = ImageOps.fit(picture, size, Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
