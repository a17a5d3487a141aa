"""Where a server of llama.cpp's will be, and a process that says when it is ready there."""

from __future__ import annotations

import errno
import http.client
import os
import select
import socket
import sys
from typing import Optional, Sequence
import urllib.error
import urllib.request

from .command import CommandError


def of(options: Sequence[str]) -> Optional[str]:
    """Where the server will be, by its options and variables; None where that cannot be told.

    Raises:
        CommandError: no port has that number, or nothing can listen there.
    """

    def option(name: str, variable: str, default: str) -> str:
        at = [i for i, word in enumerate(options[:-1]) if word == name]
        return options[at[-1] + 1] if at else os.environ.get(variable, default)

    host = option("--host", "LLAMA_ARG_HOST", "127.0.0.1")
    port = option("--port", "LLAMA_ARG_PORT", "8080")
    prefix = option("--api-prefix", "LLAMA_ARG_API_PREFIX", "")
    secure = option("--ssl-key-file", "LLAMA_ARG_SSL_KEY_FILE", "")
    if not port.isdecimal() or int(port) > 65535:  # llama-server takes its last 16 bits
        raise CommandError(f"--port {port}: want a number from 0 to 65535")
    if host.endswith(".sock") or port == "0":
        return None
    host = next((each for each in host.split(",") if not each.endswith(".sock")), host)
    _check_free(host, int(port))
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)  # noqa: S104 - where to ask, not what to listen on
    if secure:
        return None
    return f"http://{f'[{host}]' if host.count(':') > 1 and '[' not in host else host}:{port}{prefix}"


def _check_free(host: str, port: int) -> None:
    """Raises CommandError where the server could not listen."""
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, where = found[0]
        with socket.socket(family, kind, protocol) as probe:
            if os.name == "posix":  # what an ended server has left behind keeps nobody out
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
            probe.listen(1)
    except OSError as error:
        in_use = error.errno == errno.EADDRINUSE
        why = "another program listens there; --port takes another port" if in_use else error.strerror or error
        raise CommandError(f"{host}:{port}: {why}") from None


def announce(address: str) -> None:
    """A process beside the server, nobody's child: prints the address when the model is loaded, or ends with the server."""
    if sys.stdout is not None:  # closed by whoever started this
        sys.stdout.flush()
    end_here, end_of_server = os.pipe()
    os.set_inheritable(end_of_server, True)  # open as long as the server runs
    child = os.fork()
    if child:
        os.close(end_here)
        os.waitpid(child, 0)
        return
    try:
        os.close(end_of_server)
        if os.fork() == 0:
            while not select.select([end_here], [], [], 0.2)[0]:
                if _healthy(address):
                    print(
                        f"allocmoe-server: ready at {address}, its page at {address}/budget",
                        file=sys.stderr,
                        flush=True,
                    )
                    return
    finally:
        os._exit(0)


def _healthy(address: str) -> Optional[bool]:
    """Whether the server there has its model; None where there is none."""
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5):  # noqa: S310 - http, as _address() has made it
            return True
    except urllib.error.HTTPError:
        return False  # 503 while it loads
    except (OSError, ValueError, http.client.HTTPException):
        return None
