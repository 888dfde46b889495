"""Measure the same step as in the reference implementations, on transformers' CLIPModel.

python benchmarks/torch_steps.py tnt:steps=3 '77 tokens' '{"classes": 1000}'
"""

import math
from collections.abc import Callable
from typing import Any

import cases
import torch
from cases import Settings
from torch import Tensor
from torch.nn.functional import normalize, one_hot, pdist
from torch.utils import flop_counter
from transformers import CLIPModel

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


def measure(settings: Settings, name: str, prompts: str = "77 tokens") -> dict[str, Any]:
    """Measure a step, its operations and its memory."""
    size = 4096 if CUDA else 2048
    a, b = torch.randn(2, size, size, device=DEVICE, dtype=getattr(torch, settings.dtype))
    peak = 2 * size**3 / min(cases.timed(lambda: a @ b, 20, wait))
    make_step = tnt_step if cases.tnt_steps(name) else online_step
    step = make_step(settings, name, prompts)
    seconds = cases.timed(step, settings.steps, wait)
    memory = torch.cuda.max_memory_allocated() / 1e9 if CUDA else cases.resident_peak_gb()
    aten = torch.ops.aten  # PyTorch counts its GPU kernels for attention, but not the CPU's
    forward = aten._scaled_dot_product_flash_attention_for_cpu
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    on_cpu = {
        forward: lambda *shapes, **_: flop_counter.sdpa_flop_count(*shapes[:3]),
        backward: lambda *shapes, **_: flop_counter.sdpa_backward_flop_count(*shapes[:4]),
    }
    with flop_counter.FlopCounterMode(display=False, custom_mapping=on_cpu) as counter:
        logits = step()
    if not logits.isfinite().all():
        raise FloatingPointError("the logits are not finite")
    return {
        "library": f"torch {torch.__version__}",
        "device": torch.cuda.get_device_name() if CUDA else "cpu",
        "seconds": seconds,
        "peak_memory_gb": memory,
        "gflop": counter.get_total_flops() / 1e9,
        "matmul_gflop_per_second": peak / 1e9,
    }


def wait(_: Any) -> None:
    """Wait until the device has finished."""
    if CUDA:
        torch.cuda.synchronize()


def prepare(settings: Settings, images: int, prompts: str) -> tuple[CLIPModel, Callable, Any, Any]:
    """A frozen model with random weights, a function to run a tower, images and token ids."""
    torch.manual_seed(0)
    config = cases.clip_config(settings.model)
    model = CLIPModel._from_config(config, attn_implementation="sdpa").eval().to(DEVICE)
    model.requires_grad_(False)
    pixels = torch.from_numpy(cases.random_images(images, settings.model)).permute(0, 3, 1, 2)
    token_ids = torch.from_numpy(cases.prompt_tokens(settings.classes))
    if prompts == "cut":
        token_ids = token_ids[:, : int(token_ids.argmax(-1).max()) + 1]

    def encode(features: Callable, inputs: Tensor) -> Tensor:
        half = settings.dtype == "bfloat16"
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=half):
            outputs = features(inputs)
        return getattr(outputs, "pooler_output", outputs).float()  # transformers 5, 4

    return model, encode, pixels.contiguous().to(DEVICE), token_ids.contiguous().to(DEVICE)


def online_step(settings: Settings, name: str, prompts: str) -> Callable[[], Tensor]:
    """Make a step of zero-shot, TENT or BATCLIP; it returns the logits before the update."""
    model, encode, pixels, token_ids = prepare(settings, settings.batch, prompts)
    images, optimizer = pixels.sub(0.5).div(0.27), None
    if name != "zero_shot":
        tower = model if name == "batclip" else model.vision_model
        norms = [module for module in tower.modules() if isinstance(module, torch.nn.LayerNorm)]
        adapted = [parameter.requires_grad_() for norm in norms for parameter in norm.parameters()]
        optimizer = torch.optim.SGD(adapted, 2.5e-4, momentum=0.9, nesterov=True)
        if name == "batclip":
            optimizer = torch.optim.AdamW(adapted, 5e-4, weight_decay=1e-2)
    with torch.no_grad():
        frozen_texts = normalize(encode(model.get_text_features, token_ids))

    def step() -> Tensor:
        with torch.set_grad_enabled(optimizer is not None):
            features, texts = encode(model.get_image_features, images), frozen_texts
            if name == "batclip":
                texts = normalize(encode(model.get_text_features, token_ids))
            logits = model.logit_scale.exp() * normalize(features) @ texts.T
            if optimizer is not None:
                loss = entropy_of(logits).mean()
                if name == "batclip":
                    loss = loss + batclip_terms(logits, features, texts)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return logits.detach()

    return step


def batclip_terms(logits: Tensor, images: Tensor, texts: Tensor) -> Tensor:
    """What BATCLIP's loss adds to the entropy, of unnormalised images and normalised texts."""
    present, members = logits.argmax(-1).unique(return_inverse=True)
    members = one_hot(members, len(present)).to(images.dtype)
    prototypes = members.T @ images / members.sum(0)[:, None]
    directions = normalize(prototypes)
    # the sum over ordered pairs: twice the upper triangle
    separation = 2 * (1 - directions @ directions.T).triu(1).sum()
    return -(prototypes * texts[present]).sum(-1).mean() - separation


def tnt_step(settings: Settings, name: str, prompts: str) -> Callable[[], Tensor]:
    """Make a step of TNT; it returns the ensemble's mean cosines."""
    model, encode, views, token_ids = prepare(settings, settings.views, prompts)
    eps, rate, kept = 1 / 255, 1e-3, max(int(0.1 * settings.views), 1)  # size of the ensemble
    with torch.no_grad():
        texts = normalize(encode(model.get_text_features, token_ids))

    def embed(noise: Tensor) -> tuple[Tensor, Tensor]:
        noisy = (views + noise).clamp(0, 1).sub(0.5).div(0.27)
        images = normalize(encode(model.get_image_features, noisy))
        return images, model.logit_scale.exp() * images @ texts.T

    def surest(logits: Tensor) -> Tensor:
        return entropy_of(logits.detach()).argsort()[:kept]

    def step() -> Tensor:
        noise, selected = torch.randn(views.shape[1:], device=DEVICE).clamp(-eps, eps), None
        for _ in range(cases.tnt_steps(name)):
            noise.requires_grad_()
            images, logits = embed(noise)
            selected = surest(logits) if selected is None else selected
            mean = logits[selected].log_softmax(-1).logsumexp(0) - math.log(kept)
            loss = pdist(images[selected]).mean() - (mean.exp() * mean).sum()
            gradient = torch.autograd.grad(loss, noise)[0]
            noise = (noise.detach() - rate * gradient.sign()).clamp(-eps, eps)
        with torch.no_grad():
            _, logits = embed(noise)
            return logits[surest(logits)].mean(0)

    return step


def entropy_of(logits: Tensor) -> Tensor:
    """Entropy of each row's prediction."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


if __name__ == "__main__":
    cases.print_row(measure)
