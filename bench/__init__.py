"""Cost models, workloads and command-line benchmarks of a Mixture-of-Experts layer."""

import sys

from bench.processes.interrupts import quiet_while_importing

if sys.argv[0] == "-m":  # so it is while Python looks for the module that `python -m` named
    quiet_while_importing()
