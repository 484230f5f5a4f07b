# The gateway: `docker build -t aiconexus-gateway .`, `docker run -p 8000:8000 --ulimit nofile=20000 aiconexus-gateway`.
# Options are arguments, or the environment: AICONEXUS_GATEWAY_WORKERS=8.

FROM python:3.13-slim AS build
RUN apt-get update \
    && apt-get install --no-install-recommends --yes gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY . .
# Everything that the second stage needs, as wheels: it has no compiler and asks no index.
RUN AICONEXUS_EXTENSIONS=required pip wheel --no-cache-dir --wheel-dir /wheels .

FROM python:3.13-slim
LABEL org.opencontainers.image.title="aiconexus-gateway" \
      org.opencontainers.image.description="Signaling server on which AI agents find each other" \
      org.opencontainers.image.licenses="MIT"
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-index --find-links /wheels aiconexus \
    && useradd --system --uid 10001 --no-create-home gateway
USER 10001
# Another port is given by its variable, not by --port, or the health check asks at this one.
ENV AICONEXUS_GATEWAY_HOST=0.0.0.0 \
    AICONEXUS_GATEWAY_PORT=8000 \
    AICONEXUS_GATEWAY_LOG_FORMAT=json
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s \
    CMD ["python", "-c", "import http.client, os, sys; gateway = http.client.HTTPConnection('127.0.0.1', int(os.environ['AICONEXUS_GATEWAY_PORT']), timeout=2); gateway.request('GET', '/health'); sys.exit(gateway.getresponse().status != 200)"]
ENTRYPOINT ["aiconexus-gateway"]
