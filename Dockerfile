# syntax=docker/dockerfile:1
# docker build -t fedtalos .                            for a CPU
# docker build -t fedtalos --build-arg TORCH=cu130 .    for a CUDA card (then: docker run --gpus all ...)
# docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/work" fedtalos federated --dataset digits
FROM python:3.11-slim

# Builds of PyTorch: cpu, or one of CUDA such as cu130; https://pytorch.org/get-started lists them.
ARG TORCH=cpu

WORKDIR /src
COPY constraints.txt ./
# PyTorch comes first, so that a change of our code does not load it again. Its builds are named 2.x.y+cpu, which pip
# takes for newer than the plain 2.x.y.
RUN pip install --no-cache-dir -c constraints.txt --extra-index-url "https://download.pytorch.org/whl/${TORCH}" torch
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE ./
COPY configs configs
COPY src src
RUN pip install --no-cache-dir -c constraints.txt . && rm -rf /src

# Whoever runs it needs a home to keep weights and decoded images in; mount a volume there to keep them.
ENV HOME=/home/fedtalos
RUN mkdir -p /home/fedtalos && chmod 777 /home/fedtalos
WORKDIR /work
ENTRYPOINT ["fedtalos"]
CMD ["--help"]
