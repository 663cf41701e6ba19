"""One expert-parallel layer for real: fitted to the devices, run, checked and timed stage by stage."""
