"""The gateway: gRPC in front of the engine. Never imports torch; sees of `worker` only what crosses between them."""
