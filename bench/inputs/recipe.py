"""The text that `bench.corpus` makes: which files of which packages of Debian 12, and how documents are cut from them.

A package is named with its version and the SHA-256 of its file, so that the text is the same wherever it is made.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Package:
    """A package, and the documents in it.

    Attributes:
      name: as apt knows it.
      version: likewise.
      sha256: of its file, in hexadecimal.
      files: regular expression of the whole path of each file that is a document.
      dictionary: whether files are long lists of entries, which are cut at blank lines into documents of some 16 kB.
      every: of so many documents one is taken, so that no package outweighs all others.
    """

    name: str
    version: str
    sha256: str
    files: str
    dictionary: bool = False
    every: int = 1


_DICTIONARY = r"usr/share/dictd/.*\.dict\.dz"

PACKAGES = (
    Package(
        "anarchism",
        "15.3-3",
        "cf21c10948b00e923c62eb31c39a3390413fa26c5ee0e3b925feb0ec7fe42948",
        r"usr/share/doc/anarchism/markdown/.*\.md(\.gz)?",
    ),
    Package(
        "dict-devil",
        "1.0-13.1",
        "6a535684def2a1f70cd42da16d12d43f0e9dc3e54e4a329178eebab3170e3154",
        _DICTIONARY,
        dictionary=True,
    ),
    Package(
        "dict-foldoc",
        "20230119-1",
        "745cbedb55c2da609cc88ee0284e9d11a67a11ae3709daf7bad0e895ac3294c3",
        _DICTIONARY,
        dictionary=True,
    ),
    Package(
        "dict-gcide",
        "0.48.5+nmu2",
        "7b0af5cfde3cbdef5e9d6e78f92ec335ced7c2790f37a40f49bebc6f7347ac0f",
        _DICTIONARY,
        dictionary=True,
        every=6,
    ),
    Package(
        "dict-jargon",
        "4.4.7-3.1",
        "405f8168d7994ed2cb71407bb95493daec2e9aa66fc0461dafa74a9d6728a8c1",
        _DICTIONARY,
        dictionary=True,
    ),
    Package(
        "fortunes",
        "1:1.99.1-7.3",
        "41d0551dc0ff52f875a2ecef7c39da2f672ab468c37e170119f7e0245a9d63c5",
        r"usr/share/games/fortunes/[^./]+",
    ),
    Package(
        "linux-doc-6.1",
        "6.1.192-3",
        "f18dfe28dcab7bdbf9185be16b9521f5841277a6a96c374a6683a648d5d5fa4f",
        r"usr/share/doc/linux-doc-6\.1/Documentation/(?!translations/).*\.rst\.gz",
        every=2,
    ),
    Package(
        "perl-doc",
        "5.36.0-7+deb12u4",
        "f4269cff4576d6f02a6756df842988e58451c7e945b08517dd235531b24e48f8",
        r"usr/share/perl/.*\.pod",
    ),
    Package(
        "python3.11-doc",
        "3.11.2-6+deb12u9",
        "5b3594189d6ef9a6963ce0347fd307a1cc67620ad697e144db366070e2e146be",
        r"usr/share/doc/python3\.11/html/_sources/.*\.txt",
    ),
)

SHA256 = "a84568037c7278bf77ec889f474e7c2dcd21bb1dab8c249863c7ea051b557296"
"""Of the text that these give."""
