"""The names that weights have outside diffusers: those of the code that a model was published with.

diffusers renames a checkpoint when it loads it, joins and splits projections, and swaps the halves of some modulations
(`diffusers.loaders.single_file_utils`, one way only). Here is the way back, for the architectures of `SCHEMES`: each is
a list of expressions that are replaced one after another in a name of diffusers. Where several layers become one, as q,
k and v, the new name says which part of it each is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from mpqsearch.core import LayerTable

if TYPE_CHECKING:
    from torch import Tensor, nn

T = TypeVar("T")

PREFIX = "model.diffusion_model."
"""Stands before the names of a denoiser in checkpoints of whole pipelines."""

SWAPPED = "~"
"""The part of a tensor whose two halves lie the other way round in diffusers."""

PARTS = "qkvm"
"""Parts of a tensor that diffusers splits, in their order: queries, keys, values and what a feed-forward takes."""

Rules = Sequence[tuple[str, str]]

_END = re.compile(r"\.(weight|bias|scale)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a tensor of diffusers lies in a published checkpoint: the ``name`` there, and which part of it."""

    name: str
    part: str = ""


def places(keys: Iterable[str]) -> dict[str, Place] | None:
    """Where each of a model's parameters lies, by their names in diffusers; None for an unknown architecture.

    An architecture is known by all its names: every one must be one that a published checkpoint has. Those of the
    weights of its layers are enough.
    """
    keys = list(keys)
    for rules, names in SCHEMES.values():
        expressions = [(re.compile(pattern), to) for pattern, to in rules(set(keys))]
        found = {key: _place(key, expressions) for key in keys}
        if all(re.fullmatch(names, _END.sub("", place.name)) for place in found.values()):
            return found
    return None


def layer_places(table: LayerTable) -> dict[str, Place]:
    """Where the weight of each layer lies, by the name of the layer there; as it is called here for an unknown
    architecture."""
    found = places(f"{la.name}.weight" for la in table)
    if found is None:
        return {la.name: Place(name=la.name) for la in table}
    plain = {key.removesuffix(".weight"): place for key, place in found.items()}
    return {n: Place(name=p.name.removesuffix(".weight"), part=p.part) for n, p in plain.items()}


def places_of(module: nn.Module) -> dict[str, Place]:
    """`places` of a model; where its parameters are called as in diffusers for an unknown architecture."""
    keys = list(module.state_dict())
    return places(keys) or {key: Place(name=key) for key in keys}


def tied(table: LayerTable) -> list[tuple[str, ...]]:
    """Layers that are joined, two or more, into one of the published checkpoint."""
    return [group for group in fused(table) if len(group) > 1]


def fused(table: LayerTable) -> list[tuple[str, ...]]:
    """Layers that are one layer in the published checkpoint, in the order of their parts."""
    parts: dict[str, list[tuple[str, str]]] = {}
    for name, place in layer_places(table).items():
        parts.setdefault(place.name, []).append((place.part, name))
    joined = [sorted(found, key=lambda entry: PARTS.find(entry[0])) for found in parts.values()]
    return [tuple(name for _, name in found) for found in joined]


def in_diffusers(values: Mapping[str, T], table: LayerTable) -> dict[str, T]:
    """Values by the names of layers in a file, by the names that these have here. A layer that is split here gives its
    value to all parts; what no layer here stands for keeps its name."""
    plain = {n.removeprefix(PREFIX): value for n, value in values.items()}
    if all(n in table.by_name for n in plain):
        return plain
    here: dict[str, list[str]] = {}
    for name, place in layer_places(table).items():
        here.setdefault(place.name, []).append(name)
    return {name: value for there, value in plain.items() for name in here.get(there, [there])}


def joined(tensors: Mapping[str, Tensor], found: Mapping[str, Place]) -> dict[str, Tensor]:
    """Tensors by their names in diffusers as they lie in the published checkpoint, by the names there."""
    import torch

    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for key, tensor in tensors.items():
        place = found[key]
        whole = swapped(tensor) if place.part == SWAPPED else tensor
        parts.setdefault(place.name, []).append((PARTS.find(place.part), whole))
    ordered = {name: [t for _, t in sorted(group, key=lambda part: part[0])] for name, group in parts.items()}
    return {name: group[0] if len(group) == 1 else torch.cat(group) for name, group in ordered.items()}


def separated(tensors: Mapping[str, Tensor], found: Mapping[str, Place], rows: Mapping[str, int]) -> dict[str, Tensor]:
    """The inverse of `joined`, for the parameters with so many ``rows`` whose tensors are there."""
    import torch

    members: dict[str, list[str]] = {}
    for key in sorted(rows, key=lambda key: PARTS.find(found[key].part)):
        members.setdefault(found[key].name, []).append(key)
    out: dict[str, Tensor] = {}
    for name in members.keys() & tensors.keys():
        keys, whole = members[name], tensors[name]
        if found[keys[0]].part == SWAPPED:
            whole = swapped(whole)
        if len(keys) == 1:
            out[keys[0]] = whole
        elif len(whole) == sum(rows[key] for key in keys):
            out |= dict(zip(keys, torch.split(whole, [rows[key] for key in keys]), strict=True))
    return out


def swapped(tensor: Tensor) -> Tensor:
    """A tensor with its two halves exchanged."""
    import torch

    return torch.cat(list(tensor.chunk(2))[::-1])  # a list, as the blocks of GGUF in diffusers need it


def _place(key: str, rules: Sequence[tuple[re.Pattern[str], str]]) -> Place:
    for pattern, replacement in rules:
        key = pattern.sub(replacement, key)
    name, _, rest = key.partition("@")
    part, dot, end = rest.partition(".")
    return Place(name=name + dot + end, part=part)


def _embedder(name: str, first: str, second: str) -> list[tuple[str, str]]:
    """The two layers of an embedding of time or text."""
    return [(rf"^{name}\.linear_1\.", f"{first}."), (rf"^{name}\.linear_2\.", f"{second}.")]


def _in_out(name: str) -> tuple[str, str]:
    return f"{name}.in_layer", f"{name}.out_layer"


def _flux(_: set[str]) -> Rules:
    times = (("timestep", "time_in"), ("text", "vector_in"), ("guidance", "guidance_in"))
    return [
        *(rule for n, to in times for rule in _embedder(rf"time_text_embed\.{n}_embedder", *_in_out(to))),
        *_flux_blocks("net.0.proj", "net.2"),
        (r"\.norm1\.linear\.", ".img_mod.lin."),
        (r"\.norm1_context\.linear\.", ".txt_mod.lin."),
        (r"^(single_blocks\.\d+)\.norm\.linear\.", r"\1.modulation.lin."),
        (r"^(single_blocks\.\d+)\.attn\.to_([qkv])\.", r"\1.linear1@\2."),
        (r"^(single_blocks\.\d+)\.proj_mlp\.", r"\1.linear1@m."),
        (r"^(single_blocks\.\d+)\.proj_out\.", r"\1.linear2."),
    ]


def _flux2(_: set[str]) -> Rules:
    times = (("timestep", "time_in"), ("guidance", "guidance_in"))
    return [
        *(rule for n, to in times for rule in _embedder(rf"time_guidance_embed\.{n}_embedder", *_in_out(to))),
        *_flux_blocks("linear_in", "linear_out"),
        (r"^((?:double|single)_stream_modulation\w*)\.linear\.", r"\1.lin."),
        (r"^(single_blocks\.\d+)\.attn\.to_qkv_mlp_proj\.", r"\1.linear1."),
        (r"^(single_blocks\.\d+)\.attn\.to_out\.", r"\1.linear2."),
    ]


def _flux_blocks(first: str, second: str) -> Rules:
    """What FLUX.1 and FLUX.2 share; the layers of a feed-forward are ``first`` and ``second``."""
    sides = (
        ("to_([qkv])", "to_out.0", "norm_", "ff", "img"),
        ("add_([qkv])_proj", "to_add_out", "norm_added_", "ff_context", "txt"),
    )
    rules = [
        (r"^context_embedder\.", "txt_in."),
        (r"^x_embedder\.", "img_in."),
        (r"^proj_out\.", "final_layer.linear."),
        (r"^norm_out\.linear\.", f"final_layer.adaLN_modulation.1@{SWAPPED}."),
        (r"^single_transformer_blocks\.", "single_blocks."),
        (r"^transformer_blocks\.", "double_blocks."),
        (r"^(single_blocks\.\d+)\.attn\.norm_q\.weight", r"\1.norm.query_norm.scale"),
        (r"^(single_blocks\.\d+)\.attn\.norm_k\.weight", r"\1.norm.key_norm.scale"),
    ]
    for project, out, norm, forward, side in sides:
        rules += [
            (rf"^(double_blocks\.\d+)\.attn\.{project}\.", rf"\1.{side}_attn.qkv@\2."),
            (rf"^(double_blocks\.\d+)\.attn\.{re.escape(out)}\.", rf"\1.{side}_attn.proj."),
            (rf"^(double_blocks\.\d+)\.attn\.{norm}q\.weight", rf"\1.{side}_attn.norm.query_norm.scale"),
            (rf"^(double_blocks\.\d+)\.attn\.{norm}k\.weight", rf"\1.{side}_attn.norm.key_norm.scale"),
            (rf"^(double_blocks\.\d+)\.{forward}\.{re.escape(first)}\.", rf"\1.{side}_mlp.0."),
            (rf"^(double_blocks\.\d+)\.{forward}\.{re.escape(second)}\.", rf"\1.{side}_mlp.2."),
        ]
    return rules


def _sd3(keys: set[str]) -> Rules:
    last = max((int(key.split(".")[1]) for key in keys if key.startswith("transformer_blocks.")), default=0)
    rules = [
        (r"^pos_embed\.pos_embed$", "pos_embed"),
        (r"^pos_embed\.proj\.", "x_embedder.proj."),
        *_embedder(r"time_text_embed\.timestep_embedder", "t_embedder.mlp.0", "t_embedder.mlp.2"),
        *_embedder(r"time_text_embed\.text_embedder", "y_embedder.mlp.0", "y_embedder.mlp.2"),
        (r"^proj_out\.", "final_layer.linear."),
        (r"^norm_out\.linear\.", f"final_layer.adaLN_modulation.1@{SWAPPED}."),
        (r"^transformer_blocks\.", "joint_blocks."),
        (r"\.norm1\.linear\.", ".x_block.adaLN_modulation.1."),
        (rf"^(joint_blocks\.{last})\.norm1_context\.linear\.", rf"\1.context_block.adaLN_modulation.1@{SWAPPED}."),
        (r"\.norm1_context\.linear\.", ".context_block.adaLN_modulation.1."),
        (r"\.(attn2?)\.to_([qkv])\.", r".x_block.\1.qkv@\2."),
        (r"\.attn\.add_([qkv])_proj\.", r".context_block.attn.qkv@\1."),
        (r"\.attn\.norm_added_([qk])\.", r".context_block.attn.ln_\1."),
        (r"\.(attn2?)\.norm_([qk])\.", r".x_block.\1.ln_\2."),
        (r"\.(attn2?)\.to_out\.0\.", r".x_block.\1.proj."),
        (r"\.attn\.to_add_out\.", ".context_block.attn.proj."),
    ]
    for forward, side in (("ff", "x_block"), ("ff_context", "context_block")):
        rules += [
            (rf"\.{forward}\.net\.0\.proj\.", f".{side}.mlp.fc1."),
            (rf"\.{forward}\.net\.2\.", f".{side}.mlp.fc2."),
        ]
    return rules


def _wan(_: set[str]) -> Rules:
    return [
        *_embedder(r"condition_embedder\.time_embedder", "time_embedding.0", "time_embedding.2"),
        *_embedder(r"condition_embedder\.text_embedder", "text_embedding.0", "text_embedding.2"),
        (r"^condition_embedder\.time_proj\.", "time_projection.1."),
        (r"^condition_embedder\.image_embedder\.norm1\.", "img_emb.proj.0."),
        (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj\.", "img_emb.proj.1."),
        (r"^condition_embedder\.image_embedder\.ff\.net\.2\.", "img_emb.proj.3."),
        (r"^condition_embedder\.image_embedder\.norm2\.", "img_emb.proj.4."),
        (r"^scale_shift_table$", "head.modulation"),
        (r"^proj_out\.", "head.head."),
        (r"\.scale_shift_table$", ".modulation"),
        (r"\.attn1\.", ".self_attn."),
        (r"\.attn2\.", ".cross_attn."),
        (r"\.to_out\.0\.", ".o."),
        (r"\.to_([qkv])\.", r".\1."),
        (r"\.add_([kv])_proj\.", r".\1_img."),
        (r"\.norm_added_k\.", ".norm_k_img."),
        (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
        (r"\.ffn\.net\.2\.", ".ffn.2."),
        (r"^((?:vace_)?blocks\.\d+)\.norm2\.", r"\1.norm@3."),  # the second and third norm have each other's names
        (r"^((?:vace_)?blocks\.\d+)\.norm3\.", r"\1.norm2."),
        (r"\.norm@3\.", ".norm3."),
        (r"^(vace_blocks\.\d+)\.proj_in\.", r"\1.before_proj."),
        (r"^(vace_blocks\.\d+)\.proj_out\.", r"\1.after_proj."),
    ]


def _z_image(_: set[str]) -> Rules:
    return [
        (r"^all_x_embedder\.2-1\.", "x_embedder."),
        (r"^all_final_layer\.2-1\.", "final_layer."),
        (r"\.attention\.to_([qkv])\.", r".attention.qkv@\1."),
        (r"\.attention\.to_out\.0\.", ".attention.out."),
        (r"\.attention\.norm_([qk])\.", r".attention.\1_norm."),
    ]


def _ltx(_: set[str]) -> Rules:
    return [
        (r"^proj_in\.", "patchify_proj."),
        (r"^time_embed\.", "adaln_single."),
        (r"\.norm_([qk])\.", r".\1_norm."),
    ]


def _qwen(_: set[str]) -> Rules:
    return []


def _unet(keys: set[str]) -> Rules:
    """The blocks of Stable Diffusion 1, 2 and XL are numbered through: one of ``each`` has so many ResNets."""
    blocks = {tuple(key.split(".")[:2]) for key in keys if key.startswith(("down_blocks.", "up_blocks."))}
    each = 1 + len({key.split(".")[3] for key in keys if key.startswith("down_blocks.0.resnets.")})
    rules = [
        *_embedder("time_embedding", "time_embed.0", "time_embed.2"),
        *_embedder("(?:add|class)_embedding", "label_emb.0.0", "label_emb.0.2"),
        (r"^conv_in\.", "input_blocks.0.0."),
        (r"^conv_norm_out\.", "out.0."),
        (r"^conv_out\.", "out.2."),
        (r"^mid_block\.attentions\.0\.", "middle_block.1."),
        (r"^mid_block\.resnets\.0\.", "middle_block.0."),
        (r"^mid_block\.resnets\.1\.", "middle_block.2."),
    ]
    for kind, number in sorted(blocks):
        i, down = int(number), kind == "down_blocks"
        to, first = ("input_blocks", each * i + 1) if down else ("output_blocks", each * i)
        rules += [
            (rf"^{kind}\.{i}\.{part}\.{j}\.", f"{to}.{first + j}.{slot}.")
            for j in range(each)
            for slot, part in enumerate(("resnets", "attentions"))
        ]
        attends = any(key.startswith(f"{kind}.{i}.attentions.") for key in keys)
        sampler = f"{to}.{first + each - 1}." + ("0.op." if down else f"{1 + attends}.conv.")
        rules.append((rf"^{kind}\.{i}\.(?:down|up)samplers\.0\.conv\.", sampler))
    inside = r"^((?:input_blocks|output_blocks)\.\d+\.0|middle_block\.[02])"
    resnet = {
        "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
    }  # fmt: skip
    return rules + [(rf"{inside}\.{here}\.", rf"\1.{there}.") for here, there in resnet.items()]


_FLUX_NAMES = (
    r"(time|vector|guidance)_in\.(in|out)_layer|(img|txt)_in|final_layer\.(linear|adaLN_modulation\.1)"
    r"|(double_stream_modulation_(img|txt)|single_stream_modulation)\.lin"
    r"|double_blocks\.\d+\.(img|txt)_(mod\.lin|attn\.(qkv|proj|norm\.(query|key)_norm)|mlp\.[02])"
    r"|single_blocks\.\d+\.(linear[12]|modulation\.lin|norm\.(query|key)_norm)"
)
_SD3_NAMES = (
    r"pos_embed|x_embedder\.proj|[ty]_embedder\.mlp\.[02]|context_embedder|final_layer\.(linear|adaLN_modulation\.1)"
    r"|joint_blocks\.\d+\.(x|context)_block\.(adaLN_modulation\.1|attn2?\.(qkv|proj|ln_[qk])|mlp\.fc[12])"
)
_WAN_NAMES = (
    r"(vace_)?patch_embedding|(time|text)_embedding\.[02]|time_projection\.1|img_emb\.proj\.[0134]|head\.(head|modulation)"
    r"|(vace_)?blocks\.\d+\.((self|cross)_attn\.([qkvo]|[kv]_img|norm_(q|k|k_img))|ffn\.[02]|norm[123]|modulation"
    r"|before_proj|after_proj)"
)
_Z_IMAGE_NAMES = (
    r"x_embedder|cap_embedder\.[01]|t_embedder\.mlp\.[02]|(x|cap)_pad_token|final_layer\.(linear|adaLN_modulation\.1)"
    r"|(layers|noise_refiner|context_refiner)\.\d+\."
    r"(attention\.(qkv|out|[qk]_norm)|feed_forward\.w[123]|(attention|ffn)_norm[12]|adaLN_modulation\.0)"
)
_QWEN_NAMES = (
    r"img_in|txt_in|txt_norm|time_text_embed\.timestep_embedder\.linear_[12]|norm_out\.linear|proj_out"
    r"|transformer_blocks\.\d+\.((img|txt)_(mod\.1|mlp\.net\.(0\.proj|2))"
    r"|attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out|norm_(added_)?[qk]))"
)
_LTX_NAMES = (
    r"patchify_proj|proj_out|(transformer_blocks\.\d+\.)?scale_shift_table|caption_projection\.linear_[12]"
    r"|adaln_single\.(emb\.timestep_embedder\.linear_[12]|linear)"
    r"|transformer_blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0|[qk]_norm)|ff\.net\.(0\.proj|2))"
)
_UNET_NAMES = (
    r"time_embed\.[02]|label_emb\.0\.[02]|out\.[02]|input_blocks\.0\.0|((in|out)put_blocks\.\d+|middle_block)\.\d\."
    r"(in_layers\.[02]|out_layers\.[03]|emb_layers\.1|skip_connection|op|conv|norm|proj_in|proj_out"
    r"|transformer_blocks\.\d+\.(norm[123]|attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2)))"
)

SCHEMES: dict[str, tuple[Callable[[set[str]], Rules], str]] = {
    "FluxTransformer2DModel": (_flux, _FLUX_NAMES),
    "Flux2Transformer2DModel": (_flux2, _FLUX_NAMES),
    "SD3Transformer2DModel": (_sd3, _SD3_NAMES),
    "WanTransformer3DModel": (_wan, _WAN_NAMES),
    "ZImageTransformer2DModel": (_z_image, _Z_IMAGE_NAMES),
    "QwenImageTransformer2DModel": (_qwen, _QWEN_NAMES),
    "LTXVideoTransformer3DModel": (_ltx, _LTX_NAMES),
    "UNet2DConditionModel": (_unet, _UNET_NAMES),
}
"""Class of diffusers to the rules of its names, and an expression for the names that come of them."""
