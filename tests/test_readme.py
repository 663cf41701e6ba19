"""README.md and the pages in docs/: their code runs or parses, and what they name is there.

Code runs as it stands there, on a layer of that shape made narrow.
"""

import ast
import importlib
import pathlib
import re

import chex
import jax
import jax.numpy as jnp
import pytest

import moejax
from bench.__main__ import commands as bench_commands
from tests.moejax.layers import narrow

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md")))
}
THAT_RUN = ["README.md", "docs/loading.md", "docs/serving.md"]
"""Pages whose code is whole; that of the others has gaps which a reader fills."""

NOT_THERE = ("moejax/routers/NAME.py", "sharding/exchange/NAME.py", "bench/NAME.py", "tests/bench/test_NAME.py")
"""Files that recipes have their reader write."""


def code_of(page: str, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)


def test_the_first_screen_shows_the_layer_in_five_lines():
    first = code_of("README.md")[0]
    assert len([line for line in first.splitlines() if line]) <= 5
    assert README.index(first) < 1200


def test_the_readme_stays_short():
    assert len(README.splitlines()) < 200


@pytest.mark.parametrize("page", THAT_RUN)
@pytest.mark.quick("README.md")
def test_code_runs(page, monkeypatch):
    """Each block after those before it."""
    monkeypatch.setattr(moejax, "get_preset", lambda name, **changes: narrow(name, **changes))
    x = jax.random.normal(jax.random.key(0), (2, 5, narrow("qwen3-30b-a3b").hidden_size), jnp.bfloat16)
    names = {"x": x}
    for block in code_of(page):
        before = dict(names)
        exec(block, names)
        made = {name: value for name, value in names.items() if value is not before.get(name)}
        for value in made.values():
            if isinstance(value, jax.Array):
                chex.assert_tree_all_finite(value)
        if "y" in made:
            chex.assert_trees_all_equal_shapes_and_dtypes(made["y"], x)
            assert jnp.abs(made["y"]).max() > 0
            assert float(made["aux"].loss) > 0


@pytest.mark.parametrize("page", PAGES)
def test_code_names_what_moejax_has(page):
    for block in code_of(page):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("moejax"):
                module = importlib.import_module(node.module)
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "moejax":
                assert hasattr(moejax, node.attr) or importlib.import_module(f"moejax.{node.attr}"), node.attr


def prose(text: str) -> str:
    """The page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_links_lead_somewhere(page):
    text = re.sub(r"`[^`\n]*`", "", prose((ROOT / page).read_text()))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page):
    folders = "bench|docs|examples|moejax|pallas_kernels|sharding|tests"
    named = re.findall(rf"`((?:{folders})/[\w./]*\w/?)`", PAGES[page])
    assert [name for name in named if not name.startswith(NOT_THERE) and not (ROOT / name).exists()] == []


def commands() -> list[tuple[str, frozenset[str]]]:
    """The benches that pages run, each with the options that it is given."""
    text = "\n".join(PAGES.values()).replace("\\\n", " ")
    found: dict[str, set[str]] = {}
    for name, rest in re.findall(r"python -m bench\.(\w+)((?:\s[^`\n&]*)?(?:\n--[^`\n]*)?)", text):
        found.setdefault(name, set()).update(re.findall(r"(?<!\w)--[a-z][\w-]*", rest))
    return sorted((name, frozenset(options)) for name, options in found.items())


@pytest.mark.parametrize(("name", "options"), commands(), ids=[name for name, _ in commands()])
def test_commands_know_the_options_that_they_are_given(name, options, capsys):
    bench = importlib.import_module(f"bench.{name}")
    with pytest.raises(SystemExit) as end:
        bench.main(["--help"])
    assert end.value.code == 0
    known = set(re.findall(r"--[a-z][\w-]*", capsys.readouterr().out))
    assert options <= known


def test_make_has_the_targets_that_are_named():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for text in PAGES.values():
        assert set(re.findall(r"(?:`|^ *)make ([a-z-]+)", text, re.MULTILINE)) <= targets


def test_every_preset_is_named():
    assert [name for name in moejax.PRESETS if f"`{name}`" not in README] == []


def test_every_command_of_the_benches_is_explained():
    assert [name for name in bench_commands() if f"bench.{name}" not in PAGES["docs/measuring.md"]] == []


def test_every_page_can_be_reached_from_the_readme():
    assert [page for page in PAGES if page != "README.md" and f"({page})" not in README] == []
