"""Train our network on other methods' labels: python docs/comparison.py METHOD VOC OUT

The network, weights, photos, steps and scores are those of `python train.py --voc VOC`; only the
labels are made by another method. All methods read the CAM head in round 1 and the segmentation
head afterwards, as ours does.

Every method, ours included, cuts its maps at a threshold t of its own, chosen anew in each refine
step: the t of GRID at which its labels have the highest mIoU on 60 training photos. The masks of
these photos are opened for that. Pixels whose highest map lies within (hi - lo) / 2 of t are
undecided; the last refine step decides all pixels, as in ours. (EM-Adapt has no maps to cut: its t
sets the shares of the classes, and it decides all pixels in every refine step.)

--from RUN starts from the warm-up of another run. --resume continues a run that was stopped. Dense
CRF: pip install pydensecrf2. We reimplemented every other method from its paper.
"""

import argparse
import json
import os
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
from data import InputError, as_input_error, print_line
from sgseg import SGSeg

GRID = [t / 100 for t in range(15, 75, 5)]  # values of t; the smallest is (hi - lo) / 2
TUNING = 60  # photos on which t is chosen


# ---- the methods ---------------------------------------------------------------------------------


def with_pamr(maps, image):
    """Refine as in stage 3 of the single-stage method (Araslanov & Roth 2020), by PAMR.

    It runs at half the image's resolution, which takes a quarter of the time.
    """
    half = F.interpolate(image, scale_factor=0.5, mode="area")
    maps = refinement.pamr(refine.upsample(maps, half.shape[-2:]), half)
    return refine.upsample(maps, image.shape[-2:])


def cut(maps, tagged, image, lo, hi):
    """Return the label by stage 4 of our own method."""
    return refine.pseudo_labels(maps, tagged, lo, hi)[0].numpy()


def cut_by_crf(maps, tagged, image, lo, hi):
    """Return the label by stage 4 of the two-stage method (IRN, Ahn et al. 2019).

    Dense CRF runs twice. It finds the objects on the maps cut at hi, and the background on the maps
    cut at lo. The rest is undecided.
    """
    objects = refinement.dense_crf(image, cut(maps, tagged, image, hi, hi))
    if lo == hi:
        return objects
    not_background = refinement.dense_crf(image, cut(maps, tagged, image, lo, lo))
    rest = np.where(not_background > 0, data.IGNORE, 0)
    return np.where(objects > 0, objects, rest).astype(np.uint8)


def em(scores, tagged, image, lo, hi):
    """Return the label by the E-step of EM-Adapt (Papandreou et al. 2015).

    Every pixel is argmax_k (f_k + b_k) among background and tags. One bias b_k after another is
    raised until its class leads on a share of at least t / 2 of the image; last, that of background
    until it leads on t. (The paper uses 0.2 and 0.4.)

    scores f (1,P+1,H,W), background first.
    """
    t = (lo + hi) / 2
    f = scores[0].flatten(1).clone()  # (P+1,HW)
    for k, share in [*((k, t / 2) for k in range(1, len(f))), (0, t)]:
        others = torch.cat([f[:k], f[k + 1 :]]).amax(0) if len(f) > 1 else f[0]
        f[k] += (others - f[k]).quantile(share).clamp_min(0)
    index = torch.tensor([0, *(k + 1 for k in tagged)])
    return index[f.argmax(0)].view(scores.shape[-2:]).to(torch.uint8).numpy()


METHODS = {  # is stage 2 used?; the functions of stages 3 and 4
    "raw": (False, None, cut),
    "crf": (False, None, cut_by_crf),
    "pamr": (False, with_pamr, cut),
    "em": (False, None, em),
    "affinity+crf": (True, None, cut_by_crf),
    "affinity+pamr": (True, with_pamr, cut),
    "ours": (True, refine.self_guided, cut),
}


# ---- the same procedure for all methods ----------------------------------------------------------


def prepare(method, net, image, tags, cfg, r):
    """Return the input of the method's stage 4, and the tagged classes (P,).

    The input is maps (1,P,H,W), or scores (1,P+1,H,W) for EM.
    """
    guide, transfer, label_of = METHODS[method]
    tagged = tags.nonzero()[:, 0].tolist()
    I = data.to_tensor(image)[None].to(net.mean.device)  # (1,3,H,W)
    if label_of is em:
        S, _, Z, _ = net.outputs(image)
        scores = Z if r > 1 else torch.cat([torch.zeros_like(S[:, :1]), S], 1)
        scores = scores[:, [0, *(k + 1 for k in tagged)]]
        return refine.upsample(scores, I.shape[-2:]).cpu(), tagged
    stages = {"affinity": guide, "self_guided": transfer is refine.self_guided}
    _, guided, maps, _ = train.label_image(net, image, tags, replace(cfg, **stages), r)
    return (with_pamr(guided, I) if transfer is with_pamr else maps).cpu(), tagged


def choose_threshold(method, run, r):
    """Return the t of GRID at which the labels without undecided pixels have the highest mIoU."""
    photos = run.train_set
    picked = np.random.default_rng(7).permutation(len(photos.ids))[:TUNING]
    label_of = METHODS[method][2]
    C = dict.fromkeys(GRID, 0)
    for i in data.progress(f"{method}: threshold", picked):
        image = data.read_image(photos.image_paths[i])
        maps, tagged = prepare(method, run.net, image, photos.tags[i], run.cfg, r)
        truth = photos.mask(i, image.size)
        for t in GRID:
            label = label_of(maps, tagged, image, t, t)
            C[t] += data.confusion(truth, label, len(photos.class_names))
    miou = {t: data.summary(matrix, photos.class_names)["miou"] for t, matrix in C.items()}
    texts = ", ".join(f"{t}: {100 * score:.1f}" for t, score in miou.items())
    print_line(f"{method}, refine {r}, mIoU by threshold: {texts}")
    return max(miou, key=miou.get)


def annotator(method, run):
    """Return the method as a function with the arguments of `train.label_image`."""
    chosen = {}  # refine -> threshold

    def annotate(net, image, tags, cfg, r):
        if r not in chosen:
            chosen[r] = choose_threshold(method, run, r)
        maps, tagged = prepare(method, net, image, tags, cfg, r)
        half = (cfg.hi - cfg.lo) / 2 if r <= cfg.rounds else 0
        lo = max(0.0, chosen[r] - half)
        label = METHODS[method][2](maps, tagged, image, lo, chosen[r] + half)
        return (torch.from_numpy(label)[None],)

    return annotate


def no_maps(net, image, tags, cfg, r):
    """Return no maps and no label: `train.evaluate` then scores the label files and val only."""
    return (None,)


# ---- the command line ----------------------------------------------------------------------------


def take_warmup(run, other):
    """Give a new run the network of another run after its warm-up (not the optimizer's momentum).

    Raises InputError if the runs differ in classes, backbone, --warmup or --weights.
    """
    other = Path(other)
    net = SGSeg.load(other / "warmup.pt", run.cfg.device)
    path = other / "config.json"
    text = data.read_text(path)
    with as_input_error(path, "is not of this version", "Give another run", "model"):
        config = json.loads(text)["config"]
        theirs = [config[name] for name in ("backbone", "warmup", "weights")]
    ours = [run.cfg.backbone, run.cfg.warmup, run.cfg.weights]
    if net.label_names != run.net.label_names or theirs != ours:
        problem = "differs from this run in its classes, backbone, --warmup or --weights"
        raise InputError(other, problem, "Leave --from out", "option")
    run.net.load_state_dict(net.state_dict())
    run.epoch = run.cfg.warmup
    run.log("from", run=str(other))
    run.save()


def start(given):
    """Return the new or resumed run of the command line. Raises InputError."""
    options = {"voc": os.path.abspath(given.voc), "seed": given.seed}
    if given.resume:
        run = train.load_run(given.out, options)
        if run.about.get("method") != given.method:
            problem = f"was started with METHOD {run.about.get('method')}"
            raise InputError(given.out, problem, "Give that METHOD, or start a new run", "option")
        return run
    run = train.new_run(train.check(train.Config(**options, out=given.out)), sys.argv[1:])
    run.about["method"] = given.method
    run.save()
    if given.other:
        take_warmup(run, given.other)
    return run


def run_job(argv):
    """Train and score one method. Raises InputError."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("comparison.py", None, __doc__, formatter_class=layout)
    parser.add_argument("method", metavar="METHOD", choices=METHODS, help=", ".join(METHODS))
    parser.add_argument("voc", metavar="VOC", help="a devkit with masks of its training photos")
    parser.add_argument("out", metavar="OUT", help="a new folder for the run")
    parser.add_argument("--from", metavar="RUN", dest="other", help="the run whose warm-up to take")
    parser.add_argument("--resume", action="store_true", help="continue the run in OUT")
    parser.add_argument("--seed", type=int, default=0, help="random seed [0]")
    given = parser.parse_args(argv)
    if given.resume and given.other:
        parser.error("--from belongs to a new run: leave it out with --resume")
    if METHODS[given.method][2] is cut_by_crf and refinement.dcrf is None:
        remedy = "Run pip install pydensecrf2"
        raise InputError("pydensecrf2", "is not installed", remedy, "missing")
    photos = data.VOC(given.voc, "train")
    if not all(photos.mask_paths):
        problem = "lacks masks of training photos, on which the thresholds are chosen"
        raise InputError(photos.root, problem, "Add them", "masks")
    if torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as in train.main
    run = start(given)
    run.annotate = annotator(given.method, run)
    train.train(run)
    run.annotate = no_maps
    train.evaluate(run)


def main(argv=None):
    """Run the command line; return the exit status."""
    return data.run_command("comparison.py", run_job, argv)


if __name__ == "__main__":
    sys.exit(main())
