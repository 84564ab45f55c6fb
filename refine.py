"""The four stages from one network's features to dense pseudo labels, a short function each.

Ke & Hsu (2018), abstract, sentences 5 to 8, name the stages and what each looks at. No number and
no formula of the paper is in this repository: every one below is our choice, its source beside it
("tuned": on our VOC subsets' training masks, then frozen). `four_stages` is these steps in a row:

    up                  the scores S to the grid of F_mid
    1 localization_maps M_k = relu(S_k) / max relu(S_k)             high-level features: where
                        (or min(1, relu(S_k)), in the scale of fit_cam)
    2 affinity_guided   M <- (M0 + lambda T M) / (1 + lambda)       intermediate: alike together
      stretched         M_k <- M_k / max(max M_k, floor)            (the walk lowers peaks)
    3 self_guided       q_i = up(mean(a))_i . I_i + up(mean(b))_i   the image's own structure
    4 pseudo_labels     class where M >= hi, 0 where M < lo, 255 else             dense annotations

Symbols: B images; K classes, P of them tagged, their indices in `classes`; (h,w) a feature grid,
(H,W) the image; i, j pixels of one grid; k a class; S scores, Z logits, M maps. All is pure,
batched, float32 (the filter float64 inside) and, labels aside, differentiable.
"""

import torch
import torch.nn.functional as F

IGNORE = 255  # VOC's "void" index: no loss, no score
LO = 0.30  # background where every map stays below (tuned)
HI = 0.60  # a class where its map gets this far (tuned)
STRENGTH = 100.0  # lambda of the affinity energy (tuned)
STEPS = 40  # of the walk (tuned)
TEMPERATURE = 0.1  # of the affinity exp((cos - 1) / temperature) (tuned)
DILATIONS = (1, 3, 6, 12, 24)  # 40 neighbours, near and far (our choice, after PAMR)
DIRECTIONS = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))
FLOOR = 0.3  # after the walk a map is stretched by at most 1 / FLOOR (tuned)
RADIUS = 3  # of the guided filter's windows, in cells of the maps' grid (tuned)
EPS = 1e-5  # of the guided filter (tuned)


def localization_maps(scores, classes, unit=None):
    """Stage 1. M_k = min(1, relu(S_k) / unit) for the tagged k: roughly where.

    scores (B,K,h,w) float32, the CAM scores S; classes (P,) the indices of the tagged ones. unit:
    the score that counts as 1, where scores have a scale of their own (that of `fit_cam`: 1);
    None: the maximum of each map. Returns (B,P,h,w) in [0,1], 0 where nothing is positive. Source:
    abstract, sentence 5; class activation mapping, Zhou et al. 2016, with the usual relu and
    division by the maximum; `unit` is our choice. Raises ValueError where classes are no different
    indices from 0 to K-1, such as tags y, or unit is not positive.

    >>> localization_maps(torch.tensor([[[[9., 9.], [9., 9.]], [[2., 4.], [-1., 1.]]]]), [1])
    tensor([[[[0.5000, 1.0000],
              [0.0000, 0.2500]]]])
    """
    check_indices(classes, scores.shape[1])
    if unit is not None and not unit > 0:
        raise ValueError(f"want unit > 0, got {unit}")
    M = scores.relu()[:, classes]  # (B,P,h,w)
    return stretched(M, 1e-5) if unit is None else (M / unit).clamp_max(1)


def head_maps(logits, classes, soften=2.0):
    """Stage 1 of later rounds. M_k = softmax(Z / soften)_k over background and tagged classes: the
    segmentation head now knows more than the CAM head. Softened: it is over-sure of what it learnt.

    logits (B,K+1,h,w), Z, background first; classes (P,). Returns (B,P,h,w) in [0,1]. Our choice
    (soften: tuned). ValueError as `localization_maps`.

    >>> head_maps(torch.tensor([0., 9., 0.]).view(1, 3, 1, 1), [1]).item()      # class 0: no tag
    0.5
    """
    check_indices(classes, logits.shape[1] - 1)
    tagged = [0, *(int(k) + 1 for k in classes)]
    return (logits[:, tagged] / soften).softmax(1)[:, 1:]


def stretched(maps, floor):
    """M_k / max(max_ij M_k, floor), maps (B,P,h,w) >= 0: a maximum of 1, but never multiplied by
    more than 1 / floor: small classes do not vanish, wrong ones do not fill the picture."""
    return maps / maps.amax((2, 3), keepdim=True).clamp_min(floor)


def affinity(features, dilations=DILATIONS, temperature=TEMPERATURE):
    """A_ij = exp((cos(f_i, f_j) - 1) / temperature) between neighbours, f the features less their
    mean over the image: "alike for this image".

    The graph: each pixel i and the 8 around it at every dilation, N = 8 len(dilations) neighbours
    j; symmetric. features (B,C,h,w). Returns A (B,hw,N) in [0,1], 0 where j would leave the grid,
    and index (hw,N) int64, the pixel j. Our choice: the cosine as in SEAM (Wang et al. 2020), the
    graph as in PAMR (Araslanov & Roth 2020). Features that differ from their mean by less than 1e-5
    of the largest count as equal to it, which is rounding. Raises ValueError for temperature <
    0.03, where exp() leaves float32.
    """
    if temperature < 0.03:
        raise ValueError(f"want temperature >= 0.03, got {temperature}")
    h, w = features.shape[-2:]
    steps = torch.tensor(dilations)[:, None, None] * torch.tensor(DIRECTIONS)  # (dilations,8,2)
    dy, dx = steps.flatten(0, 1).to(features.device).T  # (N,) each
    i = torch.arange(h * w, device=features.device)[:, None]
    y = i // w + dy  # (hw,N)
    x = i % w + dx  # (hw,N)
    inside = (y >= 0) & (y < h) & (x >= 0) & (x < w)
    index = y.clamp(0, h - 1) * w + x.clamp(0, w - 1)
    f = features - features.mean((2, 3), keepdim=True)
    rounding = max(1e-12, 1e-5 * float(features.detach().abs().max()))
    f = F.normalize(f.flatten(2), dim=1, eps=rounding).transpose(1, 2)  # (B,hw,C)
    cos = torch.stack([(f * f[:, j]).sum(-1) for j in index.T], -1)  # (B,hw,N); memory stays linear
    return ((cos - 1) / temperature).exp() * inside, index  # -1: cancels in T, keeps exp() small


def affinity_guided(maps, features, strength=STRENGTH, steps=STEPS, temperature=TEMPERATURE):
    """Stage 2. M <- (M0 + lambda T M) / (1 + lambda), T = D^-1 A, `steps` times from M = M0 = maps:
    a random walk that restarts at the localization map. Every step nears the minimum of

        E(M) = sum_i d_i (M_i - M0_i)^2 + lambda sum_ij A_ij (M_i - M_j)^2 / 2,     d_i = sum_j A_ij

    true to the localization map, alike where the intermediate features are alike. The minimiser
    solves (D + lambda (D - A)) M = D M0; the walk is that system's Jacobi iteration, cut short: 40
    steps leave at most 0.67 of the way at lambda = 100, 0.02 at 10 (a step, at most lambda / (1 +
    lambda)).

    maps (B,P,h,w) in [0,1]; features (B,C,h,w); strength is lambda >= 0. Returns (B,P,h,w) in
    [0,1]. Source: abstract, sentence 6; the walk after AffinityNet (Ahn & Kwak 2018), whose
    affinities a second network learns: here they are read off the one network's features. Raises
    ValueError when batch or grid differ, strength < 0 or temperature < 0.03.

    Worked example: two pixels, each the other's only neighbour (T is the same for every A_12),
    lambda = 1, M0 = (1, 0): one step gives (1 + 0, 0 + 1) / 2 = (0.5, 0.5), the next (1 + 0.5, 0 +
    0.5) / 2 = (0.75, 0.25); the walk settles at (2/3, 1/3).

    >>> affinity_guided(torch.tensor([[[[1., 0.]]]]), torch.zeros(1, 3, 1, 2), strength=1, steps=2)
    tensor([[[[0.7500, 0.2500]]]])
    """
    check_grids(maps, features, strength)
    if maps.shape[2] * maps.shape[3] == 1:
        return maps  # no neighbour
    A, index = affinity(features, temperature=temperature)  # (B,hw,N), (hw,N)
    T = A / A.sum(-1, keepdim=True)  # (B,hw,N)
    M0 = maps.flatten(2)  # (B,P,hw)
    M = M0
    for _ in range(steps):
        M = (M0 + strength * (T[:, None] * M[:, :, index]).sum(-1)) / (1 + strength)
    return M.unflatten(2, maps.shape[-2:])  # (B,P,h,w)


def affinity_energy(maps, features, start=None, strength=STRENGTH, temperature=TEMPERATURE):
    """The energy E that `affinity_guided` lowers, M0 = start, divided by the number of ordered
    pairs with A_ij > 0, averaged over batch and classes: a scalar >= 0. With start = None its first
    sum is left out: a loss on unrefined maps that asks them to agree with the features (not used:
    docs/CHOICES.md).

    maps, start (B,P,h,w); features (B,C,h,w). Gradients flow to all of them: detach what should not
    move. Source: abstract, sentence 6; the energy is our choice. ValueError as `affinity_guided`.
    """
    check_grids(maps, features, strength)
    A, index = affinity(features, temperature=temperature)  # (B,hw,N)
    M = maps.flatten(2)  # (B,P,hw)
    apart = (M[..., None] - M[:, :, index]) ** 2  # (B,P,hw,N)
    E = strength * (A[:, None] * apart).sum((-1, -2)) / 2  # (B,P)
    if start is not None:
        E = E + (A.sum(-1)[:, None] * (M - start.flatten(2)) ** 2).sum(-1)
    return (E / (A > 0).sum((1, 2)).clamp_min(1)[:, None]).mean()


def check_indices(classes, num_classes):
    """Raise ValueError unless classes are (P,) different indices from 0 to num_classes - 1."""
    given = torch.as_tensor(classes)
    indices = given.flatten().tolist()
    different = given.ndim == 1 and len(set(indices)) == len(indices)
    if not different or not all(type(k) is int and 0 <= k < num_classes for k in indices):
        raise ValueError(f"want (P,) indices of tagged classes < {num_classes}, got {classes}")


def check_grids(maps, features, strength):
    """Raise ValueError unless maps (B,P,h,w), features (B,C,h,w) share B, h, w; strength >= 0."""
    if len(maps) != len(features) or maps.shape[2:] != features.shape[2:] or strength < 0:
        got = f"{tuple(maps.shape)}, {tuple(features.shape)}, {strength}"
        raise ValueError(f"want maps and features of one batch and grid, strength >= 0; got {got}")


def self_guided(maps, image, radius=RADIUS, eps=EPS):
    """Stage 3. q_i = clamp(up(mean(a))_i . I_i + up(mean(b))_i, 0, 1): the image guides its maps.

    The coefficients a, b are fitted on the maps' own grid, to the image averaged down to it; only
    they are upsampled, so every edge in q comes from the image's own pixels (Fast Guided Filter, He
    & Sun 2015). Averaging puts cells up to half a cell beside the maps' nodes at the border: as
    good as exact alignment where measured.

    maps (B,P,h,w) in [0,1]; image (B,3,H,W) in [0,1]; radius in cells. Returns (B,P,H,W) in [0,1];
    a map of zeros stays zero. Source: abstract, sentence 7. That the paper's refinement is this
    filter is our reading of its wording, not a fact. Raises ValueError as `guided_coefficients`.

    Worked example: a map of two cells, a picture of two black, two white pixels: the edge is its.

    >>> picture = torch.tensor([0., 0., 1., 1.]).expand(1, 3, 1, 4)
    >>> self_guided(torch.tensor([[[[.2, .8]]]]), picture, radius=1)
    tensor([[[[0.2000, 0.2000, 0.8000, 0.8000]]]])
    """
    size = image.shape[-2:]
    small = F.interpolate(image, maps.shape[-2:], mode="area")  # (B,3,h,w)
    a, b = guided_coefficients(maps, small, radius, eps)  # 3 (B,P,h,w), (B,P,h,w)
    return affine([up(a_c, size) for a_c in a], up(b, size), image).clamp(0, 1)  # (B,P,H,W)


def pseudo_labels(maps, classes, lo=LO, hi=HI):
    """Stage 4. classes[argmax_p M_p] + 1 where max M >= hi; background 0 where max M < lo; 255,
    ignored by the loss, between. Of equal maps the first wins; M = hi is labelled, M = lo
    undecided.

    maps (B,P,H,W) in [0,1]; classes (P,), the classes they are of: no other can appear; 0 <= lo <=
    hi <= 1. Returns (B,H,W) uint8; without a class all is background. Source: abstract, sentence 8;
    the band as in AffinityNet/IRN (Ahn & Kwak 2018; Ahn et al. 2019). ValueError: lo, hi out of
    order, a class above 253.

    >>> pseudo_labels(torch.tensor([[[[.9, .4, .1, .3]], [[.2, .8, .2, .3]]]]), [4, 7], 0.25, 0.5)
    tensor([[[  5,   8,   0, 255]]], dtype=torch.uint8)
    """
    if not 0 <= lo <= hi <= 1 or max(classes, default=0) > 253:
        raise ValueError(f"want 0 <= lo <= hi <= 1, classes <= 253; got {lo}, {hi}, {classes}")
    if len(classes) == 0:
        return torch.zeros_like(maps.sum(1), dtype=torch.uint8)
    best, p = maps.max(1)  # (B,H,W) each
    index = torch.as_tensor(classes, device=maps.device)[p] + 1
    return torch.where(best >= hi, index, torch.where(best < lo, 0, IGNORE)).to(torch.uint8)


STAGES = (localization_maps, affinity_guided, self_guided)


def four_stages(scores, features, image, classes, stages=STAGES, lo=LO, hi=HI, floor=FLOOR):
    """What a network says of an image becomes its dense pseudo label: the four stages in a row.

    scores (B,K,h,w), the CAM scores S; features (B,C,h2,w2), F_mid; image (B,3,H,W) in [0,1];
    classes (P,), the tagged ones. Returns the maps located, guided (B,P,h2,w2), refined (B,P,H,W),
    all in [0,1], and the label (B,H,W) uint8. stages: any of the first three may be a function of
    your own (later rounds: head_maps, with the logits Z for scores); None leaves stage 2 or 3 out,
    not the stretching between them, which floor bounds.
    """
    locate, guide, transfer = stages
    located = locate(up(scores, features.shape[-2:]), classes)  # (B,P,h2,w2)
    guided = stretched(guide(located, features) if guide else located, floor)  # (B,P,h2,w2)
    refined = transfer(guided, image) if transfer else up(guided, image.shape[-2:])  # (B,P,H,W)
    return located, guided, refined, pseudo_labels(refined, classes, lo, hi)


# ---- the numerics that the stages stand on -------------------------------------------------------


def up(x, size):
    """Bilinear x (B,C,h,w) -> (B,C,*size), corners on corners: right for sides 16n+1."""
    if x.shape[1] == 0:  # a photo without a tag has no maps
        return x.new_zeros(*x.shape[:2], *size)
    return F.interpolate(x, size, mode="bilinear", align_corners=True)


def guided_filter(p, I, radius, eps):
    """q_i = mean(a)_i . I_i + mean(b)_i: He, Sun & Tang's guided filter, all on one grid: what
    tests compare with its definition and docs/ with OpenCV's; the method runs `self_guided`.

    p (B,P,H,W); I (B,3,H,W) in [0,1]. Returns (B,P,H,W), not clamped. Small eps: the image speaks;
    large eps, or a flat image: a box mean, twice. ValueError as `guided_coefficients`.

    Worked example: a black and a white pixel, p = (0.2, 0.8), one window. Every colour has variance
    1/4 and covariance 0.15 with p: a = 0.15 / (3/4 + eps) for each. With eps = 3/4 that is 0.1, and
    q = 0.5 +- 3 * 0.1 / 2; with eps near 0, q = p.

    >>> picture = torch.tensor([0., 1.]).expand(1, 3, 1, 2)
    >>> guided_filter(torch.tensor([[[[.2, .8]]]]), picture, radius=1, eps=0.75)
    tensor([[[[0.3500, 0.6500]]]])
    """
    return affine(*guided_coefficients(p, I, radius, eps), I)


def guided_coefficients(p, I, radius, eps):
    """In every window omega_k the result is affine in the colours, q_i = a_k . I_i + b_k:

        a_k = (Sigma_k + eps U)^-1 (mean_k(I p) - mu_k mean_k(p)),    b_k = mean_k(p) - a_k . mu_k

    p (B,P,h,w) float32, the maps; I (B,3,h,w) in [0,1], the guidance image; Sigma_k, mu_k the 3x3
    covariance and mean of I in omega_k; U the identity. Returns mean(a), (B,P,h,w) for each colour,
    and mean(b) (B,P,h,w), over the windows that hold a pixel. Source: He, Sun & Tang, Guided Image
    Filtering, ECCV 2010, eqs. 14-16. Computed in float64: within 1e-5 of the definition for every
    radius, up to 2048x2048. Raises ValueError: sizes differ, I has not 3 colours or leaves [0,1],
    radius < 0 or eps < 1e-9.
    """
    if p.shape[-2:] != I.shape[-2:] or I.shape[1] != 3 or radius < 0 or eps < 1e-9:
        got = f"{tuple(p.shape)}, {tuple(I.shape)}, {radius} and {eps}"
        raise ValueError(f"want one size, I of 3 colours, radius >= 0, eps >= 1e-9; got {got}")
    if I.min() < -1e-3 or I.max() > 1 + 1e-3:
        raise ValueError(f"want a guidance image in [0,1], got {I.min():.3g} to {I.max():.3g}")
    x = torch.cat([I, p], 1).double()  # (B,3+P,h,w); float32 cannot tell a variance of 1e-7
    mean = box_mean(x, radius)  # (B,3+P,h,w): mu_k, then mean_k(p)
    a = solve3(*covariances(x, mean, radius), eps)  # 3 (B,P,h,w)
    b = affine(a, mean[:, 3:], mean[:, :3], -1)  # (B,P,h,w)
    return [box_mean(a_c, radius).to(p.dtype) for a_c in a], box_mean(b, radius).to(p.dtype)


def affine(a, b, I, sign=1):
    """b + sign sum_c a_c I_c: a three (B,P,h,w), one a colour; b (B,P,h,w); I (B,3,h,w)."""
    for c, a_c in enumerate(a):
        b = torch.addcmul(b, a_c, I[:, c : c + 1], value=sign)
    return b


def minus(u, v, w):
    """u - v w, in one pass over memory."""
    return torch.addcmul(u, v, w, value=-1)


def covariances(x, mean, radius):
    """Covariances, in every window, of each colour x_c with x_c, x_(c+1), ... and the maps: x
    (B,3+P,h,w), colours, then maps; mean its box mean. Returns a (B,3-c+P,h,w) for each c."""
    rows = []
    for c in range(3):
        product = box_mean(x[:, c : c + 1] * x[:, c:], radius)
        rows.append(minus(product, mean[:, c : c + 1], mean[:, c:]))
    return rows


def solve3(row0, row1, row2, eps):
    """a of (Sigma + eps U) a = c in every window, from the rows that `covariances` returns:
    Sigma + eps U = L diag(d) L^T with L = [1; l10 1; l20 l21 1], then forward and back; no pivot
    d is below eps. (torch.linalg.solve wants the matrices gathered first.)"""
    s00, s01, s02, c0 = row0.tensor_split((1, 2, 3), 1)  # s (B,1,h,w), c (B,P,h,w)
    s11, s12, c1 = row1.tensor_split((1, 2), 1)
    s22, c2 = row2.tensor_split((1,), 1)
    d0 = s00 + eps
    l10 = s01 / d0
    l20 = s02 / d0
    d1 = minus(s11 + eps, l10, s01)
    l21 = minus(s12, l10, s02) / d1
    d2 = minus(minus(s22 + eps, l20, s02), l21**2, d1)
    c1 = minus(c1, l10, c0)
    a2 = minus(minus(c2, l20, c0), l21, c1) / d2
    a1 = minus(c1 / d1, l21, a2)
    return [minus(minus(c0 / d0, l10, a1), l20, a2), a1, a2]


def box_mean(x, radius):
    """Mean over the (2r+1)^2 window around each pixel, cut at the border, divided by its pixels: x
    (B,C,H,W) -> (B,C,H,W), radius >= 0. Running sums cost hardly more for a larger radius, where
    torch's pooling does; the memory is linear in the pixels.

    >>> box_mean(torch.tensor([[[[1., 2., 6.]]]]), radius=1)
    tensor([[[[1.5000, 3.0000, 4.0000]]]])
    """
    pixels = 1
    for dim in (2, 3):
        n = x.shape[dim]
        r = min(radius, n - 1)
        pad = (0, 0, r + 1, r) if dim == 2 else (r + 1, r)
        sums = F.pad(x, pad).cumsum_(dim)  # r + 1 zeros first: sums[i] ends before i's window
        x = sums.narrow(dim, 2 * r + 1, n) - sums.narrow(dim, 0, n)
        i = torch.arange(n, device=x.device, dtype=x.dtype)  # floats: dividing by integers is slow
        count = (i + r).clamp_max(n - 1) - (i - r).clamp_min(0) + 1  # in the window of i
        pixels = pixels * (count[:, None] if dim == 2 else count)
    return x.div_(pixels)
