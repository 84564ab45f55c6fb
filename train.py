"""Alternating trainer: image tags in, dense pseudo labels and a segmenter out.

    python train.py                                     the built-in toy set, about a minute
    python train.py --voc PATH                          a VOC devkit
    python train.py --photos DIR                        photos in a folder for each class, DIR/cat
    python train.py --out RUN --resume                  go on where a run stopped
    python train.py --eval RUN                          score a run again
    python train.py --out RUN --segment PHOTO.jpg ...   masks for your own photos
    python data.py PATH                                 what the loader sees in your data
    torchrun --nproc_per_node=2 train.py --voc PATH     the work dealt out to several processes

Warm-up on tags; then every round refines the pseudo labels with the network fixed and updates the
network with the labels fixed; a last refine ends the run (Ke & Hsu 2018, abstract, sentence 9). The
schedule and every number are our choice; "tuned": on training masks of VOC subsets, then frozen
(for --rounds, --lo and --hi val was seen, too: docs/CHOICES.md).
"""

import argparse
import difflib
import fcntl
import inspect
import io
import json
import os
import re
import signal
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C before torch is there: no traceback
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # one line a fault, and that is ours
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # one order of adding on CUDA

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import data
import refine
from data import IGNORE, InputError, need, read_image, refusing, say, track, write
from sgseg import BACKBONES, SCALES, SGSeg, load_imagenet


@dataclass
class Config:
    """Every option of a run and of the command line; the comments are the texts of --help."""

    # data and weights
    voc: str = ""  # devkit folder; without it and --photos the built-in toy set
    photos: str = ""  # folder of tagged photos, DIR/CLASS/*.jpg, in place of a devkit
    out: str = ""  # run folder; without it runs/voc, runs/photos or runs/toy
    backbone: str = "lite0"  # lite0, vgg16 or tiny
    weights: str = "auto"  # ImageNet weights: auto (the backbone's own, if any), none, or a file
    # schedule
    warmup: int = 0  # epochs of L_cls alone before round 1; 0 only on ImageNet weights (tuned)
    rounds: int = 3  # rounds of refine + update between the warm-up and the last refine (tuned)
    epochs: int = 4  # epochs of each update (our choice)
    steps: int = 5  # an epoch has at least so many: small sets are passed over again (tuned)
    batch: int = 16  # images a step (our choice)
    lr: float = 0.003  # of SGD (tuned), heads x10 on ImageNet weights; falls as (1 - n/N)^0.9
    # pictures
    crop: int = 257  # side of a training crop, 16n+1 (our choice: what two cores bear)
    size: int = 500  # long side at refining and testing (VOC's own); training scales it
    scale: tuple = (0.5, 1.0)  # range of the random scale of --size in training (our choice)
    # method
    affinity: bool = True  # stage 2, affinity guidance
    self_guided: bool = True  # stage 3, for the maps and for the head's answer when segmenting
    strength: tuple = (100.0, 10.0)  # lambda of the affinity energy: round 1, later rounds (tuned)
    radius: int = refine.RADIUS  # window radius of the guided filter, stride-8 cells (tuned)
    eps: float = refine.EPS  # eps of the guided filter (tuned)
    lo: float = refine.LO  # background where every map stays below it (tuned)
    hi: float = refine.HI  # a class where its map gets this far (tuned); last refine: the middle
    favour: float = 0.75  # objects' head start in logits when segmenting (tuned)
    supervised: bool = False  # train on the true masks: the upper bound, for measuring only
    # machine
    seed: int = 0  # of weights, order and augmentation
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    workers: int = -1  # loader processes; -1: none on a CPU, up to 4 with CUDA; changes no result


# What the toy set wants otherwise (our choice: solved in a minute on two cores)
TOY = {"backbone": "tiny", "warmup": 15, "rounds": 2, "lr": 0.1, "crop": 97, "size": 97}
TOY |= {"scale": (0.75, 1.25), "strength": (5.0, 5.0), "radius": 2, "eps": 1e-3}
TOY |= {"lo": 0.45, "hi": 0.6, "favour": 0.0}
MOMENTUM = 0.9  # of SGD (DeepLab)
WEIGHT_DECAY = 1e-4  # of SGD (our choice)
STOPPED = "sgseg: stopped; training goes on with --resume, repeating at most one epoch"


# ---- the whole method ----------------------------------------------------------------------------


def train(run, annotate=None):
    """Alternate: refine the labels with the network fixed, update it with the labels fixed.

    A run that was stopped goes through the same lines and passes over what it has behind it.
    annotate: a way of your own from the network to the labels, instead of `label_image`: of the
    same arguments, returning a tuple that ends with the label, (1,H,W) uint8, which nothing checks
    against the tags.
    """
    rounds = run.cfg.rounds
    fit_cam(run)  # warm-up: image tags alone, on ImageNet's features in closed form,
    update(run, 0)  # on others, or with --warmup N, by descent
    look(run, 0)
    for r in range(1, rounds + 1):
        refine_labels(run, r, annotate or label_image)  # network fixed, labels change
        update(run, r)  # labels fixed, network changes
        look(run, r)  # a picture and a score; changes nothing
    refine_labels(run, rounds + 1, annotate or label_image)  # the dense annotations


def epochs_before(cfg, r):
    """Epochs that lie before the update of round r, the warm-up being round 0."""
    return cfg.warmup + (r - 1) * cfg.epochs if r else 0


# ---- warm-up: the CAM head from tags -------------------------------------------------------------


@torch.no_grad()
def fit_cam(run):
    """The CAM head on ImageNet's features, in closed form: ridge regression of targets t on
    features x. First x = mean_ij F_high and t = y, for every photo; then once more on what its own
    maps M, each divided by its maximum, see,

        x_k = sum_ij M_k F_high / sum_ij M_k, t = one-hot k     for every tag k of a photo, and
        x_0 = the same with M_0 = 1 - min(1, sum_k M_k), t = 0  for its background

    so that sky, which also lies behind birds, is pulled to 0 instead of to aeroplane. No layer is
    trained, which would unlearn what ImageNet knows of 1000 classes. The constant, mean t - <w,
    mean x>, is dropped, as the head has no bias: s ranks photos, and L_cls makes it a logit during
    the rounds. Ridge also shrinks w, the more the fewer photos: one factor for all classes makes
    <w_k, x_k> 1/2 on the mean where t is 1 (if it is over 1e-4 there). Our choice, measured in
    docs/CHOICES.md. Left out without ImageNet weights, and where a resumed run has it behind it.
    """
    behind = any(m["what"] in ("fit", "from") for m in run.metrics)
    if run.cfg.weights == "none" or behind:
        return
    net = run.net.eval()
    for sees, penalty in ((whole_photo, 1.0), (under_maps, 10.0)):
        seen = {}
        for i in track(f"fit {sees.__name__}", mine(len(run.voc.ids))):
            high = net.features(read_image(run.voc.image_paths[i]))[2]  # (1,C,h,w)
            seen[i] = [a.cpu() for a in sees(net, high, run.voc.tags[i].to(high))]
        seen = {i: pair for part in everyone(seen) for i, pair in part.items()}
        x, t = map(torch.cat, zip(*(seen[i] for i in sorted(seen))))
        w = ridge(x, t, penalty)
        said = (t * (x @ w.T)).sum() / t.sum().clamp_min(1)  # where t is 1, on the mean
        w = w / (2 * said if said > 1e-4 else 1)
        net.cam.weight[:, :, 0, 0] = w.to(net.cam.weight)
    run.log("fit", round=0)
    run.save()


def whole_photo(net, high, tags):
    """x (1,C) and t (1,K) of the first regression: the mean feature of a photo and its tags."""
    return high.mean((2, 3)), tags[None]


def under_maps(net, high, tags):
    """x (P+1,C), t (P+1,K) of the second: features under the maps of the P tags, background."""
    classes = tags.nonzero()[:, 0]
    M = refine.localization_maps(net.cam(high), classes)  # (1,P,h,w)
    M = torch.cat([M, 1 - M.sum(1, keepdim=True).clamp_max(1)], 1)[0]  # (P+1,h,w)
    x = torch.einsum("phw,chw->pc", M, high[0]) / M.sum((1, 2))[:, None].clamp_min(1e-5)
    return x, torch.cat([torch.eye(len(tags)).to(high)[classes], torch.zeros_like(tags)[None]])


def ridge(x, t, penalty):
    """w (K,C) = argmin sum_n |t_n - mean t - w z_n|^2 + penalty mean_n |z_n|^2 |w|^2, z = x
    less its mean, each channel in units of its deviation; w comes back in units of x. The factor of
    |w|^2 is at least 1e-9. x (n,C), t (n,K) float32. Source: ridge regression, Hoerl & Kennard
    1970; that we use it is our choice."""
    deviation = x.std(0, correction=0) + 1e-6
    z = ((x - x.mean(0)) / deviation).double()  # (n,C)
    G = z.T @ z  # (C,C)
    G.diagonal().add_((penalty * G.trace() / len(x)).clamp_min(1e-9))  # not 0: all x may be alike
    w = torch.linalg.solve(G, z.T @ (t - t.mean(0)).double()).T  # (K,C)
    return w.to(x.dtype) / deviation


# ---- refine: network fixed, labels change --------------------------------------------------------


def label_image(net, image, tags, cfg, r):
    """refine.four_stages of one PIL image with tags (K,) in refine r: three maps, a label, B = 1.

    Round 1 locates the classes by the CAM head's scores, later rounds by what the segmentation head
    has learnt. What the network is to learn may be undecided between lo and hi; the last refine
    decides every pixel, in the middle (our choice).
    """
    S, _, Z, mid = net.outputs(image)
    I = data.to_tensor(image)[None].to(mid.device)  # (1,3,H,W)
    classes = tags.nonzero()[:, 0].tolist()  # the P tagged ones
    later = int(r > 1)
    unit = 1.0 if cfg.weights != "none" and not cfg.warmup else None  # the scale of `fit_cam`
    locate = refine.head_maps if later else partial(refine.localization_maps, unit=unit)
    guide = partial(refine.affinity_guided, strength=cfg.strength[later])
    transfer = partial(refine.self_guided, radius=cfg.radius, eps=cfg.eps)
    three = (locate, guide if cfg.affinity else None, transfer if cfg.self_guided else None)
    middle = (cfg.lo + cfg.hi) / 2
    lo, hi = (middle, middle) if r > cfg.rounds else (cfg.lo, cfg.hi)
    scores = Z if later else S
    return refine.four_stages(scores, mid, I, classes, three, lo, hi)


@torch.no_grad()
def refine_labels(run, r, annotate):
    """The labels of refine r, a palette PNG each; those that a stopped run has made are kept."""
    cfg = run.cfg
    if cfg.supervised or run.epoch > epochs_before(cfg, r):
        return
    run.net.eval()
    counts = 0
    for i in track(f"round {r} refine", mine(len(run.voc.ids))):
        path = run.label_path(i, r)
        if not path.exists():
            image = read_image(run.voc.image_paths[i])
            label = annotate(run.net, image, run.voc.tags[i], cfg, r)[-1][0].cpu().numpy()
            write(path, data.palette_image(label))
        counts += np.bincount(run.label(i, r).ravel(), minlength=256)
    counts = total(counts)
    share = (counts / counts.sum()).tolist()
    tagged = [1, *run.voc.tags.sum(0).tolist()]
    run.log("labels", round=r, undecided=share[IGNORE], shares=dict(zip(run.net.classes, share)))
    lost = [name for name, x, n in zip(run.net.classes, share, tagged) if n and x < 1e-4]
    lost += ["all but background"] if share[0] > 0.99 else []
    if lost and not processes()[0]:
        fault = f"warning: round {r} labels almost nothing as {' '.join(lost)}"
        say(f"{fault}: look at panels/; other --lo, --hi, or more photos", stream=sys.stderr)
    run.save()


# ---- update: labels fixed, network changes -------------------------------------------------------


def losses(net, x, y, labels):
    """L_cls = -mean_bk [y log sigmoid(s) + (1 - y) log sigmoid(-s)], multi-label soft margin, and
    L_seg = mean over the pixels whose label is not 255 of -log softmax(up(Z))_label.

    x (B,3,H,W) in [0,1]; y (B,K) in {0,1}; labels (B,H,W) int64, 0..K or 255. Returns two float32
    scalars; L_seg is a constant 0 where nothing is labelled. Source: abstract, sentence 8; the
    losses, their plain sum, and that L_seg looks at every fourth pixel (the stride-4 grid, whose
    corners are the image's at sides 16n+1) are our choice. Where gradients flow (to what each loss
    reads; F_high itself is computed from the layers below it):

                        CAM head w   seg head   F_mid   F_high   frozen layers   labels, maps
        L_cls           yes          no         no      yes      no              no
        L_seg           no           yes        yes*    yes      no              no
        refine_labels   no           no         no      no       no              no

    * with lite0's ImageNet weights F_mid comes out of frozen layers: it and the affinity's graph
    never change.
    """
    with torch.autocast("cuda", torch.bfloat16, enabled=x.is_cuda):  # float32 on a CPU
        _, s, Z, _ = net(x)
    L_cls = F.multilabel_soft_margin_loss(s.float(), y)
    target = labels[:, ::4, ::4]  # (B,(H+3)/4,(W+3)/4)
    if not (target != IGNORE).any():
        return L_cls, torch.zeros((), device=x.device)  # warm-up, or nothing labelled in any crop
    Z = refine.up(Z.float(), target.shape[-2:])
    return L_cls, F.cross_entropy(Z, target, ignore_index=IGNORE)


def batches(run, r, epoch):
    """This process's part of an epoch's batches; order and crops depend on seed and epoch only.
    Raises InputError where the parts are not equal."""
    cfg = run.cfg
    ids = range(len(run.voc.ids))
    batch = min(cfg.batch, len(ids))
    rank, number = processes()
    fault = f"a batch of {batch} photos in {number} processes; expected equal parts"
    need(batch % number == 0, f"{fault}; another --batch, or number of processes")
    rng = np.random.default_rng([cfg.seed, epoch])
    passes = -(-cfg.steps * batch // len(ids))  # over a small set; rounded up
    order = [n * len(ids) + rng.permutation(len(ids)) for n in range(passes)]
    order = np.concatenate(order)
    order = order[: len(order) // batch * batch][rank::number].tolist()
    paths = run.voc.mask_paths if cfg.supervised else [run.label_path(i, r) for i in ids]
    crops = (cfg.crop, cfg.size, cfg.scale, cfg.seed, epoch, paths if r else None)
    cuda = cfg.device.startswith("cuda")
    workers = min(4, os.cpu_count()) * cuda if cfg.workers < 0 else cfg.workers
    how = {"sampler": order, "pin_memory": cuda, "num_workers": workers, "worker_init_fn": hush}
    return torch.utils.data.DataLoader(data.Crops(run.voc, *crops), batch // number, **how)


def hush(worker):
    """A loader process leaves Ctrl-C and what is said of errors to the main one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def update(run, r):
    """One phase of minimising L_cls + L_seg: the warm-up for r = 0 (no labels yet), else `epochs`
    epochs on the labels of round r. SGD, step n of the phase's N at (1 - n/N)^0.9 of its rate."""
    cfg = run.cfg
    first = epochs_before(cfg, r)
    end = epochs_before(cfg, r + 1)
    net = run.net
    in_one_order(cfg.device != "cpu")
    if dist.is_initialized() and run.epoch < end:
        net = DistributedDataParallel(net, find_unused_parameters=True)  # averages gradients
    for epoch in range(max(first, run.epoch), end):
        run.net.train()
        run.net.backbone.train(cfg.weights == "none")  # ImageNet's BatchNorm stays
        loader = batches(run, r, epoch)
        start = time.time()
        sums = torch.zeros(2)
        now = {}  # what the progress line shows
        for step, batch in enumerate(track(f"round {r} epoch {epoch}", loader, note=now)):
            n = (epoch - first) * len(loader) + step
            decay = (1 - n / ((end - first) * len(loader))) ** 0.9
            L = update_step(run, net, batch, decay, f"epoch {epoch} step {step}")
            sums += L
            now |= {"L_cls": float(L[0]), "L_seg": float(L[1])}
        for buffer in run.net.buffers() if dist.is_initialized() else ():
            dist.broadcast(buffer, 0)  # BatchNorm's means: those of the first process count
        run.epoch = epoch + 1
        mean = (total(sums) / len(loader) / processes()[1]).tolist()
        rate = len(loader) * loader.batch_size * processes()[1] / (time.time() - start)
        row = {"L_cls": mean[0], "L_seg": mean[1], "lr": cfg.lr * decay, "images_per_s": rate}
        run.log("update", round=r, **row)
        run.save()
    in_one_order(False)


def in_one_order(wanted):
    """CUDA sums the gradient of bilinear interpolation in any order, unless told not to: then a
    run can be repeated. L_seg itself, of which torch would warn, is only printed."""
    if torch.cuda.is_available():
        torch.use_deterministic_algorithms(wanted, warn_only=True)
        warnings.filterwarnings("ignore", "nll_loss2d_forward")


def update_step(run, net, batch, decay, where):
    """One SGD step on a batch, net being run.net, or that averaging its gradients over the
    processes; returns (L_cls, L_seg), a CPU tensor. Raises InputError: not finite."""
    x, y, labels, index = batch
    for group in run.opt.param_groups:
        group["lr"] = run.cfg.lr * group["scale"] * decay
    x = x.to(run.cfg.device, memory_format=torch.channels_last, non_blocking=True)
    L_cls, L_seg = losses(net, x, y.to(x.device), labels.to(x.device))
    L = torch.stack([L_cls, L_seg]).detach().cpu()
    images = " ".join(run.voc.ids[i] for i in index)
    fault = f"{run.folder}: L_cls, L_seg {L.tolist()} at {where}, images {images}"
    fix = "expected finite numbers; start a new --out with a lower --lr"
    need(L.isfinite().all(), f"{fault}; {fix}; the last good state is {run.folder}/checkpoint.pt")
    run.opt.zero_grad()
    (L_cls + L_seg).backward()
    run.opt.step()
    return L


# ---- several processes: torchrun -----------------------------------------------------------------


def meet():
    """One of torchrun's processes meets the others; the first alone prints what goes well."""
    if "TORCHELASTIC_RUN_ID" in os.environ and not dist.is_initialized():
        both = "cpu:gloo,cuda:nccl"  # with a GPU torch would start nccl alone, which has no CPU
        dist.init_process_group(both if torch.cuda.is_available() else "gloo")
        rank = int(os.environ["LOCAL_RANK"])
        if rank < torch.cuda.device_count():
            torch.cuda.set_device(rank)  # what "cuda" means from here on
        if dist.get_rank():
            sys.stdout = open(os.devnull, "w")


def processes():
    """This process's rank, and how many there are: (0, 1) alone."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def mine(n):
    """Which of n photos are this process's."""
    rank, number = processes()
    return range(rank, n, number)


def everyone(x):
    """[x of the first process, x of the second, ...]; each has waited for all others then."""
    parts = [x] * processes()[1]
    if dist.is_initialized():
        dist.all_gather_object(parts, x)
    return parts


def total(x):
    """The sum of x, a number or an array, over the processes; a process without photos has 0."""
    return sum(everyone(x))


# ---- looking and scoring -------------------------------------------------------------------------


def deliver(run):
    """The labels of the last refine where one looks for them: RUN/masks/ID.png,
    RUN/overlays/ID.png, RUN/areas.csv (photo, class, share of its pixels) and RUN/classes.txt
    (index, name, colour)."""
    names = run.net.classes
    colours = np.reshape(data.palette_image(np.zeros((1, 1))).getpalette(), (256, 3)).tolist()
    lines = [f"{k} {name} #{bytes(colours[k]).hex()}" for k, name in enumerate(names)]
    write(run.folder / "classes.txt", "\n".join(lines) + "\n")
    rows = [("photo", "class", "share")]
    for i in track("masks", range(0 if run.cfg.supervised else len(run.voc.ids))):
        name = run.voc.ids[i]
        label = run.label(i, run.cfg.rounds + 1)
        image = read_image(run.voc.image_paths[i])
        write(run.folder / "masks" / f"{name}.png", data.palette_image(label))
        write(run.folder / "overlays" / f"{name}.png", data.overlay(image, label, names))
        rows += [(name, *area) for area in data.areas(label, names).items()]
    write(run.folder / "areas.csv", data.csv_bytes(rows))


def look(run, r):
    """After the update of round r: the network in model.pt (warmup.pt), panels/roundR.png, the
    same few images as the next refine would label them, and from round 1 on the score on val."""
    if run.epoch != epochs_before(run.cfg, r + 1):
        return
    run.net.eval()
    if processes()[0] == 0:
        write(run.folder / ("model.pt" if r else "warmup.pt"), run.net.portable())
        voc = run.val or run.voc
        picked = np.linspace(0, len(voc.ids) - 1, min(4, len(voc.ids))).astype(int)
        rows = sum((panel(run, voc, i, r) for i in picked), [])
        write(run.folder / "panels" / f"round{r}.png", data.sheet(rows))
    if r and (score := validate(run)):
        run.log("val", round=r, val_miou=score["miou"], val_core=score["core"])
    run.save()


def panel(run, voc, i, r):
    """Rows {caption: picture}, one a tagged class: photo | localization map | + affinity | +
    self-guided | pseudo label | prediction | truth; what there is of it."""
    image = read_image(voc.image_paths[i])
    names = ["background", *voc.classes]
    classes = voc.tags[i].nonzero()[:, 0].tolist()
    *maps, label = label_image(run.net, image, voc.tags[i], run.cfg, r + 1)
    labels = {"pseudo label": label[0].cpu().numpy()}
    if r:
        labels["prediction"] = run.net.segment(image)
    if voc is run.val and voc.mask_paths[i]:
        labels["ground truth"] = voc.mask(i, image.size)
    rows = [{names[k + 1]: image} for k in classes] or [{"no tag": image}]
    for caption, M in zip(("localization map", "+ affinity", "+ self-guided"), maps):
        M = refine.up(M, image.size[::-1])[0].cpu()  # (P,H,W)
        for row, M_p in zip(rows, M):
            row[caption] = data.heat(image, M_p)
    for caption, label in labels.items():
        said = " ".join(names[k] for k in np.unique(label) if 0 < k < IGNORE)
        for row in rows:
            row[f"{caption}: {said}"] = data.overlay(image, label)
    return rows


def validate(run):
    """Summary of the segmentation head on val; without masks None, and a line that says so."""
    if not run.val or not all(run.val.mask_paths):
        say(f"no validation score: {run.voc.root} has no val.txt or no SegmentationClass for it")
        return None
    C = 0
    for i in track("validate", mine(len(run.val.ids))):
        image = read_image(run.val.image_paths[i])
        truth = run.val.mask(i, image.size)
        C += data.confusion(truth, run.net.segment(image), len(run.val.classes))
    return data.summary(total(C), run.val.classes)


def score_stages(run):
    """Summaries over the training images that have masks: {"train cam", ...} of the maps that
    round 1 refines (the warm-up network's), cut in the middle of its band; {"labels round1", ...}
    of every round's labels, with the share of pixels that they label."""
    have = [i for i, path in enumerate(run.voc.mask_paths) if path]
    cfg = run.cfg
    names = run.voc.classes
    t = (cfg.lo + cfg.hi) / 2
    net = SGSeg.load(run.folder / "warmup.pt", cfg.device)
    rounds = [r for r in range(1, cfg.rounds + 2) if run.label_path(have[-1], r).exists()]
    stages = ("train cam", "train affinity", "train self_guided")
    C = {name: 0 for name in (*stages, *(f"labels round{r}" for r in rounds))}
    for i in track("score stages", [have[n] for n in mine(len(have))]):
        image = read_image(run.voc.image_paths[i])
        truth = run.voc.mask(i, image.size)
        classes = run.voc.tags[i].nonzero()[:, 0].tolist()
        labels = {f"labels round{r}": run.label(i, r) for r in rounds}
        maps = label_image(net, image, run.voc.tags[i], cfg, 1)[:3]
        for name, M in zip(stages, maps):
            M = refine.up(M, truth.shape)
            labels[name] = refine.pseudo_labels(M, classes, t, t)[0].cpu().numpy()
        for name, label in labels.items():
            decided = np.where(label == IGNORE, IGNORE, truth)
            C[name] += data.confusion(decided, label, len(names))
    C = {name: total(matrix) for name, matrix in C.items()}
    pixels = max(1, C["train cam"].sum())  # maps cut at one t leave no pixel undecided
    share = {name: float(matrix.sum() / pixels) for name, matrix in C.items()}
    return {name: data.summary(C[name], names) | {"decided": share[name]} for name in C}


def evaluate(run):
    """Score every stage on train and the head on val: a table, and results.json."""
    done = run.epoch >= epochs_before(run.cfg, min(2, run.cfg.rounds + 1))
    need(done, f"{run.folder}: has no round behind it; expected one to score; --resume it first")
    run.net.eval()
    rows = score_stages(run) if any(run.voc.mask_paths) else {}
    if run.cfg.rounds and (score := validate(run)):  # without a round the head is untrained
        how = {"favour": run.net.favour, "scales": run.net.scales, "size": run.net.size}
        rows["val seg"] = score | how | {"decided": 1.0}
    if processes()[0]:
        return
    write(run.folder / "results.json", json.dumps(rows, indent=1))
    if rows:
        say("\nIoU in %; maps cut in the middle of the band; labels only where decided (share)")
        names = ["background", *run.voc.classes]
        say(f"{'':18}  mIoU  core  decided " + " ".join(f"{name[:5]:>5}" for name in names))
    for name, s in rows.items():
        values = [s["miou"], s["core"], s["decided"], *(s["iou"].get(k) for k in names)]
        texts = ["    -" if x is None else f"{100 * x:5.1f}" for x in values]
        say(f"{name:18} {' '.join(texts[:2])}    {' '.join(texts[2:])}")


# ---- a run: network, optimizer and position, saved and restored together -------------------------


@dataclass
class Run:
    """What changes while training, and where it is kept; epoch: how many are done, all told."""

    cfg: Config
    voc: data.VOC
    val: data.VOC | None
    net: SGSeg
    opt: torch.optim.Optimizer
    about: dict  # config, command line, versions: config.json
    epoch: int = 0
    metrics: list = field(default_factory=list)
    lock: object = None  # held as long as the run lives

    @property
    def folder(self):
        """RUN."""
        return Path(self.cfg.out)

    def save(self):
        """Checkpoint, metrics, config, by the first process. InputError: the old ones then stay."""
        if processes()[0]:
            return
        model = data.finite(self.net.state_dict(), f"{self.folder}: the network")
        state = {"config": asdict(self.cfg), "model": model, "optimizer": self.opt.state_dict()}
        state |= {"epoch": self.epoch, "metrics": self.metrics, "about": self.about}
        write(self.folder / "checkpoint.pt", state | self.voc.identity())
        write(self.folder / "config.json", json.dumps(self.about, indent=1))
        write(self.folder / "metrics.jsonl", "".join(json.dumps(m) + "\n" for m in self.metrics))

    def log(self, what, **values):
        """Print a row of numbers; keep it for metrics.jsonl, in place of an earlier of its kind."""
        row = {"what": what, "epoch": self.epoch, **values}
        kept = [m for m in self.metrics if (m["what"], m["epoch"]) != (what, self.epoch)]
        self.metrics = [*kept, row]
        say("  ".join(f"{k} {plain(v)}" for k, v in row.items()))

    def label_path(self, i, r):
        """Where the pseudo label of training image i in round r is kept."""
        return self.folder / "pseudo" / f"round{r}" / f"{self.voc.ids[i]}.png"

    def label(self, i, r):
        """(H,W) uint8 pseudo label of training image i in round r. Raises InputError."""
        return data.read_mask(self.label_path(i, r), len(self.voc.classes), self.voc.sizes[i])


def plain(value):
    """A logged value for people: four digits, shares in %."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {share:.1%}" for name, share in value.items() if share)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def assemble(cfg, argv=(), fresh=True):
    """A run with nothing behind it: data, read once from end to end, the seeded network on its
    ImageNet weights (if fresh: otherwise a checkpoint follows), SGD. Raises InputError."""
    toy = Path(cfg.out) / "toy"
    need(not (cfg.voc and cfg.photos), "--voc, --photos: contradict; expected one; leave one out")
    if not cfg.voc and not cfg.photos and not (toy / "classes.txt").exists():
        data.make_toy(toy)
    voc = data.Photos(cfg.photos) if cfg.photos else data.VOC(cfg.voc or toy, "train")
    torch.manual_seed(cfg.seed)
    if cfg.device.startswith("cuda:"):
        torch.cuda.set_device(cfg.device)  # the loaders' memory, too, is this GPU's
    numbers = (cfg.size, cfg.favour, cfg.radius, cfg.eps, cfg.self_guided)
    net = SGSeg(voc.classes, cfg.backbone, *numbers)
    pretrained = cfg.weights != "none"
    if pretrained and fresh:
        load_imagenet(net.backbone, cfg.weights)
    for module in net.backbone.frozen if pretrained else ():
        module.requires_grad_(False)
    net = net.to(cfg.device, memory_format=torch.channels_last)
    groups = [{"params": [p for p in net.backbone.parameters() if p.requires_grad], "scale": 1}]
    heads = [*net.cam.parameters(), *net.seg.parameters()]
    groups.append({"params": heads, "scale": 10 if pretrained else 1})
    opt = torch.optim.SGD(groups, cfg.lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    voc.scan(masks=cfg.supervised)
    fault = f"{voc.root}: masks are missing; --supervised wants one for every photo; add them"
    need(not cfg.supervised or all(voc.mask_paths), fault)
    val = data.VOC(cfg.voc or toy, "val") if voc.has("val") else None
    if val:
        val.scan(masks=True)
    about = {"config": asdict(cfg), "command": list(argv), "threads": torch.get_num_threads()}
    about |= {"python": sys.version, "torch": str(torch.__version__), "numpy": np.__version__}
    return Run(cfg, voc, val, net, opt, about)


def begin(cfg, argv, other=None):
    """A new run in its folder, which must hold nothing else; after the warm-up of another run,
    if one is given, whose weights it takes (not the momentum). Raises InputError."""
    inside = {path.name for path in Path(cfg.out).glob("*")} - {"toy", "lock", "checkpoint.pt.tmp"}
    need(not inside, f"{cfg.out}: is not empty; expected a new folder; --resume, or another --out")
    run = assemble(cfg, argv, fresh=not other)
    if other:
        net = SGSeg.load(Path(other) / "warmup.pt", cfg.device)
        same = (net.classes, type(net.backbone)) == (run.net.classes, type(run.net.backbone))
        need(same, f"{other}: has other classes or backbone; expected this run's; leave --from out")
        wrong = (f"{other}/config.json: not a run's", "expected its options; give another run")
        with refusing(*wrong):
            its = json.loads(data.read_text(Path(other) / "config.json"))["config"]
            same = (its["warmup"], its["weights"]) == (cfg.warmup, cfg.weights)
        need(same, f"{other}: has another warm-up; expected its --warmup and --weights; give them")
        run.net.load_state_dict(net.state_dict())
        run.epoch = cfg.warmup
        run.log("from", run=str(other))
    announce(run)
    run.save()
    return run


def announce(run):
    """Say what a new run has before it, and how long that takes, if all goes as the first does."""
    cfg = run.cfg
    n = len(run.voc.ids)
    loader = batches(run, 0, 0)
    steps = (epochs_before(cfg, cfg.rounds + 1) - run.epoch) * len(loader)
    y = run.voc.tags[: loader.batch_size].to(cfg.device)
    x = torch.zeros(len(y), 3, cfg.crop, cfg.crop, device=cfg.device)
    run.net.eval()
    for _ in range(2):  # the first time is slower
        start = time.time()
        L = sum(losses(run.net, x, y, x[:, 0].long()))
        L.backward()
        run.opt.zero_grad()
        L.item()  # waits for CUDA
        middle = time.time()
        image = read_image(run.voc.image_paths[0])
        label_image(run.net, image, run.voc.tags[0], cfg, 1)[-1].cpu()
        end = time.time()
    labels = (cfg.rounds + 4) * len(mine(n))  # fit, refines, masks/ and scores
    minutes = (steps * (middle - start) + labels * (end - middle)) / 60
    what = f"{n} photos, {run.voc.tags.shape[1]} classes, rounds: {cfg.rounds}, steps: {steps}"
    say(f"{what}; about {minutes:.0f} minutes, given {cfg.device}")


def reopen(folder, given, free):
    """The run in a folder as it was last saved. Options given must be the run's own, but for
    those named in free; so must the data. Raises InputError."""
    path = Path(folder) / "checkpoint.pt"
    state = data.load(path)
    wrong = (f"{path}: not a checkpoint of this version", "expected one; start a new --out")
    with refusing(*wrong):
        own = {f.name: state["config"][f.name] for f in fields(Config)}
        before = {what: state[what] for what in ("classes", "ids", "tags")}
        fixed = {k: v for k, v in given.items() if k not in free}
        asked = {"device": "cpu" if own["device"] == "cpu" else "auto"}  # to the bit: the same kind
        cfg = check(Config(**own | asked | given | {"out": str(folder)}))
        differ = [f"--{k} {own[k]}, not {v}" for k, v in fixed.items() if own[k] != getattr(cfg, k)]
        need(not differ, f"{folder}: has {', '.join(differ)}; leave them out, or start a new --out")
    run = assemble(cfg, fresh=False)
    for what, value in run.voc.identity().items():
        fault = f"{run.voc.root}: other {what} than when {folder} began; restore them"
        need(value == before[what], f"{fault}, or start a new --out")
    with refusing(*wrong):
        run.net.load_state_dict(data.finite(state["model"], path))
        run.opt.load_state_dict(state["optimizer"])
        run.epoch = int(state["epoch"])
        run.metrics = [dict(m) for m in state["metrics"]]
        run.about = dict(state["about"])
    return run


def lock(folder):
    """Hold RUN/lock until the process ends: two runs in one folder would mix. Raises InputError."""
    with refusing(f"{folder}: in use, or cannot be locked", "expected a folder of its own"):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "lock", "w")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file


# ---- the command line ----------------------------------------------------------------------------


def check(cfg):
    """cfg with weights and device resolved. Raises InputError where a value cannot work."""
    imagenet = BACKBONES[cfg.backbone].imagenet if cfg.backbone in BACKBONES else None
    cfg.weights = "none" if cfg.weights == "auto" and imagenet is None else cfg.weights
    cuda = [f"cuda:{n}" for n in range(torch.cuda.device_count())]
    devices = ["cuda", *cuda, "cpu"] if cuda else ["cpu"]
    cfg.device = devices[0] if cfg.device == "auto" else cfg.device
    number = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if dist.is_initialized() else 1
    fine = number == 1 or cfg.device == "cpu" or cfg.device == "cuda" and number <= len(cuda)
    fault = f"{number} processes, {len(cuda)} GPUs: --device {cfg.device} cannot work"
    need(fine, f"{fault}; expected --device cuda, a GPU each, or --device cpu; change it")
    least = {"epochs": 1, "steps": 1, "batch": 1, "rounds": 0, "radius": 0, "seed": 0}
    least["workers"] = -1
    ok = {name: (n <= getattr(cfg, name) < 2**31, f"{n} or more") for name, n in least.items()}
    fewest = 1 if cfg.weights == "none" else 0  # else nothing would teach the CAM head
    ok["warmup"] = (fewest <= cfg.warmup < 2**31, "0 or more, 1 or more without ImageNet weights")
    ok["backbone"] = (cfg.backbone in BACKBONES, " or ".join(BACKBONES))
    ok["device"] = (cfg.device in devices, " or ".join(devices))
    ok["crop"] = (cfg.crop % 16 == 1 and 17 <= cfg.crop <= 4097, "16n+1, from 17 to 4097")
    ok["size"] = (17 <= cfg.size <= 8192, "17 to 8192")
    ok["scale"] = (0.01 <= cfg.scale[0] <= cfg.scale[1] <= 100, "two ascending, 0.01 to 100")
    ok["lr"] = (0 < cfg.lr < 1e6, "a positive number")
    ok["strength"] = (all(0 <= x < 1e6 for x in cfg.strength), "two numbers, 0 or more")
    ok["eps"] = (1e-9 <= cfg.eps < 1e6, "1e-9 or more")
    ok["hi"] = (0 <= cfg.hi <= 1, "--lo to 1")
    ok["lo"] = (0 <= cfg.lo <= cfg.hi, "0 to --hi")
    ok["favour"] = (abs(cfg.favour) < 1e6, "a number")
    for name, (fine, expected) in ok.items():
        need(fine, f"--{name} {getattr(cfg, name)}: cannot work; expected {expected}; change it")
    return cfg


def parse(argv):
    """Command line -> every other job and its options, and the Config options given, no others."""
    layout = partial(argparse.RawDescriptionHelpFormatter, width=100, max_help_position=28)
    parser = argparse.ArgumentParser("train.py", None, __doc__, formatter_class=layout)

    def refuse(fault):
        wrong = re.search(r"arguments: (-\S+)", fault)
        options = parser._option_string_actions
        near = difflib.get_close_matches(wrong[1], options, 1) if wrong else []
        expected = near[0] if near else "the options of --help"
        raise InputError(f"command line: {fault}; expected {expected}; correct it")

    parser.error = refuse
    kinds = {f.name: f for f in fields(Config)}
    for line in inspect.getsource(Config).splitlines():
        if group := re.match("    # (.+)", line):
            options = parser.add_argument_group(group[1])
        elif option := re.match(r"    (\w+): .*?  # (.*)", line):
            name, text = option.groups()
            kind = kinds[name].type
            how = {"type": kind, "metavar": kind.__name__.upper()}
            if kind is bool:
                how = {"action": argparse.BooleanOptionalAction}
            if kind is tuple:
                how = {"type": float, "nargs": 2, "metavar": "FLOAT"}
            toy = f", toy {TOY[name]}" if name in TOY else ""
            help = f"{text} [{kinds[name].default}{toy}]".replace("%", "%%")
            flag = f"--{name.replace('_', '-')}"
            options.add_argument(flag, default=argparse.SUPPRESS, help=help, **how)
    options = parser.add_argument_group("other jobs than a new run")
    job = options.add_mutually_exclusive_group()
    job.add_argument("--resume", action="store_true", help="go on with the run in --out")
    job.add_argument("--from", metavar="RUN", help="new run; the warm-up is another run's")
    job.add_argument("--eval", metavar="RUN", help="score a run, write RUN/results.json")
    job.add_argument("--segment", metavar="PHOTO", nargs="+", help="masks, by the run in --out")
    options.add_argument("--soft", action="store_true", help="with --segment: probabilities, .npz")
    more = "with --segment, --eval: mean over scales 0.5 to 1.5"
    options.add_argument("--multi-scale", action="store_true", help=more)
    given = vars(parser.parse_args(argv))
    for name in {"scale", "strength"} & set(given):
        given[name] = tuple(given[name])
    need("" not in given.values(), "command line: an option is empty; expected a value; give one")
    return given


def segment_photos(folder, photos, given, soft, scales):
    """NAME.png (palette indices), NAME_overlay.png and, if soft, NAME.npz (float16
    probabilities and class names) in RUN/segmented for each photo, or photo of a folder, and
    areas.csv of this call; bad photos are passed over and named at the end. For a list of ids, as
    ImageSets/Segmentation/test.txt, ID.png alone goes where VOC's server wants it."""
    other = " ".join(f"--{name}" for name in set(given) - {"out", "device", "favour"})
    need(not other, f"{other}: of no effect with --segment; expected none; leave it out")
    need(processes()[1] == 1, "--segment: several processes; expected one; leave torchrun out")
    listed = photos[0].endswith(".txt") and not soft
    fine = listed == any(photo.endswith(".txt") for photo in photos)
    need(fine, "--segment: a list goes alone, without --soft; expected lists or photos; part them")
    net = SGSeg.load(folder, check(Config(**given)).device)
    net.favour = given.get("favour", net.favour)
    net.scales = scales
    photos = sum(map(data.photos_of, photos), [])
    out = Path(folder) / ("results/VOC2012/Segmentation/comp5_test_cls" if listed else "segmented")
    check_results(out, photos)
    faults = []
    rows = [("photo", "class", "share")]
    for photo in photos:
        try:
            image = read_image(photo)
        except InputError as fault:
            faults.append(str(fault))
            continue
        label = net.segment(image)
        path = out / f"{Path(photo).stem}.png"
        write(path, data.palette_image(label))
        if not listed:
            write(f"{path.with_suffix('')}_overlay.png", data.overlay(image, label, net.classes))
        if soft:
            file = io.BytesIO()
            p = net.probabilities(image).cpu().numpy().astype(np.float16)
            np.savez_compressed(file, probabilities=p, classes=net.classes)
            write(f"{path.with_suffix('')}.npz", file.getvalue())
        areas = data.areas(label, net.classes)
        rows += [(photo, *area) for area in areas.items()]
        texts = [f"{k} {share:.0%}" for k, share in areas.items() if k != "background"]
        say(f"{photo} -> {path}: {', '.join(texts) or 'background only'}")
    if not listed:
        write(out / "areas.csv", data.csv_bytes(rows))
    need(not faults, *faults)


def check_results(out, photos):
    """Raise InputError: no photo, two of one name, or photos that lie where results go."""
    need(photos, "--segment: no photo in the folder itself; expected some; name their folder")
    names = [Path(photo).stem for photo in photos]
    names += [f"{name}_overlay" for name in names]
    twice = " ".join(data.repeated(names)[:3])
    need(not twice, f"--segment: two photos of one name: {twice}; expected different; rename one")
    results = {(out / f"{name}.png").resolve() for name in names}
    taken = " ".join(str(photo) for photo in photos if Path(photo).resolve() in results)
    fault = f"--segment: {taken} would be overwritten; expected photos elsewhere; move it"
    need(not taken, fault)


def start_run(folder, jobs, given, defaults, argv):
    """A new run or one that goes on, in each process: the first begins or reads it, and writes
    it; the others read that. Raises InputError."""
    free = ("voc", "photos", "out", "device", "workers")
    rank, number = processes()
    if rank:
        everyone(None)
        run = reopen(folder, given, free)
    else:
        held = lock(folder)
        if jobs["resume"]:
            run = reopen(folder, given, free)
        else:
            cfg = check(Config(**defaults | given | {"out": str(folder)}))
            run = begin(cfg, argv, jobs["from"])
        run.lock = held
        everyone(None)
    return run


def command(argv):
    """Do what the command line asks: train, resume, score, or segment photos. Raises InputError."""
    start = time.time()
    meet()
    given = parse(argv)
    jobs = {name: given.pop(name) for name in ("resume", "from", "eval", "segment")}
    soft = given.pop("soft")
    scales = SCALES if given.pop("multi_scale") else SCALES[:1]
    fine = jobs["segment"] or not soft and (jobs["eval"] or scales == SCALES[:1])
    need(fine, "--soft, --multi-scale: nothing to do; expected --segment or --eval; leave them out")
    fine = not (jobs["eval"] and "out" in given)
    need(fine, "--eval RUN --out: contradict; expected one folder; leave --out out")
    kind = next((name for name in ("photos", "voc") if name in given), "toy")
    usual = "runs/voc" if jobs["segment"] else f"runs/{kind}"
    folder = Path(jobs["eval"] or given.get("out") or usual)
    if kind in given:
        given[kind] = str(Path(given[kind]).resolve())
    fault = f"{folder}: no such run; expected one; name it with --out"
    need(folder.is_dir() or not (jobs["resume"] or jobs["segment"]), fault)
    if jobs["segment"]:
        return segment_photos(folder, jobs["segment"], given, soft, scales)
    if jobs["eval"]:
        run = reopen(folder, given, ("voc", "photos", "out", "device", "workers", "favour", "size"))
        run.net.scales = scales
    else:
        run = start_run(folder, jobs, given, TOY if kind == "toy" else {}, argv)
        train(run)
        if processes()[0] == 0:
            deliver(run)
    evaluate(run)
    minutes = (time.time() - start) / 60
    say(f"{minutes:.1f} minutes; results.json, masks/, overlays/, areas.csv, panels/ in {folder}")


def main(argv=None):
    """Run the command line; returns 0, 2 after bad input, 130 after Ctrl-C; faults on stderr."""
    try:
        command(sys.argv[1:] if argv is None else argv)
        return 0
    except KeyboardInterrupt:
        say(STOPPED, stream=sys.stderr)
        return 130
    except (InputError, PermissionError) as e:
        fault = str(e)
    except (MemoryError, RuntimeError) as e:  # torch's own out-of-memory errors are RuntimeErrors
        fault = "memory is full; expected room; lower --batch, --crop, --size or --workers"
        full = re.search(r"(allocate|out of|shared|enough) memory|DataLoader worker \(pid", str(e))
        if re.search("gloo|NCCL|Connection (closed|reset)", str(e)) and dist.is_initialized():
            fault = "another process is gone; expected all; see its own line, then --resume"
        elif not full and not isinstance(e, MemoryError):
            raise
    say(f"sgseg: {fault}", stream=sys.stderr)
    return 2


def stop(*_):
    """Ctrl-C is a kill with a line; torch's destructors would swallow an exception."""
    say(STOPPED, stream=sys.stderr)
    os._exit(130)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, stop)
    sys.exit(main())
