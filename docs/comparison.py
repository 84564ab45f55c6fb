"""Other methods' labels in our network: python docs/comparison.py METHOD VOC OUT

The same network, weights, photos, steps and scoring as `python train.py --voc VOC`; only what
makes the labels differs. METHOD is a name of METHODS below. All start from the CAM head in round 1
and from the segmentation head afterwards, as ours. Each cuts at a threshold of its own, chosen
anew at every refine by the same procedure, ours included: the t of GRID where the mIoU of its
labels is highest on 60 training photos whose masks are opened for that; pixels within half of
hi - lo of t are undecided, but in the last refine, as in ours. With --from RUN the warm-up is
RUN's; a stopped run goes on with --resume. Dense CRF: pip install pydensecrf2.

Every method is written anew from its paper: one that refines maps, or one that cuts them.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
import data
import refine
import refinement
import train
from data import InputError, need, say

GRID = [t / 100 for t in range(15, 75, 5)]  # of t, from half the band on; EM reads it its own way
TUNING = 60  # photos that choose t


# ---- the methods ---------------------------------------------------------------------------------


def with_pamr(maps, image):
    """Stage 3 of the one-stage recipe (Araslanov & Roth 2020): PAMR at half the photo's
    resolution, a quarter of the time."""
    half = F.interpolate(image, scale_factor=0.5, mode="area")
    return refine.up(refinement.pamr(refine.up(maps, half.shape[-2:]), half), image.shape[-2:])


def cut(maps, classes, image, lo, hi):
    """Our stage 4."""
    return refine.pseudo_labels(maps, classes, lo, hi)[0].numpy()


def cut_by_crf(maps, classes, image, lo, hi):
    """Labels of the two-stage recipe (IRN, Ahn et al. 2019): dense CRF of the maps cut at hi says
    which pixels are objects, of those cut at lo which are background; the rest is undecided."""
    sure = refinement.dense_crf(image, cut(maps, classes, image, hi, hi))
    if lo == hi:
        return sure
    maybe = refinement.dense_crf(image, cut(maps, classes, image, lo, lo))
    return np.where(sure > 0, sure, np.where(maybe > 0, data.IGNORE, 0)).astype(np.uint8)


def em(scores, classes, image, lo, hi):
    """EM-Adapt (Papandreou et al. 2015): the E-step labels every pixel argmax_k (f_k + b_k) among
    background and tags, b raised until each tag leads on a share of at least t / 2 of the image,
    and the background on t; theirs is 0.2 and 0.4. scores (1,P+1,H,W), background first."""
    t = (lo + hi) / 2
    f = scores[0].flatten(1).clone()  # (P+1,HW)
    for k, share in [*((k, t / 2) for k in range(1, len(f))), (0, t)]:
        others = torch.cat([f[:k], f[k + 1 :]]).amax(0) if len(f) > 1 else f[0]
        f[k] += (others - f[k]).quantile(share).clamp_min(0)
    index = torch.tensor([0, *(k + 1 for k in classes)])
    return index[f.argmax(0)].view(scores.shape[-2:]).to(torch.uint8).numpy()


METHODS = {  # is there stage 2; stage 3; the cut
    "raw": (False, None, cut),
    "crf": (False, None, cut_by_crf),
    "pamr": (False, with_pamr, cut),
    "em": (False, None, em),
    "affinity+crf": (True, None, cut_by_crf),
    "affinity+pamr": (True, with_pamr, cut),
    "ours": (True, refine.self_guided, cut),
}


# ---- the same procedure for all ------------------------------------------------------------------


def prepared(method, net, image, tags, cfg, r):
    """What the method cuts, (1,P,H,W), or (1,P+1,H,W) scores for EM, and the classes (P,)."""
    guide, transfer, how = METHODS[method]
    classes = tags.nonzero()[:, 0].tolist()
    I = data.to_tensor(image)[None].to(net.mean.device)  # (1,3,H,W)
    if how is em:
        S, _, Z, _ = net.outputs(image)
        scores = Z if r > 1 else torch.cat([torch.zeros_like(S[:, :1]), S], 1)
        return refine.up(scores[:, [0, *(k + 1 for k in classes)]], I.shape[-2:]).cpu(), classes
    ours = transfer is refine.self_guided
    _, guided, maps, _ = train.label_image(
        net, image, tags, replace(cfg, affinity=guide, self_guided=ours), r
    )
    return (with_pamr(guided, I) if transfer is with_pamr else maps).cpu(), classes


def choose(method, run, r):
    """t of GRID with the highest mIoU of the labels cut at t, without undecided pixels, on TUNING
    training photos."""
    how = METHODS[method][2]
    picked = np.random.default_rng(7).permutation(len(run.voc.ids))[:TUNING]
    C = dict.fromkeys(GRID, 0)
    for i in data.track(f"{method} t", picked):
        image = data.read_image(run.voc.image_paths[i])
        maps, classes = prepared(method, run.net, image, run.voc.tags[i], run.cfg, r)
        truth = run.voc.mask(i, image.size)
        for t in GRID:
            label = how(maps, classes, image, t, t)
            C[t] += data.confusion(truth, label, len(run.voc.classes))
    scores = {t: data.summary(matrix, run.voc.classes)["miou"] for t, matrix in C.items()}
    print(f"{method} refine {r}: {', '.join(f'{t}: {100 * s:.1f}' for t, s in scores.items())}")
    return max(scores, key=scores.get)


def annotator(method, run):
    """What `train.train` asks for the labels of this method."""
    chosen = {}  # refine -> t

    def annotate(net, image, tags, cfg, r):
        if r not in chosen:
            chosen[r] = choose(method, run, r)
        maps, classes = prepared(method, net, image, tags, cfg, r)
        half = (cfg.hi - cfg.lo) / 2 * (r <= cfg.rounds)  # of the band; none in the last refine
        lo = max(0.0, chosen[r] - half)
        label = METHODS[method][2](maps, classes, image, lo, chosen[r] + half)
        return (torch.from_numpy(label)[None],)

    return annotate


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("method", metavar="METHOD", choices=METHODS, help=", ".join(METHODS))
    parser.add_argument("voc", metavar="VOC", help="a devkit with masks of training photos")
    parser.add_argument("out", metavar="OUT", help="a new folder for the run")
    parser.add_argument("--from", metavar="RUN", dest="other", help="a run, for its warm-up")
    parser.add_argument("--resume", action="store_true", help="go on with the run in OUT")
    parser.add_argument("--seed", type=int, default=0, help="[0]")
    given = parser.parse_args()
    crf = METHODS[given.method][2] is cut_by_crf
    need(refinement.dcrf or not crf, "pydensecrf2: not installed; expected it; pip install it")
    held = train.lock(Path(given.out))  # as long as it lives
    own = {"voc": str(Path(given.voc).resolve()), "seed": given.seed}
    if given.resume:
        run = train.reopen(given.out, own, ())
        fine = given.method in run.about["command"] and not given.other
        fault = f"{given.out}: begun with another METHOD or --from; expected its own; correct it"
        need(fine, fault)
    else:
        cfg = train.check(train.Config(**own, out=given.out))
        run = train.begin(cfg, sys.argv, given.other)
    need(all(run.voc.mask_paths), f"{given.voc}: masks are missing; expected all; add them")
    train.train(run, annotator(given.method, run))
    train.evaluate(run)
    held.close()


if __name__ == "__main__":
    try:
        main()
    except InputError as fault:
        say(f"comparison.py: {fault}", stream=sys.stderr)
        sys.exit(2)
