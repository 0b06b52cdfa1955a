# MLflow's server with the driver of PostgreSQL, in the versions of requirements.lock. Built by compose.yaml from the project's root.
FROM python:3.11.14-slim-bookworm

COPY --from=ghcr.io/astral-sh/uv:0.13.9 /uv /usr/local/bin/uv

RUN useradd --create-home --uid 1001 mlflow
USER 1001
WORKDIR /home/mlflow

COPY requirements.lock ./
RUN uv venv .venv && uv pip install --no-cache --compile-bytecode --constraint requirements.lock mlflow psycopg2-binary==2.9.13
ENV PATH=/home/mlflow/.venv/bin:$PATH PYTHONUNBUFFERED=1

# So that a volume mounted there belongs to the user.
RUN mkdir artifacts

CMD ["mlflow", "server"]
