from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mpqsearch.core import Budget, LayerTable, Policy, QuantFormat, SensitivityProfile
from mpqsearch.errors import ConfigError
from mpqsearch.methods import MethodSpec
from mpqsearch.profile import CalibrationSpec, race_final_errors, relative_error, stability
from mpqsearch.profile import measure as measure_module
from mpqsearch.sampling import SamplerSpec
from tests.support import tiny_profile, tiny_table

WIDTHS = (2, 3, 4)
POLICY = Policy(widths=WIDTHS, roles={})
METHOD = MethodSpec(name="m", allocator="ilp-layer", loss="probe", scheme="auto")


def case(totals: np.ndarray, relative: np.ndarray) -> tuple[LayerTable, SensitivityProfile]:
    """Layers of equal size with given totals ``[L]`` at 2 bits (a quarter at each further bit) and relative standard
    errors ``[L]``."""
    table = tiny_table(n_layers=len(totals), fan_in=16)
    layers = tuple(replace(la, weight_shape=(6, 16)) for la in table)
    table = replace(table, layers=layers)
    values = (totals[:, None] * np.array([1.0, 0.25, 0.0625])).astype(np.float32)
    profile = tiny_profile(table, WIDTHS)
    arrays = {
        **profile.arrays,
        "layer_probe_error/auto": values,
        "layer_probe_std_error/auto": (values * relative[:, None]).astype(np.float32),
    }
    return table, replace(profile, arrays=arrays)


def test_only_layers_whose_noise_changes_the_answer_are_undecided() -> None:
    # Half the bits: the two large layers take 4 bits, the two small ones 2; the middle pair competes within its noise.
    totals = np.array([1e4, 1e4, 1.0, 1.05, 1e-4, 1e-4])
    table, profile = case(totals, np.array([0.1, 0.1, 0.5, 0.5, 0.1, 0.1]))
    exact, _ = case(totals, np.zeros(6)), None
    budget = Budget(quantity="uniform_bits", limit=3)
    found = stability(profile, table, POLICY, METHOD, [budget], QuantFormat(scheme="auto"), draws=40)
    assert (found.undecided[[0, 1, 4, 5]] == 0).all()
    calm = stability(exact[1], exact[0], POLICY, METHOD, [budget], QuantFormat(scheme="auto"), draws=5)
    assert calm.settled(0.0)
    assert (calm.undecided == 0).all()
    assert calm.agreement == pytest.approx(1.0)


def test_noise_of_a_close_pair_is_seen_and_is_cheap() -> None:
    # One more 8-bit step than layers want: two equal layers compete for it, so a coin decides and either answer is as
    # good.
    totals = np.array([1.0, 1.0])
    table, profile = case(totals, np.array([0.3, 0.3]))
    sizes = Budget(quantity="uniform_bits", limit=2.5)
    found = stability(profile, table, POLICY, METHOD, [sizes], QuantFormat(scheme="auto"), draws=60, seed=1)
    assert 0.2 < found.undecided[0] < 0.8
    assert found.undecided[0] == pytest.approx(found.undecided[1])
    assert found.regret[0] == pytest.approx(0.0, abs=1e-9)
    with pytest.raises(ConfigError, match="standard errors"):
        stability(profile, table, POLICY, replace(METHOD, loss="weight"), [sizes], QuantFormat(scheme="auto"))


def test_relative_error_weighs_layers_by_their_share() -> None:
    _, profile = case(np.array([99.0, 1.0]), np.array([0.1, 5.0]))
    assert relative_error(profile) == pytest.approx(np.sqrt(0.99 * 0.01 + 0.01 * 25), rel=1e-4)


def test_a_race_gives_seeds_to_undecided_layers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Synthetic final errors: one layer far above, a close pair, one far below; the oracle is the known truth of
    each."""
    truth = np.array([1e3, 1.0, 1.1, 1e-4])
    table, profile = case(truth, np.full(4, 0.1))
    profile = replace(profile, calibration={"spec": {"schemes": ["auto"]}})
    drawn = dict.fromkeys((la.name for la in table), 0)
    noise = np.array([0.6, 1.4])  # of alternating seeds, so that every mean is the truth and only the spread is left

    def fake(*_args: object, known: dict, wanted: dict, **_rest: object) -> dict:
        found = dict(known)
        for i, layer in enumerate(table):
            for bits in WIDTHS:
                have = tuple(found.get((layer.name, bits), ()))
                fresh = truth[i] * 4.0 ** (2 - bits) * noise[np.arange(len(have), wanted[layer.name]) % 2]
                found[layer.name, bits] = have + tuple(fresh)
            drawn[layer.name] = len(found[layer.name, 2])
        return found

    monkeypatch.setattr(measure_module, "final_errors", fake)
    budget = Budget(quantity="uniform_bits", limit=2.75)

    def undecided(measured: SensitivityProfile) -> tuple[list[str], bool]:
        found = stability(
            measured,
            table,
            POLICY,
            replace(METHOD, loss="final"),
            [budget],
            QuantFormat(scheme="auto"),
            draws=30,
            seed=3,
        )
        return [n for n, share in zip(measured.names, found.undecided, strict=True) if share > 0], found.settled(0.0)

    spec = CalibrationSpec(final_widths=WIDTHS, final_seeds=64, schemes=("auto",))
    race_final_errors(None, table, profile, SamplerSpec(), spec, QuantFormat(), undecided)  # type: ignore[arg-type]
    names = [la.name for la in table]
    assert drawn[names[0]] == 2
    assert drawn[names[3]] == 2
    assert max(drawn[names[1]], drawn[names[2]]) > 2
