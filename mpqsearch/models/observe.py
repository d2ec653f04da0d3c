"""One run of a model, watched: which layers ran, what fed them, and what reached the prediction."""

from __future__ import annotations

import math
import re
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from mpqsearch.models.calls import Call, tensors_in
from mpqsearch.models.hooks import layer_input

SAMPLE, TIME = "<sample>", "<time>"

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

_QKV = re.compile(r"(^|_)(q|k|v|query|key|value)(_proj|_lin(ear)?)?\d*$")
_QKV_GROUP = re.compile(r"(^|_)(q|k|v|query|key|value)(?=_|\d|$)")


@dataclass
class Seen:
    """What a forward pass showed, by layer name.

    ``macs`` of one sample in one call, in the order in which layers run; ``used``: weights that any function took;
    ``joined``: layers fed with a concatenation along their input channels; ``fuse``: group of projections of one input;
    ``takes``: layers fed with the sample itself; ``gives``: layers whose output reaches the prediction through no other
    layer. ``conditional``: layers that do not depend on the sample, but on the time (``time``) or on one vector of
    other conditions (``class``); ``tokens``: those that depend on neither.
    """

    macs: dict[str, int] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    joined: set[str] = field(default_factory=set)
    fuse: dict[str, str] = field(default_factory=dict)
    takes: list[str] = field(default_factory=list)
    gives: frozenset[str] = frozenset()
    conditional: dict[str, str] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)


@torch.no_grad()
def observe(module: nn.Module, layers: dict[str, nn.Module], examples: Sequence[Call]) -> Seen:
    """Run a model on ``examples`` and say what was seen of its ``layers``."""
    observer = _Observer(layers)
    handles = [m.register_forward_hook(observer.hook(n), with_kwargs=True) for n, m in layers.items()]
    try:
        for example in examples:
            observer.run(module, example)
    finally:
        for handle in handles:
            handle.remove()
    seen = observer.seen
    calls = Counter(example.part for example in examples)
    seen.macs = {n: m // (calls[n.partition(".")[0]] or calls[""]) for n, m in seen.macs.items()}
    if "time" not in seen.conditional.values():
        # The time was given as a number, and nothing can be said of what depends on it.
        seen.conditional, seen.tokens = {}, set()
    return seen


class _Watch(TorchFunctionMode):
    """Follows tensors through every torch function: which come from the sample or from a layer, which are
    concatenations."""

    def __init__(self, weights: dict[int, str], seen: Seen) -> None:
        super().__init__()
        self._weights, self._seen = weights, seen
        # Tensor -> names of the layers that it comes from; SAMPLE for the model's input.
        self.origin: Any = WeakIdKeyDictionary()
        self.depends: Any = WeakIdKeyDictionary()  # tensor -> SAMPLE, TIME or both, through whatever layers
        self.joins: Any = WeakIdKeyDictionary()  # concatenation -> its axis and the origins of its parts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` and pass on where its result comes from."""
        out = func(*args, **(kwargs or {}))
        if torch.compiler.is_compiling():
            return out  # flexible attention is compiled as it runs, and the compiler would look in here
        results = list(tensors_in(out))
        if getattr(func, "__name__", "") == "__get__" or not results:
            return out  # a weight's type or size is no use of it
        inputs = list(tensors_in((args, kwargs)))
        names = {self._weights[id(t)] for t in inputs if id(t) in self._weights}
        self._seen.used |= names
        origin = frozenset(names) or frozenset().union(*(self.origin.get(t, frozenset()) for t in inputs))
        depends = frozenset().union(*(self.depends.get(t, frozenset()) for t in inputs))
        for result in results if origin or depends else ():
            self.origin[result] = origin
            self.depends[result] = depends
        if func in (torch.cat, torch.concat, torch.concatenate) and isinstance(out, Tensor):
            axis = (kwargs or {}).get("dim", args[1] if len(args) > 1 else 0)
            parts = [self.origin.get(t, frozenset()) for t in inputs if SAMPLE in self.depends.get(t, ())]
            self.joins[out] = (axis % out.dim(), parts)
        return out

    def joined(self, x: Tensor, axis: int, parent: str) -> bool:
        """True when ``x`` joins along its channels two streams of the sample that both come from outside ``parent``.

        The parts that one block makes of one stream, such as attention beside feed-forward, are no skip connection.
        """
        joined_axis, parts = self.joins.get(x, (None, []))
        outside = [p for p in parts if any(not n.startswith(f"{parent}.") for n in p - {SAMPLE})]
        return joined_axis == axis % x.dim() and len(outside) > 1


class _Observer:
    """Hooks on all layers, and what they saw."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self.seen = Seen()
        self._modules = modules
        self._watch = _Watch({id(m.weight): n for n, m in modules.items()}, self.seen)
        self._siblings: dict[str, list[tuple[Any, str]]] = {}
        self._batch = 1

    def run(self, module: nn.Module, call: Call) -> None:
        """One call of the model."""
        watch, self._batch = self._watch, call.batch
        watch.origin[call.sample] = watch.depends[call.sample] = frozenset({SAMPLE})
        for time in call.times(module):
            watch.depends[time] = frozenset({TIME})
        with watch:
            out = call.replay(module)
            self.seen.gives |= watch.origin.get(out, frozenset()) & set(self._modules)
        self._siblings.clear()

    def hook(self, name: str) -> Any:
        """The forward hook of one layer."""
        channels = -1 if isinstance(self._modules[name], nn.Linear) else 1
        # Linear and convolution: weights behind one output, times outputs; a transposed one spreads each input instead.
        transposed = isinstance(self._modules[name], TRANSPOSED)
        weight: Any = self._modules[name].weight
        fan = math.prod(weight.shape[1:])
        parent = name.rpartition(".")[0]

        def look(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            x, seen = layer_input(args, kwargs), self.seen
            seen.macs[name] = seen.macs.get(name, 0) + (x if transposed else output).numel() * fan // self._batch
            if self._watch.joined(x, channels, parent):
                seen.joined.add(name)
            if SAMPLE in self._watch.origin.get(x, ()) and name not in seen.takes:
                seen.takes.append(name)
            self._look_at_conditions(name, x)
            self._look_for_siblings(name, x)

        return look

    def _look_at_conditions(self, name: str, x: Tensor) -> None:
        depends = self._watch.depends.get(x, frozenset())
        if TIME in depends and SAMPLE not in depends:
            self.seen.conditional[name] = "time"
        elif not depends and x.numel() <= self._batch * x.shape[-1]:
            self.seen.conditional[name] = "class"
        elif not depends:
            self.seen.tokens.add(name)

    def _look_for_siblings(self, name: str, x: Tensor) -> None:
        """Projections of one input within one parent, which consumers may fuse."""
        parent, _, short = name.rpartition(".")
        if not _QKV.search(short) or name in self.seen.fuse:
            return
        group = self._siblings.setdefault(parent, [])
        mates = [other for ref, other in group if ref() is x]
        group.append((weakref.ref(x), name))
        if mates:
            for mate in (mates[0], name):
                self.seen.fuse[mate] = f"{parent}.[{_QKV_GROUP.sub('', mates[0].rpartition('.')[2])}]"
