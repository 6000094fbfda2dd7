"""Makes ``tests.support`` importable wherever pytest was started from."""

import sys
from pathlib import Path

_ROOT = str(Path(__file__).parent.parent)
if _ROOT not in sys.path:
    sys.path.append(_ROOT)  # last, so that an installed runner is the one that is tested
