"""The passes of ``passes`` and the search of ``closing`` as compiled loops. Imported only through ``backend``.

The inner loops run over items with the choice fixed, on one-dimensional slices of a column: only so does the compiler
read a Fortran-ordered table in vector registers. The running minimizer is carried as a float64, so that every select of
the loop has one lane width. Every function here is ordinary Python that numba compiles (``cache=True``: the second
process loads machine code).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from mpqsearch.allocate import passes

BLOCK = 1024
"""Items per block: the buffers of a block stay in the first-level cache."""


def _jit(function: Callable[..., Any]) -> Any:
    options = {"error_model": "numpy", "nogil": True}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no folder that can hold the cache
        return numba.njit(**options)(function)


def _bracket(loss: Any, cost: Any, low: float, high: float) -> Any:
    n, k = loss.shape
    choice = np.empty(n, dtype=np.int32)
    unsettled = np.empty(n, dtype=np.int64)
    count = 0
    cost_low, cost_high, settled_cost = 0, 0, 0
    total, carry = 0.0, 0.0
    best_low, best_high = np.empty(BLOCK), np.empty(BLOCK)
    at_low, at_high = np.empty(BLOCK), np.empty(BLOCK)
    for start in range(0, n, BLOCK):
        size = min(BLOCK, n - start)
        best_low[:], best_high[:], at_low[:], at_high[:] = np.inf, np.inf, 0.0, 0.0
        for j in range(k):
            column = float(j)
            losses, costs = loss[start : start + size, j], cost[start : start + size, j]
            for i in range(size):
                here, spent = float(losses[i]), float(costs[i])
                value = here + low * spent
                better = value < best_low[i]
                best_low[i] = value if better else best_low[i]
                at_low[i] = column if better else at_low[i]
                value = here + high * spent
                better = value < best_high[i]
                best_high[i] = value if better else best_high[i]
                at_high[i] = column if better else at_high[i]
        block_loss = 0.0
        for i in range(size):
            first, second = int(at_low[i]), int(at_high[i])
            spent_high = cost[start + i, second]
            cost_high += spent_high
            choice[start + i] = second
            if first == second:
                cost_low += spent_high
                settled_cost += spent_high
                block_loss += float(loss[start + i, second])
            else:
                cost_low += cost[start + i, first]
                unsettled[count] = start + i
                count += 1
        # Neumaier's compensated sum over the blocks
        raised = total + block_loss
        carry += (total - raised) + block_loss if abs(total) >= abs(block_loss) else (block_loss - raised) + total
        total = raised
    return choice, unsettled[:count].copy(), cost_low, cost_high, settled_cost, total + carry


def _moves(loss: Any, cost: Any, base: Any, rate: float, threshold: float) -> Any:
    n, k = loss.shape
    item, to = np.empty(4096, dtype=np.int64), np.empty(4096, dtype=np.int32)
    penalty, size = np.empty(4096), np.empty(4096, dtype=np.int64)
    count = 0
    total, carry, used = 0.0, 0.0, 0
    best, at, second = np.empty(BLOCK), np.empty(BLOCK), np.empty(BLOCK)
    for start in range(0, n, BLOCK):
        length = min(BLOCK, n - start)
        best[:], at[:], second[:] = np.inf, 0.0, np.inf
        for j in range(k):
            column = float(j)
            losses, costs = loss[start : start + length, j], cost[start : start + length, j]
            for i in range(length):
                value = float(losses[i]) + rate * float(costs[i])
                better = value < best[i]
                loser = best[i] if better else value
                second[i] = min(second[i], loser)
                best[i] = value if better else best[i]
                at[i] = column if better else at[i]
        block_loss = 0.0
        for i in range(length):
            row, chosen = start + i, int(at[i])
            block_loss += float(loss[row, chosen])
            used += cost[row, chosen]
            stay = base[row]
            if chosen == stay and not second[i] - best[i] <= threshold:
                continue
            here = float(loss[row, stay]) + rate * float(cost[row, stay])
            for j in range(k):
                change = np.int64(cost[row, j]) - np.int64(cost[row, stay])
                extra = max(float(loss[row, j]) + rate * float(cost[row, j]) - here, 0.0)
                if change == 0 or not extra <= threshold:
                    continue
                if count == item.size:
                    item, to = np.concatenate((item, item)), np.concatenate((to, to))
                    penalty, size = np.concatenate((penalty, penalty)), np.concatenate((size, size))
                item[count], to[count], penalty[count], size[count] = row, j, extra, change
                count += 1
        raised = total + block_loss
        carry += (total - raised) + block_loss if abs(total) >= abs(block_loss) else (block_loss - raised) + total
        total = raised
    return item[:count], to[:count], penalty[:count], size[:count], total + carry, used


def _totals(loss: Any, cost: Any, choice: Any) -> Any:
    n = loss.shape[0]
    total, carry, used = 0.0, 0.0, 0
    for start in range(0, n, BLOCK):
        block_loss = 0.0
        for row in range(start, min(start + BLOCK, n)):
            chosen = choice[row]
            block_loss += float(loss[row, chosen])
            used += cost[row, chosen]
        raised = total + block_loss
        carry += (total - raised) + block_loss if abs(total) >= abs(block_loss) else (block_loss - raised) + total
        total = raised
    return total + carry, used


def _cheapest(loss: Any, cost: Any) -> Any:
    n, k = loss.shape
    choice = np.empty(n, dtype=np.int32)
    for row in range(n):
        chosen = -1
        for j in range(k):
            if loss[row, j] == np.inf:
                continue
            cheaper = chosen < 0 or cost[row, j] < cost[row, chosen]
            if cheaper or (cost[row, j] == cost[row, chosen] and loss[row, j] < loss[row, chosen]):
                chosen = j
        choice[row] = chosen
    return choice


def _hulls(loss: Any, cost: Any, base: Any, low: float) -> Any:
    n, k = loss.shape
    room = n * (k - 1)
    item, to = np.empty(room, dtype=np.int64), np.empty(room, dtype=np.int32)
    size, gain, rate = np.empty(room, dtype=np.int64), np.empty(room), np.empty(room)
    count = 0
    for row in range(n):
        at, last = base[row], np.inf
        while True:
            steepest, following, step = -np.inf, -1, np.int64(0)
            for j in range(k):
                wider = np.int64(cost[row, j]) - np.int64(cost[row, at])
                if wider <= 0:
                    continue
                slope = (float(loss[row, at]) - float(loss[row, j])) / wider
                if slope > steepest or (slope == steepest and wider > step):
                    steepest, following, step = slope, j, wider
            if following < 0 or steepest < low or steepest == -np.inf or (steepest <= 0.0 <= low):
                break
            last = min(last, steepest)
            item[count], to[count], size[count], rate[count] = row, following, step, last
            gain[count] = float(loss[row, at]) - float(loss[row, following])
            count += 1
            at = following
    return item[:count], to[:count], size[:count], gain[:count], rate[:count]


def _advance(
    move_start: Any,
    move_penalty: Any,
    move_size: Any,
    up: Any,
    down: Any,
    group: int,
    size: Any,
    penalty: Any,
    state: Any,
    parents: Any,
    moved: Any,
    n_history: int,
    slack: int,
    rate: float,
    exact_fill: bool,
    offset: float,
    excess: float,
    tolerance: float,
    best_state: int,
    max_states: int,
    work: int,
) -> Any:
    """Process groups until the states die, the groups end, the list is too long or ``work`` states were made."""
    n_groups = move_start.size - 1
    count = size.size
    price = 0.0 if exact_fill else rate
    while group < n_groups and count > 0 and count <= max_states and work > 0:
        fill = up[group] if exact_fill else min(rate, up[group])
        kept = 0
        for s in range(count):
            free = slack - size[s]
            rest = 0.0
            if free > 0:
                rest = free * fill
            elif free < 0:
                rest = -free * down[group]
            if penalty[s] + rest + offset < excess - tolerance:
                size[kept], penalty[kept], state[kept] = size[s], penalty[s], state[s]
                kept += 1
        count = kept
        if count == 0:
            break
        first, last = move_start[group], move_start[group + 1]
        merged_size, merged_penalty = size[:count].copy(), penalty[:count].copy()
        merged_state, merged_move = state[:count].copy(), np.full(count, -1, dtype=np.int64)
        for move in range(first, last):
            room = merged_size.size + count
            out_size, out_penalty = np.empty(room, dtype=np.int64), np.empty(room)
            out_state, out_move = np.empty(room, dtype=np.int64), np.empty(room, dtype=np.int64)
            a, b, made, least = 0, 0, 0, np.inf
            more, extra = move_size[move], move_penalty[move]
            while a < merged_size.size or b < count:
                from_new = False
                if a == merged_size.size:
                    from_new = True
                elif b < count:
                    shifted = size[b] + more
                    if shifted < merged_size[a]:
                        from_new = True
                    elif shifted == merged_size[a]:
                        from_new = penalty[b] + extra < merged_penalty[a]
                if from_new:
                    new_size, new_penalty = size[b] + more, penalty[b] + extra
                    new_state, new_move = state[b], move
                    b += 1
                else:
                    new_size, new_penalty = merged_size[a], merged_penalty[a]
                    new_state, new_move = merged_state[a], merged_move[a]
                    a += 1
                if exact_fill:
                    if made > 0 and out_size[made - 1] == new_size:
                        continue
                else:
                    value = new_penalty - rate * new_size
                    if value >= least:
                        continue
                    least = value
                out_size[made], out_penalty[made] = new_size, new_penalty
                out_state[made], out_move[made] = new_state, new_move
                made += 1
            merged_size, merged_penalty = out_size[:made], out_penalty[:made]
            merged_state, merged_move = out_state[:made], out_move[:made]
            work -= room
        size, penalty, state, count = merged_size, merged_penalty, merged_state, merged_size.size
        for s in range(count):
            if merged_move[s] >= 0:
                if n_history == parents.size:
                    parents, moved = np.concatenate((parents, parents)), np.concatenate((moved, moved))
                parents[n_history], moved[n_history] = state[s], merged_move[s]
                state[s] = n_history
                n_history += 1
            free = slack - size[s]
            if free == 0 or (free > 0 and not exact_fill):
                value = penalty[s] + price * free + offset
                if value < excess:
                    excess, best_state = value, state[s]
        group += 1
    return group, size[:count], penalty[:count], state[:count], parents, moved, n_history, excess, best_state


bracket = _jit(_bracket)
moves = _jit(_moves)
totals = _jit(_totals)
cheapest = _jit(_cheapest)
hulls = _jit(_hulls)
wide_hulls = _jit(passes.wide_hulls)
advance = _jit(_advance)
