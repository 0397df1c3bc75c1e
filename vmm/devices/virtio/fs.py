"""virtio-fs (virtio 1.2, 5.11): a host directory the guest mounts by a tag, ``mount -t virtiofs TAG /mnt``.

Files are served by virtiofsd, a process of its own that takes the device's queues over vhost-user: walking paths
that a guest chose is where file servers go wrong, and that one is looked after by many. (9p, the other way a stock
kernel could mount a directory, would have meant a file server of our own; see docs/threats/fs.md.) It runs without
privilege: in a user namespace of its own, our user is its root. The model is ``native/virtio/fs.c``.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from vmm._ffi import check, ffi, lib
from vmm.devices.virtio.device import VirtioDevice
from vmm.errors import ConfigError, HostError, StateError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm._ffi import vmm_vm
    from vmm.devices.device import State

TAG_MAX = 36  # bytes: 5.11.4

# Where distributions put virtiofsd. The last is the older one, QEMU's, in C, which Debian 12 has.
SERVERS = ("/usr/libexec/virtiofsd", "/usr/lib/virtiofsd", "/usr/lib/qemu/virtiofsd")
# A way round that list, for a server installed elsewhere.
SERVER_VARIABLE = "PYVMM_VIRTIOFSD"


class Fs(VirtioDevice):
    """The directory ``directory`` of the host, under the tag ``tag`` (1 to 36 bytes of UTF-8).

    What the guest's root writes is the monitor's user's on the host. ``readonly``: the guest can write nothing.
    ConfigError: no such directory, or no such tag can be. HostError: virtiofsd is missing or does not start.
    """

    device_id = 26

    def __init__(
        self, vm: vmm_vm, index: int, directory: str | os.PathLike[str], tag: str, *, readonly: bool = False
    ) -> None:
        self.name = f"virtio-fs{index}"
        self.tag = checked_tag(tag)
        self.directory = checked_directory(directory, readonly)
        self.readonly = readonly
        connection, server, log = _start_server(find_server(), self.directory, readonly)
        out = ffi.new("vmm_fs **")
        check(lib.vmm_fs_create(vm, self.name.encode(), self.tag.encode(), connection, server, log, out))
        self._fs: Any = out[0]
        self.virtio = lib.vmm_fs_virtio(self._fs)

    def save_driven(self) -> State:
        """Raises :class:`~vmm.errors.StateError`: what the guest has open is the server's to know."""
        raise StateError(f"a share cannot be saved, what is open in it is virtiofsd's: take out the share {self.tag!r}")

    def capture(self) -> Any:
        """Raises :class:`~vmm.errors.StateError`."""
        return self.save_driven()

    def destroy(self) -> None:
        """Free the native half; the server ends."""
        if self._fs is not None:
            lib.vmm_fs_destroy(self._fs)
            self._fs = self.virtio = None


def checked_tag(tag: str) -> str:
    """``tag`` if a device can have it; else ConfigError."""
    size = len(tag.encode(errors="surrogateescape"))
    if not 1 <= size <= TAG_MAX or "\0" in tag:
        raise ConfigError(
            f"a share cannot have the tag {tag!r}: give 1 to {TAG_MAX} bytes without a NUL, this has {size}"
        )
    return tag


def checked_directory(directory: str | os.PathLike[str], readonly: bool) -> str:
    """The absolute path of a directory that can be shared; else ConfigError."""
    path = os.path.realpath(directory)
    if not os.path.isdir(path):
        raise ConfigError(f"{os.fspath(directory)} cannot be shared: it is not a directory")
    if not os.access(path, os.R_OK | os.X_OK | (0 if readonly else os.W_OK)):
        fix = "change its permissions" if readonly else "change its permissions, or share it read-only"
        raise ConfigError(f"{os.fspath(directory)} cannot be shared: this user may not use it; {fix}")
    return path


def find_server(places: Sequence[str] = SERVERS) -> str:
    """The path of virtiofsd; HostError: there is none."""
    chosen = os.environ.get(SERVER_VARIABLE)
    for place in [chosen] if chosen else places:
        if os.access(place, os.X_OK):
            return os.path.abspath(place)
    if chosen:
        raise HostError(f"{chosen} cannot be run: let {SERVER_VARIABLE} name a virtiofsd, or unset it")
    raise HostError(
        "sharing a directory needs virtiofsd: install the package virtiofsd (Debian 12: qemu-system-common), "
        f"or name it in {SERVER_VARIABLE}"
    )


def server_command(server: str, directory: str, readonly: bool) -> list[str]:
    """The command line: either virtiofsd, shut in as far as it can, that may make no device nodes."""
    common = [server, f"--fd={lib.VMM_FS_SERVER_LISTENER}", "--rlimit-nofile=0"]
    if os.path.basename(os.path.dirname(server)) == "qemu":  # its options are a list with commas
        source = directory.replace("\\", "\\\\").replace(",", "\\,")
        return [*common, "-o", f"source={source}", "-o", "sandbox=namespace,log_level=warn,modcaps=-mknod"]
    options = ["--sandbox=namespace", "--log-level=warn", "--modcaps=-mknod", *(["--readonly"] if readonly else [])]
    return [*common, f"--shared-dir={directory}", *options]


def _start_server(server: str, directory: str, readonly: bool) -> tuple[int, int, int]:
    """Start it. Answers three descriptors: our end of its socket, its pidfd, the reading end of what it prints."""
    connection, listener = _connected()
    log, printed = os.pipe()
    words = [ffi.new("char[]", os.fsencode(word)) for word in server_command(server, directory, readonly)]
    out = ffi.new("int *")
    flags = lib.VMM_FS_READONLY if readonly else 0
    try:
        code = lib.vmm_fs_server_start([*words, ffi.NULL], os.fsencode(directory), flags, listener, printed, out)
        if code < 0:
            _refused(code)
    except BaseException:
        os.close(connection)
        os.close(log)
        raise
    finally:
        os.close(listener)
        os.close(printed)
    return connection, int(out[0]), log


def _connected() -> tuple[int, int]:
    """A socket, and a listening one on which the first connection waits: virtiofsd takes no other kind.

    Nobody else can come first: the name is in a directory of our own, and gone when the server starts.
    """
    import socket

    place = os.path.join(os.environ.get("XDG_RUNTIME_DIR") or "/tmp", f"pyvmm-{os.urandom(8).hex()}")
    name = os.path.join(place, "socket")
    try:
        os.mkdir(place, 0o700)
        try:
            with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as connection:
                listener.bind(name)
                listener.listen(1)
                connection.connect(name)
                os.unlink(name)
                return connection.detach(), listener.detach()
        finally:
            os.rmdir(place)
    except OSError as error:
        raise HostError(f"no socket for virtiofsd in {place}: {error.strerror}", errno=error.errno or 0) from error


def _refused(code: int) -> None:
    import errno

    text = ffi.string(lib.vmm_error_text()).decode(errors="replace")
    if -code in (errno.EPERM, errno.ENOSPC, errno.EACCES, errno.EINVAL):
        raise HostError(
            f"sharing a directory needs user namespaces ({text}: {os.strerror(-code)}): allow them "
            "(sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone or, on Ubuntu, "
            "kernel.apparmor_restrict_unprivileged_userns), or run as root",
            errno=-code,
        )
    check(code)
