"""PASCAL VOC as it is distributed: tags for training, masks for scoring only; a toy set in the same
layout; mIoU; pictures.

    python data.py PATH                  what the loader sees in a devkit or a folder of photos

Training reads JPEGImages, Annotations and ImageSets; SegmentationClass* is for scoring, and for
`--supervised`, the upper bound. Other classes than VOC's twenty are named in classes.txt, one a
line.
"""

import csv
import hashlib
import io
import math
import os
import re
import shutil
import signal
import sys
import time
import warnings
import xml.etree.ElementTree as ET
import zipfile
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, now and later: no traceback

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

from refine import IGNORE

VOC_CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
    "person pottedplant sheep sofa train tvmonitor"
).split()
CORE = {"background", "cat", "cow", "dog", "horse", "person", "sheep"}  # of our first VOC subset
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")  # JPEG: also MPO, the two-picture files of phones
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
Image.MAX_IMAGE_PIXELS = None  # `decoded` has a limit of its own, and says so itself


# ---- errors, files, words ------------------------------------------------------------------------


class InputError(Exception):
    """The one error a user can cause: 'file: what is wrong; expected what; fix', a line each."""

    def __init__(self, *faults):
        own = [fault.split("InputError: ")[-1] for fault in faults]  # without a worker's traceback
        super().__init__("\n".join(" ".join(fault.split()) for fault in own))


def need(ok, *faults):
    """Raise InputError(*faults) unless ok."""
    if not ok:
        raise InputError(*faults)


@contextmanager
def refusing(what, fix):
    """Whatever a parser, decoder, disk or network raises inside becomes InputError('what; fix')."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as e:
        why = re.sub(" <[^>]*>", "", str(e))[:120]  # without the addresses of Python's objects
        raise InputError(f"{what} ({type(e).__name__}: {why}); {fix}") from None


def read(path, limit=2**28):
    """The bytes of a file, at most `limit`: every file is read here. Raises InputError."""
    path = Path(path)
    with refusing(f"{path}: cannot be read", "expected a file that may be read; mend it"):
        need(path.exists(), f"{path}: no such file; expected one; add it or correct the path")
        size = path.stat().st_size if path.is_file() else limit + 1
        need(size <= limit, f"{path}: not a regular file of at most {limit} bytes; replace it")
        return path.read_bytes()


def read_text(path):
    """The text of a UTF-8 file, with or without a byte order mark. Raises InputError."""
    with refusing(f"{path}: is not UTF-8", "expected plain text; save it as UTF-8"):
        return read(path).decode("utf-8-sig")


def load(path):
    """The dict in a checkpoint or weights file, as data: no pickled code ever runs, and the
    file's own checksums must hold. Raises InputError."""
    content = io.BytesIO(read(path, limit=2**33))
    with refusing(f"{path}: not a torch file, or damaged", "expected a whole one; give another"):
        if zipfile.is_zipfile(content):
            bad = zipfile.ZipFile(content).testzip()
            need(bad is None, f"{path}: damaged, wrong checksum of {bad}; give another")
        content.seek(0)
        return dict(torch.load(content, map_location="cpu", weights_only=True))


def finite(state, source):
    """A state dict as it is, if all its numbers are finite. Raises InputError."""
    for name, value in state.items():
        total = value.sum(dtype=torch.float64)  # ten times as fast as asking every number
        need(math.isfinite(total), f"{source}: {name} is not finite; expected numbers; mend it")
    return state


def write(path, content):
    """Text, bytes, a picture (as PNG) or a dict (as `load` reads it) to path: temporary file,
    fsync, rename: path is always the old or the new whole. All is written here. InputError."""
    buffer = io.BytesIO()
    if isinstance(content, Image.Image):
        content.save(buffer, "PNG")
    elif isinstance(content, dict):
        torch.save(content, buffer)
    else:
        buffer.write(content.encode() if isinstance(content, str) else content)
    temporary = Path(f"{path}.tmp")
    with refusing(f"{path}: cannot be written", "expected a writable folder with space; make room"):
        try:
            temporary.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as f:
                f.write(buffer.getvalue())
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def say(text, end="\n", stream=None):
    """Print; nothing about printing ends a run: closed, full, an encoding without the letters."""
    stream = stream or sys.stdout
    encoding = getattr(stream, "encoding", None) or "ascii"
    try:
        print(text.encode(encoding, "replace").decode(encoding), end=end, file=stream, flush=True)
    except OSError:  # a pipe that nobody reads, a full disk: from now on into the void
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except (ValueError, RuntimeError):  # closed; a signal's handler that speaks amid other words
        pass


def track(name, items, note=None):
    """Yield items; progress and the numbers in the dict `note` on one line of a terminal, or
    every 30 seconds and at the end elsewhere."""
    terminal = sys.stdout is not None and sys.stdout.isatty()
    width = shutil.get_terminal_size().columns - 1
    start = time.time()
    shown = start
    for n, item in enumerate(items, 1):
        yield item
        now = time.time()
        last = n == len(items)
        if last or now - shown > (0.2 if terminal else 30):
            shown = now
            rate = n / max(now - start, 1e-9)
            left = f"{now - start:.1f} s" if last else f"{(len(items) - n) / rate:.0f} s left"
            numbers = "  ".join(f"{key} {value:.3f}" for key, value in (note or {}).items())
            line = f"{name} {n}/{len(items)}  {rate:.1f}/s  {left}  {numbers}".rstrip()
            line = f"\r{line[:width]:<{width}}" if terminal else line
            say(line, end="" if terminal and not last else "\n")


# ---- photos, masks, tags, lists ------------------------------------------------------------------


def decoded(path, convert):
    """convert(PIL image in path). Raises InputError."""
    name = os.fsencode(Path(path).name)
    writable = os.fsencode(path) == str(path).encode(errors="replace") and len(name) <= 235
    need(writable, f"{path}: not UTF-8, or a name of over 235 bytes; expected less; rename it")
    content = io.BytesIO(read(path))
    fix = f"expected a whole image ({', '.join(FORMATS)}); replace it"
    with warnings.catch_warnings(), refusing(f"{path}: cannot be read as an image", fix):
        warnings.simplefilter("ignore")  # Pillow's: one fault, one line, and that is ours
        with Image.open(content, formats=FORMATS) as image:
            small = min(image.size) < 16 or image.width * image.height > 64_000_000
            fault = f"{path}: {image.size} pixels; expected 16 or more a side, at most 64 million"
            need(not small, f"{fault}; resize it")
            fault = f"{path}: of floats; expected 8 or 16 bits a channel; convert it"
            need(image.mode != "F", fault)
            return convert(image)


def read_image(image):
    """RGB PIL image, upright (EXIF), of a path, a PIL image or an (H,W,3) uint8 array; grey,
    CMYK, palette, RGBA and 16-bit files too. Raises InputError for a file, ValueError for
    another array."""
    if isinstance(image, (str, Path)):
        image = decoded(image, ImageOps.exif_transpose)
    elif isinstance(image, Image.Image):
        image = ImageOps.exif_transpose(image)
    else:
        array = np.asarray(image)
        if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
            raise ValueError(f"want an (H,W,3) uint8 RGB array, got {array.shape} {array.dtype}")
        image = Image.fromarray(array)
    if image.mode.startswith("I"):  # 16-bit grey: keep the upper byte
        upper = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
        image = Image.fromarray(upper.astype(np.uint8))
    return image.convert("RGB")


def read_mask(path, num_classes, size=None):
    """Palette or grey PNG -> (H,W) uint8 with 0..num_classes and 255. size: the image's (W,H),
    if it is to be compared. Raises InputError."""
    mode, mask = decoded(path, lambda image: (image.mode, np.array(image)))
    found = f"{path}: mode {mode}, {mask.shape[1::-1]} pixels"
    side = size or "size"
    fix = f"expected an indexed PNG of its image's {side}; re-export it, or mend the image"
    need(mode in ("P", "L") and size in (None, mask.shape[::-1]), f"{found}; {fix}")
    wrong = mask[(mask > num_classes) & (mask != IGNORE)]
    fix = f"expected 0..{num_classes} or 255; re-export it with this class list"
    need(not wrong.size, f"{path}: index {wrong[:1]}; {fix}")
    return mask


def read_tags(path, classes):
    """Set of class names in a VOC annotation: `object/name` directly, never an object's parts.
    Raises InputError, also on a DOCTYPE: VOC has none, entity bombs need one."""
    text = read_text(path)
    fix = "expected <annotation><object><name>; save it as UTF-8 XML"
    harmless = "<!DOCTYPE" not in text and len(text) <= 1_000_000
    need(harmless, f"{path}: has a DOCTYPE or a megabyte; {fix}")
    with refusing(f"{path}: not XML", fix):
        objects = ET.fromstring(text).findall("object")
    tags = {(o.findtext("name") or "").strip() for o in objects}
    unknown = " ".join(sorted(tags - set(classes)))[:60] or "with an empty name"
    fix = f"expected names among {' '.join(classes)}; mend it, or edit classes.txt"
    need(tags <= set(classes), f"{path}: tagged {unknown}; {fix}")
    return tags


def read_list(path):
    """Image ids, one a line. Understood: CRLF, blank lines, the -1/0/1 column of ImageSets/Main
    (-1 is left out), ids with their ending, and pairs of paths, photo and mask. Raises
    InputError."""
    ids = []
    for line in read_text(path).splitlines():
        first, *rest = line.split() or [""]
        plain = rest in ([], ["-1"], ["0"], ["1"]) or rest[0].lower().endswith(".png")
        need(plain, f"{path}: line {line[:60]!r}; expected an id and perhaps -1, 0 or 1; mend it")
        if first and rest != ["-1"]:
            name = Path(first).name
            ids.append(Path(name).stem if Path(name).suffix.lower() in ENDINGS else name)
    need(ids, f"{path}: lists no image; expected one id a line; fill it")
    return list(dict.fromkeys(ids))


def read_classes(root, usual):
    """The class names in ROOT/classes.txt, one a line, no background; without it the usual ones.
    Raises InputError."""
    path = root / "classes.txt"
    names = usual
    if path.exists():
        names = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    different = 0 < len(set(names)) == len(names) < 255
    need(different, f"{path}: {len(names)} names; expected 1 to 254 different ones; mend it")
    for name in names:
        plain = re.sub("[^a-z]", "", name.lower())
        taken = plain in ("background", "ignore", "void", "unlabeled", "undecided")
        fault = f"{root}: class {name}; 0 is the background by itself, 255 undecided"
        need(not taken, f"{fault}; remove or rename it")
    return names


# ---- the devkit ----------------------------------------------------------------------------------


def devkit_in(path):
    """Where ImageSets/Segmentation is: path, its VOC2012, VOCdevkit/VOC2012, or None: nowhere."""
    for root in (Path(path), Path(path) / "VOC2012", Path(path) / "VOCdevkit" / "VOC2012"):
        if (root / "ImageSets" / "Segmentation").is_dir():
            return root.resolve()
    return None


class VOC:
    """One split of a devkit: ids, and for i the photo, its tags y (K,) and its mask, for scoring.

    path is the folder that holds ImageSets, or the one above VOC2012 or VOCdevkit/VOC2012. Where
    there is a list train_aug, train is that one.
    image_paths[i] is JPEGImages/ID.jpg (or another ending), mask_paths[i] in SegmentationClassAug
    or SegmentationClass, None where there is none. tags (n,K) float32 come with `scan`. Raises
    InputError.
    """

    def __init__(self, path, split):
        self.root = devkit_in(path)
        wrong = "not a VOC devkit" if Path(path).is_dir() else "no such folder"
        fix = "expected ImageSets/Segmentation in it or in its VOC2012; correct --voc"
        need(self.root, f"{path}: {wrong}; {fix}")
        self.split = split
        self.classes = read_classes(self.root, VOC_CLASSES)
        listed = "train_aug" if split == "train" and self.has("train_aug") else split
        self.image_paths = photos_of(self.root / f"ImageSets/Segmentation/{listed}.txt")
        self.ids = [path.stem for path in self.image_paths]
        masks = pictures_in(self.root / "SegmentationClass")
        masks |= pictures_in(self.root / "SegmentationClassAug")
        self.mask_paths = [masks.get(name) for name in self.ids]

    def has(self, split):
        """Whether the devkit lists a split."""
        return (self.root / f"ImageSets/Segmentation/{split}.txt").exists()

    def identity(self):
        """What a run that goes on must find as it was: classes, ids and tags."""
        return {"classes": self.classes, "ids": self.ids, "tags": self.tags.tolist()}

    def mask(self, i, size):
        """(H,W) uint8 ground truth of image i of size (W,H), to measure. Raises InputError."""
        return read_mask(self.mask_paths[i], len(self.classes), size)

    def read_tags(self, i):
        """Set of class names of photo i; a val photo need not have an XML. Raises InputError."""
        xml = self.root / "Annotations" / f"{self.ids[i]}.xml"
        return read_tags(xml, self.classes) if self.split == "train" or xml.exists() else set()

    def scan(self, masks=False, most=10):
        """Read every photo, every tag and, with masks, every mask there is, before training
        begins. Sets tags (n,K) float32 and sizes. Raises InputError with at most `most` faults."""
        self.tags = torch.zeros(len(self.ids), len(self.classes))
        self.sizes = []
        faults = []
        contradict = []
        for i in track(f"scan {self.split}", range(len(self.ids))):
            try:
                tagged = {self.classes.index(tag) for tag in self.read_tags(i)}
                self.tags[i, list(tagged)] = 1
                size = read_image(self.image_paths[i]).size
                self.sizes.append(size)
                if masks and self.mask_paths[i]:
                    shown = {int(k) - 1 for k in np.unique(self.mask(i, size)) if 0 < k < IGNORE}
                    if tagged and not (shown and shown <= tagged):
                        contradict.append(self.ids[i])
            except InputError as fault:
                faults.append(str(fault))
        if len(faults) > 1:
            rest = f"; the first {most}" if len(faults) > most else ""
            head = f"{len(faults)} files are wrong (python data.py PATH lists all){rest}:"
            faults = [head, *faults[:most]]
        need(not faults, *faults)
        if masks:
            self._check_masks(contradict)
        shares = self.tags.mean(0).tolist() if self.split == "train" else []
        fix = "expected photos with and without a class; add some that show something else"
        need(not shares or {*shares} - {0, 1}, f"{self.root}: all photos have the same tags; {fix}")
        for name, share in zip(self.classes, shares):
            if share in (0, 1):
                how = "no training image is" if share == 0 else "every training image is"
                cure = "it is not learnt" if share == 0 else "add photos without it to locate it"
                say(f"warning: {how} tagged {name}: {cure}", stream=sys.stderr)

    def _check_masks(self, contradict):
        """Refuse val masks of which some are missing, and masks that mostly contradict the tags."""
        missing = [name for name, path in zip(self.ids, self.mask_paths) if path is None]
        found = len(self.ids) - len(missing)
        some = self.split == "val" and missing and found
        fault = f"{self.root}: {len(missing)} of {len(self.ids)} val masks are missing"
        need(not some, f"{fault}: {' '.join(missing[:10])}; add them, or shorten the list")
        fault = f"{len(contradict)} of {found} masks show none of their tags, or others"
        fix = "expected index n for the n-th class, 0 background, 255 undecided; re-export them"
        few = 2 * len(contradict) <= found
        need(few, f"{self.root}: {fault}: {' '.join(contradict[:10])}; {fix}")


class Photos(VOC):
    """Tagged photos without a devkit: DIR/CLASS/photo.jpg, of every usual ending, or
    DIR/tags.csv. Classes in the order of DIR/classes.txt, else of their names. Masks, for scoring
    only: DIR/masks/CLASS/photo.png. ids are paths below DIR without their ending. Raises
    InputError."""

    def __init__(self, path):
        self.root = Path(path).resolve()
        fault = f"{path}: no such folder; expected DIR/CLASS/photo.jpg; correct --photos"
        need(self.root.is_dir(), fault)
        table = self.root / "tags.csv"
        found = tags_of_table(table) if table.exists() else tags_of_folders(self.root)
        tagged = any(found.values())
        need(tagged, f"{path}: no tagged photo; expected DIR/CLASS/photo.jpg or tags.csv; add some")
        self.split = "train"
        self.image_paths = list(found)
        self.found_tags = list(found.values())
        tags = set().union(*self.found_tags)
        self.classes = read_classes(self.root, sorted(tags))
        unknown = " ".join(sorted(tags - set(self.classes)))
        need(not unknown, f"{self.root}/classes.txt: does not list {unknown}; expected all; add it")
        self.ids = [str(p.relative_to(self.root).with_suffix("")) for p in self.image_paths]
        twice = " ".join(repeated(self.ids)[:3])
        need(not twice, f"{path}: two photos that differ only in their ending: {twice}; rename one")
        masks = [self.root / "masks" / f"{name}.png" for name in self.ids]
        self.mask_paths = [mask if mask.exists() else None for mask in masks]

    def has(self, split):
        """A folder of photos has no lists, whatever else lies in it."""
        return False

    def read_tags(self, i):
        """Set of class names of photo i."""
        return self.found_tags[i]


def repeated(names):
    """Those that occur more than once, sorted."""
    return sorted(name for name, n in Counter(names).items() if n > 1)


def tags_of_folders(root):
    """{photo: set of tags} of ROOT/CLASS/photo.jpg. The same photo (to the byte) in two folders
    has two tags; photos in ROOT itself have none; deeper ones are not used. Raises InputError."""
    folders = [p for p in sorted(root.glob("[!.]*")) if p.is_dir() and p.name != "masks"]
    deep = [p for f in folders for p in f.glob("*/**/*") if p.suffix.lower() in ENDINGS]
    if deep:
        fault = f"warning: {len(deep)} photos lie deeper than {root}/CLASS, {deep[0]}"
        say(f"{fault}: they are not used", stream=sys.stderr)
    found = {}  # photo's bytes, hashed -> its path and tags
    for folder in [*folders, root]:
        for photo in photos_of(folder):
            key = hashlib.sha256(read(photo)).digest()
            tags = found.setdefault(key, (photo, set()))[1]
            tags |= {folder.name} if folder != root else set()
    return dict(found.values())


def tags_of_table(path):
    """{photo: set of tags} of a tags.csv with rows `file,cat dog`: commas, semicolons or tabs, as
    the first row with one has them; tags apart by spaces, commas or cells; quotes and a header (a
    first cell without a dot) as spreadsheets write them. Raises InputError."""
    text = read_text(path)
    first = next((line for line in text.splitlines() if re.search("[;\t,]", line)), "")
    delimiter = max(";\t,", key=first.count)
    how = {"delimiter": delimiter, "skipinitialspace": True, "strict": True}
    found = {}
    with refusing(f"{path}: not a table", "expected rows of a file and its tags; mend it"):
        rows = list(csv.reader(io.StringIO(text), **how))
    rows = [(n, *row) for n, row in enumerate(rows, 1) if "".join(row).strip()]
    for n, name, *tags in rows:
        photo = Path(os.path.normpath(path.parent / name.strip()))
        if n == rows[0][0] and not photo.suffix:
            continue  # a header
        inside = path.parent in photo.parents
        need(inside, f"{path}: row {n}, {name!r}; expected a file below its folder; correct it")
        found.setdefault(photo, set()).update(re.findall(r"[^\s,;]+", " ".join(tags)))
    columns = set().union(*found.values()) == {"0", "1"}
    need(not columns, f"{path}: tags 0 and 1; expected names, `1.jpg,cat dog`; write them")
    return found


def photos_of(path):
    """The pictures in a folder, sorted, of every usual ending, but hidden ones and those that
    sgseg.py writes; those of a devkit's list of ids, ROOT/ImageSets/Segmentation/SPLIT.txt; a
    path to anything else as it is. Raises InputError."""
    path = Path(path)
    if path.is_dir():
        readable = os.access(path, os.R_OK | os.X_OK)
        need(readable, f"{path}: may not be read; expected rights to; mend them")
        pictures = [p for p in sorted(path.glob("[!.]*")) if p.suffix.lower() in ENDINGS]
        return [p for p in pictures if not p.stem.endswith("_stages")]
    if path.suffix == ".txt":
        ids = read_list(path)
        lists = Path(os.path.abspath(path)).parent  # not resolved: a list may be a link
        inside = lists.name == "Segmentation"
        need(inside, f"{path}: expected ROOT/ImageSets/Segmentation/NAME.txt; move it there")
        folder = lists.parent.parent / "JPEGImages"
        found = pictures_in(folder)
        return [found.get(name, folder / f"{name}.jpg") for name in ids]
    return [path]


def pictures_in(folder):
    """{stem: path} of the pictures in a folder; .jpg wins."""
    paths = photos_of(folder) if folder.is_dir() else []
    return {path.stem: path for path in sorted(paths, key=lambda path: path.suffix == ".jpg")}


# ---- photos -> network inputs --------------------------------------------------------------------


def to_tensor(image):
    """PIL RGB -> (3,H,W) float32 in [0,1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def aligned(image, size):
    """Resized: the long side about `size`, both sides 16n+1, which aligns every feature grid."""
    scale = size / max(image.size)
    sides = [16 * max(1, round((side * scale - 1) / 16)) + 1 for side in image.size]
    return image.resize(sides, Image.BILINEAR)


class Crops(torch.utils.data.Dataset):
    """Joint scale / flip / crop of image i and its label map, drawn from (seed, epoch, n) alone.

    The long side becomes size * U(scale), then a crop x crop window is cut; outside the image the
    input is grey (128/255) and the label 255. label_paths lists the PNGs of pseudo labels, or is
    None while there are none (all 255). Returns image (3,crop,crop) float32 in [0,1], tags (K,)
    float32, label (crop,crop) int64 and i.
    """

    def __init__(self, voc, crop, size, scale, seed, epoch, label_paths=None):
        self.voc = voc
        self.crop = crop
        self.size = size
        self.scale = scale
        self.seed = seed
        self.epoch = epoch
        self.label_paths = label_paths

    def __getitem__(self, n):
        i = n % len(self.voc.ids)  # n counts on through the passes of an epoch
        image = read_image(self.voc.image_paths[i])
        w, h = image.size
        rng = np.random.default_rng([self.seed, self.epoch, n])
        ratio = self.size * rng.uniform(*self.scale) / max(w, h)  # crop pixels per photo pixel
        side = self.crop / ratio  # of the crop, in photo pixels
        left = rng.uniform(min(0, w - side), max(0, w - side))  # of the crop, in photo pixels
        top = rng.uniform(min(0, h - side), max(0, h - side))
        flip = rng.random() < 0.5
        # the part of the photo that lies in the crop, in photo pixels
        box = (max(0, left), max(0, top), min(w, left + side), min(h, top + side))
        # where it lies there and how large it is, in crop pixels
        x = round((box[0] - left) * ratio)
        y = round((box[1] - top) * ratio)
        width = max(1, min(self.crop - x, round((box[2] - box[0]) * ratio)))
        height = max(1, min(self.crop - y, round((box[3] - box[1]) * ratio)))

        def cut(picture, resample, fill):
            canvas = Image.new(picture.mode, (self.crop, self.crop), fill)
            canvas.paste(picture.resize((width, height), resample, box=box), (x, y))
            return ImageOps.mirror(canvas) if flip else canvas

        pixels = to_tensor(cut(image, Image.BILINEAR, (128, 128, 128)))
        label = torch.full((self.crop, self.crop), IGNORE)
        if self.label_paths:
            indices = Image.fromarray(read_mask(self.label_paths[i], len(self.voc.classes), (w, h)))
            label = torch.from_numpy(np.array(cut(indices, Image.NEAREST, IGNORE))).long()
        return pixels, self.voc.tags[i], label, i


# ---- scores --------------------------------------------------------------------------------------


def confusion(target, prediction, num_classes):
    """C[g,p] = pixels of class g predicted p, where the target is not 255: (K+1,K+1) int64."""
    n = num_classes + 1
    keep = target != IGNORE
    pairs = n * target[keep].astype(int) + prediction[keep]
    return np.bincount(pairs, minlength=n * n).reshape(n, n)


def summary(C, classes):
    """{"miou", "core", "iou", "precision", "recall", "confusion"} of a confusion matrix C: IoU_k
    = C_kk / (row_k + column_k - C_kk) in [0,1] of the classes that occur in a mask (C_kk /
    column_k, C_kk / row_k), and its means over them; core is None outside VOC."""
    scores = {"iou": {}, "precision": {}, "recall": {}}
    for k, name in enumerate(["background", *classes]):
        hit = int(C[k, k])
        true = int(C[k].sum())
        said = int(C[:, k].sum())
        if true:
            scores["iou"][name] = hit / (true + said - hit)
            scores["precision"][name] = hit / said if said else None
            scores["recall"][name] = hit / true
    iou = scores["iou"]
    core = [x for name, x in iou.items() if name in CORE]
    core = core if CORE <= {"background", *classes} else []
    scores["miou"] = sum(iou.values()) / max(1, len(iou))
    scores["core"] = sum(core) / len(core) if core else None
    return scores | {"confusion": C.tolist()}


def areas(label, names):
    """{name: share of the pixels} of the classes that occur in a label."""
    counts = np.bincount(label.ravel(), minlength=len(names))
    return {name: float(n / label.size) for name, n in zip(names, counts) if n}


def csv_bytes(rows):
    """Rows as a CSV file's content; with a byte order mark, or Excel garbles umlauts."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode("utf-8-sig")


# ---- pictures ------------------------------------------------------------------------------------


def palette_image(label):
    """(H,W) uint8 indices -> PIL palette image in VOC's colours: bits 3b, 3b+1, 3b+2 of an index
    are bit 7-b of red, green, blue."""
    image = Image.fromarray(np.ascontiguousarray(label, dtype=np.uint8))
    index, channel = np.mgrid[:256, :3]
    palette = sum(((index >> (3 * b + channel)) & 1) << (7 - b) for b in range(8))
    image.putpalette(palette.flatten().tolist())
    return image


def heat(image, M):
    """A map M (H,W) in [0,1] over a darkened photo: blue is 0, red is 1 (the jet ramp)."""
    colour = torch.stack([(1.5 - (4 * M - c).abs()).clamp(0, 1) for c in (3, 2, 1)], 2).numpy()
    grey = np.asarray(image.convert("L"))[:, :, None]
    return Image.fromarray((grey * 0.4 + 153 * colour).astype(np.uint8))


def overlay(image, label, names=()):
    """Label colours over the photo, 255 cream; with all classes' names a legend of the objects."""
    colours = palette_image(label)
    picture = Image.blend(image, colours.convert("RGB"), 0.6)
    draw = ImageDraw.Draw(picture)
    present = [name for name in areas(label, names) if name != names[0]] if names else []
    side = max(8, image.height // max(25, 2 * len(present) + 1))
    for n, name in enumerate(present):
        k = names.index(name)
        box = (side, side * (2 * n + 1), 2 * side, side * (2 * n + 2))
        draw.rectangle(box, fill=tuple(colours.getpalette()[3 * k : 3 * k + 3]), outline="white")
        how = {"font": letters(side), "stroke_width": 1, "stroke_fill": "black"}
        draw.text((3 * side, box[1]), name, "white", **how)
    return picture


def letters(size):
    """A font of many scripts where there is one, else Pillow's own."""
    try:
        return ImageFont.truetype("DejaVuSans.ttf", size)
    except OSError:
        return ImageFont.load_default(size)


def sheet(rows, width=160):
    """One picture of rows of {caption: picture}, each `width` wide, its caption above it."""
    firsts = [next(iter(row.values())) for row in rows]
    heights = [max(1, round(width * first.height / first.width)) for first in firsts]
    columns = max(len(row) for row in rows)
    page = Image.new("RGB", (columns * (width + 4), sum(heights) + 18 * len(rows)), "white")
    y = 0
    for row, height in zip(rows, heights):
        for column, (caption, picture) in enumerate(row.items()):
            x = column * (width + 4)
            ImageDraw.Draw(page).text((x + 2, y + 2), caption[:26], fill="black")
            page.paste(picture.resize((width, height)), (x, y + 15))
        y += height + 18
    return page


# ---- the toy set ---------------------------------------------------------------------------------

TOY_CLASSES = ("disc", "square", "triangle", "cross")
TOY_HUES = ((200, 70, 60), (70, 90, 200), (50, 190, 60), (210, 180, 50))


def toy_shape(name, u, v):
    """Which points (u,v) lie inside a shape of radius 1: boolean, of u's shape."""
    if name == "disc":
        return u**2 + v**2 < 1
    if name == "square":
        return np.maximum(abs(u), abs(v)) < 0.75
    if name == "triangle":
        return np.maximum(-v, 0.87 * abs(u) + 0.5 * v) < 0.6
    return (np.minimum(abs(u), abs(v)) < 0.3) & (np.maximum(abs(u), abs(v)) < 1)  # cross


def toy_texture(rng, size, colour):
    """(size,size,3) float: smooth blotches of two nearby colours plus fine grain."""
    t = Image.fromarray(rng.integers(0, 255, (5, 5), dtype=np.uint8))
    t = t.resize((size, size), Image.BICUBIC)
    blotches = rng.uniform(-35, 35, 3) * np.asarray(t)[:, :, None] / 255
    return colour + blotches + rng.normal(0, 8, (size, size, 1))


def toy_picture(rng, size):
    """Image (size,size,3) uint8 and mask (size,size) uint8: one to three objects on a blotchy,
    dull background; later objects cover earlier ones; borders are 255. A shape's hue is its own,
    give or take: six conv blocks learn it in a minute."""
    y, x = np.mgrid[:size, :size]
    image = toy_texture(rng, size, rng.integers(60, 200) + rng.uniform(-25, 25, 3))
    mask = np.zeros((size, size), np.uint8)
    for k in rng.integers(len(TOY_CLASSES), size=rng.integers(1, 4)):
        r = rng.uniform(0.14, 0.26) * size
        angle = rng.uniform(0, np.pi)
        cx, cy = rng.uniform(r, size - r, 2)
        u = ((x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)) / r
        v = ((y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)) / r
        inside = toy_shape(TOY_CLASSES[k], u, v)
        solid = Image.fromarray(inside).convert("L")
        grown = np.asarray(solid.filter(ImageFilter.MaxFilter(3))) > 0
        image[inside] = toy_texture(rng, size, TOY_HUES[k] + rng.uniform(-30, 30, 3))[inside]
        mask[grown] = IGNORE
        mask[inside] = k + 1
    return image.clip(0, 255).astype(np.uint8), mask


def make_toy(root, train=240, val=60, size=97, seed=0):
    """Write a small VOC devkit of four shapes under root and return it as Path."""
    root = Path(root)
    rng = np.random.default_rng(seed)
    for folder in ("JPEGImages", "Annotations", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    ids = [f"toy_{n:04d}" for n in range(train + val)]
    for name in ids:
        image, mask = toy_picture(rng, size)
        shown = [TOY_CLASSES[k - 1] for k in np.unique(mask) if 0 < k < IGNORE]
        objects = "".join(f"<object><name>{tag}</name></object>" for tag in shown)
        xml = f"<annotation><filename>{name}.jpg</filename>{objects}</annotation>\n"
        Image.fromarray(image).save(root / "JPEGImages" / f"{name}.jpg", quality=92)
        (root / "Annotations" / f"{name}.xml").write_text(xml)
        palette_image(mask).save(root / "SegmentationClass" / f"{name}.png")
    (root / "ImageSets/Segmentation/train.txt").write_text("\n".join(ids[:train]) + "\n")
    (root / "ImageSets/Segmentation/val.txt").write_text("\n".join(ids[train:]) + "\n")
    (root / "classes.txt").write_text("\n".join(TOY_CLASSES) + "\n")  # last: then the set is whole
    return root


# ---- what is in a data set -----------------------------------------------------------------------


def report(path):
    """Print what the loader sees in a devkit or folder of photos: splits, classes, sizes, masks,
    and which other files there are. Raises InputError with every fault, of masks too."""
    kits = [VOC(path, "train") if devkit_in(path) else Photos(path)]
    kits += [VOC(path, "val")] if kits[0].has("val") else []
    how = "a VOC devkit (--voc)" if devkit_in(path) else "photos in folders or tags.csv (--photos)"
    say(f"{kits[0].root}: {how}")
    faults = []
    for kit in kits:
        try:
            kit.scan(masks=True, most=len(kit.ids))
        except InputError as fault:
            faults += str(fault).splitlines()
        sides = np.array(kit.sizes or [(0, 0)])
        masks = sum(path is not None for path in kit.mask_paths)
        say(f"{kit.split}: {len(kit.ids)} photos, {sides.min()} to {sides.max()} pixels a side")
        say(f"  masks, for scoring only: {masks}")
        for name, n in zip(kit.classes, kit.tags.sum(0).int().tolist()):
            say(f"  {name}: {n}")
        say(f"  without a tag: {int((kit.tags.sum(1) == 0).sum())}")
    if isinstance(kits[0], Photos):
        taken = {*kits[0].image_paths, *kits[0].mask_paths}
        others = [p for p in kits[0].root.rglob("*") if p.is_file() and p not in taken]
        names = ", ".join(str(p.relative_to(kits[0].root)) for p in sorted(others)[:10])
        say(f"  {len(others)} other files, not used (or copies of a photo): {names}")
    need(not faults, *faults)


if __name__ == "__main__":
    try:
        fine = len(sys.argv) == 2 and not sys.argv[1].startswith("-")
        need(fine, "python data.py PATH; expected one folder")
        report(sys.argv[1])
    except (InputError, PermissionError) as fault:
        say(f"data.py: {fault}", stream=sys.stderr)
        sys.exit(2)
