"""Docker's health check: asks the health port whether requests are taken. Exit code 0 says yes, 1 no.

`healthcheck.py liveness` asks for another service of the port. Kubernetes needs no such thing: it asks by itself.
"""

from __future__ import annotations

import os
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

TIMEOUT_S = 4.0


def main() -> int:
    service = sys.argv[1] if len(sys.argv) > 1 else "readiness"
    target = f"127.0.0.1:{os.environ.get('LIGHTQWEN_HEALTH_PORT', '50052')}"
    with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            status = health_pb2_grpc.HealthStub(channel).Check(request, timeout=TIMEOUT_S).status
        except grpc.RpcError as error:
            print(f"{target} {service}: {error.code().name} {error.details()}")
            return 1
    print(f"{target} {service}: {health_pb2.HealthCheckResponse.ServingStatus.Name(status)}")
    return 0 if status == health_pb2.HealthCheckResponse.SERVING else 1


if __name__ == "__main__":
    sys.exit(main())
