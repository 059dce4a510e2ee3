"""Fills an encoder cache slowly, for test_encoder_cache.py: SPEECH DIRECTORY [PROCESS OF_PROCESSES]."""

import sys
from pathlib import Path

from test_encoder_cache import fill_slowly

folder, directory, *shares = sys.argv[1:]
fill_slowly(Path(folder), Path(directory), *map(int, shares))
