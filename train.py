"""Train a segmentation network, and make dense pseudo labels, from image tags.

    python train.py                                     train on the built-in toy set (a minute)
    python train.py --voc PATH                          train on a VOC devkit
    python train.py --photos DIR                        train on photos in class folders, DIR/cat
    python train.py --out RUN --resume                  continue an interrupted run
    python train.py --eval RUN                          score a run again
    python train.py --out RUN --segment PHOTO.jpg ...   make masks of your own photos
    python data.py PATH                                 print what the loader finds in your data
    torchrun --nproc_per_node=2 train.py --voc PATH     share the work between processes

The method alternates (Ke & Hsu 2018, abstract, sentence 9): every round first refines the pseudo
labels with the network fixed, then updates the network with the labels fixed. A last refine step
makes the final labels. The schedule and all numbers are our choice; "tuned" means chosen with
training masks of VOC subsets (lo, hi, min_steps, rounds and epochs also with val masks) and then
fixed (docs/CHOICES.md).
"""

import argparse
import csv
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import time
import warnings
from collections import defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import data
import refine
from data import IGNORE, InputError, as_input_error, print_line, progress, read_image, write
from sgseg import BACKBONES, SCALES, SGSeg, load_imagenet

try:
    import fcntl
except ImportError:  # Windows has no fcntl: runs are not locked there
    fcntl = None


def option(default, help, source="", low=-float("inf"), high=float("inf")):
    """Return a dataclass field that is also an option of the command line."""
    about = {"help": help, "source": source, "low": low, "high": high}
    return field(default=default, metadata=about)


@dataclass
class Config:
    """Every option of a run, with its help text, the source of its default and its range."""

    # data and weights
    voc: str = option("", "devkit folder; without --voc and --photos the built-in toy set is used")
    photos: str = option("", "folder of tagged photos, DIR/CLASS/*.jpg, instead of a devkit")
    corrected: str = option("", "folder of corrected masks, used as labels of their photos")
    out: str = option("", "run folder [runs/voc, runs/photos or runs/toy]")
    backbone: str = option("lite0", "lite0, vgg16, tiny or your own")
    weights: str = option("auto", "ImageNet weights: auto (the backbone's own), none, or a file")
    # schedule
    warmup: int = option(
        0, "epochs on image tags alone; needed without ImageNet weights", "tuned", 0
    )
    rounds: int = option(
        3, "rounds of refine and update steps before the last refine step", "tuned", 0, 1000
    )
    epochs: int = option(4, "epochs per update", "tuned", 1, 10_000)
    min_steps: int = option(
        5, "minimum number of steps per epoch; small sets are repeated", "tuned", 1, 10_000
    )
    batch: int = option(16, "images per step", "our choice", 1, 10_000)
    lr: float = option(
        0.003, "learning rate; the heads' is 10 times this with ImageNet weights", "tuned", 1e-9, 10
    )
    # sizes
    crop: int = option(257, "side of a training crop, 16n+1", "our choice", 17, 4097)
    size: int = option(
        500, "long side of photos when refining and segmenting", "as in VOC", 17, 8192
    )
    scale: tuple = option(
        (0.5, 1.0),
        "in training, the long side is --size times a random number in this range",
        "our choice",
        0.01,
        100,
    )
    # method
    affinity: bool = option(True, "use stage 2, affinity guidance")
    self_guided: bool = option(True, "use stage 3 when refining and segmenting")
    strength: tuple = option(
        (refine.STRENGTH, 10.0), "lambda of stage 2 in round 1 and in later rounds", "tuned", 0, 1e6
    )
    radius: int = option(refine.RADIUS, "radius of the guided filter in cells", "tuned", 0, 10_000)
    eps: float = option(refine.EPS, "eps of the guided filter", "tuned", 1e-9, 1e6)
    lo: float = option(refine.LO, "pixels are background if all maps are below this", "tuned", 0, 1)
    hi: float = option(
        refine.HI,
        "a class needs a map of at least this; the last refine step uses (lo + hi) / 2",
        "tuned",
        0,
        1,
    )
    object_bias: float = option(
        0.75, "added to all logits but the background's when segmenting", "tuned", -100, 100
    )
    supervised: bool = option(False, "train on the true masks, to measure the upper bound")
    # machine
    seed: int = option(0, "random seed for weights, order and augmentation", "", 0, 2**31)
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    workers: int = option(-1, "threads that read ahead; -1: 4 with CUDA, else 0", "", -1, 1000)


# The toy set's own defaults (our choice: a run takes a minute on two cores)
TOY = {"backbone": "tiny", "warmup": 15, "rounds": 2, "lr": 0.1, "crop": 97, "size": 97}
TOY |= {"scale": (0.75, 1.25), "strength": (5.0, 5.0), "radius": 2, "eps": 1e-3}
TOY |= {"lo": 0.45, "hi": 0.6, "object_bias": 0.0}
# the options that may change on --resume
MAY_CHANGE = ("voc", "photos", "corrected", "out", "device", "workers")
MOMENTUM = 0.9  # of SGD (DeepLab)
WEIGHT_DECAY = 1e-4  # of SGD (our choice)


# ---- the whole method ----------------------------------------------------------------------------


def train(run):
    """Alternate: refine the labels with the network fixed, update it with the labels fixed.

    When a run is resumed the same code runs and finished work is skipped.
    """
    rounds = run.cfg.rounds
    # warm-up on image tags alone
    fit_cam(run)  # on ImageNet features: the CAM head in closed form
    update(run, 0)  # with --warmup N: gradient descent on L_cls
    snapshot(run, 0)
    for r in range(1, rounds + 1):
        refine_labels(run, r)  # network fixed, labels change
        update(run, r)  # labels fixed, network changes
        snapshot(run, r)  # save and score the network, draw panels; training does not need this
    refine_labels(run, rounds + 1)  # make the final labels


def schedule(cfg, r):
    """Return the settings of refine r: (reads_seg_head, strength, lo, hi).

        refine           stage 1 reads              lambda            lo, hi
        1                CAM head                   --strength, 1st   --lo, --hi
        2 to rounds      segmentation head          --strength, 2nd   --lo, --hi
        rounds + 1       segmentation head          --strength, 2nd   both (lo + hi) / 2

    From round 2 on the segmentation head is better than the CAM head. It was trained on labels made
    from maps that the walk had already spread, so lambda is lower. The last refine step leaves no
    pixel undecided, because no network is trained on its labels.
    Source: our choice (docs/CHOICES.md).
    """
    middle = (cfg.lo + cfg.hi) / 2
    lo, hi = (cfg.lo, cfg.hi) if r <= cfg.rounds else (middle, middle)
    return r > 1, cfg.strength[0 if r == 1 else 1], lo, hi


def epochs_before(cfg, r):
    """Return the number of epochs before the update of round r; the warm-up is round 0."""
    return cfg.warmup + (r - 1) * cfg.epochs if r else 0


# ---- warm-up: the CAM head from image tags -------------------------------------------------------


@torch.no_grad()
def fit_cam(run):
    """Solve for the CAM head on ImageNet features: two ridge regressions of targets t on x.

    The first has one sample per photo: x = mean_i F_high, t = y. The second averages features
    under the maps M of the first (divided by their maximum, because the first fit scales the scores
    of whole photos, not those of single cells):

        x_k = sum_i M_ki F_high,i / sum_i M_ki,   t = one-hot k     for every tag k of a photo, and
        x_0 = the same with M_0 = 1 - min(1, sum_k M_k),   t = 0  for its background

    so that sky, which surrounds birds as well, is pulled to 0 instead of to aeroplane. The backbone
    is not trained here: training it on tags would make it forget ImageNet's 1000 classes. The
    intercept is dropped because the head has no bias; s only ranks photos until L_cls turns it into
    logits during the rounds. Ridge regression shrinks w, more so with few photos, so w is rescaled
    by one factor for all classes: then <w_k, x_k> is 1/2 on average where t is 1, in the middle of
    a map's range.
    Source: our choice, measured in docs/CHOICES.md. Does nothing without ImageNet weights, or if
    the log says that the head is already fitted: by this run (a row "fit") or by another run from
    which it was copied (a row "from").
    """
    if run.cfg.weights == "none" or any(m["what"] in ("fit", "from") for m in run.metrics):
        return
    net = run.net.eval()
    start = time.monotonic()
    n = len(run.train_set.ids)
    for samples_of, penalty in ((photo_sample, 1.0), (map_samples, 10.0)):
        # one or more samples (x, t) per photo
        samples = {}
        for i in progress(f"fit {samples_of.__name__}", shard(n)):
            high = net.features(read_image(run.train_set.image_paths[i]))[1]  # (1,C,h,w)
            x, t = samples_of(net, high, run.train_set.tags[i].to(high))
            samples[i] = x.cpu(), t.cpu()
        samples = {i: pair for part in all_gather(samples) for i, pair in part.items()}
        x, t = map(torch.cat, zip(*(samples[i] for i in sorted(samples))))
        # the regression, then one scale for all classes
        w = ridge(x, t, penalty)
        score = (t * (x @ w.T)).sum() / t.sum().clamp_min(1)  # mean of <w_k, x_k> where t is 1
        w = w / (2 * score if score > 1e-4 else 1)
        run.net.cam.weight[:, :, 0, 0] = w.to(run.net.cam.weight)
    run.log("fit", round=0)
    run.save()
    print_minutes_left(run, (time.monotonic() - start) / (2 * n))


def print_minutes_left(run, seconds):
    """Print an estimate of the minutes left. seconds: time per photo of one pass of `fit_cam`."""
    # Refining a photo takes 2.4 times as long, training on a crop 1.3 times (lite0 on a CPU);
    # scoring the val and training photos takes as long as two more refine steps.
    photos = 2.4 * (run.cfg.rounds + 3) * len(run.train_set.ids)
    crops = 1.3 * run.cfg.batch * steps_left(run)
    print_line(f"time left: about {(photos + crops) * seconds / 60:.0f} min")


def photo_sample(net, high, tags):
    """Return x (1,C), the mean feature of a photo, and t (1,K), its tags."""
    return high.mean((2, 3)), tags[None]


def map_samples(net, high, tags):
    """Return x (P+1,C), mean features under the maps of P tags and background, and t (P+1,K)."""
    tagged = tags.nonzero()[:, 0]
    M = refine.localization_maps(net.cam(high), tagged)  # (1,P,h,w)
    M = torch.cat([M, 1 - M.sum(1, keepdim=True).clamp_max(1)], 1)[0]  # (P+1,h,w)
    x = torch.einsum("phw,chw->pc", M, high[0]) / M.sum((1, 2))[:, None].clamp_min(1e-5)
    return x, torch.cat([torch.eye(len(tags)).to(high)[tagged], torch.zeros_like(tags)[None]])


def ridge(x, t, penalty):
    """Return w (K,C), the weights of a ridge regression of targets t on features x. They minimise

        sum_n |t_n - mean t - w z_n|^2 + penalty * mean_n |z_n|^2 * |w|^2

    z are the features minus their mean, each channel divided by its standard deviation; w is
    converted back to the scale of x. x (n,C), t (n,K) float32.
    Source: Hoerl & Kennard 1970; its use here is our choice.
    """
    deviation = x.std(0, correction=0) + 1e-6
    z = ((x - x.mean(0)) / deviation).double()  # (n,C)
    G = z.T @ z  # (C,C)
    G.diagonal().add_((penalty * G.trace() / len(x)).clamp_min(1e-9))  # > 0 even if all x are equal
    w = torch.linalg.solve(G, z.T @ (t - t.mean(0)).double()).T  # (K,C)
    return w.to(x.dtype) / deviation


# ---- refine: network fixed, labels change --------------------------------------------------------


def label_image(net, image, tags, cfg, r):
    """Return the three maps and the pseudo label of `refine.four_stages` in refine r.

    image: a PIL image; tags (K,). `schedule` gives the settings that depend on r.
    """
    S, _, Z, mid = net.outputs(image)
    I = data.to_tensor(image)[None].to(mid.device)  # (1,3,H,W)
    tagged = tags.nonzero()[:, 0].tolist()
    reads_seg_head, strength, lo, hi = schedule(cfg, r)
    # `fit_cam` gives the scores one scale for all photos; gradient descent does not
    unit = 1.0 if cfg.weights != "none" and not cfg.warmup else None
    localize = refine.head_maps if reads_seg_head else partial(refine.localization_maps, unit=unit)
    guide = partial(refine.affinity_guided, strength=strength)
    sharpen = partial(refine.self_guided, radius=cfg.radius, eps=cfg.eps)
    stages = (localize, guide if cfg.affinity else None, sharpen if cfg.self_guided else None)
    return refine.four_stages(Z if reads_seg_head else S, mid, I, tagged, stages, lo, hi)


@torch.no_grad()
def refine_labels(run, r):
    """Write the labels of refine r, a palette PNG for each training photo.

    Labels written by an interrupted refine are kept; the corrected masks are used as they are.
    """
    cfg = run.cfg
    if cfg.supervised or run.epoch > epochs_before(cfg, r):
        return
    run.net.eval()
    counts = 0
    for i in progress(f"refine {r}", shard(len(run.train_set.ids))):
        path = run.label_path(i, r)
        if not path.exists():
            write(path, data.palette_image(make_label(run, i, r)))
        counts += np.bincount(run.label(i, r).ravel(), minlength=256)
    counts = all_sum(counts)
    share = (counts / counts.sum()).tolist()
    shares = dict(zip(run.net.label_names, share))
    run.log("labels", round=r, undecided=share[IGNORE], shares=shares)
    warn_of_lost_classes(run, r, share)
    run.save()


def make_label(run, i, r):
    """Return the label (H,W) uint8 of photo i in refine r; the last refine step removes specks."""
    if i in run.corrected:
        return data.read_mask(run.corrected[i], len(run.train_set.class_names))
    image = read_image(run.train_set.image_paths[i])
    label = run.annotate(run.net, image, run.train_set.tags[i], run.cfg, r)[-1][0].cpu().numpy()
    return label if r <= run.cfg.rounds else data.remove_specks(label)


def warn_of_lost_classes(run, r, share):
    """Warn of tagged classes with almost no pixels, and of labels that are 99% background."""
    tagged = [1, *run.train_set.tags.sum(0).tolist()]
    lost = [name for name, x, n in zip(run.net.label_names, share, tagged) if n and x < 1e-4]
    lost += ["anything but background"] if share[0] > 0.99 else []
    if lost and rank_and_world_size()[0] == 0:
        advice = "look at panels/; try more photos, more --epochs, or another --lo and --hi"
        data.warn(f"refine {r} labels almost no pixels as {', '.join(lost)}: {advice}")


# ---- update: labels fixed, network changes -------------------------------------------------------


def losses(net, x, y, labels):
    """Return L_cls and L_seg of a batch.

        L_cls = -mean_bk [y log sigmoid(s) + (1 - y) log sigmoid(-s)]     multi-label soft margin
        L_seg = mean over labelled pixels: -log softmax(upsample(Z))_label          cross-entropy

    x (B,3,H,W) in [0,1]; y (B,K) in {0,1}; labels (B,H,W) int64, 0..K, or 255 for undecided.
    Returns two float32 scalars; L_seg is the constant 0 if no pixel of the batch is labelled. L_seg
    reads every fourth row and column of the labels, a grid that shares its corners with the image.
    Source: abstract, sentence 8; the two losses and their plain sum are our choice.

    Where gradients flow:

                        CAM head w   seg head   F_mid   F_high   frozen layers   labels, maps
        L_cls           yes          no         no      yes      no              no
        L_seg           no           yes        yes*    yes      no              no
        refine_labels   no           no         no      no       no              no

    * With lite0's ImageNet weights F_mid comes from frozen layers, so F_mid and the affinity graph
    never change. The column counts only what reaches F_mid directly. Where its layers are not
    frozen (tiny, vgg16, lite0 without ImageNet weights), both losses train them through F_high too.
    """
    with torch.autocast("cuda", torch.bfloat16, enabled=x.is_cuda):  # float32 on a CPU
        _, s, Z, _ = net(x)
    L_cls = F.multilabel_soft_margin_loss(s.float(), y)
    target = labels[:, ::4, ::4]  # (B,(H+3)/4,(W+3)/4)
    if not (target != IGNORE).any():
        return L_cls, torch.zeros((), device=x.device)
    Z = refine.upsample(Z.float(), target.shape[-2:])
    return L_cls, F.cross_entropy(Z, target, ignore_index=IGNORE)


def update(run, r):
    """Minimise L_cls + L_seg on the labels of round r for `epochs` epochs.

    r = 0 is the warm-up: `warmup` epochs without labels, so that only L_cls counts.

    SGD with momentum; step n of the N steps of an update has the learning rate lr (1 - n/N)^0.9.
    """
    cfg = run.cfg
    first = epochs_before(cfg, r)
    end = epochs_before(cfg, r + 1)
    net = run.net
    set_deterministic(cfg.device != "cpu")
    if dist.is_initialized() and run.epoch < end:
        net = DistributedDataParallel(net, find_unused_parameters=True)  # averages gradients
    for epoch in range(max(first, run.epoch), end):
        run.net.train()
        run.net.backbone.train(cfg.weights == "none")  # keep ImageNet's BatchNorm statistics
        parts = batch_indices(run, epoch)
        start = time.monotonic()
        sums = torch.zeros(2)
        shown = {}  # losses in the progress line
        batches = read_batches(run, r, epoch, parts)
        batches = progress(f"round {r} epoch {epoch}", batches, shown, len(parts))
        for step, batch in enumerate(batches):
            n = (epoch - first) * len(parts) + step
            decay = (1 - n / ((end - first) * len(parts))) ** 0.9
            L = update_step(run, net, batch, decay)
            sums += L
            shown |= {"L_cls": float(L[0]), "L_seg": float(L[1])}
        run.epoch = epoch + 1
        for buffer in run.net.buffers() if dist.is_initialized() else ():
            dist.broadcast(buffer, 0)  # all processes take the BatchNorm statistics of rank 0
        world_size = rank_and_world_size()[1]
        L_cls, L_seg = (all_sum(sums) / len(parts) / world_size).tolist()
        rate = world_size * sum(map(len, parts)) / max(time.monotonic() - start, 1e-9)
        lr = cfg.lr * decay
        run.log("update", round=r, L_cls=L_cls, L_seg=L_seg, lr=lr, images_per_s=rate)
        run.save()
    set_deterministic(False)


def update_step(run, net, batch, decay):
    """Do one SGD step and return (L_cls, L_seg) as a CPU tensor.

    net: run.net, or its DistributedDataParallel wrapper. Raises InputError if a loss is not finite.
    """
    x, y, labels, index = batch
    for group in run.optimizer.param_groups:
        group["lr"] = run.cfg.lr * group["lr_factor"] * decay
    x = x.to(run.cfg.device, memory_format=torch.channels_last)
    L_cls, L_seg = losses(net, x, y.to(x.device), labels.to(x.device))
    L = torch.stack([L_cls, L_seg]).detach().cpu()
    if not L.isfinite().all():
        images = " ".join(run.train_set.ids[i] for i in index)
        problem = f"has a loss that is not finite in epoch {run.epoch} ({L.tolist()}: {images})"
        remedy = "Start a new run with a lower --lr. checkpoint.pt holds the last finished epoch"
        raise InputError(run.folder, problem, remedy, "loss")
    run.optimizer.zero_grad()
    (L_cls + L_seg).backward()
    run.optimizer.step()
    return L


def steps_left(run):
    """Return the number of steps from now to the end of the run."""
    epochs = epochs_before(run.cfg, run.cfg.rounds + 1) - run.epoch
    return epochs * len(batch_indices(run, 0))


def batch_indices(run, epoch):
    """Return the sample indices of each of this process's batches in an epoch.

    The order depends on seed and epoch only. A small set is repeated several times, each time in a
    new order. Raises InputError if a batch cannot be divided among the processes.
    """
    n = len(run.train_set.ids)
    batch = min(run.cfg.batch, n)
    rank, world_size = rank_and_world_size()
    if batch % world_size:
        problem = f"of {batch} images cannot be divided among {world_size} processes"
        raise InputError("a batch", problem, "Choose another --batch", "processes")
    rng = np.random.default_rng([run.cfg.seed, epoch])
    passes = -(-run.cfg.min_steps * batch // n)  # rounded up
    order = np.concatenate([k * n + rng.permutation(n) for k in range(passes)])
    order = order[: len(order) // batch * batch][rank::world_size].tolist()
    size = batch // world_size
    return [order[start : start + size] for start in range(0, len(order), size)]


def read_batches(run, r, epoch, parts):
    """Yield the batches of an epoch (x, y, labels, index) while threads read the next ones."""
    cfg = run.cfg
    paths = run.train_set.mask_paths
    if not cfg.supervised:
        paths = [run.label_path(i, r) for i in range(len(run.train_set.ids))]
    paths = paths if r else None  # the warm-up has no labels
    crops = data.Crops(run.train_set, cfg.crop, cfg.size, cfg.scale, cfg.seed, epoch, paths)

    def read(part):
        return torch.utils.data.default_collate([crops[n] for n in part])

    workers = 4 * (cfg.device != "cpu") if cfg.workers < 0 else cfg.workers
    if workers == 0:
        yield from map(read, parts)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting = deque()
        for part in parts:
            waiting.append(pool.submit(read, part))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def set_deterministic(wanted):
    """Turn CUDA's deterministic algorithms on or off, so that runs can be repeated bit for bit."""
    if torch.cuda.is_available():
        torch.use_deterministic_algorithms(wanted, warn_only=True)
        warnings.filterwarnings("ignore", "nll_loss2d_forward")  # only the printed loss varies


# ---- scores and pictures -------------------------------------------------------------------------


def run_all(run):
    """Train, write the masks and score: all that `python train.py` does with a run."""
    train(run)
    write_masks(run)
    evaluate(run)


def snapshot(run, r):
    """After the update of round r, save the network, draw panels and score `segment` on val.

    The network is saved as model.pt. For r = 0 it is saved as warmup.pt and not scored.
    panels/roundR.png shows the same few images every round, as the next refine step would label
    them.
    """
    if run.epoch != epochs_before(run.cfg, r + 1):
        return
    run.net.eval()
    if rank_and_world_size()[0] == 0:
        write(run.folder / ("model.pt" if r else "warmup.pt"), run.net.export_state())
        photos = run.val_set or run.train_set
        picked = np.linspace(0, len(photos.ids) - 1, min(4, len(photos.ids))).astype(int)
        rows = sum((stage_panel(run, photos, i, r) for i in picked), [])
        write(run.folder / "panels" / f"round{r}.png", data.sheet(rows))
    if r and (score := validate(run.net, run.val_set)):
        run.log("val", round=r, val_miou=score["miou"])
    run.save()


def stage_panel(run, photos, i, r):
    """Return rows {caption: picture}, one for each tagged class of photo i after round r.

    Photo | localization map | + affinity | + self-guided | pseudo label | prediction | truth.
    """
    image = read_image(photos.image_paths[i])
    names = run.net.label_names
    tagged = photos.tags[i].nonzero()[:, 0].tolist()
    *maps, label = run.annotate(run.net, image, photos.tags[i], run.cfg, r + 1)
    labels = {"pseudo label": label[0].cpu().numpy()}
    if r:
        labels["prediction"] = run.net.segment(image)
    if photos is run.val_set and photos.mask_paths[i]:
        labels["ground truth"] = photos.mask(i, image.size)
    rows = [{names[k + 1]: image} for k in tagged] or [{"no tag": image}]
    for caption, M in zip(("localization map", "+ affinity", "+ self-guided"), maps):
        M = refine.upsample(M, image.size[::-1])[0].cpu()  # (P,H,W)
        for row, M_k in zip(rows, M):
            row[caption] = data.heatmap(image, M_k)
    for caption, label in labels.items():
        shown = " ".join(names[k] for k in np.unique(label) if 0 < k < IGNORE)
        for row in rows:
            row[f"{caption}: {shown}"] = data.overlay(image, label)
    return rows


def write_masks(run):
    """Write the last labels: RUN/masks, RUN/overlays, areas.csv and classes.txt.

    Rows of areas.csv: photo, class, share of the photo's pixels.
    Lines of classes.txt: index, name, colour.
    """
    if rank_and_world_size()[0]:
        return
    names = run.net.label_names
    palette = np.reshape(data.palette_image(np.zeros((1, 1))).getpalette(), (256, 3)).tolist()
    lines = [f"{k} {name} #{bytes(palette[k]).hex()}" for k, name in enumerate(names)]
    write(run.folder / "classes.txt", "\n".join(lines) + "\n")
    if run.cfg.supervised:  # no labels were made
        return
    rows = [("photo", "class", "share")]
    for i, name in enumerate(progress("masks", run.train_set.ids)):
        path = run.train_set.image_paths[i]
        label = run.label(i, run.cfg.rounds + 1)
        write(run.folder / "masks" / f"{name}.png", data.palette_image(label))
        overlay = data.overlay(read_image(path), label, names)
        write(run.folder / "overlays" / f"{name}.png", overlay)
        rows += [(f"{name}{path.suffix}", *area) for area in data.areas(label, names).items()]
    write(run.folder / "areas.csv", data.csv_bytes(rows))


def validate(net, photos):
    """Return the scores (`data.summary`) of `net.segment`, or None if masks are missing."""
    if photos is None or not all(photos.mask_paths):
        return None
    C = 0
    for i in progress("validate", shard(len(photos.ids))):
        image = read_image(photos.image_paths[i])
        truth = photos.mask(i, image.size)
        C += data.confusion(truth, net.segment(image), len(photos.class_names))
    settings = {"object_bias": net.object_bias, "scales": net.scales, "size": net.size}
    return data.summary(all_sum(C), photos.class_names) | settings | {"decided": 1.0}


def score_stages(run):
    """Return the scores of all stages on the training photos that have a true mask.

    Photos with a corrected mask are left out.

    "train cam", "train affinity", "train self_guided": the maps of refine 1, made by the
    network after the warm-up, thresholded at (lo + hi) / 2. "labels roundR" and "last labels": the
    pseudo labels on decided pixels only; `decided` is their share. Photos whose mask cannot be used
    are left out, with a warning.
    """
    photos = run.train_set
    with_mask = [i for i, path in enumerate(photos.mask_paths) if path and i not in run.corrected]
    net = SGSeg.load(run.folder / "warmup.pt", run.cfg.device)
    C = defaultdict(int)  # row of the table -> confusion matrix
    pixels = 0
    left_out = []
    contradicting = []
    for i in progress("score stages", [with_mask[n] for n in shard(len(with_mask))]):
        image = read_image(photos.image_paths[i])
        try:
            truth = photos.mask(i, image.size)
        except InputError as problem:
            left_out.append(str(problem))
            continue
        if photos.contradicts(i, truth):
            contradicting.append(photos.ids[i])
        pixels += int((truth != IGNORE).sum())
        for name, label in stage_labels(run, net, image, i).items():
            decided = np.where(label == IGNORE, IGNORE, truth)
            C[name] += data.confusion(decided, label, len(photos.class_names))
    left_out = sum(all_gather(left_out), [])
    if left_out:
        data.warn(f"{len(left_out)} training masks cannot be used; the first: {left_out[0]}")
    photos.check_masks(sum(all_gather(contradicting), []))
    total = defaultdict(int)
    for name, matrix in (pair for part in all_gather(C) for pair in part.items()):
        total[name] += matrix
    pixels = max(1, all_sum(pixels))
    omitted = [photos.ids[i] for i in run.corrected]
    more = {"left_out_because_corrected": omitted} if omitted else {}
    return {
        name: data.summary(matrix, photos.class_names) | {"decided": matrix.sum() / pixels} | more
        for name, matrix in total.items()
    }


def stage_labels(run, net, image, i):
    """Return {"train cam": label, ..., "labels round1": label, ...} of training photo i.

    net: the network after the warm-up.
    """
    cfg = run.cfg
    middle = (cfg.lo + cfg.hi) / 2
    tags = run.train_set.tags[i]
    tagged = tags.nonzero()[:, 0].tolist()
    labels = {}
    *maps, _ = run.annotate(net, image, tags, cfg, 1)
    for name, M in zip(("train cam", "train affinity", "train self_guided"), maps):
        M = refine.upsample(M, image.size[::-1])
        labels[name] = refine.pseudo_labels(M, tagged, middle, middle)[0].cpu().numpy()
    for r in range(1, cfg.rounds + 2):
        if run.label_path(i, r).exists():
            labels[f"labels round{r}" if r <= cfg.rounds else "last labels"] = run.label(i, r)
    return labels


def evaluate(run):
    """Score `segment` on val and all stages on the training photos; print and write the scores."""
    if run.epoch < epochs_before(run.cfg, min(2, run.cfg.rounds + 1)):
        raise InputError(run.folder, "has not finished a round", "Use --resume", "unfinished")
    net = run.net.eval()
    val = validate(net, run.val_set) if run.cfg.rounds else None  # else Z is untrained
    rows = {}
    if any(run.train_set.mask_paths):
        try:
            rows = score_stages(run)
        except InputError as problem:
            data.warn(f"the labels are not scored: {problem}")
    rows |= {"val seg": val} if val else {}
    changed = (net.size, net.object_bias) != (run.cfg.size, run.cfg.object_bias)
    other = changed or len(net.scales) > 1
    name = f"results_{settings_name(net)}.json" if other else "results.json"
    write_scores(run.folder / name, rows, net.label_names)


def evaluate_split(net, folder, root, split):
    """Score a network on a split of a devkit with the same classes; print and write the score.

    The file is RUN/results_DEVKIT_SPLIT_SETTINGS.json. Raises InputError.
    """
    photos = data.VOC(root, split)
    if photos.class_names != net.label_names[1:]:
        different = sorted(set(photos.class_names) ^ set(net.label_names[1:]))
        problem = f"has other classes than the network: {' '.join(different) or 'another order'}"
        raise InputError(photos.root, problem, "Give a devkit with the same classes", "classes")
    photos.require_masks()
    photos.scan(masks=True)
    name = f"results_{Path(root).name}_{split}_{settings_name(net)}.json"
    write_scores(folder / name, {split: validate(net, photos)}, net.label_names)


def settings_name(net):
    """Return the settings that a score depends on, as part of a file name."""
    return f"size{net.size}_bias{net.object_bias:g}_{len(net.scales)}scales"


def write_scores(path, rows, label_names):
    """Write the rows and print them: IoU in %, a row for each stage, a column for each class."""
    if rank_and_world_size()[0]:
        return
    if rows:
        print_line("\nIoU in %. train: maps of round 1, thresholded at (lo + hi) / 2.")
        print_line("labels: on decided pixels only; the column 'decided' is their share.")
        names = " ".join(f"{name[:5]:>5}" for name in label_names)
        print_line(f"{'':18}  mIoU  decided {names}")
    for name, s in rows.items():
        values = [s["miou"], s["decided"], *(s["iou"].get(k) for k in label_names)]
        texts = ["    -" if x is None else f"{100 * x:5.1f}" for x in values]
        print_line(f"{name:18} {texts[0]}    {' '.join(texts[1:])}")
    write(path, json.dumps(rows, indent=1))
    print_line(f"written: {path}" if rows else "nothing was scored: no mask could be used")


def segment_photos(net, out, photos):
    """Write masks and overlays of photos, and of the photos in folders, to the folder out.

    NAME.png holds palette indices, areas.csv a row for each photo and class. Photos that cannot be
    read are skipped; one InputError names them at the end.
    """
    paths = []
    for photo in photos:
        paths += data.photos_of(photo)
        if Path(photo).is_dir():
            data.warn_of_unused(Path(photo), set(paths))
    if not paths:
        remedy = "Name the folder that holds the photos themselves"
        raise InputError(photos[0], "contains no photos", remedy, "empty")
    problems = []
    areas = {}  # photo -> share of each class
    for path in paths:
        try:
            image = read_image(path)
            label = net.segment(image)
            target = out / f"{path.stem}.png"
            source = os.path.abspath(path)
            write(target, data.palette_image(label), source)
            overlay = data.overlay(image, label, net.label_names)
            write(out / f"{path.stem}_overlay.png", overlay, source)
        except InputError as problem:
            problems.append(problem)
            continue
        areas[path.name] = data.areas(label, net.label_names)
        texts = [f"{k} {share:.0%}" for k, share in areas[path.name].items() if k != "background"]
        shown = ", ".join(texts) or "background only"
        print_line(data.printable(f"{path} -> {target}: {shown}"))
    # in areas.csv, replace the rows of these photos
    table = out / "areas.csv"
    rows = list(csv.reader(data.read_text(table).splitlines())) if table.exists() else []
    rows = [("photo", "class", "share"), *(row for row in rows[1:] if row and row[0] not in areas)]
    rows += [(photo, *area) for photo, shares in areas.items() for area in shares.items()]
    write(table, data.csv_bytes(rows))
    data.raise_all(problems)


# ---- several processes: torchrun -----------------------------------------------------------------


def init_distributed():
    """Join the other processes if torchrun started this one; only rank 0 prints from then on."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
        return
    print_line(f"waiting for {os.environ.get('WORLD_SIZE')} processes (torchrun sets WORLD_SIZE)")
    # name both backends: on a machine with a GPU the default lacks one for CPU tensors
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    local_rank = int(os.environ["LOCAL_RANK"])
    if local_rank < torch.cuda.device_count():
        torch.cuda.set_device(local_rank)  # what "cuda" means from here on
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w")


def rank_and_world_size():
    """Return this process's rank and the number of processes: (0, 1) for a single process."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def shard(n):
    """Return this process's share of the indices 0 to n - 1."""
    rank, world_size = rank_and_world_size()
    return range(rank, n, world_size)


def all_gather(x):
    """Gather x from all processes, in rank order. Blocks until every process has called it."""
    parts = [x] * rank_and_world_size()[1]
    if dist.is_initialized():
        dist.all_gather_object(parts, x)
    return parts


def all_sum(x):
    """Return the sum of x, a number or an array, over all processes."""
    return sum(all_gather(x))


# ---- a run: data, network, optimizer and position ------------------------------------------------


@dataclass
class Run:
    """A run: its data and network, and how far it has got (`epoch`: finished epochs in all).

    annotate: the function that labels a photo. Your own takes the arguments of `label_image` and
    returns a tuple: three maps or none, then the label (1,H,W) uint8. Maps appear in the panels.
    """

    cfg: Config
    train_set: data.VOC
    val_set: data.VOC | None  # None without a val list
    net: SGSeg
    optimizer: torch.optim.Optimizer
    corrected: dict  # index of a photo -> its corrected mask
    identity: dict  # properties of the data that must not change when the run is resumed
    about: dict  # config.json: options, command line, versions
    lock: object = None  # an open file; the lock lasts as long as it is open
    annotate: object = label_image
    epoch: int = 0
    metrics: list = field(default_factory=list)  # rows of metrics.jsonl

    @property
    def folder(self):
        """The run folder."""
        return Path(self.cfg.out)

    def save(self):
        """Write checkpoint.pt, config.json and metrics.jsonl (rank 0 only). Raises InputError."""
        if rank_and_world_size()[0]:
            return
        model = data.check_finite(self.net.state_dict(), f"{self.folder}: the network")
        state = {"config": asdict(self.cfg), "model": model, "epoch": self.epoch}
        state |= {"optimizer": self.optimizer.state_dict(), "metrics": self.metrics}
        state |= {"about": self.about, "data": self.identity}
        write(self.folder / "checkpoint.pt", state)
        write(self.folder / "config.json", json.dumps(self.about, indent=1))
        write(self.folder / "metrics.jsonl", "".join(json.dumps(m) + "\n" for m in self.metrics))

    def log(self, what, **values):
        """Print a row and keep it for metrics.jsonl, replacing any row of its kind and epoch."""
        row = {"what": what, "epoch": self.epoch, **values}
        kept = [m for m in self.metrics if (m["what"], m["epoch"]) != (what, self.epoch)]
        self.metrics = [*kept, row]
        numbers = "  ".join(f"{name} {format_value(v)}" for name, v in row.items())
        print_line(numbers.removeprefix("what "))

    def label_path(self, i, r):
        """Return the path of the pseudo label of training photo i in round r."""
        return self.folder / "pseudo" / f"round{r}" / f"{self.train_set.ids[i]}.png"

    def label(self, i, r):
        """Return the label of training photo i in round r, (H,W) uint8. Raises InputError."""
        classes = len(self.train_set.class_names)
        return data.read_mask(self.label_path(i, r), classes, self.train_set.sizes[i])


def format_value(value):
    """Return a logged value as text: four significant digits; shares in %."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {share:.1%}" for name, share in value.items() if share)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def build(cfg, argv=(), initialize=True, lock=True):
    """Return a run with its data, network and optimizer, before any training. Raises InputError.

    initialize: load the ImageNet weights (a resumed run has its own). lock: lock the run folder.
    """
    held = lock_folder(Path(cfg.out)) if lock else None
    photos, val_set = open_data(cfg)
    net = build_network(cfg, photos.class_names, initialize)
    optimizer = build_optimizer(cfg, net)
    scan_data(cfg, photos, val_set)
    corrected = read_corrected(cfg.corrected, photos) if cfg.corrected else {}
    hashes = {i: hashlib.sha256(data.read(path)) for i, path in corrected.items()}
    masks = [f"{photos.ids[i]} {sha.hexdigest()}" for i, sha in hashes.items()]
    identity = {"classes": photos.class_names, "ids": photos.ids, "tags": photos.tags.tolist()}
    identity |= {"corrected": masks}
    about = {"config": asdict(cfg), "command": list(argv), "threads": torch.get_num_threads()}
    about |= {"python": sys.version, "torch": str(torch.__version__), "numpy": np.__version__}
    return Run(cfg, photos, val_set, net, optimizer, corrected, identity, about, held)


def open_data(cfg):
    """Return the training set, and the val set or None. Makes the toy set if it is missing."""
    if cfg.photos:
        return data.Photos(cfg.photos), None
    root = cfg.voc or Path(cfg.out) / "toy"
    if not cfg.voc and not root.exists():
        data.make_toy(root)
    train_set, val_set = data.open_devkit(root)
    if not cfg.voc and train_set.class_names != list(data.TOY_CLASSES):
        raise InputError(root, "is not the toy set", "Choose another --out", "toy")
    return train_set, val_set


def scan_data(cfg, train_set, val_set):
    """Read all files that training and scoring need once, so that errors show before training.

    These are photos, tags and the masks of val; with --supervised also the training masks.
    """
    if cfg.supervised:
        train_set.require_masks()
    train_set.scan(masks=cfg.supervised)
    if val_set:
        val_set.scan(masks=True)


def build_network(cfg, class_names, initialize):
    """Return the network on its device: random weights from the seed, or an ImageNet backbone."""
    torch.manual_seed(cfg.seed)
    if cfg.device.startswith("cuda:"):
        torch.cuda.set_device(cfg.device)
    numbers = (cfg.size, cfg.object_bias, cfg.radius, cfg.eps, cfg.self_guided)
    net = SGSeg(class_names, cfg.backbone, *numbers)
    if cfg.weights != "none":
        if initialize:
            load_imagenet(net.backbone, cfg.weights)
        for module in net.backbone.frozen:
            module.requires_grad_(False)
    return net.to(cfg.device, memory_format=torch.channels_last)


def build_optimizer(cfg, net):
    """Return SGD: the heads learn 10 times as fast as a pretrained backbone."""
    backbone = [p for p in net.backbone.parameters() if p.requires_grad]
    heads = [*net.cam.parameters(), *net.seg.parameters()]
    groups = [{"params": backbone, "lr_factor": 1}]
    groups.append({"params": heads, "lr_factor": 10 if cfg.weights != "none" else 1})
    return torch.optim.SGD(groups, cfg.lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)


def read_corrected(folder, photos):
    """Return {i: path} of the corrected masks FOLDER/ID.png.

    Raises InputError for a mask without a photo, of another size, or with an untagged class.
    """
    folder = Path(folder)
    index = {data.nfc(name): i for i, name in enumerate(photos.ids)}
    corrected = {}
    for path in sorted(folder.rglob("*.png")):
        i = index.get(data.nfc(path.relative_to(folder).with_suffix("").as_posix()))
        if i is None:
            remedy = f"Name it as in masks/, with its subfolder, for example {photos.ids[0]}.png"
            raise InputError(path, "is not named like a training photo", remedy, "corrected")
        for k in np.unique(data.read_mask(path, len(photos.class_names), photos.sizes[i])):
            if 0 < k < IGNORE and not photos.tags[i, k - 1]:
                problem = f"shows {photos.class_names[k - 1]}, which its photo is not tagged with"
                remedy = "Add the tag, or remove the class from the mask"
                raise InputError(path, problem, remedy, "corrected")
        corrected[i] = path
    if not corrected:
        problem = "holds no PNG file" if folder.is_dir() else "is not a folder"
        remedy = "Give the folder of your masks, palette PNG files named like their photos"
        raise InputError(folder, problem, remedy, "corrected")
    print_line(f"{len(corrected)} corrected masks: {' '.join(photos.ids[i] for i in corrected)}")
    return corrected


def new_run(cfg, argv=()):
    """Return a new run in cfg.out, a folder that must hold nothing else. Raises InputError."""
    folder = Path(cfg.out)
    found = sorted(path.name for path in folder.glob("*")) if folder.exists() else []
    found = [name for name in found if name not in ("toy", "lock") and name[:7] != ".sgseg-"]
    if found:
        problem = f"is not empty: it holds {found[0]}"
        raise InputError(folder, problem, "Use --resume, or another --out", "exists")
    run = build(cfg, argv)
    size = f"photos: {len(run.train_set.ids)}, classes: {len(run.train_set.class_names)}"
    print_line(f"{size}, rounds: {cfg.rounds}, steps: {steps_left(run)}, device: {cfg.device}")
    run.save()
    return run


def load_run(folder, given=None, lock=True):
    """Return the run in a folder as it was last saved.

    given: options of the command line. Only those in MAY_CHANGE may differ from the run's own. The
    data must be the same as when the run began. Raises InputError.
    """
    given = given or {}
    path = Path(folder) / "checkpoint.pt"
    state = data.load(path)
    with as_input_error(path, "is not a checkpoint of this version", "Start a new run", "model"):
        saved_options = {f.name: state["config"][f.name] for f in fields(Config)}
        # results are the same bit for bit only on the same kind of device
        device = {"device": "cpu" if saved_options["device"] == "cpu" else "auto"}
        cfg = check(Config(**saved_options | device | given | {"out": str(folder)}))
        saved = {what: state["data"][what] for what in ("classes", "ids", "tags", "corrected")}
        for name in given:
            if name not in MAY_CHANGE and getattr(cfg, name) != saved_options[name]:
                saved_option = typed_option(name, saved_options[name])
                problem = f"was started with {saved_option}, not {typed_option(name, given[name])}"
                remedy = "Leave the option out, or start a new run"
                raise InputError(folder, problem, remedy, "option")
    run = build(cfg, initialize=False, lock=lock)
    with as_input_error(path, "is not a checkpoint of this version", "Start a new run", "model"):
        for what, value in run.identity.items():
            if value != saved[what]:
                name = {"ids": "photos", "corrected": "corrected masks"}.get(what, what)
                problem = f"has changed since {folder} was started: its {name} differ"
                if what == "ids":
                    problem += f" ({' '.join(sorted(set(value) ^ set(saved[what]))[:5])})"
                remedy = "Restore them, or start a new run"
                raise InputError(run.train_set.root, problem, remedy, what)
        run.net.load_state_dict(data.check_finite(state["model"], path))
        run.optimizer.load_state_dict(state["optimizer"])
        run.epoch = int(state["epoch"])
        run.metrics = [dict(m) for m in state["metrics"]]
        run.about = dict(state["about"])
    return run


def lock_folder(folder):
    """Lock a run folder and return the open file RUN/lock. Closing the file ends the lock.

    Raises InputError if another run holds the lock. The lock is not inherited by child processes.
    Without fcntl (Windows) and on file systems without locks nothing is locked.
    """
    path = folder / "lock"
    if path.is_symlink() or path.exists() and (not path.is_file() or path.stat().st_size):
        raise InputError(path, "is not a lock file of sgseg", "Choose another --out", "exists")
    folder.mkdir(parents=True, exist_ok=True)
    file = open(path, "ab")
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        remedy = "Wait until that run has ended"
        raise InputError(folder, "is in use by another run", remedy, "lock") from None
    except OSError as e:
        data.warn(f"{folder} cannot be locked ({e.strerror}): start only one run in it")
    for leftover in list(folder.rglob(".sgseg-*.tmp")):  # of a run that was killed
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        elif leftover.parent.name != "segmented":  # there, --segment may write without a lock
            leftover.unlink()
    return file


# ---- the command line ----------------------------------------------------------------------------


def check(cfg):
    """Return cfg with weights and device resolved. Raises InputError for unusable values."""
    for name in ("voc", "photos", "corrected"):
        if getattr(cfg, name):
            setattr(cfg, name, os.path.abspath(getattr(cfg, name)))
    for f in fields(Config):
        value = getattr(cfg, f.name)
        # the values of a checkpoint may have any type
        if not isinstance(value, (int, float) if f.type is float else f.type):
            reject_option(f.name, value, f"Give a value of type {f.type.__name__}")
        low = f.metadata["low"]
        high = f.metadata["high"]
        numbers = value if isinstance(value, tuple) else (value,)
        if not isinstance(value, str) and not all(low <= x <= high for x in numbers):
            reject_option(f.name, value, f"Give a value from {low:g} to {high:g}")
    if cfg.backbone not in BACKBONES:
        reject_option("backbone", cfg.backbone, f"Choose one of {', '.join(BACKBONES)}")
    if cfg.crop % 16 != 1:
        reject_option("crop", cfg.crop, "Give a number of the form 16n+1")
    if cfg.scale[0] > cfg.scale[1]:
        reject_option("scale", cfg.scale, "Give the smaller number first")
    if cfg.lo > cfg.hi:
        reject_option("lo", cfg.lo, f"It must not be above --hi {cfg.hi}")
    if cfg.weights == "auto" and BACKBONES[cfg.backbone].imagenet is None:
        cfg.weights = "none"
    if cfg.weights == "none" and cfg.warmup < 1:
        remedy = "Without ImageNet weights the warm-up trains the CAM head: give --warmup 15"
        reject_option("warmup", cfg.warmup, f"{remedy} and, for example, --lr 0.1")
    cfg.device = choose_device(cfg.device)
    return cfg


def choose_device(device):
    """Return the name of a device of this machine. Raises InputError.

    With several processes on CUDA, each needs a GPU of its own.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = ["cuda", *(f"cuda:{n}" for n in range(gpus)), "cpu"] if gpus else ["cpu"]
    device = devices[0] if device == "auto" else device
    if device not in devices:
        reject_option("device", device, f"This machine has {', '.join(devices)}")
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if dist.is_initialized() else 1
    if processes > 1 and device != "cpu" and (device != "cuda" or processes > gpus):
        problem = f"cannot serve {processes} processes with {gpus} GPUs"
        remedy = "Use --device cuda with at most one process per GPU, or --device cpu"
        raise InputError(f"--device {device}", problem, remedy, "processes")
    return device


def reject_option(name, value, remedy):
    """Raise InputError for the value of an option."""
    raise InputError(typed_option(name, value), "cannot be used", remedy, "option")


def typed_option(name, value):
    """Return an option with its value as it is typed on the command line."""
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {as_typed(value)}"


def as_typed(value):
    """Return a value as text; several numbers are separated by spaces."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def make_parser():
    """Return the parser of the command line, made from the fields of Config."""
    layout = partial(argparse.RawDescriptionHelpFormatter, width=100, max_help_position=28)
    usage = "train.py [options]"
    parser = argparse.ArgumentParser("train.py", usage, __doc__, formatter_class=layout)
    jobs = parser.add_mutually_exclusive_group()
    jobs.add_argument("--resume", action="store_true", help="continue the run in --out")
    jobs.add_argument("--eval", metavar="RUN", help="score a run; with --voc, on that devkit")
    jobs.add_argument("--segment", metavar="PHOTO", nargs="+", help="segment with the run in --out")
    help = "with --eval and --voc: the devkit's split to score on [val]"
    parser.add_argument("--split", help=help)
    help = "with --segment or --eval: average over scales 0.5 to 1.5"
    parser.add_argument("--multi-scale", action="store_true", help=help)
    for f in fields(Config):
        about = f.metadata
        source = f" ({about['source']})" if about["source"] else ""
        toy = f", toy set: {as_typed(TOY[f.name])}" if f.name in TOY else ""
        default = f" [{as_typed(f.default)}{toy}]" if f.default != "" else ""
        kind = {"type": f.type, "metavar": f.type.__name__.upper()}
        if f.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        if f.type is tuple:
            kind = {"type": float, "nargs": 2, "metavar": "FLOAT"}
        kind["help"] = f"{about['help']}{source}{default}"
        parser.add_argument(f"--{f.name.replace('_', '-')}", default=argparse.SUPPRESS, **kind)
    return parser


def parse(argv):
    """Return the job of the command line and the options of Config that were given.

    argparse refuses unknown and ill-typed options; impossible combinations are refused here.
    """
    parser = make_parser()
    job = parser.parse_args(argv)
    given = {f.name: getattr(job, f.name) for f in fields(Config) if hasattr(job, f.name)}
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    if "" in given.values():
        parser.error("an option has an empty value")
    if "voc" in given and "photos" in given:
        parser.error("--voc and --photos cannot be combined: choose one")
    if job.multi_scale and not (job.segment or job.eval):
        parser.error("--multi-scale can only be used with --segment or --eval")
    if job.split is not None and not (job.eval and "voc" in given):
        parser.error("--split can only be used with --eval RUN --voc PATH")
    allowed = {"device", "object_bias"} | ({"out"} if job.segment else {"voc", "size"})
    useless = set(given) - allowed
    if (job.segment or job.eval) and useless:
        used = "--segment" if job.segment else "--eval"
        parser.error(f"--{useless.pop().replace('_', '-')} has no effect with {used}")
    return job, given


def run_job(argv):
    """Do what the command line asks for: train, resume, score or segment. Raises InputError."""
    start = time.monotonic()
    job, given = parse(argv)
    for name in (given.get("out"), job.eval):
        if name and Path(name).is_file():
            raise InputError(name, "is a file", "Name the folder of the run", "missing")
    init_distributed()
    if job.eval or job.segment:
        return use_run(job, given)
    kind = next((name for name in ("photos", "voc") if name in given), "toy")
    folder = Path(given.get("out") or f"runs/{kind}")
    if job.resume and not folder.is_dir():
        raise InputError(folder, "does not exist", "Name the run with --out", "missing")
    # rank 0 writes the run; then the other processes read it
    rank = rank_and_world_size()[0]
    if rank == 0 and not job.resume:
        options = (TOY if kind == "toy" else {}) | given | {"out": str(folder)}
        run = new_run(check(Config(**options)), argv)
    elif rank == 0:
        run = load_run(folder, given)
    all_gather(None)
    if rank:
        run = load_run(folder, given, lock=False)
    run_all(run)
    names = ("masks", "overlays", "areas.csv", "classes.txt", "panels", "results.json", "model.pt")
    written = ", ".join(name for name in names if (folder / name).exists())
    minutes = (time.monotonic() - start) / 60
    print_line(f"{minutes:.1f} minutes; {folder} holds {written}")


def use_run(job, given):
    """Score a trained network, or segment photos with it. Raises InputError."""
    if job.segment and rank_and_world_size()[1] > 1:
        problem = "runs in one process only"
        raise InputError("--segment", problem, "Start it without torchrun", "processes")
    runs = [job.eval or given.pop("out", None)]
    if runs == [None]:  # take the only run that has a model
        runs = [path.parent for path in sorted(Path("runs").glob("*/model.pt"))]
    if len(runs) != 1:
        problem = f"is needed: runs/ holds {' '.join(map(str, runs)) or 'no run with a model.pt'}"
        remedy = "Name the run whose network is to be used"
        raise InputError("--out RUN", problem, remedy, "missing")
    folder = Path(runs[0])
    if job.segment or "voc" in given:
        net = SGSeg.load(folder, check(Config(**given)).device)
    else:
        run = load_run(folder, {k: v for k, v in given.items() if k in MAY_CHANGE}, lock=False)
        net = run.net
    net.scales = SCALES if job.multi_scale else SCALES[:1]
    net.size = given.get("size", net.size)
    net.object_bias = given.get("object_bias", net.object_bias)
    if job.segment:
        segment_photos(net, folder / "segmented", job.segment)
    elif "voc" in given:
        evaluate_split(net, folder, given["voc"], job.split or "val")
    else:
        evaluate(run)


def main(argv=None):
    """Run the command line; return 0 on success, 2 after bad input, 130 after Ctrl-C."""

    def command(arguments):
        try:
            return run_job(arguments)
        except (MemoryError, RuntimeError) as e:  # explain those that a user can fix
            if dist.is_initialized() and re.search("gloo|NCCL|Connection (closed|reset)", str(e)):
                remedy = "Read its message, then resume"
                raise InputError("another process", "has ended", remedy, "rank")
            if isinstance(e, MemoryError) or re.search("(allocate|out of) memory", str(e)):
                remedy = "Lower --batch, --crop or --size, or segment smaller photos"
                raise InputError("the run", "does not fit into memory", remedy, "memory")
            raise

    if torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for `set_deterministic`
    status = data.run_command("sgseg", command, sys.argv[1:] if argv is None else argv)
    if status == 130:
        hint = "Continue a training run with --out RUN --resume; at most one epoch is repeated."
        print_line(hint, stream=sys.stderr)
    return status


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as for Ctrl-C
    sys.exit(main())
