"""The settings of training on one task after another."""

import dataclasses
import math
from typing import Literal

from jaxtta.continual.gram import check_rho


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Training."""

    iterations: int = 300  # training steps per task (paper: 100 to 1000)
    warmup: int | None = None  # warm-up steps per task (paper: 100; default: a tenth of the steps)
    batch_size: int = 64  # images per step
    learning_rate: float = 5e-5  # peak learning rate of AdamW (paper: 1e-5 to 5e-5 on CLIP)
    rho: float = 0.15  # share of the sum of singular values that is treated as the null space
    gram_images: int | None = None  # images per task for its Gram matrices (paper, default: all)
    # what the first task trains: the kernels of the others, or (published) all but the logit scale
    first_task: Literal["same", "all"] = "same"
    task_zero: bool = True  # whether to project the first task, by the reference images (paper: no)
    reference_images: int = 1000  # number of reference images
    reference_batch: int = 64  # reference pairs per step
    wise_share: float = 0.5  # weight of the fine-tuned parameters in wise-ft's average
    max_images: int | None = None  # use at most so many test images of each task
    workers: int = 0  # threads that decode files, or processes for other images; 0 for one thread

    def __post_init__(self) -> None:
        """Validate the settings."""
        check_rho(self.rho)
        ranges = dict.fromkeys(("reference_images", "reference_batch"), (2, math.inf))
        ranges |= dict.fromkeys(("learning_rate", "workers"), (0, math.inf))
        ranges |= {"warmup": (0, self.iterations), "wise_share": (0, 1)}
        for name in ("iterations", "batch_size", "gram_images", "max_images", *ranges):
            value, (least, most) = getattr(self, name), ranges.get(name, (1, math.inf))
            if value is not None and not least <= value <= most:
                raise ValueError(f"{name} is {value}, expected {least} to {most}")

    @property
    def schedule(self) -> tuple[float, int, int]:
        """Learning rate, iterations and warm-up steps of every task; see `task_optimizer`."""
        warmup = self.iterations // 10 if self.warmup is None else self.warmup
        return self.learning_rate, self.iterations, warmup
