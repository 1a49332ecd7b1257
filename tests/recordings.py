"""Small recordings of exactly the form of WESAD's official `S*.pkl`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import pickle2
from fedfog.ml.wesad import SIGNALS

PULSE, BREATH = 1.2, 0.25  # Hz
PROTOCOL = ((0, 5), (1, 100), (0, 10), (2, 80), (4, 70), (3, 65), (7, 5))  # label, seconds


def recording(name: str, protocol: Sequence[tuple[int, int]] = PROTOCOL) -> dict[str, Any]:
    """A person whose heart and breath are known, and who sweats under stress."""
    draw = np.random.default_rng(int(name[1:]))
    labels = np.repeat([label for label, _ in protocol], [700 * s for _, s in protocol])
    devices: dict[str, dict[str, NDArray[Any]]] = {"chest": {}, "wrist": {}}
    for signal in SIGNALS:
        time = np.arange(len(labels) * signal.rate // 700) / signal.rate
        values = draw.normal(size=(len(time), signal.columns)) * 0.05
        match signal.key:
            case "ECG":
                values[:, 0] += np.exp(-(((time * PULSE) % 1 - 0.5) ** 2) / 2e-4)
            case "BVP":
                values[:, 0] += np.sin(2 * np.pi * PULSE * time)
            case "Resp":
                values[:, 0] += np.sin(2 * np.pi * BREATH * time)
            case "EDA":
                stressed = labels[(time * 700).astype(int)] == 2
                values[:, 0] += draw.uniform(1, 9) + stressed
        dtype = np.float32 if signal.key == "Temp" else np.float64
        devices[signal.device][signal.key] = values.astype(dtype)
    return {"signal": devices, "label": labels.astype(np.int32), "subject": name}


def write(data_dir: Path, content: dict[str, Any], name: str = "", protocol: int = 2) -> Path:
    name = name or content["subject"]
    path = data_dir / "WESAD" / name / f"{name}.pkl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle2.dumps(content, protocol))
    return path
