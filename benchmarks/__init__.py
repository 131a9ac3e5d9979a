"""The asv suite: ``bench_*.py`` on top of `common`. The other scripts are run by themselves; README.md tells."""

import sys
from pathlib import Path

# asv imports every file here in search of benchmarks; the scripts among them import each other by bare names.
sys.path.append(str(Path(__file__).parent))
