"""From features to pseudo labels: the four stages of the method, one short function each.

Ke & Hsu (2018) name the stages in sentences 5 to 8 of their abstract and say which features each
of them reads. Only the abstract was available to us, so every formula and every number below is our
choice. The source of each is given beside it; "tuned" means that it was chosen using the
ground-truth masks of training photos of our VOC subsets (LO and HI also with val masks) and then
fixed (docs/CHOICES.md). `four_stages` runs the four stages in order:

    upsample            bring S to the grid of F_mid
    1 localization_maps M_k = relu(S_k) / max relu(S_k)            where is each class, roughly?
                        (for the CAM head of train.fit_cam: min(1, relu(S_k)))
    2 affinity_guided   M <- (M0 + lambda T M) / (1 + lambda)      spread M where F_mid is similar
      stretch           M_k <- M_k / max(max M_k, floor)           the walk lowers the peaks
    3 self_guided       q_i = a_i . I_i + b_i                      follow the image's own edges
    4 pseudo_labels     class if the highest M_k >= hi, background if it is < lo, else 255

Symbols: B images; K classes, of which P are tagged (`tagged` holds their indices); (h,w) the size
of a feature grid, (H,W) of the image; i, j pixels of the image or cells of a feature grid; k a
class; S scores of the CAM head, Z logits of the segmentation head, M localization maps, I the
image, F_mid intermediate features. The stages take and return batched tensors; they know nothing of
files, networks or options. The same `tagged` applies to every image of the batch. All results
except the label are differentiable.
"""

import torch
import torch.nn.functional as F

# The defaults of train.py and sgseg.py for photos. The toy set has its own STRENGTH, RADIUS, EPS,
# LO and HI (see TOY in train.py).
IGNORE = 255  # VOC's index for undecided pixels; losses and scores ignore them
LO = 0.30  # a pixel is background if all its maps are below LO (tuned)
HI = 0.60  # a pixel gets a class if that class's map is at least HI (tuned)
STRENGTH = 100.0  # lambda, the weight of the second term of E(M), in round 1 (tuned)
WALK_STEPS = 40  # iterations of the random walk (tuned)
TEMPERATURE = 0.1  # of the affinity exp((cos - 1) / temperature) (tuned)
DILATIONS = (1, 3, 6, 12, 24)  # distances of the 40 neighbours in cells (our choice, after PAMR)
# (dy, dx) of the 8 directions
DIRECTIONS = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))
FLOOR = 0.3  # after the walk a map is multiplied by at most 1 / FLOOR (tuned)
RADIUS = 3  # of the guided filter's windows, in cells of F_mid's grid (tuned)
EPS = 1e-5  # regularisation of the guided filter (tuned)


def localization_maps(scores, tagged, unit=None):
    """Stage 1. Return M_k = relu(S_k) / max relu(S_k) for every tagged class k.

    With `unit`, the maps are not divided by their maximum: M_k = min(1, relu(S_k) / unit). Use it
    if the scores have the same scale on all photos, as those of `train.fit_cam` have.

    scores (B,K,h,w): the CAM scores S. tagged (P,): indices of the tagged classes.
    unit: a positive score (1 for the CAM head of `train.fit_cam`), or None.
    Returns (B,P,h,w) in [0,1]; a class without a positive score has a map of zeros.
    Raises ValueError unless `tagged` holds distinct indices below K and unit, if given, is
    positive.
    Source: abstract, sentence 5; class activation mapping (Zhou et al. 2016). `unit` is our choice.

    >>> localization_maps(torch.tensor([[[[9., 9.], [9., 9.]], [[2., 4.], [-1., 1.]]]]), [1])
    tensor([[[[0.5000, 1.0000],
              [0.0000, 0.2500]]]])
    """
    check_tagged(tagged, scores.shape[1])
    if unit is not None and not unit > 0:
        raise ValueError(f"unit must be positive, got {unit}")
    M = scores.relu()[:, tagged]  # (B,P,h,w)
    return stretch(M, 1e-5) if unit is None else (M / unit).clamp_max(1)


def head_maps(logits, tagged, temperature=2.0):
    """Stage 1 from round 2 on. Return softmax(Z / temperature)_k of every tagged class k.

    The softmax runs over the background and the tagged classes. The segmentation head was trained
    on the labels of all photos. Most of their errors differ from photo to photo and average out, so
    the head's maps are better than those of the CAM head. Dividing by `temperature` counteracts its
    over-confidence.

    logits (B,K+1,h,w): Z, background first. tagged (P,): indices of the tagged classes.
    Returns (B,P,h,w) in [0,1]. Raises ValueError as `localization_maps` does.
    Source: our choice (temperature: tuned).

    Z has the channels background, class 0, class 1. Class 0 has no tag, so its logit, 9, has
    no effect:

    >>> head_maps(torch.tensor([0., 9., 0.]).view(1, 3, 1, 1), [1]).item()
    0.5
    """
    check_tagged(tagged, logits.shape[1] - 1)
    channels = [0, *(int(k) + 1 for k in tagged)]
    return (logits[:, channels] / temperature).softmax(1)[:, 1:]  # (B,P,h,w)


def affinity(features, dilations=DILATIONS, temperature=TEMPERATURE):
    """Return A_ij = exp((cos(f_i, f_j) - 1) / temperature) for every cell i and its neighbours j.

    f is the feature map minus its mean over the image. The mean is what all cells have in common:
    if it were not subtracted, the mean cosine of two random cells would be about 0.4, not 0 (for
    lite0). The neighbours of i are 8 cells at each of the distances `dilations`,
    N = 8 len(dilations) in all. The graph is symmetric: A_ij = A_ji.

    features (B,C,h,w). Returns A (B,hw,N) in [0,1], 0 where j lies outside the grid, and
    index (hw,N) int64, the cell j of every entry.
    Raises ValueError if temperature < 0.03: below about 0.02 the smallest affinity,
    exp(-2 / temperature), is rounded to 0, and a row of zeros could not be divided by its sum.
    Source: our choice; the cosine as in SEAM (Wang et al. 2020), the neighbours as in PAMR
    (Araslanov & Roth 2020).
    """
    if temperature < 0.03:
        raise ValueError(f"temperature must be at least 0.03, got {temperature}")
    h, w = features.shape[-2:]
    device = features.device
    # the neighbours j of every cell i
    offsets = torch.tensor(dilations)[:, None, None] * torch.tensor(DIRECTIONS)  # (dilations,8,2)
    dy, dx = offsets.flatten(0, 1).to(device).T  # (N,) each
    i = torch.arange(h * w, device=device)[:, None]
    y = i // w + dy  # (hw,N)
    x = i % w + dx  # (hw,N)
    inside = (y >= 0) & (y < h) & (x >= 0) & (x < w)
    index = y.clamp(0, h - 1) * w + x.clamp(0, w - 1)  # (hw,N)
    # Divide f by its norm. Deviations from the mean below 1e-5 of the largest feature are rounding
    # noise and are not scaled up to norm 1.
    f = features - features.mean((2, 3), keepdim=True)
    noise = max(1e-12, 1e-5 * float(features.detach().abs().max()))
    f = F.normalize(f.flatten(2), dim=1, eps=noise).transpose(1, 2)  # (B,hw,C)
    # one neighbour at a time: all at once would need N times the memory
    cos = torch.stack([(f * f[:, j]).sum(-1) for j in index.T], -1)  # (B,hw,N)
    return ((cos - 1) / temperature).exp() * inside, index


def affinity_guided(
    maps, features, strength=STRENGTH, walk_steps=WALK_STEPS, temperature=TEMPERATURE
):
    """Stage 2. Return the maps after `walk_steps` steps M <- (M0 + lambda T M) / (1 + lambda).

    T = D^-1 A holds the affinities divided by their row sums d_i, and the walk starts at M0 = maps.
    This is a random walk with restart over similar pixels: each step mixes in a share
    1 / (1 + lambda) of M0. Every step reduces the distance to the minimiser of the energy

        E(M) = sum_i d_i (M_i - M0_i)^2 + lambda sum_ij A_ij (M_i - M_j)^2 / 2,     d_i = sum_j A_ij

    Its first term keeps the map close to M0; the second pulls the values of two pixels together if
    their intermediate features are similar. The minimiser solves the linear system
    (D + lambda (D - A)) M = D M0. Each step is a Jacobi iteration of that system and multiplies the
    distance to its solution (in the maximum norm) by at most lambda / (1 + lambda). After 40 steps,
    at most 0.67 of the initial distance remains for lambda = 100, and 0.02 for lambda = 10. On
    photos we measured less: 0.2 and 0.003.

    maps (B,P,h,w) in [0,1]; features (B,C,h,w): F_mid; strength: lambda >= 0.
    Returns (B,P,h,w) in [0,1].
    Raises ValueError if maps and features differ in batch size or grid, if strength < 0, and as
    `affinity` does.
    Source: abstract, sentence 6; the energy and the walk are our choice, after AffinityNet (Ahn &
    Kwak 2018), where a second network learns the affinities.

    Worked example: two pixels are each other's only neighbour, lambda = 1, M0 = (1, 0). The first
    step gives (1 + 0, 0 + 1) / 2 = (0.5, 0.5), the second (1 + 0.5, 0 + 0.5) / 2 = (0.75, 0.25);
    the limit is (2/3, 1/3).

    >>> two = torch.tensor([[[[1., 0.]]]])
    >>> affinity_guided(two, torch.zeros(1, 3, 1, 2), strength=1, walk_steps=2)
    tensor([[[[0.7500, 0.2500]]]])
    """
    if len(maps) != len(features) or maps.shape[2:] != features.shape[2:]:
        raise ValueError(f"maps {tuple(maps.shape)} do not match features {tuple(features.shape)}")
    if not strength >= 0:
        raise ValueError(f"strength must not be negative, got {strength}")
    h, w = maps.shape[2:]
    if h * w == 1:
        return maps  # a single pixel has no neighbour
    A, index = affinity(features, temperature=temperature)  # (B,hw,N), (hw,N)
    T = A / A.sum(-1, keepdim=True)  # (B,hw,N)
    M0 = maps.flatten(2)  # (B,P,hw)
    M = M0
    for _ in range(walk_steps):
        M = (M0 + strength * (T[:, None] * M[:, :, index]).sum(-1)) / (1 + strength)
    return M.unflatten(2, (h, w))  # (B,P,h,w)


def self_guided(maps, image, radius=RADIUS, eps=EPS):
    """Stage 3. Return q_i = a_i . I_i + b_i, clamped to [0,1]: the maps follow the image's edges.

    In every window of the maps' grid the map is fitted as an affine function of the image's
    colours (`guided_coefficients`, on the image averaged down to that grid). Only the coefficients
    a, b are upsampled; they are then applied to the colours I_i at full resolution. As a and b
    are averaged over windows and interpolated, they vary slowly, and a sharp edge of q can only
    come from I (Fast Guided Filter, He & Sun 2015).

    maps (B,P,h,w) in [0,1]; image (B,3,H,W) in [0,1]; radius in cells of the maps' grid.
    Returns (B,P,H,W) in [0,1]; a map of zeros stays 0.
    Raises ValueError as `guided_coefficients` does.
    Source: abstract, sentence 7. That the paper means this filter is our reading of the sentence.

    Worked example: a map of two cells over an image of two black and two white pixels. The result
    has its edge where the image has its own.

    >>> black_white = torch.tensor([0., 0., 1., 1.]).expand(1, 3, 1, 4)
    >>> self_guided(torch.tensor([[[[.2, .8]]]]), black_white, radius=1)
    tensor([[[[0.2000, 0.2000, 0.8000, 0.8000]]]])
    """
    H, W = image.shape[-2:]
    small = F.interpolate(image, maps.shape[-2:], mode="area")  # (B,3,h,w)
    a, b = guided_coefficients(maps, small, radius, eps)  # (B,P,3,h,w), (B,P,h,w)
    q = upsample(b, (H, W))  # (B,P,H,W)
    for c in range(3):  # one colour at a time, to save memory
        q = torch.addcmul(q, upsample(a[:, :, c], (H, W)), image[:, c : c + 1])
    return q.clamp(0, 1)  # (B,P,H,W)


def pseudo_labels(maps, tagged, lo=LO, hi=HI):
    """Stage 4. Return the label of every pixel: a tagged class, background or undecided.

    A pixel takes the class of its highest map if that map reaches hi, background (0) if every map
    is below lo, and is undecided (255) otherwise. Classes without a tag cannot appear. The loss
    ignores 255. Where maps tie, the first one wins.

    maps (B,P,H,W) in [0,1]; tagged (P,): the class index of each map; 0 <= lo <= hi <= 1.
    Returns (B,H,W) uint8: class index + 1, 0 or 255. Without a tag all pixels are background.
    Raises ValueError if the maps are not finite, `tagged` is not P distinct indices of at most 253,
    or the thresholds are out of order.
    Source: abstract, sentence 8; the undecided band as in AffinityNet and IRN (Ahn & Kwak 2018; Ahn
    et al. 2019).

    >>> pseudo_labels(torch.tensor([[[[.9, .4, .1, .3]], [[.2, .8, .2, .3]]]]), [4, 7], 0.25, 0.5)
    tensor([[[  5,   8,   0, 255]]], dtype=torch.uint8)
    """
    check_tagged(tagged, IGNORE - 1)
    if not 0 <= lo <= hi <= 1:
        raise ValueError(f"want 0 <= lo <= hi <= 1, got lo {lo}, hi {hi}")
    if len(tagged) != maps.shape[1] or not maps.isfinite().all():
        raise ValueError(f"want {len(tagged)} finite maps, got maps of shape {tuple(maps.shape)}")
    if len(tagged) == 0:
        return torch.zeros_like(maps.sum(1), dtype=torch.uint8)
    best, p = maps.max(1)  # (B,H,W) each
    index = torch.as_tensor(tagged, device=maps.device)[p] + 1
    return torch.where(best >= hi, index, torch.where(best < lo, 0, IGNORE)).to(torch.uint8)


STAGES = (localization_maps, affinity_guided, self_guided)


def four_stages(scores, features, image, tagged, stages=STAGES, lo=LO, hi=HI, floor=FLOOR):
    """Return the localization maps after stages 1, 2 and 3, and the pseudo label of stage 4.

    scores (B,K,h,w): S, or Z (B,K+1,h,w) for `head_maps`; features (B,C,h2,w2): F_mid;
    image (B,3,H,W) in [0,1]; tagged (P,): indices of the tagged classes.
    stages: functions for stages 1 to 3; None in place of the second or third skips that stage. The
    maps are always stretched between stages 2 and 3, by a factor of at most 1 / floor.
    Returns localized (B,P,h2,w2), guided (B,P,h2,w2), refined (B,P,H,W), all in [0,1], and the
    label (B,H,W) uint8. Raises ValueError as the stages do.
    Source: abstract, sentences 5 to 8.
    """
    localize, guide, sharpen = stages
    localized = localize(upsample(scores, features.shape[-2:]), tagged)  # (B,P,h2,w2)
    guided = guide(localized, features) if guide else localized  # (B,P,h2,w2)
    guided = stretch(guided, floor)
    refined = sharpen(guided, image) if sharpen else upsample(guided, image.shape[-2:])
    return localized, guided, refined, pseudo_labels(refined, tagged, lo, hi)


# ---- the functions that the stages call ----------------------------------------------------------


def stretch(maps, floor):
    """Return M_k / max(max M_k, floor): maps scaled to a maximum of 1, by at most 1 / floor.

    Without that limit the weak map of a wrong tag would be amplified until it fills the picture.

    maps (B,P,h,w) >= 0. Returns (B,P,h,w). Source: our choice (floor: tuned).
    """
    return maps / maps.amax((2, 3), keepdim=True).clamp_min(floor)


def upsample(x, size):
    """Return x (B,C,h,w), bilinearly interpolated to (B,C,*size).

    The corner pixels of x become those of the result. If the image's sides have the form 16n + 1,
    this aligns the grids exactly: those of strides 4, 8 and 16 all begin and end at the image's
    first and last pixel.
    """
    if x.shape[1] == 0:  # a photo without a tag has no maps
        return x.new_zeros(*x.shape[:2], *size)
    return F.interpolate(x, size, mode="bilinear", align_corners=True)


def guided_coefficients(p, I, radius, eps):
    """Return the guided filter's coefficients, averaged over all windows that contain each pixel.

    In every window omega_n the result is an affine function of the colours, q_i = a_n . I_i + b_n:

        a_n = (Sigma_n + eps U)^-1 (mean_n(I p) - mu_n mean_n(p)),     b_n = mean_n(p) - a_n . mu_n

    mu_n and Sigma_n are the mean and the 3x3 covariance of the colours in omega_n, U the identity.

    p (B,P,h,w): the maps; I (B,3,h,w) in [0,1]: the guidance image; omega_n is 2 radius + 1 cells
    wide and high. Returns mean(a) (B,P,3,h,w) and mean(b) (B,P,h,w), computed in float64: in
    float32 the variance of a nearly flat window is lost.
    Raises ValueError if the sizes differ, I is not an RGB image in [0,1], radius < 0 or eps < 1e-9.
    Source: He, Sun & Tang, Guided Image Filtering (ECCV 2010), eqs. 14 to 16.
    """
    if p.shape[-2:] != I.shape[-2:] or I.shape[1] != 3:
        raise ValueError(f"maps {tuple(p.shape)} do not match the guidance image {tuple(I.shape)}")
    if not radius >= 0 or not eps >= 1e-9:
        raise ValueError(f"want radius >= 0 and eps >= 1e-9, got {radius} and {eps}")
    if I.min() < -1e-3 or I.max() > 1 + 1e-3:
        raise ValueError(f"want an image in [0,1], got {I.min():.3g} to {I.max():.3g}")
    x = torch.cat([I, p], 1).double()  # (B,3+P,h,w): the colours, then the maps
    mean = box_mean(x, radius)  # (B,3+P,h,w): mu_n, then mean_n(p)
    # in every window, the covariances of the three colours with the colours and with the maps
    products = (x[:, :3, None] * x[:, None]).flatten(1, 2)  # (B,3(3+P),h,w)
    products = box_mean(products, radius).unflatten(1, (3, -1))  # (B,3,3+P,h,w)
    covariance = products - mean[:, :3, None] * mean[:, None]  # (B,3,3+P,h,w)
    covariance = covariance.permute(0, 3, 4, 1, 2)  # (B,h,w,3,3+P)
    Sigma = covariance[..., :3] + eps * torch.eye(3, dtype=x.dtype, device=x.device)
    a = torch.linalg.solve(Sigma, covariance[..., 3:])  # (B,h,w,3,P)
    a = a.permute(0, 4, 3, 1, 2)  # (B,P,3,h,w)
    b = mean[:, 3:] - (a * mean[:, None, :3]).sum(2)  # (B,P,h,w)
    # every pixel lies in several windows: average their coefficients
    a = box_mean(a.flatten(1, 2), radius).unflatten(1, a.shape[1:3])
    return a.to(p.dtype), box_mean(b, radius).to(p.dtype)


def box_mean(x, radius):
    """Return the mean over the (2 radius + 1)^2 window around each pixel, clipped at the border.

    Computed with running sums, whose cost, unlike that of torch's average pooling, does not depend
    on the radius.

    x (B,C,H,W); radius >= 0. Returns (B,C,H,W).

    >>> box_mean(torch.tensor([[[[1., 2., 6.]]]]), radius=1)
    tensor([[[[1.5000, 3.0000, 4.0000]]]])
    """
    pixels = 1  # number of pixels in each window
    for dim in (2, 3):
        n = x.shape[dim]
        r = min(radius, n - 1)
        # pad so that the sum over the window of i is cumsum[i + 2r + 1] - cumsum[i]
        pad = (0, 0, r + 1, r) if dim == 2 else (r + 1, r)
        sums = F.pad(x, pad).cumsum_(dim)
        x = sums.narrow(dim, 2 * r + 1, n) - sums.narrow(dim, 0, n)
        i = torch.arange(n, device=x.device, dtype=x.dtype)
        count = (i + r).clamp_max(n - 1) - (i - r).clamp_min(0) + 1
        pixels = pixels * (count[:, None] if dim == 2 else count)
    return x / pixels


def check_tagged(tagged, num_classes):
    """Raise ValueError unless `tagged` holds (P,) distinct class indices below num_classes."""
    given = torch.as_tensor(tagged)
    indices = given.flatten().tolist()
    distinct = given.ndim == 1 and len(set(indices)) == len(indices)
    if not distinct or not all(type(k) is int and 0 <= k < num_classes for k in indices):
        raise ValueError(f"want distinct indices from 0 to {num_classes - 1}, got {tagged}")
