r"""Robustness of CLIP, beside accuracies of supervised models that timm publishes.

python experiments/clip_robustness.py --data IMAGENET/val --output runs/robustness --shifted \
        imagenet-v2=imagenet-v2=IMAGENET-V2 imagenet-r=imagenet=IMAGENET-R \
        imagenet-sketch=imagenet=SKETCH imagenet-a=imagenet=IMAGENET-A
"""

import sys

from jaxtta.cli.main import main

if __name__ == "__main__":
    sets = "--layout imagenet --corruptions --reference-points published"
    main(["diagnose", "--models", "openai/clip-vit-base-patch16", *sets.split(), *sys.argv[1:]])
