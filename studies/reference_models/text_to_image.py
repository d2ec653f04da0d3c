"""Train the embedded text-to-image models on captioned compositions: ``fmnist-t2i`` and ``fmnist-flow``.

    python studies/reference_models/text_to_image.py vae          # the autoencoder of both
    python studies/reference_models/text_to_image.py judge        # the recogniser of item, colour and place
    python studies/reference_models/text_to_image.py clip         # a two-tower CLIP for text scores
    python studies/reference_models/text_to_image.py t2i          # U-Net and text encoder, epsilon prediction
    python studies/reference_models/text_to_image.py flow         # SD3 transformer, flow matching
    python studies/reference_models/text_to_image.py t2i --export # write the pipeline folder into the package
    python studies/reference_models/text_to_image.py t2i --check  # attributes recognised on held-out captions
    python studies/reference_models/text_to_image.py clip --check # text scores of held-out pictures and captions

Every part is seeded and resumable: the draws of step ``k`` come from a generator seeded by ``(seed, k)``, so a run that
was killed and continued equals one that was not. Order: vae and judge first, then the rest in any order;
without their states in ``--runs`` the embedded ones serve.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from compositions import Compositions, random_scene
from fashion_mnist import DEFAULT_DIR
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from train import load_state, save_state

from mpqsearch.metrics import clip_scorer, load_extractor, save_reference
from mpqsearch.models.judge import GROUNDS, HUES, PLACES, SIZE, WORDS, Judge, Scene, recognised
from mpqsearch.sampling import to_uint8

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parents[1] / "mpqsearch" / "models" / "reference"
TOKENS = 16
LATENT = SIZE // 4
TEXT = {
    "vocab_size": 128,
    "hidden_size": 96,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": TOKENS,
    "projection_dim": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [16, 32, 48],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": SIZE,
    "mid_block_add_attention": False,
}
UNET = {
    "sample_size": LATENT,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": [32, 64, 96],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 8,
    "attention_head_dim": 4,  # the number of heads, by the name that Stable Diffusion's configurations use
    "cross_attention_dim": TEXT["hidden_size"],
}
FLOW = {
    "sample_size": LATENT,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 5,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "joint_attention_dim": 256,
    "caption_projection_dim": 128,
    "pooled_projection_dim": 128,
    "pos_embed_max_size": LATENT // 2,
}
DIFFUSION = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "clip_sample": False,
}
"""The first round's: noise is predicted."""

ZERO_SNR = {
    **DIFFUSION,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}
"""The second round's and the pipeline's. With some signal left in the last step, the floor and the layout of so small a
picture are seen in the noise, and the text decides neither (Lin et al., arXiv 2305.08891)."""
RECIPES: dict[str, dict[str, Any]] = {
    "vae": {"steps": 2500, "batch": 16, "lr": 2e-3, "ema": 0.999, "warmup": 100},
    "judge": {"steps": 2000, "batch": 64, "lr": 2e-3, "ema": 0.995, "warmup": 100},
    "clip": {"steps": 2500, "batch": 96, "lr": 1.5e-3, "ema": 0.995, "warmup": 100},
    "t2i": {
        "steps": 8000,
        "batch": 32,
        "lr": 1.5e-3,
        "ema": 0.999,
        "warmup": 200,
        "again": {"steps": 4000, "lr": 1.5e-3},
    },
    "flow": {"steps": 8000, "batch": 32, "lr": 1.0e-3, "ema": 0.999, "warmup": 200},
}
"""``again``: a second round with a rate of its own. In the first round of ``t2i`` the captions name two items in either
order and noise is predicted; in the second they name them in reading order, and v is predicted down to no signal."""

SEED = 0
KL = 1e-4
"""Weight of the Kullback-Leibler term of the autoencoder, per latent value."""

CACHED = 40_000
"""Pictures whose latents the denoisers are trained on, with fresh noise in every step."""


def captions_of_everything() -> list[str]:
    """All words in all places, from which the tokenizer learns its merges."""
    singles = [Scene(w, h, f).caption for w in WORDS for h in HUES for f in GROUNDS]
    pairs = [Scene(w, h, "dark", p, w, h).caption for w in WORDS for h in HUES for p in PLACES]
    return [*singles, *pairs]


def build_tokenizer(folder: Path) -> Any:
    """A CLIPTokenizer whose vocabulary is the captions' words, one token each; its files are written to ``folder``."""
    from transformers import CLIPTokenizer

    words = sorted({word for caption in captions_of_everything() for word in caption.replace("-", " - ").split()})
    letters = sorted({letter for word in words for letter in word})
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in words:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:  # from the left, so that a merge of one word never cuts through another
            pair = (parts[-2], parts[-1])
            if pair not in merges:
                merges.append(pair)
            parts[-2:] = ["".join(pair)]
            if parts[-1] not in vocabulary:
                vocabulary.append(parts[-1])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}, indent=0) + "\n")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=TOKENS)
    tokenizer.save_pretrained(folder)
    return tokenizer


Loss = Callable[[torch.Generator, int], Tensor]
"""Of a batch of some size, drawn from a generator."""


class Part:
    """One thing to train: its networks, the loss of a batch, and that of a second round."""

    def __init__(self, networks: dict[str, nn.Module], loss: Loss, again: Loss | None = None) -> None:
        self.networks = nn.ModuleDict(networks)
        self.loss, self.again = loss, again or loss


def vae_part(data: Compositions, _: Path) -> Part:
    """The autoencoder: absolute error of pixels and of their differences, and a small Kullback-Leibler term."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(**VAE)

    def loss(generator: torch.Generator, batch: int) -> Tensor:
        images, _scenes = data.batch(batch, generator)
        posterior = vae.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        shown = vae.decode(posterior.mean + posterior.std * noise).sample
        edges = sum(F.l1_loss(shown.diff(dim=d), images.diff(dim=d)) for d in (2, 3))
        return F.l1_loss(shown, images) + edges + KL * posterior.kl().mean() / posterior.mean[0].numel()

    return Part({"vae": vae}, loss)


def judge_part(data: Compositions, _: Path) -> Part:
    """The recogniser, on pictures with some noise, so that it bears what an autoencoder makes of them."""
    judge = Judge()

    def loss(generator: torch.Generator, batch: int) -> Tensor:
        images, scenes = data.batch(batch, generator)
        level = 0.15 * torch.rand(batch, 1, 1, 1, generator=generator)
        logits = judge(images + level * torch.randn(images.shape, generator=generator))
        targets = torch.tensor([scene.targets for scene in scenes]).unbind(1)
        return sum(F.cross_entropy(x, y, ignore_index=-1) for x, y in zip(logits, targets, strict=True))

    return Part({"judge": judge}, loss)


def clip_part(data: Compositions, out: Path) -> Part:
    """A two-tower CLIP; captions that occur twice in a batch are no negatives of each other."""
    from transformers import CLIPConfig, CLIPModel

    vision = {
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": SIZE,
        "patch_size": 8,
        "projection_dim": TEXT["projection_dim"],
    }
    tokenizer = build_tokenizer(out.parent / "tokenizer")
    model = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=vision, projection_dim=TEXT["projection_dim"]))

    def loss(generator: torch.Generator, batch: int) -> Tensor:
        images, scenes = data.batch(batch, generator)
        tokens = tokens_of(tokenizer, [scene.caption for scene in scenes])
        logits = model(input_ids=tokens, pixel_values=images).logits_per_text
        same = (tokens[:, None] == tokens[None]).all(2) & ~torch.eye(batch, dtype=torch.bool)
        logits = logits.masked_fill(same, -1e4)
        index = torch.arange(batch)
        return (F.cross_entropy(logits, index) + F.cross_entropy(logits.T, index)) / 2

    return Part({"clip": model}, loss)


def tokens_of(tokenizer: Any, captions: Sequence[str]) -> Tensor:
    """Token numbers ``[n, TOKENS]``."""
    made = tokenizer(list(captions), padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    return made.input_ids  # type: ignore[no-any-return]


def text_encoder() -> nn.Module:
    """The untrained text encoder of `fmnist-t2i`."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**TEXT))


def t2i_part(data: Compositions, out: Path) -> Part:
    """U-Net and text encoder of `StableDiffusionPipeline`, trained together on latents; 10 % of the captions empty."""
    from diffusers import DDIMScheduler, UNet2DConditionModel

    latents, tokens, empty = cached_latents(data, out)
    ordered = in_reading_order(build_tokenizer(out.parent / "tokenizer"), tokens)
    unet, encoder = UNet2DConditionModel(**UNET), text_encoder()

    def loss_with(captions: Tensor, diffusion: Mapping[str, Any]) -> Loss:
        scheduler = DDIMScheduler(**diffusion)
        noise_wanted = diffusion["prediction_type"] == "epsilon"

        def loss(generator: torch.Generator, batch: int) -> Tensor:
            index = torch.randint(0, len(latents), (batch,), generator=generator)
            ids = dropped(captions[index], empty, generator)
            t = stratified(batch, generator).mul(1000).long().clamp(max=999)
            x, noise = latents[index].float(), torch.randn(batch, 4, LATENT, LATENT, generator=generator)
            wanted = noise if noise_wanted else scheduler.get_velocity(x, noise, t)
            states = encoder(input_ids=ids).last_hidden_state
            return F.mse_loss(unet(scheduler.add_noise(x, noise, t), t, encoder_hidden_states=states).sample, wanted)

        return loss

    return Part(
        {"unet": unet, "text_encoder": encoder}, loss_with(tokens, DIFFUSION), again=loss_with(ordered, ZERO_SNR)
    )


def flow_part(data: Compositions, out: Path) -> Part:
    """Transformer and text encoders of `StableDiffusion3Pipeline`: rectified flow, times drawn logit-normal."""
    from diffusers import SD3Transformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    latents, tokens, empty = cached_latents(data, out)
    tokens = in_reading_order(build_tokenizer(out.parent / "tokenizer"), tokens)
    encoders = [CLIPTextModelWithProjection(CLIPTextConfig(**TEXT)) for _ in range(2)]
    transformer = SD3Transformer2DModel(**FLOW)

    def loss(generator: torch.Generator, batch: int) -> Tensor:
        index = torch.randint(0, len(latents), (batch,), generator=generator)
        ids = dropped(tokens[index], empty, generator)
        x, noise = latents[index].float(), torch.randn(batch, 4, LATENT, LATENT, generator=generator)
        t = torch.special.ndtri(stratified(batch, generator).clamp(1e-4, 1 - 1e-4)).sigmoid()
        states, pooled = joint_states(encoders, ids)
        mixed = torch.lerp(x, noise, t.view(-1, 1, 1, 1))
        velocity = transformer(mixed, states, pooled, t * 1000).sample
        return F.mse_loss(velocity, noise - x)

    return Part({"transformer": transformer, "text_encoder": encoders[0], "text_encoder_2": encoders[1]}, loss)


def joint_states(encoders: Sequence[nn.Module], ids: Tensor) -> tuple[Tensor, Tensor]:
    """What `StableDiffusion3Pipeline.encode_prompt` gives without a T5 and with ``max_sequence_length = 1``."""
    outputs = [encoder(input_ids=ids, output_hidden_states=True) for encoder in encoders]
    states = torch.cat([o.hidden_states[-2] for o in outputs], -1)
    wide = F.pad(states, (0, FLOW["joint_attention_dim"] - states.shape[-1], 0, 1))
    return wide, torch.cat([o.text_embeds for o in outputs], -1)


def stratified(n: int, generator: torch.Generator) -> Tensor:
    """``n`` numbers in [0, 1), one in each n-th of the range: less variance of the loss at no cost."""
    return (torch.arange(n) + torch.rand(n, generator=generator)) / n


def dropped(tokens: Tensor, empty: Tensor, generator: torch.Generator) -> Tensor:
    """Every tenth caption replaced by the empty one, for classifier-free guidance."""
    return torch.where(torch.rand(len(tokens), 1, generator=generator) < 0.1, empty, tokens)


def cached_latents(data: Compositions, out: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled latents ``[CACHED, 4, 16, 16]`` in half precision, tokens ``[CACHED, TOKENS]``, those of an empty
    caption."""
    tokenizer = build_tokenizer(out.parent / "tokenizer")
    empty = tokens_of(tokenizer, [""])
    path = out.parent / "latents.safetensors"
    if not path.is_file():
        vae, scale = trained_vae(out.parent)
        generator = torch.Generator().manual_seed(SEED + 77)
        latents, tokens = [], []
        for _ in tqdm(range(CACHED // 100), desc="latents", mininterval=5):
            images, scenes = data.batch(100, generator)
            with torch.no_grad():
                latents.append((vae.encode(images).latent_dist.sample(generator) * scale).half())
            tokens.append(tokens_of(tokenizer, [scene.caption for scene in scenes]))
        save_file({"latents": torch.cat(latents), "tokens": torch.cat(tokens)}, path)
    stored = load_file(path)
    return stored["latents"], stored["tokens"], empty


def reading_order(scene: Scene) -> Scene:
    """The same picture, described from the left or from the top."""
    turned = {"right of": "left of", "below": "above"}.get(scene.place)
    if turned is None:
        return scene
    return Scene(scene.second, scene.second_colour, scene.floor, turned, scene.first, scene.first_colour)


def in_reading_order(tokenizer: Any, tokens: Tensor) -> Tensor:
    """Tokens ``[n, TOKENS]`` of the same captions in reading order."""
    captions = [text.strip().replace(" - ", "-") for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]
    scenes = [Scene.parse(caption) for caption in captions]
    if None in scenes:
        raise SystemExit(f"the cached latents have a caption that is none: {captions[scenes.index(None)]!r}")
    return tokens_of(tokenizer, [reading_order(scene).caption for scene in scenes if scene is not None])


def trained_vae(runs: Path) -> tuple[Any, float]:
    """The averaged autoencoder, and the factor that gives its latents unit variance.

    Without a training state in ``runs`` it is the one of the embedded `fmnist-t2i`, in half precision, so that another
    denoiser can be trained on the same latents without training the autoencoder again.
    """
    from diffusers import AutoencoderKL

    embedded = PACKAGE / "fmnist-t2i" / "vae"
    if not (runs / "vae" / "state.safetensors").is_file() and embedded.is_dir():
        vae = AutoencoderKL(**VAE).eval()  # by its recipe: a loaded one would name its folder in what is exported
        weights = load_file(embedded / "diffusion_pytorch_model.safetensors")
        vae.load_state_dict({name: value.float() for name, value in weights.items()})
        return vae, float(json.loads((embedded / "config.json").read_text())["scaling_factor"])
    vae = AutoencoderKL(**VAE)
    vae.load_state_dict(averaged(runs / "vae", "vae"))
    vae.eval()
    images, _ = Compositions().batch(256, torch.Generator().manual_seed(SEED + 5))
    with torch.no_grad():
        std = float(torch.cat([vae.encode(x).latent_dist.mean for x in images.split(64)]).std())
    return vae, round(1 / std, 4)


def averaged(folder: Path, network: str) -> dict[str, Tensor]:
    """Averaged weights of a trained network."""
    path = folder / "state.safetensors"
    if not path.is_file():
        raise SystemExit(f"{path} is missing: train {folder.name} first")
    prefix = f"ema/{network}."
    return {k.removeprefix(prefix): v for k, v in load_file(path).items() if k.startswith(prefix)}


PARTS: dict[str, Callable[[Compositions, Path], Part]] = {
    "vae": vae_part,
    "judge": judge_part,
    "clip": clip_part,
    "t2i": t2i_part,
    "flow": flow_part,
}


def train(name: str, data_dir: Path, out: Path) -> None:
    """Run or continue a recipe; leaves ``state.safetensors`` and ``log.jsonl`` in ``out``."""
    recipe = RECIPES[name]
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    part = PARTS[name](Compositions("train", data_dir), out)
    networks = part.networks.train()
    ema = {k: v.clone() for k, v in networks.state_dict().items()}
    optimizer = torch.optim.AdamW(networks.parameters(), lr=recipe["lr"], weight_decay=1e-4)
    start = load_state(out, networks, ema, optimizer)
    log = (out / "log.jsonl").open("a")
    began, recent = time.time(), 0.0
    total = recipe["steps"] + recipe.get("again", {}).get("steps", 0)
    for step in tqdm(range(start, total), initial=start, total=total, desc=name, mininterval=10):
        value = one_step(part, optimizer, recipe, step)
        if not math.isfinite(value):
            raise SystemExit(f"{name}: the loss is {value} at step {step}; lower the learning rate and start again")
        average(ema, networks, min(recipe["ema"], (1 + step) / (10 + step)))
        recent = value if step == start else 0.98 * recent + 0.02 * value
        if (step + 1) % 50 == 0:
            seconds = round(time.time() - began, 1)
            log.write(json.dumps({"step": step + 1, "loss": round(recent, 6), "seconds": seconds}) + "\n")
            log.flush()
        if (step + 1) % 250 == 0 or step + 1 == total:
            save_state(out, step + 1, networks, ema, optimizer)


def one_step(part: Part, optimizer: torch.optim.Optimizer, recipe: dict[str, Any], step: int) -> float:
    """One update at the rate of a cosine schedule with a linear start; returns the loss."""
    again = step >= recipe["steps"]
    current, done = (recipe["again"], step - recipe["steps"]) if again else (recipe, step)
    cosine = 0.5 * (1 + math.cos(math.pi * done / current["steps"]))
    rate = current["lr"] * min(1.0, (done + 1) / recipe["warmup"]) * cosine
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss_of = part.again if again else part.loss
    loss = loss_of(torch.Generator().manual_seed(SEED * 1_000_003 + step), recipe["batch"])
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(part.networks.parameters(), 1.0)
    optimizer.step()
    return loss.item()


@torch.no_grad()
def average(ema: dict[str, Tensor], networks: nn.Module, decay: float) -> None:
    """Move the running mean of the weights."""
    for key, value in networks.state_dict().items():
        if value.is_floating_point():
            ema[key].lerp_(value, 1 - decay)
        else:
            ema[key].copy_(value)


def pipeline(name: str, runs: Path) -> Any:
    """The trained pipeline with averaged weights, in single precision."""
    import diffusers

    vae, scale = trained_vae(runs)
    vae.register_to_config(scaling_factor=scale, shift_factor=0.0)
    tokenizer = build_tokenizer(runs / "tokenizer")
    part = PARTS[name](Compositions(), runs / name)
    for key, network in part.networks.items():
        network.load_state_dict(averaged(runs / name, key))
        network.eval()
    parts = dict(part.networks.items())
    if name == "t2i":
        scheduler = diffusers.DDIMScheduler(**ZERO_SNR)
        return diffusers.StableDiffusionPipeline(
            vae=vae, tokenizer=tokenizer, scheduler=scheduler, safety_checker=None, feature_extractor=None,
            requires_safety_checker=False, **parts,
        )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    return diffusers.StableDiffusion3Pipeline(
        vae=vae, tokenizer=tokenizer, tokenizer_2=tokenizer, tokenizer_3=None, text_encoder_3=None,
        scheduler=scheduler, **parts,
    )  # fmt: skip


CALLS: dict[str, dict[str, Any]] = {
    "t2i": {"num_inference_steps": 20, "guidance_scale": 3.0, "height": SIZE, "width": SIZE},
    "flow": {
        "num_inference_steps": 20, "guidance_scale": 2.5, "height": SIZE, "width": SIZE, "max_sequence_length": 1,
    },
}  # fmt: skip
"""How each pipeline is meant to be called."""


def draw(pipe: Any, name: str, captions: Sequence[str], first_seed: int = 0, batch: int = 32) -> Tensor:
    """Pictures ``[n, 3, 64, 64]`` in [-1, 1] of some captions, one generator a picture."""
    pictures = []
    pipe.set_progress_bar_config(disable=True)
    for start in tqdm(range(0, len(captions), batch), desc="samples", mininterval=10):
        prompts = list(captions[start : start + batch])
        generators = [torch.Generator().manual_seed(first_seed + start + i) for i in range(len(prompts))]
        drawn = pipe(prompts, generator=generators, output_type="pt", **CALLS[name]).images
        pictures.append(drawn.float().cpu() * 2 - 1)
    return torch.cat(pictures)


def trained_judge(runs: Path) -> Judge:
    """The averaged recogniser, or the embedded one where none was trained in ``runs``."""
    judge = Judge()
    embedded = PACKAGE / "fmnist-judge" / "model.safetensors"
    if not (runs / "judge" / "state.safetensors").is_file() and embedded.is_file():
        judge.load_state_dict({k: v.float() for k, v in load_file(embedded).items()})
    else:
        judge.load_state_dict(averaged(runs / "judge", "judge"))
    return judge.eval()


def check(name: str, runs: Path, data_dir: Path, n: int = 256) -> None:
    """Print the share of attributes recognised: on held-out pictures, through the autoencoder, and of a pipeline."""
    generator = torch.Generator().manual_seed(SEED + 123_456)
    images, scenes = Compositions("t10k", data_dir).batch(n, generator)
    scenes = [reading_order(scene) for scene in scenes]
    if name == "clip":
        check_clip(images, scenes)
        return
    judge = trained_judge(runs)
    report = {"held-out pictures": images}
    if name != "judge":
        vae, _ = trained_vae(runs)
        with torch.no_grad():
            report["through the autoencoder"] = torch.cat([vae(x).sample for x in images.split(64)])
    if name in CALLS:
        report[f"{name}, {n} captions"] = draw(pipeline(name, runs), name, [s.caption for s in scenes])
    for what, shown in report.items():
        share = recognised(judge, shown.clamp(-1, 1), [s.caption for s in scenes])
        error = 100 * float(share.std()) / math.sqrt(n)
        line = f"{what}: {100 * float(share.mean()):.1f} +- {error:.1f} % of attributes recognised"
        print(line, f"(all of a picture: {100 * float((share == 1).float().mean()):.1f} %)")
        save_grid(shown[:32], runs / f"{name}-{what.split(',')[0].replace(' ', '-')}.png")


def check_clip(images: Tensor, scenes: Sequence[Scene]) -> None:
    """Print the exported CLIP's scores of pictures with their own captions and with others, and how often the own one
    scores above one with a single word changed."""
    scorer, pictures = clip_scorer("fmnist-clip"), to_uint8(images)
    captions = {"their own": [s.caption for s in scenes], "those of the next picture": [s.caption for s in scenes]}
    captions["those of the next picture"].append(captions["those of the next picture"].pop(0))
    for part, options in (("floor", GROUNDS), ("first_colour", HUES), ("first", WORDS)):
        captions[f"another {part.replace('_', ' ')}"] = [
            replace(s, **{part: options[(options.index(getattr(s, part)) + 1) % len(options)]}).caption for s in scenes
        ]
    scores = {what: scorer.score(pictures, texts, None) for what, texts in captions.items()}
    for what, score in scores.items():
        above = 100 * float((scores["their own"] > score).float().mean())
        line = f"captions: {what}: {float(score.mean()):.1f} +- {float(score.std()) / math.sqrt(len(score)):.1f}"
        print(line, f"(the own caption scores above it in {above:.1f} % of the pictures)")


def save_grid(images: Tensor, path: Path, columns: int = 8) -> None:
    """Pictures in rows, as a PNG."""
    from PIL import Image

    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
    rows = [torch.cat(list(row), 1) for row in pixels.split(columns) if len(row) == columns]
    Image.fromarray(torch.cat(rows, 0).numpy()).save(path)


def export(name: str, runs: Path) -> None:
    """Write what was trained into the package, in half precision."""
    folder = (
        PACKAGE / {"t2i": "fmnist-t2i", "flow": "fmnist-flow", "judge": "fmnist-judge", "clip": "fmnist-clip"}[name]
    )
    folder.mkdir(parents=True, exist_ok=True)
    if name == "judge":
        half = {k: v.half().contiguous() for k, v in trained_judge(runs).state_dict().items()}
        save_file(half, folder / "model.safetensors")
        save_statistics(folder / "reference.safetensors")
    elif name == "clip":
        from transformers import CLIPImageProcessor

        part = clip_part(Compositions(), runs / "clip")
        part.networks["clip"].load_state_dict(averaged(runs / "clip", "clip"))
        part.networks["clip"].half().save_pretrained(folder)
        build_tokenizer(folder)
        square = {"height": SIZE, "width": SIZE}
        half = [0.5] * 3  # pictures in [-1, 1], as in training
        CLIPImageProcessor(size=square, crop_size=square, image_mean=half, image_std=half).save_pretrained(folder)
    else:
        pipeline(name, runs).to(torch.float16).save_pretrained(folder)
        (folder / "sampler.json").write_text(json.dumps(meant(name), indent=1) + "\n")
        (folder / "prompts.txt").write_text("\n".join(prompts()) + "\n")


def meant(name: str) -> dict[str, Any]:
    """How the pictures of a pipeline are meant to be drawn, for its ``sampler.json``."""
    call = dict(CALLS[name])
    return {"steps": call.pop("num_inference_steps"), "guidance": call.pop("guidance_scale"), "call": call}


def prompts(n: int = 1000) -> list[str]:
    """Captions of random scenes, each once."""
    generator = torch.Generator().manual_seed(SEED + 7)
    found: dict[str, None] = {}
    while len(found) < n:
        found[reading_order(random_scene(generator)).caption] = None
    return list(found)


def save_statistics(path: Path, n: int = 20_000) -> None:
    """Statistics of the exported judge's features of real compositions: what distances to data are taken from."""
    extractor, data = load_extractor("fmnist-judge"), Compositions()
    generator = torch.Generator().manual_seed(SEED + 1)
    parts = [extractor(to_uint8(data.batch(500, generator)[0])) for _ in tqdm(range(n // 500), desc="statistics")]
    save_reference(path, torch.cat(parts), extractor, f"compositions of Fashion-MNIST train, {n:,} pictures")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(PARTS))
    parser.add_argument("--data-dir", type=Path, default=DEFAULT_DIR)
    parser.add_argument("--runs", type=Path, default=Path("runs/reference"), help="where training states go")
    parser.add_argument("--check", action="store_true", help="count attributes recognised, and draw some pictures")
    parser.add_argument("--export", action="store_true", help="write the trained weights into the package")
    options = parser.parse_args()
    if options.check:
        check(options.name, options.runs, options.data_dir)
    elif options.export:
        export(options.name, options.runs)
    else:
        train(options.name, options.data_dir, options.runs / options.name)


if __name__ == "__main__":
    main()
