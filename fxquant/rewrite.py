"""Rewriting: passes over a captured graph, and the history of what they did.

`rewrite(graph, plan, passes) -> History` runs the passes in order, checks the graph after each, and keeps what it
looked like. A pass is a frozen dataclass: its fields are its options, and its `repr` names it in histories.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from fxquant.errors import FxquantError, RewriteError
from fxquant.histories import Fired as Fired
from fxquant.histories import History as History
from fxquant.histories import Miss as Miss
from fxquant.histories import Step as Step
from fxquant.inductor import FakeTensor
from fxquant.legality import violations
from fxquant.listing import listing, value
from fxquant.patterns import Match, Pattern, match
from fxquant.plans import Plan


@dataclass(frozen=True)
class Pass:
    """One rewrite of the graph. Subclass it as a frozen dataclass.

    A local pass gives `pattern`, `rewrite` and, where it must stay out of some places, `check`. A pass that looks at
    more than one place at a time overrides `run`.
    """

    def pattern(self) -> Pattern:
        """What the pass looks for."""
        raise NotImplementedError(f"{type(self).__name__} needs `pattern` and `rewrite`, or `run`")

    def check(self, edit: Editor, match: Match) -> Miss | None:
        """Why this match must stay as it is; None to rewrite it."""
        return None

    def rewrite(self, edit: Editor, match: Match) -> fx.Node:
        """Make the nodes that replace the match, through `edit`, and return the one that stands for its root."""
        raise NotImplementedError(f"{type(self).__name__} needs `pattern` and `rewrite`, or `run`")

    def run(self, edit: Editor) -> None:
        """Rewrite the whole graph; the default does so match by match."""
        pattern = self.pattern()
        for node in edit.nodes():
            found = match(pattern, node, edit.gm)
            if found is None:
                continue
            miss = self.check(edit, found)
            if miss is not None:
                edit.miss(miss.reason, miss.node or node.name)
                continue
            with edit.before(node):
                edit.replace(found.root, self.rewrite(edit, found))


@dataclass
class Editor:
    """The one door through which passes change a graph, so that every change is checked and recorded."""

    gm: fx.GraphModule
    plan: Plan | None = None
    fired: list[Fired] = field(default_factory=list)
    missed: list[Miss] = field(default_factory=list)
    modules: dict[str, nn.Module] = field(default_factory=dict)
    """Modules that passes put in place of others, by FQN; they go into the user's model as well."""
    _erased: set[fx.Node] = field(default_factory=set)
    _at: fx.Node | None = None
    _added: list[str] = field(default_factory=list)

    def nodes(self) -> Iterator[fx.Node]:
        """The nodes in order; those that are erased meanwhile are left out."""
        for node in list(self.gm.graph.nodes):
            if node not in self._erased:
                yield node

    def module(self, fqn: str) -> nn.Module:
        """The submodule of this name."""
        return self.gm.get_submodule(fqn)

    def set_module(self, fqn: str, module: nn.Module) -> None:
        """Put `module` in the place of the submodule `fqn`, in the graph and, when it is installed, in the model."""
        parent, _, leaf = fqn.rpartition(".")
        setattr(self.gm.get_submodule(parent), leaf, module)
        self.modules[fqn] = module

    @contextlib.contextmanager
    def before(self, node: fx.Node) -> Iterator[None]:
        """Insert what is made inside the `with` block before `node`."""
        previous, self._at = self._at, node
        try:
            with self.gm.graph.inserting_before(node):
                yield
        finally:
            self._at = previous

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Add a call of a function or an op; its shape and dtype are inferred on fake tensors.

        Raises:
            RewriteError: when the call is not valid for these arguments.
        """
        node = self.gm.graph.call_function(target, args, kwargs)
        return self._with_value(node, _infer(node, target, args, kwargs))

    def call_with_value(self, fake: Any, target: Any, *args: Any) -> fx.Node:
        """`call` where the caller knows shape and dtype, and what surrounds the call (autocast) could change them."""
        return self._with_value(self.gm.graph.call_function(target, args), fake)

    def attr(self, target: str) -> fx.Node:
        """Add a read of a parameter or buffer by its FQN."""
        node = self.gm.graph.get_attr(target)
        owner, _, leaf = target.rpartition(".")
        tensor = getattr(self.gm.get_submodule(owner), leaf)
        node.meta["val"] = tensor.detach().to("meta")
        self._describe(node)
        return node

    def replace(self, old: fx.Node, new: fx.Node, note: str = "") -> None:
        """Let every reader of `old` read `new`, and drop what nobody reads any more.

        Raises:
            RewriteError: when `new` has another shape or dtype.
        """
        self.replace_all({old: new}, note)

    def replace_all(self, pairs: dict[fx.Node, fx.Node], note: str = "") -> None:
        """`replace` for several nodes that one rewrite serves."""
        for old, new in pairs.items():
            if old is new:
                continue
            difference = _difference(value(old), value(new))
            if difference:
                raise RewriteError(f"{new.name} cannot stand for {old.name}: {difference}")
            old.replace_all_uses_with(new)
        removed = tuple(old.name for old in pairs)
        for old in reversed(list(pairs)):
            self._drop(old)
        self.fired.append(Fired(removed, tuple(self._added), note))
        self._added = []

    def remove(self, node: fx.Node, note: str = "") -> None:
        """Drop a node that nobody reads, such as an assertion."""
        name = node.name
        self._drop(node)
        self.fired.append(Fired((name,), (), note))

    def miss(self, reason: str, node: str) -> None:
        """Record why a place was left alone."""
        self.missed.append(Miss(reason, node))

    def _with_value(self, node: fx.Node, fake: Any) -> fx.Node:
        self._describe(node)
        if fake is not None:
            node.meta["val"] = node.meta["example_value"] = fake
        return node

    def _describe(self, node: fx.Node) -> None:
        self._added.append(node.name)
        if self._at is not None:
            for key in ("nn_module_stack", "stack_trace"):
                if key in self._at.meta:
                    node.meta[key] = self._at.meta[key]

    def _drop(self, node: fx.Node) -> None:
        if node in self._erased or node.users or node.op in ("placeholder", "output"):
            return
        inputs = list(node.all_input_nodes)
        self.gm.graph.erase_node(node)
        self._erased.add(node)
        for source in inputs:
            if source.op == "get_attr" or not source.is_impure():
                self._drop(source)


def rewrite(gm: fx.GraphModule, plan: Plan | None = None, passes: Sequence[Pass] = ()) -> History:
    """Run `passes` over the graph of `gm`, in place.

    Args:
        gm: a captured graph (`fxquant.capture`), or the graph that a `torch.compile` backend is given.
        plan: what becomes of each linear; passes that quantize need it.
        passes: run in this order.

    Returns:
        The graph before, and after each pass what fired and what missed.

    Raises:
        RewriteError: when a pass fails or leaves the graph illegal; names the pass and those that ran before it.
    """
    return run_passes(gm, plan, passes, {})


def run_passes(gm: fx.GraphModule, plan: Plan | None, passes: Sequence[Pass], modules: dict[str, nn.Module]) -> History:
    """`rewrite`, which also collects in `modules` the modules that passes put in place of others."""
    before = listing(gm)
    steps: list[Step] = []
    for one in passes:
        started = time.perf_counter()
        edit = Editor(gm, plan)
        try:
            one.run(edit)
            problems = violations(gm)
        except Exception as error:
            if isinstance(error, FxquantError):
                raise RewriteError(f"{_where(one, steps)}: {error}") from error
            raise RewriteError(f"{_where(one, steps)}: {type(error).__name__}: {error}") from error
        if problems:
            raise RewriteError(f"{_where(one, steps)} left the graph illegal:\n  " + "\n  ".join(problems[:5]))
        gm.recompile()
        modules.update(edit.modules)
        seconds = time.perf_counter() - started
        steps.append(Step(repr(one), tuple(edit.fired), tuple(edit.missed), listing(gm), seconds))
    return History(before, tuple(steps))


def _where(one: Pass, steps: Sequence[Step]) -> str:
    return f"pass {one!r}" + (f", after {', '.join(s.name for s in steps)}" if steps else "")


def _difference(old: Any, new: Any) -> str | None:
    """What differs between two fake values, where both are known tensors."""
    if not (isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor)):
        return None
    if old.dtype != new.dtype:
        return f"its dtype is {new.dtype}, not {old.dtype}"
    if len(old.shape) != len(new.shape):
        return f"its shape is {tuple(new.shape)}, not {tuple(old.shape)}"
    # Only sizes that are plain numbers are compared: comparing symbols would add guards.
    sizes = zip(old.shape, new.shape, strict=True)
    if any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in sizes):
        return f"its shape is {tuple(new.shape)}, not {tuple(old.shape)}"
    return None


def _infer(node: fx.Node, target: Any, args: Any, kwargs: Any) -> Any:
    """The value of a call on the fake values of its arguments; None where one of them is not known."""
    values = [value(n) for n in node.all_input_nodes]
    fakes = [
        v for one in values for v in (one if isinstance(one, (list, tuple)) else [one]) if isinstance(v, FakeTensor)
    ]
    if not fakes or any(v is None for v in values):
        return None
    mode = fakes[0].fake_mode

    def fake_of(n: fx.Node) -> Any:
        v = value(n)
        if isinstance(v, torch.Tensor) and not isinstance(v, FakeTensor):
            return mode.from_tensor(torch.empty_like(v, device=fakes[0].device))
        return v

    fake_args, fake_kwargs = (fx.map_arg(a, fake_of) for a in (args, kwargs))
    try:
        with mode, torch.no_grad():
            return target(*fake_args, **fake_kwargs)
    except Exception as error:
        name = re.sub(r"\s+", " ", str(error))
        raise RewriteError(f"{node.name} cannot be called with these arguments: {name}") from error
