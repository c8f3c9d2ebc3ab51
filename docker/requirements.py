"""Prints the dependencies of the project, one per line, so that an image can install them before it copies the source.

python docker/requirements.py [EXTRA ...]

Run it in the folder of pyproject.toml. Every EXTRA adds the dependencies of that optional extra, for example parquet.
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
print(*project["dependencies"], *(line for extra in sys.argv[1:] for line in extras[extra]), sep="\n")
