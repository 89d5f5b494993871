"""Everything about the package is in pyproject.toml; the extension module's build will hook in here."""

from setuptools import setup

setup()
