r"""TNT: published top-1 from 57.21 to 62.63 on four natural shifts, 63.68 to 64.07 on ten sets.

python experiments/tnt_natural_shifts.py --output runs/natural --datasets \
        imagenet-a=DATA/imagenet-a imagenet-v2=DATA/imagenet-v2 imagenet-r=DATA/imagenet-r \
        imagenet-sketch=DATA/sketch
python experiments/tnt_natural_shifts.py --output runs/cross --datasets caltech101=DATA \
        oxford-pets=DATA stanford-cars=DATA oxford-flowers=DATA food101=DATA fgvc-aircraft=DATA \
        sun397=DATA dtd=DATA eurosat=DATA ucf101=DATA
"""

import sys

from jaxtta.cli.main import main

if __name__ == "__main__":
    model = "--model openai/clip-vit-base-patch16 --batch-size 16 --tnt.images-per-map 16"
    main(["shifts", *model.split(), *sys.argv[1:]])
