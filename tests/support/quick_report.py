"""Skip what takes longest at the end of a training run and is tested elsewhere: its speed and its figure.

test_speed.py, test_figure.py and one run of test_distill.py have the real ones.
"""

import base64
from pathlib import Path

from askd_hf.evaluation import comparison
from askd_hf.evaluation.results import ModelSpeed, Speed, Timing
from askd_hf.hub import upload

REAL = {(comparison, "measure_speed"): comparison.measure_speed, (upload, "write_run_figure"): upload.write_run_figure}
PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII=")


def no_speed(models, processors, dataset, set_name, *, batch_sizes, repetitions, max_length=None) -> Speed:
    """Return invented times for all models and batch sizes."""
    second = Timing(1.0, 1.0, 1.0)
    rows = [
        ModelSpeed(role, size, second, second, Timing(2.0, 2.0, 2.0), 2.0, 1.0, 1, None, 1.0)
        for size in batch_sizes
        for role in models
    ]
    return Speed(set_name, len(dataset), 1.0, repetitions, "cpu", "float32", 1, "sdpa", rows)


def one_pixel(log_history, path: Path) -> None:
    path.write_bytes(PNG)


def install() -> None:
    comparison.measure_speed, upload.write_run_figure = no_speed, one_pixel


def restore(monkeypatch) -> None:
    """Have the real ones in this test."""
    for (module, name), function in REAL.items():
        monkeypatch.setattr(module, name, function)
