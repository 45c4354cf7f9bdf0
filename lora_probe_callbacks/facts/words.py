"""The words that facts are told in."""

from __future__ import annotations

from typing import Literal

Role = Literal["A", "B", "other"]


Mode = Literal["active", "inactive", "disabled", "merged"]


# "waiting": backward passes are made, and no optimizer that owns the adapter has stepped so far.
Moment = Literal["start", "step", "skipped", "end", "exception", "waiting"]


WrapperKind = Literal["DistributedDataParallel", "FullyShardedDataParallel", "fully_shard", "DeepSpeed"]
