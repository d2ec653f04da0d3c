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

BLOCK = 512
"""Items per block: the buffers of a block stay in the first-level cache."""

GOLDEN = passes.GOLDEN

SORTED_GROUPS = 256
"""Groups of moves that a search in one call tries first."""

BUCKETS = 512
"""Buckets of rates: few enough for the first-level cache, so many that hardly a step shares the one that matters."""

LEAST_RATE = 1e-290
"""Below this a rate counts as zero."""


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
    rows, flagged = np.empty(4096 + BLOCK, dtype=np.int64), 0
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
        if flagged + length > rows.size:
            rows = np.concatenate((rows, rows))
        for i in range(length):
            rows[flagged] = start + i  # written first, counted then: whether a row is kept cannot be predicted
            flagged += int((at[i] != float(base[start + i])) | (second[i] - best[i] <= threshold))
    room = min(4096, flagged) * k + k
    item, to = np.empty(room, dtype=np.int64), np.empty(room, dtype=np.int32)
    penalty, size = np.empty(room), np.empty(room, dtype=np.int64)
    here, spent = best, np.empty(BLOCK, dtype=np.int64)
    count = 0
    for start in range(0, flagged, BLOCK):
        part = rows[start : min(start + BLOCK, flagged)]
        values, sizes = by_choice(loss, cost, part)
        if count + part.size * k > item.size:
            more = max(item.size, part.size * k)
            item, to = np.concatenate((item, np.empty(more, np.int64))), np.concatenate((to, np.empty(more, np.int32)))
            penalty, size = np.concatenate((penalty, np.empty(more))), np.concatenate((size, np.empty(more, np.int64)))
        for i in range(part.size):
            here[i] = values[base[part[i]], i] + rate * float(sizes[base[part[i]], i])
            spent[i] = sizes[base[part[i]], i]
        for j in range(k):
            losses, costs = values[j], sizes[j]
            for i in range(part.size):
                extra = losses[i] + rate * float(costs[i]) - here[i]
                losses[i] = max(extra, 0.0)
                costs[i] -= spent[i]
        for i in range(part.size):
            for j in range(k):
                if values[j, i] <= threshold and sizes[j, i] != 0:
                    item[count], to[count], penalty[count], size[count] = part[i], j, values[j, i], sizes[j, i]
                    count += 1
    return item[:count], to[:count], penalty[:count], size[:count]


def _totals(loss: Any, cost: Any, choice: Any) -> Any:
    n = loss.shape[0]
    total, carry, used = 0.0, 0.0, 0
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        even, odd = 0.0, 0.0
        for row in range(start, stop - 1, 2):  # two sums: neither waits for the other
            even += float(loss[row, choice[row]])
            odd += float(loss[row + 1, choice[row + 1]])
            used += cost[row, choice[row]]
            used += cost[row + 1, choice[row + 1]]
        if (stop - start) % 2 == 1:
            even += float(loss[stop - 1, choice[stop - 1]])
            used += cost[stop - 1, choice[stop - 1]]
        block_loss = even + odd
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
                slope = (np.float64(loss[row, at]) - np.float64(loss[row, j])) / wider
                if slope > steepest or (slope == steepest and wider > step):
                    steepest, following, step = slope, j, wider
            if following < 0 or steepest < low or steepest == -np.inf or (steepest <= 0.0 <= low):
                break
            last = min(last, steepest)
            item[count], to[count], size[count], rate[count] = row, following, step, last
            gain[count] = np.float64(loss[row, at]) - np.float64(loss[row, following])
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
            size = costs[
                i
            ]  # read before anything is written, which might be the same memory: a later read keeps the loop scalar
            value = losses[i] + rate * size
            better = value < best[i]
            best[i] = value if better else best[i]
            spent[i] = size if better else spent[i]
    even, odd = 0.0, 0.0
    for i in range(0, m - 1, 2):  # two sums: neither waits for the other
        even += spent[i]
        odd += spent[i + 1]
    return even + odd + (spent[m - 1] if m % 2 == 1 else 0.0)


def _search_rate(
    values: Any,
    sizes: Any,
    rate: float,
    total: float,
    wanted: float,
    close: float,
    most: float,
    factor: float,
    grain: float,
    best: Any,
    spent: Any,
) -> Any:
    """Two rates, a factor of ``grain`` apart or less, that enclose the one at which the total size falls to ``wanted``,
    or twice a rate whose total is within ``close`` of it; and the totals at both. The search starts at ``rate``, where
    the total is ``total``; at the rate ``most`` it has fallen as far as it can.
    """
    low, high, total_low, total_high = rate, rate, total, total
    while total_low < wanted and low > LEAST_RATE:
        high, total_high = low, total_low
        low /= factor
        factor *= factor
        total_low = total_at(values, sizes, low, best, spent)
    while total_high > wanted and high < most:
        low, total_low = high, total_high
        high = min(high * factor, most)
        factor *= factor
        total_high = total_at(values, sizes, high, best, spent)
    for attempt in range(60):
        if total_low < wanted or total_high > wanted or high <= low * grain:
            break
        # The size falls like the logarithm of the rate; every third time the middle, should it not.
        share = (
            0.5 if attempt % 3 == 2 else min(max((total_low - wanted) / max(total_low - total_high, 1.0), 0.05), 0.95)
        )
        middle = low * (high / low) ** share
        total = total_at(values, sizes, middle, best, spent)
        if abs(total - wanted) <= close:
            return middle, middle, total, total
        if total > wanted:
            low, total_low = middle, total
        else:
            high, total_high = middle, total
    return low, high, total_low, total_high


def _sampled_rates(values: Any, sizes: Any, target: float, spreads: float, lowest: float, highest: float) -> Any:
    """Rates between which a sample (``[k, m]`` losses and costs) reaches ``target``, give or take ``spreads``
    deviations.

    The critical rate is known to lie between ``lowest`` and ``highest``, which may be zero and infinite.
    """
    k, m = values.shape
    costs = np.empty((k, m))
    cheap, lossy, dear, good = np.full(m, np.inf), np.full(m, np.inf), np.zeros(m), np.full(m, np.inf)
    for j in range(k):
        losses, spending = values[j], costs[j]
        for i in range(m):
            size, value = float(sizes[j, i]), losses[i]
            spending[i] = size
            size = size if value < np.inf else np.inf
            cheaper = (size < cheap[i]) | ((size == cheap[i]) & (value < lossy[i]))
            cheap[i] = size if cheaper else cheap[i]
            lossy[i] = value if cheaper else lossy[i]
            better = value < good[i]
            dear[i] = size if better else dear[i]
            good[i] = value if better else good[i]
    steepest, fall, rise, slopes = 0.0, 0.0, 0.0, np.zeros(m)
    for j in range(k):
        losses, spending = values[j], costs[j]
        for i in range(m):
            wider = spending[i] - cheap[i]
            slope = (lossy[i] - losses[i]) / wider if wider > 0.0 else 0.0
            slopes[i] = max(slopes[i], slope)
    for i in range(m):
        steepest = max(steepest, slopes[i])
        fall += lossy[i] - good[i]
        rise += max(dear[i] - cheap[i], 0.0)
    if not (fall > 0.0 and rise > 0.0):
        return lowest, highest
    first, grain = fall / rise, 1.01
    if lowest > 0.0 and highest < np.inf:
        first, grain = np.sqrt(lowest * highest), (highest / lowest) ** 0.01
    most = 2.0 * steepest  # far beyond, losses would vanish beside rate * size
    first = min(first, most)
    if not first > LEAST_RATE or grain <= 1.0:
        return lowest, highest
    best, spent = np.empty(m), np.empty(m)
    total = total_at(values, costs, first, best, spent)
    low, high, total_low, total_high = search_rate(
        values, costs, first, total, target, 4e-3 * target, most, grain**64, grain, best, spent
    )
    if low < high:
        total_at(values, costs, np.sqrt(low * high), best, spent)
    squares = 0.0
    for i in range(m - 1):  # neighbours resemble each other: see ``mckp``
        squares += (spent[i + 1] - spent[i]) ** 2
    spread = spreads * np.sqrt(squares / max(m - 1, 1) / 2 * m)
    bottom, _, bottom_total, _ = search_rate(
        values, costs, low, total_low, target + spread, 0.2 * spread, most, grain**12, grain, best, spent
    )
    _, top, _, _ = search_rate(
        values, costs, high, total_high, target - spread, 0.2 * spread, most, grain**12, grain, best, spent
    )
    top = top * grain if top <= bottom else top
    return max(bottom if bottom_total >= target else 0.0, lowest), min(top, highest)  # a rate of zero leaves room


def _wrapped(values: Any, sizes: Any, base: Any, low: float) -> Any:
    """Hull steps of ``[k, m]`` losses and costs with a rate of at least ``low``, all first ones, then all second ones,
    ..."""
    k, m = values.shape
    room = 2 * m + 16
    item, to = np.empty(room, dtype=np.int64), np.empty(room, dtype=np.int32)
    size, rate = np.empty(room, dtype=np.int64), np.empty(room)
    table, costs = values, sizes
    row, last = np.arange(m), np.full(m, np.inf)
    at_loss, at_cost = np.empty(m), np.empty(m, dtype=np.int64)
    for i in range(m):
        at_loss[i], at_cost[i] = values[base[i], i], sizes[base[i], i]
    steepest, best, following = np.empty(m), np.empty(m), np.empty(m)
    count, active = 0, m
    while active > 0:
        steepest[:active], best[:active], following[:active] = -np.inf, 0.0, -1.0
        for j in range(k):
            column, losses, spent = float(j), table[j], costs[j]
            for i in range(active):  # one lane width and no branches, as everywhere
                wider, gain = float(spent[i] - at_cost[i]), at_loss[i] - losses[i]
                slope_so_far, best_so_far, following_so_far = steepest[i], best[i], following[i]
                slope = gain / wider if wider > 0.0 else -np.inf
                better = (slope > slope_so_far) | ((slope == slope_so_far) & (wider > best_so_far) & (wider > 0.0))
                steepest[i] = slope if better else slope_so_far
                best[i] = wider if better else best_so_far
                following[i] = column if better else following_so_far
        if count + active > item.size:
            more = item.size + active
            item, to = np.concatenate((item, np.empty(more, np.int64))), np.concatenate((to, np.empty(more, np.int32)))
            size, rate = np.concatenate((size, np.empty(more, np.int64))), np.concatenate((rate, np.empty(more)))
        kept = 0
        for i in range(active):
            slope, j = steepest[i], int(following[i])
            if j < 0 or slope < low or slope == -np.inf or (slope <= 0.0 <= low):
                continue
            step = costs[j, i] - at_cost[i]
            last[kept] = min(last[i], slope)
            item[count], to[count], size[count], rate[count] = row[i], j, step, last[kept]
            count += 1
            row[kept], at_loss[kept], at_cost[kept] = row[i], table[j, i], costs[j, i]
            kept += 1
        if 0 < kept < active:
            rest_table, rest_costs = np.empty((k, kept)), np.empty((k, kept), dtype=np.int64)
            for j in range(k):
                for i in range(kept):
                    rest_table[j, i], rest_costs[j, i] = values[j, row[i]], sizes[j, row[i]]
            table, costs = rest_table, rest_costs
        active = kept
    return item, to, size, rate, count


def _fill(values: Any, sizes: Any, base: Any, low: float, slack: int) -> Any:
    """Hull steps (of ``[k, m]`` losses and costs) from ``base``, steepest first, until one does not fit; ``low`` is >=
    0.

    The step in question is selected, not sorted for: the steps are spread over buckets by the bits of their rates,
    which are in the order of the rates as these are positive, and only the bucket that does not fit as a whole is
    looked into. Returns the choice, the step that does not fit (or -1), its item, choice after it, size and rate.
    """
    m = values.shape[1]
    item, to, size, rate, count = wrapped(values, sizes, base, low)
    choice = np.empty(m, dtype=np.int32)
    for i in range(m):
        choice[i] = base[i]
    bits, active, used = rate.view(np.int64), np.arange(count), np.empty(BUCKETS, dtype=np.int64)
    missed = -1
    while count > 0 and slack >= 0 and missed < 0:
        least, most, shift = bits[active[0]], bits[active[0]], 0
        for position in range(count):
            least, most = min(least, bits[active[position]]), max(most, bits[active[position]])
        while (most - least) >> shift >= BUCKETS:
            shift += 1
        used[:] = 0
        for position in range(count):
            step_at = active[position]
            used[(bits[step_at] - least) >> shift] += size[step_at]
        bucket = BUCKETS - 1
        while bucket >= 0 and used[bucket] <= slack:
            slack -= used[bucket]
            bucket -= 1
        inside = 0
        for position in range(count):
            step_at = active[position]
            place = (bits[step_at] - least) >> shift
            choice[item[step_at]] = to[step_at] if place > bucket else choice[item[step_at]]
            active[inside] = step_at
            inside += int(place == bucket)
        count = inside
        position = 0
        while shift == 0 and count > 0 and missed < 0:  # all of one rate: in the order of the items
            step_at = active[position]
            if size[step_at] > slack:
                missed = step_at
            else:
                choice[item[step_at]] = to[step_at]
                slack -= size[step_at]
                position += 1
    if missed < 0:
        return choice, missed, 0, 0, 0, 0.0
    return choice, missed, item[missed], np.int64(to[missed]), size[missed], rate[missed]


def _smallest(values: Any, rank: int) -> float:
    """The value of that rank (from 0), by selection; overwrites ``values``. ``np.partition`` takes seconds to
    compile."""
    count, smaller, larger = values.size, np.empty_like(values), np.empty_like(values)
    while True:
        first, middle, final = values[0], values[count // 2], values[count - 1]
        pivot = max(min(first, middle), min(max(first, middle), final))
        n_smaller, n_larger = 0, 0
        for i in range(count):
            smaller[n_smaller], larger[n_larger] = values[i], values[i]
            n_smaller += int(values[i] < pivot)
            n_larger += int(values[i] > pivot)
        if rank < n_smaller:
            values, smaller, count = smaller, values, n_smaller
        elif rank >= count - n_larger:
            rank -= count - n_larger
            values, larger, count = larger, values, n_larger
        else:
            return float(pivot)


def _sorted_by(key: Any, order: Any) -> Any:
    """Some positions by their keys: a merge sort, which compiles in a tenth of the time of ``np.argsort``."""
    count = order.size
    other = np.empty(count, dtype=np.int64)
    width = 1
    while width < count:
        for start in range(0, count, 2 * width):
            middle, end = min(start + width, count), min(start + 2 * width, count)
            a, b = start, middle
            for at in range(start, end):
                left = a < middle and (b == end or key[order[a]] <= key[order[b]])
                other[at] = order[a] if left else order[b]
                a, b = a + int(left), b + int(not left)
        order, other = other, order
        width *= 2
    return order


def _near_moves(values: Any, sizes: Any, base: Any, rate: float, slack: int, excess: float, most: int) -> Any:
    """Moves of the ``most`` items whose cheapest one costs least per unit, as far as they could be part of a solution
    with less than ``excess``; twice ``most`` at the outside.

    Every move that fits by itself lowers the excess for all. Tables are ``[k, m]``, items count from 0.
    """
    k, m = values.shape
    here, spent = np.empty(m), np.empty(m)
    least, alone = np.full(m, np.inf), np.full(m, np.inf)
    room = float(slack)
    for i in range(m):
        spent[i] = float(sizes[base[i], i])
        here[i] = values[base[i], i] + rate * spent[i]
    for j in range(k):
        losses, costs = values[j], sizes[j]
        for i in range(m):
            change = float(costs[i]) - spent[i]
            extra = losses[i] + rate * float(costs[i]) - here[i]
            extra = max(extra, 0.0)
            unit = extra / abs(change) if change != 0.0 else np.inf
            least[i] = min(least[i], unit)
            single = extra + rate * (room - change) if (change != 0.0) & (change <= room) else np.inf
            alone[i] = min(alone[i], single)
    limit = np.inf
    for i in range(m):
        excess = min(excess, alone[i])
        alone[i] = least[i]
    if m > most:
        limit = smallest(alone, most - 1)
    item, to = np.empty(2 * most, dtype=np.int64), np.empty(2 * most, dtype=np.int32)
    penalty, size = np.empty(2 * most), np.empty(2 * most, dtype=np.int64)
    count = 0
    for i in range(m):
        if least[i] > limit or least[i] == np.inf:
            continue
        for j in range(k):
            change = sizes[j, i] - sizes[base[i], i]
            extra = max(values[j, i] + rate * float(sizes[j, i]) - here[i], 0.0)
            if change != 0 and extra <= excess and extra <= limit * abs(change) and count < 2 * most:
                item[count], to[count], penalty[count], size[count] = i, j, extra, change
                count += 1
    return item[:count], to[:count], penalty[:count], size[:count]


def _core_keys(item: Any, penalty: Any, size: Any, grain: float) -> Any:
    """First move of every group, the group's place in the order, its least penalties per unit of increase and of
    decrease, and the common divisor of all sizes: see ``closing``.
    """
    count = item.size
    head, key = np.empty(count + 1, dtype=np.int64), np.empty(count)
    up, down = np.empty(count), np.empty(count)
    groups, divisor = 0, np.int64(0)
    for move in range(count):
        if move == 0 or item[move] != item[move - 1]:
            head[groups], up[groups], down[groups] = move, np.inf, np.inf
            groups += 1
        unit = penalty[move] / abs(size[move])
        if size[move] > 0:
            up[groups - 1] = min(up[groups - 1], unit)
        else:
            down[groups - 1] = min(down[groups - 1], unit)
        # Whether the divisor divides, without an integer division (tens of cycles); a rounded quotient costs one more
        # Euclid.
        if divisor == 0 or np.int64(float(size[move]) / float(divisor)) * divisor != size[move]:
            a, b = abs(size[move]), divisor
            while b != 0:
                a, b = b, a % b
            divisor = a
    head[groups] = count
    for group in range(groups):
        fraction = group * GOLDEN
        key[group] = np.round(min(up[group], down[group]) / grain) + (fraction - np.floor(fraction))
    return head[: groups + 1], key[:groups], up[:groups], down[:groups], divisor


def _core_order(
    head: Any, order: Any, item: Any, to: Any, penalty: Any, size: Any, group_up: Any, group_down: Any
) -> Any:
    """The moves of some groups in their order, the least penalties per unit from each of them on, and where each move
    stood."""
    groups, count = order.size, 0
    for group in order:
        count += head[group + 1] - head[group]
    start = np.empty(groups + 1, dtype=np.int64)
    new_item, new_to = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int32)
    new_penalty, new_size, place = np.empty(count), np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
    position = 0
    for group in range(groups):
        start[group] = position
        for move in range(head[order[group]], head[order[group] + 1]):
            new_item[position], new_to[position], place[position] = item[move], to[move], move
            new_penalty[position], new_size[position] = penalty[move], size[move]
            position += 1
    start[groups] = count
    up, down = np.empty(groups + 1), np.empty(groups + 1)
    up[groups], down[groups] = np.inf, np.inf
    for group in range(groups - 1, -1, -1):
        up[group] = min(up[group + 1], group_up[order[group]])
        down[group] = min(down[group + 1], group_down[order[group]])
    return start, new_item, new_to, new_penalty, new_size, up, down, place


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

    Three sets of buffers take turns: the states before a group, what its moves have been merged to so far, and the next
    merge.
    """
    n_groups = move_start.size - 1
    count = size.size
    price = 0.0 if exact_fill else rate
    room = max(2 * count, 256)
    given_size, given_penalty, given_state = size, penalty, state
    size, penalty = np.empty(room, dtype=np.int64), np.empty(room)
    state, move_of = np.empty(room, dtype=np.int64), np.empty(room, dtype=np.int64)
    for s in range(count):  # an assignment to a slice brings an error message along, which takes seconds to compile
        size[s], penalty[s], state[s] = given_size[s], given_penalty[s], given_state[s]
    in_size, in_penalty = np.empty(room, dtype=np.int64), np.empty(room)
    in_state, in_move = np.empty(room, dtype=np.int64), np.empty(room, dtype=np.int64)
    out_size, out_penalty = np.empty(room, dtype=np.int64), np.empty(room)
    out_state, out_move = np.empty(room, dtype=np.int64), np.empty(room, dtype=np.int64)
    while group < n_groups and count > 0 and count <= max_states and work > 0:
        fill = up[group] if exact_fill else min(rate, up[group])
        kept = 0
        for s in range(
            count
        ):  # here and below: written first, counted then, for want of a pattern that could be predicted
            free, known = (
                slack - size[s],
                penalty[s],
            )  # from where it is, not from where it goes: that would wait for the write
            rest = 0.0 if free == 0 else abs(free) * (fill if free > 0 else down[group])
            size[kept], penalty[kept], state[kept] = size[s], known, state[s]
            kept += int(known + rest + offset < excess - tolerance)
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
            a, b, made, least, latest = 0, 0, 0, np.inf, np.int64(np.iinfo(np.int64).min)
            more, extra = move_size[move], move_penalty[move]
            while a < merged or b < count:
                # Past the end of a list its last state is read, and never taken.
                here, there = min(a, merged - 1), min(b, count - 1)
                old_size, new_size = in_size[here], size[there] + more
                old_penalty, new_penalty = in_penalty[here], penalty[there] + extra
                first_one = (new_size < old_size) | ((new_size == old_size) & (new_penalty < old_penalty))
                from_new = ((a == merged) | first_one) & (b < count)
                b += int(from_new)
                a += int(not from_new)
                new_size = new_size if from_new else old_size
                new_penalty = new_penalty if from_new else old_penalty
                out_size[made], out_penalty[made] = new_size, new_penalty
                out_state[made] = state[there] if from_new else in_state[here]
                out_move[made] = move if from_new else in_move[here]
                value = new_penalty - rate * new_size
                keep = new_size != latest if exact_fill else value < least
                made += int(keep)
                latest = new_size if keep else latest
                least = min(value, least)
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
        while n_history + count > parents.size:
            parents, moved = np.concatenate((parents, parents)), np.concatenate((moved, moved))
        for s in range(count):
            born = move_of[s] >= 0
            parents[n_history], moved[n_history] = state[s], move_of[s]
            state[s] = n_history if born else state[s]
            n_history += int(born)
            free = slack - size[s]
            if free == 0 or (free > 0 and not exact_fill):
                value = penalty[s] + price * free + offset
                if value < excess:
                    excess, best_state = value, state[s]
        group += 1
    return group, size[:count], penalty[:count], state[:count], parents, moved, n_history, excess, best_state


def _search(
    item: Any,
    to: Any,
    penalty: Any,
    size: Any,
    rate: float,
    slack: int,
    excess: float,
    tolerance: float,
    grade: float,
    states: int,
    work: int,
) -> Any:
    """Closing in one call: the least excess, its floor, which moves make it, and whether the search came to its end.

    The best groups alone at first; the others are seldom reached.
    """
    nothing = np.empty(0, dtype=np.int64)
    head, key, group_up, group_down, divisor = core_keys(item, penalty, size, grade)
    if divisor == 0:
        return min(excess, rate * slack), min(excess, rate * slack), nothing, True
    groups = key.size
    order, rest_up, rest_down = np.empty(0, dtype=np.int64), np.inf, np.inf
    if groups > SORTED_GROUPS:
        limit = smallest(key.copy(), SORTED_GROUPS - 1)
        order, first = np.empty(SORTED_GROUPS, dtype=np.int64), 0
        for group in range(groups):
            if key[group] <= limit and first < SORTED_GROUPS:
                order[first] = group
                first += 1
            else:
                rest_up, rest_down = min(rest_up, group_up[group]), min(rest_down, group_down[group])
        order = sorted_by(key, order[:first])
    else:
        order = sorted_by(key, np.arange(groups))
    left_over = slack % divisor
    slack -= left_over
    offset, given = rate * left_over, excess
    parents, moved = np.empty(1024, dtype=np.int64), np.empty(1024, dtype=np.int64)
    zero = np.zeros(1, dtype=np.int64)
    while True:
        start, _, _, core_penalty, core_size, up, down, place = core_order(
            head, order, item, to, penalty, size, group_up, group_down
        )
        for group in range(order.size + 1):
            up[group], down[group] = min(up[group], rest_up), min(down[group], rest_down)
        parents[0], moved[0], zero[0] = -1, -1, 0
        excess, best_state = given, -1
        if rate * slack + offset < excess:
            excess, best_state = rate * slack + offset, 0
        group, alive, _, _, parents, moved, _, excess, best_state = advance(
            start,
            core_penalty,
            core_size,
            up,
            down,
            0,
            zero,
            np.zeros(1),
            zero,
            parents,
            moved,
            1,
            slack,
            rate,
            False,
            offset,
            excess,
            tolerance,
            best_state,
            states,
            work,
        )
        if group < order.size or order.size == groups or alive.size == 0:
            break
        order, rest_up, rest_down = (
            sorted_by(key, np.arange(groups)),
            np.inf,
            np.inf,
        )  # the others matter after all: start again with all
    chosen = np.empty(groups, dtype=np.int64)
    count = 0
    while best_state > 0:
        chosen[count] = place[moved[best_state]]
        best_state = parents[best_state]
        count += 1
    return excess, excess - tolerance, chosen[:count], group == order.size or alive.size == 0


def _solve(
    loss: Any,
    cost: Any,
    limit: int,
    gap: float,
    rounding: float,
    tiny: float,
    direct: int,
    unsettled: int,
    sample: int,
    spreads: float,
    near: int,
    near_work: int,
    states: int,
    work: int,
) -> Any:
    """The whole of ``mckp.solve_table`` for tables that one bracket makes small enough, in one call.

    Returns a code (0: not for this function, 1: solved, 2: the last search did not end), the break solution with its
    rate, loss, slack and items near the break, and the best solution with its loss, bound and whether it is proven.
    """
    n = loss.shape[0]
    low, settled_cost, settled_loss = 0.0, 0, 0.0
    none, nowhere = np.empty(0, dtype=np.int32), np.empty(0, dtype=np.int64)
    nothing = (0, none, 0.0, 0.0, 0, nowhere, none, 0.0, 0.0, False)
    if n <= direct:
        choice, rows = cheapest(loss, cost), np.arange(n)
    else:
        picked = np.empty(sample, dtype=np.int64)
        first, left = 0, 0
        for i in range(sample):  # strata from i * n // sample on, without the division
            last, left = first + n // sample, left + n % sample
            if left >= sample:
                last, left = last + 1, left - sample
            fraction = i * GOLDEN
            picked[i] = first + int((fraction - np.floor(fraction)) * (last - first))
            first = last
        values, sizes = by_choice(loss, cost, picked)
        low, high = sampled_rates(values, sizes, limit * (sample / n), spreads, 0.0, np.inf)
        high = high if high < np.inf else 1.0
        width = min(max(high / low, 1.01), 4.0) if low > 0.0 else 4.0
        for _ in range(4):
            choice, rows, cost_low, cost_high, settled_cost, settled_loss = bracket(loss, cost, low, high)
            if cost_high > limit:
                low, high = high, high * width
            elif cost_low <= limit and low > 0.0:
                low, high = low / width, low
            else:
                break
        if cost_high > limit or (cost_low <= limit and low > 0.0) or rows.size > unsettled:
            return nothing
    values, sizes = by_choice(loss, cost, rows)
    base = choice[rows]
    slack = limit - settled_cost
    for i in range(rows.size):
        slack -= sizes[base[i], i]
    if slack < 0:
        return nothing
    inner, missed, _, _, _, rate = fill(values, sizes, base, low, slack)
    if missed < 0 and low > 0.0:
        return nothing
    slack, total = limit - settled_cost, settled_loss
    for start in range(0, rows.size, BLOCK):
        block_loss = 0.0
        for i in range(start, min(start + BLOCK, rows.size)):
            choice[rows[i]] = inner[i]
            slack -= sizes[inner[i], i]
            block_loss += values[inner[i], i]
        total += block_loss
    dual = total - rate * slack
    if total - dual <= max(rounding, gap) * abs(total):
        proven = total - dual <= rounding * abs(total)
        return 1, choice, rate, total, slack, rows, choice, total, total if proven else dual, proven
    tolerance = max(rounding, gap / 2) * abs(total)
    grade = tiny * rate
    item, to, penalty, size = near_moves(values, sizes, inner, rate, slack, rate * slack, near)
    _, _, chosen, _ = search(item, to, penalty, size, rate, slack, rate * slack, tolerance, grade, states, near_work)
    best, best_loss, changed = choice, total, 0.0
    for move in chosen:
        changed += values[to[move], item[move]] - values[inner[item[move]], item[move]]
    if chosen.size > 0 and total + changed < total:
        best, best_loss = choice.copy(), total + changed
        for move in chosen:
            best[rows[item[move]]] = to[move]
    if best_loss - dual <= max(rounding, gap) * abs(best_loss):
        proven = best_loss - dual <= rounding * abs(best_loss)
        return 1, choice, rate, total, slack, rows, best, best_loss, best_loss if proven else dual, proven
    excess = best_loss - dual
    tolerance = max(rounding, 0.999 * gap) * min(abs(best_loss), abs(dual))  # the best loss may still fall
    item, to, penalty, size = moves(loss, cost, choice, rate, excess - tolerance)
    _, floor, chosen, ended = search(item, to, penalty, size, rate, slack, excess, tolerance, grade, states, work)
    if not ended:
        return 2, choice, rate, total, slack, rows, best, best_loss, dual, False
    changed = 0.0
    for move in chosen:
        row = item[move]
        changed += np.float64(loss[row, to[move]]) - np.float64(loss[row, choice[row]])
    if chosen.size > 0 and total + changed < best_loss:
        best, best_loss = choice.copy(), total + changed
        for move in chosen:
            best[item[move]] = to[move]
    floor = min(dual + max(floor, 0.0), best_loss)
    proven = gap == 0.0 or best_loss - floor <= rounding * abs(best_loss)
    return 1, choice, rate, total, slack, rows, best, best_loss, best_loss if proven else floor, proven


def _by_choice(loss: Any, cost: Any, rows: Any) -> Any:
    """Some rows of both tables as ``[k, m]``."""
    k, m = loss.shape[1], rows.size
    values, sizes = np.empty((k, m)), np.empty((k, m), dtype=np.int64)
    for j in range(k):
        losses, costs = loss[:, j], cost[:, j]
        for i in range(m):
            values[j, i], sizes[j, i] = losses[rows[i]], costs[rows[i]]
    return values, sizes


total_at = _jit(_total_at)
search_rate = _jit(_search_rate)
sampled_rates = _jit(_sampled_rates)
bracket = _jit(_bracket)
by_choice = _jit(_by_choice)
moves = _jit(_moves)
totals = _jit(_totals)
cheapest = _jit(_cheapest)
hulls = _jit(_hulls)
wide_hulls = _jit(passes.wide_hulls)
wrapped = _jit(_wrapped)
fill = _jit(_fill)
smallest = _jit(_smallest)
sorted_by = _jit(_sorted_by)
near_moves = _jit(_near_moves)
core_keys = _jit(_core_keys)
core_order = _jit(_core_order)
advance = _jit(_advance)
search = _jit(_search)
solve = _jit(_solve)
