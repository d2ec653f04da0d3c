"""The class-conditional LDM-4 of ImageNet (Rombach et al., CVPR 2022) as a pipeline, which diffusers has none of.

Its folder, named by the environment variable LDM4_IMAGENET (else weights/ldm4-imagenet), holds `unet`
(UNet2DConditionModel), `vqvae` (VQModel with the scale of its latents) and `scheduler` (DDIMScheduler), each written by
save_pretrained, and `classes.safetensors` with `weight` [1001, d]: the embedding of classes, the last of no class.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, ImagePipelineOutput, UNet2DConditionModel, VQModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from mpqsearch.artifacts import digest_file, digest_of, read_tensors
from mpqsearch.models import Denoiser, weights_digest
from mpqsearch.sampling import PipelineRunner, SamplerSpec

PROTOCOL = SamplerSpec(steps=20, guidance=3.0, batch=50, call={"eta": 0.0})
"""MPQ-DM and EfficientDM: 20 steps of DDIM, guidance 3. Report guidance 1.5 beside it: at 3 the distance to data falls
while bits fall."""


class ClassLDMPipeline(DiffusionPipeline):
    """DDIM over latents with classifier-free guidance by class, then one decoding."""

    def __init__(self, unet: nn.Module, vqvae: nn.Module, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, vqvae=vqvae, scheduler=scheduler)
        self.classes = nn.Embedding(1001, unet.config.cross_attention_dim)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int],
        num_inference_steps: int = 20,
        guidance_scale: float = 3.0,
        eta: float = 0.0,
        generator: Any = None,
        output_type: str = "np",
    ) -> Any:
        config, device = self.unet.config, self._execution_device
        shape = (len(class_labels), config.in_channels, config.sample_size, config.sample_size)
        latents = randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype)
        none = self.classes.num_embeddings - 1
        asked = self.classes(torch.tensor([*class_labels, *[none] * len(class_labels)])).unsqueeze(1).to(latents)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            shown, plain = self.unet(torch.cat([latents] * 2), t, encoder_hidden_states=asked).sample.chunk(2)
            noise = plain + guidance_scale * (shown - plain)
            latents = self.scheduler.step(noise, t, latents, eta=eta, generator=generator).prev_sample
        if output_type == "latent":
            return ImagePipelineOutput(images=latents)
        decoded: Tensor = self.vqvae.decode(latents / self.vqvae.config.scaling_factor).sample
        return ImagePipelineOutput(images=(decoded / 2 + 0.5).clamp(0, 1).cpu().permute(0, 2, 3, 1).float().numpy())


def imagenet() -> Denoiser:
    """The U-Net, run by the pipeline above."""
    folder = Path(os.environ.get("LDM4_IMAGENET", "weights/ldm4-imagenet"))
    weight = read_tensors(folder / "classes.safetensors")["weight"]
    unet = UNet2DConditionModel.from_pretrained(folder / "unet").eval().requires_grad_(False)

    def opened(parts: Mapping[str, nn.Module]) -> ClassLDMPipeline:
        vqvae = VQModel.from_pretrained(folder / "vqvae")
        pipe = ClassLDMPipeline(parts["unet"], vqvae, DDIMScheduler.from_pretrained(folder / "scheduler"))
        pipe.classes = nn.Embedding.from_pretrained(weight)
        return pipe

    files = sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".safetensors"))
    identity = {"pipeline": "ClassLDMPipeline", "files": digest_of([digest_file(path) for path in files])}
    runner = PipelineRunner(opened, ["unet"], spec=PROTOCOL, n_classes=len(weight) - 1, identity=identity)
    return Denoiser(name="ldm4-imagenet", module=unet, runner=runner, digest=weights_digest(unet))
