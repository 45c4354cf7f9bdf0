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
    Three ways: ``torch.compile(module)``, ``module.compile()``, and a LightningModule that was
    compiled before ``fit``, whose ``training_step`` is then the compiled function.

    Args:
        module: Any module.

    Returns:
        True if hooks below it must not be installed.
    """
    return (
        isinstance(module, OptimizedModule)
        or getattr(module, "_compiled_call_impl", None) is not None
        or getattr(module, "_compiler_ctx", None) is not None
    )


def hooks_fire(module: nn.Module) -> bool:
    """Tell whether hooks on ``module`` itself run outside its compiled region.

    Args:
        module: Any module.

    Returns:
        False for modules compiled in place: their own hooks are inside the region.
    """
    return isinstance(module, OptimizedModule) or not is_compiled(module)


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
