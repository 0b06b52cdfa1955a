# The whole chain in a container:  docker build -t winnow .  &&  docker run --gpus all -v winnow:/home/winnow/chain/outputs winnow
# torch and ONNX Runtime bring their own CUDA libraries; the base gives what the driver expects. Without a GPU, leave out --gpus.
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04

COPY --from=ghcr.io/astral-sh/uv:0.13.9 /uv /usr/local/bin/uv

RUN useradd --create-home --uid 1001 winnow
USER 1001
WORKDIR /home/winnow/chain

COPY --chown=winnow requirements.lock ./
RUN uv venv --python 3.11 .venv && uv pip sync --no-cache --compile-bytecode requirements.lock
ENV PATH=/home/winnow/chain/.venv/bin:$PATH PYTHONUNBUFFERED=1

COPY --chown=winnow . .
# The image holds no git repository and no data. These folders exist so that volumes mounted there belong to the user.
RUN dvc config --local core.no_scm true && mkdir -p outputs repository data/raw data/start .dvc/cache

CMD ["dvc", "repro"]
