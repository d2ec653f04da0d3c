"""Gradients of every layer as a backward pass produces them: handed on and dropped, so that one layer's are in memory
at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mpqsearch.core import LayerTable
from mpqsearch.profile.inputs import Watcher, channel_axis
from mpqsearch.quant import rows_of

Sink = Callable[[str, Tensor, Tensor, Tensor], Any]
"""Called with a layer, ``d/dW`` as rows ``[C, D]``, ``d/db`` ``[C]`` (as if it had a bias) and ``sum (d/dy)**2``
``[C]``, all float32."""


class GradientTap(Watcher):
    """Context manager: inside it `backward` gives the gradients of all layers, layer by layer, to a sink.

    Weights require gradients only inside; a layer that ran more than once gives the sums over its calls. With gradient
    checkpointing the outputs of layers are not kept either: what stays alive is what autograd itself saves.
    """

    def __init__(self, module: nn.Module, table: LayerTable) -> None:
        super().__init__()
        self._modules = {la.name: module.get_submodule(la.name) for la in table}
        self._table = table
        self._bias: dict[str, Tensor] = {}
        self._square: dict[str, Tensor] = {}
        self._sink: Sink | None = None

    def _attach(self) -> Iterator[Any]:
        for name, module in self._modules.items():
            weight: Any = module.weight
            weight.requires_grad_(True)
            yield module.register_forward_hook(self._on_forward(name))
            yield weight.register_post_accumulate_grad_hook(self._on_weight(name))

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for module in self._modules.values():
            weight: Any = module.weight
            weight.requires_grad_(False)
            weight.grad = None

    def backward(
        self, objective: Tensor, sink: Sink, *, keep_graph: bool = False, inputs: Sequence[Tensor] = ()
    ) -> None:
        """Differentiate a scalar. ``inputs``: leaves that get their ``grad`` as well."""
        self._bias.clear()
        self._square.clear()
        self._sink = sink
        weights: list[Any] = [m.weight for m in self._modules.values()]
        try:
            torch.autograd.backward(objective, retain_graph=keep_graph, inputs=[*inputs, *weights])
        finally:
            self._sink = None

    def _on_forward(self, name: str) -> Any:
        axis = channel_axis(self._modules[name])

        def collect(grad: Tensor) -> None:
            positions = tuple(i for i in range(grad.dim()) if i != grad.dim() + axis)
            grad = grad.detach().float()
            self._bias[name] = self._bias.get(name, 0) + grad.sum(positions)
            self._square[name] = self._square.get(name, 0) + grad.square().sum(positions)

        def tap(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            hooked: Any = output
            if hooked.requires_grad:
                hooked.register_hook(collect)

        return tap

    def _on_weight(self, name: str) -> Any:
        def hand_on(weight: Tensor) -> None:
            grad, weight.grad = weight.grad, None
            if self._sink is not None and grad is not None and name in self._bias:
                self._sink(name, rows_of(grad.float(), self._table[name]), self._bias[name], self._square[name])

        return hand_on


@contextmanager
def checkpointed(module: nn.Module, wanted: bool) -> Iterator[None]:
    """Inside, the blocks of a model that supports it recompute their activations in the backward pass (twice the
    forward time)."""
    model: Any = module
    able = wanted and getattr(model, "_supports_gradient_checkpointing", False) and not model.is_gradient_checkpointing
    if able:
        model.enable_gradient_checkpointing()
    try:
        yield
    finally:
        if able:
            model.disable_gradient_checkpointing()
