"""The small kernel's builder, with stand-ins for the archive and the tools: nothing is compiled."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vmm.errors import ConfigError, HostError
from vmm.linux import debian, kernel


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYVMM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with nothing but a directory for stand-ins and the shell they are written in."""
    directory = tmp_path / "tools"
    directory.mkdir()
    (directory / "sh").symlink_to("/bin/sh")
    monkeypatch.setenv("PATH", str(directory))
    return directory


def stand_in(directory: Path, name: str, script: str) -> None:
    path = directory / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def all_tools(directory: Path) -> None:
    for name in ("gcc", "ld", "make", "flex", "bison", "bc", "xz", "tar", "strip"):
        stand_in(directory, name, "exit 0")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> debian.DebianPackage:
    root = tmp_path / "package"
    (root / "usr/src").mkdir(parents=True)
    (root / "usr/src/linux-source-6.1.tar.xz").write_bytes(b"")
    package = debian.DebianPackage("linux-source-6.1", "6.1.9-1", root)
    monkeypatch.setattr(debian, "fetch", lambda name, progress: package)
    return package


# What `make` has to do for the builder: write the configuration it was given, then the images.
MAKE = """
for word; do case $word in
  O=*) objects=${word#O=} ;;
  KCONFIG_ALLCONFIG=*) while IFS= read -r line; do echo "$line"; done <"${word#*=}" >"$objects/.config" ;;
  bzImage) echo "  CC      init/main.o"; echo elf >"$objects/vmlinux"
           IFS=; set -- "$objects/arch" "$objects/arch/x86" "$objects/arch/x86/boot"; /bin/mkdir "$@"
           echo image >"$objects/arch/x86/boot/bzImage" ;;
esac; done
"""
STRIP = 'echo stripped >"$3"'


def test_every_missing_package_is_named_in_one_sentence(tools: Path) -> None:
    with pytest.raises(HostError) as caught:
        kernel.small_kernel()
    sentence = str(caught.value)
    assert "apt-get install" in sentence
    for package in ("gcc", "make", "flex", "bison", "bc", "xz-utils", "libelf-dev", "libc6-dev", "binutils"):
        assert package in sentence
    assert "\n" not in sentence


def test_a_missing_header_is_named_when_the_compiler_is_there(tools: Path) -> None:
    all_tools(tools)
    stand_in(tools, "gcc", "read -r line; case $line in *gelf*) exit 1; esac")
    with pytest.raises(HostError, match=r"apt-get install libelf-dev \("):
        kernel.small_kernel()


def test_a_kernel_is_built_once_and_then_needs_neither_tools_nor_archive(
    tools: Path, source: debian.DebianPackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    all_tools(tools)
    stand_in(tools, "make", MAKE)
    stand_in(tools, "strip", STRIP)
    assert not kernel.is_built()
    stages = []
    built = kernel.small_kernel(progress=lambda stage, done, total: stages.append((stage, done, total)))
    assert built.bzimage.read_text() == "image\n"
    assert built.vmlinux.read_text() == "stripped\n"
    assert sorted(os.listdir(built.vmlinux.parent)) == ["bzImage", "config", "vmlinux"]
    assert all(total is None or 0 <= done <= total for _, done, total in stages)
    assert any("building" in stage and done == 1 for stage, done, _ in stages)
    assert kernel.is_built()
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(debian, "fetch", None)
    assert kernel.small_kernel().vmlinux == built.vmlinux


def test_a_newer_source_makes_another_kernel_when_asked(tools: Path, source: debian.DebianPackage) -> None:
    all_tools(tools)
    stand_in(tools, "make", MAKE)
    stand_in(tools, "strip", STRIP)
    first = kernel.small_kernel().vmlinux
    source.version = "6.1.10-1"
    assert kernel.small_kernel().vmlinux == first
    assert kernel.small_kernel(refresh=True).vmlinux != first


def test_a_failed_build_names_the_log_and_leaves_no_kernel(
    tools: Path, source: debian.DebianPackage, cache: Path
) -> None:
    all_tools(tools)
    stand_in(tools, "make", 'case "$*" in *bzImage*) echo "fatal: no luck"; exit 2; esac\n' + MAKE)
    with pytest.raises(HostError, match=r"read .*/small-.*-6\.1\.9-1\.log") as caught:
        kernel.small_kernel()
    log = Path(str(caught.value).rpartition("read ")[2])
    assert "fatal: no luck" in log.read_text()
    assert not kernel.is_built()
    assert not list((cache / "linux").glob("*.tmp"))


def test_a_source_that_drops_a_wanted_option_is_refused(tools: Path, source: debian.DebianPackage) -> None:
    all_tools(tools)
    stand_in(
        tools,
        "make",
        MAKE.replace("else", "").replace('echo "$line"', 'case $line in *VIRTIO_BLK*) ;; *) echo "$line"; esac'),
    )
    with pytest.raises(HostError, match="CONFIG_VIRTIO_BLK=y"):
        kernel.small_kernel()


def test_the_recipe_follows_the_fragments_and_the_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    before = kernel.recipe("small")
    assert kernel.recipe("small") == before
    monkeypatch.setattr(kernel, "_BUILDER_VERSION", -1)
    other_builder = kernel.recipe("small")
    monkeypatch.setattr(kernel, "VARIANTS", {"small": ("small.config",)})
    assert len({before, other_builder, kernel.recipe("small")}) == 3


def test_an_unknown_variant_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="'big': one of small"):
        kernel.small_kernel("big")


@pytest.mark.parametrize(
    ("wanted", "config", "missing"),
    [
        ("CONFIG_A=y\n", "CONFIG_A=y\n", []),
        ("CONFIG_A=y\n", "# CONFIG_A is not set\n", ["CONFIG_A=y"]),
        ("CONFIG_A=y\n", "", ["CONFIG_A=y"]),
        ("# CONFIG_A is not set\n", "", []),
        ("# CONFIG_A is not set\n", "CONFIG_A=y\n", ["CONFIG_A=n"]),
        ("CONFIG_A=y\n# CONFIG_A is not set\n", "# CONFIG_A is not set\n", []),
        ('CONFIG_S="a=b c"\n', 'CONFIG_S="a=b c"\n', []),
        ("# prose that names CONFIG_A is not set apart\n", "", []),
    ],
)
def test_unmet_tells_what_kconfig_dropped(wanted: str, config: str, missing: list[str]) -> None:
    assert kernel.unmet(wanted, config) == missing


def test_the_fragments_hold_nothing_but_settings_and_prose() -> None:
    for line in kernel.fragment("small").splitlines():
        assert not line or line.startswith(("CONFIG_", "#")), line
