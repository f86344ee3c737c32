"""The outside: HTTP to upstreams. Everything above sees only `HttpClient` and `HttpResponse`."""
