"""Lets the tests import their neighbours, and the parts of the connector's benchmark."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "bench" / "connector"))
sys.path.insert(0, str(HERE))
