"""The README's picture: python docs/pictures.py RUN PHOTO=TAG[,TAG] ... OUT.png

One row a tag: photo | localization map | + affinity | + self-guided | pseudo label, all of round 1,
then what the last network makes of them: its pseudo label | its prediction without a tag. The
README's photos are chelsea.png (CC0) and astronaut.png (public domain) of the scikit-image wheel:
pip download --no-deps scikit-image && unzip -j scikit_image-*.whl skimage/data/chelsea.png
skimage/data/astronaut.png
"""

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import train
from data import InputError, need, say
from sgseg import SGSeg


def read_config(folder):
    """The Config of a run folder. Raises InputError."""
    path = folder / "config.json"
    text = data.read_text(path)
    with data.refusing(f"{path}: not of this version", "expected a run's; give another folder"):
        return train.Config(**json.loads(text)["config"])


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run")
    parser.add_argument("photos", metavar="PHOTO=TAG[,TAG]", nargs="+", help="photo and its tags")
    parser.add_argument("out", metavar="OUT.png", help="the picture to write")
    given = parser.parse_args()
    cfg = read_config(given.run)
    first = SimpleNamespace(net=SGSeg.load(given.run / "warmup.pt"), cfg=cfg, val=None)
    last = SimpleNamespace(net=SGSeg.load(given.run), cfg=cfg, val=None)  # what `panel` looks at
    classes = last.net.classes[1:]
    paths = []
    tags = torch.zeros(len(given.photos), len(classes))
    for n, argument in enumerate(given.photos):
        path, _, words = argument.rpartition("=")
        fault = f"{argument}: tagged {words or 'nothing'}; expected some of {' '.join(classes)}"
        need(path and set(words.split(",")) <= set(classes), f"{fault}; correct it")
        paths.append(path)
        for word in words.split(","):
            tags[n, classes.index(word)] = 1
    photos = SimpleNamespace(image_paths=paths, classes=classes, tags=tags, mask_paths=None)
    rows = []
    for n in range(len(paths)):
        before = train.panel(first, photos, n, 0)
        after = train.panel(last, photos, n, cfg.rounds)
        for row, later in zip(before, after):
            *_, (label, labelled), (prediction, predicted) = later.items()
            rows.append(row | {f"last {label}": labelled, prediction: predicted})
    data.write(given.out, data.sheet(rows))
    print("written", given.out)


if __name__ == "__main__":
    try:
        main()
    except InputError as fault:
        say(f"pictures.py: {fault}", stream=sys.stderr)
        sys.exit(2)
