# Rungway in a container: non-root, a read-only root file system will do, no build tools inside.
# The configuration is mounted at /etc/rungway/rungway.toml; the image holds no secret.

FROM python:3.11-slim-bookworm AS build
WORKDIR /src
RUN python3 -m venv /opt/rungway
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY router router
RUN /opt/rungway/bin/python -m pip install --no-cache-dir --constraint constraints.txt ".[valkey]" \
 && /opt/rungway/bin/python -m pip uninstall --yes setuptools pip

FROM python:3.11-slim-bookworm
LABEL org.opencontainers.image.title="Rungway" \
      org.opencontainers.image.description="A local daemon that speaks the OpenAI API and answers from a ladder of models" \
      org.opencontainers.image.licenses="Apache-2.0"
# The base image's own pip is of no use here and would only age.
RUN rm -rf /usr/local/lib/python3.11/site-packages/* /usr/local/lib/python3.11/ensurepip \
           /usr/local/bin/pip* /usr/lib/python3/dist-packages/* /usr/share/python-wheels \
           /usr/lib/python3.11/ensurepip \
 && useradd --uid 10001 --user-group --no-create-home --home-dir /var/lib/rungway \
            --shell /usr/sbin/nologin rungway \
 && install -d -o rungway -g rungway -m 0700 /var/lib/rungway \
 && install -d -m 0755 /etc/rungway
COPY --from=build /opt/rungway /opt/rungway
ENV PATH=/opt/rungway/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    RUNGWAY_CONFIG=/etc/rungway/rungway.toml \
    STATE_DIRECTORY=/var/lib/rungway
USER 10001:10001
WORKDIR /
VOLUME /var/lib/rungway
EXPOSE 8484
STOPSIGNAL SIGTERM
# 401 is a sign of life too: off loopback /health needs a key unless public_ops says otherwise.
HEALTHCHECK --interval=15s --timeout=5s --start-period=20s --retries=3 \
  CMD ["/opt/rungway/bin/python", "-c", "import http.client as c; h = c.HTTPConnection('127.0.0.1', 8484, timeout=3); h.request('GET', '/health'); raise SystemExit(h.getresponse().status != 200)"]
ENTRYPOINT ["/opt/rungway/bin/rungway"]
CMD ["serve", "--host", "0.0.0.0"]
