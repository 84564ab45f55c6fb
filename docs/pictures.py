"""The README's pictures: python docs/pictures.py RUN PHOTO=TAG[,TAG] ... OUT.png

One row a tagged class: photo | localization map | + affinity | + self-guided | pseudo label | prediction, through the
checkpoint in RUN. The README's photos are chelsea.png (CC0) and astronaut.png (public domain) of the scikit-image wheel:
pip download --no-deps scikit-image && unzip -j scikit_image-*.whl skimage/data/chelsea.png skimage/data/astronaut.png
"""
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import train
from data import read_image

if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    folder, *photos, out = sys.argv[1:]
    state, stored = train.load_run(folder)
    cfg, classes = train.configure({}, folder, stored), state["classes"]
    net, sheets = train.build(cfg, classes, state), []
    for argument in photos:
        photo, _, tags = argument.partition("=")
        if set(tags.split(",")) - set(classes):
            sys.exit(f"{argument}: expected tags among {' '.join(classes)}")
        y = torch.tensor([float(name in tags.split(",")) for name in classes])
        sheets.append(train.panel(net, read_image(photo), y, classes, cfg, cfg.rounds + 1))
    sheet = Image.fromarray(np.concatenate(sheets))
    sheet.crop((0, 0, sheet.width * 6 // 7, sheet.height)).save(out, optimize=True)   # no ground truth: the last column is empty
    print("written", out)
