"""The package's build: every fact is read from `settings.ini`, so that there is one place to change it."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]

git_url = cfg["git_url"]
readme = (here / "README.md").read_text(encoding="utf-8").replace("](nbs/images/", f"]({git_url}/raw/{cfg['branch']}/nbs/images/")
pythons = ["3.11", "3.12", "3.13", "3.14"]
extras = {k: cfg[f"{k}_requirements"].split() for k in ("data", "hf", "text", "dev", "parity")}
extras["dev"] += extras["data"] + extras["hf"]

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme,
    long_description_content_type="text/markdown",
    url=git_url,
    author=cfg["author"],
    author_email=cfg["author_email"],
    license="MIT",
    keywords=cfg["keywords"].split(),
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Intended Audience :: Education",
        "Natural Language :: English",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ] + [f"Programming Language :: Python :: {v}" for v in pythons],
    packages=find_packages(include=["flaxdiff", "flaxdiff.*"]),
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={"console_scripts": cfg["console_scripts"].split(),
                  "nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"]},
    package_data={"flaxdiff": ["py.typed", "shipped/*/*"]},
    include_package_data=True,
    zip_safe=False,
)
