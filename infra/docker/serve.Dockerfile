# Nodes of a Ray cluster that serve, and the streaming trainer: no Kubeflow, no compilers; torch without CUDA.
# From the root of a checkout: docker build -f infra/docker/serve.Dockerfile -t rankgr/serve:0.1.0-python3.11 .
ARG PYTHON=3.11.14-slim-bookworm

FROM python:${PYTHON} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src
COPY constraints.txt ./
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN pip install --index-url https://download.pytorch.org/whl/cpu "$(grep '^torch==' constraints.txt)"
COPY pyproject.toml README.md LICENSE ./
COPY infra infra
COPY components components
COPY serving serving
COPY pipelines pipelines
# The code is /app alone; its command stays.
RUN pip install -c constraints.txt . \
  && pip uninstall -y rankgr kfp kfp-kubernetes kfp-pipeline-spec kfp-server-api pip setuptools && rm -rf build ./*.egg-info \
  && printf '%s\n' '#!/opt/venv/bin/python' 'from pipelines.cli import main' 'main()' > /opt/venv/bin/rankgr && chmod 755 /opt/venv/bin/rankgr

FROM python:${PYTHON}
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/app PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/home/rankgr RAY_USAGE_STATS_ENABLED=0
# Without the third Ray reads a line of HAProxy's log a request, in Python; replicas count as well.
ENV RAY_SERVE_ENABLE_HA_PROXY=1 RAY_SERVE_THROUGHPUT_OPTIMIZED=1 RAY_SERVE_HAPROXY_METRICS_ENABLED=0
ENV RAY_SERVE_HAPROXY_RETRY_ON="conn-failure empty-response" RAY_SERVE_HAPROXY_RETRIES=10
ENV RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serving.repeats.middlewares
RUN pip uninstall -y pip setuptools wheel && useradd --uid 10001 --create-home --shell /usr/sbin/nologin rankgr
COPY --from=build /opt/venv /opt/venv
COPY --from=build --chown=root:root /src /app
USER 10001:10001
WORKDIR /app
EXPOSE 8000 8001
# Of the command below: a replica answers through the proxy. Without Redis the fallback does, so that this is not /readyz. What else runs
# in this image, as the nodes that KubeRay starts, has probes of its own.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
  CMD ["python", "-c", \
    "import http.client as h, sys; c = h.HTTPConnection('127.0.0.1', 8000, timeout=4); c.request('GET', '/healthz'); sys.exit(c.getresponse().status // 100 != 2)"]
CMD ["rankgr", "serve"]
