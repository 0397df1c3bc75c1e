"""Generate the API reference: a page for each public module, from its docstrings.

Run as ``python docs/reference.py FOLDER`` (``make docs``). A warning of the generator is an error.
"""

from __future__ import annotations

import pkgutil
import sys
import warnings
from pathlib import Path

import pdoc

import vmm


def modules() -> list[str]:
    """Return the names of the package and of its public modules; the commands are documented by their manual page."""
    names = [found.name for found in pkgutil.walk_packages(vmm.__path__, "vmm.")]
    private = [name for name in names if any(part.startswith("_") for part in name.split("."))]
    return ["vmm", *sorted(set(names) - set(private) - {name for name in names if name.startswith("vmm.cli")})]


def generate(folder: Path) -> None:
    """Write the reference into ``folder``. Raises a warning of the generator as an exception."""
    pdoc.render.configure(docformat="markdown", footer_text=f"pyvmm {vmm.__version__}", show_source=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # pdoc cannot evaluate annotations of names that a module imports for types alone: it shows them as written.
        warnings.filterwarnings("ignore", message="Error parsing type annotation")
        # vmm._native exists as an extension and as its stub, which imports itself while pdoc reads it.
        warnings.filterwarnings("ignore", message=r"Failed to run TYPE_CHECKING code .* importing vmm\._native")
        # A package without __all__ brings its modules, which the list names as well.
        warnings.filterwarnings("ignore", message="The module specification .* a module with this name has already")
        pdoc.pdoc(*modules(), output_directory=folder)


if __name__ == "__main__":
    generate(Path(sys.argv[1]))
