"""The README's result tables from a run: python docs/table.py RUN"""
import json
import sys
from pathlib import Path

CORE = "background cat cow dog horse person sheep".split()

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    results = json.loads((folder / "results.json").read_text())
    rows = {f"train, {name}": s for name, s in (results["train"] or {}).items()}
    rows |= {f"train, labels of {name}": s for name, s in results["labels"].items()} | {"val, segmentation head": results["val"]["seg"]}
    percent = lambda x: "" if x is None else f"{100 * x:.1f}"
    print("| | core-7 | mIoU | peak core-7 (threshold) | mIoU there | " + " | ".join(CORE) + " |\n|" + "---|" * (5 + len(CORE)))
    for name, s in rows.items():
        peak = s.get("peak")
        print(f"| {name} | {percent(s['core'])} | {percent(s['miou'])} | " +
              (f"{percent(peak['core'])} ({peak['threshold']:.2f}) | {percent(peak['miou'])} | " if peak else "| | ") +
              " | ".join(percent(s["iou"].get(k)) for k in CORE) + " |")
    print("\n| round | val core-7 | val mIoU |\n|---|---|---|")
    for m in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        if "val_core" in m:
            print(f"| {m['round']} | {percent(m['val_core'])} | {percent(m['val_miou'])} |")
