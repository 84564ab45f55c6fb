"""PASCAL VOC as it is distributed: image tags for training, masks for scoring only; a toy set in the same layout; mIoU.

Training reads JPEGImages, Annotations and ImageSets; SegmentationClass* is for scoring, and for `--supervised`, the upper bound.
A folder with other classes than VOC's twenty names them in a file classes.txt, one a line, beside ImageSets.
"""
import xml.etree.ElementTree as ET
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps

from refine import IGNORE

VOC_CLASSES = ("aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
               "pottedplant sheep sofa train tvmonitor").split()
CORE = {"background", "cat", "cow", "dog", "horse", "person", "sheep"}   # the classes our VOC subset was drawn for

class InputError(Exception):
    """The one error a user can cause: 'file: what is wrong; expected what; fix'. train.py prints it and exits with 2."""
    def __init__(self, message):
        super().__init__(" ".join(message.split("InputError: ")[-1].split()))   # one line, without a loader process's traceback

def need(ok, message):
    """Raise InputError(message) unless ok."""
    if not ok:
        raise InputError(message)

@contextmanager
def refusing(what, expected):
    """Whatever a parser, decoder, disk or network raises inside, of a dozen types, becomes InputError('what (reason); expected')."""
    try:
        yield
    except Exception as e:
        raise e if isinstance(e, (InputError, MemoryError)) else InputError(f"{what} ({type(e).__name__}: {str(e)[:120]}); {expected}")

# ---- files -> arrays ---------------------------------------------------------------------------------------------------
def decoded(path, convert):
    """convert(PIL image in path). Raises InputError."""
    with (refusing(f"{path}: cannot be read as an image", "expected a whole JPEG or PNG; replace it or unlist its id"),
          Image.open(path, formats=("JPEG", "PNG")) as image):
        need(min(image.size) >= 16 and image.width * image.height <= 64_000_000,
             f"{path}: {image.size} pixels; expected 16 or more a side and at most 64 million; resize it or unlist its id")
        return convert(image)

def read_image(path):
    """RGB PIL image, upright (EXIF), from grey, CMYK, palette, RGBA or 16-bit files too. Raises InputError."""
    image = decoded(path, ImageOps.exif_transpose)
    if image.mode.startswith("I"):                                 # 16-bit grey: keep the upper byte
        image = Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
    return image.convert("RGB")

def upright_size(path):
    """(W,H) after EXIF rotation, from the header; a JPEG without its end marker is decoded to see. Raises InputError."""
    def convert(image):
        if image.format == "JPEG" and b"\xff\xd9" not in Path(path).read_bytes()[-4096:]:
            image.load()
        return image.size[::-1] if image.getexif().get(0x0112) in (5, 6, 7, 8) else image.size
    return decoded(path, convert)

def read_mask(path, size, num_classes):
    """Palette or grey PNG -> (H,W) uint8 with 0..num_classes and 255. size is the image's (W,H). Raises InputError."""
    mode, mask = decoded(path, lambda image: (image.mode, np.array(image)))
    need(mode in ("P", "L") and mask.shape[::-1] == size,
         f"{path}: mode {mode}, {mask.shape[1::-1]} pixels; expected an indexed PNG of its image's {size}; re-export it")
    wrong = mask[(mask > num_classes) & (mask != IGNORE)]
    need(not wrong.size, f"{path}: index {wrong[:1]}; expected 0..{num_classes} or 255; re-export it with this class list")
    return mask

def read_tags(path, classes, difficult=True):
    """Set of class names in a VOC annotation: `object/name` directly, never an object's parts; without difficult, not objects
    marked <difficult>1. Raises InputError, also on a DOCTYPE: VOC has none, and entity bombs need one."""
    with refusing(f"{path}: no VOC annotation", "expected <annotation><object><name>; write it or unlist its id"):
        text = Path(path).read_bytes()
        need(b"<!" not in text.replace(b"<!--", b"") and b"\0" not in text and len(text) <= 1_000_000,
             f"{path}: it holds a DOCTYPE, a NUL or a megabyte; expected plain XML; write it or unlist its id")
        objects = ET.fromstring(text).findall("object")
    tags = {(o.findtext("name") or "").strip() for o in objects if difficult or (o.findtext("difficult") or "0").strip() != "1"}
    need(tags and tags <= set(classes), f"{path}: tagged {' '.join(sorted(tags - set(classes)))[:60] or 'nothing'}; expected one or "
         f"more <object>{'' if difficult else ', not difficult,'} named {' '.join(classes)}; mend it, edit classes.txt, or unlist its id")
    return tags

def read_list(path):
    """Image ids, one a line; CRLF, blank lines and the -1/0/1 column of ImageSets/Main are understood (-1 is left out)."""
    with refusing(f"{path}: cannot be read", "expected a text file with one image id a line; write it"):
        lines = [line.split() for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    for parts in lines:
        need(parts[1:] in ([], ["-1"], ["0"], ["1"]) and not any(bad in parts[0] for bad in ("/", "..", "\0")),
             f"{path}: line {' '.join(parts)[:60]!r}; expected an id and perhaps -1, 0 or 1; mend the line")
    ids = list(dict.fromkeys(parts[0] for parts in lines if parts[1:] != ["-1"]))
    need(ids, f"{path}: lists no image; expected one id a line; fill it")
    return ids

# ---- the devkit --------------------------------------------------------------------------------------------------------
class VOC:
    """One split of a devkit: ids, and for i the image, its tags y (K,) and, for scoring only, its mask.

    path is the folder that holds ImageSets, or the one above VOC2012, or the one above VOCdevkit/VOC2012. image_paths[i] is
    JPEGImages/ID.jpg, mask_paths[i] in SegmentationClassAug or SegmentationClass, or None where there is none. Raises InputError.
    """
    def __init__(self, path, split, difficult=True):
        roots = [root for root in (Path(path), Path(path) / "VOC2012", Path(path) / "VOCdevkit" / "VOC2012")
                 if (root / "ImageSets" / "Segmentation").is_dir()]
        need(roots, f"{path}: {'not a VOC devkit' if Path(path).is_dir() else 'no such folder'}; expected ImageSets/Segmentation in "
             "it, in its VOC2012 or in its VOCdevkit/VOC2012; correct --voc")
        self.root, self.difficult, self.labels = roots[0], difficult, None   # labels (n,K) float32 come with scan
        lists, names = self.root / "ImageSets" / "Segmentation", self.root / "classes.txt"
        self.ids = read_list(lists / ("train_aug.txt" if split == "train" and (lists / "train_aug.txt").exists() else f"{split}.txt"))
        self.image_paths = [self.root / "JPEGImages" / f"{name}.jpg" for name in self.ids]
        masks = ([self.root / f"SegmentationClass{kind}" / f"{name}.png" for kind in ("Aug", "")] for name in self.ids)
        self.mask_paths = [next((path for path in paths if path.exists()), None) for paths in masks]
        lines = names.read_text(encoding="utf-8-sig", errors="replace").splitlines() if names.exists() else VOC_CLASSES
        self.classes = [line.strip() for line in lines if line.strip()]
        need(0 < len(set(self.classes)) == len(self.classes) < 255 and "background" not in self.classes,
             f"{names}: {len(self.classes)} classes; expected 1 to 254 different names without background, one a line; mend it")

    def mask(self, i, size):
        """(H,W) uint8 ground truth of image i, whose size is (W,H). For measuring only. Raises InputError."""
        return read_mask(self.mask_paths[i], size, len(self.classes))

    def scan(self, masks=False, track=iter):
        """Read every tag, check every image's header and end and, with masks, read every mask, before training begins. Sets
        and returns labels (n,K) float32; track(range(n)) may show progress. Raises InputError."""
        self.labels = torch.zeros(len(self.ids), len(self.classes))
        for i in track(range(len(self.ids))):
            size = upright_size(self.image_paths[i])
            if masks and self.mask_paths[i]:
                self.mask(i, size)
            for tag in read_tags(self.root / "Annotations" / f"{self.ids[i]}.xml", self.classes, self.difficult):
                self.labels[i, self.classes.index(tag)] = 1
        return self.labels

# ---- images -> network inputs ------------------------------------------------------------------------------------------
def to_tensor(image):
    """PIL RGB -> (3,H,W) float32 in [0,1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255

def aligned(image, size):
    """Resize so that the long side is about `size` and both sides are 16n+1, where every feature grid is aligned."""
    scale = size / max(image.size)
    return image.resize([16 * max(1, round((side * scale - 1) / 16)) + 1 for side in image.size], Image.BILINEAR)

class Crops(torch.utils.data.Dataset):
    """Joint scale / flip / crop of image i and its label map: everything random is drawn from (seed, epoch, i) alone.

    The long side becomes size * U(scale), then a crop x crop window is cut; outside the image the input is grey (128/255) and the
    label 255. label_paths lists the PNGs of pseudo labels, or is None while there are none (all 255). Returns image
    (3,crop,crop) float32 in [0,1], tags (K,) float32, label (crop,crop) int64 and i.
    """
    def __init__(self, voc, crop, size, scale, seed, epoch, label_paths=None):
        self.voc, self.crop, self.size, self.scale = voc, crop, size, scale
        self.seed, self.epoch, self.label_paths = seed, epoch, label_paths

    def __getitem__(self, i):
        rng, image = np.random.default_rng([self.seed, self.epoch, i]), read_image(self.voc.image_paths[i])
        w, h = image.size
        c, ratio = self.crop, self.size * rng.uniform(*self.scale) / max(w, h)   # ratio: output pixels per image pixel
        x, y = (rng.uniform(min(0, side - c / ratio), max(0, side - c / ratio)) for side in (w, h))   # crop corner
        x0, y0, x1, y1 = max(0, x), max(0, y), min(w, x + c / ratio), min(h, y + c / ratio)   # its part inside the image
        at = (round((x0 - x) * ratio), round((y0 - y) * ratio))
        part = (max(1, min(c - at[0], round((x1 - x0) * ratio))), max(1, min(c - at[1], round((y1 - y0) * ratio))))
        flip = rng.random() < 0.5
        def cut(picture, resample, fill):
            canvas = Image.new(picture.mode, (c, c), fill)
            canvas.paste(picture.resize(part, resample, box=(x0, y0, x1, y1)), at)
            return ImageOps.mirror(canvas) if flip else canvas
        label = torch.full((c, c), IGNORE)
        if self.label_paths:
            indices = read_mask(self.label_paths[i], (w, h), len(self.voc.classes))
            label = torch.from_numpy(np.array(cut(Image.fromarray(indices), Image.NEAREST, IGNORE))).long()
        return to_tensor(cut(image, Image.BILINEAR, (128,) * 3)), self.voc.labels[i], label, i

# ---- label maps and their scores ---------------------------------------------------------------------------------------
def palette_image(label):
    """(H,W) uint8 indices -> PIL palette image in VOC's colours: bits 3b, 3b+1, 3b+2 of an index are bit 7-b of red, green, blue."""
    image, (index, channel) = Image.fromarray(np.ascontiguousarray(label, dtype=np.uint8)), np.mgrid[:256, :3]
    image.putpalette(sum(((index >> (3 * b + channel)) & 1) << (7 - b) for b in range(8)).flatten().tolist())
    return image

def confusion(target, prediction, num_classes):
    """C[g,p] = pixels of true class g predicted p, over pixels whose target is not 255: (K+1,K+1) int64."""
    n, keep = num_classes + 1, target != IGNORE
    return np.bincount(n * target[keep].astype(int) + prediction[keep], minlength=n * n).reshape(n, n)

def summary(C, classes):
    """{"miou", "core", "iou": {class: x}} of a confusion matrix: IoU_k = C_kk / (row_k + column_k - C_kk) in [0,1] of the classes that
    occur in a mask, and its means over them; core is None outside VOC."""
    hit, rows, columns = C.diagonal(), C.sum(1), C.sum(0)
    scores = {name: round(float(h / (r + c - h)), 4) for name, h, r, c in zip(["background", *classes], hit, rows, columns) if r}
    core = [x for name, x in scores.items() if name in CORE and CORE <= {"background", *classes}]
    return {"miou": round(sum(scores.values()) / max(1, len(scores)), 4),
            "core": round(sum(core) / len(core), 4) if core else None, "iou": scores}

def confusions(target, maps, present, num_classes, grid):
    """Confusion matrices (T,K+1,K+1) int64 of: class argmax_k M_k where max_k M_k >= t, else background, for every t of grid (T,)
    ascending, from one histogram. maps (P,H,W) in [0,1] are of the classes whose indices 0..K-1 are present (P,)."""
    n, keep, (best, k) = num_classes + 1, target != IGNORE, maps.max(0)
    passed = np.searchsorted(grid, best.numpy()[keep].astype(float), side="right")   # how many thresholds a pixel passes
    pairs = n * target[keep].astype(int) + present[k.numpy()[keep]] + 1
    H = np.bincount(passed * n * n + pairs, minlength=(len(grid) + 1) * n * n).reshape(-1, n, n)
    C = H[::-1].cumsum(0)[-2::-1]                                  # pixels that pass t: (T,n,n)
    C[:, :, 0] += H.sum((0, 2)) - C.sum(2)                         # those that do not are background
    return C

# ---- the toy set -------------------------------------------------------------------------------------------------------
TOY_CLASSES, TOY_HUES, TOY_SHAPES = zip(                           # name, hue, which points (u,v) lie inside at radius 1
    ("disc", (200, 70, 60), lambda u, v: u ** 2 + v ** 2 < 1),
    ("square", (70, 90, 200), lambda u, v: np.maximum(abs(u), abs(v)) < 0.75),
    ("triangle", (50, 190, 60), lambda u, v: np.maximum(-v, 0.87 * abs(u) + 0.5 * v) < 0.6),
    ("cross", (210, 180, 50), lambda u, v: (np.minimum(abs(u), abs(v)) < 0.3) & (np.maximum(abs(u), abs(v)) < 1)))

def _texture(rng, size, colour):
    """(size,size,3) float: smooth blotches of two nearby colours plus fine grain."""
    t = Image.fromarray(rng.integers(0, 255, (5, 5), dtype=np.uint8)).resize((size, size), Image.BICUBIC)
    return colour + rng.uniform(-35, 35, 3) * np.asarray(t)[:, :, None] / 255 + rng.normal(0, 8, (size, size, 1))

def make_toy(root, train=240, val=60, size=97, seed=0):
    """Write a small VOC devkit under root and return it as Path: one to three objects of four shapes on blotchy, dull backgrounds;
    later objects cover earlier ones; borders are 255. A shape's hue is its own, give or take: six conv blocks learn it in a minute."""
    root, rng = Path(root), np.random.default_rng(seed)
    for folder in ("JPEGImages", "Annotations", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    ids, (y, x) = [f"toy_{n:04d}" for n in range(train + val)], np.mgrid[:size, :size]
    for name in ids:
        image, mask = _texture(rng, size, rng.integers(60, 200) + rng.uniform(-25, 25, 3)), np.zeros((size, size), np.uint8)
        for k in rng.integers(len(TOY_CLASSES), size=rng.integers(1, 4)):
            r, angle = rng.uniform(0.14, 0.26) * size, rng.uniform(0, np.pi)
            cx, cy = rng.uniform(r, size - r, 2)
            u, v = ((x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)) / r, ((y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)) / r
            inside = TOY_SHAPES[k](u, v)
            grown = np.asarray(Image.fromarray(inside).convert("L").filter(ImageFilter.MaxFilter(3))) > 0
            image[inside] = _texture(rng, size, TOY_HUES[k] + rng.uniform(-30, 30, 3))[inside]
            mask[grown], mask[inside] = IGNORE, k + 1
        objects = "".join(f"<object><name>{TOY_CLASSES[k - 1]}</name></object>" for k in np.unique(mask) if 0 < k < IGNORE)
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(root / "JPEGImages" / f"{name}.jpg", quality=92)
        (root / "Annotations" / f"{name}.xml").write_text(f"<annotation><filename>{name}.jpg</filename>{objects}</annotation>\n")
        palette_image(mask).save(root / "SegmentationClass" / f"{name}.png")
    (root / "ImageSets/Segmentation/train.txt").write_text("\n".join(ids[:train]) + "\n")
    (root / "ImageSets/Segmentation/val.txt").write_text("\n".join(ids[train:]) + "\n")
    (root / "classes.txt").write_text("\n".join(TOY_CLASSES) + "\n")   # last: whoever finds it finds a whole set
    return root
