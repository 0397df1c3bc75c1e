"""The command line: every request that cannot be ends with status 2 and one sentence; what help and version say."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

import vmm
from vmm.cli import COMMANDS
from vmm.cli.boot_arguments import DEFAULTS, FLAGS, _plain_arguments, arguments, configure, given_fields
from vmm.config import FIELDS, MachineConfig
from vmm.errors import ConfigError, HostError
from vmm.machine import Machine
from vmm.outcome import REASONS

if TYPE_CHECKING:
    from pathlib import Path

needs_kvm = pytest.mark.skipif(
    not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="/dev/kvm is missing or may not be opened"
)


def pyvmm(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vmm", *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=20,
        cwd=cwd,
    )


def elf(code: bytes, address: int = 0x100000) -> bytes:
    """An ELF64 executable with one segment."""
    header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 2, 62, 1, address, 64, 0, 0, 64, 56, 1, 64, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 120, address, address, len(code), len(code), 1)
    return header + segment + code


# mov al, 0x10; out 0xf4, al: debug exit, status 33
PROGRAM = elf(bytes.fromhex("b010e6f4"))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    contents = {
        "program": PROGRAM,
        "empty": b"",
        "text": b"hello there, this is not a kernel\n" * 40,
        "truncated": PROGRAM[:100],
        "lying": PROGRAM[:118],
        "bad.toml": b'memory = "1M',
        "unknown.toml": b"colour = 1",
        "value.toml": b'memory = "lots"',
        "number.toml": b"kernel = 5",
        "numbers.toml": b"initrd = [5]",
        "list.json": b"[1]",
        "bad.json": b'{"memory": "64M"',
        "latin1.toml": b'append = "\xff"',
        "good.toml": b'kernel = "program"\nmemory = "64M"\ncpus = 2\ntimeout = 10\ninitrd = ["a", "b"]\nreboot = true',
        "good.json": b'{"kernel": "program", "memory": "64M", "cpus": 2, "append": "from json"}',
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    with open(tmp_path / "big", "wb") as big:
        big.truncate(20 << 20)
    return tmp_path


REFUSED: list[tuple[str, str]] = [
    ("boot --kernel missing", "no such file"),
    ("boot --kernel empty", "empty"),
    ("boot --kernel text", "not a kernel"),
    ("boot --kernel truncated", "truncated"),
    ("boot --kernel lying", "truncated"),
    ("boot --kernel .", "not a regular file"),
    ("boot --kernel /dev/zero", "not a regular file"),
    ("boot --kernel program --kind bzimage", "not a bzImage"),
    ("boot --kernel program --mem lots", "is not a size"),
    ("boot --kernel program --mem -5M", "--mem"),
    ("boot --kernel program --mem 64K", "out of range"),
    ("boot --kernel program --mem 0", "out of range"),
    ("boot --kernel program --mem 99999999G", "out of range"),
    ("boot --kernel program --mem 9999999999999999999999999999G", "is not a size"),
    ("boot --kernel program --cpus 0", "1 or more"),
    ("boot --kernel program --cpus=-1", "1 or more"),
    ("boot --kernel program --cpus two", "--cpus"),
    ("boot --kernel program --cpus 100000", "--cpus 1 to"),
    ("boot --kernel program --colour", "--colour"),
    ("boot --kernel", "--kernel"),
    ("boot program", "program"),
    ("boot --kernel program --console printer", "is not a console"),
    ("boot --kernel program --console file:", "is not a console"),
    ("boot --kernel program --console file:missing/file", "choose another file"),
    ("boot --kernel program --console unix:text", "left as it is: choose another path"),
    ("boot --kernel program --console unix:missing/socket", "cannot listen"),
    ("boot --kernel program --kind floppy", "is not one of"),
    ("boot --kernel program --mode virtual", "is not one of"),
    ("boot --kernel program --compat maybe", "is not one of"),
    ("boot --kernel program --unpack nobody", "is not one of"),
    ("boot --kernel program --address here", "guest-physical address"),
    ("boot --kernel program --initrd missing", "no such file"),
    ("boot --kernel program --mem 16M --initrd big", "does not fit"),
    (f"boot --kernel program --append {'a' * 70000}", "shorten it"),
    ("boot --kernel program --timeout 0", "seconds greater than 0"),
    ("boot --kernel program --timeout=-1", "seconds greater than 0"),
    ("boot --kernel program --timeout nan", "seconds greater than 0"),
    ("boot --kernel program --timeout soon", "--timeout"),
    ("boot --kernel program --rng maybe", "say on or off"),
    ("boot --config missing.toml", "cannot read machine file"),
    ("boot --config .", "cannot read machine file"),
    ("boot --config bad.toml", "is not a machine file"),
    ("boot --config unknown.toml", "no field 'colour'"),
    ("boot --config value.toml", "is not a size"),
    ("boot --config number.toml", "is not the path"),
    ("boot --config numbers.toml", "is not a list of paths"),
    ("boot --config list.json", "is not a machine file"),
    ("boot --config bad.json", "is not a machine file"),
    ("boot --config latin1.toml", "is not a machine file"),
    ("doctor --colour", "--colour"),
    ("shutdown", "no command 'shutdown'"),
]
NEED_KVM = ("--cpus 1 to", "does not fit", "shorten it", "no such file", "truncated", "not a bzImage")


@pytest.mark.parametrize(("words", "why"), REFUSED, ids=[words[:60] for words, _ in REFUSED])
def test_a_request_that_cannot_be_gets_one_sentence_and_status_2(files: Path, words: str, why: str) -> None:
    if why in NEED_KVM and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("/dev/kvm is missing or may not be opened")
    done = pyvmm(*words.split(" "), cwd=files)
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert done.stderr.startswith("pyvmm: ")
    assert why in done.stderr
    assert done.stderr.endswith("\n") and done.stderr.count("\n") == 1, done.stderr


@needs_kvm
def test_huge_pages_that_the_host_has_not_are_refused(files: Path) -> None:
    with open("/proc/meminfo") as meminfo:
        free = next((int(line.split()[1]) for line in meminfo if line.startswith("HugePages_Free")), 0)
    done = pyvmm("boot", "--kernel", "program", "--huge-pages", "--mem", f"{(free + 1) * 2}M", cwd=files)
    assert done.returncode == 2, done
    assert "vm.nr_hugepages" in done.stderr
    assert done.stderr.count("\n") == 1


@needs_kvm
def test_the_program_of_these_tests_runs(files: Path) -> None:
    """Without this, a refusal above could be for another reason than the one meant."""
    done = pyvmm("boot", "--kernel", "program", cwd=files)
    assert (done.returncode, done.stdout, done.stderr) == (33, "", "")


# ---- KVM that is not there ----


def not_kvm(kind: str, tmp_path: Path) -> str:
    if kind == "forbidden":
        if os.geteuid() == 0:
            pytest.skip("root may open every file")
        path = tmp_path / "forbidden"
        path.touch(mode=0)
        return str(path)
    if kind == "file":
        path = tmp_path / "file"
        path.touch()
        return str(path)
    return {"missing": "/nonexistent/kvm", "null": "/dev/null"}[kind]


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("missing", "does not exist: load the module"),
        ("forbidden", "no permission"),
        ("file", "is not KVM"),
        ("null", "is not KVM"),
    ],
)
def test_a_device_that_is_not_kvm_is_named_with_what_to_do(tmp_path: Path, kind: str, why: str) -> None:
    path = not_kvm(kind, tmp_path)
    for compat in ("off", "auto"):
        with pytest.raises(HostError) as refused:
            Machine(kvm=path, compat=compat)
        assert path in str(refused.value)
        assert why in str(refused.value)
    done = pyvmm("doctor", "--kvm", path)
    assert done.returncode == 2
    assert why in done.stdout
    assert done.stderr == ""


# ---- help, version, configuration ----


def test_version() -> None:
    done = pyvmm("--version")
    assert (done.returncode, done.stdout) == (0, f"pyvmm {vmm.__version__}\n")


def test_help_lists_every_command() -> None:
    done = pyvmm("--help")
    assert done.returncode == 0
    for name, purpose in COMMANDS.items():
        assert any(name in line and purpose in line for line in done.stdout.splitlines())
    bare = pyvmm()
    assert (bare.returncode, bare.stdout) == (2, done.stdout)


def test_help_of_boot_lists_every_flag_with_its_default_and_every_status() -> None:
    done = pyvmm("boot", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    options, statuses = done.stdout.split("exit status:")
    entries = " ".join(options.split("options:")[1].split()).split(" --")
    for flag, (name, _) in FLAGS.items():
        entry = next(text for text in entries if text.split()[0] == flag[2:])
        default = DEFAULTS.get(name, FIELDS[name].default)
        shown = {"memory": "256M", "False": "off", "True": "on", "None": "none", "": "none", "()": "none"}
        expected = shown[name] if name in shown else shown.get(str(default), default)
        assert f"(default: {expected})" in entry, entry
    for reason, (status, _) in REASONS.items():
        line = next(line for line in statuses.splitlines() if f" {reason}:" in line)
        assert line.split()[0] == ("odd" if reason == "debug-exit" else str(status))


def test_every_field_of_a_machine_has_a_flag() -> None:
    assert {name for name, _ in FLAGS.values()} == set(FIELDS)


def test_a_machine_file_gives_fields_and_flags_win(files: Path) -> None:
    config = configure({"config": str(files / "good.toml"), "memory": "32M", "console": "none"})
    assert config.kernel == str(files / "program")  # relative to the file
    assert config.initrd == (str(files / "a"), str(files / "b"))
    assert (config.memory, config.cpus, config.timeout, config.console, config.reboot) == (
        32 << 20,
        2,
        10,
        "none",
        True,
    )


def test_a_machine_file_may_be_json(files: Path) -> None:
    config = configure({"config": str(files / "good.json")})
    assert (config.memory, config.cpus, config.append, config.console) == (64 << 20, 2, "from json", "stdio")


@needs_kvm
def test_a_machine_file_boots(files: Path) -> None:
    assert pyvmm("boot", "--config", "good.json", "--cpus", "1", cwd=files).returncode == 33


@pytest.mark.parametrize(
    "words",
    [
        "--kernel k --mem 64M --cpus 2 --timeout 1.5 -v",
        "--kernel=k --append=a=b --reboot --huge-pages --console=none",
        "--config c --initrd a,b --address 0x7c00 --verbose",
    ],
)
def test_the_quick_reading_of_a_command_line_agrees_with_argparse(words: str) -> None:
    from vmm.cli.boot_arguments import _parser

    quick = _plain_arguments(words.split())
    assert quick is not None
    slow = {name: value for name, value in vars(_parser().parse_args(words.split())).items() if value}
    assert quick == slow


def test_an_abbreviated_flag_is_left_to_argparse() -> None:
    assert _plain_arguments(["--kern", "k"]) is None
    assert arguments(["--kern", "k"])["kernel"] == "k"


def test_a_value_that_looks_like_a_flag_needs_an_equals_sign() -> None:
    assert arguments(["--append=-x"])["append"] == "-x"
    with pytest.raises(ConfigError, match="--append"):
        arguments(["--append", "-x"])


def test_a_standbys_address_is_a_list_like_the_others() -> None:
    from vmm.cli.boot import parse_standby

    assert parse_standby("tcp:h:1") == ("tcp:h:1", None)
    assert parse_standby("unix:a,,b,fence=c,,d") == ("unix:a,b", "c,d")
    for text in ("unix:a,b", "unix:a,fence=b,fence=c", "unix:a,fence=b,c"):
        with pytest.raises(ConfigError, match="write a comma in a path twice"):
            parse_standby(text)


def test_an_initrd_with_a_comma_in_its_name_is_found(files: Path) -> None:
    (files / "a,b").write_bytes(b"content")
    (files / "machine.toml").write_text('initrd = "a,,b"')
    fields = given_fields(arguments(["--config", str(files / "machine.toml")]))
    assert fields["initrd"] == [str(files / "a,b")]
    assert MachineConfig(initrd=str(files / "a,,b")).initrd == (str(files / "a,b"),)
