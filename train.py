"""Train a model: ``python train.py --config=configs/quickstart.py --workdir=runs/a``.

Any field of the config can be overridden, ``--config.model.depth=8``; ``--aot=TARGET``
compiles the step for hardware that is not there instead of training.
"""

import sys

from sparsejax.train.main import main

if __name__ == "__main__":
    sys.exit(main())
