"""What a checkpoint on disk holds, read without mapping it into memory.

A file may be cut short by another process while it is read. Through a memory map that kills the process
(SIGBUS); through plain reads it is an error like any other, so files are opened and read, a few bytes of
every tensor, and never mapped.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lora_probe_callbacks.observe.device.transfer import local

__all__ = [
    "ADAPTER_FILES",
    "Elements",
    "StoredFile",
    "StoredTensor",
    "UnreadableError",
    "file_of",
    "is_export",
    "read_file",
    "sample_of",
    "spans",
    "state_of",
    "weights_beside",
]

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_DIFFUSERS_FILES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
_MODEL_FILES = ("model.safetensors", "pytorch_model.bin")
Elements = dict[str, torch.Tensor]  # name to [elements], all of a tensor or a sample
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_BLOCKS, _WIDTH = 4, 16  # of a sample: so many runs of so many elements, evenly spread from the first to the last
_LONGEST_HEADER = 100_000_000  # safetensors' own limit


class UnreadableError(Exception):
    """A file that cannot be read; the message says why."""


class StoredTensor(NamedTuple):
    """One tensor of a file.

    Attributes:
        shape: Its shape.
        dtype: Its type; None for one that torch does not have.
        offset: Of its first byte in the file; None where its elements do not lie in order.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    offset: int | None

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(eq=False, slots=True)
class StoredFile:
    """The tensors of one file, by name.

    Attributes:
        path: The file.
        tables: The mappings of tensors that it holds, by where they stand ("" for the file itself).
    """

    path: Path
    tables: dict[str, dict[str, StoredTensor]]

    def samples(self, tensors: Mapping[str, StoredTensor], *, whole: bool = False) -> dict[str, torch.Tensor]:
        """Elements of some tensors, in their own type.

        Args:
            tensors: Name to tensor of this file.
            whole: Read all elements, not a few.

        Returns:
            Name to [elements]; tensors whose elements cannot be addressed are left out.

        Raises:
            UnreadableError: If the file ends before a tensor does.
        """
        by_type: dict[torch.dtype, list[str]] = {}
        for name, stored in tensors.items():
            if stored.dtype is not None and stored.offset is not None:
                by_type.setdefault(stored.dtype, []).append(name)
        found: dict[str, torch.Tensor] = {}
        with _opened(self.path) as handle:
            for dtype, names in by_type.items():
                counts: list[int] = []
                parts: list[bytes] = []
                for name in names:
                    stored = tensors[name]
                    chosen = spans(stored.numel, whole=whole)
                    counts.append(sum(stop - start for start, stop in chosen))
                    parts += _read(handle.fileno(), stored, chosen)
                data = bytearray(b"".join(parts))
                if len(data) != sum(counts) * dtype.itemsize:
                    raise UnreadableError("the file ends before its tensors do")
                flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
                found.update(zip(names, torch.split(flat, counts), strict=True))
        return found


def _read(descriptor: int, stored: StoredTensor, chosen: Sequence[tuple[int, int]]) -> Iterator[bytes]:
    assert stored.dtype is not None
    assert stored.offset is not None
    size = stored.dtype.itemsize
    for start, stop in chosen:
        yield os.pread(descriptor, (stop - start) * size, stored.offset + start * size)


def spans(numel: int, *, whole: bool = False) -> list[tuple[int, int]]:
    """Which elements of a tensor are sampled.

    Args:
        numel: Its number of elements.
        whole: All of them.

    Returns:
        (start, stop) of runs of elements, in order.
    """
    if whole or numel <= _BLOCKS * _WIDTH:
        return [(0, numel)] if numel else []
    gap = (numel - _WIDTH) // (_BLOCKS - 1)
    return [(i * gap, i * gap + _WIDTH) for i in range(_BLOCKS)]


@torch.no_grad()
def sample_of(tensors: Mapping[str, torch.Tensor], *, whole: bool = False) -> dict[str, torch.Tensor]:
    """The same elements of tensors in memory, on the host: one transfer for each type and device.

    Args:
        tensors: Name to tensor; of a sharded one this rank's part.
        whole: All elements.

    Returns:
        Name to [elements].
    """
    by_kind: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for name, tensor in tensors.items():
        by_kind.setdefault((tensor.device, tensor.dtype), []).append(name)
    found: dict[str, torch.Tensor] = {}
    for names in by_kind.values():
        counts, parts = [], []
        for name in names:
            here = local(tensors[name])
            numel = here.numel()
            if whole or numel <= _BLOCKS * _WIDTH or not here.is_contiguous():
                few = here.reshape(-1)
                if not whole and numel > _BLOCKS * _WIDTH:
                    few = torch.cat([few[start:stop] for start, stop in spans(numel)])
            else:  # the runs of spans(), in one view
                few = here.as_strided((_BLOCKS, _WIDTH), ((numel - _WIDTH) // (_BLOCKS - 1), 1), here.storage_offset())
                few = few.reshape(-1)
            counts.append(few.numel())
            parts.append(few)
        if not parts:
            found.update({name: torch.empty(0) for name in names})
            continue
        # A copy even on the host: the values as they are now, whatever training does to them next.
        found.update(zip(names, torch.split(torch.cat(parts).cpu(), counts), strict=True))
    return found


def read_file(path: Path) -> StoredFile:
    """Read what tensors a file holds, and none of them.

    Args:
        path: A safetensors file, or one that ``torch.save`` wrote.

    Returns:
        Its tensors.

    Raises:
        UnreadableError: If the file is none of these, or is damaged.
        FileNotFoundError: If there is no such file.
    """
    try:
        with _opened(path) as handle:
            start = handle.read(8)
        if path.suffix == ".safetensors" or (len(start) == 8 and not _is_archive(start)):
            return StoredFile(path, {"": _safetensors(path)})
        return StoredFile(path, _pickled(path))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UnreadableError(f"{type(error).__name__}: {error}") from error


def _opened(path: Path) -> Any:
    return path.open("rb", buffering=0)


def _is_archive(start: bytes) -> bool:
    return start[:2] in (b"PK", b"\x80\x02")  # a zip, as torch.save writes, or the pickle of its older format


def _safetensors(path: Path) -> dict[str, StoredTensor]:
    """The header alone: eight bytes of length, then JSON."""
    size = path.stat().st_size
    with _opened(path) as handle:
        head = handle.read(8)
        if len(head) < 8:
            raise UnreadableError(f"it has {size} bytes, fewer than the header of a safetensors file")
        (length,) = struct.unpack("<Q", head)
        if length > min(size - 8, _LONGEST_HEADER):
            raise UnreadableError(f"its header should have {length} bytes, and the whole file has {size}")
        text = handle.read(length)
    try:
        header = json.loads(text)
        tensors, end = {}, 0
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            shape, (begin, stop) = tuple(entry["shape"]), entry["data_offsets"]
            if stop > end:
                end = stop
            tensors[name] = StoredTensor(shape, _DTYPES.get(entry["dtype"]), 8 + length + begin)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnreadableError(f"its header is damaged ({type(error).__name__})") from error
    if 8 + length + end != size:
        raise UnreadableError(f"its tensors should end at byte {8 + length + end}, and the file has {size} bytes")
    return tensors


def _pickled(path: Path) -> dict[str, dict[str, StoredTensor]]:
    # Loaded to the meta device nothing but the pickle is read, and every storage says where it stands.
    with path.open("rb") as handle:
        if handle.read(2) == b"PK" and not zipfile.is_zipfile(path):
            raise UnreadableError("it begins as a zip archive and has no end: it is cut short")
        handle.seek(0)
        content = _loaded(handle, path)
    tables: dict[str, dict[str, StoredTensor]] = {}
    _collect("", content, tables, depth=3)
    return tables


def _loaded(handle: Any, path: Path) -> object:
    try:
        return torch.load(handle, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Weights only load failed" in str(error) and zipfile.is_zipfile(path):
            raise NotImplementedError("it holds objects that a safe load (weights_only) refuses") from error
        raise UnreadableError("torch.load finds no pickle in it") from error
    except Exception as error:  # a damaged archive fails in as many ways as there are bytes
        raise UnreadableError(f"torch.load: {type(error).__name__}: {' '.join(str(error).split())[:120]}") from error


def _collect(place: str, content: object, tables: dict[str, dict[str, StoredTensor]], depth: int) -> None:
    if not isinstance(content, Mapping) or not depth:
        return
    tensors = {k: _stored(v) for k, v in content.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}
    if tensors:
        tables[place] = tensors
    for key, value in content.items():
        if isinstance(key, str):
            _collect(f"{place}.{key}" if place else key, value, tables, depth - 1)


def _stored(tensor: torch.Tensor) -> StoredTensor:
    offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if offset is not None and tensor.is_contiguous():
        offset += tensor.storage_offset() * tensor.dtype.itemsize
    else:
        offset = None
    return StoredTensor(tuple(tensor.shape), tensor.dtype, offset)


# --- where they are -----------------------------------------------------------------------------


def file_of(place: Path, adapter: str) -> Path:
    """The file in which an adapter would be looked for.

    Args:
        place: A file, or a folder that somebody saved into.
        adapter: Its name.

    Returns:
        That file.

    Raises:
        FileNotFoundError: If the folder holds no file of weights.
    """
    if not place.is_dir():
        return place
    for folder in (place / adapter, place):
        for name in ADAPTER_FILES:
            if (folder / name).is_file():
                return folder / name
    for name in (*_DIFFUSERS_FILES, *_MODEL_FILES, "checkpoint.ckpt"):
        if (place / name).is_file():
            return place / name
    raise FileNotFoundError(place)


def state_of(place: Path) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes (bytes) and times (ns) of the files at a place: does anybody still write?"""
    found = []
    for file in _files_below(place):
        try:
            stat = file.stat()
        except OSError:
            continue
        found.append((str(file), stat.st_size, stat.st_mtime_ns))
    return tuple(found)


def _files_below(place: Path) -> list[Path]:
    if place.is_file():
        return [place]
    if not place.is_dir():
        return []
    return sorted(f for pattern in ("*.*", "*/adapter_model.*") for f in place.glob(pattern) if f.is_file())


def is_export(path: Path) -> bool:
    """A folder of a whole model for ``from_pretrained``, not of a training run's state."""
    folder = path.parent
    return path.name in _MODEL_FILES and (folder / "config.json").is_file()


def weights_beside(path: Path) -> str | None:
    """Another file of weights that the user may have written for what the adapter file does not take."""
    for file in sorted(path.parent.iterdir()):
        training = file.name.startswith(
            ("optimizer", "scheduler", "rng_state", "random_states", "training_args", "scaler")
        )
        if file != path and file.suffix in (".safetensors", ".bin", ".pt", ".pth") and not training:
            return file.name
    return None
