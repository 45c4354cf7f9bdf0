"""Whom to tell: the console, the loggers and the record. A full disk ends the record, not the probing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lora_probe_callbacks.checks._base import Check, Verdict
from lora_probe_callbacks.config import ProbeConfig
from lora_probe_callbacks.engine.errors import Errors
from lora_probe_callbacks.facts import Facts
from lora_probe_callbacks.observe.environment import environment
from lora_probe_callbacks.observe.model.targets import Targets
from lora_probe_callbacks.report.console import Output
from lora_probe_callbacks.report.findings import Finding
from lora_probe_callbacks.report.history import History
from lora_probe_callbacks.report.record import Record, Row
from lora_probe_callbacks.report.report import ProbeReport

__all__ = ["Teller"]


class Teller:
    """Tells of one run.

    Args:
        config: What was meant.
        log: Receives the metrics of a step and the framework's number of that step.
        main_rank: This process prints and records.
    """

    def __init__(
        self, config: ProbeConfig, log: Callable[[dict[str, float], int], None] | None, main_rank: bool
    ) -> None:
        self.errors = Errors(self._error)
        self.metrics: dict[str, float] = {}
        self.history = History()
        self.judged_steps = 0
        self.overhead_ms = 0.0  # since the last row
        self._log = log
        self._output = Output(verbose=int(config.verbose), main_rank=main_rank)
        self._config = config
        self._record = Record(config.record) if main_rank and config.record is not None else None
        self._rows: list[Row] = []  # metrics that were logged and not recorded yet
        self._step: Callable[[], int] = lambda: 0

    def begin(self, checks: Iterable[Check], targets: Targets, step: Callable[[], int]) -> None:
        """A run begins.

        Args:
            checks: Those that judge in it.
            targets: What is expected to train.
            step: The present step.
        """
        self._step = step
        slots = targets.slots
        self._write(
            lambda record: record.start(
                checks,
                environment(t.device for slot in slots if (t := slot.tensor) is not None),
                adapters=targets.expected,
                tensors=len(slots),
                model=[type(module).__name__ for _, module in targets.roots],
                optimizers=[type(optimizer).__name__ for optimizer in targets.optimizers],
                every_n_steps=self._config.every_n_steps,
                on_failure=self._config.on_failure,
            )
        )

    def row(self, row: dict[str, float], framework_step: int) -> None:
        """Metrics of a step.

        Args:
            row: Metric name to value.
            framework_step: The framework's number of the step.
        """
        self.metrics.update(row)
        self.history.add(framework_step, row)
        if self._record is not None:
            self._rows.append((framework_step, row))
        if self._log is not None:
            with self.errors.contain():
                self._log(row, framework_step)

    def decision(
        self,
        facts: Facts,
        verdicts: Mapping[str, Verdict],
        changed: Sequence[Finding],
        in_words: Callable[[Facts], dict[str, Any]],
    ) -> None:
        """A decision was made.

        Args:
            facts: What was known.
            verdicts: Code to verdict.
            changed: The findings that are new or got worse.
            in_words: Puts the facts into a few words.
        """
        if self._record is not None:
            self._write(lambda record: record.decision(facts, verdicts, changed, self._rows, in_words(facts)))
            self._rows = []

    def examples(self, listing: Mapping[str, Any]) -> None:
        """The most and least helpful examples of a step."""
        self._write(lambda record: record.examples(listing))

    def finding(self, finding: Finding) -> None:
        """Something was found."""
        self._output.finding(finding)

    def once(self, text: str) -> None:
        """Something that nobody should miss, once, also when the probe is quiet."""
        self._output.once(text)

    def end(self, report: ProbeReport) -> None:
        """The run is over."""
        self._write(lambda record: record.end(report, self._step()))
        self._output.summary(report)

    def _write(self, write: Callable[[Record], None]) -> None:
        if self._record is None:
            return
        try:
            write(self._record)
        except Exception as error:
            self._record = None  # a full disk ends the record alone; anything else is an error of our own
            self.errors.report(error, "record" if isinstance(error, OSError) else "probe")

    def _error(self, line: str, text: str) -> None:
        self._output.once(line)
        if self._record is not None:
            self._write(lambda record: record.error(self._step(), text))
