"""Makes a text of 58 MB, English and technical, for bench.train: the same wherever it is made.

The text comes from packages of Debian 12 (`bench/inputs/recipe.py`), each checked by its SHA-256. Documents are
separated by a zero byte; `bench.inputs.corpus` says which are held out.
"""

import hashlib
import lzma
import pathlib
import sys
from collections.abc import Sequence

from bench.command.parser import make_parser, run
from bench.command.values import output_file, output_folder
from bench.inputs.corpus import is_held_out_document
from bench.inputs.documents import in_parts, is_english, prose_share, unpacked, without_repeats
from bench.inputs.packages import files_of, get_package, require_debian
from bench.inputs.recipe import PACKAGES, SHA256, Package
from bench.record.progress import Progress
from bench.record.tables import format_table


def main(argv: Sequence[str]) -> int:
    """Writes the text and prints a table of it; 1 if it is not the one that the recipe gives."""
    parser = make_parser(
        "bench.corpus",
        "Downloads packages of Debian 12 with apt, without installing them, and makes one text of their documents: "
        "essays, dictionaries, and the documentation of Linux, Perl and Python. It is written packed by xz, for "
        "`bench.train --text`. Takes two minutes.",
        ("corpus.xz --packages debs",),
    )
    parser.add_argument("output", type=output_file, metavar="FILE", help="where the text goes; its name ends in .xz")
    parser.add_argument(
        "--packages", type=output_folder, default=pathlib.Path("debs"), metavar="DIR", help="default: %(default)s"
    )
    args = parser.parse_args(argv)
    if pathlib.Path(args.output).suffix != ".xz":
        raise ValueError(f"FILE must end in .xz, as it is packed by xz; got {args.output}")
    require_debian()
    args.packages.mkdir(parents=True, exist_ok=True)
    progress = Progress(2 * len(PACKAGES))
    paths = []
    for number, package in enumerate(PACKAGES):
        progress.show(number, f"getting {package.name}")
        paths.append(get_package(package, args.packages))
    found: list[tuple[str, bytes]] = []
    for number, (package, path) in enumerate(zip(PACKAGES, paths, strict=True)):
        progress.show(len(PACKAGES) + number, f"reading {package.name}")
        found += [(package.name, text) for text in _documents(package, path)]
    documents = list(without_repeats(found))
    text = b"\0".join(document for _, document in documents)
    progress.say("packing")
    pathlib.Path(args.output).write_bytes(lzma.compress(text))
    print(format_table(("package", "documents", "MB", "prose %", "held out MB"), _rows(documents)))
    sha256 = hashlib.sha256(text).hexdigest()
    print(
        f"{args.output}: {pathlib.Path(args.output).stat().st_size / 1e6:.1f} MB packed, SHA-256 of the text {sha256}"
    )
    if sha256 != SHA256:
        print(f"error: expected the SHA-256 {SHA256}: this is not the text of bench/inputs/recipe.py", file=sys.stderr)
    return int(sha256 != SHA256)


def _documents(package: Package, path: pathlib.Path) -> list[bytes]:
    """In the order of the files' paths."""
    texts = [unpacked(content) for _, content in sorted(files_of(package, path))]
    if package.dictionary:
        texts = [part for text in texts for part in in_parts(text)]
    return [text for text in texts[:: package.every] if is_english(text)]


def _rows(documents: Sequence[tuple[str, bytes]]) -> list[list[str | int | float]]:
    """A row for each package, and one for all of them."""
    rows: list[list[str | int | float]] = []
    for name in (*(package.name for package in PACKAGES), None):
        texts = [text for origin, text in documents if name in (origin, None)]
        size = sum(map(len, texts))
        prose = sum(prose_share(text) * len(text) for text in texts) / max(1, size)
        held_out = sum(len(text) for text in texts if is_held_out_document(text))
        rows.append([name or "all", len(texts), size / 1e6, 100 * prose, held_out / 1e6])
    return rows


if __name__ == "__main__":
    sys.exit(run(main))
