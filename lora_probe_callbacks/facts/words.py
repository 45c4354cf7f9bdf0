"""The words that facts are told in."""

from __future__ import annotations

from typing import Literal

Role = Literal["A", "B", "other"]


Mode = Literal["active", "inactive", "disabled", "merged"]


Moment = Literal["start", "step", "skipped", "end", "exception"]


Values = Literal[
    "equal", "untrained", "start", "previous", "partly", "unrelated", "base", "fresh", "related", "not finite"
]


WrapperKind = Literal["DistributedDataParallel", "FullyShardedDataParallel", "fully_shard", "DeepSpeed"]
