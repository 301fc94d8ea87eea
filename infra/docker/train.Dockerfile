# Every step of a Kubeflow run and every node of a Ray cluster that trains. With GPUs: the torch wheel of constraints.txt brings CUDA.
# From the root of a checkout: docker build -f infra/docker/train.Dockerfile -t rankgr/train:0.1.0-python3.11 .
ARG PYTHON=3.11.14-slim-bookworm

FROM python:${PYTHON} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src
COPY constraints.txt ./
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# torch comes first: with it in place, nothing else draws in another build of it.
RUN pip install -c constraints.txt "$(grep '^torch==' constraints.txt)"
COPY pyproject.toml README.md LICENSE ./
COPY infra infra
COPY components components
COPY serving serving
COPY pipelines pipelines
# The code is /app alone; its command stays.
RUN pip install -c constraints.txt ".[text]" && pip uninstall -y rankgr pip setuptools && rm -rf build ./*.egg-info \
  && printf '%s\n' '#!/opt/venv/bin/python' 'from pipelines.cli import main' 'main()' > /opt/venv/bin/rankgr && chmod 755 /opt/venv/bin/rankgr

FROM python:${PYTHON}
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/app PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/home/rankgr RAY_USAGE_STATS_ENABLED=0
RUN pip uninstall -y pip setuptools wheel && useradd --uid 10001 --create-home --shell /usr/sbin/nologin rankgr
COPY --from=build /opt/venv /opt/venv
COPY --from=build --chown=root:root /src /app
USER 10001:10001
WORKDIR /app
# A pod of a step only lives while its step does; a node of Ray is well while its raylet answers.
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=3 \
  CMD ["python", "-c", \
    "import http.client as h, sys; c = h.HTTPConnection('127.0.0.1', 52365, timeout=8); c.request('GET', '/api/local_raylet_healthz'); sys.exit(c.getresponse().status // 100 != 2)"]
CMD ["rankgr", "--help"]
