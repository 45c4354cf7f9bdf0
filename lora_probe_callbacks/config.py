"""What the user meant, and when to look: the keyword arguments of every front door."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lora_probe_callbacks.checks._catalogue import selected

if TYPE_CHECKING:
    from lora_probe_callbacks.estimators.examples import ExampleProbe
    from lora_probe_callbacks.estimators.probe import VarianceProbe

__all__ = ["ProbeConfig"]


@dataclass(frozen=True, slots=True)
class ProbeConfig:
    """What the user meant, and when to look. The same keyword arguments open every front door.

    Args:
        adapter: Name(s) that must train; default: the adapters active when training starts.
        reference_adapters: Names that must stay frozen.
        lagged_adapters: Names that must slowly follow the trained one: they may move, and must not stand still (LP408).
        reference: ``"disabled"`` if the loss compares with this model, its adapters disabled. Some forward must then
            run so (LP109), and that model must be where the policy starts (LP504).
        resumed: True if the adapter was restored, so that it must not start as the identity; False if it is new, so
            that it must (LP504).
        expect_targets: Name parts that must each own an adapted module (LP601). What they cover is taken for all that
            was meant: other names that match nothing are not warned of.
        new_token_ids: Added vocabulary rows that must learn (LP604).
        frozen: Name parts of adapter tensors that are meant to stay frozen: they are not asked to train (LP203, LP605),
            and must not move (LP404).
        every_n_steps: Cadence of the periodic checks; the first four steps are always probed.
        on_failure: ``"raise"``, ``"stop"`` (graceful) or ``"warn"``.
        select: Codes or prefixes of the checks to run; default: all.
        ignore: Codes or prefixes to leave out.
        estimator: An estimator to run, watch and log: a
            :class:`~lora_probe_callbacks.estimators.VarianceProbe`.
        tokenizer: Of the model, where no framework hands it over: it tells which token ends an answer (LP004).
        examples: What to compute of the examples of every step, while it runs: an
            :class:`~lora_probe_callbacks.estimators.ExampleProbe`.
        record: Path of the append-only record.
        verbose: What is printed to stderr, on rank 0 only: False (0) nothing, True (1) findings and a summary,
            2 the table of all checks at the end as well.

    Raises:
        ValueError: If an argument has a value that cannot be meant.
    """

    adapter: str | Sequence[str] | None = None
    reference_adapters: Sequence[str] = ()
    lagged_adapters: Sequence[str] = ()
    reference: Literal["disabled"] | None = None
    resumed: bool | None = None
    expect_targets: Sequence[str] = ()
    new_token_ids: Sequence[int] = ()
    frozen: Sequence[str] = ()
    every_n_steps: int = 50
    on_failure: Literal["raise", "stop", "warn"] = "raise"
    select: Sequence[str] | None = None
    ignore: Sequence[str] = ()
    estimator: VarianceProbe | None = None
    tokenizer: Any = None
    examples: ExampleProbe | None = None
    record: str | Path | None = None
    verbose: bool | int = True

    def __post_init__(self) -> None:
        if isinstance(self.every_n_steps, bool) or not isinstance(self.every_n_steps, int) or self.every_n_steps < 1:
            raise ValueError(f"every_n_steps got {self.every_n_steps!r}, expected an integer of at least 1")
        if self.on_failure not in ("raise", "stop", "warn"):
            raise ValueError(f"on_failure got {self.on_failure!r}, expected 'raise', 'stop' or 'warn'")
        if self.reference not in (None, "disabled"):
            raise ValueError(f"reference got {self.reference!r}, expected None or 'disabled'")
        if self.adapter is not None and not self.adapter:
            raise ValueError(
                f"adapter got {self.adapter!r}, expected a name, several, or None for those that are active"
            )
        for name in ("reference_adapters", "lagged_adapters", "frozen", "expect_targets", "new_token_ids"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise ValueError(f"{name} got the string {value!r}, expected a sequence: ({value!r},)")
        both = set(self.names or ()) & (set(self.reference_adapters) | set(self.lagged_adapters))
        if both:
            raise ValueError(
                f"adapter {sorted(both)} is expected to train and declared as reference or lagged: choose one"
            )
        if self.estimator is not None and not hasattr(self.estimator, "next_batch"):
            raise ValueError(f"estimator got {type(self.estimator).__name__}, expected a VarianceProbe")
        if self.examples is not None and not hasattr(self.examples, "listing"):
            raise ValueError(f"examples got {type(self.examples).__name__}, expected an ExampleProbe")
        selected(self.select, self.ignore)

    @property
    def names(self) -> tuple[str, ...] | None:
        """The expected names, if any were given."""
        if self.adapter is None:
            return None
        return (self.adapter,) if isinstance(self.adapter, str) else tuple(self.adapter)
