"""The update direction mu_Y: what a step does, or would do, to every trainable tensor."""

from __future__ import annotations

import json
import math
import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lora_probe_callbacks.estimators._backward import backward
from lora_probe_callbacks.estimators._owners import described, local, parameters, unwrapped, wrappers
from lora_probe_callbacks.restore.model import eager, own_gradients, untouched
from lora_probe_callbacks.restore.optimizer import innermost, trial_step
from lora_probe_callbacks.restore.tree import Tree, tree

LossFunction = Callable[[nn.Module], torch.Tensor]


class UpdateDirection:
    """One tensor per trainable parameter, and the parameters that it was made on.

    The step that a direction stands for is `scale * mu`:

    | constructor | mu | scale |
    | --- | --- | --- |
    | `from_gradients` | the gradient of a loss | -lr |
    | `from_loss` | mean_n of the gradient of L_n, a surrogate to ascend | +lr |
    | `adam_preconditioned` | g / (sqrt(v_hat) + eps) | that of g, with the optimizer's lr |
    | `from_optimizer_step` | what the next step will add | 1 |
    | `from_last_step` | what the last step has added | 1 |

    Attributes:
        tensors: mu by parameter name, detached copies.
        scale: what to multiply mu with to get the step.
        source: the constructor that made it.
        made_on: class and address of the module that owned the tensors.
        made_at: when, in UTC.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> model(torch.tensor([[3.0, 4.0]])).sum().backward()
        >>> direction = UpdateDirection.from_gradients(model, lr=0.1)
        >>> direction.norm(), direction.scale
        (5.0, -0.1)
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        *,
        scale: float,
        source: str,
        model: nn.Module,
        made_at: str | None = None,
    ) -> None:
        model = unwrapped(model)
        owned = parameters(model)
        refuse_unfit(tensors, owned, described(model))
        if not math.isfinite(scale):
            raise ValueError(f"got scale {scale}, expected a finite number (check the learning rate)")
        self.tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        self.scale = float(scale)
        self.source = source
        self.made_on = described(model)
        self.made_at = made_at or datetime.now(UTC).isoformat(timespec="seconds")
        # Weak: a direction that is kept for a plot must not keep a deleted model in memory, and
        # unlike an id a weak reference never points at a new tensor in the old one's place.
        self._owners = {name: weakref.ref(owned[name]) for name in tensors}
        self._versions = {name: owned[name]._version for name in tensors}

    def __repr__(self) -> str:
        size = f"{len(self.tensors)} tensors, norm={self.norm():.3g}, scale={self.scale:.3g}"
        return f"UpdateDirection({size}, {self.source} on {self.made_on}, {self.made_at})"

    @classmethod
    def from_gradients(cls, model: nn.Module, *, lr: float) -> UpdateDirection:
        """The `.grad` that the training loop has just made, of a loss that the step descends.

        Args:
            model: the module that is trained; gradients unscaled (`scaler.unscale_` before).
            lr: the learning rate of the step.

        Returns:
            The direction, with scale `-lr`.

        Raises:
            ValueError: if no trainable parameter of `model` has a gradient.
        """
        gradients = {name: _gradient(name, p) for name, p in _trainable(model).items() if p.grad is not None}
        if not gradients:
            raise ValueError(
                f"got no gradient on any trainable parameter of {described(unwrapped(model))}; expected "
                "`.grad` from a backward. Call it after backward() and before zero_grad()."
            )
        return cls(gradients, scale=-lr, source="from_gradients", model=model)

    @classmethod
    def from_loss(
        cls, model: nn.Module, loss_fns: LossFunction | Iterable[LossFunction], *, lr: float
    ) -> UpdateDirection:
        """The mean over prompts of the gradient of a surrogate L_n: mu = 1/B sum_n dL_n/dtheta.

        Args:
            model: the module that is trained. Under DDP the direction is that of this rank's prompts.
            loss_fns: `loss_fn(model) -> [b]`, the surrogates of a micro-batch of prompts; or
                several, whose prompts all count the same.
            lr: the learning rate of a step that ascends the surrogate.

        Returns:
            The direction, with scale `+lr`. The parameters' own `.grad` stays as it was.

        Raises:
            ValueError: if the losses depend on no trainable parameter, or there are none.
        """
        mean = _mean_gradient(model, [loss_fns] if callable(loss_fns) else loss_fns)
        return cls(mean, scale=lr, source="from_loss", model=model)

    @classmethod
    def adam_preconditioned(
        cls, direction: UpdateDirection, model: nn.Module, optimizer: Optimizer, *, stepped: bool = False
    ) -> UpdateDirection:
        """A gradient in Adam's metric: mu_i = g_i / (sqrt(v_hat_i) + eps), without momentum.

        v_hat is the second moment that the coming step will use, the gradient g included:
        v = beta_2 v + (1 - beta_2) g^2, v_hat = v / (1 - beta_2^(t+1)) (Kingma & Ba, 2015,
        arXiv:1412.6980, algorithm 1); with amsgrad, the largest v so far.

        Args:
            direction: g, by `from_loss` or `from_gradients`.
            model: the module that `direction` was made on.
            optimizer: torch's Adam or AdamW, with its state as of now.
            stepped: the step of g is taken already, and g is in the second moments.

        Returns:
            The direction; its scale has the sign of `direction.scale` and the largest
            learning rate among the groups, those of smaller rates being scaled down in mu.

        Raises:
            TypeError: if the optimizer is no Adam.
            ValueError: if it does not own a tensor of `direction`.
        """
        optimizer = innermost(optimizer)
        if not isinstance(optimizer, torch.optim.Adam):  # AdamW derives from Adam since torch 2.7
            raise TypeError(
                f"got {type(optimizer).__name__}, expected torch.optim.Adam or AdamW: the second moments of "
                "others are kept in other ways. Use UpdateDirection.from_optimizer_step."
            )
        owners = direction.owned_by(model)
        groups = _groups_of(direction, owners, optimizer)
        lr = max(float(group["lr"]) for group in groups.values())
        mu = {}
        for name, g in direction.tensors.items():
            group = groups[name]
            rate = float(group["lr"]) / lr if lr else 1.0
            mu[name] = rate * _adam_step(g, optimizer.state.get(owners[name], {}), group, stepped=stepped)
        return cls(mu, scale=math.copysign(lr, direction.scale), source="adam_preconditioned", model=model)

    @classmethod
    def from_optimizer_step(cls, model: nn.Module, optimizer: Optimizer) -> UpdateDirection:
        """What the next step will add: mu = theta' - theta, with the gradients at hand.

        The real optimizer takes the step, and everything it touched is put back bit by bit
        (see `trial_step`); momentum, weight decay and clipping of the optimizer are all in it.

        Args:
            model: the module that is trained.
            optimizer: any optimizer that steps without a closure; gradients in place, unscaled.

        Returns:
            The direction, with scale 1.

        Raises:
            ValueError: if the optimizer owns no trainable tensor of `model`, or there are no
                gradients, or the gradients carry a graph, or a backward is running.
        """
        optimizer = innermost(optimizer)
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        trained = {name: p for name, p in _trainable(model).items() if id(p) in owned}
        _refuse_step(optimizer, trained, model)
        before = {name: p.detach().clone() for name, p in trained.items()}
        with trial_step(optimizer):
            mu = {name: _difference(p, before[name]) for name, p in trained.items()}
        return cls(mu, scale=1.0, source="from_optimizer_step", model=model)

    @classmethod
    def from_last_step(cls, model: nn.Module, before: Mapping[str, torch.Tensor]) -> UpdateDirection:
        """What a step has added: mu = theta - before.

        Args:
            model: the module that is trained, after the step.
            before: copies of its parameters from before the step, by name:
                `{n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}`.

        Returns:
            The direction, with scale 1.

        Raises:
            ValueError: if `before` shares its memory with the parameters (no copy was made).
        """
        return cls(_since(before, model), scale=1.0, source="from_last_step", model=model)

    @property
    def owners(self) -> dict[str, nn.Parameter | None]:
        """The parameters that this direction was made on, by name; None for one that is gone."""
        return {name: reference() for name, reference in self._owners.items()}

    @property
    def stale(self) -> bool:
        """Whether a parameter has changed, or is gone, since the direction was made."""
        now = ((self._owners[name](), version) for name, version in self._versions.items())
        return any(owner is None or owner._version != version for owner, version in now)

    def owned_by(self, model: nn.Module | Tree) -> dict[str, nn.Parameter]:
        """The very tensors that this direction was made on, if `model` owns them.

        Args:
            model: the module to project on, or what was found in it.

        Returns:
            The parameters by the direction's names.

        Raises:
            ValueError: if a tensor is gone, or `model` owns another one under that name.
        """
        inside = model if isinstance(model, Tree) else tree(unwrapped(model))
        named = inside.parameters
        owned = {id(p): p for p in named.values()}
        found = {}
        for name, reference in self._owners.items():
            owner = reference()
            if owner is None or id(owner) not in owned:
                fate = "which no longer exists" if owner is None else "another object"
                there = "a tensor of the same name" if name in named else "no tensor of that name"
                raise ValueError(
                    f"the direction ({self.source}, {self.made_at}) was made on {name!r} of {self.made_on}, "
                    f"{fate}; {described(inside.root)} owns {there}. Make the direction, the optimizer and the "
                    "projection from one and the same module."
                )
            found[name] = owned[id(owner)]
        return found

    def dot(self, other: UpdateDirection) -> float:
        """<mu, nu> over the tensors that both have, in float64; what one lacks counts as zero.

        Args:
            other: a direction with tensors of the same names and shapes.

        Returns:
            The inner product, without the scales.

        Raises:
            ValueError: if no name is shared, or a shape differs.
        """
        shared = self.tensors.keys() & other.tensors.keys()
        if not shared:
            raise ValueError(f"the directions share no tensor: got {_some(self.tensors)} and {_some(other.tensors)}")
        if unlike := [name for name in sorted(shared) if self.tensors[name].shape != other.tensors[name].shape]:
            shapes = (tuple(d.tensors[unlike[0]].shape) for d in (self, other))
            raise ValueError(f"{unlike[0]} has shapes {' and '.join(map(str, shapes))}; expected one")
        pairs = ((self.tensors[name].double(), other.tensors[name].double()) for name in sorted(shared))
        return sum(float((mu * nu.to(mu.device)).sum()) for mu, nu in pairs)

    def norm(self) -> float:
        """Return the Euclidean norm of mu over all tensors, in float64, without the scale."""
        return math.sqrt(sum(float(mu.double().square().sum()) for mu in self.tensors.values()))

    def cosine(self, other: UpdateDirection) -> float:
        """Return <mu, nu> / (|mu| |nu|), or nan if either is zero."""
        norms = self.norm() * other.norm()
        return self.dot(other) / norms if norms else math.nan

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the tensors, the scale and where they come from to a safetensors file.

        Args:
            path: the file to write.
        """
        from safetensors.torch import save_file

        about = {"scale": self.scale.hex(), "source": self.source, "made_at": self.made_at}
        save_file(
            {name: tensor.contiguous() for name, tensor in self.tensors.items()},
            path,
            metadata={"update_direction": json.dumps(about)},
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module) -> UpdateDirection:
        """Read a saved direction and hand it to `model`, whose tensors it then belongs to.

        Args:
            path: a file written by `save`.
            model: the module whose parameters have the names and shapes of the saved tensors.

        Returns:
            The direction, with the scale and the date it was saved with.

        Raises:
            ValueError: if the file holds no direction.
        """
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            about = (file.metadata() or {}).get("update_direction")
            if about is None:
                raise ValueError(f"{path} holds no update direction; expected a file of UpdateDirection.save")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        known: dict[str, Any] = json.loads(about)
        devices = {name: p.device for name, p in parameters(unwrapped(model)).items()}
        return cls(
            {name: tensor.to(devices.get(name, tensor.device)) for name, tensor in tensors.items()},
            scale=float.fromhex(known["scale"]),
            source=known["source"],
            model=model,
            made_at=known["made_at"],
        )


def _mean_gradient(model: nn.Module, loss_fns: Iterable[LossFunction]) -> dict[str, torch.Tensor]:
    """The gradient of the mean over all prompts, by name; the parameters' own `.grad` stays as it was."""
    inside, trained = tree(unwrapped(model)), _trainable(model)
    everywhere = [*wrappers(model), *inside.modules.values()]
    count = 0
    with untouched(inside), eager(everywhere), torch.enable_grad(), own_gradients(trained.values()):
        for loss_fn in loss_fns:
            L = loss_fn(inside.root)
            if not L.requires_grad:
                raise ValueError(
                    "loss_fn returned values that depend on no trainable parameter of "
                    f"{described(inside.root)} (no_grad, merged or disabled adapter, detached)"
                )
            backward(L.sum(), list(trained.values()))
            count += L.numel()
        summed = {name: _gradient(name, p) for name, p in trained.items() if p.grad is not None}
    if not summed or not count:
        raise ValueError("got no gradient from loss_fns; expected at least one loss_fn(model) -> [b]")
    return {name: gradient / count for name, gradient in summed.items()}


def _refuse_step(optimizer: Optimizer, trained: Mapping[str, nn.Parameter], model: nn.Module) -> None:
    """Say why the next step cannot be taken and taken back."""
    if not trained:
        raise ValueError(
            f"{type(optimizer).__name__} owns none of the trainable tensors of "
            f"{described(unwrapped(model))}; expected the optimizer of that module"
        )
    if all(p.grad is None for p in trained.values()):
        raise ValueError("got no gradients; expected `.grad` from a backward, before zero_grad()")
    if torch._C._current_graph_task_id() != -1:
        raise ValueError("a backward is running; call from_optimizer_step after it")
    if live := [name for name, p in trained.items() if p.grad is not None and p.grad.requires_grad]:
        raise ValueError(
            f"the gradient of {live[0]} carries a graph (create_graph=True), which a step would "
            "invalidate; expected gradients of an ordinary backward"
        )


def _groups_of(
    direction: UpdateDirection, owners: Mapping[str, nn.Parameter], optimizer: Optimizer
) -> dict[str, dict[str, Any]]:
    """The parameter group of every tensor of a direction."""
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    if missing := [name for name, owner in owners.items() if id(owner) not in group_of]:
        raise ValueError(
            f"the optimizer does not own {missing[0]} (and {len(missing) - 1} more of "
            f"{len(owners)} tensors) of {direction.made_on}; "
            "build it on the parameters of the module that is trained"
        )
    return {name: group_of[id(owner)] for name, owner in owners.items()}


def _since(before: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """What the parameters have changed by, under the names of the innermost module."""
    module = unwrapped(model)
    named = parameters(model) | parameters(module)
    refuse_unfit(before, named, described(module))
    names = {id(p): name for name, p in parameters(module).items()}
    mu = {}
    for name, old in before.items():
        if old.data_ptr() == named[name].data_ptr():
            raise ValueError(f"before[{name!r}] is the parameter itself; expected a copy: clone() it")
        mu[names[id(named[name])]] = _difference(named[name], old)
    return mu


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    named = parameters(unwrapped(model)).items()
    return {name: parameter for name, parameter in named if parameter.requires_grad}


def _gradient(name: str, parameter: nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    gradient: torch.Tensor = local(parameter.grad, name).detach().to_dense()
    return gradient.clone()


def _difference(after: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    # Two neighbouring bfloat16 numbers differ by something that bfloat16 can hold, but the
    # difference of distant ones is rounded: float32 holds it exactly.
    dtype = torch.promote_types(after.dtype, torch.float32)
    return after.detach().to(dtype) - before.to(after.device, dtype)


def _adam_step(g: torch.Tensor, state: Mapping[str, Any], group: Mapping[str, Any], *, stepped: bool) -> torch.Tensor:
    beta_2 = float(group["betas"][1])
    t = float(state.get("step", 0))
    if stepped:
        v = state["exp_avg_sq"]
    else:
        t += 1
        v = (1 - beta_2) * g * g
        if "exp_avg_sq" in state:
            v = v + beta_2 * state["exp_avg_sq"]
    if group["amsgrad"] and "max_exp_avg_sq" in state:
        v = torch.maximum(v, state["max_exp_avg_sq"])
    v_hat: torch.Tensor = v / (1 - beta_2**t)
    preconditioned: torch.Tensor = g / (v_hat.sqrt() + group["eps"])
    return preconditioned


def refuse_unfit(
    tensors: Mapping[str, torch.Tensor], owned: Mapping[str, torch.Tensor], owner: str
) -> dict[str, float]:
    """Refuse names, shapes and values that no step of a module can have.

    Args:
        tensors: a direction.
        owned: the parameters of the module.
        owner: the module, as messages call it.

    Returns:
        The largest magnitude in each tensor.

    Raises:
        ValueError: naming the tensor.
    """
    if not tensors:
        raise ValueError(f"got an empty direction, expected a tensor for every trained one of {owner}")
    for name, tensor in tensors.items():
        if name not in owned:
            raise ValueError(f"got {name!r}, expected a parameter of {owner}, such as {_some(owned)}")
        local(owned[name], name)
        if tensor.shape != owned[name].shape:
            raise ValueError(
                f"{name} got shape {tuple(tensor.shape)}, expected {tuple(owned[name].shape)} as in {owner}"
            )
    largest = dict(zip(tensors, _largest(list(tensors.values())), strict=True))
    if bad := [name for name, magnitude in largest.items() if not math.isfinite(magnitude)]:
        raise ValueError(
            f"got NaN or infinity in {bad[0]} (and {len(bad) - 1} more of {len(tensors)} tensors); expected "
            "finite numbers. A step whose gradients overflowed is skipped: skip its direction as well."
        )
    return largest


def _largest(tensors: list[torch.Tensor]) -> list[float]:
    """Return max |t| of every tensor, nan if there is one in it, by few kernels and one transfer."""
    with torch.no_grad():
        floating = [t if t.is_floating_point() else t.double() for t in tensors]
        filled = [t if t.numel() else t.new_zeros(1) for t in floating]
        norms = torch._foreach_norm(filled, math.inf)
        device = norms[0].device
        largest: list[float] = torch.stack([norm.to(device) for norm in norms]).tolist()
    return largest


def _some(names: Mapping[str, Any]) -> str:
    shown = list(names)[:2]
    return ", ".join(repr(name) for name in shown) + (", ..." if len(names) > len(shown) else "")
