r"""MGTTA with a supervised ViT on ImageNet-C: published top-1 71.3 (without adaptation 55.5).

jaxtta pretrain-mgg --model google/vit-base-patch16-224 --layout imagenet-c \
        --data IMAGENET-C --source IMAGENET/val --output runs/mgg
python experiments/mgtta_imagenet_c.py --data IMAGENET-C --output runs/mgtta
"""

import sys

from jaxtta.cli.main import main

if __name__ == "__main__":
    protocol = "--layout imagenet-c --preset imagenet-c --batch-size 64"
    model = "--model google/vit-base-patch16-224 --adapters zero_shot tent mgtta"
    mgg = "--mgtta.phi runs/mgg/phi.safetensors --mgtta.statistics runs/mgg/statistics.safetensors"
    main(["sweep", *f"{protocol} {model} {mgg}".split(), *sys.argv[1:]])
