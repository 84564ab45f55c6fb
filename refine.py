"""The four stages that turn one network's features into dense pseudo labels, one short function each.

    1. localization_maps    M_k = y_k relu(S_k) / max relu(S_k)               high-level features say roughly where
    2. affinity_guided      M <- (M0 + lambda P M) / (1 + lambda)             intermediate features: alike means together
    3. self_guided          q_i = up(mean(a))_i . I_i + up(mean(b))_i         the image passes its structure on
    4. pseudo_labels        class where M > hi, 0 where M < lo, 255 between   dense annotations

Ke & Hsu (2018), abstract, sentences 5-8, name the stages and what each looks at; every formula, graph and number below is
our choice, its source named beside it. Symbols: B images, K foreground classes, (h,w) a feature grid, (H,W) the image;
i, j pixels of one grid; k a class. All functions are pure, batched, float32, differentiable (labels aside), and run on any device.
"""
import torch
import torch.nn.functional as F

IGNORE = 255                                                       # VOC's "void" index: no loss, no score
DILATIONS = (1, 3, 6, 12, 24)                                      # 40 neighbours, near and far (our choice, after PAMR)

# ---- 1. high-level features -> class-specific localization maps --------------------------------------------------------
def localization_maps(scores, labels, least=1e-5):
    """M_k = y_k relu(S_k) / max(max_ij relu(S_k), least): where the classes named by the tags roughly are.

    scores (B,K,h,w) float32, the CAM scores S; labels (B,K) in {0,1}. Returns (B,K,h,w) in [0,1], exactly 0 for absent classes and
    where nothing is positive; a map whose maximum is below least > 0 stays below 1. Source: abstract, sentence 5; class activation
    mapping, Zhou et al. 2016, with the usual relu and division by the maximum. Raises ValueError when the shapes do not fit.

    >>> localization_maps(torch.tensor([[[[2., 4.], [-1., 1.]]]]), torch.ones(1, 1))
    tensor([[[[0.5000, 1.0000],
              [0.0000, 0.2500]]]])
    """
    if scores.shape[:2] != labels.shape:
        raise ValueError(f"scores {tuple(scores.shape)} want labels {tuple(scores.shape[:2])}, got {tuple(labels.shape)}")
    M = scores.relu() * labels[:, :, None, None]
    return M / M.amax((2, 3), keepdim=True).clamp_min(least)

# ---- 2. intermediate features -> affinity guidance ---------------------------------------------------------------------
def affinity(features, dilations=DILATIONS, temperature=0.1):
    """A_ij = exp((cos(f_i, f_j) - 1) / temperature) between neighbours, f the features less their mean over the image.

    The graph: each pixel i of the grid and the 8 around it at every dilation, N = 8 len(dilations) neighbours j; symmetric.
    features (B,C,h,w). Returns A (B,h*w,N) in [0,1], 0 where j would leave the grid; index (h*w,N) int64, the pixel j. Without their
    mean, features are "alike for this image". Our choice: the cosine as in SEAM (Wang et al. 2020), the graph as in PAMR (Araslanov
    & Roth 2020); temperature and dilations chosen on our VOC subset's training masks, then frozen.
    """
    (h, w), device = features.shape[-2:], features.device
    steps = [(dy * d, dx * d) for d in dilations for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]
    dy, dx = torch.tensor(steps, device=device).T                  # (N,) each
    y = torch.arange(h, device=device).repeat_interleave(w)[:, None] + dy   # (hw,N)
    x = torch.arange(w, device=device).repeat(h)[:, None] + dx     # (hw,N)
    inside = (y >= 0) & (y < h) & (x >= 0) & (x < w)
    index = y.clamp(0, h - 1) * w + x.clamp(0, w - 1)
    f = F.normalize((features - features.mean((2, 3), keepdim=True)).flatten(2), dim=1).transpose(1, 2)   # (B,hw,C)
    cos = torch.stack([(f * f[:, j]).sum(-1) for j in index.T], -1)   # (B,hw,N), one neighbour at a time: memory stays linear
    return ((cos - 1) / temperature).exp() * inside, index         # the -1 cancels in P: it keeps exp() in range

def affinity_guided(maps, features, steps=40, strength=100.0, dilations=DILATIONS, temperature=0.1):
    """M <- (M0 + lambda P M) / (1 + lambda), P = D^-1 A: a random walk that restarts at M0 and settles where

        E(M) = sum_i d_i (M_i - M0_i)^2 + lambda sum_ij A_ij (M_i - M_j)^2 / 2,     d_i = sum_j A_ij

    is least: true to the localization map, alike where the intermediate features are alike. The minimiser solves
    (D + lambda (D - A)) M = D M0; the walk is that system's Jacobi iteration, and every step lowers E.

    maps (B,K,h,w) in [0,1] on the features' grid; features (B,C,h,w). Returns (B,K,h,w) in [0,1]. strength is lambda >= 0.
    Source: abstract, sentence 6; the walk after AffinityNet (Ahn & Kwak 2018), whose affinities are learned by a second
    network: here they are read off the one network's own features. Raises ValueError when the grids differ.

    Worked example: two pixels, each the other's only neighbour (so P is the same for every A_12), lambda = 1, M0 = (1, 0). One step
    gives (1 + 0, 0 + 1) / 2 = (0.5, 0.5); the next (1 + 0.5, 0 + 0.5) / 2 = (0.75, 0.25); the walk settles at (2/3, 1/3).

    >>> affinity_guided(torch.tensor([[[[1., 0.]]]]), torch.zeros(1, 3, 1, 2), steps=2, strength=1.0)
    tensor([[[[0.7500, 0.2500]]]])
    """
    if maps.shape[-2:] != features.shape[-2:]:
        raise ValueError(f"maps {tuple(maps.shape)} and features {tuple(features.shape)} must share one grid")
    A, index = affinity(features, dilations, temperature)          # (B,hw,N), (hw,N)
    P = (A / A.sum(-1, keepdim=True).clamp_min(1e-30))[:, None]    # (B,1,hw,N); a 1x1 grid has no neighbour
    M0 = M = maps.flatten(2)                                       # (B,K,hw)
    for _ in range(steps):
        M = (M0 + strength * (P * M[:, :, index]).sum(-1)) / (1 + strength)
    return M.unflatten(2, maps.shape[-2:])                         # (B,K,h,w)

def affinity_energy(maps, features, start=None, strength=1.0, dilations=DILATIONS, temperature=0.1):
    """E / pairs = [sum_i d_i (M_i - M0_i)^2 + lambda sum_ij A_ij (M_i - M_j)^2 / 2] / (number of ordered pairs ij with A_ij > 0).

    The energy that `affinity_guided` lowers, given the same strength (lambda) and M0 = start, averaged over batch and classes: a scalar
    >= 0. With start = None the first sum is left out: a loss on unrefined maps that asks them to agree with the features; lambda
    then only scales it. maps, start (B,K,h,w); features (B,C,h,w). Gradients flow to all of them: detach what should not move.
    Source: abstract, sentence 6; the energy is our choice. Raises ValueError when the grids differ.
    """
    if maps.shape[-2:] != features.shape[-2:]:
        raise ValueError(f"maps {tuple(maps.shape)} and features {tuple(features.shape)} must share one grid")
    A, index = affinity(features, dilations, temperature)          # (B,hw,N)
    M = maps.flatten(2)                                            # (B,K,hw)
    E = strength * (A[:, None] * (M[..., None] - M[:, :, index]) ** 2).sum((-1, -2)) / 2   # (B,K)
    if start is not None:
        E = E + (A.sum(-1)[:, None] * (M - start.flatten(2)) ** 2).sum(-1)
    return (E / (A > 0).sum((1, 2)).clamp_min(1)[:, None]).mean()

# ---- 3. the image itself -> self-guided refinement ---------------------------------------------------------------------
def box_mean(x, radius):
    """Mean over the (2r+1)^2 window around each pixel, cut at the border and divided by the pixels in it.

    x (B,C,H,W) -> (B,C,H,W), radius >= 0. Running sums: the cost is the same for every radius, the memory linear in the pixels.

    >>> box_mean(torch.tensor([[[[1., 2., 6.]]]]), radius=1)
    tensor([[[[1.5000, 3.0000, 4.0000]]]])
    """
    counts = []                                                    # floats: dividing by integers takes several times as long
    for dim in (2, 3):
        n, total = x.shape[dim], x.cumsum(dim)                     # sum up to i; the window is total[i + r] - total[i - r - 1]
        r, i = min(radius, n - 1), torch.arange(n, device=x.device, dtype=x.dtype)
        end = total.narrow(dim, n - 1, 1).expand(*x.shape[:dim], r, *x.shape[dim + 1:])
        x = torch.cat([total.narrow(dim, r, n - r), end], dim)
        x.narrow(dim, r + 1, n - r - 1).sub_(total.narrow(dim, 0, n - r - 1))
        counts.append((i + r).clamp_max(n - 1) - (i - r).clamp_min(0) + 1)
    return x.div_(counts[0][:, None]).div_(counts[1])

def affine(a, b, I, sign=1):
    """b + sign a . I = b + sign sum_c a_c I_c: a yields one (B,K,h,w) for each colour c of I (B,3,h,w); b (B,K,h,w)."""
    for c, a_c in enumerate(a):
        b = torch.addcmul(b, a_c, I[:, c:c + 1], value=sign)
    return b

def guided_coefficients(p, I, radius, eps):
    """In every window omega_k the result is an affine function of the colours, q_i = a_k . I_i + b_k, fitted to p:

        a_k = (Sigma_k + eps U)^-1 (mean_k(I p) - mu_k mean_k(p)),    b_k = mean_k(p) - a_k . mu_k

    p (B,K,h,w) float32, the maps; I (B,3,h,w) in [0,1], the guidance image; Sigma_k, mu_k the 3x3 covariance and mean of I
    in omega_k; U the identity. Returns mean(a), (B,K,h,w) for each colour, and mean(b) (B,K,h,w), over the windows that hold a pixel.
    Source: He, Sun & Tang, Guided Image Filtering, ECCV 2010, eqs. 14-16. Raises ValueError: sizes differ, I has not 3 colours, radius < 0
    or eps <= 0.
    """
    if p.shape[-2:] != I.shape[-2:] or I.shape[1] != 3 or radius < 0 or eps <= 0:
        raise ValueError(f"want p {tuple(p.shape)} and I {tuple(I.shape)} of one size, I of 3 colours, radius >= 0 and eps > 0")
    x = torch.cat([I, p], 1)                                       # (B,3+K,h,w)
    centre = x.mean((2, 3), keepdim=True)                          # (B,3+K,1,1)
    x = x - centre                                                 # the filter is affine: centring keeps float32 sums small
    mean = box_mean(x, radius)                                     # (B,3+K,h,w): mu_k, then mean_k(p)
    minus = lambda u, v, w: torch.addcmul(u, v, w, value=-1)       # u - v w in one pass over memory
    cov = lambda c: minus(box_mean(x[:, c:c + 1] * x[:, c:], radius), mean[:, c:c + 1], mean[:, c:])   # of channel c with c, c + 1, ...
    s00, s01, s02, c0 = cov(0).tensor_split((1, 2, 3), 1)          # Sigma, symmetric, (B,1,h,w) each,
    s11, s12, c1 = cov(1).tensor_split((1, 2), 1)                  # and the right-hand side, (B,K,h,w) each
    s22, c2 = cov(2).tensor_split((1,), 1)
    d0 = (s00 + eps).clamp_min(eps)                                # Sigma + eps U = L diag(d) L^T, L = [1; l10 1; l20 l21 1];
    l10, l20 = s01 / d0, s02 / d0                                  # exact pivots d are never below eps, float32's may be
    d1 = minus(s11 + eps, l10, s01).clamp_min(eps)
    l21 = minus(s12, l10, s02) / d1
    d2 = minus(minus(s22 + eps, l20, s02), l21 ** 2, d1).clamp_min(eps)
    c1 = minus(c1, l10, c0)                                        # forward with L, then back with L^T
    a2 = minus(minus(c2, l20, c0), l21, c1) / d2
    a1 = minus(c1 / d1, l21, a2)
    a = [minus(minus(c0 / d0, l10, a1), l20, a2), a1, a2]          # (B,K,h,w) each
    b = affine(a, mean[:, 3:], mean[:, :3], -1)                    # (B,K,h,w)
    a, b = [box_mean(m, radius) for m in a], box_mean(b, radius)
    return a, affine(a, b + centre[:, 3:], centre[:, :3], -1)      # undo the centring

def guided_filter(p, I, radius, eps):
    """q_i = mean(a)_i . I_i + mean(b)_i: He, Sun & Tang's guided filter; p (B,K,H,W), I (B,3,H,W) in [0,1] on one grid.
    Returns (B,K,H,W), not clamped. Small eps: the image speaks; large eps, or a flat image: a box mean, twice. ValueError as above.

    Worked example: a black and a white pixel, p = (0.2, 0.8), one window. Every colour has variance 1/4 and covariance 0.15 with p:
    a = 0.15 / (3/4 + eps) for each. With eps = 3/4 that is 0.1, and q = 0.5 +- 3 * 0.1 / 2; with eps near 0, q = p.

    >>> guided_filter(torch.tensor([[[[.2, .8]]]]), torch.tensor([0., 1.]).expand(1, 3, 1, 2), radius=1, eps=0.75)
    tensor([[[[0.3500, 0.6500]]]])
    """
    a, b = guided_coefficients(p, I, radius, eps)                  # 3 (B,K,H,W), (B,K,H,W)
    return affine(a, b, I)

def up(x, size):
    """Bilinear x (B,C,h,w) -> (B,C,*size) with corners on corners, as sizes 16n+1 and strides 4, 8, 16 want it."""
    return F.interpolate(x, size, mode="bilinear", align_corners=True)

def self_guided(maps, image, radius=6, eps=1e-5):
    """q_i = clamp(up(mean(a))_i . I_i + up(mean(b))_i, 0, 1): the training image itself guides its maps to full resolution.

    The coefficients are fitted on the maps' own grid, to the image averaged down to it; the maps are never upsampled, only the
    coefficients are, and every edge in q comes from the image's own pixels (Fast Guided Filter, He & Sun 2015). Averaging
    puts cells up to half a cell beside the maps' nodes at the border: as good as exact alignment where measured.

    maps (B,K,h,w) in [0,1]; image (B,3,H,W) in [0,1]; radius in cells of the maps' grid. Returns (B,K,H,W) in [0,1]; a map that
    is zero everywhere stays zero. Source: abstract, sentence 7. That the paper's refinement is this filter is our reading
    of its wording, not a fact; radius and eps chosen on our VOC subset's training masks, then frozen. ValueError as above.

    Worked example: a map of two cells and a picture of four pixels, two black, two white: the edge is the picture's.

    >>> self_guided(torch.tensor([[[[.2, .8]]]]), torch.tensor([0., 0., 1., 1.]).expand(1, 3, 1, 4), radius=1)
    tensor([[[[0.2000, 0.2000, 0.8000, 0.8000]]]])
    """
    size, small = image.shape[-2:], F.interpolate(image, maps.shape[-2:], mode="area")   # (B,3,h,w)
    a, b = guided_coefficients(maps, small, radius, eps)           # 3 (B,K,h,w), (B,K,h,w)
    return affine((up(m, size) for m in a), up(b, size), image).clamp(0, 1)   # (B,K,H,W)

# ---- 4. maps -> pseudo labels ------------------------------------------------------------------------------------------
def pseudo_labels(maps, labels, lo, hi):
    """Class argmax_k M_k where max_k M_k > hi; background 0 where max_k M_k < lo; 255 (ignored by the loss) between.

    maps (B,K,H,W) in [0,1]; labels (B,K) in {0,1}; 0 <= lo <= hi <= 1. Returns (B,H,W) uint8 with 0 background, k+1 class
    k, 255 ignore. Classes absent from the tags can never appear. Source: abstract, sentence 8; the ignored band as in
    AffinityNet/IRN (Ahn & Kwak 2018; Ahn et al. 2019). Raises ValueError when the thresholds are out of order.

    >>> pseudo_labels(torch.tensor([[[[.9, .4, .1]], [[.2, .8, .3]]]]), torch.tensor([[1, 0]]), 0.25, 0.5)
    tensor([[[  1, 255,   0]]], dtype=torch.uint8)
    """
    if not 0 <= lo <= hi <= 1:
        raise ValueError(f"want 0 <= lo <= hi <= 1, got lo {lo} and hi {hi}")
    best, k = (maps * labels[:, :, None, None]).max(1)             # (B,H,W)
    return torch.where(best > hi, k + 1, torch.where(best < lo, 0, IGNORE)).to(torch.uint8)
