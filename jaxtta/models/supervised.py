"""A supervised image classifier: transformers' ViTForImageClassification.

    model, params = jaxtta.load("google/vit-base-patch16-224")         # or a local folder
    adapter = jaxtta.adapters.tent(model, None)                        # its classes are its own

Its tower is CLIP's but for the first LayerNorm, so that everything that adapts CLIP's image tower
adapts this too.
"""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jaxtta.models.checks import require_pil
from jaxtta.models.classifier import Batch, Outputs, Params, as_batch
from jaxtta.models.clip import normalize, part
from jaxtta.models.preprocess import Preprocessing
from jaxtta.models.vit import VisionOutput, VisionTransformer

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class ImageClassifier:
    """A classifier without its parameters; hashable, so that jitted functions may close over it.

    Attributes:
        vision: the tower.
        class_names: names of the classes.
        preprocessing: the checkpoint's image preprocessing.
        preprocessing_origin: the file that `preprocessing` was read from.

    Examples:
        >>> import transformers
        >>> config = transformers.ViTConfig(num_hidden_layers=1, image_size=32, num_labels=3)
        >>> model = jaxtta.models.classifier_from_config(config)
        >>> model.image_size, model.feature_shape, len(model.class_names)
        (32, (1, 768), 3)
    """

    vision: VisionTransformer
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    preprocessing_origin: str = dataclasses.field(default="ViT's defaults", compare=False)

    mixes_batch = False

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return self.preprocessing.image_size

    @property
    def feature_shape(self) -> tuple[int, int] | None:
        """(Layers, width) of the layer features."""
        return self.vision.feature_shape

    def init(self, key: Array) -> Params:
        """Draw random parameters; the tree has `vision_model` and `classifier`."""
        tower_key, head_key = jax.random.split(key)
        size = self.preprocessing.image_size
        tower = self.vision.init(tower_key, jnp.zeros((1, size, size, 3)))
        width, classes = self.vision.arch.width, len(self.class_names)
        head = {
            "kernel": jax.random.normal(head_key, (width, classes)) * width**-0.5,
            "bias": jnp.zeros(classes),
        }
        return {"vision_model": tower["params"], "classifier": head}

    def normalize(self, images: Array) -> Array:
        """Normalise images (batch, height, width, 3), uint8 or float in [0, 1]."""
        return normalize(self.preprocessing, images)

    def preprocess(self, images: list[Image.Image]) -> np.ndarray:
        """Bring PIL images to the model's resolution, (batch, height, width, 3) uint8."""
        require_pil(images)
        return np.stack([self.preprocessing(image) for image in images])

    def image_features(self, params: Params, pixels: Array) -> VisionOutput:
        """Encode normalised pixels (batch, height, width, 3) and return the layers' features."""
        out = self.vision.apply({"params": part(params, "vision_model")}, pixels)
        return cast(VisionOutput, out)

    def init_context(self, params: Params, task: None) -> tuple[()]:
        """Return (): the classes are the head's.

        Raises:
            ValueError: if there is a task.
        """
        del params
        if task is not None:
            raise ValueError("a supervised classifier has classes of its own, task must be None")
        return ()

    def __call__(self, params: Params, context: Any, batch: Batch | Array) -> Outputs:
        """Classify a batch.

        Args:
            params: the parameter tree.
            context: not used.
            batch: the batch, or (batch, height, width, 3) images, uint8 or float in [0, 1].

        Returns:
            Logits; the class token as embedding, the head's unit rows as class embeddings; layer
            features.
        """
        del context
        out = self.image_features(params, self.normalize(jnp.asarray(as_batch(batch).images)))
        head = params["classifier"]
        pooled = out.pooled.astype(jnp.promote_types(out.pooled.dtype, jnp.float32))
        rows = head["kernel"].astype(pooled.dtype)
        logits = jnp.matmul(pooled, rows, precision="highest") + head["bias"]
        directions = (rows / jnp.linalg.norm(rows, axis=0)).T
        return Outputs(logits, pooled, directions, out.layer_features)
