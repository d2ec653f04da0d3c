"""MPQ-DM's allocation in four forms.

Source: MPQ-DM (Feng et al., AAAI 2025, arXiv:2412.11549), its section on outlier-driven mixed quantization, and its
released code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mpqsearch.core import FULL_PRECISION, BitMap
from mpqsearch.core.formats import WIDTHS
from mpqsearch.errors import UnknownNameError
from mpqsearch.methods.baselines import uniform

if TYPE_CHECKING:
    from mpqsearch.methods.task import Task

Floats = NDArray[np.float64]

OVER_SIZE = (
    "the channel tags of mixed layers and smoothing factors come on top of the uniform size: OMQ has no means to pay "
    "for them"
)
PROMOTED = "a bit more for a tenth of the channels, channel tags and smoothing factors come on top of the uniform size"


def omq(task: Task) -> tuple[BitMap, str]:
    """MPQ-DM's search with the method's own quantizer, priced by the output error with full-precision inputs."""
    return _split_search(task, f"{_channel_error(task)}/{task.method.format_name}", range(6))


def omq_paper(task: Task) -> tuple[BitMap, str]:
    """OMQ of the paper: in each layer as many channels one bit up as one bit down, in the order of the kurtosis of
    smoothed channels.

    The split, 0 to 50 % of the channels in steps of a tenth, is the one with the least output error of the layer,
    measured with the deployed quantizer and, when the method quantizes activations, with quantized (static) inputs.
    """
    act, name = task.method.act_bits, task.method.format_name
    plain = act == FULL_PRECISION
    array = f"{_channel_error(task)}/{name}" if plain else f"quantized_input_error/{name}@a{act}"
    return _split_search(task, array, range(6))


def omq_released(task: Task) -> tuple[BitMap, str]:
    """OMQ of the released code: splits of 0 and 10 % only, searched with min-max ranges (which are not deployed) and
    full-precision inputs."""
    return _split_search(task, f"{_channel_error(task)}/{task.method.format_name}+minmax", range(2))


def omq_plus(task: Task) -> tuple[BitMap, str]:
    """Promotion only (the "+" of MPQ-DM): the top tenth of each layer's channels one bit up and nobody down, over the
    uniform size."""
    base, _ = uniform(task.without_smoothing())
    widths: dict[str, Any] = {}
    for names in task.programs.rules.units():
        n = int(base.weights[names[0]])
        counts = {task.programs.table[name].n_channels for name in names}
        if n >= max(WIDTHS) or len(counts) > 1 or _bounded(task, names, n, n + 1):
            widths |= {name: np.uint8(n) for name in names}
            continue
        promoted = np.full(counts.pop(), n, dtype=np.uint8)
        promoted[_order(task, names)[: len(promoted) // 10]] = n + 1
        widths |= dict.fromkeys(names, promoted)
    return task.map_of(widths), PROMOTED


def _channel_error(task: Task) -> str:
    """The errors that split the channels of a layer: those of its output, or what there is."""
    measured = f"output_error/{task.method.format_name}" in task.programs.profile.arrays
    return "output_error" if measured else "weight_error"


def _bounded(task: Task, names: tuple[str, ...], low: int, high: int) -> bool:
    """Whether bounds of the user's forbid one of two widths; the widths that the policy searches do not count."""
    policy = task.programs.policy
    return bool(policy.min_bits or policy.max_bits) and not all(
        task.programs.rules.allows(names[0], bits) for bits in (low, high)
    )


def _split_search(task: Task, array: str, groups: range) -> tuple[BitMap, str]:
    profile, table = task.programs.profile, task.programs.table
    _require(task, array)
    base, _ = uniform(task.without_smoothing())
    widths: dict[str, Any] = {}
    error = profile.need(array, "OMQ")
    column = {b: j for j, b in enumerate(profile.widths)}
    for names in task.programs.rules.units():
        n = int(base.weights[names[0]])
        one_width = len({table[name].n_channels for name in names}) > 1 or _bounded(task, names, n - 1, n + 1)
        if n - 1 not in column or n + 1 not in column or one_width:
            widths |= dict.fromkeys(names, np.uint8(n))
            continue
        errors = np.stack([error[profile.rows(name)] for name in names]).sum(0, dtype=np.float64)
        down, keep, up = (errors[:, column[b]] for b in (n - 1, n, n + 1))
        widths |= dict.fromkeys(names, _best_split(_order(task, names), n, down, keep, up, groups))
    return task.map_of(widths), OVER_SIZE


def _require(task: Task, array: str) -> None:
    arrays = task.programs.profile.arrays
    if array in arrays or not ("@" in array or array.endswith("+minmax")):
        return
    family, _, name = array.partition("/")
    known = [k.partition("/")[2] for k in arrays if k.startswith(f"{family}/")]
    raise UnknownNameError(
        f"{family.replace('_', ' ')} of the format",
        name,
        known,
        f"Set calibration.smooth{' and calibration.activation_bits' if '@' in name else ''} and profile again.",
    )


def _best_split(
    order: NDArray[np.intp], n: int, down: Floats, keep: Floats, up: Floats, groups: range
) -> NDArray[np.uint8]:
    """Promote the head and demote the tail of ``order`` by 0, 10, ..., 50 % of the channels; the split with the least
    error."""
    step = max(1, len(order) // 10)
    least, best = np.inf, np.full(len(order), n, dtype=np.uint8)
    for count in groups:
        k = count * step
        if 2 * k > len(order):
            break
        head, tail = order[:k], order[len(order) - k :]
        total = keep.sum() + (up[head] - keep[head]).sum() + (down[tail] - keep[tail]).sum()
        if total < least:
            least, best = total, np.full(len(order), n, dtype=np.uint8)
            best[head], best[tail] = n + 1, n - 1
    return best


def _order(task: Task, names: tuple[str, ...]) -> NDArray[np.intp]:
    """Channels of a layer (or of layers that share their widths), those to be promoted first: of the highest kurtosis
    once smoothed."""
    profile = task.programs.profile
    kurtosis = profile.need("kurtosis" if profile.weights_only else "kurtosis_smoothed", "OMQ")
    return np.argsort(-np.stack([kurtosis[profile.rows(name)] for name in names]).sum(0), kind="stable")
