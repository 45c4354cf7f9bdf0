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

from lora_probe_callbacks._gc import no_collection
from lora_probe_callbacks.facts import Floats, Ints, SampleRow, Supervision, SupervisionFacts, SupervisionTotals
from lora_probe_callbacks.observe.device.transfer import PLAIN, Readout

__all__ = ["LanguageModel", "SupervisionObserver", "language_model", "stop_tokens"]

IGNORED = -100  # the label that cross_entropy leaves out by default, as all of transformers does
MOST_LOGITS = 2**22  # elements of the gradient of the logits that are read: 8 MiB in bfloat16, 27 tokens of 152,000
LOOKS = 4  # probed steps in which targets are read: a collator does not change its mind
_SHOWN, _LONGEST = 3, 512  # rows of the first batch that are kept to be looked at, and tokens of each
_MASKS = ("completion_mask", "assistant_masks", "assistant_mask", "response_mask")  # names in TRL, transformers, verl
_COUNTED = ("supervised", "prompt", "meant", "padding", "masked", "stops", "cut_stops", "real")


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
    # Those of T5's kind have no body of their own; what their decoder returns goes into the head.
    body = model.base_model if model.base_model is not model else getattr(model, "decoder", None)
    if not isinstance(body, nn.Module):
        return None
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    paired = bool(getattr(config, "is_encoder_decoder", False))
    head = model.get_output_embeddings() if callable(getattr(model, "get_output_embeddings", None)) else None
    return LanguageModel(body, head, bool(model.can_generate()) and not paired, _stops(model, config))


def stop_tokens(tokenizer: Any) -> tuple[int, ...]:
    """The tokens that may end an answer, as a tokenizer or a processor around one says.

    Args:
        tokenizer: One of transformers, or None.

    Returns:
        The end-of-sequence token first, then special tokens as of chat templates (``<|im_end|>``); () if none is known.
    """
    inner = getattr(tokenizer, "tokenizer", tokenizer)
    end = getattr(inner, "eos_token_id", None)
    if end is None:
        return ()
    others = {getattr(inner, f"{name}_token_id", None) for name in ("pad", "bos", "unk", "mask", "cls")} - {end}
    return (int(end), *(i for i in getattr(inner, "all_special_ids", ()) if i != end and i not in others))


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
        self.counts: torch.Tensor | None = None  # [columns, rows]
        self.sums: torch.Tensor | None = None  # [read, following, same, skipping]
        self.shown: torch.Tensor | None = None  # [3, rows, positions]: tokens, supervised, no padding

    def aligned(self, name: str, device: torch.device | None) -> torch.Tensor | None:
        """An input with one entry a position, if there is one."""
        value = self.inputs.get(name)
        if not isinstance(value, torch.Tensor) or value.shape != self.shape:
            return None
        return value if device is None else value.to(device)


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
        self._stops_there: torch.Tensor | None = None  # on the device of the model
        self._sent: list[tuple[range, _Batch]] = []
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
        reads = self.model.causal and self.totals.steps < LOOKS
        if reads and self._open and isinstance(output, torch.Tensor) and output.requires_grad:
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
            with no_collection():  # of what is made here, nearly nothing stays
                counts = _counts(batch, used, self._stop_tokens(used.device), causal=self.model.causal)
            batch.counts = counts if batch.counts is None else torch.maximum(batch.counts, counts)
        except Exception as error:
            self._on_error(error)

    def _stop_tokens(self, device: torch.device) -> torch.Tensor | None:
        if self._stops and (self._stops_there is None or self._stops_there.device != device):
            self._stops_there = torch.tensor(self._stops, device=device)
        return self._stops_there

    @torch.no_grad()
    def _came_to_logits(self, batch: _Batch, gradient: torch.Tensor | None) -> None:
        if gradient is None or (ids := batch.aligned("input_ids", gradient.device)) is None:
            return
        try:
            rows, most = gradient.shape[1] * gradient.shape[2], MOST_LOGITS
            some = gradient[: max(1, most // rows), : max(1, most // gradient.shape[2])]
            # One entry has a sign of its own, and the others add up to its size: that of the target.
            size, taught = some.abs().max(-1)
            batch.sums = _compare(taught, size > 0, ids[: some.shape[0]])
        except Exception as error:
            self._on_error(error)

    # --- facts ------------------------------------------------------------------------------

    @torch.no_grad()
    def send(self, readout: Readout) -> None:
        """Add the numbers of this step to what goes to the host, and begin the next."""
        came = [(b.counts, b) for b in self._step if b.counts is not None]
        self._sent = [(readout.add(counts.reshape(-1)), b) for counts, b in came]
        reads = self.totals.steps < LOOKS
        read = [b.sums if b.sums is not None else _compare_labels(b, self.model) for _, b in came if reads]
        sums = [s for s in read if s is not None]
        self._sums = readout.add(torch.stack([s.to(sums[0].device) for s in sums]).sum(0)) if sums else None
        shown = next((b.shown for _, b in came if b.shown is not None), None)
        self._shown = None if shown is None or self.sample else (readout.add(shown.reshape(-1)), shown.shape)
        self.begin()

    def fact(self, readout: Readout) -> SupervisionFacts:
        """What was sent, once it has come."""
        step = None
        if self._sent:
            columns = _columns([(readout.get(ticket), batch) for ticket, batch in self._sent])
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


def _columns(counted: list[tuple[Floats, _Batch]]) -> dict[str, Ints]:
    """The columns of a step, those of its forwards joined."""
    parts: dict[str, list[Ints]] = {name: [] for name in ("width", *_COUNTED)}
    for values, batch in counted:
        rows, width = batch.shape
        found = dict(zip(_COUNTED, values.astype(np.int64).reshape(len(_COUNTED), rows), strict=True))
        if batch.aligned("attention_mask", None) is None:
            found["real"] = np.full(rows, width)
        if batch.aligned("labels", None) is None:
            found["meant"] = np.full(rows, -1)
        for name, column in {**found, "width": np.full(rows, width)}.items():
            parts[name].append(column)
    return {name: np.concatenate(columns) for name, columns in parts.items()}


def _shown(batch: _Batch, used: torch.Tensor, *, causal: bool) -> torch.Tensor | None:
    """The first rows: tokens, whether the loss asks for them, whether they are no padding; [3, rows, positions]."""
    ids, attention = (batch.aligned(name, used.device) for name in ("input_ids", "attention_mask"))
    if ids is None:
        return None
    asked = torch.cat([torch.zeros_like(used[:, :1]), used[:, :-1]], 1) if causal else used
    real = torch.ones_like(used) if attention is None else attention != 0
    parts = (ids, asked, real)
    return torch.stack([part[:_SHOWN, :_LONGEST].double() for part in parts])


def _sample(parts: Floats) -> tuple[SampleRow, ...]:
    rows = []
    for tokens, asked, real in zip(*parts, strict=True):
        kept = real > 0
        rows.append(SampleRow(tuple(tokens[kept].astype(int).tolist()), tuple((asked[kept] > 0).tolist())))
    return tuple(rows)


def _counts(batch: _Batch, used: torch.Tensor, stops: torch.Tensor | None, *, causal: bool) -> torch.Tensor:
    """Count in each row.

    Args:
        batch: The forward.
        used: Positions that received a gradient, [rows, positions].
        stops: Tokens that end an answer, on the device of the model.
        causal: A position predicts the token behind it.

    Returns:
        [columns, rows], one column for each name in ``_COUNTED``; 0 where an input is missing.
    """
    attention, ids, labels = (batch.aligned(n, used.device) for n in ("attention_mask", "input_ids", "labels"))
    mask = next((m for name in _MASKS if (m := batch.aligned(name, used.device)) is not None), None)
    found = used.new_zeros(len(_COUNTED), *used.shape)
    found[0] = used
    found[1] = used.cumsum(1) == 0
    ahead = 1 if causal else 0
    here = used[:, : used.shape[1] - ahead]
    columns = found[:, :, : here.shape[1]]
    real = None if attention is None else attention[:, ahead:] != 0
    if attention is not None and real is not None:
        found[7] = attention != 0
        found[1] &= found[7]
        columns[3] = here & ~real
    if labels is not None:
        columns[2] = labels[:, ahead:] != IGNORED
    if mask is not None:
        outside = here & (mask[:, ahead:] == 0)
        columns[4] = outside if real is None else outside & real
    if ids is not None and stops is not None and causal:
        stop = torch.isin(ids[:, 1:], stops)
        stop = stop if real is None else stop & real
        columns[5] = here & stop
        columns[6, :, 1:] = here[:, :-1] & stop[:, 1:] & ~here[:, 1:]
    return found.sum(-1)


def _compare(tokens: torch.Tensor, used: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """How the taught tokens stand to those of the row, where there are two tokens more to compare with.

    Args:
        tokens: What each position was taught, [rows, positions].
        used: Where that was taught, [rows, positions].
        ids: The tokens of the row, [rows, positions or more].

    Returns:
        [read, following, same, skipping].
    """
    length = min(tokens.shape[1], ids.shape[1] - 2)
    if length < 1:
        return used.new_zeros(4, dtype=torch.float32)
    others = torch.stack([ids[:, k : k + length] for k in (1, 0, 2)])
    equal = (others == tokens[:, :length]) & used[:, :length]
    return torch.cat([used[:, :length].sum().reshape(1), equal.sum((1, 2))]).float()


def _compare_labels(batch: _Batch, model: LanguageModel) -> torch.Tensor | None:
    """The same by the labels, where the logits were never made: a causal model of transformers shifts labels itself."""
    labels, ids = batch.aligned("labels", None), batch.aligned("input_ids", None)
    if labels is None or ids is None or not model.causal or batch.inputs.get("shift_labels") is not None:
        return None
    return _compare(labels[:, 1:], labels[:, 1:] != IGNORED, ids.to(labels.device))
