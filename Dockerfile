# Rivulet in a container:
#
#     docker build --tag rivulet .
#     docker run --read-only --stop-timeout 20 --publish 127.0.0.1:8080:8080 --env RIVULET_AUTH__OPEN_ANYWHERE=true rivulet
#
# Configured by the environment alone, or by a file over /app/config.toml. The stop timeout has to be
# longer than [server] drain. It writes nothing, but where RIVULET_HISTORY__PATH=/data/history.db
# keeps rooms, with a volume at /data.

# Debian's own Python is the version that the tests run on.
FROM debian:bookworm-slim AS base
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 \
    && rm -rf /var/lib/apt/lists/*

FROM base AS build
RUN apt-get update && apt-get install --yes --no-install-recommends python3-venv
# pip stays behind in this stage, and there is no compiler in it either.
RUN python3 -m venv /pip && python3 -m venv --without-pip /venv
COPY requirements.txt /app/
RUN /pip/bin/pip --python /venv/bin/python install --no-cache-dir --no-compile \
    --only-binary :all: --requirement /app/requirements.txt
COPY . /app/
# Compiled here, because nothing can be written later; by hash, because copying may change times.
RUN /venv/bin/python -m compileall -q --invalidation-mode unchecked-hash /venv/lib /app

FROM base
COPY --from=build /venv /venv
COPY --from=build /app /app
RUN install --directory --owner 10001 --group 10001 /data
ENV PYTHONDONTWRITEBYTECODE=1 RIVULET_SERVER__HOST=0.0.0.0
WORKDIR /app
USER 10001:10001
EXPOSE 8080
# Asks the address and port that the server was given: 0.0.0.0 and :: are this machine, too.
HEALTHCHECK --interval=5s --timeout=5s --start-period=30s CMD ["/venv/bin/python", "-c", "\
import http.client, os; \
from streaming.config import load; \
server = load(None, os.environ).server; \
asked = http.client.HTTPConnection(server.host, server.port, timeout=3); \
asked.request('GET', '/health'); \
raise SystemExit(asked.getresponse().status != 200)"]
ENTRYPOINT ["/venv/bin/python", "/app/app.py"]
