"""Makes ``tests.support`` importable wherever pytest was started from."""

import os
import sys
from pathlib import Path

from hypothesis import HealthCheck, settings

_ROOT = str(Path(__file__).parent.parent)
if _ROOT not in sys.path:
    sys.path.append(_ROOT)  # last, so that an installed runner is the one that is tested

# Time limits on single examples fail on a loaded machine and find nothing. `make test` takes the
# same examples each time; `make fuzz` looks for new ones.
_SLOW = [HealthCheck.too_slow]
settings.register_profile("test", deadline=None, derandomize=True, suppress_health_check=_SLOW)
settings.register_profile("fuzz", deadline=None, max_examples=3000, suppress_health_check=_SLOW)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "test"))
