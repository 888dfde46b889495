"""Measure the same step as in the reference implementations, on transformers' CLIPModel."""

import functools
from typing import Any

import cases
import torch
from torch.distributions import Categorical
from torch.nn.functional import normalize, one_hot, pdist
from torch.utils import flop_counter
from transformers import CLIPModel

CUDA = torch.cuda.is_available()


def measure(settings: cases.Settings, name: str, prompts: str) -> tuple:
    """Measure a step, its operations and its memory."""
    torch.manual_seed(0)
    torch.set_default_device("cuda" if CUDA else "cpu")
    torch.set_float32_matmul_precision({"tf32": "high"}.get(settings.torch_float32, "highest"))
    dtype = getattr(torch, settings.dtype)
    wait, size = (lambda _: CUDA and torch.cuda.synchronize()), 8192 if CUDA else 2048
    a, b = torch.randn(2, size, size, dtype=dtype)
    peak = cases.matmul_peak(lambda: a @ b, size, wait)
    model = CLIPModel._from_config(cases.clip_config(settings.model), attn_implementation="sdpa")
    model.eval().requires_grad_(False)
    token_ids = torch.tensor(cases.prompt_tokens(settings.classes))
    if prompts == "cut":
        token_ids = token_ids[:, : int(token_ids.argmax(-1).max()) + 1].contiguous()
    tnt = name.startswith("tnt")
    images = cases.random_images(settings.views if tnt else settings.batch, settings.model)
    images = torch.tensor(images).permute(0, 3, 1, 2).contiguous()
    if tnt:
        with torch.no_grad():
            texts = normalize(model.text_projection(model.text_model(token_ids).pooler_output))
        updates = int(name.partition("=")[2] or 1)
        step = functools.partial(tnt_step, model, images, texts, updates)
    else:
        norms = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
        adapted = [parameter.requires_grad_() for norm in norms for parameter in norm.parameters()]
        optimizer = torch.optim.AdamW(adapted, 5e-4, weight_decay=1e-2)
        step = functools.partial(batclip_step, model, images, token_ids, optimizer)
    cast = torch.autocast(torch.get_default_device().type, torch.bfloat16, dtype != torch.float32)
    with cast:
        seconds = min(cases.timed(step, settings.steps, wait))
    memory = torch.cuda.max_memory_allocated() / 1e9 if CUDA else cases.resident_peak_gb()
    aten = torch.ops.aten  # PyTorch counts its GPU kernels for attention, but not the CPU's
    flop_counter.flop_registry |= {
        aten._scaled_dot_product_flash_attention_for_cpu: flop_counter.sdpa_flop,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_counter.sdpa_backward_flop,
    }
    more = {"device": torch.cuda.get_device_name() if CUDA else cases.cores()}
    with flop_counter.FlopCounterMode(display=False) as counter:
        step()
    return f"torch {torch.__version__}", seconds, memory, counter.get_total_flops(), peak, more


def predict(model: Any, images: torch.Tensor, texts: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """Embeddings and logits of images."""
    features = model.vision_model(images.sub(0.5).div(0.27)).pooler_output
    features = model.visual_projection(features)
    return features, model.logit_scale.exp() * normalize(features) @ texts.T


def batclip_step(model: Any, images: torch.Tensor, token_ids: torch.Tensor, optimizer: Any) -> None:
    """Predict with BATCLIP and adapt."""
    texts = normalize(model.text_projection(model.text_model(token_ids).pooler_output))
    features, logits = predict(model, images, texts)
    present, members = logits.argmax(-1).unique(return_inverse=True)
    members = one_hot(members, len(present)).to(features.dtype)
    prototypes = members.T @ features / members.sum(0)[:, None]
    directions = normalize(prototypes)
    # the sum over ordered pairs: twice the upper triangle
    separation = 2 * (1 - directions @ directions.T).triu(1).sum()
    alignment = (prototypes * texts[present]).sum(-1).mean()
    optimizer.zero_grad()
    (Categorical(logits=logits).entropy().mean() - alignment - separation).backward()
    optimizer.step()


def tnt_step(model: Any, views: torch.Tensor, texts: torch.Tensor, updates: int) -> None:
    """Tune TNT's noise map on an image's views, and predict."""
    eps, rate, kept = 1 / 255, 1e-3, max(int(0.1 * len(views)), 1)  # size of the ensemble
    noise, selected = torch.randn(views.shape[1:]).clamp(-eps, eps), None
    for _ in range(updates):
        noise.requires_grad_()
        images, logits = predict(model, (views + noise).clamp(0, 1), texts)
        if selected is None:
            selected = Categorical(logits=logits.detach()).entropy().argsort()[:kept]
        marginal = Categorical(logits=logits[selected].log_softmax(-1).logsumexp(0))
        loss = pdist(normalize(images[selected].float())).mean() + marginal.entropy()
        gradient = torch.autograd.grad(loss, noise)[0]
        noise = (noise.detach() - rate * gradient.sign()).clamp(-eps, eps)
    with torch.no_grad():
        _, logits = predict(model, (views + noise).clamp(0, 1), texts)
        logits[Categorical(logits=logits).entropy().argsort()[:kept]].mean(0)


if __name__ == "__main__":
    cases.print_row(measure)
