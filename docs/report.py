"""Show runs as a page or as a chart.

    python docs/report.py RUN                                    write RUN/report.html
    python docs/report.py --chart OUT.svg NAME=RUN[,RUN...] ...  draw val mIoU by round

The page is one self-contained file. It holds the panels of every round, the losses, the scores,
the IoU of every class, the share of every label, the ten photos whose last labels are worst (where
there are masks), and the configuration.

The chart has a line for each method: the mean of its runs, and a band from the lowest to the
highest run. The runs of one method differ in their seed.

The JSON of a run is not trusted: numbers are checked, and all text is escaped.
"""

import argparse
import base64
import html
import io
import json
import math
import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
from data import IGNORE, VOC, InputError, Photos, as_input_error, print_line, read_text

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
# the palette of Okabe and Ito, which the colour-blind can tell apart
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
LOGGED = {  # the fields read from each kind of row in metrics.jsonl: name -> highest value
    "update": {"epoch": 1e7, "L_cls": 1e30, "L_seg": 1e30},
    "labels": {"round": 1001, "undecided": 1},
    "val": {"round": 1000, "val_miou": 1},
}


# ---- reading a run -------------------------------------------------------------------------------


def number(x, highest=1):
    """Return x if it is a number from 0 to `highest`. Raises ValueError."""
    if type(x) not in (int, float) or not 0 <= x <= highest:
        raise ValueError(f"{str(x)[:40]!r} is not a number from 0 to {highest:g}")
    return x


def read_results(folder):
    """Return {row: {"miou", "decided", "iou": {class: IoU}}} of RUN/results.json.

    Raises InputError.
    """
    path = folder / "results.json"
    text = read_text(path)
    results = {}
    with as_input_error(path, "has another format", "Run train.py --eval RUN", "results"):
        for name, row in json.loads(text).items():
            iou = {k: number(x) for k, x in row["iou"].items()}
            figures = {"miou": number(row["miou"]), "decided": number(row["decided"])}
            results[name] = figures | {"iou": iou}
    return results


def read_metrics(path):
    """Return the rows of LOGGED in a metrics.jsonl; path: that file or its run folder.

    Raises InputError.
    """
    path = path / "metrics.jsonl" if path.is_dir() else path
    text = read_text(path)
    rows = []
    with as_input_error(path, "has another format", "Give another run", "results"):
        for line in text.splitlines():
            row = json.loads(line)
            if row["what"] in LOGGED:
                kept = {k: number(row[k], top) for k, top in LOGGED[row["what"]].items()}
                shares = {k: number(x) for k, x in row.get("shares", {}).items()}
                rows.append({"what": row["what"], "shares": shares} | kept)
    return rows


def read_run(folder):
    """Return the results and the metrics of a finished run. Raises InputError."""
    if not folder.is_dir():
        raise InputError(folder, "is not a folder", "Give the folder of a run", "missing")
    return read_results(folder), read_metrics(folder)


# ---- the page ------------------------------------------------------------------------------------


def escape(text):
    """Return text that HTML and SVG show as it is, without control characters."""
    return html.escape(data.printable(str(text)))


def css_colour(k):
    """Return VOC's colour of index k for CSS; undecided, which is cream elsewhere, is grey."""
    r, g, b = data.palette_image(np.array([[k]])).convert("RGB").getpixel((0, 0))
    return "#bbb" if k == IGNORE else f"rgb({r},{g},{b})"


def picture(image, width=None):
    """Return a PIL image as an <img> with embedded JPEG data, at most `width` pixels wide."""
    if width and image.width > width:
        image = image.resize((width, max(1, round(width * image.height / image.width))))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">'


def figure(title, names, svg):
    """Return a <figure>: the title, the names in their colours, and the drawing."""
    keys = [f'<b style="color:{c}">{escape(name)}</b>' for name, c in zip(names, COLOURS)]
    return f"<figure><figcaption>{escape(title)}: {', '.join(keys)}</figcaption>{svg}</figure>"


def curves(title, lines, unit=1.0):
    """Return a line chart of {name: [(x, y), ...]}; the axis shows unit * y and begins at 0."""
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return ""
    xs = sorted({x for points in lines.values() for x, _ in points})
    top = max(y for points in lines.values() for _, y in points) or 1.0
    left = xs[0]
    width = max(xs[-1] - left, 1)
    parts = []
    for share in (0, 0.5, 1):
        y = 180 - 160 * share
        parts.append(f'<line x1="45" x2="390" y1="{y}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="40" y="{y + 4}" text-anchor="end">{top * share * unit:.3g}</text>')
    for x in xs if len(xs) <= 12 else (xs[0], xs[-1]):
        at = 45 + 345 * (x - left) / width
        parts.append(f'<text x="{at:.0f}" y="197" text-anchor="middle">{x:g}</text>')
    for points, colour in zip(lines.values(), COLOURS):
        at = [(45 + 345 * (x - left) / width, 180 - 160 * y / top) for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in at]
    return figure(title, lines, f'<svg viewBox="0 0 400 200" role="img">{"".join(parts)}</svg>')


def bars(title, rows, names):
    """Return a bar chart of {row: {name: IoU}}: for every name one bar per row."""
    parts = []
    height = 14 * len(rows) + 8  # of one name's bars
    for n, name in enumerate(names):
        y = n * height
        parts.append(f'<text x="105" y="{y + 14}" text-anchor="end">{escape(name)}</text>')
        for iou, colour in zip(rows.values(), COLOURS):
            x = 240 * iou.get(name, 0)
            place = f'x="110" y="{y + 3}" width="{max(1, x):.0f}" height="12"'
            parts.append(f'<rect {place} fill="{colour}"/>')
            parts.append(f'<text x="{115 + x:.0f}" y="{y + 13}">{100 * x / 240:.1f}</text>')
            y += 14
    size = f'class="bars" viewBox="0 0 400 {height * len(names)}"'
    return figure(title, rows, f'<svg {size} role="img">{"".join(parts)}</svg>')


def stacks(metrics):
    """Return a stacked bar for each refine step: the share of the pixels that each label takes up."""
    rows = [row for row in metrics if row["what"] == "labels"]
    parts = []
    present = {}  # name -> index
    for n, row in enumerate(rows):
        y = 40 * n
        x = 60.0
        parts.append(f'<text x="55" y="{y + 25}" text-anchor="end">labels {row["round"]:g}</text>')
        shares = [*enumerate(row["shares"].items()), (IGNORE, ("undecided", row["undecided"]))]
        for k, (name, share) in shares:
            title = f"<title>{escape(name)} {share:.1%}</title>"
            place = f'x="{x:.1f}" y="{y + 5}" width="{730 * share:.1f}" height="30"'
            parts.append(f'<rect {place} fill="{css_colour(k)}">{title}</rect>')
            x += 730 * share
            present |= {name: k} if share else {}
    keys = [f'<span style="color:{css_colour(k)}">■</span> {escape(name)}'
            for name, k in sorted(present.items(), key=lambda item: item[1])]  # fmt: skip
    svg = f'<svg viewBox="0 0 800 {40 * len(rows)}" role="img">{"".join(parts)}</svg>'
    return f"<figure>{svg}<figcaption>{' '.join(keys)}</figcaption></figure>"


def worst_photos(folder, config, class_names, most=10):
    """Return photo | last label | mask of the photos whose last labels have the lowest mIoU.

    The mIoU is over the classes in the photo's mask, on pixels that the label decides.
    """
    try:
        root = config["voc"] or folder / "toy"
        photos = Photos(config["photos"]) if config["photos"] else VOC(root, "train")
    except InputError as problem:
        return f"<p>{escape(problem)}</p>"
    scored = []
    problems = []
    for i, mask in enumerate(photos.mask_paths):
        path = folder / "masks" / f"{photos.ids[i]}.png"
        if mask is None or not path.exists():
            continue
        try:
            truth = data.read_mask(mask, len(class_names))
            label = data.read_mask(path, len(class_names), truth.shape[::-1])
        except InputError as problem:
            problems.append(problem)
            continue
        decided = np.where(label == IGNORE, IGNORE, truth)
        C = data.confusion(decided, label, len(class_names))
        scored.append((data.summary(C, class_names)["miou"], i, label, truth))
        scored = sorted(scored, key=lambda entry: entry[0])[:most]
    parts = ["<p>Photo, last label, mask; mean IoU of the classes in the mask.</p>"]
    for score, i, label, truth in scored:
        image = data.read_image(photos.image_paths[i])
        shown = [image, data.overlay(image, label), data.overlay(image, truth)]
        pictures = "".join(picture(one, 300) for one in shown)
        caption = f"<figcaption>{escape(photos.ids[i])}: {score:.1%}</figcaption>"
        parts.append(f"<figure>{pictures}{caption}</figure>")
    if problems:
        first = escape(problems[0])
        parts.append(f"<p>{len(problems)} masks cannot be compared. The first: {first}</p>")
    return "".join(parts) if scored or problems else "<p>No masks to compare with.</p>"


def round_panels(folder):
    """Return the panels of every round, in order."""
    found = (re.fullmatch(r"round(\d+)\.png", p.name) for p in (folder / "panels").glob("*.png"))
    parts = []
    for r in sorted(int(match[1]) for match in found if match):
        page = picture(data.read_image(folder / "panels" / f"round{r}.png"))
        caption = f"<figcaption>after round {r}</figcaption>"
        parts.append(f'<figure class="scroll">{caption}{page}</figure>')
    return "".join(parts)


def page(folder):
    """Return the page of a run as text. Raises InputError."""
    results, metrics = read_run(folder)
    about = json.loads(read_text(folder / "config.json"))
    # a line of classes.txt is: index, name, colour
    lines = read_text(folder / "classes.txt").splitlines()
    names = [line.split(" ", 1)[1].rpartition(" ")[0] for line in lines]
    # losses and scores by epoch and by round
    updates = [row for row in metrics if row["what"] == "update"]
    losses = {k: [(row["epoch"], row[k]) for row in updates] for k in ("L_cls", "L_seg")}
    labels = {name: row for name, row in results.items() if "labels" in name}
    scores = {"labels": [(n, row["miou"]) for n, row in enumerate(labels.values(), 1)]}
    scores["val"] = [(row["round"], row["val_miou"]) for row in metrics if row["what"] == "val"]
    # the IoU of every class: first labels, last labels, val
    chosen = [*list(labels)[:1], *list(labels)[-1:], *({"val seg"} & set(results))]
    iou = {name: results[name]["iou"] for name in chosen}
    occurring = [name for name in names if any(name in row for row in iou.values())]
    config = [f"<tr><td>{escape(k)}<td>{escape(v)}" for k, v in about["config"].items()]
    command = escape(" ".join(["python train.py", *map(str, about["command"])]))
    title = escape(folder.resolve().name)
    return f"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{STYLE}</style>
<h1>{title}</h1><p><code>{command}</code></p>
<div class="row">{curves("losses by epoch", losses)}{curves("mIoU by round, %", scores, 100)}</div>
<h2>The same images after every round</h2>{round_panels(folder)}
<h2>IoU by class, %</h2>{bars("IoU", iou, occurring) if iou else "<p>No masks.</p>"}
<h2>Labels of each refine step</h2>{stacks(metrics)}
<h2>Where the last labels are worst</h2>{worst_photos(folder, about["config"], names[1:])}
<h2>Configuration</h2><table>{"".join(config)}</table></html>
"""


# ---- the chart -----------------------------------------------------------------------------------


def val_by_round(folders):
    """Return {round: [val mIoU in % of every run]} for the rounds that all runs have."""
    runs = []
    for folder in folders:
        rows = [row for row in read_metrics(Path(folder)) if row["what"] == "val"]
        runs.append({int(row["round"]): 100 * row["val_miou"] for row in rows})
    common = sorted(set.intersection(*map(set, runs)))
    if not common:
        problem = "has no score on val" if len(folders) == 1 else "have no round in common"
        raise InputError(",".join(folders), problem, "Give runs with a val list", "results")
    return {r: [run[r] for run in runs] for r in common}


def chart(methods):
    """Return an SVG of val mIoU by round. methods: {name: {round: [mIoU in %, ...]}}.

    The axis reaches from the lowest to the highest value, rounded to multiples of 5.
    """
    values = [x for rounds in methods.values() for runs in rounds.values() for x in runs]
    low = 5 * math.floor(min(values) / 5)
    high = max(low + 5, 5 * math.ceil(max(values) / 5))
    last = max(2, *(r for rounds in methods.values() for r in rounds))
    height = max(300, 24 * len(methods) + 60)

    def place(r, v):
        """Return the point of round r and value v, in pixels."""
        x = 60 + 400 * (r - 1) / (last - 1)
        y = height - 50 - (height - 90) * (v - low) / (high - low)
        return f"{x:.1f},{y:.1f}"

    # axes: a line for every 5 points, a number for every round
    parts = [f'<rect width="720" height="{height}" fill="white"/>',
             '<text x="60" y="22">mIoU on val, %</text>']  # fmt: skip
    for v in range(low, high + 1, 5 if high - low <= 50 else 10):
        x, y = place(1, v).split(",")
        parts.append(f'<path d="M{x} {y}h400" stroke="#ddd"/>')
        parts.append(f'<text x="52" y="{float(y) + 4:.1f}" text-anchor="end">{v}</text>')
    for r in range(1, last + 1):
        x = place(r, low).split(",")[0]
        parts.append(f'<text x="{x}" y="{height - 30}" text-anchor="middle">{r}</text>')
    parts.append(f'<text x="260" y="{height - 10}" text-anchor="middle">round</text>')
    # bands first, so that they hide no line; the legend is sorted by the last value
    order = sorted(methods, key=lambda name: -np.mean(list(methods[name].values())[-1]))
    bands = []
    lines = []
    for n, name in enumerate(order):
        rounds = methods[name]
        colour = COLOURS[n % len(COLOURS)]
        edge = [place(r, max(v)) for r, v in rounds.items()]
        edge += [place(r, min(v)) for r, v in reversed(rounds.items())]
        bands.append(f'<polygon points="{" ".join(edge)}" fill="{colour}" fill-opacity="0.2"/>')
        means = [place(r, np.mean(v)) for r, v in rounds.items()]
        path = " ".join(means)
        lines.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for point in means:
            x, y = point.split(",")
            lines.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>')
        y = 50 + 24 * n
        runs = len(next(iter(rounds.values())))
        label = f"{name} ({runs} {'run' if runs == 1 else 'runs'})"
        lines.append(f'<path d="M490 {y - 4}h24" stroke="{colour}" stroke-width="3"/>')
        lines.append(f'<text x="522" y="{y}">{escape(label)}</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {height}" role="img"'
    style = 'font-family="system-ui, sans-serif" font-size="14" fill="#222"'
    return f"{head} {style}>\n" + "\n".join([*parts, *bands, *lines]) + "\n</svg>\n"


# ---- the command line ----------------------------------------------------------------------------


def run_job(argv):
    """Write the page or the chart. Raises InputError."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("report.py", None, __doc__, formatter_class=layout)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folder of a finished run")
    parser.add_argument("--chart", metavar="OUT.svg", type=Path, help="draw NAME=RUN[,RUN...] ...")
    given = parser.parse_args(argv)
    if given.chart:
        pairs = [text.partition("=") for text in given.runs]
        if not all(name and folders for name, _, folders in pairs):
            parser.error("--chart takes NAME=RUN or NAME=RUN,RUN")
        if len({name for name, _, _ in pairs}) < len(pairs):
            parser.error("--chart needs a different NAME for every line")
        target = given.chart
        content = chart({name: val_by_round(folders.split(",")) for name, _, folders in pairs})
    else:
        if len(given.runs) > 1:
            parser.error("a page shows one run; --chart compares several")
        folder = Path(given.runs[0])
        target = folder / "report.html"
        remedy = "Finish it with train.py --resume, or score it with train.py --eval"
        with as_input_error(folder, "is not a finished run of this version", remedy, "run"):
            content = page(folder)
    data.write(target, content)
    print_line(f"written: {target}")


def main(argv=None):
    """Run the command line; return the exit status."""
    return data.run_command("report.py", run_job, argv)


if __name__ == "__main__":
    sys.exit(main())
