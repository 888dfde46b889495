"""Measure the same step as in the reference implementations, on transformers' CLIPModel.

python benchmarks/torch_steps.py tnt:steps=3 '77 tokens' '{"classes": 1000}'
"""

from collections.abc import Callable
from typing import Any

import cases
import torch
from torch.distributions import Categorical
from torch.nn.functional import normalize, one_hot, pdist
from torch.utils import flop_counter
from transformers import CLIPModel

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


def measure(settings: cases.Settings, name: str, prompts: str) -> dict[str, Any]:
    """Measure a step, its operations and its memory."""
    wait = (lambda _: torch.cuda.synchronize()) if CUDA else (lambda _: None)
    size = 4096 if CUDA else 2048
    a, b = torch.randn(2, size, size, device=DEVICE)
    peak = 2 * size**3 / min(cases.timed(lambda: a @ b, 20, wait))
    step = make_step(settings, name, prompts)
    seconds = min(cases.timed(step, settings.steps, wait))
    memory = torch.cuda.max_memory_allocated() / 1e9 if CUDA else cases.resident_peak_gb()
    aten = torch.ops.aten  # PyTorch counts its GPU kernels for attention, but not the CPU's
    forward = aten._scaled_dot_product_flash_attention_for_cpu
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    on_cpu = {
        forward: lambda *shapes, **_: flop_counter.sdpa_flop_count(*shapes[:3]),
        backward: lambda *shapes, **_: flop_counter.sdpa_backward_flop_count(*shapes[:4]),
    }
    with flop_counter.FlopCounterMode(display=False, custom_mapping=on_cpu) as counter:
        step()
    library = f"torch {torch.__version__}"
    return cases.row(library, seconds, memory, counter.get_total_flops(), peak)


def make_step(settings: cases.Settings, name: str, prompts: str) -> Callable[[], Any]:
    """Make a step of BATCLIP or TNT on random inputs."""
    torch.manual_seed(0)
    config, updates = cases.clip_config(settings.model), cases.tnt_steps(name)
    model = CLIPModel._from_config(config, attn_implementation="sdpa").eval().to(DEVICE)
    model.requires_grad_(False)
    count = settings.views if updates else settings.batch
    pixels = torch.from_numpy(cases.random_images(count, settings.model)).to(DEVICE)
    pixels = pixels.permute(0, 3, 1, 2).contiguous()
    token_ids = torch.from_numpy(cases.prompt_tokens(settings.classes)).to(DEVICE)
    if prompts == "cut":
        token_ids = token_ids[:, : int(token_ids.argmax(-1).max()) + 1].contiguous()

    def texts_of() -> torch.Tensor:
        texts = model.get_text_features(token_ids)
        return normalize(getattr(texts, "pooler_output", texts))  # transformers 5, 4

    def forward(images: torch.Tensor, texts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = model.get_image_features(images.sub(0.5).div(0.27))
        features = getattr(found, "pooler_output", found)
        return features, model.logit_scale.exp() * normalize(features) @ texts.T

    if updates:
        with torch.no_grad():
            texts = texts_of()
        return lambda: tnt_step(lambda views: forward(views, texts), pixels, updates)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
    adapted = [parameter.requires_grad_() for norm in norms for parameter in norm.parameters()]
    optimizer = torch.optim.AdamW(adapted, 5e-4, weight_decay=1e-2)

    def batclip_step() -> None:
        texts = texts_of()
        images, logits = forward(pixels, texts)
        present, members = logits.argmax(-1).unique(return_inverse=True)
        members = one_hot(members, len(present)).to(images.dtype)
        prototypes = members.T @ images / members.sum(0)[:, None]
        directions = normalize(prototypes)
        # the sum over ordered pairs: twice the upper triangle
        separation = 2 * (1 - directions @ directions.T).triu(1).sum()
        alignment = (prototypes * texts[present]).sum(-1).mean()
        optimizer.zero_grad()
        (Categorical(logits=logits).entropy().mean() - alignment - separation).backward()
        optimizer.step()

    return batclip_step


def tnt_step(forward: Callable, views: torch.Tensor, updates: int) -> None:
    """Update the noise map of an image's views, and predict with an ensemble of the surest."""
    eps, rate, kept = 1 / 255, 1e-3, max(int(0.1 * len(views)), 1)  # size of the ensemble
    noise, selected = torch.randn(views.shape[1:], device=DEVICE).clamp(-eps, eps), None
    for _ in range(updates):
        noise.requires_grad_()
        images, logits = forward((views + noise).clamp(0, 1))
        if selected is None:
            selected = Categorical(logits=logits.detach()).entropy().argsort()[:kept]
        marginal = Categorical(logits=logits[selected].log_softmax(-1).logsumexp(0))
        loss = pdist(normalize(images[selected])).mean() + marginal.entropy()
        gradient = torch.autograd.grad(loss, noise)[0]
        noise = (noise.detach() - rate * gradient.sign()).clamp(-eps, eps)
    with torch.no_grad():
        _, logits = forward((views + noise).clamp(0, 1))
        logits[Categorical(logits=logits).entropy().argsort()[:kept]].mean(0)


if __name__ == "__main__":
    cases.print_row(measure)
