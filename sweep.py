"""Run a sweep: ``python sweep.py --config=configs/sweeps/frontier.py``.

Finished points are skipped and rows go to ``results/``; ``--list`` shows the points,
``--engine=slurm`` writes an array script instead of running anything.
"""

import sys

from sparsejax.sweep.main import main

if __name__ == "__main__":
    sys.exit(main())
