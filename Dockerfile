# syntax=docker/dockerfile:1
# docker build --tag eva02-at:0.1.0 .        (amd64 and arm64; docs/containers.md)
# The base brings the driver's interface only: torch's wheels bring their own CUDA 13 libraries.

FROM nvidia/cuda:13.0.1-base-ubuntu24.04 AS wheel
# Ubuntu keeps no old versions of its packages, so that pinning them would break the build.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-pip python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY . .
RUN python3 -m venv /build && /build/bin/pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM nvidia/cuda:13.0.1-base-ubuntu24.04
# A compiler: Triton, DeepSpeed and the CPU kernels build small libraries when they first run.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc g++ libc6-dev python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
COPY requirements.lock /tmp/requirements.lock
RUN python3 -m venv /opt/eva02-at \
    && /opt/eva02-at/bin/pip install --no-cache-dir --constraint /tmp/requirements.lock torch
COPY --from=wheel /wheels /tmp/wheels
# Nobody in particular: caches go where any user may write, also under `--user $(id -u)`.
RUN /opt/eva02-at/bin/pip install --no-cache-dir --constraint /tmp/requirements.lock /tmp/wheels/*.whl \
    && useradd --create-home --uid 10001 eva02
ENV PATH=/opt/eva02-at/bin:$PATH \
    HOME=/home/eva02 \
    TRITON_CACHE_DIR=/tmp/triton \
    TORCH_EXTENSIONS_DIR=/tmp/torch_extensions \
    PYTHONUNBUFFERED=1
USER 10001
WORKDIR /work
ENTRYPOINT ["eva02-at"]
CMD ["--help"]
