"""BATCLIP: class prototypes drawn to their texts and away from each other."""

from typing import Any

import jax

from jaxtta import losses
from jaxtta.objectives.base import Batch, Classifier, Metrics, Objective, forward


def batclip(model: Classifier) -> Objective:
    """Minimise entropy − image_text − separation.

    Pseudo-labels are the predictions of the same pass; a class's prototype is the mean of the
    unnormalised embeddings of the images predicted so. Gradients flow through all but the argmax.

    Args:
        model: anything with a `forward` that returns embeddings; its `classes` are the context.

    Returns:
        The objective.

    References:
        BATCLIP: bimodal online test-time adaptation for CLIP, https://arxiv.org/abs/2412.02837
    """

    def objective(
        params: Any, context: Any, batch: Batch
    ) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
        out = forward(model, params, context, batch)
        labels = out.logits.argmax(-1)
        means, present = losses.prototypes(
            out.image_embeddings, labels, batch.mask, len(out.class_embeddings)
        )
        metrics = {
            "entropy": losses.masked_mean(losses.entropy(out.logits), batch.mask),
            "image_text": losses.image_text_alignment(means, present, out.class_embeddings),
            "separation": losses.prototype_separation(means, present),
        }
        loss = metrics["entropy"] - metrics["image_text"] - metrics["separation"]
        return loss, (out.logits, metrics)

    return objective
