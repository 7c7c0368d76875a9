"""What a training has logged, read back with the loggers' own readers."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def tensorboard(folder: Path) -> tuple[dict[str, dict[int, float]], dict[str, dict[int, Any]]]:
    """Numbers and pictures of all event files below a folder: name → step → value, or pixels."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    numbers: dict[str, dict[int, float]] = {}
    pictures: dict[str, dict[int, Any]] = {}
    for place in {path.parent for path in folder.rglob("events.out.tfevents*")}:
        events = EventAccumulator(str(place), size_guidance={"scalars": 0, "images": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            numbers.setdefault(tag, {}).update({e.step: e.value for e in events.Scalars(tag)})
        for tag in events.Tags()["images"]:
            found = {e.step: np.asarray(Image.open(io.BytesIO(e.encoded_image_string))) for e in events.Images(tag)}
            pictures.setdefault(tag, {}).update(found)
    return numbers, pictures


def wandb(folder: Path, step: str) -> tuple[dict[str, dict[int, float]], dict[str, dict[int, Any]]]:
    """The same of the one offline run below a folder.

    Args:
        folder: where ``wandb`` is in.
        step: the name of the number that says the step.
    """
    from wandb.proto import wandb_internal_pb2

    numbers: dict[str, dict[int, float]] = {}
    pictures: dict[str, dict[int, Any]] = {}
    (file,) = folder.rglob("run-*.wandb")
    for data in _records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        row: dict[str, Any] = {}
        for item in record.history.item:
            first, *rest = item.nested_key or [item.key]
            value = json.loads(item.value_json)
            if rest:  # a picture, a value for each of its attributes
                row.setdefault(first, {})[".".join(rest)] = value
            else:
                row[first] = value
        for name, value in row.items() if step in row else ():
            if isinstance(value, dict):
                paths = [value["path"]] if "path" in value else value.get("filenames", [])
                for path in paths:
                    pictures.setdefault(name, {})[int(row[step])] = np.asarray(Image.open(file.parent / "files" / path))
            elif isinstance(value, (int, float)):
                numbers.setdefault(name, {})[int(row[step])] = value
    return numbers, pictures


def _records(data: bytes) -> Iterator[bytes]:
    """The records of a run's file: a header of seven bytes, then a log as LevelDB writes it, in blocks of 32 KiB."""
    assert data[:4] == b":W&B", data[:7]
    at, block, begun = 7, 32768, b""
    while at + 7 <= len(data):
        left = block - at % block
        if left < 7:
            at += left
            continue
        check, size, kind = struct.unpack("<IHB", data[at : at + 7])
        part = data[at + 7 : at + 7 + size]
        if kind == 0 or len(part) < size:
            return
        assert zlib.crc32(data[at + 6 : at + 7 + size]) == check, "the file is damaged"
        begun = part if kind in (1, 2) else begun + part  # whole, first, middle, last
        if kind in (1, 4):
            yield begun
        at += 7 + size
