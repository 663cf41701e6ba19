"""The options that join several processes into one run."""

import argparse

from bench.command.values import natural_int, positive_int


def add_process_options(parser: argparse.ArgumentParser) -> None:
    """For `bench.measure.devices.start`."""
    add = parser.add_argument
    add("--coordinator", metavar="HOST:PORT", help="of process 0, for a run over several hosts")
    add("--num-processes", type=positive_int, metavar="N", help="processes in all")
    add("--process-id", type=natural_int, metavar="I", help="number of this process")
