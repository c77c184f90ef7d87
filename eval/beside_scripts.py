"""Importing this puts scripts/ on the import path: programs here and there share the package ``benchmarking``."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))
