"""The refinement tables of docs/RESULTS.md: python docs/refinement.py RUN VOC [IMAGES]

The same localization maps, those that round 1 of RUN refines, through stages 2 and 3 and through
their peers: each at its own best threshold (peak: an oracle, chosen on the masks, that favours
none) and at the run's fixed one; also within 5 pixels of a mask's boundaries (trimap); and the
milliseconds that an image takes. Core-7 where the classes are VOC's, else mIoU. Then the guided
filter's time at every radius. Masks of training photos are opened, for measuring only. Dense CRF
and OpenCV's filter are measured where they are installed:

    pip install pydensecrf2 opencv-contrib-python-headless
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import refine
import train
from data import IGNORE, InputError, need, say
from sgseg import SGSeg

try:
    import pydensecrf.densecrf as dcrf
    from pydensecrf.utils import unary_from_labels
except ImportError:
    dcrf = None
try:
    from cv2 import ximgproc
except ImportError:
    ximgproc = None

GRID = [t / 100 for t in range(5, 100, 5)]  # of the thresholds among which a peak is sought
CRF_GRID = [t / 100 for t in range(15, 65, 5)]  # fewer for dense CRF: each wants a run of its own
RADII = (4, 8, 16, 32, 48, 64)


# ---- the oracle threshold ------------------------------------------------------------------------


def confusions(target, maps, classes, num_classes, grid):
    """Confusion matrices (T,K+1,K+1) int64 of: class argmax_p M_p where max_p M_p >= t, else
    background, for every t of the ascending grid (T,), all from one histogram of how many
    thresholds a pixel passes. target (H,W) uint8; maps (P,H,W) in [0,1] of classes (P,), P > 0.

    >>> maps = torch.tensor([[[.1, .5, .9]]])
    >>> confusions(np.uint8([[0, 1, 255]]), maps, [0], 1, [.3, .6]).tolist()
    [[[1, 0], [0, 1]], [[1, 0], [1, 0]]]
    """
    n = num_classes + 1
    keep = target != IGNORE
    best, p = maps.max(0)  # (H,W) each
    passed = np.searchsorted(grid, best.numpy()[keep].astype(float), side="right")
    said = np.asarray(classes)[p.numpy()[keep]] + 1
    pairs = n * target[keep].astype(int) + said
    size = (len(grid) + 1) * n * n
    H = np.bincount(passed * n * n + pairs, minlength=size).reshape(-1, n, n)  # (T+1,n,n)
    C = H[::-1].cumsum(0)[-2::-1]  # (T,n,n), pixels that pass t
    C[:, :, 0] += H.sum((0, 2)) - C.sum(2)  # those that do not are background
    return C


def core(s):
    """core-7 of a summary, mIoU where there is none."""
    return s["miou"] if s["core"] is None else s["core"]


def peak(C, grid, classes):
    """The best t of a grid (by core) for its matrices C (T,K+1,K+1), and its summary."""
    found = [(t, data.summary(matrix, classes)) for t, matrix in zip(grid, C)]
    return max(found, key=lambda pair: core(pair[1]))


def trimap(target, width=5):
    """target, but 255 further than `width` pixels from a boundary between two labels."""
    solid = Image.fromarray(target)
    most = np.asarray(solid.filter(ImageFilter.MaxFilter(3)))
    least = np.asarray(solid.filter(ImageFilter.MinFilter(3)))
    edge = Image.fromarray(((most != least) * 255).astype(np.uint8))
    near = np.asarray(edge.filter(ImageFilter.MaxFilter(2 * width + 1))) > 0
    return np.where(near, target, IGNORE)


# ---- the peers -----------------------------------------------------------------------------------


def around(x, dilations):
    """The 8 neighbours of each pixel at every dilation: (B,C,H,W) -> (B,C,8 len(dilations),H,W)."""
    B, C, H, W = x.shape
    found = []
    for d in dilations:
        padded = F.pad(x, (d, d, d, d), mode="replicate")
        patch = F.unfold(padded, 3, dilation=d).view(B, C, 9, H, W)
        found += [patch[:, :, :4], patch[:, :, 5:]]  # all but the pixel itself
    return torch.cat(found, 2)


def pamr(maps, I, steps=10, dilations=(1, 2, 4, 8, 12, 24)):
    """Pixel-adaptive mask refinement (Araslanov & Roth 2020), at full resolution:
    M <- sum_j softmax_j(-|I_i - I_j| / (0.1 sigma_i)) M_j. maps (B,P,H,W), I (B,3,H,W)."""
    n = around(I, dilations)  # (B,3,N,H,W)
    sigma = n.std(2, keepdim=True)
    apart = (n - I[:, :, None]).abs() / (1e-8 + 0.1 * sigma)
    w = (-apart).mean(1, keepdim=True).softmax(2)  # (B,1,N,H,W)
    for _ in range(steps):
        maps = (around(maps, dilations) * w).sum(2)
    return maps


def dense_crf(image, labels):
    """IRN's settings on a map of labels (H,W): gaussian sxy 3 w 3, bilateral sxy 50 srgb 5 w 10,
    10 steps, gt_prob 0.7."""
    names, compact = np.unique(labels, return_inverse=True)
    if len(names) == 1:
        return labels
    H, W = labels.shape
    crf = dcrf.DenseCRF2D(W, H, len(names))
    compact = compact.reshape(H, W)
    crf.setUnaryEnergy(unary_from_labels(compact, len(names), gt_prob=0.7, zero_unsure=False))
    crf.addPairwiseGaussian(sxy=3, compat=3)
    crf.addPairwiseBilateral(sxy=50, srgb=5, rgbim=np.array(image), compat=10)
    return names[np.argmax(np.array(crf.inference(10)), 0)].reshape(H, W)


# ---- their quality -------------------------------------------------------------------------------


def timed(f, *args, **options):
    """f's result and the milliseconds it took."""
    start = time.perf_counter()
    result = f(*args, **options)
    return result, 1000 * (time.perf_counter() - start)


def refined(net, cfg, image, tags):
    """{name: (maps (P,H,W) at full resolution, milliseconds)} of one image."""
    size = image.size[::-1]
    I = data.to_tensor(image)[None]  # (1,3,H,W)
    raw, walk, *_ = train.label_image(net, image, tags, cfg, 1)  # (1,P,h,w)
    mid = net.outputs(image)[3]
    _, ms = timed(refine.affinity_guided, raw, mid, strength=cfg.strength[0])
    raw_full = refine.up(raw, size)  # (1,P,H,W)
    walk_full = refine.up(walk, size)
    ours, ours_ms = timed(refine.self_guided, walk, I, cfg.radius, cfg.eps)
    walk_pamr, walk_pamr_ms = timed(pamr, walk_full, I)
    raw_pamr, raw_pamr_ms = timed(pamr, raw_full, I)
    return {
        "raw": (raw_full[0], 0),
        "affinity": (walk_full[0], ms),
        "affinity + self-guided": (ours[0], ms + ours_ms),
        "affinity + PAMR": (walk_pamr[0], ms + walk_pamr_ms),
        "raw + PAMR": (raw_pamr[0], raw_pamr_ms),
    }


def crf_confusions(image, maps, classes, targets, num_classes):
    """[confusion matrices (T,K+1,K+1) for every target] of dense CRF on the maps cut at each t of
    CRF_GRID, and the milliseconds of one cut."""
    best, p = maps.max(0)
    said = np.asarray(classes)[p.numpy()] + 1
    C = [[] for _ in targets]
    start = time.perf_counter()
    for t in CRF_GRID:
        label = dense_crf(image, np.where(best.numpy() >= t, said, 0))
        for matrices, target in zip(C, targets):
            matrices.append(data.confusion(target, label, num_classes))
    ms = 1000 * (time.perf_counter() - start) / len(CRF_GRID)
    return [np.stack(matrices) for matrices in C], ms


def scores(net, cfg, voc, i, grid):
    """{name: (matrices on the whole image, matrices on the trimap, ms)} of training image i."""
    K = len(voc.classes)
    image = data.read_image(voc.image_paths[i])
    target = voc.mask(i, image.size)
    targets = (target, trimap(target))
    classes = voc.tags[i].nonzero()[:, 0].tolist()
    found = {}
    maps = refined(net, cfg, image, voc.tags[i])
    for name, (M, ms) in maps.items():
        C, band = (confusions(seen, M, classes, K, grid) for seen in targets)
        found[name] = (C, band, ms)
    for name in ("raw", "affinity") if dcrf else ():
        M, before = maps[name]
        (C, band), ms = crf_confusions(image, M, classes, targets, K)
        found[f"{name} + dense CRF"] = (C, band, before + ms)
    return found


def quality(net, cfg, voc, count):
    """Print the table of refinements of `count` training images, drawn with seed 2 from those
    with a mask and a tag (most of them not used for tuning)."""
    usable = [i for i in range(len(voc.ids)) if voc.mask_paths[i] and voc.tags[i].any()]
    need(usable, f"{voc.root}: no training photo with a mask and a tag; expected some; add masks")
    picked = np.random.default_rng(2).permutation(usable)[:count]
    fixed = (cfg.lo + cfg.hi) / 2
    grid = sorted([*GRID, fixed])
    total = {}
    for i in data.track("refinement", picked):
        for name, values in scores(net, cfg, voc, i, grid).items():
            before = total.get(name, (0, 0, 0))
            total[name] = [a + b for a, b in zip(before, values)]
    what = "core-7" if data.CORE <= {"background", *voc.classes} else "mIoU"
    print(f"\n{len(picked)} training images, {torch.get_num_threads()} threads; in %\n")
    print(f"| maps of one network | peak {what} (t) | mIoU there | {what} at {fixed:.3f} | "
          f"trimap {what} | ms |\n|---|---|---|---|---|---|")  # fmt: skip
    for name, (C, band, ms) in total.items():
        there = "-"
        own = CRF_GRID
        if "CRF" not in name:
            n = grid.index(fixed)
            there = f"{100 * core(data.summary(C[n], voc.classes)):.1f}"
            own = GRID
            C, band = (np.delete(matrices, n, 0) for matrices in (C, band))
        t, s = peak(C, own, voc.classes)
        _, near = peak(band, own, voc.classes)
        print(f"| {name} | {100 * core(s):.1f} ({t:.2f}) | {100 * s['miou']:.1f} | {there} | "
              f"{100 * core(near):.1f} | {ms / len(picked):.0f} |")  # fmt: skip


# ---- the guided filter's time and memory ---------------------------------------------------------


def times(f, rounds=33, first=3):
    """{radius: milliseconds of f(radius)}, the radii in turn: a slow moment of the machine meets
    every one. The first rounds are left out."""
    ms = {r: [] for r in RADII}
    for n in range(rounds):
        for r in RADII:
            _, took = timed(f, r)
            if n >= first:
                ms[r].append(took)
    return ms


def speed():
    """Print the guided filter's time and its agreement with OpenCV's. To be called after
    `quality`, when the process has its memory, as in training."""
    torch.manual_seed(0)
    noise = F.interpolate(torch.rand(1, 3, 24, 32), (375, 500), mode="bicubic", align_corners=False)
    I = (noise.clamp(0, 1) + 0.05 * torch.rand(1, 3, 375, 500)).clamp(0, 1)
    p = torch.rand(1, 1, 375, 500)
    cells = F.interpolate(p, (47, 63), mode="area")
    guide = np.ascontiguousarray(I[0].permute(1, 2, 0).numpy())  # (375,500,3)
    source = p[0, 0].numpy()

    def full(r):
        return refine.guided_filter(p, I, r, 1e-3)

    def on_cells(r):
        return refine.self_guided(cells, I, max(1, r // 8), 1e-3)

    def opencv(r, scale=1.0):
        return ximgproc.guidedFilter(guide * np.float32(scale), source, r, 1e-3 * scale**2)

    filters = {"`guided_filter`": full, "`self_guided` on the stride-8 grid": on_cells}
    if ximgproc:
        filters["OpenCV's guidedFilter"] = opencv
    columns = " | ".join(f"r = {r}" for r in RADII)
    print(f"\n| one 500x375 map, ms: median (least) of 30 | {columns} |\n|{'---|' * 7}")
    for name, f in filters.items():
        texts = [f"{np.median(ms):.1f} ({min(ms):.1f})" for ms in times(f).values()]
        print(f"| {name} | {' | '.join(texts)} |")
    for scale in (255.0, 1.0) if ximgproc else ():
        texts = []
        for r in RADII:
            inner = np.s_[2 * r : -2 * r, 2 * r : -2 * r]  # away from borders, which differ
            differ = abs(full(r)[0, 0].numpy() - opencv(r, scale))[inner].max()
            texts.append(f"{differ:.0e}")
        print(f"| largest difference, OpenCV given 0..{scale:.0f} | {' | '.join(texts)} |")


def gibibytes():
    """The most memory that this process has held so far (Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def memory():
    """Print the time and the memory that refining a 2048x2048 image takes. To be called before
    anything else has used memory."""
    before = gibibytes()
    start = time.perf_counter()
    M = refine.affinity_guided(torch.rand(1, 2, 257, 257), torch.rand(1, 24, 257, 257))
    refine.self_guided(M, torch.rand(1, 3, 2048, 2048))
    took = time.perf_counter() - start
    print(f"2048x2048 image, 2 maps: {took:.1f} s; memory of the process rose from "
          f"{before:.2f} to {gibibytes():.2f} GiB")  # fmt: skip


@torch.no_grad()
def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run past its warm-up")
    parser.add_argument("voc", metavar="VOC", help="the devkit of the run")
    parser.add_argument("images", metavar="IMAGES", type=int, nargs="?", default=60, help="[60]")
    given = parser.parse_args()
    net = SGSeg.load(given.run / "warmup.pt")
    path = given.run / "config.json"
    text = data.read_text(path)
    with data.refusing(f"{path}: not of this version", "expected a run's; give another folder"):
        cfg = train.Config(**json.loads(text)["config"])
    voc = data.VOC(given.voc, "train")
    fault = f"{voc.root}: classes {' '.join(voc.classes)}; expected {' '.join(net.classes[1:])}"
    need(voc.classes == net.classes[1:], f"{fault}; give the devkit of the run")
    if not dcrf:
        print("dense CRF is left out: pip install pydensecrf2")
    if not ximgproc:
        print("OpenCV is left out: pip install opencv-contrib-python-headless")
    memory()
    voc.scan()
    quality(net, cfg, voc, given.images)
    speed()


if __name__ == "__main__":
    try:
        main()
    except InputError as fault:
        say(f"refinement.py: {fault}", stream=sys.stderr)
        sys.exit(2)
