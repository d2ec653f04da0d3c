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

GOLDEN = passes.GOLDEN

RATE_RANGE = (1e-290, 1e290)
"""Rates beyond these are not looked for."""


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
    room = 4096 + k
    item, to = np.empty(room, dtype=np.int64), np.empty(room, dtype=np.int32)
    penalty, size = np.empty(room), np.empty(room, dtype=np.int64)
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
            if count + k > item.size:
                item, to = np.concatenate((item, item)), np.concatenate((to, to))
                penalty, size = np.concatenate((penalty, penalty)), np.concatenate((size, size))
            for j in range(k):  # written first, counted then: whether a move is kept cannot be predicted
                change = np.int64(cost[row, j]) - np.int64(cost[row, stay])
                extra = max(float(loss[row, j]) + rate * float(cost[row, j]) - here, 0.0)
                item[count], to[count], penalty[count], size[count] = row, j, extra, change
                count += np.int64((change != 0) & (extra <= threshold))
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


def _total_at(values: Any, sizes: Any, rate: float, best: Any, spent: Any) -> float:
    """Total size of the minimizers of values + rate * sizes (``[k, m]`` each); every one's size stays in ``spent``."""
    k, m = values.shape
    best[:], spent[:] = np.inf, 0.0
    for j in range(k):
        losses, costs = values[j], sizes[j]
        for i in range(m):
            value = losses[i] + rate * costs[i]
            better = value < best[i]
            best[i] = value if better else best[i]
            spent[i] = costs[i] if better else spent[i]
    return float(spent.sum())


def _search_rate(values: Any, sizes: Any, rate: float, wanted: float, close: float, least: float, best: Any, spent: Any) -> Any:
    """Two rates that enclose the one at which the total size falls to ``wanted``, or twice a rate that is near enough."""
    total = total_at(values, sizes, rate, best, spent)
    low, high, total_low, total_high = rate, rate, total, total
    factor = 4.0
    while total_low < wanted and low > RATE_RANGE[0]:
        high, total_high = low, total_low
        low /= factor
        factor *= 2.0
        total_low = total_at(values, sizes, low, best, spent)
    while total_high > wanted and total_high > least and high < RATE_RANGE[1]:
        low, total_low = high, total_high
        high *= factor
        factor *= 2.0
        total_high = total_at(values, sizes, high, best, spent)
    for attempt in range(30):
        if total_low < wanted or total_high > wanted or high <= low * (1 + 1e-9):
            break
        # The size falls like the logarithm of the rate; every third time the middle, should it not.
        share = 0.5 if attempt % 3 == 2 else min(max((total_low - wanted) / max(total_low - total_high, 1.0), 0.05), 0.95)
        middle = low * (high / low) ** share
        total = total_at(values, sizes, middle, best, spent)
        if abs(total - wanted) <= close:
            return middle, middle
        if total > wanted:
            low, total_low = middle, total
        else:
            high, total_high = middle, total
    return low, high


def _sampled_rates(values: Any, sizes: Any, target: float, spreads: float) -> Any:
    """Rates between which a sample (``[k, m]`` losses and costs) reaches ``target``, give or take ``spreads`` deviations."""
    k, m = values.shape
    costs = np.empty((k, m))
    least, widest, fall, rise = 0.0, 0.0, 0.0, 0.0
    for i in range(m):
        cheap, lossy, dear, good = np.inf, np.inf, 0.0, np.inf
        for j in range(k):
            size, value = float(sizes[j, i]), values[j, i]
            costs[j, i] = size
            if value == np.inf:
                continue
            if size < cheap or (size == cheap and value < lossy):
                cheap, lossy = size, value
            if value < good:
                dear, good = size, value
        least += cheap
        widest += max(dear, cheap)
        fall += lossy - good
        rise += max(dear - cheap, 0.0)
    if not (fall > 0.0 and rise > 0.0):
        return 0.0, np.inf
    best, spent = np.empty(m), np.empty(m)
    slip = 1e-3 * (widest - least) / np.sqrt(m)
    low, high = search_rate(values, costs, fall / rise, target, slip, least, best, spent)
    centre = np.sqrt(low * high)
    total_at(values, costs, centre, best, spent)
    squares = 0.0
    for i in range(m - 1):  # neighbours resemble each other: see ``mckp``
        squares += (spent[i + 1] - spent[i]) ** 2
    spread = spreads * np.sqrt(squares / max(m - 1, 1) / 2 * m)
    bottom, _ = search_rate(values, costs, centre, target + spread, 0.1 * spread, least, best, spent)
    _, top = search_rate(values, costs, centre, target - spread, 0.1 * spread, least, best, spent)
    reached = total_at(values, costs, bottom, best, spent) >= target  # else even at a rate of zero there is room
    return (bottom if reached else 0.0), (top * 2.0 if bottom == top else top)


def _fill(values: Any, sizes: Any, base: Any, low: float, slack: int) -> Any:
    """Hull steps (of ``[k, m]`` losses and costs) from ``base``, steepest first, until one does not fit.

    The step in question is selected, not sorted for: parts of the steps are taken or left as a whole.
    Returns the choice, the step that does not fit (or -1), its item, choice after it, size and rate, and the number of steps.
    """
    k, m = values.shape
    room = m * (k - 1)
    item, to = np.empty(room, dtype=np.int64), np.empty(room, dtype=np.int32)
    size, rate = np.empty(room, dtype=np.int64), np.empty(room)
    row_loss, row_cost = np.empty(k), np.empty(k, dtype=np.int64)
    count = 0
    for i in range(m):
        for j in range(k):
            row_loss[j], row_cost[j] = values[j, i], sizes[j, i]
        at, last = np.int64(base[i]), np.inf
        while True:
            steepest, following, step = -np.inf, -1, np.int64(0)
            for j in range(k):
                wider = row_cost[j] - row_cost[at]
                if wider <= 0:
                    continue
                slope = (row_loss[at] - row_loss[j]) / wider
                if slope > steepest or (slope == steepest and wider > step):
                    steepest, following, step = slope, j, wider
            if following < 0 or steepest < low or steepest == -np.inf or (steepest <= 0.0 <= low):
                break
            last = min(last, steepest)
            item[count], to[count], size[count], rate[count] = i, following, step, last
            count += 1
            at = following
    choice = np.empty(m, dtype=np.int32)
    for i in range(m):
        choice[i] = base[i]
    taken = np.zeros(count, dtype=np.bool_)
    active, steeper, flatter = np.arange(count), np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
    n_active, missed = count, -1
    while n_active > 0 and slack >= 0 and missed < 0:
        first, middle, final = rate[active[0]], rate[active[n_active // 2]], rate[active[n_active - 1]]
        pivot = max(min(first, middle), min(max(first, middle), final))
        n_steeper, n_flatter, used = 0, 0, np.int64(0)
        for position in range(n_active):
            step_at = active[position]
            if rate[step_at] > pivot:
                steeper[n_steeper] = step_at
                n_steeper += 1
                used += size[step_at]
            elif rate[step_at] < pivot:
                flatter[n_flatter] = step_at
                n_flatter += 1
        if used > slack:
            active, steeper = steeper, active
            n_active = n_steeper
            continue
        slack -= used
        for position in range(n_steeper):
            taken[steeper[position]] = True
        for position in range(n_active):  # equal rates in the order of the items
            step_at = active[position]
            if rate[step_at] != pivot:
                continue
            if size[step_at] > slack:
                missed = step_at
                break
            taken[step_at] = True
            slack -= size[step_at]
        active, flatter = flatter, active
        n_active = n_flatter
    for step_at in range(count):
        if taken[step_at]:
            choice[item[step_at]] = to[step_at]
    if missed < 0:
        return choice, missed, 0, 0, 0, 0.0
    return choice, missed, item[missed], np.int64(to[missed]), size[missed], rate[missed]


def _near_moves(values: Any, sizes: Any, base: Any, rate: float, slack: int, excess: float, most: int) -> Any:
    """The ``most`` moves that cost least per unit among those that could be part of a solution with less than ``excess``.

    Every move that fits by itself lowers the excess for those that follow. Tables are ``[k, m]``, items count from 0.
    """
    k, m = values.shape
    room = m * k
    item, to = np.empty(room, dtype=np.int64), np.empty(room, dtype=np.int32)
    penalty, size, unit = np.empty(room), np.empty(room, dtype=np.int64), np.empty(room)
    count = 0
    for i in range(m):
        stay = np.int64(base[i])
        here = values[stay, i] + rate * sizes[stay, i]
        for j in range(k):
            change = sizes[j, i] - sizes[stay, i]
            extra = max(values[j, i] + rate * sizes[j, i] - here, 0.0)
            item[count], to[count], penalty[count], size[count] = i, j, extra, change
            unit[count] = extra / abs(change)
            count += np.int64((change != 0) & (extra <= excess))
            alone = extra + rate * (slack - change)
            excess = alone if change != 0 and change <= slack and alone < excess else excess
    kept, limit = 0, np.inf
    if count > most:
        limit = np.partition(unit[:count], most - 1)[most - 1]
    for move in range(count):
        if unit[move] <= limit and penalty[move] <= excess and kept < most:
            item[kept], to[kept], penalty[kept], size[kept] = item[move], to[move], penalty[move], size[move]
            kept += 1
    return item[:kept], to[:kept], penalty[:kept], size[:kept]


def _core_keys(item: Any, penalty: Any, size: Any, grain: float) -> Any:
    """First move of every group, the group's place in the order, and the common divisor of all sizes: see ``closing``."""
    count = item.size
    head, key = np.empty(count + 1, dtype=np.int64), np.empty(count)
    groups, divisor = 0, np.int64(0)
    best = np.inf
    for move in range(count):
        if move == 0 or item[move] != item[move - 1]:
            if groups > 0:
                key[groups - 1] = best
            head[groups] = move
            groups += 1
            best = np.inf
        length = abs(size[move])
        best = min(best, penalty[move] / length)
        if divisor == 0 or length % divisor != 0:
            a, b = length, divisor
            while b != 0:
                a, b = b, a % b
            divisor = a
    if groups > 0:
        key[groups - 1] = best
    head[groups] = count
    for group in range(groups):
        fraction = group * GOLDEN
        key[group] = np.round(key[group] / grain) + (fraction - np.floor(fraction))
    return head[: groups + 1], key[:groups], divisor


def _core_order(head: Any, order: Any, item: Any, to: Any, penalty: Any, size: Any) -> Any:
    """All moves in the order of their groups, and the least penalties per unit from every group on."""
    count, groups = item.size, order.size
    start = np.empty(groups + 1, dtype=np.int64)
    new_item, new_to = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int32)
    new_penalty, new_size = np.empty(count), np.empty(count, dtype=np.int64)
    position = 0
    for group in range(groups):
        start[group] = position
        for move in range(head[order[group]], head[order[group] + 1]):
            new_item[position], new_to[position] = item[move], to[move]
            new_penalty[position], new_size[position] = penalty[move], size[move]
            position += 1
    start[groups] = count
    up, down = np.empty(groups + 1), np.empty(groups + 1)
    up[groups], down[groups] = np.inf, np.inf
    for group in range(groups - 1, -1, -1):
        least_up, least_down = up[group + 1], down[group + 1]
        for move in range(start[group], start[group + 1]):
            unit = new_penalty[move] / abs(new_size[move])
            if new_size[move] > 0:
                least_up = min(least_up, unit)
            else:
                least_down = min(least_down, unit)
        up[group], down[group] = least_up, least_down
    return start, new_item, new_to, new_penalty, new_size, up, down


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
    """Process groups until the states die, the groups end, the list is too long or ``work`` states were made.

    Three sets of buffers take turns: the states before a group, what its moves have been merged to so far, and the next merge.
    """
    n_groups = move_start.size - 1
    count = size.size
    price = 0.0 if exact_fill else rate
    room = max(2 * count, 256)
    given_size, given_penalty, given_state = size, penalty, state
    size, penalty = np.empty(room, dtype=np.int64), np.empty(room)
    state, move_of = np.empty(room, dtype=np.int64), np.empty(room, dtype=np.int64)
    size[:count], penalty[:count], state[:count] = given_size, given_penalty, given_state
    in_size, in_penalty = np.empty(room, dtype=np.int64), np.empty(room)
    in_state, in_move = np.empty(room, dtype=np.int64), np.empty(room, dtype=np.int64)
    out_size, out_penalty = np.empty(room, dtype=np.int64), np.empty(room)
    out_state, out_move = np.empty(room, dtype=np.int64), np.empty(room, dtype=np.int64)
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
        merged = 0
        for move in range(first, last):
            if move == first:
                merged = count
                for s in range(count):
                    in_size[s], in_penalty[s], in_state[s], in_move[s] = size[s], penalty[s], state[s], -1
            wanted = merged + count
            if out_size.size < wanted:
                room = 2 * wanted
                out_size, out_penalty = np.empty(room, dtype=np.int64), np.empty(room)
                out_state, out_move = np.empty(room, dtype=np.int64), np.empty(room, dtype=np.int64)
            a, b, made, least = 0, 0, 0, np.inf
            more, extra = move_size[move], move_penalty[move]
            while a < merged or b < count:
                from_new = False
                if a == merged:
                    from_new = True
                elif b < count:
                    shifted = size[b] + more
                    if shifted < in_size[a]:
                        from_new = True
                    elif shifted == in_size[a]:
                        from_new = penalty[b] + extra < in_penalty[a]
                if from_new:
                    new_size, new_penalty = size[b] + more, penalty[b] + extra
                    new_state, new_move = state[b], move
                    b += 1
                else:
                    new_size, new_penalty = in_size[a], in_penalty[a]
                    new_state, new_move = in_state[a], in_move[a]
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
            in_size, out_size = out_size, in_size
            in_penalty, out_penalty = out_penalty, in_penalty
            in_state, out_state = out_state, in_state
            in_move, out_move = out_move, in_move
            merged = made
            work -= wanted
        size, in_size = in_size, size
        penalty, in_penalty = in_penalty, penalty
        state, in_state = in_state, state
        move_of, in_move = in_move, move_of
        count = merged
        if in_size.size < 2 * count:
            in_size, in_penalty = np.empty(4 * count, dtype=np.int64), np.empty(4 * count)
            in_state, in_move = np.empty(4 * count, dtype=np.int64), np.empty(4 * count, dtype=np.int64)
        for s in range(count):
            if move_of[s] >= 0:
                if n_history == parents.size:
                    parents, moved = np.concatenate((parents, parents)), np.concatenate((moved, moved))
                parents[n_history], moved[n_history] = state[s], move_of[s]
                state[s] = n_history
                n_history += 1
            free = slack - size[s]
            if free == 0 or (free > 0 and not exact_fill):
                value = penalty[s] + price * free + offset
                if value < excess:
                    excess, best_state = value, state[s]
        group += 1
    return group, size[:count], penalty[:count], state[:count], parents, moved, n_history, excess, best_state


total_at = _jit(_total_at)
search_rate = _jit(_search_rate)
sampled_rates = _jit(_sampled_rates)
fill = _jit(_fill)
near_moves = _jit(_near_moves)
core_keys = _jit(_core_keys)
core_order = _jit(_core_order)
bracket = _jit(_bracket)
moves = _jit(_moves)
totals = _jit(_totals)
cheapest = _jit(_cheapest)
hulls = _jit(_hulls)
wide_hulls = _jit(passes.wide_hulls)
advance = _jit(_advance)
