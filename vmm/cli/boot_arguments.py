"""The command line of ``pyvmm boot``: flags, their fields, and the resulting configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vmm.cli import command_parser
from vmm.config import FIELDS, MachineConfig, read_file
from vmm.errors import ConfigError
from vmm.outcome import REASONS

if TYPE_CHECKING:
    import argparse


def _on_off(text: str) -> bool:
    if text not in ("on", "off"):
        raise ConfigError(f"--rng {text}: say on or off")
    return text == "on"


# flag -> (field, arguments of add_argument)
FLAGS: dict[str, tuple[str, dict[str, Any]]] = {
    "--kernel": ("kernel", {"metavar": "FILE"}),
    "--mem": ("memory", {"metavar": "SIZE"}),
    "--cpus": ("cpus", {"metavar": "N", "type": int}),
    "--initrd": ("initrd", {"metavar": "FILE[,FILE]"}),
    "--append": ("append", {"metavar": '"WORDS"'}),
    "--timeout": ("timeout", {"metavar": "SECONDS", "type": float}),
    "--stall": ("stall", {"metavar": "SECONDS", "type": float}),
    "--console": ("console", {"metavar": "KIND"}),
    "--kind": ("kind", {"metavar": "KIND"}),
    "--mode": ("mode", {"metavar": "MODE"}),
    "--address": ("address", {"metavar": "GPA"}),
    "--unpack": ("unpack", {"metavar": "WHO"}),
    "--compat": ("compat", {"metavar": "HOW"}),
    "--disk": ("disks", {"metavar": "FILE[,OPTION]", "action": "append"}),
    "--net": ("nets", {"metavar": "KIND[,OPTION]", "action": "append"}),
    "--share": ("shares", {"metavar": "DIR:TAG", "action": "append"}),
    "--vsock": ("vsock", {"metavar": "PATH[,cid=N]"}),
    "--rng": ("rng", {"metavar": "on|off", "type": _on_off}),
    "--balloon": ("balloon", {"action": "store_true"}),
    "--console-device": ("console_device", {"metavar": "KIND"}),
    "--virtio": ("virtio", {"metavar": "TRANSPORT"}),
    "--symbols": ("symbols", {"metavar": "FILE"}),
    "--gdb": ("gdb", {"metavar": "ADDR", "nargs": "?", "const": "127.0.0.1:1234"}),
    "--control": ("control", {"metavar": "PATH"}),
    "--checkpoint-dir": ("checkpoint_dir", {"metavar": "DIR"}),
    "--checkpoint-every": ("checkpoint_every", {"metavar": "SECONDS", "type": float}),
    "--retain": ("retain", {"metavar": "N", "type": int}),
    "--standby": ("standby", {"metavar": "ADDRESS"}),
    "--huge-pages": ("huge_pages", {"action": "store_true"}),
    "--screen": ("screen", {"action": "store_true"}),
    "--reboot": ("reboot", {"action": "store_true"}),
}
DEFAULTS: dict[str, Any] = {"console": "stdio"}  # where the command differs from the library


def _parser() -> argparse.ArgumentParser:
    import argparse

    statuses = "\n".join(f"  {status:>4}  {reason}: {text}" for reason, (status, text) in REASONS.items())
    parser = command_parser(
        "boot",
        description="Boot an image; without --kernel, a Linux that pyvmm gets for itself.\n\n"
        "In an option that is a list (FILE[,FILE], FILE[,OPTION]) a comma within a part is written twice.\n\n"
        "On a terminal: Ctrl-A x quits, Ctrl-A h helps, Ctrl-A Ctrl-A sends Ctrl-A.",
        epilog="exit status:\n" + statuses.replace("     1  debug", "   odd  debug") + "\n     2  a request that "
        "cannot be: one sentence on standard error says why\n\ndebug-exit with value v is status (v << 1) | 1.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="machine file (TOML, or JSON by its name); flags win over it")
    for flag, (name, how) in FLAGS.items():
        field = FIELDS[name]
        shown = f"{field.help} (default: {_show(name, DEFAULTS.get(name, field.default))})"
        parser.add_argument(flag, dest=name, default=None, help=shown.replace("%", "%%"), **how)
    parser.add_argument("-v", "--verbose", action="store_true", help="say on standard error how the image is booted")
    return parser


def _show(name: str, default: Any) -> str:
    if name == "memory":
        return f"{default >> 20}M"
    if isinstance(default, bool):
        return "on" if default else "off"
    return "none" if default in (None, "", ()) else str(default)


def arguments(argv: list[str]) -> dict[str, Any]:
    """Return the values of a command line by field name (and ``config``, ``verbose``); exits as argparse does."""
    plain = _plain_arguments(argv)
    return vars(_parser().parse_args(argv)) if plain is None else plain


def _plain_arguments(argv: list[str]) -> dict[str, Any] | None:
    """Parse a plain command line, of complete flags each with its value; return ``None`` if it needs argparse.

    Importing argparse and building its parser takes longer than creating a machine.
    """
    verbose = ("verbose", {"action": "store_true"})
    flags = {**FLAGS, "--config": ("config", {}), "--verbose": verbose, "-v": verbose}
    given: dict[str, Any] = {}
    words = iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        name, how = flags.get(flag, ("", {}))
        if how.get("action") == "store_true" and not equals:
            given[name] = True
            continue
        if "nargs" in how and not equals:
            return None  # its value is optional
        value = value if equals else next(words, "-")
        if not name or how.get("action") == "store_true" or (value.startswith("-") and not equals):
            return None
        try:
            taken = how.get("type", str)(value)
        except ValueError:
            return None
        given[name] = [*given.get(name, []), taken] if how.get("action") == "append" else taken
    return given


def given_fields(given: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of the machine file, overridden by those of flags."""
    fields = dict(read_file(given["config"])) if given.get("config") else {}
    fields.update((name, given[name]) for name, _ in FLAGS.values() if given.get(name) is not None)
    return fields


def configure(given: dict[str, Any]) -> MachineConfig:
    """Return the configuration: defaults, then what is given, and the default Linux without a kernel."""
    fields = {**DEFAULTS, **given_fields(given)}
    config = MachineConfig(**fields)
    if config.kernel is None:
        from vmm.cli.default_linux import find

        config = find(config, memory_given="memory" in fields)
    return config
