"""Where a network fails, redrawn from your own devkit: python docs/failures.py RUN VOC OUT [ID ...]

Writes photo | prediction | ground truth of val images to the folder OUT (VOC's photos are not
ours to publish). Without ids: the ten val images with the lowest mean IoU over the classes in
them.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
from data import IGNORE, InputError, need, say
from sgseg import SGSeg


def said(label, classes):
    """The names of the classes in a label, classes[0] being the background's."""
    names = [classes[k] for k in np.unique(label) if 0 < k < IGNORE]
    return " ".join(names) or "background only"


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("run", metavar="RUN", help="folder of a run, or its model.pt")
    parser.add_argument("voc", metavar="VOC", help="the devkit")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for the pictures")
    parser.add_argument("ids", metavar="ID", nargs="*", help="of val.txt")
    given = parser.parse_args()
    net = SGSeg.load(given.run)
    val = data.VOC(given.voc, "val")
    fault = f"{val.root}: classes {' '.join(val.classes)}; expected {' '.join(net.classes[1:])}"
    need(val.classes == net.classes[1:], f"{fault}; give the devkit of the run")
    unknown = " ".join(sorted(set(given.ids) - set(val.ids)))
    need(not unknown, f"{unknown}: not in {val.root}'s val.txt; expected ids of it; correct them")
    picked = [val.ids.index(name) for name in given.ids] or range(len(val.ids))
    rows = []
    for i in data.track("failures", picked):
        name = val.ids[i]
        need(val.mask_paths[i], f"{val.root}: {name} has no mask; expected one; add it")
        image = data.read_image(val.image_paths[i])
        truth = val.mask(i, image.size)
        label = net.segment(image)
        score = data.summary(data.confusion(truth, label, len(val.classes)), val.classes)
        rows.append((score["miou"], name, image, label, truth))
    rows.sort(key=lambda row: row[0])
    for miou, name, image, label, truth in rows[: len(given.ids) or 10]:
        row = {name: image, "prediction": data.overlay(image, label)}
        row["ground truth"] = data.overlay(image, truth)
        data.write(given.out / f"{name}.png", data.sheet([row], width=image.width))
        words = f"true {said(truth, net.classes)}; predicted {said(label, net.classes)}"
        print(f"{name}: mIoU {100 * miou:.1f}; {words}")


if __name__ == "__main__":
    try:
        main()
    except InputError as fault:
        say(f"failures.py: {fault}", stream=sys.stderr)
        sys.exit(2)
