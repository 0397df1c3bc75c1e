"""Build: CMake makes libvmmcore.a, then cffi compiles vmm/_native against its one header."""

import subprocess
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent
NATIVE_BUILD = ROOT / "build" / "native"


class BuildNativeFirst(build_ext):
    """``build_ext`` that has CMake build the static library first."""

    def run(self) -> None:
        """Build libvmmcore.a, then every extension."""
        configure = ["cmake", "-S", str(ROOT), "-B", str(NATIVE_BUILD), "-DVMM_TESTS=OFF", "-DVMM_GUESTS=OFF"]
        try:
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", str(NATIVE_BUILD), "--target", "vmmcore", "-j2"], check=True)
        except FileNotFoundError as error:
            raise SetupError("pyvmm needs cmake and gcc: apt-get install cmake gcc python3-dev") from error
        except subprocess.CalledProcessError as error:
            raise SetupError(f"building libvmmcore.a failed ({error})") from error
        super().run()


setup(
    packages=find_packages(include=["vmm", "vmm.*"]),
    package_data={
        "vmm": ["py.typed", "*.pyi"],
        "vmm.observe": ["*.html"],
        "vmm.linux": ["*.config", "init*", "*.sh", "data/*"],
    },
    cffi_modules=["vmm/_ffi/build.py:builder"],
    cmdclass={"build_ext": BuildNativeFirst},
    # cffi compiles the extension against the limited API: one wheel is for Python 3.11 and every later one.
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
    zip_safe=False,
)
