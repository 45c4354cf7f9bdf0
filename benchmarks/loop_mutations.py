"""Changes that a machine makes to a training script, one at a time, on its syntax tree.

A mutation is a statement that was deleted, doubled, exchanged with its neighbour or wrapped; a call of another module;
a constant or an argument that is another one; or something that people insert into training loops. Nothing is changed
in imports, in docstrings and in the call of the probe itself.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import itertools
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

PROBES = ("LoraProbeMonitor", "LoraProbe", "LoraProbeTrainerCallback")
LATER = 6  # the step at which "once" is

# What people insert. MODEL, OPTIMIZER, LOSS, BATCH, STEP and ADAPTER stand for what the script calls so.
PARTS = "[m for m in MODEL.modules() if hasattr(m, 'lora_A')]"
INSERTED: dict[str, str] = {
    # the state of the adapter
    "merge": "MODEL.merge_adapter()",
    "unmerge": "MODEL.unmerge_adapter()",
    "merge and unmerge": "MODEL.merge_adapter()\nMODEL.unmerge_adapter()",
    "eval": "MODEL.eval()",
    "train": "MODEL.train()",
    "disable layers": "MODEL.base_model.disable_adapter_layers()",
    "enable layers": "MODEL.base_model.enable_adapter_layers()",
    "disable for good": "MODEL.disable_adapter().__enter__()",
    "disable and enable": "with MODEL.disable_adapter():\n    pass",
    "set adapter": "MODEL.set_adapter('ADAPTER')",
    "add adapter": "MODEL.add_adapter('spare', MODEL.peft_config['ADAPTER'])",
    "switch to a new adapter": "MODEL.add_adapter('spare', MODEL.peft_config['ADAPTER'])\nMODEL.set_adapter('spare')",
    "delete adapter": "MODEL.delete_adapter('ADAPTER')",
    "unload": "MODEL.unload()",
    "merge and unload": "MODEL = MODEL.merge_and_unload()",
    "merge and unload a copy": "copy.deepcopy(MODEL).merge_and_unload()",
    "adapt again": "MODEL = peft.get_peft_model(MODEL, MODEL.peft_config['ADAPTER'])",
    "adapt the base again": "MODEL = peft.get_peft_model(MODEL.get_base_model(), MODEL.peft_config['ADAPTER'])",
    "scaling 0": f"for m in {PARTS}:\n    m.scaling['ADAPTER'] = 0.0",
    "scaling doubled": f"for m in {PARTS}:\n    m.scale_layer(2.0)",
    "reset": f"for m in {PARTS}:\n    m.reset_lora_parameters('ADAPTER', True)",
    # freezing
    "freeze all": "MODEL.requires_grad_(False)",
    "freeze base": "MODEL.get_base_model().requires_grad_(False)",
    "freeze A": "for n, p in MODEL.named_parameters():\n    if 'lora_A' in n:\n        p.requires_grad_(False)",
    "freeze B": "for n, p in MODEL.named_parameters():\n    if 'lora_B' in n:\n        p.requires_grad_(False)",
    "freeze a layer": "for n, p in MODEL.named_parameters():\n    if 'layers.0' in n:\n        p.requires_grad_(False)",
    "freeze v": "for n, p in MODEL.named_parameters():\n    if 'v_proj' in n:\n        p.requires_grad = False",
    "unfreeze all": "MODEL.requires_grad_(True)",
    # gradients
    "zero_grad": "OPTIMIZER.zero_grad()",
    "zero_grad of the model": "MODEL.zero_grad(set_to_none=False)",
    "gradients None": "for p in MODEL.parameters():\n    p.grad = None",
    "half of the gradients None": "for p in list(MODEL.parameters())[::2]:\n    p.grad = None",
    "detach": "LOSS = LOSS.detach().requires_grad_(True)",
    "loss of a number": "LOSS = torch.tensor(LOSS.item(), requires_grad=True)",
    "loss times 0": "LOSS = LOSS * 0",
    "loss scaled": "LOSS = LOSS * 100",
    "backward twice": "LOSS.backward(retain_graph=True)",
    "no gradients from here": "torch.set_grad_enabled(False)",
    "clip to 0": "torch.nn.utils.clip_grad_norm_(MODEL.parameters(), 0.0)",
    "clip to 1e-12": "torch.nn.utils.clip_grad_value_(MODEL.parameters(), 1e-12)",
    "nan gradients": "for p in MODEL.parameters():\n    if p.grad is not None:\n        p.grad.fill_(float('nan'))",
    "nan to 0": "for p in MODEL.parameters():\n    if p.grad is not None:\n        p.grad.nan_to_num_()",
    # copies and other objects
    "deepcopy of the model": "MODEL = copy.deepcopy(MODEL)",
    "deepcopy of the model aside": "teacher = copy.deepcopy(MODEL)",
    "deepcopy of the optimizer": "OPTIMIZER = copy.deepcopy(OPTIMIZER)",
    "deepcopy of a layer": "layers = MODEL.get_base_model().model.layers\nlayers[0] = copy.deepcopy(layers[0])",
    "new parameters": f"for m in {PARTS}:\n    for f in (m.lora_A, m.lora_B):\n"
    "        f['ADAPTER'].weight = torch.nn.Parameter(f['ADAPTER'].weight.detach().clone())",
    "new storage": "for p in MODEL.parameters():\n    p.data = p.data.clone()",
    "new optimizer": "OPTIMIZER = torch.optim.AdamW([p for p in MODEL.parameters() if p.requires_grad], lr=1e-3)",
    "new optimizer of a copy": "OPTIMIZER = torch.optim.AdamW(copy.deepcopy(MODEL).parameters(), lr=1e-3)",
    "optimizer's own state": "OPTIMIZER.load_state_dict(copy.deepcopy(OPTIMIZER.state_dict()))",
    "optimizer without state": "OPTIMIZER.state.clear()",
    "optimizer without a tensor": "OPTIMIZER.param_groups[0]['params'].pop()",
    "optimizer with half": "del OPTIMIZER.param_groups[0]['params'][::2]",
    "rate 0": "for group in OPTIMIZER.param_groups:\n    group['lr'] = 0.0",
    "rate falls": "for group in OPTIMIZER.param_groups:\n    group['lr'] *= 0.9",
    "a step more": "OPTIMIZER.step()",
    # states of another time
    "older state": "if STEP == 2:\n    globals()['older'] = copy.deepcopy(MODEL.state_dict())\n"
    "if STEP == 6:\n    MODEL.load_state_dict(globals()['older'])",
    "older state again and again": "if STEP == 2:\n    globals()['older'] = copy.deepcopy(MODEL.state_dict())\n"
    "if STEP > 2:\n    MODEL.load_state_dict(globals()['older'])",
    "older state every 4": "if STEP == 2:\n    globals()['older'] = copy.deepcopy(MODEL.state_dict())\n"
    "if STEP > 2 and STEP % 4 == 0:\n    MODEL.load_state_dict(globals()['older'])",
    "own state": "MODEL.load_state_dict(copy.deepcopy(MODEL.state_dict()))",
    "own adapter": "own = peft.get_peft_model_state_dict(MODEL, adapter_name='ADAPTER')\n"
    "peft.set_peft_model_state_dict(MODEL, own, adapter_name='ADAPTER')",
    "state aside": "peft.get_peft_model_state_dict(MODEL)",
    "saved": "MODEL.save_pretrained(FOLDER)",
    # precision and placement
    "to cpu": "MODEL.to('cpu')",
    "to bfloat16": "MODEL.to(torch.bfloat16)",
    "through bfloat16": "MODEL.to(torch.bfloat16).to(torch.float32)",
    "checkpointing": "MODEL.gradient_checkpointing_enable()",
    "reentrant checkpointing": "MODEL.gradient_checkpointing_enable(dict(use_reentrant=True))",
    "input gradients": "MODEL.enable_input_require_grads()",
    # what changes nothing, or nothing but the random numbers
    "forward aside": "MODEL(**BATCH)",
    "forward aside, no_grad": "with torch.no_grad():\n    MODEL(**BATCH)",
    "evaluation": "MODEL.eval()\nwith torch.no_grad():\n    MODEL(**BATCH)\nMODEL.train()",
    "evaluation, never back": "MODEL.eval()\nwith torch.no_grad():\n    MODEL(**BATCH)",
    "seed": "torch.manual_seed(0)",
    "count": "print(sum(p.numel() for p in MODEL.parameters() if p.requires_grad))",
    "status": "peft.get_model_status(MODEL)",
}
AROUND = {  # how a statement is wrapped
    "no_grad": "with torch.no_grad():\n    BODY",
    "inference_mode": "with torch.inference_mode():\n    BODY",
    "enable_grad": "with torch.enable_grad():\n    BODY",
    "autocast": "with torch.autocast('cpu', dtype=torch.bfloat16):\n    BODY",
    "try": "try:\n    BODY\nexcept Exception:\n    pass",
    "disable_adapter": "with MODEL.disable_adapter():\n    BODY",
    "first steps": f"if STEP < {LATER}:\n    BODY",
    "later": f"if STEP >= {LATER}:\n    BODY",
    "every other step": "if STEP % 2 == 0:\n    BODY",
    "twice in a loop": "for again in range(2):\n    BODY",
}
OTHER_MODULES = (
    "MODEL.base_model",
    "MODEL.base_model.model",
    "MODEL.get_base_model()",
    "copy.deepcopy(MODEL)",
    "MODEL.eval()",
    "MODEL.unload()",
    "MODEL.get_base_model().lm_head",
    "base",
    "small_model()",
)


@dataclass(frozen=True)
class Mutant:
    """A changed script.

    Attributes:
        script: Name of the script.
        operator: What kind of change.
        kind: Which one of its kind.
        line: Where, in the script.
        text: The statement there, its first line; after or before it, for what is inserted.
        source: The whole changed script.
        when: ``"always"``, or ``"once"`` if it happens in one later step alone.
    """

    script: str
    operator: str
    kind: str
    line: int
    text: str
    source: str = field(repr=False)
    when: str = "always"

    @property
    def key(self) -> str:
        """Tells mutants apart, whatever their number."""
        return hashlib.sha1(f"{self.script}\n{self.source}".encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Place:
    """One statement in one list of statements, and what is known there by name."""

    way: tuple[tuple[str, int], ...]  # from the module: field and index
    names: frozenset[str]
    method: bool  # inside a method with a self

    def siblings(self, tree: ast.Module) -> tuple[list[ast.stmt], int]:
        """The list that it stands in, in a tree of the same shape, and where."""
        node: ast.AST = tree
        for name, index in self.way[:-1]:
            node = getattr(node, name)[index]
        name, index = self.way[-1]
        return getattr(node, name), index


def places(tree: ast.Module) -> Iterator[tuple[Place, ast.stmt]]:
    """Every statement, with what stands above it."""
    at_module = frozenset(name for node in tree.body for name in _binds(node))

    def walk(
        node: ast.AST, way: tuple[tuple[str, int], ...], names: frozenset[str], method: bool
    ) -> Iterator[tuple[Place, ast.stmt]]:
        for name in ("body", "orelse", "handlers", "finalbody"):
            known = names
            for index, child in enumerate(getattr(node, name, [])):
                if isinstance(child, ast.ExceptHandler):
                    yield from walk(child, (*way, (name, index)), known, method)
                    continue
                here = (*way, (name, index))
                yield Place(here, known, method), child
                inner, in_method = known, method
                if isinstance(child, ast.FunctionDef):
                    arguments = {a.arg for a in child.args.args}
                    inner, in_method = at_module | arguments, "self" in arguments
                elif isinstance(child, ast.For):
                    inner = known | _targets(child.target)
                yield from walk(child, here, inner, in_method)
                known = known | _binds(child)

    yield from walk(tree, (), frozenset(), False)


def _targets(node: ast.AST) -> frozenset[str]:
    return frozenset(n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))


def _binds(node: ast.stmt) -> frozenset[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return frozenset({node.name})
    if isinstance(node, ast.Import | ast.ImportFrom):
        return frozenset((a.asname or a.name).split(".")[0] for a in node.names)
    return _targets(node)


# --- words ----------------------------------------------------------------------------------------


def words(script: str, tree: ast.Module, place: Place, *, own: bool) -> dict[str, str]:
    """What the script calls the things that templates speak of, where it has them.

    Args:
        script: Its name.
        tree: Its syntax tree.
        place: Where the template goes.
        own: Whether names that the statement itself binds count too.
    """
    names = set(place.names)
    if own:
        siblings, index = place.siblings(tree)
        names |= _binds(siblings[index])
    found = {word: word.lower() for word in ("MODEL", "OPTIMIZER", "LOSS", "BATCH", "STEP") if word.lower() in names}
    if place.method and script.startswith("lightning"):
        found |= {"MODEL": "self.model"} | ({} if "OPTIMIZER" in found else {"OPTIMIZER": "self.trainer.optimizers[0]"})
    if place.method and script.startswith("transformers"):
        found = {"OPTIMIZER": "self.optimizer", "STEP": "self.state.global_step", "BATCH": "inputs"} | found
    return {**found, "ADAPTER": "policy" if "'policy'" in ast.unparse(tree) else "default"}


def filled(template: str, known: dict[str, str]) -> str | None:
    """A template in the script's words; None if it has no word for something."""
    wanted = set(re.findall(r"\b(MODEL|OPTIMIZER|LOSS|BATCH|STEP|ADAPTER)\b", template))
    if not wanted <= set(known):
        return None
    return re.sub(r"\b(" + "|".join(wanted) + r")\b", lambda m: known[m.group()], template) if wanted else template


# --- operators ------------------------------------------------------------------------------------


def _of_probe(node: ast.AST) -> bool:
    return any(isinstance(n, ast.Name) and n.id in PROBES for n in ast.walk(node))


def _fixed(node: ast.stmt) -> bool:
    docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return docstring or isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef)


@dataclass(frozen=True, eq=False)
class _Plan:
    """A mutation that was not made yet."""

    operator: str
    kind: str
    place: Place
    change: Callable[[list[ast.stmt], int], object]
    when: str = "always"
    where: str = ""

    def made(self, script: str, tree: ast.Module) -> Mutant | None:
        """The changed script; None if it is no Python, or the same."""
        changed = copy.deepcopy(tree)
        siblings, index = self.place.siblings(changed)
        line, text = siblings[index].lineno, self.where + ast.unparse(siblings[index]).splitlines()[0]
        self.change(siblings, index)
        try:
            source = ast.unparse(ast.fix_missing_locations(changed))
            compile(source, script, "exec")
        except SyntaxError:
            return None
        if source == ast.unparse(tree):
            return None
        return Mutant(script, self.operator, self.kind, line, text, source, self.when)


def plans(script: str, tree: ast.Module) -> list[_Plan]:
    """Everything that can be done to one script by one change."""
    found: list[_Plan] = []

    def add(*parts: Any) -> None:
        found.append(_Plan(*parts))

    for place, node in places(tree):
        if not _fixed(node) and not _of_probe(node):
            _moves(add, place, node, tree)
        if not _fixed(node):
            _wraps(add, script, tree, place, node)
        _inserts(add, script, tree, place, node)
        _expressions(add, script, tree, place, node)
    return found


def _moves(add: Callable[..., None], place: Place, node: ast.stmt, tree: ast.Module) -> None:
    def delete(siblings: list[ast.stmt], index: int) -> None:
        siblings[index] = ast.Pass()

    def double(siblings: list[ast.stmt], index: int) -> None:
        siblings.insert(index, copy.deepcopy(siblings[index]))

    def swap(siblings: list[ast.stmt], index: int) -> None:
        siblings[index], siblings[index + 1] = siblings[index + 1], siblings[index]

    add("delete", "delete", place, delete)
    add("double", "double", place, double)
    siblings, index = place.siblings(tree)
    if index + 1 < len(siblings) and not _fixed(siblings[index + 1]) and not _of_probe(siblings[index + 1]):
        add("swap", "swap", place, swap)


def _wraps(add: Callable[..., None], script: str, tree: ast.Module, place: Place, node: ast.stmt) -> None:
    known = words(script, tree, place, own=False)
    for kind, template in AROUND.items():
        if (text := filled(template, known)) is None or (kind.startswith("twice") and _of_probe(node)):
            continue

        def wrap(siblings: list[ast.stmt], index: int, text: str = text) -> None:
            wrapper = ast.parse(text).body[0]
            wrapper.body = [siblings[index]]  # type: ignore[attr-defined]
            siblings[index] = wrapper

        add("wrap", kind, place, wrap)


def _inserts(add: Callable[..., None], script: str, tree: ast.Module, place: Place, node: ast.stmt) -> None:
    """After this statement, and before it where it is the first of a loop or of a function."""
    over = isinstance(node, ast.With) and _of_probe(node)  # training is, after it
    if not over and not isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef | ast.Return):
        _insert_at(add, words(script, tree, place, own=True), place, 1)
    if place.way[-1] == ("body", 0) and len(place.way) > 1 and not isinstance(node, ast.FunctionDef):
        _insert_at(add, words(script, tree, place, own=False), place, 0)


def _insert_at(add: Callable[..., None], known: dict[str, str], place: Place, offset: int) -> None:
    for kind, template in INSERTED.items():
        if (text := filled(template, known)) is None:
            continue
        versions = {"always": text}
        if "STEP" in known and "STEP" not in template:
            indented = "\n".join("    " + line for line in text.splitlines())
            versions["once"] = f"if {known['STEP']} == {LATER}:\n{indented}"
        for when, version in versions.items():

            def insert(siblings: list[ast.stmt], index: int, version: str = version) -> None:
                siblings[index + offset : index + offset] = ast.parse(version).body

            add("insert", kind, place, insert, when, "after " if offset else "before ")


def _expressions(add: Callable[..., None], script: str, tree: ast.Module, place: Place, node: ast.stmt) -> None:
    """Calls, constants and arguments of one statement, without those of statements inside it."""
    if isinstance(node, ast.Import | ast.ImportFrom) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    ):
        return
    known = words(script, tree, place, own=False)
    strings = sorted(
        {
            n.value
            for n in ast.walk(tree)
            if isinstance(n, ast.Constant) and isinstance(n.value, str) and len(n.value) < 20
        }
    )
    for number, inner in enumerate(_own(node)):
        for kind, label, change in itertools.chain(
            _constants(inner, strings),
            _arguments(inner),
            _conditions(inner),
            _calls(inner, known, "base" in place.names),
        ):

            def apply(
                siblings: list[ast.stmt], index: int, number: int = number, change: Callable[[ast.AST], None] = change
            ) -> None:
                change(list(_own(siblings[index]))[number])

            add(kind, label, place, apply)


def _own(node: ast.AST) -> Iterator[ast.AST]:
    """The expressions of a statement, in order; what is inside the probe's call is not touched."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler) or (isinstance(child, ast.Call) and _of_probe(child.func)):
            continue
        if isinstance(child, ast.expr | ast.keyword | ast.withitem | ast.comprehension):
            yield child
        yield from _own(child)


Change = tuple[str, str, Callable[[ast.AST], None]]


def _constants(node: ast.AST, strings: list[str]) -> Iterator[Change]:
    if not isinstance(node, ast.Constant):
        return
    value = node.value
    others: list[object] = []
    if isinstance(value, bool):
        others = [not value]
    elif isinstance(value, int):
        others = [0, 1, value + 1, value * 2]
    elif isinstance(value, float):
        others = [0.0, value / 10, value * 10, value * 1000, -value]
    elif isinstance(value, str) and value in strings:
        place = strings.index(value)
        others = [strings[place - 1], strings[(place + 1) % len(strings)]]
    for other in others:
        if other != value or type(other) is not type(value):

            def change(found: ast.AST, other: object = other) -> None:
                found.value = other  # type: ignore[attr-defined]

            yield "constant", f"{value!r} -> {other!r}", change


def _arguments(node: ast.AST) -> Iterator[Change]:
    if isinstance(node, ast.Call):
        for index, keyword in enumerate(node.keywords):

            def drop(found: ast.AST, index: int = index) -> None:
                del found.keywords[index]  # type: ignore[attr-defined]

            yield "constant", f"without {keyword.arg or '**'}", drop


def _conditions(node: ast.AST) -> Iterator[Change]:
    if isinstance(node, ast.Compare):

        def negate(found: ast.AST) -> None:
            opposite = {ast.Eq: ast.NotEq, ast.Lt: ast.GtE, ast.NotEq: ast.Eq, ast.Gt: ast.LtE, ast.In: ast.NotIn}
            found.ops[0] = opposite.get(type(found.ops[0]), ast.NotEq)()  # type: ignore[attr-defined]

        yield "constant", "negated", negate


def _calls(node: ast.AST, known: dict[str, str], base: bool) -> Iterator[Change]:
    """Another module is called, or asked for its parameters."""
    if not isinstance(node, ast.Call) or "MODEL" not in known:
        return
    called = ast.unparse(node.func)
    of_parameters = [f"{known['MODEL']}.{name}" for name in ("parameters", "named_parameters", "generate")]
    if called != known["MODEL"] and called not in of_parameters:
        return
    for template in OTHER_MODULES:
        text = filled(template, known)
        if text is None or (text == "base" and not base):
            continue

        def change(found: ast.AST, text: str = text) -> None:
            other = ast.parse(text, mode="eval").body
            if ast.unparse(found.func) == known["MODEL"]:  # type: ignore[attr-defined]
                found.func = other  # type: ignore[attr-defined]
            else:
                found.func.value = other  # type: ignore[attr-defined]

        yield "other module", text, change


# --- sampling -------------------------------------------------------------------------------------

# How many of each kind in one round over a script.
SHARES = {"insert": 5, "wrap": 2, "constant": 2, "delete": 1, "double": 1, "swap": 1, "other module": 1}


def sample(scripts: dict[str, str], number: int, seed: int) -> list[Mutant]:
    """The first ``number`` mutants of an order that the seed fixes: all scripts and all kinds in turn.

    Args:
        scripts: Name to source.
        number: How many; all if there are fewer.
        seed: Of the order.
    """
    turns = [_order(name, source, f"{seed} {name}") for name, source in sorted(scripts.items())]
    mixed = itertools.chain.from_iterable(itertools.zip_longest(*turns))
    return list(itertools.islice((m for m in mixed if m is not None), number))


def _order(script: str, source: str, seed: str) -> Iterator[Mutant]:
    """All mutants of one script, each once, the kinds in turn."""
    tree = ast.parse(source)
    found = plans(script, tree)
    chance = random.Random(seed)
    groups: dict[str, Iterator[_Plan]] = {}
    for operator in SHARES:
        mine = [plan for plan in found if plan.operator == operator]
        chance.shuffle(mine)
        groups[operator] = _by_kind(mine) if operator in ("insert", "wrap") else iter(mine)
    left = [name for name, share in SHARES.items() for _ in range(share)]
    made: set[str] = set()
    while left:
        chance.shuffle(left)
        for name in list(left):
            plan = next(groups[name], None)
            if plan is None:
                left = [other for other in left if other != name]
                continue
            mutant = plan.made(script, tree)
            if mutant is not None and mutant.source not in made:
                made.add(mutant.source)
                yield mutant


def _by_kind(found: list[_Plan]) -> Iterator[_Plan]:
    """One of each kind in turn."""
    kinds: dict[str, list[_Plan]] = {}
    for plan in found:
        kinds.setdefault(plan.kind, []).append(plan)
    turns = itertools.zip_longest(*kinds.values())
    return (plan for turn in turns for plan in turn if plan is not None)
