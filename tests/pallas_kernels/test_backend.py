import pathlib
import warnings

import jax
import pytest

import pallas_kernels
from pallas_kernels import backend
from pallas_kernels.backend import Unsupported, available, check_backend, run
from tests.helpers import raises_saying

REFERENCE = "def double(x):\n    return 'xla', 2 * x\n"
PICKY = """
from pallas_kernels.backend import Unsupported

def double(x):
    if x > 10:
        raise Unsupported(f"x must be at most 10, got {x}")
    return 'kernel', 2 * x
"""


@pytest.fixture
def operator(tmp_path, monkeypatch):
    """Makes operators: a package below `pallas_kernels` with the given modules."""

    def make(name: str, **modules: str) -> str:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "__init__.py").touch()
        for module, text in modules.items():
            (folder / f"{module}.py").write_text(text)
        return name

    monkeypatch.setattr(pallas_kernels, "__path__", [*pallas_kernels.__path__, str(tmp_path)])
    yield make
    available.cache_clear()
    backend._say_once.cache_clear()


@pytest.fixture
def platform(monkeypatch):
    return lambda name: monkeypatch.setattr(jax, "default_backend", lambda: name)


@pytest.mark.parametrize("name", ["grouped_matmul", "dispatch", "combine"])
def test_every_operator_has_the_reference(name):
    folder = pathlib.Path(pallas_kernels.__file__).parent / name
    assert "xla" in available(name)
    for module in ("tpu", "gpu"):
        exists = (folder / f"{module}.py").exists() or (folder / module / "__init__.py").exists()
        assert (f"pallas_{module}" in available(name)) == exists


def test_available_lists_modules_without_importing_them(operator):
    assert available(operator("op_listed", reference=REFERENCE, gpu="raise SystemExit")) == ("xla", "pallas_gpu")
    assert available(operator("op_all", reference="", tpu="", gpu="")) == ("xla", "pallas_tpu", "pallas_gpu")


@pytest.mark.parametrize("name", ["cpu", "gpu", "tpu"])
def test_auto_without_kernels_is_the_reference(operator, platform, name):
    platform(name)
    assert run(operator("op_plain_" + name, reference=REFERENCE), "double", "auto", 3) == ("xla", 6)


@pytest.mark.parametrize(("module", "own", "other"), [("gpu", "gpu", "tpu"), ("tpu", "tpu", "gpu")])
def test_auto_takes_the_kernels_of_the_platform(operator, platform, module, own, other):
    name = operator("op_own_" + module, **{"reference": REFERENCE, module: PICKY})
    platform(own)
    assert run(name, "double", "auto", 3) == ("kernel", 6)
    for elsewhere in (other, "cpu"):
        platform(elsewhere)
        assert run(name, "double", "auto", 3) == ("xla", 6)


def test_auto_falls_through_and_says_so_once(operator, platform):
    name = operator("op_falls", reference=REFERENCE, gpu=PICKY)
    platform("gpu")
    with pytest.warns(UserWarning, match="op_falls: falling back to the XLA reference: x must be at most 10, got 11"):
        assert run(name, "double", "auto", 11) == ("xla", 22)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(name, "double", "auto", 11) == ("xla", 22)


def test_a_named_backend_never_falls_through(operator, platform):
    name = operator("op_named", reference=REFERENCE, gpu=PICKY)
    platform("gpu")
    assert run(name, "double", "pallas_gpu", x=3) == ("kernel", 6)
    assert run(name, "double", "xla", x=3) == ("xla", 6)
    with raises_saying(Unsupported, "at most 10"):
        run(name, "double", "pallas_gpu", 11)


def test_other_errors_are_not_swallowed(operator, platform):
    name = operator("op_broken", reference=REFERENCE, gpu="def double(x):\n    raise ValueError('broken')\n")
    platform("gpu")
    with raises_saying(ValueError, "broken"):
        run(name, "double", "auto", 1)
    missing = operator("op_missing", reference=REFERENCE, gpu="import a_module_that_is_not_there\n")
    with pytest.raises(ModuleNotFoundError):
        run(missing, "double", "auto", 1)


def test_an_operator_without_kernels_for_the_named_platform_is_xlas(operator):
    assert run(operator("op_lacks", reference=REFERENCE), "double", "pallas_tpu", 1) == ("xla", 2)


@pytest.mark.parametrize("name", ["cuda", "", "XLA"])
def test_an_unknown_name(name):
    with raises_saying(ValueError, "backend", repr(name), "'auto', 'xla', 'pallas_tpu', 'pallas_gpu'"):
        check_backend(name)
    with raises_saying(ValueError, repr(name)):
        run("combine", "combine", name)


def test_unsupported_is_a_not_implemented_error():
    assert issubclass(Unsupported, NotImplementedError)
