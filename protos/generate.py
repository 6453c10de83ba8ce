"""Make the stubs beside the .proto files: `python protos/generate.py`, with grpcio-tools == 1.72.1 installed.

Stubs refuse to load on a grpcio or protobuf older than what made them, so the oldest supported grpcio-tools makes them:
the first line of grpcio-tools whose code runs on protobuf 6 and 7 alike. It wants protobuf < 7 itself, hence an own
virtual environment:

    python -m venv build/tools && build/tools/bin/pip install grpcio-tools==1.72.1
    build/tools/bin/python protos/generate.py

Each stub begins with the SHA-256 of the .proto file that it was made from; tests/protos compares them.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.resources
import sys
from pathlib import Path

GRPCIO_TOOLS_VERSION = "1.72.1"
ROOT = Path(__file__).parent
SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")


def proto_files() -> list[Path]:
    return sorted((ROOT / "lightqwen" / "v1").glob("*.proto"))


def source_line(proto: Path) -> str:
    """The first line of every stub of `proto`."""
    digest = hashlib.sha256(proto.read_bytes()).hexdigest()
    return f"# Made by protos/generate.py from {proto.relative_to(ROOT)}, sha256 {digest}\n"


def generate(out: Path) -> None:
    """Write the stubs of all .proto files below `out`.

    Raises:
        RuntimeError: protoc refused a file (it has said why on stderr).
    """
    from grpc_tools import protoc

    well_known = importlib.resources.files("grpc_tools") / "_proto"
    protos = proto_files()
    arguments = ["protoc", f"-I{ROOT}", f"-I{well_known}"]
    arguments += [f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}"]
    if protoc.main(arguments + [str(proto) for proto in protos]) != 0:
        raise RuntimeError("protoc failed")
    for proto in protos:
        for suffix in SUFFIXES:
            stub = out / proto.relative_to(ROOT).parent / f"{proto.stem}{suffix}"
            stub.write_text(source_line(proto) + stub.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the Python stubs of the .proto files.")
    parser.add_argument(
        "--out", type=Path, default=ROOT, help="folder to write below (default: beside the .proto files)"
    )
    out = parser.parse_args().out
    try:
        version = importlib.metadata.version("grpcio-tools")
    except importlib.metadata.PackageNotFoundError:
        version = "none"
    if version != GRPCIO_TOOLS_VERSION:
        sys.stderr.write(f"needs grpcio-tools=={GRPCIO_TOOLS_VERSION}, found {version}; see the top of {__file__}\n")
        return 1
    generate(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
