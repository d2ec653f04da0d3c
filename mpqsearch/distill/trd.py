"""Time-smoothed relation distillation (MPQ-DM, arXiv 2412.11549), with a gradient.

Features of teacher and student are averaged over a window of consecutive steps. Each position of the averaged map
is compared with every other by cosine, a softmax with a temperature turns each row into a distribution, and the loss is
``KL(teacher || student)``, the mean over rows. The code released with the paper detaches both sides, so its relation
loss is a constant that trains nothing; sums over rows at temperature 1, where 4,096 cosines give an almost uniform
distribution; and forms maps of 4,096 x 4,096. Here positions are pooled first, to at most ``pooled_size**2``.

Memory, for a batch of ``N`` rows (two a sample with guidance), ``C`` channels and ``P <= pooled_size**2`` positions:
either side one map of ``N P P`` numbers, the teacher ``N P C`` numbers a window, and the student the graph of every
forward pass of the window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpqsearch.errors import ConfigError, ModelError, UnknownNameError
from mpqsearch.models.runner import parts_of

EPSILON = 1e-8
"""Added to squared norms, so that an all-zero feature has cosine 0 and a finite gradient."""

_BLOCK_LISTS = (
    "up_blocks",
    "output_blocks",
    "single_transformer_blocks",
    "single_stream_blocks",
    "visual_transformer_blocks",
    "transformer_blocks",
    "blocks",
    "layers",
)
"""Attributes that hold a denoiser's blocks in the order of the forward pass; the last block of the first that exists is
taken."""


def find_feature_module(module: nn.Module) -> str:
    """The module whose output is the last feature map before the output layers: the last up block of a U-Net, the last
    block of a transformer.

    Raises `ModelError` when the model has no list of blocks under a known name.
    """
    blocks: dict[str, str] = {}
    for name, child in module.named_modules():
        key = name.rsplit(".", 1)[-1]
        if not isinstance(child, nn.ModuleList) or not len(child) or key not in _BLOCK_LISTS:
            continue
        # The outermost list of a name: U-Nets hold transformer blocks inside their up blocks, and those are not meant.
        if key not in blocks or name.count(".") + 1 < blocks[key].count("."):
            blocks[key] = f"{name}.{len(child) - 1}"
    if blocks:
        depth = min(name.count(".") for name in blocks.values())
        return next(blocks[key] for key in _BLOCK_LISTS if key in blocks and blocks[key].count(".") == depth)
    raise ModelError(
        f"{type(module).__name__} has none of the block lists {', '.join(_BLOCK_LISTS)}: name the module whose output "
        "is compared "
        "(distill.relation.feature), or set distill.relation.weight to 0."
    )


def pool_positions(features: Tensor, size: int) -> Tensor:
    """Features as positions ``[N, P, C]`` with ``P <= size**2``.

    Maps ``[N, C, H, W]`` are averaged to at most ``size`` rows and columns. Tokens ``[N, T, C]`` are put on their
    square grid when ``T`` is a square, else averaged along the sequence. Raises `ModelError` for other shapes.
    """
    if features.ndim == 4:
        grid = (min(features.shape[2], size), min(features.shape[3], size))
        pooled = features if grid == tuple(features.shape[2:]) else F.adaptive_avg_pool2d(features, grid)
        return pooled.flatten(2).transpose(1, 2)
    if features.ndim == 3:
        n, tokens, channels = features.shape
        if tokens <= size * size:
            return features
        side = math.isqrt(tokens)
        if side * side == tokens:
            return pool_positions(features.transpose(1, 2).reshape(n, channels, side, side), size)
        return F.adaptive_avg_pool1d(features.transpose(1, 2), size * size).transpose(1, 2)
    raise ModelError(
        "relation distillation compares maps [N, C, H, W] or tokens [N, T, C]; the chosen module gives "
        f"{tuple(features.shape)}. "
        "Name another one (distill.relation.feature)."
    )


def relation_log_probabilities(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """``log softmax(cos(query, key) / temperature)`` over keys: ``[N, P, C]`` and ``[N, K, C]`` give ``[N, P, K]``, in
    float32 or wider."""
    return F.log_softmax(_unit(queries) @ _unit(keys).transpose(1, 2) / temperature, dim=-1)


def relation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``KL(teacher || student)`` between the relations of positions ``[N, P, C]``, the mean over samples and positions.
    The teacher gets no gradient."""
    of_student = relation_log_probabilities(student, student, temperature)
    of_teacher = relation_log_probabilities(teacher.detach(), teacher.detach(), temperature)
    rows = of_student.shape[0] * of_student.shape[1]
    return F.kl_div(of_student, of_teacher, reduction="sum", log_target=True) / rows


def window_relation_loss(students: Sequence[Tensor], teachers: Sequence[Tensor], temperature: float) -> Tensor:
    """`relation_loss` of the means of both sides' positions ``[N, P, C]`` over the steps of a window.

    Raises `ConfigError` when the two sides do not match.
    """
    if students[0].shape != teachers[0].shape:
        raise ConfigError(
            f"the student's positions have the shape {tuple(students[0].shape)}, the teacher's "
            f"{tuple(teachers[0].shape)}: both sides need the same feature module and pooled_size"
        )
    return relation_loss(torch.stack(list(students)).mean(0), torch.stack(list(teachers)).mean(0), temperature)


class FeatureTap:
    """Context manager that keeps the pooled output of one module in each denoiser, every time the module runs.

    ``name`` is that of the module within a denoiser; empty: what `find_feature_module` finds. The hook only reads.
    Positions are pooled at once, so that a full map is never kept for the teacher. Raises `UnknownNameError` when there
    is no module of that name.
    """

    def __init__(self, module: nn.Module, name: str, pooled_size: int) -> None:
        self.pooled_size = pooled_size
        self._modules = [_named_module(part, name) for part in parts_of(module).values()]
        self._handles: list[Any] = []
        self._kept: list[Tensor] = []

    def __enter__(self) -> Self:
        self._handles = [
            m.register_forward_hook(partial(self._keep, name), with_kwargs=True) for name, m in self._modules
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._kept.clear()

    def take(self) -> Tensor:
        """Positions ``[N, P, C]`` since the last call; those of several passes are joined, as in one.

        Raises `ModelError` when the module did not run.
        """
        if not self._kept:
            names = ", ".join(dict.fromkeys(repr(name) for name, _ in self._modules))
            raise ModelError(
                f"the module {names} did not run in the forward pass; name another one (distill.relation.feature)"
            )
        calls, self._kept = self._kept, []
        return calls[0] if len(calls) == 1 else torch.cat(calls)

    def _keep(self, name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = kwargs.get("hidden_states", args[0] if args else None)
        feature = _tensor_of(output, getattr(given, "shape", None), name)
        self._kept.append(_wide(pool_positions(feature, self.pooled_size)))


def _named_module(denoiser: nn.Module, name: str) -> tuple[str, nn.Module]:
    modules = dict(denoiser.named_modules())
    name = name or find_feature_module(denoiser)
    if name not in modules:
        raise UnknownNameError("feature module", name, [n for n in modules if n], "(distill.relation.feature)")
    return name, modules[name]


def _tensor_of(output: Any, given: torch.Size | None, name: str) -> Tensor:
    """The feature among what a block returns: joint blocks return text and image tokens, of which the image has the
    shape that was ``given``; else the largest."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else ()
    tensors = [v for v in values if isinstance(v, Tensor)]
    if not tensors:
        raise ModelError(
            f"the module {name!r} returns {type(output).__name__}, which holds no tensor; name another one "
            "(distill.relation.feature)"
        )
    return next((t for t in tensors if t.shape == given), max(tensors, key=Tensor.numel))


def _unit(x: Tensor) -> Tensor:
    x = _wide(x)
    return x * (x.square().sum(-1, keepdim=True) + EPSILON).rsqrt()


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
