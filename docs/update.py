"""Wall time of an update epoch against bare steps: python docs/update.py RUN

Bare: forward, backward and optimizer step of the same network on one batch already in memory. Epoch: what `train.py` does
with the pseudo labels of RUN's last round, from loading the images on. Neither is saved. For a CPU: the bare steps know no autocast.
"""
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import train

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    state, stored = train.load_run(sys.argv[1])
    cfg = train.configure({"workers": -1}, sys.argv[1], stored)    # the default of this machine, whatever RUN was given
    run = train.Run(cfg, state)
    cfg.epochs = 1                                                 # one epoch of the last round
    run.at.update(round=cfg.rounds, epoch=cfg.warmup + cfg.rounds - 1, step=0)
    run.save = lambda: None
    steps = len(run.voc.ids) // cfg.batch
    x, y, labels, _ = next(iter(train.batches(run, cfg.batch)))
    x = x.to(cfg.device, memory_format=torch.channels_last)
    run.net.train()
    run.net.backbone.eval()

    def bare(count):
        start = time.perf_counter()
        for _ in range(count):
            L_cls, L_seg = train.losses(run.net, x, y.to(cfg.device), labels.to(cfg.device))
            run.opt.zero_grad()
            (L_cls + L_seg).backward()
            for group in run.opt.param_groups:
                group["lr"] = 0.0                                  # the same work, and the network stays as it is
            run.opt.step()
        return time.perf_counter() - start
    bare(3)
    times = []
    for n in range(2):                                             # one before, one after: clocks drift
        times.append(bare(steps))
        if n == 0:
            start = time.perf_counter()
            train.update(run)
            epoch = time.perf_counter() - start
    print(f"{steps} steps of {cfg.batch}: update epoch {epoch:.1f} s; bare {times[0]:.1f} and {times[1]:.1f} s; "
          f"ratio {2 * epoch / sum(times):.2f}")
