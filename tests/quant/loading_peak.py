"""Run in a process of its own: ``loading_peak.py FOLDER`` loads the model in 4 bits and prints, as JSON, how much
anonymous memory that took at its peak and what the loaded weights take."""

from __future__ import annotations

import json
import sys
import threading
import time

import torch

from deltaw import NF4Config, load_model
from deltaw.footprint import anonymous
from deltaw.kbit import memory_of


def main(folder: str, warm_up: str) -> None:
    torch.set_num_threads(1)
    config = NF4Config(bnb_4bit_use_double_quant=True)
    load_model(warm_up, quantization_config=config)  # what is imported and compiled on the way is not the model's
    before = anonymous() or 0
    peak = [before]
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], anonymous() or 0)
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load_model(folder, quantization_config=config)
    done.set()
    watcher.join()
    print(json.dumps({"peak": peak[0] - before, "weights": memory_of(model)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
