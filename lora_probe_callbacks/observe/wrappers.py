"""What wraps a module, and what that hides.

The probe does not unwrap: it finds adapted layers below whatever the user trains, and hooks the
modules above them. The one thing it must know is where Python hooks do not reach.
"""

from __future__ import annotations

from torch import nn
from torch._dynamo.eval_frame import OptimizedModule

__all__ = ["describe", "is_compiled"]


def is_compiled(module: nn.Module) -> bool:
    """Tell whether calls below ``module`` run as compiled code.

    Hooks put there would be traced into the graph, and would stay in it after their removal:
    dynamo does not guard on hooks (``torch._dynamo.config.skip_nnmodule_hook_guards``).
    There are five ways: ``torch.compile(module)``, ``module.compile()``, a compiled ``forward``, a
    compiled ``training_step``, and a LightningModule that was compiled before ``fit``.

    Args:
        module: Any module.

    Returns:
        True if hooks below it must not be installed.
    """
    return isinstance(module, OptimizedModule) or _compiled_method(module, "forward") or _calls_are_compiled(module)


def hooks_fire(module: nn.Module) -> bool:
    """Tell whether hooks on ``module`` itself run outside its compiled region.

    Args:
        module: Any module.

    Returns:
        False for modules whose calls are compiled as a whole: their own hooks are inside the region.
    """
    return isinstance(module, OptimizedModule) or not _calls_are_compiled(module)


def _calls_are_compiled(module: nn.Module) -> bool:
    return (
        getattr(module, "_compiled_call_impl", None) is not None
        or getattr(module, "_compiler_ctx", None) is not None
        or _compiled_method(module, "training_step")
    )


def _compiled_method(module: nn.Module, name: str) -> bool:
    method = vars(module).get(name) or getattr(type(module), name, None)
    return hasattr(method, "_torchdynamo_orig_callable")


def describe(name: str, module: nn.Module) -> str:
    """Name a module object for a person.

    Args:
        name: Qualified name, empty for the root.
        module: The object.

    Returns:
        For instance ``"model (PeftModelForCausalLM)"``.
    """
    kind = type(module).__name__
    return f"{name} ({kind})" if name else kind
