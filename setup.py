"""Joins settings.ini (metadata, requirements) to the build; the version comes from qcal_nb/__init__.py by
pyproject.toml."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
ini = ConfigParser(delimiters=["="], inline_comment_prefixes=["#"], interpolation=None)
ini.read(root/"settings.ini", encoding="utf-8")
meta = ini["DEFAULT"]
readme = root/"README.md"

def lines(key): return [line.strip() for line in meta[key].splitlines() if line.strip()]

setup(
    description=meta["description"], keywords=meta["keywords"].split(), author=meta["author"],
    license=meta["license"], classifiers=lines("classifiers"),
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else meta["description"],
    long_description_content_type="text/markdown",
    python_requires=meta["python_requires"], install_requires=lines("requirements"),
    extras_require={key.removesuffix("_requirements"): lines(key) for key in meta if key.endswith("_requirements")},
    entry_points={"nbdev": lines("nbdev_index"), "console_scripts": lines("console_scripts")},
    packages=find_packages(include=[meta["lib_path"], meta["lib_path"]+".*"]),
    package_data={meta["lib_path"]: ["py.typed", "data/**", "view/js/*.js"]},
    zip_safe=False,
)
