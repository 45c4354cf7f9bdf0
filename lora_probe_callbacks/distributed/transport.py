"""How the processes of one run come to one decision, and never wait for one that does not come.

At a decision every rank gathers 1 KiB from every other over a group of its own: gloo, on the host. The
default group is not used, for two reasons. Where ranks are out of step, which is what some faults do,
a collective there would be paired with one of the training's. And a wait on the host can be given up:
an NCCL collective that is not joined takes the process with it.

What must be known without waiting goes through the store of the default group: which ranks run a
probe at all, who has left the agreement and why, and what was found by a rank whose others may never
arrive, as they hang in a reduction that this fault has left incomplete.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import PrefixStore, Store

__all__ = ["SIZE", "AgreementLostError", "Ranks"]

SIZE = 1024  # bytes that a rank sends
PRESENCE = 20.0  # seconds to wait, once, for the others' probes: their first backward has synchronised them
LONGEST = 120.0  # seconds to wait at a decision, at most: a rank may be writing a checkpoint
IN_NEED = 15.0  # the same of a rank that has found a failure: the others may hang in a reduction because of it


class AgreementLostError(Exception):
    """The ranks do not decide together any more; the message says why."""


class Ranks:
    """The processes of this run, seen from one of them."""

    def __init__(self) -> None:
        self.rank, self.world = 0, 1
        self.why_alone = "there is one process"
        self._store: Store | None = None
        self._last_store: Store | None = None  # stays when the agreement is lost: messages are still there
        self._group: dist.ProcessGroup | None = None
        self._pending: object = None

    @property
    def several(self) -> bool:
        """The ranks decide together, or will try to."""
        return self._store is not None

    def enter(self) -> None:
        """Say that this rank runs a probe. Waits for nobody."""
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() < 2:
            return
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        if not dist.is_gloo_available():
            self.why_alone = "this build of torch has no gloo"
            return
        store = distributed_c10d._get_default_store()
        # All ranks count the sessions in which they met alike, whatever one of them probed by itself in between.
        self._met = f"lora_probe/met/{self.rank}"
        self._store = PrefixStore(f"lora_probe/{store.add(self._met, 0)}", store)
        self._whole_store = store
        self._store.set(f"here/{self.rank}", "1")
        self._last_store = self._store
        self.why_alone = ""

    def exchange(self, message: bytes, *, in_need: bool) -> list[bytes]:
        """Gather the messages of all ranks.

        Args:
            message: Of this rank, ``SIZE`` bytes at most.
            in_need: This rank has found a failure, which may be why the others do not come.

        Returns:
            One message a rank.

        Raises:
            AgreementLostError: If they did not all come; from then on every rank decides by itself.
        """
        try:
            group = self._meet()
            mine = torch.frombuffer(bytearray(message.ljust(SIZE, b"\0")), dtype=torch.uint8)
            everybody = torch.empty(self.world, SIZE, dtype=torch.uint8)
            self._lookout()
            work = dist.all_gather(list(everybody.unbind()), mine, group=group, async_op=True)
            self._pending = work
            for late in _moments(min(_timeout(), IN_NEED if in_need else LONGEST)):
                if work.is_completed():
                    self._pending = None
                    work.wait()
                    return [row.numpy().tobytes() for row in everybody]
                if late and self._left() and not _completes(work):
                    self._lookout()
            raise AgreementLostError("the other ranks did not come to the same decision in time")
        except AgreementLostError as error:
            self._lose(str(error))
            raise
        except (RuntimeError, ValueError, OSError) as error:  # torch.distributed's errors are RuntimeErrors
            reason = f"{type(error).__name__} in the exchange: {error}"
            self._lose(reason)
            raise AgreementLostError(reason) from error

    def leave(self, reason: str) -> None:
        """Tell the others, without waiting, that this rank takes part no longer."""
        if self._store is not None:
            self._lose(reason)

    def post(self, message: bytes) -> None:
        """Leave a message for ranks that may never come to a decision. Only the first stays."""
        if self._store is not None:
            with contextlib.suppress(RuntimeError):
                self._store.compare_set("found", "", f"{self.rank} {message.hex()}")

    def posted(self) -> tuple[int, bytes] | None:
        """The first message that a rank has left, and that rank."""
        if self.world < 2 or self._last_store is None:
            return None
        with contextlib.suppress(RuntimeError):
            if self._last_store.check(["found"]):
                rank, message = self._last_store.get("found").decode().split()
                return int(rank), bytes.fromhex(message)
        return None

    def close(self) -> None:
        """Give the group back unless a collective is under way in it, and clear up behind a meeting that failed."""
        if self._last_store is not None and dist.is_initialized():
            with contextlib.suppress(RuntimeError):
                met = self._last_store.check(["met"]) and self._last_store.get("met") == b"all"
                if met:
                    self._whole_store.add(self._met, 1)
                else:
                    self._last_store.delete_key(f"here/{self.rank}")
                    self._last_store.delete_key("met")
                    self._last_store.delete_key("left")
                    self._last_store.delete_key("found")
        if self._group is not None and self._pending is None and dist.is_initialized():
            with contextlib.suppress(RuntimeError, ValueError, AssertionError):
                dist.destroy_process_group(self._group)
        self._group, self._store, self._last_store = None, None, None

    # --- inside -----------------------------------------------------------------------------

    def _meet(self) -> dist.ProcessGroup:
        """Make the group once all ranks are there; whether they are is decided for all by the first who knows."""
        if self._store is None:
            raise AgreementLostError(self.why_alone)
        if self._group is None:
            here = [f"here/{rank}" for rank in range(self.world)]
            met = next((True for _ in _moments(PRESENCE) if self._store.check(here)), False)
            if self._store.compare_set("met", "", "all" if met else "some") != b"all":
                raise AgreementLostError("not every rank runs a probe")
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=_timeout()))
        return self._group

    def _left(self) -> bool:
        return self._store is not None and bool(self._store.check(["left"]))

    def _lookout(self) -> None:
        """Stop if somebody has left."""
        if self._store is not None and self._left():
            raise AgreementLostError(self._store.get("left").decode())

    def _lose(self, reason: str) -> None:
        self.why_alone = f"the ranks do not decide together: {reason}"
        if self._store is not None:
            with contextlib.suppress(RuntimeError):
                self._store.compare_set("left", "", f"rank {self.rank}: {reason}")
        self._store = None


def _completes(work: dist.Work) -> bool:
    """Who leaves with the error that all have agreed upon has sent its message before."""
    return any(work.is_completed() for _ in _moments(1.0))


def _timeout() -> float:
    """Seconds: the timeout of the default group, or ours where that is longer."""
    group = distributed_c10d._get_default_group()
    limits = [group._get_backend(device).options._timeout.total_seconds() for device in group._device_types]
    return min([*limits, LONGEST])


def _moments(seconds: float) -> Iterator[bool]:
    """Yield again and again for some seconds, often at first; True once that has become rare."""
    began, pause = time.monotonic(), 1e-4
    while time.monotonic() - began < seconds:
        yield pause >= 0.05
        time.sleep(pause)
        pause = min(1.2 * pause, 0.05)
