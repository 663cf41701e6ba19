"""What the tests of TPU kernels on a machine without a TPU share."""

from jax.experimental.pallas import tpu as pltpu


def interpreted(**options):
    """A context in which kernels for TPUs run on the CPU, and fail where they race or read what nobody wrote."""
    params = pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise", **options
    )
    return pltpu.force_tpu_interpret_mode(params)
