"""The stubs are what the .proto files say, and load where they have to."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor, FileDescriptor

NAMES = ("admin", "common", "generation", "model")


@pytest.fixture
def generate(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", root / "protos" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_proto_file_has_its_stubs_and_each_was_made_from_it(generate: ModuleType) -> None:
    protos = generate.proto_files()
    assert [proto.stem for proto in protos] == list(NAMES)
    for proto in protos:
        for suffix in generate.SUFFIXES:
            stub = proto.with_name(f"{proto.stem}{suffix}")
            assert stub.read_text().startswith(generate.source_line(proto)), f"{stub} is old: run protos/generate.py"


def test_making_them_again_changes_nothing(generate: ModuleType, tmp_path: Path) -> None:
    version = _grpcio_tools_version()
    if version != generate.GRPCIO_TOOLS_VERSION:
        pytest.skip(f"needs grpcio-tools {generate.GRPCIO_TOOLS_VERSION}, found {version}")
    generate.generate(tmp_path)
    for proto in generate.proto_files():
        for suffix in generate.SUFFIXES:
            stub = proto.with_name(f"{proto.stem}{suffix}")
            assert (tmp_path / "lightqwen" / "v1" / stub.name).read_text() == stub.read_text()


def _grpcio_tools_version() -> str:
    try:
        return importlib.metadata.version("grpcio-tools")
    except importlib.metadata.PackageNotFoundError:
        return "none"


@pytest.mark.parametrize("name", NAMES)
def test_the_descriptors_say_what_the_text_says(name: str, root: Path) -> None:
    """Reads the .proto text with a parser of a few lines, knowing nothing of protoc."""
    text = (root / "protos" / "lightqwen" / "v1" / f"{name}.proto").read_text()
    module = importlib.import_module(f"lightqwen.v1.{name}_pb2")
    assert _declared_in(text) == set(_declared_by(module.DESCRIPTOR))


def _declared_in(text: str) -> set[str]:
    """`path.name = number label type` for fields, `path.NAME = number` for values, `path.Rpc(In) -> [stream ]Out`."""
    text = re.sub(r"//[^\n]*", "", text)
    found: set[str] = set()
    scope: list[tuple[str, str]] = []
    for statement, end in re.findall(r"([^;{}]*)([;{}])", text):
        words = " ".join(statement.split())
        path = "".join(f"{name}." for kind, name in scope if kind != "oneof")
        if end == "{":
            kind, name = words.split(" ")
            scope.append((kind, name))
        elif end == "}":
            scope.pop()
        elif rpc := re.fullmatch(r"rpc (\w+)\((\w+)\) returns \((stream )?(\w+)\)", words):
            found.add(f"{path}{rpc[1]}({rpc[2]}) -> {rpc[3] or ''}{rpc[4]}")
        elif scope and scope[-1][0] == "enum":
            found.add(f"{path}{words}")
        elif field := re.fullmatch(r"(optional |repeated )?([\w.]+|map<\w+, \w+>) (\w+) = (\d+)", words):
            label = "oneof " if scope[-1][0] == "oneof" else field[1] or ""
            found.add(f"{path}{field[3]} = {field[4]} {label}{field[2].rpartition('.')[2]}")
        else:
            assert re.match(r"(syntax|package|import) ?", words), words
    return found


_TYPES = {
    value: name.removeprefix("TYPE_").lower()
    for name, value in vars(FieldDescriptor).items()
    if name.startswith("TYPE_")
}


def _declared_by(file: FileDescriptor) -> Iterator[str]:
    for message in file.message_types_by_name.values():
        yield from _declared_by_message(message, "")
    for enum in file.enum_types_by_name.values():
        yield from (f"{enum.name}.{value.name} = {value.number}" for value in enum.values)
    for service in file.services_by_name.values():
        for method in service.methods:
            stream = "stream " if method.server_streaming else ""
            yield f"{service.name}.{method.name}({method.input_type.name}) -> {stream}{method.output_type.name}"


def _declared_by_message(message: Descriptor, path: str) -> Iterator[str]:
    path = f"{path}{message.name}."
    for field in message.fields:
        yield f"{path}{field.name} = {field.number} {_label(field)}{_type(field)}"
    for enum in message.enum_types:
        yield from (f"{path}{enum.name}.{value.name} = {value.number}" for value in enum.values)
    for nested in message.nested_types:
        if not nested.GetOptions().map_entry:
            yield from _declared_by_message(nested, path)


def _label(field: FieldDescriptor) -> str:
    is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
    if field.is_repeated:
        return "" if is_map else "repeated "
    oneof = field.containing_oneof
    if oneof is None:
        return ""
    return "optional " if len(oneof.fields) == 1 and oneof.name == f"_{field.name}" else "oneof "


def _type(field: FieldDescriptor) -> str:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        entry = field.message_type.fields_by_name
        return f"map<{_type(entry['key'])}, {_type(entry['value'])}>"
    named = field.message_type or field.enum_type
    return named.name if named is not None else _TYPES[field.type]


def test_every_tunable_tells_whether_it_was_set() -> None:
    """A bare proto3 scalar cannot tell 0 from unset; that mistake made other servers sample with top_p 0."""
    from lightqwen.v1 import common_pb2, generation_pb2

    for message in (
        common_pb2.SamplingParameters,
        common_pb2.StoppingParameters,
        generation_pb2.OutputOptions,
        generation_pb2.SchedulingOptions,
        generation_pb2.CacheOptions,
    ):
        for field in message.DESCRIPTOR.fields:
            assert field.is_repeated or field.has_presence, field.full_name


def test_the_stubs_load_without_a_warning_and_without_the_server(root: Path) -> None:
    code = "import sys\nfrom lightqwen.v1 import admin_pb2_grpc, generation_pb2_grpc, model_pb2_grpc\n"
    code += "bad = {'service', 'worker', 'model', 'torch', 'pydantic'} & set(sys.modules)\nassert not bad, bad\n"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=root / "protos", timeout=60)
