"""A run as one page to look at: python docs/report.py RUN writes RUN/report.html.

Panels of every round, loss and score curves, IoU by class, how much each round labels as what, the
ten photos whose last labels are worst (where masks are at hand), and the configuration. One file,
nothing loaded from elsewhere.
"""

import argparse
import base64
import html
import io
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
from data import IGNORE, VOC, InputError, Photos, need, read_text, refusing
from table import read_run

STYLE = """
:root { color-scheme: light }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 75rem; padding: 1rem }
h1, h2 { line-height: 1.2; margin: 2rem 0 .5rem } p { max-width: 45rem }
.row { display: flex; flex-wrap: wrap; gap: 1rem }
.row > * { flex: 1 1 20rem; min-width: 0 }
.scroll { overflow-x: auto; margin-bottom: 1rem } img, svg { max-width: 100% }
.scroll img { max-width: none; width: max(100%, 50rem) } svg.bars { max-width: 36rem }
figure { margin: 0 } figcaption { color: #555; font-size: .9rem }
table { border-collapse: collapse } td { padding: .1rem 1rem .1rem 0; vertical-align: top }
svg text { font: 12px system-ui, sans-serif; fill: #333 }
"""
LINES = ("#1f6fb4", "#d1495b", "#3c8d5a", "#8a5ab5")


def colour(k):
    """VOC's colour of index k, as CSS; cream for undecided is drawn grey."""
    r, g, b = data.palette_image(np.array([[k]])).convert("RGB").getpixel((0, 0))
    return "#bbb" if k == IGNORE else f"rgb({r},{g},{b})"


def picture(image, width=None):
    """A PIL image as an <img> that carries its own JPEG."""
    image = image.convert("RGB")
    if width and image.width > width:
        image = image.resize((width, round(width * image.height / image.width)))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">'


def curves(title, lines, unit=1.0):
    """A line chart, {name: [(x, y), ...]}, as a figure with inline SVG; y is shown times unit."""
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return ""
    xs = [x for points in lines.values() for x, _ in points]
    top = max(y for points in lines.values() for _, y in points) or 1.0
    left, right = min(xs), max(max(xs), min(xs) + 1)
    parts = []
    for share in (0, 0.5, 1):
        y = 180 - 160 * share
        parts.append(f'<line x1="45" x2="390" y1="{y}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="40" y="{y + 4}" text-anchor="end">{top * share * unit:.3g}</text>')
    for x in sorted(set(xs)) if len(set(xs)) <= 12 else (left, right):
        at = 45 + 345 * (x - left) / (right - left)
        parts.append(f'<text x="{at:.0f}" y="197" text-anchor="middle">{x:g}</text>')
    for (name, points), stroke in zip(lines.items(), LINES):
        at = [(45 + 345 * (x - left) / (right - left), 180 - 160 * y / top) for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        style = f'fill="none" stroke="{stroke}" stroke-width="2"'
        parts.append(f'<polyline points="{path}" {style}/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{stroke}"/>' for x, y in at]
    keys = [f'<b style="color:{stroke}">{name}</b>' for name, stroke in zip(lines, LINES)]
    svg = f'<svg viewBox="0 0 400 200" role="img">{"".join(parts)}</svg>'
    return f"<figure><figcaption>{title}: {', '.join(keys)}</figcaption>{svg}</figure>"


def bars(title, rows, names):
    """IoU by class, one bar for each {name: IoU} of rows, as a figure with inline SVG."""
    parts = []
    height = 14 * len(rows) + 8
    for n, name in enumerate(names):
        y = n * height
        parts.append(f'<text x="105" y="{y + 14}" text-anchor="end">{html.escape(name)}</text>')
        for m, (iou, fill) in enumerate(zip(rows.values(), LINES)):
            x = iou.get(name) or 0
            where = f'x="110" y="{y + 14 * m + 3}" width="{max(1, 240 * x):.0f}" height="12"'
            parts.append(f'<rect {where} fill="{fill}"/>')
            parts.append(
                f'<text x="{115 + 240 * x:.0f}" y="{y + 14 * m + 13}">{100 * x:.1f}</text>'
            )
    keys = [f'<b style="color:{fill}">{name}</b>' for name, fill in zip(rows, LINES)]
    size = f'class="bars" viewBox="0 0 400 {height * len(names)}"'
    svg = f'<svg {size} role="img">{"".join(parts)}</svg>'
    return f"<figure><figcaption>{title}: {', '.join(keys)}</figcaption>{svg}</figure>"


def stacks(metrics, names):
    """What each refine labels its pixels as: a stacked bar for each, as a figure."""
    parts = []
    rows = [row for row in metrics if row["what"] == "labels"]
    for n, row in enumerate(rows):
        x = 60.0
        parts.append(
            f'<text x="55" y="{40 * n + 25}" text-anchor="end">refine {row["round"]}</text>'
        )
        for name, share in [*row["shares"].items(), ("undecided", row["undecided"])]:
            width = 730 * share
            k = IGNORE if name == "undecided" else names.index(name)
            label = f"<title>{html.escape(name)} {share:.1%}</title>"
            where = f'x="{x:.1f}" y="{40 * n + 5}" width="{width:.1f}" height="30"'
            parts.append(f'<rect {where} fill="{colour(k)}">{label}</rect>')
            x += width
    present = [name for name in names if any(row["shares"][name] for row in rows)]
    keys = [
        f'<span style="color:{colour(names.index(k))}">■</span> {html.escape(k)}' for k in present
    ]
    keys.append(f'<span style="color:{colour(IGNORE)}">■</span> undecided')
    svg = f'<svg viewBox="0 0 800 {40 * len(rows)}" role="img">{"".join(parts)}</svg>'
    return f"<figure>{svg}<figcaption>{' '.join(keys)}</figcaption></figure>"


def worst(folder, config, names, most=10):
    """Photo | last label | mask of the photos whose last labels agree least, by the mean IoU over
    the classes of their masks where they are decided; a sentence where there are no masks."""
    toy = folder / "toy"
    try:
        kit = Photos(config["photos"]) if config["photos"] else VOC(config["voc"] or toy, "train")
    except InputError as fault:
        return f"<p>{html.escape(str(fault))}</p>"
    scored = []
    for i, mask in enumerate(kit.mask_paths):
        path = folder / "masks" / f"{kit.ids[i]}.png"
        if mask and path.exists():
            truth = data.read_mask(mask, len(names) - 1)
            label = data.read_mask(path, len(names) - 1, truth.shape[::-1])
            C = data.confusion(np.where(label == IGNORE, IGNORE, truth), label, 254)
            score = data.summary(C, [str(k) for k in range(254)])["miou"]
            scored.append((score, i))
    rows = []
    for score, i in sorted(scored)[:most]:
        image = data.read_image(kit.image_paths[i])
        shown = [image]
        for mask in (folder / "masks" / f"{kit.ids[i]}.png", kit.mask_paths[i]):
            shown.append(data.overlay(image, data.read_mask(mask, 255)))
        pictures = "".join(picture(one, 300) for one in shown)
        caption = f"<figcaption>{html.escape(kit.ids[i])}: {score:.1%}</figcaption>"
        rows.append(f"<figure>{pictures}{caption}</figure>")
    rows[:0] = (
        ["<p>Photo, last label, mask; mean IoU of the classes in the mask.</p>"] if rows else []
    )
    return "".join(rows) or "<p>No masks to compare with.</p>"


def report(folder):
    """The page of a run, as text. Raises InputError."""
    results, metrics = read_run(folder)
    lines = read_text(folder / "classes.txt").splitlines()  # index, name, colour
    names = [" ".join(line.split(" ")[1:-1]) for line in lines]
    about = json.loads(read_text(folder / "config.json"))
    update = [row for row in metrics if row["what"] == "update"]
    lines = {k: [(row["epoch"], row[k]) for row in update] for k in ("L_cls", "L_seg")}
    val = [(row["round"], row["val_miou"]) for row in metrics if row["what"] == "val"]
    labels = {k: s for k, s in results.items() if k.startswith("labels")}
    scores = {"labels": [(n, s["miou"]) for n, s in enumerate(labels.values(), 1)], "val": val}
    shown = {name: results[name]["iou"] for name in [*list(labels)[:1], *list(labels)[-1:]]}
    shown |= {"val seg": results["val seg"]["iou"]} if "val seg" in results else {}
    occurring = [name for name in names if any(name in iou for iou in shown.values())]
    panels = (folder / "panels").glob("round[0-9]*.png")
    panels = sorted(panels, key=lambda path: int(path.stem[5:]))
    rounds = []
    for path in panels:
        page = picture(Image.open(path))
        caption = f"<figcaption>after round {path.stem[5:]}</figcaption>"
        rounds.append(f'<figure class="scroll">{caption}{page}</figure>')
    config = [f"<tr><td>{k}<td>{html.escape(str(v))}" for k, v in about["config"].items()]
    command = html.escape(" ".join(["python train.py", *about["command"]]))
    return f"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(folder.name)}</title><style>{STYLE}</style>
<h1>{html.escape(folder.name)}</h1><p><code>{command}</code></p>
<div class="row">{curves("losses by epoch", lines)}{curves("mIoU by round, %", scores, 100)}</div>
<h2>The same images after every round</h2>{"".join(rounds)}
<h2>IoU by class, %</h2>{bars("IoU", shown, occurring) if shown else "<p>No masks.</p>"}
<h2>What each refine labels</h2>{stacks(metrics, names)}
<h2>Where the last labels are worst</h2>{worst(folder, about["config"], names)}
<h2>Configuration</h2><table>{"".join(config)}</table></html>"""


def main(argv=None):
    """Returns 0, or 2 with one line."""
    how = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser("report.py", None, __doc__, **how)
    parser.add_argument("run", type=Path, help="a finished run")
    folder = parser.parse_args(argv).run
    try:
        need(folder.is_dir(), f"{folder}: no such run; expected a run's folder; correct it")
        fix = "expected a finished run of this version; train.py --resume, or --eval RUN"
        with refusing(f"{folder}: cannot be read", fix):
            page = report(folder.resolve())
        data.write(folder / "report.html", page)
    except InputError as fault:
        print(f"report.py: {fault}", file=sys.stderr)
        return 2
    print(f"{folder / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
