r"""GNSP on MTIL's eleven tasks, not measured here (docs/published.md).

    python experiments/gnsp_mtil.py --data DATA --reference imagenet=IMAGENET/train \
        --output runs/mtil
"""

import sys

from jaxtta.cli.main import main

if __name__ == "__main__":
    tasks = "--model openai/clip-vit-base-patch16 --tasks order-1 --first-task all --no-task-zero"
    training = "--iterations 1000 --warmup 100 --learning-rate 1e-5"
    methods = "--methods fine-tuning gnsp gnsp-after"
    main(["continual", *f"{tasks} {training} {methods}".split(), *sys.argv[1:]])
