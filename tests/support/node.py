"""Where `make test-node` installs transformers.js."""

import os
from pathlib import Path

from scripts import ROOT

PACKAGES = Path(os.environ.get("NODE_PACKAGES") or ROOT / ".venv" / "node" / "node_modules")
LIBRARY = PACKAGES / "@huggingface" / "transformers"
