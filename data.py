"""PASCAL VOC as it is distributed: image tags for training, masks for scoring only; a toy set in the same layout; mIoU.

Training reads JPEGImages, Annotations and ImageSets; SegmentationClass* is for scoring, and for `--supervised`, the upper bound.
A folder with other classes than VOC's twenty names them in a file classes.txt, one a line, beside ImageSets.
"""
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps

IGNORE = 255
VOC_CLASSES = ("aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
               "pottedplant sheep sofa train tvmonitor").split()
CORE = {"background", "cat", "cow", "dog", "horse", "person", "sheep"}   # the classes our VOC subset was drawn for

class InputError(Exception):
    """The one error a user can cause: 'file: what is wrong; expected what; fix'. train.py prints it and exits with 2."""
    def __init__(self, message):
        message = message.split("InputError: ")[-1]                # a loader process puts its traceback in front
        super().__init__(" ".join(message.split()))                # one line, whatever a parser put into it

# ---- files -> arrays ---------------------------------------------------------------------------------------------------
def decoded(path, convert):
    """convert(PIL image in path); every failure of Pillow's parsers and decoders, a dozen types, turned into InputError."""
    try:
        with Image.open(path, formats=("JPEG", "PNG")) as image:
            if min(image.size) < 16 or image.width * image.height > 64_000_000:
                raise ValueError(f"{image.size} pixels, not 16 or more a side and at most 64 million")
            return convert(image)
    except Exception as e:
        raise InputError(f"{path}: cannot be read as an image ({e}); expected a whole JPEG or PNG; replace it or unlist its id")

def read_image(path):
    """RGB PIL image, upright (EXIF), from grey, CMYK, palette, RGBA or 16-bit files too. Raises InputError."""
    def convert(image):
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):                             # 16-bit grey: keep the upper byte
            image = Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
        return image.convert("RGB")
    return decoded(path, convert)

def upright_size(path):
    """(W,H) after EXIF rotation, from the header; a JPEG without its end marker is decoded to see. Raises InputError."""
    def convert(image):
        if image.format == "JPEG" and b"\xff\xd9" not in Path(path).read_bytes()[-4096:]:
            image.load()
        return image.size[::-1] if image.getexif().get(0x0112, 1) > 4 else image.size
    return decoded(path, convert)

def read_mask(path, size, num_classes):
    """Palette or grey PNG -> (H,W) uint8 with 0..num_classes and 255. size is the image's (W,H). Raises InputError."""
    mode, mask = decoded(path, lambda image: (image.mode, np.array(image)))
    if mode not in ("P", "L") or mask.shape[::-1] != size:
        raise InputError(f"{path}: mode {mode}, {mask.shape[1::-1]} pixels; expected an indexed PNG of its image's {size}; re-export it")
    wrong = mask[(mask > num_classes) & (mask != IGNORE)]
    if wrong.size:
        raise InputError(f"{path}: index {wrong[0]}; expected 0..{num_classes} or 255; re-export it with this class list")
    return mask

def read_tags(path, classes, difficult=True):
    """Set of class names in a VOC annotation: `object/name` directly, never an object's parts; without difficult, not objects
    marked <difficult>1. Raises InputError, also on a DOCTYPE: VOC has none, and entity bombs need one."""
    try:
        text = Path(path).read_bytes()
        if b"<!" in text.replace(b"<!--", b"") or b"\0" in text or len(text) > 1_000_000:
            raise ValueError("it holds a DOCTYPE, a NUL or a megabyte")
        objects = ET.fromstring(text).findall("object")
    except (ET.ParseError, ValueError, LookupError, OSError) as e:
        raise InputError(f"{path}: no plain VOC annotation ({e}); expected <annotation><object><name>; write it or unlist its id")
    tags = {(o.findtext("name") or "").strip() for o in objects if difficult or (o.findtext("difficult") or "0").strip() != "1"}
    if not tags or tags - set(classes):
        raise InputError(f"{path}: {'unknown class ' + min(tags - set(classes))[:40] if tags else 'no tag'}; expected one or more "
                         f"<object><name> of {' '.join(classes)}; mend it, edit classes.txt, or unlist its id")
    return tags

def read_list(path):
    """Image ids, one a line; CRLF, blank lines and the -1/0/1 column of ImageSets/Main are understood (-1 is left out)."""
    try:
        lines = [line.split() for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: cannot be read ({type(e).__name__}); expected a text file with one image id a line; write it")
    for parts in lines:
        if parts[1:] not in ([], ["-1"], ["0"], ["1"]) or any(bad in parts[0] for bad in ("/", "..", "\0")):
            raise InputError(f"{path}: line {' '.join(parts)[:60]!r}; expected an id and perhaps -1, 0 or 1; mend the line")
    ids = list(dict.fromkeys(parts[0] for parts in lines if parts[1:] != ["-1"]))
    if not ids:
        raise InputError(f"{path}: lists no image; expected one id a line; fill it")
    return ids

# ---- the devkit --------------------------------------------------------------------------------------------------------
class VOC:
    """One split of a devkit: ids, and for i the image, its tags y (K,) and, for scoring only, its mask.

    path is the folder that holds ImageSets, or the one above it, or the one above VOCdevkit. Raises InputError.
    """
    def __init__(self, path, split, difficult=True):
        roots = [root for root in (Path(path), Path(path) / "VOC2012", Path(path) / "VOCdevkit" / "VOC2012")
                 if (root / "ImageSets" / "Segmentation").is_dir()]
        if not roots:
            raise InputError(f"{path}: {'not a VOC devkit' if Path(path).is_dir() else 'no such folder'}; expected "
                             "ImageSets/Segmentation in it, in its VOC2012 or in its VOCdevkit/VOC2012; correct --voc")
        self.root, self.difficult, self.labels = roots[0], difficult, None   # labels (n,K) float32 come with scan
        lists, names = self.root / "ImageSets" / "Segmentation", self.root / "classes.txt"
        self.ids = read_list(lists / ("train_aug.txt" if split == "train" and (lists / "train_aug.txt").exists() else f"{split}.txt"))
        lines = names.read_text(encoding="utf-8-sig", errors="replace").splitlines() if names.exists() else VOC_CLASSES
        self.classes = [line.strip() for line in lines if line.strip()]
        if not 0 < len(set(self.classes)) == len(self.classes) < 255 or "background" in self.classes:
            raise InputError(f"{names}: {len(self.classes)} classes; expected 1 to 254 different names without background, one a line; "
                             "mend it")

    def __len__(self):
        return len(self.ids)

    def image_path(self, i):
        """Path of image i, JPEGImages/ID.jpg."""
        return self.root / "JPEGImages" / f"{self.ids[i]}.jpg"

    def image(self, i):
        """PIL RGB image i. Raises InputError."""
        return read_image(self.image_path(i))

    def mask_path(self, i):
        """Path of image i's mask, from SegmentationClassAug or SegmentationClass, or None where there is none."""
        paths = (self.root / folder / f"{self.ids[i]}.png" for folder in ("SegmentationClassAug", "SegmentationClass"))
        return next((path for path in paths if path.exists()), None)

    def mask(self, i, size):
        """(H,W) uint8 ground truth of image i. For measuring only."""
        return read_mask(self.mask_path(i), size, len(self.classes))

    def scan(self, progress, masks=False):
        """Read every tag, check every image's header and end and, with masks, read every mask, before training begins. Sets
        and returns labels (n,K) float32. Raises InputError."""
        self.labels = torch.zeros(len(self), len(self.classes))
        for i, name in enumerate(self.ids):
            size, mask = upright_size(self.image_path(i)), self.mask_path(i) if masks else None
            if mask:
                read_mask(mask, size, len(self.classes))
            for tag in read_tags(self.root / "Annotations" / f"{name}.xml", self.classes, self.difficult):
                self.labels[i, self.classes.index(tag)] = 1
            progress(i + 1, len(self))
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

    The long side becomes size * U(scale), then a crop x crop window is cut; outside the image the input is grey 0.5 and the
    label 255. label_paths lists the PNGs of pseudo labels, or is None while there are none (all 255). Returns image
    (3,crop,crop) float32 in [0,1], tags (K,) float32, label (crop,crop) int64 and i.
    """
    def __init__(self, voc, crop, size, scale, seed, epoch, label_paths=None):
        self.voc, self.crop, self.size, self.scale = voc, crop, size, scale
        self.seed, self.epoch, self.label_paths = seed, epoch, label_paths

    def __len__(self):
        return len(self.voc)

    def __getitem__(self, i):
        rng, image = np.random.default_rng([self.seed, self.epoch, i]), self.voc.image(i)
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

def map_histogram(target, maps, present, num_classes):
    """H[g,c,b] = pixels of true class g whose best class is c with value in bin b of 100: (K+1,K+1,101) int64, where maps
    (P,H,W) in [0,1] are of the classes whose indices 0..K-1 are present (P,). It scores maps at every threshold at once."""
    n, keep, (best, k) = num_classes + 1, target != IGNORE, maps.max(0)
    flat = (target[keep].astype(int) * n + present[k.numpy()[keep]] + 1) * 101 + (best.numpy()[keep] * 100).astype(int)
    return np.bincount(flat, minlength=n * n * 101).reshape(n, n, 101)

def thresholded(H, t):
    """Confusion matrix (K+1,K+1) of: class argmax_k M_k where max_k M_k >= t (to two decimals), else background."""
    b = round(100 * t)
    C = H[:, :, b:].sum(2)
    C[:, 0] += H[:, :, :b].sum((1, 2))
    return C

# ---- the toy set -------------------------------------------------------------------------------------------------------
TOY_CLASSES = ("disc", "square", "triangle", "cross")
TOY_HUES = np.array([(200, 70, 60), (70, 90, 200), (50, 190, 60), (210, 180, 50)])

def _texture(rng, size, colour):
    """(size,size,3) float: smooth blotches of two nearby colours plus fine grain."""
    t = Image.fromarray(rng.integers(0, 255, (5, 5), dtype=np.uint8)).resize((size, size), Image.BICUBIC)
    return colour + rng.uniform(-35, 35, 3) * np.asarray(t)[:, :, None] / 255 + rng.normal(0, 8, (size, size, 1))

def _inside(shape, u, v):
    """Which points (u,v) lie in a shape of radius 1."""
    return {"disc": u ** 2 + v ** 2 < 1, "square": np.maximum(abs(u), abs(v)) < 0.75,
            "triangle": np.maximum(-v, 0.87 * abs(u) + 0.5 * v) < 0.6,
            "cross": (np.minimum(abs(u), abs(v)) < 0.3) & (np.maximum(abs(u), abs(v)) < 1)}[shape]

def make_toy(root, train=240, val=60, size=97, seed=0):
    """Write a small VOC devkit under root: JPEG images, XML tags, palette masks, lists, classes.txt. Returns root as Path.

    One to three objects of four shapes on blotchy, dull backgrounds; later objects cover earlier ones; borders are 255. Each
    shape has a hue of its own, give or take, so that six small conv blocks learn it from tags within a minute.
    """
    root, rng = Path(root), np.random.default_rng(seed)
    for folder in ("JPEGImages", "Annotations", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    ids = [f"toy_{n:04d}" for n in range(train + val)]
    y, x = np.mgrid[:size, :size]
    for name in ids:
        image, mask = _texture(rng, size, rng.integers(60, 200) + rng.uniform(-25, 25, 3)), np.zeros((size, size), np.uint8)
        for k in rng.integers(len(TOY_CLASSES), size=rng.integers(1, 4)):
            r, angle = rng.uniform(0.14, 0.26) * size, rng.uniform(0, np.pi)
            cx, cy = rng.uniform(r, size - r, 2)
            u, v = ((x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)) / r, ((y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)) / r
            inside = _inside(TOY_CLASSES[k], u, v)
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
