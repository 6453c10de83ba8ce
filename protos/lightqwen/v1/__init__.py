"""The contract's stubs, made from the .proto files beside them by protos/generate.py. Import the modules by name."""
