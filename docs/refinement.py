"""The README's refinement tables: python docs/refinement.py RUN VOC [images] [warmup.pt or checkpoint.pt]

The same localization maps, those that a run's round 1 refined, each method at its own best threshold (peak, an oracle that
favours none) and at the run's fixed one; trimap IoU within 5 pixels of a mask's boundaries; milliseconds an image. Dense CRF
(pydensecrf2) and OpenCV's guided filter are measured where installed. Training masks are used for measuring only.
"""
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter

sys.path.insert(0, str(Path(__file__).parent.parent))
import refine
import train
from data import IGNORE, VOC, confusion, confusions, read_image, summary, to_tensor

try:
    import pydensecrf.densecrf as dcrf
    from pydensecrf.utils import unary_from_labels
except ImportError:
    dcrf = None
    print("dense CRF skipped: pip install pydensecrf2 to measure it")
try:
    from cv2 import ximgproc
except ImportError:
    ximgproc = None
    print("OpenCV's guided filter skipped: pip install opencv-contrib-python-headless to measure it")

def pamr(maps, I, steps=10, dilations=(1, 2, 4, 8, 12, 24)):
    """Pixel-adaptive refinement (Araslanov & Roth 2020): M <- sum_j softmax_j(-|I_i - I_j| / (0.1 sigma_i)) M_j."""
    def around(x):                                                 # (B,C,H,W) -> (B,C,8 len(dilations),H,W)
        B, C, H, W = x.shape
        patches = [F.unfold(F.pad(x, (d,) * 4, mode="replicate"), 3, dilation=d).view(B, C, 9, H, W) for d in dilations]
        return torch.cat([torch.cat([p[:, :, :4], p[:, :, 5:]], 2) for p in patches], 2)
    n = around(I)
    w = (-(n - I[:, :, None]).abs() / (1e-8 + 0.1 * n.std(2, keepdim=True))).mean(1, keepdim=True).softmax(2)
    for _ in range(steps):
        maps = (around(maps) * w).sum(2)
    return maps

def dense_crf(image, labels):
    """IRN's settings on a map of labels 0..n-1: gaussian sxy 3 w 3, bilateral sxy 50 srgb 5 w 10, 10 steps, gt_prob 0.7."""
    names, compact = np.unique(labels, return_inverse=True)
    if len(names) == 1:
        return labels
    crf = dcrf.DenseCRF2D(labels.shape[1], labels.shape[0], len(names))
    crf.setUnaryEnergy(unary_from_labels(compact.reshape(labels.shape), len(names), gt_prob=0.7, zero_unsure=False))
    crf.addPairwiseGaussian(sxy=3, compat=3)
    crf.addPairwiseBilateral(sxy=50, srgb=5, rgbim=np.array(image), compat=10)
    return names[np.argmax(np.array(crf.inference(10)), 0)].reshape(labels.shape)

def trimap(target, width=5):
    """target with everything further than `width` pixels from a boundary between two labels set to 255."""
    solid = Image.fromarray(target)
    edge = np.asarray(solid.filter(ImageFilter.MaxFilter(3))) != np.asarray(solid.filter(ImageFilter.MinFilter(3)))
    near = np.asarray(Image.fromarray((edge * 255).astype(np.uint8)).filter(ImageFilter.MaxFilter(2 * width + 1))) > 0
    return np.where(near, target, IGNORE)

def quality(net, cfg, voc, count):
    """Print the table of refinements of the CAM maps of `count` training images drawn with seed 2 (most of them not used for tuning)."""
    K = len(voc.classes)
    names = ["raw", "affinity", "affinity + self-guided", "affinity + PAMR", "raw + PAMR"]
    scores, bands, ms = {n: 0 for n in names}, {n: 0 for n in names}, {n: [] for n in names}
    crf_grid = [t / 100 for t in range(15, 45, 5)] if dcrf else []
    crf, crf_band, crf_ms = ({t: 0 for t in crf_grid}, {t: 0 for t in crf_grid}, [])
    images = np.random.default_rng(2).permutation([i for i in range(len(voc.ids)) if voc.mask_paths[i]])[:count]
    fixed = round((cfg.lo + cfg.hi) / 2, 2)
    grid = sorted({fixed, *(t / 100 for t in range(5, 100, 5))})
    for i in train.track("refinement", images):
        image, y = read_image(voc.image_paths[i]), voc.labels[i]
        I, k, target = to_tensor(image)[None], y.nonzero()[:, 0], voc.mask(i, image.size)
        band, tags = trimap(target), torch.ones(1, len(k))
        full = lambda M: refine.up(M, target.shape)

        def timed(name, f, *args):
            start = time.perf_counter()
            M = f(*args)
            ms[name].append(1000 * (time.perf_counter() - start))
            return M
        S, _, _, mid = train.network_outputs(net, image, cfg)
        raw = refine.localization_maps(S[:, k], tags)
        walk = timed("affinity", lambda: refine.localization_maps(refine.affinity_guided(
            raw, mid, cfg.steps, cfg.strength, temperature=cfg.temperature), tags))
        maps = {"raw": full(raw), "affinity": full(walk),
                "affinity + self-guided": timed("affinity + self-guided", refine.self_guided, walk, I, cfg.radius, cfg.eps),
                "affinity + PAMR": timed("affinity + PAMR", lambda: pamr(full(walk), I)),
                "raw + PAMR": timed("raw + PAMR", lambda: pamr(full(raw), I))}
        for name, M in maps.items():
            scores[name] += confusions(target, M[0], k.numpy(), K, grid)
            bands[name] += confusions(band, M[0], k.numpy(), K, grid)
        best, c = maps["raw"][0].max(0)
        for t in crf_grid:
            start = time.perf_counter()
            label = dense_crf(np.asarray(image), np.where(best.numpy() >= t, k.numpy()[c.numpy()] + 1, 0))
            crf_ms.append(1000 * (time.perf_counter() - start))
            crf[t], crf_band[t] = crf[t] + confusion(target, label, K), crf_band[t] + confusion(band, label, K)
    for name in ("affinity + self-guided", "affinity + PAMR"):
        ms[name] = [a + b for a, b in zip(ms["affinity"], ms[name])]
    print(f"\n{len(images)} training images; in %; peak: best of a 0.05 grid by core\n")
    print("| maps of one network | peak core-7 (t) | mIoU there | core-7 at the fixed threshold | trimap core-7 | ms |\n|---|---|---|---|---|---|")

    def row(name, C, bands, fixed, times):
        """C and bands: {threshold: confusion matrix}; fixed: a threshold, or None where there is none."""
        at, band_at = ({t: summary(matrix, voc.classes) for t, matrix in matrices.items()} for matrices in (C, bands))
        on_grid = [t for t in at if round(100 * t) % 5 == 0]
        core = lambda s: s["miou"] if s["core"] is None else s["core"]   # outside VOC: mIoU
        t = max(on_grid, key=lambda t: core(at[t]))
        trimap_core, there = max(core(band_at[t]) for t in on_grid), f"{100 * core(at[fixed]):.1f}" if fixed else "-"
        print(f"| {name} | {100 * core(at[t]):.1f} ({t:.2f}) | {100 * at[t]['miou']:.1f} | {there} | {100 * trimap_core:.1f} | "
              f"{np.mean(times) if times else 0:.0f} |")
    for name in names:
        row(name, dict(zip(grid, scores[name])), dict(zip(grid, bands[name])), fixed, ms[name])
    if crf_grid:
        row("raw + dense CRF", crf, crf_band, None, crf_ms)

def speed():
    """Print time and agreement of the guided filter: run after `quality`, when the process has its memory, as in training."""
    torch.manual_seed(0)
    noise = F.interpolate(torch.rand(1, 3, 24, 32), (375, 500), mode="bicubic", align_corners=False).clamp(0, 1)
    I, p = (noise + 0.05 * torch.rand(1, 3, 375, 500)).clamp(0, 1), torch.rand(1, 1, 375, 500)
    cells, radii = F.interpolate(p, (47, 63), mode="area"), (4, 8, 16, 32, 48, 64)
    guide, source = np.ascontiguousarray(I[0].permute(1, 2, 0).numpy()), p[0, 0].numpy()
    filters = {"sgseg guided_filter": lambda r: refine.guided_filter(p, I, r, 1e-3),
               "sgseg self_guided, fitted on the stride-8 grid (r / 8 cells)": lambda r: refine.self_guided(cells, I, max(1, r // 8), 1e-3)}
    if ximgproc:
        filters["OpenCV guidedFilter"] = lambda r: ximgproc.guidedFilter(guide, source, r, 1e-3)
    print("\n| one 500x375 map, ms: median (least) of 30, radii in turn | " + " | ".join(f"r = {r}" for r in radii) + " |\n|" + "---|" * 7)
    for name, f in filters.items():
        ms = {r: [] for r in radii}
        for n in range(33):                                        # in turn: a slow moment of the machine meets every radius
            for r in radii:
                start = time.perf_counter()
                f(r)
                ms[r] += [1000 * (time.perf_counter() - start)] if n >= 3 else []
        print(f"| {name} | " + " | ".join(f"{np.median(t):.1f} ({min(t):.1f})" for t in ms.values()) + " |")
    if ximgproc:
        for text, scale in (("colours in 0..255", 255.0), ("colours in 0..1", 1.0)):
            differ = []
            for r in radii:
                a = refine.guided_filter(p, I, r, 1e-3)[0, 0].numpy()
                b = ximgproc.guidedFilter(guide * np.float32(scale), source, r, 1e-3 * scale ** 2)
                inner = np.s_[2 * r:-2 * r, 2 * r:-2 * r]
                differ.append(f"{abs(a[inner] - b[inner]).max():.0e}")
            print(f"| largest difference away from borders, eps 1e-3, OpenCV given {text} | " + " | ".join(differ) + " |")

def memory():
    """Print the time and the memory that refining a 2048x2048 image takes; to be called before anything else has used memory."""
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20   # GiB on Linux
    before, start = peak(), time.perf_counter()
    M = refine.affinity_guided(torch.rand(1, 2, 257, 257), torch.rand(1, 24, 257, 257))
    refine.self_guided(M, torch.rand(1, 3, 2048, 2048))
    print(f"\n2048x2048 image, 2 maps: {time.perf_counter() - start:.1f} s; memory of the process rose from {before:.2f} to {peak():.2f} GiB")

if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    torch.set_grad_enabled(False)
    memory()
    state, stored = train.load_run(sys.argv[1])
    name = sys.argv[4] if len(sys.argv) > 4 else "warmup.pt"
    voc = VOC(sys.argv[2], "train", stored.difficult)
    voc.scan()
    cfg = train.configure({"device": "cpu"}, sys.argv[1], stored)
    net = train.build(cfg, voc.classes, train.load(Path(sys.argv[1]) / name)).eval()
    quality(net, cfg, voc, int(sys.argv[3]) if len(sys.argv) > 3 else 60)
    speed()
