"""Features that others computed of WESAD's real recordings, in place of FedFog's own.

The table may not be passed on, so that it is not in the repository: `PATH` is where the tests look
for it. Set TASK=wesad_table:Scaled or wesad_table:Unscaled, and PYTHONPATH=tests.
"""

from pathlib import Path

import numpy as np

from fedfog.ml.wesad import SUBJECTS, Wesad, WesadUnscaled

PATH = (
    Path(__file__).parents[2]
    / "shared"
    / "datasets"
    / "WESAD-features"
    / "wesad_features_60s_step10s.csv"
)
COLUMNS = 18  # then label, subject and start of the window
FOLDS = [",".join(SUBJECTS[first : first + 3]) for first in range(0, 15, 3)]


class Scaled(Wesad):
    input_shape = (COLUMNS,)


class Unscaled(WesadUnscaled):
    input_shape = (COLUMNS,)


def convert(data_dir: Path) -> None:
    """Write the table as `python -m fedfog.ml.wesad` writes FedFog's."""
    rows = np.loadtxt(PATH, delimiter=",", skiprows=1)
    path = data_dir / "WESAD" / "features.npz"
    path.parent.mkdir()
    np.savez(
        path,
        features=rows[:, :COLUMNS].astype(np.float32),
        labels=rows[:, COLUMNS].astype(np.int64),
        subjects=rows[:, COLUMNS + 1].astype(np.int64),
    )
