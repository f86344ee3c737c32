"""A connection that its server has closed is not taken for the next request."""

from __future__ import annotations

import subprocess
import sys

from router.transport.http import HttpClient

# In a process of its own: it closes behind each answer without having said so, while our loop
# stands still until it has.
SERVER = """
import socket
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
answer = b"HTTP/1.1 200 OK\\r\\nTransfer-Encoding: chunked\\r\\n\\r\\n2\\r\\nhi\\r\\n0\\r\\n\\r\\n"
while True:
    connection, _ = listener.accept()
    if connection.recv(65536):
        connection.sendall(answer)
    connection.close()
    print("closed", flush=True)
"""


async def test_a_server_that_closes_behind_each_answer_is_asked_anew() -> None:
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    client = HttpClient()
    try:
        url = f"http://127.0.0.1:{server.stdout.readline().strip()}/"
        for _ in range(5):
            status, _, body = await client.fetch("POST", url, headers={}, body=b"{}")
            assert (status, body) == (200, b"hi")
            assert server.stdout.readline() == "closed\n"
    finally:
        await client.aclose()
        server.kill()
        server.wait(10)
        server.stdout.close()
