"""BATCLIP on ImageNet-C: published gain 5.1 points, not measured here (docs/papers/batclip.md).

python experiments/batclip_imagenet_c.py --data IMAGENET-C --workers 8 --output runs/imagenet-c
"""

import sys

from jaxtta.cli.main import main

if __name__ == "__main__":
    protocol = "--layout imagenet-c --ids imagenet-c-5000 --preset imagenet-c --batch-size 64"
    model = "--model openai/clip-vit-base-patch16 --compute-dtype bfloat16"
    main(["sweep", *protocol.split(), *model.split(), *sys.argv[1:]])
