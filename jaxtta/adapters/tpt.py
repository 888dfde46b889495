"""TPT and C-TPT: a prompt's context vectors, tuned on the views of one image.

The token embeddings of "a photo of a" become parameters v of the text tower. Of N views the ⌊0.1 N⌋
of lowest entropy are chosen once, and each step of AdamW takes the gradient of

    L(v) = H(mean_n p_n(v)) − λ mean_c ‖t_c(v) − mean t(v)‖,

with t_c the class embeddings; λ is 0 in TPT and 20 in C-TPT, which keeps them apart for the sake of
calibration. The plain view is predicted with the tuned context; the next image begins anew.

Cost per image: 64 image passes forward, none backward, and the text tower through all prompts once
forward and once backward for each step, counted in the program. The published code has one forward
pass more: the first step's is the same for all images, so a batch has it once.

References:
    Shu et al., NeurIPS 2022, https://arxiv.org/abs/2209.07511
    Yoon et al., ICLR 2024, https://arxiv.org/abs/2403.14119
"""

from functools import partial
from typing import Any, cast

import jax
import optax

from jaxtta.adapters import image_views, settings
from jaxtta.adapters.base import Adapter, Array, cuts_views
from jaxtta.adapters.of_views import Predict, of_views
from jaxtta.adapters.prompt_tuning import initial_context, tune_context
from jaxtta.models import Classifier, Prompts, Task, l2_normalize
from jaxtta.models.checks import require_model
from jaxtta.optim import require_optimizer

TPT_OPTIMIZER = partial(optax.adamw, 5e-3, weight_decay=0.01)
"""Makes the published optimiser; its decay pulls the context towards 0."""


@cuts_views
def tpt(
    model: Classifier,
    task: Task | None,
    *,
    optimizer: optax.GradientTransformation | None = None,
    steps: int = 1,
    fraction: float = 0.1,
    dispersion: float = 0.0,
    context_tokens: int = 4,
    views: int = 64,
    scale: tuple[float, float] = (0.08, 1.0),
    views_per_chunk: int = 8,
) -> Adapter:
    """Tune the context of the prompts on each image; nothing is carried from image to image.

    Args:
        model: CLIP, with images that do not mix; SigLIP's prompts share no beginning.
        task: the classes; of several templates the first alone is used.
        optimizer: an optax transformation; None for AdamW with rate 5e-3 and decay 0.01.
        steps: of the optimiser for each image, at least one.
        fraction: share of the views that the loss is taken over, those of lowest entropy.
        dispersion: λ of C-TPT; 0 for none.
        context_tokens: n, tokens of the template's beginning that are tuned.
        views: N, the views of an image; the first is the plain preprocessing.
        scale: least and greatest share of a random crop's area.
        views_per_chunk: views that are encoded at once; fewer need less memory.

    Returns:
        The adapter. An image whose step is not finite is predicted with the prompts as they are,
        and `metrics["skipped"]` says so.

    Raises:
        TypeError: if the model, task or optimizer is something else.
        ValueError: if a setting makes no sense, the model has no text tower whose prompts share
            their beginning, or the prompts share fewer tokens than `context_tokens`.

    Examples:
        With `model` and `task` of `jaxtta.load`'s example:

        >>> adapter = jaxtta.adapters.tpt(model, task, views=16, context_tokens=4)

    References:
        Shu et al., NeurIPS 2022, https://arxiv.org/abs/2209.07511
    """
    require_model(model)
    clip = cast(Any, model)
    if not hasattr(model, "prompts"):
        raise ValueError("TPT needs a text tower, whose prompts it tunes; this model has none")
    if clip.padded_prompts:
        raise ValueError(
            "TPT tunes what all prompts begin with; this model, as SigLIP, reads each prompt whole"
        )
    image_views.require_cosines(model, "TPT")
    settings.fraction(fraction=fraction)
    settings.at_least(1, steps=steps, context_tokens=context_tokens)
    settings.at_least(0, dispersion=dispersion)
    optimizer = TPT_OPTIMIZER() if optimizer is None else optimizer
    require_optimizer(optimizer)
    if hasattr(task, "token_ids"):
        task = cast(Task, task)._replace(token_ids=cast(Task, task).token_ids[:, :1])
    prompts = clip.prompts(task)
    if (shared := len(prompts.prefix) - 1) < context_tokens:
        raise ValueError(
            f"the prompts share {shared} tokens after the beginning of text, expected "
            f"{context_tokens} as in 'a photo of a {{}}.'"
        )
    tuning = {"steps": steps, "fraction": fraction, "dispersion": dispersion}

    def encode(params: Any, prompts: Prompts, images: Array) -> Array:
        return l2_normalize(clip.encode_image(params, clip.normalize(images)))

    def prepare(params: Any, prompts: Prompts) -> Predict:
        def texts(context: Array) -> Array:
            return clip.class_embeddings(params, prompts, context)

        start, factor = initial_context(params, prompts, context_tokens), clip.logit_scale(params)
        first = jax.vjp(texts, start)  # every image begins here

        def predict(embeddings: Array) -> tuple[Array, dict[str, Array]]:
            tuned = tune_context(texts, start, embeddings, factor, optimizer, first=first, **tuning)
            return tuned.logits, {"loss": tuned.losses[-1], "skipped": ~tuned.finite}

        return predict

    how = {"views": views, "scale": scale, "views_per_chunk": views_per_chunk}
    return of_views(model, task, encode, prepare, method="TPT", context=lambda _: prompts, **how)


@cuts_views
def ctpt(
    model: Classifier, task: Task | None, *, dispersion: float = 20.0, **settings: Any
) -> Adapter:
    """TPT that keeps the class embeddings apart; λ is 20 on ImageNet's variants, 50 fine-grained.

    Args:
        model: as in `tpt`.
        task: as in `tpt`.
        dispersion: λ, weight of the class embeddings' mean distance from their mean.
        settings: as in `tpt`.

    Returns:
        The adapter.

    Raises:
        TypeError: as `tpt`.
        ValueError: as `tpt`.

    Examples:
        >>> adapter = jaxtta.adapters.ctpt(model, task, dispersion=50.0)  # as `tpt`

    References:
        Yoon et al., ICLR 2024, https://arxiv.org/abs/2403.14119
    """
    return tpt(model, task, dispersion=dispersion, **settings)
