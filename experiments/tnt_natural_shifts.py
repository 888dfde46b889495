r"""TNT on natural distribution shifts and on the ten cross-dataset sets.

    python experiments/tnt_natural_shifts.py --output runs/natural --datasets \
        imagenet-a=DATA/imagenet-a imagenet-v2=DATA/imagenet-v2 imagenet-r=DATA/imagenet-r \
        imagenet-sketch=DATA/sketch
    python experiments/tnt_natural_shifts.py --output runs/cross --datasets caltech101=DATA \
        oxford-pets=DATA stanford-cars=DATA oxford-flowers=DATA food101=DATA fgvc-aircraft=DATA \
        sun397=DATA dtd=DATA eurosat=DATA ucf101=DATA

Published, not measured here: top-1 from zero-shot to TNT, ViT-B/16 of OpenAI, 64 views, one step:
47.85 to 61.87 on ImageNet-A, 57.21 to 62.63 on the mean of the four; 63.68 to 64.07 on the mean of
the ten. What differs from the paper is in docs/published.md.
"""

import sys

from jaxtta.cli.main import main

if __name__ == "__main__":
    model = "--model openai/clip-vit-base-patch16 --batch-size 16 --tnt.images-per-map 16"
    main(["shifts", *model.split(), *sys.argv[1:]])
