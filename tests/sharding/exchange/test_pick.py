"""What "auto" takes, and what it says where the fastest transport cannot run."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from pallas_kernels.chips import get_chip
from pallas_kernels.tracing.target import lowering_for, targeting
from sharding.exchange import Way, pick, pick_transport
from sharding.mesh import is_in_order, make_mesh
from sharding.partition import Axes, Partition, expert_axes
from sharding.placement import Placement


def way(axes: Axes, transport: str = "auto") -> Way:
    return Way(Placement(8, axes.ep), axes, transport=transport)


@pytest.fixture(autouse=True)
def _says_it_anew():
    pick._report_once.cache_clear()


@pytest.mark.parametrize(("chip", "name"), [("h200", "remote"), ("v5e", "dense"), (None, "dense")])
def test_every_platform_has_its_own(chip, name, caplog):
    caplog.set_level("INFO")
    with targeting(chip and get_chip(chip)):
        assert pick_transport(way(expert_axes(4))) is pick.TRANSPORTS[name]
    assert f"transport {name!r} on" in caplog.text


OTHER_ORDER = dataclasses.replace(expert_axes(4), in_order=False)


@pytest.mark.parametrize(
    ("axes", "processes", "why"),
    [(OTHER_ORDER, 1, "a mesh of the devices 0, 1, 2"), (expert_axes(4), 2, "there are 2 processes")],
)
def test_what_cannot_run_is_not_taken_and_an_error_when_named(axes, processes, why, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    with targeting(get_chip("h200")):
        with pytest.warns(UserWarning, match=f"transport 'dense', as 'remote' needs .*{why}"):
            assert pick_transport(way(axes)) is pick.TRANSPORTS["dense"]
        with pytest.raises(
            ValueError, match=f"transport 'remote' needs .*{why}.*; use transport='auto', 'dense' or 'ragged'"
        ):
            pick_transport(way(axes, "remote"))
        assert pick_transport(way(axes, "ragged")) is pick.TRANSPORTS["ragged"]
    assert pick_transport(way(axes, "remote")) is pick.TRANSPORTS["remote"]


def test_the_order_of_a_mesh_is_known_where_its_devices_are():
    mesh = make_mesh(4, 2)
    turned = Mesh(np.flip(mesh.devices, 1), mesh.axis_names)
    found = [Partition().on(m).in_order for m in (mesh, turned, mesh.abstract_mesh)]
    assert found == [True, False, None]
    assert is_in_order(make_mesh(2, devices=jax.devices()[1:])) is False


def test_a_mesh_whose_devices_are_hidden_has_to_have_all():
    """Outside of any mesh, as where memory is planned, nothing speaks against it."""
    with lowering_for("gpu"):
        assert pick_transport(way(expert_axes(4))) is pick.TRANSPORTS["remote"]
        with jax.sharding.use_abstract_mesh(make_mesh(jax.device_count()).abstract_mesh):
            assert pick_transport(way(expert_axes(4))) is pick.TRANSPORTS["remote"]
        with (
            jax.sharding.use_abstract_mesh(make_mesh(4).abstract_mesh),
            pytest.warns(UserWarning, match="needs a mesh of the devices 0, 1, 2"),
        ):
            assert pick_transport(way(expert_axes(4))) is pick.TRANSPORTS["dense"]
