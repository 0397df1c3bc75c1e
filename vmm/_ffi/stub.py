"""Write ``vmm/_native.pyi``, the types of the native half, from the built extension: ``python -m vmm._ffi.stub``.

cffi reads fields through a pointer as through the struct itself, and an array's elements likewise: so each struct is
one class, which stands for the value, a pointer to it and an array of it. A pointer to anything else is
``Pointer[...]``. ``tests/unit/test_native_stub.py`` compares the file with what this module makes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve().parents[1] / "_native.pyi"

_HEAD = '''\
"""Types of the native half (``native/include``). Made by ``python -m vmm._ffi.stub``; do not edit."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Generic, Literal, Self, TypeVar, overload

_T = TypeVar("_T")
_F = TypeVar("_F", bound=Callable[..., object])

class Data: ...

class Pointer(Data, Generic[_T]):
    def __getitem__(self, index: int, /) -> _T: ...
    def __setitem__(self, index: int, value: _T, /) -> None: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[_T]: ...

class Struct(Data):
    def __getitem__(self, index: int, /) -> Self: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Self]: ...
'''

_FFI_METHODS = """\
    @overload
    def new(self, cdecl: str, init: object = ...) -> Any: ...
    def typeof(self, cdecl: object) -> Any: ...
    def sizeof(self, cdecl: object) -> int: ...
    def offsetof(self, cdecl: object, *fields: str | int) -> int: ...
    def list_types(self) -> tuple[list[str], list[str], list[str]]: ...
    def cast(self, cdecl: str, value: object) -> Any: ...
    def string(self, cdata: Data, maxlen: int = ...) -> bytes: ...
    def unpack(self, cdata: Data, length: int) -> Any: ...
    def buffer(self, cdata: Data, size: int = ...) -> Any: ...
    @overload
    def from_buffer(self, python_buffer: object, /, *, require_writable: bool = ...) -> Any: ...
    @overload
    def from_buffer(self, cdecl: str, python_buffer: object, /, require_writable: bool = ...) -> Any: ...
    def memmove(self, dest: object, src: object, n: int) -> None: ...
    def addressof(self, cdata: object, *fields: str | int) -> Any: ...
    def callback(self, cdecl: str, python_callable: Callable[..., object], error: object = ...) -> Any: ...
    def new_handle(self, value: object) -> Any: ...
    def from_handle(self, handle: object) -> Any: ...
    def gc(self, cdata: _T, destructor: Callable[[_T], object] | None, size: int = ...) -> _T: ...
    def def_extern(self, *, name: str = ..., error: object = ..., onerror: object = ...) -> Callable[[_F], _F]: ...
"""


def _name(ctype: Any) -> str:
    return str(ctype.cname).removeprefix("struct ").removeprefix("union ")


def _value(ctype: Any) -> str:
    """The type of what a field, an element or a function's result is in Python."""
    if ctype.kind == "primitive":
        names = {"float": "float", "double": "float", "char": "bytes", "_Bool": "bool"}
        return names.get(ctype.cname, "int")
    if ctype.kind in ("struct", "union"):
        return _name(ctype)
    if ctype.kind in ("pointer", "array"):
        item = ctype.item
        if item.kind == "struct":
            return _name(item)
        return "Any" if item.kind == "void" else f"Pointer[{_value(item)}]"
    return {"void": "None", "enum": "int"}.get(ctype.kind, "Any")  # a function is called through cffi only


def _parameter(ctype: Any) -> str:
    """The type of what a function takes: cffi makes arrays of Python's sequences and buffers."""
    if ctype.kind == "pointer" and ctype.item.kind == "primitive":
        plain = "bytes | " if ctype.item.cname in ("char", "unsigned char", "uint8_t") else ""
        return f"{plain}Sequence[int] | {_value(ctype)}"
    if ctype.kind == "pointer" and ctype.item.kind == "pointer" and ctype.item.item.kind == "primitive":
        return f"Sequence[object] | {_value(ctype)}"
    return _value(ctype)


def _function(name: str, ctype: Any) -> str:
    parameters = "".join(f", _{i}: {_parameter(kind)}" for i, kind in enumerate(ctype.args))
    return f"    def {name}(self{parameters}) -> {_value(ctype.result)}: ...\n"


def _fields(ffi: Any, name: str) -> list[tuple[str, Any]] | None:
    """The fields of a struct; ``None`` where it is opaque."""
    try:
        ffi.sizeof(name)  # cffi reads the fields only now, and aborts when it is asked for them before
    except ffi.error:
        return None
    return list(ffi.typeof(name).fields)


def _struct(name: str, fields: list[tuple[str, Any]] | None) -> str:
    if not fields:
        return f"\nclass {name}(Struct): ...\n"
    return f"\nclass {name}(Struct):\n" + "".join(f"    {field}: {_value(of.type)}\n" for field, of in fields)


def stub() -> str:
    """The text of ``_native.pyi``."""
    from vmm._ffi import ffi, lib

    names = [name for name in ffi.list_types()[0] if ffi.typeof(name).kind == "struct"]
    structs = {name: _fields(ffi, name) for name in names}
    text = _HEAD + "".join(_struct(name, fields) for name, fields in structs.items())
    text += "\nclass _Ffi:\n    NULL: Final[Any]\n    error: type[Exception]\n    CData: type[Data]\n"
    for name, fields in structs.items():
        if fields is not None:
            text += f'    @overload\n    def new(self, cdecl: Literal["{name} *", "{name}[]"], init: object = ...) -> '
            text += f"{name}: ...\n"
        text += f'    @overload\n    def new(self, cdecl: Literal["{name} **"], init: object = ...) -> '
        text += f"Pointer[{name}]: ...\n"
    text += _FFI_METHODS + "\nclass _Lib:\n"
    for name in sorted(dir(lib)):
        value = getattr(lib, name)
        if isinstance(value, int):
            text += f"    {name}: Final = {value}\n"
        elif (ctype := ffi.typeof(value)).kind == "function":
            text += _function(name, ctype)
        else:
            text += f"    {name}: Any\n"
    return text + "\nffi: Final[_Ffi]\nlib: Final[_Lib]\n"


if __name__ == "__main__":
    FILE.write_text(stub())
