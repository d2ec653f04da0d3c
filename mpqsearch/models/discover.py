"""Which layers a model has, what they do, and what stays at full precision."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from mpqsearch.core import KeptParameter, LayerSpec, LayerTable
from mpqsearch.errors import ModelError
from mpqsearch.models.calls import Call
from mpqsearch.models.denoiser import Denoiser
from mpqsearch.models.hooks import PLAIN_LAYERS
from mpqsearch.models.observe import TRANSPOSED, Seen, observe
from mpqsearch.models.runner import parts_of
from mpqsearch.sources import kind_of

log = logging.getLogger("mpqsearch")

_ROLES = (
    ("time", re.compile(r"time_emb|timestep_emb|time_proj|temb|\btime_embedding|(?<![a-z])t_embedder|time_text_embed")),
    ("class", re.compile(r"class_emb|label_emb|class_proj|add_embedding|guidance_embed")),
    (
        "norm",
        re.compile(
            r"(^|\.)(norm\w*|adaln\w*|adaLN\w*|scale_shift\w*)\.(linear|proj|\d+)|adaLN_modulation|adaln_single\.linear"
            r"|^proj_out_1$"
        ),
    ),
    ("shortcut", re.compile(r"shortcut|skip_connection|nin_shortcut|\.skip$|residual_conv")),
    ("resample", re.compile(r"downsample|upsample|\.op$|upsampler|downsampler|(up|down)_sample|(up|down)scalers")),
    (  # before attention: the U-Nets of diffusers call a whole transformer block ``attentions``
        "feed-forward",
        re.compile(
            r"^(?!.*attn\d?\.).*(\.ff\.|\.ff_|\.ffn\.|mlp|feed_forward|\.net\.\d|DenseReluDense|\.(gate|up|down)_proj$)"
        ),
    ),
    ("attention", re.compile(r"attn|attention|\.to_(q|k|v|out)|qkv|add_[qkv]_proj|kv_mapper")),
)
_OWN_TIME = re.compile(r"(time_emb|time_proj|timestep|(?<![a-z])t_embedder)\w*(\.\w+)?$")
_MODULATION = re.compile(
    r"norm|adaln|modul|_mod\.|film|scale_bias|scale_shift|gamma|beta|context_mlp|mapper|time_mod", re.IGNORECASE
)
_SKIP = re.compile(r"skip_linear|skip_proj|skip_layer|skip_connection|linear_skip|long_skip")
_APART = "its weight is used without calling the layer, so its input cannot be measured: kept at full precision"
_FIRST = re.compile(
    r"^(nets\.\d+\.)?(conv_in|pos_embed\.proj|x_embedder(\.proj)?|x_embedders\.image|proj_in(_conv)?|img_in"
    r"|patch_embed\w*(\.proj)?|input_blocks\.0\.0|visual_embeddings\.in_layer|all_x_embedder\.[\d-]+"
    r"|embedding\.1|continuous_inputs_projection|down_blocks\.0\.resnets\.0\.conv_in\.conv1d)$"
)
_LAST = re.compile(
    r"^(nets\.\d+\.)?(conv_out|proj_out(_2|_conv)?|out\.2|final_layer\.linear|out_layer\.out_layer"
    r"|all_final_layer\.[\d-]+\.linear|controlnet_mid_block|controlnet_(single_)?blocks\.\d+"
    r"|control_layers\.\d+\.after_proj|clf\.1|spec_out)$"
)
"""Layers that take the sample in and give the prediction out, as the classes of diffusers name them."""


def discover(denoiser: Denoiser, *, examples: Sequence[Call] | None = None) -> LayerTable:
    """All weight layers in the order of one forward pass, with MACs for one sample; every other parameter with its
    reason.

    The model runs once on each of ``examples`` (default: those of its runner; empty: it does not run). Layers that do
    not run get the role ``unused``, and layers whose weight is used without calling them are kept, since their input
    cannot be seen. Without a run MACs are 0 and roles go by names and shapes. Raises `ModelError` when the model has no
    weight layer.
    """
    calls = denoiser.runner.examples(denoiser.module) if examples is None else examples
    return table_of(denoiser.module, calls, name=denoiser.name, digest=denoiser.digest)


def table_of(module: nn.Module, calls: Sequence[Call], *, name: str, digest: str = "") -> LayerTable:
    """What `discover` says, of a module that may be on the device ``meta``."""
    modules, borrowers = _owners(module)
    if not modules:
        raise ModelError(f"{name} has no convolution and no linear layer: there is nothing to quantize")
    seen = observe(module, modules, calls) if calls else Seen()
    apart = {n: m for n, m in modules.items() if n not in seen.macs and n in seen.used}
    layers = {n: modules[n] for n in [*seen.macs, *(n for n in modules if n not in seen.macs and n not in apart)]}
    if not layers:
        raise ModelError(f"{name}: every weight is used without calling its layer, so no input can be measured")
    channels = calls[0].sample.shape[1] if calls else 0
    roles: dict[str, str] = {}
    for part in parts_of(module):
        inner = {n: n.removeprefix(f"{part}.") for n in layers if not part or n.startswith(f"{part}.")}
        if kind := kind_of(part):
            roles |= dict.fromkeys(inner, kind)
            continue
        roles |= {n: _role_seen(n, _role(short, modules[n]), seen) for n, short in inner.items()}
        roles |= _ends(inner, modules, seen, channels)
    unused = [n for n in layers if n not in seen.macs] if calls else []
    if unused:
        log.warning(
            "%s: %d layers did not run on the examples and are held at 8 bits, such as %s", name, len(unused), unused[0]
        )
    return LayerTable(
        digest=digest,
        layers=tuple(
            _spec(
                n,
                m,
                seen.macs.get(n, 0),
                "unused" if n in unused else roles[n],
                seen.fuse.get(n, ""),
            )
            for n, m in layers.items()
        ),
        kept=(*borrowers, *_kept(module, layers, apart)),
        model=name,
    )


def _role_seen(name: str, by_name: str, seen: Seen) -> str:
    """The role by name, corrected by what a run showed."""
    if by_name in ("shortcut", "linear", "conv") and (name in seen.joined or _SKIP.search(name)):
        return "skip"
    if by_name == "time" and _OWN_TIME.search(name):
        return by_name
    if by_name in ("time", "linear", "conv", "feed-forward") and name in seen.conditional:
        return "norm" if by_name != "time" and _MODULATION.search(name) else seen.conditional[name]
    return "linear" if by_name == "time" and name in seen.tokens else by_name


def _spec(name: str, module: nn.Module, macs: int, role: str, fuse: str = "") -> LayerSpec:
    weight: Tensor = module.weight  # type: ignore[assignment]
    transposed = isinstance(module, TRANSPOSED)
    kind = next(base.__name__ for base in type(module).__mro__ if base in PLAIN_LAYERS)
    return LayerSpec(
        name=name,
        kind=kind,
        weight_shape=tuple(weight.shape),
        channel_axis=1 if transposed else 0,
        groups=int(getattr(module, "groups", 1)),
        macs=macs,
        role=role,
        has_bias=getattr(module, "bias", None) is not None,
        fuse=fuse,
    )


def _role(name: str, module: nn.Module) -> str:
    for role, pattern in _ROLES:
        if pattern.search(name):
            return role
    return "linear" if isinstance(module, nn.Linear) else "conv"


def _ends(inner: Mapping[str, str], modules: Mapping[str, nn.Module], seen: Seen, channels: int) -> dict[str, str]:
    """The layer of a part that takes the sample in (``first``) and the one that gives the prediction out (``last``): by
    name, else by what was seen, else by shape and order. ``inner``: the part's layers, with their names in it."""
    order = list(inner)
    if not order:
        return {}
    ran = [n for n in seen.macs if n in inner] or order
    first = next((n for n in order if n in ran and _FIRST.match(inner[n])), None)
    first = first or next((n for n in seen.takes if n in inner), None)
    first = first or next((n for n in order if channels and _inputs(modules[n]) == channels), None)
    first = first or next((n for n in order if _role(inner[n], modules[n]) not in ("time", "class")), order[0])
    last = next((n for n in reversed(order) if n in ran and _LAST.match(inner[n])), None)
    last = last or next((n for n in reversed(order) if n in seen.gives), None) or ran[-1]
    return {first: "first", last if last != first else order[-1]: "last"}


def _inputs(module: nn.Module) -> int:
    return int(getattr(module, "in_channels", getattr(module, "in_features", 0)))


def _owners(model: nn.Module) -> tuple[dict[str, nn.Module], list[KeptParameter]]:
    """Weight layers by name, and the layers that only borrow the weight of another: it is quantized and stored once."""
    owner: dict[int, str] = {}
    modules: dict[str, nn.Module] = {}
    borrowers: list[KeptParameter] = []
    for name, module in model.named_modules():
        # A weight that is computed as the layer runs is no parameter: what it is computed from stays as it is.
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if not isinstance(module, PLAIN_LAYERS) or weight is None or not weight.numel():
            continue
        first = owner.setdefault(id(weight), name)
        if first == name:
            modules[name] = module
        else:
            borrowers.append(KeptParameter(name=f"{name}.weight", n_values=0, reason=f"shares the weight of {first}"))
    return modules, borrowers


def _kept(model: nn.Module, layers: dict[str, nn.Module], apart: dict[str, nn.Module]) -> Iterator[KeptParameter]:
    quantized = {id(m.weight) for m in layers.values()}
    unseen = {id(m.weight) for m in apart.values()}
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) in quantized or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            name = f"{module_name}.{key}" if module_name else key
            yield KeptParameter(
                name=name,
                n_values=parameter.numel(),
                reason=_APART if id(parameter) in unseen else _reason(module, key, name),
            )
    parameters = {id(p) for p in model.parameters()}
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor) and id(value) not in parameters and id(value) not in seen:
            seen.add(id(value))
            yield KeptParameter(name=name, n_values=value.numel(), reason="persistent buffer")


def _reason(module: nn.Module, key: str, name: str) -> str:
    if isinstance(module, PLAIN_LAYERS):
        return "bias" if key == "bias" else "a weight is computed from it as the layer runs"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding table"
    if re.search(r"norm", type(module).__name__, re.IGNORECASE):
        return "normalization"
    if key == "bias":
        return "bias"
    log.warning(
        "%s (%s) holds weights that no quantizer here knows; they stay at full precision and are counted so",
        name,
        type(module).__name__,
    )
    return f"unknown module {type(module).__name__}: kept at full precision"
