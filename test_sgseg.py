"""Tests on a toy devkit made in a temporary folder: every function against an oracle, the trainer end to end, and rubbish in.

pytest test_sgseg.py                        everything, under two minutes on two cores
pytest -s -k ten_thousand test_sgseg.py     with the counts of ten thousand mutated files
"""
import ast
import doctest
import errno
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

import data
import refine
import train
from data import VOC, Crops, InputError, confusion, confusions, make_toy, read_image, read_list, read_mask, read_tags, summary
from sgseg import BACKBONES, SGSeg, Lite0, load_imagenet

HERE = Path(__file__).parent
torch.set_num_threads(2)

# ---- refine.py against oracles -----------------------------------------------------------------------------------------
def test_docstring_examples():
    result = doctest.testmod(refine, extraglobs={"torch": torch})
    assert result.attempted == 6 and result.failed == 0

def test_localization_maps_by_hand():
    S = torch.tensor([[[[2.0, 4.0], [-1.0, 1.0]], [[9.0, 9.0], [9.0, 9.0]], [[-1.0, -2.0], [-3.0, -4.0]]]])
    M = refine.localization_maps(S, torch.tensor([[1.0, 0.0, 1.0]]))
    assert torch.equal(M[0, 0], torch.tensor([[0.5, 1.0], [0.0, 0.25]]))
    assert not M[0, 1].any() and not M[0, 2].any()                 # absent class; nothing positive
    with pytest.raises(ValueError):
        refine.localization_maps(S, torch.ones(1, 2))

def dense(features, **kw):
    """A (N,N) written out from the definition: no index tricks."""
    A, index = refine.affinity(features, **kw)
    full = torch.zeros(A.shape[1], A.shape[1], dtype=torch.float64)
    for i in range(A.shape[1]):
        for n in range(A.shape[2]):
            full[i, index[i, n]] += A[0, i, n].double()
    return full

def test_affinity_from_its_definition():
    torch.manual_seed(0)
    f = torch.randn(1, 5, 4, 3)
    A = dense(f, dilations=(1, 2), temperature=0.5)
    g = (f - f.mean((2, 3), keepdim=True))[0]
    for i in range(12):
        for j in range(12):
            dy, dx = j // 3 - i // 3, j % 3 - i % 3
            linked = any((dy, dx) == (d * a, d * b) for d in (1, 2) for a in (-1, 0, 1) for b in (-1, 0, 1) if a or b)
            u, v = g[:, i // 3, i % 3], g[:, j // 3, j % 3]
            want = np.exp((float(u @ v / (u.norm() * v.norm())) - 1) / 0.5) if linked else 0
            assert A[i, j] == pytest.approx(want, abs=1e-6)

def test_walk_settles_at_the_dense_solution_and_every_step_lowers_the_energy():
    torch.manual_seed(0)
    f, M0 = torch.randn(1, 6, 5, 7), torch.rand(1, 2, 5, 7)
    A = dense(f, temperature=0.5)
    D, lam = A.sum(1).diag(), 3.0
    solution = torch.linalg.solve(D + lam * (D - A), D @ M0[0].flatten(1).T.double()).T.view(1, 2, 5, 7)
    walked = refine.affinity_guided(M0, f, 200, lam, temperature=0.5)
    assert torch.allclose(walked.double(), solution, atol=1e-5)
    energy = [float(refine.affinity_energy(refine.affinity_guided(M0, f, n, lam, temperature=0.5), f, M0, lam, temperature=0.5))
              for n in range(6)]
    assert all(b < a for a, b in zip(energy, energy[1:]))
    pairs, M = (A > 0).sum(), M0[0].flatten(1).double()
    by_hand = sum(lam * A[i, j] * (M[:, i] - M[:, j]) ** 2 / 2 for i in range(35) for j in range(35)) / pairs
    assert float(refine.affinity_energy(M0, f, None, lam, temperature=0.5)) == pytest.approx(float(by_hand.mean()), rel=1e-4)
    start = torch.rand(1, 2, 5, 7)
    by_hand += (A.sum(1) * (M - start[0].flatten(1)) ** 2).sum(1) / pairs   # sum_i d_i (M_i - M0_i)^2
    assert float(refine.affinity_energy(M0, f, start, lam, temperature=0.5)) == pytest.approx(float(by_hand.mean()), rel=1e-4)

def test_walk_worked_example_and_limits():
    M0 = torch.tensor([[[[1.0, 0.0]]]])
    alike = torch.zeros(1, 3, 1, 2)                                # two alike pixels, as in the docstring
    for steps, want in ((1, (0.5, 0.5)), (2, (0.75, 0.25)), (99, (2 / 3, 1 / 3))):
        assert refine.affinity_guided(M0, alike, steps, 1.0).flatten().tolist() == pytest.approx(want, abs=1e-5)
    M, f = torch.rand(2, 3, 6, 5), torch.randn(2, 4, 6, 5)
    assert torch.equal(refine.affinity_guided(M, f, 5, 0.0), M)    # lambda 0: the start
    assert refine.affinity_guided(torch.ones(1, 1, 1, 1), torch.ones(1, 3, 1, 1)).isfinite().all()
    out = refine.affinity_guided(M, f)
    assert out.min() >= 0 and out.max() <= 1
    with pytest.raises(ValueError):
        refine.affinity_guided(M, f[..., :4])

def naive_guided_filter(p, I, r, eps):
    H, W = p.shape
    a, b = np.zeros((H, W, 3)), np.zeros((H, W))
    window = lambda y, x: (slice(max(0, y - r), y + r + 1), slice(max(0, x - r), x + r + 1))
    for y in range(H):
        for x in range(W):
            colours, values = I[window(y, x)].reshape(-1, 3), p[window(y, x)].ravel()
            mu = colours.mean(0)
            sigma = (colours - mu).T @ (colours - mu) / len(colours)
            a[y, x] = np.linalg.solve(sigma + eps * np.eye(3), (colours * values[:, None]).mean(0) - mu * values.mean())
            b[y, x] = values.mean() - a[y, x] @ mu
    return np.array([[a[window(y, x)].reshape(-1, 3).mean(0) @ I[y, x] + b[window(y, x)].mean() for x in range(W)] for y in range(H)])

@pytest.mark.parametrize("H, W", [(1, 9), (7, 5), (16, 3), (25, 11)])
@pytest.mark.parametrize("r", [0, 1, 4, 40])
def test_box_mean_equals_the_mean_of_every_window(H, W, r):
    x = torch.rand(2, 3, H, W, dtype=torch.float64)
    want = torch.stack([torch.stack([x[..., max(0, i - r):i + r + 1, max(0, j - r):j + r + 1].mean((2, 3)) for j in range(W)], -1)
                        for i in range(H)], -2)
    kept = x.clone()
    assert torch.allclose(refine.box_mean(x, r), want) and torch.equal(x, kept)

@pytest.mark.parametrize("radius, eps", [(1, 1e-2), (3, 1e-3), (20, 1e-1), (6, 1e-5)])
def test_guided_filter_equals_the_window_by_window_definition(radius, eps):
    rng = np.random.default_rng(0)
    p, I = rng.random((2, 11, 9)), rng.random((11, 9, 3))
    if eps < 1e-3:                                                 # a smooth grey ramp: covariances all but singular
        I = np.linspace(0.2, 0.8, 9)[None, :, None] + 1e-3 * I
    q = refine.guided_filter(torch.tensor(p)[None].float(), torch.tensor(I).permute(2, 0, 1)[None].float(), radius, eps)[0]
    for k in range(2):
        assert np.abs(q[k].numpy() - naive_guided_filter(p[k], I, radius, eps)).max() < 1e-4

def test_guided_filter_transfers_an_edge_and_is_exact_for_affine_maps():
    I = torch.zeros(1, 3, 20, 20)
    I[..., 10:] = 0.8
    blurred = torch.linspace(0, 1, 20).expand(1, 1, 20, 20)
    for maps, radius in ((blurred, 30), (blurred[..., 2::5, 2::5], 2)):   # on the image's grid, and five times coarser
        q = refine.self_guided(maps, I, radius, 1e-6)
        assert q.shape == (1, 1, 20, 20)
        assert q[..., 9].max() < 0.3 < 0.7 < q[..., 10].min()      # the ramp became the picture's step
    maps = torch.rand(1, 2, 20, 20)
    assert torch.allclose(refine.self_guided(maps, I, 3, 1e-2), refine.guided_filter(maps, I, 3, 1e-2).clamp(0, 1), atol=1e-6)
    I = torch.rand(1, 3, 16, 16)
    p = (I * torch.tensor([0.2, 0.5, 0.1]).view(1, 3, 1, 1)).sum(1, keepdim=True) + 0.1
    assert torch.allclose(refine.guided_filter(p, I, 4, 1e-8), p, atol=1e-3)
    assert not refine.self_guided(torch.zeros(1, 2, 3, 3), I, 4, 1e-3).any()
    both = refine.guided_filter(torch.cat([maps, maps ** 2])[..., :16, :16], torch.cat([I, I.flip(3)]), 4, 1e-3)   # a batch
    assert torch.allclose(both[1:], refine.guided_filter(maps[..., :16, :16] ** 2, I.flip(3), 4, 1e-3), atol=1e-5)
    for wrong, image in ((p[..., :5], I), (p, I[:, :1])):          # two sizes; a grey image
        with pytest.raises(ValueError):
            refine.guided_filter(wrong, image, 4, 1e-3)

def test_pseudo_labels_by_hand():
    maps = torch.tensor([[[[.9, .4, .1], [.5, .6, .0], [.2, .3, .8]],
                          [[.2, .8, .3], [.55, .1, .0], [.24, .1, .9]],
                          [[.99, .99, .99], [.99, .99, .99], [.99, .99, .99]]]])
    want = [[1, 2, 255], [2, 1, 0], [0, 255, 2]]
    out = refine.pseudo_labels(maps, torch.tensor([[1, 1, 0]]), 0.25, 0.5)
    assert out.dtype == torch.uint8 and out[0].tolist() == want    # class 3 is absent: never, however high
    assert refine.pseudo_labels(maps, torch.zeros(1, 3), 0.25, 0.5).eq(0).all()
    with pytest.raises(ValueError):
        refine.pseudo_labels(maps, torch.ones(1, 3), 0.6, 0.4)

def test_gradients_flow_where_they_should_and_stop_where_they_should():
    torch.manual_seed(0)
    M = torch.rand(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    f = torch.randn(1, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    I = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda m, g: refine.affinity_guided(m, g, 3, 2.0, temperature=1.0), (M, f))
    assert torch.autograd.gradcheck(lambda m, g: refine.affinity_energy(m, g, None, temperature=1.0), (M, f))
    up = torch.rand(1, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: refine.guided_filter(p, I, 2, 1e-2), (up,))
    net = SGSeg(4).train()
    x, y = torch.rand(2, 3, 65, 65), torch.eye(4)[:2]
    nothing = torch.full((2, 65, 65), 255)
    L_cls, L_seg = train.losses(net, x, y, nothing)
    assert L_seg == 0                                              # all ignored: no loss, and no nan
    L_cls.backward()
    assert net.cam.weight.grad.abs().sum() > 0 and all(p.grad is None for p in net.seg.parameters())
    labels = nothing.clone()
    labels[0, :32] = 1
    train.losses(net, x, y, labels)[1].backward()
    assert all(p.grad is not None for p in [*net.seg.parameters(), *net.backbone.parameters()])
    kept, seg = [], net.seg.forward

    def keep(mid, high):
        kept.append(seg(mid, high))
        kept[0].retain_grad()
        return kept[0]
    net.seg.forward = keep
    train.losses(net, x, y, labels)[1].backward()
    grad = kept[0].grad                                            # (2,5,9,9): nothing moves where the label says 255
    assert grad[0, :, :4].any() and not grad[0, :, 5:].any() and not grad[1].any()

# ---- sgseg.py ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", BACKBONES)
def test_backbone_levels(name):
    net = SGSeg(5, name).eval()
    with torch.no_grad():
        out = net(torch.rand(2, 3, 97, 65))
    for F_l, stride, c in zip(out.features, (4, 8, 16), net.backbone.channels):
        assert F_l.shape == (2, c, 96 // stride + 1, 64 // stride + 1)
    assert out.cam.shape == (2, 5, 7, 5) and out.scores.shape == (2, 5) and out.seg.shape == (2, 6, 13, 9)

def test_cam_pooling_then_classifying_equals_classifying_then_pooling():
    net = SGSeg(5).eval()
    out = net(torch.rand(2, 3, 65, 65))
    pooled = out.features[2].mean((2, 3))
    assert torch.allclose(out.scores, pooled @ net.cam.weight.flatten(1).T, atol=1e-5)

def test_vgg16_is_named_as_torchvision_names_it():
    convs = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]       # of torchvision.models.vgg16().features
    net = BACKBONES["vgg16"]()
    assert set(net.state_dict()) == {f"features.{n}.{part}" for n in convs for part in ("weight", "bias")}
    state = net.state_dict() | {"classifier.0.weight": torch.zeros(1)}
    load_imagenet(net, state)
    with pytest.raises(RuntimeError):
        load_imagenet(net, {k: v for k, v in state.items() if k != "features.0.weight"})

def test_lite0_weights_load_strictly_and_dilation_changes_no_parameter():
    state = train.imagenet_weights("lite0", "auto")
    class Plain(Lite0):                                            # the classifier that the weights were trained as
        stages = (*Lite0.stages[:5], (192, 4, 5, 2, 1, 6), (320, 1, 3, 1, 1, 6))
    plain, dilated = Plain(), Lite0()
    load_imagenet(plain, state), load_imagenet(dilated, state)
    x = torch.rand(1, 3, 65, 65)
    with torch.no_grad():
        a, b = plain.eval()(x), dilated.eval()(x)
    assert torch.equal(a[1], b[1]) and a[2].shape[-1] == 3 and b[2].shape[-1] == 5
    with pytest.raises(RuntimeError):
        load_imagenet(plain, {k: v for k, v in state.items() if k != "_conv_stem.weight"})

# ---- data.py -----------------------------------------------------------------------------------------------------------
REAL_XML = """<annotation><folder>VOC2012</folder><filename>x.jpg</filename><size><width>97</width></size>
<object><name>person</name><difficult>0</difficult><part><name>head</name></part><part><name>hand</name></part></object>
<object><name>person</name></object><object><name>sofa</name><difficult>1</difficult></object></annotation>"""

@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    return make_toy(tmp_path_factory.mktemp("toy"), train=24, val=8)

@pytest.fixture
def kit(toy, tmp_path):
    """A private copy to break."""
    return Path(shutil.copytree(toy, tmp_path / "kit"))

def test_real_style_xml(tmp_path):
    path = tmp_path / "x.xml"
    path.write_text(REAL_XML)
    assert read_tags(path, data.VOC_CLASSES) == {"person", "sofa"}  # parts are not objects
    assert read_tags(path, data.VOC_CLASSES, difficult=False) == {"person"}

def test_lists_as_they_come(tmp_path):
    path = tmp_path / "l.txt"
    path.write_bytes(b"\xef\xbb\xbfa  1\r\n\r\nb -1\r\nc  0\r\na 1\r\n")
    assert read_list(path) == ["a", "c"]

def test_devkit_is_found_from_any_level_and_train_aug_wins(toy, tmp_path):
    (tmp_path / "VOCdevkit").mkdir()
    (tmp_path / "VOCdevkit" / "VOC2012").symlink_to(toy)
    for path in (tmp_path, tmp_path / "VOCdevkit", toy):
        assert len(VOC(path, "train").ids) == 24
    assert VOC(toy, "val").classes == list(data.TOY_CLASSES)

@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "I;16", "1", "LA"])
def test_image_modes_are_read_rightly(mode, tmp_path):
    value = 255 if mode == "1" else 200                            # two levels: white
    grey = Image.fromarray(np.full((20, 30), value, np.uint8))
    image = (Image.fromarray(np.full((20, 30), 200 * 256, np.uint16)) if mode == "I;16" else
             grey.quantize() if mode == "P" else grey.convert("RGB").convert(mode))
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    image.save(path)
    out = np.asarray(read_image(path)).astype(int)
    assert out.shape == (20, 30, 3) and abs(out - value).max() <= 8

def test_exif_rotation_and_long_images(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "r.jpg", exif=exif)
    assert read_image(tmp_path / "r.jpg").size == data.upright_size(tmp_path / "r.jpg") == (20, 40)
    Image.new("RGB", (10000, 40)).save(tmp_path / "long.jpg")
    assert data.aligned(read_image(tmp_path / "long.jpg"), 500).size == (497, 17)

def test_palette_is_vocs():
    colours = np.array(data.palette_image(np.zeros((1, 1))).getpalette()).reshape(256, 3)
    assert colours[[0, 1, 8, 15, 20, 255]].tolist() == [[0, 0, 0], [128, 0, 0], [64, 0, 0], [192, 128, 128], [0, 64, 128], [224, 224, 192]]

def test_toy_masks_tags_and_borders_agree(toy):
    for split in ("train", "val"):
        voc = VOC(toy, split)
        labels = voc.scan()
        for i in range(len(voc.ids)):
            mask = voc.mask(i, read_image(voc.image_paths[i]).size)
            assert set(np.unique(mask)) - {0, 255} == set((labels[i].nonzero()[:, 0] + 1).tolist())
            assert (mask == 255).any()

def test_crops_are_a_function_of_seed_epoch_and_index_and_move_labels_with_pixels(toy):
    voc = VOC(toy, "train")
    voc.scan()
    get = lambda seed, epoch, i: Crops(voc, 65, 97, (0.5, 1.5), seed, epoch, voc.mask_paths)[i]
    a, b = get(0, 3, 5), get(0, 3, 5)
    assert all(torch.equal(torch.as_tensor(u), torch.as_tensor(v)) for u, v in zip(a, b))
    assert not torch.equal(a[0], get(0, 4, 5)[0]) and not torch.equal(a[0], get(1, 3, 5)[0])
    assert a[0].shape == (3, 65, 65) and a[2].shape == (65, 65) and 0 <= a[0].min() and a[0].max() <= 1
    marked = make_toy(toy.parent / "marked", train=4, val=1)       # an image that equals its own label map
    voc = VOC(marked, "train")
    voc.scan()
    for i in range(4):
        mask = np.zeros((97, 97), np.uint8)
        mask[20:60, 30:80] = 1
        Image.fromarray(mask).save(marked / "label.png")
        Image.fromarray(np.repeat(mask[:, :, None] * 255, 3, 2)).save(voc.image_paths[i], "PNG")
        x, _, label, _ = Crops(voc, 65, 97, (0.6, 1.4), 0, 0, [marked / "label.png"] * 4)[i]
        inside = F.max_pool2d((label == 255).float()[None], 3, 1, 1)[0] == 0
        sure = inside & ((x[0] < 0.2) | (x[0] > 0.8))
        assert sure.any() and ((x[0] > 0.5) == (label == 1))[sure].float().mean() > 0.99

def test_confusion_and_iou_by_hand():
    target = np.array([[0, 0, 1], [1, 2, 255]])
    C = confusion(target, np.array([[0, 1, 1], [1, 0, 2]]), 3)
    assert C[:3, :3].tolist() == [[1, 1, 0], [0, 2, 0], [1, 0, 0]] and C.sum() == 5   # the 255 pixel counts nowhere
    said = summary(C, ["a", "b", "c"])                             # c is in no mask
    assert said == {"miou": 0.3333, "core": None, "iou": {"background": 0.3333, "a": 0.6667, "b": 0.0}}

def test_scores_at_a_threshold_equal_the_confusion_of_thresholded_labels():
    rng = np.random.default_rng(0)
    target = rng.choice([0, 2, 4, 255], (20, 20)).astype(np.uint8)
    maps, present = torch.tensor(rng.random((2, 20, 20))).float(), np.array([1, 3])
    grid = (0.05, 0.5, 0.85)
    for t, C in zip(grid, confusions(target, maps, present, 4, grid)):
        best, k = maps.max(0)
        prediction = np.where(best.numpy() >= t, present[k.numpy()] + 1, 0)
        assert (C == confusion(target, prediction, 4)).all() and C.any()

# ---- train.py: the whole method ----------------------------------------------------------------------------------------
def options(root, out, *more):
    """A toy-sized run on a devkit: one refine, a few steps."""
    return ["--voc", str(root), "--out", str(out), "--backbone", "tiny", "--weights", "none", "--crop", "65", "--size", "97",
            "--warmup", "1", "--rounds", "2", "--epochs", "1", "--batch", "8", "--radius", "2", "--workers", "0", "--device", "cpu",
            *more]

def sgseg(*argv, **kw):
    """train.py as a user starts it: (exit status, stderr)."""
    done = subprocess.run([sys.executable, HERE / "train.py", *map(str, argv)], capture_output=True, text=True, timeout=120, **kw)
    return done.returncode, done.stderr

def product(run):
    """All that must not depend on being stopped: weights, momentum, labels, metrics."""
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    return (state["model"], state["optimizer"]["state"], (run / "metrics.jsonl").read_text(), (run / "results.json").read_text(),
            {str(p.relative_to(run)): p.read_bytes() for p in sorted((run / "pseudo").rglob("*.png"))})

def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, tuple):
        return all(same(u, v) for u, v in zip(a, b))
    return a == b

@pytest.fixture(scope="session")
def finished(toy, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert train.main(options(toy, out)) == 0
    return out

@pytest.fixture(scope="session")
def learnt(tmp_path_factory):
    """The built-in toy run itself: `python train.py`."""
    out = tmp_path_factory.mktemp("runs") / "toy"
    assert train.main(["--out", str(out)]) == 0
    return out

def test_two_rounds_on_the_toy_set_learn(learnt):
    results = json.loads((learnt / "results.json").read_text())
    maps = results["train"]
    assert maps["affinity"]["peak"]["miou"] > maps["cam"]["peak"]["miou"]
    assert maps["self_guided"]["peak"]["miou"] > maps["cam"]["peak"]["miou"] + 0.1
    assert results["val"]["seg"]["miou"] >= 0.80
    assert results["labels"]["round3"]["miou"] > results["labels"]["round1"]["miou"] > maps["self_guided"]["miou"]
    voc = VOC(learnt / "toy", "val")                               # the bound is one that untrained weights fail
    net, cfg = SGSeg(4).eval(), train.configure({}, str(learnt))
    images = [read_image(path) for path in voc.image_paths]
    C = sum(confusion(voc.mask(i, image.size), train.segment(net, image, cfg), 4) for i, image in enumerate(images))
    assert summary(C, voc.classes)["miou"] < 0.3

def test_run_folder_explains_itself(learnt):
    config = json.loads((learnt / "config.json").read_text())
    assert config["config"]["backbone"] == "tiny" and config["versions"]["torch"] == torch.__version__
    metrics = [json.loads(line) for line in (learnt / "metrics.jsonl").read_text().splitlines()]
    assert [m["round"] for m in metrics if "val_miou" in m] == [1, 2]
    for r in (0, 1, 2):
        assert Image.open(learnt / "panels" / f"round{r}.png").width > 900
    ids = read_list(learnt / "toy" / "ImageSets" / "Segmentation" / "train.txt")
    label = Image.open(learnt / "pseudo" / "round2" / f"{ids[0]}.png")
    assert label.mode == "P" and label.size == (97, 97) and label.getpalette()[3:6] == [128, 0, 0]

def test_absent_tags_never_appear_in_pseudo_labels(learnt):
    voc = VOC(learnt / "toy", "train")
    labels = voc.scan()
    for i in range(len(voc.ids)):
        for r in (1, 2, 3):                                        # the third by the last refine
            found = set(np.unique(np.array(Image.open(learnt / "pseudo" / f"round{r}" / f"{voc.ids[i]}.png")))) - {0, 255}
            assert found <= set((labels[i].nonzero()[:, 0] + 1).tolist())

def test_segment_writes_a_palette_mask_of_the_photos_own_size(learnt, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)).save(tmp_path / "p.jpg")
    assert train.main(["--out", str(learnt), "--segment", str(tmp_path / "p.jpg")]) == 0
    assert Image.open(learnt / "segmented" / "p.png").size == (70, 50)
    assert (learnt / "segmented" / "p_overlay.png").exists()

def test_the_head_start_may_change_when_segmenting_but_not_when_training_goes_on(learnt, toy, capsys):
    objects = []
    for favour in ("0", "9"):
        assert train.main(["--out", str(learnt), "--segment", str(toy / JPG), "--favour", favour]) == 0
        objects.append((np.asarray(Image.open(learnt / "segmented" / f"{Path(JPG).stem}.png")) > 0).sum())
    assert objects[0] < objects[1]
    assert train.main(["--out", str(learnt), "--resume", "--favour", "9"]) == 2 and "--favour" in capsys.readouterr().err

def test_thresholds_fall_from_round_two_to_the_last_refine(monkeypatch):
    """One class, map values spread evenly over 0 to 1: the share of background tells lo, that of the class 1 - hi."""
    S = torch.linspace(0, 1, 64).view(1, 1, 8, 8)
    Z = torch.cat([torch.zeros_like(S), 2 * (S / (1 - S).clamp_min(1e-9)).clamp_min(1e-9).log()], 1)   # softmax(Z / 2) = 1 - S, S
    monkeypatch.setattr(train, "network_outputs", lambda *_: (S, S.mean((2, 3)), Z, torch.rand(1, 3, 8, 8)))
    def threshold(r, rounds):
        cfg = train.Config(rounds=rounds, lo=0.2, hi=0.3, seg_lo=0.8, seg_hi=0.9, affinity=False, self_guided=False)
        label = train.stages(None, Image.new("RGB", (8, 8)), torch.ones(1), cfg, r)[1]
        return round(float((label == 0).mean()), 1), round(1 - float((label == 1).mean()), 1)
    assert [threshold(r, 3) for r in (1, 2, 3, 4)] == [(0.2, 0.3), (0.8, 0.9), (0.5, 0.6), (0.2, 0.3)]
    assert [threshold(r, 1) for r in (1, 2)] == [(0.2, 0.3)] * 2

def test_later_rounds_refine_the_softened_head_stretched_within_a_bound(monkeypatch):
    """Z = (0, z, 9) everywhere, class 2 not tagged: cam = 1 / (1 + exp(-z / 2)), then cam / max(cam, 0.3); a constant map walks nowhere."""
    seen, walk = [], refine.affinity_guided
    monkeypatch.setattr(refine, "affinity_guided", lambda M, f, steps, strength, **kw: seen.append(strength) or walk(M, f, steps, strength, **kw))
    for z, cam, stretched in ((-1.0, 0.3775, 1.0), (-4.0, 0.1192, 0.3973)):
        Z = torch.tensor([0.0, z, 9.0]).view(1, 3, 1, 1).repeat(1, 1, 4, 4)
        monkeypatch.setattr(train, "network_outputs", lambda *_: (torch.ones(1, 2, 4, 4), torch.ones(1, 2), Z, torch.rand(1, 3, 4, 4)))
        run = lambda round: train.stages(None, Image.new("RGB", (32, 32)), torch.tensor([1.0, 0.0]), train.Config(), round)[0]
        maps = run(2)
        assert torch.allclose(maps["cam"], torch.tensor(cam), atol=1e-4)
        assert torch.allclose(maps["affinity"], torch.tensor(stretched), atol=1e-3)
        assert maps["cam"].shape == (1, 1, 4, 4) and maps["self_guided"].shape == (1, 1, 32, 32)
        run(1)
    assert seen == [10.0, 100.0] * 2                               # --seg-strength, --strength

def test_outputs_are_averaged_with_the_mirror_image(toy):
    image, cfg = read_image(toy / JPG), train.check(train.Config(device="cpu", size=97))
    net = SGSeg(4).eval()
    with torch.no_grad():
        a, b = (train.network_outputs(net, picture, cfg) for picture in (image, ImageOps.mirror(image)))
    for u, v in zip(a[:3], b[:3]):
        assert torch.allclose(u, v.flip(3) if u.ndim == 4 else v, atol=1e-5)
    assert not torch.allclose(a[3], b[3].flip(3), atol=1e-5)       # F_mid is the image's own

@pytest.mark.parametrize("name", BACKBONES)
def test_losses_under_autocast_are_float32_and_finite(name):
    """As on CUDA: the update runs in bfloat16."""
    net = SGSeg(4, name).train()
    with torch.autocast("cpu", torch.bfloat16):
        L_cls, L_seg = train.losses(net, torch.rand(2, 3, 65, 65), torch.eye(4)[:2], torch.randint(0, 5, (2, 65, 65)))
    (L_cls + L_seg).backward()
    assert L_cls.dtype == L_seg.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in net.parameters())

def test_imagenet_weights_are_fine_tuned_as_the_help_says(toy, tmp_path, monkeypatch):
    """Frozen blocks and BatchNorm statistics stay, the rest moves, heads learn ten times as fast, every phase decays anew."""
    rates, step = [], torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda opt: rates.append([g["lr"] for g in opt.param_groups]) or step(opt))
    assert train.main(["--voc", str(toy), "--out", str(tmp_path / "run"), "--crop", "33", "--size", "65", "--warmup", "1",
                       "--rounds", "1", "--epochs", "2", "--batch", "8", "--device", "cpu", "--lr", "0.01"]) == 0
    start, net = Lite0(), SGSeg(4, "lite0")
    load_imagenet(start, train.imagenet_weights("lite0", "auto"))
    net.load_state_dict(train.load(tmp_path / "run" / "checkpoint.pt")["model"])
    for module, same_module in zip(start.frozen, net.backbone.frozen):
        assert same(dict(module.state_dict()), dict(same_module.state_dict()))
    moved = [name for name, v in net.backbone.state_dict().items() if not torch.equal(v, start.state_dict()[name])]
    assert "conv_head.weight" in moved and not any("running" in name for name in moved)
    decay = [(1 - n / 3) ** 0.9 for n in range(3)] + [(1 - n / 6) ** 0.9 for n in range(6)]   # 24 images: 3 steps an epoch
    assert np.allclose(rates, [(0.01 * d, 0.1 * d) for d in decay])

def test_segmenting_without_tags_by_hand(monkeypatch):
    """One pixel; p = softmax of (Z_0, Z_1 + c_1, Z_2 + c_2), c_k = log sigmoid(s_k) - max_j log sigmoid(s_j) + favour."""
    Z, s = [1.0, 0.8, 0.9], [2.0, -1.0]                            # the head says background; else class 2; the classifier class 1
    monkeypatch.setattr(train, "network_outputs", lambda *_: (
        None, torch.tensor([s]), torch.tensor(Z).view(1, 3, 1, 1).repeat(1, 1, 2, 2), None))
    picture = Image.new("RGB", (16, 16))
    for favour, want in ((0.0, 0), (0.19, 0), (0.21, 1)):          # 0.8 + 0 + favour against 1; class 2 lies 1.2 lower
        assert (train.segment(None, picture, train.Config(favour=favour, self_guided=False)) == want).all()
        assert (train.segment(None, picture, train.Config(favour=favour)) == want).all()
    Z = torch.tensor([0.0, -2.0]).view(1, 2, 1, 1).repeat(1, 1, 4, 4)   # class 1 in the right half; the picture's edge is at 18
    Z[:, 1, :, 2:] = 2.0
    monkeypatch.setattr(train, "network_outputs", lambda *_: (None, torch.tensor([[2.0]]), Z.clone(), None))
    picture = Image.fromarray(np.where(np.arange(32) < 18, 0, 255).astype(np.uint8)[None].repeat(32, 0)).convert("RGB")
    for guided, background in ((False, 16), (True, 18)):
        label = train.segment(None, picture, train.Config(favour=0.0, self_guided=guided))
        assert ((label == 0).sum(1) == background).all()

def test_training_never_opens_a_mask(kit, tmp_path, capsys):
    shutil.rmtree(kit / "SegmentationClass")
    assert train.main(options(kit, tmp_path / "run", "--rounds", "1")) == 0
    said = capsys.readouterr().out
    assert "lacks val masks" in said and "lacks training masks" in said
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == {
        "favour": 0.75, "train": None, "labels": {}, "val": {"seg": None}}

def test_masks_of_training_images_do_not_change_the_run(kit, finished, tmp_path):
    voc = VOC(kit, "train")
    for i in range(len(voc.ids)):                                      # same image sizes, nonsense inside
        data.palette_image(np.full((97, 97), 1, np.uint8)).save(voc.mask_paths[i])
    assert train.main(options(kit, tmp_path / "run")) == 0
    a, b = product(finished), product(tmp_path / "run")
    assert same(a[:3], b[:3]) and same(a[4], b[4])

def test_ablation_switches_and_upper_bound(finished, toy, tmp_path, capsys):
    for name, rounds, switch in (("a", "0", "--no-affinity"), ("s", "0", "--no-self-guided"), ("u", "1", "--supervised")):
        assert train.main(options(toy, tmp_path / name, "--rounds", rounds, switch)) == 0
    score = lambda name, stage: json.loads((tmp_path / name / "results.json").read_text())["train"][stage]["iou"]
    assert score("a", "cam") == score(finished, "cam")             # two rounds later, the warm-up network's maps are still what is scored
    assert score("a", "cam") == score("a", "affinity") != score("a", "self_guided")
    assert score("s", "affinity") == score("s", "self_guided")
    assert json.loads((tmp_path / "a" / "results.json").read_text())["val"] == {"seg": None}   # --rounds 0: no head was trained
    assert train.main(["--out", str(tmp_path / "a"), "--segment", str(toy / JPG)]) == 2 and "not trained" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "a" / "pseudo").iterdir()] == ["round1"] and not (tmp_path / "u" / "pseudo").exists()

# ---- stop it, break it -------------------------------------------------------------------------------------------------
def test_killed_at_random_moments_and_resumed_equals_never_stopped(toy, finished, tmp_path):
    seed = int(time.time())
    print("seed", seed)
    rng, out, kills = random.Random(seed), tmp_path / "run", 0
    argv = [sys.executable, HERE / "train.py", *options(toy, out, "--save-minutes", "0")]
    while True:
        process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        before = (out / "checkpoint.pt").stat().st_mtime_ns if (out / "checkpoint.pt").exists() else 0
        try:
            while kills < 3 and process.poll() is None and (not (out / "checkpoint.pt").exists() or
                                                            (out / "checkpoint.pt").stat().st_mtime_ns == before):
                time.sleep(0.02)                                   # until it trains
            process.wait(timeout=rng.uniform(0, 0.6) if kills < 3 else 100)
            assert process.returncode == 0, process.stderr.read()
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        argv = [sys.executable, HERE / "train.py", "--out", str(out), "--resume", "--device", "cpu"]
    a, b = product(finished), product(out)
    assert same(a, b) and kills >= 2

@pytest.mark.parametrize("phase", ["refine", "update"])
def test_stopped_in_each_phase_resumes_to_the_bit(phase, toy, finished, tmp_path, monkeypatch):
    out, calls = tmp_path / "run", []
    due = train.Run.save_if_due

    def stop_at_the_fifth(run):
        calls.append(run.at["phase"])
        if calls.count(phase) == 5:
            run.signal = signal.SIGTERM
        due(run)
    monkeypatch.setattr(train.Run, "save_if_due", stop_at_the_fifth)
    with pytest.raises(SystemExit, match="143"):
        train.main(options(toy, out))
    monkeypatch.undo()
    assert train.main(["--out", str(out), "--resume"]) == 0
    assert same(product(finished), product(out))

@pytest.mark.parametrize("signum, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_and_say_how_to_go_on(signum, status, toy, tmp_path):
    process = subprocess.Popen([sys.executable, HERE / "train.py", *options(toy, tmp_path / "r", "--warmup", "500", "--workers", "1")],
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "r" / "checkpoint.pt").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    process.send_signal(signum)
    _, said = process.communicate(timeout=60)
    assert process.returncode == status and f"--out {tmp_path / 'r'} --resume" in said and "Traceback" not in said

def test_workers_do_not_change_the_result(toy, finished, tmp_path):
    assert train.main(options(toy, tmp_path / "run", "--workers", "2")) == 0
    assert same(product(finished), product(tmp_path / "run"))

def test_a_run_folder_is_never_destroyed(finished, toy, tmp_path, capsys):
    before = product(finished)
    assert train.main(options(toy, finished)) == 2
    assert "holds a run" in capsys.readouterr().err
    assert train.main(["--out", str(finished), "--resume", "--lr", "0.5", "--workers", "1"]) == 2
    said = capsys.readouterr().err
    assert "--lr" in said and "workers" not in said
    assert train.main(["--out", ""]) == 2 and "empty" in capsys.readouterr().err
    assert same(before, product(finished))

def test_a_run_goes_on_with_the_images_it_began_with(finished, kit, tmp_path, capsys):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    (kit / "ImageSets" / "Segmentation" / "train_aug.txt").write_text("toy_0003\n")   # wins over train.txt
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    torch.save({**state, "config": {**state["config"], "voc": str(kit)}}, run / "checkpoint.pt")
    assert train.main(["--out", str(run), "--resume"]) == 2
    assert "other training images" in capsys.readouterr().err.splitlines()[-1]

def test_full_disk_keeps_the_old_checkpoint(finished, toy, tmp_path, monkeypatch, capsys):
    out, real, count = tmp_path / "run", os.fsync, []

    def full(fd):
        count.append(fd)
        if len(count) > 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd)
    monkeypatch.setattr(os, "fsync", full)
    assert train.main(options(toy, out, "--save-minutes", "0")) == 2
    assert "No space left" in capsys.readouterr().err and not list(out.rglob("*.tmp"))
    assert train.load_run(out)[0]["at"]["epoch"] <= 1 and not (out / "results.json").exists()   # the old one, whole
    monkeypatch.undo()
    assert train.main(["--out", str(out), "--resume"]) == 0
    assert same(product(finished), product(out))

def test_a_loss_that_is_not_finite_names_step_images_and_last_good_state(toy, tmp_path, monkeypatch, capsys):
    real, n = train.losses, []

    def losses(*args):
        n.append(1)
        L_cls, L_seg = real(*args)
        return L_cls * (float("nan") if len(n) == 3 else 1), L_seg
    monkeypatch.setattr(train, "losses", losses)
    assert train.main(options(toy, tmp_path / "run", "--save-minutes", "0")) == 2
    said = capsys.readouterr().err
    assert "step 2" in said and "toy_00" in said and "checkpoint.pt" in said
    assert all(v.isfinite().all() for v in train.load_run(tmp_path / "run")[0]["model"].values())

# ---- feed it rubbish ---------------------------------------------------------------------------------------------------
JPG, XML, LIST = "JPEGImages/toy_0003.jpg", "Annotations/toy_0003.xml", "ImageSets/Segmentation/train.txt"
BOMB = '<!DOCTYPE a [<!ENTITY x "ha">' + "".join(f'<!ENTITY x{n} "{("&x" + str(n - 1 or "") + ";") * 10}">' for n in range(1, 9)) + "]><a>&x8;</a>"

def image_bytes(mode, size, kind="PNG"):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, kind)
    return buffer.getvalue()

BROKEN = {
    "no list": (LIST, None), "empty list": (LIST, b"\r\n \n"), "list of rubbish": (LIST, b"\xff\xfe\x00"),
    "id that climbs": (LIST, b"../../etc/passwd\n"), "id without image": (JPG, None), "id without XML": (XML, None),
    "malformed XML": (XML, b"<annotation><object>"), "unknown class": (XML, b"<annotation><object><name>dragon</name></object></annotation>"),
    "entity bomb": (XML, BOMB.encode()), "no tag": (XML, b"<annotation></annotation>"), "empty XML": (XML, b""),
    "zero bytes": (JPG, b""), "not an image": (JPG, b"hello" * 100), "1x1": (JPG, image_bytes("RGB", (1, 1), "JPEG")),
    "val mask of another size": ("SegmentationClass/toy_0025.png", image_bytes("P", (50, 50))),
    "val mask in RGB": ("SegmentationClass/toy_0025.png", image_bytes("RGB", (97, 97))),
    "val mask cut short": ("SegmentationClass/toy_0025.png", lambda old: old[:len(old) // 2]),
    "truncated": (JPG, lambda old: old[:len(old) // 2]), "bomb of pixels": (JPG, image_bytes("1", (30000, 30000))),
}

@pytest.mark.parametrize("case", BROKEN)
def test_bad_input_gets_one_line_before_training(case, kit, tmp_path, capsys):
    name, content = BROKEN[case]
    path = kit / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content(path.read_bytes()) if callable(content) else content)
    assert train.main(options(kit, tmp_path / "run")) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in said if not line.startswith("warning: no training")]) == 1
    assert said[-1].startswith("sgseg: ") and Path(name).name in said[-1] and "expected" in said[-1] and ";" in said[-1]
    assert not (tmp_path / "run" / "checkpoint.pt").exists()

MASKS = {"another size": image_bytes("P", (50, 50)), "RGB": image_bytes("RGB", (97, 97)), "truncated": image_bytes("P", (97, 97))[:60]}

@pytest.mark.parametrize("case", [*MASKS, "index out of range"])
def test_bad_masks_are_named(case, kit):
    voc = VOC(kit, "val")
    if case == "index out of range":
        data.palette_image(np.full((97, 97), 9)).save(voc.mask_paths[0])
    else:
        voc.mask_paths[0].write_bytes(MASKS[case])
    with pytest.raises(InputError, match="expected"):
        voc.mask(0, (97, 97))

@pytest.mark.parametrize("argv, word", [
    (["--lo", "0.6", "--hi", "0.4"], "--lo"), (["--seg-lo", "0.7"], "--seg-lo"), (["--radius", "-1"], "--radius"),
    (["--crop", "100"], "--crop"), (["--eps", "0"], "--eps"),
    (["--lr", "nan"], "--lr"), (["--batch", "0"], "--batch"), (["--rounds", "x"], "rounds"), (["--nonsense"], "nonsense"),
    (["--device", "cuda:77"], "--device"), (["--backbone", "resnet"], "--backbone"), (["--weights", "/nowhere.pth"], "/nowhere.pth"),
    (["--voc", "/nowhere"], "/nowhere"), (["--scale-min", "2"], "--scale-max"), (["--eval", "/nowhere"], "/nowhere"),
    (["--segment", "x.jpg", "--out", "/nowhere"], "/nowhere"), (["--eval", "a", "--segment", "x.jpg"], "one of"), (["--out", "/proc/run"], "/proc/run"),
])
def test_bad_options_get_one_line(argv, word, toy, tmp_path, capsys):
    base = [] if "--eval" in argv or "--segment" in argv else options(toy, tmp_path / "run")
    assert train.main([*base, *argv]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning")]
    assert len(said) == 1 and word in said[0] and "expected" in said[0]

def test_a_user_sees_one_line_and_no_traceback(tmp_path):
    (tmp_path / "VOC2012").mkdir()
    status, said = sgseg("--voc", tmp_path)
    assert status == 2 and said.count("\n") == 1 and "not a VOC devkit" in said

class Evil:
    def __reduce__(self):
        return (os.mkdir, ("/tmp/sgseg_was_here",))

def test_checkpoints_are_data_not_programs(finished, toy, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    good = torch.load(finished / "checkpoint.pt", weights_only=True)
    whole = (finished / "checkpoint.pt").read_bytes()
    cases = {"pickle": lambda p: torch.save({"model": Evil()}, p), "cut": lambda p: p.write_bytes(whole[:len(whole) // 2]),
             "empty": lambda p: p.write_bytes(b""), "tensor": lambda p: torch.save(torch.ones(3), p),
             "another's": lambda p: torch.save({"x": 1}, p),
             "backbone": lambda p: torch.save({**good, "config": {**good["config"], "backbone": "vgg16"}}, p),
             "classes": lambda p: torch.save({**good, "classes": ["cat", "dog"]}, p),
             "optimizer": lambda p: torch.save({**good, "optimizer": {}}, p),
             "position": lambda p: torch.save({**good, "at": {}}, p),
             "option": lambda p: torch.save({**good, "config": {**good["config"], "lr": "fast"}}, p),
             "older": lambda p: torch.save({**good, "config": {k: v for k, v in good["config"].items() if k != "favour"}}, p),
             "no ids": lambda p: torch.save({k: v for k, v in good.items() if k != "ids"}, p),
             "no classes": lambda p: torch.save({k: v for k, v in good.items() if k != "classes"}, p),
             "weights": lambda p: torch.save({**good, "model": {"cam.weight": torch.ones(1)}}, p)}
    for name, spoil in cases.items():
        spoil(run / "checkpoint.pt")
        assert train.main(["--out", str(run), "--resume"]) == 2, name
        said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning")]
        assert len(said) == 1 and "checkpoint.pt" in said[0] and "expected" in said[0], name
        assert train.main(["--out", str(run), "--segment", str(toy / JPG)]) == 2 or name == "optimizer", name
        capsys.readouterr()
    assert not Path("/tmp/sgseg_was_here").exists()

def test_scoring_wants_the_network_of_round_one(finished, tmp_path, capsys):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    for spoil in (lambda p: p.write_bytes(b""), lambda p: torch.save({}, p), lambda p: torch.save({"model": {}}, p), Path.unlink):
        spoil(run / "warmup.pt")
        assert train.main(["--eval", str(run)]) == 2
        said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning")]
        assert len(said) == 1 and "expected" in said[0]

def test_a_class_without_images_is_a_warning(kit, tmp_path, capsys):
    (kit / "classes.txt").write_text("\n".join([*data.TOY_CLASSES, "dragon"]))
    assert train.main(options(kit, tmp_path / "run", "--rounds", "0")) == 0
    assert "no training image is tagged dragon" in capsys.readouterr().err

def mutate(content, rng):
    """A few bytes changed, cut, doubled or inserted."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        at, n = rng.randrange(len(content) + 1), rng.choice((1, 1, 1, 2, 4, 16))
        kind = rng.randrange(4)
        content[at:at + n] = {0: b"", 1: rng.randbytes(min(n, len(content) - at)), 2: content[at:at + n] * 2, 3: rng.randbytes(n)}[kind]
    return bytes(content)

def fuzz(kit, count, seed=0):
    """Mutated XML, lists, JPEGs and PNGs through the loader: {kind: (loaded, refused)}; anything else raises."""
    rng, voc = random.Random(seed), VOC(kit, "train")
    readers = {"xml": (kit / XML, lambda p: read_tags(p, voc.classes)), "list": (kit / LIST, read_list),
               "jpeg": (kit / JPG, lambda p: (data.upright_size(p), read_image(p))),
               "png": (voc.mask_paths[3], lambda p: read_mask(p, (97, 97), 4))}
    counts = {kind: [0, 0] for kind in readers}
    for n in range(count):
        kind = list(readers)[n % 4]
        path, reader = readers[kind]
        bad = path.with_name("mutated")
        bad.write_bytes(mutate(path.read_bytes(), rng))
        start = time.time()
        try:
            reader(bad)
            counts[kind][0] += 1
        except InputError as e:
            assert "\n" not in str(e) and "expected" in str(e)
            counts[kind][1] += 1
        assert time.time() - start < 5
    return counts

def test_full_memory_gets_one_line(toy, tmp_path, monkeypatch, capsys):
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")):
        def full(*_):
            raise error
        monkeypatch.setattr(train, "losses", full)
        assert train.main(options(toy, tmp_path / type(error).__name__)) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("sgseg: memory is full")
    with pytest.raises(RuntimeError, match="allocate memory"):     # what torch really says
        torch.empty(2 ** 50)

@pytest.mark.filterwarnings("ignore")
def test_ten_thousand_mutated_files(kit):
    counts = fuzz(kit, 10_000, seed=1)
    print("loaded, refused:", counts)
    assert all(loaded and refused for loaded, refused in counts.values())

def test_docs_scripts_run(learnt, toy, tmp_path):
    photo = f"{toy / JPG}=disc,cross"
    for script, *argv in (("table.py", learnt), ("table.py", learnt, learnt), ("pictures.py", learnt, photo, tmp_path / "p.png"),
                          ("failures.py", learnt, learnt / "toy", tmp_path / "f", "toy_0250"), ("update.py", learnt)):
        done = subprocess.run([sys.executable, HERE / "docs" / script, *map(str, argv)], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and done.stdout, done.stderr
    assert (tmp_path / "p.png").exists() and (tmp_path / "f" / "toy_0250.png").exists()

# ---- the repository ----------------------------------------------------------------------------------------------------
def test_imports_are_torch_numpy_pillow_and_the_standard_library():
    for name in ("sgseg.py", "data.py", "refine.py", "train.py"):
        tree = ast.parse((HERE / name).read_text())
        found = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        found |= {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert found <= {"torch", "numpy", "PIL", "sgseg", "data", "refine"} | set(sys.stdlib_module_names)

def test_readme_links_point_at_what_they_name():
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", (HERE / "README.md").read_text())
    assert len(links) >= 8
    for name, file, line in links:
        text = (HERE / file).read_text().splitlines()[int(line) - 1]
        assert re.match(rf"\s*(def|class) {name}\b", text), f"README: {name} is not at {file}#L{line}"

def test_help_shows_every_option_and_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0
    for f in train.fields(train.Config):
        assert f"--{f.name.replace('_', '-')}" in said
        assert "".join(f"{f.metadata['help']} [{f.default}".split()) in "".join(said.split())
