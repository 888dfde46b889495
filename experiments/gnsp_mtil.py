r"""GNSP on MTIL's eleven tasks.

    python experiments/gnsp_mtil.py --data DATA --reference imagenet=IMAGENET/train \
        --output runs/mtil

Not measured here. The published figures have 100 to 1,000 iterations and learning rates of 1e-5 to
5e-5, by task; this has one of each for all tasks (docs/published.md).
"""

import sys

from jaxtta.cli.main import main

if __name__ == "__main__":
    tasks = "--model openai/clip-vit-base-patch16 --tasks order-1 --first-task all --no-task-zero"
    training = "--iterations 1000 --warmup 100 --learning-rate 1e-5"
    methods = "--methods fine-tuning gnsp gnsp-after"
    main(["continual", *f"{tasks} {training} {methods}".split(), *sys.argv[1:]])
