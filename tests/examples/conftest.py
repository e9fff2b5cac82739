"""Makes the files of examples/plain importable by their names, as they are to each other when one is run."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples/plain"))
