"""One folder for the kernels that these tests generate, gone afterwards."""

import os
import tempfile

os.environ.setdefault("FASTOPT_CACHE_DIR", tempfile.mkdtemp(prefix="fastopt-simulated-"))
