"""Read and write photos, image tags, masks and pictures; cut crops for training; compute scores.

    python data.py PATH                  print what the loader finds in a devkit or photo folder

Training reads photos and tags only: JPEGImages, Annotations and ImageSets of a VOC devkit, or a
folder of tagged photos. SegmentationClass and SegmentationClassAug are opened for checks, panels
and scores, and for `--supervised`, the upper bound. The masks given with `--corrected` are used as
labels. A file classes.txt, one name per line, replaces VOC's classes.
"""

import argparse
import csv
import errno
import hashlib
import io
import math
import os
import pickle
import posixpath
import re
import secrets
import shutil
import sys
import time
import unicodedata
import warnings
import xml.etree.ElementTree as ET
import zipfile
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

from refine import IGNORE, box_mean

VOC_CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
    "person pottedplant sheep sofa train tvmonitor"
).split()
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")  # JPEG includes the MPO files of phones
EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff")
UNREADABLE = (".heic", ".heif", ".avif", ".gif", ".jp2", ".dng", ".cr2", ".nef", ".svg", "")
# in a table of tags:
FLAG = r"|\d+(\.0*)?|true|false|yes|no|y|n|x"  # a cell below a class name; it may be empty
NO = r"|0+(\.0*)?|false|no?"  # a flag that means no
NOT_A_TAG = rf"{FLAG}|none|null|nan|[\W\d].*|.*[\[\]{{}}()<>=\"].*"  # a flag, a number, code
MAX_PIXELS = 64_000_000  # in a photo


# ---- a devkit ------------------------------------------------------------------------------------


class VOC:
    """One split of a PASCAL VOC devkit. For image i:

    ids[i]; image_paths[i]: JPEGImages/ID.jpg (or another extension); annotations[i]: the XML file
    that names its tags, or None in val, where it may be missing; mask_paths[i]: the ground truth,
    for scoring, in SegmentationClassAug or SegmentationClass, or None. `scan` fills tags[i]:
    image-level labels (K,) float32 in {0,1}, and sizes[i]: (width, height).

    path: the folder that holds ImageSets, or the one above VOC2012 or VOCdevkit/VOC2012.
    split: a list in ImageSets/Segmentation; "train" reads train_aug.txt if there is one.
    Raises InputError.
    """

    def __init__(self, path, split):
        self.root = devkit_in(path)
        if self.root is None:
            problem = "is not a VOC devkit" if Path(path).is_dir() else "does not exist"
            remedy = "Give the folder that holds ImageSets/Segmentation, or one above it"
            raise InputError(path, problem, remedy, "devkit")
        self.split = split
        self.class_names = read_classes(self.root, VOC_CLASSES)
        self.list_path = self.root / "ImageSets" / "Segmentation" / f"{split}.txt"
        augmented = self.list_path.with_name("train_aug.txt")
        if split == "train" and augmented.exists():
            self.list_path = augmented
        self.ids = read_list(self.list_path)
        names = [nfc(name) for name in self.ids]
        # a file that must exist but does not is reported by `scan`
        folder = self.root / "JPEGImages"
        photos = files_by_name(folder)
        self.image_paths = [photos.get(name, folder / f"{name}.jpg") for name in names]
        folder = self.root / "Annotations"
        files = {name: folder / f"{name}.xml" for name in names if split == "train"}
        files |= files_by_name(folder, (".xml",))
        self.annotations = [files.get(name) for name in names]
        masks = files_by_name(self.root / "SegmentationClass", (".png",))
        masks |= files_by_name(self.root / "SegmentationClassAug", (".png",))
        self.mask_paths = [masks.get(name) for name in names]

    def mask(self, i, size):
        """Return photo i's true label (H,W) uint8; size: (width, height). Raises InputError."""
        return read_mask(self.mask_paths[i], len(self.class_names), size)

    def contradicts(self, i, mask):
        """Return whether a mask contradicts the tags of photo i.

        It does if the tags are known and it shows an untagged class. It also does if it shows no
        class, unless the photo is known to have no tag.
        """
        shown = {int(k) - 1 for k in np.unique(mask) if 0 < k < IGNORE}
        tagged = set(self.tags[i].nonzero()[:, 0].tolist())
        known = self.annotations[i] is not None  # else the photo may show any class
        if not shown:
            return bool(tagged) or not known
        return known and not shown <= tagged

    def scan(self, masks=False, max_shown=10):
        """Read every photo, its tags and, with `masks`, its mask, before training begins.

        Sets tags (n,K) float32 and sizes. Raises one InputError that lists at most `max_shown`
        problems.
        """
        self.tags = torch.zeros(len(self.ids), len(self.class_names))
        self.sizes = []
        problems = []
        contradicting = []
        for i in progress(f"reading {self.split}", range(len(self.ids))):
            try:
                names = self.annotations[i] or set()
                if isinstance(names, Path):
                    names = read_tags(names, self.class_names)
                tagged = [self.class_names.index(name) for name in names]
                self.tags[i, tagged] = 1
                size = read_image(self.image_paths[i]).size
                self.sizes.append(size)
                if masks and self.mask_paths[i] and self.contradicts(i, self.mask(i, size)):
                    contradicting.append(self.ids[i])
            except InputError as problem:
                problems.append(problem)
        raise_all(problems, max_shown)
        if masks and self.split != "train" and any(self.mask_paths):
            self.require_masks()
        self.check_masks(contradicting)
        if self.split == "train":
            self._check_tags()

    def require_masks(self):
        """Raise InputError if some photos have no mask."""
        missing = [name for name, path in zip(self.ids, self.mask_paths) if path is None]
        if missing:
            problem = f"lacks {len(missing)} of {len(self.ids)} masks: {' '.join(missing[:10])}"
            raise InputError(self.root, problem, "Add them, or leave these photos out", "masks")

    def check_masks(self, contradicting):
        """Raise InputError if most masks contradict the tags (`contradicting`: ids of photos)."""
        found = sum(path is not None for path in self.mask_paths)
        if 2 * len(contradicting) > found:
            problem = f"has {len(contradicting)} of {found} masks that contradict the tags: "
            problem += " ".join(contradicting[:10])
            remedy = "Index n must mean the n-th class, 0 background and 255 undecided, and the "
            remedy += "tags must name every class in the photo, not only the main one"
            raise InputError(self.root, problem, remedy, "masks")

    def _check_tags(self):
        """Raise InputError if all photos have the same tags; warn of tags on all, one or none."""
        counts = self.tags.sum(0).int().tolist()
        if not set(counts) - {0, len(self.ids)}:
            remedy = "Add photos that show other classes, or none"
            raise InputError(self.root, "has the same tags on all photos", remedy, "tags")
        for name, n in zip(self.class_names, counts):
            if n == 1:
                warn(f"only one training image is tagged {name}: is the tag misspelt?")
            if n == 0:
                warn(f"no training image is tagged {name}: this class will not be learnt")
            if n == len(self.ids):
                warn(f"every training image is tagged {name}: add photos without it")


def devkit_in(path):
    """Return the folder with ImageSets: path, or VOC2012 or VOCdevkit/VOC2012 below it, or None."""
    for below in ("", "VOC2012", "VOCdevkit/VOC2012"):
        root = Path(os.path.abspath(Path(path) / below))
        if (root / "ImageSets" / "Segmentation").is_dir():
            return root
    return None


def open_devkit(path):
    """Return the splits train and val of a devkit; val is None if there is no val.txt.

    Warns of a train_aug.txt that leaves out photos of train.txt, and of lists that overlap.
    """
    train_set = VOC(path, "train")
    lists = train_set.list_path.parent
    if (lists / "train.txt").exists():
        left_out = set(read_list(lists / "train.txt")) - set(train_set.ids)
        if left_out:
            text = f"{train_set.list_path} is used and lacks {len(left_out)} photos of train.txt"
            warn(f"{text}. Remove it to train on train.txt")
    if not (lists / "val.txt").exists():
        return train_set, None
    val_set = VOC(path, "val")
    both = sorted(set(train_set.ids) & set(val_set.ids))
    if both:
        text = f"{val_set.list_path} lists {len(both)} training photos: {' '.join(both[:5])}"
        warn(f"{text}. Val photos should be ones that the network has not seen")
    return train_set, val_set


# ---- a folder of tagged photos -------------------------------------------------------------------


class Photos(VOC):
    """Tagged photos without a devkit: DIR/CLASS/photo.jpg, or a table DIR/tags.csv.

    The classes are sorted by name, or in the order of DIR/classes.txt. ids are paths below DIR
    without their extension; annotations[i] is the set of tags. Masks, for scoring only, are
    DIR/masks/ID.png, for example DIR/masks/CLASS/photo.png.
    Raises InputError.
    """

    def __init__(self, path):
        self.root = Path(os.path.abspath(path))
        if not self.root.is_dir():
            raise InputError(path, "is not a folder", "Give the folder of your photos", "missing")
        if devkit_in(path):
            raise InputError(path, "is a VOC devkit", "Use --voc in place of --photos", "devkit")
        table = self.root / "tags.csv"
        found = tags_of_table(table) if table.exists() else tags_of_folders(self.root)
        self.split = "train"
        self.image_paths = list(found)
        self.annotations = list(found.values())
        names = set().union(*self.annotations)
        if not names:
            remedy = "Put the photos in folders DIR/CLASS, or list them in DIR/tags.csv"
            raise InputError(path, "holds no tagged photo", remedy, "empty")
        self.class_names = read_classes(self.root, sorted(names))
        unknown = " ".join(sorted(names - set(self.class_names)))
        if unknown:
            remedy = "Add it, or correct the tags"
            raise InputError(self.root / "classes.txt", f"does not list {unknown}", remedy, "tags")
        self.ids = [p.relative_to(self.root).with_suffix("").as_posix() for p in self.image_paths]
        repeated = sorted(name for name, n in Counter(self.ids).items() if n > 1)
        if repeated:
            problem = f"holds two photos that differ only in their extension: {repeated[0]}"
            raise InputError(path, problem, "Rename one", "names")
        masks = files_by_name(self.root / "masks", (".png",))
        self.mask_paths = [masks.pop(nfc(name), None) for name in self.ids]
        if masks:
            first = min(masks.values())
            warn(f"{len(masks)} masks have no photo of the same name; the first is {first}")


def tags_of_folders(root):
    """Return {photo: set of tags} of ROOT/CLASS/photo.jpg.

    A photo with two tags is placed in both folders (the same file, byte for byte). Photos directly
    in ROOT count as untagged examples. Warns about files that are not used. Raises InputError.
    """
    found = {}  # hash of the photo's bytes -> its path and tags
    used = set()
    folders = [p for p in sorted(root.glob("[!.]*")) if p.is_dir() and p.name != "masks"]
    for folder in [*folders, root]:
        photos = photos_of(folder)
        files = [p for p in folder.glob("[!.]*") if p.is_file()]
        unreadable = any(p.suffix.lower() in UNREADABLE for p in files)
        if unreadable and not photos and folder != root:
            problem = f"holds no picture that can be read ({count_extensions(files)})"
            raise InputError(folder, problem, "Convert its pictures to JPEG or PNG", "format")
        for photo in photos:
            key = hashlib.sha256(read(photo)).digest()
            _, tags = found.setdefault(key, (photo, set()))
            tags |= {nfc(folder.name)} if folder != root else set()
        used |= set(photos)
        if not photos and folder != root:
            warn(f"{folder} directly holds no photo, so {folder.name} is not a class")
    refuse_masks([path for path, _ in found.values()])
    warn_of_unused(root, used)
    return dict(found.values())


def refuse_masks(photos):
    """Raise InputError if pictures among the photos look like the masks of others.

    Examples are x_mask.png or a palette file x.png beside x.jpg, or a folder that holds only
    palette or grey PNG files with the same names as photos in other folders.
    """
    names = Counter(path.with_suffix("") for path in photos)
    stems = Counter(path.stem for path in photos)
    shared = [p for p in photos if stems[p.stem] > 1 and p.suffix.lower() == ".png"]
    indexed = ("P", "L", "1")
    suspects = {p for p in shared if decode(p, lambda image, _: image.mode) in indexed}
    photo_folders = {p.parent for p in photos if p not in suspects}
    for path in photos:
        base = re.sub(r"_(mask|masks|label|labels|gt|seg|segmentation|overlay)$", "", path.stem)
        is_marked = base != path.stem and path.parent / base in names
        is_twin = names[path.with_suffix("")] > 1 or path.parent not in photo_folders
        if is_marked or path in suspects and is_twin:
            remedy = "Move masks to DIR/masks, or elsewhere; if it is a photo, rename it"
            raise InputError(path, f"looks like the mask of photo {base}", remedy, "mask")


def tags_of_table(path):
    """Return {photo: set of tags} of a table.

    A row is a photo and its tags, one per cell or several in a cell, separated by , ; or |. Names
    may contain spaces. A header may name the classes; the cells below it are then 1 and 0, yes and
    no or the like. Cells are separated by commas, semicolons or tabs. Raises InputError.
    """
    rows = read_rows(path)
    if not rows:
        remedy = "Write a row for each photo, or remove the file"
        raise InputError(path, "lists no photo", remedy, "empty")
    folder = path.parent
    files = {nfc(p.relative_to(folder).as_posix()): p for p in folder.rglob("*") if p.is_file()}
    files = files_by_name(folder) | files  # a row may leave out the extension
    # a first row that names neither a photo nor a file with an extension is a header
    has_header = rows and rows[0][1] not in files and not Path(rows[0][1]).suffix
    header = rows.pop(0)[2] if has_header else []
    flags = all(re.fullmatch(FLAG, cell, re.I) for _, _, cells in rows for cell in cells)
    columns = header if flags else []  # classes, with only yes or no below them
    if len(set(columns)) < len(columns):
        raise InputError(path, "has two columns with the same name", "Rename or remove one", "tags")
    found = {}
    for number, photo, cells in rows:
        if photo not in files:
            problem = f'row {number} names "{photo}", which is not a file below {folder}'
            raise InputError(path, problem, "Correct the name", "missing")
        if columns:
            tags = {name for name, cell in zip(columns, cells) if not re.fullmatch(NO, cell, re.I)}
        else:
            tags = {tag.strip() for cell in cells for tag in re.split("[,;|]", cell)} - {""}
        for tag in sorted(tags):
            if re.fullmatch(NOT_A_TAG, tag, re.I):
                remedy = "Write class names, or a header of classes with only 1 and 0 below it"
                raise InputError(path, f"row {number} has {tag!r} as a tag", remedy, "tags")
        found.setdefault(files[photo], set()).update(tags)
    refuse_lists_in_names(path, set().union(*found.values()))
    warn_of_unused(folder, set(found))
    return found


def read_rows(path):
    """Return the rows of a table that are not empty, [(number, photo, other cells), ...].

    Understands a first line `sep=;`, the index column that pandas writes, and Windows paths.
    Raises InputError.
    """
    text = nfc(read_text(path))
    # the first separator outside quotes follows `sep=` or the photo's name
    separator = re.search("[;\t,]", re.sub('"[^"]*"', "", text))
    delimiter = separator[0] if separator else ","
    lines = re.sub("^sep=.*", "", text, flags=re.I).splitlines()
    remedy = "Write a row for each photo: its name, then its tags"
    with as_input_error(path, "is not a table", remedy, "format"):
        rows = list(csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True))
    rows = [(n, [cell.strip() for cell in row]) for n, row in enumerate(rows, 1)]
    rows = [(n, row) for n, row in rows if any(row)]
    if rows and not rows[0][1][0] and all(row[0].isdigit() and row[1:] for _, row in rows[1:]):
        rows = [(n, row[1:]) for n, row in rows]  # without the index column
    return [(n, posixpath.normpath(row[0].replace("\\", "/")), row[1:]) for n, row in rows]


def refuse_lists_in_names(path, names):
    """Raise InputError if a name with spaces looks like a list: `cat dog` beside `cat`, `dog`."""
    words = Counter(frozenset(name.split()) for name in names)
    for name in sorted(names):
        parts = name.split()
        if len(parts) > 1 and (set(parts) <= names or words[frozenset(parts)] > 1):
            remedy = "Separate tags by a comma, a semicolon or |, not by a space"
            raise InputError(path, f"has the tag {name!r}, which looks like a list", remedy, "tags")


def warn_of_unused(root, used):
    """Warn, in one line, about unused files below root, counted by their extension."""
    used = used | {root / "classes.txt", root / "tags.csv"}
    used |= {p for p in (root / "masks").rglob("*") if p.suffix.lower() == ".png"}
    others = [p for p in sorted(root.rglob("[!.]*")) if p.is_file() and p not in used]
    if others:
        extensions = count_extensions(others)
        first = others[0].relative_to(root)
        warn(f"files in {root} that are not used: {extensions}; the first is {first}")


def count_extensions(paths):
    """Return how often each extension occurs, for example "3 .heic, 1 without an extension"."""
    counts = Counter(path.suffix.lower() or "without an extension" for path in paths)
    return ", ".join(f"{n} {extension}" for extension, n in counts.most_common())


# ---- crops for training --------------------------------------------------------------------------


@dataclass
class Crops:
    """Training samples: image i and its label map, scaled, flipped and cropped together.

    The long side is resized to size times a random number from `scale`; then a random window of
    crop x crop pixels is cut out. Outside the photo the input is grey (128/255) and the label 255.
    The random numbers depend on (seed, epoch, n) alone.

    crops[n] returns the image (3,crop,crop) float32 in [0,1], the tags (K,) float32, the label
    (crop,crop) int64, and i = n modulo the number of photos.
    """

    photos: VOC
    crop: int
    size: int
    scale: tuple
    seed: int
    epoch: int
    label_paths: list | None = None  # PNG files; None, in the warm-up, makes all labels 255

    def __getitem__(self, n):
        i = n % len(self.photos.ids)  # an epoch may go through a small set several times
        image = read_image(self.photos.image_paths[i])
        w, h = image.size
        rng = np.random.default_rng([self.seed, self.epoch, n])
        ratio = self.size * rng.uniform(*self.scale) / max(w, h)  # crop pixels per photo pixel
        side = self.crop / ratio  # of the crop, in photo pixels
        left = rng.uniform(min(0, w - side), max(0, w - side))  # of the crop, in photo pixels
        top = rng.uniform(min(0, h - side), max(0, h - side))
        flip = rng.random() < 0.5
        # the part of the photo that lies in the crop, in photo pixels
        box = (max(0, left), max(0, top), min(w, left + side), min(h, top + side))
        # its position and size in the crop, in crop pixels
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
            indices = read_mask(self.label_paths[i], len(self.photos.class_names), (w, h))
            indices = cut(Image.fromarray(indices), Image.NEAREST, IGNORE)
            label = torch.from_numpy(np.array(indices)).long()
        return pixels, self.photos.tags[i], label, i


def to_tensor(image):
    """Return a PIL RGB image as (3,H,W) float32 in [0,1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def aligned(image, size):
    """Return the image resized to a long side of about `size`; both sides have the form 16n + 1."""
    scale = size / max(image.size)
    sides = [16 * max(1, round((side * scale - 1) / 16)) + 1 for side in image.size]
    return image.resize(sides, Image.BILINEAR)


# ---- reading photos, masks, tags, lists ----------------------------------------------------------


def read_image(source):
    """Return an upright RGB PIL image.

    source: a path, the bytes of a file, an open binary file, a PIL image, or an (H,W,3) uint8 RGB
    array (BGR arrays, which OpenCV returns, cannot be told from RGB). Grey, CMYK, palette, RGBA and
    16-bit pictures are converted; the EXIF orientation is applied.
    Raises InputError for a file that cannot be read, ValueError for any other array.
    """
    if isinstance(source, Image.Image):
        return to_rgb(source, "the image")
    if hasattr(source, "read"):
        source = source.read(2**28 + 1)
    if isinstance(source, (str, Path, bytes)):
        return decode(source, to_rgb)
    array = np.asarray(source)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        raise ValueError(f"want an (H,W,3) uint8 RGB array, got {array.shape} {array.dtype}")
    return Image.fromarray(array)


def decode(source, convert, kind="image"):
    """Return convert(PIL image, name) for the image at a path or in the bytes of a file.

    Raises InputError.
    """
    is_path = not isinstance(source, bytes)
    name, content = (source, read(source)) if is_path else ("the picture", source)
    remedy = f"Convert it to JPEG or PNG (supported: {', '.join(FORMATS)})"
    if kind == "mask":
        remedy = "Export masks as palette PNG files"
    with as_input_error(name, f"is not a readable {kind}", remedy, kind):
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        w, h = image.size
        if min(w, h) < 16 or w * h > MAX_PIXELS:
            limit = f"at most {MAX_PIXELS / 1e6:g} million in total"
            remedy = f"Resize it: at least 16 pixels per side, {limit}"
            raise InputError(name, f"has {w} x {h} pixels", remedy, "size")
        return convert(image, name)


def to_rgb(image, name):
    """Return a PIL image upright and in RGB. Raises InputError for 32 bits per channel."""
    image.load()  # for TIFF files, Pillow already applies the orientation here
    if image.mode == "F" or image.mode == "I" and image.format != "PNG":
        raise InputError(name, "has 32 bits per channel", "Save it with 8 or 16 bits", "image")
    upright = image.copy()
    with suppress(Exception):  # damaged EXIF data does not make the picture unreadable
        upright.getexif()  # Pillow caches it, so exif_transpose still finds the orientation
        upright.info = {}
        ImageOps.exif_transpose(upright, in_place=True)
    if upright.mode.startswith("I"):  # 16-bit grey: keep the upper byte
        upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    upright = upright.convert("RGB")
    upright.info = {}  # the orientation must not be applied again
    return upright


def read_mask(path, num_classes, size=None):
    """Return a palette or grey PNG as (H,W) uint8 with values 0..num_classes and 255.

    size: (width, height) of its image, if known. Raises InputError.
    """

    def parts(image, _):
        return image.format, image.mode, np.array(image)

    form, mode, mask = decode(path, parts, "mask")
    if form != "PNG" or mode not in ("P", "L"):
        problem = f"is not an indexed PNG but a {form} file of mode {mode}"
        raise InputError(path, problem, "Export masks as palette PNG files", "mask")
    h, w = mask.shape
    if size not in (None, (w, h)):
        problem = f"has {w} x {h} pixels, but its photo has {size[0]} x {size[1]}"
        raise InputError(path, problem, "Export the mask again, or restore the image", "mask")
    wrong = mask[(mask > num_classes) & (mask != IGNORE)]
    if wrong.size:
        problem = f"has the index {wrong[0]}, which is neither 0..{num_classes} nor 255"
        raise InputError(path, problem, "Export it with the same list of classes", "mask")
    return mask


def read_tags(path, class_names):
    """Return the set of class names in a VOC annotation.

    Only `object/name` counts, not the parts of an object. Raises InputError for an unreadable file,
    and also for a DOCTYPE (which entity bombs need and VOC does not use) and for XML of another
    kind.
    """
    text = read_text(path)
    remedy = "Use VOC's format, <annotation><object><name>cat</name></object></annotation>"
    if "<!DOCTYPE" in text or len(text) > 1_000_000:
        raise InputError(path, "has a DOCTYPE or is larger than a megabyte", remedy, "xml")
    with as_input_error(path, "is not XML", f"{remedy}, as UTF-8", "xml"):
        root = ET.fromstring(text)
    if root.tag != "annotation":
        raise InputError(path, f"has the root <{root.tag[:40]}>, not <annotation>", remedy, "xml")
    names = {nfc((o.findtext("name") or "").strip()) for o in root.findall("object")}
    unknown = sorted(names - set(class_names))
    if unknown:
        problem = f"names {unknown[0][:60]!r}, which is not a class"
        remedy = f"Correct it, or edit classes.txt. The classes are {' '.join(class_names)[:200]}"
        raise InputError(path, problem, remedy, "tags")
    return names


def read_list(path):
    """Return the image ids of a list with one id per line.

    Also accepts CRLF, blank lines, the column -1/0/1 of ImageSets/Main (ids with -1 are skipped),
    ids with an extension, and pairs of paths (/JPEGImages/ID.jpg /SegmentationClass/ID.png). Raises
    InputError.
    """
    ids = []
    for line in read_text(path).splitlines():
        first, *rest = line.split() or [""]
        understood = rest in ([], ["-1"], ["0"], ["1"]) or rest[0].lower().endswith(".png")
        parts = [part for part in first.split("/") if part]
        if not understood or len(parts) > 1 and parts[-2] != "JPEGImages":
            raise InputError(path, f"has the line {line[:60]!r}", "Write one id per line", "list")
        if first and rest != ["-1"]:
            name = parts[-1]
            ids.append(Path(name).stem if Path(name).suffix.lower() in EXTENSIONS else name)
    if not ids:
        raise InputError(path, "lists no image", "Write one id per line", "list")
    return list(dict.fromkeys(ids))


def read_classes(root, default):
    """Return the class names in ROOT/classes.txt, one per line, or `default` without that file.

    The background is not listed. Raises InputError.
    """
    path = root / "classes.txt"
    names = default
    if path.exists():
        names = [nfc(line.strip()) for line in read_text(path).split("\n") if line.strip()]
    if not 0 < len(set(names)) == len(names) < 255:
        problem = f"lists {len(names)} classes ({len(set(names))} distinct names)"
        remedy = "List 1 to 254 distinct names"
        raise InputError(path if path.exists() else root, problem, remedy, "classes")
    for name in names:
        letters = re.sub("[^a-z]", "", name.lower())
        reserved = letters in ("background", "ignore", "void", "unlabeled", "undecided")
        if reserved or not name.isprintable():
            remedy = "Rename it: 0 means background and 255 undecided, and names must be printable"
            raise InputError(root, f"has a class {name!r}", remedy, "classes")
    return names


def photos_of(path):
    """Return the pictures in a folder, sorted, or [path] for anything else.

    Hidden files are left out, as is NAME_stages.png beside a photo NAME (sgseg.py writes it).
    """
    path = Path(path)
    if not path.is_dir():
        return [path]
    if not os.access(path, os.R_OK | os.X_OK):
        raise InputError(path, "cannot be read", "Change its permissions", "permission")
    pictures = [p for p in sorted(path.glob("[!.]*")) if p.suffix.lower() in EXTENSIONS]
    stages = {f"{p.stem}_stages.png" for p in pictures}
    return [p for p in pictures if p.name not in stages and not p.is_dir()]


def files_by_name(folder, extensions=EXTENSIONS):
    """Return {path below the folder, without an extension: path} of its files, preferring .jpg."""
    paths = [p for p in folder.rglob("[!.]*") if p.suffix.lower() in extensions and not p.is_dir()]
    paths.sort(key=lambda p: (p.suffix == ".jpg", p))
    return {nfc(p.relative_to(folder).with_suffix("").as_posix()): p for p in paths}


def nfc(name):
    """Return the name in Unicode form NFC: macOS may store the same name in another form."""
    return unicodedata.normalize("NFC", name)


# ---- scores --------------------------------------------------------------------------------------


def confusion(target, prediction, num_classes):
    """Return C (K+1,K+1) int64: C[g,p] counts the pixels of class g that are predicted as p.

    target (H,W) holds 0..K, or 255 for pixels to ignore; prediction (H,W) holds 0..K.
    Raises ValueError for other values.
    """
    n = num_classes + 1
    keep = target != IGNORE
    g = target[keep].astype(int)
    p = prediction[keep].astype(int)
    if g.size and (max(g.max(), p.max()) >= n or min(g.min(), p.min()) < 0):
        raise ValueError(f"want indices 0..{num_classes}, got up to {max(g.max(), p.max())}")
    return np.bincount(n * g + p, minlength=n * n).reshape(n, n)


def summary(C, class_names):
    """Return {"miou", "iou", "precision", "recall", "confusion"} of a confusion matrix C (K+1,K+1).

    IoU_k = C_kk / (row_k + column_k - C_kk), precision C_kk / column_k, recall C_kk / row_k, all in
    [0,1], for the classes that occur in a mask (precision None if column_k is 0); mIoU is the mean
    of their IoUs.
    """
    scores = {"iou": {}, "precision": {}, "recall": {}}
    for k, name in enumerate(["background", *class_names]):
        hit = int(C[k, k])
        true = int(C[k].sum())
        predicted = int(C[:, k].sum())
        if true:
            scores["iou"][name] = hit / (true + predicted - hit)
            scores["precision"][name] = hit / predicted if predicted else None
            scores["recall"][name] = hit / true
    miou = sum(scores["iou"].values()) / max(1, len(scores["iou"]))
    return {"miou": miou, **scores, "confusion": C.tolist()}


def areas(label, label_names):
    """Return {name: share of the pixels} for the classes that occur in a label (H,W)."""
    counts = np.bincount(label.ravel(), minlength=len(label_names))
    return {name: float(n / label.size) for name, n in zip(label_names, counts) if n}


def csv_bytes(rows):
    """Return rows as the content of a CSV file, with the byte order mark that Excel needs."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode("utf-8-sig", "surrogateescape")


# ---- pictures ------------------------------------------------------------------------------------


def palette_image(label):
    """Return (H,W) uint8 indices as a PIL palette image in VOC's colours.

    Bits 3b, 3b+1 and 3b+2 of an index are bit 7-b of red, green and blue.
    """
    image = Image.fromarray(np.ascontiguousarray(label, dtype=np.uint8))
    index, channel = np.mgrid[:256, :3]
    palette = sum(((index >> (3 * b + channel)) & 1) << (7 - b) for b in range(8))
    image.putpalette(palette.flatten().tolist())
    return image


def remove_specks(label):
    """Return a label (H,W) uint8 in which every pixel has the most frequent index in its window.

    The window is 2 round(long side / 125) + 1 pixels wide, but at most 9. Counting with running
    sums is much faster on large photos than Pillow's ModeFilter.
    Source: our choice (docs/CHOICES.md).
    """
    radius = min(4, round(max(label.shape) / 125))
    cleaned = np.zeros_like(label)
    highest = torch.zeros(label.shape)
    for k in np.unique(label):
        share = box_mean(torch.from_numpy(label == k).float()[None, None], radius)[0, 0]  # (H,W)
        cleaned[(share > highest).numpy()] = k
        highest = torch.maximum(highest, share)
    return cleaned


def heatmap(image, M):
    """Return a map M (H,W) in [0,1] drawn over the darkened photo, from blue (0) to red (1)."""
    colour = torch.stack([(1.5 - (4 * M - c).abs()).clamp(0, 1) for c in (3, 2, 1)], 2).numpy()
    grey = np.asarray(image.convert("L"))[:, :, None]
    return Image.fromarray((grey * 0.4 + 153 * colour).astype(np.uint8))


def overlay(image, label, label_names=()):
    """Return a label (H,W) drawn over the photo; undecided pixels (255) are cream.

    With the names of all labels, background first, a legend names the classes that occur.
    """
    colours = palette_image(label)
    picture = Image.blend(image, colours.convert("RGB"), 0.6)
    draw = ImageDraw.Draw(picture)
    present = [name for name in areas(label, label_names) if name != label_names[0]]
    side = max(8, image.height // max(25, 2 * len(present) + 1))
    font = ImageFont.load_default(side)
    with suppress(OSError):  # DejaVu Sans covers more scripts, but may be missing
        font = ImageFont.truetype("DejaVuSans.ttf", side)
    for n, name in enumerate(present):
        k = label_names.index(name)
        box = (side, side * (2 * n + 1), 2 * side, side * (2 * n + 2))
        draw.rectangle(box, fill=tuple(colours.getpalette()[3 * k : 3 * k + 3]), outline="white")
        where = (3 * side, box[1])
        draw.text(where, name, "white", font, stroke_width=1, stroke_fill="black")
    return picture


def sheet(rows, width=160):
    """Return one picture of rows [{caption: picture, ...}, ...], each picture `width` wide.

    Pictures more than four times as high as wide are drawn narrower.
    """
    sizes = [next(iter(row.values())).size for row in rows]  # of the first picture of each row
    heights = [max(1, min(round(width * h / w), 4 * width)) for w, h in sizes]
    columns = max(len(row) for row in rows)
    page = Image.new("RGB", (columns * (width + 4), sum(heights) + 18 * len(rows)), "white")
    y = 0
    for row, height in zip(rows, heights):
        for column, (caption, picture) in enumerate(row.items()):
            x = column * (width + 4)
            ImageDraw.Draw(page).text((x + 2, y + 2), caption[: width // 6], fill="black")
            narrow = max(1, min(width, round(height * picture.width / picture.height)))
            page.paste(picture.resize((narrow, height)), (x, y + 15))
        y += height + 18
    return page


# ---- the toy set ---------------------------------------------------------------------------------

TOY_CLASSES = ("disc", "square", "triangle", "cross")
TOY_COLOURS = ((200, 70, 60), (70, 90, 200), (50, 190, 60), (210, 180, 50))


def toy_shape(name, u, v):
    """Return whether each point (u,v) lies inside a shape of radius about 1, as a boolean array."""
    if name == "disc":
        return u**2 + v**2 < 1
    if name == "square":
        return np.maximum(abs(u), abs(v)) < 0.75
    if name == "triangle":
        return np.maximum(-v, 0.87 * abs(u) + 0.5 * v) < 0.6
    return (np.minimum(abs(u), abs(v)) < 0.3) & (np.maximum(abs(u), abs(v)) < 1)  # cross


def toy_texture(rng, size, colour):
    """Return a texture (size,size,3) float: smooth blotches around a colour, and fine noise."""
    t = Image.fromarray(rng.integers(0, 255, (5, 5), dtype=np.uint8))
    t = t.resize((size, size), Image.BICUBIC)
    blotches = rng.uniform(-35, 35, 3) * np.asarray(t)[:, :, None] / 255
    return colour + blotches + rng.normal(0, 8, (size, size, 1))


def toy_picture(rng, size):
    """Return an image (size,size,3) uint8 and its mask (size,size) uint8.

    One to three shapes lie on a dull background; later ones cover earlier ones. Outlines are 255 in
    the mask. Each kind of shape has its own colour, so that six conv blocks learn the set in a
    minute.
    """
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
        image[inside] = toy_texture(rng, size, TOY_COLOURS[k] + rng.uniform(-30, 30, 3))[inside]
        mask[grown] = IGNORE
        mask[inside] = k + 1
    return image.clip(0, 255).astype(np.uint8), mask


def make_toy(root, train=240, val=60, size=97, seed=0):
    """Write a small VOC devkit of four shapes to the new folder root; return its Path.

    It is written under another name and renamed at the end, so that root is never incomplete.
    Raises InputError.
    """
    root = Path(root)
    rng = np.random.default_rng(seed)
    new = root.with_name(f".sgseg-{secrets.token_hex(8)}.tmp")
    ids = [f"toy_{n:04d}" for n in range(train + val)]
    with as_input_error(root, "cannot be written", "Make room, or choose another --out", "write"):
        for folder in ("JPEGImages", "Annotations", "SegmentationClass", "ImageSets/Segmentation"):
            (new / folder).mkdir(parents=True)
        for name in ids:
            image, mask = toy_picture(rng, size)
            shown = [TOY_CLASSES[k - 1] for k in np.unique(mask) if 0 < k < IGNORE]
            objects = "".join(f"<object><name>{tag}</name></object>" for tag in shown)
            xml = f"<annotation><filename>{name}.jpg</filename>{objects}</annotation>\n"
            Image.fromarray(image).save(new / "JPEGImages" / f"{name}.jpg", quality=92)
            (new / "Annotations" / f"{name}.xml").write_text(xml)
            palette_image(mask).save(new / "SegmentationClass" / f"{name}.png")
        (new / "ImageSets/Segmentation/train.txt").write_text("\n".join(ids[:train]) + "\n")
        (new / "ImageSets/Segmentation/val.txt").write_text("\n".join(ids[train:]) + "\n")
        (new / "classes.txt").write_text("\n".join(TOY_CLASSES) + "\n")
        new.rename(root)
    return root


# ---- errors, files, printing ---------------------------------------------------------------------


class InputError(Exception):
    """Raised for every problem with user input: "{path} {problem}. {remedy}."

    `path` and `kind` are for programs and tests.
    """

    def __init__(self, path, problem, remedy, kind):
        super().__init__(printable(f"{path} {problem}. {remedy}."))
        self.path = str(path)
        self.kind = kind


@contextmanager
def as_input_error(path, problem, remedy, kind):
    """Turn every exception raised inside the block into an InputError (but not MemoryError)."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as e:
        why = " ".join(re.sub(" <[^>]*>", "", str(e)).split())[:120]
        problem = f"{problem} ({type(e).__name__}: {why})"
        raise InputError(path, problem, remedy, kind) from None


def raise_all(problems, max_shown=None):
    """Raise a list of InputErrors as one that shows at most `max_shown` of them, one per line."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        shorter = max_shown is not None and len(problems) > max_shown
        remedy = "Run python data.py PATH to list them all" if shorter else "Each has a line below"
        error = InputError(f"{len(problems)} files", "have problems", remedy, "several")
        error.args = ("\n".join([error.args[0], *(str(p) for p in problems[:max_shown])]),)
        raise error


def read(path, limit=2**28):
    """Return the bytes of a file of at most `limit` bytes. Raises InputError."""
    path = Path(path)
    with as_input_error(path, "cannot be read", "Check the file and its permissions", "read"):
        if not path.exists():
            raise InputError(path, "does not exist", "Add it, or correct the path", "missing")
        if not path.is_file() or path.stat().st_size > limit:
            problem = f"is not a file of at most {limit // 2**20} MiB"
            raise InputError(path, problem, "Replace it", "read")
        return path.read_bytes()


def read_text(path):
    """Return the text of a UTF-8 file, without its byte order mark. Raises InputError."""
    with as_input_error(path, "is not UTF-8 text", "Save it as UTF-8", "encoding"):
        return read(path).decode("utf-8-sig")


def load(path):
    """Return the dict in a checkpoint or weights file. No pickled code is run.

    Raises InputError for other files, wrong checksums, and archives that unpack to more bytes than
    the file itself has (torch does not compress).
    """
    content = io.BytesIO(read(path, limit=2**33))
    with as_input_error(path, "is not a torch file or is damaged", "Give another file", "weights"):
        if zipfile.is_zipfile(content):
            archive = zipfile.ZipFile(content)
            size = sum(member.file_size for member in archive.infolist())
            if size > len(content.getbuffer()) or archive.testzip() is not None:
                raise InputError(path, "is damaged or compressed", "Give another file", "weights")
        content.seek(0)
        try:
            return dict(torch.load(content, map_location="cpu", weights_only=True))
        except pickle.UnpicklingError:  # torch explains at length how to run the file's code
            problem = "is not a torch file, or holds more than tensors, numbers and text"
            raise InputError(path, problem, "Give another file", "weights") from None


def check_finite(state, source):
    """Return a state dict unchanged, or raise InputError if one of its numbers is not finite."""
    for name, value in state.items():
        if not math.isfinite(value.sum(dtype=torch.float64)):  # faster than isfinite().all()
            problem = f"has a value in {name} that is not finite"
            raise InputError(source, problem, "Give another file, or a lower --lr", "weights")
    return state


def write(path, content, source=None):
    """Write text, bytes, a picture (as PNG) or a dict (for `load`) atomically.

    The content goes to a temporary file, which is then renamed. Everything but the toy set and
    the lock is written by this function.
    source: the photo that a picture was made from. It is noted in the PNG, and a file that does not
    note the same source is never replaced.
    Raises InputError.
    """
    path = Path(path)
    info = PngInfo()
    if source is not None:
        source = printable(str(source).encode(errors="replace").decode())
        info.add_itxt("sgseg source", source)
        if path.exists() and source_of(path) != source:
            problem = f"exists and was not made from {source}"
            raise InputError(path, problem, "Move it, or rename the photo", "exists")
    buffer = io.BytesIO()
    temporary = path.with_name(f".sgseg-{secrets.token_hex(8)}.tmp")
    with as_input_error(path, "cannot be written", "Make room, or choose another folder", "write"):
        if isinstance(content, Image.Image):
            content.save(buffer, "PNG", pnginfo=info)
        elif isinstance(content, dict):
            torch.save(content, buffer)
        else:
            text = isinstance(content, str)
            buffer.write(content.encode(errors="surrogateescape") if text else content)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "xb") as file:  # "x" never opens an existing file or link
                file.write(buffer.getvalue())
                file.flush()
                sync(file)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def source_of(path):
    """Return the source that `write` noted in a PNG, or None."""
    with suppress(Exception):  # a file that Pillow cannot open was not written by us
        return Image.open(io.BytesIO(read(path))).info.get("sgseg source")


def sync(file):
    """Flush the file to the disk, unless the file system does not support it."""
    try:
        os.fsync(file.fileno())
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise


def printable(text, keep=""):
    """Return the text with ? in place of control characters, except those in `keep`."""
    return "".join(c if c.isprintable() or c in keep else "?" for c in text)


def print_line(text, end="\n", stream=None):
    """Print, ignoring output errors: closed pipe, full disk, characters that cannot be shown."""
    stream = stream or sys.stdout
    encoding = getattr(stream, "encoding", None) or "ascii"
    text = printable(text, "\n\r").encode(encoding, "replace").decode(encoding)
    try:
        print(text, end=end, file=stream, flush=True)
    except OSError:  # closed pipe or full disk: discard all further output
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except ValueError:  # the stream is closed
        pass


def warn(text):
    """Print a warning on standard error."""
    print_line(printable(f"warning: {text}"), stream=sys.stderr)


def progress(name, items, note=None, total=None):
    """Yield the items and show progress: on one line of a terminal, or a new line every 30 s.

    note: a dict of numbers to show as well; total: the number of items if they have no len().
    """
    terminal = sys.stdout is not None and sys.stdout.isatty()
    width = shutil.get_terminal_size().columns - 1
    total = len(items) if total is None else total
    start = time.monotonic()
    shown = start
    for n, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if n == total or now - shown > (0.2 if terminal else 30):
            shown = now
            rate = n / max(now - start, 1e-9)
            left = f"{now - start:.1f} s" if n == total else f"{(total - n) / rate:.0f} s left"
            numbers = "  ".join(f"{key} {value:.3f}" for key, value in (note or {}).items())
            line = f"{name} {n}/{total}  {rate:.1f}/s  {left}  {numbers}".rstrip()
            line = f"\r{line[:width]:<{width}}" if terminal else line
            print_line(line, end="" if terminal and n < total else "\n")


def run_command(name, command, *arguments):
    """Run command(*arguments) and return an exit status: its own, or 0 if it returns None.

    Bad input prints a message on standard error and gives status 2; Ctrl-C gives status 130.
    """
    warnings.filterwarnings("ignore", module="PIL")  # our own messages name the file
    try:
        return command(*arguments) or 0
    except KeyboardInterrupt:
        print_line(f"{name}: stopped.", stream=sys.stderr)
        return 130
    except InputError as e:
        error = e
    except OSError as e:
        remedy = "Check the path and its permissions"
        error = InputError(e.filename or "a file", f"cannot be used ({e.strerror})", remedy, "os")
    print_line(f"{name}: {error}", stream=sys.stderr)
    return 2


# ---- python data.py ------------------------------------------------------------------------------


def report(path):
    """Print what the loader finds in a devkit or a folder of photos. Raises InputError."""
    is_devkit = devkit_in(path) is not None
    sets = open_devkit(path) if is_devkit else (Photos(path), None)
    what = "a VOC devkit (--voc)" if is_devkit else "photos in folders or tags.csv (--photos)"
    print_line(f"{sets[0].root}: {what}")
    problems = []
    for photos in filter(None, sets):
        try:
            photos.scan(masks=True, max_shown=len(photos.ids))
        except InputError as problem:
            problems.append(problem)
        masks = sum(mask is not None for mask in photos.mask_paths)
        sides = np.array(photos.sizes or [(0, 0)])
        sizes = f"sides of {sides.min()} to {sides.max()} pixels"
        print_line(f"{photos.split}: {len(photos.ids)} photos, {sizes}")
        print_line(f"  masks, for scoring only: {masks}")
        for name, n in zip(photos.class_names, photos.tags.sum(0).int().tolist()):
            print_line(f"  {name}: {n}")
        print_line(f"  without a tag: {int((photos.tags.sum(1) == 0).sum())}")
    raise_all(problems)


def main(argv=None):
    """Run `python data.py PATH`; return the exit status."""
    parser = argparse.ArgumentParser("data.py", description="Print what the loader finds.")
    parser.add_argument("path", metavar="PATH", help="a VOC devkit or a folder of tagged photos")
    path = parser.parse_args(argv).path
    return run_command("data.py", report, path)


if __name__ == "__main__":
    sys.exit(main())
