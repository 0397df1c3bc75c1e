"""``pyvmm doctor``: what this host's KVM is and can do, and what follows for guests."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from vmm import host
from vmm._ffi import ffi, lib
from vmm.cli import command_parser
from vmm.cpu.findings import VERDICTS, Findings
from vmm.errors import VmmError, kvm_refused
from vmm.printable import printable_lines

if TYPE_CHECKING:
    import argparse

    from vmm._ffi import vmm_vm

KVM_PATH = "/dev/kvm"

_KEYS = {"native": "guest_kernel_code", "missing": "missing_instructions"}  # finding -> name in the report


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "doctor",
        description="Report what this host's KVM is and can do: its capabilities, and the results of tiny guests.",
        epilog="exit status: 0 machines can run here; 2 they cannot, and the report states what to do",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--kvm", default=KVM_PATH, metavar="FILE", help=f"the device to examine (default: {KVM_PATH})")
    return parser


def examine(kvm: str = KVM_PATH) -> dict[str, Any]:
    """Return the report as a plain value. ``usable`` is False, with ``problem``, if no machine can be created."""
    report: dict[str, Any] = {"device": kvm, "usable": False, "backend": host.backend()}
    out = ffi.new("vmm_vm **")
    code = lib.vmm_vm_create(kvm.encode(), 0, out)
    if code < 0:
        text = ffi.string(lib.vmm_error_text()).decode()
        report["problem"] = str(kvm_refused(kvm, code, text))
        return report
    try:
        report["capabilities"] = {name: value for name, (value, _) in host.capabilities(out[0]).items()}
        host.require_capabilities(out[0])
        report["withheld_features"] = _withheld(out[0])
        found = host.probe_now(kvm)
    except VmmError as error:
        report["problem"] = str(error)
        return report
    finally:
        lib.vmm_vm_destroy(out[0])
    report["usable"] = True
    report["guest_kernel_code"] = "native" if found.native else "emulated"
    report["instruction_ns"] = found.instruction_ns
    report["exit_us"] = found.pio_us
    report["missing_instructions"] = found.missing
    report["syscall_broken"] = found.syscall_broken
    report["vmcall_loops"] = found.vmcall_loops
    report["cpuid_forced"] = found.cpuid_forced
    report["tsc_fixed"] = found.tsc_fixed
    report["shadowed"] = found.shadowed
    report["unstopped"] = found.unstopped
    report["unpaged"] = found.unpaged
    report["basis"] = {_KEYS.get(name, name): found.basis[name] for name in VERDICTS if name in found.basis}
    report["consequences"] = consequences(found)
    return report


def _withheld(vm: vmm_vm) -> list[str]:
    from vmm.cpu.cpuid import offered, saved_msrs
    from vmm.cpu.features import withheld

    return withheld(offered(vm), saved_msrs(vm))


def consequences(found: Findings) -> list[str]:
    """Return a sentence for each departure from the architecture: its effect, and pyvmm's remedy."""
    said = []
    if not found.native:
        said.append(
            f"guest kernel code is emulated, about {found.instruction_ns:.0f} ns an instruction: a small kernel boots "
            "in seconds, a stock distribution kernel in 10-20 minutes; user-space code runs at full speed"
        )
    if found.missing:
        said.append(
            f"KVM cannot execute {', '.join(found.missing)} in guest kernel code: pyvmm completes them (--compat)"
        )
    if found.syscall_broken:
        said.append("SYSCALL does not reach the guest's kernel: pyvmm repairs each one (--compat)")
    if found.vmcall_loops:
        said.append("a hypercall never returns: pyvmm hides the KVM features that use one")
    if found.cpuid_forced:
        said.append(
            f"CPUID cannot hide {', '.join(found.cpuid_forced)}: Linux is told by clearcpuid= on its command line"
        )
    if found.tsc_fixed:
        said.append(
            "the TSC of a guest cannot be set, and jumps ahead at a roll-back or a restore: Linux is told to keep time "
            "by kvmclock, which can be set"
        )
    if found.shadowed:
        said.append("KVM does not see the host write page tables: pyvmm has it forget them at every roll-back")
    if found.unstopped:
        said.append(
            f"a guest runs past a debugger's {', '.join(found.unstopped)} points: pyvmm and its gdb stub refuse them"
        )
    if found.unpaged:
        said.append(
            f"a guest cannot switch on {' or '.join(found.unpaged)} paging: a 32-bit kernel runs only as far as it "
            "does without; use a 64-bit kernel, or another host"
        )
    return said


def as_text(report: dict[str, Any]) -> str:
    """Return the report as text."""
    lines = [f"device            {report['device']}  ({_access(report['device'])})"]
    lines.append(f"backend           {report['backend']}")
    if not report["usable"]:
        return "\n".join([*lines, f"machines          cannot run here: {report['problem']}"])
    lines.append("machines          can run here")
    lines.append(f"guest kernel code {report['guest_kernel_code']} ({report['instruction_ns']:.4g} ns an instruction)")
    lines.append(f"cost of an exit   {report['exit_us']:.3g} us (port I/O, to a port without a device)")
    lines.append("capabilities")
    purposes = {name: purpose for name, purpose in (*host.NEEDED.values(), *host.USED.values())}
    for name, value in report["capabilities"].items():
        shown = "no" if value == 0 else "yes" if value == 1 else str(value)
        lines.append(f"  {name:36}{shown:9}{purposes[name]}")
    lines.append(f"kept from guests  {', '.join(report['withheld_features']) or 'no feature that KVM offers'}")
    lines.append("found by")
    lines += [f"  {name.replace('_', ' '):22}{text}" for name, text in report["basis"].items()]
    lines.append("departures from the architecture")
    lines += [f"  - {text}" for text in report["consequences"]] or ["  none"]
    return "\n".join(lines)


def _access(path: str) -> str:
    if not os.path.exists(path):
        return "missing"
    return "readable and writable" if os.access(path, os.R_OK | os.W_OK) else "no permission"


def run(argv: list[str]) -> int:
    """Print the report; return 0, or 2 when machines cannot run here."""
    args = _parser().parse_args(argv)
    report = examine(args.kvm)
    if args.json:
        import json

        print(json.dumps(report, indent=2))
    else:
        print(printable_lines(as_text(report)))
    return 0 if report["usable"] else 2
