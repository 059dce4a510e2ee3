"""Import the `evaluate` library, not examples/evaluate.py.

Python finds that script first if a script in examples/ is run.
"""

import sys
from pathlib import Path

_paths, sys.path = sys.path, [path for path in sys.path if not Path(path, "evaluate.py").is_file()]
try:
    from evaluate import Metric, MetricInfo
finally:
    sys.path = _paths

__all__ = ["Metric", "MetricInfo"]
