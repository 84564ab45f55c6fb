"""Compare refinements of the same maps: python docs/refinement.py RUN [--voc PATH] [--images N]

The localization maps that round 1 of RUN refines go through stages 2 and 3, and through other
methods in their place. The table (docs/RESULTS.md) has, for every method:

    peak     the highest mIoU over a grid of thresholds t, and that t. It is chosen on the masks, so
             it is an oracle, equally for all methods
    at t     the mIoU at the run's own threshold, (lo + hi) / 2
    trimap   the peak on the pixels within 5 pixels of a boundary of the mask
    ms       the time per image

Masks of training photos are opened, for measuring only. Dense CRF is measured if it is installed:
pip install pydensecrf2. We reimplemented every other method from its paper.
"""

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import refine
import train
from data import IGNORE, InputError, print_line
from sgseg import SGSeg

try:
    import pydensecrf.densecrf as dcrf
    from pydensecrf.utils import unary_from_labels
except ImportError:
    dcrf = None

GRID = [t / 100 for t in range(5, 100, 5)]  # the thresholds among which a peak is sought
CRF_GRID = [t / 100 for t in range(15, 65, 5)]  # fewer for dense CRF, which runs once for each


# ---- scores at many thresholds -------------------------------------------------------------------


def confusions(target, maps, tagged, num_classes, grid):
    """Return C (T,K+1,K+1) int64: for every threshold t the confusion matrix of the labels that
    `refine.pseudo_labels` makes at lo = hi = t.

    All matrices come from one histogram: how many thresholds does the highest map of a pixel pass?

    target (H,W) uint8; maps (P,H,W) in [0,1], P > 0; tagged (P,): the class index of each map;
    grid (T,): thresholds in ascending order.

    >>> maps = torch.tensor([[[.1, .5, .9]]])
    >>> confusions(np.uint8([[0, 1, 255]]), maps, [0], 1, [.3, .6]).tolist()
    [[[1, 0], [0, 1]], [[1, 0], [1, 0]]]
    """
    n = num_classes + 1
    keep = target != IGNORE
    best, p = maps.max(0)  # (H,W) each
    passed = np.searchsorted(grid, best.numpy()[keep].astype(float), side="right")
    predicted = np.asarray(tagged)[p.numpy()[keep]] + 1
    pairs = n * target[keep].astype(int) + predicted
    # H[m,g,k]: pixels of class g whose highest map is that of class k and passes m thresholds
    H = np.bincount(passed * n * n + pairs, minlength=(len(grid) + 1) * n * n).reshape(-1, n, n)
    C = H[::-1].cumsum(0)[-2::-1]  # (T,n,n): the pixels that pass threshold t
    C[:, :, 0] += H.sum((0, 2)) - C.sum(2)  # the others are background
    return C


def peak(C, grid, class_names):
    """Return the threshold with the highest mIoU and its summary; C (T,K+1,K+1) for grid (T,)."""
    summaries = [(t, data.summary(matrix, class_names)) for t, matrix in zip(grid, C)]
    return max(summaries, key=lambda pair: pair[1]["miou"])


def trimap(target, width=5):
    """Return target (H,W) with 255 wherever no boundary lies within `width` pixels."""
    labels = Image.fromarray(target)
    highest = np.asarray(labels.filter(ImageFilter.MaxFilter(3)))
    lowest = np.asarray(labels.filter(ImageFilter.MinFilter(3)))
    boundary = Image.fromarray(((highest != lowest) * 255).astype(np.uint8))
    near = np.asarray(boundary.filter(ImageFilter.MaxFilter(2 * width + 1))) > 0
    return np.where(near, target, IGNORE)


# ---- other methods -------------------------------------------------------------------------------


def neighbours(x, dilations):
    """Return the 8 neighbours of each pixel at every dilation: (B,C,H,W) -> (B,C,N,H,W)."""
    B, C, H, W = x.shape
    parts = []
    for d in dilations:
        padded = F.pad(x, (d, d, d, d), mode="replicate")
        patch = F.unfold(padded, 3, dilation=d).view(B, C, 9, H, W)
        parts += [patch[:, :, :4], patch[:, :, 5:]]  # all but the pixel itself
    return torch.cat(parts, 2)  # N = 8 len(dilations)


def pamr(maps, I, steps=10, dilations=(1, 2, 4, 8, 12, 24)):
    """Return the maps after `steps` steps of PAMR, pixel-adaptive mask refinement:

        M <- sum_j softmax_j(-|I_i - I_j| / (0.1 sigma_i)) M_j

    maps (B,P,H,W); I (B,3,H,W) in [0,1]. Returns (B,P,H,W). Source: Araslanov & Roth 2020.
    """
    near = neighbours(I, dilations)  # (B,3,N,H,W)
    sigma = near.std(2, keepdim=True)
    distance = (near - I[:, :, None]).abs() / (1e-8 + 0.1 * sigma)
    weight = (-distance).mean(1, keepdim=True).softmax(2)  # (B,1,N,H,W)
    for _ in range(steps):
        maps = (neighbours(maps, dilations) * weight).sum(2)
    return maps


def dense_crf(image, labels):
    """Return the labels (H,W) after dense CRF (Krähenbühl & Koltun 2011) with the settings of IRN:
    gaussian sxy 3 w 3, bilateral sxy 50 srgb 5 w 10, 10 steps, gt_prob 0.7."""
    present, compact = np.unique(labels, return_inverse=True)
    if len(present) == 1:
        return labels
    H, W = labels.shape
    crf = dcrf.DenseCRF2D(W, H, len(present))
    compact = compact.reshape(H, W)
    crf.setUnaryEnergy(unary_from_labels(compact, len(present), gt_prob=0.7, zero_unsure=False))
    crf.addPairwiseGaussian(sxy=3, compat=3)
    crf.addPairwiseBilateral(sxy=50, srgb=5, rgbim=np.array(image), compat=10)
    return present[np.argmax(np.array(crf.inference(10)), 0)].reshape(H, W)


# ---- the table -----------------------------------------------------------------------------------


def timed(f, *args, **options):
    """Return the result of f and the milliseconds it took."""
    start = time.perf_counter()
    result = f(*args, **options)
    return result, 1000 * (time.perf_counter() - start)


def refined_maps(net, cfg, image, tags):
    """Return {method: (maps (P,H,W), milliseconds)} of one image."""
    size = image.size[::-1]
    I = data.to_tensor(image)[None]  # (1,3,H,W)
    localized, guided, *_ = train.label_image(net, image, tags, cfg, 1)  # (1,P,h,w) each
    mid = net.outputs(image)[3]
    _, guide_ms = timed(refine.affinity_guided, localized, mid, strength=cfg.strength[0])
    raw = refine.upsample(localized, size)  # (1,P,H,W)
    walked = refine.upsample(guided, size)
    ours, ours_ms = timed(refine.self_guided, guided, I, cfg.radius, cfg.eps)
    walked_pamr, walked_pamr_ms = timed(pamr, walked, I)
    raw_pamr, raw_pamr_ms = timed(pamr, raw, I)
    return {
        "raw": (raw[0], 0),
        "affinity": (walked[0], guide_ms),
        "affinity + self-guided": (ours[0], guide_ms + ours_ms),
        "affinity + PAMR": (walked_pamr[0], guide_ms + walked_pamr_ms),
        "raw + PAMR": (raw_pamr[0], raw_pamr_ms),
    }


def crf_confusions(image, maps, tagged, targets, num_classes):
    """Return [C (T,K+1,K+1) for every target] of dense CRF on the maps cut at each t of CRF_GRID,
    and the milliseconds of one run."""
    best, p = maps.max(0)
    index = np.asarray(tagged)[p.numpy()] + 1
    C = [[] for _ in targets]
    total = 0
    for t in CRF_GRID:
        label, ms = timed(dense_crf, image, np.where(best.numpy() >= t, index, 0))
        total += ms
        for matrices, target in zip(C, targets):
            matrices.append(data.confusion(target, label, num_classes))
    return [np.stack(matrices) for matrices in C], total / len(CRF_GRID)


def image_scores(net, cfg, photos, i, grid):
    """Return {method: [C of the whole image, C of the trimap, ms]} of training image i."""
    K = len(photos.class_names)
    image = data.read_image(photos.image_paths[i])
    truth = photos.mask(i, image.size)
    targets = (truth, trimap(truth))
    tagged = photos.tags[i].nonzero()[:, 0].tolist()
    scores = {}
    maps = refined_maps(net, cfg, image, photos.tags[i])
    for name, (M, ms) in maps.items():
        scores[name] = [*(confusions(target, M, tagged, K, grid) for target in targets), ms]
    for name in ("raw", "affinity") if dcrf else ():
        M, before = maps[name]
        matrices, ms = crf_confusions(image, M, tagged, targets, K)
        scores[f"{name} + dense CRF"] = [*matrices, before + ms]
    return scores


def print_table(net, cfg, photos, count):
    """Print the table for `count` training images that have a mask and a tag, drawn at random."""
    usable = [i for i, path in enumerate(photos.mask_paths) if path and photos.tags[i].any()]
    if not usable:
        problem = "has no training photo with a mask and a tag"
        raise InputError(photos.root, problem, "Add masks", "masks")
    picked = np.random.default_rng(2).permutation(usable)[:count]
    fixed = (cfg.lo + cfg.hi) / 2
    grid = sorted({*GRID, fixed})
    total = {}
    for i in data.progress("refinement", picked):
        for name, values in image_scores(net, cfg, photos, i, grid).items():
            total[name] = [a + b for a, b in zip(total.get(name, (0, 0, 0)), values)]
    print_line(f"\n{len(picked)} training images, {torch.get_num_threads()} threads; mIoU in %\n")
    print_line(f"| maps of one network | peak (t) | at {fixed:.3f} | trimap | ms |")
    print_line("|---|---|---|---|---|")
    for name, (C, C_trimap, ms) in total.items():
        own_grid = CRF_GRID if "CRF" in name else grid
        t, best = peak(C, own_grid, photos.class_names)
        _, near = peak(C_trimap, own_grid, photos.class_names)
        at_fixed = "-"  # dense CRF runs at the thresholds of its own grid only
        if own_grid is grid:
            miou = data.summary(C[grid.index(fixed)], photos.class_names)["miou"]
            at_fixed = f"{100 * miou:.1f}"
        print_line(f"| {name} | {100 * best['miou']:.1f} ({t:.2f}) | {at_fixed} | "
                   f"{100 * near['miou']:.1f} | {ms / len(picked):.0f} |")  # fmt: skip


@torch.no_grad()
def run_job(argv):
    """Print the table of a run. Raises InputError."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("refinement.py", None, __doc__, formatter_class=layout)
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run after its warm-up")
    parser.add_argument("--voc", metavar="PATH", help="its devkit, if that has moved")
    parser.add_argument("--images", metavar="N", type=int, default=60, help="photos to use [60]")
    given = parser.parse_args(argv)
    if given.images < 1:
        parser.error("--images must be at least 1")
    options = {"device": "cpu"} | ({"voc": os.path.abspath(given.voc)} if given.voc else {})
    run = train.load_run(given.run, options, lock=False)
    net = SGSeg.load(given.run / "warmup.pt")
    if not dcrf:
        print_line("dense CRF is left out because it is not installed: pip install pydensecrf2")
    both = replace(run.cfg, affinity=True, self_guided=True)
    print_table(net, both, run.train_set, given.images)


def main(argv=None):
    """Run the command line; return the exit status."""
    return data.run_command("refinement.py", run_job, argv)


if __name__ == "__main__":
    sys.exit(main())
