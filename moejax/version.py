"""The version of the installed package."""

import importlib.metadata

NOT_INSTALLED = "0+not.installed"
"""What stands for the version of a checkout that is imported without having been installed."""


def installed_version(package: str = "moejax") -> str:
    """The version in the metadata of `package`, `NOT_INSTALLED` if there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return NOT_INSTALLED


__version__ = installed_version()
