"""Where it fails, redrawn from your own devkit: python docs/failures.py RUN VOC OUT [ID ...]

Photo | prediction | ground truth of val images, written to the folder OUT (VOC's photos are not ours to publish). Without
ids: the ten val images with the lowest mean IoU over the classes in them.
"""
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import train
from data import VOC, confusion, read_image, summary

if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    folder, kit, out, *ids = sys.argv[1:]
    state, stored = train.load_run(folder)
    cfg, classes = train.configure({}, folder, stored), state["classes"]
    net = train.build(cfg, classes, state).eval()
    val, rows = VOC(kit, "val"), []
    if unknown := set(ids) - set(val.ids):
        sys.exit(f"{' '.join(sorted(unknown))}: expected ids of {val.root}/ImageSets/Segmentation/val.txt")
    for i in train.track("failures", [val.ids.index(name) for name in ids] or range(len(val.ids))):
        image = read_image(val.image_paths[i])
        target, label = val.mask(i, image.size), train.segment(net, image, cfg)
        score = summary(confusion(target, label, len(classes)), classes)["miou"]
        rows.append((score, val.ids[i], image, label, target))
    Path(out).mkdir(parents=True, exist_ok=True)
    for score, name, image, label, target in sorted(rows, key=lambda row: row[0])[:len(ids) or 10]:
        sheet = Image.new("RGB", (3 * image.width, image.height))
        for n, picture in enumerate((image, train.overlay(image, label), train.overlay(image, target))):
            sheet.paste(picture, (n * image.width, 0))
        sheet.save(Path(out) / f"{name}.png")
        said = lambda m: " ".join(classes[k - 1] for k in np.unique(m) if 0 < k < 255)
        print(f"{name}: mIoU {100 * score:.1f}; true {said(target)}; predicted {said(label) or 'background'}")
