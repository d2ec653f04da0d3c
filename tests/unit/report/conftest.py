"""A study that looks like a real one, made without a model."""

from __future__ import annotations

import numpy as np
import pytest

from mpqsearch.core import (
    BitMap,
    KeptParameter,
    LayerSpec,
    LayerTable,
    MetricValue,
    Policy,
    SensitivityProfile,
    StudyRecord,
    average_bits,
    size_bytes,
    uniform_map,
)

METHODS = {"uniform": 1.0, "random": 1.6, "omq": 0.9, "ilp": 0.45, "exact-channel": 0.33}


def make_table() -> LayerTable:
    rng = np.random.default_rng(0)
    layers = [LayerSpec(name="conv_in", kind="Conv2d", weight_shape=(16, 1, 3, 3), role="first", macs=1000)]
    roles = ["conv", "shortcut", "attention", "feed-forward", "time", "resample"]
    for i in range(24):
        out = int(rng.choice([16, 32, 48]))
        kind = "Linear" if i % 3 == 0 else "Conv2d"
        shape = (out, 64) if kind == "Linear" else (out, 32, 3, 3)
        layers.append(
            LayerSpec(
                name=f"blocks.{i // 4}.resnets.{i % 4}.layer{i}", kind=kind, weight_shape=shape, role=roles[i % 6]
            )
        )
    layers.append(LayerSpec(name="conv_out", kind="Conv2d", weight_shape=(1, 16, 3, 3), role="last"))
    kept = (
        KeptParameter(name="norm.weight", n_values=320, reason="a norm"),
        KeptParameter(name="biases", n_values=800, reason="a bias"),
    )
    return LayerTable(digest="d" * 64, layers=tuple(layers), kept=kept, model="fmnist-unet")


def make_map(table: LayerTable, policy: Policy, bits: int, *, mixed: bool = False, seed: int = 0) -> BitMap:
    rng = np.random.default_rng(seed)
    weights = dict(uniform_map(table, policy, bits).weights)
    for layer in table:
        if policy.fixed_width(layer) is None:
            low, high = max(1, bits - 1), min(8, bits + 2)
            shape = layer.n_channels if mixed else ()
            weights[layer.name] = np.asarray(rng.integers(low, high, endpoint=True, size=shape), dtype=np.uint8)
    return BitMap(model_digest=table.digest, weights=weights)


def metric(name: str, value: float, spread: float = 0.12, *, higher: bool = False) -> MetricValue:
    return MetricValue(
        name=name,
        value=value,
        n_samples=2048,
        seeds="0..2047",
        extractor="fmnist-cnn@1a2b3c4d",
        reference="full-precision samples of the same noise" if "FP" in name else "training images",
        low=value - spread * abs(value),
        high=value + spread * abs(value),
        spread="bootstrap",
        higher_is_better=higher,
    )


def make_records(table: LayerTable, policy: Policy) -> list[StudyRecord]:
    records = [
        StudyRecord(
            model="fmnist-unet",
            method="full-precision",
            granularity="layer",
            budget="",
            quantity="",
            average_bits=16.0,
            size_bytes=table.n_parameters * 2,
            act_bits=16.0,
            bit_map_digest="",
            n_samples=2048,
            seeds="0..2047",
            seconds=61.0,
            predicted_loss=0.0,
            metrics={"fd_data": metric("FD[fmnist-cnn@1a2b3c4d]-128 vs data", 3.1, 0.05)},
        )
    ]
    for bits in (2, 3, 4, 5, 6):
        for i, (method, factor) in enumerate(METHODS.items()):
            bit_map = make_map(table, policy, bits, mixed=method in ("omq", "exact-channel"), seed=i)
            fd = float(900 * factor * 4.0 ** (-(bits - 1)) * (1 + 0.1 * np.sin(bits * 3 + i)))
            records.append(
                StudyRecord(
                    model="fmnist-unet",
                    method=method,
                    granularity="channel" if bit_map.granularity == "channel" else "layer",
                    budget=f"uniform:{bits}",
                    quantity="uniform_bits",
                    average_bits=average_bits(table, bit_map),
                    size_bytes=size_bytes(table, bit_map),
                    act_bits=16.0,
                    bit_map_digest=bit_map.digest,
                    n_samples=2048,
                    seeds="0..2047",
                    seconds=58.0 + i,
                    predicted_loss=float("nan")
                    if method == "random" and bits == 6
                    else float(fd * 0.01 * (1 + 0.3 * np.cos(i))),
                    metrics={
                        "fd_fp": metric("FD[fmnist-cnn@1a2b3c4d]-128 vs FP", fd),
                        "fd_data": metric("FD[fmnist-cnn@1a2b3c4d]-128 vs data", fd * 0.8 + 3.0, 0.06),
                        "paired_psnr": metric(
                            "PSNR vs FP (dB)", float(8 + 5 * bits - 3 * np.log(factor)), 0.02, higher=True
                        ),
                        "kid_data": metric("KID[fmnist-cnn@1a2b3c4d]-128 vs data", fd * 1e-4 - 0.0003, 0.2),
                    },
                )
            )
    return records


def make_profile(table: LayerTable) -> SensitivityProfile:
    rng = np.random.default_rng(1)
    channels = tuple(la.n_channels for la in table)
    n = sum(channels)
    widths = tuple(range(1, 9))
    error = rng.lognormal(0, 1, (n, 1)) * 4.0 ** -np.array(widths)[None]
    layer_sensitivity = np.repeat(rng.lognormal(0, 1.5, len(channels)), channels)
    return SensitivityProfile(
        model_digest=table.digest,
        names=tuple(la.name for la in table),
        channels=channels,
        widths=widths,
        arrays={
            "output_error/asymmetric": error.astype(np.float32),
            "output_error_corrected/asymmetric": (0.9 * error).astype(np.float32),
            "sensitivity": (layer_sensitivity * rng.lognormal(0, 0.3, n)).astype(np.float32),
            "kurtosis": np.full(n, 3.0, np.float32),
        },
    )


@pytest.fixture(scope="session")
def table() -> LayerTable:
    return make_table()


@pytest.fixture(scope="session")
def policy() -> Policy:
    return Policy()


@pytest.fixture(scope="session")
def records(table: LayerTable, policy: Policy) -> list[StudyRecord]:
    return make_records(table, policy)


@pytest.fixture(scope="session")
def profile(table: LayerTable) -> SensitivityProfile:
    return make_profile(table)
