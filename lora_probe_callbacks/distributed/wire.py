"""What one rank tells the others at a decision: from its facts and verdicts to at most 1 KiB, and back."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from typing import Literal, get_args

from lora_probe_callbacks.checks._base import Verdict
from lora_probe_callbacks.checks._catalogue import all_checks
from lora_probe_callbacks.distributed.transport import SIZE
from lora_probe_callbacks.facts import SAMPLE, Facts, Moment, RankReport, Sums

__all__ = ["decode", "encode"]

_HEAD = struct.Struct("<IBBBBiiii")  # catalogue, moment, broken, flags, checks, step, first, whole, unmanaged
_NUMBERS = struct.Struct(f"<{2 * SAMPLE + 10}d")
_STATUSES: tuple[Literal["", "warn", "fail"], ...] = ("", "warn", "fail")
_MOMENTS: tuple[Moment, ...] = get_args(Moment)
_PART = "\x1f"


def _codes() -> tuple[str, ...]:
    return tuple(check.code for check in all_checks())


def _catalogue() -> int:
    return zlib.crc32(" ".join(_codes()).encode())


def _flags(facts: Facts) -> int:
    wrapping = facts.wrapping
    if wrapping is None:
        return int(facts.gradients_final)
    bypassed = wrapping.entered is False
    return facts.gradients_final + 2 * bypassed + 4 * (not wrapping.synced) + 8 * wrapping.hook


def encode(facts: Facts, verdicts: Mapping[str, Verdict], *, broken: bool) -> bytes:
    """What a rank has to say.

    Args:
        facts: Of this rank.
        verdicts: Code to verdict of this rank.
        broken: Its probe has stepped aside.

    Returns:
        At most ``SIZE`` bytes; of the words that explain the first finding, as many as fit.
    """
    codes, wrapping = _codes(), facts.wrapping
    bad = sorted((-_STATUSES.index(v.status), c) for c, v in verdicts.items() if v.status in ("warn", "fail"))
    statuses = bytearray(len(codes))
    for minus, code in bad:
        statuses[codes.index(code)] = -minus
    head = _HEAD.pack(
        _catalogue(),
        _MOMENTS.index(facts.moment),
        broken,
        _flags(facts),
        len(codes),
        facts.step,
        -1 if wrapping is None else wrapping.first,
        0 if wrapping is None else wrapping.whole,
        0 if wrapping is None else len(wrapping.unmanaged),
    )
    numbers = _NUMBERS.pack(*facts.tensor_sample, *facts.gradient_sample, *facts.shard_sums.values)
    words = b""
    if bad:
        first = verdicts[bad[0][1]]
        got, expected = (str(first.evidence.get(key, ""))[:120] for key in ("got", "expected"))
        seen = " ".join(map(str, first.seen or ()))
        words = _PART.join((bad[0][1], first.cause[:40], seen, got, expected, first.message)).encode()
    return (head + numbers + bytes(statuses) + words)[:SIZE]


def decode(message: bytes) -> RankReport:
    """The inverse of :func:`encode`.

    Args:
        message: As it came.

    Returns:
        What that rank has sent.

    Raises:
        ValueError: If it was sent by another version of this package.
    """
    catalogue, moment, broken, flags, count, step, first, whole, unmanaged = _HEAD.unpack_from(message)
    codes = _codes()
    if catalogue != _catalogue() or count != len(codes):
        raise ValueError("got a message of another version of lora_probe_callbacks, expected the same on all ranks")
    numbers = _NUMBERS.unpack_from(message, _HEAD.size)
    start = _HEAD.size + _NUMBERS.size
    statuses = message[start : start + count]
    words = message[start + count :].rstrip(b"\0").decode(errors="ignore").split(_PART)
    code, cause, seen, got, expected, text = words if len(words) == 6 else ("",) * 6
    when = [int(number) for number in seen.split()]
    return RankReport(
        moment=_MOMENTS[moment],
        step=step,
        broken=bool(broken),
        bad=tuple((c, _STATUSES[s]) for c, s in zip(codes, statuses, strict=True) if s),  # type: ignore[misc]
        first=first,
        whole=whole,
        unmanaged=unmanaged,
        final=bool(flags & 1),
        bypassed=bool(flags & 2),
        unsynced=bool(flags & 4),
        hook=bool(flags & 8),
        tensors=numbers[:SAMPLE],
        gradients=numbers[SAMPLE : 2 * SAMPLE],
        shards=Sums.of(numbers[2 * SAMPLE :]),
        words=(code, text, got, expected, cause) if code else None,
        seen=(when[0], when[1]) if when else None,
    )
