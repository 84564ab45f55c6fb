"""Tests on a toy devkit in a temporary folder.

They compare functions with oracles, stop runs at every write, and feed in bad input.
`pytest test_sgseg.py` runs all of them in about 100 seconds on two cores.
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
import time
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

os.environ["OMP_NUM_THREADS"] = "1"  # read by torch: the second core is for `toy_run`
os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # for the forkserver below

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


# ---- helpers and fixtures ------------------------------------------------------------------------


@pytest.fixture(scope="session", autouse=True)
def toy_run(request, tmp_path_factory):
    """Start `python train.py` on the second core with the first test; `learnt` waits for it."""
    out = tmp_path_factory.mktemp("learnt") / "toy"
    process = None
    if any("learnt" in item.fixturenames for item in request.session.items):
        argv = [sys.executable, HERE / "train.py", "--out", out]
        log = open(out.with_name("log"), "w")
        process = subprocess.Popen(argv, stdout=log, stderr=log)
        multiprocessing.forkserver.ensure_running()  # it imports torch meanwhile
    yield process, out
    if process:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def learnt(toy_run):
    """The folder of the finished built-in toy run."""
    process, out = toy_run
    assert process.wait(timeout=300) == 0, out.with_name("log").read_text()
    return out


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A toy devkit of 16 training and 2 val images."""
    return make_toy(tmp_path_factory.mktemp("toy") / "kit", train=16, val=2)


@pytest.fixture
def kit(toy, tmp_path):
    """A copy of `toy` that a test may break."""
    return Path(shutil.copytree(toy, tmp_path / "kit"))


SMALL = {"backbone": "tiny", "weights": "none", "crop": 33, "size": 65, "warmup": 1, "rounds": 2}
SMALL |= {"epochs": 1, "min_steps": 1, "batch": 8, "radius": 2, "workers": 0, "device": "cpu"}
CPU = ("--device", "cpu")  # where SGSeg.load puts a network


def options(root, out, *more):
    """The command line of a small run on a devkit: two rounds, six steps."""
    argv = ["--voc", root, "--out", out]
    for name, value in SMALL.items():
        argv += [f"--{name.replace('_', '-')}", value]
    return [str(word) for word in (*argv, *more)]


def started_run(root, out, **more):
    """A new small run, not yet trained."""
    cfg = train.Config(**SMALL | {"voc": str(root), "out": str(out)} | more)
    return train.new_run(train.check(cfg))


@pytest.fixture(scope="session")
def finished(toy, tmp_path_factory):
    """The folder of a small run that was never stopped."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert train.main(options(toy, out)) == 0
    return out


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of `finished` that a test may break."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def run_outputs(run):
    """Return all that must be the same whether or not a run was stopped: weights, labels, ..."""
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "model": state["model"],
        "momentum": state["optimizer"]["state"],
        "segment": torch.load(run / "model.pt", weights_only=True)["model"],
        "metrics": [without(row, "images_per_s") for row in metrics],
        "results": (run / "results.json").read_text(),
        "pictures": {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*.png")},
        "files": sorted(path.name for path in run.glob("*.*")),
    }


def same(a, b):
    """Return whether a and b are equal bit for bit, tensors in dicts included."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def differing_outputs(a, b):
    """Return the names of the parts in which the outputs of two runs differ."""
    return [name for name in a if not same(a[name], b[name])]


def error_line(capsys):
    """Return the only line on stderr that is not a warning."""
    lines = capsys.readouterr().err.strip().splitlines()
    faults = [line for line in lines if not line.startswith("warning: ")]
    assert len(faults) == 1, faults
    return faults[0]


def refused(call, *args):
    """Return the InputError that call(*args) raises; tests check its kind and path."""
    with pytest.raises(InputError) as error:
        call(*args)
    return error.value


def resume(out, *more):
    return train.main(["--out", str(out), "--resume", "--device", "cpu", *more])


def interrupt_at_step(n, monkeypatch):
    """Raise SIGINT in the n-th training step, counted over all updates."""
    step = train.update_step
    steps = []

    def interrupted(*args):
        steps.append(1)
        if len(steps) == n:
            signal.raise_signal(signal.SIGINT)
        return step(*args)

    monkeypatch.setattr(train, "update_step", interrupted)


def annotation(*names):
    """Return the XML of an annotation with these objects."""
    objects = "".join(f"<object><name>{name}</name></object>" for name in names)
    return f"<annotation>{objects}</annotation>"


def encoded(image, kind="PNG", **how):
    """Return the bytes of a picture file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def empty(mode="RGB", size=(97, 97), kind="PNG"):
    """The bytes of an empty picture."""
    return encoded(Image.new(mode, size), kind)


def mask_of(k):
    """The bytes of a mask that shows class k alone."""
    return encoded(data.palette_image(np.full((97, 97), k)))


def half(content):
    """Return the first half of a file."""
    return content[: len(content) // 2]


def change(folder, changes):
    """Change files: {name: new content, a function of the old content, or None to remove it}."""
    for name, content in changes.items():
        path = folder / name
        if content is None:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content(path.read_bytes()) if callable(content) else content)


def shift_classes(mask):
    """Return a mask file with every class moved by one, as by a class list with an extra name."""
    mask = np.asarray(Image.open(io.BytesIO(mask))) % 255
    return encoded(data.palette_image(np.where((mask > 0) & (mask < 4), mask + 1, 1 * (mask > 0))))


def well_formed(message, path=""):
    """Return whether a message is one line of the form "{path} {problem}. {remedy}."."""
    ours = re.sub(r"\(\w+: .*?\)", "", message)  # without a library's reason
    form = re.search(r"\S \S.*\S\. [A-Z].*[^.]\.$", message) and message.startswith(path)
    wrong = re.search(r"\bexpected|mend it|Traceback", ours)
    return bool(form) and message.isprintable() and not wrong


def docs_module(name):
    """docs/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(name, HERE / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# child processes: forked from a clean process in which torch is already imported

FORKSERVER = multiprocessing.get_context("forkserver")
# torch._dynamo: SGD would import it in its first step
FORKSERVER.set_forkserver_preload(["test_sgseg", "torch._dynamo"])


def train_in_child(argv, prepare=None, *args):
    """In the child: call prepare(*args), then run the command line."""
    if prepare:
        prepare(*args)
    return train.main(argv)


def script_in_child(argv):
    """In the child: run python SCRIPT ARGUMENT ..."""
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


def run_logged(log, job, *args):
    """In the child: run a job and write its output to files."""
    sys.stdout = open(f"{log}.out", "w")
    sys.stderr = open(log, "w")
    sys.exit(job(*args))


def start_child(log, job, argv, *args):
    """Start a job in a child process; stderr goes to log, stdout to log.out. Return the process."""
    argv = [str(word) for word in argv]
    process = FORKSERVER.Process(target=run_logged, args=(str(log), job, argv, *args))
    process.start()
    return process


def exit_status(process, seconds=60):
    """Wait for a process and return its exit status, or None if it hangs (then kill it)."""
    process.join(seconds)
    status = process.exitcode
    if status is None:
        process.kill()
    return status


def disk_full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


# ---- the stages against oracles ------------------------------------------------------------------


def test_docstring_examples():
    examples = doctest.testmod(refine)
    assert examples.failed == 0 and examples.attempted >= 8


def test_localization_maps_by_hand():
    S = torch.full((1, 3, 2, 2), 9.0)
    S[0, 0] = torch.tensor([[2.0, 4.0], [-1.0, 1.0]])
    S[0, 2] = -1.0
    M = refine.localization_maps(S, [2, 0])
    assert M.shape == (1, 2, 2, 2) and not M[0, 0].any()  # class 2 has no positive score
    assert torch.equal(M[0, 1], torch.tensor([[0.5, 1.0], [0.0, 0.25]]))
    assert torch.equal(refine.localization_maps(S, [0], unit=8.0), M[:, 1:] / 2)
    clipped = refine.localization_maps(S, [2, 0, 1], unit=1.0)
    assert torch.equal(clipped[0, 1], torch.tensor([[1.0, 1.0], [0.0, 1.0]]))  # 2, 4 count as 1
    assert not clipped[0, 0].any() and torch.equal(clipped[0, 2], torch.ones(2, 2))


def test_head_maps_by_hand():
    """Z = (0, z, 9) and class 1, which scores 9, has no tag: the softmax is over (0, z / 2)."""
    for z, want in ((0.0, 0.5), (-1.0, 1 / (1 + math.exp(0.5))), (4.0, 1 / (1 + math.exp(-2.0)))):
        Z = torch.tensor([0.0, z, 9.0]).view(1, 3, 1, 1)
        assert refine.head_maps(Z, [0]).item() == pytest.approx(want)
    both = refine.head_maps(torch.zeros(1, 3, 2, 2), [1, 0])
    assert torch.allclose(both, torch.tensor(1 / 3)) and both.shape == (1, 2, 2, 2)


def test_stretch_reaches_one_unless_the_factor_would_exceed_its_bound():
    M = torch.tensor([[[[0.25, 0.5]], [[0.05, 0.1]], [[0.0, 0.0]]]])
    want = torch.tensor([[[[0.5, 1.0]], [[0.25, 0.5]], [[0.0, 0.0]]]])
    assert torch.allclose(refine.stretch(M, 0.2), want)


# stage 2: the affinity as a dense matrix, its energy, and the exact minimiser of the energy


def dense(features, **numbers):
    """Return the affinity as one (hw,hw) float64 matrix."""
    A, index = refine.affinity(features, **numbers)
    full = torch.zeros(A.shape[1], A.shape[1], dtype=torch.float64)
    for n in range(A.shape[2]):
        full[torch.arange(A.shape[1]), index[:, n]] += A[0, :, n].double()
    return full


def affinity_energy(M, M0, A, strength):
    """Return E(M) of `affinity_guided`'s docstring, one value for each of the P maps."""
    M = M[0].flatten(1).double()  # (P,hw)
    distance = (A.sum(1) * (M - M0[0].flatten(1)) ** 2).sum(1)  # sum_i d_i (M_i - M0_i)^2
    differences = (M[:, :, None] - M[:, None]) ** 2  # (P,hw,hw)
    return distance + strength * (A * differences).sum((1, 2)) / 2


def minimiser(M0, A, strength):
    """Return the solution of (D + lambda (D - A)) M = D M0 by a dense solver in float64."""
    D = A.sum(1).diag()
    right = D @ M0[0].flatten(1).T.double()
    return torch.linalg.solve(D + strength * (D - A), right).T.reshape(M0.shape)


def test_affinity_from_its_definition():
    torch.manual_seed(0)
    f = torch.randn(1, 5, 4, 3)
    A = dense(f, dilations=(1, 2), temperature=0.5)
    centred = (f - f.mean((2, 3), keepdim=True))[0]
    for i, j in np.ndindex(12, 12):
        distances = {abs(j // 3 - i // 3), abs(j % 3 - i % 3)}
        # j is in one of the 8 directions from i, at distance 1 or 2
        linked = distances in ({1}, {2}, {0, 1}, {0, 2})
        u = centred[:, i // 3, i % 3]
        v = centred[:, j // 3, j % 3]
        cos = float(u @ v / (u.norm() * v.norm()))
        want = math.exp((cos - 1) / 0.5) if linked else 0
        assert A[i, j] == pytest.approx(want, abs=1e-6)
    assert torch.allclose(A, A.T)


def test_energy_worked_example_and_its_minimiser():
    """Two pixels with A = 1 and lambda = 1: E is 1 at M0 = (1, 0) and least at (2/3, 1/3).
    In general the gradient of E is 0 at the solution of the linear system."""
    A = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    M0 = torch.tensor([[[[1.0, 0.0]]]])
    for first, want in ((1.0, 1), (0.5, 1 / 2), (0.75, 3 / 8), (2 / 3, 1 / 3)):
        M = torch.tensor([first, 1 - first]).view(1, 1, 1, 2)
        assert float(affinity_energy(M, M0, A, 1.0)) == pytest.approx(want)
    torch.manual_seed(0)
    M0 = torch.rand(1, 2, 5, 7)
    A = dense(torch.randn(1, 6, 5, 7), temperature=0.5)
    M = minimiser(M0, A, 3.0).requires_grad_()
    least = affinity_energy(M, M0, A, 3.0)
    assert torch.autograd.grad(least.sum(), M)[0].abs().max() < 1e-6
    assert (affinity_energy(M + 0.01 * torch.randn(M.shape), M0, A, 3.0) > least).all()


def test_walk_converges_to_the_dense_solution_and_every_step_lowers_the_energy():
    torch.manual_seed(0)
    f = torch.randn(1, 6, 9, 7)
    M0 = torch.rand(1, 2, 9, 7)
    A = dense(f, temperature=0.5)
    walk = partial(refine.affinity_guided, M0, f, strength=3.0, temperature=0.5)
    assert torch.allclose(walk(walk_steps=200).double(), minimiser(M0, A, 3.0), atol=1e-5)
    energies = [affinity_energy(walk(walk_steps=n), M0, A, 3.0) for n in range(6)]
    assert all((after < before).all() for before, after in zip(energies, energies[1:]))


@pytest.mark.parametrize("strength, bound, least", [(100.0, "0.67", 0.02), (10.0, "0.02", 0.0)])
def test_walk_stops_before_its_limit_and_within_the_bound(strength, bound, least):
    """In the D-weighted norm every step leaves at most lambda / (1 + lambda) of the distance."""
    torch.manual_seed(0)
    f = refine.upsample(torch.randn(1, 8, 9, 7), (25, 17)) + 0.3 * torch.randn(1, 8, 25, 17)
    M0 = refine.upsample(torch.rand(1, 2, 5, 4), (25, 17))
    A = dense(f, temperature=0.1)
    solution = minimiser(M0, A, strength)
    distances = {}
    for n in (0, 1, 5, 20, 40):
        M = refine.affinity_guided(M0, f, strength, n).double()
        distances[n] = float((A.sum(1).view(25, 17) * (M - solution) ** 2).sum().sqrt())
        assert distances[n] <= (strength / (1 + strength)) ** n * distances[0] + 1e-4
    assert least * distances[0] <= distances[40]
    assert distances[40] <= 0.01 * distances[0] or strength == 100.0
    assert f"{(strength / (1 + strength)) ** 40:.2f}" == bound
    assert bound in refine.affinity_guided.__doc__


def test_walk_worked_example_and_limits():
    M0 = torch.tensor([[[[1.0, 0.0]]]])
    alike = torch.zeros(1, 3, 1, 2)  # two equal pixels, as in the docstring
    for steps, want in ((1, (0.5, 0.5)), (2, (0.75, 0.25)), (99, (2 / 3, 1 / 3))):
        M = refine.affinity_guided(M0, alike, 1.0, steps)
        assert M.flatten().tolist() == pytest.approx(want, abs=1e-5)
    torch.manual_seed(0)
    M = torch.rand(2, 3, 9, 7)
    f = torch.randn(2, 4, 9, 7)
    assert torch.equal(refine.affinity_guided(M, f, 0.0), M)  # lambda = 0 changes nothing
    assert torch.equal(refine.affinity_guided(M[..., :1, :1], f[..., :1, :1]), M[..., :1, :1])
    constant = torch.full_like(f, 1000.0)
    for features in (f, constant, 1e-20 * f):
        walked = refine.affinity_guided(M, features)
        assert 0 <= walked.min() and walked.max() <= 1 + 1e-6 and walked.isfinite().all()
    # features that differ by rounding noise are alike
    alike = refine.affinity_guided(M, constant)
    assert torch.allclose(refine.affinity_guided(M, constant + 1e-4 * f), alike, atol=0.02)
    assert not torch.allclose(refine.affinity_guided(M, constant + 10 * f), alike, atol=0.1)


# stage 3: the guided filter on the full grid, and its definition window by window


def guided_filter(p, I, radius, eps):
    """q_i = mean(a)_i . I_i + mean(b)_i, with maps and image on one grid: p (B,P,H,W)."""
    a, b = refine.guided_coefficients(p, I, radius, eps)
    return (a * I[:, None]).sum(2) + b


def window(y, x, r):
    """Return the slices of the window around a pixel, cut at the border."""
    return slice(max(0, y - r), y + r + 1), slice(max(0, x - r), x + r + 1)


def naive_guided_filter(p, I, r, eps):
    """Return mean(a), mean(b), q of He, Sun & Tang, eqs. 14 to 16; p (H,W), I (H,W,3) float64."""
    a = np.zeros_like(I)
    b = np.zeros_like(p)
    for y, x in np.ndindex(p.shape):
        colours = I[window(y, x, r)].reshape(-1, 3)
        values = p[window(y, x, r)].ravel()
        mu = colours.mean(0)
        Sigma = (colours - mu).T @ (colours - mu) / len(colours)
        covariance = (colours - mu).T @ (values - values.mean()) / len(colours)
        a[y, x] = np.linalg.solve(Sigma + eps * np.eye(3), covariance)
        b[y, x] = values.mean() - a[y, x] @ mu
    mean_a = np.zeros_like(I)
    mean_b = np.zeros_like(p)
    for y, x in np.ndindex(p.shape):
        mean_a[y, x] = a[window(y, x, r)].reshape(-1, 3).mean(0)
        mean_b[y, x] = b[window(y, x, r)].mean()
    return mean_a, mean_b, (mean_a * I).sum(2) + mean_b


@pytest.mark.parametrize("r", [0, 1, 4, 40])
def test_box_mean_equals_the_mean_of_every_window(r):
    for H, W in ((1, 9), (7, 5), (16, 3), (25, 11)):
        x = torch.rand(2, 3, H, W, dtype=torch.float64)
        kept = x.clone()
        want = torch.zeros_like(x)
        for i, j in np.ndindex(H, W):
            want[..., i, j] = x[(..., *window(i, j, r))].mean((2, 3))
        assert torch.allclose(refine.box_mean(x, r), want) and torch.equal(x, kept)


@pytest.mark.parametrize("radius, eps", [(1, 1e-2), (3, 1e-3), (20, 1e-1), (6, 1e-5)])
def test_guided_coefficients_equal_the_window_by_window_definition(radius, eps):
    rng = np.random.default_rng(0)
    p = rng.random((2, 11, 9))
    I = rng.random((11, 9, 3))
    if eps < 1e-3:  # a smooth grey ramp: its covariances are nearly singular
        I = np.linspace(0.2, 0.8, 9)[None, :, None] + 1e-3 * I
    maps = torch.tensor(p)[None]
    image = torch.tensor(I).permute(2, 0, 1)[None]
    a, b = refine.guided_coefficients(maps, image, radius, eps)
    assert a.shape == (1, 2, 3, 11, 9) and b.shape == (1, 2, 11, 9)
    q = guided_filter(maps.float(), image.float(), radius, eps)
    assert q.dtype == torch.float32
    for k in range(2):
        want_a, want_b, want = naive_guided_filter(p[k], I, radius, eps)
        assert np.allclose(a[0, k].permute(1, 2, 0), want_a, rtol=1e-6, atol=1e-9)
        assert np.allclose(b[0, k], want_b, rtol=1e-6, atol=1e-9)
        assert np.abs(q[0, k].numpy() - want).max() < 1e-4


def soft_photo(H, W):
    """Return (1,3,H,W) smooth colours with very little noise, quantised to steps of 1/255."""
    torch.manual_seed(0)
    smooth = F.interpolate(torch.rand(1, 3, H // 64 + 2, W // 64 + 2), (H, W), mode="bicubic")
    return ((smooth + 0.0015 * torch.randn(1, 3, H, W)).clamp(0, 1) * 255).round() / 255


def two_tones(H, W):
    """Return (1,3,H,W): a black half with a white disc in it, and a white half."""
    y, x = np.mgrid[:H, :W]
    white = (x >= W // 2) | ((y - H // 2) ** 2 + (x - W // 3) ** 2 < (H // 4) ** 2)
    return torch.tensor(white).float().expand(1, 3, H, W)


@pytest.mark.parametrize("picture, H, W, radius, eps", [
    (soft_photo, 366, 500, 4, 1e-6),
    (soft_photo, 48, 2000, 1, 1e-5),  # the running sums of a large photo, in each direction
    (soft_photo, 1500, 48, 2, 1e-6),
    (two_tones, 375, 500, 1, 1e-6),
    (two_tones, 375, 500, 4, 1e-9),
])  # fmt: skip
def test_guided_filter_is_exact_with_small_windows_in_large_pictures(picture, H, W, radius, eps):
    """Compare with float64 at the first corner, and at the last, where running sums are longest."""
    I = picture(H, W)
    p = F.interpolate(torch.rand(1, 1, H // 8, W // 8), (H, W), mode="bilinear")
    q = guided_filter(p, I, radius, eps)[0, 0].double().numpy()
    side = 12 + 4 * radius
    reach = 2 * radius  # a pixel of q depends on pixels up to this distance
    for piece, inner in (
        ((slice(H - side, H), slice(W - side, W)), (slice(reach, side),) * 2),
        ((slice(0, side), slice(0, side)), (slice(0, side - reach),) * 2),
    ):
        colours = I[0].permute(1, 2, 0).double().numpy()[piece]
        want = naive_guided_filter(p[0, 0].double().numpy()[piece], colours, radius, eps)[2]
        assert np.abs(q[piece][inner] - want[inner]).max() < 1e-3


def test_guided_filter_worked_example_affine_maps_and_batches():
    """A black and a white pixel, p = (0.2, 0.8), one window. Every colour has variance 1/4 and
    covariance 0.15 with p, so a = 0.15 / (3/4 + eps) for each, and q = 0.5 -+ 3 a / 2."""
    image = torch.tensor([0.0, 1.0]).expand(1, 3, 1, 2)
    p = torch.tensor([[[[0.2, 0.8]]]])
    for eps, want in ((0.75, (0.35, 0.65)), (1e-9, (0.2, 0.8))):
        assert guided_filter(p, image, 1, eps).flatten().tolist() == pytest.approx(want, abs=1e-5)
    # an affine function of the colours is returned as it is
    I = torch.rand(1, 3, 16, 16)
    p = (I * torch.tensor([0.2, 0.5, 0.1]).view(1, 3, 1, 1)).sum(1, keepdim=True) + 0.1
    assert torch.allclose(guided_filter(p, I, 4, 1e-8), p, atol=1e-3)
    # the images of a batch do not mix
    maps = torch.rand(2, 2, 16, 16)
    I = torch.rand(2, 3, 16, 16)
    both = [guided_filter(maps[n : n + 1], I[n : n + 1], 4, 1e-3) for n in range(2)]
    assert torch.allclose(guided_filter(maps, I, 4, 1e-3), torch.cat(both), atol=1e-5)


def test_self_guided_from_its_definition():
    """a and b are computed on the maps' grid from the image's averages; only they are upsampled."""
    torch.manual_seed(0)
    maps = torch.rand(2, 2, 5, 4)
    I = torch.rand(2, 3, 40, 32)
    small = F.adaptive_avg_pool2d(I, (5, 4))
    a, b = refine.guided_coefficients(maps, small, 1, 1e-2)
    bilinear = {"size": (40, 32), "mode": "bilinear", "align_corners": True}
    want = F.interpolate(b, **bilinear)
    for c in range(3):
        want = want + F.interpolate(a[:, :, c], **bilinear) * I[:, [c]]
    assert torch.allclose(refine.self_guided(maps, I, 1, 1e-2), want.clamp(0, 1), atol=1e-5)
    q = guided_filter(maps, small, 1, 1e-2).clamp(0, 1)  # an image on the grid of the maps
    assert torch.allclose(refine.self_guided(maps, small, 1, 1e-2), q, atol=1e-6)
    assert not refine.self_guided(0 * maps, I, 1, 1e-2).any()


# stage 4, and all four in a row


def test_pseudo_labels_by_hand():
    maps = torch.zeros(1, 2, 3, 3)
    maps[0, 0] = torch.tensor([[0.9, 0.4, 0.1], [0.5, 0.6, 0.0], [0.2, 0.3, 0.8]])
    maps[0, 1] = torch.tensor([[0.2, 0.8, 0.3], [0.55, 0.1, 0.0], [0.24, 0.1, 0.9]])
    want = [[5, 8, 255], [8, 5, 0], [0, 255, 8]]
    label = refine.pseudo_labels(maps, [4, 7], 0.25, 0.5)
    assert label.dtype == torch.uint8 and label[0].tolist() == want
    assert refine.pseudo_labels(maps, torch.tensor([4, 7]), 0.25, 0.5)[0].tolist() == want
    assert refine.pseudo_labels(maps[:, :0], [], 0.25, 0.5).tolist() == [[[0] * 3] * 3]
    assert refine.pseudo_labels(maps, [253, 7], 0.25, 0.5)[0, 0, 0] == 254
    # of equal maps the first wins, and a threshold belongs to the label above it; 0.25, 0.5 and
    # 0.75 are exact in float32, so the comparisons are exact, too
    maps = torch.tensor([[[[0.5, 0.25, 0.75, 0.2]], [[0.5, 0.25, 0.75, 0.2]]]])
    assert refine.pseudo_labels(maps, [3, 1], 0.25, 0.5).flatten().tolist() == [4, 255, 4, 0]
    assert refine.pseudo_labels(maps, [1, 3], 0.25, 0.5).flatten().tolist() == [2, 255, 2, 0]
    ramp = torch.linspace(0, 1, 101).view(1, 1, 1, 101)
    label = refine.pseudo_labels(ramp, [0], 0.5, 0.5).flatten()  # lo = hi: nothing is undecided
    assert label.tolist() == [0] * 50 + [1] * 51
    assert refine.pseudo_labels(ramp, [0], 0.0, 0.0).eq(1).all()


@pytest.mark.parametrize(
    "stage, channels, K",
    [(refine.localization_maps, 4, 4), (refine.head_maps, 5, 4), (refine.pseudo_labels, 1, 254)],
)
def test_stages_reject_tags_that_are_not_distinct_class_indices(stage, channels, K):
    """Reject (B,K) and (K,) tags in {0,1}, classes that do not exist, floats and booleans."""
    for wrong in ([[0, 1, 0, 0]], [0, 1, 0, 1], [K], [-1], [0.5], [1.0], [True]):
        for tagged in (wrong, torch.tensor(wrong)):
            with pytest.raises(ValueError, match=f"from 0 to {K - 1}"):
                stage(torch.rand(1, channels, 3, 3), tagged)


def test_stages_reject_mismatched_sizes_and_numbers_out_of_range():
    M = torch.rand(1, 2, 6, 5)
    f = torch.randn(1, 4, 6, 5)
    I = torch.rand(1, 3, 6, 5)
    nan = math.nan
    wrong = {partial(refine.localization_maps, M, [0]): [(0.0,), (-1.0,), (nan,)]}
    walks = [(f[..., :4],), (torch.cat([f, f]),), (f, -1.0), (f, nan), (f, 1.0, 40, 0.0)]
    # at a temperature of 0.001 exp() would underflow
    wrong[partial(refine.affinity_guided, M)] = [*walks, (f, 1.0, 40, 0.001), (f, 1.0, 40, -0.1)]
    filters = [(image, 4, 1e-3) for image in (I[:, :1], 255 * I, I - 0.5)]
    filters += [(I, -1, 1e-3), (I, 4, 0.0), (I, 4, nan)]
    wrong[partial(refine.self_guided, M)] = filters
    wrong[partial(refine.guided_coefficients, M)] = [*filters, (I[..., :4], 4, 1e-3)]
    pairs = ((0.6, 0.4), (-0.1, 0.5), (0.5, 1.1), (nan, 0.5))
    labels = [([],), ([0],), ([0, 1, 2],), *(([0, 1], *pair) for pair in pairs)]
    wrong[partial(refine.pseudo_labels, M)] = labels
    for value in (nan, math.inf, -math.inf):
        wrong[partial(refine.pseudo_labels, torch.where(M == M.max(), value, M))] = [([0, 1],)]
    for stage, cases in wrong.items():
        for arguments in cases:
            with pytest.raises(ValueError):
                stage(*arguments)


def test_four_stages_are_the_stages_in_a_row():
    torch.manual_seed(0)
    S = torch.randn(2, 4, 5, 4)
    f = torch.randn(2, 6, 9, 7)
    I = torch.rand(2, 3, 65, 49)
    localized, guided, refined, label = refine.four_stages(S, f, I, [3, 1])
    assert torch.equal(localized, refine.localization_maps(refine.upsample(S, (9, 7)), [3, 1]))
    assert torch.equal(guided, refine.stretch(refine.affinity_guided(localized, f), refine.FLOOR))
    assert torch.equal(refined, refine.self_guided(guided, I))
    assert torch.equal(label, refine.pseudo_labels(refined, [3, 1]))
    assert label.shape == (2, 65, 49) and set(label.unique().tolist()) <= {0, 2, 4, 255}
    # no walk and no filter; a floor of 2 halves the map
    stages = (refine.localization_maps, None, None)
    _, guided, refined, label = refine.four_stages(S, f, I, [3, 1], stages, 0.2, 0.4, 2.0)
    assert torch.equal(guided, localized / 2)
    assert torch.equal(refined, refine.upsample(guided, (65, 49)))
    assert torch.equal(label, refine.pseudo_labels(refined, [3, 1], 0.2, 0.4))
    # user-defined stages
    stages = (
        lambda scores, tagged: scores[:, tagged].sigmoid(),
        lambda maps, features: maps * features[:, :1].sigmoid(),
        lambda maps, image: refine.upsample(maps, image.shape[-2:]) * image[:, :1],
    )
    localized, guided, refined, _ = refine.four_stages(S, f, I, [2, 0], stages, floor=1.0)
    assert torch.equal(localized, refine.upsample(S, (9, 7))[:, [2, 0]].sigmoid())
    assert torch.equal(guided, localized * f[:, :1].sigmoid())
    assert torch.equal(refined, refine.upsample(guided, (65, 49)) * I[:, :1])


@pytest.mark.parametrize("stages", [(refine.affinity_guided, refine.self_guided), (None, None)])
def test_a_photo_without_a_tag_is_all_background(stages):
    for localize, channels in ((refine.localization_maps, 4), (refine.head_maps, 5)):
        S = torch.randn(1, channels, 5, 4)
        f = torch.randn(1, 6, 9, 7)
        I = torch.rand(1, 3, 65, 49)
        *maps, label = refine.four_stages(S, f, I, [], (localize, *stages))
        assert [M.shape[1] for M in maps] == [0, 0, 0]
        assert label.shape == (1, 65, 49) and not label.any() and label.dtype == torch.uint8


def test_gradients_of_the_stages_match_finite_differences():
    torch.manual_seed(0)
    leaf = {"dtype": torch.float64, "requires_grad": True}
    M = torch.rand(1, 1, 4, 4, **leaf)
    f = torch.randn(1, 3, 4, 4, **leaf)
    p = torch.rand(1, 1, 6, 5, **leaf)
    I = torch.rand(1, 3, 6, 5, dtype=torch.float64)
    walk = partial(refine.affinity_guided, strength=2.0, walk_steps=3, temperature=1.0)
    assert torch.autograd.gradcheck(walk, (M, f))
    assert torch.autograd.gradcheck(partial(guided_filter, I=I, radius=2, eps=1e-2), (p,))


# ---- the network ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_has_the_right_grids_channels_and_image_score(name):
    """Scoring the mean feature equals averaging the scores."""
    net = SGSeg(NAMES, name, size=97).eval()
    x = torch.rand(2, 3, 97, 65)
    c_mid, c_high = net.backbone.channels
    with torch.no_grad():
        S, s, Z, mid = net(x)
        F_mid, F_high = net.backbone((x - net.mean) / net.std)
    assert torch.equal(mid, F_mid) and mid.shape == (2, c_mid, 13, 9)
    assert S.shape == (2, 4, 7, 5) and s.shape == (2, 4) and Z.shape == (2, 5, 13, 9)
    assert torch.allclose(s, F_high.mean((2, 3)) @ net.cam.weight.flatten(1).T, atol=1e-5)
    assert torch.allclose(s, S.mean((2, 3)), atol=1e-6)
    shapes = [features.shape for features in net.features(Image.new("RGB", (65, 97)))]
    assert shapes == [(1, c_mid, 13, 9), (1, c_high, 7, 5)]


def test_the_network_rejects_invalid_images():
    x = torch.full((1, 3, 33, 33), 0.5)
    wrong = (200 * x, x.to(torch.uint8), x[:, :1], x.permute(0, 2, 3, 1), x[0], -x, x * math.nan)
    for image in wrong:
        with pytest.raises(ValueError):
            SGSeg(NAMES, "tiny")(image)


@pytest.mark.parametrize("name", BACKBONES)
def test_losses_under_autocast_are_finite_and_lite0_is_exported(name, tmp_path):
    """On CUDA the update runs under autocast to bfloat16; this test does so on the CPU."""
    net = SGSeg(NAMES, name).train()
    labels = torch.randint(0, 5, (2, 33, 33))
    with torch.autocast("cpu", torch.bfloat16):
        L = torch.stack(train.losses(net, torch.rand(2, 3, 33, 33), torch.eye(4)[:2], labels))
    L.sum().backward()
    assert L.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in net.parameters())
    if name == "lite0":
        x = torch.rand(1, 3, 65, 65)
        exported = torch.export.export(net.eval(), (x,)).module()
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(exported(x), net(x)))


def test_vgg16_has_torchvisions_parameter_names(tmp_path):
    convs = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]  # of torchvision's vgg16().features
    net = BACKBONES["vgg16"]()
    assert set(net.state_dict()) == {f"features.{n}.{kind}" for n in convs
                                     for kind in ("weight", "bias")}  # fmt: skip
    # conv5 is dilated, to see a wider context
    assert [n for n in convs if net.features[n].dilation == (2, 2)] == [24, 26, 28]
    state = {key: torch.full_like(value, 0.5) for key, value in net.state_dict().items()}
    torch.save(state | {"classifier.0.weight": torch.zeros(1)}, tmp_path / "w.pth")
    load_imagenet(net, tmp_path / "w.pth")
    assert same(dict(net.state_dict()), state)


class Undilated(Lite0):  # the undilated network that lite0's weights were trained in
    layout = (*Lite0.layout[:5], (192, 4, 5, 2, 1, 6), (320, 1, 3, 1, 1, 6))


def test_lite0_loads_every_weight_and_dilation_changes_no_parameter():
    nets = (Undilated(), Lite0())
    for net in nets:
        before = {key: value.clone() for key, value in net.state_dict().items()}
        load_imagenet(net)
        kept = [key for key, value in net.state_dict().items() if torch.equal(value, before[key])]
        assert not [key for key in kept if "num_batches_tracked" not in key]
    x = torch.rand(1, 3, 65, 65)
    with torch.no_grad():
        (mid, high), (mid_dilated, high_dilated) = [net.eval()(x) for net in nets]
    assert torch.equal(mid, mid_dilated)
    assert high.shape[-1] == 3 and high_dilated.shape[-1] == 5


def test_lite0s_mid_level_features_are_the_averaged_stride_4_features():
    """Its first row and column, spoilt by the padding of the layers below, copy the second."""
    net = Lite0().eval()
    stride_4 = []
    net.blocks[2].register_forward_hook(lambda module, args, output: stride_4.append(output[0]))
    with torch.no_grad():
        mid, _ = net(torch.rand(1, 3, 49, 33))
    assert mid.shape == (1, 24, 7, 5)
    for y, x in np.ndindex(7, 5):
        cells = stride_4[0][(..., *window(2 * max(y, 1), 2 * max(x, 1), 1))]  # (24,3,3) or less
        assert torch.allclose(mid[0, :, y, x], cells.mean((1, 2)), atol=1e-6)


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


class Evil:
    """Unpickling this object creates a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_weights_load_in_the_forms_that_programs_save_and_others_are_refused(tmp_path):
    """Saved by DataParallel, wrapped in {"state_dict": ...}, with a classifier, or all three."""
    path = tmp_path / "w.pth"
    state = dict(BACKBONES["tiny"]().state_dict())
    parallel = {f"module.{key}": value for key, value in state.items()}
    parallel["module.classifier.weight"] = torch.zeros(3)
    for content in (state, {"state_dict": state, "epoch": 3}, parallel, {"state_dict": parallel}):
        torch.save(content, path)
        net = BACKBONES["tiny"]()
        load_imagenet(net, path)
        assert same(dict(net.state_dict()), state)
    name = "high.1.0.weight"
    for content, named in (
        *((without(state, name), name), (state | {"fc.weight": torch.ones(2)}, "fc.weight")),
        *((state | {name: torch.ones(7, 3)}, "[7, 3]"), (state | {name: "text"}, "w.pth")),
        *((state | {name: state[name] * math.nan}, name), ({1: state[name]}, "w.pth")),
        *(([state], "w.pth"), (torch.ones(3), "w.pth"), ({"state_dict": torch.ones(1)}, "w.pth")),
        ({"conv1.weight": torch.ones(1), "bn1.bias": torch.ones(1)}, "Tiny"),
        (Evil(tmp_path / "made"), "w.pth"),
    ):
        torch.save(content, path)
        error = refused(load_imagenet, net, path)
        assert error.kind == "weights" and error.path == str(path)
        assert named in str(error) and well_formed(str(error)), error
    assert not (tmp_path / "made").exists()
    assert refused(imagenet_state, "no_such_package:weights.pth").path == "no-such-package"


def test_outputs_are_averaged_with_those_of_the_mirror_image(toy):
    image = read_image(toy / JPG)
    net = SGSeg(NAMES, "tiny", size=97).eval()
    a = net.outputs(image)
    b = net.outputs(ImageOps.mirror(image))
    for u, v in zip(a[:3], b[:3]):
        assert torch.allclose(u, v.flip(3) if u.ndim == 4 else v, atol=1e-5)
    with torch.no_grad():
        S, _, _, F_mid = net(net.to_input(image))
        S2 = net(net.to_input(image).flip(3))[0]
    assert torch.equal(a[0], (S + S2.flip(3)) / 2) and a[0].shape == (1, 4, 7, 7)
    assert torch.equal(a[3], F_mid) and a[3].shape[2] == 13  # F_mid is the image's own


def network_with_outputs(monkeypatch, s, Z, **settings):
    """Return a network whose `outputs` are s (K) and Z (1,K+1,h,w) for every image."""
    net = SGSeg(NAMES[: len(s)], "tiny", **settings).eval()
    monkeypatch.setattr(net, "outputs", lambda *_: (None, torch.tensor([s]), Z.clone(), None))
    return net


def test_segmenting_without_tags_by_hand(monkeypatch):
    """p = softmax(Z_0, Z_1 + c_1, Z_2 + c_2), c_k = log sigmoid(s_k) - max_j log sigmoid(s_j) +
    bias. The head ranks background, class 2, class 1; the classifier prefers class 1."""
    Z = torch.tensor([1.0, 0.8, 0.9]).view(1, 3, 1, 1).repeat(1, 1, 2, 2)
    photo = Image.new("RGB", (16, 16))
    network = partial(network_with_outputs, monkeypatch, [2.0, -1.0], Z)
    for bias, want in ((0.0, 0), (0.19, 0), (0.21, 1)):  # 0.8 + 0 + bias against 1
        for self_guided in (True, False):
            label = network(object_bias=bias, self_guided=self_guided).segment(photo)
            assert label.shape == (16, 16) and label.dtype == np.uint8 and (label == want).all()
    c = [math.log(1 + math.exp(-2.0)) - math.log(1 + math.exp(-x)) + 3.0 for x in (2.0, -1.0)]
    e = [math.exp(z) for z in (1.0, 0.8 + c[0], 0.9 + c[1])]
    k, q = network(object_bias=3.0).class_probabilities(photo)
    assert k.tolist() == [1] and q.shape == (1, 16, 16)
    assert torch.allclose(q, torch.tensor(e[1] / sum(e)), atol=1e-5)
    # class 1 fills the right half of the head's grid; the photo has its edge at column 18
    Z = torch.tensor([0.0, -2.0]).view(1, 2, 1, 1).repeat(1, 1, 4, 4)
    Z[:, 1, :, 2:] = 2.0
    step = np.where(np.arange(32) < 18, 0, 255).astype(np.uint8)
    photo = Image.fromarray(step[None].repeat(32, 0)).convert("RGB")
    network = partial(network_with_outputs, monkeypatch, [2.0], Z, object_bias=0.0)
    for self_guided, edge in ((False, 16), (True, 18)):
        label = network(self_guided=self_guided).segment(photo)
        assert ((label == 0).sum(1) == edge).all()


def test_several_scales_are_averaged(toy):
    net = SGSeg(NAMES, "tiny", size=97, self_guided=False).eval()
    image = read_image(toy / JPG)
    net.scales = (1.0, 0.5)
    _, s, Z, _ = net.outputs(image)
    _, s2, Z2, _ = net.outputs(image, 0.5)
    assert Z2.shape[-1] == 7 and Z.shape[-1] == 13
    Z = (Z + F.interpolate(Z2, (13, 13), mode="bilinear", align_corners=True)) / 2
    present = F.logsigmoid((s + s2) / 2)
    Z[:, 1:] += (present - present.max() + 0.75)[:, :, None, None]
    k, q = net.class_probabilities(image)
    assert torch.equal(k, Z.argmax(1).unique())
    want = F.interpolate(Z.softmax(1)[:, k], (97, 97), mode="bilinear", align_corners=True)
    assert torch.allclose(q, want[0], atol=1e-5)


def test_probabilities_sum_to_one_and_segment_is_their_argmax(finished, toy, monkeypatch):
    net = SGSeg.load(finished)
    for path in VOC(toy, "val").image_paths:
        p = net.probabilities(path)
        assert p.shape == (5, 97, 97) and torch.allclose(p.sum(0), torch.ones(97, 97), atol=1e-5)
        best = p.argmax(0).to(torch.uint8).numpy()
        assert p.min() >= 0 and (data.remove_specks(best) == net.segment(path)).all()
    # the filter's clamp can leave 0 for every class
    monkeypatch.setattr(refine, "self_guided", lambda q, I, *_: 0 * refine.upsample(q, I.shape[2:]))
    assert torch.allclose(net.probabilities(toy / JPG).sum(0), torch.ones(97, 97))


def test_segment_refuses_over_255_labels_and_training_mode():
    photo = Image.new("RGB", (33, 33))
    names = [str(k) for k in range(255)]
    with pytest.raises(ValueError, match="256 labels"):
        SGSeg(names, "tiny", size=33).eval().segment(photo)
    net = SGSeg(names[:254], "tiny", size=33)
    assert net.eval().segment(photo).shape == (33, 33)
    before = {key: value.clone() for key, value in net.train().state_dict().items()}
    for call in (net.outputs, net.segment, net.probabilities):
        with pytest.raises(ValueError, match="training mode"):
            call(photo)
    assert same(dict(net.state_dict()), before)  # BatchNorm's statistics included


def test_a_network_is_saved_and_loaded_in_full_and_half_precision(finished, toy, tmp_path):
    net = SGSeg.load(finished)
    state = torch.load(finished / "model.pt", weights_only=True)
    assert set(state) == {"config", "model"} and not net.training
    trained = torch.load(finished / "checkpoint.pt", weights_only=True)
    assert same(state["model"], trained["model"])
    assert net.label_names == ["background", *data.TOY_CLASSES] and net.size == 65
    data.write(tmp_path / "other.pt", net.export_state())
    again = SGSeg.load(tmp_path / "other.pt")
    assert again.config == net.config
    assert (again.segment(toy / JPG) == net.segment(toy / JPG)).all()
    weights = {k: v.half() if v.is_floating_point() else v for k, v in state["model"].items()}
    data.write(tmp_path / "half.pt", state | {"model": weights})
    p = SGSeg.load(tmp_path / "half.pt").probabilities(toy / JPG)
    assert torch.allclose(p, net.probabilities(toy / JPG), atol=0.01)
    for name in ("", "nothing.pt"):
        assert refused(SGSeg.load, tmp_path / name).kind == "missing"


class Own(Backbone):
    """A backbone as a user may write it, with one frozen layer."""

    channels = (8, 16)
    mean = (0.5, 0.5, 0.5)
    std = (0.25, 0.25, 0.25)

    def __init__(self):
        super().__init__()
        self.low = nn.Conv2d(3, 8, 3, 4, 1)
        self.mid = nn.Conv2d(8, 8, 3, 2, 1)
        self.high = nn.Conv2d(8, 16, 3, 2, 1)
        self.frozen = [self.low]

    def forward(self, x):
        mid = self.mid(self.low(x).relu()).relu()
        return mid, self.high(mid).relu()


def test_your_own_backbone_trains_from_a_file_of_weights_or_none(toy, tmp_path, monkeypatch):
    """`--weights auto` means the backbone's own weights if it has any, never another network's."""
    monkeypatch.setitem(BACKBONES, "own", Own)
    state = Own().state_dict()
    torch.save(state | {"classifier.bias": torch.ones(9)}, tmp_path / "own.pth")
    out = tmp_path / "run"
    argv = options(toy, out, "--backbone", "own", "--rounds", 1, "--weights", tmp_path / "own.pth")
    assert train.main(argv) == 0
    trained = SGSeg.load(out).backbone.state_dict()
    unchanged = [key for key in state if torch.equal(state[key], trained[key])]
    assert unchanged == ["low.weight", "low.bias"]  # the frozen layer
    assert SGSeg.load(out).segment(toy / JPG).shape == (97, 97)
    run = started_run(toy, tmp_path / "random", backbone="own", weights="auto")
    assert json.loads((run.folder / "config.json").read_text())["config"]["weights"] == "none"
    torch.manual_seed(0)
    assert same(run.net.state_dict(), SGSeg(data.TOY_CLASSES, "own").state_dict())
    assert all(p.requires_grad for p in run.net.parameters())  # random layers are not frozen
    monkeypatch.setattr(Own, "imagenet", "no_such_package:own.pth")
    more = {"backbone": "own", "weights": "auto"}
    problem = refused(partial(started_run, toy, tmp_path / "other", **more))
    assert problem.kind == "weights" and problem.path == "no-such-package"
    monkeypatch.delitem(BACKBONES, "own")
    assert refused(SGSeg.load, out).kind == "model"


# ---- losses, gradients, the fit of the CAM head --------------------------------------------------


def test_losses_by_hand():
    """L_seg reads every fourth pixel of the label; at every eighth pixel Z is exact."""
    torch.manual_seed(0)
    s = torch.tensor([[2.0, -1.0], [0.5, 0.0]])
    y = torch.tensor([[1.0, 0.0], [0.0, 0.0]])  # the second photo has no tag
    Z = torch.randn(2, 3, 5, 5)
    labels = torch.full((2, 33, 33), 255)
    losses = partial(train.losses, lambda x: (None, s, Z, None), torch.zeros(2, 3, 33, 33), y)
    L_cls, L_seg = losses(labels)
    right = [1 / (1 + math.exp(-x)) for x in (2.0, 1.0, -0.5, 0.0)]  # sigmoid(s), sigmoid(-s)
    assert L_cls.item() == pytest.approx(-sum(map(math.log, right)) / 4)
    assert L_seg == 0  # every pixel is undecided: no loss, and not NaN
    labels[:, 1::4] = 1  # between the pixels that are read
    assert losses(labels)[1] == 0
    labels[0, 8, 16] = 2
    labels[1, 32, 0] = 0
    p = Z.softmax(1)
    want = -(math.log(p[0, 2, 1, 2]) + math.log(p[1, 0, 4, 0])) / 2
    assert losses(labels)[1].item() == pytest.approx(want, rel=1e-5)


class Leaves(Backbone):
    """A backbone whose features are leaf tensors, so that their .grad can be read."""

    channels = (5, 6)

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.frozen = [self.stem]

    def forward(self, x):
        low = self.stem(x)[:, :1, ::8, ::8]  # (B,1,H/8,W/8)
        self.mid = torch.ones(len(x), 5, *low.shape[2:], requires_grad=True)
        self.high = torch.ones(len(x), 6, *low[0, 0, ::2, ::2].shape, requires_grad=True)
        return self.mid + 0 * low, self.high + 0 * low[:, :, ::2, ::2]


def reached(run, labels):
    """Return {column of the table in train.losses: "yes" if a gradient arrived, else "no"}."""
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
        cells = re.split("  +", line.strip().replace("*", ""))  # * marks a footnote
        if set(cells[1:]) and set(cells[1:]) <= {"yes", "no"}:
            table[cells[0]] = cells[1:]
        elif cells[0] == "CAM head w":
            columns = cells
    monkeypatch.setitem(BACKBONES, "leaves", Leaves)
    torch.save(Leaves().state_dict(), tmp_path / "w.pth")
    weights = str(tmp_path / "w.pth")
    run = started_run(toy, tmp_path / "run", backbone="leaves", weights=weights)
    x = torch.rand(2, 3, 65, 65)
    labels = torch.randint(0, 5, (2, 65, 65))
    rows = {}
    for n, name in enumerate(("L_cls", "L_seg")):
        train.losses(run.net.train(), x, torch.eye(4)[:2], labels)[n].backward()
        rows[name] = reached(run, [labels])
    maps = []

    def annotate(*args):
        assert not torch.is_grad_enabled()
        maps.extend(train.label_image(*args))
        assert not any(M.requires_grad for M in maps)
        return maps[-4:]

    run.annotate = annotate
    train.refine_labels(run, 1)
    rows["refine_labels"] = reached(run, maps)
    assert len(maps) == 4 * 16
    assert table == {name: [row[column] for column in columns] for name, row in rows.items()}


def test_undecided_pixels_give_no_gradient(monkeypatch):
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


def test_defaults_are_the_constants_of_refine(monkeypatch):
    def check(constants, train_module, sgseg_module):
        cfg = train_module["Config"]()
        assert (cfg.strength[0], cfg.radius, cfg.eps, cfg.lo, cfg.hi) == constants
        network = sgseg_module["SGSeg"](NAMES, "tiny").config
        for name in ("size", "object_bias", "radius", "eps", "self_guided"):
            assert network[name] == getattr(cfg, name)
        for name, (default, *_) in sgseg_module["STAGE_OPTIONS"].items():
            assert default == getattr(refine, name.upper())

    constants = (refine.STRENGTH, refine.RADIUS, refine.EPS, refine.LO, refine.HI)
    check(constants, vars(train), vars(sgseg))
    changed = {"STRENGTH": 7.0, "RADIUS": 5, "EPS": 0.25, "LO": 0.125, "HI": 0.875}
    for name, value in changed.items():
        monkeypatch.setattr(refine, name, value)
    again = runpy.run_path(str(HERE / "sgseg.py"))
    monkeypatch.setitem(sys.modules, "sgseg", SimpleNamespace(**again))
    check((*changed.values(),), runpy.run_path(str(HERE / "train.py")), again)


# from the outputs of a network to a label


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_schedule_and_epochs_of_every_round(rounds):
    cfg = train.Config(rounds=rounds, strength=(50.0, 5.0), lo=0.2, hi=0.6, warmup=2, epochs=3)
    for r in range(1, rounds + 2):
        want = (r > 1, 50.0 if r == 1 else 5.0, *((0.2, 0.6) if r <= rounds else (0.4, 0.4)))
        assert train.schedule(cfg, r) == pytest.approx(want)
    before = [train.epochs_before(cfg, r) for r in range(rounds + 2)]
    assert before == [0, *(2 + 3 * r for r in range(rounds + 1))]


def test_the_trainer_runs_the_four_stages_with_the_numbers_of_the_round(toy):
    torch.manual_seed(0)
    net = SGSeg(NAMES, "tiny", size=97).eval()
    image = read_image(toy / JPG)
    net.cam.weight.data *= 2 / net.outputs(image)[0].amax()  # some scores are above 1
    S, _, Z, mid = net.outputs(image)
    I = data.to_tensor(image)[None]
    tags = torch.tensor([0.0, 1.0, 0.0, 1.0])
    # the fitted CAM head has one scale for all photos; a head trained by gradient descent has not
    fitted = (partial(refine.localization_maps, unit=1.0), *refine.STAGES[1:])
    head = (refine.head_maps, partial(refine.affinity_guided, strength=10.0), refine.self_guided)
    coarse = (*head[:2], partial(refine.self_guided, radius=1, eps=0.1))
    for options, r, scores, stages, lo, hi in (
        ({"weights": "none"}, 1, S, refine.STAGES, 0.30, 0.60),
        ({"warmup": 4}, 1, S, refine.STAGES, 0.30, 0.60),
        ({}, 1, S, fitted, 0.30, 0.60),
        ({"rounds": 0}, 1, S, fitted, 0.45, 0.45),
        ({}, 2, Z, head, 0.30, 0.60),
        ({}, 3, Z, head, 0.30, 0.60),
        ({}, 4, Z, head, 0.45, 0.45),
        ({"affinity": False}, 2, Z, (head[0], None, head[2]), 0.30, 0.60),
        ({"self_guided": False}, 2, Z, (*head[:2], None), 0.30, 0.60),
        ({"radius": 1, "eps": 0.1, "lo": 0.2, "hi": 0.4}, 3, Z, coarse, 0.20, 0.40),
    ):
        trained = train.label_image(net, image, tags, train.Config(**options), r)
        plain = refine.four_stages(scores, mid, I, [1, 3], stages, lo, hi)
        assert len(plain[-1].unique()) > 1
        assert all(torch.equal(a, b) for a, b in zip(trained, plain))


def test_head_maps_of_a_later_round_by_hand():
    """Z = (0, z, 9) everywhere and class 2 has no tag: the map is 1 / (1 + exp(-z / 2)), then
    divided by max(its maximum, 0.3). The walk does not change a constant map."""
    for z, want, stretched in ((-1.0, 0.3775, 1.0), (-4.0, 0.1192, 0.3973)):
        Z = torch.tensor([0.0, z, 9.0]).view(1, 3, 1, 1).repeat(1, 1, 4, 4)
        outputs = (torch.ones(1, 2, 4, 4), torch.ones(1, 2), Z, torch.rand(1, 3, 4, 4))
        net = SimpleNamespace(outputs=lambda image: outputs)
        tags = torch.tensor([1.0, 0.0])
        maps = train.label_image(net, Image.new("RGB", (32, 32)), tags, train.Config(), 2)
        assert [M.shape for M in maps[:3]] == [(1, 1, 4, 4), (1, 1, 4, 4), (1, 1, 32, 32)]
        assert torch.allclose(maps[0], torch.tensor(want), atol=1e-4)
        assert torch.allclose(maps[1], torch.tensor(stretched), atol=1e-3)


def test_your_own_annotate_replaces_label_image_in_labels_panels_and_scores(toy, tmp_path):
    """Here the maps are 1 on the right half, which gets the first tag; the left is undecided."""
    calls = []
    right = np.zeros((97, 97), bool)
    right[:, 48:] = True

    def annotate(net, image, tags, cfg, r):
        calls.append(r)
        M = torch.tensor(right).float().expand(1, int(tags.sum()), 97, 97)
        label = np.where(right, int(tags.argmax()) + 1, 255).astype(np.uint8)
        return M, M, M, torch.tensor(label)[None]

    run = started_run(toy, tmp_path / "run")
    run.annotate = annotate
    train.run_all(run)
    # after every update panels of 2 val images, then labels of 16 photos; at the end the scores
    assert calls == sum(([r] * 2 + [r] * 16 for r in (1, 2, 3)), []) + [1] * 16
    C = C_map = 0
    for i in range(16):
        k = int(run.train_set.tags[i].argmax()) + 1
        assert np.array_equal(run.label(i, 2), np.where(right, k, 255))
        truth = run.train_set.mask(i, (97, 97))
        C = C + confusion(np.where(right, truth, 255), np.full((97, 97), k), 4)
        C_map = C_map + confusion(truth, np.where(right, k, 0), 4)
    rows = results(run.folder)
    assert rows["train self_guided"]["confusion"] == C_map.tolist()
    assert rows["last labels"]["confusion"] == C.tolist()
    assert rows["last labels"]["decided"] == pytest.approx(C.sum() / C_map.sum())
    run.annotate = lambda *arguments: annotate(*arguments)[-1:]  # without maps
    assert train.score_stages(run)["last labels"]["confusion"] == C.tolist()


# fine-tuning, and the fit of the CAM head on ImageNet features


def test_imagenet_weights_are_fine_tuned_as_the_help_says(toy, tmp_path, monkeypatch):
    """Frozen blocks and BatchNorm statistics stay; the heads learn ten times as fast."""
    rates = []
    step = torch.optim.SGD.step

    def watched(opt):
        rates.append([group["lr"] for group in opt.param_groups])
        return step(opt)

    def annotate(net, image, tags, cfg, r):
        return (torch.ones(1, *image.size[::-1], dtype=torch.uint8),)

    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    monkeypatch.setattr(train, "snapshot", lambda run, r: None)
    more = {"backbone": "lite0", "weights": "auto", "rounds": 1, "epochs": 2, "lr": 0.01}
    run = started_run(toy, tmp_path / "run", **more)
    run.annotate = annotate
    train.train(run)
    start = Lite0()
    load_imagenet(start)
    for module, same_module in zip(start.frozen, run.net.backbone.frozen):
        assert same(dict(module.state_dict()), dict(same_module.state_dict()))
    before = start.state_dict()
    after = run.net.backbone.state_dict()
    moved = [name for name in after if not torch.equal(after[name], before[name])]
    assert "conv_head.weight" in moved and not any("running" in name for name in moved)
    decay = [(1 - n / N) ** 0.9 for N in (2, 4) for n in range(N)]  # 16 photos are 2 steps
    assert np.allclose(rates, [(0.01 * d, 0.1 * d) for d in decay])


def test_ridge_minimises_its_objective():
    torch.manual_seed(0)
    x = torch.randn(30, 5) * torch.tensor([1.0, 10.0, 0.1, 3.0, 1.0]) + 2
    t = (torch.rand(30, 2) > 0.5).float()
    w = train.ridge(x, t, 0.7)
    deviation = x.std(0, correction=0)
    z = (x - x.mean(0)) / deviation

    def total(w):
        errors = ((t - t.mean(0) - z @ w.T) ** 2).sum()
        return errors + 0.7 * (z**2).sum(1).mean() * (w**2).sum()

    w_z = (w * deviation).requires_grad_()  # on the scale of z
    gradient = torch.autograd.grad(total(w_z), w_z)[0]
    assert gradient.abs().max() < 1e-3 * total(w_z)
    assert total(w_z) < total(w_z + 0.01) and total(w_z) < total(0.9 * w_z)
    # nothing can be learnt from photos that are all equal
    w = train.ridge(torch.ones(3, 5), torch.tensor([[1.0], [0.0], [1.0]]), 1.0)
    assert w.tolist() == [[0.0] * 5]


def test_samples_of_the_second_fit_by_hand():
    """Two cells, two channels: the map of class 1 is (1, 0.5), that of background is (0, 0.5)."""
    net = SimpleNamespace(cam=lambda high: torch.tensor([[[[9.0, 9.0]], [[2.0, 1.0]]]]))
    high = torch.tensor([[[[4.0, 1.0]], [[0.0, 3.0]]]])
    x, t = train.map_samples(net, high, torch.tensor([0.0, 1.0]))
    assert torch.allclose(x, torch.tensor([[3.0, 1.0], [1.0, 3.0]]))
    assert t.tolist() == [[0.0, 1.0], [0.0, 0.0]]
    x, t = train.map_samples(net, high, torch.zeros(2))  # without a tag all is background
    assert torch.allclose(x, torch.tensor([[2.5, 1.5]])) and t.tolist() == [[0.0, 0.0]]
    x, t = train.photo_sample(net, high, torch.tensor([0.0, 1.0]))
    assert x.tolist() == [[2.5, 1.5]] and t.tolist() == [[0.0, 1.0]]


FITTED = {"backbone": "lite0", "weights": "auto", "warmup": 0, "rounds": 0}


def test_the_fit_solves_two_regressions_once_and_only_on_imagenet_weights(
    toy, tmp_path, monkeypatch
):
    run = started_run(toy, tmp_path / "run", **FITTED)
    for _ in range(2):
        train.fit_cam(run)
        assert [row["what"] for row in run.metrics] == ["fit"]
    fitted = run.net.cam.weight.detach()[:, :, 0, 0].clone()  # (K,C)
    # the first regression has one sample per photo; the second averages features under the maps of
    # the first, and its mean score where the target is 1 is 1/2
    tags = run.train_set.tags
    high = [run.net.features(read_image(path))[1] for path in run.train_set.image_paths]
    w = train.ridge(torch.cat([F_high.mean((2, 3)) for F_high in high]), tags, 1.0)
    with torch.no_grad():
        run.net.cam.weight[:, :, 0, 0] = w
        pairs = [train.map_samples(run.net, F_high, y) for F_high, y in zip(high, tags)]
    x, t = map(torch.cat, zip(*pairs))
    assert (x @ fitted.T)[t == 1].mean() == pytest.approx(0.5, abs=1e-3)
    w = train.ridge(x, t, 10.0)
    assert torch.allclose(fitted / fitted.norm(), w / w.norm(), atol=1e-4)
    # without ImageNet weights nothing is fitted
    run = started_run(toy, tmp_path / "other")
    before = run.net.cam.weight.clone()
    train.fit_cam(run)
    assert torch.equal(run.net.cam.weight, before) and not run.metrics
    # a head that scores its tags below zero is not divided by that score
    monkeypatch.setattr(train, "ridge", lambda x, t, _: torch.full((t.shape[1], x.shape[1]), -0.1))
    run = started_run(toy, tmp_path / "below", **FITTED)
    train.fit_cam(run)
    assert (run.net.cam.weight == -0.1).all()


# ---- the alternation: which files it opens, its scores, stopping and resuming --------------------

FORBIDDEN = set()  # real paths of files that must not be opened now
OPENED = []  # those that were opened all the same


def watch(event, args):
    """Audit hook: called before this process opens any file, by whatever function."""
    if event == "open" and FORBIDDEN and os.path.realpath(str(args[0])) in FORBIDDEN:
        OPENED.append(args[0])
        raise AssertionError(f"{args[0]} was opened")


sys.addaudithook(watch)


@pytest.fixture
def forbidden():
    yield FORBIDDEN
    FORBIDDEN.clear()
    OPENED.clear()


def results(run):
    """Return the scores in a run folder."""
    return json.loads((run / "results.json").read_text())


def labels_of(run, r):
    """{file name: bytes} of the pseudo labels of round r."""
    return {path.name: path.read_bytes() for path in (run / f"pseudo/round{r}").iterdir()}


def test_training_opens_no_mask_of_a_training_image(kit, finished, tmp_path, forbidden):
    """A whole run, validation included, with nonsense masks; scoring at its end opens them."""
    masks = VOC(kit, "train").mask_paths
    for path in masks:
        data.palette_image(np.full((97, 97), 1)).save(path)
    forbidden.update(os.path.realpath(path) for path in masks)
    run = started_run(kit, tmp_path / "run", workers=2)
    train.train(run)
    train.write_masks(run)
    assert not OPENED and [row["what"] for row in run.metrics].count("val") == 2
    assert same(dict(run.net.state_dict()), torch.load(finished / "model.pt")["model"])
    for r in (1, 2, 3):
        assert labels_of(run.folder, r) == labels_of(finished, r)
    train.score_stages(run)
    assert len(OPENED) == 16  # the hook sees them
    # without any mask training is the same and nothing is scored
    shutil.rmtree(kit / "SegmentationClass")
    assert train.main(options(kit, tmp_path / "none")) == 0
    assert results(tmp_path / "none") == {}
    parts = set(differing_outputs(run_outputs(finished), run_outputs(tmp_path / "none")))
    assert parts <= {"metrics", "results", "pictures"}  # no scores, no truth in the panels
    assert all(labels_of(tmp_path / "none", r) == labels_of(finished, r) for r in (1, 2, 3))


def scores_by_hand(truths, labels):
    """Return the IoU of each class that occurs, on decided pixels, and the decided share."""
    hit = np.zeros(5)
    true = np.zeros(5)
    predicted = np.zeros(5)
    pixels = 0
    decided = 0
    for truth, label in zip(truths, labels):
        pixels += (truth != 255).sum()
        both = (truth != 255) & (label != 255)
        decided += both.sum()
        for k in range(5):
            hit[k] += ((truth == k) & (label == k) & both).sum()
            true[k] += ((truth == k) & both).sum()
            predicted[k] += ((label == k) & both).sum()
    iou = [hit[k] / (true[k] + predicted[k] - hit[k]) for k in range(5) if true[k]]
    return iou, decided / pixels


def test_scores_of_a_run_by_hand(finished, toy):
    scores = results(finished)
    photos = VOC(toy, "train")
    photos.scan()
    truths = [photos.mask(i, (97, 97)) for i in range(16)]
    cases = {}
    for r, name in ((1, "labels round1"), (2, "labels round2"), (3, "last labels")):
        paths = [finished / f"pseudo/round{r}/{one}.png" for one in photos.ids]
        cases[name] = [read_mask(path, 4) for path in paths]
    net = SGSeg.load(finished / "warmup.pt")  # whose maps round 1 refined
    cfg = train.Config(**json.loads((finished / "config.json").read_text())["config"])
    for stage, name in enumerate(("train cam", "train affinity", "train self_guided")):
        cases[name] = []
        for i in range(16):
            image = read_image(photos.image_paths[i])
            M = train.label_image(net, image, photos.tags[i], cfg, 1)[stage]
            best, p = F.interpolate(M, (97, 97), mode="bilinear", align_corners=True)[0].max(0)
            k = photos.tags[i].nonzero()[:, 0][p] + 1
            cases[name].append(torch.where(best >= (0.3 + 0.6) / 2, k, 0).numpy())
    val = VOC(toy, "val")
    cases["val seg"] = [SGSeg.load(finished).segment(path) for path in val.image_paths]
    for name, labels in cases.items():
        masks = [val.mask(i, (97, 97)) for i in range(2)] if name == "val seg" else truths
        iou, decided = scores_by_hand(masks, labels)
        assert list(scores[name]["iou"].values()) == pytest.approx(iou)
        assert scores[name]["miou"] == pytest.approx(np.mean(iou))
        assert scores[name]["decided"] == pytest.approx(decided)
    assert set(scores) == set(cases)
    assert (scores["val seg"]["size"], scores["val seg"]["scales"]) == (65, [1.0])


def test_ablation_switches_skip_their_stage_and_supervised_makes_no_labels(
    finished, toy, kit, tmp_path, capsys
):
    iou = {"finished": {row: s["iou"] for row, s in results(finished).items()}}
    cases = (("a", 0, "--no-affinity"), ("s", 0, "--no-self-guided"), ("u", 1, "--supervised"))
    for name, rounds, switch in cases:
        assert train.main(options(toy, tmp_path / name, "--rounds", rounds, switch)) == 0
        iou[name] = {row: s["iou"] for row, s in results(tmp_path / name).items()}
    # the last line names only what is there: with --supervised no labels are made
    listed = capsys.readouterr().out.splitlines()[-1].partition(" holds ")[2].split(", ")
    assert all((tmp_path / "u" / name).exists() for name in listed)
    # after two rounds, too, the scored maps are those of the network after the warm-up
    assert iou["a"]["train cam"] == iou["finished"]["train cam"]
    assert iou["a"]["train affinity"] == iou["a"]["train cam"] != iou["a"]["train self_guided"]
    assert iou["s"]["train affinity"] == iou["s"]["train self_guided"] != iou["s"]["train cam"]
    assert "val seg" not in iou["a"] and "val seg" in iou["u"]  # --rounds 0: no head was trained
    assert not (tmp_path / "a/model.pt").exists() and not (tmp_path / "a/pseudo/round2").exists()
    assert not (tmp_path / "u/pseudo").exists() and not (tmp_path / "u/masks").exists()
    (kit / "SegmentationClass/toy_0005.png").unlink()
    more = {"supervised": True}
    assert refused(partial(started_run, kit, tmp_path / "m", **more)).path.startswith(str(kit))


def test_corrected_masks_are_their_photos_labels(toy, finished, tmp_path, monkeypatch):
    """They are used in every round and in masks/; only the other photos are labelled and scored."""
    photos = VOC(toy, "train")
    photos.scan()
    fixed = tmp_path / "fixed"
    corrected = {}
    for i in (3, 7):
        mask = np.full((97, 97), 255, np.uint8)
        mask[:40] = 0
        mask[40:60] = photos.tags[i].nonzero()[0, 0] + 1
        corrected[photos.ids[i]] = mask
        data.write(fixed / f"{photos.ids[i]}.png", data.palette_image(mask))
    for name, k in (("stranger", 0), (photos.ids[0], 1 + int(photos.tags[0].argmin()))):
        path = tmp_path / f"wrong/{name}.png"
        data.write(path, mask_of(k))
        given = {"corrected": str(path.parent)}
        assert refused(partial(started_run, toy, tmp_path / "r", **given)).path == str(path)
        path.unlink()
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_at_step(4, patch)
        assert train.main(options(toy, out, "--corrected", fixed)) == 130
    assert resume(out) == 0  # with the same masks, without the option
    for name, mask in corrected.items():
        files = [out / f"pseudo/round{r}/{name}.png" for r in (1, 2, 3)]
        for path in [*files, out / f"masks/{name}.png"]:
            assert (read_mask(path, 4) == mask).all()
    automatic = {name for name in labels_of(finished, 1) if name[:-4] not in corrected}
    assert all(labels_of(out, 1)[name] == labels_of(finished, 1)[name] for name in automatic)
    others = [i for i in range(16) if photos.ids[i] not in corrected]
    labels = [read_mask(out / f"masks/{photos.ids[i]}.png", 4) for i in others]
    iou, _ = scores_by_hand([photos.mask(i, (97, 97)) for i in others], labels)
    assert results(out)["last labels"]["miou"] == pytest.approx(np.mean(iou))
    assert results(out)["last labels"]["left_out_because_corrected"] == list(corrected)
    data.write(fixed / f"{photos.ids[3]}.png", mask_of(0))  # another mask, then none
    assert refused(train.load_run, out).kind == "corrected"
    (fixed / f"{photos.ids[3]}.png").unlink()
    assert refused(train.load_run, out).kind == "corrected"


@pytest.mark.parametrize("kind", ["damaged", "other tags", "all 255", "no warm-up"])
def test_bad_training_masks_only_remove_their_own_scores(kind, kit, copied, finished, capsys):
    """val is scored all the same, as are photos with good masks; a warning names the bad one."""
    run = train.load_run(copied, {"voc": str(kit)})
    named = "warmup.pt" if kind == "no warm-up" else "toy_0000"
    masks = [str(path.relative_to(kit)) for path in run.train_set.mask_paths]
    undecided = dict.fromkeys(masks, mask_of(255))
    change(kit, {"damaged": {masks[0]: b"no picture"}, "all 255": undecided}.get(kind, {}))
    change(kit, dict.fromkeys(masks, shift_classes) if kind == "other tags" else {})
    change(copied, {named: b""} if kind == "no warm-up" else {})
    capsys.readouterr()
    train.evaluate(run)
    warned = capsys.readouterr().err
    assert warned.startswith("warning: ") and named in warned and warned.count("\n") == 1
    rows = results(copied)
    assert rows["val seg"] == results(finished)["val seg"]
    assert "NaN" not in (copied / "results.json").read_text()
    if kind == "damaged":
        assert set(rows) == set(results(finished))
        labels = [run.label(i, 1) for i in range(1, 16)]
        iou, _ = scores_by_hand([run.train_set.mask(i, (97, 97)) for i in range(1, 16)], labels)
        assert rows["labels round1"]["miou"] == pytest.approx(np.mean(iou))
    else:
        assert set(rows) == {"val seg"}


def test_scores_on_other_data_or_settings_have_their_own_files(copied, kit):
    """On another devkit and split, at all scales, at another size; results.json stays."""
    before = (copied / "results.json").read_text()
    (kit / "ImageSets/Segmentation/some.txt").write_text("toy_0003\ntoy_0016\n")
    argv = ["--eval", str(copied), *CPU]
    elsewhere = [*argv, "--voc", str(kit), "--split", "some"]
    scores = []
    for line, name in (
        (elsewhere, "kit_some_size65_bias0.75_1scales"),
        ([*elsewhere, "--object-bias", "9"], "kit_some_size65_bias9_1scales"),
        ([*argv, "--voc", str(kit), "--size", "97"], "kit_val_size97_bias0.75_1scales"),
        ([*argv, "--multi-scale"], "size65_bias0.75_5scales"),
    ):
        assert train.main(line) == 0
        rows = json.loads((copied / f"results_{name}.json").read_text())
        scores.append(rows.get("some") or rows.get("val seg") or rows["val"])
    net = SGSeg.load(copied)
    photos = VOC(kit, "some")
    labels = [net.segment(path) for path in photos.image_paths]
    iou, _ = scores_by_hand([photos.mask(i, (97, 97)) for i in range(2)], labels)
    assert scores[0]["miou"] == pytest.approx(np.mean(iou))
    assert scores[1]["iou"] != scores[0]["iou"] and len(scores[3]["scales"]) == 5
    assert (copied / "results.json").read_text() == before
    (kit / "classes.txt").write_text("\n".join(reversed(data.TOY_CLASSES)))
    assert train.main(elsewhere) == 2


def test_eval_of_a_read_only_run_prints_its_table(copied, finished, monkeypatch, capsys):
    (copied / "results.json").unlink()
    argv = ["--eval", str(copied), *CPU]
    assert train.main(argv) == 0  # a copy of the run has the same scores
    assert results(copied) == results(finished)
    capsys.readouterr()
    monkeypatch.setattr(os, "replace", disk_full)
    assert train.main(argv) == 2
    assert "val seg" in capsys.readouterr().out


# ---- stopped, killed and resumed


def blank(rows):
    """Replace data.sheet, which takes a third of the time of such a small run."""
    return Image.new("RGB", (16, 16))


def die_at_write(n):
    """In the child: end the process at its n-th write, with half of the file on disk."""
    writes = []
    data.sheet = blank

    def die(fd):
        writes.append(fd)
        if len(writes) == n:
            os.ftruncate(fd, os.fstat(fd).st_size // 2)
            os._exit(99)

    os.fsync = die


def test_a_run_killed_at_any_write_resumes_bit_for_bit(tmp_path, monkeypatch):
    """Use two photos. A run with a checkpoint is resumed; one without is started again."""
    kit = make_toy(tmp_path / "kit", train=2, val=1, seed=3)
    more = ["--rounds", 1, "--batch", 2, "--size", 33]
    writes = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", writes.append)
        patch.setattr(data, "sheet", blank)
        assert train.main(options(kit, tmp_path / "whole", *more)) == 0
    whole = run_outputs(tmp_path / "whole")
    saved = 0
    for first in range(1, len(writes) + 1, 2):  # two at a time, one per core
        outs = {n: tmp_path / f"run{n}" for n in (first, first + 1) if n <= len(writes)}
        for kill in (True, False):
            processes = {}
            for n, out in outs.items():
                argv = options(kit, out, *more)
                if not kill and (out / "checkpoint.pt").exists():
                    argv = ["--out", out, "--resume", *CPU]
                    saved += 1
                args = (die_at_write, n if kill else 0)
                processes[n] = start_child(f"{out}.log", train_in_child, argv, *args)
            for n, out in outs.items():
                message = Path(f"{out}.log").read_text() if exit_status(processes[n]) else ""
                assert processes[n].exitcode == (99 if kill else 0), (n, message)
        for n, out in outs.items():
            assert differing_outputs(whole, run_outputs(out)) == [], n
            assert not list(out.rglob(".sgseg-*"))  # no temporary file stays
    assert saved > 15


STOPS = {  # how a run is stopped: exit status, what the message names, epochs and labels saved
    "Ctrl-C in the first epoch": (130, "--resume", 0, 0),
    "Ctrl-C in the last epoch": (130, "--resume", 2, 32),
    "full disk in refine 2": (2, "No space left", 2, 21),
    "a damaged photo": (2, JPG, 0, 0),
}


@pytest.mark.parametrize("how", STOPS)
def test_a_stopped_moved_and_resumed_run_equals_an_uninterrupted_one(
    how, kit, finished, tmp_path, monkeypatch, capsys
):
    """At most one epoch is repeated; labels on disk are not written again (same mtime)."""
    fsync = os.fsync
    scan_data = train.scan_data
    photo = (kit / JPG).read_bytes()

    def stop_refine(fd):
        return disk_full() if Path("run/pseudo/round2/toy_0004.png").exists() else fsync(fd)

    def damage(*args):
        scan_data(*args)
        Path("kit", JPG).write_bytes(b"no photo")

    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        if "epoch" in how:
            interrupt_at_step(2 if "first" in how else 5, patch)
        elif "refine" in how:
            patch.setattr(os, "fsync", stop_refine)
        else:
            patch.setattr(train, "scan_data", damage)
        status, word, epochs, labels = STOPS[how]
        assert train.main(options("kit", "run", "--workers", 2)) == status
        assert word in capsys.readouterr().err
    out = Path("run").rename(tmp_path / "moved")
    kit = kit.rename(tmp_path / "renamed")
    assert data.load(out / "checkpoint.pt")["epoch"] == epochs and not list(out.rglob(".sgseg-*"))
    kept = {path: path.stat().st_mtime_ns for path in (out / "pseudo").rglob("*.png")}
    assert len(kept) == labels
    assert resume(out) == 2  # the photos are elsewhere
    if "damaged" in how:
        assert resume(out, "--voc", str(kit)) == 2 and word in capsys.readouterr().err
        (kit / JPG).write_bytes(photo)
    assert resume(out, "--voc", "renamed") == 0
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    assert differing_outputs(run_outputs(finished), run_outputs(out)) == []


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_locks_its_folder_until_a_signal_ends_it(kind, toy, finished, tmp_path):
    """Stop a run at a random moment by SIGTERM or SIGKILL, and resume it bit for bit."""
    out = tmp_path / "run"
    argv = [HERE / "train.py", *options(toy, out, "--workers", 2)]
    process = start_child(tmp_path / "log", script_in_child, argv)
    while process.is_alive() and not (out / "checkpoint.pt").exists():
        time.sleep(0.01)
    error = refused(train.lock_folder, out)
    assert (error.kind, error.path) == ("lock", str(out)) and resume(out) == 2
    seconds = random.random() / 4
    print(f"after {seconds} seconds")
    time.sleep(seconds)
    os.kill(process.pid, kind)
    assert exit_status(process, 20) == (-9 if kind == signal.SIGKILL else 130)
    message = (tmp_path / "log").read_text()
    assert "Traceback" not in message and ("--resume" in message) == (kind != signal.SIGKILL)
    assert resume(out) == 0
    assert differing_outputs(run_outputs(finished), run_outputs(out)) == []


@pytest.mark.parametrize(
    "name", ["notes.txt", "config.json", "panels/mine.png", "lock", "lock/file", "toy", "toy/file"]
)
def test_files_of_others_are_never_overwritten(name, tmp_path, capsys):
    """Nor are files added to their folder. The same holds if the name is a link to a file."""
    out = tmp_path / "out"
    path = out / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    assert train.main(["--out", str(out), *CPU]) == 2
    assert str(out) in error_line(capsys)
    theirs = path.rename(tmp_path / "theirs")
    path.symlink_to(theirs)
    assert train.main(["--out", str(out), *CPU]) == 2
    assert theirs.read_text() == "mine" and path.is_symlink()
    assert {found.name for found in out.iterdir()} <= {Path(name).parts[0], "lock"}


def test_the_data_and_options_must_be_those_with_which_the_run_started(copied, kit, toy, capsys):
    """The data are the tags, the classes and the ids."""
    before = run_outputs(copied)
    assert train.main(options(toy, copied)) == 2  # another run in the same folder
    assert "--resume" in error_line(capsys)
    assert resume(copied, "--lr", "0.5", "--workers", "1", "--weights", "auto") == 2
    message = error_line(capsys)
    assert "--lr" in message and "--workers" not in message and "--weights" not in message
    assert resume(copied, "--no-affinity") == 2
    assert "--affinity, not --no-affinity" in error_line(capsys)
    assert differing_outputs(before, run_outputs(copied)) == []
    everything = annotation(*data.TOY_CLASSES).encode()
    few = "\n".join(f"toy_{n:04d}" for n in range(9)).encode()
    few_aug = LIST.replace("train", "train_aug")
    another_order = "\n".join(reversed(data.TOY_CLASSES)).encode()
    for changes, kind in (
        ({few_aug: few}, "ids"),
        ({few_aug: None, XML: everything}, "tags"),
        ({LIST: few}, "ids"),
        ({"classes.txt": another_order}, "classes"),
    ):
        change(kit, changes)
        assert refused(train.load_run, copied, {"voc": str(kit)}).kind == kind


def test_photos_of_another_size_are_not_scored_with_old_labels(copied, kit, capsys):
    shutil.rmtree(kit / "SegmentationClass")
    change(kit, {JPG: empty(size=(60, 60))})
    assert resume(copied, "--voc", str(kit)) == 2
    assert f"{Path(JPG).stem}.png" in error_line(capsys)


@pytest.mark.parametrize("what", ["loss", "weights"])
def test_numbers_that_are_not_finite_end_a_run_and_are_not_saved(what, toy, tmp_path, monkeypatch):
    """A loss in the third step, gradients in the fourth; the checkpoint is from before."""
    losses = train.losses
    steps = []

    def not_finite(*args):
        steps.append(1)
        L_cls, L_seg = losses(*args)
        if what == "weights" and len(steps) == 4:
            L_cls.register_hook(lambda gradient: gradient * math.inf)
        return L_cls * (math.nan if what == "loss" and len(steps) == 3 else 1), L_seg

    monkeypatch.setattr(train, "losses", not_finite)
    assert train.main(options(toy, tmp_path / "run")) == 2
    state = data.load(tmp_path / "run/checkpoint.pt")
    assert state["epoch"] == 1 and all(v.isfinite().all() for v in state["model"].values())


def test_locks_fsync_and_workers_do_not_change_the_result(
    toy, finished, tmp_path, monkeypatch, capsys
):
    """The file system supports neither locks nor fsync, and threads read ahead."""

    def unsupported(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(train.fcntl, "lockf", unsupported)
    monkeypatch.setattr(os, "fsync", unsupported)
    assert train.main(options(toy, tmp_path / "run", "--workers", 2)) == 0
    assert sum("lock" in line for line in capsys.readouterr().err.splitlines()) == 1
    assert differing_outputs(run_outputs(finished), run_outputs(tmp_path / "run")) == []


def test_output_errors_are_ignored(tmp_path):
    closed = open(tmp_path / "closed", "w")
    closed.close()
    for stream in (closed, open("/dev/full", "w")):
        data.print_line("Schäfchen", stream=stream)
    with open(tmp_path / "ascii", "w", encoding="ascii") as stream:
        data.print_line("Schäfchen \x1b", stream=stream)
    assert (tmp_path / "ascii").read_text() == "Sch?fchen ?\n"


def test_the_modules_import_without_unix_only_modules():
    code = (
        "import sys; sys.modules |= dict.fromkeys(['fcntl', 'resource', 'pwd', 'grp', 'termios'])"
    )
    argv = [sys.executable, "-c", f"{code}; import data, sgseg, train"]
    assert subprocess.run(argv, cwd=HERE).returncode == 0


# ---- the toy run, by now finished on the other core


def test_two_rounds_on_the_toy_set_learn(learnt):
    miou = {name: row["miou"] for name, row in results(learnt).items()}
    assert miou["train self_guided"] > miou["train affinity"] > miou["train cam"]
    assert miou["val seg"] >= 0.80
    assert miou["last labels"] > miou["labels round1"] > miou["train self_guided"]
    cfg = train.Config(**json.loads((learnt / "config.json").read_text())["config"])
    photos = VOC(learnt / "toy", "train")
    photos.scan()
    net = SGSeg.load(learnt / "warmup.pt")
    thresholds = [t / 20 for t in range(1, 20)]
    C = np.zeros((3, len(thresholds), 5, 5), int)  # stages 1 to 3, each at every threshold
    for i in range(0, 240, 8):
        truth = photos.mask(i, (97, 97))
        tagged = photos.tags[i].nonzero()[:, 0].tolist()
        image = read_image(photos.image_paths[i])
        for stage, M in enumerate(train.label_image(net, image, photos.tags[i], cfg, 1)[:3]):
            M = refine.upsample(M, (97, 97))
            for n, t in enumerate(thresholds):
                C[stage, n] += confusion(truth, refine.pseudo_labels(M, tagged, t, t)[0].numpy(), 4)
    best = [max(summary(C_t, photos.class_names)["miou"] for C_t in C_stage) for C_stage in C]
    assert best[1] > best[0] and best[2] > best[0] + 0.1  # each at its own best threshold
    val = VOC(learnt / "toy", "val")
    net = SGSeg(val.class_names, "tiny", size=97, object_bias=0.0).eval()
    C = sum(confusion(val.mask(i, (97, 97)), net.segment(val.image_paths[i]), 4) for i in range(20))
    assert summary(C, val.class_names)["miou"] < 0.3  # untrained weights do not reach the bound


def test_the_run_folder_records_the_run_and_labels_hold_only_tagged_classes(learnt):
    config = json.loads((learnt / "config.json").read_text())
    assert config["config"]["backbone"] == "tiny" and config["torch"] == torch.__version__
    assert config["command"] == ["--out", str(learnt)] and config["threads"] == 1
    metrics = [json.loads(line) for line in (learnt / "metrics.jsonl").read_text().splitlines()]
    assert [m["round"] for m in metrics if m["what"] == "val"] == [1, 2]
    assert [m["round"] for m in metrics if m["what"] == "labels"] == [1, 2, 3]
    epochs = train.epochs_before(train.Config(**config["config"]), 3)
    assert [m["epoch"] for m in metrics if m["what"] == "update"] == list(range(1, epochs + 1))
    assert all(Image.open(learnt / f"panels/round{r}.png").width > 900 for r in (0, 1, 2))
    assert "1 disc #800000" in (learnt / "classes.txt").read_text().splitlines()
    photos = VOC(learnt / "toy", "train")
    photos.scan()
    for name, tags in zip(photos.ids, photos.tags):
        tagged = {0, *(tags.nonzero()[:, 0] + 1).tolist()}
        files = [learnt / f"pseudo/round{r}/{name}.png" for r in (1, 2, 3)]
        first, second, last = [read_mask(path, 4) for path in files]
        assert set(np.unique(first)) | set(np.unique(second)) <= tagged | {255}
        assert set(np.unique(last)) <= tagged  # the last refine step decides every pixel
        assert (read_mask(learnt / f"masks/{name}.png", 4) == last).all()


def test_the_toy_set_is_there_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    """Fill the disk while it is written, start again, move the run and resume it."""
    out = tmp_path / "run"
    few = "--warmup 1 --rounds 1 --epochs 1 --min-steps 1 --batch 4 --device cpu".split()
    argv = ["--out", str(out), *few]
    monkeypatch.setattr(data, "make_toy", partial(make_toy, train=4, val=1))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", disk_full)
        assert train.main(argv) == 2
    assert "No space left" in error_line(capsys) and not (out / "toy").exists()
    assert list(out.glob(".sgseg-*"))  # what a killed run would leave, too
    assert train.main(argv) == 0
    assert len(VOC(out / "toy", "train").ids) == 4 and not list(out.glob(".sgseg-*"))
    before = run_outputs(out)
    out.rename(tmp_path / "moved")
    assert resume(tmp_path / "moved") == 0
    assert differing_outputs(before, run_outputs(tmp_path / "moved")) == []


# ---- data and pictures ---------------------------------------------------------------------------

REAL_XML = """<annotation><folder>VOC2012</folder><filename>x.jpg</filename>
<size><width>97</width></size><object><name>person</name><difficult>0</difficult>
<part><name>head</name></part><part><name>hand</name></part></object>
<object><name>person</name></object>
<object><name>sofa</name><difficult>1</difficult></object></annotation>"""


@pytest.mark.parametrize("text, names", [
    (REAL_XML, {"person", "sofa"}),  # parts are not objects
    ("<annotation></annotation>", set()),
    ("\ufeff<annotation><object><name> cat\n</name></object></annotation>", {"cat"}),
    ("<annotation><note><![CDATA[<b> & ]]></note></annotation>", set()),  # no DOCTYPE
])  # fmt: skip
def test_annotations_of_voc_are_read(text, names, tmp_path):
    (tmp_path / "x.xml").write_text(text)
    assert read_tags(tmp_path / "x.xml", data.VOC_CLASSES) == names


@pytest.mark.parametrize("content, ids", [
    (b"\xef\xbb\xbfa  1\r\n\r\nb -1\r\nc  0\r\na 1\r\n2007_000.032\n", "a c 2007_000.032"),
    (b"x.jpg\ny.JPG\nz.png\nv.2.jpeg\n", "x y z v.2"),
    (b"/JPEGImages/a.jpg /SegmentationClassAug/a.png\n/JPEGImages/b.jpg /S/b.png\n", "a b"),
])  # fmt: skip
def test_lists_are_read_in_all_their_forms(content, ids, tmp_path):
    (tmp_path / "l.txt").write_bytes(content)
    assert read_list(tmp_path / "l.txt") == ids.split()


def test_photos_are_found_by_their_name_without_extension(kit, tmp_path, capsys):
    """.JPG, .jfif, .png; ids with extensions; lists of pairs; from any folder above: one set."""
    photos = VOC(kit, "train")
    ids = photos.ids
    pixels = np.asarray(read_image(photos.image_paths[1]))
    for n, ending in enumerate((".JPG", ".jfif", ".png")):
        photos.image_paths[n].rename(kit / f"JPEGImages/{ids[n]}{ending}")
    change(kit, {f"JPEGImages/{ids[3]}.png": empty()})  # of two, .jpg wins
    (tmp_path / "VOCdevkit").mkdir()
    (tmp_path / "VOCdevkit" / "VOC2012").symlink_to(kit)
    pairs = [f"/JPEGImages/{name}.jpg /SegmentationClass/{name}.png" for name in ids]
    endings = [f"{name}.jpg" for name in ids]
    for path, lines in ((kit, ids), (tmp_path, endings), (tmp_path / "VOCdevkit", pairs)):
        (kit / LIST).write_text("\n".join(lines))
        photos = VOC(path, "train")
        photos.scan(masks=True)
        assert photos.ids == ids and np.array_equal(read_image(photos.image_paths[1]), pixels)
        assert [p.suffix for p in photos.image_paths[:4]] == [".JPG", ".jfif", ".png", ".jpg"]


def test_train_aug_and_its_masks_win_over_train(kit, capsys):
    lists = "ImageSets/Segmentation"
    change(kit, {f"{lists}/train_aug.txt": b"toy_0003\ntoy_0004\n"})
    change(kit, {f"{lists}/val.txt": b"toy_0016\ntoy_0004\n"})
    change(kit, {"SegmentationClassAug/toy_0003.png": mask_of(1)})
    photos = VOC(kit, "train")
    assert photos.ids == ["toy_0003", "toy_0004"]
    assert photos.mask_paths[0].parent.name == "SegmentationClassAug"
    capsys.readouterr()
    data.open_devkit(kit)
    left_out, both = capsys.readouterr().err.splitlines()
    assert "train_aug.txt" in left_out and "14" in left_out
    assert "val.txt" in both and "toy_0004" in both


def grey_picture(mode, value):
    """Return a 30x20 picture of one grey value, in any mode. In mode 1 only 0 and 255 are exact."""
    if mode == "I;16":
        return Image.fromarray(np.full((20, 30), value * 256 + 7, np.uint16))
    grey = Image.fromarray(np.full((20, 30), value, np.uint8))
    return grey.quantize() if mode == "P" else grey.convert("RGB").convert(mode)


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "I;16", "1", "LA"])
def test_image_modes_are_read_correctly(mode, tmp_path):
    value = 255 if mode == "1" else 200
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    grey_picture(mode, value).save(path)
    for source in (path, Image.open(path), read_image(path)):
        pixels = np.asarray(read_image(source)).astype(int)
        assert pixels.shape == (20, 30, 3) and abs(pixels - value).max() <= 8
    if mode == "I;16":
        assert (np.asarray(read_image(encoded(grey_picture(mode, value), "TIFF"))) == value).all()


def test_colours_of_palette_heatmap_overlay_and_sheet():
    colours = np.reshape(data.palette_image(np.zeros((1, 1))).getpalette(), (256, 3)).tolist()
    assert colours[:2] == [[0, 0, 0], [128, 0, 0]] and colours[20] == [0, 64, 128]  # VOC's
    assert colours[15] == [192, 128, 128] and colours[255] == [224, 224, 192]
    grey = Image.new("RGB", (30, 20), (100, 100, 100))
    right = np.zeros((20, 30), np.uint8)
    right[:, 15:] = 1
    hot = np.asarray(data.heatmap(grey, torch.tensor(right).float())).astype(int)
    assert hot[0, 0].argmax() == 2 and hot[0, 29].argmax() == 0  # blue is 0, red is 1
    # red is 0.4 * 100 where the map is 0, and 0.4 * 100 + 0.5 * 153 where it is 1
    assert abs(hot[0, 0, 0] - 40) <= 1 and abs(hot[0, 29, 0] - 116) <= 1
    drawn = np.asarray(data.overlay(grey, right)).astype(int)
    assert drawn[0, 29].argmax() == 0 and abs(drawn[0, 0] - 40).max() <= 1
    assert (np.asarray(data.overlay(grey, right, ["background", "cat"])) != drawn).any()  # legend
    page = data.sheet([{"a": grey, "b": grey}, {"c": grey}], width=60)
    assert page.size == (128, 116)  # columns of 60 + 4, rows of 40 + 18
    pixels = np.asarray(page).astype(int)
    assert (pixels[[15, 15, 73], [0, 64, 0]] == 100).all() and (pixels[73, 64:] == 255).all()
    for size in ((16, 100_000), (100_000, 16)):  # panels of strips stay small
        strip = Image.new("RGB", size)
        page = data.sheet([{"photo": strip, "map": strip}] * 2)
        assert page.width * page.height < 1_000_000 and page.width == 2 * 164


def test_crops_are_a_function_of_seed_epoch_and_index(toy):
    photos = VOC(toy, "train")
    photos.scan()

    def crop(seed, epoch, masks=photos.mask_paths):
        return Crops(photos, 65, 97, (0.5, 1.5), seed, epoch, masks)[5]

    x, y, label, i = crop(0, 3)
    assert torch.equal(x, crop(0, 3)[0]) and torch.equal(label, crop(0, 3)[2])
    assert not torch.equal(x, crop(0, 4)[0]) and not torch.equal(x, crop(1, 3)[0])
    assert x.shape == (3, 65, 65) and label.shape == (65, 65) and i == 5
    assert 0 <= x.min() and x.max() <= 1 and torch.equal(y, photos.tags[5])
    without_masks = crop(0, 3, None)
    assert torch.equal(without_masks[0], x) and without_masks[2].eq(255).all()


def test_crops_move_labels_with_pixels(tmp_path):
    """Crop an image that equals its label map. Outside it the crop is grey, and its label 255."""
    marked = make_toy(tmp_path / "marked", train=4, val=1)
    photos = VOC(marked, "train")
    photos.scan()
    mask = np.zeros((97, 97), np.uint8)
    mask[20:60, 30:80] = 3
    Image.fromarray(mask).save(marked / "label.png")
    for i in range(4):
        Image.fromarray(np.repeat(mask[:, :, None] * 85, 3, 2)).save(photos.image_paths[i], "PNG")
        x, _, label, _ = Crops(photos, 65, 97, (0.6, 1.4), 0, 0, [marked / "label.png"] * 4)[i]
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
    scores = summary(C, ["a", "b", "c"])  # c is in no mask
    assert scores["iou"] == pytest.approx({"background": 1 / 3, "a": 2 / 3, "b": 0.0})
    assert scores["miou"] == pytest.approx(1 / 3)
    assert scores["precision"] == {"background": 0.5, "a": pytest.approx(2 / 3), "b": None}
    assert scores["recall"] == {"background": 0.5, "a": 1.0, "b": 0.0}
    assert scores["confusion"] == C.tolist()
    C = np.eye(21, dtype=int)
    C[8, 9] = 1  # half of the pixels of cat are predicted as chair; both classes count
    assert summary(C, data.VOC_CLASSES)["miou"] == pytest.approx((19 + 0.5 + 0.5) / 21)
    zeros = np.zeros((2, 3), int)
    for target, prediction in ((zeros + 5, zeros), (zeros, zeros + 5), (zeros, zeros + 255)):
        with pytest.raises(ValueError):  # indices that are not classes
            confusion(target, prediction, 4)


def test_writes_are_atomic_and_follow_no_links(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file"
    data.write(path, "ä\n")
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, disk_full)
            error = refused(data.write, path, b"new")
        assert error.kind == "write" and error.path == str(path) and "No space left" in str(error)
        assert path.read_bytes() == "ä\n".encode()
        assert [p.name for p in path.parent.iterdir()] == ["file"]  # no temporary file stays
    data.write(path, {"x": torch.ones(2)})
    assert same(data.load(path), {"x": torch.ones(2)})
    theirs = tmp_path / "theirs"
    theirs.write_text("mine")
    for name in ("a", ".sgseg-0.tmp"):
        (tmp_path / name).symlink_to(theirs)
    data.write(tmp_path / "a", "ours")  # the link is replaced, not its file
    assert (tmp_path / "a").read_text() == "ours" and not (tmp_path / "a").is_symlink()
    monkeypatch.setattr(data.secrets, "token_hex", lambda n: "0")  # a temporary name that is taken
    assert refused(data.write, tmp_path / "b", "ours").kind == "write"
    assert theirs.read_text() == "mine" and not (tmp_path / "b").exists()


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("mask", [mask_of(255), None], ids=["black and white", "shifted"])
def test_masks_that_contradict_the_tags_are_refused(mask, split, kit):
    """A single one is accepted. Black and white: one class exported as 255."""
    photos = VOC(kit, split)
    masks = [str(path.relative_to(kit)) for path in photos.mask_paths]
    change(kit, {masks[1]: mask or shift_classes})
    photos.scan(masks=True)
    change(kit, dict.fromkeys(masks[2:], mask or shift_classes) | {masks[0]: mask_of(0)})
    error = refused(partial(photos.scan, masks=True))
    assert error.kind == "masks" and photos.ids[0] in str(error)


def test_photos_without_a_tag_are_negatives(kit, tmp_path):
    """Val photos need no tags. Untagged training photos are negatives; their masks may be empty."""
    (kit / f"Annotations/{VAL}.xml").unlink()
    negatives = [f"toy_{n:04d}" for n in range(9)]  # most of the training photos
    for name in [*negatives, "toy_0017"]:
        (kit / f"Annotations/{name}.xml").write_text(annotation())
        (kit / f"SegmentationClass/{name}.png").write_bytes(mask_of(0))
    out = tmp_path / "run"
    assert train.main(options(kit, out, "--rounds", 1)) == 0
    for r in (1, 2):
        for name in negatives:
            assert not read_mask(out / f"pseudo/round{r}/{name}.png", 4).any()
        assert read_mask(out / f"pseudo/round{r}/toy_0010.png", 4).any()
    assert {"val seg", "labels round1"} <= set(results(out))


def test_a_class_on_every_training_photo_or_on_none_gives_a_warning(kit, capsys):
    for path in (kit / "Annotations").glob("*.xml"):
        path.write_text(annotation("disc", *read_tags(path, data.TOY_CLASSES) - {"cross", "disc"}))
    VOC(kit, "train").scan()
    every, none = capsys.readouterr().err.splitlines()
    assert "disc" in every and every.startswith("warning: ")
    assert "cross" in none and none.startswith("warning: ")
    VOC(kit, "val").scan()
    assert not capsys.readouterr().err


# ---- several processes ---------------------------------------------------------------------------


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory: 9 bytes")])
def test_full_memory_is_one_line_with_a_remedy(error, toy, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise error

    monkeypatch.setattr(train, "update_step", full)
    assert train.main(options(toy, tmp_path / "run")) == 2
    message = error_line(capsys)
    assert "memory" in message and "--batch" in message and well_formed(message, "sgseg: ")


def test_several_processes_need_a_gpu_each(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert train.check(train.Config(device="auto")).device.startswith("cuda")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(train.dist, "is_initialized", lambda: True)
    for device in ("auto", "cuda", "cuda:0"):
        assert refused(train.check, train.Config(device=device)).kind == "processes"
    assert train.check(train.Config(device="cpu")).device == "cpu"


def as_rank(rank, world_size, port, n, shared):
    """In the child: set torchrun's variables, and let rank 0 die at its n-th write.

    After the warm-up, whose gradients depend on the number of processes, load the network from the
    file `shared`.
    """
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
    os.environ |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"TORCHELASTIC_RUN_ID": "0"}
    die_at_write(0 if rank else n)
    update = train.update

    def then_shared(run, r):
        update(run, r)
        if r == 0 and run.epoch == run.cfg.warmup:  # on resume as well: no round has ended
            run.net.load_state_dict(data.load(shared)["model"])

    train.update = then_shared


def side_by_side(out, argv, shared, n=0):
    """Return (exit status, stderr) of each of the two processes of one run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = [Path(f"{out}.{rank}") for rank in (0, 1)]
    processes = []
    for rank, log in enumerate(logs):
        processes.append(
            start_child(log, train_in_child, argv, as_rank, rank, 2, port, n, str(shared))
        )
    statuses = [exit_status(process) for process in processes]
    return [(status, log.read_text()) for status, log in zip(statuses, logs)]


def test_two_processes_make_the_same_labels_as_one_and_resume_after_a_kill(toy, finished, tmp_path):
    """The labels and scores of round 1 are the same byte for byte, because both start from one
    network. A run of two processes that is killed in an update resumes byte for byte."""
    out = tmp_path / "whole"
    shared = finished / "warmup.pt"
    both = side_by_side(out, options(toy, out), shared)
    assert [status for status, _ in both] == [0, 0], both
    assert labels_of(out, 1) == labels_of(finished, 1) and len(labels_of(out, 1)) == 16
    for name in ("train cam", "train affinity", "train self_guided", "labels round1"):
        assert results(out)[name] == results(finished)[name]
    again = tmp_path / "killed"
    dead, alive = side_by_side(again, options(toy, again), shared, n=25)
    assert dead[0] == 99 and alive[0] == 2
    assert alive[1].count("\n") == 1 and "Traceback" not in alive[1]
    both = side_by_side(again, ["--out", again, "--resume", *CPU], shared)
    assert [status for status, _ in both] == [0, 0], both
    assert differing_outputs(run_outputs(out), run_outputs(again)) == []
    # refused before anything is written: a folder with files, a batch that cannot be halved
    first, second = side_by_side(tmp_path / "log", options(toy, finished), shared)
    assert first[0] == second[0] == 2 and str(finished) in first[1] and first[1].count("\n") == 1
    out = tmp_path / "odd"
    first, second = side_by_side(out, options(toy, out, "--batch", 5), shared)
    assert first[0] == second[0] == 2 and "--batch" in first[1]
    assert [path.name for path in out.iterdir()] == ["lock"]


# ---- bad input is rejected by a message that names it --------------------------------------------


def all_annotations(text):
    """Return the changes that write the same text to the XML files of all photos."""
    return {f"Annotations/toy_{n:04d}.xml": text.encode() for n in range(18)}


NAMESPACED = b'<annotation xmlns="http://voc"><object><name>disc</name></object></annotation>'
PAGE = "<html><body>Log in to download</body></html>"
VAL_JPG = f"JPEGImages/{VAL}.jpg"
VAL_XML = f"Annotations/{VAL}.xml"
MASK2 = "SegmentationClass/toy_0017.png"


NUMBERED = "\n".join(map(str, range(255))).encode()
ENTITY_BOMB = f'<!DOCTYPE a [<!ENTITY x "{"ha" * 10_000}">]><a>{"&x;" * 10_000}</a>'.encode()
GREY = Image.new("L", (97, 97))
LONG_TEXT = data.PngInfo()
LONG_TEXT.add_text("history", "x" * 2_000_000, zip=True)  # Pillow reads at most 1 MiB of text


BAD_KIT = {  # case: changes to a devkit, kind of the error, end of its path
    "no list": ({LIST: None}, "missing", LIST),
    "empty list": ({LIST: b"\r\n \n"}, "list", LIST),
    "list in UTF-16": ({LIST: b"\xff\xfe\x00"}, "encoding", LIST),
    "id with ../": ({LIST: b"../../etc/passwd\n"}, "list", LIST),
    "ids in folders": ({LIST: b"toy_0003\na/toy_0001\nb/toy_0001\n"}, "list", LIST),
    "id without image": ({JPG: None}, "missing", JPG),
    "id without XML": ({XML: None}, "missing", XML),
    "XML cut short": ({XML: b"<annotation><object>"}, "xml", XML),
    "XML of an unknown class": ({XML: annotation("dragon").encode()}, "tags", XML),
    "XML of a nameless object": ({XML: annotation("").encode()}, "tags", XML),
    "XML that is an entity bomb": ({XML: ENTITY_BOMB}, "xml", XML),
    "XML with a DOCTYPE": ({XML: b"<!DOCTYPE a []>" + annotation("disc").encode()}, "xml", XML),
    "XML that is empty": ({XML: b""}, "xml", XML),
    "XML of another root": ({XML: b"<doc><object/></doc>"}, "xml", XML),
    "XML with a namespace": ({XML: NAMESPACED}, "xml", XML),
    "XML that is a web page": ({XML: PAGE.encode()}, "xml", XML),
    "XML in cp1252": ({XML: annotation("größe").encode("cp1252")}, "encoding", XML),
    "nothing but web pages": (all_annotations(PAGE), "several", "16 files"),
    "photo of zero bytes": ({JPG: b""}, "image", JPG),
    "photo that is text": ({JPG: b"hello" * 100}, "image", JPG),
    "photo of 1x1": ({JPG: empty("RGB", (1, 1), "JPEG")}, "size", JPG),
    "photo cut short": ({JPG: half}, "image", JPG),
    "photo of 900 million pixels": ({JPG: empty("1", (30000, 30000))}, "image", JPG),
    "photo of 81 million pixels": ({JPG: empty("1", (9000, 9000))}, "size", JPG),
    "photo with 2 MB of text": ({JPG: encoded(GREY, pnginfo=LONG_TEXT)}, "image", JPG),
    "photo of 32 bits": ({JPG: encoded(GREY.convert("I"), "TIFF")}, "image", JPG),
    "photo of floats": ({JPG: encoded(GREY.convert("F"), "TIFF")}, "image", JPG),
    "mask of another size": ({MASK: empty("P", (50, 50))}, "mask", MASK),
    "mask in RGB": ({MASK: empty("RGB")}, "mask", MASK),
    "mask that is a JPEG": ({MASK: empty("L", kind="JPEG")}, "mask", MASK),
    "mask cut short": ({MASK: half}, "mask", MASK),
    "mask with an unknown index": ({MASK: mask_of(9)}, "mask", MASK),
    "mask that is missing": ({MASK: None}, "masks", "kit"),
    "masks shifted by a class": ({MASK: shift_classes, MASK2: shift_classes}, "masks", "kit"),
    "val photo cut short": ({VAL_JPG: half}, "image", VAL_JPG),
    "val XML cut short": ({VAL_XML: b"<annotation>"}, "xml", VAL_XML),
    "two classes with the same name": ({"classes.txt": b"a\na\n"}, "classes", "classes.txt"),
    "255 classes": ({"classes.txt": NUMBERED}, "classes", "classes.txt"),
    "the same tags everywhere": (all_annotations(annotation("disc")), "tags", "kit"),
}
for name in ("Background", "_background_", "__background__", "__ignore__"):
    changes = {"classes.txt": f"{name}\ndisc".encode()}
    BAD_KIT[f"a class {name}"] = (changes, "classes", "kit")
STREETS = {f"img_dir/{n}.jpg": empty("RGB", (97, 90 + n)) for n in range(3)}
STREETS |= {f"ann_dir/{n}.png": mask_of(n) for n in range(3)}  # the layout of mmsegmentation
BAD_ALBUM = {  # case: changes to a folder of photos, kind, end of the path
    "no folder": ({"": None}, "missing", "album"),
    "no photo": (dict.fromkeys([*data.TOY_CLASSES, "nothing.png"]), "empty", "album"),
    "a class called void": ({"void/a.jpg": empty()}, "classes", "album"),
    "a line break in a class name": ({"di\nsc/a.jpg": empty()}, "classes", "album"),
    "255 folders": ({f"{n}/a.jpg": b"%d" % n for n in range(255)}, "classes", "album"),
    "an unlisted class": ({"classes.txt": b"cross"}, "tags", "classes.txt"),
    "two photos with the same name": ({"nothing.jpg": empty()}, "names", "album"),
    "a folder of HEIC files": ({"sofa/IMG_1.HEIC": b"1"}, "format", "sofa"),
    "a mask beside its photo": ({"nothing_mask.png": mask_of(1)}, "mask", "_mask.png"),
    "the same, photo.JPG": ({"b.JPG": empty(), "b_mask.png": mask_of(1)}, "mask", "b_mask.png"),
    "a mask named like its photo": ({"b.JPG": empty(), "b.png": mask_of(1)}, "mask", "b.png"),
    "img_dir and ann_dir": (STREETS, "mask", "0.png"),
    "a devkit": ({"ImageSets/Segmentation/train.txt": b""}, "devkit", "album"),
    "an empty table": ({"tags.csv": b"\n"}, "empty", "tags.csv"),
    "only one class": (dict.fromkeys([*data.TOY_CLASSES[1:], "nothing.png"]), "tags", "album"),
}


@pytest.mark.parametrize("case", [*BAD_KIT, *BAD_ALBUM])
def test_broken_data_are_refused_by_name_before_training(case, kit, album, tmp_path, capsys):
    changes, kind, named = (BAD_KIT | BAD_ALBUM)[case]
    root = kit if case in BAD_KIT else album
    change(root, changes)
    argv = options(root, tmp_path / "run")
    argv[0] = "--voc" if case in BAD_KIT else "--photos"
    error = refused(train.run_job, argv)
    assert error.kind == kind and error.path.endswith(named), error
    assert all(map(well_formed, str(error).splitlines())), error
    assert train.main(argv) == 2
    assert capsys.readouterr().err.endswith(f"sgseg: {error}\n")  # a user sees exactly this


USAGE = ["--lo", "--rounds x", "--strength 50", "--nonsense", "--voc a --photos b", "--split test"]
USAGE += ["--multi-scale", "--eval a --segment x.jpg", "--eval a --out b", "--eval a --lr 1"]
USAGE += ["--segment x.jpg --crop 33", "--resume --segment x.jpg"]
STAGE_USAGE = ["--strength -1", "--strength nan", "--strength 1 2e6", "--temperature 0.01"]
STAGE_USAGE += ["--eps 0", "--walk-steps 100000000", "--radius 1.5", "--hi 0.5 --lo 0.7"]
STAGE_USAGE += ["--lo .2 .7", "--tag 1000", "--tag dragon", "--tag person"]


VALUES = ["--lo 0.9", "--lo nan", "--hi 1.1", "--hi nan", "--radius -1", "--crop 100", "--eps 0"]
VALUES += ["--lr nan", "--batch 0", "--warmup 0", "--warmup -1", "--seed -1", "--size 5"]
VALUES += ["--strength -1 2", "--object-bias nan", "--device cuda:77", "--backbone resnet"]
VALUES += ["--weights /nowhere.pth", "--voc /nowhere", "--corrected /nowhere", "--scale 2 1"]
VALUES += ["--scale nan 1", "--out /proc/run", f"--out {HERE / 'train.py'}", "--eval /nowhere"]
VALUES += ["--segment x.jpg --out /nowhere", "--resume --out /nowhere"]
VALUES += [f"{job} {HERE / 'train.py'}" for job in ("--eval", "--resume --out")]


@pytest.mark.parametrize("line", [*USAGE, *(f"p.jpg {line}" for line in STAGE_USAGE)])
def test_bad_usage_is_refused_by_argparse(line, capsys):
    with pytest.raises(SystemExit) as stop:
        (sgseg if line.startswith("p.jpg") else train).main(line.split())
    option = [word for word in line.split() if word.startswith("--")][-1]
    last = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and option in last
    assert "--tag" not in line or line.split()[-1] in last


@pytest.mark.parametrize("line", VALUES)
def test_bad_values_are_named_in_one_line(line, toy, tmp_path, capsys):
    argv = line.split()
    another = {"--eval", "--segment", "--resume"} & set(argv)
    assert train.main(argv if another else [*options(toy, tmp_path / "run"), *argv]) == 2
    message = error_line(capsys)
    name = argv[-1] if argv[-1].startswith("/") else argv[0]
    assert name in message and well_formed(message, "sgseg: ")


def spoilt_states(good, evil):
    """Return the states of a checkpoint or model with one fault each."""
    w = good["model"]["cam.weight"]
    wrong = [
        ("config", "backbone", "vgg16", "none"),
        ("config", "lr", "fast"),
        ("config", "size", 0, 10**6, math.nan, "large"),
        ("config", "object_bias", math.nan, math.inf),
        ("config", "eps", math.nan, 0.0),
        ("config", "radius", -1),
        ("config", "class_names", 4, NAMES[:3]),
        ("data", "classes", ["cat"]),
        ("data", "ids", 3),
        ("data", "tags", 3),
        ("model", "cam.weight", torch.ones(1), w * math.nan, "text"),
    ]
    spoilt = [{"model": evil}, torch.ones(3), {"x": 1}, *(without(good, name) for name in good)]
    for part, name, *values in wrong:
        if name in good.get(part, {}):
            spoilt += [good | {part: good[part] | {name: value}} for value in values]
            if part == "model" or "epoch" in good:  # a model's settings have defaults
                spoilt.append(good | {part: without(good[part], name)})
    for name, value in {"optimizer": {}, "epoch": "first", "metrics": [3], "data": 3}.items():
        spoilt += [good | {name: value}] if name in good else []
    return [*spoilt, good | {"model": [1]}]


@pytest.mark.parametrize("name, call", [
    ("checkpoint.pt", lambda path: train.load_run(path.parent)),
    ("model.pt", SGSeg.load),
])  # fmt: skip
def test_saved_files_run_no_code_and_corrupt_ones_are_refused(name, call, finished, tmp_path):
    path = tmp_path / name
    good = torch.load(finished / name, weights_only=True)
    spoilt = spoilt_states(good, Evil(tmp_path / "made"))
    if name == "model.pt":
        spoilt.append(good | {"config": good["config"] | {"unknown": 1}})
    for state in [*spoilt, half((finished / name).read_bytes()), b""]:
        path.write_bytes(state) if isinstance(state, bytes) else torch.save(state, path)
        error = refused(call, path)
        assert well_formed(str(error)) and re.search(rf"{tmp_path}|--\w", str(error)), error
        if name == "model.pt":
            assert error.kind in ("weights", "model") and error.path == str(path)
    assert not (tmp_path / "made").exists()


def test_corrupt_and_compressed_files_are_detected(finished, tmp_path):
    whole = (finished / "checkpoint.pt").read_bytes()
    path = tmp_path / "checkpoint.pt"
    packed = tmp_path / "packed.pt"
    rng = random.Random(0)
    for record in zipfile.ZipFile(io.BytesIO(whole)).infolist():
        header = whole[record.header_offset :][:30]
        lengths = [int.from_bytes(header[n:][:2], "little") for n in (26, 28)]  # name, extra
        start = record.header_offset + 30 + sum(lengths)  # after the record's header
        at = start + rng.randrange(record.file_size)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :])
        assert refused(data.load, path).path == str(path)
    torch.save({"x": torch.zeros(250_000)}, path)
    data.load(path)
    # a compressed file, which unpacks to more bytes than it has
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for record in old.infolist():
            new.writestr(record.filename, old.read(record))
    assert packed.stat().st_size < 50_000 and refused(data.load, packed).kind == "weights"


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_pipes_and_devices_are_refused_by_name(make, kit, copied, tmp_path):
    """No call waits for a pipe, reads a device for ever, or replaces either of them."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    signal.alarm(10)
    start = partial(started_run, kit, tmp_path / "new")
    # each of these files of the devkit is read before those that are already replaced
    cases = [(start, kit / name) for name in (MASK, JPG, XML, LIST, "classes.txt")]
    cases.append((partial(data.Photos, kit / "JPEGImages"), kit / "JPEGImages/tags.csv"))
    cases.append((partial(read_image, kit / VAL_JPG), kit / VAL_JPG))
    cases.append((partial(SGSeg.load, copied), copied / "model.pt"))
    for call, path in cases:
        path.unlink(missing_ok=True)
        make(path)
        error = refused(call)
        assert (error.kind, error.path) == ("read", str(path))
    assert refused(data.write, path, Image.new("L", (9, 9)), "a.jpg").kind == "exists"
    assert not path.is_file()
    path.unlink()
    assert refused(SGSeg.load, copied).kind == "unfinished"
    signal.alarm(0)


def test_mutated_files_are_read_or_rejected(kit):
    """Replace a random byte by none, one or two others. The reader succeeds or names the file."""
    rng = random.Random(1)
    tags = partial(read_tags, class_names=data.TOY_CLASSES)
    mask = partial(read_mask, num_classes=4)
    for name, reader in ((XML, tags), (LIST, read_list), (JPG, read_image), (MASK, mask)):
        content = (kit / name).read_bytes()
        results = []
        for n in range(300):
            at = rng.randrange(len(content))
            bad = kit / f"mutated{n}"
            bad.write_bytes(content[:at] + rng.randbytes(n % 3) + content[at + 1 :])
            try:
                results.append(reader(bad) is not None)
            except InputError as error:
                assert well_formed(str(error), str(bad)), error
                results.append(False)
        assert set(results) == {True, False}


@pytest.mark.parametrize("name", ["\x1b[31m.jpg", "\nsgseg: all is well.jpg", "\r.jpg"], ids=repr)
def test_control_characters_never_reach_the_terminal(name, copied, toy, tmp_path, capsys):
    shutil.copy(toy / JPG, tmp_path / f"good{name}")
    (tmp_path / f"bad{name}").write_bytes(b"no photo")
    photos = [str(tmp_path / f"{stem}{name}") for stem in ("good", "bad")]
    capsys.readouterr()
    assert train.main(["--out", str(copied), *CPU, "--segment", *photos]) == 2
    for text in capsys.readouterr():
        assert text.count("\n") == 1 and text[:-1].isprintable()


# ---- photos of the user -------------------------------------------------------------------------


@pytest.fixture
def album(kit, tmp_path):
    """A folder for each class, as a person would fill it: DIR/CLASS/my photo N.JPG."""
    album = tmp_path / "album"
    voc = VOC(kit, "train")
    voc.scan()
    for i, path in enumerate(voc.image_paths):
        for k in voc.tags[i].nonzero()[:, 0].tolist():
            (album / voc.class_names[k]).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, album / voc.class_names[k] / f"my photo {i}.JPG")
    Image.new("RGB", (97, 97), "grey").save(album / "nothing.png")
    return album


def test_a_folder_for_each_class_is_a_training_set(album, kit):
    voc = VOC(kit, "train")
    voc.scan()
    photos = data.Photos(album)
    photos.scan()
    assert photos.class_names == sorted(voc.class_names)
    found = {Path(name).name: tags for name, tags in zip(photos.ids, photos.tags.tolist())}
    assert len(found) == len(voc.ids) + 1 and found.pop("nothing") == [0, 0, 0, 0]
    for i, tags in enumerate(voc.tags.tolist()):
        want = {voc.class_names[k] for k, tag in enumerate(tags) if tag}
        tags = enumerate(found[f"my photo {i}"])
        assert {photos.class_names[k] for k, tag in tags if tag} == want


def rows_of_areas(path):
    """Return the rows of an areas.csv without its header."""
    return list(csv.reader(io.StringIO(path.read_text("utf-8-sig"))))[1:]


def test_a_run_on_tagged_photos_writes_masks_overlays_and_areas(album, tmp_path, capsys):
    out = tmp_path / "run"
    change(album, {"square": None, "triangle": None})
    argv = options(album, out, "--rounds", 1)
    argv[0] = "--photos"
    assert train.main(argv) == 0
    printed = capsys.readouterr()
    assert "val" not in printed.out + printed.err  # folders have no lists
    listed = (out / "classes.txt").read_text().splitlines()
    assert listed == ["0 background #000000", "1 cross #800000", "2 disc #008000"]
    photos = data.Photos(album)
    rows = rows_of_areas(out / "areas.csv")
    for name, path in zip(photos.ids, photos.image_paths):
        mask = Image.open(out / "masks" / f"{name}.png")
        last = Image.open(out / "pseudo" / "round2" / f"{name}.png")
        assert mask.mode == "P" and np.array_equal(mask, last)
        assert Image.open(out / "overlays" / f"{name}.png").size == mask.size
        mask = np.asarray(mask)
        areas = {listed[k].split()[1]: float((mask == k).mean()) for k in np.unique(mask)}
        file = path.relative_to(album).as_posix()
        assert {row[1]: float(row[2]) for row in rows if row[0] == file} == areas
        assert mask.max() <= 2 and (name != "nothing" or not mask.any())


TABLES = {  # {a} shows a disc and a cross, {b} nothing
    "commas and a header": "file,tags\n{a},disc,cross\n{b},\n",
    "no header": "{a},disc,cross\n{b},\n",
    "semicolons": "{a};disc;cross\n\n{b};;\n",
    "tabs and quotes": '"{a}"\t"disc"\tcross\n"{b}"\t\n',
    "a row for each tag": "{a},disc\n{a},cross\n{b},\n",
    "commas in a cell": 'name;tags;;\r\n{a};"disc, cross";;\r\n;;;\r\n{b}; ;;\r\n',
    "semicolons in a cell": "file,tags\n{a},disc; cross\n{b},\n",
    "bars in a cell": "{a},disc|cross\n{b},\n",
    "semicolons, more commas": "name;tags\n{a};disc, cross, disc,cross, disc\n{b};\n",
    "Excel's first line": "sep=;\nname;tags\n{a};disc, cross\n{b};\n",
    "the index of pandas": ",file,tags\n0,{a},disc|cross\n1,{b},\n",
    "Windows paths": "file,tags\n.\\{a},disc,cross\ndeep\\b.jpg,\n",
    "paths from here": "./{a},disc,cross\n./deep/../{b},\n",
    "files without an extension": "{stem},disc,cross\ndeep/b,\n",
    "1 and 0": "file,cross,disc\n{a},1,1\n{b},0,0\n",
    "True and False": ",file,cross,disc\n0,{a},True,True\n1,{b},False,False\n",
    "1.0 and 0.0": "file;cross;disc\n{a};1.0;1.0\n{b};0.0;0.\n",
    "yes and no": "file,cross,disc\n{a},yes,Yes\n{b},no,NO\n",
    "counts": "file,cross,disc\n{a},1,12\n{b},0,0\n",
    "crosses": "file,cross,disc\n{a},x,X\n{b},,\n",
}


@pytest.mark.parametrize("table", TABLES)
def test_a_table_of_tags_is_a_training_set(table, toy, tmp_path):
    stem = "from, the sea" if table == "tabs and quotes" else "from the sea"
    (tmp_path / "deep").mkdir()
    for name in (f"{stem}.JPG", "deep/b.jpg"):
        shutil.copy(toy / JPG, tmp_path / name)
    text = TABLES[table].format(a=f"{stem}.JPG", b="deep/b.jpg", stem=stem)
    (tmp_path / "tags.csv").write_text(text, "utf-8-sig")
    photos = data.Photos(tmp_path)
    photos.scan()
    assert photos.class_names == ["cross", "disc"]
    assert photos.ids == [stem, "deep/b"]
    assert photos.tags.tolist() == [[1, 1], [0, 0]]
    (tmp_path / "classes.txt").write_text("disc\ncross\nsquare\n")
    assert data.Photos(tmp_path).class_names == ["disc", "cross", "square"]


@pytest.fixture
def three_photos(toy, tmp_path):
    """A folder of three photos: a.jpg, b.jpg, c.jpg."""
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        shutil.copy(toy / JPG, tmp_path / name)
    return tmp_path


def test_class_names_may_contain_spaces(three_photos):
    """As in the name of a folder."""
    (three_photos / "tags.csv").write_text("a.jpg,großer Hund\nb.jpg,kleiner Hund; Katze\nc.jpg\n")
    assert data.Photos(three_photos).class_names == ["Katze", "großer Hund", "kleiner Hund"]
    (three_photos / "tags.csv").write_text("a.jpg,\nx/../a.jpg,disc\nb.jpg\n")
    assert data.Photos(three_photos).annotations == [{"disc"}, set()]


BAD_TABLES = {  # case: table, kind, what must be named
    "a Python list": ("file,tags\na.jpg,\"['cat', 'dog']\"\n", "tags", "row 2"),
    "no header over 1 and 0": ("a.jpg,1,0\nb.jpg,0,1\n", "tags", "row 1"),
    "a column of dates": ("file,tag,day\na.jpg,cat,\nb.jpg,cat,2024-05-01\n", "tags", "row 3"),
    "a mistyped flag": ("p,cat,dog\na.jpg,yes,no\nb.jpg,nno,yes\n", "tags", "row 2"),
    "two columns with the same name": ("p,cat,cat\na.jpg,1,0\nb.jpg,0,1\n", "tags", "tags.csv"),
    "none for a tag": ("a.jpg,cat\nb.jpg,none\n", "tags", "row 2"),
    "a column of ratings": ("file,tag,stars\na.jpg,cat,4\nb.jpg,dog,5\n", "tags", "row 2"),
    "a share in a column": ("file,cat,dog\na.jpg,0.5,1\nb.jpg,1,1\n", "tags", "row 2"),
    "lists by spaces": ("a.jpg,cat\nb.jpg,dog\nc.jpg,cat dog\n", "tags", "cat dog"),
    "lists in two orders": ("a.jpg,cat dog\nb.jpg,dog cat\n", "tags", "cat dog"),
    "a photo that is not there": ("file,tags\na.jpg,cat\nd.jpg,cat\n", "missing", "row 3"),
    "a photo above the folder": ("a.jpg,cat\n\n../b.jpg,cat\n", "missing", "row 3"),
    "a first row of another case": ("A.JPG,cat\nb.jpg,cat\n", "missing", "A.JPG"),
    "a first row of another kind": ("d.gif,cat\nb.jpg,dog\n", "missing", "d.gif"),
    "a header alone": ("file,tags\n", "empty", ""),
    "nothing": ("\n\n", "empty", "tags.csv"),
    "an open quote": ('a.jpg,"cat\n', "format", "tags.csv"),
    "cp1252": ("a.jpg,größer\n", "encoding", "UTF-8"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_tables_that_cannot_be_understood_are_refused_by_row(case, three_photos):
    table, kind, named = BAD_TABLES[case]
    (three_photos / "tags.csv").write_bytes(table.encode("cp1252"))
    error = refused(data.Photos, three_photos)
    assert error.kind == kind and named in str(error) and well_formed(str(error)), error


def unused(capsys):
    """Return {extension: number} of the one warning line on files that are not used."""
    (line,) = capsys.readouterr().err.splitlines()
    return {name: int(n) for n, name in re.findall(r"(\d+) (\.\w+|without an extension)", line)}


def test_files_that_are_not_used_are_counted_by_their_extension(album, copied, capsys):
    n = len(data.Photos(album).ids)
    names = ("1.HEIC", "2.heic", "3.avif", "4.gif", "IMG_5", "deep/6.jpg", "._7.jpg")
    change(album, {f"disc/{name}": name.encode() for name in names})
    capsys.readouterr()
    assert len(data.Photos(album).ids) == n
    want = {".heic": 2, ".avif": 1, ".gif": 1, "without an extension": 1, ".jpg": 1}
    assert unused(capsys) == want
    assert segment(copied, album / "disc") == 0
    assert unused(capsys) == want
    # a folder called masks is no class; one called v1.png is
    change(album, {"disc": None, "masks/carnival.jpg": empty(), "v1.png/disc.jpg": empty()})
    names = data.Photos(album).class_names
    assert "masks" not in names and "v1.png" in names and unused(capsys) == {".jpg": 1}
    # a folder without photos is no class, and a tag on a single photo may be misspelt
    capsys.readouterr()
    change(album, {"horse/deep/1.jpg": empty(size=(97, 30)), "dics/1.jpg": empty(size=(97, 31))})
    photos = data.Photos(album)
    photos.scan()
    said = capsys.readouterr().err
    assert "horse" not in photos.class_names and "horse is not a class" in said
    assert "tagged dics: is the tag misspelt?" in said
    # PHOTO_stages.png beside PHOTO is not a photo; other files with such names are
    n = len(data.Photos(album).ids)
    change(album, {"cross/new.JPG": empty(size=(97, 20))})
    change(album, {"cross/new_stages.png": empty(size=(97, 21))})
    assert len(data.Photos(album).ids) == n + 1
    change(album, {"cross/rocket_stages.png": empty(size=(97, 22))})
    assert len(data.Photos(album).ids) == n + 2


def test_names_match_in_any_unicode_form(toy, kit, tmp_path, capsys):
    """macOS writes names decomposed, keyboards composed."""
    one = "B\u00e4r"
    two = "Ba\u0308r"
    root = tmp_path / "photos"
    for n, folder in enumerate((two, one, "cat")):
        photo = (toy / f"JPEGImages/toy_000{n}.jpg").read_bytes()
        change(root, {f"{folder}/{two}{n}.jpg": photo})
    change(root, {f"masks/{one}/{one}0.png": mask_of(1), "masks/lost.png": mask_of(1)})
    change(root, {"classes.txt": f"cat\n{one}\n".encode()})
    photos = data.Photos(root)
    assert str(root / "masks/lost.png") in capsys.readouterr().err
    photos.scan()
    tags = {name[-1]: tags for name, tags in zip(photos.ids, photos.tags.tolist())}
    assert photos.class_names == ["cat", one] and tags == {"0": [0, 1], "1": [0, 1], "2": [1, 0]}
    assert dict(zip(photos.ids, photos.mask_paths))[f"{two}/{two}0"]
    change(root, {"tags.csv": f"{one}/{one}1.jpg,{two}\n".encode()})
    assert data.Photos(root).annotations == [{one}]
    # a devkit: the list is composed, the files are not
    for path in kit.rglob("toy_0003.*"):
        path.rename(path.with_name(f"{two}{path.suffix}"))
    change(kit, {LIST: f"toy_0001\n{one}\ntoy_0002\ntoy_0005\n".encode()})
    voc = VOC(kit, "train")
    voc.scan()
    assert voc.mask_paths[1] is not None and voc.tags[1].any()


def test_data_py_prints_what_the_loader_finds(kit, album, capsys):
    assert data.main([str(kit)]) == data.main([str(album)]) == 0
    printed = capsys.readouterr().out
    voc = VOC(kit, "train")
    voc.scan()
    for name, n in zip(voc.class_names, voc.tags.sum(0).int().tolist()):
        assert f"  {name}: {n}\n" in printed
    assert "--voc" in printed and "--photos" in printed
    change(kit, {f"JPEGImages/toy_{n:04d}.jpg": b"no photo" for n in range(12)})
    assert data.main([str(kit)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 13 and "12" in lines[0]
    assert all(f"toy_{n:04d}.jpg" in line for n, line in enumerate(lines[1:]))
    few = refused(VOC(kit, "train").scan)
    assert few.kind == "several" and str(few).count("\n") == 10
    with pytest.raises(SystemExit, match="2"):
        data.main([])  # it takes one folder


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 40, 3), dtype=np.uint8))


def with_orientation(kind, orientation):
    """Return the bytes of a 40x24 picture with this EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(NOISE, kind, exif=exif)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_orientation_is_turned_upright(kind):
    for orientation in range(1, 9):
        content = with_orientation(kind, orientation)
        want = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
        assert np.array_equal(read_image(content), want)
        assert np.array_equal(read_image(Image.open(io.BytesIO(content))), want)
    # damaged EXIF data does not make the picture unreadable
    damaged = with_orientation("JPEG", 6).replace(b"Exif\0\0MM", b"Exif\0\0XX")
    assert read_image(damaged).size == (40, 24)


def test_photos_are_read_from_paths_bytes_files_and_arrays(toy, tmp_path):
    content = (toy / JPG).read_bytes()
    want = read_image(toy / JPG)
    net = SGSeg(NAMES, "tiny", size=97).eval()
    mask = net.segment(toy / JPG)
    image = Image.open(toy / JPG)
    forms = (str(toy / JPG), content, io.BytesIO(content), image, image.convert("RGBA"))
    for source in (*forms, np.array(image)):
        assert np.array_equal(read_image(source), want)
    for source in (*forms[:2], io.BytesIO(content), *forms[3:], np.array(image)):
        assert np.array_equal(net.segment(source), mask)
    for wrong in (b"", content[:500], io.BytesIO(b"no photo"), empty("RGB", (9, 9))):
        assert refused(read_image, wrong).kind in ("image", "size")
    for wrong in (np.zeros((20, 20)), np.zeros((20, 20, 3)), np.zeros((20, 20, 4), np.uint8), None):
        with pytest.raises(ValueError):
            net.segment(wrong)
    error = refused(net.segment, tmp_path / "missing.jpg")
    assert error.kind == "missing" and error.path == str(tmp_path / "missing.jpg")


# ---- the command line, end to end ----------------------------------------------------------------


def segment(run, *words):
    return train.main(["--out", str(run), *CPU, "--segment", *map(str, words)])


def test_segment_writes_a_palette_mask_of_the_photos_own_size(copied, tmp_path):
    """The EXIF orientation is applied exactly once. --object-bias may differ from training."""
    photo = tmp_path / "p.jpg"
    photo.write_bytes(with_orientation("JPEG", 6))
    net = SGSeg.load(copied)
    labels = {}
    for words, scales in (
        (("--object-bias", -9), net.scales),
        (("--object-bias", 9), net.scales),
        (("--object-bias", 0.75), net.scales),
        (("--multi-scale",), sgseg.SCALES),
    ):
        assert segment(copied, photo, *words) == 0
        mask = Image.open(copied / "segmented/p.png")
        assert mask.size == (24, 40) and mask.mode == "P"
        net.scales = scales
        net.object_bias = words[-1] if len(words) == 2 else 0.75
        assert np.array_equal(mask, net.segment(photo))
        labels[words] = np.asarray(mask) > 0
    less, more, *_ = labels.values()
    assert less.mean() < more.mean()
    assert Image.open(copied / "segmented/p_overlay.png").size == (24, 40)


def test_segment_never_replaces_a_photo_or_the_result_of_another(copied, toy, tmp_path, capsys):
    out = copied / "segmented"
    photo = (toy / JPG).read_bytes()
    for names in (["photo.png"], ["other.jpg", "other_overlay.png"], ["../segmented/photo.png"]):
        change(out, dict.fromkeys(names, photo))
        assert segment(copied, *(out / name for name in names)) == 2
        assert all((out / name).read_bytes() == photo for name in names)
    shutil.rmtree(out)
    a = tmp_path / "a.jpg"
    change(tmp_path, dict.fromkeys(("a.jpg", "a.jpeg", "a_overlay.jpg"), photo))
    for name in ("a.jpeg", "a_overlay.jpg"):  # two photos, one result
        capsys.readouterr()
        assert segment(copied, a, tmp_path / name) == 2
        assert str(tmp_path / name) in error_line(capsys)
        assert data.source_of(out / "a.png") == str(a)


def test_segment_adds_rows_to_areas_csv(copied, toy, tmp_path, capsys):
    """In folders a bad photo is named. Rows are replaced if the same photo comes again."""
    first = (toy / "JPEGImages/toy_0000.jpg").read_bytes()
    second = (toy / "JPEGImages/toy_0001.jpg").read_bytes()
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder, photo in zip(folders, (first, second)):
        change(folder, {f"{folder.name}.jpg": photo, "bad.jpg": b"no photo"})
        assert segment(copied, folder) == 2 and "bad.jpg" in error_line(capsys)
    rows = rows_of_areas(copied / "segmented/areas.csv")
    assert {row[0] for row in rows} == {"first.jpg", "second.jpg"}
    mask = (copied / "segmented/first.png").read_bytes()
    assert segment(copied, folders[0] / "first.jpg") == 0
    change(folders[1], {"first.jpg": second})
    assert segment(copied, folders[1] / "first.jpg") == 2  # another photo of the same name
    assert (copied / "segmented/first.png").read_bytes() == mask
    assert sorted(rows_of_areas(copied / "segmented/areas.csv")) == sorted(rows)


def test_segment_finds_the_only_run(copied, toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["--segment", str(toy / JPG), *CPU]
    assert train.main(argv) == 2
    shutil.copytree(copied, tmp_path / "runs/photos")
    assert train.main(argv) == 0 and Path("runs/photos/segmented/toy_0003.png").exists()
    shutil.copytree(copied, tmp_path / "runs/voc")
    assert train.main(argv) == 2


@pytest.fixture(scope="session")
def imagenet():
    """The network of sgseg.py, read once, for small pictures."""
    net, bias = sgseg.imagenet_network()
    net.size = 97
    return net, bias


@pytest.fixture
def photo_folder(imagenet, monkeypatch, tmp_path):
    """A folder with one photo, p.jpg, for sgseg.py."""
    monkeypatch.setattr(sgseg, "imagenet_network", lambda: imagenet)
    noise = np.random.default_rng(0).integers(0, 255, (80, 120, 3), dtype=np.uint8)
    photo_folder = tmp_path / "photo_folder"
    photo_folder.mkdir()
    Image.fromarray(noise).save(photo_folder / "p.jpg")
    return photo_folder


def test_sgseg_py_draws_the_four_stages_of_a_photo(photo_folder, capsys):
    target = photo_folder / "p_stages.png"
    argv = [str(photo_folder), "--tag", "cat"]
    change(photo_folder, {"bad.jpg": b"no photo", "p.png": empty()})  # two photos of one name
    assert sgseg.main(argv) == 2
    printed = capsys.readouterr()
    assert "cat" in printed.out and "bad.jpg" in printed.err and "p.png" in printed.err
    assert data.source_of(target) == "p.jpg" and Image.open(target).width == 7 * 244
    before = target.read_bytes()
    change(photo_folder, {"bad.jpg": None, "p.png": None})
    assert sgseg.main(argv) == 0  # it replaces its own pictures and never reads them as photos
    assert target.read_bytes() == before
    target.write_bytes(empty())  # somebody else's file stays
    assert sgseg.main([str(photo_folder / "p.jpg"), "--tag", "cat"]) == 2
    assert target.read_bytes() == empty()
    assert sorted(path.name for path in photo_folder.iterdir()) == ["p.jpg", "p_stages.png"]


def test_several_values_of_an_option_give_a_row_each(photo_folder, monkeypatch):
    rows = []
    monkeypatch.setattr(data, "sheet", lambda r, width: rows.extend(r) or blank(r))
    for line in ("--tag cat --radius 1 --strength 1 100", "--tag cat --radius 1 --strength 100"):
        assert sgseg.main([str(photo_folder / "p.jpg"), *line.split()]) == 0
    weak, strong, single = rows
    assert not np.array_equal(weak["+ affinity"], strong["+ affinity"])
    assert np.array_equal(strong["+ self-guided"], single["+ self-guided"])
    assert np.array_equal(weak["localization map"], strong["localization map"])


# ---- README, help, notebook ----------------------------------------------------------------------

MODULES = ("refine.py", "sgseg.py", "data.py", "train.py")
OPTIONAL_PACKAGES = {"onnx", "onnxruntime", "torchvision", "pandas", "tensorboard", "pycocotools"}


def imported(code):
    """Return the names of the packages that some code imports."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


def test_imports_are_torch_numpy_pillow_and_the_standard_library():
    known = {"torch", "numpy", "PIL", "sgseg", "data", "refine"} | set(sys.stdlib_module_names)
    for name in MODULES:
        assert imported((HERE / name).read_text()) <= known


def help_of(main, capsys):
    """Return the text of --help without spaces."""
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    return "".join(capsys.readouterr().out.split())


def test_help_shows_every_option_its_meaning_and_its_default(capsys):
    said = help_of(train.main, capsys)
    source = (HERE / "train.py").read_text()
    for option in dataclasses.fields(train.Config):
        about = option.metadata
        text = about["help"] + (f" ({about['source']})" if about["source"] else "")
        typed = train.as_typed
        toy = f", toy set: {typed(train.TOY[option.name])}" if option.name in train.TOY else ""
        text += f" [{typed(option.default)}{toy}]" if option.default != "" else ""
        assert f"--{option.name.replace('_', '-')}" in said
        assert "".join(text.split()) in said, option.name
        assert f"cfg.{option.name}" in source  # no option that nothing reads
    said = help_of(sgseg.main, capsys)
    for name, (default, *_) in sgseg.STAGE_OPTIONS.items():
        assert f"--{name.replace('_', '-')}" in said and f"[{default}]" in said


DOCUMENTS = ("README.md", "docs/EXTENDING.md")


def blocks(name, *kinds):
    """The fenced blocks of a document."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", (HERE / name).read_text(), re.S | re.M)
    return [code for kind, code in found if kind in kinds]


def anchors(text):
    """GitHub's anchors of the headings of a text."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


@pytest.mark.parametrize("name", [*DOCUMENTS, "docs/CHOICES.md", "docs/RESULTS.md"])
def test_links_point_at_what_they_name(name):
    text = re.sub("```.*?```", "", (HERE / name).read_text(), flags=re.S)
    for words, target in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", text):
        path, _, place = target.partition("#")
        if re.match(r"\w+:", target):  # a web page
            continue
        file = (HERE / name).parent / path if path else HERE / name
        assert file.exists(), f"{name}: {path} is not there"
        if place and file.suffix == ".md":
            assert place in anchors(file.read_text()), f"{name}: no heading {target}"
        if re.fullmatch(r"`\w+`", words) and file.suffix == ".py":
            word = words.strip("`")
            found = re.findall(rf"^ *(?:def|class) {word}\b|^{word} = ", file.read_text(), re.M)
            assert found, f"{name}: {path} has no {word}"


@pytest.fixture
def reader(finished, kit, imagenet, tmp_path, monkeypatch):
    """A folder with photos, runs and a devkit, as the examples in the documents assume."""
    photo_folder = tmp_path / "reader"
    picture, _ = data.toy_picture(np.random.default_rng(0), 97)
    for name in ("photo.jpg", "docs/cat.jpg"):
        (photo_folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture[:80]).save(photo_folder / name)
    for name in ("voc", "toy"):
        shutil.copytree(finished, photo_folder / "runs" / name)
    kit.rename(photo_folder / "kit")
    monkeypatch.chdir(photo_folder)
    monkeypatch.syspath_prepend(HERE)
    monkeypatch.setattr(sgseg, "imagenet_network", lambda: imagenet)
    monkeypatch.setitem(BACKBONES, "mine", None)  # removed at the end
    return photo_folder


PYTHON = [(name, n) for name in DOCUMENTS for n in range(len(blocks(name, "python")))]


@pytest.mark.parametrize("name, n", PYTHON)
def test_python_blocks_of_the_documents_run(name, n, reader, monkeypatch):
    """As they stand, but with small runs. Blocks whose packages are missing are only compiled."""
    code = blocks(name, "python")[n]
    program = compile(code, f"{name}, block {n}", "exec")
    absent = {package for package in OPTIONAL_PACKAGES if importlib.util.find_spec(package) is None}
    if any(re.search(rf"\b{package}\b", code) for package in absent):
        return
    small = {**SMALL, "rounds": 1}
    small.pop("backbone")
    check = train.check
    monkeypatch.setattr(train, "check", lambda cfg: check(dataclasses.replace(cfg, **small)))
    exec(program, {"__name__": "__main__"})


def commands(name):
    """The command lines of a document: in its blocks, and between backticks."""
    text = "".join(blocks(name, "", "bash", "sh")).replace("\\\n", " ")
    prose = re.sub("^```.*?^```", "", (HERE / name).read_text(), flags=re.S | re.M)
    lines = text.splitlines() + [" ".join(line.split()) for line in re.findall("`([^`]+)`", prose)]
    lines = [re.sub(r"^\$ |\s+#.*$", "", line).strip() for line in lines]
    return [line for line in lines if re.match(r"(python|torchrun) .*\.py\b", line)]


def test_commands_of_the_documents_are_understood(reader):
    """Those of train.py are parsed, those of sgseg.py are run."""
    found = [line for name in DOCUMENTS for line in commands(name)]
    assert len(found) >= 3
    for line in found:
        words = line.split()
        script = next(word for word in words if word.endswith(".py"))
        argv = words[words.index(script) + 1 :]
        assert (HERE / script).exists(), line
        if script == "train.py" and not {"...", "--help"} & set(argv):
            job, given = train.parse(argv)
            if not (job.eval or job.segment or job.resume or {"voc", "photos"} & set(given)):
                train.check(train.Config(**train.TOY | given))
        elif script == "sgseg.py" and argv and all(Path(word).exists() for word in argv[:1]):
            assert sgseg.main(argv) == 0, line


def test_the_code_of_the_notebook_runs(tmp_path, monkeypatch):
    """Run all cells in one namespace in docs/; they import only torch, numpy and Pillow."""
    docs = Path(shutil.copytree(HERE / "docs", tmp_path / "docs"))
    for name in MODULES:
        shutil.copy(HERE / name, tmp_path)
    book = json.loads((docs / "walkthrough.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]
    known = {"torch", "numpy", "PIL", "IPython", *(Path(name).stem for name in MODULES)}
    assert imported("\n".join(cells)) <= known | set(sys.stdlib_module_names)
    monkeypatch.chdir(docs)
    monkeypatch.syspath_prepend(HERE)
    # shorten the toy run to eight pictures and one epoch per round
    main = train.main
    few = ("--warmup", "1", "--epochs", "1", "--min-steps", "1")
    monkeypatch.setattr(train, "main", lambda argv: main([*argv, *few]))
    pictures = re.search(r"make_toy\(.*train=(\d+)", "\n".join(cells))[1]
    cells = [re.sub(rf"\b{pictures}\b", "8", re.sub(r"\bval=\d+", "val=2", c)) for c in cells]
    names = {"__name__": "__main__", "display": lambda *_: None}
    for n, cell in enumerate(cells):
        exec(compile(cell, f"walkthrough.ipynb, code cell {n}", "exec"), names)


# the scripts in docs/


def test_the_scripts_in_docs_compute_what_they_say(monkeypatch):
    monkeypatch.syspath_prepend(HERE / "docs")
    measuring = docs_module("refinement")
    rng = np.random.default_rng(0)
    target = rng.choice([0, 2, 4, 255], (20, 20)).astype(np.uint8)
    maps = torch.tensor(rng.random((2, 20, 20))).float()
    grid = (0.05, 0.5, 0.85)
    for t, C in zip(grid, measuring.confusions(target, maps, [1, 3], 4, grid)):
        label = refine.pseudo_labels(maps[None], [1, 3], t, t)[0].numpy()
        assert (C == confusion(target, label, 4)).all() and C.any()
    assert doctest.testmod(measuring).failed == 0
    # t = 0.4: a tag that loses everywhere leads on 0.2 of the pixels, where it loses least
    scores = torch.stack([torch.full((10,), 5.0), torch.arange(10.0) - 9]).view(1, 2, 1, 10)
    label = docs_module("comparison").em(scores, [6], None, 0.25, 0.55)
    assert label.tolist() == [[0] * 8 + [7] * 2]


def test_the_page_of_a_run_is_self_contained_and_escaped(kit, tmp_path, monkeypatch, capsys):
    """The names of a class, of the run folder and of a row of results.json are escaped."""
    for path in [kit / "classes.txt", *(kit / "Annotations").iterdir()]:
        name = "<b>x</b>" if path.suffix == ".txt" else "&lt;b&gt;x&lt;/b&gt;"
        path.write_text(path.read_text().replace("disc", name))
    run = tmp_path / "<i>run"
    assert train.main(options(kit, run, "--rounds", 1)) == 0
    monkeypatch.syspath_prepend(HERE / "docs")
    report = docs_module("report").main
    assert report([str(run)]) == 0
    page = (run / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)|<script', page)
    assert "<b>x" not in page and "&lt;b&gt;x&lt;/b&gt;" in page and "<i>run" not in page
    (run / "results.json").write_text((run / "results.json").read_text().replace("round1", "<u>"))
    assert report([str(run)]) == 2 or "<u>" not in (run / "report.html").read_text()
    capsys.readouterr()
    assert report([str(tmp_path)]) == 2 and str(tmp_path) in error_line(capsys)
