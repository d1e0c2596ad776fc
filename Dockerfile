# An image for machines with NVIDIA GPUs:
#
#     docker build -t dataflex .
#     docker run --rm --gpus all --ipc=host -v "$PWD":/work -v dataflex-cache:/root/.cache dataflex train run.yaml
#
# --ipc=host gives NCCL and the workers of data loaders enough shared memory. The second volume keeps models, data sets and
# compiled kernels between containers.

# The locked torch wheel for Linux depends on wheels with the CUDA 13 libraries. A CUDA base image would bring these
# libraries a second time. The host provides the driver (580 or newer) through the NVIDIA container toolkit.
FROM python:3.12-slim-bookworm

# Triton and torch.compile compile small launchers with a C compiler when a kernel is used for the first time. DeepSpeed
# comes as source and is built below.
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential \
    && rm -rf /var/lib/apt/lists/*

# A container has one environment, so packages go into the image's own Python.
ENV UV_SYSTEM_PYTHON=1 \
    UV_NO_CACHE=1 \
    UV_COMPILE_BYTECODE=1 \
    PYTHONUNBUFFERED=1
RUN pip install --no-cache-dir uv

WORKDIR /opt/dataflex

# The locked packages come before the source: a change of the source does not download them again. The hashes make sure that
# the image has the files the tests ran with. The lock includes the tools of developers, so that one file is enough.
COPY requirements.lock ./
RUN uv pip install --require-hashes -r requirements.lock

COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN uv pip install --no-deps .

# Paths of configurations are relative to the mounted folder.
WORKDIR /work
ENTRYPOINT ["dataflex-cli"]
CMD ["--help"]
