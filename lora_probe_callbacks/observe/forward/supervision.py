"""Which tokens the loss is made of, seen where every loss must pass: at the last hidden states.

Whatever a loss leaves out (labels of -100, a completion mask, rows with an advantage of 0), it sends a gradient of
exactly zero to the hidden states of those positions. So nothing has to be known of the loss, and labels are only
compared with what was seen. Which token a position was taught is told by the gradient of the logits: for a
cross-entropy, and for every weighted log-probability of one token, it is ``w * (softmax - onehot(target))``, whose
largest entry by size is the target's.

Everything is reduced to a few numbers a row on the device, and travels with the one transfer of a decision.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from lora_probe_callbacks.facts import Floats, SampleRow, Supervision, SupervisionFacts, SupervisionTotals
from lora_probe_callbacks.observe.device.transfer import PLAIN, Readout

__all__ = ["LanguageModel", "SupervisionObserver", "language_model", "stop_tokens"]

IGNORED = -100  # the label that cross_entropy leaves out by default, as all of transformers does
MOST_LOGITS = 2**24  # elements of the gradient of the logits that are read: 32 MiB in bfloat16
_SHOWN, _LONGEST = 3, 512  # rows of the first batch that are kept to be looked at, and tokens of each
_MASKS = ("completion_mask", "assistant_masks", "assistant_mask", "response_mask")  # names in TRL, transformers, verl
_ROWS = ("width", "real", "supervised", "meant", "padding", "masked", "prompt", "stops", "cut_stops")


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """The parts of a model of transformers that matter here.

    Attributes:
        body: The module that returns the last hidden states, [rows, positions, width].
        head: The module that makes logits of them, None if there is none.
        causal: A position predicts the token behind it.
        stops: Tokens that end an answer, as its configuration says.
    """

    body: nn.Module
    head: nn.Module | None
    causal: bool
    stops: tuple[int, ...]


def language_model(roots: Iterable[nn.Module]) -> LanguageModel | None:
    """Find the model of transformers below what is trained.

    Args:
        roots: What is trained.

    Returns:
        Its parts, or None if there is no such model, or more than one.
    """
    found = {m for root in roots for m in root.modules() if _is_pretrained(m)}
    outer = [m for m in found if not any(m is not o and m in set(o.modules()) for o in found)]
    if len(outer) != 1:
        return None
    model: Any = outer[0]
    body = model.base_model
    if body is model:
        return None
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    paired = bool(getattr(config, "is_encoder_decoder", False))
    head = model.get_output_embeddings() if callable(getattr(model, "get_output_embeddings", None)) else None
    return LanguageModel(body, head, bool(model.can_generate()) and not paired, _stops(model, config))


def stop_tokens(tokenizer: Any) -> tuple[int, ...]:
    """The token that ends an answer, as a tokenizer or a processor around one says; () where none is known."""
    inner = getattr(tokenizer, "tokenizer", tokenizer)
    stop = getattr(inner, "eos_token_id", None)
    return () if stop is None else (int(stop),)


def _is_pretrained(module: nn.Module) -> bool:
    return any(cls.__name__ == "PreTrainedModel" for cls in type(module).__mro__)


def _stops(model: Any, config: Any) -> tuple[int, ...]:
    generation = getattr(model, "generation_config", None)
    ids = getattr(generation, "eos_token_id", None)
    ids = getattr(config, "eos_token_id", None) if ids is None else ids
    return tuple(ids) if isinstance(ids, list | tuple) else () if ids is None else (int(ids),)


class _Batch:
    """One forward of the body, from its call to the arrival of the gradient."""

    def __init__(self, inputs: Mapping[str, Any], shape: torch.Size) -> None:
        self.inputs = dict(inputs)
        self.shape = shape
        self.rows: torch.Tensor | None = None  # [rows, columns]
        self.sums: torch.Tensor | None = None  # [read, following, same, skipping]
        self.shown: torch.Tensor | None = None  # [3, rows, positions]: tokens, supervised, no padding

    def aligned(self, name: str) -> torch.Tensor | None:
        """An input with one entry a position, if there is one."""
        value = self.inputs.get(name)
        fits = isinstance(value, torch.Tensor) and value.shape == self.shape
        return value if fits else None


class SupervisionObserver:
    """Follows the supervision of one run.

    Args:
        model: The parts that are watched.
        hook: Makes a hook of a method and its first argument.
        on_error: Called with an exception of our own, which must not reach the user.
        stops: Tokens that end an answer, as a tokenizer says; () if there is none.
    """

    def __init__(
        self,
        model: LanguageModel,
        hook: Callable[[Callable[..., None], object], Callable[..., None]],
        on_error: Callable[[BaseException], None],
        stops: Collection[int] = (),
    ) -> None:
        self.model = model
        self._hook = hook
        self._on_error = on_error
        self._has_tokenizer = bool(stops)
        self._stops = tuple(dict.fromkeys((*stops, *model.stops)))
        self.totals = SupervisionTotals()
        self._sent: list[tuple[range, int]] = []
        self._sums: range | None = None
        self._shown: tuple[range, torch.Size] | None = None
        self.sample: tuple[SampleRow, ...] = ()
        self.begin()

    @property
    def modules(self) -> list[nn.Module]:
        """What is to be hooked."""
        return [m for m in (self.model.body, self.model.head) if m is not None]

    def begin(self) -> None:
        """A new step."""
        self._open: list[_Batch] = []  # of the forward that is running
        self._step: list[_Batch] = []

    # --- as it happens ----------------------------------------------------------------------

    def ran(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> list[Any]:
        """The body or the head has run inside a candidate.

        Args:
            module: Which of them.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            output: What it returned.

        Returns:
            Handles of the hooks on the output.
        """
        if module is self.model.body:
            hidden = _hidden(output)
            if hidden is None or type(hidden) not in PLAIN or not hidden.requires_grad or hidden.dim() != 3:
                return []
            ids = {"input_ids": args[0]} if args and isinstance(args[0], torch.Tensor) else {}
            batch = _Batch({**ids, **kwargs}, hidden.shape[:2])
            self._open.append(batch)
            self._step.append(batch)
            return [hidden.register_hook(self._hook(self._came, batch))]  # type: ignore[no-untyped-call]
        if self._open and isinstance(output, torch.Tensor) and output.requires_grad:
            batch = self._open[-1]
            if output.shape[:2] == batch.shape and output.dim() == 3:
                return [output.register_hook(self._hook(self._came_to_logits, batch))]  # type: ignore[no-untyped-call]
        return []

    def left(self, kwargs: Mapping[str, Any]) -> None:
        """The candidate has returned.

        Args:
            kwargs: What the outermost module was called with: labels and masks, as a rule.
        """
        for batch in self._open:
            batch.inputs |= {k: v for k, v in kwargs.items() if batch.inputs.get(k) is None}
        self._open = []

    @torch.no_grad()
    def _came(self, batch: _Batch, gradient: torch.Tensor | None) -> None:
        if gradient is None:
            return
        try:
            used = (gradient != 0).any(-1)
            if not self.sample:
                batch.shown = _shown(batch, used, causal=self.model.causal)
            rows = _counts(batch, used, self._stops, causal=self.model.causal)
            batch.rows = rows if batch.rows is None else torch.maximum(batch.rows, rows)
        except Exception as error:
            self._on_error(error)

    @torch.no_grad()
    def _came_to_logits(self, batch: _Batch, gradient: torch.Tensor | None) -> None:
        ids = batch.aligned("input_ids")
        if gradient is None or ids is None or not self.model.causal:
            return
        try:
            rows, most = gradient.shape[1] * gradient.shape[2], MOST_LOGITS
            some = gradient[: max(1, most // rows), : max(1, most // gradient.shape[2])]
            batch.sums = _compare(_taught(some), some.ne(0).any(-1), ids[: some.shape[0]])
        except Exception as error:
            self._on_error(error)

    # --- facts ------------------------------------------------------------------------------

    @torch.no_grad()
    def send(self, readout: Readout) -> None:
        """Add the numbers of this step to what goes to the host, and begin the next."""
        came = [(b.rows, b) for b in self._step if b.rows is not None]
        self._sent = [(readout.add(rows.reshape(-1)), rows.shape[0]) for rows, _ in came]
        sums = [
            s for _, b in came if (s := b.sums if b.sums is not None else _compare_labels(b, self.model)) is not None
        ]
        self._sums = readout.add(torch.stack([s.to(sums[0].device) for s in sums]).sum(0)) if sums else None
        shown = next((b.shown for _, b in came if b.shown is not None), None)
        self._shown = None if shown is None or self.sample else (readout.add(shown.reshape(-1)), shown.shape)
        self.begin()

    def fact(self, readout: Readout) -> SupervisionFacts:
        """What was sent, once it has come."""
        step = None
        if self._sent:
            table = np.concatenate([readout.get(t).reshape(rows, len(_ROWS)) for t, rows in self._sent])
            columns = {name: table[:, i].astype(np.int64) for i, name in enumerate(_ROWS)}
            counts = (0, 0, 0, 0) if self._sums is None else map(int, readout.get(self._sums))
            read, following, same, skipping = counts
            step = Supervision(
                causal=self.model.causal,
                read=read,
                following=following,
                same=same,
                skipping=skipping,
                **columns,
            )
            self.totals = self.totals.after(step)
        if self._shown is not None:
            ticket, shape = self._shown
            self.sample = _sample(readout.get(ticket).reshape(shape))
        self._sent, self._sums, self._shown = [], None, None
        return SupervisionFacts(step, self.totals, self._stops, self._has_tokenizer, self.sample)


def _hidden(output: Any) -> torch.Tensor | None:
    """The last hidden states in what a body returns."""
    if isinstance(output, torch.Tensor):
        return output
    found = output[0] if isinstance(output, tuple | list) and output else getattr(output, "last_hidden_state", None)
    return found if isinstance(found, torch.Tensor) else None


def _ahead(values: torch.Tensor, fill: int) -> torch.Tensor:
    """What stands at the next position, [rows, positions]."""
    return torch.cat([values[:, 1:], values.new_full((values.shape[0], 1), fill)], 1)


def _shown(batch: _Batch, used: torch.Tensor, *, causal: bool) -> torch.Tensor | None:
    """The first rows: tokens, whether the loss asks for them, whether they are no padding; [3, rows, positions]."""
    ids, attention = batch.aligned("input_ids"), batch.aligned("attention_mask")
    if ids is None:
        return None
    asked = torch.cat([torch.zeros_like(used[:, :1]), used[:, :-1]], 1) if causal else used
    real = torch.ones_like(used) if attention is None else attention.to(used.device) != 0
    parts = (ids.to(used.device), asked, real)
    return torch.stack([part[:_SHOWN, :_LONGEST].double() for part in parts])


def _sample(parts: Floats) -> tuple[SampleRow, ...]:
    rows = []
    for tokens, asked, real in zip(*parts, strict=True):
        kept = real > 0
        rows.append(SampleRow(tuple(tokens[kept].astype(int).tolist()), tuple((asked[kept] > 0).tolist())))
    return tuple(rows)


def _counts(batch: _Batch, used: torch.Tensor, stops: Collection[int], *, causal: bool) -> torch.Tensor:
    """The columns of a step, [rows, columns] in float32.

    Args:
        batch: The forward.
        used: Positions that received a gradient, [rows, positions].
        stops: Tokens that end an answer.
        causal: A position predicts the token behind it.

    Returns:
        One column for each name in ``_ROWS``.
    """
    device = used.device
    attention, ids, labels = (batch.aligned(n) for n in ("attention_mask", "input_ids", "labels"))
    real = torch.ones_like(used) if attention is None else attention.to(device) != 0
    nothing = torch.zeros_like(used)
    mask = next((m for name in _MASKS if (m := batch.aligned(name)) is not None), None)
    left_out = nothing if mask is None else mask.to(device) == 0
    is_stop = nothing
    if ids is not None and stops and causal:
        is_stop = torch.isin(ids.to(device), torch.tensor(tuple(stops), device=device)) & real

    def behind(values: torch.Tensor, fill: int) -> torch.Tensor:
        return _ahead(values, fill) if causal else values

    meant = torch.full((used.shape[0],), -1.0, device=device)
    if labels is not None:
        meant = (behind(labels.to(device), IGNORED) != IGNORED).sum(1).float()
    target_real = behind(real.to(torch.int8), 0) != 0
    target_stop = behind(is_stop.to(torch.int8), 0) != 0
    before = torch.cat([nothing[:, :1], used[:, :-1]], 1)  # the position before was supervised
    first = torch.where(used.any(1), used.to(torch.int8).argmax(1), used.shape[1])
    place = torch.arange(used.shape[1], device=device)
    columns = (
        torch.full((used.shape[0],), used.shape[1], device=device),
        real.sum(1),
        used.sum(1),
        meant,
        (used & ~target_real).sum(1),
        (used & target_real & (behind(left_out.to(torch.int8), 0) != 0)).sum(1),
        (real & (place < first.unsqueeze(1))).sum(1),
        (used & target_stop).sum(1),
        (~used & before & target_stop).sum(1),
    )
    return torch.stack([c.float() for c in columns], 1)


def _taught(gradient: torch.Tensor) -> torch.Tensor:
    """The token that each position was taught, off the gradient of the logits.

    Args:
        gradient: [rows, positions, tokens].

    Returns:
        [rows, positions]: where the largest entry by size stands.
    """
    low, high = gradient.min(-1), gradient.max(-1)
    return torch.where(low.values.abs() >= high.values.abs(), low.indices, high.indices)


def _compare(tokens: torch.Tensor, used: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """How the taught tokens stand to those of the row: [read, following, same, skipping]."""
    ids = ids.to(tokens.device)
    following = _ahead(ids, -1)
    skipping = _ahead(following, -1)
    length = tokens.shape[1]
    used = used & (skipping[:, :length] >= 0)
    pairs = (used, *(used & (tokens == other[:, :length]) for other in (following, ids, skipping)))
    return torch.stack([p.sum() for p in pairs]).float()


def _compare_labels(batch: _Batch, model: LanguageModel) -> torch.Tensor | None:
    """The same by the labels, where the logits were never made: a causal model of transformers shifts labels itself."""
    labels, ids = batch.aligned("labels"), batch.aligned("input_ids")
    if labels is None or ids is None or not model.causal or batch.inputs.get("shift_labels") is not None:
        return None
    taught = _ahead(labels, IGNORED)
    return _compare(taught, taught != IGNORED, ids)
