# The package with the versions of requirements.lock, for NVIDIA GPUs (docs/cluster.md):   docker build -t alps-repro .
# The image's CUDA is the one that the lock's torch is built for. Nobody has built it yet.
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04

# bubblewrap: the sandbox of code that models write. git: the commit in records.
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
      bubblewrap ca-certificates git make python3 python3-venv \
 && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 10001 alps \
 && install --directory --owner alps /opt/alps-repro
USER alps
WORKDIR /opt/alps-repro

RUN python3 -m venv .venv
ENV PATH=/opt/alps-repro/.venv/bin:$PATH
COPY --chown=alps requirements.lock .
RUN pip install --no-cache-dir --requirement requirements.lock
COPY --chown=alps . .
RUN pip install --no-cache-dir --no-deps --editable .

CMD ["alps-repro", "doctor"]
