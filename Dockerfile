# syntax=docker/dockerfile:1
# Two images of one server:
#   docker build --target cpu  --tag lightqwen:0.1.0-cpu .
#   docker build --target cuda --tag lightqwen:0.1.0-cuda .
# PyTorch's wheel brings the CUDA libraries along; of the host it needs only the driver. It brings them to the CPU image
# too, unless --build-arg PIP_EXTRA_INDEX_URL names the index of CPU wheels that PyTorch's installation page tells.
ARG PYTHON=3.12.12-slim-bookworm

# ---- built, and left behind ------------------------------------------------------------------------------------------

FROM python:${PYTHON} AS build
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PATH=/opt/lightqwen/bin:$PATH
RUN python -m venv /opt/lightqwen
ARG TORCH=2.13.0
ARG PIP_EXTRA_INDEX_URL=
# A layer of its own: it is most of the image, and changes least.
RUN pip install "torch==${TORCH}"
WORKDIR /src
COPY pyproject.toml README.md LICENSE deploy/constraints.txt ./
COPY model ./model
COPY worker ./worker
COPY service ./service
COPY protos ./protos
COPY bench ./bench

FROM build AS build-cpu
RUN pip install --constraint constraints.txt ".[server]"

FROM build AS build-cuda
RUN pip install --constraint constraints.txt ".[server,gpu]"
# Kernels of the published shapes, for H100 and H200, so that a new pod need not compile any: SIZE, or SIZE/RANKS. This
# needs no GPU; --build-arg KERNELS= leaves them out. (Up to 3.6, Triton wants the driver's libcuda.so.1 for it.)
ARG KERNELS="0.6B 1.7B 4B 8B 14B 32B 4B/2 8B/2 14B/2 32B/2 8B/4 14B/4 32B/4 32B/8"
# hadolint ignore=SC2086
RUN [ -z "${KERNELS}" ] || python -m worker.compile ${KERNELS}

# ---- what both images are --------------------------------------------------------------------------------------------

FROM python:${PYTHON} AS runtime
RUN groupadd --gid 10001 lightqwen \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin lightqwen \
    && install --directory --owner=10001 --group=10001 /cache /models
COPY deploy/server.toml /etc/lightqwen/server.toml
COPY deploy/healthcheck.py /usr/local/lib/lightqwen/healthcheck.py
# Nothing is written outside of /cache and /tmp: the root may be read-only. Options of the server are not set here, for
# they would go before those of a configuration file.
ENV PATH=/opt/lightqwen/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface \
    TRITON_CACHE_DIR=/cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    CUDA_CACHE_PATH=/cache/cuda
WORKDIR /tmp
USER 10001:10001
EXPOSE 50051 50052 9464
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m --retries=3 \
    CMD ["python", "/usr/local/lib/lightqwen/healthcheck.py"]
ENTRYPOINT ["lightqwen"]
CMD ["serve", "--config", "/etc/lightqwen/server.toml"]

FROM runtime AS cpu
COPY --from=build-cpu /opt/lightqwen /opt/lightqwen

# ---- the default -----------------------------------------------------------------------------------------------------

FROM runtime AS cuda
USER 0:0
# Triton compiles a launcher for each kernel. Debian's security fixes matter more than one exact version of its compiler.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
# Not NVIDIA_VISIBLE_DEVICES: a container that asked for no GPU should see none.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
COPY --from=build-cuda /opt/lightqwen /opt/lightqwen
