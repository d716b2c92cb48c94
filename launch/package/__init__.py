"""The package `verippo` itself, which holds the version; the folders beside it are its packages."""

import sys
from importlib import metadata

# where an editable install finds the packages: setuptools adds it to the path of namespaces alone
__path__ += [entry for entry in sys.path if entry.endswith(".__path_hook__")]
__version__ = metadata.version("verippo")
