"""Packages from the archive, with stand-ins for apt and dpkg-deb: no network."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from vmm.errors import ConfigError, HostError
from vmm.linux import debian

APT_GET = """
[ "$1" = download ] || exit 9
if [ "$2" = --print-uris ]; then
  case $3 in nothing) echo "E: Unable to locate package nothing" >&2; exit 100; esac
  echo "'http://archive.test/pool/$3_VERSION_amd64.deb' $3_VERSION_amd64.deb 3 SHA256:00"
else
  for package; do :; done
  echo "downloaded" >>"$LOG"
  [ -z "$OFFLINE" ] || { echo "E: Failed to fetch: no route" >&2; exit 100; }
  echo abc >"${package}_VERSION_amd64.deb"
fi
"""
APT_CACHE = """
echo "$3"; echo "  Depends: initramfs-tools"; echo "  Depends: linux-image-6.1.0-9-cloud-amd64"
"""
DPKG_DEB = """
/bin/mkdir -p "$3/boot" "$3/lib/modules/6.1.0-9-cloud-amd64"
echo kernel >"$3/boot/vmlinuz-6.1.0-9-cloud-amd64"
"""


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host whose only tools are the stand-ins; the file tells how often something was downloaded."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, script in (("apt-get", APT_GET), ("apt-cache", APT_CACHE), ("dpkg-deb", DPKG_DEB)):
        (tools / name).write_text("#!/bin/sh\n" + script.replace("VERSION", "6.1.9-1"))
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setenv("PYVMM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    monkeypatch.delenv("OFFLINE", raising=False)
    return tmp_path / "log"


def test_a_package_is_downloaded_once_and_its_archive_dropped(log: Path, tmp_path: Path) -> None:
    seen = []
    for _ in range(2):
        package = debian.fetch("some-tool", lambda stage, done, total: seen.append((done, total)))
        assert package.name == "some-tool"
        assert package.version == "6.1.9-1"
        assert package.root == tmp_path / "cache/debian/some-tool_6.1.9-1_amd64"
    assert log.read_text() == "downloaded\n"
    assert not list(package.root.glob("*.deb"))
    assert (0, 3) in seen and (3, 3) in seen


def test_a_stock_kernel_is_found_through_its_metapackage(log: Path) -> None:
    kernel = debian.stock_kernel("cloud")
    assert kernel.version == "6.1.0-9-cloud-amd64"
    assert kernel.vmlinuz.read_text() == "kernel\n"
    assert kernel.modules.is_dir() and kernel.modules.name == kernel.version


@pytest.mark.parametrize("flavour", ["cloud", "generic"])
def test_without_apt_the_kernel_fetched_before_is_used(
    flavour: str, log: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if flavour == "generic":
        script = tmp_path / "tools/apt-cache"
        script.write_text(script.read_text().replace("9-cloud", "9"))
    before = debian.stock_kernel(flavour)
    # Kernels of other flavours, fetched later, must not be taken for it.
    other = "-rt" if flavour == "cloud" else "-cloud"
    (tmp_path / f"cache/debian/linux-image-6.1.0-10{other}-amd64_6.1.10-1_amd64").mkdir(parents=True)
    monkeypatch.setenv("PATH", "/nonexistent")
    assert debian.stock_kernel(flavour).vmlinuz == before.vmlinuz


def test_no_apt_and_nothing_fetched_says_to_give_a_kernel(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(HostError, match=r"apt-cache is not on this host.*--kernel"):
        debian.stock_kernel()


def test_an_unknown_package_says_what_apt_said(log: Path) -> None:
    with pytest.raises(HostError, match=r"Unable to locate package nothing.*apt-get update"):
        debian.fetch("nothing")


def test_a_failed_download_leaves_nothing(log: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OFFLINE", "1")
    with pytest.raises(HostError, match=r"no route.*check the network"):
        debian.fetch("some-tool")
    assert [path.suffix for path in (tmp_path / "cache/debian").iterdir()] == [".lock"]


@pytest.mark.parametrize("name", ["", "x", "-oDebug=1", "a b", "a=1", "../x", "A", "linux-image-*"])
def test_what_is_no_package_name_is_refused(name: str, log: Path) -> None:
    with pytest.raises(ConfigError, match="not the name of a Debian package"):
        debian.fetch(name)


def test_an_unknown_flavour_is_refused_with_the_known_ones(log: Path) -> None:
    with pytest.raises(ConfigError, match="cloud, generic"):
        debian.stock_kernel("rt")


def test_a_static_executable_is_one_without_an_interpreter(tmp_path: Path) -> None:
    def elf(*segments: int) -> bytes:
        header = struct.pack(
            "<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 2, 62, 1, 0, 64, 0, 0, 64, 56, len(segments), 0, 0, 0
        )
        return header + b"".join(struct.pack("<I52x", kind) for kind in segments)

    path = tmp_path / "program"
    for content, static in ((elf(1, 1), True), (elf(1, 3, 1), False), (b"#!/bin/sh\n", False), (elf(1)[:40], False)):
        path.write_bytes(content)
        assert debian._is_static(path) is static
