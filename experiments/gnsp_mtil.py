"""GNSP on MTIL's eleven tasks, not measured here (docs/papers/gnsp.md).

python experiments/gnsp_mtil.py --data DATA --reference imagenet=IMAGENET/train --output runs/mtil
"""

import sys

from jaxtta.cli.main import main

if __name__ == "__main__":
    tasks = "--tasks order-1 --first-task all --no-task-zero --methods fine-tuning gnsp gnsp-after"
    how = "--model openai/clip-vit-base-patch16 --iterations 1000 --warmup 100 --learning-rate 1e-5"
    main(["continual", *f"{tasks} {how}".split(), *sys.argv[1:]])
